"Pruning the model of a fastai Learner"
from functools import partial
import pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.hook import hook_output
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.vision.models.xresnet import xresnet18
from fastai.callback.schedule import SchedLin
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import OptimWrapper, SGD
from torch import nn
from fasterai.core.modules import count_params
from fasterai.core.store import load_compressed
from fasterai.lowrank import learner as _       # plans, uncompress
from fasterai.prune import learner as _         # prune
from fasterai.prune.cost import count_macs
from fasterai.prune.pruner import Pruner
from fasterai.prune.training import PruneCallback
from fasterai.quantize import learner as _      # quantize

Cut = partial(Pruner, score='magnitude', compensate=False)   # without looking at data

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

def images(n=24, size=32):
    xs,ys = torch.randn(n, 3, size, size),torch.arange(n) % 3
    for x,y in zip(xs, ys): x[y] += 1.
    items = list(zip(xs, ys))
    return DataLoaders.from_dsets(items, items, bs=8, num_workers=0, device='cpu')

def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3))

def learner(model=None, **kw):
    return Learner(images(), model or net(), loss_func=nn.CrossEntropyLoss(), metrics=accuracy, **kw)

def quiet(learn, n=1, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-3, **kw)
    return learn

def live(learn):
    "Parameters of the model are those of the optimizer"
    return {id(p) for p in learn.model.parameters()} == {id(p) for g in learn.opt.param_lists for p in g}

def test_prune_and_train():
    learn = quiet(learner())
    dense,state = learn.model,{k: v.clone() for k,v in learn.model.state_dict().items()}
    assert learn.prune(.5) is learn and learn.opt is None
    assert count_macs(learn.model, torch.randn(2, 3, 32, 32)) <= .5*count_macs(dense, torch.randn(2, 3, 32, 32))
    quiet(learn)
    assert live(learn) and learn.validate()[0] > 0
    assert all(torch.equal(v, state[k]) for k,v in dense.state_dict().items())
    learn.uncompress()
    assert learn.model is dense and learn.plans == []

@pytest.mark.slow
def test_xresnet():
    learn = learner(xresnet18(n_out=3))
    learn.prune(.4)
    assert learn.plans[0].macs_after <= .4*learn.plans[0].macs and live(quiet(learn))

def test_tabular():
    df = pd.DataFrame(dict(a=torch.randn(64).numpy(), b=['x', 'y']*32, y=[0., 1.]*32))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cont_names=['a'], cat_names=['b'], y_names='y', bs=16, num_workers=0, device='cpu')
    learn = tabular_learner(dls, layers=[24, 16], loss_func=nn.functional.mse_loss)
    learn.prune(.5, score='taylor', cost='params')
    assert learn.plans[0].params_after <= .5*learn.plans[0].params and live(quiet(learn))
    learn.validate()

def test_frozen_groups_and_discriminative_rates():
    learn = learner(splitter=lambda m: [[*m[:3].parameters()], [*m[3:].parameters()]])
    learn.freeze()
    learn.prune(.6)
    learn.freeze()
    quiet(learn)
    assert not learn.model[0].weight.requires_grad and learn.model[3].weight.requires_grad and len(learn.opt.param_lists) == 2

def test_in_a_running_fit():
    class PruneAt(Callback):
        def after_epoch(self):
            if self.epoch == 0: self.learn.prune(.5)
    learn = learner(cbs=PruneAt())
    quiet(learn, 3)
    assert live(learn) and len(learn.plans) == 1
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.remove_cb(PruneAt)
    quiet(learn)
    assert any(not torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))

def test_best_model_of_the_pruned_one(tmp_path):
    learn = learner(path=tmp_path)
    learn.prune(.5)
    quiet(learn, 2, cbs=SaveModelCallback())
    assert count_params(learn.model) == learn.plans[0].params_after

def test_save_export_load(tmp_path):
    learn = learner(path=tmp_path)
    learn.prune(.5)
    want = learn.model.eval()(torch.ones(1, 3, 32, 32))
    learn.save_compressed(tmp_path/'small')
    assert torch.equal(load_compressed(tmp_path/'small', net).eval()(torch.ones(1, 3, 32, 32)), want)
    learn.save('w')
    with torch.no_grad(): learn.model[0].weight.zero_()
    learn.load('w')
    assert torch.equal(learn.model.eval()(torch.ones(1, 3, 32, 32)), want)

def test_plans_follow_each_other():
    learn = learner()
    learn.prune(.7).prune(.7)
    a,b = learn.plans
    assert a.params_after == b.params and count_params(learn.model) == b.params_after
    plan = Cut(.5).plan(learn.uncompress().model, learn.dls)
    learn.prune(plan=plan)
    assert learn.plans == [plan]

