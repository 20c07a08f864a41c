"""MACQL: decentralised policies and a conservative, centralised critic, both held to the data.

  critic_loss  Eq. (10), (11)  Bellman error + alpha * (value of all actions - of the data's)
  policy_loss  Eq. (12)        lambda * |policy - data|^2 - value of the policy's actions

The critic for discrete actions is a sum over agents of utilities that all see the global state:

  Q(s, a) = sum_i q_i(s, o^i, a^i)        [VDN, Sunehag et al., 2018, with the state in q_i]

It cannot say that two actions are good only together, but everything the paper asks of Q over
the A^N joint actions is then exact and costs A*N instead: their maximum, their expectation under
independent policies, and their log-sum-exp, which public code estimates from some 100 random joint
actions. Forbidden actions are left out of all three. For continuous actions Q is one network on
(s, a^1..a^n), and the log-sum-exp is estimated from random actions and the policy's, as in CQL(H).

`actions` is (B,N,A) everywhere: one-hot, torques, or probabilities (whose value is an expectation).

Departures from the paper's letter; each has a switch (README, Deviations):
  D5  log-sum-exp over actions instead of the policy's expected value in the conservative term.
  D6  the Bellman target follows the policy instead of the maximum.
  D7  the lesser of two critics in the Bellman target.
  D8  the Bellman error on imagined rows too (Eq. (10) names D, Algorithm 1 the drawn batch).
  D9  behaviour cloning on real rows only: on imagined rows the policy would clone itself.

Sizes: B batch, N agents, O observation, S state, A action, K critics (2), P stacked networks.
       o (B,N,O)  s (B,S)  a (B,N,A)  r (B,)  avail (B,N,A) or None
"""

import math

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
    layers = [StackedLinear(stack, i, j) for i, j in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU(inplace=True))][:-1])


