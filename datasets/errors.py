"""How every command of the project ends when something is wrong: one sentence, a non-zero exit."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what a cluster sends before it kills


class Interrupted(KeyboardInterrupt):
    """One of SIGNALS came. `number` of the signal; `sentence` for the user."""

    def __init__(self, number: int, sentence: str = "interrupted."):
        super().__init__(sentence)
        self.number, self.sentence = number, sentence


def interrupt(number: int, frame) -> None:
    """Handler of SIGNALS that interrupts at once."""
    raise Interrupted(number)


@contextlib.contextmanager
def handling(handler: Callable) -> Iterator[None]:
    """Have `handler(number, frame)` called on SIGNALS; outside of the main thread do nothing."""
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
def holding() -> Iterator[None]:
    """Let SIGNALS wait for the end of the block: for code that a library calls back, which loses
    what a handler raises there.
    """
    arrived: list[int] = []
    try:
        with handling(lambda number, _: arrived.append(number)):
            yield
    finally:
        for number in arrived:
            signal.raise_signal(number)


@contextlib.contextmanager
def one_sentence(program: str) -> Iterator[None]:
    """Turn errors that tell the user something into `program: sentence` and a non-zero exit.

    SIGNALS end with 128 + signal, as a shell has it. Other exceptions are faults of the program and
    keep their traceback.
    """
    try:
        with handling(interrupt):
            yield
    except (ValueError, OSError, ImportError, FloatingPointError) as e:
        sys.exit(f"{program}: {' '.join(str(e).split()) or type(e).__name__}")
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        sys.exit(f"{program}: the memory is full: give smaller networks, batches or episodes.")
    except Interrupted as e:
        print(f"\n{program}: {e.sentence}", file=sys.stderr)
        sys.exit(128 + e.number)


def out_of_memory(error: BaseException) -> bool:
    """Whether torch or NumPy could not get the memory that it asked for."""
    full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return full or "can't allocate memory" in str(error)
