"""OMAR: its losses against loops over rows and agents, its search, a run in miniature."""

import copy
import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.integrate
import torch
from conftest import TINY
from test_equations import (
    A,
    B,
    N,
    array,
    floored,
    make_batch,
    make_statistics,
    naive_pi,
    perceptron,
)
from test_sync import Reads, make_data

from baselines import omar, run
from macql import Actor, action_noise

GAMMA, ALPHA, C, HIDDEN = 0.9, 0.7, 0.3, 7
BOUNDS = (-0.9, -0.4)  # some values are out of them
CLOSE = {"rel": 1e-9, "abs": 1e-9}
REAL = [1.0, 1.0, 0.0, 1.0, 0.0]
either = pytest.mark.parametrize("discrete", [True, False])


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def build(discrete: bool, shared: bool = True) -> SimpleNamespace:
    """Random networks, rows and draws, in which the actions matter."""
    stats, batch = make_statistics(), make_batch(discrete)
    obs = stats["obs_mean"], stats["obs_std"]
    actor = Actor(*obs, A, HIDDEN, discrete, shared)
    critic, target = (omar.LocalCritic(*obs, A, HIDDEN, discrete) for _ in range(2))
    with torch.no_grad():
        for p in (*actor.parameters(), *critic.parameters(), *target.parameters()):
            p.mul_(2.0)
    g = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        stats={k: array(v) for k, v in stats.items()}, batch=batch, actor=actor, critic=critic,
        target=target, is_real=torch.tensor(REAL), draws=action_noise((B, N, A), g, 4),
        candidates=torch.randn(omar.ROUNDS, omar.CANDIDATES, B, N, A, generator=g),
    )  # fmt: skip


def naive_values(case, critic, obs, b, i, k, action=None):
    """Q_ki(o^i, .) of all discrete actions, or of one continuous action."""
    o = (array(obs[b, i]) - case.stats["obs_mean"][i]) / floored(case.stats["obs_std"][i])
    if action is None:
        return perceptron(critic.net, o, member=k * N + i)
    return perceptron(critic.net, np.append(o, action), member=k * N + i)[0]


def naive_log_sum_exp(case, b, i, k) -> float:
    """Over the available actions, or from the draws, with the density of what they are from."""
    batch = case.batch
    if case.critic.discrete:
        q = naive_values(case, case.critic, batch.obs, b, i, k)
        return math.log(sum(math.exp(q[a]) for a in range(A) if batch.avail[b, i, a] == 1))
    centres = [naive_pi(case, obs, None, b)[i] for obs in (batch.obs, batch.next_obs)]
    total, count = 0.0, 0
    for kind, noises in enumerate(array(case.draws)):
        for noise in noises[:, b, i]:
            count += 1
            action = noise if kind == 0 else centres[kind - 1] + 0.2 * noise
            if max(abs(action)) > 1:
                continue
            density = 0.5**A / 3
            for centre in centres:
                z = (action - centre) / 0.2
                density += math.prod(np.exp(-(z**2) / 2) / (0.2 * math.sqrt(2 * math.pi))) / 3
            total += math.exp(naive_values(case, case.critic, batch.obs, b, i, k, action)) / density
    return math.log(total / count)


def naive_critic_loss(case) -> tuple[float, float, float]:
    """(loss, Bellman error, conservative term)."""
    batch, bellman, gap, targets = case.batch, 0.0, 0.0, []
    for b in range(B):
        after = naive_pi(case, batch.next_obs, batch.next_avail, b)
        for i in range(N):
            if case.critic.discrete:
                best = int(np.argmax(after[i]))
                of_next = [
                    naive_values(case, case.target, batch.next_obs, b, i, k)[best] for k in (0, 1)
                ]
            else:
                of_next = [
                    naive_values(case, case.target, batch.next_obs, b, i, k, after[i])
                    for k in (0, 1)
                ]
            targets.append(min(of_next))
            v = min(max(min(of_next), BOUNDS[0]), BOUNDS[1])
            y = batch.reward[b].item() + (
                0.0 if batch.terminated[b] else GAMMA ** int(batch.steps[b]) * v
            )
            for k in (0, 1):
                action = None if case.critic.discrete else array(batch.actions[b, i])
                q = naive_values(case, case.critic, batch.obs, b, i, k, action)
                q = q[int(batch.actions[b, i].argmax())] if case.critic.discrete else q
                bellman += (q - y) ** 2 / (B * N)
                gap += REAL[b] * (naive_log_sum_exp(case, b, i, k) - q) / (sum(REAL) * N)
    assert min(targets) < BOUNDS[0] and max(targets) > BOUNDS[1]
    return bellman + ALPHA * gap, bellman, gap


@pytest.mark.parametrize(("discrete", "shared"), [(True, True), (True, False), (False, True)])
def test_the_critic_loss_equals_a_loop(discrete, shared, float64):
    case = build(discrete, shared)
    loss, parts = omar.critic_loss(
        case.critic, case.target, case.actor, case.batch, case.is_real, case.draws, gamma=GAMMA,
        alpha=ALPHA, bounds=BOUNDS,
    )  # fmt: skip
    expected, bellman, gap = naive_critic_loss(case)
    assert parts["td"].item() == pytest.approx(bellman, **CLOSE)
    assert parts["gap"].item() == pytest.approx(gap, **CLOSE)
    assert loss.item() == pytest.approx(expected, **CLOSE)
    assert all(x.shape == () and not x.requires_grad for x in parts.values())


