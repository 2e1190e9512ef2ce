"What few, repeated, constant or broken rows may do to a model: nothing worse than no data at all; and what is said about it"
import warnings
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from fasterai.misc.all import *
from fasterai.core.calibrate import oas_shrinkage
from fasterai.lowrank.decide import negligible, thin_layers

# ------------------------------------------------------------------ helpers

def gen(seed=0): return torch.Generator().manual_seed(seed)

SPECTRA = dict(white=lambda i: 1. + 0*i, power=lambda i: 1/(1+i), steep=lambda i: .8**i, low=lambda i: torch.where(i < 6, 1., 1e-2))

class Source:
    "Gaussian rows of a known covariance and mean"
    def __init__(self, n, kind, seed=0, mean=0.):
        Q = torch.linalg.qr(torch.randn(n, n, generator=gen(seed), dtype=torch.float64))[0]
        self.root,self.g = Q*SPECTRA[kind](torch.arange(n, dtype=torch.float64))**.5,gen(seed+100)
        self.mu = mean*torch.randn(n, generator=self.g, dtype=torch.float64)
        self.cov = self.root @ self.root.T
    def __call__(self, N): return torch.randn(N, len(self.mu), generator=self.g, dtype=torch.float64) @ self.root.T + self.mu

def linear(m, n, bias=True, seed=0):
    lin = nn.Linear(n, m, bias, dtype=torch.float64)
    U,_,V = torch.linalg.svd(torch.randn(m, n, generator=gen(seed), dtype=torch.float64), full_matrices=False)
    lin.weight.data = U*(1 + torch.arange(min(m, n)))**-.5 @ V
    if bias: lin.bias.data = torch.randn(m, generator=gen(seed+1), dtype=torch.float64)
    return lin

def truth(lin, pair, src):
    "Expected relative error of the output on fresh rows of `src`, exactly: to its deviation, without bias to itself"
    W,M = lin.weight.detach(),pair[1].weight.detach() @ pair[0].weight.detach()
    b = 0 if lin.bias is None else (lin.bias - pair[1].bias).detach()
    off = (W - M) @ src.mu + b
    norm = (W @ src.cov * W).sum() + (0 if lin.bias is not None else (W @ src.mu).square().sum())
    return (((W-M) @ src.cov * (W-M)).sum() + off.square().sum()).item()/norm.item()

def quiet(f, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kw)

def planned(m, policy, data, **kw): return quiet(FC_Decomposer(policy=policy).plan, m, data, **kw)

def said(f, *args, **kw):
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        res = f(*args, **kw)
    return res, [str(o.message) for o in got]

SHAPES = [(24, 64), (64, 24), (48, 48)]
VIEWS = dict(rows=lambda x: x, repeated=lambda x: x.repeat(20, 1), batches=lambda x: [x]*7)

# ------------------------------------------------------------------ never worse than no data

@pytest.mark.parametrize('m,n', SHAPES)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('kind,mean,view', [('white', 0., 'rows'), ('power', .3, 'batches'), ('steep', 0., 'repeated'), ('low', 1., 'rows')])
def test_few_rows_are_never_worse_than_none(m, n, bias, kind, mean, view):
    lin = linear(m, n, bias)
    for N in (1, 2, 4, 8):
        got = {k: [0., 0.] for k in (2, 8)}
        for seed in range(6):
            src = Source(n, kind, seed, mean)
            x = VIEWS[view](src(N))
            for k in got:
                got[k] = [a + truth(lin, p.apply(lin), src) for a,p in zip(got[k], (planned(lin, k, x), planned(lin, k, None)))]
        for k,(seen,plain) in got.items(): assert (seen/plain)**.5 < 1.02, (N, k, (seen/plain)**.5)

