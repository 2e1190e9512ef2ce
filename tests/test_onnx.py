"ONNX files answer as the models and Learners that they were made from"
import ast, importlib.util, json, os, random, subprocess, sys, venv, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from torch import nn

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
from fastai.callback.progress import ProgressCallback
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import ColReader, Normalize, RandomSplitter
from fastai.learner import Learner, load_learner
from fastai.layers import SigmoidRange, ToTensorBase
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.tabular.all import Categorify, FillMissing, TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, BaseTokenizer, TextBlock, awd_lstm_clas_config, text_classifier_learner
from fastai.vision.all import ImageBlock, MaskBlock, PILImage, PILImageBW, PILMask, RandomResizedCrop, Resize, aug_transforms
from fasterai.core.matrices import model_bytes
from fasterai.export import exporters, learner as _, onnx as export_room
from fasterai.export.int8 import quantize_onnx
from fasterai.export.onnx import export_onnx
from fasterai.export.runtime import ONNXModel, load_onnx_learner
from fasterai.export.static import Static, _lost, least_error, mean_shifts
from fasterai.export.verify import session, verify_onnx
from fasterai.quantize.formats import Int
from fasterai.quantize.quantizer import Quantizer

root = Path(__file__).parent.parent
SCRIPT = dict(exporter='torchscript', latency=False)     # the faster exporter

@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'int8 is')     # times on a machine at work
        yield

def conv_net(n=3, channels=3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(channels, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, n))
    for m in net:
        if hasattr(m, 'running_var'): m.running_var.uniform_(.5, 2), m.running_mean.normal_()
    return net

pictures = [np.random.default_rng(i).integers(0, 256, (5, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1) for i in range(12)]

def image_dls(block=CategoryBlock, y=lambda i: ['Käse', 'pain', '寿司'][i % 3], item_tfms=None, kind=PILImage):
    def pixels(i): return pictures[i] if kind is PILImage else pictures[i][:,:,0]
    blocks = ImageBlock(kind),block
    return DataBlock(blocks, get_x=lambda i: kind.create(pixels(i)), get_y=y, splitter=RandomSplitter(seed=0, valid_pct=.5),
        item_tfms=item_tfms or Resize(24), batch_tfms=[*aug_transforms(), Normalize.from_stats([.5]*(3 if kind is PILImage else 1), [.2]*(3 if kind is PILImage else 1))]
        ).dataloaders(range(12), bs=4, num_workers=0, device='cpu')

def table_learner(n=120):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(job=rng.choice(['cook', 'nurse', 'Bäcker'], n), level=rng.choice([1, 2, 3], n), age=np.where(rng.random(n) < .1, np.nan, rng.normal(40, 9, n)),
        hours=rng.normal(30, 5, n), y=rng.choice(['no', 'yes'], n)))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], cat_names=['job', 'level'], cont_names=['age', 'hours'], y_names='y', bs=32,
        y_block=CategoryBlock())
    learn = tabular_learner(dls, layers=[20, 10])
    learn.model.bn_cont.running_mean.normal_()
    return learn,df

def text_learner():
    rng,words = random.Random(0),[f'w{i}' for i in range(60)]
    df = pd.DataFrame(dict(text=[' '.join(rng.choices(words, k=rng.choice([5, 40, 100]))) for _ in range(30)], label=[rng.choice(['neg', 'pos']) for _ in range(30)]))
    dls = DataBlock((TextBlock.from_df('text', tok=BaseTokenizer(), seq_len=20), CategoryBlock), get_x=ColReader('text'), get_y=ColReader('label'),
        splitter=RandomSplitter(seed=0)).dataloaders(df, bs=8, device='cpu')
    return text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=awd_lstm_clas_config | dict(emb_sz=20, n_hid=24), seq_len=20, max_len=60),df

def same_predictions(learn, path, items, tol=1e-5):
    model = load_onnx_learner(path)
    for item in items:
        with learn.no_bar(): want = learn.predict(item)
        got = model.predict(item)
        np.testing.assert_allclose(got[2], np.asarray(want[2]), atol=tol)
        np.testing.assert_allclose(np.asarray(got[1], float), np.asarray(want[1], float), atol=tol)
        yield want,got

# Models

def test_a_model_is_left_as_found(tmp_path):
    model,seen = conv_net().train(),[]
    model[0].eval()
    handle = model[2].register_forward_hook(lambda m,i,o: seen.append(len(o)))
    state,flags = {k: v.clone() for k,v in model.state_dict().items()},[m.training for m in model.modules()]
    r = export_onnx(model, tmp_path/'a.onnx', torch.randn(5, 3, 16, 16), **SCRIPT)
    assert r.error < 1e-5 and [t.what for t in r.trials] == ['traced batch', 'one row more', 'one row', 'batch 0 of data']
    assert flags == [m.training for m in model.modules()] and all(torch.equal(v, state[k]) for k,v in model.state_dict().items())
    assert len(model[2]._forward_hooks) == 1 and seen
    handle.remove()

