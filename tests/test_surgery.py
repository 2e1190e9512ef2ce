"What a forward pass may ask of its layers, and how a model may be copied: the result computes the same, or the layer stays dense with a reason"
import copy, functools, pickle, threading, types, warnings, weakref
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from fasterai.core.check import swap_faults
from fasterai.core.modules import copy_with, find_linears
from fasterai.misc.all import *

pytestmark = pytest.mark.filterwarnings('ignore:.*layers grew', 'ignore:nothing to decompose')
x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

def rel(a, b): return ((a - b).norm()/b.norm()).item()

class Base(nn.Module):
    "Three layers of one size, by name and in a list"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(8, 8),nn.Linear(8, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.ReLU()])

# ------------------------------------------------------------------ questions that a pair answers otherwise

KINDS = {'Linear': 2., 'Sequential': 5., 'LowRankLinear': 7., nn.Linear: 3.}
def is_layer(m): return isinstance(m, nn.Linear)
def apply_if(m, x): return m(x).relu() if is_layer(m) else m(x)
@functools.singledispatch
def scaled(m, x): return m(x)*5
@scaled.register
def _(m: nn.Linear, x): return m(x)*2

class IsInstance(Base):
    def forward(self, x):
        for l in (self.a, self.b): x = l(x).relu() if isinstance(l, (nn.Conv2d, nn.Linear)) else l(x)
        return x
class TypeIs(Base):
    def forward(self, x): return self.a(x).relu() if type(self.a) is nn.Linear else self.a(x)
class TypeIn(Base):
    def forward(self, x): return self.a(x).relu() if type(self.a) not in (nn.Sequential, nn.ModuleList) else self.a(x)
class DunderClass(Base):
    def forward(self, x): return self.a(x)*KINDS[self.a.__class__.__name__]
class ByType(Base):
    def forward(self, x): return self.a(x)*KINDS.get(type(self.a), 1.)
class SubClass(Base):
    def forward(self, x): return self.a(x)*(2 if issubclass(type(self.a), nn.Linear) else 1)
class Match(Base):
    def forward(self, x):
        match self.a:
            case nn.Linear(): return self.a(x).relu()
            case _: return self.a(x)
class Helper(Base):
    def forward(self, x): return apply_if(self.a, x)
class Dispatch(Base):
    def forward(self, x): return scaled(self.a, x)
class Children(Base):
    def forward(self, x):
        for n,l in self.named_children():
            if n != 'layers': x = l(x) if not isinstance(l, nn.Linear) else F.linear(x, l.weight)
        return x
class AllModules(Base):
    def forward(self, x): return x*sum(1 for m in self.modules() if isinstance(m, nn.Linear)) + self.a(x)
class Counted(Base):
    def forward(self, x):
        for m in self.modules():
            if hasattr(m, 'weight'): x = x + m.weight.mean()
        return x
class Returned(Base):
    def pick(self): return [l for l in self.layers]
    def forward(self, x):
        for l in self.pick(): x = l(x)*2 if isinstance(l, nn.Linear) else l(x)
        return x
class Text(Base):
    def forward(self, x): return self.a(x)*(2 if 'Linear(' in f'{self.a}'[:8] else 1)
class Norms(Base):
    def forward(self, x): return self.a(self.b(x))*sum(p.square().sum() for p in self.parameters())
class LayerNorms(Base):
    def forward(self, x): return self.a(x)*sum(p.norm() for p in self.a.parameters())
class StateDict(Base):
    def forward(self, x): return F.linear(x, self.state_dict()['a.weight'])
class Functional(Base):
    def forward(self, x): return torch.func.functional_call(self.a, dict(weight=torch.eye(8)), (x,))
class Parameter(Base):
    def forward(self, x): return x @ self.get_parameter('a.weight').T
class Kept(Base):
    def __init__(self): super().__init__(); self.kept = dict(w=[self.a.weight])
    def forward(self, x): return self.a(x) + x @ self.kept['w'][0]
class KeptMethod(Base):
    def __init__(self): super().__init__(); self.f = self.a.forward
    def forward(self, x): return self.f(x)
class AssignsBias(Base):
    def forward(self, x):
        self.a.bias = nn.Parameter(torch.ones(8))
        return self.a(x)
class NamedParameters(Base):
    def forward(self, x): return self.a(x) + dict(self.named_parameters()).get('a.weight', torch.zeros(1)).sum()
class ParameterTable(Base):
    def forward(self, x): return self.a(x)*dict(self.named_parameters())['a.weight'].sum()
