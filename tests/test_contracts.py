"The promises of the library, one by one, each against something it did not compute itself"
import copy, json, warnings
from functools import partial
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from fasterai.misc.all import *
from fasterai.lowrank import factorize as factorize_module

pytestmark = pytest.mark.filterwarnings('ignore:.*(layers grew|singular v):UserWarning')

# ------------------------------------------------------------------ helpers

def mlp(dtype=None, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 24, bias, dtype=dtype), nn.ReLU(), nn.Linear(24, 16, bias, dtype=dtype), nn.ReLU(),
                         nn.Linear(16, 4, bias, dtype=dtype))

def linears(m): return [o for o in m.modules() if type(o) is nn.Linear]

def product(pair): return pair[1].weight.double() @ pair[0].weight.double()

def best(W, k):
    "Truncated SVD by the reference, in float64"
    U,S,Vh = torch.linalg.svd(W.detach().double(), full_matrices=False)
    return U[:,:k] * S[:k] @ Vh[:k]

def lost(pair, W, k):
    "How much larger the error of the pair is than the least possible one, as a share of it"
    W,least = W.detach().double(),torch.linalg.svdvals(W.detach().double())[k:].norm()
    return (torch.norm(W - product(pair))/least - 1).item()

def rel(a, b): return (torch.norm(a.double() - b.double()) / torch.norm(b.double())).item()

def quiet(f, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kw)

def full(m, **kw):
    "Decomposed at full rank: must compute what `m` computes"
    return quiet(FC_Decomposer(1.0, **kw).decompose, m)

def snapshot(m):
    "Everything about a model that an observer could see"
    hooks = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks')
    return ([(n, type(o), o.training, *(len(getattr(o, h)) for h in hooks)) for n,o in m.named_modules()],
            [(n, p.data_ptr(), p.requires_grad, p._version, p.detach().clone(), None if p.grad is None else p.grad.clone())
             for n,p in m.named_parameters()],
            [(n, b.data_ptr(), b._version, b.detach().clone()) for n,b in m.named_buffers()])

def same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

def storages(m): return {t.untyped_storage().data_ptr() for t in [*m.parameters(), *m.buffers()] if t.numel()}

class Recorder(nn.Module):
    "A layer whose hook is a method of the model"
    def __init__(self):
        super().__init__()
        self.fc,self.calls = nn.Linear(8, 8),0
        self.fc.register_forward_hook(self.record)
    def record(self, m, inp, out): self.calls += 1
    def forward(self, x): return self.fc(x)

class Shared(nn.Module):
    "One instance under two names, and in a plain list"
    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(8, 8)
        self.all = [self.a]
    def forward(self, x): return self.b(self.a(x))

class Tied(nn.Module):
    "A language model's head that is its embedding"
    def __init__(self):
        super().__init__()
        self.emb,self.fc,self.head = nn.Embedding(20, 8),nn.Linear(8, 8),nn.Linear(8, 20, bias=False)
        self.head.weight = self.emb.weight
    def forward(self, x): return self.head(self.fc(self.emb(x)))

# ------------------------------------------------------------------ the reference numbers

def test_vgg16_bn_numbers():
    from torchvision.models import vgg16_bn
    with torch.device('meta'): vgg = vgg16_bn(num_classes=2)
    assert sum(p.numel() for p in vgg.parameters()) == 134_277_186
    plan = FC_Decomposer(rank_ratio=0.5).plan(vgg)
    assert [(o.name, o.rank) for o in plan.replaced] == [('classifier.0', 2048), ('classifier.3', 2048), ('classifier.6', 1)]
    assert plan.params_after == 91_281_476
    for small in (plan.skeleton(vgg), plan.apply(vgg)):
        assert sum(p.numel() for p in small.parameters()) == 91_281_476
        for i,(n,k,m) in {0: (25088, 2048, 4096), 3: (4096, 2048, 4096), 6: (4096, 1, 2)}.items():
            pair = small.classifier[i]
            assert type(pair) is nn.Sequential and [type(o) for o in pair] == [nn.Linear, nn.Linear]
            assert [tuple(p.shape) for p in pair.parameters()] == [(k, n), (m, k), (m,)]
    assert {n for n,_ in small.named_parameters() if 'classifier' not in n} == {
        n for n,_ in vgg.named_parameters() if 'classifier' not in n}

def test_front_door_defaults():
    assert repr(FC_Decomposer()) == repr(FC_Decomposer(0.5)) == repr(FC_Decomposer(rank_ratio=0.5))
    assert [o.rank for o in FC_Decomposer().plan(mlp()).layers] == [12, 8, 2]

@pytest.mark.parametrize('ratio,size,rank', [(.2, 10, 2), (.1, 10, 1), (.05, 10, 1), (.29, 100, 29), (.57, 100, 57), (1-.8, 10, 2),
                                             (1-.9, 1000, 100), (.5, 7, 3), (1, 10, 10), (.7, 10, 7), (.999, 10, 9), (.0001, 4096, 1)])
def test_rank_rounding(ratio, size, rank):
    assert quiet(FC_Decomposer(ratio).plan, nn.Linear(size, size, device='meta'))[''].rank == rank

# ------------------------------------------------------------------ 1 the given model is never modified

@pytest.mark.parametrize('act', [lambda m: FC_Decomposer(.25).decompose(m), lambda m: FC_Decomposer(.25).plan(m),
    lambda m: FC_Decomposer(.25).plan(m).apply(m), lambda m: FC_Decomposer(.25).plan(m).skeleton(m), to_dense],
    ids=['decompose', 'plan', 'apply', 'skeleton', 'to_dense'])
@pytest.mark.parametrize('train', [True, False])
def test_model_is_left_as_it_was(act, train):
    m = nn.Sequential(mlp(), nn.BatchNorm1d(4), quiet(FC_Decomposer(.25).decompose, nn.Linear(4, 8))).train(train)
    m(torch.randn(5, 32)).sum().backward()
    m[0][0].weight.requires_grad_(False)
    m[0][2].register_forward_hook(lambda *a: None)
    before,rng = snapshot(m),torch.get_rng_state()
    quiet(act, m)
    assert same(before, snapshot(m)) and torch.equal(rng, torch.get_rng_state())

@pytest.mark.parametrize('seed', [0, 1])
def test_random_state_is_not_used(seed):
    m = mlp()
    torch.manual_seed(seed)
    a,rng = FC_Decomposer(.25).decompose(m),torch.get_rng_state()
    torch.manual_seed(seed)
    assert torch.equal(rng, torch.get_rng_state())
    torch.manual_seed(seed+1)
    assert all(map(torch.equal, a.parameters(), FC_Decomposer(.25).decompose(m).parameters()))

@pytest.mark.parametrize('act', ['decompose', 'plan', 'apply'])
def test_model_is_left_as_it_was_by_an_error(act):
    m = mlp()
    plan = FC_Decomposer(.25).plan(m)
    m[4].weight.data[1,2] = float('nan')   # the last layer: everything before it has been looked at
    before,rng = snapshot(m),torch.get_rng_state()
    with pytest.raises(ValueError, match="weight of '4'"):
        plan.apply(m) if act == 'apply' else getattr(FC_Decomposer(.25), act)(m)
    after = snapshot(m)
    m[4].weight.data[1,2] = before[1][4][4][1,2] = after[1][4][4][1,2] = 0  # NaN is not equal to itself
    assert same(before, after) and torch.equal(rng, torch.get_rng_state())

def test_model_is_left_as_it_was_by_an_error_in_the_solver(monkeypatch):
    m,calls,svd = mlp(),[],torch.linalg.svd
    def second_time_fails(*args, **kw):
        calls.append(1)
        if len(calls) == 2: raise MemoryError('out of memory')
        return svd(*args, **kw)
    before = snapshot(m)
    monkeypatch.setattr(torch.linalg, 'svd', second_time_fails)
    with pytest.raises(MemoryError): FC_Decomposer(.25).decompose(m)
    assert same(before, snapshot(m))

def test_nothing_is_shared_with_the_result():
    m = nn.Sequential(mlp(), nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1), Tied())
    m[0][2].weight.requires_grad_(False)
    for small in (FC_Decomposer(.25, exclude='0.4').decompose(m), FC_Decomposer(.25).plan(m).skeleton(m)):
        assert not storages(m) & storages(small)
        with torch.no_grad():
            before = copy.deepcopy(m.state_dict())
            for p in small.parameters(): p.add_(1)
        assert all(torch.equal(before[k], v) for k,v in m.state_dict().items())

