"The report against computations of its own"
import copy, math, warnings
import matplotlib, matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from fastai.vision.all import TensorImage
from matplotlib.ticker import EngFormatter
from torch import nn
from fasterai.core.modules import count_params, is_pair
from fasterai.lowrank.decide import make_plan, plot_spectra
from fasterai.lowrank.plan import DecompositionPlan
from fasterai.lowrank.ranks import ParamBudget
from fasterai.core.report import ModelComparison, compare_models, plot_tradeoff

matplotlib.use('agg')

@pytest.fixture(autouse=True)
def closed():
    torch.manual_seed(0)
    yield
    plt.close('all')

def mlp(bias=True): return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12, bias=bias), nn.ReLU(), nn.Linear(12, 5))
def some(n=40, d=20): return torch.randn(n, d) @ torch.randn(d, d) + torch.randn(d)
def plan_of(m, data=None, policy=.5, **kw): return make_plan(m, policy, data=data, quiet=True, **kw)
def fast(*args, **kw): return compare_models(*args, latency=False, **kw)
def error(before, after, xs):
    "Relative error of the output in float64"
    a,b = copy.deepcopy(before).double().eval(),copy.deepcopy(after).double().eval()
    with torch.no_grad(): pairs = [(a(x.double()), b(x.double())) for x in xs]
    return math.sqrt(sum((w - z).square().sum() for z,w in pairs)/sum(z.square().sum() for z,_ in pairs))

def layer_error(lin, pair, x):
    "Relative error of the output of a pair in float64"
    W,A,B,x = lin.weight.double(),pair[0].weight.double(),pair[1].weight.double(),x.double().flatten(0, -2)
    y,p = x @ W.T,x @ A.T @ B.T
    if lin.bias is None: return ((p - y).norm()/y.norm()).item()
    y,p = y + lin.bias.double(),p + pair[1].bias.double()
    return ((p - y).norm()/(y - y.mean(0)).norm()).item()

def inputs(model, xs, **kw):
    "What the linear layers of `model` get: name -> rows"
    seen,hooks = {},[]
    for n,m in model.named_modules():
        if type(m) is nn.Linear: hooks.append(m.register_forward_hook(lambda m,a,y,n=n: seen.setdefault(n, []).append(a[0].flatten(0, -2))))
    with torch.no_grad(): [model(x, **kw) for x in xs]
    for h in hooks: h.remove()
    return {n: torch.cat(v) for n,v in seen.items()}

# ------------------------------------------------------------------ sizes

def test_tied_weights_count_once():
    m = nn.Sequential(nn.Embedding(50, 8), nn.BatchNorm1d(8), nn.Linear(8, 50, bias=False))
    m[2].weight = m[0].weight
    t = compare_models(m, nn.Linear(8, 10).half()).table
    assert t.before.tolist() == [50*8 + 16, (50*8 + 16 + 16)*4/1e6 + 8/1e6]
    assert t.after.tolist() == [90, 180/1e6]
    assert list(t.index) == ['parameters', 'state (MB)'] and list(t.columns) == ['before', 'after', 'ratio']
    assert t.ratio['parameters'] == 90/416 and (t.dtypes == 'float64').all()

def test_a_model_without_parameters():
    t = fast(nn.ReLU(), nn.Identity(), torch.tensor([[1., -2.]])).table
    assert t.before['parameters'] == 0 and math.isnan(t.ratio['parameters'])
    assert t.after['output error'] == 2.

def test_sizes_need_no_memory():
    with torch.device('meta'): m = nn.Linear(10**5, 10**5)
    assert compare_models(m, nn.Linear(2, 2)).table.before['state (MB)'] == (10**10 + 10**5)*4/1e6
    with pytest.raises(ValueError, match='meta device cannot run'): compare_models(m, m, torch.ones(1, 10**5))

# ------------------------------------------------------------------ MACs

def test_macs_by_hand():
    m,conv = mlp(),nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 6, 1))
    plan = plan_of(m, policy=3)
    t = fast(m, plan.apply(m), [some(7), some(9)]).table
    assert t.before['MACs'] == 7*(20*16 + 16*12 + 12*5)        # of the first batch
    assert t.after['MACs'] == 7*3*(20+16 + 16+12 + 12+5)
    t = fast(conv, conv, torch.randn(5, 4, 10, 10)).table
    assert t.before['MACs'] == 5*25*(8*2*9 + 8*6) and t.ratio['MACs'] == 1 and t.after['output error'] == 0

