"""What the world models here have in common, so that only what makes them different is compared.

  inputs    [s, o^1..n, a^1..n], standardised          a transition's beginning, as one vector
  outputs   [change of s, changes of o^1..n, r]        its end, standardised, as one vector; then
            the logits of which entries of s and o are not 0 (LOGO's D11)
  heads     which actions are available, has the episode ended (LOGO's D3)
  imagine   the rollouts of `LogoWM.imagine`, with another model's step

    rows = JointRows(spec, data, hidden)
    out = network(rows.inputs(obs, state, actions))      # (...,B,rows.size)
    loss = rows.nll(out, batch).mean() + rows.heads_loss(out, batch)
    outcome = rows.outcome(out, obs, state)              # what a step of a world model returns

Sizes: B batch, N agents, O observation, S state, A action, H horizon, D = S + N O + 1 values.
       Leading dimensions, such as the members of an ensemble, are written "...".
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from buffer import OfflineDataset
from envs import Spec
from logo_wm import LogoWM, Prediction, agent_mlp, mlp
from macql import descend


class JointRows(nn.Module):
    """Vectors in and out of a world model that predicts everything at once.

    Args:
        spec: `envs.Spec` of the task. data: `OfflineDataset`, for its statistics.
        hidden: width of the heads is half of it.
        zeros, heads, clamp: as in `LogoWM` (D11, D3, D4).
    """

    standardise, restore = LogoWM.standardise, LogoWM.restore
    clamp_to_data, prediction = LogoWM.clamp_to_data, LogoWM.prediction
    mean, decide = LogoWM.mean, LogoWM.decide
    register_statistics, head_losses = LogoWM.register_statistics, LogoWM.head_losses
    read_heads = LogoWM.read_heads

    def __init__(self, spec, data, hidden, zeros=True, heads=True, clamp=True):
        super().__init__()
        n, o, s, a = spec.num_agents, spec.obs_dim, spec.state_dim, spec.action_dim
        self.sizes, self.discrete = (n, o, s, a), spec.discrete
        self.zeros, self.heads, self.clamp = zeros, heads, clamp
        self.num_inputs, self.num_values = s + n * o + n * a, s + n * o + 1
        self.size = self.num_values + zeros * (s + n * o)
        self.avail_head = agent_mlp(n, o, hidden // 2, a) if spec.discrete else None
        self.end_head = mlp(s, hidden // 2, 2)  # is s' the end, and its reward if it is
        self.register_statistics(n, o, s, data.statistics())

    def inputs(self, obs, state, actions) -> torch.Tensor:
        """(B,S+NO+NA) from raw o, s and a."""
        o, s = self.standardise("obs", obs), self.standardise("state", state)
        return torch.cat([s, o.flatten(1), actions.flatten(1)], -1)

    def values(self, obs, state, reward) -> torch.Tensor:
        """[s, o^1..n, r] (B,D) of a step's end, standardised."""
        o, s = self.standardise("obs", obs), self.standardise("state", state)
        return torch.cat([s, o.flatten(-2), self.standardise("reward", reward)[..., None]], -1)

    def predictions(self, out, obs, state) -> tuple[Prediction, Prediction, torch.Tensor]:
        """s' (...,B,S), o' (...,B,N,O) and r' (...,B) in a network's output, standardised."""
        n, o, s, _ = self.sizes
        change, logit = out[..., : self.num_values], out[..., self.num_values :]
        parts = change.split([s, n * o, 1], -1)
        logits = logit.split([s, n * o], -1) if self.zeros else (logit, logit)
        of_state = torch.cat([parts[0], logits[0]], -1)
        of_obs = [x.unflatten(-1, (n, o)) for x in (parts[1], logits[1]) if x.shape[-1]]
        now_o, now_s = self.standardise("obs", obs), self.standardise("state", state)
        return (
            self.prediction("state", of_state, now_s),
            self.prediction("obs", torch.cat(of_obs, -1), now_o),
            parts[2].squeeze(-1),
        )

    def sometimes(self) -> torch.Tensor:
        """(S+NO,) which entries of s and o are exactly 0 at times (D11)."""
        return torch.cat([self.state_sometimes_zero, self.obs_sometimes_zero.flatten()])

    def nonzero(self, out) -> torch.Tensor:
        """Probability (...,B,D) that a value is not 0; 1 for those that are always or never 0."""
        certain = torch.ones_like(out[..., : self.num_values])
        if not self.zeros:
            return certain
        p = out[..., self.num_values :].sigmoid()
        return torch.cat([torch.where(self.sometimes(), p, 1.0), certain[..., -1:]], -1)

    def nll(self, out, batch, log_var: torch.Tensor | None = None) -> torch.Tensor:
        """-log of the density at the end of each transition, mean over its values: (...,B).

        Args:
            log_var (...,B,D): of the Gaussians; None: variance 1.
        """
        n, o, s, _ = self.sizes
        truth = self.values(batch.next_obs, batch.next_state, batch.reward)  # (B,D)
        before = self.values(batch.obs, batch.state, batch.reward)
        change = truth - torch.cat([before[:, :-1], torch.zeros_like(truth[:, -1:])], -1)
        error = 0.5 * (change - out[..., : self.num_values]).square()
        if log_var is not None:
            error = error * torch.exp(-log_var) + 0.5 * log_var
        # The last step's reward is the end head's, as in LOGO
        counts = torch.ones_like(truth)  # 0: a value whose error does not count
        counts[:, -1] = 1 - batch.terminated if self.heads else 1.0
        if not self.zeros:
            return (error * counts).mean(-1)
        raw = torch.cat([batch.next_state, batch.next_obs.flatten(1)], -1)  # (B,S+NO)
        sometimes = self.sometimes()
        nonzero = torch.where(sometimes, raw != 0, True).to(error)
        counts = torch.cat([counts[:, : s + n * o] * nonzero, counts[:, -1:]], -1)
        logit = out[..., self.num_values :]
        loss = F.binary_cross_entropy_with_logits(logit, nonzero.expand_as(logit), reduction="none")
        return ((error * counts).sum(-1) + (loss * sometimes).sum(-1)) / self.num_values

    def heads_loss(self, out, batch) -> torch.Tensor:
        """Of available actions and ends (), from what a rollout would show after this step.

        Args:
            out (B,size): one prediction a row; no gradient reaches it.
        """
        with torch.no_grad():
            state, obs, _ = self.predictions(out, batch.obs, batch.state)
            s = self.standardise("state", self.decide("state", state))
            o = self.standardise("obs", self.decide("obs", obs))
        return sum(self.head_losses(o, s, batch))

    def outcome(self, out, obs, state) -> dict[str, torch.Tensor]:
        """One step's end in raw units, with the names of `LogoWM.step`, but no uncertainty.

        Args:
            out (B,size): the network's output, or a sample of it. obs, state: before the step.
        """
        s_next, o_next, r = self.predictions(out, obs, state)
        next_state, next_obs = self.decide("state", s_next), self.decide("obs", o_next)
        heads = self.read_heads(next_obs, self.standardise("state", next_state), r)
        return heads | {
            "next_obs": next_obs,
            "next_state": next_state,
            "mean_obs": self.restore("obs", self.mean("obs", o_next)),
            "mean_state": self.restore("state", self.mean("state", s_next)),
        }

    def imagine(self, step: Callable, policy, starts, horizon, generator) -> dict:
        """Rollouts as `LogoWM.imagine` makes them, with `step(obs, state, actions)` of a model."""
        model = SimpleNamespace(
            step=step, heads=self.heads, clamp=self.clamp, clamp_to_data=self.clamp_to_data
        )
        return LogoWM.imagine(model, policy, starts, horizon, generator)


