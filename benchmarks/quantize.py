"""Weights in few bits: cosine, accuracy and bytes beside torchao and ONNX Runtime, predicted against measured errors, and time.

MiniLM and EfficientNet-Lite0 come with their weights from packages, VGG16-bn is trained here on digits (a folder `--cache` keeps it).
README.md beside this file says how to run it and what each column means.
"""
import os, platform, sys, tempfile, time, warnings
from copy import deepcopy
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
import torch
from fastcore.script import call_parse
from safetensors.torch import save_file
from torch import nn
import fasterai
from fasterai.all import ByteBudget, FC_Decomposer, Half, Int, LowRankLinear, ParamBudget, Quantizer
from fasterai.core.inputs import collect_inputs
from fasterai.quantize.find import find_layers
from fasterai.quantize.formats import BITS, Corrected, Pair, weight_bytes
from fasterai.quantize.measure import Pricer
sys.path.insert(0, str(Path(__file__).resolve().parent))
from quality import _train_digits, _vgg as _build_vgg     # before prune, which takes this folder off the path
from turns import turns     # before prune, which takes this folder off the path
from prune import _lite, _minilm
sys.path = [p for p in sys.path if Path(p or '.').resolve() != Path(__file__).resolve().parent]     # onnx.py beside this file is not the package

def _log(*s): print(*s, file=sys.stderr, flush=True)

def _table(head, rows):
    _log(*(' | '.join(map(str, r)) + '\n' for r in rows))
    return '\n'.join(['| ' + ' | '.join(head) + ' |', '|---'*len(head) + '|', *('| ' + ' | '.join(map(str, r)) + ' |' for r in rows), ''])

def _state(model): return {k: v.contiguous().clone() for k,v in model.state_dict().items()}

def _megabytes(model):
    "MB of a safetensors file"
    with tempfile.TemporaryDirectory() as d:
        save_file(_state(model), f'{d}/m.safetensors')
        return os.path.getsize(f'{d}/m.safetensors')/1e6

# MiniLM

ONLY = dict(exclude='pooler*')

def _encoder(model): return {n: m for n,m in model.named_modules() if type(m) is nn.Linear and 'pooler' not in n}

def _share(plan):
    "Bytes of the weights of the encoder, relative to float32"
    rows = [o for o in plan.layers if o.kind == 'Linear' and 'pooler' not in o.name]
    return sum(o.after for o in rows)/sum(o.before for o in rows)

def _cosine(case, model): return float((case.outputs(model)*case.dense).sum(1).mean())

@torch.no_grad()
def _hidden(model, batches):
    "Hidden states of all tokens that are no padding"
    return torch.cat([model(**b).last_hidden_state[b['attention_mask'].bool()] for b in batches])

def _torchao(model, bits):
    "Weights as torchao rounds them, in a plain model"
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
    res = deepcopy(model)
    config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(getattr(torch, f'int{bits}'), PerGroup(32))
    quantize_(res, config, filter_fn=lambda m, n: type(m) is nn.Linear and 'pooler' not in n)
    for m in res.modules():
        if isinstance(m, nn.Linear) and type(m.weight.data) is not torch.Tensor or hasattr(getattr(m, 'weight', None), 'dequantize') and \
                type(m.weight) is not nn.Parameter: m.weight = nn.Parameter(m.weight.dequantize().float(), False)
    return res

