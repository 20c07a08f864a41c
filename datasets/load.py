"""Reading recorded episodes of any format into an `OfflineDataset`.

The format of a path is recognised from its content, not from its name:

  episodes  pymarl's episode batch, as CFCQL and ODIS publish it, and our own: episodes.py
  omiga     OMIGA's HDF5 files of Multi-Agent MuJoCo: omiga.py
  vault     a folder of OG-MARL, scenario.vlt/UID: og_marl.py
  minari    a folder of Minari, or the main_data.hdf5 in it: minari.py

Sizes: E episodes, R rows (L+1 for an episode of L steps), N agents, O observation, S state,
       A actions.
"""

import hashlib
import re
import sys
from pathlib import Path

import numpy as np
import torch

import envs
from buffer import OfflineDataset
from datasets.episodes import read_episode_file, text
from datasets.files import absolute, open_hdf5
from datasets.minari import read_minari
from datasets.og_marl import VAULT_MUJOCO, read_vault
from datasets.omiga import OMIGA_KEYS, OMIGA_TASKS, read_omiga

SMAC_VICTORY = 20.0  # smallest return of a won episode in SMAC, with its default scaling
SMAC_MAPS = (  # that public datasets are of
    *("3m", "8m", "25m", "5m_vs_6m", "8m_vs_9m", "10m_vs_11m", "27m_vs_30m", "MMM", "MMM2"),
    *("2s3z", "3s5z", "3s5z_vs_3s6z", "3s_vs_3z", "3s_vs_4z", "3s_vs_5z", "1c3s5z", "2m_vs_1z"),
    *("corridor", "6h_vs_8z", "2s_vs_1sc", "so_many_baneling", "bane_vs_bane", "2c_vs_64zg"),
)
QUALITIES = re.compile(r"[-_. ](expert|medium|mixed|random|replay|good|poor)", re.I)


def load_dataset(
    path: Path, device: torch.device, env_id: str | None = None, holdout: float = 0.05
) -> tuple[OfflineDataset, dict]:
    """Read recorded episodes of any format into (OfflineDataset, metadata).

    Args:
        path: a file, or a folder of a Vault or of Minari.
        env_id: the task if the file does not say it; for a robot of OMIGA or Minari also
            another division.
        holdout: share of the episodes that is held out, always the same ones.
    Returns:
        The dataset on `device`, and metadata: path, sha256 (for a folder: of all its files),
        format, episodes, transitions, return_mean, return_std, final_observation ("stored" or
        "repeated"), repaired (a list of sentences) and, where known, env_id, win_rate,
        win_rate_inferred (True if it is from the rewards) and the file's attributes.
    Raises:
        ValueError: with the file, the key and the row or episode of what is wrong with it.
        ImportError: with what to install to read this format.
    """
    columns, lengths, metadata = read_episodes(path, env_id)
    columns.pop("won", None)
    tensors = {}
    for k in list(columns):  # one by one, to free the copy in the host's memory of each
        x = columns.pop(k)
        tensors[k] = None if x is None else torch.from_numpy(x).to(device)
        del x
    return OfflineDataset(**tensors, lengths=lengths, holdout=holdout), metadata


