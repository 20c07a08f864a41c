"""Every task and quality of the paper, data that no simulator here plays, and what fits what."""

import json
from pathlib import Path

import pytest
import torch

import collect
import datasets
import envs
import train

STARCRAFT = Path(__file__).resolve().parents[2] / "shared" / "data" / "smac_3m_medium.h5"
TINY = (
    "--batch-size 16 --wm-batch-size 16 --hidden 16 --wm-hidden 16 --rollouts 8 --collect-every 2 "
    "--retain 2 --horizon 3 --eval-episodes 2 --final-evals 1 --log-every 1 --checkpoint-every 1 "
    "--threads 1 --device cpu"
).split()
ONE = [*TINY, "--updates", "1", "--wm-updates", "1", "--eval-every", "1"]
PLAYERS = {"medium": 1, "medium-replay": 6, "expert": 1, "mixed": 2}


@pytest.mark.parametrize("env_id", envs.PAPER_SMAC + envs.PAPER_MUJOCO)
def test_one_update_of_every_quality(env_id, tmp_path):
    """4 qualities of each of the 8 tasks: recorded with the shipped policies, trained, played."""
    returns = {}
    for quality, players in PLAYERS.items():
        path = tmp_path / f"{quality}.h5"
        collect.record(env_id, quality, 2 * players, seed=0, path=path)  # always two side by side
        final = train.cli(
            [*ONE, "--env-id", env_id, "--quality", quality, "--dataset", str(path)]
            + ["--out", str(tmp_path / quality)]
        )
        assert final["dataset"]["quality"] == quality
        assert final["backend"] == ("mamujoco" if env_id in envs.PAPER_MUJOCO else "smax")
        assert final["eval"]["episodes"] == 2
        assert final["args"]["gamma"] == train.defaults(env_id).gamma
        returns[quality] = final["dataset"]["return_mean"]
    assert returns["expert"] > returns["medium-replay"]


@pytest.fixture(scope="module")
def starcraft_run(tmp_path_factory):
    if not STARCRAFT.exists():
        pytest.skip("the public recording of StarCraft II's 3m does not lie beside the project")
    out = tmp_path_factory.mktemp("starcraft") / "run"
    flags = ["--env-id", "3m", "--dataset", str(STARCRAFT), "--out", str(out)]
    return train.cli([*TINY, *flags, "--updates", "60", "--wm-updates", "60"]), out


def test_real_starcraft_data_train_without_the_game(starcraft_run):
    final, out = starcraft_run
    assert final["backend"] == "offline" and final["eval"] is None and final["clone"] is None
    assert final["world_model"]["state_mse"] < final["world_model"]["persistence_state_mse"]
    assert 0 < final["offline"]["clone_agreement"] <= 1
    assert final["offline"]["return_to_go"] == pytest.approx(
        returns_to_go_by_hand(final["args"]["gamma"]), rel=1e-4
    )
    assert json.loads((out / "final.json").read_text()) == final
    assert (out / "run.png").stat().st_size > 1000


def returns_to_go_by_hand(gamma: float) -> float:
    data, _ = datasets.load_dataset(STARCRAFT, 0.05, 0, torch.device("cpu"))
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


def test_a_run_without_a_game_says_so(starcraft_run, capsys, tmp_path):
    flags = ["--env-id", "3m", "--dataset", str(STARCRAFT), "--out", str(tmp_path / "run")]
    train.cli([*ONE, *flags])
    said = capsys.readouterr().out
    assert "no simulator" in said and "no episode was played" in said


def test_asking_for_a_simulator_of_other_sizes_is_refused(tmp_path):
    if not STARCRAFT.exists():
        pytest.skip("the public recording of StarCraft II's 3m does not lie beside the project")
    flags = ["--env-id", "3m", "--dataset", str(STARCRAFT), "--backend", "smax"]
    with pytest.raises(SystemExit, match="give the --env-id and --backend of the recording"):
        train.cli([*ONE, *flags, "--out", str(tmp_path / "run")])


def test_the_defaults_follow_the_kind_of_action():
    battle, robot = train.defaults("3s_vs_5z"), train.defaults("Ant-4x2")
    assert battle == train.Args("3s_vs_5z")
    for flag, value in train.CONTINUOUS.items():
        assert getattr(robot, flag) == value != getattr(battle, flag), flag
