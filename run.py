"""What a run holds, what it writes on the way, and how it goes on after being killed.

The method is not here: train.py tells it, with these tools. A run's folder receives metrics.csv
and TensorBoard events (`Log`) and checkpoint.pt (`save_checkpoint`); report.py adds the rest.
"""

import copy
import io
import pickle
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import datasets
import envs
from buffer import OfflineDataset, SyntheticBuffer
from logo_wm import LogoWM
from macql import Actor, Critic

MODULES = ("world_model", "actor", "clone", "averaged", "critic", "critic_target")
COUNTERS = ("progress", "evaluations", "seconds", "imagined_rows")
FREE = ("resume", "out", "track", "threads", "device")  # flags that may differ on resuming


@dataclass
class Run:
    """All that changes while training; `progress` counts the updates done in each phase."""

    args: object  # train.Args
    folder: Path
    device: torch.device
    env: object  # of envs.py; None: no simulator plays this task here
    spec: envs.Spec
    data: OfflineDataset
    facts: dict  # of the data: path, sha256, episodes, transitions, return_mean, ...
    rng: torch.Generator  # of batches and rollouts
    world_model: LogoWM
    actor: Actor
    averaged: Actor  # slow average of the actor's weights: what is evaluated
    clone: Actor
    critic: Critic
    critic_target: Critic
    optimizers: dict[str, torch.optim.Optimizer]
    model_data: SyntheticBuffer | None  # D_m
    recipes: deque  # of D_m's collections, see `save_checkpoint`
    progress: dict = field(default_factory=lambda: dict.fromkeys(("clone", "wm", "policy"), 0))
    evaluations: list = field(default_factory=list)
    seconds: dict = field(
        default_factory=lambda: dict.fromkeys(
            ("clone", "wm", "policy", "imagine", "eval", "total"), 0.0
        )
    )
    imagined_rows: int = 0
    started: float = field(default_factory=time.time)


def set_lr(optimizer: torch.optim.Optimizer, lr: float, done: int, total: int, decay: bool) -> None:
    """The step size after `done` of `total` updates: constant, or falling linearly to zero."""
    for group in optimizer.param_groups:
        group["lr"] = lr * (1 - done / total) if decay else lr  # Deviation D12


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One gradient step on the optimizer's own parameters, and on nobody else's."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)
    optimizer.step()


def evaluate(run: Run, actor: Actor, seed: int, episodes: int) -> dict | None:
    """Score of the greedy policy, see `envs.evaluate`; None where no simulator plays the task."""
    if run.env is None:
        return None
    started = time.time()

    def act(obs, avail):
        avail = None if avail is None else avail.to(run.device)
        return actor.greedy(obs.to(run.device), avail).cpu()

    score = envs.evaluate(run.env, act, episodes, seed)
    run.seconds["eval"] += time.time() - started
    return score


def phase(
    run: Run,
    log: "Log",
    name: str,
    title: str,
    total: int,
    update: Callable,
    score: Callable = None,
) -> None:
    """Call update(k) for the updates still to do, up to `total`.

    Args:
        name: of the counter in `run.progress`, and of the metrics.
        update: k -> metrics as 0-d tensors; they are looked at once every `log_every` updates.
        score: k -> metrics as numbers, called every `eval_every` updates and at the end.
    Raises:
        FloatingPointError: a metric was not finite; names the update and the metric.
    """
    args, started, bad = run.args, time.time(), None
    before, elsewhere = run.seconds[name], run.seconds["imagine"] + run.seconds["eval"]
    bar = tqdm(
        range(run.progress[name], total), initial=run.progress[name], total=total, desc=title,
        unit="update", mininterval=0.2 if sys.stderr.isatty() else 20,
    )  # fmt: skip
    for k in bar:
        metrics, done, last = update(k), k + 1, k + 1 == total
        values = torch.stack(list(metrics.values()))
        if bad is None:  # the first update at which each metric was not finite, 0: none
            bad = torch.zeros(len(values), dtype=torch.long, device=run.device)
        bad = torch.where((bad == 0) & ~values.isfinite(), done, bad)
        run.progress[name] = done
        if done % args.log_every == 0 or last:
            wrong = [(w, m) for w, m in zip(bad.tolist(), metrics, strict=True) if w]
            if wrong:
                where, metric = min(wrong, key=lambda pair: pair[0])
                raise FloatingPointError(
                    f"{title}, update {where}: {metric} is not finite. Lower the step size or "
                    f"look at the data; {run.folder} keeps the last checkpoint before it."
                )
            log.write(name, done, dict(zip(metrics, values.tolist(), strict=True)))
            pause = run.seconds["imagine"] + run.seconds["eval"] - elsewhere
            run.seconds[name] = before + time.time() - started - pause
        if score and (done % args.eval_every == 0 or last):
            result = score(k)
            log.write("eval", done, result)
            bar.set_postfix({"return": f"{result['return_mean']:.2f}"})
        if done % args.checkpoint_every == 0 or last:
            save_checkpoint(run)


