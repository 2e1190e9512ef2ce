"A Learner that is pruned while it trains: the schedule is met, and the optimizer goes on with what is left"
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import SchedCos, SchedLin
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.optimizer import Adam, OptimWrapper, SGD, ranger
from fastai.losses import CrossEntropyLossFlat
from sklearn.datasets import load_digits
from torch import nn
from test_distributed import run
from fasterai.core.distill import SelfDistillation
from fasterai.core.store import load_compressed
from fasterai.prune.cost import count_macs
from fasterai.prune.groups import find_groups
from fasterai.prune import learner as _     # learn.prune
from fasterai.prune.optimizer import carry_over, kept_entries
from fasterai.prune.plan import PruningPlan
from fasterai.prune.slicing import slice_units
from fasterai.prune.training import PruneCallback, narrowed

pytestmark = pytest.mark.filterwarnings('ignore')      # mixed precision without a GPU, saved files
N,BS = 256,32       # 8 batches

def digits():
    d = load_digits()
    xs,ys = torch.tensor(d.images[:N + 64], dtype=torch.float32)[:, None]/16,torch.tensor(d.target[:N + 64])
    items = list(zip(xs, ys))
    return DataLoaders(DataLoader(items[:N], bs=BS, shuffle=False, num_workers=0), DataLoader(items[N:], bs=64, num_workers=0))

def cnn(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))

def learner(model=None, path=None, **kw):
    return Learner(digits(), cnn() if model is None else model, loss_func=CrossEntropyLossFlat(), path=path, **kw)

@contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging(): yield learn

def fit(learn, *args, one_cycle=False, **kw):
    with quiet(learn): (learn.fit_one_cycle if one_cycle else learn.fit)(*args, **kw)
    return learn

class At(Callback):
    "Calls a function before a batch of the fit; `order` 0 is before PruneCallback, 5 after it"
    run_valid = False
    def __init__(self, batch, f, order=0): self.batch,self.f,self.order = batch,f,order
    def before_batch(self):
        if self.epoch*self.n_iter + self.iter == self.batch: self.f(self.learn)

