"Moments of inputs, outputs and gradients against plain hooks, torch.cov and F.unfold in float64"
import copy, json
from collections import OrderedDict
from dataclasses import fields
import pytest, torch, torch.nn.functional as F, torch.utils.checkpoint, transformers as hf
from sklearn.covariance import oas
from torch import nn
from torch.ao.nn import qat
from torchvision.models import resnet18
from fasterai.core import convs, moments
from fasterai.core.convs import conv_patches, find_convs
from fasterai.core.inputs import Inputs, collect_inputs
from fasterai.core.moments import block_sizes
from fasterai.core.calibrate import Calibration, NotDifferentiable, calibrate
from test_distributed import run

D = torch.float64

def gen(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0, dtype=D): return torch.randn(shape, generator=gen(seed), dtype=D).to(dtype)
def close(a, b, tol=1e-10): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

def seen(model, name, data, what='input'):
    "What a plain hook sees of a layer, one tensor per call"
    res = []
    def hook(m, a, y): res.append((a[0] if what == 'input' else y).detach().double().clone())
    h = model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad(): [model(**b) if isinstance(b, dict) else model(b) for b in (data if isinstance(data, list) else [data])]
    h.remove()
    return res

def check(st, rows, sizes=None, tol=1e-10):
    "Every number in `st` is that of `rows` (N, n)"
    C,mu = torch.atleast_2d(rows.T.cov(correction=0)),rows.mean(0)
    sizes = sizes or (rows.shape[1],)
    assert st.rows == len(rows) and st.sizes == sizes
    close(st.mean, mu, tol)
    at = 0
    for B,S,b in zip(st.blocks, st.second(), sizes, strict=True):
        close(B, C[at:at+b, at:at+b], tol)
        close(S, (rows.T @ rows/len(rows))[at:at+b, at:at+b], tol)
        at += b
    close(st.var, C.diagonal(), tol)

# ------------------------------------------------------------------ fully-connected layers

