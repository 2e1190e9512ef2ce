"Channels, neurons and heads that go together: found, sliced and proved"
import random, re
from copy import deepcopy
import pytest, torch, torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from fasterai.core.check import _numbers
from fasterai.core.surgery import copy_with
from fasterai.prune.attention import FewerHeads
from fasterai.prune.groups import Group, Member, find_groups, prove_groups, slice_units
from fasterai.prune.slicing import sliced

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

class Net(nn.Module):
    "Layers by name, and a forward given as a function"
    def __init__(self, f, **layers):
        super().__init__()
        self.f = f
        for k,m in layers.items(): setattr(self, k, m)
    def forward(self, x): return self.f(self, x)

def conv(n, m, k=3, **kw): return nn.Conv2d(n, m, k, padding=k//2, **kw)
def mlp(*sizes):
    return nn.Sequential(*[o for n,m in zip(sizes, sizes[1:]) for o in (nn.Linear(n, m), nn.ReLU())][:-1])
def rows(n=4, size=8): return torch.randn(n, size)
def image(size=8): return torch.randn(2, 3, size, size)
def by_name(groups): return {g.name: g for g in groups}
def ready(groups): return [g for g in groups if not g.reason]
def some(g): return sorted(torch.randperm(g.units)[:max(1, g.units*2//3)].tolist())

def worn(model, dtype=torch.float64):
    "In `dtype`, with batch norms that have seen something"
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0, .3)
            m.running_var.uniform_(.5, 1.5)
            nn.init.uniform_(m.weight, .5, 1.5)
            nn.init.normal_(m.bias, 0, .3)
    return (model if dtype == torch.float32 else model.to(dtype)).eval()

def reads(m, columns):
    "Set the columns of a layer that read units to zero, written out for each kind of layer"
    with torch.no_grad():
        if type(m).__name__ == 'Conv1D': m.weight[columns] = 0
        elif isinstance(m, nn.ConvTranspose2d): m.weight[columns] = 0
        else: m.weight[:, columns] = 0

def check_exact(model, x, at_least=1):
    "Sliced = dense, once what reads the dropped units is zero; all groups at once. Returns the groups and the sliced model"
    model,x = worn(model),x.double() if x.is_floating_point() else x
    groups = find_groups(model, x)
    assert len(ready(groups)) >= at_least, [str(g) for g in groups]
    kept,dense = {g.name: some(g) for g in ready(groups)},deepcopy(model)
    for g in ready(groups):
        for o in g.readers: reads(dense.get_submodule(o.layer), o.of(sorted({*range(g.units)} - {*kept[g.name]})))
    small = slice_units(model, groups, kept)
    with torch.no_grad(): a,b = _numbers(dense(x)),_numbers(small(x))
    for s,t in zip(a, b, strict=True): torch.testing.assert_close(s, t, rtol=1e-9, atol=1e-9)
    assert not kept or sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    return groups, small

class Block(nn.Module):
    def __init__(self, n, m):
        super().__init__()
        self.a,self.b = nn.Sequential(conv(n, m, bias=False), nn.BatchNorm2d(m), nn.ReLU(), conv(m, m), nn.BatchNorm2d(m)), nn.Identity()
        if n != m: self.b = conv(n, m, 1)
    def forward(self, x): return F.relu(self.a(x) + self.b(x))

NETS = {
    'mlp':       lambda: (mlp(8, 16, 12, 4), rows()),
    'tokens':    lambda: (mlp(8, 16, 4), torch.randn(2, 5, 8)),
    'residual':  lambda: (nn.Sequential(conv(3, 8), Block(8, 8), Block(8, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)), image()),
    'flatten':   lambda: (nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8*16, 10), nn.Linear(10, 3)), image()),
    'depthwise': lambda: (nn.Sequential(conv(3, 8), conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.PReLU(8), conv(8, 12, 1), conv(12, 4)), image()),
    'multiplier': lambda: (nn.Sequential(conv(3, 8), conv(8, 16, groups=8), nn.BatchNorm2d(16), conv(16, 4, 1)), image()),
    'grouped':   lambda: (nn.Sequential(conv(3, 16), conv(16, 24, groups=4), nn.GroupNorm(4, 24), nn.ReLU(), conv(24, 4)), image()),
    'groupnorm': lambda: (nn.Sequential(conv(3, 16), nn.GroupNorm(8, 16), nn.ReLU(), conv(16, 4)), image()),
    'instance':  lambda: (nn.Sequential(conv(3, 16), nn.InstanceNorm2d(16, affine=True, track_running_stats=True), conv(16, 4)), image()),
    'transposed': lambda: (nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 2, 2, 2)), image()),
    'conv1d':    lambda: (nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)), torch.randn(2, 3, 9)),
    'conv3d':    lambda: (nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.Conv3d(8, 4, 1)), torch.randn(2, 3, 4, 4, 4)),
    'cat':       lambda: (Net(lambda s,x: s.c(torch.cat([s.a(x), F.relu(s.b(x)), x], 1)), a=conv(3, 8), b=conv(3, 6), c=conv(17, 4)), image()),
    'shared':    lambda: (Net(lambda s,x: s.o(s.a(F.relu(s.a(F.relu(s.a(s.i(x))))))), i=nn.Linear(8, 12), a=nn.Linear(12, 12), o=nn.Linear(12, 3)), rows()),
    'pair':      lambda: (nn.Sequential(nn.Sequential(nn.Linear(8, 5, bias=False), nn.Linear(5, 12)), nn.ReLU(), nn.Linear(12, 3)), rows()),
    'gated':     lambda: (Net(lambda s,x: s.o(F.silu(s.g(x))*s.u(x)), g=nn.Linear(8, 12), u=nn.Linear(8, 12), o=nn.Linear(12, 3)), rows()),
    'squeeze':   lambda: (Net(lambda s,x: s.o((y := s.i(x))*s.e(F.relu(s.s(y.mean((2, 3), True)))).sigmoid()),
                              i=conv(3, 12), s=conv(12, 4, 1), e=conv(4, 12, 1), o=conv(12, 4)), image()),
    'two_heads': lambda: (Net(lambda s,x: dict(a=s.a(h := F.relu(s.i(x))), rest=(s.b(h), [s.c(h)])),
                              i=nn.Linear(8, 12), a=nn.Linear(12, 3), b=nn.Linear(12, 2), c=nn.Linear(12, 12)), rows()),
    'lookup':    lambda: (nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 9), nn.Linear(9, 3)), torch.randint(0, 20, (2, 5))),
    'shuffle':   lambda: (nn.Sequential(conv(3, 16), nn.PixelShuffle(2), nn.ReLU(), conv(4, 2)), image()),
    'glu':       lambda: (Net(lambda s,x: s.b((c := s.a(x).chunk(2, -1))[0]*c[1].sigmoid()), a=nn.Linear(8, 12), b=nn.Linear(6, 2)),
                  torch.randn(2, 5, 8)),
    'scale':     lambda: (Net(lambda s,x: s.o(s.i(x)*s.gamma), i=conv(3, 8), o=conv(8, 4)), image()),
}

