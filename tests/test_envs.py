"""SMAX and Multi-Agent MuJoCo behind the vectorised interface (StarCraft II: test_smac.py).

Sizes against tables measured in JaxMARL 0.2.0 and gymnasium-robotics 1.4.2; episodes against the
interface's promises. All battles are on the small map 3m, compiled once for 1 and once for 8 slots.
"""

import importlib.util
import time
import types

import numpy as np
import pytest
import robots
import scipy.stats
import torch

import envs

MAP, SLOTS = "3m", 8
SIZES = {  # map: agents, observation, state, actions
    "3s_vs_5z": (3, 101, 96, 10),
    "2s3z": (5, 127, 120, 10),
    "5m_vs_6m": (5, 140, 132, 11),
    "6h_vs_8z": (6, 179, 168, 13),
    "3s5z_vs_3s6z": (8, 218, 204, 14),
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
    while not steps[-1].over.all():
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


def test_the_papers_maps_have_their_sizes_without_compiling_anything():
    envs.known_ids()  # the import of JAX is not what is timed
    started = time.time()
    for env_id, sizes in SIZES.items():
        compiled = [step._cache_size() for step in envs._compile_smax(env_id)[1:]]
        env = envs.make(env_id)
        spec = env.spec
        assert (spec.num_agents, spec.obs_dim, spec.state_dim, spec.action_dim) == sizes
        assert (spec.env_id, spec.backend, spec.discrete) == (env_id, "smax", True)
        assert spec.episode_limit == 100
        assert compiled == [env._reset._cache_size(), env._step._cache_size()]
    assert time.time() - started < 10


def test_the_papers_maps_come_first_in_the_list_and_no_map_comes_twice():
    known = envs.known_ids()
    assert known[:5] == list(SIZES) and MAP in known and len(set(known)) == len(known)
    assert tuple(known[5:8]) == envs.PAPER_MUJOCO


def test_listing_the_tasks_does_not_load_mujoco(monkeypatch):
    monkeypatch.setattr(robots, "_import_mujoco", None)
    assert set(envs.PAPER_MUJOCO) < set(envs.known_ids())


def test_auto_goes_by_the_name():
    names = {"3s_vs_5z": "smax", "Hopper-3x1": "mamujoco", "zerg_10_vs_11": "smacv2",
             "smacv2_5_units": "smax", "zerg_0_vs_5": "smax"}  # fmt: skip
    assert {n: envs.natural_backend(n) for n in names} == names


def test_wrong_arguments_are_refused_with_what_would_be_right():
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
        assert step.reward.shape == step.terminated.shape == step.over.shape == (e,)
        assert set(np.unique(step.avail)) <= {0.0, 1.0} and step.avail.any(-1).all()
        assert np.isfinite(step.obs).all() and np.isfinite(step.state).all()


def test_the_same_seed_gives_the_same_battle_and_another_seed_another(env, rounds):
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


def test_a_slots_battle_does_not_depend_on_how_many_run_beside_it(env, single, rounds):
    alone = play(single, seed=1)
    for a, b in zip(alone[:-1], rounds[0], strict=False):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y[:1], rtol=1e-6, atol=1e-6)
    assert alone[-1].over.all() and rounds[0][len(alone) - 2].over[0]


def test_finished_slots_stand_still_and_pay_nothing_while_the_others_go_on(rounds):
    stood = 0
    for steps in rounds:
        for before, after in zip(steps, steps[1:], strict=False):
            done = before.over
            stood += int(done.sum() * (not done.all()))
            assert after.over[done].all()
            assert not (after.terminated | after.truncated | after.won)[done].any()
            assert (after.reward[done] == 0).all()
            for name in ("obs", "state", "avail"):
                x, y = getattr(before, name), getattr(after, name)
                assert np.array_equal(x[done], y[done])
            for k in np.flatnonzero(~done):
                assert not np.array_equal(before.state[k], after.state[k])
    assert stood > 0


def test_an_episode_ends_exactly_once_and_over_says_since_when(rounds):
    for steps in rounds:
        ends = np.stack([s.terminated | s.truncated for s in steps])
        assert (ends.sum(0) == 1).all()
        assert np.array_equal(np.stack([s.over for s in steps]), ends.cumsum(0) > 0)
        assert all((s.terminated | ~s.won).all() for s in steps)