def read_episodes(path: Path, env_id: str | None = None) -> tuple[dict, np.ndarray, dict]:
    """Read recorded episodes of any format as numpy arrays.

    Args:
        path, env_id: as in `load_dataset`.
    Returns:
        columns: obs (R,N,O), state (R,S), actions (R,N,A), avail (R,N,A) or None, reward (R,),
            terminated (R,), float32, all episodes one after another with L+1 rows for L steps; and
            won (E,) bool where it is known. lengths: (E,) steps. metadata: as in `load_dataset`.
    Raises:
        ValueError, ImportError: as in `load_dataset`.
    """
    path = Path(path)
    main, kind = recognise(path)
    readers = {"episodes": read_episode_file, "omiga": read_omiga, "minari": read_minari}
    if kind == "vault":
        columns, lengths, metadata = read_vault(path, env_id)
    else:
        with open_hdf5(main) as f:
            columns, lengths, metadata = readers[kind](main, f, env_id)
    if env_id:
        word = rf"(?<![a-z0-9])(?<!_vs_){re.escape(env_id.lower())}(?!_vs_)(?![a-z0-9])"
        names = absolute(path).parts[:-3:-1]  # of the file and of its folder
        named = None if re.search(word, path.name.lower()) else task_in_name(*names)
        recorded = metadata.setdefault("env_id", named or env_id)
        if recorded != env_id:
            raise ValueError(
                f"{path} was recorded on {recorded}, not on {env_id}, as "
                f"{'its name says: rename it if that is wrong' if named else 'it says itself'}."
            )
    returns = np.add.reduceat(
        columns["reward"].astype(np.float64), np.cumsum(lengths + 1) - lengths - 1
    )
    task = metadata.get("env_id")
    if task is None or task in SMAC_MAPS or envs.SMACV2_ID.fullmatch(task):  # a victory pays 20
        if "won" not in columns and (won := infer_wins(columns, lengths, returns)) is not None:
            columns["won"], metadata["win_rate_inferred"] = won, True
            if metadata["final_observation"] == "stored":  # else nothing says what comes after
                metadata["repaired"] += repair_time_limits(columns, lengths, won)
        check_victories(path, columns, lengths, returns)
    if "won" in columns:
        metadata["win_rate"] = float(columns["won"].mean())
    metadata |= {
        "path": str(path),
        "sha256": content_hash(path),
        "format": kind,
        "episodes": len(lengths),
        "transitions": int(lengths.sum()),
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
    }
    for twin in duplicates(path, metadata["sha256"]):
        print(
            f"python -m datasets: warning: {path} and {twin} hold the same data under two names: "
            "one of them was published under a wrong name.",
            file=sys.stderr,
        )
    return columns, lengths, metadata


def recognise(path: Path) -> tuple[Path, str]:
    """The file to open and its format, recognised from the content.

    Raises:
        ValueError: nothing there, a half-finished download, or none of the known formats.
    """
    path = absolute(path)
    part = path.with_name(f"{path.name}.part")
    if path.suffix == ".part" or (not path.exists() and part.exists()):
        raise ValueError(f"{path}: a half-finished download: start the same download again.")
    if path.is_dir():
        if (path / "manifest.ocdbt").is_file() and (path / "metadata.json").is_file():
            return path, "vault"
        for main in (path / "data" / "main_data.hdf5", path / "main_data.hdf5"):
            if main.is_file():
                return main, recognise(main)[1]
        if within := sorted(p.parent.name for p in path.glob("*/manifest.ocdbt")):
            raise ValueError(f"{path}: a Vault of {', '.join(within)}: give the folder of one.")
        raise ValueError(f"{path}: a folder, but neither a Vault nor a Minari dataset in HDF5.")
    with open_hdf5(path) as f:
        keys = list(f)
    if all(k in keys for k in OMIGA_KEYS):
        return path, "omiga"
    if any(re.fullmatch(r"episode_\d+", k) for k in keys):
        return path, "minari"
    return path, "episodes"


def task_of(path: Path) -> str:
    """The task that recorded episodes were played on, as the dataset or its name says.

    Raises:
        ValueError: it does not, or `path` holds no episodes.
    """
    main, kind = recognise(path)
    stored = None
    if kind in ("episodes", "omiga"):
        with open_hdf5(main) as f:
            stored = text(f.attrs.get("env_id"))
            if kind == "omiga":
                stored = OMIGA_TASKS.get(f["o"].shape[1:])
    names = absolute(path).parts[:-3:-1]  # of the file and of its folder
    if task := stored or task_in_name(*names):
        return task
    raise ValueError(f"--dataset {path} does not say its task: give --env-id.")


def task_in_name(*parts: str) -> str | None:
    """The task that the first of these names of files and folders contains; None: none does."""
    robots = [f"{robot}-{d}" for robot, all_ in envs.MUJOCO_ROBOTS.items() for d in all_]
    names = {name.lower(): name for name in (*SMAC_MAPS, *robots)} | VAULT_MUJOCO
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    unknown = r"\d+[a-z][a-z0-9]*_vs_\d+[a-z][a-z0-9]*"  # 7m_vs_8m is not a file of 8m
    for part in parts:
        found = set(re.findall(rf"(?<![a-z0-9])({unknown}|{pattern})(?![a-z0-9])", part.lower()))
        if found:
            return names.get(found.pop()) if len(found) == 1 else None
    return None