def state(model): return {k: v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def live(learn): return {id(p) for p in learn.model.parameters()}
def trained(learn): return {id(p) for g in learn.opt.param_lists for p in g}

def by_hand(name, t, kept):
    "What stays of a tensor of `cnn`, with NumPy's indices"
    a,b = (np.array(kept.get(n, range(w))) for n,w in (('0', 8), ('3', 6)))
    t = t.numpy()
    if name.startswith(('0.', '1.')): return torch.tensor(t if t.ndim == 0 else t[a])
    if name == '3.weight': return torch.tensor(t[np.ix_(b, a)])
    if name.startswith('4.'): return torch.tensor(t if t.ndim == 0 else t[b])
    return torch.tensor(t[:, b] if name == '8.weight' else t)

def macs(model, x):
    "Multiply-accumulates of convolutions and linear layers, counted by hooks"
    total,model = [],deepcopy(model).eval()
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.register_forward_hook(lambda m, i, o: total.append(o.numel()//m.weight.shape[0]*m.weight.numel()))
    with torch.no_grad(): model(x)
    return sum(total)

# Schedule and budget

@pytest.mark.parametrize('cost,every,score', [('macs', 'epoch', 'magnitude'), ('params', 3, 'random'), ('macs', 5, 'taylor')])
def test_the_schedule_is_followed_and_the_budget_met(cost, every, score):
    learn,x,widths = learner(),torch.zeros(1, 1, 8, 8),[]
    n0,m0 = sum(p.numel() for p in learn.model.parameters()),macs(learn.model, x)
    def share(m): return macs(m, x)/m0 if cost == 'macs' else sum(p.numel() for p in m.parameters())/n0
    cb = PruneCallback(.4, cost=cost, every=every, score=score)
    watch = type('Watch', (Callback,), dict(after_batch=lambda self: self.training and widths.append(share(self.model))))()
    fit(learn, 5, 1e-2, one_cycle=True, cbs=[cb, watch])
    assert len(widths) == 5*8 and all(a >= b for a,b in zip(widths, widths[1:]))    # what is gone stays gone
    k = 8 if every == 'epoch' else every
    last = .8*40//k*k
    for i,w in enumerate(widths):
        at = min(1., i//k*k/last)
        assert w <= SchedCos(1., .4)(at) + 1e-9
    assert widths[int(last)] <= .4 and widths[int(last)] > .25
    assert [o.share for o in cb.steps] == pytest.approx([widths[o.batch] for o in cb.steps]) and cb.steps[-1].share <= .4
    assert [o.budget for o in cb.steps] == sorted([o.budget for o in cb.steps], reverse=True)

def test_scores_are_those_of_the_weights_at_the_step():
    learn,seen = learner(),{}
    def loud(learn):    # the units that were smallest become the largest
        with torch.no_grad():
            w = learn.model[0].weight
            seen['small'] = w.flatten(1).norm(dim=1).argsort()[:4].tolist()
            w[seen['small']] *= 100
    fit(learn, 2, 1e-3, cbs=[PruneCallback(.6, layers='0'), At(8, loud)])
    assert {*seen['small']} <= {*learn.plans[0].kept['0']}

def test_one_epoch_prunes_at_its_beginning():
    cb = PruneCallback(.5)
    learn = fit(learner(), 1, cbs=cb)
    assert [(o.epoch, o.batch, o.budget) for o in cb.steps] == [(0, 0, .5)] and len(learn.plans) == 1

def test_a_schedule_that_rises_gives_nothing_back():
    cb = PruneCallback(.5, every=2, schedule=lambda t: .5 if t in (0, 1) else 1.)
    learn = fit(learner(), 2, cbs=cb)
    assert len(cb.steps) == 1 and cb.steps[0].share <= .5

@pytest.mark.parametrize('cost', ['macs', 'params'])
def test_many_steps_empty_no_group(cost):
    "Where the weights do not change, all groups shrink by similar shares"
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    cb = PruneCallback(.3, cost=cost, every=1)
    learn = fit(learner(net), 4, 0., wd=0., cbs=cb)
    shares = [len(o.kept)/o.units for o in learn.plans[0].layers if o.can]
    assert len(cb.steps) > 15 and len(shares) == 3 and .3 < min(shares) and max(shares) < .9, shares

# The optimizer

OPTS = dict(adam=Adam, sgd=partial(SGD, mom=.9), plain=SGD, ranger=ranger, torch=partial(OptimWrapper, opt=torch.optim.AdamW),
            rmsprop=partial(OptimWrapper, opt=partial(torch.optim.RMSprop, momentum=.9, centered=True)))

def memory(learn):
    "All that the optimizer knows, by name of the parameter"
    opt = learn.opt
    inner = getattr(opt, 'opt', None)
    states = [opt.state] + ([inner.state] if inner is not None and inner.state is not opt.state else [])
    names = {id(p): n for n,p in learn.model.named_parameters()}
    res = {(names[id(p)], i, k): deepcopy(v) for i,s in enumerate(states) for p,kv in s.items() for k,v in kv.items()}
    for ps,vs in zip(opt.param_lists, getattr(opt, 'slow_weights', None) or []):
        res |= {(names[id(p)], 'slow'): v.clone() for p,v in zip(ps, vs)}
    return res

@pytest.mark.parametrize('kind', OPTS)
def test_state_is_sliced_like_that_of_a_twin(kind):
    twin,learn,before,after = learner(opt_func=OPTS[kind]),learner(opt_func=OPTS[kind]),{},{}
    fit(twin, 2, 1e-3, one_cycle=True, cbs=At(8, lambda l: before.update(memory(l), hypers=deepcopy(l.opt.hypers))))
    fit(learn, 2, 1e-3, one_cycle=True, cbs=[PruneCallback(.25), At(8, lambda l: after.update(memory(l), hypers=deepcopy(l.opt.hypers)), order=5)])
    kept = learn.plans[0].kept
    assert {*kept} == {'0', '3'} and before.keys() == after.keys() and len(after) > 1
    for k,v in before.items():
        if k == 'hypers': assert after[k] == v
        elif isinstance(v, torch.Tensor) and v.numel() > 1: assert torch.equal(by_hand(k[0], v, kept), after[k]), k
        else: assert after[k] == v, k
    assert live(learn) == trained(learn) and all(p.requires_grad for p in learn.model.parameters())

@pytest.mark.parametrize('kind', ['adam', 'sgd', 'torch'])
def test_training_goes_on_as_with_a_model_sliced_by_hand(kind):
    learn,snap = learner(opt_func=OPTS[kind], wd=.1),{}
    other = learner(opt_func=OPTS[kind], wd=.1)
    fit(other, 2, 1e-3, cbs=At(8, lambda l: snap.update(w=state(l.model), m=memory(l))))
    fit(learn, 2, 1e-3, cbs=PruneCallback(.25))
    kept = learn.plans[0].kept
    small = cnn(1)
    a,b = len(kept['0']),len(kept['3'])
    small[0],small[1],small[3],small[4],small[8] = (nn.Conv2d(1, a, 3, padding=1), nn.BatchNorm2d(a), nn.Conv2d(a, b, 3, stride=2, bias=False),
                                                   nn.BatchNorm2d(b), nn.Linear(b, 10))
    small.load_state_dict({k: by_hand(k, v, kept) for k,v in snap['w'].items()})
    hand = learner(small, opt_func=OPTS[kind], wd=.1)
    hand.create_opt()
    ps = dict(small.named_parameters())
    for (n,i,k),v in snap['m'].items():
        target = hand.opt.state if i == 0 else hand.opt.opt.state
        target[ps[n]][k] = by_hand(n, v, kept) if isinstance(v, torch.Tensor) and v.numel() > 1 else v
    fit(hand, 1, 1e-3)
    assert same(state(hand.model), state(learn.model))

def test_groups_learning_rates_and_frozen_layers_stay():
    def split(m): return [[*m[:3].parameters()], [*m[3:].parameters()]]
    learn = learner(splitter=split)
    learn.freeze()
    first,seen = state(learn.model),[]
    fit(learn, 3, slice(1e-4, 1e-2), cbs=[PruneCallback(.5), At(23, lambda l: seen.append([h['lr'] for h in l.opt.hypers]))])
    m,kept = learn.model,learn.plans[0].kept
    assert seen == [pytest.approx([1e-4, 1e-2])] and learn.opt.frozen_idx == 1
    assert [[id(p) for p in g] for g in learn.opt.param_lists] == [[id(p) for p in g] for g in split(m)]
    assert torch.equal(m[0].weight, by_hand('0.weight', first['0.weight'], kept)) and not m[0].weight.requires_grad
    assert m[1].weight.requires_grad        # fastai trains norms of frozen layers
    learn.unfreeze()
    w = m[0].weight.detach().clone()
    fit(learn, 1, 1e-2)
    assert m[0].weight.requires_grad and not torch.equal(m[0].weight, w)

def test_frozen_parameters_that_the_optimizer_never_had_are_left_out():
    net = cnn()
    net[0].requires_grad_(False)
    learn = fit(learner(net), 2, cbs=PruneCallback(.5))
    assert len(learn.model[0].weight) < 8 and not learn.model[0].weight.requires_grad
    assert trained(learn) == {id(p) for p in learn.model.parameters() if p.requires_grad}

def test_parameters_of_the_loss_stay_in_the_optimizer():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
        def forward(self, x, y): return nn.functional.cross_entropy(x*self.scale, y)
    loss = Loss()
    learn = Learner(digits(), cnn(), loss_func=loss, splitter=lambda m: [[*m.parameters()], [loss.scale]])
    fit(learn, 2, 1e-2, cbs=PruneCallback(.5))
    assert trained(learn) == live(learn) | {id(loss.scale)} and loss.scale != 1

def test_an_optimizer_whose_memory_has_another_shape_is_refused_and_left_as_it_is():
    net,x = cnn(),torch.rand(4, 1, 8, 8)
    groups,opt = find_groups(net, x),Adam([*net.parameters()], lr=.1)
    net(x).sum().backward()
    opt.step()
    opt.state[net[0].weight]['history'] = torch.zeros(5)
    was,kept = {id(p): dict(s) for p,s in opt.state.items()},{'0': [0, 1]}
    with pytest.raises(ValueError, match=r"'history' of the optimizer is \(5,\) for a parameter of \(8, 1, 3, 3\)"):
        carry_over(opt, net, slice_units(net, groups, kept), kept_entries(net, groups, kept))
    assert {id(p): dict(s) for p,s in opt.state.items()} == was and [*opt.param_lists[0]] == [*net.parameters()] and net[0].weight.grad is not None

def test_factored_state_is_cut_along_its_own_dimension():
    net,x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)),torch.rand(4, 5)
    groups,opt = find_groups(net, x),OptimWrapper([*net.parameters()], opt=torch.optim.Adafactor)
    for _ in range(2):
        net(x).square().sum().backward()
        opt.step()
    old,kept = {id(p): dict(s) for p,s in opt.opt.state.items()},[0, 2, 5]
    small = slice_units(net, groups, {'0': kept})
    carry_over(opt, net, small, kept_entries(net, groups, {'0': kept}))
    row,col = (opt.opt.state[small[0].weight][k] for k in ('row_var', 'col_var'))
    assert torch.equal(row, old[id(net[0].weight)]['row_var'][kept]) and torch.equal(col, old[id(net[0].weight)]['col_var'])
    small(x).square().sum().backward()
    opt.step()

# Along with other callbacks

class OnCpu(MixedPrecision):
    "Mixed precision with scaled gradients that needs no GPU"
    def before_fit(self):
        super().before_fit()
        self.autocast,self.learn.scaler = torch.autocast('cpu', dtype=torch.bfloat16),torch.amp.GradScaler('cpu', init_scale=2.**10)

@pytest.mark.parametrize('mixed', [MixedPrecision, OnCpu])
def test_mixed_precision_and_accumulation(mixed):
    learn,dtypes = learner(metrics=accuracy),set()
    cbs = [mixed(), GradientAccumulation(3*BS), GradientClip(1.), PruneCallback(.5, every=4), At(9, lambda l: dtypes.update({p.dtype for p in l.model.parameters()}), 20)]
    fit(learn, 4, 1e-2, one_cycle=True, cbs=cbs)
    assert np.isfinite(learn.recorder.losses).all() and learn.recorder.losses[-1] < learn.recorder.losses[0]
    assert dtypes == {torch.float32} and live(learn) == trained(learn) and learn.plans[0].macs_after <= .5*learn.plans[0].macs

def test_gradients_in_the_middle_of_an_accumulation_are_sliced():
    learn,grads = learner(),{}
    def look(k): return lambda l: grads.update({k: {n: p.grad.clone() for n,p in l.model.named_parameters()}})
    fit(learn, 1, cbs=[GradientAccumulation(100*BS), PruneCallback(.5, every=5, start=.5), At(5, look('before')), At(5, look('after'), 5)])
    kept = learn.plans[0].kept
    for n,g in grads['before'].items(): assert torch.equal(by_hand(n, g, kept), grads['after'][n]) and g.abs().sum() > 0
    assert all(p.grad is None for p in learn._dense.model.parameters())

def test_the_best_model_is_looked_for_anew_after_each_step(tmp_path):
    falling = iter(range(100, 0, -1))
    def worse(x, y): return next(falling)
    learn,cb = learner(path=tmp_path, metrics=worse),SaveModelCallback(monitor='worse', comp=np.greater)
    fit(learn, 4, 1e-2, cbs=[PruneCallback(.5), cb])       # steps before epochs 1 to 3
    sd = torch.load(tmp_path/'models'/'model.pth')
    assert {k: v.shape for k,v in sd.items()} == {k: v.shape for k,v in learn.model.state_dict().items()} and same(sd, state(learn.model))

def test_a_checkpoint_of_another_width_is_refused(tmp_path):
    learn = learner(path=tmp_path)
    fit(learn, 3, 1e-2, cbs=[PruneCallback(.5), SaveModelCallback(every_epoch=True, with_opt=True)])
    was,opt = state(learn.model),learn.opt
    for k in 0,1:
        with pytest.raises(ValueError, match=r"model_\d' holds a model of other widths \('\d.weight' is \d×\d×3×3 there and \d×\d×3×3 here\). Nothing was loaded"):
            learn.load(f'model_{k}')
    assert same(was, state(learn.model)) and learn.opt is opt
    learn.load('model_2')

def test_a_fit_is_resumed(tmp_path):
    def cbs(): return [PruneCallback(.4, fname='plan'), SaveModelCallback(every_epoch=True, with_opt=True)]
    whole = fit(learner(path=tmp_path/'whole'), 5, 1e-2, one_cycle=True, cbs=cbs())
    learn = learner(path=tmp_path/'cut')
    def stop(l): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(learn, 5, 1e-2, one_cycle=True, cbs=[*cbs(), At(26, stop, 5)])
    again,models = learner(cnn(7), path=tmp_path/'cut'),tmp_path/'cut'/'models'
    assert not (models/'plan_0.json').exists()      # nothing was gone then
    plan = PruningPlan.load(models/'plan_2.json')
    again.prune(plan=plan)
    again.load('model_2', with_opt=True, weights_only=False)
    fit(again, 5, 1e-2, one_cycle=True, cbs=cbs(), start_epoch=3)
    assert same(state(again.model), state(whole.model)) and again.plans[0].kept == whole.plans[0].kept and len(again.plans) == 1
    assert (models/'plan_4.json').read_text() == (tmp_path/'whole'/'models'/'plan_4.json').read_text()

def test_a_second_fit_goes_on_from_the_first():
    learn,cb = learner(),PruneCallback(.5)
    fit(learn, 2, cbs=cb)
    n,plan = live(learn),learn.plans[0]
    fit(learn, 2, cbs=cb)
    assert live(learn) == n and cb.steps == [] and learn.plans == [plan]
    fit(learn, 2, cbs=PruneCallback(.3))
    assert len(learn.plans) == 1 and .15 < learn.plans[0].macs_after/plan.macs <= .3 and learn.plans[0].macs == plan.macs
    assert all({*learn.plans[0].kept[n]} <= {*plan.kept[n]} for n in plan.kept)
    x = torch.zeros(1, 1, 8, 8)
    assert macs(learn.model, x) <= .3*macs(learn._dense.model, x)

def test_lr_find_validate_and_get_preds_change_nothing(tmp_path):
    learn = learner(path=tmp_path, cbs=PruneCallback(.5, fname='plan'))
    was = state(learn.model)
    with quiet(learn):
        learn.lr_find(num_it=20, show_plot=False)
        learn.validate()
        learn.get_preds()
    assert same(was, state(learn.model)) and not learn.plans and not [*(tmp_path/'models').glob('*.json')]
    inside = At(10, lambda l: (l.get_preds(inner=False), l.validate()))
    class Between(Callback):
        def after_epoch(self):
            if self.learn.pruning.steps and not hasattr(self.learn, 'seen'):
                self.learn.seen = True
                self.learn.get_preds()
    fit(learn, 4, cbs=Between())
    assert learn.seen and learn.plans[0].macs_after <= .5*learn.plans[0].macs and len(learn.pruning.steps) == 3

def test_a_budget_of_all_changes_nothing():
    a,b = learner(),learner()
    torch.manual_seed(3)
    fit(a, 2, 1e-2, one_cycle=True)
    ra = torch.rand(3)
    torch.manual_seed(3)
    fit(b, 2, 1e-2, one_cycle=True, cbs=PruneCallback(1., every=3, score='taylor'))
    assert same(state(a.model), state(b.model)) and torch.equal(ra, torch.rand(3)) and not b.plans

def test_with_distillation():
    teacher = fit(learner(), 3, 1e-2).model
    learn = learner(deepcopy(teacher))
    fit(learn, 3, 1e-3, cbs=[SelfDistillation(teacher, features=['8']), PruneCallback(.6)])
    assert learn.plans[0].macs_after <= .6*learn.plans[0].macs and not learn.model[8]._forward_hooks and not teacher[8]._forward_hooks

# Afterwards

def test_back_to_the_dense_model_and_saved(tmp_path):
    learn,was = learner(),{}
    fit(learn, 3, 1e-2, cbs=[PruneCallback(.5), At(8, lambda l: was.update(state(l.model), model=l.model))])
    dense = was.pop('model')
    x = torch.rand(5, 1, 8, 8)
    want = learn.model.eval()(x)
    learn.save_compressed(tmp_path/'small')
    assert torch.equal(load_compressed(tmp_path/'small', cnn).eval()(x), want)
    plan = PruningPlan.from_json(learn.plans[0].to_json())
    assert [*plan.apply(cnn()).state_dict()] == [*learn.model.state_dict()]
    assert all(a.shape == b.shape for a,b in zip(plan.skeleton(cnn()).state_dict().values(), learn.model.state_dict().values()))
    learn.uncompress()
    assert learn.model is dense and same(was, state(dense)) and learn.plans == [] and learn.opt is None
    fit(learn, 1, 1e-2)
    assert live(learn) == trained(learn)

def test_an_exported_learner_works(tmp_path):
    from fasterai.core.digits import digits_dls
    net = cnn()
    net[0] = nn.Conv2d(3, 8, 3, padding=1)
    learn = fit(Learner(digits_dls(8, n=200), net, path=tmp_path, cbs=PruneCallback(.5)), 2)
    want = learn.model.eval()(x := torch.rand(2, 3, 8, 8))
    learn.export('e.pkl')
    other = load_learner(tmp_path/'e.pkl')
    assert torch.equal(other.model.eval()(x), want) and other.plans[0].kept == learn.plans[0].kept

# Heads, and layers that share dimensions

class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp,self.attn,self.head = nn.Linear(8, 16),nn.MultiheadAttention(16, 4, batch_first=True),nn.Linear(16, 10)
        self.ff = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 16))
    def forward(self, x):
        x = self.inp(x[:, 0])
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.head((x + self.ff(x)).mean(1))

