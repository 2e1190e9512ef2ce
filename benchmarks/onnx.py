"""ONNX files of Learners and compressed networks: are they right, how large are they, how fast in ONNX Runtime, and what int8 costs.

README.md beside this file says how to run it and what each column means.
"""
import json, os, platform, subprocess, sys, tempfile, time, warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
ROOT = Path(__file__).resolve().parent.parent
sys.path = [p for p in sys.path if Path(p or '.').resolve() != ROOT/'benchmarks']     # this file is called as the package `onnx` is
import numpy as np, torch
from fastcore.script import call_parse
from torch import nn

PEER,SECTIONS = '0.4.1',('learners', 'files', 'cnn', 'lite', 'transformer')

def _log(*s): print(*s, file=sys.stderr, flush=True)

def _other(name):
    "Another script of this folder, as a module"
    sys.path.append(str(ROOT/'benchmarks'))
    try: return __import__(name)
    finally: sys.path[:] = [p for p in sys.path if p != str(ROOT/'benchmarks')]    # the script may have done so itself

def _md(head, rows, right):
    "A table; the columns from `right` on are numbers"
    return ['| ' + ' | '.join(head) + ' |', '|' + '|'.join(' --- ' if i < right else ' ---: ' for i in range(len(head))) + '|',
        *['| ' + ' | '.join(map(str, r)) + ' |' for r in rows]]

session = _other('turns').session

def ratios(calls, rounds):
    "Milliseconds of the first call, and the time of each relative to it"
    found = _other('turns').turns(calls, rounds)
    return found[0][0], [1/fast for _,fast in found]

def _feed(sess, *xs): return {i.name: np.asarray(x) for i,x in zip(sess.get_inputs(), xs)}

# Learners: `predict` of the file and of the Learner

def _digits(size, epochs, arch=None):
    from fastai.vision.all import accuracy, resnet18, vision_learner
    from fasterai.core.digits import digits_dls
    torch.manual_seed(0)
    learn = vision_learner(digits_dls(size, bs=64), arch or resnet18, pretrained=False, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 3e-3)
    return learn

def _table():
    import pandas as pd
    from fastai.tabular.all import Categorify, CategoryBlock, FillMissing, Normalize, TabularDataLoaders, tabular_learner
    rng,n = np.random.default_rng(0),1000
    df = pd.DataFrame(dict(job=rng.choice(['cook', 'nurse', 'Bäcker'], n), level=rng.choice([1, 2, 3], n),
        age=np.where(rng.random(n) < .1, np.nan, rng.normal(40, 9, n)), hours=rng.normal(30, 5, n)))
    df['y'] = np.where(df.hours + 5*(df.job == 'cook') + rng.normal(0, 2, n) > 31, 'yes', 'no')
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], cat_names=['job', 'level'], cont_names=['age', 'hours'],
        y_names='y', bs=64, y_block=CategoryBlock())
    learn = tabular_learner(dls, layers=[200, 100])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
    return learn,[df.iloc[i] for i in range(40)]

def _texts():
    import pandas as pd
    from fastai.text.all import AWD_LSTM, BaseTokenizer, CategoryBlock, ColReader, DataBlock, RandomSplitter, TextBlock, text_classifier_learner
    text = _other('prune')._sentences()[:400]
    df = pd.DataFrame(dict(text=text, label=['long' if len(t) > 90 else 'short' for t in text]))
    dls = DataBlock((TextBlock.from_df('text', tok=BaseTokenizer(), seq_len=72), CategoryBlock), get_x=ColReader('text'), get_y=ColReader('label'),
        splitter=RandomSplitter(seed=0)).dataloaders(df, bs=32, device='cpu')
    learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False)
    return learn,text[:40]

def _agree(learn, path, items, as_item=lambda o: o):
    "How many answers are the same, the largest difference of a probability"
    from fasterai.export.runtime import load_onnx_learner
    model,same,far = load_onnx_learner(path),0,0.
    for o in items:
        with learn.no_bar(): want = learn.predict(o)
        got = model.predict(as_item(o))
        same,far = same + int(int(got[1]) == int(want[1])),max(far, float(np.abs(np.asarray(want[2]) - got[2]).max()))
    return same,far