def test_a_won_battle_pays_twenty_and_a_lost_one_at_most_ten(rounds):
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
    assert not (first.over | first.truncated | first.terminated).any()
    assert np.array_equal(second.truncated, late) and np.array_equal(second.over, late)
    assert not (second.terminated | second.won | third.truncated | third.terminated).any()
    assert np.array_equal(third.over, late) and (third.reward[late] == 0).all()


def test_a_battle_decided_at_the_last_moment_is_terminated_and_not_truncated(env, rounds):
    steps = rounds[0]
    length = np.stack([~s.over for s in steps]).sum(0)  # steps until each slot's end
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


def test_the_random_policy_is_uniform_over_what_may_be_done(env):
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


# --------------------------------------------------------------------------- Multi-Agent MuJoCo

ROBOTS = {  # task: agents, longest observation, state, longest action
    "Hopper-3x1": (3, 9, 11, 1),
    "Ant-2x4": (2, 63, 105, 4),
    "Ant-4x2": (4, 42, 105, 2),
    "HalfCheetah-6x1": (6, 9, 17, 1),
    "HalfCheetah-2x3": (2, 12, 17, 3),
}
missing = importlib.util.find_spec("gymnasium_robotics") is None
needs_robots = pytest.mark.skipif(missing, reason="needs gymnasium-robotics and mujoco (README)")


def roll(env, seed: int, steps: int, scale: float = 1.0) -> list[envs.Step]:
    """The reset and `steps` steps of random play; slot k is always told the same."""
    spec, now = env.spec, [env.reset(seed)]
    rng = [np.random.default_rng(k) for k in range(env.num_envs)]
    for _ in range(steps):
        actions = [g.uniform(-scale, scale, (spec.num_agents, spec.action_dim)) for g in rng]
        now.append(env.step(np.array(actions)))
    return now


def theirs(env_id: str):
    """gymnasium-robotics' own environment of this task."""
    robot, _, division = env_id.partition("-")
    return robots._import_mujoco()[1].parallel_env(robot, division)


@needs_robots
@pytest.mark.parametrize("env_id", ROBOTS)
def test_a_robots_task_has_its_sizes_and_its_interface(env_id):
    env = envs.make(env_id, num_envs=2)
    spec = env.spec
    assert (spec.num_agents, spec.obs_dim, spec.state_dim, spec.action_dim) == ROBOTS[env_id]
    assert (spec.env_id, spec.backend, spec.discrete) == (env_id, "mamujoco", False)
    assert spec.episode_limit == 1000
    for now in roll(env, seed=1, steps=2):
        assert now.obs.shape == (2, spec.num_agents, spec.obs_dim) and now.avail is None
        assert now.state.shape == (2, spec.state_dim)
        assert now.obs.dtype == now.state.dtype == now.reward.dtype == np.float32
        assert now.terminated.dtype == now.truncated.dtype == now.won.dtype == bool
        assert now.reward.shape == now.over.shape == (2,) and not now.won.any()


@needs_robots
def test_robots_that_cannot_be_divided_so_are_refused():
    for env_id in ("Hopper-2x2", "HalfCheetah-3x2", "Ant"):
        with pytest.raises(
            ValueError, match=f"Unknown env_id '{env_id}'.*the paper has Hopper-3x1"
        ):
            envs.make(env_id)
    with pytest.raises(ValueError, match="Unknown env_id 'Cat-2x2'.*robots are Hopper"):
        robots.partition("Cat-2x2")


@needs_robots
def test_the_same_seed_gives_the_same_movement_and_another_seed_another():
    env = envs.make("Ant-2x4", num_envs=2)
    first, again = roll(env, 1, steps=20), roll(env, 1, steps=20)
    assert all(same(a, b) for a, b in zip(first[1:], again[1:], strict=True) if a.avail is None)
    assert not np.array_equal(first[0].state, roll(env, 2, steps=0)[0].state)
    env.reset(seed=40)
    assert np.array_equal(env.reset().state, env.reset(seed=41).state)


@needs_robots
def test_a_robot_does_not_depend_on_how_many_move_beside_it():
    three, five = (roll(envs.make("Hopper-3x1", e), 7, steps=30) for e in (3, 5))
    for a, b in zip(three, five, strict=True):
        for name in ("obs", "state", "reward", "terminated", "over"):
            assert np.array_equal(getattr(a, name), getattr(b, name)[:3])


