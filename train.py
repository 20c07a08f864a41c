"""LOGO: offline multi-agent reinforcement learning with a local-to-global world model.

  python train.py --env-id 3s_vs_5z --horizon 15            LOGO on recorded episodes, to a score
  python train.py --env-id 3s_vs_5z --synthetic-fraction 0  MACQL: the same without the world model
  python train.py --env-id HalfCheetah-6x1                  continuous actions
  python train.py --env-id 3s_vs_5z --paper                 the paper read literally
  python train.py --help                                    every hyperparameter and its source

`main` is Algorithm 1 of the paper: clone the data's policy (the baseline to beat), train the world
model (Phase 1), then in turn imagine rollouts (Phase 2) and improve the policy on real and imagined
transitions (Phase 3). The equations are in logo_wm.py, macql.py and buffer.py.
"""

import argparse
import copy
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # Ctrl-C during the seconds of the imports ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import tyro

import envs
from behaviour import Quality, default_episodes
from buffer import OfflineDataset, SyntheticBuffer, mix, shuffle_uncertainty
from datasets import load_dataset, one_sentence, task_of
from envs import evaluate
from experiment import report, setup
from experiment.stopping import saying_how_to_go_on
from experiment.tracking import Run
from logo_wm import LogoWM
from macql import MACQL, Actor, Critic, descend, linear_decay, policy_loss


