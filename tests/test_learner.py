"What a decomposed Learner, rank_find, SelfDistillation, refine and replan promise, against computations of their own"
import contextlib, copy, inspect, io, random, re, time, warnings
from functools import partial
from types import SimpleNamespace
import pandas as pd
import matplotlib, matplotlib.pyplot as plt, numpy as np, pytest, torch, torch.nn.functional as F
from fastai.metrics import *
from fastai.tabular.model import TabularModel
from fastai.vision.all import (Callback, CancelFitException, CrossEntropyLossFlat, DataLoader, DataLoaders, EarlyStoppingCallback, FetchPredsCallback,
    GradientAccumulation, GradientClip, L, LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat, Learner, MixUp, MSELossFlat, OptimWrapper,
    ReduceLROnPlateau, SaveModelCallback, SGD, load_learner, params, vision_learner)
from fastprogress.fastprogress import ConsoleProgressBar, NBProgressBar
from scipy.special import log_softmax, softmax
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import nn
from torchvision.models import resnet18
from fasterai.core import batches
from fasterai.core.batches import _Bar
from fasterai.lowrank.cli import digits_dls
from fasterai.misc.all import *
from fasterai.lowrank.search import RATIOS

matplotlib.use('agg')
pytestmark = [pytest.mark.filterwarnings('ignore:.*(layers grew|singular v|GradScaler is enabled|CUDA is not available|nothing to decompose):UserWarning'),
              pytest.mark.filterwarnings('ignore::FutureWarning')]

# ------------------------------------------------------------------ helpers

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0); random.seed(0); np.random.seed(0)
    yield
    plt.close('all')

def gen(seed=0): return torch.Generator().manual_seed(seed)

def points(n=400):
    "Correlated rows (n, 20) and their classes out of 4"
    g = gen()
    x = torch.randn(n, 20, generator=g)@(torch.randn(20, 20, generator=g)*.8**torch.arange(20)) + .3
    return x, (torch.tanh(x)@torch.randn(20, 4, generator=g)).argmax(1)

def mk_dls(x, y, n_valid=100, bs=50):
    items = list(zip(x, y))
    return DataLoaders(DataLoader(items[n_valid:], bs=bs, shuffle=True), DataLoader(items[:n_valid], bs=30), device=torch.device('cpu'))

def mlp(out=4, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32, bias), nn.ReLU(), nn.Linear(32, 24, bias), nn.ReLU(), nn.Linear(24, out, bias))

_states = {}
def learner(kind='class', metrics=accuracy, loss_func=None, model=None, **kw):
    "A Learner on 20 numbers, trained once for all tests"
    x,y = points()
    if kind == 'number': y = (x[:,:3].tanh()*torch.tensor([1.,2.,-1.])).float()
    loss = loss_func or (CrossEntropyLossFlat() if kind == 'class' else MSELossFlat())
    dls,m = mk_dls(x, y),mlp(4 if kind == 'class' else 3)
    if kind not in _states:
        fit(Learner(dls, m, loss_func=CrossEntropyLossFlat() if kind == 'class' else MSELossFlat()), 8, 5e-3)
        _states[kind] = m.state_dict()
    m.load_state_dict(copy.deepcopy(_states[kind]))
    return Learner(dls, m if model is None else model, loss_func=loss, metrics=metrics if kind == 'class' else (), **kw)

def fit(learn, *args, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kw)
    return learn

def validated(learn):
    with learn.no_bar(): return list(learn.validate())

def whole(dl): return map(torch.cat, zip(*dl))

def state(m): return {k: v.detach().clone() for k,v in m.state_dict().items()}
def equal(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
def n_hooks(m): return sum(len(o._forward_hooks) + len(o._forward_pre_hooks) + len(o._backward_hooks) for o in m.modules())
def flags(m): return [o.training for o in m.modules()]
def pairs(m): return {n: o for n,o in m.named_modules() if is_pair(o)}
def rel(a, b): return ((a - b).double().norm()/b.double().norm()).item()
def rng(): return torch.get_rng_state(), random.getstate(), np.random.get_state()
def same_rng(a, b): return torch.equal(a[0], b[0]) and a[1] == b[1] and all(map(np.array_equal, a[2], b[2]))
def find(learn, *args, **kw): return learn.rank_find(*args, **{'show_plot': False} | kw)

class Spy(Callback):
    "What the loss was made of, batch by batch, after all other callbacks have changed it"
    order = 9.5
    def before_fit(self): self.seen = []
    def after_loss(self):
        if self.training:
            self.seen.append(dict(x=self.xb[0].detach().clone(), y=self.yb[0].clone(), pred=self.pred.detach().clone(), state=state(self.model),
                                  loss=float(self.learn.loss), grad=float(self.learn.loss_grad)))

class Stop(Callback):
    "Raises something in the second batch of training"
    order = 50
    def __init__(self, exc): self.exc = exc
    def after_batch(self):
        if self.training and self.iter == 1: raise self.exc

def kl(p, t, T=2., axis=-1):
    "Hinton et al. by scipy: batch mean of Σ softmax(t/T) (log softmax(t/T) - log softmax(p/T)), times T²"
    p,t = (np.moveaxis(o.detach().double().numpy(), axis, -1)/T for o in (p, t))
    k = (softmax(t, -1)*(log_softmax(t, -1) - log_softmax(p, -1))).sum(-1)
    return k.mean()*T**2

# ------------------------------------------------------------------ decompose

def test_decompose_swaps_the_model_and_drops_the_optimizer():
    learn = fit(learner(), 1)
    net,before = learn.model,state(learn.model)
    assert learn.opt is not None and learn.decompose(.25) is learn
    assert learn.model is not net and learn.opt is None and list(pairs(learn.model)) == ['0', '2', '4']
    assert [p[0].out_features for p in pairs(learn.model).values()] == [5, 6, 1] and equal(before, state(net))

@pytest.mark.parametrize('how', ['fit', 'fit_one_cycle', 'fine_tune'])
def test_training_changes_every_factor(how):
    learn = fit(learner(), 1).decompose(.25)
    before = state(learn.model)
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(1, 1e-3)
    assert len(before) == 9 and not any(torch.equal(v, before[k]) for k,v in state(learn.model).items())

def test_decompose_leaves_the_dense_model_as_it_was():
    learn = learner()
    net = learn.model.train()
    net[2].eval()
    net[0].bias.requires_grad_(False)
    net[2].weight.grad = torch.ones(24, 32)
    calls = []
    net[2].register_forward_hook(lambda *a: calls.append(1))
    before = flags(net),n_hooks(net),state(net),[p.requires_grad for p in net.parameters()]
    learn.decompose(.25)
    after = flags(net),n_hooks(net),state(net),[p.requires_grad for p in net.parameters()]
    assert before[:2] == after[:2] and before[3] == after[3] and equal(before[2], after[2])
    assert torch.equal(net[2].weight.grad, torch.ones(24, 32)) and flags(learn.model[2]) == [False]*3

def test_decompose_is_calibrated_on_the_training_set():
    learn = learner()
    ref = FC_Decomposer(.25).decompose(learn.model, DataLoader(list(zip(*whole(learn.dls.train))), bs=300))
    plain = FC_Decomposer(.25).decompose(learn.model)
    learn.decompose(.25)
    for i in (0, 2, 4): assert rel(product(learn.model[i]), product(ref[i])) < .01 < .3 < rel(product(learn.model[i]), product(plain[i]))

def product(pair): return pair[1].weight.detach()@pair[0].weight.detach()

@pytest.mark.parametrize('kw', [dict(rank_ratio=.25), dict(policy=2), dict(policy=Energy(.8)), dict(policy={'2': 4}), dict(layers='2'), dict(exclude='4'),
    dict(rank_ratio=.9, skip_unprofitable=True, layers='*'), dict(round_to=4)], ids=str)
def test_without_calibration_it_is_the_plain_decomposer(kw):
    learn = learner()
    ref = FC_Decomposer(**kw).decompose(learn.model)
    assert equal(state(ref), state(learn.decompose(calibrated=False, **kw).model))

@pytest.mark.parametrize('ratio', [1, 1.])
def test_the_ratio_means_what_it_means_to_the_decomposer(ratio):
    learn = learner()
    ref = FC_Decomposer(ratio).decompose(learn.model)
    assert [p[0].out_features for p in pairs(learn.decompose(ratio, calibrated=False).model).values()] == [p[0].out_features for p in pairs(ref).values()]

@pytest.mark.parametrize('ratio', [50, 0, 0., 1.5, -1])
def test_a_wrong_ratio(ratio):
    learn = learner()
    net = learn.model
    with pytest.raises(ValueError, match=r'rank_ratio must be in \(0, 1\]'): learn.decompose(ratio)
    assert learn.model is net

def test_decompose_by_a_plan():
    learn = learner()
    plan = FC_Decomposer(policy=ParamBudget(.4)).plan(learn.model, learn.dls)
    ref = plan.apply(learn.model)
    assert equal(state(ref), state(learn.decompose(plan=plan).model))

def test_decompose_by_a_plan_from_a_file(tmp_path):
    learn = learner()
    x,_ = whole(learn.dls.train)
    FC_Decomposer(.25).plan(learn.model, x).save(tmp_path/'plan.json')
    plan = DecompositionPlan.load(tmp_path/'plan.json')
    ref = plan.apply(learn.model, data=x)
    assert equal(state(ref), state(learn.decompose(plan=plan, data=x).model))

def test_decompose_with_saved_statistics():
    learn = learner()
    stats = calibrate(learn.model, learn.dls.valid)
    ref = FC_Decomposer(.25).decompose(learn.model, stats)
    assert equal(state(ref), state(learn.decompose(.25, data=stats).model))

def test_n_batches_limits_what_is_looked_at():
    learn = learner()
    seen = []
    learn.model.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    learn.decompose(.25, n_batches=2)
    assert seen == [50]*5 and '2 batches, 100 rows' in learn.plans[0].note      # the first one three times more, to check the swap

@pytest.mark.parametrize('kw,error,text', [(dict(rank_ratio=.3, policy=2), ValueError, 'not both'), (dict(layers='nope'), ValueError, "'nope'"),
    (dict(policy='half'), TypeError, 'policy'), (dict(data=3), TypeError, 'data must be'), (dict(n_batches=0), ValueError, 'n_batches'),
    (dict(sensitivity='x'), ValueError, 'sensitivity'), (dict(policy=ParamBudget(.001)), ValueError, 'allows')], ids=str)
def test_an_error_leaves_the_learner_as_it_was(kw, error, text):
    learn = fit(learner(), 1)
    net,opt,before = learn.model,learn.opt,state(learn.model)
    with pytest.raises(error, match=text): learn.decompose(**kw)
    assert learn.model is net and learn.opt is opt and equal(before, state(net)) and n_hooks(net) == 0
    with pytest.raises(ValueError, match='was not decomposed'): learn.undecompose()

def test_a_plan_of_another_model():
    learn = learner()
    with pytest.raises(ValueError, match='another model'): learn.decompose(plan=FC_Decomposer(.5).plan(nn.Sequential(nn.Linear(7, 7))))

def test_a_model_without_linear_layers():
    learn = learner(model=nn.Sequential(nn.Unflatten(1, (1, 20)), nn.Conv1d(1, 4, 20), nn.Flatten()))
    with pytest.warns(UserWarning, match='nothing to decompose'): learn.decompose(.5)
    assert not pairs(learn.model) and len(validated(learn)) == 2

def test_mixed_precision_and_everything_else_stays():
    for to in ('to_fp16', 'to_bf16'):
        learn = getattr(learner(), to)()
        cbs,metrics = list(learn.cbs),list(learn.metrics)
        learn.decompose(.25)
        before = state(learn.model)
        assert list(learn.cbs) == cbs and list(learn.metrics) == metrics
        fit(learn, 1, 1e-3)
        assert not any(torch.equal(v, before[k]) for k,v in state(learn.model).items())
        assert {p.dtype for p in learn.model.parameters()} == {torch.float32}

# ------------------------------------------------------------------ parameter groups

def halves(m): return L(m[:2], m[2:]).map(params)

def groups(learn): return [{id(p) for p in g} for g in learn.opt.param_lists]

def test_parameter_groups_hold_the_factors():
    learn = learner(splitter=halves).decompose(.25)
    learn.create_opt()
    assert groups(learn) == [{id(p) for p in learn.model[0].parameters()}, {id(p) for p in learn.model[2:].parameters()}]
    assert list(map(len, groups(learn))) == [3, 6]

def test_freeze_and_unfreeze():
    learn = learner(splitter=halves).decompose(.25)
    learn.freeze()
    before = state(learn.model)
    fit(learn, 1, 1e-3)
    changed = {k: not torch.equal(v, before[k]) for k,v in state(learn.model).items()}
    assert [changed[k] for k in before] == [False]*3 + [True]*6
    learn.unfreeze()
    fit(learn, 1, 1e-3)
    assert not any(torch.equal(v, before[k]) for k,v in state(learn.model).items())

def test_frozen_before_decompose_can_be_unfrozen_after():
    learn = learner(splitter=halves)
    learn.freeze()
    learn.decompose(.25)
    assert [p.requires_grad for p in learn.model.parameters()] == [False]*3 + [True]*6
    learn.unfreeze()
    before = state(learn.model)
    fit(learn, 1, 1e-3)
    assert not any(torch.equal(v, before[k]) for k,v in state(learn.model).items())

def test_layer_wise_learning_rates():
    learn = learner(splitter=halves).decompose(.25)
    before = state(learn.model)
    fit(learn, 1, slice(1e-9, 1e-2))
    moved = [(v - before[k]).abs().max().item() for k,v in state(learn.model).items()]
    assert max(moved[:3]) < 1e-6 and min(moved[3:]) > 1e-4

def test_vision_learner():
    dls = digits_dls(8, n=60, bs=30)
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
    learn.decompose(.25, layers=['1.4', '1.8'])     # unasked, the head would stay dense
    assert set(pairs(learn.model)) == {'1.4', '1.8'}
    learn.create_opt()
    learn.freeze()
    head = {id(p) for o in pairs(learn.model).values() for p in o.parameters()}
    assert head <= groups(learn)[-1] and sum(map(len, groups(learn))) == len(list(learn.model.parameters()))
    before = state(learn.model)
    fit(learn, 1, 1e-3)
    assert all(not torch.equal(v, before[k]) for k,v in state(learn.model).items() if k.startswith(('1.4.', '1.8.')))
    assert all(torch.equal(v, before[k]) for k,v in state(learn.model).items() if 'conv' in k)

def by_closure(net): return lambda m: [list(net[:2].parameters()), list(net[2:].parameters())]
def by_lists(net): groups = [list(net[:2].parameters()), list(net[2:].parameters())]; return lambda m: groups
def by_half_a_closure(net): return lambda m: [list(net[:2].parameters()), list(m[2:].parameters())]
def by_attribute(net): return lambda m: [[m[0].weight, m[0].bias], [p for l in (m[2], m[4]) for p in (l.weight, l.bias)]]
def by_name(net): return lambda m: [[p for n,p in m.named_parameters() if n in ('0.weight', '0.bias')],
                                    [p for n,p in m.named_parameters() if n in ('2.weight', '2.bias', '4.weight', '4.bias')]]

@pytest.mark.parametrize('mk', [by_closure, by_lists, by_half_a_closure, by_attribute, by_name])
def test_a_splitter_of_the_dense_model_trains_the_small_one(mk):
    learn = learner()
    net,before = learn.model,state(learn.model)
    learn.splitter = mk(net)
    learn.decompose(.25)
    small = state(learn.model)
    fit(learn, 1, slice(1e-9, 1e-2))
    assert groups(learn) == [{id(p) for p in learn.model[0].parameters()}, {id(p) for p in learn.model[2:].parameters()}]
    moved = [(v - small[k]).abs().max().item() for k,v in state(learn.model).items()]
    assert max(moved[:3]) < 1e-6 and min(moved[3:]) > 1e-4 and equal(before, state(net))

def test_a_splitter_of_the_dense_model_with_one_group():
    learn = learner()
    net = learn.model
    learn.splitter = lambda m: net.parameters()
    fit(learn.decompose(.25).decompose(.5, layers='4'), 1)
    assert groups(learn) == [{id(p) for p in learn.model.parameters()}]

def test_a_splitter_that_leaves_layers_out_on_purpose():
    learn = learner(splitter=lambda m: [list(m[4].parameters())]).decompose(.25)
    before = state(learn.model)
    fit(learn, 1, 1e-2)
    assert [k for k,v in state(learn.model).items() if not torch.equal(v, before[k])] == ['4.0.weight', '4.1.weight', '4.1.bias']

def test_a_splitter_of_another_model_is_an_error():
    learn,other = fit(learner(), 1),mlp()
    net,opt = learn.model,learn.opt
    learn.splitter = lambda m: list(other.parameters())
    with pytest.raises(ValueError, match=r"splitter '<lambda>' returns 6 parameters that are not in the model.*learn.splitter = lambda m"): learn.decompose(.25)
    assert learn.model is net and learn.opt is opt and learn.plans == []
    learn.splitter = params
    learn.decompose(.25)
    learn.splitter = lambda m: list(m.parameters()) + [other[0].weight]
    with pytest.raises(ValueError, match='returns 1 parameters that are not'): fit(learn, 1)
    assert learn.opt is None

def test_an_optimizer_built_for_the_dense_model_is_an_error():
    learn = learner()
    net,ps = learn.model,list(learn.model.parameters())
    learn.opt_func = OptimWrapper(opt=torch.optim.SGD(ps, lr=.1))
    with pytest.raises(ValueError, match='opt_func gives an optimizer of 6 parameters'): learn.decompose(.25)
    assert learn.model is net
    learn.opt_func = lambda p, **kw: OptimWrapper(opt=torch.optim.SGD(ps, lr=.1))
    learn.decompose(.25)
    with pytest.raises(ValueError, match='opt_func gives an optimizer of 6 parameters'): fit(learn, 1)
    learn.opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
    before = state(learn.model)
    fit(learn, 1, 1e-2)
    assert not any(torch.equal(v, before[k]) for k,v in state(learn.model).items())

def test_a_frozen_model_can_be_decomposed():
    learn = learner()
    learn.model.requires_grad_(False)
    assert not any(p.requires_grad for p in learn.decompose(.25).model.parameters())

# ------------------------------------------------------------------ in a running fit

class At(Callback):
    "Calls `f(learn)` once, at `event` of an epoch"
    def __init__(self, event, f=lambda learn: learn.decompose(.25), order=0, epoch=1):
        self.event,self.f,self.order,self.at,self.done = event,f,order,epoch,0
        setattr(self, event, self.go)
    def go(self):
        if self.done or self.event != 'before_fit' and self.learn.epoch != self.at: return
        self.done = 1
        self.f(self.learn)

BETWEEN = ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_batch', 'after_train', 'before_validate', 'after_validate', 'after_epoch']
WITHIN = ['after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step']

def one_cycle(learn, *cbs, n=3, lr=5e-3):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, lr, cbs=cbs)
    return learn

