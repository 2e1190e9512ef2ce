"A model, a Learner, data or a plan in the wrong place: one short sentence, never the repr of a model"
import inspect, warnings
from pathlib import Path
import numpy as np, pytest, torch
from fastai.basics import DataLoaders, Learner
from torch import nn
from torch.utils.data import TensorDataset
from transformers import BatchEncoding
from fasterai.core.batches import _short
from fasterai.misc.all import *

class Mine(nn.Linear): pass

torch.manual_seed(0)
X = torch.randn(16, 8)
MODEL = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
SET = TensorDataset(X, X[:,:4])
DLS = DataLoaders.from_dsets(SET, SET, bs=8)
LEARN = Learner(DLS, MODEL, loss_func=nn.MSELoss())
FC = FC_Decomposer(.25)
PLAN = FC.plan(MODEL)
THINGS = dict(model=MODEL, layer=MODEL[0], learner=LEARN, loaders=DLS, loader=DLS.train, decomposer=FC, plan=PLAN, tensor=X, array=X.numpy(),
              statistics=calibrate(MODEL, X), module_class=nn.Linear, policy_class=Energy, list_of_models=[MODEL], text='a'*500)

def error(f, *args, **kw):
    "What `f` raises, checked to be one short line"
    before = {k: v.clone() for k,v in MODEL.state_dict().items()}
    with pytest.raises((TypeError, ValueError)) as e: f(*args, **kw)
    text = str(e.value)
    assert len(text) <= 200 and '\n' not in text and 'in_features=' not in text and 'tensor([' not in text and ' at 0x' not in text
    assert [type(m) for m in MODEL] == [nn.Linear, nn.ReLU, nn.Linear] and all(torch.equal(v, before[k]) for k,v in MODEL.state_dict().items())
    return text

# ------------------------------------------------------------------ the constructor

@pytest.mark.parametrize('arg', ['rank_ratio', 'policy', 'layers', 'exclude', 'types', 'round_to'])
@pytest.mark.parametrize('thing', THINGS)
def test_no_setting_is_any_of_these(arg, thing):
    if arg in ('layers', 'exclude') and thing == 'statistics' or arg == 'types' and thing in ('module_class', 'policy_class'): return   # names, and classes
    def use(): return FC_Decomposer(**{arg: THINGS[thing]}).plan(MODEL)
    if arg in ('layers', 'exclude') and thing == 'text':    # names that match nothing are quoted
        with pytest.raises(ValueError, match='no layer matches'): use()
    else: error(use)

@pytest.mark.parametrize('arg', ['rank_ratio', 'policy'])
@pytest.mark.parametrize('thing,text', [
    ('model', '{} got Sequential. A model goes to the method: FC_Decomposer(0.5).decompose(model).'),
    ('learner', '{} got Learner. With a Learner use learn.decompose(0.5), or FC_Decomposer(0.5).decompose(learn.model, learn.dls).'),
    ('loaders', '{} got DataLoaders. Data go to the method: FC_Decomposer(0.5).decompose(model, data).'),
    ('loader', '{} got TfmdDL. Data go to the method: FC_Decomposer(0.5).decompose(model, data).'),
    ('plan', '{} got DecompositionPlan. A plan needs no FC_Decomposer: plan.apply(model).'),
    ('policy_class', '{} got the class Energy. Pass an instance of the policy, such as Energy(0.5).')])
def test_the_constructor_says_where_it_goes(arg, thing, text):
    assert error(FC_Decomposer, **{arg: THINGS[thing]}) == text.format(arg)

@pytest.mark.parametrize('ratio', ['0.5', True, None, torch.tensor(.5), [.5], b'1', 1+0j])
def test_a_ratio_is_a_number(ratio):
    assert error(FC_Decomposer, ratio).startswith(f'rank_ratio must be a number in (0, 1], got {_short(ratio)}')

@pytest.mark.parametrize('kind', [np.float16, np.float32, np.float64, np.longdouble])
@pytest.mark.parametrize('ratio', [.7, .29, .3])
def test_numpy_floats_are_what_they_are_written_as(kind, ratio):
    for fc in (FC_Decomposer(kind(ratio)), FC_Decomposer(policy=kind(ratio))): assert repr(fc) == repr(FC_Decomposer(ratio))
    m = nn.Linear(4000, 4000, device='meta')
    assert FC_Decomposer(kind(ratio)).plan(m).layers[0].rank == FC_Decomposer(ratio).plan(m).layers[0].rank

@pytest.mark.parametrize('kind', [np.int64, np.int32, np.uint8])
def test_numpy_ints_are_ranks(kind):
    assert [o.rank for o in FC_Decomposer(policy={'0': kind(3), '2': None}).plan(MODEL).layers] == [3, None]
    assert [o.rank for o in FC_Decomposer(policy=kind(2)).plan(MODEL).layers] == [2, 2]

@pytest.mark.parametrize('layers', [MODEL[0], MODEL, [MODEL[0]], nn.ModuleList(MODEL), (o for o in [MODEL[2]])], ids=['layer', 'model', 'list', 'ModuleList', 'generator'])
def test_layers_are_named(layers):
    assert error(FC_Decomposer, layers=layers).endswith("a module. Pass its name in model.named_modules(), such as 'head.0'.")

def test_layers_by_number():
    for bad in (0, [0, 2]): assert error(FC_Decomposer(layers=bad).plan, MODEL) == 'layers takes names of layers, got int; names are those of model.named_modules().'

