"`inplace=True` gives the same network in the given object, and frees what it replaces"
import gc, weakref
import pytest, torch
from torch import nn
from fasterai.misc.all import *

pytestmark = pytest.mark.filterwarnings('ignore:.*layers grew:UserWarning')

class Odd(nn.Module):
    "Layers that are registered twice, kept in a plain list, or read by their parent"
    def __init__(self):
        super().__init__()
        self.a,self.attn = nn.Linear(16, 16),nn.MultiheadAttention(16, 2, batch_first=True)
        self.again,self.plain = self.a,[self.a]
        self.head = nn.Linear(16, 300, bias=False)
    def forward(self, x):
        x = self.again(self.plain[0](self.a(x)))
        return self.head(self.attn(x, x, x)[0])

def model():
    torch.manual_seed(0)
    return Odd().eval()

x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('data', [None, x], ids=['plain', 'calibrated'])
def test_same_network_as_the_copy(data):
    m = model()
    want = FC_Decomposer(.25).decompose(m, data)
    got = FC_Decomposer(.25).decompose(m, data, inplace=True)
    assert got is m and str(got) == str(want) and got.state_dict().keys() == want.state_dict().keys()
    assert all(map(torch.equal, got.state_dict().values(), want.state_dict().values()))
    assert torch.equal(got(x), want(x)) and count_params(got) == count_params(want)
    assert got.a is got.again is got.plain[0] and type(got.a) is nn.Sequential and type(got.attn.out_proj) is LowRankLinear

def test_a_model_that_is_one_layer_becomes_the_pair():
    lin = nn.Linear(8, 6)
    want = FC_Decomposer().decompose(lin)
    got = FC_Decomposer().decompose(lin, inplace=True)
    assert got is lin and type(lin) is nn.Sequential and all(map(torch.equal, lin.parameters(), want.parameters()))

def test_a_plan_in_place():
    m = model()
    plan = FC_Decomposer(.25, exclude='head').plan(m)
    head = m.head.weight
    assert plan.apply(m, inplace=True) is m and m.head.weight is head and count_params(m) == plan.params_after

def test_hooks_flags_and_training_stay():
    lin,calls = nn.Linear(8, 6).eval(),[]
    lin.register_forward_hook(lambda *_: calls.append('after'))
    lin.register_forward_pre_hook(lambda *_: calls.append('before'))
    lin.weight.requires_grad_(False)
    FC_Decomposer().decompose(lin, inplace=True)(torch.randn(2, 8))
    assert calls == ['before', 'after'] and not lin.training and not lin[1].training
    assert [p.requires_grad for p in lin.parameters()] == [False, False, True]

def test_it_trains_and_deepcopies_like_any_other():
    import copy
    m = FC_Decomposer(.25).decompose(model(), inplace=True)
    copy.deepcopy(m)(x).sum().backward()
    m(x).sum().backward()
    assert all(p.grad is not None for n,p in m.named_parameters() if 'out_proj' not in n or 'bias' not in n)

@pytest.mark.slow
def test_each_weight_is_freed_before_the_next_is_factorized(monkeypatch):
    from fasterai.lowrank import plan as room
    m = nn.Sequential(*[nn.Linear(20, 30) if i % 2 else nn.Linear(30, 20) for i in range(4)])
    weights,alive,mk = [weakref.ref(o.weight) for o in m],[],room._mk
    def watched(*args):
        gc.collect()
        alive.append(sum(w() is not None for w in weights))
        return mk(*args)
    monkeypatch.setattr(room, '_mk', watched)
    FC_Decomposer().decompose(m, inplace=True)
    assert alive == [4, 3, 2, 1]

def test_nothing_is_changed_where_the_arguments_are_wrong():
    m = model()
    before = {k: v.clone() for k,v in m.state_dict().items()}
    with pytest.raises(ValueError, match='no layer matches'): FC_Decomposer(exclude='hed').decompose(m, inplace=True)
    m.head.weight.data[0, 0] = float('nan')
    with pytest.raises(ValueError, match="'head' has 1 NaN"): FC_Decomposer().decompose(m, inplace=True)
    assert type(m.a) is nn.Linear and all(torch.equal(v, before[k]) for k,v in m.state_dict().items() if k != 'head.weight')