def naive_search(case, b, i, pi) -> np.ndarray:
    """The cross-entropy method of one agent in one row; its elites stay in the next round."""

    def value(action):
        return naive_values(case, case.critic, case.batch.obs, b, i, 0, action)

    mean, sigma, kept = np.zeros(A), np.full(A, omar.SIGMA), []
    for draws in array(case.candidates)[:, :, b, i]:
        found = [np.clip(mean + sigma * draw, -1, 1) for draw in draws] + kept
        kept = sorted(found, key=value, reverse=True)[: omar.ELITES]
        mean, sigma = np.mean(kept, 0), np.std(kept, 0, ddof=1)
    return max([pi, kept[0]], key=value)


@either
def test_the_actor_loss_equals_a_loop(discrete, float64):
    case, expected = build(discrete), 0.0
    batch = case.batch
    for b in range(B):
        pi = naive_pi(case, batch.obs, batch.avail, b)
        for i in range(N):
            if discrete:
                q = naive_values(case, case.critic, batch.obs, b, i, 0)
                allowed = [a for a in range(A) if batch.avail[b, i, a] == 1]
                best = np.eye(A)[max(allowed, key=lambda a, q=q: q[a])]
                value = sum(pi[i, a] * q[a] for a in allowed)
            else:
                best = naive_search(case, b, i, pi[i])
                value = naive_values(case, case.critic, batch.obs, b, i, 0, pi[i])
            distance = sum((pi[i, a] - best[a]) ** 2 for a in range(A))
            expected += REAL[b] * (-(1 - C) * value + C * distance) / (sum(REAL) * N)
    loss, parts = omar.actor_loss(
        case.actor, case.critic, batch, case.is_real, case.candidates, rectification=C
    )
    assert loss.item() == pytest.approx(expected, **CLOSE)
    assert parts.keys() == {"q", "distance"} and parts["distance"] > 0


def test_the_log_sum_exp_is_an_integral(float64):
    """Of exp Q over [-1,1]: with the density in place of its logarithm it would be another."""
    obs, row = torch.zeros(1, 1), torch.randn(1, 1, 1)
    actor = Actor(obs, obs + 1, 1, HIDDEN, discrete=False)
    critic = omar.LocalCritic(obs, obs + 1, 1, HIDDEN, discrete=False, critics=1)
    batch = SimpleNamespace(obs=row, next_obs=-row, actions=row.clamp(-1, 1), avail=None)
    noise = action_noise((1, 1, 1), torch.Generator().manual_seed(0), 20_000)
    with torch.no_grad():
        critic.net[-1].weight.mul_(20.0)
        found = omar.data_and_all_values(critic, batch, actor, noise)[1].item()
        score = lambda a: critic.each(row, torch.full((1, 1, 1), a)).exp().item()  # noqa: E731
        expected = scipy.integrate.quad(score, -1, 1)[0]
    assert found == pytest.approx(math.log(expected), abs=0.02)


# --------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize(("dims", "share"), [(1, 1.0), (2, 0.9)])
def test_the_search_finds_the_maximum_of_a_concave_function(dims, share):
    """Inside of the box or, where the peak is beyond, at its edge; always, or nearly so."""
    g = torch.Generator().manual_seed(0)
    peak = torch.rand(100, N, dims, generator=g) * 3 - 1.5
    best, far = peak.clamp(-1, 1), torch.full_like(peak, -1.0)

    def score(a):
        return -(a - peak).square().sum(-1)

    errors = []
    for rounds, candidates in ((omar.ROUNDS, omar.CANDIDATES), (6, 300)):
        noise = torch.randn(rounds, candidates, *peak.shape, generator=g)
        found = omar.search(score, far, noise)
        assert found.abs().max() <= 1
        errors.append((found - best).norm(dim=-1))
        assert torch.equal(omar.search(score, best, noise), best)  # nothing is better than that
    assert errors[0].median() < 0.1 and (errors[1] < 0.05).float().mean() >= share


def test_masked_actions_are_never_chosen():
    """The unavailable action has the highest value, and stays out of losses and policies."""
    torch.manual_seed(0)
    batch, zero = make_batch(), torch.zeros(N, 4)
    batch = batch._replace(**{k: v.float() for k, v in batch._asdict().items()})
    actor, critic = (net(zero, zero + 1, A, HIDDEN) for net in (Actor, omar.LocalCritic))
    learner = omar.MACQL(actor, critic, lr=0.1)
    losses, ones = [], torch.ones(B)
    for extra in (0.0, 100.0):
        values = critic.values
        unavailable = extra * (1 - batch.avail)
        critic.values = lambda x, v=values, u=unavailable: v(x) + u
        critic_loss, _ = omar.critic_loss(
            critic, learner.critic_target, actor, batch, ones, gamma=GAMMA, alpha=ALPHA,
            bounds=BOUNDS,
        )  # fmt: skip
        losses.append(
            (critic_loss, omar.actor_loss(actor, critic, batch, ones, rectification=C)[0])
        )
    torch.testing.assert_close(*losses)
    for _ in range(25):
        loss, _ = omar.actor_loss(actor, critic, batch, ones, rectification=1.0)
        omar.macql.descend(learner.optimizers["actor"], loss)
    pi = actor(batch.obs, batch.avail)
    assert (pi[batch.avail == 0] == 0).all() and loss < 0.3
    q = critic.values(critic.standardise(batch.obs))[0] - 1e3 * (1 - batch.avail)
    assert torch.equal(q.argmax(-1), pi.argmax(-1))


