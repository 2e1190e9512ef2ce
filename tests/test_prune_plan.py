"Costs of units, budgets, plans, and the pruner"
from functools import partial
import json
from dataclasses import replace
from itertools import product
import numpy as np
import pytest, torch
from torch import nn
from test_prune_groups import NETS, Attention, made, mlp, ready, rows, some
from fasterai.core.modules import count_params
from fasterai.core.plan import Plan
from fasterai.core.store import load_compressed, save_compressed
from fasterai.prune.cost import Costs, count_macs, measure_costs
from fasterai.prune.groups import find_groups, slice_units
from fasterai.prune.plan import GroupPlan, PruningPlan
from fasterai.prune.pruner import Pruner
from fasterai.prune.example import small_example
from fasterai.prune.scores import curve, score_units, taylor_values
from fasterai.core.latency import LatencyTable
from fasterai.prune.timing import Times
from fasterai.prune.widths import Unreachable, allowed, fit_widths

Cut = partial(Pruner, score='magnitude', compensate=False)   # without looking at data

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)).eval()
def image(n=4): return torch.randn(n, 3, 8, 8)

# Costs

def brute_macs(model, x):
    "Linear layers and convolutions by their shapes, attention by its matrix products"
    total = []
    def hook(m, args, y):
        if isinstance(m, nn.Linear): total.append(y.numel()*m.in_features)
        elif isinstance(m, nn.ConvTranspose2d): total.append(args[0].numel()*m.weight[0].numel())
        elif isinstance(m, nn.modules.conv._ConvNd): total.append(y.numel()*m.weight[0].numel())
        elif isinstance(m, Attention): total.append(2*args[0].shape[0]*m.num_heads*args[0].shape[1]**2*m.head_dim)
    hs = [m.register_forward_hook(hook) for m in model.modules()]
    with torch.no_grad(): model(x)
    for h in hs: h.remove()
    return sum(total)

@pytest.mark.parametrize('name', [*NETS, 'attention'])
def test_formula_is_what_is_counted(name):
    model,x = (nn.Sequential(Attention(), nn.Linear(24, 12), nn.Linear(12, 3)), torch.randn(2, 5, 24)) if name == 'attention' else made(name)
    model.eval()
    groups = find_groups(model, x)
    costs = measure_costs(model, x, groups)
    assert costs.at({}) == (count_params(model), brute_macs(model, x)) and costs.macs == count_macs(model, x)
    for _ in range(3):
        kept = {g.name: some(g) for g in ready(groups)}
        small = slice_units(model, groups, kept)
        counts = {n: len(k) for n,k in kept.items()}
        assert costs.at(counts) == (count_params(small), brute_macs(small, x))
        for j,g in enumerate(costs.groups):
            if counts[g] > 1: assert tuple(costs.unit(counts)[j]) == tuple(a-b for a,b in zip(costs.at(counts), costs.at(counts | {g: counts[g]-1})))

def test_counting_leaves_everything_as_found():
    m,x = net().train(),image()
    fast,flags = torch.backends.mha.get_fastpath_enabled(),[p.requires_grad for p in m.parameters()]
    stats = m[1].running_mean.clone()
    measure_costs(m, x, find_groups(m, x))
    assert torch.backends.mha.get_fastpath_enabled() == fast and all(o.training for o in m.modules()) and torch.equal(stats, m[1].running_mean)
    assert flags == [p.requires_grad for p in m.parameters()] and all(p.grad is None for p in m.parameters())

# Widths

def chain(n, m):
    rows = (('1', n, 5, 1, 0, 1), ('2', m, n, 1, 0, 1), ('3', 3, m, 1, 0, 1))
    total = n*5 + n*m + m*3
    return Costs(('a', 'b'), (n, m), total, total, rows, ((0, 0, 1), (1, 1, 1)), ((1, 0, 1), (2, 1, 1)))

