"""The offline dataset's rows and split, and the synthetic buffer's draws against Eq. (7).

Each row carries its own number in every column, so a batch tells which rows it was made of. Drawn
frequencies are compared with Eq. (7), computed row by row in plain Python, by chi-square tests.
"""

import math

import pytest
import scipy.stats
import torch
from torch.nn import functional as F

from buffer import Batch, OfflineDataset, SyntheticBuffer, mix, shuffle_uncertainty
from experiment.diagnostics import one_step_errors
from logo_wm import LogoWM
from macql import Actor, descend

N, O, S, A = 2, 3, 4, 5  # noqa: E741


# ---------------------------------------------------------------------------------- OfflineDataset

LENGTHS = [4, 1, 7, 3, 3, 9, 2, 5, 1, 6] * 3


def make_dataset(lengths=LENGTHS, avail=True, extra_rows=0, **options) -> OfflineDataset:
    rows = sum(lengths) + len(lengths) + extra_rows
    number = torch.arange(rows).float()
    return OfflineDataset(
        obs=number[:, None, None] + torch.arange(N * O).view(N, O) / 16,
        state=number[:, None] + torch.arange(S) / 16,
        actions=number[:, None, None].expand(-1, N, A),
        avail=-1 - number[:, None, None].expand(-1, N, A) if avail else None,
        reward=number * 2,
        terminated=number * 3,
        lengths=lengths,
        **options,
    )


@pytest.mark.parametrize(
    "change,told",
    [
        ({"obs": torch.zeros(7, 2, 2, dtype=torch.float64)}, "obs: a float32 tensor is needed"),
        ({"reward": torch.zeros(7, 1)}, "reward: a float32 tensor is needed with 7 rows, 1 dim"),
        ({"state": torch.full((7, 2), torch.nan)}, "state: there is NaN"),
        ({"avail": torch.eye(7)[:, :6].view(7, 2, 3)}, "avail: an agent has no available action"),
    ],
)
def test_columns_that_would_spoil_training_are_refused(change, told):
    good = {"obs": torch.zeros(7, 2, 2), "state": torch.zeros(7, 2), "avail": torch.ones(7, 2, 3),
            "actions": torch.zeros(7, 2, 3), "reward": torch.zeros(7),
            "terminated": torch.zeros(7)}  # fmt: skip
    OfflineDataset(**good, lengths=[3, 2])
    with pytest.raises(ValueError, match=told):
        OfflineDataset(**good | change, lengths=[3, 2])


def last_rows(lengths) -> set[int]:
    rows, end = set(), -1
    for n in lengths:
        end += n + 1
        rows.add(end)
    return rows


def episode_of(lengths) -> list[int]:
    return [e for e, n in enumerate(lengths) for _ in range(n + 1)]


def test_gather_returns_a_row_and_its_successor():
    data, rows = make_dataset(), torch.tensor([0, 3, 5, 7])
    batch = data.gather(rows)
    assert torch.equal(batch.state[:, 0], rows.float())
    assert torch.equal(batch.next_state, batch.state + 1)
    assert torch.equal(batch.next_obs, batch.obs + 1)
    assert torch.equal(batch.obs[:, 1, 2], rows + 5 / 16)
    assert torch.equal(batch.next_avail, batch.avail - 1)
    assert torch.equal(batch.actions[:, 0, 0], rows.float())
    assert torch.equal(batch.reward, rows * 2.0) and torch.equal(batch.terminated, rows * 3.0)


def test_gather_over_several_steps_ends_with_the_episode():
    data = make_dataset([4, 1])  # rows 0-3 and 5 are transitions, 4 and 6 final observations
    batch = data.gather(torch.tensor([0, 2, 3, 5]), steps=3, gamma=0.5)
    assert batch.steps.tolist() == [3, 2, 1, 1]
    assert batch.next_state[:, 0].tolist() == [3, 4, 4, 6]
    assert batch.next_obs[:, 0, 0].tolist() == (-1 - batch.next_avail[:, 0, 0]).tolist()
    assert batch.next_obs[:, 0, 0].tolist() == [3, 4, 4, 6]
    assert batch.terminated.tolist() == [3 * 2, 3 * 3, 3 * 3, 3 * 5]  # of the last step
    assert batch.reward.tolist() == [0 + 0.5 * 2 + 0.25 * 4, 4 + 0.5 * 6, 6, 10]
    assert torch.equal(batch.actions[:, 0, 0], torch.tensor([0.0, 2, 3, 5]))
    whole = data.gather(torch.tensor([0]), steps=100, gamma=1.0)
    assert whole.steps.item() == 4 and whole.reward.item() == 0 + 2 + 4 + 6