def test_errors():
    learn = learner()
    model = learn.model
    with pytest.raises(ValueError, match=r'budget must be in \(0, 1\]'): learn.prune(50)
    with pytest.raises(TypeError, match='plan must be a PruningPlan, got'): learn.prune(plan=3)
    with pytest.raises(ValueError, match='no layer matches'): learn.prune(exclude='nope')
    plan = Cut(.5).plan(model, learn.dls)
    with pytest.raises(ValueError, match='leave out budget'): learn.prune(.4, plan=plan)
    learn.prune(plan=plan)
    with pytest.raises(ValueError, match='applied already'): learn.prune(plan=plan)
    assert len(learn.plans) == 1

# While training

class Watch(Callback):
    "MACs after each epoch"
    order = 100
    def before_fit(self): self.macs,self.live = [],[]
    def after_epoch(self):
        self.macs.append(count_macs(self.learn.model, torch.randn(2, 3, 32, 32)))
        self.live.append(live(self.learn))

@pytest.mark.slow
@pytest.mark.parametrize('kind', ['vision', 'unet'])
def test_models_of_fastai(kind):
    from fastai.vision.all import CrossEntropyLossFlat, TensorCategory, TensorImage, TensorMask, resnet18, unet_learner, vision_learner
    xs,unet = torch.randn(8, 3, 64, 64),kind == 'unet'
    ys = torch.randint(0, 3, (8, 64, 64) if unet else (8,))
    items = [(TensorImage(x), (TensorMask if unet else TensorCategory)(y)) for x,y in zip(xs, ys)]
    dls = DataLoaders.from_dsets(items, items, bs=4, num_workers=0, device='cpu')
    make,loss = (unet_learner, CrossEntropyLossFlat(axis=1)) if unet else (vision_learner, CrossEntropyLossFlat())
    learn = make(dls, resnet18, pretrained=False, n_out=3, loss_func=loss, normalize=False)
    learn.prune(.5)
    plan = learn.plans[0]
    assert plan.macs_after <= .5*plan.macs and sum(o.can for o in plan.layers) == (28 if unet else 13)
    quiet(learn)
    assert live(learn)
    learn.unfreeze()
    quiet(learn)

# The smallest budget

def test_prune_find():
    learn = quiet(learner(), 6)
    model,want = learn.model,learn.validate()[1]
    found = learn.prune_find(max_drop=.05, show_plot=False, ratios=(.8, .5, .3), refine=1)
    assert learn.model is model and found.dense == pytest.approx(want) and found.value >= want - .05 - 1e-6
    assert found.frame.ratio.is_monotonic_decreasing and len(found.frame) >= 3 and found.frame.ok.any()
    smaller = [o.ratio for o in found.frame.itertuples() if o.ok]
    assert found.ratio == min(smaller) and found.plan.macs_after <= found.ratio*found.plan.macs
    assert learn.prune(plan=found).validate()[1] == pytest.approx(found.value)
    assert len(learn.plans) == 1 and learn.uncompress().model is model

def test_what_prune_find_refuses():
    learn = learner()
    with pytest.raises(ValueError, match='max_drop must not be negative'): learn.prune_find(-1)
    with pytest.raises(TypeError, match='ratios must be a list of budgets'): learn.prune_find(ratios=.5)
    with pytest.raises(ValueError, match="metric='f1' is not among"): learn.prune_find(metric='f1')
    with pytest.raises(ValueError, match='no layer matches'): learn.prune_find(exclude='nope')
    none = learn.prune_find(0., show_plot=False, ratios=(.05,), refine=0, score='magnitude', compensate=False, metric='valid_loss')
    if none.plan is None:
        with pytest.raises(ValueError, match='found no budget that keeps the metric'): learn.prune(plan=none)

class Within(Callback):
    "Calls `f(learn)` between two epochs of a fit"
    def __init__(self, f): self.f = f
    def after_epoch(self):
        if self.epoch == 0: self.f(self.learn)

class Skip(nn.Module):
    "Reads what a hook on its own layer stored, as a unet of fastai does"
    def __init__(self):
        super().__init__()
        self.enc,self.mid,self.head = nn.Conv2d(3, 16, 3, padding=1),nn.Conv2d(16, 16, 3, padding=1),nn.Linear(32, 3)
        self.hook = hook_output(self.enc, detach=False)
    def forward(self, x):
        y = self.mid(self.enc(x).relu()).relu()
        return self.head(torch.cat([y, self.hook.stored], 1).mean((2, 3)))

@pytest.mark.parametrize('cbs', [lambda: PruneCallback(.6), lambda: Within(lambda l: l.decompose(rank_ratio=.5)),
                                 lambda: Within(lambda l: l.quantize(8))])
def test_hooks_of_the_model_itself_live_on(cbs):
    learn = quiet(learner(Skip()), 2, cbs=cbs())
    m = learn.model.eval()
    for n in (1, 5):
        x = torch.randn(n, 3, 32, 32)
        m(x)
        assert torch.equal(m.hook.stored, m.enc(x)) and len(m.enc._forward_hooks) == 1
