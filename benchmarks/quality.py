"""Accuracy against parameters, with no or little training: plain SVD (the published fasterai 0.4.1), a diagonal ASVD, and this library.

Three networks are trained first: VGG16-bn and a small vision transformer on scikit-learn's digits, and a byte-level language model on the
source of Python's standard library. README.md beside this file says how to run it and what each column means.
"""
import importlib.util, os, platform, statistics, subprocess, sys, sysconfig, tempfile, time, warnings
from pathlib import Path
import timm, torch, torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastai.callback.schedule import *   # fit_one_cycle
from fastai.metrics import accuracy
from fastcore.script import call_parse, store_true
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models import vgg16_bn
import fasterai
from fasterai.misc.all import *

PEER,SEED,SHARES = '0.4.1',42,(.9, .7, .5, .3)

# ------------------------------------------------------------------ networks and data

class Block(nn.Module):
    "Pre-norm transformer block with causal attention"
    def __init__(self, d, heads):
        super().__init__()
        self.heads,self.n1,self.n2 = heads,nn.LayerNorm(d),nn.LayerNorm(d)
        self.q,self.k,self.v,self.proj = (nn.Linear(d, d) for _ in range(4))
        self.fc1,self.fc2 = nn.Linear(d, 4*d),nn.Linear(4*d, d)
    def forward(self, x):
        b,t,d = x.shape
        h = self.n1(x)
        q,k,v = (f(h).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        return x + self.fc2(F.gelu(self.fc1(self.n2(x))))

class ByteGPT(nn.Module):
    "Language model over bytes"
    def __init__(self, d=128, depth=3, heads=4, context=64):
        super().__init__()
        self.emb,self.pos = nn.Embedding(256, d),nn.Parameter(torch.randn(context, d)*.02)
        self.blocks = nn.Sequential(*[Block(d, heads) for _ in range(depth)])
        self.norm,self.head = nn.LayerNorm(d),nn.Linear(d, 256)
    def forward(self, x): return self.head(self.norm(self.blocks(self.emb(x) + self.pos[:x.shape[1]])))

def tiny_vit(): return timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=128, depth=4, num_heads=4, num_classes=10)

def source_dls(n=24_000, n_valid=400, context=64):
    "Windows of the standard library's source, the last tenth of it for validation"
    files = sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
    text = torch.frombuffer(bytearray(b'\n'.join(f.read_bytes() for f in files)), dtype=torch.uint8)
    cut,g = len(text)*9//10,torch.Generator().manual_seed(SEED)
    def windows(t, k): return torch.stack([t[i:i+context+1] for i in torch.randint(len(t)-context, (k,), generator=g)]).long()
    tr,va = windows(text[:cut], n),windows(text[cut:], n_valid)
    return DataLoaders.from_dsets(TensorDataset(tr[:,:-1], tr[:,1:]), TensorDataset(va[:,:-1], va[:,1:]), bs=32, device='cpu')

class Task:
    "A network, its data, how it is trained and measured, and which layers are decomposed"
    def __init__(self, name, make, dls, epochs, lr, exclude, metric, shares=SHARES, peer=SHARES, distil=(1, 1e-4)):
        self.name,self.make,self.exclude,self.metric,self.shares,self.peer,self.distil = name,make,exclude,metric,shares,peer,distil
        self._dls,self.epochs,self.lr = dls,epochs,lr

    def learner(self, model): return Learner(self.dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)

    def prepare(self, cache):
        "Train, or load what was trained before; keep calibration and validation data at hand"
        set_seed(SEED, reproducible=True)
        self.dls = self._dls()
        file,self.model = Path(cache)/f'{self.name}.pt',self.make()
        if file.exists(): self.model.load_state_dict(torch.load(file, weights_only=True))
        else:
            learn = self.learner(self.model)
            with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(self.epochs, self.lr)
            torch.save(self.model.state_dict(), file)
        self.model.eval()
        self.data = [x.as_subclass(torch.Tensor) for x,_ in self.dls.train.new(shuffle=False, drop_last=False)][:40]
        self.x,self.y = (torch.cat([b[i].as_subclass(torch.Tensor) for b in self.dls.valid]) for i in (0, 1))
        with torch.no_grad(): self.z = torch.cat([self.model(o) for o in self.x.split(64)])
        self.sites = [s for s in find_linears(self.model) if s.reason is None and s.name not in self.exclude]
        self.full = sum(s.in_features*s.out_features for s in self.sites)

    @torch.no_grad()
    def score(self, model):
        "Parameters of the decomposed layers, metric, relative error of the output on the validation set"
        was = model.training
        z = torch.cat([model.eval()(o) for o in self.x.split(64)])
        model.train(was)
        kept = count_params(model) - count_params(self.model) + self.full
        value = (z.argmax(-1) == self.y).float().mean() if self.metric == 'accuracy' else F.cross_entropy(z.flatten(0, -2), self.y.flatten()).exp()
        return dict(params=kept, metric=value.item(), error=((z - self.z).norm()/(self.z - self.z.mean(0)).norm()).item())

    def uniform(self, share):
        "The same share of parameters in each layer"
        return {s.name: max(1, int(share*s.in_features*s.out_features/(s.in_features + s.out_features))) for s in self.sites}

