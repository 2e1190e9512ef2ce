"Settings that all tests share"
import os

# The threads of LAPACK wait for each other by spinning; where cores are shared, two are many times slower than one.
# Set before the first import, and inherited by the processes that tests start.
os.environ |= dict.fromkeys(['OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'], '1')
import torch

torch.set_num_threads(1)
