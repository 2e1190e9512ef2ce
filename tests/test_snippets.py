"""Every block of code in README.md and in the pages runs as it is written, in order, in an empty folder.

Python blocks of one page share their names; the README starts from nothing. A block of a page may use what the page has built before: a Learner
`learn` with its `dls` and `model`, and the folder `llama`, here small ones. What installs something, serves the site, or needs several machines is
recognized by its command and not run; the main job itself is run on a small network in `test_cli.py`. What is not meant to be run is marked `text`."""
import json, os, re, stat, subprocess, sys
from pathlib import Path

import matplotlib, pytest, torch
from nbdev.doclinks import nbglob

root = Path(__file__).parent.parent
matplotlib.use('agg')
FENCE = re.compile(r'^(?P<ticks>`{3,})(?P<lang>[^\n`]*)\n(?P<code>.*?)^(?P=ticks)[ \t]*$', re.M | re.S)
NOT_RUN = re.compile(r'\bpip install\b|\bpython -m pytest\b|docs/build\.py|http\.server|^\s*(torchrun|srun)\b')


def markdown(path):
    "The text of `path`; of a notebook its markdown cells"
    if path.suffix == '.md': return path.read_text(encoding='utf-8')
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def blocks(path): return [(m['lang'].strip(), m['code']) for m in FENCE.finditer(markdown(path))]


def commands(code):
    "Lines of a block for the shell, continued ones joined, without those that are not run"
    lines = re.sub(r'\\\n\s*', ' ', code).splitlines()
    return [l for l in lines if l.strip() and not l.lstrip().startswith('#') and not NOT_RUN.search(l)]


pages = [root/'README.md'] + sorted(p for p in nbglob(root/'nbs', as_path=True) if p.name != 'index.ipynb')    # README.md is index.ipynb
with_python = [p for p in pages[1:] if any(l == 'python' for l,_ in blocks(p))]
with_sh = [p for p in pages[1:] if any(commands(c) for l,c in blocks(p) if l == 'sh')]


def name(p): return str(p.relative_to(root))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An empty folder to work in, with the command on the path; threads, random state and path as before afterwards"
    script = tmp_path/'bin'/'fasterai_decompose'
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; from fasterai.cli import main; sys.exit(main())" "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    (tmp_path/'work').mkdir()
    monkeypatch.chdir(tmp_path/'work')
    monkeypatch.setenv('PATH', f'{script.parent}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.setenv('PYTHONPATH', f'{root}{os.pathsep}{os.environ.get("PYTHONPATH", "")}')
    was,flags = torch.get_rng_state(),(torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    yield tmp_path/'work'
    torch.set_rng_state(was)
    torch.backends.cudnn.deterministic,torch.backends.cudnn.benchmark = flags
    matplotlib.pyplot.close('all')


def run_sh(code):
    for l in commands(code):
        r = subprocess.run(['bash', '-c', l], capture_output=True, text=True)
        assert r.returncode == 0, f'{l}\n{r.stdout}\n{r.stderr}'
        assert 'Traceback' not in r.stderr and 'FutureWarning' not in r.stderr, r.stderr


def run_python(code, ns, path): exec(compile(code, name(path), 'exec'), ns)


def llama():
    "A folder as transformers writes it"
    from transformers import LlamaConfig, LlamaForCausalLM
    cfg = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(cfg).save_pretrained('llama')


def reader():
    "Names that a reader of a page has: the imports of the page, and models of their own"
    ns = {'__name__': '__page__'}
    exec('from fastai.vision.all import *\nfrom fasterai.misc.all import *', ns)
    exec('''dls = digits_dls(n=96, bs=32)
model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10))
learn = Learner(dls, model, metrics=accuracy)''', ns)
    return ns


@pytest.mark.slow
def test_readme(folder):
    ns = {'__name__': '__readme__'}
    for lang,code in blocks(root/'README.md'):
        if lang == 'python': run_python(code, ns, root/'README.md')
        elif lang == 'sh': run_sh(code)


@pytest.mark.parametrize('page', with_python, ids=name)
def test_python_of_a_page(folder, page):
    llama()
    ns = reader()
    for lang,code in blocks(page):
        if lang == 'python': run_python(code, ns, page)


@pytest.mark.slow
@pytest.mark.parametrize('page', with_sh, ids=name)
def test_commands_of_a_page(folder, page):
    llama()
    for lang,code in blocks(page):
        if lang == 'sh': run_sh(code)


@pytest.mark.parametrize('page', pages, ids=name)
def test_every_block_names_its_language(page):
    "A block without a language, or with another one, would not be run"
    assert {l for l,_ in blocks(page)} <= {'python', 'sh', 'text', 'json', 'html'}


def test_there_are_snippets_to_run():
    assert sum(l == 'python' for l,_ in blocks(root/'README.md')) >= 5 and sum(len(commands(c)) for l,c in blocks(root/'README.md') if l == 'sh') >= 3
    assert with_python and with_sh


def test_installation_commands_fit_the_project():
    "They are not run; what they name is there"
    sh = '\n'.join(c for l,c in blocks(root/'README.md') if l == 'sh')
    assert "pip install -e '.[dev]' && python -m pytest" in sh and 'pip install -e . && fasterai_decompose' in sh
    assert (root/'docs'/'build.py').is_file() and 'fasterai_decompose=' in (root/'settings.ini').read_text() and "'dev':" in (root/'setup.py').read_text()