def test_one_class_is_as_good_as_a_tuple_of_one():
    m = nn.Sequential(Mine(8, 8))
    assert FC_Decomposer(types=Mine).plan(m).replaced == FC_Decomposer(types=(Mine,)).plan(m).replaced != []
    for bad in ('Mine', MODEL, [Mine(2, 2)], None, 3): assert error(FC_Decomposer, types=bad).startswith('types takes subclasses of nn.Linear, such as types=(MyLinear,), got ')

def test_a_policy_and_a_ratio():
    assert error(FC_Decomposer, .3, policy=ParamBudget(.2)) == 'pass rank_ratio=0.3 or policy=ParamBudget(0.2), not both.'
    assert error(FC_Decomposer, .3, policy=MODEL).startswith('policy got Sequential.')

# ------------------------------------------------------------------ plan and decompose

METHODS = pytest.mark.parametrize('method', ['plan', 'decompose'])

@METHODS
@pytest.mark.parametrize('thing,hint', [('learner', '; pass learn.model'), ('loaders', '; data come second'), ('loader', '; data come second'), ('tensor', '; data come second'),
    ('array', '; data come second'), ('module_class', '; pass an instance of Linear'), ('decomposer', ''), ('plan', ''), ('statistics', ''),
    ('text', '; load it into a model first: model.load_state_dict(…), or pass the file to decompose_checkpoint')])
def test_the_model_comes_first(method, thing, hint):
    name = type(THINGS[thing]).__name__
    assert error(getattr(FC, method), THINGS[thing]) == f'model must be a torch.nn.Module, got {name}{hint}.'

@METHODS
@pytest.mark.parametrize('x,hint', [(MODEL.state_dict(), 'OrderedDict; load it into a model first: model.load_state_dict(…).'),
    (Path('m.pth'), '; load it into a model first: model.load_state_dict(…), or pass the file to decompose_checkpoint.'), (BatchEncoding({'x': X}), 'BatchEncoding.')])
def test_weights_in_place_of_a_model(method, x, hint):
    message = error(getattr(FC, method), x)
    assert message.startswith('model must be a torch.nn.Module, got ') and message.endswith(hint)

@METHODS
@pytest.mark.parametrize('thing', ['learner', 'loaders', 'loader', 'tensor', 'array', 'statistics', 'text'])
def test_swapped(method, thing):
    assert error(getattr(FC, method), THINGS[thing], MODEL).endswith(', and data is the model: pass the model first, then data.')
    assert error(getattr(FC, method), data=MODEL, model=THINGS[thing]).endswith('pass the model first, then data.')

@METHODS
@pytest.mark.parametrize('thing', ['model', 'layer', 'decomposer', 'plan', 'module_class', 'list_of_models', 'text'])
def test_what_is_not_data(method, thing):
    assert error(getattr(FC, method), MODEL, THINGS[thing]).startswith('data must be ')

@METHODS
def test_a_method_of_the_class(method):
    f = getattr(FC_Decomposer, method)
    for args in ((MODEL,), (MODEL, X), (MODEL, DLS), (LEARN,)):
        assert error(f, *args) == (f'{method} is called on an instance: FC_Decomposer(0.5).{method}(model), got {type(args[0]).__name__} in place of FC_Decomposer(0.5).')
    assert [*inspect.signature(f).parameters][:3] == ['self', 'model', 'data'] and f.__doc__

@METHODS
@pytest.mark.parametrize('arg', ['n_batches', 'sensitivity'])
@pytest.mark.parametrize('thing', THINGS)
def test_other_arguments(method, arg, thing):
    if thing in ('text', 'tensor', 'array') and arg == 'sensitivity': return
    assert arg in error(getattr(FC, method), MODEL, X, **{arg: THINGS[thing]})

def test_warnings_still_point_at_the_caller():
    with pytest.warns(UserWarning, match='grew') as w: FC_Decomposer(1.).decompose(MODEL)
    assert w[0].filename == __file__

# ------------------------------------------------------------------ elsewhere

@pytest.mark.parametrize('thing', [o for o in THINGS if o not in ('text', 'statistics', 'plan')])
def test_a_learner_and_policies(thing):
    x = THINGS[thing]
    for f in (LEARN.decompose, RankRatio, Energy, FixedRank, ParamBudget, PerLayer, lambda x: ParamBudget(params=x), lambda x: ParamBudget(.5, cost=x),
              lambda x: ParamBudget(.5, round_to=x), lambda x: PerLayer({'0': x}), PLAN.replan, PLAN.__getitem__): error(f, x)
    assert LEARN.model is MODEL

@pytest.mark.parametrize('thing', ['learner', 'loaders', 'tensor', 'decomposer', 'text'])
def test_plans_and_statistics_take_models(thing):
    for f in (PLAN.apply, lambda x: calibrate(x, X), lambda x: compare_models(x, MODEL)):
        assert 'must be a torch.nn.Module, got ' in error(f, THINGS[thing])

@pytest.mark.parametrize('x,text', [(.5, '0.5'), (None, 'None'), (True, 'True'), ('head', "'head'"), ('a'*99, "'" + 'a'*60 + "…'"), (MODEL, 'Sequential'), (LEARN, 'Learner'),
    (X, 'Tensor of shape (16, 8)'), (X.numpy(), 'ndarray of shape (16, 8)'), (nn.Linear, 'the class Linear'), ([MODEL], 'list'), ({}, 'dict')])
def test_shown(x, text): assert _short(x) == text
