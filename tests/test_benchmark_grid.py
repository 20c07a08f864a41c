"""The grid's runs, and the tables and the picture that are made of their rows."""

import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

import train
from benchmark import __main__ as command_line
from benchmark import figures, grid, iqm, launchers, tables
from benchmark.ablations import BEFORE_D30, DEPARTURES, added_alone
from benchmark.grid import variant
from benchmark.markdown import fill, fill_files
from benchmark.rows import ROOT, Depth, Error, Result, key_of, read, record, result, write
from experiment.tracking import plain

ROW = Result(
    "logo", "", "3s_vs_5z", "smax", "medium", 1, 17.5, 0.2, 0.8, 17.0, 14.0, 2560, 0.02, 0.03, 0.05,
    0.3, 0.4, 0.6, 8000, 300.0, "abc", "a machine", "torch 2", "python train.py",
)  # fmt: skip


BY_DEPTH = ("monte_carlo", "value_true", "spread_true", "value_imagined", "spread_imagined")


def row(method="logo", seed=1, mean=17.5, **changes) -> Result:
    return Result(**{**vars(ROW), "method": method, "seed": seed, "return_mean": mean, **changes})


def final_of(args, mean: float) -> dict:
    """The parts of final.json that a row is made of."""
    score = {"return_mean": mean, "return_ci95": 0.1, "win_rate": 0.5, "episodes": 10}
    return {
        "args": plain(args), "updates": 20, "env_id": args.env_id, "backend": "smax",
        "seed": args.seed,
        "eval": score, "clone": score, "dataset": {"return_mean": 3.0}, "world_model": None,
        "time": {"total_s": 1.0}, "commit": "abc", "machine": "a machine",
        "versions": {"torch": "2"},
    }  # fmt: skip


@pytest.fixture
def trainings(monkeypatch):
    """Stands for the processes: notes their commands, writes final.json and oracle's depth.json."""
    calls = []

    def run(command, **_):
        flags = command[command.index("--env-id") :]
        calls.append(command[1:])
        out = Path(flags[flags.index("--out") + 1])
        args = train.parse([f for f in flags if f != "--resume"])
        out.mkdir(parents=True, exist_ok=True)
        if args.seed == 13:
            (out / "checkpoint.pt").touch()
            print("train.py: no luck", file=_["stdout"], flush=True)
            return SimpleNamespace(wait=lambda: 1)
        (out / "final.json").write_text(json.dumps(final_of(args, 10.0 + args.seed)))
        if "benchmark.oracle" in command and "--windows" not in command:
            (out / "depth.json").write_text(json.dumps(dict.fromkeys(BY_DEPTH, [0.5, None])))
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(launchers.subprocess, "Popen", run)
    return calls


def run_grid(tmp_path, seeds=(1, 2), flags="--threads 1", **options):
    where = {"out": tmp_path / "runs", "results": tmp_path / "runs.csv"}
    grid.grid(("3s_vs_5z",), ("medium",), seeds=seeds, flags=flags, **where, **options)
    return read(tmp_path / "runs.csv", Result)


def test_a_grid_runs_every_method_and_seed_once(tmp_path, trainings):
    rows = run_grid(tmp_path, jobs=2)
    assert {(r.method, r.seed, r.return_mean) for r in rows} == {
        ("logo", 1, 11.0), ("logo", 2, 12.0), ("macql", 1, 11.0), ("macql", 2, 12.0),
    }  # fmt: skip
    assert len(trainings) == 4 and all(r.variant == "" and r.commit == "abc" for r in rows)
    macql = [flags for flags in trainings if "--synthetic-fraction" in flags]
    assert len(macql) == 2 and all("--threads" in flags for flags in trainings)


def test_a_grid_skips_what_is_finished(tmp_path, trainings):
    first = run_grid(tmp_path)
    shutil.rmtree(tmp_path / "runs" / "3s_vs_5z-medium-macql-seed2")
    trainings.clear()
    assert sorted(map(str, run_grid(tmp_path))) == sorted(map(str, first))
    assert len(trainings) == 1 and "--resume" not in trainings[0]


def test_a_row_of_another_commit_is_not_replaced_by_an_old_run(tmp_path, trainings):
    run_grid(tmp_path, seeds=(1,))
    file = tmp_path / "runs.csv"
    file.write_text(file.read_text().replace(",abc,", ",newer,"))
    before = file.read_bytes()
    with pytest.raises(ValueError, match="is of commit abc, its row in .* of newer: delete the"):
        run_grid(tmp_path, seeds=(1,))
    assert file.read_bytes() == before


