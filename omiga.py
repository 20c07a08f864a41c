"""OMIGA's recordings of Multi-Agent MuJoCo, made into partial observations again.

  read_omiga     OMIGA's HDF5: s, o, a, r, d at the root
  omiga_columns  the same vectors wherever they are stored; OG-MARL has them as Vaults
  robot          which robot, and how it is divided among agents

The traps of these files, and what is done about them:

  o holds per agent the *whole* state and the agent's number, standardised within that single
    vector: no agent's view is partial. Number entries are 1 or 0 before standardisation, so two of
    them give mean and deviation back exactly. The state so regained is divided by robots.partition.
  The robots are driven by the agents' actions in the order of the agents; gymnasium-robotics
    divides Ant's motors otherwise. The joint action is rebuilt, then divided as our agents are.
  Actions may lie outside [-1,1], where the simulator cuts them off: they are clipped.
  The row with d = 1 is an episode's extra, final observation. d does not tell time limits from
    falls: an episode of exactly 1000 steps was cut, a shorter one ended.

Sizes: M rows stored, R rows returned, E episodes, N agents, O observation, S state, A actions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import envs
import robots
from rows import (
    Rows,
    blocks,
    check_action_range,
    finish,
    finite,
    lay_out,
    numbers,
    place,
    remarks,
    shared,
)

TIME_LIMIT = 1000  # steps, of all MuJoCo tasks
OMIGA_KEYS = ("s", "o", "a", "r", "d")
OMIGA_TASKS = {(3, 14): "Hopper-3x1", (2, 113): "Ant-2x4", (6, 23): "HalfCheetah-6x1"}  # by (N,D)
ANT_WORLD = slice(27, 33)  # contact forces on the world body: always 0, absent in Gymnasium's v5


class Robot(NamedTuple):
    env_id: str
    partition: robots.Partition
    state_dim: int  # S, as Gymnasium's v5 shows it
    strength: np.ndarray  # (motors,) what 1 means to a motor


def robot(path: Path, env_id: str | None, found: str | None) -> Robot:
    """The robot and its division: `env_id` if given, else as `found` in the file."""
    name = env_id or found
    if name is None:
        raise ValueError(f"{path}: does not say how its robot is divided: give --env-id.")
    body = name.partition("-")[0]
    if body not in envs.MUJOCO_ROBOTS or (found and body != found.partition("-")[0]):
        raise ValueError(f"{path}: is of {found or 'a robot'}, which {name} is not.")
    spec = envs.make(name).spec
    import gymnasium  # it is there, or envs.make would have said how to install it

    env = gymnasium.make(f"{body}-v5")
    strength = env.action_space.high.astype(np.float32)
    env.close()
    return Robot(name, robots.partition(name), spec.state_dim, strength)


def unstandardise(path: Path, key: str, first: int, x: np.ndarray) -> np.ndarray:
    """OMIGA's vectors (m,N,S+N), each standardised within itself -> the one raw state (m,S).

    Before standardisation agent i's last N entries are its number, 1 at i and 0 elsewhere; so the
    entry at i is (1 - mean) / std, the others are -mean / std, and x = (v - mean) / std inverts.
    """
    n = x.shape[1]
    x = finite(path, key, first, x).astype(np.float64)
    number, own = x[..., -n:], np.eye(n, dtype=bool)
    off = number[:, ~own].reshape(len(x), n, n - 1)
    zero, unit = off.mean(-1), number[:, own] - off.mean(-1)  # (m,N) images of 0, and of 1 less 0
    good = (np.abs(x.mean(-1)) < 1e-3) & (np.abs(x.std(-1) - 1) < 1e-3)
    good &= (unit > 1e-4) & (np.ptp(off, -1) < 1e-3)
    raw = (x[..., :-n] - zero[..., None]) / np.where(good, unit, 1)[..., None]  # (m,N,S)
    state = raw.mean(1)
    good &= (np.abs(raw - state[:, None]) < 1e-3 * (1 + np.abs(state[:, None]))).all(-1)
    if not good.all():
        row = first + int(np.argwhere(~good)[0][0])
        raise ValueError(
            f"{path}: key {key}, row {row}: not one state, standardised for each agent with its "
            "number as OMIGA does, so it cannot be divided among agents."
        )
    return state


def gymnasium_state(path: Path, first: int, raw: np.ndarray, size: int) -> np.ndarray:
    """Gym v2's state (m,S) as Gymnasium v5 has it, float32: Ant's without the world's contacts."""
    if raw.shape[1] == 111 and size == 105:
        if (wrong := (np.abs(raw[:, ANT_WORLD]) > 1e-3).any(1)).any():
            row = first + int(wrong.argmax())
            raise ValueError(f"{path}: row {row}: contact forces on Ant's world body, must be 0.")
        raw = np.delete(raw, np.arange(111)[ANT_WORLD], 1)
        # Contacts that were 0 come back as rounding errors, which a normaliser would blow up.
        raw[:, 27:][np.abs(raw[:, 27:]) < 1e-5] = 0
    if raw.shape[1] != size:
        raise ValueError(f"{path}: states of {raw.shape[1]} numbers; this robot's have {size}.")
    return raw.astype(np.float32)


