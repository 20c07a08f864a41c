"""Environments: one interface for every simulator, SMAX behind it, and `evaluate`.

  env = make("3s_vs_5z", num_envs=512)
  now = env.reset(seed=1)                      # Step(obs, state, avail, reward, terminated, ...)
  while not now.done.all():
      now = env.step(act(now.obs, now.avail))  # finished episodes stand still and pay nothing

Every backend has this interface, so one `evaluate` and one recorder serve them all. Scores of
different backends are never comparable.

  smax      the embedded default [Rutherford et al., "JaxMARL", 2024]: StarCraft's micro-management
            maps re-implemented in JAX, with the names and armies of SMAC but its own dynamics.
            Thousands of parallel episodes; StarCraft II is not needed. As in SMAC, an agent does
            not see what other units did last (`HIDDEN`).
  smac      SMAC [Samvelyan et al., 2019]: the same maps in StarCraft II itself, as in the public
            datasets. One process of the game per parallel episode.
  smacv2    SMACv2 [Ellis et al., 2023]: its own scenarios in StarCraft II, such as terran_5_vs_5,
            with random armies and positions. It does not play SMAC's maps.
  mamujoco  Multi-Agent MuJoCo [Peng et al., 2021]: a robot's joints divided among agents;
            continuous actions.

This file contains SMAX; the other backends are in simulators/ and imported when they are asked for.
`python envs.py` runs a self-check: random play in SMAX.

Sizes: E parallel episodes, N agents, O observation, S state, A actions.
       obs (E,N,O)  state (E,S)  avail (E,N,A)  actions (E,N,A) one-hot  reward (E,)
"""

import contextlib
import functools
import importlib.util
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

PAPER_SMAC = ("3s_vs_5z", "2s3z", "5m_vs_6m", "6h_vs_8z", "3s5z_vs_3s6z")
PAPER_MUJOCO = ("Hopper-3x1", "Ant-2x4", "HalfCheetah-6x1")
MUJOCO_ROBOTS = {  # and how gymnasium-robotics divides each of them among agents
    "Hopper": ("3x1",),
    "Ant": ("2x4", "2x4d", "4x2"),
    "HalfCheetah": ("6x1", "2x3"),
    "Walker2d": ("2x3",),
    "Swimmer": ("2x1",),
    "Humanoid": ("9|8",),
    "HumanoidStandup": ("9|8",),
}
SMAX_REWARD_SCALE = 10.0  # SMAX pays at most 2 per episode, SMAC at most 20: we report SMAC's scale
# What SMAX shows of every other unit and SMAC does not. A clone of a policy that sees the last
# actions learns to repeat them instead of what to do [de Haan et al., 2019; docs/data.md].
HIDDEN = ("last_movement_x", "last_movement_y", "last_targeted", "weapon_cooldown")
SMACV2_ID = re.compile(r"(protoss|terran|zerg)_([1-9]\d*)_vs_([1-9]\d*)")
BACKENDS = {  # and what each of them plays
    "smax": "it plays StarCraft's maps, such as 3s_vs_5z",
    "smac": "it plays SMAC's maps, such as 3s_vs_5z",
    "smacv2": "it plays its own scenarios, such as terran_5_vs_5; on SMAC's maps it shows other "
    "observations, pays other rewards and fails where units have types, so use --backend smac",
    "mamujoco": "it plays divided robots, such as HalfCheetah-6x1",
}


class Spec(NamedTuple):
    """What a learner must know of an environment before its first step."""

    env_id: str
    backend: str
    num_agents: int  # N
    obs_dim: int  # O, the largest over agents; shorter observations are zero-padded
    state_dim: int  # S
    action_dim: int  # A: number of discrete actions, or dimensions of a continuous one
    discrete: bool
    episode_limit: int  # steps after which an episode is truncated
    can_win: bool = True  # no: there is no win rate


class Step(NamedTuple):
    """What E parallel episodes show after a reset or a step; numpy arrays, raw units."""

    obs: np.ndarray  # (E,N,O) float32
    state: np.ndarray  # (E,S) float32
    avail: np.ndarray | None  # (E,N,A) float32, 1 = available; None: continuous actions
    reward: np.ndarray  # (E,) float32, of the whole team; SMAX: on SMAC's scale, a win pays 20
    terminated: np.ndarray  # (E,) bool, the task ended at this step: no value beyond
    truncated: np.ndarray  # (E,) bool, the time limit was reached at this step: the value goes on
    won: np.ndarray  # (E,) bool, won at this step
    done: np.ndarray  # (E,) bool, the episode has ended at this step or before