def test_macs_of_fused_kernels():
    enc,x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),torch.randn(3, 5, 16)
    plan = plan_of(enc, policy=2)
    t = fast(enc, plan.apply(enc), x).table
    attention = 5*3*16*16 + 2*5*5*16
    assert t.before['MACs'] == 3*(attention + 5*(16*16 + 2*16*32))
    assert t.after['MACs'] == 3*(attention + 5*(16*16 + 2*(48 + 48))) + 2*16*16    # attention reads the product of out_proj
    assert torch.backends.mha.get_fastpath_enabled()
    lstm,on = nn.LSTM(6, 4, batch_first=True),torch.backends.mkldnn.enabled
    class Last(nn.Module):
        def __init__(self): super().__init__(); self.rnn = lstm
        def forward(self, x): return self.rnn(x)[0][:,-1]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        t = fast(Last(), Last(), torch.randn(2, 7, 6)).table
    assert t.before['MACs'] == 2*7*4*4*(6 + 4) and torch.backends.mkldnn.enabled == on

def test_macs_where_a_layer_gets_a_parameter():
    class Token(nn.Module):
        def __init__(self): super().__init__(); self.token,self.fc = nn.Parameter(torch.randn(1, 4)),nn.Linear(4, 3)
        def forward(self, x): return self.fc(self.token.expand(len(x), -1)) + self.fc(self.token)
    m = Token()
    assert fast(m, m, torch.zeros(5, 1)).table.before['MACs'] == 6*12
    assert all(p.requires_grad for p in m.parameters())

# ------------------------------------------------------------------ output error and latency

def test_output_error_over_all_batches():
    m,xs = mlp(),[some(11), some(30), some(4)]
    small = plan_of(m, policy=4).apply(m)
    res = fast(m, small, xs)
    assert res.table.after['output error'] == pytest.approx(error(m, small, xs), rel=1e-5)
    assert math.isnan(res.table.before['output error']) and '3 batches' in res.note
    one = fast(m, small, xs, n_batches=1)
    assert one.table.after['output error'] == pytest.approx(error(m, small, xs[:1]), rel=1e-5) and '1 batch;' in one.note
    assert fast(m, m, xs).table.after['output error'] == 0

def test_any_form_of_data():
    m,x,y = mlp(),some(),torch.zeros(40)
    small = plan_of(m, policy=4).apply(m)
    want = error(m, small, [x])
    ds = torch.utils.data.TensorDataset(x, y)
    for data in (x, x.numpy(), (x, y), [x[:15], x[15:]], [(x, y)], (o for o in x.split(7)), torch.utils.data.DataLoader(ds, 16),
                 dict(input=x, labels=y), TensorImage(x), lambda f: f(x), iter([(x[:20], y[:20]), (x[20:], y[20:])])):
        res = fast(m, small, data, plan=plan_of(m, policy=4))
        assert res.table.after['output error'] == pytest.approx(want, rel=1e-4), data
        assert res.layers.measured.notna().all()

def test_a_generator_is_read_once():
    m,xs = mlp(),[some(11), some(30)]
    plan,taken = plan_of(m, policy=4),[]
    def batches():
        for x in xs: taken.append(len(x)); yield x
    res = compare_models(m, plan.apply(m), batches(), plan=plan)
    assert taken == [11, 30]
    assert res.table.after['output error'] == pytest.approx(error(m, plan.apply(m), xs), rel=1e-5)
    assert (res.table.loc['latency (ms)'] > 0).all()

def test_infinities_of_both_and_padding_are_left_out():
    class Masked(nn.Module):
        def __init__(self): super().__init__(); self.fc = nn.Linear(6, 6)
        def forward(self, x, attention_mask=None): return dict(logits=self.fc(x).masked_fill(torch.arange(6) == 2, -math.inf), hidden=x*1e9)
    m = Masked()
    plan,x,mask = plan_of(m, policy=2),torch.randn(3, 4, 6),torch.ones(3, 4).long()
    small = plan.apply(m)
    mask[1,2:] = 0
    x[1,2:] = 100
    got = fast(m, small, dict(x=x, attention_mask=mask), plan=plan)
    keep,cols = mask.bool(),torch.arange(6) != 2
    z,w = [o(x)['logits'][keep][:,cols].double() for o in (m, small)]
    assert got.table.after['output error'] == pytest.approx(((w - z).norm()/z.norm()).item(), rel=1e-5)
    assert got.layers.measured[0] == pytest.approx(layer_error(m.fc, small.fc, x[keep]), rel=1e-5)