def learners(tmp, rounds):
    "The table, and what must hold"
    learn,rows,checks = _digits(32, 1),[],[]
    cases = [('digits, resnet18', learn, [o for o,_ in learn.dls.valid_ds.items[:40]], lambda o: o)]
    cases.append(('table', *_table(), lambda o: o))
    text,items = _texts()
    cases.append(('sentences, AWD_LSTM', text, items, lambda t: text.dls.test_dl([t]).one_batch()[0][0].tolist()))
    for name,l,items,as_item in cases:
        r = l.export_onnx(tmp/'learner.onnx', overwrite=True)
        same,far = _agree(l, tmp/'learner.onnx', items, as_item)
        rows.append([name, r.exporter, f'{r.nbytes/1e6:.2f}', f'{same} of {len(items)}', f'{far:.1e}', f'{r.error:.1e}'])
        checks += [(same == len(items), f'{name}: all answers as `learn.predict`'), (far <= 1e-5, f'{name}: probabilities to 1e-5')]
        _log(*rows[-1])
    return ['## Learners', '', 'Answers of `load_onnx_learner(path).predict` and of `learn.predict` on the same items.', '',
        *_md(['learner', 'exporter', 'file, MB', 'same answer', 'largest difference', 'error of the graph'], rows, 2)],checks

# Files: networks of many kinds, and the published package on the same

def _vgg():
    from torchvision.models import vgg16
    from fasterai.misc.fc_decomposer import FC_Decomposer
    return FC_Decomposer(rank_ratio=.1).decompose(vgg16()),(torch.randn(2, 3, 64, 64),)

def _pruned():
    from torchvision.models import resnet18
    from fasterai.prune.pruner import Pruner
    x = torch.randn(4, 3, 64, 64)
    return Pruner(.5).prune(resnet18(), x),(x,)

def _minilm():
    case = _other('prune')._minilm('')
    return case.model,tuple(case.test[3][k] for k in ('input_ids', 'attention_mask'))

def _quantized():
    from fasterai.quantize.quantizer import Quantizer
    model,args = _minilm()
    return Quantizer(4).quantize(model),args

def _vit():
    import timm
    return timm.create_model('vit_tiny_patch16_224', img_size=64),(torch.randn(4, 3, 64, 64),)

def _bert():
    from transformers import BertConfig, BertModel
    cfg = BertConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, vocab_size=1000)
    return BertModel(cfg),(torch.randint(1000, (3, 24)), torch.ones(3, 24, dtype=torch.long))

def _unet():
    from fastai.vision.all import DynamicUnet, create_body, resnet18
    return DynamicUnet(create_body(resnet18(), 3, pretrained=False), 2, (64, 64)),(torch.randn(2, 3, 64, 64),)

def _tabular():
    from fastai.tabular.model import TabularModel
    return TabularModel([(10, 6), (5, 3)], 3, 2, [200, 100]),(torch.randint(5, (8, 2)), torch.randn(8, 3))

def _awd():
    from fastai.text.models.awdlstm import AWD_LSTM
    from fastai.text.models.core import get_text_classifier
    return get_text_classifier(AWD_LSTM, 1000, 2),(torch.randint(2, 1000, (4, 40)),)

FILES = {'VGG16, pairs at a tenth of the ranks': _vgg, 'resnet18, half of the MACs': _pruned, 'MiniLM, 4 bits': _quantized, 'ViT-tiny': _vit,
    'BERT, 2 layers': _bert, 'DynamicUnet': _unet, 'TabularModel': _tabular, 'AWD_LSTM classifier': _awd}

def _build(name):
    torch.manual_seed(0)
    model,args = FILES[name]()
    for m in model.modules():
        if getattr(m, 'running_var', None) is not None: m.running_var.uniform_(.5, 2), m.running_mean.normal_(0, .3)
    return model.eval(),args

