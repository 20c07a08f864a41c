"""Environments: one vectorised interface, one episode per slot, and `evaluate`.

  env = make("3s_vs_5z", num_envs=512)
  now = env.reset(seed=1)                      # Step(obs, state, avail, reward, terminated, ...)
  while not now.over.all():
      now = env.step(act(now.obs, now.avail))  # slots whose episode is over stand still, reward 0

Every backend speaks this interface, so that the same `evaluate`, the same recorder (collect.py) and
the same trainer serve them all. The embedded default is SMAX [Rutherford et al., "JaxMARL", 2024]:
StarCraft's micro-management maps re-implemented in JAX, with the names and armies of SMAC but its
own observations and dynamics. Scores of different backends are never comparable.

Sizes: E parallel episodes, N agents, O observation, S state, A actions.
       obs (E,N,O)  state (E,S)  avail (E,N,A)  actions (E,N,A) one-hot  reward (E,)
"""

import contextlib
import functools
import io
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

PAPER_SMAC = ("3s_vs_5z", "2s3z", "5m_vs_6m", "6h_vs_8z", "3s5z_vs_3s6z")
PAPER_MUJOCO = ("Hopper-3x1", "Ant-2x4", "HalfCheetah-6x1")
MUJOCO_ROBOTS = (
    *("Hopper", "Ant", "HalfCheetah", "Walker2d", "Humanoid", "HumanoidStandup"),
    *("Reacher", "Swimmer", "Pusher"),
)
SMAX_REWARD_SCALE = 10.0  # SMAX pays at most 2 (damage 1, victory 1), SMAC at most 20: the field's


class Spec(NamedTuple):
    """What a learner must know of an environment before its first step."""

    env_id: str
    backend: str
    num_agents: int  # N
    obs_dim: int  # O, the largest over agents; shorter observations are zero-padded
    state_dim: int  # S
    action_dim: int  # A: number of discrete actions, or dimensions of a continuous one
    discrete: bool
    episode_limit: int  # steps after which an episode is cut off without being over


class Step(NamedTuple):
    """What E parallel episodes show after a reset or a step; numpy arrays, raw units."""

    obs: np.ndarray  # (E,N,O) float32
    state: np.ndarray  # (E,S) float32
    avail: np.ndarray | None  # (E,N,A) float32, 1 = this action may be taken; None if continuous
    reward: np.ndarray  # (E,) float32, of the whole team, on SMAC's scale (a won battle = 20)
    terminated: np.ndarray  # (E,) bool, the task itself ended here: no value beyond
    truncated: np.ndarray  # (E,) bool, the time limit cut it here: the value goes on
    won: np.ndarray  # (E,) bool, battle won at this step
    over: np.ndarray  # (E,) bool, this slot's episode has ended, now or earlier


def make(env_id: str, num_envs: int = 1, backend: str = "auto", seed: int = 0) -> "SmaxEnv":
    """Build `num_envs` parallel copies of a task.

    Args:
        env_id: name of a map, such as 3s_vs_5z; `known_ids()` lists them.
        num_envs: E, episodes that run side by side.
        backend: "smax", or "auto", which is the best one present (today that is SMAX).
        seed: of the first `reset`; slot k's randomness depends on (seed, k) alone, not on E.
    Raises:
        ValueError: unknown task or backend, or no slots.
        ImportError: the backend's simulator is not installed.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}: at least one episode must run.")
    if env_id.partition("-")[0] in MUJOCO_ROBOTS:
        return MamujocoEnv(env_id, num_envs, seed)
    if backend not in ("auto", "smax"):
        raise ValueError(f"Unknown backend {backend!r}: choose one of auto, smax.")
    if env_id not in known_ids():
        raise ValueError(f"Unknown env_id {env_id!r}: SMAX has {', '.join(known_ids())}.")
    return SmaxEnv(env_id, num_envs, seed)


def known_ids() -> list[str]:
    """Names of all SMAX maps, the paper's five first."""
    maps = list(_import_smax().map_names)
    paper = [m for m in ("3s_vs_5z", "2s3z", "5m_vs_6m", "6h_vs_8z", "3s5z_vs_3s6z") if m in maps]
    return paper + sorted(set(maps) - set(paper))


# --------------------------------------------------------------------------------------------------
# SMAX
# --------------------------------------------------------------------------------------------------


class _Smax(NamedTuple):
    jax: object
    environment: type
    scenario: Callable
    map_names: tuple


@functools.cache
def _import_smax() -> _Smax:
    # These networks are tiny and torch owns the GPU: JAX stays on the CPU unless told otherwise.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        import jax
        from jaxmarl.environments.smax import HeuristicEnemySMAX, smax_env
    except ImportError as e:
        raise ImportError(
            "SMAX needs JaxMARL: pip install jaxmarl==0.2.0 (README, Quickstart)"
        ) from e
    names = tuple(smax_env.MAP_NAME_TO_SCENARIO)
    return _Smax(jax, HeuristicEnemySMAX, smax_env.map_name_to_scenario, names)