def make(
    env_id: str, num_envs: int = 1, backend: str = "auto", seed: int = 0, render: bool = False,
    hide: bool = True,
):  # fmt: skip
    """Build `num_envs` parallel copies of a task: a SmaxEnv, or its equivalent of another backend.

    Args:
        env_id: a map (3s_vs_5z), a scenario of SMACv2 (terran_5_vs_5), or a divided robot
            (HalfCheetah-6x1); `known_ids()` lists SMAX's maps and the paper's robots.
        num_envs: E, episodes that run side by side.
        backend: see `choose_backend`.
        seed: of the first `reset`; episode k's randomness depends on (seed, k) alone, not on E.
        render: `render()` will be called (MuJoCo must know beforehand).
        hide: SMAX only: leave `HIDDEN` out of the observations.
    Raises:
        ValueError: unknown task or backend, a backend that does not play this task, no episodes,
            or more than this backend can run side by side.
        ImportError: the backend's simulator is not installed.
        FileNotFoundError: StarCraft II or the map's file is not installed.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}: at least one episode must run.")
    backend = choose_backend(env_id, backend)
    if backend == "mamujoco":
        simulator = importlib.import_module("simulators.mamujoco")
        return simulator.MamujocoEnv(env_id, num_envs, seed, render)
    if backend in ("smac", "smacv2"):
        simulator = importlib.import_module("simulators.starcraft")
        env = simulator.SmacEnv(env_id, num_envs, backend, seed)
        simulator.require_starcraft(env.map_file)  # now, not at the first reset, hours later
        return env
    if env_id not in _import_smax().map_names:
        raise ValueError(f"Unknown env_id {env_id!r}: there are {', '.join(known_ids())}.")
    return SmaxEnv(env_id, num_envs, seed, hide)


def choose_backend(env_id: str, backend: str = "auto") -> str:
    """The backend that plays this task: the one asked for, or for "auto" the task's natural one.

    Raises:
        ValueError: unknown backend, or one that does not play this task.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"Unknown backend {backend!r}: choose one of auto, {', '.join(BACKENDS)}.")
    natural = natural_backend(env_id)
    if backend in ("auto", natural) or (backend, natural) == ("smac", "smax"):
        return natural if backend == "auto" else backend
    raise ValueError(f"Backend {backend} cannot play {env_id!r}: {BACKENDS[backend]}.")


def is_robot(env_id: str) -> bool:
    """Is it a task of Multi-Agent MuJoCo, such as HalfCheetah-6x1? Its actions are continuous."""
    return env_id.partition("-")[0] in MUJOCO_ROBOTS


def natural_backend(env_id: str) -> str:
    """The backend that a task's name belongs to; SMAX, not the real game, for StarCraft's maps."""
    if is_robot(env_id):
        return "mamujoco"
    return "smacv2" if SMACV2_ID.fullmatch(env_id) else "smax"


def known_ids() -> list[str]:
    """All SMAX maps, the paper's five first, and the paper's three robots after these."""
    maps = list(_import_smax().map_names)
    paper = [m for m in PAPER_SMAC if m in maps]
    return [*paper, *PAPER_MUJOCO, *sorted(set(maps) - set(paper))]


# --------------------------------------------------------------------------------------------------
# SMAX
# --------------------------------------------------------------------------------------------------


class _Smax(NamedTuple):
    jax: object
    environment: type
    scenario: Callable
    map_names: tuple


@contextlib.contextmanager
def _without_the_rest_of_jaxmarl():
    """Within this block, SMAX is imported without running the `__init__` of jaxmarl and of
    jaxmarl.environments: empty modules with the same search path stand in for them.

    Theirs would import all environments, which takes six times as long, and print which of them
    lack something. Afterwards `import jaxmarl` is the usual one again.
    """
    found = importlib.util.find_spec("jaxmarl")
    if found is None:
        raise ImportError("No module named 'jaxmarl'")
    bare = {}
    for name, inside in (("jaxmarl", ""), ("jaxmarl.environments", "environments")):
        if name not in sys.modules:
            bare[name] = types.ModuleType(name)
            bare[name].__path__ = [str(Path(found.submodule_search_locations[0], inside))]
    sys.modules.update(bare)
    try:
        yield
    finally:
        for name in bare:
            del sys.modules[name]


@functools.cache
def _import_smax() -> _Smax:
    # The networks are small and torch uses the GPU: JAX stays on the CPU unless told otherwise.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        import jax

        with _without_the_rest_of_jaxmarl():
            from jaxmarl.environments.smax import HeuristicEnemySMAX, smax_env
    except ImportError as e:
        raise ImportError(
            "SMAX needs JaxMARL: pip install jaxmarl==0.2.0 (README, Quickstart)"
        ) from e
    names = tuple(smax_env.MAP_NAME_TO_SCENARIO)
    return _Smax(jax, HeuristicEnemySMAX, smax_env.map_name_to_scenario, names)