def same_state(x: np.ndarray, other: np.ndarray, raw: np.ndarray) -> bool:
    """Whether `other` (m,N,S+N), (m,S+N) of one agent or raw (m,S) tells what x (m,N,S+N) tells."""
    if other.shape == raw.shape:
        return bool((np.abs(other - raw) < 1e-3 * (1 + np.abs(raw))).all())
    if other.ndim == 2:
        x = x[:, other[0, -x.shape[1] :].argmax()]
    return other.shape == x.shape and bool((np.abs(other - x) < 1e-4).all())


def omiga_columns(path: Path, rows: Rows, keys: dict, ends, env_id: str | None, found: str,
                  chunk: Callable) -> tuple[dict, np.ndarray, dict]:  # fmt: skip
    """Columns out of standardised vectors.

    Args:
        rows: of the stored keys, which `keys` names: obs, state, actions, reward.
        ends: (M,) bool, the row is an episode's final observation. found: the file's own task.
        chunk: key -> rows that are compressed together.
    """
    body, layout = robot(path, env_id, found), lay_out(path, ends, ends, final_row=True)
    if (longest := layout.lengths.max()) > TIME_LIMIT:
        raise ValueError(f"{path}: an episode of {longest} steps; the limit is {TIME_LIMIT}.")
    parts, beyond, r = body.partition, [0], int((layout.lengths + 1).sum())
    columns = {
        "obs": np.empty((r, *parts.obs_index.shape), np.float32),
        "state": np.empty((r, body.state_dim), np.float32),
        "actions": np.empty((r, *parts.action_index.shape), np.float32),
        "avail": None,
        "reward": np.empty(r, np.float32),
    }

    def state(key, first, x):
        raw = unstandardise(path, key, first, x)
        other = rows(keys["state"], first, first + len(x))
        if not same_state(x, finite(path, keys["state"], first, other), raw):
            raise ValueError(f"{path}: keys {keys['state']} and {key} differ after row {first}.")
        return gymnasium_state(path, first, raw, body.state_dim)

    def action(key, first, x):  # in the agents' order straight into the motors
        joint = finite(path, key, first, x).reshape(len(x), -1).astype(np.float32)
        if joint.shape[1] != parts.motors:
            raise ValueError(f"{path}: key {key}: {joint.shape[1]} motors, not {parts.motors}.")
        return parts.split(check_action_range(joint, beyond))

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
    said = ["each vector's standardisation was undone, and the state divided among the agents"]
    said += remarks(layout, beyond[0], len(ends) * parts.motors)
    if cut.any():
        said.append(f"{int(cut.sum())} episodes of {TIME_LIMIT} steps count as cut, not as ended")
    facts = {"env_id": body.env_id, "repaired": said, "final_observation": "stored"}
    return columns, layout.lengths, facts


def read_omiga(path: Path, f, env_id: str | None) -> tuple[dict, np.ndarray, dict]:
    """OMIGA's HDF5; s, o (M,N,S+N), a (M,N,A), r, d (M,), (M,1), (M,N) or (M,N,1)."""
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
        raise ValueError(f"{path}: key o has {shapes['o'][1:]} agents and entries: no OMIGA task.")
    ends = shared(path, "d", finite(path, "d", 0, f["d"][:]).astype(bool))
    keys = {"obs": "o", "state": "s", "actions": "a", "reward": "r"}
    return omiga_columns(path, lambda k, a, b: f[k][a:b], keys, ends, env_id, found,
                         lambda k: f[k].chunks[0] if f[k].chunks else 1)  # fmt: skip
