"Prices and compensation against lstsq on raw rows, brute force, and networks in which units are redundant"
from functools import partial
import copy, warnings
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn
from fasterai.core.inputs import collect_inputs
from fasterai.prune.compensate import compensate
from fasterai.prune.groups import find_groups
from fasterai.prune.prices import SCORES, price_units, reader_inputs
from fasterai.prune.pruner import Pruner
from fasterai.prune.refit import _correction, refit_layers
from fasterai.prune.renorm import move_norms
from fasterai.prune.repair import explain, factored, norms_after, repaired
from fasterai.prune.slicing import slice_units
from fasterai.prune.units import Group, Member
from test_distributed import run

Cut = partial(Pruner, score='magnitude', compensate=False)   # without looking at data

D = torch.float64

def randn(*shape, seed=0, dtype=D): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)
def close(a, b, tol=1e-6): torch.testing.assert_close(a, b, rtol=tol, atol=tol)
def mixed(N, n, k=None, seed=0): return randn(N, k or n, seed=seed) @ randn(k or n, n, seed=seed+1)
def rel(a, b): return float((a - b).norm()/b.norm())

def pair(n, w=None, readers=1):
    "Neurons '0' and layers that read them"
    ix = tuple((i,) for i in range(n))
    return Group('0', n, (Member('0', 'out', ix), Member('2', 'in', ix)), 'neurons')

def mlp(n_in=5, n=8, out=3, seed=0, dtype=D):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(n_in, n), nn.Tanh(), nn.Linear(n, out)).to(dtype).eval().requires_grad_(False)

def conv_net(seed=0, dtype=D, bias=False, norm=True, width=8, pool=True):
    torch.manual_seed(seed)
    def block(i, o): return [nn.Conv2d(i, o, 3, padding=1, bias=bias), *([nn.BatchNorm2d(o)] if norm else []), nn.ReLU()]
    net = nn.Sequential(*block(3, width), *block(width, width), nn.Conv2d(width, 4, 1, bias=bias), *([nn.BatchNorm2d(4)] if norm else []),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(dtype)
    for i in range(10): net(smooth(32, seed=i, dtype=dtype))
    return net.eval().requires_grad_(False)

def smooth(n, size=8, seed=0, dtype=D):
    "Images whose pixels are not independent"
    x = nn.functional.interpolate(randn(n, 3, 3, 3, seed=seed), size=size, mode='bilinear')
    return (x + .1*randn(n, 3, size, size, seed=seed+100)).to(dtype)

class Residual(nn.Module):
    "Two blocks and a stream that three layers write to"
    def __init__(self, w=8):
        super().__init__()
        self.stem,self.n0 = nn.Conv2d(3, w, 3, padding=1, bias=False),nn.BatchNorm2d(w)
        self.c1,self.c2 = (nn.Conv2d(w, w, 3, padding=1, bias=False) for _ in range(2))
        self.n1,self.n2 = nn.BatchNorm2d(w),nn.BatchNorm2d(w)
        self.c3,self.n3 = nn.Conv2d(w, w, 1, bias=False),nn.BatchNorm2d(w)
        self.fc = nn.Linear(w, 4)
    def forward(self, x):
        x = self.n0(self.stem(x)).relu()
        x = (x + self.n2(self.c2(self.n1(self.c1(x)).relu()))).relu()
        x = (x + self.n3(self.c3(x))).relu()
        return self.fc(x.mean((2, 3)))

def residual(seed=0, dtype=D):
    torch.manual_seed(seed)
    net = Residual().to(dtype)
    for i in range(10): net(smooth(32, seed=i, dtype=dtype))
    return net.eval().requires_grad_(False)

# ------------------------------------------------------------------ least squares

def test_is_least_squares_on_the_raw_rows():
    x,keep = mixed(4000, 8) + 2,[0, 2, 3, 6]
    fc = nn.Linear(8, 5).double().requires_grad_(False)
    m = collect_inputs(nn.Sequential(fc), x)['0']
    W,c = repaired(fc, m, keep, centred=True)
    want = torch.linalg.lstsq(torch.cat([x[:, keep], torch.ones(4000, 1)], 1), fc(x)).solution
    def loss(W, b): return float((x[:, keep] @ W.T + b - fc(x)).square().sum())
    assert loss(W, c + fc.bias) < loss(want[:4].T, want[4])*(1 + 1e-4)
    close(W, want[:4].T, .02)

def test_without_a_bias_moments_about_zero():
    x,keep = mixed(4000, 8) + 2,[0, 2, 3, 6]
    fc = nn.Linear(8, 5, bias=False).double().requires_grad_(False)
    W,c = repaired(fc, collect_inputs(nn.Sequential(fc), x)['0'], keep, centred=False)
    want = torch.linalg.lstsq(x[:, keep], fc(x)).solution.T
    assert not c.any() and float((x[:, keep] @ (W - want).T).norm()/fc(x).norm()) < .02

@pytest.mark.parametrize('shrink', [0., .01, .3])
def test_shrinkage_is_that_of_augmented_rows(shrink):
    "With few rows, the shrinkage stays: the same as lstsq with rows added"
    x,keep = mixed(6, 8),[0, 1, 2, 3, 4]
    x -= x.mean(0)
    A = explain(x.T @ x/6, keep, shrink=shrink or 1e-10, rows=6)
    C = x.T @ x/6
    lam = shrink or 1e-10
    rows = torch.cat([(1-lam)**.5*x/6**.5, (lam*C.diagonal().mean())**.5*torch.eye(8, dtype=D)])
    if shrink: close(A[5:], torch.linalg.lstsq(rows[:, keep], rows[:, 5:]).solution.T, 1e-8)
    close(A[keep], torch.eye(5, dtype=D))

def test_a_twin_is_repaired_exactly():
    net,x = mlp(n=12),randn(800, 5, seed=3)
    net[0].weight[4],net[0].bias[4] = net[0].weight[9],net[0].bias[9]
    kept = {'0': [i for i in range(12) if i != 4]}
    assert rel(compensate(net, kept, x, groups=[pair(12)])(x), net(x)) < 1e-6
    assert rel(slice_units(net, [pair(12)], kept)(x), net(x)) > 1e-2

def test_rank_deficient_inputs_are_repaired_exactly():
    "Eight hidden units in five dimensions"
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 8), nn.Identity(), nn.Linear(8, 3)).double().requires_grad_(False)
    x = randn(500, 5)
    assert rel(compensate(net, {'0': [0, 2, 3, 5, 7]}, x, groups=[pair(8)])(x), net(x)) < 1e-5
    p = price_units(net, [pair(8)], x)['0']
    assert p.loss[3] < 1e-2 < p.loss[4]         # three can go, a fourth cannot
    assert rel(compensate(net, {'0': p.kept(5)}, x, groups=[pair(8)])(x), net(x)) < 1e-5

