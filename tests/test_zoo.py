"Every model of `zoo.py` is decomposed; the dense model, run beside the result, is the oracle"
import random, warnings
from fnmatch import fnmatch
import numpy as np, pytest, torch
from fasterai.core.modules import LowRankHead, LowRankLinear, count_params
from fasterai.misc.fc_decomposer import FC_Decomposer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D
from zoo import REAL, ZOO, encoder

RTOL = 1e-4  # float32, full rank

# --- What the tests know about models, without asking the library
def is_fc(m): return type(m) in (nn.Linear, NonDynamicallyQuantizableLinear, Conv1D)  # a subclass may compute anything
def sizes(m): return (m.weight.shape[1], m.weight.shape[0]) if isinstance(m, Conv1D) else tuple(m.weight.shape)  # (m, n)

def fc_layers(model):
    "Layers whose weight nothing else holds: name -> module"
    holders = [p.data_ptr() for m in model.modules() for p in m._parameters.values() if p is not None]
    return {n: m for n,m in model.named_modules() if is_fc(m) and holders.count(m.weight.data_ptr()) == 1}

def wake(model):
    "Draw weights anew at a scale where every layer matters: heads start at zero, layer scales at 1e-6, most matrices at 0.02"
    with torch.no_grad():
        for m in model.modules():
            if is_fc(m): m.weight.normal_(std=sizes(m)[1]**-0.5)
            elif isinstance(m, nn.modules.batchnorm._BatchNorm): m.momentum = 0.9  # one step is all the training there will be
        for p in model.parameters():
            if p.abs().max() < 0.01: p.normal_(std=0.3)

def tensors(o):
    "Floating-point tensors of a model's output"
    if torch.is_tensor(o): return [o] if o.is_floating_point() else []
    if isinstance(o, dict): o = o.values()
    return [t for c in o for t in tensors(c)] if isinstance(o, (tuple, list, type({}.values()))) else []

def run(model, x, train=False):
    "Output tensors; random masks are the same at every call, and recurrent models start from an empty state"
    torch.manual_seed(1)
    model.train(train)
    if hasattr(model, 'reset'): model.reset()
    return tensors(model(**x) if isinstance(x, dict) else model(*x))

def dense_run(model, x):
    with torch.no_grad(): return run(model, x)

def backward(model, x):
    model.zero_grad()
    out = run(model, x, train=True)
    torch.manual_seed(2)
    sum((t*torch.randn_like(t)).sum() for t in out if t.requires_grad).backward()
    return out

def rel(a, b): return max(((s-t).norm()/s.norm()).item() for s,t in zip(a, b, strict=True))

def state(model):
    "All a caller could find changed: values, flags, hooks, gradients, down to the count of in-place writes"
    _,keys,*rest = np.random.get_state()
    res = {'random': random.getstate(), 'numpy': (keys.tolist(), rest), 'torch': torch.get_rng_state()}
    for n,m in model.named_modules(remove_duplicate=False):
        res[n,'module'] = type(m), m.training, id(m)
        for k,v in vars(m).items():
            if k.endswith('hooks'): res[n,k] = list(v.items())
            elif torch.is_tensor(v): res[n,k] = id(v), v._version, v.detach().clone()
        for k,t in [*m._parameters.items(), *m._buffers.items()]:
            if t is None: continue
            res[n,k] = id(t), t._version, t.requires_grad, t.detach().clone()
            if t.grad is not None: res[n,k,'grad'] = id(t.grad), t.grad._version, t.grad.clone()
    return res

def same(a, b):
    if torch.is_tensor(a): return a.dtype == b.dtype and torch.equal(a, b)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (tuple, list)) else a == b

def ties(model):
    "Names that stand for one parameter, by groups"
    groups = {}
    for n,p in model.named_parameters(remove_duplicate=False): groups.setdefault(id(p), []).append(n)
    return sorted(g for g in groups.values() if len(g) > 1)

