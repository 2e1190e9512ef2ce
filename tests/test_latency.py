"A budget of latency: made-up tables, so that nothing depends on the speed of a machine"
import itertools, math
from dataclasses import replace
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
import fasterai.core.latency as latency
from fasterai.misc.all import *
from fasterai.lowrank.ranks import Layer

fixed = settings(derandomize=True, deadline=None, max_examples=80, database=None)

# ------------------------------------------------------------------ helpers

def layer(n, m, seed=0, decay=.9, **kw):
    g = np.random.default_rng(seed)
    s = np.sort(np.abs(g.standard_normal(min(m, n)))*decay**np.arange(min(m, n)) + 1e-3)[::-1]
    return Layer(f'l{seed}', n, m, tuple(s.tolist()), weighted=True, **kw)

def key(o, rows=1, dtype='float32', device='cpu'): return o.in_features, o.out_features, rows, dtype, device

def table(layers, times): return LatencyTable(times={key(o): t for o,t in zip(layers, times)})

def error(layers, ranks): return sum(0 if (k := ranks[o.name]) is None else float(np.square(o.spectrum[k:]).sum()) for o in layers)

def cost(tab, layers, ranks): return sum(tab.ms(o, [ranks[o.name] or 0])[0] for o in layers)

def options(tab, o):
    "Dense, and every rank that is smaller and at least 5 % faster, with its time read off the measured ones by hand"
    t = tab.times[key(o)]
    at = sorted(k for k in t if k)
    def ms(k):
        below,above = max((a for a in at if a <= k), default=at[0]),min((a for a in at if a >= k), default=None)
        if above is None: return math.inf
        top = lambda a: max(t[b] for b in at if b <= a)
        return top(above) if above <= below else top(below) + (k - below)/(above - below)*(top(above) - top(below))
    return {None: t[0], **{k: ms(k) for k in range(1, o.break_even+1) if at and ms(k) <= .95*t[0]}}

def brute(tab, layers, budget):
    "Least error of all combinations within the budget"
    res = math.inf
    for picks in itertools.product(*(options(tab, o).items() for o in layers)):
        if sum(c for _,c in picks) <= budget*(1 + 1e-12): res = min(res, error(layers, {o.name: k for o,(k,_) in zip(layers, picks)}))
    return res

@pytest.fixture
def counted(monkeypatch):
    "What is measured, without measuring: a layer takes 1 ms, a pair as much as it has of its parameters, and a tenth"
    calls = []
    def fake(n, m, rows, dtype, device, ranks, seconds=.03):
        calls.append((n, m, rows, dtype, device))
        return {0: 1., **{k: .1 + k*(n+m)/(n*m) for k in ranks}}
    monkeypatch.setattr(latency, '_time_layer', fake)
    return calls

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4))

def data(): return list(torch.randn(200, 64, generator=torch.Generator().manual_seed(1)).split(50))

# ------------------------------------------------------------------ the table

def test_between_measured_ranks_times_are_interpolated():
    o = layer(40, 40)
    t = table([o], [{0: 8., 4: 1., 8: 3., 16: 7.}])
    assert t.ms(o, [4, 5, 6, 8, 10, 16]).tolist() == [1., 1.5, 2., 3., 4., 7.]
    assert t.ms(o, [0, 1, 3]).tolist() == [8., 1., 1.] and t.ms(o, [17, 40]).tolist() == [math.inf]*2

def test_a_rank_is_never_faster_than_a_smaller_one():
    o = layer(40, 40)
    t = table([o], [{8: 2., 0: 8., 16: 5., 12: 1.}])     # in any order
    assert t.ms(o, [8, 10, 12, 14, 16]).tolist() == [2., 2., 2., 3.5, 5.]

def test_faster_means_by_five_percent():
    o = layer(40, 40)
    t = table([o], [{0: 100., 1: 94., 2: 95., 3: 96., 4: 120.}])
    assert t.faster(o, [1, 2, 3, 4, 5]).tolist() == [True, True, False, False, False]
    assert not table([o], [{0: 1.}]).faster(o, [1, 2]).any()     # no pair was measured

def test_rows_are_positions_times_batch_size():
    o = layer(8, 8, positions=196.5)
    assert [LatencyTable(b).key(o)[2] for b in (1, 2, 256)] == [196, 393, 50304]
    assert LatencyTable().key(layer(8, 8, positions=.01))[2] == 1

