"Quantization, case by case, each against something it did not compute itself"
import copy, io, itertools, pickle, random, subprocess, sys, warnings
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.callback.tracker import SaveModelCallback
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from fasterai.all import *
from fasterai.core.inputs import Inputs
from fasterai.core.moments import block_sizes
from fasterai.quantize import layers as layers_room, packing
from fasterai.core.matrices import as_planned, model_bytes, second_moments
from fasterai.quantize.find import find_layers
from fasterai.quantize.base import QuantLayer
from fasterai.quantize.formats import Corrected, Pair, mk_format, parts_of, weight_bytes
from fasterai.quantize.layers import HalfLinear, QuantConv, QuantConv1D, QuantEmbedding
from fasterai.quantize.measure import Pricer, collect_moments
from fasterai.quantize.pairs import directions
from fasterai.quantize.plan import QuantRow
from fasterai.quantize.rounding import feedback, nearest, output_error, round_weight

pytestmark = pytest.mark.filterwarnings('ignore:no data:UserWarning')

# ------------------------------------------------------------------ helpers

def mlp(bias=True, dtype=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96, bias, dtype=dtype), nn.ReLU(), nn.Linear(96, 64, bias, dtype=dtype), nn.ReLU(),
                         nn.Linear(64, 10, bias, dtype=dtype)).eval()

def rows(n=300, d=48, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) @ (torch.randn(d, d, generator=g)/d**.5)

def rel(a, b): return (torch.norm(a.double() - b.double())/torch.norm(b.double())).item()

def size(m): return sum(t.nbytes for t in m.state_dict().values())

def snapshot(m):
    hooks = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks')
    return ([(n, type(o), o.training, *(len(getattr(o, h)) for h in hooks)) for n,o in m.named_modules()],
            [(n, t.data_ptr(), t.requires_grad, t._version, t.detach().clone(), None if t.grad is None else t.grad.clone())
             for n,t in [*m.named_parameters(), *m.named_buffers()]])

def same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

def storages(m): return {t.untyped_storage().data_ptr() for t in [*m.parameters(), *m.buffers()] if t.numel()}

def stepped(a, b):
    "Are two state dicts the same, bit by bit?"
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# ------------------------------------------------------------------ rounding

@pytest.mark.parametrize('bits', (2, 3, 4, 5, 6, 8))
def test_feedback_is_never_worse_than_nearest(bits):
    torch.manual_seed(bits)
    for n,rank in ((48, 48), (48, 3), (64, 64)):
        X = (torch.randn(200, rank) @ torch.randn(rank, n)).double()
        W,S = torch.randn(1, 20, n),[(X.T @ X/200)[None]]
        near,got = nearest(W, Int(bits), diag=S[0].diagonal(dim1=1, dim2=2)),round_weight(W, Int(bits), S, rounding='feedback')
        direct = [(X @ (W[0] - o.values[0]).double().T).square().sum().item()/200 for o in (got, near)]
        assert direct[0] <= direct[1]*(1 + 1e-9)

def test_feedback_equals_the_textbook_in_float64():
    "One column after the other, each time with the inverse of what is left"
    torch.manual_seed(0)
    n,f = 16,Int(3, group=0)
    X = torch.randn(100, n, dtype=torch.float64) @ torch.randn(n, n, dtype=torch.float64)
    S,W = X.T @ X/100,torch.randn(1, 6, n)
    r = feedback(W, f, [S[None]])
    s,z = r.scales[0,:,0].double(),r.zeros[0,:,0].double()
    S = S + .01*S.diagonal().mean()*torch.eye(n)
    w,q = W[0].double().clone(),torch.zeros(6, n).double()
    for i in range(n):
        inv = torch.linalg.inv(S[i:,i:])
        q[:,i] = ((w[:,i]/s).round() + z).clamp(0, 7)
        e = (w[:,i] - (q[:,i] - z)*s)/inv[0,0]
        w[:,i:] -= e[:,None]*inv[0]
    assert (q == r.codes[0,:,0,:n].double()).double().mean() > .98     # a tie may fall the other way in float32

def test_nearest_is_the_best_code_for_each_weight():
    torch.manual_seed(0)
    W = torch.randn(1, 8, 64)
    r = nearest(W, Int(3, group=16))
    grid = (torch.arange(8.) - r.zeros[...,None].float())*r.scales[...,None].float()           # (1, 8, 4, 8)
    d = (W.view(1, 8, 4, 16)[...,None] - grid[...,None,:]).abs().amin(-1)
    assert torch.allclose((W.view(1, 8, 4, 16) - r.values.view(1, 8, 4, 16)).abs(), d, atol=1e-6)

@pytest.mark.parametrize('w', (torch.zeros(4, 64), torch.full((4, 64), .3), torch.full((4, 64), -.3), torch.randn(4, 64)*1e-40,
    torch.randn(4, 64)*1e30, torch.cat([torch.ones(3, 64), torch.zeros(1, 64)])), ids='zero equal negative denormal huge zero-row'.split())
@pytest.mark.parametrize('bits', (2, 4, 8))
def test_odd_weights(w, bits):
    r = nearest(w[None], Int(bits))
    assert r.values.isfinite().all() and not r.values[0][(w == 0).all(1)].any()
    step = r.scales.float().abs().amax()
    assert (r.values[0] - w).abs().max() <= max(1.01*step, 1e-37)

def test_one_weight_far_from_the_others_stays_within_its_group():
    w = torch.randn(1, 1, 128)*.01
    w[0,0,5] = 30.
    r = nearest(w, Int(4, group=64))
    assert (r.values - w)[0,0,64:].abs().max() < .01 and (r.values - w)[0,0,5].abs() < 13