def made(name):
    model,x = NETS[name]()
    if name == 'scale': model.gamma = nn.Parameter(torch.full((8, 1, 1), 1e-6))
    return model, x

@pytest.mark.parametrize('name', NETS)
def test_sliced_is_masked(name): check_exact(*made(name))

SIZES = dict(mlp=[16, 12], residual=[8, 8, 12, 12], flatten=[8, 10], depthwise=[8, 12], grouped=[4], multiplier=[8], groupnorm=[8], cat=[8, 6],
             shared=[12], pair=[5, 12], gated=[12], squeeze=[12, 4], two_heads=[12], lookup=[12, 9])

@pytest.mark.parametrize('name', SIZES)
def test_units_of_each_group(name):
    model,x = made(name)
    assert sorted(g.units for g in ready(find_groups(model, x))) == sorted(SIZES[name])

def test_members_of_a_residual_group():
    model,x = made('residual')
    g = by_name(find_groups(model, x))['0']
    assert [o.layer for o in g.writers] == ['0', '1.a.3'] and [o.layer for o in g.readers] == ['1.a.0', '2.a.0', '2.b']
    assert [o.layer for o in g.carriers] == ['1.a.4'] and g.kind == 'channels'

def test_indices_behind_flatten_and_cat():
    model,x = made('flatten')
    assert by_name(find_groups(model, x))['0'].readers[0].index[2] == tuple(range(32, 48))
    model,x = made('cat')
    assert by_name(find_groups(model, x))['b'].readers[0].index == tuple((8+i,) for i in range(6))

