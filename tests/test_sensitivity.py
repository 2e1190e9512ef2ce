"Gradients reach every layer, whatever the model does to the outputs of its layers"
import pytest, torch
from fastai.torch_core import TensorBase
from fastai.vision.core import TensorImage
from torch import nn
from torchvision.models import vgg11

from fasterai.misc.all import ParamBudget, FC_Decomposer, calibrate


def net(inplace, act=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 20), act(inplace=inplace), nn.Dropout(inplace=inplace), nn.Linear(20, 20), act(inplace=inplace), nn.Linear(20, 5)).eval()


def data(shape):
    torch.manual_seed(1)
    return torch.randn(*shape, 24)


@pytest.mark.parametrize('kind', [torch.Tensor, TensorBase, TensorImage])
@pytest.mark.parametrize('shape', [(40,), (8, 5), (4, 5, 2)], ids=str)
@pytest.mark.parametrize('act', [nn.ReLU, nn.Hardswish, nn.SiLU])
@pytest.mark.parametrize('how', ['full', 'diag'])
def test_activations_in_place_change_nothing(kind, shape, act, how):
    "A layer's output that is a view, or of a class of fastai's, is changed in place by the activation behind it"
    want = calibrate(net(False, act), data(shape), sensitivity=how)
    got = calibrate(net(True, act), data(shape).as_subclass(kind), sensitivity=how)
    assert want.layers.keys() == got.layers.keys() == {'0', '3', '5'}
    for n,o in want.layers.items():
        assert o.sens.abs().max() > 0
        torch.testing.assert_close(got[n].sens, o.sens, rtol=1e-5, atol=0.)


def test_forward_sees_the_class_it_gave():
    class Look(nn.Module):
        def forward(self, x): seen.append(type(x)); return x
    seen = []
    calibrate(nn.Sequential(nn.Linear(24, 6), Look(), nn.Linear(6, 3)), TensorImage(data((10,))), sensitivity='full')
    assert set(seen) == {TensorImage}


def test_budget_of_a_vision_model_is_used():
    "The layers of VGG's classifier, on images of fastai: in-place activations between them"
    torch.manual_seed(0)
    head = vgg11(num_classes=10).classifier
    small = nn.Sequential(nn.Linear(128, 96), *head[1:3], nn.Linear(96, 96), *head[4:6], nn.Linear(96, 10)).eval()
    plan = FC_Decomposer(policy=ParamBudget(0.5, round_to=1)).plan(small, TensorImage(torch.randn(200, 128)))
    used = sum(o.params_after for o in plan.layers)/sum(o.weight_params for o in plan.layers)
    assert 0.45 < used <= 0.5 and all(max(o.spectrum) > 0 for o in plan.layers)
