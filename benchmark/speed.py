"""How fast LOGO is: against an ensemble, against the machine's limits, and as the sizes grow.

`python benchmark.py speed` measures, `python benchmark.py table` shows it. Rivals (rivals.py) are
timed in turn, A, B, A, B, so that whatever disturbs the machine disturbs both. Networks and data
are random: the time does not depend on them. results/speed.csv receives a row a measurement
(`timing.Row` says what a column means).

Sizes: B rows side by side, N agents, O observation, S state, A actions, H horizon.
"""

import dataclasses
import platform
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
from buffer import Batch, OfflineDataset, SyntheticBuffer
from fast import CudaGraph
from logo_wm import LogoWM
from prepare import build, check, commit, imagined_rows
from rivals import Ensemble, load_kit
from run import Runs
from timing import Clock, Entry, Row, machine, parameters, read, write

RESULTS = Path(__file__).parent / "results" / "speed.csv"
MAPS = {  # N, O, S, A as SMAX shows them
    "3s_vs_5z": (3, 101, 96, 10),
    "2s3z": (5, 127, 120, 10),  # this and the next two: the paper's Table 5
    "5m_vs_6m": (5, 140, 132, 11),
    "6h_vs_8z": (6, 179, 168, 13),
}
TASK = "3s_vs_5z"  # where nothing else is said
AXES = {  # of `growth`
    "agents": (3, 6, 12, 24, 30),
    "batch": (64, 128, 256, 512, 1024),
    "horizon": (5, 10, 20, 40),
    "rows": (10**4, 10**5, 10**6, 10**7),
}
MODES = {  # flags of train.py
    "eager": {},
    "compiled": {"compile": True},
    "graph": {"cudagraphs": True},
    "compiled graph": {"compile": True, "cudagraphs": True},
}
LIMITS = "matrix product 1024^3", "Adam"  # what the machine itself can do
TRAINING = "world-model update", "policy update", "imagine with the policy into D_m"


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
    clock.limits = {"gflops": product.gflops, "adam": update.seconds / len(weights)}
    return rows


def imagination(clock: Clock, task: str, kit: tuple | None, quick: bool) -> list[Row]:
    """Rollouts with actions that were chosen beforehand: LOGO against ensembles."""
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

    def public_rollout(dynamics, obs: np.ndarray, actions: np.ndarray) -> None:
        for chosen in actions:
            obs = dynamics.step(obs, chosen)[0]

    for width in widths:
        for how in ("batched", "looped"):
            model = Ensemble(dim, n * a, width, looped=how == "looped").to(device)
            enter(f"ensemble 7 x [{width}]*4, {how}", model, partial(model.rollout, start, actions))
    if device.type == "cuda":  # the same, recorded
        for row, f, units in entries.copy():
            recorded = partial(CudaGraph(f.func), *f.args)
            entries.append(Entry(dataclasses.replace(row, mode="graph"), recorded, units))
    for width in widths if kit else ():
        make, version = kit
        public = make(dim, n * a, width, device)
        rollout = partial(public_rollout, public, start.numpy(force=True))
        name = f"OfflineRL-Kit {version}, 7 x [{width}]*4"
        enter(name, public.model, partial(rollout, actions.numpy(force=True)))
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

    def rollout(obs, state, actions) -> dict[str, torch.Tensor]:
        for chosen in actions:
            out = model.step(obs, state, chosen)
            obs, state = out["next_obs"], out["next_state"]
        return out

    row = Row("imagine", "LOGO", task, agents=n, batch=batch, horizon=horizon, unit="rows/s")
    row.parameters = parameters(model)
    return Entry(row, partial(rollout, obs, state, actions), batch * horizon)


def logo_update(device, task, sizes, batch, hidden=256) -> Entry:
    """A gradient step on the world model, on a batch that is there already."""
    n, o, s, a = sizes
    model = LogoWM(*sizes, hidden).to(device)
    adam = torch.optim.AdamW(model.parameters(), fused=True)
    x, may = partial(torch.rand, device=device), torch.ones(batch, n, a, device=device)
    now, then = ((x(batch, n, o), x(batch, s)) for _ in range(2))
    actions, over = random_actions(device, batch, n, a), torch.zeros(batch, device=device)
    transitions = Batch(*now, actions, may, x(batch), *then, may, over)

    def update() -> None:
        adam.zero_grad()
        model.loss(transitions)[0].backward()
        adam.step()

    row = Row(TRAINING[0], "LOGO", task, agents=n, batch=batch, unit="updates/s")
    row.parameters = parameters(model)
    return Entry(row, update, 1)