@needs_robots
def test_a_slot_is_gymnasiums_robot():
    steps, k = roll(envs.make("Hopper-3x1", 3), 7, steps=200), 2
    single = robots._import_mujoco()[0].make("Hopper-v5")
    seed = int(np.random.SeedSequence((7, k)).generate_state(1)[0])
    (state, _), rng = single.reset(seed=seed), np.random.default_rng(k)
    np.testing.assert_array_equal(steps[0].state[k], state.astype(np.float32))
    for now in steps[1 : [s.over[k] for s in steps].index(True) + 1]:
        state, reward, fallen, *_ = single.step(rng.uniform(-1, 1, (3, 1))[:, 0])
        np.testing.assert_array_equal(now.state[k], state.astype(np.float32))
        assert now.reward[k] == np.float32(reward) and now.terminated[k] == fallen
    assert fallen


@needs_robots
def test_a_robots_time_limit_truncates_and_does_not_terminate():
    env = envs.make("HalfCheetah-6x1", num_envs=2)
    steps = roll(env, 1, steps=1001, scale=0.1)
    assert not any((s.terminated | s.won).any() for s in steps)
    assert [s.truncated.all() for s in steps].index(True) == 1000 and steps[1000].over.all()
    assert sum(s.truncated.sum() for s in steps) == 2
    assert not steps[999].over.any() and (steps[1000].reward != 0).all()
    last = steps[1001]
    assert (last.reward == 0).all() and np.array_equal(last.state, steps[1000].state)


@needs_robots
def test_a_fall_terminates_and_the_fallen_lie_still_while_others_hop():
    steps = roll(envs.make("Hopper-3x1", num_envs=4), 1, steps=200)
    ends = np.stack([s.terminated for s in steps])
    assert (ends.sum(0) == 1).all() and not any(s.truncated.any() for s in steps)
    assert np.array_equal(np.stack([s.over for s in steps]), ends.cumsum(0) > 0)
    assert len(set(ends.argmax(0))) > 1, "all fell at the same step"
    for before, after in zip(steps, steps[1:], strict=False):
        done = before.over
        assert (after.reward[done] == 0).all()
        assert np.array_equal(after.state[done], before.state[done])
        assert (after.state[~done] != before.state[~done]).any(-1).all()


@needs_robots
@pytest.mark.parametrize("env_id", ROBOTS)
def test_every_agent_sees_a_part_of_the_state_and_together_they_see_all(env_id):
    parts, size = robots.partition(env_id), ROBOTS[env_id][2]
    seen = [set(row) - {size} for row in parts.obs_index]
    assert set.union(*seen) == set(range(size))
    state = np.random.default_rng(0).normal(size=size)
    for i, columns in enumerate(seen):
        assert len(columns) < size
        hidden = sorted(set(range(size)) - columns)
        other = state.copy()
        other[hidden] += 1  # another state, and agent i cannot tell
        assert np.array_equal(parts.observe(state)[i], parts.observe(other)[i])
        assert not np.array_equal(parts.observe(state), parts.observe(other))


@needs_robots
@pytest.mark.parametrize("env_id", ROBOTS)
def test_observations_are_those_of_gymnasium_robotics(env_id):
    env, reference = envs.make(env_id), theirs(env_id)
    seed = int(np.random.SeedSequence((3, 0)).generate_state(1)[0])
    shown, _ = reference.reset(seed=seed)
    now, rng = env.reset(seed=3), np.random.default_rng(0)
    for _ in range(15):
        mapped = reference.map_global_state_to_local_observations(reference.state())
        for i, agent in enumerate(reference.possible_agents):
            ours, length = now.obs[0, i], len(shown[agent])
            assert (ours[length:] == 0).all()
            np.testing.assert_allclose(ours[:length], mapped[agent], rtol=1e-6, atol=1e-6)
            # The state is clipped (Hopper's velocities to 10, Ant's contact forces to 1), what
            # gymnasium-robotics shows its agents is not.
            bound = {"Hopper": 10, "Ant": 1}.get(env_id.partition("-")[0], np.inf)
            raw, cut = shown[agent], np.clip(shown[agent], -bound, bound)
            near = np.isclose(ours[:length], raw, 1e-6, 1e-6)
            assert (near | np.isclose(ours[:length], cut, 1e-6, 1e-6)).all()
        actions = rng.uniform(-1, 1, (env.spec.num_agents, env.spec.action_dim))
        told = {a: actions[i, : len(reference.action_space(a).low)]
                for i, a in enumerate(reference.possible_agents)}  # fmt: skip
        shown, reward, *_ = reference.step(told)
        now = env.step(actions[None])
        np.testing.assert_allclose(now.reward[0], reward[reference.possible_agents[0]], rtol=1e-5)
        np.testing.assert_allclose(now.state[0], reference.state(), rtol=1e-5, atol=1e-6)
        if now.over[0]:
            break
    reference.close()