def test_heads_go_one_after_the_other():
    torch.manual_seed(0)
    learn,heads = learner(Attends()),[]
    class Watch(Callback):
        def after_epoch(self): heads.append(self.model.attn.num_heads)
    fit(learn, 5, 1e-2, cbs=[PruneCallback(.4, cost='params', schedule=SchedLin(1., .4)), Watch()])
    plan = learn.plans[0]
    assert heads[0] == 4 and heads == sorted(heads, reverse=True) and heads[-1] < 4
    a = learn.model.attn
    assert a.num_heads == len(plan.kept['attn.in_proj_weight']) == a.in_proj_weight.shape[0]//3//a.head_dim
    assert [v.shape for v in plan.apply(Attends()).state_dict().values()] == [v.shape for v in learn.model.state_dict().values()]

@pytest.mark.parametrize('keeps', [{'0': [0, 2, 5], '3': [1, 2]}, {'3': [0, 5]}])
def test_narrowed_groups_are_those_of_the_small_model(keeps):
    net,x = cnn(),torch.rand(2, 1, 8, 8)
    groups = find_groups(net, x)
    small = slice_units(net, groups, keeps)
    def shown(gs): return [(g.name, g.units, g.kind, [(o.layer, o.side, o.index) for o in g.members]) for g in gs if not g.reason]
    assert shown(narrowed(groups, keeps)) == shown(find_groups(small, x))

