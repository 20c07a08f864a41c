"""OG-MARL's Vaults: a folder scenario.vlt/UID, read with tensorstore (JAX is not needed).

A Vault lacks the observation after an episode's last action (except OMIGA's, see omiga.py). If the
task terminated there, the last observation is repeated in its place: nothing is bootstrapped from
it and the reward is kept, but the dynamics of that one step are not real
(metadata["final_observation"] is "repeated"). If the episode was only truncated, its last
transition is dropped, because its bootstrap would be wrong.

Sizes: M rows stored, R rows returned, E episodes, N agents, O observation, S state, A actions,
       B recordings side by side.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.omiga import OMIGA_TASKS, omiga_columns
from datasets.rows import (
    Layout,
    Rows,
    allowed,
    check_room,
    clip_actions,
    clip_repair,
    finish,
    finite,
    lay_out,
    layout_repairs,
    numbers,
    one_hot,
    place,
    shared,
)
from envs import PAPER_SMAC

VAULT_KEYS = ("observations", "actions", "rewards", "terminals", "truncations", "infos.state")
VAULT_MUJOCO = {
    "3hopper": "Hopper-3x1",
    "2ant": "Ant-2x4",
    "4ant": "Ant-4x2",
    "6halfcheetah": "HalfCheetah-6x1",
    "2halfcheetah": "HalfCheetah-2x3",
}


def leaves(tree: dict, prefix: str = "") -> list[str]:
    """The names of a nested dict's entries, such as infos.state."""
    return [
        leaf
        for k, v in tree.items()
        for leaf in (leaves(v, f"{prefix}{k}.") if isinstance(v, dict) else [f"{prefix}{k}"])
    ]


@contextlib.contextmanager
def decoding(path: Path, key: str) -> Iterator[None]:
    """Report what tensorstore raises on a damaged Vault as a ValueError of one line."""
    try:
        yield
    except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError, MemoryError) as e:
        raise ValueError(f"{path}: key {key} cannot be read: {str(e)[:200]}") from e


def open_vault(path: Path) -> tuple[dict, int]:
    """The stored arrays {key: (B,time,...)} of a Vault, and the number of rows written to it.

    Raises:
        ImportError: tensorstore is not installed.
        ValueError: a key is missing, damaged, or holds no numbers.
    """
    try:
        import tensorstore
    except ImportError as e:
        raise ImportError("Vaults are read with tensorstore: pip install tensorstore") from e
    if odd := [p for p in path.rglob("*") if not (p.is_file() or p.is_dir())]:
        raise ValueError(f"{odd[0]}: not a regular file.")  # reading a pipe would wait for ever
    try:
        structure = json.loads((path / "metadata.json").read_text())["structure_shape"]
        wanted = leaves(structure)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path}: metadata.json is not that of a Vault: {e!r}.") from e

    def opened(key: str):
        files = {"driver": "file", "path": f"{path.resolve()}/"}
        base = {"driver": "ocdbt", "base": files, "path": key}
        with decoding(path, key):
            return tensorstore.open({"driver": "zarr", "kvstore": base}, read=True).result()

    if missing := [k for k in VAULT_KEYS if k not in wanted]:
        raise ValueError(f"{path}: no key {', '.join(missing)}; found {wanted}.")
    keys = [*VAULT_KEYS, *(["infos.legals"] if "infos.legals" in wanted else [])]
    index = opened("vault_index")
    numbers(path, "vault_index", index)
    with decoding(path, "vault_index"):
        count = int(index[(0,) * index.rank].read().result())
    stores = {k: opened(f"{k}.") for k in keys}
    for k, store in stores.items():
        numbers(path, k, store)
    return stores, count


