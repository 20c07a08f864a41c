"""StarCraft II behind the interface of envs.py: the calls to SMAC, and what its answers become.

The tests do not need the game. `Game` below is a stub of SMAC's `StarCraft2Env` with the behaviour
that the adapter relies on: sizes before any process, one process per game, actions that are not
available refused, and every way in which an episode can end. The last section needs the sources of
SMAC and SMACv2 (and PySC2) and replaces only the process of the game.
"""

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageColor

import envs
from simulators import battle, starcraft

SIZES = {  # map: agents, observation, state, actions, episode limit
    "2s3z": (5, 80, 120, 11, 120),
    "3s_vs_5z": (3, 48, 68, 11, 250),
    "5m_vs_6m": (5, 55, 98, 12, 70),
    "6h_vs_8z": (6, 78, 140, 14, 150),
    "3s5z_vs_3s6z": (8, 136, 230, 15, 170),
}
AGENTS, ENEMIES, LIMIT = 2, 3, 6
ACTIONS = 6 + ENEMIES
STOP, ATTACK = 1, 6


class Game:
    """A game in which every attack costs the enemy one of four points of health.

    Each ally has three points and loses one when it stops. Only living allies may act, dead ones
    have the no-op alone; the enemy can be attacked while it lives.
    """

    made, breaks_at = [], None

    def __init__(self, map_name, seed=None, continuing_episode=False, **settings):
        self.map_name, self.seed, self.says_limit = map_name, seed, continuing_episode
        self.settings, self.processes, self.episodes, self.closed = settings, 0, 0, False
        self.n_agents, self.episode_limit = AGENTS, LIMIT
        Game.made.append(self)

    def get_env_info(self):
        return {
            "state_shape": 2, "obs_shape": 3, "n_actions": ACTIONS, "n_agents": AGENTS,
            "episode_limit": LIMIT, "agent_features": ["health"], "enemy_features": ["health"],
        }  # fmt: skip

    def reset(self):
        if self.episodes == 0:
            self.processes += 1
        self.steps, self.enemy, self.health = 0, 4, [3] * AGENTS
        return self.get_obs(), self.get_state()

    def get_obs(self):
        return [np.array([h, self.enemy, self.steps], np.float32) for h in self.health]

    def get_state(self):
        return np.array([self.enemy, self.steps], np.float32)

    def get_avail_actions(self):
        alive = [0, *[1] * 5, *[int(self.enemy > 0)] * ENEMIES]
        return [alive if h > 0 else [1, *[0] * (ACTIONS - 1)] for h in self.health]

    def step(self, actions):
        allowed = self.get_avail_actions()
        for i, a in enumerate(actions):
            assert allowed[i][a] == 1, f"Agent {i} cannot perform action {a}"
        if self.steps == self.breaks_at:
            self.processes += 1
            return 0, True, {}
        self.steps += 1
        self.enemy -= sum(a >= ATTACK for a in actions)
        self.health = [h - (a == STOP) for h, a in zip(self.health, actions, strict=True)]
        info = {"battle_won": False, "dead_allies": 0, "dead_enemies": 0}
        decided = self.enemy <= 0 or not any(h > 0 for h in self.health)
        info["battle_won"] = self.enemy <= 0
        if not decided and self.steps >= LIMIT and self.says_limit:
            info["episode_limit"] = True
        ended = decided or self.steps >= LIMIT
        self.episodes += ended
        return 1.0 + 10 * info["battle_won"], ended, info

    def close(self):
        self.closed = True


class WrappedGame(Game):
    """SMACv2's wrapper: it writes into its configuration, and its `reset` may return None."""

    def __init__(self, capability_config, **kwargs):
        assert "env_key" not in capability_config["team_gen"], "two games share this configuration"
        capability_config["team_gen"]["env_key"] = "team_gen"
        super().__init__(**kwargs)
        self.config = capability_config

    def reset(self):
        super().reset()


