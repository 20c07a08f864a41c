"""MAPPO [Yu et al., 2022], the online training of the behaviour policies.

All agents share one actor, a critic sees the global state, and PPO's clipped objective [Schulman et
al., 2017] improves both on whole episodes. One iteration: play episodes, compute advantages, make
several passes over the steps played. Offline learning itself needs none of this.

Sizes: T steps, E parallel episodes, N agents, O observation, S state, A actions, R rows (steps).
"""

import dataclasses
import math

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import envs
from behaviour.policy import Policy, log_prob_and_entropy, mlp, play


@dataclasses.dataclass
class Args:
    """Settings of one training; `defaults` gives those of the shipped policies."""

    env_id: str
    """task: a SMAX map, or a robot and its division such as HalfCheetah-6x1"""
    seed: int = 0
    """of the networks, the actions and the environment"""
    num_envs: int = 128
    """E: episodes played in parallel, each to its end"""
    total_steps: int = 3_500_000
    """environment steps of the whole training, summed over parallel episodes"""
    rows: int = 1
    """environment steps between two PPO updates, at least; E whole episodes are played at a time"""
    hidden: int = 128
    """width of the actor's two hidden layers; the critic is twice as wide"""
    lr: float = 1e-3
    """Adam's step size at the start, decayed linearly to zero"""
    gamma: float = 0.99
    """discount per step"""
    gae_lambda: float = 0.95
    """decay of the generalised advantage estimate"""
    clip: float = 0.1
    """how far one iteration may move a probability ratio from 1"""
    entropy: float = 0.01
    """weight of the entropy bonus, in nats"""
    epochs: int = 4
    """passes over each iteration's data"""
    minibatches: int = 4
    """optimiser steps per pass"""
    weakened: float = 0.0
    """share of the enemies that start with half their health at first; it falls by 0.01 after every
    iteration that wins half its episodes, and to 0 in four fifths of the training in any case. For
    maps that random play never wins (SMAX only)"""
    units: bool = False
    """share weights between all enemies and between all allies in an observation: learns faster
    where many units of one type fight each other (SMAX only)"""


ROBOT = {"num_envs": 8, "rows": 8_000, "total_steps": 3_000_000, "hidden": 64, "lr": 5e-4,
         "clip": 0.2, "entropy": 0.0, "epochs": 10, "minibatches": 16}  # fmt: skip
HARD = {"units": True, "hidden": 64, "entropy": 3e-3}  # maps that plain MAPPO did not learn
# The settings of the shipped policies, where they differ from the defaults above
RECIPES = {
    "2s3z": {"total_steps": 2_000_000},
    "6h_vs_8z": {"total_steps": 1_500_000},
    "5m_vs_6m": HARD | {"weakened": 1.0, "total_steps": 6_000_000},
    "3s5z_vs_3s6z": HARD | {"weakened": 0.7, "total_steps": 1_500_000},
    **dict.fromkeys(envs.PAPER_MUJOCO, ROBOT),
}


def defaults(env_id: str) -> Args:
    """The settings that the task's shipped policy was trained with, or those of its kind."""
    return Args(env_id, **RECIPES.get(env_id, ROBOT if envs.is_robot(env_id) else {}))


