"""Behaviour policies, trained online, and the offline datasets recorded with them.

  python collect.py --env-id 3s_vs_5z                    retrain the behaviour policy from nothing
  python collect.py --env-id 3s_vs_5z --record medium    record a dataset with the shipped policy
  python collect.py --list                               all 8 x 4 datasets and their statistics

Offline data need somebody who played. Here that is MAPPO [Yu et al., 2022]: one actor shared by all
agents, one critic on the global state, PPO's clipped objective. Snapshots are kept on the way, and
the four qualities of the public benchmarks follow from them [CFCQL, OMIGA; README, Data]:

  medium         episodes of the snapshot that wins half as often as the expert
                 (robots: whose return comes nearest to the public medium data's)
  medium-replay  episodes of snapshots spread evenly up to medium, in equal parts
  expert         episodes of the final policy
  mixed          medium and expert, in equal parts

The snapshots are small (float16 arrays in behaviour/ENV_ID.npz, nothing pickled) and are shipped;
datasets are not: they are recorded at first use, reproducibly from a seed, and cached.

Sizes: T steps, E parallel episodes, N agents, O observation, S state, A actions, K snapshots.
"""

import argparse
import dataclasses
import hashlib
import io
import sys
import time
from pathlib import Path
from typing import Literal, get_args

import h5py
import numpy as np
import torch
import tyro
from tqdm import tqdm

import datasets
import envs
from mappo import Player, play, train_behaviour

Quality = Literal["medium", "medium-replay", "expert", "mixed"]
BEHAVIOUR = Path(__file__).parent / "behaviour"
CACHE = Path(__file__).parent / "data"
# Returns of the public medium datasets [OMIGA], which our medium policies are chosen to match
PUBLIC_MEDIUM = {"Hopper-3x1": 724.0, "Ant-2x4": 1419.0, "HalfCheetah-6x1": 1426.0}
ROBOT = {"episodes": 200, "num_envs": 8, "rows": 8_000, "total_steps": 3_000_000, "hidden": 64,
         "lr": 5e-4, "clip": 0.2, "entropy": 0.0, "epochs": 10, "minibatches": 16}  # fmt: skip
HARD = {"units": True, "hidden": 64, "entropy": 3e-3}
# Where the flags' defaults are not what the shipped policy was trained with
RECIPES = {
    "2s3z": {"total_steps": 2_000_000},
    "6h_vs_8z": {"total_steps": 1_500_000},
    "5m_vs_6m": HARD | {"weakened": 1.0, "total_steps": 6_000_000},
    "3s5z_vs_3s6z": HARD | {"weakened": 0.7, "total_steps": 1_500_000},
    **dict.fromkeys(envs.PAPER_MUJOCO, ROBOT),
}


@dataclasses.dataclass
class Args:
    """Train a behaviour policy, or record a dataset with a trained one."""

    env_id: str = "3s_vs_5z"
    """task: a SMAX map, or a robot and its division"""
    record: Quality | None = None
    """record this dataset with the shipped policy instead of training one"""
    list: bool = False
    """print the statistics of the paper's 32 datasets; those not cached yet are recorded first"""
    episodes: int = 600
    """episodes to record (of robots 200)"""
    out: Path | None = None
    """where to write [default: behaviour/ENV_ID.npz, or the cache data/ for a recording]; with
    --list, where to draw the learning curves of the shipped policies"""
    seed: int = 0
    """of the training, or of the recording"""
    num_envs: int = 128
    """E: battles played side by side, whole, between two PPO updates"""
    total_steps: int = 3_500_000
    """environment steps of the whole training, summed over battles (2s3z: 2M were enough)"""
    hidden: int = 128
    """width of the actor's two hidden layers; the critic is twice as wide"""
    lr: float = 1e-3
    """Adam's step size at the start, decayed linearly to zero"""
    gamma: float = 0.99
    """discount per step"""
    gae_lambda: float = 0.95
    """decay of the generalised advantage estimate"""
    clip: float = 0.1
    """how far one iteration may move a probability ratio from 1"""
    entropy: float = 0.01
    """weight of the entropy bonus, in nats"""
    epochs: int = 4
    """passes over each iteration's data"""
    minibatches: int = 4
    """optimiser steps per pass"""
    weakened: float = 0.0
    """share of the enemies that start with half their health at first; it falls by 0.01 after every
    iteration that wins half its battles, and to 0 in four fifths of the training anyhow; medium and
    expert are policies of the whole game. Maps that nobody wins by chance are learnt like this"""
    units: bool = False
    """see the observation unit by unit, with shared weights: learns faster where many alike fight
    many (SMAX only)"""
    rows: int = 1
    """environment steps between two PPO updates, at least; whole rounds of episodes are played"""


