"""Two workers share the cores, so each computes with one thread. SMAX is compiled without
optimisation and with XLA's older code for loops, which takes a quarter of the time, because the
tests play few episodes; what one worker or command has compiled, the others find in a folder of
this session.
"""

import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
flags = "--xla_backend_optimization_level=0"
if version("jax").startswith("0.10."):  # JAX 0.11 ends the process at a flag it does not know
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", flags)

TINY = (
    "--updates 6 --wm-updates 4 --batch-size 16 --wm-batch-size 16 --hidden 16 --horizon 3 "
    "--rollout-batch-size 8 --rollout-interval 2 --eval-every 3 "
    "--eval-episodes 8 --threads 1 --device cpu --u-scale 5 --critic-first 0.17"
).split()


def pytest_configure(config):
    """The first process makes the folder; the workers inherit its environment."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.compiled = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_unconfigure(config):
    shutil.rmtree(getattr(config, "compiled", ""), ignore_errors=True)


@pytest.fixture
def one_hot_as_on_a_gpu(monkeypatch):
    """On a CPU, and only there, one_hot checks the range of its input."""
    import torch

    def one_hot(x, classes):
        empty = torch.zeros(*x.shape, classes, dtype=torch.long)
        return empty.scatter(-1, x.unsqueeze(-1), 1)

    monkeypatch.setattr(torch.nn.functional, "one_hot", one_hot)


class Killed(Exception):
    """Nothing catches it, as nothing can catch SIGKILL."""


@pytest.fixture
def killed(monkeypatch):
    """killed(run, updates) lets run() die after so many updates, each with its checkpoint."""
    from experiment.tracking import Run

    def killed(run, updates: int) -> None:
        done, log = [], Run.log

        def dying(self, metrics):
            if len(done) == updates:
                raise Killed
            done.append(1)
            log(self, metrics)

        with monkeypatch.context() as patch:
            patch.setattr("experiment.tracking.CHECKPOINT_SHARE", float("inf"))
            patch.setattr("experiment.tracking.LOG_EVERY", 1)
            patch.setattr(Run, "log", dying)
            with pytest.raises(Killed):
                run()

    return killed


@pytest.fixture
def undrawn(monkeypatch):
    """Runs end without run.png, whose drawing takes as long as their training."""
    from experiment import report

    monkeypatch.setattr(report, "draw", lambda *_: None)


@pytest.fixture
def program(monkeypatch, capsys):
    """program("datasets", "info", ...) does what `python -m datasets info ...` does.

    It is the same code with the same answer, in this process, which has imported torch already.
    """

    def program(module: str, *arguments) -> subprocess.CompletedProcess:
        line, code = [module, *map(str, arguments)], 0
        monkeypatch.setattr(sys, "argv", line)
        monkeypatch.delitem(sys.modules, f"{module}.__main__", raising=False)
        capsys.readouterr()
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as e:
            code = e.code
        out, told = capsys.readouterr()
        if isinstance(code, str):  # as the interpreter ends
            code, told = 1, f"{told}{code}\n"
        return subprocess.CompletedProcess(line, code or 0, out, told)

    return program


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Eight recorded episodes of 3s_vs_5z."""
    from behaviour.record import record  # once the environment is set

    path = tmp_path_factory.mktemp("data") / "tiny.h5"
    record("3s_vs_5z", "medium", episodes=8, seed=0, path=path)
    return path
