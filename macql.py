"""MACQL: decentralised policies and a conservative, centralised critic, both held to the data.

  critic_loss  Eq. (10), (11)  Bellman error + alpha * (value of all actions - of the data's)
  policy_loss  Eq. (12)        lambda * |policy - data|^2 - value of the policy's actions
  MACQL        the learner: actor, its moving average, critic, target critic, two optimisers

    learner = MACQL(Actor(obs_mean, obs_std, action_dim), Critic(obs_mean, obs_std, state_mean,
                    state_std, action_dim))
    metrics = learner.update(batch, is_real, generator)   # `buffer.mix` returns batch and is_real
    actions = learner.ema_actor.greedy(obs, avail)

The critic for discrete actions is a sum over agents of utilities that all see the global state:

  Q(s, a) = sum_i q_i(s, o^i, a^i)        [VDN, Sunehag et al., 2018, with the state in q_i]

It cannot value a combination of actions beyond the sum of its parts. In return, what the paper asks
of Q over the A^N joint actions is exact and costs A*N: the maximum, the expectation under
independent policies and the log-sum-exp, which public code estimates from some 100 random joint
actions. Unavailable actions are left out of all three. For continuous actions Q is one network on
(s, a^1..a^n), and the log-sum-exp is estimated from random actions and the policy's, as in CQL(H).

`actions` is (B,N,A) everywhere: one-hot, continuous in [-1,1], or probabilities, of which the
additive critic returns the expected value.

Departures from the paper; docs/deviations.md has the flags that take them back:
  D5  log-sum-exp over all actions, where Eq. (10) has the policy's expected value.
  D6  the Bellman target follows the policy, where Eq. (11) has the maximum.
  D7  the minimum of two critics in the Bellman target.  D19 a slowly following target critic.
  D30 one of them learns from recorded rows alone.
  D8  imagined rows count in the Bellman error alone and, if asked for, in the value of Eq. (12).
      Eq. (10) prints them where values are pushed down, Eq. (12) in both of its terms; Algorithm 1
      has one sampled batch for everything.
  D4  the value in the Bellman target lies within the data's returns-to-go.
  D12 step sizes fall linearly to zero.  D13 a moving average of the actor is evaluated.
  D14 one actor network for all agents.  D26 the critic learns alone before the policies move.
  D21 the critic predicts, and Eq. (12) weighs, values in a given unit.
  D28 Bellman targets hold the rewards of five steps.
Readings, where the paper leaves a choice: continuous actions are cloned in the mean over the
agents, where Algorithm 1, line 31 gives each agent its own loss; the policy maximises the mean of
the critics (the minimum is for the target alone); a shared actor of discrete actions standardises
with statistics averaged over the agents; with continuous actions the policy stands for the maximum
of Eq. (11).

Sizes: B batch, N agents, O observation, S state, A action, K critics, P stacked networks.
       o (B,N,O)  s (B,S)  a (B,N,A)  r (B,)  avail (B,N,A) or None
"""

import copy
import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F


