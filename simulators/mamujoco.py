"""Multi-Agent MuJoCo [Peng et al., 2021] as an environment of envs.py.

  envs.make("HalfCheetah-6x1", num_envs=20)     # 6 agents, each drives 1 motor

Gymnasium simulates the robot; gymnasium-robotics defines which agent drives which motors and sees
which part of the state. The readers in datasets/ use the same partitions to divide recordings of
whole robots among agents.

Sizes: E parallel episodes, N agents, O observation, S state, A motors per agent.
"""

import contextlib
import functools
import io
import os
import sys
import warnings
from typing import NamedTuple

import numpy as np

from envs import MUJOCO_ROBOTS, Spec, Step

SIDE = 320  # pixels of a picture
PLANE = 0  # MuJoCo's mjGEOM_PLANE


class Partition(NamedTuple):
    """Which entries of a robot's state each agent sees, and which motors it drives.

    Agents may differ in size. Shorter rows of indices are padded with an index one past the end,
    which reads as zero and is ignored on writing.
    """

    obs_index: np.ndarray  # (N,O) entries of the state that each agent sees
    action_index: np.ndarray  # (N,A) motors that each agent drives
    motors: int  # number of motors of the whole robot

    def observe(self, state: np.ndarray) -> np.ndarray:
        """State (...,S) -> observations of all agents (...,N,O)."""
        padding = np.zeros((*state.shape[:-1], 1), state.dtype)
        return np.concatenate([state, padding], -1)[..., self.obs_index]

    def split(self, joint: np.ndarray) -> np.ndarray:
        """Joint action (...,motors) -> one action per agent (...,N,A)."""
        padding = np.zeros((*joint.shape[:-1], 1), joint.dtype)
        return np.concatenate([joint, padding], -1)[..., self.action_index]

    def join(self, actions: np.ndarray) -> np.ndarray:
        """One action per agent (...,N,A) -> joint action (...,motors); the inverse of `split`."""
        joint = np.zeros((*actions.shape[:-2], self.motors + 1), actions.dtype)
        joint[..., self.action_index] = actions
        return joint[..., : self.motors]


