"""Every method of this library alone, all of them in the chain, and what else a user would pick, on networks that were trained.

The metric on data that no search saw, bytes, and times in PyTorch and in ONNX Runtime. README.md beside this file says how to run it and what each column means.
"""
import os, platform, subprocess, sys, tempfile, time, warnings
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
ROOT = Path(__file__).resolve().parent.parent
sys.path = [p for p in sys.path if Path(p or '.').resolve() != ROOT/'benchmarks']     # onnx.py beside this file is not the package
import numpy as np, torch, torch.nn.functional as F
from fastcore.script import call_parse
from torch import nn

SEED,PEER = 0,'0.4.1'

def _log(*s): print(*s, file=sys.stderr, flush=True)

def _other(name):
    "Another script of this folder, as a module"
    was,sys.path = sys.path,[*sys.path, str(ROOT/'benchmarks')]
    try: return __import__(name)
    finally: sys.path = was

session,turns = _other('turns').session,_other('turns').turns

# Networks: what they are calibrated on, searched on and tested on

@dataclass
class Case:
    name: str
    model: nn.Module
    data: list                  # batches to calibrate on, without answers
    search: list                # batches and answers for `evaluate`; None stands for the answers of the dense network
    test: list                  # others, for the table
    metric: str = 'accuracy'    # 'agreement' with the dense network, 'cosine' to its embeddings
    drop: float = .01           # that is allowed
    head: str = ''              # its last layer
    few: int = 8                # batches for what looks at the data once

    def __post_init__(self): self.search,self.test = self._answered(self.search),self._answered(self.test)

    @torch.no_grad()
    def _answered(self, batches): return [(x, _call(self.model, x) if y is None else y) for x,y in batches]

    @torch.no_grad()
    def score(self, run, batches):
        "The metric of `run`, which takes a batch"
        found = []
        for x,y in batches:
            z = run(x)
            if self.metric == 'cosine': found.append(F.cosine_similarity(z, y))
            else: found.append((z.argmax(1) == (y if y.ndim == 1 else y.argmax(1))).float())
        return float(torch.cat(found).mean())

    def evaluate(self, model): return self.score(partial(_call, model), self.search)

def _call(model, x): return model(**x) if isinstance(x, dict) else model(x)

def _on_digits(name, build, size, cache, epochs):
    "A network of `prune.py`; half of the images that it was not trained on is for the search, the other half for the table"
    p = _other('prune')
    train,valid,y = p._split()
    def batches(ix, seeds): return [(b, t) for s in seeds for b,t in zip(p._digits(ix, size, s).split(90), y[ix].split(90))]
    model = p._train(build, size, epochs, cache, name).requires_grad_(False)
    return Case(name, model, [*p._digits(train[:512], size, 77).split(64)], batches(valid[:180], range(5, 8)), batches(valid[180:], range(10**6, 10**6 + 3)))

def resnet18(cache):
    c = _on_digits('ResNet18', _other('prune')._resnet, 64, cache, 8)
    c.head = 'fc'
    return c

def vit(cache):
    c = _on_digits('ViT', _other('prune')._vit, 32, cache, 16)
    c.head = 'head'
    return c