def test_results_that_cannot_be_written_are_refused_first(tmp_path, trainings):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        grid.grid(("3s_vs_5z",), ("medium",), out=tmp_path, results=tmp_path / "file" / "runs.csv")
    assert trainings == []


def test_a_failed_run_is_named_and_resumed_later(tmp_path, trainings):
    for resumed in (False, True):
        with pytest.raises(ValueError, match="2 runs failed.*seed13: train.py: no luck .see"):
            run_grid(tmp_path, seeds=(13, 1))
        failed = [flags for flags in trainings if "13" in flags]
        assert all(("--resume" in flags) == resumed for flags in failed) and len(failed) == 2
        trainings.clear()
    assert len(read(tmp_path / "runs.csv", Result)) == 2


def test_an_interrupted_grid_ends_its_runs_and_starts_no_more(tmp_path, monkeypatch):
    ended, began = threading.Event(), []

    def start(command, **_):
        began.append(command)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return SimpleNamespace(wait=lambda: 143 if ended.wait(20) else 0, terminate=ended.set)

    monkeypatch.setattr(launchers.subprocess, "Popen", start)
    line = ["grid", "--env-ids", "3s_vs_5z", "--qualities", "medium", "--seeds", "1", "2"]
    with pytest.raises(SystemExit) as error:
        command_line.cli([*line, "--out", str(tmp_path), "--results", str(tmp_path / "runs.csv")])
    assert error.value.code == 143 and ended.is_set() and len(began) == 1


def test_a_run_with_other_flags_is_refused(tmp_path, trainings):
    run_grid(tmp_path)
    with pytest.raises(ValueError, match="is of a run with --gamma 0.99"):
        run_grid(tmp_path, flags="--gamma 0.9")


def test_a_ceiling_runs_the_oracle_and_keeps_values_by_depth(tmp_path, trainings):
    where = {"out": tmp_path / "runs", "results": tmp_path / "ceiling.csv"}
    methods = ("macql", "windows", "simulator-obs", "model")
    grid.ceiling(("3s_vs_5z",), ("medium",), methods, (1,), **where)
    rows = read(tmp_path / "ceiling.csv", Result)
    oracle = "python -m benchmark.oracle "
    programs = {r.method: r.command.partition(" --env-id")[0] + " " for r in rows}
    assert programs == {
        "macql": "python train.py ", "windows": f"{oracle}--windows ",
        "simulator-obs": f"{oracle}--model obs ",
        "model": f"{oracle}--model obs state reward end avail ",
    }  # fmt: skip
    assert [shlex.join(["python", *c]).partition(" --env-id")[0] + " " for c in trainings][1:] == [
        programs[m] for m in methods[1:]
    ]
    depths = read(tmp_path / "depth.csv", Depth)
    assert {(d.method, d.step, d.value_true) for d in depths} == {
        (method, *step) for method in methods[2:] for step in ((0, 0.5), (1, None))
    }


def test_a_run_without_its_values_by_depth_goes_on(tmp_path, trainings):
    """It was stopped between final.json and depth.json."""
    where = {"out": tmp_path / "runs", "results": tmp_path / "ceiling.csv"}
    run = ("3s_vs_5z",), ("medium",), ("simulator",), (1,)
    grid.ceiling(*run, **where)
    depth = next((tmp_path / "runs").glob("*/depth.json"))
    depth.unlink()
    (depth.parent / "checkpoint.pt").touch()
    (tmp_path / "ceiling.csv").unlink()
    grid.ceiling(*run, **where)
    assert "--resume" in trainings[1] and "--resume" not in trainings[0]
    assert [row.method for row in read(tmp_path / "ceiling.csv", Result)] == ["simulator"]


def test_a_variant_is_spelled_by_what_differs(tmp_path):
    def variant(flags):
        return grid.plan(["3s_vs_5z"], ["medium"], ["logo"], [1], flags, tmp_path)[0].variant

    assert variant("--threads 1 --device cpu --horizon 15") == ""
    assert variant("--no-clamp --u-scale 1") == "--no-clamp --u-scale 1"
    assert variant("--u-scale 1.0 --no-clamp") == variant("--no-clamp --u-scale 1")
    assert variant("--paper") == "--paper"
    assert variant("--paper --critics 2") == "--paper --critics 2"


