"Small networks with batch norms, what folding has to do with each norm, and networks of real size"
import random, re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
import torch, torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_leaves
from torchvision.ops.misc import FrozenBatchNorm2d

# --- What tests and benchmarks need to judge, without asking the library

def norms(model): return {n: m for n,m in model.named_modules() if isinstance(m, _BatchNorm)}

def randomize(model, seed=0):
    "Statistics and scales far from those of a fresh norm, with which a wrong fold is hardly visible"
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if not isinstance(m, (_BatchNorm, FrozenBatchNorm2d)): continue
        for k,lo,hi in (('running_mean', -1, 1), ('running_var', .5, 2), ('weight', .5, 1.5), ('bias', -1, 1)):
            if getattr(m, k, None) is not None: getattr(m, k).data.uniform_(lo, hi, generator=g)
    return model

def tensors(out):
    "Floating-point tensors of a model's output"
    leaves = tree_leaves(dict(out) if hasattr(out, 'keys') else out)
    return [t.detach().as_subclass(torch.Tensor) for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]

@torch.no_grad()
def outputs(model, args, kw=None):
    "All outputs of one call; random masks are the same each time"
    torch.manual_seed(1)
    return tensors(model(*[a.clone() for a in args], **(kw or {})))

def rel(got, want):
    "Largest relative error of all outputs; infinite where one has another form, or is not finite"
    if len(got) != len(want) or any(a.shape != b.shape or a.dtype != b.dtype for a,b in zip(got, want)): return float('inf')
    errs = [float((a.double() - b.double()).norm()/max(float(b.double().norm()), 1e-300)) for a,b in zip(got, want)]
    return max((e if e == e else float('inf') for e in errs), default=0.)

# --- The cases