def vgg(cache):
    _other('quality')       # which it needs
    model,data,test = _other('quantize')._vgg(cache)
    return Case('VGG16-bn', model, [d.contiguous() for d in data[:6]], test[:len(test)//2], test[len(test)//2:], head='classifier.6')

def lite(cache):
    p = _other('prune')
    case = p._lite(cache, n=256)
    _other('quality')
    plain = _other('quantize')._plain_convs(case.model)     # its own convolutions pad first, which only some methods take
    crops = [[(b, None) for b in p._plain_crops(names, 300, 128, s).split(50)] for s,names in enumerate((p.TEST[::2], p.TEST[1::2]))]
    return Case('EfficientNet-Lite0', plain, case.data, *crops, metric='agreement', drop=.05, head='_fc')

class _Encoder(nn.Module):
    "Sentence embeddings"
    def __init__(self, m):
        super().__init__()
        self.m = m
    def forward(self, input_ids, attention_mask):
        h,k = self.m(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state,attention_mask[..., None].float()
        return F.normalize((h*k).sum(1)/k.sum(1), dim=-1)

def minilm(cache):
    case = _other('prune')._minilm(cache)
    def kept(bs): return [{k: b[k] for k in ('input_ids', 'attention_mask')} for b in bs]
    return Case('MiniLM', _Encoder(case.model).eval(), kept(case.data), [(b, None) for b in kept(case.train)[::2]], [(b, None) for b in kept(case.test)],
                metric='cosine', drop=.015)

CASES = dict(resnet18=resnet18, vgg=vgg, vit=vit, lite=lite, minilm=minilm)

# Candidates

@dataclass
class Row:
    what: str
    score: float                        # on the test
    nbytes: int                         # of the file, or of what the model stores
    model: nn.Module|None = None        # for times in PyTorch
    path: Path|None = None              # for times in ONNX Runtime
    good: bool = True                   # within the drop on the data of the search?
    note: str = ''
    times: dict = field(default_factory=dict)

def _feed(sess, x): return {i.name: (x[i.name] if isinstance(x, dict) else x).numpy() for i in sess.get_inputs()}

def _ran(sess, x): return torch.from_numpy(sess.run(None, _feed(sess, x))[0])

class Run:
    "What is made of one network: models and files, judged on the same data"
    def __init__(self, case, tmp):
        self.case,self.tmp,self.rows = case,Path(tmp),[]
        self.first = case.evaluate(case.model)
        self.float = self.exported(case.model)

    def good(self, value): return value >= self.first - self.case.drop - 1e-9

    def exported(self, model):
        from fasterai.export.onnx import export_onnx
        path = self.tmp/f'{len([*self.tmp.iterdir()])}.onnx'
        return export_onnx(model, path, self.case.data[:1], n_batches=1, latency=False, rtol=.05).path

    def add(self, what, model=None, path=None, nbytes=None, note=''):
        "A row; size and metric are those of the file, where there is one"
        case,run = self.case,partial(_ran, session(path)) if path else partial(_call, model)
        n = nbytes or (os.path.getsize(path) if path else _stored(model))
        self.rows.append(Row(what, case.score(run, case.test), n, model, path, self.good(case.score(run, case.search)), note))
        _log(f'{case.name}: {what}: {self.rows[-1].score:.4f}, {n/1e6:.2f} MB {note}')

    def model(self, what, model, note=''): self.add(what, model, self.exported(model), note=note)

    def attempt(self, what, f):
        "A row, or why there is none; other tools may fail in any way"
        start = time.perf_counter()
        try: f()
        except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError, IndexError, KeyError, AssertionError) as e:
            self.rows.append(Row(what, float('nan'), 0, note=' '.join(f'{type(e).__name__}: {e}'.split())[:160]))
            _log(f'{self.case.name}: {what}: {self.rows[-1].note}')
        _log(f'{self.case.name}: {what}: {time.perf_counter() - start:.0f} s')

def _stored(model): return sum(t.nbytes for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())

# This library

def alone(run, name):
    "One step with its own search"
    from fasterai.workflow.steps import STEPS, Goal
    c = run.case
    kw = dict(max_drop=c.drop, higher_is_better=True, metric=c.metric)
    plan,why = STEPS[name](c.model, c.evaluate, c.data, Goal('latency', target='onnx'), **kw)
    if plan is None: raise ValueError('no budget keeps the metric')
    if name == 'quantize': run.add('quantize, int8', plan.apply(c.model), note='a model of PyTorch')     # files have int8 of their own
    else: run.model(name, plan.apply(c.model))

def bits(run):
    "The fewest bits"
    from fasterai.quantize.search import bit_find
    c = run.case
    found = bit_find(c.model, c.evaluate, c.data, max_drop=c.drop, higher_is_better=True, metric=c.metric, embeddings=4)
    if found.plan is None: raise ValueError('no budget keeps the metric')
    run.add('fewest bits', found.plan.apply(c.model), note='a file of PyTorch')

def sparse(run):
    "As many zeros as keep the metric"
    from fasterai.sparse.find import find_sparse
    from fasterai.sparse.resolve import sparse_moments
    from fasterai.sparse.sparsifier import Sparsifier
    from fasterai.sparse.storage import save_sparse
    c,best = run.case,None
    names = [o for o in find_sparse(c.model) if o.reason is None and o.name != c.head]
    stats = sparse_moments(c.model, c.data, names, c.few)
    for s in (.3, .5, .7, .8, .9):
        m = Sparsifier(s, layers=[o.name for o in names]).plan(c.model, stats).apply(c.model)
        if not run.good(c.evaluate(m)): break
        best = s,m
    if best is None: raise ValueError('30 % zeros lose too much')
    path = run.tmp/'sparse.safetensors'
    save_sparse(best[1], path)
    run.add('sparse', best[1], nbytes=os.path.getsize(path), note=f'{best[0]:.0%} zeros, a file of PyTorch')

def chain(run, goal):
    from fasterai.workflow.chain import compress
    c,path = run.case,run.tmp/f'chain_{goal}.onnx'
    r = compress(c.model, c.evaluate, c.data, max_drop=c.drop, metric=c.metric, target='onnx', path=path, goal=goal)
    _log(r)
    run.add('the chain, for time' if goal == 'latency' else 'the chain, for bytes', path=path, note=', '.join(r.frame[r.frame.kept].step[1:]))

# What else a user would pick

def ort_quantized(run):
    "ONNX Runtime's own tools as they are"
    from onnxruntime.quantization import quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    c,out,pre = run.case,run.tmp/'ort.onnx',run.tmp/'ort_pre.onnx'
    if any(isinstance(m, nn.Conv2d) for m in c.model.modules()) and c.name != 'ViT':
        class Reader:
            def __init__(self): self.left = iter(c.data[:c.few])
            def get_next(self): return next((_feed(session(run.float), x) for x in self.left), None)
        quant_pre_process(str(run.float), str(pre), skip_symbolic_shape=True)
        quantize_static(str(pre), str(out), Reader())
        run.add('ONNX Runtime, static int8', path=out)
    else:
        quantize_dynamic(str(run.float), str(out))
        run.add('ONNX Runtime, dynamic int8', path=out)

def torchao(run):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    m = deepcopy(run.case.model)
    quantize_(m, Int8DynamicActivationInt8WeightConfig())
    n = sum(_tensors(t) for t in m.state_dict().values())
    run.add('torchao, dynamic int8', m, nbytes=n)

def _tensors(t):
    "Bytes, also of a tensor made of others"
    if not hasattr(t, '__tensor_flatten__'): return t.nbytes
    return sum(_tensors(getattr(t, k)) for k in t.__tensor_flatten__()[0])

RATIOS = .9, .7, .5, .3

def _mildest_good(run, what, make):
    "The smallest share that keeps the metric, or the mildest one"
    best = None
    for r in RATIOS:
        m = make(r)
        if m is None: continue
        ok = run.good(run.case.evaluate(m))
        if ok or best is None: best = r,m
        if not ok: break
    if best is None: raise ValueError('it reaches no share of the MACs')
    run.model(what, best[1], f'{best[0]:.0%} of the MACs')

def torch_pruning(run):
    p,c = _other('prune'),run.case
    case = p.Case(c.name, c.model, c.data, [x for x,_ in c.test]) if not isinstance(c.data[0], dict) else None
    if case is None: raise ValueError('not tried on batches of keywords')
    def make(share):
        m = p._torch_pruning(case, share, False)
        return p._remeasured(m, c.data[:c.few]) if m is not None and any(isinstance(o, nn.BatchNorm2d) for o in m.modules()) else m
    _mildest_good(run, 'torch-pruning', make)

CODE = '''
import sys, torch
from torch import nn
path,out,how = sys.argv[1:]
model,x = torch.load(path, weights_only=False)
model.requires_grad_(True)
if how == 'FC_Decomposer':
    from fasterai.misc.fc_decomposer import FC_Decomposer
    model = FC_Decomposer().decompose(model, percent_removed=.5)
else:
    from fasterai.prune.pruner import Pruner
    from fasterai.core.criteria import large_final
    p = Pruner(model, 30, 'local', large_final, example_inputs=x)
    p.prune_model()
torch.save(model, out)
'''

def peer(run, how, folder):
    "The published package, in a process of its own"
    c = run.case
    wrapped = isinstance(c.model, _Encoder)
    torch.save((c.model.m if wrapped else c.model, c.data[0]), run.tmp/'peer.pt')
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', CODE, 'peer.pt', 'out.pt', how], cwd=run.tmp, capture_output=True, text=True,
        env=os.environ | dict(PYTHONPATH=os.pathsep.join([str(folder), *(p for p in os.environ.get('PYTHONPATH', '').split(os.pathsep) if p and Path(p).resolve() != ROOT)])))
    if r.returncode: raise RuntimeError(r.stderr.strip().splitlines()[-1])
    m = torch.load(run.tmp/'out.pt', weights_only=False).eval().requires_grad_(False)
    run.model(f'fasterai {PEER}, {how}', _Encoder(m).eval() if wrapped else m, '50 % of singular values' if how == 'FC_Decomposer' else '30 % of channels')

# Times: all take turns

def _rows_of(x, n):
    if isinstance(x, dict): return {k: _rows_of(v, n) for k,v in x.items()}
    return x[torch.arange(n) % len(x)].contiguous()

@torch.no_grad()
def timed(run, rounds=15):
    x = run.case.data[len(run.case.data)//2]
    for n in (1, 32):
        b,k = _rows_of(x, n),rounds if n == 1 else max(3, rounds//3)
        files,models = [r for r in run.rows if r.path],[r for r in run.rows if r.model is not None]
        def call(r):
            sess = session(r.path)
            return partial(sess.run, None, _feed(sess, b))
        for r,t in zip(files, turns([call(r) for r in files], k)): r.times['file', n] = t
        for r,t in zip(models, turns([partial(_call, r.model, b) for r in models], k)): r.times['model', n] = t

# Learners: a table and texts, through `learn.compress`

def _table_learner():
    "A synthetic table with gaps: three categories, four numbers"
    import pandas as pd
    from fastai.tabular.all import Categorify, CategoryBlock, FillMissing, Normalize, TabularDataLoaders, accuracy, tabular_learner
    rng,n = np.random.default_rng(SEED),6000
    df = pd.DataFrame(dict(job=rng.choice(['cook', 'nurse', 'clerk', 'smith'], n), level=rng.integers(1, 8, n), town=rng.integers(0, 40, n),
        age=np.where(rng.random(n) < .1, np.nan, rng.normal(40, 9, n)), hours=rng.normal(30, 5, n), pay=rng.gamma(3, 700, n), since=rng.uniform(0, 30, n)))
    risk = df.hours + 6*(df.job == 'cook') - .4*df.level*np.sin(df.town) + .003*df.pay - .05*(df.since - 12)**2 + rng.normal(0, 1, n)
    df['y'] = np.where(risk > risk.median(), 'yes', 'no')
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], cat_names=['job', 'level', 'town'],
        cont_names=['age', 'hours', 'pay', 'since'], y_names='y', y_block=CategoryBlock(), bs=64, valid_idx=[*range(n - 1500, n)])
    learn = tabular_learner(dls, layers=[1000, 500], metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 1e-3)
    return learn

def _text_learner():
    "Sentences of docstrings: about numbers, or about something else?"
    import importlib, inspect, random, re
    import pandas as pd
    from fastai.text.all import AWD_LSTM, BaseTokenizer, CategoryBlock, ColReader, ColSplitter, DataBlock, TextBlock, accuracy, awd_lstm_clas_config, text_classifier_learner
    kinds = dict(numbers='numpy scipy.stats scipy.signal scipy.linalg scipy.optimize sklearn.linear_model sklearn.cluster pandas torch torch.nn',
        other='argparse logging asyncio email json unittest pathlib shutil tarfile sqlite3 threading socket http.client urllib.request ssl typing ast inspect')
    found = {}
    for kind,mods in kinds.items():
        for m in map(importlib.import_module, mods.split()):
            for _,o in inspect.getmembers(m):
                docs = [inspect.getdoc(o) or ''] if callable(o) else []
                if inspect.isclass(o): docs += [inspect.getdoc(f) or '' for _,f in inspect.getmembers(o, callable)]
                for s in re.split(r'(?<=[.!?])\s+', ' '.join(docs).replace('\n', ' ')):
                    if 40 < len(s := s.strip()) < 200 and s[0].isupper() and '>>>' not in s: found.setdefault(s, kind)
    rng,by = random.Random(SEED),{k: sorted(s for s,v in found.items() if v == k) for k in kinds}
    n = min(1500, *map(len, by.values()))
    rows = [(s, k) for k,ss in by.items() for s in rng.sample(ss, n)]
    rng.shuffle(rows)
    df = pd.DataFrame(rows, columns=['text', 'kind']).assign(is_valid=lambda d: np.arange(len(d)) % 4 == 0)
    dls = DataBlock((TextBlock.from_df('text', tok=BaseTokenizer(), seq_len=72), CategoryBlock), get_x=ColReader('text'), get_y=ColReader('kind'),
        splitter=ColSplitter()).dataloaders(df, bs=32, device='cpu')
    config = awd_lstm_clas_config | dict(emb_sz=200, n_hid=400, n_layers=2)
    learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=config, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(5, 1e-2)
    return learn

LEARNERS = dict(table=('A table, TabularModel', _table_learner), text=('Texts, AWD_LSTM', _text_learner))

def learners(name):
    "Each step alone, and all of them; the metric is that of the validation set, on which the search looked too"
    from fasterai.workflow import learner as _
    title,make = LEARNERS[name]
    from fastai.torch_core import set_seed
    set_seed(SEED, reproducible=True)
    learn,lines = make(),['| steps | accuracy | MB | times smaller | times as fast in ONNX Runtime, batch 1 / 32 | |', '|---|---:|---:|---:|---:|---|']
    with tempfile.TemporaryDirectory() as tmp, learn.no_bar():
        for i,(steps,goal) in enumerate([(['prune'], 'latency'), (['decompose'], 'latency'), (['quantize'], 'latency'), (None, 'latency'), (None, 'bytes')]):
            r = learn.compress(steps=steps, goal=goal, target='onnx', path=Path(tmp)/f'{i}.onnx')
            _log(r)
            a,b = r.first,r.last
            if not i: lines.append(f'| float32 | {a.metric:.4f} | {a.mb:.2f} | 1.0 | 1.00 / 1.00 | {a.ms:.3g} and {a.ms32:.3g} ms |')
            what = steps[0] if steps else f'the chain, for {dict(latency="time").get(goal, goal)}'
            why = ', '.join(r.frame[r.frame.kept].step[1:]) if not steps else r.frame.iloc[-1].why
            lines.append(f'| {what} | {b.metric:.4f} | {b.mb:.2f} | {a.mb/b.mb:.1f} | {a.ms/b.ms:.2f} / {a.ms32/b.ms32:.2f} | {why} |')
            learn.uncompress() if r.plans else None
    return '\n'.join(lines),title

# The table

HEAD = '| method | {} | MB | times smaller | times as fast in ONNX Runtime, batch 1 / 32 | in PyTorch, batch 1 / 32 | |', '|---|---:|---:|---:|---:|---:|---|'

def _speeds(r, kind): return ' / '.join(f'{r.times[kind, n][1]:.2f}' for n in (1, 32)) if (kind, 1) in r.times else ''

def table(run):
    c,first = run.case,run.rows[0]
    lines = [HEAD[0].format(f'{c.metric} (drop allowed: {c.drop:g})'), HEAD[1]]
    for r in run.rows:
        if r.score != r.score: lines.append(f'| {r.what} | | | | | | {r.note} |')
        else:
            note = '; '.join(filter(None, [r.note, '' if r.good else '**loses more than is allowed**']))
            lines.append(f'| {r.what} | {r.score:.4f} | {r.nbytes/1e6:.2f} | {first.nbytes/r.nbytes:.1f} | {_speeds(r, "file")} | {_speeds(r, "model")} | {note} |')
    t = first.times
    said = f'float32 takes {t["file", 1][0]:.3g} and {t["file", 32][0]:.3g} ms in ONNX Runtime, {t["model", 1][0]:.3g} and {t["model", 32][0]:.3g} ms in PyTorch.'
    return '\n'.join([*lines, '', said])

OURS = 'the chain, for time', 'the chain, for bytes'
# layers this wide take minutes in each search
ELSEWHERE = {'VGG16-bn': {'prune': 'prune.md', 'sparse': 'sparse.md', 'fewest bits': 'quantize.md'}}
FLOORS = {'ResNet18': (4, 3), 'MiniLM': (4.5, 2), 'VGG16-bn': (30, 0)}     # times smaller, times as fast

def targets(run):
    "What must hold"
    rows,first,name = {r.what: r for r in run.rows},run.rows[0],run.case.name
    c,res = rows.get(OURS[0]),[]
    if c is None or c.score != c.score: return [(False, f'{name}: the chain')]
    def small(r): return first.nbytes/r.nbytes
    def fast(r): return min(r.times['file', n][1] for n in (1, 32))
    if name in FLOORS:
        a,b = FLOORS[name]
        best = max(small(r) for k,r in rows.items() if k in OURS and r.good)
        res.append((c.good and (small(c) if b else best) >= a and fast(c) >= b, f'{name}: at least {a} times smaller' + (f' and {b} times as fast' if b else '')))
    others = [r for k,r in rows.items() if k.startswith(('ONNX Runtime', 'torch-pruning', 'fasterai ')) and r.score == r.score and r.good]
    for r in others:
        res.append((any(small(o) >= small(r) for k,o in rows.items() if k in OURS and o.good), f'{name}: a file as small as that of {r.what}'))
        res.append((fast(c) >= .97*fast(r), f'{name}: a file as fast as that of {r.what}'))
    return res

def section(name, cache, rounds):
    case = CASES[name](cache)
    folder = _other('decompose')._install(cache)
    with tempfile.TemporaryDirectory() as tmp:
        run = Run(case, tmp)
        run.add('float32', case.model, run.float)
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in case.model.modules())
        ours = {s: partial(alone, run, s) for s in (*(['fold'] if norms else []), 'prune', 'decompose')} | {'sparse': partial(sparse, run),
            'quantize, int8': partial(alone, run, 'quantize'), 'fewest bits': partial(bits, run),
            OURS[0]: partial(chain, run, 'latency'), OURS[1]: partial(chain, run, 'bytes')}
        for what,f in ours.items():
            if (where := ELSEWHERE.get(case.name, {}).get(what)): run.rows.append(Row(what, float('nan'), 0, note=f'alone: see `{where}`'))
            else: run.attempt(what, f)
        run.attempt('ONNX Runtime, int8', partial(ort_quantized, run))
        run.attempt('torchao, dynamic int8', partial(torchao, run))
        run.attempt('torch-pruning', partial(torch_pruning, run))
        for how in ('FC_Decomposer', 'Pruner'): run.attempt(f'fasterai {PEER}, {how}', partial(peer, run, how, folder))
        timed(run, rounds)
        checks = '\n'.join(f'- {"met" if ok else "**missed**"}: {s}' for ok,s in targets(run))
        return f'{table(run)}\n\n{checks}', case.name

