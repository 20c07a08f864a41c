"""Whole runs of train.py in miniature: what they write, that they repeat, resume and refuse.

Runs play eight episodes at a time on 3s_vs_5z, so that the simulator is compiled once, or none on
data of no simulator (`toy`), because the episodes take longer than the training.
"""

import dataclasses
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import h5py
import numpy as np
import pytest
import torch
from conftest import TINY, Killed
from faults import battles

import datasets
import envs
import macql
import train
from experiment import diagnostics, imagined, report, setup, tracking


@pytest.fixture
def go(dataset, tmp_path, undrawn):
    """go("--flag", ..., out="name") -> final.json of a miniature run."""

    def go(*flags: str, out: str = "run") -> dict:
        given = ["--dataset", str(dataset), "--out", str(tmp_path / out), *flags]
        return train.cli([*TINY, *given])

    return go


@pytest.fixture
def toy(tmp_path) -> tuple[str, ...]:
    """Flags of `go` for data that nothing plays."""
    path = tmp_path / "toy.h5"
    datasets.save_episodes(path, battles(), {"env_id": "toy"})
    return "--dataset", str(path), "--env-id", "toy"


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> tuple[Path, dict]:
    """Folder and final.json of a run of `go` without flags, with its picture."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, train.cli([*TINY, "--dataset", str(dataset), "--out", str(folder)])


WRAPPING = ("--rollout-interval", "1")  # every update of the policy adds to D_m, of two collections


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory) -> tuple[Path, dict]:
    """Folder and final.json of a run that nobody kills."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        save_after_every_update(patch)
        patch.setattr(train.report, "draw", lambda *_: None)
        flags = ["--dataset", str(dataset), "--out", str(folder), *WRAPPING]
        return folder, train.cli([*TINY, *flags])


def save_after_every_update(monkeypatch) -> None:
    monkeypatch.setattr(tracking, "CHECKPOINT_SHARE", math.inf)
    monkeypatch.setattr(tracking, "LOG_EVERY", 2)


def scores(final: dict) -> dict:
    return {k: final[k] for k in ("eval", "clone", "evaluations", "world_model", "rollout")}


