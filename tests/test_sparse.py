"Sparsity, case by case (S1 to S28), each against something it did not compute itself"
import copy, io, itertools, json, math, pickle, signal, subprocess, sys, warnings
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.callback.schedule import SchedCos, SchedLin
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized
from fasterai.all import *
from fasterai.core.inputs import Inputs, collect_inputs
from fasterai.core.zeros import join_zeros, split_zeros
from fasterai.sparse.find import find_sparse
from fasterai.sparse.hold import bake, hold
from fasterai.sparse.plan import SparsityPlan
from fasterai.sparse.masks import lowest, mk_pattern, weight_scores
from fasterai.sparse.resolve import SparseLayer, solve_layers, sparse_moments
from fasterai.core.matrices import second_moments, weights_of
from fasterai.sparse.solve import alternate, conjugate_gradients, row_errors
from fasterai.sparse.training import HoldZeros

pytestmark = [pytest.mark.filterwarnings('ignore:all weights of:UserWarning'), pytest.mark.filterwarnings('ignore:no data:UserWarning'), pytest.mark.filterwarnings('ignore:the predicted output error:UserWarning')]

# ------------------------------------------------------------------ helpers

def mlp(bias=True, dtype=None, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 48, bias, dtype=dtype), nn.ReLU(), nn.Linear(48, 64, bias, dtype=dtype), nn.ReLU(), nn.Linear(64, 8, bias, dtype=dtype)).eval()

def rows(n=300, d=32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d//4, generator=g) @ torch.randn(d//4, d, generator=g)/2 + .1*torch.randn(n, d, generator=g) + .5

def zeros(m): return sum(int((o.weight == 0).sum()) for o in m.modules() if isinstance(o, (nn.Linear, nn.Conv2d)))
def weights(m): return sum(o.weight.numel() for o in m.modules() if isinstance(o, (nn.Linear, nn.Conv2d)))
def same_state(a, b): return a.keys() == b.keys() and all(torch.equal(a[k].cpu(), b[k].cpu()) for k in a)

def snapshot(m):
    hooks = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks')
    return ([(n, type(o), o.training, *(len(getattr(o, h)) for h in hooks)) for n,o in m.named_modules()],
            [(n, t.data_ptr(), t.requires_grad, t._version, t.detach().clone()) for n,t in [*m.named_parameters(), *m.named_buffers()]])

def same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

def dls(n=256, d=32, c=8, bs=32):
    x = rows(n, d)
    y = (x @ torch.randn(d, c, generator=torch.Generator().manual_seed(3))).argmax(1)
    ds = [*zip(x, y)]
    return DataLoaders.from_dsets(ds[:3*n//4], ds[3*n//4:], bs=bs, device='cpu')

@pytest.fixture
def learn(tmp_path):
    l = Learner(dls(), mlp(), loss_func=CrossEntropyLossFlat(), lr=.01, path=tmp_path)
    with l.no_bar(), l.no_logging(): yield l

# ------------------------------------------------------------------ S1 - S6: counts and arguments

@pytest.mark.parametrize('scope', ('global', 'layer'))
@pytest.mark.parametrize('share', (.0, .1, .3, 1/3, .5, .77, .999))
def test_s1_exact_numbers_also_with_ties(share, scope):
    for w in (None, .5, 'two'):
        m = mlp()
        for o in (m[0], m[2], m[4]) if w is not None else (): nn.init.constant_(o.weight, .5)
        if w == 'two': m[2].weight.data[:7] = .25
        s = Sparsifier(share, score='magnitude', scope=scope).sparsify(m) if share else Sparsifier(0., score='magnitude').plan(m).apply(m)
        ns = [o.weight.numel() for o in (m[0], m[2], m[4])]
        want = math.floor(share*sum(ns) + 1e-9) if scope == 'global' else sum(math.floor(share*n + 1e-9) for n in ns)
        assert zeros(s) == want

def test_s1_lowest_is_what_a_sort_says():
    g = torch.Generator().manual_seed(0)
    for i in range(30):
        parts = [torch.rand(int(torch.randint(1, 40, (1,), generator=g)), generator=g) for _ in range(3)]
        if i % 3 == 0: parts = [(8*p).round()/8 for p in parts]
        k = int(torch.randint(0, sum(map(len, parts)) + 1, (1,), generator=g))
        gone = torch.cat(lowest(parts, [1]*3, k))
        flat = torch.cat(parts)
        assert int(gone.sum()) == k
        assert not k or k == len(flat) or flat[gone].max() <= flat[~gone].min()

def test_s1_lowest_with_sizes_fits_in():
    a,b = torch.rand(10),torch.rand(6)
    ga,gb = lowest([a, b], [3, 7], 40)
    assert 3*int(ga.sum()) + 7*int(gb.sum()) <= 40

def test_s2_default_makes_an_mlp_sparse():
    m,x = mlp(),rows()
    s = Sparsifier().sparsify(m, x)
    assert zeros(s) == weights(m)//2 and all((s[i].weight == 0).any() for i in (0, 2, 4))

@pytest.mark.parametrize('update', ('cg', 'admm', 'none'))
@pytest.mark.parametrize('pattern', ('2:4', '1:4', '4:8'))
def test_s3_s4_n_of_m(pattern, update):
    k,of = map(int, pattern.split(':'))
    m,x = nn.Sequential(nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 8)).eval(),rows()
    plan = Sparsifier(pattern=pattern, update=update).plan(m, x)
    s = plan.apply(m)
    assert ((s[0].weight != 0).view(6, -1, of).sum(-1) == k).all()
    assert 'not a multiple' in plan['2'].reason and torch.equal(s[2].weight, m[2].weight)

def test_s3_n_of_m_looks_for_masks_as_a_rule():
    m,x = nn.Sequential(nn.Linear(32, 16)).eval(),rows()
    def error(**kw): return float((Sparsifier(pattern='2:4', **kw).sparsify(m, x)(x) - m(x)).norm().detach())
    assert error() == error(update='admm') < error(update='cg') < error(update='none')
    assert Sparsifier(pattern='2:4').update == 'admm' and repr(Sparsifier(pattern='2:4')) == "Sparsifier(0.5, pattern='2:4')"
    assert {Sparsifier().update, Sparsifier(pattern='2:4', score='magnitude').update, Sparsifier(pattern='row').update} == {'cg'}

def test_s3_two_of_four_input_channels_of_a_convolution():
    torch.manual_seed(0)
    m,x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2)).eval(),torch.randn(8, 3, 10, 10)
    plan = Sparsifier(pattern='2:4').plan(m, x)
    s = plan.apply(m)
    assert 'not a multiple of 4' in plan['0'].reason
    assert ((s[2].weight != 0).sum(1) == 2).all()       # 4 channels of each group, at each place of the kernel