@pytest.mark.parametrize('m,n', SHAPES)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('how', [False, 'full', 'diag'])
@pytest.mark.parametrize('x', [torch.zeros(5, 64), torch.ones(5, 64), torch.randn(1, 64, generator=gen()), torch.randn(1, 64, generator=gen()).repeat(64, 1)],
                         ids=['zeros', 'ones', 'one row', 'one row again and again'])
def test_rows_that_do_not_vary_give_plain_svd(m, n, bias, how, x):
    lin,x = linear(m, n, bias),x[:,:n].double()
    seen,plain = planned(lin, 5, x, sensitivity=how),planned(lin, 5, None)
    assert seen[''].error == pytest.approx(plain[''].error, rel=1e-6) and not seen[''].weighted
    for a,b in zip(seen.apply(lin).parameters(), plain.apply(lin).parameters()): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

def test_constant_columns_are_known_to_be_constant():
    src = Source(40, 'power')
    x = torch.cat([src(400)[:,:20], torch.full((400, 20), 3., dtype=torch.float64)], 1)
    for bias in (True, False):
        lin = linear(30, 40, bias)
        p = planned(lin, 12, x)
        y,z,w = (o(x).detach() for o in (lin, p.apply(lin), planned(lin, 12, None).apply(lin)))
        assert all(t.isfinite().all() for t in p.apply(lin).parameters()) and (y-z).norm() < .8*(y-w).norm()

@pytest.mark.parametrize('N', [2, 3, 4, 8])
def test_the_error_of_few_rows_is_honest(N):
    # white inputs: the best that is possible is plain SVD, and the plan does not promise more
    for m,n in SHAPES:
        lin = linear(m, n)
        got = [planned(lin, 6, Source(n, 'white', s)(N))[''].error for s in range(6)]
        best = planned(lin, 6, None)[''].error
        assert .93*best < np.mean(got) < 1.02*best

def test_energy_of_one_row_is_that_of_the_weight():
    lin = linear(48, 48)
    for keep in (.5, .9, .99): assert planned(lin, Energy(keep), torch.randn(1, 48).double())[''].rank == planned(lin, Energy(keep), None)[''].rank

def test_repeated_rows_count_once():
    x = Source(48, 'power')(6)
    once,again,shuffled = (calibrate(linear(48, 48), o)[''] for o in (x, x.repeat(50, 1), list(x.repeat(50, 1)[torch.randperm(300, generator=gen())].split(7))))
    assert (once.rows, once.distinct, again.rows, again.distinct) == (6, 0, 300, 6)
    for o in (again, shuffled): assert (o.shrink, o.trust) == pytest.approx((once.shrink, once.trust), rel=1e-6)
    assert calibrate(linear(48, 48), torch.randint(2, (400, 48), generator=gen()).double())[''].distinct == 0     # binary rows differ
    few = torch.randint(2, (400, 3), generator=gen()).double()
    assert calibrate(linear(5, 3), few)[''].distinct == 0       # eight rows are all there are, and not equally often

def test_the_mean_is_believed_as_far_as_it_is_known():
    mu = torch.full((30,), .5, dtype=torch.float64)
    for N in (1, 2, 8, 200, 5000):
        x = torch.randn(N, 30, generator=gen(N), dtype=torch.float64) + mu
        st = calibrate(linear(20, 30), x)['']
        noise = x.var(0).sum()/N if N > 1 else torch.inf
        want = max(0., 1 - float(noise*(N+1)/max(1, N-1)/x.mean(0).square().sum())) if N > 1 else 0.
        assert st.trust == pytest.approx(want, rel=1e-9)
        lin = linear(20, 30)
        pair = planned(lin, 4, x).apply(lin)
        D = lin.weight.detach() - pair[1].weight.detach() @ pair[0].weight.detach()
        torch.testing.assert_close(pair[1].bias.detach(), lin.bias.detach() + D @ (want*x.mean(0)), rtol=0, atol=1e-9)
    assert want > .98

# ------------------------------------------------------------------ sensitivity