def test_measured_once_per_shape(counted):
    ls = [layer(64, 96, 1), layer(64, 96, 2), layer(96, 64, 3), layer(64, 96, 4, positions=7.), layer(64, 96, 5, dtype='bfloat16')]
    t = LatencyTable(2).measure(ls)
    assert counted == [(64, 96, 2, 'float32', 'cpu'), (96, 64, 2, 'float32', 'cpu'), (64, 96, 14, 'float32', 'cpu'), (64, 96, 2, 'bfloat16', 'cpu')]
    assert t.measure(ls) is t and len(counted) == 4 and len(t.times) == 4

def test_processes_use_the_times_of_the_first(counted, monkeypatch):
    monkeypatch.setattr(latency, 'gathered', lambda ms: [{0: 7., 8: 2.}, ms])
    o = layer(64, 96)
    assert LatencyTable().measure([o]).times == {key(o): {0: 7., 8: 2.}}

def test_tables_do_not_share(counted):
    LatencyTable().measure([layer(64, 96)])
    assert LatencyTable().times == {} and ParamBudget(.5, cost='latency').cost.times == {}

def test_measured_ranks_reach_from_small_to_break_even():
    for most in range(200):
        g = latency._grid(most)
        assert g == sorted(set(g)) and len(g) <= 6 and all(0 < k <= most for k in g) and (not most or most - g[-1] < 8)
        if most >= 32: assert not any(k % 8 for k in g)

def test_a_real_measurement_leaves_no_trace():
    rng,threads = torch.get_rng_state(),torch.get_num_threads()
    t = LatencyTable(3).measure([layer(48, 80), layer(3, 1, 1)])
    assert torch.equal(rng, torch.get_rng_state()) and torch.get_num_threads() == threads and torch.is_grad_enabled()
    assert [*t.times] == [(48, 80, 3, 'float32', 'cpu'), (3, 1, 3, 'float32', 'cpu')] and [*t.times[3, 1, 3, 'float32', 'cpu']] == [0]
    assert all(v > 0 for ms in t.times.values() for v in ms.values())

@pytest.mark.parametrize('dtype', ['float64', 'bfloat16', 'float16'])
def test_other_dtypes_can_be_measured(dtype):
    ms = latency._time_layer(40, 24, 2, dtype, 'cpu', [1, 7], seconds=1e-4)
    assert [*ms] == [0, 1, 7]

def test_in_inference_mode(counted):
    with torch.inference_mode(): assert latency._latencies([lambda: None], seconds=1e-4)[0] > 0

def test_frame_and_text():
    o = layer(40, 40)
    t = table([o], [{0: 8., 4: 1.}])
    df = t.to_frame()
    assert df['rank'].tolist() == [0, 4] and df.ratio.tolist() == [1., .125]
    assert 'dense' in repr(t) and '0.12' in repr(t) and '<table' in t._repr_html_()
    assert [str(LatencyTable()), str(LatencyTable(32)), str(LatencyTable(8, device='cpu'))] == ['LatencyTable()', 'LatencyTable(32)', "LatencyTable(8, device='cpu')"]
    assert repr(LatencyTable(32)) == 'LatencyTable(32)' and LatencyTable().to_frame().empty

@pytest.mark.parametrize('kw,text', [(dict(batch_size=0), 'at least 1, got 0'), (dict(batch_size=True), 'got True'), (dict(batch_size=1.5), 'got 1.5'),
    (dict(times={(1, 1, 1, 'float32', 'cpu'): {8: 1.}}), '0 to those of the layer itself'), (dict(times={(1, 1, 1, 'float32', 'cpu'): {0: 0.}}), 'positive'),
    (dict(times={(1, 1, 1, 'float32', 'cpu'): {0: 1., 8: math.nan}}), 'positive'), (dict(times={(1, 1, 1, 'float32', 'cpu'): {0: math.inf}}), 'positive')])
def test_arguments_are_checked(kw, text):
    with pytest.raises(ValueError, match=text): LatencyTable(**kw)

@pytest.mark.parametrize('device', ['meta', 'cuda:77', 'nonsense'])
def test_a_device_that_is_not_there(device):
    for t,o in ((LatencyTable(device=device), layer(8, 8)), (LatencyTable(), layer(8, 8, device=device))):
        with pytest.raises(ValueError, match=rf"latency of 'l0' cannot be measured on '{device}' here.*cost=LatencyTable\(device='cpu'\)"): t.measure([o])

# ------------------------------------------------------------------ the solution