@pytest.mark.parametrize('budget', [.9, .6, .3, .15])
@pytest.mark.parametrize('kind', ['convex', 'steps', 'zero', 'concave'])
def test_near_the_best_choice(budget, kind):
    rng,costs = np.random.default_rng(0),chain(9, 7)
    def errs(n):
        steps = dict(convex=np.sort(rng.exponential(size=n)), steps=rng.integers(0, 3, n)*1., zero=np.zeros(n), concave=np.sort(rng.exponential(size=n))[::-1])
        return np.r_[0, steps[kind].cumsum()]
    errors = dict(a=errs(9), b=errs(7))
    def total(kept): return sum(errors[g][len(errors[g])-1-k] for g,k in kept.items())
    kept = fit_widths(costs, errors, budget)
    every = [dict(a=i, b=j) for i,j in product(range(1, 10), range(1, 8)) if costs.at(dict(a=i, b=j))[1] <= budget*costs.macs]
    assert kept in every and total(kept) <= 2*min(map(total, every)) + 1e-9
    for g,n in (('a', 9), ('b', 7)): assert kept[g] == n or costs.at(kept | {g: kept[g]+1})[1] > budget*costs.macs

def test_widths_that_are_allowed():
    assert allowed(100, 1, round_to=32) == [32, 64, 96, 100] and allowed(12, 1, round_to=8) == [8, 12] and allowed(3, 1, min_keep=5) == [3]
    costs = chain(9, 7)
    errors = dict(a=np.arange(10.), b=np.arange(8.))
    assert fit_widths(costs, errors, 1.) == dict(a=9, b=7)
    assert fit_widths(costs, errors, .7, widths=dict(a=[4, 8, 9], b=[7]))['a'] in (4, 8, 9)
    with pytest.raises(Unreachable, match='budget=0.01 cannot be reached: the smallest widths leave 0.0'): fit_widths(costs, errors, .01)

# Plans

def plan_of(model, x, budget=.5, **kw): return Cut(budget, **kw).plan(model, x)

@pytest.mark.parametrize('cost', ['macs', 'params'])
@pytest.mark.parametrize('budget', [.9, .7, .5, .3])
@pytest.mark.parametrize('name', ['residual', 'flatten', 'depthwise', 'cat', 'squeeze'])
def test_a_budget_is_met_from_below_within_one_unit(name, budget, cost):
    model,x = made(name)
    model.eval()
    try: plan = plan_of(model, x, budget, cost=cost)
    except Unreachable as e:
        least = {g.name: [0] for g in ready(find_groups(model, x))}
        small = slice_units(model, find_groups(model, x), least)
        share = count_params(small)/count_params(model) if cost == 'params' else count_macs(small, x)/count_macs(model, x)
        assert share > budget
        return
    small = plan.apply(model)
    def counted(m): return count_params(m) if cost == 'params' else brute_macs(m, x)
    assert counted(small) <= budget*counted(model)
    which = ('params','macs').index(cost)
    counts = {n: len(k) for n,k in plan.kept.items()}
    for o in plan.replaced: assert plan.costs.at(counts | {o.name: counts[o.name]+1})[which] > budget*plan.costs.at({})[which]

def test_a_budget_of_one_is_a_copy():
    m,x = net(),image()
    plan = plan_of(m, x, 1.)
    assert not plan.replaced and torch.equal(plan.apply(m)(x), m(x))

def test_plan_and_prune_agree():
    m,x = net(),image()
    a,b = Cut(.4).plan(m, x).apply(m),Cut(.4).prune(m, x)
    assert all(torch.equal(p, q) for p,q in zip(a.state_dict().values(), b.state_dict().values()))

