"What calibration promises: statistics, the pair made of them, sensitivities, and a model and data left as they were"
import copy, random, warnings
from contextlib import contextmanager
import numpy as np, pandas as pd, pytest, scipy.linalg, torch, torch.nn.functional as F, transformers as hf
from fastai.basics import Learner
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, get_text_classifier
from sklearn.covariance import oas
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import SwinTransformer
from fasterai.misc.all import *
from fasterai.core.calibrate import NotDifferentiable, oas_shrinkage
from fasterai.lowrank.factorize import DAMPING, RIDGE

pytestmark = pytest.mark.filterwarnings('ignore:.*(layers grew|singular v|nested tensor):UserWarning')
RIDGE,DAMPING = 1e-6,1e-2    # what the documentation states

# ------------------------------------------------------------------ helpers

def gen(seed=0): return torch.Generator().manual_seed(seed)

def rows(N, n, seed=0, mean=1., dtype=torch.float64):
    "Correlated rows with a mean; their covariance has a decaying spectrum"
    g = gen(seed)
    mix = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0] * .8**torch.arange(n)
    return (torch.randn(N, n, generator=g, dtype=torch.float64) @ mix.T + mean*torch.randn(n, generator=g, dtype=torch.float64)).to(dtype)

def linear(m, n, bias=True, dtype=torch.float64, seed=0):
    lin = nn.Linear(n, m, bias, dtype=dtype)
    with torch.no_grad(): [p.copy_(torch.randn(p.shape, generator=gen(seed+1), dtype=torch.float64)/n**.5) for p in lin.parameters()]
    return lin

def net(n=12, h=20, m=5, bias=True, dtype=torch.float64, act=nn.Tanh):
    return nn.Sequential(linear(h, n, bias, dtype), act(), linear(m, h, bias, dtype, seed=5))

def planned(m, policy, data, **kw):
    opts = {k: kw.pop(k) for k in ('layers', 'exclude', 'types') if k in kw}
    return FC_Decomposer(policy=policy, **opts).plan(m, data, **kw)

def product(pair): return pair[1].weight.detach().double() @ pair[0].weight.detach().double()

def rel(a, b): return (torch.norm(a.double() - b.double()) / torch.norm(b.double())).item()

def moments(x):
    "Mean and covariance (over N) by numpy, in float64"
    x = x.detach().double().reshape(-1, x.shape[-1]).numpy()
    return torch.from_numpy(x.mean(0)), torch.from_numpy(np.atleast_2d(np.cov(x.T, bias=True)))

def root(C):
    "Symmetric square root and its inverse"
    e,Q = np.linalg.eigh(np.asarray(C))
    e = np.maximum(e, 0)
    with np.errstate(divide='ignore'): return torch.from_numpy(Q*e**.5 @ Q.T), torch.from_numpy(Q*np.where(e > 0, e**-.5, 0) @ Q.T)

def seen(st, x, centred=True):
    "The covariance a pair is optimal for, from the rows: shrunk, with the ridge, and with the mean, as far as it is believed, where no bias can take it up"
    mu,C = moments(x)
    n,f = len(C),st.trust
    C = (1-st.shrink)*C + (st.shrink+RIDGE)*C.trace()/n*torch.eye(n, dtype=C.dtype)
    return C if centred else C + f**2*torch.outer(mu, mu) + (1-f**2)*mu.square().sum()/n*torch.eye(n, dtype=C.dtype)

def best(W, C, k, H=None):
    "Product of the best pair and its cost, by whitening both sides (SVD-LLM)"
    Ch,Ci = root(C)
    Hh,Hi = root(torch.eye(len(W), dtype=torch.float64) if H is None else H)
    U,S,Vh = torch.linalg.svd(Hh @ W.detach().double() @ Ch, full_matrices=False)
    return Hi @ (U[:,:k]*S[:k] @ Vh[:k]) @ Ci, S[k:].square().sum().item()

def cost(W, M, C, H=None):
    D = W.detach().double() - M
    return ((torch.eye(len(D), dtype=D.dtype) if H is None else H) @ D @ C @ D.T).trace().item()

def measured(lin, pair, x):
    "Relative error of the output of `pair` over the rows `x`, in float64: to its deviation, or without bias to the output itself"
    lin,pair,x = copy.deepcopy(lin).double(),copy.deepcopy(pair).double(),x.detach().double().reshape(-1, x.shape[-1])
    with torch.no_grad(): y,z = lin(x),pair(x)
    return ((y-z).norm() / (y if lin.bias is None else y - y.mean(0)).norm()).item()

def expected(lin, pair, x, st):
    "Relative error of the output of `pair` to expect on new rows, if their covariance is what `seen` makes of the rows `x`"
    zero = torch.zeros(1, x.shape[-1], dtype=torch.float64)
    with torch.no_grad(): W,M = ((f(torch.eye(x.shape[-1], dtype=torch.float64)) - f(zero)).T for f in (copy.deepcopy(lin).double(), copy.deepcopy(pair).double()))
    (mu,C),bias = moments(x),getattr(lin, 'bias', None) is not None
    share = min(1, min(W.shape)/(len(x) - 1))
    S = share*seen(st, x, bias) + (1-share)*(C if bias else C + torch.outer(mu, mu))
    return (cost(W, M, S)/cost(W, 0*W, S))**.5

def energy_of(d, D, st, centred=True):
    "Expected square of the error `d` (N, m) of outputs that the change `D` (m, n) of a weight makes, on new rows"
    n,mu,f,share = len(st.mean),d.mean(0),st.trust,min(1, min(D.shape)/(len(d) - 1))
    res = (1-st.shrink)*(d - mu).square().sum()/len(d) + (st.shrink+RIDGE)*st.trace/n*D.square().sum()
    if not centred: res = res + f**2*mu.square().sum() + (1-f**2)*st.mean.square().sum()/n*D.square().sum()
    return (share*res + (1-share)*((d - mu) if centred else d).square().sum()/len(d)).item()

@contextmanager
def taps(m, *names):
    "What the layers of `m` get and give, recorded by hooks"
    res,hooks = {n: ([], []) for n in names},[]
    def on(n):
        def f(_, args, kw, y):
            res[n][0].append((args[0] if args else next(iter(kw.values()))).detach().clone())
            res[n][1].append(y.detach().clone())
        return f
    for n in names: hooks.append(m.get_submodule(n).register_forward_hook(on(n), with_kwargs=True))
    try: yield res
    finally: [h.remove() for h in hooks]

def flat(ts): return torch.cat([t.reshape(-1, t.shape[-1]) for t in ts])

def same_stats(a, b, tol=1e-9, names=None):
    for n in names or set(a) | set(b):
        assert a[n].rows == b[n].rows, n
        for k in ('mean', 'cov'): torch.testing.assert_close(getattr(a[n], k), getattr(b[n], k), rtol=tol, atol=tol*float(a[n].cov.abs().max()) + tol)
        assert a[n].trace == pytest.approx(b[n].trace, rel=10*tol)

def check_stats(st, x, y, rtol=1e-9):
    "Statistics of one layer against numpy on all its rows"
    x,y = flat(x) if isinstance(x, list) else x,flat(y) if isinstance(y, list) else y
    (mu,C),(_,Y) = moments(x),moments(y)
    assert st.rows == len(x)
    torch.testing.assert_close(st.mean, mu, rtol=rtol, atol=rtol*float(C.trace()**.5))
    want = Y if Y.shape[0] <= C.shape[0] else C
    torch.testing.assert_close(st.cov, want, rtol=rtol, atol=rtol*float(want.trace()))
    assert st.trace == pytest.approx(float(C.trace()), rel=rtol)

SHAPES = [(7, 12), (12, 7), (9, 9)]

# ------------------------------------------------------------------ the pair is optimal

@pytest.mark.parametrize('m,n', SHAPES)
@pytest.mark.parametrize('bias', [True, False])
def test_pair_is_the_whitened_svd(m, n, bias):
    lin,x = linear(m, n, bias),rows(400, n)
    st = calibrate(lin, x)['']
    for k in (1, 3, 6):
        pair = planned(lin, k, x).apply(lin)
        M,_ = best(lin.weight, seen(st, x, bias), k)
        torch.testing.assert_close(product(pair), M, rtol=0, atol=1e-7*float(M.norm()))
        if bias: torch.testing.assert_close(pair[1].bias, lin.bias + (lin.weight - M) @ (st.trust*x.mean(0)), rtol=0, atol=1e-7)
        else: assert pair[1].bias is None

