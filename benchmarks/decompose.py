"""Decompose the same models with this library and with the published fasterai 0.4.1: time, memory, bytes on disk, error.

Every figure comes from a fresh process, for memory that was touched once cannot be measured again.
README.md beside this file says how to run it and what each column means.
"""
import gc, json, os, platform, resource, subprocess, sys, tempfile, time
from pathlib import Path
import torch
from fastcore.script import call_parse, store_true
from torch import nn

ROOT,PEER = Path(__file__).resolve().parent.parent,'0.4.1'
MiB = 2**20

def _vgg():
    from torchvision.models import vgg16_bn
    return vgg16_bn(num_classes=2)

def _stack(n, *shape): return lambda: nn.Sequential(*[nn.Linear(*shape) for _ in range(n)])

# model -> (how to build it, repeats)
FULL = {'VGG16-bn, 2 classes': (_vgg, 2), '6 × Linear(4096, 2048)': (_stack(6, 4096, 2048), 2),
        '50 × Linear(1024, 1024)': (_stack(50, 1024, 1024), 2), '1 × Linear(25088, 2048)': (_stack(1, 25088, 2048), 2)}
QUICK = {'8 × Linear(1024, 1024)': (_stack(8, 1024, 1024), 2), '1 × Linear(8192, 1024)': (_stack(1, 8192, 1024), 2)}
# column, model (None for all), largest ratio of this library to the published one
TARGETS = [('time', 'VGG16-bn, 2 classes', .1), ('file', 'VGG16-bn, 2 classes', .85), ('peak', '6 × Linear(4096, 2048)', .6), ('time', None, 1.)]
PRODUCTS = 'VGG16-bn, 2 classes', 3.    # model, largest ratio of its time to that of its matrix products alone
LAYERS = 3                              # extra peak at most: the result and so many times the largest layer
EXCESS = 1e-4  # largest error above the optimum, as a share of it, at which times and sizes may be compared

def _build(case):
    torch.manual_seed(0)
    return {**FULL, **QUICK}[case][0]()

def _peak_meter():
    "Resident bytes now, and a function for the highest since"
    gc.collect()
    def rss(key): return int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1])*1024
    try: Path('/proc/self/clear_refs').write_text('5')    # Linux: VmHWM starts again from here
    except OSError:                                       # elsewhere: above the highest of imports and model
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == 'darwin' else 1024)
        return peak(), peak
    return rss('VmRSS'), lambda: rss('VmHWM')

def _import(path, version):
    "`FC_Decomposer` of the fasterai in `path`, and its version"
    import fasterai
    from fasterai.misc.fc_decomposer import FC_Decomposer
    if Path(fasterai.__file__).resolve().parent.parent != Path(path).resolve() or version not in (None, fasterai.__version__):
        raise ImportError(f'wanted fasterai {version or "of this repository"}, found {fasterai.__version__} elsewhere')
    return FC_Decomposer, fasterai.__version__

def _size(model):
    "Parameters, and bytes of the saved `state_dict`"
    with tempfile.TemporaryDirectory() as d:
        torch.save(model.state_dict(), f := Path(d)/'m.pth')
        return dict(params=sum(o.numel() for o in model.parameters()), file=f.stat().st_size)

@torch.no_grad()
def _errors(model, small):
    "Layer -> rank and relative error of the weight, in float64, for every layer that became a pair"
    new,res = dict(small.named_modules()),{}
    for name,m in model.named_modules():
        if not isinstance(m, nn.Linear) or not isinstance(p := new[name], nn.Sequential): continue
        W,B,A = m.weight.double(),p[1].weight.double(),p[0].weight.double()
        res[name] = len(A), (torch.addmm(W, B, A, alpha=-1).norm()/W.norm()).item()
    return res

