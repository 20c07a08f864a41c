"""LOGO: offline multi-agent reinforcement learning with a local-to-global world model.

  python train.py --env-id 3s_vs_5z --horizon 15            LOGO on recorded battles, to a score
  python train.py --env-id 3s_vs_5z --synthetic-fraction 0  MACQL, the same without the model
  python train.py --env-id 3s_vs_5z --synthetic-fraction 0 --critic none    behaviour cloning
  python train.py --help                                    every hyperparameter

The story, Algorithm 1 of the paper: clone the data's policy (a baseline, and the first guess),
train the world model (Phase 1), then imagine battles (Phase 2) and improve the policy on half
real, half imagined data (Phase 3) in turn. The run's folder receives metrics.csv, TensorBoard
events, a checkpoint, run.png and final.json.
"""

import copy
import dataclasses
import json
import math
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

import collect
import datasets
import envs
import report
from buffer import SyntheticBuffer, mix
from logo_wm import LogoWM
from macql import Actor, Critic, critic_loss, policy_loss, soft_update


@dataclass
class Args:
    """Every flag: its meaning, its symbol and unit where it has one, and [where the value is from]."""

    # Task and data
    env_id: str = "3s_vs_5z"
    """task: a SMAC map by its name [Sec. 5]"""
    quality: collect.Quality = "medium"
    """who played the recorded data [Sec. 5]"""
    dataset: Path | None = None
    """file of recorded episodes, instead of recording them at first use [ours]"""
    episodes: int = 600
    """episodes to record where no dataset is given [ours]"""
    holdout: float = 0.05
    """share of the episodes kept from training, to test the world model on [OfflineRL-Kit]"""
    backend: Literal["auto", "smax"] = "auto"
    """simulator that evaluates; auto takes the best one present [ours]"""
    seed: int = 1
    """of networks, batches and rollouts [ours]"""
    data_seed: int = 0
    """of the recording and of the held-out split, shared by the runs that are compared [ours]"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto takes a GPU if there is one [ours]"""
    threads: int = 0
    """processor threads for torch, 0 = as many as there are cores [ours]"""

    # World model, Phase 1
    wm_updates: int = 3_000
    """gradient steps on the world model [ours: the paper gives no number]"""
    wm_batch_size: int = 256
    """B, rows a step [ours]"""
    wm_lr: float = 1e-3
    """Adam's step size [Table 8]"""
    wm_weight_decay: float = 0.0
    """decoupled weight decay, times the step size; 0 = none [ours]"""
    wm_hidden: int = 256
    """width of the world model's layers [Table 8]"""
    deduce_from: Literal["obs", "obs+state", "obs+state+actions"] = "obs+state+actions"
    """D1: what R_d sees beside o_hat; the paper's letter: obs [Fig. 2]"""
    eq4_input: Literal["obs", "next_obs"] = "obs"
    """D2: observation that E_p sees in Eq. (4); the paper's letter: next_obs [Eq. 4]"""
    heads: bool = True
    """D3: learn which actions may be taken and when an episode is over; the paper's letter: no [ours]"""
    clamp: bool = True
    """D4: keep imagined o, s, r inside the data's range; the paper's letter: no [ours]"""
    learn_variance: bool = False
    """Gaussians with learned variance in Eq. (2), (3), (6), else variance 1 [Eq. 2 leaves it open]"""

    # Imagination, Phase 2
    horizon: int = 15
    """H, steps of an imagined rollout [Sec. 5.1]"""
    rollouts: int = 1_000
    """M, rollouts a collection, from real rows drawn uniformly [ours]"""
    collect_every: int = 500
    """policy updates between two collections [ours]"""
    retain: int = 5
    """D10: collections that D_m keeps; the paper's letter: all of them, 0 [MOPO]"""
    uncertainty: Literal["weight", "penalty", "none"] = "weight"
    """use of u: sampling weight of Eq. (7), reward penalty of Eq. (1), or none [Sec. 4.3]"""
    cap: float = 10.0
    """C: bound of the confidence; exp(-C) is the least relative weight [Sec. 4.3 gives no value]"""
    penalty: float = 1.0
    """lambda of Eq. (1): reward lost per unit of u, with --uncertainty penalty [Table 8: 1]"""

    # Policy, Phase 3
    updates: int = 10_000
    """gradient steps on policy and critic, and on the clone [ours; Table 8 says 10^7 rows]"""
    batch_size: int = 256
    """B, rows a step, real and imagined together [Table 8: 128]"""
    synthetic_fraction: float = 0.5
    """share of imagined rows; 0 leaves MACQL [Sec. 4.3: 0.5]"""
    mixing: Literal["half", "coin"] = "half"
    """D11: mix every batch, or toss a coin for each as Algorithm 1, line 25 prints [ours]"""
    lr: float = 1e-3
    """Adam's step size, of actor and critic [Table 8]"""
    lr_decay: bool = True
    """D12: decay all step sizes linearly to zero; the paper's letter: no [ours]"""
    average: float = 0.995
    """D13: decay per update of the averaged actor that is evaluated; the paper's letter: 0 [ours]"""
    hidden: int = 256
    """width of actor's and critic's layers [Table 8]"""
    shared_actor: bool = True
    """D14: one policy network for all agents; the paper's letter: one each [pymarl]"""
    critic: Literal["cql", "none"] = "cql"
    """none leaves behaviour cloning [ours]"""
    critics: int = 2
    """D7: K, the Bellman target takes the least; the paper's letter: 1 [TD3]"""
    gamma: float = 0.99
    """discount per step [pymarl]"""
    tau: float = 0.005
    """share by which the target critic follows per update [TD3]"""
    cql_alpha: float = 1.0
    """alpha: weight of the conservative term in Eq. (10) [ours: the paper gives no value]"""
    conservative: Literal["logsumexp", "expectation"] = "logsumexp"
    """D5: values pushed down: log-sum-exp of all actions, or the policy's as in Eq. (10) [CQL]"""
    conservative_on: Literal["real", "both"] = "real"
    """D5: rows on which values are pushed down; the paper's letter: both [Eq. 10]"""
    backup: Literal["policy", "max"] = "policy"
    """D6: next action in the Bellman target; the paper's letter: max [Eq. 11]"""
    bellman_on: Literal["both", "real"] = "both"
    """D8: rows of the Bellman error; Eq. (10) prints real, Algorithm 1 both [Alg. 1]"""
    bc_lambda: float = 1.0
    """lambda: weight of behaviour cloning in Eq. (12) [Table 8]"""
    bc_on: Literal["real", "both"] = "real"
    """D9: rows that are cloned; the paper's letter: both [Eq. 12]"""
    normalise_q: bool = False
    """divide the value in Eq. (12) by its mean magnitude [TD3+BC]"""

    # Evaluation and bookkeeping
    eval_every: int = 1_000
    """policy updates between two evaluations [ours]"""
    eval_episodes: int = 512
    """episodes an evaluation, played side by side [ours]"""
    final_evals: int = 5
    """the last so many evaluations make the final score: single ones swing [ours]"""
    log_every: int = 100
    """updates between two rows of metrics [ours]"""
    checkpoint_every: int = 1_000
    """updates between two checkpoints, in every phase [ours]"""
    out: Path | None = None
    """folder of the run [default: runs/ENV-QUALITY-BACKEND-METHOD-seedSEED]"""
    resume: bool = False
    """go on from the checkpoint in the run's folder [ours]"""
    track: bool = False
    """log to Weights & Biases, too [ours]"""


