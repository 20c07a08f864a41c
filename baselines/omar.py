"""OMAR: each agent plans against its own conservative critic [Pan et al., 2022].

Conservative values have many local maxima, where policies that follow the gradient get stuck. OMAR
searches for a better action a* without a gradient, and pulls the policy towards it.

  critic  (Q_i(o^i, a^i) - y_i)^2 + alpha (log sum_a exp Q_i(o^i, a) - Q_i(o^i, a^i))
          y_i = r + gamma min_k Q_ki(o'^i, pi_i(o'^i))
  actor   (1 - c) * -Q_i(o^i, pi_i(o^i)) + c |pi_i(o^i) - a*|^2        c: --rectification

An agent's critics see its own observation alone; actor and search use the first one. Continuous
actions: a* is the best action that the cross-entropy method finds, or pi_i(o^i) where that is
better. Discrete actions: a* is the best available one; Q_i(o^i, pi_i) is an expected value for the
actor, and that of the most likely action in y_i.

Departures, in all of which OMAR is like MACQL here: the policies are one network and start from the
clone and wait while the critics learn alone (D26); they stand for target policies, and their moving
average is evaluated; the target's value is kept in the range of the data's returns; it holds
--n-step rewards; target critics follow by 0.05 per update, step sizes fall to zero, gradients are
not clipped; the continuous log-sum-exp weighs a draw with the density of the mixture that it is
from (the public code subtracts a density where its logarithm belongs); imagined rows count in the
Bellman error alone. Besides, |pi - a*|^2 is a sum over A, as in the paper; the code takes the mean,
so that its c pulls A times as hard here, and adds 1e-3 pi^2; values are not in units of the data's
returns (D21), which on robots MACQL has here. The code for discrete actions is of CFCQL's authors:
its critics also see the state and share weights, targets are of TD(0.6), the log-sum-exp and a*
know no unavailable actions, and the actor follows the advantage of the data's actions, not Q_i(o^i,
pi_i).

Source: https://github.com/ling-pan/OMAR at 0e52ad6: algorithms/maddpg.py (continuous actions);
https://github.com/thu-rllab/CFCQL at 3441019: discrete/src/learners/omar_learner.py.

Sizes: B batch, N agents, O observation, A action, K critics, M draws or candidates.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

import macql
import train
from baselines import run
from experiment import setup
from macql import MACQL, Actor, draws_and_density

# The search, as the code has it for robots; SIGMA: standard deviation in the first round
ROUNDS, CANDIDATES, ELITES, SIGMA = 2, 20, 5, 2.0


@dataclass
class Args(train.Args):
    """OMAR: every agent searches for the best action under its own conservative critic."""

    NO_EFFECT: ClassVar = ("critic", "recorded_critic", "conservative", "backup", "imagined_rows",
                           "bc_lambda")  # fmt: skip

    ROBOTS_ONLY: ClassVar = ("cql_samples",)
    ON_ROBOTS: ClassVar = {"cql_alpha": 1.0, "rectification": 0.7}

    synthetic_fraction: float = 0.0
    """share of imagined rows; more than 0 puts OMAR on LOGO's world model [ours]"""
    cql_alpha: float = 5.0
    """alpha: weight of the conservative term [code: 5 on StarCraft, 1 on a robot's random and
    medium data, 5 on its other data]"""
    rectification: float = 0.5
    """c: weight of the pull towards a* [code: 0.5 on StarCraft, 0.7 on a robot's medium data, 1
    random, 0.9 medium-replay, 0.5 expert]"""
    cql_samples: int = 10
    """continuous actions: draws of each of three kinds for the log-sum-exp, the slowest [code]"""