class Random(nn.Module):
    "Layers drawn one after the other; each takes the last tensor, and some an earlier one too"
    def __init__(self, seed):
        super().__init__()
        draw,self.steps,widths = random.Random(seed),nn.ModuleList(),[3]
        self.earlier = []
        for _ in range(draw.randint(4, 10)):
            c = widths[-1]
            kind = draw.choice(['conv', 'conv', 'deep', 'grouped', 'bn', 'gn', 'add', 'gate', 'cat', 'glu', 'squeeze', 'turn'])
            same = [i for i,w in enumerate(widths[:-1]) if w == c]
            if kind in ('add', 'gate') and not same or kind in ('grouped', 'gn', 'glu') and c % 4: kind = 'conv'
            m = (conv(c, m := draw.choice([4, 8, 12]), draw.choice([1, 3]), bias=draw.random() < .7) if kind == 'conv'
                 else conv(c, c*draw.choice([1, 2]), groups=c) if kind == 'deep' else conv(c, 8, groups=2) if kind == 'grouped'
                 else nn.BatchNorm2d(c) if kind == 'bn' else nn.GroupNorm(c//2, c) if kind == 'gn'
                 else nn.Sequential(conv(c, 4, 1), nn.ReLU(), conv(4, c, 1)) if kind == 'squeeze' else nn.Identity())
            self.steps.append(m)
            self.earlier.append((kind, draw.choice(same) if kind in ('add', 'gate') else draw.randrange(len(widths))))
            widths.append(c + widths[self.earlier[-1][1]] if kind == 'cat' else c//2 if kind == 'glu'
                          else getattr(m, 'out_channels', c))
        self.out = nn.Linear(sum(widths[1:]), 3)

    def forward(self, x):
        xs = [x]
        for m,(kind,i) in zip(self.steps, self.earlier):
            x,y = xs[-1],xs[i]
            xs.append(x + y if kind == 'add' else x*y.sigmoid() if kind == 'gate' else torch.cat([x, y], 1) if kind == 'cat'
                      else F.glu(x, 1) if kind == 'glu' else x.roll(1, 1) if kind == 'turn'
                      else x*m(x.mean((2, 3), True)).sigmoid() if kind == 'squeeze' else F.gelu(m(x)))
        return self.out(torch.cat([o.mean((2, 3)) for o in xs[1:]], 1))

@pytest.mark.parametrize('seed', range(40))
def test_random_networks(seed):
    torch.manual_seed(seed)
    check_exact(Random(seed), image(), at_least=0)

# What stays, and why

class Scaled(nn.Module):
    "Reads a weight that belongs to a child"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(8, 12),nn.Linear(12, 3)
    def forward(self, x): return self.b(F.relu(F.linear(x, self.a.weight, self.a.bias)))

def tied():
    m = mlp(8, 12, 12, 12, 3)
    m[4].weight = m[2].weight
    return m

def parametrized():
    m = mlp(8, 12, 3)
    nn.utils.parametrizations.weight_norm(m[0])
    return m

def spectral():
    m = mlp(8, 12, 3)
    nn.utils.spectral_norm(m[0])
    return m

def lora():
    m = mlp(8, 12, 3)
    m[0].lora = nn.Linear(8, 12)
    return m

STAYS = {
    'output':    (lambda: mlp(8, 12, 3), rows, '2', 'an output of the model'),
    'parent':    (Scaled, rows, 'a', 'is its weight read by another module'),
    'tied':      (tied, rows, '0', "'2' is tied with 4.weight"),
    'norm':      (lambda: nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 3)), rows, '0', 'normalizes over these units'),
    'rms':       (lambda: nn.Sequential(nn.Linear(8, 12), nn.RMSNorm(12), nn.Linear(12, 3)), rows, '0', 'normalizes over these units'),
    'one_norm':  (lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(1, 8), conv(8, 4)), image, '0', 'there is only one'),
    'constant':  (lambda: Net(lambda s,x: s.b(s.a(x).view(4, 4, 3).mean(1)), a=nn.Linear(8, 12), b=nn.Linear(3, 2)), rows, 'a', ''),
    'chunk':     (lambda: Net(lambda s,x: s.b((y := s.a(x))[..., :6]*y[..., 6:].sigmoid()), a=nn.Linear(8, 12), b=nn.Linear(6, 2)),
                  lambda: torch.randn(2, 5, 8), 'a', ''),
    'input':     (lambda: Net(lambda s,x: s.c(s.b(s.a(x)) + x), a=nn.Linear(8, 12), b=nn.Linear(12, 8), c=nn.Linear(8, 3)), rows, 'b',
                  'the input of the model is added to them'),
    'roll':      (lambda: Net(lambda s,x: s.b(s.a(x).roll(1, 1)), a=conv(3, 8), b=conv(8, 4)), image, 'a', 'computes something else'),
    'permuted':  (lambda: Net(lambda s,x: s.b(s.a(x)[:, [*range(1, 12), 0]]), a=nn.Linear(8, 12), b=nn.Linear(12, 2)), rows, 'a', ''),
    'rotated':   (lambda: nn.Sequential(conv(3, 8), Net(lambda s,x: torch.cat([x[:, 2:], x[:, :2]], 1)), conv(8, 4)), image, '0', ''),
    'rotated_few': (lambda: nn.Sequential(conv(3, 4), Net(lambda s,x: torch.cat([x[:, 2:], x[:, :2]], 1)), conv(4, 4)), image, '0', ''),
    'softmax':   (lambda: nn.Sequential(nn.Linear(8, 12), nn.Softmax(-1), nn.Linear(12, 3)), rows, '0', 'computes something else'),
    'unshuffle': (lambda: nn.Sequential(conv(3, 4), nn.PixelUnshuffle(2), conv(16, 2)), image, '0', ''),
    'weight_norm': (parametrized, rows, '0', 'parametrized; torch.nn.utils.parametrize.remove_parametrizations'),
    'lora':      (lora, rows, '0', 'holds more than weight and bias'),
    'lstm':      (lambda: Net(lambda s,x: s.b(s.l(s.a(x))[0]), a=nn.Linear(8, 12), l=nn.LSTM(12, 6), b=nn.Linear(6, 2)),
                  lambda: torch.randn(2, 5, 8), 'a', "'l' is an LSTM: its gates share their units"),
    'unread':    (lambda: Net(lambda s,x: s.b(x) + s.a(x).sum(), a=nn.Linear(8, 12), b=nn.Linear(8, 2)), rows, 'a', ''),
    'idle':      (lambda: Net(lambda s,x: s.b(x) if x.sum() < 1e9 else s.d(s.c(x)), b=nn.Linear(8, 3), c=nn.Linear(8, 12), d=nn.Linear(12, 3)),
                  rows, 'c', 'forward does not call it'),
    'random':    (lambda: Net(lambda s,x: s.b(F.dropout(s.a(x), .5, True)), a=nn.Linear(8, 12), b=nn.Linear(12, 3)), rows, 'a',
                  'draws random numbers in eval mode'),
    'spectral':  (spectral, rows, '0', 'its weight is computed by SpectralNorm; torch.nn.utils.remove_spectral_norm'),
    'frozen_norm': (lambda: nn.Sequential(conv(3, 8), FrozenBatchNorm2d(8), conv(8, 4)), image, '0', 'fails without some of them'),
    'bilinear':  (lambda: Net(lambda s,x: s.b(s.a(x), x), a=nn.Linear(8, 12), b=nn.Bilinear(12, 8, 3)), rows, 'a', ''),
    'root':      (lambda: nn.Linear(8, 3), rows, '', 'an output of the model'),
}

