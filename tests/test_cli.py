"The command `fasterai_decompose`: what it writes, what it prints, and how it refuses."
import argparse, os, pickle, re, subprocess, sys, signal
from pathlib import Path

import pandas as pd, pytest, torch
from fastai.vision.all import Learner, accuracy
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from torchvision.models import resnet18

import fasterai.lowrank.cli as jobs
from fasterai.cli import _as_options, main
from fasterai.misc.all import (DecompositionPlan, FC_Decomposer, ParamBudget, RankRatio, count_params, digits_dls, fasterai_decompose,
                               load_decomposed, load_weights, run_example)

RESNET = ['--arch', 'torchvision.models:resnet18', '--arch-args', '{"num_classes": 10}']


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    "Run the command as its console script does, in an empty folder: exit code, standard output, standard error"
    work = tmp_path/'work'
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    def run(*args):
        try: rc = main([*map(str, args)])
        except SystemExit as e: rc = e.code or 0
        return rc, *capsys.readouterr()
    return run


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "A ResNet-18 for ten classes, and its weights in three formats"
    torch.manual_seed(0)
    m,d = resnet18(num_classes=10).eval(),tmp_path_factory.mktemp('weights')
    save_file(m.state_dict(), d/'w.safetensors')
    torch.save(m.state_dict(), d/'w.pt')
    torch.save({'model': m.state_dict(), 'opt': {}}, d/'learner.pth')    # what Learner.save writes
    return m, d


def listing(path="."): return {p: (s.st_ino, s.st_mtime_ns, s.st_size) for p in Path(path).rglob("*") for s in [p.lstat()]}


def test_help_comes_from_docments(cli):
    rc,out,_ = cli('--help')
    assert rc == 0
    for s in ('--rank-ratio', 'share of singular values to keep', '--allow-pickle', '--force', '--weights', '[model]'): assert s in out


@pytest.mark.parametrize('fmt', ['w.safetensors', 'w.pt', 'learner.pth'])
def test_arch_and_weights(cli, weights, fmt):
    model,d = weights
    rc,out,_ = cli(*RESNET, '--weights', d/fmt, '--rank-ratio', 0.3, '--out', 'small')
    assert rc == 0
    assert {p.name for p in Path('small').iterdir()} == {'model.safetensors', 'plan.json', 'plan.png'}
    want = FC_Decomposer(0.3).decompose(model)
    small = DecompositionPlan.load('small/plan.json').skeleton(resnet18(num_classes=10))
    load_model(small, 'small/model.safetensors')
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(small.eval()(x), want(x))
    assert f'{count_params(model):,}' in out and f'{count_params(want):,}' in out
    assert Path('small/plan.png').read_bytes().startswith(b'\x89PNG')
    assert len({p.stat().st_mode for p in Path('small').iterdir()}) == 1    # whoever can read the plan can read the model


def test_learner_needs_consent_and_round_trips(cli, tmp_path):
    dls = digits_dls(n=64, bs=16)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10)), metrics=accuracy)
    learn.export((tmp_path/'learner.pkl').absolute())
    rc,_,err = cli(tmp_path/'learner.pkl', '--out', 'small')
    assert rc == 2 and '--allow-pickle' in err and not listing()
    rc,out,_ = cli(tmp_path/'learner.pkl', '--allow-pickle', '--out', 'small')
    assert rc == 0 and 'learner.pkl' in out
    from fastai.learner import load_learner
    small = load_learner('small/learner.pkl')
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(small.model.eval()(x), FC_Decomposer().decompose(learn.model.cpu()).eval()(x))
    pred = small.predict(dls.valid_ds.items[0][0])   # the exported Learner still predicts from an image
    assert pred[0] in map(str, range(10))


class Bomb:
    def __reduce__(self): return open, ('boom', 'w')


@pytest.mark.parametrize('args', [['bomb.pkl'], [*RESNET, '--weights', 'bomb.pkl']])
def test_pickles_do_not_run(cli, args):
    Path('bomb.pkl').write_bytes(pickle.dumps(Bomb()))
    rc,_,err = cli(*args)
    assert rc == 2 and 'bomb.pkl' in err
    assert not Path('boom').exists()