@pytest.mark.parametrize('m,n', SHAPES)
@pytest.mark.parametrize('bias', [True, False])
def test_no_competitor_beats_the_pair(m, n, bias):
    lin,x,k,g = linear(m, n, bias),rows(400, n),3,gen(3)
    st,pair = calibrate(lin, x)[''],planned(lin, k, x).apply(lin)
    C = seen(st, x, bias)
    mine = cost(lin.weight, product(pair), C)
    A0,B0 = pair[0].weight.detach(),pair[1].weight.detach()
    for scale in (1e-4, 1e-2, 1):           # random ones, near and far
        for _ in range(50):
            A,B = (t + scale*torch.randn(t.shape, generator=g, dtype=t.dtype) for t in (A0, B0))
            assert cost(lin.weight, B @ A, C) >= mine*(1 - 1e-9)
    for seed in range(2):                   # trained ones
        A,B = (torch.randn(t.shape, generator=gen(seed), dtype=t.dtype).mul_(.3).requires_grad_() for t in (A0, B0))
        Ch,opt = root(C)[0],torch.optim.LBFGS([A, B], max_iter=300, line_search_fn='strong_wolfe', tolerance_change=1e-14)
        def step():
            opt.zero_grad()
            loss = ((lin.weight.detach() - B @ A) @ Ch).square().sum()
            loss.backward()
            return loss
        opt.step(step)
        trained = cost(lin.weight, (B @ A).detach(), C)
        assert mine*(1 - 1e-9) <= trained <= mine*1.01     # and training does get there

def fisher(model, layer, x, y):
    "Mean of ggᵀ, g the gradient of each sample's loss at the output of `layer`, by brute force"
    gs = []
    h = model.get_submodule(layer).register_forward_hook(lambda m, a, o: gs.append(torch.zeros_like(o).requires_grad_()) or o + gs[-1])
    res = [torch.autograd.grad(F.cross_entropy(model(x[i:i+1]), y[i:i+1]), gs[-1])[0].flatten() for i in range(len(x))]
    h.remove()
    G = torch.stack(res)
    return G.T @ G/len(x)

def labelled(N=120, n=12, m=5): return rows(N, n), torch.randint(0, m, (N,), generator=gen(7))

@pytest.mark.parametrize('h', [8, 12, 20])   # wide, square, tall
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('how', ['full', 'diag'])
def test_weighted_pair_is_the_optimum_of_the_weighted_problem(h, bias, how):
    m,(x,y),k = net(h=h, bias=bias),labelled(),4
    data = list(zip(x.split(40), y.split(40)))
    H = fisher(m, '0', x, y)
    stats = calibrate(m, data, sensitivity=how, loss=F.cross_entropy)
    st,pair = stats['0'],planned(m, k, stats, layers='0').apply(m)[0]
    damped = (1-st.sens_shrink)*(H if how == 'full' else H.diagonal().diag()) + max(DAMPING, st.sens_shrink)*H.diagonal().mean()*torch.eye(h)
    M,least = best(m[0].weight, seen(st, x, bias), k, damped)
    assert cost(m[0].weight, product(pair), seen(st, x, bias), damped) == pytest.approx(least, rel=1e-6)
    torch.testing.assert_close(product(pair), M, rtol=0, atol=1e-5*float(M.norm()))

def test_weighting_changes_the_pair():
    m,x = net(),rows(200, 12)
    plain,full,diag = (planned(m, 4, x, sensitivity=s, layers='0').apply(m)[0] for s in (False, 'full', 'diag'))
    assert rel(product(full), product(plain)) > 1e-3 < rel(product(diag), product(full))

@pytest.mark.parametrize('how', ['auto', True, 'full', 'diag'])
def test_a_loss_given_to_plan_is_the_one_given_to_calibrate(how):
    m,(x,y) = net(),labelled()
    data = list(zip(x.split(40), y.split(40)))
    stats = calibrate(m, data, sensitivity='diag' if how == 'diag' else 'full', loss=F.cross_entropy)
    assert planned(m, 4, data, sensitivity=how, loss=F.cross_entropy).layers == planned(m, 4, stats).layers

# ------------------------------------------------------------------ the predicted error

