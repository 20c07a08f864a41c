"""Files of recorded episodes: writing, checking, and reading them into an `OfflineDataset`.

  python datasets.py info PATH                           what is in it, in any format
  python datasets.py convert PATH OUT.h5 [--env-id ID]   any format -> episodes.py's layout
  python datasets.py download [NAME] [--out DIR]         a public Vault; no NAME: a list

Which format a path holds is seen from its content, not from its name:

  episodes  pymarl's episode batch, as CFCQL and ODIS publish it, and our own: episodes.py
  omiga     OMIGA's HDF5, Multi-Agent MuJoCo: omiga.py
  vault     a folder of OG-MARL, scenario.vlt/UID: formats.py
  minari    a folder of Minari, or the main_data.hdf5 in it: formats.py

All are checked while they are read, key by key and a few megabytes at a time, straight into the
float32 arrays that training needs; there is never a second copy of them.
Nothing in a file is executed or unpickled; arrays that are not numbers are refused.

Sizes: E episodes, N agents, O observation, S state, A actions.
"""

import hashlib
import os
import re
import sys
from pathlib import Path

import h5py
import numpy as np
import torch
import tyro

import download as transfer
import formats
from buffer import OfflineDataset
from episodes import KEYS as KEYS  # these names are the interface for all who record and train
from episodes import Padded, read_episode_file
from episodes import join_rounds as join_rounds
from episodes import save_episodes as save_episodes
from episodes import write_atomic as write_atomic
from omiga import OMIGA_KEYS, read_omiga

FORMATS = {
    "episodes": "episodes in HDF5 (pymarl, CFCQL, ODIS, our own)",
    "omiga": "OMIGA's HDF5",
    "vault": "OG-MARL Vault",
    "minari": "Minari",
}
SMAC_VICTORY = 20.0  # what SMAC pays at least for a battle won, with its default scaling
QUALITIES = re.compile(r"[-_. ](expert|medium|mixed|random|replay|good|poor)", re.I)


def load_dataset(
    path: Path, holdout: float, seed: int, device: torch.device, env_id: str | None = None
) -> tuple[OfflineDataset, dict]:
    """Read recorded episodes of any format into (OfflineDataset, facts).

    `facts` holds path, sha256 (of a folder: of its files), format, episodes, transitions,
    return_mean, return_std, final_observation ("stored" or "repeated"), repaired (sentences) and,
    where known, env_id, win_rate (win_rate_inferred: from the rewards) and the file's attributes.

    Args:
        env_id: the task, where the file does not say; for a robot also another division.
    Raises:
        ValueError: with the file, the key and the row or episode of what is wrong with it.
        ImportError: with what to install to read this format.
    """
    columns, lengths, facts = read_episodes(path, env_id)
    columns.pop("won", None)
    tensors = {}
    for k in list(columns):  # one by one, so that the host's copy of each is freed on the way
        x = columns.pop(k)
        tensors[k] = None if x is None else torch.from_numpy(x).to(device)
        del x
    return OfflineDataset(**tensors, lengths=lengths, holdout=holdout, seed=seed), facts


def read_episodes(path: Path, env_id: str | None = None) -> tuple[dict, np.ndarray, dict]:
    """(columns, lengths, facts): float32 rows of all episodes end to end, `won` (E,) if known."""
    path = Path(path)
    main, kind = recognise(path)
    readers = {"episodes": read_episode_file, "omiga": read_omiga, "minari": formats.read_minari}
    try:
        if kind == "vault":
            columns, lengths, facts = formats.read_vault(path, env_id)
        else:
            with h5py.File(main, "r") as f:
                columns, lengths, facts = readers[kind](main, f, env_id)
    except (OSError, RuntimeError) as e:  # as h5py reports what it cannot decode
        raise ValueError(f"{path}: truncated or damaged: {e}") from e
    if env_id and facts.setdefault("env_id", env_id) != env_id:
        raise ValueError(f"{path} was recorded on {facts['env_id']}, not on {env_id}.")
    returns = np.add.reduceat(
        columns["reward"].astype(np.float64), np.cumsum(lengths + 1) - lengths - 1
    )
    if "won" not in columns and (won := infer_wins(columns, lengths, returns)) is not None:
        columns["won"], facts["win_rate_inferred"] = won, True
    if "won" in columns:
        facts["win_rate"] = float(columns["won"].mean())
    facts |= {
        "path": str(path),
        "sha256": content_hash(path),
        "format": kind,
        "episodes": len(lengths),
        "transitions": int(lengths.sum()),
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
    }
    for twin in twins(path, facts):
        print(f"datasets.py: warning: {path} and {twin} hold the very same data, though their "
              "names differ: one was published under a wrong name.", file=sys.stderr)  # fmt: skip
    return columns, lengths, facts