def test_variants_are_an_axis_with_folders_of_its_own(tmp_path):
    given = (["2s3z"], ["medium"], ["logo", "direct"], [1], "--threads 1", tmp_path)
    runs = grid.plan(*given, "; --horizon 5;--uncertainty none --no-zeros ;")
    assert len(runs) == len({run.folder for run in runs}) == 6
    assert [r.variant for r in runs if r.method == "logo"] == [
        "", "--horizon 5", "--no-zeros --uncertainty none",
    ]  # fmt: skip
    assert runs[0].folder.name == "2s3z-medium-logo-seed1"  # as without the axis
    assert runs[1].folder.name == "2s3z-medium-logo-horizon-5-seed1"
    assert all(run.flags[-2:] != ["--threads", "1"] for run in runs if run.variant)
    (run,) = grid.plan(*given[:2], ["logo"], *given[3:], "--dataset far/away.h5")
    assert run.folder.parent == tmp_path
    with pytest.raises(ValueError, match="--variants: --seed is the grid's own"):
        grid.plan(*given, "--seed 2")
    with pytest.raises(ValueError, match="--env-ids: 'nothere' is none of 3s_vs_5z"):
        grid.plan(["nothere"], *given[1:])


def test_flags_of_imagination_are_train_pys():
    known = {f"--{k.replace('_', '-')}" for k in vars(train.Args())}
    assert {x.replace("--no-", "--") for x in tables.IMAGINATION} <= known
    assert not tables.REMOVED & known


def test_macql_is_compared_without_flags_of_imagination():
    assert tables.of_the_learner("--gamma 0.9 --u-scale 0.5 --no-heads --n-step 1") == (
        "--gamma 0.9 --n-step 1"
    )
    assert tables.of_the_learner("--draw-zeros --horizon 5") == ""


def test_a_new_row_replaces_the_same_experiment(tmp_path):
    path = tmp_path / "runs.csv"
    for r in (row(), row(seed=2), row(mean=3.0, commit="def")):
        record(path, r)
    assert read(path, Result) == [row(mean=3.0, commit="def"), row(seed=2)]


def test_a_row_holds_what_final_json_says():
    args = train.parse(["--env-id", "3s_vs_5z", "--seed", "4"])
    final = final_of(args, 5.0) | {"eval": None, "clone": None, "backend": "offline"}
    made = result(final, "logo", "", "medium", "python train.py")
    assert made.return_mean is None and made.episodes == 0 and made.state_mse is None
    assert (made.seed, made.data_return, made.updates, made.versions) == (4, 3.0, 20, "torch 2")


# ---------------------------------------------------------------------------------------- tables


ROWS = [
    *(row("logo", s, m) for s, m in ((1, 17.0), (2, 18.0), (3, 19.0))),
    *(row("macql", s, m, state_mse=None) for s, m in ((1, 16.5), (2, 18.5), (4, 10.0))),
    row("logo", 1, 3.0, variant="--paper"),
    row("logo", 1, None, backend="offline", env_id="3m", win_rate=None, clone_return=None),
]


def test_means_have_students_interval():
    made = tables.results_tables(ROWS)
    half = scipy.stats.t.ppf(0.975, 2) * np.std([17, 18, 19], ddof=1) / 3**0.5
    assert f"| 18.00 ± {half:.2f} (80%) |" in made["comparison"]
    assert made["comparison"].count("\n") == 2  # --paper and 3m have no line there
    assert "| 3m | offline |" in made["scores"] and "not evaluated" in made["scores"]


def test_means_say_of_how_many_runs_they_are():
    rows = [row("logo", 1, 4.0, clone_return=2.0), row("logo", 2, 6.0, clone_return=None)]
    rows += [row("macql", s, 3.0) for s in (1, 2)]
    groups = tables.group(rows)
    assert "| 2.00 (1) |" in tables.scores(groups) and "| 2.00 (1) |" in tables.comparison(groups)
    assert tables.gains(groups, True).endswith("| +1.00, +3.00 | +2.00 (1) |")


def test_differences_are_paired_by_seed():
    groups = tables.group(ROWS)
    cell = tables.Cell("3s_vs_5z", "smax", "medium")
    a, b = groups[cell, "", "logo"], groups[cell, "", "macql"]
    by_seed, (low, high) = tables.paired_difference(a, b)
    assert by_seed == [0.5, -0.5]  # seeds 1 and 2; 3 and 4 have no partner
    draws = np.random.default_rng(0).choice(by_seed, (tables.BOOTSTRAP_DRAWS, 2)).mean(1)
    assert (low, high) == tuple(np.quantile(draws, (0.025, 0.975))) == (-0.5, 0.5)
    half = scipy.stats.t.ppf(0.975, 1) * 0.5  # times sqrt(1/2), over sqrt(2)
    both = f"| +0.00 | -0.50 to +0.50 | {-half:+.2f} to {half:+.2f} | +0.50, -0.50 |"
    assert both in tables.gains(groups, True)
    assert tables.paired_difference(a, {1: b[1]}) == ([0.5], None)


