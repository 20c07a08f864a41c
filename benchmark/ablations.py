"""Tables of the paper's ablations: the use of the uncertainty (Table 6), the horizon (Table 7).

python -m benchmark grid --methods logo --env-ids Hopper-3x1 --qualities medium --variants="
    ; --uncertainty none; --uncertainty shuffled; --uncertainty penalty --u-scale 30"
python -m benchmark grid --methods logo direct --env-ids 6h_vs_8z --qualities medium --variants="
    ; --horizon 5; --horizon 10; --horizon 20"
"""

import re

from benchmark.markdown import table
from benchmark.rows import Error
from experiment.report import over_seeds

HORIZONS = 5, 10, 15, 20
USES = {  # of u, by how a variant begins
    "": "weights exp(-u)",
    "--uncertainty shuffled": "weights of another row's u",
    "--uncertainty none": "no use of u",
    "--uncertainty penalty": "penalty on the reward",
}


def returns(runs: dict | None) -> str:
    """Mean ± interval over seeds, and the seeds' number where it is more than one."""
    if not runs:
        return "not run"
    scores = over_seeds([row.return_mean for row in runs.values()])
    return f"{scores} ({len(runs)})" if len(runs) > 1 else scores


def uncertainty(groups: dict) -> str:
    """One line per cell in which LOGO used u otherwise, all uses side by side.

    Args:
        groups: of `tables.group`.
    """
    lines: dict[tuple, dict[str, str]] = {}
    for (cell, variant, method), runs in groups.items():
        use = re.match(r"--uncertainty \w+|$", variant)
        rest = re.sub(r"^--uncertainty \w+( --u-scale \S+)?", "", variant)
        if method == "logo" and use and use[0] in USES and not rest and cell.backend != "offline":
            unit = re.search(r"--u-scale (\S+)", variant)
            told = f" (unit {unit[1]})" if unit else ""
            line = lines.setdefault(cell, {})
            line[use[0]] = ", ".join(filter(None, [line.get(use[0]), returns(runs) + told]))
    lines = {cell: by_use for cell, by_use in lines.items() if len(by_use) > 1}
    return table(
        ["task", "simulator", "data", *USES.values()],
        [[*cell, *(by_use.get(use, "not run") for use in USES)] for cell, by_use in lines.items()],
    )


def horizons(groups: dict, errors: list[Error], names: dict[str, str], usual: int = 15) -> str:
    """One line per cell and method that was run with another horizon, and its reward error.

    Args:
        groups: of `tables.group`. errors: of the models after one step, in the reward's own units.
        names: of the methods, for the reader. usual: horizon of a run without the flag.
    """
    lines: dict[tuple, dict[int, dict]] = {}
    for (cell, variant, method), runs in groups.items():
        found = re.fullmatch(r"--horizon (\d+)|", variant)
        if found and cell.backend != "offline" and method not in ("macql", "planning"):
            lines.setdefault((cell, method), {})[int(found[1] or usual)] = runs
    text = []
    for (cell, method), by_horizon in lines.items():
        if len(by_horizon) > 1:
            same = (method, cell.env_id, cell.quality, cell.quality)
            wrong = [e.raw_reward_mse for e in errors if e.key[:-1] == same]
            error = over_seeds(wrong, 4) if wrong else "not measured"
            runs = [returns(by_horizon.get(h)) for h in HORIZONS]
            text.append([*cell, names.get(method, method), *runs, error])
    columns = [f"H = {h}" for h in HORIZONS]
    return table(["task", "simulator", "data", "method", *columns, "error of r'"], text)
