"""Readers of the formats in which others publish recorded episodes.

  read_vault        OG-MARL's Vault: a folder scenario.vlt/UID; needs tensorstore, not JAX
  read_minari       Minari's HDF5: joint (one robot, divided here) or divided among agents already
  omiga.read_omiga  OMIGA's HDF5 (episodes.read_episode_file: pymarl's, our own)

Each returns (columns, lengths, facts): what `OfflineDataset` takes, all episodes end to end, L+1
rows for an episode of L transitions.

A Vault (OMIGA's apart) lacks the observation after an episode's last action. If the task ended
there, the last observation stands in for it, since nothing is bootstrapped from it: the reward is
kept, the dynamics of that one step are not real (facts["final_observation"] is "repeated"). If the
episode was only cut, its last transition is dropped: its bootstrap would be wrong.

Sizes: M rows stored, R rows returned, E episodes, N agents, O observation, S state,
       A actions, B recordings side by side.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

import envs
from omiga import OMIGA_TASKS, omiga_columns, robot
from rows import (
    Layout,
    Rows,
    allowed,
    check_action_range,
    finish,
    finite,
    lay_out,
    numbers,
    one_hot,
    place,
    remarks,
    shared,
)

VAULT_KEYS = ("observations", "actions", "rewards", "terminals", "truncations", "infos.state")
VAULT_MUJOCO = {
    **{"3hopper": "Hopper-3x1", "2ant": "Ant-2x4", "4ant": "Ant-4x2"},
    **{"6halfcheetah": "HalfCheetah-6x1", "2halfcheetah": "HalfCheetah-2x3"},
}
MINARI_STEPS = ("rewards", "terminations", "truncations")


# --------------------------------------------------------------------------------------------------
# OG-MARL Vault
# --------------------------------------------------------------------------------------------------


def open_vault(path: Path) -> tuple[dict, int]:
    """{key: array (B,time,...)} of a Vault, and how many rows were written to it."""
    try:
        import tensorstore
    except ImportError as e:
        raise ImportError("Vaults are read with tensorstore: pip install tensorstore") from e
    try:
        structure = json.loads((path / "metadata.json").read_text())["structure_shape"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: metadata.json is not a Vault's: {e!r}.") from e

    def leaves(tree: dict, prefix: str = "") -> list[str]:
        return [
            leaf
            for k, v in tree.items()
            for leaf in (leaves(v, f"{prefix}{k}.") if isinstance(v, dict) else [f"{prefix}{k}"])
        ]

    def opened(key: str):
        base = {"driver": "ocdbt", "base": f"file://{path.resolve()}/", "path": key}
        try:
            return tensorstore.open({"driver": "zarr", "kvstore": base}, read=True).result()
        except ValueError as e:
            raise ValueError(f"{path}: key {key} cannot be read: {str(e)[:200]}") from e

    if missing := [k for k in VAULT_KEYS if k not in leaves(structure)]:
        raise ValueError(f"{path}: no key {', '.join(missing)}; found {leaves(structure)}.")
    wanted = [*VAULT_KEYS, *(["infos.legals"] if "infos.legals" in leaves(structure) else [])]
    count = int(np.ravel(opened("vault_index").read().result())[0])
    stores = {k: opened(f"{k}.") for k in wanted}
    for k, store in stores.items():
        numbers(path, k, store)
    return stores, count


def read_vault(path: Path, env_id: str | None) -> tuple[dict, np.ndarray, dict]:
    """One quality of an OG-MARL Vault: the folder scenario.vlt/UID."""
    stores, time = open_vault(path)
    streams = stores["rewards"].shape[0]  # B recordings side by side, read one after the other
    for k, store in stores.items():
        if store.shape[0] != streams or store.shape[1] < time or time < 1:
            raise ValueError(
                f"{path}: key {k}, {store.shape}, cannot hold {streams} x {time} rows."
            )

    def rows(key, a, b):
        parts = [(s, max(a - s * time, 0), min(b - s * time, time)) for s in range(streams)]
        try:
            read = [stores[key][s, i:j].read().result() for s, i, j in parts if i < j]
        except ValueError as e:
            raise ValueError(f"{path}: key {key} cannot be read: {str(e)[:200]}") from e
        return np.concatenate(read)

    def chunk(key):
        return stores[key].chunk_layout.read_chunk.shape[1]

    def flags(key):
        return finite(path, key, 0, rows(key, 0, streams * time)).reshape(streams * time, -1) != 0

    terminal = flags("terminals").all(-1)
    ends = terminal | flags("truncations").all(-1)
    if streams > 1:
        ends[time - 1 :: time] = True  # where one recording stops, another begins
    shape, state = stores["observations"].shape[2:], stores["infos.state"].shape[2:]
    found = OMIGA_TASKS.get(shape)
    if found and "infos.legals" not in stores and state in ((shape[1],), (shape[1] - shape[0],)):
        keys = {"obs": "observations", "state": "infos.state"}
        keys |= {"actions": "actions", "reward": "rewards"}
        return omiga_columns(path, rows, keys, ends, env_id, found, chunk)
    layout = lay_out(path, ends, terminal, final_row=False)
    columns, facts = vault_columns(path, rows, stores, layout, chunk)
    name = path.resolve().parent.name.removesuffix(".vlt")
    if name in envs.PAPER_SMAC or name in VAULT_MUJOCO:
        facts["env_id"] = VAULT_MUJOCO.get(name, name)
    return columns, layout.lengths, facts


def vault_columns(path: Path, rows: Rows, stores: dict, layout: Layout, chunk: Callable):
    """Columns of a Vault that shows each agent its own observation; what was repaired."""
    discrete, beyond = "infos.legals" in stores, [0]
    of_agents = ("observations", "actions", *(["infos.legals"] if discrete else []))
    if len({stores[k].shape[2] for k in of_agents}) != 1:
        shapes = {k: stores[k].shape for k in of_agents}
        raise ValueError(f"{path}: the number of agents differs between keys: {shapes}.")
    if not discrete and stores["actions"].dtype.numpy_dtype.kind != "f":
        raise ValueError(f"{path}: actions are numbered, but there is no key infos.legals.")
    total, r = len(layout.target), int((layout.lengths + 1).sum())
    sources = {"obs": "observations", "state": "infos.state", "avail": "infos.legals",
               "actions": "actions", "reward": "rewards"}  # fmt: skip
    shapes = {name: stores[k].shape[2:] for name, k in sources.items() if k in stores}
    shapes |= {"reward": ()} | ({"actions": shapes["avail"]} if discrete else {})
    columns = {name: np.empty((r, *shape), np.float32) for name, shape in shapes.items()}

    def read(key, first, x):
        x = finite(path, key, first, x)

        def where(i):
            return f"row {first + i}"

        if key == "rewards":
            return shared(path, key, x)
        if key == "infos.legals":
            return allowed(path, key, where, x)
        if key == "actions" and discrete:
            to = layout.target[first : first + len(x)]
            choice, legal = x.reshape(x.shape[:2]), columns["avail"][to]
            return one_hot(path, "infos.legals", where, choice, legal, exempt=to < 0)
        return check_action_range(x, beyond) if key == "actions" else x

    with tqdm(total=total * len(columns), desc=f"reading {path.name}", unit="row",
              unit_scale=True) as bar:  # fmt: skip
        for name, out in columns.items():
            place(bar, layout, out, rows, sources[name], chunk(sources[name]), read)
    for name in columns.keys() - {"reward"}:
        columns[name][layout.repeated] = columns[name][layout.repeated - 1]
    finish(columns, layout.lengths, layout.terminated)
    said = remarks(layout, beyond[0], total * int(np.prod(shapes["actions"])))
    if len(layout.repeated):
        said.append(f"the last observation of {len(layout.repeated)} ended episodes was repeated")
    if cut := len(layout.lengths) - len(layout.repeated):
        said.append(f"the last transition of {cut} episodes that were only cut was dropped")
    facts = {"final_observation": "repeated", "repaired": said}
    return {"avail": None} | columns, facts


# --------------------------------------------------------------------------------------------------
# Minari
# --------------------------------------------------------------------------------------------------


def read_minari(path: Path, f, env_id: str | None) -> tuple[dict, np.ndarray, dict]:
    """Minari's main_data.hdf5: groups episode_k with L+1 observations and L of all else."""
    names = [k for k in f if re.fullmatch(r"episode_\d+", k)]
    names.sort(key=lambda k: int(k[8:]))
    first, beyond = f[names[0]], [0]
    for name in names:
        wanted = ("observations", "actions", *MINARI_STEPS)
        if missing := [k for k in wanted if k not in f[name]]:
            raise ValueError(f"{path}: {name} has no key {', '.join(missing)}.")
        if len(getattr(f[name]["rewards"], "shape", ())) != 1:
            raise ValueError(f"{path}: {name}/rewards is no row of numbers.")
    lengths = np.array([len(f[name]["rewards"]) for name in names])
    if (lengths < 1).any():
        raise ValueError(f"{path}: {names[lengths.argmin()]} holds no transition.")
    if hasattr(first["observations"], "keys"):
        split, shapes, facts = minari_agents(path, names[0], first)
    else:
        split, shapes, facts = minari_robot(path, first, env_id)
    r = int((lengths + 1).sum())
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
        columns["actions"][row : row + n] = check_action_range(actions, beyond)
        columns["reward"][row : row + n] = stored("rewards", n)
        over, cut = (stored(k, n).astype(bool) for k in MINARI_STEPS[1:])
        if (over | cut)[:-1].any():
            raise ValueError(f"{path}: {name} ends before its last step.")
        terminated[e], row = over[-1], row + n + 1
    finish(columns, lengths, terminated)
    values = int(np.prod(columns["actions"].shape))
    clipped = [f"{beyond[0] / values:.1%} of the action values were clipped to [-1,1]"]
    said = facts["repaired"] + (clipped if beyond[0] else [])
    return columns, lengths, facts | {"repaired": said, "final_observation": "stored"}


