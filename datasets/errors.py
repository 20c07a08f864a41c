"""How every command of the project ends when something is wrong: one sentence, a non-zero exit."""

import contextlib
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_sentence(program: str) -> Iterator[None]:
    """Turn errors that tell the user something into `program: sentence` and a non-zero exit.

    Other exceptions are faults of the program and keep their traceback.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as e:
        sentence = " ".join(str(e).split()) or type(e).__name__
    except KeyboardInterrupt:
        sentence = "interrupted."
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        sentence = "the memory is full: give smaller sizes of networks, batches or episodes."
    else:
        return
    sys.exit(f"{program}: {sentence}")


def out_of_memory(error: BaseException) -> bool:
    """Whether torch or NumPy could not get the memory that it asked for."""
    full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return full or "can't allocate memory" in str(error)
