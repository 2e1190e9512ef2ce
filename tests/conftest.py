"Settings that all tests share"
import os, time

# The threads of LAPACK wait for each other by spinning; where cores are shared, two are many times slower than one.
# Set before the first import, and inherited by the processes that tests start.
os.environ |= dict.fromkeys(['OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'], '1')
from threading import Timer
import pytest, torch

torch.set_num_threads(1)

SHOWN_AFTER = 5     # seconds
_terminal = pytest.StashKey()

def pytest_configure(config): config.stash[_terminal] = open(os.dup(1), 'w')     # tests write to what replaces it

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    "Show the name of a test that takes long while it runs, and how long it took"
    out,start,shown = item.config.stash[_terminal],time.monotonic(),[]
    def say(s): print(s, end='', file=out, flush=True)
    def show():
        shown.append(item)
        say(f'\n{item.nodeid} ')
    timer = Timer(SHOWN_AFTER, show)
    timer.daemon = True
    timer.start()
    try: return (yield)
    finally:
        timer.cancel()
        if shown: say(f'{time.monotonic() - start:.0f} s\n')