@pytest.mark.parametrize('dtype,tol', [(D, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_linear_layers(dtype, tol):
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).to(dtype).eval()
    data = [randn(7, 6, seed=i, dtype=dtype) + 5 for i in range(4)]
    ins = collect_inputs(net, data)
    for n in ('0', '2'): check(ins[n], torch.cat(seen(net, n, data)), tol=tol)
    assert {o.kind for o in ins.values()} == {'features'} and ins.batches == 4 and not ins.missing

def test_blocks():
    net,x = nn.Sequential(nn.Linear(11, 3)).double(),randn(20, 11)
    check(collect_inputs(net, x, block=4)['0'], x, (4, 4, 3))
    check(collect_inputs(net, x, block=6)['0'], x, (11,))
    assert block_sizes(4097) == (2048, 2048, 1) and block_sizes(4096) == (4096,) and block_sizes(8192) == (2048,)*4

def test_many_batches_pass_through_the_buffer(monkeypatch):
    "Also where rows of one batch go into several products"
    monkeypatch.setattr(moments, '_FLUSH', 8)
    monkeypatch.setattr(moments, '_ROOM', 8*5)
    net,data = nn.Sequential(nn.Linear(5, 3)).double(),[randn(n, 5, seed=n) + n for n in (3, 30, 1, 17)]
    check(collect_inputs(net, data)['0'], torch.cat(data))

def test_shrinkage_is_that_of_calibrate():
    "Which is that of scikit-learn, corrected for few rows"
    net,x = nn.Sequential(nn.Linear(12, 3)).double(),randn(9, 12)*torch.arange(1, 13) + 1
    st,C = collect_inputs(net, x)['0'],x.T.cov(correction=0)
    tr,tr2,v = C.trace().item(),C.square().sum().item(),8
    assert st.shrink == pytest.approx(((v-2)*tr2 + v*tr**2)/((v-1)*(v+2)*(tr2 - tr**2/12))) == pytest.approx(calibrate(net, x)['0'].shrink)
    want = (1 - st.shrink)*C + st.shrink*tr/12*torch.eye(12, dtype=D)
    close(st.shrunk()[0], want)
    close(st.second(shrink=True)[0], want + torch.outer(x.mean(0), x.mean(0)))
    x = randn(2000, 12)*torch.arange(1, 13)
    assert collect_inputs(net, x)['0'].shrink == pytest.approx(oas(x.numpy())[1], rel=.01)

@pytest.mark.parametrize('N', [2, 9, 70])
def test_few_rows_are_judged_as_in_calibrate(N):
    net,x = nn.Sequential(nn.Linear(12, 15)).double(),randn(N, 12)*torch.arange(1, 13) + 1
    for data in (x, [x]*5, [torch.cat([x, x*torch.nan])]):
        st,want = collect_inputs(net, data)['0'],calibrate(net, data)['0']
        for k in ('rows', 'dropped', 'distinct', 'independent', 'varies', 'few'): assert getattr(st, k) == getattr(want, k), k
        for k in ('trust', 'trace', 'shrink'): assert getattr(st, k) == pytest.approx(getattr(want, k), rel=1e-9), k
        assert st.few == (N < 12) and st.independent == N

def test_one_shrinkage_for_blocks_of_equal_kind_is_their_own():
    "Two blocks with the same rows have the shrinkage of one"
    x = randn(40, 4)
    net = nn.Sequential(nn.Linear(8, 3)).double()
    [a] = collect_inputs(net, torch.cat([x, x], 1), block=3).values()
    assert a.sizes == (3, 3, 2)
    [a] = collect_inputs(nn.Sequential(nn.Conv1d(8, 2, 1, groups=2)).double(), torch.cat([x, x], 1)[...,None], patches=True).values()
    [b] = collect_inputs(nn.Sequential(nn.Linear(4, 3)).double(), x).values()
    assert a.sizes == (4, 4) and a.shrink == pytest.approx(b.shrink)

def test_one_row_and_constant_rows():
    net = nn.Sequential(nn.Linear(4, 3)).double()
    for x in (randn(1, 4), torch.ones(5, 4, dtype=D)):
        st = collect_inputs(net, x)['0']
        assert st.shrink == 1 and not st.cov.any()
        close(st.mean, x.mean(0))

def test_conv1d_of_transformers():
    cfg = hf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=9)
    net,data = hf.GPT2Model(cfg).double().eval(),[dict(input_ids=torch.arange(8).view(2, 4))]
    ins = collect_inputs(net, data)
    assert set(ins) == {f'h.0.{n}' for n in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')}
    for n in ins: check(ins[n], torch.cat(seen(net, n, data)).flatten(0, 1))

def test_weights_that_are_read():
    net,x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval(),randn(3, 5, 8)
    ins = collect_inputs(net, x)
    with torch.no_grad():
        eye = copy.deepcopy(net.self_attn)
        eye.out_proj.weight.copy_(torch.eye(8))
        eye.out_proj.bias.zero_()
        check(ins['self_attn.out_proj'], eye(x, x, x)[0].flatten(0, 1), tol=1e-8)

def test_under_autocast():
    net = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 4), nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 2, 1)).eval()
    data = [randn(7, 8, seed=i, dtype=torch.float32) + 5 for i in range(4)]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        ins,x,y = collect_inputs(net, data),seen(net, '1', data),seen(net, '3', data)
    assert x[0].bfloat16().double().equal(x[0])      # layers after the first get bfloat16
    check(ins['1'], torch.cat(x), tol=1e-5)
    check(ins['3'], torch.cat(y).movedim(1, -1).flatten(0, 1), tol=1e-5)

def test_inputs_that_would_overflow_are_dropped():
    net = nn.Sequential(nn.Linear(3, 2)).double()
    for f in (collect_inputs, calibrate): assert f(net, randn(5, 3)*1e200).missing == {'0': 'none of its 5 rows is finite'}

# ------------------------------------------------------------------ masks, non-finite rows, layers that are not reached

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.conv,self.never = nn.Linear(5, 6),nn.Linear(6, 4),nn.Conv1d(5, 3, 3, padding=1),nn.Linear(5, 5)
    def forward(self, x, attention_mask=None): return self.b(torch.tanh(self.a(x))).sum(-1) + self.conv(x.transpose(1, 2)).sum(1)

def test_padding_is_not_counted():
    net,x,mask = Tokens().double().eval(),randn(4, 6, 5),torch.arange(6) < torch.tensor([[6], [2], [5], [1]])
    ins = collect_inputs(net, [dict(x=x, attention_mask=mask)], patches=True)
    check(ins['a'], x[mask])
    check(ins['b'], torch.tanh(net.a(x)).detach()[mask])
    check(ins['conv'], F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1).flatten(2)[mask])
    check(collect_inputs(net, [dict(x=x, attention_mask=mask)])['conv'], x[mask])
    assert ins.missing == {'never': 'not reached by the data'} and 'never: not reached' in repr(ins)

def test_padding_may_be_non_finite():
    net,x,mask = Tokens().double().eval(),randn(4, 6, 5),torch.arange(6) < torch.tensor([[6], [2], [5], [1]])
    x[~mask] = torch.nan
    st = collect_inputs(net, [dict(x=x, attention_mask=mask)])['a']
    check(st, x[mask])
    assert st.dropped == 0