@pytest.mark.parametrize('event', BETWEEN)
def test_decompose_in_a_running_fit(event):
    learn,ref = learner(),one_cycle(learner())
    net,seen = learn.model,{}
    one_cycle(learn, At(event, lambda l: seen.update(state(l.decompose(.25).model))))
    assert list(pairs(learn.model)) == ['0', '2', '4'] and learn.decompose is not None and len(learn.plans) == 1
    assert not any(torch.equal(v, seen[k]) for k,v in state(learn.model).items())           # every factor was trained
    assert np.allclose(learn.recorder.lrs, ref.recorder.lrs) and len(learn.recorder.values) == 3    # the schedule went on
    assert groups(learn) == [{id(p) for p in learn.model.parameters()}]
    for k,v in ref.opt.hypers[0].items(): assert learn.opt.hypers[0][k] == pytest.approx(v), k
    assert learn.undecompose().model is net

def test_the_dense_model_is_not_trained_further():
    learn,seen = learner(),{}
    net = learn.model
    one_cycle(learn, At('before_epoch', lambda l: (seen.update(state(net)), l.decompose(.25))))
    assert equal(seen, state(net))

@pytest.mark.parametrize('event', WITHIN)
def test_not_within_a_batch(event):
    learn = learner()
    net = learn.model
    with pytest.raises(RuntimeError, match='learn.decompose cannot run between the forward pass and the step of a batch'): one_cycle(learn, At(event))
    assert learn.model is net and learn.plans == [] and not learn.decompose(.25).plans == []

@pytest.mark.parametrize('event', ['before_batch', 'after_batch', 'after_epoch'])
@pytest.mark.parametrize('order', [0, 55])
@pytest.mark.parametrize('to', ['to_fp16', 'to_bf16'])
def test_in_a_fit_of_mixed_precision(to, order, event):
    learn = getattr(learner(), to)()
    one_cycle(learn, At(event, order=order))
    assert list(pairs(learn.model)) == ['0', '2', '4'] and {p.dtype for p in learn.model.parameters()} == {torch.float32}

@pytest.mark.parametrize('opt', [partial(OptimWrapper, opt=torch.optim.AdamW), partial(OptimWrapper, opt=torch.optim.SGD), SGD], ids=['AdamW', 'SGD', 'fastai'])
def test_groups_keep_their_learning_rates_and_stay_frozen(opt):
    learn = learner(splitter=halves, opt_func=opt)
    learn.freeze()
    one_cycle(learn, At('before_batch'), lr=slice(1e-5, 1e-3))
    ref = learner(splitter=halves, opt_func=opt)
    ref.freeze()
    one_cycle(ref, lr=slice(1e-5, 1e-3))
    for a,b in zip(learn.opt.hypers, ref.opt.hypers, strict=True):
        for k in ('lr', 'wd', 'mom'): assert k not in b or a[k] == pytest.approx(b[k]), k
    assert [p.requires_grad for p in learn.model.parameters()] == [False]*3 + [True]*6 and learn.opt.frozen_idx == 1
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())

@pytest.mark.parametrize('cb', [GradientAccumulation(100), GradientClip(), EarlyStoppingCallback(patience=5), ReduceLROnPlateau(patience=5)], ids=lambda o: o.name)
def test_with_other_callbacks(cb):
    learn = learner()
    with contextlib.redirect_stdout(io.StringIO()): one_cycle(learn, At('before_batch'), cb)
    assert list(pairs(learn.model)) == ['0', '2', '4']

def test_the_best_of_the_dense_model_does_not_count(tmp_path):
    learn = learner(path=tmp_path, cbs=SaveModelCallback(fname='best', reset_on_fit=False))
    with contextlib.redirect_stdout(io.StringIO()):
        fit(learn, 2, 1e-5)
        best = learn.save_model.best
        fit(learn.decompose(policy=1), 1, 0.)
    assert learn.save_model.best > best and list(pairs(learn.model)) == ['0', '2', '4']
    stop = EarlyStoppingCallback(patience=2, reset_on_fit=False)
    stop.best = 0.
    learn = learner(cbs=stop)
    with contextlib.redirect_stdout(io.StringIO()): fit(learn, 3, 0., cbs=At('before_epoch', lambda l: l.decompose(policy=1)))
    assert stop.best > .1

def test_undecompose_in_a_running_fit():
    learn = learner()
    net = learn.model
    learn.decompose(.25)
    one_cycle(learn, At('before_batch', lambda l: l.undecompose()))
    assert learn.model is net and groups(learn) == [{id(p) for p in net.parameters()}] and learn.plans == []

def test_an_error_in_a_running_fit_changes_nothing():
    learn = learner()
    net,seen = learn.model,[]
    def go(l):
        opt = l.opt
        l.splitter = lambda m: list(mlp().parameters())
        with pytest.raises(ValueError, match='not in the model'): l.decompose(.25)
        seen.append(l.model is net and l.opt is opt)
    one_cycle(learn, At('before_batch', go))
    assert seen == [True] and learn.model is net

def test_a_different_number_of_groups_in_a_running_fit():
    learn = learner(splitter=lambda m: [list(m.parameters())] if isinstance(m[0], nn.Linear) else [list(m[:2].parameters()), list(m[2:].parameters())])
    with pytest.raises(RuntimeError, match='2 parameter groups of the model after learn.decompose, and made 1 before'): one_cycle(learn, At('before_batch'))
    assert learn.plans == []

def test_after_a_fit_that_broke_off_no_fit_is_running():
    learn = learner()
    with pytest.raises(ZeroDivisionError): one_cycle(learn, At('before_batch', lambda l: 1/0))
    assert learn.decompose(.25).opt is None

def test_not_within_lr_find(tmp_path):
    learn = learner(path=tmp_path, cbs=At('before_fit'))
    net = learn.model
    with pytest.raises(RuntimeError, match='learn.decompose cannot run inside lr_find'), learn.no_bar(): learn.lr_find(num_it=10, show_plot=False)
    assert learn.model is net

def test_within_get_preds_and_validate():
    learn = learner(cbs=At('before_batch', epoch=0))
    with learn.no_bar(): preds,_ = learn.get_preds()
    assert preds.shape == (100, 4) and list(pairs(learn.model)) == ['0', '2', '4'] and learn.opt is None and not learn.lock.locked()

@pytest.mark.parametrize('event', ['after_epoch', 'before_batch'])
def test_rank_find_is_not_for_callbacks(event):
    def go(l):
        with pytest.raises(RuntimeError, match='learn.rank_find validates the model many times'): l.rank_find(show_plot=False)
    learn,cb = learner(),At(event, go)
    one_cycle(learn, cb)
    assert cb.done
    if event == 'before_batch':
        with learn.no_bar(): learn.validate(cbs=(cb := At(event, go, epoch=0)))
        assert cb.done

# ------------------------------------------------------------------ layers that are not worth it

def wide(n_out, n_in=13):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n_in, 300), nn.ReLU(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, n_out))

