"""StarCraft II itself as an environment of envs.py: SMAC's maps and SMACv2's scenarios.

  make("3s_vs_5z", num_envs=4, backend="smac")      as in the public datasets
  make("terran_5_vs_5", num_envs=4)                 SMACv2, with random armies and positions

The game, its maps and the packages are installed by hand (README, The real game) and looked for
only when they are asked for. Without the game everything up to the first reset works.

Sizes: E parallel battles, N agents, O observation, S state, A actions.
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

MOST_GAMES = 32  # StarCraft II takes about a gigabyte of memory a process
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
    where = f"pip install git+https://github.com/oxwhirl/{package}.git (README, The real game)"
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