@pytest.mark.parametrize('case', STAYS)
def test_what_stays_has_a_reason(case):
    make,x,name,reason = STAYS[case]
    g = by_name(find_groups(make().eval(), x()))[name]
    assert g.reason and reason in g.reason and '\n' not in g.reason

def test_the_rest_of_the_model_is_pruned():
    m = Net(lambda s,x: s.d(F.relu(s.c(s.b(s.a(x).view(4, 4, 3).mean(1))))), a=nn.Linear(8, 12), b=nn.Linear(3, 10), c=nn.Linear(10, 9), d=nn.Linear(9, 2))
    groups = by_name(find_groups(m, rows()))
    assert groups['a'].reason and not groups['b'].reason and not groups['c'].reason

def test_a_wrong_group_is_found_out():
    m,x = mlp(8, 12, 6, 3),rows()
    g = by_name(find_groups(m, x))['0']
    writer,reader = g.members
    shifted = Group('0', 12, (writer, Member('2', 'in', (*reader.index[1:], reader.index[0]))), 'neurons')
    good = by_name(find_groups(m, x))['2']
    a,b = prove_groups(m, x, [shifted, good])
    assert 'computes something else' in a.reason and not b.reason

def test_a_branch_that_begins_at_zero_hides_nothing():
    "Its last weights are zero, and so a wrong index inside changes no output"
    m = Net(lambda s,x: x + s.c(s.b(s.a(x)[:, [*range(1, 12), 0]])), a=nn.Linear(8, 12), b=nn.Linear(12, 12), c=nn.Linear(12, 8))
    nn.init.zeros_(m.c.weight)
    nn.init.zeros_(m.c.bias)
    assert by_name(find_groups(m, rows()))['a'].reason

