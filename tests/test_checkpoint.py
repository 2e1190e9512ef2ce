"Checkpoints on disk: the same result as in memory, whatever interrupts it, and errors instead of half a result"
import contextlib, io, json, os, runpy, shutil, signal, socket, subprocess, sys, textwrap, time
from datetime import timedelta
from pathlib import Path
import pytest, safetensors, torch, torch.distributed as dist, torch.multiprocessing as mp
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from fasterai.core import stream
from fasterai.lowrank import checkpoint, shards as shard_room
from fasterai.misc.all import *

pytestmark = pytest.mark.filterwarnings('ignore:.*layers grew:UserWarning', 'ignore:.*fork:DeprecationWarning')

class Net(nn.Module):
    "Layers, buffers of all kinds, and an embedding"
    def __init__(self, d=48):
        super().__init__()
        self.emb,self.norm = nn.Embedding(40, d),nn.BatchNorm1d(d)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(d, 2*d), nn.GELU(), nn.Linear(2*d, d, bias=False)) for _ in range(3)])
        self.head = nn.Linear(d, 10)
        self.register_buffer('scale', torch.linspace(1, 2, d), persistent=False)
        self.register_buffer('steps', torch.tensor(7))
        self.register_buffer('nothing', torch.zeros(0, 3))
    def forward(self, ids):
        x = self.norm(self.emb(ids)*self.scale)
        for b in self.blocks: x = x + b(x)
        return self.head(x)

def net(seed=0, **kw):
    torch.manual_seed(seed)
    return Net(**kw).eval()

@pytest.fixture
def model(): return net()

@pytest.fixture
def src(model, tmp_path):
    save_file(model.state_dict(), tmp_path/'dense.safetensors')
    return tmp_path/'dense.safetensors'

def shards(model, path, n=3, sizes=None):
    "Write `model` as Hugging Face does: `n` shards and an index"
    path.mkdir()
    sd = {k: v.contiguous() for k,v in model.state_dict().items()}
    groups = [list(sd)[i::n] for i in range(n)] if sizes is None else sizes
    where = {k: f'model-{i+1:05}-of-{len(groups):05}.safetensors' for i,ks in enumerate(groups) for k in ks}
    for f in set(where.values()): save_file({k: sd[k] for k in sd if where[k] == f}, path/f, metadata={'format': 'pt'})
    index = dict(metadata=dict(total_size=sum(v.nbytes for v in sd.values())), weight_map=where)
    (path/'model.safetensors.index.json').write_text(json.dumps(index))
    return path

def tensors(path):
    "All tensors of a file or folder, read by safetensors itself"
    files = [path] if path.is_file() else sorted(path.glob('*.safetensors'))
    return {k: v for f in files for k,v in load_file(f).items()}

def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].dtype == b[k].dtype and a[k].shape == b[k].shape, k
        assert torch.equal(a[k], b[k]), k

def listing(path): return sorted(str(p.relative_to(path)) for p in path.rglob('*'))

# ------------------------------------------------------------------ the same as in memory

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_same_tensors_as_in_memory(model, tmp_path, dtype):
    model.to(dtype)
    save_file(model.state_dict(), tmp_path/'d.safetensors')
    before = (tmp_path/'d.safetensors').read_bytes()
    decompose_checkpoint(tmp_path/'d.safetensors', tmp_path/'s.safetensors', .25, model=Net)
    want = FC_Decomposer(.25).decompose(model)
    same(tensors(tmp_path/'s.safetensors'), want.state_dict())
    small = load_decomposed(lambda: Net().eval(), tmp_path/'s.safetensors')
    ids = torch.arange(6)
    small.scale = small.scale.to(dtype)
    assert torch.equal(small(ids), want(ids)) and not small.training
    assert (tmp_path/'d.safetensors').read_bytes() == before and listing(tmp_path) == ['d.safetensors', 's.safetensors']

POLICIES = [.5, 3, Energy(.8), ParamBudget(.4, round_to=1), {'blocks.0': .25, 'blocks.1': Energy(.7), 'head': None}]

@pytest.mark.parametrize('policy', POLICIES, ids=str)
def test_same_plan_as_in_memory(model, src, tmp_path, policy):
    kw = dict(exclude='blocks.2.0') if not isinstance(policy, dict) else {}
    plan = decompose_checkpoint(src, tmp_path/'s.safetensors', policy, model=Net, **kw)
    want = make_plan(model, policy, spectra=mk_policy(policy).needs_spectra, **kw)
    assert plan == want
    same(tensors(tmp_path/'s.safetensors'), want.apply(model).state_dict())

def test_options_reach_the_plan(src, model, tmp_path):
    kw = dict(layers=['blocks', 'head'], exclude='blocks.1', skip_unprofitable=True, round_to=4)
    plan = decompose_checkpoint(src, tmp_path/'s.safetensors', .9, model=Net, **kw)
    assert plan == make_plan(model, .9, spectra=False, **kw) and plan['head'].rank == 8 and 'would not be smaller' in plan['blocks.0.0'].reason

def test_metadata_holds_the_plan(src, tmp_path):
    plan = decompose_checkpoint(src, tmp_path/'s.safetensors', Energy(.8), model=Net)
    with safetensors.safe_open(tmp_path/'s.safetensors', 'pt') as f: meta = f.metadata()
    got = DecompositionPlan.from_json(meta['fasterai.plan'])
    assert meta['format'] == 'pt' and [o.rank for o in got.layers] == [o.rank for o in plan.layers]

