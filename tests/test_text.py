"""What the code says about itself: equation tags, README, and leaf files that stand alone."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import speed

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SOURCES = sorted(ROOT.glob("*.py"))
LEAVES = ("logo_wm", "macql", "buffer", "envs")
CODE_EQUATIONS = {1, 2, 3, 4, 5, 6, 7, 10, 11, 12}


def tags() -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for path in SOURCES:
        for line in path.read_text().splitlines():
            if match := re.search(r"#.*\bEq\. \((\d+)\)\s*$", line):
                found.setdefault(int(match.group(1)), []).append(path.name)
    return found


def test_every_equation_is_tagged_once_where_the_readme_says():
    found = tags()
    assert set(found) == CODE_EQUATIONS
    assert all(len(places) == 1 for places in found.values()), found
    for number, (file,) in found.items():
        assert re.search(rf"^\| Eq\. \({number}\) .*`{file}`", README, re.M), (number, file)


def test_every_deviation_is_in_the_code_in_the_table_and_has_a_working_flag():
    code = "".join(p.read_text() for p in SOURCES)
    in_code = set(re.findall(r"Deviation (D\d+)", code)) | set(re.findall(r'"""(D\d+): ', code))
    rows = dict(re.findall(r"^\| (D\d+) \|(.*)$", README, re.M))
    assert in_code == set(rows)
    help_text = Path(train.__file__).read_text()
    for name, row in rows.items():
        flags = re.findall(r"--(?:no-)?([a-z0-9-]+)", row)
        assert flags, f"{name} has no flag"
        for flag in flags:
            assert re.search(rf"^    {flag.replace('-', '_')}: ", help_text, re.M), (name, flag)


def test_the_readme_names_every_file_and_only_files_that_exist():
    named = set(re.findall(r"^\| `([a-z_]+\.py)` \|", README, re.M))
    assert named == {p.name for p in SOURCES}


def test_the_readme_explains_every_metric():
    code = (ROOT / "logo_wm.py").read_text() + (ROOT / "train.py").read_text()
    for metric in re.findall(r'"(L_\w+)":', code):
        assert metric in README, metric
    for metric in ("bc", "q_td", "q_data", "q_any", "q_gap", "pi_q", "pi_bc", "ess"):
        assert metric in README, metric


def test_the_readmes_tables_of_speed_are_those_of_the_measurements(capsys):
    speed.table()
    assert capsys.readouterr().out.strip() in README


def test_the_quickstart_is_the_two_promised_commands():
    blocks = re.findall(r"```\n(.*?)```", README, re.S)
    assert (
        "pip install -r requirements.txt && python train.py --env-id 3s_vs_5z --horizon 15\n"
        in blocks
    )
    assert "pip install -r requirements.txt && python -m pytest\n" in blocks


def test_no_placeholder_is_left_in_the_readme():
    assert not re.findall(r"@[A-Z0-9]+@|TODO|TBD", README)
    for name in ("results", "speed", "cells", "behaviour", "3m"):
        assert re.search(rf"<!-- {name} -->\s*\S.*?<!-- /{name} -->", README, re.S), name
    for picture in re.findall(r"\]\((results/[^)]+)\)", README):
        assert (ROOT / picture).exists(), picture


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_file_alone_in_an_empty_folder_checks_itself(leaf, tmp_path):
    shutil.copy(ROOT / f"{leaf}.py", tmp_path)
    command = [sys.executable, f"{leaf}.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "a self-check prints what it found"


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_file_imports_no_sibling(leaf):
    siblings = {p.stem for p in SOURCES} - {leaf}
    text = (ROOT / f"{leaf}.py").read_text()
    assert not siblings & set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.M))


def test_the_project_names_no_machine():
    """No absolute path of the machine it was written on."""
    files = [*SOURCES, *ROOT.glob("results/*.json"), *ROOT.glob("*.md"), *ROOT.glob("*.t?*")]
    for path in [*files, ROOT / ".ci" / "run"]:
        assert not re.search(r"(/home/|/root/|/work/|/tmp/)\w", path.read_text()), path
