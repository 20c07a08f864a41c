"""How fast LOGO is: against an ensemble, against the machine's limits, and as the sizes grow.

  python benchmark.py speed                                   a CPU, one thread: some minutes
  python benchmark.py speed --device cuda --compiled          a GPU, in every mode that it has
  python benchmark.py speed --offlinerl-kit OfflineRL-Kit     against public code, too, after
      git clone https://github.com/yihaosun1124/OfflineRL-Kit
  python benchmark.py table                                   the results as a table in Markdown

The rival is what the paper's Table 5 compares with: seven probabilistic networks that predict the
joint observation of all agents. It is timed as OfflineRL-Kit publishes it, and as `Ensemble`, the
same computation written as LOGO is: in tensors, without numpy. Rivals are timed in turn, A, B, A,
B, so that whatever disturbs the machine disturbs both. Networks and data are random: the time does
not depend on them. results/speed.csv receives a row a measurement (`Row` says what a column means).

Sizes: B rows side by side, N agents, O observation, S state, A actions, H horizon, M members.
"""

import csv
import dataclasses
import io
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args
from unittest.mock import MagicMock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import datasets
import envs
import train
from buffer import Batch, OfflineDataset, SyntheticBuffer
from fast import CudaGraph
from logo_wm import LogoWM
from prepare import build, commit, imagined_rows
from run import Runs

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


@dataclasses.dataclass
class Row:
    """A measurement: a line of speed.csv. Empty is what has no meaning for it."""

    what: str  # is timed: "imagine", "world-model update", ...
    implementation: str  # by which code
    task: str = ""  # whose dimensions it has
    grows: str = ""  # the column that is varied, see `growth`
    mode: str = "eager"  # or another of `MODES`; graph: CUDA graphs
    seeds: int = 1  # computed at once
    agents: int | None = None  # N
    batch: int | None = None  # B
    horizon: int | None = None  # H
    rows: int | None = None  # of D_m
    seconds: float = 0.0  # one call: median of the repetitions
    spread: float = 0.0  # half of (most - least) over the median
    rate: float = 0.0  # units per second
    unit: str = ""
    gflops: float | None = None  # 10^9 floating-point operations of matrix products, per second
    share_of_peak: float | None = None  # that, over the same of one product of 1024^3
    share_of_bound: float | None = None  # seconds at the peak rate + of Adam, over seconds
    parameters: int | None = None  # of the networks
    peak_memory_mb: float | None = None  # GPU: of torch's tensors; CPU: of the whole process
    device: str = ""
    machine: str = ""
    threads: int = 0
    commit: str = ""
    versions: str = ""


class Entry(NamedTuple):
    """What takes part in a race."""

    row: Row  # to be filled in
    function: Callable  # is timed
    units: float  # of work in a call


@dataclasses.dataclass
class Clock:
    """Times functions on a device; `limits` are those that `machine_limits` found."""

    device: torch.device
    repetitions: int = 5
    least: float = 0.3  # seconds a repetition
    limits: dict[str, float] = dataclasses.field(default_factory=dict)
    flop: dict[tuple, int] = dataclasses.field(default_factory=dict)  # in a call of some work

    def seconds(self, function: Callable, calls: int) -> float:
        """Mean time of a call."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        return (time.perf_counter() - started) / calls

    def race(self, entries: list[Entry]) -> list[Row]:
        """Time some functions in turn; returns their rows."""
        calls = []
        for row, function, _ in entries:
            row.peak_memory_mb = peak_memory_mb(function, self.device)  # warms it up, too
            if row.mode == "eager":  # nothing else can be counted, and does the same
                self.flop[work(row)] = count_flop(function)
            calls.append(max(1, math.ceil(self.least / self.seconds(function, 1))))
        rounds = []
        for _ in range(self.repetitions):
            pairs = zip(entries, calls, strict=True)
            rounds.append([self.seconds(entry.function, n) for entry, n in pairs])
        for (row, _, units), t in zip(entries, np.array(rounds).T, strict=True):
            row.seconds = float(np.median(t))
            row.spread = float(t.max() - t.min()) / 2 / row.seconds
            row.rate = units / row.seconds
            if flop := self.flop[work(row)]:
                row.gflops = flop / row.seconds / 1e9
                row.share_of_peak = row.gflops / self.limits.get("gflops", row.gflops)
            if "update" in row.what:
                adam = row.parameters * self.limits["adam"]
                row.share_of_bound = row.share_of_peak + adam / row.seconds
        return [entry.row for entry in entries]


def work(row: Row) -> tuple:
    """What is computed, in whichever mode."""
    sizes = row.seeds, row.agents, row.batch, row.horizon, row.rows
    return row.what, row.implementation, row.task, sizes


def count_flop(function: Callable) -> int:
    """Floating-point operations of the matrix products in a call; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_memory_mb(function: Callable, device: torch.device) -> float | None:
    """The most memory in use during the first calls; None where the system does not tell."""
    calls = range(5)  # CUDA graphs are recorded at the fourth
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for _ in calls:
            function()
        return torch.cuda.max_memory_allocated() / 1e6
    function()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
        function()
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def parameters(module: nn.Module) -> int:
    """Number of those in use: OfflineRL-Kit's module holds its best weights, too."""
    return sum(p.numel() for name, p in module.named_parameters() if "saved" not in name)


