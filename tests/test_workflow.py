"The chain of methods: what it promises, on networks of several kinds"
import copy, itertools, subprocess, sys
from functools import partial
import pandas as pd, pytest, torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from torch import nn
from fasterai.all import *
from fasterai.prune.search import prune_find
from fasterai.lowrank.search import rank_find
from fasterai.quantize.search import bit_find
from fasterai.workflow.cli import main
from fasterai.workflow.steps import STEPS
from fasterai.workflow.target import TorchTarget

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')
onnx = pytest.importorskip('onnxruntime')

# ------------------------------------------------------------------ helpers

def patches(n=192, seed=0):
    g = torch.Generator().manual_seed(seed)
    xs,ys = torch.randn(n, 3, 8, 8, generator=g),torch.arange(n) % 3
    for x,y in zip(xs, ys): x[y] += 1.
    return xs,ys

def cnn():
    return nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 3))

@pytest.fixture(scope='module')
def trained():
    torch.manual_seed(0)
    m,(x,y) = cnn(),patches()
    opt = torch.optim.Adam(m.parameters(), 1e-2)
    for _ in range(25):
        opt.zero_grad()
        nn.functional.cross_entropy(m(x), y).backward()
        opt.step()
    return m.eval()

def acc(m, data=patches(96, 1)):
    with torch.no_grad(): return (m(data[0]).argmax(1) == data[1]).float().mean().item()

def learner(m, **kw):
    items = [*zip(*patches())]
    dls = DataLoaders.from_dsets(items, [*zip(*patches(96, 1))], bs=32, num_workers=0, device='cpu')
    return Learner(dls, copy.deepcopy(m), loss_func=nn.CrossEntropyLoss(), metrics=accuracy, **kw)

X = patches()[0]
run = partial(compress, evaluate=acc, data=[X], metric='accuracy', goal='bytes')

@pytest.fixture(scope='module')
def report(trained): return run(trained, max_drop=.02)

# ------------------------------------------------------------------ the chain

def test_the_model_is_left_as_found(trained):
    state,mode = copy.deepcopy(trained.state_dict()),[m.training for m in trained.modules()]
    run(trained, max_drop=.02, steps=['fold', 'decompose'])
    assert all(torch.equal(v, state[k]) for k,v in trained.state_dict().items()) and mode == [m.training for m in trained.modules()]

def test_what_is_reported_is_what_is_there(trained, report):
    res = report
    assert acc(res.model) == res.last.metric >= acc(trained) - .02
    stored = sum(t.nbytes for t in res.model.state_dict().values())/1e6
    assert res.last.mb == pytest.approx(stored, rel=.01)

def test_a_drop_of_nothing_keeps_the_metric(trained):
    assert run(trained, max_drop=0., steps=['decompose', 'quantize']).last.metric >= acc(trained)

def test_a_loss_is_better_where_it_is_lower(trained):
    x,y = patches(96, 1)
    def loss(m):
        with torch.no_grad(): return nn.functional.cross_entropy(m(x), y).item()
    res = compress(trained, loss, [X], max_drop=.05, higher_is_better=False, metric='loss', goal='bytes', steps='quantize')
    assert loss(res.model) == pytest.approx(res.last.metric) and res.last.metric <= loss(trained) + .05

@pytest.mark.slow
def test_steps_share_the_drop(trained):
    "A step alone may use all of it; of several, the first may not"
    res = run(trained, max_drop=.3, steps=['prune', 'quantize'])
    first = res.frame[res.frame.step == 'prune'].iloc[0]
    assert first.metric >= acc(trained) - .15 and res.last.metric >= acc(trained) - .3

def test_a_step_that_makes_it_slower_is_left_out(trained, monkeypatch):
    "On a machine on which each candidate takes longer than the one before"
    monkeypatch.setattr(TorchTarget, 'times', lambda self, cs, n, seconds=0.: [1. + .1*i for i in range(len(cs))])
    res = run(trained, max_drop=.02, goal='latency', steps=['fold', 'quantize'])
    assert list(res.frame.kept) == [True, True, False] and 'does not help here, 1 → 1.1 ms' in res.frame.why.iloc[-1]
    assert [type(p).__name__ for p in res.plans] == ['FoldPlan'] and acc(res.model) == acc(trained)

