"""LOGO: offline multi-agent reinforcement learning with a local-to-global world model.

  python train.py --env-id 3s_vs_5z --horizon 15            LOGO on recorded battles, to a score
  python train.py --env-id 3s_vs_5z --synthetic-fraction 0  MACQL: the same without the model
  python train.py --env-id 3s_vs_5z --num-seeds 5           five seeds at once, and their mean
  python train.py --help                                    every hyperparameter, and its source

The story is Algorithm 1 of the paper: clone the data's policy (the baseline to beat), train the
world model (Phase 1), then in turn imagine battles (Phase 2) and improve the policy on half real,
half imagined data (Phase 3). The run's folder receives metrics.csv, TensorBoard events, a
checkpoint, and at the end run.png and final.json. Equations stand in logo_wm.py, macql.py and
buffer.py; what is not the method in prepare.py, run.py, measures.py, report.py and fast.py.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro

import collect
import envs
import report
from buffer import Batch, mix
from checkpoint import plain, take_up, weights
from fast import CudaGraph, each
from logo_wm import LogoWM
from macql import critic_loss, policy_loss, random_actions, soft_update
from prepare import begin, check, commit, imagined_rows, method
from run import Log, Run, Runs, descend, evaluate, phase, set_lr


@dataclass
class Args:
    """Every flag: meaning, symbol and unit where it has one, and [where the value is from]."""

    # Task and data
    env_id: str = "3s_vs_5z"
    """task: a SMAC map by its name, or a robot and its division, as HalfCheetah-6x1 [Sec. 5]"""
    quality: collect.Quality = "medium"
    """who plays the data that are recorded; a --dataset says itself [Sec. 5]"""
    dataset: Path | None = None
    """file of recorded episodes, instead of recording them at first use [ours]"""
    episodes: int = 600
    """episodes to record, where there is no --dataset [ours]"""
    holdout: float = 0.05
    """share of the episodes kept from training, to test the world model on [OfflineRL-Kit]"""
    backend: Literal["auto", "smax", "smac", "smacv2", "mamujoco"] = "auto"
    """simulator that evaluates; auto takes the one that the data are from, if present [ours]"""
    seed: int = 1
    """of networks, batches and rollouts [ours]"""
    num_seeds: int = 1
    """K: train seeds SEED .. SEED + K - 1 at once, as one batched computation [ours]"""
    data_seed: int = 0
    """of the recording and of the held-out split, shared by the runs that are compared [ours]"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto takes a GPU if there is one [ours]"""
    threads: int = 0
    """processor threads for torch, 0 = as many as there are cores [ours]"""
    compile: bool = False
    """compile the updates with torch.compile; on a CPU this does not pay [LeanRL]"""
    cudagraphs: bool = False
    """record the updates' GPU kernels once and launch them together; GPU only [LeanRL]"""

    # World model, Phase 1
    wm_updates: int = 3_000
    """gradient steps on the world model [ours: the paper gives no number]"""
    wm_batch_size: int = 256
    """B, rows a step [ours]"""
    wm_lr: float = 1e-3
    """Adam's step size [as Table 8 has for the policy]"""
    wm_weight_decay: float = 0.1
    """D15: decoupled weight decay of the world model; the paper's letter: 0 [ours]"""
    wm_hidden: int = 256
    """width of the world model's layers [as Table 8 has for the policy]"""
    deduce_from: Literal["obs", "obs+state", "obs+state+actions"] = "obs+state+actions"
    """D1: what R_d sees beside o_hat; the paper's letter: obs [Fig. 2]"""
    eq4_input: Literal["obs", "next_obs"] = "obs"
    """D2: observation that E_p sees in Eq. (4); the paper's letter: next_obs [Eq. 4]"""
    heads: bool = True
    """D3: use learned heads for who may do what and for the end; the paper's letter: no [ours]"""
    clamp: bool = True
    """D4: keep imagined o, s, r inside the data's range; the paper's letter: no [ours]"""
    learn_variance: bool = False
    """learn the variance of the Gaussians in Eq. (2), (3), (6), else it is 1 [ours]"""

    # Imagination, Phase 2
    horizon: int = 15
    """H, steps of an imagined rollout [Sec. 5.1]"""
    epsilon: float = 0.2
    """D16: share of random actions in a rollout (or noise); the paper's letter: 0 [ours]"""
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
    u_scale: float = 0.2
    """D20: unit of u in P_u: a smaller one trusts doubt more; the paper's letter: 1 [ours]"""
    penalty: float = 1.0
    """lambda of Eq. (1): reward lost per unit of u, with --uncertainty penalty [ours]"""

    # Policy, Phase 3
    updates: int = 8_000
    """gradient steps on policy and critic, and on the clone [ours; Table 8 says 10^7 rows]"""
    batch_size: int = 128
    """B, rows a step, real and imagined together [Table 8]"""
    synthetic_fraction: float = 0.5
    """share of imagined rows; 0 leaves MACQL [Sec. 4.3: 0.5]"""
    mixing: Literal["half", "coin"] = "half"
    """D11: mix every batch, or toss a coin for each as Algorithm 1, line 25 prints [ours]"""
    lr: float = 1e-3
    """Adam's step size, of actor and critic [Table 8]"""
    lr_decay: bool = True
    """D12: decay all step sizes linearly to zero; the paper's letter: no [ours]"""
    average: float = 0.995
    """D13: decay per update of the averaged actor that is scored; the paper's letter: 0 [ours]"""
    hidden: int = 256
    """width of actor's and critic's layers [Table 8]"""
    shared_actor: bool = True
    """D14: one policy network for all agents; the paper's letter: one each [pymarl]"""
    critic: Literal["cql", "none"] = "cql"
    """none leaves behaviour cloning [ours]"""
    critics: int = 2
    """D7: K, the Bellman target takes the least; the paper's letter: 1 [TD3]"""
    gamma: float = 0.95
    """discount per step; the field's 0.99 learns less within these few updates [ours]"""
    tau: float = 0.05
    """D19: share by which the target critic follows per update; the paper's letter: 1 [ours]"""
    cql_alpha: float = 0.1
    """alpha: weight of the conservative term in Eq. (10) [ours: the paper gives no value]"""
    conservative: Literal["logsumexp", "expectation"] = "logsumexp"
    """D5: values pushed down: log-sum-exp of all actions, or the policy's as in Eq. (10) [CQL]"""
    conservative_on: Literal["real", "both"] = "both"
    """rows on whose states values are pushed down [Eq. 10]"""
    backup: Literal["policy", "max"] = "policy"
    """D6: next action in the Bellman target; the paper's letter: max [Eq. 11]"""
    bellman_on: Literal["both", "real"] = "both"
    """D8: rows of the Bellman error; Eq. (10) prints real, Algorithm 1 both [Alg. 1]"""
    warm_start: bool = True
    """D18: start the policy from the clone; the paper's letter: from nothing [ours]"""
    bc_lambda: float = 0.3
    """D17: lambda, weight of behaviour cloning in Eq. (12); the paper's letter: 1 [ours]"""
    bc_on: Literal["real", "both"] = "real"
    """D9: rows that are cloned; the paper's letter: both [Eq. 12]"""
    normalise_q: bool = False
    """D21: divide the value in Eq. (12) by its mean magnitude; the paper's letter: no [TD3+BC]"""

    # Evaluation and bookkeeping
    eval_every: int = 500
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