def test_training_the_result_leaves_the_model_alone():
    m = mlp()
    before,small = snapshot(m),FC_Decomposer(.25).decompose(m)
    opt = torch.optim.AdamW(small.parameters(), 0.1)
    small(torch.randn(3, 32)).square().mean().backward()
    opt.step()
    assert same(before, snapshot(m)) and all(p.grad is not None for p in small.parameters())

def test_a_method_hook_belongs_to_the_copy():
    m = Recorder()
    small = FC_Decomposer(.25).decompose(m)
    small(torch.randn(2, 8))
    assert (m.calls, small.calls) == (0, 1)
    small = to_dense(small)
    small(torch.randn(2, 8))
    assert (m.calls, small.calls) == (0, 2)

# ------------------------------------------------------------------ 2 dtype, device, flags

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('bias', [True, False])
def test_dtype_and_bias_carry_over(dtype, bias):
    m = mlp(dtype, bias)
    small,k = FC_Decomposer(.25).decompose(m),6
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert [(o.bias is not None) for o in linears(small)] == [False, bias]*3
    if bias: assert all(torch.equal(small[i][1].bias, m[i].bias) for i in (0, 2, 4))
    tol = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-7, torch.float64: 1e-14}[dtype]  # a rounding of each factor
    assert rel(product(small[0]), best(m[0].weight, k)) < tol
    assert small(torch.randn(3, 32, dtype=dtype)).dtype == dtype

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_full_rank_computes_the_same(dtype):
    m,x = mlp(dtype),torch.randn(64, 32, dtype=dtype)
    assert rel(full(m)(x), m(x)) < 10*torch.finfo(dtype).eps

def test_meta_model_gives_meta_structure():
    m = mlp().to('meta')
    plan = FC_Decomposer(.25).plan(m)
    small = plan.apply(m)
    assert {p.device.type for p in small.parameters()} == {'meta'} and all(o.error is None for o in plan.replaced)
    assert [tuple(p.shape) for p in small.parameters()] == [tuple(p.shape) for p in FC_Decomposer(.25).decompose(mlp()).parameters()]
    with pytest.raises(ValueError, match='meta'): FC_Decomposer(policy=Energy(.9)).plan(m)

def test_meta_as_default_device():
    with torch.device('meta'):
        m = mlp()
        assert FC_Decomposer(.25).decompose(m)[0][0].weight.is_meta

@pytest.mark.parametrize('train', [True, False])
def test_training_flags_of_every_module(train):
    m = mlp().train(train)
    m[2].train(not train)
    small = FC_Decomposer(.25).decompose(m)
    assert {o.training for o in small[0].modules()} == {train}
    assert {o.training for o in small[2].modules()} == {not train}
    assert [o.training for o in to_dense(small).modules()] == [o.training for o in m.modules()]

@pytest.mark.parametrize('weight', [True, False])
@pytest.mark.parametrize('bias', [True, False])
def test_frozen_stays_frozen(weight, bias):
    m = mlp()
    m[0].weight.requires_grad_(weight)
    m[0].bias.requires_grad_(bias)
    small = FC_Decomposer(.25).decompose(m)
    assert [p.requires_grad for p in small[0].parameters()] == [weight, weight, bias]
    assert all(p.requires_grad for p in small[2].parameters())
    assert [p.requires_grad for p in to_dense(small).parameters()] == [p.requires_grad for p in m.parameters()]

@pytest.mark.parametrize('mode', [torch.inference_mode, torch.no_grad])
def test_result_is_trainable_whatever_the_mode(mode):
    with mode():
        m = mlp()
        small = FC_Decomposer(.25).decompose(m)
        dense = to_dense(small)
    for o in (small, dense):
        o(torch.randn(2, 32)).sum().backward()
        assert all(p.grad is not None and not p.is_inference() for p in o.parameters())

@pytest.mark.parametrize('size', [64, 300], ids=['svd', 'gram'])
def test_autocast_and_matmul_precision_do_not_lower_the_result(size):
    m = nn.Linear(size, size+20)
    ref = FC_Decomposer(.25).decompose(m)
    dense = to_dense(ref).weight
    with torch.autocast('cpu', torch.bfloat16):
        assert all(map(torch.equal, ref.parameters(), FC_Decomposer(.25).decompose(m).parameters()))
        assert torch.equal(to_dense(ref).weight, dense)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        pair = FC_Decomposer(.25).decompose(m)
        assert lost(pair, m.weight, size//4) < 1e-9 and rel(product(pair), best(m.weight, size//4)) < 5e-6
    finally: torch.set_float32_matmul_precision(before)

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_default_dtype_does_not_matter(dtype):
    m = mlp()
    m[0].weight.data.zero_()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        small = FC_Decomposer(.25).decompose(m)
    finally: torch.set_default_dtype(before)
    assert all(map(torch.equal, small.parameters(), FC_Decomposer(.25).decompose(m).parameters()))

# ------------------------------------------------------------------ 3, 4 what a pair is

def test_pair_is_plain_torch():
    for pair in (FC_Decomposer(.25).decompose(mlp())[i] for i in (0, 2, 4)):
        assert type(pair) is nn.Sequential and [type(o) for o in pair] == [nn.Linear, nn.Linear]
        assert set(pair.state_dict()) == {'0.weight', '1.weight', '1.bias'}
        assert vars(pair).keys() == vars(nn.Sequential()).keys() | {'_low_rank'}   # the mark by which to_dense knows it
        assert vars(pair[0]).keys() == vars(nn.Linear(1, 1)).keys()

@pytest.mark.parametrize('expr', ['F.linear(x, self.fc.weight, self.fc.bias)', 'self.fc(x) * self.fc.in_features / self.fc.out_features',
                                  'self.fc(x.to(self.fc.weight.dtype))'])
def test_pair_offers_weight_where_it_is_read(expr, tmp_path, monkeypatch):
    # the detector reads source, so the class needs a file
    (tmp_path/'reading.py').write_text(f'import torch.nn.functional as F\nfrom torch import nn\nclass Net(nn.Module):\n'
        f'    def __init__(self):\n        super().__init__()\n        self.fc,self.other = nn.Linear(8, 6),nn.Linear(6, 6)\n'
        f'    def forward(self, x): return self.other({expr})\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__('sys').modules, 'reading', raising=False)
    m = __import__('reading').Net()
    x,small = torch.randn(3, 8),full(m)
    assert isinstance(small.fc, nn.Sequential) and type(small.fc) is not nn.Sequential
    assert type(small.other) is nn.Sequential
    assert rel(small(x), m(x)) < 1e-5

@pytest.mark.parametrize('m,n', [(8, 50), (50, 8), (300, 280), (1, 9), (9, 1)])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_factors_own_exactly_their_storage(m, n, dtype):
    pair = quiet(FC_Decomposer(.3).decompose, nn.Linear(n, m, dtype=dtype))
    for p in pair.parameters():
        assert p.is_contiguous() and p.untyped_storage().nbytes() == p.numel()*p.element_size() and p.is_leaf

@pytest.mark.parametrize('m,n', [(20, 40), (40, 20), (300, 260), (260, 300)])
def test_balance_and_signs(m, n):
    a,b = (o.weight.double() for o in FC_Decomposer(.25).decompose(nn.Linear(n, m)))
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-5, atol=0)
    small_side = b if m <= n else a.T                # orthogonal columns, the largest entry of each positive
    assert (small_side.gather(0, small_side.abs().argmax(0, keepdim=True)) > 0).all()
    gram = small_side.T @ small_side
    assert (gram - gram.diag().diag()).abs().max() < 1e-5*gram.max()

# ------------------------------------------------------------------ 5 roots, shared, tied

@pytest.mark.parametrize('bias', [True, False])
def test_root_linear_returns_a_pair(bias):
    lin = nn.Linear(12, 8, bias)
    pair = FC_Decomposer(.5).decompose(lin)
    assert type(pair) is nn.Sequential and rel(product(pair), best(lin.weight, 4)) < 2e-7
    assert set(pair.state_dict()) == {'0.weight', '1.weight'} | ({'1.bias'} if bias else set())

def test_root_subclass_is_left_alone():
    class Mine(nn.Linear): pass
    m = Mine(4, 4)
    with pytest.warns(UserWarning, match=r'the model\): Mine is a subclass of nn.Linear; pass types=\(Mine,\)'):
        small = FC_Decomposer().decompose(m)
    assert type(small) is Mine and small is not m and torch.equal(small.weight, m.weight)
    assert type(FC_Decomposer(types=(Mine,)).decompose(m)) is nn.Sequential

def test_shared_module_is_replaced_once_and_stays_shared():
    m,x = Shared(),torch.randn(3, 8)
    small = FC_Decomposer(.25).decompose(m)
    assert small.a is small.b is small.all[0] and type(small.a) is nn.Sequential
    assert sum(p.numel() for p in small.parameters()) == FC_Decomposer(.25).plan(m).params_after == 2*8 + 8*2 + 8
    assert rel(full(m)(x), m(x)) < 1e-5
    plan = FC_Decomposer(.25).plan(m)
    assert len(plan) == 1 and plan['a'] is plan['b'] and 'also known as b' in plan['a'].reason
    assert FC_Decomposer(.25, layers='b').plan(m)['a'].rank == FC_Decomposer(policy={'b': 2}).plan(m)['a'].rank == 2

def test_shared_parameter_is_kept():
    m = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    m[1].weight = m[0].weight
    plan = FC_Decomposer(.25).plan(m)
    assert [o.rank for o in plan.layers] == [None, None, 2] and plan['1'].reason == 'tied with 0.weight'
    small = plan.apply(m)
    assert small[0].weight is small[1].weight

def test_shared_bias_is_kept():
    m = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    m[1].bias = m[0].bias
    small = quiet(FC_Decomposer(.25).decompose, m)
    assert small[0].bias is small[1].bias

def test_tied_head_is_kept():
    m = Tied()
    plan = FC_Decomposer(.25).plan(m)
    assert plan['head'].reason == 'tied with emb.weight' and plan['fc'].rank == 2
    small,x = plan.apply(m),torch.tensor([3, 5])
    assert small.head.weight is small.emb.weight and rel(full(m)(x), m(x)) < 1e-5

@pytest.mark.parametrize('view,tied', [(lambda t: t.detach(), True), (lambda t: t.detach().T, True),
                                       (lambda t: t.detach().clone(), False)], ids=['same', 'transposed', 'copy'])
def test_parameters_on_the_same_storage_are_tied(view, tied):
    m = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    m[1].weight = nn.Parameter(view(m[0].weight))
    assert [o.rank for o in quiet(FC_Decomposer(.25).plan, m).layers] == ([None, None] if tied else [2, 2])

def test_part_of_a_weight_is_tied():
    m = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    m[1].weight = nn.Parameter(m[0].weight.detach()[2:6])
    assert [o.reason for o in quiet(FC_Decomposer(.25).plan, m).layers] == ['tied with 1.weight', 'tied with 0.weight']

def test_neighbours_in_a_flat_buffer_are_not_tied():
    m,x = mlp(),torch.randn(3, 32)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(m.parameters()), m.parameters())
    assert len(storages(m)) == 1 and len(FC_Decomposer(.25).plan(m).replaced) == 3
    assert rel(full(m)(x), m(x)) < 1e-5

