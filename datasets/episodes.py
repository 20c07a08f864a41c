"""Our layout of recorded episodes: writing it, and reading it with every check.

It is the public layout of SMAC's offline benchmarks, pymarl's episode batch as CFCQL [Shao et al.,
2023] and ODIS [Zhang et al., 2023] publish it: HDF5, one array per key at the root, E episodes,
time padded to the episode limit T plus one row for the final observation.

  state (E,T+1,S)  obs (E,T+1,N,O)  actions (E,T+1,N,1) int  avail_actions (E,T+1,N,A)
  reward (E,T+1,1)  terminated (E,T+1,1)  filled (E,T+1,1): L+1 ones for an episode of L steps

Our own recordings add `won` (E,) and attributes with metadata. In them `terminated` is 0 where only
the time limit ended an episode. Public files write 1 there too; load.py takes it back where the
time limit can be told.
Continuous tasks have no `avail_actions` and no `won`; their actions (E,T+1,N,A) are in [-1,1].

Sizes: E episodes, T episode limit, N agents, O observation, S state, A actions,
       R rows in memory (L+1 for an episode of L steps).
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from datasets.files import replacing
from datasets.rows import (
    allowed,
    blocks,
    check_room,
    clip_actions,
    clip_repair,
    finish,
    finite,
    numbers,
    one_hot,
)

AGENT_KEYS = ("obs", "actions", "avail_actions")  # (E,T+1,N,.), the others (E,T+1,.)
KEYS = ("state", "obs", "avail_actions", "actions", "reward", "terminated", "filled")


def join_rounds(rounds: list[dict[str, np.ndarray]], limit: int) -> dict[str, np.ndarray]:
    """Rounds of parallel episodes, time first -> the arrays of a file, episodes first.

    Args:
        rounds: logs as `behaviour.policy.play` returns them, each with its own T <= limit.
        limit: episode limit to which all episodes are padded.
    """
    parts = []
    for log in rounds:
        steps, slots = log["filled"].shape
        rows = np.zeros((slots, limit + 1), bool)
        rows[:, 0] = True
        rows[:, 1 : steps + 1] = log["filled"].T  # L+1 rows: the final observation too

        def padded(x, rows=rows):
            x = np.moveaxis(x, 0, 1)  # (slots, T or T+1, ...)
            out = np.zeros((len(x), limit + 1, *x.shape[2:]), x.dtype)
            out[:, : x.shape[1]] = x
            out[~rows] = 0
            return out

        part = {
            "state": padded(log["state"]),
            "obs": padded(log["obs"]),
            "reward": padded(log["reward"][..., None]),
            "terminated": padded(log["terminated"][..., None].astype(np.uint8)),
            "filled": rows[..., None].astype(np.int64),
        }
        if log["avail"] is None:  # the simulator clips actions
            part["actions"] = padded(log["actions"].clip(-1, 1))
        else:
            part["actions"] = padded(log["actions"].argmax(-1)[..., None].astype(np.int64))
            part["avail_actions"] = padded(log["avail"].astype(np.int32))
            part["won"] = log["won"].any(0).astype(np.uint8)
        parts.append(part)
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def save_episodes(path: Path, arrays: dict, about: dict) -> None:
    """Write a file of episodes atomically, with `about` and statistics as attributes.

    The attribute content_sha256 is a hash of the arrays alone.

    Args:
        arrays: as `join_rounds` returns them. They are read in slices of episodes, so objects like
            `Padded` work too.
        about: metadata, numbers and strings.
    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    digest, returns, rows = hashlib.sha256(), [], 0
    how = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "track_times": False}
    with replacing(path) as target, h5py.File(target, "w") as f:
        for key in tqdm(sorted(arrays), desc=f"writing {Path(path).name}", unit="array"):
            x = arrays[key]
            stored = f.create_dataset(key, x.shape, x.dtype, chunks=True, **how)
            digest.update(key.encode())
            row_bytes = x.dtype.itemsize * int(np.prod(x.shape[1:]))
            for a, b in blocks(len(x), row_bytes, stored.chunks[0]):
                part = np.ascontiguousarray(x[a:b])
                stored[a:b] = part
                digest.update(part)
                if key == "reward":
                    returns.append(part.sum((1, 2)))
                rows += int(part.sum()) if key == "filled" else 0
        returns = np.concatenate(returns)
        about = about | {
            "episodes": len(returns),
            "transitions": rows - len(returns),
            "return_mean": float(returns.mean()),
            "return_std": float(returns.std()),
        }
        if "won" in arrays:
            about["win_rate"] = float(arrays["won"].mean())
        f.attrs.update(about | {"content_sha256": digest.hexdigest()})


class Padded:
    """An array of padded episodes (E,T+1,...) made slice by slice from unpadded rows (R,...)."""

    def __init__(self, rows: np.ndarray, lengths: np.ndarray, dtype, change: Callable):
        """change: converts some rows (m,...) to what the file stores."""
        self.rows, self.lengths, self.change = rows, lengths, change
        self.first = np.append(0, np.cumsum(lengths + 1))
        self.shape = (len(lengths), int(lengths.max()) + 1, *change(rows[:1]).shape[1:])
        self.dtype = np.dtype(dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, episodes: slice) -> np.ndarray:
        a, b, _ = episodes.indices(len(self))
        out = np.zeros((b - a, *self.shape[1:]), self.dtype)
        valid = np.arange(self.shape[1]) <= self.lengths[a:b, None]
        out[valid] = self.change(self.rows[self.first[a] : self.first[b]])
        return out