@pytest.mark.parametrize('calibrated', [True, False])
def test_a_head_of_few_classes_stays_dense(calibrated):
    learn = Learner(mk_dls(torch.randn(400, 13, generator=gen()), torch.arange(400) % 3), wide(3), loss_func=CrossEntropyLossFlat())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.decompose(calibrated=calibrated)
    assert not [str(w.message) for w in said if 'lose' in str(w.message)]     # not about a layer that stays dense
    row = learn.plans[0]['4']
    assert row.rank is None and type(learn.model[4]) is nn.Linear and '2' in pairs(learn.model)
    assert re.fullmatch(r'kept dense: rank 1 of 3 would lose 0\.\d+ of the output and save 397 parameters \(0\.6%\)', row.reason)

@pytest.mark.parametrize('kw', [dict(layers='4'), dict(policy={'4': .5}), dict(layers='*')], ids=str)
def test_a_layer_that_is_asked_for_is_decomposed(kw):
    learn = Learner(mk_dls(torch.randn(400, 13, generator=gen()), torch.arange(400) % 3), wide(3), loss_func=CrossEntropyLossFlat())
    net = learn.model
    assert learn.decompose(**kw).model[4][0].out_features == 1
    plan = FC_Decomposer(.5).plan(net, learn.dls)
    assert plan['4'].rank == 1 and learn.undecompose().decompose(plan=plan).model[4][0].out_features == 1

def test_what_stays_dense_is_small_in_sum():
    torch.manual_seed(0)
    net = nn.Sequential(*[o for _ in range(120) for o in (nn.Linear(16, 16), nn.Tanh())])
    learn = Learner(mk_dls(torch.randn(200, 16, generator=gen()), torch.randn(200, 16, generator=gen())), net, loss_func=MSELossFlat())
    plan = FC_Decomposer(.25).plan(net)
    learn.decompose(.25, calibrated=False)
    dense = [o for o in learn.plans[0].layers if o.rank is None]
    assert 0 < len(dense) < 10 and learn.plans[0].params_after - plan.params_after <= .02*plan.params

def test_when_nothing_is_worth_it():
    learn = Learner(mk_dls(torch.randn(400, 20, generator=gen()), torch.arange(400) % 3),
                    nn.Sequential(nn.Unflatten(1, (1, 20)), nn.Conv1d(1, 2000, 20), nn.Flatten(), nn.ReLU(), nn.Linear(2000, 3)), loss_func=CrossEntropyLossFlat())
    with torch.no_grad(): learn.model[4].weight.copy_(torch.randn(3, 2000, generator=gen()))
    learn.model[1] = nn.Sequential(learn.model[1], *[nn.Conv1d(2000, 2000, 1) for _ in range(1)])
    with pytest.warns(UserWarning, match=r'nothing to decompose \(4: kept dense: rank 1 of 3.*layers= decomposes a layer all the same'): learn.decompose()
    assert not pairs(learn.model) and learn.plans == []
    with pytest.raises(ValueError, match='was not decomposed'): learn.undecompose()

@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize('load', [load_wine, load_breast_cancer, load_digits], ids=['3 classes', 'binary', '10 classes'])
def test_defaults_keep_the_accuracy_of_a_tabular_classifier(load, seed):
    torch.manual_seed(seed)
    x,y = map(torch.tensor, load(return_X_y=True))
    x,order = ((x - x.mean(0))/(x.std(0) + 1e-6)).float(),torch.randperm(len(x))
    dls = mk_dls(x[order], y[order], len(x)//5, bs=32)
    net = TabularModel([], x.shape[1], int(y.max()) + 1, [400, 200])
    learn = Learner(dls, Plain(net), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    fit(learn, 3, 1e-2)
    dense = validated(learn)[1]
    assert dense > .8 and abs(validated(learn.decompose())[1] - dense) < .0101 and pairs(learn.model)
    small,before = validated(learn)[1],state(learn.model)
    said, = warned(learn.decompose)
    assert 'nothing was changed' in said and equal(state(learn.model), before) and validated(learn)[1] == small

class Plain(nn.Module):
    "A tabular model of continuous columns alone"
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, x): return self.m(None, x)

# ------------------------------------------------------------------ undecompose

def test_undecompose_gives_the_very_same_model_back():
    learn = fit(learner(), 1)
    net,before = learn.model,state(learn.model)
    fit(learn.decompose(.25), 1, 1e-2)
    assert learn.undecompose() is learn
    assert learn.model is net and learn.opt is None and equal(before, state(net))
    fit(learn, 1, 1e-3)
    assert not any(torch.equal(v, before[k]) for k,v in state(net).items())
    with pytest.raises(ValueError, match='was not decomposed'): learn.undecompose()

def test_decomposed_twice_goes_back_to_the_first():
    learn = learner()
    net,before = learn.model,state(learn.model)
    learn.decompose(.5, layers='0').decompose(.5, layers='2')
    assert list(pairs(learn.model)) == ['0', '2']
    assert learn.undecompose().model is net and equal(before, state(net))
    assert list(pairs(learn.decompose(.5, layers='4').model)) == ['4'] and learn.undecompose().model is net

def test_a_model_with_an_attribute_of_the_same_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self._dense,self.out = nn.Linear(20, 16),nn.Linear(16, 4)
        def forward(self, x): return self.out(F.relu(self._dense(x)))
    learn = learner(model=Net())
    net = learn.model
    with pytest.raises(ValueError, match='was not decomposed'): learn.undecompose()
    assert learn.decompose(.5).undecompose().model is net

def test_uncompress_is_undecompose():
    learn = learner()
    net = learn.model
    assert learn.decompose(.25).uncompress() is learn and learn.model is net
    with pytest.raises(ValueError, match='was not compressed, or is dense again'): learn.uncompress()

# ------------------------------------------------------------------ what was done, and doing it twice

def test_plans_hold_what_was_done():
    learn = learner()
    assert learn.plans == []
    learn.decompose(.5, layers='0')
    learn.decompose(.25, layers='2')
    assert [[(o.name, o.rank) for o in p.replaced] for p in learn.plans] == [[('0', 10)], [('2', 6)]]
    assert all(p.bases == {} for p in learn.plans) and isinstance(learn.plans[0].to_frame(), pd.DataFrame)
    learn.plans.clear()
    assert len(learn.plans) == 2 and learn.undecompose().plans == []

def test_plans_of_a_copy_and_of_an_exported_learner(digits, tmp_path):
    learn = digits_learner(digits, tmp_path).decompose(policy=2, layers='*')
    learn.export()
    for other in (load_learner(tmp_path/'export.pkl'), copy.deepcopy(learn)):
        assert [(o.name, o.rank) for o in other.plans[0].layers] == [(o.name, o.rank) for o in learn.plans[0].layers]
        assert equal(state(other.model), state(learn.model))
        with pytest.raises(ValueError, match='neither does a copy'): other.undecompose()

def test_a_plan_without_factors_is_calibrated_again():
    learn = learner()
    plan = learn.decompose(.25).plans[0]
    ref = state(learn.model)
    got = state(learn.undecompose().decompose(plan=plan).model)
    assert all(torch.allclose(v, ref[k], atol=1e-5) for k,v in got.items())

def warned(f):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        f()
    return [str(o.message) for o in w]

def test_the_same_plan_twice():
    learn = learner()
    found = find(learn, .3)
    small = learn.decompose(plan=found).model
    assert warned(lambda: learn.decompose(plan=found)) == ['this Learner is decomposed by this plan already: nothing was changed. learn.undecompose() goes back to the dense model.']
    assert learn.model is small and len(learn.plans) == 1

def test_another_plan_on_top():
    learn = learner()
    plan = FC_Decomposer(.25).plan(learn.model)
    small = learn.decompose(.5).model
    with pytest.raises(ValueError, match='decomposed already, by another plan.*learn.undecompose()'): learn.decompose(plan=plan)
    assert learn.model is small and len(learn.plans) == 1

def test_a_plan_for_a_model_that_was_decomposed_before():
    net = mlp()
    plan = FC_Decomposer(.25).plan(net)
    learn = learner(model=plan.apply(net))
    assert 'decomposed by this plan already' in warned(lambda: learn.decompose(plan=plan))[0]
    with pytest.raises(ValueError, match='decomposed already, by another plan'): learn.decompose(plan=FC_Decomposer(.5).plan(net))

@pytest.mark.parametrize('kw', [{}, dict(rank_ratio=.25), dict(policy=ParamBudget(.5))], ids=str)
def test_decompose_twice(kw):
    learn = learner().decompose(layers='*')
    small = learn.model
    first, = warned(lambda: learn.decompose(**kw))
    assert first.startswith('this Learner is decomposed already: no layer is left') and learn.model is small and len(learn.plans) == 1

CALLS = [{}, dict(rank_ratio=.3), dict(policy=.6), dict(policy=2), dict(policy=ParamBudget(.15)), dict(policy=ParamBudget(.15), layers='*'),
    dict(policy={'*': ParamBudget(.15)}), dict(policy=ParamBudget(.15), layers=['2','4']), dict(policy=ParamBudget(.15), exclude='0'), dict(exclude='0'),
    dict(policy=Energy(.5), layers=['0','2']), dict(layers='2'), dict(policy={'2': 4}), dict(skip_unprofitable=True)]

@pytest.mark.parametrize('classes', [3, 10])
@pytest.mark.parametrize('kw', CALLS, ids=str)
def test_the_same_call_twice_changes_nothing(kw, classes):
    learn = Learner(mk_dls(torch.randn(200, 13, generator=gen()), torch.arange(200) % classes), wide(classes), loss_func=CrossEntropyLossFlat())
    small,dense = learn.decompose(**kw).model,[n for n,m in learn.model.named_modules() if n in ('0', '2', '4') and not is_pair(m)]
    assert pairs(small)
    for _ in range(2):
        said, = warned(lambda: learn.decompose(**kw))
        assert learn.model is small and len(learn.plans) == 1 and 'nothing was changed' in said and 'learn.undecompose() goes back' in said
        assert all(f'{n!r} (' in said for n in dense) and ('stay' in said) == bool(dense)

@pytest.mark.parametrize('first', [{}, dict(policy=ParamBudget(.15)), dict(plan=True)], ids=str)
@pytest.mark.parametrize('then', [{}, dict(rank_ratio=.2), dict(policy=1), dict(policy=ParamBudget(.5)), dict(policy=Energy(.5)), dict(exclude='0')], ids=str)
def test_a_layer_that_was_kept_dense_stays_dense(first, then):
    learn = Learner(mk_dls(torch.randn(200, 13, generator=gen()), torch.arange(200) % 3), wide(3), loss_func=CrossEntropyLossFlat())
    if first.get('plan'): first = dict(plan=FC_Decomposer(.5).plan(learn.model).edit('4', None))
    small = learn.decompose(**first).model
    assert '4' not in pairs(small)
    said, = warned(lambda: learn.decompose(**then))
    assert learn.model is small and "'4' (" in said and ' dense; pass layers= with ' in said
    assert learn.decompose(.4, layers='4').model[4][0].out_features == 1 and len(learn.plans) == 2   # as the sentence says

def test_the_rest_of_the_layers_in_a_second_call():
    learn = Learner(mk_dls(torch.randn(200, 13, generator=gen()), torch.arange(200) % 3), wide(3), loss_func=CrossEntropyLossFlat())
    learn.decompose(.5, exclude='0')
    said, = warned(lambda: learn.decompose(policy=3))
    assert list(pairs(learn.model)) == ['0', '2'] and "its pairs stay as they are, and '4' (rank 1 of 3 would lose" in said
    assert learn.plans[1]['4'].reason == learn.plans[0]['4'].reason.removeprefix('kept dense: ')
    assert warned(learn.decompose)[0].count("'4' (rank 1 of 3") == 1 and len(learn.plans) == 2

@pytest.mark.parametrize('by_hand', [True, False])
def test_a_saving_is_weighed_against_the_dense_model(by_hand):
    "397 parameters are 6 % of the small model, 0.6 % of the dense one"
    net = wide(3)
    n = count_params(net)
    if by_hand: net = FC_Decomposer(policy={'2': 4}).decompose(net)
    learn = Learner(mk_dls(torch.randn(200, 13, generator=gen()), torch.arange(200) % 3), net, loss_func=CrossEntropyLossFlat())
    if not by_hand: learn.decompose(policy={'2': 4})
    assert 397 > .05*count_params(learn.model) and 397 < .01*n
    assert any('(4: rank 1 of 3)' in o for o in warned(lambda: FC_Decomposer(.5).plan(learn.model)))
    learn.decompose()
    assert '0' in pairs(learn.model) and '4' not in pairs(learn.model) and '(0.6%)' in learn.plans[-1]['4'].reason

def test_types_count_among_the_layers_that_are_left():
    class Mine(nn.Linear): pass
    net = mlp()
    net[2] = Mine(32, 24)
    learn = learner(model=net).decompose(exclude='4')
    assert list(pairs(learn.model)) == ['0']
    assert find(learn, 5., types=(Mine,), layers='2').plan['2'].rank
    assert list(pairs(learn.decompose(types=(Mine,), exclude='4').model)) == ['0', '2']

def test_names_that_can_be_read_once():
    learn = learner().decompose(layers=iter(['0']))
    assert list(pairs(learn.decompose(layers=iter(['2'])).model)) == ['0', '2']

def test_an_exported_learner_has_nothing_to_go_back_to():
    other = copy.deepcopy(learner().decompose(layers='*'))
    said, = warned(other.decompose)
    assert 'nothing was changed' in said and 'undecompose' not in said

def test_what_was_frozen_is_frozen_again():
    learn = learner(splitter=halves)
    learn.freeze()
    was = [p.requires_grad for p in learn.model.parameters()]
    learn.decompose(.25).unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())
    assert [p.requires_grad for p in fit(learn, 1).undecompose().model.parameters()] == was and not all(was)

