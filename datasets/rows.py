"""Checks and helpers that all readers share: reading in blocks, cutting rows into episodes.

A reader allocates the float32 arrays that training needs and fills them key by key, a few megabytes
at a time, so that it never holds a second copy of the data.

A flat recording holds its episodes one after another along one axis, with flags at their ends.

Sizes: M rows stored, R rows returned (L+1 for an episode of L transitions), E episodes, N agents,
       A actions, m rows of one block.
"""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

MAX_COMPRESSION = 1040  # bytes of an array for each that is stored; deflate's most is 1032
UNCHECKED = 2**26  # bytes up to which an array may claim any compression
LARGEST = 1e18  # that is accepted; float32 still holds its square
BLOCK = 8 * 2**20  # bytes read at a time, the memory a reader needs beyond its result
Rows = Callable[[str, int, int], np.ndarray]  # (key, a, b) -> stored rows a to b of this key


def blocks(count: int, row_bytes: int, chunk: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges (a,b) of about BLOCK bytes each that cover `count` rows.

    They begin at the borders of chunks (rows that are compressed together) unless chunks are huge.
    """
    step = max(1, BLOCK // max(1, row_bytes))
    if step >= chunk or chunk * row_bytes <= 64 * BLOCK:  # so that no chunk is decoded twice
        step = max(1, step // chunk) * chunk
    for a in range(0, count, step):
        yield a, min(a + step, count)


def numbers(path: Path, key: str, array) -> None:
    """Refuse what is not an array of plain numbers, all of them inside the file itself.

    Raises:
        ValueError: text, objects, no array or an empty one, data that lie in another file, or an
            array of which parts were never written (they would read as zeros, at any length).
    """
    kind = getattr(array, "dtype", "no array")
    kind = getattr(kind, "numpy_dtype", kind)  # tensorstore has its own
    if isinstance(kind, str) or kind.kind not in "biuf":
        raise ValueError(f"{path}: key {key} holds no plain numbers ({kind}).")
    if getattr(array, "external", None) or getattr(array, "is_virtual", False):
        raise ValueError(f"{path}: key {key} refers to other files, which are not read.")
    if not array.shape or 0 in array.shape:
        raise ValueError(f"{path}: key {key} holds no episodes, rows or agents: {array.shape}.")
    if isinstance(array, h5py.Dataset):
        stored = array.id.get_storage_size()
        whole = stored >= array.nbytes
        if array.chunks:
            wanted = math.prod(-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True))
            whole = array.id.get_num_chunks() == wanted
            whole &= array.nbytes <= max(MAX_COMPRESSION * stored, UNCHECKED)
        if not whole:
            raise ValueError(
                f"{path}: key {key} was not written completely: {stored:,} bytes are stored of an "
                f"array of {array.nbytes:,}."
            )


def check_room(path: Path, columns: dict[str, tuple]) -> None:
    """Raise a ValueError if float32 columns of these shapes do not fit into memory, or cannot come
    from a file of this size.
    """
    rows, need = max(columns.values())[0], 4 * sum(map(math.prod, columns.values()))
    stored = sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")))
    if need > max(UNCHECKED, MAX_COMPRESSION * stored):
        raise ValueError(f"{path}: {stored:,} bytes cannot hold the {rows:,} rows that it claims.")
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        raise ValueError(
            f"{path}: {need / 2**30:,.1f} GiB are needed for its {rows:,} rows, and this machine "
            f"has {have / 2**30:,.1f}."
        )


def finite(path: Path, key: str, first: int, x: np.ndarray, where: Callable | None = None):
    """Return x, the stored rows from `first` on.

    Args:
        where: names row i of the block in the message, such as "episode 3"; None: "row", number.
    Raises:
        ValueError: NaN, infinity, or a number that is too large to compute with.
    """
    wide = x.astype(np.promote_types(x.dtype, np.float32), copy=False)  # float16 ends at 65504
    wrong = ~(np.abs(wide) <= LARGEST)  # NaN compares false
    if wrong.any():
        i = int(np.argwhere(wrong)[0][0])
        row = where(i) if where else f"row {first + i}"
        what = f"NaN, infinity or a number beyond {LARGEST:g}"
        raise ValueError(f"{path}: key {key}, {row}: {what} in it.")
    return x


def allowed(path: Path, key: str, where: Callable[[int], str], avail: np.ndarray) -> np.ndarray:
    """Return `avail` (m,N,A); ValueError if it is no mask or leaves an agent no action.

    Args:
        where: names row i of the block in the message, such as "episode 3".
    """
    for wrong, what in (
        (((avail != 0) & (avail != 1)).any((1, 2)), "neither 0 nor 1"),
        (~avail.any(-1).all(-1), "an agent has no available action"),
    ):
        if wrong.any():
            raise ValueError(f"{path}: key {key}, {where(int(wrong.argmax()))}: {what}.")
    return avail


def one_hot(path: Path, mask: str, where: Callable, choice, avail, exempt) -> np.ndarray:
    """Action ids `choice` (m,N) -> one-hot (m,N,A).

    Args:
        mask: the key of `avail` (m,N,A), for the messages. where: as in `allowed`.
        exempt: (m,) bool, rows whose action need not be available (final rows carry none).
    Raises:
        ValueError: an id is not a whole number, out of range, or not available.
    """
    ids, size = choice.astype(np.int64), avail.shape[-1]
    if (wrong := ids != choice).any():
        raise ValueError(f"{path}: key actions: {choice[wrong][0]} is no action id.")
    if (wrong := (ids < 0) | (ids >= size)).any():
        raise ValueError(f"{path}: key actions: {ids[wrong][0]}, but {mask} has 0 to {size - 1}.")
    taken = np.take_along_axis(avail, ids[..., None], -1)[..., 0]
    if (wrong := (taken == 0).any(1) & ~exempt).any():
        row = where(int(wrong.argmax()))
        raise ValueError(f"{path}: key actions, {row}: not available by {mask}.")
    return np.eye(size, dtype=np.float32)[ids]


def shared(path: Path, key: str, values: np.ndarray) -> np.ndarray:
    """(M,), (M,1), (M,N) or (M,N,1) -> (M,); ValueError if the agents' values differ."""
    values = values.reshape(len(values), -1)
    if (unequal := (values != values[:, :1]).any(1)).any():
        row = int(unequal.argmax())
        raise ValueError(f"{path}: key {key}, row {row}: the agents' values differ.")
    return values[:, 0]


def clip_actions(x: np.ndarray, clipped: list[int]) -> np.ndarray:
    """Clip to [-1,1] as the simulator does, and add the number of clipped values to clipped[0]."""
    clipped[0] += int((np.abs(x) > 1 + 1e-6).sum())
    return x.clip(-1, 1)


def finish(columns: dict, lengths: np.ndarray, terminated: np.ndarray) -> None:
    """Add the column `terminated`, 1 at the last step of terminated (E,) episodes; final rows get
    reward 0.
    """
    last = np.cumsum(lengths + 1) - 1
    columns["reward"][last] = 0
    columns["terminated"] = np.zeros(len(columns["reward"]), np.float32)
    columns["terminated"][last - 1] = terminated


class Layout(NamedTuple):
    """Which stored row of a flat recording becomes which returned row."""

    target: np.ndarray  # (M,) index of the returned row, -1 = left out
    lengths: np.ndarray  # (E,) transitions
    terminated: np.ndarray  # (E,) bool
    repeated: np.ndarray  # returned rows that repeat the row before: no final observation stored
    dropped: int  # number of episodes without a transition
    unfinished: bool  # the recording stops in the middle of its last episode


def lay_out(path: Path, ends: np.ndarray, terminal: np.ndarray, final_row: bool) -> Layout:
    """Cut a flat recording into episodes.

    Args:
        ends: (M,) bool, the last stored row of an episode.
        terminal: (M,) bool, the episode terminated here and was not only truncated.
        final_row: whether an episode's last stored row is the observation after its last step
            (OMIGA) or the last step itself (Vaults).
    Raises:
        ValueError: no rows, or no row that ends an episode.
    """
    if not len(ends):
        raise ValueError(f"{path}: holds no rows.")
    if not ends.any():
        raise ValueError(f"{path}: none of the {len(ends)} rows ends an episode.")
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


def clip_repair(path: Path, clipped: int, actions: np.ndarray) -> list[str]:
    """A sentence about clipped action values, if there were any.

    Args:
        actions: after clipping.
    Raises:
        ValueError: they are not of motors.
    """
    if not clipped:
        return []
    if np.isin(actions, (-1, 0, 1)).all():
        raise ValueError(
            f"{path}: the actions are whole numbers, as ids of actions are, but which of them were "
            "available is not stored (avail_actions, infos.legals)."
        )
    return [f"{clipped / actions.size:.1%} of the action values were clipped to [-1,1]"]


def layout_repairs(layout: Layout) -> list[str]:
    """Sentences about what `lay_out` repaired."""
    repaired = []
    if layout.dropped:
        repaired.append(f"{layout.dropped} episodes without a whole transition were left out")
    if layout.unfinished:
        repaired.append("the recording stops inside its last episode, which counts as truncated")
    return repaired


def place(bar, layout: Layout, out: np.ndarray, rows: Rows, key: str, chunk: int, read) -> None:
    """Fill out (R,...): out[target] = read(key, a, stored rows a to b), block by block.

    Args:
        bar: tqdm progress bar. chunk: rows that are compressed together.
        read: (key, first row, rows) -> checked and converted rows.
    """
    row_bytes = rows(key, 0, 1).nbytes
    for a, b in blocks(len(layout.target), row_bytes, chunk):
        to = layout.target[a:b]
        out[to[to >= 0]] = read(key, a, rows(key, a, b))[to >= 0]
        bar.update(b - a)