def test_blocks_of_2048_above_4096_inputs():
    assert block_sizes(25088) == (2048,)*12 + (512,) and block_sizes(4096) == (4096,)
    lin,x = nn.Linear(4160, 8),rows(64, 4160)
    st = collect_moments(lin, [x], find_layers(lin))
    S = second_moments(st[''], find_layers(lin)[0])
    assert [o.shape[-1] for o in S] == [2048, 2048, 64]
    W = lin.weight.detach()[None]
    a,b = (output_error(W - round_weight(W, Int(3), S, rounding=k).values, S) for k in ('feedback', 'nearest'))
    assert a <= b

def test_few_rows():
    "Fewer rows than inputs: the shrunk moments decide, and feedback is not worse in them"
    lin,x = nn.Linear(256, 32),rows(10, 256)
    s, = find_layers(lin)
    o = collect_moments(lin, [x], [s])['']
    S,W = second_moments(o, s),lin.weight.detach()[None]
    fed,near = (round_weight(W, Int(3), S, rounding=k) for k in ('feedback', 'nearest'))
    assert output_error(W - fed.values, S) <= output_error(W - near.values, S)
    assert 'seen on 10 rows' in Quantizer(3).plan(lin, x)[''].reason or not o.few

def test_more_bits_less_error():
    m,x = mlp(),rows()
    errs = [Quantizer(Int(b, group=0)).plan(m, x)['2'] for b in (8, 6, 5, 4, 3, 2)]
    assert [o.error for o in errs] == sorted(o.error for o in errs) and [o.after for o in errs] == sorted((o.after for o in errs), reverse=True)

def test_predicted_error_is_the_measured_one():
    m,x = mlp(),rows(2000)
    plan = Quantizer(3).plan(m, x)
    q = plan.apply(m)
    with torch.no_grad(): y,z = m[0](x),q[0](x)
    assert plan['0'].error == pytest.approx(((z - y).norm()/(y - y.mean(0)).norm()).item(), rel=.05)

# ------------------------------------------------------------------ the given model, the result

@pytest.mark.parametrize('bits', (8, 4, Half(), {'0': 4, '*': 8}, ByteBudget(.2)), ids=str)
def test_given_model_is_untouched(bits):
    m,x = mlp(),rows()
    m[0].register_forward_hook(lambda *a: None)
    m(x).sum().backward()
    was,rng = snapshot(m),torch.get_rng_state()
    q = Quantizer(bits).quantize(m, x)
    assert same(was, snapshot(m)) and torch.equal(rng, torch.get_rng_state()) and not storages(q) & storages(m)
    assert stepped(q.state_dict(), Quantizer(bits).plan(m, x).apply(m).state_dict())
    assert stepped(q.state_dict(), Quantizer(bits).quantize(m, x).state_dict())

@pytest.mark.parametrize('bits', (2, 3, 4, 5, 6, 8, Int(4, group=32, symmetric=True), Half()), ids=str)
def test_bytes_are_as_promised(bits, tmp_path):
    m = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 100))
    plan = Quantizer(bits).plan(m, rows(50, 256))
    q = plan.apply(m)
    assert size(q) == plan.bytes_after and plan.bytes == size(m) == model_bytes(m)
    save_file(q.state_dict(), tmp_path/'q.safetensors')
    assert abs((tmp_path/'q.safetensors').stat().st_size/plan.bytes_after - 1) < .012
    assert count_params(q) == plan.params_after

def test_four_bits_are_smaller_than_eight():
    m = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    assert size(Quantizer(4).quantize(m)) <= .58*size(Quantizer(8).quantize(m))

def test_skeleton_in_a_fresh_process(tmp_path):
    m,x = mlp(),rows()
    plan = Quantizer({'0': 4, '2': 3, '*': Half()}).plan(m, x)
    q = plan.apply(m)
    plan.save(tmp_path/'plan.json')
    torch.save(q.state_dict(), tmp_path/'q.pt')
    torch.save(dict(x=x, y=q(x).detach()), tmp_path/'xy.pt')
    code = '''import torch; from torch import nn; from fasterai.quantize.plan import QuantizationPlan
m = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
q = QuantizationPlan.load('plan.json').skeleton(m); q.load_state_dict(torch.load('q.pt', weights_only=True))
d = torch.load('xy.pt'); assert torch.equal(q(d['x']), d['y'])'''
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, check=True)

def test_store(tmp_path):
    m,x = mlp(),rows()
    plan = Quantizer(4).plan(m, x)
    q = plan.apply(m)
    save_compressed(q, tmp_path/'small', plan)
    assert torch.equal(load_compressed(tmp_path/'small', mlp)(x), q(x))

def test_a_loaded_plan_without_data_says_so(tmp_path):
    m,x = mlp(),rows()
    plan = Quantizer(4).plan(m, x)
    back = Plan.load(plan.save(tmp_path/'plan.json'))
    assert back == plan and not back.rounded
    with pytest.warns(UserWarning, match='3 layers .* are rounded to nearest: the plan came from a file'): near = back.apply(m)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = back.apply(m, data=x)
    q = plan.apply(m)
    assert stepped(again.state_dict(), q.state_dict()) and not stepped(near.state_dict(), q.state_dict())
    with torch.no_grad(): m[0].weight.mul_(1.1)
    with pytest.warns(UserWarning, match='changed since'): plan.apply(m)

def test_inplace():
    m,x = mlp(),rows()
    want,copied = Quantizer(4).quantize(m, x),copy.deepcopy(m)
    res = Quantizer(4).quantize(copied, x, inplace=True)
    assert res is copied and stepped(res.state_dict(), want.state_dict()) and type(copied[0]) is QuantLinear