def test_buffer_on_the_weight_is_a_tie():
    m = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    m[1].register_buffer('anchor', m[0].weight.detach())
    assert quiet(FC_Decomposer(.25).plan, m)['0'].reason == 'tied with 1.anchor'

# ------------------------------------------------------------------ 6 what is left alone, and why

class LoRA(nn.Linear):
    "Further parameters beside the weight"
    def __init__(self, n, m):
        super().__init__(n, m)
        self.lora_A,self.lora_B = nn.Parameter(torch.randn(2, n)),nn.Parameter(torch.randn(m, 2))
    def forward(self, x): return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T

class LoRAModules(nn.Linear):
    "Further layers below the layer"
    def __init__(self, n, m):
        super().__init__(n, m)
        self.down,self.up = nn.Linear(n, 2, bias=False),nn.Linear(2, m, bias=False)
    def forward(self, x): return super().forward(x) + self.up(self.down(x))

class Wrapped(nn.Module):
    "The form of PEFT: a wrapper around the layer, adapters in dicts"
    def __init__(self, n, m):
        super().__init__()
        self.base_layer = nn.Linear(n, m)
        self.lora_A = nn.ModuleDict(dict(default=nn.Linear(n, 4, bias=False)))
        self.lora_B = nn.ModuleDict(dict(default=nn.Linear(4, m, bias=False)))
    def forward(self, x): return self.base_layer(x) + self.lora_B['default'](self.lora_A['default'](x))

class Cosine(nn.Linear):
    "Same tensors, other maths"
    def forward(self, x): return F.linear(F.normalize(x), F.normalize(self.weight), self.bias)

class Plain(nn.Linear):
    "A subclass that changes nothing"

class WithBuffer(nn.Linear):
    def __init__(self, n, m):
        super().__init__(n, m)
        self.register_buffer('scale', torch.tensor(2.))
    def forward(self, x): return super().forward(x)*self.scale

def _patched(m):
    m.forward = lambda x: F.linear(x, m.weight, m.bias)*2
    return m

def _in_place(f):
    def g(lin):
        f(lin)
        return lin
    return g

def _subclass_weight(lin):
    from fastai.torch_core import TensorBase
    lin.weight = nn.Parameter(TensorBase(lin.weight.detach()))

KEPT = {
    'weight_norm':              (lambda o: quiet(nn.utils.weight_norm, o), 'computed by WeightNorm'),
    'spectral_norm':            (nn.utils.spectral_norm, 'computed by SpectralNorm'),
    'weight_norm parametrized': (parametrizations.weight_norm, 'parametrized'),
    'spectral_norm parametrized': (parametrizations.spectral_norm, 'parametrized'),
    'orthogonal':               (parametrizations.orthogonal, 'parametrized'),
    'pruned':                   (lambda o: prune.l1_unstructured(o, 'weight', .5), 'computed by L1Unstructured'),
    'LoRA parameters':          (lambda o: LoRA(24, 16), 'LoRA is a subclass of nn.Linear'),
    'LoRA modules':             (lambda o: LoRAModules(24, 16), 'LoRAModules is a subclass of nn.Linear'),
    'cosine':                   (lambda o: Cosine(24, 16),
                                 'Cosine is a subclass of nn.Linear; pass types=(Cosine,) if it computes the same'),
    'buffer':                   (lambda o: WithBuffer(24, 16), 'WithBuffer is a subclass'),
    'plain with a buffer':      (_in_place(lambda o: o.register_buffer('scale', torch.ones(1))),
                                 'holds more than weight and bias: scale'),
    'plain with a parameter':   (_in_place(lambda o: o.register_parameter('g', nn.Parameter(torch.ones(1)))),
                                 'holds more than weight and bias: g'),
    'plain with a child':       (_in_place(lambda o: o.add_module('child', nn.ReLU())), 'more than weight and bias: child'),
    'forward patched':          (_patched, 'forward was replaced'),
    'state_dict hook':          (_in_place(lambda o: o.register_state_dict_pre_hook(lambda *a: None)), 'has state_dict hooks'),
    'load hook':                (_in_place(lambda o: o.register_load_state_dict_post_hook(lambda *a: None)), 'has state_dict hooks'),
    'tensor subclass':          (_in_place(_subclass_weight), 'its weight is a TensorBase'),
}

@pytest.mark.parametrize('trained', [False, True], ids=['fresh', 'after a training step'])
@pytest.mark.parametrize('what', KEPT)
def test_kept_with_a_reason(what, trained):
    mk,reason = KEPT[what]
    m,x = mlp(),torch.randn(3, 32)
    m[2] = mk(m[2])
    if trained: m(x).sum().backward()
    m.eval()
    plan = quiet(FC_Decomposer(1.0).plan, m)
    assert reason in plan['2'].reason and plan['2'].rank is None and not plan['2'].can
    assert [o.name for o in plan.replaced] == ['0', '4'] and len(plan) >= 3
    before,small = snapshot(m),full(m)
    assert same(before, snapshot(m)) and type(small[2]) is type(m[2])
    assert rel(small(x), m(x)) < 1e-5
    with pytest.raises(ValueError, match="'2' cannot be decomposed"): plan.edit('2', 3)
    with pytest.warns(UserWarning, match='asked for by name, but left dense: 2'):
        FC_Decomposer(.25, layers=['2', '4']).decompose(m)
    with pytest.warns(UserWarning, match='asked for by name, but left dense: 2'):
        FC_Decomposer(policy={'2': .25, '4': .25}).decompose(m)