# Errors

@pytest.mark.parametrize('kw,text', [
    (dict(budget=50), r'budget must be in \(0, 1\], got 50'), (dict(budget=0), r'got 0\.'), (dict(cost='flops'), "cost must be 'macs'"),
    (dict(score='l1'), "score must be 'obs'"), (dict(round_to=0), 'round_to must be an int of at least 1'),
    (dict(start=-.1), r'start must be in \[0, 1\], a share of the training, got -0.1'), (dict(end=5), r'end must be in \[0, 1\], .*got 5\.'),
    (dict(start=.9, end=.5), 'start must not be after end, got start=0.9, end=0.5'), (dict(every=0), "every must be 'epoch' or a number of batches of at least 1, got 0"),
    (dict(every='batch'), "got 'batch'"), (dict(every=True), 'got True'), (dict(schedule=SchedCos(1., .3)), r'ends at 0.3, the budget is 0.5. Pass .* SchedCos\(1., 0.5\)')])
def test_wrong_arguments(kw, text):
    with pytest.raises(ValueError, match=text): PruneCallback(**kw)

def test_a_schedule_is_a_function():
    with pytest.raises(TypeError, match=r'schedule must be a function of the progress from 0 to 1, as SchedCos\(1., 0.5\), got 0.7'): PruneCallback(schedule=.7)

