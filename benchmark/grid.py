"""A grid of runs of train.py: tasks x qualities of the data x methods x seeds.

Every run is one process, here or on a Ray cluster (launchers.py). A grid goes on where it stopped:
finished runs are not repeated, an interrupted one is resumed from its checkpoint. Each finished run
becomes a row of the results, which this process alone writes.
"""

import contextlib
import dataclasses
import importlib
import json
import shlex
import time
from itertools import chain, product
from pathlib import Path
from typing import Literal, get_args

from tqdm import tqdm

import envs
import train
from behaviour import Quality
from benchmark.launchers import End, Run, locally, on_ray
from benchmark.oracle import PARTS
from benchmark.rows import CEILING, DEPTH, RUNS, Result, depths, key_of, read, record, result
from datasets import check_writable
from datasets.load import content_hash
from experiment.setup import check_args
from experiment.tracking import MAY_DIFFER, plain

METHODS = {  # name -> flags of train.py
    "logo": [],
    "macql": ["--synthetic-fraction", "0"],
}
WORLD_MODELS = "direct", "ensemble", "morel", "sumo", "mamba", "mazero"  # baselines/, under MACQL
BASELINES = ("cfcql", "omar", "omiga", "planning", *WORLD_MODELS)
ORACLES = {  # name -> flags of benchmark/oracle.py: what D_m is filled with
    "windows": ["--windows"],
    "simulator": [],
    **{f"simulator-{part}": ["--model", part] for part in PARTS},
    "model": ["--model", *PARTS],  # all of a step by LOGO, for its values by depth
}
GIVEN = ["--env-id", "--quality", "--seed", "--out", "--resume"]  # by the grid, to every run
# flags that have a column of their own, or that do not change what is computed
NOT_IN_VARIANT = (*MAY_DIFFER, "env_id", "quality", "dataset", "backend", "seed", "paper")


def variant(args: train.Args, usual: train.Args) -> str:
    """The flags by which a run differs from the usual one of its method, always spelled alike."""
    flags = ["--paper"] if args.paper else []
    for name, value in dataclasses.asdict(args).items():
        if name not in NOT_IN_VARIANT and value != getattr(usual, name):
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                flags.append(f"--{flag} {str(value).removesuffix('.0')}")  # 1 rather than 1.0
    return " ".join(flags)


def plan(
    env_ids, qualities, methods, seeds, flags: str, out: Path, variants: str = ""
) -> list[Run]:
    """The runs of a grid, in the order in which they start; nothing is trained yet.

    Raises:
        ValueError: flags that cannot work or that are the grid's own to give.
    """
    taken = GIVEN + [f for m in methods for f in METHODS.get(m, [])]
    every = [" ".join(shlex.split(x)) for x in variants.split(";")]
    for name, text in [("--flags", flags), *(("--variants", x) for x in every)]:
        for flag in shlex.split(text):
            if flag.startswith("--") and flag.replace("_", "-").partition("=")[0] in taken:
                raise ValueError(f"{name}: {flag} is the grid's own to give.")
    runs = []
    axes = map(dict.fromkeys, (seeds, env_ids, qualities, methods, every))  # each value once
    for seed, env_id, quality, method, also in product(*axes):
        more = shlex.split(f"{flags} {also}")
        given = ["--env-id", env_id, "--quality", quality, "--seed", str(seed)]
        given += METHODS.get(method, [])
        program, kind = ["train.py"], train.Args
        if method in ORACLES:
            program = ["-m", "benchmark.oracle", *ORACLES[method]]
        elif method in BASELINES:
            program = ["-m", f"baselines.{method}"]
            kind = importlib.import_module(program[-1]).Args
        args = train.parse([*given, *more], kind)
        if args.dataset is None and not envs.is_robot(env_id) and env_id not in envs.known_ids():
            raise ValueError(f"--env-ids: {env_id!r} is none of {', '.join(envs.known_ids())}.")
        check_args(dataclasses.replace(args, out=out))
        source = source_of(args.dataset, quality)
        own = "".join(f"-{Path(x).name.strip('-')}" for x in shlex.split(also))  # e.g. -horizon-5
        folder = out / f"{env_id}-{source}-{method}{own}-seed{seed}"
        usual = train.parse([*given, *(["--paper"] if args.paper else [])], kind)
        differs = variant(args, usual)
        runs.append(Run(method, differs, source, folder, program, [*given, *more], args))
    if len({run.folder for run in runs}) < len(runs):
        raise ValueError("--flags: --dataset is one file: give one of --qualities.")
    return runs


def source_of(dataset: Path | None, quality: str) -> str:
    """What the column `quality` says: that of our recording, or the name of a --dataset."""
    source = dataset.stem if dataset else quality
    if dataset and source in get_args(Quality):  # its rows are none of our recording's
        source = f"{source}-{content_hash(dataset)[:6]}"
    return source


def files_of(run: Run) -> list[Path]:
    """What a finished run has written, in this order: final.json, and an oracle's depth.json."""
    values = run.method in ORACLES and run.method != "windows"
    return [run.folder / name for name in ("final.json", "depth.json")[: 1 + values]]