@needs_robots
@pytest.mark.parametrize("env_id", ROBOTS)
def test_actions_reach_the_motors_that_gymnasium_robotics_names(env_id):
    env, reference = envs.make(env_id), theirs(env_id)
    actions = np.random.default_rng(0).uniform(-1, 1, (1, *env.partition.action_index.shape))
    told = {a: actions[0, i] for i, a in enumerate(reference.possible_agents)}
    joint = reference.map_local_actions_to_global_action(told)
    np.testing.assert_array_equal(env.partition.join(actions)[0], joint)
    np.testing.assert_array_equal(env.partition.split(joint), actions[0])
    env.reset(seed=1)
    env.step(actions)
    ctrl = env._envs[0].unwrapped.data.ctrl
    np.testing.assert_allclose(ctrl, joint * env._envs[0].action_space.high)
    reference.close()


@needs_robots
def test_split_and_join_undo_each_other_where_agents_have_unlike_many_motors():
    parts = robots.partition("Humanoid-9|8")
    assert parts.action_index.shape == (2, 9) and parts.motors == 17
    joint = np.random.default_rng(0).normal(size=(5, 4, 17))
    split = parts.split(joint)
    assert split.shape == (5, 4, 2, 9) and np.array_equal(parts.join(split), joint)
    padded = parts.action_index == parts.motors
    assert padded.sum() == 1 and (split[..., padded] == 0).all()
    split[..., padded] = 7.0  # what a policy says there reaches nothing
    assert np.array_equal(parts.join(split), joint)


@needs_robots
def test_actions_beyond_one_are_cut_and_scaled_by_the_motors_strength():
    pushed, full = (envs.make("HalfCheetah-2x3") for _ in range(2))
    for env in (pushed, full):
        env.reset(seed=1)
    sign = np.array([[[1, -1, 1], [-1, 1, -1]]])
    a, b = pushed.step(5.0 * sign), full.step(1.0 * sign)
    assert np.array_equal(a.state, b.state) and a.reward == b.reward
    humanoid = envs.make("Humanoid-9|8")  # its motors have strength 0.4
    humanoid.reset(seed=1)
    humanoid.step(np.ones((1, 2, 9)))
    assert np.allclose(humanoid._envs[0].unwrapped.data.ctrl, 0.4)


@needs_robots
def test_evaluate_of_robots_has_returns_and_no_wins():
    env = envs.make("Hopper-3x1", num_envs=3)
    act = envs.random_policy(env.spec, seed=0)
    result = envs.evaluate(env, act, episodes=5, seed=1)
    assert result["episodes"] == 6 and result["win_rate"] is None
    assert 1 < result["return_mean"] < 100 and result["return_ci95"] > 0
    again = envs.evaluate(env, envs.random_policy(env.spec, seed=0), episodes=5, seed=1)
    assert again == result


@needs_robots
def test_a_picture_of_a_robot_must_be_asked_for_and_needs_opengl(monkeypatch):
    plain = envs.make("Hopper-3x1")
    plain.reset(seed=1)
    with pytest.raises(ValueError, match=r"need make\(..., render=True\)"):
        plain.render()
    env = envs.make("Hopper-3x1", num_envs=2, render=True)
    assert [e.render_mode for e in env._envs] == ["rgb_array", None]
    env.reset(seed=1)

    def fails():
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    env._envs[0] = types.SimpleNamespace(render=fails, render_mode="rgb_array")
    with pytest.raises(OSError, match="draws nothing off screen here.*libegl1"):
        env.render()


@needs_robots
def test_a_robot_is_drawn_where_opengl_is():
    env = envs.make("HalfCheetah-6x1", render=True)
    env.reset(seed=1)
    try:
        start = env.render()
    except OSError as e:
        pytest.skip(str(e))
    assert start.shape == (480, 480, 3) and start.dtype == np.uint8 and start.std() > 5
    for _ in range(20):
        env.step(np.ones((1, 6, 1)))
    assert not np.array_equal(env.render(), start)
    env.close()
