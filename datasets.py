"""Files of recorded episodes: writing, checking, and reading them into an `OfflineDataset`.

  python datasets.py info PATH

The layout is the public one of SMAC's offline benchmarks (pymarl's episode batch, as published by
CFCQL [Shao et al., 2023] and ODIS [Zhang et al., 2023]): HDF5, one array per key at the root, E
episodes, time padded to the episode limit T plus one row for the last observation.

  state (E,T+1,S)  obs (E,T+1,N,O)  actions (E,T+1,N,1) int  avail_actions (E,T+1,N,A)
  reward (E,T+1,1)  terminated (E,T+1,1)  filled (E,T+1,1): L+1 ones for an episode of L steps

Our own recordings add `won` (E,) and attributes that say what the file is. In them `terminated` is
0 where only the time limit ended an episode; public files write 1 there too, and are followed.

Sizes: E episodes, T episode limit, N agents, O observation, S state, A actions, R rows in memory.
"""

import hashlib
import io
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

from buffer import OfflineDataset

AGENT_KEYS = ("obs", "actions", "avail_actions")  # (E,T+1,N,.), the others (E,T+1,.)
KEYS = ("state", "obs", "actions", "avail_actions", "reward", "terminated", "filled")


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside the target, then rename: a reader sees the old file or the whole new one.

    Raises:
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def join_rounds(rounds: list[dict[str, np.ndarray]], limit: int) -> dict[str, np.ndarray]:
    """Time-major rounds of parallel episodes -> the episode-major arrays of a file.

    Args:
        rounds: as `collect.play` returns them; each has its own T <= limit.
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


def save_episodes(path: Path, arrays: dict[str, np.ndarray], about: dict) -> None:
    """Write a file of episodes atomically, with `about` and its statistics as attributes."""
    returns = arrays["reward"].sum((1, 2))
    about = about | {
        "episodes": len(returns),
        "transitions": int(arrays["filled"].sum()) - len(returns),
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
    }
    if "won" in arrays:
        about["win_rate"] = float(arrays["won"].mean())
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(key.encode() + np.ascontiguousarray(arrays[key]).tobytes())
    memory = io.BytesIO()
    with h5py.File(memory, "w") as f:
        for key in tqdm(sorted(arrays), desc=f"writing {Path(path).name}", unit="array"):
            f.create_dataset(key, data=arrays[key], compression="gzip", compression_opts=1,
                             shuffle=True, track_times=False)  # fmt: skip
        f.attrs.update(about | {"content_sha256": digest.hexdigest()})
    write_atomic(path, memory.getvalue())


def load_dataset(path: Path, holdout: float, seed: int, device: torch.device):
    """Read a file of episodes into (OfflineDataset, facts).

    `facts` holds path, sha256 of the file, episodes, transitions, return_mean, return_std and,
    where the file tells, win_rate and its own attributes.

    Raises:
        ValueError: with the file, the key and the row of what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file of recorded episodes.")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path}: not an HDF5 file of recorded episodes.")
    columns, lengths, facts = read_episodes(path)
    tensors = {k: torch.as_tensor(v, dtype=torch.float32).to(device) for k, v in columns.items()}
    data = OfflineDataset(**tensors, lengths=lengths, holdout=holdout, seed=seed)
    facts |= {
        "path": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "episodes": len(lengths),
        "transitions": int(lengths.sum()),
        "return_mean": data.episode_returns.mean().item(),
        "return_std": data.episode_returns.std(unbiased=False).item(),
    }
    return data, facts


def read_episodes(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray, dict]:
    """The valid rows of all episodes end to end, the episodes' lengths, the file's attributes."""
    with h5py.File(path, "r") as f:
        if missing := [k for k in KEYS if k not in f]:
            raise ValueError(f"{path}: no key {', '.join(missing)}; found {', '.join(f)}.")
        shapes = {k: getattr(f[k], "shape", ()) for k in KEYS}
        if bad := [k for k in KEYS if len(shapes[k]) != (4 if k in AGENT_KEYS else 3)]:
            raise ValueError(f"{path}: key {bad[0]} has shape {shapes[bad[0]]}: see datasets.py.")
        if len({s[:2] for s in shapes.values()}) != 1:
            raise ValueError(f"{path}: episodes and rows differ between keys: {shapes}.")
        if len({shapes[k][2] for k in AGENT_KEYS}) != 1:
            raise ValueError(f"{path}: the number of agents differs between keys: {shapes}.")
        filled = f["filled"][..., 0].astype(bool)  # (E,T+1)
        lengths = filled.sum(1) - 1
        bad = (lengths < 1) | (filled != (np.arange(filled.shape[1]) <= lengths[:, None])).any(1)
        if bad.any():
            raise ValueError(f"{path}: key filled, episode {bad.argmax()}: not a run of ones.")
        columns = {k: f[k][:][filled] for k in KEYS if k != "filled"}
        facts = {k: v.item() if hasattr(v, "item") else v for k, v in f.attrs.items()}
    for key, values in columns.items():
        if not np.isfinite(values).all():
            row = np.argwhere(~np.isfinite(values))[0][0]
            episode = np.searchsorted(np.cumsum(lengths + 1), row, side="right")
            raise ValueError(f"{path}: key {key}, episode {episode}: NaN or infinity in it.")
    avail = columns.pop("avail_actions")  # (R,N,A)
    choice = columns["actions"][..., 0].astype(np.int64)  # (R,N)
    if not avail.any(-1).all():
        row = np.argwhere(~avail.any(-1))[0][0]
        episode = np.searchsorted(np.cumsum(lengths + 1), row, side="right")
        raise ValueError(f"{path}: key avail_actions, episode {episode}: an agent may do nothing.")
    unknown = choice[(choice < 0) | (choice >= avail.shape[-1])]
    if len(unknown):
        raise ValueError(
            f"{path}: key actions: {unknown[0]}, but avail_actions has 0 to {avail.shape[-1] - 1}."
        )
    last = np.zeros(len(choice), bool)
    last[np.cumsum(lengths + 1) - 1] = True
    forbidden = (np.take_along_axis(avail, choice[..., None], -1)[..., 0] == 0) & ~last[:, None]
    if forbidden.any():
        episode = np.searchsorted(np.cumsum(lengths + 1), forbidden.any(1).argmax(), side="right")
        raise ValueError(f"{path}: key actions, episode {episode}: avail_actions forbids it.")
    columns["actions"] = np.eye(avail.shape[-1], dtype=np.float32)[choice]
    columns["avail"] = avail
    columns["reward"] = columns["reward"][:, 0]
    columns["terminated"] = columns["terminated"][:, 0]
    return columns, lengths, facts


def describe(path: Path) -> str:
    """What is in a file, in a few lines."""
    data, facts = load_dataset(path, holdout=0.05, seed=0, device=torch.device("cpu"))
    (_, n, o), s, a = data.obs.shape, data.state.shape[1], data.actions.shape[-1]
    won = f", {facts['win_rate']:.0%} of battles won" if "win_rate" in facts else ""
    return (
        f"{path}\n  {n} agents, {a} actions, observations {o}, state {s}\n"
        f"  {facts['episodes']} episodes, {facts['transitions']:,} transitions, "
        f"return {facts['return_mean']:.2f} +- {facts['return_std']:.2f}{won}\n"
        f"  sha256 {facts['sha256']}, of the content {facts.get('content_sha256', 'not stored')}"
    )


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "info":
        sys.exit("usage: python datasets.py info PATH")
    try:
        print(describe(Path(sys.argv[2])))
    except (ValueError, OSError) as e:
        sys.exit(f"datasets.py: {e}")