def test_flags_of_imagination_are_compared_with_plain_macql():
    rows = [
        row("macql", 1, 10.0), row("macql", 1, 7.0, variant="--n-step 1"),
        row("logo", 1, 12.0, variant="--draw-zeros --horizon 5"),
        row("logo", 1, 13.0, variant="--wm-updates 8000"),
        row("logo", 1, 11.0, variant="--n-step 1"),
        row("logo", 1, 9.0, variant="--horizon 5 --n-step 1"),
        row("logo", 1, 19.0, variant="--horizon 5 --gamma 0.9"),  # with nothing
    ]  # fmt: skip
    assert tables.gains(tables.group(rows), True).count("\n") == 1  # LOGO's defaults have no run
    _, _, *lines = tables.gains(tables.group(rows), False).splitlines()
    found = {x[4].strip(): x[6].strip() for x in (line.split("|") for line in lines)}
    assert found == {
        "`--draw-zeros --horizon 5`": "+2.00", "`--wm-updates 8000`": "+3.00",
        "`--n-step 1`": "+4.00", "`--horizon 5 --n-step 1`": "+2.00",
    }  # fmt: skip


def test_a_cell_without_a_common_seed_is_not_in_the_aggregate():
    rows = [row("logo", 1, 11.0), row("macql", 1, 10.0)]
    other = [row("logo", s, 3.0, env_id="2s3z") for s in (2, 3)]
    rows += [*other, row("macql", 1, 9.0, env_id="2s3z")]
    assert "| LOGO over MACQL | all | 1 | 1 | 1 | +10.0 |" in tables.aggregate(tables.group(rows))
    assert "| 2s3z | smax | medium | 1-2 |" in tables.comparison(tables.group(rows))


def test_the_aggregate_is_over_cells_in_shares_of_macqls_return():
    maps = {"3s_vs_5z": ([11.0, 12.0], [10.0, 10.0]), "6h_vs_8z": ([8.0, 7.0], [8.0, 8.0])}
    rows = [
        row(method, seed, mean, env_id=env_id)
        for env_id, (logo, macql) in maps.items()
        for method, means in (("logo", logo), ("macql", macql))
        for seed, mean in enumerate(means)
    ]
    lines = tables.aggregate(tables.group(rows)).splitlines()
    every, smax, untuned = ([x.strip() for x in line.split("|")[1:-1]] for line in lines[2:])
    assert smax == ["LOGO over MACQL", "maps", *every[2:]]  # there is no robot
    assert every[1:6] == ["all", "2", "2", "1", f"{(15.0 - 6.25) / 2:+.1f}"]
    low, high = map(float, every[6].split(" to "))
    assert -12.5 <= low < 4.4 < high <= 20.0  # the worst and the best seed alone
    low, high = map(float, every[7].split(" to "))  # t of two numbers: 12.706 standard errors
    assert (low, high) == pytest.approx((4.375 - 12.706 * 10.625, 4.375 + 12.706 * 10.625), abs=0.1)
    assert untuned[1:] == ["not tuned on", "1", "2", "0", "-6.2", "", ""]


def test_the_aggregate_has_the_better_of_macqls_learners():
    rows = [row("logo", 1, 11.0), row("macql", 1, 10.0)]
    rows += [row("logo", 1, 30.0, env_id="Ant-2x4"), row("macql", 1, 10.0, env_id="Ant-2x4")]
    assert "better" not in tables.aggregate(tables.group(rows))
    rows.append(row("macql", 1, 20.0, env_id="Ant-2x4", variant=tables.EARLIER))
    told = tables.aggregate(tables.group(rows))
    assert "| LOGO over MACQL | robots | 1 | 1 | 1 | +100.0 |" in told
    assert "| LOGO over MACQL's better learner | robots | 1 | 1 | 1 | +50.0 |" in told
    assert "| LOGO over MACQL's better learner | all | 2 | 1 | 2 | +30.0 |" in told


def test_the_placebos_gain_and_logos_beyond_it_add_up():
    means = {"macql": [10.0, 20.0], "windows": [11.0, 23.0, 90.0], "logo": [14.0, 22.0]}
    rows = [row(m, seed, x) for m, both in means.items() for seed, x in enumerate(both)]
    rows.append(row("macql", 0, 7.0, env_id="2s3z"))  # no placebo there
    (line,) = tables.placebo(tables.group(rows)).splitlines()[2:]
    assert line.endswith("| +2.00 | +1.00, +3.00 | +1.00 | +3.00, -1.00 |")  # of two seeds
    assert "| medium | 2 |" in line and "2s3z" not in line
    told = tables.aggregate(tables.group(rows))
    assert f"| LOGO over MACQL | maps | 1 | 2 | 1 | {300 / 15:+.1f} |" in told
    assert f"| recorded steps over MACQL | maps | 1 | 2 | 1 | {200 / 15:+.1f} |" in told
    assert f"| LOGO over recorded steps | maps | 1 | 2 | 1 | {100 / 15:+.1f} |" in told
    assert tables.NAMES["windows"] not in tables.world_model(tables.group(rows))


