"""Quality against parameters: truncated SVD as published in fasterai 0.4.1, diagonal scaling, and this library's calibrated decomposition.

Three models are trained here on data that comes with scikit-learn and Python, with fixed seeds; a folder `--cache` keeps them.
README.md beside this file says how to run it and what each column means.
"""
import importlib.util, math, os, platform, statistics, sys, sysconfig, tempfile, time, warnings
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
import fastprogress.fastprogress, torch, torch.nn.functional as F
from fastai.vision.all import CrossEntropyLossFlat, Learner, accuracy, set_seed
from fastcore.script import call_parse, store_true
from torch import nn
import fasterai
from fasterai.misc.all import FC_Decomposer, ParamBudget, calibrate, digits_dls, run_batches
sys.path.insert(0, str(Path(__file__).resolve().parent))
from decompose import PEER, _cpu, _install

SEED,RATIOS = 42,(.9, .7, .5, .3)
METHODS = 'plain','diagonal','calibrated','budget','budget + distillation'
FLOOR = 1e-5            # output errors below are rounding of float32: not compared
POINTS = 1.             # VGG16-bn: accuracy lost at a tenth of the parameters, in points
PREDICTED,EXCESS = 1e-4,.01   # relative difference of predicted and measured errors; excess over the optimum
COST = {None: 2.5, 'full': 6.}  # largest time of a calibration, in forward passes

def _log(*s): print(*s, file=sys.stderr, flush=True)

# Models

class Block(nn.Module):
    "Pre-norm transformer block with causal attention"
    def __init__(self, d, heads):
        super().__init__()
        self.heads,self.norm1,self.norm2 = heads,nn.LayerNorm(d),nn.LayerNorm(d)
        self.q,self.k,self.v,self.proj = [nn.Linear(d, d) for _ in range(4)]
        self.fc1,self.fc2 = nn.Linear(d, 4*d),nn.Linear(4*d, d)

    def forward(self, x):   # (batch, tokens, d)
        u = self.norm1(x)
        q,k,v = [f(u).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

class ByteGPT(nn.Module):
    "Logits of the next byte at every position"
    def __init__(self, d=192, depth=4, heads=4, context=128):
        super().__init__()
        self.emb,self.pos = nn.Embedding(256, d),nn.Parameter(torch.randn(context, d)*.02)
        self.blocks = nn.Sequential(*[Block(d, heads) for _ in range(depth)])
        self.norm,self.head = nn.LayerNorm(d),nn.Linear(d, 256)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)): nn.init.normal_(m.weight, std=.02)

    def forward(self, x): return self.head(self.norm(self.blocks(self.emb(x) + self.pos[:x.shape[1]])))

def _vgg():
    from torchvision.models import vgg16_bn
    return vgg16_bn(num_classes=10)

def _vit():
    from timm.models import VisionTransformer
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=128, depth=4, num_heads=4, num_classes=10)

# Data and training

def _plain(b): return [o.as_subclass(torch.Tensor) for o in b]

def _train_digits(build, size, epochs, lr):
    "A model, its training batches and its validation batches"
    def train():
        set_seed(SEED, reproducible=True)
        dls,model = digits_dls(size),build()
        with (learn := Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)).no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
        return model
    dls = digits_dls(size)
    return build, train, [_plain(b)[0] for b in dls.train.new(shuffle=False, drop_last=False)], [_plain(b) for b in dls.valid]

def _stdlib():
    "Python's standard library as bytes (N,), without its tests"
    root = Path(sysconfig.get_paths()['stdlib'])
    skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages'}
    fs = sorted(f for f in root.rglob('*.py') if not skip & set(f.relative_to(root).parts[:-1]))
    return torch.frombuffer(bytearray(b'\n'.join(f.read_bytes() for f in fs)), dtype=torch.uint8)

def _windows(text, starts, n=128): return torch.stack([text[i:i+n+1] for i in starts]).long()