def test_rows_that_are_not_finite_are_dropped_and_counted():
    layers = dict(conv=nn.Conv2d(3, 4, 3, bias=False), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(4, 2))
    net,x = nn.Sequential(OrderedDict(layers)).double(),randn(3, 3, 5, 6)
    x[1,2,0,0],x[1,0,4,5] = torch.nan,torch.inf
    pixels = x.movedim(1, -1).flatten(0, 2)
    ins = collect_inputs(net, x, outputs='full', sensitivity='full')
    check(ins['conv'], pixels[pixels.isfinite().all(1)])
    assert ins['conv'].dropped == 2 and ins['fc'].dropped == 1 and ins['fc'].rows == 2 and ins.outputs['fc'].rows == 2
    rows = F.unfold(x, 3).transpose(1, 2).flatten(0, 1)
    st = collect_inputs(net, x, patches=True)['conv']
    check(st, rows[rows.isfinite().all(1)])
    assert st.dropped == 2
    assert all(o.cov.isfinite().all() for o in [*ins.values(), *ins.outputs.values()])
    assert collect_inputs(net, x*torch.nan).missing['conv'] == 'none of its 90 rows is finite'

# ------------------------------------------------------------------ convolutions

CONVS = dict(
    plain=(nn.Conv2d(4, 6, 3), (2, 4, 7, 6)),
    uneven=(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (2, 4, 9, 8)),
    groups=(nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 5, 5)),
    depthwise=(nn.Conv2d(5, 10, 3, groups=5), (3, 5, 6, 6)),
    pointwise=(nn.Conv2d(4, 3, 1, stride=2), (2, 4, 5, 5)),
    same=(nn.Conv2d(3, 2, (4, 3), padding='same', dilation=(1, 2)), (2, 3, 6, 6)),
    reflect=(nn.Conv2d(3, 2, 3, padding=(2, 1), padding_mode='reflect'), (2, 3, 6, 5)),
    circular=(nn.Conv2d(3, 2, 3, padding=1, padding_mode='circular'), (2, 3, 6, 5)),
    replicate=(nn.Conv2d(3, 2, 3, padding='same', padding_mode='replicate'), (2, 3, 6, 5)),
    one=(nn.Conv1d(4, 4, 5, stride=2, padding=2, groups=2), (3, 4, 11)),
    three=(nn.Conv3d(2, 3, (2, 3, 1), padding=(1, 0, 2), stride=(1, 2, 2)), (2, 2, 4, 5, 3)),
    no_batch=(nn.Conv2d(3, 2, 3), (3, 6, 5)))

def brute_patches(m, x):
    "Rows of patches (N, in·kernel) by a loop over output pixels"
    if m.padding_mode != 'zeros' or isinstance(m.padding, str):
        x = F.pad(x, m._reversed_padding_repeated_twice, **({} if m.padding_mode == 'zeros' else dict(mode=m.padding_mode)))
    else: x = F.pad(x, [p for p in m.padding[::-1] for _ in range(2)])
    d = len(m.kernel_size)
    shape = [(x.shape[2+i] - m.dilation[i]*(m.kernel_size[i]-1) - 1)//m.stride[i] + 1 for i in range(d)]
    rows = []
    for item in x:
        for at in torch.cartesian_prod(*[torch.arange(n) for n in shape]).view(-1, d).tolist():
            cut = tuple(slice(a*s, a*s + g*(k-1) + 1, g) for a,s,g,k in zip(at, m.stride, m.dilation, m.kernel_size))
            rows.append(item[(slice(None), *cut)].flatten())
    return torch.stack(rows)

@pytest.mark.parametrize('room', [2**22, 50, 1])
@pytest.mark.parametrize('name', CONVS)
def test_patches(name, room, monkeypatch):
    monkeypatch.setattr(convs, '_PATCH_ROOM', room)
    conv,shape = CONVS[name]
    net,x = nn.Sequential(copy.deepcopy(conv).double()),randn(*shape) + 1
    ins,rows = collect_inputs(net, x, patches=True)['0'],brute_patches(conv, x if x.ndim == conv.weight.ndim else x[None])
    n = rows.shape[1]//conv.groups
    check(ins, rows, (n,)*conv.groups)
    assert ins.kind == 'patches' and ins.groups == conv.groups

@pytest.mark.parametrize('name', ['plain', 'uneven', 'groups'])
def test_patches_are_those_of_unfold(name):
    m,shape = CONVS[name]
    x = randn(*shape)
    want = F.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride).transpose(1, 2)
    [s] = find_convs(m)
    close(conv_patches(s, x).flatten(3).flatten(1, 2), want)

