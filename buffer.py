"""Recorded and imagined transitions in one shape.

  OfflineDataset   D:   recorded episodes, sampled uniformly; some episodes are held out for testing
  SyntheticBuffer  D_m: imagined rollouts, sampled with the weights of Eq. (7),
                        w = softmax(P_u),  P_u = clip(C - u / unit, [0, C]),  u = uncertainty
  mix              one training batch out of both (Algorithm 1, lines 24-29)

    data = OfflineDataset(obs, state, actions, avail, reward, terminated, lengths)
    batch = data.sample(256, generator)              # a Batch of (o, s, a, r, o', s', ...)
    model_data.add(rollout)                          # what LogoWM.imagine returns
    batch, is_real = mix(data.sample(64, generator), model_data.sample(64, generator))

Both store every observation once: the successor of a transition is another row of the same table.

Departures from the paper; docs/deviations.md has the flags that take them back:
  D20  u is divided by --u-scale times its median over recorded states.

Sizes: B batch, N agents, O observation, S state, A action (one-hot if discrete), H horizon,
       R rows of D (transitions plus one final observation per episode), M rollouts per collection.
"""

from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """B transitions: float32, raw units, on the training device."""

    obs: torch.Tensor  # (B,N,O)
    state: torch.Tensor  # (B,S)
    actions: torch.Tensor  # (B,N,A)
    avail: torch.Tensor | None  # (B,N,A) 1 = the action is available; None: continuous actions
    reward: torch.Tensor  # (B,) of the whole team
    next_obs: torch.Tensor  # (B,N,O)
    next_state: torch.Tensor  # (B,S)
    next_avail: torch.Tensor | None  # (B,N,A)
    terminated: torch.Tensor  # (B,) 1 = no value beyond this step; a time limit does not set it
    steps: torch.Tensor  # (B,) how many lie between obs and next_obs


def gather(
    columns: tuple, rows: torch.Tensor, left: torch.Tensor, stride: int, steps: int, gamma: float
) -> Batch:
    """The transitions that start in `rows` (B,) int64, over `steps` steps or as many as there are.

    The reward is then the sum of theirs, discounted by gamma per step (n-step returns); "next" is
    after the last of them, and `terminated` is that one's.

    Args:
        columns: obs, state, actions, avail or None, reward, terminated; each (rows, ...).
        left: (B,) int64, steps from here to the end of the episode or rollout, at least 1.
        stride: rows from one step to the next.
    """
    obs, state, actions, avail, reward, terminated = columns
    taken = left.clamp(max=steps)
    last = rows + (taken - 1) * stride
    k = torch.arange(steps, device=rows.device)
    within = torch.minimum(rows.unsqueeze(-1) + k * stride, last.unsqueeze(-1))  # (B,steps)
    discounts = gamma**k * (k < taken.unsqueeze(-1))
    after = last + stride
    return Batch(
        obs=obs[rows],
        state=state[rows],
        actions=actions[rows],
        avail=None if avail is None else avail[rows],
        reward=(reward[within] * discounts).sum(-1),
        next_obs=obs[after],
        next_state=state[after],
        next_avail=None if avail is None else avail[after],
        terminated=terminated[last],
        steps=taken.to(reward),
    )


