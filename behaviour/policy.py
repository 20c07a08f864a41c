"""The behaviour policies' networks, how actions are drawn from them, and whole episodes of them.

Discrete tasks (SMAX): masked softmax over the allowed actions. Continuous tasks (Multi-Agent
MuJoCo): diagonal Gaussian. All agents share one network.

Sizes: T steps, E parallel episodes, N agents, O observation, S state, A actions.
"""

import math

import numpy as np
import torch
import torch.nn as nn

import envs


class Policy(nn.Module):
    """The agents' behaviour policies pi_i(a|o^i), one shared network.

    Discrete: the agents are interchangeable, so each sees its observation alone. Continuous: they
    drive different joints, so each also sees its one-hot agent_id; the spread is learned for every
    joint, independent of the observation.

    Args:
        spec: of the environment.
        hidden: width of the two hidden layers.
        units: compute the logits with `UnitNet` (SMAX only) instead of a plain network.
    """

    def __init__(self, spec: envs.Spec, hidden: int, units: bool = False):
        super().__init__()
        n, o, a = spec.num_agents, spec.obs_dim, spec.action_dim
        self.discrete = spec.discrete
        inputs = o if spec.discrete else o + n
        self.net = UnitNet(n, o, a, hidden) if units else mlp(inputs, hidden, a)
        if not spec.discrete:
            self.log_std = nn.Parameter(torch.full((n, a), -0.5))
            self.register_buffer("obs_mean", torch.zeros(n, o))
            self.register_buffer("obs_std", torch.ones(n, o))
            self.register_buffer("agent_id", torch.eye(n), persistent=False)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """obs (...,N,O) -> (...,N,A): logits if discrete, else the Gaussian's means."""
        if self.discrete:
            return self.net(obs)
        x = ((obs - self.obs_mean) / self.obs_std).clamp(-10, 10)
        return self.net(torch.cat([x, self.agent_id.expand(*x.shape[:-1], -1)], -1))

    def distribution(self, obs: torch.Tensor, avail: torch.Tensor | None):
        """Discrete: log pi(.|o) (...,N,A), near -1e9 where forbidden; else (means, log_std)."""
        out = self(obs)
        if self.discrete:
            return out.masked_fill(avail == 0, -1e9).log_softmax(-1)
        return out, self.log_std.expand_as(out)


class UnitNet(nn.Module):
    """Logits computed unit by unit: all enemies share weights, and so do all allies.

    SMAX shows an agent every other unit as a block of F features, allies first, and at the end
    itself as F - 3; action 5 + k attacks enemy k. The logit of that action is computed from enemy
    k's own block [after Wang et al., 2020, Action Semantics Networks].

    Args:
        n, o, a: N, O and A. hidden: width of every layer.
    """

    def __init__(self, n: int, o: int, a: int, hidden: int):
        super().__init__()
        self.allies, self.enemies = n - 1, a - 5
        self.features = (o + 3) // (n + self.enemies)  # F
        self.ally, self.enemy = nn.Linear(self.features, hidden), nn.Linear(self.features, hidden)
        self.own = nn.Linear(self.features - 3, hidden)
        self.context = nn.Sequential(
            nn.Linear(3 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.move = nn.Linear(hidden, 5)
        self.attack = nn.Linear(hidden, hidden + 1)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """obs (...,O) -> logits (...,A)"""
        blocks = [self.allies * self.features, self.enemies * self.features, self.features - 3]
        allies, enemies, own = obs.split(blocks, -1)
        allies = allies.unflatten(-1, (self.allies, -1))  # (...,N-1,F)
        enemies = enemies.unflatten(-1, (self.enemies, -1))  # (...,A-5,F)
        a = self.ally(allies).relu() * (allies[..., :1] > 0)  # health 0: out of sight, or dead
        e = self.enemy(enemies).relu() * (enemies[..., :1] > 0)
        c = self.context(torch.cat([self.own(own).relu(), a.sum(-2), e.sum(-2)], -1))
        query, bias = self.attack(c).split([c.shape[-1], 1], -1)
        attack = (e @ query.unsqueeze(-1)).squeeze(-1) / c.shape[-1] ** 0.5 + bias
        return torch.cat([self.move(c), attack], -1)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Network with two hidden layers and tanh."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.Tanh(),
        nn.Linear(hidden, hidden), nn.Tanh(),
        nn.Linear(hidden, outputs),
    )  # fmt: skip


def sample_actions(policy: Policy, obs, avail, generator: torch.Generator) -> torch.Tensor:
    """Draw one action for every agent.

    Args:
        obs: (...,N,O). avail: (...,N,A), or None if actions are continuous.
    Returns:
        (...,N,A): one-hot, or a sample of the Gaussian (the environment clips it to [-1,1]).
    """
    if not policy.discrete:
        mean, log_std = policy.distribution(obs, avail)
        return mean + log_std.exp() * torch.randn(mean.shape, generator=generator)
    flat = policy.distribution(obs, avail).flatten(0, -2).exp()
    choice = torch.multinomial(flat, 1, generator=generator)  # (rows,1)
    return torch.zeros_like(flat).scatter_(1, choice, 1.0).view(*obs.shape[:-1], -1)


def log_prob_and_entropy(policy: Policy, obs, avail, actions) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi_i(a^i|o^i) and the entropy of pi_i, both (...,N), nats."""
    if policy.discrete:
        log_pi = policy.distribution(obs, avail)
        return (log_pi * actions).sum(-1), -(log_pi.exp() * log_pi).sum(-1)
    mean, log_std = policy.distribution(obs, avail)
    z = (actions - mean) / log_std.exp()
    log_density = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
    return log_density.sum(-1), (log_std + 0.5 + 0.5 * math.log(2 * math.pi)).sum(-1)


@torch.no_grad()
def play(env, policy: Policy, generator: torch.Generator, seed: int) -> dict[str, np.ndarray]:
    """Play one whole episode in each of the environment's E slots.

    Args:
        generator: of the actions. seed: of the environment's reset.
    Returns:
        Arrays obs (T+1,E,N,O), state (T+1,E,S), avail (T+1,E,N,A) or None, actions (T,E,N,A) and
        reward, terminated, won, filled (T,E); filled is True until the slot's episode has ended.
        T is the length of the longest episode.
    """
    keys = ("obs", "state", "avail", "actions", "reward", "terminated", "won", "filled")
    log = {k: [] for k in keys}
    now = env.reset(seed)
    while True:
        for k in ("obs", "state", "avail"):
            log[k].append(getattr(now, k))
        if now.done.all():
            break
        avail = None if now.avail is None else torch.tensor(now.avail)
        actions = sample_actions(policy, torch.tensor(now.obs), avail, generator).numpy()
        filled, now = ~now.done, env.step(actions)
        step = (actions, now.reward, now.terminated, now.won, filled)
        for k, value in zip(keys[3:], step, strict=True):
            log[k].append(value)
    return {k: None if v[0] is None else np.stack(v) for k, v in log.items()}