@dataclasses.dataclass
class Args:
    """Every flag: meaning, symbol and unit where it has one, and [where the value is from]."""

    # Task and data
    env_id: str = "3s_vs_5z"
    """task: a SMAC map by its name, or a robot and its division, as HalfCheetah-6x1 [Sec. 5]"""
    quality: Quality = "medium"
    """quality of the data that are recorded; a --dataset has its own [Sec. 5]"""
    dataset: Path | None = None
    """file of recorded episodes, instead of recording them at first use [ours]"""
    episodes: int = 600
    """episodes to record where there is no --dataset [ours]"""
    backend: Literal["auto", "smax", "smac", "smacv2", "mamujoco"] = "auto"
    """simulator that evaluates; auto takes the one that the data are from, if present [ours]"""
    seed: int = 1
    """of networks, batches and rollouts [ours]"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto takes a GPU if there is one [ours]"""
    threads: int = 0
    """processor threads for torch, 0 = as many as there are cores [ours]"""
    compile: bool = False
    """compile losses and model steps with torch.compile; does not pay on a CPU [LeanRL]"""
    paper: bool = False
    """start from the paper's literal reading: sets the flags marked "paper:" below, and takes D12
    and D13 back, which have no flag of their own [Sec. 4]"""

    # World model, Phase 1
    wm_updates: int = 2_000
    """gradient steps on the world model [ours: the paper gives no number]"""
    wm_batch_size: int = 256
    """B, rows per step [ours]"""
    wm_lr: float = 3e-3
    """D15: step size of the world model's Adam; paper: 1e-3 [ours; Table 8 is of the policies]"""
    wm_weight_decay: float = 0.1
    """D15: decoupled weight decay of the world model; paper: 0 [ours]"""
    deduce_from: Literal["obs", "obs+state", "obs+state+actions"] = "obs+state+actions"
    """D1: what R_d sees beside o_hat; paper: obs [Fig. 2]"""
    heads: bool = True
    """D3: learned heads for available actions and the episode's end; paper: no [ours]"""
    clamp: bool = True
    """D4: keep imagined o, s, r inside the range of the data, and the values in Bellman targets
    inside that of its returns; paper: no [ours]"""
    zeros: bool = True
    """D11: entries that are exactly 0 at times have a probability of it; paper: no [ours]"""
    observe: Literal["deduced", "predicted"] = "deduced"
    """D22: what agents see in a rollout: E_d's o' of the deduced state, or o_hat; paper: predicted
    [ours]"""

    # Imagination, Phase 2
    horizon: int = 15
    """D29: H, steps of an imagined rollout (robots: 5); paper: 15 [Sec. 5.1]"""
    epsilon: float = 0.6
    """D16: agents that act at random in a step of a rollout, on average (continuous: noise on every
    one); paper: 0 [ours]"""
    rollout_batch_size: int = 1_000
    """M, rollouts per collection, from real states drawn uniformly [ours]"""
    rollout_interval: int = 500
    """policy updates between two collections [ours]"""
    uncertainty: Literal["weight", "penalty", "shuffled", "none"] = "weight"
    """use of u: sampling weight of Eq. (7), reward penalty of Eq. (1) (give --u-scale), the weight
    by another rollout's u (a placebo), or none [Sec. 4.3]"""
    cap: float = 10.0
    """C: bound of P_u; exp(-C) is the smallest relative weight [Sec. 4.3 gives no value]"""
    u_scale: float = 0.25
    """D20: unit of u in P_u, in medians of u on recorded states; paper: 0, u itself. In Eq. (1) it
    is 1 / lambda [ours]"""

    # Policy, Phase 3
    updates: int | None = None
    """gradient steps on the critic, and on the clone; the policy waits at first (D26); None: 12
    passes over D, but 1,000 to 4,000 [ours; Table 8: 10^7 steps, read as rows]"""
    batch_size: int = 128
    """B, rows per step [Table 8]"""
    synthetic_fraction: float = 0.5
    """D27: imagined rows per step, as a share of B; 0 leaves MACQL, "added" takes more than 1, too;
    paper: 0.5 [Sec. 4.3: half of the rows, which is 0.5 with "instead" and 1 with "added"]"""
    imagined_rows: Literal["added", "added+policy", "instead", "printed"] = "added"
    """D8, D27: added to real rows, or instead of some, in the Bellman error (+policy: and Eq. 12's
    value); printed: instead, in the terms that print them; paper: printed [Eq. 10, 12]"""
    lr: float = 1e-3
    """Adam's step size of policies, critic and clone [Table 8]"""
    hidden: int = 256
    """width of the hidden layers; half of it in the world model's heads [Table 8]"""
    shared_actor: bool = True
    """D14: one policy network for all agents; paper: no, one each [pymarl]"""
    critic: Literal["cql", "scaled", "none"] = "cql"
    """D21: scaled predicts, and weighs in Eq. (12), values in units of the data's returns and
    actions in units of the data's; none leaves behaviour cloning; paper: cql [ours]"""
    critics: int = 2
    """D7: K, the Bellman target takes the minimum; paper: 1 [TD3]"""
    recorded_critic: bool = True
    """D30: the last of two critics or more learns from recorded rows alone; paper: no [ours]"""
    gamma: float = 0.99
    """discount per step [ours: the paper gives no value]"""
    tau: float = 0.05
    """D19: share by which the target critic follows per update; paper: 1 [ours]"""
    cql_alpha: float = 0.1
    """alpha: weight of the conservative term in Eq. (10) [ours: the paper gives no value]"""
    conservative: Literal["logsumexp", "expectation"] = "logsumexp"
    """D5: values pushed down: log-sum-exp of all actions; paper: expectation [CQL]"""
    backup: Literal["policy", "max"] = "policy"
    """D6: next action in the Bellman target; paper: max [Eq. 11]"""
    warm_start: bool = True
    """D18: start the policy from the clone; paper: no [ours]"""
    n_step: int = 5
    """D28: steps whose rewards are in a row's Bellman target, recorded or imagined; paper: 1
    [Rainbow]"""
    critic_first: float = 0.25
    """D26: share of the updates in which the critic learns alone, from real rows: the policy
    waits and nothing is imagined; paper: 0 [ours]"""
    bc_lambda: float = 0.1
    """D17: lambda, weight of behaviour cloning in Eq. (12); paper: 1 [ours]"""

    # Evaluation and bookkeeping
    eval_every: int | None = None
    """policy updates between two of the last five evaluations, which make the final score; those
    before are twice as far apart; None: a sixteenth of --updates [ours]"""
    eval_episodes: int = 512
    """episodes per evaluation, played side by side [ours]"""
    out: Path | None = None
    """folder of the run [default: runs/ENV-QUALITY-BACKEND-METHOD-seedSEED]"""
    resume: bool = False
    """go on from the checkpoint in the run's folder [ours]"""
    track: bool = False
    """log to Weights & Biases, too [ours]"""


# Defaults for robots; docs/deviations.md says how they were chosen
CONTINUOUS = {"wm_updates": 10_000, "horizon": 5, "epsilon": 0.2, "rollout_batch_size": 3_000,
              "rollout_interval": 250, "u_scale": 2.5, "updates": 10_000,
              "synthetic_fraction": 2.0, "imagined_rows": "added+policy", "critic": "scaled",
              "recorded_critic": False, "conservative": "expectation", "n_step": 1,
              "bc_lambda": 0.08, "eval_every": 500, "eval_episodes": 20}  # fmt: skip
