"""LOGO world model: local predictions, pieced together into a global one [Li et al., AAMAS 2026].

  predict  (o^i, a^i, s) --E_p--> o_hat^i      every agent's next observation, its own small network
  deduce   (o_hat^1..n)  --R_d--> s', r'       next state and reward, pieced together from these
  doubt    (o, a, s)     --E_ps-> s_hat, r_hat the same, predicted directly;  u = |s_hat - s'|
  imagine  predict and deduce in turn, H steps, with a policy choosing the actions

Training (`loss`) adds self-supervision by two more networks: R_p recovers (o^i, a^i) from o_hat^i,
and E_d predicts the observations from (s', r), so that R_d learns on true and on predicted ones.

  E_p  encoder of the predictive model   R_p  its decoder     Eq. (2), Sec. 4.2
  E_d  encoder of the deductive model    R_d  its decoder     Eq. (3), (4), Sec. 4.2
  E_ps auxiliary state encoder           u    uncertainty     Eq. (5), (6), Sec. 4.3

Raw units outside, standardised inside: the data's statistics are buffers of the module, so a saved
model needs nothing beside it. The paper's E_p and R_p are separate networks for each agent; here
they are one batched layer with a leading agent dimension, which computes the same.

Departures from the paper's letter; each has a switch (README, Deviations):
  D1  R_d also sees s (and a) and adds to s: what no agent observes cannot be deduced from o_hat.
  D2  Eq. (4) feeds E_p with (o_t, a_t, s_t), as Eq. (2) does; the paper prints o_{t+1}.
  D3  Two heads beyond the paper: who may do what, and is the episode over.
  D4  Imagined observations, states and rewards are clamped to the range of the data.

Sizes: B batch, N agents, O observation, S state, A action (one-hot if discrete), H horizon.
       o (B,N,O)  s (B,S)  a (B,N,A)  r (B,)  avail (B,N,A)
"""

from collections.abc import Callable

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


def agent_mlp(agents: int, *sizes: int) -> nn.Sequential:
    """Per-agent multi-layer perceptron, ReLU between the layers."""
    layers = [AgentLinear(agents, i, j) for i, j in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU(inplace=True))][:-1])


def mlp(*sizes: int) -> nn.Sequential:
    """Multi-layer perceptron, ReLU between the layers."""
    layers = [nn.Linear(i, j) for i, j in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU(inplace=True))][:-1])


def gaussian_nll(x: torch.Tensor, mean: torch.Tensor, log_var: torch.Tensor | None) -> torch.Tensor:
    """-log N(x; mean, exp log_var) summed over the last dimension, without its constant."""
    if log_var is None:  # unit variance: maximum likelihood is least squares
        return 0.5 * (x - mean).square().sum(-1)
    return 0.5 * ((x - mean).square() * torch.exp(-log_var) + log_var).sum(-1)