def _onnxruntime(model, bits, block):
    "Weights as the quantizer of ONNX Runtime's MatMulNBits rounds them, in a plain model"
    import numpy as np
    from onnxruntime.capi import _pybind_state as ort
    res,per = deepcopy(model),8//bits
    for m in _encoder(res).values():
        W = m.weight.detach().T.contiguous().numpy()        # (n, m)
        (n,k),blocks = W.shape,-(-W.shape[0]//block)
        q,s,z = np.zeros((k, blocks, block//per), 'uint8'),np.zeros((k, blocks), 'float32'),np.zeros((k, -(-blocks//per)), 'uint8')
        getattr(ort, f'quantize_matmul_{bits}bits')(q, W, s.reshape(-1), z.reshape(-1), block, k, n, True)
        codes = np.stack([q >> bits*i & (2**bits - 1) for i in range(per)], -1).reshape(k, blocks, block)
        new = ((codes.astype('float32') - 2**(bits-1))*s[..., None]).reshape(k, -1)[:, :n]
        m.weight = nn.Parameter(torch.tensor(new), False)
    return res

FLOORS = {'int8': .9995, 'int4 g32': .991, 'int4 g128': .986, 'int3 g32': .966, 'int3 g128': .954, 'int2 g32': .86,
          'ByteBudget(0.1)': .952, 'ByteBudget(0.125)': .984, 'ByteBudget(0.16)': .9955, 'ByteBudget(0.25)': .9995}

def minilm(cache):
    "Cosine of sentence embeddings to those of the dense model"
    case = _minilm(cache)
    start = time.process_time()
    stats = collect_inputs(case.model, case.data, layers='encoder', sensitivity='full')
    seconds,ref = time.process_time() - start,_hidden(case.model, case.test)
    rows = []
    def row(what, share, model, floor=None, plan=None, s=None):
        c,err = _cosine(case, model),float((_hidden(model, case.test) - ref).norm()/ref.norm())
        pred = sum(o.loss or 0 for o in plan.layers) if plan is not None else 0
        rows.append((what, f'{share:.1%}', f'{c:.4f}', f'{floor:g}' if floor else '', f'{pred**.5:.3f}' if pred else '', f'{err:.3f}',
                     f'{(1 - c)/pred:.4f}' if pred else '', f'{s:.0f}' if s else ''))
        _log(*rows[-1])
    def ours(what, policy, **kw):
        start = time.process_time()
        plan = Quantizer(policy, **ONLY, **kw).plan(case.model, stats)
        q = plan.apply(case.model)
        row(what, _share(plan), q, FLOORS.get(what), plan, time.process_time() - start)
    half = Quantizer(Half(), **ONLY).plan(case.model)
    row('bf16', _share(half), half.apply(case.model))
    for f in (Int(8), Int(6), Int(5), *(Int(b, group=g) for b in (4, 3, 2) for g in (32, 128))): ours(str(f), f)
    for r in (.1, .125, .16, .25): ours(f'ByteBudget({r:g})', ByteBudget(r))
    for b in (4, 3): ours(f'int{b} g32, to nearest', Int(b, group=32), rounding='nearest')
    row('torchao int8', .251, _torchao(case.model, 8))
    for b in (4, 3): row(f'torchao int{b} g32', b/32 + 1/64, _torchao(case.model, b))
    for b,k in ((4, 32), (8, 128)): row(f'ONNX Runtime {b} bits, block {k}', b/32 + 1/k/2, _onnxruntime(case.model, b, k))
    head = 'weights', 'bytes', 'cosine', 'floor', 'predicted error', 'measured error', '(1 − cosine)/predicted²', 's'
    return '\n'.join(['## MiniLM: weights of the encoder', '', f'Moments and sensitivity of 512 sentences: {seconds:.0f} s of CPU time; '
        '512 other sentences for the test.', '', _table(head, rows)])

def _candidates():
    "Formats that a budget may choose from"
    pairs = tuple(Pair(s, *o) for s in (.125, .25, .5) for o in ((8,), (4, 64)))
    corrections = tuple(Corrected(*o, rank=k) for o in ((2, 32), (2, 64), (3, 64), (3, 128), (4, 128)) for k in (4, 16))
    return {'bits': BITS, 'and pairs': (*BITS, *pairs), 'and corrections': (*BITS, *corrections)}

def low(cache):
    "Pairs and corrections beside bits, at equal bytes"
    case,rows,formats = _minilm(cache),[],_candidates()
    stats = collect_inputs(case.model, case.data, layers='encoder', sensitivity='full')
    q,ref = Quantizer(ByteBudget(.1, formats=sum(formats.values(), ())), **ONLY),_hidden(case.model, case.test)
    seen = q._look(case.model, stats, None, 'auto', None)       # prices of all formats, for all budgets
    for r in (.1, .125, .16):
        for what,fs in formats.items():
            q.policy = ByteBudget(r, formats=fs)
            plan = q._choose(seen)
            m,n = plan.apply(case.model),sum(isinstance(o.format, Pair|Corrected) for o in plan.replaced)
            err,pred = float((_hidden(m, case.test) - ref).norm()/ref.norm()),sum(o.loss or 0 for o in plan.layers)**.5
            rows.append((f'{r:.1%}', what, n, f'{pred:.4f}', f'{err:.4f}', f'{_cosine(case, m):.4f}'))
            _log(*rows[-1])
    head = 'bytes', 'candidates', 'layers of low rank', 'predicted error', 'measured error', 'cosine'
    return '\n'.join(['## MiniLM: pairs and corrections as candidates', '', _table(head, rows)])

def layer(cache):
    "VGG's 4096→4096"
    model,data,_ = _vgg(cache)
    stats = collect_inputs(model, data[:6], layers='classifier.3', sensitivity='full')
    site,rows = next(o for o in find_layers(model) if o.name == 'classifier.3'),[]
    price = Pricer(site, stats['classifier.3'], stats.sens['classifier.3'])
    pairs,corrected = [Pair(s) for s in (.02, .06, .2)],[Corrected(2, 128, rank=8), Corrected(2, 128, rank=32), Corrected(3, 128, rank=16)]
    formats = [*pairs, *corrected, *(Int(*o) for o in ((2, 128), (2, 64), (2, 32), (3, 128), (4, 128)))]
    for f in sorted(formats, key=lambda f: weight_bytes(f, 4096, 4096)):
        c = price(f)
        rows.append((str(f), f'{weight_bytes(f, 4096, 4096)/4/4096**2:.2%}', f'{c.error:.4f}', f'{c.loss**.5:.4f}'))
        _log(*rows[-1])
    return '\n'.join(['## Linear(4096→4096) of VGG16-bn: pairs and corrections', '', 'Trained on digits, calibrated on 384 of them. Predicted relative errors.', '',
                      _table(('weights', 'bytes', 'error of the layer', 'error of the output of the network'), rows)])

def whole(cache):
    "The whole file of MiniLM"
    case,rows = _minilm(cache),[]
    stats = collect_inputs(case.model, case.data, layers='encoder')
    rows.append(('float32', f'{_megabytes(case.model):.1f}', '', '1.0000'))
    for bits in (8, 4):
        q = Quantizer({'*word_embeddings': bits, 'encoder.*': Int(4, group=32)}, embeddings=True)
        plan = q.plan(case.model, stats)
        small = plan.apply(case.model)
        rows.append((f'encoder 4 bits, table {bits} bits', f'{_megabytes(small):.1f}', f'{plan.bytes_after/1e6:.1f}', f'{_cosine(case, small):.4f}'))
    return '\n'.join(['## MiniLM: the whole file', '', _table(('weights', 'MB', 'MB in the plan', 'cosine'), rows)])

# Convolutions

def _plain_convs(model):
    "The model with its own convolutions, which pad first, as padding and plain convolutions"
    for m in [*model.modules()]:
        for n,c in m.named_children():
            if not isinstance(c, nn.Conv2d) or type(c) is nn.Conv2d: continue
            new = nn.Conv2d(c.in_channels, c.out_channels, c.kernel_size, c.stride, 0, c.dilation, c.groups, c.bias is not None)
            new.load_state_dict(c.state_dict())
            setattr(m, n, nn.Sequential(c.static_padding, new.requires_grad_(False)))
    return model.eval()

def lite(cache):
    "EfficientNet-Lite0: agreement with the dense network on crops of photographs"
    case,rows = _lite(cache, n=256),[]
    case.model = _plain_convs(case.model)
    assert case.judge(case.model) == (1., 0.) or case.judge(case.model)[1] < 1e-9
    stats = collect_inputs(case.model, case.data, patches=True)
    def row(what, q, data):
        plan = q.plan(case.model, data)
        acc,err = case.judge(plan.apply(case.model))
        rows.append((what, f'{plan.bytes_after/plan.bytes:.1%}', f'{acc:.1%}', f'{err:.4f}'))
        _log(*rows[-1])
    for b in (8, 4):
        row(f'int{b} to nearest, clipped', Quantizer(b, rounding='nearest'), None)
        row(f'int{b}', Quantizer(b), stats)
    return '\n'.join(['## EfficientNet-Lite0', '', 'Bytes of the whole network; 256 crops to calibrate on, 600 of other photographs to test with; '
        'error: share of the variation of the logits.', '', _table(('weights', 'bytes', 'agreement', 'error'), rows)])

# VGG16-bn

def _vgg(cache):
    build,train,data,test = _train_digits(_build_vgg, 32, 3, 3e-4)
    path = Path(cache)/'vgg16_bn_digits.pth'
    if path.exists():
        model = build()
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        model = train()
        torch.save(model.state_dict(), path)
    return model.eval().requires_grad_(False), data, test

@torch.no_grad()
def _accuracy(model, test): return sum(int((model(x).argmax(1) == y).sum()) for x,y in test)/sum(len(y) for _,y in test)

def _bytes(m): return sum(v.nbytes for v in m.state_dict().values())

def _low_ranks(model, data, row):
    "Share -> model with that share of the weights of its fully-connected layers, as long as it is within a point; spectra are computed once"
    plan,res = FC_Decomposer(policy=ParamBudget(.1, round_to=1), exclude='classifier.6').plan(model, data),{}
    for r in (.1, .03, .01, .003):
        m = plan.replan(ParamBudget(r, round_to=1)).apply(model)
        if not row(f'low rank {r:g} of the fully-connected weights', m): break
        res[r] = m
    return res

class _Body:
    "Convolutions rounded once for each number of bits, with data: they are the same in all models here"
    def __init__(self, model, few): self.model,self.plans,self.moments = model,{},collect_inputs(model, few, layers='features', patches=True)
    def __call__(self, b, model):
        if b not in self.plans: self.plans[b] = Quantizer(b, layers='features').plan(self.model, self.moments)
        return self.plans[b].apply(model)

def _together(body, small, few, row):
    "Bits for the models in `small`"
    least = 9
    for r in sorted(small):         # a larger pair is worth its bytes only where it allows fewer bits
        moments = collect_inputs(small[r], few, layers='classifier')
        for b in (o for o in (8, 4, 3, 2) if o < least):
            m = Quantizer(b, layers='classifier').plan(small[r], moments).apply(body(b, small[r]))
            if not row(f'low rank {r:g}, then {b} bits', m): break
            least = b

def vgg(cache):
    "VGG16-bn on digits: the fewest bytes within a point of dense"
    model,data,test = _vgg(cache)
    dense,whole,start,rows = _accuracy(model, test),_bytes(model),time.process_time(),[]
    rows.append(('dense', '100.00%', f'{whole/1e6:.1f}', f'{dense:.2%}', ''))
    def row(what, m):
        size,acc = _bytes(m),_accuracy(m, test)
        good = acc >= dense - .01
        rows.append((what, f'{size/whole:.2%}', f'{size/1e6:.1f}', f'{acc:.2%}', 'yes' if good else 'no'))
        _log(f'{time.process_time() - start:.0f} s', *rows[-1])
        return good
    small = _low_ranks(model, data, row)
    body = _Body(model, data[:8])
    for b in (8, 4, 3, 2):
        m = Quantizer(b, layers='classifier', rounding='nearest').quantize(body(b, model))
        if not row(f'{b} bits', m): break
    _together(body, small, data[:8], row)
    least = {}
    for kind,part in (('low rank alone', lambda w: 'bits' not in w), ('bits alone', lambda w: 'low' not in w), ('both', lambda w: 'then' in w)):
        good = [o for o in rows[1:] if o[4] == 'yes' and part(o[0])]
        least[kind] = min(good, key=lambda o: float(o[2]))[2] + ' MB' if good else 'none'
    return '\n'.join(['## VGG16-bn on digits', '', 'Bytes of the whole network. Weights are rounded with data, those of the wide layers to nearest in the rows of bits alone. '
        'Fewest within a point of dense: ' +
        ', '.join(f'{k} {v}' for k,v in least.items()) + '.', '', _table(('weights', 'bytes', 'MB', 'accuracy', 'within a point'), rows)])

# Picture

_KINDS = (('to nearest', 'one format, to nearest', 'v'), ('ByteBudget', 'ByteBudget', 's'), ('int', 'one format, error feedback', 'o'))

def _points(text):
    "Kind of format -> predicted and measured errors in the table of MiniLM"
    res = {}
    for line in text.partition('## MiniLM: weights')[2].partition('\n## ')[0].splitlines():
        cells = [c.strip() for c in line.strip('|').split('|')]
        if len(cells) != 8 or not cells[4].startswith('0.'): continue       # rounded by others, without a prediction
        label,marker = next((k,m) for part,k,m in _KINDS if part in cells[0])
        res.setdefault((label, marker), []).append((float(cells[4]), float(cells[5])))
    return res

def _picture(text, path):
    "Predicted against measured error of the hidden states"
    from matplotlib.figure import Figure
    points = _points(text)
    if not points: return
    fig = Figure(figsize=(5, 4.2), layout='constrained')
    ax = fig.subplots()
    ends = [f(x for xy in points.values() for o in xy for x in o) for f in (min, max)]
    line = ends[0]/1.2,ends[1]*1.2
    ax.plot(line, line, color='.6', lw=1, zorder=0)
    for (label,marker),xy in points.items(): ax.plot(*zip(*xy), marker, label=label, mfc='none', ms=7)
    ax.set(xscale='log', yscale='log', xlabel='predicted error', ylabel='measured error', title='MiniLM: error of the hidden states')
    ticks = [t for t in (.01, .02, .05, .1, .2, .5, 1.) if line[0] <= t <= line[1]]
    for a in (ax.xaxis, ax.yaxis):
        a.set_ticks(ticks, [f'{t:g}' for t in ticks])
        a.set_ticks([], minor=True)
    ax.legend()
    fig.savefig(path, dpi=90)

# Time

@torch.no_grad()
def _ratios(models, x, rounds):
    "CPU time in ms, and how many times faster than the first"
    def run(m): return m(**x) if isinstance(x, dict) else m(x)
    return dict(zip(models, turns([partial(run, m) for m in models.values()], rounds)))

def eager(cache):
    "MiniLM in eager PyTorch"
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    case = _minilm(cache)
    def ao(config):
        res = deepcopy(case.model)
        quantize_(res, config)
        return res
    models = {'float32': case.model, 'bf16 (Half)': Quantizer(Half(), **ONLY).quantize(case.model),
        'int8 dynamic': Quantizer(Int(8, activations='dynamic'), **ONLY).quantize(case.model),
        'int8, weights only': Quantizer(8, **ONLY).quantize(case.model), 'int4, weights only': Quantizer(4, rounding='nearest', **ONLY).quantize(case.model),
        'torchao int8 dynamic': ao(Int8DynamicActivationInt8WeightConfig()), 'torchao int8, weights only': ao(Int8WeightOnlyConfig())}
    long = next(b for b in case.data if b['input_ids'].shape[1] >= 32)
    rows,cos = [],{k: _cosine(case, m) for k,m in models.items()}
    times = {n: _ratios(models, {k: v[:n,:32] for k,v in long.items()}, r) for n,r in ((1, 20), (32, 7))}
    for k in models: rows.append((k, f'{cos[k]:.4f}', *(f'{times[n][k][0]:.1f} ms ({times[n][k][1]:.2f} ×)' for n in (1, 32))))
    return '\n'.join(['## MiniLM: time in eager PyTorch', '', 'Sentences of 32 tokens; CPU time, and speed relative to float32.', '',
                      _table(('weights', 'cosine', 'batch 1', 'batch 32'), rows)])

def wide(cache):
    "VGG's 25088→4096"
    torch.manual_seed(0)
    lin,k = nn.Linear(25088, 4096).requires_grad_(False),25088*4096//4//(25088 + 4096)
    pair = LowRankLinear(nn.Linear(25088, k, bias=False), nn.Linear(k, 4096)).requires_grad_(False)
    int8 = Quantizer(Int(8, activations='dynamic'))
    models = {'float32': lin, 'bf16': Quantizer(Half()).quantize(lin), 'int8': int8.quantize(lin), 'pair of a quarter': pair,
              'pair of a quarter in int8': int8.quantize(pair)}
    size = {n: sum(v.nbytes for v in m.state_dict().values())/1e6 for n,m in models.items()}
    times = {n: _ratios(models, torch.randn(n, 25088), r) for n,r in ((1, 15), (32, 7))}
    rows = [(n, f'{size[n]:.0f}', *(f'{times[b][n][0]:.1f} ms ({times[b][n][1]:.1f} ×)' for b in (1, 32))) for n in models]
    return '\n'.join(['## Linear(25088→4096) of VGG: time', '', f'The pair has rank {k}. CPU time, and speed relative to float32.', '',
                      _table(('layer', 'MB', 'batch 1', 'batch 32'), rows)])

SECTIONS = dict(minilm=minilm, low=low, layer=layer, whole=whole, lite=lite, vgg=vgg, eager=eager, wide=wide)

def _version(name):
    try: return f'{name} {version(name)}'
    except PackageNotFoundError: return f'no {name}'

def _merged(path, parts, head):
    "The file with the new sections in place of those of the same title"
    old = path.read_text(encoding='utf-8').split('\n## ')[1:] if path.exists() else []
    found = {('## ' + o).splitlines()[0]: '## ' + o.rstrip() + '\n' for o in old} | {p.splitlines()[0]: p for p in parts}
    return '\n'.join([head, '', *found.values()])

@call_parse
def main(
    out:str='',         # Markdown file to write; sections that are not run stay as they are in it
    only:str='',        # names of sections, separated by commas: minilm, low, layer, whole, lite, vgg, eager, wide
    cache:str='',       # folder of trained networks; a temporary one by default
    threads:int=1,      # threads of torch
):
    "Quantize, compare, and write tables"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(threads)
    if (odd := set(filter(None, only.split(','))) - SECTIONS.keys()): raise SystemExit(f'no section {", ".join(odd)}: {", ".join(SECTIONS)}.')
    with tempfile.TemporaryDirectory() as tmp:
        parts = [f(cache or tmp) for k,f in SECTIONS.items() if not only or k in only.split(',')]
    versions = ', '.join([f'torch {torch.__version__}', *map(_version, ('torchao', 'onnxruntime')), f'fasterai {fasterai.__version__}'])
    where = f'{platform.processor() or platform.machine()}, {threads} thread(s), Python {platform.python_version()}, {versions}.'
    head = f'# Quantization\n\n{where}'
    if out:
        Path(out).write_text(_merged(Path(out), parts, head), encoding='utf-8')
        _picture(Path(out).read_text(encoding='utf-8'), Path(__file__).resolve().parent.parent/'nbs'/'images'/'quantize.png')
    else: print('\n'.join([head, '', *parts]))