def infer_wins(columns: dict, lengths: np.ndarray, returns: np.ndarray) -> np.ndarray | None:
    """Which episodes were won (E,) bool, inferred from SMAC's rewards; None if it is unknown.

    SMAC's reward is the damage done, 10 for a kill and 200 for victory, never negative, scaled so
    that killing all enemies returns 20. Damage to units that heal is paid again, so a long episode
    can return 20 and be lost. But victory ends the episode, and no other step pays as much. So an
    episode counts as won if it terminated, returned at least 20, and its last step paid more than
    every step that was not the last of an episode. Nothing is inferred for continuous actions, for
    rewards on another scale, or if no return reaches 20.
    """
    scale = returns.max() >= SMAC_VICTORY - 0.01 and returns.max() < 2 * SMAC_VICTORY
    if columns["avail"] is None or not scale or columns["reward"].min() < 0:
        return None
    last = np.cumsum(lengths + 1) - 2  # row of each episode's last step
    not_last = np.ones(len(columns["reward"]), bool)
    not_last[last] = False
    largest = columns["reward"].max(initial=0, where=not_last)
    won = (columns["reward"][last] > largest) & (returns >= SMAC_VICTORY - 0.01)
    return won & (columns["terminated"][last] != 0)


def check_victories(path: Path, columns: dict, lengths: np.ndarray, returns: np.ndarray) -> None:
    """Refuse SMAC's rewards where victory, which ends an episode, is paid a step before its end.

    Victory pays more than any other step, and in every episode about the same.

    Raises:
        ValueError: of the episodes that hold about the largest reward of all, three or more, most
            hold it at the step before the last, and nothing at the last: the rewards are shifted.
    """
    reward, scale = columns["reward"], SMAC_VICTORY / 2 <= returns.max() < 2 * SMAC_VICTORY
    if columns["avail"] is None or not scale or reward.min() < 0:
        return
    first = np.cumsum(lengths + 1) - lengths - 1
    victory = np.maximum.reduceat(reward, first) >= 0.6 * reward.max()
    early = [
        reward[a : a + length].argmax() == length - 2 and reward[a + length - 1] == 0
        for a, length in zip(first[victory], lengths[victory], strict=True)
    ]
    if len(early) >= 3 and np.mean(early) > 0.5:
        raise ValueError(
            f"{path}: the rewards of victory come a step before the end of their episodes: the "
            "rewards are shifted by a row."
        )


def repair_time_limits(columns: dict, lengths: np.ndarray, won: np.ndarray) -> list[str]:
    """Mark the episodes of SMAC that its time limit ended as truncated; returns what was done.

    pymarl stores them as terminated by default (`continuing_episode: False`), and so do CFCQL and
    ODIS: a learner is then told that nothing comes after a moment which it cannot foresee. Such an
    episode is as long as the longest, was not won, and at its end an agent is alive: it may not do
    nothing (action 0), as only the dead may.

    Args:
        columns: as in `read_episodes`; `terminated` is changed. won: (E,) bool.
    """
    final = np.cumsum(lengths + 1) - 1  # row of each episode's final observation
    alive = (columns["avail"][final][..., 0] == 0).any(1)
    timeout = (lengths == lengths.max()) & (columns["terminated"][final - 1] != 0) & alive & ~won
    columns["terminated"][final[timeout] - 1] = 0
    if not timeout.any():
        return []
    return [
        f"{timeout.sum()} episodes that stop at {lengths.max()} steps with both sides alive were "
        "stored as terminated; they count as truncated"
    ]


def content_hash(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and hashes of its files in order."""
    if path.is_file():
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    digest = hashlib.sha256()
    for p in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{p.relative_to(path).as_posix()} {content_hash(p)}\n".encode())
    return digest.hexdigest()


def duplicates(path: Path, sha256: str) -> list[str]:
    """Names of other qualities of the same task, in the same place, that hold the same data."""

    def size(p: Path) -> int:
        return sum(q.stat().st_size for q in ([p] if p.is_file() else p.rglob("*")) if q.is_file())

    if path.is_dir():
        beside = [p.parent for p in path.resolve().parent.glob("*/manifest.ocdbt")]
    else:
        name = QUALITIES.split(path.name)[0]
        beside = [p for p in path.resolve().parent.glob(f"*{path.suffix}") if p.is_file()]
        beside = [p for p in beside if QUALITIES.split(p.name)[0] == name]
    others = [p for p in beside if not p.samefile(path) and size(p) == size(path)]
    return sorted(p.name for p in others if content_hash(p) == sha256)