def test_sharded_folder(model, tmp_path):
    src = shards(model, tmp_path/'src')
    (src/'config.json').write_text('{}'); (src/'tokenizer.json').write_text('[1]'); (src/'pytorch_model.bin').write_text('x')
    plan = decompose_checkpoint(src, tmp_path/'dst', Energy(.8), model=Net)
    same(tensors(tmp_path/'dst'), plan.apply(model).state_dict())
    index = json.loads((tmp_path/'dst/model.safetensors.index.json').read_text())
    for k,f in index['weight_map'].items(): assert k in load_file(tmp_path/'dst'/f)
    assert index['metadata']['total_size'] == sum(t.nbytes for t in tensors(tmp_path/'dst').values())
    assert DecompositionPlan.load(tmp_path/'dst/plan.json') == plan
    assert listing(tmp_path/'dst') == sorted([*(f.name for f in src.iterdir() if f.suffix != '.bin'), 'plan.json'])
    same(load_decomposed(Net, tmp_path/'dst').state_dict(), plan.apply(model).state_dict())
    assert listing(tmp_path) == sorted(['src', 'dst', *(f'src/{o}' for o in listing(src)), *(f'dst/{o}' for o in listing(tmp_path/'dst'))])

def test_one_file_may_become_a_folder(src, model, tmp_path):
    decompose_checkpoint(src, tmp_path/'dst', .25, model=model)
    assert listing(tmp_path/'dst') == ['dense.safetensors', 'plan.json']
    same(load_decomposed(model, tmp_path/'dst').state_dict(), FC_Decomposer(.25).decompose(model).state_dict())

def test_other_tensors_are_copied_byte_for_byte(tmp_path):
    odd = {'fc.weight': torch.randn(8, 8).half(), 'i': torch.arange(5, dtype=torch.int8), 'b': torch.tensor([True, False]), 'zero': torch.tensor(3.),
           'f8': torch.randn(3, 5).to(torch.float8_e4m3fn), 'c': torch.randn(3, dtype=torch.complex64), 'none': torch.zeros(0, 4), 'd': torch.randn(2).double()}
    save_file(odd, tmp_path/'a.safetensors', metadata={'mine': 'yes'})
    decompose_checkpoint(tmp_path/'a.safetensors', tmp_path/'b.safetensors', .5, layers='fc')
    got = load_file(tmp_path/'b.safetensors')
    for k in odd.keys() - {'fc.weight'}: assert got[k].dtype == odd[k].dtype and torch.equal(got[k].flatten().view(torch.uint8), odd[k].flatten().view(torch.uint8))
    with safetensors.safe_open(tmp_path/'b.safetensors', 'pt') as f: assert f.metadata()['mine'] == 'yes'

def test_zero_weight_and_shared_layer(tmp_path):
    def build():
        torch.manual_seed(1)
        m = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        m.append(m[0])
        return m
    m = build()
    nn.init.zeros_(m[1].weight)
    for save in (lambda p: save_model(m, str(p)), lambda p: save_file({k: v.clone() for k,v in m.state_dict().items()}, p)):
        save(tmp_path/'a.safetensors')
        plan = decompose_checkpoint(tmp_path/'a.safetensors', tmp_path/'b.safetensors', .5, model=build, overwrite=True)
        assert plan['1'].rank == 1 and plan['0'].aliases == ('3',)
        small = load_decomposed(build, tmp_path/'b.safetensors')
        assert small[0] is small[3] and small[0][0].weight is small[3][0].weight
        same(small.state_dict(), FC_Decomposer().decompose(m).state_dict())

def test_layers_whose_weight_is_read(tmp_path):
    def build(): return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    m = build()
    save_file(m.state_dict(), tmp_path/'a.safetensors')
    for kw in (dict(model=build), dict(layers=['self_attn.out_proj', 'linear1', 'linear2'])):     # names alone do not tell who reads
        decompose_checkpoint(tmp_path/'a.safetensors', tmp_path/'b.safetensors', .25, overwrite=True, **kw)
        small,x = load_decomposed(build, tmp_path/'b.safetensors'),torch.randn(2, 3, 16)
        assert type(small.self_attn.out_proj) is LowRankLinear
        assert torch.equal(small(x), FC_Decomposer(.25).decompose(m)(x))

def test_recurrent_layers_keep_working(tmp_path):
    class R(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.fc = nn.LSTM(8, 16, 2),nn.Linear(16, 12)
        def forward(self, x): return self.fc(self.rnn(x)[0])
    m,x = R(),torch.randn(4, 2, 8)
    save_file(m.state_dict(), tmp_path/'a.safetensors')
    decompose_checkpoint(tmp_path/'a.safetensors', tmp_path/'b.safetensors', .5, model=R)
    assert torch.equal(load_decomposed(R, tmp_path/'b.safetensors')(x), FC_Decomposer().decompose(m)(x))

def hf(name, **kw):
    from transformers import (BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config,
                              T5ForConditionalGeneration)
    torch.manual_seed(0)
    if name == 'gpt2': return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=32, n_embd=32, n_layer=2, n_head=4))
    if name == 'bert': return BertForMaskedLM(BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64))
    if name == 't5': return T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    cfg = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                      tie_word_embeddings=name == 'llama-tied', **kw)
    return LlamaForCausalLM(cfg)

