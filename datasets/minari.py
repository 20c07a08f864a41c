"""Minari's datasets: a folder with main_data.hdf5 and, beside it, metadata.json.

Either one robot with joint observations and actions, which are divided among agents here, or
several agents: observations {"agent_i", "state"} and actions {"agent_i"}.

Sizes: L transitions of an episode, R rows returned (L+1 per episode), N agents, O observation,
       S state, A actions.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.robots import find_robot
from datasets.rows import check_room, clip_actions, clip_repair, finish, finite, numbers
from envs import PAPER_MUJOCO

MINARI_STEPS = ("rewards", "terminations", "truncations")


def read_minari(path: Path, f, env_id: str | None) -> tuple[dict, np.ndarray, dict]:
    """Read Minari's main_data.hdf5 `f` into (columns, lengths, metadata), see `load.read_episodes`.

    It holds groups episode_k with L+1 observations and L actions, rewards and flags.

    Raises:
        ValueError: with the file, the episode and the key of what is wrong.
    """
    names = [k for k in f if re.fullmatch(r"episode_\d+", k)]
    names.sort(key=lambda k: int(k[8:]))
    first, clipped = f[names[0]], [0]
    for name in names:
        wanted = ("observations", "actions", *MINARI_STEPS)
        if missing := [k for k in wanted if k not in f[name]]:
            raise ValueError(f"{path}: {name} has no key {', '.join(missing)}.")
        numbers(path, f"{name}/rewards", f[name]["rewards"])
        if len(f[name]["rewards"].shape) != 1:
            raise ValueError(f"{path}: {name}/rewards is not one-dimensional.")
    lengths = np.array([len(f[name]["rewards"]) for name in names])
    if (lengths < 1).any():
        raise ValueError(f"{path}: {names[lengths.argmin()]} holds no transition.")
    if hasattr(first["observations"], "keys"):
        split, shapes, metadata = minari_agents(path, names[0], first)
    else:
        split, shapes, metadata = minari_robot(path, first, env_id)
    r = int((lengths + 1).sum())
    check_room(path, {k: (r, *shape) for k, shape in shapes.items()})
    columns = {k: np.zeros((r, *shape), np.float32) for k, shape in shapes.items()}
    columns |= {"avail": None, "reward": np.zeros(r, np.float32)}
    terminated, row = np.zeros(len(names), bool), 0
    for e, name in enumerate(tqdm(names, desc=f"reading {path.name}", unit="episode")):
        n, group = int(lengths[e]), f[name]

        def stored(key, rows, group=group, name=name):
            values = group[key] if key in group else None
            numbers(path, f"{name}/{key}", values)
            if values.shape != (rows, *first[key].shape[1:]):
                wanted = (rows, *first[key].shape[1:])
                raise ValueError(f"{path}: {name}/{key} has shape {values.shape}, not {wanted}.")
            return finite(path, f"{name}/{key}", 0, values[:])

        obs, state, actions = split(lambda k, n=n, get=stored: get(k, n + k.startswith("obs")))
        columns["obs"][row : row + n + 1] = obs
        columns["state"][row : row + n + 1] = state
        columns["actions"][row : row + n] = clip_actions(actions, clipped)
        columns["reward"][row : row + n] = stored("rewards", n)
        terminations, truncations = (stored(k, n).astype(bool) for k in MINARI_STEPS[1:])
        if (terminations | truncations)[:-1].any():
            raise ValueError(f"{path}: {name} ends before its last step.")
        terminated[e], row = terminations[-1], row + n + 1
    finish(columns, lengths, terminated)
    repaired = metadata["repaired"] + clip_repair(path, clipped[0], columns["actions"])
    return columns, lengths, metadata | {"repaired": repaired, "final_observation": "stored"}


def minari_agents(path: Path, name: str, first) -> tuple[Callable, dict, dict]:
    """How to read a dataset of several agents.

    Returns:
        split: (get) -> obs (L+1,N,O), state (L+1,S), actions (L,N,A) of one episode, where get(key)
            reads a key of that episode; the shapes of one row of each; and metadata.
    """
    agents = sorted((k for k in first["actions"]), key=lambda k: (len(k), k))
    if sorted(first["observations"]) != sorted([*agents, "state"]):
        found = f"{list(first['observations'])}, actions of {list(first['actions'])}"
        raise ValueError(f"{path}: {name} has observations {found}, not of agents and a state.")
    observations = (f"observations/{a}" for a in (*agents, "state"))
    for k in (*(f"actions/{a}" for a in agents), *observations):
        numbers(path, f"{name}/{k}", first[k])
        if len(first[k].shape) != 2 or (k.startswith("actions") and first[k].dtype.kind != "f"):
            raise ValueError(f"{path}: {name}/{k} is {first[k]}: rows of real numbers are read.")
    o, a = (max(first[f"{k}/{i}"].shape[1] for i in agents) for k in ("observations", "actions"))

    def padded(parts: list[np.ndarray], width: int) -> np.ndarray:
        """Stack arrays (L,.) of agents, zero-padded to the same width: (L,N,width)."""
        return np.stack([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in parts], 1)

    def split(get):
        obs = padded([get(f"observations/{i}") for i in agents], o)
        return obs, get("observations/state"), padded([get(f"actions/{i}") for i in agents], a)

    n, s = len(agents), first["observations/state"].shape[1:]
    return split, {"obs": (n, o), "state": s, "actions": (n, a)}, {"repaired": []}


def minari_robot_name(metadata: Path) -> str | None:
    """The robot's name, HalfCheetah where the metadata's env_spec names HalfCheetah-v5."""
    try:
        spec = json.loads(metadata.read_text()).get("env_spec") or "{}"
        return json.loads(spec).get("id", "").partition("-")[0] or None
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{metadata}: is not Minari's metadata: {e}.") from e


def minari_robot(path: Path, first, env_id: str | None) -> tuple[Callable, dict, dict]:
    """How to read a dataset of one robot, divided among agents; returns as `minari_agents`."""
    found = None
    for folder in (path.parent, path.parent.parent):
        if found is None and (folder / "metadata.json").is_file():
            found = minari_robot_name(folder / "metadata.json")
    if env_id is None and found is not None:
        named = [task for task in PAPER_MUJOCO if task.partition("-")[0] == found]
        if not named:
            raise ValueError(f"{path}: is of {found}: give its division by --env-id.")
        found = named[0]
    robot = find_robot(path, env_id, found)
    parts, shape = robot.partition, (first["observations"].shape[1:], first["actions"].shape[1:])
    if shape != ((robot.spec.state_dim,), (parts.motors,)):
        want = f"{robot.spec.state_dim} and {parts.motors}"
        raise ValueError(
            f"{path}: observations and actions are {shape}, but {robot.spec.env_id} has {want}."
        )

    def split(get):
        state = get("observations").astype(np.float32)
        return parts.observe(state), state, parts.split(get("actions") / robot.strength)

    shapes = {"obs": parts.obs_index.shape, "state": (robot.spec.state_dim,)}
    shapes["actions"] = parts.action_index.shape
    repaired = [f"the robot's state and motors were divided as in {robot.spec.env_id}"]
    return split, shapes, {"env_id": robot.spec.env_id, "repaired": repaired}