def test_inputs_have_the_names_of_forward_and_any_form_of_batch(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.lin = nn.Embedding(20, 6),nn.Linear(6, 3)
        def forward(self, input_ids, attention_mask=None):
            h = self.lin(self.emb(input_ids))*attention_mask[...,None]
            return dict(hidden=h, pooled=h.sum(1))
    batch = dict(input_ids=torch.randint(20, (3, 7)), attention_mask=torch.ones(3, 7))
    r = export_onnx(Two(), tmp_path/'a.onnx', batch, **SCRIPT)
    assert [*r.inputs] == ['input_ids', 'attention_mask'] and [*r.outputs] == ['hidden', 'pooled']
    hidden,_ = ONNXModel(tmp_path/'a.onnx')(input_ids=np.ones((1, 11), np.int64), attention_mask=np.ones((1, 11), np.float32))
    assert hidden.shape == (1, 11, 3)

def test_a_state_does_not_pass_from_call_to_call(tmp_path):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin,self.h = nn.Linear(4, 4),None
        def reset(self): self.h = None
        def forward(self, x):
            y = self.lin(x) + (0 if self.h is None else self.h)
            self.h = y.detach().mean(0, keepdim=True)
            return y
    model,x = Counts(),torch.randn(3, 4)
    model(x)
    export_onnx(model, tmp_path/'a.onnx', x, **SCRIPT)
    run = ONNXModel(tmp_path/'a.onnx')
    np.testing.assert_array_equal(run(x.numpy()), run(x.numpy()))
    np.testing.assert_allclose(run(x.numpy()), model.lin(x).detach().numpy(), atol=1e-6)

def test_what_fails_leaves_no_file(tmp_path, monkeypatch):
    model,x = conv_net(),torch.randn(3, 3, 16, 16)
    monkeypatch.setattr(export_room, 'to_graph', lambda *a: (_ for _ in ()).throw(RuntimeError('no graph')))
    with pytest.raises(ValueError, match='dynamo: RuntimeError: no graph | torchscript: RuntimeError: no graph'): export_onnx(model, tmp_path/'a.onnx', x)
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(FileNotFoundError, match='Make it first'): export_onnx(model, tmp_path/'no'/'a.onnx', x)
    (tmp_path/'b.onnx').write_text('mine')
    with pytest.raises(FileExistsError, match='overwrite=True'): export_onnx(model, tmp_path/'b.onnx', x)
    assert (tmp_path/'b.onnx').read_text() == 'mine'

def test_a_file_that_answers_something_else_is_not_written(tmp_path, monkeypatch):
    model,x,graph = conv_net(),torch.randn(3, 3, 16, 16),export_room.to_graph
    def wrong(*a):
        proto,said = graph(*a)
        w = next(t for t in proto.graph.initializer if len(t.dims) == 2)
        values = onnx.numpy_helper.to_array(w).copy()
        values.flat[0] += .5
        w.CopyFrom(onnx.numpy_helper.from_array(values, w.name))
        return proto,said
    monkeypatch.setattr(export_room, 'to_graph', wrong)
    with pytest.raises(ValueError, match=r"'output' differs by .* on traced batch .*rtol 0.001"): export_onnx(model, tmp_path/'a.onnx', x, **SCRIPT)
    assert [*tmp_path.iterdir()] == []

def test_verify_finds_a_changed_weight(tmp_path):
    model,x = conv_net(),torch.randn(3, 3, 16, 16)
    export_onnx(model, tmp_path/'a.onnx', x, **SCRIPT)
    assert verify_onnx(model, tmp_path/'a.onnx', x)
    with torch.no_grad(): model[6].weight[0,0] += .5
    assert not verify_onnx(model, tmp_path/'a.onnx', x)

def test_large_models_have_their_weights_beside_them(tmp_path, monkeypatch):
    monkeypatch.setattr(exporters, '_LARGE', 1000)
    model,x = nn.Linear(64, 64),torch.randn(3, 64)
    r = export_onnx(model, tmp_path/'a.onnx', x, **SCRIPT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.onnx', 'a.onnx.data'] and r.nbytes > 64*64*4
    (tmp_path/'sub').mkdir()
    for p in ('a.onnx', 'a.onnx.data'): os.rename(tmp_path/p, tmp_path/'sub'/p)
    np.testing.assert_allclose(ONNXModel(tmp_path/'sub'/'a.onnx')(x.numpy()), model(x).detach().numpy(), atol=1e-5)

def test_half_precision(tmp_path):
    model,x = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)),torch.randn(4, 128)
    whole,half = export_onnx(model, tmp_path/'a.onnx', x, **SCRIPT),export_onnx(model, tmp_path/'b.onnx', x, half=True, **SCRIPT)
    assert half.nbytes <= .51*whole.nbytes and half.error < 1e-2 and half.inputs == whole.inputs and half.outputs == whole.outputs

def test_opset(tmp_path):
    model,x = conv_net(),torch.randn(3, 3, 16, 16)
    assert export_onnx(model, tmp_path/'a.onnx', x, opset=16, **SCRIPT).opset == 16
    with pytest.raises(ValueError, match='opset must be'): export_onnx(model, tmp_path/'b.onnx', x, opset='17')
    with pytest.raises(ValueError, match='no file was written'): export_onnx(model, tmp_path/'b.onnx', x, opset=999, **SCRIPT)

def test_fixed_shapes_and_named_axes(tmp_path):
    model,x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),torch.randn(2, 3, 16, 16)
    assert export_onnx(model, tmp_path/'a.onnx', x, dynamic=False, **SCRIPT).inputs == dict(input='float32 2×3×16×16')
    r = export_onnx(model, tmp_path/'b.onnx', x, dynamic=dict(input={0: 'batch', 2: 'height', 3: 'width'}), **SCRIPT)
    assert r.inputs == dict(input='float32 batch×3×height×width') and {'another height', 'another width'} <= {t.what for t in r.trials}
    with pytest.raises(ValueError, match="Closest: 'input'"): export_onnx(model, tmp_path/'c.onnx', x, dynamic=dict(inptu=[0]), **SCRIPT)
    with pytest.raises(ValueError, match='leave it out of dynamic'):
        export_onnx(nn.Linear(16, 2), tmp_path/'c.onnx', x, dynamic=dict(input={3: 'width'}), **SCRIPT)

def test_warnings_are_in_the_report(tmp_path):
    class Speaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 2)
        def forward(self, x): return self.lin(x) if float(x.sum()) < 1e9 else x
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        r = export_onnx(Speaks(), tmp_path/'a.onnx', torch.randn(3, 4), **SCRIPT)
    assert any(s.startswith('TracerWarning') for s in r.said) and 'report.said' in repr(r)