def tasks(quick):
    vit = Task('ViT', tiny_vit, lambda: digits_dls(16), 8 if quick else 25, 1.5e-3, ['head'], 'accuracy')
    if quick: return [vit]
    return [Task('VGG16-bn', lambda: vgg16_bn(num_classes=10), digits_dls, 3, 3e-4, ['classifier.6'], 'accuracy', (.5, .1, .05, .01), (.1,), (1, 1e-4)),
            vit, Task('ByteGPT', ByteGPT, source_dls, 1, 3e-3, ['head'], 'perplexity', distil=(1, 3e-4))]

# ------------------------------------------------------------------ methods

def load_peer(cache):
    "`FC_Decomposer` of the published package, which needs nothing but torch, under another name"
    dest = Path(cache)/f'fasterai-{PEER}'
    if not (dest/f'fasterai-{PEER}.dist-info').exists():
        subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', dest, f'fasterai=={PEER}'], check=True)
    spec = importlib.util.spec_from_file_location('peer_fc_decomposer', dest/'fasterai'/'misc'/'fc_decomposer.py')
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod.FC_Decomposer()

def peer_svd(task, ranks, peer):
    "Plain SVD by the published package, one call per layer so that each gets exactly its rank"
    model = task.model
    for name,k in ranks.items():
        r = min(task.model.get_submodule(name).weight.shape)
        model = peer.decompose(model, percent_removed=1 - (k + .5)/r, layers=[name])    # it keeps int((1 - p)*r)
        if (got := model.get_submodule(name)[0].out_features) != k: raise ValueError(f'{name}: rank {got} instead of {k}')
    return model

def diagonal(task, ranks):
    "ASVD with the root mean square of each input channel as scale, over all rows (Yuan et al., 2023)"
    scale = {}
    for s in task.sites:
        st = STATS[task.name][s.name]
        C = st.cov.diagonal() + st.mean.square() if s.out_features > s.in_features else rms2(task, s)
        scale[s.name] = C.clamp(min=1e-6*C.mean()).sqrt()
    new = {}
    for s in task.sites:
        d,W = scale[s.name],s.weight.double()
        A,B = factorize((W*d).float()).pair(ranks[s.name])
        new[s.module] = mk_pair((A.double()/d).float(), B, s.module.bias.detach().clone())
    return copy_with(task.model, new)

def rms2(task, site):
    "Mean square of each input channel"
    acc = dict(n=0, s=0.)
    def hook(m, args): x = args[0].flatten(0, -2).double(); acc['n'] += len(x); acc['s'] = acc['s'] + x.square().sum(0)
    h = site.module.register_forward_pre_hook(hook)
    try: [None for _ in run_batches(task.model, task.data)]
    finally: h.remove()
    return acc['s']/acc['n']

STATS = {}    # statistics of activations, and with sensitivities: they serve all shares

