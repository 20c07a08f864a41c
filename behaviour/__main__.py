"""Train behaviour policies, and record offline datasets with them.

python -m behaviour train --env-id 3m                           train a policy from scratch
python -m behaviour record --env-id 3s_vs_5z --quality medium   record a dataset
python -m behaviour list                                        the paper's 32 datasets
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Annotated

import h5py
import tyro

import datasets
import envs
from behaviour import mappo, record, weights
from behaviour.record import Quality


@dataclasses.dataclass
class Train:
    """Train a behaviour policy from scratch and write its snapshots; the defaults depend on
    --env-id."""

    ppo: tyro.conf.OmitArgPrefixes[mappo.Args]
    out: Path | None = None
    """where to write [default: behaviour/ENV_ID.npz]"""
    replace: bool = False
    """allow an existing file to be replaced"""


@dataclasses.dataclass
class Record:
    """Record a dataset with the shipped policies and print what it holds."""

    env_id: str
    """task: a SMAX map, or a robot and its division such as HalfCheetah-6x1"""
    quality: Quality
    """which policies play: see docs/data.md"""
    episodes: int | None = None
    """episodes to record [default: 600, of robots 200]"""
    seed: int = 0
    """of the actions and the environment"""
    out: Path | None = None
    """where to write [default: the cache in data/, where train.py finds it]"""


@dataclasses.dataclass
class List:
    """Print the paper's 32 datasets as a markdown table; those not cached yet are recorded."""

    seed: int = 0
    """of the recordings"""
    figure: Path | None = None
    """where to draw the learning curves of the shipped policies, too"""


def check_output(path: Path, replace: bool = True) -> None:
    """Refuse, before hours of work, a file that could not or must not be written.

    Raises:
        ValueError: it is a folder, or exists while `replace` is False.
        OSError: its folder cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file.")
    if path.exists() and not replace:
        raise ValueError(f"{path} exists: give another --out (or `train` --replace).")
    datasets.check_writable(path)


def run_train(args: Train) -> None:
    started, env_id = time.time(), args.ppo.env_id
    path = args.out or weights.FOLDER / f"{env_id}.npz"
    check_output(path, args.replace)
    curve, snapshots = mappo.train(args.ppo)
    arrays = weights.select_snapshots(curve, snapshots, weights.PUBLIC_MEDIUM.get(env_id))
    weights.save_weights(path, arrays)
    last = arrays["curve"][-10:].mean(0)
    print(f"return {last[1]:.2f}, won {last[2]:.0%} over the last 10 iterations")
    if not envs.is_robot(env_id) and last[2] == 0:
        print(f"warning: this policy never wins {env_id}; train longer, or with --weakened 1")
    print(f"wrote {path} in {time.time() - started:.0f} s")


def run_record(args: Record) -> None:
    started = time.time()
    episodes = record.default_episodes(args.env_id) if args.episodes is None else args.episodes
    path = args.out or record.cached(args.env_id, args.quality, episodes, args.seed)
    check_output(path, replace=not path.exists() or h5py.is_hdf5(path))
    record.record(args.env_id, args.quality, episodes, args.seed, path)
    print(datasets.describe(path))
    print(f"wrote {path} in {time.time() - started:.0f} s")


def run_list(args: List) -> None:
    if args.figure:
        check_output(args.figure)
        weights.draw_curves(args.figure)
    print(record.table(args.seed))


def cli(argv: list[str] | None = None) -> None:
    """The command line: an error is one sentence and a non-zero exit."""
    task = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    task.add_argument("--env-id", "--env_id", default=None)
    env_id = task.parse_known_args(argv)[0].env_id  # the other defaults of `train` depend on it
    ppo = mappo.defaults(env_id) if env_id else mappo.Args(tyro.MISSING)
    commands = (
        Annotated[Train, tyro.conf.subcommand("train", default=Train(ppo))]
        | Annotated[Record, tyro.conf.subcommand("record")]
        | Annotated[List, tyro.conf.subcommand("list")]
    )
    run = {Train: run_train, Record: run_record, List: run_list}
    with datasets.one_sentence("python -m behaviour"):
        args = tyro.cli(commands, prog="python -m behaviour", description=__doc__, args=argv)
        run[type(args)](args)


if __name__ == "__main__":
    cli()
