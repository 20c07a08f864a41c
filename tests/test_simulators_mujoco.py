"""Multi-Agent MuJoCo behind the interface of envs.py.

Sizes are compared with gymnasium-robotics 1.4.2, steps with Gymnasium's and gymnasium-robotics' own
environments.
"""

import importlib.util
import types

import numpy as np
import pytest

import envs
from simulators import mamujoco

ROBOTS = {  # task: agents, longest observation, state, longest action
    "Hopper-3x1": (3, 9, 11, 1),
    "Ant-2x4": (2, 63, 105, 4),
    "Ant-4x2": (4, 42, 105, 2),
    "HalfCheetah-6x1": (6, 9, 17, 1),
    "HalfCheetah-2x3": (2, 12, 17, 3),
}
missing = importlib.util.find_spec("gymnasium_robotics") is None
needs_robots = pytest.mark.skipif(missing, reason="needs gymnasium-robotics and mujoco")


def roll(env, seed: int, steps: int, scale: float = 1.0) -> list[envs.Step]:
    """The reset and `steps` steps of random actions, the same ones for slot k in every call."""
    spec, now = env.spec, [env.reset(seed)]
    rng = [np.random.default_rng(k) for k in range(env.num_envs)]
    for _ in range(steps):
        actions = [g.uniform(-scale, scale, (spec.num_agents, spec.action_dim)) for g in rng]
        now.append(env.step(np.array(actions)))
    return now


def same(a: envs.Step, b: envs.Step) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def theirs(env_id: str):
    """gymnasium-robotics' own environment of this task."""
    robot, _, division = env_id.partition("-")
    return mamujoco._import_mujoco()[1].parallel_env(robot, division)


@needs_robots
@pytest.mark.parametrize("env_id", ROBOTS)
def test_robot_task_has_its_sizes_and_the_interface(env_id):
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
        assert now.reward.shape == now.done.shape == (2,) and not now.won.any()


def test_listing_the_tasks_does_not_load_mujoco(monkeypatch):
    monkeypatch.setattr(mamujoco, "_import_mujoco", None)
    assert set(envs.PAPER_MUJOCO) < set(envs.known_ids())


@needs_robots
def test_unknown_partition_is_refused():
    for env_id in ("Hopper-2x2", "HalfCheetah-3x2", "Ant"):
        with pytest.raises(
            ValueError, match=f"Unknown env_id '{env_id}': .* is divided as .*-[2-6]x[1-4]"
        ):
            envs.make(env_id)
    with pytest.raises(ValueError, match="Unknown env_id 'Cat-2x2'.*robots are Hopper"):
        mamujoco.partition("Cat-2x2")


@needs_robots
def test_episode_is_determined_by_its_seed():
    env = envs.make("Ant-2x4", num_envs=2)
    first, again = roll(env, 1, steps=20), roll(env, 1, steps=20)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0].state, roll(env, 2, steps=0)[0].state)
    env.reset(seed=40)
    assert np.array_equal(env.reset().state, env.reset(seed=41).state)


@needs_robots
def test_slot_does_not_depend_on_the_number_of_slots():
    three, five = (roll(envs.make("Hopper-3x1", e), 7, steps=30) for e in (3, 5))
    for a, b in zip(three, five, strict=True):
        for name in ("obs", "state", "reward", "terminated", "done"):
            assert np.array_equal(getattr(a, name), getattr(b, name)[:3])


@needs_robots
def test_slot_equals_gymnasiums_environment():
    steps, k = roll(envs.make("Hopper-3x1", 3), 7, steps=200), 2
    single = mamujoco._import_mujoco()[0].make("Hopper-v5")
    seed = int(np.random.SeedSequence((7, k)).generate_state(1)[0])
    (state, _), rng = single.reset(seed=seed), np.random.default_rng(k)
    np.testing.assert_array_equal(steps[0].state[k], state.astype(np.float32))
    for now in steps[1 : [s.done[k] for s in steps].index(True) + 1]:
        state, reward, fallen, *_ = single.step(rng.uniform(-1, 1, (3, 1))[:, 0])
        np.testing.assert_array_equal(now.state[k], state.astype(np.float32))
        assert now.reward[k] == np.float32(reward) and now.terminated[k] == fallen
    assert fallen


@needs_robots
def test_time_limit_truncates_and_does_not_terminate():
    env = envs.make("HalfCheetah-6x1", num_envs=2)
    steps = roll(env, 1, steps=1001, scale=0.1)
    assert not any((s.terminated | s.won).any() for s in steps)
    assert [s.truncated.all() for s in steps].index(True) == 1000 and steps[1000].done.all()
    assert sum(s.truncated.sum() for s in steps) == 2
    assert not steps[999].done.any() and (steps[1000].reward != 0).all()
    last = steps[1001]
    assert (last.reward == 0).all() and np.array_equal(last.state, steps[1000].state)