class OfflineDataset:
    """D: whole episodes one after the other, each with one row more than it has transitions.

    Args:
        obs (R,N,O), state (R,S), actions (R,N,A), avail (R,N,A) or None, reward (R,),
        terminated (R,): float32. The last row of an episode is its final observation; its action,
            reward and terminated are never read, its avail is.
        lengths: transitions of each episode; sum(lengths) + len(lengths) = R.
        holdout: share of the episodes that `sample` never draws from; at least one, never all.
        seed: of the choice of held-out episodes.
    Raises:
        ValueError: fewer than two episodes or one without a transition, lengths that do not add up
            to R, a column of another type or shape or with NaN, or an agent without an available
            action in any row, final ones included.
    """

    def __init__(
        self, obs, state, actions, avail, reward, terminated, lengths, holdout=0.05, seed=0
    ):
        lengths = torch.as_tensor(lengths)
        if len(lengths) < 2:
            raise ValueError(f"{len(lengths)} episodes: at least two are needed, one is held out.")
        if (lengths < 1).any():
            raise ValueError("lengths: an episode has no transition.")
        rows = int(lengths.sum()) + len(lengths)
        if rows != len(obs):
            raise ValueError(f"lengths need {rows} rows, not {len(obs)}.")
        columns = {"obs": (obs, 3), "state": (state, 2), "actions": (actions, 3)}
        columns |= {"avail": (avail, 3), "reward": (reward, 1), "terminated": (terminated, 1)}
        for name, (x, dims) in columns.items():
            if x is None and name == "avail":
                continue
            if x.dtype != torch.float32 or x.ndim != dims or len(x) != rows:
                what = f"{rows} rows, {dims} dimensions, not {x.dtype} {tuple(x.shape)}"
                raise ValueError(f"{name}: a float32 tensor is needed with {what}.")
            if not x.sum().isfinite():  # without a copy of the column
                raise ValueError(f"{name}: there is NaN or infinity in it.")
        if avail is not None and (avail.sum(-1) == 0).any():
            raise ValueError("avail: an agent has no available action in a row (final ones count).")
        self.obs, self.state, self.actions, self.avail = obs, state, actions, avail
        self.reward, self.terminated, self.lengths = reward, terminated, lengths
        starts = torch.cumsum(lengths + 1, 0) - lengths - 1  # (episodes,) first row of each
        ends = torch.repeat_interleave(starts + lengths, lengths + 1)  # (R,) last row of each
        self.left = (ends - torch.arange(rows)).to(obs.device)  # (R,) transitions to come
        self.longest = int(lengths.max())
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
        cut = min(max(1, round(holdout * len(lengths))), len(lengths) - 1)

        def transitions(episodes: torch.Tensor) -> torch.Tensor:
            rows = [torch.arange(starts[e], starts[e] + lengths[e]) for e in episodes]
            return torch.cat(rows).to(obs.device)

        self.held_out = transitions(order[:cut].sort().values)  # row numbers
        self.train = transitions(order[cut:].sort().values)  # row numbers

    def gather(self, rows: torch.Tensor, steps: int = 1, gamma: float = 1.0) -> Batch:
        """The transitions that start in these rows (B,); steps, gamma: see `gather` above."""
        columns = (self.obs, self.state, self.actions, self.avail, self.reward, self.terminated)
        return gather(columns, rows, self.left[rows], 1, min(steps, self.longest), gamma)

    def sample(
        self, size: int, generator: torch.Generator, steps: int = 1, gamma: float = 1.0
    ) -> Batch:
        """`size` training transitions, uniform with replacement; steps, gamma: as in `gather`."""
        pick = torch.randint(
            len(self.train), (size,), generator=generator, device=self.train.device
        )
        return self.gather(self.train[pick], steps, gamma)

    def returns_to_go(self, gamma: float) -> torch.Tensor:
        """(R,) discounted rewards from each row to its episode's end; 0 at final observations."""
        result = torch.zeros_like(self.reward, dtype=torch.float64)
        last, lengths = (self.left == 0).nonzero().squeeze(-1), self.lengths.to(result.device)
        for k in range(1, self.longest + 1):  # back in time, all episodes at once
            rows = last[lengths >= k] - k
            result[rows] = self.reward[rows] + gamma * result[rows + 1]
        return result.float()

    def value_range(self, gamma: float) -> tuple[float, float]:
        """The least and the largest return-to-go of training rows, discounted and not; 0, which is
        left at an episode's end, lies between them.
        """
        found = torch.cat([self.returns_to_go(x)[self.train] for x in (1.0, gamma)])
        return min(found.min().item(), 0.0), max(found.max().item(), 0.0)

    def value_scale(self, gamma: float) -> tuple[float, float]:
        """Mean and standard deviation of the training rows' returns-to-go; 1 if all are equal."""
        found = self.returns_to_go(gamma)[self.train]
        return found.mean().item(), found.std(correction=0).item() or 1.0

    def action_variance(self) -> float:
        """Of the training rows' actions, the mean over agents and entries; 1 if none varies."""
        return self.actions[self.train].double().var(0, correction=0).mean().item() or 1.0

    def statistics(self) -> dict[str, torch.Tensor]:
        """Of o (N,O), s (S,), r () and terminated () in D.train: mean, std, min, max and zero, as
        obs_mean, ...; zero is the share of rows in which an entry is exactly 0.

        Min and max of o and s are over o' and s', too: episodes end where no transition starts.
        The standard deviation is exactly 0 where a column is constant, and elsewhere at least a
        thousandth of its range, so that a rare value is no more than a thousand of them away.
        """
        result = {}
        for name in ("obs", "state", "reward", "terminated"):
            column = getattr(self, name)
            x = column[self.train].double()
            low, high = x.amin(0), x.amax(0)
            std = torch.maximum(x.std(0, correction=0), 1e-3 * (high - low))
            std = torch.where(high == low, 0.0, std)
            zero = (x == 0).double().mean(0)
            if name in ("obs", "state"):
                after = column[self.train + 1].double()
                low, high = torch.minimum(low, after.amin(0)), torch.maximum(high, after.amax(0))
            moments = {"mean": x.mean(0), "std": std, "min": low, "max": high, "zero": zero}
            result |= {f"{name}_{moment}": value.float() for moment, value in moments.items()}
        return result