@pytest.mark.parametrize('room', [2**22, 2000, 300, 1])
def test_slices_of_patches_are_small_and_cover_all(room, monkeypatch):
    monkeypatch.setattr(convs, '_PATCH_ROOM', room)
    m,shape = CONVS['plain']
    t = conv_patches(find_convs(m)[0], randn(*shape))
    cover,line = torch.zeros(t.shape[:2]),t[0,0].numel()
    for i,j in convs._patch_slices(t, 2):
        cover[i,j] += 1
        assert t[i,j].numel() <= max(room, line)
    assert (cover == 1).all()

def test_weight_of_a_transposed_convolution_multiplies_pixels():
    m,x = nn.ConvTranspose2d(4, 3, 3, stride=2, bias=False).double(),randn(2, 4, 5, 6)
    close(F.fold(find_convs(m)[0].weight @ x.flatten(2), m(x).shape[2:], 3, stride=2), m(x).detach())

def test_large_groups_are_cut_into_blocks():
    net,x = nn.Sequential(nn.Conv2d(6, 4, 3, groups=2)).double(),randn(2, 6, 6, 6)
    check(collect_inputs(net, x, patches=True, block=10)['0'], F.unfold(x, 3).transpose(1, 2).flatten(0, 1), (10, 10, 7)*2)

@pytest.mark.parametrize('m,shape', [CONVS['groups'], CONVS['depthwise'], CONVS['one'], CONVS['three'], CONVS['no_batch'],
    (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 3)), (nn.ConvTranspose3d(4, 2, 2), (2, 4, 2, 3, 2))])
@pytest.mark.parametrize('channels_last', [False, True])
def test_channels(m, shape, channels_last):
    net,x = nn.Sequential(copy.deepcopy(m).double()),randn(*shape)
    if channels_last and x.ndim == 4: x = x.to(memory_format=torch.channels_last)
    ins = collect_inputs(net, x, outputs='full')
    at = x.ndim - m.weight.ndim + 1
    check(ins['0'], x.movedim(at, -1).flatten(0, -2), (m.in_channels//m.groups,)*m.groups)      # one block for each group
    check(ins.outputs['0'], net(x).detach().movedim(at, -1).flatten(0, -2))
    assert ins['0'].kind == 'channels' and ins.outputs['0'].kind == 'outputs'
    if m.transposed: assert collect_inputs(net, x, patches=True)['0'].kind == 'channels'

def test_variances_of_outputs():
    net,x = resnet18(num_classes=3).double().eval(),randn(2, 3, 32, 32)
    ins = collect_inputs(net, x, layers=['layer1', 'fc'], outputs='diag')
    for n in ins:
        y = seen(net, n, x, 'output')[0]
        y = y.movedim(1, -1).flatten(0, -2)
        close(ins.outputs[n].var, y.var(0, correction=0))
        close(ins.outputs[n].mean, y.mean(0))

# ------------------------------------------------------------------ sensitivity

@pytest.mark.parametrize('sensitivity', ['full', 'diag'])
def test_sensitivities_of_convolutions(sensitivity):
    "For a linear model the mean over many cotangents is known: Σ over items and pixels of JᵀJ, relative to the variation of the output"
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(4*9, 6)).double().eval()
    x = randn(6, 3, 5, 5)
    ins = collect_inputs(net, [x]*400, sensitivity=sensitivity)
    z = net(x).detach()
    unit = (z - z.mean(0)).square().sum()/len(z)
    J = torch.func.jacrev(net[1:])(net[0](x)[:1]).squeeze(0).squeeze(1).detach()      # (6, 5, 5, 5)
    want = torch.einsum('zchw,zdhw->cd', J, J)/unit
    got = ins.sens['0']
    if sensitivity == 'diag': want = want.diagonal()
    assert got.shape == want.shape and (got - want).norm() < .05*want.norm()
    close(ins.sens['3'] if sensitivity == 'diag' else ins.sens['3'].diagonal(), torch.ones(6, dtype=D)/unit, .1)

def test_sensitivity_of_linear_layers_is_that_of_calibrate():
    net,data = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4)).double(),[randn(8, 9, seed=i) for i in range(3)]
    ins,cal = collect_inputs(net, data, sensitivity='full'),calibrate(net, data, sensitivity='full')
    for n in ('0', '2'): close(ins.sens[n], cal[n].sens)