def rand(*shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

@dataclass(frozen=True)
class Case:
    "A network, and what is expected of it"
    make: Callable                              # () -> model
    args: tuple                                 # of one call
    folded: dict = field(default_factory=dict)  # norm -> 'back' or 'forward', and the layers it goes into
    left: dict = field(default_factory=dict)    # norm -> pattern that its reason matches
    dtype: torch.dtype = torch.float64
    last: Callable|None = None                  # what happens to the model after it was put into eval mode
    checked: bool = True                        # does the plan need no check to be right?

    @property
    def tol(self): return 1e-9 if self.dtype == torch.float64 else 2e-2

    def build(self):
        torch.manual_seed(0)
        model = randomize(self.make().to(self.dtype)).eval()
        if self.last: self.last(model)
        return model, tuple(a.to(self.dtype) if a.is_floating_point() else a for a in self.args)

CASES = {}
def add(name, make, *args, **kw):
    if name in CASES: raise ValueError(name)
    CASES[name] = Case(make, args or (rand(2, 3, 8, 8),), **kw)

class Net(nn.Module):
    "Its forward pass is a function of the network and `x`"
    def __init__(self, fwd, **mods):
        super().__init__()
        self.__dict__['fwd'] = fwd
        for k,v in mods.items(): setattr(self, k, v)
    def forward(self, x): return self.fwd(self, x)

class Net2(Net):
    def forward(self, x, z): return self.fwd(self, x, z)

def net(fwd, **mods): return lambda: Net(fwd, **{k: v() for k,v in mods.items()})
def net2(fwd, **mods): return lambda: Net2(fwd, **{k: v() for k,v in mods.items()})
def seq(*mods): return lambda: nn.Sequential(*[f() for f in mods])

def conv(i=3, o=4, k=3, padding=1, **kw): return partial(nn.Conv2d, i, o, k, padding=padding, **kw)
def lin(i=3, o=4, **kw): return partial(nn.Linear, i, o, **kw)
def bn(n=4, **kw): return partial(nn.BatchNorm2d, n, **kw)
def bn1(n=4, **kw): return partial(nn.BatchNorm1d, n, **kw)
def cbn(fwd, **kw): return net(fwd, conv=conv(), bn=bn(), **kw)

BACK = {'1': 'back 0'}
SEEN = {'bn': 'back conv'}
PADS = 'pads with zeros'

# 1-8: layers of every kind
add('1 conv2d', seq(conv(), bn()), folded=BACK)
add('1 conv2d, stride and dilation', seq(conv(stride=2, dilation=2), bn()), folded=BACK)
add('2 conv1d', seq(partial(nn.Conv1d, 3, 4, 3), bn1()), rand(2, 3, 9), folded=BACK)
add('3 conv3d', seq(partial(nn.Conv3d, 3, 4, 3), partial(nn.BatchNorm3d, 4)), rand(2, 3, 5, 5, 5), folded=BACK)
add('4 transposed', seq(partial(nn.ConvTranspose2d, 3, 4, 3, stride=2), bn()), folded=BACK)
add('4 transposed 1d', seq(partial(nn.ConvTranspose1d, 3, 4, 3, stride=2, output_padding=1), bn1()), rand(2, 3, 6), folded=BACK)
add('4 transposed 3d', seq(partial(nn.ConvTranspose3d, 3, 4, 2), partial(nn.BatchNorm3d, 4)), rand(2, 3, 4, 4, 4), folded=BACK)
add('5 grouped transposed', seq(partial(nn.ConvTranspose2d, 4, 6, 3, groups=2), bn(6)), rand(2, 4, 8, 8), folded=BACK)
add('6 grouped', seq(conv(4, 8, groups=2), bn(8)), rand(2, 4, 8, 8), folded=BACK)
add('6 depthwise', seq(conv(4, 8, groups=4), bn(8), nn.ReLU, conv(8, 8, groups=8), bn(8)), rand(2, 4, 8, 8),
    folded={'1': 'back 0', '4': 'back 3'})
add('7 no bias', seq(conv(bias=False), bn()), folded=BACK)
add('8 linear', seq(lin(), bn1()), rand(5, 3), folded=BACK)
add('8 linear without bias', seq(lin(bias=False), bn1()), rand(5, 3), folded=BACK)
add('8 one row', seq(conv(), bn()), rand(1, 3, 8, 8), folded=BACK)

# 9-12: layouts
add('9 over tokens', seq(lin(), bn1()), rand(5, 4, 3), left={'1': 'channels'})
add('9 over tokens, of which there are others', seq(lin(3, 6), bn1()), rand(5, 4, 3), left={'1': 'channels'})
add('9 batch turned to channels', net(lambda s,x: s.bn(s.fc(x).t()), fc=lin(3, 5), bn=bn1()), rand(4, 3), left={'bn': 'channels'})
add('10 linear, transpose', net(lambda s,x: s.bn(s.fc(x).transpose(1, 2)), fc=lin(), bn=bn1()), rand(5, 7, 3), folded={'bn': 'back fc'})
add('11 linear, flatten(0, 1)', net(lambda s,x: s.bn(s.fc(x).flatten(0, 1)).reshape(len(x), -1, 4), fc=lin(), bn=bn1()), rand(5, 7, 3),
    folded={'bn': 'back fc'})
add('11 channels in groups', net(lambda s,x: s.bn(s.fc(x).view(-1, 4, 2)), fc=lin(3, 8), bn=bn1()), rand(5, 3), folded={'bn': 'back fc'})
add('11 channels cut apart', net(lambda s,x: s.bn(s.conv(x).view(2, 2, 2, 64).transpose(1, 3)), conv=conv(), bn=bn(64)), left={'bn': 'channels'})
add('12 pixel shuffle', seq(conv(3, 16), partial(nn.PixelShuffle, 2), bn()), folded={'2': 'back 0'})
add('12 dropout between', seq(conv(), partial(nn.Dropout, .5), bn()), folded={'2': 'back 0'})
add('12 dropout that is always on', cbn(lambda s,x: s.bn(F.dropout(s.conv(x), .5, True))), left={'bn': 'comes from dropout'})
add('12 unbatched', cbn(lambda s,x: s.bn(s.conv(x).unsqueeze(0))), rand(3, 8, 8), folded=SEEN)

# 13-19: what runs, not what is registered
add('13 registered conv, norm; run norm, conv', net(lambda s,x: s.conv(s.bn(x)), conv=conv(3, 3), bn=bn(3)), left={'bn': PADS})
add('14 norm registered first', net(lambda s,x: s.bn(s.conv(x)), bn=bn(), conv=conv()), folded=SEEN)
add('15 registered between, not run', net(lambda s,x: s.bn(s.conv(x)).relu(), conv=conv(), act=nn.ReLU, bn=bn()), folded=SEEN)
add('16 functional relu between', cbn(lambda s,x: s.bn(F.relu(s.conv(x)))), left={'bn': 'comes from relu'})
add('16 max pooling between', seq(conv(), partial(nn.MaxPool2d, 2), bn()), left={'2': 'comes from max_pool2d'})
add('16 average pooling between', seq(conv(), partial(nn.AvgPool2d, 2), bn()), folded={'2': 'back 0'})
add('16 average of the border and zeros', seq(conv(), partial(nn.AvgPool2d, 2, padding=1), bn()), left={'2': 'channels|comes from avg_pool2d'})
add('16 average pooling without the padding', seq(conv(), partial(nn.AvgPool2d, 2, padding=1, count_include_pad=False), bn()),
    folded={'2': 'back 0'})
add('16 sum pooling', seq(conv(), partial(nn.AvgPool2d, 2, divisor_override=1), bn()), left={'2': 'channels|comes from avg_pool2d'})
add('16 average over channels', net(lambda s,x: s.bn(F.avg_pool2d(s.conv(x).transpose(1, 2), (1, 2)).transpose(1, 2)), conv=conv(), bn=bn()),
    folded={'bn': 'back conv'})
add('16 average of two channels', net(lambda s,x: s.bn(F.avg_pool1d(s.conv(x).flatten(2).transpose(1, 2), 2).transpose(1, 2)), conv=conv(), bn=bn1(2)),
    left={'bn': 'channels|comes from avg_pool1d'})
add('17 two consumers', cbn(lambda s,x: s.bn(y := s.conv(x)) + y), left={'bn': 'output of conv also goes to add'})
add('17 two consumers, one through a view', cbn(lambda s,x: s.bn(y := s.conv(x)) + y.flatten(2).view_as(y)), left={'bn': 'also goes to add'})
add('18 returned', cbn(lambda s,x: (s.bn(y := s.conv(x)), y)), left={'bn': 'conv is returned or kept'})
add('18 a view returned', cbn(lambda s,x: (s.bn(y := s.conv(x)), y.flatten(1))), left={'bn': 'conv is returned or kept'})
add('19 two norms', net(lambda s,x: (lambda y: s.b1(y) + s.b2(y))(s.conv(x)), conv=conv(), b1=bn(), b2=bn()),
    left={'b1': 'output of conv also goes to b2', 'b2': 'output of conv also goes to b1'})

add('14 called by keyword', cbn(lambda s,x: s.bn(input=s.conv(input=x))), folded=SEEN)
def by_class(s, x):
    for o in s.layers: x = F.relu(o(x)) if isinstance(o, nn.BatchNorm2d) else o(x)
    return x
add('15 forward asks for the class', net(by_class, layers=lambda: nn.ModuleList([conv()(), bn()(), conv(4)()])), left={'layers.1': 'failed'}, checked=False)
add('16 nearest neighbours between', seq(conv(), partial(nn.Upsample, scale_factor=2), bn()), left={'2': 'comes from interpolate|comes from upsample'})
add('17 read by NumPy', cbn(lambda s,x: s.bn(y := s.conv(x)) + torch.from_numpy(y.numpy()*2)), left={'bn': 'also goes to numpy|is returned or kept'})
add('17 read as numbers', cbn(lambda s,x: s.bn(y := s.conv(x)) + y[0,0,0,0].item()), left={'bn': 'also goes to item'})
PERM = torch.tensor([2, 0, 3, 1])
def of_index(s, x): return s.bn(s.conv(x)[:,PERM])
def of_mask(s, x): return s.bn(s.conv(x)[x[:,0,0,0] > -9])
def of_select(s, x): return s.bn(torch.index_select(s.conv(x), 1, PERM))
def of_gather(s, x): return s.bn(s.conv(x).gather(1, PERM[None,:,None,None].expand(len(x), 4, 8, 8)))
FREE = '19 channels by index'     # it is free to fold them or to leave them, but not to fail or to be wrong
for f in of_index, of_mask, of_select, of_gather: add(f'{FREE}: {f.__name__}', cbn(f), left={'bn': '.'})

# 20-27: layers, norms and parameters that are shared
add('20 shared conv, shared norm', cbn(lambda s,x: s.bn(s.conv(x)) + s.bn(s.conv(x.flip(-1)*2))), folded=SEEN)
add('21 shared conv, separate norms', net(lambda s,x: s.b1(s.conv(x)) + s.b2(s.conv(x*2)), conv=conv(), b1=bn(), b2=bn()),
    left={'b1': 'conv is called elsewhere', 'b2': 'conv is called elsewhere'})
add('22 shared conv, second use plain', cbn(lambda s,x: s.bn(s.conv(x)) + s.conv(x*2)), left={'bn': 'conv is called elsewhere'})
add('23 shared norm, two convs', net(lambda s,x: s.bn(s.c1(x)) + s.bn(s.c2(x)), c1=conv(), c2=conv(), bn=bn()), folded={'bn': 'back c1 c2'})
add('24 shared norm, once after relu', net(lambda s,x: s.bn(s.c1(x)) + s.bn(s.c2(x).relu()), c1=conv(), c2=conv(), bn=bn()),
    left={'bn': 'comes from relu'})

def twice():
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
    return nn.Sequential(block, block)
def two_names():
    c,b = nn.Conv2d(3, 3, 3, padding=1),nn.BatchNorm2d(3)
    return nn.Sequential(nn.Sequential(c, b), nn.Sequential(c, b))
def tie(make, a, b):
    "A model in which parameter `b` is `a`"
    m = make()
    mod,k = b.rsplit('.', 1)
    setattr(m.get_submodule(mod), k, m.get_parameter(a))
    return m
TWO = dict(c1=conv(), c2=conv(), bn=bn())
add('25 one block twice', twice, folded={'0.1': 'back 0.0'})
add('25 one conv and norm under two names', two_names, folded={'0.1': 'back 0.0'})
add('26 tied weights', lambda: tie(net(lambda s,x: s.bn(s.c1(x)) + s.c2(x), **TWO), 'c1.weight', 'c2.weight'),
    left={'bn': 'read by|elsewhere|tied|not by calling'})
add('26 tied with a layer that does not run', lambda: tie(net(lambda s,x: s.bn(s.c1(x)), **TWO), 'c1.weight', 'c2.weight'),
    left={'bn': 'tied|read by|not by calling'})
add('26 tied biases', lambda: tie(net(lambda s,x: s.bn(s.c1(x)) + s.c2(x), **TWO), 'c1.bias', 'c2.bias'), left={'bn': 'read by|elsewhere|tied'})
add('26 tied scales of norms', lambda: tie(seq(conv(), bn(), nn.ReLU, conv(4), bn()), '1.weight', '4.weight'), left={'1': 'also read by', '4': 'also read by'})
add('27 weight read elsewhere', cbn(lambda s,x: s.bn(s.conv(x)) + s.conv.weight.sum()), left={'bn': 'parameter of conv is also read by sum'})
add('27 bias read elsewhere', cbn(lambda s,x: s.bn(s.conv(x)) + s.conv.bias.sum()), left={'bn': 'parameter of conv is also read by sum'})
add('27 scale of the norm read elsewhere', cbn(lambda s,x: s.bn(s.conv(x)) + s.bn.weight.sum()), left={'bn': 'read by|failed'}, checked=False)
add('27 statistics read elsewhere', cbn(lambda s,x: s.bn(s.conv(x)) + s.bn.running_var.sum()), left={'bn': 'read by|failed'}, checked=False)
add('27 size of the norm read by its parent', cbn(lambda s,x: s.bn(s.conv(x))/s.bn.num_features), folded=SEEN)

# 28-31: writes in place, code out of sight, values that are kept
def set_item(s, x): y = s.conv(x); y[:,0] = 0; return s.bn(y)
def by_view(s, x): y = s.conv(x); y.view(-1).mul_(2); return s.bn(y)
def after(s, x): y = s.bn(x); y += 1; return s.fc(y)
def keep(s, x): y = s.conv(x); s.__dict__['last'] = y; return s.bn(y)
def keep_list(s, x): s.kept[:] = [s.conv(x)]; return s.bn(s.kept[0])
def with_list(make):
    m = make()
    m.__dict__['kept'] = [None]
    return m
def hooked():
    m = with_list(cbn(lambda s,x: s.bn(s.conv(x)) + s.kept[0].mean()))
    m.conv.register_forward_hook(lambda mod,i,o: m.kept.__setitem__(0, o))
    return m
@torch.jit.script
def doubled(y: torch.Tensor): return y*2
add('28 in-place add between', cbn(lambda s,x: s.bn(s.conv(x).add_(1))), left={'bn': 'comes from add'})
add('28 item set between', cbn(set_item), left={'bn': 'setitem'})
add('28 written through a view', cbn(by_view), left={'bn': 'also goes to mul'})
add('28 written behind the norm', net(after, bn=bn1(3), fc=lin()), rand(5, 3), left={'bn': r'goes to \w*add'})
def before(s, x):
    h = x*2
    y = s.bn(h)
    h.add_(1)
    return s.fc(y)
def before_by_view(s, x):
    h = x*2
    y = s.bn(h).unsqueeze(0)
    h[:,0].zero_()
    return s.fc(y)
def into(s, x):
    h = x*2
    y = s.bn(h)
    F.relu(h, inplace=True)
    return s.fc(y) + s.fc2(h)
for f in before, before_by_view, into:
    add(f'28 input of the norm written behind it: {f.__name__}', net(f, bn=bn1(3), fc=lin(), fc2=lin()), rand(5, 3), left={'bn': 'written|add|zero|relu|input'})
add('28 view of what the norm made contiguous', net(lambda s,x: s.bn(s.fc(x).transpose(1, 2)).view(-1, 7), fc=lin(), bn=bn1()), rand(5, 7, 3),
    left={'bn': 'failed'}, checked=False)
add('28 layout of what the norm returns', net(lambda s,x: y if (y := s.bn(s.fc(x).transpose(1, 2))).is_contiguous() else y*2, fc=lin(), bn=bn1()),
    rand(5, 7, 3), left={'bn': 'failed'}, checked=False)
add('28 in-place relu after', seq(conv(), bn(), partial(nn.ReLU, inplace=True)), folded=BACK)
add('29 scripted consumer', cbn(lambda s,x: s.bn(y := s.conv(x)) + doubled(y)), left={'bn': 'output of conv also goes to'})
add('30 kept in an attribute', cbn(keep), left={'bn': 'conv is returned or kept'})
add('30 kept in a list', lambda: with_list(cbn(keep_list)), left={'bn': 'conv is returned or kept'})
def in_plain_list():
    m = cbn(lambda s,x: s.plain[1](s.plain[0](x)))()
    m.__dict__['plain'] = [m.conv, m.bn]
    return m
add('30 layers in a plain list', in_plain_list, folded=SEEN)
add('31 a hook keeps the output', hooked, left={'bn': 'hook|kept|goes to mean'})

# 32-41: norms of every kind
class WithAct(nn.BatchNorm2d):
    "Norms of timm look like this"
    def __init__(self, n): super().__init__(n); self.act = nn.SiLU()
    def forward(self, x): return self.act(super().forward(x))
class WithDropAndAct(nn.BatchNorm2d):
    def __init__(self, n):
        super().__init__(n)
        self.drop,self.act = nn.Identity(),nn.ReLU(inplace=True)
    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0., self.eps)
        return self.act(self.drop(x))
