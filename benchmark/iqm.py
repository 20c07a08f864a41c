"""Over cells: the interquartile mean, with stratified bootstrap intervals [Agarwal et al., 2021].

A score is a run's return divided by the mean return of the data that it learned from. So cells of
different scale can be put together without a constant from elsewhere, and the divisor is a mean
over hundreds of episodes that every method shares; a difference between two methods, which can be
nearly zero, would make one cell outweigh all others. Where the data return nothing or less the
ratio has no meaning, and the cell counts for no method.
"""

from collections.abc import Callable

import numpy as np
from scipy.stats import trim_mean

from benchmark.ablations import BEFORE_D30
from benchmark.grid import BASELINES, METHODS
from benchmark.markdown import table
from benchmark.rows import Result

DRAWS = 10_000


def interval(cells: list[list[float]]) -> tuple[float, float] | None:
    """The 95 % interval of the IQM of all runs: percentiles of a bootstrap with a fixed seed.

    Each draw takes, in every cell, as many runs as there are, with replacement. A cell with one run
    is thus the same in every draw, and the interval too narrow.

    Returns:
        None where no cell has two runs.
    """
    if max(map(len, cells), default=0) < 2:
        return None
    rng = np.random.default_rng(0)
    draws = [rng.choice(x, (DRAWS, len(x))) for x in cells]
    low, high = np.quantile(trim_mean(np.concatenate(draws, 1), 0.25, -1), (0.025, 0.975))
    return float(low), float(high)


def score(run: Result) -> float:
    return run.return_mean / run.data_return


def iqm_table(groups: dict, names: dict[str, str]) -> str:
    """One line per method: IQM over its runs with default flags; of LOGO minus it, run by run.

    The difference is taken for each cell and seed that both have. Every run counts alike, so a cell
    with more seeds weighs more. Maps whose field was run before D30 count as cells of their own.

    Args:
        groups: of `tables.group`.
        names: of the methods, for the reader.
    """
    by_method: dict[str, dict] = {}  # method -> cell -> seed -> run
    cells = {}  # as an ordered set
    earlier = {cell for cell, variant, method in groups
               if variant == BEFORE_D30 and method in BASELINES}  # fmt: skip
    for (cell, variant, method), runs in groups.items():
        some = {k: r for k, r in runs.items() if r.return_mean is not None}
        usual = variant == "" or (variant == BEFORE_D30 and cell in earlier)
        if usual and some and method in (*METHODS, *BASELINES):
            cells[cell, variant] = None
            if all(r.data_return > 0 for r in some.values()):
                by_method.setdefault(method, {})[cell, variant] = some

    def line(kind: list[list[float]], form: Callable[[float], str]) -> list[str]:
        bounds = interval(kind)
        mean = form(trim_mean(np.concatenate(kind), 0.25))
        return [mean, " to ".join(map(form, bounds)) if bounds else ""]

    logo, lines = by_method.get("logo", {}), []
    for method in (*METHODS, *BASELINES):
        mine = by_method.get(method, {})
        count = f"{len(mine)} of {len(cells)}"
        if not mine:
            lines.append([names[method], count, 0, "", "not run", *[""] * 4])
            continue
        scores = [[score(r) for r in runs.values()] for runs in mine.values()]
        sizes = sorted({min(map(len, scores)), max(map(len, scores))})
        gains = [
            [score(logo[cell][k]) - score(r) for k, r in runs.items() if k in logo[cell]]
            for cell, runs in mine.items()
            if cell in logo and method != "logo"
        ]
        gains = [x for x in gains if x]
        both = f"{len(gains)}, {sum(map(len, gains))}" if gains else ""
        lines.append([
            names[method], count, sum(map(len, scores)), "-".join(map(str, sizes)),
            *line(scores, "{:.3f}".format),
            *(line(gains, "{:+.3f}".format) if gains else ["", ""]), both,
        ])  # fmt: skip
    return table(
        ["method", "cells", "runs", "seeds per cell", "IQM of return / data's return",
         "95 % interval", "LOGO minus it", "95 % interval", "cells, runs of both"],
        lines,
    )  # fmt: skip