@pytest.mark.parametrize('kw,text', [
    (dict(exclude='convs'), "no layer matches exclude='convs'"), (dict(layers='8'), 'nothing to prune'), (dict(min_keep=8), 'budget=0.5 cannot be reached|nothing to prune'),
    (dict(start=.3, end=.4), r'no step falls between start=0.3 and end=0.4 of this fit: it has 1 epochs of 8 batches')])
def test_what_cannot_be_done_is_said_before_training(kw, text):
    learn = learner()
    was = state(learn.model)
    with pytest.raises(ValueError, match=text): fit(learn, 1, cbs=PruneCallback(**kw))
    assert same(was, state(learn.model)) and not learn.plans

def test_a_schedule_out_of_range_is_said():
    with pytest.raises(ValueError, match='the schedule gives 1.5 at progress 0.50: the share that stays must be in'):
        fit(learner(), 4, cbs=PruneCallback(.5, schedule=lambda t: .5 if t == 1 else 1. + t, every=12))

def test_a_model_that_diverged_or_was_replaced_is_noticed():
    def spoil(l): l.model[0].weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="'0.weight' has values that are NaN or infinite"): fit(learner(), 2, cbs=[PruneCallback(.5), At(8, spoil)])
    def swap(l): l.model = deepcopy(l.model)
    with pytest.raises(RuntimeError, match='something else replaced the model in this fit'): fit(learner(), 2, cbs=[PruneCallback(.5), At(8, swap)])