def test_existing_output_is_kept(cli, weights):
    _,d = weights
    Path('small').mkdir()
    Path('small/plan.json').write_text('mine')
    Path('small/notes.txt').write_text('mine')
    before = listing()
    rc,_,err = cli(*RESNET, '--weights', d/'w.pt', '--out', 'small')
    assert rc == 2 and '--force' in err and listing() == before
    rc,*_ = cli(*RESNET, '--weights', d/'w.pt', '--out', 'small', '--force')
    assert rc == 0 and DecompositionPlan.load('small/plan.json').replaced
    assert Path('small/notes.txt').read_text() == 'mine'      # only its own files are replaced


def test_checkpoint_on_disk(cli, weights):
    model,d = weights
    args = ['--checkpoint', d/'w.safetensors', *RESNET, '--out', 'small.safetensors']
    rc,out,_ = cli(*args, '--rank-ratio', 0.3)
    assert rc == 0 and f'{count_params(FC_Decomposer(0.3).decompose(model)):,}' in out and listing().keys() == {Path('small.safetensors')}
    x = torch.randn(2, 3, 64, 64)
    small = load_decomposed(lambda: resnet18(num_classes=10).eval(), 'small.safetensors')
    assert torch.equal(small(x), FC_Decomposer(0.3).decompose(model)(x))
    rc,_,err = cli(*args)
    assert rc == 2 and '--force' in err
    assert cli(*args, '--force', '--budget', 0.4)[0] == 0
    small = load_decomposed(lambda: resnet18(num_classes=10).eval(), 'small.safetensors')
    assert torch.equal(small(x), FC_Decomposer(policy=ParamBudget(0.4)).decompose(model)(x))


def test_budget(cli, weights):
    model,d = weights
    assert cli(*RESNET, '--weights', d/'w.pt', '--budget', 0.4, '--out', 'small')[0] == 0
    assert DecompositionPlan.load('small/plan.json') == FC_Decomposer(policy=ParamBudget(0.4)).plan(model)