def test_where_the_time_is_the_same_bytes_decide(trained, monkeypatch):
    monkeypatch.setattr(TorchTarget, 'times', lambda self, cs, n, seconds=0.: [1.]*len(cs))
    res = run(trained, max_drop=.02, goal='latency', steps=['quantize'])
    assert list(res.frame.kept) == [True, True] and '1 → 1 ms' in res.frame.why.iloc[-1] and 'MB' in res.frame.why.iloc[-1]
    assert res.last.mb < .9*res.first.mb

def test_what_cannot_be_done_is_a_row(trained):
    head = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    res = compress(head, acc, [X], max_drop=0., goal='bytes', steps=['fold', 'prune'])
    assert not res.frame.kept[1:].any() and res.frame.why[1:].str.startswith('left out: ').all()
    assert 'batch norm' in res.frame.why[1] and 'prune' in res.frame.why[2]

@pytest.mark.parametrize('bad, says', [(dict(goal='size'), 'goal must be'), (dict(target='tf'), 'target must be'), (dict(steps=[]), 'steps must be'),
    (dict(steps='shrink'), 'shrink'), (dict(batch_size=0), 'batch_size'), (dict(max_drop=-.1), 'max_drop'), (dict(path='x.onnx'), 'path='),
    (dict(target='onnx'), 'pass path='), (dict(data=lambda m: m(X)), 'function')])
def test_bad_arguments_do_nothing(trained, bad, says):
    calls = []
    def evaluate(m): calls.append(m)
    args = dict(model=trained, evaluate=evaluate, data=[X]) | bad
    with pytest.raises((ValueError, TypeError), match=says): compress(**args)
    assert calls == []

@pytest.mark.parametrize('evaluate, says', [('accuracy', "got 'accuracy'"), (lambda inp, targ: 0., r'takes \(inp, targ\)'), (lambda m: (1., 2.), 'returned'),
    (lambda m: m(X), 'one number'), (lambda m: '.9', 'one number'), (lambda m: None, 'one number'), (lambda m: float('nan'), 'finite metric')])
@pytest.mark.parametrize('search', [compress, *(partial(f, higher_is_better=True) for f in (prune_find, rank_find, bit_find))])
def test_what_is_no_metric_is_said_first(trained, search, evaluate, says):
    with pytest.raises((ValueError, TypeError), match=says): search(trained, evaluate, [X])

def test_what_is_no_model_is_said_first(trained):
    for m,says in ((learner(trained), 'pass learn.model'), (nn.Sequential(nn.Flatten()), 'no parameters')):
        with pytest.raises((ValueError, TypeError), match=says): run(m)

@pytest.mark.parametrize('search', [partial(compress, goal='bytes', steps='quantize'), *(partial(f, higher_is_better=True) for f in (prune_find, rank_find, bit_find))])
def test_a_model_in_train_mode_is_measured_in_eval_mode(trained, search):
    m = nn.Sequential(*copy.deepcopy(trained)[:-1], nn.Dropout(.9), copy.deepcopy(trained)[-1]).train()
    state,modes = copy.deepcopy(m.state_dict()),set()
    def evaluate(m):
        modes.update(o.training for o in m.modules())
        return acc(m)
    res = search(m, evaluate, [X], max_drop=.02)
    assert modes == {False} and all(o.training for o in m.modules())
    assert all(torch.equal(v, state[k]) for k,v in m.state_dict().items())
    assert (res.first.metric if hasattr(res, 'first') else res.dense) == acc(trained)

@pytest.mark.parametrize('change', [4e-7, .002])
def test_rounding_does_not_undo_folding(trained, change):
    "Folding may move the last digits of a loss, or turn one answer"
    def loss(m): return .2 + change*(not any(isinstance(o, nn.BatchNorm2d) for o in m.modules()))
    res = compress(trained, loss, [X], max_drop=.01, higher_is_better=False, steps=['fold', 'quantize'])
    assert res.frame.kept[1] and [type(p).__name__ for p in res.plans][0] == 'FoldPlan'

def test_an_iterator_of_batches_is_enough_for_all_steps(trained):
    res = compress(trained, acc, iter(X.split(64)), max_drop=.02, goal='bytes', steps=['fold', 'quantize'])
    assert res.frame.kept.all()

def test_data_that_do_not_fit_are_named(trained):
    with pytest.raises(RuntimeError) as e: run(trained, data=torch.zeros(4, 1, 8, 8))
    assert any('batch 0 of data: float32(4, 1, 8, 8)' in n for n in e.value.__notes__)