@functools.cache
def _compile_smax(env_id: str) -> tuple:
    """(environment, reset, step) of one map, jitted over slots; some seconds, once per process."""
    jax, environment, scenario, _ = _import_smax()
    env = environment(
        scenario=scenario(env_id),
        enemy_shoots=True,
        see_enemy_actions=True,
        walls_cause_death=True,
        attack_mode="closest",
    )

    def view(state):
        obs, mask = env.get_obs(state), env.get_avail_actions(state)
        stacked = jax.numpy.stack([obs[a] for a in env.agents])  # (N,O)
        avail = jax.numpy.stack([mask[a] for a in env.agents]).astype(jax.numpy.float32)
        return stacked, env.get_world_state(state), avail

    def reset_one(seed, slot):
        key, start = jax.random.split(jax.random.fold_in(jax.random.PRNGKey(seed), slot))
        _, state = env.reset(start)
        # Strong types: else the first step would be compiled twice, for weak and for strong ones.
        state = jax.tree.map(lambda x: jax.numpy.asarray(x, x.dtype), state)
        return (key, state), view(state)

    def step_one(carry, action, over):
        key, state = carry
        key, sub = jax.random.split(key)
        actions = {a: action[i] for i, a in enumerate(env.agents)}
        _, after, reward, _, _ = env.step_env(sub, state, actions)
        # A finished slot stands still; SMAX itself would let the dead fight on.
        after = jax.tree.map(lambda old, new: jax.numpy.where(over, old, new), state, after)
        alive = after.state.unit_alive
        lost, beaten = ~alive[: env.num_allies].any(), ~alive[env.num_allies :].any()
        reward = jax.numpy.where(over, 0.0, reward[env.agents[0]] * SMAX_REWARD_SCALE)
        ended = (lost | beaten, after.state.step >= env.max_steps, beaten & ~lost)
        return (key, after), (*view(after), reward, *ended)

    return env, jax.jit(jax.vmap(reset_one, (None, 0))), jax.jit(jax.vmap(step_one))


class SmaxEnv:
    """E parallel battles on one SMAX map, allies against SMAX's heuristic enemy."""

    def __init__(self, env_id: str, num_envs: int, seed: int):
        self._env, self._reset, self._step = _compile_smax(env_id)
        self.num_envs, self._seed = num_envs, seed
        agent = self._env.agents[0]
        self.spec = Spec(
            env_id=env_id,
            backend="smax",
            num_agents=self._env.num_allies,
            obs_dim=self._env.observation_spaces[agent].shape[0],
            state_dim=self._env.state_size,
            action_dim=self._env.action_spaces[agent].n,
            discrete=True,
            episode_limit=self._env.max_steps,
        )

    def reset(self, seed: int | None = None) -> Step:
        """Start a fresh episode in every slot; without a seed, the next one in this env's order."""
        if seed is not None:
            self._seed = seed
        slots = np.arange(self.num_envs, dtype=np.uint32)
        self._carry, seen = self._reset(np.uint32(self._seed % 2**32), slots)
        self._seed += 1
        self._over = np.zeros(self.num_envs, bool)
        nothing = np.zeros(self.num_envs, bool)
        zero = np.zeros(self.num_envs, np.float32)
        return Step(*map(np.asarray, seen), zero, nothing, nothing, nothing, self._over)

    def step(self, actions: np.ndarray) -> Step:
        """Advance every unfinished episode by one step.

        Args:
            actions: (E,N,A) one-hot. An action that `avail` forbids has no effect in SMAX.
        """
        choice = np.asarray(actions).argmax(-1).astype(np.int32)  # (E,N)
        self._carry, seen = self._step(self._carry, choice, self._over)
        obs, state, avail, reward, terminated, timeout, won = map(np.asarray, seen)
        fresh = ~self._over
        self._over = self._over | terminated | timeout
        ended = (terminated & fresh, timeout & ~terminated & fresh, won & fresh)
        return Step(obs, state, avail, reward, *ended, self._over)

    def render(self) -> np.ndarray:
        """Picture of slot 0, drawn by JaxMARL's own visualiser: (height,width,3) uint8."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        jax = _import_smax().jax
        key, state = jax.tree.map(lambda x: x[0], self._carry)
        last = dict(zip(self._env.all_agents, state.state.prev_attack_actions, strict=True))
        figure = Figure(figsize=(5, 5))
        canvas, now = FigureCanvasAgg(figure), int(state.state.step)
        self._env.init_render(figure.add_subplot(), (key, state.state, last), 0, now)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# --------------------------------------------------------------------------------------------------
# Multi-Agent MuJoCo
# --------------------------------------------------------------------------------------------------


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

    The state is the robot's own observation (clipped as Gymnasium clips it), the agents see columns
    of it. Actions are in [-1,1] per motor; what lies beyond is cut off. An episode ends when the
    robot falls (terminated; HalfCheetah never does) or after 1000 steps (truncated, not an end).
    """

    def __init__(self, env_id: str, num_envs: int, seed: int, render: bool = False):
        gymnasium, _ = _import_mujoco()
        self.partition, self._seed, self.num_envs = partition(env_id), seed, num_envs
        robot = env_id.partition("-")[0]
        mode = "rgb_array" if render else None
        self._envs = [gymnasium.make(f"{robot}-v5", render_mode=mode) for _ in range(num_envs)]
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
        start = [np.random.SeedSequence((self._seed, k)) for k in range(self.num_envs)]
        self._seed += 1
        shown = [
            e.reset(seed=int(s.generate_state(1)[0]))[0]
            for e, s in zip(self._envs, start, strict=True)
        ]
        self._state = np.array(shown, np.float32)  # (E,S)
        self._over = np.zeros(self.num_envs, bool)
        nothing = np.zeros(self.num_envs, bool)
        return self._show(np.zeros(self.num_envs, np.float32), nothing, nothing)

    def step(self, actions: np.ndarray) -> Step:
        """Advance every unfinished episode by one step; actions (E,N,A) in [-1,1]."""
        joint = self.partition.join(np.asarray(actions, np.float64)).clip(-1, 1) * self._strength
        reward = np.zeros(self.num_envs, np.float32)
        ended = np.zeros((2, self.num_envs), bool)
        for k in np.flatnonzero(~self._over):
            self._state[k], reward[k], *ended[:, k], _ = self._envs[k].step(joint[k])
        terminated, truncated = ended[0], ended[1] & ~ended[0]
        self._over = self._over | terminated | truncated
        return self._show(reward, terminated, truncated)

    def _show(self, reward, terminated, truncated) -> Step:
        state = self._state.copy()
        won = np.zeros(self.num_envs, bool)
        obs = self.partition.observe(state)
        return Step(obs, state, None, reward, terminated, truncated, won, self._over)

    def render(self) -> np.ndarray:
        """Picture of slot 0 by Gymnasium's renderer: (height,width,3) uint8."""
        return self._envs[0].render()


