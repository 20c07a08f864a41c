"""Measurements and the CSV files that keep them: a dataclass is a line, its fields the columns.

An empty cell is a value that does not exist, e.g. a win rate of a robot.
"""

import csv
import dataclasses
import fcntl
import io
import math
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar, get_args

import numpy as np
import torch

from benchmark.launchers import ROOT
from datasets import make_folder, write_atomic

RUNS = ROOT / "results" / "runs.csv"
CEILING = ROOT / "results" / "ceiling.csv"
DEPTH = ROOT / "results" / "depth.csv"
ERRORS = ROOT / "results" / "errors.csv"
POINTS = ROOT / "results" / "points.csv"
VISITS = ROOT / "results" / "visits.csv"
SPEED = ROOT / "results" / "speed.csv"

T = TypeVar("T")


@dataclasses.dataclass
class Result:
    """One finished run: a line of runs.csv. Returns are sums of rewards per episode."""

    method: str  # of grid.METHODS, grid.BASELINES or grid.ORACLES
    variant: str  # flags of train.py that differ from the method's defaults; "": none
    env_id: str
    backend: str  # simulator that evaluated; "offline": none, nothing was played
    quality: str  # of the recorded data
    seed: int
    return_mean: float | None  # of the trained policy, greedy
    return_ci95: float | None  # half of the 95 % interval over the episodes of this run
    win_rate: float | None  # share of the episodes, 0..1
    clone_return: float | None  # of behaviour cloning in the same run
    data_return: float  # mean of the recorded episodes
    episodes: int  # evaluated
    # one-step errors on held-out episodes: mean squared error in standardised units
    state_mse: float | None  # of s', deduced from predicted observations
    direct_state_mse: float | None  # of s_hat, predicted directly
    persistence_state_mse: float | None  # of the guess that the state does not change
    reward_mse: float | None  # of r'
    direct_reward_mse: float | None  # of r_hat
    u_error_spearman: float | None  # rank correlation of u with the error of s', -1..1
    updates: int  # of the policy
    total_s: float  # seconds of the whole run
    commit: str
    machine: str
    versions: str
    command: str


@dataclasses.dataclass
class Depth:
    """The critics along rollouts of one run of oracle.py: a line of depth.csv."""

    method: str
    variant: str
    env_id: str
    quality: str
    seed: int
    step: int  # of the rollout, from 0
    monte_carlo: float | None  # discounted return that the policy really gets from there
    value_true: float | None  # mean of the critics at the simulator's states
    spread_true: float | None  # their standard deviation
    value_imagined: float | None  # the same at LOGO's states
    spread_imagined: float | None
    commit: str


@dataclasses.dataclass
class Error:
    """One-step errors of one world model on one kind of data: a line of errors.csv."""

    method: str  # logo, or a world model of baselines/
    env_id: str
    trained_on: str  # quality of the data, or the file's name
    tested_on: str
    seed: int
    rows: int  # held out, on which it was tested
    # mean squared errors in units of the training data's standard deviation
    obs_mse: float
    state_mse: float
    reward_mse: float
    raw_reward_mse: float  # in the reward's own units
    persistence_state_mse: float  # of the guess that the state does not change
    u_error_spearman: float | None  # rank correlation of u with the error of s'; none without u
    wm_updates: int
    total_s: float  # seconds of the training
    parameters: int
    commit: str
    machine: str
    versions: str
    command: str


@dataclasses.dataclass
class Point:
    """A next state and a world model's prediction of it, in two dimensions: a line of points.csv.

    The dimensions are the first two principal components of the true next states (`states.axes`).
    """

    method: str  # as in `Error`
    env_id: str
    trained_on: str
    tested_on: str
    seed: int
    row: int  # of the tested data
    true_1: float
    true_2: float
    predicted_1: float
    predicted_2: float
    commit: str


@dataclasses.dataclass
class Bin:
    """How often states of one small region occur, and what they pay: a line of visits.csv.

    Regions are squares of the plane of the recorded states' first two principal components.
    """

    method: str  # of a finished run, or "data" for the recording that it was trained on
    env_id: str
    quality: str
    seed: int  # of the run
    x: int  # of the region, from 0
    y: int
    left: float  # its lower edges, and the length of its sides
    bottom: float
    width: float
    height: float
    visits: int  # steps that begin there
    reward_mean: float  # of these steps
    commit: str


def key_of(row: Result | Depth | Error | Point | Bin) -> tuple:
    """The columns up to the seed: rows with the same are of one experiment, which `record` replaces
    together.
    """
    names = [field.name for field in dataclasses.fields(row)]
    return tuple(getattr(row, name) for name in names[: names.index("seed") + 1])


