"""MAZero's world model, offline: a latent state for each agent, unrolled [Liu et al., 2024].

  represent  o_t        --> h_t               each agent's own, by one network for all agents
  advance    h_t, a_t   --attention--> h_t+1  deterministic; agents attend to each other
  reward     h_t+1, a_t --> r_t               one for the team, from all agents
  compare    h_t+k advanced, with h_t+k represented: consistency, as SimSiam compares two views
  decode     h_t, h_t+k --> o_t+k, s_t+k      ours: how they have changed since t
  imagine    represent, then advance and decode in turn: the latent state goes on, for K steps

Trained on windows of K recorded steps. The first observation is represented, the latent state is
advanced along the recorded actions, and each of the K steps is held to the data; of the gradient
that passes from one step to the one before, half goes on. As for MAMBA, the model keeps the dataset
and draws windows of its own, of as many rows as it is handed; which ones depends on --seed and on
the number of updates so far, which the state_dict holds.

Left out: MAZero is a planner, and this is its model alone. It has neither value nor policy head, so
no advantage-weighted policy loss and no tree search: MACQL learns from its rollouts instead, which
is how LOGO's paper sets world models side by side (Fig. 1, c: "MACQL integrated with different
world models"). Nothing is played while it learns: no replay priorities, no reanalysis.

Departures: o and s have decoders, because a rollout under MACQL consists of them. They say what has
changed since the represented moment, whose o and s are known, so that errors of single steps do not
add up. Available actions and ends are read off the decoded o and s by the heads of all world models
here (joint.py; D3, D4, D11 apply), which do not shape the latent state. The reward is one number
and has a squared error, which MAZero's code offers beside its cross-entropy over a support; the
last step's is the end head's, as in LOGO. Windows stay within an episode, while MAZero's run on
beyond its end. Observations are standardised before they are normalised. There is no dropout, no
orthogonal initialisation and no clipping of gradients. MAZero's code halves the gradients of
consistency and heads as well, ours only what comes from the next step. Sizes are the published
ones; a batch has fewer windows, so that an update takes no more than twice LOGO's time on one core.
Step size and weight decay are LOGO's; MAZero has 5e-4 and none.

Also ours: a rollout longer than K represents what it decoded after K steps and goes on from there:
the latent state is advanced no further than in training, beyond which it soon leaves what the
decoders know (on 3s_vs_5z the state's error after 15 steps was .35 without, .23 with it, and .61
where every step is represented; 1,000 updates, seed 101).

Source: https://github.com/liuqh16/MAZero at b1c5084: config/smac/{model,attention}.py,
core/{config,train}.py.

Sizes: W windows, K steps, B batch, N agents, O observation, S state, A action, H latent state.
       k = 2 numbers for each entry, a mean and a logit (D11); 1 with --no-zeros
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from baselines import run
from baselines.direct import joined
from baselines.joint import JointRows, check
from baselines.mamba import MAMBA, Attention, window_starts
from logo_wm import LogoWM, mlp


@dataclass
class Args(train.Args):
    """MAZero's world model: latent states that agents advance together, five steps at a time."""

    NO_EFFECT: ClassVar = ("deduce_from", "observe", "uncertainty", "cap", "u_scale")

    uncertainty: Literal["weight", "penalty", "none"] = "none"
    """use of u, which this model does not have: none [Table 1 of LOGO's paper]"""
    wm_batch_size: int = 256
    """B, rows per step, in B / K windows [ours; MAZero: 256 windows]"""
    window: int = 5
    """K, steps over which the latent state is advanced in training [MAZero]"""
    wm_hidden: int = 128
    """H, width of the latent state and of most layers; a multiple of 8 [MAZero]"""
    attention: int = 3
    """layers of attention between the agents [MAZero]"""
    consistency: float = 2.0
    """weight of the consistency between advanced and represented latent states [MAZero]"""