def test_outputs_that_cannot_be_compared():
    class Ids(nn.Linear):
        def forward(self, x): return super().forward(x).argmax(-1)
    t = fast(Ids(4, 3), Ids(4, 3), torch.randn(2, 4)).table
    assert math.isnan(t.after['output error']) and t.before['MACs'] == 24
    with pytest.raises(ValueError, match=r'before returns \(2, 3\), after returns \(2, 5\): outputs must agree in shape'):
        fast(nn.Linear(4, 3), nn.Linear(4, 5), torch.randn(2, 4))
    with pytest.raises(ValueError, match='after returns nothing of floating point'): fast(nn.Linear(4, 3), Ids(4, 3), torch.randn(2, 4))

def test_random_and_in_place_models_see_the_same():
    class Noisy(nn.Module):
        def __init__(self): super().__init__(); self.fc = nn.Linear(8, 8)
        def forward(self, x): return self.fc(F.dropout(x.mul_(2), .5, training=True))
    m,x = Noisy(),torch.randn(5, 8)
    kept,state = x.clone(),torch.get_rng_state()
    assert fast(m, copy.deepcopy(m), [x, x]).table.after['output error'] == 0
    assert torch.equal(x, kept) and torch.equal(torch.get_rng_state(), state)

def test_latency_is_measured_in_eval_mode():
    modes = []
    class Watched(nn.Linear):
        def forward(self, x): modes.append((self.training, torch.is_grad_enabled())); return super().forward(x)
    t = compare_models(Watched(4, 4), Watched(4, 4), torch.randn(2, 4)).table
    assert set(modes) == {(False, False)} and t.ratio['latency (ms)'] == t.after['latency (ms)']/t.before['latency (ms)']
    assert 'latency (ms)' not in fast(nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(2, 4)).table.index

# ------------------------------------------------------------------ layers

@pytest.mark.parametrize('calibrated', [False, True])
@pytest.mark.parametrize('bias', [False, True])
def test_layer_errors(bias, calibrated):
    m,xs = mlp(bias),[some(100), some(30)]
    plan = plan_of(m, xs if calibrated else None, policy=4)
    small = plan.apply(m)
    test = [some(50), some(60)]
    res = fast(m, small, test, plan=plan).layers
    seen = inputs(m, test)
    assert res.layer.tolist() == ['0', '2', '4'] and res['rank'].tolist() == [4]*3
    assert res.predicted.tolist() == [o.error for o in plan.replaced]
    for n,got in zip(res.layer, res.measured):
        assert got == pytest.approx(layer_error(m.get_submodule(n), small.get_submodule(n), seen[n]), rel=1e-5)
    assert set(res.remark) == {'' if calibrated else 'predicted for the weight'}

@pytest.mark.parametrize('sensitivity', [False, 'full', 'diag'])
def test_prediction_holds_on_the_data_of_the_plan(sensitivity):
    m,x = mlp(False),some(4000)
    plan = plan_of(m, x, policy=5, sensitivity=sensitivity)
    res = fast(m, plan.apply(m), list(x.split(1000)), plan=plan).layers
    np.testing.assert_allclose(res.measured, res.predicted, rtol=1e-4, atol=1e-6)

def test_layers_whose_weight_is_read():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc,self.attn = nn.Linear(16, 16),nn.MultiheadAttention(16, 2, batch_first=True)
        def forward(self, x): return self.attn(*[F.linear(x, self.fc.weight, self.fc.bias)]*3, need_weights=False)[0]
    m,x = Reads(),torch.randn(4, 6, 16)
    plan = plan_of(m, policy=5)
    small = plan.apply(m)
    res = fast(m, small, x, plan=plan).layers.set_index('layer')
    assert list(res.index) == ['fc', 'attn.out_proj']
    assert res.measured['fc'] == pytest.approx(layer_error(m.fc, small.fc, x), rel=1e-5)
    y = F.linear(x, m.fc.weight, m.fc.bias).detach()
    eye = copy.deepcopy(m.attn)
    eye.out_proj.weight.data,eye.out_proj.bias.data = torch.eye(16),torch.zeros(16)
    inner = eye(y, y, y, need_weights=False)[0]
    assert res.measured['attn.out_proj'] == pytest.approx(layer_error(m.attn.out_proj, small.attn.out_proj, inner), rel=1e-4)

def test_hooks_that_change_the_output_are_not_an_error_of_the_pair():
    m = mlp()
    m[0].register_forward_hook(lambda m,a,y: y*3)
    plan,x = plan_of(m, policy=4),some()
    small = plan.apply(m)
    assert fast(m, small, x, plan=plan).layers.measured[0] == pytest.approx(layer_error(m[0], small[0], x), rel=1e-5)