BAD = {
    'checkpoint and weights': (['--checkpoint', 'w.safetensors', '--weights', 'w.pt'], '--checkpoint goes with'),
    'checkpoint without layers': (['--checkpoint', 'w.safetensors', '--out', 'x'], "names such as 'fc'"),
    'truncated checkpoint': (['--checkpoint', 'cut.safetensors', *RESNET, '--out', 'x'], 'cut.safetensors is not a whole'),
    'no such checkpoint': (['--checkpoint', 'nope', *RESNET, '--out', 'x'], 'no such file or folder: nope'),
    'checkpoint onto a file': (['--checkpoint', 'w.safetensors', *RESNET, '--out', 'cut.safetensors'], 'exists. Pass --force'),
    'budget and ratio': ([*RESNET, '--weights', 'w.pt', '--budget', '0.3', '--rank-ratio', '0.5'], 'not both'),
    'budget': ([*RESNET, '--weights', 'w.pt', '--budget', '30'], '--budget must be in (0, 1], got 30'),
    'budget too small': ([*RESNET, '--weights', 'w.pt', '--budget', '0.0001'], '--budget 0.0001 allows 1 params'),
    'no such learner': (['nope.pkl'], 'no such file: nope.pkl'),
    'learner is a folder': (['.', '--allow-pickle'], 'is a folder'),
    'no such weights': ([*RESNET, '--weights', 'nope.pt'], 'no such file: nope.pt'),
    'weights are a folder': ([*RESNET, '--weights', 'folder'], 'folder is a folder (--weights is a file)'),
    'arch without weights': (RESNET, '--weights is missing'),
    'weights without arch': (['--weights', 'w.pt'], '--arch is missing'),
    'both forms': (['a.pkl', *RESNET, '--weights', 'w.pt'], 'not both'),
    'two files': (['a.pkl', 'b.pkl'], "'b.pkl' is one argument too many"),
    'unknown module': (['--arch', 'torchvison.models:resnet18', '--weights', 'w.pt'], 'torchvison'),
    'unknown function': (['--arch', 'torchvision.models:resnet81', '--weights', 'w.pt'], 'resnet81'),
    'no colon': (['--arch', 'resnet18', '--weights', 'w.pt'], 'module:function'),
    'not a model': (['--arch', 'os.path:abspath', '--arch-args', '{"path": "."}', '--weights', 'w.pt'], 'not a torch.nn.Module'),
    'bad arguments': (['--arch', 'torchvision.models:resnet18', '--arch-args', '{"clases": 2}', '--weights', 'w.pt'], 'clases'),
    'bad values': (['--arch', 'torchvision.models:resnet18', '--arch-args', '{"num_classes": -1}', '--weights', 'w.pt'], '--arch torchvision.models:resnet18: '),
    'bad JSON': (['--arch', 'torchvision.models:resnet18', '--arch-args', '{', '--weights', 'w.pt'], '--arch-args must be a JSON object'),
    'JSON list': (['--arch', 'torchvision.models:resnet18', '--arch-args', '[2]', '--weights', 'w.pt'], '--arch-args must be a JSON object'),
    'arguments of nothing': (['--arch-args', '{}'], '--arch, which is missing'),
    'wrong keys': (['--arch', 'torchvision.models:alexnet', '--weights', 'w.pt'], "Its tensors are called 'conv1.weight', 'bn1.weight', 'bn1.bias', …; the model has 'classifier"),
    'wrong classes': (['--arch', 'torchvision.models:resnet18', '--weights', 'w.pt'], 'fc.'),
    'truncated safetensors': ([*RESNET, '--weights', 'cut.safetensors'], 'cut.safetensors'),
    'truncated pt': ([*RESNET, '--weights', 'cut.pt'], 'cut.pt'),
    'text as pt': ([*RESNET, '--weights', 'text.pt'], 'text.pt'),
    'text as learner': (['text.pt', '--allow-pickle'], 'text.pt cannot be loaded'),
    'a whole model': ([*RESNET, '--weights', 'whole.pt'], 'save model.state_dict()'),
    'a namespace beside the weights': ([*RESNET, '--weights', 'args.pt'], 'argparse.Namespace, and loading anything but tensors may run code. If you trust the file pass --allow-pickle'),
    'a tensor, not a dict': ([*RESNET, '--weights', 'tensor.pt'], 'not a state dict'),
    'no tensors': ([*RESNET, '--weights', 'numbers.pt'], "It has the keys 'epoch', 'lr'. It has no tensors"),
    'quantized': ([*RESNET, '--weights', 'int8.pt'], 'Decompose before quantizing'),
    'decomposed': ([*RESNET, '--weights', 'small.safetensors'], 'is decomposed already'),
    'ratio': ([*RESNET, '--weights', 'w.pt', '--rank-ratio', '50'], '--rank-ratio must be in (0, 1], got 50'),
    'ratio nan': (['--rank-ratio', 'nan'], '--rank-ratio must be in (0, 1], got nan'),
    'ratio in words': (['--rank-ratio', 'half'], "--rank-ratio must be a number, got 'half'"),
    'round to': (['--round-to', '0'], '--round-to must be at least 1, got 0'),
    'round to a half': (['--round-to', '0.5'], "--round-to must be a whole number, got '0.5'"),
    'no epochs': (['--epochs', '0'], '--epochs must be at least 1, got 0'),
    'negative epochs': (['--finetune-epochs', '-1'], '--finetune-epochs must be at least 0, got -1'),
    'seed': (['--seed', '-1'], '--seed must be at least 0, got -1'),
    'epochs of a given model': ([*RESNET, '--weights', 'w.pt', '--epochs', '3'], '--epochs is for the built-in example'),
    'consent to nothing': (['--allow-pickle'], '--allow-pickle goes with'),
    'layer name': ([*RESNET, '--weights', 'w.pt', '--exclude', 'fd'], "no layer matches --exclude 'fd'. Closest: 'fc'"),
    'no layer name': ([*RESNET, '--weights', 'w.pt', '--layers', ' , '], '--layers takes names of layers'),
    'nothing left': ([*RESNET, '--weights', 'w.pt', '--exclude', 'fc'], 'nothing to decompose (fc: '),
    'unknown option': (['--rank-ration', '0.3'], "'--rank-ration' is no option. Closest: --rank-ratio"),
    'unknown option, shorter': (['--ratio', '0.3'], "'--ratio' is no option. Closest: --rank-ratio."),
    'unknown function': (['--arch', 'torchvision.models:resnet81', '--weights', 'w.pt'], "module 'torchvision.models' has no 'resnet81'. Closest: 'resnet1"),
    'integers that were lost': ([*RESNET, '--weights', 'inf.pt'], 'bn1.num_batches_tracked is a buffer of integers (torch.int64) and was stored as torch.float16'),
    'option without value': (['--out'], '--out needs a value'),
    'no name for out': ([*RESNET, '--weights', 'w.pt', '--out', ''], '--out is the name of a folder'),
    'no folder for out': ([*RESNET, '--weights', 'w.pt', '--out', 'a/b/c'], 'does not exist'),
    'out is a file': ([*RESNET, '--weights', 'w.pt', '--out', 'text.pt'], 'not a folder'),
    'out below a file': ([*RESNET, '--weights', 'w.pt', '--out', 'text.pt/small'], 'text.pt is not a folder'),
    'out is a dangling link': ([*RESNET, '--weights', 'w.pt', '--out', 'link'], 'link to nowhere, which does not exist'),
}
PYTHON = re.compile(r'\b(exclude|layers|rank_ratio|round_to|overwrite|model|policy|types|skip_unprofitable|ParamBudget|RankRatio)[=(]')


