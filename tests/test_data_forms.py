"Which items of a batch reach the model, and what becomes of data that are no batches"
import copy, sys, warnings
from collections import namedtuple
from pathlib import Path
from typing import List, Optional
import numpy as np, pandas as pd, pytest, torch, transformers as hf
from fastai.basics import DataLoader as FastaiLoader, DataLoaders, Learner
from fastai.tabular.all import Categorify, CategoryBlock, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, get_text_classifier
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset
from fasterai.core.arguments import model_args
from fasterai.core.batches import Batches, run_batches
from fasterai.misc.all import *

# ------------------------------------------------------------------ helpers

def config(**kw):
    return hf.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50, **kw)

def g(seed=0): return torch.Generator().manual_seed(seed)

def text(left=False, B=6, T=8):
    "Token ids padded with 0, mask, token types of pairs"
    ids,mask,types = torch.randint(1, 50, (B, T), generator=g()),torch.zeros(B, T, dtype=torch.long),torch.zeros(B, T, dtype=torch.long)
    for i in range(B):
        n = T if i == 0 else 3 + i % (T-3)
        mask[i,:n],types[i,n//2:n] = 1,1
    ids = ids*mask
    return [ids.flip(1), mask.flip(1), (mask-types).flip(1)] if left else [ids, mask, types]

def read(model, batch, warns=0, **kw):
    "Names of the arguments that `batch` gives, and the number of targets"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        args,kws,targets = model_args(model, batch, **kw)
    assert len(w) == warns, [str(o.message) for o in w]
    return len(args), sorted(kws), len(targets)

class Args(nn.Module):
    "A model with the `forward` given as text"
    def __new__(cls, sig):
        scope = dict(torch=torch, nn=nn, Optional=Optional, List=List)
        exec(f'class M(nn.Module):\n    def __init__(self): super().__init__(); self.fc = nn.Linear(8, 4)\n    def forward(self, {sig}): return self.fc(x)', scope)
        return scope['M']()

X,Y = torch.randn(12, 8, generator=g()),torch.arange(12) % 4
K = torch.rand(12, 8, generator=g(1))
BERT,CLS = hf.BertModel(config()).eval(),hf.BertForSequenceClassification(config()).eval()

# ------------------------------------------------------------------ Hugging Face

@pytest.mark.parametrize('left', [False, True])
@pytest.mark.parametrize('order,named', [('im', 'a'), ('imt', 'at'), ('itm', 'at'), ('iml', 'a'), ('imtl', 'at'), ('itml', 'at'), ('i', ''), ('il', '')])
@pytest.mark.parametrize('kind', [tuple, list])
def test_a_tuple_of_a_tokenizer(order, named, left, kind):
    ids,mask,types = text(left)
    batch = kind(dict(i=ids, m=mask, t=types, l=torch.tensor([0, 1, 2, 0, 1, 2]))[o] for o in order)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        args,kw,targets = model_args(CLS, batch)
    assert torch.equal(args[0], ids) and len(args) == 1 and len(targets) == ('l' in order)
    want = {'attention_mask': mask, 'token_type_ids': types}
    assert sorted(kw) == sorted({'a': 'attention_mask', 't': 'token_type_ids'}[o] for o in named)
    assert all(torch.equal(v, want[k]) for k,v in kw.items())

@pytest.mark.parametrize('left', [False, True])
@pytest.mark.parametrize('dtype', [torch.bool, torch.int32, torch.uint8, torch.float32])
def test_masks_of_any_dtype(dtype, left):
    ids,mask,_ = text(left)
    assert read(BERT, (ids, mask.to(dtype))) == (1, ['attention_mask'], 0)

def test_a_mask_with_holes_is_known_by_the_padding_token():
    ids,mask,_ = text()
    mask[0,2] = 0
    assert read(BERT, (ids*mask, mask)) == (1, ['attention_mask'], 0)

def test_left_padding_with_a_token_that_ends_the_text_too():
    ids,mask,_ = text(left=True)
    ids[:,-1] = 0
    assert read(BERT, (ids, mask)) == (1, ['attention_mask'], 0)

@pytest.mark.parametrize('row', [[1]*8, [1]*5 + [0]*3])
def test_batches_of_one_row(row):
    ids,mask = torch.arange(1, 9)[None],torch.tensor([row])
    assert read(BERT, (ids, mask)) == (1, ['attention_mask'], 0)
    assert read(BERT, (ids, mask*0, mask)) == (1, ['attention_mask', 'token_type_ids'], 0)

def test_rows_are_counted_as_with_a_dict():
    ids,mask,types = text()
    key = 'encoder.layer.0.intermediate.dense'
    good = calibrate(BERT, dict(input_ids=ids, attention_mask=mask, token_type_ids=types))[key]
    for order in ((ids, mask, types), (ids, types, mask)):
        got = calibrate(BERT, DataLoader(TensorDataset(*order), 6))[key]
        assert got.rows == good.rows == int(mask.sum()) and torch.equal(got.cov, good.cov)

def test_outputs_and_sensitivities_are_those_of_a_dict():
    ids,mask,_ = text()
    labels = torch.arange(6) % 2
    good = FC_Decomposer(policy=ParamBudget(.5)).plan(CLS, [dict(input_ids=ids, attention_mask=mask)])
    got = FC_Decomposer(policy=ParamBudget(.5)).plan(CLS, [(ids, mask, labels)])
    assert [o.rank for o in got.layers] == [o.rank for o in good.layers] and [o.error for o in got.layers] == [o.error for o in good.layers]

def test_compare_models_and_refine_read_batches_alike():
    ids,mask,_ = text()
    small = FC_Decomposer(.5).decompose(BERT, (ids, mask))
    data = dict(input_ids=ids, attention_mask=mask)
    a,b = (compare_models(BERT, small, d, latency=False).table for d in (data, (ids, mask)))
    pd.testing.assert_frame_equal(a, b)
    a,b = (refine(small, BERT, [d]) for d in (data, (ids, mask)))
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))