def methods(task, share, peer):
    "(method, model) one by one"
    ranks = task.uniform(share)
    yield ('plain SVD', peer_svd(task, ranks, peer)) if share in task.peer else ('plain SVD (this library)', FC_Decomposer(policy=ranks).decompose(task.model))
    yield 'diagonal', diagonal(task, ranks)
    yield 'calibrated', FC_Decomposer(policy=ranks).decompose(task.model, STATS[task.name], sensitivity=False)
    small = FC_Decomposer(policy=ParamBudget(share), exclude=task.exclude).decompose(task.model, STATS[task.name])
    yield 'sensitivity + budget', small
    learn = task.learner(copy_with(small))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(*task.distil, cbs=SelfDistillation(task.model))
    yield '… + distillation', learn.model

def measure(task, peer):
    "Rows of the table of one task"
    rows = [dict(share=1., method='dense', seconds=0., **task.score(task.model))]
    STATS[task.name] = calibrate(task.model, task.data, sensitivity='full')
    for share in task.shares:
        start = time.perf_counter()
        for method,model in methods(task, share, peer):
            rows.append(dict(share=share, method=method, seconds=time.perf_counter()-start, **task.score(model)))
            print(f'{task.name} {rows[-1]}', file=sys.stderr, flush=True)
            start = time.perf_counter()
    return rows

# ------------------------------------------------------------------ single claims

def prediction(task):
    "Largest relative difference of predicted and measured error of a layer on the calibration data"
    plan = FC_Decomposer(policy=task.uniform(.3)).plan(task.model, task.data)
    rows = compare_models(task.model, plan.apply(task.model), task.data, plan=plan, latency=False).layers
    return (rows.measured/rows.predicted - 1).abs().max()

def correlated(m=96, n=96, k=24, rows=20_000):
    "Excess of the error over the optimum on the population, for inputs in a low-dimensional subspace and noise"
    g = torch.Generator().manual_seed(SEED)
    mix,lin = torch.randn(12, n, generator=g, dtype=torch.float64),nn.Linear(n, m)
    C = mix.T @ mix + .01*torch.eye(n, dtype=torch.float64)
    x = (torch.randn(rows, 12, generator=g, dtype=torch.float64) @ mix + .1*torch.randn(rows, n, generator=g, dtype=torch.float64)).float()
    W = lin.weight.detach().double()
    def err(A, B): D = W - B.double() @ A.double(); return ((D @ C * D).sum()/(W @ C * W).sum()).sqrt().item()
    e = torch.linalg.eigvalsh(W @ C @ W.T).flip(0)
    best,ours = (e[k:].sum()/e.sum()).sqrt().item(),FC_Decomposer(policy=k).decompose(lin, x)
    plain = FC_Decomposer(policy=k).decompose(lin)
    return {f: err(p[0].weight.detach(), p[1].weight.detach())/best - 1 for f,p in (('calibrated', ours), ('plain SVD', plain))} | {'optimum': best}

def few_samples(task, share=.3):
    "Metric with few calibration samples"
    x,res = torch.cat(task.data),{}
    for n in (8, 32, 128, len(x)): res[n] = task.score(FC_Decomposer(policy=task.uniform(share)).decompose(task.model, x[:n], sensitivity=False))['metric']
    return res

def cost(task, repeats=5):
    "Time of calibration over that of the same forward passes, without and with sensitivity: medians of ratios taken in turn"
    data,ratios = task.data[:6],{None: [], 'full': []}
    def clock(f): t = time.perf_counter(); f(); return time.perf_counter() - t
    def forward(): [None for _ in run_batches(task.model, data)]
    for how in (*ratios, *ratios): calibrate(task.model, data, sensitivity=how)     # warm up
    for _ in range(repeats):
        base = clock(forward)
        for how,r in ratios.items(): r.append(clock(lambda: calibrate(task.model, data, sensitivity=how))/base)
    return [statistics.median(r) for r in ratios.values()]

# ------------------------------------------------------------------ report

def _table(head, rows): return ['| ' + ' | '.join(map(str, o)) + ' |' for o in (head, ['---'] + ['---:']*(len(head)-1), *rows)] + ['']

