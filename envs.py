"""Environments: one vectorised interface, one episode per slot, and `evaluate`.

  env = make("3s_vs_5z", num_envs=512)
  now = env.reset(seed=1)                      # Step(obs, state, avail, reward, terminated, ...)
  while not now.over.all():
      now = env.step(act(now.obs, now.avail))  # slots whose episode is over stand still, reward 0

Every backend speaks this interface, so that the same `evaluate`, the same recorder (collect.py) and
the same trainer serve them all. Scores of different backends are never comparable.

  smax      the embedded default [Rutherford et al., "JaxMARL", 2024]: StarCraft's micro-management
            maps re-implemented in JAX, with the names and armies of SMAC but its own observations
            and dynamics. Thousands of slots, no game.
  smac      SMAC [Samvelyan et al., 2019]: the same maps in StarCraft II itself, as in the public
            datasets. One process of the game a slot.
  smacv2    SMACv2 [Ellis et al., 2023]: its own scenarios in StarCraft II, such as terran_5_vs_5,
            with random armies and positions. Never SMAC's maps, which it plays differently.
  mamujoco  Multi-Agent MuJoCo [Peng et al., 2021]: a robot's joints divided among agents;
            continuous actions.

  python envs.py                                                self-check: random play in SMAX
  python envs.py watch RUN_DIR [--episodes 1] [--out FILE.gif]  a run's policy, playing

Sizes: E parallel episodes, N agents, O observation, S state, A actions.
       obs (E,N,O)  state (E,S)  avail (E,N,A)  actions (E,N,A) one-hot  reward (E,)
"""