def test_layers_below_a_layer_are_left_alone():
    m = mlp()
    m[2] = LoRAModules(24, 16)
    plan = quiet(FC_Decomposer(1.0).plan, m)
    assert plan['2.down'].reason == plan['2.up'].reason == 'inside 2, a LoRAModules'

def test_adapters_of_a_wrapper_are_left_alone():
    m,x = nn.Sequential(Wrapped(16, 16), nn.Linear(16, 8)),torch.randn(3, 16)
    plan = quiet(FC_Decomposer(1.0).plan, m)
    assert [o.name for o in plan.replaced] == ['0.base_layer', '1']
    assert 'LoRA adapter' in plan['0.lora_A.default'].reason
    assert rel(full(m)(x), m(x)) < 1e-5

def test_types_opts_a_subclass_in():
    m,x = nn.Sequential(Plain(16, 16), Cosine(16, 16)),torch.randn(3, 16)
    fc = FC_Decomposer(1.0, types=[Plain])
    assert [o.rank for o in quiet(fc.plan, m).layers] == [16, None]
    small = full(m, types=[Plain])
    assert type(small[0]) is nn.Sequential and type(small[1]) is Cosine and rel(small(x), m(x)) < 1e-5

@pytest.mark.parametrize('types', [(LoRA,), (LoRAModules,), (WithBuffer,)], ids=lambda t: t[0].__name__)
def test_types_does_not_drop_tensors(types):
    m = nn.Sequential(types[0](8, 8), nn.Linear(8, 8))
    assert 'holds more than weight and bias' in FC_Decomposer(.25, types=types).plan(m)['0'].reason

@pytest.mark.filterwarnings('ignore')
def test_quantized_and_qat_are_left_alone():
    x = torch.randn(3, 32)
    dynamic = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}, dtype=torch.qint8)
    qat = mlp().train()
    qat.qconfig = torch.ao.quantization.get_default_qat_qconfig()
    qat = torch.ao.quantization.prepare_qat(qat)
    for m in (dynamic, qat):
        with pytest.warns(UserWarning, match='nothing to decompose .0: Linear of .*quantized; decompose before quantizing'):
            small = FC_Decomposer().decompose(m.eval())
        assert [type(o) for o in small] == [type(o) for o in m] and torch.equal(small(x), m(x))

@pytest.mark.parametrize('dtype', [torch.complex64, torch.complex128])
def test_complex_is_left_alone(dtype):
    m,x = nn.Sequential(nn.Linear(4, 4, dtype=dtype)),torch.randn(2, 4, dtype=dtype)
    with pytest.warns(UserWarning, match=f'nothing to decompose .0: dtype {dtype} is not supported'):
        small = FC_Decomposer().decompose(m)
    assert torch.equal(small(x), m(x))

@pytest.mark.filterwarnings('ignore:Sparse')
@pytest.mark.parametrize('to', ['to_sparse', 'to_sparse_csr'])
def test_sparse_is_left_alone(to):
    m = mlp()
    m[2].weight = nn.Parameter(getattr(m[2].weight.detach(), to)())
    small = FC_Decomposer(.25).decompose(m)
    assert small[2].weight.layout == m[2].weight.layout and small[2].weight is not m[2].weight
    assert torch.equal(small[2].weight.to_dense(), m[2].weight.to_dense()) and type(small[0]) is nn.Sequential

def test_lazy_is_left_alone_and_still_lazy():
    m = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    plan = FC_Decomposer(.25).plan(m)
    assert 'not initialized yet; run one batch' in plan['0'].reason and plan['1'].rank == 2
    small = plan.apply(m)
    assert small(torch.randn(2, 5)).shape == (2, 8) and m[0].has_uninitialized_params()
    m(torch.randn(2, 5))
    assert type(FC_Decomposer(.25).decompose(m)[0]) is nn.Sequential

@pytest.mark.filterwarnings('ignore:Initializing zero')
def test_zero_size_is_left_alone():
    m = nn.Sequential(nn.Linear(8, 0), nn.Linear(0, 8), nn.Linear(8, 8))
    plan = FC_Decomposer(.25).plan(m)
    assert [o.reason for o in plan.layers] == ['zero-size', 'zero-size', '']
    assert plan.apply(m)(torch.randn(2, 8)).shape == (2, 8)

def test_module_that_only_resembles_a_layer():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features,self.out_features = None,(1, 2)
            self.fc = nn.Linear(8, 8)
    assert [o.name for o in FC_Decomposer(.25).plan(Graph()).layers] == ['fc']

# ------------------------------------------------------------------ hooks

def test_hooks_move_to_the_pair():
    seen = []
    m = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    m[0].register_forward_pre_hook(lambda o, args: seen.append('pre'))
    m[0].register_forward_pre_hook(lambda o, args, kw: seen.append(('pre', kw)), with_kwargs=True)
    m[0].register_forward_hook(lambda o, args, out: seen.append('fwd'))
    m[0].register_forward_hook(lambda o, args, kw, out: (seen.append(('fwd', kw)), out*3)[1], with_kwargs=True)
    m[0].register_full_backward_pre_hook(lambda o, g: seen.append('back pre'))
    m[0].register_full_backward_hook(lambda o, gi, go: seen.append('back'))
    small,x = full(m),torch.randn(2, 8, requires_grad=True)
    for o in (m, small, to_dense(small)):
        seen.clear()
        y = o(x)
        y.sum().backward()
        assert seen == ['pre', ('pre', {}), 'fwd', ('fwd', {}), 'back pre', 'back']
        assert rel(y, m(x)) < 1e-5

def test_always_called_hook_runs_on_error():
    seen = []
    m = nn.Sequential(nn.Linear(8, 8))
    m[0].register_forward_hook(lambda *a: seen.append(1), always_call=True)
    with pytest.raises(RuntimeError): FC_Decomposer(.25).decompose(m)(torch.randn(2, 9))
    assert seen == [1]

def test_hook_sees_what_looks_like_the_layer():
    seen = []
    m = nn.Sequential(nn.Linear(8, 6))
    m[0].register_forward_hook(lambda o, *a: seen.append((o.in_features, o.out_features, *o.weight.shape, *o.bias.shape)))
    FC_Decomposer(.25).decompose(m)(torch.randn(2, 8))
    assert seen == [(8, 6, 6, 8, 6)]

def test_hook_handle_of_the_model_does_not_reach_the_copy():
    seen = []
    m = nn.Sequential(nn.Linear(8, 8))
    handle = m[0].register_forward_hook(lambda *a: seen.append(1))
    small = FC_Decomposer(.25).decompose(m)
    handle.remove()
    small(torch.randn(2, 8))
    assert seen == [1] and not m[0]._forward_hooks

def test_activations_kept_by_hooks_do_not_stop_the_copy():
    from fastai.callback.hook import hook_outputs
    m = mlp()
    with hook_outputs([m[0], m[1]], detach=False) as hooks:
        m(torch.randn(2, 32))
        assert hooks.stored[0].grad_fn is not None  # copy.deepcopy(m) raises here
        small = FC_Decomposer(.25).decompose(m)
        stored = hooks.stored[0]
        small(torch.randn(2, 32))
        assert hooks.stored[0] is stored

def test_partial_hook_follows_the_copy():
    seen = []
    m = nn.Sequential(nn.Linear(8, 8))
    m[0].register_forward_hook(partial(lambda owner, *a: seen.append(owner), m))
    small = FC_Decomposer(.25).decompose(m)
    small(torch.randn(2, 8))
    assert seen == [small]

# ------------------------------------------------------------------ 7 decomposed once

def test_second_decomposition_changes_nothing():
    once = FC_Decomposer(.25).decompose(mlp())
    plan = quiet(FC_Decomposer(.25).plan, once)
    assert {o.reason for o in plan.layers} == {'already half of a low-rank pair'}
    with pytest.warns(UserWarning, match='nothing to decompose .*already half of a low-rank pair'):
        twice = FC_Decomposer(.25).decompose(once)
    assert str(twice) == str(once) and all(map(torch.equal, once.parameters(), twice.parameters()))

