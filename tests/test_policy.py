"""Which way the policy's and the critic's losses push, and what the policies draw.

A bandit of two agents shows the directions of Eq. (10) and (12); drawn frequencies are compared
with the probabilities they are drawn from by chi-square tests with fixed seeds.
"""

import copy
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from torch.nn import functional as F

from macql import (
    MACQL,
    Actor,
    Critic,
    action_noise,
    critic_loss,
    linear_decay,
    policy_loss,
    soft_update,
)

N, O, S = 2, 3, 2  # noqa: E741


def make_actor(action_dim, seed=0, agents=N, **options) -> Actor:
    torch.manual_seed(seed)
    return Actor(torch.zeros(agents, O), torch.ones(agents, O), action_dim, hidden=16, **options)


def make_critic(action_dim, seed=0, **options) -> Critic:
    torch.manual_seed(seed)
    zero, one = torch.zeros(N, O), torch.ones(N, O)
    return Critic(zero, one, torch.zeros(S), torch.ones(S), action_dim, hidden=16, **options)


# Actions 0 and 1 are in the data (1 pays more), 2 and 3 are not, 4 is unavailable.
SEEN, UNSEEN, UNAVAILABLE, ACTIONS = [0, 1], [2, 3], 4, 5


def bandit(size, generator, share_of_1=0.5) -> SimpleNamespace:
    choice = (torch.rand(size, N, generator=generator) < share_of_1).long()
    avail = torch.ones(size, N, ACTIONS)
    avail[..., UNAVAILABLE] = 0
    obs, state = torch.zeros(size, N, O), torch.zeros(size, S)
    return SimpleNamespace(
        obs=obs, state=state, avail=avail, actions=F.one_hot(choice, ACTIONS).float(),
        reward=choice.sum(-1).float(), next_obs=obs, next_state=state, next_avail=avail,
        terminated=torch.ones(size), steps=torch.ones(size),
    )  # fmt: skip


