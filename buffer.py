"""Data, real and imagined, in one shape.

  OfflineDataset   D:   recorded episodes, drawn uniformly; some episodes are held out for testing
  SyntheticBuffer  D_m: the latest collections of imagined rollouts, drawn with Eq. (7):
                        w = softmax(P_u),  P_u = clip(C - u, [0, C]),  u = the model's doubt
  mix              one training batch out of both (Algorithm 1, lines 24-29)

Both keep each observation once: a row's successor is another row. Drawing from D_m
costs one binary search a row in the cumulative weights, which are summed once per collection;
`torch.multinomial` would sum them at every draw, and takes at most 2^24 rows. `sample` is `draw`,
which is random, and `gather`, which computes: training calls them apart.

Sizes: B batch, N agents, O observation, S state, A action (one-hot if discrete), H horizon,
       R rows of D with each episode's last observation, M rollouts a collection, C the paper's cap.
"""

from typing import NamedTuple

import torch
import torch.nn as nn


class Batch(NamedTuple):
    """Transitions; float32, raw units, on the training device."""

    obs: torch.Tensor  # (B,N,O)
    state: torch.Tensor  # (B,S)
    actions: torch.Tensor  # (B,N,A)
    avail: torch.Tensor | None  # (B,N,A) 1 = may be taken; None: continuous actions
    reward: torch.Tensor  # (B,)
    next_obs: torch.Tensor  # (B,N,O)
    next_state: torch.Tensor  # (B,S)
    next_avail: torch.Tensor | None  # (B,N,A)
    terminated: torch.Tensor  # (B,) 1 = no value beyond; a time limit is not a termination


def rows_to_batch(obs, state, actions, avail, reward, terminated, now, then) -> Batch:
    """Gather the transitions from rows `now` to rows `then`, both (B,) int64."""
    return Batch(
        obs=obs[now],
        state=state[now],
        actions=actions[now],
        avail=None if avail is None else avail[now],
        reward=reward[now],
        next_obs=obs[then],
        next_state=state[then],
        next_avail=None if avail is None else avail[then],
        terminated=terminated[now],
    )


class OfflineDataset:
    """D: whole episodes, end to end, each with one row more than it has transitions.

    Args:
        obs (R,N,O), state (R,S), actions (R,N,A), avail (R,N,A) or None, reward (R,),
        terminated (R,): float32. The last row of an episode is its final observation; its action,
            reward and terminated are never read.
        lengths: transitions per episode, sum(lengths) + len(lengths) = R.
        holdout: share of the episodes that `sample` never draws from; at least one, never all.
        seed: of the choice of held-out episodes, so that every method is tested on the same ones.
    """

    def __init__(
        self, obs, state, actions, avail, reward, terminated, lengths, holdout=0.05, seed=0
    ):
        lengths = torch.as_tensor(lengths)
        if len(lengths) < 2:
            raise ValueError(f"{len(lengths)} episodes: at least two are needed, one is held out.")
        if int(lengths.sum()) + len(lengths) != len(obs):
            raise ValueError(
                f"lengths need {int(lengths.sum()) + len(lengths)} rows, not {len(obs)}."
            )
        self.obs, self.state, self.actions, self.avail = obs, state, actions, avail
        self.reward, self.terminated, self.lengths = reward, terminated, lengths
        starts = torch.cumsum(lengths + 1, 0) - lengths - 1  # (episodes,) first row of each
        self.episode_returns = torch.stack(
            [reward[s : s + n].sum() for s, n in zip(starts, lengths, strict=True)]
        )
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
        cut = min(max(1, round(holdout * len(lengths))), len(lengths) - 1)

        def transitions(episodes: torch.Tensor) -> torch.Tensor:
            rows = [torch.arange(starts[e], starts[e] + lengths[e]) for e in episodes]
            return torch.cat(rows).to(obs.device)

        self.held_out = transitions(order[:cut].sort().values)  # row numbers
        self.train = transitions(order[cut:].sort().values)

    def draw(self, size: int, generator: torch.Generator) -> torch.Tensor:
        """Rows (B,): uniform over the training transitions, with replacement."""
        device = self.train.device
        pick = torch.randint(len(self.train), (size,), generator=generator, device=device)
        return self.train[pick]

    def gather(self, rows: torch.Tensor) -> Batch:
        """The transitions that start in these rows (B,)."""
        columns = (self.obs, self.state, self.actions, self.avail, self.reward, self.terminated)
        return rows_to_batch(*columns, rows, rows + 1)

    def sample(self, size: int, generator: torch.Generator) -> Batch:
        """Uniform over the training transitions, with replacement."""
        return self.gather(self.draw(size, generator))

    def statistics(self) -> dict[str, torch.Tensor]:
        """Mean, standard deviation, minimum and maximum of o (N,O), s (S,) and r () in D."""
        result = {}
        for name in ("obs", "state", "reward"):
            x = getattr(self, name)[self.train]
            result |= {
                f"{name}_mean": x.mean(0),
                f"{name}_std": x.std(0),
                f"{name}_min": x.amin(0),
                f"{name}_max": x.amax(0),
            }
        return result