# Where actions are continuous, these are the defaults; chosen on other seeds than those reported
CONTINUOUS = {
    "episodes": collect.ROBOT["episodes"], "eval_episodes": 20, "updates": 5_000,
    "conservative": "expectation", "normalise_q": True, "bc_lambda": 0.6,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Algorithm 1
# --------------------------------------------------------------------------------------------------


class Updates(NamedTuple):
    """The steps of Algorithm 1: functions of tensors that neither draw nor look at values.

    Rows are of D (B,), points of D_m (B,); with K seeds everything has a leading dimension K.
    """

    clone: Callable  # rows -> metrics
    world_model: Callable  # rows -> metrics
    imagine: Callable  # rows, noise, dice -> rollout
    policy: Callable  # rows, points, coin, draws -> metrics; the last three may be None


def make_updates(runs: Runs) -> Updates:
    """Forward, backward, step; compiled or recorded where the flags ask for it."""
    args, data, optimizers = runs.args, runs.data, runs.optimizers
    real_share = 1 - args.synthetic_fraction if args.mixing == "coin" else None

    def clone(rows):
        batch = data.gather(rows)
        is_real = torch.ones_like(batch.reward)
        loss, metrics = each(policy_loss, runs.clone, None, batch, is_real, bc_lambda=1.0)
        descend(optimizers["clone"], loss)
        return {"bc": metrics["bc"]}

    def world_model(rows):
        loss, metrics = each(LogoWM.loss, runs.world_model, data.gather(rows), args.eq4_input)
        descend(optimizers["wm"], loss)
        return metrics

    def rollout(model, actor, start: Batch, noise, dice):
        return model.imagine(
            lambda obs, avail, h: actor.explore(obs, avail, noise[h], args.epsilon),
            start.obs, start.state, start.avail, dice, args.heads, args.clamp,
        )  # fmt: skip

    def imagine(rows, noise, dice):
        return each(rollout, runs.world_model, runs.actor, data.gather(rows), noise, dice)

    def blend(model_data, real: Batch, points, coin):
        return mix(real, model_data.gather(points), coin)

    def policy(rows, points, coin, draws):
        metrics, batch = {}, data.gather(rows)
        is_real = torch.ones_like(batch.reward)
        if points is not None:
            batch, is_real = each(blend, runs.model_data, batch, points, coin)
        if args.critic == "cql":
            loss, parts = each(
                critic_loss, runs.critic, runs.critic_target, runs.actor, batch, is_real,
                args.gamma, args.cql_alpha, draws, args.conservative, args.conservative_on,
                args.backup, args.bellman_on, real_share,
            )  # fmt: skip
            descend(optimizers["critic"], loss)
            soft_update(runs.critic_target, runs.critic, args.tau)  # Deviation D19
            metrics |= {f"q_{name}": value for name, value in parts.items()}
        critic = runs.critic if args.critic == "cql" else None
        loss, parts = each(  # Deviation D17: lambda
            policy_loss, runs.actor, critic, batch, is_real, args.bc_lambda, args.normalise_q,
            args.bc_on, real_share,
        )  # fmt: skip
        descend(optimizers["actor"], loss)
        soft_update(runs.averaged, runs.actor, 1 - args.average)  # Deviation D13
        return metrics | {f"pi_{name}": value for name, value in parts.items()}

    updates = Updates(clone, world_model, imagine, policy)
    if args.compile:
        updates = Updates(*map(torch.compile, updates))
    if args.cudagraphs:
        updates = Updates(*map(CudaGraph, updates))
    return updates


def phase_0_clone(runs: Runs, logs: list[Log], updates: Updates) -> None:
    """Behaviour cloning, as many updates as the policy will get: the baseline to beat."""
    args = runs.args

    def update(k: int) -> dict[str, torch.Tensor]:
        set_lr(runs.optimizers["clone"], args.lr, k, args.updates, args.lr_decay)
        return updates.clone(runs.rows(args.batch_size))

    phase(runs, logs, "clone", "Phase 0: clone the data", args.updates, update)


def phase_1_world_model(runs: Runs, logs: list[Log], updates: Updates) -> None:
    """Algorithm 1, lines 1-5."""
    args = runs.args

    def update(k: int) -> dict[str, torch.Tensor]:
        set_lr(runs.optimizers["wm"], args.wm_lr, k, args.wm_updates, args.lr_decay)
        return updates.world_model(runs.rows(args.wm_batch_size))

    phase(runs, logs, "wm", "Phase 1: world model", args.wm_updates, update)


def imagine(runs: Runs, updates: Updates) -> None:
    """Phase 2, Algorithm 1, lines 8-22: one collection into every run's D_m."""
    args, started, size = runs.args, runs.now(), (runs.args.horizon, runs.args.rollouts)
    rollouts = updates.imagine(
        runs.rows(args.rollouts),
        runs.draw(lambda run: run.actor.noise((*size, *run.data.actions.shape[1:]), run.rng)),
        runs.draw(lambda run: torch.rand(size, generator=run.rng, device=run.device)),
    )
    if not rollouts["u"].isfinite().all():  # a look at the values, once per collection
        raise FloatingPointError(
            f"Phase 2, policy update {runs.progress['policy'] + 1}: u is not finite; the model's "
            "rollouts diverge (--clamp keeps them in the data's range)."
        )
    for k, run in enumerate(runs):
        rollout = {name: x[k] if len(runs) > 1 else x for name, x in rollouts.items()}
        if args.uncertainty == "penalty":
            rollout["reward"] = rollout["reward"] - args.penalty * rollout["u"]  # Eq. (1)
        rollout["u"] = rollout["u"] / args.u_scale  # Deviation D20
        run.model_data.add(rollout, args.cap, weighted=args.uncertainty == "weight")
        run.imagined_rows += args.horizon * args.rollouts
    runs.seconds["imagine"] += runs.now() - started


def phases_2_and_3_policy(runs: Runs, logs: list[Log], updates: Updates) -> None:
    """Algorithm 1, lines 6-32: imagine, and improve the policy on real and imagined rows."""
    args, synthetic = runs.args, imagined_rows(runs.args)
    real, by_coin = args.batch_size - synthetic, synthetic and args.mixing == "coin"
    if by_coin:  # Deviation D11: both in every batch; Algorithm 1, line 25: a coin says which
        real = synthetic = args.batch_size
    estimated = args.conservative == "logsumexp" and not runs[0].spec.discrete
    for run in runs if args.warm_start and runs.progress["policy"] == 0 else []:
        run.actor.load_state_dict(run.clone.state_dict())  # Deviation D18
        run.averaged.load_state_dict(run.clone.state_dict())

    def draws(run: Run) -> torch.Tensor:  # for the continuous log-sum-exp
        return random_actions((args.batch_size, *run.data.actions.shape[1:]), run.rng)

    def coin(run: Run) -> torch.Tensor:
        side = torch.rand((), generator=run.rng, device=run.device)
        return (side < args.synthetic_fraction).float()

    def update(k: int) -> dict[str, torch.Tensor]:
        if synthetic and k % args.collect_every == 0:  # Phase 2
            for run in runs:
                run.recipes.append({"rng": run.rng.get_state(), "actor": weights(run.actor)})
            imagine(runs, updates)
        for name in ("critic", "actor"):  # Phase 3
            set_lr(runs.optimizers[name], args.lr, k, args.updates, args.lr_decay)
        metrics = updates.policy(
            runs.rows(real),
            runs.draw(lambda run: run.model_data.draw(synthetic, run.rng)) if synthetic else None,
            runs.draw(coin) if by_coin else None,
            runs.draw(draws) if estimated else None,
        )
        ess = {"ess": runs.draw(lambda run: run.model_data.ess)} if synthetic else {}
        return metrics | ess

    def score(k: int) -> list[dict[str, float]]:
        scores = evaluate(runs, "averaged", k, args.eval_episodes)  # other episodes every time
        for run, score in zip(runs, scores, strict=True):
            run.evaluations.append({"update": k + 1, **score})
        return [{name: x for name, x in score.items() if x is not None} for score in scores]

    title = "Phases 2, 3: imagine, improve" if synthetic else "Phase 3: improve the policy"
    phase(runs, logs, "policy", title, args.updates, update, score if runs.env else None)


def main(args: Args) -> list[dict]:
    """Train, evaluate, report; returns the content of every seed's final.json."""
    check(args)
    runs = begin(args)
    updates = make_updates(runs)
    take_up(runs, report.FILES, lambda: imagine(runs, updates))
    logs = [Log(run.folder, run.progress, plain(run.args), args.track) for run in runs]
    phase_0_clone(runs, logs, updates)
    if args.synthetic_fraction > 0:
        phase_1_world_model(runs, logs, updates)
    phases_2_and_3_policy(runs, logs, updates)
    for log in logs:
        log.tensorboard.close()
    return report.finish(runs, method(args), commit())


def defaults(env_id: str) -> Args:
    """The flags' defaults for a task: they differ where actions are continuous."""
    return Args(env_id, **CONTINUOUS) if envs.is_robot(env_id) else Args(env_id)


def cli(argv: list[str] | None = None) -> list[dict]:
    """`main` from the command line: an error is one sentence and a non-zero exit."""
    start = defaults(collect.task_of(argv, Args.env_id))
    try:
        return main(tyro.cli(Args, description=__doc__, args=argv, default=start))
    except (ValueError, OSError, ImportError, FloatingPointError) as e:
        sys.exit(f"train.py: {e}")
    except torch.OutOfMemoryError:
        sys.exit("train.py: the GPU's memory is full: lower --num-seeds, --retain or --rollouts.")


if __name__ == "__main__":
    cli()