# --------------------------------------------------------------------------------------------------
# Playing
# --------------------------------------------------------------------------------------------------


def evaluate(env: SmaxEnv, act: Callable, episodes: int, seed: int) -> dict:
    """Play whole episodes and report what they paid.

    Args:
        env: E slots; the episodes are played in rounds of E.
        act: (obs (E,N,O), avail (E,N,A)) tensors on the CPU -> actions (E,N,A); greedy to compare.
        episodes: at least this many, rounded up to whole rounds.
        seed: round k starts from seed + k, so two policies meet the same battles.
    Returns:
        return_mean and its return_ci95 (half width, normal, undiscounted), win_rate, episodes.
    """
    returns, wins = [], []
    for k in range(-(-episodes // env.num_envs)):
        now = env.reset(seed + k)
        total, won = np.zeros(env.num_envs), np.zeros(env.num_envs, bool)
        while not now.over.all():
            avail = None if now.avail is None else torch.tensor(now.avail)
            now = env.step(act(torch.tensor(now.obs), avail).numpy())
            total, won = total + now.reward, won | now.won
        returns.append(total)
        wins.append(won)
    returns, wins = np.concatenate(returns), np.concatenate(wins)
    spread = returns.std(ddof=1) if len(returns) > 1 else 0.0
    return {
        "return_mean": float(returns.mean()),
        "return_ci95": float(1.96 * spread / np.sqrt(len(returns))),
        "win_rate": float(wins.mean()),
        "episodes": len(returns),
    }


def random_policy(seed: int) -> Callable:
    """Uniform over the actions that may be taken: the floor every score is read against."""
    g = torch.Generator().manual_seed(seed)

    def act(obs: torch.Tensor, avail: torch.Tensor) -> torch.Tensor:
        choice = torch.multinomial(avail.flatten(0, 1), 1, generator=g)  # (E*N,1)
        return torch.zeros_like(avail).flatten(0, 1).scatter_(1, choice, 1.0).view_as(avail)

    return act


def _self_check():
    env = make("3m", num_envs=64)
    first, again = (evaluate(env, random_policy(0), 64, seed=7) for _ in range(2))
    assert first == again, "the same seed must give the same battles"
    now, steps = env.reset(seed=1), 0
    while not now.over.all():
        now, steps = (
            env.step(random_policy(steps)(now.obs, torch.tensor(now.avail)).numpy()),
            steps + 1,
        )
    assert steps <= env.spec.episode_limit and now.avail.shape == (64, 3, env.spec.action_dim)
    print(env.spec)
    print(
        f"random policy on 3m: return {first['return_mean']:.2f} +- {first['return_ci95']:.2f} "
        f"of 20, won {first['win_rate']:.0%} of {first['episodes']}"
    )
    assert 0.0 < first["return_mean"] < 20.0


if __name__ == "__main__":
    _self_check()