@pytest.mark.parametrize('bits', (3, 8, Int(8, activations='dynamic'), Half()), ids=str)
def test_copies(bits):
    m,x = mlp(),rows()
    q = Quantizer(bits).quantize(m, x)
    with torch.no_grad():
        y = q(x)
        for o in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))): assert torch.equal(o(x), y)
        f = io.BytesIO()
        torch.save(q, f)
        f.seek(0)
        assert torch.equal(torch.load(f, weights_only=False)(x), y)
    assert len(pickle.dumps(q)) < 1.05*len(pickle.dumps(copy.deepcopy(q)))   # nothing that was unpacked goes along

def test_calls_leave_no_trace():
    q,x = Quantizer(Int(8, activations='dynamic')).quantize(mlp()),rows()
    was = {k: v.clone() for k,v in q.state_dict().items()}
    q(x)
    assert stepped(was, q.state_dict())
    with torch.no_grad():
        q[0].gain.mul_(2)
        assert rel(q[0](x) - q[0].bias, 2*(Quantizer(8).quantize(mlp())[0](x) - q[0].bias)) < .02     # no stale copy

@pytest.mark.parametrize('dtype', (torch.float64, torch.float16, torch.bfloat16), ids=str)
def test_dtypes(dtype):
    m,x = mlp(dtype=dtype),rows().to(dtype)
    q = Quantizer(8).quantize(m, x)
    assert q(x).dtype == dtype and q[0].weight.dtype == dtype and rel(q(x), m(x)) < .03
    q = Quantizer(4).quantize(mlp(), rows()).to(dtype)
    assert q(x).dtype == dtype and q[0].weight.dtype == dtype

def test_unpacked_layers_are_plain_and_can_be_quantized_again():
    q = Quantizer({'0': 4, '*': Half()}).quantize(mlp(), rows())
    q(rows())
    u = unpack(q)
    assert [{*vars(o)} - {*vars(nn.Linear(1, 1))} for o in u if isinstance(o, nn.Linear)] == [set()]*3
    assert [type(o) for o in Quantizer(2).quantize(u) if not isinstance(o, nn.ReLU)] == [QuantLinear]*3

def test_autocast():
    q,x = Quantizer(4).quantize(mlp(), rows()),rows()
    with torch.autocast('cpu', torch.bfloat16): a,b = q(x),unpack(q)(x)
    assert a.dtype == b.dtype == torch.bfloat16 and torch.equal(a, b)

def test_meta(tmp_path):
    m = mlp().to('meta')
    plan = Quantizer(4).plan(m)
    assert plan.bytes_after == Quantizer(4).plan(mlp()).bytes_after
    assert plan.apply(m)[0].qweight.is_meta and plan.skeleton(m)[0].scales.is_meta

def test_root():
    lin,x = nn.Linear(64, 32),rows(20, 64)
    q = Quantizer(4).quantize(lin, x)
    assert type(q) is QuantLinear and rel(q(x), lin(x)) < .15 and q.weight.shape == (32, 64)

def test_flags_and_hooks():
    m = mlp()
    m[0].weight.requires_grad_(False)
    m[2].note = 'mine'
    m[2].register_forward_hook(lambda mod, i, o: o*0)
    m.train()
    q = Quantizer(4).quantize(m, rows())
    assert not q[0].gain.requires_grad and q[0].bias.requires_grad and q[2].gain.requires_grad
    assert q[2].note == 'mine' and q[2].training and not q[2](torch.ones(1, 96)).any()

def test_gradients():
    q,x = Quantizer(4).quantize(mlp(), rows()),rows().requires_grad_()
    q(x).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in q.parameters()) and x.grad.isfinite().all()
    plain = unpack(q)
    x2 = x.detach().clone().requires_grad_()
    plain(x2).square().sum().backward()
    assert rel(x.grad, x2.grad) < 1e-5

def test_gradients_of_the_integer_product():
    "Those of the float product: rounding of the inputs counts as if it were not there"
    q,x = Quantizer(Int(8, activations='dynamic')).quantize(mlp())[0],rows().requires_grad_()
    f,x2,c = Quantizer(8).quantize(mlp())[0],rows().requires_grad_(),torch.randn(300, 96)
    (q(x)*c).sum().backward()
    (f(x2)*c).sum().backward()
    assert rel(x.grad, x2.grad) < 1e-5 and rel(q.gain.grad, f.gain.grad) < 1e-3 and rel(q.bias.grad, f.bias.grad) < 1e-5

def test_no_integer_product(monkeypatch):
    q,x = Quantizer(Int(8, activations='dynamic')).quantize(mlp()),rows()
    with torch.no_grad(): y = q(x)
    monkeypatch.setattr(layers_room, 'int8_works', lambda: False)
    with torch.no_grad(): assert rel(copy.deepcopy(q)(x), y) < .02
    monkeypatch.setattr('fasterai.quantize.quantizer.int8_works', lambda: False)
    with pytest.warns(UserWarning, match='no product of 8-bit integers'): Quantizer(Int(8, activations='dynamic')).plan(mlp())

@pytest.mark.parametrize('bits', (4, 5, 8, Int(8, activations='dynamic')), ids=str)
def test_export(bits):
    q,x = Quantizer(bits).quantize(mlp(), rows()),rows(6)
    prog = torch.export.export(q, (x,), dynamic_shapes=({0: torch.export.Dim('b', min=2)},))
    with torch.no_grad(): assert rel(prog.module()(rows(9)), q(rows(9))) < (.01 if getattr(bits, 'dynamic', False) else 1e-5)

# ------------------------------------------------------------------ kinds of layers