@pytest.mark.parametrize('labels', [torch.tensor([0, 1]*3), torch.rand(6), torch.rand(6, 3), torch.rand(6, 8) , torch.tensor(1), ['a']*6, None],
                         ids=['classes', 'floats', 'soft', 'wide', 'scalar', 'text', 'none'])
def test_labels_beside_text_are_no_inputs(labels):
    ids,mask,_ = text()
    assert read(CLS, (ids, mask, labels)) == (1, ['attention_mask'], 1)
    assert read(CLS, (ids, labels)) == (1, [], 1)

def test_labels_of_tokens():
    "-100 marks labels; so does the text itself, and the text one token later"
    ids,mask,_ = text()
    tags = (ids % 2).masked_fill(mask == 0, -100)
    lm = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))
    for labels in (tags, ids, torch.cat([ids[:,1:], ids[:,:1]], 1)):
        for model in (CLS, BERT, lm): assert read(model, (ids, mask, labels)) == (1, ['attention_mask'], 1)
    assert read(lm, (ids, ids)) == (1, [], 1)

def test_labels_are_never_passed():
    assert read(Args('x, labels=None'), (X, Y)) == read(Args('x, targets=None'), (X, K)) == (1, [], 1)
    assert read(Args('x'), {'x': X, 'label': Y}) == (0, ['x'], 1)

def test_zeros_and_ones_that_may_be_tags_are_asked_about():
    ids,mask,_ = text()
    tags = torch.randint(2, ids.shape, generator=g(4))
    with pytest.warns(UserWarning, match=r'item 1 \(int64\(6, 8\)\) could be an input or a target: left out. Pass dicts: dict\(input_ids=…, attention_mask=…\)'):
        assert len(model_args(CLS, (ids, tags))[2]) == 1
    with pytest.warns(UserWarning, match=r'dict\(input_ids=…, attention_mask=…, token_type_ids=…\) if BertForSequenceClassification shall get it'):
        _,kw,targets = model_args(CLS, (ids, mask, tags))
    assert [*kw] == ['attention_mask'] and len(targets) == 1

