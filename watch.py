"""A GIF of a run's policy, playing: `python envs.py watch RUN_DIR` (or `python watch.py RUN_DIR`).

SMAX's battles are drawn by JaxMARL's own visualiser, robots by Gymnasium's renderer, StarCraft II's
battles from its units' positions. Long episodes are thinned evenly, to 40 to 80 pictures.
"""

import dataclasses
import io
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

import datasets
import envs
from macql import Actor

MOST_FRAMES = 80  # of the whole GIF
WIDTH = 240  # pixels
COLOURS = 24  # one palette for all pictures, so that what stands still costs nothing
MILLISECONDS = 80  # a picture is shown


@dataclasses.dataclass
class Args:
    """Write a GIF of a trained policy, playing greedily."""

    run_dir: tyro.conf.Positional[Path]
    """folder of a run, as train.py prints it"""
    episodes: int = 1
    """episodes to play, one after the other"""
    out: Path | None = None
    """file to write [default: RUN_DIR/watch.gif]"""
    seed: int = 0
    """of the first episode"""


def load_policy(folder: Path) -> tuple[Actor, str, str]:
    """(averaged actor, env_id, backend) of a run.

    Raises:
        ValueError: no folder of a run, nothing saved yet, or played by no simulator.
    """
    path, final = folder / "checkpoint.pt", folder / "final.json"
    if not path.exists():
        what = "has no checkpoint yet" if (folder / "metrics.csv").exists() else "is no run"
        raise ValueError(
            f"{folder} {what}: give the folder that train.py printed, after its start."
        )
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        args, weights = stored["args"], stored["averaged"]
        mean, std = weights["standardise.mean"], weights["standardise.std"]
        env_id, backend = args["env_id"], args["backend"]
    except (RuntimeError, KeyError, EOFError, TypeError, pickle.UnpicklingError) as e:
        raise ValueError(f"{path} is no checkpoint of this program: {e!r}") from e
    if backend == "auto" and final.exists():  # what it came to be
        backend = json.loads(final.read_text())["backend"]
    if backend == "offline":
        raise ValueError(f"{folder} was trained without a simulator: nothing plays {env_id} here.")
    discrete = not envs.is_robot(env_id)
    action_dim = weights[list(weights)[-1]].shape[-1]  # of the last layer's bias
    actor = Actor(mean, std, action_dim, args["hidden"], discrete, args["shared_actor"])
    actor.load_state_dict(weights)
    return actor, env_id, backend


def play(env, actor: Actor, seed: int, budget: int) -> list[np.ndarray]:
    """Pictures (height,width,3) of one greedy episode in slot 0: evenly spaced, at most `budget`.

    Its length is not known beforehand: whenever there are too many, every other one is dropped, and
    from then on half as many are taken.
    """
    stride = max(1, env.spec.episode_limit // (4 * budget))  # pictures of robots take their time
    frames, now, steps = [], env.reset(seed), 0
    bar = tqdm(
        total=env.spec.episode_limit, desc=f"playing {env.spec.env_id}", unit="step",
        mininterval=0.2 if sys.stderr.isatty() else 20,
    )  # fmt: skip
    with bar:
        while True:
            if steps % stride == 0 or now.over[0]:
                frames.append(env.render())
            if now.over[0]:
                return frames
            if len(frames) == budget - 1:  # one is kept for the end
                frames, stride = frames[::2], 2 * stride
            avail = None if now.avail is None else torch.tensor(now.avail)
            now, steps = env.step(actor.greedy(torch.tensor(now.obs), avail).numpy()), steps + 1
            bar.update()


def gif(frames: list[np.ndarray]) -> bytes:
    """An endless GIF of these pictures (height,width,3) uint8, small and in few colours."""
    height = round(WIDTH * frames[0].shape[0] / frames[0].shape[1])
    small = [Image.fromarray(f).resize((WIDTH, height), Image.Resampling.LANCZOS) for f in frames]
    some = small[:: -(-len(small) // 8)]  # the palette is that of some pictures, side by side
    sample = Image.new("RGB", (WIDTH, height * len(some)))
    for k, image in enumerate(some):
        sample.paste(image, (0, k * height))
    palette = sample.quantize(COLOURS)
    flat = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in small]
    memory = io.BytesIO()
    flat[0].save(
        memory, "GIF", save_all=True, append_images=flat[1:], duration=MILLISECONDS, loop=0
    )
    return memory.getvalue()


def watch(args: Args) -> Path:
    """Play and write; returns the GIF's path.

    Raises:
        ValueError: nothing to watch, or the checkpoint does not fit the simulator.
        ImportError, OSError: no simulator, no off-screen OpenGL, or no place to write.
    """
    if args.episodes < 1:
        raise ValueError(f"--episodes is {args.episodes}: give 1 or more.")
    actor, env_id, backend = load_policy(args.run_dir)
    env = envs.make(env_id, 1, backend, render=True)
    try:
        found = tuple(actor.standardise.mean.shape)
        needed = (env.spec.num_agents, env.spec.obs_dim)
        if found != needed:
            raise ValueError(
                f"{args.run_dir}: the policy was trained on agents and observations {found}, but "
                f"{env_id} on {env.spec.backend} has {needed}."
            )
        budget = max(4, MOST_FRAMES // args.episodes)
        frames = []
        for k in range(args.episodes):
            frames += play(env, actor, args.seed + k, budget)
    finally:
        env.close()
    path = args.out or args.run_dir / "watch.gif"
    datasets.write_atomic(path, gif(frames))
    return path


def cli(argv: list[str] | None = None) -> None:
    """`watch` from the command line: an error is one sentence and a non-zero exit."""
    args = tyro.cli(Args, description=__doc__, args=argv)
    try:
        path = watch(args)
    except (ValueError, OSError, ImportError) as e:
        sys.exit(f"watch: {e}")
    print(f"wrote {path} ({path.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    cli()
