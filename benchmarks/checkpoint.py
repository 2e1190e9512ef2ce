"""Decompose a checkpoint of 6 GB with random weights in a fresh process: peak memory, time, and what a `kill -9` on the way costs.

README.md beside this file says how to run it and what each column means.
"""
import json, os, platform, re, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
import torch
from fastcore.script import call_parse
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
QWEN = dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, vocab_size=151936,
            tie_word_embeddings=True)     # config.json of Qwen2.5-1.5B
QUICK = QWEN | dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8, vocab_size=32000)
LIMIT = lambda largest: 3*largest + 500e6   # bytes

def _shapes(config):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    with torch.device('meta'): m = Qwen2ForCausalLM(Qwen2Config(**config))
    return m, {k: tuple(v.shape) for k,v in m.state_dict().items() if k != 'lm_head.weight'}    # tied with the embedding

def _write(path, shapes):
    "A safetensors file with random float32 weights, one tensor after the other"
    head,at = {'__metadata__': {'format': 'pt'}},0
    for k,s in shapes.items():
        n = 4*torch.Size(s).numel()
        head[k] = dict(dtype='F32', shape=list(s), data_offsets=[at, at+n])
        at += n
    js = json.dumps(head).encode()
    js += b' '*(-len(js) % 8)
    with open(path, 'wb') as f:
        f.write(len(js).to_bytes(8, 'little') + js)
        for s in shapes.values(): f.write(memoryview(torch.randn(s).mul_(.02).numpy()).cast('B'))

def make(folder, config, n):
    "A Hugging Face folder with `n` shards; bytes in all and of the largest tensor"
    folder.mkdir(parents=True)
    model,shapes = _shapes(config)
    model.config.architectures = ['Qwen2ForCausalLM']
    model.config.save_pretrained(folder)
    sizes = {k: 4*torch.Size(s).numel() for k,s in shapes.items()}
    total,parts,done = sum(sizes.values()),[{} for _ in range(n)],0
    for k,s in shapes.items():
        parts[min(n-1, done*n//total)][k] = s
        done += sizes[k]
    names = ['model.safetensors'] if n == 1 else [f'model-{i+1:05}-of-{n:05}.safetensors' for i in range(n)]
    for f,p in zip(names, parts): _write(folder/f, p)
    if n > 1: (folder/'model.safetensors.index.json').write_text(json.dumps(dict(metadata=dict(total_size=total), weight_map={
        k: f for f,p in zip(names, parts) for k in p})))
    return total, max(sizes.values())

CHILD = '''
import json, resource, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
from fasterai.lowrank.checkpoint import decompose_checkpoint, load_decomposed
def peak():
    try: return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])*1024    # ru_maxrss would begin with the parent's
    except FileNotFoundError: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == 'darwin' else 1024)
base,start = peak(),time.perf_counter()
{what}
print()
print(json.dumps(dict(base=base, peak=peak(), time=time.perf_counter()-start)))
'''

def child(what, threads):
    return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', CHILD.replace('{what}', what), str(threads)], stdout=subprocess.PIPE, text=True,
                            env=os.environ | dict(PYTHONPATH=str(ROOT)))

def result(p):
    out = p.communicate()[0]
    if p.returncode: raise RuntimeError(f'the process ended with {p.returncode}')
    return json.loads(out.splitlines()[-1])

def killed(what, threads, work, layers):
    "Start, and kill -9 when so many layers are done: seconds until then"
    p,start = child(what, threads),time.perf_counter()
    def done(): return sum(len(f.read_text().split()) for f in work.glob('out/*.log'))
    while done() < layers:
        if p.poll() is not None: raise RuntimeError('it ended before it was killed')
        time.sleep(.2)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    return time.perf_counter()-start

def excess(src, dst, name):
    "Relative error of one layer above the least possible at its rank"
    def get(folder, k): return next(f.get_tensor(k) for p in folder.glob('*.safetensors') for f in [safe_open(p, 'pt')] if k in f.keys()).double()
    W,A,B = get(src, f'{name}.weight'),get(dst, f'{name}.0.weight'),get(dst, f'{name}.1.weight')
    S = torch.linalg.svdvals(W)
    return (((W - B@A).norm()/S[len(A):].norm()) - 1).item()

def case(label, tmp, config, shards, layers, threads, kill):
    "One row of the table"
    src,dst = tmp/label/'dense',tmp/label/'small'
    total,largest = make(src, config, shards)
    what = f'decompose_checkpoint({str(src)!r}, {str(dst)!r}, 0.25, layers={layers!r})'
    wasted = killed(what, threads, dst.with_name('small.partial'), kill) if kill else 0
    res = result(child(what, threads))
    small = sum(f.stat().st_size for f in dst.glob('*.safetensors'))
    load = result(child(f'load_decomposed(None, {str(dst)!r})', threads))
    err = excess(src, dst, 'model.layers.0.self_attn.k_proj')
    shutil.rmtree(tmp/label)
    return dict(checkpoint=label, total=total, largest=largest, small=small, killed=wasted, load=load['peak'], load_time=load['time'], excess=err, **res)

def table(rows):
    head = ['checkpoint', 'dense, GB', 'largest tensor, MB', 'limit, MB', 'peak, MB', 'of it imports, MB', 'killed after, s', 'then, s', 'small, GB', 'loading: peak, MB', 'time, s', 'error above optimum']
    lines = ['| '+' | '.join(head)+' |', '|'+'---|'*len(head)]
    for r in rows:
        cells = [r['checkpoint'], f'{r["total"]/1e9:.2f}', f'{r["largest"]/1e6:.0f}', f'{LIMIT(r["largest"])/1e6:.0f}', f'**{r["peak"]/1e6:.0f}**', f'{r["base"]/1e6:.0f}',
                 f'{r["killed"]:.0f}' if r['killed'] else '', f'{r["time"]:.0f}', f'{r["small"]/1e9:.2f}', f'{r["load"]/1e6:.0f}', f'{r["load_time"]:.1f}', f'{r["excess"]:.0e}']
        lines.append('| '+' | '.join(cells)+' |')
    return '\n'.join(lines)

def hardware(threads):
    cpu = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text()) if Path('/proc/cpuinfo').exists() else None
    return (f'{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} cores, {threads} thread{"s"[:threads > 1]}; Python {platform.python_version()}, '
            f'torch {torch.__version__}')

@call_parse
def main(
    out: str = None,        # markdown file to write
    tmp: str = None,        # folder for 12 GB of checkpoints; a temporary one by default
    threads: int = 1,       # of the measured processes
    quick: bool = False,    # a small network
):
    "Measure; exit code 1 if more memory is used than 3 × the largest tensor + 500 MB"
    config = QUICK if quick else QWEN
    some = [f'model.layers.{i}' for i in range(2)]
    with tempfile.TemporaryDirectory(dir=tmp) as d:
        rows = [case('one file', Path(d), config, 1, None, threads, kill=3*config['num_hidden_layers'])]
        rows.append(case('4 shards, 2 blocks decomposed', Path(d), config, 4, some, threads, kill=0))
    text = f'# Checkpoint\n\n{hardware(threads)}. A quarter of the singular values kept.\n\n{table(rows)}\n'
    print(text)
    if out: Path(out).write_text(text)
    sys.exit(any(r['peak'] > LIMIT(r['largest']) or abs(r['excess']) > 1e-4 for r in rows) and not quick)