def test_a_step_that_fails_leaves_the_learner_as_it_was():
    learn = learner()
    def spoil(l): l.opt.state[l.model[0].weight]['history'] = torch.zeros(5)
    with pytest.raises(ValueError, match="'history' of the optimizer"): fit(learn, 2, cbs=[PruneCallback(.5), At(8, spoil)])
    assert not learn.plans and live(learn) == trained(learn) and learn.model[0].out_channels == 8
    del learn.opt.state[learn.model[0].weight]['history']
    fit(learn, 2, cbs=PruneCallback(.5))
    assert learn.plans

@pytest.mark.slow
@pytest.mark.parametrize('arch', ['resnet18', 'xresnet18'])
def test_residual_networks_of_fastai(arch):
    from fastai.vision.all import vision_learner, models
    from fastai.vision.models.xresnet import xresnet18
    from fasterai.core.digits import digits_dls
    dls = digits_dls(32)
    if arch == 'resnet18': learn = vision_learner(dls, models.resnet18, pretrained=False, metrics=accuracy)
    else: learn = Learner(dls, xresnet18(n_out=10), metrics=accuracy)
    learn.unfreeze()
    n = len(learn.opt.param_lists)
    fit(learn, 4, 3e-3, one_cycle=True, cbs=PruneCallback(.5))
    assert live(learn) == trained(learn) and len(learn.opt.param_lists) == n
    assert learn.plans[0].macs_after <= .5*learn.plans[0].macs and learn.final_record[-1] > .85