def _outs(o):
    if isinstance(o, torch.Tensor): return [o]
    return [t for c in (o.values() if hasattr(o, 'values') else o) for t in _outs(c)] if o is not None else []

def _sized(args, n): return tuple(a[torch.arange(n) % len(a)] for a in args)

def peer(path):
    "What the published package makes of the network in the file `path`, as JSON"
    import fasterai
    from fasterai.export.onnx_exporter import export_onnx
    model,args,long = torch.load(path, weights_only=False)
    out = Path(path).with_suffix('.peer.onnx')
    try: export_onnx(model, args if len(args) > 1 else args[0], out, input_names=[f'x{i}' for i in range(len(args))])
    except Exception as e: return dict(failed=f'{type(e).__name__}: {str(e).splitlines()[0][:80]}')
    sess,found = session(out),{}
    for what,xs in dict(traced=args, other=_sized(args, len(args[0])+1), one=_sized(args, 1), **({'length': long} if long else {})).items():
        with torch.no_grad():
            if callable(getattr(model, 'reset', None)): model.reset()
            want = _outs(model(*xs))[0].numpy()
        try: got = sess.run(None, {i.name: x.numpy() for i,x in zip(sess.get_inputs(), xs)})[0]
        except Exception as e: found[what] = 'fails'
        else: found[what] = float(np.abs(got - want).max()/np.abs(want).max()) if got.shape == want.shape else 'fails'
    return found

def _peer_says(tmp, name, model, args, long, folder):
    try: torch.save((model, args, long), tmp/'network.pt')
    except (AttributeError, TypeError) as e: return f'not tried ({type(e).__name__})'
    code = f'import importlib.util as u; s = u.spec_from_file_location("script", {str(Path(__file__).resolve())!r}); m = u.module_from_spec(s); ' \
        f's.loader.exec_module(m); import json; print("RESULT" + json.dumps(m.peer({str(tmp/"network.pt")!r})))'
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env=os.environ | dict(PYTHONPATH=str(folder)), capture_output=True, text=True, cwd=tmp)
    line = next((l[6:] for l in run.stdout.splitlines() if l.startswith('RESULT')), None)
    if line is None: return 'needs classes of this library' if 'No module named' in run.stderr else f'fails: {run.stderr.splitlines()[-1][:80]}'
    r = json.loads(line)
    if 'failed' in r: return f'fails: {r["failed"]}'
    bad = [k for k,v in r.items() if v == 'fails']
    wrong = max((v for v in r.values() if v != 'fails'), default=0)
    return '; '.join(filter(None, [f'error {wrong:.0e}', f'fails at: {", ".join(bad)}' if bad else '']))

def files(tmp, rounds, cache=None):
    from fasterai.export.onnx import export_onnx
    folder,rows,checks = _other('decompose')._install(cache or tmp),[],[]
    for name in FILES:
        model,args = _build(name)
        ids = not args[0].is_floating_point() and 'Tabular' not in name
        long = tuple(torch.cat([a, a[:,:5]], 1) for a in args) if ids else None
        theirs = _peer_says(tmp, name, model, args, long, folder)
        data = dict(zip(('input_ids', 'attention_mask'), args)) if len(args) == 2 and ids else [args if len(args) == 1 else dict(zip(('x_cat', 'x_cont'), args))]
        try: r = export_onnx(model, tmp/'file.onnx', data, latency=False, overwrite=True)
        except ValueError as e:
            rows.append([name, f'refused: {str(e)[:120]}', '', '', '', '', theirs])
            checks.append((False, f'{name}: a file'))
            _log(*rows[-1])
            continue
        tried = ', '.join(dict.fromkeys(t.what for t in r.trials[1:] if 'data' not in t.what))
        rows.append([name, r.exporter, tried, f'{r.source_bytes/1e6:.2f}', f'{r.nbytes/1e6:.2f}', f'{r.error:.0e}', theirs])
        checks.append((bool(r) and r.error < 1e-3, f'{name}: the file answers as the network at all shapes'))
        _log(*rows[-1])
    return ['## Files', '', 'Random weights and statistics, but for MiniLM. *error*: the largest difference of an output in any run, relative to its largest value.', '',
        *_md(['network', 'exporter', 'tried besides the traced batch', 'model, MB', 'file, MB', 'error', f'fasterai {PEER}'], rows, 3)],checks

