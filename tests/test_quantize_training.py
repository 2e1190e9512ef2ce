"bit_find measures what it promises, and QuantizeTraining trains the weights that it packs"
import copy, io, pickle, random
from contextlib import contextmanager
import pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.callback import schedule    # learn.lr_find, fit_one_cycle
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import AvgMetric, Learner, load_learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn
from fasterai.core.distill import SelfDistillation
from fasterai.prune import learner as _     # learn.prune
from fasterai.quantize import learner as _  # learn.bit_find
from fasterai.quantize.formats import Half, Int, Pair
from fasterai.quantize.base import QuantLayer, rounded_of
from fasterai.quantize.layers import QuantConv, QuantEmbedding, QuantLinear
from fasterai.quantize.policies import ByteBudget
from fasterai.quantize.quantizer import Quantizer
from fasterai.quantize.search import bit_find
from fasterai.quantize.training import QuantizeTraining

pytestmark = pytest.mark.filterwarnings('ignore')      # mixed precision without a GPU, saved files

def mlp(hidden=64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, hidden), nn.ReLU(), nn.Linear(hidden, 4))

def dls_of(n=256, shuffle=False):
    g = torch.Generator().manual_seed(0)
    centers,y = torch.randn(4, 32, generator=g),torch.randint(4, (n,), generator=g)
    items = list(zip(centers[y] + 1.5*torch.randn(n, 32, generator=g), y))
    return DataLoaders(DataLoader(items[:n//2], bs=32, shuffle=shuffle, num_workers=0), DataLoader(items[n//2:], bs=64, num_workers=0))

def learner(model=None, **kw): return Learner(dls_of(), mlp() if model is None else model, loss_func=F.cross_entropy, metrics=accuracy, **kw)

@contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging(): yield learn

def fit(learn, *args, **kw):
    with quiet(learn): learn.fit(*args, **kw)
    return learn

def levels(m):
    "Most values in a group of weights"
    q = rounded_of(m)
    return max(len(w.unique()) for w in (q.values.flatten(0, 1)[:,:q.codes.shape[-1]]))

# ------------------------------------------------------------------ bit_find

def test_bit_find():
    learn = fit(learner(), 3, 1e-2)
    model,was = learn.model,copy.deepcopy(learn.model.state_dict())
    found = learn.bit_find(.01, show_plot=False)
    assert learn.model is model and all(torch.equal(v, was[k]) for k,v in model.state_dict().items())
    with quiet(learn):
        dense = learn.validate()[1]
        for o in found.frame.itertuples(): assert o.ok == (o.metric >= dense - .01 - 1e-9)
        learn.quantize(plan=found)
        assert learn.validate()[1] == pytest.approx(found.value) and found.value >= dense - .01
    smaller = found.frame[found.frame.bytes < found.plan.bytes_after]
    assert not smaller.ok.any() and sum(t.nbytes for t in learn.model.state_dict().values()) == found.plan.bytes_after

def test_bit_find_knows_single_formats_and_half():
    m,x = mlp(),torch.randn(200, 32)
    y = m(x).detach()
    def similar(q): return F.cosine_similarity(q(x), y).mean().item()
    found = bit_find(m, similar, x, max_drop=.05, higher_is_better=True, formats=(Half(), 8, 4, 3))
    f = found.frame.set_index('formats')
    assert {'bf16', 'int8'} <= {*f.index} and f.loc['bf16', 'share'] < .52 and f.loc['int8', 'metric'] > .999
    for name,q in (('int8', 8), ('int4 g64', 4)):
        assert f.loc[name, 'metric'] == pytest.approx(similar(Quantizer(q).quantize(m, x)), abs=1e-6)

def test_bit_find_says_what_it_cannot():
    m,x = mlp(),torch.randn(50, 32)
    none = bit_find(m, lambda q: float(q is m), x, max_drop=0., higher_is_better=True, metric='same', refine=0)
    assert none.plan is None and none.title == 'no budget keeps same within 0 of 1'
    with pytest.raises(ValueError, match='allow a larger max_drop'): learner().quantize(plan=none)
    with pytest.raises(ValueError, match='must not be negative'): bit_find(m, len, x, max_drop=-1, higher_is_better=True)
    with pytest.raises(ValueError, match='nothing to quantize; 0: already int4'):
        bit_find(Quantizer(4).quantize(mlp()), len, x, higher_is_better=True)
    class Nested(Callback):
        def after_epoch(self): self.learn.bit_find()
    with pytest.raises(RuntimeError, match='call it afterwards'): fit(learner(), 1, cbs=Nested())

# ------------------------------------------------------------------ QuantizeTraining

def test_the_step_is_that_of_straight_through_training():
    "Against a plain loop: gradients at the rounded weights, the step on the weights themselves"
    learn,x_y = learner(mlp(16)),[*dls_of().train]
    ref = copy.deepcopy(learn.model)
    with torch.no_grad(): grids = [rounded_of(q) for q in Quantizer(3).quantize(ref) if isinstance(q, QuantLayer)]
    def rounded(W, r):
        n,s,z = W.shape[1],r.scales[0].float(),r.zeros[0].float()
        s,z = (t.repeat_interleave(r.codes.shape[-1], 1)[:,:n] for t in (s, z))
        return (torch.clamp((W/s).round() + z, 0, 7) - z)*s
    for x,y in x_y:
        low = copy.deepcopy(ref)
        for l,r in zip((low[0], low[2]), grids): l.weight.data = rounded(l.weight.data, r)
        F.cross_entropy(low(x), y).backward()
        with torch.no_grad(): [p.sub_(.1*q.grad) for p,q in zip(ref.parameters(), low.parameters())]
    from fastai.optimizer import SGD
    learn.opt_func = SGD
    fit(learn, 1, .1, wd=0., cbs=QuantizeTraining(3))
    got = learn.uncompress().model
    for a,b in zip(got.parameters(), ref.parameters()): assert torch.allclose(a, b, atol=1e-5)

def test_same_parameters_are_trained_and_packed():
    learn,seen = learner(),[]
    model,params = learn.model,{id(p) for p in learn.model.parameters()}
    class Look(Callback):
        order = 100
        def after_batch(self):
            if self.training: seen.append({id(p) for g in self.opt.param_lists for p in g} == params and self.model is model)
    fit(learn, 2, 1e-2, cbs=[QuantizeTraining(2), Look()])
    assert all(seen) and len(seen) == 8 and type(learn.model[0]) is QuantLinear and levels(learn.model[0]) <= 4 and levels(learn.model[2]) <= 4
    assert learn.plans[0]['0'].rounding == 'trained' and learn.uncompress().model is model
    with quiet(learn): learn.lr_find(num_it=10, show_plot=False)

def test_it_is_better_than_rounding_afterwards():
    learn = fit(learner(mlp(8)), 6, 1e-2)
    with quiet(learn):
        after = learner(Quantizer(2, rounding='nearest').quantize(learn.model, learn.dls))
        with quiet(after): rounded = after.validate()[0]
        learn.fit_one_cycle(4, 5e-3, cbs=QuantizeTraining(2))
        assert learn.validate()[0] < rounded

@pytest.mark.parametrize('cbs', (lambda: [SaveModelCallback()], lambda: [EarlyStoppingCallback(patience=1, min_delta=9.)],
    lambda: [GradientAccumulation(64)], lambda: [SaveModelCallback(every_epoch=True, with_opt=True)]), ids='save stop accumulate every'.split())
def test_beside_other_callbacks(cbs, tmp_path):
    learn,seen = learner(path=tmp_path),[]
    class Look(Callback):
        order = 62.5
        def after_epoch(self): seen.append(copy.deepcopy(self.model))
    cbs = cbs()
    fit(learn, 3, 1e-2, cbs=[QuantizeTraining(3), *cbs, Look()])
    assert len(learn.plans) == 1 and type(learn.model[0]) is QuantLinear
    assert all(type(m[0]) is nn.Linear and len(m[0].weight[0].unique()) == 32 for m in seen)       # what is saved is not rounded
    assert len(seen) == (2 if isinstance(cbs[0], EarlyStoppingCallback) else 3)

def test_the_best_epoch_is_packed(tmp_path):
    learn,losses = learner(path=tmp_path),[]
    class Worse(Callback):
        order = 55
        def before_epoch(self):
            if self.epoch == 2: self.opt.set_hyper('lr', 10.)
        def after_epoch(self): losses.append(self.recorder.log[2])
    fit(learn, 3, 1e-2, cbs=[QuantizeTraining(3), SaveModelCallback(), Worse()])
    with quiet(learn): assert learn.validate()[0] == pytest.approx(min(losses), abs=1e-5) and losses[2] > 2*min(losses)

def test_what_was_validated_is_what_is_packed():
    learn,loss = learner(),[]
    class Look(Callback):
        order = 55
        def after_epoch(self): loss.append(self.recorder.log[2])
    fit(learn, 2, 1e-2, cbs=[QuantizeTraining({'0': 2, '2': Int(8)}), Look()])
    with quiet(learn): assert learn.validate()[0] == pytest.approx(loss[-1], abs=1e-6)
    assert [str(o.format) for o in learn.plans[0].layers] == ['int2 g64', 'int8']

def test_mixed_precision():
    learn = learner().to_bf16()
    fit(learn, 1, 1e-2, cbs=QuantizeTraining(4))
    assert type(learn.model[0]) is QuantLinear and learn.model[0]._dtype is torch.float32

def test_validation_inside_of_the_fit_sees_the_rounded_model():
    learn,got = learner(),[]
    class Look(Callback):
        def after_train(self):
            got.append(self.learn.get_preds()[0])
            got.append(len(self.model[0].weight[0].unique()))
    fit(learn, 1, 1e-2, cbs=[QuantizeTraining(2), Look()])
    with quiet(learn): preds = learn.get_preds()[0]
    assert got[1] == 32 and torch.allclose(got[0], preds, atol=1e-5)

@pytest.mark.parametrize('event', 'after_pred after_loss after_step after_epoch'.split())
@pytest.mark.parametrize('own', (True, False))
def test_errors_leave_nothing_behind(event, own):
    class Stop(Callback): pass
    def stop(self): raise KeyboardInterrupt
    setattr(Stop, event, stop)
    cb = QuantizeTraining(2)
    learn = learner(**({} if own else dict(cbs=cb)))
    model = learn.model
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, 0., cbs=[Stop()] + [cb]*own)
    if not own: learn.remove_cb(cb)
    for p,q in zip(model.parameters(), mlp().parameters()): assert torch.equal(p, q)
    assert learn.model is model and not learn.plans and type(model[0]) is nn.Linear
    fit(learn, 1, cbs=QuantizeTraining(2))
    assert len(learn.plans) == 1

def test_a_second_fit_goes_on():
    learn = fit(learner(), 2, 1e-2, cbs=QuantizeTraining(3))
    first,scales = learn.plans[0],learn.model[0].scales.detach().clone()
    with quiet(learn): before = learn.get_preds()[0]
    fit(learn, 1, 0., cbs=QuantizeTraining(3))
    with quiet(learn): assert torch.allclose(learn.get_preds()[0], before, atol=1e-5)
    assert len(learn.plans) == 1 and torch.equal(learn.model[0].scales, scales) and learn.plans[0].params == first.params
    fit(learn, 1, 1e-2, cbs=QuantizeTraining(2))
    assert str(learn.plans[0]['0'].format) == 'int2 g64' and type(learn.uncompress().model[0]) is nn.Linear

def test_what_cannot_be_quantized():
    with pytest.raises(ValueError, match='no layer can be quantized: the model has none'):
        fit(Learner(dls_of(), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(32)), loss_func=F.cross_entropy), 1, cbs=QuantizeTraining(4))
    with pytest.raises(ValueError, match="no layer matches exclude='fc'"): fit(learner(), 1, cbs=QuantizeTraining(4, exclude='fc'))

class Branches(nn.Module):
    "Control flow that depends on values, which fx cannot trace; a convolution, a table, a layer whose weight is read"
    def __init__(self):
        super().__init__()
        self.emb,self.conv,self.fc,self.out = nn.Embedding(10, 32),nn.Conv1d(1, 4, 3, groups=1),nn.Linear(120, 32),nn.Linear(32, 4)
    def forward(self, x):
        h = self.fc(self.conv(x[:,None]).flatten(1)).relu()
        if h.mean() > 0: h = h + self.emb(h.argmax(-1) % 10)
        return F.linear(h, self.out.weight, self.out.bias)

def test_models_that_cannot_be_traced():
    from torch.fx import symbolic_trace
    from torch.fx.proxy import TraceError
    torch.manual_seed(0)
    m = Branches()
    with pytest.raises(TraceError): symbolic_trace(m)
    learn = fit(learner(m), 2, 1e-2, cbs=QuantizeTraining(3, embeddings=True))
    kinds = [type(getattr(learn.model, n)) for n in ('emb', 'conv', 'fc', 'out')]
    assert kinds == [QuantEmbedding, QuantConv, QuantLinear, QuantLinear] and levels(learn.model.fc) <= 8
    with quiet(learn): assert learn.validate()[0] == learn.validate()[0]

def test_budget():
    learn = fit(learner(), 1, 1e-2, cbs=QuantizeTraining(ByteBudget(.15)))
    assert sum(o.after for o in learn.plans[0].layers) <= .15*sum(o.before for o in learn.plans[0].layers)

def test_parameter_groups_and_frozen_layers():
    learn = learner(splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())])
    learn.freeze()
    was = learn.model[0].weight.detach().clone()
    fit(learn, 1, 1e-2, cbs=QuantizeTraining(3))
    assert not learn.model[0].gain.requires_grad and learn.model[2].gain.requires_grad and len(learn.opt.param_lists) == 2
    assert torch.equal(learn.uncompress().model[0].weight, was)

