"""State and reward predicted directly, by LOGO's own networks [the paper's Fig. 3, d and e].

  encode   s --> h_s,   (o^i, a^i) --> h_o^i          LOGO's encoders, E_p's
  predict  (h_s, h_o^i)    --> o_hat^i                each agent by its own network, as E_p
           (h_s, h_o^1..n) --> s', r'                 one network as wide as R_d
  LOGO:    (o_hat^1..n)    --> s', r'                 what it is compared with: R_d deduces

Nothing is deduced, so no two ways to s' can disagree: there is no uncertainty, and imagined rows
are sampled uniformly. The paper says no more of it than "the same architecture as the local
predictive model to perform direct state prediction". Readings: s' and r' come from all agents'
encodings; o_hat is predicted beside them, because a rollout needs observations, and encoders are
shared by both; changes of s and o are predicted, as in LOGO. LOGO's D3, D4 and D11 (heads, clamp,
zeros) apply, see joint.py; agents in a rollout see o_hat, as in the paper and unlike LOGO's D22.

Sizes: B batch, N agents, O observation, S state, A action.
       k = 2 numbers for each entry, a mean and a logit (D11); 1 with --no-zeros
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn as nn

import train
from baselines import run
from baselines.joint import JointRows, check
from logo_wm import agent_mlp, mlp


@dataclass
class Args(train.Args):
    """State and reward predicted directly, by the networks that LOGO predicts observations with."""

    NO_EFFECT: ClassVar = ("deduce_from", "observe", "uncertainty", "cap", "u_scale")

    uncertainty: Literal["weight", "penalty", "none"] = "none"
    """use of u, which this model does not have: none [ours]"""


def joined(rows: JointRows, of_state, of_obs, reward) -> torch.Tensor:
    """The outputs of several networks as one vector (B,size) in the order of `JointRows`.

    Args:
        of_state (B,kS), of_obs (B,N,kO): means, then logits. reward (B,1).
    """
    s = of_state.chunk(1 + rows.zeros, -1)
    o = [x.flatten(1) for x in of_obs.chunk(1 + rows.zeros, -1)]
    return torch.cat([s[0], o[0], reward, *s[1:], *o[1:]], -1)


class DirectWM(nn.Module):
    """The world model; see the module's docstring. The names of the networks are LogoWM's.

    Args:
        rows: `JointRows` of the task. hidden: width of every layer.
    """

    compilable = ("loss", "step")

    def __init__(self, rows: JointRows, hidden: int = 256):
        super().__init__()
        (n, o, s, a), h, k = rows.sizes, hidden, 1 + rows.zeros
        self.rows = rows
        self.enc_state = mlp(s, h)  # h_s, shared by the agents
        self.enc_obs = agent_mlp(n, o + a, h)  # h_o
        self.enc_p = agent_mlp(n, 2 * h, h, k * o)  # (h_s, h_o) -> o_hat - o
        self.direct = mlp(h + n * h, h, h, k * s + 1)  # (h_s, h_o of all agents) -> (s' - s, r')

    def forward(self, obs, state, actions) -> torch.Tensor:
        """(B,rows.size): the end of a step from raw (o, s, a), in the order of `JointRows`."""
        o, s = self.rows.standardise("obs", obs), self.rows.standardise("state", state)
        h_s = self.enc_state(s).relu()  # (B,hidden)
        h_o = self.enc_obs(torch.cat([o, actions], -1)).relu()  # (B,N,hidden)
        of_all = h_s.unsqueeze(1).expand(-1, h_o.shape[1], -1)
        of_obs = self.enc_p(torch.cat([of_all, h_o], -1))  # (B,N,kO)
        out = self.direct(torch.cat([h_s, h_o.flatten(1)], -1))  # (B,kS+1)
        return joined(self.rows, out[:, :-1], of_obs, out[:, -1:])

    def loss(self, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Negative log-likelihood of s', o' and r, a mean over their entries, and the heads' loss.

        Args:
            batch: a `buffer.Batch`, raw units.
        """
        out = self(batch.obs, batch.state, batch.actions)
        nll, heads = self.rows.nll(out, batch), self.rows.heads_loss(out, batch)
        assert nll.shape == batch.reward.shape
        return nll.mean() + heads, {"nll": nll.mean().detach(), "heads": heads.detach()}

    @torch.no_grad()
    def step(self, obs, state, actions) -> dict[str, torch.Tensor]:
        """One step from raw (o, s, a): entries of `JointRows.outcome`; uncertainty (B,) is 0."""
        outcome = self.rows.outcome(self(obs, state, actions), obs, state)
        return outcome | {"uncertainty": torch.zeros_like(state[:, 0])}

    def imagine(self, policy, starts, horizon: int, generator: torch.Generator) -> dict:
        """Rollouts from real starts, as `LogoWM.imagine` returns them."""
        return self.rows.imagine(self.step, policy, starts, horizon, generator)


def make_world_model(args: Args, spec, data) -> DirectWM:
    """The model for this task's data, on the data's device."""
    rows = JointRows(spec, data, args.hidden, args.zeros, args.heads, args.clamp)
    return DirectWM(rows, args.hidden).to(data.obs.device)


def _self_check():
    """The small world of joint.py."""
    check(lambda spec, data: DirectWM(JointRows(spec, data, 64), hidden=64), updates=150)


if __name__ == "__main__":
    run("direct", Args, _self_check, world_model=make_world_model)
