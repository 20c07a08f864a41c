"""Measures of world models and policies, each against a loop over single rows in float64."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

import train
from buffer import OfflineDataset
from experiment import diagnostics
from logo_wm import LogoWM
from macql import Actor, Critic

N, O, S, A = 2, 3, 4, 3  # noqa: E741
LENGTHS = [5, 1, 4, 6, 2, 7, 3, 5, 4, 6]
GAMMA = 0.9


def make_data(discrete: bool = True) -> OfflineDataset:
    """Ten random episodes, four of them held out; one column of o and of s is constant, and one
    is often 0."""
    g = torch.Generator().manual_seed(3)
    rows = sum(LENGTHS) + len(LENGTHS)
    obs, state = torch.randn(rows, N, O, generator=g), torch.randn(rows, S, generator=g) * 3 + 1
    obs[..., 1], state[:, 2] = 7.0, -2.0
    obs[torch.rand(rows, generator=g) < 0.4, :, 2] = 0.0
    state[torch.rand(rows, generator=g) < 0.4, 3] = 0.0
    actions, avail = torch.rand(rows, N, A, generator=g) * 2 - 1, None
    if discrete:
        avail = (torch.rand(rows, N, A, generator=g) > 0.4).float()
        avail[..., 0] = 1.0
        choice = (actions + 2) * avail
        actions = torch.nn.functional.one_hot(choice.argmax(-1), A).float()
    reward, terminated = torch.randn(rows, generator=g), torch.zeros(rows)
    return OfflineDataset(obs, state, actions, avail, reward, terminated, LENGTHS, holdout=0.4)


class Drift:
    """A world model with nothing but what every world model has; discrete actions."""

    def __init__(self, uncertainty=lambda state: state.square().sum(-1)):
        self.uncertainty, self.starts, self.calls = uncertainty, None, 0

    def loss(self, batch):
        return torch.zeros(()), {}

    @staticmethod
    def move(obs, state, actions):
        """(next obs, next state, reward) of one row or of many."""
        push = actions[..., 1].sum(-1, keepdims=True)
        return obs * 0.9 + 0.1, state * 0.8 + push, push[..., 0] - 0.2

    def imagine(self, policy, starts, horizon, generator):
        self.starts = starts
        obs, state, size = starts.obs, starts.state, len(starts.state)
        states, steps = {"obs": [obs], "state": [state], "avail": [starts.avail]}, {}
        for h in range(horizon):
            actions = policy(obs, states["avail"][-1], generator)
            self.calls += 1
            now = {"actions": actions, "terminated": torch.full((size,), float(h == 1))}
            now["uncertainty"] = self.uncertainty(state)
            obs, state, now["reward"] = self.move(obs, state, actions)
            now["valid"] = torch.full((size,), float(h < 2))  # every rollout ends with step 2
            mask = torch.ones_like(actions)
            mask[0, 0, :] = 0  # a model whose rules contradict the policy's action
            for name, value in (("obs", obs), ("state", state), ("avail", mask)):
                states[name].append(value)
            for name, value in now.items():
                steps.setdefault(name, []).append(value)
        return {k: torch.stack(v) for k, v in (states | steps).items()}


@pytest.fixture(scope="module")
def data() -> OfflineDataset:
    return make_data()


def standardised(data, name: str, x) -> np.ndarray:
    """x of one row in the data's units, by their definition."""
    rows = getattr(data, name)[data.train].double().numpy()
    mean, std = rows.mean(0), rows.std(0)
    return (np.asarray(x, float) - mean) / np.where(rows.max(0) == rows.min(0), 1.0, std)


def mse(data, name: str, pairs) -> float:
    """Mean over rows and columns of (prediction, truth) pairs."""
    errors = [(standardised(data, name, p) - standardised(data, name, t)) ** 2 for p, t in pairs]
    return float(np.mean(errors))


def held_out(data) -> list[int]:
    return data.held_out.tolist()


def close(value: float) -> pytest.approx:
    return pytest.approx(value, rel=1e-4, abs=1e-6)


def test_constant_columns_are_divided_by_one(data):
    standardise = diagnostics.standardiser(data)
    for name in ("obs", "state", "reward"):
        x = getattr(data, name)[:9]
        expected = [standardised(data, name, row) for row in x.numpy()]
        np.testing.assert_allclose(standardise(name, x).numpy(), expected, atol=1e-5)
    assert standardise("state", data.state + 1)[0, 2].item() == close(1.0)