def test_with_distillation():
    "The best state is one of the rounded model, not the dense one that it began with"
    random.seed(0)
    learn = fit(learner(), 3, 1e-2)
    teacher = copy.deepcopy(learn.model)
    fit(learn, 2, 1e-3, cbs=[QuantizeTraining(2), SelfDistillation(teacher)])
    assert type(learn.model[0]) is QuantLinear and levels(learn.model[0]) <= 4
    assert not torch.equal(learn.uncompress().model[0].weight, teacher[0].weight)

def test_export_and_store(tmp_path):
    from fasterai.core.digits import digits_dls
    from fasterai.core.store import load_compressed
    def net(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 10))
    learn = Learner(digits_dls(16, n=160, bs=32), net(), loss_func=F.cross_entropy, path=tmp_path, cbs=QuantizeTraining(4))
    fit(learn, 1, 1e-2)
    with quiet(learn):
        x,y = learn.dls.valid.one_batch()[0],learn.get_preds()[0]
        learn.export('q.pkl')
        learn.save_compressed(tmp_path/'small')
    for m in (load_learner(tmp_path/'q.pkl').model, load_compressed(tmp_path/'small', net)):
        assert torch.allclose(m.eval()(x), learn.model.eval()(x), atol=1e-5)
    assert torch.allclose(y[:len(x)], learn.model(x), atol=1e-5) and len(learn.plans) == 1