class WithRelu(nn.BatchNorm2d):
    def forward(self, x): return F.relu(super().forward(x))
class OfRelu(nn.BatchNorm2d):
    def forward(self, x): return super().forward(F.relu(x))
class Doubled(nn.BatchNorm2d):
    def forward(self, x): return super().forward(super().forward(x))
STATS = 'batch statistics'
def train(name): return lambda m: m.get_submodule(name).train()
add('32 without scale and shift', seq(conv(), bn(affine=False)), folded=BACK)
add('32 scale without shift', seq(conv(), bn(bias=False)), folded=BACK)
add('33 without statistics', seq(conv(), bn(track_running_stats=False)), left={'1': STATS})
add('34 momentum=None', seq(conv(), bn(momentum=None)), folded=BACK)
add('34 eps', seq(conv(), bn(eps=.1)), folded=BACK)
add('35 norm in train mode', seq(conv(), bn(), nn.ReLU, conv(4), bn()), last=train('1'), left={'1': STATS}, folded={'4': 'back 3'})
class Odd(nn.Module):
    "Does something in train mode only"
    def forward(self, x): return x.relu() if self.training else x
add('35 dropout in train mode between', seq(conv(), partial(nn.Dropout, .5), bn()), last=train('1'), left={'2': 'comes from dropout'})
add('35 dropout in train mode behind', seq(bn1(3), partial(nn.Dropout, .5), lin()), rand(5, 3), last=train('1'), left={'0': 'goes to dropout'})
add('35 a part in train mode', seq(conv(), Odd, bn()), last=train('1'), left={'2': 'comes from relu'})
add('35 a part that does nothing in eval mode', seq(conv(), Odd, bn()), folded={'2': 'back 0'})
COMPUTED = 'weight of 0 is computed|parametrized|weight is computed'
add('37 weight_norm', lambda: nn.Sequential(parametrizations.weight_norm(conv()()), bn()()), left={'1': COMPUTED})
add('37 spectral_norm', lambda: nn.Sequential(parametrizations.spectral_norm(conv()()), bn()()), left={'1': COMPUTED})
add('37 old weight_norm', lambda: nn.Sequential(nn.utils.weight_norm(conv()()), bn()()), left={'1': COMPUTED})
add('37 old spectral_norm', lambda: nn.Sequential(nn.utils.spectral_norm(conv()()), bn()()), left={'1': COMPUTED})
add('37 pruned', lambda: nn.Sequential(prune.l1_unstructured(conv()(), 'weight', 5), bn()()), left={'1': COMPUTED})
class Abs(nn.Module):
    def forward(self, w): return w.abs()