def test_data_statistics_agree_with_the_world_model(data):
    model = LogoWM(N, O, S, A, 8, statistics=data.statistics())
    standardise = diagnostics.standardiser(data)
    for name in ("obs", "state", "reward"):
        x = getattr(data, name)
        assert torch.equal(standardise(name, x), model.standardise(name, x)), name


def vanished(data, imagined: dict) -> dict[str, float]:
    """Of single entries that are not 0 in row i: how often the next one and imagined[i] are."""
    places = [(i, k) for i in imagined for k in range(S) if data.state[i, k] != 0]
    return {
        "vanished_recorded": float(np.mean([data.state[i + 1, k] == 0 for i, k in places])),
        "vanished_imagined": float(np.mean([imagined[i][k] == 0 for i, k in places])),
    }


def test_one_step_errors_of_any_world_model(data):
    model = Drift()
    found = diagnostics.one_step_errors(model, data)
    moved = {i: Drift.move(data.obs[i], data.state[i], data.actions[i]) for i in held_out(data)}
    expected = {
        "obs_mse": mse(data, "obs", [(o, data.obs[i + 1]) for i, (o, _, _) in moved.items()]),
        "state_mse": mse(data, "state", [(s, data.state[i + 1]) for i, (_, s, _) in moved.items()]),
        "reward_mse": mse(data, "reward", [(r, data.reward[i]) for i, (_, _, r) in moved.items()]),
        "persistence_obs_mse": mse(data, "obs", [(data.obs[i], data.obs[i + 1]) for i in moved]),
        "persistence_state_mse": mse(
            data, "state", [(data.state[i], data.state[i + 1]) for i in moved]
        ),
    }
    u = [float(data.state[i].square().sum()) for i in moved]
    _, error = diagnostics.uncertainty_and_error(model, data)
    expected["u_error_spearman"] = scipy.stats.spearmanr(u, error.numpy()).statistic
    expected |= vanished(data, {i: s for i, (_, s, _) in moved.items()})
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == close(value), name


def test_uncertainty_is_compared_with_the_length_of_the_error(data):
    u, error = diagnostics.uncertainty_and_error(Drift(), data)
    for k, i in enumerate(held_out(data)):
        _, s, _ = Drift.move(data.obs[i], data.state[i], data.actions[i])
        miss = standardised(data, "state", s) - standardised(data, "state", data.state[i + 1])
        assert error[k].item() == close(np.linalg.norm(miss))
        assert u[k].item() == close(float(data.state[i].square().sum()))


def test_rank_correlation_is_spearmans_with_ties():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randint(0, 6, (200,), generator=g).float() for _ in range(2))
    y = y + x
    assert diagnostics.rank_correlation(x, y) == close(scipy.stats.spearmanr(x, y).statistic)
    assert diagnostics.rank_correlation(y, y.exp()) == close(1.0)
    assert diagnostics.rank_correlation(y, -y) == close(-1.0)
    assert np.isnan(diagnostics.rank_correlation(torch.ones(200), y))
    assert np.isnan(diagnostics.rank_correlation(torch.where(x > 4, torch.nan, x), y))


@pytest.mark.parametrize("clamp", [True, False])
def test_one_step_errors_of_logo_are_not_clamped(data, clamp):
    torch.manual_seed(0)
    model = LogoWM(N, O, S, A, 8, statistics=data.statistics(), clamp=clamp)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # far outside the data's range
    found, expected = diagnostics.one_step_errors(model, data), {}
    pairs = {"obs": [], "state": [], "reward": [], "direct_state": [], "direct_reward": []}
    for i in held_out(data):
        one = data.gather(torch.tensor([i]))
        out = model.step(one.obs, one.state, one.actions)
        truth = {"obs": one.next_obs, "state": one.next_state, "reward": one.reward}
        for name in pairs:
            kind = name.removeprefix("direct_")
            key = f"mean_{name}" if name in ("obs", "state") else name  # expected values
            pairs[name].append((out[key][0], truth[kind][0]))
    for name, both in pairs.items():
        expected[f"{name}_mse"] = mse(data, name.removeprefix("direct_"), both)
        assert found[f"{name}_mse"] == close(expected[f"{name}_mse"]), name
    low = data.state[data.train].amin(0)
    assert any((guess < low - 0.1).any() for guess, _ in pairs["state"])
    assert set(found) == set(expected) | {
        "persistence_obs_mse", "persistence_state_mse", "vanished_recorded", "vanished_imagined",
        "deducibility_r2", "u_error_spearman",
    }  # fmt: skip


