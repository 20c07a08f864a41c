"""The layout of our files of recorded episodes: writing it, and reading it with every check.

It is the public one of SMAC's offline benchmarks (pymarl's episode batch, as published by CFCQL
[Shao et al., 2023] and ODIS [Zhang et al., 2023]): HDF5, one array per key at the root, E episodes,
time padded to the episode limit T plus one row for the last observation.

  state (E,T+1,S)  obs (E,T+1,N,O)  actions (E,T+1,N,1) int  avail_actions (E,T+1,N,A)
  reward (E,T+1,1)  terminated (E,T+1,1)  filled (E,T+1,1): L+1 ones for an episode of L steps

Our own recordings add `won` (E,) and attributes that say what the file is. In them `terminated` is
0 where only the time limit ended an episode; public files write 1 there too, and are followed.
Continuous tasks have no `avail_actions` and no `won`; their actions (E,T+1,N,A) are in [-1,1].

Sizes: E episodes, T episode limit, N agents, O observation, S state, A actions, R rows in memory.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from rows import allowed, blocks, check_action_range, finish, numbers, one_hot

AGENT_KEYS = ("obs", "actions", "avail_actions")  # (E,T+1,N,.), the others (E,T+1,.)
KEYS = ("state", "obs", "avail_actions", "actions", "reward", "terminated", "filled")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place if the block succeeds.

    Raises:
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("r+b") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside the target, then rename: a reader sees the old file or the whole new one.

    Raises:
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def join_rounds(rounds: list[dict[str, np.ndarray]], limit: int) -> dict[str, np.ndarray]:
    """Time-major rounds of parallel episodes -> the episode-major arrays of a file.

    Args:
        rounds: as `mappo.play` returns them; each has its own T <= limit.
        limit: episode limit that all episodes are padded to.
    """
    parts = []
    for log in rounds:
        steps, slots = log["filled"].shape
        rows = np.zeros((slots, limit + 1), bool)
        rows[:, 0] = True
        rows[:, 1 : steps + 1] = log["filled"].T  # L+1 rows are valid: the last observation too

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
        if log["avail"] is None:  # what the motors did, not what the policy's Gaussian asked for
            part["actions"] = padded(log["actions"].clip(-1, 1))
        else:
            part["actions"] = padded(log["actions"].argmax(-1)[..., None].astype(np.int64))
            part["avail_actions"] = padded(log["avail"].astype(np.int32))
            part["won"] = log["won"].any(0).astype(np.uint8)
        parts.append(part)
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def save_episodes(path: Path, arrays: dict, about: dict) -> None:
    """Write a file of episodes atomically, with `about` and its statistics as attributes.

    Args:
        arrays: as `join_rounds` returns them; read in slices of episodes, so `Padded` will do too.
    """
    digest, returns, rows = hashlib.sha256(), [], 0
    how = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "track_times": False}
    with replacing(path) as temporary, h5py.File(temporary, "w") as f:
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
    """Rows of episodes end to end, seen as one array of padded episodes, made slice by slice."""

    def __init__(self, rows: np.ndarray, lengths: np.ndarray, dtype, change: Callable):
        """change: some rows (m,...) -> what a file stores of them."""
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
    """Padded episodes in HDF5 (see the top); without avail_actions the actions are numbers."""
    keys, width = check_episode_keys(path, f)
    discrete = "avail_actions" in keys
    filled = f["filled"][:].reshape(f["filled"].shape[:2]) != 0  # (E,T+1)
    lengths = filled.sum(1) - 1
    bad = (lengths < 1) | (filled != (np.arange(filled.shape[1]) <= lengths[:, None])).any(1)
    if bad.any():
        raise ValueError(f"{path}: key filled, episode {bad.argmax()}: not a run of ones.")
    ends = np.cumsum(lengths + 1)  # (E,) rows up to and with each episode
    final = np.zeros(ends[-1] if len(ends) else 0, bool)
    final[ends - 1] = True
    columns = {k: np.empty((len(final), *width[k]), np.float32) for k in keys if k != "filled"}
    beyond = [0]

    def where(row: int) -> str:
        return f"episode {np.searchsorted(ends, row, side='right')}"

    def checked(k: str, x: np.ndarray, first: int) -> np.ndarray:
        if not np.isfinite(x).all():
            row = first + int(np.argwhere(~np.isfinite(x))[0][0])
            raise ValueError(f"{path}: key {k}, {where(row)}: NaN or infinity in it.")
        rows, at = slice(first, first + len(x)), lambda i: where(first + i)
        if k == "avail_actions":
            return allowed(path, k, at, x)
        if k == "actions" and discrete:
            legal = columns["avail_actions"][rows]
            return one_hot(path, "avail_actions", at, x[..., 0], legal, final[rows])
        if k == "terminated" and (wrong := (x != 0) & (x != 1)).any():
            raise ValueError(f"{path}: key {k}, {at(int(wrong.argmax()))}: neither 0 nor 1.")
        return check_action_range(x, beyond) if k == "actions" else x

    with tqdm(
        total=len(columns) * len(lengths), desc=f"reading {path.name}", unit="episode"
    ) as bar:
        for k, out in columns.items():
            first, chunk = 0, f[k].chunks[0] if f[k].chunks else 1
            for a, b in blocks(len(lengths), f[k][:1].nbytes, chunk):
                x = f[k][a:b][filled[a:b]]
                out[first : first + len(x)] = checked(k, x, first).reshape(len(x), *out.shape[1:])
                first += len(x)
                bar.update(b - a)
    ended = columns["terminated"][ends - 2] if len(ends) else np.zeros(0)
    early = (columns["terminated"] != 0) & ~final
    early[ends - 2] = False
    if early.any():
        raise ValueError(f"{path}: key terminated, {where(int(early.argmax()))}: before its end.")
    columns["avail"] = columns.pop("avail_actions", None)
    finish(columns, lengths, ended)
    facts = {k: v.item() if isinstance(v, np.generic) else v for k, v in f.attrs.items()}
    facts = {k: v for k, v in facts.items() if isinstance(v, str | int | float)}
    facts.pop("win_rate", None)  # counted anew where the file tells who won
    facts["repaired"] = [x for x in str(facts.get("repaired", "")).split("\n") if x]
    if beyond[0]:
        share = beyond[0] / columns["actions"].size
        facts["repaired"].append(f"{share:.1%} of the action values were clipped to [-1,1]")
    if "won" in f:
        columns["won"] = read_won(path, f["won"], len(lengths))
    return columns, lengths, {"final_observation": "stored"} | facts


def read_won(path: Path, stored, episodes: int) -> np.ndarray:
    """(E,) bool, which battles were won."""
    numbers(path, "won", stored)
    if stored.shape not in ((episodes,), (episodes, 1)):
        raise ValueError(f"{path}: key won has shape {stored.shape}, for {episodes} episodes.")
    return stored[:].reshape(-1) != 0


def check_episode_keys(path: Path, f) -> tuple[list[str], dict[str, tuple]]:
    """Which keys a file of episodes has, and the shape of one row of each column."""
    floats = "actions" in f and getattr(f["actions"], "dtype", np.dtype("O")).kind == "f"
    keys = [k for k in KEYS if k in f or k != "avail_actions" or not floats]
    if missing := [k for k in keys if k not in f]:
        raise ValueError(f"{path}: no key {', '.join(missing)}; found {', '.join(f)}.")
    for k in keys:
        numbers(path, k, f[k])
    shapes = {k: f[k].shape for k in keys}
    if bad := [k for k in keys if len(shapes[k]) != (4 if k in AGENT_KEYS else 3)]:
        raise ValueError(f"{path}: key {bad[0]} has shape {shapes[bad[0]]}: see episodes.py.")
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
        raise ValueError(f"{path}: key {one[0]} has shape {shapes[one[0]]}, its last must be 1.")
    if "avail_actions" in keys:
        row["actions"] = row["avail_actions"]
    return keys, row