@pytest.mark.slow
def test_a_vision_transformer():
    timm = pytest.importorskip('timm')
    net = timm.models.VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=24, depth=2, num_heads=4)
    learn = fit(learner(net), 5, 1e-3, cbs=PruneCallback(.4, every=4))
    assert [b.attn.num_heads*b.attn.head_dim*3 for b in learn.model.blocks] == [b.attn.qkv.out_features for b in learn.model.blocks]
    assert live(learn) == trained(learn) and count_macs(learn.model, torch.zeros(2, 1, 8, 8)) <= .4*learn.plans[0].macs

# Several processes

PROCESSES = '''
    sys.path.insert(0, %r)
    from test_prune_training import At, Callback, PruneCallback, cnn, fit, learner, macs
    rank,size = setup()
    class Average(Callback):
        "Gradients of all processes, as without a wrapper"
        run_valid = False
        def before_step(self):
            for p in self.model.parameters(): p.grad.copy_(summed(p.grad)/size)
    def halves(learn):
        learn.dls.train.dataset = [o for i,o in enumerate(learn.dls.train.dataset) if i %% size == rank]
        learn.dls.train.items = learn.dls.train.dataset
        learn.dls.train.n = len(learn.dls.train.dataset)
        return learn
''' % str(Path(__file__).parent)

