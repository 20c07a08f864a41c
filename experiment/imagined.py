"""What a run's world model imagines: `python -m experiment watch RUN --imagined`.

A GIF of a held-out episode and, beside it, LOGO's rollout from the same state under the same
actions. The colour of the line below is the uncertainty u of the step: white where it is as low as
in the most certain tenth of held-out steps, red where it is as high as in the least certain tenth.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import behaviour
import datasets
import envs
from buffer import OfflineDataset
from experiment.diagnostics import replay, uncertainty_and_error, windows
from experiment.folder import read_checkpoint
from experiment.watch import check_picture, gif
from logo_wm import LogoWM
from simulators.battle import INK, font

WIDTH, LINE = 360, 30  # pixels of one of the two pictures, and of the line below


def watch_imagined(run: Path, steps: int, out: Path | None = None, seed: int = 0) -> Path:
    """Write a GIF of a recorded episode beside what the run's world model makes of it.

    Args:
        run: folder of a run of LOGO. steps: of the rollout. seed: chooses where it starts.
        out: file to write; None: RUN/imagined.gif.
    Returns:
        The GIF's path.
    Raises:
        ValueError: no checkpoint, no world model, no simulator that can draw a state, other data
            than the run was trained on, or no held-out episode that goes on for so many steps.
    """
    if steps < 1:
        raise ValueError(f"--steps is {steps}: give 1 or more.")
    check_picture(out)
    stored = read_checkpoint(run / "checkpoint.pt")
    try:
        args, backend, weights = stored["args"], stored["backend"], stored["world_model"]
        data, metadata = load_data(args)
    except KeyError as e:
        raise ValueError(f"{run} was trained without a world model (no {e}).") from e
    if backend not in ("smax", "mamujoco"):
        raise ValueError(f"{run}: states of {backend} cannot be drawn, only of SMAX and MuJoCo.")
    if metadata["sha256"] != stored["data"]:
        raise ValueError(f"{run} was trained on other data than {metadata['path']}.")
    model = make_model(args, data, weights)
    rows = window(data, steps, seed)
    actions = [data.actions[k : k + 1] for k in rows[:-1]]
    rollout = model.imagine(
        replay(actions), data.gather(torch.tensor(rows[:1])), steps, torch.Generator()
    )
    lowest, highest = np.quantile(uncertainty_and_error(model, data)[0].numpy(), (0.1, 0.9))
    u = rollout["uncertainty"][:, 0].numpy()
    red = ((u - lowest) / (highest - lowest)).clip(0, 1)
    env = envs.make(args["env_id"], 1, backend, render=True)
    try:
        films = env.film(data.state[rows].numpy(), rollout["state"][:, 0].numpy())
    finally:
        env.close()
    over = int(rollout["valid"].sum()) + 1  # states up to the imagined end
    frames = [
        side_by_side(*pair, step=k, u=u[k - 1] if k else None, red=red[k - 1] if k else 0.0,
                     over=k >= over)
        for k, pair in enumerate(zip(*films, strict=True))
    ]  # fmt: skip
    path = out or run / "imagined.gif"
    datasets.write_atomic(path, gif([frames], milliseconds=250))
    return path


def load_data(args: dict) -> tuple[OfflineDataset, dict]:
    """The dataset that a run with these flags was trained on, recorded again if need be."""
    path = args["dataset"]
    if path is None:
        path = behaviour.load_or_record(args["env_id"], args["quality"], args["episodes"])
    return datasets.load_dataset(Path(path), torch.device("cpu"), args["env_id"])


def make_model(args: dict, data: OfflineDataset, weights: dict) -> LogoWM:
    """The world model of a checkpoint.

    Raises:
        ValueError: the weights are of another model.
    """
    (n, o), s, a = data.obs.shape[1:], data.state.shape[1], data.actions.shape[-1]
    names = ("deduce_from", "heads", "clamp", "zeros", "observe")
    sizes = n, o, s, a, args["hidden"], data.avail is not None, data.statistics()
    try:
        model = LogoWM(*sizes, **{k: args[k] for k in names})
        model.load_state_dict(weights)
    except (KeyError, RuntimeError) as e:
        raise ValueError(f"its world model is not a LogoWM: {' '.join(str(e).split())}.") from e
    return model.eval()


def window(data: OfflineDataset, steps: int, seed: int) -> list[int]:
    """The rows of steps + 1 states of a held-out episode."""
    starts = windows(data.held_out, steps).numpy()
    if len(starts) == 0:
        raise ValueError(f"--steps {steps}: no held-out episode is as long; give fewer.")
    first = int(np.random.default_rng(seed).choice(starts))
    return list(range(first, first + steps + 1))


def side_by_side(recorded, imagined, step: int, u: float | None, red: float, over: bool):
    """One frame (height,2*WIDTH,3) uint8.

    Args:
        recorded, imagined: pictures. u: uncertainty of the step that led here, None: the start.
        red: of the line below, 0..1. over: LOGO believes that the episode has ended.
    """
    height = WIDTH * recorded.shape[0] // recorded.shape[1]
    image = Image.new("RGB", (2 * WIDTH, height + LINE), "white")
    for k, picture in enumerate((recorded, imagined)):
        small = Image.fromarray(picture).resize((WIDTH, height), Image.Resampling.LANCZOS)
        image.paste(small, (k * WIDTH, 0))
    pen, middle = ImageDraw.Draw(image), height + LINE / 2
    pale = round(255 * (1 - red))
    pen.rectangle((WIDTH, height, 2 * WIDTH, height + LINE), (255, pale, pale))
    pen.text((12, middle), "recorded", INK, font(15), anchor="lm")
    told = "imagined" + (", over" if over else f", {step} steps" if step else ", start")
    pen.text((WIDTH + 12, middle), told, INK, font(15), anchor="lm")
    if u is not None:
        pen.text((2 * WIDTH - 12, middle), f"uncertainty {u:.2f}", INK, font(15), anchor="rm")
    return np.asarray(image)