class Fixed(nn.Module):
    "A linear model of known sensitivity: the layer `a`, of which only a few outputs matter"
    def __init__(self, m=30, n=24):
        super().__init__()
        self.a,self.b = linear(m, n),linear(4, m, seed=3)
    def forward(self, x): return self.b(self.a(x))

@pytest.mark.parametrize('m', [16, 24, 40])
@pytest.mark.parametrize('how', ['full', 'diag'])
def test_sensitivity_of_few_rows_is_shrunk(m, how):
    net = Fixed(m)
    lam = [calibrate(net, Source(24, 'power')(N), sensitivity=how)['a'].sens_shrink for N in (1, 2, 8, 100, 3000)]
    assert lam[0] == 1 and lam == sorted(lam, reverse=True) and lam[-1] < .02

@pytest.mark.parametrize('m', [16, 40])
def test_shrunk_sensitivity_by_brute_force(m):
    net,x = Fixed(m),Source(24, 'power')(20)
    gs = []
    h = net.a.register_forward_hook(lambda l, a, y: gs.append(y) or y)
    def loss(z): return (z**2).sum()/len(z)
    st = calibrate(net, x, sensitivity='full', loss=loss)['a']
    z = net(x)
    g, = torch.autograd.grad((z**2).sum(), gs[-1])
    h.remove()
    H = g.T @ g/len(g)
    want = oas_shrinkage(20, m, H.trace().item(), (H @ H).trace().item(), centred=False)
    assert st.sens_shrink == pytest.approx(want, rel=1e-9) and st.sens_mean == pytest.approx(H.trace().item()/m, rel=1e-9)

def test_tokens_of_one_sentence_are_one_look_at_the_sensitivity():
    class Pooled(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = linear(30, 24),linear(4, 30)
        def forward(self, x): return self.b(self.a(x).tanh().mean(1))
    st = calibrate(Pooled(), Source(24, 'power')(60).reshape(2, 30, 24), sensitivity='full')
    assert (st['a'].rows, st['b'].rows) == (60, 2) and st['a'].sens_shrink > .5
    many = calibrate(Pooled(), [Source(24, 'power')(60).reshape(2, 30, 24)]*30, sensitivity='full')
    assert many['a'].sens_shrink < .2

# ------------------------------------------------------------------ budgets

def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 20)).to(dtype).eval()

@pytest.mark.parametrize('x', [torch.zeros(8, 32), torch.ones(1, 32), torch.randn(1, 32, generator=gen()).repeat(64, 1), torch.randn(2, 32, generator=gen())],
                         ids=['zeros', 'one', 'repeated', 'two'])
@pytest.mark.parametrize('ratio', [.3, .5, .7])
def test_a_budget_is_spent(x, ratio):
    m,test = mlp(),torch.randn(500, 32, generator=gen(5))
    p,plain = (planned(m, ParamBudget(ratio), d) for d in (x, None))
    total = sum(o.weight_params for o in p.layers)
    assert .95*ratio*total <= sum(o.params_after for o in p.layers) <= ratio*total
    err = lambda p: (p.apply(m)(test) - m(test)).norm()/m(test).norm()
    assert err(p) < 1.05*err(plain)

