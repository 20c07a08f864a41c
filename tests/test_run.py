"""Whole runs of train.py in miniature: what they write, that they repeat, resume and refuse.

Every run here plays eight battles at a time on 3s_vs_5z, so that the simulator is compiled once.
"""

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path

import h5py
import pytest
import torch
from conftest import TINY

import checkpoint
import run as run_module
import train

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture
def go(dataset, tmp_path):
    """go("--flag", ..., out="name") -> final.json of a miniature run."""

    def go(*flags: str, out: str = "run") -> dict:
        given = ["--dataset", str(dataset), "--out", str(tmp_path / out), *flags]
        (final,) = train.cli([*TINY, *given])
        return final

    return go


def scores(final: dict) -> dict:
    return {k: final[k] for k in ("eval", "clone", "evaluations", "world_model", "rollout")}


def weights(folder: Path) -> dict:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {f"{m}.{k}": v for m in checkpoint.MODULES for k, v in state[m].items()}


def test_a_run_leaves_complete_results(go, tmp_path):
    final = go()
    assert json.loads((tmp_path / "run" / "final.json").read_text()) == final
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {
        "metrics.csv", "checkpoint.pt", "run.png", "final.json",
    }  # fmt: skip
    assert (tmp_path / "run" / "run.png").read_bytes()[:4] == b"\x89PNG"
    expected = {
        "args": {"env_id", "horizon", "seed"},
        "dataset": {"path", "sha256", "episodes", "transitions", "return_mean", "return_std"},
        "world_model": {
            "obs_mse", "state_mse", "reward_mse", "direct_state_mse", "direct_reward_mse",
            "persistence_state_mse", "deducibility_r2", "u_error_spearman",
        },
        "eval": {"return_mean", "return_ci95", "win_rate", "episodes"},
        "time": {"total_s", "wm_updates_per_s", "updates_per_s", "imagined_rows_per_s"},
    }  # fmt: skip
    for part, keys in expected.items():
        assert keys <= set(final[part]), part
    assert {"commit", "versions", "device", "backend", "env_id", "seed"} <= set(final)
    assert final["eval"]["episodes"] == 16 and final["backend"] == "smax"
    assert all(math.isfinite(v) for v in final["world_model"].values() if isinstance(v, float))
    assert all(v > 0 for k, v in final["time"].items() if k.endswith("per_s"))
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert rows[0] == "phase,update,metric,value"
    assert {r.split(",")[0] for r in rows[1:]} == {"clone", "wm", "policy", "eval"}


def test_the_same_seed_gives_the_same_scores_and_another_seed_others(go, tmp_path):
    first, again, other = go(out="a"), go(out="b"), go("--seed", "2", out="c")
    assert scores(first) == scores(again)
    a, b, c = (weights(tmp_path / x) for x in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert scores(first) != scores(other) and any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("steps", [[0], [3], [9], [12, 5], [17], [18, 3, 3], [21]])
def test_a_run_killed_anywhere_and_resumed_ends_as_if_nothing_had_happened(
    go, tmp_path, monkeypatch, steps
):
    """Killed, once or more, after so many gradient steps: 6 of the clone, 4 of the model, 12.

    D_m's ring of two collections wraps around, since every update of the policy plays one.
    """
    wrapping = ("--collect-every", "1")
    whole, descend = go(*wrapping, out="whole"), run_module.descend
    for life, left in enumerate(steps):
        done = [0]

        def dying(*arguments, done=done, left=left):
            done[0] += 1
            if done[0] > left:
                raise KeyboardInterrupt
            descend(*arguments)

        monkeypatch.setattr(train, "descend", dying)
        with pytest.raises(KeyboardInterrupt):
            go(*wrapping, *(["--resume"] if life else []), out="killed")
        assert not (tmp_path / "killed" / "final.json").exists()
    monkeypatch.setattr(train, "descend", descend)
    resumed = go(*wrapping, "--resume", out="killed")
    assert scores(resumed) == scores(whole)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(a[k], b[k]) for k in a)
    rows = [(tmp_path / x / "metrics.csv").read_text() for x in ("whole", "killed")]
    assert rows[0] == rows[1]


FLAGS = [
    "--deduce-from obs", "--deduce-from obs+state", "--eq4-input next_obs", "--no-heads",
    "--no-clamp", "--learn-variance", "--retain 0", "--uncertainty penalty", "--uncertainty none",
    "--mixing coin", "--no-lr-decay --average 0", "--no-shared-actor", "--critics 1",
    "--conservative expectation", "--conservative-on real", "--backup max", "--bellman-on real",
    "--bc-on both", "--normalise-q", "--wm-weight-decay 1.0", "--synthetic-fraction 0",
    "--synthetic-fraction 1", "--no-warm-start", "--epsilon 0", "--u-scale 2",
    "--cql-alpha 9", "--bc-lambda 9", "--cap 0.01", "--gamma 0.5",
    "--tau 0.5", "--rollouts 4", "--batch-size 8", "--lr 0.01", "--wm-lr 0.01", "--hidden 8",
    "--wm-hidden 8", "--wm-batch-size 8", "--horizon 1", "--collect-every 1",
]  # fmt: skip