def with_abs(m):
    nn.utils.parametrize.register_parametrization(m[1], 'weight', Abs())
    return m
add('37 parametrized norm', lambda: with_abs(seq(conv(), bn())()), left={'1': 'computed|parametri'})
class Standardized(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, padding=1)
class SamePadding(nn.Conv2d):
    def forward(self, x): return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)
class LoRAConv(nn.Conv2d):
    "A layer with more than one part"
    def __init__(self, *a, **kw):
        super().__init__(*a, **kw)
        self.lora = nn.Conv2d(a[0], a[1], 1)
    def forward(self, x): return super().forward(x) + self.lora(x)
class Scaled(nn.Linear):
    def forward(self, x): return F.linear(x, self.weight*2, self.bias)
add('38 standardized weights', seq(partial(Standardized, 3, 4, 3), bn()), left={'1': 'conv2d|computed'})
add('38 scaled weights', seq(partial(Scaled, 3, 4), bn1()), rand(5, 3), left={'1': 'linear|computed'})
add('38 a conv that pads by itself', seq(partial(SamePadding, 3, 4, 3), bn()), folded=BACK)
add('38 a conv of two parts', seq(partial(LoRAConv, 3, 4, 3, padding=1), bn()), left={'1': 'comes from add'})
add('39 SyncBatchNorm', seq(conv(), partial(nn.SyncBatchNorm, 4)), folded=BACK)
add('40 norm with an activation module', seq(conv(), partial(WithAct, 4)), folded=BACK)
add('40 norm with dropout and activation', seq(conv(), partial(WithDropAndAct, 4)), folded=BACK)
MORE = 'computes more than batch norm'
add('41 norm with a functional activation', seq(conv(), partial(WithRelu, 4)), left={'1': MORE})
add('41 activation before', seq(conv(), partial(OfRelu, 4)), left={'1': f'{MORE}|comes from relu'})
add('41 normalizes twice', seq(conv(), partial(Doubled, 4)), left={'1': f'{MORE}|batch_norm'})