def test_wide_layers_look_at_one_unit_at_a_time(monkeypatch):
    "Three inputs for each unit: the first losses are those of the whole inverse, also where a unit lies in two blocks; the rest are no less"
    from fasterai.prune import prices
    torch.manual_seed(0)
    C = torch.cov((randn(400, 24) @ randn(24, 24, seed=1)).T).double()
    R,P = randn(5, 24, seed=2).double(),torch.linalg.inv(C)
    index = torch.arange(24).view(8, 3).tolist()
    close(prices._losses(R, prices._by_unit([P], index)), prices._unit_losses(R, P, 8), 1e-9)
    parts = [torch.linalg.inv(C[i:j, i:j]) for i,j in ((0, 10), (10, 24))]
    close(prices._losses(R, prices._by_unit(parts, index)), prices._unit_losses(R, torch.block_diag(*parts), 8), 1e-9)
    whole,apart = (prices._order([o], 8) for o in ((R, P), (prices._losses(R, prices._by_unit([P], index)), None)))
    assert whole[0][0] == apart[0][0] and whole[1][1] == pytest.approx(apart[1][1])
    net,x = mlp(),randn(300, 5)
    monkeypatch.setattr(prices, '_WIDE', 4)
    p = price_units(net, [pair(8)], x)['0']
    assert sorted(p.order) == [*range(8)] and (np.diff(p.loss) >= 0).all()

def test_unread_units_cost_nothing():
    net,x = mlp(),randn(300, 5)
    net[2].weight[:, [1, 6]] = 0
    p = price_units(net, [pair(8)], x)['0']
    assert {*p.order[:2]} == {1, 6} and p.loss[2] < 1e-12
    close(compensate(net, {'0': p.kept(6)}, x, groups=[pair(8)], refit=False)(x), net(x))

def test_a_block_without_survivors(monkeypatch):
    "Of 12 inputs in blocks of 4, all that stay are in one: means of the others go to the bias, and nothing is predicted across blocks"
    from fasterai.prune import repair
    net,x = mlp(n=12),randn(400, 5)
    h = net[1](net[0](x)).double()
    C = torch.cov(h.T)
    class Apart:
        blocks,mean,shrink,independent = [C[i:i+4, i:i+4] for i in (0, 4, 8)],h.mean(0),0.,400
    W,c = repair.repaired(net[2], Apart, [0, 2], centred=True)
    A = torch.linalg.lstsq((h - h.mean(0))[:, [0, 2]], (h - h.mean(0))[:, :4]).solution.T
    want = net[2].weight.double()[:, :4] @ A
    close(W, want, 1e-6)
    close(h[:, [0, 2]].mean(0) @ W.T + c, h.mean(0) @ net[2].weight.double().T, 1e-8)