def test_wrong_arguments(tmp_path):
    x = torch.randn(2, 4)
    with pytest.raises(TypeError, match='model must be a torch.nn.Module, got function'): export_onnx(lambda x: x, tmp_path/'a.onnx', x)
    with pytest.raises(ValueError, match='exporter must be'): export_onnx(nn.Linear(4, 2), tmp_path/'a.onnx', x, exporter='legacy')
    with pytest.raises(ValueError, match='rtol must be positive'): export_onnx(nn.Linear(4, 2), tmp_path/'a.onnx', x, rtol=0.)
    with pytest.raises(RuntimeError): export_onnx(nn.Linear(5, 2), tmp_path/'a.onnx', x)
    with pytest.raises(ValueError, match='dynamic must be'): export_onnx(nn.Linear(4, 2), tmp_path/'a.onnx', x, dynamic='batch')

def test_without_onnx_one_line_says_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n,*a: None if n == 'onnxscript' else find(n, *a))
    with pytest.raises(ImportError, match=r'ONNX export needs onnxscript: pip install "fasterai\[onnx\]"'): export_onnx(nn.Linear(4, 2), tmp_path/'a.onnx', torch.randn(2, 4))

def test_nothing_of_onnx_is_imported_before_it_is_asked_for():
    for p in (root/'fasterai').rglob('*.py'):
        for o in ast.parse(p.read_text(encoding='utf-8')).body:
            names = [a.name for a in o.names] if isinstance(o, ast.Import) else [o.module or ''] if isinstance(o, ast.ImportFrom) and not o.level else []
            assert not {n.split('.')[0] for n in names} & {'onnx', 'onnxruntime', 'onnxscript'}, p

# Compressed models

def test_a_decomposed_model_keeps_its_pairs(tmp_path):
    from fasterai.misc.fc_decomposer import FC_Decomposer
    model = FC_Decomposer(rank_ratio=.1).decompose(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)))
    r = export_onnx(model, tmp_path/'a.onnx', torch.randn(3, 256), latency=False)
    assert r.exporter == 'dynamo' and r.nodes['Gemm'] == 4 and r.nbytes < 1.05*r.source_bytes + 4096

def test_a_quantized_model_stays_packed(tmp_path):
    from fasterai.quantize.quantizer import Quantizer
    model,x = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)),torch.randn(3, 256)
    small = Quantizer(4).quantize(model)
    r = export_onnx(small, tmp_path/'a.onnx', x, latency=False)
    assert r.nodes['MatMulNBits'] == 2 and r.error < 1e-3 and r.nbytes < .25*4*256*320
    plain = export_onnx(small, tmp_path/'b.onnx', x, **SCRIPT)
    assert 'MatMulNBits' not in plain.nodes and plain.error < 1e-5
    assert any('times as large as the model' in n for n in plain.notes)

def test_eight_bit_inputs_after_the_model_ran(tmp_path):
    from fasterai.quantize.formats import Int
    from fasterai.quantize.quantizer import Quantizer
    x = torch.randn(3, 64)
    model = Quantizer(Int(8, activations='dynamic')).quantize(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)), x)
    with torch.no_grad(): model(x)
    r = export_onnx(model, tmp_path/'a.onnx', x, latency=False)
    assert r.nodes['MatMulNBits'] == 2 and r.error < .05

@pytest.mark.parametrize('f', [4, Int(8, activations='dynamic')], ids=str)
def test_a_quantized_encoder_layer(f, tmp_path):
    "Whose fast path reads the weights of its layers"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e,self.l,self.h = nn.Embedding(50, 32),nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.),nn.Linear(32, 7)
        def forward(self, ids): return self.h(self.l(self.e(ids)).mean(1))
    model,ids = Net().eval(),torch.randint(50, (16, 9))
    r = export_onnx(Quantizer(f).quantize(model, ids), tmp_path/'a.onnx', ids, latency=False)
    assert r.nodes['MatMulNBits'] == 3 and torch.backends.mha.get_fastpath_enabled()

def test_grouped_transposed_convolutions_stay_float(tmp_path):
    m = nn.Sequential(nn.Conv2d(3, 24, 3, 1, 1), nn.ReLU(), nn.ConvTranspose2d(24, 24, 3, 1, 1, groups=4), nn.ReLU(), nn.Conv2d(24, 8, 1)).eval()
    x = torch.randn(16, 3, 16, 16)
    export_onnx(m, tmp_path/'a.onnx', x, latency=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        r = quantize_onnx(tmp_path/'a.onnx', tmp_path/'b.onnx', x)
    assert r.error < .05 and any('2 of 2 nodes' in n for n in r.notes)

@pytest.mark.parametrize('bits', [5, 6, 8])
def test_wide_codes_are_unpacked_when_the_file_is_loaded(bits, tmp_path):
    "The graph that ONNX Runtime runs has plain products only"
    import onnx, onnxruntime as ort
    from fasterai.quantize.quantizer import Quantizer
    model,x = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(256, 256)),torch.randn(3, 3, 6, 6)
    r = export_onnx(Quantizer(bits).quantize(model, x), tmp_path/'a.onnx', x, latency=False)
    assert r.error < 1e-5 and r.nbytes < (bits/8 + .05)*model_bytes(model)/4 + 20480
    opts = ort.SessionOptions()
    opts.optimized_model_filepath,opts.log_severity_level = str(tmp_path/'run.onnx'),3
    ort.InferenceSession(str(tmp_path/'a.onnx'), opts, providers=['CPUExecutionProvider'])
    ops = {n.op_type for n in onnx.load(tmp_path/'run.onnx').graph.node}
    assert not ops & {'BitShift', 'BitwiseAnd', 'Sub', 'Cast', 'MatMulNBits'} and ops & {'Gemm', 'FusedGemm', 'MatMul'}

