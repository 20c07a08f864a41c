"""A run's folder: the lock that gives it to one process; what is read back from it, checked."""

import os
import re
import zipfile
from pathlib import Path

import torch

from datasets import lock, make_folder, remove_parts

HEADER = "phase,update,metric,value\n"
ROW = re.compile(r"(\w+),(\d+),[^,\n]+,(-?\d[\d.e+-]*|-?inf|nan)\n")
OWNED: list[Path] = []  # folders of this process's runs, in the order in which they began


def own(folder: Path, files: tuple[str, ...]) -> None:
    """Make this process the only one that writes to a run's folder, until it ends.

    Args:
        files: patterns of what a run writes and replaces.
    Raises:
        ValueError: another process owns it, or it holds such files of something else than a run.
        OSError: it cannot be written.
    """
    if folder.resolve() in map(Path.resolve, OWNED):
        return
    make_folder(folder)
    present = [path for pattern in files for path in folder.glob(pattern)]
    if present and not (folder / ".lock").exists() and not is_run(folder):
        raise ValueError(f"{present[0]} is there, but {folder} is no run's folder: name another.")
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)  # open until the process ends
    if not lock(file):
        os.close(file)
        raise ValueError(
            f"{folder} belongs to another process that is running: wait for its end, or give "
            "another --out."
        )
    OWNED.append(folder)
    for name in files:
        remove_parts(folder, name)


def is_run(folder: Path) -> bool:
    """Whether the folder's checkpoint is one of this program."""
    try:
        return "learner" in read_checkpoint(folder / "checkpoint.pt")
    except ValueError:
        return False


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """The dict in a checkpoint. Its zip archive carries a checksum of every part, which torch does
    not compare.

    Raises:
        ValueError: not a checkpoint, or damaged.
    """
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise ValueError("it is not a file")
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} does not have its checksum")
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except Exception as e:  # whatever zipfile, pickle and torch make of damaged bytes
        what = " ".join(str(e).split())[:300] or type(e).__name__
        raise ValueError(f"{path} is no checkpoint of this program, or damaged: {what}.") from e
    return state


def take(path: Path, state: dict, parts: dict) -> None:
    """Load a checkpoint's states into the parts of a run, objects with load_state_dict and
    generators.

    Raises:
        ValueError: something in it has another type or shape.
    """
    try:
        for name, part in parts.items():
            if isinstance(part, torch.Generator):
                part.set_state(state[name].cpu())
                continue
            fresh = part.state_dict()  # of D_m without its rows
            require(same_kind({k: state[name].get(k) for k in fresh}, fresh), name)
            part.load_state_dict(state[name])
            for adam in adams(part):  # torch does not compare what it remembers
                for p, values in adam.state.items():
                    moments = [values[k].shape for k in ("exp_avg", "exp_avg_sq")]
                    require(moments == [p.shape] * 2 and values["step"].shape == (), name)
    except Exception as e:  # every part has its own way to say that a state does not fit
        what = " ".join(str(e).split())[:300]
        raise ValueError(
            f"{path} does not fit this run ({type(e).__name__}: {what}): if it is not of another "
            "learner or world model, delete it to start afresh."
        ) from e


def require(condition: bool, what: str) -> None:
    """Raise a ValueError that names a part of a checkpoint unless the condition holds."""
    if not condition:
        raise ValueError(f"{what} is not what this run needs")


def same_kind(x, other) -> bool:
    """Whether `x`, from a checkpoint, is built like this run's `other`: the same keys, lengths, and
    shapes and types of tensors; int and float are alike. Not compared: what an optimiser remembers,
    which is empty before its first step, and whatever `other` has None for.
    """
    if isinstance(other, dict) and isinstance(x, dict):
        if other.keys() == {"state", "param_groups"}:
            x, other = ({"param_groups": d.get("param_groups")} for d in (x, other))
        return x.keys() == other.keys() and all(same_kind(x[k], other[k]) for k in other)
    if isinstance(other, list | tuple) and isinstance(x, list | tuple):
        return len(x) == len(other) and all(map(same_kind, x, other))
    if isinstance(other, torch.Tensor) and isinstance(x, torch.Tensor):
        return x.shape == other.shape and x.dtype == other.dtype
    if type(other) in (int, float):
        return type(x) in (int, float)
    return other is None or type(x) is type(other)


def adams(part) -> list[torch.optim.Adam]:
    """The Adams and AdamWs of a checkpoint's part: itself, or among its `parts` or attributes."""
    inside = part.parts() if hasattr(part, "parts") else getattr(part, "__dict__", {})
    return [x for x in (part, *inside.values()) if isinstance(x, torch.optim.Adam)]


def read_metrics(path: Path, done: dict[str, int]) -> str:
    """The header and the rows of metrics.csv that are not newer than the checkpoint.

    Args:
        done: updates of each phase in the checkpoint.
    Raises:
        ValueError: a row is damaged; the last one may be cut, where the run was killed.
    """
    rows = path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []
    if rows and not rows[-1].endswith("\n"):
        rows.pop()
    kept = [HEADER]
    for number, row in enumerate(rows):
        match = ROW.fullmatch(row)
        good = (match and match[1] in done) if number else row == HEADER
        if not good:
            raise ValueError(
                f"--resume: {path}, line {number + 1} is damaged: {row.strip()[:80]!r}. Delete the "
                "file; the run then goes on without the metrics so far."
            )
        if number and int(match[2]) <= done[match[1]]:
            kept.append(row)
    return "".join(kept)