# 42-49: forward
add('42 zero padding', seq(bn(3), conv()), left={'0': PADS})
add("42 padding='same'", seq(bn(3), conv(padding='same')), left={'0': PADS})
add('42 reflect padding', seq(bn(3), conv(padding_mode='reflect')), folded={'0': 'forward 1'})
add('42 padded by a call', net(lambda s,x: s.conv(F.pad(s.bn(x), (1, 1))), bn=bn(3), conv=conv(padding=0)), left={'bn': 'goes to pad'})
FWD = {'0': 'forward 1'}
add('43 no padding', seq(bn(3), conv(padding=0)), folded=FWD)
add("43 padding='valid', grouped", seq(bn(4), conv(4, 6, padding='valid', groups=2, bias=False)), rand(2, 4, 8, 8), folded=FWD)
add("43 padding='same' of one pixel", seq(bn(3), conv(k=1, padding='same')), folded=FWD)
add('43 without scale and shift', seq(bn(3, affine=False), conv(padding=0)), folded=FWD)
add('43 transposed', seq(bn(3), partial(nn.ConvTranspose2d, 3, 4, 3)), left={'0': 'transposed'})
add('44 linear', seq(bn1(3), lin()), rand(5, 3), folded=FWD)
add('44 linear without bias', seq(bn1(3), lin(bias=False)), rand(5, 3), folded=FWD)
add('44 dropout, linear', seq(bn1(3), partial(nn.Dropout, .5), lin()), rand(5, 3), folded={'0': 'forward 2'})
add('44 dropout that is always on', net(lambda s,x: s.fc(F.dropout(s.bn(x), .5, True)), bn=bn1(3), fc=lin()), rand(5, 3), left={'bn': 'goes to dropout'})
add('44 relu, linear', seq(bn1(3), nn.ReLU, lin()), rand(5, 3), left={'0': 'goes to relu'})
add('44 linear that is also used without', net(lambda s,x: s.fc(s.bn(x)) + s.fc(x), bn=bn1(3), fc=lin()), rand(5, 3), left={'bn': 'fc is called elsewhere'})
add('44 output returned too', net(lambda s,x: (s.fc(y := s.bn(x)), y), bn=bn1(3), fc=lin()), rand(5, 3), left={'bn': 'output is returned or kept'})
add('44 average pooling, conv', seq(bn(3), partial(nn.AvgPool2d, 2), conv(padding=0)), folded={'0': 'forward 2'})
add('44 average pooling of zeros, conv', seq(bn(3), partial(nn.AvgPool2d, 2, padding=1), conv(padding=0)), left={'0': 'channels|goes to avg_pool2d'})
add('44 sum pooling, conv', seq(bn(8), partial(nn.AvgPool2d, 2, divisor_override=2), conv(8, 4, 1, padding=0)), rand(2, 8, 6, 6),
    left={'0': 'channels|goes to avg_pool2d'})