@needs_robots
def test_fall_terminates_and_others_go_on():
    steps = roll(envs.make("Hopper-3x1", num_envs=4), 1, steps=200)
    ends = np.stack([s.terminated for s in steps])
    assert (ends.sum(0) == 1).all() and not any(s.truncated.any() for s in steps)
    assert np.array_equal(np.stack([s.done for s in steps]), ends.cumsum(0) > 0)
    assert len(set(ends.argmax(0))) > 1, "all robots fell at the same step"
    for before, after in zip(steps, steps[1:], strict=False):
        done = before.done
        assert (after.reward[done] == 0).all()
        assert np.array_equal(after.state[done], before.state[done])
        assert (after.state[~done] != before.state[~done]).any(-1).all()


@needs_robots
@pytest.mark.parametrize("env_id", ROBOTS)
def test_agents_together_see_the_whole_state(env_id):
    parts, size = mamujoco.partition(env_id), ROBOTS[env_id][2]
    seen = [set(row) - {size} for row in parts.obs_index]
    assert set.union(*seen) == set(range(size))
    state = np.random.default_rng(0).normal(size=size)
    for i, columns in enumerate(seen):
        assert len(columns) < size
        hidden = sorted(set(range(size)) - columns)
        other = state.copy()
        other[hidden] += 1  # another state, which agent i cannot tell apart
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
            # The state is clipped (Hopper's velocities to 10, Ant's contact forces to 1), the
            # observations of gymnasium-robotics are not.
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
        if now.done[0]:
            break
    reference.close()


@needs_robots
@pytest.mark.parametrize("env_id", ROBOTS)
def test_actions_reach_the_motors_of_their_agents(env_id):
    env, reference = envs.make(env_id), theirs(env_id)
    actions = np.random.default_rng(0).uniform(-1, 1, (1, *env.partition.action_index.shape))
    told = {a: actions[0, i] for i, a in enumerate(reference.possible_agents)}
    joint = reference.map_local_actions_to_global_action(told)
    np.testing.assert_array_equal(env.partition.join(actions)[0], joint)
    np.testing.assert_array_equal(env.partition.split(joint), actions[0])
    env.reset(seed=1)
    env.step(actions)
    ctrl = env.robots[0].unwrapped.data.ctrl
    np.testing.assert_allclose(ctrl, joint * env.robots[0].action_space.high)
    reference.close()


@needs_robots
def test_join_inverts_split_for_agents_of_unequal_size():
    parts = mamujoco.partition("Humanoid-9|8")
    assert parts.action_index.shape == (2, 9) and parts.motors == 17
    joint = np.random.default_rng(0).normal(size=(5, 4, 17))
    split = parts.split(joint)
    assert split.shape == (5, 4, 2, 9) and np.array_equal(parts.join(split), joint)
    padded = parts.action_index == parts.motors
    assert padded.sum() == 1 and (split[..., padded] == 0).all()
    split[..., padded] = 7.0  # actions in the padding are ignored
    assert np.array_equal(parts.join(split), joint)


@needs_robots
def test_actions_are_clipped_and_scaled_by_motor_strength():
    pushed, full = (envs.make("HalfCheetah-2x3") for _ in range(2))
    for env in (pushed, full):
        env.reset(seed=1)
    sign = np.array([[[1, -1, 1], [-1, 1, -1]]])
    a, b = pushed.step(5.0 * sign), full.step(1.0 * sign)
    assert np.array_equal(a.state, b.state) and a.reward == b.reward
    humanoid = envs.make("Humanoid-9|8")  # its motors have strength 0.4
    humanoid.reset(seed=1)
    humanoid.step(np.ones((1, 2, 9)))
    assert np.allclose(humanoid.robots[0].unwrapped.data.ctrl, 0.4)


@needs_robots
def test_evaluate_of_robots_has_no_win_rate():
    env = envs.make("Hopper-3x1", num_envs=3)
    act = envs.random_policy(env.spec, seed=0)
    result = envs.evaluate(env, act, episodes=5, seed=1)
    assert result["episodes"] == 6 and result["win_rate"] is None
    assert 1 < result["return_mean"] < 100 and result["return_ci95"] > 0
    again = envs.evaluate(env, envs.random_policy(env.spec, seed=0), episodes=5, seed=1)
    assert again == result


@needs_robots
def test_render_must_be_prepared_and_needs_opengl(monkeypatch):
    plain = envs.make("Hopper-3x1")
    plain.reset(seed=1)
    with pytest.raises(ValueError, match=r"need envs.make\(..., render=True\)"):
        plain.render()
    env = envs.make("Hopper-3x1", num_envs=2, render=True)
    assert [e.render_mode for e in env.robots] == ["rgb_array", None]
    env.reset(seed=1)

    def fails():
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    env.robots[0] = types.SimpleNamespace(render=fails, render_mode="rgb_array")
    with pytest.raises(OSError, match="cannot draw off screen here.*libegl1"):
        env.render()


@needs_robots
def test_render_draws_the_robot():
    env = envs.make("HalfCheetah-6x1", render=True)
    env.reset(seed=1)
    try:
        start = env.render()
    except OSError as e:
        pytest.skip(str(e))
    assert (
        start.shape == (mamujoco.SIDE, mamujoco.SIDE, 3)
        and start.dtype == np.uint8
        and start.std() > 5
    )
    for _ in range(20):
        env.step(np.ones((1, 6, 1)))
    assert not np.array_equal(env.render(), start)
    env.close()