METHODS = {"cql": "macql", "none": "bc"}


def method(args: Args) -> str:
    return "logo" if args.synthetic_fraction > 0 else METHODS[args.critic]


def check(args: Args) -> None:
    """Refuse what cannot work, before any work is done.

    Raises:
        ValueError: one sentence: which flag, what is wrong, what would do.
    """
    for name in ("synthetic_fraction", "holdout", "gamma", "tau", "average"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: give 0 to 1.")
    positive = "horizon rollouts collect_every updates wm_updates batch_size wm_batch_size episodes"
    positive += " hidden wm_hidden critics eval_every eval_episodes final_evals log_every checkpoint_every"
    for name in positive.split():
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: give 1 or more.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; give --device cpu or auto.")
    if args.critic == "none" and args.synthetic_fraction > 0:
        raise ValueError("--critic none clones real data: it needs --synthetic-fraction 0.")
    if args.checkpoint_every % args.log_every:
        raise ValueError("--checkpoint-every must be a multiple of --log-every.")


# --------------------------------------------------------------------------------------------------
# Bookkeeping
# --------------------------------------------------------------------------------------------------


class Log:
    """metrics.csv (phase, update, metric, value) and TensorBoard; a host sync at every `write` only.

    Resuming drops the rows that were written after the checkpoint.
    """

    def __init__(self, folder: Path, progress: dict[str, int], track: bool, args: Args):
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.wandb = folder / "metrics.csv", None
        kept = ["phase,update,metric,value\n"]
        if self.path.exists():
            rows = self.path.read_text().splitlines(keepends=True)[1:]
            kept += [r for r in rows if int(r.split(",")[1]) <= progress[r.split(",")[0]]]
        datasets.write_atomic(self.path, "".join(kept).encode())
        self.tensorboard = SummaryWriter(folder, purge_step=max(progress.values()) + 1)
        if track:
            try:
                import wandb
            except ImportError as e:
                raise ImportError("--track needs wandb: pip install wandb") from e
            self.wandb = wandb
            wandb.init(project="logo", name=folder.name, config=plain(args))

    def write(self, phase: str, update: int, metrics: dict[str, float]) -> None:
        with self.path.open("a") as f:
            f.writelines(f"{phase},{update},{k},{v:.6g}\n" for k, v in metrics.items())
        for k, v in metrics.items():
            self.tensorboard.add_scalar(f"{phase}/{k}", v, update)
        if self.wandb:
            self.wandb.log({f"{phase}/{k}": v for k, v in metrics.items()})


class FirstBad:
    """Remembers, on the device, the first update at which each term was not finite."""

    def __init__(self, device: torch.device):
        self.device, self.first = device, None

    def watch(self, update: int, metrics: dict[str, torch.Tensor]) -> None:
        bad = ~torch.stack(list(metrics.values())).isfinite()
        if self.first is None:
            self.first = torch.full(bad.shape, -1, device=self.device)
        self.first = torch.where(bad & (self.first < 0), update, self.first)

    def check(self, phase: str, names: list[str]) -> None:
        """Raises FloatingPointError naming the phase, the update and the term."""
        for name, update in zip(names, self.first.tolist(), strict=True):
            if update >= 0:
                raise FloatingPointError(
                    f"{phase}, update {update}: the term {name} is not finite; lower the step size "
                    "or look at the data (nothing was saved after the last checkpoint)."
                )


def plain(args: Args) -> dict:
    """The flags as JSON knows them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(args).items()}


def commit() -> str:
    """The checkout's commit, with -dirty where files differ from it; "unknown" outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        here = Path(__file__).parent
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """All that a run holds; `progress` counts the updates done in each phase."""

    args: Args
    folder: Path
    device: torch.device
    env: envs.SmaxEnv
    data: object
    facts: dict
    rng: torch.Generator
    world_model: LogoWM
    actor: Actor
    clone: Actor
    averaged: Actor  # slow average of the actor's weights: what is evaluated
    critic: Critic
    critic_target: Critic
    optimizers: dict[str, torch.optim.Optimizer]
    model_data: SyntheticBuffer | None = None
    recipes: deque = field(default_factory=deque)
    progress: dict = field(default_factory=lambda: {"clone": 0, "wm": 0, "policy": 0})
    evaluations: list = field(default_factory=list)
    seconds: dict = field(default_factory=lambda: {"clone": 0.0, "wm": 0.0, "policy": 0.0,
                                                   "imagine": 0.0, "eval": 0.0})  # fmt: skip
    imagined_rows: int = 0


def build(args: Args, folder: Path) -> Run:
    """Load the data, make the networks; seeds are set here and nowhere else."""
    device = torch.device(
        args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    if args.threads:
        torch.set_num_threads(args.threads)
    env = envs.make(args.env_id, args.eval_episodes, args.backend)
    root = Path(__file__).parent / "data"
    path = args.dataset or collect.load_or_record(
        args.env_id, args.quality, args.episodes, args.data_seed, root
    )
    data, facts = datasets.load_dataset(path, args.holdout, args.data_seed, device)
    spec, found = env.spec, (*data.obs.shape[1:], data.state.shape[1], data.actions.shape[-1])
    needed = (spec.num_agents, spec.obs_dim, spec.state_dim, spec.action_dim)
    if found != needed:
        raise ValueError(
            f"{path}: agents, observation, state, actions are {found}, but {args.env_id} on "
            f"{spec.backend} has {needed}; give the --env-id and --backend it was recorded on."
        )
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    rng = torch.Generator(device).manual_seed(args.seed)
    s, a, h = data.statistics(), spec.action_dim, args.hidden
    world_model = LogoWM(
        *needed, args.wm_hidden, spec.discrete, s, args.deduce_from, args.learn_variance
    ).to(device)
    obs = (s["obs_mean"], s["obs_std"])
    if args.shared_actor:  # one network must see every agent's observation on one scale
        obs = tuple(x.mean(0, keepdim=True).expand_as(x) for x in obs)
    actor = Actor(*obs, a, h, spec.discrete, args.shared_actor).to(device)
    critic = Critic(*obs, s["state_mean"], s["state_std"], a, h, spec.discrete, args.critics)
    clone, critic = copy.deepcopy(actor), critic.to(device)

    def adam(net: torch.nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay, fused=True)

    optimizers = {
        "wm": adam(world_model, args.wm_lr, args.wm_weight_decay),
        "clone": adam(clone, args.lr),
        "actor": adam(actor, args.lr),
        "critic": adam(critic, args.lr),
    }
    return Run(
        args, folder, device, env, data, facts, rng, world_model, actor, clone,
        copy.deepcopy(actor), critic, copy.deepcopy(critic), optimizers,
    )  # fmt: skip


def set_lr(optimizer: torch.optim.Optimizer, lr: float, done: int, total: int, decay: bool) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * (1 - done / total) if decay else lr


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One gradient step on the optimizer's own parameters, and on nobody else's."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)
    optimizer.step()


def phase(run: Run, log: Log, name: str, title: str, total: int, update) -> None:
    """Call `update(k)` until `total` are done: progress bar, metrics, watch for NaN, checkpoints."""
    args, bad, names = run.args, FirstBad(run.device), None
    start, done = time.time(), run.progress[name]
    before, elsewhere = run.seconds[name], run.seconds["imagine"] + run.seconds["eval"]
    bar = tqdm(range(done, total), initial=done, total=total, desc=title, unit="update")
    for k in bar:
        metrics = update(k)
        names = list(metrics)
        bad.watch(k + 1, metrics)
        run.progress[name] = k + 1
        if (k + 1) % args.log_every == 0 or k + 1 == total:
            bad.check(title, names)
            values = torch.stack(list(metrics.values())).tolist()  # the interval's one host sync
            log.write(name, k + 1, dict(zip(names, values, strict=True)))
            pause = run.seconds["imagine"] + run.seconds["eval"] - elsewhere
            run.seconds[name] = before + time.time() - start - pause
        if name == "policy" and ((k + 1) % args.eval_every == 0 or k + 1 == total):
            score = evaluate(run, run.averaged, seed=10**6 * (args.seed + 1) + k)
            run.evaluations.append({"update": k + 1, **score})
            log.write("eval", k + 1, score)
            bar.set_postfix({"return": f"{score['return_mean']:.2f}"})
        if (k + 1) % args.checkpoint_every == 0 or k + 1 == total:
            save_checkpoint(run)


def evaluate(run: Run, actor: Actor, seed: int, episodes: int | None = None) -> dict:
    started = time.time()

    def act(obs, avail):
        avail = None if avail is None else avail.to(run.device)
        return actor.greedy(obs.to(run.device), avail).cpu()

    score = envs.evaluate(run.env, act, episodes or run.args.eval_episodes, seed)
    run.seconds["eval"] += time.time() - started
    return score


def phase_0_clone(run: Run, log: Log) -> None:
    """Behaviour cloning, as many updates as the policy will get: the baseline to beat."""
    args = run.args

    def update(k: int) -> dict[str, torch.Tensor]:
        set_lr(run.optimizers["clone"], args.lr, k, args.updates, args.lr_decay)
        batch, is_real = mix(run.data.sample(args.batch_size, run.rng), None)
        loss, metrics = policy_loss(run.clone, None, batch, is_real, bc_lambda=1.0)
        descend(run.optimizers["clone"], loss)
        return {"bc": metrics["bc"]}

    phase(run, log, "clone", "Phase 0: clone the data", args.updates, update)


def phase_1_world_model(run: Run, log: Log) -> None:
    """Algorithm 1, lines 1-5."""
    args = run.args

    def update(k: int) -> dict[str, torch.Tensor]:
        set_lr(run.optimizers["wm"], args.wm_lr, k, args.wm_updates, args.lr_decay)
        batch = run.data.sample(args.wm_batch_size, run.rng)
        loss, metrics = run.world_model.loss(batch, args.eq4_input)
        descend(run.optimizers["wm"], loss)
        return metrics

    phase(run, log, "wm", "Phase 1: world model", args.wm_updates, update)


def imagine(run: Run, actor: Actor) -> None:
    """Phase 2, Algorithm 1, lines 8-22: one collection into D_m."""
    args, started = run.args, time.time()
    start = run.data.sample(args.rollouts, run.rng)
    rollout = run.world_model.imagine(
        lambda obs, avail: actor.explore(obs, avail, run.rng),
        start.obs, start.state, start.avail, args.horizon, run.rng, args.heads, args.clamp,
    )  # fmt: skip
    if args.uncertainty == "penalty":
        rollout["reward"] = rollout["reward"] - args.penalty * rollout["u"]  # Eq. (1)
    run.model_data.add(rollout, args.cap, weighted=args.uncertainty == "weight")
    run.seconds["imagine"] += time.time() - started
    run.imagined_rows += args.horizon * args.rollouts


def phases_2_and_3_policy(run: Run, log: Log) -> None:
    """Algorithm 1, lines 6-32: imagine, and improve the policy on real and imagined rows."""
    args = run.args
    synthetic = round(args.synthetic_fraction * args.batch_size)  # imagined rows of a batch

    def draw() -> tuple:
        if args.mixing == "coin":  # Algorithm 1, line 25: a batch is all real or all imagined
            fake = torch.rand((), generator=run.rng, device=run.device) < args.synthetic_fraction
            source = run.model_data if fake else run.data
            batch = source.sample(args.batch_size, run.rng)
            return batch, torch.full_like(batch.reward, float(not fake))
        real = run.data.sample(args.batch_size - synthetic, run.rng)
        return mix(real, run.model_data.sample(synthetic, run.rng) if synthetic else None)

    def update(k: int) -> dict[str, torch.Tensor]:
        if synthetic and k % args.collect_every == 0:  # Phase 2
            recipe = {"rng": run.rng.get_state(), "actor": copy.deepcopy(run.actor.state_dict())}
            run.recipes.append(recipe)
            imagine(run, run.actor)
        metrics = {}  # Phase 3
        batch, is_real = draw()
        if args.critic == "cql":
            set_lr(run.optimizers["critic"], args.lr, k, args.updates, args.lr_decay)
            loss, parts = critic_loss(
                run.critic, run.critic_target, run.actor, batch, is_real, args.gamma,
                args.cql_alpha, run.rng, args.conservative, args.conservative_on, args.backup,
                args.bellman_on,
            )  # fmt: skip
            descend(run.optimizers["critic"], loss)
            soft_update(run.critic_target, run.critic, args.tau)
            metrics |= {f"q_{name}": value for name, value in parts.items()}
        set_lr(run.optimizers["actor"], args.lr, k, args.updates, args.lr_decay)
        critic = run.critic if args.critic == "cql" else None
        loss, parts = policy_loss(
            run.actor, critic, batch, is_real, args.bc_lambda, args.normalise_q, args.bc_on
        )
        descend(run.optimizers["actor"], loss)
        soft_update(run.averaged, run.actor, 1 - args.average)
        metrics |= {f"pi_{name}": value for name, value in parts.items()}
        if synthetic:
            metrics["ess"] = run.model_data.ess
        return metrics

    title = "Phases 2, 3: imagine, improve" if synthetic else "Phase 3: improve the policy"
    phase(run, log, "policy", title, args.updates, update)


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------

MODULES = ("world_model", "actor", "clone", "averaged", "critic", "critic_target")
COUNTERS = ("progress", "evaluations", "seconds", "imagined_rows")
FREE = ("resume", "out", "track", "threads", "device")  # flags that may differ on resuming


def make_model_data(run: Run) -> None:
    args, retain = run.args, run.args.retain or math.ceil(run.args.updates / run.args.collect_every)
    n, o, s, a = run.world_model.sizes
    run.recipes = deque(run.recipes, maxlen=retain)
    run.model_data = SyntheticBuffer(retain, args.horizon, args.rollouts, n, o, s, a, run.device)


def save_checkpoint(run: Run) -> None:
    """Everything needed to go on as if nothing had happened, but D_m's rows.

    D_m can be gigabytes, yet each collection follows from the policy that played it and the state
    of the random numbers: these recipes are kept, and `load_checkpoint` imagines them again.
    """
    import io

    state = {name: getattr(run, name).state_dict() for name in MODULES}
    state |= {name: getattr(run, name) for name in COUNTERS}
    state["optimizers"] = {k: v.state_dict() for k, v in run.optimizers.items()}
    state |= {"args": plain(run.args), "rng": run.rng.get_state(), "recipes": list(run.recipes)}
    memory = io.BytesIO()
    torch.save(state, memory)
    datasets.write_atomic(run.folder / "checkpoint.pt", memory.getvalue())


def load_checkpoint(run: Run) -> None:
    """Take up the run's checkpoint.

    Raises:
        ValueError: none there, or one of a run with other flags.
    """
    path = run.folder / "checkpoint.pt"
    if not path.exists():
        raise ValueError(f"--resume: no checkpoint in {run.folder}; start without --resume.")
    state = torch.load(path, map_location=run.device, weights_only=True)
    mine = plain(run.args)
    differ = [k for k in mine if k not in FREE and mine[k] != state["args"].get(k)]
    if differ:
        told = ", ".join(f"--{k.replace('_', '-')} {state['args'].get(k)}" for k in differ)
        raise ValueError(f"--resume: {path} is of a run with {told}; give the same, or another --out.")
    for name in MODULES:
        getattr(run, name).load_state_dict(state[name])
    for name, optimizer in run.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    for name in COUNTERS:
        setattr(run, name, state[name])
    spent, rows, player = run.seconds["imagine"], run.imagined_rows, copy.deepcopy(run.actor)
    for recipe in state["recipes"]:
        run.recipes.append(recipe)
        run.rng.set_state(recipe["rng"].cpu())
        player.load_state_dict(recipe["actor"])
        imagine(run, player)
    run.seconds["imagine"], run.imagined_rows = spent, rows
    run.rng.set_state(state["rng"].cpu())


# --------------------------------------------------------------------------------------------------


def main(args: Args) -> dict:
    """Train, evaluate, write final.json; returns its content."""
    check(args)
    started = time.time()
    backend = "smax" if args.backend == "auto" else args.backend
    source = args.dataset.stem if args.dataset else args.quality
    name = f"{args.env_id}-{source}-{backend}-{method(args)}-seed{args.seed}"
    folder = args.out or Path("runs") / name
    if not args.resume and (folder / "metrics.csv").exists():
        print(f"replacing the run in {folder} (--resume would go on with it)")
        for old in [*folder.glob("events.out.*"), *folder.glob("*.*")]:
            old.unlink(missing_ok=True)
    datasets.write_atomic(folder / "args.json", json.dumps(plain(args), indent=2).encode())
    run = build(args, folder)
    make_model_data(run)
    if args.resume:
        load_checkpoint(run)
    log = Log(folder, run.progress, args.track, args)
    facts = run.facts
    print(
        f"{method(args).upper()} on {args.env_id}, simulator {backend}, device {run.device}, seed "
        f"{args.seed}\ndata {facts['path']}: {facts['episodes']} episodes, {facts['transitions']:,} "
        f"transitions, return {facts['return_mean']:.2f} +- {facts['return_std']:.2f}\nrun {folder}"
    )
    phase_0_clone(run, log)
    if args.synthetic_fraction > 0:
        phase_1_world_model(run, log)
    phases_2_and_3_policy(run, log)
    final = report.finish(
        run, lambda *a: evaluate(run, *a), started, plain(args), commit(), backend
    )
    log.tensorboard.close()
    return final


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (ValueError, OSError, ImportError, FloatingPointError) as e:
        sys.exit(f"train.py: {e}")