class Log:
    """metrics.csv (phase, update, metric, value), TensorBoard, and Weights & Biases if wanted.

    Rows that were written after the checkpoint which a run goes on from are dropped.
    """

    def __init__(self, folder: Path, progress: dict[str, int], config: dict, track: bool = False):
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.wandb = folder / "metrics.csv", None
        kept, done = ["phase,update,metric,value\n"], progress | {"eval": progress["policy"]}
        if self.path.exists():
            rows = self.path.read_text().splitlines(keepends=True)[1:]
            whole = [r for r in rows if r.count(",") == 3 and r.endswith("\n")]
            kept += [r for r in whole if int(r.split(",")[1]) <= done[r.split(",")[0]]]
        datasets.write_atomic(self.path, "".join(kept).encode())
        self.tensorboard = SummaryWriter(folder)
        if track:
            import wandb

            self.wandb = wandb
            wandb.init(project="logo", name=folder.name, config=config)

    def write(self, phase: str, update: int, metrics: dict[str, float]) -> None:
        with self.path.open("a") as f:
            f.writelines(f"{phase},{update},{k},{v:.6g}\n" for k, v in metrics.items())
        for k, v in metrics.items():
            self.tensorboard.add_scalar(f"{phase}/{k}", v, update)
        if self.wandb:
            self.wandb.log({f"{phase}/{k}": v for k, v in metrics.items()})


def plain(args) -> dict:
    """The flags as JSON knows them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}


def save_checkpoint(run: Run) -> None:
    """Everything needed to go on as if nothing had happened, but D_m's rows.

    D_m can be gigabytes, yet each collection follows from the policy that played it and the state
    of the random numbers: these recipes are kept, and `load_checkpoint` imagines them again.
    """
    run.seconds["total"] = time.time() - run.started
    state = {name: getattr(run, name).state_dict() for name in MODULES}
    state |= {name: getattr(run, name) for name in COUNTERS}
    state["optimizers"] = {k: v.state_dict() for k, v in run.optimizers.items()}
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


def load_checkpoint(run: Run, imagine: Callable) -> None:
    """Take up the run's checkpoint.

    Args:
        imagine: (run, actor) -> None, plays one collection into D_m.
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
    for name in MODULES:
        getattr(run, name).load_state_dict(state[name])
    for name, optimizer in run.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    player = copy.deepcopy(run.actor)
    if run.model_data:  # the ring goes on in the slot where it was
        run.model_data.collections = state["collections"] - len(state["recipes"])
    for recipe in state["recipes"]:
        run.recipes.append(recipe)
        run.rng.set_state(recipe["rng"].cpu())
        player.load_state_dict(recipe["actor"])
        imagine(run, player)
    for name in COUNTERS:
        setattr(run, name, state[name])
    run.rng.set_state(state["rng"].cpu())
    run.started -= run.seconds["total"]  # the time of the run, not of the process