def test_rows():
    m,x = net(),image()
    plan = plan_of(m, x)
    assert [o.name for o in plan.layers] == ['0', '3', '7'] and plan['7'].reason == 'they are an output of the model'
    o = plan['0']
    assert o.writers == ('0',) and o.readers == ('3',) and o.params == 16*(27 + 1 + 2) + 24*16*9 and o.units == 16
    assert o.params_after == len(o.kept)*(27 + 1 + 2 + 24*9) and o.error == o.errors[16 - len(o.kept)]
    assert plan.params == count_params(m) and plan.macs == brute_macs(m, x[:2])
    df = plan.to_frame()
    assert [*df.kept] == [len(o.kept) for o in plan.layers] and 'MACs (' in plan.title and 'groups shrink' in repr(plan)

def test_the_least_units_go_first():
    m,x = net(),image()
    with torch.no_grad():
        m[0].weight[[2, 5]] = 0
        m[3].weight[:, [2, 5]] = 0
    plan = plan_of(m, x, .9)
    assert not {2, 5} & {*plan.kept['0']}

def test_json(tmp_path):
    m,x = net(),image()
    plan = plan_of(m, x, round_to=4)
    again = Plan.load(plan.save(tmp_path/'plan.json'))
    assert type(again) is PruningPlan and again == plan and again.replan(.3) == plan.replan(.3)
    assert torch.equal(again.apply(m)(x), plan.apply(m)(x))
    d = json.loads(plan.to_json())
    d['layers'][0]['kept'] = [0, 99]
    with pytest.raises(ValueError, match="damaged plan: units of '0' must be different numbers from 0 to 15"): Plan.from_dict(d)

def test_saved_models_load(tmp_path):
    m,x = net(),image()
    first = plan_of(m, x, .7)
    half = first.apply(m)
    second = plan_of(half, x, .7)
    small = second.apply(half)
    save_compressed(small, tmp_path/'small', [first, second])
    again = load_compressed(tmp_path/'small', net)
    assert torch.equal(again(x), small(x)) and second.params == first.params_after

def test_heads_load(tmp_path):
    def build(): return nn.Sequential(nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 32, batch_first=True), 1), nn.Linear(24, 3)).eval()
    m,x = build(),torch.randn(2, 5, 24)
    plan = plan_of(m, x, .6)
    small = plan.apply(m)
    assert any(o.kind == 'heads' for o in plan.replaced)
    save_compressed(small, tmp_path/'small', plan)
    torch.testing.assert_close(load_compressed(tmp_path/'small', build)(x), small(x))

def test_another_model_is_refused():
    m,x = net(),image()
    plan = plan_of(m, x)
    with pytest.raises(ValueError, match="plan expects '0' to have 16 outputs, the model has 8 there"): plan.apply(nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(ValueError, match='or applied already'): plan.apply(plan.apply(m))
    with pytest.raises(ValueError, match='no such layer'): plan.apply(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1)))

def test_replan_is_a_new_plan():
    m,x = net(),image()
    plan = plan_of(m, x, .8)
    a = plan.replan(.5)
    assert a.macs_after <= .5*plan.macs and plan.macs_after > .5*plan.macs and a.kept == plan_of(m, x, .5).kept
    b = plan.replan(.5, cost='params', round_to=8)
    assert b.params_after <= .5*plan.params and all(len(k) % 8 == 0 for k in b.kept.values())
    for bad in (0, 1.5, -.5, 50, '0.5', float('nan'), True):
        with pytest.raises(ValueError, match=r'budget must be in \(0, 1\]'): plan.replan(bad)
    with pytest.raises(ValueError, match='round_to must be an int'): plan.replan(.5, round_to=0)

def test_edit():
    m,x = net(),image()
    plan = plan_of(m, x)
    e = plan.edit('3', .25)
    assert len(e.kept['3']) == 6 and e['3'].error == e['3'].errors[18] and e.policy.endswith('(edited)') and len(e.apply(m)[3].weight) == 6
    assert e.edit('3', None)['3'].reason == 'all kept by edit'
    with pytest.raises(ValueError, match="'7' cannot be pruned: they are an output"): plan.edit('7', .5)
    with pytest.raises(ValueError, match="no layer matches groups='33'"): plan.edit('33', .5)
    with pytest.raises(ValueError, match=r'keep must be in \(0, 1\]'): plan.edit('3', 2)

