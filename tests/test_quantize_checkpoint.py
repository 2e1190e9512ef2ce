"Quantized checkpoints: the same bits as in memory, whatever interrupts it, and errors instead of half a result"
import json, os, shutil, subprocess, sys, textwrap
import pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn
from fasterai.core import stream
from fasterai.core.inputs import collect_inputs
from fasterai.lowrank.checkpoint import decompose_checkpoint
from fasterai.quantize import checkpoint
from fasterai.quantize.checkpoint import load_quantized, quantize_checkpoint
from fasterai.quantize.formats import Half, Int
from fasterai.quantize.layers import QuantLayer
from fasterai.quantize.policies import ByteBudget
from fasterai.quantize.quantizer import Quantizer

pytestmark = pytest.mark.filterwarnings('ignore:no data:UserWarning')

class Net(nn.Module):
    "Layers of odd sizes, a convolution, a layer under two names, buffers, an embedding"
    def __init__(self, d=36):
        super().__init__()
        self.emb,self.norm = nn.Embedding(41, d),nn.BatchNorm1d(d)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(d, 77), nn.GELU(), nn.Linear(77, d, bias=False)) for _ in range(3)])
        self.conv,self.head = nn.Conv1d(1, 5, 3, groups=1),nn.Linear(5*(d-2), 7)
        self.register_buffer('steps', torch.tensor(7))
    def forward(self, ids):
        x = self.norm(self.emb(ids))
        for b in self.blocks: x = x + b(x)
        return self.head(self.conv(x[:,None]).flatten(1))

def net(seed=0, dtype=None):
    torch.manual_seed(seed)
    return Net().eval().to(dtype)

def dense(m, path):
    save_file(m.state_dict(), path)
    return path

def shards(model, path, n=3):
    path.mkdir()
    sd = {k: v.contiguous() for k,v in model.state_dict().items()}
    where = {k: f'model-{i % n + 1:05}-of-{n:05}.safetensors' for i,k in enumerate(sd)}
    for f in {*where.values()}: save_file({k: sd[k] for k in sd if where[k] == f}, path/f, metadata={'format': 'pt'})
    (path/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=where)))
    (path/'config.json').write_text('{}')
    return path

def tensors(path):
    files = [path] if path.is_file() else sorted(path.glob('*.safetensors'))
    return {k: v for f in files for k,v in load_file(f).items()}

def same(a, b):
    assert a.keys() == b.keys()
    for k in a: assert a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]), k

@pytest.mark.parametrize('bits', (2, 3, 4, 5, 6, 8, Int(4, group=32, symmetric=True), {'emb': 3, 'blocks.0.*': 5, 'head': 8}), ids=str)
@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16), ids=str)
def test_same_bits_as_in_memory(bits, dtype, tmp_path):
    m,ids = net(dtype=dtype),torch.arange(41)
    want = Quantizer(bits, embeddings=True).quantize(m)
    plan = quantize_checkpoint(dense(m, tmp_path/'m.safetensors'), tmp_path/'q.safetensors', bits, model=Net, embeddings=True)
    same(tensors(tmp_path/'q.safetensors'), want.state_dict())
    assert plan.bytes_after == sum(t.nbytes for t in want.state_dict().values()) and plan.bytes == sum(t.nbytes for t in m.state_dict().values())
    small = load_quantized(lambda: Net().eval(), tmp_path/'q.safetensors')
    with torch.no_grad(): assert small(ids).dtype == dtype and torch.equal(small(ids), want(ids))

def test_moments():
    "The layers without bias are as in memory; those with one keep it"
    import tempfile
    from pathlib import Path
    with tempfile.TemporaryDirectory() as d:
        d,m,data = Path(d),net(),torch.randint(41, (400,))
        stats = collect_inputs(m, data)
        want = Quantizer(3, layers='blocks').quantize(m, stats)
        plan = quantize_checkpoint(dense(m, d/'m.safetensors'), d/'q.safetensors', 3, model=Net, layers='blocks', statistics=stats)
        got = tensors(d/'q.safetensors')
        for i in range(3):
            for k in ('qweight', 'scales', 'zeros'): assert torch.equal(got[f'blocks.{i}.2.{k}'], want.state_dict()[f'blocks.{i}.2.{k}'])
            assert torch.equal(got[f'blocks.{i}.0.bias'], m.blocks[i][0].bias)
        quantize_checkpoint(d/'m.safetensors', d/'near.safetensors', 3, model=Net, layers='blocks')
        with torch.no_grad():
            a,b = ((load_quantized(Net, d/f).eval()(data) - m(data)).norm() for f in ('q.safetensors', 'near.safetensors'))
        assert a < .8*b and 'calibrated on 1 batch' in plan.note