# --- One decomposition at full rank and one at half, shared by the tests below
class Run:
    def __init__(self, case):
        torch.manual_seed(0)
        self.case = case
        self.model,self.x = case.make()
        wake(self.model)
        if case.used: backward(self.model, self.x)  # leaves gradients and statistics behind, as training does
        self.model.eval()
        next(self.model.children()).train()         # a mix of training flags
        before = state(self.model)
        with warnings.catch_warnings(record=True) as self.warned_full:
            warnings.simplefilter('always')
            self.full = FC_Decomposer(1.0).decompose(self.model)
        with warnings.catch_warnings(record=True) as self.warned:
            warnings.simplefilter('always')
            self.plan = FC_Decomposer(0.5).plan(self.model)
            self.small = self.plan.apply(self.model)
        after = state(self.model)
        self.changed = [k for k in before.keys() | after.keys() if not same(before.get(k, ()), after.get(k, ()))]
        self.flags = {n: m.training for n,m in self.model.named_modules()}
        self.small_flags = {n: m.training for n,m in self.small.named_modules()}
        self.names = [o.name for o in self.plan.replaced]
        self.layers = {n: m for n,m in fc_layers(self.model).items() if n not in case.skipped}

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "These models are too small to gain from a second one"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module', params=ZOO)
def r(request): return Run(ZOO[request.param])

def test_full_rank_is_the_dense_model(r):
    y = dense_run(r.model, r.x)
    assert y and all(t.norm() > 0 and t.isfinite().all() for t in y)
    assert rel(y, dense_run(r.full, r.x)) <= RTOL
    for n in r.names:  # could this have failed? yes: the output hangs on every replaced layer
        w = r.model.get_submodule(n).weight.data
        kept = w.clone()
        w.zero_()
        effect = rel(y, dense_run(r.model, r.x))
        w.copy_(kept)
        assert not effect <= 10*RTOL, n  # NaN is an effect too: CLIP divides by the norm of its embeddings

def test_warns_of_growth_only(r):
    "A pair of full rank is larger than its layer, one of half rank is not; a model left as it is gets a word too"
    says = [str(w.message) for w in r.warned_full]
    if r.names: assert len(says) == 1 and f'{len(r.names)} of {len(r.names)} layers grew' in says[0]
    else: assert len(says) == 1 and says[0].startswith('nothing to decompose')
    half = [str(w.message) for w in r.warned if ' to save ' not in str(w.message)]     # thin heads, which have a test of their own
    assert half == ([] if r.names else says)

def test_trains(r):
    "A gradient arrives in every factor where it did in the dense layer, and nowhere else"
    for m in r.model,r.small:
        if not any(p.requires_grad for p in m.parameters()): continue
        assert all(t.isfinite().all() for t in backward(m, r.x))
    new = dict(r.small.named_parameters(remove_duplicate=False))
    for n,p in r.model.named_parameters(remove_duplicate=False):
        layer,_,leaf = n.rpartition('.')
        if layer not in r.names: twins = [n]
        else: twins = [f'{layer}.0.weight', f'{layer}.1.weight'] if leaf == 'weight' else [f'{layer}.1.bias']
        for q in (new.pop(o) for o in twins):
            assert q.requires_grad == p.requires_grad and (q.grad is None) == (p.grad is None), n
            if p.grad is not None and layer in r.names and leaf == 'weight': assert bool(q.grad.any()) == bool(p.grad.any()), n
            assert q.grad is None or q.grad.isfinite().all()
    assert not new