def test_the_signature_shows_no_object():
    text = str(inspect.signature(Learner.decompose))
    assert "'DecompositionPlan|RankSuggestion' = ..." in text and ' at 0x' not in text

def test_rank_find_of_a_learner_without_dense_layers():
    learn = learner().decompose(layers='*')
    with pytest.raises(ValueError, match=r'decomposed already, and no layer is left: call learn.undecompose\(\) first'): learn.rank_find()

WRONG = dict(model=mlp(), learner=None, decomposer=FC_Decomposer(.5), loaders=None, loader=None, policy=ParamBudget(.5), plan=None)

@pytest.mark.parametrize('kind', WRONG)
@pytest.mark.parametrize('arg', ['rank_ratio', 'policy', 'plan', 'data', 'max_drop'])
def test_a_value_in_the_wrong_place(arg, kind):
    learn = learner()
    net = learn.model
    value = dict(WRONG, learner=learn, loaders=learn.dls, loader=learn.dls.train, plan=FC_Decomposer(.5).plan(net))[kind]
    if (arg, kind) in {('policy', 'policy'), ('plan', 'plan'), ('data', 'learner'), ('data', 'loaders'), ('data', 'loader')}: return
    with pytest.raises(TypeError) as e: learn.rank_find(value) if arg == 'max_drop' else learn.decompose(**{arg: value})
    text = str(e.value)
    assert text.startswith(arg) and len(text) < 130 and '\n' not in text and learn.model is net
    assert dict(loaders='data=', loader='data=', policy='policy=', plan='plan=', decomposer='plan=', model='its own model', learner='its own model')[kind] in text

# ------------------------------------------------------------------ export, save, load

@pytest.fixture(scope='module')
def digits():
    dls = digits_dls(8, n=200)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    return fit(Learner(dls, net, metrics=accuracy), 3, 1e-2)

def digits_learner(digits, path): return Learner(digits.dls, copy.deepcopy(digits.model), metrics=accuracy, path=path)

def test_export_holds_the_small_model_alone(digits, tmp_path):
    learn = digits_learner(digits, tmp_path)
    learn.export('dense.pkl')
    net = learn.model
    fit(learn.decompose(policy=2), 1, 1e-3)
    with learn.no_bar(): want,_ = learn.get_preds()
    small = state(learn.model)
    learn.export('small.pkl')
    back = load_learner(tmp_path/'small.pkl')
    items = [o for o in learn.dls.valid.items]
    with back.no_bar(): got,_ = back.get_preds(dl=back.dls.test_dl(items))
    assert torch.equal(got, want) and equal(small, state(back.model))
    saved = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in learn.model.parameters())
    assert (tmp_path/'dense.pkl').stat().st_size - (tmp_path/'small.pkl').stat().st_size > .95*4*saved
    with pytest.raises(ValueError, match='exported Learner holds no dense model'): back.undecompose()
    assert equal(small, state(back.model)) and learn.undecompose().model is net

def test_an_exported_learner_can_be_decomposed(digits, tmp_path):
    digits_learner(digits, tmp_path).export()
    back = load_learner(tmp_path/'export.pkl')
    net = back.model
    assert back.decompose(policy=2, calibrated=False).undecompose().model is net

@pytest.mark.parametrize('with_opt', [True, False])
def test_save_and_load(tmp_path, with_opt):
    learn = fit(learner(path=tmp_path).decompose(.25), 1, 1e-3)
    want = state(learn.model)
    learn.save('small', with_opt=with_opt)
    fit(learn, 1, 1e-2)
    assert not equal(want, state(learn.model)) and equal(want, state(learn.load('small').model))
    other = learner(path=tmp_path).decompose(.25)
    assert not equal(want, state(other.model)) and equal(want, state(other.load('small').model))
    fit(other, 1, 1e-2)
    assert not any(torch.equal(v, want[k]) for k,v in state(other.model).items())

@pytest.mark.parametrize('strict', [True, False])
def test_a_dense_checkpoint_and_a_small_model(tmp_path, strict):
    learn = learner(path=tmp_path)
    learn.save('dense')
    dense = state(learn.model)
    small = state(learn.decompose(.25, layers='2').model)
    with pytest.raises(ValueError, match=r"'dense' holds a dense model.*decomposed \('2' replaced\). Nothing was loaded. Call learn.undecompose\(\) first"):
        learn.load('dense', strict=strict)
    assert equal(small, state(learn.model))
    assert equal(dense, state(learn.undecompose().load('dense', strict=strict).model))

@pytest.mark.parametrize('strict', [True, False])
def test_a_small_checkpoint_and_a_dense_model(tmp_path, strict):
    learn = learner(path=tmp_path).decompose(.25, layers='2')
    learn.save('small')
    small,plan = state(learn.model),learn.plans[0]
    fresh = learner(path=tmp_path)
    dense = state(fresh.model)
    with pytest.raises(ValueError, match=r"'small' holds a decomposed model \('2' replaced\).*learn.decompose\(plan=…\)"): fresh.load('small', strict=strict)
    assert equal(dense, state(fresh.model))
    assert equal(small, state(fresh.decompose(plan=plan).load('small').model))
    other = learner(path=tmp_path).decompose(.5, layers='2')
    with pytest.raises(ValueError, match=r"decomposed to other ranks \('2'\)"): other.load('small')

def test_a_small_model_without_a_dense_one(tmp_path):
    learn = learner(path=tmp_path)
    learn.save('dense')
    other = learner(model=FC_Decomposer(.25).decompose(learn.model), path=tmp_path)
    with pytest.raises(ValueError, match='Load it into a Learner of the dense model'): other.load('dense')

def test_a_checkpoint_of_something_else_is_left_to_torch(tmp_path):
    learn = learner(path=tmp_path).decompose(.25)
    torch.save({'a': torch.ones(2)}, tmp_path/'models'/'w.pth') if (tmp_path/'models').is_dir() else learn.save('x') and torch.save({'a': torch.ones(2)}, tmp_path/'models'/'w.pth')
    with pytest.raises(RuntimeError, match='Missing key'): learn.load('w')

def test_loading_leaves_no_hook(tmp_path):
    learn = learner(path=tmp_path).decompose(.25)
    learn.save('small')
    assert not learn.load('small').model._load_state_dict_pre_hooks

def test_the_checkpoint_of_the_dense_model_at_the_end_of_a_fit(tmp_path):
    learn = learner(path=tmp_path)
    cbs = [SaveModelCallback(fname='best'), At('after_epoch', order=90)]
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(ValueError, match="'best' holds a dense model"): one_cycle(learn, *cbs, n=2)
    assert list(pairs(learn.model)) == ['0', '2', '4']

# ------------------------------------------------------------------ rank_find

def test_the_learner_is_left_unchanged():
    learn = fit(learner(metrics=[accuracy, error_rate]), 1)
    net,opt,before,grads = learn.model,learn.opt,state(learn.model),[p.grad for p in learn.model.parameters()]
    rest = [type(o) for o in learn.cbs.sorted('order')],list(learn.metrics),n_hooks(net),learn.dls,learn.loss_func
    find(learn)
    assert learn.model is net and learn.opt is opt and equal(before, state(net)) and all(a is b.grad for a,b in zip(grads, net.parameters()))
    assert rest == ([type(o) for o in learn.cbs.sorted('order')], list(learn.metrics), n_hooks(net), learn.dls, learn.loss_func)
    with pytest.raises(ValueError, match='was not decomposed'): learn.undecompose()

def test_training_flags_are_left_by_rank_find():
    learn = learner()
    learn.model.train()
    learn.model[2].eval()
    before = flags(learn.model)
    find(learn, ratios=(.5,), refine=0)
    assert flags(learn.model) == before

def test_the_record_of_the_training_is_kept():
    learn = fit(learner(), 2)
    before = [list(o) for o in learn.recorder.values]
    find(learn)
    assert [list(o) for o in learn.recorder.values] == before

def test_random_numbers_go_on_as_before():
    learn = learner()
    before = rng()
    find(learn)
    assert same_rng(before, rng())

def test_it_is_left_unchanged_by_an_error():
    learn = learner()
    net = learn.model
    class Fails(Callback):
        def before_validate(self):
            if self.model is not net: raise RuntimeError('no')
    learn.add_cb(Fails())
    with pytest.raises(RuntimeError, match='no'): find(learn)
    assert learn.model is net and n_hooks(net) == 0

def test_the_progress_bar_survives_an_error():
    learn = learner()
    with pytest.raises(RuntimeError): find(learn.add_cb(Callback(before_validate=fails)))
    assert hasattr(learn, 'progress')

def fails(self): raise RuntimeError('no')

def acc(m, dl):
    x,y = whole(dl)
    with torch.no_grad(): return (copy.deepcopy(m).eval()(x).argmax(1) == y).double().mean().item()

@pytest.mark.parametrize('drop', [0., .02, .1, .3])
def test_the_suggestion_is_within_max_drop_measured_independently(drop):
    learn = learner()
    dense,res = acc(learn.model, learn.dls.valid),find(learn, drop)
    small = res.plan.apply(learn.model)
    assert acc(small, learn.dls.valid) >= dense - drop - 1e-6 and abs(res.value - acc(small, learn.dls.valid)) < 1e-6
    assert abs(res.dense - dense) < 1e-6 and res.max_drop == drop and res.metric == 'accuracy' and res.higher_is_better is True
    assert sum(p.numel() for p in small.parameters()) == res.plan.params_after
    assert equal(state(small), state(learn.decompose(plan=res.plan).model)) and abs(validated(learn)[1] - res.value) < 1e-6

def test_more_drop_means_fewer_parameters():
    learn = learner()
    sizes = [find(learn, d).plan.params_after for d in (0., .02, .1, .3)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]

def test_every_row_of_the_frame():
    learn = learner()
    res = find(learn, .05)
    n = sum(p.numel() for p in learn.model.parameters())
    assert list(res.frame.columns) == ['ratio', 'params', 'share', 'metric', 'ok'] and (res.frame.ratio.diff()[1:] < 0).all()
    for o in res.frame.itertuples():
        small = FC_Decomposer(policy=ParamBudget(o.ratio)).decompose(learn.model, learn.dls)
        assert o.params == sum(p.numel() for p in small.parameters()) and abs(o.share - o.params/n) < 1e-9
        assert abs(o.metric - acc(small, learn.dls.valid)) < 1e-6 and o.ok == (o.metric >= res.dense - .05 - 1e-9)
    assert res.ratio == res.frame[res.frame.ok].ratio.min()

def fake(good_above, model=None):
    "evaluate() which is 1 for models that keep more than a share of the parameters of the pairs' weights"
    n = sum(p.numel() for p in (model or mlp()).parameters())
    return lambda m: float(sum(p.numel() for p in m.parameters()) >= good_above*n)

def plain(evaluate, data=None, model=None, **kw):
    return rank_find(mlp() if model is None else model, evaluate, data, **{'higher_is_better': True} | kw)

@pytest.mark.parametrize('limit', [.25, .45, .75])
def test_refinement_lies_between(limit):
    coarse,fine = plain(fake(limit), refine=0),plain(fake(limit), refine=3)
    bad = coarse.frame[~coarse.frame.ok & (coarse.frame.ratio < coarse.ratio)].ratio.max()
    extra = sorted({*fine.frame.ratio} - {*coarse.frame.ratio})
    assert set(coarse.frame.ratio) <= set(RATIOS) and 1 <= len(extra) <= 3 and all(bad < r < coarse.ratio for r in extra)
    assert bad < fine.ratio <= coarse.ratio and fine.ratio == fine.frame[fine.frame.ok].ratio.min()

def test_the_first_refinement_is_the_geometric_mean():
    fine = plain(fake(.45), refine=1, ratios=(.9, .3))
    assert set(fine.frame.ratio) - {.9, .3} == {.52}

def test_it_stops_after_two_bad_ones_in_a_row():
    calls = []      # the dense model, then .9 bad, .7 good, .5 and .4 bad
    def by_count(m): calls.append(1); return [1., 0, 1, 0, 0][len(calls)-1]
    res = plain(by_count, refine=0)
    assert res.frame.ratio.tolist() == [.9, .7, .5, .4] and res.frame.ok.tolist() == [False, True, False, False] and res.ratio == .7

def test_no_suggestion_is_possible():
    first = []
    def only_dense(m): first.append(1); return float(len(first) == 1)
    res = plain(only_dense, metric='f1', max_drop=.25)
    assert res.plan is None and res.ratio is None and res.value is None and len(res.frame) == 2 and len(first) == 3
    assert repr(res).startswith('no budget keeps f1 within 0.25 of 1') and '90' in repr(res) or '0.9' in repr(res)
    assert isinstance(res.plot(), plt.Axes)