def read_episode_file(path: Path, f, env_id: str | None) -> tuple[dict, np.ndarray, dict]:
    """Read an HDF5 file of padded episodes `f` into (columns, lengths, metadata).

    See `load.read_episodes`. Without the key avail_actions, the actions are continuous.

    Raises:
        ValueError: with the file, the key and the episode of what is wrong.
    """
    keys, width = check_episode_keys(path, f)
    whole = ("filled", "reward", "terminated")  # these are read at once, padding and all
    check_room(path, {k: f[k].shape for k in whole})
    filled = f["filled"][:].reshape(f["filled"].shape[:2]) != 0  # (E,T+1)
    repaired = add_final_rows(path, f, filled)
    lengths = filled.sum(1) - 1
    bad = (lengths < 1) | (filled != (np.arange(filled.shape[1]) <= lengths[:, None])).any(1)
    if bad.any():
        raise ValueError(f"{path}: key filled, episode {bad.argmax()}: not a run of ones.")
    columns, more = read_columns(path, f, keys, width, filled)
    repaired += more
    ends = np.cumsum(lengths + 1)  # (E,) number of rows up to the end of each episode
    early = columns["terminated"] != 0
    early[ends - 1] = early[ends - 2] = False
    if early.any():
        episode = np.searchsorted(ends, early.argmax(), side="right")
        raise ValueError(f"{path}: key terminated, episode {episode}: before its end.")
    columns["avail"] = columns.pop("avail_actions", None)
    finish(columns, lengths, columns["terminated"][ends - 2])
    metadata = {k: v.item() if isinstance(v, np.generic) else v for k, v in f.attrs.items()}
    metadata = {k: text(v) or v for k, v in metadata.items()}
    metadata = {k: v for k, v in metadata.items() if isinstance(v, str | int | float)}
    metadata.pop("win_rate", None)  # it is computed again from the key won
    if not (isinstance(metadata.get("env_id"), str) and metadata["env_id"]):
        metadata.pop("env_id", None)
    before = [x for x in str(metadata.get("repaired", "")).split("\n") if x]
    metadata["repaired"] = before + repaired
    if "won" in f:
        columns["won"] = read_won(path, f["won"], len(lengths))
    check_content(path, f)  # last, because what is wrong with a value says more
    return columns, lengths, {"final_observation": "stored"} | metadata


def add_final_rows(path: Path, f, filled: np.ndarray) -> list[str]:
    """Mark the final observations of a file that marks L rows instead of L+1, in place.

    On the final row nothing is paid and nothing terminates any more; where a file pays there, it
    marks a row too few, or its rewards lie a row too late.

    Args:
        filled: (E,T+1) bool; changed only if it is a run of ones in every episode.
    Returns:
        A sentence about what was repaired, if anything was.
    Raises:
        ValueError: rewards or ends on final rows that cannot be explained in this way.
    """
    stored = (f[k][:].reshape(filled.shape) for k in ("reward", "terminated"))
    reward, terminated = ((x != 0) & (x == x) for x in stored)  # NaN is found later
    episode, last = np.arange(len(filled)), filled.sum(1) - 1
    before = terminated[episode, last - 1] & (last > 0)
    late = reward[episode, last] | (terminated[episode, last] & ~before)
    runs = (filled == (np.arange(filled.shape[1]) <= last[:, None])).all()
    if not late.any() or not runs:
        return []
    if not before.any() and (last + 1 < filled.shape[1]).all():
        beyond = np.zeros_like(filled)
        beyond[episode, last + 1] = True
        stored = [f["state"][a:b][beyond[a:b]].any(-1) for a, b in by_episodes(f, "state")]
        if np.concatenate(stored).all():
            filled |= beyond
            return ["filled marks L instead of L+1 rows; the final observations were added"]
    if (last == 0).any():
        return []
    raise ValueError(
        f"{path}: keys reward, terminated, episode {late.argmax()}: not 0 on its final row, which "
        "comes after its last step: rows are shifted, or filled marks a row too few."
    )


def check_content(path: Path, f) -> None:
    """Compare our own recordings with the hash of their arrays, which they store.

    Raises:
        ValueError: a value was changed since the file was written.
    """
    if (wanted := f.attrs.get("content_sha256")) is None:
        return
    digest = hashlib.sha256()
    for key in sorted(k for k in (*KEYS, "won") if k in f):
        digest.update(key.encode())
        for a, b in by_episodes(f, key):
            digest.update(np.ascontiguousarray(f[key][a:b]))
    if digest.hexdigest() != wanted:
        raise ValueError(
            f"{path}: its content is not what was written (content_sha256): damaged, or edited. "
            "Delete it; a recording of ours is made again at the next start."
        )


