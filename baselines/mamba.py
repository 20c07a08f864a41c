"""MAMBA's world model, offline: a recurrent latent state for each agent [Egorov, Shpilman, 2022].

  advance  (z_t, a_t) of all agents --attention, GRU--> h_t+1     deterministic part of the state
  prior    h_t+1         --> z_t+1     stochastic part: 16 draws from 16 classes each
  observe  h_t, o_t      --> z_t       posterior: z where the observation is known
  decode   h_t, z_t      --> o_t, s_t;    h_t+1, z_t --> r_t      shared by the agents
  imagine  observe once, then advance, prior and decode in turn: the latent state goes on

Trained on windows of L recorded steps: what the posterior's state decodes to is held to the data,
and their KL divergence draws prior and posterior together. `train.main` hands out transitions, so
the model keeps the dataset and draws windows of its own, of as many rows as it is handed; which
ones depends on --seed and on the number of updates so far, which the state_dict holds.

Departures: the model stands under MACQL and never meets the environment. s has a decoder, on all
agents' states; MAMBA predicts no global state. The team's reward is the mean of the agents'
predictions. A rollout has no history: it starts from the posterior of one observation after zeros,
as every window does. Available actions and ends are read off the decoded o and s by the heads of
all world models here (joint.py; D3, D4, D11 apply), which do not shape the latent state. Squared
errors replace smooth-L1, and ReLU ELU; there is no dropout, no clipping of gradients and no
auxiliary prediction of actions. For an expected value, z is its probabilities. Windows and sizes
are smaller than published (see the flags; embedding and reward have one hidden layer), so that an
update takes no more than 1.5 times LOGO's on one core. Step size and weight decay are LOGO's;
MAMBA has 2e-4 and none.

Source: https://github.com/jbr-ai-labs/mamba at 2c97258: agent/models/DreamerModel.py,
agent/optim/{loss,utils}.py, networks/dreamer/{rnns,vae}.py, networks/transformer/layers.py.

Sizes: W windows, L steps, B batch, N agents, O observation, S state, A action, H width,
       Z = 16 x 16 latents x classes, F = H + Z. A window has L+1 moments and L transitions.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn as nn

import train
from baselines import run
from baselines.direct import joined
from baselines.joint import JointRows, check
from experiment.diagnostics import windows
from logo_wm import LogoWM, mlp


@dataclass
class Args(train.Args):
    """MAMBA: a recurrent world model with discrete latents and attention between the agents."""

    NO_EFFECT: ClassVar = ("deduce_from", "observe", "uncertainty", "cap", "u_scale")

    uncertainty: Literal["weight", "penalty", "none"] = "none"
    """use of u, which this model does not have: none [Table 1 of LOGO's paper]"""
    wm_batch_size: int = 160
    """B, rows per step, in B / L windows [ours; MAMBA: 40 windows]"""
    window: int = 5
    """L, steps of a window [ours; MAMBA: 20]"""
    wm_hidden: int = 128
    """H, width of all layers of the world model; a multiple of 8 [ours; MAMBA: 256]"""
    latents: int = 16
    """categorical variables of an agent's state [ours; MAMBA: 32]"""
    classes: int = 16
    """classes of each of them [ours; MAMBA: 32]"""
    attention: int = 1
    """layers of attention between the agents [ours; MAMBA: 3]"""


def window_starts(data, length: int) -> torch.Tensor:
    """For each training row, the first row of the window to draw for it: (len(data.train),).

    A row with fewer than `length` steps ahead has the last window of its episode, so that an
    episode's end is drawn as often as its middle. A row of an episode shorter than that has the
    last window before it, or the first of all.

    Raises:
        ValueError: every training episode is shorter than `length`.
    """
    first = windows(data.train, length)
    if len(first) == 0:
        raise ValueError(f"--window {length}: no training episode has as many steps; give fewer.")
    return first[(torch.searchsorted(first, data.train, right=True) - 1).clamp(min=0)]


def kl_loss(prior: torch.Tensor, posterior: torch.Tensor, balance: float = 0.2) -> torch.Tensor:
    """KL(posterior | prior) of logits (...,latents,classes), a mean over all but the classes.

    Of its gradient, the share `balance` reaches the posterior and the rest the prior.
    """
    log_p, log_q = posterior.log_softmax(-1), prior.log_softmax(-1)

    def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    kept, moved = kl(log_p, log_q.detach()), kl(log_p.detach(), log_q)
    return balance * kept + (1 - balance) * moved  # KL balance of DreamerV2


class Attention(nn.Sequential):
    """Transformer layers between the agents, told apart by sinusoids: (B,N,H) -> (B,N,H).

    Raises:
        ValueError: `hidden` is no multiple of the eight heads.
    """

    def __init__(self, agents: int, hidden: int, layers: int):
        if hidden % 8:
            raise ValueError(f"--wm-hidden is {hidden}: give a multiple of 8.")
        make = partial(nn.TransformerEncoderLayer, hidden, 8, hidden, 0.0, batch_first=True)
        super().__init__(*(make() for _ in range(layers)))
        angle = torch.arange(agents)[:, None] / 10_000 ** (torch.arange(0, hidden, 2) / hidden)
        sinusoids = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)  # (N,H)
        self.register_buffer("positions", sinusoids, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.positions)