def check(args: Args) -> None:
    """Refuse settings that cannot work; raises a ValueError that names the flag."""
    counts = {k: getattr(args, k) for k in ("num_envs", "total_steps", "rows", "hidden", "epochs",
                                            "minibatches")}  # fmt: skip
    shares = {k: getattr(args, k) for k in ("gamma", "gae_lambda", "weakened")}
    wrong = {k: "1 or more" for k, x in counts.items() if x < 1}
    wrong |= {k: "0 to 1" for k, x in shares.items() if not 0 <= x <= 1}
    wrong |= {k: "a finite number above 0" for k in ("lr", "clip")
              if not 0 < getattr(args, k) < math.inf}  # fmt: skip
    if not 0 <= args.entropy < math.inf:
        wrong["entropy"] = "a finite number, 0 or more"
    if args.seed < 0:
        wrong["seed"] = "0 or more"
    for name, allowed in wrong.items():
        raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: give {allowed}.")
    if envs.natural_backend(args.env_id) == "smacv2":
        raise ValueError(f"{args.env_id}: policies are trained in SMAX and MuJoCo only.")
    if envs.is_robot(args.env_id) and (args.units or args.weakened):
        raise ValueError(f"--units and --weakened are for SMAX only; {args.env_id} is a robot.")


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def train(args: Args) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """Train a behaviour policy from scratch for args.total_steps environment steps.

    Returns:
        curve (I,4), after each of I iterations: environment steps so far, mean return, win rate,
        share of enemies weakened; and the policy's state_dict after each iteration, in float16.
    Raises:
        ValueError: a setting that cannot work, an unknown task, or networks that became NaN.
        ImportError: the task's simulator is not installed.
    """
    check(args)
    env = envs.make(args.env_id, args.num_envs, hide=False)
    policy, critic = build_networks(args, env.spec)
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, fused=True, eps=1e-5)
    generator, scales = torch.Generator().manual_seed(args.seed), Scales(env.spec, args.gamma)
    steps, curve, snapshots, weakened = 0, [], [], args.weakened
    bar = tqdm(total=args.total_steps, unit="step", unit_scale=True, desc=f"MAPPO {args.env_id}")
    while steps < args.total_steps:
        if env.spec.discrete:
            env.weakened = weakened
        rounds = play_rounds(args, env, policy, generator, steps)
        logs = [to_tensors(log) for log in rounds]
        scales.update(logs, policy)
        rows = training_rows(args, policy, critic, logs, scales)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - steps / args.total_steps)
        ppo_epochs(args, policy, critic, optimizer, parameters, rows, generator)
        if not all(p.isfinite().all() for p in parameters):
            raise ValueError(f"Networks are NaN or infinite at step {steps}: try a lower --lr.")
        played = sum(int(log["filled"].sum()) for log in rounds)
        steps += played
        mean_return = np.concatenate([log["reward"].sum(0) for log in rounds]).mean()
        win_rate = np.concatenate([log["won"].any(0) for log in rounds]).mean()
        curve.append((steps, mean_return, win_rate, weakened))
        snapshots.append({k: v.half().numpy() for k, v in policy.state_dict().items()})
        bar.update(played)
        shown = {"return": f"{mean_return:.1f}", "won": f"{win_rate:.0%}"}
        bar.set_postfix(shown | ({"weakened": f"{weakened:.2f}"} if weakened else {}))
        weakened = next_weakened(args, weakened, win_rate, steps)
    bar.close()
    return np.array(curve), snapshots


def build_networks(args: Args, spec: envs.Spec) -> tuple[Policy, nn.Sequential]:
    """The actor and the critic V(s), initialised from args.seed."""
    torch.manual_seed(args.seed)
    policy = Policy(spec, args.hidden, args.units)
    critic = mlp(spec.state_dim, 2 * args.hidden, 1)
    if not args.units:
        nn.init.zeros_(policy.net[-1].weight)  # near uniform at first: early advantages are noise
    return policy, critic


def play_rounds(args: Args, env, policy: Policy, generator, steps: int) -> list[dict]:
    """Play rounds of E episodes until they have at least args.rows steps; as `play` returns."""
    rounds, rows = [], 0
    while not rounds or rows < args.rows:
        seed = args.seed * 10**6 + steps + len(rounds)
        rounds.append(play(env, policy, generator, seed))
        rows += int(rounds[-1]["filled"].sum())
    return rounds


def to_tensors(log: dict[str, np.ndarray]) -> dict[str, torch.Tensor | None]:
    """float32 tensors of the arrays."""
    as_float = {k: torch.as_tensor(v, dtype=torch.float32) for k, v in log.items() if v is not None}
    return dict.fromkeys(log) | as_float


def next_weakened(args: Args, weakened: float, win_rate: float, steps: int) -> float:
    """The next iteration's share of weakened enemies (see Args.weakened)."""
    if win_rate > 0.5:
        weakened -= 0.01
    left = max(0.0, 1 - steps / (0.8 * args.total_steps))
    return max(0.0, min(weakened, left * args.weakened))


class RunningMoments:
    """Mean and standard deviation of all rows seen so far, column by column [Chan et al., 1983]."""

    def __init__(self):
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def add(self, x: torch.Tensor) -> None:
        """x (rows, ...)."""
        total, delta = self.count + len(x), x.mean(0) - self.mean
        self.m2 = self.m2 + ((x - x.mean(0)) ** 2).sum(0) + delta**2 * self.count * len(x) / total
        self.mean, self.count = self.mean + delta * len(x) / total, total

    def std(self, floor: float) -> torch.Tensor:
        """Standard deviation (divided by the count), at least `floor`."""
        return (self.m2 / self.count).sqrt().clamp(min=floor)