@pytest.mark.parametrize('pattern,shape', (('row', (1, 32)), ('column', (48, 1)), ('block', (4, 4)), ('16x1', (16, 1)), ('2x8', (2, 8))))
@pytest.mark.parametrize('update', ('cg', 'admm'))
def test_s4_blocks(pattern, shape, update):
    m,x = nn.Sequential(nn.Linear(32, 48)).eval(),rows()
    s = Sparsifier(.5, pattern=pattern, update=update, scope='layer').sparsify(m, x)
    gone = (s[0].weight == 0).unflatten(1, (-1, shape[1])).unflatten(0, (-1, shape[0])).float().mean((1, 3))
    assert set(gone.flatten().tolist()) == {0., 1.} and int(gone.sum()) == gone.numel()//2

def test_s4_rows_are_zero_together_and_the_bias_takes_their_mean():
    m,x = nn.Sequential(nn.Linear(32, 48)).eval(),rows(4000)
    s = Sparsifier(.5, pattern='row').sparsify(m, x)
    gone = (s[0].weight == 0).all(1)
    assert int(gone.sum()) == 24
    torch.testing.assert_close(s[0].bias[gone], m(x).mean(0)[gone], atol=2e-3, rtol=1e-3)

def test_scope_row_has_as_many_in_each_row():
    s = Sparsifier(.7, scope='row').sparsify(mlp(), rows())
    for i in (0, 2, 4): assert ((s[i].weight == 0).sum(1) == int(.7*s[i].weight.shape[1] + 1e-9)).all()

def test_s5_nothing_and_everything():
    m,x = mlp(),rows()
    plan = Sparsifier(0.).plan(m, x)
    assert not plan.replaced and same_state(plan.apply(m).state_dict(), m.state_dict())
    with pytest.warns(UserWarning, match='no weight became zero'): Sparsifier(0.).sparsify(m, x)
    with pytest.raises(ValueError, match='All weights would be zero'): Sparsifier(1.)

@pytest.mark.parametrize('bad,err', ((50, 'pass 0.5'), (-.1, 'got -0.1'), (math.nan, 'got nan'), (math.inf, 'got inf')))
def test_s6_bad_shares(bad, err):
    with pytest.raises(ValueError, match=err): Sparsifier(bad)
    with pytest.raises(ValueError, match=err): Sparsifier({'0': bad})

def test_s6_types_and_names():
    m,x = mlp(),rows()
    for bad in ('0.5', True, None):
        with pytest.raises(TypeError, match='must be a number'): Sparsifier(bad)
    with pytest.raises(ValueError, match="no layer matches sparsity='fc'. Closest: '0'"): Sparsifier({'fc': .5}).plan(m, x)
    with pytest.raises(ValueError, match="no layer matches layers='fc'"): Sparsifier(layers='fc').plan(m, x)
    with pytest.raises(ValueError, match="no layer matches exclude='fc'"): Sparsifier(exclude='fc').plan(m, x)
    for k,v in dict(score='wandb', update='sgd', scope='all').items():
        with pytest.raises(ValueError, match=f'{k} must be one of'): Sparsifier(**{k: v})
    for p in ('4:2', '0:4', '2/4', 'rows', 3):
        with pytest.raises(ValueError, match='pattern must be'): Sparsifier(pattern=p)
    with pytest.raises(ValueError, match='makes 75% of the weights zero'): Sparsifier(.6, pattern='1:4')
    with pytest.raises(ValueError, match="score='wanda' looks at activations: pass data=, or score='magnitude'"): Sparsifier(score='wanda').plan(m)
    with pytest.raises(TypeError, match='pass the model first'): Sparsifier().sparsify(x, m)

