"""Ranks far below the smaller side of a weight: block Krylov against the Gram route of 'auto' and `torch.svd_lowrank`, time and error.

README.md beside this file says how to run it and what each column means.
"""
import os, platform, sys, time
from pathlib import Path
import torch
from fastcore.script import call_parse, store_true
from fasterai.lowrank.factorize import factorize
from fasterai.lowrank.svd import KRYLOV_BELOW
sys.path.insert(0, str(Path(__file__).resolve().parent))
from decompose import _cpu

FULL,QUICK = [(1024, 4096), (4096, 4096)],[(512, 1024)]
SHARES = 1/256, 1/64, KRYLOV_BELOW  # ranks, of the smaller side
EXCESS = 1e-2                       # largest error above the optimum, as a share of it

def _weights(m, n):
    "Name and weight with singular values: of a random matrix, and falling like those of trained layers"
    torch.manual_seed(0)
    i,U,V = torch.arange(1, m+1),torch.linalg.qr(torch.randn(m, m)).Q,torch.linalg.qr(torch.randn(n, m)).Q
    yield 'random', torch.randn(m, n)
    yield r'$i^{-1/2}$', U*i**-.5 @ V.T
    yield '$i^{-1}$', U*i**-1. @ V.T

def _best(f, repeats=3):
    ts = []
    for _ in range(repeats):
        t = time.perf_counter()
        res = f()
        ts.append(time.perf_counter() - t)
    return min(ts), res

def _excess(W, Q, best):
    "Error of the projection on the columns of `Q` above the least one, as a share of it, in float64"
    Q,W = torch.linalg.qr(Q.double()).Q,W.double()
    return max(0, (torch.norm(W - Q @ (Q.T @ W))/best).item() - 1)

def _measure(m, n):
    "One row of the table per weight and rank, and its checks"
    for kind,W in _weights(m, n):
        S = torch.linalg.eigvalsh(W.double() @ W.double().T).flip(0).clamp(min=0)
        for k in sorted({max(1, int(s*m)) for s in SHARES}):
            best = S[k:].sum().sqrt()
            fns = dict(auto=lambda: factorize(W, rank=k).L, krylov=lambda: factorize(W, rank=k, solver='krylov').L,
                       lowrank=lambda: torch.svd_lowrank(W, k+8, niter=4)[0][:,:k])
            times,excess = {},{}
            for name,f in fns.items():
                times[name],Q = _best(f)
                excess[name] = _excess(W, Q, best)
            cells = [f'{m} × {n}', kind, str(k), *(o for f in fns for o in (f'{times[f]:.2f}', f'{excess[f]:.0e}')), f'{times["krylov"]/times["auto"]:.2f}']
            what = f'{m} × {n}, {kind}, rank {k}'
            yield f'| {" | ".join(cells)} |', [(excess['krylov'] <= EXCESS, f'{what}: error {excess["krylov"]:.0e} above the optimum, at most {EXCESS:g}'),
                (times['krylov'] <= times['auto'], f'{what}: {times["krylov"]/times["auto"]:.2f} of the time of auto, at most 1')]

@call_parse
def main(
    quick: store_true, # one small weight, in seconds
    threads: int = 1,  # threads of torch
    out: str = '',     # Markdown file to write
):
    "Measure block Krylov at small ranks; exit code 1 where a target is missed"
    torch.set_num_threads(threads)
    rows,checks = [],[]
    for shape in QUICK if quick else FULL:
        for row,c in _measure(*shape):
            rows.append(row)
            checks += c
    missed = [s for ok,s in checks if not ok]
    text = '\n'.join(['# Small ranks', '', f'`python benchmarks/small_ranks.py{" --quick" if quick else ""} --threads {threads}`', '',
        f'{_cpu()}, {os.cpu_count()} cores, {threads} thread{"s"[:threads > 1]}; {platform.system()}, Python {platform.python_version()}, '
        f'torch {torch.__version__}. Times in seconds, errors above the optimum as a share of it.', '',
        '| weight | singular values | rank | auto | error | krylov | error | svd_lowrank | error | krylov to auto |', '| --- | --- ' + '| ---: '*8 + '|',
        *rows, '', f'{len(checks) - len(missed)} of {len(checks)} targets met.', '', *[f'- **missed**: {s}' for s in missed], ''])
    print(text)
    if out: Path(out).write_text(text.rstrip() + '\n', encoding='utf-8')
    sys.exit(bool(missed))