def _train_text(steps, bs, lr):
    text = _stdlib()
    seen,held = text[:-len(text)//10],text[-len(text)//10:]     # the last tenth is held out
    def draw(g): return _windows(seen, torch.randint(len(seen)-129, (bs,), generator=g))
    def train():
        torch.manual_seed(SEED)
        model,g = ByteGPT(),torch.Generator().manual_seed(SEED)
        opt = torch.optim.AdamW(model.parameters(), lr, weight_decay=.1)
        sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, steps)
        for i in range(steps):
            b = draw(g)
            loss = F.cross_entropy(model(b[:, :-1]).flatten(0, 1), b[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.)
            opt.step(); sched.step(); opt.zero_grad()
            if i%50 == 49: _log(f'step {i+1} of {steps}: loss {loss:.3f}')
        return model
    g = torch.Generator().manual_seed(SEED+1)
    test = _windows(held, torch.linspace(0, len(held)-130, 128).long().tolist())
    return ByteGPT, train, [draw(g)[:, :-1] for _ in range(48)], [(b[:, :-1], b[:, 1:]) for b in test.split(16)]

@dataclass
class Case:
    "A trained model and what it is measured on"
    name: str
    model: nn.Module
    data: list              # calibration batches, all of the training set or a part of it
    test: list              # held-out batches: inputs, targets
    exclude: tuple = ()     # fully-connected layers that stay dense
    ratios: tuple = RATIOS
    seconds: float = 0.     # of training
    metric: str = 'accuracy'
    lr: float = 1e-5        # of the distillation: Adam's steps must be small against the error that is there already

    def linears(self): return {n: m for n,m in self.model.named_modules() if isinstance(m, nn.Linear)}
    def ranks(self, ratio):
        "The same share of parameters in every layer, such that all fully-connected weights together are at most `ratio` of the dense ones"
        sizes = {n: m.weight.numel() for n,m in self.linears().items()}
        stays = sum(sizes[n] for n in self.exclude)
        share = (ratio*sum(sizes.values()) - stays)/(sum(sizes.values()) - stays)
        return {n: max(1, math.floor(share*sizes[n]/sum(m.weight.shape))) for n,m in self.linears().items() if n not in self.exclude}

# case -> (how to get the model and the data, further fields of `Case`)
CASES = {
    'VGG16-bn': (lambda: _train_digits(_vgg, 32, 3, 3e-4), dict(exclude=('classifier.6',), ratios=(.5, .1, .05))),
    'ViT': (lambda: _train_digits(_vit, 16, 25, 1.5e-3), dict(exclude=('head',), lr=3e-6)),
    'ByteGPT': (lambda: _train_text(450, 16, 2e-3), dict(metric='perplexity', lr=1e-5))}
QUICK = {'ViT, short training': (lambda: _train_digits(_vit, 16, 8, 1.5e-3), dict(exclude=('head',), lr=3e-6))}

def _case(name, cache):
    "Train, or load from `cache`"
    make,kw = {**CASES, **QUICK}[name]
    build,train,data,test = make()
    path = Path(cache)/f'{name}.pth'
    if not path.exists():
        _log(f'{name}: training')
        t,model = time.perf_counter(),train()
        torch.save(dict(state=model.state_dict(), seconds=time.perf_counter()-t), path)
    saved = torch.load(path, weights_only=True)
    model = build()
    model.load_state_dict(saved['state'])
    return Case(name, model.eval().requires_grad_(False), data, test, seconds=saved['seconds'], **kw)

# Methods: for each, factors of rank k of every layer

def _pairs(model, factors):
    "A copy of `model` with the layers replaced by pairs (A, B): x -> B(Ax) + bias"
    model = deepcopy(model)
    for name,(A,B) in factors.items():
        old,(parent,_,child) = model.get_submodule(name),name.rpartition('.')
        pair = nn.Sequential(nn.Linear(A.shape[1], len(A), bias=False, device='meta'), nn.Linear(len(A), len(B), device='meta'))
        pair[0].weight,pair[1].weight,pair[1].bias = [nn.Parameter(o.clone(), False) for o in (A, B, old.bias)]
        setattr(model.get_submodule(parent), child, pair)
    return model.eval()

def _cut(factors, ranks): return {n: (A[:ranks[n]], B[:, :ranks[n]]) for n,(A,B) in factors.items()}

def _peer_class(path):
    "`FC_Decomposer` of the published package, which lives beside this one: the file that defines it needs torch alone"
    spec = importlib.util.spec_from_file_location('published_fc_decomposer', Path(path)/'fasterai'/'misc'/'fc_decomposer.py')
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod.FC_Decomposer

def _peer_model(model, ranks, peer):
    "`model` decomposed by the published package to exactly these ranks"
    for n,k in ranks.items():
        full = min(model.get_submodule(n).weight.shape)
        model = peer().decompose(model, percent_removed=1 - (k+.5)/full, layers=[n])    # it keeps int((1-p)*full), at least 1
        if (has := model.get_submodule(n)[0].out_features) != k: raise ValueError(f'{n}: rank {has} in place of {k}')
    return model

def plain(case, ranks, peer):
    "Truncated SVD of the published package: asked for the largest ranks, smaller ones are cut from them"
    model = _peer_model(case.model, ranks, peer)
    return {n: (model.get_submodule(n)[0].weight, model.get_submodule(n)[1].weight) for n in ranks}

@torch.no_grad()
def _second_moments(case, names):
    "E x² of every input feature of the layers `names`, in float64"
    sums,hooks = {n: [0., 0] for n in names},[]
    for n in names:
        def see(m, args, n=n):
            x = args[0].flatten(0, -2)
            sums[n][0],sums[n][1] = sums[n][0] + x.square().sum(0).double(),sums[n][1] + len(x)
        hooks.append(case.model.get_submodule(n).register_forward_pre_hook(see))
    for x in case.data: case.model(x)
    for h in hooks: h.remove()
    return {n: s/c for n,(s,c) in sums.items()}

def diagonal(case, ranks, peer=None):
    "Activation-aware SVD with a diagonal scale (Yuan et al., 2023, α = 1): truncated SVD of W diag(s), s² = E x², scaled back"
    return {n: _scaled(case.model.get_submodule(n).weight.double(), s2.sqrt(), ranks[n]) for n,s2 in _second_moments(case, ranks).items()}

def _scaled(W, s, k):
    s = s.clamp(min=1e-6*s.max())
    Ws = W*s
    if len(W) <= W.shape[1]: U = torch.linalg.eigh(Ws @ Ws.T)[1].flip(1)[:, :k]; return (U.T @ W).float(), U.float()
    V = torch.linalg.eigh(Ws.T @ Ws)[1].flip(1)[:, :k]
    return (V.T/s).float(), (Ws @ V).float()

def _plan(case, policy, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)    # about layers that stay dense or grow: both are meant
        return FC_Decomposer(policy=policy, exclude=case.exclude or None).plan(case.model, case.data, **kw)

def _models(case, peer):
    "Method -> function of a ratio that returns a model; what does not depend on the ratio is done once"
    most = case.ranks(max(case.ratios))
    for method in (plain, diagonal):
        factors = method(case, most, peer)
        yield method.__name__, lambda r: _pairs(case.model, _cut(factors, case.ranks(r)))
        del factors
    plan = _plan(case, case.ranks(.5), sensitivity=False)
    yield 'calibrated', lambda r: plan.replan(case.ranks(r)).apply(case.model)
    plan = _plan(case, ParamBudget(.5))
    def budget(r):
        shapes = {n: sum(m.weight.shape) for n,m in case.linears().items()}
        return plan.replan(ParamBudget(params=sum(k*shapes[n] for n,k in case.ranks(r).items()))).apply(case.model)  # no more than the others have
    yield 'budget', budget

# Measurements

@torch.no_grad()
def _logits(model, case): return torch.cat([model(x) for x,_ in case.test])

def _fc_params(model): return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))