def test_meta():
    m,x = net(),image()
    plan = plan_of(m, x)
    assert [p.shape for p in plan.skeleton(net().to('meta')).parameters()] == [p.shape for p in plan.apply(m).parameters()]

def test_units_that_are_in_no_order_stay():
    m,x = net(),image()
    plan = plan_of(m, x, 1.)
    short = replace(plan, layers=tuple(replace(o, order=o.order[:4], errors=o.errors[:5]) if o.name == '0' else o for o in plan.layers))
    a = short.replan(.3)
    assert len(a.kept['0']) >= 12 and {*plan['0'].order[4:]} <= {*a.kept['0']}

# Scores

def test_taylor_is_the_first_order_change():
    m = mlp(8, 6, 3).double()
    x,y = rows().double(),torch.randint(0, 3, (4,))
    values = taylor_values(m, (x, y), loss=nn.functional.cross_entropy)
    w,eps = m[0].weight,1e-6
    def loss(): return nn.functional.cross_entropy(m(x), y).item()
    with torch.no_grad():
        old = w[2, 3].item()
        base = loss()
        w[2, 3] += eps
        slope = (loss() - base)/eps
    assert values['0.weight'][2, 3].item() == pytest.approx((slope*old)**2, rel=1e-3)

def test_taylor_of_frozen_models_leaves_no_trace():
    m,x = net().requires_grad_(False).train(),image()
    s = score_units(m, find_groups(m, x), 'taylor', x)
    assert all((v > 0).any() and v.isfinite().all() for v in s.values())
    assert all(p.grad is None and not p.requires_grad for p in m.parameters()) and m.training

def test_random_is_the_same_each_time():
    m,x = net(),image()
    gs = find_groups(m, x)
    a,b,c = (score_units(m, gs, 'random', seed=s)['0'] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)

def test_curve_of_ties(): assert curve(torch.tensor([1., 0., 1.])) == ([1, 0, 2], [0., 0., 1., 2.])

# The pruner

def test_errors():
    m,x = net(),image()
    for bad in (0, 1.5, -.5, 50, '0.5', float('nan'), None):
        with pytest.raises(ValueError, match=r'budget must be in \(0, 1\]'): Cut(bad)
    for kw in (dict(cost='flops'), dict(score='l1'), dict(round_to=0), dict(min_keep=.5)):
        with pytest.raises(ValueError, match=next(iter(kw))): Cut(**kw)
    with pytest.raises(ValueError, match="no layer matches layers='nope'"): Cut(layers='nope').plan(m, x)
    with pytest.raises(ValueError, match="score='taylor' looks at gradients: pass data="): Cut(score='taylor').plan(m, example=x)
    with pytest.raises(ValueError, match='pass data, or one batch as example='): Cut().plan(m)
    with pytest.raises(ValueError, match=r'nothing to prune \(0: they are an output of the model\)'): Cut().plan(nn.Sequential(nn.Linear(8, 3)), rows())
    with pytest.raises(ValueError, match='cannot be reached.*min_keep=12, round_to=1 and 1 groups left alone'): Cut(.3, min_keep=12).plan(m, x)
    with pytest.raises(TypeError, match='must be a torch.nn.Module'): Cut().plan('resnet', x)

def test_layers_and_exclude():
    m,x = net(),image()
    assert [*Cut(.8, layers='0').plan(m, x).kept] == ['0'] and [*Cut(.8, exclude=['0', '7']).plan(m, x).kept] == ['3']
    assert Cut(.8, layers='0').plan(m, x)['3'].reason == 'not among layers='

def test_min_keep_and_round_to():
    m,x = net(),image()
    plan = Cut(.3, cost='params', min_keep=5, round_to=4).plan(m, x)
    assert all(len(k) >= 5 and len(k) % 4 == 0 for k in plan.kept.values())