class ParameterComp(Base):
    def forward(self, x): return self.a(x)*{n: p for n,p in self.named_parameters()}['a.weight'].sum()
class FirstParameter(Base):
    def forward(self, x): return self.a(x)*next(iter(self.parameters())).sum() + list(self.parameters())[2].sum()
class NextNamed(Base):
    def forward(self, x): return self.a(x)*next(p for n,p in self.named_parameters() if n == 'a.weight').sum()
class CountsNamed(Base):
    def forward(self, x): return self.a(x)*sum(1 for n,_ in self.named_modules() if n)
class CountsList(Base):
    def forward(self, x): return self.a(x)*len(list(self.modules()))
class CountsStar(Base):
    def forward(self, x): return self.a(x)*len([*self.modules()])
class CountsSet(Base):
    def forward(self, x): return self.a(x)*len({n for n,_ in self.named_modules()})
class CountsFilter(Base):
    def forward(self, x): return self.a(x)*sum(1 for _ in filter(None, self.modules()))
class CountsLoop(Base):
    def forward(self, x):
        n = 0
        for m in self.modules(): n += 1
        return self.a(x)*n
class CountsHeld(Base):
    def forward(self, x):
        mods = list(self.modules())
        return self.a(x)*len(mods)
class Numbers(Base):
    def forward(self, x): return self.a(x)*max(i for i,_ in enumerate(self.modules()))
class SubName(Base):
    def forward(self, x): return self.a(x)*(2 if 'a.0' in dict(self.named_modules()) else 1)
class Dots(Base):
    def forward(self, x): return self.a(x)*sum(1 for n,_ in self.named_modules() if '.' in n)
class Applies(Base):
    def forward(self, x):
        got = []
        self.apply(lambda m: got.append(m))
        return self.a(x)*len(got)
class WholeText(Base):
    def forward(self, x): return self.a(x)*len(repr(self))*len(f'{self}')

DENSE = [IsInstance, TypeIs, TypeIn, DunderClass, ByType, SubClass, Match, Helper, Dispatch, Children, AllModules, Counted, Returned, Text, Norms,
         LayerNorms, StateDict, Functional, Parameter, Kept, KeptMethod, AssignsBias, NamedParameters, ParameterTable, ParameterComp, FirstParameter, NextNamed, CountsNamed,
         CountsList, CountsStar, CountsSet, CountsFilter, CountsLoop, CountsHeld, Numbers, SubName, Dots, Applies, WholeText]

@pytest.mark.parametrize('cls', DENSE, ids=lambda c: c.__name__)
def test_a_layer_that_is_asked_what_a_pair_cannot_answer_stays_dense(cls):
    m = cls().eval()
    y = m(x)
    plan = FC_Decomposer(1.).plan(m)
    kept = {o.name: o.reason for o in plan.skipped}
    assert kept and all(cls.__name__ in r or 'apply_if' in r or 'is_layer' in r for r in kept.values()), kept
    assert rel(plan.apply(m)(x), y) < 1e-5

# ------------------------------------------------------------------ reads that a LowRankLinear answers

HEAD = None
def attend(x, lin): return F.linear(x, lin.weight)

class Modules(Base):
    def forward(self, x): return x @ self._modules['a'].weight
class Dict(Base):
    def forward(self, x): return x @ self.__dict__['_modules']['a'].weight
class Vars(Base):
    def forward(self, x): return x @ vars(self)['_modules']['a'].weight
class Submodule(Base):
    def forward(self, x): return x @ self.get_submodule('a').weight
class Lambda(Base):
    def __init__(self):
        super().__init__()
        self.f = lambda x: x @ self.a.weight
    def forward(self, x): return self.f(x)
class Partial(Base):
    def __init__(self): super().__init__(); self.f = functools.partial(attend, lin=self.a)
    def forward(self, x): return self.f(x)
class Closure(Base):
    def __init__(self):
        super().__init__()
        a = self.a
        def f(x): return x @ a.weight
        self.f = f
    def forward(self, x): return self.f(x)
class Nested(Base):
    def forward(self, x):
        def step(x): return x @ self.a.weight
        return step(x)
class ClassCall(Base):
    def forward(self, x): return nn.Linear.forward(self.a, x)
class Static(Base):
    @staticmethod
    def f(x, l): return x @ l.weight
    def forward(self, x): return Static.f(x, self.a)
class InDict(Base):
    def __init__(self): super().__init__(); self.plain = dict(q=self.a)
    def forward(self, x): return x @ self.plain['q'].weight