# --------------------------------------------------------------------------------- learner, command


@either
@pytest.mark.parametrize("flags", [{}, {"shared_actor": False, "critics": 1, "clamp": False}])
def test_an_update_reads_nothing_and_repeats(discrete, flags, one_hot_as_on_a_gpu):
    torch.manual_seed(0)
    data, spec = make_data(discrete)
    args, g = omar.Args(hidden=8, updates=8, **flags), torch.Generator().manual_seed(0)
    first, second = (omar.make_learner(args, spec, data) for _ in range(2))
    batch, is_real = data.sample(16, g), (torch.arange(16) < 12).float()
    start = copy.deepcopy(first)  # its followers are equal to what they follow
    with Reads() as reads:
        first.update(batch, is_real, g)
    networks = ("actor", "ema_actor", "critic", "critic_target")
    after = {name: first.parts()[name].net[0].bias.detach().clone() for name in networks}
    assert reads.seen == []
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    both = [x.update(batch, is_real, torch.Generator().manual_seed(1)) for x in (first, second)]
    assert both[0] == both[1] and all(x.isfinite() for x in both[0].values())
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    for follower, source, share in (
        ("ema_actor", "actor", 0.005),
        ("critic_target", "critic", 0.05),
    ):
        expected = torch.lerp(start.parts()[source].net[0].bias, after[source], share)
        torch.testing.assert_close(after[follower], expected)
    moved = [p.grad is not None and p.grad.abs().sum() > 0 for p in first.critic.parameters()]
    assert all(moved)
    q = first.critic(batch.obs, batch.state, batch.actions)
    assert q.shape == (args.critics, 16)


def test_the_defaults_are_the_codes():
    battle, robot = (omar.train.defaults(x, kind=omar.Args) for x in ("2s3z", "HalfCheetah-6x1"))
    assert (battle.cql_alpha, battle.rectification) == (5.0, 0.5)
    assert (robot.cql_alpha, robot.rectification) == (1.0, 0.7)
    given = omar.train.parse(["--env-id", "Ant-2x4", "--cql-alpha", "3"], omar.Args)
    assert (given.cql_alpha, given.rectification) == (3.0, 0.7)


def test_the_policies_wait_while_the_critics_learn():
    """D26, as MACQL's: without it an untrained critic would spoil the clone."""
    torch.manual_seed(0)
    data, spec = make_data(True)
    learner = omar.make_learner(omar.Args(hidden=8, updates=8), spec, data)
    g, moved = torch.Generator().manual_seed(0), []
    for _ in range(8):
        before = learner.actor.net[0].bias.detach().clone()
        learner.update(data.sample(16, g), torch.ones(16), g)
        moved.append(not torch.equal(before, learner.actor.net[0].bias))
    assert moved == [False] * 2 + [True] * 6
    assert learner.learner.optimizers["actor"].param_groups[0]["lr"] == 0.0


def go(*flags: str):
    return run("omar", omar.Args, omar._self_check, [*flags], learner=omar.make_learner)


def test_a_run_ends_with_finite_metrics(dataset, tmp_path):
    final = go(*TINY, "--dataset", str(dataset), "--out", str(tmp_path / "run"))
    assert final["method"] == "omar" and final["eval"]["episodes"] == 16
    assert math.isfinite(final["offline"]["value_policy"])
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert {"q_td", "q_gap", "pi_q", "pi_distance"} <= {row["metric"] for row in rows}
    assert all(math.isfinite(float(row["value"])) for row in rows)


@pytest.mark.parametrize("flag", omar.Args.NO_EFFECT)
def test_a_flag_without_effect_is_refused(flag):
    other = {"critic": "--critic none", "recorded_critic": "--no-recorded-critic",
             "conservative": "--conservative expectation", "backup": "--backup max",
             "imagined_rows": "--imagined-rows printed",
             "bc_lambda": "--bc-lambda 0.5"}  # fmt: skip
    with pytest.raises(SystemExit, match=f"--{flag.replace('_', '-')} is not for omar"):
        go(*other[flag].split())


def test_the_weight_of_the_search_is_a_share():
    data, spec = make_data(True)
    with pytest.raises(ValueError, match="--rectification is 1.5"):
        omar.make_learner(omar.Args(rectification=1.5), spec, data)


def test_the_self_check_passes(capsys):
    assert go("--self-check") is None
    assert "c 0.7" in capsys.readouterr().out
