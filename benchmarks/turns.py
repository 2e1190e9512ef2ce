"""Times of candidates that take turns, for the other scripts: a moment in which the machine is busy is one for all of them."""
import statistics, time
import torch

def session(path):
    "An ONNX Runtime session with as many threads as PyTorch"
    import onnxruntime as ort
    so = ort.SessionOptions()
    so.intra_op_num_threads,so.log_severity_level = torch.get_num_threads(),3
    return ort.InferenceSession(str(path), so, providers=['CPUExecutionProvider'])

def turns(calls, rounds):
    "For each call the median of its processor time in ms, and how many times as fast as the first it is"
    times = [[] for _ in calls]
    for f in calls: f()
    for _ in range(rounds):
        for f,t in zip(calls, times):
            start = time.process_time()
            f()
            t.append(1e3*(time.process_time() - start))
    return [(statistics.median(t), statistics.median(a/b for a,b in zip(times[0], t))) for t in times]