def keep(run: Run, results: Path, known: bool = False) -> str | None:
    """Record the row of a finished run; returns what is wrong with it, if anything is.

    Args:
        known: it was finished before this grid, so the row may be there and is not written again.
    """
    file = run.folder / "final.json"
    try:
        final = json.loads(file.read_text())
        theirs, mine = final["args"], plain(run.args)
        differ = [k for k in mine if k not in MAY_DIFFER and theirs.get(k) != mine[k]]
        if differ:
            told = ", ".join(f"--{k.replace('_', '-')} {theirs.get(k)}" for k in differ)
            return f"{file} is of a run with {told}: give the same --flags, or another --out"
        command = shlex.join(["python", *run.program, *run.flags])
        row = result(final, run.method, run.variant, run.quality, command)
        values = None
        for file in files_of(run)[1:]:
            values = json.loads(file.read_text())
    except FileNotFoundError:
        return f"{file} was not written: delete its folder, or give an --out that all nodes share"
    except (ValueError, KeyError, TypeError) as e:
        return f"{file} is not of a finished run ({e!r}): delete its folder"
    recorded = read(results, Result) if known and results.exists() else []
    its_commit = {key_of(old): old.commit for old in recorded}.get(key_of(row))
    if its_commit not in (None, row.commit):
        return (
            f"{file} is of commit {row.commit}, its row in {results} of {its_commit}: delete the "
            "folder to train it anew, or give another --out or --results"
        )
    if its_commit is None:
        if values:
            record(results.with_name(DEPTH.name), *depths(values, row))
        record(results, row)
    return None


def grid(
    env_ids: tuple[str, ...] = envs.PAPER_SMAC,
    qualities: tuple[Quality, ...] = get_args(Quality),
    methods: tuple[Literal[*METHODS, *BASELINES], ...] = tuple(METHODS),
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5),
    jobs: int = 1,
    flags: str = "",
    out: Path = Path("runs/grid"),
    results: Path = RUNS,
    launcher: Literal["local", "ray"] = "local",
    variants: str = "",
) -> None:
    """Train every run that is not finished yet, and record each in the file of results.

    Args:
        env_ids: tasks
        qualities: of the recorded data
        methods: logo, macql, or files of baselines/ by their names
        seeds: of networks, batches and rollouts
        jobs: runs at the same time, each a process: one per core, or as many as fill a GPU
        flags: more flags of train.py for every run, e.g. --flags="--threads 1"
        out: folder of the runs and of their logs
        results: file that receives a row per run, in place of an older row of the same run
        launcher: local: processes on this machine; ray: tasks on the Ray cluster of RAY_ADDRESS or
            of this machine, each with one CPU and, if the cluster has any and --flags does not say
            --device cpu, a quarter of a GPU. All nodes must share the folder `out` and the project
        variants: one more axis: flags of each, after a semicolon, e.g. --variants="; --horizon 5"
            for the usual runs and for those with horizon 5
    """
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: give 1 or more.")
    if launcher == "ray" and jobs > 1:
        raise ValueError("--jobs is for --launcher local: Ray itself starts as many runs as fit.")
    check_writable(results)  # before hours of work
    if results.exists():
        read(results, Result)
    runs, started = plan(env_ids, qualities, methods, seeds, flags, out, variants), time.time()
    known = [run for run in runs if all(file.exists() for file in files_of(run))]
    missing, failures = [run for run in runs if run not in known], []
    ends = on_ray(missing) if launcher == "ray" and missing else locally(missing, jobs)
    with contextlib.closing(ends):  # after an error, too, the runs save and end
        finished = (End(run, None) for run in known)
        for run, failure in tqdm(chain(finished, ends), total=len(runs), unit="run"):
            if failure := failure or keep(run, results, run in known):
                failures.append(failure)
                tqdm.write(failure)
    print(f"{len(runs) - len(failures)} of {len(runs)} runs are in {results}, "
          f"{time.time() - started:.0f} s; python -m benchmark tables")  # fmt: skip
    if failures:
        raise ValueError(f"{len(failures)} runs failed, the first one: {failures[0]}")


def ceiling(
    env_ids: tuple[str, ...] = ("3s_vs_5z", "2s3z", "HalfCheetah-6x1"),
    qualities: tuple[Quality, ...] = ("medium-replay", "medium"),
    methods: tuple[Literal[*METHODS, *ORACLES], ...] = ("macql", *ORACLES),
    seeds: tuple[int, ...] = (101,),
    jobs: int = 1,
    flags: str = "",
    out: Path = Path("runs/ceiling"),
    results: Path = CEILING,
    launcher: Literal["local", "ray"] = "local",
) -> None:
    """What a perfect model would be worth: D_m filled by the simulator, part by part by LOGO.

    Args:
        env_ids: tasks
        qualities: of the recorded data
        methods: macql; windows (recorded steps as rollouts); simulator; simulator-PART (that part
            of a step by LOGO); model (all of it by LOGO)
        seeds: of networks, batches and rollouts
        jobs: runs at the same time, each a process
        flags: more flags of train.py for every run
        out: folder of the runs and of their logs
        results: file that receives a row per run; the values by depth go to depth.csv beside it
        launcher: as of `grid`
    """
    grid(env_ids, qualities, methods, seeds, jobs, flags, out, results, launcher)