def install(monkeypatch, name: str) -> None:
    """Put a package `smac` or `smacv2` in place whose environment is `Game`."""
    flat = {f"10gen_{r}": {"map_name": "32x32_flat"} for r in ("protoss", "terran", "zerg")}
    maps = {"3s_vs_5z": {}, "2s3z": {}} if name == "smac" else flat
    games = {"StarCraft2Env": Game, "StarCraftCapabilityEnvWrapper": WrappedGame}
    parts = {"": {}, ".env": games, ".env.starcraft2": {}, ".env.starcraft2.maps": {},
             ".env.starcraft2.maps.smac_maps": {"get_smac_map_registry": lambda: maps}}  # fmt: skip
    for part, contents in parts.items():
        module = types.ModuleType(name + part)
        module.__spec__ = importlib.machinery.ModuleSpec(name + part, None, is_package=True)
        module.__path__ = []
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name + part, module)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Every test starts with neither package loaded."""
    starcraft._import_smac.cache_clear()
    for name in ("smac.env", "smacv2.env"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    starcraft._import_smac.cache_clear()


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A folder that looks like an installation of the game with two maps."""
    (tmp_path / "Versions" / "Base75689").mkdir(parents=True)
    (tmp_path / "Versions" / "Base75689" / "SC2_x64").touch()
    (tmp_path / "Maps" / "SMAC_Maps").mkdir(parents=True)
    for name in ("3s_vs_5z", "32x32_flat"):
        (tmp_path / "Maps" / "SMAC_Maps" / f"{name}.SC2Map").touch()
    monkeypatch.setenv("SC2PATH", str(tmp_path))
    return tmp_path


@pytest.fixture
def smac(monkeypatch, installed):
    install(monkeypatch, "smac")
    monkeypatch.setattr(Game, "made", [])
    monkeypatch.setattr(Game, "breaks_at", None)


@pytest.fixture
def env(smac):
    return envs.make("3s_vs_5z", num_envs=2, backend="smac", seed=5)


def one_hot(*choices) -> np.ndarray:
    """Action ids (E,N) -> (E,N,A)."""
    return np.eye(ACTIONS, dtype=np.float32)[np.array(choices)]


# ---------------------------------------------------------------------------------------- making


def test_spec_needs_no_process_of_the_game(env):
    assert env.spec == envs.Spec("3s_vs_5z", "smac", AGENTS, 3, 2, ACTIONS, True, LIMIT)
    assert [game.processes for game in Game.made] == [0]


def test_settings_are_those_of_the_datasets(env):
    (game,) = Game.made
    assert game.settings == {
        "difficulty": "7", "step_mul": 8, "move_amount": 2, "obs_all_health": True,
        "obs_own_health": True, "obs_last_action": False, "state_last_action": True,
        "reward_only_positive": True, "reward_death_value": 10, "reward_win": 200,
        "reward_defeat": 0, "reward_scale": True, "reward_scale_rate": 20,
    }  # fmt: skip


def test_smacv2_scenarios_have_their_own_armies(monkeypatch, installed):
    install(monkeypatch, "smacv2")
    monkeypatch.setattr(Game, "made", [])
    env = envs.make("terran_10_vs_11", num_envs=2)  # `auto` recognises the name
    assert env.spec.backend == "smacv2"
    now = env.reset()
    assert now.obs.shape == (2, AGENTS, 3) and len(Game.made) == 3
    for game in Game.made:
        assert game.map_name == "10gen_terran" and game.settings["use_unit_ranges"] is True
        config = game.config
        assert (config["n_units"], config["n_enemies"]) == (10, 11)
        assert config["team_gen"]["unit_types"] == ["marine", "marauder", "medivac"]
        assert config["team_gen"]["exception_unit_types"] == ["medivac"]
        assert config["start_positions"]["dist_type"] == "surrounded_and_reflect"