def test_the_example_is_small():
    m = net()
    assert small_example(m, image(64)).shape[0] == 2 and small_example(m, [(image(9), torch.zeros(9))]).shape[0] == 2
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2)
        def forward(self, x, mask=None): return self.a(x.view(4, 3))
    assert small_example(Fixed(), torch.randn(4, 3)).shape == (4, 3)
    assert {k: len(v) for k,v in small_example(Fixed(), dict(x=torch.randn(4, 3), mask=torch.ones(4))).items()} == dict(x=4, mask=4)

def test_data_of_any_form():
    m,x = net(),image(8)
    want = Cut(.5, score='taylor').plan(m, x).kept
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)
    for data in ([x], loader, iter([x]), (x,)): assert Cut(.5, score='taylor').plan(m, data).kept == want

def test_left_as_found():
    m,x = net().train(),image()
    m[0].requires_grad_(False)
    before = {k: v.clone() for k,v in m.state_dict().items()}
    rng = torch.get_rng_state()
    small = Cut(.5, score='taylor').prune(m, x)
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items()) and torch.equal(rng, torch.get_rng_state())
    assert m.training and small.training and not small[0].weight.requires_grad and small[3].weight.requires_grad

def test_twice():
    m,x = net(),image()
    a = Cut(.7).prune(m, x)
    b = Cut(.5).prune(a, x)
    assert brute_macs(b, x) <= .5*brute_macs(a, x) and brute_macs(a, x) <= .7*brute_macs(m, x)

def test_latency(monkeypatch):
    "The clock shows what the widths say"
    import fasterai.prune.speed as speed
    monkeypatch.setattr(speed, 'time_both', lambda m, small, run, seconds: (10., 10.*len(small[0].weight)/16 + .1))
    m,x = net(),image()
    plan = Cut(.6, cost='latency', layers='0').plan(m, x)
    assert len(plan.kept['0']) == 9 and plan.note == '10 → 5.72 ms'         # 10 would take 6.35
    assert not Cut(1., cost='latency').plan(m, x).replaced
    with pytest.raises(Unreachable, match='budget=0.01 of the time cannot be reached: the fastest copy took'): Cut(.01, cost='latency').plan(m, x)

@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v3_small', 'convnext_tiny', 'densenet121', 'regnet_y_400mf', 'googlenet'])
def test_torchvision(name):
    import torchvision.models as tv
    m = getattr(tv, name)(num_classes=10, **({'aux_logits': False, 'init_weights': False} if name == 'googlenet' else {})).eval()
    x = torch.randn(2, 3, 64, 64)
    whole = Cut(.7).plan(m, x)
    for budget in (.7, .5):
        plan = whole.replan(budget)
        small = plan.apply(m)
        assert count_params(small) == plan.params_after and count_macs(small, x) == plan.macs_after <= budget*count_macs(m, x)
        assert small(x).shape == (2, 10)

# Widths in multiples, data, other methods

@pytest.mark.parametrize('width', [12, 20, 100])
def test_widths_are_multiples_of_eight_or_say_why(width):
    m,x = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3)),rows()
    for budget in (.9, .6, .3):
        try: o = Cut(budget, cost='params', round_to=8).plan(m, x)['0']
        except Unreachable as e:
            assert 'round_to=8' in str(e) and count_params(mlp(8, 8, 3)) > budget*count_params(m)
            continue
        n = len(o.kept)
        assert n % 8 == 0 and count_params(mlp(8, n, 3)) <= budget*count_params(m) < count_params(mlp(8, n+8, 3))
    plan = Cut(.99, cost='params', round_to=32).plan(mlp(8, 12, 40, 3), rows())
    assert plan['0'].reason == 'no smaller multiple of 32' and len(plan.kept['2']) == 32

def test_obs_without_data_is_refused_and_magnitude_warns():
    m,x = net(),image()
    with pytest.raises(ValueError, match="score='obs' looks at activations: pass data=, or score='magnitude'"): Pruner(.5).plan(m, example=x)
    with pytest.warns(UserWarning, match='the layers that read the pruned units are not solved again'): Pruner(.5, score='magnitude').plan(m, example=x)

