"A Sphinx extension that reads the notebooks nbdev prepares for Quarto"
import json, re
from pathlib import Path
from posixpath import dirname, join, normpath

import yaml
from docutils import nodes
from sphinx.util import logging

from quarto import callouts, clean, links, options, text
from source import defined

lib = Path(__file__).resolve().parent.parent/'fasterai'

log = logging.getLogger(__name__)

def slug(s):
    "Anchor of a heading as pandoc makes it, so that a link works in Quarto and here"
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', s.lower()).strip())) or 'section'

def groups(sidebar):
    "`(caption, [notebook, …])` of each group in the contents of Quarto's sidebar"
    top = [o for o in sidebar if isinstance(o, str)]
    return [('', top)] + [(o['section'], o['contents']) for o in sidebar if not isinstance(o, str)]

def pages(sidebar): return [o.removesuffix('.ipynb') for _,os in groups(sidebar) for o in os]

def md_cell(s): return dict(cell_type='markdown', metadata={}, source=s)

def head(src, module):
    "Title, description and module, from the front matter that nbdev collects"
    fm = yaml.safe_load(src.strip().strip('-'))
    if not {'title', 'description'} <= fm.keys(): raise ValueError('the first cell must be "# Title" and "> one line"')
    lead = f":::{{container}} lead\n{fm['description']}\n:::"
    return '\n\n'.join([f"# {fm['title']}", lead, *([f'`{module}`'] if module else [])])

def callout(kind, title, body): return f':::{{admonition}} {title or kind.title()}\n:class: {kind}\n\n{body}\n:::'

def toctree(caption, docs, *opts):
    return '\n'.join(['```{toctree}', ':hidden:', *([f':caption: {caption}'] if caption else []), *opts, '', *docs, '```', ''])

def convert(nb, docname, env):
    "Cells for myst-nb: markdown, and code with tags in place of Quarto's options; documented names are noted in `env`"
    cells,shown,module,syms = [],set(),nb['metadata'].get('module'),env.domaindata.setdefault('fasterai', {'Data': 'glossary'})

    def link(path, anchor):
        found = normpath(join(dirname(docname), path)) in env.found_docs
        return f"{path}.{'ipynb' if found else 'html'}{anchor}"   # what is not found is reported by Sphinx

    def md(s): cells.append(md_cell(links(callouts(s, callout), link)))

    for c in nb['cells']:
        src = text(c['source'])
        if c['cell_type'] == 'raw': cells.append(md_cell(links(head(src, module), link)))
        elif c['cell_type'] == 'markdown': md(src)
        else:
            opts,code = options(src)
            outs = [] if opts.get('output') == 'false' else [o for o in map(clean, c['outputs']) if o]
            if sym := re.match(r'show_doc\(\s*([\w.]+)', code):
                entry = '\n'.join(text(o['data'].get('text/markdown')) for o in outs if 'data' in o)
                if not entry or sym[1] in shown: continue       # placed by the notebook, and once more by nbdev
                shown.add(sym[1])
                syms.setdefault(sym[1], docname)
                md(entry)
            elif opts.get('include') != 'false':
                image = dict(alt=opts['fig-alt']) if 'fig-alt' in opts else {}
                tags = ([] if code and opts.get('echo') != 'false' else ['remove-input']) + (['hide-input'] if opts.get('code-fold') == 'true' else [])
                meta = dict(tags=tags, mystnb=dict(image=image))
                if code or outs: cells.append(c | dict(source=code, outputs=outs, metadata=meta))
    return cells