# --------------------------------------------------------------------------------------------------
# Self-checks
# --------------------------------------------------------------------------------------------------


def small_world(episodes: int = 500, steps: int = 20, seed: int = 0) -> tuple:
    """(OfflineDataset, Spec): three agents on a line see where they and the others are, and move.

    The state is all positions; the reward is higher the closer the agents are to each other; the
    episode ends when one of them leaves [0,4].
    """
    n, g = 3, torch.Generator().manual_seed(seed)
    s = torch.rand(episodes, n, generator=g) * 2 + 1
    states, moves = [s], torch.rand(steps, episodes, n, generator=g) * 2 - 1
    for move in moves:
        states.append(states[-1] + 0.5 * move)
    state = torch.stack(states, 1)  # (episodes,steps+1,N)
    outside = (state[:, 1:] < 0).any(-1) | (state[:, 1:] > 4).any(-1)
    lengths = torch.where(outside.any(1), outside.float().argmax(1) + 1, steps)
    keep = torch.arange(steps + 1) <= lengths.unsqueeze(1)  # (episodes,steps+1)
    padded = torch.cat([moves.transpose(0, 1), torch.zeros(episodes, 1, n)], 1)
    rewards = torch.cat([-state[:, 1:].std(-1), torch.zeros(episodes, 1)], 1)
    ends = torch.cat([outside.float(), torch.zeros(episodes, 1)], 1)
    s = state[keep]
    obs = torch.cat([s.unsqueeze(-1), s.unsqueeze(1) - s.unsqueeze(2)], -1)
    columns = obs, s, padded[keep].unsqueeze(-1), None, rewards[keep], ends[keep]
    return OfflineDataset(*columns, lengths), Spec("line", "none", n, n + 1, n, 1, False, steps)


def check(make: Callable, updates: int = 600, lr: float = 3e-3) -> tuple:
    """Train a world model on the small world: it must beat "nothing changes" tenfold.

    Args:
        make: (spec, data) -> the world model.
    Returns:
        the world model, and the small world's data.
    """
    torch.manual_seed(0)
    data, spec = small_world()
    model, g = make(spec, data), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    test = data.gather(data.held_out)
    still = (test.state - test.next_state).square().mean().item()
    for k in range(updates + 1):
        if k % (updates // 3) == 0:
            out = model.step(test.obs, test.state, test.actions)
            error = (out["mean_state"] - test.next_state).square().mean().item()
            print(f"update {k:3}: state error {error:.5f}, nothing changes {still:.5f}")
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - k / (updates + 1))
        descend(optimizer, model.loss(data.sample(256, g))[0])
    assert error < still / 10, "the model must learn this world"

    def policy(obs, avail, generator):
        return torch.rand(*obs.shape[:2], 1, generator=generator) * 2 - 1

    rollout = model.imagine(policy, data.sample(100, g), 5, g)
    assert all(x.isfinite().all() for x in rollout.values()), "rollouts must be finite"
    return model, data