@pytest.mark.parametrize('name', ['gpt2', 'bert', 't5', 'llama', 'llama-tied'])
def test_hugging_face_folders(name, tmp_path):
    m = hf(name).eval()
    m.save_pretrained(tmp_path/'src', max_shard_size='30KB')
    plan = decompose_checkpoint(tmp_path/'src', tmp_path/'dst', ParamBudget(.5))
    assert plan == make_plan(m, ParamBudget(.5)) and len(list((tmp_path/'dst').glob('*.safetensors'))) > 1
    want,ids = FC_Decomposer(policy=ParamBudget(.5)).decompose(m),torch.arange(12)[None]
    kw = dict(decoder_input_ids=ids) if name == 't5' else {}
    for small in (load_decomposed(None, tmp_path/'dst'), load_decomposed(lambda: type(m)(m.config).eval(), tmp_path/'dst'), load_decomposed(m, tmp_path/'dst')):
        assert torch.equal(small(ids, **kw).logits, want(ids, **kw).logits) and not small.training
        assert not any(t.is_meta for t in [*small.parameters(), *small.buffers()])
        assert len(list(small.parameters())) == len(list(want.parameters()))     # ties are ties
        assert [k for k,p in small.named_parameters() if p.requires_grad] == [k for k,p in want.named_parameters() if p.requires_grad]

def test_half_precision_hugging_face_folder(tmp_path):
    m = hf('llama', dtype='bfloat16').to(torch.bfloat16).eval()
    m.save_pretrained(tmp_path/'src')
    decompose_checkpoint(tmp_path/'src', tmp_path/'dst', .25)
    small = load_decomposed(None, tmp_path/'dst')
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    ids = torch.arange(12)[None]
    assert torch.equal(small(ids).logits, FC_Decomposer(.25).decompose(m)(ids).logits)

def test_buffers_that_old_versions_saved(tmp_path):
    m = hf('llama').eval()
    freq = m.model.rotary_emb.inv_freq
    save_file(m.state_dict() | {f'model.layers.{i}.self_attn.rotary_emb.inv_freq': freq.clone() for i in range(2)}, tmp_path/'a.safetensors')
    decompose_checkpoint(tmp_path/'a.safetensors', tmp_path/'b.safetensors', .25, model=lambda: hf('llama'))
    same(load_decomposed(m, tmp_path/'b.safetensors').state_dict(), FC_Decomposer(.25).decompose(m).state_dict())

# ------------------------------------------------------------------ which tensors are layers

def test_names_alone(src, model, tmp_path):
    plan = decompose_checkpoint(src, tmp_path/'s.safetensors', .25, layers='*')
    assert {o.name for o in plan.replaced} == {'head', *(f'blocks.{i}.{j}' for i in range(3) for j in (0, 2))}  # not the embedding
    assert plan.params == sum(p.numel() for p in model.parameters())     # without the statistics of the batch norm
    same(load_decomposed(Net, tmp_path/'s.safetensors').state_dict(), FC_Decomposer(.25).decompose(model).state_dict())
    plan = decompose_checkpoint(src, tmp_path/'t.safetensors', .25, layers=['emb', 'head'])
    assert {o.name for o in plan.replaced} == {'emb', 'head'}

def test_gpt2_needs_its_architecture(tmp_path):
    m = hf('gpt2')
    save_model(m, str(tmp_path/'a.safetensors'))
    decompose_checkpoint(tmp_path/'a.safetensors', tmp_path/'b.safetensors', .25, layers='*.mlp.*')
    with pytest.raises(ValueError, match=r"expects 'transformer.h.0.mlp.c_fc' to be Linear\(128→32\), the model has Conv1D\(32→128\)"):
        load_decomposed(m, tmp_path/'b.safetensors')

def test_buffers_computed_from_weights_need_memory(src, model, tmp_path):
    class Peeks(Net):
        def __init__(self):
            super().__init__()
            self.norm_of_head = self.head.weight.norm().item()
    with pytest.warns(UserWarning, match='cannot be built without weights'): decompose_checkpoint(src, tmp_path/'s.safetensors', .25, model=Peeks)
    with pytest.warns(UserWarning, match='cannot be built without weights'): small = load_decomposed(Peeks, tmp_path/'s.safetensors')
    same(small.state_dict(), FC_Decomposer(.25).decompose(model).state_dict())

def test_a_model_that_is_passed_stays_as_it_is(src, model, tmp_path):
    decompose_checkpoint(src, tmp_path/'s.safetensors', .25, model=Net)
    m = net(1).train()
    before = {k: v.clone() for k,v in m.state_dict().items()}
    small = load_decomposed(m, tmp_path/'s.safetensors')
    same(m.state_dict(), before)
    assert small.training and not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in m.parameters()}
    same(small.state_dict(), FC_Decomposer(.25).decompose(model).state_dict())

# ------------------------------------------------------------------ interruptions

class Stop(BaseException): pass

def stopped_at(monkeypatch, i, name='_mk', mod=shard_room):
    "Let call `i` of a function raise; the counter of its calls"
    real,n = getattr(mod, name),[0]
    def f(*args, **kw):
        n[0] += 1
        if n[0] == i: raise Stop
        return real(*args, **kw)
    monkeypatch.setattr(mod, name, f)
    return n