# Defaults with --paper: the literal reading of the paper
PAPER = {"wm_lr": 1e-3, "wm_weight_decay": 0.0, "deduce_from": "obs", "heads": False,
         "clamp": False, "zeros": False, "observe": "predicted", "horizon": 15,
         "synthetic_fraction": 0.5, "imagined_rows": "printed", "epsilon": 0.0, "u_scale": 0.0,
         "n_step": 1, "shared_actor": False, "critic": "cql", "critics": 1,
         "recorded_critic": False, "tau": 1.0, "conservative": "expectation", "backup": "max",
         "warm_start": False, "critic_first": 0.0, "bc_lambda": 1.0}  # fmt: skip


def defaults(env_id: str, paper: bool = False, kind: type[Args] = Args) -> Args:
    """The flags' defaults for a task: other ones for robots and with --paper."""
    args = kind(env_id=env_id, paper=paper, episodes=default_episodes(env_id))
    robot = {}
    if envs.is_robot(env_id):  # what another method sets itself stays, but for its ON_ROBOTS
        robot = {k: v for k, v in CONTINUOUS.items() if getattr(kind, k) == getattr(Args, k)}
        robot |= getattr(kind, "ON_ROBOTS", {})
    return dataclasses.replace(args, **(robot | (PAPER if paper else {})))


# --------------------------------------------------------------------------------------------------
# Algorithm 1
# --------------------------------------------------------------------------------------------------


def make_world_model(args: Args, spec: envs.Spec, data: OfflineDataset) -> LogoWM:
    """The local predictive model M_p and the deductive model M_d, with E_ps."""
    return LogoWM(
        spec.num_agents, spec.obs_dim, spec.state_dim, spec.action_dim, args.hidden, spec.discrete,
        data.statistics(), args.deduce_from, heads=args.heads, clamp=args.clamp, zeros=args.zeros,
        observe=args.observe,
    ).to(data.obs.device)  # fmt: skip


def decay_updates(args: Args, updates: int) -> int:
    """Updates in which a step size falls to zero, as `linear_decay` takes them."""
    return 0 if args.paper else updates  # Deviation D12


def exploration(args: Args, spec: envs.Spec) -> float:
    """Each agent's chance of a random action, or the noise's standard deviation."""
    return min(1.0, args.epsilon / spec.num_agents) if spec.discrete else args.epsilon


def make_learner(args: Args, spec: envs.Spec, data: OfflineDataset) -> MACQL:
    """The policies pi_i and the critic Q, with their optimisers."""
    x, sizes = data.statistics(), (spec.action_dim, args.hidden, spec.discrete)
    obs, state = (x["obs_mean"], x["obs_std"]), (x["state_mean"], x["state_std"])
    actor = Actor(*obs, *sizes, args.shared_actor).to(data.obs.device)  # Deviation D14
    critic, scale, bc_lambda = None, (), args.bc_lambda
    if args.critic == "scaled":  # Deviation D21
        scale = data.value_scale(args.gamma)
        if not spec.discrete:
            bc_lambda /= data.action_variance()
    if args.critic != "none":
        critic = Critic(*obs, *state, *sizes, args.critics, *scale).to(data.obs.device)
    bounds = (-math.inf, math.inf)
    if args.clamp:  # Deviation D4
        bounds = data.value_range(args.gamma)
    imagined_in = {"printed": "printed", "added+policy": "value"}  # Deviation D8
    return MACQL(
        actor, critic, lr=args.lr, decay_updates=decay_updates(args, args.updates),
        tau=args.tau, ema_decay=0.0 if args.paper else 0.995,  # Deviation D13
        gamma=args.gamma, cql_alpha=args.cql_alpha, conservative=args.conservative,
        backup=args.backup, imagined_in=imagined_in.get(args.imagined_rows, "bellman"),
        bounds=bounds, bc_lambda=bc_lambda, policy_waits=setup.waiting(args),  # Deviation D26
        recorded_critic=args.recorded_critic,  # Deviation D30
    )  # fmt: skip


def compile_parts(device: torch.device, *parts) -> None:
    """Replace what each part names in `compilable` by compiled functions, on a GPU as CUDA graphs;
    all but `step`: a rollout gives its output back as input, which such a graph does not allow.
    """
    for part in parts:
        for name in part.compilable:
            graph = device.type == "cuda" and name != "step"
            mode = "reduce-overhead" if graph else "default"
            setattr(part, name, torch.compile(getattr(part, name), mode=mode))


