"""Where the runs of a grid are trained: on this machine, or on a Ray cluster.

A launcher yields how each run ended, as they end. When it is closed or interrupted, it starts no
further run, and those that are being trained get SIGTERM: they save and can be resumed.
"""

import contextlib
import ctypes
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
RAY_VERSION = "2.60.0"  # tested
GPU_SHARE = 0.25  # of a GPU for each run on Ray: alone, such small networks leave most of it idle


class Run(NamedTuple):
    """One training."""

    method: str
    variant: str  # flags that differ from the method's defaults
    quality: str  # of the data; with --dataset: the file's name
    folder: Path
    program: list[str]  # train.py, a baseline, or benchmark.oracle and its own flags
    flags: list[str]  # of train.py, all but --out and --resume
    args: object  # train.Args: what the flags mean


class End(NamedTuple):
    """How a run ended."""

    run: Run
    failure: str | None  # what went wrong


def log_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".log")


def start(folder: Path, program: list[str], flags: list[str], **options) -> subprocess.Popen:
    """Start the process of a run, which goes on from the folder's checkpoint if there is one."""
    command = [sys.executable, *program, *flags, "--out", str(folder)]
    command[1] = command[1].replace("train.py", str(ROOT / "train.py"))
    if (folder / "checkpoint.pt").exists():
        command.append("--resume")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # and the user's
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with log_of(folder).open("w") as text:
        return subprocess.Popen(command, stdout=text, stderr=text, env=variables,
                                start_new_session=True, **options)  # fmt: skip


def reason(folder: Path, status: int) -> str | None:
    """What a run that has ended said last, if it failed."""
    if status == 0:
        return None
    if status < 0:
        name = signal.Signals(-status).name
        return f"ended by {name}; SIGKILL by nobody means that the memory was full: lower --jobs"
    return (log_of(folder).read_text().splitlines()[-1:] or [f"exit status {status}"])[0]


def end(run: Run, why: str | None) -> End:
    """Every launcher reports a failed run in the same words."""
    return End(run, why and f"{run.folder.name}: {why} (see {log_of(run.folder)})")


# ------------------------------------------------------------------------------------ this machine


def locally(runs: list[Run], jobs: int) -> Iterator[End]:
    """Train the runs on this machine, `jobs` at the same time, each in a process."""
    running = []  # processes, to pass an interrupt on to them
    gate, closed = threading.Lock(), []

    def train(run: Run) -> End:
        with gate:  # so that whoever ends the processes knows them all
            if closed:
                return end(run, "not started")
            process = start(run.folder, run.program, run.flags)
            running.append(process)
        status = process.wait()
        running.remove(process)
        return end(run, reason(run.folder, status))

    pool = ThreadPoolExecutor(jobs)
    try:
        for task in as_completed([pool.submit(train, run) for run in runs]):
            yield task.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        with gate:
            closed.append(True)
        for process in [*running]:
            process.terminate()
        pool.shutdown()


# --------------------------------------------------------------------------------------------- Ray


def on_ray(runs: list[Run]) -> Iterator[End]:
    """Train the runs on a Ray cluster, each as one task.

    A task holds one CPU, on which its run computes with one thread; on a cluster that has GPUs it
    holds a share of one, too (`GPU_SHARE`), unless the run has --device cpu. Ray starts as many as
    fit. The nodes must share a file system with the project, the current folder and the runs'.

    A task whose worker or node dies is tried once more and goes on from the run's checkpoint; when
    that worker dies as well, the run has failed. The other runs do not notice.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at RAY_ADDRESS.
    """
    ray, mine = connect()
    # Sent as code, so that a worker need not import the project, and with it torch.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    task_of = ray.remote(num_cpus=1, max_retries=0)(train_on_worker)
    gpus, waiting = ray.cluster_resources().get("GPU", 0), {}

    def submit(run: Run, attempt: int) -> None:
        share = GPU_SHARE if gpus and run.args.device != "cpu" else 0
        given = Path.cwd(), run.folder.absolute(), run.program, run.flags
        task = task_of.options(num_gpus=share, name=run.folder.name).remote(*given)
        waiting[task.future()] = task, run, attempt

    try:
        for run in runs:
            submit(run, 1)
        while waiting:
            # Python's own waiting: `ray.wait` would turn our Interrupted into a KeyboardInterrupt.
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                _, run, attempt = waiting.pop(future)
                error = future.exception()
                if not error:
                    why = future.result()
                    if why is None:
                        appear(run.folder / "final.json")
                    yield end(run, why)
                elif isinstance(error, ray.exceptions.RayTaskError):  # e.g. a full disk
                    yield end(run, str(error).strip().splitlines()[-1])
                elif attempt == 1:
                    submit(run, 2)
                else:
                    kind = type(error).__name__
                    yield end(run, f"its worker died twice, the second time of {kind}")
    finally:
        for task, *_ in waiting.values():
            ray.cancel(task)
        wait(waiting)
        if mine:
            ray.shutdown()


def appear(file: Path, patience: float = 60) -> None:
    """Wait for a file of another node: a network file system may show it up to a minute later."""
    until = time.monotonic() + patience
    while not file.exists() and time.monotonic() < until:
        time.sleep(1)


def connect() -> tuple:
    """Connect to the Ray cluster of RAY_ADDRESS or of this machine, else start one here.

    Returns:
        The module `ray`, and whether it was this function that connected.
    """
    try:
        import ray
    except ImportError as e:
        raise ImportError(f"--launcher ray needs Ray: pip install ray=={RAY_VERSION}.") from e
    if ray.is_initialized():
        return ray, False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    if ":" in (address := os.environ.get("RAY_ADDRESS", "")) and "://" not in address:
        host, _, port = address.rpartition(":")  # Ray itself would try for minutes, then end us
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError, OverflowError) as e:
            raise ConnectionError(f"RAY_ADDRESS: nothing answers at {address} ({e}).") from e
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    before = signal.getsignal(signal.SIGTERM)  # Ray puts its own handler there
    try:
        context, what = ray.init("auto", **quiet), "the cluster"
    except ConnectionError as e:
        if address:
            raise ConnectionError(f"RAY_ADDRESS: no Ray cluster answers at {address}.") from e
        context, what = ray.init("local", include_dashboard=False, **quiet), "started one"
    signal.signal(signal.SIGTERM, before)
    has = ray.cluster_resources()
    counts = ", ".join(f"{has.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
    print(f"Ray: {what} at {context.address_info['address']} with {counts}")
    return ray, True


def train_on_worker(
    current: Path, folder: Path, program: list[str], flags: list[str]
) -> str | None:
    """Train a run to its end, on a worker of Ray; returns what it said last if it failed."""
    if missing := [str(x) for x in (ROOT, current, folder.parent) if not x.is_dir()]:
        shared = "must be on a file system that all nodes share"
        return f"{platform.node()} has no folder {missing[0]}, which {shared}"
    process = start(folder, program, flags, cwd=current, preexec_fn=die_with_parent)
    try:
        while process.poll() is None:  # Ray cancels a task between two lines of Python only
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    return reason(folder, process.returncode)


def die_with_parent() -> None:
    """In a new process: be killed when the worker dies, or two would train in the same folder."""
    with contextlib.suppress(AttributeError, OSError):  # Linux alone has it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
