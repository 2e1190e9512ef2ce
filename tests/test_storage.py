"What is written is as small as its parameters, and whoever reads it does not need fasterai"
import io, os, pickle, shutil, subprocess, sys, textwrap
import pytest, safetensors.torch, torch
from torch import nn
from fasterai.misc.all import *

pytestmark = pytest.mark.filterwarnings('ignore:.*layers grew:UserWarning', 'ignore:load_learner', 'ignore:The given NumPy')

def nbytes(m): return sum(t.numel()*t.element_size() for t in [*m.parameters(), *m.buffers()])

def saved_size(o):
    f = io.BytesIO()
    torch.save(o, f)
    return f.getbuffer().nbytes

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 32, bias=False), nn.ReLU(), nn.Linear(32, 4)).eval()

def run(code, *args, **env):
    "Run Python code in a process of its own; what it prints"
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code), *map(str, args)], capture_output=True, text=True,
                         env={**os.environ, **env})
    assert res.returncode == 0, res.stderr
    return res.stdout

@pytest.fixture(scope='module')
def small(): return FC_Decomposer(.25).decompose(net())

@pytest.fixture(scope='module')
def x(): return torch.randn(5, 64, generator=torch.Generator().manual_seed(1))

# ------------------------------------------------------------------ size

SHAPES = [(1024, 1024, .5), (1024, 1024, .25), (1024, 1024, .1), (1024, 1024, .05), (1024, 4096, .1), (4096, 1024, .1), (512, 1000, .1),
          (512, 1000, .5), (64, 64, .5), (512, 2, .5), (2, 512, .5)]

@pytest.mark.parametrize('n,m,ratio', SHAPES)
def test_checkpoint_is_as_small_as_the_parameters(n, m, ratio, tmp_path):
    dense = nn.Linear(n, m)
    pair = FC_Decomposer(ratio).decompose(dense)
    k = max(1, int(ratio*min(m, n)))
    assert nbytes(pair) == 4*(k*(m+n) + m)
    for o in (pair.state_dict(), pair): assert saved_size(o) <= 1.02*nbytes(pair) + 64*2**10
    safetensors.torch.save_file(pair.state_dict(), tmp_path/'p.safetensors')
    assert (tmp_path/'p.safetensors').stat().st_size <= nbytes(pair) + 4*2**10
    if ratio <= .25 and min(m, n) > 64: assert saved_size(pair.state_dict()) < .6*saved_size(dense.state_dict())

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoint_of_other_dtypes(dtype):
    small = FC_Decomposer(.25).decompose(net().to(dtype))
    assert saved_size(small.state_dict()) <= 1.02*nbytes(small) + 64*2**10

@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_is_the_result_and_one_layer():
    # 16 layers of 8 MB; copying the model first would cost 128 MB
    out = run('''
        import torch, torch.nn as nn
        from fasterai.misc.all import FC_Decomposer
        def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])/2**10  # ru_maxrss begins with the parent's
        wide = lambda i: nn.Linear(8192, 256) if i % 2 else nn.Linear(256, 8192)
        FC_Decomposer(.04).decompose(nn.Sequential(wide(0), wide(1)))   # whatever the libraries allocate once
        model = nn.Sequential(*map(wide, range(16)))
        before = peak()
        small = FC_Decomposer(.04).decompose(model)
        print(peak() - before)
    ''', MALLOC_MMAP_THRESHOLD_='1000000')   # freed memory goes back at once instead of being counted until the process ends
    result,workspace = 16*10*(8192+256)*4/2**20,3*8192*256*8/2**20   # the weight and two sets of vectors in float64
    assert float(out) < result + workspace + 24

# ------------------------------------------------------------------ round trips in this process

def test_state_dict(small, x, tmp_path):
    torch.save(small.state_dict(), tmp_path/'s.pth')
    again = FC_Decomposer(.25).plan(net()).skeleton(net())
    again.load_state_dict(torch.load(tmp_path/'s.pth', weights_only=True))
    assert torch.equal(again(x), small(x))

def test_safetensors(small, x, tmp_path):
    safetensors.torch.save_file(small.state_dict(), tmp_path/'s.safetensors')
    again = FC_Decomposer(.25).plan(net()).skeleton(net())
    again.load_state_dict(safetensors.torch.load_file(tmp_path/'s.safetensors'))
    assert torch.equal(again(x), small(x))
    safetensors.torch.save_model(small, tmp_path/'m.safetensors')
    again = FC_Decomposer(.25).plan(net()).skeleton(net())
    safetensors.torch.load_model(again, tmp_path/'m.safetensors')
    assert torch.equal(again(x), small(x))

def test_pickle(small, x): assert torch.equal(pickle.loads(pickle.dumps(small))(x), small(x))