# Attention

class Attention(nn.Module):
    "As timm writes it; `k` heads of keys and values"
    def __init__(self, width=24, n=6, dim=4):
        super().__init__()
        self.num_heads,self.head_dim,self.attn_dim = n,dim,n*dim
        self.qkv,self.proj = nn.Linear(width, 3*n*dim),nn.Linear(n*dim, width)
    def forward(self, x):
        q,k,v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], self.attn_dim))

class Grouped(nn.Module):
    "Two heads of queries share one of keys and values, as in Llama"
    def __init__(self, width=24, n=6, kv=3, dim=4):
        super().__init__()
        self.head_dim,self.num_key_value_groups = dim,n//kv
        self.q_proj,self.k_proj,self.v_proj,self.o_proj = (nn.Linear(*o) for o in ((width, n*dim), (width, kv*dim), (width, kv*dim), (n*dim, width)))
    def forward(self, x):
        q,k,v = (o(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for o in (self.q_proj, self.k_proj, self.v_proj))
        k,v = (o.repeat_interleave(self.num_key_value_groups, 1) for o in (k, v))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

def tokens(): return torch.randn(2, 5, 24)

def test_packed_heads():
    groups,small = check_exact(nn.Sequential(Attention(), nn.Linear(24, 3)), tokens())
    g = by_name(groups)['0.qkv']
    assert g.kind == 'heads' and g.units == 6 and g.writers[0].index[1] == (*range(4, 8), *range(28, 32), *range(52, 56))
    n = small[0].num_heads
    assert n < 6 and small[0].attn_dim == 4*n and small[0].qkv.out_features == 12*n and small[0].proj.in_features == 4*n

def test_grouped_keys_are_one_unit():
    groups,small = check_exact(nn.Sequential(nn.Linear(24, 24), Grouped(), nn.Linear(24, 3)), tokens())
    g = by_name(groups)['1.q_proj']
    assert g.kind == 'heads' and g.units == 3 and g.writers[0].index[1] == tuple(range(8, 16)) and g.writers[1].index[1] == tuple(range(4, 8))
    assert small[1].q_proj.out_features == 2*small[1].k_proj.out_features == small[1].o_proj.in_features

def test_heads_can_be_left_alone():
    m = nn.Sequential(Attention(), nn.Linear(24, 3))
    assert 'heads=False' in by_name(find_groups(m, tokens(), heads=False))['0.qkv'].reason

def peaked(m, by=40.):
    "Attention far from uniform"
    with torch.no_grad():
        for n,p in m.named_parameters():
            if re.search(r'(query|key|q_proj|k_proj|\.q|\.k)\.weight$', n): p.mul_(by)
            elif n.endswith('in_proj_weight'): p[:len(p)*2//3].mul_(by)
    return m

@pytest.mark.parametrize('batch_first', [True, False])
@pytest.mark.parametrize('norm_first', [True, False])
def test_torch_attention(batch_first, norm_first):
    layer = nn.TransformerEncoderLayer(24, 4, 32, 0., batch_first=batch_first, norm_first=norm_first)
    groups,small = check_exact(peaked(nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(24, 3))), tokens(), at_least=4)
    assert sum(g.kind == 'heads' for g in ready(groups)) == 2
    a = small[0].layers[0].self_attn
    assert isinstance(a, FewerHeads) and a.num_heads < 4 and a.head_dim == 6 and len(a.in_proj_weight) == 3*6*a.num_heads
    assert deepcopy(small)(tokens().double()).shape == (2, 5, 3)

def attention_case(batch_first, unbatched=False):
    a = nn.MultiheadAttention(24, 4, batch_first=batch_first, dropout=0.)
    shape = (5, 24) if unbatched else (2, 5, 24) if batch_first else (5, 2, 24)
    b = deepcopy(a)
    b.__class__ = FewerHeads
    return a, b, [torch.randn(shape) for _ in range(3)]

@pytest.mark.parametrize('need', [True, False])
@pytest.mark.parametrize('batch_first', [True, False])
@pytest.mark.parametrize('mask', [None, 'causal', 'heads', 'padding', 'both', 'float'])
def test_fewer_heads_with_all_of_them_is_attention(mask, batch_first, need):
    a,b,xs = attention_case(batch_first)
    kw = dict(need_weights=need)
    causal = torch.ones(5, 5).triu(1).bool()
    if mask in ('causal', 'both'): kw['attn_mask'] = causal
    if mask == 'heads': kw['attn_mask'] = causal.expand(8, 5, 5)
    if mask == 'float': kw['attn_mask'] = torch.randn(5, 5)
    if mask in ('padding', 'both'): kw['key_padding_mask'] = torch.tensor([[False]*5, [False]*3 + [True]*2])
    for average in (True, False):
        (y,w),(z,v) = (o(*xs, **kw, average_attn_weights=average) for o in (a, b))
        torch.testing.assert_close(y, z)
        assert (w is None) == (v is None) and (w is None or torch.allclose(w, v, atol=1e-6))

def test_fewer_heads_without_a_batch():
    a,b,xs = attention_case(True, unbatched=True)
    for s,t in zip(a(*xs), b(*xs)): torch.testing.assert_close(s, t)

# The model given, and the one returned

def state(m): return {k: v.clone() for k,v in m.state_dict().items()}

def test_the_model_is_left_as_found():
    m,x = made('residual')
    m.train()
    m[0].weight.requires_grad_(False)
    m(x).sum().backward()
    before,flags,grads = state(m),[(n, p.requires_grad, id(p)) for n,p in m.named_parameters()],[p.grad for p in m.parameters()]
    calls = []
    m[0].register_forward_hook(lambda *a: calls.append(1))
    rng = torch.get_rng_state()
    groups = find_groups(m, x)
    with sliced(m, groups, {'0': [1, 2]}): assert m[0].out_channels == 2
    small = slice_units(m, groups, {'0': [1, 2]})
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items()) and torch.equal(rng, torch.get_rng_state())
    assert flags == [(n, p.requires_grad, id(p)) for n,p in m.named_parameters()] and all(p.grad is g for p,g in zip(m.parameters(), grads))
    assert all(o.training for o in m.modules()) and m[0].out_channels == 8 and len(m[0]._forward_hooks) == 1
    assert not {p.data_ptr() for p in m.parameters()} & {p.data_ptr() for p in small.parameters()}