@pytest.mark.slow
def test_a_readable_pair_becomes_dense_and_the_report_says_so(tmp_path):
    from fasterai.misc.fc_decomposer import FC_Decomposer
    layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True)
    model = FC_Decomposer(rank_ratio=.1).decompose(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    r = export_onnx(model, tmp_path/'a.onnx', torch.randn(3, 9, 256), latency=False)
    assert r and any('the product of a pair was stored' in n for n in r.notes)

# Learners

@pytest.mark.parametrize('item_tfms,kind', [(Resize(24), PILImage), (Resize(24, method='squish'), PILImage), (Resize((24, 32), method='pad'), PILImage),
    (RandomResizedCrop(24), PILImageBW)], ids=['crop', 'squish', 'pad', 'grey'])
def test_images(tmp_path, item_tfms, kind):
    learn = Learner(image_dls(item_tfms=item_tfms, kind=kind), conv_net(channels=3 if kind is PILImage else 1), loss_func=CrossEntropyLossFlat())
    r = learn.export_onnx(tmp_path/'a.onnx', **SCRIPT)
    items = [kind.create(p if kind is PILImage else p[:,:,0]) for p in pictures[:4]]
    for want,got in same_predictions(learn, tmp_path/'a.onnx', items): assert want[0] == got[0]
    assert '4 items predicted as by learn.predict' in r.notes and json.loads(r.metadata['fasterai'])['vocab'] == sorted(['Käse', 'pain', '寿司'])

def test_items_of_a_service(tmp_path):
    "Paths, bytes, Pillow images and arrays"
    from PIL import Image
    learn = Learner(image_dls(), conv_net(), loss_func=CrossEntropyLossFlat())
    learn.export_onnx(tmp_path/'a.onnx', **SCRIPT)
    Image.fromarray(pictures[0]).save(tmp_path/'a.png')
    model = load_onnx_learner(tmp_path/'a.onnx')
    forms = str(tmp_path/'a.png'),tmp_path/'a.png',(tmp_path/'a.png').read_bytes(),Image.open(tmp_path/'a.png'),pictures[0]
    for f in forms: np.testing.assert_array_equal(model.predict(f)[2], model.predict(pictures[0])[2])
    raw = model(np.zeros((2, 24, 24, 3), np.uint8))
    assert [o.shape for o in raw] == [(2, 3), (2,)]
    with pytest.raises(ValueError, match="'image' must be uint8 batch×24×24×3, got float32 2×24×24×3"): model(np.full((2, 24, 24, 3), .5, np.float32))
    with pytest.raises(TypeError, match="takes the inputs image: 'image' is missing"): model()
    with pytest.raises(TypeError, match="'x' is not one of them"): model(pictures[0], x=1)

def test_many_labels_values_and_raw_outputs(tmp_path):
    learn = Learner(image_dls(MultiCategoryBlock, lambda i: ['a', 'b', 'c'][:1 + i % 3]), conv_net(), loss_func=BCEWithLogitsLossFlat(thresh=.45))
    learn.export_onnx(tmp_path/'a.onnx', **SCRIPT)
    for want,got in same_predictions(learn, tmp_path/'a.onnx', map(PILImage.create, pictures[:3])): assert [*want[0]] == got[0]
    learn = Learner(image_dls(RegressionBlock(n_out=2), lambda i: [float(i), 1.]), nn.Sequential(conv_net(2), SigmoidRange(0, 12)), loss_func=MSELossFlat())
    learn.export_onnx(tmp_path/'b.onnx', **SCRIPT)
    for want,got in same_predictions(learn, tmp_path/'b.onnx', map(PILImage.create, pictures[:3])): assert got[0].shape == (2,)
    r = learn.export_onnx(tmp_path/'c.onnx', decode=False, normalize=False, **SCRIPT)
    assert r.inputs == dict(input='float32 batch×3×24×24') and [*r.outputs] == ['output']
    with pytest.raises(ValueError, match='not made by learn.export_onnx'): load_onnx_learner(tmp_path/'c.onnx')

def test_a_transform_that_the_file_does_not_do_is_found_out(tmp_path):
    from fasttransform import Transform
    from fastai.torch_core import TensorImage
    class Dark(Transform):
        order = 98
        def encodes(self, x:TensorImage): return x*.5
    learn = Learner(image_dls(), conv_net(), loss_func=CrossEntropyLossFlat())
    learn.dls.valid.after_batch.add(Dark())
    with pytest.raises(ValueError, match='something else than learn.predict.*normalize=False'): learn.export_onnx(tmp_path/'a.onnx', **SCRIPT)
    assert [*tmp_path.iterdir()] == []

def test_tables(tmp_path):
    learn,df = table_learner()
    r = learn.export_onnx(tmp_path/'a.onnx', **SCRIPT)
    assert [*r.inputs] == ['x_cat', 'x_cont'] and 'BatchNormalization' not in r.nodes and r.inputs['x_cat'].startswith('int64 batch')
    rows = [df.iloc[i] for i in range(3)] + [df.iloc[0].copy()]
    rows[3]['age'],rows[3]['job'] = np.nan,'pilot'
    for want,got in same_predictions(learn, tmp_path/'a.onnx', rows): assert got[0] == learn.dls.vocab[int(want[1])]
    model = load_onnx_learner(tmp_path/'a.onnx')
    assert model.predict(dict(df.iloc[0]))[0] == model.predict(df.iloc[0])[0]
    with pytest.raises(ValueError, match="'hours' is missing"): model.predict(dict(job='cook', level=1, age=30., hours=None))
    with pytest.raises(ValueError, match="no column 'level'"): model.predict(dict(job='cook', age=30., hours=1.))

def test_a_learner_without_items(tmp_path):
    learn,df = table_learner()
    learn.export(tmp_path/'learn.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        empty = load_learner(tmp_path/'learn.pkl')
    empty.export_onnx(tmp_path/'a.onnx', **SCRIPT)
    for want,got in same_predictions(learn, tmp_path/'a.onnx', [df.iloc[5]]): assert got[0] == learn.dls.vocab[int(want[1])]

def test_texts_alone_and_padded(tmp_path):
    learn,df = text_learner()
    r = learn.export_onnx(tmp_path/'a.onnx', latency=False)
    assert r.exporter == 'torchscript' and r.inputs == dict(ids='int64 batch×length') and any('recurrent' in n for n in r.notes)
    model,ids = load_onnx_learner(tmp_path/'a.onnx'),[]
    for text in df.text[:4]:
        with learn.no_bar(): want = learn.predict(text)
        ids.append(learn.dls.test_dl([text]).one_batch()[0][0].tolist())
        got = model.predict(ids[-1])
        assert got[0] == want[0]
        np.testing.assert_allclose(got[2], want[2], atol=1e-5)
        np.testing.assert_allclose(model.predict([learn.dls.vocab[0][i] for i in ids[-1]])[2], want[2], atol=1e-5)
    n = max(map(len, ids))
    for padded in ([i + [1]*(n - len(i)) for i in ids], [[1]*(n - len(i)) + i for i in ids]):
        probs = model(np.array(padded))[0]
        np.testing.assert_allclose(probs, np.stack([model.predict(i)[2] for i in ids]), atol=1e-5)

def test_a_text_classifier_without_a_learner(tmp_path):
    model = text_learner()[0].model
    r = export_onnx(model, tmp_path/'a.onnx', torch.randint(2, 40, (4, 33)), latency=False)
    assert r.exporter == 'torchscript' and r.error < 1e-5 and [*r.inputs] == ['ids'] and 'another length' in [t.what for t in r.trials]

BLOCK = '''
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'torch', 'fastai', 'fastcore', 'pandas', 'torchvision', 'onnx'}: raise ImportError(f'{name} is not there')
sys.meta_path.insert(0, Absent())
'''
SERVICE = '''
import numpy as np
from fasterai.export.runtime import load_onnx_learner
model = load_onnx_learner('a.onnx')
label,index,probs = model.predict(np.load('picture.npy'))
print(ascii(label), index, *(f'{p:.6f}' for p in probs))
'''

def served(tmp_path, code, python):
    learn = Learner(image_dls(), conv_net(), loss_func=CrossEntropyLossFlat())
    learn.export_onnx(tmp_path/'a.onnx', **SCRIPT)
    np.save(tmp_path/'picture.npy', pictures[0])
    with learn.no_bar(): want = learn.predict(PILImage.create(pictures[0]))
    out = subprocess.run([python, '-c', code], cwd=tmp_path, env=dict(PYTHONPATH=str(root), PATH=os.environ['PATH']), capture_output=True, text=True, check=True).stdout.split()
    assert out[:2] == [ascii(want[0]), str(int(want[1]))]
    np.testing.assert_allclose([float(o) for o in out[2:]], want[2], atol=1e-5)

def test_a_service_imports_neither_torch_nor_fastai(tmp_path): served(tmp_path, BLOCK + SERVICE, sys.executable)

@pytest.mark.slow
def test_a_service_in_an_environment_without_torch(tmp_path):
    venv.create(tmp_path/'env', with_pip=True)
    python = str(tmp_path/'env'/'bin'/'python')
    subprocess.run([python, '-m', 'pip', 'install', '-q', 'numpy', 'onnxruntime', 'pillow'], check=True)
    code = 'import importlib.util as u; assert not u.find_spec("torch") and not u.find_spec("fastai")\n' + SERVICE
    served(tmp_path, code, python)

def test_a_provider_that_is_not_there_is_an_error(tmp_path):
    export_onnx(nn.Linear(4, 2), tmp_path/'a.onnx', torch.randn(2, 4), **SCRIPT)
    with pytest.raises(ValueError, match='has no NoSuchExecutionProvider. It has .*CPUExecutionProvider'): ONNXModel(tmp_path/'a.onnx', providers=['NoSuchExecutionProvider'])

# int8

def test_int8_of_a_learner_keeps_rows_open_and_metadata(tmp_path):
    learn = Learner(image_dls(), conv_net(), loss_func=CrossEntropyLossFlat())
    learn.export_onnx(tmp_path/'a.onnx', **SCRIPT)
    r = learn.quantize_onnx(tmp_path/'a.onnx', tmp_path/'b.onnx')
    assert {'one row', 'one row more'} <= {t.what for t in r.trials} and r.exporter == 'static int8'
    assert load_onnx_learner(tmp_path/'b.onnx').vocab == load_onnx_learner(tmp_path/'a.onnx').vocab
    probs = [load_onnx_learner(tmp_path/f).predict(pictures[0])[2] for f in ('a.onnx', 'b.onnx')]
    np.testing.assert_allclose(*probs, atol=.05)

def test_dynamic_int8_touches_products_only(tmp_path):
    model,x = conv_net(),torch.randn(6, 3, 16, 16)
    export_onnx(model, tmp_path/'a.onnx', x, **SCRIPT)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')     # a small file becomes larger
        r = quantize_onnx(tmp_path/'a.onnx', tmp_path/'b.onnx', x, how='dynamic')
    assert r.nodes['Conv'] == 1 and 'ConvInteger' not in r.nodes and r.nodes['MatMulInteger'] == 1 and r.agreement > .6

def test_worse_and_larger_is_said(tmp_path):
    model,x = nn.Linear(4, 2),torch.randn(2, 4)
    export_onnx(model, tmp_path/'a.onnx', x, **SCRIPT)
    with pytest.warns(UserWarning, match='is larger than the float32 file'): quantize_onnx(tmp_path/'a.onnx', tmp_path/'b.onnx', x)

def test_sensitive_layers_stay_float(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8*12*12, 50))
    with torch.no_grad(): model[2].weight[:4] *= 3000.   # one range for channels of very different size
    x = torch.randn(24, 3, 16, 16)
    export_onnx(model, tmp_path/'a.onnx', x, **SCRIPT)
    loose = quantize_onnx(tmp_path/'a.onnx', tmp_path/'b.onnx', [x[:12], x[12:]], min_agreement=1e-6)
    tight = quantize_onnx(tmp_path/'a.onnx', tmp_path/'c.onnx', [x[:12], x[12:]], min_agreement=1.)
    assert tight.agreement >= loose.agreement and (loose.agreement == 1. or 'stay float' in tight.notes[0])

def test_the_command(tmp_path, capsys):
    from fasterai.export.cli import main
    learn,df = table_learner()
    learn.export(tmp_path/'learn.pkl')
    out = str(tmp_path/'a.onnx')
    assert main([str(tmp_path/'learn.pkl'), '--out', out]) == 2 and '--allow-pickle' in capsys.readouterr().err
    assert main([str(tmp_path/'no.pkl')]) == 2 and 'no such file' in capsys.readouterr().err
    assert main([str(tmp_path/'learn.pkl'), '--out', out, '--allow-pickle', '--exporter', 'torchscript']) == 0
    assert 'x_cat int64' in capsys.readouterr().out
    for want,got in same_predictions(learn, out, [df.iloc[0]]): pass
    assert main([str(tmp_path/'learn.pkl'), '--out', out, '--allow-pickle']) == 2 and '--force' in capsys.readouterr().err

# Networks of other libraries

class Positions(nn.Module):
    "Runs at any length; what NumPy computes becomes a constant of the file"
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(30, 8)
    def forward(self, ids): return self.emb(ids) + torch.from_numpy(np.arange(ids.shape[1])).float()[:,None]

def test_a_length_that_does_not_hold_is_refused(tmp_path):
    ids = torch.randint(30, (4, 7))
    with pytest.raises(ValueError, match='no file was written.*another length'): export_onnx(Positions(), tmp_path/'a.onnx', ids, **SCRIPT)
    assert [*tmp_path.iterdir()] == []
    assert export_onnx(Positions(), tmp_path/'a.onnx', ids, dynamic=dict(ids=[0]), **SCRIPT)

@pytest.mark.slow
def test_resnet_through_static_int8(tmp_path):
    from torchvision.models import resnet18
    torch.manual_seed(0)
    x = torch.randn(8, 3, 64, 64)
    r = export_onnx(resnet18(), tmp_path/'a.onnx', x, latency=False)
    assert r.error < 1e-5 and r.nbytes <= 1.05*r.source_bytes and 'BatchNormalization' not in r.nodes
    small = quantize_onnx(tmp_path/'a.onnx', tmp_path/'b.onnx', x)
    assert small.nbytes <= .27*r.nbytes and small.error < .1

@pytest.mark.slow
def test_vgg_decomposed(tmp_path):
    from torchvision.models import vgg16
    from fasterai.misc.fc_decomposer import FC_Decomposer
    model = FC_Decomposer(rank_ratio=.1).decompose(vgg16())
    r = export_onnx(model, tmp_path/'a.onnx', torch.randn(2, 3, 64, 64), latency=False)
    assert r.exporter == 'dynamo' and r.nodes['Gemm'] == 6 and r.error < 1e-5 and r.nbytes <= 1.05*r.source_bytes

@pytest.mark.slow
def test_unet_masks(tmp_path):
    from fastai.vision.all import resnet18, unet_learner
    dls = image_dls(MaskBlock(codes=['back', 'fore']), lambda i: PILMask.create((pictures[i][...,0] > 128).astype(np.uint8)))
    learn = unet_learner(dls, resnet18, pretrained=False, n_out=2)
    r = learn.export_onnx(tmp_path/'a.onnx', latency=False)
    assert r.exporter == 'dynamo' and r.error < 1e-5 and any(isinstance(m, ToTensorBase) for m in learn.model.modules())
    for want,got in same_predictions(learn, tmp_path/'a.onnx', [PILImage.create(pictures[0])]): assert np.array_equal(want[0], got[0])

@pytest.mark.slow
def test_transformers(tmp_path):
    timm,hf = pytest.importorskip('timm'),pytest.importorskip('transformers')
    torch.manual_seed(0)
    vit = timm.create_model('vit_tiny_patch16_224', img_size=64)
    r = export_onnx(vit, tmp_path/'vit.onnx', torch.randn(4, 3, 64, 64), latency=False)
    small = quantize_onnx(tmp_path/'vit.onnx', tmp_path/'vit8.onnx', torch.randn(4, 3, 64, 64))
    assert r.error < 1e-5 and small.exporter == 'dynamic int8' and max(t.error for t in small.trials) < .08
    bert = hf.BertModel(hf.BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=100))
    batch = dict(input_ids=torch.randint(100, (3, 12)), attention_mask=torch.ones(3, 12, dtype=torch.long))
    r = export_onnx(bert, tmp_path/'bert.onnx', batch, latency=False)
    assert {*r.inputs} == {*batch} and r.error < 1e-5 and 'another length' in [t.what for t in r.trials]
    assert [*r.outputs] == ['last_hidden_state', 'pooler_output']

