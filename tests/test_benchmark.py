"""The benchmark measures what it says: FLOPs, the rival's computation, rows with finite numbers."""

import dataclasses
import json
import math
import shlex
from types import SimpleNamespace

import pytest
import rivals
import speed
import torch
from rivals import Ensemble
from speed import slope
from timing import Clock, Entry, Row, count_flop, read, write

import benchmark


def test_flop_of_a_known_layer_forwards_and_backwards():
    layer, x = torch.nn.Linear(5, 7), torch.randn(11, 5, requires_grad=True)
    assert count_flop(lambda: layer(x)) == 2 * 11 * 5 * 7
    # backwards: one product as large for the weights, one for the input
    assert count_flop(lambda: layer(x).sum().backward()) == 3 * 2 * 11 * 5 * 7


def test_batched_and_looped_ensemble_compute_the_same_as_the_formula():
    torch.manual_seed(0)
    batched, looped = Ensemble(6, 4, hidden=8), Ensemble(6, 4, hidden=8, looped=True)
    looped.load_state_dict(batched.state_dict())
    x = torch.randn(5, 10)
    for ours, theirs in zip(batched(x), looped(x), strict=True):
        assert ours.shape == (7, 5, 7)
        torch.testing.assert_close(ours, theirs)
    h = x
    for w, b in zip(batched.weights, batched.biases, strict=True):
        h = (h * torch.sigmoid(h) if h is not x else h) @ w[3] + b[3]  # the fourth member
    torch.testing.assert_close(batched(x)[0][3], h[:, :7])


def test_ensemble_draws_from_the_elites_and_doubts_by_the_widest_member():
    torch.manual_seed(0)
    model = Ensemble(2, 1, hidden=4)
    with torch.no_grad():
        for w in model.weights:
            w.zero_()
        mean, log_var = model.biases[-1].chunk(2, -1)  # (7,1,3) each
        mean.copy_(torch.arange(7.0).view(7, 1, 1) * 100)
        log_var.fill_(-8.0)
        log_var[6] = 0.0  # no elite, but the most doubtful
    out = model.step(torch.zeros(500, 2), torch.zeros(500, 1))
    drawn = (out["next_obs"] / 100).round()
    assert set(drawn.flatten().tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}  # never 5 or 6
    assert torch.equal(drawn[:, 0], drawn[:, 1])  # one member a row
    std = model(torch.zeros(500, 3))[1][6].mul(0.5).exp()  # (500,3)
    torch.testing.assert_close(out["penalty"], std.norm(dim=-1))
    torch.testing.assert_close(out["reward"], out["raw_reward"] - out["penalty"])


def test_ensemble_rolls_out_what_its_steps_predict():
    model = Ensemble(6, 4, hidden=8)
    obs, actions = torch.randn(5, 6), torch.randn(3, 5, 4)
    torch.manual_seed(0)
    out = model.rollout(obs, actions)
    torch.manual_seed(0)
    for chosen in actions:
        obs = model.step(obs, chosen)["next_obs"]
    assert torch.equal(out["next_obs"], obs)


def test_a_race_takes_turns_and_reports_the_median():
    order = []
    entries = [Entry(Row(name, "test"), lambda name=name: order.append(name), 10) for name in "ab"]
    rows = Clock(torch.device("cpu"), repetitions=3, least=0.0).race(entries)
    assert "".join(order[-6:]) == "ababab"
    for row in rows:
        assert row.rate == pytest.approx(10 / row.seconds)
        assert 0 <= row.spread < math.inf and row.gflops is None


def test_slope_is_the_exponent():
    rows = [Row("", "", batch=b, seconds=3.0 * b**0.7) for b in (64, 128, 1024)]
    assert slope(rows, "batch") == pytest.approx(0.7)