class Appended(Base):
    def forward(self, x):
        todo = []
        todo.append(self.a)
        for l in todo: x = x @ l.weight
        return x
class Forwarding(nn.Module):
    "Passes on what it does not have to the layer inside"
    def __init__(self): super().__init__(); self.inner = nn.Linear(8, 8)
    def __getattr__(self, k): return super().__getattr__(k) if k == 'inner' else getattr(self.inner, k)
    def forward(self, x): return self.inner(x)
class Wrapped(Base):
    def __init__(self): super().__init__(); self.a = Forwarding()
    def forward(self, x): return x @ self.a.weight

READ = [Modules, Dict, Vars, Submodule, Lambda, Partial, Closure, Nested, ClassCall, Static, InDict, Appended, Wrapped]

@pytest.mark.parametrize('cls', READ, ids=lambda c: c.__name__)
def test_a_layer_that_is_read_offers_its_weight(cls):
    m = cls().eval()
    small = FC_Decomposer(1.).decompose(m)
    a = small.a.inner if cls is Wrapped else small.a
    assert type(a) is LowRankLinear and type(small.b) is nn.Sequential and rel(small(x), m(x)) < 1e-5
    y = m(x)
    with torch.no_grad(): a[1].weight.zero_()
    assert torch.equal(m(x), y) and not torch.equal(small(x), y)     # the copy reads its own layer

class Dtype(Base):
    def forward(self, x):
        x = x.to(next(self.parameters()).dtype)
        assert all(p.device == x.device for p in self.a.parameters())
        for l in self.layers:
            if isinstance(l, (nn.Conv2d, nn.Dropout)) or type(l) is nn.BatchNorm1d: continue
            x = l(x)
        return self.b(self.a(x))

def test_harmless_questions_keep_no_layer_dense():
    m = Dtype()
    small = FC_Decomposer(1.).decompose(m)
    assert [type(o) for o in (small.a, small.b, small.layers[0])] == [nn.Sequential]*3 and rel(small(x), m(x)) < 1e-5
class Picks(Base):
    "Goes through its modules and parameters, and would meet the same with pairs"
    def forward(self, x):
        for m in self.modules():
            if isinstance(m, nn.Dropout): x = x*m.p
        for m in self.modules(): m.seen = True
        n = sum(1 for m in self.modules() if isinstance(m, nn.Conv2d)) + sum(isinstance(m, nn.Dropout) for m in self.modules())
        n = n + len(list(self.children())) + (self.a in list(self.modules())) + any(m.training for m in self.modules())
        if x.ndim > 9: raise ValueError(f'not for {self}')
        x = x.to(next(iter(self.parameters())).dtype)
        return dict(self.named_modules())['a'](self.b(x))*n

def test_modules_that_are_picked_or_asked_alike_keep_no_layer_dense():
    m = Picks().eval()
    small = FC_Decomposer(1.).decompose(m)
    assert all(type(o) is nn.Sequential for o in (small.a, small.b)) and rel(small(x), m(x)) < 1e-5

def test_a_wrapper_is_not_counted_beside_its_layer():
    assert [o.name for o in FC_Decomposer(.5).plan(Wrapped()).layers] == ['a.inner', 'b', 'layers.0']

# ------------------------------------------------------------------ seen by running it

def _opaque(m): return sum(len(p) for p in m._parameters)      # number of letters in the names of parameters
class Opaque(Base):
    def forward(self, x): return self.b(self.a(x)*globals()['_opaque'](self.a))

def test_data_show_what_the_source_does_not():
    m = Opaque().eval()
    with pytest.warns(UserWarning, match="left dense: a .the model computes something else when it is replaced"):
        small = FC_Decomposer(1.).decompose(m, x)
    assert type(small.a) is nn.Linear and type(small.b) is nn.Sequential and rel(small(x), m(x)) < 1e-5

def _first(m): return m._parameters['weight']
class Fails(Base):
    def forward(self, x): return self.b(x @ globals()['_first'](self.a))

@pytest.mark.parametrize('data', [x, [x], iter([x, x])], ids=['tensor', 'list', 'iterator'])
def test_data_show_what_fails(data):
    m = Fails()
    with pytest.warns(UserWarning, match=r"left dense: a \(the model fails \(KeyError: 'weight'\) when it is replaced\)"): plan = FC_Decomposer(1.).plan(m, data)
    assert [o.name for o in plan.replaced] == ['b', 'layers.0'] and 'calibrated on' in plan.note