@pytest.mark.parametrize('bits', [3, 4, 8])
def test_packed_tables_stay_packed(bits, tmp_path):
    "Codes of words are unpacked in the file, a row at a time"
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table,self.head = nn.Embedding(4000, 64),nn.Linear(64, 8)
        def forward(self, ids): return self.head(self.table(ids).mean(1))
    torch.manual_seed(0)
    m,x = Words().eval(),torch.randint(0, 4000, (8, 12))
    q = Quantizer(Int(bits, group=32 if bits < 8 else None), embeddings=True).quantize(m, [x])
    res = export_onnx(q, tmp_path/'m.onnx', [x], latency=False)
    assert res and res.exporter == 'dynamo' and res.nbytes < (bits + 3)*4000*64/8

@pytest.mark.parametrize('opts, share', [(dict(embeddings=True), .30), (dict(embeddings=4), .19), (dict(embeddings=4, rows=False), .19)])
def test_tables_of_a_file(opts, share, tmp_path):
    "A word has the row that rounding to nearest gives it, and the rows stay open"
    torch.manual_seed(0)
    m,ids = nn.Sequential(nn.Embedding(3000, 64), nn.Linear(64, 8)).eval(),torch.randint(3000, (4, 12))
    export_onnx(m, tmp_path/'a.onnx', [ids], latency=False)
    res = quantize_onnx(tmp_path/'a.onnx', tmp_path/'b.onnx', [ids], **opts)
    assert res.nbytes < share*(tmp_path/'a.onnx').stat().st_size
    if opts['embeddings'] == 4:
        W = m[0].weight.detach().double().view(3000, 2, 32)
        lo,hi = W.amin(2, True).clamp(max=0),W.amax(2, True).clamp(min=0)
        s = (hi - lo)/15
        near = (((W/s).round() + (-lo/s).round()).clamp(0, 15) - (-lo/s).round())*s
        want = near.view(3000, 64)[ids]@m[1].weight.detach().double().T + m[1].bias.detach().double()
    else: want = m(ids).detach().double()
    got = torch.tensor(ONNXModel(tmp_path/'b.onnx')(ids.numpy())).double()
    assert (got - want).norm() < .02*want.norm()
    assert ONNXModel(tmp_path/'b.onnx')(ids[:1].numpy()).shape == (1, 12, 8)
    with pytest.raises(ValueError, match='embeddings must be'): quantize_onnx(tmp_path/'a.onnx', tmp_path/'c.onnx', embeddings=2)

