"Several processes compute what one computes, share the work, and end together"
import os, pickle, subprocess, sys, textwrap
from pathlib import Path
import pytest, torch
from fasterai.core.distributed import balanced

root = Path(__file__).parent.parent
COMMON = '''
    import pickle, sys, warnings
    warnings.simplefilter('ignore')
    from pathlib import Path
    import torch, torch.distributed as dist, torch.nn.functional as F
    from torch import nn
    from fasterai.misc.all import *
    from fasterai.core.distributed import *
    from fasterai.core.distributed import world, gathered, agreed, shared, summed
    out = Path(sys.argv[1])

    class Net(nn.Module):
        "Tall, wide and square layers, attention whose weight is read, one layer that only some batches reach"
        def __init__(self):
            super().__init__()
            self.up,self.sq,self.attn = nn.Linear(12, 40),nn.Linear(40, 40),nn.MultiheadAttention(40, 2, batch_first=True)
            self.down,self.rare,self.head = nn.Linear(40, 24),nn.Linear(24, 24),nn.Linear(24, 6, bias=False)
        def forward(self, x):
            h = self.sq(torch.tanh(self.up(x)))
            h = self.down(self.attn(h, h, h)[0] + h)
            if x[0,0,0] > .5: h = h + self.rare(h)
            return self.head(torch.relu(h))

    def net():
        torch.manual_seed(0)
        return Net().eval()
    def batches(n=7):
        g = torch.Generator().manual_seed(1)
        return [torch.randn(5, 4, 12, generator=g) @ torch.randn(12, 12, generator=g) + i/3 for i in range(n)]
    def setup():
        dist.init_process_group('gloo')
        return world()
'''

def run(code, tmp_path, n, timeout=120):
    "Run `code` in `n` processes; return code, what they wrote to stderr, and what each left in a file"
    script = tmp_path/'script.py'
    script.write_text(textwrap.dedent(COMMON) + textwrap.dedent(code))
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'}
    cmd = [sys.executable] if n == 1 else [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', str(n), '--standalone', '--log-dir', str(tmp_path/'logs')]
    res = subprocess.run([*cmd, str(script), str(tmp_path)], capture_output=True, text=True, timeout=timeout, env=env)
    return res.returncode, res.stderr, [pickle.loads(f.read_bytes()) for f in sorted(tmp_path.glob('*.pkl'))]

def results(code, tmp_path, n):
    rc,err,res = run(code, tmp_path, n)
    assert rc == 0, err
    assert len(res) == n
    return res

# Each rank has the batches r, r+n, r+2n, …, so that four ranks have shares of 2, 2, 2, 1 of seven batches
DECOMPOSE = '''
    {setup}
    m,res = net(),{{}}
    data = batches()[rank::size]
    st = calibrate(m, data, sensitivity='full')
    res['stats'] = {{n: {{k: getattr(o, k) for k in ('rows','mean','cov','trace','shrink','dropped','positions','sens','sens_mean')}} for n,o in st.items()}}
    res['batches'] = st.batches
    for name,fc in dict(ratio=FC_Decomposer(.25), budget=FC_Decomposer(policy=ParamBudget(.4, round_to=1)), plain=FC_Decomposer(policy=Energy(.9))).items():
        plan = fc.plan(m, None if name == 'plain' else data)
        res[name] = [o.rank for o in plan.layers],[o.error for o in plan.layers],plan.apply(m).state_dict()
    res['inplace'] = FC_Decomposer(.25).decompose(net(), data, inplace=True).state_dict()
    (out/f'{{rank}}.pkl').write_bytes(pickle.dumps(res))
'''
ONE,MANY = (DECOMPOSE.format(setup=s) for s in ('rank,size = 0,1', 'rank,size = setup()'))

@pytest.fixture(scope='module')
def single(tmp_path_factory): return results(ONE, tmp_path_factory.mktemp('one'), 1)[0]

def close(a, b, tol=1e-9):
    a,b = torch.as_tensor(a, dtype=torch.float64),torch.as_tensor(b, dtype=torch.float64)
    return torch.norm(a - b) <= tol*torch.norm(b) + 1e-300

@pytest.mark.parametrize('n', [2, 4])
def test_ranks_compute_what_one_process_computes(n, single, tmp_path):
    res = results(MANY, tmp_path, n)
    def flat(o): return [t for v in o.values() for t in flat(v)] if isinstance(o, dict) else [t for v in o for t in flat(v)] if isinstance(o, (tuple, list)) else [o]
    for other in res[1:]:       # bit for bit
        for a,b in zip(flat(res[0]), flat(other), strict=True): assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    got = res[0]
    assert got['batches'] == single['batches'] == 7 and got['stats'].keys() == single['stats'].keys()
    for name,want in single['stats'].items():
        # products and gradients are in single precision, and the mean that they are taken about is another one
        for k,v in want.items(): assert (got['stats'][name][k] == v if isinstance(v, int) else close(got['stats'][name][k], v, 2e-5)), (name, k)
    for policy in ('ratio', 'budget', 'plain'):
        (ranks,errors,state),(ranks1,errors1,state1) = got[policy],single[policy]
        assert ranks == ranks1 and all(abs(a - b) < 1e-5 for a,b in zip(errors, errors1))
        for name in {k.rsplit('.', 2)[0] for k in state if k.endswith('.1.weight')}:
            A,B,A1,B1 = (s[f'{name}.{i}.weight'].double() for s in (state, state1) for i in (0, 1))
            assert close(B @ A, B1 @ A1, 1e-3), (policy, name)
    assert all(map(torch.equal, got['inplace'].values(), got['ratio'][2].values()))

@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize('what', ['calibrate', 'spectra', 'factors', 'checks', 'exit'])
def test_a_rank_that_fails_ends_all(n, what, tmp_path):
    code = '''
        rank,size = setup()
        from fasterai.lowrank import plan as room
        m,data,what,bad = net(),batches()[rank::size],%r,size-1
        def fails(*args): raise MemoryError('no room left')
        if what == 'calibrate' and rank == bad: data = [data[0], torch.randn(5, 4, 13)]
        if what == 'spectra' and rank == bad: room._basis = fails
        if what == 'factors' and rank == bad: room._mk = fails
        if what == 'checks' and rank == bad: m.up.weight.data[0, 0] = float('nan')
        if what == 'exit' and rank == bad: raise SystemExit(3)     # says nothing to the others
        plan = FC_Decomposer(.25).plan(m, data) if what != 'checks' else FC_Decomposer(.25).plan(net(), data)
        plan.apply(m)
        print('went on')
    ''' % what
    try: from_rank = run_alone(code, tmp_path, n)
    except subprocess.TimeoutExpired: pytest.fail('the others hang')
    codes,errs,outs = zip(*from_rank)
    assert all(codes) and not any('went on' in o for o in outs), errs
    if what == 'exit': return
    text = {'calibrate': 'shapes cannot be multiplied', 'checks': "the weight of 'up' has 1 NaN"}.get(what, 'no room left')
    assert text in errs[-1] and f'rank {n-1} failed' not in errs[-1]
    for e in errs[:-1]: assert f'RuntimeError: rank {n-1} failed: ' in e and text in e

def run_alone(code, tmp_path, n, timeout=90):
    "Every rank as a process of its own, which nobody ends when another fails: (return code, stderr, stdout) of each"
    script = tmp_path/'script.py'
    script.write_text(textwrap.dedent(COMMON) + textwrap.dedent(code))
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()), 'WORLD_SIZE': str(n)}
    ps = [subprocess.Popen([sys.executable, str(script), str(tmp_path)], env={**env, 'RANK': str(r), 'LOCAL_RANK': str(r)}, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE) for r in range(n)]
    try:
        outs = [p.communicate(timeout=timeout) for p in ps]
        return [(p.returncode, e, o) for p,(o,e) in zip(ps, outs)]
    finally: [p.kill() for p in ps]