def test_unaligned_sizes():
    for n,m in ((100, 7), (1, 5), (5, 1), (20, 3)):
        for f in (Int(4, group=32), Int(3), Int(5), Int(8), Int(2, group=16)):
            lin,x = nn.Linear(n, m),torch.randn(9, n)
            q = Quantizer(f).quantize(lin, x)
            assert q.weight.shape == (m, n) and q(x).shape == (9, m) and torch.allclose(q(x), F.linear(x, q.weight, q.bias), atol=1e-5)
            assert q.qweight.nbytes + q.scales.nbytes + (0 if q.zeros is None else q.zeros.nbytes) == weight_bytes(f, m, n)

def test_layout_of_onnx_runtime():
    "Read by the definition of MatMulNBits: blob (N, blocks, block·bits/8), low bits first, zero points packed likewise"
    torch.manual_seed(0)
    lin = nn.Linear(128, 6)
    q = Quantizer(Int(4, group=32)).quantize(lin)
    W = torch.zeros(6, 128)
    for i,j in itertools.product(range(6), range(128)):
        byte,zero = int(q.qweight[i, j//32, j % 32//2]),int(q.zeros[i, j//32//2])
        code,z = byte >> 4*(j % 2) & 15,zero >> 4*(j//32 % 2) & 15
        W[i,j] = (code - z)*float(q.scales[i, j//32])
    assert torch.allclose(W, q.weight)

def test_convolutions():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16, padding='same', padding_mode='circular'),
                      nn.Conv2d(16, 8, 1, bias=False), nn.Flatten(2), nn.Conv1d(8, 8, 5, dilation=2, groups=2)).eval()
    x = torch.randn(64, 3, 16, 16)
    for bits,most in ((8, .02), (4, .3)):
        q = Quantizer(bits).quantize(m, x)
        assert [type(o) for o in q if isinstance(o, QuantLayer)] == [QuantConv]*4 and rel(q(x), m(x)) < most
        assert torch.allclose(unpack(q)(x), q(x), atol=1e-6) and q[2].weight.shape == m[2].weight.shape
    near = Quantizer(4, rounding='nearest').quantize(m, x)
    assert rel(q(x), m(x)) <= rel(near(x), m(x))

def test_transposed_convolution_stays():
    plan = Quantizer(8).plan(nn.Sequential(nn.ConvTranspose2d(4, 4, 2), nn.Conv2d(4, 4, 1)))
    assert plan['0'].reason == 'transposed convolution: not supported' and plan['1'].changed

def test_gpt2():
    hf = pytest.importorskip('transformers')
    torch.manual_seed(0)
    m = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=2)).eval()
    ids = torch.randint(60, (4, 9))
    q = Quantizer(8, embeddings=True).quantize(m, dict(input_ids=ids))
    c = q.transformer.h[0].attn.c_attn
    assert type(c) is QuantConv1D and c.weight.shape == m.transformer.h[0].attn.c_attn.weight.shape
    assert rel(q(ids).logits, m(ids).logits) < .05
    plan = Quantizer(8, embeddings=True).plan(m)
    assert 'tied' in plan['transformer.wte'].reason and 'tied' in plan['lm_head'].reason and plan['transformer.wpe'].changed
    assert q.lm_head.weight is q.transformer.wte.weight and type(unpack(q).transformer.h[0].attn.c_attn) is type(m.transformer.h[0].attn.c_attn)

def test_transformer_layer():
    torch.manual_seed(0)
    m = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(5, 7, 32)
    plan = Quantizer(8).plan(m)
    q = plan.apply(m)
    assert type(q.self_attn.out_proj) is QuantLinear and 'packed q/k/v' in plan['self_attn.in_proj_weight'].reason
    with torch.no_grad(): assert rel(q(x), m(x)) < .02                   # the fast path
    assert rel(q.train()(x*1.).detach()*0 + q.eval()(x), m(x)) < .02     # and the other
    h = Quantizer(Half()).plan(m)
    assert all('reads its weight' in h[n].reason for n in ('self_attn.out_proj', 'linear1'))

def test_models_that_read_weights():
    tv,hf = pytest.importorskip('torchvision.models'),pytest.importorskip('transformers')
    torch.manual_seed(0)
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
    for kw in ({}, dict(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)):
        m = tv.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10, **kw).eval()
        x = torch.randn(2, 3, 32, 32)
        assert rel(Quantizer(8).quantize(m)(x), m(x)) < .05
    m = hf.T5EncoderModel(hf.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)).eval()
    ids = torch.randint(50, (2, 7))
    for bits in (8, Half()): assert rel(Quantizer(bits).quantize(m)(ids).last_hidden_state, m(ids).last_hidden_state) < .05

def test_embeddings():
    torch.manual_seed(0)
    m,ids = nn.Sequential(nn.Embedding(200, 64, padding_idx=3), nn.Linear(64, 8)),torch.tensor([[3, 5, 199]])
    plan = Quantizer(4).plan(m)
    assert plan['0'].reason == 'embedding (51.2 kB) left alone; pass embeddings=True'
    q = Quantizer(4, embeddings=True).quantize(m)
    assert type(q[0]) is QuantEmbedding and not q[0](ids)[0,0].any() and rel(q[0](ids), m[0](ids)) < .12
    assert torch.equal(q[0](ids), q[0].weight[ids])
    assert 'max_norm' in Quantizer(8, embeddings=True).plan(nn.Embedding(9, 4, max_norm=1.))[''].reason

