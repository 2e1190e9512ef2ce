"""Latency of dense and decomposed models: eager, `torch.compile`d and in ONNX Runtime, on the CPU and on a GPU where there is one.

README.md beside this file says how to run it, what it needs to be installed, and what each column means.
"""
import gc, importlib.util, logging, os, platform, statistics, sys, tempfile, time, warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
import fastprogress.fastprogress, torch
from fastcore.script import call_parse, store_true
from torch import nn
import fasterai
from fasterai.core.latency import _time_layer
from fasterai.lowrank.ranks import Layer
from fasterai.misc.all import FC_Decomposer, LatencyTable, ParamBudget
sys.path.insert(0, str(Path(__file__).resolve().parent))
from decompose import _cpu
from quality import _log, _md

RATIO,BUDGETS = .25,(.5, .7, .9)    # of the singular values; of the latency, the first that there are ranks for
MARGIN = 1.1        # a second measurement of a layer and a pair may say this much else
SLOWER = 1.05       # latency of a model whose pairs are all faster, relative to the dense one
AGREE = 1e-3        # largest relative difference of the outputs of two backends
NEEDS = dict(onnx='onnx', onnxscript='onnxscript', onnxruntime='onnxruntime')   # for ONNX Runtime, none of which the library needs

# Models: random weights and inputs, on which latency does not depend

def _vgg(depth):
    from torchvision.models import vgg16_bn
    return vgg16_bn(), lambda b: torch.randn(b, 3, 32, 32)

def _vit(depth):
    from timm.models import VisionTransformer
    return VisionTransformer(embed_dim=384, num_heads=6, depth=depth), lambda b: torch.randn(b, 3, 224, 224)

class Hidden(nn.Module):
    "A Hugging Face encoder from token ids to hidden states"
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, ids): return self.model(input_ids=ids).last_hidden_state

def _bert(depth, **kw):
    from transformers import BertConfig, BertModel
    cfg = BertConfig(num_hidden_layers=depth, **kw)
    return Hidden(BertModel(cfg, add_pooling_layer=False)), lambda b: torch.randint(cfg.vocab_size, (b, 32))

def _small(depth): return _bert(2, hidden_size=256, num_attention_heads=4, intermediate_size=1024, vocab_size=1000)

# model -> (how to build it, what it is)
FULL = {'VGG16-bn': (_vgg, '32×32 pixels; 124 of its 138 million weights are in fully-connected layers, 28 % of its multiplications'),
        'ViT-S/16': (_vit, '224×224 pixels, 197 tokens, {depth} of its 12 equal blocks'),
        'BERT-base': (_bert, '32 tokens, {depth} of its 12 equal layers')}
QUICK = {'small encoder': (_small, 'width 256, 2 layers, 32 tokens')}

@dataclass(eq=False)
class Model:
    "A dense model with all that is needed to decompose it"
    name: str
    what: str
    dense: nn.Module
    inputs: object      # function of a batch size
    plan: object        # at `RATIO`, with the rows that each layer gets

def _build(name, depth, device):
    torch.manual_seed(0)
    make,what = {**FULL, **QUICK}[name]
    dense,inputs = make(depth)
    dense = dense.eval().requires_grad_(False).to(device)
    plan = replace(FC_Decomposer(rank_ratio=RATIO).plan(dense, inputs(4).to(device), sensitivity=False), bases={})   # the factors are not needed
    return Model(name, what.format(depth=depth), dense, lambda b: inputs(b).to(device), plan)

def _small_model(dense, plan):
    "The structure that `plan` asks for, with random weights: zeros would be read from one page of memory"
    small = plan.skeleton(dense)
    for o in plan.replaced:
        for lin in small.get_submodule(o.name): nn.init.normal_(lin.weight, std=lin.in_features**-.5)
    return small.requires_grad_(False)

def _by_latency(model, table):
    "The plan of the first budget that has ranks, and that budget; (None, None) if no budget has"
    for r in BUDGETS:
        try: return model.plan.replan(ParamBudget(r, cost=table)), r
        except ValueError: pass
    return None, None