def measure(model, case, dense):
    "Fully-connected weights, metric, and ‖z - z₀‖/‖z₀‖ of the logits on held-out data"
    z,y = _logits(model, case),torch.cat([y for _,y in case.test])
    metric = (z.argmax(-1) == y).double().mean() if case.metric == 'accuracy' else F.cross_entropy(z.flatten(0, -2), y.flatten()).exp()
    return dict(params=_fc_params(model), metric=metric.item(), error=((z - dense).double().norm()/dense.double().norm()).item())

def distil(student, teacher, data, lr):
    "The pairs trained for one epoch towards the logits of `teacher`; the better of start and end, on the data trained on"
    student = deepcopy(student).eval().requires_grad_(False)    # no dropout, no update of batch statistics
    start,pairs = student.state_dict(),[m for m in student.modules() if type(m) is nn.Sequential and [*map(type, m)] == [nn.Linear]*2]
    start = {k: v.clone() for k,v in start.items()}
    params = [p.requires_grad_() for m in pairs for p in m.parameters()]
    if not params: return student
    def loss(x):
        with torch.no_grad(): z = teacher(x)
        return F.mse_loss(student(x), z)
    @torch.no_grad()
    def total(): return sum(loss(x).item()*len(x) for x in data)
    before,opt = total(),torch.optim.AdamW(params, lr, weight_decay=0.)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, len(data))
    rows = torch.cat(data)
    for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED)).tensor_split(len(data)):
        loss(rows[i]).backward()
        opt.step(); sched.step(); opt.zero_grad()
    if not total() < before: student.load_state_dict(start)
    return student.requires_grad_(False)