def test_continuous_data_have_no_mask():
    batch = make_dataset(avail=False).gather(torch.tensor([0, 1]))
    assert batch.avail is None and batch.next_avail is None


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("holdout", [0.05, 0.3])
def test_split_covers_every_transition_once(holdout, seed):
    data = make_dataset(holdout=holdout, seed=seed)
    train, held_out = data.train.tolist(), data.held_out.tolist()
    starts = set(range(len(data.obs))) - last_rows(LENGTHS)
    assert sorted(train + held_out) == sorted(starts)  # no last row, nothing twice, nothing lost
    episode = episode_of(LENGTHS)
    parts = [{episode[r] for r in rows} for rows in (train, held_out)]
    assert not parts[0] & parts[1]
    assert len(parts[1]) == max(1, round(holdout * len(LENGTHS)))


def test_seed_chooses_which_episodes_are_held_out():
    choices = [make_dataset(holdout=0.0, seed=k).held_out.tolist() for k in (3, 3, 4, 5, 6)]
    assert all(choices) and choices[0] == choices[1]
    assert any(c != choices[0] for c in choices[2:])


def test_sample_draws_training_transitions_alone_and_all_alike():
    data, draws = make_dataset(holdout=0.3, seed=1), 40_000
    batch = data.sample(draws, torch.Generator().manual_seed(0))
    counts = torch.bincount(batch.state[:, 0].long(), minlength=len(data.obs))
    assert counts.sum() == draws == counts[data.train].sum()
    assert scipy.stats.chisquare(counts[data.train].double()).pvalue > 1e-3
    assert torch.equal(batch.next_state, batch.state + 1)


def test_statistics_are_of_the_training_rows_alone():
    data = make_dataset(holdout=0.3, seed=1)
    data.obs[data.held_out] = 1e6
    data.state[data.held_out] = -1e6
    data.reward[data.held_out] = 1e6
    data.obs[data.train[::3], 0, 1] = data.state[data.train[::2], 1] = 0.0
    data.obs[data.held_out, 0, 1] = 0.0
    data.state[:, 2] -= 50.5
    stats, rows = data.statistics(), data.train.tolist()
    for name, column in (("obs", data.obs), ("state", data.state), ("reward", data.reward)):
        values = torch.stack([column[r] for r in rows]).double()
        mean = sum(values) / len(rows)
        std = (sum((v - mean) ** 2 for v in values) / len(rows)).sqrt()
        torch.testing.assert_close(stats[f"{name}_mean"].double(), mean, rtol=1e-5, atol=0)
        torch.testing.assert_close(stats[f"{name}_std"].double(), std, rtol=1e-5, atol=0)
        if name != "reward":  # o' and s' of the same transitions
            values = torch.cat([values, torch.stack([column[r + 1] for r in rows]).double()])
        assert torch.equal(stats[f"{name}_min"].double(), values.min(0).values)
        assert torch.equal(stats[f"{name}_max"].double(), values.max(0).values)
        zero = sum((v == 0).double() for v in values[: len(rows)]) / len(rows)
        torch.testing.assert_close(stats[f"{name}_zero"].double(), zero, rtol=1e-5, atol=0)
    assert 0.3 < stats["obs_zero"][0, 1] < 0.4 and 0.4 < stats["state_zero"][1] < 0.6
    assert {k: v.shape for k, v in stats.items() if "mean" in k} == {
        "obs_mean": (N, O), "state_mean": (S,), "reward_mean": (), "terminated_mean": (),
    }  # fmt: skip


