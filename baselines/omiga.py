"""OMIGA: every agent clones its good actions more than its bad ones [Wang et al., 2023].

The team's value is a weighted sum of the agents' values. To stay near the data as a team is then to
stay near them agent by agent, with the same weights. All values are learned from recorded actions
alone: no loss asks for the value of another action.

  Q_tot(s, a) = sum_i w_i(s) Q_i(o^i, a^i) + b(s)      V_tot(s) = sum_i w_i(s) V_i(o^i) + b(s)
  z_i         = w_i(s) (Q_i(o^i, a^i) - V_i(o^i)) / alpha, with w_i(s) >= 0

  q_loss       (r + gamma V_tot(s') - Q_tot(s, a))^2   moves Q_i, w_i, b
  v_loss       exp(z_i) + w_i(s) V_i(o^i) / alpha      moves V_i, until E[exp(z_i)] = 1
  policy_loss  -exp(z_i) log pi_i(a^i | o^i)           moves pi_i

V_tot(s') and, in z_i and v_loss, Q_i and w_i are of target networks, which follow slowly.

Departures: the mixer sees the state, where the code has all agents' vectors side by side; inputs
are standardised with the data's statistics; log pi_i is over the available actions, in the code
over all. Continuous actions: pi_i is a Gaussian of fixed variance around the actor's tanh action,
so policy_loss is the squared distance weighted by exp(z_i); the code's Gaussian is before the tanh
and learns its variance. Both act by the mean. As with all methods here, the policy starts from the
clone (--warm-start), targets hold --n-step rewards, step sizes fall, a moving average of the actor
is evaluated, a time limit ends no value and none is bounded by the data's returns (D4), the code's
10^6 updates (robots) are --updates, so that its targets have to follow faster. Values are not in
units of the data's returns (D21), which on robots MACQL has here. Imagined rows, if there are any,
are used like recorded ones.

Source: https://github.com/ZhengYinan-AIR/OMIGA at 39851c0; for StarCraft its branch SMAC.
Sizes: B batch, N agents, O observation, S state, A action.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from baselines import run
from buffer import Batch
from macql import MACQL, Actor, Standardise, descend, linear_decay, soft_update, stacked_mlp

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]  # a scalar; 0-d parts without gradient


@dataclass
class Args(train.Args):
    """OMIGA: every agent clones its good actions more than its bad ones."""

    NO_EFFECT: ClassVar = ("critic", "critics", "recorded_critic", "cql_alpha", "conservative",
                           "backup", "imagined_rows", "bc_lambda")  # fmt: skip

    synthetic_fraction: float = 0.0
    """share of imagined rows; more than 0 puts OMIGA on LOGO's world model [ours]"""
    critic_first: float = 0.0
    """share of the updates before the first rollout and evaluation; no policy waits [ours]"""
    lr: float = 5e-4
    """Adam's step size for every network [the code]"""
    tau: float = 0.05
    """share by which the target networks follow per update [ours; the code: 0.005, for 100 times as
    many updates on robots, and some 5 times on StarCraft]"""
    alpha: float = 10.0
    """alpha: how close to the data to stay; a large one leaves cloning [the code]"""
    z_clip: float = 10.0
    """bound of |z_i| [the code]"""
    grad_clip: float = 1.0
    """largest norm of each gradient: of Q_i with w_i and b, of V_i, of pi [the code]"""