@pytest.mark.slow
@pytest.mark.parametrize('score', ['magnitude', 'taylor', 'random'])
def test_two_processes_remove_the_same_units(tmp_path, score):
    """Each trains on its half of the data; gradients are averaged"""
    res = run(PROCESSES + f'''
    learn = fit(halves(learner()), 3, 1e-2, cbs=[Average(), PruneCallback(.5, score={score!r})])
    torch.save(dict(kept=learn.plans[0].kept, state=[p.detach() for p in learn.model.parameters()], n=len(learn.dls.train)), out/f'{{rank}}.pt')
    ''', tmp_path, 2)
    assert [r[0] for r in res] == [0, 0], res
    a,b = (torch.load(tmp_path/f'{r}.pt') for r in (0, 1))
    assert a['kept'] == b['kept'] and a['kept'] and a['n'] == b['n'] == 4
    assert all(torch.equal(p, q) for p,q in zip(a['state'], b['state']))

@pytest.mark.slow
@pytest.mark.parametrize('what,text', [
    ('learn = learner(cnn(rank))', 'the processes would remove different units, since their models differ'),
    ("learn = learner(cbs=At(8, lambda l: l.model[0].weight.data.fill_(float('nan') if rank else 0.)))", "'0.weight' has values that are NaN or infinite"),
    ('learn = learner(); learn.distributed_trainer = None', 'cannot exchange a model wrapped for several devices')])
def test_processes_that_differ_all_end_with_an_error(tmp_path, what, text):
    res = run(PROCESSES + f'''
    {what}
    fit(learn, 2, cbs=PruneCallback(.5))
    ''', tmp_path, 2)
    assert all(r[0] and text in r[1] for r in res), res