def draw_from_d_m(device, rows: int, batch: int) -> Entry:
    """Draw a batch from a D_m of so many rows, small ones."""
    horizon, m = 10, rows // 10
    d_m = SyntheticBuffer(1, horizon, m, 1, 1, 1, 1, device, discrete=False)
    x = partial(torch.rand, device=device)
    steps = {name: x(horizon, m) for name in ("reward", "terminated", "u")}
    steps |= {"actions": x(horizon, m, 1, 1), "filled": torch.ones(horizon, m, device=device)}
    d_m.add(steps | {"obs": x(horizon + 1, m, 1, 1), "state": x(horizon + 1, m, 1)}, cap=1.0)
    g = torch.Generator(device).manual_seed(0)
    row = Row("draw from D_m", "LOGO", agents=1, batch=batch, rows=rows, unit="draws/s")
    return Entry(row, lambda: d_m.sample(batch, g), 1)


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


def training(clock: Clock, seeds: int, mode: str, quick: bool) -> list[Row]:
    """What train.py does in Phases 1 to 3, draws included, for some seeds at once."""
    torch.compiler.reset()  # else what other sizes were compiled for is compiled more generally
    n, o, s, a = MAPS[TASK]
    args = train.Args(TASK, num_seeds=seeds, **MODES[mode])
    if quick:
        small = {"rollouts": 8, "horizon": 2, "batch_size": 8, "wm_batch_size": 8}
        args = dataclasses.replace(args, **small, hidden=16, wm_hidden=16)
    data = random_data(clock.device, MAPS[TASK])
    spec = envs.Spec(TASK, "offline", n, o, s, a, True, int(data.lengths.max()))
    of_seed = [dataclasses.replace(args, seed=k) for k in range(seeds)]
    runs = Runs([build(of_k, Path(), data, {}, None, spec) for of_k in of_seed])
    updates, synthetic = train.make_updates(runs), imagined_rows(args)
    train.imagine(runs, updates)  # so that there is something to draw from D_m

    def world_model():
        updates.world_model(runs.rows(args.wm_batch_size))

    def policy():
        points = runs.draw(lambda run: run.model_data.draw(synthetic, run.rng))
        updates.policy(runs.rows(args.batch_size - synthetic), points, None, None)

    def learning(*optimizers: str) -> int:  # parameters
        groups = [group for name in optimizers for group in runs.optimizers[name].param_groups]
        return sum(p.numel() for group in groups for p in group["params"])

    row = Row("", "LOGO", TASK, mode=mode, seeds=seeds, agents=n, unit="updates/s")
    rows = [dataclasses.replace(row, what=what) for what in TRAINING]
    rows[0].batch, rows[0].parameters = args.wm_batch_size, learning("wm")
    rows[1].batch, rows[1].parameters = args.batch_size, learning("actor", "critic")
    rows[2].batch, rows[2].horizon, rows[2].unit = args.rollouts, args.horizon, "rows/s"
    return clock.race([
        Entry(rows[0], world_model, seeds),
        Entry(rows[1], policy, seeds),
        Entry(rows[2], lambda: train.imagine(runs, updates), seeds * args.rollouts * args.horizon),
    ])  # fmt: skip


def random_data(device: torch.device, sizes: tuple[int, ...]) -> OfflineDataset:
    """D of 100 episodes of 60 steps."""
    n, o, s, a = sizes
    lengths = [60] * 100
    size = sum(lengths) + len(lengths)
    x, actions = partial(torch.rand, device=device), random_actions(device, size, n, a)
    may, never = torch.ones_like(actions), torch.zeros(size, device=device)
    return OfflineDataset(x(size, n, o), x(size, s), actions, may, x(size), never, lengths)


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------