def test_ties_and_aliases():
    torch.manual_seed(0)
    m = nn.ModuleDict(dict(a=nn.Linear(32, 32), b=nn.Linear(32, 32), c=nn.Linear(32, 8)))
    m.b.weight,m['d'] = m.a.weight,m.c
    plan = Quantizer(8).plan(m)
    assert 'tied with b.weight' in plan['a'].reason and plan['c'].aliases == ('d',)
    q = plan.apply(m)
    assert q.a.weight is q.b.weight and q.c is q.d and type(q.c) is QuantLinear

class LoRA(nn.Linear):
    def forward(self, x): return super().forward(x)

def test_layers_that_stay():
    torch.manual_seed(0)
    m = nn.ModuleDict(dict(sub=LoRA(8, 8), par=parametrizations.weight_norm(nn.Linear(8, 8)), pruned=nn.Linear(8, 8), lazy=nn.LazyLinear(4),
                           none=nn.Linear(64, 0), rnn=nn.LSTM(4, 4), ok=nn.Linear(8, 8)))
    prune.l1_unstructured(m.pruned, 'weight', .5)
    m['q'] = Quantizer(4).quantize(nn.Linear(64, 8))
    m['h'] = Quantizer(Half()).quantize(nn.Linear(64, 8))
    plan = Quantizer(8).plan(m)
    why = {o.name: o.reason for o in plan.skipped}
    assert 'types=(LoRA,)' in why['sub'] and 'remove_parametrizations' in why['par'] and 'prune.remove' in why['pruned']
    assert 'not initialized' in why['lazy'] and why['none'] == 'zero-size' and 'recurrent' in why['rnn']
    assert why['q'] == 'already int4 g64 (QuantLinear)' and 'already in half precision' in why['h']
    assert [o.name for o in plan.replaced] == ['ok']
    opted = Quantizer(8, types=LoRA).plan(m)
    assert opted['sub'].changed and type(unpack(opted.apply(m)).sub) is LoRA

def test_pairs_and_order():
    m,x = mlp(),rows()
    small = FC_Decomposer(.5).decompose(m)
    q = Quantizer(8).quantize(small, x)
    assert type(q[0][0]) is type(q[0][1]) is QuantLinear and rel(q(x), small(x)) < .03
    with pytest.warns(UserWarning, match='quantized; decompose before quantizing'): FC_Decomposer(.5).decompose(Quantizer(8).quantize(m))
    pair = LowRankLinear(nn.Linear(48, 8, bias=False), nn.Linear(8, 96))
    assert rel(Quantizer(8).quantize(pair).weight, pair.weight) < .03
    plan2 = Quantizer(8).plan(m)
    assert not Quantizer(8).plan(plan2.apply(m)).replaced

# ------------------------------------------------------------------ low-rank pairs and corrections

LOW = Pair(.5),Pair(.6, 4),Corrected(3, rank=4),Corrected(2, group=16, rank=6)

@pytest.mark.parametrize('H', (None, 'full', 'diag'))
@pytest.mark.parametrize('m,n', ((12, 20), (20, 12)))
def test_a_pair_is_the_best_of_its_rank(m, n, H):
    "Against the truncated SVD of the weighted weight, in float64"
    torch.manual_seed(0)
    W,X,Y = torch.randn(m, n).double(),torch.randn(300, n).double() @ torch.randn(n, n).double(),torch.randn(300, m).double()
    S,M = X.T @ X/300,Y.T @ Y/300
    M = {'full': M, 'diag': M.diagonal(), None: None}[H]
    A = directions(W, [S[None]], M).first(4)
    B = W @ S @ A.T @ torch.linalg.inv(A @ S @ A.T)
    def root(C):
        e,Q = torch.linalg.eigh(C)
        return Q*e.clamp(min=0).sqrt() @ Q.T
    F = root(torch.diag(M) if H == 'diag' else torch.eye(m).double() if H is None else M)
    best = torch.linalg.svdvals(F @ W @ root(S))[4:].square().sum()
    got = (F @ (W - B @ A) @ root(S)).square().sum()
    assert best*(1 - 1e-9) <= got <= best*(1.02 if H else 1 + 1e-5)       # H is damped

@pytest.mark.parametrize('f', LOW, ids=str)
def test_predicted_error_of_low_rank(f):
    m,x = mlp(),rows(2000)
    plan = Quantizer({'0': f}).plan(m, x, sensitivity=True)
    q,row = plan.apply(m),plan['0']
    with torch.no_grad(): y,got = m[0](x),q[0](x)
    measured = ((got - y).square().sum()/(y - y.mean(0)).square().sum()).sqrt().item()
    assert abs(row.error - measured) < .06*measured and row.loss > 0
    worse = Quantizer({'0': Int(f.bits, f.group) if isinstance(f, Corrected) else Pair(f.share/2, f.bits)}).plan(m, x, sensitivity=True)
    assert row.error < worse['0'].error

@pytest.mark.parametrize('f', LOW, ids=str)
def test_low_rank_layers_go_everywhere(f, tmp_path):
    m,x = mlp(),rows()
    m[2].weight.requires_grad_(False)
    q,was = Quantizer({'0': f, '2': f, '4': 8}),snapshot(m)
    plan = q.plan(m, x)
    small = plan.apply(m)
    assert same(was, snapshot(m)) and size(small) == plan.bytes_after and count_params(small) == plan.params_after
    assert [o.changed for o in plan.layers] == [True]*3 and str(f) in repr(plan)
    back = Plan.load(plan.save(tmp_path/'plan.json'))
    assert back == plan and stepped(back.apply(m, data=x).state_dict(), small.state_dict())
    with pytest.warns(UserWarning, match='2 layers'): back.apply(m)
    again = plan.skeleton(mlp())
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x)) and torch.equal(copy.deepcopy(small)(x), small(x))
    save_compressed(small, tmp_path/'small', plan)
    assert torch.equal(load_compressed(tmp_path/'small', mlp)(x), small(x))
    plain = unpack(small)
    assert not any(isinstance(o, QuantLayer) for o in plain.modules()) and rel(plain(x), small(x)) < 1e-5
    assert not any(p.requires_grad for n,p in small[2].named_parameters() if 'bias' not in n)
    assert not Quantizer(8).plan(small).replaced and torch.allclose(torch.export.export(small, (x,)).module()(x), small(x), atol=1e-5)
    with pytest.raises(RuntimeError, match='not what was planned'): as_planned(plan, m, count_params(m))