def neighbours(s, x): return s.fc(F.avg_pool1d(s.bn(x)[:,None], 3, 1)[:,0])
def flat_neighbours(s, x): return s.fc(F.avg_pool1d(s.bn(x).unsqueeze(1), 3, 1).squeeze(1))
for f in neighbours, flat_neighbours:
    add(f'44 {f.__name__}: averages of three channels, linear', net(f, bn=bn1(5), fc=lin()), rand(4, 5), left={'bn': 'channels|goes to'})
add('45 flatten, linear', seq(bn(3), nn.Flatten, lin(192)), folded={'0': 'forward 2'})
CAT = dict(bn=bn1(3), fc=lin(5))
add('46 cat, linear', net2(lambda s,x,z: s.fc(torch.cat([z, s.bn(x)], 1)), **CAT), rand(5, 3), rand(5, 2), folded={'bn': 'forward fc'})
add('46 cat of two norms', net2(lambda s,x,z: s.fc(torch.cat([s.b1(x), s.b2(z)], -1)), b1=bn1(3), b2=bn1(2), fc=lin(5)), rand(5, 3), rand(5, 2),
    folded={'b1': 'forward fc', 'b2': 'forward fc'})
add('46 cat of rows', net2(lambda s,x,z: s.fc(torch.cat([z, s.bn(x)])), bn=bn1(3), fc=lin()), rand(5, 3), rand(2, 3), left={'bn': 'channels'})
add('47 two linears', net(lambda s,x: s.a(y := s.bn(x)) + s.b(y), bn=bn1(3), a=lin(), b=lin()), rand(5, 3), folded={'bn': 'forward a b'})
add('48 norm, linear, norm', seq(bn1(3), lin(), bn1()), rand(5, 3), folded={'0': 'forward 1', '2': 'back 1'})
add('48 norm behind a norm', seq(conv(), bn(), bn(eps=.1)), folded={'1': 'back 0', '2': 'back 0'})
add('48 three norms, the one between with an activation', seq(conv(), bn(), partial(WithAct, 4), bn()), folded={'1': 'back 0', '2': 'back 0'},
    left={'3': 'comes from|returned or kept'})
