"""Flat recordings, read in blocks and cut into episodes: what all readers share.

A reader allocates the float32 arrays that training needs and fills them key by key, a few megabytes
at a time, so that it never holds a second copy of the data.

Sizes: M rows stored, R rows returned (L+1 for an episode of L transitions), E episodes, N agents.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

BLOCK = 8 * 2**20  # bytes read at a time: what a reader needs beyond the arrays it returns
Rows = Callable[[str, int, int], np.ndarray]  # (key, a, b) -> the stored rows a to b of a key


def blocks(count: int, row_bytes: int, chunk: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges (a,b) that cover `count` rows in about BLOCK bytes each, on the borders of chunks."""
    step = max(1, BLOCK // max(1, row_bytes))
    if step >= chunk or chunk * row_bytes <= 4 * BLOCK:  # else chunks would be decoded twice
        step = max(1, step // chunk) * chunk
    for a in range(0, count, step):
        yield a, min(a + step, count)


def numbers(path: Path, key: str, array) -> None:
    """Refuse all but plain numbers in the file itself: objects and links could be anything."""
    kind = getattr(array, "dtype", "no array")
    kind = getattr(kind, "numpy_dtype", kind)  # tensorstore has its own
    if isinstance(kind, str) or kind.kind not in "biuf":
        raise ValueError(f"{path}: key {key} holds no plain numbers ({kind}).")
    if getattr(array, "external", None) or getattr(array, "is_virtual", False):
        raise ValueError(f"{path}: key {key} refers to other files, which are not read.")


def finite(path: Path, key: str, first: int, x: np.ndarray) -> np.ndarray:
    """x, the stored rows from `first` on, if all of it is finite."""
    if not np.isfinite(x).all():
        row = first + int(np.argwhere(~np.isfinite(x))[0][0])
        raise ValueError(f"{path}: key {key}, row {row}: NaN or infinity in it.")
    return x


def allowed(path: Path, key: str, where: Callable[[int], str], avail: np.ndarray) -> np.ndarray:
    """A mask (m,N,A), if it is one; `where` names its row i."""
    for wrong, what in (
        (((avail != 0) & (avail != 1)).any((1, 2)), "neither 0 nor 1"),
        (~avail.any(-1).all(-1), "an agent may do nothing"),
    ):
        if wrong.any():
            raise ValueError(f"{path}: key {key}, {where(int(wrong.argmax()))}: {what}.")
    return avail


def one_hot(path: Path, mask: str, where: Callable, choice, avail, exempt) -> np.ndarray:
    """Action ids (m,N) -> (m,N,A), if key `mask`, avail (m,N,A), allows all but `exempt` (m,)."""
    ids, size = choice.astype(np.int64), avail.shape[-1]
    if (wrong := ids != choice).any():
        raise ValueError(f"{path}: key actions: {choice[wrong][0]} is no number of an action.")
    if (wrong := (ids < 0) | (ids >= size)).any():
        raise ValueError(f"{path}: key actions: {ids[wrong][0]}, but {mask} has 0 to {size - 1}.")
    taken = np.take_along_axis(avail, ids[..., None], -1)[..., 0]
    if (wrong := (taken == 0).any(1) & ~exempt).any():
        row = where(int(wrong.argmax()))
        raise ValueError(f"{path}: key actions, {row}: {mask} forbids it.")
    return np.eye(size, dtype=np.float32)[ids]


def shared(path: Path, key: str, values: np.ndarray) -> np.ndarray:
    """(M,), (M,1), (M,N) or (M,N,1) -> (M,), what all agents agree on."""
    values = values.reshape(len(values), -1)
    if (unequal := (values != values[:, :1]).any(1)).any():
        row = int(unequal.argmax())
        raise ValueError(f"{path}: key {key}, row {row}: agents differ; a team's is needed.")
    return values[:, 0]


def check_action_range(x: np.ndarray, beyond: list[int]) -> np.ndarray:
    """Clip to [-1,1], as the simulator does; adds to beyond[0] how many values that changed."""
    beyond[0] += int((np.abs(x) > 1 + 1e-6).sum())
    return x.clip(-1, 1)


def finish(columns: dict, lengths: np.ndarray, terminated: np.ndarray) -> None:
    """Write who terminated (E,) at each episode's last step; final rows carry nothing."""
    last = np.cumsum(lengths + 1) - 1
    columns["reward"][last] = 0
    columns["terminated"] = np.zeros(len(columns["reward"]), np.float32)
    columns["terminated"][last - 1] = terminated


class Layout(NamedTuple):
    """Where the rows of a flat recording go."""

    target: np.ndarray  # (M,) row returned, -1 = left out
    lengths: np.ndarray  # (E,) transitions
    terminated: np.ndarray  # (E,) bool
    repeated: np.ndarray  # rows returned that repeat the row before, for want of a final one
    dropped: int  # episodes without a single transition
    unfinished: bool  # the recording stops inside its last episode


def lay_out(path: Path, ends: np.ndarray, terminal: np.ndarray, final_row: bool) -> Layout:
    """Cut a flat recording into episodes.

    Args:
        ends: (M,) bool, an episode's last stored row. terminal: (M,) bool, and not only cut off.
        final_row: the last stored row is the observation after the last step (OMIGA), not a step.
    """
    if not len(ends):
        raise ValueError(f"{path}: holds no rows.")
    if not ends.any():
        raise ValueError(f"{path}: no row ends an episode, of {len(ends)}.")
    stops = np.flatnonzero(ends) + 1
    if unfinished := stops[-1] != len(ends):
        stops = np.append(stops, len(ends))
    starts = np.append(0, stops[:-1])
    stored, terminated = stops - starts, terminal[stops - 1] & ends[stops - 1]
    repeat = terminated & (not final_row)
    lengths = stored - 1 + repeat
    kept = lengths >= 1
    rows = np.where(kept, lengths + 1, 0)
    first = np.cumsum(rows) - rows
    target = np.repeat(first - starts, stored) + np.arange(len(ends))
    target[np.repeat(~kept, stored)] = -1
    repeated = (first + lengths)[kept & repeat]
    return Layout(
        target, lengths[kept], terminated[kept], repeated, int((~kept).sum()), bool(unfinished)
    )


def remarks(layout: Layout, beyond: int, total: int) -> list[str]:
    """What was repaired, in sentences."""
    said = []
    if layout.dropped:
        said.append(f"{layout.dropped} episodes without a whole transition were left out")
    if layout.unfinished:
        said.append("the recording stops inside its last episode, which counts as cut off")
    if beyond:
        said.append(f"{beyond / total:.1%} of the action values were clipped to [-1,1]")
    return said


def place(bar, layout: Layout, out: np.ndarray, rows: Rows, key: str, chunk: int, read) -> None:
    """out[target] = read(key, a, rows a..b), block by block."""
    row_bytes = rows(key, 0, 1).nbytes
    for a, b in blocks(len(layout.target), row_bytes, chunk):
        to = layout.target[a:b]
        out[to[to >= 0]] = read(key, a, rows(key, a, b))[to >= 0]
        bar.update(b - a)