def test_full_rank_has_no_error():
    m,x = mlp(),some(200)
    plan = plan_of(m, x, policy=1.)
    res = fast(m, plan.apply(m), x, plan=plan)
    assert (res.layers.measured < 1e-5).all() and res.table.after['output error'] < 1e-5

def test_rows_that_cannot_be_counted():
    class Part(nn.Module):
        def __init__(self): super().__init__(); self.used,self.idle = nn.Linear(6, 6),nn.Linear(6, 6)
        def forward(self, x): return self.used(x)
    m,x = Part(),torch.randn(9, 6)
    plan = plan_of(m, policy=2)
    small = plan.apply(m)
    bad = x.clone()
    bad[3] = math.nan
    res = fast(m, small, bad, plan=plan).layers.set_index('layer')
    good = torch.cat([x[:3], x[4:]])
    assert res.measured['used'] == pytest.approx(layer_error(m.used, small.used, good), rel=1e-5)
    assert math.isnan(res.measured['idle']) and res.remark['idle'] == 'predicted for the weight; no finite row in the data'
    one = fast(m, small, x[:1], plan=plan).layers       # one row has no deviation
    assert math.isnan(one.measured[0]) and one.remark[0] == 'predicted for the weight; its output never varies'

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    m,x = mlp().to(dtype),some().to(dtype)
    plan = plan_of(m, policy=4)
    small = plan.apply(m)
    res,tol = fast(m, small, x, plan=plan),1e-6 if dtype == torch.float64 else .05
    assert res.table.after['output error'] == pytest.approx(error(m, small, [x]), rel=tol)
    assert res.layers.measured[0] == pytest.approx(layer_error(m[0], small[0], x), rel=tol)

def test_a_plan_of_the_whole_model():
    m,x = nn.Linear(20, 10),some()
    plan = plan_of(m, policy=3)
    res = fast(m, plan.apply(m), x, plan=plan)
    assert res.layers.layer.tolist() == ['(the model)'] and '(the model)' in repr(res)
    none = plan.edit('', None)
    assert len(fast(m, none.apply(m), x, plan=none).layers) == 0

# ------------------------------------------------------------------ left as found

def test_models_are_left_as_found():
    m = nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.Dropout(.5), nn.Linear(16, 8)).train()
    plan = plan_of(m, policy=3)
    small = plan.apply(m)
    small[1].eval()
    for p in small[0].parameters(): p.requires_grad_(False)
    def state(o): return ({k: v.clone() for k,v in o.state_dict().items()}, [c.training for c in o.modules()], [p.requires_grad for p in o.parameters()],
                          [p.grad for p in o.parameters()], [len(c._forward_hooks) + len(c._forward_pre_hooks) for c in o.modules()])
    def check(old, new):
        assert old[1:] == new[1:] and all(torch.equal(v, new[0][k]) for k,v in old[0].items())
    xs = [some(8), some(8)]
    bad,other = [xs[0], torch.randn(3, 7)],nn.Linear(20, 9)
    old,rng,threads = [state(o) for o in (m, small)],torch.get_rng_state(),torch.get_num_threads()
    compare_models(m, small, xs, plan=plan)
    with pytest.raises(RuntimeError): compare_models(m, small, bad, plan=plan)
    with pytest.raises(ValueError): compare_models(m, other, xs)
    for o,s in zip((m, small), old): check(s, state(o))
    assert torch.equal(rng, torch.get_rng_state()) and torch.get_num_threads() == threads and torch.is_grad_enabled()

# ------------------------------------------------------------------ errors and display