@pytest.mark.parametrize('h', [7, 12, 20])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('how', [False, 'diag', 'full'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_predicted_error_is_that_of_a_covariance_shrunk_less_for_more_rows(h, bias, how, dtype):
    m,x = net(h=h, bias=bias, dtype=dtype),rows(300, 12, dtype=dtype)
    first,st = planned(m, 1, list(x.split(64)), sensitivity=how, layers='0'),calibrate(m, x)['0']
    for k in (1, 3, 5, min(h, 12)-1):
        plan = first.edit('0', k)
        assert plan['0'].calibrated and plan['0'].weighted is bool(how)
        want,eps = expected(m[0], plan.apply(m)[0], x, st),torch.finfo(dtype).eps
        # a covariance is known to the rounding of its dtype, relative to its trace
        assert abs(plan['0'].error**2 - want**2) <= 2e-4*want**2 + eps

@pytest.mark.parametrize('h', [7, 12, 20])
@pytest.mark.parametrize('bias', [True, False])
def test_predicted_error_is_the_measured_one_on_many_rows(h, bias):
    m,x = net(h=h, bias=bias),rows(40_000, 12)
    first = planned(m, 1, x[:20_000], layers='0')
    for k in (1, 3, 5):
        plan = first.edit('0', k)
        assert plan['0'].error == pytest.approx(measured(m[0], plan.apply(m)[0], x[20_000:]), rel=.02)

@pytest.mark.parametrize('m,n', SHAPES)
@pytest.mark.parametrize('dtype,tol', [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_predicted_error_of_half_precision(m, n, dtype, tol):
    # an error of about a half; outputs and factors are rounded to 11 and 8 bits
    lin,x = linear(m, n, dtype=dtype),rows(500, n, dtype=dtype)
    plan = planned(lin, 2, x)
    assert plan[''].error > .1
    assert plan[''].error == pytest.approx(expected(lin, plan.apply(lin), x, calibrate(lin, x)['']), rel=tol)

@pytest.mark.parametrize('m,n', SHAPES)
@pytest.mark.parametrize('how', [False, 'full', 'diag'])
def test_full_rank_is_the_layer_and_the_error_falls(m, n, how):
    lin,x = linear(m, n),rows(200, n)
    plan = planned(lin, 1.0, x, sensitivity=how)
    torch.testing.assert_close(plan.apply(lin)(x), lin(x), rtol=0, atol=1e-8)
    assert plan[''].error <= 1e-8
    errs = [plan.edit('', k)[''].error for k in range(1, min(m, n)+1)]
    if not how: assert errs == sorted(errs, reverse=True)

@pytest.mark.parametrize('m,n', SHAPES)
def test_without_data_it_is_the_truncated_svd(m, n):
    lin = linear(m, n)
    U,S,Vh = torch.linalg.svd(lin.weight.detach(), full_matrices=False)
    for k in (1, 4):
        plan = planned(lin, k, None)
        torch.testing.assert_close(product(plan.apply(lin)), U[:,:k]*S[:k] @ Vh[:k], rtol=0, atol=1e-12)
        assert not plan[''].calibrated and torch.equal(plan.apply(lin)[1].bias, lin.bias)

@pytest.mark.parametrize('m,n', SHAPES)
@pytest.mark.parametrize('mean', [0, 3])
def test_white_inputs_give_the_plain_svd(m, n, mean):
    lin,x = linear(m, n),rows(300, n)
    x = x - x.mean(0)
    x = x @ root(x.T @ x/len(x))[1] + mean
    for k in (1, 4):
        a,b = (planned(lin, k, d).apply(lin) for d in (x, None))
        torch.testing.assert_close(product(a), product(b), rtol=0, atol=1e-9)

@pytest.mark.parametrize('m,n', SHAPES)
def test_factors_are_balanced_and_own_their_storage(m, n):
    net_,x = net(n, m, dtype=torch.float32),rows(300, n, dtype=torch.float32)
    pair = planned(net_, 4, x, sensitivity='full', layers='0').apply(net_)[0]
    A,B = pair[0].weight.detach(),pair[1].weight.detach()
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-5, atol=0)
    for t in (A, B): assert t.is_contiguous() and t.untyped_storage().nbytes() == t.numel()*4

@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('m', [40, 96])
def test_correlated_inputs_reach_the_optimum_of_the_population(bias, m):
    n,k = 64,24
    mix = torch.linalg.qr(torch.randn(n, n, generator=gen(1), dtype=torch.float64))[0] * 1/(1+torch.arange(n))
    mu = .3*torch.randn(n, generator=gen(2), dtype=torch.float64)
    x = torch.randn(20_000, n, generator=gen(3), dtype=torch.float64) @ mix.T + mu
    lin = linear(m, n, bias, torch.float32)
    pair = planned(lin, k, list(x.float().split(1000))).apply(lin)
    C,W = mix @ mix.T,lin.weight.detach().double()
    if not bias: C = C + torch.outer(mu, mu)
    least = best(W, C, k)[1]
    err = cost(W, product(pair), C)
    plain = cost(W, product(planned(lin, k, None).apply(lin)), C)
    assert 1 - 1e-6 <= (err/least)**.5 <= 1.01 and plain > 4*least

# ------------------------------------------------------------------ statistics

@pytest.mark.parametrize('lead', [(60,), (12, 5), (3, 4, 5)])
@pytest.mark.parametrize('m,n', SHAPES)
@pytest.mark.parametrize('bias', [True, False])
def test_statistics_are_numpys(lead, m, n, bias):
    lin,x = linear(m, n, bias),rows(60, n)
    y = lin(x)
    check_stats(calibrate(lin, x.reshape(*lead, n))[''], x, y)

@pytest.mark.parametrize('m,n', SHAPES)
def test_one_row_as_a_vector(m, n):
    lin,x = linear(m, n),rows(9, n)
    same_stats(calibrate(lin, list(x)), calibrate(lin, x))

@pytest.mark.parametrize('m,n', [*SHAPES, (600, 3), (3, 1200)])
@pytest.mark.parametrize('sizes', [[1]*50 + [250], [150, 150], [7, 100, 193], [299, 1]])
def test_batches_or_all_at_once(m, n, sizes):
    lin,x = linear(m, n),rows(300, n)
    batches = list(x.split(sizes))
    same_stats(calibrate(lin, batches), calibrate(lin, x))
    same_stats(calibrate(lin, batches[::-1]), calibrate(lin, x))

@pytest.mark.parametrize('m,n', SHAPES)
def test_an_empty_batch_adds_nothing(m, n):
    lin,x = linear(m, n),rows(30, n)
    same_stats(calibrate(lin, [x[:0], x[:10], x[:0], x[10:]]), calibrate(lin, x))

@pytest.mark.parametrize('m,n', [(24, 12), (12, 12)])
def test_a_large_mean_costs_no_digits(m, n):
    # float32 rows have steps of 6e-5 at 1e3, so references are of the rounded rows
    x = (rows(4000, n, mean=0) + 1e3).float()
    lin = linear(m, n, dtype=torch.float32)
    if m <= n:
        with torch.no_grad(): lin.weight.copy_(torch.eye(n)), lin.bias.zero_()
    st = calibrate(lin, list(x.split(500)))['']
    mu,C = moments(x)
    torch.testing.assert_close(st.mean, mu, rtol=1e-7, atol=0)
    torch.testing.assert_close(st.cov, C, rtol=0, atol=1e-5*float(C.diagonal().max()))
    assert st.trace == pytest.approx(float(C.trace()), rel=1e-5)

def test_a_first_batch_unlike_the_others_costs_few_digits():
    x = torch.cat([torch.zeros(10, 12), (rows(4000, 12, mean=0) + 1e2).float()])
    st = calibrate(linear(24, 12, dtype=torch.float32), list(x.split([10]+[500]*8)))['']
    torch.testing.assert_close(st.cov, moments(x)[1], rtol=1e-4, atol=0)

def shrinkage(x):
    "λ by its definition, (tr C² - tr Σ²)/(tr C² - (tr C)²/n), with the estimate of tr Σ² that has no bias for Gaussian rows"
    v,S,n = len(x) - 1,np.cov(x.numpy().T),x.shape[1]
    if v < 2: return 1.
    square = np.trace(S @ S)
    true = v**2/((v-1)*(v+2))*(square - np.trace(S)**2/v)
    return min(1., (square - true)/(square - np.trace(S)**2/n))

@pytest.mark.parametrize('N', [2, 3, 12, 100, 2000])
def test_shrinkage_is_that_of_scikit_learn_corrected_for_few_rows(N):
    x = rows(N, 12)
    want,usual = shrinkage(x),oas(x.numpy())[1]
    assert usual <= want <= usual*max(1, (N-1)/max(1e-9, N-2)) + 1e-9
    assert calibrate(linear(20, 12), x)[''].shrink == pytest.approx(want, rel=1e-9)
    assert calibrate(linear(7, 12), x)[''].shrink == pytest.approx(want, rel=1e-9)     # no covariance of inputs, and few features: exact

@pytest.mark.parametrize('m', [5, 12, 20])
@pytest.mark.parametrize('size', [1, 2, 5, 64, 400])
def test_shrinkage_does_not_depend_on_the_batches(m, size):
    x = rows(400, 12, seed=1)
    for part in (x[:20], x):
        got,want = calibrate(linear(m, 12), list(part.split(size)))[''].shrink,shrinkage(part)
        assert got == pytest.approx(want, rel=1e-9)

@pytest.mark.parametrize('N', [40, 300, 3000])
@pytest.mark.parametrize('flat', [0., 1.])
def test_shrinkage_of_many_inputs_is_estimated(N, flat):
    # a wide layer keeps no covariance of its 200 inputs; 32 random vectors tell the trace of its square
    x = rows(N, 200, seed=2)*(torch.linspace(1, 0, 200)**2 + flat)
    want = shrinkage(x)
    got = [calibrate(linear(8, 200), list(x.split(size)))[''].shrink for size in (N, 17)]
    assert got[0] == pytest.approx(want, rel=.25) and got[1] == pytest.approx(got[0], rel=1e-9)

def test_the_true_covariance_is_estimated_without_bias():
    # λ is made of tr C² - λ(tr C² - (tr C)²/n) = tr Σ², for whatever Σ; here λ is never cut at 1
    N,n,g = 10,6,np.random.default_rng(0)
    A,got = np.diag(.3**np.arange(n)),[]
    for _ in range(4000):
        C = np.cov((g.standard_normal((N, n)) @ A).T)
        tr,tr2 = np.trace(C),np.trace(C @ C)
        lam = oas_shrinkage(N, n, tr, tr2)
        assert lam < 1
        got.append(tr2 - lam*(tr2 - tr**2/n))
    assert np.mean(got) == pytest.approx(np.trace(A**4), abs=4*np.std(got)/len(got)**.5)

@pytest.mark.parametrize('centred', [True, False])
def test_shrinkage_at_its_ends(centred):
    assert oas_shrinkage(1, 3, 3., 9., centred=centred) == 1 == oas_shrinkage(10, 4, 8., 16., centred=centred)     # one row; the identity
    assert oas_shrinkage(10**6, 4, 8., 20., centred=centred) < 1e-4

class Heads(nn.Module):
    "Three layers on one input, tall and wide; `own` gives each its own copy"
    def __init__(self, own=False, route=False, n=10):
        super().__init__()
        self.own,self.route = own,route
        self.q,self.k,self.v = linear(6, n, seed=1),linear(15, n, seed=2),linear(8, n, seed=3)
        self.o = linear(4, 29)
    def at(self, x): return x.clone() if self.own else x
    def forward(self, x):
        skip = self.route and x[...,0].mean() > 1
        q,k = self.q(self.at(x)),torch.zeros(*x.shape[:-1], 15, dtype=x.dtype) if skip else self.k(self.at(x))
        return self.o(torch.cat([q, k, self.v(self.at(x))], -1))

def split_inputs(n=10): return [rows(20, n, s, mean=0) + (s % 2)*2 for s in range(6)]

def test_layers_of_one_input_share_statistics():
    a,b = (calibrate(Heads(own), split_inputs()) for own in (False, True))
    same_stats(a, b)
    x = flat(split_inputs())
    for n in 'qkv': check_stats(a[n], x, Heads().get_submodule(n)(x))

def test_routing_that_depends_on_the_data():
    data = split_inputs()
    assert {x[...,0].mean().item() > 1 for x in data} == {True, False}
    got,want = (calibrate(Heads(own, route=True), data) for own in (False, True))
    same_stats(got, want)
    for n in 'qkv':
        x = flat([x for x in data if n != 'k' or x[...,0].mean() <= 1])
        check_stats(got[n], x, Heads().get_submodule(n)(x))
        want = shrinkage(x)
        assert got[n].shrink == pytest.approx(want, rel=1e-9)

class InPlace(nn.Module):
    "Changes the shared input between its layers and after them"
    def __init__(self): super().__init__(); self.a,self.b = linear(6, 10),linear(15, 10, seed=3)
    def forward(self, x):
        x = x + 0
        y = self.a(x)
        x.mul_(2).add_(1)
        z = self.b(x)
        x.zero_()
        return torch.cat([y, z], -1)

@pytest.mark.parametrize('inference', [False, True])
def test_inputs_modified_in_place(inference):
    m,x = InPlace(),rows(50, 10)
    with torch.inference_mode(inference): st = calibrate(m, [x[:30], x[30:]])
    check_stats(st['a'], x, m.a(x))
    check_stats(st['b'], 2*x+1, m.b(2*x+1))

class Twice(nn.Module):
    "Calls its layer twice on one tensor, and in the other half of the cases once more on another"
    def __init__(self, m): super().__init__(); self.fc = linear(m, 10)
    def forward(self, x):
        y = self.fc(x) + self.fc(x)
        return y + self.fc(x*3)

@pytest.mark.parametrize('m', [6, 15])
def test_a_layer_called_more_than_once(m):
    t,x = Twice(m),rows(50, 10)
    with taps(t, 'fc') as seen_:
        st = calibrate(t, [x[:30], x[30:]])
    got = seen_['fc']
    mu,C = moments(flat(got[0]))
    once = moments(torch.cat([x, 3*x]))[0]
    assert rel(st['fc'].mean, mu) < 1e-9 or rel(st['fc'].mean, once) < 1e-9   # by calls or by tensors, but one of the two throughout
    by_calls = rel(st['fc'].mean, mu) < 1e-9
    X = flat(got[0]) if by_calls else torch.cat([x, 3*x])
    check_stats(st['fc'], X, t.fc(X))

class Recurrent(nn.Module):
    "One layer shared by two names, applied three times"
    def __init__(self): super().__init__(); self.a = linear(10, 10); self.b = self.a
    def forward(self, x): return self.a(self.b(self.a(x).tanh()).tanh())

def test_shared_instance():
    m,x = Recurrent(),rows(60, 10)
    with taps(m, 'a') as got: st = calibrate(m, [x[:20], x[20:]])
    assert list(st) == ['a']
    check_stats(st['a'], *got['a'])
    small = FC_Decomposer(policy=4).decompose(m, x)
    assert small.a is small.b

# ------------------------------------------------------------------ padding

TEXT = dict(vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40, max_position_embeddings=32)

def bert():
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**TEXT)).double().eval()

LENGTHS = [9, 4, 6, 9, 2, 7]

def sentences(): return [torch.randint(3, 50, (1, n), generator=gen(i)) for i,n in enumerate(LENGTHS)]

def padded(pad=1):
    ids = torch.full((len(LENGTHS), 9), pad)
    mask = torch.zeros_like(ids)
    for i,s in enumerate(sentences()): ids[i,:s.shape[1]],mask[i,:s.shape[1]] = s[0],1
    return dict(input_ids=ids, attention_mask=mask)

def test_padding_does_not_count():
    m = bert()
    got,want = calibrate(m, hf.BatchEncoding(padded())),calibrate(m, [dict(input_ids=s) for s in sentences()])
    assert got['bert.encoder.layer.0.attention.self.query'].rows == sum(LENGTHS) and got['classifier'].rows == len(LENGTHS)
    same_stats(got, want, tol=1e-6)

class Wrapped(nn.Module):
    "Takes the mask under another name, as a tuple of inputs"
    def __init__(self): super().__init__(); self.hf = bert()
    def forward(self, ids, mask): return self.hf(input_ids=ids, attention_mask=mask).logits

def test_padding_does_not_count_inside_a_wrapper():
    got,want = calibrate(Wrapped(), [tuple(padded().values())]),calibrate(bert(), padded())
    assert {n: o.rows for n,o in got.items()} == {f'hf.{n}': o.rows for n,o in want.items()}

def test_what_the_padding_holds_does_not_matter():
    m = bert()
    a,b = (FC_Decomposer(.3).decompose(m, padded(p)) for p in (1, 2))
    with torch.no_grad(): assert rel(a(**padded()).logits, b(**padded()).logits) < 1e-9

@pytest.mark.parametrize('kind', [torch.bool, torch.float32])
def test_padding_masks_of_other_types(kind):
    m,b = bert(),padded()
    same_stats(calibrate(m, b), calibrate(m, b | dict(attention_mask=b['attention_mask'].to(kind))))

def test_padding_does_not_count_in_the_sensitivity():
    m = bert()
    def loss(out, *_): return out.logits.square().sum()/len(out.logits)
    got,want = (calibrate(m, d, sensitivity='full', loss=loss) for d in (padded(), [dict(input_ids=s) for s in sentences()]))
    for n in got: torch.testing.assert_close(got[n].sens, want[n].sens, rtol=1e-5, atol=1e-6*float(want[n].sens.abs().max()))

def test_loader_of_dicts_with_labels():
    b = padded()
    items = [dict(input_ids=i, attention_mask=a, labels=i.sum() % 2, idx=7) for i,a in zip(*b.values())]
    same_stats(calibrate(bert(), DataLoader(items, batch_size=4)), calibrate(bert(), b))

class ByKeyword(nn.Module):
    def __init__(self): super().__init__(); self.fc = linear(6, 10)
    def forward(self, *, values, scale=1.): return self.fc(input=values*scale)

def test_called_by_keyword():
    x = rows(40, 10)
    got = calibrate(ByKeyword(), [dict(values=x[:10], unused=1), dict(values=x[10:])])
    check_stats(got['fc'], x, linear(6, 10)(x))

# ------------------------------------------------------------------ rows that do not count, layers that are not reached

@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('m,n', SHAPES)
def test_rows_that_are_not_finite_are_dropped_and_counted(m, n, bad):
    lin,x = linear(m, n),rows(60, n)
    y = x.clone()
    y[3,2] = y[40,0] = y[40,1] = bad
    st,keep = calibrate(lin, [y[:30], y[30:]])[''],[i for i in range(60) if i not in (3, 40)]
    check_stats(st, x[keep], lin(x[keep]))
    assert st.dropped == 2
    with pytest.warns(UserWarning, match='2 of 60 rows are not finite and were left out: the data have'): plan = planned(lin, 2, y)
    assert '2 of 60 rows are not finite and were left out' in plan[''].reason

def test_outputs_that_overflow_do_not_spoil_the_statistics():
    lin,x = linear(7, 12, dtype=torch.float16),rows(200, 12, dtype=torch.float16)
    x[5] = 60000
    with torch.no_grad(): lin.weight[0] = 1
    st = calibrate(lin, x)['']
    assert not lin(x).isfinite().all() and st.cov.isfinite().all() and st.mean.isfinite().all()
    pair = quiet_apply(lin, x)
    assert all(p.isfinite().all() for p in pair.parameters())

def quiet_apply(m, data, k=3):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return planned(m, k, data).apply(m)

class Branch(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = linear(8, 8),linear(8, 8, seed=4)
    def forward(self, x): return self.a(x)

def test_a_layer_that_is_not_reached_has_a_reason_and_gets_plain_svd():
    m,x = Branch(),rows(50, 8)
    plan = planned(m, 3, x)
    assert plan['a'].calibrated and not plan['b'].calibrated and plan['b'].reason == 'plain SVD: not reached by the data'
    assert torch.equal(product(plan.apply(m).b), product(planned(m, 3, None).apply(m).b))

class Poisoned(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = linear(8, 8),linear(8, 8, seed=4)
    def forward(self, x): return self.b(self.a(x)*float('nan'))

def test_a_layer_that_sees_only_nan():
    m,x = Poisoned(),rows(50, 8)
    stats = calibrate(m, x)
    assert list(stats) == ['a'] and 'finite' in stats.missing['b']      # it was reached
    plan = planned(m, 3, x)
    assert 'plain SVD' in plan['b'].reason and not plan['b'].calibrated
    assert torch.equal(product(plan.apply(m).b), product(planned(m, 3, None).apply(m).b))

def test_a_layer_the_statistics_do_not_speak_of_has_a_reason():
    m,x = net(),rows(50, 12)
    plan = planned(m, 3, calibrate(m, x, layers='0'))
    assert plan['0'].calibrated and not plan['2'].calibrated and 'plain SVD' in plan['2'].reason

@pytest.mark.parametrize('shape', [(8, 9), (9, 12), (20, 12)])
def test_statistics_of_another_model(shape):
    stats = calibrate(linear(8, 12), rows(50, 12))
    with pytest.raises(ValueError, match='12|8'): planned(linear(*shape), 3, stats)

@pytest.mark.parametrize('kw', [dict(sensitivity=True), dict(sensitivity='full'), dict(loss=F.cross_entropy), dict(n_batches=2)], ids=['sensitivity', 'full', 'loss', 'n_batches'])
def test_what_saved_statistics_cannot_give_is_not_ignored(kw):
    m,x = net(),rows(50, 12)
    with pytest.raises(ValueError, match='sensitivity|loss|n_batches'): planned(m, 3, calibrate(m, x), **kw)

def test_a_loss_without_sensitivity():
    m,(x,y) = net(),labelled()
    with pytest.raises(ValueError, match='loss= makes the sensitivity'): calibrate(m, [(x, y)], loss=F.cross_entropy)
    with pytest.raises(ValueError, match='loss'): planned(m, 3, [(x, y)], sensitivity=False, loss=F.cross_entropy)

@pytest.mark.parametrize('data', [[], iter(()), DataLoader([])], ids=['list', 'iterator', 'loader'])
def test_no_batches(data):
    with pytest.raises(ValueError, match='no batches'): FC_Decomposer().decompose(linear(7, 12), data)

@pytest.mark.parametrize('n', [0, -1, 1.5, True, '2'])
def test_n_batches_is_checked(n):
    with pytest.raises(ValueError, match='n_batches'): FC_Decomposer().plan(linear(7, 12), [rows(5, 12)], n_batches=n)

def test_n_batches():
    lin,x,drawn = linear(7, 12),rows(90, 12),[]
    def batches():
        for b in x.split(30): drawn.append(1); yield b
    same_stats(calibrate(lin, batches(), n_batches=2), calibrate(lin, x[:60]))
    assert len(drawn) == 2
    assert calibrate(lin, list(x.split(30)), n_batches=5).batches == 3

def test_meta_model():
    with torch.device('meta'): m = nn.Linear(12, 7)
    with pytest.raises(ValueError, match='meta'): planned(m, 3, rows(5, 12))

@pytest.mark.parametrize('data', ['abc', b'x', 3, linear(3, 3)], ids=['str', 'bytes', 'int', 'model'])
def test_what_is_not_data(data):
    with pytest.raises(TypeError, match='data must be'): planned(linear(7, 12), 3, data)

def test_a_tuple_of_batches_is_refused():
    with pytest.raises(ValueError, match='list'): planned(linear(7, 12), 3, tuple(rows(30, 12).split(5)))

# ------------------------------------------------------------------ forms of data

class Items(nn.Module):
    def __init__(self): super().__init__(); self.fc = linear(6, 10, dtype=torch.float32)
    def forward(self, x): return self.fc(x)

X = rows(48, 10, dtype=torch.float32)
Y = torch.arange(48) % 6
def loader(x=X): return DataLoader(TensorDataset(x, Y), batch_size=20)
def generator():
    for b in X.split(20): yield b
class Reusable:
    def __iter__(self): return generator()

FORMS = dict(tensor=X, numpy=X.numpy(), tuple_=(X, Y), list_=list(X.split(20)), list_of_pairs=[(X[:20], Y[:20]), [X[20:], Y[20:]]], dict_=dict(x=X, y=Y),
    list_of_dicts=[dict(x=b) for b in X.split(20)], list_of_numpy=[X[:20].numpy(), X[20:].numpy()], loader=loader(), generator=generator, iterable=Reusable(),
    dict_in_tuple=(dict(x=X), Y), loader_of_numpy=DataLoader(X.numpy(), batch_size=7), callable_=lambda m: m(X), callable_twice=lambda m: [m(X[:9]), m(X[9:])],
    callable_submodule=lambda m: m.fc(X), zip_=lambda: zip(X.split(20), Y.split(20)))

@pytest.mark.parametrize('form', FORMS)
def test_forms_of_data(form):
    data = FORMS[form]
    if form in ('generator', 'zip_'): data = data()
    same_stats(calibrate(Items(), data), calibrate(Items(), X), tol=1e-6)

def dls_and_model():
    dls = digits_dls(8, n=100, bs=32)
    torch.manual_seed(0)
    return dls, nn.Sequential(nn.Flatten(), nn.Linear(3*64, 20), nn.ReLU(), nn.Linear(20, 10))

def test_numpys_default_dtype():
    same_stats(calibrate(Items(), X.numpy().astype(np.float64)), calibrate(Items(), X), tol=1e-6)

@pytest.mark.parametrize('form', ['dls', 'learner', 'train', 'valid', 'one_batch'])
def test_fastai_loaders(form):
    dls,m = dls_and_model()
    data = dict(dls=lambda: dls, learner=lambda: Learner(dls, m, loss_func=nn.CrossEntropyLoss()), train=lambda: dls.train, valid=lambda: dls.valid,
                one_batch=dls.one_batch)[form]()
    st = calibrate(m, data)
    want = dls.valid if form == 'valid' else dls.train.new(shuffle=False, drop_last=False)
    if form in ('dls', 'learner', 'valid'):     # all of the training set, also the last short batch; the others drop or draw
        x = torch.cat([b[0] for b in want]).as_subclass(torch.Tensor).flatten(1)
        assert st['1'].rows == len(x) == {'valid': 20}.get(form, 80)
        torch.testing.assert_close(st['1'].mean, moments(x)[0], rtol=0, atol=1e-5)
    small = FC_Decomposer(policy=5).decompose(m, data)
    assert small[1][0].out_features == 5

def test_fastai_loaders_twice_are_the_same():
    dls,m = dls_and_model()
    a,b = (calibrate(m, dls, n_batches=1) for _ in range(2))
    assert torch.equal(a['1'].mean, b['1'].mean) and torch.equal(a['1'].cov, b['1'].cov)

def test_training_images_are_not_augmented():
    from fastai.vision.all import CategoryBlock, DataBlock, Flip, ImageBlock, IndexSplitter, ItemGetter, RandomErasing
    imgs = [(torch.randint(0, 255, (8, 8, 3), generator=gen(i)).numpy().astype(np.uint8), i % 2) for i in range(20)]
    def dls(tfms): return DataBlock((ImageBlock, CategoryBlock), get_x=ItemGetter(0), get_y=ItemGetter(1), splitter=IndexSplitter([0]),
                                    batch_tfms=tfms).dataloaders(imgs, bs=8, num_workers=0, device='cpu')
    m = nn.Sequential(nn.Flatten(), linear(200, 192, dtype=torch.float32))
    same_stats(calibrate(m, dls([Flip(p=1.), RandomErasing(p=1.)])), calibrate(m, dls(None)), tol=1e-5)

def test_tabular_learner():
    df = pd.DataFrame(dict(a=list('xyzx')*4, b=range(16), c=range(16, 0, -1), y=list('uv')*8))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names='a', cont_names=['b','c'], y_names='y', bs=4, device='cpu')
    learn = tabular_learner(dls, layers=[24, 16])
    plan = planned(learn.model, 2, learn)
    assert all(o.calibrated for o in plan.layers) and len(plan) == 3

def test_tabular_learner_twice_is_the_same():
    # fastai draws the rows of a tabular training set with replacement, from numpy's global random numbers
    df = pd.DataFrame(dict(a=list('xyzx')*4, b=range(16), c=range(16, 0, -1), y=list('uv')*8))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names='a', cont_names=['b','c'], y_names='y', bs=4, device='cpu')
    learn,means = tabular_learner(dls, layers=[24, 16]),[]
    for seed in (0, 1):
        np.random.seed(seed)
        means.append(calibrate(learn.model, learn)['layers.0.0'].mean)
    torch.testing.assert_close(*means, rtol=1e-6, atol=1e-6)

def hidden(m): return [[t.clone() for t in h] if isinstance(h, (tuple, list)) else h.clone() for h in m[0].module.hidden]

def test_text_model_keeps_its_state():
    torch.manual_seed(0)
    m = get_text_classifier(AWD_LSTM, 50, 3, config={**awd_lstm_clas_config, **dict(emb_sz=24, n_hid=32, n_layers=2)})
    x = torch.randint(5, 50, (2, 9), generator=gen())
    m.eval()
    m.reset()
    m[0].module.bs = 2
    m[0].module.reset()
    before = hidden(m)
    plan = planned(m, 2, [(x, torch.zeros(2))])
    assert all(o.calibrated for o in plan.replaced) and len(plan.replaced) == 2
    assert all(torch.equal(a, b) for p,q in zip(before, hidden(m)) for a,b in zip(p, q)) and m[0].module.bs == 2

# ------------------------------------------------------------------ left as found

class Stateful(nn.Module):
    "Has a buffer, an attribute and random numbers that change as it runs"
    def __init__(self, fail_at=None):
        super().__init__()
        self.a,self.drop,self.bn,self.b = linear(10, 10),nn.Dropout(.5),nn.BatchNorm1d(10, dtype=torch.float64),linear(4, 10, seed=2)
        self.register_buffer('seen', torch.zeros(()))
        self.register_buffer('cache', None)
        self.calls,self.state,self.fail_at = 0,None,fail_at
    def forward(self, x):
        self.calls += 1
        self.seen += 1
        self.state = self.cache = x
        x = x + 0*torch.rand(1) + 0*np.random.rand() + 0*random.random()
        y = self.b(self.bn(self.drop(self.a(x))))
        if self.calls == self.fail_at: raise RuntimeError('stop here')
        return y

def stateful(fail_at=None):
    m = Stateful(fail_at)
    m.train()
    m.bn.eval()
    m(rows(9, 10)).sum().backward()
    m.calls = 0
    m.a.bias.requires_grad_(False)
    m.a.register_forward_hook(lambda *a: None)
    return m

def look(m):
    kinds = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_forward_hooks_with_kwargs', '_forward_pre_hooks_with_kwargs')
    return ([(n, o.training, *(tuple(getattr(o, k)) for k in kinds)) for n,o in m.named_modules()], m.calls, m.seen.item(), id(m.state), id(m.cache), sorted(m.__dict__),
            [(n, id(p), p.requires_grad, p.is_leaf, id(p.grad), p.tolist(), None if p.grad is None else p.grad.tolist()) for n,p in m.named_parameters()],
            [(n, id(b), b.tolist()) for n,b in m.named_buffers()],
            torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate(), torch.is_grad_enabled(),
            torch.get_float32_matmul_precision())

@pytest.mark.parametrize('fails', [False, True])
@pytest.mark.parametrize('how', [False, 'full'])
@pytest.mark.parametrize('shuffled', [False, True])
def test_model_is_left_as_found(fails, how, shuffled):
    m,x = stateful(2 if fails else None),rows(60, 10)
    data = DataLoader(x, batch_size=20, shuffle=True) if shuffled else list(x.split(20))
    before,was = look(m),x.clone()
    if fails:
        with pytest.raises(RuntimeError, match='stop here'): planned(m, 3, data, sensitivity=how)
    else:
        plan = planned(m, 3, data, sensitivity=how)
        small = plan.apply(m)
        assert small.seen.item() == m.seen.item() and small.bn.running_mean.tolist() == m.bn.running_mean.tolist()
    assert before == look(m) and torch.equal(x, was)

def test_model_is_left_as_found_when_the_data_fails():
    m = stateful()
    def data():
        yield rows(20, 10)
        raise OSError('no such image')
    batches,before = data(),look(m)
    with pytest.raises(OSError, match='no such image'): planned(m, 3, batches, sensitivity='full')
    assert before == look(m)

def test_data_is_left_as_it_was_when_the_model_writes_to_its_input():
    class Writes(nn.Module):
        def __init__(self): super().__init__(); self.fc = linear(6, 10)
        def forward(self, x): return self.fc(x.mul_(2))
    x = rows(30, 10)
    was = x.clone()
    a = calibrate(Writes(), [x])
    check_stats(a['fc'], 2*was, linear(6, 10)(2*was))

def test_dropout_is_off_and_batch_norm_uses_its_statistics():
    m,x = stateful(),rows(60, 10)
    check_stats(calibrate(m, x)['b'], m.bn(m.a(x)), m.b(m.bn(m.a(x))))

# ------------------------------------------------------------------ layers that are read

@contextmanager
def linear_spy(weight, monkeypatch):
    "What `F.linear` gets together with `weight`"
    seen_,orig = [],F.linear
    def spy(x, w, b=None):
        if w is weight: seen_.append(x.detach().clone())
        return orig(x, w, b)
    with monkeypatch.context() as mp:
        mp.setattr(F, 'linear', spy)
        yield seen_

class Attention(nn.Module):
    def __init__(self, bias=True): super().__init__(); torch.manual_seed(0); self.mha = nn.MultiheadAttention(16, 4, bias=bias, batch_first=True, dtype=torch.float64)
    def forward(self, x): return self.mha(x, x, x, need_weights=False)[0]

@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('train', [True, False])
def test_attention_output_projection_is_calibrated(bias, train):
    m,x = Attention(bias).train(train),rows(120, 16).reshape(12, 10, 16)
    if bias: nn.init.normal_(m.mha.out_proj.bias)
    plan = planned(m, 5, [x[:5], x[5:]])
    small = plan.apply(m)
    with torch.no_grad(): y,z = m(x).flatten(0, 1),small(x).flatten(0, 1)
    st,W = calibrate(m, [x[:5], x[5:]])['mha.out_proj'],m.mha.out_proj.weight.detach()
    want = (energy_of(y-z, W - product(small.mha.out_proj), st, bias)/energy_of(y, W, st, bias))**.5
    assert plan['mha.out_proj'].calibrated and plan['mha.out_proj'].error == pytest.approx(want, rel=1e-6)
    assert ((y-z).norm()/(y - y.mean(0) if bias else y).norm()).item() < .97*((y - planned(m, 5, None).apply(m)(x).flatten(0, 1)).norm()/(y - y.mean(0) if bias else y).norm()).item()

def test_attention_with_weights_and_mask():
    m,x = nn.MultiheadAttention(16, 4, dtype=torch.float64),rows(60, 16).reshape(10, 6, 16)
    mask = torch.ones(10, 10).triu(1).bool()
    plan = planned(m, 5, lambda m: m(x, x, x, attn_mask=mask))
    small,st,W = plan.apply(m).eval(),calibrate(m, lambda m: m(x, x, x, attn_mask=mask))['out_proj'],m.out_proj.weight.detach()
    y,z = (o(x, x, x, attn_mask=mask) for o in (m.eval(), small))
    assert torch.equal(y[1], z[1])
    y,z = (o[0].detach().flatten(0, -2) for o in (y, z))
    assert plan['out_proj'].error == pytest.approx((energy_of(y-z, W - product(small.out_proj), st)/energy_of(y, W, st))**.5, rel=1e-6)

def measured_outputs(y, z):
    y,z = y.detach().flatten(0, -2),z.detach().flatten(0, -2)
    return ((y-z).norm()/(y - y.mean(0)).norm()).item()

def test_swin_qkv_is_calibrated(monkeypatch):
    torch.manual_seed(0)
    m = SwinTransformer([4, 4], 16, [2], [2], [4, 4], num_classes=5).double().eval()
    x = torch.randn(6, 3, 32, 32, generator=gen(), dtype=torch.float64)
    plan,st = planned(m, 6, x),calibrate(m, x)
    small = plan.apply(m)
    for n in (o.name for o in plan.replaced if o.name.endswith(('qkv', 'attn.proj'))):
        lin = m.get_submodule(n)
        with linear_spy(lin.weight, monkeypatch) as got, torch.no_grad(): m(x)
        assert plan[n].calibrated and plan[n].error == pytest.approx(expected(lin, small.get_submodule(n), flat(got), st[n]), rel=1e-4), n

def test_t5_is_calibrated():
    torch.manual_seed(0)
    m = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=50, d_model=24, d_kv=6, d_ff=40, num_layers=1, num_heads=4, decoder_start_token_id=0)).double().eval()
    x = dict(input_ids=torch.randint(3, 50, (5, 9), generator=gen()), decoder_input_ids=torch.randint(3, 50, (5, 7), generator=gen(1)))
    plan = planned(m, 5, x)
    small,st,names = plan.apply(m),calibrate(m, x),[o.name for o in plan.replaced]
    assert any(n.endswith('wo') for n in names)
    with taps(m, *names) as got, torch.no_grad(): m(**x)
    for n in names:
        assert plan[n].calibrated and plan[n].error == pytest.approx(expected(m.get_submodule(n), small.get_submodule(n), flat(got[n][0]), st[n]), rel=1e-4), n