def measure(case, path, version, threads, full, inplace=False):
    "What `FC_Decomposer` of the fasterai in `path` does to `case`, as JSON; `full` adds size and error"
    torch.set_num_threads(threads)
    FC_Decomposer,has = _import(path, version)
    def run(m):
        if version: return FC_Decomposer().decompose(m, percent_removed=.5)
        return FC_Decomposer(rank_ratio=.5).decompose(m, inplace=inplace)
    run(nn.Linear(1024, 1024))  # what the libraries load and reserve once is not a cost of this model
    model = _build(case)
    base,peak = _peak_meter()
    t,c = time.perf_counter(),time.process_time()
    small = run(model)
    res = dict(time=time.perf_counter()-t, cpu=time.process_time()-c, peak=peak()-base, version=has)
    print(json.dumps({**res, **_size(small), 'errors': _errors(model, small)} if full else res))

@torch.no_grad()
def optimum(case, ranks, threads):
    "Size of the dense model and the least possible error of each layer at its rank (Eckart–Young), as JSON"
    torch.set_num_threads(threads)
    model,errs = _build(case),{}
    for name,k in ranks.items():
        W = model.get_submodule(name).weight.double()
        e = torch.linalg.eigvalsh(W @ W.T if len(W) <= W.shape[1] else W.T @ W).flip(0).clamp(min=0)
        errs[name] = (e[k:].sum()/e.sum()).sqrt().item()
    print(json.dumps({**_size(model), 'errors': errs, **_floor(model, ranks)}))

def _floor(model, ranks):
    "Seconds that the products of all layers need at the rate of a product of two square matrices, and the bytes of the largest layer"
    X = torch.randn(4096, 4096)
    def once():
        t = time.perf_counter()
        X @ X
        return time.perf_counter() - t
    rate = 2*4096**3/min(once() for _ in range(4))
    sizes = {n: sorted(model.get_submodule(n).weight.shape) for n in ranks}     # the Gram matrix on the smaller side, and one factor
    return dict(rate=rate, products=sum(2*r*r*l + 2*r*ranks[n]*l for n,(r,l) in sizes.items())/rate, largest=max(4*r*l for r,l in sizes.values()))

def _fresh(path, call):
    "Run `call` of this file in a new process which finds the packages in `path` first"
    code = f'import sys; sys.path[:0] = {[str(path), str(ROOT/"benchmarks")]!r}; import decompose; decompose.{call}'
    return json.loads(subprocess.run([sys.executable, '-c', code], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])

def _install(cache):
    "The published package alone in a folder: the module measured here needs nothing but torch"
    dest = Path(cache)/f'fasterai-{PEER}'
    if not (dest/f'fasterai-{PEER}.dist-info').exists():
        subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', dest, f'fasterai=={PEER}'], check=True)
    return dest

def _compare(case, peer, threads, repeats):
    "Both libraries on one model, in turn: the least time and memory of all repeats"
    runs = {'ours': [], 'inplace': [], 'peer': []}
    for i in range(repeats):
        for lib,path,ver in ('ours', ROOT, None),('peer', peer, PEER),('inplace', ROOT, None):
            full = i == 0 and lib != 'inplace'
            r = _fresh(path, f'measure({case!r}, {str(path)!r}, {ver!r}, {threads}, {full}, {lib == "inplace"})')
            print(f'{case}, fasterai {r["version"]}: {r["time"]:.1f} s, {r["peak"]/MiB:.0f} MiB', file=sys.stderr, flush=True)
            runs[lib].append(r)
    res = {k: {**v[0], **{c: min(o[c] for o in v) for c in ('time','cpu','peak')}} for k,v in runs.items()}
    ranks = {n: k for n,(k,_) in res['ours']['errors'].items()}
    if ranks != {n: k for n,(k,_) in res['peer']['errors'].items()}: raise ValueError(f'{case}: the two libraries chose different ranks')
    res['dense'] = _fresh(ROOT, f'optimum({case!r}, {ranks!r}, {threads})')
    for o in (res['ours'], res['peer']): o['excess'] = max(0, *(e/res['dense']['errors'][n] - 1 for n,(_,e) in o['errors'].items()))
    return res