def test_deducibility_is_r_squared_from_true_observations(data):
    torch.manual_seed(1)
    model = LogoWM(N, O, S, A, 8, statistics=data.statistics())
    residual, truths, zero = 0.0, [], standardised(data, "state", np.zeros(S))
    for i in held_out(data):
        o, s = (
            standardised(data, k, getattr(data, k)[j]) for k, j in (("obs", i + 1), ("state", i))
        )
        o, s = (torch.tensor(x, dtype=torch.float32).unsqueeze(0) for x in (o, s))
        with torch.no_grad():
            (value, logit), _ = model.deduce(o, s, data.actions[i].unsqueeze(0))
        deduced, p = value[0].numpy(), 1 / (1 + np.exp(-logit[0, 3].item()))
        deduced[3] = p * deduced[3] + (1 - p) * zero[3]  # the column that is often 0
        truths.append(standardised(data, "state", data.state[i + 1]))
        residual += float(((deduced - truths[-1]) ** 2).sum())
    total = float(((np.array(truths) - np.mean(truths, 0)) ** 2).sum())
    assert diagnostics.deducibility(model, data) == close(1 - residual / total)


@pytest.mark.parametrize("horizon", [1, 3, 5])
def test_rollout_errors_follow_the_recorded_actions(data, horizon):
    model = Drift()
    found = diagnostics.rollout_errors(model, data, horizon)
    rows, pairs = held_out(data), {"state": [], "persistence": [], "reward": []}
    starts = [i for i in rows if all(i + h in rows for h in range(horizon))]
    for h in range(horizon):
        for part in pairs.values():
            part.append([])
        for i in starts:
            obs, state = data.obs[i], data.state[i]
            for k in range(h + 1):
                obs, state, reward = Drift.move(obs, state, data.actions[i + k])
            pairs["state"][h].append((state, data.state[i + h + 1]))
            pairs["persistence"][h].append((data.state[i], data.state[i + h + 1]))
            pairs["reward"][h].append((reward, data.reward[i + h]))
    assert len(starts) > 1 and len(model.starts.state) == len(starts) and model.calls == horizon
    for name, per_step in pairs.items():
        kind = "reward" if name == "reward" else "state"
        expected = [mse(data, kind, step) for step in per_step]
        assert found[name] == pytest.approx(expected, rel=1e-4), name


def test_no_rollout_errors_beyond_the_longest_episode(data):
    assert diagnostics.rollout_errors(Drift(), data, max(LENGTHS) + 1) == {
        "state": [], "persistence": [], "reward": [],
    }  # fmt: skip


@pytest.mark.parametrize("zeros", [True, False])
def test_first_rollout_error_of_logo_is_its_one_step_error(data, zeros):
    torch.manual_seed(0)
    model = LogoWM(N, O, S, A, 8, statistics=data.statistics(), clamp=False, zeros=zeros)
    errors, one = (
        diagnostics.rollout_errors(model, data, 1),
        diagnostics.one_step_errors(model, data),
    )
    batch = data.gather(data.held_out)
    decided = model.step(batch.obs, batch.state, batch.actions)["next_state"]
    state_mse = mse(data, "state", zip(decided, batch.next_state, strict=True))
    assert errors["state"] == [close(state_mse)]  # rollouts decide what is 0
    assert (one["state_mse"] == close(state_mse)) == (not zeros)
    assert errors["persistence"] == [close(one["persistence_state_mse"])]
    assert errors["reward"] == [close(one["reward_mse"])]
    counts = vanished(data, dict(zip(held_out(data), decided, strict=True)))
    assert counts["vanished_recorded"] > 0 and (counts["vanished_imagined"] > 0) == zeros
    assert {k: one[k] for k in counts} == {k: close(v) for k, v in counts.items()}


