"""What a run holds, and the loop that all phases share.

The method is not here: train.py tells it, with these tools. A run's folder receives metrics.csv
and TensorBoard events (`Log`); checkpoint.py and report.py add the rest.

With --num-seeds K there are K runs (`Run`), each with seed, networks, scores and folder of its own,
that train as one batched computation (`Runs`). Each leaves what it would have left alone.
"""

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import datasets
import envs
from buffer import OfflineDataset, SyntheticBuffer
from checkpoint import save_checkpoint
from fast import Stack, each
from logo_wm import LogoWM
from macql import Actor, Critic


@dataclass
class Run:
    """One seed: all that changes while it trains."""

    args: object  # train.Args, with this run's seed
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
    model_data: SyntheticBuffer | None  # D_m
    recipes: deque  # of D_m's collections, see checkpoint.py
    progress: dict = field(default_factory=lambda: dict.fromkeys(("clone", "wm", "policy"), 0))
    evaluations: list = field(default_factory=list)
    seconds: dict = field(
        default_factory=lambda: dict.fromkeys(
            ("clone", "wm", "policy", "imagine", "eval", "total"), 0.0
        )
    )
    imagined_rows: int = 0
    started: float = field(default_factory=time.time)


class Runs(list[Run]):
    """K runs on the same data that train in step; what they share, and their networks as one.

    `world_model`, `actor`, ... and `model_data` are the run's own for K = 1, else `fast.Stack`s of
    the K runs' own: call them through `fast.each`, with tensors that have a leading dimension K.
    The updates done (`progress`) and the time they took (`seconds`) are common to all.
    """

    def __init__(self, runs: list[Run]):
        super().__init__(runs)
        first = self[0]
        self.args, self.device, self.data = first.args, first.device, first.data
        self.env, self.progress, self.seconds = first.env, first.progress, first.seconds
        for run in self:
            run.progress, run.seconds = self.progress, self.seconds

        def together(modules: list) -> torch.nn.Module:
            return modules[0] if len(self) == 1 else Stack(modules)

        self.world_model = together([run.world_model for run in self])
        self.actor = together([run.actor for run in self])
        self.averaged = together([run.averaged for run in self])
        self.clone = together([run.clone for run in self])
        self.critic = together([run.critic for run in self])
        self.critic_target = together([run.critic_target for run in self])
        self.model_data = first.model_data and together([run.model_data for run in self])
        args = self.args

        def adam(net: torch.nn.Module, lr: float, decay: float = 0.0) -> torch.optim.Optimizer:
            fixed = args.compile or args.cudagraphs  # a number would be part of the code
            return torch.optim.AdamW(
                net.parameters(), torch.tensor(lr, device=self.device) if fixed else lr,
                weight_decay=decay, fused=True, capturable=args.cudagraphs,
            )  # fmt: skip

        self.optimizers = {
            "wm": adam(self.world_model, args.wm_lr, args.wm_weight_decay),  # Deviation D15
            "clone": adam(self.clone, args.lr),
            "actor": adam(self.actor, args.lr),
            "critic": adam(self.critic, args.lr),
        }

    def draw(self, random: Callable) -> torch.Tensor:
        """random(run) of every run, with a leading dimension K where K > 1."""
        draws = [random(run) for run in self]
        return draws[0] if len(self) == 1 else torch.stack(draws)

    def rows(self, size: int) -> torch.Tensor:
        """Rows of D (B,), or (K,B)."""
        return self.draw(lambda run: run.data.draw(size, run.rng))

    def now(self) -> float:
        """Seconds, once a GPU has done all that it was told so far."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.time()


def set_lr(optimizer: torch.optim.Optimizer, lr: float, done: int, total: int, decay: bool) -> None:
    """The step size after `done` of `total` updates: constant, or falling linearly to zero."""
    now = lr * (1 - done / total) if decay else lr  # Deviation D12
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # a recorded update reads it at this place
            group["lr"].fill_(now)
        else:
            group["lr"] = now


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One gradient step on the optimizer's own parameters, and on nobody else's.

    Args:
        loss: () or, of independent seeds, (K,).
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss.sum().backward(inputs=parameters)
    optimizer.step()


def evaluate(runs: Runs, who: str, offset: int, episodes: int) -> list[dict]:
    """Score of each run's greedy policy `who` (averaged, clone), see `envs.evaluate`.

    Battles are drawn with 10^6 (seed + 1) + offset. In SMAX the policies of all runs play at once.
    """
    started, actor = runs.now(), getattr(runs, who)
    seeds = [10**6 * (run.args.seed + 1) + offset for run in runs]

    def play(actor, seeds: list[int]) -> list[dict]:
        def act(obs, avail):
            seen = [x if x is None else x.to(runs.device) for x in (obs, avail)]
            if len(seeds) > 1:  # (K*E,...) -> (K,E,...)
                seen = [x if x is None else x.unflatten(0, (len(seeds), -1)) for x in seen]
            return each(Actor.greedy, actor, *seen).view(*obs.shape[:2], -1).cpu()

        return envs.evaluate_together(runs.env, act, episodes, seeds)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's others stay awake between two steps, and hold SMAX up
    try:
        if runs.env.spec.backend == "smax":
            scores = play(actor, seeds)
        else:
            alone = zip(runs, seeds, strict=True)
            scores = [score for run, seed in alone for score in play(getattr(run, who), [seed])]
    finally:
        torch.set_num_threads(threads)
    runs.seconds["eval"] += time.time() - started
    return scores


def phase(
    runs: Runs,
    logs: list["Log"],
    name: str,
    title: str,
    total: int,
    update: Callable,
    score: Callable = None,
) -> None:
    """Call update(k) for the updates still to do, up to `total`.

    Args:
        logs: of each run.
        name: of the counter in `runs.progress`, and of the metrics.
        update: k -> metrics as tensors, () or (K,); looked at once every `log_every` updates.
        score: k -> each run's metrics as numbers, called every `eval_every` updates and at the end.
    Raises:
        FloatingPointError: a metric was not finite; names the update and the metric.
    """
    args, started, seconds, history = runs.args, time.time(), runs.seconds, []
    before, elsewhere = seconds[name], seconds["imagine"] + seconds["eval"]
    bar = tqdm(
        range(runs.progress[name], total), initial=runs.progress[name], total=total, desc=title,
        unit="update", mininterval=0.2 if sys.stderr.isatty() else 20,
    )  # fmt: skip
    for k in bar:
        metrics, done, last = update(k), k + 1, k + 1 == total
        history.append(torch.stack(list(metrics.values())))
        runs.progress[name] = done
        if done % args.log_every == 0 or last:
            values = torch.stack(history).view(len(history), len(metrics), len(runs)).cpu()
            for i, metric, seed in values.isfinite().logical_not().nonzero()[:1].tolist():
                raise FloatingPointError(
                    f"{title}, update {done - len(history) + 1 + i}: {list(metrics)[metric]} is "
                    "not finite. Lower the step size or look at the data; "
                    f"{runs[seed].folder} keeps the last checkpoint before it."
                )
            for log, now in zip(logs, values[-1].T.tolist(), strict=True):
                log.write(name, done, dict(zip(metrics, now, strict=True)))
            history.clear()
            pause = seconds["imagine"] + seconds["eval"] - elsewhere
            seconds[name] = before + time.time() - started - pause
        if score and (done % args.eval_every == 0 or last):
            scores = score(k)
            for log, result in zip(logs, scores, strict=True):
                log.write("eval", done, result)
            mean = sum(result["return_mean"] for result in scores) / len(scores)
            bar.set_postfix({"return": f"{mean:.2f}"})
        if done % args.checkpoint_every == 0 or last:
            save_checkpoint(runs)


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

            self.wandb = wandb.init(
                project="logo", name=folder.name, config=config, reinit="create_new"
            )

    def write(self, phase: str, update: int, metrics: dict[str, float]) -> None:
        with self.path.open("a") as f:
            f.writelines(f"{phase},{update},{k},{v:.6g}\n" for k, v in metrics.items())
        for k, v in metrics.items():
            self.tensorboard.add_scalar(f"{phase}/{k}", v, update)
        if self.wandb:
            self.wandb.log({f"{phase}/{k}": v for k, v in metrics.items()})
