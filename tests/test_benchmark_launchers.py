"""Runs of a grid on Ray: the same rows as here, and what a lost worker or an interrupt costs."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_benchmark_grid import final_of

from benchmark import grid, launchers
from benchmark.rows import ROOT, Result, key_of, read
from datasets.errors import Interrupted, handling, interrupt, one_sentence

WHAT = {"env_ids": ("3s_vs_5z",), "qualities": ("medium",), "flags": "--threads 1 --device cpu"}
FAILS, KILLS_ONCE, KILLS, WAITS, WAITS_TOO, LATER = range(11, 17)  # seeds
# Stands for train.py: notes its flags, then does what its seed says.
PROGRAM = f"""
import os, pathlib, shutil, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
seed = int(sys.argv[sys.argv.index("--seed") + 1])
here = pathlib.Path(__file__).parent
out.mkdir(exist_ok=True)

def note(what):
    with open(here / "notes", "a") as f:
        f.write(f"{{out.name}} {{what}}\\n")

def save(*_):
    note("saved")
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
note(f"resumed {{os.getpid()}}" if "--resume" in sys.argv else f"began {{os.getpid()}}")
if seed == {KILLS} or seed == {KILLS_ONCE} and "--resume" not in sys.argv:
    (out / "checkpoint.pt").touch()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
if seed in ({WAITS}, {WAITS_TOO}):
    time.sleep(60)
if seed == {FAILS}:
    (out / "checkpoint.pt").touch()
    sys.exit("train.py: no luck")
shutil.copy(here / (out.name + ".json"), out / "final.json")
"""


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two workers."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (optional: requirements.txt)")
    term = signal.getsignal(signal.SIGTERM)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False,
             logging_level="ERROR")  # fmt: skip
    signal.signal(signal.SIGTERM, term)
    yield
    ray.shutdown()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(launcher, seeds, ...) -> (rows of LOGO and MACQL, what failed, notes of the program)."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "train.py").write_text(PROGRAM)
    monkeypatch.setattr(launchers, "ROOT", project)

    def run(launcher: str, seeds: tuple, methods=("logo", "macql")):
        (project / "notes").unlink(missing_ok=True)
        out, results, failures = tmp_path / launcher, tmp_path / f"{launcher}.csv", []
        out.mkdir(exist_ok=True)
        for each in grid.plan(*list(WHAT.values())[:2], methods, seeds, WHAT["flags"], out):
            final = json.dumps(final_of(each.args, 10.0 + each.args.seed))
            (project / f"{each.folder.name}.json").write_text(final)
        with monkeypatch.context() as patch:
            patch.setattr(grid.tqdm, "write", failures.append)
            where = {"out": out, "results": results, "launcher": launcher}
            try:
                grid.grid(**WHAT, methods=methods, seeds=seeds, **where)
            except ValueError as e:
                assert str(e).startswith(f"{len(failures)} runs failed")
        rows = {key_of(row): row for row in read(results, Result)}
        return rows, sorted(failures), notes(project)

    return run


def notes(project) -> list[list[str]]:
    """Name, what happened, process of each note."""
    file = project / "notes"
    return sorted(x.split() for x in file.read_text().splitlines()) if file.exists() else []


def ends(process: int, patience: float = 10) -> bool:
    """Whether the process is gone soon, or dead and not yet collected by the process above it.

    Ray learns of a worker's death a moment before the worker's own child is killed.
    """
    until, file = time.monotonic() + patience, Path(f"/proc/{process}/stat")
    while time.monotonic() < until:
        try:
            if file.read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_ray_gives_the_rows_and_words_of_this_machine(cluster, run, tmp_path):
    expected, told, _ = run("local", (1, 2, FAILS))
    rows, failures, began = run("ray", (1, 2, FAILS))
    assert rows == expected and len(rows) == 4 and len(began) == 6
    assert failures == [x.replace(str(tmp_path / "local"), str(tmp_path / "ray")) for x in told]
    assert "logo-seed11: train.py: no luck (see" in failures[0] and len(failures) == 2
    again, failures, resumed = run("ray", (1, 2, FAILS, 3))  # a row more, the failed ones resumed
    assert expected.items() <= again.items() and len(again) == 6 and len(failures) == 2
    assert [what for _, what, _ in resumed] == ["resumed", "began"] * 2


def test_a_killed_worker_costs_one_run(cluster, run):
    rows, failures, seen = run("ray", (KILLS_ONCE, KILLS, 1), methods=("logo",))
    assert {key[-1] for key in rows} == {KILLS_ONCE, 1}
    assert len(failures) == 1 and f"seed{KILLS}: its worker died twice" in failures[0]
    assert [what for name, what, _ in seen] == ["began", "began", "resumed", "began", "resumed"]
    for _, _, process in seen:  # none goes on without its worker, beside the one that resumed it
        assert ends(int(process))


def test_an_interrupt_ends_the_runs_on_ray(cluster, run, tmp_path):
    def when_both_run():
        until = time.monotonic() + 30
        while len(notes(tmp_path / "project")) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=when_both_run)
    thread.start()
    with pytest.raises(Interrupted) as error, handling(interrupt):
        run("ray", (WAITS, WAITS_TOO, LATER), methods=("logo",))
    thread.join()
    assert error.value.number == signal.SIGTERM
    seen = [(name[-2:], what) for name, what, *_ in notes(tmp_path / "project")]
    waiting = (str(WAITS), str(WAITS_TOO))
    assert seen == [(seed, what) for seed in waiting for what in ("began", "saved")]


def test_a_killed_run_names_the_signal(tmp_path):
    launchers.log_of(tmp_path / "run").write_text("Phase 1:  35%|###   | 35/100")
    assert launchers.reason(tmp_path / "run", -9).startswith("ended by SIGKILL")
    assert launchers.reason(tmp_path / "run", 1) == "Phase 1:  35%|###   | 35/100"


def test_a_run_that_begins_while_the_grid_ends_is_ended_too(tmp_path, monkeypatch):
    class Process:
        def __init__(self, first: bool):
            self.over = threading.Event()
            if first:
                self.over.set()

        def wait(self):
            return 0 if self.over.wait(5) else 1

        def terminate(self):
            self.over.set()

    began = []

    def start(folder, *_):
        time.sleep(0.3 * len(began))  # the second is being started when the grid ends
        began.append(Process(first=not began))
        return began[-1]

    monkeypatch.setattr(launchers, "start", start)
    runs = [launchers.Run("", "", "", tmp_path / str(k), [], [], None) for k in range(9)]
    ends = launchers.locally(runs, 1)
    next(ends)
    ends.close()
    assert all(process.over.is_set() for process in began) and len(began) <= 2


def test_without_ray_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as error, one_sentence("python -m benchmark"):
        next(launchers.on_ray([]))
    sentence = f"--launcher ray needs Ray: pip install ray=={launchers.RAY_VERSION}."
    assert error.value.code == f"python -m benchmark: {sentence}"
    with pytest.raises(ValueError, match="--jobs is for --launcher local"):
        grid.grid(jobs=2, launcher="ray")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "here:x", "127.0.0.1:99999"])
def test_an_address_without_a_cluster_is_named(address, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConnectionError, match=f"RAY_ADDRESS: nothing answers at {address}"):
        launchers.connect()


def test_ray_is_tested_with_the_version_that_is_named():
    wanted = f"ray=={launchers.RAY_VERSION}"
    assert wanted in (ROOT / "requirements.txt").read_text()