def test_rollout_sanity_compares_the_same_starts(data):
    torch.manual_seed(0)
    actor, model = Actor(torch.zeros(N, O), torch.ones(N, O), A, 8), Drift()
    found = diagnostics.rollout_sanity(model, actor, data, horizon=4, count=50)
    assert found == diagnostics.rollout_sanity(model, actor, data, horizon=4, count=50)
    train, where = set(data.train.tolist()), {}
    for i in range(len(data.state)):
        where[tuple(data.state[i].tolist())] = i
    starts = [where[tuple(s.tolist())] for s in model.starts.state]
    assert len(starts) == 50 and set(starts) <= train
    real = []
    for i in starts:
        for h in range(4):
            if i + h not in train:
                break
            real.append(float(data.reward[i + h]))
    assert found["real_reward_per_step"] == close(np.mean(real))
    generator = diagnostics.generator_for(data)
    torch.randint(len(data.train), (50,), generator=generator)
    out = model.imagine(actor.sample, model.starts, 4, generator)
    assert found["imagined_reward_per_step"] == close(out["reward"][:2].mean().item())
    low, high = data.state[data.train].amin(0), data.state[data.train].amax(0)
    inside = [(s >= low).logical_and(s <= high).float() for s in out["state"][1:3].flatten(0, 1)]
    assert found["states_in_range"] == close(torch.stack(inside).mean().item())
    assert found["forbidden_actions"] == close(1 / (2 * 50 * N)) and found["finite"] is True


def test_rollout_sanity_tells_of_infinite_rollouts(data):
    actor = Actor(torch.zeros(N, O), torch.ones(N, O), A, 8)
    model = Drift(uncertainty=lambda state: state[:, 0] / 0)
    assert diagnostics.rollout_sanity(model, actor, data, horizon=2)["finite"] is False


def actors_and_critic(discrete: bool):
    torch.manual_seed(2)
    mean, std = torch.zeros(N, O), torch.ones(N, O)
    actors = [Actor(mean, std, A, 8, discrete) for _ in range(2)]
    return *actors, Critic(mean, std, torch.zeros(S), torch.ones(S), A, 8, discrete)


def test_agreement_counts_agents_that_had_a_choice(data):
    ema_actor, bc_actor, critic = actors_and_critic(discrete=True)
    learner = SimpleNamespace(ema_actor=ema_actor, critic=critic)
    found = diagnostics.offline_measures(learner, bc_actor, data, GAMMA)
    for name, actor in (("action", ema_actor), ("clone", bc_actor)):
        same = []
        for i in held_out(data):
            taken = actor.greedy(data.obs[i : i + 1], data.avail[i : i + 1])[0]
            for agent in range(N):
                if data.avail[i, agent].sum() > 1:
                    recorded = data.actions[i, agent].argmax()
                    same.append(float(taken[agent].argmax() == recorded))
        assert found[f"{name}_agreement"] == close(np.mean(same))
    b = data.gather(data.held_out)
    with torch.no_grad():
        policy = critic(b.obs, b.state, ema_actor(b.obs, b.avail)).mean().item()
        recorded = critic(b.obs, b.state, b.actions).mean().item()
    assert (found["value_policy"], found["value_data"]) == (close(policy), close(recorded))


def test_continuous_policies_have_a_squared_distance():
    data = make_data(discrete=False)
    ema_actor, bc_actor, critic = actors_and_critic(discrete=False)
    learner = SimpleNamespace(ema_actor=ema_actor, critic=critic)
    found = diagnostics.offline_measures(learner, bc_actor, data, GAMMA)
    for name, actor in (("action", ema_actor), ("clone", bc_actor)):
        distance = []
        for i in held_out(data):
            taken = actor.greedy(data.obs[i : i + 1], None)[0]
            distance += [
                float(((taken[k] - data.actions[i, k]) ** 2).sum()) for k in range(N)
            ]  # fmt: skip
        assert found[f"{name}_mse"] == close(np.mean(distance))
    assert set(found) == {"action_mse", "clone_mse", "value_policy", "value_data", "return_to_go"}