def checks(results, claims):
    "(met?, sentence) for every target"
    for name,(task,rows) in results.items():
        dense = rows[0]['metric']
        for share in task.shares:
            at = {r['method'].removesuffix(' (this library)'): r for r in rows if r['share'] == share}
            e = {k: v['error'] for k,v in at.items()}
            yield e['calibrated'] < min(e['plain SVD'], e['diagonal']), f'{name} {share:.0%}: error calibrated {e["calibrated"]:.4f}, diagonal {e["diagonal"]:.4f}, plain {e["plain SVD"]:.4f}'
            yield e['sensitivity + budget'] <= e['calibrated'], f'{name} {share:.0%}: error with sensitivity and budget {e["sensitivity + budget"]:.4f}, calibrated {e["calibrated"]:.4f}'
            if name == 'VGG16-bn' and share == .1:
                b = at['sensitivity + budget']
                yield b['metric'] >= dense - .01 and b['params'] <= .1*task.full, f'{name}: {b["metric"]:.1%} with {b["params"]/task.full:.1%} of the parameters and no training, dense {dense:.1%}'
    for name,c in claims['cost'].items():
        yield c[0] <= 2.5, f'{name}: calibration takes {c[0]:.2f} times its forward passes, at most 2.5'
        yield c[1] <= 6, f'{name}: with sensitivity {c[1]:.2f} times, at most 6'
    for name,d in claims['prediction'].items(): yield d <= 1e-4, f'{name}: predicted and measured errors of all layers agree to {d:.0e}, at most 1e-4'
    yield claims['correlated']['calibrated'] <= .01, f'correlated inputs: {claims["correlated"]["calibrated"]:.2%} above the optimum, at most 1 % (plain SVD: {claims["correlated"]["plain SVD"]:.0%})'
    for name,few in claims['few'].items():
        best,worst = few[max(few)],min(few.values()) if results[name][0].metric == 'accuracy' else max(few.values())
        yield abs(worst - best) <= .1*best, f'{name}: with 8 samples {few[8]:.3f}, with all {best:.3f}'

def report(results, claims, opts):
    try: cpu = next(l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))
    except (OSError, StopIteration): cpu = platform.processor() or platform.machine()
    out = ['# Quality against parameters', '', f'`python benchmarks/quality.py{opts}`', '',
           f'{cpu}, {os.cpu_count()} cores; {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, fasterai {fasterai.__version__} and '
           f'{PEER}, seed {SEED}. Errors are those of the output, relative to its deviation from the mean, on the validation set.', '']
    for name,(task,rows) in results.items():
        pct = '{:.1%}' if task.metric == 'accuracy' else '{:.3f}'
        out += [f'## {name}', '', f'{count_params(task.model):,} parameters, {task.full:,} in the weights that are decomposed.', '',
                *_table(['method', 'share', 'parameters', task.metric, 'output error'],
                        [(r['method'], f'{r["share"]:.0%}', f'{r["params"]:,}', pct.format(r['metric']), f'{r["error"]:.4f}') for r in rows])]
    few = claims['few']
    out += ['## Few calibration samples', '', 'Calibrated, 30 % of the parameters, the same share in each layer.', '',
            *[l for n,o in few.items() for l in _table([n, *[f'{k} samples' for k in o]], [(results[n][0].metric, *[f'{v:.3f}' for v in o.values()])])],
            '## Targets', '', *[f'- {"met" if ok else "**missed**"}: {s}' for ok,s in checks(results, claims)], '']
    return '\n'.join(out)

@call_parse
def main(
    quick: store_true, # the small vision transformer only, trained briefly
    cache: str = '',   # folder that keeps the trained networks and the published package; a temporary one by default
    out: str = '',     # Markdown file to write
):
    "Measure accuracy against parameters for several ways to choose the factors; exit code 1 where a target is missed"
    warnings.simplefilter('ignore')
    with tempfile.TemporaryDirectory() as tmp:
        cache = Path(cache or tmp)
        cache.mkdir(exist_ok=True)
        peer,results,claims = load_peer(cache),{},dict(cost={}, prediction={}, few={})
        for task in tasks(quick):
            task.prepare(cache)
            claims['cost'][task.name] = cost(task)
            results[task.name] = task,measure(task, peer)
            claims['prediction'][task.name] = prediction(task)
            if task.name != 'VGG16-bn': claims['few'][task.name] = few_samples(task)
        claims['correlated'] = correlated()
        text = report(results, claims, ' --quick' if quick else '')
        print(text)
        if out: Path(out).write_text(text, encoding='utf-8')
        sys.exit(not all(ok for ok,_ in checks(results, claims)))