# ------------------------------------------------------------------ prices

def brute(net, x, gone, H):
    "Least loss without the units `gone`, weighted with H, by lstsq on the hidden rows"
    h = net[1](net[0](x))
    h = h - h.mean(0)
    keep = [i for i in range(h.shape[1]) if i not in gone]
    y = h @ net[2].weight.T
    e = y - h[:, keep] @ torch.linalg.lstsq(h[:, keep], y).solution
    return float(((e @ H)*e).sum()/len(x))

def test_curve_is_brute_force_over_all_removals():
    net,x = mlp(),randn(20000, 5, seed=5)
    ins = reader_inputs(net, [pair(8)], x, sensitivity=True)
    ins.layers["2"] = replace(ins["2"], shrink=0.)
    p,H = price_units(net, [pair(8)], x, inputs=ins)['0'],ins.sens['2']
    singles = [brute(net, x, [r], H) for r in range(8)]
    assert p.order[0] == int(np.argmin(singles))
    for i in range(1, 8):
        done = list(p.order[:i-1])
        rest = {r: brute(net, x, done + [r], H) for r in range(8) if r not in done}
        assert p.order[i-1] == min(rest, key=rest.get)
        np.testing.assert_allclose(p.loss[i], rest[p.order[i-1]], rtol=1e-4)
    assert (np.diff(p.loss) >= 0).all() and p.loss[0] == 0 and sorted(p.order) == [*range(8)] and len(p.loss) == 9

def test_the_price_is_the_share_of_the_output_that_is_lost():
    net,x = mlp(n=16),randn(5000, 5, seed=5)
    p = price_units(net, [pair(16)], x)['0']
    small = compensate(net, {'0': p.kept(6)}, x, groups=[pair(16)], refit=False)
    y = net(x)
    lost = float((small(x) - y).square().sum()/(y - y.mean(0)).square().sum())
    assert .9*p.loss[10] < lost < 1.1*p.loss[10]

def test_heads_go_as_a_whole():
    "Units of four inputs: the cost of a block by brute force"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)).double().requires_grad_(False)
    ix = tuple(tuple(range(4*u, 4*u+4)) for u in range(3))
    g,x = Group('0', 3, (Member('0', 'out', ix), Member('2', 'in', ix)), 'heads'),randn(20000, 5)
    ins = reader_inputs(net, [g], x, sensitivity=True)
    p = price_units(net, [g], x, inputs=ins)['0']
    each = [brute(net, x, ix[u], ins.sens['2']) for u in range(3)]
    assert p.order[0] == int(np.argmin(each))
    np.testing.assert_allclose(p.loss[1], min(each), rtol=.05)

def test_several_readers_add_up():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c = nn.Linear(5, 8),nn.Linear(8, 3),nn.Linear(8, 2)
        def forward(self, x):
            h = self.a(x).tanh()
            return torch.cat([self.b(h), self.c(h)], 1)
    torch.manual_seed(0)
    net,x = Two().double().requires_grad_(False),randn(3000, 5)
    ix = tuple((i,) for i in range(8))
    g = Group('a', 8, (Member('a', 'out', ix), Member('b', 'in', ix), Member('c', 'in', ix)), 'neurons')
    one = mlp()
    one[0].weight.copy_(net.a.weight), one[0].bias.copy_(net.a.bias)
    one[2] = nn.Linear(8, 5).double().requires_grad_(False)
    one[2].weight.copy_(torch.cat([net.b.weight, net.c.weight])), one[2].bias.copy_(torch.cat([net.b.bias, net.c.bias]))
    H = {n: torch.eye(k, dtype=D) for n,k in (('b', 3), ('c', 2), ('2', 5))}
    both,single = reader_inputs(net, [g], x),reader_inputs(one, [pair(8)], x)
    both.sens,single.sens = {k: H[k] for k in 'bc'},{'2': H['2']}
    p,q = price_units(net, [g], x, inputs=both)['a'],price_units(one, [pair(8)], x, inputs=single)['0']
    assert p.order == q.order
    np.testing.assert_allclose(p.loss, q.loss, rtol=1e-8)