def test_nothing_but_nan_is_no_suggestion():
    res = plain(lambda m: 1. if not pairs(m) else float('nan'))
    assert res.plan is None and not res.frame.ok.any()

def test_negative_drop():
    for f in (lambda: plain(fake(.5), max_drop=-.1), lambda: find(learner(), -.01)):
        with pytest.raises(ValueError, match='max_drop must not be negative.*one point of accuracy'): f()

def test_budgets_that_are_too_tight_are_skipped():
    res = plain(lambda m: 1., ratios=(.5, .1, .01, .001))
    m = mlp()
    def possible(r):
        try: FC_Decomposer(policy=ParamBudget(r)).plan(m)
        except ValueError: return False
        return True
    ok = [r for r in (.5, .1, .01, .001) if possible(r)]
    assert 0 < len(ok) < 4 and res.frame.ratio.tolist() == ok and res.ratio == min(ok)

@pytest.mark.parametrize('drop,error', [(float('nan'), ValueError), (float('inf'), ValueError), (-1, ValueError), ('1', TypeError), (None, TypeError),
    (True, TypeError), ([.1], TypeError)], ids=str)
def test_a_wrong_drop(drop, error):
    for f in (lambda: plain(fake(.5), max_drop=drop), lambda: find(learner(), drop)):
        with pytest.raises(error, match='max_drop'): f()

@pytest.mark.parametrize('value,metric,higher,warn', [(.9, 'metric', True, True), (.1, 'error_rate', False, True), (.3, 'valid_loss', False, False), (2.3, 'metric', False, False),
    (0., 'f1', True, True), (35., 'bleu', True, False)])
def test_a_drop_that_was_meant_in_percent(value, metric, higher, warn):
    text = warned(lambda: plain(lambda m: value, max_drop=1, metric=metric, higher_is_better=higher, ratios=(.5,)))
    assert any('max_drop is in units of the metric, 0.01 is one point' in o for o in text) is warn
    assert not warned(lambda: plain(lambda m: value, max_drop=.5, metric=metric, higher_is_better=higher, ratios=(.5,)))

@pytest.mark.parametrize('ratios', [.5, 'x', (), [], None, {.5}], ids=str)
def test_ratios_that_are_no_list(ratios):
    with pytest.raises(TypeError, match='ratios must be a list of budgets'): plain(lambda m: 1., ratios=ratios)

def test_why_it_stopped():
    assert plain(fake(.45)).stopped == 'Two budgets in a row lost more than max_drop: smaller ones were not tried.'
    res = plain(lambda m: 1., ratios=(.5, .3))
    more = re.fullmatch(r'All budgets tried kept it; smaller ones are possible: ratios=\((.*),\)\.', res.stopped)
    more = [float(o) for o in more[1].split(', ')]
    again = plain(lambda m: 1., ratios=more)                # what is suggested can be tried
    assert max(more) < .3 and len(again.frame) == len(more) and again.frame.params.max() < res.frame.params.min()
    assert plain(lambda m: 1. - .5*(count_params(m) < 500), ratios=(.5, .3)).stopped == 'All budgets were tried.'

def test_why_it_stopped_where_the_ranks_end():
    m = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    res = plain(lambda m: 1., model=m, ratios=(.1, .05))
    assert res.stopped == 'The next budget, 0.05, is too small for these layers with ranks in multiples of 8: round_to=1 allows it.'
    fine = plain(lambda m: 1., model=m, ratios=(.1, .05), round_to=1)
    assert fine.ratio == .05 and 'round_to=1' in repr(fine.plan) and fine.plan.params_after < res.plan.params_after
    least = plain(lambda m: 1., model=m, ratios=(.05, .001), round_to=1)
    assert least.stopped == 'The next budget, 0.001, is too small for these layers, whose ranks are 1 there.'

def test_round_to_of_a_learner():
    learn = Learner(mk_dls(torch.randn(400, 64, generator=gen()), torch.arange(400) % 2), nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2)), metrics=accuracy,
                    loss_func=CrossEntropyLossFlat())
    assert {o.rank % 8 for o in find(learn, .9, ratios=(.6,), layers='0').plan.replaced} == {0}
    assert find(learn, .9, ratios=(.55,), layers='0', round_to=1).plan['0'].rank == int(.55*64*128/192)
    with pytest.raises(ValueError, match='round_to must be'): find(learn, round_to=0)

def test_budgets_of_one_size_are_one_row():
    m,calls = nn.Sequential(nn.Linear(256, 256)),[]
    res = plain(lambda o: calls.append(1) or 1., model=m, ratios=(.5, .49, .48, .47, .25), layers='0')
    assert res.frame.ratio.tolist() == [.5, .49, .25] and res.frame.params.is_unique and len(calls) == 1 + 3
    bad = plain(lambda o: float(count_params(o) > 50_000), model=m, ratios=(.9, .49, .48, .47, .25), layers='0')    # three budgets of one bad size are one bad row
    assert .25 in bad.frame.ratio.tolist() and bad.frame.params.is_unique

def test_it_shows_itself_in_a_notebook():
    res = plain(fake(.45), metric='score')
    html = res._repr_html_()
    assert res.title in html and res.stopped in html and html.count('<tr') == len(res.frame) + 1

def test_the_axis_of_sizes_is_logarithmic():
    ax = plain(fake(.1), ratios=(.9, .3, .1, .05)).plot()
    ax.figure.canvas.draw()
    assert ax.get_xscale() == 'log' and {'10%', '20%', '50%'} <= {o.get_text() for o in ax.get_xticklabels()}

def left_early(how):
    bar = _Bar(range(10**6), 'work')
    start = time.monotonic()
    for i in bar:
        if time.monotonic() - start > 1.2:
            if how == 'break': break
            raise KeyError(how)
        time.sleep(.02)

@pytest.mark.parametrize('cls', [NBProgressBar, ConsoleProgressBar])
@pytest.mark.parametrize('how', ['break', 'error'])
def test_a_bar_goes_when_its_loop_is_left(how, cls, monkeypatch):
    ended = []
    class Bar(cls):
        def on_iter_begin(self): self.out = SimpleNamespace(update=lambda o: None)
        def on_iter_end(self): ended.append(1); super().on_iter_end()
    monkeypatch.setattr(batches, 'progress_bar', Bar)
    kept = None
    try: left_early(how)
    except KeyError as e: kept = e      # as in a notebook, which keeps the traceback
    assert ended == [1] and (kept is None) == (how == 'break')

@pytest.mark.parametrize('ratios', [(1.5, .5), (90, 50), (.5, 0.), (.5, -1.)])
def test_ratios_that_are_no_shares(ratios):
    with pytest.raises(ValueError, match=r'\(0, 1\]'): plain(lambda m: 1., ratios=ratios)

def test_the_order_of_ratios_does_not_matter():
    a,b = (plain(fake(.45), ratios=r, refine=0) for r in ((.9, .6, .3), [.3, .9, .6]))
    assert a.frame.equals(b.frame) and a.ratio == b.ratio

def test_lower_is_better():
    learn = learner('number')
    res = find(learn, .05)
    x,y = whole(learn.dls.valid)
    loss = lambda m: F.mse_loss(m(x), y).item()
    assert res.metric == 'valid_loss' and res.higher_is_better is False and abs(res.dense - loss(learn.model)) < 1e-5
    assert loss(res.plan.apply(learn.model)) <= res.dense + .05 + 1e-5 and 0 < len(res.frame[~res.frame.ok])
    assert (res.frame[res.frame.ok].metric <= res.dense + .05 + 1e-6).all() and (res.frame[~res.frame.ok].metric > res.dense + .05).all()

@pytest.mark.parametrize('metric,higher', [(accuracy, True), (error_rate, False), (F1Score(average='macro'), True), (Precision(average='macro'), True),
    (Recall(average='macro'), True), (BalancedAccuracy(), True), (CohenKappa(), True), (MatthewsCorrCoef(), True), (HammingLoss(), False),
    (Perplexity(), False)], ids=lambda o: str(getattr(o, 'name', getattr(o, '__name__', o))))
def test_the_direction_is_known(metric, higher):
    res = find(learner(metrics=metric), .3, ratios=(.9,), refine=0)
    assert res.higher_is_better is higher

@pytest.mark.parametrize('metric,higher', [(rmse, False), (exp_rmspe, False), (mse, False), (mae, False), (msle, False), (R2Score(), True),
    (ExplainedVariance(), True), (PearsonCorrCoef(), True), (SpearmanCorrCoef(), True), (Dice(), True), (DiceMulti(), True), (JaccardCoeff(), True),
    (JaccardCoeffMulti(), True), (foreground_acc, True), (accuracy_multi, True), (APScoreMulti(), True), (APScoreBinary(), True), (BrierScore(), False),
    (BrierScoreMulti(), False), (RocAuc(), True), (RocAucBinary(), True), (RocAucMulti(), True), (FBeta(2), True), (FBetaMulti(2), True),
    (F1ScoreMulti(), True), (HammingLossMulti(), False), (Jaccard(), True), (JaccardMulti(), True), (PrecisionMulti(), True), (RecallMulti(), True),
    (MatthewsCorrCoefMulti(), True), (CorpusBLEUMetric(), True), (top_k_accuracy, True)], ids=lambda o: str(getattr(o, 'name', getattr(o, '__name__', o))))
def test_the_direction_of_the_other_metrics_of_fastai_is_known(metric, higher):
    from fasterai.core.validate import _direction
    assert _direction(Learner(learner().dls, mlp(), loss_func=F.cross_entropy, metrics=metric).metrics[0].name, None) is higher

def test_the_direction_of_another_metric_is_asked_for():
    def mine(p, t): return (p.argmax(1) == t).float().mean()
    learn = learner(metrics=mine)
    with pytest.raises(ValueError, match="'mine' better. Pass higher_is_better"): find(learn)
    res = find(learn, higher_is_better=True, ratios=(.9,))
    assert res.metric == 'mine' and abs(res.dense - acc(learn.model, learn.dls.valid)) < 1e-6

def test_a_direction_that_is_given_counts():
    res = find(learner(), higher_is_better=False, max_drop=0.)     # smaller accuracy is fine
    f = res.frame
    assert res.higher_is_better is False and list(f.ok) == list(f.metric <= res.dense + 1e-9) and f.ok.any() and res.ratio == f[f.ok].ratio.min()

@pytest.mark.parametrize('metric', ['error_rate', error_rate])
def test_a_metric_by_name_or_function(metric):
    learn = learner(metrics=[accuracy, error_rate])
    res = find(learn, .1, metric=metric)
    assert res.metric == 'error_rate' and abs(res.dense - (1 - acc(learn.model, learn.dls.valid))) < 1e-6
    assert find(learn, .1, metric='valid_loss').metric == 'valid_loss' and find(learn, .1).metric == 'accuracy'
    assert find(learn, .1).ratio == res.ratio

@pytest.mark.parametrize('metric', ['f1', rmse])
def test_a_metric_the_learner_does_not_have(metric):
    with pytest.raises(ValueError, match="not among those of the Learner: 'valid_loss', 'accuracy'"): find(learner(), metric=metric)

def test_the_plot_shows_dense_and_limit():
    res = plain(fake(.45), max_drop=.5, metric='score')
    ax = plt.subplots()[1]
    assert res.plot(ax) is ax
    flat = {round(float(o.get_ydata()[0]), 6) for o in ax.lines if len(set(o.get_ydata())) == 1 and len(o.get_ydata()) == 2}
    assert {1., .5} <= flat and ax.get_ylabel() == 'score'
    (x,),(y,) = [o for o in ax.lines if o.get_color() == 'red'][0].get_data()
    assert abs(x - res.plan.params_after/res.plan.params) < 1e-9 and y == res.value
    curve = max(ax.lines, key=lambda o: len(o.get_xdata()))
    assert np.allclose(sorted(curve.get_xdata()), sorted(res.frame.share))

def test_the_limit_of_a_loss_lies_above():
    ax = plain(lambda m: 2., higher_is_better=False, max_drop=.25).plot()
    assert {2., 2.25} <= {float(o.get_ydata()[0]) for o in ax.lines}

def test_rank_find_shows_the_plot_by_default():
    learn,n = learner(),len(plt.get_fignums())
    find(learn)
    assert len(plt.get_fignums()) == n
    learn.rank_find()
    assert len(plt.get_fignums()) == n + 1

def test_repr_tells_the_suggestion():
    res = plain(fake(.45), metric='score')
    text = repr(res)
    assert f'ParamBudget({res.ratio:g})' in text and f'{res.plan.params_after:,}' in text and 'score 1 (dense 1)' in text
    assert len(text.splitlines()) == len(res.frame) + 3 and text.endswith(res.stopped)