def recognise(path: Path) -> tuple[Path, str]:
    """The file to open and its format, from what is in it."""
    path = Path(os.path.abspath(path))  # "." has no name
    part = path.with_name(f"{path.name}.part")
    if path.suffix == ".part" or (not path.exists() and part.exists()):
        raise ValueError(f"{path}: a half-finished download; the same download again finishes it.")
    if path.is_dir():
        if (path / "manifest.ocdbt").is_file() and (path / "metadata.json").is_file():
            return path, "vault"
        for main in (path / "data" / "main_data.hdf5", path / "main_data.hdf5"):
            if main.is_file():
                return main, recognise(main)[1]
        if within := sorted(p.parent.name for p in path.glob("*/manifest.ocdbt")):
            raise ValueError(f"{path}: a Vault of {', '.join(within)}: give the folder of one.")
        raise ValueError(f"{path}: a folder, but neither a Vault nor a Minari dataset in HDF5.")
    if not path.is_file():
        raise ValueError(f"{path}: no such file of recorded episodes.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: an empty file.")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path}: not an HDF5 file of recorded episodes.")
    try:
        with h5py.File(path, "r") as f:
            keys = list(f)
    except (OSError, RuntimeError) as e:
        raise ValueError(f"{path}: truncated or damaged: {e}") from e
    if all(k in keys for k in OMIGA_KEYS):
        return path, "omiga"
    if any(re.fullmatch(r"episode_\d+", k) for k in keys):
        return path, "minari"
    return path, "episodes"