@pytest.mark.parametrize('args,text', BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(cli, weights, args, text):
    model,d = weights
    for f in ('w.pt', 'w.safetensors'): os.link(d/f, f)
    for f in ('w.pt', 'w.safetensors'): Path(f'cut{Path(f).suffix}').write_bytes(Path(f).read_bytes()[:5000])
    torch.save({k: v.half()*70000 if 'num' in k else v for k,v in (model.state_dict() | {'bn1.num_batches_tracked': torch.ones(1)[0]}).items()}, 'inf.pt')
    Path('text.pt').write_text('hello')
    Path('folder').mkdir()
    Path('link').symlink_to('nowhere')
    torch.save(torch.ones(2), 'tensor.pt')
    torch.save(nn.Linear(2, 2), 'whole.pt')
    torch.save({'args': argparse.Namespace(lr=.1), 'state_dict': {}}, 'args.pt')
    torch.save({'epoch': 3, 'lr': .1}, 'numbers.pt')
    if 'int8.pt' in args: torch.save(model.state_dict() | {'fc.weight': torch.ones(10, 512, dtype=torch.int8)}, 'int8.pt')
    if 'small.safetensors' in args: save_file(FC_Decomposer(0.3).decompose(model).state_dict(), 'small.safetensors')
    before = listing()
    rc,out,err = cli(*args)
    assert rc == 2
    assert text in err and err.startswith('fasterai_decompose: ') and err.count('\n') == 1 and not out
    assert not PYTHON.search(err)
    assert listing() == before


@pytest.mark.parametrize('said,shown', {
    "no layer matches layers=['fd', 'x']. Closest: 'fc'.": "no layer matches --layers 'fd,x'. Closest: 'fc'.",
    "Repair it, or leave the layer out with exclude='fc'.": "Repair it, or leave the layer out with --exclude 'fc'.",
    'RankRatio(ratio=0.9) is above their break-even rank. Use skip_unprofitable=True to keep them dense, or a smaller rank.':
        '--rank-ratio 0.9 is above their break-even rank. Use --skip-unprofitable to keep them dense, or a smaller rank.',
    'ParamBudget(0.1, round_to=16) is too tight: pass a smaller round_to, or leave layers out with exclude=.':
        '--budget 0.1 --round-to 16 is too tight: pass a smaller --round-to, or leave layers out with --exclude.',
    'out exists. Pass overwrite=True to replace it.': 'out exists. Pass --force to replace it.',
    'Pass model=, a function that builds the model, or layers=, names': 'Pass --arch, or --layers, names',
    'a budget chooses its own ranks: pass ParamBudget(…, round_to=4).': 'a budget chooses its own ranks: pass --budget … --round-to 4.',
    'X is a subclass of nn.Linear; pass types=(X,) if it computes the same': 'X is a subclass of nn.Linear; FC_Decomposer in Python can decompose it if it computes the same',
    '2 of 3 layers become pairs; all layers of the model; a policy of your own': '2 of 3 layers become pairs; all layers of the model; a policy of your own',
}.items())
def test_messages_speak_of_options(said, shown): assert _as_options(said) == shown


def test_warnings_are_lines(cli, weights):
    _,d = weights
    rc,out,err = cli(*RESNET, '--weights', d/'w.pt', '--rank-ratio', 1, '--out', 'small')
    assert rc == 0
    assert err == ('fasterai_decompose: warning: 1 of 1 layers grew (fc; 100 parameters more): --rank-ratio 1.0 is above their break-even rank. '
                   'Use --skip-unprofitable to keep them dense, or a smaller rank.\n')


def python(code, *args, cwd):
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(Path(jobs.__file__).parents[2])))