def by_episodes(f, key: str) -> Iterator[tuple[int, int]]:
    """Ranges of episodes of a key that are read at a time."""
    return blocks(f[key].shape[0], f[key][:1].nbytes, f[key].chunks[0] if f[key].chunks else 1)


def read_columns(
    path: Path, f, keys: list[str], width: dict[str, tuple], filled: np.ndarray
) -> tuple[dict, list[str]]:
    """Read and check all keys but `filled`, episode after episode without the padding.

    Args:
        keys, width: as `check_episode_keys` returns them. filled: (E,T+1) bool.
    Returns:
        {key: float32 (R, ...)}, and sentences about what was repaired.
    """
    ends, discrete, clipped = filled.sum(1).cumsum(), "avail_actions" in keys, [0]
    final = np.zeros(ends[-1], bool)
    final[ends - 1] = True
    shapes = {k: (len(final), *width[k]) for k in keys if k != "filled"}
    check_room(path, shapes)
    columns = {k: np.empty(shape, np.float32) for k, shape in shapes.items()}

    def checked(k: str, x: np.ndarray, first: int) -> np.ndarray:
        def where(i: int) -> str:
            return f"episode {np.searchsorted(ends, first + i, side='right')}"

        finite(path, k, first, x, where)
        if k == "avail_actions":
            return allowed(path, k, where, x)
        if k == "actions" and discrete:
            rows = slice(first, first + len(x))
            avail = columns["avail_actions"][rows]
            return one_hot(path, "avail_actions", where, x[..., 0], avail, final[rows])
        if k == "terminated" and (wrong := (x != 0) & (x != 1)).any():
            raise ValueError(f"{path}: key {k}, {where(int(wrong.argmax()))}: neither 0 nor 1.")
        return clip_actions(x, clipped) if k == "actions" else x

    total, beyond = len(columns) * len(filled), 0
    with tqdm(total=total, desc=f"reading {path.name}", unit="episode") as bar:
        for k, out in columns.items():
            first = 0
            for a, b in by_episodes(f, k):
                stored = f[k][a:b]
                if k == "state":
                    beyond += int((stored.any(-1) & ~filled[a:b]).any(1).sum())
                x = stored[filled[a:b]]
                out[first : first + len(x)] = checked(k, x, first).reshape(len(x), *out.shape[1:])
                first += len(x)
                bar.update(b - a)
    repaired = clip_repair(path, clipped[0], columns["actions"])
    if beyond:
        repaired.append(f"rows beyond the end of {beyond} episodes (key filled) were left out")
    return columns, repaired


def text(value) -> str | None:
    """An attribute as text that can be printed; None if it is none."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return value.encode(errors="replace").decode() if isinstance(value, str) else None


def read_won(path: Path, stored, episodes: int) -> np.ndarray:
    """Which episodes were won (E,) bool; ValueError if the key's shape is wrong."""
    numbers(path, "won", stored)
    if stored.shape not in ((episodes,), (episodes, 1)):
        raise ValueError(f"{path}: key won has shape {stored.shape}, for {episodes} episodes.")
    return stored[:].reshape(-1) != 0


def check_episode_keys(path: Path, f) -> tuple[list[str], dict[str, tuple]]:
    """The keys of a file of episodes, and the shape of one row of each column.

    Raises:
        ValueError: a key is missing, holds no numbers, or its shape contradicts another's.
    """
    floats = "actions" in f and getattr(f["actions"], "dtype", np.dtype("O")).kind == "f"
    keys = [k for k in KEYS if k in f or k != "avail_actions" or not floats]
    if missing := [k for k in keys if k not in f]:
        raise ValueError(f"{path}: no key {', '.join(missing)}; found {', '.join(f)}.")
    for k in keys:
        numbers(path, k, f[k])
    shapes = {k: f[k].shape for k in keys}
    if bad := [k for k in keys if len(shapes[k]) != (4 if k in AGENT_KEYS else 3)]:
        sizes = (
            "(episodes, rows, agents, size)" if bad[0] in AGENT_KEYS else "(episodes, rows, size)"
        )
        raise ValueError(f"{path}: key {bad[0]} has shape {shapes[bad[0]]}, not {sizes}.")
    if len({s[:2] for s in shapes.values()}) != 1:
        raise ValueError(f"{path}: episodes and rows differ between keys: {shapes}.")
    if len({shapes[k][2] for k in AGENT_KEYS if k in shapes}) != 1:
        raise ValueError(f"{path}: the number of agents differs between keys: {shapes}.")
    if not shapes["obs"][0]:
        raise ValueError(f"{path}: holds no episodes.")
    row = {k: s[2:] for k, s in shapes.items()} | {"reward": (), "terminated": ()}
    one = [k for k in ("reward", "terminated", "filled") if shapes[k][2] != 1]
    one += ["actions"] if "avail_actions" in keys and shapes["actions"][3] != 1 else []
    if one:
        raise ValueError(
            f"{path}: key {one[0]} has shape {shapes[one[0]]}, the last size must be 1."
        )
    if "avail_actions" in keys:
        row["actions"] = row["avail_actions"]
    return keys, row