def random_case(seed, whole=False):
    "Up to three small layers and a table that need not be monotone"
    g = np.random.default_rng(seed)
    ls = [layer(*g.integers(3, 15, 2).tolist(), seed=i, decay=g.choice([.5, .8, 1.])) for i in range(g.integers(1, 4))]
    def times(o):
        at = [k for k in latency._grid(o.break_even) if g.random() < .8]
        return {int(k): float(v) for k,v in zip([0, *at], g.integers(1, 30, len(at)+1) if whole else g.uniform(.1, 3, len(at)+1))}
    return ls, table(ls, {key(o): times(o) for o in ls}.values()) if len({key(o) for o in ls}) == len(ls) else LatencyTable(times={key(o): times(o) for o in ls})

@fixed
@given(st.integers(0, 10**6), st.booleans(), st.integers(5, 100).map(lambda i: i/100))
def test_as_good_as_all_combinations(seed, whole, ratio):
    ls,tab = random_case(seed, whole)
    budget = ratio*sum(tab.times[key(o)][0] for o in ls)
    least,policy = brute(tab, ls, budget),ParamBudget(ratio, cost=tab)
    try: s = policy.solve(ls)
    except ValueError as e:
        assert 'ms, but these' in str(e) and least == math.inf
        return
    slack = 1e-9*sum(np.square(o.spectrum).sum() for o in ls)
    assert s.unit == 'ms' and s.budget == pytest.approx(budget) and s.cost <= s.budget*(1 + 1e-9)
    assert s.cost == pytest.approx(cost(tab, ls, s.ranks)) and s.error == pytest.approx(error(ls, s.ranks), abs=slack)
    assert s.bound <= least + slack and least <= s.error + slack and s.error <= 1.05*least + slack
    for o in ls:
        assert s.ranks[o.name] in options(tab, o)
        if s.ranks[o.name]: assert tab.ms(o, [s.ranks[o.name]])[0] <= .95*tab.ms(o, [0])[0]

def test_a_layer_without_a_faster_pair_stays_dense():
    ls = [layer(64, 64, 0), layer(96, 96, 1)]
    tab = table(ls, [{0: 1., 8: 1.2, 24: 2.}, {0: 10., 8: 1., 40: 9.}])
    for ratio in (.2, .5, .9):
        p = ParamBudget(ratio, cost=tab)
        assert p.ranks(ls)['l0'] is None and len(p.candidates(ls[0])) == 0 and p.candidates(ls[1]).tolist() == [8, 16, 24, 32, 40]
        assert p.note(ls).endswith('1 of 2 layers have no faster pair')

def test_smaller_is_not_enough_and_faster_is_not_enough():
    o = layer(64, 64)       # smaller up to rank 31
    tab = table([o], [{0: 10., 8: 1., 16: 20., 24: 30., 63: 40.}])
    assert ParamBudget(.5, cost=tab, round_to=1).candidates(o).max() == 11
    fast = table([o], [{0: 10., 8: 1., 63: 2.}])
    assert ParamBudget(.5, cost=fast, round_to=1).candidates(o).max() == 31

def test_equal_times_take_the_larger_rank():
    o = layer(64, 64)
    assert ParamBudget(.5, cost=table([o], [{0: 1., 8: .4, 24: .4}])).ranks([o]) == {'l0': 24}
    ls = [layer(64, 64, 0), layer(96, 96, 1)]
    tab = table(ls, [{0: 1., 8: .4, 24: .4}, {0: 1., 8: .4, 40: .4}])
    assert ParamBudget(.41, cost=tab).ranks(ls) == {'l0': 24, 'l1': 40}

def test_time_goes_where_it_buys_most():
    ls = [layer(64, 64, 0, decay=1.), layer(96, 96, 1, decay=.7)]
    tab = table(ls, [{0: 1., 8: .2, 24: .6}, {0: 1., 8: .2, 40: .6}])
    r = ParamBudget(.4, cost=tab).ranks(ls)
    assert r['l0'] is None or r['l0'] > r['l1']

def test_ratio_one_keeps_all_dense():
    ls = [layer(64, 64, 0), layer(96, 96, 1)]
    s = ParamBudget(1, cost=table(ls, [{0: .3, 8: .1}, {0: .7, 8: .1}])).solve(ls)
    assert set(s.ranks.values()) == {None} and s.error == 0 and s.cost == s.budget and str(s) == '1.00 of 1.00 ms used (100.0%)'

def test_too_tight_says_what_is_needed():
    ls = [layer(64, 64, 0), layer(96, 96, 1)]
    tab = table(ls, [{0: 1., 8: 2.}, {0: 1., 8: .25}])
    with pytest.raises(ValueError, match=r"allows 1.00 ms, but these 2 layers need at least 1.25.*1 of 2 layers have no faster pair.*Raise the budget"):
        ParamBudget(.5, cost=tab).solve(ls)

