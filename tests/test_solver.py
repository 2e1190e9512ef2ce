"The fast route to the factors is as good as `torch.linalg.svd`, and says so when it is not"
import contextlib, warnings
import numpy as np, pytest, torch
from torch import nn
from fasterai.misc.all import *
from fasterai.lowrank.svd import gram
from fasterai.lowrank import factorize as room, svd

pytestmark = pytest.mark.filterwarnings('ignore:.*(layers grew|singular v):UserWarning')
LAPACK = torch.linalg.svd

def spectra(r):
    i = torch.arange(r, dtype=torch.float64)
    return dict(random=None, decaying=.97**i, steep=.9**i, power=1/(1 + i), low_rank=(i < r//5).double(), noise=torch.where(i < r//5, 1., 1e-3),
                ill=torch.logspace(0, -8, r, dtype=torch.float64), outlier=torch.where(i == 0, 1., 2e-3), flat=1 - 1e-6*i/r,
                step=torch.where(i < r//2, 1., .1))

KINDS,SHAPES = list(spectra(10)),[(300, 450), (450, 300), (320, 320)]

def matrix(kind, m, n, dtype):
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if (s := spectra(min(m, n))[kind]) is None: return W.to(dtype)
    U,_,Vh = LAPACK(W, full_matrices=False)
    return (U*s @ Vh).to(dtype)

def reference(W, ks):
    "Errors of the truncated SVD that torch gives in the weight's own precision (float64 where that does not converge), measured in float64"
    with contextlib.suppress(torch.linalg.LinAlgError, NotImplementedError):
        U,S,Vh = (o.double() for o in LAPACK(W, full_matrices=False))
        return [torch.norm(W.double() - U[:,:k]*S[:k] @ Vh[:k]).item() for k in ks]
    return reference(W.double(), ks)

def check(W, ks, **kw):
    norm = W.double().norm().item()
    for k,want in zip(ks, reference(W, ks)):
        A,B = factorize(W, rank=k, **kw).pair(k)
        err = torch.norm(W.double() - B.double() @ A.double()).item()
        # two factors in the precision of the weight cannot be closer than its rounding; in float64 that holds for the reference too
        slack = (4 if W.dtype == torch.float64 else 1)*torch.finfo(W.dtype).eps*norm
        assert err <= want*(1 + 1e-5) + slack, (k, err/norm, want/norm)

def ranks(r): return [1, 2, r//20, r//4, r//2, r-50, r-1, r]

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('m,n', [SHAPES[0], *(pytest.param(*o, marks=pytest.mark.slow) for o in SHAPES[1:])])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('solver', ['auto', 'gram'])
def test_error_is_that_of_torch(kind, m, n, dtype, solver): check(matrix(kind, m, n, dtype), ranks(min(m, n)), solver=solver)

@pytest.mark.parametrize('kind', ['random', 'steep', 'ill'])
@pytest.mark.parametrize('m,n', SHAPES)
def test_error_where_there_is_no_lapack(kind, m, n, monkeypatch):
    monkeypatch.setattr(svd, '_on_cpu', lambda t: False)     # what other devices do
    check(matrix(kind, m, n, torch.float32), ranks(min(m, n)), solver='gram')
    W = matrix(kind, m, n, torch.float64)
    G = W @ W.T if m <= n else W.T @ W
    torch.testing.assert_close(gram(W), G, rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('m,n', SHAPES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_singular_values_of_a_plan(kind, m, n, dtype):
    W = matrix(kind, m, n, dtype)
    lin = nn.Linear(n, m, dtype=dtype)
    lin.weight.data = W
    got = torch.tensor(FC_Decomposer().plan(lin).layers[0].spectrum)
    assert (got - torch.linalg.svdvals(W.double())).abs().max() <= 1e-6*got[0]

def test_single_precision_only_where_it_is_enough():
    i = torch.arange(320, dtype=torch.float64)
    def solver(kind, k, dtype=torch.float32): return factorize(matrix(kind, 320, 320, dtype), rank=k).solver
    assert solver('random', 160) == solver('step', 160) == solver('low_rank', 32) == solver('decaying', 40) == 'gram32'
    assert solver('steep', 160) == solver('noise', 160) == solver('ill', 160) == solver('random', 320) == 'gram64'
    assert solver('random', 160, torch.float64) == 'svd'
    # the excess that decides is no guess: in single precision alone these are off by far more than 1e-5
    W = matrix('ill', 320, 320, torch.float32)
    e,Q = room._top(room._lower_gram(W, torch.float32), 160)
    lost = torch.norm(W.double() - Q.double() @ (Q.double().T @ W.double())) / torch.linalg.svdvals(W.double())[160:].norm()
    assert lost > 1 + 1e-3 and room._by_gram(W, 160, torch.float32) is False

@pytest.mark.parametrize('kind', ['random', 'step', 'power', 'decaying', 'outlier', 'noise'])
@pytest.mark.parametrize('k', [3, 40, 160, 280])
def test_excess_bounds_what_is_lost(kind, k):
    W = matrix(kind, 320, 400, torch.float32)
    e,Q = room._top(room._lower_gram(W, torch.float32), k)
    S = e.double().clamp(min=0).sqrt()
    excess = room._probe(W, Q, S)[2]*S.square().sum()
    U = torch.linalg.qr(Q.double()).Q
    W,best = W.double(),torch.linalg.svdvals(W.double())[k:].square().sum()
    assert torch.norm(W - U @ (U.T @ W)).square() - best <= excess + 1e-13*W.norm().square()

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('r', [3, 4, 33, 200])
def test_eigenvectors_against_torch(r, dtype):
    X = torch.randn(r, 2*r, dtype=dtype, generator=torch.Generator().manual_seed(0))
    G = X @ X.T
    e,V = torch.linalg.eigh(G.double())
    for k in {1, r//2, r}:
        got,Q = room._top(torch.tril(G), k)     # only the lower triangle is read
        assert Q.shape == (r, k) and Q.dtype == dtype
        tol = 20*r*torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), e.flip(0), rtol=0, atol=tol*e[-1].item())
        P,want = Q.double() @ Q.double().T,V[:,-k:] @ V[:,-k:].T
        gap = (e[-k] - e[-k-1] if k < r else e[-1])/e[-1]
        assert torch.norm(P - want) <= tol/gap

def test_room_may_hold_anything():
    G = gram(torch.randn(40, 60))
    for k in (1, 7, 40):
        e,Q = room._top(G.clone(), k, torch.full((40*k + 1,), float('nan'), dtype=torch.float64))
        torch.testing.assert_close(G @ Q, Q*e[:k], rtol=0, atol=1e-12*e[0].item())

@pytest.mark.parametrize('m,n', SHAPES)
def test_fewer_directions_are_the_first_of_all(m, n):
    W = matrix('decaying', m, n, torch.float32)
    all_,few = factorize(W),factorize(W, rank=20)
    assert few.L.shape == (300 if 300 in (m, n) else 320, 20) and len(few.S) == min(m, n)
    for a,b in zip(all_.pair(20), few.pair(20)): torch.testing.assert_close(a, b, rtol=0, atol=2e-5*a.abs().max().item())
    with pytest.raises(ValueError, match='rank must be between 1 and 20, the number of directions, got 21'): few.pair(21)

@pytest.mark.parametrize('rank', [0, -1, 321])
def test_ranks_out_of_range(rank):
    with pytest.raises(ValueError, match=rf'rank must be between 1 and 320 for a weight \(320, 450\), got {rank}'):
        factorize(torch.randn(320, 450), rank=rank)

@pytest.mark.parametrize('precision', ['medium', 'high'])
def test_lower_precision_and_autocast_do_not_reach_the_factors(precision):
    W = matrix('decaying', 320, 450, torch.float32)
    want,before = factorize(W, rank=40).pair(40),torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast('cpu', torch.bfloat16): got = factorize(W, rank=40).pair(40)
        assert torch.get_float32_matmul_precision() == precision
    finally: torch.set_float32_matmul_precision(before)
    assert all(map(torch.equal, want, got))

@pytest.mark.parametrize('order', ['rows', 'columns', 'slice'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('m,n', SHAPES)
def test_weights_of_any_layout(order, dtype, m, n):
    W = matrix('decaying', m, n, dtype)
    laid = dict(rows=lambda: W, columns=lambda: W.T.contiguous().T, slice=lambda: torch.cat([W, W], 1)[:,:n])[order]()
    assert torch.equal(laid, W)
    torch.testing.assert_close(gram(laid), (W.double() @ W.double().T) if m <= n else (W.double().T @ W.double()), rtol=1e-12, atol=1e-12)
    check(laid, [5, 100], solver='gram')

def test_threads_of_scipy_are_those_of_torch(monkeypatch):
    seen,limits = [],svd.threadpool_limits
    monkeypatch.setattr(svd, 'threadpool_limits', lambda *args: seen.append(args) or limits(*args))
    factorize(matrix('random', 320, 450, torch.float32), rank=5)
    assert seen and set(seen) == {(torch.get_num_threads(), 'blas')}

# ------------------------------------------------------------------ block Krylov

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('m,n', SHAPES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64], ids=str)
def test_krylov_is_one_percent_off_at_most(kind, m, n, dtype):
    W = matrix(kind, m, n, dtype)
    S = torch.linalg.svdvals(W.double())
    for k in (1, 5, 9):
        b = factorize(W, rank=k, solver='krylov')
        A,B = (o.double() for o in b.pair(k))
        want,rounding = S[k:].norm(),torch.finfo(dtype).eps*W.double().norm()
        assert torch.norm(W.double() - B @ A) <= 1.01*want + rounding
        assert b.L.shape[1] == len(b.S) == k and len(b.errors) == k + 1
        if b.solver == 'krylov': assert b.errors[k] == pytest.approx((torch.norm(W.double() - B @ A)/S.norm()).item(), rel=1e-3, abs=1e-3)
        else: assert (S[k:].norm()/S.norm()) < 1e-2        # hardly anything is cut off, which rounding hides

def test_krylov_is_auto_where_it_is_no_faster():
    W = matrix('power', 320, 450, torch.float32)
    assert [factorize(W, rank=k, solver='krylov').solver for k in (10, 11)] == ['krylov', 'gram32']
    assert factorize(W, solver='krylov').solver == 'gram64' and factorize(W[:256], rank=1, solver='krylov').solver == 'svd'
    assert torch.equal(spectrum(W, solver='krylov'), spectrum(W))

def test_krylov_gone_wrong_falls_back(monkeypatch):
    W,qr = matrix('power', 320, 450, torch.float32),torch.linalg.qr
    for bad in (lambda o: 1.01*o, lambda o: torch.full_like(o, float('nan'))):
        monkeypatch.setattr(torch.linalg, 'qr', lambda A, bad=bad: torch.return_types.linalg_qr((bad(qr(A).Q), A)))
        with pytest.warns(UserWarning, match="by solver='krylov' failed or did not pass"): assert factorize(W, rank=9, solver='krylov').solver == 'gram32'

def test_krylov_that_does_not_settle_falls_back(monkeypatch):
    monkeypatch.setattr(room, '_KRYLOV', (8, 1, 5e-3))
    with pytest.warns(UserWarning, match="by solver='krylov' failed or did not pass"):
        assert factorize(matrix('decaying', 320, 450, torch.float32), rank=9, solver='krylov').solver == 'gram32'

def test_decompose_by_krylov():
    m = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 20))
    fc = FC_Decomposer(policy={'0': 9, '2': 5})
    plain,fast = fc.decompose(m),fc.decompose(m, solver='krylov')
    loss = [torch.norm(m[0].weight - o[0][1].weight @ o[0][0].weight) for o in (plain, fast)]
    assert loss[0] < loss[1] <= 1.01*loss[0] and all(map(torch.equal, plain[2].parameters(), fast[2].parameters()))
    again = fc.plan(m).apply(m, solver='krylov')
    assert all(map(torch.equal, again.parameters(), fast.parameters()))
    with pytest.raises(ValueError, match='solver must be .* got 3'): fc.decompose(m, solver=3, inplace=True)
    assert isinstance(m[0], nn.Linear)

# ------------------------------------------------------------------ weights of any size

@pytest.mark.parametrize('dtype,size', [(torch.float32, 3e38), (torch.float32, 1e30), (torch.float32, 1e-30), (torch.float32, 1e-42), (torch.bfloat16, 3e38),
    (torch.bfloat16, 1e-39), (torch.float16, 6e4), (torch.float16, 1e-6), (torch.float64, 1.7e308), (torch.float64, 1e200), (torch.float64, 1e-310)], ids=str)
@pytest.mark.parametrize('m,n', [(60, 90), (300, 280)])
def test_weights_near_the_ends_of_their_dtype(dtype, size, m, n):
    W = (torch.rand(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)*2 - 1)
    W = (W*size).to(dtype)
    assert W.isfinite().all() and W.any()
    lin = nn.Linear(n, m, bias=False, dtype=dtype)
    lin.weight.data = W
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plan = FC_Decomposer(policy=m//4).plan(lin)
        A,B = (p.detach().double() for p in plan.apply(lin).parameters())
    assert A.isfinite().all() and B.isfinite().all()
    V = W.double()*size**-.5*size**-.5
    S = torch.linalg.svdvals(V)
    best = (S[m//4:].norm()/S.norm()).item()
    assert plan[''].error == pytest.approx(best, rel=1e-5)
    err = (torch.norm(V - (B*size**-.5) @ (A*size**-.5))/V.norm()).item()
    assert best*(1 - 1e-6) <= err <= best*1.001 + 2*torch.finfo(dtype).eps

def test_a_size_in_the_middle_changes_no_bit():
    W = torch.randn(300, 320, generator=torch.Generator().manual_seed(0))
    a,b = factorize(W, rank=20),factorize(W*2**-8, rank=20)
    assert a.scale == b.scale == 1 and factorize(W*2.**100, rank=20).scale > 1

@pytest.mark.parametrize('k', [1, 75, 300])
def test_matrices_that_a_gram_matrix_cannot_tell_give_no_warning(k):
    i = torch.arange(300.)
    for W in (1/(i[:,None] + i + 1), torch.ones(300, 300), torch.randn(3, 300).repeat(100, 1)):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            A,B = factorize(W, rank=k).pair(k)
        S = torch.linalg.svdvals(W.double())
        assert torch.norm(W.double() - B.double() @ A.double()) <= S[k:].norm()*(1 + 1e-5) + 5e-6*S.norm()