@pytest.mark.parametrize("discrete", [True, False])
def test_bellman_errors_of_known_and_of_held_out_rows(discrete):
    data = make_data(discrete=discrete)
    actor, bc_actor, critic = actors_and_critic(discrete=discrete)
    _, _, target = actors_and_critic(discrete=discrete)
    torch.nn.init.normal_(next(target.parameters()))
    learner = SimpleNamespace(
        ema_actor=bc_actor, actor=actor, critic=critic, critic_target=target
    )  # fmt: skip
    found = diagnostics.offline_measures(learner, bc_actor, data, GAMMA)

    def naive(batch):
        squares = []
        for i in range(len(batch.reward)):
            b = type(batch)(*(None if x is None else x[i : i + 1] for x in batch))
            with torch.no_grad():
                pi = actor(b.next_obs, b.next_avail)
                v = min(x.item() for x in target(b.next_obs, b.next_state, pi))
                y = b.reward.item() + GAMMA * (1 - b.terminated.item()) * v
                squares += [(q.item() - y) ** 2 for q in critic(b.obs, b.state, b.actions)]
        return np.mean(squares)

    held_out = data.gather(data.held_out)
    known = data.sample(len(data.held_out), diagnostics.generator_for(data))
    assert found["td_held_out"] == close(naive(held_out))
    assert found["td_train"] == close(naive(known)) and naive(known) != close(naive(held_out))


@pytest.mark.parametrize("critic", [{"critic": None}, {}])
def test_a_learner_without_critic_has_no_values(data, critic):
    ema_actor, bc_actor, _ = actors_and_critic(discrete=True)
    learner = SimpleNamespace(ema_actor=ema_actor, **critic)
    found = diagnostics.offline_measures(learner, bc_actor, data, GAMMA)
    assert set(found) == {"action_agreement", "clone_agreement", "return_to_go"}


def test_the_scale_of_values_is_that_of_the_training_rows(data):
    known = data.returns_to_go(GAMMA)[data.train].double().numpy()
    assert data.value_scale(GAMMA) == close((known.mean(), known.std()))
    constant = copy.copy(data)
    constant.reward = torch.zeros_like(data.reward)
    assert constant.value_scale(GAMMA) == (0.0, 1.0)


def test_the_range_of_values_is_that_of_the_training_rows(data):
    known = torch.cat([data.returns_to_go(x)[data.train] for x in (1.0, GAMMA)])
    expected = min(known.min().item(), 0.0), max(known.max().item(), 0.0)
    other = copy.copy(data)
    other.reward = data.reward.clone()
    other.reward[data.held_out] = 1e6
    assert data.value_range(GAMMA) == other.value_range(GAMMA) == expected


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("critic", ["cql", "scaled"])
def test_a_scaled_critic_has_the_scale_of_the_data(data, critic, discrete):
    """Then cloning is in units of the data's actions, too (D21)."""
    spec = SimpleNamespace(action_dim=data.actions.shape[-1], discrete=discrete)
    args = train.Args(critic=critic, gamma=GAMMA, hidden=8, updates=8)
    learner = train.make_learner(args, spec, data)
    scaled = critic == "scaled"
    expected = data.value_scale(GAMMA) if scaled else (0.0, 1.0)
    assert (learner.critic.value_mean, learner.critic.value_std) == expected
    assert {"value_mean", "value_std"} <= learner.critic.state_dict().keys()
    known = data.actions[data.train].double().numpy()
    variance = known.var(0).mean() if scaled and not discrete else 1.0
    assert learner.policy_loss.keywords["bc_lambda"] == pytest.approx(args.bc_lambda / variance)
    still = copy.copy(data)
    still.actions = torch.ones_like(data.actions)
    assert still.action_variance() == 1.0


def test_returns_to_go_stop_at_the_end_of_an_episode(data):
    found, row = data.returns_to_go(GAMMA), 0
    assert found.shape == data.reward.shape
    for length in LENGTHS:
        for t in range(length):
            rewards = [float(data.reward[row + k]) for k in range(t, length)]
            expected = sum(GAMMA**k * r for k, r in enumerate(rewards))
            assert found[row + t].item() == close(expected)
        assert found[row + length] == 0  # the final observation
        row += length + 1
    mean = found[data.held_out].mean().item()
    ema_actor, bc_actor, _ = actors_and_critic(discrete=True)
    learner = SimpleNamespace(ema_actor=ema_actor, critic=None)
    measures = diagnostics.offline_measures(learner, bc_actor, data, GAMMA)
    assert measures["return_to_go"] == close(mean)