def test_arguments_of_the_policy():
    with pytest.raises(ValueError, match='with cost=.*pass a ratio'): ParamBudget(params=9, cost='latency')
    with pytest.raises(ValueError, match="'latency' or a LatencyTable, got 'time'"): ParamBudget(.5, cost='time')
    with pytest.raises(ValueError, match='singular values'): ParamBudget(.5, cost='latency').solve([Layer('a', 8, 8)])

def test_how_it_shows_itself():
    p = ParamBudget(.5, cost='latency')
    assert repr(p) == "ParamBudget(0.5, cost='latency')" and p == ParamBudget(.5, cost='latency') and hash(p) == hash(ParamBudget(.5, cost='latency'))
    assert repr(ParamBudget(.5, cost=LatencyTable(32), round_to=1)) == 'ParamBudget(0.5, cost=LatencyTable(32), round_to=1)'
    assert p != ParamBudget(.5, cost=LatencyTable(2)) and mk_policy(p) is p

# ------------------------------------------------------------------ in a plan

def test_a_plan_measures_once_and_says_milliseconds(counted):
    m,p = net(),ParamBudget(.6, cost='latency')
    plan = FC_Decomposer(policy=p).plan(m, data())
    assert len(counted) == 3 and len(p.cost.times) == 3      # two of the four layers have one shape; ranks and note ask once each
    assert ' ms used' in plan.note and 'of 2.40 ms used' in plan.title and plan.policy == "ParamBudget(0.6, cost='latency')"
    assert plan.replaced and all(o.rank <= o.break_even for o in plan.replaced)
    for r in (.8, .7): plan.replan(replace(p, ratio=r))
    assert len(counted) == 3
    y = plan.apply(m)(data()[0])
    assert y.shape == (50, 4)

def test_saved_and_loaded(tmp_path, counted):
    m,p = net().double(),ParamBudget(.6, cost=LatencyTable(4))
    plan = FC_Decomposer(policy=p).plan(m, [x.double() for x in data()])
    assert {(o.dtype, o.device) for o in plan.layers} == {('float64', 'cpu')} and {k[2:] for k in p.cost.times} == {(4, 'float64', 'cpu')}
    back = DecompositionPlan.load(plan.save(tmp_path/'plan.json'))
    assert back == plan and back.policy == 'ParamBudget(0.6, cost=LatencyTable(4))' and back.replan(p).layers == plan.layers

def test_positions_and_batch_size_make_the_rows(counted):
    class Tokens(nn.Module):
        def __init__(self): super().__init__(); self.body,self.head = nn.Linear(64, 64),nn.Linear(64, 64)
        def forward(self, x): return self.head(self.body(x).mean(1))
    torch.manual_seed(0)
    FC_Decomposer(policy=ParamBudget(.9, cost=LatencyTable(3))).plan(Tokens(), torch.randn(20, 10, 64))
    assert counted == [(64, 64, 30, 'float32', 'cpu'), (64, 64, 3, 'float32', 'cpu')]

def test_inside_per_layer_and_edit(counted):
    m,p = net(),ParamBudget(.5, cost='latency')
    plan = FC_Decomposer(policy={'0': p, '2': 5}).plan(m, data())
    assert plan['0'].rank and plan['2'].rank == 5 and counted == [(64, 96, 1, 'float32', 'cpu')]
    assert plan.edit('2', p)['2'].rank not in (5, None) and len(counted) == 2

def test_rank_find_measures_once(counted):
    m,x = net(),data()
    y = m(torch.cat(x)).argmax(1)
    def accuracy(small): return (small(torch.cat(x)).argmax(1) == y).double().mean().item()
    found = rank_find(m, accuracy, x, max_drop=.2, higher_is_better=True, cost='latency', ratios=(.9, .7, .5), refine=1)
    assert len(counted) == 3 and len(found.frame) >= 3
    tab = LatencyTable(8)
    rank_find(m, accuracy, x, max_drop=.2, higher_is_better=True, cost=tab, ratios=(.9, .7), refine=0)
    assert len(counted) == 6 and {k[2] for k in tab.times} == {8}

def test_meta_model_has_no_spectra(counted):
    with torch.device('meta'): m = nn.Linear(64, 64)
    with pytest.raises(ValueError, match='singular values'): FC_Decomposer(policy=ParamBudget(.5, cost='latency')).plan(m)
    assert not counted
