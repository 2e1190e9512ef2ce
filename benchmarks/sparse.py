"""Zeros without training: magnitude, Wanda, SparseGPT, and this library's Sparsifier, by default and with ADMM; files, and products.

The baselines are written here, after the papers. They get the same second moments, centred, and the same shift of biases as the library.
README.md beside this file says how to run it and what each column means.
"""
import platform, re, sys, tempfile, time, warnings
from copy import deepcopy
from pathlib import Path
import torch
from fastcore.script import call_parse
from torch import nn
import fasterai
from fasterai.core.latency import _latencies
from fasterai.core.matrices import as_weight, weights_of
from fasterai.sparse.find import find_sparse
from fasterai.sparse.resolve import sparse_moments
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.storage import save_sparse
sys.path.insert(0, str(Path(__file__).resolve().parent))
from prune import CASES as _PRUNED, _minilm, _on_digits, _vgg

def _fewer(make, step):
    def f(cache):
        case = make(cache)
        case.test,case.labels = case.test[::step],None if case.labels is None else torch.cat([*case.labels.split(128)][::step])
        case.__post_init__()
        return case
    return f

CASES = dict(minilm=_fewer(_minilm, 2), lowrank=_fewer(_minilm, 2), vgg=_fewer(_on_digits('VGG16-bn', _vgg, 32), 1), vit=_PRUNED['ViT'])
SETTINGS = '0.5','0.7','2:4'
FLOORS = {('minilm', '0.5', 'default'): .953, ('minilm', '0.5', 'admm'): .964, ('minilm', '0.7', 'default'): .84, ('minilm', '0.7', 'admm'): .87,
          ('minilm', '2:4', 'default'): .925}
FILES = {.5: .54, .9: .14}

def _log(*s): print(*s, file=sys.stderr, flush=True)

# Baselines

class Layer:
    "Weight (B, m, n), and centred moments of its inputs as they were counted"
    def __init__(self, s, o):
        self.s,self.W,B = s,weights_of(s).float(),getattr(s, 'groups', 1)
        self.bias = getattr(s.module, 'bias', None) is not None
        C = [c if self.bias else c + torch.outer(m, m) for c,m in zip(o.blocks, o.mean.split(o.sizes))]
        k = len(C)//B
        self.S = [torch.stack(C[j::k]).float() for j in range(k)]
        self.mean = o.mean.view(B, -1)
    @property
    def second(self): return torch.cat([c.diagonal(dim1=1, dim2=2) for c in self.S], 1)     # (B, n)

def _smallest(x, share, setting):
    "True for what goes: of each four the smallest two, else the smallest share of the last dimension"
    if setting == '2:4': return torch.zeros_like(x, dtype=torch.bool).unflatten(-1, (-1, 4)).scatter(-1, x.unflatten(-1, (-1, 4)).topk(2, -1, False).indices, True).flatten(-2)
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(int(share*x.shape[-1]), -1, False).indices, True)

def magnitude(o, setting):
    "The smallest weights of each layer"
    x = o.W.abs()
    gone = _smallest(x, 0, setting) if setting == '2:4' else _smallest(x.flatten()[None], float(setting), setting).view_as(x)
    return o.W.masked_fill(gone, 0.)

def wanda(o, setting):
    "Sun et al., 2023: the smallest |W|·‖x‖ of each row"
    x = o.W.abs()*o.second.sqrt()[:, None]
    return o.W.masked_fill(_smallest(x, 0 if setting == '2:4' else float(setting), setting), 0.)

def sparsegpt(o, setting, block=128, damp=.01):
    "Frantar & Alistarh, 2023: columns in order, the error of each moved onto those to come; masks for 128 columns at a time"
    W,at = o.W.clone(),0
    for C in o.S:
        n = C.shape[-1]
        C = C + damp*torch.diag_embed(C.diagonal(dim1=1, dim2=2).mean(-1, True).clamp_min(1e-12).expand(-1, n))
        U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(C.double())), upper=True).float()
        for i in range(0, n, block): _block(W[..., at:at+n], U, i, min(i + block, n), setting)
        at += n
    return W

