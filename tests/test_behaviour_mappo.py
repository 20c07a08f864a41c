"""Behaviour policies: distributions, the unit-wise network, advantages, snapshots, training."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import envs
from behaviour import mappo, weights
from behaviour.policy import Policy, UnitNet, log_prob_and_entropy, sample_actions

SMAX = envs.Spec("x", "smax", 3, 8 * 7 - 3, 20, 5 + 4, True, 10)  # 3 allies, 4 enemies, F = 8
ROBOT = envs.Spec("y", "mamujoco", 2, 6, 9, 3, False, 10)


def observe(rows: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(rows, SMAX.num_agents, SMAX.obs_dim, generator=g)


def test_masked_softmax_equals_torch_categorical():
    torch.manual_seed(0)
    policy, obs = Policy(SMAX, 8), observe(5, 1)
    avail = torch.ones(5, 3, 9)
    avail[..., 2] = 0
    actions = torch.nn.functional.one_hot(torch.full((5, 3), 4), 9).float()
    truth = torch.distributions.Categorical(logits=policy(obs).masked_fill(avail == 0, -torch.inf))
    found, entropy = log_prob_and_entropy(policy, obs, avail, actions)
    torch.testing.assert_close(found, truth.log_prob(torch.full((5, 3), 4)))
    p = truth.probs
    torch.testing.assert_close(entropy, -(p * p.clamp(min=1e-30).log()).sum(-1))
    g = torch.Generator().manual_seed(0)
    many = (x.expand(4000, *x.shape) for x in (obs, avail))
    sampled = sample_actions(policy, *many, g).mean(0)
    assert (sampled[..., 2] == 0).all()
    assert (sampled - p).abs().max() < 0.05


def test_gaussian_equals_torch_normal():
    torch.manual_seed(0)
    policy = Policy(ROBOT, 8)
    policy.log_std.data.uniform_(-1, 0)
    obs, actions = torch.randn(5, 2, 6), torch.randn(5, 2, 3)
    truth = torch.distributions.Normal(policy(obs), policy.log_std.exp())
    found, entropy = log_prob_and_entropy(policy, obs, None, actions)
    torch.testing.assert_close(found, truth.log_prob(actions).sum(-1))
    torch.testing.assert_close(entropy, truth.entropy().sum(-1).expand_as(entropy))
    g = torch.Generator().manual_seed(0)
    sampled = sample_actions(policy, obs.expand(4000, *obs.shape), None, g)
    torch.testing.assert_close(sampled.mean(0), policy(obs), atol=0.06, rtol=0)
    torch.testing.assert_close(sampled.std(0), truth.stddev, atol=0.06, rtol=0)


def test_only_robots_policies_depend_on_agent_id():
    torch.manual_seed(0)
    robot, smax = Policy(ROBOT, 8), Policy(SMAX, 8)
    out = robot(torch.ones(1, 2, 6))[0]
    assert not torch.allclose(out[0], out[1])
    out = smax(torch.ones(1, 3, SMAX.obs_dim))[0]
    torch.testing.assert_close(out[0], out[2])


def test_unit_net_follows_permutations_of_units():
    torch.manual_seed(0)
    net, obs = UnitNet(3, SMAX.obs_dim, 9, 16), observe(6, 2)[:, 0]
    allies, enemies, own = obs.split([2 * 8, 4 * 8, 5], -1)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = enemies.view(6, 4, 8)[:, order].flatten(1)
    before, after = net(obs), net(torch.cat([allies, shuffled, own], -1))
    torch.testing.assert_close(after[:, 5:], before[:, 5:][:, order])
    torch.testing.assert_close(after[:, :5], before[:, :5])
    swapped = allies.view(6, 2, 8).flip(1).flatten(1)
    torch.testing.assert_close(net(torch.cat([swapped, enemies, own], -1)), before)


def test_unit_net_ignores_features_of_dead_enemies():
    torch.manual_seed(0)
    net, obs = UnitNet(3, SMAX.obs_dim, 9, 16), observe(6, 2)[:, 0]
    allies, enemies, own = obs.split([2 * 8, 4 * 8, 5], -1)
    dead = enemies.clone().view(6, 4, 8)
    dead[:, 1, 0] = 0  # health
    other = dead.clone()
    other[:, 1, 1:] += 1
    with_dead, with_other = (net(torch.cat([allies, e.flatten(1), own], -1)) for e in (dead, other))
    torch.testing.assert_close(with_dead, with_other)


@pytest.mark.parametrize("env_id", envs.PAPER_SMAC)
def test_unit_net_blocks_match_smax_observations(env_id):
    env = envs._compile_smax(env_id)[0]
    n, a = env.num_allies, env.action_spaces[env.agents[0]].n
    o = env.observation_spaces[env.agents[0]].shape[0]
    net = UnitNet(n, o, a, 4)
    assert net.features == len(env.unit_features) and net.features - 3 == len(env.own_features)
    assert net.enemies == env.num_enemies
    assert net(torch.zeros(2, n, o)).shape == (2, n, a)


def test_running_moments_equal_those_of_all_rows():
    torch.manual_seed(0)
    parts, moments = [torch.randn(n, 3) * 4 + 7 for n in (5, 100, 17)], mappo.RunningMoments()
    for part in parts:
        moments.add(part)
    rows = torch.cat(parts)
    torch.testing.assert_close(moments.mean, rows.mean(0))
    torch.testing.assert_close(moments.std(0.0), rows.std(0, unbiased=False))
    assert (moments.std(100.0) == 100.0).all()


def test_discounted_sums_run_forward():
    reward = torch.tensor([[1.0], [2.0], [3.0]])
    assert mappo.discounted(reward, 0.5).flatten().tolist() == [1.0, 2.5, 4.25]


def test_advantages_equal_their_definition_as_a_sum():
    steps, slots, gamma, lam = 7, 4, 0.9, 0.8
    g = torch.Generator().manual_seed(0)
    reward = torch.randn(steps, slots, generator=g, dtype=torch.float64)
    value = torch.randn(steps + 1, slots, generator=g, dtype=torch.float64)
    lengths = [7, 3, 5, 1]
    valid, terminated = torch.zeros_like(reward), torch.zeros_like(reward)
    for e, length in enumerate(lengths):
        valid[:length, e] = 1
        terminated[length - 1, e] = float(e in (1, 3))  # the others are cut by the time limit
    found = mappo.advantages(reward, value, terminated, valid, gamma, lam)
    for e, length in enumerate(lengths):
        for t in range(steps):
            expected = 0.0
            for k in range(t, length):
                beyond = 0.0 if terminated[k, e] else value[k + 1, e].item()
                delta = reward[k, e].item() + gamma * beyond - value[k, e].item()
                expected += (gamma * lam) ** (k - t) * delta
            assert found[t, e].item() == pytest.approx(expected, abs=1e-12)


def test_weakened_share_falls_with_wins_and_with_time():
    args = mappo.Args("3m", total_steps=1000, weakened=0.7)
    assert mappo.next_weakened(args, 0.5, win_rate=0.6, steps=0) == pytest.approx(0.49)
    assert mappo.next_weakened(args, 0.5, win_rate=0.4, steps=0) == 0.5
    assert mappo.next_weakened(args, 0.5, win_rate=0.4, steps=600) == pytest.approx(0.175)
    assert mappo.next_weakened(args, 0.005, win_rate=0.6, steps=0) == 0.0
    assert mappo.next_weakened(args, 0.5, win_rate=0.4, steps=800) == 0.0


# ---------------------------------------------------------------------------------------- snapshots


def curve(won: list, weakened: list) -> np.ndarray:
    steps = np.arange(len(won)) * 100
    return np.stack([steps, np.array(won) * 20, won, weakened], 1)


def test_medium_is_not_taken_while_enemies_are_weakened():
    """Half the final win rate is reached early against weakened enemies; that does not count."""
    won = [0.4] * 20 + [0.2] * 20 + [0.4] * 20 + [0.8] * 40
    weak = [0.5] * 20 + [0.0] * 80
    kept = weights.select_snapshots(curve(won, weak), [{"w": np.array([i])} for i in range(100)])
    medium, expert = kept["w"][-2:, 0]
    assert 20 <= medium and 0.3 < won[medium] < 0.5 and expert == 99
    assert (np.diff(kept["w"][:, 0]) > 0).all() and len(kept["w"]) == 6


def test_robots_medium_is_chosen_by_return():
    won = [0.0] * 100
    rows = curve(won, won)
    rows[:, 1] = np.arange(100) * 50
    snapshots = [{"w": np.array([i])} for i in range(100)]
    assert weights.select_snapshots(rows, snapshots, 1500.0)["w"][-2, 0] == 30
    assert weights.select_snapshots(rows, snapshots)["w"][-2, 0] == pytest.approx(49, abs=2)


# ----------------------------------------------------------------------------------------- training


TINY = {
    "3s_vs_5z": {"num_envs": 8, "total_steps": 600, "hidden": 8},
    "Hopper-3x1": {"num_envs": 2, "total_steps": 200, "rows": 20, "hidden": 8, "epochs": 1},
}


@pytest.mark.parametrize("env_id", TINY)
def test_training_is_reproducible_and_moves_the_policy(env_id):
    args = dataclasses.replace(mappo.defaults(env_id), **TINY[env_id])
    (first, snapshots), (again, same) = mappo.train(args), mappo.train(args)
    assert np.array_equal(first, again) and len(first) == len(snapshots) == len(same)
    assert first[-1, 0] >= args.total_steps > first[-2, 0]
    for a, b in zip(snapshots, same, strict=True):
        assert all(np.array_equal(a[k], b[k]) for k in a)
    assert not np.array_equal(snapshots[0]["net.4.weight"], snapshots[-1]["net.4.weight"])
    other, _ = mappo.train(dataclasses.replace(args, seed=1))
    assert not np.array_equal(first[:1], other[:1])


def test_training_that_diverges_is_stopped():
    args = dataclasses.replace(mappo.defaults("Hopper-3x1"), **TINY["Hopper-3x1"], lr=1e38)
    with pytest.raises(ValueError, match="NaN or infinite.*lower --lr"):
        mappo.train(args)


@pytest.mark.parametrize(
    "flag,values",
    [
        ("lr", (0.0, -1.0, math.nan, math.inf)),
        ("clip", (0.0, -1.0, math.nan, math.inf)),
        ("entropy", (-0.1, math.nan, math.inf)),
        ("gamma", (-0.1, 1.1, math.nan, math.inf)),
        ("gae_lambda", (-0.1, 1.1, math.nan, math.inf)),
        ("weakened", (-0.1, 1.1, math.nan, math.inf)),
        *((k, (0, -1)) for k in ("num_envs", "total_steps", "rows", "hidden", "epochs")),
        ("minibatches", (0, -1)),
        ("seed", (-1,)),
    ],
)
def test_settings_out_of_range_are_refused_by_flag(flag, values):
    for value in values:
        with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} is {value}: give"):
            mappo.train(mappo.Args("3m", **{flag: value}))


@pytest.mark.parametrize("flags", [{"units": True}, {"weakened": 0.5}])
def test_smax_settings_are_refused_for_robots(flags):
    with pytest.raises(ValueError, match="for SMAX only; Hopper-3x1 is a robot"):
        mappo.train(dataclasses.replace(mappo.defaults("Hopper-3x1"), **flags))


def test_training_in_starcraft_is_refused():
    with pytest.raises(ValueError, match="terran_5_vs_5: policies are trained in SMAX and MuJoCo"):
        mappo.train(mappo.Args("terran_5_vs_5"))


def test_defaults_are_the_recipe_of_the_task():
    assert mappo.defaults("3m") == mappo.Args("3m")
    assert mappo.defaults("5m_vs_6m").units and mappo.defaults("5m_vs_6m").weakened == 1.0
    assert mappo.defaults("Ant-4x2") == mappo.Args("Ant-4x2", **mappo.ROBOT)
