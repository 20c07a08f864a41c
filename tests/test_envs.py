"""SMAX behind the interface of envs.py, and evaluation; the other backends: test_simulators_*.py.

Sizes against tables measured in JaxMARL 0.2.0; episodes against the promises of the interface. All
episodes are on the small map 3m, compiled once for 1 and once for 8 parallel episodes.
"""

import functools
import time

import numpy as np
import pytest
import scipy.stats
import torch

import envs
from simulators import mamujoco

MAP, SLOTS = "3m", 8
SIZES = {  # map: agents, observation, state, actions
    "3s_vs_5z": (3, 73, 96, 10),
    "2s3z": (5, 91, 120, 10),
    "5m_vs_6m": (5, 100, 132, 11),
    "6h_vs_8z": (6, 127, 168, 13),
    "3s5z_vs_3s6z": (8, 154, 204, 14),
}


@pytest.fixture(scope="module")
def env():
    return envs.make(MAP, num_envs=SLOTS)


@pytest.fixture(scope="module")
def single():
    return envs.make(MAP, num_envs=1)


def attack(obs: torch.Tensor, avail: torch.Tensor) -> torch.Tensor:
    """Shoot the first enemy in reach, else walk towards the enemy; wins some battles of 3m."""
    choice = torch.where(avail[..., 5:].any(-1), 5 + avail[..., 5:].argmax(-1), 1)
    allowed = avail.gather(-1, choice.unsqueeze(-1)).squeeze(-1) > 0
    choice = torch.where(allowed, choice, avail.argmax(-1))  # the dead have one action left
    return torch.nn.functional.one_hot(choice, avail.shape[-1]).float()


def play(env, seed: int, policy=attack) -> list[envs.Step]:
    """All steps of one round, the reset first, and one more after everybody's end."""
    steps = [env.reset(seed)]
    while not steps[-1].done.all():
        now = steps[-1]
        steps.append(env.step(policy(torch.tensor(now.obs), torch.tensor(now.avail)).numpy()))
    now = steps[-1]
    steps.append(env.step(policy(torch.tensor(now.obs), torch.tensor(now.avail)).numpy()))
    return steps


def advance_clock(env, to: np.ndarray) -> None:
    """Set the battles' own step counters, as if they had lasted that long already."""
    key, state = env._carry
    later = envs._import_smax().jax.numpy.asarray(to, state.state.step.dtype)
    env._carry = (key, state.replace(state=state.state.replace(step=later)))


@pytest.fixture(scope="module")
def rounds(env):
    """Three rounds of the attacking policy."""
    return [play(env, seed) for seed in (1, 2, 3)]


# ------------------------------------------------------------------------------------ making one


def test_the_papers_maps_have_their_sizes_uncompiled():
    envs.known_ids()  # the import of JAX is not what is timed
    started = time.time()
    for env_id, sizes in SIZES.items():
        compiled = [step._cache_size() for step in envs._compile_smax(env_id)[1:]]
        env = envs.make(env_id)
        spec = env.spec
        assert (spec.num_agents, spec.obs_dim, spec.state_dim, spec.action_dim) == sizes
        assert (spec.env_id, spec.backend, spec.discrete) == (env_id, "smax", True)
        assert spec.episode_limit == 101
        assert compiled == [env._reset._cache_size(), env._step._cache_size()]
    assert time.time() - started < 10


def test_the_papers_tasks_come_first_in_the_list():
    known = envs.known_ids()
    assert known[:5] == list(SIZES) and MAP in known and len(set(known)) == len(known)
    assert tuple(known[5:8]) == envs.PAPER_MUJOCO


def test_listing_the_tasks_does_not_load_mujoco(monkeypatch):
    monkeypatch.setattr(mamujoco, "_import_mujoco", None)
    assert set(envs.PAPER_MUJOCO) < set(envs.known_ids())