def test_second_decomposition_takes_what_was_left():
    once = FC_Decomposer(.25, exclude='4').decompose(mlp())
    assert [o.name for o in FC_Decomposer(.25).plan(once).replaced] == ['4']

# ------------------------------------------------------------------ 8 names

NAMES = {
    'layers':      lambda m, n: FC_Decomposer(layers=n).plan(m),
    'layers list': lambda m, n: FC_Decomposer(layers=['classifier.0', n]).plan(m),
    'exclude':     lambda m, n: FC_Decomposer(exclude=n).plan(m),
    'PerLayer':    lambda m, n: FC_Decomposer(policy={n: 2}).plan(m),
    'nested':      lambda m, n: FC_Decomposer(policy={'*': {n: 2}}).plan(m),
    'edit':        lambda m, n: FC_Decomposer().plan(m).edit(n, 2),
    'edit dict':   lambda m, n: FC_Decomposer().plan(m).edit('*', {n: 2}),
    'index':       lambda m, n: FC_Decomposer().plan(m)[n],
}

def named():
    m = nn.Module()
    m.features,m.h,m.head = nn.Sequential(nn.Conv2d(3, 8, 1)),nn.Linear(8, 8),nn.Linear(8, 8)
    m.classifier = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    return m

@pytest.mark.parametrize('how', NAMES)
@pytest.mark.parametrize('name,closest', [('clasifier.0', 'classifier.0'), ('heads', 'head'), ('classifier.9', 'classifier.0'),
                                          ('Head', 'head'), ('clasifier.*', 'classifier.0'), ('', 'h')])
def test_unknown_name_is_an_error(how, name, closest):
    with pytest.raises(ValueError, match='no layer matches') as e: quiet(NAMES[how], named(), name)
    assert repr(name) in str(e.value) and repr(closest) in str(e.value).split('Closest:')[1]

def test_error_text_of_an_unknown_name():
    with pytest.raises(ValueError) as e: FC_Decomposer(exclude='clasifier.*').plan(named())
    assert str(e.value) == "no layer matches exclude='clasifier.*'. Closest: 'classifier.0', 'classifier.2'."

@pytest.mark.parametrize('pattern,want', [('h', ['h']), ('head', ['head']), ('h*', ['h', 'head']), ('?', ['h']),
    ('classifier', ['classifier.0', 'classifier.2']), ('classifier.*', ['classifier.0', 'classifier.2']),
    ('*.2', ['classifier.2']), (['h', '*.0'], ['h', 'classifier.0']), (('head',), ['head']),
    ('*', ['h', 'head', 'classifier.0', 'classifier.2'])])
def test_names_containers_wildcards(pattern, want):
    m,every = named(),['h', 'head', 'classifier.0', 'classifier.2']
    assert [o.name for o in FC_Decomposer(.25, layers=pattern).plan(m).replaced] == want
    plan = quiet(FC_Decomposer(.25, exclude=pattern).plan, m)
    assert [o.name for o in plan.replaced] == [n for n in every if n not in want]
    assert {o.reason for o in plan.skipped} <= {'excluded'}
    edited = FC_Decomposer(.25).plan(m).edit(pattern, 5)
    assert [o.name for o in edited.layers if o.rank == 5] == want

def test_layers_and_exclude_together():
    plan = FC_Decomposer(.25, layers='classifier', exclude='*.2').plan(named())
    assert [o.name for o in plan.replaced] == ['classifier.0']

def test_excluding_a_part_without_layers_is_fine():
    assert len(FC_Decomposer(.25, exclude='features').plan(named()).replaced) == 4
    with pytest.raises(ValueError, match='no layer matches'): FC_Decomposer(.25, layers='features').plan(named())

def test_names_with_special_characters():
    m = nn.ModuleDict({'a[0]': nn.Linear(4, 4), 'a0': nn.Linear(4, 4), 'x*': nn.Sequential(nn.Linear(4, 4))})
    assert [o.name for o in FC_Decomposer(layers='a[0]').plan(m).replaced][0] == 'a[0]'
    assert [o.name for o in FC_Decomposer(layers='x*').plan(m).replaced] == ['x*.0']
    plan = FC_Decomposer(.25).plan(m).edit('a[0]', 3)
    assert plan['a[0]'].rank == 3

def test_names_from_a_generator_serve_every_call():
    fc = FC_Decomposer(.25, layers=(n for n in ['h', 'head']), exclude=iter(['head']))
    assert [o.name for o in fc.plan(named()).replaced] == [o.name for o in fc.plan(named()).replaced] == ['h']

@pytest.mark.parametrize('bad', [3, [3], [None], [nn.Linear(2, 2)]])
def test_names_must_be_text(bad):
    with pytest.raises(TypeError, match='layers takes names of layers, got'): FC_Decomposer(layers=bad).plan(named())

def test_table_sorts_as_numbers():
    m = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])
    df = quiet(FC_Decomposer(policy={'0': 10, '1': 9, '2': None}).plan, m).to_frame().dropna()
    assert list(df.sort_values('rank').layer) == ['1', '0'] and list(df.sort_values('error').layer) == ['0', '1']

def test_index_of_a_container_is_an_error():
    with pytest.raises(ValueError, match="'classifier' has no row of its own; below it lie 'classifier.0', 'classifier.2'"):
        FC_Decomposer().plan(named())['classifier']
    with pytest.raises(TypeError, match='indexed by a name, got 0'): FC_Decomposer().plan(named())[0]

def test_root_has_the_empty_name():
    plan = FC_Decomposer(.5, layers='').plan(nn.Linear(8, 8))
    assert plan[''].rank == 4 and plan.edit('', 2)[''].rank == 2

# ------------------------------------------------------------------ 9 values that are not numbers, or not many

@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_and_inf_are_an_error_that_names_the_layer(bad, dtype):
    m = mlp(dtype)
    m[2].weight.data[3,:2] = bad
    for f in (FC_Decomposer().plan, FC_Decomposer().decompose):
        with pytest.raises(ValueError) as e: f(m)
        assert str(e.value) == ("the weight of '2' has 2 NaN or Inf of 384 values. Repair it, or leave the layer out with exclude='2'.")
    assert len(FC_Decomposer(exclude='2').plan(m).replaced) == 2

def test_nan_in_the_root_and_in_the_function():
    m = nn.Linear(4, 4)
    m.weight.data[0,0] = float('nan')
    with pytest.raises(ValueError, match="weight of 'the model' has 1 NaN or Inf of 16"): FC_Decomposer().decompose(m)
    with pytest.raises(ValueError, match='NaN or Inf'): factorize(m.weight)

@pytest.mark.parametrize('policy', [.5, Energy(.9), Energy(1.), 3])
@pytest.mark.parametrize('size', [8, 300])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_zero_weight_gives_rank_1_and_can_be_trained(policy, size, dtype):
    m = nn.Linear(size, size, dtype=dtype)
    m.weight.data.zero_()
    plan = FC_Decomposer(policy=policy).plan(m)
    small = plan.apply(m)
    assert plan[''].rank == 1 and plan[''].error == 0 and 'zero weight' in plan[''].reason
    x = torch.randn(2, size, dtype=dtype)
    assert torch.equal(small(x), m(x)) and torch.isfinite(small(x)).all()
    small(x).sum().backward()
    assert small[0].weight.grad.any()

