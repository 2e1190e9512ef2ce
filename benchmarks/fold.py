"""Fold the norms of the same networks with this library, the published fasterai 0.4.1 and torch.fx: latency, norms that are gone, wrong results.

README.md beside this file says how to run it and what each column means.
"""
import copy, json, os, platform, statistics, subprocess, sys, tempfile, time, warnings
from pathlib import Path
import torch
from fastcore.script import call_parse, store_true
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent/'tests')]
from decompose import PEER, ROOT, _cpu, _install
from fold_cases import CASES, NETWORKS, norms, outputs, randomize, rel

OURS,FX = 'this library','torch.fx'
TOOLS = OURS, PEER, FX
# network -> how to build it; batches
LATENCY = {'tv resnet18': (1, 32), 'tv mobilenet_v3_large': (1, 32), 'timm efficientnet_b0': (1, 32)}
QUICK = {'tv resnet18': (1,), 'timm efficientnet_b0': (1,)}
QUICK_NETWORKS = ('tv resnet18', 'tv mobilenet_v3_small', 'timm efficientnet_b0', 'timm repvit_m0_9', 'fastai vision learner', 'fastai TabularModel')
COSTS = 'tv resnet18', 'timm efficientnet_b0', 'tv densenet121'
HALF = 'tv resnet18', 'tv mobilenet_v3_small'
# largest ratio of the time of the folded network to that of the unfolded one
TARGETS = {('tv resnet18', 1): .97, ('tv resnet18', 32): .90, ('tv mobilenet_v3_large', 1): .88, ('timm efficientnet_b0', 1): .90}
PLAN,CHECK = 5, 15      # in forward passes
HALF_ERROR = 1.15       # error of the folded network in bfloat16, relative to that of the unfolded one
FOLDED = 1345           # of the 1,532 norms of all networks

def _log(*s): print(*s, file=sys.stderr, flush=True)

# The three tools

def _ours(model, args):
    from fasterai.misc.all import BN_Folder
    return BN_Folder().fold(model, lambda m: m(*args))

def _peer(model, args):
    import fasterai
    if fasterai.__version__ != PEER: raise ImportError(f'wanted fasterai {PEER}, found {fasterai.__version__}')
    from fasterai.misc.bn_folding import BN_Folder
    return BN_Folder().fold(model)

def _fx(model, args):
    from torch.fx.experimental.optimization import fuse
    return fuse(model)

_FOLD = {OURS: _ours, PEER: _peer, FX: _fx}

def _left(model):
    "How many norms a network still has; fx turns some into calls (standardized weights too), and leaves modules that are not called"
    if not isinstance(model, torch.fx.GraphModule): return len(norms(model))
    calls,mods = [n for n in model.graph.nodes if n.op == 'call_function' and 'batch_norm' in str(n.target)],norms(model)
    return len(calls) + len({n.target for n in model.graph.nodes if n.op == 'call_module' and n.target in mods})

def judge(tool, kind, names):
    "name -> (norms gone, error of the outputs or the failure) for `kind`, 'NETWORKS' or 'CASES', as JSON"
    torch.set_num_threads(1)
    res = {}
    for name in names or globals()[kind]:
        case = globals()[kind][name]
        model,args = case.build()
        n,want = len(norms(model)),outputs(model, args)
        tol = getattr(case, 'tol', 1e-9 if all(t.dtype == torch.float64 for t in want) else 1e-5)   # the output of a Unet is float32
        try:
            new = _FOLD[tool](model, args)
            err = rel(outputs(new, args), want)
            res[name] = dict(gone=max(0, n - _left(new)), n=n, verdict='right' if err <= tol else 'wrong', error=err)
        except Exception as e: res[name] = dict(gone=0, n=n, verdict='failed', error=f'{type(e).__name__}: {str(e).strip()[:80]}')
    print(json.dumps(res))

def _fresh(path, call):
    "Run `call` of this file in a new process which finds the packages in `path` first"
    here = [str(path), str(ROOT/'benchmarks'), str(ROOT/'tests')]
    code = f'import sys, warnings; warnings.simplefilter("ignore"); sys.path[:0] = {here!r}; import fold; sys.path.remove({str(path)!r}); ' \
           f'sys.path.insert(0, {str(path)!r}); fold.{call}'
    out = subprocess.run([sys.executable, '-c', code], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])

def _place(tool, peer): return peer if tool == PEER else ROOT

def judged(kind, names, peer):
    "tool -> name -> verdict"
    res = {}
    for tool in TOOLS:
        res[tool] = _fresh(_place(tool, peer), f'judge({tool!r}, {kind!r}, {[*names]!r})')
        _log(f'{kind.lower()}, {tool}: {sum(o["gone"] for o in res[tool].values() if o["verdict"] == "right")} norms folded')
    return res

# Latency

def _make(name):
    "In float32, as it is used"
    torch.manual_seed(0)
    lib,net = name.split()
    if lib == 'tv':
        import torchvision
        model = torchvision.models.get_model(net)
    else:
        import timm
        model = timm.create_model(net)
    return randomize(model).eval().requires_grad_(False)