@pytest.mark.parametrize('sharded', [False, True])
@pytest.mark.parametrize('name,mod', [('_mk', shard_room), ('_synced', stream), ('replace', os), ('rename', os), ('rmtree', shutil)])
def test_goes_on_after_any_stop(model, tmp_path, monkeypatch, sharded, name, mod):
    src = shards(model, tmp_path/'src') if sharded else tmp_path/'src.safetensors'
    if not sharded: save_file(model.state_dict(), src)
    want,n = tmp_path/f'want{"" if sharded else ".safetensors"}',[0]
    plan = decompose_checkpoint(src, want, .25, model=Net)
    for i in range(1, 30):
        dst = want.with_name(f'dst{i}{"" if sharded else ".safetensors"}')
        with monkeypatch.context() as mk:
            n = stopped_at(mk, i, name, mod)
            try: decompose_checkpoint(src, dst, .25, model=Net)
            except Stop: pass
            if n[0] < i: break      # all stops were tried
        if name != 'rmtree':
            assert not dst.exists()
            assert decompose_checkpoint(src, dst, .25, model=Net) == plan
        assert not dst.with_name(dst.name+'.partial').exists() or name == 'rmtree'
        for f in ([want] if want.is_file() else want.iterdir()): assert (dst if dst.is_file() else dst/f.name).read_bytes() == f.read_bytes()
    assert i > 1 or (name == 'rename' and not sharded) or (name == 'rmtree' and i == 1)

def test_finished_layers_are_not_done_again(src, tmp_path, monkeypatch):
    with monkeypatch.context() as mk, pytest.raises(Stop):
        stopped_at(mk, 6)
        decompose_checkpoint(src, tmp_path/'s.safetensors', .25, model=Net)
    n = stopped_at(monkeypatch, 0)
    decompose_checkpoint(src, tmp_path/'s.safetensors', .25, model=Net)
    assert n[0] == 7 - 5

def test_spectra_are_not_computed_again(src, tmp_path, monkeypatch):
    with monkeypatch.context() as mk, pytest.raises(Stop):
        stopped_at(mk, 5, '_spectrum', checkpoint)
        decompose_checkpoint(src, tmp_path/'s.safetensors', Energy(.9), model=Net)
    with open(tmp_path/'s.safetensors.partial/looks.0', 'a') as f: f.write('["head", fal')     # killed while it wrote
    n = stopped_at(monkeypatch, 0, '_spectrum', checkpoint)
    with pytest.raises(ValueError, match='need at least'): decompose_checkpoint(src, tmp_path/'s.safetensors', ParamBudget(.001), model=Net)
    assert n[0] == 7 - 4
    decompose_checkpoint(src, tmp_path/'s.safetensors', ParamBudget(.5), model=Net)       # nothing was written yet: another policy is welcome
    assert n[0] == 7 - 4

@pytest.mark.parametrize('damage', ['tail', 'short', 'log', 'no log', 'other header'])
def test_what_did_not_reach_the_disk_is_written_again(src, model, tmp_path, monkeypatch, damage):
    with monkeypatch.context() as mk, pytest.raises(Stop):
        stopped_at(mk, 6)
        decompose_checkpoint(src, tmp_path/'s.safetensors', .25, model=Net)
    out = tmp_path/'s.safetensors.partial/out'
    part,log = out/'dense.safetensors.partial',out/'dense.safetensors.log'
    if damage == 'tail': part.write_bytes(part.read_bytes() + b'\0'*100_000)
    if damage == 'short': part.write_bytes(part.read_bytes()[:-1000])
    if damage == 'log': log.write_text(log.read_text() + '99999999999')
    if damage == 'no log': log.unlink()
    if damage == 'other header': part.write_bytes(b'x' + part.read_bytes()[1:])
    decompose_checkpoint(src, tmp_path/'s.safetensors', .25, model=Net)
    same(tensors(tmp_path/'s.safetensors'), FC_Decomposer(.25).decompose(model).state_dict())

def test_other_arguments_do_not_mix(src, model, tmp_path, monkeypatch):
    def stop():
        with monkeypatch.context() as mk, pytest.raises(Stop):
            stopped_at(mk, 3)
            decompose_checkpoint(src, tmp_path/'s.safetensors', .25, model=Net, overwrite=True)
    stop()
    for kw in (dict(policy=.5), dict(exclude='head')):
        with pytest.raises(ValueError, match='unfinished run with another plan.*overwrite=True'):
            decompose_checkpoint(src, tmp_path/'s.safetensors', **{'policy': .25, 'model': Net, **kw})
    save_file(net(1).state_dict(), src)
    with pytest.raises(ValueError, match='unfinished run from another source'): decompose_checkpoint(src, tmp_path/'s.safetensors', .25, model=Net)
    decompose_checkpoint(src, tmp_path/'s.safetensors', .25, model=Net, overwrite=True)
    same(tensors(tmp_path/'s.safetensors'), FC_Decomposer(.25).decompose(net(1)).state_dict())
    os.unlink(tmp_path/'s.safetensors')
    stop()
    decompose_checkpoint(src, tmp_path/'s.safetensors', .5, model=Net, overwrite=True)
    same(tensors(tmp_path/'s.safetensors'), FC_Decomposer(.5).decompose(net(1)).state_dict())

def _slowly(src, dst):
    real = shard_room._mk
    shard_room._mk = lambda *args: time.sleep(.15) or real(*args)
    decompose_checkpoint(src, dst, .25, model=Net)

@pytest.mark.skipif(sys.platform == 'win32', reason='no SIGKILL')
def test_kill_and_go_on(src, model, tmp_path, monkeypatch):
    dst,log = tmp_path/'s.safetensors',tmp_path/'s.safetensors.partial/out/dense.safetensors.log'
    p = mp.get_context('fork').Process(target=_slowly, args=(src, dst))
    p.start()
    end = time.time() + 60
    while not (log.exists() and len(log.read_text().split()) >= 3):
        assert p.is_alive() and time.time() < end
        time.sleep(.01)
    with pytest.raises(ValueError, match='another process is writing'): decompose_checkpoint(src, dst, .25, model=Net)
    p.kill()
    p.join()
    assert p.exitcode == -signal.SIGKILL and not dst.exists()
    n = stopped_at(monkeypatch, 0)
    decompose_checkpoint(src, dst, .25, model=Net)
    assert 0 < n[0] <= 7 - 3
    same(tensors(dst), FC_Decomposer(.25).decompose(model).state_dict())
    assert listing(tmp_path) == ['dense.safetensors', 's.safetensors']