def test_other_networks():
    ids,mask,_ = text()
    audio = hf.Wav2Vec2ForSequenceClassification.forward
    class Audio(nn.Module): forward = audio
    wave = torch.randn(6, 8)*mask
    assert read(Audio(), (wave, mask, Y[:6])) == (1, ['attention_mask'], 1)
    for cls in ('ViTForImageClassification', 'ConvNextForImageClassification', 'CLIPVisionModel'):
        class Vision(nn.Module): forward = getattr(hf, cls).forward
        for y in (Y[:2], torch.rand(2, 10), torch.eye(10)[:2], torch.eye(3)[[0, 0]], torch.tensor([[1, 0, 0]]*2)): assert read(Vision(), (torch.randn(2, 3, 4, 4), y)) == (1, [], 1)
    class Xlm(nn.Module): forward = hf.XLMModel.forward
    assert read(Xlm(), (ids, mask, Y[:6])) == (1, ['attention_mask'], 1)     # 0 is no length

# ------------------------------------------------------------------ other signatures

@pytest.mark.parametrize('sig', ['x', 'x, return_features=False', 'x, return_features=None', "x, mode='train'", 'x, temperature=1.', 'x, n_layers=3', 'x, hidden=None',
    'x, mask=None', 'x, attn_mask: torch.Tensor|None=None', 'x, is_causal: bool|None=None', 'x, sizes: list[torch.Tensor]|None=None', 'x, sizes: Optional[List[torch.Tensor]]=None', 'x, cache=None', 'x, *, verbose=False',
    'x, lengths=None', '*args', 'x, *args', 'x=None, **kw'])
@pytest.mark.parametrize('y', [Y, torch.eye(4)[Y]], ids=['classes', 'one-hot'])
def test_ordinary_labels_are_targets_without_a_word(sig, y):
    if sig == '*args':
        class M(nn.Module):
            def forward(self, *args): return args[0]
        m = M()
    else: m = Args(sig)
    x = torch.randn(12, 3, 8, generator=g())
    if sig == 'x, hidden=None' and y.is_floating_point(): return     # a state may be of that form
    assert read(m, (x, y)) == (1, [], 1)

@pytest.mark.parametrize('sig,items', [('x, scale=None', [K]), ('x, scale: torch.Tensor|None=None', [K]), ('x, scale=1.', [K]), ('x, *, scale=None', [K]),
    ('x, scale=None', [K, Y]), ('x, scale=torch.ones(8)', [K]), ('x, t=None', [Y]), ('x, lengths=None', [Y.clamp(min=1)]), ('x, gate=None', [K.sum(1)])])
def test_what_may_be_an_input_is_asked_about_once(sig, items):
    m = Args(sig)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        outs = [t for _,t in run_batches(m, DataLoader(TensorDataset(X, *items), 4))]
    name = sig.split(', ')[-1].split('=')[0].split(':')[0]
    assert len(w) == 1 and f'dict(x=…, {name}=…)' in str(w[0].message) and 'dict(x=…)' in str(w[0].message) and w[0].filename == __file__
    assert [len(t) for t in outs] == [len(items)]*3

def test_required_arguments_come_first():
    assert read(Args('x, k'), (X, K, Y)) == (2, [], 1)
    assert read(Args('x, k, z=None'), (X, K)) == (2, [], 0)
    ids,mask,_ = text()
    assert read(Args('x, attention_mask, token_type_ids=None'), (ids, mask, mask*0)) == (2, ['token_type_ids'], 0)

def test_any_mask_argument():
    x,mask = torch.randn(6, 8, 8),text()[1]
    for name in ('mask', 'padding_mask', 'src_key_padding_mask'): assert read(Args(f'x, {name}=None'), (x, mask, Y[:6])) == (1, [name], 1)
    assert read(Args('x, key_padding_mask=None'), (x, mask == 0)) == (1, ['key_padding_mask'], 0)      # true where padding is
    assert read(Args('x, src_mask=None, tgt_mask=None'), (x, mask), warns=1) == (1, [], 1)

def test_any_number_of_arguments():
    ids,mask,_ = text()
    class M(nn.Module):
        def forward(self, *args, **kw): return args[0]
    assert read(M(), (ids, mask)) == (2, [], 0) and read(M(), (ids, mask, Y[:6])) == (2, [], 1) and read(M(), (X, Y)) == (1, [], 1)
    assert read(Args('x, **kw'), (ids, mask), warns=1) == (1, [], 1)