@pytest.mark.parametrize('f', LOW[::2], ids=str)
def test_low_rank_layers_in_onnx(f, tmp_path):
    pytest.importorskip('onnxruntime')
    from fasterai.export.onnx import export_onnx
    m,x = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval(),rows(8, 64)
    r = export_onnx(Quantizer({'0': f}).quantize(m, rows(200, 64)), tmp_path/'a.onnx', x, latency=False)
    # wider parts are unpacked when the file is loaded
    assert r.nodes.get('MatMulNBits', 0) == sum(o.bits <= 4 for o,*_ in parts_of(f, 96, 64)) and r.error < 1e-3

def test_low_rank_in_a_budget():
    torch.manual_seed(0)
    U,V = torch.randn(192, 6),torch.randn(6, 192)
    m,x = nn.Sequential(nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 8)).eval(),rows(400, 192)
    with torch.no_grad(): m[0].weight.copy_(U @ V/40)       # of rank 6: a pair loses nothing
    plan = Quantizer(ByteBudget(.1, formats=(2, 4, 8, Pair(.08)))).plan(m, x)
    assert plan['0'].format == Pair(.08) and rel(plan.apply(m)(x), m(x)) < .03
    assert Quantizer(ByteBudget(.1)).plan(m, x)['0'].loss > 20*plan['0'].loss

def test_layers_that_have_no_pair():
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 64), nn.Linear(64, 2))
    plan = Quantizer(Pair(.3)).plan(m)
    assert [o.changed for o in plan.layers] == [False, True, False] and 'is for nn.Linear' in plan['0'].reason and 'less than rank 1' in plan['3'].reason
    with pytest.warns(UserWarning, match='pairs of 1 layers are made for their weights alone'): Quantizer(Pair(.3)).plan(m)
    with pytest.raises(TypeError, match='is for nn.Linear'): plan.edit('0', Pair(.3)).apply(m)
    with torch.no_grad(): m[2].weight.zero_()
    q = Quantizer({'2': Corrected(2, rank=100)}).quantize(m, torch.randn(5, 3, 3, 3))
    assert not q[2].weight.any() and q[2].low[0].scales.isfinite().all()

# ------------------------------------------------------------------ errors

@pytest.mark.parametrize('args,kw,err,text', (
    ((True,), {}, TypeError, 'bits must be an int|a format is'), ((4.,), {}, TypeError, 'a format is a number of bits'),
    (('4',), {}, TypeError, 'a format is a number of bits'), ((16,), {}, ValueError, r'bits must be one of 2, 3, 4, 5, 6, 8, got 16. For half precision'),
    ((1,), {}, ValueError, 'got 1'), ((0,), {}, ValueError, 'got 0'), (({},), {}, ValueError, 'names no layer'),
    ((4,), dict(rounding='up'), ValueError, 'rounding must be'), ((4,), dict(policy=8), ValueError, 'not both'),
    ((4,), dict(types=3), TypeError, 'not iterable'), ((nn.Linear(2, 2),), {}, TypeError, 'A model goes to the method')))
def test_bad_settings(args, kw, err, text):
    with pytest.raises(err, match=text): Quantizer(*args, **kw)

def test_bad_formats():
    with pytest.raises(ValueError, match='power of 2 of at least 16, got 48'): Int(4, group=48)
    with pytest.raises(ValueError, match="needs 8 bits"): Int(4, activations='dynamic')
    with pytest.raises(ValueError, match="'bfloat16' or 'float16'"): Half('int8')
    for k in (4, Int(3, group=32, symmetric=True), Half('float16')): assert mk_format(mk_format(k)) == mk_format(k)

@pytest.mark.parametrize('kw', (dict(layers='fc9'), dict(exclude='fc9'), dict(policy={'fc9': 4})), ids=lambda o: next(iter(o)))
def test_unknown_names(kw):
    with pytest.raises(ValueError, match="'fc9'.*Closest"): Quantizer(**kw).plan(mlp())

def test_nan():
    m = mlp()
    with torch.no_grad(): m[2].weight[0,:3] = float('nan')
    with pytest.raises(ValueError, match="the weight of '2' has 3 NaN or Inf of 6144 values. .*exclude='2'"): Quantizer(8).plan(m)
    assert Quantizer(8, exclude='2').quantize(m)[0].qweight.any()

def test_nothing_to_do():
    m = nn.Sequential(nn.ReLU())
    assert len(Quantizer(8).plan(m)) == 0
    with pytest.warns(UserWarning, match='nothing was quantized: it has no layer'): assert type(Quantizer(8).quantize(m)) is nn.Sequential

def test_no_data_warning():
    with pytest.warns(UserWarning, match='no data: 3 layers are rounded to nearest at 4 bits. With data= the error'): Quantizer(4).plan(mlp())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Quantizer(8).plan(mlp())

# ------------------------------------------------------------------ data

