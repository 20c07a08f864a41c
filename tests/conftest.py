"""Two workers share the cores, so each computes with one thread. SMAX is compiled without
optimisation, which halves the tests' time: they play little. What runs in miniature need is here.
"""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

TINY = (
    "--updates 6 --wm-updates 4 --batch-size 16 --wm-batch-size 16 --hidden 16 --wm-hidden 16 "
    "--rollouts 8 --collect-every 2 --retain 2 --horizon 3 --eval-every 2 --eval-episodes 8 "
    "--final-evals 2 --log-every 1 --checkpoint-every 2 --threads 1 --device cpu --u-scale 5"
).split()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Eight recorded battles on 3s_vs_5z."""
    import collect  # once the environment is set

    path = tmp_path_factory.mktemp("data") / "tiny.h5"
    collect.record("3s_vs_5z", "medium", episodes=8, seed=0, path=path)
    return path