def test_a_norm_keeps_its_own_operator(tmp_path):
    "A sum and the norm behind it are not joined, since that is slow; what is written is right"
    import onnx
    m,x = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval(),torch.randn(2, 5, 32)
    res = export_onnx(m, tmp_path/'m.onnx', [x], latency=False)
    proto = onnx.load(str(res.path))
    made = {o: n.op_type for n in proto.graph.node for o in n.output}
    norms = [n for n in proto.graph.node if n.op_type == 'LayerNormalization']
    assert len(norms) == 2 and all(made[n.input[0]] == 'Sum' for n in norms) and res.error < 1e-5

def test_several_items_in_one_run(tmp_path):
    learn = Learner(image_dls(), conv_net(), loss_func=CrossEntropyLossFlat())
    learn.export_onnx(tmp_path/'a.onnx', **SCRIPT)
    model = load_onnx_learner(tmp_path/'a.onnx')
    for one,many in zip(map(model.predict, pictures[:3]), model.predict_batch(pictures[:3])):
        assert one[:2] == many[:2]
        np.testing.assert_allclose(one[2], many[2], atol=1e-6)
    assert model.predict_batch([]) == []
    learn,_ = text_learner()
    learn.export_onnx(tmp_path/'t.onnx', **SCRIPT)
    model,texts = load_onnx_learner(tmp_path/'t.onnx'),[['w1', 'w2', 'w3'], ['w4']*30, ['w5', 'w6']]
    for one,many in zip(map(model.predict, texts), model.predict_batch(texts)): np.testing.assert_allclose(one[2], many[2], atol=1e-6)
    for bad in ([0, 10**6], [.5], [[2, 3], [4]]):
        with pytest.raises((ValueError, TypeError), match='ids must be from 0|list of tokens|predict_batch'): model.predict(bad)

