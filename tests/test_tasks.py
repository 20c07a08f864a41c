"""Every task and quality of the paper, and data that no simulator here plays."""

import json
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import TINY

import datasets
import envs
import train
from behaviour.record import record
from simulators import mamujoco

STARCRAFT = Path(__file__).resolve().parents[2] / "shared" / "data" / "smac_3m_medium.h5"
ONE = [*TINY, "--updates", "1", "--wm-updates", "1", "--eval-every", "1", "--eval-episodes", "2"]
PLAYERS = {"medium": 1, "medium-replay": 5, "expert": 1, "mixed": 2}
SHORT = 150  # steps


def stop_sooner(robot: str, monkeypatch) -> None:
    """Truncate its episodes after SHORT steps instead of 1000, which take twenty seconds."""
    spec = mamujoco._import_mujoco()[0].spec(f"{robot}-v5")
    assert spec.max_episode_steps == 1000
    monkeypatch.setattr(spec, "max_episode_steps", SHORT)


@pytest.mark.parametrize("env_id", envs.PAPER_SMAC + envs.PAPER_MUJOCO)
def test_one_update_of_every_quality(env_id, tmp_path, monkeypatch, undrawn):
    """4 qualities of each of the 8 tasks: recorded with the shipped policies; trained and played on
    one of them, because the others' rows have the same shapes."""
    returns = {}
    if env_id in ("Ant-2x4", "HalfCheetah-6x1"):  # these do not fall, or late
        stop_sooner(env_id.partition("-")[0], monkeypatch)
    slots = 1 if envs.is_robot(env_id) else 2  # side by side
    slots = 8 if env_id == "3s_vs_5z" else slots  # for which conftest.py has compiled it
    for quality, players in PLAYERS.items():
        path = tmp_path / f"{quality}.h5"
        record(env_id, quality, max(2, slots * players), seed=0, path=path)
        columns, lengths, metadata = datasets.read_episodes(path)
        assert metadata["quality"] == quality and metadata["env_id"] == env_id
        steps = np.repeat(np.arange(len(lengths)), lengths + 1)  # the last row of each pays nothing
        returns[quality] = np.bincount(steps, columns["reward"]).mean()
        if quality != "expert":
            continue
        final = train.cli(
            [*ONE, "--env-id", env_id, "--quality", quality, "--dataset", str(path)]
            + ["--out", str(tmp_path / quality), "--eval-episodes", str(slots)]
        )
        assert final["dataset"]["quality"] == quality
        assert final["backend"] == ("mamujoco" if env_id in envs.PAPER_MUJOCO else "smax")
        assert final["eval"]["episodes"] == slots
        assert final["args"]["gamma"] == train.defaults(env_id).gamma
        assert final["dataset"]["return_mean"] == pytest.approx(returns[quality], rel=1e-5)
    assert returns["expert"] > returns["medium-replay"]


@pytest.fixture(scope="module")
def starcraft(tmp_path_factory) -> Path:
    """The first 300 of its 2,000 episodes; all of them are read in test_datasets_episodes.py."""
    if not STARCRAFT.exists():
        pytest.skip("the public recording of StarCraft II's 3m does not lie beside the project")
    path = tmp_path_factory.mktemp("starcraft") / "3m.h5"
    with h5py.File(STARCRAFT) as whole, h5py.File(path, "w") as part:
        for key, column in whole.items():
            part[key] = column[:300]
    return path


@pytest.fixture(scope="module")
def starcraft_run(starcraft, tmp_path_factory):
    out = tmp_path_factory.mktemp("starcraft") / "run"
    flags = ["--env-id", "3m", "--dataset", str(starcraft), "--out", str(out)]
    enough = "--updates 20 --wm-updates 100 --hidden 64 --wm-batch-size 64 --lr 0.003"
    return train.cli([*TINY, *flags, *enough.split()]), out


def test_starcraft_data_train_without_the_game(starcraft, starcraft_run):
    final, out = starcraft_run
    assert final["backend"] == "offline" and final["eval"] is None and final["clone"] is None
    assert final["world_model"]["state_mse"] < final["world_model"]["persistence_state_mse"]
    assert 0 < final["offline"]["clone_agreement"] <= 1
    assert final["offline"]["return_to_go"] == pytest.approx(
        returns_to_go_by_hand(starcraft, final["args"]["gamma"]), rel=1e-4
    )
    assert json.loads((out / "final.json").read_text()) == final
    assert (out / "run.png").stat().st_size > 1000


def returns_to_go_by_hand(path: Path, gamma: float) -> float:
    data, _ = datasets.load_dataset(path, torch.device("cpu"))
    held_out, total = set(data.held_out.tolist()), []
    start = 0
    for length in data.lengths.tolist():
        if start in held_out:
            reward = data.reward[start : start + length].double()
            for t in range(length):
                weights = gamma ** torch.arange(length - t, dtype=torch.float64)
                total.append(float((reward[t:] * weights).sum()))
        start += length + 1
    return sum(total) / len(total)


def test_a_run_without_a_simulator_says_so(starcraft, capsys, tmp_path, undrawn):
    flags = ["--env-id", "3m", "--dataset", str(starcraft), "--out", str(tmp_path / "run")]
    train.cli([*ONE, *flags])
    said = capsys.readouterr().out
    assert "no simulator" in said and "no episode was played" in said


def test_a_simulator_of_other_sizes_is_refused(starcraft, tmp_path):
    flags = ["--env-id", "3m", "--dataset", str(starcraft), "--backend", "smax"]
    with pytest.raises(SystemExit, match=r"these must agree \(--env-id, --backend"):
        train.cli([*ONE, *flags, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize(
    "flags",
    ["--env-id HalfCheetah-6x1 --backend smax", "--env-id 3s_vs_5z --backend smacv2",
     "--env-id terran_5_vs_5", "--env-id 3m --backend smac"],
)  # fmt: skip
def test_what_nothing_can_play_is_refused_first(flags, tmp_path):
    with pytest.raises(SystemExit, match="cannot play|needs --dataset FILE"):
        train.cli([*ONE, *flags.split(), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_half_installed_game_stops_who_asks_for_it(starcraft, monkeypatch, tmp_path, undrawn):
    """StarCraft II is there, its Python package is not: auto goes on without, smac says why."""
    (tmp_path / "Versions" / "Base75689").mkdir(parents=True)
    (tmp_path / "Versions" / "Base75689" / "SC2_x64").touch()
    monkeypatch.setenv("SC2PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "smac", None)
    monkeypatch.setitem(sys.modules, "smac.env", None)
    flags = ["--env-id", "3m", "--dataset", str(starcraft), "--out", str(tmp_path / "run")]
    assert train.cli([*ONE, *flags])["backend"] == "offline"
    with pytest.raises(SystemExit, match="smac"):
        train.cli([*ONE, *flags, "--backend", "smac"])