def test_lengths_that_do_not_fit_the_rows_are_refused():
    with pytest.raises(ValueError, match=f"need {sum(LENGTHS) + 30} rows, not {sum(LENGTHS) + 31}"):
        make_dataset(extra_rows=1)
    with pytest.raises(ValueError, match="1 episodes: at least two"):
        make_dataset([5])


# --------------------------------------------------------------------------------- SyntheticBuffer

HORIZON, ROLLOUTS, RETAIN = 3, 4, 2
PER_COLLECTION = (HORIZON + 1) * ROLLOUTS


def make_rollout(c: int, generator, avail=True) -> dict[str, torch.Tensor]:
    """Collection c, its rows numbered from c * PER_COLLECTION on."""
    number = (c * PER_COLLECTION + torch.arange(PER_COLLECTION)).view(HORIZON + 1, ROLLOUTS).float()
    mask = {"avail": number[..., None, None].expand(-1, -1, N, A)} if avail else {}
    return mask | {
        "obs": number[..., None, None].expand(-1, -1, N, O),
        "state": number[..., None].expand(-1, -1, S),
        "actions": number[:-1, :, None, None].expand(-1, -1, N, A),
        "reward": number[:-1] * 2,
        "terminated": number[:-1] * 3,
        "uncertainty": torch.rand(HORIZON, ROLLOUTS, generator=generator) * 3,
        "valid": (torch.rand(HORIZON, ROLLOUTS, generator=generator) < 0.7).float(),
    }


def make_buffer(cap: float = 2.0, **options) -> SyntheticBuffer:
    options = {"u_scale": 0.0} | options
    return SyntheticBuffer(RETAIN, HORIZON, ROLLOUTS, N, O, S, A, "cpu", cap=cap, **options)


def fill(collections: int, cap: float, weighted: bool = True):
    """A buffer after so many collections, and its rows' weights by Eq. (7): {number: w}."""
    g, kept = torch.Generator().manual_seed(5), {}
    buffer = make_buffer(cap, weighted=weighted)
    for c in range(collections):
        rollout = make_rollout(c, g)
        buffer.add(rollout)
        if c < collections - RETAIN:
            continue  # overwritten in the end
        for h in range(HORIZON):
            for m in range(ROLLOUTS):
                p_u = (
                    min(max(cap - rollout["uncertainty"][h, m].item(), 0.0), cap)
                    if weighted
                    else 0.0
                )
                number = c * PER_COLLECTION + h * ROLLOUTS + m
                kept[number] = math.exp(p_u) if rollout["valid"][h, m] else 0.0
    total = sum(kept.values())
    return buffer, {number: w / total for number, w in kept.items()}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("collections", [1, 2, 3, 5])
def test_rows_are_sampled_as_eq_7_says(collections, weighted):
    buffer, expected = fill(collections, cap=2.0, weighted=weighted)
    draws = 40_000
    batch = buffer.sample(draws, torch.Generator().manual_seed(0))
    counts = torch.bincount(batch.state[:, 0].long(), minlength=6 * PER_COLLECTION)
    valid = {number: w for number, w in expected.items() if w > 0}
    assert 0 < len(valid) < len(expected)
    if not weighted:
        assert len(set(valid.values())) == 1
    assert counts[list(valid)].sum() == draws  # nothing unfilled, overwritten or beyond the horizon
    frequencies = [w * draws for w in valid.values()]
    assert scipy.stats.chisquare(counts[list(valid)].double(), frequencies).pvalue > 1e-3


def test_successor_is_next_step_of_same_rollout():
    buffer, _ = fill(5, cap=2.0)
    batch = buffer.sample(2000, torch.Generator().manual_seed(0))
    now = batch.state[:, 0]
    assert torch.equal(batch.next_state, batch.state + ROLLOUTS)
    assert torch.equal(batch.next_obs, batch.obs + ROLLOUTS)
    assert torch.equal(batch.next_avail, batch.avail + ROLLOUTS)
    for column in (batch.obs[:, 1, 2], batch.avail[:, 1, 3], batch.actions[:, 1, 4]):
        assert torch.equal(column, now)
    assert torch.equal(batch.reward, 2 * now) and torch.equal(batch.terminated, 3 * now)


