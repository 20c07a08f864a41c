"""Multi-Agent MuJoCo as an environment of envs.py: a robot's joints, divided among agents.

  make("HalfCheetah-6x1", num_envs=20)

Gymnasium simulates the robots, gymnasium-robotics says how they are divided. The divisions also
serve to divide other people's recordings of whole robots (omiga.py, formats.py).

Sizes: E parallel episodes, N agents, O observation, S state, A motors of an agent.
"""

import contextlib
import functools
import io
import os
import sys
import warnings
from typing import NamedTuple

import numpy as np

from envs import MUJOCO_ROBOTS, PAPER_MUJOCO, Spec, Step


class Partition(NamedTuple):
    """Which parts of a robot's state and which of its motors belong to which agent.

    Ragged agents are padded: an index past the end reads a zero, and writes nowhere.
    """

    obs_index: np.ndarray  # (N,O) columns of the state that each agent sees
    action_index: np.ndarray  # (N,A) motors that each agent drives
    motors: int  # of the whole robot

    def observe(self, state: np.ndarray) -> np.ndarray:
        """(...,S) -> (...,N,O): what each agent sees of this state."""
        padding = np.zeros((*state.shape[:-1], 1), state.dtype)
        return np.concatenate([state, padding], -1)[..., self.obs_index]

    def split(self, joint: np.ndarray) -> np.ndarray:
        """(...,motors) -> (...,N,A): the robot's action, agent by agent."""
        padding = np.zeros((*joint.shape[:-1], 1), joint.dtype)
        return np.concatenate([joint, padding], -1)[..., self.action_index]

    def join(self, actions: np.ndarray) -> np.ndarray:
        """(...,N,A) -> (...,motors): the inverse of `split`."""
        joint = np.zeros((*actions.shape[:-2], self.motors + 1), actions.dtype)
        joint[..., self.action_index] = actions
        return joint[..., : self.motors]


@functools.cache
def _import_mujoco() -> tuple:
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            import gymnasium
            from gymnasium_robotics import mamujoco_v1  # warns of hands that nobody asked for
    except ImportError as e:
        raise ImportError(
            "Multi-Agent MuJoCo needs pip install gymnasium-robotics 'mujoco>=3.3,<3.5' (README)"
        ) from e
    except AttributeError as e:  # what PyOpenGL raises for a library that is not there
        raise OSError(
            f"MuJoCo does not load with MUJOCO_GL={os.environ.get('MUJOCO_GL')}: that kind of "
            "OpenGL is missing here; unset MUJOCO_GL."
        ) from e
    return gymnasium, mamujoco_v1


@functools.cache
def partition(env_id: str) -> Partition:
    """The partition of a task such as HalfCheetah-6x1, as gymnasium-robotics defines it.

    Agents see their own joints, the positions of the next joint, and the torso: no agent sees all.

    Raises:
        ValueError: no such robot, or the robot is not divided like this.
    """
    gymnasium, mamujoco = _import_mujoco()
    robot, _, division = env_id.partition("-")
    if robot not in MUJOCO_ROBOTS:
        raise ValueError(f"Unknown env_id {env_id!r}: robots are {', '.join(MUJOCO_ROBOTS)}.")
    try:
        env = mamujoco.parallel_env(robot, division)
    except Exception as e:  # gymnasium-robotics raises a bare Exception
        if "UNKNOWN partitioning" not in str(e):
            raise
        raise ValueError(
            f"Unknown env_id {env_id!r}: gymnasium-robotics does not divide {robot} by "
            f"{division!r}; the paper has {', '.join(PAPER_MUJOCO)}."
        ) from e
    single = env.single_agent_env
    size, motors = single.observation_space.shape[0], single.action_space.shape[0]

    def padded(rows: list, value: int) -> np.ndarray:
        longest = max(map(len, rows))
        return np.array([[*row, *[value] * (longest - len(row))] for row in rows])

    sees = [list(env.observation_factorization[a]) for a in env.possible_agents]
    drives = [[joint.act_ids for joint in part] for part in env.agent_action_partitions]
    env.close()
    return Partition(padded(sees, size), padded(drives, motors), motors)


