"""Every task and quality of the paper, data that no simulator here plays, and what fits what."""

import json
import sys
from pathlib import Path

import numpy as np
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
PLAYERS = {"medium": 1, "medium-replay": 5, "expert": 1, "mixed": 2}


@pytest.mark.parametrize("env_id", envs.PAPER_SMAC + envs.PAPER_MUJOCO)
def test_one_update_of_every_quality(env_id, tmp_path, monkeypatch):
    """4 qualities of each of the 8 tasks: recorded with the shipped policies, trained, played."""
    monkeypatch.setattr(train.report, "draw", lambda run, final: None)  # takes a second each
    returns = {}
    for quality, players in PLAYERS.items():
        path = tmp_path / f"{quality}.h5"
        collect.record(env_id, quality, 2 * players, seed=0, path=path)  # always two side by side
        (final,) = train.cli(
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
    enough = "--updates 20 --wm-updates 200 --wm-hidden 64 --wm-batch-size 64 --wm-lr 0.003"
    return *train.cli([*TINY, *flags, *enough.split()]), out


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


def test_one_command_lists_all_datasets(monkeypatch, tmp_path, capsys):
    asked, tiny = [], tmp_path / "tiny.h5"
    collect.record("3s_vs_5z", "medium", 2, seed=0, path=tiny)

    def load_or_record(env_id, quality, episodes, seed):
        asked.append((env_id, quality, episodes))
        return tiny

    monkeypatch.setattr(collect, "load_or_record", load_or_record)
    collect.main(collect.Args(list=True, out=tmp_path / "curves.png"))
    rows = capsys.readouterr().out.strip().splitlines()[2:]
    assert len(rows) == len(set(asked)) == 32
    assert {n for _, _, n in asked} == {200, 600}
    assert rows[-1].startswith("| HalfCheetah-6x1 | mixed | 2 |")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_every_task_of_the_paper_has_its_policies():
    shipped = {p.stem for p in collect.BEHAVIOUR.glob("*.npz")}
    assert {*envs.PAPER_SMAC, *envs.PAPER_MUJOCO} <= shipped


@pytest.mark.parametrize(
    "flags",
    ["--env-id HalfCheetah-6x1 --backend smax", "--env-id 3s_vs_5z --backend smacv2",
     "--env-id terran_5_vs_5", "--env-id 3m --backend smac"],
)  # fmt: skip
def test_what_no_simulator_can_play_is_refused_before_anything_is_read(flags, tmp_path):
    with pytest.raises(SystemExit, match="cannot play|needs --dataset FILE"):
        train.cli([*ONE, *flags.split(), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_game_that_is_half_installed_does_not_stop_a_run_that_did_not_ask_for_it(
    monkeypatch, tmp_path
):
    """StarCraft II is there, its Python package is not: auto goes on without, smac says why."""
    if not STARCRAFT.exists():
        pytest.skip("the public recording of StarCraft II's 3m does not lie beside the project")
    pytest.importorskip("jaxmarl")
    (tmp_path / "Versions" / "Base75689").mkdir(parents=True)
    (tmp_path / "Versions" / "Base75689" / "SC2_x64").touch()
    monkeypatch.setenv("SC2PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "smac", None)
    monkeypatch.setitem(sys.modules, "smac.env", None)
    flags = ["--env-id", "3m", "--dataset", str(STARCRAFT), "--out", str(tmp_path / "run")]
    (final,) = train.cli([*ONE, *flags])
    assert final["backend"] == "offline"
    with pytest.raises(SystemExit, match="smac"):
        train.cli([*ONE, *flags, "--backend", "smac"])


@pytest.mark.parametrize("episodes", [5, 7, 13])
def test_players_of_a_dataset_play_equal_parts(monkeypatch, tmp_path, episodes):
    """Five policies play medium-replay; no one is left out, whatever the number of episodes."""
    path, played = tmp_path / "d.h5", []

    def play(env, actor, generator, seed):
        slots, steps = env.num_envs, 2
        played.append(actor)
        mark = np.full((steps, slots), float(actors.index(actor)), np.float32)
        zeros = np.zeros((steps, slots), bool)
        return {
            "obs": np.zeros((steps + 1, slots, 1, 1), np.float32),
            "state": np.zeros((steps + 1, slots, 1), np.float32),
            "avail": np.ones((steps + 1, slots, 1, 2), np.float32),
            "actions": np.eye(2, dtype=np.float32)[np.zeros((steps, slots, 1), int)],
            "reward": mark, "terminated": zeros, "won": zeros, "filled": ~zeros,
        }  # fmt: skip

    actors = list("abcdef")
    monkeypatch.setattr(collect, "play", play)
    monkeypatch.setattr(collect, "load_behaviour", lambda env_id, spec: actors)
    collect.record("3s_vs_5z", "medium-replay", episodes, seed=0, path=path)
    columns, lengths, _ = datasets.read_episodes(path)
    first = np.cumsum(lengths + 1) - lengths - 1
    counts = np.bincount(columns["reward"][first].astype(int), minlength=5)
    assert counts.sum() == episodes == len(lengths) and np.ptp(counts) <= 1 and counts[4] > 0
