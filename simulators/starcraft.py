"""StarCraft II itself as an environment of envs.py: SMAC's maps and SMACv2's scenarios.

  envs.make("3s_vs_5z", num_envs=4, backend="smac")    # SMAC [Samvelyan et al., 2019]
  envs.make("terran_5_vs_5", num_envs=4)               # SMACv2 [Ellis et al., 2023]

The game, its maps and the packages are installed by hand (docs/starcraft.md) and looked for only
when an environment is made.

Sizes: E parallel episodes, N agents, O observation, S state, A actions.
"""

import copy
import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np

from envs import SMACV2_ID, Spec, Step
from simulators.battle import Unit, draw

MAX_GAMES = 32  # each is a process of StarCraft II, of about 1 GB of memory
# The settings of the public datasets [CFCQL, sc2.yaml], which are also SMAC's defaults.
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
    # The datasets have False here. True changes neither the game nor the reward; SMAC then reports
    # whether an episode was ended by the time limit.
    "continuing_episode": True,
}
# From SMACv2's examples (sc2_gen_RACE.yaml): unit types, their probabilities, and the types that
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
    """The folder in which PySC2 looks for StarCraft II: $SC2PATH, or PySC2's default."""
    usual = {"darwin": "/Applications/StarCraft II", "win32": "C:/Program Files (x86)/StarCraft II"}
    return Path(os.environ.get("SC2PATH") or usual.get(sys.platform, "~/StarCraftII")).expanduser()


def starcraft_present() -> bool:
    """Whether StarCraft II is installed; imports nothing."""
    return any((starcraft_folder() / "Versions").glob("Base*/SC2*"))


def require_starcraft(map_file: str) -> None:
    """Check that StarCraft II and the map `map_file` are installed.

    Raises:
        FileNotFoundError: says what is missing and where it belongs.
    """
    folder = starcraft_folder()
    if not starcraft_present():
        raise FileNotFoundError(
            f"StarCraft II is not in {folder} (no Versions/Base*/SC2*): install it or set SC2PATH "
            "to its folder, see docs/starcraft.md."
        )
    path = folder / "Maps" / "SMAC_Maps" / f"{map_file}.SC2Map"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: copy the folder SMAC_Maps of the package's sources "
            f"(env/starcraft2/maps) into {folder / 'Maps'}, see docs/starcraft.md."
        )


@functools.cache
def _import_smac(package: str) -> tuple:
    """The environment class and the registry of maps of the package "smac" or "smacv2".

    Raises:
        ImportError: the package, or one that it needs, is missing or does not load.
    """
    other = {"smac": "smacv2", "smacv2": "smac"}[package]
    if f"{other}.env" in sys.modules:
        raise ImportError(
            f"{package} cannot be loaded beside {other}: both register maps of the same names in "
            "PySC2, which then loads neither. Use the two in separate processes."
        )
    where = f"pip install git+https://github.com/oxwhirl/{package}.git (docs/starcraft.md)"
    found = importlib.util.find_spec(package)
    if found is not None and importlib.util.find_spec(f"{package}.env") is None:
        raise ImportError(
            f"The installed package {package!r} is not the StarCraft Multi-Agent Challenge but "
            "another package of that name (`pip install smac` installs a hyperparameter "
            f"optimiser): pip uninstall {package}, then {where}."
        )
    try:
        env = importlib.import_module(f"{package}.env")
        registry = importlib.import_module(f"{package}.env.starcraft2.maps.smac_maps")
    except ImportError as e:
        raise ImportError(f"Backend {package} needs {where}; the import failed: {e}.") from e
    except TypeError as e:  # raised by protobuf
        if "Descriptors cannot" not in str(e):
            raise
        raise ImportError(
            "PySC2 needs an older protobuf: pip install "
            "'protobuf<3.21', or set PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python."
        ) from e
    game = env.StarCraft2Env if package == "smac" else env.StarCraftCapabilityEnvWrapper
    return game, registry.get_smac_map_registry()