class Values(nn.Module):
    """Q_i and V_i, one network each for all agents, w_i and b. Arguments as of `macql.Critic`."""

    def __init__(
        self, obs_mean, obs_std, state_mean, state_std, action_dim, hidden=256, discrete=True,
        mixer_hidden=64,  # as in the code
    ):  # fmt: skip
        super().__init__()
        (n, o), self.discrete = obs_mean.shape, discrete
        self.standardise_obs = Standardise(obs_mean, obs_std)
        self.standardise_state = Standardise(state_mean, state_std)
        self.register_buffer("agent_id", torch.eye(n))
        action_in, q_out = (0, action_dim) if discrete else (action_dim, 1)
        self.q_net = stacked_mlp(1, o + n + action_in, hidden, hidden, q_out)
        self.v_net = stacked_mlp(1, o + n, hidden, hidden, 1)
        self.mixer = stacked_mlp(1, len(state_mean), mixer_hidden, n + 1)

    def of_agents(self, net: nn.Module, obs: torch.Tensor, *actions) -> torch.Tensor:
        """The network's outputs (B,N,J) on [o^i, i, a^i]."""
        ids = self.agent_id.expand(len(obs), -1, -1)
        x = torch.cat([self.standardise_obs(obs), ids, *actions], -1)
        return net(x.flatten(0, 1).unsqueeze(0)).view(*obs.shape[:2], -1)

    def q(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q_i(o^i, a^i) (B,N); of probabilities over discrete actions the expected value."""
        if self.discrete:
            return (self.of_agents(self.q_net, obs) * actions).sum(-1)
        return self.of_agents(self.q_net, obs, actions).squeeze(-1)

    def v(self, obs: torch.Tensor) -> torch.Tensor:
        """V_i(o^i) (B,N)."""
        return self.of_agents(self.v_net, obs).squeeze(-1)

    def weights(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """w_i(s) >= 0 (B,N) and b(s) (B,)."""
        out = self.mixer(self.standardise_state(state).unsqueeze(0)).squeeze(0)  # (B,N+1)
        return out[:, :-1].abs(), out[:, -1]

    def total(self, of_agents: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The team's value (B,) from the agents' (B,N): Q_tot from Q_i, V_tot from V_i."""
        w, b = self.weights(state)
        return (w * of_agents).sum(-1) + b

    def forward(self, obs, state, actions) -> torch.Tensor:
        """Q_tot(s, a) (B,)."""
        return self.total(self.q(obs, actions), state)


def q_loss(values: Values, target: Values, batch: Batch, gamma: float) -> Loss:
    """Bellman error of Q_tot on a `buffer.Batch`; V_tot(s') is of the target networks."""
    with torch.no_grad():
        v_next = target.total(target.v(batch.next_obs), batch.next_state)
        y = batch.reward + gamma**batch.steps * (1 - batch.terminated) * v_next
    q = values(batch.obs, batch.state, batch.actions)
    assert q.shape == y.shape == batch.reward.shape
    loss = (q - y).square().mean()  # OMIGA's loss of Q_i, w_i and b
    return loss, {"q_td": loss.detach(), "q_data": q.mean().detach()}


def advantages(values: Values, target: Values, batch: Batch, alpha: float, z_clip: float):
    """z_i of the batch's actions, the target's w_i, and V_i, (B,N) each; gradients reach V_i."""
    v = values.v(batch.obs)
    with torch.no_grad():
        w, _ = target.weights(batch.state)
        q = target.q(batch.obs, batch.actions)
    assert q.shape == v.shape == w.shape
    return (w * (q - v) / alpha).clamp(-z_clip, z_clip), w, v


def v_loss(z: torch.Tensor, w: torch.Tensor, v: torch.Tensor, alpha: float) -> Loss:
    """What V_i minimises, from what `advantages` returns; divided by e^m, lest e^z be large."""
    m = z.detach().amax().clamp(min=-1.0)
    loss = (torch.exp(z - m) + torch.exp(-m) * w * v / alpha).mean()  # OMIGA's loss of V_i
    return loss, {"v_loss": loss.detach(), "v_mean": v.mean().detach()}


def policy_loss(actor: Actor, batch: Batch, weights: torch.Tensor) -> Loss:
    """Cloning with weights (B,N) = exp(z_i): -log pi_i, or the distance of continuous actions."""
    if actor.discrete:
        logits = actor.logits(batch.obs).masked_fill(batch.avail == 0, -torch.inf)
        taken = batch.actions.argmax(-1, keepdim=True)  # a product would have 0 * inf
        distance = -logits.log_softmax(-1).gather(-1, taken).squeeze(-1)
    else:
        distance = (actor(batch.obs, None) - batch.actions).square().sum(-1)
    assert distance.shape == weights.shape
    loss = (weights * distance).mean()  # OMIGA's loss of pi_i
    share = weights.mean().square() / weights.square().mean()
    return loss, {"pi_loss": loss.detach(), "pi_weight": weights.mean(), "pi_share": share}


def losses(values, target, actor, batch, gamma: float, alpha: float, z_clip: float) -> Loss:
    """The sum of the three losses; one step on it is a step on each, as they share no parameter."""
    of_q, q_parts = q_loss(values, target, batch, gamma)
    z, w, v = advantages(values, target, batch, alpha, z_clip)
    of_v, v_parts = v_loss(z, w, v, alpha)
    of_pi, pi_parts = policy_loss(actor, batch, z.detach().exp())
    return of_q + of_v + of_pi, q_parts | v_parts | pi_parts


def cut_gradients(optimizer: torch.optim.Optimizer, *_, norm: float) -> None:
    """Before a step: scale down every group's gradient that is longer than `norm`."""
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], norm)