def speed(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = 1,
    offlinerl_kit: Path | None = None,
    compiled: bool = False,
    quick: bool = False,
    out: Path = RESULTS,
) -> list[Row]:
    """Measure, and write a row a measurement.

    Args:
        device: where to compute; auto takes a GPU if there is one.
        threads: processor threads for torch.
        offlinerl_kit: a checkout of OfflineRL-Kit, to time its code, too.
        compiled: time the training compiled, too; to compile takes minutes.
        quick: tiny sizes, to see that it works; the numbers mean nothing.
        out: the file to write; what it holds of other machines, devices and threads stays in it,
            what it holds of this one is replaced.
    """
    check(train.Args(device=device, compile=compiled))
    if threads < 1:
        raise ValueError(f"--threads {threads}: give 1 or more.")
    if quick and out == RESULTS:
        raise ValueError("--quick measures nothing worth keeping: give another --out.")
    before = read(out) if out.exists() else []
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, "
    versions += f"numpy {np.__version__}"
    about = {"device": device, "machine": machine(device), "threads": threads, "commit": commit()}
    about["versions"] = versions
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    clock = Clock(torch.device(device), *((2, 0.0) if quick else ()))
    kit = load_kit(offlinerl_kit) if offlinerl_kit else None
    jobs = [partial(machine_limits, clock)]
    jobs += [partial(imagination, clock, task, kit, quick) for task in MAPS]
    jobs += [partial(growth, clock, axis, quick) for axis in AXES]
    modes = [mode for mode in MODES if compiled or "compiled" not in mode]
    if device == "cpu":
        modes = [mode for mode in modes if "graph" not in mode]
    jobs += [partial(training, clock, seeds, mode, quick) for mode in modes for seeds in (1, 5)]
    rows = [row for job in tqdm(jobs, unit="race") for row in job()]
    rows = [dataclasses.replace(row, **about) for row in rows]
    here = about["machine"], device, threads
    kept = [row for row in before if (row.machine, row.device, row.threads) != here]
    write(out, kept + rows)
    print(markdown(rows))
    return rows


def table(path: Path = RESULTS) -> None:
    """Print what was measured as tables in Markdown."""
    rows = read(path)
    for where in dict.fromkeys((row.machine, row.device, row.threads) for row in rows):
        print(markdown([r for r in rows if (r.machine, r.device, r.threads) == where]))


def markdown(rows: list[Row]) -> str:
    """The main lines of one machine's measurements: limits, rivals, training, growth."""
    one = rows[0]
    limits = " ".join(
        f"{row.what[0].upper()}{row.what[1:]}, {row.implementation}: {1e3 * row.seconds:.2f} ms"
        + (f", {row.gflops:,.0f} GFLOP/s." if row.gflops else f", {millions(row)} parameters.")
        for row in rows if row.what in LIMITS
    )  # fmt: skip
    threads = f"{one.threads} thread" + "s" * (one.threads > 1)
    about = f"{one.machine}; {one.device}, {threads}; {one.versions}; {one.commit}."
    races = [row for row in rows if row.what == "imagine" and not row.grows]
    logo = {(r.task, r.mode): r.seconds for r in races if r.implementation == "LOGO"}
    by_code: dict[str, list[str]] = {}
    for row in races:
        name = row.implementation + ("" if row.mode == "eager" else f", {row.mode}")
        gain = row.seconds / logo[row.task, row.mode]
        by_code.setdefault(name, []).append(f"{row.rate:,.0f} ({gain:.2f}x, {millions(row)})")
    tables = [grid(
        [f"{races[0].batch} x {races[0].horizon} imagined steps, rows/s", *MAPS],
        [[name, *cells] for name, cells in by_code.items()],
    )]  # fmt: skip
    trained: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        if row.what in TRAINING and not row.grows:
            trained.setdefault((row.seeds, row.mode), []).append(row)
    work = [f"{row.what}, {row.unit}" for row in next(iter(trained.values()))]
    tables.append(grid(
        ["seeds at once", "mode", *work, "peak memory, MB"],
        [[*key, *map(rate_and_share, some), f"{max(row.peak_memory_mb or 0 for row in some):,.0f}"]
         for key, some in trained.items()],
    ))  # fmt: skip
    growing: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.grows:
            growing.setdefault((row.what, row.grows), []).append(row)
    tables.append(grid(
        ["work", "growing", "sizes", "milliseconds", "time ~ size^p, p"],
        [[what, axis, " ".join(f"{getattr(row, axis):,}" for row in some),
          " ".join(f"{1e3 * row.seconds:.3g}" for row in some), f"{slope(some, axis):.2f}"]
         for (what, axis), some in growing.items()],
    ))  # fmt: skip
    return "\n\n".join([f"{about} {limits}", *tables]) + "\n"


def rate_and_share(row: Row) -> str:
    share = row.share_of_bound or row.share_of_peak
    return f"{row.rate:,.{0 if row.rate > 100 else 1}f} ({share:.0%})"


def millions(row: Row) -> str:
    return f"{row.parameters / 1e6:.2f} M"


def grid(header: list[str], lines: list[list]) -> str:
    """A table in Markdown."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in cells)


def slope(rows: list[Row], axis: str) -> float:
    """p of seconds ~ size^p, fitted."""
    size, seconds = ([getattr(r, name) for r in rows] for name in (axis, "seconds"))
    return float(np.polyfit(np.log(size), np.log(seconds), 1)[0])