def test_sensitivity_through_activations_in_place():
    "Random state, weights and flags as before; the layer before an in-place ReLU is measured"
    acts = [nn.ReLU(inplace=True) for _ in range(2)]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), acts[0], nn.Conv2d(4, 4, 3), acts[1], nn.Flatten(), nn.Linear(4*4, 2)).double()
    plain,x = copy.deepcopy(net),randn(5, 3, 6, 6)
    for i in (1, 3): plain[i] = nn.ReLU()
    before,rng = copy.deepcopy(net.state_dict()),torch.get_rng_state()
    a,b = collect_inputs(net, x, sensitivity='full'),collect_inputs(plain, x, sensitivity='full')
    for n in ('0', '2', '5'):
        close(a.sens[n], b.sens[n])
        close(a[n].cov, b[n].cov)
    assert all(p.requires_grad and p.grad is None for p in net.parameters()) and net.training and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

# ------------------------------------------------------------------ shared inputs

class Shared(nn.Module):
    "q and k take one input, v sometimes; an input is changed in place between two layers"
    def __init__(self):
        super().__init__()
        self.q,self.k,self.v,self.late = (nn.Linear(4, 4) for _ in range(4))
    def forward(self, x):
        x = x*1
        h = self.q(x) + self.k(x)
        if x[0,0] > 0: h = h + self.v(x)
        x.mul_(2)
        return h + self.late(x)

def test_shared_inputs_are_counted_once():
    net,data = Shared().double(),[randn(6, 4, seed=i) for i in range(2)]
    for x,s in zip(data, (1, -1)): x[0,0] = s
    ins = collect_inputs(net, data[:1])
    assert ins['q'].cov is ins['k'].cov is ins['v'].cov and ins['late'].cov is not ins['q'].cov
    assert list(ins.to_frame().shared) == ['', 'q', 'q', '']
    ins = collect_inputs(net, data + data[:1])
    for n,rows in dict(q=[0, 1, 0], k=[0, 1, 0], v=[0, 0]).items(): check(ins[n], torch.cat([data[i] for i in rows]))
    check(ins['late'], 2*torch.cat([data[i] for i in (0, 1, 0)]))
    assert ins['q'].cov is ins['k'].cov

def test_a_shortcut_shares_the_input_of_its_block():
    net,x = resnet18(num_classes=3).double().eval(),randn(2, 3, 32, 32)
    ins = collect_inputs(net, x, layers='layer2')
    assert ins['layer2.0.conv1'].cov is ins['layer2.0.downsample.0'].cov
    for n in ins: check(ins[n], seen(net, n, x)[0].movedim(1, -1).flatten(0, -2))
    ins = collect_inputs(net, x, layers='layer2', patches=True)
    assert ins['layer2.0.conv1'].cov is not ins['layer2.0.downsample.0'].cov