def weights(folder: Path) -> dict:
    """Every network's tensors in a checkpoint, by name."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    nets = {k: v for k, v in state["learner"].items() if not k.endswith(("optimizer", "schedule"))}
    nets |= {k: state[k] for k in ("bc_actor", "world_model") if k in state}
    return {f"{name}.{k}": v for name, net in nets.items() for k, v in net.items()}


def test_a_run_leaves_complete_results(finished):
    folder, final = finished
    assert json.loads((folder / "final.json").read_text()) == final
    assert {p.name for p in folder.iterdir()} >= {
        "metrics.csv", "checkpoint.pt", "run.png", "final.json",
    }  # fmt: skip
    assert (folder / "run.png").read_bytes()[:4] == b"\x89PNG"
    expected = {
        "args": {"env_id", "horizon", "seed"},
        "dataset": {"path", "sha256", "episodes", "transitions", "return_mean", "return_std"},
        "world_model": {
            "obs_mse", "state_mse", "reward_mse", "direct_state_mse", "direct_reward_mse",
            "persistence_state_mse", "vanished_recorded", "vanished_imagined", "deducibility_r2",
            "u_error_spearman",
        },
        "eval": {"return_mean", "return_ci95", "win_rate", "episodes"},
        "offline": {"td_held_out", "td_train"},
        "time": {"total_s", "wm_updates_per_s", "updates_per_s", "imagined_rows_per_s"},
    }  # fmt: skip
    for part, keys in expected.items():
        assert keys <= set(final[part]), part
    assert {"commit", "versions", "device", "backend", "env_id", "seed"} <= set(final)
    assert final["eval"]["episodes"] == 16 and final["backend"] == "smax"
    assert all(math.isfinite(v) for v in final["world_model"].values() if isinstance(v, float))
    assert all(v > 0 for k, v in final["time"].items() if k.endswith("per_s"))
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert rows[0] == "phase,update,metric,value"
    assert {r.split(",")[0] for r in rows[1:]} == {"clone", "wm", "policy", "eval"}


def test_scores_depend_on_the_seed_alone(go, finished, tmp_path):
    (folder, first), again, other = finished, go(out="b"), go("--seed", "2", out="c")
    assert scores(first) == scores(again)
    a, b, c = (weights(x) for x in (folder, tmp_path / "b", tmp_path / "c"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert scores(first) != scores(other) and any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("steps", [[0], [3], [9], [12, 5], [15], [16, 3, 1], [19]])
def test_a_killed_and_resumed_run_ends_the_same(go, whole, tmp_path, monkeypatch, steps):
    """Killed, once or more, after so many gradient steps: 6 of the clone, 4 of the model, 10."""
    save_after_every_update(monkeypatch)
    descend = macql.descend
    for life, left in enumerate(steps):
        done = [0]

        def dying(*arguments, done=done, left=left):
            done[0] += 1
            if done[0] > left:
                raise Killed
            descend(*arguments)

        monkeypatch.setattr(train, "descend", dying)
        monkeypatch.setattr(macql, "descend", dying)
        with pytest.raises(Killed):
            go(*WRAPPING, *(["--resume"] if life else []), out="killed")
        assert not (tmp_path / "killed" / "final.json").exists()
    monkeypatch.setattr(train, "descend", descend)
    monkeypatch.setattr(macql, "descend", descend)
    resumed, (folder, final) = go(*WRAPPING, "--resume", out="killed"), whole
    assert scores(resumed) == scores(final)
    a, b = weights(folder), weights(tmp_path / "killed")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    rows = [(x / "metrics.csv").read_text() for x in (folder, tmp_path / "killed")]
    assert rows[0] == rows[1]


def test_a_finished_run_with_other_flags_is_not_replaced(go, toy, tmp_path):
    go(*toy)
    before = (tmp_path / "run" / "final.json").read_bytes()
    with pytest.raises(SystemExit, match=r"holds a finished run with --wm-lr 0.003: give another"):
        go(*toy, "--wm-lr", "0.1")
    with pytest.raises(SystemExit, match="holds a finished run with method logo"):
        go(*toy, "--synthetic-fraction", "0")
    datasets.save_episodes(tmp_path / "toy.h5", battles(seed=1), {"env_id": "toy"})
    with pytest.raises(SystemExit, match="holds a finished run with other data"):
        go(*toy)
    datasets.save_episodes(tmp_path / "toy.h5", battles(), {"env_id": "toy"})
    file = tmp_path / "run" / "final.json"
    assert file.read_bytes() == before
    file.write_bytes(before.replace(b'"backend": "offline"', b'"backend": "smax"'))
    with pytest.raises(SystemExit, match="holds a finished run with backend smax"):
        go(*toy)
    file.write_bytes(before)
    (tmp_path / "run" / "checkpoint.pt").unlink()
    with pytest.raises(SystemExit, match="holds a finished run with --wm-lr"):
        go(*toy, "--wm-lr", "0.1", "--resume")
    go(*toy)  # the same run again replaces it


def test_a_learner_of_ones_own_has_its_own_name(go, toy, tmp_path):
    args = train.parse([*TINY, *toy, "--out", str(tmp_path / "run")])
    learner = lambda *x: train.make_learner(*x)  # noqa: E731
    assert train.main(args, learner=learner)["method"] == "own"
    with pytest.raises(SystemExit, match="is of the method own, not logo: go on with the program"):
        go(*toy, "--resume")


def test_continuous_actions_of_another_task_are_told_the_flags(go, tmp_path, capsys):
    path = tmp_path / "toy.h5"
    discrete = battles()
    continuous = {k: v for k, v in discrete.items() if k != "avail_actions"}
    continuous["actions"] = discrete["avail_actions"].astype(np.float32)
    datasets.save_episodes(path, continuous, {"env_id": "toy"})
    final = go("--dataset", str(path), "--env-id", "toy")
    assert final["backend"] == "offline"
    told = re.search("robots have (.*)\n", capsys.readouterr().out)[1].split()
    usual = train.CONTINUOUS
    args = train.parse(["--env-id", "toy", *told])
    assert all(getattr(args, k) == v for k, v in usual.items())
    assert len(told) == 2 * len(usual) - 1  # --no-recorded-critic has no value


def test_whole_numbers_from_python_may_stand_for_shares():
    args = dataclasses.replace(train.Args(), synthetic_fraction=0, epsilon=0, critic_first=1)
    train.setup.check_args(args)
    with pytest.raises(ValueError, match="--updates is 0: give 1 to"):
        train.setup.check_args(dataclasses.replace(args, updates=0))


def test_a_run_reports_the_commit_it_began_with(go, monkeypatch):
    names = iter(["first", "last"])
    monkeypatch.setattr(tracking, "commit", lambda: next(names))
    assert go()["commit"] == "first" and next(names) == "last"


def test_a_run_under_several_commits_names_them(go, killed, monkeypatch, tmp_path, capsys):
    for k, name in enumerate(["first", "first", "last", "last"]):
        monkeypatch.setattr(tracking, "commit", lambda name=name: name)
        if k < 3:
            killed(lambda: go("--resume"), 2)
    assert go("--resume")["commit"] == "first, then last"
    assert capsys.readouterr().out.count("of commit first, this is last: the result may") == 1


def test_the_program_of_metrics_md_loads_policy_and_model(finished, monkeypatch):
    folder, final = finished
    text = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    code = re.search("```python\n(.*?)```", text, re.S)[1].replace("RUN/", f"{folder}/")
    data = train.load_dataset(Path(final["dataset"]["path"]), torch.device("cpu"), "3s_vs_5z")[0]
    batch = data.gather(data.held_out)
    names = vars(macql) | vars(imagined) | vars(diagnostics)
    names |= {"torch": torch, "DISCRETE": True, "obs": batch.obs, "avail": batch.avail}
    exec(code, names)
    assert len(names["u"]) == len(names["error"]) == len(batch.obs)
    rho = diagnostics.rank_correlation(names["u"], names["error"])
    assert rho == pytest.approx(final["world_model"]["u_error_spearman"], abs=1e-4)
    assert (names["actor"].greedy(batch.obs, batch.avail).sum(-1) == 1).all()


def test_a_run_goes_on_in_its_own_simulator(go, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"backend": "offline"}, path)
    with pytest.raises(SystemExit, match="was evaluated in offline, not in smax: go on with that"):
        go("--resume")


def test_checkpoints_are_due_by_their_cost(go, toy, monkeypatch):
    saved, save = [], tracking.Run.save
    monkeypatch.setattr(tracking.Run, "save", lambda run: (saved.append(1), save(run)))
    monkeypatch.setattr(tracking, "CHECKPOINT_SHARE", 0.0)  # at the start and after each phase
    go(*toy)
    assert len(saved) == 4


def test_a_checkpoint_counts_the_time_of_all_its_updates(go, toy, monkeypatch):
    saved, save = [], tracking.Run.save
    monkeypatch.setattr(
        tracking.Run, "save",
        lambda run: (saved.append((run.progress.copy(), run.seconds.copy())), save(run)),
    )  # fmt: skip
    monkeypatch.setattr(tracking, "CHECKPOINT_SHARE", math.inf)  # after each update
    go(*toy)
    before = [(updates, s["clone"]) for p, s in saved for updates in [p["clone"]] if p["wm"] == 0]
    assert [updates for updates, _ in before] == [0, 1, 2, 3, 4, 5, 6]  # LOG_EVERY is larger
    assert all(x < y for (_, x), (_, y) in zip(before, before[1:], strict=False))


def test_a_clone_does_not_wait_for_a_critic():
    args = train.Args(updates=8, critic_first=0.25)
    assert setup.waiting(args) == 2
    assert setup.waiting(dataclasses.replace(args, critic="none")) == 0


FLAGS = [
    "--deduce-from obs", "--deduce-from obs+state", "--no-heads", "--no-clamp", "--no-zeros",
    "--observe predicted", "--imagined-rows printed", "--n-step 1",
    "--uncertainty penalty --u-scale 10", "--uncertainty shuffled", "--uncertainty none",
    "--no-shared-actor", "--critic-first 0",
    "--critics 1", "--no-recorded-critic", "--conservative expectation", "--backup max",
    "--wm-weight-decay 1.0",
    "--wm-lr 0.1", "--synthetic-fraction 0", "--synthetic-fraction 1", "--no-warm-start",
    "--imagined-rows instead", "--imagined-rows added+policy", "--critic scaled",
    "--epsilon 3", "--u-scale 0.002", "--cql-alpha 9", "--bc-lambda 9", "--cap 0.01",
    "--gamma 0.5", "--tau 0.5", "--rollout-batch-size 4", "--batch-size 8", "--lr 0.01",
    "--hidden 8", "--wm-batch-size 8", "--horizon 1", "--rollout-interval 1", "--wm-updates 3",
    "--paper",
]  # fmt: skip


BESIDE = {"--gamma 0.5": "--no-clamp"}  # untrained values are below 0, where they are clamped


def test_every_flag_that_branches_runs_and_has_an_effect(go, toy, tmp_path, monkeypatch):
    save = tracking.Run.save

    def save_at_the_end(run):  # each takes as long as a phase
        if run.progress["policy"] == run.args.updates:
            save(run)

    monkeypatch.setattr(tracking.Run, "save", save_at_the_end)
    monkeypatch.setattr(setup, "check_memory", lambda *_: None)  # of the same sizes every time
    go(*toy, out="plain")
    plain, results = weights(tmp_path / "plain"), {}
    for i, flags in enumerate(FLAGS):
        if flags in BESIDE:
            go(*toy, BESIDE[flags], out="beside")
        compared = weights(tmp_path / "beside") if flags in BESIDE else plain
        final = go(*toy, *shlex.split(f"{flags} {BESIDE.get(flags, '')}"), out=str(i))
        assert all(map(math.isfinite, final["offline"].values())), flags
        new = weights(tmp_path / str(i))
        results[flags] = any(
            k not in new or new[k].shape != v.shape or not torch.equal(new[k], v)
            for k, v in compared.items()
        ) or set(new) != set(compared)
    assert all(results.values()), f"without effect: {[k for k, v in results.items() if not v]}"


def test_without_model_it_is_macql_without_critic_cloning(go, toy, tmp_path):
    macql = go(*toy, "--synthetic-fraction", "0", out="macql")
    assert macql["world_model"] is None and macql["time"]["wm_updates_per_s"] == 0
    clone = go(*toy, "--synthetic-fraction", "0", "--critic", "none", out="bc")
    rows = (tmp_path / "bc" / "metrics.csv").read_text()
    assert "q_td" not in rows and "pi_bc" in rows and clone["world_model"] is None


def test_paper_sets_the_literal_reading_and_flags_still_count(go, toy):
    final = go(*toy, "--paper", "--gamma", "0.9", "--no-warm-start", "--critics", "3")
    args = final["args"]
    of_tiny = {"u_scale": 5.0, "critic_first": 0.17, "horizon": 3}
    expected = train.PAPER | of_tiny | {"gamma": 0.9, "critics": 3}
    assert {k: args[k] for k in expected} == expected
    assert final["rollout"]["finite"]


@pytest.mark.parametrize("rows, updates", [
    (400, setup.PASSES * 400 // 2), (10**7, setup.MOST_UPDATES), (1, setup.FEWEST_UPDATES)
])  # fmt: skip
def test_updates_and_evaluations_follow_the_size_of_the_data(rows, updates):
    data = SimpleNamespace(train=range(rows))
    settled = setup.settle(train.Args(batch_size=2), data)
    assert settled.updates == updates
    assert settled.eval_every == math.ceil(updates / setup.EVALUATIONS)
    asked = setup.settle(train.Args(updates=7, eval_every=3), data)
    assert (asked.updates, asked.eval_every) == (7, 3)


@pytest.mark.parametrize("updates, every", [(4000, 250), (1043, 66), (5000, 500), (6, 3)])
def test_the_last_five_evaluations_are_close_together(updates, every):
    args = train.Args(updates=updates, eval_every=every)
    taken = [k for k in range(1, updates + 1) if report.due(args, k)]
    dense = [k for k in range(1, updates + 1) if k % every == 0 or k == updates]
    assert taken[-5:] == dense[-5:]
    assert [k for k in taken if k not in dense[-6:]] == [
        k for k in dense[:-6] if k % (2 * every) == 0
    ]


def test_every_deviation_has_a_literal_value():
    changed = {f for f, v in train.PAPER.items() if getattr(train.Args(), f) != v}
    robots = {f for f, v in train.PAPER.items() if getattr(train.defaults("Ant-2x4"), f) != v}
    assert changed | robots == set(train.PAPER)
    help_texts = re.findall(
        r'^    (\w+): [^\n]*\n    """(D\d+)', Path(train.__file__).read_text(), re.M
    )
    assert {flag for flag, _ in help_texts} == set(train.PAPER)