@pytest.mark.parametrize('score', SCORES)
def test_scores(score):
    net,x = conv_net(),smooth(64)
    gs = find_groups(net, x[:2])
    a,b = (price_units(net, gs, x, score=score) for _ in range(2))
    assert a.keys() == {g.name for g in gs if not g.reason} and a.score == score
    for n,p in a.items():
        assert p.order == b[n].order and (p.loss == b[n].loss).all() and np.isfinite(p.loss).all() and (np.diff(p.loss) >= 0).all()
        assert len({*p.order}) == p.group.units == len(p.loss) - 1

def test_magnitude_wanda_and_taylor_by_loops():
    net,x = mlp(),randn(50, 5)
    h = net[1](net[0](x))
    want = {'magnitude': [float(net[0].weight[i].square().sum() + net[2].weight[:, i].square().sum()) for i in range(8)],
            'wanda': [float(net[2].weight[:, i].square().sum()*h[:, i].square().mean()) for i in range(8)]}
    for score,w in want.items():
        p = price_units(net, [pair(8)], x, score=score)['0']
        assert list(p.order) == np.argsort(w).tolist()
        np.testing.assert_allclose(np.diff(p.loss), np.sort(w)/(np.mean(w) if score == 'magnitude' else 1), rtol=1e-6)
    v = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    ref = copy.deepcopy(net).requires_grad_()
    (ref(x)*v).sum().backward()
    a,b = ((m.weight*m.weight.grad).square() for m in (ref[0], ref[2]))
    w = (a.sum(1) + b.sum(0)).detach()
    assert list(price_units(net, [pair(8)], x, score='taylor')['0'].order) == w.argsort().tolist()
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())

def test_bad_arguments():
    net,x = mlp(),randn(20, 5)
    with pytest.raises(ValueError, match="score must be one of 'obs'"): price_units(net, [pair(8)], x, score='l1')
    with pytest.raises(ValueError, match="score='wanda' looks at activations: pass data="): price_units(net, [pair(8)], score='wanda')
    with pytest.raises(ValueError, match='1 to 8 can stay, got 0'): price_units(net, [pair(8)], score='magnitude')['0'].kept(0)
    with pytest.raises(ValueError, match='compensate needs data'): compensate(net, {'0': [0]}, None, groups=[pair(8)])
    with pytest.raises(ValueError, match='belong to groups: pass groups='): compensate(net, {'0': [0]}, x)
    with pytest.raises(ValueError, match='at least one'): compensate(net, {'0': []}, x, groups=[pair(8)])
    net[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="'2' is not finite"): price_units(net, [pair(8)], x)
    with pytest.raises(ValueError, match="the weight of '2' is not finite"): compensate(net, {'0': [0]}, x, groups=[pair(8)])

# ------------------------------------------------------------------ convolutions and batch norms

def test_pixelwise_least_squares_by_loops():
    "A 1×1 reader is plain least squares over pixels; a kernel predicts each entry from the same pixel"
    net,x = conv_net(norm=False, bias=True),smooth(64)
    g = find_groups(net, x[:2])[0]
    keep = [0, 2, 3, 5, 6]
    ins = reader_inputs(net, [g], x)
    W,c = repaired(net[2], ins['2'], keep, centred=True)
    h = net[1](net[0](x)).transpose(0, 1).flatten(1).T
    mu,hc = h.mean(0),h - h.mean(0)
    A = torch.linalg.lstsq(hc[:, keep], hc).solution.T      # (8, 5)
    close(W, torch.einsum('mnab,nk->mkab', net[2].weight, A), 1e-2)
    close(c, net[2].weight.sum((2, 3)) @ (mu - A @ mu[keep]), 1e-2)

@pytest.mark.parametrize('refit', [False, True])
@pytest.mark.parametrize('build', [conv_net, residual])
def test_a_twin_channel_goes_without_loss(build, refit):
    "Mean to the batch norm, no bias anywhere; borders are padded with zeros"
    net,x = build(),smooth(128, seed=4)
    groups = [g for g in find_groups(net, x[:2]) if not g.reason]
    for g in groups:
        dense = copy.deepcopy(net)
        for o in g.members:
            m = dense.get_submodule(o.layer)
            if o.side == 'in': continue
            for t in (m.weight, m.bias, getattr(m, 'running_mean', None), getattr(m, 'running_var', None)):
                if t is not None: t[5] = t[1]
        kept = {g.name: [i for i in range(g.units) if i != 5]}
        small = compensate(dense, kept, x, groups=[g], refit=refit)
        assert rel(small(x), dense(x)) < 1e-6, g.name
        assert rel(small(smooth(32, seed=9)), dense(smooth(32, seed=9))) < 1e-6, g.name