def free_port():
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def test_loaders_of_fastai_are_divided(tmp_path):
    code = '''
        import os
        size = int(os.environ.get('WORLD_SIZE', 1))
        rank,size = setup() if size > 1 else (0, 1)
        from fastai.vision.all import Learner, CrossEntropyLossFlat
        dls = digits_dls(8, n=200)
        torch.manual_seed(0)
        learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 40), nn.ReLU(), nn.Linear(40, 10)), loss_func=CrossEntropyLossFlat())
        st = calibrate(learn.model, learn)
        learn.decompose(.25)
        empty = calibrate(learn.model[1:] if False else nn.Linear(3, 3), [torch.ones(4, 3)*i for i in range(3)] if rank == 0 else [])
        (out/f'{rank}.pkl').write_bytes(pickle.dumps((st.batches, st['1'].rows, st['1'].cov, learn.model.state_dict(), empty[''].rows)))
    '''
    (tmp_path/'one').mkdir(); (tmp_path/'two').mkdir()
    (want,),got = results(code, tmp_path/'one', 1),results(code, tmp_path/'two', 2)
    for res in got:
        assert res[:2] == want[:2] == (3, 160) and res[4] == 12     # a rank may have no data at all
        assert close(res[2], want[2], 1e-6)
        for a,b in ((res[3], want[3]),): assert close(a['1.1.weight'] @ a['1.0.weight'], b['1.1.weight'] @ b['1.0.weight'], 1e-4)
    assert all(map(torch.equal, got[0][3].values(), got[1][3].values()))

def test_no_data_on_any_rank(tmp_path):
    rc,err,_ = run("rank,size = setup()\ncalibrate(nn.Linear(3, 3), [])", tmp_path, 2)
    assert rc and 'data has no batches' in err

@pytest.mark.parametrize('size', [1, 2, 3, 8])
def test_shares_are_balanced(size):
    g = torch.Generator().manual_seed(size)
    for n in (0, 1, 5, 40):
        costs = (torch.rand(n, generator=g)**4).tolist()
        owner = balanced(costs, size)
        loads = [sum(c for c,o in zip(costs, owner) if o == r) for r in range(size)]
        # Graham's bound for the longest processing time first
        assert len(owner) == n and max(loads) <= (4/3 - 1/(3*size))*max(sum(costs)/size, max(costs, default=0)) + max(costs, default=0)/3*(n > size) + 1e-12