def test_s6_shares_by_name():
    m,x = mlp(),rows()
    plan = Sparsifier({'0': .9, '2': .25, '4': None}).plan(m, x)
    assert [o.zeros for o in plan.layers] == [int(.9*32*48), 48*64//4, 0] and 'left alone' in plan['4'].reason

# ------------------------------------------------------------------ S7 - S9: the model and the result

@pytest.mark.parametrize('score,data', (('saliency', True), ('magnitude', False)))
def test_s7_the_model_is_left_alone(score, data):
    m,x = mlp().train(),rows()
    m[0].weight.requires_grad_(False)
    before,rng = snapshot(m),torch.get_rng_state()
    s = Sparsifier(score=score).sparsify(m, x if data else None)
    assert same(snapshot(m), before) and torch.equal(torch.get_rng_state(), rng)
    assert s.training and not s[0].weight.requires_grad and s[2].weight.requires_grad
    assert not {t.data_ptr() for t in s.state_dict().values()} & {t.data_ptr() for t in m.state_dict().values()}

def test_s7_in_place():
    m,x = mlp(),rows()
    w = m[0].weight
    want = Sparsifier().sparsify(m, x)
    got = Sparsifier().sparsify(m, x, inplace=True)
    assert got is m and m[0].weight is w and same_state(got.state_dict(), want.state_dict())

def test_s8_plain_modules_of_the_same_state():
    m,x = mlp(),rows()
    s = Sparsifier().sparsify(m, x)
    assert [type(o) for o in s.modules()] == [type(o) for o in m.modules()]
    assert [(k, v.shape, v.dtype) for k,v in s.state_dict().items()] == [(k, v.shape, v.dtype) for k,v in m.state_dict().items()]
    a,b = io.BytesIO(),io.BytesIO()
    torch.save(s.state_dict(), a), torch.save(m.state_dict(), b)
    assert len(a.getvalue()) == len(b.getvalue())
    (other := mlp(seed=9)).load_state_dict(s.state_dict())
    assert same_state(other.state_dict(), s.state_dict())
    pickle.loads(pickle.dumps(copy.deepcopy(s)))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.fc,self.head = nn.Embedding(40, 16),nn.Linear(16, 16),nn.Linear(16, 40, bias=False)
        self.head.weight = self.emb.weight
    def forward(self, x): return self.head(self.fc(self.emb(x)))

def test_s9_what_stays_has_a_reason():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.att,self.lstm,self.fc,self.up = nn.MultiheadAttention(16, 2, batch_first=True),nn.LSTM(16, 16, batch_first=True),nn.Linear(16, 4),nn.ConvTranspose1d(4, 4, 2)
        def forward(self, x): return self.up(self.fc(self.lstm(self.att(x, x, x)[0])[0]).transpose(1, 2))
    m,x = Net().eval(),torch.randn(20, 7, 16)
    plan = Sparsifier().plan(m, x)
    assert 'packed q/k/v' in plan['att.in_proj_weight'].reason and 'recurrent' in plan['lstm'].reason and 'transposed' in plan['up'].reason
    s = plan.apply(m)
    assert {o.name for o in plan.replaced} == {'att.out_proj', 'fc'} and torch.equal(s.att.in_proj_weight, m.att.in_proj_weight)
    s(x)

def test_s9_ties_stay_tied():
    m,x = Tied().eval(),torch.randint(40, (30, 5))
    plan = Sparsifier().plan(m, x)
    s = plan.apply(m)
    assert 'tied' in plan['head'].reason and 'embedding' in plan['emb'].reason
    assert s.head.weight is s.emb.weight and zeros(s) == 128

def test_s9_a_layer_under_two_names_has_one_mask():
    lin = nn.Linear(16, 16)
    m = nn.Sequential(lin, nn.ReLU(), lin).eval()
    plan = Sparsifier().plan(m, rows(d=16))
    s = plan.apply(m)
    assert len(plan) == 1 and s[0] is s[2] and int((s[0].weight == 0).sum()) == 128 and 'also known as 2' in plan['0'].reason

def test_s9_subclasses_and_parametrized_layers_need_a_word():
    class Own(nn.Linear): pass
    m,x = nn.Sequential(Own(32, 8), parametrizations.weight_norm(nn.Linear(8, 8))).eval(),rows()
    with pytest.warns(UserWarning, match='no weight became zero'): s = Sparsifier().sparsify(m, x)
    assert zeros(s) == 0 and 'types=(Own,)' in Sparsifier().plan(m, x)['0'].reason
    assert int((Sparsifier(types=Own).sparsify(m, x)[0].weight == 0).sum()) == 128

def test_conv1d_of_transformers():
    Conv1D = pytest.importorskip('transformers.pytorch_utils').Conv1D
    torch.manual_seed(0)
    m,x = nn.Sequential(Conv1D(24, 32)).eval(),rows()
    lin = nn.Sequential(nn.Linear(32, 24)).eval()
    with torch.no_grad(): lin[0].weight.copy_(m[0].weight.T), lin[0].bias.copy_(m[0].bias)
    a,b = Sparsifier().sparsify(m, x),Sparsifier().sparsify(lin, x)
    torch.testing.assert_close(a[0].weight.T, b[0].weight)
    torch.testing.assert_close(a(x), b(x))

# ------------------------------------------------------------------ S10 - S17: moments, scores, solutions

def test_s10_tokens_with_padding():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.fc = nn.Embedding(50, 16),nn.Linear(16, 8)
        def forward(self, input_ids, attention_mask): return self.fc(self.emb(input_ids))
    torch.manual_seed(0)
    m = Net().eval()
    batches = [dict(input_ids=torch.randint(50, (6, 9)), attention_mask=(torch.arange(9) < torch.randint(3, 10, (6, 1))).long()) for _ in range(3)]
    st = sparse_moments(m, batches, [s for s in find_sparse(m) if not s.reason])
    X = torch.cat([m.emb(b['input_ids'])[b['attention_mask'].bool()] for b in batches]).detach().double()
    torch.testing.assert_close(st['fc'].mean, X.mean(0))
    torch.testing.assert_close(st['fc'].blocks[0], (X - X.mean(0)).T @ (X - X.mean(0))/len(X), atol=1e-8, rtol=1e-6)
    assert Sparsifier().plan(m, batches).zeros == 64

@pytest.mark.parametrize('score', ('wanda', 'saliency', 'magnitude'))
def test_s11_scores_by_loops(score):
    torch.manual_seed(0)
    W,X,H = torch.randn(1, 5, 7),torch.randn(30, 7),torch.rand(5)
    got = weight_scores(W, score, second=X.square().mean(0)[None], out=H)
    for i,j in itertools.product(range(5), range(7)):
        want = abs(W[0,i,j]) if score == 'magnitude' else abs(W[0,i,j])*X[:,j].square().mean().sqrt()*(H[i].sqrt() if score == 'saliency' else 1)
        assert abs(got[0,i,j] - want) < 1e-5

def least_squares(W0, S, keep):
    "Row by row, by the normal equations in float64"
    R,W = torch.linalg.cholesky(S).T,torch.zeros_like(W0)
    for i in range(len(W0)): W[i, keep[i]] = torch.linalg.lstsq(R[:, keep[i]], R @ W0[i]).solution
    return W

def test_s12_conjugate_gradients_are_least_squares():
    torch.manual_seed(0)
    for n,m in ((16, 5), (40, 12)):
        X = torch.randn(200, n, dtype=torch.float64) @ torch.randn(n, n, dtype=torch.float64)
        S,W0,keep = X.T @ X/200,torch.randn(m, n, dtype=torch.float64),torch.rand(m, n) > .6
        got = conjugate_gradients(W0[None], [S[None]], keep[None], steps=600, tol=1e-13)[0]
        torch.testing.assert_close(got, least_squares(W0, S, keep), atol=1e-6, rtol=1e-6)

@pytest.mark.parametrize('update', ('cg', 'admm'))
def test_s12_never_worse_than_the_mask_alone(update):
    m,x = mlp(),rows()
    st = sparse_moments(m, x, find_sparse(m))
    for share in (.3, .6, .9):
        plan = Sparsifier(share, update=update, scope='layer').plan(m, st)
        s = plan.apply(m)
        for q in find_sparse(m):
            W,W0,S = s.get_submodule(q.name).weight.detach(),q.module.weight.detach(),second_moments(st[q.name], q)
            alone = row_errors((torch.where(plan.masks[q.name], W0, 0.) - W0)[None], S)
            assert float(row_errors((W - W0)[None], S).sum()) <= float(alone.sum())*(1 + 1e-6)

def test_s12_the_result_is_the_solution_on_its_mask():
    m,x = mlp(dtype=torch.float64),rows().double()
    plan = Sparsifier(.5).plan(m, x)
    q = find_sparse(m)[0]
    S = second_moments(sparse_moments(m, x, [q])['0'], q)[0][0]
    W = plan.apply(m)[0].weight.detach()
    want = least_squares(m[0].weight.detach(), S, plan.masks['0'])
    e,e0 = (float((((V - m[0].weight) @ S)*(V - m[0].weight)).sum().detach()) for V in (W, want))
    assert e0 <= e <= 1.001*e0 + 1e-12

def test_admm_finds_better_masks():
    torch.manual_seed(0)
    X = torch.randn(400, 8).double() @ torch.randn(8, 24).double() + .1*torch.randn(400, 24)
    S,W0 = [(X.T @ X/400)[None]],torch.randn(1, 10, 24).double()
    U = mk_pattern('unstructured')
    start = U.drop(weight_scores(W0, 'wanda', second=S[0].diagonal(dim1=1, dim2=2)), 120)
    a = conjugate_gradients(W0, S, ~start, steps=200)
    b,mask = alternate(W0, S, lambda t: U.drop(t, 120))
    assert int((~mask).sum()) == 120 and row_errors(b - W0, S).sum() < row_errors(a - W0, S).sum()

def test_s13_no_output_is_off_in_the_mean():
    m,x = mlp(),rows(3000)
    st = sparse_moments(m, x, find_sparse(m))
    s = Sparsifier(.7, layers='0').plan(m, st).apply(m)
    off = (s[0](x) - m[0](x)).mean(0)
    assert off.abs().max() < 2e-3 and st['0'].trust > .99
    bare = nn.Sequential(nn.Linear(32, 48, bias=False)).eval()
    assert Sparsifier(.7).sparsify(bare, x)[0].bias is None

def test_s14_orthogonal_inputs_leave_the_rest_alone():
    m = nn.Sequential(nn.Linear(16, 12)).eval()
    x = torch.cat([torch.eye(16), -torch.eye(16)])*4
    a,b,c = (Sparsifier(.5, score=k, update=u, scope='layer').plan(m, x) for k,u in (('wanda', 'cg'), ('wanda', 'none'), ('magnitude', 'none')))
    assert torch.equal(a.masks['0'], b.masks['0']) and torch.equal(b.masks['0'], c.masks['0'])
    torch.testing.assert_close(a.apply(m)[0].weight, b.apply(m)[0].weight, atol=1e-5, rtol=1e-5)

def test_s15_one_budget_for_all_layers():
    m,x = mlp(),rows()
    plan = Sparsifier(.6).plan(m, x)
    assert plan.zeros == int(.6*weights(m)) == sum(int((~k).sum()) for k in plan.masks.values())
    shares = plan.to_frame().set_index('layer').zeros
    assert len(set(shares.round(3))) == 3 and [o.share for o in plan.layers] == shares.tolist()

def test_s15_the_price_is_the_effect_on_the_output():
    "A layer whose output is multiplied by a hundredth loses most"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(32, 16),nn.Linear(32, 16)
        def forward(self, x): return self.a(x) + .01*self.b(x)
    torch.manual_seed(0)
    plan = Sparsifier(.5).plan(Net().eval(), rows())
    assert plan['b'].share > .9 and plan['a'].share < .1

@pytest.mark.parametrize('kw', (dict(padding=1), dict(padding=2, dilation=2), dict(groups=2, stride=2), dict(groups=4), dict(padding='same', padding_mode='reflect')))
def test_s16_convolutions_on_their_patches(kw):
    torch.manual_seed(0)
    conv,x = nn.Conv2d(4, 8, 3, **kw).double().eval(),torch.randn(6, 4, 9, 9).double()
    m = nn.Sequential(conv)
    st = sparse_moments(m, x, find_sparse(m))
    q, = find_sparse(m)
    plan = Sparsifier(.5).plan(m, st)
    s = plan.apply(m)
    E,S = weights_of(find_sparse(s)[0]) - weights_of(q),st['0'].second()
    k,B = len(S)//conv.groups,conv.groups
    y = conv._conv_forward(x, s[0].weight - conv.weight, None)
    got = row_errors(E, [torch.stack(S[j::k]) for j in range(k)]).flatten()
    torch.testing.assert_close(got, y.square().mean((0, 2, 3)).detach(), rtol=1e-6, atol=1e-9)
    assert zeros(s) == conv.weight.numel()//2

def test_s17_values_that_are_not_finite():
    m,x = mlp(),rows()
    m[2].weight.data[3, 4] = math.nan
    with pytest.raises(ValueError, match="the weight of '2' has 1 NaN or Inf of 3072 values"): Sparsifier().plan(m, x)
    assert Sparsifier(score='magnitude', exclude='2').plan(m).zeros == (32*48 + 64*8)//2

def test_few_rows_and_dead_inputs():
    for x in (rows(1), rows(3), torch.zeros(10, 32), torch.cat([rows(50), torch.full((1, 32), math.nan)])):
        s = Sparsifier(.5).sparsify(mlp(), x)
        assert zeros(s) == weights(s)//2 and all(p.isfinite().all() for p in s.parameters())

def test_a_layer_that_data_do_not_reach():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(32, 8),nn.Linear(32, 8)
        def forward(self, x): return self.a(x)
    plan = Sparsifier().plan(Net().eval(), rows())
    assert plan['b'].reason == 'not reached by the data' and plan['a'].zeros == 128
    plan = Sparsifier(score='magnitude').plan(Net().eval(), rows())
    assert plan['b'].changed and plan['b'].update == 'none' and 'without data' in plan['b'].reason

def test_model_whose_gradients_do_not_flow():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(32, 16),nn.Linear(16, 8)
        def forward(self, x): return self.b(self.a(x)).detach()
    with pytest.warns(UserWarning, match='the sensitivity cannot be measured'): plan = Sparsifier().plan(Net().eval(), rows())
    assert plan.zeros == (32*16 + 16*8)//2

def test_the_same_twice():
    m,x = mlp(),rows()
    for u in ('cg', 'admm'): assert same_state(*(Sparsifier(update=u).sparsify(m, x).state_dict() for _ in 'ab'))

def test_zeros_that_are_there_go_first():
    m,x = mlp(),rows()
    once = Sparsifier(.4).sparsify(m, x)
    for score in ('saliency', 'magnitude', 'random'):
        twice = Sparsifier(.6, score=score).sparsify(once, x)
        for i in (0, 2, 4): assert (twice[i].weight[once[i].weight == 0] == 0).all()
        assert zeros(twice) == int(.6*weights(m))

@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16, torch.float64))
def test_other_dtypes(dtype):
    m,x = mlp(dtype=dtype),rows().to(dtype)
    s = Sparsifier(.5).sparsify(m, x)
    assert all(p.dtype == dtype for p in s.parameters()) and zeros(s) >= weights(m)//2
    assert (s(x).float() - m(x).float()).norm() < .5*m(x).float().norm()

