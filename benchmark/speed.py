"""How fast LOGO is: against an ensemble, against the machine's limits, and as the sizes grow.

Functions that are compared (LOGO, the ensembles of ensemble.py) are timed in turn. Networks and
data are random: the time does not depend on them. results/speed.csv receives a row per
measurement (`timing.Row` says what a column means).

Sizes: B rows side by side, N agents, O observation, S state, A actions, H horizon.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import envs
import train
from benchmark.ensemble import Ensemble, load_kit
from benchmark.rows import SPEED, read, record, versions
from benchmark.speed_tables import LIMITS, TRAINING, speed_tables
from benchmark.timing import Clock, Entry, Row, parameters
from buffer import Batch, OfflineDataset, SyntheticBuffer, mix
from experiment.report import machine
from experiment.setup import check_args, commit
from logo_wm import LogoWM
from macql import descend

MAPS = {  # N, O, S, A as SMAX shows them
    "3s_vs_5z": (3, 73, 96, 10),
    "2s3z": (5, 91, 120, 10),  # this and the next two: the paper's Table 5
    "5m_vs_6m": (5, 100, 132, 11),
    "6h_vs_8z": (6, 127, 168, 13),
}
TASK = "3s_vs_5z"  # where nothing else is said
AXES = {  # of `growth`
    "agents": (3, 6, 12, 24, 30),
    "batch": (64, 128, 256, 512, 1024),
    "horizon": (5, 10, 20, 40),
    "rows": (10**4, 10**5, 10**6, 10**7),
}
MODES = "eager", "compiled"


# --------------------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------------------


def machine_limits(clock: Clock) -> list[Row]:
    """What the machine can do: one large matrix product, and Adam on one tensor."""
    device = clock.device
    a, b = (torch.randn(1024, 1024, device=device) for _ in range(2))
    weights = torch.randn(parameters(LogoWM(*MAPS[TASK])), device=device, requires_grad=True)
    weights.grad = torch.randn_like(weights)
    adam = torch.optim.AdamW([weights], fused=True)
    product = Row(LIMITS[0], "torch.mm, float32", unit="products/s")
    update = Row(LIMITS[1], "AdamW(fused), one tensor", unit="steps/s", parameters=len(weights))
    rows = clock.race([Entry(product, lambda: torch.mm(a, b), 1), Entry(update, adam.step, 1)])
    clock.gflops, clock.adam = product.gflops, update.seconds / len(weights)
    return rows


def imagination(clock: Clock, task: str, kit: tuple | None, quick: bool) -> list[Row]:
    """Rollouts with actions that were chosen beforehand: LOGO against ensembles.

    Args:
        kit: what `load_kit` returns, to time OfflineRL-Kit's ensembles, too.
    """
    n, o, s, a = MAPS[task]
    batch, horizon, widths = (8, 2, (16,)) if quick else (500, 10, (200, 256))
    device, dim = clock.device, s + n * o
    start = torch.randn(batch, dim, device=device)
    actions = random_actions(device, horizon, batch, n, a).flatten(2)
    entries = [logo_rollout(device, task, MAPS[task], batch, horizon, 16 if quick else 256)]

    def enter(name: str, model: nn.Module, rollout: Callable) -> None:
        row = Row("imagine", name, task, agents=n, batch=batch, horizon=horizon, unit="rows/s")
        row.parameters = parameters(model)
        entries.append(Entry(row, rollout, batch * horizon))

    def kit_rollout(dynamics, obs: np.ndarray, actions: np.ndarray) -> None:
        for chosen in actions:
            obs = dynamics.step(obs, chosen)[0]

    for width in widths:
        for how in ("batched", "looped"):
            model = Ensemble(dim, n * a, width, looped=how == "looped").to(device)
            enter(f"ensemble 7 x [{width}]*4, {how}", model, partial(model.rollout, start, actions))
    for width in widths if kit else ():
        make, version = kit
        public = make(dim, n * a, width, device)
        rollout = partial(kit_rollout, public, start.numpy(force=True), actions.numpy(force=True))
        enter(f"OfflineRL-Kit {version}, 7 x [{width}]*4", public.model, rollout)
    return clock.race(entries)


def random_actions(device: torch.device, *shape: int) -> torch.Tensor:
    """One-hot, (..., A)."""
    return F.one_hot(torch.randint(shape[-1], shape[:-1], device=device), shape[-1]).float()


def logo_rollout(device, task, sizes, batch, horizon, hidden=256) -> Entry:
    """H steps of LOGO, each from what the one before it predicted."""
    n, o, s, a = sizes
    model = LogoWM(*sizes, hidden).to(device)
    obs, state = torch.randn(batch, n, o, device=device), torch.randn(batch, s, device=device)
    actions = random_actions(device, horizon, batch, n, a)

    def rollout(obs, state) -> None:
        for chosen in actions:
            out = model.step(obs, state, chosen)
            obs, state = out["next_obs"], out["next_state"]

    row = Row("imagine", "LOGO", task, agents=n, batch=batch, horizon=horizon, unit="rows/s")
    row.parameters = parameters(model)
    return Entry(row, partial(rollout, obs, state), batch * horizon)


def logo_update(device, task, sizes, batch, hidden=256) -> Entry:
    """A gradient step on the world model, on a batch that is there already."""
    n, o, s, a = sizes
    model = LogoWM(*sizes, hidden).to(device)
    adam = torch.optim.AdamW(model.parameters(), fused=True)
    x, available = partial(torch.rand, device=device), torch.ones(batch, n, a, device=device)
    actions, terminated = random_actions(device, batch, n, a), torch.zeros(batch, device=device)
    transitions = Batch(
        x(batch, n, o), x(batch, s), actions, available, x(batch), x(batch, n, o), x(batch, s),
        available, terminated, torch.ones(batch, device=device),
    )  # fmt: skip
    row = Row(TRAINING[0], "LOGO", task, agents=n, batch=batch, unit="updates/s")
    row.parameters = parameters(model)
    return Entry(row, lambda: descend(adam, model.loss(transitions)[0]), 1)


def draw_from_d_m(device, rows: int, batch: int) -> Entry:
    """Sample a batch from a D_m of so many rows, small ones."""
    horizon, m = 10, rows // 10
    d_m = SyntheticBuffer(1, horizon, m, 1, 1, 1, 1, device, discrete=False, cap=1.0)
    x = partial(torch.rand, device=device)
    steps = {name: x(horizon, m) for name in ("reward", "terminated", "uncertainty")}
    steps |= {"actions": x(horizon, m, 1, 1), "valid": torch.ones(horizon, m, device=device)}
    d_m.add(steps | {"obs": x(horizon + 1, m, 1, 1), "state": x(horizon + 1, m, 1)})
    rng = torch.Generator(device).manual_seed(0)
    row = Row("draw from D_m", "LOGO", agents=1, batch=batch, rows=rows, unit="draws/s")
    return Entry(row, lambda: d_m.sample(batch, rng), 1)


def growth(clock: Clock, axis: str, quick: bool) -> list[Row]:
    """The same work in several sizes along one axis, a column of `Row`."""
    n, *others = MAPS[TASK]
    usual = {"agents": n, "batch": 8 if quick else 256, "horizon": 2 if quick else 10}
    hidden, entries = 16 if quick else 256, []
    for size in AXES[axis][: 2 if quick else None]:
        if axis == "rows":
            entries.append(draw_from_d_m(clock.device, size, 128))
            continue
        agents, batch, horizon = (usual | {axis: size}).values()
        sizes = (agents, *others)
        entries.append(logo_rollout(clock.device, TASK, sizes, batch, horizon, hidden))
        if axis != "horizon":
            entries.append(logo_update(clock.device, TASK, sizes, batch, hidden))
    for entry in entries:
        entry.row.grows = axis
    return clock.race(entries)


def training(clock: Clock, mode: str, quick: bool) -> list[Row]:
    """The three loops of train.py, each update with the sampling of its batch."""
    torch.compiler.reset()  # else what other sizes were compiled for is compiled more generally
    device, (n, o, s, a) = clock.device, MAPS[TASK]
    args = train.Args(TASK, updates=10**9, critic_first=0.0)  # the step size must not reach zero
    if quick:
        small = {"rollout_batch_size": 8, "horizon": 2, "batch_size": 8, "wm_batch_size": 8}
        args = dataclasses.replace(args, **small, hidden=16)
    data, rng = random_data(device, MAPS[TASK]), torch.Generator(device).manual_seed(0)
    spec = envs.Spec(TASK, "offline", n, o, s, a, True, int(data.lengths.max()))
    world_model = train.make_world_model(args, spec, data)
    learner = train.make_learner(args, spec, data)
    optimizer = torch.optim.AdamW(world_model.parameters(), args.lr, fused=True)
    model_data = SyntheticBuffer(1, args.horizon, args.rollout_batch_size, n, o, s, a, device)
    if mode == "compiled":
        train.compile_parts(device, world_model, learner)
    explore = partial(learner.actor.sample, epsilon=train.exploration(args, spec))
    n_synthetic = round(args.synthetic_fraction * args.batch_size)

    def update_world_model():
        torch.compiler.cudagraph_mark_step_begin()
        descend(optimizer, world_model.loss(data.sample(args.wm_batch_size, rng))[0])

    def update_policy():
        torch.compiler.cudagraph_mark_step_begin()
        real = data.sample(args.batch_size, rng, args.n_step, args.gamma)
        imagined = model_data.sample(n_synthetic, rng, args.n_step, args.gamma)
        learner.update(*mix(real, imagined), rng)

    def imagine():
        torch.compiler.cudagraph_mark_step_begin()
        starts = data.sample(args.rollout_batch_size, rng)
        model_data.add(world_model.imagine(explore, starts, args.horizon, rng))

    imagine()  # so that there is something to sample from D_m
    row = Row("", "LOGO", TASK, mode=mode, agents=n, unit="updates/s")
    rows = [dataclasses.replace(row, what=what) for what in TRAINING]
    rows[0].batch, rows[0].parameters = args.wm_batch_size, parameters(world_model)
    rows[1].batch = args.batch_size + n_synthetic
    rows[1].parameters = parameters(learner.actor) + parameters(learner.critic)
    rows[2].batch, rows[2].horizon = args.rollout_batch_size, args.horizon
    rows[2].unit, imagined = "rows/s", args.rollout_batch_size * args.horizon
    works = (update_world_model, 1), (update_policy, 1), (imagine, imagined)
    return clock.race([Entry(row, *work) for row, work in zip(rows, works, strict=True)])


def random_data(device: torch.device, sizes: tuple[int, ...]) -> OfflineDataset:
    """D of 100 episodes of 60 steps."""
    n, o, s, a = sizes
    lengths = [60] * 100
    size = sum(lengths) + len(lengths)
    x, actions = partial(torch.rand, device=device), random_actions(device, size, n, a)
    available, never = torch.ones_like(actions), torch.zeros(size, device=device)
    return OfflineDataset(x(size, n, o), x(size, s), actions, available, x(size), never, lengths)


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def speed(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = 1,
    offlinerl_kit: Path | None = None,
    compiled: bool = False,
    quick: bool = False,
    out: Path = SPEED,
) -> None:
    """Measure, print the tables, and write a row per measurement.

    Args:
        device: where to compute; auto takes a GPU if there is one
        threads: processor threads for torch
        offlinerl_kit: a checkout of OfflineRL-Kit, to time its code, too
        compiled: time the training compiled, too; to compile takes minutes
        quick: tiny sizes, to see that it works; the numbers mean nothing
        out: file to write; its rows of other machines, devices and numbers of threads are kept,
            those of this one are replaced
    """
    check_args(train.Args(device=device, compile=compiled))
    if threads < 1:
        raise ValueError(f"--threads {threads}: give 1 or more.")
    if quick and out == SPEED:
        raise ValueError("--quick measures nothing worth keeping: give another --out.")
    if out.exists():
        read(out, Row)  # before minutes of work
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    about = {"device": device, "machine": machine(device), "threads": threads, "commit": commit()}
    about["versions"] = versions()
    clock = Clock(torch.device(device), *((2, 0.0) if quick else ()))
    kit = load_kit(offlinerl_kit) if offlinerl_kit else None
    jobs = [partial(machine_limits, clock)]
    jobs += [partial(imagination, clock, task, kit, quick) for task in MAPS]
    jobs += [partial(growth, clock, axis, quick) for axis in AXES]
    jobs += [partial(training, clock, mode, quick) for mode in (MODES if compiled else MODES[:1])]
    rows = [row for job in tqdm(jobs, unit="race") for row in job()]
    rows = [dataclasses.replace(row, **about) for row in rows]
    here = about["machine"], device, threads
    record(out, *rows, replaced=lambda row: (row.machine, row.device, row.threads) == here)
    print(speed_tables(rows))