def test_plain_pytorch_with_any_evaluate():
    m,(x,y) = mlp(),points(100)
    m.load_state_dict(learner().model.state_dict())
    m.train()
    before,r = (state(m), flags(m)),rng()
    res = rank_find(m, lambda o: torch.tensor(rel(o(x), m(x))), x, higher_is_better=False, max_drop=.2, metric='error')
    assert equal(before[0], state(m)) and before[1] == flags(m) and n_hooks(m) == 0 and same_rng(r, rng())
    assert res.dense == 0 and rel(res.plan.apply(m)(x), m(x)) <= .2 and all(isinstance(v, float) for v in res.frame.metric)

def test_without_data_it_is_plain_svd():
    m = mlp()
    res = plain(fake(.45), model=m)
    assert equal(state(res.plan.apply(m)), state(FC_Decomposer(policy=ParamBudget(res.ratio)).decompose(m)))

def test_layers_exclude_cost_pass_through():
    m,(x,_) = mlp(),points(50)
    res = plain(lambda o: 1., x, m, exclude='4', cost='macs', ratios=(.5,), refine=0, sensitivity=False)
    ref = FC_Decomposer(policy=ParamBudget(.5, cost='macs'), exclude='4').plan(m, x, sensitivity=False)
    assert [(o.name, o.rank) for o in res.plan.layers] == [(o.name, o.rank) for o in ref.layers] and res.plan['4'].rank is None
    assert [o.name for o in plain(lambda o: 1., x, m, layers='2', ratios=(.5,), refine=0).plan.replaced] == ['2']

@pytest.mark.parametrize('m', [nn.Sequential(nn.Conv1d(1, 2, 3)), nn.Sequential(nn.ReLU()), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))],
                         ids=['conv', 'no parameters', 'parametrized'])
def test_nothing_can_be_decomposed(m):
    with pytest.raises(ValueError, match='nothing to decompose'): rank_find(m, lambda o: 1., None, higher_is_better=True)

def test_no_budget_is_large_enough_for_the_layers():
    with pytest.raises(ValueError, match='need at least'): rank_find(mlp(), lambda o: 1., None, higher_is_better=True, ratios=(.001,))

def test_a_search_without_success_is_no_plan():
    learn = learner()
    res = rank_find(learn.model, lambda o, seen=[]: seen.append(1) or float(len(seen) == 1), None,
                    higher_is_better=True, ratios=(.5,))
    assert res.plan is None
    for given in (res, res.plan):
        with pytest.raises(ValueError, match='found no budget'): learn.decompose(plan=given)
    plan = FC_Decomposer(policy=2).plan(learn.model)
    with pytest.raises(ValueError, match='a plan says which layers'): learn.decompose(plan=plan, exclude='0')
    with pytest.raises(TypeError, match='got int'): learn.decompose(plan=3)
    with pytest.warns(UserWarning, match='decomposed already'): learn.decompose(plan=plan).decompose(.5)

def test_rank_find_of_a_decomposed_learner():
    learn = learner().decompose(.5, layers='0')
    small,res = learn.model,find(learn, .3)
    assert learn.model is small and [o.name for o in res.plan.replaced if o.name.startswith('0')] == []
    assert len(pairs(res.plan.apply(small))) > 1
    labels = [o.get_text() for o in res.plot().get_legend().get_texts()]
    assert f'(now {res.dense:.4g})' in res.title and 'dense' not in repr(res) and f'now: {res.dense:.4g}' in labels and not any('dense' in o for o in labels)
    res = find(learn.undecompose(), .3)
    assert f'(dense {res.dense:.4g})' in res.title and f'dense: {res.dense:.4g}' in [o.get_text() for o in res.plot().get_legend().get_texts()]

@pytest.mark.parametrize('to', ['to_fp16', 'to_bf16'])
def test_rank_find_with_mixed_precision(to):
    learn = fit(getattr(learner(), to)(), 1, 1e-5)
    try: validated(learn)
    except AttributeError: pytest.skip('this fastai cannot validate outside of fit with mixed precision')
    assert find(learn, .1).plan is not None

# ------------------------------------------------------------------ replan

def bigger():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32, bias=False), nn.Tanh(), nn.Linear(32, 10))

def facts(plan): return [(o.name, o.rank, o.reason, o.asked, o.error) for o in plan.layers], plan.policy, plan.note, plan.params_after

@pytest.mark.parametrize('policy', [ParamBudget(.4), ParamBudget(.2, round_to=2), ParamBudget(.5, cost='macs'), ParamBudget(params=2000)], ids=repr)
def test_replan_is_a_fresh_plan_calibrated(policy):
    m,(x,_) = bigger(),points(200)
    fresh,again = FC_Decomposer(policy=policy).plan(m, x),FC_Decomposer(policy=ParamBudget(.9)).plan(m, x).replan(policy)
    assert facts(again) == facts(fresh) and equal(state(again.apply(m)), state(fresh.apply(m)))

@pytest.mark.parametrize('data', [True, False])
@pytest.mark.parametrize('policy', [.25, 3, Energy(.9), RankRatio(1.)], ids=repr)
def test_replan_is_a_fresh_plan(policy, data):
    m,x = bigger(),points(200)[0] if data else None
    fresh,again = (FC_Decomposer(policy=policy).plan(m, x), FC_Decomposer(policy=.5).plan(m, x).replan(policy))
    assert facts(again) == facts(fresh) and equal(state(again.apply(m)), state(fresh.apply(m)))

def test_replan_by_layer():
    m = bigger()
    again = FC_Decomposer(.5).plan(m).replan({'0': 4, '2': Energy(.5)})
    fresh = FC_Decomposer(policy={'0': 4, '2': Energy(.5)}).plan(m)
    assert [(o.name, o.rank) for o in again.layers] == [(o.name, o.rank) for o in fresh.layers]
    with pytest.raises(ValueError, match='nope'): again.replan({'nope': 3})

def test_replan_leaves_excluded_layers_out():
    m = bigger()
    for kw in (dict(exclude='2'), dict(layers=['0', '4', '6']), dict(policy={'0': 4, '4': 4, '6': 4})):
        plan = FC_Decomposer(**kw).plan(m)
        again = plan.replan(ParamBudget(.5)).replan(3)
        assert [o.name for o in again.replaced] == ['0', '4', '6'] and again['2'] == plan['2']

def test_replan_leaves_what_cannot_be_decomposed():
    m = nn.Sequential(bigger(), nn.utils.parametrizations.weight_norm(nn.Linear(10, 10)))
    plan = FC_Decomposer(.5).plan(m)
    assert plan.replan(2)['1'] == plan['1'] and plan['1'].rank is None and len(plan.replan(2).replaced) == 4

def test_replan_leaves_the_plan_unchanged():
    plan = FC_Decomposer(.5).plan(bigger())
    before = facts(plan)
    plan.replan(ParamBudget(.1))
    assert facts(plan) == before

def test_replan_of_a_layer_of_zeros():
    m = bigger()
    m[2].weight.data.zero_()
    assert facts(FC_Decomposer(.5).plan(m).replan(.25)) == facts(FC_Decomposer(.25).plan(m))

class Reads(nn.Module):
    "Its parent reads the weight of `fc`"
    def __init__(self):
        super().__init__()
        self.inp,self.fc = nn.Linear(20, 32),nn.Linear(32, 32)
    def forward(self, x): return F.linear(self.inp(x).tanh(), self.fc.weight, self.fc.bias)

def test_replan_keeps_the_remarks_of_a_layer_that_was_dense():
    m = Reads()
    fresh = FC_Decomposer(.25).plan(m)
    assert 'offers .weight' in fresh['fc'].reason
    assert FC_Decomposer(.5).plan(m).edit('fc', None).replan(.25)['fc'].rank == fresh['fc'].rank
    budget = FC_Decomposer(policy=ParamBudget(1.)).plan(m)
    assert budget['fc'].rank is None, 'the premise: a budget of everything leaves it dense'
    assert budget.replan(.25)['fc'].reason == fresh['fc'].reason

def test_replan_of_a_plan_from_a_file(tmp_path):
    m = bigger()
    plan = FC_Decomposer(.5).plan(m)
    back = DecompositionPlan.load(plan.save(tmp_path/'p.json'))
    assert facts(back.replan(ParamBudget(.4))) == facts(plan.replan(ParamBudget(.4)))

# ------------------------------------------------------------------ SelfDistillation: the loss

@pytest.mark.parametrize('T', [1., 2., 5.])
def test_soft_targets(T):
    p,t = torch.randn(7, 5, dtype=torch.float64),torch.randn(7, 5, dtype=torch.float64)
    assert SoftTargets(T)(p, t).item() == pytest.approx(kl(p, t, T), rel=1e-9) and SoftTargets(T)(p, p).item() == pytest.approx(0, abs=1e-12)
    assert SoftTargets()(p, t) == SoftTargets(2.)(p, t)
    assert SoftTargets(T, logits=.3)(p, t).item() == pytest.approx(kl(p, t, T) + .3*np.square((p - t).numpy()).mean()/np.square(t.numpy()).mean(), rel=1e-9)

def test_soft_targets_along_another_axis():
    p,t = torch.randn(2, 5, 3, 4, dtype=torch.float64),torch.randn(2, 5, 3, 4, dtype=torch.float64)
    assert SoftTargets()(p, t, axis=1).item() == pytest.approx(kl(p, t, axis=1), rel=1e-9)

def soft(p, t, **kw):
    "The loss of a classifier: with the relative squared error of the logits"
    p,t = (o.detach().double().numpy() for o in (p, t))
    return kl(*map(torch.from_numpy, (p, t)), **kw) + np.square(p - t).mean()/np.square(t).mean()

def distilled(learn, *cbs, epochs=1, **kw):
    "Every training batch of a fit with SelfDistillation, and the outputs of the teacher"
    spy,teacher = Spy(),copy.deepcopy(kw.get('teacher') or learn._dense.model).eval()
    fit(learn, epochs, 1e-3, cbs=[SelfDistillation(**kw), spy, *cbs])
    with torch.no_grad(): return [(o, teacher(o['x'])) for o in spy.seen]

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), nn.CrossEntropyLoss(), LabelSmoothingCrossEntropy(), LabelSmoothingCrossEntropyFlat(), F.cross_entropy], ids=lambda o: getattr(o, '__name__', type(o).__name__))
def test_the_loss_of_a_classifier(loss):
    for o,t in distilled(learner(loss_func=loss).decompose(.25)):
        assert o['loss'] == o['grad'] == pytest.approx(soft(o['pred'], t), rel=1e-4)

def test_the_loss_of_a_regression():
    for o,t in distilled(learner('number').decompose(.25)): assert o['loss'] == pytest.approx((o['pred'] - t).square().mean().item(), rel=1e-4)

@pytest.mark.parametrize('weight', [0., .25, 1.])
def test_weight_mixes_the_losses(weight):
    for o,t in distilled(learner().decompose(.25), weight=weight):
        own = F.cross_entropy(o['pred'], o['y']).item()
        assert o['loss'] == pytest.approx(weight*soft(o['pred'], t) + (1-weight)*own, rel=1e-4)

@pytest.mark.parametrize('weight', [-.1, 1.1])
def test_a_wrong_weight(weight):
    with pytest.raises(ValueError, match=r'weight must be in \[0, 1\]'): SelfDistillation(weight=weight)

def test_a_loss_function_of_ones_own():
    for o,t in distilled(learner().decompose(.25), loss_func=lambda p,t: (p - t).abs().max()):
        assert o['loss'] == pytest.approx((o['pred'] - t).abs().max().item(), rel=1e-4)

@pytest.mark.parametrize('names', ['2', ['0', '3']])
def test_features_are_matched(names):
    learn = learner().decompose(.25)
    dense,small,i = learn._dense.model,copy.deepcopy(learn.model),[int(n) for n in names]
    for o,t in distilled(learn, features=names, feature_weight=3.):
        small.load_state_dict(o['state'])
        with torch.no_grad(): extra = sum(((small[:k+1](o['x']) - (b := dense[:k+1](o['x']))).square().mean()/b.square().mean()).item() for k in i)
        assert o['loss'] == pytest.approx(soft(o['pred'], t) + 3*extra, rel=1e-4) and extra > 1e-4

def test_one_step_follows_the_gradient_of_all_terms():
    x,y = points(50)
    learn = learner(opt_func=SGD, wd=0.).decompose(.25)
    learn.dls = DataLoaders(DataLoader(list(zip(x, y)), bs=50), DataLoader(list(zip(x, y)), bs=50), device=torch.device('cpu'))
    small,dense = copy.deepcopy(learn.model),copy.deepcopy(learn._dense.model)
    a,b = small[:3](x),dense[:3](x).detach()
    p,t = small(x)/2,(dense(x)/2).detach()
    k = (t.softmax(1)*(t.log_softmax(1) - p.log_softmax(1))).sum(1).mean()*4
    (.5*(k + (p - t).square().mean()/t.square().mean() + (a-b).square().mean()/b.square().mean()) + .5*F.cross_entropy(2*p, y)).backward()
    fit(learn, 1, .1, cbs=SelfDistillation(weight=.5, features='2', keep_best=False))
    for q,r in zip(learn.model.parameters(), small.parameters()): assert torch.allclose(q, r - .1*r.grad, atol=1e-6)