@functools.cache
def _compile_smax(env_id: str) -> tuple:
    """(environment, reset, step) of one map, compiled for E episodes; cached."""
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

    def reset_one(seed, slot, weakened):
        key, start = jax.random.split(jax.random.fold_in(jax.random.PRNGKey(seed), slot))
        _, state = env.reset(start)
        weak = jax.random.bernoulli(jax.random.fold_in(start, 1), weakened, (env.num_enemies,))
        left = jax.numpy.where(weak, 0.5, 1.0)
        health = state.state.unit_health.at[env.num_allies :].multiply(left)
        state = state.replace(state=state.state.replace(unit_health=health))
        # Strong types: otherwise step would be compiled twice, for weak and for strong types.
        state = jax.tree.map(lambda x: jax.numpy.asarray(x, x.dtype), state)
        return (key, state), view(state)

    def step_one(carry, action, done):
        key, state = carry
        key, sub = jax.random.split(key)
        actions = {a: action[i] for i, a in enumerate(env.agents)}
        _, after, reward, _, _ = env.step_env(sub, state, actions)
        # A finished episode stands still; SMAX itself would go on simulating it.
        after = jax.tree.map(lambda old, new: jax.numpy.where(done, old, new), state, after)
        alive = after.state.unit_alive
        lost, beaten = ~alive[: env.num_allies].any(), ~alive[env.num_allies :].any()
        reward = jax.numpy.where(done, 0.0, reward[env.agents[0]] * SMAX_REWARD_SCALE)
        ended = (lost | beaten, after.state.done, beaten & ~lost)
        return (key, after), (*view(after), reward, *ended)

    reset = jax.jit(jax.vmap(reset_one, (0, 0, None)))
    return env, reset, jax.jit(jax.vmap(step_one))


def _shown_columns(env, hide: bool) -> np.ndarray:
    """The columns of SMAX's own observation that are shown: all, or all but `HIDDEN`."""
    size = env.observation_spaces[env.agents[0]].shape[0]
    others = size - len(env.own_features)  # one block of unit_features for every other unit
    hidden = [hide and name in HIDDEN for name in env.unit_features]
    return np.array([k for k in range(size) if k >= others or not hidden[k % len(hidden)]])


class SmaxEnv:
    """E parallel episodes on one SMAX map, the allies against SMAX's heuristic enemy.

    See `make`. `columns` are those of SMAX's own observation that are shown.
    """

    def __init__(self, env_id: str, num_envs: int, seed: int, hide: bool = True):
        self._env, self._reset, self._step = _compile_smax(env_id)
        self.columns = _shown_columns(self._env, hide)
        self.num_envs, self._seed = num_envs, seed
        self.weakened = 0.0  # share of enemies that start with half their health (for a curriculum)
        agent = self._env.agents[0]
        self.spec = Spec(
            env_id=env_id,
            backend="smax",
            num_agents=self._env.num_allies,
            obs_dim=len(self.columns),
            state_dim=self._env.state_size,
            action_dim=self._env.action_spaces[agent].n,
            discrete=True,
            episode_limit=self._env.max_steps + 1,  # JaxMARL looks at the clock before it ticks
        )

    def reset(self, seed: int | None = None) -> Step:
        """Start a new episode in every slot; without a seed, with the last one plus 1."""
        self._seed = self._seed if seed is None else seed
        slots = np.arange(self.num_envs, dtype=np.uint32)
        seeds = np.full(self.num_envs, self._seed % 2**32, np.uint32)
        self._carry, seen = self._reset(seeds, slots, np.float32(self.weakened))
        self._seed += 1
        self._done = np.zeros(self.num_envs, bool)
        nothing = np.zeros(self.num_envs, bool)
        zero = np.zeros(self.num_envs, np.float32)
        obs, state, avail = map(np.asarray, seen)
        obs = obs[..., self.columns]
        return Step(obs, state, avail, zero, nothing, nothing, nothing, self._done)

    def step(self, actions: np.ndarray) -> Step:
        """Advance every unfinished episode by one step.

        Args:
            actions: (E,N,A) one-hot. An unavailable action has no effect in SMAX.
        """
        choice = np.asarray(actions).argmax(-1).astype(np.int32)  # (E,N)
        self._carry, seen = self._step(self._carry, choice, self._done)
        obs, state, avail, reward, terminated, timeout, won = map(np.asarray, seen)
        running = ~self._done
        self._done = self._done | terminated | timeout
        ended = (terminated & running, timeout & ~terminated & running, won & running)
        return Step(obs[..., self.columns], state, avail, reward, *ended, self._done)

    def snapshot(self):
        """The simulator's own state of every slot: a JAX tree of arrays (E,...)."""
        return _import_smax().jax.tree.map(np.asarray, self._carry[1])

    def restore(self, snapshot, seed: int) -> None:
        """Go on from a snapshot in every slot, with new randomness."""
        jax = _import_smax().jax
        self._carry = (jax.random.split(jax.random.PRNGKey(seed), self.num_envs), snapshot)
        self._done = np.zeros(self.num_envs, bool)

    def units(self) -> list:
        """Every unit of slot 0 as a `simulators.battle.Unit`, ours first, the dead too."""
        state = _import_smax().jax.tree.map(lambda x: np.asarray(x[0]), self._carry[1]).state
        return self._battle().units_of_smax(self._env, state)

    def render(self) -> np.ndarray:
        """Picture of slot 0: (height,width,3) uint8."""
        step = int(self._carry[1].state.step[0])
        side = max(self._env.map_width, self._env.map_height)
        return self._battle().draw(self.units(), (0, 0, side), step, bool(self._done[0]))

    def film(self, *sequences: np.ndarray) -> list[list[np.ndarray]]:
        """Pictures (height,width,3) uint8 of sequences of states (T,S), also of imagined ones, all
        of the part of the map on which they play."""
        battle = self._battle()
        return battle.film([[battle.living_of_smax(self._env, x) for x in s] for s in sequences])

    @staticmethod
    def _battle():
        return importlib.import_module("simulators.battle")  # when a picture is asked for

    def close(self) -> None:
        """Nothing to free."""


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


