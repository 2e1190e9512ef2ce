"On a GPU as on the CPU: each method against the dense model, and against what it does on the CPU"
import copy
import pytest, torch
from fastai.callback.fp16 import MixedPrecision
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from torch import nn
from torchvision.models import mobilenet_v3_small, resnet18
from fasterai.all import *

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'),
              pytest.mark.filterwarnings('ignore:.*(no data|loses much|lose much|layers grew):UserWarning')]
GPU = 'cuda'

@pytest.fixture(autouse=True)
def exact():
    "Convolutions in float32, as on the CPU"
    torch.manual_seed(0)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False): yield

# ------------------------------------------------------------------ helpers

def used(m):
    "A network whose norms have seen data"
    m.train()
    with torch.no_grad():
        for _ in range(3): m(torch.randn(16, 3, 32, 32)*2 + 1)
    return m.eval()

def cnn():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 3))

def rel(a, b): return (torch.norm(a.double().cpu() - b.double().cpu())/torch.norm(b.double().cpu())).item()

def images(n=64, seed=1): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))*2 + 1

def batches(device, n=4): return [images(16, seed=i).to(device) for i in range(n)]

@torch.no_grad()
def out(m, x): return m(x.to(next(m.parameters()).device))

def on(device, m): return all(t.device.type == device for t in [*m.parameters(), *m.buffers()])

PLANS = {
    'svd': lambda m, d: FC_Decomposer(.5).plan(m),
    'low rank': lambda m, d: FC_Decomposer(policy=ParamBudget(.5)).plan(m, d),
    'fold': lambda m, d: BN_Folder().plan(m, d),
    'prune': lambda m, d: Pruner(.6).plan(m, d),
    'magnitude': lambda m, d: Pruner(.6, score='magnitude').plan(m, d),
    'int8': lambda m, d: Quantizer(8).plan(m, d),
    'int4': lambda m, d: Quantizer(4).plan(m, d),
    'int8 inputs': lambda m, d: Quantizer(Int(8, activations='dynamic')).plan(m, d),
    'bytes': lambda m, d: Quantizer(policy=ByteBudget(.2)).plan(m, d),
}
METHODS = {k: lambda m, d, f=f: f(m, d).apply(m) for k,f in PLANS.items()}

# ------------------------------------------------------------------ methods

@pytest.mark.parametrize('how', METHODS)
def test_as_on_the_cpu(how):
    torch.manual_seed(0)
    m,x = used(cnn()),images()
    there,before = copy.deepcopy(m).to(GPU),{k: v.clone() for k,v in m.state_dict().items()}
    rng = torch.cuda.get_rng_state()
    here,res = METHODS[how](m, batches('cpu')),METHODS[how](there, batches(GPU))
    assert on(GPU, res) and torch.equal(rng, torch.cuda.get_rng_state())
    assert all(torch.equal(v.cpu(), before[k]) for k,v in there.state_dict().items())
    assert rel(out(res, x), out(here, x)) < (.02 if how == 'int8 inputs' else 2e-3)      # there, inputs keep their float values
    assert rel(out(copy.deepcopy(res).cpu(), x), out(res, x)) < (.02 if how == 'int8 inputs' else 1e-4)

@pytest.mark.parametrize('net', [resnet18, mobilenet_v3_small])
def test_norms_fold(net):
    m = used(net(num_classes=10)).to(GPU)
    plan = BN_Folder().plan(m, images(2).to(GPU))
    assert len(plan.replaced) == sum(isinstance(o, nn.BatchNorm2d) for o in m.modules())
    assert rel(out(plan.apply(m), images()), out(m, images())) < 1e-4