class LogoWM(nn.Module):
    """The whole world model. See the module's docstring for the names.

    Args:
        num_agents, obs_dim, state_dim, action_dim: N, O, S, A.
        hidden: width of every layer.
        discrete: actions are one-hot and may be forbidden.
        statistics: of the data: obs_mean (N,O), state_std (S,), reward_min (), ... as
            `buffer.OfflineDataset.statistics` returns them; None = standardised already, no clamp.
        deduce_from: what R_d sees: "obs" (the paper), "obs+state" or "obs+state+actions".
        learn_variance: the Gaussians of E_p, E_d, E_ps learn their variance, else it is 1.
    """

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
        learn_variance: bool = False,
    ):
        super().__init__()
        n, o, s, a, h = num_agents, obs_dim, state_dim, action_dim, hidden
        self.sizes, self.discrete, self.deduce_from = (n, o, s, a), discrete, deduce_from
        self.learn_variance = learn_variance
        k = 2 if learn_variance else 1  # outputs per Gaussian dimension: mean, or mean and log var
        self.enc_state = mlp(s, h)  # h_s, computed once and shared by the agents
        self.enc_obs = agent_mlp(n, o + a, h)  # h_oi
        self.enc_p = agent_mlp(n, 2 * h, h, k * o)  # E_p: (h_s, h_oi) -> o_hat - o
        self.dec_p = agent_mlp(n, o, h, o + a)  # R_p: o_hat -> (o, a)
        self.enc_d = mlp(s + 1, h, h, k * n * o)  # E_d: (s_next, r) -> o_next of all agents
        context = ("state" in deduce_from) * s + ("actions" in deduce_from) * n * a
        self.dec_d = mlp(n * o + context, h, h, s + 1)  # R_d: o_hat of all agents -> (s', r')
        self.enc_ps = mlp(s + n * o + n * a, h, h, k * (s + 1))  # E_ps -> (s_hat - s, r_hat)
        self.avail_head = agent_mlp(n, o, h // 2, a) if discrete else None  # Deviation D3
        self.over_head = mlp(s, h // 2, 1)  # Deviation D3
        shapes = {"obs": (n, o), "state": (s,), "reward": ()}
        for name, shape in shapes.items():
            default = {"mean": 0.0, "std": 1.0, "min": -torch.inf, "max": torch.inf}
            for moment, value in default.items():
                key = f"{name}_{moment}"
                tensor = statistics[key].clone() if statistics else torch.full(shape, value)
                if moment == "std":  # a constant column carries no information: leave it at 0
                    tensor = torch.where(tensor < 1e-3, torch.ones_like(tensor), tensor)
                self.register_buffer(key, tensor)

    # ---------------------------------------------------------------------------- the sub-networks

    def standardise(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return (x - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_std")

    def restore(self, name: str, x: torch.Tensor, clamp: bool) -> torch.Tensor:
        """Raw units again; Deviation D4: inside the range of the data."""
        x = x * getattr(self, f"{name}_std") + getattr(self, f"{name}_mean")
        bounds = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
        return torch.maximum(torch.minimum(x, bounds[1]), bounds[0]) if clamp else x

    def gaussian(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and softly clamped log variance; None where the variance is fixed at 1."""
        if not self.learn_variance:
            return x, None
        mean, log_var = x.chunk(2, -1)
        log_var = 1.0 - F.softplus(1.0 - log_var)  # below 1: NLL cannot flatten a hard column
        return mean, -8.0 + F.softplus(log_var + 8.0)  # above -8: nor bet all on a constant one

    def predict(self, o: torch.Tensor, a: torch.Tensor, s: torch.Tensor):
        """E_p: mean and log variance of o_hat (B,N,O). All arguments standardised."""
        h_s = self.enc_state(s).relu_().unsqueeze(1).expand(-1, o.shape[1], -1)  # (B,N,hidden)
        h_o = self.enc_obs(torch.cat([o, a], -1)).relu_()  # (B,N,hidden)
        change, log_var = self.gaussian(self.enc_p(torch.cat([h_s, h_o], -1)))
        return o + change, log_var

    def deduce(self, o_hat: torch.Tensor, s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """R_d: (s', r') (B,S+1) from the observations of all agents; standardised."""
        known = [o_hat.flatten(1)]
        if "state" in self.deduce_from:  # Deviation D1
            known.append(s)
        if "actions" in self.deduce_from:  # Deviation D1
            known.append(a.flatten(1))
        out = self.dec_d(torch.cat(known, -1))
        return out + F.pad(s, (0, 1)) if "state" in self.deduce_from else out

    def predict_directly(self, o: torch.Tensor, a: torch.Tensor, s: torch.Tensor):
        """E_ps: mean and log variance of (s_hat, r_hat) (B,S+1); standardised."""
        x = torch.cat([s, o.flatten(1), a.flatten(1)], -1)
        change, log_var = self.gaussian(self.enc_ps(x))
        return change + F.pad(s, (0, 1)), log_var

    # -------------------------------------------------------------------------------- the objective

    def loss(self, batch, eq4_input: str = "obs") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """L_world + L_Eps + heads on a batch of real transitions.

        Args:
            batch: a `buffer.Batch`, raw units.
            eq4_input: "obs" as in Eq. (2), or "next_obs", which is what Eq. (4) prints.
        """
        o, s = self.standardise("obs", batch.obs), self.standardise("state", batch.state)
        o_next = self.standardise("obs", batch.next_obs)
        s_next = self.standardise("state", batch.next_state)
        r = self.standardise("reward", batch.reward)
        a, size, n = batch.actions, len(s), self.sizes[0]
        s_and_r = torch.cat([s_next, r.unsqueeze(-1)], -1)  # (B,S+1)

        # Predictive model. The decoder's gradient reaches E_p: it is there to shape o_hat.
        o_hat, o_log_var = self.predict(o, a, s)  # (B,N,O)
        encoder_p = gaussian_nll(o_next, o_hat, o_log_var)  # (B,N)  -log T(o_next | s, o, a)
        decoder_p = (torch.cat([o, a], -1) - self.dec_p(o_hat)).square().sum(-1)  # (B,N)
        assert encoder_p.shape == decoder_p.shape == (size, n)
        loss_p = (encoder_p + decoder_p).sum(1).mean()  # Eq. (2)

        # Deductive model, an auto-encoder of (s_next, r) through the joint observation.
        o_d, o_d_log_var = self.gaussian(self.enc_d(s_and_r))  # (B,N*O)
        encoder_d = gaussian_nll(o_next.flatten(1), o_d, o_d_log_var)  # (B,)  -log P(o_next | s, r)
        decoder_d = (s_and_r - self.deduce(o_d.view_as(o), s, a)).square().sum(-1)  # (B,)
        assert encoder_d.shape == decoder_d.shape == (size,)
        loss_d = (encoder_d + decoder_d).mean()  # Eq. (3)

        # R_d on what it will see when imagining. The gradient reaches E_p, as L_world sums it all.
        # Deviation D2: with eq4_input "obs" this is the o_hat from above.
        guess = o_hat if eq4_input == "obs" else self.predict(o_next, a, s)[0]
        deduced = self.deduce(guess, s, a)  # (B,S+1)
        assert deduced.shape == s_and_r.shape
        loss_rd = (s_and_r - deduced).square().sum(-1).mean()  # Eq. (4)

        direct, direct_log_var = self.predict_directly(o, a, s)
        loss_ps = gaussian_nll(s_and_r, direct, direct_log_var).mean()  # Eq. (6)

        # Deviation D3. Detached: the heads read the predictions, they do not bend them.
        loss_over = F.binary_cross_entropy_with_logits(
            self.over_head(deduced[:, :-1].detach()).squeeze(-1), batch.terminated
        )
        loss_avail = torch.zeros_like(loss_over)
        if self.discrete:
            allowed = self.avail_head(o_hat.detach())  # (B,N,A) logits
            loss_avail = F.binary_cross_entropy_with_logits(allowed, batch.next_avail)
        total = loss_p + loss_d + loss_rd + loss_ps + loss_over + loss_avail
        parts = {"L_p": loss_p, "L_d": loss_d, "L_Rd": loss_rd, "L_ps": loss_ps}
        parts |= {"L_over": loss_over, "L_avail": loss_avail}
        return total, {k: v.detach() for k, v in parts.items()}

    # ---------------------------------------------------------------------------------- using it

    @torch.no_grad()
    def step(self, obs, state, actions, clamp: bool = True) -> dict[str, torch.Tensor]:
        """One imagined step from raw (o, s, a): everything the model has to say about it, raw.

        Returns:
            next_obs (B,N,O), next_state (B,S), reward (B,), direct_state (B,S), direct_reward (B,),
            u (B,), terminated (B,) probability, next_avail (B,N,A) 0/1 or None.
        """
        o, s, a = self.standardise("obs", obs), self.standardise("state", state), actions
        o_hat, _ = self.predict(o, a, s)
        s_prime, r_prime = self.deduce(o_hat, s, a).split([s.shape[-1], 1], -1)
        s_hat, r_hat = self.predict_directly(o, a, s)[0].split([s.shape[-1], 1], -1)
        u = (s_hat - s_prime).norm(dim=-1)  # Eq. (5)
        next_avail = None
        if self.discrete:
            logits = self.avail_head(o_hat)  # (B,N,A)
            best = logits >= logits.amax(-1, keepdim=True)  # somebody without any action acts still
            next_avail = ((logits > 0) | best).float()
        return {
            "next_obs": self.restore("obs", o_hat, clamp),
            "next_state": self.restore("state", s_prime, clamp),
            "reward": self.restore("reward", r_prime.squeeze(-1), clamp),
            "direct_state": self.restore("state", s_hat, clamp),
            "direct_reward": self.restore("reward", r_hat.squeeze(-1), clamp),
            "u": u,
            "terminated": self.over_head(s_prime).squeeze(-1).sigmoid(),
            "next_avail": next_avail,
        }

    @torch.no_grad()
    def imagine(
        self,
        act: Callable,
        obs: torch.Tensor,
        state: torch.Tensor,
        avail: torch.Tensor | None,
        dice: torch.Tensor,
        heads: bool = True,
        clamp: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Roll a policy out in the model from real starts: Algorithm 1, lines 12-20.

        Args:
            act: (o (B,N,O), avail (B,N,A) or None, step 0..H-1) -> actions (B,N,A), the exploring
                policy.
            obs, state, avail: (B,...) of real rows to start from.
            dice: (H,B) uniform on [0,1), which decide where rollouts end. Every rollout is
                computed for all H steps, without looking at the values (on a GPU a look costs
                more than the steps it saves); `filled` says what counts.
            heads: False = the paper's letter: no step ends, every action may be taken.
        Returns:
            obs (H+1,B,N,O), state (H+1,B,S), avail (H+1,B,N,A) if discrete, actions (H,B,N,A), and
            reward, terminated, u, filled (H,B); filled is 1 up to and with the terminal step.
        """
        if not heads and avail is not None:
            avail = torch.ones_like(avail)
        kept = {"obs": [obs], "state": [state], "avail": [avail]}
        steps = {"actions": [], "reward": [], "terminated": [], "u": [], "filled": []}
        filled = torch.ones_like(state[:, 0])  # (B,)
        for h, die in enumerate(dice):
            actions = act(obs, avail, h)
            out = self.step(obs, state, actions, clamp)
            obs, state = out["next_obs"], out["next_state"]
            over = torch.zeros_like(filled)
            if heads:  # the data's battles end at random moments: draw, do not threshold
                over = (die < out["terminated"]).float()
                avail = out["next_avail"]
            now = (actions, out["reward"], over, out["u"], filled)
            for name, value in zip(steps, now, strict=True):
                steps[name].append(value)
            for name, value in zip(kept, (obs, state, avail), strict=True):
                kept[name].append(value)
            filled = filled * (1 - over)
        return {k: torch.stack(v) for k, v in (kept | steps).items() if v[0] is not None}


def _self_check():
    """Learn a small world of three agents on a line; the model must beat "nothing changes" tenfold.

    Each agent sees the noiseless distances to the others and moves itself by its action; the
    state is where everybody stands, the reward how close together they are.
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
    for k in range(601):
        if k % 200 == 0:
            out = model.step(test.obs, test.state, test.actions)
            error = (out["next_state"] - test.next_state).square().mean().item()
            still = (test.state - test.next_state).square().mean().item()
            true = (out["next_state"] - test.next_state).norm(dim=-1)
            ranks = torch.stack([out["u"], true]).argsort(-1).argsort(-1).float()
            rho = torch.corrcoef(ranks)[0, 1].item()
            print(
                f"update {k:3}: state error {error:.5f}, nothing changes {still:.5f}, "
                f"rank correlation of u with the error {rho:.2f}"
            )
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - k / 601)
        rows = torch.randint(1000, size, (256,), generator=g)
        batch = {k: None if v is None else v[rows] for k, v in vars(data).items()}
        loss, _ = model.loss(SimpleNamespace(**batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error < still / 10, "the model must learn this world"


if __name__ == "__main__":
    _self_check()