def test_layers_of_other_groups_have_their_own_blocks():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c = (nn.Conv1d(4, 4, k, groups=g, padding=k//2) for k,g in ((3, 4), (1, 1), (5, 4)))
        def forward(self, x): return self.a(x) + self.b(x) + self.c(x)
    x = randn(3, 4, 6)
    ins = collect_inputs(Two().double(), x)
    assert ins['a'].cov is ins['c'].cov and ins['a'].cov is not ins['b'].cov
    for n,sizes in dict(a=(1,)*4, b=(4,)).items(): check(ins[n], x.movedim(1, -1).flatten(0, 1), sizes)

def test_a_layer_that_is_called_twice():
    fc = nn.Linear(4, 4)
    net,x = nn.Sequential(OrderedDict(a=fc, b=nn.Tanh(), c=fc)).double(),randn(5, 4)
    ins = collect_inputs(net, x, layers='c')
    assert list(ins) == ['a']
    check(ins['a'], torch.cat([x, torch.tanh(fc(x)).detach()]))

# ------------------------------------------------------------------ attached to another pass

def same_stats(a, b):
    "The statistics of layers, bit by bit"
    assert list(a) == list(b) and a.missing == b.missing and a.batches == b.batches and a.sensitivity == b.sensitivity
    for n in a:
        for f in fields(a[n]):
            x,y = getattr(a[n], f.name),getattr(b[n], f.name)
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, (n, f.name)

def same_inputs(a, b, tol=1e-10):
    assert list(a) == list(b) and a.missing == b.missing and a.batches == b.batches and list(a.sens) == list(b.sens) and list(a.outputs) == list(b.outputs)
    for n in a:
        for x,y in ((a[n], b[n]), (a.outputs.get(n), b.outputs.get(n))):
            if x is None: continue
            assert (x.rows, x.dropped, x.sizes, x.kind, x.groups) == (y.rows, y.dropped, y.sizes, y.kind, y.groups)
            close(x.cov, y.cov, tol)
            close(x.mean, y.mean, tol)
    for n in a.sens: close(a.sens[n], b.sens[n], tol)

class Recomputed(nn.Module):
    "A part with a convolution and linear layers that is run again in the backward pass, or not; q and k share an input"
    def __init__(self, on=False):
        super().__init__()
        self.on,self.first,self.conv,self.q,self.k,self.head = on,nn.Conv1d(5, 6, 1),nn.Conv1d(6, 6, 3, padding=1, groups=2),nn.Linear(6, 6),nn.Linear(6, 6),nn.Linear(6, 3)
    def body(self, x):
        h = torch.relu_(self.conv(x)).transpose(1, 2)
        return torch.tanh(self.q(h)*self.k(h))
    def forward(self, x, attention_mask=None):
        h = self.first(x.transpose(1, 2))
        return self.head(torch.utils.checkpoint.checkpoint(self.body, h, use_reentrant=False) if self.on else self.body(h))

def tokens(n=3, bad=True):
    res = [dict(x=randn(4, 7, 5, seed=i), attention_mask=torch.arange(7) < torch.tensor([[7], [3], [5], [2]])) for i in range(n)]
    if bad: res[1]['x'][0,1,2] = torch.nan
    return res

@pytest.mark.parametrize('sensitivity', [None, 'full', 'diag'])
@pytest.mark.parametrize('on', [False, True])
def test_calibrate_collects_inputs_in_the_same_pass(sensitivity, on):
    "What was there before is the same bit by bit, and inputs are those of a pass of their own, also where parts run again for the gradient"
    torch.manual_seed(0)
    net,data = Recomputed(on).double(),tokens()
    calls = []
    h = net.register_forward_pre_hook(lambda m, a: calls.append(1))
    cal = calibrate(net, data, sensitivity=sensitivity, inputs=True, patches='conv', outputs='full')
    h.remove()
    assert len(calls) == 3
    same_stats(cal, calibrate(net, data, sensitivity=sensitivity))
    net.on = False
    same_inputs(cal.inputs, collect_inputs(net, data, sensitivity=sensitivity, patches='conv', outputs='full'))
    assert cal.inputs['q'].cov is cal.inputs['k'].cov and bool(cal.inputs.sens) == bool(sensitivity) and cal.inputs['conv'].kind == 'patches'
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

def test_a_loss_makes_the_sensitivities_of_convolutions_too():
    net,x,y = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(8, 2)).double(),randn(10, 3, 2),randn(10, 2, seed=1)
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    kw = dict(loss=lambda z, y: (z - y).square().sum()/len(z), sensitivity='full')
    cal = calibrate(net, data, inputs=True, **kw)
    same_stats(cal, calibrate(net, data, **kw))
    h = net[0](x).detach().requires_grad_()
    g, = torch.autograd.grad((net[1:](h) - y).square().sum(), h)
    g = g.movedim(1, -1).flatten(0, 1)
    close(cal.inputs.sens['0'], g.T @ g/len(x))

class TwoHeads(nn.Module):
    "A map that only convolutions make, and classes"
    def __init__(self):
        super().__init__()
        self.conv,self.map,self.fc = nn.Conv1d(3, 4, 1),nn.Conv1d(4, 2, 1),nn.Linear(4, 2)
    def forward(self, x):
        h = torch.relu(self.conv(x))
        return self.map(h), self.fc(h.mean(-1))

def test_outputs_of_convolutions_alone_do_not_change_what_layers_have():
    net,x = TwoHeads().double(),randn(9, 3, 5)
    same_stats(calibrate(net, x, sensitivity='full', inputs=True), calibrate(net, x, sensitivity='full'))
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc,self.conv = nn.Linear(3, 3),nn.Conv1d(3, 2, 1)
        def forward(self, x): return self.conv(self.fc(x).detach()[...,None])
    for ins in (False, True):
        with pytest.raises(NotDifferentiable): calibrate(Cut().double(), randn(4, 3), sensitivity='full', inputs=ins)

def test_a_model_of_convolutions_alone():
    net,x = nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Conv1d(4, 2, 1)).double(),randn(9, 3, 5)
    cal = calibrate(net, x, sensitivity='full', inputs=True)
    assert len(cal) == 0
    same_inputs(cal.inputs, collect_inputs(net, x, sensitivity='full'))