class Noisy(Base):
    def __init__(self): super().__init__(); self.calls = 0; self.register_buffer('seen', torch.zeros(1))
    def forward(self, x):
        self.calls += 1
        self.seen += 1
        return self.b(F.dropout(self.a(x), .5, training=True))*self.seen

def test_the_run_leaves_no_trace_and_survives_dropout_and_counters():
    m = Noisy().train()
    modules,params,rng = [id(o.__dict__) for o in m.modules()],[*m.parameters()],torch.get_rng_state()
    plan = FC_Decomposer(.5).plan(m, x)
    assert [o.name for o in plan.replaced] == ['a', 'b', 'layers.0']
    assert (m.calls, m.seen.item(), m.training, m.a.training) == (0, 0, True, True) and torch.equal(rng, torch.get_rng_state())
    assert all(p is q for p,q in zip(m.parameters(), params)) and modules == [id(o.__dict__) for o in m.modules()]

def test_an_interrupt_in_the_run_leaves_the_model_as_it_was():
    m,calls = Base(),[]
    def run(o):
        calls.append(type(o.a))
        if len(calls) == 3: raise KeyboardInterrupt
        return o.a(x)
    with pytest.raises(KeyboardInterrupt): swap_faults(m, find_linears(m), run)
    assert calls == [nn.Linear, nn.Linear, nn.Sequential] and [type(o) for o in (m.a, m.b)] == [nn.Linear]*2 and m.a.weight.shape == (8, 8)

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_no_fault(dtype):
    torch.manual_seed(0)
    m = nn.Sequential(*[o for _ in range(6) for o in (nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16), nn.LayerNorm(16))]).to(dtype)
    assert swap_faults(m, find_linears(m), lambda o: o(torch.ones(3, 16, dtype=dtype))) == {}

def test_a_source_that_is_not_there_is_said():
    space = dict(nn=nn, Base=Base)
    exec('class Hidden(Base):\n    def forward(self, x): return x @ self.layers[0].weight\n', space)
    m = space['Hidden']()
    plan = FC_Decomposer(1.).plan(m)
    assert 'could not read Hidden.forward: pass data to have the result checked' in plan.title
    assert 'could not read' not in FC_Decomposer(1.).plan(m, x).title and rel(plan.apply(m)(x), m(x)) < 1e-5

# ------------------------------------------------------------------ copies

class Rebuilds(Base):
    def __deepcopy__(self, memo):
        new = type(self)()
        new.load_state_dict(self.state_dict())
        return new
class Shallow(Base):
    def __deepcopy__(self, memo):
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new
class Itself(Base):
    def __deepcopy__(self, memo): return self
class Proper(Base):
    def __deepcopy__(self, memo):
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update({k: copy.deepcopy(v, memo) for k,v in self.__dict__.items()})
        new.by_itself = True
        return new

@pytest.mark.parametrize('cls', [Rebuilds, Shallow, Itself, Proper], ids=lambda c: c.__name__)
@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: nn.Sequential(m, nn.ReLU()), lambda m: nn.ModuleDict(dict(p=m, q=m, r=nn.Linear(8, 4)))],
                         ids=['root', 'nested', 'twice'])
def test_a_module_that_copies_itself(cls, wrap):
    m = wrap(cls())
    plan = FC_Decomposer(.25).plan(m)
    before = {k: v.clone() for k,v in m.state_dict().items()}
    for small in (plan.apply(m), plan.skeleton(m)):
        assert len(plan.replaced) >= 3 and count_params(small) == plan.params_after
        mine = {t.untyped_storage().data_ptr() for t in m.parameters()}
        assert not mine & {t.untyped_storage().data_ptr() for t in small.parameters()}
        assert sum(is_pair(o) for o in small.modules()) == len(plan.replaced)
        assert all(getattr(o, 'by_itself', False) for o in small.modules() if type(o) is Proper)    # a proper one is not passed over
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items()) and type(next(o for o in m.modules() if isinstance(o, cls)).a) is nn.Linear

@pytest.mark.parametrize('thing', [threading.Lock, lambda: open(__file__), lambda: (i for i in 'ab'), lambda: {'deep': [threading.Lock()]}],
                         ids=['lock', 'file', 'generator', 'inside'])
def test_what_cannot_be_copied_is_named_before_the_work(thing, monkeypatch):
    from fasterai.lowrank import plan as room
    m = nn.Sequential(Base(), nn.ReLU())
    m[0].extra = thing()
    monkeypatch.setattr(room, '_mk', None)      # no factorization is reached
    with pytest.raises(TypeError, match=r"'0.extra' of the model, a \w+, cannot be copied .*inplace=True"): FC_Decomposer(.5).decompose(m)
    monkeypatch.undo()
    assert FC_Decomposer(.5).decompose(m, inplace=True) is m and is_pair(m[0].a)

