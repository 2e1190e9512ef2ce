"What ParamBudget promises: within the budget, near the optimum, and saying how near"
import itertools, math, time, warnings
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fasterai.misc.all import *
from fasterai.lowrank.ranks import Layer

fixed = settings(derandomize=True, deadline=None, max_examples=80, database=None)

# ------------------------------------------------------------------ helpers

def spectrum_of(r, seed, decay=.9):
    g = np.random.default_rng(seed)
    return tuple(np.sort(np.abs(g.standard_normal(r))*decay**np.arange(r) + 1e-3)[::-1].tolist())

def layer(m, n, seed=0, name=None, weighted=True, decay=.9, **kw):
    return Layer(name or f'l{seed}', n, m, spectrum_of(min(m, n), seed, decay), weighted=weighted, **kw)

def unit(policy, o): return {'params': 1, 'macs': o.positions, 'bytes': o.itemsize}[policy.cost]

def spent(policy, layers, ranks):
    return sum(unit(policy, o)*(o.in_features*o.out_features if ranks[o.name] is None else ranks[o.name]*(o.in_features + o.out_features)) for o in layers)

def error(layers, ranks):
    "Sum of squared errors of weighted layers"
    return sum(0 if ranks[o.name] is None else float(np.square(o.spectrum[ranks[o.name]:]).sum()) for o in layers)

def dense(policy, layers): return spent(policy, layers, {o.name: None for o in layers})