def _block(W, U, i, j, setting):
    d,lost = U.diagonal(dim1=1, dim2=2)[:, None, i:j],torch.zeros_like(W[..., i:j])
    if setting != '2:4':
        x = (W[..., i:j]/d).square()
        gone = _smallest(x.flatten()[None], float(setting), setting).view_as(x)
    else: gone = torch.zeros_like(W[..., i:j], dtype=torch.bool)
    for k in range(i, j):
        if setting == '2:4' and k % 4 == 0: gone[..., k-i:k-i+4] = _smallest((W[..., k:k+4]/d[..., k-i:k-i+4]).square(), 0, setting)
        new = W[..., k].masked_fill(gone[..., k-i], 0.)
        e = (W[..., k] - new)/U[:, k, k, None]
        W[..., k:j] -= e[..., None]*U[:, None, k, k:j]
        W[..., k],lost[..., k-i] = new,e
    W[..., j:] -= lost @ U[:, i:j, j:]

@torch.no_grad()
def _with(model, layers, new):
    "`model` with other weights, the mean of the change in the biases"
    res = deepcopy(model)
    mods = dict(res.named_modules())
    for n,o in layers.items():
        mods[n].weight.copy_(as_weight(o.s, new[n]))
        if o.bias: mods[n].bias += ((o.W - new[n]).double() @ o.mean[..., None]).flatten()
    return res

# Sparse and low rank together

def _low_rank(W, C, share):
    "The best part of W (m, n) whose factors have `share` of its numbers, for inputs with moments C"
    (m,n) = W.shape
    e,Q = torch.linalg.eigh(C.double() + 1e-6*C.diagonal().mean().double()*torch.eye(n))
    R = Q*e.clamp_min(0).sqrt()
    A = W.double() @ R
    V = torch.linalg.eigh(A @ A.T if m <= n else A.T @ A)[1][:, -max(1, int(share*m*n/(m + n))):]
    L = V @ (V.T @ W.double()) if m <= n else (A @ V) @ torch.linalg.lstsq(R.T, V).solution.T
    return L.float()

@torch.no_grad()
def sparse_and_low_rank(case, layers, stats, kept, low=.3, rounds=2):
    "`low` of the kept numbers in two factors, the others in a sparse part that is solved for what these leave"
    L,names = {n: _low_rank(o.W[0], o.S[0][0], low*kept) for n,o in layers.items()},list(layers)
    for i in range(rounds):
        rest = deepcopy(case.model)
        for n in names: rest.get_submodule(n).weight.copy_(as_weight(layers[n].s, layers[n].W - L[n][None]))
        plan = Sparsifier(1 - (1-low)*kept, layers=names).plan(rest, stats)
        found = {s.name: weights_of(s).clone() for s in find_sparse(plan.apply(rest)) if s.name in layers}
        if i < rounds-1: L = {n: _low_rank((o.W - found[n])[0], o.S[0][0], low*kept) for n,o in layers.items()}
    return _with(case.model, layers, {n: found[n] + L[n][None] for n in names})

# The run

def _share(model, names): return sum(int((model.get_submodule(n).weight == 0).sum()) for n in names)/sum(model.get_submodule(n).weight.numel() for n in names)