class Scales:
    """Running scales of states and returns; of robots' observations too, in the first iteration."""

    def __init__(self, spec: envs.Spec, gamma: float):
        self.discrete, self.gamma, self.first = spec.discrete, gamma, True
        self.states, self.returns = RunningMoments(), RunningMoments()

    def update(self, logs: list[dict], policy: Policy) -> None:
        """Add one iteration's steps."""
        observations = RunningMoments()
        for log in logs:
            valid = log["filled"].bool()
            self.states.add(log["state"][:-1][valid])
            if not self.discrete:
                observations.add(log["obs"][:-1][valid])
                self.returns.add(discounted(log["reward"], self.gamma)[valid])
        if self.first and not self.discrete:  # then fixed: a moving input would change the policy
            policy.obs_mean.copy_(observations.mean)
            policy.obs_std.copy_(observations.std(1e-2))
        self.first = False

    def state(self, state: torch.Tensor) -> torch.Tensor:
        """Standardised state: map units stand beside 0-1 flags in it."""
        return (state - self.states.mean) / self.states.std(1e-2)

    def reward(self, reward: torch.Tensor) -> torch.Tensor:
        """Reward in a unit that keeps the critic's values near 1."""
        return reward / (10.0 if self.discrete else self.returns.std(1e-3))


def discounted(reward: torch.Tensor, gamma: float) -> torch.Tensor:
    """Discounted sum of the rewards up to each step, (T,E)."""
    out, carry = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in range(len(reward)):
        carry = out[t] = gamma * carry + reward[t]
    return out


def advantages(reward, value, terminated, valid, gamma: float, lam: float) -> torch.Tensor:
    """Generalised advantage estimate [Schulman et al., 2016].

    Args:
        reward, terminated, valid: (T,E); valid is 1 until the episode has ended.
        value: (T+1,E). A time limit keeps its bootstrap value, termination does not.
        lam: lambda, decay of the estimate.
    Returns:
        (T,E), 0 where not valid.
    """
    out, carry = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        delta = reward[t] + gamma * (1 - terminated[t]) * value[t + 1] - value[t]
        carry = valid[t] * (delta + gamma * lam * (1 - terminated[t]) * carry)
        out[t] = carry
    return out


@torch.no_grad()
def training_rows(args: Args, policy, critic, logs: list[dict], scales: Scales) -> dict:
    """One iteration's valid steps as R rows, with standardised advantages and critic targets."""
    parts = []
    for log in logs:
        valid, state = log["filled"].bool(), scales.state(log["state"])
        value = critic(state).squeeze(-1)  # (T+1,E)
        adv = advantages(scales.reward(log["reward"]), value, log["terminated"], log["filled"],
                         args.gamma, args.gae_lambda)  # fmt: skip
        part = {
            "obs": log["obs"][:-1][valid],
            "avail": None if log["avail"] is None else log["avail"][:-1][valid],
            "actions": log["actions"][valid],
            "state": state[:-1][valid],
            "target": (adv + value[:-1])[valid],
            "adv": adv[valid],
        }
        old = log_prob_and_entropy(policy, part["obs"], part["avail"], part["actions"])[0]
        parts.append(part | {"old_log_prob": old})
    rows = {k: None if parts[0][k] is None else torch.cat([p[k] for p in parts]) for k in parts[0]}
    rows["adv"] = (rows["adv"] - rows["adv"].mean()) / (rows["adv"].std() + 1e-8)
    return rows


def ppo_epochs(args: Args, policy, critic, optimizer, parameters, rows: dict, generator) -> None:
    """Several passes of PPO's clipped objective over one iteration's rows."""
    for _ in range(args.epochs):
        order = torch.randperm(len(rows["adv"]), generator=generator)
        for part in order.chunk(args.minibatches):
            b = {k: None if v is None else v[part] for k, v in rows.items()}
            log_prob, entropy = log_prob_and_entropy(policy, b["obs"], b["avail"], b["actions"])
            ratio = (log_prob - b["old_log_prob"]).exp()  # (R,N)
            adv = b["adv"].unsqueeze(-1)
            gain = torch.minimum(ratio * adv, ratio.clamp(1 - args.clip, 1 + args.clip) * adv)
            error = critic(b["state"]).squeeze(-1) - b["target"]
            loss = 0.5 * error.square().mean() - gain.mean() - args.entropy * entropy.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