def _points(text):
    "Method -> (times smaller, times as fast at batch 1) of a section, for what keeps the metric"
    rows = [[c.strip() for c in l.strip('| ').split(' | ')] for l in text.splitlines() if l.startswith('| ')]
    head,rows = rows[0],rows[1:]
    i,j = next(k for k,h in enumerate(head) if h.startswith('times smaller')),next(k for k,h in enumerate(head) if 'ONNX Runtime' in h)
    return {r[0]: (float(r[i]), float(r[j].split(' / ')[0])) for r in rows if len(r) > j and '/' in r[j] and 'more than is allowed' not in r[-1]}

def picture(text, path):
    "What each way makes of each network, from the file `text`"
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    fig,ax = plt.subplots(figsize=(6.4, 4), layout='constrained')
    marks = {'the chain': 'o', 'ONNX Runtime': 's', 'torch-pruning': '^', 'fasterai 0': 'v'}
    parts = dict(p.split('\n', 1) for p in text.split('\n## ')[1:])
    for i,(name,t) in enumerate(parts.items()):
        for what,(x,y) in _points(t).items():
            if (m := next((v for k,v in marks.items() if what.startswith(k)), None)):
                ax.plot(x, y, m, color=f'C{i}', mfc=None if m == 'o' else 'none', ms=8 if m == 'o' else 6)
        ax.plot([], [], 'o', color=f'C{i}', label=name)
    for k,m in marks.items(): ax.plot([], [], m, color='black', mfc=None if m == 'o' else 'none', label=k + '.4.1'*(k == 'fasterai 0'))
    ax.axhline(1, color='gray', lw=.6)
    ax.set(xscale='log', yscale='log', xlabel='times smaller', ylabel='times as fast in ONNX Runtime, batch 1')
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter('{x:g}')
        axis.set_minor_formatter('')
    ax.set_xticks([1, 2, 5, 10, 20, 50, 100]), ax.set_yticks([.5, 1, 2, 5, 10, 20])
    ax.legend(fontsize=8, loc='upper left', bbox_to_anchor=(1, 1))
    fig.savefig(path, dpi=110)