@pytest.mark.parametrize('how', [False, 'full'])
def test_the_fast_path_of_the_encoder_hides_no_layer(how):
    torch.manual_seed(0)
    m = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, dropout=0., batch_first=True, dtype=torch.float64), 2)
    x = rows(120, 16).reshape(12, 10, 16)
    plan = planned(m.eval(), 5, x, sensitivity=how)
    assert len(plan.replaced) == 6 and all(o.calibrated for o in plan.layers if o.can)
    names = [f'layers.{i}.linear{j}' for i in range(2) for j in (1, 2)]
    with taps(m.train(), *names) as got: m(x)      # train mode with no dropout: the slow path
    st = calibrate(m.eval(), x)
    for n in names: check_stats(st[n], *got[n], rtol=1e-8)

def test_gpt2_conv1d_is_calibrated():
    torch.manual_seed(0)
    m = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=24, n_layer=1, n_head=4, n_positions=32)).double().eval()
    x = torch.randint(3, 50, (6, 9), generator=gen())
    plan = planned(m, 5, dict(input_ids=x))
    small,st = plan.apply(m),calibrate(m, dict(input_ids=x))
    assert len(plan.replaced) == 4 and {o.kind for o in plan.replaced} == {'Conv1D'}
    with taps(m, *(o.name for o in plan.replaced)) as got, torch.no_grad(): m(input_ids=x)
    for n in got:
        assert plan[n].calibrated and plan[n].error == pytest.approx(expected(m.get_submodule(n), small.get_submodule(n), flat(got[n][0]), st[n]), rel=1e-4), n

