"Random networks around batch norms: shared layers, writes in place, moves, branches, several outputs"
import random
import torch, torch.nn.functional as F
from torch import nn
from fold_cases import rand, randomize

C = 4   # all sizes of a value, after the batch: (2, 4, 4, 4), so that any step fits behind any other, and a confused axis goes unnoticed

def _layer(r):
    "A layer from channels to channels, or of the last axis"
    kw,kind = dict(bias=r.random() < .5),r.choice(['conv', 'conv', 'conv', 'point', 'point', 'transposed', 'linear', 'linear', 'reflect'])
    if kind == 'linear': return nn.Linear(C, C, **kw)
    if kind == 'point': return nn.Conv2d(C, C, 1, groups=r.choice([1, 1, 2, 4]), **kw)
    if kind == 'reflect': return nn.Conv2d(C, C, 3, padding=1, padding_mode='reflect', **kw)
    return (nn.Conv2d if kind == 'conv' else nn.ConvTranspose2d)(C, C, 3, padding=1, groups=r.choice([1, 1, 2, 4]), **kw)

class Act(nn.BatchNorm2d):
    def __init__(self, n): super().__init__(n); self.act = nn.ReLU()
    def forward(self, x): return self.act(super().forward(x))

def _norm(r):
    kind = r.choice(['plain']*12 + ['no affine', 'no affine', 'no stats', 'act'])
    if kind == 'act': return Act(C)
    return nn.BatchNorm2d(C, affine=kind != 'no affine', track_running_stats=kind != 'no stats')

# Each takes a value and another one of the same size
MOVES = [lambda x,z: x.transpose(1, 3), lambda x,z: x.transpose(1, 2), lambda x,z: x.permute(0, 3, 1, 2), lambda x,z: x.permute(0, 2, 3, 1),
         lambda x,z: x.clone(), lambda x,z: x.contiguous(), lambda x,z: x.reshape(2, C, -1).view(x.shape), lambda x,z: x.movedim(1, -1),
         lambda x,z: x.flatten(2).transpose(1, 2).reshape(x.shape), lambda x,z: x.flatten(0, 1).unflatten(0, (2, C)),
         lambda x,z: F.dropout(x, .5, False), lambda x,z: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
         lambda x,z: torch.cat([F.avg_pool2d(x, (1, 3), 1)]*2, -1), lambda x,z: F.pad(x, (1, 0, 0, 0), 'replicate')[..., :C],
         lambda x,z: (x, z.mul_(.9))[0]]
STEPS = [lambda x,z: F.relu(x), lambda x,z: F.relu(x, inplace=True), lambda x,z: x.add_(1), lambda x,z: x + z, lambda x,z: x*z.sigmoid(),
         lambda x,z: x.mul_(.5) + z, lambda x,z: x + z.mean((2, 3), keepdim=True), lambda x,z: x.flip(-1),
         lambda x,z: torch.cat([x[:,:2], z[:,2:]], 1), lambda x,z: torch.cat(x.chunk(2, 1)[::-1], 1), lambda x,z: F.pad(x, (1, 0))[..., :C],
         lambda x,z: F.avg_pool2d(x, 3, 1, 1), lambda x,z: F.avg_pool2d(x, (1, 2), 1, (0, 1), divisor_override=1)[..., :C],
         lambda x,z: x.unsqueeze(0).sub_(.1).squeeze(0), lambda x,z: (x + z, z.mul_(.9))[0], lambda x,z: (x*1, x.sub_(.2))[0]]

class Random(nn.Module):
    "Layers, norms and steps as `seed` wills it"
    def __init__(self, seed):
        super().__init__()
        r = random.Random(seed)
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(_layer(r) for _ in range(r.randint(2, 5)))
        self.norms = nn.ModuleList(_norm(r) for _ in range(r.randint(1, 3)))
        self.wide = nn.ModuleList(nn.Conv2d(2*C, C, k, padding=k//2, groups=g) for k,g in r.sample([(1, 1), (3, 1), (1, 2)], 2))
        for o in self.layers[1:]:       # some are tied
            if r.random() < .15 and o.weight.shape == self.layers[0].weight.shape: o.weight = self.layers[0].weight
        self.program,fresh_l,fresh_n = [],[*range(len(self.layers))],[*range(len(self.norms))]
        def layer(): self._step(r, 'layer', fresh_l.pop() if fresh_l and r.random() < .85 else r.randrange(len(self.layers)))
        def norm(): self._step(r, 'norm', fresh_n.pop() if fresh_n and r.random() < .85 else r.randrange(len(self.norms)))
        def move(): self._step(r, 'move', r.randrange(len(MOVES)))
        def step(): self._step(r, 'step', r.randrange(len(STEPS)))
        def maybe(f, p):
            if r.random() < p: f()
        for _ in range(len(self.norms) + r.randint(0, 1)):
            kind = r.choice(['back', 'back', 'forward', 'forward', 'cat', 'both', 'norm'])
            if kind in ('back', 'both'):
                layer()
                maybe(move, .3)
            if kind != 'cat' or r.random() < .8: norm()
            if kind in ('forward', 'both'):
                maybe(move, .3)
                layer()
            if kind == 'cat': self._step(r, 'cat', r.randrange(2))
            maybe(step, .5)
            maybe(lambda: self._step(r, 'read', r.randrange(len(self.layers))), .1)
        self.returned = [-1] + [-r.randint(2, 4)]*(r.random() < .3)
        self.form,self.keeps = r.choice(['tuple', 'dict', 'list']),r.random() < .05
    def _step(self, r, kind, i):
        "Mostly of the last value; the other one is any"
        self.program.append((kind, i, -1 if r.random() < .9 else -2, r.randint(1, 4)))
    def forward(self, x):
        values = [x*1, x*1]
        for kind,i,a,b in self.program:
            x,z = values[a],values[-min(b, len(values))]
            if kind == 'layer': y = self.layers[i](x)
            elif kind == 'norm': y = self.norms[i](x)
            elif kind == 'move': y = MOVES[i](x, z)
            elif kind == 'read': y = x + self.layers[i].weight.mean()
            elif kind == 'cat': y = self.wide[i](torch.cat([x, z], 1))
            else: y = STEPS[i](x, z)
            values.append(y)
        if self.keeps: self.__dict__['kept'] = values[-2]
        res = [values[max(i, -len(values))] for i in self.returned]
        return res[0] if len(res) == 1 else dict(enumerate(res)) if self.form == 'dict' else tuple(res) if self.form == 'tuple' else res

def made(seed): return randomize(Random(seed).double().eval(), seed), rand(2, C, C, C)