# ------------------------------------------------------------------ training what is packed

@pytest.mark.parametrize('bits', (8, 4))
def test_training_afterwards_does_not_ruin_the_scales(bits):
    "Adam moves each number by about its learning rate: scales of 0.001 did not survive that"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 64, generator=g)
    y = (x @ torch.randn(64, 10, generator=g)).argmax(1)
    items = [*zip(x, y)]
    set_seed(0)
    dls = DataLoaders.from_dsets(items[:800], items[800:], bs=16, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), loss_func=F.cross_entropy, metrics=accuracy)
    with quiet(learn):
        learn.fit_one_cycle(3, 5e-3)
        before = learn.quantize(bits).validate()[1]
        for lr in (1e-3, 1e-2):
            learn.fit_one_cycle(1, lr)
            assert learn.validate()[1] >= before - .01
    assert not (learn.model[0].gain == 1).all()
    again = learn.plans[-1].skeleton(learn.uncompress().model)
    assert again[0].gain.eq(1).all()

def test_trained_scales_are_stored_as_they_are_used():
    q,x = Quantizer(4, rounding='nearest').quantize(mlp(), None),torch.randn(20, 32)
    with torch.no_grad(): q[0].gain.add_(.3*torch.randn_like(q[0].gain))
    again = Quantizer(4).plan(mlp()).skeleton(mlp())
    again.load_state_dict(q.state_dict())
    assert torch.equal(again(x), q(x)) and 'gain' not in ''.join(q.state_dict()) and again[0].gain.eq(1).all()
    assert q.state_dict()['0.scales'].dtype is torch.float16
    again.load_state_dict(q.state_dict(), assign=True)
    assert torch.equal(again(x), q(x)) and torch.equal(copy.deepcopy(q)(x), q(x))
    lost = {k: v for k,v in q.state_dict().items() if k != '0.scales'}
    with pytest.raises(RuntimeError, match='Missing key.*"0.scales"'): again.load_state_dict(lost)