def compare(case, peer):
    "(ratio, method) -> measurements; ratio 1 is the dense model"
    dense = _logits(case.model, case)
    res = {(1., 'dense'): measure(case.model, case, dense)}
    def note(r, method, model):
        o = res[r, method] = measure(model, case, dense)
        _log(f'{case.name}, {r:.0%}, {method}: {o["params"]:,} weights, {case.metric} {o["metric"]:.4f}, error {o["error"]:.2e}')
    _log(f'{case.name}: trained in {case.seconds:.0f} s, {case.metric} {res[1., "dense"]["metric"]:.4f}')
    for method,build in _models(case, peer):
        for r in case.ratios:
            note(r, method, model := build(r))
            if method == 'budget': note(r, METHODS[-1], distil(model, case.model, case.data, case.lr))
    return res

def published_directly(case, peer):
    "Largest difference of the logits of a model cut from larger factors and of one that the published package made at the rank itself"
    small,most = case.ranks(case.ratios[-1]),case.ranks(case.ratios[0])
    a,b = _pairs(case.model, _cut(plain(case, most, peer), small)),_peer_model(case.model, small, peer)
    z = _logits(b, case)
    return ((_logits(a, case) - z).norm()/z.norm()).item()

# Checks

@torch.no_grad()
def prediction(case, ratio):
    "Largest relative difference of predicted and measured output errors of the layers on the calibration data"
    worst = 0.
    for policy,kw in (case.ranks(ratio), dict(sensitivity=False)),(ParamBudget(ratio), {}):
        plan = _plan(case, policy, **kw)
        small,sums,hooks = plan.apply(case.model),{},[]
        for o in plan.replaced:
            pair = deepcopy(small.get_submodule(o.name)).double()
            acc = sums[o.name] = dict(diff=0., sq=0., sum=0., n=0)
            def see(m, args, y, pair=pair, acc=acc):
                y,z = [t.flatten(0, -2) for t in (F.linear(args[0].double(), m.weight.double(), m.bias.double()), pair(args[0].double()))]
                for k,v in dict(diff=(z - y).square().sum(), sq=y.square().sum(), sum=y.sum(0), n=len(y)).items(): acc[k] = acc[k] + v
            hooks.append(case.model.get_submodule(o.name).register_forward_hook(see))
        for x in case.data: case.model(x)
        for h in hooks: h.remove()
        for o in plan.replaced:
            a = sums[o.name]
            measured = (a['diff']/(a['sq'] - a['sum'].square().sum()/a['n'])).sqrt().item()   # relative to the deviation from the mean
            worst = max(worst, abs(o.error/measured - 1))
    return worst

@torch.no_grad()
def correlated(peer, n=128, m=96, k=24, latent=12, noise=.3, rows=20_000):
    "Method -> output error over the population, of a layer whose inputs are a mixture of few latents and noise; and the optimum"
    g = torch.Generator().manual_seed(SEED)
    M,lin = torch.randn(latent, n, generator=g)*torch.logspace(0, 1, n),nn.Linear(n, m)    # features of different size
    lin.weight.data = torch.randn(m, n, generator=g)
    x = torch.randn(rows, latent, generator=g) @ M + noise*torch.randn(rows, n, generator=g)
    C = M.double().T @ M.double() + noise**2*torch.eye(n, dtype=torch.float64)
    W = lin.weight.double()
    e = torch.linalg.eigvalsh(W @ C @ W.T)
    case = Case('correlated', nn.Sequential(lin).eval().requires_grad_(False), list(x.split(1000)), [])
    pairs = {f.__name__: f(case, {'0': k}, peer)['0'] for f in (plain, diagonal)}
    pair = FC_Decomposer(policy={'0': k}).decompose(case.model, case.data, sensitivity=False)[0]
    pairs['calibrated'] = pair[0].weight,pair[1].weight
    def error(A, B):
        D = W - B.double() @ A.double()
        return ((D @ C @ D.T).trace()/e.sum()).sqrt().item()
    return {k: error(*p) for k,p in pairs.items()} | {'optimum': (e[:-k].sum()/e.sum()).sqrt().item()}