@pytest.mark.parametrize(
    "env_id, backend, sentence",
    [
        ("3s_vs_5z", "mamujoco", "mamujoco cannot play '3s_vs_5z': it plays divided robots"),
        ("3s_vs_5z", "smacv2", "smacv2 cannot play '3s_vs_5z'.*other observations.*backend smac"),
        ("terran_5_vs_5", "smac", "smac cannot play 'terran_5_vs_5': it plays SMAC's maps"),
        ("terran_5_vs_5", "smax", "smax cannot play 'terran_5_vs_5'"),
        ("Hopper-3x1", "smac", "smac cannot play 'Hopper-3x1'"),
        ("Hopper-3x1", "smax", "smax cannot play 'Hopper-3x1'"),
        ("9x_vs_9y", "smac", "Unknown env_id '9x_vs_9y': SMAC has the maps 3s_vs_5z, 2s3z"),
        ("3s_vs_5z", "sc2", "Unknown backend 'sc2': choose one of auto, smax, smac, smacv2, mamu"),
    ],
)
def test_backend_refuses_tasks_of_other_backends(smac, env_id, backend, sentence):
    with pytest.raises(ValueError, match=sentence):
        envs.make(env_id, backend=backend)


def test_too_many_games_are_refused(smac):
    with pytest.raises(ValueError, match="num_envs is 512: every slot is a process.*at most 32"):
        envs.make("3s_vs_5z", num_envs=512, backend="smac")


def test_smac_and_smacv2_are_not_loaded_together(monkeypatch, smac):
    install(monkeypatch, "smacv2")
    with pytest.raises(ImportError, match="smac cannot be loaded beside smacv2.*separate"):
        envs.make("3s_vs_5z", backend="smac")


# ------------------------------------------------------------------------- missing installations


def test_missing_game_or_map_is_told_at_once(smac, installed, monkeypatch):
    with pytest.raises(FileNotFoundError, match="2s3z.SC2Map is missing: copy the folder SMAC_Ma"):
        envs.make("2s3z", backend="smac")
    (installed / "Versions" / "Base75689" / "SC2_x64").unlink()
    with pytest.raises(
        FileNotFoundError, match="StarCraft II is not in .*install it.*SC2PATH.*docs/star"
    ):
        envs.make("3s_vs_5z", backend="smac")
    assert all(game.processes == 0 for game in Game.made)


def test_starcraft_present_looks_where_pysc2_looks(installed, monkeypatch, tmp_path_factory):
    assert starcraft.starcraft_present()
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(sys, "platform", "linux")
    for unset in ("", None):
        monkeypatch.setenv("SC2PATH", unset) if unset is not None else monkeypatch.delenv("SC2PATH")
        assert (
            not starcraft.starcraft_present()
            and starcraft.starcraft_folder() == home / "StarCraftII"
        )
    (home / "StarCraftII" / "Versions" / "Base1" / "SC2.app").mkdir(parents=True)
    assert starcraft.starcraft_present()


def hide(monkeypatch, name: str) -> None:
    """Make a package appear not to be installed."""
    for loaded in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, loaded)
    real = importlib.util.find_spec
    found = {name: None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: found[n] if n in found else real(n, *a)
    )


@pytest.mark.parametrize("env_id, name", [("3s_vs_5z", "smac"), ("zerg_5_vs_5", "smacv2")])
def test_missing_package_says_where_to_get_it(monkeypatch, env_id, name):
    hide(monkeypatch, "smac")
    hide(monkeypatch, "smacv2")
    monkeypatch.setitem(sys.modules, name, None)  # what makes `import` fail
    with pytest.raises(ImportError, match=rf"git\+https://github.com/oxwhirl/{name}.git"):
        envs.make(env_id, backend=name)


