"""Scripts that make every figure and picture of this project. All run on one thread: networks of this size are fastest so."""

import os

# Before NumPy and PyTorch are imported, which read them then
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