def test_nested_batches():
    ids,mask,types = text()
    enc = hf.BatchEncoding(dict(input_ids=ids, attention_mask=mask))
    assert read(CLS, ((ids, mask), Y[:6])) == (1, ['attention_mask'], 1)
    assert read(CLS, [[ids, types, mask], Y[:6]]) == (1, ['attention_mask', 'token_type_ids'], 1)
    assert read(CLS, (dict(enc), Y[:6])) == read(CLS, (enc, Y[:6])) == read(CLS, [enc, Y[:6]]) == (0, ['attention_mask', 'input_ids'], 1)
    assert read(CLS, enc) == (0, ['attention_mask', 'input_ids'], 0)
    assert read(Args('x, k'), ((X, K), Y)) == (2, [], 1) and read(Args('x, k'), ({'x': X, 'k': K}, Y)) == (0, ['k', 'x'], 1)
    assert read(Args('x, scale=None'), ((X, K), Y)) == (2, [], 1)
    assert read(Args('x'), ((X, K), Y)) == (1, [], 1)        # the one argument is a tuple
    images = [torch.randn(3, 4, 4), torch.randn(3, 5, 5)]
    assert read(Args('x, targets=None'), (images, [{}, {}])) == (1, [], 1)

def test_named_tuples():
    ids,mask,_ = text()
    B = namedtuple('B', 'input_ids attention_mask labels')
    assert read(CLS, B(ids, mask, Y[:6])) == (0, ['attention_mask', 'input_ids'], 0)
    P = namedtuple('P', 'img cls')
    assert read(Args('x'), P(X, Y)) == (1, [], 1)

def test_packed_sequences_are_one_input():
    lstm = nn.LSTM(8, 4)
    packed = pack_sequence([X[:3], X[:2]])
    assert read(lstm, (packed, Y[:2])) == (1, [], 1) and read(lstm, packed) == (1, [], 0)
    assert len([*run_batches(lstm, packed)]) == 1

def test_batches_are_read_alike():
    "The last batch, where all rows are full and the labels look like a mask, is read as the first"
    ids,_,types = text()
    tags = torch.tensor([[1, 0]*4]*3 + [[1]*8]*3)
    with pytest.warns(UserWarning, match='left out'): outs = [t for _,t in run_batches(CLS, [(ids[:3], tags[:3]), (ids[3:], tags[3:])])]
    assert [len(t) for t in outs] == [1, 1]

def test_targets_reach_the_loss():
    ids,mask,_ = text()
    seen = []
    def loss(out, *targets): seen.append(targets); return nn.functional.cross_entropy(out.logits, targets[0])
    calibrate(CLS, [(ids, mask, Y[:6] % 2)], sensitivity='full', loss=loss)
    assert len(seen[0]) == 1 and torch.equal(seen[0][0], Y[:6] % 2)

# ------------------------------------------------------------------ fastai

def test_tabular_loaders_know_their_inputs():
    df = pd.DataFrame(dict(kind=['a', 'b']*20, size=np.arange(40.), y=np.arange(40) % 2))
    dls = TabularDataLoaders.from_df(df, cat_names=['kind'], cont_names=['size'], y_names='y', y_block=CategoryBlock(), procs=[Categorify, Normalize], bs=8, valid_idx=range(8), num_workers=0)
    learn = tabular_learner(dls, layers=[10, 8])
    for data in (dls, learn, dls.valid, dls.test_dl(df.drop(columns='y'))):
        plan = FC_Decomposer(.5).plan(learn.model, data)
        assert all(o.calibrated for o in plan.layers if o.can)
    with pytest.raises(TypeError, match=r'got TabularPandas. It holds single items: pass its dataloaders\(\)'): FC_Decomposer().plan(learn.model, dls.train_ds)

def test_fastai_loaders_of_plain_datasets():
    dls = DataLoaders.from_dsets(TensorDataset(X, K, Y), TensorDataset(X, K, Y), bs=4)
    assert dls.train.n_inp == 2
    assert [len(t) for _,t in run_batches(Args('x, k=None'), dls)] == [1, 1, 1]
    plain = DataLoaders(DataLoader(TensorDataset(X, Y), 4), DataLoader(TensorDataset(X, Y), 4))
    assert [len(t) for _,t in run_batches(Args('x'), plain)] == [1, 1, 1]
    assert [len(t) for _,t in run_batches(Args('x'), FastaiLoader(X, bs=4))] == [0, 0, 0]