def test_what_carries_over():
    m,x = made('depthwise')
    m = m.to(memory_format=torch.channels_last).bfloat16()
    m[0].weight.requires_grad_(False)
    m[0].weight.tag,m[4].note = 'mine','kept'
    m.train()[3].eval()
    small = slice_units(m, find_groups(m, x.bfloat16()), {'0': [0, 3, 5]})
    assert small[0].weight.shape == (3, 3, 3, 3) and small[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not small[0].weight.requires_grad and small[4].weight.requires_grad and small[0].weight.tag == 'mine' and small[4].note == 'kept'
    assert small.training and not small[3].training and all(p.dtype == torch.bfloat16 for p in small.parameters())
    assert small[1].groups == small[1].in_channels == small[2].num_features == small[3].num_parameters == small[4].in_channels == 3

def test_nothing_dropped_is_a_copy():
    m,x = made('residual')
    m.eval()
    groups = find_groups(m, x)
    small = slice_units(m, groups, {g.name: range(g.units) for g in groups})
    assert torch.equal(m(x), small(x)) and small is not m

def test_an_error_inside_leaves_the_model_whole():
    m,x = made('mlp')
    groups = find_groups(m, x)
    with pytest.raises(KeyError), sliced(m, groups, {'0': [0]}): raise KeyError
    assert m[0].out_features == 16 and m(x).shape == (4, 4)

def test_a_shared_module_under_two_names():
    a = nn.Linear(8, 8)
    m = nn.Sequential(a, nn.ReLU(), nn.Linear(8, 12), nn.Linear(12, 8), a, nn.Linear(8, 3))
    small = slice_units(m, gs := find_groups(m, rows()), {g.name: some(g) for g in ready(gs)})
    assert small[0] is small[4] and small(rows()).shape == (4, 3)

def test_meta():
    m = mlp(8, 12, 3).to('meta')
    groups = find_groups(m, rows().to('meta'))
    small = slice_units(m, groups, {'0': [0, 1]})
    assert small[0].weight.is_meta and small[0].weight.shape == (2, 8) and small[2].weight.shape == (3, 2)

def test_images_of_fastai():
    from fastai.torch_core import TensorImage
    m = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv(8, 4))
    assert [g.name for g in ready(find_groups(m, TensorImage(image())))] == ['0']