def test_which_inputs():
    net,data = Recomputed().double(),tokens(1, bad=False)
    assert calibrate(net, data).inputs is None
    assert set(calibrate(net, data, inputs=['q', 'conv*']).inputs) == {'q', 'conv'}
    assert set(calibrate(net, data, layers='head', inputs=True).inputs) == {'first', 'conv', 'q', 'k', 'head'}
    for kw,text in ((dict(inputs='qq'), "no layer matches inputs='qq'"), (dict(patches=True), 'pass inputs=True or names too'),
                    (dict(outputs='diag'), 'pass inputs=True or names too'), (dict(inputs=True, outputs='all'), "outputs must be 'full', 'diag' or None")):
        with pytest.raises(ValueError, match=text): calibrate(net, data, **kw)

@pytest.mark.parametrize('f', [calibrate, collect_inputs])
def test_rows_are_dropped_for_all_layers_that_share_an_input(f):
    net,data = Recomputed().double(),tokens()
    data[0]['x'][2,0,0] = torch.inf
    assert {f(net, data)[n].dropped for n in 'qk'} == {3 + 2}     # the convolution spreads a token over those beside it

def test_calibration_with_inputs_in_a_file(tmp_path):
    net,data = Recomputed().double(),tokens()
    cal = calibrate(net, data, sensitivity='full', inputs=True, outputs='diag')
    back = Calibration.load(cal.save(tmp_path/'a.safetensors'))
    same_stats(back, cal)
    same_inputs(back.inputs, cal.inputs, 0)
    assert repr(back) == repr(cal) and back.inputs['q'].cov is back.inputs['k'].cov
    f = cal.to_frame()
    assert list(f.layer) == ['q', 'k', 'head', 'first', 'conv'] and list(f.inputs) == ['features']*3 + ['channels']*2 and set(f.sensitivity) == {'full'}
    assert 'inputs: 5 layers, 3 batches' in cal.title and 'inputs' not in calibrate(net, data).to_frame()
    assert Calibration.load(calibrate(net, data).save(tmp_path/'b.safetensors')).inputs is None

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_hooks_are_removed_after_an_error(error):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    def data():
        yield torch.randn(3, 4)
        raise error
    with pytest.raises(error): collect_inputs(net, data(), sensitivity='full')
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules()) and net.training and net[0].weight.requires_grad

def test_any_form_of_data():
    net,x = nn.Sequential(nn.Linear(4, 3)).double(),randn(6, 4)
    forms = x, (x, torch.zeros(6)), [x[:4], x[4:]], iter([x[:1], x[1:]]), torch.utils.data.DataLoader(x, 4), lambda m: m(x), x.numpy()
    for data in forms: check(collect_inputs(net, data)['0'], x)
    check(collect_inputs(net, [x, x], n_batches=1)['0'], x)
    with pytest.raises(ValueError, match='data has no batches'): collect_inputs(net, [])

# ------------------------------------------------------------------ which layers

def test_layers_that_are_left_alone_say_why():
    net = nn.Sequential(OrderedDict((n, nn.Conv2d(3, 3, 1)) for n in 'abcd'))
    nn.utils.parametrizations.weight_norm(net.b)
    net.d.weight = net.c.weight
    ins = collect_inputs(net, torch.randn(2, 3, 4, 4), layers='*')
    assert list(ins) == ['a'] and ins.missing['c'] == 'tied with d.weight' and ins.missing['b'].startswith('parametrized')
    class Odd(nn.Conv2d): pass
    aware = qat.Conv2d(3, 3, 1, qconfig=torch.ao.quantization.get_default_qat_qconfig('x86'))
    net = nn.Sequential(Odd(3, 3, 1), nn.LazyConv2d(3, 1), aware)
    odd,lazy,quant = (s.reason for s in find_convs(net))
    assert odd == 'Odd is a subclass of nn.Conv2d; pass types=(Odd,) if it computes the same'
    assert lazy.startswith('not initialized') and 'quantized' in quant
    assert find_convs(net, types=[Odd])[0].reason is None
    assert list(collect_inputs(net[:1], torch.randn(2, 3, 4, 4), types=[Odd])) == ['0']

def test_names():
    net = nn.Sequential(OrderedDict(body=nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), flat=nn.Flatten(), head=nn.Linear(4, 2)))
    x = torch.randn(2, 3, 5, 5)
    assert list(collect_inputs(net, x, layers='body')) == ['body.0', 'body.1']
    kinds = {n: o.kind for n,o in collect_inputs(net, x, patches='body.1').items()}
    assert kinds == {'head': 'features', 'body.0': 'channels', 'body.1': 'patches'}
    for kw,text in ((dict(layers='bdy'), "no layer matches layers='bdy'"), (dict(patches='head'), "no layer matches patches='head'"),
                    (dict(outputs='all'), "outputs must be 'full', 'diag' or None, got 'all'"),
                    (dict(block=0), 'block must be an int of at least 1, got 0')):
        with pytest.raises(ValueError, match=text): collect_inputs(net, x, **kw)
    with pytest.raises(ValueError, match='the model has no convolution'): collect_inputs(net.head, torch.randn(2, 4), patches=True)