def _table(results):
    rows = [['model', 'fasterai', 'time, s', 'CPU, s', 'extra peak, MiB', 'file, MiB', 'parameters', 'error above optimum'],
            ['---']*2 + ['---:']*6]
    for case,r in results.items():
        a,b,d = r['ours'],r['peer'],r['dense']
        rows.append([case, 'dense', '', '', '', f'{d["file"]/MiB:.1f}', f'{d["params"]:,}', ''])
        rows += [['', o['version'], f'{o["time"]:.1f}', f'{o["cpu"]:.1f}', f'{o["peak"]/MiB:.0f}', f'{o["file"]/MiB:.1f}',
                  f'{o["params"]:,}', f'{o["excess"]:.0e}'] for o in (a,b)]
        i = r['inplace']
        rows.append(['', f'{i["version"]}, in place', f'{i["time"]:.1f}', f'{i["cpu"]:.1f}', f'{i["peak"]/MiB:.0f}', '', '', ''])
        rows.append(['', 'products alone', f'{d["products"]:.1f}', '', '', '', '', ''])
        rows.append(['', '**ratio**'] + [f'**{a[c]/b[c]:.2f}**' for c in ('time','cpu','peak','file','params')] + [''])
    return [f'| {" | ".join(o)} |' for o in rows]

def _checks(results):
    "(met?, sentence) for every target that the measured models can tell about"
    for case,r in results.items():
        for col,only,limit in TARGETS:
            ratio = r['ours'][col]/r['peer'][col]
            if only in (None, case): yield ratio <= limit, f'{case}: {col} {ratio:.2f} of {PEER}, at most {limit:g}'
        if case == PRODUCTS[0]:
            yield (x := r['ours']['time']/r['dense']['products']) <= PRODUCTS[1], f'{case}: {x:.2f} times its matrix products alone, at most {PRODUCTS[1]:g}'
        for lib,what in ('ours', ''),('inplace', ' in place'):
            room = r['ours']['file'] + LAYERS*r['dense']['largest']
            yield (x := r[lib]['peak']) <= room, f'{case}: peak{what} {x/MiB:.0f} MiB, at most {room/MiB:.0f} (the result and {LAYERS} of its largest layers)'
        yield (x := r['ours']['excess']) <= EXCESS, f'{case}: error {x:.0e} above the optimum, at most {EXCESS:g}'

def _cpu():
    try: return next(l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))
    except (OSError, StopIteration): return platform.processor() or platform.machine()

def _report(results, opts, threads):
    ver = next(iter(results.values()))['ours']['version']
    return '\n'.join([f'# Decomposition: fasterai {ver} and {PEER}', '', f'`python benchmarks/decompose.py{opts}`', '',
        f'{_cpu()}, {os.cpu_count()} cores, {threads} thread{"s"[:threads > 1]}; {platform.system()}, Python {platform.python_version()}, '
        f'torch {torch.__version__}. Half of the singular values are kept. Ratio: {ver} to {PEER}, smaller is better. '
        f'Products alone: at {max(o["dense"]["rate"] for o in results.values())/1e9:.0f} GFLOP/s at most, measured beside each model.', '',
        *_table(results), '', *[f'- {"met" if ok else "**missed**"}: {s}' for ok,s in _checks(results)], ''])

@call_parse
def main(
    quick: store_true, # a few small models, in about a minute
    threads: int = 1,  # threads of torch, for both
    cache: str = '',   # folder that keeps the published package; a temporary one by default
    out: str = '',     # Markdown file to write
):
    "Measure this library against the published fasterai 0.4.1; exit code 1 where a target is missed"
    with tempfile.TemporaryDirectory() as tmp:
        peer = _install(cache or tmp)
        results = {case: _compare(case, peer, threads, repeats) for case,(_,repeats) in (QUICK if quick else FULL).items()}
    text = _report(results, f'{" --quick" if quick else ""} --threads {threads}', threads)
    print(text)
    if out: Path(out).write_text(text, encoding='utf-8')
    sys.exit(not all(ok for ok,_ in _checks(results)))