def test_a_file_is_called_as_data_are(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)
        def forward(self, x, y=None): return self.fc(x) if y is None else nn.functional.cross_entropy(self.fc(x), y)
    x,y = torch.randn(16, 4),torch.zeros(16, dtype=torch.long)
    with pytest.raises(ValueError, match='outside of it'):
        compress(Net(), lambda m: m(x, y).item(), x, higher_is_better=False, target='onnx', path=tmp_path/'m.onnx')
    assert not [*tmp_path.iterdir()]

@pytest.mark.parametrize('dtype', [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision_becomes_a_file(trained, dtype, tmp_path):
    m,(x,y) = copy.deepcopy(trained).to(dtype),patches(96, 1)
    def half(m): return acc(m, (x.to(dtype), y))
    res = compress(m, half, X.to(dtype), max_drop=.05, steps=['fold', 'quantize'], target='onnx', path=tmp_path/'m.onnx')
    assert (ONNXModel(res.path)(x.numpy()).argmax(1) == y.numpy()).mean() == pytest.approx(half(m), abs=.05) and 'ScalarType' not in res.frame.why.iloc[-1]

def test_interrupted_at_any_time_the_best_so_far_is_the_result(trained):
    for stop in (2, 5):     # calls of `evaluate`
        seen = itertools.count()
        def evaluate(m):
            if next(seen) == stop: raise KeyboardInterrupt
            return acc(m)
        res = run(trained, evaluate=evaluate, max_drop=.02, steps=['fold', 'decompose', 'quantize'])
        assert 'interrupted' in res.note and acc(res.model) == res.last.metric >= acc(trained) - .02

def test_the_plans_rebuild_the_result(report, tmp_path):
    res = report
    save_compressed(res.model, tmp_path/'small', res.plans)
    again = load_compressed(tmp_path/'small', cnn).eval()
    assert torch.equal(again(X), res.model(X))

def test_display(report):
    res = report
    for s in (repr(res), res._repr_html_()): assert 'fold' in s and 'prune' in s and 'accuracy' in s and 'MB' in s
    axs = res.plot()
    assert len(axs) == 2 and {'prune', 'quantize'} <= set(res.tried.step) <= set(STEPS) and (res.tried.ms > 0).all()

def test_a_file_answers_as_the_report_says(trained, tmp_path):
    res = run(trained, max_drop=.02, steps=['fold', 'quantize'], target='onnx', path=tmp_path/'m.onnx')
    x,y = patches(96, 1)
    got = ONNXModel(res.path)(x.numpy())
    assert (got.argmax(1) == y.numpy()).mean() == pytest.approx(res.last.metric) and res.path.stat().st_size/1e6 == pytest.approx(res.last.mb)
    assert [f.name for f in tmp_path.iterdir()] == ['m.onnx']

def test_a_convolutional_file_has_few_bits_where_bytes_count(trained, tmp_path):
    "Weights of the model, unpacked by ONNX Runtime; a wide network, so that the graph itself does not count"
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 192, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 3)).eval()
    x,_ = patches(96, 1)
    with torch.no_grad(): want = wide(x).argmax(1)
    same = lambda m: acc(m, (x, want))
    res = compress(wide, same, [X], max_drop=.05, metric='agreement', goal='bytes', steps='quantize', target='onnx', path=tmp_path/'m.onnx')
    assert res.frame.kept.all() and res.first.mb > 4*res.last.mb and res.int8 is None
    with torch.no_grad(): dense = unpack(res.model)(x)      # plain convolutions with the rounded weights
    torch.testing.assert_close(torch.from_numpy(ONNXModel(res.path)(x.numpy())), dense, rtol=1e-4, atol=1e-5)

# ------------------------------------------------------------------ Learners

def test_learner_goes_back_and_trains(trained):
    learn = learner(trained)
    dense = learn.model
    with learn.no_bar(), learn.no_logging():
        res = learn.compress(max_drop=.02, goal='bytes', steps=['fold', 'prune'])
        assert learn.model is res.model and tuple(learn.plans) == res.plans
        learn.fit(1, 1e-4)
        assert learn.validate()[1] > .9
    assert learn.uncompress().model is dense

@pytest.mark.slow
def test_without_a_validation_set_nothing_is_searched(trained):
    items = [*zip(*patches())]
    learn = Learner(DataLoaders.from_dsets(items, [], bs=32, device='cpu'), trained, loss_func=nn.CrossEntropyLoss(), metrics=accuracy)
    with pytest.raises(ValueError, match='no validation set'): learn.compress()

