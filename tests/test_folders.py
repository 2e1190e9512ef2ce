"Model folders and training checkpoints as they come: names, links, sub-folders, formats"
import os, shutil, warnings
from pathlib import Path
import pytest, torch
from torch import nn
from fasterai.core.files import training_weights, write_atomic
from fasterai.misc.all import *

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