def test_a_constant_channel_is_exact_inside_and_known_at_the_border():
    "What is missing there is the part of the kernel that saw the padding"
    net,x = conv_net(norm=False, bias=True),smooth(64)
    net[0].weight[5],net[0].bias[5] = 0,2.
    g = find_groups(net, x[:2])[0]
    kept = {g.name: [i for i in range(8) if i != 5]}
    once = compensate(net, kept, x, groups=[g], refit=False)
    lost = once[:3](x) - net[:3](x)
    ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
    inside = nn.functional.conv2d(ones, 2*net[2].weight[:, 5:6], padding=1)     # what the channel gave
    close(lost, (2*net[2].weight[:, 5].sum((1, 2))[:, None, None] - inside[0]).expand_as(lost), 1e-6)
    assert lost[..., 1:-1, 1:-1].abs().max() < 1e-6 < .01 < lost.abs().max()
    full = compensate(net, kept, x, groups=[g])
    assert rel(full[:3](x), net[:3](x)) < .7*rel(once[:3](x), net[:3](x))

def test_each_step_brings_a_residual_network_closer():
    net,x,test = residual(),smooth(256, seed=4),smooth(128, seed=5)
    groups = [g for g in find_groups(net, x[:2]) if not g.reason]
    assert len(groups) == 2         # the width of the stream, and that inside of the block
    for score in ('magnitude', 'random', 'obs'):
        kept = price_units(net, groups, x, score=score).kept({g.name: 5 for g in groups})
        steps = dict(refit=False, renorm=False),dict(refit=False),{}
        small = [slice_units(net, groups, kept), *[compensate(net, kept, x, groups=groups, **k) for k in steps]]
        err = [rel(m(test), net(test)) for m in small]
        assert err[3] < 1.1*err[2] < 1.2*err[1] < err[0], (score, err)

def test_norms_after():
    pairs = norms_after(residual(), lambda m: m(smooth(2)))
    assert pairs == dict(stem='n0', c1='n1', c2='n2', c3='n3')

def test_moved_norms_match_the_dense_ones():
    "Each channel of the copy has the mean and the variance that it has in the dense network"
    net,x = residual(),smooth(128, seed=4)
    groups = [g for g in find_groups(net, x[:2]) if not g.reason]
    kept = {g.name: [0, 2, 3, 5, 6] for g in groups}
    small = compensate(net, kept, x, groups=groups, refit=False)
    for n in ('n0', 'n1', 'n2', 'n3'):
        out = {}
        for m in (net, small):
            h = m.get_submodule(n).register_forward_hook(lambda m, a, y: out.setdefault('y', []).append(y.transpose(0, 1).flatten(1)))
            m(x)
            h.remove()
        y,z = out['y']
        close(z.mean(1), y[[0, 2, 3, 5, 6]].mean(1), 1e-8)
        close(z.std(1), y[[0, 2, 3, 5, 6]].std(1), 1e-6)

def test_a_dense_network_keeps_its_norms():
    net,x = residual(),smooth(64, seed=11)*3 + 1       # data unlike those it was trained on
    same = copy.deepcopy(net)
    move_norms(same, net, list(x.split(20)))
    close(same(x), net(x), 1e-8)

# ------------------------------------------------------------------ refit

def test_the_correction_is_ridge_regression_or_nothing():
    x,D0 = randn(400, 6),randn(3, 6, seed=1)
    t = x @ D0.T + 2 + .05*randn(400, 3, seed=2)
    D1,d = _correction(x, t, True)
    assert rel(D1, D0) < .1 and rel(d, torch.full((3,), 2., dtype=D)) < .1
    got = _correction(x, randn(400, 3, seed=3), True)      # noise: nothing, or nearly nothing
    assert got is None or got[0].norm() < .2
    assert _correction(x[:1], t[:1], True) is None

def test_refit_changes_nothing_where_nothing_was_lost():
    net,x = residual(),smooth(64)
    same = copy.deepcopy(net)
    assert refit_layers(same, net, x, norms_after(net, lambda m: m(x[:2]))) == ['stem', 'c1', 'c2', 'c3']
    close(same(x), net(x), 1e-9)

def test_refit_in_batches_is_that_of_one_batch_of_all_rows():
    net,x = residual(),smooth(64)
    norms = norms_after(net, lambda m: m(x[:2]))
    res = []
    for data in (x, list(x.split(16))):
        m = copy.deepcopy(net)
        m.n0.weight.mul_(torch.linspace(.5, 1.5, 8))
        refit_layers(m, net, data, norms)
        res.append(m(x))
    assert rel(res[1], res[0]) < .1 and rel(res[0], net(x)) < .2