def test_before_and_after_low_rank():
    from fasterai.misc.fc_decomposer import FC_Decomposer
    torch.manual_seed(0)
    m,x = mlp(16, 64, 48, 4),torch.randn(200, 16)
    pairs = FC_Decomposer(rank_ratio=.25).decompose(m)
    after,before = Pruner(.6).prune(pairs, x),FC_Decomposer(rank_ratio=.25).decompose(Pruner(.6).prune(m, x))
    assert count_macs(after, x) <= .6*count_macs(pairs, x) and count_macs(before, x) < count_macs(pairs, x)
    assert after(x).shape == before(x).shape == (200, 4)
    assert [type(o) for o in after.modules() if not [*o.children()]] == [type(o) for o in pairs.modules() if not [*o.children()]]

@pytest.mark.slow
@pytest.mark.parametrize('cost', ['macs', 'params'])
@pytest.mark.parametrize('name', ['hf-bert', 'tv-convnext'])
def test_transformers_and_convnext_meet_budgets_from_below(name, cost):
    from zoo import ZOO
    model,x = ZOO[name].make()
    x = x if isinstance(x, dict) else x[0]
    whole,which = Cut(1., cost=cost).plan(model, x),('params','macs').index(cost)
    for budget in (.9, .7, .5, .3):
        try: plan = whole.replan(budget)
        except Unreachable: continue
        small = plan.apply(model)
        full,left = (count_params(model), count_params(small)) if cost == 'params' else (count_macs(model, x), count_macs(small, x))
        assert left <= budget*full
        counts = {n: len(k) for n,k in plan.kept.items()}
        for o in plan.replaced: assert plan.costs.at(counts | {o.name: counts[o.name]+1})[which] > budget*plan.costs.at({})[which]

@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18', 'hf-bert'])
def test_pruned_models_are_exported_and_compiled(name, tmp_path):
    from zoo import ZOO
    if name == 'resnet18':
        from torchvision.models import resnet18
        model,x = resnet18(num_classes=10).eval(),torch.randn(2, 3, 64, 64)
    else: model,x = ZOO[name].make()
    small = Cut(.5, cost='params').prune(model.eval(), x)
    args,kw = ((x,), {}) if torch.is_tensor(x) else ((), dict(x))
    def first(o): return o if torch.is_tensor(o) else o[0]
    with torch.no_grad():
        want = first(small(*args, **kw))
        got = first(torch.export.export(small, args, kw).module()(*args, **kw))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(first(torch.compile(small, backend='aot_eager')(*args, **kw)), want, rtol=1e-4, atol=1e-4)
        ort = pytest.importorskip('onnxruntime')
        pytest.importorskip('onnxscript')
        torch.onnx.export(small, args, tmp_path/'m.onnx', kwargs=kw, dynamo=True, verbose=False)
    sess = ort.InferenceSession(tmp_path/'m.onnx', providers=['CPUExecutionProvider'])
    feed = dict(zip([o.name for o in sess.get_inputs()], [t.numpy() for t in (*args, *kw.values())]))
    torch.testing.assert_close(torch.from_numpy(sess.run(None, feed)[0]), want, rtol=1e-4, atol=1e-4)

# Time by a table

def timed_chain(n, m):
    "A chain whose layers take time in steps of four widths"
    def steps(k): return tuple(range(0, k, 4)) + (k,)
    def table(outs, ins): return outs, ins, tuple(tuple(.5*i + o*i/9 for i in ins) for o in outs)
    return Times(chain(n, m), .7, {'1': table(steps(n), (5,)), '2': table(steps(m), steps(n)), '3': table((3,), steps(m))})