def save_folded(tool, name, path):
    "Fold with `tool` and save the network whole"
    torch.save(_FOLD[tool](_make(name), (torch.randn(2, 3, 224, 224),)), path)
    print(json.dumps(str(path)))

def _folded(tool, name, peer):
    if tool != PEER: return _FOLD[tool](_make(name), (torch.randn(2, 3, 224, 224),))
    with tempfile.TemporaryDirectory() as d: return torch.load(_fresh(peer, f'save_folded({tool!r}, {name!r}, {str(Path(d)/"m.pth")!r})'), weights_only=False)

@torch.no_grad()
def ratios(mods, x, rounds, calls):
    "Seconds of the first model, and for the others the median ratio to it of all rounds, in which each takes its turn"
    times = {k: [] for k in mods}
    for m in mods.values(): m(x)
    for i in range(rounds):
        order = list(mods) if i % 2 else list(mods)[::-1]
        for k in order:
            start = time.process_time()
            for _ in range(calls): mods[k](x)
            times[k].append((time.process_time() - start)/calls)
    base,*rest = mods
    return statistics.median(times[base]), {k: statistics.median(a/b for a,b in zip(times[k], times[base])) for k in rest}

def latency(cases, rounds, peer):
    "(network, batch) -> ms of the unfolded network, and the ratio of each tool"
    res = {}
    for name,batches in cases.items():
        mods = {'unfolded': _make(name)} | {tool: _folded(tool, name, peer) for tool in TOOLS}
        for b in batches:
            t,r = ratios(mods, torch.randn(b, 3, 224, 224), rounds if b == 1 else max(3, rounds//4), 4 if b == 1 else 1)
            res[name, b] = dict(ms=t*1e3, ratio=r)
            _log(f'{name}, batch {b}: {t*1e3:.1f} ms, ' + ', '.join(f'{k} {v:.3f}' for k,v in r.items()))
    return res

def _seconds(f, n=3):
    times = []
    for _ in range(n):
        start = time.process_time()
        f()
        times.append(time.process_time() - start)
    return statistics.median(times)

@torch.no_grad()
def cost(name):
    "Seconds of a forward pass; of a plan without check, its check, and apply, in forward passes"
    from fasterai.misc.all import BN_Folder
    model,x = _make(name),torch.randn(2, 3, 224, 224)
    model(x)
    t = _seconds(lambda: model(x), 7)
    bare,whole = (_seconds(lambda: BN_Folder().plan(model, x, check=c)) for c in (False, True))
    plan = BN_Folder().plan(model, x, check=False)
    return dict(ms=t*1e3, plan=bare/t, check=(whole - bare)/t, apply=_seconds(lambda: plan.apply(model))/t)

def half(name, seeds=3):
    "Mean error of the outputs in bfloat16 against the float32 network in float64: unfolded, cast and folded, folded and cast, and by torch.fx"
    errs = []
    for seed in range(seeds):
        model,x = randomize(_make(name), seed),torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(seed)).bfloat16()
        low,ref = copy.deepcopy(model).bfloat16(),outputs(copy.deepcopy(model).double(), [x.double()])[0]
        nets = low, _ours(low, (x,)), _ours(model, (x.float(),)).bfloat16(), _fx(low, (x,))
        errs.append([float((outputs(o, [x])[0].double() - ref).norm()/ref.norm()) for o in nets])
    return dict(zip(('unfolded', 'cast, folded', 'folded, cast', FX), torch.tensor(errs).mean(0).tolist()))

# Report

def _count(results):
    "tool -> networks right, wrong, failed; norms folded in right ones, norms in all"
    def n(rs, v): return sum(o['verdict'] == v for o in rs)
    return {t: dict(right=n(r.values(), 'right'), wrong=n(r.values(), 'wrong'), failed=n(r.values(), 'failed'),
                    gone=sum(o['gone'] for o in r.values() if o['verdict'] == 'right'), norms=sum(o['n'] for o in r.values())) for t,r in results.items()}

def _checks(lat, costs, halves, nets, cases, quick):
    "(met?, sentence)"
    for (name,b),r in lat.items():
        if (limit := TARGETS.get((name, b))) is None: continue
        yield (x := r['ratio'][OURS]) <= limit, f'{name}, batch {b}: {x:.3f} of the time of the unfolded network, at most {limit:g}'
    for name,c in costs.items():
        yield c['plan'] <= PLAN, f'{name}: a plan takes {c["plan"]:.1f} forward passes, at most {PLAN}'
        yield c['check'] <= CHECK, f'{name}: its check takes {c["check"]:.1f} forward passes, at most {CHECK}'
    for name,h in halves.items():
        for k in ('cast, folded', 'folded, cast'):
            yield (x := h[k]/h['unfolded']) <= HALF_ERROR, f'{name}: error in bfloat16, {k}, {x:.2f} of the unfolded one, at most {HALF_ERROR:g}'
    for what,res in ('networks', nets),('cases', cases):
        n = _count(res)[OURS]
        yield n['wrong'] == n['failed'] == 0, f'{what}: {n["wrong"]} wrong, {n["failed"]} failed, none allowed'
    if not quick: yield (n := _count(nets)[OURS]['gone']) >= FOLDED, f'{n:,} norms folded in all networks, at least {FOLDED:,}'

def _cell(o): return str(o['gone']) if o['verdict'] == 'right' else f'**wrong** ({o["error"]:.0e})' if o['verdict'] == 'wrong' else '**failed**'

def _report(lat, costs, halves, nets, cases, opts, checks):
    from importlib.metadata import version
    import fasterai
    from quality import _md
    where = f'{_cpu()}, {os.cpu_count()} cores, one thread; {platform.system()}, Python {platform.python_version()}, '
    libs = ', '.join(f'{n} {version(n)}' for n in ('torch', 'torchvision', 'timm', 'fastai'))
    names,first = [f'fasterai {fasterai.__version__}', f'fasterai {PEER}', FX],next(iter(nets))
    rows = [[n, b, f'{r["ms"]:.1f}', *(f'**{r["ratio"][t]:.3f}**' if t == OURS else f'{r["ratio"][t]:.3f}' for t in TOOLS)] for (n,b),r in lat.items()]
    net_rows = [[n, o['n'], *(_cell(nets[t][n]) for t in TOOLS)] for n,o in nets[OURS].items()]
    def total(label, k, res): return [label, '', *(f'{_count(res)[t][k]:,}' for t in TOOLS)]
    total_rows = [['**norms folded in right networks**', f'{_count(nets)[OURS]["norms"]:,}', *(f'**{_count(nets)[t]["gone"]:,}**' for t in TOOLS)],
                  total('wrong networks', 'wrong', nets), total('failed networks', 'failed', nets)]
    words = dict(right='right', wrong='wrong', failed='failed', gone='norms folded in right cases')
    case_rows = [[words[k], *(str(_count(cases)[t][k]) for t in TOOLS)] for k in words]
    cost_rows = [[n, f'{c["ms"]:.0f}', *(f'{c[k]:.1f}' for k in ('plan', 'check', 'apply'))] for n,c in costs.items()]
    half_rows = [[n, *(f'{v:.4f}' for v in h.values())] for n,h in halves.items()]
    return '\n'.join([f'# Folding batch norms: {names[0]}, {PEER} and {FX}', '', f'`python benchmarks/fold.py{opts}`', '',
        f'{where}{libs}. Random weights and random statistics.', '',
        '## Latency', '', 'Images of 224×224 pixels, float32. Processor time of turns in which each network takes its place; '
        'the ratio is the median over all turns of the time of the folded network to that of the unfolded one.', '',
        *_md(['network', 'batch', 'unfolded, ms', *names], rows, 5), '',
        '## Cost', '', 'Processor time, in forward passes of the unfolded network at batch 2.', '',
        *_md(['network', 'forward, ms', 'plan without check', 'check', 'apply'], cost_rows, 4), '',
        '## bfloat16', '', 'Relative error of the outputs against the float32 network, run in float64; mean of three draws. '
        'The network is cast and then folded, or folded and then cast.', '',
        *_md(['network', 'unfolded', 'cast, folded', 'folded, cast', f'cast, folded by {FX}'], half_rows, 4), '',
        '## Networks', '', 'Norms that are gone. *wrong*: the outputs differ, with their relative error; *failed*: an exception.', '',
        *_md(['network', 'norms', *names], net_rows + total_rows, 4), '',
        '## Cases', '', f'The {len(cases[OURS])} small networks of `tests/fold_cases.py`, where folding is easy to get wrong.', '',
        *_md(['', *names], case_rows, 3), '',
        '## Targets', '', *[f'- {"met" if ok else "**missed**"}: {s}' for ok,s in checks], ''])

@call_parse
def main(
    quick: store_true, # few networks and turns, in about a minute
    rounds: int = 40,  # turns at batch 1; a quarter of it at larger ones
    cache: str = '',   # folder that keeps the published package; a temporary one by default
    out: str = '',     # Markdown file to write
):
    "Measure this library against the published fasterai 0.4.1 and torch.fx; exit code 1 where a target is missed"
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    if quick: rounds = 8
    with tempfile.TemporaryDirectory() as tmp:
        peer = _install(cache or tmp)
        lat = latency(QUICK if quick else LATENCY, rounds, peer)
        costs = {n: cost(n) for n in (COSTS[:1] if quick else COSTS)}
        halves = {n: half(n) for n in (HALF[1:] if quick else HALF)}
        nets,cases = judged('NETWORKS', QUICK_NETWORKS if quick else (), peer),judged('CASES', (), peer)
    checks = [*_checks(lat, costs, halves, nets, cases, quick)]
    text = _report(lat, costs, halves, nets, cases, ' --quick'*quick + (f' --rounds {rounds}' if rounds not in (8, 40) else ''), checks)
    print(text)
    if out: Path(out).write_text(text, encoding='utf-8')
    sys.exit(not all(ok for ok,_ in checks))