def test_items_of_the_wrong_kind_are_named(tmp_path):
    learn = Learner(image_dls(), conv_net(), loss_func=CrossEntropyLossFlat())
    learn.export_onnx(tmp_path/'a.onnx', **SCRIPT)
    model,p = load_onnx_learner(tmp_path/'a.onnx'),pictures[0]
    for item,kind,text in ((torch.zeros(24, 24, 3), TypeError, 'path, the bytes.*NumPy array.*got Tensor'), (p/255., ValueError, r'float64 from 0.*round\(\)'),
        (p.astype(int), ValueError, "got int64 from .*astype"), (p.transpose(2, 0, 1), ValueError, 'height, width, channels.*transpose'),
        ([p, p], TypeError, 'list of 2: use predict_batch'), (p[None], ValueError, 'predict_batch'), (p[:0], ValueError, '0×48×3'), (3, TypeError, 'got int'),
        ('no.jpg', FileNotFoundError, 'no such file: no.jpg'), (tmp_path/'a.onnx', ValueError, 'no image that Pillow can read')):
        with pytest.raises(kind, match=text): model.predict(item)
    with pytest.raises(TypeError, match='takes a list of items, got str'): model.predict_batch('a.jpg')
    with pytest.raises(TypeError, match="'image' must be a NumPy array, got Tensor"): model(torch.zeros(1, 24, 24, 3, requires_grad=True))
    (tmp_path/'b.onnx').write_text('no')
    with pytest.raises(ValueError, match='b.onnx is no ONNX file'): ONNXModel(tmp_path/'b.onnx')
    with pytest.raises(FileNotFoundError, match='no such file'): verify_onnx(nn.Linear(2, 2), tmp_path/'c.onnx', torch.zeros(2, 2))

def test_rows_of_the_wrong_kind_are_named(tmp_path):
    learn,df = table_learner()
    learn.export_onnx(tmp_path/'a.onnx', **SCRIPT)
    model,row = load_onnx_learner(tmp_path/'a.onnx'),dict(df.iloc[0])
    assert [o[0] for o in model.predict_batch([row, df.iloc[1]])] == [model.predict(df.iloc[i])[0] for i in (0, 1)]
    for item,kind,text in (([*row.values()], TypeError, "by name.*'job', 'level', 'age', 'hours'"), (df, TypeError, 'one row, got a DataFrame'),
        ([row, row], TypeError, 'list of 2: use predict_batch'), ({k: v for k,v in row.items() if k != 'hours'}, ValueError, "no column 'hours'"),
        (row | dict(hours='many'), ValueError, "'hours' must be a number, got 'many'")):
        with pytest.raises(kind, match=text): model.predict(item)

