"Render README.md from `nbs/index.ipynb`: `python docs/readme.py`; with `--check`, only say whether they are in step"
import json, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'docs'))

from quarto import callouts, clean, links, options, text

HIDDEN = {'hide', 'export', 'exporti', 'exports', 'default_exp'}

def callout(kind, title, body):
    "GitHub's own callouts have no titles"
    lines = [f'[!{kind.upper()}]', *([f'**{title}**', ''] if title else []), *body.splitlines()]
    return '\n'.join(f'> {o}'.rstrip() for o in lines)

def link(path, anchor):
    "Pages of the site are notebooks in the repository; their anchors differ there"
    if not (root/'nbs'/f'{path}.ipynb').exists(): raise ValueError(f'nbs/index.ipynb links to {path}, which is no notebook')
    return f'nbs/{path}.ipynb'

def fence(s, lang=''):
    ticks = '`'*(4 if '```' in s else 3)
    return f'{ticks}{lang}\n{s}\n{ticks}'

def output(o):
    "Text of an output, markdown where it offers it; nothing for a figure"
    if o['output_type'] == 'stream': return fence(o['text'], 'text')
    d = o.get('data', {})
    if 'text/markdown' in d: return links(text(d['text/markdown']), link)
    if 'text/plain' not in d or any(k.startswith('image/') for k in d): return ''
    return fence(text(d['text/plain']), 'text')

def parts(c):
    "What the README shows of the cell `c`"
    src = text(c['source'])
    if c['cell_type'] == 'markdown': return [links(callouts(src, callout), link).replace('](images/', '](nbs/images/')]
    opts,code = options(src)
    if c['cell_type'] != 'code' or HIDDEN & opts.keys() or opts.get('include') == 'false': return []
    outs = [] if opts.get('output') == 'false' else [output(o) for o in map(clean, c['outputs']) if o]
    return ([] if opts.get('echo') == 'false' or not code else [fence(code, 'python')]) + outs

def render():
    cells = json.loads((root/'nbs'/'index.ipynb').read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(o.strip('\n') for c in cells for o in parts(c) if o.strip()) + '\n'

if __name__ == '__main__':
    md,dst = render(),root/'README.md'
    if '--check' not in sys.argv: dst.write_text(md, encoding='utf-8')
    elif not dst.exists() or dst.read_text(encoding='utf-8') != md:
        sys.exit('README.md is out of step with nbs/index.ipynb. Run: python docs/readme.py')
