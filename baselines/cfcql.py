"""CFCQL: a conservative critic that pushes down one agent's action at a time [Shao et al., 2023].

MACQL pushes down the values of all joint actions, most of which are far from the data in many
agents at once, and becomes more pessimistic with every further agent. CFCQL changes one agent's
action and keeps the others' as they are in the data (a counterfactual), for every agent in turn,
and weighs the agents. Everything else is MACQL's: critic, target, policies, cloning.

  R(Q) = sum_i lambda_i E[log sum_{a_i} exp Q(s, a_i, a_-i)] - E[Q(s, a)]
  lambda_i = softmax_i(temperature * KL(pi_i || beta_i)), or 1/N

pi_i is the soft-max of the values of i's counterfactual actions, and beta the data's policy.

Departures: the critic is LOGO's sum of utilities, or a network of the joint action, instead of a
QMIX mixer (with a sum, lambda_i = 1/N is MACQL with alpha / N: only the weights differ); targets
hold --n-step rewards, and a policy is trained by Eq. (12) of LOGO's paper, as MACQL's here, instead
of taking the best action; beta is a network on o that is trained beside the critic. Continuous
actions: the integral over a_i is taken with the draws of `macql.action_noise`, one agent's at a
time, and lambda_i is 1/N, because KL has no exact value there; but as in MACQL the default for
robots is the expected value under pi_i instead of the log-sum-exp, with which (--conservative
logsumexp) 5,000 updates on HalfCheetah-6x1 take over an hour on one core.

Source: https://github.com/thu-rllab/CFCQL at 3441019: discrete/src/learners/cq_learner.py,
continuous/algorithms/maddpg_cc.py. Its alpha is 0.1 to 50 on StarCraft and 0.1 to 1.7 on robots,
its temperature 0 to 100, chosen for each dataset.

Sizes: B batch, N agents, A action, K critics, M draws.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F

import train
from baselines import run
from macql import MACQL, Actor, Critic, descend, draws_and_density, linear_decay, real_weights


@dataclass
class Args(train.Args):
    """CFCQL: a conservative critic that changes one agent's action at a time."""

    NO_EFFECT: ClassVar = ("critic", "imagined_rows")
    MAPS_ONLY: ClassVar = ("temperature",)

    synthetic_fraction: float = 0.0
    """share of imagined rows; more than 0 puts CFCQL on LOGO's world model [ours]"""
    cql_alpha: float = 0.5
    """alpha: weight of R(Q) [ours; README of the code: 0.1 to 50, on 3s_vs_5z and 6h_vs_8z 50]"""
    temperature: float = 0.5
    """of the agents' weights lambda_i: 0 = all alike, large = the one farthest from the data
    [README of the code: 0 to 100]"""


