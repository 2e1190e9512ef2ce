"Every notebook runs from top to bottom"
from pathlib import Path
import matplotlib, pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

root = Path(__file__).parent.parent
skip = get_config(root).tst_flags
matplotlib.use('agg')

@pytest.mark.parametrize('nb', sorted(nbglob(root/'nbs', as_path=True)), ids=lambda p: str(p.relative_to(root/'nbs')))
def test_notebook(nb):
    ok,_ = run_nb(nb, skip_flags=skip.split() if isinstance(skip, str) else list(skip), basepath=root)
    assert ok, f'{nb.name} failed; its traceback is in the captured stderr'