# Backends: a model and an input -> function of no arguments, and what it returns as a tensor

def _synced(call, device):
    "`call`, waiting for the device"
    if device != 'cuda': return call
    def f(): res = call(); torch.cuda.synchronize(); return res
    return f

def eager(model, x, folder): return _synced(partial(model, x), x.device.type)

def compiled(model, x, folder):
    torch._dynamo.reset()
    return _synced(partial(torch.compile(model, dynamic=False), x), x.device.type)

def onnx(model, x, folder):
    import onnxruntime as ort
    path = Path(folder)/'model.onnx'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(path, external_data=True)
    opts = ort.SessionOptions()
    opts.intra_op_num_threads,opts.inter_op_num_threads = torch.get_num_threads(),1
    s = ort.InferenceSession(path, opts, providers=['CPUExecutionProvider'])
    feed = {s.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(s.run(None, feed)[0])

def _backends(device):
    res = {'eager': eager, 'torch.compile': compiled}
    if device == 'cpu' and all(map(importlib.util.find_spec, NEEDS)): res['ONNX Runtime'] = onnx
    return res

# Measurements

def _clock(device):
    "One thread on the CPU: processor time, which on an idle machine is the same, and which other work on it disturbs less"
    return time.process_time if device == 'cpu' and torch.get_num_threads() == 1 else time.perf_counter

def timed(calls, seconds, clock):
    "What each call returns, and its median time in ms: turns in which every call takes its place, three at least, until `seconds` are over"
    outs = [f() for f in calls]     # compiles, and warms up
    times,start = [[] for _ in calls],time.perf_counter()
    while len(times[0]) < 3 or (time.perf_counter() - start < seconds and len(times[0]) < 200):
        for f,ts in zip(calls, times):
            t = clock(); f(); ts.append(clock()-t)
    return outs, [statistics.median(ts)*1e3 for ts in times]

@torch.no_grad()
def measure(model, batch, device, seconds):
    "Backend -> ms of each variant; the plans; how far outputs of the backends are apart; and times of the chosen pairs"
    table,x = LatencyTable(batch),model.inputs(batch)
    plan,budget = _by_latency(model, table)
    mods = {'dense': model.dense, 'ratio': _small_model(model.dense, model.plan)}
    if plan is not None: mods['latency'] = _small_model(model.dense, plan)
    want,res,apart = {k: m(x) for k,m in mods.items()},{},0.
    if not isinstance(next(iter(want.values())), torch.Tensor): raise TypeError(f'{model.name} has to return a tensor')
    for name,make in _backends(device).items():
        with tempfile.TemporaryDirectory() as tmp:
            calls = {k: make(m, x, tmp) for k,m in mods.items()}
            outs,ms = timed(list(calls.values()), seconds, _clock(device))
            res[name] = dict(zip(calls, ms))
            for k,z in zip(calls, outs): apart = max(apart, ((z.to(want[k]) - want[k]).norm()/want[k].norm()).item())
        del calls
        gc.collect()
        _log(f'{model.name}, {device}, batch {batch}, {name}: ' + ', '.join(f'{k} {v:.3g} ms' for k,v in res[name].items()))
    torch._dynamo.reset()
    return dict(ms=res, budget=budget, plan=plan, apart=apart, pairs=again(plan, table) if plan else [])

def again(plan, table):
    "(layer, rank, ms in the table relative to the layer, and measured once more), for each shape the slowest of the chosen pairs"
    chosen = {}
    for o in plan.replaced:
        key = table.key(o)
        if key not in chosen or chosen[key].rank < o.rank: chosen[key] = o
    res = []
    for key,o in chosen.items():
        ms = _time_layer(*key, [o.rank], seconds=.1)
        res.append((f'{key[0]}→{key[1]}, {key[2]} rows', o.rank, (table.ms(o, [o.rank])/table.ms(o, [0])).item(), ms[o.rank]/ms[0]))
    return res

SHAPES,STEPS = ((768, 768), (768, 3072)),(64, 16, 8, 1)

def _kind(k): return next(s for s in STEPS if k % s == 0)

def alignment(rows, dtype, device, shapes=SHAPES, centres=(64, 128, 256)):
    "Shape -> for each kind of rank the time per unit of rank, relative to that of multiples of 64 beside it"
    res = {}
    for n,m in shapes:
        rel = {s: [] for s in STEPS}
        for c in centres:
            ks = [c, c-16, c+16, c-8, c+8, c-3, c-1, c+1, c+3]
            ms = _time_layer(n, m, rows, dtype, device, ks, seconds=.02)
            for k in ks: rel[_kind(k)].append(ms[k]/k/(ms[c]/c))
        res[n, m] = {s: statistics.median(v) for s,v in rel.items()}
    return res

WIDTHS = 32, 64, 128, 256, 512, 1024

def reach(rows, dtype, device):
    "Width of a square layer -> the largest rank whose pair is faster, as a share of the break-even rank; 0 where none is"
    res,table = {},LatencyTable(rows)
    for n in WIDTHS:
        o = Layer('', n, n, dtype=dtype, device=device)
        ks = range(1, o.break_even+1)
        res[n] = max((k for k,ok in zip(ks, table.faster(o, ks)) if ok), default=0)/o.break_even
    return res

# Report

def _checks(results):
    "(met?, sentence)"
    for (model,device,batch),r in results.items():
        where = f'{model.name}, {device}, batch {batch}'
        slow = [p for p in r['pairs'] if p[3] > MARGIN]
        worst = max((p[3] for p in r['pairs']), default=0.)
        if r['pairs']: yield not slow, (f'{where}: pairs chosen by latency, measured again, take at most {worst:.2f} of the time of their layer, at most {MARGIN:g}'
                                        + ''.join(f'; {p[0]} rank {p[1]}: {p[3]:.2f}' for p in slow))
        if 'latency' in r['ms']['eager']:
            x = r['ms']['eager']['latency']/r['ms']['eager']['dense']
            yield x <= SLOWER, f'{where}: a budget of latency takes {x:.2f} of the dense time, at most {SLOWER:g}'
        if model.name == 'VGG16-bn':
            x = r['ms']['eager']['ratio']/r['ms']['eager']['dense']
            yield x <= 1, f'{where}: a quarter of the singular values takes {x:.2f} of the dense time, at most 1'
        yield r['apart'] <= AGREE, f'{where}: outputs of the backends differ by {r["apart"]:.0e}, at most {AGREE:g}'

def _cell(ms, k):
    if k not in ms: return ['', '']
    return [_ms(ms[k]), f'**{ms[k]/ms["dense"]:.2f}**']

def _ms(x): return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'

def _model_table(model, results):
    rows = []
    for (m,device,batch),r in results.items():
        if m is not model: continue
        for i,(name,ms) in enumerate(r['ms'].items()):
            p = r['plan']
            what = ['', ''] if i or p is None else [f'{len(p.replaced)} of {len([o for o in p.layers if o.can])}', f'{r["budget"]:.0%}']
            rows.append([*([device, batch] if i == 0 else ['', '']), name, _ms(ms['dense']), *_cell(ms, 'ratio'), *_cell(ms, 'latency'), *what])
    n,small = model.plan.params,model.plan.params_after
    return [f'## {model.name}', '', f'{model.what[:1].upper()}{model.what[1:]}. {n/1e6:.1f} million parameters, {small/1e6:.1f} million at a quarter of the singular values.', '',
            *_md(['device', 'batch', 'backend', 'dense, ms', 'ratio ¼, ms', 'of dense', 'latency budget, ms', 'of dense', 'pairs', 'budget'], rows, 7), '']

def _layer_tables(layers):
    "Single layers: aligned ranks, and where no pair helps"
    rows = [[device, dtype, f'{n}→{m}', r, *(f'{o[s]:.2f}' for s in STEPS)] for (device,dtype,r),(res,_) in layers.items() for (n,m),o in res.items()]
    far = [[device, dtype, r, *(f'{v:.0%}' if v else 'none' for v in res.values())] for (device,dtype,r),(_,res) in layers.items()]
    return ['## Aligned ranks', '', 'Time of a pair per unit of rank, relative to the multiple of 64 beside it (64, 128, 256; neighbours 1, 3, 8 and 16 away); median.', '',
            *_md(['device', 'dtype', 'layer', 'rows', 'multiple of 64', 'of 16', 'of 8', 'not of 8'], rows, 5), '',
            '## Where pairs are faster', '', 'Square layers: the largest rank whose pair is at least 5 % faster than the layer, as a share of the break-even rank.', '',
            *_md(['device', 'dtype', 'rows', *(f'width {n}' for n in WIDTHS)], far, 7), '']

def _versions():
    from importlib.metadata import version
    res = [f'{n} {version(n)}' for n,m in (('torch', 'torch'), ('onnx', 'onnx'), ('onnxruntime', 'onnxruntime')) if importlib.util.find_spec(m)]
    return ', '.join(res)

def _report(results, layers, opts, threads, took):
    checks,models = [*_checks(results)],list(dict.fromkeys(m.name for m,_,_ in results))
    by = {m.name: m for m,_,_ in results}
    gpu = f'; {torch.cuda.get_device_name()}' if torch.cuda.is_available() else '; no GPU'
    return checks, '\n'.join([f'# Latency: fasterai {fasterai.__version__}', '', f'`python benchmarks/latency.py{opts}`', '',
        f'{_cpu()}, {os.cpu_count()} cores, {threads} thread{"s"[:threads > 1]}{gpu}; {platform.system()}, Python {platform.python_version()}, {_versions()}. '
        f'float32, random weights, {took/60:.0f} minutes. Medians of turns in which dense and decomposed '
        'models take their place one after the other: compare within a row. Rows were measured minutes apart, on a machine that may have had other work.'
        + ' Times of models on the CPU are processor time: the same as latency on an idle core.'*(threads == 1), '',
        *[l for n in models for l in _model_table(by[n], results)], *_layer_tables(layers),
        '## Targets', '', *[f'- {"met" if ok else "**missed**"}: {s}' for ok,s in checks], ''])

@call_parse
def main(
    quick: store_true, # one small model, in about two minutes
    layers: store_true, # measure single layers alone, and print the tables of ranks
    threads: int = 1,  # threads of torch and of ONNX Runtime
    depth: int = 2,    # blocks of the transformers, of 12
    seconds: float = 3., # of turns for each model, batch and backend, at least three turns
    out: str = '',     # Markdown file to write
):
    "Measure latency of dense and decomposed models; exit code 1 where a target is missed"
    torch.set_num_threads(threads)
    fastprogress.fastprogress.NO_BAR = True
    logging.getLogger('torch').setLevel(logging.ERROR)
    if (lost := [v for k,v in NEEDS.items() if importlib.util.find_spec(k) is None]):
        _log(f'without ONNX Runtime: pip install {" ".join(lost)}')
    start,results,single = time.perf_counter(),{},{}
    for device in ['cpu'] + ['cuda']*torch.cuda.is_available():
        for dtype in ['float32'] + ['float16']*(device == 'cuda'):
            for rows in (1, 256) if quick else (1, 32, 256):
                small = dict(shapes=[(768, 768)], centres=(64, 128)) if quick else {}
                single[device, dtype, rows] = alignment(rows, dtype, device, **small),reach(rows, dtype, device)
        if layers: continue
        for name in (QUICK if quick else FULL):
            model = _build(name, depth, device)
            for batch in (1, 32) if quick else (1, 32, 256): results[model, device, batch] = measure(model, batch, device, seconds)
            model.dense = None      # half a gigabyte
    if layers: return print('\n'.join(_layer_tables(single)))
    opts = f'{" --quick" if quick else ""} --threads {threads}' + (f' --depth {depth}' if depth != 2 else '')
    checks,text = _report(results, single, opts, threads, time.perf_counter() - start)
    print(text)
    if out: Path(out).write_text(text, encoding='utf-8')
    sys.exit(not all(ok for ok,_ in checks))
