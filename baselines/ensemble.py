"""MOPO's model: seven probabilistic networks, and their doubt as a penalty [Yu et al., 2020].

  M networks  (s, o, a) -> N(changes of s and o, and r; sigma^2)     each from other weights
  step        a random member for every row, and a sample of its Gaussian
  penalty     r - lambda u,  u = max_m |sigma_m(s, a)|               MOPO Sec. 4.3

The rewards of imagined rows are lowered where the members are unsure; rows are sampled uniformly.
This is the model that LOGO's speed is measured against (paper, Table 5).

Departures:
- The learner is MACQL, as for every world model here, instead of SAC.
- All members see the same batches and differ by their initial weights alone [Lakshminarayanan et
  al., 2017], and all of them imagine, instead of the five with the least held-out error. That
  costs: on HalfCheetah three of seven have over twice the error of the others.
- sigma and the error are of standardised values, and u is their root mean square in units of the
  reward's standard deviation. The code takes the norm, sqrt(D) times as much.
- In u, sigma^2 counts with the probability that its value is not 0 (D11), because no likelihood
  trains it where the value is 0.
- The optimiser is LOGO's, AdamW with step size 3e-3 and weight decay 0.1, also on the bounds of log
  sigma^2 (the code: 1e-3, and 2.5e-5 to 1e-4 on the layers' weights alone). Likelihood and pull on
  these bounds are half of the code's. As many updates as LOGO's model gets; the code goes on until
  the held-out error no longer falls.
- LOGO's D3, D4 and D11 (heads, clamp, zeros) apply, see joint.py: without them no ensemble can show
  a unit that dies or is out of sight. The heads learn from the members' mean, while a rollout shows
  one member's sample. With D4 MACQL also keeps later values within the data's returns: what the
  penalty costs beyond that reaches the steps in the target alone. D30 does not apply: a critic
  without imagined rows would not learn the penalty.

Source: https://github.com/yihaosun1124/OfflineRL-Kit at e3ce697: dynamics/ensemble_dynamics.py,
run_example/run_mopo.py. Its lambda is 0.5 to 5 and its horizon 1 or 5, chosen for each dataset;
here the horizon is LOGO's, 15 on maps and 5 on robots.

Sizes: B batch, N agents, O observation, S state, A action, M members, D = S + N O + 1 values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from baselines import run
from baselines.joint import JointRows, check


@dataclass
class Args(train.Args):
    """MOPO: an ensemble of seven networks, whose doubt is subtracted from imagined rewards."""

    NO_EFFECT: ClassVar = ("deduce_from", "observe")

    uncertainty: Literal["weight", "penalty", "none"] = "penalty"
    """use of u: reward penalty of MOPO, sampling weight of LOGO's Eq. (7), or none [MOPO]"""
    u_scale: float = 1.0
    """1 / lambda of the penalty; with --uncertainty weight give 0.25 [ours; OfflineRL-Kit: lambda
    0.5 to 5 of a u that is sqrt(D) times as large]"""
    recorded_critic: bool = False
    """D30: the last of two critics or more learns from recorded rows alone [ours]"""
    members: int = 7
    """M, networks [OfflineRL-Kit]"""
    wm_hidden: int = 200
    """width of their four hidden layers [OfflineRL-Kit]"""