class SyntheticBuffer(nn.Module):
    """D_m: a ring of the latest `retain` collections of M rollouts over H steps.

    Everything is allocated once, on `device`; `add` overwrites the oldest collection. A module only
    in that it owns tensors.
    """

    def __init__(
        self, retain, horizon, rollouts, num_agents, obs_dim, state_dim, action_dim, device,
        discrete=True,
    ):  # fmt: skip
        super().__init__()
        self.retain, self.horizon, self.rollouts, self.collections = retain, horizon, rollouts, 0

        def column(*shape: int) -> nn.Buffer:  # flat row (c, h, m), its successor M rows later
            return nn.Buffer(torch.zeros(retain, horizon + 1, rollouts, *shape, device=device))

        self.obs, self.state = column(num_agents, obs_dim), column(state_dim)
        self.actions = column(num_agents, action_dim)
        self.avail = column(num_agents, action_dim) if discrete else None
        self.reward, self.terminated = column(), column()
        self.p_u = nn.Buffer(torch.full((retain, horizon, rollouts), -torch.inf, device=device))
        self.cdf = nn.Buffer(torch.zeros(self.p_u.numel(), device=device, dtype=torch.float64))
        self.ess = nn.Buffer(torch.ones((), device=device, dtype=torch.float64))

    def add(self, rollout: dict[str, torch.Tensor], cap: float, weighted: bool = True) -> None:
        """Store one collection and sum up the sampling weights.

        Args:
            rollout: obs (H+1,M,N,O), state (H+1,M,S), avail (H+1,M,N,A) if discrete; actions
                (H,M,N,A), reward, terminated, u, filled (H,M). `filled` is 1 where the rollout was
                still on.
            cap: C, bound of the confidence P_u; exp(-C) is the least relative weight of a row.
            weighted: False draws every row alike (the ablation without Eq. (7)).
        """
        slot = self.collections % self.retain
        for name in ("obs", "state", "avail"):
            if name in rollout:
                getattr(self, name)[slot] = rollout[name]
        for name in ("actions", "reward", "terminated"):
            getattr(self, name)[slot, :-1] = rollout[name]
        p_u = (cap - rollout["u"]).clamp(0, cap) if weighted else torch.zeros_like(rollout["u"])
        self.p_u[slot] = p_u.masked_fill(rollout["filled"] == 0, -torch.inf)
        self.collections += 1
        w = torch.softmax(self.p_u.flatten().double(), 0)  # (retain*H*M,)  Eq. (7)
        self.cdf.copy_(w.cpu().cumsum(0))  # on a GPU, cumsum is not reproducible
        # effective share of D_m's rows, 0..1
        self.ess.copy_(1.0 / (w.square().sum() * (w > 0).sum()))

    def draw(self, size: int, generator: torch.Generator) -> torch.Tensor:
        """Points (B,) on [0,1), float64, for `gather` to find the rows they fall on.

        Raises:
            RuntimeError: nothing was collected yet.
        """
        if self.collections == 0:
            raise RuntimeError("The synthetic buffer is empty: call add before sample.")
        device = self.cdf.device
        return torch.rand(size, generator=generator, device=device, dtype=torch.float64)

    def gather(self, points: torch.Tensor) -> Batch:
        """The transitions that points (B,) fall on, each as wide as its weight w of Eq. (7)."""
        # right=True never lands on a row of weight zero, not even for point 0
        pick = torch.searchsorted(self.cdf, points * self.cdf[-1], right=True)
        collection = pick // (self.horizon * self.rollouts)
        row = pick + collection * self.rollouts  # each collection has M rows more than transitions
        columns = (self.obs, self.state, self.actions, self.avail, self.reward, self.terminated)
        flat = [None if x is None else x.flatten(0, 2) for x in columns]
        return rows_to_batch(*flat, row, row + self.rollouts)

    def sample(self, size: int, generator: torch.Generator) -> Batch:
        """Rows with probability w of Eq. (7), with replacement."""
        return self.gather(self.draw(size, generator))