# --------------------------------------------------------------------------------------------------
# Recording
# --------------------------------------------------------------------------------------------------


def select_snapshots(
    curve: np.ndarray, snapshots: list, medium_return: float | None = None, replay: int = 5
) -> dict:
    """Keep `replay` snapshots spread up to medium, medium last, then the final one.

    Args:
        curve: (iterations,4) of environment steps, mean return, win rate and weakened enemies.
        snapshots: per iteration, the player's state_dict.
        medium_return: what medium should reach; None: half of what the final policy wins.
    """
    goal = curve[:, 2] if curve[-1, 2] > 0 else curve[:, 1]
    smooth = np.array([goal[max(0, i - 4) : i + 5].mean() for i in range(len(goal))])
    aim = smooth[-1] / 2 if medium_return is None else medium_return
    aside = np.abs(smooth - aim) + 1e9 * (curve[:, 3] > 0)  # of another game
    medium = int(aside.argmin())
    kept = [round(medium * (k + 1) / replay) for k in range(replay)] + [len(curve) - 1]
    weights = {k: np.stack([snapshots[i][k] for i in kept]) for k in snapshots[0]}
    return {**weights, "snapshot_steps": curve[kept, 0], "curve": curve.astype(np.float32)}


def load_behaviour(env_id: str, spec: envs.Spec) -> list[Player]:
    """The shipped snapshots as actors, medium the last but one, expert the last.

    Raises:
        FileNotFoundError: no behaviour policy is shipped for this map.
    """
    path = BEHAVIOUR / f"{env_id}.npz"
    if not path.exists():
        shipped = ", ".join(sorted(p.stem for p in BEHAVIOUR.glob("*.npz")))
        raise FileNotFoundError(
            f"No behaviour policy for {env_id} in {BEHAVIOUR} (there: {shipped}): train one with "
            f"`python collect.py --env-id {env_id}`, or give recorded data with --dataset."
        )
    with np.load(path, allow_pickle=False) as stored:
        stacks = {k: stored[k] for k in stored if k not in ("snapshot_steps", "curve")}
    units = "net.own.weight" in stacks
    first = stacks["net.own.weight" if units else "net.0.weight"]  # (K,hidden,inputs)
    actors = [Player(spec, first.shape[1], units) for _ in first]
    for k, actor in enumerate(actors):
        actor.load_state_dict({name: torch.tensor(x[k]).float() for name, x in stacks.items()})
    return actors


def players(actors: list[Player], quality: Quality) -> list[Player]:
    """Who plays which part of a dataset of this quality, in equal parts."""
    *replay, medium, expert = actors
    parts = {
        "medium": [medium],
        "medium-replay": [*replay, medium],
        "expert": [expert],
        "mixed": [medium, expert],
    }
    return parts[quality]


