"""A GIF of a run's policy, acting greedily in its simulator: `python -m experiment watch RUN`.

Battles are drawn by simulators/battle.py, robots by Gymnasium's renderer. Long episodes are thinned
evenly.
"""

import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import datasets
import envs
from experiment.folder import read_checkpoint
from macql import Actor

MOST_FRAMES = 80  # of the whole GIF
COLOURS = 128  # one palette for all frames, so that what does not move costs no bytes
MILLISECONDS = 80  # that a frame is shown
LAST = 1600  # milliseconds that an episode's last frame is shown, with its outcome


def watch(run: Path, episodes: int = 1, out: Path | None = None, seed: int = 0) -> Path:
    """Play episodes with a run's policy and write them as one GIF.

    Args:
        run: folder of a run, as train.py prints it.
        episodes: number of episodes, shown one after the other.
        out: file to write; None: RUN/watch.gif.
        seed: of the first episode; the next ones have seed + 1, ...
    Returns:
        The GIF's path.
    Raises:
        ValueError: there is no policy to show, or it does not fit the simulator.
        ImportError: the simulator is not installed.
        OSError: no off-screen OpenGL, or the file cannot be written.
    """
    if episodes < 1:
        raise ValueError(f"--episodes is {episodes}: give 1 or more.")
    check_picture(out)
    stored = read_policy(run)
    env_id = stored["args"]["env_id"]
    if stored["backend"] not in envs.BACKENDS:
        raise ValueError(
            f"{run} was trained without a simulator of this project (its backend is "
            f"{stored['backend']}), so there is none to show {env_id} in."
        )
    env = envs.make(env_id, 1, stored["backend"], render=True)
    try:
        actor = make_actor(run, stored, env.spec)
        budget = max(4, MOST_FRAMES // episodes)
        films = [play(env, actor, seed + k, budget) for k in range(episodes)]
    finally:
        env.close()
    path = out or run / "watch.gif"
    datasets.write_atomic(path, gif(films))
    return path


def check_picture(out: Path | None) -> None:
    """Raise a ValueError if a file that is no picture would be replaced."""
    if out and out.exists() and not out.read_bytes().startswith(b"GIF"):
        raise ValueError(f"{out} exists and is no GIF: name another file.")


def read_policy(run: Path) -> dict:
    """What is needed of RUN/checkpoint.pt: args (the flags), backend, weights (of `ema_actor`).

    Raises:
        ValueError: no folder of a run, nothing saved yet, or a file that is no checkpoint.
    """
    path = run / "checkpoint.pt"
    if not path.exists():
        what = "has no checkpoint yet" if (run / "metrics.csv").exists() else "is not a run"
        raise ValueError(f"{run} {what}: give the folder that train.py printed, after its start.")
    stored = read_checkpoint(path)
    try:
        kinds = {"env_id": str, "hidden": int, "shared_actor": bool}
        if wrong := [k for k, kind in kinds.items() if type(stored["args"][k]) is not kind]:
            raise KeyError(f"{wrong[0]}: another type")
        return {
            "args": {k: stored["args"][k] for k in ("env_id", "hidden", "shared_actor")},
            "backend": stored["backend"],
            "weights": stored["learner"]["ema_actor"],
        }
    except (KeyError, TypeError, IndexError) as e:
        raise ValueError(f"{path} is not a checkpoint of this program: no {e}.") from e


def make_actor(run: Path, stored: dict, spec: envs.Spec) -> Actor:
    """The policy of a checkpoint, for a simulator.

    Raises:
        ValueError: they differ in the number of agents, observations or actions.
    """
    args, weights = stored["args"], stored["weights"]
    try:
        mean, std = weights["standardise.mean"], weights["standardise.std"]
        found, needed = tuple(mean.shape), (spec.num_agents, spec.obs_dim)
        if found != needed:
            raise ValueError(
                f"{run}: the policy was trained with (agents, observation size) {found}, but "
                f"{spec.env_id} on {spec.backend} has {needed}."
            )
        shape = (spec.action_dim, args["hidden"], spec.discrete, args["shared_actor"])
        actor = Actor(mean, std, *shape)
        actor.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError, AttributeError) as e:  # other layers than Actor's
        raise ValueError(
            f"{run}: its policy is not a macql.Actor for {spec.env_id} on {spec.backend}: "
            f"{' '.join(str(e).split())}"
        ) from e
    return actor


def play(env, actor: Actor, seed: int, budget: int) -> list[np.ndarray]:
    """Frames (height,width,3) uint8 of one greedy episode in slot 0, evenly spaced.

    There are at most `budget`, and the last one shows the episode's end. The length is not known
    beforehand: whenever there are too many frames, every other one is dropped, and from then on
    half as many are taken.
    """
    stride = max(1, env.spec.episode_limit // (4 * budget))  # rendering a robot is slow
    frames, step, steps = [], env.reset(seed), 0
    bar = tqdm(
        total=env.spec.episode_limit, desc=f"playing {env.spec.env_id}", unit="step",
        mininterval=0.2 if sys.stderr.isatty() else 20,
    )  # fmt: skip
    with bar:
        while not step.done[0]:
            if steps % stride == 0:
                frames.append(env.render())
            if len(frames) == budget - 1:  # one is kept for the end
                frames, stride = frames[::2], 2 * stride
            avail = None if step.avail is None else torch.tensor(step.avail)
            actions = actor.greedy(torch.tensor(step.obs), avail)
            step, steps = env.step(actions.numpy()), steps + 1
            bar.update()
    return [*frames, env.render()]


def gif(films: list[list[np.ndarray]], milliseconds: int = MILLISECONDS) -> bytes:
    """An endlessly repeated GIF of episodes, each a list of frames (height,width,3) uint8.

    Args:
        milliseconds: that a frame is shown, but for an episode's last.
    """
    frames = [Image.fromarray(frame) for film in films for frame in film]
    shown = [t for film in films for t in (*[milliseconds] * (len(film) - 1), LAST)]
    some = frames[:: -(-len(frames) // 16)]  # at most sixteen frames, one below the other, ...
    width, height = frames[0].size
    sample = Image.new("RGB", (width, height * len(some)))
    for k, image in enumerate(some):
        sample.paste(image, (0, k * height))
    palette = sample.quantize(COLOURS, Image.Quantize.MAXCOVERAGE)  # ... decide the palette
    flat = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in frames]
    memory = io.BytesIO()
    flat[0].save(memory, "GIF", save_all=True, append_images=flat[1:], duration=shown, loop=0)
    return memory.getvalue()