@pytest.mark.parametrize('args', [['--epochs', '0'], ['nope.pkl'], ['--rank-ratio', '3'], ['--rank-ration', '3'], ['--arch', 'a']])
def test_mistakes_show_before_pytorch_is_imported(tmp_path, args):
    r = python('import sys; from fasterai.cli import main; rc = main(); assert not {"torch", "fastai", "pandas"} & {*sys.modules}; sys.exit(rc)', *args, cwd=tmp_path)
    assert r.returncode == 2 and r.stderr.count('\n') == 1


def test_nothing_but_the_result_is_printed(tmp_path):
    "In a process of its own, where the libraries have not given their warnings yet; the model function lies in the current folder"
    (tmp_path/'mynet.py').write_text('from torch import nn\ndef net(): return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))\n')
    code = 'import sys; sys.path.remove(""); from fasterai.cli import main; sys.exit(main())'
    torch.save(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)).state_dict(), tmp_path/'w.pt')
    r = python(code, '--arch', 'mynet:net', '--weights', 'w.pt', '--layers', '0 , 1', '--rank-ratio', .25, cwd=tmp_path)
    assert (r.returncode, r.stderr) == (0, '') and 'wrote fasterai_out/model.safetensors' in r.stdout


def tiny(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, num_classes))


def rows(table): return table.set_index('model').accuracy.str.rstrip('%').astype(float).to_dict()


def test_builtin_example():
    """The whole job on a small network: the table is measured on the models it names, the last row is the one that is returned; with a tenth of
    the weights and nothing trained it is within a point of the dense network"""
    small,plan,table = run_example(FC_Decomposer(0.5, exclude='5'), policy=ParamBudget(0.1, round_to=1), epochs=5, finetune_epochs=1, n=900, arch=tiny)
    assert list(table.model) == ['dense', 'plain SVD', 'fine-tuned', 'with activations']
    dense = tiny(10)
    assert table.parameters[0] == f'{count_params(dense):,}' and table.parameters[1] == table.parameters[2]
    assert table.parameters[1] == f'{count_params(FC_Decomposer(0.5, exclude="5").decompose(dense)):,}'
    assert table.parameters[3] == f'{count_params(small):,}' and plan.params_after == count_params(small)
    weights = [o for o in plan.layers if o.name != '5']
    assert sum(o.params_after for o in weights) <= 0.1*sum(o.weight_params for o in weights) and plan['5'].rank is None
    acc = rows(table)
    assert acc['dense'] > 80 and acc['with activations'] >= acc['dense'] - 1      # ten classes: chance is 10 %
    assert f'{Learner(digits_dls(n=900), small, metrics=accuracy).validate()[1]:.1%}' == table.accuracy[3]


def test_fine_tuning_keeps_its_best_state(monkeypatch):
    "With a learning rate that destroys the network the state before the first step is the best"
    fit = Learner.fit_one_cycle
    monkeypatch.setattr(Learner, 'fit_one_cycle', lambda self, n, lr, **kw: fit(self, n, lr if not kw else 10., **kw))
    acc = rows(run_example(policy=ParamBudget(0.1), epochs=3, finetune_epochs=1, n=400, arch=tiny)[2])
    assert acc['fine-tuned'] == acc['plain SVD'] > 30