def _merged(old, new):
    "The file with the sections `new` in the place of those of the same names"
    parts = dict(p.split('\n', 1) for p in ('\n' + old).split('\n## ')[1:]) | new
    return '\n'.join(['# All methods on real networks', '', *(f'## {n}\n\n{t.strip()}\n' for n,t in parts.items())])

@call_parse
def main(
    out:str='',         # Markdown file to write, or to replace the sections of that are run
    only:str='',        # sections, separated by commas: resnet18, vgg, vit, lite, minilm, table, text; all by default
    cache:str='',       # folder of the trained networks and of the published package; a temporary one by default
    picture_to:str='',  # picture to draw from the file `out`
    rounds:int=15,      # turns of a time at batch 1; a third of it at 32
    threads:int=1,      # threads of PyTorch and of ONNX Runtime
):
    "Compress networks by each method, by the chain and by other tools, and write a table for each network"
    warnings.filterwarnings('ignore')
    os.environ['TQDM_DISABLE'] = '1'
    torch.set_num_threads(threads)
    import fasterai
    from fastai.callback.progress import ProgressCallback
    wanted,there = only.split(',') if only else [*CASES, *LEARNERS],{**CASES, **LEARNERS}
    if (odd := [o for o in wanted if o not in there]): raise SystemExit(f'no section {odd[0]!r}; there are {", ".join(there)}.')
    libs = ', '.join(f'{k} {version(k)}' for k in ('torch', 'onnxruntime', 'torchao', 'torch-pruning'))
    where = f'{_other("decompose")._cpu()}, {threads} thread(s), Python {platform.python_version()}, {libs}, fasterai {fasterai.__version__}.'
    with tempfile.TemporaryDirectory() as tmp:
        for name in wanted:
            start = time.perf_counter()
            torch.manual_seed(SEED)
            text,title = learners(name) if name in LEARNERS else section(name, cache or tmp, rounds)
            text = f'{where} {time.perf_counter() - start:.0f} s.\n\n{text}'
            if not out: print(f'## {title}\n\n{text}\n')
            else: Path(out).write_text(_merged(Path(out).read_text(encoding='utf-8') if Path(out).exists() else '', {title: text}), encoding='utf-8')
    if picture_to: picture(Path(out).read_text(encoding='utf-8'), picture_to)