def test_a_resize_of_batches_is_named(tmp_path):
    from fastai.vision.augment import RandomResizedCropGPU
    learn = Learner(image_dls(item_tfms=Resize(32)), conv_net(), loss_func=CrossEntropyLossFlat())
    learn.dls.valid.after_batch.add(RandomResizedCropGPU(24))
    with pytest.raises(ValueError, match='RandomResizedCropGPU in batch_tfms resizes images in validation from 32×32 to 24×24.*item_tfms'):
        learn.export_onnx(tmp_path/'a.onnx', **SCRIPT)
    assert not any(tmp_path.iterdir())

def test_only_float_files_are_quantized(tmp_path):
    x = torch.randn(8, 3, 16, 16)
    export_onnx(conv_net(), tmp_path/'a.onnx', x, **SCRIPT)
    export_onnx(conv_net(), tmp_path/'half.onnx', x, half=True, **SCRIPT)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quantize_onnx(tmp_path/'a.onnx', tmp_path/'b.onnx', x)
    with pytest.raises(ValueError, match='b.onnx is in 8 bits already .it has DequantizeLinear'): quantize_onnx(tmp_path/'b.onnx', tmp_path/'c.onnx', x)
    with pytest.raises(ValueError, match='half.onnx holds weights in 16 bits.*half=True'): quantize_onnx(tmp_path/'half.onnx', tmp_path/'c.onnx', x)
    assert not (tmp_path/'c.onnx').exists()

def test_means_of_depthwise_layers_are_kept(tmp_path):
    "Inputs far from zero: rounding nine weights shifts the mean of a channel, which the bias takes back"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4*14*14, 5)).eval()
    x = 5 + .1*torch.randn(32, 8, 16, 16)
    with torch.no_grad(): net[0].weight[:] = 4*torch.randn_like(net[0].weight); net[0].bias[:] = 20 - 5*net[0].weight.sum((1, 2, 3))
    export_onnx(net, tmp_path/'a.onnx', x, **SCRIPT)
    static = Static(tmp_path/'a.onnx', tmp_path, [dict(input=x.numpy())])
    static.write(tmp_path/'b.onnx')
    lost = _lost(static.proto, tmp_path/'b.onnx', static.nodes)
    shifts = mean_shifts(static.proto, lost, static.feeds, tmp_path)
    for (n,d),i in zip(shifts.items(), (0, 2, 4)):
        layer,seen = net[i],net[:i](x).detach().double()
        W = torch.from_numpy(lost[n]).double() if lost[n].shape == tuple(layer.weight.shape) else torch.from_numpy(lost[n].T.copy()).double()
        f = torch.nn.functional.linear if i == 4 else lambda v,w: torch.nn.functional.conv2d(v, w, groups=layer.groups)
        y = f(seen, W)
        np.testing.assert_allclose(d, y.mean([k for k in range(y.ndim) if k != 1]).numpy(), atol=1e-4)
    def error(path):
        y = static_run(path, x)
        return float(np.square(y - net(x).detach().numpy()).mean())
    plain = error(tmp_path/'b.onnx')
    static.shifts = shifts
    static.write(tmp_path/'c.onnx')
    assert error(tmp_path/'c.onnx') < plain

def static_run(path, x): return session(path).run(None, dict(input=x.numpy()))[0]

def test_the_range_with_the_least_error():
    "Against all ranges of a grid, on the values themselves"
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 1, 5000), [40., -3.]])
    h,_ = np.histogram(x, 2048, (x.min(), x.max()))
    def error(lo, hi):
        s = (hi - lo)/255
        z = np.round(-lo/s)
        return np.square((np.clip(np.round(x/s) + z, 0, 255) - z)*s - x).sum()
    lo,hi = least_error(h, float(x.min()), float(x.max()))
    assert error(lo, hi) < error(x.min(), x.max()) and lo <= 0 <= hi
    assert error(lo, hi) <= 1.02*min(error(x.min()*a, x.max()*b) for a in np.linspace(1, .3, 15) for b in np.linspace(1, .3, 15))
    assert least_error(np.ones(2048), 0., 6.) == (0., 6.)

def test_what_a_file_of_a_learner_cannot_do(tmp_path):
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    xs,ys = torch.randn(16, 4),torch.arange(16) % 2
    dls = DataLoaders.from_dsets([*zip(xs, ys)], [*zip(xs, ys)], bs=8, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Linear(4, 2), loss_func=CrossEntropyLossFlat())
    class Now(Callback):
        def after_epoch(self): self.learn.export_onnx(tmp_path/'m.onnx')
    with pytest.raises(RuntimeError, match='call it afterwards'), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Now())
    with pytest.raises(ValueError, match='one item at a time'): learn.export_onnx(tmp_path/'m.onnx', dynamic=False)
    assert not any(tmp_path.iterdir())

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_workers_of_a_loader_leave_sessions_alone(tmp_path):
    "A session that only the garbage collector can find, and a forked process that collects: it used to crash or to wait for ever"
    code = """
import gc, multiprocessing as mp, sys, torch
from fasterai.export.onnx import export_onnx
from fasterai.export.verify import session
export_onnx(torch.nn.Linear(64, 64), sys.argv[1], torch.randn(4, 64), exporter='torchscript', latency=False)
gc.disable()
class Held: pass
o = Held()
o.session,o.me = session(sys.argv[1], threads=4),o
o.session.run(None, {o.session.get_inputs()[0].name: torch.randn(4, 64).numpy()})
del o
p = mp.get_context('fork').Process(target=gc.collect)
p.start(), p.join(60)
code = p.exitcode
p.kill()
sys.exit(0 if code == 0 else 3)
"""
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(tmp_path/'a.onnx')], capture_output=True, timeout=120).returncode == 0