@functools.cache
def _import_mujoco() -> tuple:
    """The modules (gymnasium, gymnasium_robotics.mamujoco_v1), imported at first use."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            import gymnasium
            from gymnasium_robotics import mamujoco_v1  # its warnings concern other robots
    except ImportError as e:
        raise ImportError(
            "Multi-Agent MuJoCo needs: pip install gymnasium-robotics 'mujoco>=3.3,<3.5'"
        ) from e
    except AttributeError as e:  # raised by PyOpenGL if the library is missing
        raise ImportError(
            f"MuJoCo does not load with MUJOCO_GL={os.environ.get('MUJOCO_GL')}: this OpenGL "
            "library is not installed; unset MUJOCO_GL."
        ) from e
    return gymnasium, mamujoco_v1


@functools.cache
def partition(env_id: str) -> Partition:
    """The partition of a task such as HalfCheetah-6x1, as gymnasium-robotics defines it.

    Each agent sees its own joints, the positions of the neighbouring joints, and the torso.

    Raises:
        ValueError: unknown robot, or gymnasium-robotics has no such partition of it.
        ImportError: gymnasium-robotics or MuJoCo is not installed.
    """
    _, mamujoco = _import_mujoco()
    robot, _, division = env_id.partition("-")
    if robot not in MUJOCO_ROBOTS:
        raise ValueError(f"Unknown env_id {env_id!r}: robots are {', '.join(MUJOCO_ROBOTS)}.")
    if division not in MUJOCO_ROBOTS[robot]:
        known = ", ".join(f"{robot}-{d}" for d in MUJOCO_ROBOTS[robot])
        raise ValueError(
            f"Unknown env_id {env_id!r}: {robot} is divided as {known}, not {division!r}."
        )
    env = mamujoco.parallel_env(robot, division)
    single = env.single_agent_env
    size, motors = single.observation_space.shape[0], single.action_space.shape[0]

    def padded(rows: list, value: int) -> np.ndarray:  # value: the index one past the end
        longest = max(map(len, rows))
        return np.array([[*row, *[value] * (longest - len(row))] for row in rows])

    sees = [list(env.observation_factorization[a]) for a in env.possible_agents]
    drives = [[joint.act_ids for joint in part] for part in env.agent_action_partitions]
    env.close()
    return Partition(padded(sees, size), padded(drives, motors), motors)


class MamujocoEnv:
    """E parallel robots, each driven by N agents: Gymnasium's v5 tasks, divided by `partition`.

    The state is Gymnasium's observation of the robot (with Gymnasium's clipping). Each agent
    observes some entries of it, zero-padded to the longest observation. Actions are in [-1,1],
    scaled by each motor's strength; values beyond are clipped. The reward is Gymnasium's, unscaled.
    An episode terminates when the robot falls (HalfCheetah has no such rule) and is truncated
    after 1000 steps.
    """

    def __init__(self, env_id: str, num_envs: int, seed: int, render: bool = False):
        """See `envs.make`. render: prepare slot 0 for `render`, which MuJoCo needs to know now."""
        gymnasium, _ = _import_mujoco()
        self.partition, self._seed, self.num_envs = partition(env_id), seed, num_envs
        if render and sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")  # OpenGL without a display
        modes = ["rgb_array" if render and k == 0 else None for k in range(num_envs)]
        task = f"{env_id.partition('-')[0]}-v5"
        self.robots = [
            gymnasium.make(task, render_mode=m, disable_env_checker=True, width=SIDE, height=SIDE)
            for m in modes
        ]
        if render:  # else the robot runs out of its floor, and nothing shows that it moves
            model = self.robots[0].unwrapped.model
            floor = model.geom_type == PLANE
            model.geom_size[floor, :2] = 0  # endless
            model.mat_texrepeat[model.geom_matid[floor]] = 0.5  # a chequered square is a metre wide
            model.mat_reflectance[:] = 0  # a mirror and sharp shadows cost half of the time
            model.vis.quality.shadowsize = 1024
        self.strength = self.robots[0].action_space.high  # (motors,) of action 1
        (n, o), a = self.partition.obs_index.shape, self.partition.action_index.shape[1]
        self.spec = Spec(
            env_id=env_id,
            backend="mamujoco",
            num_agents=n,
            obs_dim=o,
            state_dim=self.robots[0].observation_space.shape[0],
            action_dim=a,
            discrete=False,
            episode_limit=self.robots[0].spec.max_episode_steps,
            can_win=False,
        )

    def reset(self, seed: int | None = None) -> Step:
        """Start an episode in every slot; without a seed, with the last reset's seed plus one."""
        if seed is not None:
            self._seed = seed
        self._state = np.zeros((self.num_envs, self.spec.state_dim), np.float32)
        for k, env in enumerate(self.robots):
            start = np.random.SeedSequence((self._seed, k)).generate_state(1)[0]
            self._state[k], _ = env.reset(seed=int(start))
        self._seed += 1
        self._done = np.zeros(self.num_envs, bool)
        no = np.zeros(self.num_envs, bool)
        return self._show(np.zeros(self.num_envs, np.float32), no, no)

    def step(self, actions: np.ndarray) -> Step:
        """Advance every unfinished episode by one step; actions (E,N,A) in [-1,1]."""
        joint = self.partition.join(np.asarray(actions, np.float64)).clip(-1, 1) * self.strength
        reward = np.zeros(self.num_envs, np.float32)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        for k in np.flatnonzero(~self._done):
            state, reward[k], terminated[k], timeout, _ = self.robots[k].step(joint[k])
            self._state[k], truncated[k] = state, timeout and not terminated[k]
        self._done = self._done | terminated | truncated
        return self._show(reward, terminated, truncated)

    def _show(self, reward, terminated, truncated) -> Step:
        """The Step that shows the current states; nothing can be won."""
        state = self._state.copy()
        won = np.zeros(self.num_envs, bool)
        obs = self.partition.observe(state)
        return Step(obs, state, None, reward, terminated, truncated, won, self._done)

    def inside(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """States (B,S) -> MuJoCo's positions (B,nq) and velocities (B,nv).

        Where on the ground a robot is no state says: 0 here.
        """
        model, x = self.robots[0].unwrapped.model, states.astype(np.float64)
        shown = model.nq - self.ground
        positions = np.concatenate([np.zeros((len(x), self.ground)), x[:, :shown]], 1)
        return positions, x[:, shown : shown + model.nv]

    @property
    def ground(self) -> int:
        """How many coordinates of the robot's place on the ground its state leaves out."""
        model = self.robots[0].unwrapped.model
        missing = model.nq + model.nv - self.spec.state_dim
        return missing if missing >= 0 else 2  # contact forces follow positions and velocities

    def film(self, *sequences: np.ndarray) -> list[list[np.ndarray]]:
        """Pictures (height,width,3) uint8 of sequences of states (T,S), also of imagined ones.

        The robot stands where its velocities have brought it from the first state on.
        """
        robot, films = self.robots[0].unwrapped, []
        self.robots[0].reset()  # without it Gymnasium does not draw
        for states in sequences:
            positions, velocities = self.inside(states)
            speed = velocities[:, : self.ground]
            positions[1:, : self.ground] = np.cumsum(speed[:-1] + speed[1:], 0) * robot.dt / 2
            films.append([])
            for position, velocity in zip(positions, velocities, strict=True):
                robot.set_state(position, velocity)
                films[-1].append(self.render())
        return films

    def render(self) -> np.ndarray:
        """Picture of slot 0 by Gymnasium's renderer: (height,width,3) uint8.

        Raises:
            ValueError: the environment was made without render=True.
            OSError: OpenGL cannot draw off screen on this machine.
        """
        if self.robots[0].render_mode is None:
            raise ValueError("Pictures of a robot need envs.make(..., render=True).")
        try:
            return self.robots[0].render()
        except Exception as e:  # every OpenGL library raises its own exceptions
            raise OSError(
                f"No picture: OpenGL cannot draw off screen here ({type(e).__name__}). Install "
                "EGL with a driver (Debian: libegl1 libgl1-mesa-dri), or osmesa (libosmesa6) and "
                "set MUJOCO_GL=osmesa."
            ) from e

    def close(self) -> None:
        """Free the simulators; OpenGL prints errors if it is freed only at Python's exit."""
        for env in self.robots:
            env.close()