import contextlib
import copy
import functools
import importlib
import importlib.util
import io
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
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
SMACV2_ID = re.compile(r"(protoss|terran|zerg)_([1-9]\d*)_vs_([1-9]\d*)")
MOST_GAMES = 32  # StarCraft II takes about a gigabyte of memory a process
PLAYS = {
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


def make(
    env_id: str, num_envs: int = 1, backend: str = "auto", seed: int = 0, render: bool = False
) -> "SmaxEnv | SmacEnv | MamujocoEnv":
    """Build `num_envs` parallel copies of a task.

    Args:
        env_id: a map (3s_vs_5z), a scenario of SMACv2 (terran_5_vs_5), or a divided robot
            (HalfCheetah-6x1); `known_ids()` lists what runs without StarCraft II.
        num_envs: E, episodes that run side by side.
        backend: smax, smac, smacv2, mamujoco, or auto: the one that the name belongs to, and
            SMAX for StarCraft's maps.
        seed: of the first `reset`; slot k's randomness depends on (seed, k) alone, not on E.
        render: pictures will be taken (MuJoCo must be told beforehand).
    Raises:
        ValueError: unknown task or backend, a backend that does not play this task, no slots, or
            more slots than this backend can have.
        ImportError: the backend's simulator is not installed.
        FileNotFoundError: StarCraft II or the map's file is not installed.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}: at least one episode must run.")
    if backend not in ("auto", *PLAYS):
        raise ValueError(f"Unknown backend {backend!r}: choose one of auto, {', '.join(PLAYS)}.")
    natural = natural_backend(env_id)
    backend = natural if backend == "auto" else backend
    if backend != natural and (backend, natural) != ("smac", "smax"):
        raise ValueError(f"Backend {backend} cannot play {env_id!r}: {PLAYS[backend]}.")
    if backend == "mamujoco":
        return MamujocoEnv(env_id, num_envs, seed, render)
    if backend in ("smac", "smacv2"):
        env = SmacEnv(env_id, num_envs, backend, seed)
        require_starcraft(env.map_file)  # now, not at the first reset, when hours may have gone by
        return env
    if env_id not in _import_smax().map_names:
        raise ValueError(f"Unknown env_id {env_id!r}: there are {', '.join(known_ids())}.")
    return SmaxEnv(env_id, num_envs, seed)


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

    def reset_one(seed, slot, weakened):
        key, start = jax.random.split(jax.random.fold_in(jax.random.PRNGKey(seed), slot))
        _, state = env.reset(start)
        weak = jax.random.bernoulli(jax.random.fold_in(start, 1), weakened, (env.num_enemies,))
        left = jax.numpy.where(weak, 0.5, 1.0)
        health = state.state.unit_health.at[env.num_allies :].multiply(left)
        state = state.replace(state=state.state.replace(unit_health=health))
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

    return env, jax.jit(jax.vmap(reset_one, (None, 0, None))), jax.jit(jax.vmap(step_one))


class SmaxEnv:
    """E parallel battles on one SMAX map, allies against SMAX's heuristic enemy."""

    def __init__(self, env_id: str, num_envs: int, seed: int):
        self._env, self._reset, self._step = _compile_smax(env_id)
        self.num_envs, self._seed = num_envs, seed
        self.weakened = 0.0  # share of enemies with half their health: another game, to learn from
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
        weakened = np.float32(self.weakened)
        self._carry, seen = self._reset(np.uint32(self._seed % 2**32), slots, weakened)
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

    def close(self) -> None:
        """Nothing to end."""


# --------------------------------------------------------------------------------------------------
# SMAC and SMACv2: StarCraft II itself
# --------------------------------------------------------------------------------------------------

# As the public datasets were recorded [CFCQL, sc2.yaml]; these are SMAC's defaults, too.
SMAC_SETTINGS = {
    "difficulty": "7",
    "step_mul": 8,
    "move_amount": 2,
    "obs_all_health": True,
    "obs_own_health": True,
    "obs_last_action": False,
    "state_last_action": True,
    "reward_only_positive": True,
    "reward_death_value": 10,
    "reward_win": 200,
    "reward_defeat": 0,
    "reward_scale": True,
    "reward_scale_rate": 20,
    # The datasets have False here. True changes neither the game nor the reward: it only makes
    # SMAC say when the time limit, and not the battle, ended an episode.
    "continuing_episode": True,
}
# Of SMACv2's own examples (sc2_gen_RACE.yaml): unit types, how often they come, and which of them
# cannot make up a whole army.
SMACV2_UNITS = {
    "protoss": (("stalker", "zealot", "colossus"), (0.45, 0.45, 0.1), ()),
    "terran": (("marine", "marauder", "medivac"), (0.45, 0.45, 0.1), ("medivac",)),
    "zerg": (("zergling", "baneling", "hydralisk"), (0.45, 0.1, 0.45), ("baneling",)),
}
SMACV2_SETTINGS = SMAC_SETTINGS | {
    "conic_fov": False,
    "obs_own_pos": True,
    "use_unit_ranges": True,
    "min_attack_range": 2,
    "num_fov_actions": 12,
    "prob_obs_enemy": 1.0,
    "action_mask": True,
}


def starcraft_folder() -> Path:
    """Where PySC2 looks for StarCraft II: $SC2PATH, or its default place."""
    usual = {"darwin": "/Applications/StarCraft II", "win32": "C:/Program Files (x86)/StarCraft II"}
    return Path(os.environ.get("SC2PATH") or usual.get(sys.platform, "~/StarCraftII")).expanduser()


def starcraft_present() -> bool:
    """Is StarCraft II installed? Looks at the disk only, imports nothing."""
    return any((starcraft_folder() / "Versions").glob("Base*/SC2*"))


def require_starcraft(map_file: str) -> None:
    """Check that the game and this map of SMAC's are installed.

    Raises:
        FileNotFoundError: one sentence: what is missing, and where it belongs.
    """
    folder = starcraft_folder()
    if not starcraft_present():
        raise FileNotFoundError(
            f"StarCraft II is not in {folder} (no Versions/Base*/SC2*): install it (Linux: 4.10 "
            "of https://github.com/Blizzard/s2client-proto#downloads) or set SC2PATH to its folder."
        )
    path = folder / "Maps" / "SMAC_Maps" / f"{map_file}.SC2Map"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: copy the folder SMAC_Maps of the package's sources "
            f"(env/starcraft2/maps) into {folder / 'Maps'}."
        )


@functools.cache
def _import_smac(package: str) -> tuple:
    """(class of the game, its registry of maps) of the package "smac" or "smacv2"."""
    other = {"smac": "smacv2", "smacv2": "smac"}[package]
    if f"{other}.env" in sys.modules:
        raise ImportError(
            f"{package} cannot be loaded beside {other}: both register maps of the same names in "
            "PySC2, which then starts neither. Play the two in separate processes."
        )
    where = f"pip install git+https://github.com/oxwhirl/{package}.git (README, StarCraft II)"
    found = importlib.util.find_spec(package)
    if found is not None and importlib.util.find_spec(f"{package}.env") is None:
        raise ImportError(
            f"The installed package {package!r} is not the StarCraft Multi-Agent Challenge, but "
            "another one of that name (a hyperparameter optimiser, which `pip install smac` "
            f"gives): pip uninstall {package}, then {where}."
        )
    try:
        env = importlib.import_module(f"{package}.env")
        registry = importlib.import_module(f"{package}.env.starcraft2.maps.smac_maps")
    except ImportError as e:
        raise ImportError(f"Backend {package} needs {where}; now: {e}.") from e
    except TypeError as e:  # what protobuf raises
        if "Descriptors cannot" not in str(e):
            raise
        raise ImportError(
            "StarCraft II's messages were generated for an older protobuf: pip install "
            "'protobuf<3.21', or set PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python."
        ) from e
    game = env.StarCraft2Env if package == "smac" else env.StarCraftCapabilityEnvWrapper
    return game, registry.get_smac_map_registry()