# ------------------------------------------------------------------ S18 - S20: files

@pytest.mark.parametrize('dtype', (torch.float32, torch.float16, torch.bfloat16))
def test_s18_files_are_exact_and_small(dtype, tmp_path):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).to(dtype)
    dense = save_sparse(m, tmp_path/'dense').stat().st_size
    plain = tmp_path/'plain'
    save_file(m.state_dict(), plain)
    assert dense <= plain.stat().st_size + 600      # the header alone
    limits = {.5: .54, .9: .14} if dtype == torch.float32 else {.5: .58, .9: .18}
    for share,most in limits.items():
        s = Sparsifier(share, score='magnitude', update='none').sparsify(m)
        plan = Sparsifier(share, score='magnitude', update='none').plan(m)
        f = save_sparse(s, tmp_path/f'{share}')
        assert f.stat().st_size <= most*dense and abs(f.stat().st_size/plan.bytes_after - 1) < .01
        other = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
        assert load_sparse(f, other) is other and same_state(other.state_dict(), s.state_dict())
        assert {p.dtype for p in other.parameters()} == {dtype}

def test_s18_bits_come_back():
    t = torch.tensor([[0., -0., 1., math.nan, math.inf, 1e-45] + [0.]*500]*8)
    v,b = split_zeros(t)
    assert torch.equal(join_zeros(v, b, t.shape).view(torch.int32), t.view(torch.int32))
    with pytest.raises(ValueError, match='values for'): join_zeros(v[1:], b, t.shape)

