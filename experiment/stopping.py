"""Ctrl-C and SIGTERM: a run saves, then ends with one line that says how to go on.

During a phase the first signal waits for the end of the update, so that the checkpoint is exact; a
second one ends at once. Elsewhere (recording, the final report) the first one ends at once.
"""

import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _raise(number: int, frame) -> None:
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def handling(handler) -> Iterator[None]:
    """Have `handler` called on both signals; outside of the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def stoppable(argv: list[str] | None, folders: list[Path]) -> Iterator[None]:
    """Turn both signals into one line and exit status 128 + signal, as a shell has it.

    Args:
        argv: the flags of train.py; None: those of the process.
        folders: of runs, the last one is this process's; read when a signal has come.
    """
    try:
        with handling(_raise):
            yield
    except KeyboardInterrupt as e:
        given = sys.argv[1:] if argv is None else argv
        again = shlex.join(["python", "train.py", *(x for x in given if x != "--resume")])
        if folders and (checkpoint := folders[-1] / "checkpoint.pt").exists():
            line = f"stopped; {checkpoint} is kept. Go on with: {again} --resume"
        else:
            line = f"stopped before the first checkpoint. Start again with: {again}"
        print(f"\ntrain.py: {line}", file=sys.stderr)
        sys.exit(128 + (e.args[0] if e.args else signal.SIGINT))


@contextlib.contextmanager
def deferring() -> Iterator[list[int]]:
    """Yield a list that receives the first signal's number; the second signal interrupts."""
    arrived: list[int] = []

    def note(number: int, frame) -> None:
        if arrived:
            _raise(number, frame)
        arrived.append(number)
        print("\nstopping after this update; once more: at once", file=sys.stderr)

    with handling(note):
        yield arrived