@pytest.mark.parametrize('m,n,r', [(40, 30, 3), (30, 40, 1), (320, 300, 5), (300, 320, 5)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_rank_deficient_weight(m, n, r, dtype):
    torch.manual_seed(0)
    lin = nn.Linear(n, m, dtype=dtype)
    lin.weight.data = torch.randn(m, r, dtype=dtype) @ torch.randn(r, n, dtype=dtype)
    plan = FC_Decomposer(policy=Energy(1.)).plan(lin)
    assert plan[''].rank == r
    for k in (r, min(m, n)//2):   # above the true rank the rest is zero, not noise blown up
        pair = quiet(plan.edit, '', k).apply(lin)
        assert rel(product(pair), lin.weight) < 1e-6 and all(torch.isfinite(p).all() for p in pair.parameters())
        assert max(p.abs().max() for p in pair[:2].parameters()) < 10*lin.weight.abs().max()**.5*max(m, n)**.25

@pytest.mark.parametrize('m,n', [(1, 512), (512, 1), (1, 1)])
def test_vectors(m, n):
    lin = nn.Linear(n, m)
    with pytest.warns(UserWarning, match='1 of 1 layers grew'): pair = FC_Decomposer(.5).decompose(lin)
    assert pair[0].out_features == 1 and rel(product(pair), lin.weight) < 1e-6
    with pytest.warns(UserWarning, match='rank 1 would not be smaller; break-even is 0'):
        assert type(FC_Decomposer(skip_unprofitable=True).decompose(lin)) is nn.Linear

@pytest.mark.parametrize('scale', [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize('size', [20, 300])
def test_scale_of_the_weight_does_not_matter(scale, size):
    torch.manual_seed(0)
    lin = nn.Linear(size, size)
    want = FC_Decomposer(.25).plan(lin)[''].error
    lin.weight.data *= scale
    plan = FC_Decomposer(.25).plan(lin)
    assert plan[''].error == pytest.approx(want, rel=1e-5)
    pair = plan.apply(lin)
    assert lost(pair, lin.weight, size//4) < 1e-9
    assert rel(product(pair)/scale, best(lin.weight.double()/scale, size//4)) < 5e-6

def test_non_contiguous_weight():
    lin = nn.Linear(40, 40)
    lin.weight = nn.Parameter(torch.randn(80, 40).T[:,::2].detach())
    assert not lin.weight.is_contiguous()
    pair = FC_Decomposer(.25).decompose(lin)
    assert rel(product(pair), best(lin.weight, 10)) < 2e-7 and pair[0].weight.is_contiguous()

# ------------------------------------------------------------------ 11 plan, save, load, skeleton

POLICIES = [.25, 3, Energy(.8), {'0': .5, '2': Energy(.7), '4': None}, FixedRank(2), PerLayer({'*': 4})]

@pytest.mark.parametrize('policy', POLICIES, ids=str)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64])
def test_plan_then_apply_is_decompose_bit_for_bit(policy, dtype):
    m,fc = mlp(dtype),FC_Decomposer(policy=policy)
    a,b = quiet(fc.decompose, m),quiet(fc.plan, m).apply(m)
    assert str(a) == str(b) and all(map(torch.equal, a.parameters(), b.parameters()))
    assert sum(p.numel() for p in a.parameters()) == quiet(fc.plan, m).params_after

@pytest.mark.parametrize('policy', POLICIES, ids=str)
def test_plan_survives_saving(policy, tmp_path):
    m = nn.Sequential(*mlp(), Shared(), Tied())
    plan = quiet(FC_Decomposer(policy=policy).plan, m)
    again = DecompositionPlan.load(plan.save(tmp_path/'plan.json'))
    assert again == plan and repr(again) == repr(plan)
    assert [o.error for o in again.layers] == [o.error for o in plan.layers]
    assert all(map(torch.equal, again.apply(m).parameters(), plan.apply(m).parameters()))

@pytest.mark.parametrize('scale', [1e-60, 1., 1e60])
def test_plan_survives_saving_at_any_scale(scale, tmp_path):
    lin = nn.Linear(8, 8, dtype=torch.float64)
    want = FC_Decomposer(.25).plan(lin)[''].error
    lin.weight.data *= scale
    plan = FC_Decomposer(.25).plan(lin)
    assert DecompositionPlan.load(plan.save(tmp_path/'p.json')) == plan
    assert plan[''].error == pytest.approx(want, rel=1e-6)

def test_meta_plan_survives_saving(tmp_path):
    plan = FC_Decomposer(.25).plan(mlp().to('meta'))
    assert DecompositionPlan.load(plan.save(tmp_path/'p.json')) == plan

def test_saving_does_not_overwrite_and_leaves_no_half_file(tmp_path):
    plan = FC_Decomposer(.25).plan(mlp())
    path = plan.save(tmp_path/'plan.json')
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match='overwrite=True'): plan.edit('0', 1).save(path)
    assert path.read_bytes() == before
    plan.edit('0', 1).save(path, overwrite=True)
    assert DecompositionPlan.load(path)['0'].rank == 1 and [o.name for o in tmp_path.iterdir()] == ['plan.json']

@pytest.mark.parametrize('text,match', [('{', 'not valid JSON'), ('[]', 'is not a plan'), ('{"type": "x"}', 'is not a plan'),
    ('{"type": "fasterai.DecompositionPlan", "version": 99}', 'version 99'),
    ('{"type": "fasterai.DecompositionPlan", "version": 1}', 'damaged')])
def test_file_that_is_no_plan(text, match, tmp_path):
    (tmp_path/'p.json').write_text(text)
    with pytest.raises(ValueError, match=match): DecompositionPlan.load(tmp_path/'p.json')

@pytest.mark.parametrize('change', [dict(rank=0), dict(rank=999), dict(rank=1.5), dict(rank=True), dict(rank='3'), dict(unknown=1),
                                    dict(spectrum='abc'), dict(spectrum=3), dict(aliases=None)], ids=str)
def test_damaged_plan_is_an_error(change, tmp_path):
    path = FC_Decomposer(.25).plan(mlp()).save(tmp_path/'p.json')
    d = json.loads(path.read_text())
    d['layers'][0] |= change
    path.write_text(json.dumps(d))
    with pytest.raises(ValueError, match='p.json'): DecompositionPlan.load(path)

@pytest.mark.parametrize('change,match', [
    (lambda m: m.__setitem__(2, nn.Linear(24, 17)), r"expects '2' to be Linear\(24→16\), the model has Linear\(24→17\)"),
    (lambda m: m.__setitem__(2, nn.ReLU()), r"expects '2' to be Linear\(24→16\), the model has no such layer"),
    (lambda m: m.__setitem__(2, nn.Linear(24, 16, bias=False)), "expects '2' with bias, the model has it without"),
    (lambda m: m.__setitem__(2, Plain(24, 16)), r"expects '2' to be Linear\(24→16\), the model has Plain"),
    (lambda m: setattr(m[2], 'weight', nn.Parameter(m[2].weight.detach().to(torch.complex64))),
        "'2' cannot be decomposed in this model: dtype"),
    (lambda m: parametrizations.weight_norm(m[2]), "expects '2' to be")])
def test_plan_of_another_model_is_an_error(change, match):
    plan,m = FC_Decomposer(.25).plan(mlp()),mlp()
    change(m)
    for f in (plan.apply, plan.skeleton):
        with pytest.raises(ValueError, match=match): f(m)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('onto', ['cpu', 'meta'])
@pytest.mark.parametrize('came_from', ['cpu', 'meta'])
def test_skeleton_loads_strictly(came_from, onto, dtype):
    mk = lambda: nn.Sequential(*mlp(dtype), nn.BatchNorm1d(4, dtype=dtype)).eval()
    m,x = mk(),torch.randn(3, 32, dtype=dtype)
    small = FC_Decomposer(.25).decompose(m)
    plan = FC_Decomposer(.25).plan(mk().to(came_from))
    again = plan.skeleton(mk().to(onto))
    assert {p.device.type for p in again.parameters()} == {onto}
    again.load_state_dict(small.state_dict(), strict=True, assign=onto == 'meta')
    assert torch.equal(again(x), small(x)) and {p.requires_grad for p in again.parameters()} == {True}

def test_skeleton_does_not_look_at_values():
    m = mlp()
    plan = FC_Decomposer(.25).plan(m)
    m[0].weight.data.fill_(float('nan'))   # as memory that was never written may hold
    assert not plan.skeleton(m)[0][0].weight.any()

def test_skeleton_keeps_ties_and_sharing():
    m = nn.Sequential(Shared(), Tied())
    o = FC_Decomposer(.25).plan(m).skeleton(m)
    assert o[0].a is o[0].b and o[1].head.weight is o[1].emb.weight

# ------------------------------------------------------------------ edit, ranks, growth

def test_edit_makes_a_new_plan():
    plan = FC_Decomposer(.25).plan(mlp())
    edited = plan.edit('0', 5).edit(['2'], Energy(.5)).edit('4', None)
    assert [o.rank for o in plan.layers] == [6, 4, 1] and edited['0'].rank == 5 and edited['4'].rank is None
    assert edited['4'].reason == 'dense by edit' and '(edited)' in edited.policy
    small = edited.apply(mlp())
    assert small[0][0].out_features == 5 and type(small[4]) is nn.Linear
    assert sum(p.numel() for p in small.parameters()) == edited.params_after

@pytest.mark.parametrize('rank', [0, -1, 17, 1000])
def test_edit_checks_the_rank(rank):
    with pytest.raises(ValueError, match='rank'): FC_Decomposer(.25).plan(mlp()).edit('2', rank)

def test_edit_revives_an_excluded_layer():
    plan = FC_Decomposer(.25, exclude='4').plan(mlp()).edit('4', 2)
    assert plan['4'].rank == 2 and plan['4'].reason == ''

def test_edit_keeps_the_remark():
    m = Shared()
    assert 'also known as b' in FC_Decomposer(.25).plan(m).edit('b', 3)['a'].reason

@pytest.mark.parametrize('answer', [0, -1, 99, 2.5, True, '3'])
def test_rank_of_a_policy_is_checked(answer):
    class Mine(Policy):
        needs_spectra = False
        def ranks(self, layers): return {o.name: answer for o in layers}
    with pytest.raises(ValueError, match=r"rank of '0' must be between 1 and 24, got"):
        FC_Decomposer(policy=Mine()).decompose(mlp())

@pytest.mark.parametrize('multiple,want', [(1, [6, 4, 1]), (4, [4, 4, 1]), (5, [5, 4, 1]), (8, [6, 4, 1])])
def test_round_to(multiple, want):
    assert [o.rank for o in FC_Decomposer(.25, round_to=multiple).plan(mlp()).layers] == want

@pytest.mark.parametrize('bad', [0, -1, 2.5, True, None, '8'])
def test_round_to_is_checked(bad):
    with pytest.raises(ValueError, match='round_to must be an int of at least 1, got'):
        FC_Decomposer(round_to=bad).plan(mlp())

@pytest.mark.parametrize('ratio', [.1, .5, .8, 1.])
def test_skip_unprofitable_never_grows(ratio):
    m = mlp()
    plan = quiet(FC_Decomposer(ratio, skip_unprofitable=True).plan, m)
    for o in plan.layers:
        k = max(1, int(ratio*o.max_rank + 1e-9))
        smaller = k*(o.in_features + o.out_features) < o.in_features*o.out_features
        assert o.rank == (k if smaller else None)
        if not smaller: assert o.reason.startswith(f'rank {k} would not be smaller; break-even is')
    small = plan.apply(m)
    assert sum(p.numel() for p in small.parameters()) == plan.params_after <= sum(p.numel() for p in m.parameters())

def test_growth_is_said_in_numbers():
    m = mlp()
    fc = FC_Decomposer(.9, exclude='4')
    for f in (fc.plan, fc.decompose):
        with pytest.warns(UserWarning) as seen: f(m)
        extra = 21*(32+24) - 32*24 + 14*(24+16) - 24*16
        assert [str(o.message) for o in seen] == [f'2 of 2 layers grew (0, 2; {extra:,} parameters more): RankRatio(ratio=0.9) is above '
            'their break-even rank. Use skip_unprofitable=True to keep them dense, or a smaller rank.']
        assert seen[0].filename == __file__   # the line to change is the user's

def test_no_warning_where_nothing_is_odd():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        FC_Decomposer(.25, exclude='4').decompose(mlp())
        FC_Decomposer(.5).decompose(nn.Linear(64, 64))   # equal size is not growth

def test_nothing_to_do_is_said():
    with pytest.warns(UserWarning, match='nothing to decompose .it has no fully-connected layer') as seen:
        small = FC_Decomposer().decompose(nn.Sequential(nn.Conv2d(3, 3, 1)))
    assert type(small[0]) is nn.Conv2d and seen[0].filename == __file__

# ------------------------------------------------------------------ to_dense

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('bias', [True, False])
def test_to_dense_gives_the_structure_back(dtype, bias):
    m = mlp(dtype, bias)
    small = FC_Decomposer(.25).decompose(m)
    dense = to_dense(small)
    assert str(dense) == str(m)
    assert {k: v.shape for k,v in dense.state_dict().items()} == {k: v.shape for k,v in m.state_dict().items()}
    for i in (0, 2, 4):
        assert dense[i].weight.dtype == dtype and dense[i].weight.is_contiguous()
        assert torch.equal(dense[i].weight, product(small[i]).to(dtype)) and not storages(dense) & storages(small)

def test_to_dense_of_full_rank_is_the_original():
    m = nn.Sequential(*mlp(), Shared())
    dense = to_dense(full(m))
    assert dense[5].a is dense[5].b and type(dense[5].a) is nn.Linear
    for (k,a),b in zip(dense.state_dict().items(), m.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=k)
    assert type(to_dense(full(nn.Linear(4, 4)))) is nn.Linear

def test_to_dense_without_pairs_is_a_copy():
    m = mlp()
    dense = to_dense(m)
    assert str(dense) == str(m) and all(map(torch.equal, m.parameters(), dense.parameters()))
    assert not storages(m) & storages(dense)

def test_to_dense_on_meta():
    assert str(to_dense(FC_Decomposer(.25).decompose(mlp().to('meta')))) == str(mlp())

# ------------------------------------------------------------------ accuracy and solvers

def spectrum_of(kind, r):
    i = torch.arange(r, dtype=torch.float64)
    return dict(random=None, decaying=.9**i, low_rank=torch.where(i < r//10, 1., 1e-7), flat=torch.ones(r, dtype=torch.float64),
                ill=torch.logspace(0, -12, r, dtype=torch.float64))[kind]

def matrix(kind, m, n):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(m, n, generator=g, dtype=torch.float64)
    if (s := spectrum_of(kind, min(m, n))) is None: return W
    U,_,Vh = torch.linalg.svd(W, full_matrices=False)
    return U * s @ Vh

@pytest.mark.parametrize('kind', ['random', 'decaying', 'low_rank', 'flat', 'ill'])
@pytest.mark.parametrize('m,n', [(270, 400), (400, 270)])
@pytest.mark.parametrize('solver', ['gram', 'svd'])
def test_both_solvers_are_as_good_as_float64(kind, m, n, solver):
    W = matrix(kind, m, n).float()
    S = torch.linalg.svdvals(W.double())
    # a Gram matrix squares the numbers, so it sees singular values down to the root of float64's precision
    torch.testing.assert_close(spectrum(W, solver=solver), S, rtol=1e-9, atol=(3e-7 if solver == 'gram' else 1e-14)*S[0].item())
    basis = factorize(W, solver=solver)
    assert basis.solver == {'gram': 'gram64', 'svd': 'svd'}[solver]
    for k in (1, 20, 135):
        A,B = basis.pair(k)
        err,least = torch.norm(W.double() - B.double() @ A.double()),S[k:].norm()
        assert err <= least*(1 + 1e-6) + 1e-7*S.norm()  # two factors rounded to float32

@pytest.mark.parametrize('m,n', [(270, 400), (400, 270)])
def test_auto_is_gram_for_large_and_svd_for_small_or_double(m, n):
    W = torch.randn(m, n)
    assert factorize(W).solver == factorize(W.half()).solver == 'gram64'
    assert factorize(W, rank=9).solver == factorize(W.half(), rank=9).solver == 'gram32'
    assert factorize(W[:200,:200]).solver == factorize(W.double()).solver == 'svd'
    with pytest.raises(ValueError, match="solver must be 'auto', 'gram', 'svd' or 'krylov', got 'qr'"): factorize(W, solver='qr')

def fails(*args, **kw): raise torch.linalg.LinAlgError('did not converge')

TOP = factorize_module._top

def rubbish_top(G, k, *_): return torch.linspace(1, 0, len(G), dtype=G.dtype),torch.linalg.qr(1 + torch.eye(len(G), dtype=G.dtype)).Q[:,:k]

def not_orthogonal(G, k, *_):
    e,Q = TOP(G, k)
    return e,Q*1.001

def smallest(G, k, *_):
    e,Q = TOP(G, len(G))
    return e,Q[:,-k:]

def tilted(G, k, *_):
    "Orthonormal, and a little beside the best directions"
    e,Q = TOP(G, len(G))
    Q[:,k-1] = .9*Q[:,k-1] + .19**.5*Q[:,-1]
    return e,Q[:,:k]

def nan_top(G, k, *_): return torch.full_like(G[0], float('nan')),torch.full_like(G[:,:k], float('nan'))

@pytest.mark.parametrize('top', [fails, rubbish_top, nan_top, not_orthogonal, smallest, tilted], ids=lambda f: f.__name__)
@pytest.mark.parametrize('m,n', [(300, 320), (320, 300)])
def test_eigenvectors_gone_wrong_fall_back_to_svd(top, m, n, monkeypatch):
    lin = nn.Linear(n, m)
    want = best(lin.weight, 75)
    monkeypatch.setattr(factorize_module, '_top', top)
    with pytest.warns(UserWarning, match="singular vectors of a .* weight by solver='gram' failed or did not pass") as seen:
        pair = FC_Decomposer(.25).decompose(lin)
    assert rel(product(pair), want) < 2e-7 and len(seen) == 1 and seen[0].filename == __file__

SVD = torch.linalg.svd

def rubbish_svd(W, full_matrices): return tuple(2*t for t in SVD(W, full_matrices=False))

@pytest.mark.parametrize('svd', [fails, rubbish_svd], ids=['fails', 'rubbish'])
def test_svd_gone_wrong_falls_back_to_gram(svd, monkeypatch):
    lin = nn.Linear(40, 30)
    want = best(lin.weight, 7)
    monkeypatch.setattr(torch.linalg, 'svd', svd)
    with pytest.warns(UserWarning, match="solver='svd' failed or did not pass"):
        pair = FC_Decomposer(.25).decompose(lin)
    assert lost(pair, lin.weight, 7) < 1e-9 and rel(product(pair), want) < 5e-6

@pytest.mark.parametrize('values', [fails, lambda G: torch.linspace(0, 1, len(G), dtype=G.dtype), lambda G: torch.full_like(G[0], float('nan'))], ids=['fails', 'rubbish', 'nan'])
def test_eigenvalues_gone_wrong_fall_back_to_svd(values, monkeypatch):
    lin = nn.Linear(320, 300)
    want = torch.linalg.svdvals(lin.weight.detach().double())
    monkeypatch.setattr(torch.linalg, 'eigvalsh', values)
    with pytest.warns(UserWarning, match="singular values of a .* weight by solver='gram'"):
        plan = FC_Decomposer(.25).plan(lin)
    assert plan[''].error == pytest.approx((want[75:].norm()/want.norm()).item(), rel=1e-5)

def test_no_solver_left_leaves_the_layer_dense(monkeypatch):
    m = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 40))
    monkeypatch.setattr(factorize_module, '_top', fails)
    monkeypatch.setattr(torch.linalg, 'svd', fails)
    with pytest.warns(UserWarning, match="'0' stays dense: no solver"): small = FC_Decomposer(.25).decompose(m)
    assert [type(o) for o in small] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(map(torch.equal, m.parameters(), small.parameters()))

def test_no_singular_values_means_no_predicted_error(monkeypatch):
    m = mlp()
    want = FC_Decomposer(.25).decompose(m)
    for o in ('eigvalsh', 'svdvals'): monkeypatch.setattr(torch.linalg, o, fails)
    with pytest.warns(UserWarning, match="'0': no solver found the singular values"): plan = FC_Decomposer(.25).plan(m)
    assert [o.error for o in plan.layers] == [None]*3
    assert all(map(torch.equal, plan.apply(m).parameters(), want.parameters()))   # the ranks did not need them
    plan = quiet(FC_Decomposer(policy=Energy(.9)).plan, m)
    assert {(o.rank, o.reason) for o in plan.layers} == {(None, 'no solver found its singular values')}

# ------------------------------------------------------------------ 12, 13 memory and determinism

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64])
def test_same_input_same_bits(dtype):
    m = nn.Sequential(nn.Linear(300, 280, dtype=dtype), nn.Linear(280, 30, dtype=dtype))
    runs = [[p.clone() for p in FC_Decomposer(.25).decompose(o).parameters()] for o in (m, m, copy.deepcopy(m), to_dense(m))]
    for run in runs[1:]: assert all(map(torch.equal, runs[0], run))

def test_replaced_weights_are_never_copied(monkeypatch):
    m = nn.Sequential(mlp(), nn.Conv1d(4, 4, 1))
    copied,deep = [],nn.Parameter.__deepcopy__
    def counting(self, memo):
        copied.append(self)
        return deep(self, memo)
    monkeypatch.setattr(nn.Parameter, '__deepcopy__', counting)
    FC_Decomposer(.25).decompose(m)
    assert {id(p) for p in copied} == {id(p) for p in m[1].parameters()}

# ------------------------------------------------------------------ what a model may be

def test_what_is_not_a_model():
    from fastai.learner import Learner
    from fastai.data.core import DataLoaders
    learn = Learner(DataLoaders(), mlp(), loss_func=F.mse_loss)
    for f in (FC_Decomposer().plan, FC_Decomposer().decompose):
        with pytest.raises(TypeError, match='model must be a torch.nn.Module, got Learner; pass learn.model'): f(learn)
        with pytest.raises(TypeError, match='got dict.'): f({})

@pytest.mark.parametrize('ratio,error', [(0, ValueError), (-.5, ValueError), (1.1, ValueError), (50, ValueError), (float('nan'), ValueError),
                                         ('0.5', TypeError), (True, TypeError), (None, TypeError)])
def test_ratio_is_checked(ratio, error):
    with pytest.raises(error, match=r'rank_ratio must be (a number )?in \(0, 1\], got'): FC_Decomposer(ratio)

def test_ratio_error_says_the_way_out():
    with pytest.raises(ValueError) as e: FC_Decomposer(50)
    assert str(e.value) == 'rank_ratio must be in (0, 1], got 50. To keep half of the singular values pass 0.5.'

@pytest.mark.parametrize('policy', ['half', [1], True, object()])
def test_policy_is_checked(policy):
    with pytest.raises(TypeError, match='a policy is a float'): FC_Decomposer(policy=policy)

def test_ratio_and_policy_exclude_each_other():
    with pytest.raises(ValueError, match='not both'): FC_Decomposer(.25, policy=Energy(.9))

@pytest.mark.parametrize('kw', [dict(skip_unprofitable=True), dict(round_to=8), dict(layers=['a']), dict(exclude='b'),
                                dict(types=(Plain,))], ids=str)
def test_repr_shows_every_option(kw):
    (k,v), = kw.items()
    assert f'{k}=' in repr(FC_Decomposer(**kw)) and repr(FC_Decomposer(**kw)) != repr(FC_Decomposer())

def wrap_fx(m): return torch.fx.symbolic_trace(m)
def wrap_compile(m): return torch.compile(m, backend='eager')

@pytest.mark.parametrize('wrap,prefix', [(wrap_fx, ''), (nn.DataParallel, 'module.'), (wrap_compile, '_orig_mod.')],
                         ids=['fx', 'DataParallel', 'compile'])
def test_wrapped_models(wrap, prefix):
    m,x = wrap(mlp()),torch.randn(3, 32)
    y = m(x)
    small = FC_Decomposer(.25).decompose(m)
    assert [o.name for o in FC_Decomposer(.25).plan(m).replaced] == [prefix+n for n in '024']
    assert sum(p.numel() for p in small.parameters()) == 6*(32+24)+24 + 4*(24+16)+16 + 1*(16+4)+4
    plain = FC_Decomposer(.25).decompose(mlp())
    torch.testing.assert_close(small(x), plain(x))
    assert rel(full(m)(x), y) < 1e-5 and torch.equal(m(x), y)
    with torch.no_grad(): small.get_submodule(prefix+'4')[1].bias.add_(1)
    torch.testing.assert_close(small(x), plain(x)+1)   # the wrapper runs the copy, not the model

@pytest.mark.filterwarnings('ignore:`torch.jit')
def test_script_module_is_not_passed_over_in_silence():
    m,x = torch.jit.script(mlp()),torch.randn(3, 32)
    with pytest.warns(UserWarning, match='nothing to decompose .0: RecursiveScriptModule is not nn.Linear'):
        small = FC_Decomposer().decompose(m)
    assert torch.equal(small(x), m(x))

def test_conv1d_of_gpt2_is_a_layer():
    from transformers.pytorch_utils import Conv1D
    m,x = nn.Sequential(Conv1D(12, 20)),torch.randn(3, 20)
    plan = quiet(FC_Decomposer(1.0).plan, m)
    assert (plan['0'].in_features, plan['0'].out_features, plan['0'].rank) == (20, 12, 12)
    assert rel(full(m)(x), m(x)) < 1e-5