def test_s18_wrappers_ties_and_buffers(tmp_path):
    m = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32, 4))
    s = Sparsifier(.9, score='magnitude', update='none').sparsify(m)
    save_sparse(nn.DataParallel(s), tmp_path/'a')
    assert same_state(load_sparse(tmp_path/'a', copy.deepcopy(m)).state_dict(), s.state_dict())
    t = Tied()
    save_sparse(t, tmp_path/'t')
    u = load_sparse(tmp_path/'t', Tied())
    assert u.head.weight is u.emb.weight and same_state(u.state_dict(), t.state_dict())

def test_s19_damaged_files_and_other_models(tmp_path):
    m = mlp()
    s = Sparsifier(.7, score='magnitude', update='none').sparsify(m)
    f,target = save_sparse(s, tmp_path/'a'),mlp(seed=5)
    before,data = snapshot(target),f.read_bytes()
    for name,bad in (('cut', data[:-20]), ('short', data[:5]), ('flip', data[:-9] + bytes([data[-9] ^ 64]) + data[-8:]), ('text', b'no')):
        (tmp_path/name).write_bytes(bad)
        with pytest.raises(ValueError, match='damaged|whole safetensors'): load_sparse(tmp_path/name, target)
    save_file(m.state_dict(), tmp_path/'plain')
    with pytest.raises(ValueError, match='was not written by save_sparse'): load_sparse(tmp_path/'plain', target)
    with pytest.raises(FileNotFoundError): load_sparse(tmp_path/'nope', target)
    wide = mlp()
    wide[0] = nn.Linear(32, 49)
    for other in (wide, nn.Sequential(nn.Linear(32, 48))):
        state = snapshot(other)
        with pytest.raises(ValueError): load_sparse(f, other)
        assert same(snapshot(other), state)
    assert same(snapshot(target), before)
    with pytest.raises(FileExistsError, match='overwrite=True'): save_sparse(s, f)
    with pytest.raises(TypeError, match='load_sparse\\(path, model\\)'): load_sparse(f, m.state_dict())

def test_s20_a_write_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    from fasterai.sparse import storage
    f = save_sparse(mlp(), tmp_path/'a')
    old = f.read_bytes()
    def dies(t, path, meta):
        Path(path).write_bytes(b'half')
        raise KeyboardInterrupt
    monkeypatch.setattr(storage, 'save_file', dies)
    with pytest.raises(KeyboardInterrupt): save_sparse(mlp(seed=3), f, overwrite=True)
    assert f.read_bytes() == old and [*tmp_path.iterdir()] == [f]

@pytest.mark.slow
def test_s20_killed_while_it_saves(tmp_path):
    code = f'''
import torch, fasterai.sparse.storage as st
from pathlib import Path
def slow(t, path, meta):
    Path(path).write_bytes(b'half'); print('writing', flush=True)
    import time; time.sleep(60)
st.save_file = slow
st.save_sparse(torch.nn.Linear(4, 4), {str(tmp_path/"a")!r}, overwrite=True)'''
    old = save_sparse(nn.Linear(4, 4), tmp_path/'a').read_bytes()
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline().strip() == 'writing'
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert (tmp_path/'a').read_bytes() == old
    load_sparse(tmp_path/'a', nn.Linear(4, 4))