@pytest.mark.parametrize('how', METHODS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(how, dtype):
    m = used(cnn()).to(GPU, dtype)
    x = images().to(dtype)
    res = METHODS[how](m, [b.to(dtype) for b in batches(GPU)])
    assert (got := out(res, x)).dtype == dtype and got.isfinite().all()
    ref = METHODS[how](used(cnn()).to(GPU, dtype).float(), batches(GPU))
    loss = rel(out(ref, x.float()), out(m, x).float())
    assert rel(got, out(m, x)) < 1.5*loss + 8*torch.finfo(dtype).eps

@pytest.mark.parametrize('how', METHODS)
def test_stored_there_loaded_here(how, tmp_path):
    m = used(cnn())
    dev = copy.deepcopy(m).to(GPU)
    plan = PLANS[how](dev, batches(GPU))
    small = plan.apply(dev)
    save_compressed(small, tmp_path/'s', [plan])
    loaded = load_compressed(tmp_path/'s', cnn).eval()
    assert on('cpu', loaded) and rel(out(loaded, images()), out(small, images())) < (.02 if how == 'int8 inputs' else 1e-4)
    assert on(GPU, load_compressed(tmp_path/'s', lambda: cnn().to(GPU)))

# ------------------------------------------------------------------ Learners

def dls():
    torch.manual_seed(0)
    xs,ys = images(96),torch.arange(96) % 3
    for x,y in zip(xs, ys): x[y] += 2.
    items = list(zip(xs, ys))
    return DataLoaders.from_dsets(items, items, bs=16, num_workers=0, device=torch.device(GPU))

def learner(m=None, **kw): return Learner(dls(), m or cnn(), loss_func=nn.CrossEntropyLoss(), metrics=accuracy, **kw)

def quiet(learn, n=2, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-3, **kw)
    return learn

@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('verb', [lambda l: l.decompose(rank_ratio=.5), lambda l: l.fold_bn(), lambda l: l.prune(.6), lambda l: l.quantize(4)],
                         ids=['decompose', 'fold_bn', 'prune', 'quantize'])
def test_learner(verb, half):
    learn = quiet(learner(cbs=[MixedPrecision()] if half else []))
    dense = learn.model
    assert verb(learn) is learn and on(GPU, learn.model)
    quiet(learn)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    loss,acc = learn.validate()
    assert acc > .4
    assert learn.uncompress().model is dense

@pytest.mark.parametrize('half', [False, True])
def test_prune_while_training(half):
    learn = quiet(learner(), 1)
    macs = count_macs(learn.model, images(2).to(GPU))
    quiet(learn, 4, cbs=[PruneCallback(.6), *([MixedPrecision()] if half else [])])
    assert count_macs(learn.model, images(2).to(GPU)) <= .6*macs and on(GPU, learn.model)
    live = {id(p) for p in learn.model.parameters()}
    assert live == {id(p) for g in learn.opt.param_lists for p in g}

def test_searches():
    learn = quiet(learner(), 4)
    with learn.no_bar(), learn.no_logging():
        assert learn.rank_find(max_drop=.5).plan is not None and learn.prune_find(max_drop=.5).plan is not None

# ------------------------------------------------------------------ time and memory

def test_latency():
    "A pair that is faster there is found by measuring there"
    m = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096)).to(GPU)
    table = LatencyTable(4096)
    plan = FC_Decomposer(policy=ParamBudget(.5, cost=table)).plan(m, torch.randn(512, 4096, device=GPU))
    assert {key[-1].type if isinstance(key[-1], torch.device) else key[-1].split(':')[0] for key in table.times} == {'cuda'}
    assert len(plan.replaced) and on(GPU, plan.apply(m))
    res = compare_models(m, plan.apply(m), torch.randn(4096, 4096, device=GPU)).to_frame()
    assert (res.loc['latency (ms)'].iloc[:2] > 0).all() if 'latency (ms)' in res.index else len(res)

@pytest.mark.parametrize('how', ['svd', 'int8'])
def test_memory(how):
    "The result and one layer's workspace above the source"
    m = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(8)]).to(GPU)
    one,_ = 4*2048**2,torch.cuda.synchronize()
    torch.linalg.svdvals(m[0].weight.detach().double())     # the library's own workspace
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    res = METHODS[how](m, None)
    kept = torch.cuda.memory_allocated() - start
    assert torch.cuda.max_memory_allocated() - start < kept + 12*one and on(GPU, res)