def compare(name, case, settings):
    "Setting -> rows: method, zeros, metric, error, CPU seconds"
    sites = [s for s in find_sparse(case.model) if not s.reason and case.only in s.name]
    t = time.process_time()
    stats = sparse_moments(case.model, case.data, sites)
    _log(f'{case.name}: moments of {len(sites)} layers in {time.process_time()-t:.0f} s CPU')
    for setting in settings:
        can = [s for s in sites if setting != '2:4' or s.module.weight.shape[1] % 4 == 0]
        layers = {s.name: Layer(s, stats[s.name]) for s in can}
        rows = [('dense', 0., *case.judge(case.model), 0.)]
        def note(method, make):
            t = time.process_time()
            m = make()
            rows.append((method, _share(m, layers), *case.judge(m), time.process_time() - t))
            _log(f'{case.name}, {setting}, {method}: zeros {rows[-1][1]:.3f}, {case.metric} {rows[-1][2]:.4f}, error {rows[-1][3]:.4f}, {rows[-1][4]:.0f} s CPU')
        for f in () if name == 'lowrank' else (magnitude, wanda, sparsegpt):
            note({'wanda': 'Wanda', 'sparsegpt': 'SparseGPT'}.get(f.__name__, f.__name__), lambda: _with(case.model, layers, {n: f(o, setting) for n,o in layers.items()}))
        own = dict(pattern='2:4') if setting == '2:4' else dict(sparsity=float(setting))
        other = 'cg' if setting == '2:4' else 'admm'       # of two of four, ADMM is the default
        for how in ('default',) if name == 'lowrank' else ('default', other):
            kw = own | ({} if how == 'default' else dict(update=how))
            note(f'Sparsifier, {how}', lambda: Sparsifier(layers=[*layers], **kw).plan(case.model, stats).apply(case.model))
        for low in (.3, .6) if name == 'lowrank' else ():
            note(f'low rank ({low:.0%} of the numbers) + sparse', lambda: sparse_and_low_rank(case, layers, stats, 1 - float(setting), low))
        yield setting, rows

def _table(case, setting, rows, more=''):
    what = dict(accuracy='accuracy', agreement='agreement with dense', cosine='cosine to dense')[case.metric]
    def shown(v): return f'{v:.4f}' if case.metric == 'cosine' else f'{v:.1%}'
    lines = [f'| {m} | {z:.1%} | {shown(v)} | {e:.4f} | {t:.0f} |' for m,z,v,e,t in rows]
    head = setting if setting == '2:4' else f'{float(setting):.0%} zeros'
    return f'## {case.name}, {head}{more}', [f'| method | zeros | {what} | error of the output | s CPU |', '|---|---:|---:|---:|---:|', *lines]

def files(cache):
    "Bytes of save_sparse relative to the same file of the dense model"
    case = _minilm(cache, 64)
    net,rows = case.model.encoder,[]
    with tempfile.TemporaryDirectory() as d, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for dt in (torch.float32, torch.float16):
            dense = save_sparse(net.to(dt), f'{d}/dense.{dt}').stat().st_size
            for share in (.5, .7, .9):
                m = Sparsifier(share, score='magnitude', update='none').sparsify(net, inplace=False)
                rows.append((str(dt)[6:], share, save_sparse(m, f'{d}/{share}.{dt}').stat().st_size/dense))
    return rows

def products(sizes=(768, 2048), shares=(.5, .7, .8, .9, .95), batch=32, seconds=.2):
    "Time of sparse products relative to the dense one: CSR times inputs, F.linear with CSR, and a dense layer with that share of rows"
    for n in sizes:
        g = torch.Generator().manual_seed(0)
        W,x = torch.randn(n, n, generator=g),torch.randn(batch, n, generator=g)
        xT,calls = x.T.contiguous(),[lambda: x @ W.T]
        for share in shares:
            c,P = torch.where(torch.rand(n, n, generator=g) > share, W, 0.).to_sparse_csr(),W[:max(1, round(n*(1-share)))].clone()
            calls += [lambda c=c: c @ xT, lambda c=c: nn.functional.linear(x, c), lambda P=P: x @ P.T]
        first,*rest = _latencies(calls, seconds)
        for i,share in enumerate(shares): yield n, share, first, *[t/first for t in rest[3*i:3*i+3]]