class Tokens(nn.Module):
    "A stream of tokens with two neural blocks, padding and a mask"
    def __init__(self, d=12, h=24):
        super().__init__()
        self.up1,self.down1,self.up2,self.down2 = nn.Linear(d, h),nn.Linear(h, d),nn.Linear(d, h),nn.Linear(h, d)
        self.norm1,self.norm2,self.drop = nn.LayerNorm(d),nn.LayerNorm(d),nn.Dropout(.5)
    def forward(self, x, attention_mask=None):
        x = self.norm1(x + self.drop(self.down1(nn.functional.gelu(self.up1(x)))))
        return self.norm2(x + self.drop(self.down2(nn.functional.gelu(self.up2(x)))))

def test_streams_are_corrected_behind_the_sum():
    torch.manual_seed(0)
    net,x = Tokens().eval().requires_grad_(False),mixed(64*10, 12).float().view(64, 10, 12)/3
    test = x[:32].clone()
    mask = torch.arange(10) < torch.randint(4, 11, (64, 1))
    x[~mask] = torch.nan        # padding holds anything
    groups = [g for g in find_groups(net, dict(x=test[:2])) if not g.reason]
    kept = price_units(net, groups, score='magnitude').kept({g.name: 12 for g in groups})
    data = [dict(x=a, attention_mask=b) for a,b in zip(x.split(16), mask.split(16))]
    once,full = (compensate(net, kept, data, groups=groups, refit=r) for r in (False, True))
    assert rel(full(test), net(test)) < rel(once(test), net(test)) < rel(slice_units(net, groups, kept)(test), net(test))

# ------------------------------------------------------------------ contracts

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, D])
def test_the_dense_model_is_left_alone(dtype):
    net,x = residual(dtype=torch.float32).to(dtype),smooth(64, dtype=dtype)
    net.c1.weight.requires_grad_()
    net.train()
    groups = [g for g in find_groups(net, x[:2]) if not g.reason]
    state,flags,rng = copy.deepcopy(net.state_dict()),[p.requires_grad for p in net.parameters()],torch.get_rng_state()
    kept = price_units(net, groups, x).kept({g.name: 4 for g in groups})
    small = compensate(net, kept, x, groups=groups)
    assert all(torch.equal(v, state[k]) for k,v in net.state_dict().items()) and torch.equal(rng, torch.get_rng_state())
    assert [p.requires_grad for p in net.parameters()] == flags == [p.requires_grad for p in small.parameters()]
    assert net.training and small.training and not any(m._forward_hooks or m._forward_pre_hooks for n in (net, small) for m in n.modules())
    assert {t.dtype for t in small.state_dict().values() if t.is_floating_point()} == {dtype}
    assert not {t.data_ptr() for t in small.state_dict().values()} & {t.data_ptr() for t in net.state_dict().values()}
    assert all(t.untyped_storage().nbytes() == t.numel()*t.element_size() for t in small.state_dict().values())
    small.eval()(x).sum().backward()

def test_same_input_same_bits():
    net,x = residual(),smooth(64)
    groups = [g for g in find_groups(net, x[:2]) if not g.reason]
    kept = {g.name: [0, 1, 4, 6] for g in groups}
    a,b = (compensate(net, kept, list(x.split(16)), groups=groups) for _ in range(2))
    assert all(torch.equal(u, v) for u,v in zip(a.state_dict().values(), b.state_dict().values()))

def test_units_of_no_group_and_all_units():
    net,x = residual(),smooth(16)
    groups = find_groups(net, x[:2])
    for kept in ({}, {groups[0].name: range(8)}): assert torch.equal(compensate(net, kept, x, groups=groups)(x), net(x))

@pytest.mark.parametrize('rows', [1, 3])
def test_few_rows(rows):
    net,x = mlp(n=16),randn(500, 5)
    kept = {'0': list(range(10))}
    with pytest.warns(UserWarning, match=f"few rows for what '2' reads \\({rows} of 16 features"):
        small = compensate(net, kept, x[:rows], groups=[pair(16)])
    assert small(x).isfinite().all()
    p = price_units(net, [pair(16)], x[:rows])['0']
    assert np.isfinite(p.loss).all() and len(p.order) == 16

@pytest.mark.parametrize('n', [1, 2])
def test_one_image(n):
    net,x = residual(),smooth(64)
    groups = [g for g in find_groups(net, x[:2]) if not g.reason]
    kept = {g.name: [0, 1, 4, 6] for g in groups}
    assert compensate(net, kept, x[:n], groups=groups)(x).isfinite().all()

def test_rows_that_are_not_finite_are_dropped():
    net,x = mlp(n=12),randn(300, 5)
    bad = x.clone()
    bad[::7] = torch.nan
    kept = {'0': [0, 2, 3, 4, 6, 7, 9]}
    a,b = compensate(net, kept, bad, groups=[pair(12)]),compensate(net, kept, x[torch.arange(300) % 7 != 0], groups=[pair(12)])
    close(a(x), b(x), 1e-8)