def options(o, step=1): return [None, *range(step, (o.in_features*o.out_features-1)//(o.in_features+o.out_features)+1, step)]

def brute(policy, layers, budget, step=1):
    "Least error of all combinations within the budget"
    res = math.inf
    for ks in itertools.product(*(options(o, step) for o in layers)):
        r = {o.name: k for o,k in zip(layers, ks)}
        if spent(policy, layers, r) <= budget: res = min(res, error(layers, r))
    return res

def many(count=60, seed=0):
    g = np.random.default_rng(seed)
    sizes = [(768, 768), (3072, 768), (768, 3072), (512, 1000), (64, 64)]
    return [layer(*sizes[g.integers(len(sizes))], seed=i, decay=g.uniform(.98, 1)) for i in range(count)]

sizes = st.integers(2, 14)
lists = st.lists(st.tuples(sizes, sizes, st.integers(0, 10**6), st.sampled_from([.5, .8, 1.])), min_size=1, max_size=4)
def layers_of(specs): return [layer(m, n, s, f'l{i}', decay=d) for i,(m,n,s,d) in enumerate(specs)]
shares = st.integers(5, 100).map(lambda i: i/100)

def solved(policy, layers):
    try: return policy.solve(layers)
    except ValueError as e:
        assert 'need at least' in str(e)

# ------------------------------------------------------------------ the solution

@fixed
@given(lists, shares)
def test_within_the_budget_and_no_layer_grows(specs, ratio):
    ls,p = layers_of(specs),ParamBudget(ratio)
    if (s := solved(p, ls)) is None: return
    assert list(s.ranks) == [o.name for o in ls]
    assert spent(p, ls, s.ranks) == s.cost <= s.budget == pytest.approx(ratio*dense(p, ls))
    for o in ls:
        if (k := s.ranks[o.name]) is not None: assert 1 <= k <= o.break_even and k*(o.in_features+o.out_features) < o.in_features*o.out_features

@fixed
@given(lists, shares)
def test_error_is_within_the_certificate_of_the_brute_force_optimum(specs, ratio):
    ls,p = layers_of(specs),ParamBudget(ratio)
    s = solved(p, ls)
    least = brute(p, ls, ratio*dense(p, ls))
    if s is None: assert least == math.inf; return
    slack = 1e-9*sum(np.square(o.spectrum).sum() for o in ls)
    assert s.error == pytest.approx(error(ls, s.ranks), abs=slack)
    assert s.bound <= least + slack and least <= s.error + slack
    assert s.error <= 1.05*least + slack       # far inside what is certified, on small problems

@pytest.mark.parametrize('ratio', [.25, .4, .6, .8])
@pytest.mark.parametrize('seed', range(5))
def test_brute_force_in_steps(ratio, seed):
    g = np.random.default_rng(seed)
    ls = [layer(*g.integers(70, 200, 2).tolist(), seed=10*seed+i, decay=g.uniform(.9, 1)) for i in range(3)]
    p = ParamBudget(ratio)
    s,least = p.solve(ls),brute(p, ls, ratio*dense(p, ls), 8)
    assert s.bound*(1 - 1e-9) <= least <= s.error*(1 + 1e-9) and s.error <= 1.05*least

@fixed
@given(lists, shares)
def test_nothing_that_fits_is_left_unspent(specs, ratio):
    ls,p = layers_of(specs),ParamBudget(ratio)
    if (s := solved(p, ls)) is None: return
    for o in ls:
        for k in options(o):
            r = s.ranks | {o.name: k}
            if spent(p, ls, r) <= s.budget: assert error(ls, r) >= s.error - 1e-12*(1 + s.error)

@fixed
@given(lists, st.lists(shares, min_size=2, max_size=5))
def test_a_larger_budget_is_never_worse(specs, ratios):
    ls = layers_of(specs)
    errs = [s.error for r in sorted(ratios) if (s := solved(ParamBudget(r), ls)) is not None]
    assert all(b <= a*(1 + 1e-9) + 1e-12 for a,b in zip(errs, errs[1:]))

def test_many_budgets_on_a_real_size_are_monotone_and_full():
    ls,before = many(),math.inf
    for ratio in (.05, .1, .2, .3, .5, .7, .8, .9, .99):
        s = ParamBudget(ratio).solve(ls)
        assert .99*s.budget <= s.cost <= s.budget and s.error <= before
        assert s.error >= s.bound and (s.bound >= .99*s.error or ratio > .8)     # near the dense model one rank is a large share of the error
        before = s.error

def test_ratio_one_keeps_all_dense():
    for ls in (many(20), layers_of([(5, 9, 1, .5), (12, 3, 2, 1.)])):
        s = ParamBudget(1).solve(ls)
        assert set(s.ranks.values()) == {None} and s.error == 0 and s.cost == s.budget
        assert set(ParamBudget(params=10**12).solve(ls).ranks.values()) == {None}

def test_two_hundred_layers_in_seconds():
    ls = many(200)
    start = time.perf_counter()
    s = ParamBudget(.3).solve(ls)
    assert time.perf_counter() - start < 3
    assert .99*s.budget <= s.cost <= s.budget and s.error <= 1.01*s.bound

def test_the_layer_that_matters_gets_the_rank():
    a,b = layer(64, 64, 1, 'a', decay=.97),layer(64, 64, 1, 'b', decay=.97)
    b = Layer('b', 64, 64, tuple(30*s for s in a.spectrum), weighted=True)
    r = ParamBudget(.4, round_to=1).solve([a, b]).ranks
    assert r['b'] is None or r['b'] > 2*r['a']

def test_without_sensitivity_layers_count_alike():
    a = layer(64, 64, 1, 'a', weighted=False)
    b = Layer('b', 64, 64, tuple(1000*s for s in a.spectrum))
    r = ParamBudget(.4, round_to=1).solve([a, b]).ranks
    assert abs(r['a'] - r['b']) <= 1

# ------------------------------------------------------------------ steps, units

@pytest.mark.parametrize('step', [1, 4, 8, 16])
def test_ranks_are_multiples(step):
    ls = many(30)
    for o,k in zip(ls, ParamBudget(.4, round_to=step).solve(ls).ranks.values()):
        if o.break_even >= 4*step: assert k is None or k % step == 0

def test_tiny_layers_lose_no_rank_to_the_rounding():
    ls = [layer(12, 20, 1), layer(16, 16, 2), layer(10, 512, 3)]
    a,b = (ParamBudget(.6, round_to=r).solve(ls) for r in (8, 1))
    assert a.ranks == b.ranks and {k for k in a.ranks.values() if k} - {8}

def test_small_layers_among_large_ones():
    ls = [layer(768, 768, 1, decay=.99), layer(2, 768, 2)]
    s = ParamBudget(.3).solve(ls)
    assert s.ranks['l2'] in (None, 1) and s.cost <= s.budget

@pytest.mark.parametrize('cost', ['params', 'macs', 'bytes'])
@pytest.mark.parametrize('ratio', [.2, .5, .8])
def test_what_is_limited(cost, ratio):
    ls = [layer(9, 12, 1, positions=1.), layer(12, 9, 2, positions=49.5, itemsize=2), layer(11, 11, 3, positions=7.)]
    p = ParamBudget(ratio, cost=cost)
    s = p.solve(ls)
    assert s.unit == cost and s.budget == pytest.approx(ratio*dense(p, ls)) and s.cost == pytest.approx(spent(p, ls, s.ranks)) and s.cost <= s.budget
    least = brute(p, ls, ratio*dense(p, ls))
    assert s.bound <= least*(1 + 1e-9) and least*(1 - 1e-9) <= s.error <= 1.05*least

def test_absolute_number_of_parameters():
    ls = many(20)
    total = sum(o.weight_params for o in ls)
    a,b = ParamBudget(params=total//4).solve(ls),ParamBudget((total//4)/total).solve(ls)
    assert a.ranks == b.ranks and a.budget == total//4 >= a.cost

# ------------------------------------------------------------------ odd spectra

def test_zero_layers_cost_nothing():
    ls = [Layer('z', 8, 8, (0.,)*8, weighted=True), layer(16, 16, 1, 'a')]
    s = ParamBudget(.5).solve(ls)
    assert s.cost <= s.budget and (s.ranks['z'] is None or s.ranks['z'] == 1) and math.isfinite(s.error)
    assert ParamBudget(.5).solve([ls[0]]).error == 0

def test_huge_and_tiny_spectra():
    for scale in (1e-8, 1e-4, 1e4, 1e8):
        base = [layer(20, 30, 1), layer(30, 20, 2), layer(25, 25, 3)]
        ls = [Layer(o.name, o.in_features, o.out_features, tuple(scale*s for s in o.spectrum), weighted=True) for o in base]
        a,b = ParamBudget(.5).solve(base),ParamBudget(.5).solve(ls)
        assert a.error*scale**2 == pytest.approx(b.error, rel=1e-2, abs=0) and b.error >= b.bound*(1 - 1e-9)
        assert b.bound == pytest.approx(a.bound*scale**2, rel=1e-3, abs=0)

def test_layers_of_very_different_size():
    ls = [layer(4096, 4096, 1, decay=.999), layer(3, 3, 2), layer(1, 7, 3), layer(40, 10, 4)]
    for ratio in (.05, .3, .9):
        s = ParamBudget(ratio).solve(ls)
        assert s.budget - 8*8192 < s.cost <= s.budget      # not even one more step of the large layer fits

def test_exactly_the_least_budget_is_enough():
    ls = layers_of([(9, 12, 1, .8), (7, 7, 2, .8), (13, 4, 3, .8), (2, 2, 4, .8)])
    p = ParamBudget(1)
    least = sum(min(spent(p, [o], {o.name: k}) for k in options(o)) for o in ls)
    s = ParamBudget(params=least).solve(ls)
    assert s.cost == least
    with pytest.raises(ValueError, match=f'{least:,}'): ParamBudget(params=least-1).solve(ls)

# ------------------------------------------------------------------ messages

@pytest.mark.parametrize('args,kw,kind,text', [((), {}, ValueError, 'ratio, such as ParamBudget'), ((.3,), dict(params=5), ValueError, 'either a ratio'),
    ((0,), {}, ValueError, r'ratio must be in \(0, 1\], got 0. To keep 30 % pass 0.3'), ((30,), {}, ValueError, 'got 30'), (('a',), {}, TypeError, "got 'a'"),
    ((True,), {}, TypeError, 'True'), ((float('nan'),), {}, ValueError, 'nan'), ((), dict(params=0), ValueError, 'at least 1, got 0'), ((), dict(params=1.5), TypeError, 'int'),
    ((), dict(params=9, cost='macs'), ValueError, 'pass a ratio'), ((.3,), dict(cost='flops'), ValueError, "'latency' or a LatencyTable, got 'flops'"),
    ((.3,), dict(round_to=0), ValueError, 'round_to must be an int of at least 1, got 0'), ((.3,), dict(round_to=1.), ValueError, 'got 1.0')])
def test_arguments_are_checked(args, kw, kind, text):
    with pytest.raises(kind, match=text): ParamBudget(*args, **kw)

def test_too_tight_a_budget_says_what_is_needed():
    with pytest.raises(ValueError, match=r'ParamBudget\(params=3\) allows 3 params, but these 2 layers need at least 40.*Raise the budget'):
        ParamBudget(params=3).solve([layer(10, 10, 1), layer(10, 10, 2)])

def test_no_spectrum():
    with pytest.raises(ValueError, match="ParamBudget needs the singular values of 'a'.*meta"): ParamBudget(.3).solve([Layer('a', 3, 3)])

def test_how_it_shows_itself():
    assert repr(ParamBudget(.3)) == 'ParamBudget(0.3)' and repr(ParamBudget(params=20_000, cost='params', round_to=4)) == 'ParamBudget(params=20,000, round_to=4)'
    assert repr(ParamBudget(.3, cost='macs')) == "ParamBudget(0.3, cost='macs')"
    s = ParamBudget(.3).solve(many(10))
    assert f'{s.cost:,.0f} of {s.budget:,.0f} params used' in str(s) and 'of the least possible' in str(s)
    assert str(ParamBudget(1).solve(many(3))).endswith('(100.0%)')

def test_no_layers(): assert ParamBudget(.3).ranks([]) == {} and ParamBudget(.3).note([]) == ''

# ------------------------------------------------------------------ in a plan

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 4))

def data(): return list(torch.randn(200, 40, generator=torch.Generator().manual_seed(1)).split(50))

def weights(m): return sum(p.numel() for n,p in m.named_parameters() if n.endswith('weight'))

@pytest.mark.parametrize('given_', [None, data()], ids=['weights', 'data'])
@pytest.mark.parametrize('ratio', [.2, .5, .9])
def test_a_model_gets_the_size_that_was_asked_for(given_, ratio):
    m = net()
    plan = FC_Decomposer(policy=ParamBudget(ratio)).plan(m, given_)
    small = plan.apply(m)
    assert ratio*weights(m) - 110 < weights(small) <= ratio*weights(m)      # one more rank of the largest layer would not fit
    assert plan.params_after == sum(p.numel() for p in small.parameters())
    assert 'params used' in plan.note and 'params used' in repr(plan)
    assert all(o.weighted is (given_ is not None) for o in plan.layers)

def test_the_whole_model_shrinks_monotonically():
    m,x = net(),data()
    y = m(torch.cat(x))
    fc = lambda r: FC_Decomposer(policy=ParamBudget(r)).decompose(m, x)
    errs = [((fc(r)(torch.cat(x)) - y).norm()/(y - y.mean(0)).norm()).item() for r in (.1, .3, .6, .9)]
    assert errs == sorted(errs, reverse=True) and errs[-1] < .5*errs[0]

def test_ratio_one_leaves_the_model_dense():
    m = net()
    with pytest.warns(UserWarning, match='nothing to decompose'): plan = FC_Decomposer(policy=ParamBudget(1)).plan(m, data())
    assert not plan.replaced and all(o.reason == 'dense by policy' for o in plan.layers)

def test_sensitivity_helps_the_output():
    m,x = net(),data()
    with torch.no_grad():
        m[0].weight[:, :20] *= .02      # plenty of directions that hardly matter
        m[2].weight[:40] *= .02
        m[4].weight[:, :40] *= .02      # the errors of outputs 0 to 39 of layer 2 are not seen
    y = m(torch.cat(x))
    err = {how: ((FC_Decomposer(policy=ParamBudget(.25)).decompose(m, x, sensitivity=how)(torch.cat(x)) - y).norm()/(y - y.mean(0)).norm()).item()
           for how in (False, 'diag', 'full')}
    assert err['full'] < err[False]

def test_inside_per_layer():
    m = net()
    plan = FC_Decomposer(policy={'0': ParamBudget(.3), '2': 5, '4': None}).plan(m, data())
    assert plan['0'].params_after <= .3*2400 and plan['0'].weighted and (plan['2'].rank, plan['4'].rank) == (5, None)
    plan = FC_Decomposer(policy={'[02]': ParamBudget(.3)}).plan(m)
    assert .95*.3*5400 <= plan['0'].params_after + plan['2'].params_after <= .3*5400 and plan['4'].reason == 'not named in PerLayer'
    plan = FC_Decomposer(policy={'0': ParamBudget(.3), '2': ParamBudget(params=800)}).plan(m, data())
    assert plan['0'].params_after <= 720 and plan['2'].params_after <= 800

def test_layers_left_out_do_not_count():
    m = net()
    for kw in (dict(exclude='0'), dict(layers=['2', '4'])):
        plan = FC_Decomposer(policy=ParamBudget(.5), **kw).plan(m, data())
        assert plan['0'].rank is None and plan['2'].params_after + plan['4'].params_after <= .5*3200

def test_replan_and_edit_keep_the_budget():
    m = net()
    plan = FC_Decomposer(policy=ParamBudget(.5)).plan(m, data())
    for r in (.2, .5, .8):
        again = plan.replan(ParamBudget(r))
        assert [o.rank for o in again.layers] == [o.rank for o in FC_Decomposer(policy=ParamBudget(r)).plan(m, data()).layers]
    assert plan.replan(ParamBudget(.5)) == plan
    assert plan.edit(['0', '2'], ParamBudget(.2))['4'] == plan['4']

def test_saved_and_loaded(tmp_path):
    plan = FC_Decomposer(policy=ParamBudget(.4, cost='macs')).plan(net(), data())
    back = DecompositionPlan.load(plan.save(tmp_path/'plan.json'))
    assert back == plan and back.replan(ParamBudget(.3)).layers == plan.replan(ParamBudget(.3)).layers

def test_macs_count_positions():
    class Tokens(nn.Module):
        def __init__(self): super().__init__(); self.body,self.head = nn.Linear(32, 32),nn.Linear(32, 32)
        def forward(self, x): return self.head(self.body(x).mean(1))
    torch.manual_seed(0)
    m,x = Tokens(),torch.randn(20, 10, 32)
    plan = FC_Decomposer(policy=ParamBudget(.5, cost='macs')).plan(m, x)
    assert (plan['body'].positions, plan['head'].positions) == (10, 1)
    assert 10*plan['body'].params_after + plan['head'].params_after <= .5*11*1024

def test_bytes_count_the_dtype():
    m = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40).double())
    plan = FC_Decomposer(policy=ParamBudget(.5, cost='bytes')).plan(m)
    assert [o.itemsize for o in plan.layers] == [4, 8]
    assert sum(o.itemsize*o.params_after for o in plan.layers) <= .5*12*1600

