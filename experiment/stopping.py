"""Ctrl-C and SIGTERM: a run saves, then ends with one line that says how to go on.

During a phase the first signal waits for the end of the update, so that the checkpoint is exact; a
second one ends at once. Elsewhere (recording, the final report) the first one ends at once.
"""

import contextlib
import shlex
import sys
from collections.abc import Iterator

from datasets.errors import Interrupted, handling, interrupt
from experiment.folder import OWNED


@contextlib.contextmanager
def saying_how_to_go_on(argv: list[str] | None, program: str) -> Iterator[None]:
    """Give an interrupt the sentence that says where the checkpoint is and which command goes on.

    Args:
        argv: the flags of train.py; None: those of the process.
        program: what Python runs.
    """
    try:
        yield
    except Interrupted as e:
        given = sys.argv[1:] if argv is None else argv
        flags = shlex.join(x for x in given if x != "--resume")
        again = f"python {program} {flags}"
        if OWNED and (checkpoint := OWNED[-1] / "checkpoint.pt").exists():
            e.sentence = f"stopped; {checkpoint} is kept. Go on with: {again} --resume"
        else:
            e.sentence = f"stopped before the first checkpoint. Start again with: {again}"
        raise


@contextlib.contextmanager
def deferring() -> Iterator[list[int]]:
    """Yield a list that receives the first signal's number; the second signal interrupts."""
    arrived: list[int] = []

    def note(number: int, frame) -> None:
        if arrived:
            interrupt(number, frame)
        arrived.append(number)
        print("\nstopping after this update; once more: at once", file=sys.stderr)

    with handling(note):
        yield arrived