def main(
    args: Args,
    learner: Callable = make_learner,
    world_model: Callable = make_world_model,
    simulator: Callable | None = None,
    method: str | None = None,
) -> dict:
    """Train, evaluate, report; returns the content of final.json.

    Args:
        args: the flags; `defaults` gives those of a task.
        learner: builds the learner from (args, spec, data): any object with .actor and .ema_actor,
            both a `macql.Actor`, .update(batch, is_real, generator) -> metrics (at least one, 0-d
            tensors), .state_dict() and .load_state_dict(), as `MACQL` has them. A .critic that is
            not None is called as critic(obs, state, actions) -> (K,B) for the report, and so is a
            .critic_target. It gets real rows alone in the first --critic-first of the updates.
        world_model: builds the world model from (args, spec, data): an nn.Module with
            .loss(batch) -> (scalar, metrics) and .imagine(policy, starts, horizon, generator) ->
            rollout with all entries of `LogoWM`'s; a .step, if there is one, returns what
            `LogoWM.step` does. For --compile both name in .compilable what to compile.
        simulator: builds what plays the evaluations from (args): an object with .spec, .num_envs,
            .reset and .step as `envs.SmaxEnv` has them; None: the one that --backend names.
        method: name of the method in the run's folder and report; None: logo, macql or bc, or
            "own" with another learner or world model.
    Raises:
        ValueError, OSError, ImportError: one sentence about a flag, a file or a missing package.
        FloatingPointError: training diverged.
    """
    started = time.time()
    setup.check_args(args)
    ours = learner is make_learner and world_model is make_world_model
    method = method or (setup.method(args) if ours else "own")
    device = setup.choose_device(args)
    path = setup.find_dataset(args)  # recorded now if there is none
    data, metadata = load_dataset(path, device, args.env_id)  # D, 5 % of it held out
    asked, args = args, setup.settle(args, data)  # numbers for what depends on the data
    setup.announce(args, device, metadata, method, CONTINUOUS if data.avail is None else {})
    env, spec = setup.choose_simulator(args, data, metadata, simulator)  # env None: offline
    setup.check_memory(args, spec, device)
    n_synthetic = setup.imagined_rows(args)  # 0: no world model
    n_real = setup.real_rows(args)  # beside imagined rows: Deviation D27

    # Networks and optimisers
    torch.manual_seed(args.seed)
    rng = torch.Generator(device).manual_seed(args.seed)  # of batches and rollouts
    learner = learner(args, spec, data)  # pi and Q
    bc_actor = copy.deepcopy(learner.actor)  # the cloned policy of the data
    bc_optimizer = torch.optim.Adam(bc_actor.parameters(), lr=args.lr, fused=True)
    bc_schedule = linear_decay(bc_optimizer, decay_updates(args, args.updates))
    state = {"rng": rng, "learner": learner, "bc_actor": bc_actor}  # what a checkpoint holds
    state |= {"bc_optimizer": bc_optimizer, "bc_schedule": bc_schedule}
    if n_synthetic:
        world_model = world_model(args, spec, data)  # M_p and M_d
        wm_optimizer = torch.optim.AdamW(
            world_model.parameters(), args.wm_lr, weight_decay=args.wm_weight_decay, fused=True
        )  # Deviation D15
        wm_schedule = linear_decay(wm_optimizer, decay_updates(args, args.wm_updates))
        model_data = SyntheticBuffer(  # D_m
            setup.collections(args), args.horizon, args.rollout_batch_size,
            *spec[2:6],  # N, O, S, A
            device, spec.discrete, args.cap, args.u_scale,
            weighted=args.uncertainty in ("weight", "shuffled"),
        )  # fmt: skip
        state |= {"world_model": world_model, "wm_optimizer": wm_optimizer}
        state |= {"wm_schedule": wm_schedule, "model_data": model_data}
    if args.compile:
        compile_parts(device, *((learner, world_model) if n_synthetic else (learner,)))

    run = Run(args, asked, spec, metadata, device, method, started)
    run.start(**state)  # afresh, or with --resume from the checkpoint

    # Phase 0, ours: behaviour cloning, with as many updates as the critic gets
    for _ in run.phase("clone", "Phase 0: clone the data", args.updates):
        batch = data.sample(args.batch_size, rng)
        is_real = torch.ones_like(batch.reward)
        loss, metrics = policy_loss(bc_actor, None, batch, is_real, bc_lambda=1.0)
        descend(bc_optimizer, loss)
        bc_schedule.step()
        run.log({"bc": metrics["bc"]})

    # Phase 1: Algorithm 1, lines 1-5
    for _ in run.phase("wm", "Phase 1: world model", args.wm_updates if n_synthetic else 0):
        loss, metrics = world_model.loss(data.sample(args.wm_batch_size, rng))
        descend(wm_optimizer, loss)
        wm_schedule.step()
        run.log(metrics)

    # Phases 2 and 3: Algorithm 1, lines 6-32
    if args.warm_start and run.progress["policy"] == 0:  # Deviation D18
        for actor in (learner.actor, learner.ema_actor):
            actor.load_state_dict(bc_actor.state_dict())
    explore = partial(learner.actor.sample, epsilon=exploration(args, spec))  # Deviation D16
    first = setup.waiting(args)  # Deviation D26
    for k in run.phase("policy", "Phases 2, 3: imagine, improve", args.updates):
        imagining = n_synthetic > 0 and k >= first
        if imagining and (k - first) % args.rollout_interval == 0:  # Phase 2, lines 8-22
            with run.timed("imagine"):
                starts = data.sample(args.rollout_batch_size, rng)
                rollout = world_model.imagine(explore, starts, args.horizon, rng)
                run.check_rollout(rollout, k + 1)  # stops where rollouts diverge
                if args.uncertainty == "shuffled":
                    rollout["uncertainty"] = shuffle_uncertainty(rollout, rng)
                if args.uncertainty == "penalty":
                    rollout["reward"] -= rollout["uncertainty"] / args.u_scale  # Eq. (1)
                model_data.add(rollout)  # with P_u, for the weights of Eq. (7) when sampling
                run.imagined_rows += args.horizon * args.rollout_batch_size
        # Phase 3, lines 23-29: real and imagined rows in one batch
        size = n_real if imagining else args.batch_size
        batch = data.sample(size, rng, args.n_step, args.gamma)  # Deviation D28
        is_real = torch.ones_like(batch.reward)
        if imagining:
            imagined = model_data.sample(n_synthetic, rng, args.n_step, args.gamma)
            batch, is_real = mix(batch, imagined)
        metrics = learner.update(batch, is_real, rng)  # lines 30, 31
        if n_synthetic:
            metrics["effective_share"] = model_data.effective_share
        run.log(metrics)
        if env and k + 1 >= first and report.due(args, k + 1):  # until first the policy waits
            with run.timed("eval"):  # other episodes every time
                seed = 10**6 * (args.seed + 1) + k
                score = evaluate(env, learner.ema_actor.greedy, args.eval_episodes, seed, device)
            run.evaluation(k + 1, score)
    run.close()
    final = report.finish(run, data, env, learner, bc_actor, world_model if n_synthetic else None)
    if env and simulator is None:
        env.close()
    return final