# ------------------------------------------------------------------ sensitivity

@pytest.mark.parametrize('h', [6, 10, 14])
def test_sensitivity_of_a_linear_model_is_known(h):
    m,x = nn.Sequential(linear(h, 10), linear(5, h, seed=3)),rows(500, 10)
    m0 = m[0].weight.detach()
    st = calibrate(m, [x]*40, sensitivity='full')['0']      # 20,000 probes: an error of 1/sqrt(20000), about 1 %
    z,V = m(x).detach(),m[1].weight.detach()
    H = V.T @ V/z.var(0, unbiased=False).sum()
    want = H if h <= 10 else m0.T @ H @ m0
    assert rel(st.sens, want) < .04
    assert st.sens_mean == pytest.approx(H.diagonal().mean().item(), rel=.03)
    diag = calibrate(m, [x]*40, sensitivity='diag')['0'].sens
    assert rel(diag, H.diagonal()) < .04

@pytest.mark.parametrize('h', [6, 10, 14])
def test_a_weighted_spectrum_is_the_error_of_the_models_output(h):
    m,x = nn.Sequential(linear(h, 10), linear(5, h, seed=3)),rows(500, 10)
    for k in (1, 2, 3):
        plan = planned(m, k, [x]*40, sensitivity='full', layers='0')
        with torch.no_grad(): want = measured_outputs(m(x), plan.apply(m)(x))
        got = sum(s*s for s in plan['0'].spectrum[k:])**.5
        assert .95*want < got < 1.2*want      # Monte Carlo, 1 to 2 %; damping adds to it