def test_several_imagined_steps_end_with_the_rollout():
    horizon, rollouts = 4, 2
    buffer = SyntheticBuffer(1, horizon, rollouts, 1, 1, 1, 1, "cpu", discrete=False, cap=1.0)
    number = torch.arange((horizon + 1) * rollouts).float().view(horizon + 1, rollouts)
    ends = torch.zeros(horizon, rollouts)
    ends[1, 1] = 1.0  # the second rollout ends after two steps
    valid = torch.tensor([[1.0, 1], [1, 1], [1, 0], [1, 0]])
    buffer.add({
        "obs": number[..., None, None], "state": number[..., None], "reward": number[:-1],
        "actions": number[:-1, :, None, None], "terminated": ends, "valid": valid,
        "uncertainty": torch.ones(horizon, rollouts),
    })  # fmt: skip
    batch = buffer.sample(500, torch.Generator().manual_seed(0), steps=3, gamma=0.5)
    seen = {}
    for k in range(500):
        row = int(batch.state[k, 0])
        seen[row] = [int(batch.steps[k]), int(batch.next_state[k, 0]), batch.terminated[k].item()]
        within = [row + 2 * j for j in range(seen[row][0])]
        expected = sum(0.5**j * r for j, r in enumerate(within))
        assert batch.reward[k].item() == pytest.approx(expected)
    assert seen == {
        0: [3, 6, 0], 2: [3, 8, 0], 4: [2, 8, 0], 6: [1, 8, 0], 1: [2, 5, 1], 3: [1, 5, 1],
    }  # fmt: skip


@pytest.mark.parametrize("cap", [0.0, 0.5, 2.0, 50.0])
def test_p_u_stays_between_zero_and_the_cap(cap):
    buffer, expected = fill(2, cap)
    valid = buffer.p_u[buffer.p_u > -torch.inf]
    assert valid.min() >= 0 and valid.max() <= cap
    weights = [w for w in expected.values() if w > 0]
    assert max(weights) / min(weights) <= math.exp(cap) * (1 + 1e-6)
    w = buffer.cdf.diff(prepend=torch.zeros(1, dtype=torch.float64))
    drawn = w[w > 0]
    assert drawn.max() / drawn.min() == pytest.approx(max(weights) / min(weights), rel=1e-4)


def test_weights_at_zero_and_far_above_the_cap():
    buffer, rollout = SyntheticBuffer(1, 1, 3, N, O, S, A, "cpu", cap=2.0, u_scale=0.0), {}
    for name, shape in {"obs": (N, O), "state": (S,), "avail": (N, A), "actions": (N, A)}.items():
        rollout[name] = torch.zeros(1 if name == "actions" else 2, 3, *shape)
    rollout |= {k: torch.zeros(1, 3) for k in ("reward", "terminated")}
    buffer.add(
        rollout | {"uncertainty": torch.tensor([[0.0, 1e9, 2.0]]), "valid": torch.ones(1, 3)}
    )
    total = math.exp(2) + 2
    w = buffer.cdf.diff(prepend=torch.zeros(1, dtype=torch.float64))
    assert w.tolist() == pytest.approx([math.exp(2) / total, 1 / total, 1 / total], rel=1e-6)


@pytest.mark.parametrize("point,drawn", [(0.0, 1), (1 - 2.0**-53, 10)])
def test_rows_without_weight_are_never_sampled(monkeypatch, point, drawn):
    g = torch.Generator().manual_seed(0)
    buffer = make_buffer()
    rollout = make_rollout(0, g)
    rollout["valid"] = torch.ones(HORIZON, ROLLOUTS)
    rollout["valid"][0, 0] = rollout["valid"][-1, -1] = 0  # the first and the last row
    buffer.add(rollout)
    monkeypatch.setattr(
        torch, "rand", lambda size, dtype, **kwargs: torch.full((size,), point, dtype=dtype)
    )
    assert buffer.sample(3, g).state[:, 0].tolist() == [drawn] * 3


