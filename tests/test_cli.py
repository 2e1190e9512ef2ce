"The command `fasterai_decompose`: what it writes, what it prints, and how it refuses."
import os, pickle, runpy, sys
from pathlib import Path

import pytest, torch
from fastai.vision.all import Learner, accuracy
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from torchvision.models import resnet18

from fasterai.lowrank.cli import digits_dls, run_example, fasterai_decompose
from fasterai.misc.all import DecompositionPlan, FC_Decomposer, ParamBudget, count_params, load_decomposed

RESNET = ['--arch', 'torchvision.models:resnet18', '--arch-args', '{"num_classes": 10}']


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    "Run the command as its console script does, in an empty folder: exit code, standard output, standard error"
    script = tmp_path/'script.py'
    script.write_text('import sys\nfrom fasterai.lowrank.cli import fasterai_decompose\nsys.exit(fasterai_decompose())\n')
    work = tmp_path/'work'
    work.mkdir()
    monkeypatch.chdir(work)
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['fasterai_decompose', *map(str, args)])
        with pytest.raises(SystemExit) as e: runpy.run_path(str(script), run_name='__main__')
        out,err = capsys.readouterr()
        return e.value.code or 0, out, err
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


def listing(path='.'): return {p: (p.stat().st_ino, p.stat().st_mtime_ns, p.stat().st_size) for p in Path(path).rglob('*')}


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
    'budget and ratio': ([*RESNET, '--weights', 'w.pt', '--budget', '0.3', '--rank-ratio', '0.3'], 'not both'),
    'budget': ([*RESNET, '--weights', 'w.pt', '--budget', '30'], 'ratio must be in (0, 1], got 30'),
    'no such learner': (['nope.pkl'], 'nope.pkl'),
    'no such weights': ([*RESNET, '--weights', 'nope.pt'], 'nope.pt'),
    'arch without weights': (RESNET, '--weights'),
    'weights without arch': (['--weights', 'w.pt'], '--arch'),
    'both forms': (['a.pkl', *RESNET, '--weights', 'w.pt'], 'not both'),
    'unknown module': (['--arch', 'torchvison.models:resnet18', '--weights', 'w.pt'], 'torchvison'),
    'unknown function': (['--arch', 'torchvision.models:resnet81', '--weights', 'w.pt'], 'resnet81'),
    'no colon': (['--arch', 'resnet18', '--weights', 'w.pt'], 'module:function'),
    'not a model': (['--arch', 'os.path:abspath', '--arch-args', '{"path": "."}', '--weights', 'w.pt'], 'not a torch.nn.Module'),
    'bad arguments': (['--arch', 'torchvision.models:resnet18', '--arch-args', '{"clases": 2}', '--weights', 'w.pt'], 'clases'),
    'bad JSON': (['--arch', 'torchvision.models:resnet18', '--arch-args', '{', '--weights', 'w.pt'], '--arch-args'),
    'wrong keys': (['--arch', 'torchvision.models:alexnet', '--weights', 'w.pt'], 'lacks'),
    'wrong classes': (['--arch', 'torchvision.models:resnet18', '--weights', 'w.pt'], 'fc.'),
    'truncated safetensors': ([*RESNET, '--weights', 'cut.safetensors'], 'cut.safetensors'),
    'truncated pt': ([*RESNET, '--weights', 'cut.pt'], 'cut.pt'),
    'text as pt': ([*RESNET, '--weights', 'text.pt'], 'text.pt'),
    'a whole model': ([*RESNET, '--weights', 'whole.pt'], 'save model.state_dict()'),
    'a tensor, not a dict': ([*RESNET, '--weights', 'tensor.pt'], 'not a state dict'),
    'ratio': ([*RESNET, '--weights', 'w.pt', '--rank-ratio', '50'], 'rank_ratio must be in (0, 1], got 50'),
    'layer name': ([*RESNET, '--weights', 'w.pt', '--exclude', 'fd'], "'fc'"),
    'no folder for out': ([*RESNET, '--weights', 'w.pt', '--out', 'a/b/c'], 'does not exist'),
    'out is a file': ([*RESNET, '--weights', 'w.pt', '--out', 'text.pt'], 'not a folder'),
}


@pytest.mark.parametrize('args,text', BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(cli, weights, args, text):
    _,d = weights
    for f in ('w.pt', 'w.safetensors'): os.link(d/f, f)
    for f in ('w.pt', 'w.safetensors'): Path(f'cut{Path(f).suffix}').write_bytes(Path(f).read_bytes()[:5000])
    Path('text.pt').write_text('hello')
    torch.save(torch.ones(2), 'tensor.pt')
    torch.save(nn.Linear(2, 2), 'whole.pt')
    before = listing()
    rc,_,err = cli(*args)
    assert rc == 2
    assert text in err and err.startswith('fasterai_decompose: ') and err.count('\n') == 1
    assert listing() == before


def tiny(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, num_classes))


def test_builtin_example():
    "The whole job on a small network: the table is measured on the models it names"
    small,plan,table = run_example(FC_Decomposer(0.5, exclude='5'), epochs=4, finetune_epochs=2, n=600, arch=tiny)
    assert list(table.model) == ['dense', 'decomposed', 'fine-tuned']
    assert table.parameters[0] == f'{count_params(tiny(10)):,}' and table.parameters[2] == f'{count_params(small):,}'
    assert plan.params_after == count_params(small)
    acc = [float(a.rstrip('%')) for a in table.accuracy]
    assert acc[0] > 60 and acc[2] > 60      # ten classes: chance is 10 %
    dls = digits_dls(n=600)
    assert f'{Learner(dls, small, metrics=accuracy).validate()[1]:.1%}' == table.accuracy[2]


def test_builtin_example_checks_names_before_it_trains():
    class Untrainable(nn.Sequential):
        def forward(self, x): pytest.fail('training has begun')
    with pytest.raises(ValueError, match="exclude='typo'"):
        run_example(FC_Decomposer(exclude='typo'), n=64, arch=lambda num_classes: Untrainable(nn.Linear(3072, num_classes)))


def test_python_call_returns_and_raises(weights, tmp_path):
    _,d = weights
    kw = dict(arch='torchvision.models:resnet18', arch_args='{"num_classes": 10}', weights=str(d/'w.pt'), out=str(tmp_path/'o'))
    table = fasterai_decompose(**kw)
    assert list(table.model) == ['dense', 'decomposed']
    with pytest.raises(FileExistsError, match='--force'): fasterai_decompose(**kw)
    disk = float(table['MB on disk'][1])*1e6
    assert abs(disk - os.path.getsize(tmp_path/'o/model.safetensors')) < 1e5
    assert sum(t.numel()*t.element_size() for t in load_file(tmp_path/'o/model.safetensors').values()) == pytest.approx(disk, rel=2e-3)