def test_attributes_go_to_the_pair_and_its_parameters():
    m = Base()
    m.a.gain,m.a.info,m.a.weight.no_weight_decay,m.a.bias.lr_scale,m.a.weight.main_grad = 2.,dict(u=[1]),True,.1,torch.zeros(8, 8)
    m.layers.append(nn.LayerNorm(8))
    m.layers[2].weight.no_weight_decay = True
    for small in (FC_Decomposer(.25).decompose(m), FC_Decomposer(.25).plan(m).skeleton(m), FC_Decomposer(.25).decompose(copy.copy(m), inplace=True)):
        A,B = small.a[0].weight,small.a[1].weight
        assert small.a.gain == 2. and small.a.info == dict(u=[1]) and A.no_weight_decay and B.no_weight_decay and small.a[1].bias.lr_scale == .1
        assert not hasattr(A, 'main_grad') and not hasattr(small.a[1].bias, 'no_weight_decay') and small.layers[2].weight.no_weight_decay
        dense = to_dense(small)
        assert dense.a.gain == 2. and dense.a.weight.no_weight_decay and dense.a.bias.lr_scale == .1 and vars(dense.a).keys() >= {'gain', 'info'}

def test_attributes_belong_to_the_copy():
    m = Base()
    m.a.info,m.a.owner = dict(u=[1]),[m]
    small = FC_Decomposer(.25).decompose(m)
    assert small.a.info is not m.a.info and small.a.owner[0] is small

# ------------------------------------------------------------------ to_dense

def designed(): return nn.Sequential(nn.Linear(32, 64), nn.Sequential(nn.Linear(64, 8, bias=False), nn.Linear(8, 64)), nn.Linear(64, 16))

@pytest.mark.parametrize('via', [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['as it is', 'deepcopy', 'pickle'])
def test_a_bottleneck_of_the_model_stays(via):
    m = designed()
    dense = to_dense(via(FC_Decomposer(.5).decompose(m)))
    assert str(dense) == str(m) and torch.equal(dense[1][0].weight, m[1][0].weight)
    dense.load_state_dict(m.state_dict())

def test_a_skeleton_knows_its_pairs_and_a_stranger_needs_the_plan():
    m = designed()
    plan = FC_Decomposer(.5).plan(m)
    small = plan.skeleton(m)
    small.load_state_dict(plan.apply(m).state_dict())
    assert str(to_dense(small)) == str(m)
    for o in small.modules(): o.__dict__.pop('_low_rank', None)
    with pytest.warns(UserWarning, match=r'nothing to merge: 0, 1, 2 may be bottlenecks of the model itself. Pass to_dense\(model, plan\)'):
        assert str(to_dense(small)) == str(small)
    assert str(to_dense(small, plan)) == str(m)

# ------------------------------------------------------------------ reasons whose advice works

class Twice(nn.Module):
    def forward(self, t): return 2*t

def both(lin):
    for k in ('weight','bias'): parametrize.register_parametrization(lin, k, Twice())
def bias(lin): parametrize.register_parametrization(lin, 'bias', Twice())
def pruned_twice(lin):
    prune.random_unstructured(lin, 'weight', .3)
    prune.l1_unstructured(lin, 'weight', .3)
def pruned_both(lin):
    for k in ('weight','bias'): prune.l1_unstructured(lin, k, .3)

@pytest.mark.filterwarnings('ignore:.*weight_norm')
@pytest.mark.parametrize('do', [both, bias, nn.utils.weight_norm, nn.utils.spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm,
    parametrizations.orthogonal, lambda l: prune.l1_unstructured(l, 'weight', .5), lambda l: prune.l1_unstructured(l, 'bias', .5),
    pruned_twice, pruned_both], ids=['both', 'bias', 'weight_norm', 'spectral_norm', 'new weight_norm', 'new spectral_norm', 'orthogonal', 'pruned', 'pruned bias',
    'pruned twice', 'pruned both'])
def test_the_advice_of_a_reason_works(do):
    m = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).eval()
    do(m[0])
    y,why = m(x),FC_Decomposer(1.).plan(m)['0'].reason
    calls = why.split('; ')[-1].removesuffix(' first').replace('), torch', ')|torch').split('|')
    assert all(o.startswith('torch.') for o in calls)
    for o in calls: eval(o, dict(torch=torch, layer=m[0]))
    small = FC_Decomposer(1.).decompose(m)
    assert is_pair(small[0]) and rel(small(x), y) < 1e-5