def values_of_all(
    critic: Critic, batch, actor: Actor, noise: torch.Tensor | None, conservative: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Q_k(s, a) (K,B), and for each agent i (K,B,N) the value of all its actions given a_-i.

    Args:
        noise: of `macql.action_noise`, for the continuous log-sum-exp alone.
        conservative: "logsumexp" over the actions a_i, or "expectation" under i's policy.
    """
    if critic.discrete:
        q = critic.utilities(batch.obs, batch.state)  # (K,B,N,A)
        taken = (q * batch.actions).sum(-1)  # (K,B,N)
        if conservative == "expectation":
            with torch.no_grad():
                pi = actor(batch.obs, batch.avail)
            of_all = (pi * q).sum(-1)
        else:
            of_all = q.masked_fill(batch.avail == 0, -torch.inf).logsumexp(-1)
        q_data = taken.sum(-1)  # (K,B)
        return q_data, q_data.unsqueeze(-1) - taken + of_all
    b, n = batch.actions.shape[:2]
    if conservative == "expectation":
        with torch.no_grad():
            draws = actor(batch.obs, None).unsqueeze(0)
        log_density = draws.new_zeros(1, b, n)
    else:
        draws, log_density = draws_and_density(batch, actor, noise, (-1,))
    m, one = len(draws), torch.eye(n, device=draws.device).view(1, n, 1, n, 1)
    # (M,N,B,N,A): in block i of the first N, agent i's action is replaced by the draw's
    actions = torch.lerp(batch.actions, draws.unsqueeze(1), one)
    obs, state = batch.obs.repeat(m * n, 1, 1), batch.state.repeat(m * n, 1)
    q = critic(obs, state, actions.flatten(0, 2)).view(-1, m, n, b)  # (K,M,N,B)
    of_all = (q.transpose(2, 3) - log_density).logsumexp(1) - math.log(m)  # (K,B,N)
    return critic(batch.obs, batch.state, batch.actions), of_all


@torch.no_grad()
def agent_weights(q: torch.Tensor, beta: torch.Tensor, avail: torch.Tensor, temperature: float):
    """lambda (B,N) from utilities q (B,N,A) and the data's policy beta (B,N,A)."""
    log_pi = q.masked_fill(avail == 0, -torch.inf).log_softmax(-1)
    ratio = torch.where(avail == 0, 0.0, log_pi - beta.clamp(min=1e-6).log())
    kl = (log_pi.exp() * ratio).sum(-1)  # (B,N)
    return torch.softmax(temperature * kl, -1)  # CFCQL lambda_i


def critic_loss(
    critic: Critic, target: Critic, actor: Actor, batch, is_real, noise=None, *, bellman, beta,
    alpha, temperature, conservative,
):  # fmt: skip
    """Bellman error + alpha R(Q), summed over the K critics; `bellman` is MACQL's without its term.

    Args:
        beta: the data's policy, for lambda_i; None = all agents alike.
    """
    loss, parts = bellman(critic, target, actor, batch, is_real)
    q_data, of_all = values_of_all(critic, batch, actor, noise, conservative)
    size, n = batch.actions.shape[:2]
    weights = torch.full((size, n), 1 / n, device=q_data.device)
    if beta is not None:
        q = critic.utilities(batch.obs, batch.state).mean(0)
        weights = agent_weights(q, beta(batch.obs, batch.avail), batch.avail, temperature)
    assert q_data.shape == of_all.shape[:2] == (critic.critics, size)
    gap = ((weights * of_all).sum(-1) - q_data) * real_weights(is_real)
    regularisation = gap.mean(1).sum()  # CFCQL R(Q)
    parts |= {"data": q_data.mean().detach(), "all": of_all.mean().detach()}
    return loss + alpha * regularisation, parts | {"gap": regularisation.detach()}


class CFCQL:
    """MACQL with the counterfactual term, and the data's policy beta where actions are discrete.

    Args:
        learner: MACQL; its critic's loss is replaced.
        alpha, temperature, conservative: see `critic_loss` and `values_of_all`.
    """

    compilable = ("critic_loss", "policy_loss")

    def __init__(self, learner: MACQL, alpha, temperature, conservative, lr=1e-3, decay_updates=0):
        self.learner, self.actor, self.ema_actor = learner, learner.actor, learner.ema_actor
        self.critic, self.beta = learner.critic, None
        bellman = partial(learner.critic_loss, alpha=0.0, conservative="expectation")
        if learner.actor.discrete:
            self.beta = copy.deepcopy(learner.actor)  # its size, trained on its own
            self.optimizer = torch.optim.Adam(self.beta.parameters(), lr=lr, fused=True)
            self.schedule = linear_decay(self.optimizer, decay_updates)
        self.policy_loss = learner.policy_loss
        self.critic_loss = partial(
            critic_loss, bellman=bellman, beta=self.beta, alpha=alpha, temperature=temperature,
            conservative=conservative,
        )  # fmt: skip

    def update(self, batch, is_real, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """One gradient step on beta, on the critic and on the policies."""
        metrics = {}
        if self.beta is not None:
            logits = self.beta.logits(batch.obs).masked_fill(batch.avail == 0, -torch.inf)
            chosen = batch.actions.argmax(-1)  # (B,N)
            nll = F.cross_entropy(logits.flatten(0, 1), chosen.flatten(), reduction="none")
            loss = (nll.view_as(chosen).mean(1) * real_weights(is_real)).mean()
            descend(self.optimizer, loss)
            self.schedule.step()
            metrics["beta_nll"] = loss.detach()
        # Taken over here, because --compile replaces them after the learner is made
        self.learner.critic_loss, self.learner.policy_loss = self.critic_loss, self.policy_loss
        return metrics | self.learner.update(batch, is_real, generator)

    def parts(self) -> dict:
        """Everything with a state."""
        parts = self.learner.parts()
        if self.beta is None:
            return parts
        return parts | {"beta": self.beta, "beta_optimizer": self.optimizer,
                        "beta_schedule": self.schedule}  # fmt: skip

    state_dict, load_state_dict = MACQL.state_dict, MACQL.load_state_dict  # of parts()


def make_learner(args: Args, spec, data) -> CFCQL:
    """CFCQL on this task's data, on the data's device."""
    learner = train.make_learner(args, spec, data)
    return CFCQL(
        learner, args.cql_alpha, args.temperature, args.conservative, args.lr, args.updates
    )


def _self_check():
    """A bandit of two agents whose data never have the third and fourth of four actions.

    The counterfactual term must put both of them below the two that the data have.
    """
    from types import SimpleNamespace

    torch.manual_seed(0)
    size, n, actions, g = 256, 2, 4, torch.Generator().manual_seed(0)
    zero, one = torch.zeros(n, 1), torch.ones(n, 1)
    actor = Actor(zero, one, actions, hidden=32)
    critic = Critic(zero, one, zero[0], one[0], actions, hidden=32)
    learner = CFCQL(MACQL(actor, critic, lr=3e-3, bc_lambda=1.0), 1.0, 0.5, "logsumexp", 3e-3)
    obs, state, avail = torch.zeros(size, n, 1), torch.zeros(size, 1), torch.ones(size, n, actions)
    for k in range(301):
        choice = torch.randint(2, (size, n), generator=g)
        batch = SimpleNamespace(
            obs=obs, state=state, avail=avail, actions=F.one_hot(choice, actions).float(),
            reward=choice.sum(-1).float(), next_obs=obs, next_state=state, next_avail=avail,
            terminated=torch.ones(size), steps=torch.ones(size),
        )  # fmt: skip
        metrics = learner.update(batch, torch.ones(size), g)
        if k % 100 == 0:
            q = critic.utilities(obs[:1], state[:1]).mean(0)[0].mean(0).tolist()  # (A,)
            seen, unseen = (" ".join(f"{x:6.2f}" for x in part) for part in (q[:2], q[2:]))
            print(f"update {k:3}: seen {seen}   unseen {unseen}   gap {metrics['q_gap']:.2f}")
    assert max(q[2:]) < min(q[:2]), "unseen actions must be worth less than seen ones"
    assert q[1] > q[0], "and the order of the seen ones must stay"


if __name__ == "__main__":
    run("cfcql", Args, _self_check, learner=make_learner)