def evaluate(
    env, act: Callable, episodes: int, seed: int, device: torch.device | str = "cpu"
) -> dict:
    """Play whole episodes and report their undiscounted returns.

    Args:
        env: what `make` returns; the episodes are played in rounds of its E.
        act: (obs (E,N,O), avail (E,N,A) or None), tensors -> actions (E,N,A).
        episodes: at least this many, rounded up to whole rounds.
        seed: round k starts from seed + k, so two policies meet the same episodes (except in
            StarCraft II itself, see `simulators.starcraft.SmacEnv`).
        device: where `act` computes.
    Returns:
        return_mean and its return_ci95 (half width, normal), win_rate (None where nothing can be
        won) and episodes.
    """
    returns, wins = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's waiting threads would take the processor from the simulator
    try:
        for k in range(-(-episodes // env.num_envs)):
            now = env.reset(seed + k)
            total, won = np.zeros(env.num_envs), np.zeros(env.num_envs, bool)
            while not now.done.all():
                avail = None if now.avail is None else torch.tensor(now.avail, device=device)
                actions = act(torch.tensor(now.obs, device=device), avail)
                now = env.step(actions.cpu().numpy())
                total, won = total + now.reward, won | now.won
            returns.append(total)
            wins.append(won)
    finally:
        torch.set_num_threads(threads)
    returns, wins = np.concatenate(returns), np.concatenate(wins)
    spread = returns.std(ddof=1) if len(returns) > 1 else 0.0
    return {
        "return_mean": float(returns.mean()),
        "return_ci95": float(1.96 * spread / np.sqrt(len(returns))),
        "win_rate": float(wins.mean()) if env.spec.can_win else None,
        "episodes": len(returns),
    }


def random_policy(spec: Spec, seed: int) -> Callable:
    """Uniform over the available actions, or over [-1,1]: the lowest score worth comparing with."""
    g = torch.Generator().manual_seed(seed)

    def act(obs: torch.Tensor, avail: torch.Tensor | None) -> torch.Tensor:
        if not spec.discrete:
            return 2 * torch.rand(*obs.shape[:-1], spec.action_dim, generator=g) - 1
        choice = torch.multinomial(avail.flatten(0, 1), 1, generator=g)  # (E*N,1)
        return torch.zeros_like(avail).flatten(0, 1).scatter_(1, choice, 1.0).view_as(avail)

    return act


def _self_check():
    env = make("3m", num_envs=64)
    first, again = (evaluate(env, random_policy(env.spec, 0), 64, seed=7) for _ in range(2))
    assert first == again, "the same seed must give the same episodes"
    act, now, steps = random_policy(env.spec, 1), env.reset(seed=1), 0
    while not now.done.all():
        now = env.step(act(torch.tensor(now.obs), torch.tensor(now.avail)).numpy())
        steps += 1
    assert steps <= env.spec.episode_limit and now.avail.shape == (64, 3, env.spec.action_dim)
    print(env.spec)
    print(
        f"random policy on 3m: return {first['return_mean']:.2f} +- {first['return_ci95']:.2f} "
        f"of 20, won {first['win_rate']:.0%} of {first['episodes']}"
    )
    assert 0.0 < first["return_mean"] < 20.0


if __name__ == "__main__":
    _self_check()
