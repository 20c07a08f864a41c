"""OMIGA's recordings of Multi-Agent MuJoCo, with partial observations restored.

  read_omiga     OMIGA's HDF5 files: s, o, a, r, d at the root
  omiga_columns  the same vectors in any container; OG-MARL publishes them as Vaults

What is special about these files:

  o holds, for each agent, the whole state and the agent's one-hot id, standardised within that
    single vector. So the observations are not partial. The id's entries were 1 and 0 before
    standardisation, so mean and deviation can be recovered from them exactly. The recovered state
    is divided among the agents by `simulators.mamujoco.partition`.
  The robot's motors were driven by the agents' actions in the order of the agents, but
    gymnasium-robotics assigns Ant's motors in another order. The joint action is rebuilt and then
    divided as gymnasium-robotics does.
  Actions may lie outside [-1,1], where the simulator clips them. They are clipped here.
  The row with d = 1 is the final observation of an episode. d does not distinguish time limits
    from falls: episodes of exactly 1000 steps count as truncated, shorter ones as terminated.

Sizes: M rows stored, R rows returned, E episodes, N agents, O observation, S state, A actions,
       m rows of one block.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.robots import find_robot
from datasets.rows import (
    Rows,
    blocks,
    check_room,
    clip_actions,
    clip_repair,
    finish,
    finite,
    lay_out,
    layout_repairs,
    numbers,
    place,
    shared,
)

TIME_LIMIT = 1000  # steps, of all MuJoCo tasks
OMIGA_KEYS = ("s", "o", "a", "r", "d")
OMIGA_TASKS = {(3, 14): "Hopper-3x1", (2, 113): "Ant-2x4", (6, 23): "HalfCheetah-6x1"}  # by (N,S+N)
ANT_WORLD = slice(27, 33)  # contact forces on the world body, always 0; not in Gymnasium's v5


def unstandardise(path: Path, key: str, first: int, x: np.ndarray) -> np.ndarray:
    """OMIGA's vectors (m,N,S+N), each standardised within itself -> the state (m,S), float64.

    Each vector is x = (v - mean) / std. The last N entries of agent i's v are its one-hot id, so
    the entry of x at i is (1 - mean) / std and the others are -mean / std. This gives mean and std.

    Raises:
        ValueError: the agents' vectors are not the same state standardised in this way.
    """
    n = x.shape[1]
    x = finite(path, key, first, x).astype(np.float64)
    agent_id, own = x[..., -n:], np.eye(n, dtype=bool)
    off = agent_id[:, ~own].reshape(len(x), n, n - 1)
    zero, unit = off.mean(-1), agent_id[:, own] - off.mean(-1)  # (m,N) -mean/std and 1/std
    good = (np.abs(x.mean(-1)) < 1e-3) & (np.abs(x.std(-1) - 1) < 1e-3)
    good &= (unit > 1e-4) & (np.ptp(off, -1) < 1e-3)
    raw = (x[..., :-n] - zero[..., None]) / np.where(good, unit, 1)[..., None]  # (m,N,S)
    state = raw.mean(1)
    good &= (np.abs(raw - state[:, None]) < 1e-3 * (1 + np.abs(state[:, None]))).all(-1)
    if not good.all():
        row = first + int(np.argwhere(~good)[0][0])
        raise ValueError(
            f"{path}: key {key}, row {row}: not one state standardised with each agent's id as "
            "OMIGA does, so it cannot be divided among agents."
        )
    return state


def gymnasium_state(path: Path, first: int, raw: np.ndarray, size: int) -> np.ndarray:
    """Gym v2's state (m,S) -> Gymnasium v5's (m,size), float32; only Ant's differs.

    Raises:
        ValueError: the state is not of this robot.
    """
    if raw.shape[1] == 111 and size == 105:
        if (wrong := (np.abs(raw[:, ANT_WORLD]) > 1e-3).any(1)).any():
            row = first + int(wrong.argmax())
            raise ValueError(f"{path}: row {row}: contact forces on Ant's world body are not 0.")
        raw = np.delete(raw, np.arange(111)[ANT_WORLD], 1)
        # Contact forces of 0 come back as rounding errors, which standardisation would enlarge.
        raw[:, 27:][np.abs(raw[:, 27:]) < 1e-5] = 0
    if raw.shape[1] != size:
        raise ValueError(f"{path}: states of {raw.shape[1]} numbers, but this robot's have {size}.")
    return raw.astype(np.float32)


def same_state(x: np.ndarray, other: np.ndarray, raw: np.ndarray) -> bool:
    """Whether the stored state agrees with the stored observations.

    Args:
        x: (m,N,S+N) observations. raw: (m,S) the state recovered from them.
        other: (m,N,S+N), (m,S+N) of one agent, or (m,S) not standardised.
    """
    if other.shape == raw.shape:
        return bool((np.abs(other - raw) < 1e-3 * (1 + np.abs(raw))).all())
    if other.ndim == 2:
        x = x[:, other[0, -x.shape[1] :].argmax()]
    return other.shape == x.shape and bool((np.abs(other - x) < 1e-4).all())


def omiga_columns(path: Path, rows: Rows, keys: dict, ends, env_id: str | None, found: str,
                  chunk: Callable) -> tuple[dict, np.ndarray, dict]:  # fmt: skip
    """Read OMIGA's standardised vectors into (columns, lengths, metadata).

    Args:
        rows: reads rows of a stored key. keys: the stored keys of obs, state, actions and reward.
        ends: (M,) bool, the row is the final observation of an episode.
        env_id: another partition, or None. found: the task that the file's sizes belong to.
        chunk: key -> number of rows that are compressed together.
    Raises:
        ValueError: with the file, the key and the row of what is wrong.
    """
    robot, layout = find_robot(path, env_id, found), lay_out(path, ends, ends, final_row=True)
    if (longest := layout.lengths.max()) > TIME_LIMIT:
        raise ValueError(f"{path}: an episode of {longest} steps, but the limit is {TIME_LIMIT}.")
    parts, clipped, r = robot.partition, [0], int((layout.lengths + 1).sum())
    sizes = (parts.obs_index.size, robot.spec.state_dim, parts.action_index.size)
    check_room(path, {k: (r, size) for k, size in enumerate(sizes)})
    columns = {
        "obs": np.empty((r, *parts.obs_index.shape), np.float32),
        "state": np.empty((r, robot.spec.state_dim), np.float32),
        "actions": np.empty((r, *parts.action_index.shape), np.float32),
        "avail": None,
        "reward": np.empty(r, np.float32),
    }

    def state(key, first, x):
        raw = unstandardise(path, key, first, x)
        other = rows(keys["state"], first, first + len(x))
        if not same_state(x, finite(path, keys["state"], first, other), raw):
            raise ValueError(f"{path}: keys {keys['state']} and {key} differ after row {first}.")
        return gymnasium_state(path, first, raw, robot.spec.state_dim)

    def action(key, first, x):  # OMIGA's agents drive the motors in the agents' order
        joint = finite(path, key, first, x).reshape(len(x), -1).astype(np.float32)
        if joint.shape[1] != parts.motors:
            raise ValueError(f"{path}: key {key}: {joint.shape[1]} motors, not {parts.motors}.")
        return parts.split(clip_actions(joint, clipped))

    def reward(key, first, x):
        return shared(path, key, finite(path, key, first, x))

    with tqdm(total=3 * len(ends), desc=f"reading {path.name}", unit="row", unit_scale=True) as bar:
        for name, read in (("state", state), ("actions", action), ("reward", reward)):
            key = keys["obs" if name == "state" else name]
            place(bar, layout, columns[name], rows, key, chunk(key), read)
    for a, b in blocks(r, columns["obs"][:1].nbytes):
        columns["obs"][a:b] = parts.observe(columns["state"][a:b])
    cut = layout.terminated & (layout.lengths == TIME_LIMIT)
    finish(columns, layout.lengths, layout.terminated & ~cut)
    repaired = ["each vector's standardisation was undone, and the state divided among the agents"]
    repaired += layout_repairs(layout) + clip_repair(path, clipped[0], columns["actions"])
    if cut.any():
        count = f"{int(cut.sum())} episodes of {TIME_LIMIT} steps"
        repaired.append(f"{count} count as truncated, not as terminated")
    metadata = {"env_id": robot.spec.env_id, "repaired": repaired, "final_observation": "stored"}
    return columns, layout.lengths, metadata


def read_omiga(path: Path, f, env_id: str | None) -> tuple[dict, np.ndarray, dict]:
    """Read OMIGA's HDF5 file `f` into (columns, lengths, metadata), see `load.read_episodes`.

    Its keys: s, o (M,N,S+N), a (M,N,A), r, d (M,), (M,1), (M,N) or (M,N,1).

    Raises:
        ValueError: with the file, the key and the row of what is wrong.
    """
    for k in OMIGA_KEYS:
        numbers(path, k, f[k])
    shapes = {k: f[k].shape for k in OMIGA_KEYS}
    if not all(shapes.values()) or len({s[:1] for s in shapes.values()}) != 1:
        raise ValueError(f"{path}: the number of rows differs between keys: {shapes}.")
    if len(shapes["o"]) != 3 or shapes["o"] != shapes["s"] or len(shapes["a"]) != 3:
        raise ValueError(f"{path}: keys o, s and a do not have OMIGA's three axes: {shapes}.")
    if shapes["a"][1] != shapes["o"][1]:
        raise ValueError(f"{path}: the number of agents differs between o and a: {shapes}.")
    found = OMIGA_TASKS.get(shapes["o"][1:])
    if found is None:
        raise ValueError(
            f"{path}: key o has {shapes['o'][1:]} agents and entries, as no task of OMIGA."
        )
    ends = shared(path, "d", finite(path, "d", 0, f["d"][:]).astype(bool))
    keys = {"obs": "o", "state": "s", "actions": "a", "reward": "r"}
    return omiga_columns(path, lambda k, a, b: f[k][a:b], keys, ends, env_id, found,
                         lambda k: f[k].chunks[0] if f[k].chunks else 1)  # fmt: skip
