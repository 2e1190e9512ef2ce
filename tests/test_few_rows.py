"What few, repeated, constant or broken rows may do to a model: nothing worse than no data at all; and what is said about it"
import warnings
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from fasterai.misc.all import *
from fasterai.lowrank.plan import negligible, thin_layers

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
