"""Grids of runs, and how fast they are.

  python benchmark.py grid                  five maps x four qualities x {LOGO, MACQL} x 5 seeds
  python benchmark.py grid --flags="--compile --cudagraphs" --jobs 4        the same on a GPU
  python benchmark.py speed                 updates, rollouts and rivals, timed (speed.py): a CPU
  python benchmark.py speed --device cuda --compiled    a GPU, in every mode that it has
  python benchmark.py speed --offlinerl-kit ../OfflineRL-Kit  against public code, too, after
      git clone https://github.com/yihaosun1124/OfflineRL-Kit ../OfflineRL-Kit
  python benchmark.py table                 what `speed` measured, as tables in Markdown

A cell of the grid is one call of train.py with --num-seeds. The grid goes on where it stopped:
cells that are finished are not run again, one that was interrupted is resumed.
"""

import json
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import tyro
from tqdm import tqdm

import report
import train
from checkpoint import plain
from collect import Quality
from envs import PAPER_SMAC
from prepare import check
from speed import speed, table

METHODS = {"logo": [], "macql": ["--synthetic-fraction", "0"]}
OURS = "--env-id --quality --seed --num-seeds --synthetic-fraction --out --resume".split()


class Cell(NamedTuple):
    """One call of train.py."""

    folder: Path
    flags: list[str]
    args: dict  # what the flags mean
    seeds: list[Path]  # the folders of its runs


def cells(env_ids, qualities, methods, num_seeds: int, flags: str, out: Path) -> list[Cell]:
    every, more = [], shlex.split(flags)
    if taken := [flag for flag in more if flag.replace("_", "-").partition("=")[0] in OURS]:
        raise ValueError(f"--flags: {' '.join(taken)} is for the grid itself to give.")
    for env_id, quality, method in product(env_ids, qualities, methods):
        folder = out / f"{env_id}-{quality}-{method}"
        chosen = ["--env-id", env_id, "--quality", quality, "--num-seeds", str(num_seeds)]
        chosen += [*METHODS[method], *more, "--out", str(folder)]
        args = tyro.cli(train.Args, args=chosen, default=train.defaults(env_id))
        check(args)
        seeds = [folder / f"seed{k + 1}" for k in range(num_seeds)] if num_seeds > 1 else [folder]
        every.append(Cell(folder, chosen, plain(args), seeds))
    return every


def play(cell: Cell) -> str | None:
    """Run a cell to its end; what went wrong, if anything did."""
    finished = [file for seed in cell.seeds if (file := seed / "final.json").exists()]
    for file in finished:
        theirs = json.loads(file.read_text())["args"] | {"seed": 1, "resume": False}
        differ = [k for k, v in cell.args.items() if theirs.get(k) != v]
        if told := ", ".join(f"--{k.replace('_', '-')} {theirs.get(k)}" for k in differ):
            return f"{file} is of a run with {told}: give another --out"
    if len(finished) == len(cell.seeds):
        return None
    begun = all((seed / "checkpoint.pt").exists() for seed in cell.seeds)
    command = [sys.executable, "train.py", *cell.flags, *(["--resume"] if begun else [])]
    log = cell.folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=file, cwd=Path(__file__).parent)
    if done.returncode:
        last = log.read_text().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return f"{shlex.join(command)}: {last[0]} (see {log})"


def grid(
    env_ids: tuple[str, ...] = PAPER_SMAC,
    qualities: tuple[Quality, ...] = get_args(Quality),
    methods: tuple[Literal["logo", "macql"], ...] = tuple(METHODS),
    num_seeds: int = 5,
    jobs: int = 1,
    flags: str = "",
    out: Path = Path("runs/grid"),
) -> None:
    """Train every cell and print the table over seeds.

    Args:
        env_ids: tasks.
        qualities: of the data.
        methods: logo, macql.
        num_seeds: seeds 1 .. K of a cell, trained at once.
        jobs: cells at once, each a process: one a core, or as many as keep a GPU busy.
        flags: more of train.py's, for every cell.
        out: folder of the runs.
    """
    if jobs < 1 or num_seeds < 1:
        raise ValueError(f"--jobs {jobs}, --num-seeds {num_seeds}: give 1 or more.")
    started = time.time()
    every = cells(env_ids, qualities, methods, num_seeds, flags, out.absolute())
    with ThreadPoolExecutor(jobs) as pool:
        failures = [e for e in tqdm(pool.map(play, every), total=len(every), unit="cell") if e]
    finished = [s for cell in every for s in cell.seeds if (s / "final.json").exists()]
    print(report.compare(finished))
    print(f"\n{len(every)} cells, {time.time() - started:.0f} s")
    if failures:
        raise ValueError("; ".join(failures))


def cli(argv: list[str] | None = None) -> None:
    commands = {"speed": speed, "table": table, "grid": grid}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, args=argv)
    except (ValueError, OSError, ImportError) as e:
        sys.exit(f"benchmark.py: {e}")


if __name__ == "__main__":
    cli()