add('48 two norms, linear', seq(bn1(3), bn1(3), lin()), rand(5, 3), folded={'0': 'forward 2', '1': 'forward 2'})
add('48 one norm twice in a row', net(lambda s,x: s.bn(s.bn(s.conv(x))), conv=conv(), bn=bn()), left={'bn': 'comes from|goes to'})
def pair(i=9, o=4, k=2): return lambda: nn.Sequential(nn.Linear(i, k, bias=False), nn.Linear(k, o))
add('49 low-rank pair, norm', seq(pair(), bn1()), rand(5, 9), folded={'1': 'back 0.1'})
add('49 norm, low-rank pair', seq(bn1(9), pair()), rand(5, 9), folded={'0': 'forward 1.0'})

# 53-57, 66, 67 and what else there is
CUT = dict(conv=conv(3, 8), b1=bn(), b2=bn())
add('53 half', seq(conv(), bn()), dtype=torch.float16, folded=BACK)
add('53 bfloat16', seq(conv(), bn()), dtype=torch.bfloat16, folded=BACK)
add('53 float32', seq(conv(), bn()), dtype=torch.float32, folded=BACK)
add('55 chunk', net(lambda s,x: (lambda a,b: s.b1(a) + s.b2(b))(*s.conv(x).chunk(2, 1)), **CUT), left={'b1': 'comes from chunk', 'b2': 'comes from chunk'})
add('55 split', net(lambda s,x: (lambda a,b: s.b1(a) + s.b2(b))(*s.conv(x).split(4, 1)), **CUT), left={'b1': 'comes from split', 'b2': 'comes from split'})
add('55 cat before', net(lambda s,x: s.bn(torch.cat([s.conv(x), x], 1)), conv=conv(), bn=bn(7)), left={'bn': 'comes from cat'})
add('55 add before', net(lambda s,x: s.bn(s.conv(x) + x), conv=conv(3, 3), bn=bn(3)), left={'bn': 'comes from add'})
add('56 conv called as a function', net(lambda s,x: s.bn(F.conv2d(x, s.conv.weight, padding=1)), conv=conv(bias=False), bn=bn()),
    left={'bn': 'not by calling|comes from conv2d'})
add('56 norm called as a function', cbn(lambda s,x: F.batch_norm(s.conv(x), s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias)),
    left={'bn': 'another module|not by calling|not reached'})
add('57 a head for training only', net(lambda s,x: (s.main(x), s.aux(x)) if s.training else s.main(x), main=seq(conv(), bn()), aux=seq(conv(), bn())),
    folded={'main.1': 'back main.0'}, left={'aux.1': 'not reached'})
add('57 a norm alone', bn(3), left={'': 'input of the model|returned or kept'})
add('57 a norm first', seq(bn(3), nn.ReLU, conv(), bn()), left={'0': 'goes to relu'}, folded={'3': 'back 2'})