def minari_agents(path: Path, name: str, first) -> tuple[Callable, dict, dict]:
    """For observations {"agent_i", "state"} and actions {"agent_i"}: how to stack one episode."""
    agents = sorted((k for k in first["actions"]), key=lambda k: (len(k), k))
    if sorted(first["observations"]) != sorted([*agents, "state"]):
        found = f"{list(first['observations'])}, actions of {list(first['actions'])}"
        raise ValueError(f"{path}: {name} has observations {found}: no agents and a state.")
    for k in (*(f"actions/{a}" for a in agents), *(f"observations/{a}" for a in agents)):
        numbers(path, f"{name}/{k}", first[k])
        if len(first[k].shape) != 2 or (k.startswith("actions") and first[k].dtype.kind != "f"):
            raise ValueError(f"{path}: {name}/{k} is {first[k]}: rows of real numbers are read.")
    o, a = (max(first[f"{k}/{i}"].shape[1] for i in agents) for k in ("observations", "actions"))

    def padded(parts: list[np.ndarray], width: int) -> np.ndarray:
        """Agents differ in width, a column of zeros makes up for it."""
        return np.stack([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in parts], 1)

    def split(get):
        obs = padded([get(f"observations/{i}") for i in agents], o)
        return obs, get("observations/state"), padded([get(f"actions/{i}") for i in agents], a)

    n, s = len(agents), first["observations/state"].shape[1:]
    return split, {"obs": (n, o), "state": s, "actions": (n, a)}, {"repaired": []}


