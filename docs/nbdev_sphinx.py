"A Sphinx extension that reads the notebooks nbdev prepares for Quarto"
import json, re
from posixpath import dirname, join, normpath

import yaml
from docutils import nodes
from sphinx.util import logging

from quarto import callouts, clean, links, options, text

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

def toctree(caption, docs):
    return '\n'.join(['```{toctree}', ':hidden:', *([f':caption: {caption}'] if caption else []), '', *docs, '```'])

def convert(nb, docname, env):
    "Cells for myst-nb: markdown, and code with tags in place of Quarto's options; documented names are noted in `env`"
    cells,module,syms = [],nb['metadata'].get('module'),env.domaindata.setdefault('fasterai', {})

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
                if entry: syms.setdefault(sym[1], docname)
                md(entry)
            elif opts.get('include') != 'false':
                if opts.get('echo') == 'false': code = ''
                image = dict(alt=opts['fig-alt']) if 'fig-alt' in opts else {}
                tags = ([] if code else ['remove-input']) + (['hide-input'] if opts.get('code-fold') == 'true' else [])
                meta = dict(tags=tags, mystnb=dict(image=image))
                if code or outs: cells.append(c | dict(source=code, outputs=outs, metadata=meta))
    return cells

def read(app, docname, content):
    "Give Sphinx the converted notebook in place of the one in `_proc/`"
    nb = json.loads(content[0])
    try: cells = convert(nb, docname, app.env)
    except ValueError as e:
        cells = [md_cell(f'# {docname}')]
        log.warning(str(e), location=docname)
    if docname == app.config.root_doc:
        toc = [(cap, [o for o in os if o != f'{docname}.ipynb']) for cap,os in groups(app.config.nbdev_sidebar)]
        cells += [md_cell(toctree(cap, os)) for cap,os in toc if os]
    for i,c in enumerate(cells): c['id'] = f'cell-{i}'
    kernel = dict(name='python3', display_name='Python 3', language='python')
    # Not nbdev's metadata: state of widgets would load scripts from elsewhere, for a kernel that is not there.
    content[0] = json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5))

def anchors(app, doctree):
    "Give each heading its pandoc anchor as the id shown in the address bar and the table of contents"
    for s in doctree.findall(nodes.section):
        if 'slug' in s and s['slug'] not in s['ids']: s['ids'].insert(0, s['slug'])

def no_link(o):
    "Is `o` in a heading or a link, or the name of a parameter: first column of a table with an empty first heading?"
    col = None
    while o := o.parent:
        if isinstance(o, (nodes.reference, nodes.title)): return True
        if isinstance(o, nodes.entry): col = o.parent.index(o)
        if isinstance(o, nodes.tgroup): return col == 0 and not next(o.findall(nodes.entry)).astext()
    return False

def symbols(app, doctree, docname):
    "Link a documented name in backticks, `name` or `name()`, to its entry"
    syms = app.env.domaindata.get('fasterai', {})
    for o in list(doctree.findall(nodes.literal)):
        name = o.astext().removesuffix('()')
        if name not in syms or no_link(o): continue
        uri = app.builder.get_relative_uri(docname, syms[name])
        ref = nodes.reference('', '', refuri=f'{uri}#{slug(name)}', internal=True)
        o.replace_self(ref)
        ref += o

def setup(app):
    app.add_config_value('nbdev_sidebar', [], 'env')
    app.connect('source-read', read)
    app.connect('doctree-read', anchors, priority=400)   # before the table of contents is collected
    app.connect('doctree-resolved', symbols)
    return dict(parallel_read_safe=False, parallel_write_safe=True)