class SyntheticBuffer:
    """D_m: a ring of the latest `retain` collections of M rollouts over H steps.

    Everything is allocated once; `add` overwrites the oldest collection, if there is no room.

    Args:
        retain: collections that are kept.
        horizon, rollouts: H and M of each collection.
        num_agents, obs_dim, state_dim, action_dim: N, O, S, A.
        device: where the rows are kept.
        discrete: rows have a mask of available actions.
        cap: C of Eq. (7): bound of P_u; exp(-C) is the smallest relative weight of a row.
        u_scale: u is divided by u_scale times its median over the first steps of the same
            collection, which start in recorded states; 0 takes u itself, as the paper.
        weighted: False samples every row alike (the ablation without Eq. (7)).
    """

    COLUMNS = ("obs", "state", "actions", "avail", "reward", "terminated")

    def __init__(
        self, retain, horizon, rollouts, num_agents, obs_dim, state_dim, action_dim, device,
        discrete=True, cap=10.0, u_scale=0.25, weighted=True,
    ):  # fmt: skip
        self.retain, self.horizon, self.rollouts, self.collections = retain, horizon, rollouts, 0
        self.cap, self.u_scale, self.weighted = cap, u_scale, weighted

        def column(*shape: int) -> torch.Tensor:  # the successor of row (c, h, m) is (c, h+1, m)
            return torch.zeros(retain, horizon + 1, rollouts, *shape, device=device)

        self.obs, self.state = column(num_agents, obs_dim), column(state_dim)
        self.actions = column(num_agents, action_dim)
        self.avail = column(num_agents, action_dim) if discrete else None
        self.reward, self.terminated = column(), column()
        self.effective_share = torch.zeros((), device=device, dtype=torch.float64)
        self.p_u = torch.full((retain, horizon, rollouts), -torch.inf, device=device)

    def add(self, rollout: dict[str, torch.Tensor]) -> None:
        """Store one collection in place of the oldest one.

        Args:
            rollout: obs (H+1,M,N,O), state (H+1,M,S), avail (H+1,M,N,A) if discrete; actions
                (H,M,N,A), reward, terminated, uncertainty, valid (H,M). `valid` is 0 for steps
                after the end of a rollout: they are never sampled.
        """
        slot = self.collections % self.retain
        for name in ("obs", "state", "avail"):
            if name in rollout:
                getattr(self, name)[slot] = rollout[name]
        for name in ("actions", "reward", "terminated"):
            getattr(self, name)[slot, :-1] = rollout[name]
        # Deviation D20: the first step of every rollout is from a recorded state
        median = rollout["uncertainty"][0].median().clamp(min=1e-9)
        u = rollout["uncertainty"] / (self.u_scale * median if self.u_scale else 1.0)
        p_u = (self.cap - u).clamp(0, self.cap) if self.weighted else torch.zeros_like(u)
        self.p_u[slot] = p_u.masked_fill(rollout["valid"] == 0, -torch.inf)
        self.collections += 1
        self.weigh()

    def weigh(self) -> None:
        """Sum up the sampling weights, once per collection, so that a draw is a binary search.

        `torch.multinomial` would sum them at every draw, and takes at most 2^24 rows.
        """
        w = torch.softmax(self.p_u.flatten().double(), 0)  # (retain*H*M,)  Eq. (7)
        self.cdf = w.cpu().cumsum(0).to(w.device)  # on a GPU, cumsum is not reproducible
        counts = self.p_u > -torch.inf  # (retain,H,M): steps up to the end of their rollout
        self.left = counts.flip(1).cumsum(1).flip(1).flatten()  # (retain*H*M,) steps to come
        # share of the rows that the weights effectively use, 0..1
        self.effective_share = 1.0 / (w.square().sum() * (w > 0).sum())

    def sample(
        self, size: int, generator: torch.Generator, steps: int = 1, gamma: float = 1.0
    ) -> Batch:
        """`size` imagined transitions, each with probability w of Eq. (7), with replacement.

        Args:
            steps, gamma: as in `gather`; several steps end with the rollout. The weight of a row is
                that of its first step alone.
        Raises:
            RuntimeError: nothing was added yet.
        """
        if self.collections == 0:
            raise RuntimeError("The synthetic buffer is empty: call add before sample.")
        device = self.cdf.device
        points = torch.rand(size, generator=generator, device=device, dtype=torch.float64)
        # right=True never picks a row of weight zero, not even for the point 0
        pick = torch.searchsorted(self.cdf, points * self.cdf[-1], right=True)
        collection = pick // (self.horizon * self.rollouts)
        row = pick + collection * self.rollouts  # each collection has M rows more than transitions
        columns = (getattr(self, name) for name in self.COLUMNS)
        flat = tuple(None if x is None else x.flatten(0, 2) for x in columns)
        steps = min(steps, self.horizon)
        return gather(flat, row, self.left[pick], self.rollouts, steps, gamma)

    def state_dict(self) -> dict:
        """Rows and weights for a checkpoint; without rows while nothing was added."""
        names = (*self.COLUMNS, "p_u") if self.collections else ()
        return {"collections": self.collections} | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned for a buffer of the same sizes.

        Raises:
            ValueError: it is of other sizes.
        """
        self.collections = state["collections"]
        for name in state.keys() - {"collections"}:
            if state[name] is not None:
                mine = getattr(self, name)
                if mine.shape != state[name].shape:
                    raise ValueError(f"{name} has shape {tuple(state[name].shape)}.")
                mine.copy_(state[name])
        if self.collections:
            self.weigh()


def shuffle_uncertainty(
    rollout: dict[str, torch.Tensor], generator: torch.Generator
) -> torch.Tensor:
    """u (H,M), at each step permuted among the rollouts that have not ended: a placebo for Eq. (7).

    Steps after a rollout's end keep apart: their u is of states that no longer count.
    """
    u, valid = rollout["uncertainty"], rollout["valid"]
    noise = torch.rand(u.shape, generator=generator, device=u.device)
    places = (noise - valid).argsort(dim=1)  # in random order, steps that count first
    others = (1 - valid).argsort(dim=1, stable=True)  # in their order, steps that count first
    return torch.empty_like(u).scatter(1, others, u.gather(1, places))


def mix(real: Batch, synthetic: Batch) -> tuple[Batch, torch.Tensor]:
    """One batch of both, the real rows first; and is_real (B,): 1 where a row is of D."""
    both = [None if a is None else torch.cat([a, b]) for a, b in zip(real, synthetic, strict=True)]
    is_real = torch.cat([torch.ones_like(real.reward), torch.zeros_like(synthetic.reward)])
    return Batch(*both), is_real


def _self_check():
    """Sample from D_m and compare the frequencies with Eq. (7), computed by hand."""
    g = torch.Generator().manual_seed(0)
    horizon, rollouts, cap = 3, 4, 2.0
    buffer = SyntheticBuffer(2, horizon, rollouts, 1, 1, 1, 2, "cpu", cap=cap, u_scale=0.0)
    kept = {}
    for c in range(3):  # three collections into a ring of two: the first one is overwritten
        number = 100.0 * c + torch.arange((horizon + 1) * rollouts).view(horizon + 1, rollouts)
        u = torch.rand(horizon, rollouts, generator=g) * 3
        valid = (torch.rand(horizon, rollouts, generator=g) > 0.2).float()
        shape = (horizon + 1, rollouts, 1, 2)
        rollout = {"obs": number[..., None, None], "state": number[..., None],
                   "avail": torch.ones(shape), "actions": torch.zeros(shape)[:-1],
                   "reward": number[:-1], "terminated": torch.zeros(horizon, rollouts),
                   "uncertainty": u, "valid": valid}  # fmt: skip
        buffer.add(rollout)
        weight = torch.exp((cap - u).clamp(0, cap)) * valid
        if c > 0:
            kept |= dict(
                zip(number[:-1].flatten().tolist(), weight.flatten().tolist(), strict=True)
            )
    batch = buffer.sample(200_000, g)
    assert torch.equal(batch.next_state[:, 0], batch.state[:, 0] + rollouts)
    total = sum(kept.values())
    print("row   Eq. (7)  sampled")
    for number, weight in list(kept.items())[:6]:
        sampled = (batch.reward == number).float().mean().item()
        print(f"{number:4.0f}  {weight / total:7.4f}  {sampled:.4f}")
        assert abs(sampled - weight / total) < 0.004
    print(f"effective share of the rows: {buffer.effective_share.item():.2f}")


if __name__ == "__main__":
    _self_check()