class Tagger(nn.Module):
    "Classes along dim 1, as segmentation has them: (N, 20) -> (N, 4, 5)"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(20, 16),nn.Linear(16, 20)
    def forward(self, x): return self.b(self.a(x).relu()).unflatten(1, (4, 5))

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(axis=1), nn.CrossEntropyLoss()], ids=lambda o: type(o).__name__)
def test_classes_along_the_axis_of_the_loss(loss):
    x = points(100)[0]
    dls = mk_dls(x, torch.randint(0, 4, (100, 5)), 30)
    learn = Learner(dls, Tagger(), loss_func=loss).decompose(.25)
    for o,t in distilled(learn): assert o['loss'] == pytest.approx(soft(o['pred'], t, axis=1), rel=1e-4)

def test_the_validation_loss_is_the_one_of_the_learner():
    learn = learner().decompose(.25)
    fit(learn, 1, 1e-9, cbs=SelfDistillation())
    x,y = whole(learn.dls.valid)
    assert learn.recorder.values[-1][1] == pytest.approx(F.cross_entropy(learn.model.eval()(x), y).item(), rel=1e-4)

# ------------------------------------------------------------------ SelfDistillation: teacher, best state

def test_distillation_brings_the_model_closer_to_the_teacher():
    learn = learner().decompose(policy=3)
    x,_ = whole(learn.dls.valid)
    def error():
        with torch.no_grad(): return rel(learn.model.eval()(x), learn._dense.model(x))
    before = error()
    fit(learn, 8, 5e-3, cbs=SelfDistillation())
    assert error() < .8*before

@pytest.mark.parametrize('features', [(), '2'])
def test_decomposed_further_during_the_fit(features):
    learn = learner()
    net = learn.model
    learn.decompose(.5, layers='0')
    one_cycle(learn, At('after_epoch', lambda l: l.decompose(policy=2, layers='4')), SelfDistillation(features=features))
    assert list(pairs(learn.model)) == ['0', '4'] and n_hooks(learn.model) == n_hooks(net) == 0
    best = copy.deepcopy(learn.model)
    assert validated(learn)[0] == pytest.approx(validated(learner(model=best))[0])

@pytest.mark.parametrize('seed', [0, 1, 2])
def test_the_output_comes_closer_as_the_loss_on_labels_falls(seed):
    torch.manual_seed(seed)
    x,y = map(torch.tensor, load_digits(return_X_y=True))
    dls = mk_dls((x/16).float(), y, 400)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    learn = fit(Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy), 4, 5e-3)
    (x,y),errors = whole(dls.valid),{}
    def now():
        with torch.no_grad(): z,t = (m.eval()(x) for m in (learn.model, net))
        return rel(z, t),F.cross_entropy(z, y).item()
    for name,kw in dict(both={}, kl=dict(loss_func=SoftTargets())).items():
        before = (learn.decompose(policy={'0': 8, '2': 8}), now())[1]
        errors[name] = (one_cycle(learn, SelfDistillation(**kw), lr=3e-3), now())[1]
        learn.undecompose()
    assert errors['both'][0] < .95*before[0] and errors['both'][1] < before[1] and errors['both'][0] < .9*errors['kl'][0]

def test_the_teacher_is_left_as_found():
    m = nn.Sequential(mlp(16), nn.BatchNorm1d(16), nn.Dropout(.5), nn.Linear(16, 4))
    learn = learner(model=m)
    m.train()
    m[2].eval()
    m[3].weight.requires_grad_(False)
    m[3].bias.grad = torch.ones(4)
    learn.decompose(.25)
    before = state(m),flags(m),[p.requires_grad for p in m.parameters()],[None if p.grad is None else p.grad.clone() for p in m.parameters()]
    fit(learn, 2, 1e-2, cbs=SelfDistillation(features=['0', '3']))
    assert equal(before[0], state(m)) and before[1] == flags(m) and before[2] == [p.requires_grad for p in m.parameters()]
    assert all(a is None and p.grad is None or torch.equal(a, p.grad) for a,p in zip(before[3], m.parameters()))
    assert n_hooks(m) == n_hooks(learn.model) == 0

def test_a_teacher_that_is_passed():
    other = nn.Sequential(nn.Linear(20, 4))
    learn = learner().decompose(.25)
    for o,t in distilled(learn, teacher=other): assert o['loss'] == pytest.approx(soft(o['pred'], other(o['x'])), rel=1e-4)
    assert learn._dense.model is not other

def test_a_teacher_without_decompose():
    learn = learner()
    for o,t in distilled(learn, teacher=mlp()): assert o['loss'] == pytest.approx(soft(o['pred'], t), rel=1e-4)

def test_decomposed_twice_the_teacher_is_the_first_model():
    learn = learner()
    net = learn.model
    learn.decompose(.5, layers='0').decompose(.25, layers='2')
    for o,t in distilled(learn): assert o['loss'] == pytest.approx(soft(o['pred'], net.eval()(o['x'])), rel=1e-4)

def test_no_teacher():
    learn = learner()
    with pytest.raises(ValueError, match=r'needs a teacher: use it after learn.decompose\(\)'): fit(learn, 1, cbs=SelfDistillation())
    fit(learn.decompose(.5).undecompose(), 0)
    with pytest.raises(ValueError, match='needs a teacher'): fit(learn, 1, cbs=SelfDistillation())

@pytest.mark.parametrize('names', ['9', ['2', 'nope'], ['2', '0.1']], ids=str)
def test_an_unknown_feature(names):
    learn = learner().decompose(.25)
    dense = learn._dense.model.train()
    before = flags(dense)
    bad = names if isinstance(names, str) else names[1]
    with pytest.raises(ValueError, match=f"features='{re.escape(bad)}' is not a module of Sequential"): fit(learn, 1, cbs=SelfDistillation(features=names))
    assert n_hooks(learn.model) == n_hooks(dense) == 0
    assert flags(dense) == before

@pytest.mark.parametrize('seed', range(3))
def test_never_ends_worse(seed):
    learn = learner().decompose(.25)
    torch.manual_seed(seed)
    before,start = state(learn.model),validated(learn)
    fit(learn, 2, 10., cbs=SelfDistillation())
    assert equal(before, state(learn.model)) and validated(learn) == pytest.approx(start, rel=1e-5)

class States(Callback):
    "Model and its loss over the validation set after each epoch, computed here"
    def before_fit(self): self.all = []
    def after_epoch(self):
        x,y = whole(self.dls.valid)
        with torch.no_grad(): self.all.append((F.cross_entropy(self.model(x), y).item(), state(self.model)))

@pytest.mark.parametrize('cbs', [[], [FetchPredsCallback(ds_idx=0)]], ids=['alone', 'with predictions of the training set'])
@pytest.mark.parametrize('lr', [3e-3, .3])
def test_the_best_state_is_returned(lr, cbs):
    learn,states = learner().decompose(policy=3),States()
    x,y = whole(learn.dls.valid)
    with torch.no_grad(): start = F.cross_entropy(learn.model.eval()(x), y).item(),state(learn.model)
    fit(learn, 6, lr, cbs=[SelfDistillation(), states, *cbs])
    want = min([start, *states.all], key=lambda o: o[0])
    assert want is not states.all[-1] or lr == 3e-3
    assert equal(want[1], state(learn.model)) and len(states.all) == 6

def test_without_keep_best_the_last_state_is_returned():
    learn,states = learner().decompose(.25),States()
    fit(learn, 3, 1., cbs=[SelfDistillation(keep_best=False), states])
    assert equal(states.all[-1][1], state(learn.model)) and states.all[-1][0] > min(o[0] for o in states.all) or states.all[-1][0] > 1

def no_valid(kind):
    x,y = points(100)
    train = DataLoader(list(zip(x, y)), bs=50)
    learn = learner().decompose(.25)
    learn.dls = DataLoaders(*([train] if kind == 'none' else [train, DataLoader([], bs=50)]), device=torch.device('cpu'))
    return learn

@pytest.mark.parametrize('kind', ['empty', 'none'])
def test_no_validation_set(kind):
    learn = no_valid(kind)
    dense = learn._dense.model.train()
    with pytest.raises(ValueError, match='keep_best needs a validation set; pass keep_best=False'): fit(learn, 1, cbs=SelfDistillation(features='2'))
    assert n_hooks(learn.model) == n_hooks(dense) == 0
    assert all(flags(dense))

def test_no_validation_set_and_no_keep_best():
    learn = no_valid('empty')
    before = state(learn.model)
    class NoValid(Callback):
        def before_validate(self):
            from fastai.callback.core import CancelValidException
            raise CancelValidException()
    fit(learn, 1, 1e-3, cbs=[SelfDistillation(keep_best=False), NoValid()])
    assert not any(torch.equal(v, before[k]) for k,v in state(learn.model).items())

@pytest.mark.parametrize('cbs', [[], [FetchPredsCallback(ds_idx=0)]], ids=['alone', 'with predictions of the training set'])
def test_a_validation_of_other_data_during_fit_does_not_count(cbs):
    x,_ = points(120)
    learn = learner(model=mlp())
    learn.dls = mk_dls(x, torch.randint(0, 4, (120,), generator=gen(3)), 60, bs=20)       # nothing to learn: validation gets worse, training better
    learn.decompose(.9)
    start = validated(learn)[0]
    fit(learn, 15, 1e-2, cbs=[SelfDistillation(weight=0.), *cbs])
    assert validated(learn)[0] <= start + 1e-6

# ------------------------------------------------------------------ SelfDistillation: with other things

@pytest.fixture
def attached():
    "A decomposed Learner that always has the callback"
    learn = learner(path='.').decompose(.25)
    return learn.add_cb(SelfDistillation(features='2'))

def test_validate_and_get_preds_are_not_disturbed(attached):
    learn = attached
    before = state(learn.model)
    x,y = whole(learn.dls.valid)
    want = F.cross_entropy(learn.model.eval()(x), y).item()
    for _ in range(2):
        assert validated(learn)[0] == pytest.approx(want, rel=1e-4)
        with learn.no_bar(): preds,targs = learn.get_preds()
        assert torch.allclose(preds, learn.model(x).softmax(1), atol=1e-5) and torch.equal(targs, y) and equal(before, state(learn.model))
        assert n_hooks(learn.model) == n_hooks(learn._dense.model) == 0
        fit(learn, 1, 10.)      # and after a fit, which changes nothing

def test_lr_find_is_not_disturbed(attached, tmp_path):
    learn = attached
    learn.path = tmp_path
    plain = learner(path=tmp_path).decompose(.25)
    before = state(learn.model)
    losses = []
    for o in (plain, learn):
        torch.manual_seed(3)
        o.dls.train.rng = random.Random(3)
        with o.no_bar(), o.no_logging(): o.lr_find(num_it=12, show_plot=False)
        losses.append(torch.stack(list(o.recorder.losses)))
    assert torch.equal(*losses) and equal(before, state(learn.model)) and n_hooks(learn.model) == 0
    spy = Spy()
    fit(learn, 1, 1e-3, cbs=spy)    # it works again in the next fit
    assert spy.seen[0]['loss'] != pytest.approx(F.cross_entropy(spy.seen[0]['pred'], spy.seen[0]['y']).item(), rel=1e-3)

@pytest.mark.parametrize('weight', [1., .5])
def test_with_mixup(weight):
    learn = learner().decompose(.25)
    lf,x = learn.loss_func,learn.dls.train.dataset
    res = distilled(learn, MixUp(), weight=weight)
    rows = {tuple(o[0].tolist()) for o in x}
    assert not all(tuple(r) in rows for o,_ in res for r in o['x'].tolist()), 'the inputs were mixed'
    assert learn.loss_func is lf and (weight != 1 or all(o['loss'] == pytest.approx(soft(o['pred'], t), rel=1e-4) for o,t in res))

@pytest.mark.parametrize('weight', [0., 1.])
def test_with_gradient_accumulation(weight):
    x,y = points(80)
    res = []
    for bs,cbs in ((40, []), (20, [GradientAccumulation(40)])):
        learn = learner(opt_func=SGD, wd=0.).decompose(.25)
        learn.dls = DataLoaders(DataLoader(list(zip(x, y)), bs=bs), DataLoader(list(zip(x, y)), bs=40), device=torch.device('cpu'))
        start = state(learn.model)
        loss = SoftTargets()        # a mean over items; what is relative to a batch is not the sum of its halves
        fit(learn, 1, .1, cbs=[SelfDistillation(weight=weight, loss_func=loss, keep_best=False), *cbs])
        res.append(state(learn.model))
    for k,v in start.items(): assert torch.allclose(res[0][k] - v, res[1][k] - v, rtol=1e-3, atol=1e-6)

@pytest.mark.parametrize('to', ['to_fp16', 'to_bf16'])
def test_with_mixed_precision(to):
    learn = getattr(learner(), to)().decompose(.25)
    before,res = state(learn.model),distilled(learn, features='2', keep_best=False)
    assert len(res) == 6 and all(np.isfinite(o['loss']) and o['loss'] > soft(o['pred'], t) for o,t in res)
    assert not any(torch.equal(v, before[k]) for k,v in state(learn.model).items())