def _smac_arguments(env_id: str, registry: dict) -> dict:
    """What the game's class is called with, for a map of SMAC or a scenario of SMACv2."""
    match = SMACV2_ID.fullmatch(env_id)
    if match is None:
        if env_id not in registry:
            known = ", ".join(registry)
            raise ValueError(f"Unknown env_id {env_id!r}: SMAC has the maps {known}.")
        return {"map_name": env_id, **SMAC_SETTINGS}
    race, allies, enemies = match[1], int(match[2]), int(match[3])
    unit_types, weights, exceptions = SMACV2_UNITS[race]
    team = {
        "dist_type": "weighted_teams",
        "unit_types": list(unit_types),
        "weights": list(weights),
        "exception_unit_types": list(exceptions),
        "observe": True,
    }
    start = {"dist_type": "surrounded_and_reflect", "p": 0.5, "map_x": 32, "map_y": 32}
    sizes = {"n_units": allies, "n_enemies": enemies}
    config = {**sizes, "team_gen": team, "start_positions": start}
    return {"map_name": f"10gen_{race}", "capability_config": config, **SMACV2_SETTINGS}


class SmacEnv:
    """E parallel battles in StarCraft II, by SMAC or SMACv2; one process of the game a slot.

    The games start at the first `reset` (some seconds each); before, nothing but the package is
    needed. What a seed means here is less than elsewhere: the game takes one when its process
    starts, from (seed, k) of that first reset, and plays battle after battle from there on. A later
    `reset` starts each game's next battle, whatever its seed, so two evaluations do not meet the
    same battles; and SMACv2 draws armies and positions from generators that no seed reaches.
    """

    def __init__(self, env_id: str, num_envs: int, backend: str, seed: int):
        if num_envs > MOST_GAMES:
            raise ValueError(
                f"num_envs is {num_envs}: every slot is a process of StarCraft II, give at most "
                f"{MOST_GAMES}."
            )
        self._game, registry = _import_smac(backend)
        self._arguments = _smac_arguments(env_id, registry)
        self.map_file = registry[self._arguments["map_name"]].get("map_name", env_id)
        self.num_envs, self._seed, self._games = num_envs, seed, []
        self._over = np.zeros(num_envs, bool)
        info = self._start(0).get_env_info()  # no process yet
        self.spec = Spec(
            env_id=env_id,
            backend=backend,
            num_agents=info["n_agents"],
            obs_dim=info["obs_shape"],
            state_dim=info["state_shape"],
            action_dim=info["n_actions"],
            discrete=True,
            episode_limit=info["episode_limit"],
        )

    def _start(self, seed: int):
        # A copy: SMACv2 writes into its configuration.
        return self._game(**copy.deepcopy(self._arguments), seed=seed)

    def reset(self, seed: int | None = None) -> Step:
        """Start the next battle in every slot; the first call starts the games.

        Raises:
            FileNotFoundError: StarCraft II or the map is not installed.
        """
        if seed is not None:
            self._seed = seed
        if self._games and not self._over.all():
            # SMAC, asked to leave a game's first battle unfinished, would start a second process
            # and count the enemies' health twice in the scale of its rewards.
            self.close()
        if not self._games:
            require_starcraft(self.map_file)
            seeds = [np.random.SeedSequence((self._seed, k)) for k in range(self.num_envs)]
            self._games = [self._start(int(s.generate_state(1)[0])) for s in seeds]
        self._seed += 1
        for game in self._games:
            game.reset()  # SMACv2 returns nothing where it had to try twice: see _look
        looks = [self._look(game) for game in self._games]
        self._obs, self._state, self._avail = (np.stack(x) for x in zip(*looks, strict=True))
        self._over = np.zeros(self.num_envs, bool)
        nothing = np.zeros(self.num_envs, bool)
        return self._show(np.zeros(self.num_envs, np.float32), nothing, nothing, nothing)

    def step(self, actions: np.ndarray) -> Step:
        """Advance every unfinished battle by one step; actions (E,N,A) one-hot.

        Raises:
            ValueError: an agent of an unfinished battle was given an action it may not take.
            ConnectionError: the game broke down in the middle of a battle.
        """
        actions = np.asarray(actions)
        choice = actions.argmax(-1)  # (E,N)
        allowed = np.take_along_axis(self._avail, choice[..., None], -1)[..., 0] > 0
        if (~allowed & ~self._over[:, None]).any():
            k, i = np.argwhere(~allowed & ~self._over[:, None])[0]
            raise ValueError(f"Slot {k}, agent {i}: action {choice[k, i]} is not available now.")
        reward = np.zeros(self.num_envs, np.float32)
        terminated, truncated, won = np.zeros((3, self.num_envs), bool)
        for k in np.flatnonzero(~self._over):
            game = self._games[k]
            reward[k], ended, info = game.step(choice[k].tolist())
            if not info:
                # SMAC has started the game anew, and says reward 0, over, and nothing else. That
                # would pass for a lost battle, and what this slot had earned cannot be taken back.
                raise ConnectionError(
                    f"StarCraft II broke down in the middle of a battle (slot {k}): nothing was "
                    "learned of how it would have ended; go on from the last checkpoint."
                )
            truncated[k] = info.get("episode_limit", False)
            terminated[k], won[k] = ended and not truncated[k], info["battle_won"]
            self._obs[k], self._state[k], self._avail[k] = self._look(game)
        self._over = self._over | terminated | truncated
        return self._show(reward, terminated, truncated, won)

    @staticmethod
    def _look(game) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """obs (N,O), state (S,) and avail (N,A) of one game, as it stands."""
        seen = (game.get_obs(), game.get_state(), game.get_avail_actions())
        return tuple(np.array(x, np.float32) for x in seen)

    def _show(self, reward, terminated, truncated, won) -> Step:
        seen = (self._obs.copy(), self._state.copy(), self._avail.copy())
        return Step(*seen, reward, terminated, truncated, won, self._over)

    def render(self) -> np.ndarray:
        """Picture of slot 0, allies blue and enemies green: (height,width,3) uint8.

        Drawn here from the units' positions: PySC2's own renderer does not load in Python >= 3.11.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Circle

        game, figure = self._games[0], Figure(figsize=(5, 5))
        canvas, ax = FigureCanvasAgg(figure), figure.add_subplot()
        ax.set(xlim=(0, game.map_x), ylim=(0, game.map_y), aspect="equal")
        for units, colour in ((game.agents, "blue"), (game.enemies, "green")):
            for unit in units.values():
                if unit.health > 0:
                    centre = (unit.pos.x, unit.pos.y)
                    alpha = 0.3 + 0.7 * unit.health / unit.health_max  # the wounded are pale
                    ax.add_patch(Circle(centre, unit.radius, color=colour, alpha=alpha))
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    def close(self) -> None:
        """End the games."""
        for game in self._games:
            game.close()
        self._games = []


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


# --------------------------------------------------------------------------------------------------
# Playing
# --------------------------------------------------------------------------------------------------


def evaluate(env, act: Callable, episodes: int, seed: int) -> dict:
    """Play whole episodes and report what they paid.

    Args:
        env: what `make` returns, E slots; the episodes are played in rounds of E.
        act: (obs (E,N,O), avail (E,N,A) or None) CPU tensors -> actions (E,N,A); greedy to compare.
        episodes: at least this many, rounded up to whole rounds.
        seed: round k starts from seed + k, so two policies meet the same battles (not so in
            StarCraft II itself, see `SmacEnv`).
    Returns:
        return_mean and its return_ci95 (half width, normal, undiscounted), win_rate (None where
        there is nothing to win) and episodes.
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
        "win_rate": None if env.spec.backend == "mamujoco" else float(wins.mean()),
        "episodes": len(returns),
    }


def random_policy(spec: Spec, seed: int) -> Callable:
    """Uniform over what may be done, or over [-1,1]: the floor every score is read against."""
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
    assert first == again, "the same seed must give the same battles"
    act, now, steps = random_policy(env.spec, 1), env.reset(seed=1), 0
    while not now.over.all():
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
    if sys.argv[1:2] == ["watch"] and Path(__file__).with_name("watch.py").exists():
        importlib.import_module("watch").cli(sys.argv[2:])  # by name: this file also runs alone
    elif sys.argv[1:]:
        sys.exit("envs.py: `watch RUN_DIR`, which needs watch.py beside this file, or no argument.")
    else:
        _self_check()