class MamujocoEnv:
    """E parallel robots, each driven by N agents: Gymnasium's v5 tasks, divided by `partition`.

    The state is the robot's own observation (clipped as Gymnasium clips it), and each agent's
    observation is some columns of it, zero-padded to the longest. Actions are in [-1,1] for every
    motor, of whatever strength; what lies beyond is cut off. The reward is Gymnasium's, unscaled.
    An episode is terminated where the robot falls (HalfCheetah cannot), truncated after 1000 steps.
    """

    def __init__(self, env_id: str, num_envs: int, seed: int, render: bool = False):
        gymnasium, _ = _import_mujoco()
        self.partition, self._seed, self.num_envs = partition(env_id), seed, num_envs
        if render and sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")  # the kind of OpenGL that needs no display
        modes = ["rgb_array" if render and k == 0 else None for k in range(num_envs)]
        task = f"{env_id.partition('-')[0]}-v5"
        self._envs = [gymnasium.make(task, render_mode=m, disable_env_checker=True) for m in modes]
        self._strength = self._envs[0].action_space.high  # (motors,)
        (n, o), a = self.partition.obs_index.shape, self.partition.action_index.shape[1]
        self.spec = Spec(
            env_id=env_id,
            backend="mamujoco",
            num_agents=n,
            obs_dim=o,
            state_dim=self._envs[0].observation_space.shape[0],
            action_dim=a,
            discrete=False,
            episode_limit=self._envs[0].spec.max_episode_steps,
        )

    def reset(self, seed: int | None = None) -> Step:
        """Start a fresh episode in every slot; without a seed, the next one in this env's order."""
        if seed is not None:
            self._seed = seed
        self._state = np.zeros((self.num_envs, self.spec.state_dim), np.float32)
        for k, env in enumerate(self._envs):
            start = np.random.SeedSequence((self._seed, k)).generate_state(1)[0]
            self._state[k], _ = env.reset(seed=int(start))
        self._seed += 1
        self._over = np.zeros(self.num_envs, bool)
        nothing = np.zeros(self.num_envs, bool)
        return self._show(np.zeros(self.num_envs, np.float32), nothing, nothing)

    def step(self, actions: np.ndarray) -> Step:
        """Advance every unfinished episode by one step; actions (E,N,A) in [-1,1]."""
        joint = self.partition.join(np.asarray(actions, np.float64)).clip(-1, 1) * self._strength
        reward = np.zeros(self.num_envs, np.float32)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        for k in np.flatnonzero(~self._over):
            seen, reward[k], terminated[k], timeout, _ = self._envs[k].step(joint[k])
            self._state[k], truncated[k] = seen, timeout and not terminated[k]
        self._over = self._over | terminated | truncated
        return self._show(reward, terminated, truncated)

    def _show(self, reward, terminated, truncated) -> Step:
        state = self._state.copy()
        won = np.zeros(self.num_envs, bool)
        obs = self.partition.observe(state)
        return Step(obs, state, None, reward, terminated, truncated, won, self._over)

    def render(self) -> np.ndarray:
        """Picture of slot 0 by Gymnasium's renderer: (height,width,3) uint8.

        Raises:
            ValueError: made without render=True.
            OSError: this machine offers no OpenGL that draws off screen.
        """
        if self._envs[0].render_mode is None:
            raise ValueError("Pictures of a robot need make(..., render=True).")
        try:
            return self._envs[0].render()
        except Exception as e:  # each OpenGL library fails with an exception of its own
            raise OSError(
                f"No picture: OpenGL draws nothing off screen here ({type(e).__name__}). Install "
                "EGL with a driver (Debian: libegl1 libgl1-mesa-dri), or osmesa (libosmesa6) and "
                "set MUJOCO_GL=osmesa."
            ) from e

    def close(self) -> None:
        """Free the simulators, and OpenGL before Python's exit, when it would complain."""
        for env in self._envs:
            env.close()
