"""What the texts say of the code: equations, deviations, metrics, commands; and the layers."""

import ast
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DEVIATIONS = (ROOT / "docs" / "deviations.md").read_text()
LEAVES = ("logo_wm", "macql", "buffer", "envs")
FOLDERS = ("simulators", "datasets", "behaviour", "experiment", "baselines", "benchmark")
SOURCES = sorted([*ROOT.glob("*.py"), *(p for f in FOLDERS for p in ROOT.glob(f"{f}/*.py"))])
CODE_EQUATIONS = {1, 2, 3, 4, 5, 6, 7, 10, 11, 12}
# Imports go from a layer to lower ones only.
LAYER = {
    **dict.fromkeys(LEAVES, 0), "simulators": 1, "datasets": 2, "behaviour": 3, "experiment": 4,
    "train": 5, "baselines": 6, "benchmark": 7,
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Names of all modules that a file imports, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# ------------------------------------------------------------------------------------ the layout


def test_the_root_holds_five_python_files():
    assert {p.name for p in ROOT.glob("*.py")} == {*(f"{x}.py" for x in LEAVES), "train.py"}


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_file_imports_no_other_file(leaf):
    assert not {name.split(".")[0] for name in imports(ROOT / f"{leaf}.py")} & LAYER.keys()


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_file_alone_checks_itself(leaf, tmp_path, monkeypatch, capsys):
    """`python FILE` in a folder without the others, in a process that has imported torch."""
    shutil.copy(ROOT / f"{leaf}.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    ours = (ROOT.resolve(), ROOT.resolve() / "tests")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() not in ours])
    for name in [x for x in sys.modules if x.partition(".")[0] in LAYER]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError):
        __import__("train")  # nothing of the project can be imported
    runpy.run_path(f"{leaf}.py", run_name="__main__")
    assert capsys.readouterr().out.strip(), "a self-check prints what it found"


def test_no_file_imports_from_a_layer_above():
    for path in SOURCES:
        place = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imports(path):
            layer = LAYER.get(name.split(".")[0])
            same_folder = name.split(".")[0] == place
            assert layer is None or same_folder or layer < LAYER[place], f"{path} imports {name}"


def test_there_is_no_circle_of_imports():
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in SOURCES}
    graph = {}
    for name, path in modules.items():
        wanted = {x for x in imports(path) if x in modules}
        folders = {x for x in imports(path) if f"{x}.__init__" in modules}
        graph[name] = wanted | ({f"{x}.__init__" for x in folders} - {name})
        if name.endswith("__init__") or "." not in name:
            continue
        graph[name] -= {f"{name.split('.')[0]}.__init__"}  # already being imported
    while free := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, f"in a circle: {sorted(graph)}"


def test_every_folder_is_a_regular_package():
    for folder in FOLDERS:
        if (ROOT / folder).exists():
            assert (ROOT / folder / "__init__.py").exists(), folder


@pytest.mark.parametrize("folder", ["datasets", "behaviour", "experiment", "benchmark"])
def test_a_package_explains_its_commands(folder, program):
    done = program(folder, "--help")
    commands = {
        "datasets": "info convert download", "behaviour": "train record list",
        "experiment": "watch report",
        "benchmark": "grid ceiling errors coverage tables figures speed",
    }  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in commands[folder].split())


# -------------------------------------------------------------------------------- equations, flags


def tags() -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for path in ROOT.glob("*.py"):
        for line in path.read_text().splitlines():
            if match := re.search(r"#.*\bEq\. \((\d+)\)\s*$", line):
                found.setdefault(int(match.group(1)), []).append(path.name)
    return found


def test_every_equation_is_tagged_once_where_readme_says():
    found = tags()
    assert set(found) == CODE_EQUATIONS
    assert all(len(places) == 1 for places in found.values()), found
    for number, (file,) in found.items():
        assert re.search(rf"^\| Eq\. \({number}\) .*`{file}`", README, re.M), (number, file)


def test_every_deviation_is_marked_and_listed_with_a_flag():
    code = "".join(p.read_text() for p in ROOT.glob("*.py"))
    marked = set(re.findall(r"Deviation (D\d+)", code)) | set(re.findall(r'"""(D\d+): ', code))
    rows = dict(re.findall(r"^\| (D\d+) \|(.*)$", DEVIATIONS, re.M))
    assert marked == set(rows) == set(re.findall(r"^\| (D\d+) \|", README, re.M))
    flags = train.Args.__dataclass_fields__
    for name, row in rows.items():
        named = re.findall(r"--(?:no-)?([a-z][a-z0-9-]+)", row)
        assert named, f"{name} has no flag"
        assert all(flag.replace("-", "_") in flags for flag in named), (name, named)
        of_this = set(re.findall(rf'^    (\w+): [^\n]*\n    """{name}\b', code, re.M))
        assert of_this <= {flag.replace("-", "_") for flag in named}, (name, of_this)


def test_the_metrics_are_explained():
    text = (ROOT / "docs" / "metrics.md").read_text()
    code = (ROOT / "logo_wm.py").read_text()
    names = {*re.findall(r'"(L_\w+)":', code), "effective_share", "pi_q", "pi_bc", "clone/bc"}
    names |= {f"q_{name}" for name in ("td", "data", "all", "gap")}
    assert not [name for name in names if name not in text]


# ------------------------------------------------------------------------------------- the texts


def test_the_readme_is_short_and_complete():
    assert len(README.splitlines()) <= 200
    blocks = re.findall(r"```\n(.*?)```", README, re.S)
    quickstart = "python train.py --env-id 3s_vs_5z --horizon 15\n"
    assert f"pip install -r requirements.txt && {quickstart}" in blocks
    assert "pip install -r requirements.txt && python -m pytest\n" in blocks


TEXTS = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_links_lead_to_files_and_nothing_is_left_open(path):
    text = path.read_text()
    assert not re.findall(r"@[A-Z0-9]+@|TODO|TBD|<!-- findings -->", text)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target
            assert (path.parent / target).resolve().is_relative_to(ROOT), target
    for file in re.findall(r"`((?:tests|results|docs)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / file).exists(), file


def test_commands_in_the_texts_exist():
    known = {
        "datasets": "info convert download", "behaviour": "train record list",
        "experiment": "watch report",
        "benchmark": "grid ceiling errors coverage tables figures speed",
    }  # fmt: skip
    for path in TEXTS:
        for folder, command in re.findall(r"python -m (\w+) (\w+)", path.read_text()):
            if folder in known:
                assert command in known[folder].split(), (path, folder, command)
        flags = train.Args.__dataclass_fields__
        text = re.sub(r"<!-- table: .*?<!-- /table -->", "", path.read_text(), flags=re.S)
        for line in re.findall(r"python train\.py([^`\n#]*)", text):  # rows may be of old flags
            named = re.findall(r"--(?:no-)?([a-z][a-z0-9-]+)", line)
            assert all(f == "help" or f.replace("-", "_") in flags for f in named), (path, line)


def test_the_project_names_no_machine():
    """No absolute path of the machine it was written on."""
    files = [*SOURCES, *TEXTS, *ROOT.glob("results/*.csv"), *ROOT.glob("*.t?*")]
    for path in [*files, *ROOT.glob("tests/*.py"), ROOT / ".ci" / "run"]:
        if path != Path(__file__).resolve():
            assert not re.search(r"(/home/|/root/|/work/|/tmp/)\w", path.read_text()), path


def test_the_names_of_tests_are_short():
    for path in ROOT.glob("tests/test_*.py"):
        long = re.findall(r"^def (test_\w{56,})", path.read_text(), re.M)
        assert not long, (path.name, long)