def test_meta_model_has_no_spectra():
    with torch.device('meta'): m = nn.Linear(20, 20)
    with pytest.raises(ValueError, match='meta'): FC_Decomposer(policy=ParamBudget(.5)).plan(m)

def test_round_to_belongs_to_the_budget():
    with pytest.raises(ValueError, match=r'ParamBudget\(…, round_to=4\)'): FC_Decomposer(policy=ParamBudget(.5), round_to=4).plan(net(), data())

def test_a_layer_without_statistics_among_weighted_ones():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(30, 30),nn.Linear(30, 30)
        def forward(self, x): return self.a(x)
    torch.manual_seed(0)
    plan = FC_Decomposer(policy=ParamBudget(.5)).plan(Two(), torch.randn(100, 30))
    assert plan['a'].weighted and not plan['b'].weighted and 'plain SVD' in plan['b'].reason
    assert .9*900 <= sum(o.params_after for o in plan.layers) <= 900
    assert abs((plan['a'].rank or 30) - (plan['b'].rank or 30)) < 10       # b is taken to matter as much as a

def test_a_layer_without_effect_on_the_output_gets_no_rank_of_others():
    class Aux(nn.Module):
        def __init__(self): super().__init__(); self.main,self.aux = nn.Linear(30, 30),nn.Linear(30, 30)
        def forward(self, x): self.aux(x); return self.main(x)
    torch.manual_seed(0)
    m,x = Aux(),torch.randn(200, 30)
    plan = FC_Decomposer(policy=ParamBudget(.6)).plan(m, x)
    assert (plan['aux'].rank or 30) < (plan['main'].rank or 30)