def test_fastai_loaders_of_text_without_labels():
    "fastai takes the last item for the target where the dataset does not say more; a mask is none"
    ids,mask,_ = text()
    seen = []
    hook = BERT.register_forward_pre_hook(lambda m, a, kw: seen.append(kw.get('attention_mask')), with_kwargs=True)
    dls = DataLoaders.from_dsets(TensorDataset(ids, mask), TensorDataset(ids, mask), bs=6)
    try: outs = [t for _,t in run_batches(BERT, dls)]
    finally: hook.remove()
    assert outs == [()] and seen[0].sum() == mask.sum()

def test_text_classifier():
    m = get_text_classifier(AWD_LSTM, 50, 2, config={**awd_lstm_clas_config, 'emb_sz': 12, 'n_hid': 12, 'n_layers': 1})
    ids = torch.randint(2, 50, (6, 9))
    dls = DataLoaders.from_dsets(TensorDataset(ids, Y[:6] % 2), TensorDataset(ids, Y[:6] % 2), bs=3)
    assert FC_Decomposer(.5).plan(m, dls).replaced

# ------------------------------------------------------------------ what are no batches

class Samples(Dataset):
    def __len__(self): return 12
    def __getitem__(self, i): return X[i], Y[i]

class Columns:
    "As `datasets.Dataset`: rows are dicts without a batch dimension"
    column_names = ['x', 'label']
    def __iter__(self): return iter([dict(x=[0.]*8, label=0)]*3)

@pytest.mark.parametrize('data,text', [(pd.DataFrame(X.numpy()), 'got DataFrame. Pass torch.tensor(data.to_numpy(), dtype=torch.float32), or a DataLoader.'),
    (pd.Series(Y.numpy()), 'got Series. Pass torch.tensor'), (pd.Index([1, 2]), 'got Index. Pass torch.tensor'),
    ([pd.DataFrame(X.numpy())], 'a batch is a DataFrame. Pass torch.tensor'), (TensorDataset(X, Y), 'got TensorDataset. It holds single samples'),
    (Samples(), 'got Samples. It holds single samples: pass torch.utils.data.DataLoader(data, batch_size=64).'), (ConcatDataset([Samples()]), 'single samples'),
    (Columns(), 'got Columns. It holds single samples'), ('train.csv', 'got str. Load the file first'), (Path('stats.safetensors'), 'Calibration.load(path)'),
    ([1., 2.], 'a batch is 1.0. Put the rows into one tensor'), (torch.tensor(3.), 'a batch is tensor(3.)'), (np.float32(3), 'data must be'),
    ([None], 'a batch is None'), (DataLoader, 'Pass an instance of the class DataLoader.'), (0.5, 'data must be a tensor'), (object(), 'got object')],
    ids=lambda o: type(o).__name__)
def test_what_is_no_data_is_named(data, text):
    m = Args('x')
    before = {k: v.clone() for k,v in m.state_dict().items()}
    for call in (lambda: FC_Decomposer().plan(m, data), lambda: FC_Decomposer(.25).decompose(m, data, inplace=True), lambda: calibrate(m, data),
                 lambda: compare_models(m, copy.deepcopy(m), data)):
        with pytest.raises(TypeError) as e: call()
        assert text in str(e.value) and 'data must be' in str(e.value) and len(str(e.value)) < 200
    assert m.training and type(m.fc) is nn.Linear and all(torch.equal(v, before[k]) for k,v in m.state_dict().items())
    assert not m._forward_hooks and not m.fc._forward_hooks and all(p.requires_grad for p in m.parameters())

@pytest.mark.parametrize('data,note', [({'x': [1., 2.]}, 'x=list of 2 float. Batches'),
    (X.to_sparse(), 'sparse float32(12, 8). Batches hold dense tensors'), ([X.tolist()], 'Batches hold dense tensors'), (X[:,:3], 'float32(12, 3).')])