# ------------------------------------------------------------------ files

def test_save_and_load(tmp_path):
    net,data = Shared().double(),[randn(6, 4, seed=i) for i in range(2)]
    ins = collect_inputs(net, data, outputs='diag', sensitivity='full')
    back = Inputs.load(ins.save(tmp_path/'a.safetensors'))
    assert repr(back) == repr(ins) and back['q'].cov is back['k'].cov and list(back.sens) == list(ins.sens)
    for n in ins:
        assert back[n].sizes == ins[n].sizes and all(torch.equal(a, b) for a,b in ((back[n].cov, ins[n].cov), (back[n].mean, ins[n].mean),
            (back.sens[n], ins.sens[n]), (back.outputs[n].cov, ins.outputs[n].cov)))
    with pytest.raises(FileExistsError): ins.save(tmp_path/'a.safetensors')
    calibrate(net, data).save(tmp_path/'b.safetensors')
    with pytest.raises(ValueError, match="holds no moments of inputs: its type is 'fasterai.Calibration'"):
        Inputs.load(tmp_path/'b.safetensors')
    (tmp_path/'c').write_text(json.dumps({}))
    with pytest.raises(ValueError, match='is not a readable file of moments'): Inputs.load(tmp_path/'c')

def test_shared_tensors_are_in_the_file_once(tmp_path):
    cfg = hf.BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    net = hf.BertModel(cfg, add_pooling_layer=False).eval()
    ins = collect_inputs(net, [dict(input_ids=torch.arange(8)[None])], layers='*attention.self')
    assert len(ins) == 3 and ins.save(tmp_path/'a').stat().st_size < 2*64*64*8

# ------------------------------------------------------------------ several processes

def test_several_processes(tmp_path):
    code = '''
        from fasterai.core.inputs import collect_inputs
        from fasterai.core.calibrate import calibrate
        class Conv(Net):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv1d(12, 12, 3, padding=1, groups=3)
            def forward(self, x):
                y = self.conv(x.transpose(1, 2)).transpose(1, 2).clone()
                y[0,0,0] = x[0,0,0]
                return super().forward(y)
        torch.manual_seed(0)
        m,bs = Conv().eval().double(),[b.double() for b in batches()]
        kw = dict(patches=True, outputs='full', block=9)
        want = collect_inputs(m, bs, **kw)
        assert 0 < want['rare'].rows < want['down'].rows    # only some batches reach it
        rank,size = setup()
        got = collect_inputs(m, bs[rank::size], **kw)
        assert list(got) == list(want) and got.batches == want.batches == 7 and got.missing == want.missing
        assert got['conv'].sizes == (12,)*3 and got['down'].sizes == (9, 9, 9, 9, 4), (got['conv'].sizes, got['down'].sizes)
        both = calibrate(m, bs[rank::size], inputs=True, patches=True, outputs='full')
        plain = calibrate(m, bs[rank::size])
        assert list(both) == list(plain) and all(torch.equal(both[n].cov, plain[n].cov) for n in plain)
        same = calibrate(m, bs[rank::size], inputs=True, sensitivity='full').inputs.sens
        kw.pop('block')
        wide = collect_inputs(m, bs[rank::size], **kw)
        pairs = [(both.inputs[n], wide[n]) for n in wide] + [(both.inputs.outputs[n], wide.outputs[n]) for n in wide.outputs]
        for a,b in pairs + [(got[n], want[n]) for n in want] + [(got.outputs[n], want.outputs[n]) for n in want.outputs]:
            assert a.rows == b.rows
            torch.testing.assert_close(a.cov, b.cov, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(a.mean, b.mean, rtol=1e-9, atol=1e-9)
            assert abs(a.shrink - b.shrink) < 1e-9
        H = collect_inputs(m, bs[rank::size], sensitivity='full').sens
        assert list(H) == list(same)
        for n in H: torch.testing.assert_close(same[n], H[n], rtol=1e-9, atol=1e-9)
        torch.save(H, out/f'{rank}.pt')
    '''
    res = run(code, tmp_path, 2)
    assert all(code == 0 for code,*_ in res), res
    a,b = (torch.load(tmp_path/f'{r}.pt') for r in range(2))
    assert {'conv', 'down', 'head'} <= set(a) and all(torch.equal(a[n], b[n]) for n in a)