def minari_robot_name(metadata: Path) -> str | None:
    """HalfCheetah, of metadata whose env_spec is of HalfCheetah-v5."""
    try:
        spec = json.loads(metadata.read_text()).get("env_spec") or "{}"
        return json.loads(spec).get("id", "").partition("-")[0] or None
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{metadata}: is not Minari's: {e}.") from e


def minari_robot(path: Path, first, env_id: str | None) -> tuple[Callable, dict, dict]:
    """For one robot, joint observations and actions: how to divide one episode."""
    found = None
    for folder in (path.parent, path.parent.parent):
        if found is None and (folder / "metadata.json").is_file():
            found = minari_robot_name(folder / "metadata.json")
    if env_id is None and found is not None:
        named = [task for task in envs.PAPER_MUJOCO if task.partition("-")[0] == found]
        if not named:
            raise ValueError(f"{path}: is of {found}, its division is unknown: give --env-id.")
        found = named[0]
    body = robot(path, env_id, found)
    parts, shape = body.partition, (first["observations"].shape[1:], first["actions"].shape[1:])
    if shape != ((body.state_dim,), (parts.motors,)):
        want = f"{body.state_dim} and {parts.motors}"
        raise ValueError(f"{path}: observations and actions {shape}; {body.env_id} has {want}.")

    def split(get):
        state = get("observations").astype(np.float32)
        return parts.observe(state), state, parts.split(get("actions") / body.strength)

    shapes = {"obs": parts.obs_index.shape, "state": (body.state_dim,)}
    said = [f"the robot's state and motors were divided as in {body.env_id}"]
    return split, shapes | {"actions": parts.action_index.shape}, {
        "env_id": body.env_id, "repaired": said,
    }  # fmt: skip