# ------------------------------------------------------------------ matrices that are no layers

class Matrices(nn.Module):
    def __init__(self):
        super().__init__()
        self.w,self.table,self.gain = nn.Parameter(torch.randn(8, 6)),nn.Parameter(torch.randn(9, 8)),nn.Parameter(torch.randn(8, 8))
        self.ws,self.experts = nn.ParameterList([torch.randn(6, 6) for _ in range(2)]),nn.Parameter(torch.randn(3, 6, 5))
        self.register_buffer('basis', torch.randn(6, 6))
        self.rnn,self.attn = nn.LSTM(6, 7, 2, bidirectional=True),nn.MultiheadAttention(6, 2, kdim=4, vdim=5)
    def forward(self, i):
        w = self.w
        return self.experts[0].T @ ((self.table[i]*self.gain[0]) @ w @ self.basis.T @ self.ws[0]).T

def test_matrices_that_are_no_layers_have_rows_with_their_size():
    m = Matrices()
    rows = {o.name: (o.weight_params, o.reason) for o in FC_Decomposer(.5).plan(m).layers}
    par = 'a parameter, not a layer'
    assert rows == {'w': (48, par), 'experts': (90, 'stacked matrices: '+par), 'basis': (36, 'a buffer, not a layer'), 'ws.0': (36, par), 'ws.1': (36, par),
        'rnn': (sum(p.numel() for p in m.rnn.parameters() if p.ndim == 2), 'recurrent weights of LSTM'), 'attn.out_proj': (36, rows['attn.out_proj'][1]),
        **{f'attn.{k}_proj_weight': (6*n, f'{k} projection: {par}') for k,n in dict(q=6, k=4, v=5).items()}}

def test_stacked_rows_survive_saving(tmp_path):
    plan = FC_Decomposer(.5).plan(Matrices())
    again = DecompositionPlan.load(plan.save(tmp_path/'p.json'))
    assert again == plan and again['experts'].weight_params == 90

# ------------------------------------------------------------------ weights that are somewhere else, or read later

def test_a_head_can_be_read_and_resized_but_not_written_to():
    import transformers as tf
    torch.manual_seed(0)
    m = tf.LlamaForCausalLM(tf.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50)).eval()
    small,ids = FC_Decomposer(.5).decompose(m),torch.arange(6)[None]
    y,head = small(ids).logits,small.get_output_embeddings()
    assert type(head) is LowRankHead and is_pair(head) and torch.equal(head.weight, head[1].weight @ head[0].weight)
    def add(): head.weight.data += 1
    def scale():
        with torch.no_grad(): head.weight.mul_(2)
    for f in (add, scale):
        with pytest.raises(RuntimeError, match=r'what is written to it would be lost.*to_dense\(model\)'): f()
    head.weight.square().sum().backward()
    assert head[0].weight.grad.any() and type(head.weight.T) is torch.Tensor
    for n in (50, 60, 40):
        again = copy.deepcopy(small)
        again.resize_token_embeddings(n)
        k = min(n, 50)
        assert again(ids).logits.shape[-1] == n and (again(ids).logits[...,:k] - y[...,:k]).abs().max() < 1e-5
    assert torch.equal(pickle.loads(pickle.dumps(small))(ids).logits, y) and type(to_dense(small).lm_head) is nn.Linear

def test_merging_an_adapter_asks_for_a_dense_layer():
    peft = pytest.importorskip('peft')
    def tuned(m): return peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=['a'], init_lora_weights=False)).eval()
    m = tuned(Norm())
    small,y = FC_Decomposer(1.).decompose(m),m(x)
    assert is_pair(small.base_model.model.a.base_layer) and rel(small(x), y) < 1e-5
    with pytest.raises(RuntimeError, match='what is written to it would be lost'): copy.deepcopy(small).merge_and_unload()
    assert rel(to_dense(small).merge_and_unload()(x), y) < 1e-5
    pairs = FC_Decomposer(.5).decompose(Norm())     # the other way round: adapters on the factors
    m = peft.get_peft_model(pairs, peft.LoraConfig(r=2, target_modules=['a.0', 'a.1'], init_lora_weights=False)).eval()
    y = m(x)
    assert rel(m.merge_and_unload()(x), y) < 1e-5

class Norm(Base):
    def forward(self, x): return self.b(self.a(x).relu())