@pytest.mark.parametrize('exc', [RuntimeError('broken'), KeyboardInterrupt()], ids=['error', 'interrupt'])
def test_a_fit_that_breaks_off_leaves_nothing_behind(exc):
    learn = learner().decompose(.25)
    dense = learn._dense.model.train()
    with pytest.raises(type(exc)): fit(learn, 1, 1e-3, cbs=[SelfDistillation(features='2'), Stop(exc)])
    assert n_hooks(learn.model) == n_hooks(dense) == 0
    assert all(flags(dense))

def test_a_start_that_is_not_a_number_is_no_best_state():
    learn = learner().decompose(.25)
    class Heals(Callback):
        def before_train(self): self.model[4][1].bias.data.zero_()
    learn.model[4][1].bias.data.fill_(float('nan'))
    fit(learn, 1, 1e-4, cbs=[SelfDistillation(), Heals()])
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_a_fit_after_one_that_broke_off():
    learn = learner().decompose(.25)
    cb = SelfDistillation()
    with pytest.raises(RuntimeError): fit(learn, 1, 10., cbs=[cb, Stop(RuntimeError('broken'))])
    start,n = validated(learn)[0],n_hooks(learn.model)
    fit(learn, 2, 1e-3, cbs=cb)
    assert validated(learn)[0] <= start and n_hooks(learn.model) == n

def test_a_fit_that_is_cancelled_ends_with_the_best_state():
    learn = learner().decompose(.25)
    before = state(learn.model)
    fit(learn, 1, 10., cbs=[SelfDistillation(features='2'), Stop(CancelFitException())])
    assert equal(before, state(learn.model)) and n_hooks(learn.model) == n_hooks(learn._dense.model) == 0

def test_a_fit_that_is_cancelled_before_it_begins():
    learn = learner().decompose(.25)
    class Never(Callback):
        order = -5
        def before_fit(self): raise CancelFitException()
    before = state(learn.model)
    fit(learn, 1, 1e-3, cbs=[SelfDistillation(), Never()])
    assert equal(before, state(learn.model))

def test_undecompose_after_distillation():
    learn = learner()
    net,before = learn.model,state(learn.model)
    fit(learn.decompose(.25), 1, 1e-2, cbs=SelfDistillation())
    assert learn.undecompose().model is net and equal(before, state(net))

def test_export_with_the_callback(digits, tmp_path):
    learn = digits_learner(digits, tmp_path).decompose(policy=2)
    learn.add_cb(SelfDistillation())
    fit(learn, 1, 1e-3)
    learn.export()
    dense = sum(p.numel()*4 for p in learn._dense.model.parameters())
    assert (tmp_path/'export.pkl').stat().st_size < dense and equal(state(load_learner(tmp_path/'export.pkl').model), state(learn.model))

# ------------------------------------------------------------------ refine

def outs(m, x):
    with torch.no_grad(): return copy.deepcopy(m).double().eval()(x.double())

@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('policy', [{'0': 3, '2': 12, '4': 4}, {'0': 8, '2': 8}, 2, .5, 1.], ids=str)
def test_outputs_are_at_least_as_close(policy, bias):
    m,x = mlp(bias=bias),points(300)[0]
    small = FC_Decomposer(policy=policy).decompose(m, x)
    before,after = rel(outs(small, x), outs(m, x)),rel(outs(refine(small, m, x), x), outs(m, x))
    assert after <= before*(1 + 1e-4) + 1e-6     # the rounding of float32, in which the library compares

def test_much_closer_where_early_layers_are_badly_compressed():
    m,x = mlp(),points(400)[0]
    m.load_state_dict(learner().model.state_dict())
    small = FC_Decomposer(policy={'0': 10, '2': 20, '4': 4}).decompose(m)
    assert rel(outs(refine(small, m, x[:300]), x[300:]), outs(m, x[300:])) < .3*rel(outs(small, x[300:]), outs(m, x[300:]))

def test_refine_leaves_both_models_unchanged():
    m,x = mlp(),points(100)[0]
    small = FC_Decomposer(policy=3).decompose(m)
    m.train(); small.train(); m[2].eval(); small[4].eval()
    small[0][0].weight.requires_grad_(False)
    m[0].weight.grad = torch.ones(32, 20)
    before = [(state(o), flags(o), n_hooks(o), [p.requires_grad for p in o.parameters()]) for o in (m, small)]
    res = refine(small, m, x)
    for (s,*rest),o in zip(before, (m, small)): assert equal(s, state(o)) and rest == [flags(o), n_hooks(o), [p.requires_grad for p in o.parameters()]]
    assert res is not small and not equal(state(res), state(small)) and torch.equal(m[0].weight.grad, torch.ones(32, 20))
    assert flags(res) == flags(small) and [p.requires_grad for p in res.parameters()] == [p.requires_grad for p in small.parameters()]
    assert not {p.data_ptr() for p in res.parameters()} & {p.data_ptr() for o in (m, small) for p in o.parameters()} and n_hooks(res) == 0

def test_first_factors_stay():
    m,x = mlp(),points(200)[0]
    small = FC_Decomposer(policy=3).decompose(m)
    res = refine(small, m, x)
    assert all(torch.equal(res[i][0].weight, small[i][0].weight) for i in (0, 2, 4))
    assert all((res[i][1].bias is None) == (small[i][1].bias is None) for i in (0, 2, 4))

@pytest.mark.parametrize('bias', [True, False])
def test_the_step_is_the_least_squares_solution(bias):
    g = gen(1)
    lin,x = nn.Linear(12, 9, bias, dtype=torch.float64),torch.randn(500, 12, generator=g, dtype=torch.float64) + .5
    m = nn.Sequential(lin)
    small = FC_Decomposer(policy=4).decompose(m)
    res = refine(small, m, x)
    with torch.no_grad(): h,y = small[0][0](x),lin(x)
    H = torch.cat([h, torch.ones(500, 1, dtype=h.dtype)], 1) if bias else h
    best = torch.linalg.lstsq(H, y).solution
    least,got,was = ((H@best - y).norm(), *((outs(o, x) - y).norm() for o in (res, small)))
    assert got <= least*(1 + 1e-4) and was > least*(1 + 1e-3)
    # and exactly: the ridge pulls towards the weights before
    r = 1e-3*H.square().sum(0).mean()
    old = torch.cat([small[0][1].weight, small[0][1].bias[:,None]], 1).detach().T if bias else small[0][1].weight.detach().T
    exact = torch.linalg.lstsq(torch.cat([H, r.sqrt()*torch.eye(H.shape[1], dtype=H.dtype)]), torch.cat([y, r.sqrt()*old])).solution
    new = torch.cat([res[0][1].weight, res[0][1].bias[:,None]], 1).detach().T if bias else res[0][1].weight.detach().T
    assert torch.allclose(new, exact, atol=1e-9)

def test_few_rows_do_not_spoil_the_model():
    m,x = mlp(),points(400)[0]
    small = FC_Decomposer(policy=8).decompose(m, x)
    assert rel(outs(refine(small, m, x[:3]), x[100:]), outs(m, x[100:])) < 2*rel(outs(small, x[100:]), outs(m, x[100:]))

def test_the_targets_are_outputs_of_the_dense_layer_the_inputs_those_of_the_small_model():
    m,x = mlp(),points(300)[0].double()
    m = m.double()
    small = FC_Decomposer(policy={'0': 3, '2': 20}).decompose(m)
    res = refine(small, m, x)
    with torch.no_grad(): h,y = res[2][0](res[:2](x)),m[:3](x)
    best = torch.linalg.lstsq(torch.cat([h, torch.ones(300, 1)], 1), y).solution
    least = (torch.cat([h, torch.ones(300, 1)], 1).double()@best - y).norm()
    with torch.no_grad(): assert (res[:3](x) - y).norm() < 1.02*least < (small[:3](x) - y).norm()

@pytest.mark.parametrize('form', ['tensor', 'list', 'generator', 'loader', 'loaders', 'pairs', 'function'])
def test_forms_of_data(form):
    m,(x,y) = mlp(),points(120)
    small = FC_Decomposer(policy=3).decompose(m)
    data = dict(tensor=x, list=x.split(40), generator=(o for o in x.split(40)), loader=DataLoader(list(zip(x, y)), bs=40),
                loaders=mk_dls(x, y, 20), pairs=list(zip(x.split(40), y.split(40))), function=lambda o: o(x))[form]
    data = list(data) if form == 'list' else data
    got,ref = refine(small, m, data),refine(small, m, x if form != 'loaders' else torch.stack([o[0] for o in mk_dls(x, y, 20).train.dataset]))
    assert all(torch.allclose(v, state(ref)[k], atol=1e-4) for k,v in state(got).items()) and not equal(state(got), state(small))

def test_n_batches_of_refine():
    m,x = mlp(),points(120)[0]
    small = FC_Decomposer(policy=3).decompose(m)
    def endless():
        while True: yield x
    assert equal(state(refine(small, m, endless(), n_batches=1)), state(refine(small, m, x)))

def test_pairs_that_are_not_called_are_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used,self.idle = nn.Linear(20, 16),nn.Linear(20, 16)
        def forward(self, x, other=False): return self.idle(x) if other else self.used(x)
    m,x = Two(),points(100)[0]
    small = FC_Decomposer(policy=3).decompose(m)
    with pytest.warns(UserWarning, match='not refined, because they are not called on this data: idle.'): res = refine(small, m, x)
    assert equal(state(res.idle), state(small.idle)) and not equal(state(res.used), state(small.used))

def test_a_pair_whose_weight_is_read_is_named_too():
    m,x = Reads(),points(100)[0]
    small = FC_Decomposer(policy=3).decompose(m)
    with pytest.warns(UserWarning, match='not called on this data: fc.'): refine(small, m, x)

def test_no_pairs():
    m,x = mlp(),points(50)[0]
    small = FC_Decomposer(policy=3).decompose(m)
    for a,b in ((m, m), (m, small), (small, small), (small, nn.ReLU())):
        with pytest.raises(ValueError, match='no pair in the place of a layer of dense'): refine(a, b, x)

@pytest.mark.parametrize('data', [[], iter(())])
def test_no_batches(data):
    m = mlp()
    with pytest.raises(ValueError, match='data has no batches'): refine(FC_Decomposer(policy=3).decompose(m), m, data)

def test_a_layer_of_zeros_without_bias():
    m,x = mlp(bias=False),points(100)[0]
    m = nn.Sequential(m, nn.Linear(4, 4, bias=False))
    m[0][2].weight.data.zero_()
    small = FC_Decomposer(policy=3).decompose(m)
    res = refine(small, m, x)
    assert all(p.isfinite().all() for p in res.parameters())

def test_data_that_forward_writes_to():
    class Doubles(nn.Module):
        def __init__(self): super().__init__(); self.fc = mlp()
        def forward(self, x): return self.fc(x.mul_(2))
    m,x = Doubles(),points(100)[0]
    small = FC_Decomposer(policy=3).decompose(m)
    before = x.clone()
    res = refine(small, m, x)
    assert torch.equal(x, before)
    assert equal(state(res.fc), state(refine(small.fc, m.fc, 2*before)))

def test_a_layer_that_is_called_twice_is_fitted_to_both():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.fc = nn.Linear(20, 20)
        def forward(self, x): return self.fc(x) + 0, self.fc(x.square() - 2)
    m,x = Twice(),points(200)[0]
    small = FC_Decomposer(policy=6).decompose(m)
    ref = refine(nn.Sequential(small.fc), nn.Sequential(m.fc), torch.cat([x, x.square() - 2]))
    res = refine(small, m, x)
    assert not equal(state(res), state(small)) and torch.allclose(res.fc[1].weight, ref[0][1].weight, atol=1e-4)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_refine_keeps_the_dtype(dtype):
    m,x = mlp().to(dtype),points(200)[0].to(dtype)
    small = FC_Decomposer(policy=3).decompose(m)
    res = refine(small, m, x)
    assert {p.dtype for p in res.parameters()} == {dtype} and rel(outs(res, x), outs(m, x)) < rel(outs(small, x), outs(m, x))

def test_refine_with_dropout_sees_the_eval_mode():
    m,x = nn.Sequential(nn.Linear(20, 32), nn.Dropout(.5), nn.Linear(32, 8)).train(),points(200)[0]
    small = FC_Decomposer(policy=4).decompose(m)
    r = rng()
    res = refine(small, m, x)
    assert same_rng(r, rng()) and equal(state(res), state(refine(small, m, x)))
    assert equal(state(res), state(refine(small.eval(), m.eval(), x)))

def test_dict_outputs():
    class Dict(nn.Module):
        def __init__(self): super().__init__(); self.fc = mlp()
        def forward(self, x): return dict(logits=self.fc(x), none=None, ids=x.long())
    m,x = Dict(),points(100)[0]
    small = FC_Decomposer(policy=3).decompose(m)
    assert equal(state(refine(small, m, x).fc), state(refine(small.fc, m.fc, x)))

def test_a_suggestion_from_before_a_fit_says_so():
    learn = learner()
    found = find(learn, .3)
    fit(learn, 1)
    said = warned(lambda: learn.decompose(plan=found))
    assert len(said) == 1 and 'changed since the plan' in said[0]