def test_data_in_other_forms():
    net,x = residual(),smooth(48)
    groups = [g for g in find_groups(net, x[:2]) if not g.reason]
    kept,parts = {g.name: [0, 1, 4, 6] for g in groups},list(x.split(16))
    want = compensate(net, kept, parts, groups=groups)
    def runs(m):
        for b in parts: m(b)
    for data in (iter(parts), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=16)):
        close(compensate(net, kept, data, groups=groups)(x), want(x), 1e-8)
    assert rel(compensate(net, kept, runs, groups=groups)(x), want(x)) < 1e-6

def test_a_reader_that_data_do_not_reach_is_said():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c = nn.Linear(5, 8),nn.Linear(8, 3),nn.Linear(8, 3)
        def forward(self, x):
            h = self.a(x).tanh()
            return self.b(h) if x.shape[0] != 7 else self.b(h) + self.c(h)
    torch.manual_seed(0)
    net,ix = Sometimes().double().requires_grad_(False),tuple((i,) for i in range(8))
    g = Group('a', 8, (Member('a', 'out', ix), Member('b', 'in', ix), Member('c', 'in', ix)), 'neurons')
    with pytest.warns(UserWarning, match="1 of 2 readers keep their weights as they are \\('c': not reached by the data"):
        small = compensate(net, {'a': [0, 1, 2]}, randn(50, 5), groups=[g])
    assert torch.equal(small.c.weight, net.c.weight[:, :3])
    p = price_units(net, [g], randn(50, 5))
    assert not len(p) and p.missing == {'a': "'c': not reached by the data"}

def test_convolutions_that_pad_in_their_own_way():
    "Subclasses with a padding inside, as EfficientNet-Lite has them"
    class Padded(nn.Conv2d):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            self.pad = nn.ZeroPad2d(1)
        def forward(self, x): return nn.functional.conv2d(self.pad(x), self.weight, self.bias)
    x = smooth(128)
    def build(conv, **kw):
        torch.manual_seed(0)
        net = nn.Sequential(conv(3, 8, 3, bias=False, **kw), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4, 3, bias=False, **kw), nn.BatchNorm2d(4)).double()
        for _ in range(20): net(x)
        return net.eval().requires_grad_(False)
    own,plain = build(Padded),build(nn.Conv2d, padding=1)
    groups = [[g for g in find_groups(net, x[:2]) if not g.reason] for net in (own, plain)]
    a,b = (price_units(net, g, x) for net,g in zip((own, plain), groups))
    assert a['0'].order == b['0'].order and not a.missing
    np.testing.assert_allclose(a['0'].loss, b['0'].loss, rtol=1e-8)
    small = [compensate(net, a.kept({'0': 5}), x, groups=g, refit=False) for net,g in zip((own, plain), groups)]
    close(small[0](x), small[1](x), 1e-8)

def test_flattened_maps_and_other_layers_that_read():
    from transformers.pytorch_utils import Conv1D
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(32, 3)).double().requires_grad_(False)
    up = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 2, 3)).double().requires_grad_(False)
    gpt = nn.Sequential(Conv1D(8, 5), nn.GELU(), Conv1D(3, 8)).double().requires_grad_(False)
    for net,x in ((flat, smooth(400)), (up, smooth(100)), (gpt, randn(500, 5))):
        groups = [g for g in find_groups(net, x[:2]) if not g.reason]
        p = price_units(net, groups, x)
        kept = p.kept({n: 5 for n in p})
        small,cut = compensate(net, kept, x, groups=groups),slice_units(net, groups, kept)
        assert rel(small(x), net(x)) < .7*rel(cut(x), net(x)), type(net[-1])

def test_a_plan_of_any_score_is_repaired():
    net,x = residual(dtype=torch.float32),smooth(256, dtype=torch.float32)
    for score in ('magnitude', 'taylor', 'random'):
        plan = Cut(.5, score=score).plan(net, list(x.split(64)))
        small,cut = compensate(net, plan, x),plan.apply(net)
        assert {n: p.shape for n,p in small.named_parameters()} == {n: p.shape for n,p in cut.named_parameters()}
        assert rel(small(x), net(x)) < .5*rel(cut(x), net(x))
        empty = plan.skeleton(copy.deepcopy(net).to('meta')).to_empty(device='cpu').eval()
        empty.load_state_dict(small.state_dict())
        close(empty(x), small(x), 1e-6)
    with pytest.raises(ValueError, match='a plan knows its groups'): compensate(net, plan, x, groups=[])
    with pytest.raises(ValueError, match='Was the plan made for another model'): compensate(small, plan, x)