@pytest.mark.parametrize('how', ['full', 'diag'])
def test_a_relu_in_place_changes_nothing(how):
    x = rows(60, 12)
    a,b = (calibrate(nn.Sequential(linear(20, 12), nn.ReLU(inplace), linear(9, 20), nn.ReLU(inplace), linear(4, 9)), x, sensitivity=how)
           for inplace in (False, True))
    same_stats(a, b)
    for n in a: torch.testing.assert_close(a[n].sens, b[n].sens, rtol=1e-9, atol=1e-12)

def test_frozen_parameters_have_a_sensitivity_too():
    a,b,x = net(),net().requires_grad_(False),rows(60, 12)
    sa,sb = (calibrate(m, x, sensitivity='full') for m in (a, b))
    for n in sa: assert torch.equal(sa[n].sens, sb[n].sens)
    assert not any(p.requires_grad for p in b.parameters())

@pytest.mark.parametrize('layer', ['0', '2'])
@pytest.mark.parametrize('sizes', [[120], [40, 40, 40], [100, 20]])
def test_a_loss_gives_the_empirical_fisher(layer, sizes):
    m,(x,y) = net(h=9),labelled()
    st = calibrate(m, list(zip(x.split(sizes), y.split(sizes))), sensitivity='full', loss=F.cross_entropy)[layer]
    torch.testing.assert_close(st.sens, fisher(m, layer, x, y), rtol=1e-9, atol=1e-12)

