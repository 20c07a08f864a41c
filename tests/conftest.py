"""Two workers share the cores, so each computes with one thread. SMAX is compiled without
optimisation, which halves the tests' time: they play little."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