# ------------------------------------------------------------------ errors

def bad_src(tmp_path, what):
    "A checkpoint with something wrong"
    m = net()
    if what == 'nan': m.blocks[1][0].weight.data[3, 5] = torch.nan
    if what == 'shape': m.head = nn.Linear(48, 12)
    if what == 'lacks': del m.head
    if what == 'more': m.more = nn.Linear(2, 2)
    if what == 'prefix': m = nn.ModuleDict(dict(net=m, loss=nn.Linear(2, 2)))     # not all names begin alike
    if what in ('file', 'nan', 'shape', 'lacks', 'more', 'prefix', 'cut', 'garbage', 'empty', 'text'):
        f = tmp_path/'bad.safetensors'
        save_file(m.state_dict(), f)
        raw = f.read_bytes()
        if what == 'cut': f.write_bytes(raw[:-10])
        if what == 'garbage': f.write_bytes(os.urandom(1000))
        if what == 'empty': f.write_bytes(b'')
        if what == 'text': f.write_text('<html>404</html>')
        return f
    d = shards(m, tmp_path/'bad')
    index = d/'model.safetensors.index.json'
    js = json.loads(index.read_text())
    if what == 'lost shard': (d/'model-00002-of-00003.safetensors').unlink()
    if what == 'cut shard': (d/'model-00002-of-00003.safetensors').write_bytes((d/'model-00002-of-00003.safetensors').read_bytes()[:900])
    if what == 'index names more': js['weight_map']['ghost'] = 'model-00001-of-00003.safetensors'
    if what == 'index names less': del js['weight_map']['head.weight']
    if what == 'index elsewhere': js['weight_map']['head.weight'] = '../x.safetensors'
    if what == 'wrong shard': js['weight_map']['head.weight'] = next(f for f in js['weight_map'].values() if f != js['weight_map']['head.weight'])
    index.write_text('{' if what == 'index broken' else json.dumps(js))
    if what in ('no index', 'twice'): index.unlink()
    if what == 'pickle':
        for f in d.iterdir(): f.unlink()
        torch.save(m.state_dict(), d/'pytorch_model.bin')
    return d

BAD = {'nan': "weight of 'blocks.1.0' has 1 NaN or Inf", 'shape': r"'head.weight' has shape \(12, 48\), the model has \(10, 48\)", 'lacks': "lacks 2 of .* tensors of the model: 'head.bias', 'head.weight'",
       'more': "2 tensors that the model lacks: 'more.bias'", 'prefix': "calls it 'net.* pass the class that was saved", 'cut': 'bad.safetensors is not a whole safetensors file',
       'garbage': 'not a whole safetensors', 'empty': 'not a whole safetensors', 'text': 'not a whole safetensors', 'lost shard': 'names model-00002-of-00003.safetensors, which .* lacks',
       'cut shard': 'model-00002-of-00003.safetensors is not a whole', 'index names more': "holds 'ghost', which it does not", 'index names less': "holds 'head.weight', which .* does not name",
       'index elsewhere': 'must name files beside it', 'wrong shard': "says that .* holds 'head.weight'", 'index broken': 'not an index of shards', 'no index': '3 safetensors files and no index',
       'pickle': 'pytorch_model.bin: convert it first'}

@pytest.mark.parametrize('what', BAD)
def test_bad_sources(what, tmp_path):
    src = bad_src(tmp_path, what)
    before = listing(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=BAD[what]): decompose_checkpoint(src, tmp_path/'dst', .25, model=Net)
    assert listing(tmp_path) == before