@pytest.mark.parametrize('how', ['cpu', 'disk', 'dispatch'])
def test_accelerate(how, tmp_path):
    accelerate = pytest.importorskip('accelerate')
    m = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    y = m(x)
    if how == 'dispatch': accelerate.dispatch_model(m, {str(i): 'cpu' for i in range(3)}, main_device='cpu', force_hooks=True)
    else: accelerate.cpu_offload(m, 'cpu') if how == 'cpu' else accelerate.disk_offload(m, tmp_path/'off', 'cpu')
    for data in (None, x):
        reasons = {o.reason for o in FC_Decomposer(1.).plan(m, data).layers}
        assert len(reasons) == 1 and ('dispatched' if how == 'dispatch' else 'offloaded') in (why := reasons.pop()) and 'accelerate' in why
    accelerate.hooks.remove_hook_from_module(m, recurse=True)       # what the reason says
    small = FC_Decomposer(1.).decompose(m, x)
    assert is_pair(small[0]) and is_pair(small[2]) and rel(small(x), y) < 1e-5 and rel(m(x), y) < 1e-6

def test_sharded_models_are_named():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, fully_shard
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        for wrap in (lambda m: FSDP(m, device_id=torch.device('cpu')), lambda m: FSDP(m, device_id=torch.device('cpu'), use_orig_params=True),
                     lambda m: fully_shard(m, mesh=init_device_mesh('cpu', (1,))) or m, lambda m: [fully_shard(o, mesh=init_device_mesh('cpu', (1,))) for o in m] and m):
            m = wrap(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)))
            plan = FC_Decomposer(.5).plan(m)
            assert len(plan) == 2 and all('sharded' in o.reason and 'before it is' in o.reason for o in plan.layers)
            with pytest.raises(ValueError, match='the model is sharded by FSDP: decompose the model before it is wrapped'): plan.apply(m)
    finally: dist.destroy_process_group()

def test_a_zero_3_weight_is_named():
    m = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    m[0].weight.ds_id,m[0].weight.data = 1,torch.empty(0)
    plan = FC_Decomposer(.5).plan(m)
    assert 'sharded by DeepSpeed ZeRO-3' in plan['0'].reason and plan['1'].rank == 2

# ------------------------------------------------------------------ what a copy, other weights, other data change

class ById(Base):
    def __init__(self, tab=lambda m: {id(m.a): 3.}): super().__init__(); self.tab = tab(self)
    def forward(self, x): return self.b(self.a(x))*(3. if id(self.a) in self.tab else 1.)

@pytest.mark.parametrize('tab', [lambda m: {id(m.a): 3.}, lambda m: [(id(m.a.weight), 2)], lambda m: dict(deep={id(m.b)}),
    lambda m: weakref.WeakKeyDictionary({m.a: 3.}), lambda m: [weakref.ref(m.a)]], ids=['dict', 'list', 'set', 'weak keys', 'weak'])
def test_a_copy_of_a_model_that_knows_its_parts_by_id_warns(tab):
    with pytest.warns(UserWarning, match=r"'tab' knows parts of the model by id\(…\) or weak references, .*inplace=True") as w:
        FC_Decomposer(.5).decompose(ById(tab))
    assert w[0].filename == __file__

def test_ids_stay_in_place_and_other_numbers_are_no_ids():
    m,other = ById(),ById(lambda m: [3, 1 << 40, id(x)])
    want = m(x)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*by id')
        FC_Decomposer(.5).decompose(other)
        copy_with(nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4)))    # holds weak references, and makes them anew
        assert rel(FC_Decomposer(1.).decompose(m, inplace=True)(x), want) < 1e-5

def _mlp(*ns):
    torch.manual_seed(0)
    return nn.Sequential(*[o for a,b in zip(ns, ns[1:]) for o in (nn.Linear(a, b), nn.ReLU())][:-1])

def _told(f, what):
    "How often `f()` warns of `what`"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        f()
    return sum(what in str(o.message) for o in w)

rows = torch.randn(200, 24, generator=torch.Generator().manual_seed(1))

@pytest.mark.parametrize('change', [lambda w: w.add_(1e-3*torch.randn(w.shape)), lambda w: w.neg_(), lambda w: w.copy_(w.flip(0)),
                                    lambda w: w[0].mul_(1.1)], ids=['step', 'sign', 'order', 'one row'])
def test_a_calibrated_plan_notices_other_weights(change):
    m = _mlp(24, 40, 16, 32)
    plan = FC_Decomposer(.3).plan(m, rows)
    with torch.no_grad(): [change(m[i].weight) for i in (2, 4)]
    with pytest.warns(UserWarning, match="the weights of '2' .and another. changed since the plan was made: its errors no longer hold. Plan again"):
        plan.apply(m)
    assert not _told(lambda: plan.skeleton(m), 'changed') and not _told(lambda: plan.apply(m, data=rows), 'changed')