def few(case, ratio, factors):
    "Measurements with plain SVD and with 64 and 8 calibration images"
    dense,x = _logits(case.model, case),torch.cat(case.data[:2])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))]
    res = {0: measure(_pairs(case.model, _cut(factors, case.ranks(ratio))), case, dense)}
    for n in (64, 8): res[n] = measure(FC_Decomposer(policy=case.ranks(ratio)).decompose(case.model, x[:n], sensitivity=False), case, dense)
    return res

def cost(case, repeats=5):
    "Time of a calibration in forward passes over the same data, without and with sensitivity: medians of turns one after the other"
    data = case.data[:6] if case.name == 'VGG16-bn' else case.data
    calls = {'forward': lambda: [None for _ in run_batches(case.model, data)]}
    calls |= {how: lambda how=how: calibrate(case.model, data, sensitivity=how) for how in COST}
    for f in calls.values(): f()
    times = {k: [] for k in calls}
    for _ in range(repeats):
        for k,f in calls.items():
            t = time.perf_counter(); f(); times[k].append(time.perf_counter()-t)
    return {how: statistics.median(a/b for a,b in zip(times[how], times['forward'])) for how in COST}

def _check_models(results):
    for c,res in results:
        for r in c.ratios:
            e = {m: max(res[r, m]['error'], FLOOR) for m in METHODS}
            for m in ('plain','diagonal'):
                yield e['calibrated'] < e[m] or e['calibrated'] == FLOOR, f'{c.name}, {r:.0%}: output error {e["calibrated"]:.1e} calibrated, {e[m]:.1e} {m}'
            yield e['budget'] <= e['calibrated'], f'{c.name}, {r:.0%}: output error {e["budget"]:.1e} with a budget, {e["calibrated"]:.1e} with the same share everywhere'
        if c.name != 'VGG16-bn': continue
        dense = res[1., 'dense']
        best = max(o['metric'] for (r,m),o in res.items() if m in ('calibrated','budget') and o['params'] <= .1*dense['params'])
        yield dense['metric']-best <= POINTS/100, (f'{c.name}: accuracy {best:.2%} with at most 10 % of the fully-connected weights and no training, '
                                                   f'{dense["metric"]:.2%} dense, at most {POINTS:g} point less')

def _check_rest(rest):
    for name,x in rest['prediction'].items():
        yield x <= PREDICTED, f'{name}: predicted and measured output errors of the layers differ by {x:.0e} of them, at most {PREDICTED:g}'
    x = rest['correlated']['calibrated']/rest['correlated']['optimum'] - 1
    yield x <= EXCESS, f'correlated inputs: output error {x:.2%} above the optimum, at most {EXCESS:.0%}'
    for name,o in rest['cost'].items():
        for how,limit in COST.items():
            yield o[how] <= limit, f'{name}: calibration {"with" if how else "without"} sensitivity takes {o[how]:.2f} forward passes, at most {limit:g}'

# Report

def _md(head, rows, right): return [f'| {" | ".join(map(str, o))} |' for o in (head, ['---']*(len(head)-right) + ['---:']*right, *rows)]

def _value(case, x): return f'{x:.2%}' if case.metric == 'accuracy' else f'{x:.3f}'

def _table(case, res):
    full,rows,last = res[1., 'dense']['params'],[],None
    for (r,m),o in sorted(res.items(), key=lambda kv: (-kv[0][0], (*METHODS, 'dense').index(kv[0][1]))):
        rows.append(['' if r == last else f'{r:.0%}', m, f'{o["params"]:,}', f'{o["params"]/full:.2%}', _value(case, o['metric']),
                     '' if m == 'dense' else f'{o["error"]:.2e}'])
        last = r
    note = f' ({", ".join(f"`{o}`" for o in case.exclude)} stays dense and is counted)' if case.exclude else ''
    return [f'## {case.name}', '', f'Trained in {case.seconds:.0f} s; {sum(map(len, case.data)):,} rows of calibration data, '
            f'{sum(len(x) for x,_ in case.test):,} held out{note}.', '',
            *_md(['at most', 'method', 'fully-connected weights', 'kept', case.metric, 'output error'], rows, 4), '']