# --------------------------------------------------------------------------------------------------
# The rival
# --------------------------------------------------------------------------------------------------


class Ensemble(nn.Module):
    """M probabilistic networks (joint o, joint a) -> N(joint o_next - o, r), as in OfflineRL-Kit.

    Args:
        obs, actions: dimensions of the joint observation and of the joint action.
        hidden: width of the four hidden layers; OfflineRL-Kit has 200.
        looped: one member after the other, instead of all in one batched product.
    """

    def __init__(self, obs: int, actions: int, hidden=200, members=7, elites=5, looped=False):
        super().__init__()
        sizes = [obs + actions, *[hidden] * 4, 2 * (obs + 1)]
        shapes = list(zip(sizes, sizes[1:], strict=False))
        self.weights = nn.ParameterList(
            nn.init.trunc_normal_(torch.empty(members, i, j), std=0.5 * i**-0.5) for i, j in shapes
        )
        self.biases = nn.ParameterList(torch.zeros(members, 1, j) for _, j in shapes)
        self.max_log_var = nn.Parameter(torch.full((obs + 1,), 0.5))
        self.min_log_var = nn.Parameter(torch.full((obs + 1,), -10.0))
        self.elites, self.looped = elites, looped

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,I) -> mean and log variance (M,B,obs+1) of every member."""
        layers = list(zip(self.weights, self.biases, strict=True))
        if self.looped:
            members = [[(w[m], b[m]) for w, b in layers] for m in range(len(self.weights[0]))]
            out = torch.stack([self.network(torch.addmm, x, layers) for layers in members])
        else:
            out = self.network(torch.baddbmm, x.expand(len(self.weights[0]), -1, -1), layers)
        mean, log_var = out.chunk(2, -1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var)

    @staticmethod
    def network(product: Callable, x: torch.Tensor, layers: list) -> torch.Tensor:
        for w, b in layers[:-1]:
            x = F.silu(product(b, x, w), inplace=True)
        return product(layers[-1][1], x, layers[-1][0])

    @torch.no_grad()
    def step(self, obs: torch.Tensor, actions: torch.Tensor) -> dict[str, torch.Tensor]:
        """One imagined step: every row is drawn from one of the elites, the most doubtful member
        says how much reward is lost."""
        mean, log_var = self(torch.cat([obs, actions], -1))  # (M,B,obs+1)
        std = torch.exp(0.5 * log_var)
        penalty = std.norm(dim=-1).amax(0)  # (B,)
        rows = torch.arange(len(obs), device=obs.device)
        member = torch.randint(self.elites, (len(obs),), device=obs.device)
        change = torch.addcmul(mean[member, rows], std[member, rows], torch.randn_like(mean[0]))
        reward = change[:, -1]
        return {
            "next_obs": obs + change[:, :-1],
            "raw_reward": reward,
            "reward": reward - penalty,
            "penalty": penalty,
        }

    def rollout(self, obs: torch.Tensor, actions: torch.Tensor) -> dict[str, torch.Tensor]:
        """H steps, each from what the one before it predicted; the last one's outcome."""
        for chosen in actions:
            out = self.step(obs, chosen)
            obs = out["next_obs"]
        return out