def test_a_plan_without_data_takes_any_weights():
    m = _mlp(24, 40, 16, 32)
    plan = FC_Decomposer(.3).plan(m)
    with torch.no_grad(): m[0].weight.neg_()
    assert not _told(lambda: plan.apply(m), 'changed')

@pytest.mark.parametrize('was,now', [('float32', 'float32'), ('float32', 'float64'), ('float64', 'float32'), ('float32', 'float16'), ('float32', 'bfloat16'),
                                     ('bfloat16', 'float32'), ('float16', 'bfloat16')])
@pytest.mark.parametrize('size', [1e-3, 1., 30.])
def test_the_same_weights_in_another_dtype_are_the_same(was, now, size):
    m = _mlp(24, 40, 16).to(getattr(torch, was))
    with torch.no_grad(): [p.mul_(size) for p in m.parameters()]
    plan = FC_Decomposer(.3).plan(m, rows.to(m[0].weight.dtype))
    assert not _told(lambda: plan.apply(copy.deepcopy(m).to(getattr(torch, now))), 'changed')
    with torch.no_grad(): m[2].weight += .1*size*torch.randn(m[2].weight.shape).to(m[2].weight)
    assert _told(lambda: plan.apply(m.to(getattr(torch, now))), "the weight of '2' changed") == 1

@pytest.mark.parametrize('data', [rows[:0], [rows[:0]]*2, [(rows[:0], torch.zeros(0))]], ids=['tensor', 'list', 'tuples'])
def test_data_without_rows(data):
    with pytest.raises(ValueError, match='data has no rows: .* empty'): FC_Decomposer().plan(_mlp(24, 40, 16), data)

def test_an_empty_batch_among_others_is_none_and_data_that_reach_nothing_warn():
    m = _mlp(24, 40, 16)
    assert all(o.calibrated for o in FC_Decomposer().plan(m, [rows[:0], rows]).layers)
    class Around(Base):
        def forward(self, x): return x*2
    with pytest.warns(UserWarning, match='none of the layers to be replaced is called on the data: all have plain SVD'): FC_Decomposer(.5).plan(Around(), x)

def test_a_budget_without_data_says_of_what_its_errors_are():
    m,said = _mlp(24, 40, 16),'without data: errors of the weights'
    plan,seen = (FC_Decomposer(policy=ParamBudget(.5)).plan(m, d) for d in (None, rows))
    assert said in plan.note and said not in seen.note
    assert said in FC_Decomposer(.5).plan(m).replan(ParamBudget(.5)).note and said not in seen.replan(ParamBudget(.4)).note
    assert said not in plan.replan(.5).note and said not in FC_Decomposer(.5).plan(m).note

class Mapped(Base):
    def forward(self, x): return torch.vmap(lambda r: self.b(self.a(r).relu()))(x)

def test_calibration_names_vmap():
    m = Mapped()
    with pytest.raises(ValueError, match="'a' is called inside of vmap, where calibration cannot look: decompose without data"):
        FC_Decomposer(.5).decompose(m, x)
    assert rel(FC_Decomposer(1.).decompose(m)(x), m(x)) < 1e-5

def test_parameters_made_in_inference_mode():
    with torch.inference_mode(): m = _mlp(24, 40, 16)
    small = FC_Decomposer(1.).decompose(m, rows)
    with torch.no_grad(): assert is_pair(small[0]) and is_pair(small[2]) and rel(small(rows), m(rows)) < 1e-5
    with pytest.raises(RuntimeError, match=r'made in inference_mode; deepcopy\(model\) outside of it'): FC_Decomposer(.5).plan(m, rows, sensitivity='full')
    assert FC_Decomposer(.5).plan(copy.deepcopy(m), rows, sensitivity='full').sensitivity == 'full'
    with pytest.warns(UserWarning, match='sensitivity cannot be measured .*inference_mode'): FC_Decomposer(policy=ParamBudget(.5)).plan(m, rows)

@pytest.mark.filterwarnings('ignore:`torch.jit')
@pytest.mark.parametrize('how', [torch.jit.script, lambda m: torch.jit.trace(m, rows)], ids=['script', 'trace'])
def test_a_scripted_model_is_told_to_come_before(how):
    with pytest.warns(UserWarning, match='decompose before scripting'): FC_Decomposer(.5).plan(how(_mlp(24, 40, 16)))