def test_pickle_of_a_pair_that_offers_weight():
    m = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    small,x = FC_Decomposer(.25).decompose(m),torch.randn(2, 3, 16)
    again = pickle.loads(pickle.dumps(small))
    assert torch.equal(again(x), small(x)) and again.self_attn.out_proj.weight.shape == (16, 16)
    assert saved_size(small.state_dict()) <= 1.02*nbytes(small) + 64*2**10

def test_plan_and_policies_can_be_pickled():
    plan = FC_Decomposer(policy=Energy(.9)).plan(net())
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert repr(pickle.loads(pickle.dumps(FC_Decomposer(policy={'0': .5})))) == repr(FC_Decomposer(policy={'0': .5}))

# ------------------------------------------------------------------ compilers and exporters

def test_export(small, x):
    program = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=2)},))
    for rows in (x, x[:3]): torch.testing.assert_close(program.module()(rows), small(rows), rtol=1e-6, atol=1e-7)

def test_compile_without_graph_breaks(small, x):
    torch._dynamo.reset()
    assert torch.equal(torch.compile(small, backend='eager', fullgraph=True)(x), small(x))

@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a C++ compiler')
def test_compile_with_inductor(small, x):
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(small, fullgraph=True)(x), small(x), rtol=1e-5, atol=1e-6)

@pytest.mark.filterwarnings('ignore:`torch.jit')
def test_trace_and_script(small, x):
    assert torch.equal(torch.jit.trace(small, x)(x[:3]), small(x[:3]))
    assert torch.equal(torch.jit.script(small)(x[:3]), small(x[:3]))

def test_fx(small, x): assert torch.equal(torch.fx.symbolic_trace(small)(x), small(x))

def test_gradient_checkpointing(small, x):
    from torch.utils.checkpoint import checkpoint_sequential
    torch.testing.assert_close(checkpoint_sequential(small, 2, x, use_reentrant=False), small(x))

# ------------------------------------------------------------------ without fasterai

@pytest.fixture
def learner():
    import numpy as np, pandas as pd
    from fastai.tabular.all import tabular_learner, TabularDataLoaders, RegressionBlock
    rng = np.random.default_rng(0)
    df = pd.DataFrame(rng.standard_normal((64, 5)).astype('float32'), columns=[*'abcdy'])
    dls = TabularDataLoaders.from_df(df, cont_names=[*'abcd'], y_names='y', y_block=RegressionBlock(), bs=16)
    return tabular_learner(dls, layers=[64, 32], n_out=1)

@pytest.mark.slow
def test_everything_loads_where_fasterai_cannot_be_imported(small, x, learner, tmp_path):
    learner.model = FC_Decomposer(.25).decompose(learner.model)
    learner.export(tmp_path/'learner.pkl')
    assert (tmp_path/'learner.pkl').stat().st_size < 1.1*nbytes(learner.model) + 64*2**10
    cont = torch.randn(3, 4)
    torch.save((cont, learner.model.eval().cpu()(torch.zeros(3, 0), cont).detach()), tmp_path/'tabular.pt')
    torch.save((x, small(x).detach()), tmp_path/'xy.pt')
    torch.save(small, tmp_path/'model.pt')
    torch.export.save(torch.export.export(small, (x,)), tmp_path/'model.pt2')
    with pytest.warns(Warning): torch.jit.trace(small, x).save(tmp_path/'traced.pt')
    safetensors.torch.save_file(small.state_dict(), tmp_path/'model.safetensors')
    out = run('''
        import sys, importlib.abc
        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split('.')[0] == 'fasterai': raise ModuleNotFoundError(f'blocked: {name}')
        sys.meta_path.insert(0, Block())
        import torch, safetensors.torch
        from pathlib import Path
        from fastai.learner import load_learner
        d = Path(sys.argv[1])
        x,y = torch.load(d/'xy.pt')
        model = torch.load(d/'model.pt', weights_only=False)
        weights = safetensors.torch.load_file(d/'model.safetensors')
        def same(got, want): assert torch.allclose(got, want, rtol=1e-5, atol=1e-6), (got, want)
        same(model(x), y)
        same(torch.export.load(d/'model.pt2').module()(x), y)
        same(torch.jit.load(d/'traced.pt')(x), y)
        model.load_state_dict(weights)
        same(model(x), y)
        cont,out = torch.load(d/'tabular.pt')
        same(load_learner(d/'learner.pkl').model.eval()(torch.zeros(3, 0), cont), out)
        assert not any(o.split('.')[0] == 'fasterai' for o in sys.modules)
        try: import fasterai
        except ModuleNotFoundError: print('done')
    ''', tmp_path)
    assert out.split()[-1] == 'done'

def test_learner_round_trip(learner, tmp_path):
    from fastai.learner import load_learner
    learner.model = FC_Decomposer(.25).decompose(learner.model)
    learner.export(tmp_path/'l.pkl')
    again = load_learner(tmp_path/'l.pkl')
    assert str(again.model) == str(learner.model)
    assert all(map(torch.equal, learner.model.parameters(), again.model.parameters()))
