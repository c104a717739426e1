"""Scripts that generate the results, tables and figures of this project. They use one thread: the networks are small."""

import os

#: Numbers of threads, which NumPy and PyTorch read when they are imported
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
for variable in THREADS:
    os.environ.setdefault(variable, "1")