@pytest.mark.parametrize("env_id", ["3s_vs_5z", "Ant-4x2"])
def test_defaults_follow_the_kind_of_action(env_id):
    args, literal = train.defaults(env_id), train.defaults(env_id, paper=True)
    if envs.is_robot(env_id):
        for flag, value in train.CONTINUOUS.items():
            assert getattr(args, flag) == value != getattr(train.Args(), flag), flag
        assert args.episodes == 200
    else:
        assert args == train.Args(env_id)
    assert all(getattr(literal, flag) == value for flag, value in train.PAPER.items())


def test_there_are_at_most_fifty_flags():
    assert len(dataclasses.fields(train.Args)) <= 50


def test_what_another_method_sets_itself_stays_on_robots():
    @dataclasses.dataclass
    class Own(train.Args):
        ON_ROBOTS: ClassVar = {"cap": 3.0}

        synthetic_fraction: float = 0.0
        cap: float = 2.0

    args = train.defaults("Ant-2x4", kind=Own)
    assert (args.synthetic_fraction, args.cap) == (0.0, 3.0)
    assert args.horizon == train.CONTINUOUS["horizon"]


def test_the_model_keeps_to_the_range_and_the_rules_of_the_data(go):
    final = go("--wm-updates", "30")
    rollout = final["rollout"]
    assert rollout["finite"] and rollout["states_in_range"] == 1.0
    assert rollout["forbidden_actions"] == 0.0


