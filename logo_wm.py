"""LOGO world model: local predictions, pieced together into a global one [Li et al., AAMAS 2026].

  predict  (o^i, a^i, s) --E_p--> o_hat^i       next observation of each agent, by its own network
  deduce   (o_hat^1..n)  --R_d--> s', r'        next state and reward, from all predictions together
  observe  (s', r')      --E_d--> o'^i          what each agent sees of that state
  doubt    (o, a, s)     --E_ps-> s_hat, r_hat  s' and r' predicted directly;  u = |s_hat - s'|
  imagine  predict, deduce and observe in turn, H steps, with a policy choosing the actions

    world_model = LogoWM(num_agents, obs_dim, state_dim, action_dim, statistics=data.statistics())
    loss, metrics = world_model.loss(batch)                                  # train with any Adam
    rollout = world_model.imagine(policy, starts, horizon=15, generator=g)   # for SyntheticBuffer

`batch` and `starts` are `buffer.Batch`es, or anything with the same fields. R_p is for training
only: it recovers (o^i, a^i) from o_hat^i. E_d learns from the true next state and reward, and R_d
to invert it.

  E_p  encoder of the predictive model   R_p  its decoder     Eq. (2), Sec. 4.2
  E_d  encoder of the deductive model    R_d  its decoder     Eq. (3), (4), Sec. 4.2
  E_ps auxiliary state encoder           u    uncertainty     Eq. (5), (6), Sec. 4.3

Tensors outside are in raw units; inside, o, s and r are standardised with the data's statistics,
which are buffers of the module and so part of its state_dict.

Departures from the paper; docs/deviations.md has the flags that take them back:
  D1  R_d also sees s (and a) and predicts the change of s: what no agent observes cannot be
      deduced from o_hat.
  D3  Two heads beyond the paper predict available actions and the end of the episode.
  D4  Imagined observations, states and rewards are clamped to the range of the data.
  D11 Entries that are exactly 0 in a part of the data (units out of sight, or dead) have a
      probability of being 0. A mean would be something that never occurs: a unit half in sight.
      In a rollout an entry becomes 0 where that is the likelier outcome; as a side effect fewer
      units die than in the data.
  D22 In a rollout agents observe E_d's o', which fits the deduced state; the paper: o_hat.
Readings, where the paper leaves a choice: Eq. (4) feeds E_p with (o_t, a_t, s_t), as Eq. (2) does,
though it prints o_{t+1}, which is what is to be predicted; the Gaussians have variance 1, and their
means are used wherever the paper samples from E_p, E_d or E_ps; E_p and E_ps predict changes of o
and s; E_ps is one joint network, though Eq. (6) is written per agent; one state encoder serves all
agents; E_d is one network per agent; norms in the losses are sums over dimensions.

Sizes: B batch, N agents, O observation, S state, A action (one-hot if discrete), H horizon.
       o (B,N,O)  s (B,S)  a (B,N,A)  r (B,)  avail (B,N,A)
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class AgentLinear(nn.Module):
    """N linear layers, one per agent, as one batched product: (B,N,I) -> (B,N,J)."""

    def __init__(self, agents: int, fan_in: int, fan_out: int):
        super().__init__()
        bound = fan_in**-0.5
        self.weight = nn.Parameter(torch.empty(agents, fan_in, fan_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(agents, 1, fan_out).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, x.transpose(0, 1), self.weight).transpose(0, 1)


def mlp(*sizes: int, layer: Callable = nn.Linear) -> nn.Sequential:
    """Multi-layer perceptron, ReLU between the layers."""
    layers = [m for i, j in pairwise(sizes) for m in (layer(i, j), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers[:-1])


def agent_mlp(agents: int, *sizes: int) -> nn.Sequential:
    """The same, one per agent."""
    return mlp(*sizes, layer=partial(AgentLinear, agents))


def gaussian_nll(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """-log N(x; mean, 1) summed over the last dimension, without its constant."""
    return 0.5 * (x - mean).square().sum(-1)


class Prediction(NamedTuple):
    """Of observations or states, in standardised units: means, and which entries are 0."""

    value: torch.Tensor  # the mean of an entry, given that it is not 0 in raw units
    logit: torch.Tensor | None  # of P(an entry is not 0); None: Gaussian alone (paper)


class LogoWM(nn.Module):
    """The whole world model; the module's docstring explains the names of the networks.

    Args:
        num_agents, obs_dim, state_dim, action_dim: N, O, S, A.
        hidden: width of the layers; the heads have half of it.
        discrete: actions are one-hot, and some may be unavailable.
        statistics: of the data: obs_mean (N,O), state_std (S,), reward_min (), ... as
            `buffer.OfflineDataset.statistics` returns them; None = standardised already, no clamp.
        deduce_from: what R_d sees: "obs" (the paper), "obs+state" or "obs+state+actions".
        heads: False = the paper: rollouts never end, every action is available.
        clamp: False = the paper: imagined values may leave the range of the data.
        zeros: False = the paper: Gaussians alone, also for entries that are exactly 0 at times.
        observe: what the policy sees in a rollout: "deduced" or, as in the paper, "predicted".
    """

    compilable = ("loss", "step")  # functions of tensors alone, for torch.compile

    def __init__(
        self,
        num_agents: int,
        obs_dim: int,
        state_dim: int,
        action_dim: int,
        hidden: int = 256,
        discrete: bool = True,
        statistics: dict[str, torch.Tensor] | None = None,
        deduce_from: str = "obs+state+actions",
        heads: bool = True,
        clamp: bool = True,
        zeros: bool = True,
        observe: str = "deduced",
    ):
        super().__init__()
        n, o, s, a, h = num_agents, obs_dim, state_dim, action_dim, hidden
        self.discrete, self.deduce_from = discrete, deduce_from
        self.heads, self.clamp, self.zeros, self.observe = heads, clamp, zeros, observe
        k = 2 if zeros else 1  # numbers per entry: a mean, and a logit
        self.enc_state = mlp(s, h)  # h_s, shared by the agents
        self.enc_obs = agent_mlp(n, o + a, h)  # h_o
        self.enc_p = agent_mlp(n, 2 * h, h, k * o)  # E_p: (h_s, h_o) -> o_hat - o
        self.dec_p = agent_mlp(n, o, h, o + a)  # R_p: o_hat -> (o, a)
        self.enc_d = agent_mlp(n, s + 1, h, h, k * o)  # E_d: (s_next, r) -> o_next
        context = ("state" in deduce_from) * s + ("actions" in deduce_from) * n * a
        self.dec_d = mlp(n * o + context, h, h, k * s + 1)  # R_d: o_hat of all agents -> (s', r')
        self.enc_ps = mlp(s + n * o + n * a, h, h, s + 1)  # E_ps -> (s_hat - s, r_hat)
        self.avail_head = agent_mlp(n, o, h // 2, a) if discrete else None  # Deviation D3
        self.end_head = mlp(s, h // 2, 2)  # Deviation D3: is s' the end, and its reward if it is
        self.register_statistics(n, o, s, statistics)

    # ------------------------------------------------------------------------------ units and zeros

    def register_statistics(self, n: int, o: int, s: int, statistics: dict | None) -> None:
        """Keep the data's statistics as buffers: obs_mean (N,O), state_std (S,), reward_min, ..."""
        default = {"mean": 0.0, "std": 1.0, "min": -torch.inf, "max": torch.inf}
        for name, shape in {"obs": (n, o), "state": (s,), "reward": ()}.items():
            for moment, value in default.items():
                key = f"{name}_{moment}"
                tensor = statistics[key].clone() if statistics else torch.full(shape, value)
                if moment == "std":  # a constant column is only centred: it stays 0
                    tensor = torch.where(tensor == 0, 1.0, tensor)
                self.register_buffer(key, tensor)
            if name != "reward":  # Deviation D11
                share = statistics[f"{name}_zero"] if statistics else torch.zeros(shape)
                sometimes = (share > 1e-3) & (share < 1 - 1e-3)
                self.register_buffer(f"{name}_sometimes_zero", sometimes)
        can_end = (statistics or {}).get("terminated_max", torch.ones(()))
        self.register_buffer("can_end", can_end.clone())  # 0: no episode of the data terminates

    def standardise(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Raw units -> mean 0, standard deviation 1 in the data; `name` is obs, state or reward."""
        return (x - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_std")

    def restore(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `standardise`."""
        return x * getattr(self, f"{name}_std") + getattr(self, f"{name}_mean")

    def clamp_to_data(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Deviation D4: raw values inside the range that they have in the data."""
        low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
        return torch.maximum(torch.minimum(x, high), low)

    def prediction(self, name: str, out: torch.Tensor, now: torch.Tensor | float) -> Prediction:
        """A network's output (...,D) or (...,2D) as changes from `now`, and logits."""
        value, logit = out.chunk(2, -1) if self.zeros else (out, None)
        if logit is not None:  # entries (nearly) always or never 0 are left to the Gaussian
            logit = torch.where(getattr(self, f"{name}_sometimes_zero"), logit, torch.inf)
        return Prediction(now + value, logit)

    def mean(self, name: str, x: Prediction) -> torch.Tensor:
        """The expected value, standardised; what the deduction and u are computed from."""
        if x.logit is None:
            return x.value
        p = x.logit.sigmoid()
        return p * x.value + (1 - p) * self.standardise(name, torch.zeros_like(x.value))

    def decide(self, name: str, x: Prediction) -> torch.Tensor:
        """What imagined rows hold, in raw units: of 0 and an entry's mean, the likelier."""
        value = self.restore(name, x.value)
        return value if x.logit is None else torch.where(x.logit > 0, value, 0.0)

    def nll(self, name: str, truth: torch.Tensor, x: Prediction) -> torch.Tensor:
        """-log of the prediction's density at the raw `truth`, summed over the last dimension."""
        error = 0.5 * (self.standardise(name, truth) - x.value).square()  # of a Gaussian
        if x.logit is None:
            return error.sum(-1)
        sometimes = getattr(self, f"{name}_sometimes_zero")
        nonzero = torch.where(sometimes, truth != 0, True).to(error)
        logit = x.logit.masked_fill(~sometimes, 0.0)  # whose loss must stay finite
        loss = F.binary_cross_entropy_with_logits(logit, nonzero, reduction="none")
        return (loss * sometimes + nonzero * error).sum(-1)

    # ---------------------------------------------------------------------------- the sub-networks

    def predict(self, o: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> Prediction:
        """E_p: the next observations (B,N,O); o and s standardised."""
        h_s = self.enc_state(s).relu_().unsqueeze(1).expand(-1, o.shape[1], -1)  # (B,N,hidden)
        h_o = self.enc_obs(torch.cat([o, a], -1)).relu_()  # (B,N,hidden)
        return self.prediction("obs", self.enc_p(torch.cat([h_s, h_o], -1)), o)

    def deduce(self, o_hat, s, a) -> tuple[Prediction, torch.Tensor]:
        """R_d: s' (B,S) and r' (B,) from the observations of all agents; all standardised."""
        known, now = [o_hat.flatten(1)], 0.0
        if "state" in self.deduce_from:  # Deviation D1
            known, now = [*known, s], s
        if "actions" in self.deduce_from:  # Deviation D1
            known.append(a.flatten(1))
        out = self.dec_d(torch.cat(known, -1))
        return self.prediction("state", out[:, :-1], now), out[:, -1]

    def look(self, s: torch.Tensor, r: torch.Tensor) -> Prediction:
        """E_d: the observations (B,N,O) in the next state s (B,S), after r (B,); standardised."""
        x = torch.cat([s, r.unsqueeze(-1)], -1).unsqueeze(1)  # (B,1,S+1)
        return self.prediction("obs", self.enc_d(x.expand(-1, len(self.obs_mean), -1)), 0.0)

    def predict_directly(self, o: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """E_ps: (s_hat, r_hat) (B,S+1) without the way through o_hat; o, s standardised."""
        change = self.enc_ps(torch.cat([s, o.flatten(1), a.flatten(1)], -1))
        return change + F.pad(s, (0, 1))

    # -------------------------------------------------------------------------------- the objective

    def loss(self, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum of Eq. (2), (3), (4), (6) and of the heads' losses on real transitions.

        Args:
            batch: a `buffer.Batch`, raw units.
        Returns:
            the loss (), and its parts detached: L_p, L_d, L_Rd, L_ps; with heads L_end, L_avail.
        """
        o, s = self.standardise("obs", batch.obs), self.standardise("state", batch.state)
        s_next = self.standardise("state", batch.next_state)
        r = self.standardise("reward", batch.reward)
        a, size, n = batch.actions, len(s), o.shape[1]
        s_and_r = torch.cat([s_next, r.unsqueeze(-1)], -1)  # (B,S+1)

        def distance(deduced: tuple[Prediction, torch.Tensor]) -> torch.Tensor:
            """|[s_next, r] - R_d|^2 (B,): without D11, nll is half of the squared distance."""
            s_prime, r_prime = deduced
            error = (r - r_prime).square()
            if self.heads:  # Deviation D3: what an episode's last step pays is for end_head
                error = error * (1 - batch.terminated)
            return 2 * self.nll("state", batch.next_state, s_prime) + error

        # Predictive model. The decoder's gradient reaches E_p: it is there to shape o_hat.
        predicted = self.predict(o, a, s)  # (B,N,O)
        o_hat = self.mean("obs", predicted)
        encoder_p = self.nll("obs", batch.next_obs, predicted)  # (B,N)  -log T(o_next | s, o, a)
        decoder_p = (torch.cat([o, a], -1) - self.dec_p(o_hat)).square().sum(-1)  # (B,N)
        assert encoder_p.shape == decoder_p.shape == (size, n)
        loss_p = (encoder_p + decoder_p).sum(1).mean()  # Eq. (2)

        # Deductive model: an auto-encoder of (s_next, r) through the joint observation.
        o_d = self.look(s_next, r)  # (B,N,O)
        encoder_d = self.nll("obs", batch.next_obs, o_d).sum(1)  # (B,)  -log P(o_next | s_next, r)
        decoder_d = distance(self.deduce(self.mean("obs", o_d), s, a))  # (B,)
        assert encoder_d.shape == decoder_d.shape == (size,)
        loss_d = (encoder_d + decoder_d).mean()  # Eq. (3)

        # R_d on the predictions that it gets when imagining. The gradient reaches E_p as well.
        deduced = self.deduce(o_hat, s, a)
        loss_rd = distance(deduced).mean()  # Eq. (4)

        loss_ps = gaussian_nll(s_and_r, self.predict_directly(o, a, s)).mean()  # Eq. (6)

        parts = {"L_p": loss_p, "L_d": loss_d, "L_Rd": loss_rd, "L_ps": loss_ps}
        if self.heads:  # Deviation D3
            with torch.no_grad():  # they learn from what a rollout would show after this step
                s_seen = self.standardise("state", self.decide("state", deduced[0]))
                shown = self.look(s_seen, deduced[1]) if self.observe == "deduced" else predicted
                o_seen = self.standardise("obs", self.decide("obs", shown))
            parts["L_end"], parts["L_avail"] = self.head_losses(o_seen, s_seen, batch)
        return sum(parts.values()), {k: v.detach() for k, v in parts.items()}

    def head_losses(self, o_seen, s_seen, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Deviation D3: cross-entropy of the end and half the squared error of its reward, and
        cross-entropy of the available actions, from standardised o' (B,N,O) and s' (B,S).
        """
        is_end, last_r = self.end_head(s_seen).unbind(-1)  # (B,) logit, standardised
        error = (self.standardise("reward", batch.reward) - last_r).square()
        loss_end = F.binary_cross_entropy_with_logits(is_end, batch.terminated)
        loss_end = loss_end + 0.5 * (batch.terminated * error).mean()
        loss_avail = torch.zeros_like(loss_end)
        if self.discrete:
            logits = self.avail_head(o_seen)  # (B,N,A)
            loss_avail = F.binary_cross_entropy_with_logits(logits, batch.next_avail)
        return loss_end, loss_avail

    # ---------------------------------------------------------------------------------- using it

    @torch.no_grad()
    def step(self, obs, state, actions) -> dict[str, torch.Tensor]:
        """All predictions for one step from raw (o, s, a); raw units, not clamped.

        Returns:
            next_obs (B,N,O), next_state (B,S): see `decide`; mean_obs, mean_state: their expected
            values; reward (B,) expected, and what it is if the episode goes on or ends there:
            continuing_reward, last_reward (B,); direct_state (B,S), direct_reward (B,): of E_ps;
            uncertainty (B,), standardised; terminated (B,), a probability; next_avail (B,N,A) 0/1
            or None.
        """
        o, s, a = self.standardise("obs", obs), self.standardise("state", state), actions
        predicted = self.predict(o, a, s)
        s_prime, r_prime = self.deduce(self.mean("obs", predicted), s, a)
        s_hat, r_hat = self.predict_directly(o, a, s).split([s.shape[-1], 1], -1)
        mean_state = self.mean("state", s_prime)
        u = (s_hat - mean_state).norm(dim=-1)  # Eq. (5)
        next_state = self.decide("state", s_prime)
        s_seen = self.standardise("state", next_state)
        if self.observe == "deduced":  # Deviation D22
            predicted = self.look(s_seen, r_prime)
        next_obs = self.decide("obs", predicted)
        return self.read_heads(next_obs, s_seen, r_prime) | {
            "next_obs": next_obs,
            "next_state": next_state,
            "mean_obs": self.restore("obs", self.mean("obs", predicted)),
            "mean_state": self.restore("state", mean_state),
            "direct_state": self.restore("state", s_hat),
            "direct_reward": self.restore("reward", r_hat.squeeze(-1)),
            "uncertainty": u,
        }

    def read_heads(self, next_obs, s_seen, r) -> dict[str, torch.Tensor]:
        """Deviation D3: which actions are available in raw o' (B,N,O), whether standardised s'
        (B,S) is the end, and the reward of either case, from r (B,), standardised.
        """
        next_avail = None
        if self.discrete:
            logits = self.avail_head(self.standardise("obs", next_obs))  # (B,N,A)
            best = logits >= logits.amax(-1, keepdim=True)  # at least one action is available
            next_avail = ((logits > 0) | best | (not self.heads)).float()
        terminated, running = torch.zeros_like(r), self.restore("reward", r)
        reward = last = running
        if self.heads:
            is_end, last = self.end_head(s_seen).unbind(-1)
            terminated, last = is_end.sigmoid() * self.can_end, self.restore("reward", last)
            reward = torch.lerp(running, last, terminated)
        return {
            "next_avail": next_avail,
            "terminated": terminated,
            "reward": reward,
            "continuing_reward": running,
            "last_reward": last,
        }

    @torch.no_grad()
    def imagine(
        self, policy: Callable, starts, horizon: int, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Roll a policy out in the model from real starts: Algorithm 1, lines 12-20.

        Every rollout is computed for all H steps without looking at the values, because on a GPU a
        look costs more than the steps it saves; `valid` says which steps count.

        Args:
            policy: (obs (B,N,O), avail (B,N,A) or None, generator) -> actions (B,N,A).
            starts: a `buffer.Batch` of B real transitions, of which o, s and avail are used.
            horizon: H.
            generator: of the policy's actions, and of when rollouts end.
        Returns:
            obs (H+1,B,N,O), state (H+1,B,S), avail (H+1,B,N,A) if discrete, actions (H,B,N,A), and
            reward, terminated, uncertainty, valid (H,B); valid is 1 up to and including the
            terminal step.
        """
        obs, state, avail = starts.obs, starts.state, starts.avail
        if not self.heads and avail is not None:
            avail = torch.ones_like(avail)
        states = {"obs": [obs], "state": [state], "avail": [avail]}
        steps = {k: [] for k in ("actions", "reward", "terminated", "uncertainty", "valid")}
        valid = torch.ones_like(state[:, 0])  # (B,)
        for _ in range(horizon):
            actions = policy(obs, avail, generator)
            out = self.step(obs, state, actions)
            obs, state, reward = out["next_obs"], out["next_state"], out["reward"]
            if self.clamp:  # Deviation D4
                obs, state = self.clamp_to_data("obs", obs), self.clamp_to_data("state", state)
            done = torch.zeros_like(valid)
            if self.heads:  # Deviation D3: ends are random events in the data, so they are sampled
                chance = torch.rand(valid.shape, generator=generator, device=valid.device)
                done, avail = (chance < out["terminated"]).float(), out["next_avail"]
                reward = torch.where(done > 0, out["last_reward"], out["continuing_reward"])
            if self.clamp:
                reward = self.clamp_to_data("reward", reward)
            now = (actions, reward, done, out["uncertainty"], valid)
            for name, value in zip(steps, now, strict=True):
                steps[name].append(value)
            for name, value in zip(states, (obs, state, avail), strict=True):
                states[name].append(value)
            valid = valid * (1 - done)
        return {k: torch.stack(v) for k, v in (states | steps).items() if v[0] is not None}


def _self_check():
    """Learn a small world of three agents on a line; the model must beat "nothing changes" tenfold.

    Each agent observes its position and the distances to the others, and moves by its action. The
    state is all positions; the reward is higher the closer the agents are to each other.
    """
    from types import SimpleNamespace

    torch.manual_seed(0)
    n, size = 3, 20_000
    s = torch.rand(size, n) * 4
    a = torch.rand(size, n, 1) * 2 - 1
    s_next = s + 0.5 * a.squeeze(-1)

    def look(s):  # own position and the way to the others
        others = s.unsqueeze(1) - s.unsqueeze(2)  # (B,N,N)
        return torch.cat([s.unsqueeze(-1), others], -1)

    data = SimpleNamespace(
        obs=look(s), state=s, actions=a, next_obs=look(s_next), next_state=s_next,
        reward=-s_next.std(-1), terminated=(s_next.amax(-1) > 3.9).float(), next_avail=None,
    )  # fmt: skip
    model = LogoWM(n, n + 1, n, 1, hidden=64, discrete=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    test = SimpleNamespace(**{k: None if v is None else v[:1000] for k, v in vars(data).items()})
    g = torch.Generator().manual_seed(0)
    for k in range(301):
        if k % 100 == 0:
            out = model.step(test.obs, test.state, test.actions)
            error = (out["next_state"] - test.next_state).square().mean().item()
            still = (test.state - test.next_state).square().mean().item()
            true = (out["next_state"] - test.next_state).norm(dim=-1)
            ranks = torch.stack([out["uncertainty"], true]).argsort(-1).argsort(-1).float()
            rho = torch.corrcoef(ranks)[0, 1].item()
            print(
                f"update {k:3}: state error {error:.5f}, nothing changes {still:.5f}, "
                f"rank correlation of u with the error {rho:.2f}"
            )
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - k / 301)
        rows = torch.randint(1000, size, (256,), generator=g)
        batch = {k: None if v is None else v[rows] for k, v in vars(data).items()}
        loss, _ = model.loss(SimpleNamespace(**batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error < still / 10, "the model must learn this world"


if __name__ == "__main__":
    _self_check()