@pytest.mark.parametrize('budget', [.9, .6, .35])
@pytest.mark.parametrize('kind', ['convex', 'steps', 'concave'])
def test_a_budget_of_time_is_near_the_best_choice(budget, kind):
    rng,times = np.random.default_rng(1),timed_chain(9, 7)
    def errs(n):
        e = dict(convex=np.sort(rng.exponential(size=n)), steps=rng.integers(0, 3, n)*1., concave=np.sort(rng.exponential(size=n))[::-1])
        return np.r_[0, e[kind].cumsum()]
    errors = dict(a=errs(9), b=errs(7))
    def total(kept): return sum(errors[g][len(errors[g])-1-k] for g,k in kept.items())
    def ms(a, b): return .7 + (.5*5 + 5*a/9) + (.5*a + a*b/9) + (.5*b + 3*b/9)     # bilinear, so that the table is exact
    kept = fit_widths(times, errors, budget, cost='time')
    assert times.at(kept)[0] == pytest.approx(ms(**kept))
    every = [dict(a=i, b=j) for i,j in product(range(1, 10), range(1, 8)) if ms(i, j) <= budget*ms(9, 7) + 1e-9]
    assert kept in every and total(kept) <= 2*min(map(total, every)) + 1e-9
    for g,n in (('a', 9), ('b', 7)): assert kept[g] == n or ms(**(kept | {g: kept[g]+1})) > budget*ms(9, 7)

def test_narrower_layers_never_count_as_slower(monkeypatch):
    "However noisy the clock is"
    import fasterai.core.latency as clock, fasterai.prune.timing as timing
    rng = np.random.default_rng(0)
    def noisy(calls, seconds): return rng.uniform(.1, 1., len(calls)).tolist()
    monkeypatch.setattr(clock, '_latencies', noisy)
    monkeypatch.setattr(timing, '_latencies', noisy)
    m,x = net(),image()
    times = timing.measure_times(m, x, measure_costs(m, x, find_groups(m, x)), LatencyTable(4))
    for g,n in zip(times.groups, times.costs.units):
        ms = [times.at({g: k})[0] for k in range(1, n+1)]
        assert ms == sorted(ms)

def test_pruner_with_a_table(monkeypatch, tmp_path):
    "The clock shows the size of a weight"
    import fasterai.core.latency as clock, fasterai.prune.timing as timing
    asked = []
    def size(layer): return float(layer.weight.numel())
    def fake(calls, seconds):
        asked.extend(calls)
        return [size(c.func) for c in calls]
    def layers(model): return [o for o in model.modules() if isinstance(o, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))]
    def whole(model): return 500. + sum(map(size, layers(model)))
    monkeypatch.setattr(clock, '_latencies', fake)
    monkeypatch.setattr(timing, '_latencies', lambda calls, seconds: [whole(c.args[0]) for c in calls])
    m,x = net(),image()
    table = LatencyTable(batch_size=32)
    plan = Cut(.6, cost=table).plan(m, x)
    small = plan.apply(m)
    assert whole(small) <= .6*whole(m) and plan.times.at({n: len(k) for n,k in plan.kept.items()})[0] == pytest.approx(whole(small))
    assert all(len(c.args[0]) == 32 for c in asked) and 'cost=LatencyTable(32),' in plan.policy and plan.note.endswith('ms by the table')
    n = len(asked)
    assert Cut(.8, cost=table).plan(m, x).replan(.6).kept == plan.kept and len(asked) == n     # measured once
    plan.save(tmp_path/'p.json')
    assert PruningPlan.load(tmp_path/'p.json').replan(.8).kept == plan.replan(.8).kept
    with pytest.raises(ValueError, match='the plan has no times: make it with Pruner'): plan_of(m, x).replan(.5, cost='time')
    with pytest.raises(Unreachable, match='leave 0.* of the time'): Cut(.01, cost=table).plan(m, x)
    with pytest.raises(ValueError, match="cost must be 'macs', 'params', 'latency' or a LatencyTable, got 'time'"): Cut(.5, cost='time')
