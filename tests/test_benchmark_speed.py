"""Measurements of speed: FLOPs, the rival's computation, rows with finite numbers."""

import dataclasses
import math

import pytest
import torch

from benchmark import speed, timing
from benchmark.__main__ import cli
from benchmark.ensemble import Ensemble, load_kit
from benchmark.rows import read, write
from benchmark.speed_tables import TRAINING, exponent, speed_tables
from benchmark.timing import Clock, Entry, Row, count_flop
from macql import MACQL


def test_flop_of_a_layer_forwards_and_backwards():
    layer, x = torch.nn.Linear(5, 7), torch.randn(11, 5, requires_grad=True)
    assert count_flop(lambda: layer(x)) == 2 * 11 * 5 * 7
    # backwards: one product as large for the weights, one for the input
    assert count_flop(lambda: layer(x).sum().backward()) == 3 * 2 * 11 * 5 * 7


def test_batched_and_looped_ensemble_equal_the_formula():
    torch.manual_seed(0)
    batched, looped = Ensemble(6, 4, hidden=8), Ensemble(6, 4, hidden=8, looped=True)
    looped.load_state_dict(batched.state_dict())
    x = torch.randn(5, 10)
    for ours, theirs in zip(batched.net(x), looped.net(x), strict=True):
        assert ours.shape == (7, 5, 7)
        torch.testing.assert_close(ours, theirs)
    h = x
    for w, b in zip(batched.net.weights, batched.net.biases, strict=True):
        h = (h * torch.sigmoid(h) if h is not x else h) @ w[3] + b[3]  # the fourth member
    torch.testing.assert_close(batched.net(x)[0][3], h[:, :7])


def test_ensemble_samples_elites_and_penalises_the_widest():
    torch.manual_seed(0)
    model = Ensemble(2, 1, hidden=4)
    with torch.no_grad():
        for w in model.net.weights:
            w.zero_()
        mean, log_var = model.net.biases[-1].chunk(2, -1)  # (7,1,3) each
        mean.copy_(torch.arange(7.0).view(7, 1, 1) * 100)
        log_var.fill_(-8.0)
        log_var[6] = 0.0  # no elite, but the widest
    out = model.step(torch.zeros(500, 2), torch.zeros(500, 1))
    drawn = (out["next_obs"] / 100).round()
    assert set(drawn.flatten().tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}  # never 5 or 6
    assert torch.equal(drawn[:, 0], drawn[:, 1])  # one member a row
    std = model.net(torch.zeros(500, 3))[1][6].mul(0.5).exp()  # (500,3)
    torch.testing.assert_close(out["penalty"], std.norm(dim=-1))
    torch.testing.assert_close(out["reward"], out["raw_reward"] - out["penalty"])


def test_ensemble_rollout_equals_its_steps():
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
    rows = Clock(torch.device("cpu"), repetitions=3, at_least=0.0).race(entries)
    assert "".join(order[-6:]) == "ababab"
    for row in rows:
        assert row.rate == pytest.approx(10 / row.seconds)
        assert 0 <= row.spread < math.inf and row.gflops is None


def test_growth_is_the_fitted_exponent():
    rows = [Row("", "", batch=b, seconds=3.0 * b**0.7) for b in (64, 128, 1024)]
    assert exponent(rows, "batch") == pytest.approx(0.7)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A row of another machine, which lay there, and those of one measurement in tiny sizes."""
    out, threads = tmp_path_factory.mktemp("speed") / "speed.csv", torch.get_num_threads()
    sizes, update = set(), MACQL.update
    there = Row("to be kept", "LOGO", device="cpu", machine="another", threads=1)
    here = dataclasses.replace(there, what="to be replaced", machine=speed.machine("cpu"))
    write(out, [here, there], Row)

    def watched(learner, batch, is_real, generator):
        sizes.add((len(batch.reward), int(is_real.sum()), batch.steps.max().item() > 1))
        return update(learner, batch, is_real, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MACQL, "update", watched)
        speed.speed("cpu", quick=True, out=out)
    torch.set_num_threads(threads)
    first, *rows = read(out, Row)
    assert first == there
    return first, rows, sizes


def test_speed_writes_finite_positive_numbers(measured):
    _, rows, _ = measured
    for row in rows:
        for name in ("seconds", "rate", "gflops", "share_of_peak", "parameters", "peak_memory_mb"):
            value = getattr(row, name)
            assert value is None or 0 < value < math.inf, (name, row)
        assert row.unit and row.machine and row.versions and row.threads == 1, row
        assert row.gflops or row.what in ("Adam", "draw from D_m"), row
    assert all(0 < row.share_of_bound for row in rows if "update" in row.what)


def test_speed_measures_rivals_growth_and_training(measured):
    _, rows, _ = measured
    raced = {row.implementation for row in rows if row.what == "imagine" and row.task == "2s3z"}
    assert raced == {"LOGO"} | {f"ensemble 7 x [16]*4, {how}" for how in ("batched", "looped")}
    assert {row.grows for row in rows} == {"", *speed.AXES}
    trained = [row for row in rows if row.what in TRAINING and not row.grows]
    assert {row.what for row in trained} == set(TRAINING) and len(trained) == 3


def test_the_policy_is_timed_on_the_batches_of_train(measured):
    _, rows, sizes = measured
    assert sizes == {(12, 8, True)}  # 4 imagined rows beside 8 real ones, several steps each
    assert [row.batch for row in rows if row.what == TRAINING[1] and not row.grows] == [12]


def test_rows_of_another_machine_are_kept(measured):
    there, rows, _ = measured
    assert (there.what, there.machine) == ("to be kept", "another")
    assert {row.machine for row in rows} == {speed.machine("cpu")}
    assert "to be replaced" not in {row.what for row in rows}
    text = speed_tables([*(dataclasses.replace(row, machine="another") for row in rows), *rows])
    assert "**another; cpu, 1 thread**" in text and text.count("**") == 4


def test_rows_survive_the_file(tmp_path):
    row = Row("a, b", 'c"d', rows=10**7, seconds=0.125, share_of_peak=0.5, commit="123e4567")
    write(tmp_path / "x.csv", [row], Row)
    assert read(tmp_path / "x.csv", Row) == [row]
    header = (tmp_path / "x.csv").read_text().splitlines()[0]
    assert header.split(",") == [field.name for field in dataclasses.fields(Row)]


def test_memory_grows_with_what_is_allocated():
    device = torch.device("cpu")
    small, large = (
        timing.peak_memory_mb(lambda n=n: torch.ones(n), device) for n in (1, 100_000_000)
    )
    if small is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert large - small == pytest.approx(400, rel=0.1)


@pytest.mark.parametrize(
    "command,told",
    [
        ("speed --threads 0", "--threads 0: give 1 or more"),
        ("speed --quick", "--quick measures nothing worth keeping"),
        ("speed --quick --out x.csv --offlinerl-kit nowhere", "--offlinerl-kit nowhere"),
        ("grid --jobs 0", "--jobs 0: give 1 or more"),
        ("grid --flags=--seed=3", "--seed=3 is the grid's own to give"),
        ("grid --flags=--gamma=2", "--gamma is 2.0"),
        ("tables --results x.csv", "x.csv"),
    ],
)
def test_bad_input_is_one_sentence(command, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as error:
        cli(command.split())
    torch.set_num_threads(threads)
    assert str(error.value).startswith("python -m benchmark: ") and told in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "x.csv").exists()


def test_a_missing_checkout_is_one_sentence(tmp_path):
    with pytest.raises(ImportError, match="no checkout"):
        load_kit(tmp_path)