def test_compressed_folders_are_small_too(tmp_path):
    torch.manual_seed(0)
    m,x = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).eval(),rows(d=128)
    plan = Sparsifier(.9).plan(m, x)
    s = plan.apply(m)
    save_compressed(s, tmp_path/'a', plan)
    assert sum(f.stat().st_size for f in (tmp_path/'a').iterdir()) < .16*sum(p.nbytes for p in m.parameters())
    back = load_compressed(tmp_path/'a', m)
    assert same_state(back.state_dict(), s.state_dict())
    low = FC_Decomposer(.5, layers='0').plan(m, x)
    pairs = low.apply(m)
    then = Sparsifier(.5).plan(pairs, x)
    both = then.apply(pairs)
    save_compressed(both, tmp_path/'b', [low, then])
    assert same_state(load_compressed(tmp_path/'b', m).state_dict(), both.state_dict())
    data = (tmp_path/'b'/'model.safetensors').read_bytes()
    (tmp_path/'b'/'model.safetensors').write_bytes(data[:-9] + bytes([data[-9] ^ 64]) + data[-8:])
    with pytest.raises(ValueError, match='damaged'): load_compressed(tmp_path/'b', m)

# ------------------------------------------------------------------ S21, S22: hold and bake

@pytest.mark.parametrize('opt', (lambda p: torch.optim.SGD(p, .1, momentum=.9, weight_decay=.1), lambda p: torch.optim.AdamW(p, .01, weight_decay=.1)))
def test_s21_zeros_stay_in_any_loop(opt):
    m,x = mlp(),rows()
    s = Sparsifier(.6).sparsify(m, x)
    h = hold(s).train()
    o = opt(h.parameters())
    for _ in range(8):
        with torch.autocast('cpu', dtype=torch.bfloat16): loss = h(x).square().mean()
        loss.backward()
        o.step(), o.zero_grad()
    b = bake(h)
    for i in (0, 2, 4): assert torch.equal(b[i].weight == 0, s[i].weight == 0) and not torch.equal(b[i].weight, s[i].weight)
    assert zeros(s) == int(.6*weights(m)) and not any(map(is_parametrized, s.modules()))

def test_s22_bake_leaves_plain_modules(tmp_path):
    m,x = mlp(),rows()
    plan = Sparsifier(.6).plan(m, x)
    s = plan.apply(m)
    h = hold(m, plan)       # the masks of a plan on the dense model
    assert torch.equal(h[0].weight == 0, ~plan.masks['0']) and torch.equal(h[0].weight[plan.masks['0']], m[0].weight[plan.masks['0']])
    h = hold(s)
    torch.testing.assert_close(copy.deepcopy(h)(x), s(x))
    with pytest.raises(ValueError, match='bake\\(model\\)'): save_sparse(h, tmp_path/'a')
    assert 'parametrized' in Sparsifier().plan(h, x)['0'].reason
    b = bake(h)
    assert not any(map(is_parametrized, b.modules())) and [*b.state_dict()] == [*m.state_dict()] and same_state(b.state_dict(), s.state_dict())
    pickle.loads(pickle.dumps(b))
    torch.testing.assert_close(torch.export.export(b, (x,)).module()(x), b(x))
    with pytest.raises(ValueError, match='nothing to bake'): bake(b)
    with pytest.raises(ValueError, match='nothing to hold'): hold(m)

@pytest.mark.slow
def test_s22_onnx(tmp_path):
    pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    import onnxruntime as ort
    m,x = mlp(),rows()
    b = bake(hold(Sparsifier().sparsify(m, x)))
    torch.onnx.export(b, (x,), tmp_path/'m.onnx', dynamo=True, verbose=False)
    sess = ort.InferenceSession(tmp_path/'m.onnx')
    torch.testing.assert_close(torch.tensor(sess.run(None, {sess.get_inputs()[0].name: x.numpy()})[0]), b(x).detach(), atol=1e-4, rtol=1e-4)

# ------------------------------------------------------------------ S21, S23, S24: training

def test_learner_keeps_zeros_and_goes_back(learn):
    dense = learn.model
    before = copy.deepcopy(dense.state_dict())
    assert learn.sparsify(.7) is learn and learn.opt is None
    gone = {i: learn.model[i].weight == 0 for i in (0, 2, 4)}
    learn.fit(2, wd=.1)
    for i,g in gone.items(): assert torch.equal(learn.model[i].weight == 0, g)
    assert len(learn.plans) == 1 and zeros(learn.model) == int(.7*weights(dense))
    learn.uncompress()
    assert learn.model is dense and same_state(dense.state_dict(), before)
    learn.fit(1)
    assert zeros(learn.model) == 0

def test_learner_without_hold(learn):
    learn.sparsify(.7, hold=False)
    learn.fit(1)
    assert zeros(learn.model) < int(.7*weights(learn.model))

def test_learner_takes_plans(learn):
    plan = Sparsifier(.6).plan(learn.model, learn.dls)
    want = plan.apply(learn.model)
    with pytest.raises(ValueError, match='leave out sparsity'): learn.sparsify(.7, plan=plan)
    with pytest.raises(TypeError, match='plan must be a SparsityPlan'): learn.sparsify(plan=.5)
    learn.sparsify(plan=plan)
    assert same_state(learn.model.state_dict(), want.state_dict())
    learn.uncompress()
    learn.sparsify(plan=SparsityPlan.from_json(plan.to_json()))     # from a file: solved again on the data of the Learner
    assert torch.equal(learn.model[0].weight == 0, want[0].weight == 0)
    assert (learn.model(rows()) - want(rows())).norm() < .2*want(rows()).norm()

@pytest.mark.filterwarnings('ignore:.*(CUDA|cuda|autocast|GradScaler|lr_scheduler).*')
@pytest.mark.parametrize('prec', ('fp16', 'bf16'))
def test_s21_mixed_precision_and_accumulation(learn, prec):
    from fastai.callback.training import GradientAccumulation
    getattr(learn, f'to_{prec}')()
    learn.sparsify(.5)
    learn.fit(1, cbs=GradientAccumulation(64))
    assert zeros(learn.model) == weights(learn.model)//2
    learn.fit(2, cbs=SparsifyCallback(.8, scope='global'))
    assert zeros(learn.model) == int(.8*weights(learn.model))

