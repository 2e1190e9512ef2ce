"""How calibration, spectra and factors get faster with more processes on this machine.

README.md beside this file says how to run it and what each column means.
"""
import json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path
import torch, torch.distributed as dist
from fastcore.script import call_parse, store_true
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
PHASES = 'calibrate','spectra','factors'

def _model(width, blocks):
    torch.manual_seed(0)
    return nn.Sequential(*[o for _ in range(blocks) for o in (nn.Linear(width, 4*width), nn.GELU(), nn.Linear(4*width, width))]).eval()

def worker(out, width, blocks, batches):
    "Seconds of each phase on this rank, which waits for the others at the end of each; rank 0 writes them"
    from fasterai.misc.all import FC_Decomposer, ParamBudget, calibrate, count_params
    if 'WORLD_SIZE' in os.environ: dist.init_process_group('gloo')
    rank,size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.set_num_threads(1)
    model,g,times = _model(width, blocks),torch.Generator().manual_seed(1),{}
    data = [torch.randn(8, 64, width, generator=g) for _ in range(batches)][rank::size]
    def timed(name, f):
        if size > 1: dist.barrier()
        start = time.perf_counter()
        res = f()
        if size > 1: dist.barrier()
        times[name] = time.perf_counter() - start
        return res
    fc = FC_Decomposer(policy=ParamBudget(.3))
    stats = timed('calibrate', lambda: calibrate(model, data, sensitivity='full'))
    plan = timed('spectra', lambda: fc.plan(model, stats))
    small = timed('factors', lambda: plan.apply(model))
    if rank == 0: Path(out).write_text(json.dumps(dict(times=times, params=count_params(small), ranks=[o.rank for o in plan.layers])))
    if size > 1: dist.destroy_process_group()

def _run(n, args):
    with tempfile.TemporaryDirectory() as d:
        cmd = [sys.executable] if n == 1 else [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n)]
        env = {**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}', 'OMP_NUM_THREADS': '1'}
        subprocess.run([*cmd, __file__, '--worker', f'{d}/res.json', *args], check=True, env=env, stdout=subprocess.DEVNULL)
        return json.loads(Path(f'{d}/res.json').read_text())

def _sent(width, blocks, ranks):
    "MB that every rank receives in each phase: sums of covariances and gradients, directions, factors; float64, the last float32"
    n = 2*blocks
    return 2*n*width**2*8/1e6, 2*n*width**2*8/1e6, sum((k or 0)*5*width for k in ranks)*4/1e6

@call_parse
def main(
    quick: store_true,      # a small network, half a minute
    processes: int = 2,     # largest number of processes; each has one thread
    repeats: int = 2,       # runs of each, the fastest counts
    out: str = '',          # Markdown file to write
    worker: str = '',       # (used by the script itself)
    width: int = 1024,      # of the network
    blocks: int = 6,        # of two layers
    batches: int = 8,       # of 512 rows
):
    "Measure the phases of a calibrated decomposition with 1, 2, … processes of one thread"
    if worker: return globals()['worker'](worker, width, blocks, batches)
    if quick: width,blocks,batches = 256,2,4
    args = [f'--width={width}', f'--blocks={blocks}', f'--batches={batches}']
    sizes = [2**i for i in range(processes.bit_length()) if 2**i <= processes]
    res = {n: [] for n in sizes}
    for _ in range(repeats):
        for n in sizes: res[n].append(_run(n, args))
    if len({json.dumps(r['ranks']) for rs in res.values() for r in rs}) != 1: sys.exit('the runs chose different ranks')
    best = {n: {p: min(r['times'][p] for r in rs) for p in PHASES} for n,rs in res.items()}
    rows = ['| processes | ' + ' | '.join(f'{p}, s | times faster' for p in PHASES) + ' |', '| ---: |' + ' ---: |'*2*len(PHASES)]
    rows += [f'| {n} | ' + ' | '.join(f'{b[p]:.1f} | {best[1][p]/b[p]:.2f}' for p in PHASES) + ' |' for n,b in best.items()]
    mb = _sent(width, blocks, res[1][0]['ranks'])
    text = '\n'.join(['# Several processes', '', f'`python benchmarks/distributed.py{" --quick" if quick else ""} --processes {processes}`', '',
        f'{os.cpu_count()} cores, one thread for each process, gloo; {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}. '
        f'{blocks} blocks of Linear({width}, {4*width}) and Linear({4*width}, {width}), {batches} batches of 512 rows, with sensitivity. '
        f'The fastest of {repeats} runs.', '', *rows, '',
        'Every process receives ' + ', '.join(f'{m:.0f} MB ({p})' for p,m in zip(PHASES, mb)) + '. All runs chose the same ranks.', ''])
    sys.stdout.write(text)
    if out: Path(out).write_text(text, encoding='utf-8')