def record(env_id: str, quality: Quality, episodes: int, seed: int, path: Path) -> None:
    """Play `episodes` episodes and write them to `path` in the public episode layout."""
    spec = envs.make(env_id).spec
    cast = players(load_behaviour(env_id, spec), quality)
    if episodes < len(cast):
        raise ValueError(f"{episodes} episodes: {quality} is played by {len(cast)} policies.")
    share = -(-episodes // len(cast))  # episodes of each player, the first ones' if not alike
    env = envs.make(env_id, num_envs=min(share, 200))
    rounds = -(-share // env.num_envs)  # whole rounds are played, the surplus is dropped
    generator, parts = torch.Generator().manual_seed(seed), []
    with tqdm(total=len(cast) * rounds, desc=f"recording {env_id} {quality}", unit="round") as bar:
        for k, actor in enumerate(cast):
            played = []
            for i in range(rounds):
                start = 10**9 + seed * 10**5 + k * rounds + i  # battles that nobody trained on
                played.append(play(env, actor, generator, start))
                bar.update()
            joined = datasets.join_rounds(played, spec.episode_limit)
            mine = episodes // len(cast) + (k < episodes % len(cast))
            parts.append({key: x[:mine] for key, x in joined.items()})
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    about = {"env_id": env_id, "backend": spec.backend, "quality": quality, "seed": seed}
    datasets.save_episodes(path, arrays, about)


def cached(env_id: str, quality: Quality, episodes: int, seed: int) -> Path:
    """Where the recording with these arguments, by the policies shipped now, is kept."""
    shipped = BEHAVIOUR / f"{env_id}.npz"
    players = hashlib.sha256(shipped.read_bytes()).hexdigest()[:8] if shipped.exists() else "none"
    return CACHE / f"{env_id}-{quality}-{episodes}ep-seed{seed}-{players}.h5"


def load_or_record(env_id: str, quality: Quality, episodes: int, seed: int) -> Path:
    """Path of the cached dataset; recorded now if it is not there yet."""
    path = cached(env_id, quality, episodes, seed)
    if not path.exists():
        record(env_id, quality, episodes, seed, path)
    return path


def list_cells(seed: int) -> str:
    """A markdown table of the paper's datasets, each with its default number of episodes."""
    lines = ["| task | quality | episodes | transitions | return (mean ± std over episodes) | won "
             "| content hash |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for env_id in envs.PAPER_SMAC + envs.PAPER_MUJOCO:
        for quality in get_args(Quality):
            path = load_or_record(env_id, quality, defaults(env_id).episodes, seed)
            with h5py.File(path, "r") as f:
                about = dict(f.attrs)
            won = f"{about['win_rate']:.0%}" if "win_rate" in about else ""
            lines.append(
                f"| {env_id} | {quality} | {about['episodes']} | {about['transitions']:,} | "
                f"{about['return_mean']:.2f} ± {about['return_std']:.2f} | {won} "
                f"| `{about['content_sha256'][:12]}` |"
            )
    return "\n".join(lines)


def draw_curves(path: Path) -> None:
    """Picture of how the shipped policies learnt, with the snapshots that are kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    tasks = envs.PAPER_SMAC + envs.PAPER_MUJOCO
    for env_id, ax in zip(tasks, figure.subplots(2, 4).flat, strict=True):
        with np.load(BEHAVIOUR / f"{env_id}.npz", allow_pickle=False) as stored:
            curve, kept = stored["curve"], stored["snapshot_steps"]
        column = 1 if envs.is_robot(env_id) else 2
        millions, score = curve[:, 0] / 1e6, curve[:, column]
        ax.plot(millions, score, lw=0.7)
        ax.plot(kept / 1e6, np.interp(kept, curve[:, 0], score), "k.")
        ax.set(title=env_id, ylabel=("", "return", "battles won")[column])
    figure.supxlabel("environment steps (millions); dots: the snapshots that play the datasets")
    memory = io.BytesIO()
    figure.savefig(memory, dpi=70)
    datasets.write_atomic(path, memory.getvalue())


def save_behaviour(path: Path, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    datasets.write_atomic(path, buffer.getvalue())


def check(args: Args) -> None:
    """Refuse what cannot work before any work is done; a ValueError names the flag."""
    for name in ("episodes", "num_envs", "total_steps", "hidden", "epochs", "minibatches", "rows"):
        if getattr(args, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}: give 1 or more."
            )
    if not 0 <= args.weakened <= 1:
        raise ValueError(f"--weakened is {args.weakened}: give 0 to 1.")
    if envs.natural_backend(args.env_id) == "smacv2":
        raise ValueError(f"{args.env_id}: policies are trained in SMAX and MuJoCo only.")
    if envs.is_robot(args.env_id) and (args.units or args.weakened):
        raise ValueError(f"--units and --weakened are of battles, {args.env_id} is a robot.")


def main(args: Args) -> None:
    check(args)
    started = time.time()
    if args.list:
        print(list_cells(args.seed))
        if args.out:
            draw_curves(args.out)
        return
    if args.record:
        path = args.out or cached(args.env_id, args.record, args.episodes, args.seed)
        record(args.env_id, args.record, args.episodes, args.seed, path)
        print(datasets.describe(path))
    else:
        path = args.out or BEHAVIOUR / f"{args.env_id}.npz"
        curve, snapshots = train_behaviour(args)
        arrays = select_snapshots(curve, snapshots, PUBLIC_MEDIUM.get(args.env_id))
        save_behaviour(path, arrays)
        last = arrays["curve"][-10:].mean(0)
        print(f"return {last[1]:.2f}, won {last[2]:.0%} over the last 10 iterations")
    print(f"wrote {path} in {time.time() - started:.0f} s")


def defaults(env_id: str) -> Args:
    """The flags' defaults for a task: what its shipped policy was trained with."""
    return Args(env_id, **RECIPES.get(env_id, ROBOT if envs.is_robot(env_id) else {}))


def task_of(argv: list[str] | None, otherwise: str) -> str:
    """The --env-id of a command line, on which the other flags' defaults depend."""
    task = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    task.add_argument("--env-id", "--env_id", default=otherwise)
    return task.parse_known_args(argv)[0].env_id


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, default=defaults(task_of(None, Args.env_id))))
    except (ValueError, OSError, ImportError) as e:
        sys.exit(f"collect.py: {e}")