@pytest.mark.parametrize('args,plain,seen', [
    ([], RankRatio(0.5), ParamBudget(0.05)), (['--round-to', 16], RankRatio(0.5), ParamBudget(0.05, round_to=16)),
    (['--rank-ratio', 0.5], RankRatio(0.5), RankRatio(0.5)), (['--rank-ratio', 0.25], RankRatio(0.25), RankRatio(0.25)),
    (['--budget', 0.2], ParamBudget(0.2), ParamBudget(0.2)), (['--budget', 0.2, '--round-to', 1], ParamBudget(0.2, round_to=1), ParamBudget(0.2, round_to=1))])
def test_rows_of_the_example_are_what_was_asked(cli, monkeypatch, args, plain, seen):
    asked = {}
    def example(fc, **kw):
        asked.update(kw, fc=fc)
        model = nn.Linear(64, 64)
        plan = FC_Decomposer(0.25).plan(model)
        return plan.apply(model), plan, pd.DataFrame({'model': ['dense']})
    monkeypatch.setattr(jobs, 'run_example', example)
    rc,_,err = cli(*args, '--epochs', 2, '--seed', 1)
    assert (rc, err) == (0, '')
    assert (asked['fc'].policy, asked['policy'], asked['epochs'], asked['seed']) == (plain, seen, 2, 1) and 'finetune_epochs' not in asked
    assert asked['fc'].round_to == (args[1] if '--round-to' in args and '--budget' not in args else 1)


@pytest.mark.parametrize('fc,policy,text', [(FC_Decomposer(exclude='typo'), ParamBudget(0.5), "exclude='typo'"),
    (FC_Decomposer(), ParamBudget(0.001), 'these 1 layers need at least'), (FC_Decomposer(exclude='0'), ParamBudget(0.5), 'nothing to decompose')])
def test_builtin_example_checks_before_it_trains(fc, policy, text):
    class Untrainable(nn.Sequential):
        def forward(self, x): pytest.fail('training has begun')
    with pytest.raises(ValueError, match=text):
        run_example(fc, policy=policy, n=64, arch=lambda num_classes: Untrainable(nn.Linear(3072, num_classes)))


def test_python_call_returns_and_raises(weights, tmp_path):
    _,d = weights
    kw = dict(arch='torchvision.models:resnet18', arch_args='{"num_classes": 10}', weights=str(d/'w.pt'), out=str(tmp_path/'o'))
    table = fasterai_decompose(**kw)
    assert list(table.model) == ['dense', 'decomposed']
    with pytest.raises(FileExistsError, match='--force'): fasterai_decompose(**kw)
    disk = float(table['MB on disk'][1])*1e6
    assert abs(disk - os.path.getsize(tmp_path/'o/model.safetensors')) < 1e5
    assert sum(t.numel()*t.element_size() for t in load_file(tmp_path/'o/model.safetensors').values()) == pytest.approx(disk, rel=2e-3)


CHECKPOINTS = {
    'plain': lambda sd: sd,
    'DataParallel': lambda sd: {f'module.{k}': v for k,v in sd.items()},
    'Lightning': lambda sd: {'state_dict': {f'model.{k}': v for k,v in sd.items()}, 'epoch': 3, 'optimizer_states': [{'state': {0: {'exp_avg': torch.ones(2)}}}]},
    'compiled and parallel': lambda sd: {'model': {f'module._orig_mod.{k}': v for k,v in sd.items()}},
    'model_state_dict': lambda sd: {'epoch': 3, 'optimizer_state_dict': {'state': {}, 'param_groups': [{'lr': .1}]}, 'model_state_dict': sd, 'loss': torch.ones(())},
    'net': lambda sd: {'net': sd, 'acc': 91.2},
    'two levels': lambda sd: {'checkpoint': {'generator': sd}},
    'averaged too': lambda sd: {'state_dict_ema': {k: torch.zeros_like(v) for k,v in sd.items()}, 'state_dict': sd},
    'a criterion too': lambda sd: {'state_dict': {f'net.{k}': v for k,v in sd.items()} | {'criterion.weight': torch.ones(3)}},
}