def test_half_precision_and_frozen():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        m = mlp(8, 12, 3).to(dtype).requires_grad_(False)
        assert [g.name for g in ready(find_groups(m, rows().to(dtype)))] == ['0']

def test_the_same_twice():
    m,x = made('squeeze')
    assert find_groups(m, x) == find_groups(m, x)

def test_sliced_twice():
    m,x = made('mlp')
    small = slice_units(m, find_groups(m, x), {'0': [3, 1, 2]})
    assert torch.equal(small[0].weight, m[0].weight[[1, 2, 3]]) and torch.equal(small[2].weight, m[2].weight[:, [1, 2, 3]])
    again = slice_units(small, gs := find_groups(small, x), {'0': [0, 2]})
    assert by_name(gs)['0'].units == 3 and torch.equal(again[0].weight, m[0].weight[[1, 3]])

# Errors

def test_errors():
    m,x = made('mlp')
    groups = find_groups(m, x)
    with pytest.raises(ValueError, match="no group is named '00'. Closest: '0'"): slice_units(m, groups, {'00': [1]})
    with pytest.raises(ValueError, match='from 0 to 15, at least one of them, got \\[16\\]'): slice_units(m, groups, {'0': [16]})
    for bad in ([], [1, 1], [True], [.5], [-1]):
        with pytest.raises(ValueError, match='different units'): slice_units(m, groups, {'0': bad})
    with pytest.raises(ValueError, match="of '4' must stay: they are an output"): slice_units(m, groups, {'4': [0]})
    with pytest.raises(ValueError, match='for another model'): slice_units(nn.Sequential(nn.Linear(8, 3)), groups, {'2': [0]})
    with pytest.raises(TypeError, match='must be a torch.nn.Module'): find_groups('resnet', x)
    with pytest.raises(TypeError, match='prune the model before torch.jit.script'): find_groups(torch.jit.script(m), x)

