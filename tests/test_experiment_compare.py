"""Tables of many runs: what is averaged over seeds, what is kept apart, what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from experiment import __main__ as command
from experiment import report

SCORE = {"return_mean": 5.0, "return_ci95": 0.5, "win_rate": 0.25, "episodes": 8}


def save_final(path: Path, score: float | None, backend="smax", method="logo", **model) -> Path:
    """A final.json with what `compare` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    final = {
        "backend": backend, "method": method, "dataset": {"return_mean": 3.0},
        "eval": None if score is None else SCORE | {"return_mean": score},
        "clone": None if score is None else SCORE | {"return_mean": score - 1},
        "world_model": model or None,
    }  # fmt: skip
    path.write_text(json.dumps(final))
    return path


def rows(table: str) -> list[list[str]]:
    """Cells of a markdown table's lines, without its heads."""
    lines = [line for line in table.splitlines() if line and not line.startswith("|--")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "setting"]


def test_an_interval_over_seeds_is_students(tmp_path):
    values = [10.0, 12.0, 17.0]
    mean, half = report.mean_and_interval(values)
    error = np.std(values, ddof=1) / 3**0.5
    low, high = scipy.stats.t.interval(0.95, df=2, loc=13.0, scale=error)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert report.mean_and_interval([4.0]) == (4.0, math.inf)
    for k, value in enumerate(values):
        save_final(tmp_path / f"3m-logo-seed{k}" / "final.json", value)
    (row,) = rows(report.compare(sorted(tmp_path.iterdir())))
    cell = f"13.00 ± {half:.2f}"
    assert row == ["3m-logo", "3", cell, "25%", f"12.00 ± {half:.2f}", "3.00", "8"]


def test_backends_and_methods_never_share_a_row(tmp_path):
    paths = [
        save_final(tmp_path / "a" / "3m-seed1.json", 1.0),
        save_final(tmp_path / "b" / "3m-seed2.json", 2.0, backend="smac"),
        save_final(tmp_path / "c" / "3m-seed3.json", 3.0, method="macql"),
        save_final(tmp_path / "d" / "3m-seed4.json", 5.0),
    ]
    assert [row[:2] for row in rows(report.compare(paths))] == [
        ["3m", "2"],
        ["3m", "1"],
        ["3m", "1"],
    ]


def test_a_run_is_named_by_its_folder_or_file(tmp_path):
    save_final(tmp_path / "3m-x-seed1" / "final.json", 1.0)
    save_final(tmp_path / "3m-x-seed2" / "final.json", 2.0)
    save_final(tmp_path / "3m-x" / "seed3" / "final.json", 3.0)
    save_final(tmp_path / "3m-x-seed4.json", 4.0)
    names = "3m-x-seed1", "3m-x-seed2/final.json", "3m-x/seed3", "3m-x-seed4.json"
    (row,) = rows(report.compare([tmp_path / name for name in names]))
    assert row[:2] == ["3m-x", "4"] and row[2].startswith("2.50")


def test_other_tasks_are_other_settings_and_a_run_counts_once(tmp_path):
    paths = [tmp_path / task / "logo-seed1" / "final.json" for task in ("a", "b")]
    for path, score in zip(paths, (1.0, 5.0), strict=True):
        save_final(path, score)
        final = json.loads(path.read_text()) | {"env_id": path.parts[-3]}
        path.write_text(json.dumps(final))
    found = rows(report.compare([*paths, paths[0]]))
    assert [row[1:3] for row in found] == [["1", "1.00"], ["1", "5.00"]]


def test_missing_values_leave_empty_cells(tmp_path):
    paths = [
        save_final(tmp_path / "any-seed1.json", 1.0, state_mse=0.5, persistence_state_mse=1.0,
                   reward_mse=None),
        save_final(tmp_path / "offline-seed1.json", None, backend="offline"),
    ]  # fmt: skip
    played, offline, model = rows(report.compare(paths))
    assert played == ["any", "1", "1.00", "25%", "0.00", "3.00", "8"]
    assert offline == ["offline", "1", "not played", "", "", "3.00", "0"]
    assert model == ["any", "0.5000", "", "1.0000", "", "", ""]


def test_what_is_not_a_finished_run_is_named_in_one_sentence(tmp_path):
    def told(path: Path) -> str:
        with pytest.raises(SystemExit) as error:
            command.cli(["report", str(path)])
        assert str(error.value).startswith("python -m experiment: ")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "has no final.json" in told(tmp_path) and "does not exist" in told(tmp_path / "none")
    (tmp_path / "final.json").write_text("{")
    assert "is not JSON" in told(tmp_path)
    (tmp_path / "final.json").write_text('{"backend": "smax"}')
    assert "no dataset, eval, clone, world_model in it" in told(tmp_path)
    with pytest.raises(SystemExit, match="python -m experiment: report: no run was given"):
        command.cli(["report"])


def test_the_command_prints_the_table(tmp_path, capsys):
    path = save_final(tmp_path / "3m-seed1.json", 1.0)
    command.cli(["report", str(path)])
    assert capsys.readouterr().out == report.compare([path]) + "\n"