def test_every_truncation_is_noticed(src, tmp_path):
    decompose_checkpoint(src, tmp_path/'s.safetensors', .25, model=Net)
    raw = (tmp_path/'s.safetensors').read_bytes()
    for n in [*range(0, len(raw), max(1, len(raw)//50)), len(raw)-1]:
        (tmp_path/'cut.safetensors').write_bytes(raw[:n])
        with pytest.raises(ValueError, match='cut.safetensors is not a whole safetensors file'): load_decomposed(Net, tmp_path/'cut.safetensors')

def test_bad_targets(src, model, tmp_path):
    def run(dst, s=src, **kw): return decompose_checkpoint(s, dst, .25, model=Net, **kw)
    folder = shards(model, tmp_path/'folder')
    (tmp_path/'mine').mkdir(); (tmp_path/'mine/thesis.txt').write_text('all I have'); (tmp_path/'file').write_text('x'); (tmp_path/'f.safetensors').mkdir()
    before = listing(tmp_path)
    with pytest.raises(ValueError, match='outside of src'): run(src, overwrite=True)
    with pytest.raises(ValueError, match='outside of src'): run(folder/'small', folder)
    with pytest.raises(ValueError, match='outside of src'): run(tmp_path, folder, overwrite=True)
    with pytest.raises(ValueError, match='leave out .safetensors'): run(tmp_path/'x.safetensors', folder)
    with pytest.raises(FileNotFoundError, match='does not exist'): run(tmp_path/'a/b')
    with pytest.raises(FileExistsError, match='overwrite=True'): run(tmp_path/'mine')
    with pytest.raises(FileExistsError, match='is not a decomposed checkpoint, so it is not replaced'): run(tmp_path/'mine', overwrite=True)
    with pytest.raises(FileExistsError, match='Remove it first'): run(tmp_path/'file', overwrite=True)
    with pytest.raises(FileExistsError, match='Remove it first'): run(tmp_path/'f.safetensors', overwrite=True)
    with pytest.raises(FileNotFoundError, match='no such file or folder'): run(tmp_path/'dst', tmp_path/'nope')
    assert listing(tmp_path) == before

def test_bad_arguments_leave_nothing(src, tmp_path):
    def fails(text, policy=.25, kind=ValueError, **kw):
        with pytest.raises(kind, match=text): decompose_checkpoint(src, tmp_path/'s.safetensors', policy, **kw)
    fails("names such as 'blocks.0.0'")
    fails("no layer matches layers='hed'. Closest: 'head'", layers='hed')
    fails("no layer matches exclude='hed'", model=Net, exclude='hed')
    fails("no layer matches PerLayer='hed'", {'hed': .5}, model=Net)
    fails('rank_ratio must be in', 50., model=Net)
    fails('round_to', model=Net, round_to=0)
    fails('must be a torch.nn.Module or a function', kind=TypeError, model=3)
    fails('must return a torch.nn.Module', kind=TypeError, model=dict)
    assert listing(tmp_path) == ['dense.safetensors']

def test_overwrite_replaces_a_folder(src, model, tmp_path):
    for r in (.25, .5): decompose_checkpoint(shards(model, tmp_path/f'src{r}', n=int(1/r)), tmp_path/'dst', r, model=Net, overwrite=True)
    same(tensors(tmp_path/'dst'), FC_Decomposer(.5).decompose(model).state_dict())
    assert not (tmp_path/'dst.partial').exists()

def test_rank_ratio_is_a_share_as_everywhere(src, model, tmp_path):
    assert decompose_checkpoint(src, tmp_path/'a.safetensors', rank_ratio=.25, model=Net) == decompose_checkpoint(src, tmp_path/'b.safetensors', .25, model=Net)
    assert (tmp_path/'a.safetensors').read_bytes() == (tmp_path/'b.safetensors').read_bytes()
    assert decompose_checkpoint(src, tmp_path/'c.safetensors', model=Net) == decompose_checkpoint(src, tmp_path/'d.safetensors', .5, model=Net)
    for kw,text in (dict(policy=4), 'pass rank_ratio=0.3 or policy=4, not both'), ({}, 'rank_ratio must be in .0, 1., got 30'):
        with pytest.raises(ValueError, match=text): decompose_checkpoint(src, tmp_path/'e.safetensors', model=Net, rank_ratio=.3 if kw else 30, **kw)
    assert not any('.partial' in o.name or o.name[0] == 'e' for o in tmp_path.iterdir())

def test_integers_that_were_cast_are_integers_again(model, tmp_path):
    save_file({k: v.half() for k,v in model.state_dict().items()}, tmp_path/'half.safetensors')
    decompose_checkpoint(tmp_path/'half.safetensors', tmp_path/'s.safetensors', .25, model=Net)
    small = load_decomposed(Net, tmp_path/'s.safetensors')
    assert torch.equal(small.steps, torch.tensor(7)) and small.norm.num_batches_tracked.dtype is torch.int64 and small.norm.running_var.dtype is torch.float16

def test_a_result_is_not_decomposed_again(src, tmp_path):
    decompose_checkpoint(src, tmp_path/'s.safetensors', .25, model=Net)
    with pytest.raises(ValueError, match='decomposed checkpoint already'): decompose_checkpoint(tmp_path/'s.safetensors', tmp_path/'t.safetensors', .25, layers='*')

def test_loading_what_does_not_fit(src, model, tmp_path):
    decompose_checkpoint(src, tmp_path/'s.safetensors', .25, model=Net)
    with pytest.raises(ValueError, match='holds no plan: it was not written by decompose_checkpoint'): load_decomposed(Net, src)
    with pytest.raises(ValueError, match=f"plan.save.'{tmp_path/'plan.json'}'.*or save both with save_compressed"): load_decomposed(Net, src)
    with pytest.raises(TypeError, match='the model comes first: load_decomposed.model, path.. Got type as path'): load_decomposed(src, Net)
    with pytest.raises(ValueError, match='Was the plan made for another model'): load_decomposed(lambda: Net(d=32), tmp_path/'s.safetensors')
    with pytest.raises(ValueError, match='no config.json'): load_decomposed(None, tmp_path/'s.safetensors')
    with pytest.raises(FileNotFoundError, match='no such file'): load_decomposed(Net, tmp_path/'nope')
    with pytest.raises(ValueError, match="'scale' is in no checkpoint.*Pass a function"):
        load_decomposed(Net().to('meta'), tmp_path/'s.safetensors')
    class More(Net):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="lacks 2 of .* tensors of the model: 'more.bias'"): load_decomposed(More, tmp_path/'s.safetensors')
    class Less(Net):
        def __init__(self):
            super().__init__()
            del self.norm
    with pytest.raises(ValueError, match="tensors that the model lacks: 'norm.bias'"): load_decomposed(Less, tmp_path/'s.safetensors')

def test_shards_of_different_runs(model, tmp_path):
    src = shards(model, tmp_path/'src')
    for r in (.25, .5): decompose_checkpoint(src, tmp_path/f'd{r}', r, model=Net)
    shutil.copy(tmp_path/'d0.5/model-00003-of-00003.safetensors', tmp_path/'d0.25')
    with pytest.raises(ValueError, match='come from different runs'): load_decomposed(Net, tmp_path/'d0.25')

def test_ties_that_differ(tmp_path):
    m = hf('llama-tied')
    save_file({k: v.clone() for k,v in m.state_dict().items()}, tmp_path/'a.safetensors')
    decompose_checkpoint(tmp_path/'a.safetensors', tmp_path/'b.safetensors', .25, model=lambda: hf('llama-tied'))
    load_decomposed(lambda: hf('llama-tied'), tmp_path/'b.safetensors')
    sd = load_file(tmp_path/'b.safetensors')
    with safetensors.safe_open(tmp_path/'b.safetensors', 'pt') as f: meta = f.metadata()
    save_file(sd | {'lm_head.weight': sd['lm_head.weight'] + 1}, tmp_path/'b.safetensors', meta)
    with pytest.raises(ValueError, match="'model.embed_tokens.weight' and 'lm_head.weight' are tied in the model, but differ"):
        load_decomposed(lambda: hf('llama-tied'), tmp_path/'b.safetensors')

# ------------------------------------------------------------------ memory

@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    # layers of 10 MiB and a table of 20; two layers, then 20 (220 MiB)
    sd = {f'fc{i}.weight': torch.randn(*((260, 10000) if i % 2 else (10000, 260))) for i in range(20)} | {'table.weight': torch.randn(20000, 260)}
    for n,f in ((2, 'two'), (20, 'all')): save_file({k: v for k,v in sd.items() if k[0] == 't' or int(k[2:-7]) < n}, tmp_path/f'{f}.safetensors')
    code = '''
        import sys, torch
        from torch import nn
        from fasterai.lowrank.checkpoint import decompose_checkpoint, load_decomposed
        def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])/2**10  # ru_maxrss begins with the parent's
        d = sys.argv[1]
        def build(n): return nn.ModuleDict({f'fc{i}': nn.Linear(*((10000, 260) if i % 2 else (260, 10000)), bias=False) for i in range(n)}
                                           | {'table': nn.Embedding(20000, 260)})
        start = peak()
        for f,n in (('two', 2), ('all', 20)):
            before = peak()
            decompose_checkpoint(f'{d}/{f}.safetensors', f'{d}/{f}-small.safetensors', .1, model=lambda: build(n))
        made = peak()
        load_decomposed(lambda: build(20), f'{d}/all-small.safetensors')
        print(made - before, before - start, peak() - made)
    '''
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True,
                         env=os.environ | dict(MALLOC_MMAP_THRESHOLD_='1000000'))
    assert res.returncode == 0, res.stderr
    more,first,loaded = map(float, res.stdout.split()[-3:])
    assert more < 12            # MiB; the files differ by 180
    assert first < 3*20 + 150
    assert loaded < (tmp_path/'all-small.safetensors').stat().st_size/2**20 + 12

# ------------------------------------------------------------------ several processes

def _rank(rank, size, init, fn, args, out):
    "One process of a group; what `fn` returns or the error it ends with"
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{init}', rank=rank, world_size=size, timeout=timedelta(seconds=60))
    try: res = fn(rank, *args)
    except (ValueError, RuntimeError) as e: res = f'{type(e).__name__}: {e}'
    Path(f'{out}.{rank}').write_text(str(res))

def spawn(size, fn, *args, tmp, dead=()):
    "Run `fn(rank, *args)` in `size` processes; none may hang"
    init,out = tmp/f'init{time.time_ns()}',tmp/'res'
    ps = [mp.get_context('fork').Process(target=_rank, args=(r, size, init, fn, args, out)) for r in range(size)]
    for p in ps: p.start()
    end = time.time() + 60
    for p in ps: p.join(max(0, end - time.time()))
    hang = [p for p in ps if p.is_alive()]
    for p in hang: p.kill()
    assert not hang, 'a rank hangs'
    return [Path(f'{out}.{r}').read_text() if r not in dead else None for r in range(size)]

def _decompose(rank, src, dst, policy, breaks=None):
    "As rank `rank`; `breaks` is the layer at which something happens on the rank that has it"
    if breaks:
        name,kind = breaks
        real = shard_room._mk
        def mk(s, row):
            if s.name == name and kind == 'fail': raise RuntimeError('no space')
            if s.name == name and kind == 'die': os.kill(os.getpid(), signal.SIGKILL)
            return real(s, row)
        shard_room._mk = mk
    plan = decompose_checkpoint(src, dst, policy, model=Net)
    return plan.title

def uneven(model, path):
    "One shard with nearly all layers, one with the rest of the weights, six with a tensor or two"
    keys = list(model.state_dict())
    big = [k for k in keys if k.startswith('blocks')]
    rest = [k for k in keys if k not in big]
    return shards(model, path, sizes=[big, rest[6:], *[[k] for k in rest[:6]]])

@pytest.mark.parametrize('size', [2, 4])
@pytest.mark.parametrize('policy', [.25, ParamBudget(.5, round_to=1)], ids=str)
def test_ranks_share_the_shards(model, tmp_path, size, policy):
    for i,src in enumerate([shards(model, tmp_path/'even', n=5), uneven(model, tmp_path/'uneven'), shards(model, tmp_path/'one', n=1)]):
        res = spawn(size, _decompose, src, tmp_path/f'd{i}', policy, tmp=tmp_path)
        want = FC_Decomposer(policy=policy).decompose(model)
        assert len(set(res)) == 1 and 'of 7 layers become pairs' in res[0]
        same(tensors(tmp_path/f'd{i}'), want.state_dict())
        assert not (tmp_path/f'd{i}.partial').exists()

def test_each_rank_works(model, tmp_path):
    src = shards(model, tmp_path/'src', n=6)
    spawn(2, _decompose, src, tmp_path/'dst', Energy(.8), ('head', 'fail'), tmp=tmp_path)
    lines = {f.name: len(f.read_text().split('\n\n')) for f in (tmp_path/'dst.partial').glob('looks.*')}
    assert sum(lines.values()) == 7 and min(lines.values()) >= 2 and len(lines) == 2

@pytest.mark.parametrize('size', [2, 4])
def test_all_ranks_end_when_one_fails(model, tmp_path, size):
    src = uneven(model, tmp_path/'src')
    res = spawn(size, _decompose, src, tmp_path/'dst', .25, ('blocks.2.0', 'fail'), tmp=tmp_path)
    assert all('no space' in r for r in res) and sum('failed' in r for r in res) == size-1 and not (tmp_path/'dst').exists()
    spawn(size, _decompose, src, tmp_path/'dst', .25, tmp=tmp_path)      # and it goes on
    same(tensors(tmp_path/'dst'), FC_Decomposer(.25).decompose(model).state_dict())

def test_bad_weights_end_all_ranks(tmp_path):
    res = spawn(2, _decompose, bad_src(tmp_path, 'nan'), tmp_path/'dst', .25, tmp=tmp_path)
    assert all("'blocks.1.0' has 1 NaN" in r for r in res) and not (tmp_path/'dst.partial').exists()

def test_a_killed_rank_does_not_leave_the_others_waiting(model, tmp_path):
    src = shards(model, tmp_path/'src', n=4)
    owner = [i for i,r in enumerate(spawn(2, _owner, src, tmp_path/'x', tmp=tmp_path)) if r == 'True']
    res = spawn(2, _decompose, src, tmp_path/'dst', .25, ('head', 'die'), tmp=tmp_path, dead=owner)
    assert [r for r in res if r is not None][0].startswith('RuntimeError') and not (tmp_path/'dst').exists()
    decompose_checkpoint(src, tmp_path/'dst', .25, model=Net)
    same(tensors(tmp_path/'dst'), FC_Decomposer(.25).decompose(model).state_dict())

def _owner(rank, src, dst):
    "Does this rank get the shard with the head?"
    seen,real = [],shard_room._mk
    shard_room._mk = lambda s, row: seen.append(s.name) or real(s, row)
    decompose_checkpoint(src, dst, .25, model=Net, overwrite=True)
    return 'head' in seen

# ------------------------------------------------------------------ the command

SCRIPT = 'import sys\nfrom fasterai.cli import main\nsys.exit(main())\n'

@pytest.mark.slow
def test_command_under_torchrun(tmp_path):
    m = hf('llama')
    m.save_pretrained(tmp_path/'src', max_shard_size='30KB')
    (tmp_path/'script.py').write_text(SCRIPT)
    args = ['--checkpoint', tmp_path/'src', '--out', tmp_path/'dst', '--budget', .4, '--exclude', 'lm_head']
    res = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(tmp_path/'script.py'),
                          *map(str, args)], capture_output=True, text=True, timeout=200)
    assert res.returncode == 0, res.stderr
    assert res.stdout.count('layers become pairs') == 1 and 'MB on disk' in res.stdout
    plan = FC_Decomposer(policy=ParamBudget(.4), exclude='lm_head').plan(m)
    assert DecompositionPlan.load(tmp_path/'dst/plan.json') == plan
    same(load_decomposed(None, tmp_path/'dst').state_dict(), plan.apply(m).state_dict())