def read_vault(path: Path, env_id: str | None) -> tuple[dict, np.ndarray, dict]:
    """Read one quality of a Vault, the folder scenario.vlt/UID, into (columns, lengths, metadata).

    See `load.read_episodes`.

    Raises:
        ImportError: tensorstore is not installed.
        ValueError: with the folder, the key and the row of what is wrong.
    """
    stores, time = open_vault(path)
    streams = stores["rewards"].shape[0]  # B recordings, read one after another
    for k, store in stores.items():
        if store.shape[0] != streams or store.shape[1] < time or time < 1:
            raise ValueError(
                f"{path}: key {k}, {store.shape}, cannot hold {streams} x {time} rows."
            )
    if len(stores["infos.state"].shape) != 3:
        shape = stores["infos.state"].shape
        raise ValueError(f"{path}: key infos.state, {shape}: rows of numbers are read.")

    def rows(key, a, b):
        parts = [(s, max(a - s * time, 0), min(b - s * time, time)) for s in range(streams)]
        with decoding(path, key):
            read = [stores[key][s, i:j].read().result() for s, i, j in parts if i < j]
        return np.concatenate(read)

    def chunk(key):
        return stores[key].chunk_layout.read_chunk.shape[1]

    total = streams * time
    check_room(path, {k: (total, *stores[k].shape[2:]) for k in ("rewards", "terminals")})

    def flags(key):
        return finite(path, key, 0, rows(key, 0, total)).reshape(total, -1) != 0

    last = range(time - 1, total, time)  # of each recording
    if any(not any(rows(k, a, a + 1).any() for k in ("observations", "infos.state")) for a in last):
        raise ValueError(f"{path}: its index counts {time} rows, of which the last are empty.")
    over = flags("terminals")
    terminal = over.all(-1)  # an episode has ended once all agents have; cut if one was only cut
    ends = (over | flags("truncations")).all(-1)
    if streams > 1:
        ends[time - 1 :: time] = True  # the end of each recording
    shape, state = stores["observations"].shape[2:], stores["infos.state"].shape[2:]
    found = OMIGA_TASKS.get(shape)
    if found and "infos.legals" not in stores and state in ((shape[1],), (shape[1] - shape[0],)):
        keys = {"obs": "observations", "state": "infos.state"}
        keys |= {"actions": "actions", "reward": "rewards"}
        return omiga_columns(path, rows, keys, ends, env_id, found, chunk)
    layout = lay_out(path, ends, terminal, final_row=False)
    columns, metadata = vault_columns(path, rows, stores, layout, chunk)
    name = path.resolve().parent.name.removesuffix(".vlt")
    if name in PAPER_SMAC or name in VAULT_MUJOCO:
        metadata["env_id"] = VAULT_MUJOCO.get(name, name)
    return columns, layout.lengths, metadata


def vault_columns(path: Path, rows: Rows, stores: dict, layout: Layout, chunk: Callable):
    """Read a Vault whose agents have their own observations into (columns, metadata)."""
    discrete, clipped = "infos.legals" in stores, [0]
    of_agents = ("observations", "actions", *(["infos.legals"] if discrete else []))
    if len({stores[k].shape[2] for k in of_agents}) != 1:
        shapes = {k: stores[k].shape for k in of_agents}
        raise ValueError(f"{path}: the number of agents differs between keys: {shapes}.")
    if not discrete and stores["actions"].dtype.numpy_dtype.kind != "f":
        raise ValueError(f"{path}: actions are action ids, but there is no key infos.legals.")
    total, r = len(layout.target), int((layout.lengths + 1).sum())
    sources = {"obs": "observations", "state": "infos.state", "avail": "infos.legals",
               "actions": "actions", "reward": "rewards"}  # fmt: skip
    shapes = {name: stores[k].shape[2:] for name, k in sources.items() if k in stores}
    shapes |= {"reward": ()} | ({"actions": shapes["avail"]} if discrete else {})
    check_room(path, {name: (r, *shape) for name, shape in shapes.items()})
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
            choice, avail = x.reshape(x.shape[:2]), columns["avail"][to]
            return one_hot(path, "infos.legals", where, choice, avail, exempt=to < 0)
        return clip_actions(x, clipped) if key == "actions" else x

    with tqdm(total=total * len(columns), desc=f"reading {path.name}", unit="row",
              unit_scale=True) as bar:  # fmt: skip
        for name, out in columns.items():
            place(bar, layout, out, rows, sources[name], chunk(sources[name]), read)
    for name in columns.keys() - {"reward"}:
        columns[name][layout.repeated] = columns[name][layout.repeated - 1]
    finish(columns, layout.lengths, layout.terminated)
    repaired = layout_repairs(layout)
    repaired += clip_repair(path, clipped[0], columns["actions"])
    if count := len(layout.repeated):
        repaired.append(f"the last observation of {count} terminated episodes was repeated")
    if count := len(layout.lengths) - len(layout.repeated):
        repaired.append(f"the last transition of {count} truncated episodes was dropped")
    metadata = {"final_observation": "repeated", "repaired": repaired}
    return {"avail": None} | columns, metadata
