"Build the site from the notebooks into `_docs/`: `python docs/build.py`. To read it: `python -m http.server -d _docs`"
import os, re, shutil, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbs,proc,out = root/'nbs',root/'_proc',root/'_docs'
sys.path[:0] = [str(root), str(root/'docs')]

import yaml
from fastcore.parallel import parallel
from nbdev.doclinks import nbglob
from nbdev_sphinx import pages, toctree
from showdoc import process
from source import modules, page
from sphinx.cmd.build import main as sphinx

def check_sidebar():
    "The sidebar lists each notebook, and nothing else"
    listed = pages(yaml.safe_load((nbs/'sidebar.yml').read_text())['website']['sidebar']['contents'])
    there = {o.relative_to(nbs).with_suffix('').as_posix() for o in nbglob(nbs, as_path=True)}
    msgs = [f'nbs/sidebar.yml lists {o}.ipynb, which does not exist' for o in listed if o not in there]
    msgs += [f'nbs/{o}.ipynb is not in nbs/sidebar.yml' for o in sorted(there - set(listed))]
    msgs += [f'nbs/sidebar.yml lists {o}.ipynb twice' for o in sorted({o for o in listed if listed.count(o) > 1})]
    if msgs: sys.exit('\n'.join(msgs))
    return listed

def proc_nbs(listed):
    "nbdev's processing of `nbs/` into `_proc/`"
    shutil.rmtree(proc, ignore_errors=True)
    shutil.copytree(nbs, proc, ignore=shutil.ignore_patterns('.*', '_*', '*.yml', '*.css'))
    files = [(nbs/f'{o}.ipynb', proc/f'{o}.ipynb') for o in listed]
    parallel(process, files, n_workers=min(len(files), os.cpu_count()), method='spawn')

def add_pages():
    "Markdown files of the project, and a page for the source of each module"
    for o in ('benchmarks', 'docs'): (proc/o).mkdir()
    for o in (root/'CHANGELOG.md', root/'docs'/'README.md', *(root/'benchmarks').glob('*.md')):
        toc = '\n' + toctree('', ['*'], ':glob:') if o.parent.name == 'benchmarks' and o.stem == 'README' else ''
        (proc/o.relative_to(root)).write_text(o.read_text(encoding='utf-8') + toc, encoding='utf-8')
    for o in modules(root/'fasterai'):
        dst = (proc/'source'/o.relative_to(root/'fasterai')).with_suffix('.md')
        dst.parent.mkdir(parents=True, exist_ok=True)
        dst.write_text(page(o, '.'.join(o.relative_to(root).with_suffix('').parts)), encoding='utf-8')

_re_load = re.compile(r'<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)\s*=\s*["\']?((?:https?:)?//[^"\'\s>]+)'
                      r'|(?:@import\s*["\']|url\(\s*["\']?)((?:https?:)?//[^"\'\s)]+)')

def check_html():
    "Pages load nothing from elsewhere and show no path of the machine that built them"
    msgs,here = [],[str(o) for o in (root, Path.home(), Path(sys.prefix)) if len(o.parts) > 1]
    for f in sorted([*out.rglob('*.html'), *out.glob('_static/**/*.css')]):
        s = f.read_text(encoding='utf-8')
        msgs += [f'{f.relative_to(out)} loads {m[1] or m[2]}' for m in _re_load.finditer(s)]
        msgs += [f'{f.relative_to(out)} shows the local path {o}' for o in here if f'{o}/' in s]
    return msgs

def main():
    os.chdir(root)                 # nbdev looks for pyproject.toml from here
    proc_nbs(check_sidebar())
    add_pages()
    shutil.rmtree(out, ignore_errors=True)
    # -n -W --keep-going: every broken link, anchor or cell is reported, and one is enough to fail
    rc = sphinx(['-q', '-n', '-W', '--keep-going', '-E', '-c', 'docs', '-d', str(proc/'.doctrees'), str(proc), str(out)])
    shutil.rmtree(root/'jupyter_execute', ignore_errors=True)   # left by myst-nb
    for o in (out/'_static'/'mathjax').glob('*.js'):            # one of the bundles is loaded; each has 2 MB
        if o.name != 'tex-chtml.js': o.unlink()
    msgs = check_html() + (['the site has warnings; notebook.ipynb:50003 is line 3 of its 5th cell'] if rc else [])
    if msgs: sys.exit('\n'.join(msgs))
    print(f'{len([*out.rglob("*.html")])} pages in {out.relative_to(root)}/. To read them: python -m http.server -d {out.relative_to(root)}, '
          'then open http://localhost:8000')

if __name__ == '__main__': main()