@pytest.mark.slow
def test_texts(tmp_path):
    "A recurrent classifier that returns more than its logits: measured as a file, its LSTM layers in 8 bits"
    from fastai.text.all import AWD_LSTM, BaseTokenizer, CategoryBlock, ColReader, ColSplitter, DataBlock, TextBlock, text_classifier_learner
    rng = torch.Generator().manual_seed(0)
    words = ['red', 'green', 'blue', 'one', 'two', 'three']
    rows = [(' '.join(words[int(j)] for j in torch.randint(0, 3, (12,), generator=rng) + 3*(i % 2)), 'ab'[i % 2]) for i in range(120)]
    df = pd.DataFrame(rows, columns=['text', 'kind']).assign(is_valid=[i >= 80 for i in range(120)])
    dls = DataBlock((TextBlock.from_df('text', tok=BaseTokenizer(), seq_len=72), CategoryBlock), get_x=ColReader('text'), get_y=ColReader('kind'),
        splitter=ColSplitter()).dataloaders(df, bs=16, device='cpu')
    learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 1e-2)
        res = learn.compress(max_drop=.05, target='onnx', path=tmp_path/'m.onnx', steps='quantize')
        assert res.frame.kept.all() and 'LSTM' in res.frame.what[1] and res.first.mb > 3.5*res.last.mb
        assert res.last.metric >= learn.validate()[1] - .05
        model,ids = load_onnx_learner(res.path),dls.test_dl(['red one blue'*3]).one_batch()[0][0].tolist()
        assert model.predict(ids)[0] == learn.predict('red one blue'*3)[0]

def test_distillation_between_steps(trained):
    learn = learner(trained)
    with learn.no_bar(): res = learn.compress(max_drop=.02, goal='bytes', steps='prune', distill=1)
    assert res.last.metric >= res.first.metric - .02 and len(learn.plans) == 1

def test_not_in_a_fit(trained):
    from fastai.callback.core import Callback
    class Now(Callback):
        def after_batch(self): self.learn.compress()
    with pytest.raises(RuntimeError, match='call it afterwards'), (l := learner(trained)).no_bar(), l.no_logging(): l.fit(1, cbs=Now())

# ------------------------------------------------------------------ all orders

METHODS = {
    'fold': lambda m: BN_Folder().fold(m),
    'prune': lambda m: Pruner(.6).prune(m, [X]),
    'decompose': lambda m: FC_Decomposer(.7, exclude='9').decompose(m, [X]),
    'quantize': lambda m: Quantizer(8).quantize(m, [X]),
}
FIRST = {('quantize', 'prune'): 'nothing to prune'}     # the second of these says what comes first

@pytest.mark.parametrize('a, b', [*itertools.product(METHODS, METHODS)])
def test_any_two_in_any_order(trained, a, b):
    one = METHODS[a](trained)
    if (says := FIRST.get((a, b))):
        with pytest.raises(ValueError, match=says): METHODS[b](one)
        return
    two = METHODS[b](one)
    assert acc(two) >= acc(trained) - .15
    for x in (X[:1], X): assert torch.allclose(two(x), copy.deepcopy(two)(x), atol=1e-5)

# ------------------------------------------------------------------ the command

@pytest.mark.parametrize('argv, says', [(['x.pkl'], '--dls'), (['--target', 'tf'], '--target'), (['--max-drop', '-1'], '--max-drop'),
                                        (['x.pkl', '--dls', 'a:b'], 'no such file'), (['--batch-size', '0'], '--batch-size')])
def test_command_errors_are_one_line(argv, says, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert says in err and err.count('\n') == 1 and err.startswith('fasterai_compress: ')

@pytest.mark.slow
def test_command_on_a_learner_file(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    learn = Learner(digits_dls(16, n=400), net, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    learn.export(tmp_path/'learner.pkl')
    (tmp_path/'mydata.py').write_text("from fasterai.core.digits import digits_dls\ndef make(): return digits_dls(16, n=400)\n")
    cmd = [sys.executable, '-c', 'import sys; from fasterai.workflow.cli import main; sys.exit(main())']
    for target,result in (('torch','learner.pkl'), ('onnx','model.onnx')):
        opts = '--allow-pickle --dls mydata:make --max-drop 0.05 --goal bytes --steps prune,quantize'.split()
        r = subprocess.run([*cmd, 'learner.pkl', *opts, '--target', target, '--out', target], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert r.returncode == 0, r.stderr
        assert sorted(f.name for f in (tmp_path/target).iterdir()) == sorted([result, 'report.csv', 'report.png'])
        assert pd.read_csv(tmp_path/target/'report.csv').kept.any()