def normed(*sizes: int) -> nn.Sequential:
    """Linear layers, each followed by ReLU and layer normalisation."""
    stack = [(nn.Linear(i, j), nn.ReLU(inplace=True), nn.LayerNorm(j)) for i, j in pairwise(sizes)]
    return nn.Sequential(*[m for layer in stack for m in layer])


def halved(x: torch.Tensor) -> torch.Tensor:
    """x, through which half of the gradient passes."""
    return 0.5 * (x + x.detach())


class MAZero(nn.Module):
    """The world model; see the module's docstring.

    Args:
        rows: `JointRows` of the task. data: `OfflineDataset`, to draw windows from.
        hidden, attention, window, consistency: see `Args`. seed: of the draws in training.
    Raises:
        ValueError: see `Attention`.
    """

    compilable = ()
    draw_windows = MAMBA.draw_windows
    get_extra_state, set_extra_state = MAMBA.get_extra_state, MAMBA.set_extra_state

    def __init__(self, rows, data, hidden=128, attention=3, window=5, consistency=2.0, seed=0):
        super().__init__()
        (n, o, s, a), h, k = rows.sizes, hidden, 1 + rows.zeros
        self.rows, self.data, self.weight = rows, data, consistency
        self.starts, self.window = window_starts(data, window), window
        self.seed, self.updates = seed, 0
        self.encoder = nn.Sequential(nn.LayerNorm(o), *normed(o, h, h, h))
        self.enter = mlp(h + a, h)
        self.attention = Attention(n, h, attention)
        self.dynamics = normed(h + a + h, h, h, h)
        self.reward = nn.Sequential(*normed(n * (h + a), h // 4), nn.Linear(h // 4, 1))
        for parameter in self.reward[-1].parameters():
            nn.init.zeros_(parameter)
        self.projector = nn.Sequential(*normed(n * h, h, h), nn.LayerNorm(h))
        self.predictor = normed(h, h // 2, h)
        self.dec_obs = mlp(2 * h, h, h, k * o)  # ours
        self.dec_state = mlp(2 * n * h, h, h, k * s)  # ours

    def represent(self, obs) -> torch.Tensor:
        """h (B,N,H) from raw obs (B,N,O)."""
        return self.encoder(self.rows.standardise("obs", obs))

    def advance(self, h, actions) -> torch.Tensor:
        """The next h (B,N,H) from h and actions (B,N,A)."""
        x = self.enter(torch.cat([h, actions], -1)).relu()
        return h + self.dynamics(torch.cat([h, actions, self.attention(x)], -1))

    def reward_of(self, h, actions) -> torch.Tensor:
        """r (B,1), standardised, of the step with `actions` to h (B,N,H)."""
        return self.reward(torch.cat([h, actions], -1).flatten(1))

    def decode(self, first, h) -> tuple[torch.Tensor, torch.Tensor]:
        """What `JointRows.prediction` reads: s (B,kS), o (B,N,kO), as changes since `first`."""
        both = torch.cat([first, h], -1)  # (B,N,2H)
        return self.dec_state(both.flatten(1)), self.dec_obs(both)

    def unrolled(self, h, actions) -> torch.Tensor:
        """The latent states (K,W,N,H) that follow h (W,N,H) by actions (K,W,N,A)."""
        found = []
        for t in range(len(actions)):
            h = self.advance(halved(h) if t else h, actions[t])
            found.append(h)
        return torch.stack(found)

    def consistency_loss(self, h, next_obs) -> torch.Tensor:
        """Minus the cosine (B,) between what the predictor makes of h (B,N,H) and the projected
        representation of next_obs, through which no gradient flows.
        """
        with torch.no_grad():  # else all states could become alike
            target = self.projector(self.represent(next_obs).flatten(1))
        return -F.cosine_similarity(self.predictor(self.projector(h.flatten(1))), target)

    def loss(self, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Reward, consistency, decoders, heads, a mean over windows and steps.

        Args:
            batch: of it, the number of rows counts.
        """
        rows, device = self.rows, self.starts.device
        generator = torch.Generator(device).manual_seed(10**6 * self.seed + self.updates)
        self.updates += 1
        steps = self.draw_windows(len(batch.reward), generator)  # (K,W)
        since = steps[:1].expand_as(steps).flatten()  # (K W,) the window's first row, for each
        batch = self.data.gather(steps.flatten())  # (K W,...)
        batch = batch._replace(obs=self.data.obs[since], state=self.data.state[since])
        first = self.represent(self.data.obs[steps[0]])  # (W,N,H)
        h = self.unrolled(first, self.data.actions[steps]).flatten(0, 1)  # (K W,N,H)

        r = self.reward_of(h, batch.actions)  # (K W,1)
        reward = 0.5 * (rows.standardise("reward", batch.reward) - r.squeeze(-1)).square()
        # The last step's reward is the end head's, as in LOGO
        reward = reward * (1 - batch.terminated) if rows.heads else reward
        consistency = self.consistency_loss(h, batch.next_obs)
        of_state, of_obs = self.decode(first.repeat(self.window, 1, 1), h)
        out = joined(rows, of_state, of_obs, r)
        s_next, o_next, _ = rows.predictions(out, batch.obs, batch.state)
        nll_obs = LogoWM.nll(rows, "obs", batch.next_obs, o_next)  # (K W,N)
        nll_state = LogoWM.nll(rows, "state", batch.next_state, s_next)
        assert reward.shape == consistency.shape == nll_state.shape == batch.reward.shape

        parts = {"nll_obs": nll_obs.mean(), "nll_state": nll_state.mean(), "reward": reward.mean()}
        parts |= {"heads": rows.heads_loss(out, batch)}
        total = sum(parts.values()) + self.weight * consistency.mean()
        parts |= {"consistency": consistency.mean()}
        return total, {k: v.detach() for k, v in parts.items()}

    def follow(self, first, h, first_obs, first_state, actions) -> tuple[torch.Tensor, dict]:
        """The next h, and what `step` returns. Decoders say what has changed since the window's
        start: raw first_obs, first_state, and `first`, their latent state.
        """
        h = self.advance(h, actions)
        out = joined(self.rows, *self.decode(first, h), self.reward_of(h, actions))
        outcome = self.rows.outcome(out, first_obs, first_state)
        return h, outcome | {"uncertainty": torch.zeros_like(outcome["reward"])}

    @torch.no_grad()
    def step(self, obs, state, actions) -> dict[str, torch.Tensor]:
        """One step from raw (o, s, a): entries of `JointRows.outcome`; uncertainty (B,) is 0."""
        h = self.represent(obs)
        return self.follow(h, h, obs, state, actions)[1]

    @torch.no_grad()
    def imagine(self, policy, starts, horizon: int, generator: torch.Generator) -> dict:
        """Rollouts from real starts, as `LogoWM.imagine` returns them."""
        t, start, first, h = 0, None, None, None

        def step(obs, state, actions) -> dict:
            nonlocal t, start, first, h
            if t % self.window == 0:  # in between h goes on, not what was decoded from it
                start, first = (obs, state), self.represent(obs)
                h = first
            t += 1
            h, outcome = self.follow(first, h, *start, actions)
            return outcome

        return self.rows.imagine(step, policy, starts, horizon, generator)


def make_world_model(args: Args, spec, data) -> MAZero:
    """The model for this task's data, on the data's device."""
    rows = JointRows(spec, data, args.hidden, args.zeros, args.heads, args.clamp)
    sizes = (args.wm_hidden, args.attention, args.window, args.consistency)
    return MAZero(rows, data, *sizes, args.seed).to(data.obs.device)


def _self_check():
    """The small world of joint.py."""
    sizes = {"hidden": 64, "attention": 1, "window": 3}
    check(lambda spec, data: MAZero(JointRows(spec, data, 64), data, **sizes), 120)


if __name__ == "__main__":
    run("mazero", Args, _self_check, world_model=make_world_model)