def _rest_tables(rest):
    c = rest['correlated']
    res = ['## One layer with correlated inputs', '', '96 outputs of 128 features, a mixture of 12 latents and noise, rank 24; errors over the population.', '',
           *_md(['method', 'output error', 'above optimum'], [[k, f'{v:.3e}', f'{v/c["optimum"]-1:.2%}'] for k,v in c.items()], 2), '', '## Few samples', '']
    rows = [[case.name, f'{r:.0%}', f'{n} images' if n else 'plain SVD', _value(case, o['metric']), f'{o["error"]:.2e}']
            for case,r,f in rest['few'] for n,o in f.items()]
    res += [*_md(['model', 'at most', 'calibrated on', 'metric', 'output error'], rows, 2), '', '## Cost of a calibration, in forward passes', '']
    return res + [*_md(['model', 'without sensitivity', 'with'], [[k, *(f'{o[h]:.2f}' for h in COST)] for k,o in rest['cost'].items()], 2), '']

def _report(results, rest, opts, threads):
    checks = [*_check_models(results), *_check_rest(rest)]
    return checks, '\n'.join([f'# Quality against parameters: fasterai {fasterai.__version__} and {PEER}', '', f'`python benchmarks/quality.py{opts}`', '',
        f'{_cpu()}, {os.cpu_count()} cores, {threads} thread{"s"[:threads > 1]}; {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}; '
        f'seed {SEED}. One run. Nothing is trained after the decomposition, except where the method says so.', '',
        f'plain: truncated SVD by fasterai {PEER}; asked for the largest ranks, smaller ones are cut from them, which differs from asking for the rank itself by '
        f'{rest["directly"]:.0e} of the logits. Output error: ‖z − z₀‖/‖z₀‖ of the logits on held-out data; below {FLOOR:g} it is rounding and not compared.', '',
        *[l for c,res in results for l in _table(c, res)], *_rest_tables(rest), '## Targets', '',
        *[f'- {"met" if ok else "**missed**"}: {s}' for ok,s in checks], ''])

@call_parse
def main(
    quick: store_true, # one small model, in about two minutes
    costs: store_true, # measure the cost of a calibration alone, and print it
    threads: int = 1,  # threads of torch
    cache: str = '',   # folder that keeps the published package and the trained models; a temporary one by default
    out: str = '',     # Markdown file to write
):
    "Measure accuracy and output error at equal numbers of parameters; exit code 1 where a target is missed"
    torch.set_num_threads(threads)
    fastprogress.fastprogress.NO_BAR = True
    results,rest = [],dict(prediction={}, cost={}, few=[])
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(cache or tmp)
        folder.mkdir(parents=True, exist_ok=True)
        if costs:
            rows = [[n, *(f'{v:.2f}' for v in cost(_case(n, folder)).values())] for n in (QUICK if quick else CASES)]
            return print('\n'.join(_md(['model', 'without sensitivity', 'with'], rows, 2)))
        peer = _peer_class(_install(folder))
        rest['correlated'] = correlated(peer)
        for name in (QUICK if quick else CASES):
            case = _case(name, folder)
            rest['cost'][name] = cost(case)
            results.append((case, compare(case, peer)))
            r = case.ratios[-1]
            if case.metric == 'accuracy' and name != 'VGG16-bn': rest['few'].append((case, r, few(case, r, plain(case, case.ranks(r), peer))))
            if name != 'VGG16-bn': rest['prediction'][name] = prediction(case, .5)
            if name.startswith('ViT'): rest['directly'] = published_directly(case, peer)
            if name == 'VGG16-bn': case.model = None    # half a gigabyte
    checks,text = _report(results, rest, f'{" --quick" if quick else ""} --threads {threads}', threads)
    print(text)
    if out: Path(out).write_text(text, encoding='utf-8')
    sys.exit(not all(ok for ok,_ in checks))