def test_every_flag_that_branches_runs_and_has_an_effect(go, tmp_path, monkeypatch):
    monkeypatch.setattr(train.report, "draw", lambda run, final: None)  # takes a second each
    go(out="plain")
    plain, results = weights(tmp_path / "plain"), {}
    for i, flags in enumerate(FLAGS):
        final = go(*shlex.split(flags), out=str(i))
        assert math.isfinite(final["eval"]["return_mean"]), flags
        new = weights(tmp_path / str(i))
        results[flags] = any(
            k not in new or new[k].shape != v.shape or not torch.equal(new[k], v)
            for k, v in plain.items()
        ) or set(new) != set(plain)
    assert all(results.values()), f"without effect: {[k for k, v in results.items() if not v]}"


def test_without_the_model_the_program_is_macql_and_without_the_critic_cloning(go, tmp_path):
    macql = go("--synthetic-fraction", "0", out="macql")
    assert macql["world_model"] is None and macql["time"]["wm_updates_per_s"] == 0
    clone = go("--synthetic-fraction", "0", "--critic", "none", out="bc")
    rows = (tmp_path / "bc" / "metrics.csv").read_text()
    assert "q_td" not in rows and "pi_bc" in rows and clone["world_model"] is None


def test_the_readme_command_for_the_letter_of_the_paper_runs(go):
    command = re.search(r"```\n(python train\.py[^`]*--deduce-from obs [^`]*)```", README).group(1)
    flags = shlex.split(command.replace("\\\n", " "))[2:]
    final = go(*flags, "--updates", "4", "--wm-updates", "2", "--retain", "0", out="letter")
    assert final["args"]["deduce_from"] == "obs" and not final["args"]["heads"]


def test_the_model_keeps_to_the_range_and_the_rules_of_the_data(go):
    final = go("--wm-updates", "30")
    rollout = final["rollout"]
    assert rollout["finite"] and rollout["states_in_range"] == 1.0
    assert rollout["forbidden_actions"] == 0.0


BAD = {
    "--env-id nowhere": "3s_vs_5z",
    "--horizon -1": "--horizon is -1",
    "--updates 0": "--updates is 0",
    "--synthetic-fraction 1.5": "--synthetic-fraction is 1.5",
    "--synthetic-fraction nan": "--synthetic-fraction is nan",
    "--synthetic-fraction 0.01": "less than a row",
    "--holdout 1.5": "--holdout is 1.5",
    "--lr -0.1": "--lr is -0.1",
    "--gamma inf": "--gamma is inf",
    "--u-scale 0": "--u-scale is 0",
    "--critic none": "--synthetic-fraction 0",
    "--env-id 2s3z": "recorded on 3s_vs_5z",
    "--dataset nothing.h5": "nothing.h5",
    "--resume": "no checkpoint",
    "--checkpoint-every 3 --log-every 2": "multiple",
    "--lr 1e30 --critics 1": "not finite",
    "--wm-lr 1e30": "not finite",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_sentence_and_a_failure(go, tmp_path, flags):
    with pytest.raises(SystemExit) as error:
        go(*shlex.split(flags))
    assert BAD[flags] in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "final.json").exists()


def test_choices_are_told_by_the_command_line(go, capsys):
    with pytest.raises(SystemExit) as error:
        go("--quality", "perfect")
    assert error.value.code == 2 and "medium-replay" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(go, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        go("--device", "cuda")


def test_a_checkpoint_of_other_flags_is_refused(go):
    go()
    with pytest.raises(SystemExit, match="--gamma 0.95"):
        go("--resume", "--gamma", "0.9")


def test_a_broken_checkpoint_is_refused(go, tmp_path):
    go()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(SystemExit, match="no checkpoint of this program"):
        go("--resume")


def test_a_large_seed_plays_and_a_diverging_model_stops(go):
    assert math.isfinite(go("--seed", "123456789")["eval"]["return_mean"])
    with pytest.raises(SystemExit, match="not finite"):
        go("--no-clamp", "--wm-lr", "1e18", "--no-lr-decay")


def test_a_dataset_with_nan_is_refused(go, dataset, tmp_path):
    broken = tmp_path / "broken.h5"
    broken.write_bytes(dataset.read_bytes())
    with h5py.File(broken, "r+") as f:
        f["reward"][3, 1] = math.nan
    with pytest.raises(SystemExit, match=r"reward, episode 3"):
        go("--dataset", str(broken))


def test_a_dataset_of_other_sizes_is_refused(go, dataset, tmp_path):
    nameless = tmp_path / "nameless.h5"
    nameless.write_bytes(dataset.read_bytes())
    with h5py.File(nameless, "r+") as f:
        del f.attrs["env_id"]
    with pytest.raises(SystemExit, match=r"\(3, 101, 96, 10\).*\(5, 127, 120, 10\)"):
        go("--dataset", str(nameless), "--env-id", "2s3z")


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(go, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SystemExit, match="train.py"):
        go(out="file/run")


def test_a_full_disk_leaves_no_half_written_file(go, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit, match="No space left"):
        go()
    assert list((tmp_path / "run").iterdir()) == []


def test_every_flag_tells_its_source():
    source = Path(train.__file__).read_text()
    for f in dataclasses.fields(train.Args):
        found = re.search(rf'^    {f.name}: .*\n    """(.*\n?.*)"""', source, re.M)
        assert found, f"{f.name} has no docstring"
        assert re.search(r"\[[^]]+\]$", found.group(1)), f"{f.name} does not say where it is from"