def test_the_bootstrap_draws_seeds_within_cells(monkeypatch):
    monkeypatch.setattr(iqm, "DRAWS", 3000)
    cells, rng = [[1.0, 1.2, 1.1], [5.0, 6.0], [2.0]], random.Random(0)
    naive = []
    for _ in range(3000):
        drawn = [rng.choice(cell) for cell in cells for _ in cell]
        naive.append(scipy.stats.trim_mean(drawn, 0.25))
    expected = np.quantile(naive, (0.025, 0.975))
    np.testing.assert_allclose(iqm.interval(cells), expected, atol=0.1)
    assert iqm.interval([[1.0], [2.0]]) is None  # nothing to draw
    assert iqm.interval([[1.0, 1.0], [2.0, 2.0]]) == (1.5, 1.5)  # never one cell for another


def test_the_iqm_is_of_default_runs_and_says_how_many():
    rows = [
        *(row("logo", s, m, data_return=10.0) for s, m in ((1, 10.0), (2, 20.0), (3, 70.0))),
        row("logo", 1, 40.0, data_return=20.0, env_id="2s3z"),
        row("macql", 2, 15.0, data_return=10.0), row("macql", 4, 99.0, data_return=10.0),
        row("macql", 1, 500.0, data_return=1.0, variant="--paper"),
        row("macql", 1, 5.0, data_return=-1.0, env_id="Hopper-3x1"),
    ]  # fmt: skip
    lines = iqm.iqm_table(tables.group(rows), tables.NAMES).splitlines()[2:]
    logo, macql, *others = ([x.strip() for x in line.split("|")[1:-1]] for line in lines)
    assert logo[:5] == ["LOGO", "2 of 3", "4", "1-3", "2.000"]  # of 1, 2, 2, 7
    assert macql[:5] == ["MACQL", "1 of 3", "2", "2", "5.700"]
    assert macql[6:] == ["+0.500", "", "1, 1"] and logo[6:] == ["", "", ""]  # of seed 2
    assert len(others) == len(grid.BASELINES)
    assert all(x[1:5] == ["0 of 3", "0", "", "not run"] for x in others)


def test_two_grids_that_record_at_once_lose_no_row(tmp_path):
    path = tmp_path / "runs.csv"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda k: record(path, row(seed=k)), range(40)))
    assert {r.seed for r in read(path, Result)} == set(range(40))


def test_a_dataset_called_as_a_quality_has_rows_of_its_own(tmp_path):
    (tmp_path / "medium.h5").write_bytes(b"other data")
    flags = f"--dataset {tmp_path / 'medium.h5'}"
    (run,) = grid.plan(("3s_vs_5z",), ("medium",), ("macql",), (1,), flags, tmp_path)
    assert run.quality.startswith("medium-") and run.quality in run.folder.name


def test_the_field_has_flags_with_which_logo_was_run_too():
    few = "--updates 5"
    rows = [row(), row("omar"), row(variant=few), row("omiga", variant=few)]
    header = tables.field(tables.group(rows)).splitlines()[0]
    assert f"| 3s_vs_5z smax medium | 3s_vs_5z smax medium `{few}` |" in header


def test_the_field_with_earlier_defaults_stands_apart():
    rows = [row(), row("omar", mean=1.5)]
    rows += [row(m, mean=2.5, variant=BEFORE_D30) for m in ("logo", "omar")]
    now, then = (tables.field(tables.group(rows), earlier) for earlier in (False, True))
    assert "1.50 (1)" in now and BEFORE_D30 not in now
    assert "2.50 (1)" in then and "1.50 (1)" not in then and f"`{BEFORE_D30}`" in then


def test_the_field_pairs_equal_seeds():
    rows = [
        row(seed=1, mean=5.0), row(seed=2, mean=8.0), row("macql", 2, 7.0),
        row("omar", 2, 4.0), row("omar", 3, 90.0), row("cfcql", 3, 6.0),
        row("omiga", 1, 1.0, variant="--n-step 1"), row(mean=9.0, env_id="2s3z"),
    ]  # fmt: skip
    groups = tables.group(rows)

    def column(made: str) -> dict[str, str]:
        header, _, *lines = ([x.strip() for x in y.split("|")[1:-1]] for y in made.splitlines())
        assert header[1:] == ["3s_vs_5z smax medium"]  # no baseline was run on 2s3z
        return dict(lines)

    returns, less = column(tables.field(groups)), column(tables.field_differences(groups))
    assert returns["MACQL"] == "7.00 (1)" and returns["CFCQL"] == "6.00 (1)"
    assert returns["LOGO"].startswith("6.50 ±") and returns["LOGO"].endswith("(2)")
    assert returns["OMIGA"] == "not run" and returns["the data"] == "14.0"
    assert less["MACQL"] == "+1.00 (1)" and less["OMAR"] == "+4.00 (1)"  # seed 2 alone
    assert less.keys() == {"MACQL", "OMAR"}  # no seed in common, or not run