def test_weights_that_are_not_finite():
    m,x = made('mlp')
    with torch.no_grad(): m[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="'2.weight' has values that are NaN"): find_groups(m, x)

def test_a_model_that_does_not_run_says_so_itself():
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'): find_groups(mlp(8, 12, 3), rows(size=9))

def test_time_limit():
    with pytest.raises(TimeoutError, match='not traced within time_limit=0 seconds. Pass a smaller example'):
        find_groups(mlp(8, 12, 3), rows(), time_limit=0)

def test_no_gradient_no_graph():
    class Hard(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(8, 12),nn.Linear(12, 3)
        def forward(self, x): return self.b(self.a(x)).argmax(1)
    assert all('cannot be traced' in g.reason for g in find_groups(Hard(), rows()))

# Every kind of model

from zoo import ZOO

HEADS = {'timm-vit': 2, 'timm-deit': 2, 'timm-swin': 4, 'tv-vit': 2, 'hf-bert': 2, 'hf-distilbert': 2, 'hf-gpt2': 2, 'hf-opt': 2, 'hf-llama': 2,
         'hf-qwen2': 2, 'hf-mistral': 2, 'hf-bart': 6, 'hf-whisper': 6, 'hf-vit': 2, 'hf-clip': 4, 'nn-encoder': 2, 'nn-transformer': 3}

@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in ZOO if n != 'fastai-tabular'])
def test_zoo(name):
    model,x = ZOO[name].make()
    dtype = torch.float32 if re.search('mixtral|awd', name) else torch.float64      # which these do not run in
    model = peaked(worn(model, dtype), 10.)
    def f(o): return o.to(dtype) if torch.is_tensor(o) and o.is_floating_point() else o
    def call(m): return m(**{k: f(v) for k,v in x.items()}) if isinstance(x, dict) else m(*map(f, x))
    groups = find_groups(model, {k: f(v) for k,v in x.items()} if isinstance(x, dict) else tuple(map(f, x)))
    assert all(g.reason == '' or len(g.reason) < 250 and '\n' not in g.reason for g in groups)
    assert sum(g.kind == 'heads' for g in ready(groups)) >= HEADS.get(name, 0)
    kept,dense = {g.name: some(g) for g in ready(groups)},copy_with(model)
    for g in ready(groups):
        for o in g.readers: reads(dense.get_submodule(o.layer), o.of(sorted({*range(g.units)} - {*kept[g.name]})))
    small = slice_units(model, groups, kept)
    with torch.no_grad():
        torch.manual_seed(0)
        a = _numbers(call(dense))
        torch.manual_seed(0)
        b = _numbers(call(small))
    tol = 1e-4 if dtype == torch.float32 else 1e-7
    for s,t in zip(a, b, strict=True): torch.testing.assert_close(s, t, rtol=tol, atol=tol)

@pytest.mark.slow
def test_llama_with_fewer_heads_generates():
    import transformers as hf
    model,x = ZOO['hf-llama'].make()
    small = slice_units(model, gs := find_groups(model, x), {g.name: [0] if g.kind == 'heads' else some(g) for g in ready(gs)})
    assert small.model.layers[0].self_attn.k_proj.out_features == 8
    y = small.eval().generate(x['input_ids'], max_new_tokens=4, do_sample=False, pad_token_id=0)
    z = small.generate(x['input_ids'], max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0)
    assert y.shape == (2, 11) and torch.equal(y, z)

@pytest.mark.slow
def test_bert_counts_its_heads():
    model,x = ZOO['hf-bert'].make()
    groups = find_groups(model, x)
    small = slice_units(model, groups, {'bert.encoder.layer.0.attention.self.query': [0, 2, 3]})
    a = small.bert.encoder.layer[0].attention
    assert a.self.num_attention_heads == 3 and a.self.all_head_size == 24 and a.self.attention_head_size == 8 and a.output.dense.in_features == 24