class Members(nn.Module):
    """M probabilistic networks side by side, four hidden layers each, as in OfflineRL-Kit.

    Args:
        inputs: numbers in. values: numbers with a mean and a variance. others: further outputs.
        looped: one member after the other, instead of all in one batched product.
    """

    def __init__(self, inputs, values, others=0, hidden=200, members=7, looped=False):
        super().__init__()
        self.values, self.looped = values, looped
        sizes = [inputs, *[hidden] * 4, 2 * values + others]
        shapes = list(pairwise(sizes))
        self.weights = nn.ParameterList(
            nn.init.trunc_normal_(torch.empty(members, i, j), std=0.5 * i**-0.5) for i, j in shapes
        )
        self.biases = nn.ParameterList(torch.zeros(members, 1, j) for _, j in shapes)
        self.max_log_var = nn.Parameter(torch.full((values,), 0.5))
        self.min_log_var = nn.Parameter(torch.full((values,), -10.0))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,I) -> means and others (M,B,D+others), log variances (M,B,D), of every member."""
        layers = list(zip(self.weights, self.biases, strict=True))
        if self.looped:
            members = [[(w[m], b[m]) for w, b in layers] for m in range(len(self.weights[0]))]
            out = torch.stack([self.network(torch.addmm, x, layers) for layers in members])
        else:
            out = self.network(torch.baddbmm, x.expand(len(self.weights[0]), -1, -1), layers)
        out, log_var = out[..., : -self.values], out[..., -self.values :]
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return out, self.min_log_var + F.softplus(log_var - self.min_log_var)

    @staticmethod
    def network(product: Callable, x: torch.Tensor, layers: list) -> torch.Tensor:
        """All layers, with `product` torch.addmm of one member or torch.baddbmm of all."""
        for w, b in layers[:-1]:
            x = F.silu(product(b, x, w), inplace=True)
        return product(layers[-1][1], x, layers[-1][0])


class Ensemble(nn.Module):
    """The world model; see the module's docstring.

    Args:
        rows: `JointRows` of the task. hidden, members: of the networks.
    """

    compilable = ("loss",)

    def __init__(self, rows: JointRows, hidden=200, members=7):
        super().__init__()
        self.rows = rows
        others = rows.size - rows.num_values  # the logits of zeros
        self.net = Members(rows.num_inputs, rows.num_values, others, hidden, members)

    def loss(self, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum over the members of the negative log-likelihood, and the heads' loss."""
        out, log_var = self.net(self.rows.inputs(batch.obs, batch.state, batch.actions))
        nll = self.rows.nll(out, batch, log_var)  # (M,B)
        assert nll.shape == (len(out), len(batch.reward))
        bounds = self.net.max_log_var.sum() - self.net.min_log_var.sum()  # pulls them together
        heads = self.rows.heads_loss(out.detach().mean(0), batch)
        total = nll.mean(1).sum() + 0.005 * bounds + heads
        return total, {"nll": nll.mean().detach(), "heads": heads.detach()}

    @torch.no_grad()
    def step(self, obs, state, actions, generator: torch.Generator | None = None) -> dict:
        """One step from raw (o, s, a): entries of `JointRows.outcome`, and uncertainty (B,).

        Args:
            generator: draws the member of each row and a sample of its Gaussian; None: the mean of
                all members, which is what errors are measured with.
        """
        out, log_var = self.net(self.rows.inputs(obs, state, actions))  # (M,B,...)
        std, values = torch.exp(0.5 * log_var), self.rows.num_values
        doubt = std.square() * self.rows.nonzero(out)  # (M,B,D)
        u = doubt.mean(-1).amax(0).sqrt() * self.rows.reward_std  # MOPO Sec. 4.3
        if generator is None:
            return self.rows.outcome(out.mean(0), obs, state) | {"uncertainty": u}
        row = torch.arange(len(obs), device=obs.device)
        member = torch.randint(len(out), row.shape, generator=generator, device=obs.device)
        sample = out[member, row]
        noise = torch.empty_like(sample[:, :values]).normal_(generator=generator)
        sample[:, :values] += std[member, row] * noise
        return self.rows.outcome(sample, obs, state) | {"uncertainty": u}

    def imagine(self, policy, starts, horizon: int, generator: torch.Generator) -> dict:
        """Rollouts from real starts, as `LogoWM.imagine` returns them."""
        step = partial(self.step, generator=generator)
        return self.rows.imagine(step, policy, starts, horizon, generator)


def make_world_model(args: Args, spec, data) -> Ensemble:
    """The ensemble for this task's data, on the data's device."""
    rows = JointRows(spec, data, args.hidden, args.zeros, args.heads, args.clamp)
    return Ensemble(rows, args.wm_hidden, args.members).to(data.obs.device)


def _self_check():
    """The small world of joint.py."""
    check(lambda spec, data: Ensemble(JointRows(spec, data, 64), hidden=64, members=3), updates=300)


if __name__ == "__main__":
    run("ensemble", Args, _self_check, world_model=make_world_model)