class StackedLinear(nn.Module):
    """P linear layers as one batched product: (P,R,I) -> (P,R,J)."""

    def __init__(self, stack: int, fan_in: int, fan_out: int):
        super().__init__()
        bound = fan_in**-0.5
        self.weight = nn.Parameter(torch.empty(stack, fan_in, fan_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(stack, 1, fan_out).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


def stacked_mlp(stack: int, *sizes: int) -> nn.Sequential:
    """P multi-layer perceptrons side by side, ReLU between the layers."""
    pairs = [(StackedLinear(stack, i, j), nn.ReLU(inplace=True)) for i, j in pairwise(sizes)]
    return nn.Sequential(*[m for pair in pairs for m in pair][:-1])


class Standardise(nn.Module):
    """(x - mean) / std with the data's statistics; constant columns are only centred."""

    def __init__(self, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", torch.where(std == 0, 1.0, std))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.std


class Actor(nn.Module):
    """Every agent's policy pi_i(o^i) on its own observation alone.

    Args:
        obs_mean, obs_std: (N,O) of the data.
        action_dim: A.
        hidden: width of the two hidden layers.
        discrete: masked softmax, else tanh in [-1,1].
        shared: one network for all agents, which also sees a one-hot agent_id (Deviation D14).
    """

    def __init__(self, obs_mean, obs_std, action_dim, hidden=256, discrete=True, shared=True):
        super().__init__()
        n, o = obs_mean.shape
        self.discrete, self.shared = discrete, shared
        if shared and discrete:  # the columns mean the same for every agent: one scale for all
            obs_mean, obs_std = (x.mean(0, keepdim=True).expand(n, o) for x in (obs_mean, obs_std))
        self.standardise = Standardise(obs_mean, obs_std)
        self.register_buffer("agent_id", torch.eye(n))
        size = o + n if shared else o
        self.net = stacked_mlp(1 if shared else n, size, hidden, hidden, action_dim)

    def logits(self, obs: torch.Tensor) -> torch.Tensor:
        """(B,N,A): the network's output before softmax or tanh."""
        x = self.standardise(obs)  # (B,N,O)
        if self.shared:
            x = torch.cat([x, self.agent_id.expand(len(x), -1, -1)], -1)
            return self.net(x.flatten(0, 1).unsqueeze(0)).view(*obs.shape[:2], -1)
        return self.net(x.transpose(0, 1)).transpose(0, 1)

    def forward(self, obs: torch.Tensor, avail: torch.Tensor | None) -> torch.Tensor:
        """(B,N,A): probabilities, zero for unavailable actions; or continuous actions in [-1,1]."""
        logits = self.logits(obs)
        if not self.discrete:
            return torch.tanh(logits)
        return logits.masked_fill(avail == 0, -torch.inf).softmax(-1)

    @torch.no_grad()
    def greedy(self, obs: torch.Tensor, avail: torch.Tensor | None) -> torch.Tensor:
        """(B,N,A): the most likely action, one-hot, or the continuous action; for evaluation."""
        pi = self(obs, avail)
        return F.one_hot(pi.argmax(-1), pi.shape[-1]).to(pi) if self.discrete else pi

    @torch.no_grad()
    def sample(self, obs, avail, generator: torch.Generator, epsilon: float = 0.0) -> torch.Tensor:
        """(B,N,A): one action of the policy, with exploration.

        Discrete: drawn from the policy, with probability `epsilon` uniformly from the available
        actions. Continuous: Gaussian noise of standard deviation `epsilon` is added.
        """
        pi = self(obs, avail)
        noise = torch.empty_like(pi)
        if not self.discrete:
            return (pi + epsilon * noise.normal_(generator=generator)).clamp(-1, 1)
        pi = (1 - epsilon) * pi + epsilon * avail / avail.sum(-1, keepdim=True)
        # argmax of pi_a / Exp(1) is a with probability pi_a: sampling without a host sync
        choice = (pi / noise.exponential_(generator=generator)).argmax(-1)
        return F.one_hot(choice, pi.shape[-1]).to(pi)


class Critic(nn.Module):
    """K centralised values Q_k(s, a) of the joint action; see the module's docstring.

    Args:
        obs_mean, obs_std (N,O), state_mean, state_std (S,): of the data.
        action_dim: A.
        critics: K, independent networks as one stack.
        value_mean, value_std: what the networks predict is (Q - value_mean) / value_std.
    """

    def __init__(
        self, obs_mean, obs_std, state_mean, state_std, action_dim, hidden=256, discrete=True,
        critics=2, value_mean=0.0, value_std=1.0,
    ):  # fmt: skip
        super().__init__()
        (n, o), s = obs_mean.shape, len(state_mean)
        self.discrete, self.critics = discrete, critics
        for name, value in (("value_mean", value_mean), ("value_std", value_std)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))
        self.standardise_state = Standardise(state_mean, state_std)
        if discrete:
            self.standardise_obs = Standardise(obs_mean, obs_std)
            self.register_buffer("agent_id", torch.eye(n))
            self.from_state = StackedLinear(critics, s, hidden)
            self.from_obs = StackedLinear(critics, o + n, hidden)
            self.net = stacked_mlp(critics, hidden, hidden, action_dim)
        else:
            self.net = stacked_mlp(critics, s + n * action_dim, hidden, hidden, 1)

    def utilities(self, obs: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """q_i(s, o^i, .) of every discrete action: (K,B,N,A)."""
        k, (b, n, _) = self.critics, obs.shape
        s = self.standardise_state(state).expand(k, -1, -1)  # (K,B,S)
        x = torch.cat([self.standardise_obs(obs), self.agent_id.expand(b, -1, -1)], -1)
        x = x.flatten(0, 1).expand(k, -1, -1)  # (K,B*N,O+N)
        # The first layer on [s, o^i, i] as a sum, so that the state's part is computed once
        h = self.from_state(s).unsqueeze(2) + self.from_obs(x).view(k, b, n, -1)  # (K,B,N,hidden)
        q = self.net(h.relu_().flatten(1, 2)).view(k, b, n, -1)
        return self.value_mean / n + self.value_std * q

    def forward(
        self, obs: torch.Tensor, state: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        """Q_k(s, a) (K,B)."""
        if self.discrete:
            return (self.utilities(obs, state) * actions).sum((-2, -1))
        x = torch.cat([self.standardise_state(state), actions.flatten(1)], -1)
        q = self.net(x.expand(self.critics, -1, -1)).squeeze(-1)
        return self.value_mean + self.value_std * q


def action_noise(shape: tuple, generator: torch.Generator, samples: int = 10) -> torch.Tensor:
    """Random numbers for the continuous log-sum-exp: (3,samples,B,N,A), shape = (B,N,A).

    The first third is uniform on [-1,1], the others are standard normal.
    """
    noise = torch.empty(3, samples, *shape, device=generator.device)
    noise[0].uniform_(-1, 1, generator=generator)
    noise[1:].normal_(generator=generator)
    return noise


def data_and_all_values(critic: Critic, batch, actor: Actor, noise: torch.Tensor | None = None):
    """Q_k(s, a) of the data's action, and log sum_a exp Q_k(s, a) over all available ones: (K,B).

    Discrete: exact, because the exponential of a sum of utilities is a product over the agents.
    Continuous: an importance-sampling estimate of the integral over the box [-1,1]. A third of the
    actions is uniform, a third around pi(s), a third around pi(s') (`action_noise`); each counts
    with 1 / the density of this mixture, and with 0 outside of the box. [CQL(H), Kumar et al.,
    2020, divides by the density of the action's own third; that has no finite expectation where
    actions are clipped to the box.]
    """
    if critic.discrete:
        q = critic.utilities(batch.obs, batch.state)  # (K,B,N,A), for both values
        q_all = q.masked_fill(batch.avail == 0, -torch.inf).logsumexp(-1).sum(-1)
        return (q * batch.actions).sum((-2, -1)), q_all
    draws, log_density = draws_and_density(batch, actor, noise, (-2, -1))  # (M,B,N,A), (M,B)
    m = len(draws)
    obs, state = batch.obs.repeat(m, 1, 1), batch.state.repeat(m, 1)
    q = critic(obs, state, draws.flatten(0, 1)).view(-1, m, len(batch.obs))  # (K,M,B)
    q_all = (q - log_density).logsumexp(1) - math.log(m)
    return critic(batch.obs, batch.state, batch.actions), q_all


def draws_and_density(batch, actor: Actor, noise: torch.Tensor, over: tuple[int, ...]):
    """Actions (M,B,N,A) for the log-sum-exp, and the log density of their mixture, infinite where a
    draw is outside of the box; M is three times the samples of `action_noise`.

    Args:
        over: dimensions of an action: (-2, -1) of a joint one, (-1,) of an agent's.
    """
    sigma = 0.2
    with torch.no_grad():
        centres = [actor(obs, None) for obs in (batch.obs, batch.next_obs)]
    draws = torch.cat([noise[0], *(c + sigma * x for c, x in zip(centres, noise[1:], strict=True))])
    scale = math.log(sigma * math.sqrt(2 * math.pi))
    parts = [(-0.5 * ((draws - c) / sigma).square() - scale).sum(over) for c in centres]
    sides = math.prod(draws.shape[k] for k in over)
    parts.append(torch.full_like(parts[0], -sides * math.log(2.0)))
    log_density = torch.stack(parts).logsumexp(0) - math.log(3)
    return draws, log_density.masked_fill((draws.abs() > 1).any(over), torch.inf)


def real_weights(is_real: torch.Tensor) -> torch.Tensor:
    """(B,) weights; the batch mean of a weighted term is the term's mean over the real rows."""
    return is_real / is_real.mean().clamp(min=1e-6)


def critic_loss(
    critic: Critic,
    target: Critic,
    actor: Actor,
    batch,
    is_real: torch.Tensor,
    gamma: float,
    alpha: float,
    noise: torch.Tensor | None = None,
    conservative: str = "logsumexp",
    backup: str = "policy",
    imagined_in: str = "bellman",
    bounds: tuple[float, float] = (-math.inf, math.inf),
    recorded_critic: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Conservative Q-learning on a mixed batch, summed over the K critics.

    Args:
        batch: a `buffer.Batch`; is_real (B,): 1 where a row is of D.
        gamma: discount per step. alpha: weight of the conservative term.
        noise: of `action_noise`, for the continuous log-sum-exp alone.
        conservative: "logsumexp" or, as Eq. (10) prints, "expectation" under the policy.
        backup: next actions by the "policy", or by the "max" of Eq. (11) (discrete actions).
        imagined_in: where imagined rows count: "bellman" and "value" (which differ in
            `policy_loss`), in the Bellman error; "printed", as in Eq. (10), only among the values
            that are pushed down.
        bounds: of the next state's value in the Bellman target.
        recorded_critic: the last of two critics or more has its Bellman error on real rows alone.
    """
    size, real = len(batch.reward), real_weights(is_real)
    with torch.no_grad():
        if backup == "max" and critic.discrete:  # exact: each agent maximises its own utility
            q_next = target.utilities(batch.next_obs, batch.next_state).mean(0)  # (B,N,A)
            best = q_next.masked_fill(batch.next_avail == 0, -torch.inf).argmax(-1)
            next_actions = F.one_hot(best, q_next.shape[-1]).to(q_next)
        else:  # Deviation D6
            next_actions = actor(batch.next_obs, batch.next_avail)
        v_next = target(batch.next_obs, batch.next_state, next_actions).amin(0)  # Deviation D7
        v_next = v_next.clamp(*bounds)  # Deviation D4
        discount = gamma**batch.steps  # Deviation D28: rows lead several steps ahead
        y = batch.reward + discount * (1 - batch.terminated) * v_next  # Eq. (11)
    if conservative == "expectation":
        with torch.no_grad():
            pi = actor(batch.obs, batch.avail)
        q_data = critic(batch.obs, batch.state, batch.actions)  # (K,B)
        q_all = critic(batch.obs, batch.state, pi)
    else:  # Deviation D5
        q_data, q_all = data_and_all_values(critic, batch, actor, noise)
    assert q_data.shape == q_all.shape == (critic.critics, size) and y.shape == (size,)
    printed = imagined_in == "printed"
    all_rows = torch.ones_like(real)
    bellman_rows, pushed_down = (real, all_rows) if printed else (all_rows, real)  # Deviation D8
    of_critic = [bellman_rows] * critic.critics
    if recorded_critic and critic.critics > 1:  # Deviation D30
        of_critic[-1] = real
    td = (q_data - y).square() * torch.stack(of_critic)
    regularisation = (q_all * pushed_down - q_data * real).mean(1).sum()
    bellman = 0.5 * td.mean(1).sum()
    loss = alpha * regularisation + bellman  # Eq. (10)
    parts = {"td": bellman, "data": q_data.mean(), "all": q_all.mean(), "gap": regularisation}
    return loss, {k: v.detach() for k, v in parts.items()}


def action_distance(pi: torch.Tensor, actions: torch.Tensor, discrete: bool) -> torch.Tensor:
    """|pi_i(o^i) - a^i|^2 of Eq. (12), (B,); both arguments are (B,N,A).

    Discrete: summed over the agents, as Q is (Algorithm 1, line 31: a loss each). Continuous: their
    mean.
    """
    distance = (pi - actions).square().sum(-1)  # (B,N)
    return distance.sum(-1) if discrete else distance.mean(-1)


def policy_loss(
    actor: Actor,
    critic: Critic | None,
    batch,
    is_real: torch.Tensor,
    bc_lambda: float,
    imagined_in: str = "bellman",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the policies minimise: minus the value, plus the distance to the data's actions.

    Call `.backward(inputs=list(actor.parameters()))`, so that the critic gets no gradient.

    Args:
        critic: None leaves behaviour cloning.
        is_real (B,): 1 where a row is of D.
        bc_lambda: lambda, weight of cloning against values in units of the critic's value_std.
        imagined_in: "bellman" takes both terms on real rows alone, "value" the value on all rows,
            "printed" both terms on all rows, as Eq. (12).
    """
    size, pi = len(batch.reward), actor(batch.obs, batch.avail)  # (B,N,A)
    real = real_weights(is_real)
    cloned = 1.0 if imagined_in == "printed" else real  # Deviation D8
    improved = real if imagined_in == "bellman" else 1.0
    distance = action_distance(pi, batch.actions, actor.discrete)  # (B,)
    value = torch.zeros_like(distance)
    if critic is not None:
        # Deviation D21: lambda then has the same effect at any scale of rewards
        value = critic(batch.obs, batch.state, pi).mean(0) / critic.value_std  # (B,)
    assert value.shape == distance.shape == (size,)
    cloning, value = (distance * cloned).mean(), (value * improved).mean()
    # The paper prints what is maximised; this is minimised.
    # Deviation D17: bc_lambda is below the paper's 1
    loss = bc_lambda * cloning - value  # Eq. (12)
    return loss, {"q": value.detach(), "bc": cloning.detach()}


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move every parameter of target by the share tau towards source's."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One gradient step on the optimizer's parameters; no other parameter gets a gradient."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)
    optimizer.step()


def linear_decay(
    optimizer: torch.optim.Optimizer, updates: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The step size falls linearly to zero in `updates` calls of `.step()`; 0 keeps it constant."""
    # Deviation D12
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: max(0.0, 1 - k / updates) if updates else 1.0
    )


class MACQL:
    """The learner of Algorithm 1, lines 30-31: call `update` once for each sampled batch.

    Args:
        actor: the policies; `ema_actor`, a moving average of its weights, is what to evaluate.
        critic: None leaves behaviour cloning.
        lr: Adam's step size of actor and critic.
        decay_updates: updates in which it falls linearly to zero, the policies' from their first
            update on; 0 keeps it constant.
        tau: share by which the target critic follows per update.
        ema_decay: decay per update of the moving average; 0 evaluates the latest actor.
        gamma, cql_alpha, conservative, backup, bounds, recorded_critic: see `critic_loss`.
        imagined_in: see `critic_loss` and `policy_loss`.
        bc_lambda: see `policy_loss`.
        policy_waits: updates in which the critic alone learns and the policies stay as they are.
    """

    compilable = ("critic_loss", "policy_loss")  # functions of tensors alone, for torch.compile

    def __init__(
        self, actor: Actor, critic: Critic | None, lr=1e-3, decay_updates=0, tau=0.05,
        ema_decay=0.995, gamma=0.99, cql_alpha=0.1, conservative="logsumexp", backup="policy",
        imagined_in="bellman", bounds=(-math.inf, math.inf), bc_lambda=0.1, policy_waits=0,
        recorded_critic=False,
    ):  # fmt: skip
        self.actor, self.ema_actor = actor, copy.deepcopy(actor)
        self.critic, self.critic_target = critic, copy.deepcopy(critic)
        self.tau, self.ema_decay, self.conservative = tau, ema_decay, conservative
        self.policy_waits = policy_waits if critic is not None else 0
        self.critic_loss = partial(
            critic_loss, gamma=gamma, alpha=cql_alpha, conservative=conservative, backup=backup,
            imagined_in=imagined_in, bounds=bounds, recorded_critic=recorded_critic,
        )  # fmt: skip
        self.policy_loss = partial(policy_loss, bc_lambda=bc_lambda, imagined_in=imagined_in)
        self.optimizers, self.schedules = {}, {}
        waiting = {"actor": self.policy_waits, "critic": 0}
        for name, network in (("actor", actor), ("critic", critic)):
            if network is not None:
                optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)
                self.optimizers[name] = optimizer
                self.schedules[name] = linear_decay(
                    optimizer, max(0, decay_updates - waiting[name])
                )

    def update(self, batch, is_real, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """One gradient step on the critic, then, after `policy_waits` updates, one on the policies.

        Args:
            batch: a `buffer.Batch` of real and imagined rows. is_real (B,): 1 where a row is of D.
            generator: of the random actions in the continuous log-sum-exp.
        Returns:
            metrics as 0-d tensors: q_td, q_data, q_all, q_gap; with a step on the policies
            pi_q, pi_bc.
        """
        actor, critic, metrics = self.actor, self.critic, {}
        if critic is not None:
            noise = None
            if self.conservative == "logsumexp" and not critic.discrete:
                noise = action_noise(batch.actions.shape, generator)
            loss, parts = self.critic_loss(
                critic, self.critic_target, actor, batch, is_real, noise=noise
            )
            descend(self.optimizers["critic"], loss)
            self.schedules["critic"].step()
            soft_update(self.critic_target, critic, self.tau)  # Deviation D19
            metrics |= {f"q_{name}": value for name, value in parts.items()}
            updates = self.schedules["critic"].last_epoch  # counted there, so checkpoints have it
            if updates <= self.policy_waits:  # Deviation D26
                return metrics
        loss, parts = self.policy_loss(actor, critic, batch, is_real)
        descend(self.optimizers["actor"], loss)
        self.schedules["actor"].step()
        soft_update(self.ema_actor, actor, 1 - self.ema_decay)  # Deviation D13
        return metrics | {f"pi_{name}": value for name, value in parts.items()}

    def parts(self) -> dict:
        """Everything with a state: networks, optimisers, schedules of the step sizes."""
        parts = {"actor": self.actor, "ema_actor": self.ema_actor}
        if self.critic is not None:
            parts |= {"critic": self.critic, "critic_target": self.critic_target}
        parts |= {f"{name}_optimizer": part for name, part in self.optimizers.items()}
        return parts | {f"{name}_schedule": part for name, part in self.schedules.items()}

    def state_dict(self) -> dict:
        """One dict of state_dicts, for a checkpoint."""
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned for a learner of the same settings."""
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


def _self_check():
    """A bandit of two agents with four actions each, of which the data only have the first two.

    A joint action pays the sum of the chosen actions' numbers. Without the conservative term the
    critic extrapolates to the unseen actions; with it they must be worth less than the seen ones.
    """
    from types import SimpleNamespace

    size, n, actions, results = 256, 2, 4, {}
    print("               actions      0      1 seen,  2      3 unseen")
    for alpha in (0.0, 1.0):
        torch.manual_seed(0)
        g = torch.Generator().manual_seed(0)
        zero, one = torch.zeros(n, 1), torch.ones(n, 1)
        actor = Actor(zero, one, actions, hidden=32)
        critic = Critic(zero, one, zero[0], one[0], actions, hidden=32)
        learner = MACQL(actor, critic, lr=3e-3, cql_alpha=alpha, bc_lambda=1.0)
        obs, state, avail = torch.zeros(size, n, 1), torch.zeros(size, 1), torch.ones(size, n, 4)
        for _ in range(300):
            choice = torch.randint(2, (size, n), generator=g)
            batch = SimpleNamespace(
                obs=obs, state=state, avail=avail, actions=F.one_hot(choice, actions).float(),
                reward=choice.sum(-1).float(), next_obs=obs, next_state=state, next_avail=avail,
                terminated=torch.ones(size), steps=torch.ones(size),
            )  # fmt: skip
            learner.update(batch, torch.ones(size), g)
        q = critic.utilities(obs[:1], state[:1]).mean(0)[0].mean(0).tolist()  # (A,)
        pi = actor(obs[:1], avail[:1])[0].mean(0).tolist()  # (A,)
        results[alpha] = q
        utilities, policy = (" ".join(f"{x:6.2f}" for x in values) for values in (q, pi))
        print(f"alpha {alpha}: utilities {utilities}   policy {policy}")
    seen, unseen = results[1.0][:2], results[1.0][2:]
    assert min(seen) > max(unseen), "alpha must put the unseen actions below the seen ones"
    assert max(unseen) < min(results[0.0][2:]), "alpha must lower the unseen actions"
    assert seen[1] > seen[0], "and keep the order of the seen ones"


if __name__ == "__main__":
    _self_check()