# Convolutions: fold and static int8

def _accuracy(path, learn):
    from fasterai.export.runtime import ONNXModel
    model,items = ONNXModel(path),learn.dls.valid_ds.items
    return sum(model.predict(o)[1] == int(y) for o,y in items)/len(items)

def cnn(tmp, rounds, size=64):
    from fasterai.quantize import learner as _      # quantize
    learn = _digits(size, 4)
    dense = learn.export_onnx(tmp/'dense.onnx', fold=False)
    whole = learn.export_onnx(tmp/'folded.onnx')
    small = learn.quantize_onnx(tmp/'folded.onnx', tmp/'int8.onnx')
    bits = learn.quantize(4).export_onnx(tmp/'bits.onnx')
    names,sizes = ('dense.onnx', 'folded.onnx', 'int8.onnx', 'bits.onnx'),[r.nbytes for r in (dense, whole, small, bits)]
    sess,acc,rows = [session(tmp/n) for n in names],[_accuracy(tmp/n, learn) for n in names],[]
    times = {}
    for b in (1, 32):
        x = np.random.default_rng(0).integers(0, 256, (b, size, size, 3), dtype=np.uint8)
        times[b] = ratios([partial(s.run, None, dict(image=x)) for s in sess], rounds if b == 1 else max(3, rounds//4))
    for i,n in enumerate(('float32, as exported', 'float32, folded first', 'static int8', 'weights in 4 bits')):
        rows.append([n, f'{sizes[i]/1e6:.2f}', f'{sizes[i]/sizes[0]:.3f}', *(f'{times[b][1][i]:.2f}' for b in times), f'{acc[i]:.4f}'])
        _log(*rows[-1])
    checks = [(times[1][1][2] <= .45, 'resnet18 int8: at most .45 of the time at batch 1'), (sizes[2] <= .27*sizes[0], 'resnet18 int8: at most .27 of the size'),
        (acc[2] >= acc[0] - .005, 'resnet18 int8: accuracy within half a point'),
        (sizes[3] <= .16*sizes[0] and all(times[b][1][3] <= 1.05 for b in times), 'resnet18 in 4 bits: at most .16 of the size, in the time of float32')]
    return ['## A convolutional network', '', f'A vision learner (resnet18) on digits of {size}×{size} pixels, four epochs. '
        f'float32: {times[1][0]:.1f} ms at batch 1, {times[32][0]:.0f} ms at batch 32.', '',
        *_md(['file', 'MB', 'size', 'time, batch 1', 'time, batch 32', 'accuracy'], rows, 1)],checks

def lite(tmp, rounds):
    from fasterai.export.int8 import quantize_onnx
    from fasterai.export.onnx import export_onnx
    other = _other('prune')
    case = other._lite('', n=256)
    r = export_onnx(case.model, tmp/'lite.onnx', case.test[0][:4], latency=False)
    x = torch.cat(case.test)
    forms = [('per channel', {}), ('min_agreement=.95', dict(min_agreement=.95)), ('min_agreement=.98', dict(min_agreement=.98))]
    sess = [session(tmp/'lite.onnx')]
    name = sess[0].get_inputs()[0].name
    dense = np.concatenate([sess[0].run(None, {name: o.numpy()})[0] for o in case.test])
    rows,reports = [],[]
    for i,(what,kw) in enumerate(forms):
        reports.append(quantize_onnx(tmp/'lite.onnx', tmp/f'lite{i}.onnx', [*torch.cat(case.data).split(16)], **kw))
        sess.append(session(tmp/f'lite{i}.onnx'))
    t = {b: ratios([partial(s.run, None, {name: x[:b].numpy()}) for s in sess], rounds if b == 1 else max(3, rounds//4)) for b in (1, 32)}
    for i,(what,_) in enumerate([('float32', {}), *forms]):
        y = np.concatenate([sess[i].run(None, {name: o.numpy()})[0] for o in case.test])
        agree = float((y.argmax(1) == dense.argmax(1)).mean())
        rows.append([what, f'{((r, *reports)[i]).nbytes/1e6:.2f}', *(f'{t[b][1][i]:.2f}' for b in t), f'{agree:.3f}', f'{np.linalg.norm(y - dense)/np.linalg.norm(dense):.3f}',
            '' if not i else reports[i-1].notes[0].split(': ')[0]])
        _log(*rows[-1])
    best = max(float(o[4]) for o in rows[1:])
    return ['## EfficientNet-Lite0', '', 'ImageNet weights; ranges from 256 mosaics of photographs, agreement with float32 on 600 crops of other ones (128×128).', '',
        *_md(['file', 'MB', 'time, batch 1', 'time, batch 32', 'agreement', 'error', 'layers'], rows, 1)],[(best >= .95, 'EfficientNet-Lite0 int8: at least .95 of the answers are those of float32')]

# Transformers

class _Encoder(nn.Module):
    "Sentence embeddings"
    def __init__(self, m):
        super().__init__()
        self.m = m
    def forward(self, input_ids, attention_mask):
        h,k = self.m(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state,attention_mask[...,None].float()
        return nn.functional.normalize((h*k).sum(1)/k.sum(1), dim=-1)

def _joined(src, dst):
    "The file as an exporter writes it, with sums that ONNX Runtime joins with the layer norms behind them; its bytes"
    import onnx
    proto = onnx.load(str(src))
    made = {o: n for n in proto.graph.node for o in n.output}
    for n in proto.graph.node:
        if n.op_type == 'LayerNormalization' and n.input[0] in made and made[n.input[0]].op_type == 'Sum': made[n.input[0]].op_type = 'Add'
    onnx.save_model(proto, str(dst))
    return os.path.getsize(dst)

def transformer(tmp, rounds):
    from fasterai.export.int8 import quantize_onnx
    from fasterai.export.onnx import export_onnx
    from fasterai.quantize.formats import Int
    from fasterai.quantize.quantizer import Quantizer
    case = _other('prune')._minilm('')
    def kept(b): return {k: b[k] for k in ('input_ids', 'attention_mask')}
    cal,test = [[kept(b) for b in o] for o in (case.data, case.test)]
    made = {'float32': export_onnx(_Encoder(case.model), tmp/'float32.onnx', cal[0], latency=False).nbytes}
    ways = {'ONNX Runtime as it is': dict(rows=False), 'the same, tables in 4 bits': dict(rows=False, embeddings=4), 'rows to one': dict(smooth=False),
        'rows to one, smoothed': {}, 'the same, tables in 8 bits': dict(embeddings=True)}
    for i,(name,kw) in enumerate(ways.items()): made[name] = quantize_onnx(tmp/'float32.onnx', tmp/f'd{i}.onnx', cal[:8], **kw).nbytes
    for name,src in (('float32, sums and norms joined', 'float32'), ('ONNX Runtime as it is, sums and norms joined', 'd0')):
        made[name] = _joined(tmp/f'{src}.onnx', tmp/f'j{src}.onnx')
    formats = {'Quantizer(8), MatMulNBits': Int(8), "Int(8, activations='dynamic'), MatMulNBits": Int(8, activations='dynamic'), 'Quantizer(4), MatMulNBits': Int(4)}
    for i,(name,f) in enumerate(formats.items()):
        model = _Encoder(Quantizer(f, layers='encoder').quantize(case.model, case.data[:4]))
        try: made[name] = export_onnx(model, tmp/f'q{i}.onnx', cal[0], latency=False, rtol=.2).nbytes
        except ValueError as e: _log(name, e)
    paths = ['float32.onnx', *(f'd{i}.onnx' for i in range(len(ways))), 'jfloat32.onnx', 'jd0.onnx', *(f'q{i}.onnx' for i,n in enumerate(formats) if n in made)]
    sess = [session(tmp/p) for p in paths]
    feeds = [{k: v.numpy() for k,v in b.items()} for b in test]
    outs = [np.concatenate([s.run(None, f)[0] for f in feeds]) for s in sess]
    cosine = [float((o*outs[0]).sum(1).mean()) for o in outs]
    mid = feeds[len(feeds)//2]
    t = {b: ratios([partial(s.run, None, {k: v[:b] for k,v in mid.items()}) for s in sess], rounds if b == 1 else max(3, rounds//4)) for b in (1, 32)}
    rows = [[n, f'{size/1e6:.1f}', f'{cosine[i]:.4f}', *(f'{1/t[b][1][i]:.2f}' for b in t)] for i,(n,size) in enumerate(made.items())]
    for r in rows: _log(*r)
    good = [i for i,c in enumerate(cosine) if i and c >= .9975]
    fast = max((1/t[1][1][i] for i in good), default=0)
    return ['## A transformer', '', f'MiniLM, sentence embeddings; cosine to float32 on 512 sentences, times at {mid["input_ids"].shape[1]} tokens. '
        f'float32: {t[1][0]:.1f} ms at batch 1, {t[32][0]:.0f} ms at batch 32.', '',
        *_md(['file', 'MB', 'cosine', 'times as fast, batch 1', 'batch 32'], rows, 1)],[(fast >= 1.6, 'MiniLM int8: 1.6 times as fast at a cosine of at least .9975')]

# What `only` leaves out stays in the file

HEADS = dict(learners='Learners', files='Files', cnn='A convolutional network', lite='EfficientNet-Lite0', transformer='A transformer')

def _sections(text):
    "Title -> body of each section of a file, the targets of each section in it"
    return {t: b.strip() for t,_,b in (p.partition('\n') for p in ('\n' + text).split('\n## ')[1:])}

def _merged(old, new):
    "The sections of the file `old` with those of `new` in their places, in the order of `HEADS`"
    parts = {t: b for t,b in (_sections(old) | new).items() if t in HEADS.values()}
    return [l for t in HEADS.values() if t in parts for l in (f'## {t}', '', parts[t], '')]

@call_parse
def main(
    only: str = '',     # sections, separated by commas: learners, files, cnn, lite, transformer; all by default
    rounds: int = 30,   # turns of a time at batch 1; a quarter of it at larger ones
    cache: str = '',    # folder that keeps the published package; a temporary one by default
    out: str = '',      # Markdown file to write, or to replace the sections of that are run
):
    "Export, run and quantize ONNX files; exit code 1 where a target is missed"
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    warnings.simplefilter('ignore')
    wanted = only.split(',') if only else SECTIONS
    if (bad := [s for s in wanted if s not in SECTIONS]): raise SystemExit(f'no section {bad[0]!r}; there are {", ".join(SECTIONS)}.')
    import fasterai, fasterai.export.learner
    from fastai.callback.progress import ProgressCallback
    new,ok = {},True
    for s in wanted:
        with tempfile.TemporaryDirectory() as tmp:
            _log(f'# {s}')
            (_,_,*text),found = files(Path(tmp), rounds, cache or None) if s == 'files' else globals()[s](Path(tmp), rounds)
        targets = [f'- {"met" if good else "**missed**"}: {what}' for good,what in found]
        new[HEADS[s]],ok = '\n'.join([*text, '', *targets]).strip(),ok and all(good for good,_ in found)
    libs = ', '.join(f'{k} {version(k)}' for k in ('torch', 'onnx', 'onnxscript', 'onnxruntime', 'fastai', 'transformers', 'timm'))
    old = Path(out).read_text(encoding='utf-8') if out and Path(out).exists() else ''
    text = '\n'.join([f'# ONNX files of fasterai {fasterai.__version__}', '', '`python benchmarks/onnx.py`; sections can be run one by one (`--only`)', '',
        f'{_other("decompose")._cpu()}, {os.cpu_count()} cores, one thread; {platform.system()}, Python {platform.python_version()}, {libs}. '
        'Times are ratios of processor time, in turns.', '', *_merged(old, new)])
    print(text)
    if out: Path(out).write_text(text, encoding='utf-8')
    sys.exit(not ok)