def test_auto_chooses_the_backend_by_the_name():
    names = {"3s_vs_5z": "smax", "Hopper-3x1": "mamujoco", "zerg_10_vs_11": "smacv2",
             "smacv2_5_units": "smax", "zerg_0_vs_5": "smax"}  # fmt: skip
    assert {n: envs.natural_backend(n) for n in names} == names
    assert {n: envs.choose_backend(n) for n in names} == names
    assert envs.choose_backend(MAP, "smac") == "smac"
    for wrong in ("mamujoco", "smacv2"):
        with pytest.raises(ValueError, match=f"Backend {wrong} cannot play '{MAP}'"):
            envs.choose_backend(MAP, wrong)


def test_wrong_arguments_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match="Unknown env_id '3s_vs_5x'.*3s_vs_5z, 2s3z.*3m"):
        envs.make("3s_vs_5x")
    with pytest.raises(ValueError, match="Unknown backend 'sc3'.*auto, smax, smac, smacv2, mamuj"):
        envs.make(MAP, backend="sc3")
    for slots in (0, -1):
        with pytest.raises(ValueError, match=f"num_envs is {slots}"):
            envs.make(MAP, num_envs=slots)


# --------------------------------------------------------------------------------------- playing


def same(a: envs.Step, b: envs.Step) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_shapes_and_types_are_those_of_the_interface(env, rounds):
    spec, e = env.spec, SLOTS
    for step in rounds[0]:
        assert step.obs.shape == (e, spec.num_agents, spec.obs_dim)
        assert step.state.shape == (e, spec.state_dim)
        assert step.avail.shape == (e, spec.num_agents, spec.action_dim)
        assert {step.obs.dtype, step.state.dtype, step.avail.dtype} == {np.dtype(np.float32)}
        assert step.reward.shape == step.terminated.shape == step.done.shape == (e,)
        assert set(np.unique(step.avail)) <= {0.0, 1.0} and step.avail.any(-1).all()
        assert np.isfinite(step.obs).all() and np.isfinite(step.state).all()


def test_the_seed_determines_the_episode(env, rounds):
    again = play(env, seed=1)
    assert len(again) == len(rounds[0])
    assert all(same(a, b) for a, b in zip(again, rounds[0], strict=True))
    assert not np.array_equal(rounds[0][0].state, rounds[1][0].state)
    assert len({slot.tobytes() for slot in rounds[0][0].state}) == SLOTS


def test_a_reset_without_a_seed_takes_the_next_one(env):
    env.reset(seed=40)
    assert same(env.reset(), env.reset(seed=41)) and same(env.reset(), env.reset(seed=42))
    fresh = envs.make(MAP, num_envs=SLOTS, seed=40)
    assert same(fresh.reset(), env.reset(seed=40))


def test_no_observation_determines_the_state(single):
    now = single.reset(seed=1)  # the armies do not see each other yet
    wait = attack(torch.tensor(now.obs), torch.tensor(now.avail)).numpy()
    plain = single.step(wait)
    single.reset(seed=1)
    key, state = single._carry
    enemy = single.spec.num_agents  # the first unit after the allies
    wounded = state.state.unit_health.at[:, enemy].multiply(0.5)
    single._carry = (key, state.replace(state=state.state.replace(unit_health=wounded)))
    other = single.step(wait)
    assert np.array_equal(plain.obs, other.obs)  # no agent, nor all of them together, can tell
    assert (plain.state != other.state).sum() == 1


def test_an_episode_does_not_depend_on_the_others(env, single, rounds):
    alone = play(single, seed=1)
    for a, b in zip(alone[:-1], rounds[0], strict=False):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y[:1], rtol=1e-6, atol=1e-6)
    assert alone[-1].done.all() and rounds[0][len(alone) - 2].done[0]


def test_finished_episodes_stand_still_and_pay_nothing(rounds):
    stood = 0
    for steps in rounds:
        for before, after in zip(steps, steps[1:], strict=False):
            done = before.done
            stood += int(done.sum() * (not done.all()))
            assert after.done[done].all()
            assert not (after.terminated | after.truncated | after.won)[done].any()
            assert (after.reward[done] == 0).all()
            for name in ("obs", "state", "avail"):
                x, y = getattr(before, name), getattr(after, name)
                assert np.array_equal(x[done], y[done])
            for k in np.flatnonzero(~done):
                assert not np.array_equal(before.state[k], after.state[k])
    assert stood > 0


