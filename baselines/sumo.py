"""SUMO: imagined steps are as doubtful as they are far from the data [Qiao et al., 2025].

  M networks  (s, o, a) -> N(changes of s and o, and r; sigma^2)   MOPO's, see ensemble.py
  u           log(1 + |x - x_k|),  x = (s, a, s') of the imagined step, standardised
              x_k = the k-th nearest of --reference-rows rows of the data
  penalty     r - lambda u                                         as MOPO, with another u

The paper takes the cross-entropy between the imagined and the true next state for the uncertainty,
and estimates it by the distance to the nearest recorded neighbours; the ensemble is there to
predict alone. Here the search is exact, by all distances.

There is no public code (https://github.com/qzj-debug/SUMO at 341d7ea holds a README). The idea, the
search for neighbours and the two uses of u (this penalty, and an end of rollouts as MOReL's) are
known from the abstract and from reviews of the paper, arXiv 2408.12970. From memory and unverified:
the form log(1 + distance), that x is (s, a, s'), a small k, networks as MOPO's, and a lambda for
each dataset.

Departures: those of ensemble.py; x has the global state and all agents' actions, but not the
observations, most of whose content is in the state; actions in x are one-hot or in [-1,1], as they
are; 20,000 rows drawn once stand for the data; u is in units of the reward's standard deviation.
It is not 0 where the data are: on 6h_vs_8z medium-replay a recorded step has 1.80, a predicted one
1.85 (MOPO's u: .20), so that nearly all of the penalty is a constant there.

Sizes: B batch, N agents, S state, A action, M members, R reference rows, X = 2 S + N A.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn

from baselines import run
from baselines.ensemble import Args as EnsembleArgs
from baselines.ensemble import Ensemble
from baselines.joint import JointRows, check

CHUNK = 500  # imagined steps whose distances are computed at a time, (CHUNK,R) numbers


@dataclass
class Args(EnsembleArgs):
    """SUMO: an ensemble, and a penalty for imagined steps that are far from recorded ones."""

    reference_rows: int = 20_000
    """R, rows of the data that are searched, at most [ours; SUMO: all of them]"""
    neighbours: int = 1
    """k: u is from the distance to the k-th nearest row [SUMO, unverified]"""


class SUMO(nn.Module):
    """The world model; see the module's docstring.

    Args:
        ensemble: the networks, which predict. data: `OfflineDataset`.
        reference_rows, neighbours: R and k.
    Raises:
        ValueError: fewer rows than neighbours.
    """

    compilable = ("loss",)

    def __init__(self, ensemble: Ensemble, data, reference_rows=20_000, neighbours=1):
        super().__init__()
        self.ensemble, self.neighbours = ensemble, neighbours
        # Always the same rows, so that u does not change from run to run
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
        rows = data.train[order[:reference_rows].to(data.train.device)]
        if len(rows) < neighbours:
            raise ValueError(f"--neighbours is {neighbours}, but only {len(rows)} rows are there.")
        points = self.points(data.state[rows], data.actions[rows], data.state[rows + 1])
        self.register_buffer("reference", points)  # (R,X)

    def loss(self, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The ensemble's; nothing is learned for u."""
        return self.ensemble.loss(batch)

    def points(self, state, actions, next_state) -> torch.Tensor:
        """x (B,X) from raw s, a and s'."""
        s, s_next = (self.ensemble.rows.standardise("state", x) for x in (state, next_state))
        return torch.cat([s, actions.flatten(1), s_next], -1)

    def distance(self, x: torch.Tensor) -> torch.Tensor:
        """(B,) Euclidean distance from x (B,X) to the k-th nearest reference row."""
        found = []
        for some in x.split(CHUNK):
            distances = torch.cdist(some, self.reference)  # (CHUNK,R)
            found.append(distances.topk(self.neighbours, largest=False).indices[:, -1])
        # cdist takes products for speed, and rounds: it finds the row, its distance is taken anew
        return (x - self.reference[torch.cat(found)]).norm(dim=-1)

    @torch.no_grad()
    def step(self, obs, state, actions, generator: torch.Generator | None = None) -> dict:
        """One step as `Ensemble.step`, with the generator's meaning there, but SUMO's u (B,)."""
        out = self.ensemble.step(obs, state, actions, generator)
        distance = self.distance(self.points(state, actions, out["next_state"]))
        assert distance.shape == (len(state),)
        u = torch.log1p(distance)  # SUMO u
        return out | {"uncertainty": u * self.ensemble.rows.reward_std}

    def imagine(self, policy, starts, horizon: int, generator: torch.Generator) -> dict:
        """Rollouts from real starts, as `LogoWM.imagine` returns them."""
        step = partial(self.step, generator=generator)
        return self.ensemble.rows.imagine(step, policy, starts, horizon, generator)


def make_world_model(args: Args, spec, data) -> SUMO:
    """The ensemble and the reference rows of this task's data, on the data's device."""
    rows = JointRows(spec, data, args.hidden, args.zeros, args.heads, args.clamp)
    ensemble = Ensemble(rows, args.wm_hidden, args.members).to(data.obs.device)
    return SUMO(ensemble, data, args.reference_rows, args.neighbours)


def _self_check():
    """The small world of joint.py; then u must be larger for states that the data do not have."""

    def make(spec, data) -> SUMO:
        ensemble = Ensemble(JointRows(spec, data, 64), hidden=64, members=3)
        return SUMO(ensemble, data, reference_rows=2_000)

    model, data = check(make, updates=240)
    batch, means = data.gather(data.held_out), []
    for name, shift in (("held-out rows", 0.0), ("the same, ten units away", 10.0)):
        out = model.step(batch.obs + shift, batch.state + shift, batch.actions)
        means.append(out["uncertainty"].mean().item())
        print(f"mean u {means[-1]:.3f} of {name}")
    assert means[1] > 2 * means[0], "u is the distance from the data"


if __name__ == "__main__":
    run("sumo", Args, _self_check, world_model=make_world_model)