@functools.cache
def trained_utilities(alpha: float, conservative: str = "logsumexp") -> torch.Tensor:
    """(N,A): what each agent's actions are worth after training on the bandit."""
    g, actor = torch.Generator().manual_seed(0), make_actor(ACTIONS)
    critic, target = make_critic(ACTIONS), make_critic(ACTIONS)
    optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3)
    for _ in range(250):
        batch = bandit(128, g)
        real = torch.ones(128)
        loss, _ = critic_loss(
            critic, target, actor, batch, real, 0.99, alpha, conservative=conservative
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return critic.utilities(batch.obs[:1], batch.state[:1]).mean(0)[0].detach()


# The expectation lowers unseen actions without bound; far down, rounding decides about seen ones.
@pytest.mark.parametrize("conservative, alpha", [("logsumexp", 0.5), ("expectation", 0.01)])
def test_conservative_term_lowers_unseen_actions(conservative, alpha):
    free, pressed = trained_utilities(0.0), trained_utilities(alpha, conservative)
    assert (pressed[:, UNSEEN] < free[:, UNSEEN] - 0.5).all()
    assert (pressed[:, SEEN] > pressed[:, UNSEEN].amax(-1, keepdim=True)).all()
    # The log-sum-exp also draws the seen ones a little together, but as a whole it lifts them.
    assert (pressed[:, SEEN].mean(-1) > free[:, SEEN].mean(-1) - 0.15).all()
    for q in (free, pressed):
        assert (q[:, 1] - q[:, 0] > 0.5).all()


@pytest.mark.parametrize("imagined_in", ["bellman", "printed"])
@pytest.mark.parametrize("conservative", ["logsumexp", "expectation"])
def test_conservative_gradient_is_policy_minus_data(conservative, imagined_in):
    size, alpha = 12, 0.8
    g = torch.Generator().manual_seed(0)
    batch = bandit(size, g)
    is_real = (torch.arange(size) % 3 > 0).float()
    actor, critic, target = make_actor(ACTIONS), make_critic(ACTIONS), make_critic(ACTIONS, 1)
    table = torch.randn(2, size, N, ACTIONS, generator=g).requires_grad_()
    critic.utilities = lambda obs, state: table

    def gradient(alpha):
        loss, _ = critic_loss(
            critic, target, actor, batch, is_real, 0.99, alpha, None, conservative,
            imagined_in=imagined_in,
        )  # fmt: skip
        return torch.autograd.grad(loss, table)[0]

    pushed = (gradient(alpha) - gradient(0.0)) / alpha
    pi = actor(batch.obs, batch.avail)
    if conservative == "logsumexp":  # the softmax of Q itself
        pi = table.detach().masked_fill(batch.avail == 0, -torch.inf).softmax(-1)
    # all values are pushed down on real rows or on every row, the data's up on real rows
    real_share = (is_real / is_real.sum()).view(-1, 1, 1)
    lowered_share = 1 / size if imagined_in == "printed" else real_share
    expected = pi * lowered_share - batch.actions * real_share
    torch.testing.assert_close(pushed, expected.expand_as(pushed).detach(), atol=1e-6, rtol=0)
    assert (pushed[..., UNAVAILABLE] == 0).all()
    lowered = pushed if imagined_in == "printed" else pushed[:, is_real == 1]
    assert (lowered[..., UNSEEN] > 0).all()  # gradient descent lowers these
    real = pushed[:, is_real == 1]
    taken = batch.actions[is_real == 1].bool().expand_as(real)
    assert (real[taken] < 0).all()  # and raises those


# --------------------------------------------------------------------------------------- drawing


def random_masks(rows, agents, actions, generator) -> torch.Tensor:
    avail = (torch.rand(rows, agents, actions, generator=generator) < 0.4).float()
    avail[..., 0] = torch.where(avail.sum(-1) == 0, 1.0, avail[..., 0])
    return avail


@pytest.mark.parametrize("shared", [True, False])
def test_unavailable_actions_are_never_taken(shared):
    g, actor = torch.Generator().manual_seed(0), make_actor(6, shared=shared)
    with torch.no_grad():  # confident, also in what it must not do
        for p in actor.parameters():
            p.mul_(8.0)
    obs, avail = torch.randn(5000, N, O, generator=g), random_masks(5000, N, 6, g)
    pi = actor(obs, avail)
    assert (actor.logits(obs).argmax(-1, keepdim=True) != pi.argmax(-1, keepdim=True)).any()
    assert (pi[avail == 0] == 0).all()
    torch.testing.assert_close(pi.sum(-1), torch.ones(5000, N))
    for actions in (actor.greedy(obs, avail), actor.sample(obs, avail, g)):
        assert ((actions == 0) | (actions == 1)).all() and (actions.sum(-1) == 1).all()
        assert (actions * (1 - avail)).sum() == 0
    best = actor.greedy(obs, avail).argmax(-1)
    assert torch.equal(best, actor.logits(obs).masked_fill(avail == 0, -torch.inf).argmax(-1))


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_sampling_mixes_the_policy_with_uniform_actions(epsilon):
    g, actor, draws = torch.Generator().manual_seed(0), make_actor(6), 40_000
    with torch.no_grad():
        for p in actor.parameters():
            p.mul_(2.0)
    obs = torch.randn(1, N, O, generator=g)
    avail = torch.tensor([[[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1]]]).float()
    pi = actor(obs, avail)[0].detach().double()
    drawn = actor.sample(obs.expand(draws, -1, -1), avail.expand(draws, -1, -1), g, epsilon)
    for i in range(N):
        allowed = avail[0, i] == 1
        counts = drawn[:, i].sum(0)
        assert counts[~allowed].sum() == 0 and counts.sum() == draws
        assert pi[i, allowed].max() / pi[i, allowed].min() > 1.5  # else every epsilon looks alike
        expected = (1 - epsilon) * pi[i, allowed] + epsilon / int(allowed.sum())
        expected = expected / expected.sum() * draws
        assert scipy.stats.chisquare(counts[allowed].double(), expected).pvalue > 1e-3
    together = torch.einsum("ba,bc->ac", drawn[:, 0], drawn[:, 1])[:, avail[0, 1] == 1]
    assert scipy.stats.chi2_contingency(together.numpy()).pvalue > 1e-3  # agents draw apart


def test_the_same_generator_state_draws_the_same_actions():
    actor, obs = make_actor(6), torch.randn(200, N, O)
    avail = torch.ones(200, N, 6)
    generators = [torch.Generator().manual_seed(k) for k in (1, 1, 2)]
    draws = [actor.sample(obs, avail, g) for g in generators]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_continuous_actions_stay_within_one_and_explore():
    g, actor = torch.Generator().manual_seed(0), make_actor(2, discrete=False)
    obs = 50 * torch.randn(20_000, N, O, generator=g)
    pi = actor(obs, None)
    assert pi.abs().max() <= 1 and pi.max() > 0.9 and pi.min() < -0.9
    assert torch.equal(actor.greedy(obs, None), pi)
    explored = actor.sample(obs, None, g, 0.5)
    assert explored.max() == 1 and explored.min() == -1
    with torch.no_grad():  # tanh(0) in the middle: no clamp, the plain noise
        for p in actor.parameters():
            p.zero_()
    noise = actor.sample(obs, None, g, 0.1).flatten() / 0.1
    assert scipy.stats.kstest(noise.numpy(), "norm").pvalue > 1e-3


def test_action_noise_is_one_third_uniform_and_two_normal():
    uniform, *normal = action_noise((50, N, 4), torch.Generator().manual_seed(0), samples=20)
    assert uniform.shape == normal[0].shape == normal[1].shape == (20, 50, N, 4)
    flat = [x.flatten().numpy() for x in (uniform, *normal)]
    assert scipy.stats.kstest(flat[0], scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert all(scipy.stats.kstest(x, "norm").pvalue > 1e-3 for x in flat[1:])
    assert (np.abs(np.corrcoef(flat) - np.eye(3)) < 0.05).all()
    generators = [torch.Generator().manual_seed(k) for k in (1, 1, 2)]
    draws = [action_noise((5, N, 4), g) for g in generators]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# --------------------------------------------------------------------------------------- learning


def learned_policy(bc_lambda: float, critic) -> torch.Tensor:
    """(N,A): the policy after training on a bandit whose data take action 1 three times of four."""
    g, actor = torch.Generator().manual_seed(0), make_actor(ACTIONS)
    optimizer = torch.optim.Adam(actor.parameters(), lr=5e-3)
    for _ in range(250):
        batch = bandit(256, g, share_of_1=0.75)
        loss, _ = policy_loss(actor, critic, batch, torch.ones(256), bc_lambda)
        optimizer.zero_grad()
        loss.backward(inputs=list(actor.parameters()))
        optimizer.step()
    return actor(batch.obs[:1], batch.avail[:1])[0].detach()


def test_lambda_moves_the_policy_from_critic_to_data():
    critic = make_critic(ACTIONS)
    worth = torch.tensor([0.0, 0.0, 1.0, 0.0, 9.0])  # best of all: an action the data never take
    critic.utilities = lambda obs, state: worth.expand(2, len(obs), N, -1)
    data = torch.tensor([0.25, 0.75, 0.0, 0.0, 0.0])
    cloned = learned_policy(1e4, critic)
    assert (cloned - data).abs().max() < 0.05
    assert (learned_policy(1.0, None) - data).abs().max() < 0.05
    greedy = learned_policy(0.0, critic)
    assert (greedy[:, 2] > 0.95).all() and (greedy[:, UNAVAILABLE] == 0).all()
    between = learned_policy(1.0, critic)
    assert ((between[:, 2] > cloned[:, 2] + 0.05) & (between[:, 2] < greedy[:, 2] - 0.05)).all()


@pytest.mark.parametrize("shared", [True, False])
def test_an_agent_acts_on_its_own_observation_alone(shared):
    actor = make_actor(4, agents=3, shared=shared)
    obs, avail = torch.randn(7, 3, O), torch.ones(7, 3, 4)
    before = actor(obs, avail)
    for j in range(3):
        changed = obs.clone()
        changed[:, j] += 1.0
        after = actor(changed, avail)
        for i in range(3):
            assert torch.equal(after[:, i], before[:, i]) == (i != j)


def test_separate_actors_share_no_weight():
    obs, avail = torch.randn(7, 1, O).expand(-1, 3, -1), torch.ones(7, 3, 4)
    actor = make_actor(4, agents=3, shared=False)
    before = actor(obs, avail)
    for j in range(3):
        other = copy.deepcopy(actor)
        with torch.no_grad():
            for p in other.parameters():
                assert len(p) == 3
                p[j] += torch.randn_like(p[j])
        after = other(obs, avail)
        for i in range(3):
            assert torch.equal(after[:, i], before[:, i]) == (i != j)
    shared = make_actor(4, agents=3, shared=True)
    assert all(len(p) == 1 for p in shared.parameters())
    pi = shared(obs, avail)
    assert not torch.allclose(pi[:, 0], pi[:, 1]) and not torch.allclose(pi[:, 1], pi[:, 2])


def test_the_soft_update_moves_every_parameter_by_the_share_tau():
    source, target = make_critic(ACTIONS, seed=1), make_critic(ACTIONS, seed=2)
    old = [p.detach().clone() for p in target.parameters()]
    new = [p.detach().clone() for p in source.parameters()]
    soft_update(target, source, 0.25)
    for p, a, b in zip(target.parameters(), old, new, strict=True):
        np.testing.assert_allclose(p.detach(), 0.75 * a + 0.25 * b, atol=1e-6)
        assert not torch.equal(p, a)
    assert all(torch.equal(p, b) for p, b in zip(source.parameters(), new, strict=True))
    soft_update(target, source, 1.0)
    for p, b in zip(target.parameters(), new, strict=True):
        np.testing.assert_allclose(p.detach(), b, atol=1e-6)


# --------------------------------------------------------------------------------------- MACQL


@pytest.mark.parametrize("updates", [0, 4])
def test_step_sizes_fall_linearly_to_zero(updates):
    optimizer = torch.optim.Adam(make_actor(2).parameters(), lr=0.1)
    schedule = linear_decay(optimizer, updates)
    for done in range(4):
        expected = 0.1 * (1 - done / 4) if updates else 0.1
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        optimizer.step()
        schedule.step()


def macql(critic=True, **options) -> MACQL:
    return MACQL(make_actor(ACTIONS), make_critic(ACTIONS) if critic else None, **options)


@pytest.mark.parametrize("discrete", [True, False])
def test_a_scaled_critic_predicts_in_units_of_the_returns(discrete):
    """The same weights predict mean + std * what they predict otherwise; Eq. (12) divides by std,
    so lambda weighs against the plain critic's value."""
    size = ACTIONS if discrete else 2
    plain, scaled = (
        make_critic(size, discrete=discrete, **scale)
        for scale in ({}, {"value_mean": 40.0, "value_std": 8.0})
    )
    batch, is_real = bandit(16, torch.Generator().manual_seed(0)), torch.ones(16)
    if not discrete:
        batch.actions, batch.avail = batch.actions[..., :size], None
    batch.state = torch.randn(16, S, generator=torch.Generator().manual_seed(1))
    q, in_units = (x(batch.obs, batch.state, batch.actions) for x in (scaled, plain))
    torch.testing.assert_close(q, 40 + 8 * in_units)
    found = []
    for critic in (plain, scaled):
        actor = make_actor(size, discrete=discrete)
        loss, parts = policy_loss(actor, critic, batch, is_real, 0.1)
        loss.backward(inputs=list(actor.parameters()))
        found.append((parts["q"], [x.grad for x in actor.parameters()]))
    assert found[1][0].item() == pytest.approx(found[0][0].item() + 40 / 8, rel=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1])


OTHERWISE = {  # than the defaults, which are the first entries
    "gamma": (0.99, 0.5),
    "cql_alpha": (0.1, 2.0),
    "conservative": ("logsumexp", "expectation"),
    "backup": ("policy", "max"),
    "imagined_in": ("bellman", "printed"),
    "bounds": ((-np.inf, np.inf), (0.1, 0.2)),
    "bc_lambda": (0.1, 1.5),
    "tau": (0.05, 0.5),
    "ema_decay": (0.995, 0.8),
}


@pytest.mark.parametrize("option", ["nothing", *OTHERWISE])
def test_an_update_is_one_step_on_critic_then_actor(option):
    """The same by hand, with plain autograd and a fresh Adam for each network."""
    given = {option: OTHERWISE[option][1]} if option in OTHERWISE else {}
    x = {name: default for name, (default, _) in OTHERWISE.items()} | given
    learner, by_hand = macql(lr=0.01, decay_updates=10, **given), macql(lr=0.01)
    batch, g = bandit(32, torch.Generator().manual_seed(0)), torch.Generator()
    batch.terminated = (torch.arange(32) % 3 == 0).float()
    is_real = (torch.arange(32) % 2).float()
    metrics = learner.update(batch, is_real, g)
    loss, parts = critic_loss(
        by_hand.critic, by_hand.critic_target, by_hand.actor, batch, is_real, x["gamma"],
        x["cql_alpha"], None, x["conservative"], x["backup"], x["imagined_in"],
        x["bounds"],
    )  # fmt: skip
    old_target = copy.deepcopy(by_hand.critic_target)
    adam = torch.optim.Adam(by_hand.critic.parameters(), lr=0.01, fused=True)
    loss.backward(inputs=list(by_hand.critic.parameters()))
    adam.step()
    soft_update(old_target, by_hand.critic, x["tau"])
    loss, more = policy_loss(
        by_hand.actor,
        by_hand.critic,
        batch,
        is_real,
        x["bc_lambda"],
        x["imagined_in"],
    )
    adam = torch.optim.Adam(by_hand.actor.parameters(), lr=0.01, fused=True)
    loss.backward(inputs=list(by_hand.actor.parameters()))
    adam.step()
    soft_update(by_hand.ema_actor, by_hand.actor, 1 - x["ema_decay"])
    expected = {f"q_{k}": v for k, v in parts.items()} | {f"pi_{k}": v for k, v in more.items()}
    assert metrics == expected
    pairs = [(learner.actor, by_hand.actor), (learner.critic, by_hand.critic)]
    pairs += [(learner.critic_target, old_target), (learner.ema_actor, by_hand.ema_actor)]
    for mine, other in pairs:
        for p, q in zip(mine.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
    assert learner.optimizers["actor"].param_groups[0]["lr"] == pytest.approx(0.009)


def parameters(network) -> list[torch.Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def same(before: list, network) -> bool:
    return all(map(torch.equal, before, network.parameters()))


def test_the_policy_waits_until_the_critic_has_learnt():
    g, ones = torch.Generator().manual_seed(0), torch.ones(32)
    learner = macql(policy_waits=3)
    actor, average = parameters(learner.actor), parameters(learner.ema_actor)
    for k in range(3):
        critic = parameters(learner.critic)
        metrics = learner.update(bandit(32, g), ones, g)
        assert "q_td" in metrics and "pi_bc" not in metrics
        assert not same(critic, learner.critic)
        assert same(actor, learner.actor) and same(average, learner.ema_actor)
        if k == 1:  # interrupted, the resumed learner waits for one update more
            resumed = macql(policy_waits=3)
            resumed.load_state_dict(copy.deepcopy(learner.state_dict()))
            resumed.update(bandit(32, g), ones, g)
            assert same(actor, resumed.actor)
            resumed.update(bandit(32, g), ones, g)
            assert not same(actor, resumed.actor)
    assert "pi_bc" in learner.update(bandit(32, g), ones, g)
    assert not same(actor, learner.actor) and not same(average, learner.ema_actor)
    clone = macql(critic=False, policy_waits=3)  # there is nothing to wait for
    assert "pi_bc" in clone.update(bandit(32, g), ones, g)


def test_every_agent_descends_its_own_loss():
    """Algorithm 1, line 31: with other agents held fixed, lambda |pi_i - a^i|^2 - Q."""
    g, ones = torch.Generator().manual_seed(0), torch.ones(32)
    actor, critic = make_actor(ACTIONS, shared=False), make_critic(ACTIONS)
    batch = bandit(32, g)
    policy_loss(actor, critic, batch, ones, 0.7)[0].backward(inputs=list(actor.parameters()))
    together = [p.grad.clone() for p in actor.parameters()]  # (N,...) each
    for i in range(N):
        pi = actor(batch.obs, batch.avail)
        fixed = torch.stack([pi[:, j] if j == i else pi[:, j].detach() for j in range(N)], 1)
        distance = (pi[:, i] - batch.actions[:, i]).square().sum(-1)
        value = critic(batch.obs, batch.state, fixed).mean(0)
        own = torch.autograd.grad((0.7 * distance - value).mean(), list(actor.parameters()))
        for all_agents, alone in zip(together, own, strict=True):
            torch.testing.assert_close(all_agents[i], alone[i])


@pytest.mark.parametrize("critic", [True, False])
def test_a_learners_state_dict_restores_everything(critic):
    g, learner, again = torch.Generator().manual_seed(0), *(macql(critic) for _ in range(2))
    batch, ones = bandit(32, g), torch.ones(32)
    learner.update(batch, ones, g)
    again.load_state_dict(copy.deepcopy(learner.state_dict()))
    a, b = (each.update(batch, ones, g) for each in (learner, again))
    assert a == b and ("q_td" in a) == critic
    for mine, other in zip(
        learner.ema_actor.parameters(), again.ema_actor.parameters(), strict=True
    ):
        assert torch.equal(mine, other)