def small_net(): return nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))


@pytest.mark.parametrize('form', CHECKPOINTS)
@pytest.mark.parametrize('suffix', ['.pt', '.ckpt'])
def test_training_checkpoints(tmp_path, form, suffix):
    sd = small_net().state_dict()
    torch.save(CHECKPOINTS[form](sd), tmp_path/f'w{suffix}')
    got = load_weights(small_net(), tmp_path/f'w{suffix}').state_dict()
    assert got.keys() == sd.keys() and all(torch.equal(got[k], v) for k,v in sd.items())


def test_objects_in_a_checkpoint_need_consent(tmp_path):
    m = small_net()
    torch.save({'args': argparse.Namespace(lr=.1), 'state_dict': m.state_dict()}, tmp_path/'w.pt')
    with pytest.raises(ValueError, match=r'holds argparse\.Namespace, .* pass --allow-pickle'): load_weights(small_net(), tmp_path/'w.pt')
    assert torch.equal(load_weights(small_net(), tmp_path/'w.pt', allow_pickle=True)[0].weight, m[0].weight)
    torch.save(m, tmp_path/'whole.pt')
    assert torch.equal(load_weights(small_net(), tmp_path/'whole.pt', allow_pickle=True)[0].weight, m[0].weight)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('suffix', ['safetensors', 'pt'])
def test_weights_keep_the_dtype_of_the_file(tmp_path, dtype, suffix):
    m = small_net()
    m[0].to(dtype)                                  # mixed: the rest is float32
    (save_file if suffix == 'safetensors' else torch.save)(m.state_dict(), tmp_path/f'w.{suffix}')
    got = small_net()
    got[0].weight.requires_grad_(False)
    load_weights(got, tmp_path/f'w.{suffix}')
    assert {k: v.dtype for k,v in got.state_dict().items()} == {k: v.dtype for k,v in m.state_dict().items()}
    assert torch.equal(got[0].weight, m[0].weight) and [p.requires_grad for p in got[0].parameters()] == [False, True]


def test_half_precision_file_gives_a_half_precision_result(cli):
    Path('halfnet.py').write_text('from torch import nn\ndef net(): return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512))\n')
    save_file(nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512)).half().state_dict(), 'w.safetensors')
    rc,out,_ = cli('--arch', 'halfnet:net', '--weights', 'w.safetensors', '--out', 'small')
    assert rc == 0 and {t.dtype for t in load_file('small/model.safetensors').values()} == {torch.float16}
    sizes = [os.path.getsize(f)/1e6 for f in ('w.safetensors', 'small/model.safetensors')]
    shown = [float(l.split()[2]) for l in out.splitlines() if l.split()[:1] in (['dense'], ['decomposed'])]
    assert shown == pytest.approx(sizes, rel=0.01) and shown[1] < shown[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.fc,self.head = nn.Embedding(30, 16),nn.Linear(16, 16),nn.Linear(16, 30, bias=False)
        self.head.weight = self.emb.weight


def test_ties_stay(tmp_path):
    m = Tied().half()
    torch.save({k: v for k,v in m.state_dict().items() if k != 'head.weight'}, tmp_path/'w.pt')     # as safetensors has it
    got = load_weights(Tied(), tmp_path/'w.pt')
    assert got.head.weight is got.emb.weight and got.emb.weight.dtype == torch.float16 and torch.equal(got.emb.weight, m.emb.weight)
    torch.save(m.state_dict() | {'head.weight': torch.ones(30, 16).half()}, tmp_path/'w.pt')
    with pytest.raises(ValueError, match='one tensor in the model and differ'): load_weights(Tied(), tmp_path/'w.pt')


def test_decomposed_learner_is_one_sentence(cli):
    learn = Learner(digits_dls(n=64, bs=16), nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10)), metrics=accuracy)
    learn.model = FC_Decomposer(0.1, exclude='3').decompose(learn.model)
    learn.export(Path('part.pkl').absolute())                           # one layer is left
    learn.model,learn.opt = FC_Decomposer().decompose(learn.model),None
    learn.export(Path('made.pkl').absolute())                           # what the command itself writes
    before = listing()
    rc,out,err = cli('made.pkl', '--allow-pickle')
    assert rc == 2 and 'this Learner is decomposed already' in err and err.count('\n') == 1 and not out and listing() == before
    assert cli('part.pkl', '--allow-pickle')[0] == 0


