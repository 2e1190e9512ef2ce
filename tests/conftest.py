"Settings that all tests share"
import os, torch

# LAPACK's threads wait for each other by spinning; where cores are shared, two are many times slower than one
torch.set_num_threads(1)
os.environ |= dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')   # for processes that tests start