def test_forms_of_data():
    m,x = mlp(),rows(64)
    want = Quantizer(3).quantize(m, x).state_dict()
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(64)), batch_size=64)
    dls = DataLoaders(dl, dl)
    learn = Learner(dls, m, loss_func=nn.MSELoss())
    for data in ([x], [(x,)], dl, dls, learn, lambda m: m(x), iter([x]), [x[:32], x[32:]]):
        got = Quantizer(3).quantize(m, data).state_dict()
        assert all(torch.equal(got[k], want[k]) for k in got if 'zeros' in k or 'qweight' in k) or isinstance(data, list)
    with pytest.raises(ValueError, match='no batches'): Quantizer(3).plan(m, [])

def test_moments_collected_before():
    from fasterai.core.inputs import collect_inputs
    m,x = mlp(),rows()
    want = Quantizer(4).quantize(m, x).state_dict()
    for data in (collect_inputs(m, x), calibrate(m, x, inputs=True)): assert stepped(Quantizer(4).quantize(m, data).state_dict(), want)
    with pytest.raises(ValueError, match='hold no moments of inputs'): Quantizer(4).plan(m, calibrate(m, x))
    conv,img = nn.Sequential(nn.Conv2d(3, 8, 3)),torch.randn(9, 3, 8, 8)
    with pytest.raises(ValueError, match="the moments of '0' are of 3 channels, its weight has 27 inputs"): Quantizer(4).plan(conv, collect_inputs(conv, img))
    assert Quantizer(4).plan(conv, collect_inputs(conv, img, patches=True))['0'].calibrated

def test_the_bias_takes_up_the_mean():
    m,x = mlp(),rows(2000) + 3
    q,near = Quantizer(3).quantize(m, x),Quantizer(3, rounding='nearest').quantize(m)
    with torch.no_grad(): off,plain = ((o[0](x) - m[0](x)).mean(0).abs().max().item() for o in (q, near))
    assert off < .002 < .02 < plain
    bare = mlp(bias=False)
    assert all(o.bias is None for o in Quantizer(3).quantize(bare, x) if isinstance(o, QuantLayer))

def test_padding_does_not_count():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 8)
        def forward(self, x, attention_mask=None): return self.fc(x)
    torch.manual_seed(0)
    m,x,mask = Masked(),torch.randn(20, 6, 16),torch.ones(20, 6, dtype=torch.long)
    mask[:,4:] = 0
    x[:,4:] = 1000
    got = Quantizer(3).plan(m, [dict(x=x, attention_mask=mask)])
    want = Quantizer(3).plan(m, [dict(x=x[:,:4], attention_mask=mask[:,:4])])
    assert got['fc'].error == pytest.approx(want['fc'].error, rel=1e-6)

def test_unreached_layer():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.used,self.idle = nn.Linear(32, 8),nn.Linear(32, 8)
        def forward(self, x): return self.used(x)
    plan = Quantizer(4).plan(Part(), rows(50, 32))
    assert 'not reached by the data' in plan['idle'].reason and plan['idle'].rounding == 'nearest' and plan['used'].calibrated

# ------------------------------------------------------------------ budgets

@pytest.mark.parametrize('ratio', (.1, .15, .3, .6))
def test_budget(ratio):
    m,x = mlp(),rows(500)
    plan = Quantizer(ByteBudget(ratio)).plan(m, x)
    before = sum(o.before for o in plan.layers)
    assert sum(o.after for o in plan.layers) <= ratio*before and 'of the least possible' in plan.note
    assert size(plan.apply(m)) == plan.bytes_after

def test_budget_is_at_least_as_good_as_the_best_single_format():
    m,x = mlp(),rows(500)
    for f in (Int(3), Int(4), Int(6)):
        one = Quantizer(f).plan(m, x, sensitivity='full')
        many = Quantizer(ByteBudget(bytes=sum(o.after for o in one.layers))).plan(m, x)
        assert sum(o.loss or 0 for o in many.layers) <= 1.001*sum(o.loss for o in one.layers)

def test_budget_beside_layers_without_sensitivity():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.table,self.used,self.idle = nn.Embedding(20, 32),nn.Linear(32, 64),nn.Linear(32, 64)
        def forward(self, x): return self.used(self.table(x))
    torch.manual_seed(0)
    plan = Quantizer(ByteBudget(.15), embeddings=True).plan(Part(), torch.randint(20, (30, 5)))
    assert plan['table'].format == Int(8) and plan['table'].scales == 'float32'
    assert plan['used'].after + plan['idle'].after <= .15*2*4*32*64 and plan['used'].loss is not None and plan['idle'].loss is None
    assert abs(plan['used'].format.bits - plan['idle'].format.bits) <= 1

def test_budget_limits():
    m,x = mlp(),rows()
    with pytest.raises(ValueError, match=r'ByteBudget\(0.02\) allows 911 bytes, but these 3 layers need at least'): Quantizer(ByteBudget(.02)).plan(m, x)
    whole = Quantizer(ByteBudget(1.)).plan(m, x)
    assert not whole.replaced and whole['0'].reason == 'left as it is by the budget'
    for bad in (dict(), dict(ratio=.1, bytes=5)):
        with pytest.raises(ValueError, match='one of the two'): ByteBudget(**bad)
    with pytest.raises(ValueError, match=r'in \(0, 1\], got 50. For 50 bytes pass bytes=50'): ByteBudget(50)

# ------------------------------------------------------------------ fastai, and the world around

def dls_of(n=128):
    x = rows(n)
    ds = list(zip(x, (x[:,0] > 0).long()))
    return DataLoaders.from_dsets(ds, ds, bs=32, num_workers=0)