class Arg(nn.Module):
    def __init__(self): super().__init__(); self.fc = linear(6, 10)
    def forward(self, x): return self.fc(x).argmax(-1)
class NoGrad(Arg):
    @torch.no_grad()
    def forward(self, x): return self.fc(x)
class Detached(Arg):
    def forward(self, x): return self.fc(x).detach()
class ByNumpy(Arg):
    def forward(self, x): return torch.from_numpy(np.tanh(self.fc(x).detach().numpy()))

@pytest.mark.parametrize('kind', [Arg, NoGrad, Detached, ByNumpy])
def test_outputs_without_a_gradient(kind):
    m,x = kind(),rows(60, 10)
    for how in ('full', 'diag', True):
        with pytest.raises(NotDifferentiable): planned(m, 3, x, sensitivity=how)
    with pytest.warns(UserWarning, match='sensitivity cannot be measured'): plan = planned(m, ParamBudget(.7), x)
    assert plan['fc'].calibrated and not plan['fc'].weighted
    assert not m.fc._forward_hooks and all(p.requires_grad for p in m.parameters())

class Partly(nn.Module):
    def __init__(self): super().__init__(); self.body,self.head = linear(9, 10),linear(6, 9)
    def forward(self, x):
        with torch.no_grad(): x = self.body(x)
        return self.head(x.tanh())

def test_a_part_without_a_gradient():
    m,x = Partly(),rows(60, 10)
    plan = planned(m, 3, x, sensitivity='full')
    assert all(o.calibrated for o in plan.layers) and plan['head'].weighted and not plan['body'].weighted

@pytest.mark.parametrize('kind', [iter, lambda d: (b for b in d)], ids=['iter', 'generator'])
def test_batches_that_can_be_drawn_once(kind):
    m,x = net(),rows(60, 12)
    assert planned(m, ParamBudget(.7), kind(x.split(20))) == planned(m, ParamBudget(.7), list(x.split(20)))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('how', ['full', 'diag'])
def test_sensitivity_in_half_precision(dtype, how):
    # gradients of 500 outputs have 11 or 8 bits, and the probes are the same
    a,b = (calibrate(net(dtype=d), rows(500, 12).to(d), sensitivity=how) for d in (dtype, torch.float64))
    for n in a: assert rel(a[n].sens, b[n].sens) < (.02 if dtype == torch.float16 else .1)

def test_fisher_of_the_attention_output():
    m,x = Attention(),rows(60, 16).reshape(12, 5, 16)
    def loss(z): return (z*z).sum()/len(z)
    got = calibrate(m, list(x.split(4)), sensitivity='full', loss=loss)['mha.out_proj']
    g = 2*m.eval()(x).detach().flatten(0, 1)
    torch.testing.assert_close(got.sens, g.T @ g/12, rtol=1e-9, atol=1e-12)

