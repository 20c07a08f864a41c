"""The plane of states, predictions in it, and where policies go."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import TINY
from test_sync import make_data

import train
from benchmark import figures, states
from benchmark.__main__ import cli
from benchmark.rows import Bin, read, record


def test_axes_are_the_widest_directions():
    """Against the eigenvectors of the covariance, and blind to the order and the rows' sign."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 5)) * (1, 5, 0.1, 3, 0.5) @ np.linalg.qr(rng.normal(size=(5, 5)))[0]
    mean, components = states.axes(x)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    np.testing.assert_allclose(mean, x.mean(0))
    np.testing.assert_allclose(np.abs((components * vectors.T[::-1][:2]).sum(1)), 1, atol=1e-6)
    np.testing.assert_allclose(((x - mean) @ components.T).var(0, ddof=1), values[::-1][:2])
    np.testing.assert_allclose(states.axes(x[::-1])[1], components, atol=1e-8)


class Exact:
    """A world model that knows `data`'s next states, off by a constant in standardised units."""

    def __init__(self, data, off: float):
        std = data.statistics()["state_std"]
        self.known = {
            tuple(s): n + off * torch.where(std == 0, 1.0, std)
            for s, n in zip(data.state.tolist(), data.state.roll(-1, 0), strict=True)
        }

    def step(self, obs, state, actions) -> dict:
        s = torch.stack([self.known[tuple(x)] for x in state.tolist()])
        return {"mean_obs": obs, "mean_state": s, "reward": 0 * s[:, 0]}


@pytest.mark.parametrize("off", [0.0, 2.0])
def test_points_are_predictions_in_the_true_states_plane(off):
    data, _ = make_data(True)
    rows = states.points(Exact(data, off), data, data, ("logo", "x", "medium", "expert", 1))
    assert len(rows) == min(len(data.held_out), states.POINTS_DRAWN)
    assert {r.row for r in rows} <= {*data.held_out.tolist()}
    true = np.array([(r.true_1, r.true_2) for r in rows])
    predicted = np.array([(r.predicted_1, r.predicted_2) for r in rows])
    _, components = states.axes(
        states.standardiser(data)("state", data.gather(data.held_out).next_state).numpy()
    )
    expected = np.tile(off * components.sum(1), (len(rows), 1))
    np.testing.assert_allclose(predicted - true, expected, atol=1e-4)


def test_every_step_is_in_one_square():
    rng = np.random.default_rng(0)
    plane, rewards = rng.normal(size=(500, 2)), rng.normal(size=500)
    low, high = plane.min(0), plane.max(0)
    rows = states.bins(plane, rewards, low, high, ("logo", "x", "medium", 1))
    assert sum(r.visits for r in rows) == 500
    assert sum(r.visits * r.reward_mean for r in rows) == pytest.approx(rewards.sum())
    for r in rows[::7]:
        inside = (plane[:, 0] >= r.left) & (plane[:, 0] < r.left + r.width)
        inside &= (plane[:, 1] >= r.bottom) & (plane[:, 1] < r.bottom + r.height)
        if max(r.x, r.y) < states.SQUARES - 1:  # the last squares have their outer edge, too
            assert inside.sum() == r.visits
            assert r.reward_mean == pytest.approx(rewards[inside].mean())


def test_coverage_of_two_runs(dataset, tmp_path, undrawn, capsys):
    given = [*TINY, "--dataset", str(dataset)]
    for method, more in (("logo", []), ("macql", ["--synthetic-fraction", "0", "--seed", "2"])):
        train.main(train.parse([*given, *more, "--out", str(tmp_path / method)]))
    file = tmp_path / "visits.csv"
    cli(["coverage", "--runs", *(str(tmp_path / m) for m in ("logo", "macql")),
         "--episodes", "8", "--results", str(file)])  # fmt: skip
    rows = read(file, Bin)
    of = [*dict.fromkeys((r.method, r.seed) for r in rows)]
    assert of == [("data", 1), ("data", 2), ("logo", 1), ("macql", 2)]
    assert states.coverage_table(rows, {}).count("the data") == 2
    data = [r for r in rows if r.method == "data" and r.seed == 1]
    loaded = train.load_dataset(dataset, torch.device("cpu"), "3s_vs_5z")[0]
    assert sum(r.visits for r in data) == len(loaded.train)
    paid = sum(r.visits * r.reward_mean for r in data)
    assert paid == pytest.approx(loaded.reward[loaded.train].sum().item(), rel=1e-3)
    assert figures.draw_visited(rows) == figures.draw_visited(read(file, Bin))
    record(file, dataclasses.replace(rows[0], method="cfcql", seed=1))
    cli(["coverage", "--runs", str(tmp_path / "logo"), "--episodes", "8", "--results", str(file)])
    kept = {(r.method, r.seed) for r in read(file, Bin)}  # the plane of seed 1 is another now
    assert kept == {("data", 1), ("logo", 1), ("data", 2), ("macql", 2)}
    with pytest.raises(SystemExit, match="give 1 or more"):
        cli(["coverage", "--runs", str(tmp_path / "logo"), "--episodes", "0"])
    with pytest.raises(SystemExit, match="give folders of finished runs"):
        cli(["coverage", "--runs"])
    with pytest.raises(SystemExit, match="two runs of logo, seed 1: give one"):
        cli(["coverage", "--runs", *[str(tmp_path / "logo")] * 2, "--episodes", "8",
             "--results", str(file)])  # fmt: skip
    with pytest.raises(SystemExit, match="is not a run"):
        cli(["coverage", "--runs", str(tmp_path)])


def test_steps_beyond_the_data_are_counted():
    def row(method, x, visits, reward):
        return Bin(method, "x", "q", 1, x, 0, x, 0, 1, 1, visits, reward, "c")

    rows = [row("data", 0, 9, 1.0), row("data", 1, 1, 0.0), row("logo", 1, 3, 2.0)]
    rows += [row("logo", 2, 1, 0.0)]
    *_, data, logo = states.coverage_table(rows, {"logo": "LOGO"}).splitlines()
    assert [x.strip() for x in data.split("|")][4:9] == ["the data", "10", "2", "0.0%", "0.900"]
    assert [x.strip() for x in logo.split("|")][4:9] == ["LOGO", "4", "2", "25.0%", "1.500"]


def test_rows_replace_all_of_the_same_experiment(tmp_path):
    """Squares of another plane must not stay beside new ones."""
    file, row = tmp_path / "visits.csv", Bin("a", "x", "q", 1, 0, 0, 0, 0, 1, 1, 5, 0.5, "c")
    square = dataclasses.replace(row, y=1, visits=7)
    record(file, row, square, dataclasses.replace(row, seed=2))
    record(file, dataclasses.replace(row, visits=6, commit="d"))
    assert [(r.seed, r.y, r.visits) for r in read(file, Bin)] == [(1, 0, 6), (2, 0, 5)]
