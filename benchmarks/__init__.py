"""Scripts that generate the results, tables and figures of this project. They use one thread: the networks are small."""

import os

# NumPy and PyTorch read these variables when they are imported
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
