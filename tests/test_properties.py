"What must hold for every shape, ratio and dtype, on examples that hypothesis chooses"
import json, math, tempfile, warnings
from fractions import Fraction
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fasterai.misc.all import *
from fasterai.core.modules import select
from fasterai.lowrank.factorize import balance
from fasterai.lowrank.svd import trunc_error
from fasterai.lowrank.ranks import Layer, round_rank

settings.register_profile('fixed', derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile('fixed')

sizes  = st.integers(1, 40)
seeds  = st.integers(0, 2**31)
ratios = st.integers(1, 1000).map(lambda i: i/1000)
floats = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
kinds  = st.sampled_from(['random', 'decaying', 'low rank', 'one', 'integer'])
# two factors, each rounded once
EPS    = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 4e-7, torch.float64: 1e-14}

def weight(m, n, seed, kind='random', dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=g, dtype=torch.float64)
    if kind == 'decaying': W = W * .8**torch.arange(n)
    if kind == 'low rank': W = W[:,:1] @ W[:1] + (W[:,-1:] @ W[-1:])
    if kind == 'one':      W = torch.zeros_like(W); W[seed % m, seed % n] = -3
    if kind == 'integer':  W = W.mul(2).round()
    return W.to(dtype)

def linear(*args, bias=True, **kw):
    W = weight(*args, **kw)
    lin = nn.Linear(W.shape[1], W.shape[0], bias, dtype=W.dtype)
    lin.weight.data = W
    return lin

def plan_of(m, policy, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        return FC_Decomposer(policy=policy, **kw).plan(m)

def layer(m, n, spectrum=None, name='fc'): return Layer(name, n, m, spectrum)

# ------------------------------------------------------------------ one layer

@given(sizes, sizes, seeds, ratios, kinds, floats)
def test_pair_is_optimal_and_its_error_as_predicted(m, n, seed, ratio, kind, dtype):
    lin = linear(m, n, seed, kind, dtype)
    plan = plan_of(lin, ratio)
    k,pair,W = plan[''].rank,plan.apply(lin),lin.weight.detach().double()
    S = torch.linalg.svdvals(W)
    err = (W - pair[1].weight.double() @ pair[0].weight.double()).norm().item()
    slack = EPS[dtype]*S.norm().item()
    assert S[k:].norm().item() - slack <= err <= S[k:].norm().item() + slack   # Eckart-Young: no rank-k matrix is closer
    assert abs(plan[''].error*S.norm().item() - err) <= slack + 1e-7*err   # a plan keeps 8 digits

@given(sizes, sizes, seeds, st.booleans(), floats)
def test_full_rank_is_the_layer(m, n, seed, bias, dtype):
    lin = linear(m, n, seed, bias=bias, dtype=dtype)
    pair,x = plan_of(lin, 1.0).apply(lin),torch.randn(4, n, dtype=dtype)
    torch.testing.assert_close(pair(x), lin(x), rtol=0, atol=2*EPS[dtype]*math.sqrt(n)*lin(x).abs().max().item() + EPS[dtype]*n)

@given(sizes, sizes, st.booleans(), ratios, st.integers(1, 16), st.booleans())
def test_parameter_counts_are_exact(m, n, bias, ratio, multiple, skip):
    net = nn.Sequential(nn.Linear(n, m, bias), nn.ReLU(), nn.Linear(m, n, bias))
    plan = plan_of(net, ratio, round_to=multiple, skip_unprofitable=skip)
    small = plan.apply(net)
    assert plan.params == sum(p.numel() for p in net.parameters())
    assert plan.params_after == sum(p.numel() for p in small.parameters())
    for o,i in zip(plan.layers, (0, 2)):
        assert o.params_after == sum(p.numel() for n_,p in small[i].named_parameters() if 'bias' not in n_)
    if skip: assert plan.params_after <= plan.params and all(o.params_after < o.weight_params for o in plan.replaced)

@given(sizes, sizes, seeds, kinds)
def test_error_falls_with_the_rank(m, n, seed, kind):
    lin = linear(m, n, seed, kind)
    W,measured = lin.weight.detach().double(),[]
    for k in range(1, min(m, n)+1):
        a,b = factorize(lin.weight).pair(k)
        measured.append((W - b.double() @ a.double()).norm().item())
    slack = EPS[torch.float32]*W.norm().item()
    assert all(y <= x + slack for x,y in zip(measured, measured[1:])) and measured[-1] <= slack
    s = spectrum(lin.weight)
    predicted = [trunc_error(s, k) for k in range(len(s)+1)]
    assert predicted == sorted(predicted, reverse=True) and predicted[-1] == 0
    assert (predicted[0] == pytest.approx(1) or not W.any())

@given(sizes, sizes, seeds, kinds, st.sampled_from(['gram', 'svd']))
def test_spectrum_is_the_one_of_the_reference(m, n, seed, kind, solver):
    W = weight(m, n, seed, kind)
    S = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(spectrum(W, solver=solver), S, rtol=1e-9, atol=(3e-7 if solver == 'gram' else 1e-14)*S[0].item())

@given(sizes, sizes, seeds, st.integers(-30, 30))
def test_balance_keeps_the_product(m, n, seed, power):
    A,B = weight(3, n, seed, dtype=torch.float64)*10.**power,weight(m, 3, seed+1, dtype=torch.float64)
    a,b = balance(A, B)
    torch.testing.assert_close(b @ a, B @ A, rtol=1e-12, atol=1e-12*10.**power)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-12, atol=0)