def test_parameters_are_counted(r):
    n = sum({id(p): p.numel() for p in r.model.parameters()}.values())
    for fc in r.layers.values():
        a,b = sizes(fc)
        n += max(1, min(a, b)//2)*(a + b) - a*b
    assert r.plan.params_after == count_params(r.small) == n

def test_input_is_untouched(r):
    assert not r.changed
    mine = {t.untyped_storage().data_ptr() for t in r.model.state_dict().values() if t.numel()}
    theirs = {t.untyped_storage().data_ptr() for t in r.small.state_dict().values() if t.numel()}
    assert not mine & theirs
    kept = r.flags.keys() & r.small_flags.keys()
    assert set(r.names) <= kept and all(r.flags[n] == r.small_flags[n] for n in kept)

def test_plan_lists_every_layer(r):
    assert r.names == list(r.layers) and len(r.names) == r.case.pairs
    assert {o.name: o.reason for o in r.plan.skipped} == r.case.skipped

def test_pairs_are_plain_unless_read(r):
    "A pair offers `.weight` where the forward pass of a plain one would fail, and only there"
    for n in r.names:
        read = any(fnmatch(n, p) for p in r.case.reads.split())
        pair = r.small.get_submodule(n)
        head = hasattr(r.model, 'get_output_embeddings') and r.model.get_output_embeddings() is r.model.get_submodule(n)
        assert type(pair) is (LowRankHead if head else LowRankLinear if read else nn.Sequential), n   # a head is read by who resizes it
        assert [type(o) for o in pair] == [nn.Linear]*2 and pair[0].bias is None
        if not read: continue
        r.small.set_submodule(n, nn.Sequential(*pair))
        with pytest.raises(AttributeError, match='weight|bias'):
            for train in False,True:
                with torch.set_grad_enabled(train): run(r.small, r.x, train)
        r.small.set_submodule(n, pair)

def test_ties_stay(r):
    assert ties(r.small) == ties(r.model)
    shared = sum(ties(r.small), [])
    assert all(f'{n}.weight' in shared for n,why in r.case.skipped.items() if why.startswith('tied'))

def test_loads_into_skeleton(r):
    again = r.plan.skeleton(r.model)
    again.load_state_dict(r.small.state_dict())
    assert all(map(torch.equal, dense_run(r.small, r.x), dense_run(again, r.x)))

@pytest.mark.filterwarnings('ignore:nothing to decompose')
def test_second_time_finds_nothing(r):
    assert not FC_Decomposer(0.5).plan(r.small).replaced

# --- What takes more than one call of the model
@pytest.mark.filterwarnings('ignore:.*layers grew')
@pytest.mark.parametrize('name', ['hf-llama', 'hf-gpt2', 'hf-t5_relu'])
def test_generate(name):
    torch.manual_seed(0)
    model,x = ZOO[name].make()
    wake(model)
    def gen(m): return m.eval().generate(input_ids=x['input_ids'], max_new_tokens=6, do_sample=False)
    tokens = gen(model)
    assert torch.equal(gen(FC_Decomposer(1.0).decompose(model)), tokens)
    assert len(gen(FC_Decomposer(0.5).decompose(model))) == 2

@pytest.mark.filterwarnings('ignore:.*layers grew', 'ignore:.*nested tensors')
@pytest.mark.parametrize('masked', [False, True])
def test_encoder_fast_path(masked, monkeypatch):
    "In eval nn.TransformerEncoder hands all weights of a layer to one kernel; with padding it packs the batch first"
    torch.manual_seed(0)
    model = encoder().eval()
    wake(model)
    calls,kernel = [],torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, '_transformer_encoder_layer_fwd', lambda *a: calls.append(1) or kernel(*a))
    x,pad = torch.randn(2, 5, 32),torch.tensor([[False]*5, [False]*3 + [True]*2]) if masked else None
    small = FC_Decomposer(1.0).decompose(model)
    with torch.no_grad(): y,z = (m(x, src_key_padding_mask=pad) for m in (model, small))
    assert len(calls) == 4
    assert rel([y], [z]) <= RTOL

@pytest.mark.parametrize('name', REAL)
def test_real_size(name):
    "A pair that is looked into without offering `.weight` would raise here; nothing is computed"
    make,n = REAL[name]
    with torch.device('meta'): model = make().eval()
    plan = FC_Decomposer(0.5).plan(model)
    small = plan.apply(model)
    assert len(plan.replaced) == n and count_params(small) == plan.params_after
    size = getattr(model, 'default_cfg', {}).get('input_size', (3, 224, 224))
    x = torch.ones(2, 8, dtype=torch.long) if hasattr(model, 'config') else torch.ones(2, *size)
    with torch.no_grad(): y,z = (tensors(m(x.to('meta')))[0] for m in (model, small))
    assert z.shape == y.shape and z.is_meta