BAD = {
    "--env-id nowhere": "3s_vs_5z",
    "--horizon -1": "--horizon is -1",
    "--updates 0": "--updates is 0",
    "--synthetic-fraction -1": "--synthetic-fraction is -1",
    "--synthetic-fraction nan": "--synthetic-fraction is nan",
    "--synthetic-fraction 0.01": "less than a row",
    "--synthetic-fraction 1e12": "--synthetic-fraction 1000000000000.0",
    "--synthetic-fraction 1 --imagined-rows instead": "leaves no real row",
    "--synthetic-fraction 2 --imagined-rows instead": "leaves no real row",
    "--synthetic-fraction 0.99 --imagined-rows printed": "leaves no real row",
    "--lr -0.1": "--lr is -0.1",
    "--gamma inf": "--gamma is inf",
    "--uncertainty penalty --u-scale 0.25": "give --u-scale",
    "--uncertainty penalty --u-scale 0": "give --u-scale",
    "--critic-first 1.5": "--critic-first is 1.5",
    "--n-step 0": "--n-step is 0",
    "--hidden 1": "--hidden is 1: give 2 to",
    "--critic none": "--synthetic-fraction 0",
    "--env-id 2s3z": "recorded on 3s_vs_5z",
    "--dataset nothing.h5": "nothing.h5",
    "--lr 1e30": "not finite",
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


def test_track_sends_metrics_with_their_update_and_ends(go, toy, monkeypatch, tmp_path):
    sent, ended = [], []
    wandb = ModuleType("wandb")
    wandb.__spec__, wandb.Error = ModuleSpec("wandb", None), type("Error", (Exception,), {})
    run = SimpleNamespace(log=sent.append, finish=lambda: ended.append(True))
    wandb.init = lambda **flags: run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    go(*toy, "--track")
    assert {"policy/update", "policy/q_td"} <= set().union(*sent) and ended == [True]

    def refuse(**_):
        raise wandb.Error("No API key configured.")

    wandb.init = refuse
    with pytest.raises(SystemExit, match="--track: .*No API key"):
        go(*toy, "--track", out="other")
    with pytest.raises(SystemExit, match="--track: .*No API key"):
        go(*toy, "--track")
    assert (tmp_path / "run" / "final.json").exists()  # of the first run: nothing was replaced


def test_a_gpu_that_is_not_there_is_refused(go, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        go("--device", "cuda")


def test_a_checkpoint_of_other_flags_is_refused(go, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    with pytest.raises(SystemExit, match="--gamma 0.99"):
        go("--resume", "--gamma", "0.9")


def test_a_broken_checkpoint_is_refused(go, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(SystemExit, match="no checkpoint of this program"):
        go("--resume")


def test_a_large_seed_plays(go):
    assert math.isfinite(go("--seed", "123456789")["eval"]["return_mean"])


def test_a_diverging_rollout_stops_the_run(go, toy, monkeypatch):
    imagine = train.LogoWM.imagine

    def diverging(*args):
        rollout = imagine(*args)
        return rollout | {"uncertainty": rollout["uncertainty"] * math.nan}

    monkeypatch.setattr(train.LogoWM, "imagine", diverging)
    with pytest.raises(SystemExit, match="policy update 2: the uncertainty"):
        go(*toy)


def test_what_follows_a_rollouts_end_may_diverge(go, toy, monkeypatch):
    imagine, ended = train.LogoWM.imagine, []

    def diverging(*args):
        rollout = imagine(*args)
        rollout["valid"][1:, ::2] = 0
        ended.append((rollout["valid"] == 0).sum().item())
        return rollout | {"uncertainty": rollout["uncertainty"] / rollout["valid"]}

    monkeypatch.setattr(train.LogoWM, "imagine", diverging)
    assert go(*toy)["method"] == "logo" and max(ended) > 0


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
    with pytest.raises(SystemExit, match=r"\(3, 73, 96, 10, True\).*\(5, 91, 120, 10, True\)"):
        go("--dataset", str(nameless), "--env-id", "2s3z")


def test_a_folder_that_cannot_be_written_is_refused_first(go, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SystemExit, match=r"train.py: .*file/run cannot be written \((?!None)"):
        go(out="file/run")


def test_a_full_disk_leaves_no_half_written_file(go, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit, match="No space left"):
        go()
    assert list((tmp_path / "run").iterdir()) == []


def test_rows_of_a_grid_do_not_make_the_commit_dirty(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "__file__", str(tmp_path / "experiment" / "setup.py"))
    assert setup.commit() == "unknown"
    (tmp_path / "results").mkdir()
    for name in ("results/runs.csv", "train.py"):
        (tmp_path / name).write_text("old")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = setup.commit()
    (tmp_path / "results" / "runs.csv").write_text("a row more")
    assert setup.commit() == clean and len(clean) == 12
    (tmp_path / "train.py").write_text("new")
    assert setup.commit() == f"{clean}-dirty"


def test_every_flag_tells_its_source():
    source = Path(train.__file__).read_text()
    for f in dataclasses.fields(train.Args):
        found = re.search(rf'^    {f.name}: .*\n    """(.*\n?.*)"""', source, re.M)
        assert found, f"{f.name} has no docstring"
        assert re.search(r"\[[^]]+\]$", found.group(1)), f"{f.name} does not say where it is from"
