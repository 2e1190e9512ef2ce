"Several processes compute what one computes, share the work, and end together"
import contextlib, json, multiprocessing, os, pickle, socket, sys, textwrap, time
import pytest, torch
from fasterai.core.distributed import balanced

# Processes are forked from one that has imported the library and done nothing else
mp = multiprocessing.get_context('forkserver')
mp.set_forkserver_preload(['fasterai.misc.all'])

COMMON = '''
    import os, pickle, sys, warnings
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

def enter(rank, n, port, folder, code):
    "What rank `rank` of `n` does: run `code`, output to files"
    for fd,name in (1, 'out'),(2, 'err'): os.dup2(os.open(f'{folder}/{rank}.{name}', os.O_WRONLY | os.O_CREAT), fd)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    sys.argv = ['script', str(folder)]
    torch.set_num_threads(1)
    exec(textwrap.dedent(COMMON) + textwrap.dedent(code), {'__name__': 'script'})

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def run(code, folder, n, timeout=120):
    "(exit code, stderr, stdout) of each of `n` processes, which nobody ends when another fails; fails where one hangs"
    port = free_port()
    ps = [mp.Process(target=enter, args=(r, n, port, folder, code)) for r in range(n)]
    try:
        for p in ps: p.start()
        end = time.monotonic() + timeout
        for p in ps: p.join(max(0, end - time.monotonic()))
        if (late := [r for r,p in enumerate(ps) if p.exitcode is None]): pytest.fail(f'ranks {late} hang')
        return [(p.exitcode, (folder/f'{r}.err').read_text(), (folder/f'{r}.out').read_text()) for r,p in enumerate(ps)]
    finally:
        for p in ps:
            with contextlib.suppress(AttributeError): p.kill()

def results(code, folder, n):
    "What each process left in a file"
    for rc,err,_ in run(code, folder, n): assert rc == 0, err
    return [pickle.loads((folder/f'{r}.pkl').read_bytes()) for r in range(n)]

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

@pytest.mark.parametrize('n,what', [(2, 'calibrate'), (2, 'spectra'), (2, 'factors'), (2, 'checks'), (2, 'exit'), (4, 'calibrate'), (4, 'factors')])
def test_a_rank_that_fails_ends_all(n, what, tmp_path):
    code = '''
        rank,size = setup()
        from fasterai.lowrank import plan as room, solve
        m,data,what,bad = net(),batches()[rank::size],%r,size-1
        def fails(*args): raise MemoryError('no room left')
        if what == 'calibrate' and rank == bad: data = [data[0], torch.randn(5, 4, 13)]
        if what == 'spectra' and rank == bad: solve._basis = fails
        if what == 'factors' and rank == bad: room._mk = fails
        if what == 'checks' and rank == bad: m.up.weight.data[0, 0] = float('nan')
        if what == 'exit' and rank == bad: raise SystemExit(3)     # says nothing to the others
        plan = FC_Decomposer(.25).plan(net() if what == 'checks' else m, data)
        plan.apply(m)
        print('went on')
    ''' % what
    codes,errs,outs = zip(*run(code, tmp_path, n))
    assert all(codes) and not any('went on' in o for o in outs), errs
    if what == 'exit': return
    text = {'calibrate': 'shapes cannot be multiplied', 'checks': "the weight of 'up' has 1 NaN"}.get(what, 'no room left')
    assert text in errs[-1] and f'rank {n-1} failed' not in errs[-1]
    for e in errs[:-1]: assert f'RuntimeError: rank {n-1} failed: ' in e and text in e

def test_loaders_of_fastai_are_divided(tmp_path):
    code = '''
        rank,size = setup() if os.environ['WORLD_SIZE'] != '1' else (0, 1)
        from fastai.vision.all import Learner, CrossEntropyLossFlat
        dls = digits_dls(8, n=200)
        torch.manual_seed(0)
        learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 40), nn.ReLU(), nn.Linear(40, 10)), loss_func=CrossEntropyLossFlat())
        st = calibrate(learn.model, learn)
        learn.decompose(.25)
        empty = calibrate(nn.Linear(3, 3), [torch.ones(4, 3)*i for i in range(3)] if rank == 0 else [])
        (out/f'{rank}.pkl').write_bytes(pickle.dumps((st.batches, st['1'].rows, st['1'].cov, learn.model.state_dict(), empty[''].rows)))
    '''
    (tmp_path/'one').mkdir(); (tmp_path/'two').mkdir()
    (want,),got = results(code, tmp_path/'one', 1),results(code, tmp_path/'two', 2)
    for res in got:
        assert res[:2] == want[:2] == (3, 160) and res[4] == 12     # a rank may have no data at all
        assert close(res[2], want[2], 1e-6)
        a,b = (s['1.1.weight'] @ s['1.0.weight'] for s in (res[3], want[3]))
        assert close(a, b, 1e-4)
    assert all(map(torch.equal, got[0][3].values(), got[1][3].values()))

def test_a_model_in_DistributedDataParallel_with_uneven_shares(tmp_path):
    # its forward synchronizes the buffers of batch normalization: with shares of 2 and 1 batches the first rank would wait for ever
    code = '''
        rank,size = setup()
        torch.manual_seed(0)
        m = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
        st = calibrate(nn.parallel.DistributedDataParallel(m), [torch.ones(4, 6)*i for i in range(2 - rank)])
        (out/f'{rank}.pkl').write_bytes(pickle.dumps((st.batches, {n: o.rows for n,o in st.items()})))
    '''
    assert results(code, tmp_path, 2) == [(3, {'module.0': 12, 'module.2': 12})]*2

def test_no_data_on_any_rank(tmp_path):
    for rc,err,_ in run("rank,size = setup()\ncalibrate(nn.Linear(3, 3), [])", tmp_path, 2): assert rc and 'data has no batches' in err

@pytest.mark.parametrize('size', [1, 2, 3, 8])
def test_shares_are_balanced(size):
    g = torch.Generator().manual_seed(size)
    for n in (0, 1, 5, 40):
        costs = (torch.rand(n, generator=g)**4).tolist()
        owner = balanced(costs, size)
        loads = [sum(c for c,o in zip(costs, owner) if o == r) for r in range(size)]
        # Graham's bound for the longest processing time first
        assert len(owner) == n and max(loads) <= (4/3 - 1/(3*size))*max(sum(costs)/size, max(costs, default=0)) + max(costs, default=0)/3*(n > size) + 1e-12

def test_quantization_has_one_plan_on_all_ranks(tmp_path):
    "Each rank sees its own batches; formats, bytes and codes are those of all together"
    code = """
    from fasterai.quantize.quantizer import Quantizer
    from fasterai.quantize.policies import ByteBudget
    rank,size = setup()
    def result(data):
        plan = Quantizer(ByteBudget(.14)).plan(net(), data)
        return plan.to_json(), {k: v.tolist() for k,v in plan.apply(net()).state_dict().items()}
    res = result(batches()[rank::size])
    dist.destroy_process_group()
    res += (result(batches()) if rank == 0 else None),
    (out/f'{rank}.pkl').write_bytes(pickle.dumps(res))
    """
    (a,codes_a,one),(b,codes_b,_) = results(code, tmp_path, 2)
    assert a == b and codes_a == codes_b
    formats = [[o['format'] for o in json.loads(p)['layers']] for p in (a, one[0])]
    assert formats[0] == formats[1] and any(formats[0])