def test_folder_of_shards(tmp_path):
    m = net()
    plan = quantize_checkpoint(shards(m, tmp_path/'src'), tmp_path/'dst', 4, model=Net)
    same(tensors(tmp_path/'dst'), Quantizer(4).quantize(m).state_dict())
    index = json.loads((tmp_path/'dst/model.safetensors.index.json').read_text())
    assert index['weight_map'].keys() == tensors(tmp_path/'dst').keys() and (tmp_path/'dst/config.json').exists()
    assert index['metadata']['total_size'] == plan.bytes_after
    assert torch.equal(load_quantized(Net, tmp_path/'dst').eval()(torch.arange(9)), Quantizer(4).quantize(m)(torch.arange(9)))

def test_names_alone(tmp_path):
    m = net()
    plan = quantize_checkpoint(dense(m, tmp_path/'m.safetensors'), tmp_path/'q.safetensors', 4, layers='blocks')
    assert len(plan.replaced) == 6
    small = load_quantized(Net, tmp_path/'q.safetensors').eval()
    assert torch.equal(small(torch.arange(9)), Quantizer(4, layers='blocks').quantize(m)(torch.arange(9)))

def test_gpt2(tmp_path):
    hf = pytest.importorskip('transformers')
    torch.manual_seed(0)
    m = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=61, n_positions=16, n_embd=32, n_layer=1, n_head=2)).eval()
    m.save_pretrained(tmp_path/'src')
    quantize_checkpoint(tmp_path/'src', tmp_path/'dst', 4)
    small,ids = load_quantized(None, tmp_path/'dst').eval(),torch.randint(61, (2, 7))
    with torch.no_grad(): assert torch.equal(small(ids).logits, Quantizer(4).quantize(m)(ids).logits)

class Stop(BaseException): pass

def stopped_at(mk, i, name, mod):
    real,n = getattr(mod, name),[0]
    def f(*args, **kw):
        n[0] += 1
        if n[0] == i: raise Stop
        return real(*args, **kw)
    mk.setattr(mod, name, f)
    return n

@pytest.mark.parametrize('name,mod', [('packed', checkpoint), ('_synced', stream), ('check_weight', checkpoint), ('replace', os)], ids=lambda o: str(o)[:9])
def test_goes_on_after_any_stop(name, mod, tmp_path, monkeypatch):
    src = dense(net(), tmp_path/'m.safetensors')
    plan = quantize_checkpoint(src, tmp_path/'want.safetensors', 5, model=Net)
    for i in range(1, 40):
        dst = tmp_path/f'dst{i}.safetensors'
        with monkeypatch.context() as mk:
            n = stopped_at(mk, i, name, mod)
            try: quantize_checkpoint(src, dst, 5, model=Net)
            except Stop: pass
            if n[0] < i: break      # all stops were tried
        assert not dst.exists() and quantize_checkpoint(src, dst, 5, model=Net) == plan
        assert dst.read_bytes() == (tmp_path/'want.safetensors').read_bytes() and not dst.with_name(dst.name+'.partial').exists()
    assert i > 1

def test_layers_are_not_rounded_twice(tmp_path, monkeypatch):
    src,kw = dense(net(), tmp_path/'m.safetensors'),dict(model=Net, layers='blocks.*.2')
    with monkeypatch.context() as mk:
        n = stopped_at(mk, 0, 'packed', checkpoint)
        quantize_checkpoint(src, tmp_path/'a.safetensors', Int(4, group=32), **kw)
    assert n[0] == 3
    with monkeypatch.context() as mk, pytest.raises(Stop):
        stopped_at(mk, 3, 'packed', checkpoint)
        quantize_checkpoint(src, tmp_path/'b.safetensors', Int(4, group=32), **kw)
    n = stopped_at(monkeypatch, 0, 'packed', checkpoint)
    with pytest.raises(ValueError, match='unfinished run with another plan'): quantize_checkpoint(src, tmp_path/'b.safetensors', 3, **kw)
    quantize_checkpoint(src, tmp_path/'b.safetensors', Int(4, group=32), **kw)
    assert n[0] == 1