def test_uses_of_u_and_horizons_stand_side_by_side():
    rows = [
        row(mean=10.0), row(seed=2, mean=12.0), row(mean=7.0, variant="--uncertainty none"),
        row(mean=6.0, variant="--uncertainty penalty --u-scale 0.2"),
        row(mean=5.5, variant="--uncertainty penalty --u-scale 1"),
        row(mean=99.0, variant="--horizon 5 --uncertainty none"),
        row(mean=98.0, variant="--uncertainty none --critic-first 0"),  # nothing to compare it with
        row(mean=8.0, variant="--horizon 5"), row("macql", mean=3.0),
        row("direct", mean=4.0, env_id="2s3z"), row(mean=1.0, env_id="2s3z"),
    ]  # fmt: skip
    groups = tables.group(rows)
    _, _, *lines = tables.uncertainty(groups).splitlines()
    cells, shorter = ([x.strip() for x in line.strip("|").split("|")] for line in lines)
    assert cells[3] == "" and cells[5:] == ["not run", "7.00", "6.00 (unit 0.2), 5.50 (unit 1)"]
    assert cells[4].startswith("11.00 ±") and cells[4].endswith("(2)")
    assert shorter[3:] == ["`--horizon 5`", "8.00", "not run", "99.00", "not run"]
    error = Error("logo", "3s_vs_5z", "medium", "medium", 1, 9, *[0.5] * 3, 0.125, *[None] * 2,
                  9, 1.0, 9, "", "", "", "")  # fmt: skip
    other = dataclasses.replace(error, tested_on="expert", raw_reward_mse=9.0)
    header, _, *lines = tables.horizons(groups, [error, other], tables.NAMES).splitlines()
    assert len(lines) == 2 and "H = 20" in header  # one horizon alone is no comparison
    cells, without_u = ([x.strip() for x in line.strip("|").split("|")] for line in lines)
    assert cells[3:7] == ["", "LOGO", "8.00", "not run"] and cells[7].startswith("11.00")
    assert cells[8:] == ["not run", "0.1250"]
    assert without_u[3:8] == ["`--uncertainty none`", "LOGO", "99.00", "not run", "7.00"]


def test_sizes_of_the_data_stand_below_each_other():
    rows = [
        row(seed=1, mean=9.0), row("macql", 1, 8.0), row("macql", 2, 6.0, clone_return=None),
        row(seed=2, mean=3.0, variant="--episodes 60"),
        row("macql", 2, 5.0, variant="--episodes 60", clone_return=1.5),
        row(seed=2, mean=77.0, variant="--episodes 60 --n-step 1"),
        row(mean=1.0, env_id="2s3z"),  # one size alone
    ]  # fmt: skip
    _, _, *lines = tables.sizes(tables.group(rows)).splitlines()
    few, usual = ([x.strip() for x in line.split("|")[4:-1]] for line in lines)
    assert few == ["", "60", "1.50 (1)", "5.00", "3.00", "-2.00"]
    assert usual[1] == "600" and usual[4:] == ["9.00", "+1.00"]
    assert usual[2].endswith("(1)") and usual[3].endswith("(2)")