def _command(rank, size, port, d, args):
    "The command as torchrun starts it: exit code and errors go to a file"
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    sys.argv = ['fasterai_decompose', *map(str, args)]
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try: runpy.run_path(str(d/'script.py'), run_name='__main__')
        except SystemExit as e: (d/f'code.{rank}').write_text(f'{e.code}\n{err.getvalue()}')

@pytest.mark.parametrize('what', ['nan', 'fail', 'exists'])
def test_command_fails_on_every_rank(tmp_path, monkeypatch, what):
    src = bad_src(tmp_path, 'nan') if what == 'nan' else shards(net(), tmp_path/'src')
    real,dst = shard_room._mk,tmp_path/'dst'
    def mk(s, row):
        if s.name == 'head': raise ValueError('no space for head')
        return real(s, row)
    if what == 'fail': monkeypatch.setattr(shard_room, '_mk', mk)
    if what == 'exists': dst.mkdir()
    (tmp_path/'script.py').write_text(SCRIPT)
    with socket.socket() as o:
        o.bind(('127.0.0.1', 0))
        port = o.getsockname()[1]
    args = ['--checkpoint', src, '--layers', 'blocks,head', '--out', dst]
    ps = [mp.get_context('fork').Process(target=_command, args=(r, 2, port, tmp_path, args)) for r in range(2)]
    for p in ps: p.start()
    for p in ps: p.join(60)
    assert not any(p.is_alive() for p in ps)
    text = {'nan': "'blocks.1.0' has 1 NaN", 'fail': 'no space for head', 'exists': 'Pass --force to replace it'}[what]
    for r in range(2):
        code,err = (tmp_path/f'code.{r}').read_text().split('\n', 1)
        assert code == '2' and text in err and err.startswith('fasterai_decompose: ') and err.count('\n') == 1
    assert not any(dst.glob('*'))