def test_the_other_package_named_smac_is_recognised(monkeypatch, tmp_path):
    hide(monkeypatch, "smacv2")
    for loaded in [m for m in sys.modules if m.partition(".")[0] == "smac"]:
        monkeypatch.delitem(sys.modules, loaded)
    (tmp_path / "smac").mkdir()
    (tmp_path / "smac" / "__init__.py").write_text("class HyperparameterOptimizationFacade: ...")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="not the StarCraft.*pip uninstall smac, then pip inst.*"):
        envs.make("3s_vs_5z", backend="smac")
    del sys.modules["smac"]  # not by monkeypatch, which would put it back


@pytest.mark.parametrize(
    "error, sentence",
    [("TypeError('Descriptors cannot be created directly.')", "protobuf<3.21"),
     ("ModuleNotFoundError('No module named pysc2')", "oxwhirl/smac.git.*No module named pysc2")],
)  # fmt: skip
def test_package_that_does_not_load_says_what_to_do(monkeypatch, tmp_path, error, sentence):
    for loaded in [m for m in sys.modules if m.partition(".")[0] in ("smac", "smacv2")]:
        monkeypatch.delitem(sys.modules, loaded)
    (tmp_path / "smac" / "env").mkdir(parents=True)
    (tmp_path / "smac" / "__init__.py").touch()
    (tmp_path / "smac" / "env" / "__init__.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=sentence):
        envs.make("3s_vs_5z", backend="smac")
    del sys.modules["smac"]  # not by monkeypatch, which would put it back


# -------------------------------------------------------------------------------------- episodes


def test_every_slot_has_its_own_game_and_seed(env, smac):
    env.reset(seed=7)
    first = [game.seed for game in env._games]
    assert len(set(first)) == 2 and all(0 <= s < 2**32 for s in first)
    assert [game.processes for game in env._games] == [1, 1]
    alone = envs.make("3s_vs_5z", num_envs=1, backend="smac")
    alone.reset(seed=7)  # slot 0's seed does not depend on how many there are
    assert [game.seed for game in alone._games] == first[:1]


def test_later_reset_starts_the_next_episode(env):
    env.reset(seed=7)
    games = list(env._games)
    for _ in range(2):
        env.step(one_hot([ATTACK, ATTACK], [ATTACK, ATTACK]))
    now = env.reset(seed=99)
    assert env._games == games and [game.processes for game in games] == [1, 1]
    assert not now.done.any() and (now.state == [[4, 0], [4, 0]]).all()


def test_reset_in_an_episode_starts_new_processes(env):
    env.reset(seed=7)
    games = list(env._games)
    env.step(one_hot([ATTACK, ATTACK], [ATTACK, ATTACK]))
    env.reset()
    assert all(game.closed for game in games)
    assert [game.processes for game in env._games] == [1, 1]


def test_won_lost_and_truncated_episodes(smac):
    env = envs.make("3s_vs_5z", num_envs=3, backend="smac")
    now = env.reset()
    assert now.obs.shape == (3, AGENTS, 3) and now.state.shape == (3, 2)
    assert now.avail.shape == (3, AGENTS, ACTIONS) and now.obs.dtype == np.float32
    ends, rewards = [], []
    act = [[ATTACK, ATTACK], [STOP, STOP], [2, 3]]
    for _ in range(LIMIT + 1):
        now = env.step(one_hot(*act))
        ends.append((now.terminated.tolist(), now.truncated.tolist(), now.won.tolist()))
        rewards.append(now.reward.tolist())
    quiet = [False] * 3
    assert ends[0] == (quiet, quiet, quiet)
    assert ends[1] == ([True, False, False], quiet, [True, False, False])
    assert ends[2] == ([False, True, False], quiet, quiet)
    assert ends[5] == (quiet, [False, False, True], quiet)
    assert ends[6] == (quiet, quiet, quiet) and now.done.all()
    # Finished episodes stand still and pay nothing, whatever the actions.
    assert np.array(rewards).T.tolist() == [[1, 11, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0],
                                            [1, 1, 1, 1, 1, 1, 0]]  # fmt: skip
    assert now.state.tolist() == [[0, 2], [4, 3], [4, 6]]
    assert [game.steps for game in env._games] == [2, 3, 6]


def test_end_at_the_time_limit_terminates(env):
    env.reset()
    act = one_hot([2, 2], [2, 2])
    for _ in range(LIMIT - 2):
        env.step(act)
    env.step(one_hot([ATTACK, ATTACK], [2, 2]))
    now = env.step(one_hot([ATTACK, ATTACK], [2, 2]))
    assert now.terminated.tolist() == [True, False] and now.truncated.tolist() == [False, True]
    assert now.won.tolist() == [True, False] and now.done.all()


def test_unavailable_action_is_refused_before_any_step(env):
    env.reset()
    with pytest.raises(ValueError, match="Slot 1, agent 0: action 0 is not available now"):
        env.step(one_hot([STOP, STOP], [0, STOP]))
    assert [game.steps for game in env._games] == [0, 0]


def test_crashed_game_is_an_error_and_not_a_defeat(env):
    env.reset()
    env.step(one_hot([2, 2], [2, 2]))
    Game.breaks_at = 1
    with pytest.raises(ConnectionError, match="crashed in the middle of an episode .slot 0"):
        env.step(one_hot([2, 2], [2, 2]))


def test_evaluate_runs_with_the_random_policy(env):
    result = envs.evaluate(env, envs.random_policy(env.spec, seed=0), episodes=6, seed=1)
    assert result["episodes"] == 6 and 0 <= result["win_rate"] <= 1
    assert result["return_mean"] >= 2


def test_render_draws_both_sides_and_close_ends_games(env):
    env.reset()
    games = list(env._games)
    for game in games:
        game.map_x = game.map_y = 32
        spots = [types.SimpleNamespace(x=5.0 * k, y=8.0) for k in (1, 2, 3)]
        units = [types.SimpleNamespace(pos=p, health=9 * (k > 0), health_max=10, radius=1.0)
                 for k, p in enumerate(spots)]  # fmt: skip
        game.agents, game.enemies = {0: units[0], 1: units[1]}, {0: units[2]}
    picture = env.render()
    assert picture.shape[-1] == 3 and picture.dtype == np.uint8
    bottom, sides = battle.SIDE + battle.TOP, (battle.OURS, battle.ENEMIES)
    discs = [[(picture[k] == ImageColor.getrgb(colour)).all() for colour in sides]
             for k in ((bottom - 120, 150), (bottom - 120, 225))]  # fmt: skip
    assert discs == [[True, False], [False, True]]  # where the units of both sides stand
    env.close()
    assert all(game.closed for game in games)


# ---------------------------------------------------------------------- SMAC's and SMACv2's code


def real(name: str) -> bool:
    """Are the sources of SMAC or SMACv2 installed, and PySC2?"""
    found = importlib.util.find_spec(name)
    folders = [] if found is None else found.submodule_search_locations or []
    whole = any((Path(folder) / "env" / "starcraft2").is_dir() for folder in folders)
    return whole and importlib.util.find_spec("pysc2") is not None


needs_smac = pytest.mark.skipif(not real("smac"), reason="needs the package SMAC")
needs_smacv2 = pytest.mark.skipif(not real("smacv2"), reason="needs the package SMACv2")


@pytest.fixture
def no_game(monkeypatch, tmp_path):
    monkeypatch.setenv("SC2PATH", str(tmp_path))


@needs_smac
@pytest.mark.parametrize("env_id", SIZES)
def test_paper_maps_have_their_sizes_in_smac(no_game, env_id):
    spec = starcraft.SmacEnv(env_id, 1, "smac", seed=0).spec
    sizes = (spec.num_agents, spec.obs_dim, spec.state_dim, spec.action_dim, spec.episode_limit)
    assert sizes == SIZES[env_id] and (spec.backend, spec.discrete) == ("smac", True)


@needs_smac
def test_smac_without_the_game_is_refused(no_game):
    with pytest.raises(FileNotFoundError, match="StarCraft II is not in"):
        envs.make("3s_vs_5z", backend="smac")
    with pytest.raises(ValueError, match="Unknown env_id '9x': SMAC has the maps 3m, 8m"):
        envs.make("9x", backend="smac")


@needs_smac
def test_settings_are_smacs_defaults_but_one(no_game):
    ours = starcraft.SmacEnv("3s_vs_5z", 1, "smac", seed=3)._start(3)
    theirs = type(ours)(map_name="3s_vs_5z", seed=3)
    plain = (bool, int, float, str)
    differ = {k for k, v in vars(theirs).items() if isinstance(v, plain) and v != getattr(ours, k)}
    assert differ == {"continuing_episode"}


@needs_smacv2
@pytest.mark.parametrize("race", ["protoss", "terran", "zerg"])
def test_smacv2_scenarios_have_their_sizes(no_game, monkeypatch, race):
    for allies, enemies in ((5, 5), (10, 11), (20, 23)):
        env = starcraft.SmacEnv(f"{race}_{allies}_vs_{enemies}", 1, "smacv2", seed=0)
        assert (env.spec.num_agents, env.spec.action_dim) == (allies, 6 + enemies)
        assert env.spec.episode_limit == 200 and env.map_file == "32x32_flat"


class Process:
    """Replaces SMAC's connection to the process of the game: units on a flat field.

    An attack takes 30 from its target, shields first. Each enemy takes 1 per step from the first
    living ally.
    """

    def __init__(self, allies: list[int], enemies: list[int], broken: list):
        from s2clientprotocol import raw_pb2, sc2api_pb2

        self.raw, self.api, self.broken = raw_pb2, sc2api_pb2, broken
        self.crew, self.units, self.tags = (allies, enemies), {}, 0
        self.spawn()

    def add(self, unit_type: int, owner: int, x: float, y: float) -> None:
        self.tags += 1
        self.units[self.tags] = self.raw.Unit(
            tag=self.tags, unit_type=unit_type, owner=owner, health=100, health_max=100, shield=50,
            shield_max=50, radius=0.5, pos={"x": x, "y": y, "z": 0.0},
        )  # fmt: skip

    def spawn(self) -> None:
        for owner, types_ in enumerate(self.crew, 1):
            for k, unit_type in enumerate(types_):
                self.add(unit_type, owner, 14.0 + 4 * (owner - 1), 14.0 + k)

    def data(self):
        return types.SimpleNamespace(units=[None] * 2000)

    def observe(self):
        seen = self.api.ResponseObservation()
        seen.observation.raw_data.units.extend(self.units.values())
        return seen

    def hurt(self, tag: int, much: float) -> None:
        unit = self.units[tag]
        unit.health -= max(0.0, much - unit.shield)
        unit.shield = max(0.0, unit.shield - much)
        if unit.health <= 0:
            del self.units[tag]

    def actions(self, request) -> None:
        for action in request.actions:
            command = action.action_raw.unit_command
            if command.ability_id == 23 and command.target_unit_tag in self.units:
                self.hurt(command.target_unit_tag, 30)

    def step(self, count: int) -> None:
        if self.broken:
            raise self.broken[0]
        if not self.units:
            return self.spawn()
        for unit in [u for u in self.units.values() if u.owner == 2 and count == 8]:
            allies = [t for t, u in self.units.items() if u.owner == 1]
            if allies and unit.tag in self.units:
                self.hurt(allies[0], 1)

    def debug(self, commands) -> None:
        for command in commands:
            for tag in command.kill_unit.tag:
                self.units.pop(tag, None)
            if command.HasField("create_unit"):
                new = command.create_unit
                self.add(new.unit_type, new.owner, new.pos.x, new.pos.y)


def replace_process(monkeypatch, game: type, allies: list[int], enemies: list[int]) -> list:
    """Make this class start a `Process`; an exception put into the returned list crashes it."""
    broken = []

    def launch(self):
        self._controller = Process(allies, enemies, broken)
        self._sc2_proc = types.SimpleNamespace(close=lambda: None)
        self.map_x = self.map_y = self.max_distance_x = self.max_distance_y = 32
        self.pathing_grid = np.ones((32, 32), bool)
        self.terrain_height = np.zeros((32, 32))

    monkeypatch.setattr(game, "_launch", launch)
    monkeypatch.setattr(starcraft, "require_starcraft", lambda map_file: None)
    return broken


def shoot(now: envs.Step) -> np.ndarray:
    """Attack the first enemy in reach, else stop; dead allies take the no-op."""
    can, alive = now.avail[..., ATTACK:], now.avail[..., STOP] > 0
    choice = np.where(can.any(-1), ATTACK + can.argmax(-1), np.where(alive, STOP, 0))
    return np.eye(now.avail.shape[-1], dtype=np.float32)[choice]


@needs_smac
def test_smacs_own_code_runs_through_the_adapter(monkeypatch):
    game, _ = starcraft._import_smac("smac")
    broken = replace_process(monkeypatch, game, [1990] * 3, [73] * 5)
    env = envs.make("3s_vs_5z", num_envs=2, backend="smac")
    for _ in range(2):  # two episodes of each game
        now, total = env.reset(seed=1), np.zeros(2)
        assert now.obs.shape == (2, 3, 48) and now.state.shape == (2, 68)
        assert now.avail.shape == (2, 3, 11) and np.isfinite(now.obs).all()
        while not now.done.all():
            now = env.step(shoot(now))
            total += now.reward
        assert now.terminated.all() and now.won.all() and not now.truncated.any()
        np.testing.assert_allclose(total, 20, atol=1e-4)  # the scale of the datasets
    picture = env.render()
    assert picture.ndim == 3 and picture.std() > 5
    env.reset()
    with pytest.raises(ValueError, match="Slot 0, agent 0: action 0 is not available"):
        env.step(np.eye(11)[np.zeros((2, 3), int)])
    from pysc2.lib import protocol

    broken.append(protocol.ProtocolError("the game is gone"))
    with pytest.raises(ConnectionError, match="crashed in the middle of an episode .slot 0"):
        env.step(np.eye(11)[np.full((2, 3), STOP)])


@needs_smac
def test_smacs_time_limit_truncates_and_defeat_terminates(monkeypatch):
    game, _ = starcraft._import_smac("smac")
    replace_process(monkeypatch, game, [1990] * 3, [73] * 5)
    env = envs.make("3s_vs_5z", backend="smac")
    wait = np.eye(11, dtype=np.float32)
    now, steps = env.reset(), 0
    while not now.done.all():
        alive = now.avail[..., STOP] > 0
        now, steps = env.step(wait[np.where(alive, STOP, 0)]), steps + 1
    assert steps == 90 and now.terminated[0] and not now.won[0]  # 3 x 150 points, 5 a step
    monkeypatch.setattr(Process, "hurt", lambda self, tag, much: None)
    now, steps = env.reset(), 0
    while not now.done.all():
        now, steps = env.step(wait[np.full((1, 3), STOP)]), steps + 1
    assert steps == env.spec.episode_limit == 250
    assert now.truncated[0] and not now.terminated[0] and not now.won[0]


@needs_smacv2
def test_smacv2s_own_code_runs_through_the_adapter(monkeypatch):
    import smacv2.env.starcraft2.starcraft2 as starcraft2

    replace_process(monkeypatch, starcraft2.StarCraft2Env, [], [])
    env = envs.make("zerg_5_vs_5", num_envs=2, backend="smacv2")
    act = envs.random_policy(env.spec, seed=0)
    result = envs.evaluate(env, act, episodes=4, seed=1)
    assert result["episodes"] == 4 and np.isfinite(result["return_mean"])
    now = env.reset()
    assert now.obs.shape == (2, 5, env.spec.obs_dim) and now.state.shape == (2, env.spec.state_dim)