class Standardise(nn.Module):
    """(x - mean) / std with the data's statistics; columns that never vary stay as they are."""

    def __init__(self, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", torch.where(std < 1e-3, torch.ones_like(std), std))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.std


class Actor(nn.Module):
    """Every agent's policy pi_i(o^i); it sees nothing but its own observation (and its number).

    Args:
        obs_mean, obs_std: (N,O) of the data.
        action_dim: A.
        discrete: masked softmax, else tanh in [-1,1].
        shared: one network for all agents, told apart by a one-hot number (Deviation D14).
    """

    def __init__(self, obs_mean, obs_std, action_dim, hidden=256, discrete=True, shared=True):
        super().__init__()
        n, o = obs_mean.shape
        self.discrete, self.shared = discrete, shared
        self.standardise = Standardise(obs_mean, obs_std)
        self.register_buffer("number", torch.eye(n))
        size = o + n if shared else o
        self.net = stacked_mlp(1 if shared else n, size, hidden, hidden, action_dim)

    def logits(self, obs: torch.Tensor) -> torch.Tensor:
        x = self.standardise(obs)  # (B,N,O)
        if self.shared:
            x = torch.cat([x, self.number.expand(len(x), -1, -1)], -1)
            return self.net(x.flatten(0, 1).unsqueeze(0)).view(*obs.shape[:2], -1)
        return self.net(x.transpose(0, 1)).transpose(0, 1)

    def forward(self, obs: torch.Tensor, avail: torch.Tensor | None) -> torch.Tensor:
        """(B,N,A): probabilities, zero where an action is forbidden; or actions in [-1,1]."""
        logits = self.logits(obs)
        if not self.discrete:
            return torch.tanh(logits)
        return logits.masked_fill(avail == 0, -torch.inf).softmax(-1)

    @torch.no_grad()
    def greedy(self, obs: torch.Tensor, avail: torch.Tensor | None) -> torch.Tensor:
        """(B,N,A): the policy as it is evaluated: its likeliest action, one-hot, or its action."""
        pi = self(obs, avail)
        return F.one_hot(pi.argmax(-1), pi.shape[-1]).to(pi) if self.discrete else pi

    def noise(self, shape: tuple, generator: torch.Generator) -> torch.Tensor:
        """Random numbers for `explore`: Exp(1) where actions are discrete, else normal."""
        empty = torch.empty(shape, device=generator.device)
        return (empty.exponential_ if self.discrete else empty.normal_)(generator=generator)

    @torch.no_grad()
    def explore(self, obs, avail, noise: torch.Tensor, epsilon: float = 0.1) -> torch.Tensor:
        """(B,N,A): one action drawn from the policy, with a share `epsilon` of exploration.

        Discrete: with probability epsilon any allowed action, all alike. Continuous: Gaussian noise
        of standard deviation epsilon. `noise` (B,N,A) is of the method with that name.
        """
        pi = self(obs, avail)
        if not self.discrete:
            return (pi + epsilon * noise).clamp(-1, 1)
        # Deviation D16: imagined rows are worth most where the data have none
        pi = (1 - epsilon) * pi + epsilon * avail / avail.sum(-1, keepdim=True)
        # The largest pi_a / Exp(1) falls on a with probability pi_a: a draw without a host sync
        return F.one_hot((pi / noise).argmax(-1), pi.shape[-1]).to(pi)


class Critic(nn.Module):
    """K centralised values Q_k(s, a) of the joint action; see the module's docstring.

    Args:
        obs_mean, obs_std (N,O), state_mean, state_std (S,): of the data.
        action_dim: A.
        critics: K, independent networks as one stack.
    """

    def __init__(
        self,
        obs_mean,
        obs_std,
        state_mean,
        state_std,
        action_dim,
        hidden=256,
        discrete=True,
        critics=2,
    ):
        super().__init__()
        (n, o), s = obs_mean.shape, len(state_mean)
        self.discrete, self.critics = discrete, critics
        self.standardise_obs = Standardise(obs_mean, obs_std)
        self.standardise_state = Standardise(state_mean, state_std)
        self.register_buffer("number", torch.eye(n))
        if discrete:
            self.net = stacked_mlp(critics, s + o + n, hidden, hidden, action_dim)
        else:
            self.net = stacked_mlp(critics, s + n * action_dim, hidden, hidden, 1)

    def utilities(self, obs: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """q_i(s, o^i, .) of every discrete action: (K,B,N,A)."""
        b, n, _ = obs.shape
        s = self.standardise_state(state).unsqueeze(1).expand(-1, n, -1)
        x = torch.cat([s, self.standardise_obs(obs), self.number.expand(b, -1, -1)], -1)
        x = x.flatten(0, 1).expand(self.critics, -1, -1)  # (K,B*N,S+O+N)
        return self.net(x).view(self.critics, b, n, -1)

    def forward(
        self, obs: torch.Tensor, state: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        """Q_k(s, a) (K,B)."""
        if self.discrete:
            return (self.utilities(obs, state) * actions).sum((-2, -1))
        x = torch.cat([self.standardise_state(state), actions.flatten(1)], -1)
        return self.net(x.expand(self.critics, -1, -1)).squeeze(-1)


def random_actions(shape: tuple, generator: torch.Generator, samples: int = 10) -> torch.Tensor:
    """Random numbers for the continuous log-sum-exp: (3,samples,B,N,A), shape = (B,N,A).

    The first third is uniform on [-1,1], the others are normal.
    """
    draws = torch.empty(3, samples, *shape, device=generator.device)
    draws[0].uniform_(-1, 1, generator=generator)
    draws[1:].normal_(generator=generator)
    return draws


def data_and_any(critic: Critic, batch, actor: Actor, draws: torch.Tensor | None = None):
    """Q_k(s, a) of the data's action, and log sum_a exp Q_k(s, a) over all allowed ones: (K,B).

    Discrete: exact, since exp of a sum of utilities factorises over the agents. Continuous: from
    the `draws` of `random_actions`: a third uniform, a third of pi(s), a third of pi(s') with
    noise, each weighted with its density [Kumar et al., 2020, CQL(H); multi-agent in CFCQL].
    """
    if critic.discrete:
        q = critic.utilities(batch.obs, batch.state)  # (K,B,N,A), for both values
        every = q.masked_fill(batch.avail == 0, -torch.inf).logsumexp(-1).sum(-1)
        return (q * batch.actions).sum((-2, -1)), every
    sigma, (b, n, a) = 0.2, batch.actions.shape
    uniform, *noises = draws  # (samples,B,N,A) each
    volume = torch.full_like(uniform[..., 0, 0], -n * a * math.log(2.0))  # log (1/2)^(n a)
    many, log_density = [uniform], [volume]
    for obs, noise in zip((batch.obs, batch.next_obs), noises, strict=True):
        with torch.no_grad():
            many.append((actor(obs, None) + sigma * noise).clamp(-1, 1))
        log_normal = -0.5 * noise.square() - math.log(sigma * math.sqrt(2 * math.pi))
        log_density.append(log_normal.sum((-2, -1)))
    many, log_density = torch.cat(many), torch.cat(log_density)  # (3 samples,B,N,A), (3 samples,B)
    m = len(many)
    obs, state = batch.obs.repeat(m, 1, 1), batch.state.repeat(m, 1)
    q = critic(obs, state, many.flatten(0, 1)).view(-1, m, b)  # (K,3 samples,B)
    every = (q - log_density).logsumexp(1) - math.log(m)
    return critic(batch.obs, batch.state, batch.actions), every


def over_real_rows(is_real: torch.Tensor, real_share: float | None) -> torch.Tensor:
    """(B,) weights whose mean with a term is the term's mean over the rows of D.

    real_share: expected share of such rows where a coin decides for whole batches, so that terms on
        D keep their weight on average; None: this batch's own share.
    """
    share = is_real.mean().clamp(min=1e-6) if real_share is None else max(real_share, 1e-6)
    return is_real / share


def critic_loss(
    critic: Critic,
    target: Critic,
    actor: Actor,
    batch,
    is_real: torch.Tensor,
    gamma: float,
    alpha: float,
    draws: torch.Tensor | None = None,
    conservative: str = "logsumexp",
    conservative_on: str = "both",
    backup: str = "policy",
    bellman_on: str = "both",
    real_share: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Conservative Q-learning on a mixed batch, summed over the K critics.

    Args:
        batch: a `buffer.Batch`; is_real (B,): 1 where a row is of D.
        gamma: discount per step. alpha: weight of the conservative term.
        draws: of `random_actions`, for the continuous log-sum-exp alone.
        conservative: "logsumexp" or, as Eq. (10) prints, "expectation" under the policy.
        conservative_on: values are pushed down on the states of "both" (Eq. (10)) or "real" rows.
        backup: next actions by the "policy", or by the "max" of Eq. (11).
        bellman_on: rows of "both" (Algorithm 1) or of "real" data alone (Eq. (10)).
        real_share: see `over_real_rows`.
    """
    size, real = len(batch.reward), over_real_rows(is_real, real_share)
    with torch.no_grad():
        if backup == "max" and critic.discrete:  # exact: each agent maximises its own utility
            q_next = target.utilities(batch.next_obs, batch.next_state).mean(0)  # (B,N,A)
            best = q_next.masked_fill(batch.next_avail == 0, -torch.inf).argmax(-1)
            next_actions = F.one_hot(best, q_next.shape[-1]).to(q_next)
        else:  # Deviation D6; continuous: the policy is what maximises Q
            next_actions = actor(batch.next_obs, batch.next_avail)
        v_next = target(batch.next_obs, batch.next_state, next_actions).amin(0)  # Deviation D7
        y = batch.reward + gamma * (1 - batch.terminated) * v_next  # Eq. (11)
    if conservative == "expectation":  # Eq. (10) as printed; Deviation D5 is the log-sum-exp
        with torch.no_grad():
            pi = actor(batch.obs, batch.avail)
        q_data = critic(batch.obs, batch.state, batch.actions)  # (K,B)
        q_any = critic(batch.obs, batch.state, pi)
    else:
        q_data, q_any = data_and_any(critic, batch, actor, draws)
    assert q_data.shape == q_any.shape == (critic.critics, size) and y.shape == (size,)
    pushed_down = q_any * (real if conservative_on == "real" else 1.0)
    td = (q_data - y).square() * (real if bellman_on == "real" else 1.0)  # Deviation D8
    regularisation = (pushed_down - q_data * real).mean(1).sum()
    bellman = 0.5 * td.mean(1).sum()
    loss = alpha * regularisation + bellman  # Eq. (10)
    parts = {"td": bellman, "data": q_data.mean(), "any": q_any.mean(), "gap": regularisation}
    return loss, {k: v.detach() for k, v in parts.items()}


def policy_loss(
    actor: Actor,
    critic: Critic | None,
    batch,
    is_real: torch.Tensor,
    bc_lambda: float,
    normalise_q: bool = False,
    bc_on: str = "real",
    real_share: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the policies minimise: minus the value, plus the distance to the data's actions.

    Call `.backward(inputs=list(actor.parameters()))`: the critic takes no part in this step.

    Args:
        critic: None leaves behaviour cloning.
        is_real (B,): 1 where a row is of D.
        bc_lambda: lambda, weight of cloning.
        normalise_q: divide the value by its mean magnitude, as TD3+BC does.
        bc_on: clone the rows of "both" (Eq. (12)) or of "real" data alone.
        real_share: see `over_real_rows`.
    """
    size, pi = len(batch.reward), actor(batch.obs, batch.avail)  # (B,N,A)
    real = over_real_rows(is_real, real_share)
    distance = (pi - batch.actions).square().sum(-1).mean(-1)  # (B,) |pi_i(o^i) - a^i|^2
    value = torch.zeros_like(distance)
    if critic is not None:
        value = critic(batch.obs, batch.state, pi).mean(0)  # (B,)
        if normalise_q:
            # Deviation D21: lambda then weighs alike, whatever the scale of the rewards
            value = value / value.detach().abs().mean().clamp(min=1e-6)
    assert value.shape == distance.shape == (size,)
    cloning = (distance * (real if bc_on == "real" else 1.0)).mean()  # Deviation D9
    # The paper prints what is maximised; this is minimised.
    loss = bc_lambda * cloning - value.mean()  # Eq. (12)
    return loss, {"q": value.mean().detach(), "bc": cloning.detach()}


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move every parameter of target by the share tau towards source's."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def _self_check():
    """A bandit of two agents with four actions each; the data never try the last two.

    A joint action pays the sum of the chosen actions' numbers. Without the conservative
    term the critic extrapolates freely to the unseen actions; with it they must be worth less.
    """
    from types import SimpleNamespace

    size, n, actions = 256, 2, 4
    results = {}
    for alpha in (0.0, 1.0):
        torch.manual_seed(0)
        g = torch.Generator().manual_seed(0)
        zero, one = torch.zeros(n, 1), torch.ones(n, 1)
        actor = Actor(zero, one, actions, hidden=32)
        critic = Critic(zero, one, zero[0], one[0], actions, hidden=32)
        target = Critic(zero, one, zero[0], one[0], actions, hidden=32)
        optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
        actor_optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3)
        every = torch.ones(size, n, actions)
        for _ in range(300):
            choice = torch.randint(2, (size, n), generator=g)
            batch = SimpleNamespace(
                obs=torch.zeros(size, n, 1), state=torch.zeros(size, 1), avail=every,
                actions=F.one_hot(choice, actions).float(), reward=choice.sum(-1).float(),
                next_obs=torch.zeros(size, n, 1), next_state=torch.zeros(size, 1),
                next_avail=every, terminated=torch.ones(size),
            )  # fmt: skip
            real = torch.ones(size)
            loss, _ = critic_loss(critic, target, actor, batch, real, 0.99, alpha)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss, _ = policy_loss(actor, critic, batch, real, bc_lambda=1.0)
            actor_optimizer.zero_grad()
            loss.backward(inputs=list(actor.parameters()))
            actor_optimizer.step()
        q = critic.utilities(batch.obs[:1], batch.state[:1]).mean(0)[0].mean(0)  # (A,)
        pi = actor(batch.obs[:1], every[:1])[0].mean(0)  # (A,)
        results[alpha] = q.tolist()
        print(
            f"alpha {alpha}: utilities "
            + " ".join(f"{v:6.2f}" for v in q.tolist())
            + "   policy "
            + " ".join(f"{v:.2f}" for v in pi.tolist())
        )
    print("               actions      0      1 seen,  2      3 unseen")
    seen, unseen = results[1.0][:2], results[1.0][2:]
    assert min(seen) > max(unseen), "alpha must put the unseen actions below the seen ones"
    assert max(unseen) < min(results[0.0][2:]), "alpha must lower the unseen actions"
    assert seen[1] > seen[0], "and leave the order of the seen ones"


if __name__ == "__main__":
    _self_check()