def test_departures_are_compared_with_the_default_seed_by_seed():
    def before(flags="", **others):
        return row(variant=f"{BEFORE_D30} {flags}".strip(), **others)

    rows = [
        before(seed=1, mean=9.0), before(seed=2, mean=6.0), row(seed=2, mean=6.5),
        row("macql", mean=1.0, variant=f"{BEFORE_D30} --n-step 1"),
        row(seed=2, mean=7.0, variant="--n-step 1"),  # with D30
        row(seed=4, mean=9.0), row(seed=4, mean=8.0, variant="--no-recorded-critic"),
        before("--n-step 1", seed=2, mean=4.0), before("--n-step 1", seed=1, mean=8.0),
        before("--n-step 1", seed=3, mean=99.0), before("--no-heads", seed=1, mean=10.0),
        before("--n-step 1 --no-heads", seed=1, mean=0.0), before(mean=1.0, env_id="2s3z"),
        row(seed=2, mean=0.5, variant="--paper"), row(seed=2, mean=2.0, variant="--paper --heads"),
        row(seed=2, mean=0.0, variant="--paper --n-step 5"), before("--horizon 5", mean=7.0),
        before("--imagined-rows instead", seed=2, mean=5.0),
        before("--imagined-rows printed", seed=2, mean=4.5),
        row(seed=2, mean=5.5, variant="--imagined-rows printed"),
        row(seed=2, mean=5.0, variant="--imagined-rows instead --no-recorded-critic"),
        row(seed=2, mean=1.5, variant="--paper --imagined-rows instead"),
        row(seed=2, mean=2.5, variant="--paper --imagined-rows added"),
        before("--imagined-rows printed", mean=3.0, env_id="2s3z"),  # nothing to compare with
    ]  # fmt: skip
    tuning = tables.ceiling_tables(tables.group(rows))["tuning"]
    assert f"`{BEFORE_D30} --imagined-rows printed`" in tuning
    assert f"`{BEFORE_D30} --no-heads`" not in tuning
    header, _, *lines = tables.departures(tables.group(rows)).splitlines()
    assert header.count("3s_vs_5z smax medium") == 2 and "2s3z" not in header
    cells = [[x.strip() for x in line.split("|")[1:-1]] for line in lines]
    by_id = {(id, defaults): x for id, _, defaults, *x in cells}
    now, then = "present", "before D30"
    assert by_id["none", now][0].startswith("7.75 ±") and by_id["none", now][1] == "0.50"
    assert by_id["none", then][0].startswith("7.50 ±")
    assert by_id["D28", then] == ["-1.50 (-1.00, -2.00)", ""]
    assert by_id["D28", now] == ["+0.50", "-0.50"] and by_id["D3", then] == ["+1.00", "+1.50"]
    assert by_id["all", then] == ["-5.50", ""] and by_id["D30", now][1] == "not run"
    assert by_id["D30", now][0] == "-0.75 (-0.50, -1.00)"  # seed 2 of then, seed 4 of now
    assert by_id["D8", then] == ["-0.50", ""] and by_id["D8", now] == ["+0.50", "+1.00"]
    assert by_id["D27", then] == ["-1.00", "+1.00"]
    assert by_id["D5", ""] == ["not run", "not run"] and len(by_id) == 2 + len(DEPARTURES) + 2


def test_every_departure_with_a_flag_has_its_line():
    text = (ROOT / "docs" / "deviations.md").read_text()
    rows = re.findall(r"^\| (D\d+) \|([^|]*)\|[^|]*\| `(--[^`]*)`", text, re.M)
    column = {name: flag for name, here, flag in rows if not here.startswith(" robots:")}
    flags = {name: flag for name, flag in column.items() if flag != "--paper"}
    assert set(DEPARTURES.values()) == {*flags, "all"}
    usual = train.parse([])
    for spelled, name in DEPARTURES.items():
        asked = flags.get(name, "--paper")
        against = train.parse(["--paper"]) if asked == "--paper" else usual
        differs = variant(train.parse(asked.split()), against)
        assert differs == spelled
        if name != "all":  # the letter with this departure alone, spelled as its row would be
            added = train.parse(added_alone(spelled).split())
            assert variant(added, train.parse(["--paper"])) == added_alone(spelled)
            still = variant(dataclasses.replace(added, paper=False), usual).split()
            assert name == "D8" or not {x for x in spelled.split() if x[:2] == "--"} & {*still}


def test_the_ceiling_has_a_column_for_each_content_of_d_m():
    rows = [
        row("macql", mean=1.0), row("simulator", mean=2.0), row("simulator-end", mean=3.0),
        row("logo", mean=4.0), row("logo", mean=5.0, variant="--gamma 0.5"),
    ]  # fmt: skip
    made = tables.ceiling_tables(tables.group(rows))
    (header, plain), (short, other) = (
        [[x.strip() for x in line.split("|")] for line in made[k].splitlines() if "---" not in line]
        for k in ("ceiling", "tuning")
    )
    assert plain[header.index("nothing (MACQL)")] == "1.00"
    assert plain[header.index("true simulator")] == "2.00"
    assert plain[header.index("its end by LOGO")] == "3.00"
    assert (plain[header.index("LOGO")], other[short.index("LOGO")]) == ("4.00", "5.00")
    assert other[short.index("flags")] == "`--gamma 0.5`" and "true simulator" not in short