def test_s23_schedule_grows_to_the_target(learn):
    seen = []
    class Look(HoldZeros.__mro__[1]):
        order = 50
        def after_step(self): seen.append(zeros(self.learn.model))
    learn.fit(5, cbs=[cb := SparsifyCallback(.75, every=3, start=.2, end=.7), Look()])
    n,total = len(learn.dls.train),weights(learn.model)
    assert seen == sorted(seen) and seen[-1] == int(.75*total) and not any(seen[:n])
    assert seen[int(.7*5*n)] == seen[-1] and [s.zeros for s in cb.steps] == sorted(s.zeros for s in cb.steps)
    assert learn.plans[0].sparsity == pytest.approx(.75, abs=1e-3) and len(learn.plans) == 1
    held = {i: learn.model[i].weight == 0 for i in (0, 2, 4)}
    learn.fit(2, cbs=SparsifyCallback(.3, scope='global'))                # a lower target: what is zero stays so
    for i,g in held.items(): assert not learn.model[i].weight[g].any()
    assert not zeros(learn.uncompress().model)

@pytest.mark.parametrize('kw', (dict(pattern='2:4'), dict(pattern='block', score='wanda'), dict(scope='layer', score='saliency'), dict(score='random', exclude='4')))
def test_s23_patterns_and_scores_while_training(learn, kw):
    learn.fit(3, cbs=SparsifyCallback(**kw))
    w = learn.model[0].weight
    if kw.get('pattern') == '2:4': assert ((w == 0).view(48, 8, 4).sum(-1) == 2).all()
    elif kw.get('pattern') == 'block': assert set((w == 0).view(12, 4, 8, 4).float().mean((1, 3)).flatten().tolist()) == {0., 1.}
    else: assert zeros(learn.model) == (weights(learn.model) - 512*('exclude' in kw))//2

@pytest.mark.parametrize('score', ('saliency', 'wanda', 'magnitude', 'random'))
def test_what_is_zero_already_goes_first(score):
    "Also where all weights matter alike because the unit or the input is dead: else more than two of four would go in the end"
    W = torch.ones(1, 6, 8)
    W[..., [3, 6]] = 0.
    x = weight_scores(W, score, second=torch.tensor([[0.]*4 + [1.]*4]), out=torch.tensor([0., 1.]*3))
    gone = mk_pattern('2:4').drop(x, 0)
    assert gone[..., [3, 6]].all() and (gone.view(6, 2, 4).sum(-1) == 2).all()

@pytest.mark.parametrize('epochs', (1, 2, 5))
def test_s23_a_short_fit_goes_step_by_step_too(learn, epochs):
    learn.fit(epochs, cbs=(cb := SparsifyCallback(.8, score='magnitude')))
    n,at = len(learn.dls.train),[s.batch for s in cb.steps]
    assert zeros(learn.model) == int(.8*weights(learn.model)) and len({s.zeros for s in cb.steps}) >= 4
    assert max(b - a for a,b in zip([s.zeros for s in cb.steps], [s.zeros for s in cb.steps][1:])) < .6*cb.steps[-1].zeros
    assert at[-1] <= .8*epochs*n and (epochs < 5 or at == [i*n for i in range(1, 5)])     # a long one at each epoch

def test_s23_arguments(learn):
    for kw,err in ((dict(start=.9, end=.5), 'start must not be after end'), (dict(start=2), 'start must be in'), (dict(every=0), 'every must be'),
                   (dict(schedule=SchedCos(0, .4)), 'the schedule ends at 0.4'), (dict(schedule=lambda t: .5 if t == 1 else .9), 'must stay between')):
        with pytest.raises(ValueError, match=err): SparsifyCallback(.5, **kw)
    with pytest.raises(TypeError, match='schedule must be a function'): SparsifyCallback(.5, schedule=.5)
    with pytest.raises(ValueError, match='no step falls between'): learn.fit(1, cbs=SparsifyCallback(.5, start=.01, end=.02))
    with pytest.raises(ValueError, match="no layer matches layers='nope'"): learn.fit(1, cbs=SparsifyCallback(.5, layers='nope'))
    assert not zeros(learn.model) and not learn.plans

def test_s23_the_best_model_is_a_sparse_one(learn):
    learn.fit(5, cbs=[SparsifyCallback(.9, scope='global'), SaveModelCallback(fname='best')])
    assert zeros(learn.model) == int(.9*weights(learn.model))
    learn.load('best')
    assert zeros(learn.model) == int(.9*weights(learn.model))

def test_s23_resumed_in_the_middle(learn):
    cb = lambda: SparsifyCallback(.8, scope='global', schedule=SchedLin(0., .8))
    learn.fit(6, cbs=cb())
    want = zeros(learn.model)
    other = Learner(dls(), mlp(), loss_func=CrossEntropyLossFlat(), lr=.01, path=learn.path)
    with other.no_bar(), other.no_logging():
        class Stop(HoldZeros.__mro__[1]):
            def after_epoch(self):
                if self.epoch == 2: self.learn.save('mid'); raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt): other.fit(6, cbs=[cb(), Stop()])
        mid = zeros(other.model)
        again = Learner(dls(), mlp(seed=4), loss_func=CrossEntropyLossFlat(), lr=.01, path=learn.path)
        with again.no_bar(), again.no_logging():
            again.create_opt()
            again.load('mid')
            gone = again.model[0].weight == 0
            again.fit(6, cbs=cb(), start_epoch=3)
    assert 0 < mid < want and zeros(again.model) == want and (again.model[0].weight[gone] == 0).all()

def test_s24_lottery_ticket(learn):
    saved = {}
    class Look(HoldZeros.__mro__[1]):
        def before_epoch(self):
            if self.epoch == 1: saved.update({k: v.clone() for k,v in self.learn.model.state_dict().items()})
    learn.fit(5, cbs=[SparsifyCallback(.8, scope='global', start=.4, rewind=1), Look()])
    assert zeros(learn.model) == int(.8*weights(learn.model))
    for i in (0, 2, 4):
        w,keep = learn.model[i].weight,learn.plans[0].masks[str(i)]
        assert torch.equal(w[keep], saved[f'{i}.weight'][keep]) and not w[~keep].any() and torch.equal(learn.model[i].bias, saved[f'{i}.bias'])
    learn.fit(2)
    assert zeros(learn.model) == int(.8*weights(learn.model))
    with pytest.raises(ValueError, match='rewind=3 is after the first step'): learn.fit(5, cbs=SparsifyCallback(.8, scope='global', start=.2, rewind=3))
    with pytest.raises(ValueError, match='put back other weights'): learn.fit(5, cbs=[SparsifyCallback(.9, scope='global', rewind=0), SaveModelCallback()])