class LocalCritic(nn.Module):
    """K values Q_ki(o^i, a^i) of each agent: K N networks in one stack. Sizes as of `Critic`."""

    def __init__(self, obs_mean, obs_std, action_dim, hidden=256, discrete=True, critics=2):
        super().__init__()
        (n, o), self.discrete, self.critics = obs_mean.shape, discrete, critics
        self.standardise = macql.Standardise(obs_mean, obs_std)
        ends = (o, action_dim) if discrete else (o + action_dim, 1)
        self.net = macql.stacked_mlp(critics * n, ends[0], hidden, hidden, ends[1])

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """The networks' answers to (...,N,I): (K,...,N,A), or (K,...,N,1) if continuous."""
        x = x.movedim(-2, 0)  # (N,...,I)
        q = self.net(x.flatten(1, -2).repeat(self.critics, 1, 1))
        return q.view(self.critics, *x.shape[:-1], -1).movedim(1, -2)

    def each(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q_ki(o^i, a^i): (K,B,N) of actions (B,N,A), or (K,M,B,N) of (M,B,N,A)."""
        o = self.standardise(obs)
        if self.discrete:
            return (self.values(o) * actions).sum(-1)
        return self.values(torch.cat([o.expand(*actions.shape[:-1], -1), actions], -1)).squeeze(-1)

    def forward(self, obs, state, actions) -> torch.Tensor:
        """(K,B): the agents' mean, for the run's report. They do not see the state."""
        return self.each(obs, actions).mean(-1)


def data_and_all_values(critic: LocalCritic, batch, actor: Actor, noise: torch.Tensor | None):
    """Q_ki of the data's action, and log sum_a exp Q_ki(o^i, a) over all of i's: (K,B,N) each.

    Continuous actions: estimated with the `noise` of `macql.action_noise`.
    """
    if critic.discrete:
        q = critic.values(critic.standardise(batch.obs))  # (K,B,N,A)
        q_all = q.masked_fill(batch.avail == 0, -torch.inf).logsumexp(-1)
        return (q * batch.actions).sum(-1), q_all
    draws, log_density = draws_and_density(batch, actor, noise, (-1,))  # (M,B,N,A), (M,B,N)
    q = critic.each(batch.obs, torch.cat([batch.actions.unsqueeze(0), draws]))  # (K,1+M,B,N)
    return q[:, 0], (q[:, 1:] - log_density).logsumexp(1) - math.log(len(draws))


def critic_loss(
    critic: LocalCritic, target, actor: Actor, batch, is_real, noise=None, *, gamma, alpha, bounds
):  # fmt: skip
    """Bellman error + alpha * conservative term, of real rows: mean over agents, sum over critics.

    `noise`: of `macql.action_noise`. `bounds`: of the next observation's value in the target.
    """
    with torch.no_grad():
        next_actions = actor.greedy(batch.next_obs, batch.next_avail)
        v_next = target.each(batch.next_obs, next_actions).amin(0).clamp(*bounds)  # (B,N)
        discount = gamma**batch.steps * (1 - batch.terminated)  # (B,)
        y = batch.reward.unsqueeze(-1) + discount.unsqueeze(-1) * v_next
    q_data, q_all = data_and_all_values(critic, batch, actor, noise)
    assert q_data.shape == q_all.shape == (critic.critics, *y.shape)
    bellman = (q_data - y).square().mean((1, 2)).sum()
    gap = ((q_all - q_data) * macql.real_weights(is_real).unsqueeze(-1)).mean((1, 2)).sum()
    loss = bellman + alpha * gap  # OMAR critic loss
    parts = {"td": bellman, "data": q_data.mean(), "all": q_all.mean(), "gap": gap}
    return loss, {k: v.detach() for k, v in parts.items()}


@torch.no_grad()
def search(score, pi: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The best action (B,N,A) that the cross-entropy method finds in [-1,1], or pi if it is better.

    Args:
        score: function from actions (M,B,N,A) to their values (M,B,N).
        pi: (B,N,A), the policy's actions.
        noise: (ROUNDS,M,B,N,A), standard normal.
    """
    mean, sigma, found, values = 0.0, SIGMA, noise[0, :0], noise[0, :0, ..., 0]
    for draws in noise:
        candidates = (mean + sigma * draws).clamp(-1, 1)
        values, best = torch.cat([score(candidates), values]).topk(ELITES, 0)  # (ELITES,B,N)
        best = best.unsqueeze(-1).expand(-1, *pi.shape)
        found = torch.cat([candidates, found]).gather(0, best)  # (ELITES,B,N,A), the best first
        mean, sigma = found.mean(0), found.std(0)
    better = values[0] > score(pi.unsqueeze(0))[0]
    return torch.where(better.unsqueeze(-1), found[0], pi)


def actor_loss(actor: Actor, critic: LocalCritic, batch, is_real, noise=None, *, rectification):
    """What the policies minimise, on real rows; `noise`: of `search`; `rectification`: c."""
    pi = actor(batch.obs, batch.avail)  # (B,N,A)
    if critic.discrete:
        q = critic.values(critic.standardise(batch.obs))[0]  # (B,N,A)
        best = q.masked_fill(batch.avail == 0, -torch.inf).argmax(-1)
        value, best = (pi * q).sum(-1), F.one_hot(best, q.shape[-1]).to(q)
    else:
        value = critic.each(batch.obs, pi)[0]
        best = search(lambda a: critic.each(batch.obs, a)[0], pi, noise)
    distance = (pi - best).square().sum(-1)
    assert value.shape == distance.shape == batch.actions.shape[:2]
    rows = macql.real_weights(is_real).unsqueeze(-1)
    value, distance = (value * rows).mean(), (distance * rows).mean()
    loss = (1 - rectification) * -value + rectification * distance  # OMAR actor loss
    return loss, {"q": value.detach(), "distance": distance.detach()}


class OMAR:
    """The networks, optimisers and schedules of a MACQL with a LocalCritic, under two other losses:
    the functions above with their hyperparameters."""

    compilable = ("critic_loss", "actor_loss")

    def __init__(self, learner: MACQL, critic_loss, actor_loss, cql_samples=10):
        self.learner, self.actor, self.ema_actor = learner, learner.actor, learner.ema_actor
        self.critic, self.critic_loss, self.actor_loss = learner.critic, critic_loss, actor_loss
        self.cql_samples = cql_samples

    def update(self, batch, is_real, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """One gradient step on the critics, then, after the first updates (D26), one on the
        policies; metrics as 0-d tensors."""
        x, actor, critic, shape = self.learner, self.actor, self.critic, batch.actions.shape
        draws = candidates = None
        if not critic.discrete:
            draws = macql.action_noise(shape, generator, self.cql_samples)
            candidates = torch.empty(ROUNDS, CANDIDATES, *shape, device=generator.device)
            candidates.normal_(generator=generator)
        loss, of_q = self.critic_loss(critic, x.critic_target, actor, batch, is_real, noise=draws)
        macql.descend(x.optimizers["critic"], loss)
        x.schedules["critic"].step()
        macql.soft_update(x.critic_target, critic, x.tau)
        metrics = {f"q_{k}": v for k, v in of_q.items()}
        if x.schedules["critic"].last_epoch <= x.policy_waits:
            return metrics
        loss, of_pi = self.actor_loss(actor, critic, batch, is_real, noise=candidates)
        macql.descend(x.optimizers["actor"], loss)
        x.schedules["actor"].step()
        macql.soft_update(self.ema_actor, actor, 1 - x.ema_decay)
        return metrics | {f"pi_{k}": v for k, v in of_pi.items()}

    def parts(self) -> dict:
        return self.learner.parts()

    state_dict, load_state_dict = MACQL.state_dict, MACQL.load_state_dict  # of parts()


def make_learner(args: Args, spec, data) -> OMAR:
    """OMAR on this task's data, on the data's device; a ValueError if c is not a share."""
    if not 0 <= args.rectification <= 1:
        raise ValueError(f"--rectification is {args.rectification}: give 0 to 1.")
    obs = [data.statistics()[f"obs_{moment}"] for moment in ("mean", "std")]
    sizes, bounds = (spec.action_dim, args.hidden, spec.discrete), (-math.inf, math.inf)
    actor = Actor(*obs, *sizes, args.shared_actor).to(data.obs.device)
    critic = LocalCritic(*obs, *sizes, args.critics).to(data.obs.device)
    if args.clamp:
        bounds = data.value_range(args.gamma)
    return OMAR(
        MACQL(actor, critic, args.lr, args.updates, args.tau, policy_waits=setup.waiting(args)),
        partial(critic_loss, gamma=args.gamma, alpha=args.cql_alpha, bounds=bounds),
        partial(actor_loss, rectification=args.rectification),
        args.cql_samples,
    )


def _self_check():
    """Two agents are paid a^2 + 0.4 a each: 1 is best, and below -0.2 the gradient leads to -1.

    Policies that start there must get to 1 with the search, and to -1 without it, on its critics.
    """
    from types import SimpleNamespace

    torch.manual_seed(0)
    g, ones, ends = torch.Generator().manual_seed(0), torch.ones(64), {}
    obs, sizes = torch.zeros(64, 2, 1), {"action_dim": 1, "hidden": 32, "discrete": False}
    critic = LocalCritic(obs[0], obs[0], **sizes)
    of_q = partial(critic_loss, gamma=0.9, alpha=0.1, bounds=(0.0, 3.0))
    for c in (0.7, 0.0):
        actor = Actor(obs[0], obs[0], **sizes)
        nn.init.constant_(actor.net[-1].bias, -0.7)
        learner = OMAR(MACQL(actor, critic, 5e-3), of_q, partial(actor_loss, rectification=c))
        for _ in range(80):
            a = torch.empty(64, 2, 1).uniform_(-1, 1, generator=g)
            reward, now = (a * a + 0.4 * a).sum((1, 2)), {"obs": obs, "avail": None, "actions": a}
            then = {"next_obs": obs, "next_avail": None, "terminated": ones, "steps": ones}
            learner.update(SimpleNamespace(**now, reward=reward, **then), ones, g)
        ends[c] = actor(obs[:1], None).flatten().tolist()
        print(f"c {c}: actions {' '.join(f'{x:.2f}' for x in ends[c])}")
    assert min(ends[0.7]) > 0.8, "the search must find the best action"
    assert max(ends[0.0]) < -0.8, "the gradient alone must end where it leads"


if __name__ == "__main__":
    run("omar", Args, _self_check, learner=make_learner)