def in_autocast(s, x):
    with torch.autocast('cpu', torch.bfloat16): return s.bn(s.conv(x)).float()
def norms_in_float(m):
    for o in norms(m).values(): o.float()
add('67 autocast', cbn(in_autocast), dtype=torch.float32, left={'bn': 'dtype|autocast'})
add('67 norm in float32', seq(conv(), bn()), dtype=torch.bfloat16, last=norms_in_float, left={'1': 'dtype'})
add('67 cast between', net(lambda s,x: s.bn(s.conv(x).double()), conv=conv(), bn=bn()), dtype=torch.float32, last=lambda m: m.bn.double(),
    left={'bn': 'dtype|comes from (double|to)'})

def hook_on(name): return lambda m: m.get_submodule(name).register_forward_hook(lambda *a: None)
add('68 a hook on the norm', seq(conv(), bn()), last=hook_on('1'), left={'1': 'hooks'})
add('68 a hook on the conv', seq(conv(), bn()), last=hook_on('0'), left={'1': '0 has hooks'})
add('68 a hook on the layer behind', seq(bn1(3), lin()), rand(5, 3), last=hook_on('1'), left={'0': '1 has hooks'})

# --- Networks of real size: what makes them and their input, norms that fold, norms in all

@dataclass(frozen=True)
class Real:
    make: Callable          # () -> model, random weights
    args: Callable          # () -> inputs of one call
    folded: int
    norms: int
    why: str = ''           # pattern that the reasons of the others match

    def build(self):
        torch.manual_seed(0)
        return randomize(self.make()).eval().double(), self.args()

NETWORKS = {}
def real(name, make, folded, n, why='', size=64, args=None):
    NETWORKS[name] = Real(make, args or (lambda: (rand(2, 3, size, size),)), folded, n, why)

def tv(name, *args, size=64, **kw):
    def make():
        import torchvision
        return torchvision.models.get_model(name, **kw)
    real(f'tv {name}', make, *args, size=size)
def tm(name, *args, size=64):
    def make():
        import timm
        return timm.create_model(name)
    real(f'timm {name}', make, *args, size=size)
def resnet18():
    import torchvision
    return torchvision.models.resnet18
def xresnet():
    from fastai.vision.models.xresnet import xresnet18
    return xresnet18()
def vision():
    from fastai.vision.learner import create_vision_model
    return create_vision_model(resnet18(), 10, pretrained=False)
def unet():
    from fastai.vision.learner import create_unet_model
    return create_unet_model(resnet18(), 5, (64, 64), pretrained=False)
def tabular():
    from fastai.tabular.model import TabularModel
    return TabularModel([(10, 4), (5, 3)], 6, 2, [50, 20])
def r3d():
    import torchvision
    return torchvision.models.video.r3d_18()

FROM = 'comes from '
tv('resnet18', 20, 20)
tv('densenet121', 59, 121, FROM+'cat|goes to relu')
tv('mobilenet_v3_small', 34, 34)
tv('inception_v3', 94, 96, 'not reached', size=96, init_weights=False)
tv('googlenet', 57, 59, 'not reached', init_weights=False)
tv('efficientnet_b0', 49, 49)
tv('shufflenet_v2_x0_5', 56, 56)
real('tv r3d_18', r3d, 20, 20, args=lambda: (rand(1, 3, 4, 32, 32),))
tm('resnet18', 20, 20)
tm('efficientnet_b0', 49, 49)
tm('tf_efficientnet_lite0', 49, 49)
tm('convnext_atto', 0, 0)
tm('nfnet_l0', 0, 0)
tm('vit_tiny_patch16_224', 0, 0, size=224)
tm('levit_128s', 52, 52, size=224)
tm('repvgg_a0', 44, 61, FROM)
tm('regnety_002', 44, 44)
tm('mobileone_s0', 191, 226, FROM)
tm('ghostnet_100', 80, 80)
tm('ese_vovnet19b_dw', 23, 23)
tm('dla34', 37, 37)
tm('resnetv2_50', 32, 49, FROM+'(add|max_pool|iadd|__iadd__)')
tm('fastvit_t8', 46, 70, FROM, size=128)
tm('hrnet_w18_small', 91, 91)
tm('repvit_m0_9', 85, 108, FROM, size=224)
tm('mobilenetv4_conv_small', 46, 46)
real('fastai xresnet18', xresnet, 22, 22)
real('fastai vision learner', vision, 22, 22)
real('fastai DynamicUnet', unet, 20, 25, FROM+'|returned or kept')
real('fastai TabularModel', tabular, 3, 3, args=lambda: (torch.tensor([[1, 2], [3, 4], [0, 1]]), rand(3, 6)))