def read(app, docname, content):
    "Give Sphinx the converted notebook in place of the one in `_proc/`"
    if app.env.doc2path(docname).suffix != '.ipynb': return
    nb = json.loads(content[0])
    try: cells = convert(nb, docname, app.env)
    except ValueError as e:
        cells = [md_cell(f'# {docname}')]
        log.warning(str(e), location=docname)
    if docname == app.config.root_doc:
        toc = [(cap, ['Home <self>' if o == f'{docname}.ipynb' else o for o in os]) for cap,os in groups(app.config.nbdev_sidebar)]
        toc.append(('Project', ['CHANGELOG', 'benchmarks/README', 'docs/README']))
        cells += [md_cell(toctree(cap, os)) for cap,os in toc if os]
    for i,c in enumerate(cells): c['id'] = f'cell-{i}'
    kernel = dict(name='python3', display_name='Python 3', language='python')
    # Not nbdev's metadata: state of widgets would load scripts from elsewhere, for a kernel that is not there.
    content[0] = json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5))

def prepare(app, doctree):
    "Give each heading its pandoc anchor as the id in the address bar and the contents, and API tables and their cells a class"
    for s in doctree.findall(nodes.section):
        if 'slug' in s and s['slug'] not in s['ids']: s['ids'].insert(0, s['slug'])
    for t in doctree.findall(nodes.table):
        if not (heads := api_heads(t)): continue
        t['classes'].append('api')
        for r in t.findall(nodes.row):
            for k,o in zip(heads, r): o['classes'].append(k)

def api_heads(table):
    "Classes for the columns of a table of parameters, which has an empty first heading; None for other tables"
    heads = [o.astext().lower() for o in next(table.findall(nodes.row))]
    return ['name', *heads[1:]] if heads[0] == '' and {*heads[1:]} <= {'type', 'default', 'details'} else None

def no_link(o):
    "Is `o` in a heading, a link, or the name of a parameter?"
    while o := o.parent:
        if isinstance(o, (nodes.reference, nodes.title)) or isinstance(o, nodes.entry) and 'name' in o['classes']: return True
    return False

def target(app, name, docname):
    "Page and anchor that a name in backticks means: an entry of the API, a module, or a Markdown file of the project"
    syms,found = app.env.domaindata.get('fasterai', {}),app.env.found_docs
    name = re.sub(r'^learn\.', 'Learner.', name)
    if name in syms: return syms[name], f'#{slug(name)}'
    if name.endswith('.md'): pages = name[:-3],normpath(join(dirname(docname), name[:-3]))
    else: pages = (join('source', *name.split('.')[1:]),) if name.startswith('fasterai.') else ()
    return next((o for o in pages if o in found and o != docname), None), ''

def symbols(app, doctree, docname):
    "Link what is in backticks, `name` or `name()`, to its entry or page; names in types too; and entries to their source"
    def ref(page, anchor, child='', **kw):
        return nodes.reference('', child, refuri=app.builder.get_relative_uri(docname, page) + anchor, internal=True, **kw)

    def linked(s):
        page,anchor = target(app, s, docname)
        return ref(page, anchor, s) if page else nodes.Text(s)

    for o in list(doctree.findall(nodes.literal)):
        if no_link(o): continue
        cell = next((p for p in (o.parent, o.parent.parent) if isinstance(p, nodes.entry)), None)
        if cell and 'type' in cell['classes']: o[:] = [linked(s) for s in re.split(r'(\w+)', o.astext()) if s]
        elif (to := target(app, o.astext().removesuffix('()'), docname))[0]:
            link = ref(*to)
            o.replace_self(link)
            link += o
    src,syms = join('source', docname),app.env.domaindata.get('fasterai', {})
    if src not in app.env.found_docs: return
    for t in list(doctree.findall(nodes.title)):    # the word "source" is in the style sheet, so that a search does not find it
        if syms.get(name := t.astext()) == docname and name in defined(lib/f'{docname}.py'):
            t += ref(src, f'#{name}', classes=['source'], reftitle='source')

def setup(app):
    app.add_config_value('nbdev_sidebar', [], 'env')
    app.connect('source-read', read)
    app.connect('doctree-read', prepare, priority=400)   # before the table of contents is collected
    app.connect('doctree-resolved', symbols)
    return dict(parallel_read_safe=False, parallel_write_safe=True)
