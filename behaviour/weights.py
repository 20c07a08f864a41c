"""The snapshots of a behaviour policy's training: which are kept, and their file ENV_ID.npz.

A file holds float16 arrays and nothing pickled. Six snapshots are kept: at one to five fifths
of the way to the medium policy, which is the fifth, and the final policy, the expert.
  every parameter's name   (6, ...)  its values in the six snapshots
  snapshot_steps           (6,)      environment steps at which they were taken
  curve                    (I,4)     after each of the training's I iterations: environment steps,
                                     mean return, win rate, share of enemies weakened; early files
                                     lack the last column, which says nothing on robots
"""

import io
import zipfile
from pathlib import Path

import numpy as np
import torch

import datasets
import envs
from behaviour import mappo
from behaviour.policy import Policy

FOLDER = Path(__file__).parent
SNAPSHOTS = 6
STEPS_PER_SECOND = 2_200  # of MAPPO on 3m on one core of an AMD EPYC
# Mean returns of the public medium datasets [OMIGA], which our medium policies are chosen to match
PUBLIC_MEDIUM = {"Hopper-3x1": 724.0, "Ant-2x4": 1419.0, "HalfCheetah-6x1": 1426.0}


def select_snapshots(
    curve: np.ndarray, snapshots: list[dict], medium_return: float | None = None, replay: int = 5
) -> dict[str, np.ndarray]:
    """Keep `replay` snapshots spread evenly up to medium, medium the last of them, and the final.

    Args:
        curve: (I,4), see the top of this file.
        snapshots: I state_dicts of a policy, as arrays.
        medium_return: mean return that medium should have; None: medium should win half as often as
            the final policy (have half its return, if that never wins).
    Returns:
        The arrays of a file of weights.
    """
    score = curve[:, 2] if curve[-1, 2] > 0 else curve[:, 1]
    smooth = np.array([score[max(0, i - 4) : i + 5].mean() for i in range(len(score))])
    target = smooth[-1] / 2 if medium_return is None else medium_return
    # Scores against weakened enemies are of another task: they do not qualify for medium.
    distance = np.abs(smooth - target) + 1e9 * (curve[:, 3] > 0)
    medium = int(distance.argmin())
    kept = [round(medium * (k + 1) / replay) for k in range(replay)] + [len(curve) - 1]
    weights = {k: np.stack([snapshots[i][k] for i in kept]) for k in snapshots[0]}
    return {**weights, "snapshot_steps": curve[kept, 0], "curve": curve.astype(np.float32)}


def save_weights(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the file atomically.

    Raises:
        ValueError: an array holds NaN or infinity; nothing is written.
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    if bad := [k for k, x in arrays.items() if not np.isfinite(x).all()]:
        raise ValueError(f"{path} was not written: NaN or infinity in {bad[0]}; try a lower --lr.")
    memory = io.BytesIO()
    np.savez_compressed(memory, **arrays)
    datasets.write_atomic(path, memory.getvalue())


def load_policies(env_id: str, spec: envs.Spec) -> list[Policy]:
    """The six shipped policies of a task: the fifth is medium, the last is the expert.

    Raises:
        FileNotFoundError: no behaviour policy is shipped for this task.
        ValueError: the file is damaged, or of another task.
    """
    path = FOLDER / f"{env_id}.npz"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in FOLDER.glob("*.npz")))
        minutes = mappo.defaults(env_id).total_steps / STEPS_PER_SECOND / 60
        raise FileNotFoundError(
            f"No behaviour policy for {env_id} in {FOLDER} (there: {shipped}): train one with "
            f"`python -m behaviour train --env-id {env_id}` (about {minutes:.0f} minutes on one "
            "core), or give recorded data with --dataset."
        )
    arrays = {k: x for k, x in read_weights(path).items() if k not in ("snapshot_steps", "curve")}
    try:
        units = "net.own.weight" in arrays
        first = arrays["net.own.weight" if units else "net.0.weight"]  # (6,hidden,inputs)
        policies = [Policy(spec, first.shape[1], units) for _ in range(SNAPSHOTS)]
        for k, policy in enumerate(policies):
            policy.load_state_dict({name: torch.tensor(x[k]).float() for name, x in arrays.items()})
    except (KeyError, IndexError, RuntimeError, TypeError) as e:
        what = " ".join(str(e).split())
        raise ValueError(f"{path} holds no policies of {env_id}: {what}.") from e
    if bad := [k for k, x in arrays.items() if len(x) != SNAPSHOTS or not np.isfinite(x).all()]:
        raise ValueError(f"{path}: {bad[0]} is not {SNAPSHOTS} times finite numbers: damaged.")
    return policies


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of weights; their zip archive carries checksums.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} does not have its checksum")
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except Exception as e:  # whatever zipfile and NumPy make of damaged bytes
        raise ValueError(f"{path} is no file of behaviour policies, or damaged: {e}.") from e


def draw_curves(path: Path) -> None:
    """Draw the learning curves of the shipped policies, with a dot at each snapshot kept.

    Args:
        path: the picture; its ending selects the format.
    Raises:
        ValueError: matplotlib knows no format of this ending. OSError: `path` cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    tasks = envs.PAPER_SMAC + envs.PAPER_MUJOCO
    for env_id, ax in zip(tasks, figure.subplots(2, 4).flat, strict=True):
        stored = read_weights(FOLDER / f"{env_id}.npz")
        curve, kept = stored["curve"], stored["snapshot_steps"]
        column = 1 if envs.is_robot(env_id) else 2
        millions, score = curve[:, 0] / 1e6, curve[:, column]
        ax.plot(millions, score, lw=0.7)
        ax.plot(kept / 1e6, np.interp(kept, curve[:, 0], score), "k.")
        ax.set(title=env_id, ylabel=("", "return", "win rate")[column])
    figure.supxlabel("environment steps (millions); dots: the snapshots that datasets are made of")
    memory = io.BytesIO()
    figure.savefig(memory, dpi=70, format=path.suffix[1:] or "png")
    datasets.write_atomic(path, memory.getvalue())