def test_models_pickled_with_scales_as_parameters():
    q,x = Quantizer(4, rounding='nearest').quantize(mlp(), None),torch.randn(20, 32)
    old = copy.deepcopy(q)
    for m in old[::2]:      # as versions before this one held them
        m._parameters['scales'] = nn.Parameter(m._buffers.pop('scales'), False)
        del m._parameters['gain']
    back = pickle.loads(pickle.dumps(old))
    assert torch.equal(back(x), q(x)) and not back[0].gain.requires_grad and back.state_dict().keys() == q.state_dict().keys()

def test_pairs_are_not_trained_in_few_bits():
    with pytest.raises(ValueError, match="'0' would be pair 0.5 int8, which cannot be trained"): fit(learner(), 1, cbs=QuantizeTraining(Pair(.5)))
    learn = learner()
    with quiet(learn): learn.quantize(Pair(.5, 4))
    assert [n for n,p in learn.model.named_parameters()][:3] == ['0.0.gain', '0.1.bias', '0.1.gain']
    x = learn.dls.one_batch()[0]
    before = learn.model(x)
    with pytest.raises(ValueError, match='no layer can be quantized: already int4'): fit(learn, 1, cbs=QuantizeTraining(4))
    assert torch.equal(learn.model(x), before) and len(learn.plans) == 1
