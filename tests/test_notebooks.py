"Every notebook runs from top to bottom"
import os
from pathlib import Path
import matplotlib, pytest, torch
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

root = Path(__file__).parent.parent
skip = get_config(root).tst_flags
matplotlib.use('agg')

@pytest.fixture(autouse=True)
def all_cores():
    "Notebooks train networks: there threads pay"
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)

SLOW = {     # train for minutes, or need much memory
    'tutorials/export/onnx_export.ipynb', 'tutorials/misc/choosing_ranks.ipynb',
    'tutorials/misc/fc_decomposer.ipynb', 'tutorials/misc/transformers.ipynb',
    'tutorials/prune/pruner.ipynb', 'tutorials/quantize/quantizer.ipynb',
    'tutorials/sparse/sparsifier.ipynb', 'tutorials/workflow.ipynb'}

def notebooks():
    for p in sorted(nbglob(root/'nbs', as_path=True)):
        name = p.relative_to(root/'nbs').as_posix()
        yield pytest.param(p, id=name, marks=[pytest.mark.slow]*(name in SLOW))

@pytest.mark.parametrize('nb', [*notebooks()])
def test_notebook(nb):
    ok,_ = run_nb(nb, skip_flags=skip.split() if isinstance(skip, str) else list(skip), basepath=root)
    assert ok, f'{nb.name} failed; its traceback is in the captured stderr'