@given(sizes, sizes, seeds, ratios, kinds)
def test_transposed_weight_gives_transposed_factors(m, n, seed, ratio, kind):
    W,k = weight(m, n, seed, kind),max(1, int(ratio*min(m, n)))
    S = torch.linalg.svdvals(W.double())
    if k < len(S) and S[k-1] - S[k] < 1e-3*S[0]: return   # no gap: the best matrix is not unique
    (a,b),(c,d) = factorize(W).pair(k),factorize(W.T).pair(k)
    torch.testing.assert_close((b.double() @ a.double()).T, d.double() @ c.double(), rtol=0, atol=1e-6*S[0].item())

# ------------------------------------------------------------------ ranks

@given(st.integers(1, 1000), st.sampled_from([10, 100, 1000]), st.integers(1, 5000), st.integers(1, 5000))
def test_rank_ratio_is_exact(i, digits, m, n):
    share = Fraction(min(i, digits), digits)
    assert RankRatio(float(share)).rank(layer(m, n)) == max(1, math.floor(share*min(m, n)))

@given(st.integers(1, 99), st.integers(1, 5000))
def test_ratio_as_what_is_left_over(percent, size):
    removed = Fraction(percent, 100)
    assert RankRatio(1 - percent/100).rank(layer(size, size)) == max(1, math.floor((1 - removed)*size))

@given(st.integers(1, 300), st.integers(1, 300))
def test_break_even_by_trying_every_rank(m, n):
    smaller = [k for k in range(1, min(m, n)+1) if k*(m+n) < m*n]
    assert break_even(m, n) == max(smaller, default=0) == layer(m, n).break_even

@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20), st.integers(1, 100))
def test_energy_is_the_smallest_rank_that_keeps_it(values, percent):
    s,share = sorted(values, reverse=True),Fraction(percent, 100)
    total = sum(v*v for v in s)
    keeps = [k for k in range(1, len(s)+1) if sum(v*v for v in s[:k]) >= share*total]   # exact, in integers
    assert Energy(percent/100).rank(layer(20, len(s), s)) == keeps[0]

@given(st.integers(2, 12), st.integers(0, 9), st.sampled_from([1e-200, 1., 1e200]))
def test_energy_does_not_depend_on_scale(r, tail, scale):
    s = [2.**-i for i in range(r)] + [0.]*tail
    want = [Energy(e).rank(layer(99, r+tail, s)) for e in (.5, .9, .999, 1.)]
    assert [Energy(e).rank(layer(99, r+tail, [v*scale for v in s])) for e in (.5, .9, .999, 1.)] == want
    assert want[-1] == r
    assert trunc_error([v*scale for v in s], 1) == pytest.approx(trunc_error(s, 1), rel=1e-12)

@given(st.integers(10, 5000), st.floats(.9, .9999))
def test_energy_of_one_dominant_value_counts_the_small_ones(r, keep):
    small = math.sqrt(.2/r)*.999       # each far below the first, together a sixth of the energy
    s = [1.] + [small]*(r-1)
    k = Energy(keep).rank(layer(r, r, s))
    kept = lambda k: (1 + (k-1)*small**2)/(1 + (r-1)*small**2)
    assert kept(k) >= keep*(1 - 1e-8) and (k == 1 or kept(k-1) < keep)