def semi_structured(n=4096, batch=1024):
    "2:4 on CUDA relative to dense, both in float16; None without CUDA"
    if not torch.cuda.is_available(): return None
    from torch.sparse import to_sparse_semi_structured
    W = torch.randn(n, n, device='cuda', dtype=torch.float16)*torch.tensor([0, 0, 1, 1], device='cuda').half().repeat(n//4)
    x,S = torch.randn(batch, n, device='cuda', dtype=torch.float16),to_sparse_semi_structured(W)
    def done(f): f(); torch.cuda.synchronize()
    a,b = _latencies([lambda: done(lambda: nn.functional.linear(x, W)), lambda: done(lambda: nn.functional.linear(x, S))], .5)
    return b/a

def _merged(old, title, lines):
    "The page with this section in place of the one of that title"
    parts = re.split(r'^(?=## )', old, flags=re.M)
    new = '\n'.join([title, '', *lines, '', ''])
    at = next((i for i,p in enumerate(parts) if p.startswith(title + '\n')), None)
    if at is None: return old.rstrip('\n') + '\n\n' + new
    parts[at] = new
    return ''.join(parts)

@call_parse
def main(
    only:str='minilm,lowrank,vgg,vit,files,products',   # sections, separated by commas
    settings:str='0.5,0.7,2:4',                 # shares of zeros, and patterns
    out:str='',                                 # Markdown file; sections that are in it already are replaced, others stay
    cache:str='',                               # folder of the trained networks; a temporary one by default
    threads:int=1,                              # threads of torch
):
    "Make networks sparse without training, compare, and write tables; exit code 1 where a target is missed"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(threads)
    where = (f'{platform.processor() or platform.machine()}, {threads} thread(s), Python {platform.python_version()}, torch {torch.__version__}, '
             f'fasterai {fasterai.__version__}. Nothing is trained.')
    page,missed = f'# Zeros without training\n\n{where}\n',[]
    if out and Path(out).exists(): page = Path(out).read_text(encoding='utf-8')
    def add(title, lines):
        nonlocal page
        page = _merged(page, title, lines)
        if out: Path(out).write_text(page, encoding='utf-8')
        else: print('\n'.join([title, '', *lines, '']))
    def target(ok, text):
        if not ok: missed.append(text)
        return f'- {"met" if ok else "**missed**"}: {text}'
    with tempfile.TemporaryDirectory() as tmp:
        for name in only.split(','):
            if name in CASES:
                case = CASES[name](cache or tmp)
                for setting,rows in compare(name, case, ['0.5'] if name == 'lowrank' else settings.split(',')):
                    title,lines = _table(case, setting, rows, ': beside a low-rank part' if name == 'lowrank' else '')
                    by = {m: v for m,_,v,*_ in rows}
                    checks = [target(by[f'Sparsifier, {h}'] >= f, f'{h} {by[f"Sparsifier, {h}"]:.4f}, at least {f}')
                              for (c,s,h),f in FLOORS.items() if (c, s) == (name, setting) and f'Sparsifier, {h}' in by]
                    err = {m: e for m,_,_,e,_ in rows}
                    checks += [target(err['Sparsifier, default'] < err[b], f'error of the output {err["Sparsifier, default"]:.4f} by default, {err[b]:.4f} with {b}')
                               for b in ('magnitude', 'Wanda', 'SparseGPT') if b in err]
                    add(title, [*lines, '', *checks])
            elif name == 'files':
                rows = files(cache or tmp)
                checks = [target(r <= FILES[s], f'{r:.3f} of the dense file at {s:.0%} zeros, at most {FILES[s]}') for dt,s,r in rows if dt == 'float32' and s in FILES]
                add('## Files, encoder of MiniLM', ['| dtype | zeros | file, of dense |', '|---|---:|---:|', *[f'| {dt} | {s:.0%} | {r:.3f} |' for dt,s,r in rows], '', *checks])
            elif name == 'products':
                lines = [f'| {n} | {s:.0%} | {ms:.2f} | {a:.2f} | {b:.2f} | {c:.2f} |' for n,s,ms,a,b,c in products()]
                gpu = semi_structured()
                add('## Products, batch 32, times relative to the dense product',
                    ['| n × n | zeros | dense, ms | CSR · x | F.linear with CSR | dense layer with that share of rows |', '|---:|---:|---:|---:|---:|---:|', *lines, '',
                     '2:4 needs CUDA: not measured on this machine.' if gpu is None else f'2:4 on CUDA, 4096 × 4096, batch 1024, float16: {gpu:.2f} of the dense time.'])
    sys.exit(len(missed) > 0)
