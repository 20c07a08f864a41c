"""MOReL: rollouts end with a penalty where the model is unsure [Kidambi et al., 2020].

  M networks  (s, o, a) -> changes of s and o, and r     deterministic, each from other weights
  disc        max_ij |f_i(s, o, a) - f_j(s, o, a)|       of predicted s' and o', standardised
  unknown     disc > threshold,  threshold = largest disc of the data / --coefficient: the paper's
              unknown state-action detector, USAD
  HALT        what follows an unknown step: the episode is over, and the step's reward is the
              smallest of the data minus --kappa times the range of the data's rewards

A rollout is made by one member, which is drawn at its start. Its steps count up to and including
the first unknown one. Rows are sampled uniformly. The threshold is measured once, before the first
rollout, when the networks are trained, on at most 20,000 training rows at even distances.

Departures: the learner is MACQL, as for every world model here, instead of a natural gradient;
rollouts are as short as LOGO's and start anywhere in the data, instead of at first states; all
members see the same batches, with LOGO's optimiser. disc is of expected values, in which a number
that is probably 0 counts little (D11), and without r, which the paper's f does not predict either.
HALT is the end of the episode, and its reward is received once; in the paper HALT is a state that
is never left, with reward -kappa at every step. The code keeps the reward of the unknown step and
adds --truncate-reward, which is 0 in its configurations, and never cuts a path to less than four
steps. LOGO's D3, D4 and D11 (heads, clamp, zeros) apply, see joint.py; the heads learn from the
members' mean, while a rollout shows one member's prediction. With D4 MACQL also keeps later values
within the data's returns: what HALT costs beyond that reaches the steps in the target alone. D30
does not apply: a critic without imagined rows would not learn what HALT costs. The model gets as
many updates as LOGO's; the code trains for 25 to 100 epochs. Where s and o have hundreds of
numbers, disc differs little from row to row, and with a coefficient of 3 many recorded rows are
unknown, too; with 1, none of those that it was measured on, which the networks were trained on: of
held-out steps of 6h_vs_8z medium-replay 4.5 % are.

Source: https://github.com/aravindr93/mjrl at 15bf3c0 (branch v2): projects/morel/run_morel.py,
mjrl/algos/mbrl/model_based_npg.py, nn_dynamics.py. Its coefficient is 3 for D4RL's hopper-medium
and 0.5 in another configuration; an earlier version multiplied by it.

Sizes: B batch, N agents, O observation, S state, A action, M members, H horizon.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn as nn

import train
from baselines import run
from baselines.joint import JointRows, check
from macql import stacked_mlp

MEASURED, CHUNK = 20_000, 2_000  # rows of the data that the threshold is from, and at a time


@dataclass
class Args(train.Args):
    """MOReL: four networks; where they disagree, an imagined episode ends with a penalty."""

    NO_EFFECT: ClassVar = ("deduce_from", "observe")

    uncertainty: Literal["weight", "penalty", "none"] = "none"
    """further use of u = disc: sampling weight of LOGO's Eq. (7), reward penalty of its Eq. (1), or
    none [MOReL]"""
    recorded_critic: bool = False
    """D30: the last of two critics or more learns from recorded rows alone [ours]"""
    members: int = 4
    """M, networks [mjrl]"""
    wm_hidden: int = 512
    """width of their two hidden layers [mjrl]"""
    coefficient: float = 1.0
    """the largest disc of the data divided by this is the threshold; 0: every step is known [mjrl:
    0.5 to 3]"""
    kappa: float = 1.0
    """kappa: how far HALT's reward lies below the smallest of the data, in ranges of its rewards
    [ours; unifloral: 30 to 200 in units of the reward]"""


class MOReL(nn.Module):
    """The world model; see the module's docstring.

    Args:
        rows: `JointRows` of the task. data: `OfflineDataset`, to measure the threshold on.
        hidden, members: of the networks. coefficient, kappa: see `Args`.
    """

    compilable = ("loss",)

    def __init__(self, rows: JointRows, data, hidden=512, members=4, coefficient=1.0, kappa=1.0):
        super().__init__()
        self.rows, self.data, self.members, self.coefficient = rows, data, members, coefficient
        self.net = stacked_mlp(members, rows.num_inputs, hidden, hidden, rows.size)
        self.register_buffer("threshold", torch.full((), torch.inf))  # infinite: not yet measured
        low, high = rows.reward_min, rows.reward_max
        self.register_buffer("halt_reward", low - kappa * (high - low))  # MOReL HALT

    def forward(self, obs, state, actions) -> torch.Tensor:
        """(M,B,size): every member's output for raw (o, s, a)."""
        return self.net(self.rows.inputs(obs, state, actions).expand(self.members, -1, -1))

    def loss(self, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum over the members of `JointRows.nll`, and the heads' loss."""
        out = self(batch.obs, batch.state, batch.actions)
        error = self.rows.nll(out, batch)  # (M,B)
        assert error.shape == (self.members, len(batch.reward))
        heads = self.rows.heads_loss(out.detach().mean(0), batch)
        total = error.mean(1).sum() + heads
        return total, {"error": error.mean().detach(), "heads": heads.detach()}

    def disc(self, out, obs, state) -> torch.Tensor:
        """(B,) largest distance between two members' s' and o', standardised, in `out` (M,B,size).

        An entry that may be 0 counts with its expected value: its mean, given that it is not 0, is
        arbitrary where it always is.
        """
        s_next, o_next, _ = self.rows.predictions(out, obs, state)
        s, o = self.rows.mean("state", s_next), self.rows.mean("obs", o_next)
        x = torch.cat([s, o.flatten(-2)], -1).transpose(0, 1)  # (B,M,S+NO)
        # Without matrix products, in whose rounding small distances would get lost
        pairs = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # (B,M,M)
        return pairs.amax((1, 2))  # MOReL disc(s, a)

    @torch.no_grad()
    def measure_threshold(self) -> None:
        """Set the threshold from the data's training rows; the networks must be trained."""
        rows = self.data.train[:: -(-len(self.data.train) // MEASURED)]
        largest = []
        for some in rows.split(CHUNK):
            batch = self.data.gather(some)
            out = self(batch.obs, batch.state, batch.actions)
            largest.append(self.disc(out, batch.obs, batch.state).amax())
        self.threshold.copy_(torch.stack(largest).amax() / self.coefficient)

    @torch.no_grad()
    def step(
        self, obs, state, actions, generator: torch.Generator | None = None, member=None
    ) -> dict:
        """One step from raw (o, s, a): entries of `JointRows.outcome`, and uncertainty (B,) = disc.

        terminated is 1 for unknown steps; their reward is the networks' all the same.

        Args:
            generator: draws the member of each row, where there is no `member`.
            member (B,): which one predicts; None, and no generator: the mean of all members, which
                is what errors are measured with.
        """
        out = self(obs, state, actions)  # (M,B,size)
        disc = self.disc(out, obs, state)
        if member is None and generator is not None:
            member = self.draw_members(len(obs), generator)
        row = torch.arange(len(obs), device=obs.device)
        one = out.mean(0) if member is None else out[member, row]
        outcome = self.rows.outcome(one, obs, state) | {"uncertainty": disc}
        outcome["terminated"] = outcome["terminated"].masked_fill(disc > self.threshold, 1.0)
        return outcome

    def draw_members(self, size: int, generator: torch.Generator) -> torch.Tensor:
        """(size,) numbers of members."""
        return torch.randint(self.members, (size,), generator=generator, device=generator.device)

    def imagine(self, policy, starts, horizon: int, generator: torch.Generator) -> dict:
        """Rollouts from real starts, as `LogoWM.imagine` returns them, each by one member.

        The first unknown step has HALT's reward, which is outside of the data's range, and is the
        last that is valid.
        """
        if self.coefficient > 0 and self.threshold.isinf():  # a look at the GPU for each collection
            self.measure_threshold()
        member = self.draw_members(len(starts.reward), generator)  # as mjrl: one for a whole path
        step = partial(self.step, member=member)
        rollout = self.rows.imagine(step, policy, starts, horizon, generator)
        unknown = rollout["uncertainty"] > self.threshold  # (H,B)  MOReL USAD
        earlier = unknown.cumsum(0) - unknown.int()  # unknown steps before this one
        valid = rollout["valid"] * (earlier == 0)  # without heads no step has ended a rollout yet
        halts = unknown & (valid > 0)
        rollout["valid"] = valid
        rollout["terminated"] = rollout["terminated"].masked_fill(halts, 1.0)
        rollout["reward"] = torch.where(halts, self.halt_reward, rollout["reward"])
        return rollout


def make_world_model(args: Args, spec, data) -> MOReL:
    """The four networks for this task's data, on the data's device."""
    rows = JointRows(spec, data, args.hidden, args.zeros, args.heads, args.clamp)
    model = MOReL(rows, data, args.wm_hidden, args.members, args.coefficient, args.kappa)
    return model.to(data.obs.device)


def _self_check():
    """The small world of joint.py; then most of its rows must be known, and others unknown."""

    def make(spec, data) -> MOReL:
        return MOReL(JointRows(spec, data, 64), data, hidden=64, coefficient=1.0)

    model, data = check(make, updates=150)
    batch, shares = data.gather(data.held_out), []
    for name, shift in (("held-out rows", 0.0), ("the same, ten units away", 10.0)):
        out = model.step(batch.obs + shift, batch.state + shift, batch.actions)
        shares.append((out["uncertainty"] > model.threshold).float().mean().item())
        print(f"unknown: {shares[-1]:4.0%} of {name}")
    assert shares[0] < 0.3 and shares[1] > 0.9, "unknown is what the data do not have"


if __name__ == "__main__":
    run("morel", Args, _self_check, world_model=make_world_model)