def test_errors_of_arguments():
    m = mlp()
    plan,x = plan_of(m, policy=4),some()
    small = plan.apply(m)
    class Learner: model = m
    for call,kind,text in (
        (lambda: compare_models('a.pt', m), TypeError, 'before must be a torch.nn.Module, got str.'),
        (lambda: compare_models(m, Learner()), TypeError, 'after must be a torch.nn.Module, got Learner; pass learn.model.'),
        (lambda: compare_models(m, small, plan=plan), ValueError, 'errors of layers are measured on data: pass data= with plan=.'),
        (lambda: compare_models(m, small, x, plan=.5), TypeError, 'plan must be a Plan, such as FC_Decomposer makes, got float.'),
        (lambda: compare_models(m, m, x, plan=plan), ValueError, "plan makes '0' a pair of rank 4, after has a Linear there. Is it what plan.apply(before) returned?"),
        (lambda: compare_models(m, nn.Linear(20, 5), x, plan=plan), ValueError, "plan makes '0' a pair of rank 4, after has no such layer."),
        (lambda: compare_models(m, plan.edit('2', 7).apply(m), x, plan=plan), ValueError, "plan makes '2' a pair of rank 4, after has one of rank 7."),
        (lambda: compare_models(small, m, x, plan=plan), ValueError, "plan expects '0' to be Linear(20→16)"),
        (lambda: compare_models(m, small, []), ValueError, 'data has no batches.'),
        (lambda: compare_models(m, small, 3), TypeError, 'data must be a tensor'),
        (lambda: compare_models(m, small, x, n_batches=0), ValueError, 'n_batches must be an int of at least 1'),
        (lambda: compare_models(m, small, (x, x, x, x)), ValueError, 'forward takes 1 of its 4 items. Pass several batches as a list.'),
        (lambda: plot_spectra('m'), TypeError, 'must be a torch.nn.Module, got str'),
        (lambda: plot_spectra(plan, x), ValueError, 'a plan holds its spectra'),
        (lambda: plot_spectra(nn.LSTM(3, 3)), ValueError, 'no layer of the model has a spectrum ((the model): recurrent weights of LSTM).'),
        (lambda: plot_tradeoff([1, 2]), TypeError, 'plot_tradeoff takes a DataFrame or a dict of them, got list.'),
        (lambda: plot_tradeoff({'a': [1]}), TypeError, "got list for 'a'"),
        (lambda: plot_tradeoff({}), ValueError, 'plot_tradeoff got no DataFrame.'),
        (lambda: plot_tradeoff(pd.DataFrame(dict(params=[1]))), ValueError, "no column 'metric' among 'params'. Name the columns with x= and y=."),
    ):
        with pytest.raises(kind) as e: call()
        assert text in str(e.value)

def test_display():
    m = mlp()
    plan = plan_of(m, policy=4)
    res = compare_models(m, plan.apply(m), [some(4), some(5)], plan=plan)
    text,html = repr(res),res._repr_html_()
    for t in (text, html):
        assert 'MACs and latency of the first batch, output error over 2 batches; CPU, 1 thread' in t
        assert f'{count_params(m):,}' in t and 'predicted for the weight' in t and 'nan' not in t.lower()
    assert html.count('<table') == 2 and ModelComparison(res.table)._repr_html_().count('<table') == 1
    assert f'{res.layers.measured[0]:.4f}' in text

# ------------------------------------------------------------------ plots

def test_plot_spectra():
    m,x = mlp(),some(100)
    ax = plot_spectra(m)
    assert len(ax.get_lines()) == 3 and ax.get_ylabel() == 'relative error of the weight'
    s = torch.linalg.svdvals(m[0].weight.detach().double()).square()
    line = next(o for o in ax.get_lines() if o.get_label() == '0')
    want = (s.flip(0).cumsum(0).flip(0)/s.sum()).sqrt()
    np.testing.assert_allclose(line.get_ydata(), [*want, 0], rtol=1e-6)
    np.testing.assert_allclose(line.get_xdata(), np.arange(17)/16)
    own = plt.subplots()[1]
    assert plot_spectra(m, x, ax=own, max_layers=2) is own and len(own.get_lines()) == 2 and 'output' in own.get_ylabel()
    assert len(plot_spectra(plan_of(m, policy=4)).get_lines()) == 6        # a plan has dots

def test_plot_tradeoff():
    df = pd.DataFrame(dict(ratio=[.5, .2, .9], params=[500, 200, 900], share=[.5, .2, .9], metric=[.8, .5, .9]), index=[7, 8, 9])
    ax = plot_tradeoff(df, dense=.91, limit=.85)
    line,*flat = ax.get_lines()
    assert line.get_xdata().tolist() == [200, 500, 900] and line.get_ydata().tolist() == [.5, .8, .9]
    assert [o.get_ydata()[0] for o in flat] == [.91, .85]
    assert [o.get_text() for o in ax.get_legend().get_texts()] == ['dense: 0.91', 'limit: 0.85']
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('parameters', 'metric') and isinstance(ax.xaxis.get_major_formatter(), EngFormatter)
    own = plt.subplots()[1]
    assert plot_tradeoff(df, x='share', ax=own) is own and own.get_legend() is None and own.get_xlabel() == 'share of parameters kept'
    two = plot_tradeoff({'svd': df, 'calibrated': df}, x='metric', y='share')
    assert [o.get_text() for o in two.get_legend().get_texts()] == ['svd', 'calibrated'] and two.get_xlabel() == 'metric'
    assert df.index.tolist() == [7, 8, 9]