class MAMBA(nn.Module):
    """The world model; see the module's docstring.

    Args:
        rows: `JointRows` of the task. data: `OfflineDataset`, to draw windows from.
        hidden, latents, classes, attention, window: see `Args`. seed: of the draws in training.
    Raises:
        ValueError: see `Attention`.
    """

    compilable = ()

    def __init__(
        self, rows, data, hidden=128, latents=16, classes=16, attention=1, window=5, seed=0
    ):
        super().__init__()
        (n, o, s, a), h, z, k = rows.sizes, hidden, latents * classes, 1 + rows.zeros
        self.rows, self.data, self.sizes = rows, data, (hidden, latents, classes)
        self.starts, self.window = window_starts(data, window), window
        self.seed, self.updates = seed, 0
        self.embed = mlp(o, h, h)
        self.enter = mlp(z + a, h)
        self.attention = Attention(n, h, attention)
        self.cell = nn.GRUCell(h, h)
        self.prior, self.posterior = mlp(h, h, z), mlp(2 * h, h, z)
        self.dec_obs = mlp(h + z, h, h, k * o)
        self.dec_state = mlp(n * (h + z), h, h, k * s)  # ours
        self.reward = mlp(h + z, h, 1)

    def get_extra_state(self) -> int:
        """Updates so far, in the state_dict: a tensor on a GPU would have to be waited for."""
        return self.updates

    def set_extra_state(self, state: int) -> None:
        self.updates = state

    def draw(self, logits: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """z (...,Z), one-hot, with the gradient of its probabilities; None: the probabilities."""
        p = logits.unflatten(-1, self.sizes[1:]).softmax(-1)
        if generator is None:
            return p.flatten(-2)
        noise = torch.rand(p.shape, generator=generator, device=p.device)
        choice = (p / -noise.log()).argmax(-1, keepdim=True)  # c with probability p_c
        z = torch.zeros_like(p).scatter_(-1, choice, 1.0)
        return (z + p - p.detach()).flatten(-2)

    def advance(self, h, z, actions) -> torch.Tensor:
        """The next h (B,N,H) from h, z (B,N,Z) and actions (B,N,A)."""
        x = self.enter(torch.cat([z, actions], -1)).relu()
        return self.cell(self.attention(x).flatten(0, 1), h.flatten(0, 1)).view_as(h)

    def begin(self, batch: int) -> torch.Tensor:
        """h_0 (B,N,H), of zeros."""
        (n, _, _, a), (h, m, c) = self.rows.sizes, self.sizes
        zeros = self.attention.positions.new_zeros(batch, n, h + m * c + a)
        return self.advance(*zeros.split([h, m * c, a], -1))

    def observe(self, h, obs, generator=None) -> tuple[torch.Tensor, torch.Tensor]:
        """z (B,N,Z) of the posterior given raw obs (B,N,O), and its logits."""
        embedded = self.embed(self.rows.standardise("obs", obs))
        logits = self.posterior(torch.cat([h, embedded], -1))
        return self.draw(logits, generator), logits

    def decode(self, h, z) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs for s (...,kS) and o (...,N,kO), which `JointRows.prediction` reads."""
        features = torch.cat([h, z], -1)  # (...,N,F)
        return self.dec_state(features.flatten(-2)), self.dec_obs(features)

    def reward_of(self, h, before) -> torch.Tensor:
        """r (...,1), standardised, of the step from z `before` to h (...,N,_)."""
        return self.reward(torch.cat([h, before], -1)).mean(-2)

    def draw_windows(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """Row numbers (L,W) of recorded steps, W = rows / L; a column is within one episode."""
        size, device = (max(1, rows // self.window),), self.starts.device
        pick = torch.randint(len(self.starts), size, generator=generator, device=device)
        return self.starts[pick] + torch.arange(self.window, device=device).unsqueeze(1)

    def loss(self, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Reconstruction, reward, KL, heads on windows; of `batch` the number of rows counts."""
        rows, device = self.rows, self.starts.device
        generator = torch.Generator(device).manual_seed(10**6 * self.seed + self.updates)
        self.updates += 1
        steps = self.draw_windows(len(batch.reward), generator)  # (L,W)
        moments = torch.cat([steps, steps[-1:] + 1])  # (L+1,W)
        obs, state = self.data.obs[moments], self.data.state[moments]
        batch = self.data.gather(steps.flatten())  # (L W,...)
        h, found = self.begin(steps.shape[1]), []
        for t in range(self.window + 1):
            z, logits = self.observe(h, obs[t], generator)
            found.append((h, z, logits))
            if t < self.window:
                h = self.advance(h, z, self.data.actions[steps[t]])
        h, z, posterior = (torch.stack(x) for x in zip(*found, strict=True))  # (L+1,W,N,_)
        prior = self.prior(h)
        kl = kl_loss(*(x.unflatten(-1, self.sizes[1:]) for x in (prior, posterior)))

        of_state, of_obs = self.decode(h, z)  # of moments, while `JointRows.nll` is of transitions
        nll_obs = LogoWM.nll(rows, "obs", obs, rows.prediction("obs", of_obs, 0.0))
        nll_state = LogoWM.nll(rows, "state", state, rows.prediction("state", of_state, 0.0))
        r = self.reward_of(h[1:], z[:-1]).flatten(0, 1)  # (L W,1)
        error = 0.5 * (rows.standardise("reward", batch.reward) - r.squeeze(-1)).square()
        # The last step's reward is the end head's, as in LOGO
        error = error * (1 - batch.terminated) if rows.heads else error
        assert nll_state.shape == moments.shape and error.shape == batch.reward.shape

        with torch.no_grad():  # the heads read what a rollout consists of
            drawn = self.draw(prior[1:], generator)
            imagined = self.decode(h[1:].flatten(0, 1), drawn.flatten(0, 1))
        mean = {"obs": rows.obs_mean.expand_as(batch.obs), "state": rows.state_mean}
        heads = rows.heads_loss(joined(rows, *imagined, r.detach()), batch._replace(**mean))
        parts = {"nll_obs": nll_obs.mean(), "nll_state": nll_state.mean(), "reward": error.mean()}
        parts |= {"kl": kl, "heads": heads}
        return sum(parts.values()), {k: v.detach() for k, v in parts.items()}

    def follow(self, h, z, actions, generator=None) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """The next h and z, z from the prior, and what `step` returns."""
        h, before, rows = self.advance(h, z, actions), z, self.rows
        z = self.draw(self.prior(h), generator)
        out = joined(rows, *self.decode(h, z), self.reward_of(h, before))
        # What is decoded are not changes of the last o and s: they are changes from the mean, 0
        mean = rows.obs_mean.expand(len(h), -1, -1), rows.state_mean.expand(len(h), -1)
        outcome = rows.outcome(out, *mean)
        return h, z, outcome | {"uncertainty": torch.zeros_like(outcome["reward"])}

    @torch.no_grad()
    def step(self, obs, state, actions) -> dict[str, torch.Tensor]:
        """One expected step from raw (o, a) alone: `JointRows.outcome`, and uncertainty (B,) 0."""
        h = self.begin(len(obs))
        return self.follow(h, self.observe(h, obs)[0], actions)[2]

    @torch.no_grad()
    def imagine(self, policy, starts, horizon: int, generator: torch.Generator) -> dict:
        """Rollouts from real starts, as `LogoWM.imagine` returns them; every z is drawn."""
        h = self.begin(len(starts.obs))
        z, _ = self.observe(h, starts.obs, generator)

        def step(obs, state, actions) -> dict:  # (h, z) go on, not what was decoded from them
            nonlocal h, z
            h, z, outcome = self.follow(h, z, actions, generator)
            return outcome

        return self.rows.imagine(step, policy, starts, horizon, generator)


def make_world_model(args: Args, spec, data) -> MAMBA:
    """The model for this task's data, on the data's device."""
    rows = JointRows(spec, data, args.hidden, args.zeros, args.heads, args.clamp)
    sizes = (args.wm_hidden, args.latents, args.classes, args.attention, args.window)
    return MAMBA(rows, data, *sizes, args.seed).to(data.obs.device)


def _self_check():
    """The small world of joint.py, with many small latents, because its values are continuous."""
    sizes = {"hidden": 64, "latents": 32, "classes": 4, "window": 2}
    check(lambda spec, data: MAMBA(JointRows(spec, data, 64), data, **sizes), 360, lr=5e-3)


if __name__ == "__main__":
    run("mamba", Args, _self_check, world_model=make_world_model)