def interrupt(): raise KeyboardInterrupt


@pytest.mark.parametrize('where', ['build_arch', 'load_weights', 'disk_bytes', 'DecompositionPlan.save', 'DecompositionPlan.plot'])
def test_ctrl_c_leaves_nothing(cli, weights, monkeypatch, where):
    _,d = weights
    owner,_,name = where.rpartition('.')
    monkeypatch.setattr(getattr(jobs, owner) if owner else jobs, name, lambda *a, **k: interrupt())
    rc,_,err = cli(*RESNET, '--weights', d/'w.pt', '--out', 'small')
    assert rc == 130 and err.endswith('\nfasterai_decompose: interrupted.\n') and not listing()


@pytest.fixture
def sigint():
    "Ctrl-C as a terminal has it: processes in the background are started with the signal ignored"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

def test_a_signal_is_no_traceback(cli, sigint):
    Path('interrupted.py').write_text('import os, signal, time\ndef net():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n')
    torch.save({}, 'w.pt')
    rc,_,err = cli('--arch', 'interrupted:net', '--weights', 'w.pt')
    assert (rc, err) == (130, '\nfasterai_decompose: interrupted.\n') and not Path('fasterai_out').exists()


def test_result_in_a_linked_folder(cli, weights, tmp_path):
    _,d = weights
    (tmp_path/'big').mkdir()
    Path('small').symlink_to(tmp_path/'big')
    assert cli(*RESNET, '--weights', d/'w.pt', '--out', 'small')[0] == 0
    assert Path('small').is_symlink() and {p.name for p in (tmp_path/'big').iterdir()} == {'model.safetensors', 'plan.json', 'plan.png'}


def test_integers_that_were_cast_with_everything_else(cli, weights):
    model,_ = weights
    save_file({k: v.half() for k,v in model.state_dict().items()}, 'half.safetensors')
    assert cli(*RESNET, '--weights', 'half.safetensors', '--out', 'small')[0] == 0
    got = load_file('small/model.safetensors')
    assert {str(v.dtype) for k,v in got.items() if 'num_batches' in k} == {'torch.int64'} and got['conv1.weight'].dtype is torch.float16
    got = load_weights(resnet18(num_classes=10), 'half.safetensors')
    assert all(torch.equal(v, model.state_dict()[k]) for k,v in got.state_dict().items() if 'num_batches' in k)
    class Indexed(nn.BatchNorm1d):
        def __init__(self):
            super().__init__(2)
            for k,v in dict(ids=torch.arange(5), mask=torch.tensor([True, False])).items(): self.register_buffer(k, v)
    sd = Indexed().state_dict() | {'num_batches_tracked': torch.tensor(4097)}
    torch.save({k: v.bfloat16() for k,v in sd.items()}, 'all.pt')
    got = load_weights(Indexed(), 'all.pt')
    assert got.num_batches_tracked.item() == 4096 and torch.equal(got.ids, sd['ids']) and torch.equal(got.mask, sd['mask'])
    for bad in (257., .5, float('nan')):    # bfloat16 has no 257
        torch.save({k: v.bfloat16() for k,v in (sd | {'ids': torch.full((5,), bad)}).items()}, 'bad.pt')
        with pytest.raises(ValueError, match='ids is a buffer of integers .torch.int64. and was stored as torch.bfloat16, which lost their values'): load_weights(Indexed(), 'bad.pt')


def test_statistics_of_a_batch_norm_are_no_parameters(cli, weights):
    model,d = weights
    _,out,_ = cli('--checkpoint', d/'w.safetensors', '--layers', 'fc', '--out', 'small.safetensors')
    assert f'{sum(p.numel() for p in model.parameters()):,}' in out