def test_an_episode_ends_once_and_stays_done(rounds):
    for steps in rounds:
        ends = np.stack([s.terminated | s.truncated for s in steps])
        assert (ends.sum(0) == 1).all()
        assert np.array_equal(np.stack([s.done for s in steps]), ends.cumsum(0) > 0)
        assert all((s.terminated | ~s.won).all() for s in steps)


def test_a_win_pays_twenty_and_a_defeat_at_most_ten(rounds):
    returns = np.concatenate([np.sum([s.reward for s in steps], 0) for steps in rounds])
    won = np.concatenate([np.any([s.won for s in steps], 0) for steps in rounds])
    assert won.any() and not won.all()
    np.testing.assert_allclose(returns[won], 20.0, atol=1e-3)
    assert (returns[~won] <= 10.0 + 1e-3).all() and (returns >= 0).all()


def test_the_time_limit_truncates_and_does_not_terminate(env):
    limit = env.spec.episode_limit
    now = env.reset(seed=1)
    advance_clock(env, np.where(np.arange(SLOTS) % 2, limit - 2, 0))
    act = attack(torch.tensor(now.obs), torch.tensor(now.avail)).numpy()
    first, second, third = env.step(act), env.step(act), env.step(act)
    late = np.arange(SLOTS) % 2 == 1
    assert not (first.done | first.truncated | first.terminated).any()
    assert np.array_equal(second.truncated, late) and np.array_equal(second.done, late)
    assert not (second.terminated | second.won | third.truncated | third.terminated).any()
    assert np.array_equal(third.done, late) and (third.reward[late] == 0).all()


def test_a_win_at_the_time_limit_terminates(env, rounds):
    steps = rounds[0]
    length = np.stack([~s.done for s in steps]).sum(0)  # steps until each slot's end
    env.reset(seed=1)
    advance_clock(env, env.spec.episode_limit - length)
    for before, expected in zip(steps[:-1], steps[1:], strict=True):
        now = env.step(attack(torch.tensor(before.obs), torch.tensor(before.avail)).numpy())
        assert np.array_equal(now.terminated, expected.terminated) and not now.truncated.any()
        assert np.array_equal(now.won, expected.won)


# ------------------------------------------------------------------------------------ evaluation


def test_evaluate_plays_whole_rounds_and_returns_their_mean(env):
    result = envs.evaluate(env, attack, episodes=SLOTS + 2, seed=1)
    returns, won = [], []
    for seed in (1, 2):  # ten episodes need two rounds of eight
        steps = play(env, seed)
        returns += np.sum([s.reward for s in steps], 0).tolist()
        won += np.any([s.won for s in steps], 0).tolist()
    assert result["episodes"] == len(returns) == 2 * SLOTS
    assert result["return_mean"] == pytest.approx(np.mean(returns), rel=1e-6)
    assert result["win_rate"] == np.mean(won)
    half_width = 1.96 * np.std(returns, ddof=1) / np.sqrt(2 * SLOTS)
    assert result["return_ci95"] == pytest.approx(half_width, rel=1e-6) and half_width > 0


def test_evaluate_of_a_single_episode_claims_no_interval(single):
    result = envs.evaluate(single, attack, episodes=1, seed=1)
    assert result["episodes"] == 1 and result["return_ci95"] == 0.0


def test_the_random_policy_is_uniform_over_available(env):
    avail = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 0, 0]]).float().expand(4000, 2, 5)
    actions = envs.random_policy(env.spec, seed=0)(torch.zeros(4000, 2, 3), avail)
    assert (actions.sum(-1) == 1).all() and (actions * (1 - avail)).sum() == 0
    counts = actions[:, 0].sum(0)[avail[0, 0] == 1]
    assert scipy.stats.chisquare(counts.double()).pvalue > 1e-3


