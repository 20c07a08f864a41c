"""checkpoint.pt: how a run goes on after being killed, as if nothing had happened.

D_m can be gigabytes, yet each collection follows from the policy that played it and the state of
the random numbers: these recipes are kept, and `load_checkpoint` imagines them again. Runs that
train together leave a checkpoint each, as they would have alone.
"""

import io
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import datasets

if TYPE_CHECKING:
    from run import Run, Runs

MODULES = ("world_model", "actor", "clone", "averaged", "critic", "critic_target")
COUNTERS = ("progress", "evaluations", "seconds", "imagined_rows")
FREE = ("resume", "out", "track", "threads", "device", "num_seeds")  # may differ on resuming


def plain(args) -> dict:
    """The flags as JSON knows them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of its state; what it holds may be a slice of all seeds' weights."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def save_checkpoint(runs: "Runs") -> None:
    """Write every run's networks, optimizers, counters, random state and recipes of D_m."""
    runs.seconds["total"] = time.time() - runs[0].started

    def of_seed(k: int, moments: dict) -> dict:  # Adam's, of one parameter
        if len(runs) == 1:
            return moments
        return {n: x if n == "step" else x[k].clone() for n, x in moments.items()}

    for k, run in enumerate(runs):
        state = {name: weights(getattr(run, name)) for name in MODULES}
        state |= {name: getattr(run, name) for name in COUNTERS}
        state["optimizers"] = {}
        for name, optimizer in runs.optimizers.items():
            inside = optimizer.state_dict()
            inside["state"] = {i: of_seed(k, moments) for i, moments in inside["state"].items()}
            state["optimizers"][name] = inside
        state |= {
            "args": plain(run.args),
            "data": run.facts["sha256"],
            "device": run.device.type,
            "collections": run.model_data.collections if run.model_data else 0,
            "rng": run.rng.get_state(),
            "recipes": list(run.recipes),
        }
        memory = io.BytesIO()
        torch.save(state, memory)
        datasets.write_atomic(run.folder / "checkpoint.pt", memory.getvalue())


def read_checkpoint(run: "Run") -> dict:
    """The run's checkpoint.

    Raises:
        ValueError: there is none, or it is of a run with other flags or other data.
    """
    path = run.folder / "checkpoint.pt"
    if not path.exists():
        raise ValueError(f"--resume: no checkpoint in {run.folder}; start without --resume.")
    try:
        state = torch.load(path, map_location=run.device, weights_only=True)
        mine, theirs = plain(run.args), state["args"]
    except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(f"--resume: {path} is no checkpoint of this program: {e!r}") from e
    if state["device"] != run.device.type:  # other random numbers: it would be another run
        raise ValueError(f"--resume: {path} was trained with --device {state['device']}.")
    if state["data"] != run.facts["sha256"]:
        raise ValueError(f"--resume: {path} is of a run on other data than {run.facts['path']}.")
    if differ := [k for k in mine if k not in FREE and mine[k] != theirs.get(k)]:
        told = ", ".join(f"--{k.replace('_', '-')} {theirs.get(k)}" for k in differ)
        raise ValueError(f"--resume: {path} is of a run with {told}; give that, or another --out.")
    return state


def load_checkpoint(runs: "Runs", imagine: Callable) -> None:
    """Take up the runs' checkpoints.

    Args:
        imagine: () -> None, lets every run's actor play one collection into its D_m.
    Raises:
        ValueError: there is none, one does not fit, or the runs have not come equally far.
    """
    states = [read_checkpoint(run) for run in runs]
    if any(state["progress"] != states[0]["progress"] for state in states):
        raise ValueError(
            "--resume: the seeds were stopped at different updates: resume them one by one, "
            f"--seed {runs[0].args.seed} --out {runs[0].folder} and so on, without --num-seeds."
        )
    for run, state in zip(runs, states, strict=True):
        for name in MODULES:
            getattr(run, name).load_state_dict(state[name])
        if run.model_data:  # the ring goes on in the slot where it was
            run.model_data.collections = state["collections"] - len(state["recipes"])
        run.recipes.extend(state["recipes"])
    for name, optimizer in runs.optimizers.items():
        insides = [state["optimizers"][name] for state in states]
        for i, moments in insides[0]["state"].items():
            for n in moments.keys() - {"step"} if len(runs) > 1 else ():
                moments[n] = torch.stack([inside["state"][i][n] for inside in insides])
        optimizer.load_state_dict(insides[0])
    for recipes in zip(*(state["recipes"] for state in states), strict=True):
        for run, recipe in zip(runs, recipes, strict=True):
            run.rng.set_state(recipe["rng"].cpu())
            run.actor.load_state_dict(recipe["actor"])
        imagine()
    runs.progress.update(states[0]["progress"])
    runs.seconds.update(states[0]["seconds"])
    for run, state in zip(runs, states, strict=True):
        run.actor.load_state_dict(state["actor"])
        run.evaluations, run.imagined_rows = state["evaluations"], state["imagined_rows"]
        run.rng.set_state(state["rng"].cpu())
        run.started -= run.seconds["total"]  # the time of the run, not of the process


def take_up(runs: "Runs", files: tuple[str, ...], imagine: Callable) -> None:
    """Go on from the checkpoints where --resume says so, else start afresh in the folders.

    Args:
        files: patterns of what an earlier run may have left there. imagine: see `load_checkpoint`.
    """
    if runs.args.resume:
        return load_checkpoint(runs, imagine)
    for old in (path for run in runs for pattern in files for path in run.folder.glob(pattern)):
        print(f"replacing {old}")
        old.unlink()
    save_checkpoint(runs)  # so that --resume works from the first moment