class OMIGA:
    """The learner: call `update` once for each sampled batch.

    Args:
        values: Q_i, V_i, w_i and b; as `critic` it tells a run's report what a policy is worth.
        tau, alpha, z_clip, grad_clip: see `Args`. The others: see `macql.MACQL`.
    """

    compilable = ("losses",)  # a function of tensors alone, for torch.compile

    def __init__(
        self, actor: Actor, values: Values, lr=5e-4, decay_updates=0, tau=0.005, ema_decay=0.995,
        gamma=0.99, alpha=10.0, z_clip=10.0, grad_clip=1.0,
    ):  # fmt: skip
        self.actor, self.ema_actor = actor, copy.deepcopy(actor)
        self.critic, self.target = values, copy.deepcopy(values)
        self.tau, self.ema_decay = tau, ema_decay
        self.losses = partial(losses, gamma=gamma, alpha=alpha, z_clip=z_clip)
        nets = (nn.ModuleList([values.q_net, values.mixer]), values.v_net, actor)
        groups = [{"params": list(net.parameters())} for net in nets]
        self.optimizer = torch.optim.Adam(groups, lr=lr, fused=True)
        self.optimizer.register_step_pre_hook(partial(cut_gradients, norm=grad_clip))
        self.schedule = linear_decay(self.optimizer, decay_updates)

    def update(self, batch, is_real, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """One gradient step on all networks; all rows count alike, and nothing is drawn.

        Returns:
            0-d tensors: q_td, q_data (mean Q_tot), v_loss, v_mean (of V_i), pi_loss, pi_weight
            (mean exp(z_i): 1 where V_i is exact), pi_share (1 = all rows are cloned alike).
        """
        loss, metrics = self.losses(self.critic, self.target, self.actor, batch)
        descend(self.optimizer, loss)
        soft_update(self.target, self.critic, self.tau)
        soft_update(self.ema_actor, self.actor, 1 - self.ema_decay)
        self.schedule.step()
        return metrics

    def parts(self) -> dict:
        names = ("actor", "ema_actor", "critic", "target", "optimizer", "schedule")
        return {name: getattr(self, name) for name in names}

    state_dict, load_state_dict = MACQL.state_dict, MACQL.load_state_dict  # of parts()


def make_learner(args: Args, spec, data) -> OMIGA:
    """OMIGA on this task's data, on the data's device; ValueError where z_i would be infinite."""
    if args.alpha == 0:
        raise ValueError("--alpha is 0: give more, such as 1; a large one leaves cloning.")
    x, sizes = data.statistics(), (spec.action_dim, args.hidden, spec.discrete)
    obs, state = (x["obs_mean"], x["obs_std"]), (x["state_mean"], x["state_std"])
    actor = Actor(*obs, *sizes, args.shared_actor).to(data.obs.device)
    values = Values(*obs, *state, *sizes).to(data.obs.device)
    return OMIGA(
        actor, values, args.lr, args.updates, args.tau, gamma=args.gamma,
        alpha=args.alpha, z_clip=args.z_clip, grad_clip=args.grad_clip,
    )  # fmt: skip


def _self_check():
    """A bandit of two agents, which pays the sum of their actions' numbers. The data have action 0
    three times as often as 1, and never 2 or 3. pi(a) must be beta(a) exp(a / alpha), normalised.
    """
    torch.manual_seed(0)
    size, n, actions, alpha, g = 256, 2, 4, 0.5, torch.Generator().manual_seed(0)
    zero, one = torch.zeros(n, 1), torch.ones(n, 1)
    actor = Actor(zero, one, actions, hidden=32)
    values = Values(zero, one, zero[0], one[0], actions, hidden=32)
    learner = OMIGA(actor, values, lr=1e-2, decay_updates=201, tau=0.1, alpha=alpha)
    obs, state, avail = torch.zeros(size, n, 1), torch.zeros(size, 1), torch.ones(size, n, actions)
    known = 0.25 * math.exp(1 / alpha) / (0.75 + 0.25 * math.exp(1 / alpha))
    for k in range(201):
        choice = (torch.rand(size, n, generator=g) < 0.25).long()
        taken, reward, ones = F.one_hot(choice, actions).float(), choice.sum(-1), torch.ones(size)
        batch = Batch(obs, state, taken, avail, reward, obs, state, avail, ones, ones)
        learner.update(batch, ones, g)
        if k % 50 == 0:
            pi = actor(obs[:1], avail[:1])[0].mean(0).tolist()  # (A,)
            print(f"update {k:3}: pi(1) {pi[1]:.3f}, known {known:.3f}   unseen {sum(pi[2:]):.4f}")
    assert abs(pi[1] - known) < 0.05, "the policy must be the data's, weighted by exp(a / alpha)"
    assert sum(pi[2:]) < 0.01, "an action that the data never have must not be chosen"


if __name__ == "__main__":
    run("omiga", Args, _self_check, learner=make_learner)