def test_speed_writes_all_columns_with_finite_positive_numbers(tmp_path, capsys):
    out, threads = tmp_path / "speed.csv", torch.get_num_threads()
    rows = speed.speed("cpu", quick=True, out=out)
    torch.set_num_threads(threads)
    for row in rows:
        for name in ("seconds", "rate", "gflops", "share_of_peak", "parameters", "peak_memory_mb"):
            value = getattr(row, name)
            assert value is None or 0 < value < math.inf, (name, row)
        assert row.unit and row.machine and row.versions and row.threads == 1, row
        assert row.gflops or row.what in ("Adam", "draw from D_m"), row
    raced = {row.implementation for row in rows if row.what == "imagine" and row.task == "2s3z"}
    assert raced == {"LOGO"} | {f"ensemble 7 x [16]*4, {how}" for how in ("batched", "looped")}
    assert {row.grows for row in rows} == {"", "agents", "batch", "horizon", "rows"}
    assert all(0 < row.share_of_bound for row in rows if "update" in row.what)
    one, five = (
        {r.what: r for r in rows if r.task and not r.grows and r.seeds == k} for k in (1, 5)
    )
    for what in speed.TRAINING[:2]:
        assert five[what].parameters == 5 * one[what].parameters
        flop = [row.gflops * row.seconds for row in (one[what], five[what])]
        assert flop[1] == pytest.approx(5 * flop[0], rel=1e-3)
    assert len(read(out)) == len(rows)

    # another machine's rows stay, this one's are replaced
    elsewhere = [dataclasses.replace(row, machine="another") for row in read(out)]
    write(out, [*elsewhere, dataclasses.replace(rows[0], what="to be replaced")])
    speed.speed("cpu", quick=True, out=out)
    torch.set_num_threads(threads)
    after = read(out)
    assert after[: len(rows)] == elsewhere and len(after) == 2 * len(rows)
    assert "to be replaced" not in {row.what for row in after}
    capsys.readouterr()
    speed.table(out)
    printed = capsys.readouterr().out
    assert printed.count("time ~ size^p") == 2 and "\nanother; cpu" in f"\n{printed}"


def test_rows_survive_the_file(tmp_path):
    row = Row("a, b", 'c"d', rows=10**7, seconds=0.125, share_of_peak=0.5, commit="123e4567")
    write(tmp_path / "x.csv", [row])
    assert read(tmp_path / "x.csv") == [row]
    header = (tmp_path / "x.csv").read_text().splitlines()[0]
    assert header.split(",") == [field.name for field in dataclasses.fields(Row)]


def test_a_missing_checkout_is_one_sentence(tmp_path):
    with pytest.raises(ImportError, match="--offlinerl-kit .*: no checkout"):
        rivals.load_kit(tmp_path)


def test_a_grid_runs_what_is_missing_resumes_what_was_begun_and_names_what_failed(
    tmp_path, monkeypatch, capsys
):
    maps, calls = ("3s_vs_5z", "2s3z"), []
    every = benchmark.cells(maps, ["medium"], ["logo", "macql"], 2, "--threads 1", tmp_path)
    for cell in every:  # LOGO is finished, MACQL on 2s3z was interrupted, on 3s_vs_5z not begun
        for seed in cell.seeds if cell.folder.name != "3s_vs_5z-medium-macql" else ():
            seed.mkdir(parents=True)
            finished = cell.folder.name.endswith("logo")
            (seed / ("final.json" if finished else "checkpoint.pt")).write_text(
                json.dumps({"args": cell.args | {"seed": int(seed.name[-1])}})
            )

    def run(command, stdout, **_):
        calls.append(command)
        stdout.write("working\nno such thing\n")
        stdout.flush()
        return SimpleNamespace(returncode=int("3s_vs_5z" in command))

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    monkeypatch.setattr(benchmark.report, "compare", lambda folders: f"{len(folders)} runs")
    flags = ["grid", "--env-ids", *maps, "--qualities", "medium", "--num-seeds", "2"]
    flags += ["--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="3s_vs_5z.*no such thing"):
        benchmark.cli([*flags, "--flags=--threads 1"])
    assert [("--resume" in call, call[call.index("--env-id") + 1]) for call in calls] == [
        (False, "3s_vs_5z"), (True, "2s3z"),
    ]  # fmt: skip
    for call in calls:
        assert " ".join(call).count("--num-seeds 2 --synthetic-fraction 0 --threads 1 --out") == 1
    assert "4 runs" in capsys.readouterr().out

    # what is finished was made with other flags
    with pytest.raises(SystemExit, match="logo/seed1/final.json is of a run with --threads 1: "):
        benchmark.cli([*flags, "--methods", "logo"])
    assert len(calls) == 2


@pytest.mark.parametrize(
    "command, told",
    [
        ("grid --jobs 0", "--jobs 0"),
        ("grid --flags=--seed=3", "--seed=3 is for the grid itself"),
        ("grid --flags='--threads 1 --num-seeds 3'", "--num-seeds is for the grid itself"),
        ("grid --flags=--u-scale=0", "--u-scale is 0"),
        ("speed --threads 0", "--threads 0: give 1 or more"),
        ("speed --quick", "--quick .* another --out"),
        ("speed --compiled", "no C\\+\\+ compiler"),
        ("speed --device cuda", "no GPU"),
        ("speed --out README.md", "README.md has other columns"),
        ("table --path README.md", "README.md has other columns"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_any_work(command, told, monkeypatch):
    def works(*args, **kwargs):
        raise AssertionError("work was done")

    monkeypatch.chdir(benchmark.Path(benchmark.__file__).parent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(Clock, "race", works)
    monkeypatch.setattr(benchmark.subprocess, "run", works)
    with pytest.raises(SystemExit, match=told) as error:
        benchmark.cli(shlex.split(command))
    assert "\n" not in str(error.value)