def test_the_ceiling_is_drawn_of_rows_with_the_usual_flags():
    rows = [row("macql"), row("simulator", mean=2.0), row("logo", variant="--gamma 0.5")]
    values = [Depth("simulator", "", *key_of(ROW)[2:5:2], 1, h, 1.0, 2.0, 0.1, None, None, "abc")
              for h in range(3)]  # fmt: skip
    groups = tables.group(rows)
    picture = figures.draw_ceiling(groups, values)
    assert picture[:4] == b"\x89PNG" and picture == figures.draw_ceiling(groups, values)
    assert picture != figures.draw_ceiling(groups, values[:2])
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.draw_ceiling(tables.group(rows[2:]), values)


def test_values_by_depth_are_of_a_variant_that_has_them():
    part = Depth("simulator-obs", "", *key_of(ROW)[2:5:2], 1, 0, 1.0, 2.0, 0.1, None, None, "abc")
    whole = dataclasses.replace(part, method="simulator", variant="--gamma 0.5")
    rows = [row("simulator"), row("simulator-obs"), row("simulator", variant="--gamma 0.5")]
    nothing = figures.draw_ceiling(tables.group(rows), [])
    assert figures.draw_ceiling(tables.group(rows), [part]) == nothing  # no empty panel
    assert figures.draw_ceiling(tables.group(rows), [part, whole]) != nothing


def test_tables_do_not_depend_on_the_order_of_rows():
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    assert tables.results_tables(shuffled) == tables.results_tables(ROWS)
    first, again = (figures.draw_comparison(tables.group(x)) for x in (ROWS, shuffled))
    assert first == again


def test_the_picture_of_the_field_needs_another_method():
    assert figures.draw_field(tables.group(ROWS)) is None
    one, other = (figures.draw_field(tables.group([*ROWS, row("omar", 1, m)])) for m in (9.0, 3.0))
    assert one[:4] == b"\x89PNG" and one != other


def test_marked_blocks_are_filled_and_nothing_else(tmp_path):
    text = "a\n<!-- table: x -->\nold\n<!-- /table -->\nb\n<!-- table: y -->\n<!-- /table -->\n"
    made = fill(text, {"x": "new", "y": "1\n2"})
    assert made == text.replace("old", "new").replace("y -->\n", "y -->\n1\n2\n")
    path = tmp_path / "t.md"
    path.write_text(text)
    assert fill_files([path], {"x": "new", "y": "1\n2"}) == [path] and path.read_text() == made
    assert fill_files([path], {"x": "new", "y": "1\n2"}) == []


@pytest.mark.parametrize("text", ["<!-- table: z -->\n<!-- /table -->", "<!-- table: x -->\n"])
def test_unknown_or_open_blocks_are_refused(text, tmp_path):
    path = tmp_path / "t.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="t.md: "):
        fill_files([path], {"x": "new"})
    assert path.read_text() == text


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "runs.csv"
    write(path, [ROW], Result)
    path.write_text(path.read_text().replace("17.5", "many"))
    with pytest.raises(ValueError, match="runs.csv, line 2: not a row"):
        read(path, Result)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="runs.csv is not a file of"):
        read(path, Result)


def test_the_table_of_errors_has_room_for_every_quality():
    one = read(tables.ERRORS, Error)[0]
    rows = [dataclasses.replace(one, method="logo", tested_on=x) for x in "abc"]
    rows.append(dataclasses.replace(rows[0], method="direct"))
    lines = tables.errors_table([dataclasses.replace(r, trained_on="a") for r in rows]).splitlines()
    assert {line.count("|") for line in lines} == {3 + 3 * 5 + 1}
    assert lines[0].count("tested on") == 3


def test_the_texts_hold_the_tables_of_the_committed_rows():
    made = tables.results_tables(read(tables.RUNS, Result))
    made |= tables.ceiling_tables(tables.group(read(tables.CEILING, Result)))
    errors, groups = read(tables.ERRORS, Error), tables.group(read(tables.RUNS, Result))
    made["errors"] = tables.errors_table(errors)
    made["horizons"] = tables.horizons(groups, errors, tables.NAMES)
    made["speed"] = tables.speed_tables(read(tables.SPEED, tables.Row))
    made["coverage"] = tables.coverage_table(read(tables.VISITS, tables.Bin), tables.NAMES)
    used = set()
    for path in tables.TEXTS:
        text = path.read_text()
        assert fill(text, made) == text, f"python -m benchmark tables --write changes {path}"
        used |= {name for name in made if f"<!-- table: {name} -->" in text}
    assert used == set(made)


def test_the_pictures_are_drawn_of_the_committed_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "png", lambda _: b"drawn")  # pixels take most of the time
    figures.figures(folder=tmp_path)
    drawn = {p.name for p in tmp_path.iterdir()}
    assert drawn >= {"comparison.png", "field.png", "ceiling.png"}
    assert all((ROOT / "results" / name).exists() for name in drawn)
