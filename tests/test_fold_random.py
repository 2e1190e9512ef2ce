"Random networks compute the same after their norms were folded, and would not if one rule of the finder were missing"
import pytest, torch
from fasterai.core import dataflow
from fasterai.fold import find, norms as rooms_norms
from fasterai.misc.all import *
from fold_cases import norms, outputs, rel
from fold_random import made

TOL = 1e-9

def fold(seed, check=False):
    "Norms, how they were folded, and the error of the outputs"
    m,x = made(seed)
    want = outputs(m, [x])
    plan = BN_Folder().plan(m, x, check=check)
    err = rel(outputs(plan.apply(m), [x]), want)
    return len(norms(m)), [(o.name, o.way, o.into) for o in plan.replaced], err

def judged(seeds):
    n,back,forward = 0,0,0
    for seed in seeds:
        k,rows,err = fold(seed)
        assert err <= TOL, f'seed {seed}: {rows}'
        n,back,forward = n+k,back + sum(w == 'back' for _,w,_ in rows),forward + sum(w == 'forward' for _,w,_ in rows)
    return n, back, forward

def test_networks_run_and_matter():
    "All values are finite, and a random network is the same each time"
    for seed in range(50):
        (m,x),(again,_) = made(seed),made(seed)
        out = outputs(m, [x])
        assert out and all(o.isfinite().all() for o in out) and all(map(torch.equal, out, outputs(again, [x])))

def test_random_networks():
    n,back,forward = judged(range(100))
    assert n > 150 and back > .08*n and forward > .03*n

def test_check_undoes_nothing_that_is_right():
    for seed in range(0, 100, 5): assert fold(seed, check=True) == fold(seed)

# ------------------------------------------------------------------ with one rule switched off, the same networks show faults

def ignore_kept(was): return lambda *a, **kw: (was(*a, **kw)[0], False)
def ignore_readers(was):
    "Only layers and norms count as readers"
    def f(self, *a, **kw):
        res,kept = was(self, *a, **kw)
        return {i for i in res if i >= 0 and self.calls[i].func in dataflow.CONVS|dataflow.LINEARS|dataflow.NORMS}, kept
    return f

RULES = {'kept': (dataflow.Trace, 'readers', ignore_kept), 'readers': (dataflow.Trace, 'readers', ignore_readers),
         'padding': (find, '_pads', lambda was: lambda c: False),
         'parameters': (find.Finder, '_check_layer', lambda was: lambda self, m: None),
         'channels before': (find, '_written', lambda was: lambda src, *a: [*range(4)]),
         'channels behind': (find.Finder, '_read', lambda was: lambda self, c, m, *a: [*range(c.refs[0].shape[1])]),
         'own forward': (rooms_norms, '_tail', lambda was: lambda *a: ())}

def faulty(seed):
    try: return fold(seed)[2] > TOL
    except (IndexError, RuntimeError, ValueError): return True

@pytest.mark.parametrize('rule', RULES)
def test_without_a_rule_there_are_faults(rule, monkeypatch):
    where,name,mk = RULES[rule]
    monkeypatch.setattr(where, name, mk(getattr(where, name)))
    assert any(map(faulty, range(500)))

@pytest.mark.slow
def test_many_random_networks():
    n,back,forward = judged(range(1500))
    assert n > 2400 and back > .08*n and forward > .03*n