def load_kit(checkout: Path) -> tuple[Callable, str]:
    """(obs, actions, hidden, device) -> OfflineRL-Kit's EnsembleDynamics; and the code's commit.

    Raises:
        ImportError: there is no checkout.
    """
    if not (checkout / "offlinerlkit").is_dir():
        raise ImportError(f"--offlinerl-kit {checkout}: no checkout; --help says how to get one.")
    try:
        import gym.envs.mujoco  # noqa: F401
    except ImportError:  # its package imports it, for what is not used here
        sys.modules |= {name: MagicMock() for name in ("gym", "gym.envs", "gym.envs.mujoco")}
    sys.path.insert(0, str(checkout))
    from offlinerlkit.dynamics import EnsembleDynamics
    from offlinerlkit.modules import EnsembleDynamicsModel
    from offlinerlkit.utils.scaler import StandardScaler

    def never_over(obs: np.ndarray, *_) -> np.ndarray:
        return np.zeros((len(obs), 1), bool)

    def make(obs: int, actions: int, hidden: int, device: torch.device):
        decays = [0.0] * 5  # of each layer's weights, for training
        model = EnsembleDynamicsModel(
            obs, actions, [hidden] * 4, weight_decays=decays, device=device
        )
        scaler = StandardScaler(*np.float32([[[0]], [[1]]]))
        return EnsembleDynamics(model, None, scaler, never_over, penalty_coef=1.0)

    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return make, done.stdout.strip() or "of unknown commit"


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
        out: the file to write; what it holds of other machines, devices and threads stays in it.
    """
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
    before = read(out) if out.exists() else []
    kept = [row for row in before if (row.machine, row.device, row.threads) != here]
    write(out, kept + rows)
    print(markdown(rows))
    return rows


def table(path: Path = RESULTS) -> None:
    """Print what was measured as tables in Markdown."""
    rows = read(path)
    for where in dict.fromkeys((row.machine, row.device, row.threads) for row in rows):
        print(markdown([r for r in rows if (r.machine, r.device, r.threads) == where]))


def machine(device: str) -> str:
    """Model and number of the processors, and the GPU's name if it is used."""
    model, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        model = found.group(1)
    gpu = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    return f"{model}, {os.cpu_count()} cores{gpu}"


def write(path: Path, rows: list[Row]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(Row))
    for row in rows:
        cells = dataclasses.astuple(row)
        writer.writerow(f"{x:.5g}" if isinstance(x, float) else x for x in cells)
    datasets.write_atomic(path, text.getvalue().encode())


def read(path: Path) -> list[Row]:
    kinds = {f.name: (get_args(f.type) or (f.type,))[0] for f in dataclasses.fields(Row)}
    with path.open(newline="") as file:
        return [
            Row(**{name: kinds[name](cell) for name, cell in line.items() if cell})
            for line in csv.DictReader(file)
        ]


def markdown(rows: list[Row]) -> str:
    """The main lines of one machine's measurements: limits, rivals, training, growth."""
    one = rows[0]
    limits = " ".join(
        f"{row.what[0].upper()}{row.what[1:]}, {row.implementation}: {1e3 * row.seconds:.2f} ms"
        + (f", {row.gflops:,.0f} GFLOP/s." if row.gflops else f", {millions(row)} parameters.")
        for row in rows if row.what in LIMITS
    )  # fmt: skip
    about = f"{one.machine}; {one.device}, {one.threads} threads; {one.versions}; {one.commit}."
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
    tables.append(grid(
        ["seeds at once", "mode", *(f"{what}, per second" for what in TRAINING), "memory, MB"],
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


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict({"speed": speed, "table": table}, description=__doc__)
    except (ValueError, OSError, ImportError) as e:
        sys.exit(f"benchmark.py: {e}")