def test_the_random_policy_is_uniform_over_motors():
    spec = envs.Spec("Hopper-3x1", "mamujoco", 3, 9, 11, 2, False, 1000)
    actions = envs.random_policy(spec, seed=0)(torch.zeros(4000, 3, 9), None)
    assert actions.shape == (4000, 3, 2) and actions.dtype == torch.float32
    flat = actions.flatten().double()
    assert scipy.stats.kstest(flat, scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert not torch.equal(actions, envs.random_policy(spec, 1)(torch.zeros(4000, 3, 9), None))


def test_render_draws_a_picture_of_the_battle(single):
    now = single.reset(seed=1)
    start = single.render()
    assert start.ndim == 3 and start.shape[-1] == 3 and start.dtype == np.uint8
    assert start.shape[0] > 100 and start.shape[1] > 100 and start.std() > 5
    for _ in range(4):
        now = single.step(attack(torch.tensor(now.obs), torch.tensor(now.avail)).numpy())
    later = single.render()
    assert later.shape == start.shape and not np.array_equal(later, start)


# ------------------------------------------------------------------------------ against JaxMARL


@functools.cache
def plain_environment():
    """JaxMARL's own environment, made once, because JAX compiles its methods anew for each."""
    _, environment, scenario, _ = envs._import_smax()
    return environment(
        scenario=scenario(MAP), enemy_shoots=True, see_enemy_actions=True, walls_cause_death=True,
        attack_mode="closest",
    )  # fmt: skip


def play_plainly(seed: int, slot: int, clock: int) -> tuple[float, int, bool]:
    """(return, steps, won) of an episode of JaxMARL's own environment whose allies stand still."""
    jax, env = envs._import_smax().jax, plain_environment()
    key, start = jax.random.split(jax.random.fold_in(jax.random.PRNGKey(seed), slot))
    _, state = env.reset(start)
    state = state.replace(state=state.state.replace(step=jax.numpy.array(clock)))
    total, steps, dones = 0.0, 0, {"__all__": False}
    while not dones["__all__"]:
        key, sub = jax.random.split(key)
        stop = {agent: jax.numpy.array(4) for agent in env.agents}
        _, state, reward, dones, _ = env.step_env(sub, state, stop)
        total, steps = total + float(reward[env.agents[0]]), steps + 1
    enemies = state.state.unit_alive[env.num_allies :]
    return 10 * total, steps, not bool(enemies.any())


@pytest.mark.parametrize("clock", [0, 90, 100])
def test_episodes_are_those_of_a_plain_jaxmarl_loop(env, clock):
    env.reset(seed=3)
    advance_clock(env, np.full(SLOTS, clock))
    stop = np.eye(env.spec.action_dim)[np.full((SLOTS, env.spec.num_agents), 4)]
    total, steps, won = np.zeros(SLOTS), np.zeros(SLOTS, int), np.zeros(SLOTS, bool)
    done = np.zeros(SLOTS, bool)
    while not done.all():
        steps += ~done
        now = env.step(stop)
        total, won, done = total + now.reward, won | now.won, now.done
    for slot in range(3):
        expected = play_plainly(3, slot, clock)
        assert (total[slot], steps[slot], won[slot]) == pytest.approx(expected, abs=1e-4)
    if clock:
        assert (steps == 101 - clock).all()  # nobody has died by then


def test_what_smac_does_not_show_is_left_out():
    shown, everything = envs.make(MAP), envs.make(MAP, hide=False)
    all_names = [*shown._env.unit_features] * 5 + [
        *shown._env.own_features
    ]  # two allies, 3 enemies
    assert len(all_names) == everything.spec.obs_dim
    kept = [all_names[k] for k in shown.columns]
    assert kept[:9] == ["health", "position_x", "position_y"] + [
        f"unit_type_bits_{k}" for k in range(6)
    ]
    assert kept[-10:] == shown._env.own_features  # its own cooldown is an agent's to know
    a, b = shown.reset(seed=1), everything.reset(seed=1)
    assert np.array_equal(a.obs, b.obs[..., shown.columns])


def test_a_snapshot_goes_on_from_the_same_state(env):
    env.reset(seed=5)
    stop = np.eye(env.spec.action_dim)[np.full((SLOTS, env.spec.num_agents), 4)]
    for _ in range(3):
        env.step(stop)
    kept = env.snapshot()
    now = env.step(stop)
    env.restore(kept, seed=0)
    again = env.step(stop)
    np.testing.assert_allclose(again.state, now.state, atol=0.5)  # the randomness is another
    env.restore(kept, seed=0)
    assert np.array_equal(env.step(stop).state, again.state)