def test_errors(tmp_path):
    m = net()
    src = dense(m, tmp_path/'m.safetensors')
    for kw,text in ((dict(bits=ByteBudget(.2)), 'compares all layers'), (dict(bits=Half()), 'cast the checkpoint'), (dict(bits=7), 'bits must be one of'),
                    (dict(layers='fc'), "no layer matches layers='fc'"), (dict(model=None), 'does not say which'),
                    (dict(exclude='*'), 'nothing to quantize')):
        with pytest.raises(ValueError, match=text): quantize_checkpoint(src, tmp_path/'q.safetensors', **{'bits': 4, 'model': Net} | kw)
    with pytest.raises(TypeError, match='must be what collect_inputs returns'): quantize_checkpoint(src, tmp_path/'q.safetensors', 4, model=Net, statistics=3)
    assert not (tmp_path/'q.safetensors').exists()
    m.head.weight.data[0,:2] = float('nan')
    with pytest.raises(ValueError, match="the weight of 'head' has 2 NaN or Inf"):
        quantize_checkpoint(dense(m, tmp_path/'nan.safetensors'), tmp_path/'q2.safetensors', 4, model=Net)
    quantize_checkpoint(src, tmp_path/'q3.safetensors', 4, model=Net)
    with pytest.raises(ValueError, match='written by fasterai already'): quantize_checkpoint(tmp_path/'q3.safetensors', tmp_path/'q4.safetensors', 4, model=Net)
    with pytest.raises(ValueError, match='already'): decompose_checkpoint(tmp_path/'q3.safetensors', tmp_path/'q4.safetensors', .5, model=Net)
    with pytest.raises(ValueError, match='holds no plan'): load_quantized(Net, src)
    with pytest.raises(FileExistsError): quantize_checkpoint(src, tmp_path/'q3.safetensors', 4, model=Net)

def test_weights_that_half_precision_cannot_scale(tmp_path):
    m = net()
    m.head.weight.data.mul_(1e-12)
    quantize_checkpoint(dense(m, tmp_path/'m.safetensors'), tmp_path/'q.safetensors', 8, model=Net)
    got = tensors(tmp_path/'q.safetensors')
    assert got['head.scales'].dtype is torch.float32 and got['blocks.0.0.scales'].dtype is torch.float16
    same(got, Quantizer(8).quantize(m).state_dict())

def test_command(tmp_path, capsys):
    from fasterai.cli import main
    from torchvision.models import resnet18
    torch.manual_seed(0)
    m = resnet18(num_classes=10).eval()
    save_file(m.state_dict(), tmp_path/'m.safetensors')
    args = ['--checkpoint', str(tmp_path/'m.safetensors'), '--arch', 'torchvision.models:resnet18', '--arch-args', '{"num_classes": 10}']
    out = ['--out', str(tmp_path/'q.safetensors')]
    assert main([*args, *out, '--bits', '4', '--exclude', 'conv1']) == 0
    same(tensors(tmp_path/'q.safetensors'), Quantizer(4, exclude='conv1').quantize(m).state_dict())
    for more,text in ((['--bits', '7'], '--bits must be one of 2, 3, 4, 5, 6, 8, got 7'), (['--bits', '4', '--budget', '.5'], '--budget is for low rank'),
                      (['--statistics', 'x'], '--statistics goes with --bits'), (['--bits', '4'], 'exists. Pass --force')):
        assert main([*args, *out, *more]) == 2 and text in capsys.readouterr().err
    assert main(['--bits', '4']) == 2 and '--bits goes with --checkpoint' in capsys.readouterr().err

@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    # layers of 10 MiB and a table of 20; two layers, then 20 (220 MiB)
    sd = {f'fc{i}.weight': torch.randn(*((260, 10000) if i % 2 else (10000, 260))) for i in range(20)} | {'table.weight': torch.randn(20000, 260)}
    for n,f in ((2, 'two'), (20, 'all')): save_file({k: v for k,v in sd.items() if k[0] == 't' or int(k[2:-7]) < n}, tmp_path/f'{f}.safetensors')
    code = """
        import sys, torch
        from torch import nn
        from fasterai.quantize.checkpoint import quantize_checkpoint, load_quantized
        def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])/2**10
        d = sys.argv[1]
        def build(n): return nn.ModuleDict({f'fc{i}': nn.Linear(*((10000, 260) if i % 2 else (260, 10000)), bias=False) for i in range(n)}
                                           | {'table': nn.Embedding(20000, 260)})
        start = peak()
        for f,n in (('two', 2), ('all', 20)):
            before = peak()
            quantize_checkpoint(f'{d}/{f}.safetensors', f'{d}/{f}-small.safetensors', 4, model=lambda: build(n), embeddings=True)
        made = peak()
        load_quantized(lambda: build(20), f'{d}/all-small.safetensors')
        print(made - before, before - start, peak() - made)
    """
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True,
                         env=os.environ | dict(MALLOC_MMAP_THRESHOLD_='1000000'))
    assert res.returncode == 0, res.stderr
    more,first,loaded = map(float, res.stdout.split()[-3:])
    assert more < 20 and first < 420 and loaded < (tmp_path/'all-small.safetensors').stat().st_size/2**20 + 12     # MiB; the files differ by 180