def infer_wins(columns: dict, lengths: np.ndarray, returns: np.ndarray) -> np.ndarray | None:
    """Which battles were won (E,), from rewards on SMAC's scale; None if they are not on it.

    SMAC pays damage done, 10 for a kill and 200 for victory, never less than 0, all scaled so that
    20 is the sum for killing everybody. Damage to what healed counts again, so a long battle may
    return 20 and be lost; but victory ends the battle, and no other step pays as much as it. Won
    is thus what terminated, returned 20 or more, and paid more in its last step than any step paid
    that did not end a battle. A file without any return of 20 or more tells nothing.
    """
    scale = returns.max() >= SMAC_VICTORY - 0.01 and returns.max() < 2 * SMAC_VICTORY
    if columns["avail"] is None or not scale or columns["reward"].min() < 0:
        return None
    last = np.cumsum(lengths + 1) - 2  # row of each episode's last step
    inside = np.ones(len(columns["reward"]), bool)
    inside[last] = False
    ordinary = columns["reward"].max(initial=0, where=inside)
    won = (columns["reward"][last] > ordinary) & (returns >= SMAC_VICTORY - 0.01)
    return won & (columns["terminated"][last] != 0)


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files in the order of their names."""
    if path.is_file():
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    digest = hashlib.sha256()
    for p in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{p.relative_to(path).as_posix()} {content_hash(p)}\n".encode())
    return digest.hexdigest()


def twins(path: Path, facts: dict) -> list[str]:
    """Other qualities of the same map, beside this one, that hold the very same data."""

    def size(p: Path) -> int:
        return sum(q.stat().st_size for q in ([p] if p.is_file() else p.rglob("*")))

    if path.is_dir():
        beside = [p.parent for p in path.resolve().parent.glob("*/manifest.ocdbt")]
    else:
        name = QUALITIES.split(path.name)[0]
        beside = [p for p in path.resolve().parent.glob(f"*{path.suffix}") if p.is_file()]
        beside = [p for p in beside if QUALITIES.split(p.name)[0] == name]
    others = [p for p in beside if not p.samefile(path) and size(p) == size(path)]
    return sorted(p.name for p in others if content_hash(p) == facts["sha256"])


def describe(path: Path, env_id: str | None = None) -> str:
    """What is in a file, in a few lines."""
    columns, lengths, facts = read_episodes(path, env_id)
    (_, n, o), s, a = columns["obs"].shape, columns["state"].shape[1], columns["actions"].shape[-1]
    won = ""
    if "win_rate" in facts:
        won = f", {100 * facts['win_rate']:.0f} % of battles won"
        won += " (inferred from the rewards)" if facts.get("win_rate_inferred") else ""
    kind = "actions" if columns["avail"] is not None else "motors each"
    ended = int(columns["terminated"].sum())
    lines = [
        f"{path}",
        f"  {FORMATS[facts['format']]}, task {facts.get('env_id', 'not stored')}",
        f"  {n} agents, {a} {kind}, observations {o}, state {s}",
        f"  {facts['episodes']} episodes, {facts['transitions']:,} transitions, "
        f"return {facts['return_mean']:.2f} +- {facts['return_std']:.2f}{won}",
        f"  {ended} episodes ended, {len(lengths) - ended} were cut; final observations are "
        f"{facts['final_observation']}",
        *(f"  repaired: {sentence}" for sentence in facts["repaired"]),
        f"  sha256 {facts['sha256']}, of the content {facts.get('content_sha256', 'not stored')}",
    ]
    return "\n".join(lines)


def convert(path: Path, out: Path, env_id: str | None = None) -> None:
    """Write what `path` holds, in any format, in the layout of episodes.py."""
    columns, lengths, facts = read_episodes(path, env_id)
    discrete = columns["avail"] is not None
    valid = np.ones((len(columns["reward"]), 1))

    def padded(rows, dtype, change=lambda x: x):
        return Padded(rows, lengths, dtype, change)

    arrays = {k: padded(columns[k], np.float32) for k in ("state", "obs", "actions")}
    arrays["reward"] = padded(columns["reward"][:, None], np.float32)
    arrays["terminated"] = padded(columns["terminated"][:, None], np.uint8)
    arrays["filled"] = padded(valid, np.int64)
    if discrete:
        arrays["avail_actions"] = padded(columns["avail"], np.int32)
        arrays["actions"] = padded(columns["actions"], np.int64, lambda x: x.argmax(-1)[..., None])
    if "won" in columns:
        arrays["won"] = columns["won"].astype(np.uint8)
    dropped = ("path", "sha256", "format", "content_sha256", "win_rate")
    about = {k: v for k, v in facts.items() if k not in dropped}
    about |= {"repaired": "\n".join(facts["repaired"]), "converted_from": facts["format"],
              "converted_sha256": facts["sha256"]}  # fmt: skip
    save_episodes(out, arrays, about)


def info(path: tyro.conf.Positional[Path], /, env_id: str | None = None) -> None:
    """Print what recorded episodes hold.

    Args:
        path: a file, or a folder of a Vault or of Minari.
        env_id: the task, where the file does not say; for a robot also another division.
    """
    print(describe(path, env_id))


def convert_command(
    path: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path], /, env_id: str | None = None
) -> None:
    """Write recorded episodes of any format in our own layout (HDF5).

    Args:
        path: a file, or a folder of a Vault or of Minari.
        out: the file to write.
        env_id: the task, where the file does not say; for a robot also another division.
    """
    convert(path, out, env_id)
    print(describe(out))


def download_command(name: tyro.conf.Positional[str] = "", /, out: Path = Path("vaults")) -> None:
    """Fetch a public Vault and unpack it; an interrupted transfer is continued by the same command.

    Args:
        name: such as omiga/3hopper; without one, what there is.
        out: the folder to unpack into.
    """
    if name not in transfer.CATALOGUE:
        print(transfer.listing())
    if name:
        print(f"unpacked {transfer.download(name, out)}")


if __name__ == "__main__":
    commands = {"info": info, "convert": convert_command, "download": download_command}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    except (ValueError, OSError, ImportError) as e:
        sys.exit(f"datasets.py: {e}")
    except KeyboardInterrupt:
        sys.exit("datasets.py: interrupted.")