def test_sparsify_inside_of_a_fit(learn):
    class Now(HoldZeros.__mro__[1]):
        def before_epoch(self):
            if self.epoch == 1: self.learn.sparsify(.6)
    learn.fit(3, cbs=Now())
    assert zeros(learn.model) == int(.6*weights(learn.model))

def test_exported_learners_and_lr_find(learn):
    import matplotlib
    matplotlib.use('agg')
    learn.sparsify(.6)
    learn.lr_find(num_it=6, show_plot=False)
    assert zeros(learn.model) == int(.6*weights(learn.model))
    l = pickle.loads(pickle.dumps(learn))       # as learn.export does
    assert zeros(l.model) == zeros(learn.model) and l.plans[0].zeros == learn.plans[0].zeros

def test_sparsity_find(learn):
    learn.fit(3)
    before,model = snapshot(learn.model),learn.model
    found = learn.sparsity_find(max_drop=10., metric='valid_loss', sparsities=(.3, .6), refine=0, show_plot=False)
    assert found.ratio == pytest.approx(.4) and found.plan.zeros == int(.6*weights(model)) and [*found.frame.sparsity] == [.3, .6]
    assert learn.model is model and same(snapshot(model), before) and 'Sparsifier(0.6)' in found.title
    learn.sparsify(plan=found)
    assert zeros(learn.model) == int(.6*weights(model))
    with pytest.raises(ValueError, match='one share of zeros only'): learn.sparsity_find(pattern='2:4')
    with pytest.raises(ValueError, match='sparsities must be in'): learn.sparsity_find(sparsities=(50,))

# ------------------------------------------------------------------ S25, S27, S28

@pytest.mark.parametrize('then,filled', ((lambda l: l.prune(.7), True), (lambda l: l.decompose(.4), True), (lambda l: l.quantize(8), False), (lambda l: l.sparsify(.6), False)),
                         ids=('prune', 'decompose', 'quantize', 'sparsify'))
def test_a_learner_says_that_zeros_are_filled(learn, then, filled):
    learn.sparsify(.5)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        then(learn)
    assert any('zeros of learn.sparsify are filled' in str(w.message) for w in seen) == filled

def test_a_held_model_is_not_saved(tmp_path):
    m,x = mlp(),rows()
    plan = Sparsifier(.5).plan(m, x)
    held = hold(plan.apply(m))
    with pytest.raises(ValueError, match=r"'0' is parametrized, as by hold: save_compressed\(bake\(model\)"): save_compressed(held, tmp_path/'a', plan)
    save_compressed(bake(held), tmp_path/'a', plan)
    assert zeros(load_compressed(tmp_path/'a', mlp)) == plan.zeros and [*tmp_path.iterdir()] == [tmp_path/'a']

def test_s25_after_decompose_and_after_fold():
    m,x = mlp(),rows()
    pairs = FC_Decomposer(.5).decompose(m, x)
    s = Sparsifier(.5).sparsify(pairs, x)
    assert zeros(s) == weights(pairs)//2 and [type(o) for o in s.modules()] == [type(o) for o in pairs.modules()]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    assert zeros(Sparsifier(.5).sparsify(BN_Folder().fold(net), torch.randn(8, 3, 12, 12))) == weights(net)//2

def test_s25_after_prune():
    m,x = mlp(),rows()
    small = Pruner(.5).prune(m, x)
    assert zeros(Sparsifier(.5).sparsify(small, x)) == weights(small)//2

def test_s27_plans_are_saved_with_their_masks(tmp_path):
    m,x = mlp(),rows()
    plan = Sparsifier(.6).plan(m, x)
    plan.save(tmp_path/'p.json')
    back = Plan.load(tmp_path/'p.json')
    assert type(back) is SparsityPlan and back == plan and all(torch.equal(back.masks[k], v) for k,v in plan.masks.items())
    st = sparse_moments(m, x, find_sparse(m))
    got,want = back.apply(m, data=st),plan.apply(m)
    for i in (0, 2, 4): torch.testing.assert_close(got[i].weight, want[i].weight, atol=5e-3, rtol=.05)
    with pytest.warns(UserWarning, match='does not make up for what goes'): alone = back.apply(m)
    assert torch.equal(alone[0].weight, torch.where(plan.masks['0'], m[0].weight, 0.))
    other = mlp()
    other[0] = nn.Linear(32, 48, bias=False)
    for bad,err in ((nn.Sequential(nn.Linear(4, 4)), "expects '0' to be"), (other, 'with bias, the model has it without')):
        with pytest.raises(ValueError, match=err): plan.apply(bad)
    d = json.loads(plan.to_json())
    for bad in (d['layers'][0]['mask'], d['layers'][1]['mask'][:-40], 'x'):
        d['layers'][1]['mask'] = bad
        with pytest.raises(ValueError, match='damaged plan'): SparsityPlan.from_dict(d)

def test_s27_edit_and_table():
    m,x = mlp(),rows()
    plan = Sparsifier(.6).plan(m, x)
    less = plan.edit('4')
    s = less.apply(m)
    assert torch.equal(s[4].weight, m[4].weight) and zeros(s) == plan.zeros - plan['4'].zeros and '(edited)' in less.title
    assert [*plan.to_frame().columns] == 'layer shape weights zeros after error update reason'.split()
    assert 'Linear(48×32)' in repr(plan) and '<table' in plan._repr_html_()
    m[0].weight.data.mul_(2)
    with pytest.warns(UserWarning, match='their weights have changed since'): plan.apply(m)

def test_s28_pages_say_what_zeros_do_not_give():
    root = Path(__file__).parent.parent/'nbs'
    text = ' '.join(''.join(c['source']) for p in ('sparse/sparsifier', 'tutorials/sparse/sparsifier') for c in json.loads((root/f'{p}.ipynb').read_text())['cells'])
    assert 'above 70 %' in text and 'CUDA' in text and 'as much memory and time as before' in text

def test_zeros_of_an_earlier_call_stay(learn):
    "A second call with fewer zeros frees none of the first"
    learn.sparsify(.8)
    gone = {i: learn.model[i].weight == 0 for i in (0, 2, 4)}
    learn.fit(1)
    learn.sparsify(.3)
    learn.fit(1)
    for i,g in gone.items(): assert not learn.model[i].weight[g].any()
