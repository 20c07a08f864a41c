"""Behaviour policies: their distributions, the network that sees unit by unit, the snapshots."""

import numpy as np
import pytest
import torch

import collect
import envs
import mappo

BATTLE = envs.Spec("x", "smax", 3, 8 * 7 - 3, 20, 5 + 4, True, 10)  # 3 allies, 4 enemies, F = 8
ROBOT = envs.Spec("y", "mamujoco", 2, 6, 9, 3, False, 10)


def see(rows: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(rows, BATTLE.num_agents, BATTLE.obs_dim, generator=g)


def test_a_masked_softmax_gives_what_torch_gives():
    torch.manual_seed(0)
    player, obs = mappo.Player(BATTLE, 8), see(5, 1)
    avail = torch.ones(5, 3, 9)
    avail[..., 2] = 0
    actions = torch.nn.functional.one_hot(torch.full((5, 3), 4), 9).float()
    truth = torch.distributions.Categorical(logits=player(obs).masked_fill(avail == 0, -torch.inf))
    found, entropy = mappo.log_prob_and_entropy(player, obs, avail, actions)
    torch.testing.assert_close(found, truth.log_prob(torch.full((5, 3), 4)))
    p = truth.probs
    torch.testing.assert_close(entropy, -(p * p.clamp(min=1e-30).log()).sum(-1))
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack([mappo.draw(player, obs, avail, g) for _ in range(4000)]).mean(0)
    assert (drawn[..., 2] == 0).all()
    assert (drawn - p).abs().max() < 0.05


def test_a_gaussian_gives_what_torch_gives():
    torch.manual_seed(0)
    player = mappo.Player(ROBOT, 8)
    player.log_std.data.uniform_(-1, 0)
    obs, actions = torch.randn(5, 2, 6), torch.randn(5, 2, 3)
    truth = torch.distributions.Normal(player(obs), player.log_std.exp())
    found, entropy = mappo.log_prob_and_entropy(player, obs, None, actions)
    torch.testing.assert_close(found, truth.log_prob(actions).sum(-1))
    torch.testing.assert_close(entropy, truth.entropy().sum(-1).expand_as(entropy))
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack([mappo.draw(player, obs, None, g) for _ in range(4000)])
    torch.testing.assert_close(drawn.mean(0), player(obs), atol=0.06, rtol=0)
    torch.testing.assert_close(drawn.std(0), truth.stddev, atol=0.06, rtol=0)


def test_robots_agents_are_told_apart_and_soldiers_are_not():
    torch.manual_seed(0)
    robot, soldier = mappo.Player(ROBOT, 8), mappo.Player(BATTLE, 8)
    torch.nn.init.normal_(soldier.net[-1].weight)
    alike = robot(torch.ones(1, 2, 6))[0]
    assert not torch.allclose(alike[0], alike[1])
    alike = soldier(torch.ones(1, 3, BATTLE.obs_dim))[0]
    torch.testing.assert_close(alike[0], alike[2])


def test_a_unit_net_treats_enemies_alike_and_does_not_see_the_dead():
    torch.manual_seed(0)
    net, obs = mappo.UnitNet(3, BATTLE.obs_dim, 9, 16), see(6, 2)[:, 0]
    allies, enemies, own = obs.split([2 * 8, 4 * 8, 5], -1)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = enemies.view(6, 4, 8)[:, order].flatten(1)
    before, after = net(obs), net(torch.cat([allies, shuffled, own], -1))
    torch.testing.assert_close(after[:, 5:], before[:, 5:][:, order])
    torch.testing.assert_close(after[:, :5], before[:, :5])
    swapped = allies.view(6, 2, 8).flip(1).flatten(1)
    torch.testing.assert_close(net(torch.cat([swapped, enemies, own], -1)), before)
    dead = enemies.clone().view(6, 4, 8)
    dead[:, 1, 0] = 0  # health
    other = dead.clone()
    other[:, 1, 1:] += 1
    with_dead, with_other = (net(torch.cat([allies, e.flatten(1), own], -1)) for e in (dead, other))
    torch.testing.assert_close(with_dead, with_other)


@pytest.mark.parametrize("env_id", envs.PAPER_SMAC)
def test_the_blocks_of_the_observation_fit_every_map(env_id):
    env = envs._compile_smax(env_id)[0]
    n, a = env.num_allies, env.action_spaces[env.agents[0]].n
    o = env.observation_spaces[env.agents[0]].shape[0]
    net = mappo.UnitNet(n, o, a, 4)
    assert net.features == len(env.unit_features) and net.features - 3 == len(env.own_features)
    assert net.enemies == env.num_enemies
    assert net(torch.zeros(2, n, o)).shape == (2, n, a)


def test_running_moments_are_those_of_all_rows_together():
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


def curve(won: list, weakened: list) -> np.ndarray:
    steps = np.arange(len(won)) * 100
    return np.stack([steps, np.array(won) * 20, won, weakened], 1)


def test_medium_and_expert_are_of_the_whole_game():
    """With weakened enemies half the final share of wins comes early; that does not count."""
    won = [0.4] * 20 + [0.2] * 20 + [0.4] * 20 + [0.8] * 40
    weak = [0.5] * 20 + [0.0] * 80
    kept = collect.select_snapshots(curve(won, weak), [{"w": np.array([i])} for i in range(100)])
    medium, expert = kept["w"][-2:, 0]
    assert 20 <= medium and 0.3 < won[medium] < 0.5 and expert == 99
    assert (np.diff(kept["w"][:, 0]) > 0).all() and len(kept["w"]) == 6


def test_a_robots_medium_is_chosen_by_its_return():
    won = [0.0] * 100
    rows = curve(won, won)
    rows[:, 1] = np.arange(100) * 50
    snapshots = [{"w": np.array([i])} for i in range(100)]
    assert collect.select_snapshots(rows, snapshots, 1500.0)["w"][-2, 0] == 30
    assert collect.select_snapshots(rows, snapshots)["w"][-2, 0] == pytest.approx(49, abs=2)