def test_continuous_rollouts_are_stored_without_a_mask():
    buffer = make_buffer(discrete=False)
    g = torch.Generator().manual_seed(0)
    buffer.add(make_rollout(0, g, avail=False))
    batch = buffer.sample(10, g)
    assert batch.avail is None and batch.next_avail is None
    assert torch.equal(batch.next_state, batch.state + ROLLOUTS)


@pytest.mark.parametrize("u_scale", [0.25, 2.0])
@pytest.mark.parametrize("first", [[3.0, 8.0, 5.0], [8.0, 0.5, 5.0, 9.0, 0.0], [4.0]])
def test_the_unit_of_u_is_in_medians_of_the_first_step(first, u_scale):
    later = torch.full((2, len(first)), 1e6)
    u = torch.cat([torch.tensor([first]), later])
    states = {"obs": torch.zeros(4, len(first), N, O), "state": torch.zeros(4, len(first), S)}
    actions = {
        "avail": torch.ones(4, len(first), N, A),
        "actions": torch.zeros(3, len(first), N, A),
    }
    steps = {"reward": 0 * u, "terminated": 0 * u, "valid": 0 * u + 1, "uncertainty": u}
    buffer = SyntheticBuffer(1, 3, len(first), N, O, S, A, "cpu", cap=10.0, u_scale=u_scale)
    buffer.add(states | actions | steps)
    unit = sorted(first)[len(first) // 2] * u_scale
    assert torch.equal(buffer.p_u[0], (10.0 - u / unit).clamp(min=0))


def test_without_uncertainty_the_unit_of_u_is_positive():
    buffer, rollout = make_buffer(cap=10.0, u_scale=0.25), make_rollout(0, torch.Generator())
    still = rollout | {k: torch.zeros(HORIZON, ROLLOUTS) for k in ("uncertainty", "valid")}
    still["valid"] += 1
    buffer.add(still)
    assert (buffer.p_u[0, :HORIZON] == 10).all()


def test_weights_do_not_depend_on_the_scale_of_u_by_default():
    g = torch.Generator().manual_seed(0)
    rollout = make_rollout(0, g)
    found = []
    for scale in (1.0, 64.0):
        buffer = SyntheticBuffer(RETAIN, HORIZON, ROLLOUTS, N, O, S, A, "cpu")
        buffer.add(rollout | {"uncertainty": rollout["uncertainty"] * scale})
        found.append(buffer.p_u[0, :HORIZON][rollout["valid"] == 1])
    assert torch.equal(*found) and found[0].max() - found[0].min() > 1
    unit = rollout["uncertainty"][0].median() / 4
    expected = (10 - rollout["uncertainty"] / unit).clamp(0, 10)[rollout["valid"] == 1]
    torch.testing.assert_close(found[0], expected)


def test_effective_share_is_one_where_all_rows_weigh_alike():
    buffer, expected = fill(2, cap=2.0, weighted=False)
    assert buffer.effective_share.item() == pytest.approx(1.0)
    buffer, expected = fill(2, cap=2.0)
    w = [x for x in expected.values() if x > 0]
    share = 1 / (sum(x**2 for x in w) * len(w))
    assert buffer.effective_share.item() == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("collections", [0, 1, 3])
@pytest.mark.parametrize("discrete", [True, False])
def test_state_dict_restores_rows_and_weights(collections, discrete):
    g = torch.Generator().manual_seed(0)
    buffer, again = (make_buffer(discrete=discrete) for _ in range(2))
    for c in range(collections):
        buffer.add(make_rollout(c, g, avail=discrete))
    again.load_state_dict(buffer.state_dict())
    for each in (buffer, again):
        each.add(make_rollout(collections, torch.Generator().manual_seed(9), avail=discrete))
    batches = [x.sample(200, torch.Generator().manual_seed(1)) for x in (buffer, again)]
    for a, b in zip(*batches, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_empty_buffer_says_so():
    buffer = make_buffer()
    with pytest.raises(RuntimeError, match="call add before sample"):
        buffer.sample(1, torch.Generator())


def test_the_same_generator_state_draws_the_same_rows():
    buffer, _ = fill(3, cap=2.0)
    draws = [buffer.sample(50, torch.Generator().manual_seed(k)).reward for k in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# --------------------------------------------------------------------------------------------- mix


def test_mix_puts_the_real_rows_first_and_says_which_they_are():
    g = torch.Generator().manual_seed(0)
    real, synthetic = make_dataset().sample(6, g), fill(2, cap=2.0)[0].sample(10, g)
    both, is_real = mix(real, synthetic)
    assert isinstance(both, Batch) and is_real.tolist() == [1.0] * 6 + [0.0] * 10
    for name, a, b in zip(Batch._fields, real, synthetic, strict=True):
        assert torch.equal(getattr(both, name)[:6], a)
        assert torch.equal(getattr(both, name)[6:], b)


def test_mix_leaves_out_the_mask_of_continuous_actions():
    g = torch.Generator().manual_seed(0)
    real = make_dataset(avail=False).sample(3, g)
    both, is_real = mix(real, real)
    assert both.avail is None and both.next_avail is None
    assert len(is_real) == len(both.obs) == 6


@pytest.mark.parametrize("sizes", [(0, 6), (6, 0)])
def test_mix_takes_batches_of_one_kind(sizes):
    g = torch.Generator().manual_seed(0)
    real, synthetic = make_dataset().sample(sizes[0], g), fill(2, cap=2.0)[0].sample(sizes[1], g)
    both, is_real = mix(real, synthetic)
    assert len(both.reward) == 6 and is_real.sum() == sizes[0]


def test_units_do_not_matter():
    """Errors, predictions and losses in standardised units, with all columns times 2^-20."""
    found = []
    for unit in (1.0, 2.0**-20):
        g = torch.Generator().manual_seed(0)
        rows = 4 * 21
        obs, state = torch.randn(rows, N, O, generator=g), torch.randn(rows, S, generator=g)
        obs[..., 0], state[..., 1] = 3.0, -1.0  # columns that never vary
        obs[::3, :, 1], state[::3, 0] = 0.0, 0.0  # and some that are often 0
        reward = torch.randn(rows, generator=g)
        actions = F.one_hot(torch.randint(A, (rows, N), generator=g), A).float()
        data = OfflineDataset(
            obs * unit, state * unit, actions, torch.ones_like(actions), reward * unit,
            torch.zeros(rows), [20] * 4, holdout=0.25,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LogoWM(N, O, S, A, 16, statistics=data.statistics())
        actor = Actor(*(data.statistics()[k] for k in ("obs_mean", "obs_std")), A, 16)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(5):
            loss, _ = model.loss(data.sample(16, g))
            descend(optimizer, loss)
        batch = data.sample(16, g)
        pi = actor(batch.obs, batch.avail)
        found.append((loss.item(), one_step_errors(model, data), pi))
    (loss, errors, pi), (small_loss, small_errors, small_pi) = found
    assert small_loss == pytest.approx(loss, rel=1e-4)
    assert small_errors == pytest.approx(errors, rel=1e-3)
    torch.testing.assert_close(small_pi, pi)


def test_a_constant_column_has_no_deviation_however_large_it_is():
    data = make_dataset()
    data.state[:, 0] = 1e6 / 3
    std = data.statistics()["state_std"]
    assert std[0] == 0 and (std[1:] > 1).all()


def test_one_training_transition_has_finite_statistics():
    stats = make_dataset([1, 1]).statistics()
    assert all(x.isfinite().all() for x in stats.values())


def test_a_placebo_permutes_u_among_the_steps_that_count():
    g = torch.Generator().manual_seed(0)
    u = torch.arange(60.0).view(3, 20)
    valid = (torch.rand(3, 20, generator=g) > 0.3).float()
    new = shuffle_uncertainty({"uncertainty": u, "valid": valid}, g)
    assert not torch.equal(new, u)
    for before, after, counts in zip(u, new, valid > 0, strict=True):
        assert sorted(before[counts].tolist()) == sorted(after[counts].tolist())