def parse(argv: list[str] | None = None, kind: type[Args] = Args, **about) -> Args:
    """The flags of a command line; without one, those of this process.

    --env-id and --paper are read first, because they choose the defaults of the others. Without
    --env-id the task of a --dataset is the one that the dataset names.

    Args:
        kind: Args, or a baseline's flags. about: `prog` and `description` of its --help.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env-id", "--env_id")
    first.add_argument("--dataset", type=Path)
    first.add_argument("--paper", action="store_true")
    known = first.parse_known_args(argv)[0]
    if known.env_id is None:
        known.env_id = task_of(known.dataset) if known.dataset else Args.env_id
    default = defaults(known.env_id, known.paper, kind)
    about = {"prog": "train.py", "description": __doc__} | about
    args = tyro.cli(kind, args=argv, default=default, **about)
    if args.uncertainty == "penalty" != default.uncertainty and args.u_scale == default.u_scale:
        raise ValueError(
            "--uncertainty penalty: give --u-scale, which is then 1 / lambda of Eq. (1), e.g. 10; "
            f"{args.u_scale:g} is for weights."
        )
    return args


def cli(argv: list[str] | None = None, **parts) -> dict:
    """`main` from the command line: an error is one sentence and a non-zero exit.

    Args:
        argv: the flags; None: those of the process. parts: `learner`, ... for `main`.
    """
    program = sys.argv[0] if parts else "train.py"  # what Python runs
    with one_sentence("train.py"), saying_how_to_go_on(argv, program):
        return main(parse(argv), **parts)


if __name__ == "__main__":
    cli()
