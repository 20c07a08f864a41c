"""The GIF of a run's policy: its frames, its size, and the errors where there is none to show."""

import io
import types

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import envs
import train
from experiment import __main__ as command
from experiment import imagined, watch
from macql import Actor
from simulators import mamujoco
from simulators.battle import SIDE, TOP, living_of_smax


def save_run(folder, env_id: str, obs_dim: int | None = None, backend: str = "smax", actions=None):
    """A run's folder with the checkpoint of an untrained policy; returns that policy."""
    spec = envs.make(env_id).spec
    torch.manual_seed(1)
    shape = (spec.num_agents, obs_dim or spec.obs_dim)
    mean, std = torch.zeros(shape), torch.ones(shape)
    actor = Actor(mean, std, actions or spec.action_dim, 8, spec.discrete, False)
    args = {"env_id": env_id, "backend": "auto", "hidden": 8, "shared_actor": False}
    learner = {"actor": {}, "ema_actor": actor.state_dict()}
    rng = torch.Generator().get_state()
    stored = {"args": args, "backend": backend, "learner": learner, "rng": rng}
    torch.save(stored, folder / "checkpoint.pt")
    return actor


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


class Film:
    """An environment of one episode of `length` steps, whose n-th frame has brightness n."""

    def __init__(self, length: int):
        self.length = length
        self.spec = types.SimpleNamespace(env_id="film", episode_limit=40)

    def reset(self, seed):
        self.now = 0
        return self.step(None, 0)

    def step(self, actions, count=1):
        self.now += count
        done = np.array([self.now == self.length])
        return types.SimpleNamespace(done=done, obs=np.zeros((1, 1, 1)), avail=None)

    def render(self):
        return np.full((4, 4, 3), self.now, np.uint8)


@pytest.mark.parametrize("length, stride", [(5, 1), (8, 1), (20, 4), (200, 32)])
def test_long_episodes_are_thinned_and_keep_their_end(length, stride):
    actor = types.SimpleNamespace(greedy=lambda obs, avail: torch.zeros(1, 1, 1))
    frames = watch.play(Film(length), actor, seed=0, budget=10)
    shown = [int(f[0, 0, 0]) for f in frames]
    assert len(frames) <= 10 and shown[0] == 0 and shown[-1] == length
    assert shown[:-1] == list(range(0, length, stride))


def test_a_gif_keeps_order_shape_and_colours():
    frames = np.zeros((12, 60, 120, 3), np.uint8)
    for k in range(12):
        frames[k, :, 10 * k : 10 * k + 10] = (250, 40, 10)
    image = opened(watch.gif([list(frames[:5]), list(frames[5:])]))
    assert image.n_frames == 12 and image.size == (120, 60)
    for k in range(12):
        image.seek(k)
        shown = np.asarray(image.convert("RGB")).astype(int)
        assert abs(shown[30, 10 * k + 5] - [250, 40, 10]).max() < 30
        assert image.info["duration"] == (watch.LAST if k in (4, 11) else watch.MILLISECONDS)
    noise = np.random.default_rng(0).integers(0, 255, (20, 40, 40, 3), np.uint8)
    assert opened(watch.gif([list(noise)])).n_frames == 20


def test_a_smax_episode_becomes_a_small_moving_gif(tmp_path, capfd):
    save_run(tmp_path, "3m")
    command.cli(["watch", str(tmp_path), "--episodes", "1"])
    data = (tmp_path / "watch.gif").read_bytes()
    image = opened(data)
    assert image.format == "GIF" and image.is_animated and 1 < image.n_frames <= watch.MOST_FRAMES
    assert image.size == (SIDE, SIDE + TOP) and len(data) < 400 * 1024
    assert f"wrote {tmp_path / 'watch.gif'}" in capfd.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "watch.gif"]


def test_a_robot_episode_becomes_a_small_moving_gif(tmp_path):
    pytest.importorskip("gymnasium_robotics", reason="needs gymnasium-robotics (README)")
    save_run(tmp_path, "Hopper-3x1", backend="mamujoco")
    out = tmp_path / "new" / "hopper.gif"
    try:
        assert watch.watch(tmp_path, episodes=2, out=out) == out
    except OSError as e:
        assert not out.exists()
        pytest.skip(str(e))
    image = opened(out.read_bytes())
    assert image.n_frames > 4 and image.size == (mamujoco.SIDE, mamujoco.SIDE)
    assert out.stat().st_size < 400 * 1024


def test_the_policy_is_the_checkpoint_s_ema_actor(tmp_path):
    saved = save_run(tmp_path, "3m")
    stored = watch.read_policy(tmp_path)
    assert (stored["args"]["env_id"], stored["backend"]) == ("3m", "smax")
    actor = watch.make_actor(tmp_path, stored, envs.make("3m").spec)
    obs, avail = torch.randn(4, *saved.standardise.mean.shape), torch.ones(4, 3, 8)
    assert torch.equal(actor.greedy(obs, avail), saved.greedy(obs, avail))


def test_the_checkpoint_s_backend_is_played(tmp_path, monkeypatch):
    save_run(tmp_path, "3m", backend="smac")

    def make(env_id, num_envs, backend, render):
        raise ImportError(f"{env_id} {num_envs} {backend} {render}")

    monkeypatch.setattr(envs, "make", make)
    with pytest.raises(ImportError, match="3m 1 smac True"):
        watch.watch(tmp_path)


