"Networks of torchvision, timm and fastai: as many norms as can be folded, and the same outputs"
import copy, re
import pytest, torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch.utils.data import DataLoader, TensorDataset
from fasterai.misc.all import *
from fold_cases import NETWORKS, norms, outputs, randomize, rel

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]

# fastai casts the output of a Unet to float32
def tol(want): return max(1e-9 if t.dtype == torch.float64 else 1e-5 for t in want)

def test_the_zoo_is_the_one_of_the_promise():
    assert len(NETWORKS) == 30 and sum(o.norms for o in NETWORKS.values()) == 1532 and sum(o.folded for o in NETWORKS.values()) >= 1345

@pytest.mark.parametrize('name', NETWORKS)
def test_network(name):
    real = NETWORKS[name]
    m,args = real.build()
    assert len(norms(m)) == real.norms
    data = (lambda model: model(*args)) if len(args) > 1 else args[0]
    want,state = outputs(m, args),{k: v.clone() for k,v in m.state_dict().items()}
    plan = BN_Folder().plan(m, data)
    small = plan.apply(m)
    assert len(plan.replaced) >= real.folded and len(norms(small)) == real.norms - len(plan.replaced)
    assert rel(outputs(small, args), want) <= tol(want)
    assert all(o.reason and not o.reason.startswith('failed') for o in plan.skipped)
    if len(plan.replaced) == real.folded: assert all(re.search(real.why, o.reason) for o in plan.skipped)
    assert all(torch.equal(v, state[k]) for k,v in m.state_dict().items())
    assert plan.params_after == count_params(small)
    bare = BN_Folder().plan(m, data, check=False)
    assert [(o.name, o.way, o.into) for o in bare.replaced] == [(o.name, o.way, o.into) for o in plan.replaced]
    assert not any(o.training for o in small.modules())

@pytest.mark.parametrize('name', ['tv resnet18', 'timm efficientnet_b0', 'timm levit_128s', 'fastai vision learner'])
def test_without_data(name):
    "The size that timm names, or a usual one"
    m = NETWORKS[name].build()[0].float()
    plan = BN_Folder().plan(m)
    assert len(plan.replaced) == NETWORKS[name].folded

@pytest.mark.parametrize('name', ['tv resnet18', 'tv mobilenet_v3_small'])
def test_bfloat16_error_is_hardly_larger(name):
    "Against the network in float64: cast and folded at most 1.15 of the error of the unfolded one, folded and cast smaller than that"
    errs = []
    for seed in range(3):
        m,(x,) = NETWORKS[name].build()
        randomize(m, seed)
        ref,low,x = outputs(m, [x])[0],copy.deepcopy(m).bfloat16(),x.bfloat16()
        nets = low, BN_Folder().fold(low, x), BN_Folder().fold(m, x.double()).bfloat16()
        errs.append([float((outputs(o, [x])[0].double() - ref).norm()/ref.norm()) for o in nets])
    unfolded,folded,first = torch.tensor(errs).mean(0).tolist()
    assert folded <= 1.15*unfolded and first <= unfolded

@pytest.mark.parametrize('name', ['timm repvgg_a0', 'timm mobileone_s0'])
def test_networks_that_can_merge_their_branches(name):
    "Which folding cannot: the plan says what to call first"
    m,args = NETWORKS[name].build()
    assert 'reparameterize()' in BN_Folder().plan(m, args[0]).note

def test_auxiliary_heads_stay():
    "They run in train mode only, so nothing is known of them"
    m,args = NETWORKS['tv googlenet'].build()
    small = BN_Folder().fold(m, args[0])
    aux = [n for n in norms(small)]
    assert len(aux) == 2 and all(n.startswith('aux') for n in aux)

def test_vision_learner():
    m,(x,) = NETWORKS['fastai vision learner'].build()
    m,x = m.float(),x.float()
    items = TensorDataset(x, torch.arange(len(x)))
    dls = DataLoaders(DataLoader(items, 2), DataLoader(items, 2))
    learn = Learner(dls, m, loss_func=CrossEntropyLossFlat())
    want = outputs(m, [x])
    learn.fold_bn()
    assert len(learn.plans[0].replaced) == 22 and not norms(learn.model)
    assert rel(outputs(learn.model, [x]), want) < 1e-4
    assert learn.uncompress().model is m