def mix(
    real: Batch, synthetic: Batch | None, coin: torch.Tensor | None = None
) -> tuple[Batch, torch.Tensor]:
    """One batch of both, the real rows first; and (B,) 1 where a row is real.

    Args:
        coin: () 0 or 1 makes it a batch of one kind: all real, or all synthetic (Algorithm 1, line
            25). Both are then of size B; choosing without looking at the coin spares a host sync.
    """
    ones = torch.ones_like(real.reward)
    if synthetic is None:
        return real, ones
    pairs = zip(real, synthetic, strict=True)
    if coin is not None:
        either = [None if a is None else torch.where(coin > 0, b, a) for a, b in pairs]
        return Batch(*either), ones * (1 - coin)
    both = [None if a is None else torch.cat([a, b]) for a, b in pairs]
    return Batch(*both), torch.cat([ones, torch.zeros_like(synthetic.reward)])


def _self_check():
    """Draw from D_m and compare the frequencies with Eq. (7), computed by hand."""
    g = torch.Generator().manual_seed(0)
    horizon, rollouts, cap = 3, 4, 2.0
    buffer = SyntheticBuffer(2, horizon, rollouts, 1, 1, 1, 2, "cpu")
    kept = {}
    for c in range(3):  # three collections into a ring of two: the first one is overwritten
        number = 100.0 * c + torch.arange((horizon + 1) * rollouts).view(horizon + 1, rollouts)
        u = torch.rand(horizon, rollouts, generator=g) * 3
        filled = (torch.rand(horizon, rollouts, generator=g) > 0.2).float()
        shape = (horizon + 1, rollouts, 1, 2)
        rollout = {"obs": number[..., None, None], "state": number[..., None],
                   "avail": torch.ones(shape), "actions": torch.zeros(shape)[:-1],
                   "reward": number[:-1], "terminated": torch.zeros(horizon, rollouts),
                   "u": u, "filled": filled}  # fmt: skip
        buffer.add(rollout, cap)
        weight = torch.exp((cap - u).clamp(0, cap)) * filled
        if c > 0:
            kept |= dict(
                zip(number[:-1].flatten().tolist(), weight.flatten().tolist(), strict=True)
            )
    batch = buffer.sample(200_000, g)
    assert torch.equal(batch.next_state[:, 0], batch.state[:, 0] + rollouts)
    total = sum(kept.values())
    print("row   Eq. (7)  drawn")
    for number, weight in list(kept.items())[:6]:
        drawn = (batch.reward == number).float().mean().item()
        print(f"{number:4.0f}  {weight / total:7.4f}  {drawn:.4f}")
        assert abs(drawn - weight / total) < 0.004
    print(f"effective share of the rows: {buffer.ess.item():.2f}")


if __name__ == "__main__":
    _self_check()