class Checkpointed(nn.Module):
    def __init__(self, on=True): super().__init__(); self.on,self.body,self.head = on,net(),linear(3, 5)
    def forward(self, x):
        return self.head(torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False) if self.on else self.body(x))

def test_gradient_checkpointing_counts_once():
    import torch.utils.checkpoint
    x = rows(60, 12)
    a,b = (calibrate(Checkpointed(on), x, sensitivity='full') for on in (True, False))
    same_stats(a, b)
    for n in a: torch.testing.assert_close(a[n].sens, b[n].sens, rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize('how', [False, 'full', 'diag'])
def test_same_bits_twice(how):
    m,x = net(dtype=torch.float32),rows(60, 12, dtype=torch.float32)
    torch.manual_seed(1)
    a = planned(m, 4, list(x.split(20)), sensitivity=how)
    torch.manual_seed(2)
    b = planned(m, 4, list(x.split(20)), sensitivity=how)
    assert a == b and all(map(torch.equal, a.apply(m).parameters(), b.apply(m).parameters()))

@pytest.mark.parametrize('mode', [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize('how', [False, 'full'])
def test_inside_no_grad_and_inference_mode(mode, how):
    m,x = net(),rows(60, 12)
    want = planned(m, 4, x, sensitivity=how)
    with mode(): got = planned(m, 4, rows(60, 12), sensitivity=how)
    assert got == want

# ------------------------------------------------------------------ few samples

@pytest.mark.parametrize('m,n', SHAPES)
@pytest.mark.parametrize('N', [1, 2, 3])
@pytest.mark.parametrize('bias', [True, False])
def test_fewer_rows_than_features(m, n, N, bias):
    lin,x = linear(m, n, bias),rows(N, n)
    for k in (1, 4):
        pair = planned(lin, k, x).apply(lin)
        assert all(p.isfinite().all() for p in pair.parameters())
        W,M = lin.weight.detach(),product(pair)
        assert (W-M).norm() < W.norm() and torch.linalg.matrix_rank(M) == k
        if N == 1:      # one row says nothing
            for a,b in zip(pair.parameters(), planned(lin, k, None).apply(lin).parameters()): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

@pytest.fixture(scope='module')
def trained():
    d = load_digits()
    x,y = torch.tensor(d.data/8-1, dtype=torch.float32),torch.tensor(d.target)
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10))
    opt = torch.optim.Adam(m.parameters(), 3e-3)
    for _ in range(120):
        opt.zero_grad()
        F.cross_entropy(m(x[:1400]), y[:1400]).backward()
        opt.step()
    acc = lambda m: (m(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
    assert acc(m) > .9
    return m, x[:1400], acc

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('N', [8, 32])
def test_few_samples_do_not_destroy_a_model(trained, N, seed):
    m,x,acc = trained
    some = x[torch.randperm(len(x), generator=gen(seed))[:N]]
    for ratio in (.25, .5):
        got,plain = (acc(FC_Decomposer(ratio).decompose(m, d)) for d in (some, None))
        assert got > plain - .06, (ratio, got, plain)

def test_many_samples_beat_plain_svd(trained):
    m,x,acc = trained
    fc = FC_Decomposer(policy={'0': 8, '2': 6})
    got,plain = (acc(fc.decompose(m, d)) for d in (x, None))
    assert got > plain and got > acc(m) - .12
    with torch.no_grad(): errs = [rel(fc.decompose(m, d)(x), m(x)) for d in (x, None)]
    assert errs[0] < .8*errs[1]

# ------------------------------------------------------------------ plans and files

def test_statistics_on_disk(tmp_path):
    m,x = net(),rows(60, 12)
    for how in (None, 'full', 'diag'):
        st = calibrate(m, list(x.split(20)), sensitivity=how)
        back = Calibration.load(st.save(tmp_path/f'{how}.safetensors'))
        assert list(back) == list(st) and back.batches == 3 and back.missing == st.missing
        for n in st:
            a,b = vars(st[n]),vars(back[n])
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)
        p,q = (planned(m, 4, s) for s in (st, back))
        assert p == q == planned(m, 4, list(x.split(20)), sensitivity=how or False)
        assert all(map(torch.equal, p.apply(m).parameters(), q.apply(m).parameters()))
        assert st['0'].cov is not None and calibrate(m, x)['0'].rows == 60      # planning did not use them up
    with pytest.raises(FileExistsError): st.save(tmp_path/'full.safetensors')
    st.save(tmp_path/'full.safetensors', overwrite=True)

def test_missing_layers_survive_the_disk(tmp_path):
    m,x = Branch(),rows(50, 8)
    st = calibrate(m, x)
    back = Calibration.load(st.save(tmp_path/'s.safetensors'))
    assert back.missing == {'b': 'not reached by the data'} and planned(m, 3, back) == planned(m, 3, x)

@pytest.mark.parametrize('how', [False, 'full', 'diag'])
def test_a_loaded_plan_needs_data_and_gives_the_same_model(tmp_path, how):
    m,x = net(),rows(60, 12)
    data = list(x.split(20))
    plan = planned(m, 4, data, sensitivity=how)
    back = DecompositionPlan.load(plan.save(tmp_path/'plan.json'))
    assert back == plan and repr(back) == repr(plan)
    with pytest.raises(ValueError, match='calibration data'): back.apply(m)
    want = plan.apply(m)
    for d in (data, calibrate(m, data, sensitivity=how or None)):
        for a,b in zip(want.parameters(), back.apply(m, data=d).parameters()): torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert plan.skeleton(m).load_state_dict(want.state_dict()) and back.skeleton(m).load_state_dict(want.state_dict())

def test_a_loaded_plan_with_n_batches(tmp_path):
    m,data = net(),list(rows(60, 12).split(20))
    plan = planned(m, 4, data, n_batches=2)
    back = DecompositionPlan.load(plan.save(tmp_path/'plan.json'))
    for a,b in zip(plan.apply(m).parameters(), back.apply(m, data=data, n_batches=2).parameters()): assert torch.equal(a, b)

def test_data_that_misses_a_calibrated_layer():
    m,x = Branch(),rows(50, 8)
    both = lambda m: (m.a(x), m.b(x), m(x))
    plan = planned(m, 3, both)
    assert plan['b'].calibrated
    with pytest.raises(ValueError, match="'b'.*not reached"): plan.apply(m, data=x)

@pytest.mark.parametrize('policy', [.5, 4, Energy(.9), ParamBudget(.6), {'0': 4}, {'0': .5, '2': Energy(.8)}], ids=str)
@pytest.mark.parametrize('how', ['auto', 'full', False])
def test_decompose_is_plan_and_apply(policy, how):
    m,x = net(dtype=torch.float32),rows(60, 12, dtype=torch.float32)
    fc,data = FC_Decomposer(policy=policy),list(x.split(20))
    before,was = {k: v.clone() for k,v in m.state_dict().items()},x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        a,b = fc.decompose(m, data, sensitivity=how),fc.plan(m, data, sensitivity=how).apply(m)
    assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values())) and a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items()) and torch.equal(x, was)

def test_energy_of_a_calibrated_layer_is_that_of_its_output():
    lin,x = linear(9, 12),rows(400, 12)
    y = lin(x).detach()
    e = torch.linalg.svdvals(y - y.mean(0)).square()
    for keep in (.5, .9, .99):
        k = int(((e.cumsum(0)/e.sum()) >= keep).nonzero()[0]) + 1
        assert planned(lin, Energy(keep), x)[''].rank == k

def test_layers_and_exclude_limit_what_is_calibrated():
    m,x = net(),rows(60, 12)
    assert list(calibrate(m, x, layers='2')) == ['2']
    plan = planned(m, 4, x, exclude='0')
    assert plan['0'].rank is None and not plan['0'].calibrated and plan['2'].calibrated

def test_decomposed_model_trains():
    m,x = net(dtype=torch.float32),rows(100, 12, dtype=torch.float32)
    small = planned(m, 4, x, sensitivity='full').apply(m)
    target = m(x).detach()
    opt,errs = torch.optim.AdamW(small.parameters(), 1e-3),[]
    for _ in range(60):
        loss = F.mse_loss(small(x), target)
        errs.append(loss.item())
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert errs[-1] < errs[0] and max(errs) < 1.2*errs[0]