def test_what_cannot_be_watched_is_told_in_one_sentence(tmp_path):
    def told(**options) -> str:
        with pytest.raises((ValueError, OSError)) as error:
            watch.watch(tmp_path, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is not a run" in told() and "--episodes is 0" in told(episodes=0)
    (tmp_path / "metrics.csv").touch()
    assert "has no checkpoint yet" in told()
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert "checkpoint of this program" in told()
    torch.save({"weights": 1}, tmp_path / "checkpoint.pt")
    assert "checkpoint of this program" in told()
    save_run(tmp_path, "3m", obs_dim=30)
    assert "(agents, observation size) (3, 30), but 3m on smax has (3, 55)" in told()
    save_run(tmp_path, "3m", actions=5)
    assert "is not a macql.Actor for 3m on smax" in told()
    save_run(tmp_path, "3m", backend="offline")
    assert "without a simulator" in told()
    assert not (tmp_path / "watch.gif").exists()


def test_the_command_ends_with_the_sentence(tmp_path):
    with pytest.raises(SystemExit, match="python -m experiment: .* is not a run: give the folder"):
        command.cli(["watch", str(tmp_path / "nothing")])


# -------------------------------------------------------------------- what the world model imagines


def test_a_recorded_episode_beside_the_imagined_one(dataset, tmp_path, undrawn):
    flags = [*TINY, "--dataset", str(dataset), "--out", str(tmp_path)]
    train.cli([*flags, "--updates", "2", "--eval-every", "2"])
    command.cli(["watch", str(tmp_path), "--imagined", "--steps", "4"])
    image = opened((tmp_path / "imagined.gif").read_bytes())
    height = imagined.WIDTH * (SIDE + TOP) // SIDE
    assert image.n_frames == 5 and image.size == (2 * imagined.WIDTH, height + imagined.LINE)
    first = np.asarray(image.convert("RGB")).astype(int)[TOP:height]
    left, right = first[:, : imagined.WIDTH], first[:, imagined.WIDTH :]
    assert np.array_equal(left, right)  # they start in the same state, ...
    image.seek(4)
    last = np.asarray(image.convert("RGB")).astype(int)[TOP:height]
    assert not np.array_equal(last[:, : imagined.WIDTH], left)  # ... and both go on
    with pytest.raises(SystemExit, match="no held-out episode is as long; give fewer"):
        command.cli(["watch", str(tmp_path), "--imagined", "--steps", "101"])
    (tmp_path / "final.json").unlink()  # else a run with other flags does not replace it
    train.cli([*flags, "--updates", "2", "--eval-every", "2", "--synthetic-fraction", "0"])
    with pytest.raises(SystemExit, match="was trained without a world model"):
        command.cli(["watch", str(tmp_path), "--imagined"])


def test_states_show_the_units_that_the_simulator_has():
    env = envs.make("3s_vs_5z", 8)  # of which slot 0 is shown
    act, now = envs.random_policy(env.spec, 0), env.reset(seed=1)
    while not now.done[0]:
        now = env.step(act(torch.tensor(now.obs), torch.tensor(now.avail)).numpy())
        units, shown = env.units(), living_of_smax(env._env, now.state[0])
        alive = [unit._replace(target=None) for unit in units if unit.health > 0.01]
        np.testing.assert_allclose([u[:4] for u in shown], [u[:4] for u in alive], rtol=1e-6)
        assert [u[4:] for u in shown] == [u[4:] for u in alive]
        targets = [u.target for u in units if u.target is not None]
        assert all(units[k].ours != u.ours for u in units if (k := u.target) is not None)
    assert targets, "at the end of a battle somebody attacks"
    ours = [u for u in units if u.ours and u.health > 0]
    assert now.won[0] == bool(ours) or not now.terminated[0]


def test_uncertainty_reddens_the_line_below():
    picture = np.zeros((10, 10, 3), np.uint8)
    frames = [
        imagined.side_by_side(picture, picture, 1, u=1.0, red=red, over=False)
        for red in (0.0, 0.5, 1.0)
    ]
    seen = [tuple(f[-3, -3]) for f in frames]
    assert seen == [(255, 255, 255), (255, 128, 128), (255, 0, 0)]


def test_a_robot_in_a_film_moves_as_its_velocity_says(monkeypatch):
    pytest.importorskip("gymnasium_robotics", reason="needs gymnasium-robotics (README)")
    env = envs.make("HalfCheetah-6x1")
    robot, now, states, places = env.robots[0].unwrapped, env.reset(seed=1), [], []
    for _ in range(40):
        states.append(now.state[0])
        places.append(robot.data.qpos[0])
        now = env.step(np.ones((1, 6, 1)))
    positions, velocities = env.inside(np.array(states))
    assert env.ground == 1 and positions.shape[1] == robot.model.nq
    assert np.allclose(positions[-1, 1:], states[-1][:8], atol=1e-6)
    assert np.allclose(velocities[-1], states[-1][8:], atol=1e-6)
    monkeypatch.setattr(env, "render", lambda: robot.data.qpos.copy())
    (film,) = env.film(np.array(states))
    shown = np.array(film)
    assert np.allclose(shown[:, 1:], positions[:, 1:], atol=1e-6) and np.ptp(places) > 0.2
    assert np.abs(shown[:, 0] - (np.array(places) - places[0])).max() < 0.05


def test_a_checkpoint_from_before_a_flag_is_one_sentence(dataset):
    data = train.load_dataset(dataset, torch.device("cpu"))[0]
    with pytest.raises(ValueError, match="its world model is not a LogoWM: 'observe'"):
        flags = vars(train.Args())
        imagined.make_model({k: flags[k] for k in flags if k != "observe"}, data, {})