@pytest.mark.parametrize('bias', (True, False))
def test_learner(bias, tmp_path):
    learn = Learner(dls_of(), mlp(bias), loss_func=nn.CrossEntropyLoss(), path=tmp_path)
    dense = learn.model
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        assert learn.quantize(4) is learn and learn.opt is None and len(learn.plans) == 1
        y = learn.get_preds()[0]
        learn.validate()
        learn.save('q')
        learn.fit(2, 1e-3, cbs=SaveModelCallback())
        assert all(p.isfinite().all() for p in learn.model.parameters())
        learn.load('q')
        assert torch.allclose(learn.get_preds()[0], y, atol=1e-5)
        learn.lr_find(num_it=30, show_plot=False)
        assert learn.uncompress().model is dense

@pytest.mark.parametrize('split', (lambda m: [list(m[:2].parameters()), list(m[2:].parameters())],
    lambda m: [[m[0].weight, m[0].bias], [m[2].weight, m[2].bias, m[4].weight, m[4].bias]]), ids=('all', 'by name'))
def test_parameter_groups(split):
    learn = Learner(dls_of(), mlp(), loss_func=nn.CrossEntropyLoss(), splitter=split)
    learn.freeze()
    learn.quantize(4)
    assert not learn.model[0].gain.requires_grad and learn.model[2].gain.requires_grad
    learn.create_opt()
    groups = [{id(p) for p in g} for g in learn.opt.param_lists]
    assert groups == [{id(p) for p in learn.model[:2].parameters()}, {id(p) for p in learn.model[2:].parameters()}]

def test_export_and_load_learner(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 32), nn.ReLU(), nn.Linear(32, 10))
    learn = Learner(digits_dls(n=160, bs=32), net, loss_func=nn.CrossEntropyLoss(), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        learn.quantize(4)
        learn.export('q.pkl')
        back,img = load_learner(tmp_path/'q.pkl'),learn.dls.valid_ds[0][0]
        with back.no_bar(): assert torch.allclose(back.predict(img)[2], learn.predict(img)[2], atol=1e-6)
    assert back.plans[0] == learn.plans[0] and not back.plans[0].rounded

def test_trained_scales_are_used():
    "fastai's optimizers write to `data`, which autograd does not see"
    q,x = Quantizer(4).quantize(mlp(), rows()).float(),rows()
    with torch.no_grad(): y = q(x)
    q(x).square().mean().backward()
    for p in q.parameters(): p.data.add_(p.grad.data, alpha=-.1)
    with torch.no_grad():
        assert not torch.equal(q(x), y) and torch.allclose(q(x), unpack(copy.deepcopy(q))(x), atol=1e-5)

def test_self_distillation():
    from fasterai.core.distill import SelfDistillation
    random.seed(0)          # the order of the batches
    learn = Learner(dls_of(), mlp(), loss_func=nn.CrossEntropyLoss())
    teacher,x = copy.deepcopy(learn.model),torch.stack([o for o,_ in learn.dls.valid_ds])
    with learn.no_bar(), learn.no_logging():
        learn.quantize(2)
        before = rel(learn.model(x), teacher(x))
        learn.fit(8, 1e-2, cbs=SelfDistillation(loss_func=F.mse_loss))
    assert rel(learn.model(x), teacher(x)) < .95*before

def test_global_state_and_imports():
    code = '''import sys, warnings; warnings.simplefilter('error', DeprecationWarning)
import torch
from torch import nn
from torch._inductor import config
from fasterai.quantize.quantizer import Quantizer
was = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.quantized.engine, config.coordinate_descent_tuning
m = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
Quantizer(4).quantize(m, torch.randn(50, 64))(torch.randn(3, 64))
from fasterai.quantize.formats import Int
Quantizer(Int(8, activations='dynamic')).quantize(m)(torch.randn(3, 64))
assert was == (torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.quantized.engine, config.coordinate_descent_tuning)
assert not {'torchao', 'onnx', 'onnxruntime', 'onnxscript'} & set(sys.modules)'''
    subprocess.run([sys.executable, '-c', code], check=True)

@pytest.mark.slow
def test_compile():
    q,x = Quantizer(4).quantize(mlp(), rows()),rows()
    with torch.no_grad(): assert rel(torch.compile(q)(x), q(x)) < 1e-5

def test_a_model_that_has_run_can_be_copied():
    "What a layer keeps for speed goes into no copy"
    m,x = Quantizer(Int(8, activations='dynamic')).quantize(mlp(), rows()),rows(8)
    y = m(x)
    assert torch.equal(copy.deepcopy(m)(x), y) and rel(unpack(m)(x), y) < .02
    assert torch.equal(FC_Decomposer(.5).decompose(m)(x), y)      # its layers are packed: nothing is left to decompose, in a copy

def test_tables_beside_a_budget():
    "Four bits where they are asked for, eight as a rule; what is no number of bits is refused"
    torch.manual_seed(0)
    m,x = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 32)).eval(),torch.randint(500, (8, 6))
    for opt,fmt in ((True, Int(8)), (4, Int(4, group=32))):
        plan = Quantizer(ByteBudget(.25), embeddings=opt).plan(m, [x])
        assert plan.layers[0].format == str(fmt) or plan.layers[0].format == fmt
        W,q = m[0].weight.detach().double(),unpack(plan.apply(m))[0].weight.detach().double()
        g,top = (64, 255) if opt is True else (32, 15)
        V = W.view(500, -1, g)
        lo,step = V.amin(2, True),(V.amax(2, True) - V.amin(2, True))/top
        near = ((V - lo)/step).round()*step + lo            # a finer grid than a whole zero point allows
        assert (near - V).norm()*.8 < (q.view_as(V) - V).norm() < 1.3*(near - V).norm()
    with pytest.raises(ValueError, match='embeddings must be'): Quantizer(4, embeddings=3)