class Marked(nn.Module):
    "Two blocks; one neuron of the first is huge in the few rows that have a mark, and a norm of rows follows"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up,self.down,self.norm = nn.Linear(8, 24),nn.Linear(24, 8),nn.LayerNorm(8)
        self.up1,self.down1,self.norm1 = nn.Linear(8, 24),nn.Linear(24, 8),nn.LayerNorm(8)
        self.up.weight.data[3],self.up.bias.data[3],self.down.weight.data[:, 3] = torch.eye(8)[0],0.,30*torch.randn(8)
    def forward(self, x):
        x = self.norm(x + self.down(self.up(x).relu()))
        return self.norm1(x + self.down1(self.up1(x).relu()))

@pytest.mark.parametrize('refit', (False, True))
def test_a_repair_that_a_few_rows_spoil_is_taken_back(refit):
    net,x = Marked().eval().requires_grad_(False),torch.randn(2000, 8)
    x[:, 0] = 10.*(torch.arange(len(x)) % 10 == 0)
    groups = [g for g in find_groups(net, x[:2]) if not g.reason]
    kept = {'up': [i for i in range(24) if i != 3], 'up1': list(range(12))}
    def far(m): return float((m(x) - net(x)).square().mean())
    with pytest.warns(UserWarning, match=r"1 of 2 readers keep their weights as they are \('down'\)"):
        small = compensate(net, kept, [*x.split(500)], groups=groups, refit=refit)
    cut = slice_units(net, groups, kept)
    assert far(small) < far(cut) and (refit or torch.equal(small.down.weight, cut.down.weight))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        good = compensate(net, {'up': [i for i in range(24) if i != 5], 'up1': list(range(12))}, [*x.split(500)], groups=groups, refit=refit)
    assert far(good) < far(small)

def test_layers_that_are_refitted_keep_the_spread_of_their_outputs():
    "Least squares on what explains little varies too little; the norm behind makes up for it"
    net,x = residual(),smooth(256, seed=4)
    groups = [g for g in find_groups(net, x[:2]) if not g.reason]
    small = compensate(net, {g.name: [0, 1, 3, 5] for g in groups}, x, groups=groups, renorm=False)
    for n in ('n0', 'n1', 'n2', 'n3'):
        out = []
        for m in (net, small):
            h = m.get_submodule(n).register_forward_hook(lambda m, a, y: out.append(y.transpose(0, 1).flatten(1)))
            m(x)
            h.remove()
        torch.testing.assert_close(out[1].std(1), out[0][[0, 1, 3, 5]].std(1), rtol=.15, atol=0.)

def test_rounding_does_not_stop_a_factor():
    x = randn(3, 40)
    L = factored(x.T @ x)       # of rank 3
    close(L @ L.T, x.T @ x, 1e-5)

def test_two_processes_compute_what_one_does(tmp_path):
    """Each has half of the batches"""
    code = '''
        sys.path.insert(0, %r)
        from test_prune_compensate import residual, smooth
        from fasterai.prune.compensate import compensate
        from fasterai.prune.groups import find_groups
        rank,size = setup()
        net,x = residual(),smooth(128)
        groups = [g for g in find_groups(net, x[:2]) if not g.reason]
        mine = [*x.split(16)][rank::size]
        small = compensate(net, {g.name: [0, 1, 4, 6] for g in groups}, mine, groups=groups)
        torch.save(small.state_dict(), out/f'{rank}.pt')
    ''' % str(Path(__file__).parent)
    res = run(code, tmp_path, 2)
    assert [r[0] for r in res] == [0, 0], res
    a,b = (torch.load(tmp_path/f'{r}.pt') for r in (0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    net,x = residual(),smooth(128)
    groups = [g for g in find_groups(net, x[:2]) if not g.reason]
    kept = {g.name: [0, 1, 4, 6] for g in groups}
    one = compensate(net, kept, list(x.split(16)), groups=groups)
    two = slice_units(net, groups, kept)
    two.load_state_dict(a)
    assert rel(two(x), one(x)) < .1*rel(one(x), net(x))

def test_norms_after_every_convolution_of_a_deep_network():
    "Also where float32 would hide a constant that is added and taken away again"
    from torchvision.models import mobilenet_v2
    net = mobilenet_v2().eval()
    pairs = norms_after(net, lambda m: m(torch.randn(1, 3, 64, 64)))
    convs = [n for n,m in net.named_modules() if isinstance(m, nn.Conv2d)]
    following = dict(zip(convs, [n for n,m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]))     # of this network each in its turn
    assert pairs == following