def _smac_arguments(env_id: str, registry: dict) -> dict:
    """Keyword arguments of the environment class for a SMAC map or a SMACv2 scenario."""
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
    """E parallel episodes in StarCraft II, by SMAC or SMACv2; every slot is a process of the game.

    The processes start at the first `reset`, some seconds each; before it only the package is
    needed. Seeds control less than in the other backends: a process takes one when it starts, made
    from (seed, slot) of the first reset, and then runs one episode after another. A later `reset`
    starts the next episode whatever its seed, so two evaluations do not see the same episodes.
    SMACv2 draws armies and positions from generators that no seed controls.
    """

    def __init__(self, env_id: str, num_envs: int, backend: str, seed: int):
        """See `envs.make`. backend: "smac" or "smacv2"."""
        if num_envs > MAX_GAMES:
            raise ValueError(
                f"num_envs is {num_envs}: every slot is a process of StarCraft II, give at most "
                f"{MAX_GAMES}."
            )
        self._game, registry = _import_smac(backend)
        self._arguments = _smac_arguments(env_id, registry)
        self.map_file = registry[self._arguments["map_name"]].get("map_name", env_id)
        self.num_envs, self._seed, self._games = num_envs, seed, []
        self._done = np.zeros(num_envs, bool)
        info = self._start(0).get_env_info()  # needs no process of the game
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
        """One environment of the package; its process of the game starts at its first reset."""
        # A copy, because SMACv2 writes into its configuration.
        return self._game(**copy.deepcopy(self._arguments), seed=seed)

    def reset(self, seed: int | None = None) -> Step:
        """Start the next episode in every slot; the first call starts the games.

        Raises:
            FileNotFoundError: StarCraft II or the map is not installed.
        """
        if seed is not None:
            self._seed = seed
        if self._games and not self._done.all():
            # If SMAC is reset during a game's first episode, it starts a second process and counts
            # the enemies' health twice in the scale of its rewards.
            self.close()
        if not self._games:
            require_starcraft(self.map_file)
            seeds = [np.random.SeedSequence((self._seed, k)) for k in range(self.num_envs)]
            self._games = [self._start(int(s.generate_state(1)[0])) for s in seeds]
        self._seed += 1
        self._steps = 0
        for game in self._games:
            game.reset()  # its result is not used: SMACv2 returns None if it had to try twice
        views = [self._look(game) for game in self._games]
        self._obs, self._state, self._avail = (np.stack(x) for x in zip(*views, strict=True))
        self._done = np.zeros(self.num_envs, bool)
        no = np.zeros(self.num_envs, bool)
        return self._show(np.zeros(self.num_envs, np.float32), no, no, no)

    def step(self, actions: np.ndarray) -> Step:
        """Advance every unfinished episode by one step; actions (E,N,A) one-hot.

        Raises:
            ValueError: an action in an unfinished episode is not available to its agent.
            ConnectionError: the game crashed in the middle of an episode.
        """
        actions = np.asarray(actions)
        choice = actions.argmax(-1)  # (E,N)
        allowed = np.take_along_axis(self._avail, choice[..., None], -1)[..., 0] > 0
        if (~allowed & ~self._done[:, None]).any():
            k, i = np.argwhere(~allowed & ~self._done[:, None])[0]
            raise ValueError(f"Slot {k}, agent {i}: action {choice[k, i]} is not available now.")
        self._steps += 1
        reward = np.zeros(self.num_envs, np.float32)
        terminated, truncated, won = np.zeros((3, self.num_envs), bool)
        for k in np.flatnonzero(~self._done):
            game = self._games[k]
            reward[k], done, info = game.step(choice[k].tolist())
            if not info:
                # SMAC has restarted a crashed game and returns reward 0, done and an empty info.
                # Taken as it is, this would count as a lost episode.
                raise ConnectionError(
                    f"StarCraft II crashed in the middle of an episode (slot {k}), whose result is "
                    "therefore unknown; continue from the last checkpoint."
                )
            truncated[k] = info.get("episode_limit", False)
            terminated[k], won[k] = done and not truncated[k], info["battle_won"]
            self._obs[k], self._state[k], self._avail[k] = self._look(game)
        self._done = self._done | terminated | truncated
        return self._show(reward, terminated, truncated, won)

    @staticmethod
    def _look(game) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """obs (N,O), state (S,) and avail (N,A) of one game now."""
        view = (game.get_obs(), game.get_state(), game.get_avail_actions())
        return tuple(np.array(x, np.float32) for x in view)

    def _show(self, reward, terminated, truncated, won) -> Step:
        view = (self._obs.copy(), self._state.copy(), self._avail.copy())
        return Step(*view, reward, terminated, truncated, won, self._done)

    def units(self) -> list[Unit]:
        """What slot 0 shows of every unit, ours first; whom they attack is unknown."""
        game = self._games[0]
        return [
            Unit(u.pos.x, u.pos.y, u.radius, u.health / u.health_max, ours, "", None)
            for ours, side in ((True, game.agents), (False, game.enemies))
            for u in side.values()
        ]

    def render(self) -> np.ndarray:
        """Picture of slot 0: (height,width,3) uint8.

        Drawn from the units' positions: PySC2's own renderer does not load in Python >= 3.11.
        """
        game = self._games[0]
        view = (0, 0, max(game.map_x, game.map_y))
        return draw(self.units(), view, self._steps, bool(self._done[0]))

    def close(self) -> None:
        """End the games."""
        for game in self._games:
            game.close()
        self._games = []
