"Any two methods, in either order: each does what its plan promises, the result is saved, loaded and exported, or one sentence says what comes first"
import copy, itertools, warnings
import numpy as np, pytest, torch
from timm.models.vision_transformer import Block
from torch import nn
from fasterai.all import *

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning')
X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))

# ------------------------------------------------------------------ two networks

def convs():
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5))

class Tokens(nn.Module):
    "A convolution and a batch norm make tokens, attention reads them"
    def __init__(self):
        super().__init__()
        self.stem,self.norm = nn.Conv2d(3, 16, 4, 4),nn.BatchNorm2d(16)
        self.block,self.head = Block(16, 4),nn.Linear(16, 5)
    def forward(self, x): return self.head(self.block(self.norm(self.stem(x)).flatten(2).transpose(1, 2)).mean(1))

def built(make):
    torch.manual_seed(0)
    m = make()
    for o in m.modules():
        if isinstance(o, nn.BatchNorm2d):
            for p,low in ((o.weight, .5), (o.bias, -.5), (o.running_mean, -.5), (o.running_var, .5)): nn.init.uniform_(p, low, low + 1)
    return m.eval()

# ------------------------------------------------------------------ five methods, and what each promises

PLANS = dict(fold=lambda m: BN_Folder().plan(m, X), prune=lambda m: Pruner(.7).plan(m, X), decompose=lambda m: FC_Decomposer(.4).plan(m, X),
             sparsify=lambda m: Sparsifier(.5).plan(m, X), quantize=lambda m: Quantizer(8).plan(m, X))
NOTHING = {     # the second of these leaves every layer as it is, and says why
    ('quantize', 'fold'): 'fold before quantizing', ('quantize', 'decompose'): 'decompose before quantizing',
    ('quantize', 'sparsify'): 'sparsify before quantizing', ('quantize', 'quantize'): 'already int8', ('decompose', 'decompose'): 'half of a low-rank pair'}
LOST = {'fold': 1e-5, 'quantize': .03}      # of the output at most

def apart(m, n): return float((m(X) - n(X)).norm()/n(X).norm())
def zeros(w): return int((w == 0).sum())
def weight(m, name): return dict(m.named_modules())[name].weight

def kept_promise(name, plan, before, after):
    "Of one step, by what is there afterwards"
    mods = dict(after.named_modules())
    if name in LOST: assert apart(after, before) < LOST[name]
    if name == 'fold': assert not any(isinstance(mods[o.name], nn.BatchNorm2d) for o in plan.replaced)
    if name == 'prune': assert count_macs(after, X[:2]) <= .7*count_macs(before, X[:2])
    if name == 'decompose': assert all(np.linalg.matrix_rank(is_pair(mods[o.name]) and product(mods[o.name]), tol=1e-4) <= o.rank for o in plan.replaced)
    if name == 'quantize': assert all('qweight' in mods[o.name]._buffers for o in plan.replaced)
    if name == 'sparsify': assert all(zeros(mods[o.name].weight) >= o.zeros for o in plan.replaced) and plan.sparsity > .4
    if name in ('fold', 'prune', 'decompose', 'sparsify'): assert count_params(after) == plan.params_after

def product(pair): return (pair[1].weight @ pair[0].weight).double().numpy()

@pytest.fixture(scope='module')
def first():
    "Network and first method -> plan and result"
    res = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for make,a in itertools.product((convs, Tokens), PLANS):
            plan = PLANS[a](m := built(make))
            res[make,a] = plan,plan.apply(m)
            kept_promise(a, plan, m, res[make,a][1])
    return res

@torch.no_grad()
def second(first, make, a, b):
    plan,one = first[make,a]
    then = PLANS[b](one)
    return [plan, then], one, then.apply(one)

# ------------------------------------------------------------------ all pairs

@pytest.mark.parametrize('make', (convs, Tokens))
@pytest.mark.parametrize('a, b', [*itertools.product(PLANS, PLANS)])
@torch.no_grad()
def test_any_two(first, make, a, b, tmp_path):
    state = copy.deepcopy(first[make,a][1].state_dict())
    if (a, b) == ('quantize', 'prune'):
        with pytest.raises(ValueError, match='nothing to prune .*: prune first'): second(first, make, a, b)
        return
    plans,one,two = second(first, make, a, b)
    assert all(torch.equal(v, state[k]) for k,v in one.state_dict().items())
    if (a, b) in NOTHING: assert not plans[1].replaced and any(NOTHING[a,b] in o.reason for o in plans[1].layers) and torch.equal(two(X), one(X))
    elif (a, b) == ('fold', 'fold'): assert not len(plans[1])
    else:
        assert plans[1].replaced
        kept_promise(b, plans[1], one, two)
    save_compressed(two, tmp_path/'small', plans)
    again = load_compressed(tmp_path/'small', lambda: built(make)).eval()
    assert torch.equal(again(X), two(X))

@pytest.mark.parametrize('make', (convs, Tokens))
@torch.no_grad()
def test_zeros_stay_where_weights_are_only_scaled_or_rounded(first, make):
    plan,_ = first[make,'sparsify']
    for b in ('fold', 'quantize'):
        two = second(first, make, 'sparsify', b)[2]
        for o in plan.replaced:
            m = dict(two.named_modules())[o.name]
            assert zeros(m.weight.dequantize() if m.weight.is_quantized else m.weight) >= o.zeros, (b, o.name)

@pytest.mark.parametrize('make', (convs, Tokens))
@pytest.mark.parametrize('a, b', [('fold', 'prune'), ('prune', 'decompose'), ('prune', 'quantize'), ('decompose', 'quantize'), ('sparsify', 'quantize')])
@torch.no_grad()
def test_two_of_them_in_onnx_runtime(first, make, a, b, tmp_path):
    pytest.importorskip('onnxruntime')
    two = second(first, make, a, b)[2]
    export_onnx(two, tmp_path/'m.onnx', X[:4], exporter='torchscript')
    torch.testing.assert_close(torch.from_numpy(np.asarray(ONNXModel(tmp_path/'m.onnx')(X[:4].numpy()))), two(X[:4]), rtol=1e-3, atol=1e-3)