def depths(values: dict[str, list], row: Result) -> list[Depth]:
    """The content of a run's depth.json (`oracle.by_depth`), one line per step."""
    same = row.method, row.variant, row.env_id, row.quality, row.seed
    steps = range(len(values["monte_carlo"]))
    return [
        Depth(*same, k, **{name: x[k] for name, x in values.items()}, commit=row.commit)
        for k in steps
    ]


def result(final: dict, method: str, variant: str, quality: str, command: str) -> Result:
    """The row of a run.

    Args:
        final: content of its final.json.
    """
    score, clone = final["eval"] or {}, final["clone"] or {}
    errors = final["world_model"] or {}
    names = ("state_mse", "direct_state_mse", "persistence_state_mse", "reward_mse")
    names += ("direct_reward_mse", "u_error_spearman")
    return Result(
        method=method,
        variant=variant,
        env_id=final["env_id"],
        backend=final["backend"],
        quality=quality,
        seed=final["seed"],
        return_mean=score.get("return_mean"),
        return_ci95=score.get("return_ci95"),
        win_rate=score.get("win_rate"),
        clone_return=clone.get("return_mean"),
        data_return=final["dataset"]["return_mean"],
        episodes=score.get("episodes", 0),
        **{name: errors.get(name) for name in names},
        updates=final["updates"],
        total_s=final["time"]["total_s"],
        commit=final["commit"],
        machine=final["machine"],
        versions=", ".join(f"{k} {v}" for k, v in sorted(final["versions"].items()) if v),
        command=command,
    )


def record(path: Path, *new: T, replaced: Callable[[T], bool] | None = None) -> None:
    """Write rows of one kind into the file, in place of older ones.

    Args:
        replaced: which ones; None: those that have the same `key_of` as one of the new rows.
    Raises:
        ValueError: the file has other columns.
        OSError: the file cannot be written; it is then as it was.
    """
    kind = type(new[0])
    make_folder(path.parent)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # another grid may record at the same time
        old = read(path, kind) if path.exists() else []
        if replaced:
            rows = [*(row for row in old if not replaced(row)), *new]
        else:
            rows = [row for same in (by_key(old) | by_key(new)).values() for row in same]
        write(path, rows, kind)
    finally:
        os.close(folder)


def by_key(rows: Iterable[T]) -> dict[tuple, list[T]]:
    """The rows of each experiment."""
    found: dict[tuple, list[T]] = {}
    for row in rows:
        found.setdefault(key_of(row), []).append(row)
    return found


def write(path: Path, rows: list[T], kind: type[T]) -> None:
    """Write rows of a dataclass, floats with six digits, in place of the whole file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(kind))
    for row in rows:
        cells = dataclasses.astuple(row)
        writer.writerow(f"{x:.6g}" if isinstance(x, float) else x for x in cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue().encode())


def read(path: Path, kind: type[T]) -> list[T]:
    """The rows that `write` has written.

    Raises:
        ValueError: the file has other columns, or a cell that is no number where one belongs.
        OSError: the file cannot be read.
    """
    types = {f.name: (get_args(f.type) or (f.type,))[0] for f in dataclasses.fields(kind)}
    required = [f.name for f in dataclasses.fields(kind) if f.type in (int, float)]

    def value(name: str, cell: str | None):
        if cell is None:
            raise ValueError(f"no {name}")
        if not cell:
            return "" if types[name] is str else None
        number = types[name](cell)
        if types[name] is float and not math.isfinite(number):
            raise ValueError(f"{name} is {cell}")
        return number

    if not path.is_file():
        raise ValueError(f"{path} is not a file of results.")
    text = path.read_bytes().decode(errors="replace")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = list(reader)
    except csv.Error as e:
        raise ValueError(f"{path}, line {reader.line_num + 1}: damaged ({e}).") from e
    if reader.fieldnames != list(types):
        raise ValueError(
            f"{path} is not a file of `python -m benchmark`: it has other columns than "
            f"{', '.join(list(types)[:3])}, ... Give another file."
        )
    if "\ufffd" in text or not text.endswith("\n"):
        damaged = text.partition("\ufffd")[0].count("\n") + 1
        raise ValueError(f"{path}, line {damaged}: cut, or not UTF-8.")
    rows = []
    for number, line in enumerate(lines, 2):
        try:
            row = kind(**{name: value(name, cell) for name, cell in line.items()})
            if lacking := [k for k, x in vars(row).items() if x is None and k in required]:
                raise ValueError(f"no {lacking[0]}")
            rows.append(row)
        except (TypeError, ValueError, KeyError) as e:
            raise ValueError(
                f"{path}, line {number}: not a row of this file ({e}). Delete it."
            ) from e
    return rows


def versions() -> str:
    """Of what a timing or a trained network depends on."""
    packages = f"torch {torch.__version__}, numpy {np.__version__}"
    return f"Python {platform.python_version()}, {packages}"