def test_an_expert_with_one_row_counts_as_if_nothing_was_known():
    class Experts(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = linear(40, 40),linear(40, 40, seed=5)
        def forward(self, x): return torch.cat([self.a(x[:-1]), self.b(x[-1:])])
    m,x = Experts(),Source(40, 'steep')(300)
    p = planned(m, ParamBudget(.5), x)
    assert p['a'].weighted and not p['b'].weighted and p['b'].error > p['a'].error
    rank = p['b'].rank
    assert rank is None or p['b'].error == pytest.approx(planned(m, rank, None)['b'].error, rel=1e-6)

# ------------------------------------------------------------------ rows that are not finite

def pairs_close(p, q, m, x, tol=.02):
    a,b = (o.apply(m)(x).detach() for o in (p, q))
    assert ((a - b).norm()/b.norm()).item() < tol

@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize('how', ['full', 'diag'])
def test_one_bad_row_leaves_the_rest_calibrated(bad, how):
    m,x = mlp(),Source(32, 'steep')(512).float()
    z = x.clone()
    z[7,3] = bad
    for batches in ([z], list(z.split(64))):
        p,texts = said(FC_Decomposer(policy=ParamBudget(.4)).plan, m, batches, sensitivity=how)
        clean = planned(m, ParamBudget(.4), x[[i for i in range(512) if i != 7]], sensitivity=how)
        assert all(o.calibrated and o.weighted for o in p.layers)
        assert any(t.startswith('1 of 512 rows is not finite and was left out') for t in texts) and not any('solver' in t for t in texts)
        assert '1 of 512 rows is not finite' in p['0'].remark
        pairs_close(p, clean, m, x, .1)

class Tokens(nn.Module):
    "Items of ten tokens that see each other"
    def __init__(self): super().__init__(); self.a,self.mix,self.head = nn.Linear(16, 24),nn.MultiheadAttention(24, 2, batch_first=True),nn.Linear(24, 12)
    def forward(self, x, attention_mask=None):
        h = self.a(x)
        h = h + self.mix(h, h, h, key_padding_mask=None if attention_mask is None else attention_mask == 0, need_weights=False)[0]
        return self.head(h)

@pytest.mark.parametrize('mask', [False, True])
def test_one_bad_token_of_a_sequence(mask):
    torch.manual_seed(0)
    m,x = Tokens().eval(),torch.randn(30, 10, 16, generator=gen())
    x[4,2] = np.nan
    batch = dict(x=x)
    if mask: batch['attention_mask'] = (torch.arange(10) < 8).long().repeat(30, 1)
    st = calibrate(m, batch, sensitivity='full')
    per = 8 if mask else 10
    assert (st['a'].rows, st['a'].dropped, st['a'].lost) == (30*per - 1, 1, per - 1)     # its neighbours have no finite gradient
    assert (st['head'].rows, st['head'].dropped, st['head'].lost) == (29*per, per, 0)
    rest = calibrate(m, {k: v[[i for i in range(30) if i != 4]] for k,v in batch.items()}, sensitivity='full')
    for n in st: assert st[n].sens.isfinite().all() and st[n].sens_mean == pytest.approx(rest[n].sens_mean, rel=.3)

def test_outputs_alone_that_overflow():
    class Exp(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(12, 20),nn.Linear(20, 20)
        def forward(self, x): y = self.a(x); return torch.exp(self.b(y) * torch.where(x[:,:1] > 50, 1e4, .1))
    torch.manual_seed(0)
    m,x = Exp(),torch.randn(200, 12, generator=gen())
    x[3,0] = 60
    p,texts = said(FC_Decomposer(policy=ParamBudget(.6)).plan, m, x)
    assert all(o.calibrated and o.weighted and np.isfinite(o.error) for o in p.layers) and not any('solver' in t for t in texts)

def test_one_of_several_outputs_is_not_finite():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(12, 20),nn.Linear(20, 20)
        def forward(self, x): y = self.a(x).tanh(); return self.b(y), y[:,:3]/(x[:,:1] != 9)
    torch.manual_seed(0)
    m,x = Two(),torch.randn(100, 12, generator=gen())
    x[5,0] = 9
    p,_ = said(FC_Decomposer(policy=ParamBudget(.6)).plan, m, list(x.split(20)))
    assert all(o.calibrated and o.weighted and np.isfinite(o.error) for o in p.layers)

@pytest.mark.parametrize('loss,lost', [(F.mse_loss, 1), (lambda z, y: F.mse_loss(z, y).log(), 20)], ids=['a row', 'its batch'])
def test_a_target_that_is_not_finite(loss, lost):
    m,x,y = mlp(),torch.randn(80, 32, generator=gen()),torch.randn(80, 20, generator=gen(1))
    y[3,0] = np.nan
    st = calibrate(m, list(zip(x.split(20), y.split(20))), sensitivity='full', loss=loss)
    fine = [i for i in range(80) if i != 3] if lost == 1 else list(range(20, 80))
    rest = calibrate(m, list(zip(x[fine].split(20), y[fine].split(20))), sensitivity='full', loss=loss)
    for n in st:
        assert (st[n].rows, st[n].dropped, st[n].lost) == (80, 0, lost)
        torch.testing.assert_close(st[n].sens, rest[n].sens, rtol=1e-5, atol=1e-9)
    with pytest.warns(UserWarning, match=f'{lost} of 80 rows? (is|are) not finite'): FC_Decomposer(policy=ParamBudget(.5)).plan(m, st)

def test_nothing_finite_is_plain_svd_by_name():
    m = mlp()
    p,texts = said(FC_Decomposer(policy=ParamBudget(.5)).plan, m, torch.full((6, 32), np.nan))
    assert any('3 layers got no finite row of data and have plain SVD: 0, 2, 4' in t for t in texts) and not any('solver' in t for t in texts)
    assert 'plain SVD: none of its 6 rows is finite' in p['0'].remark
    assert [o.rank for o in p.layers] == [o.rank for o in planned(m, ParamBudget(.5), None).layers]

# ------------------------------------------------------------------ what is said

def test_few_rows_are_said_once_and_in_the_plan():
    m = mlp()
    p,texts = said(FC_Decomposer(.25).plan, m, torch.randn(2, 32, generator=gen()))
    assert [t for t in texts if 'few rows' in t] == ['3 of 3 layers saw few rows of data for their width (2 rows for 32 inputs): their pairs are close to '
        'plain SVD. Pass more batches.']
    assert 'seen on 2 rows for 64 inputs: close to plain SVD' in p['2'].remark
    assert [o.few for o in calibrate(m, torch.randn(2, 32, generator=gen())).values()] == [True]*3

def test_a_wide_layer_and_a_spectrum_that_decays_are_no_noise():
    lin = nn.Linear(2000, 20)
    x = torch.randn(300, 10, generator=gen()) @ torch.randn(10, 2000, generator=gen(1)) + .1*torch.randn(300, 2000, generator=gen(2))
    p,texts = said(FC_Decomposer(policy=10).plan, lin, x)
    assert not texts and 'rows' not in p[''].remark

def test_thin_layers_are_said_once():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(60, 400), nn.ReLU(), nn.Linear(400, 200), nn.ReLU(), nn.Linear(200, 3))
    for f in (FC_Decomposer().plan, FC_Decomposer().decompose):
        _,texts = said(f, m)
        total = sum(p.numel() for p in m.parameters())
        assert texts == [f"1 of 3 layers loses much to save 397 parameters, {397/total:.1%} of the model (4: rank 1 of 3). To keep it dense use exclude='4'."]
    for kw in (dict(exclude='4'), dict(layers=['0', '2', '4']), dict(policy={'4': 1, '0': 10, '2': 20}), dict(policy=ParamBudget(.2))):
        assert not any('loses much' in t for t in said(FC_Decomposer(**kw).plan, m)[1])
    p = FC_Decomposer(exclude='4').plan(m).edit('4', None)
    assert not thin_layers(p) and not any(negligible(o, p.params) for o in p.layers)
    with torch.no_grad(): m[4].weight.zero_()
    assert not any('loses much' in t for t in said(FC_Decomposer().plan, m)[1])

def test_many_thin_layers_together_are_worth_their_saving():
    torch.manual_seed(0)
    m = nn.Sequential(*[nn.Linear(16, 300) if i % 2 == 0 else nn.Linear(300, 16) for i in range(60)])
    p = planned(m, .25, None)
    assert sum(negligible(o, p.params) for o in p.layers) == 60 and 0 < len(thin_layers(p)) < 6