def test_what_the_model_cannot_take_is_noted(data, note):
    m = Args('x')
    calls = [lambda: FC_Decomposer().plan(m, data), lambda: calibrate(m, data)]
    if 'sparse' not in note:    # the model itself can take it
        calls += [lambda: compare_models(m, copy.deepcopy(m), data), lambda: refine(FC_Decomposer(.5).decompose(m), m, data)]
    for call in calls:
        with pytest.raises(Exception) as e: call()
        assert sys.version_info < (3, 11) or sum(note in o for o in e.value.__notes__) == 1

class Reader(nn.Module):
    "Tokenizes by itself: one row of numbers for each text"
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
    def forward(self, texts): return self.fc(torch.tensor([[float(len(t) + i) for i in range(8)] for t in texts]))

@pytest.mark.parametrize('data,what', [(['a', 'b'], 'got a list of str'), (('a', 'b', 'c', 'd'), 'got a tuple of str'), ([(['a']*3, Y)], 'and a batch is a tuple of str and Tensor'),
    (DataLoader(['a', 'b', 'c'], batch_size=2), 'and a batch is a list of str'), ({'x': ['a', 'b']}, 'got a dict of str'), (np.array(['a', 'b']), 'got an array of str')])
def test_text_is_to_be_tokenized(data, what):
    m = Args('x')
    for call in (lambda: FC_Decomposer().plan(m, data), lambda: calibrate(m, data), lambda: compare_models(m, copy.deepcopy(m), data)):
        with pytest.raises(TypeError, match=f'^data must be batches of tensors, {what}: tokenize first, and pass what the tokenizer returns.$'): call()

def test_a_model_may_tokenize_and_text_may_lie_beside_numbers():
    m = Reader()
    got = calibrate(m, [['a', 'bcd']])['fc']
    assert got.rows == 2 and got.mean.tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert calibrate(m, DataLoader(['a', 'bcd', 'ef'], batch_size=2))['fc'].rows == 3
    assert calibrate(Args('x'), {'x': X, 'text': ['a']*12})['fc'].rows == 12
    with pytest.raises(ValueError, match="the batch has 'text'. Tokenize the text first.$"): calibrate(Args('x'), {'text': ['a']})

@pytest.mark.parametrize('data,model,note', [(X, 'half', 'The batch is float32, the model float16: pass data in its dtype, or call model.float().'),
    (X.double(), 'float', 'The batch is float64, the model float32: pass data in its dtype, or call model.double().'),
    ((X*9).byte(), 'bfloat16', 'The batch is uint8, the model bfloat16: pass data in its dtype.')])
def test_another_dtype_is_noted(data, model, note):
    m = getattr(Args('x'), model)()
    with pytest.raises(RuntimeError) as e: FC_Decomposer().decompose(m, data)
    assert sys.version_info < (3, 11) or e.value.__notes__[-1].endswith(note)
    with pytest.raises(RuntimeError) as e: FC_Decomposer().decompose(m, data[:,:3].to(m.fc.weight.dtype))
    assert sys.version_info < (3, 11) or 'the model' not in e.value.__notes__[-1]

def test_samples_and_numpy_work():
    m = Args('x')
    whole = calibrate(m, X)['fc']
    for data in ([*TensorDataset(X, Y)], [*X], X.numpy(), X.numpy().astype('float64'), [(X.numpy(), Y.numpy())], {'x': X.numpy()}):
        got = calibrate(m, data)['fc']
        assert got.rows == 12 and torch.allclose(got.cov, whole.cov, atol=1e-6)

def test_an_iterator_serves_once():
    m,it = Args('x'),iter([X, X])
    calibrate(m, it)
    with pytest.raises(ValueError, match='An iterator can be gone through only once: pass a list.'): calibrate(m, it)
    with pytest.raises(ValueError, match=r'data has no batches\.$'): calibrate(m, [])

def test_keys_of_a_dict_are_not_listed_without_end():
    with pytest.raises(ValueError) as e: calibrate(Args('x'), {f'key{i}': X for i in range(500)})
    assert "forward of M takes x; the batch has 'key0'" in str(e.value) and len(str(e.value)) < 200