@given(st.integers(1, 5000), st.integers(1, 200))
def test_round_rank(k, multiple):
    want = max([i for i in range(multiple, k+1, multiple)], default=k)
    assert round_rank(k, multiple) == want

@given(st.integers(1, 100), sizes, sizes)
def test_fixed_rank(k, m, n): assert FixedRank(k).rank(layer(m, n)) == min(k, m, n)

@given(st.one_of(ratios, st.integers(1, 99)))
def test_mk_policy_is_idempotent(x):
    assert mk_policy(mk_policy(x)) == mk_policy(x) == (FixedRank(x) if isinstance(x, int) else RankRatio(x))

# ------------------------------------------------------------------ names

parts = st.text('ab0[]_', min_size=1, max_size=3)
paths = st.lists(parts, min_size=1, max_size=3).map('.'.join)
trees = st.lists(paths, min_size=1, max_size=8, unique=True)

def below(name, container): return name.split('.')[:container.count('.')+1] == container.split('.')

@given(trees, paths)
def test_a_plain_name_selects_itself_and_what_is_below(names, pattern):
    want = [n for n in names if below(n, pattern)]
    if '[' in pattern: want = None      # may be a wildcard too; checked below
    try: got = select({n: (n,) for n in names}, pattern, 'layers')
    except ValueError as e:
        assert not want and repr(pattern) in str(e)
        return
    assert got == want if want is not None else {n for n in names if below(n, pattern)} <= set(got)

@given(trees)
def test_every_name_selects_its_layer(names):
    every = {n: (n,) for n in names}
    for n in names: assert n in select(every, n, 'layers')
    assert select(every, '*', 'layers') == select(every, names, 'layers') == names

@given(trees, st.integers(0, 7))
def test_aliases_select_too(names, i):
    n = names[i % len(names)]
    assert select({n: (n, 'other.name')}, 'other', 'layers') == [n]

@given(trees.filter(lambda t: not any('[' in n for n in t)), st.data())
def test_per_layer_exact_name_wins_then_order(names, data):
    keys = data.draw(st.lists(st.sampled_from([*names, *{n.split('.')[0] for n in names}, '*']), min_size=1, unique=True))
    ranks = {k: data.draw(st.one_of(st.none(), st.integers(1, 9))) for k in keys}
    def decide(n):
        if n in ranks: return ranks[n]
        return next((r for k,r in ranks.items() if k == '*' or below(n, k)), None)
    assert PerLayer(ranks).ranks([Layer(n, 9, 9) for n in names]) == {n: decide(n) for n in names}

# ------------------------------------------------------------------ JSON

@st.composite
def rows(draw):
    m,n,names = draw(sizes),draw(sizes),st.text(max_size=5)
    spectrum = draw(st.none() | st.lists(st.floats(0, 1e300), min_size=1, max_size=5).map(lambda s: tuple(sorted(s, reverse=True))))
    return LayerPlan(draw(names), n, m, spectrum, tuple(draw(st.lists(names, max_size=2))),
        draw(st.none() | st.integers(1, min(m, n))), draw(names), draw(names), *(draw(st.booleans()) for _ in range(3)))

@given(st.lists(rows(), max_size=4), st.text(max_size=9), st.integers(0, 10**12))
def test_any_plan_survives_json(layers, policy, params):
    plan = DecompositionPlan(tuple(layers), policy, params)
    with tempfile.TemporaryDirectory() as d:
        path = plan.save(Path(d)/'plan.json')
        again = DecompositionPlan.load(path)
        assert again == plan and type(again.layers) is tuple
        assert json.loads(path.read_text(encoding='utf-8'))['params'] == params

@given(sizes, sizes, seeds, floats, st.integers(-20, 20))
@settings(max_examples=25)
def test_a_real_plan_survives_json(m, n, seed, dtype, power):
    lin = linear(m, n, seed, dtype=dtype)
    if dtype == torch.float64: lin.weight.data *= 10.**power
    plan = plan_of(lin, .5)
    with tempfile.TemporaryDirectory() as d: assert DecompositionPlan.load(plan.save(Path(d)/'plan.json')) == plan
