"""The tables of results, made from the rows of results/*.csv: the same rows give the same text.

A cell is a task, a simulator and a quality of the data; scores of different simulators never share
a line, except as shares of a return (`aggregate`, `iqm`). Means are over seeds, ± is half of a 95 %
interval over seeds by Student's t.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np

from behaviour import Quality
from benchmark.ablations import (
    EARLIER,
    changes,
    departures,
    horizons,
    sizes,
    uncertainty,
)
from benchmark.grid import BASELINES, METHODS, ORACLES, WORLD_MODELS
from benchmark.iqm import iqm_table
from benchmark.markdown import code, fill_files, table
from benchmark.oracle import PARTS
from benchmark.rows import (
    CEILING,
    ERRORS,
    ROOT,
    RUNS,
    SPEED,
    VISITS,
    Bin,
    Error,
    Result,
    key_of,
    read,
)  # fmt: skip
from benchmark.speed_tables import speed_tables
from benchmark.states import coverage_table
from benchmark.timing import Row
from envs import PAPER_MUJOCO, PAPER_SMAC, is_robot
from experiment.report import mean_and_interval, over_seeds

TEXTS = tuple(
    ROOT / name
    for name in (
        "README.md",
        "results/README.md",
        "results/details.md",
        "results/tables.md",
        "docs/speed.md",
    )
)
BOOTSTRAP_DRAWS = 10_000
# Tasks on which defaults were chosen
TUNED_ON = ("3s_vs_5z", "2s3z", "5m_vs_6m", "3s5z_vs_3s6z", *PAPER_MUJOCO)
# Flags that change nothing without a world model
IMAGINATION = {
    *("--horizon", "--uncertainty", "--u-scale", "--wm-updates", "--wm-lr"),
    *("--wm-batch-size", "--wm-weight-decay", "--deduce-from", "--no-heads", "--no-zeros"),
    *("--observe", "--epsilon", "--rollout-batch-size", "--rollout-interval", "--cap"),
    *("--imagined-rows", "--synthetic-fraction", "--recorded-critic", "--no-recorded-critic"),
}
REMOVED = {"--draw-zeros", "--shared-models"}  # of them, in rows of earlier commits alone
NAMES = {  # a method that is not here: its key
    "logo": "LOGO",
    "macql": "MACQL",
    "bc": "cloning",
    **{name: name.upper() for name in BASELINES},
    "planning": "MACQL with planning (MPC)",
    "direct": "direct prediction",
    "ensemble": "ensemble (MOPO)",
    "morel": "MOReL",
    "mazero": "MAZero",
    "windows": "recorded steps",
    "model": "LOGO",
    "simulator": "true simulator",
    **{f"simulator-{part}": f"its {part} by LOGO" for part in PARTS},
}


class Cell(NamedTuple):
    """What is the same for all runs that may be compared."""

    env_id: str
    backend: str
    quality: str


Runs = dict[int, Result]  # by seed
Groups = dict[tuple[Cell, str, str], Runs]  # by cell, variant, method


def group(rows: Iterable[Result]) -> Groups:
    """Runs that differ in nothing but the seed, in an order that does not depend on the rows'."""
    tasks, qualities = PAPER_SMAC + PAPER_MUJOCO, get_args(Quality)

    def order(row: Result) -> tuple:
        def place(value: str, known: Iterable[str]) -> tuple:  # known ones first
            known = list(known)
            return known.index(value) if value in known else len(known), value

        return (
            *place(row.env_id, tasks), row.backend, *place(row.quality, qualities), row.variant,
            *place(row.method, (*METHODS, *BASELINES, *ORACLES)), row.seed,
        )  # fmt: skip

    groups: Groups = {}
    for row in sorted(rows, key=order):
        cell = Cell(row.env_id, row.backend, row.quality)
        groups.setdefault((cell, row.variant, row.method), {})[row.seed] = row
    return groups


def over(runs: Runs, value: str, digits: int = 2) -> str:
    """Mean ± interval of a column of `Result` over the seeds that have a value; in brackets their
    number, if others have none; empty if none has.
    """
    found = [getattr(row, value) for row in runs.values()]
    found = [x for x in found if x is not None]
    return over_seeds(found, digits) + of_all(found, runs) if found else ""


def of_all(found: list, runs: Runs) -> str:
    """The number of values in brackets, where there are fewer than runs."""
    return f" ({len(found)})" if len(found) < len(runs) else ""


def win_rate(runs: Runs) -> str:
    wins = [row.win_rate for row in runs.values()]
    return "" if None in wins else f"{np.mean(wins):.0%}"


def data_return(runs: Runs) -> str:
    return f"{np.mean([row.data_return for row in runs.values()]):.1f}"


def paired_difference(a: Runs, b: Runs) -> tuple[list[float], tuple[float, float] | None]:
    """Return of `a` minus return of `b`, by seed, over the seeds that both have.

    Returns:
        The differences, and the 95 % interval of their mean by the percentile bootstrap with a
        fixed random seed; None where fewer than two seeds are common.
    """
    seeds = [seed for seed in a if seed in b]
    pairs = [(a[seed].return_mean, b[seed].return_mean) for seed in seeds]
    differences = [x - y for x, y in pairs if x is not None and y is not None]
    if len(differences) < 2:
        return differences, None
    shape = (BOOTSTRAP_DRAWS, len(differences))
    means = np.random.default_rng(0).choice(differences, shape).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return differences, (float(low), float(high))


def students_interval(differences: list[float], digits: int = 2) -> str:
    """The 95 % interval of their mean by Student's t; empty for less than two."""
    if len(differences) < 2:
        return ""
    mean, half = mean_and_interval(differences)
    return f"{mean - half:+.{digits}f} to {mean + half:+.{digits}f}"


def by_cell(groups: Groups) -> dict[Cell, dict[str, Runs]]:
    """The runs with default flags of every cell that was evaluated, by method."""
    cells: dict[Cell, dict[str, Runs]] = {}
    for (cell, variant, method), runs in groups.items():
        if variant == "" and cell.backend != "offline":
            cells.setdefault(cell, {})[method] = runs
    return cells


def comparison(groups: Groups) -> str:
    """One line per cell, LOGO and MACQL with their defaults side by side."""
    lines = []
    for cell, by_method in by_cell(groups).items():
        known = {m: by_method[m] for m in METHODS if m in by_method}
        if not known:
            continue
        most = max(known.values(), key=len)
        both = []
        for method in METHODS:
            score = over(known[method], "return_mean") if method in known else ""
            wins = win_rate(known[method]) if method in known else ""
            both.append(f"{score} ({wins})" if wins else score)
        counts = "-".join(map(str, sorted({len(runs) for runs in known.values()})))
        lines.append([*cell, counts, *both, over(most, "clone_return"), data_return(most)])
    header = ["task", "simulator", "data", "seeds", *(NAMES[m] for m in METHODS)]
    return table([*header, "behaviour cloning", "data's return"], lines)


def cells_of_baselines(groups: Groups, earlier: bool) -> dict[tuple[str, ...], dict[str, Runs]]:
    """The runs by method of every (task, simulator, data, flags) that any baseline was run in; with
    flags only where LOGO was, too.

    Args:
        earlier: those with the defaults of an earlier commit, or those with the present ones.
    """
    columns: dict[tuple[str, ...], dict[str, Runs]] = {}
    for (cell, variant, method), runs in groups.items():
        if cell.backend != "offline" and variant.startswith("--defaults") == earlier:
            columns.setdefault((*cell, code(variant)), {})[method] = runs
    return {k: runs for k, runs in columns.items() if runs.keys() & BASELINES
            and ("logo" in runs or not k[-1])}  # fmt: skip


def field(groups: Groups, earlier: bool = False) -> str:
    """One line per method, one column per cell that any baseline was run in: returns, seeds."""
    cells = cells_of_baselines(groups, earlier)
    lines = []
    for method in (*METHODS, *BASELINES):
        found = [by_method.get(method) for by_method in cells.values()]
        scores = [f"{over(x, 'return_mean')} ({len(x)})" if x else "not run" for x in found]
        lines.append([NAMES[method], *scores])
    most = [max(by_method.values(), key=len) for by_method in cells.values()]
    lines.append(["behaviour cloning", *(over(runs, "clone_return") for runs in most)])
    lines.append(["the data", *map(data_return, most)])
    return table(["method (seeds)", *(" ".join(filter(None, x)) for x in cells)], lines)


def field_differences(groups: Groups, earlier: bool = False) -> str:
    """LOGO minus each other method that was run in the cells of `field`; in brackets the number of
    seeds that both have, and the interval over them."""

    def difference(by_method: dict[str, Runs], other: str) -> str:
        by_seed, interval = paired_difference(by_method.get("logo", {}), by_method.get(other, {}))
        bounds = f": {interval[0]:+.2f} to {interval[1]:+.2f}" if interval else ""
        return f"{np.mean(by_seed):+.2f} ({len(by_seed)}{bounds})" if by_seed else ""

    cells = cells_of_baselines(groups, earlier)
    others = [method for method in (*METHODS, *BASELINES) if method != "logo"]
    lines = [[NAMES[m], *(difference(x, m) for x in cells.values())] for m in others]
    lines = [line for line in lines if any(line[1:])]
    return table(["LOGO minus", *(" ".join(filter(None, x)) for x in cells)], lines)


def scores(groups: Groups) -> str:
    """One line per group: returns, wins, behaviour cloning of the same runs, data."""
    lines = []
    for (cell, variant, method), runs in groups.items():
        line = [*cell, NAMES.get(method, method), code(variant), len(runs)]
        if cell.backend == "offline":
            lines.append([*line, "not evaluated", "", "", data_return(runs), 0])
            continue
        line += [over(runs, "return_mean"), win_rate(runs), over(runs, "clone_return")]
        episodes = min(row.episodes for row in runs.values())
        lines.append([*line, data_return(runs), episodes])
    return table(
        ["task", "simulator", "data", "method", "flags", "seeds", "return", "win rate",
         "behaviour cloning", "data's return", "episodes per seed"],
        lines,
    )  # fmt: skip


def of_the_learner(variant: str) -> str:
    """A variant without the flags of imagination and their values."""
    flags = re.findall(r"(--[a-z-]+)((?: (?!--)\S+)*)", variant)
    return " ".join(name + value for name, value in flags if name not in IMAGINATION | REMOVED)


def gains(groups: Groups, plain: bool) -> str:
    """One line per cell and variant that both LOGO and MACQL have: the gain, seed by seed.

    Flags of imagination do not concern MACQL, so it may have been run without them.
    """
    lines = []
    for (cell, variant, method), runs in groups.items():
        theirs = variant if (cell, variant, "macql") in groups else of_the_learner(variant)
        other = groups.get((cell, theirs, "macql"))
        if method != "logo" or not other or plain != (variant == ""):
            continue
        by_seed, interval = paired_difference(runs, other)
        if by_seed:
            mean = f"{np.mean(by_seed):+.2f}"
            bounds = f"{interval[0]:+.2f} to {interval[1]:+.2f}" if interval else ""
            each = ", ".join(f"{x:+.2f}" for x in by_seed)
            known = [row for row in runs.values() if row.clone_return is not None]
            above = [row.return_mean - row.clone_return for row in known]
            gain = f"{np.mean(above):+.2f}{of_all(above, runs)}" if above else ""
            flags = [] if plain else [code(variant)]
            both = bounds, students_interval(by_seed)
            lines.append([*cell, *flags, len(by_seed), mean, *both, each, gain])
    return table(
        ["task", "simulator", "data", *([] if plain else ["flags"]), "seeds", "LOGO - MACQL",
         "bootstrap interval", "Student's interval", "by seed", "LOGO - cloning"],
        lines,
    )  # fmt: skip


def gains_by_cell(
    groups: Groups, method: str = "logo", over: Iterable[tuple[str, str]] = (("", "macql"),)
) -> dict[Cell, np.ndarray]:
    """A method's gain by seed in every cell, in % of the best mean return that MACQL has there.

    Args:
        over: (variant, method) of the others; in each cell the one with the highest mean counts.
    """

    def mean(runs: Runs) -> float:
        return float(np.mean([row.return_mean for row in runs.values()]))

    gains = {}
    for cell, by_method in by_cell(groups).items():
        known = [groups.get((cell, variant, "macql")) for variant in ("", EARLIER)]
        others = [groups[cell, *key] for key in over if (cell, *key) in groups]
        if method in by_method and others and any(known):
            by_seed, _ = paired_difference(by_method[method], max(others, key=mean))
            if by_seed:  # a seed in common
                gains[cell] = 100 * np.array(by_seed) / abs(max(map(mean, filter(None, known))))
    return gains


def aggregate(groups: Groups) -> str:
    """Over cells: LOGO's gain over MACQL, and over what separates imagination from larger batches.

    Robots had another learner before, with which MACQL fails in no run; where there are rows of it,
    the gain is also over the better of MACQL's two. Where recorded steps filled D_m (a placebo),
    LOGO's gain over MACQL is that of the placebo and what LOGO has beyond it. The first interval is
    a bootstrap in two levels: cells with replacement, and in each of them seeds; with few cells it
    is too narrow. The other is Student's t of the cells' means.
    """
    kinds = {
        "all": lambda env_id: True,
        "maps": lambda env_id: not is_robot(env_id),
        "robots": is_robot,
        "not tuned on": lambda env_id: env_id not in TUNED_ON,
    }
    robots_earlier = any(variant == EARLIER for _, variant, _ in groups)
    of_two = gains_by_cell(groups, over=(("", "macql"), (EARLIER, "macql")))
    compared = {
        "LOGO over MACQL": (gains_by_cell(groups), kinds),
        "LOGO over MACQL's better learner": (of_two, ("all", "robots") if robots_earlier else ()),
        "recorded steps over MACQL": (gains_by_cell(groups, "windows"), ("maps",)),
        "LOGO over recorded steps": (gains_by_cell(groups, over=(("", "windows"),)), ("maps",)),
    }
    lines, every = [], ((name, gains, k) for name, (gains, some) in compared.items() for k in some)
    for name, gains, kind in every:
        some = [x for cell, x in gains.items() if kinds[kind](cell.env_id)]
        if not some:
            continue
        rng, count = np.random.default_rng(0), len(some)
        draws = [rng.choice(x, (BOOTSTRAP_DRAWS, count, len(x))).mean(-1) for x in some]
        cells = rng.integers(count, size=(BOOTSTRAP_DRAWS, count))
        places = np.arange(BOOTSTRAP_DRAWS)[:, None], np.arange(count)
        low, high = np.quantile(np.stack(draws)[cells, *places].mean(1), (0.025, 0.975))
        means = [x.mean() for x in some]
        above = sum(x > 0 for x in means)
        seeds = "-".join(map(str, sorted({min(map(len, some)), max(map(len, some))})))
        bootstrap = f"{low:+.1f} to {high:+.1f}" if count > 1 else ""
        intervals = bootstrap, students_interval(means, 1)
        lines.append([name, kind, count, seeds, above, f"{np.mean(means):+.1f}", *intervals])
    return table(
        ["gain of", "cells", "number", "seeds", "above in", "mean, % of MACQL's return",
         "bootstrap interval", "Student's interval"],
        lines,
    )  # fmt: skip


def placebo(groups: Groups) -> str:
    """One line per cell and variant in which recorded steps filled D_m: MACQL, this placebo and
    LOGO over the seeds that all three have.
    """
    lines = []
    for cell, variant in dict.fromkeys(key[:2] for key in groups):
        three = [groups.get((cell, variant, method), {}) for method in ("macql", "windows", "logo")]
        seeds = [seed for seed in three[1] if all(seed in runs for runs in three)]
        if not seeds:
            continue
        three = [{seed: runs[seed] for seed in seeds} for runs in three]
        where = [cell.env_id, cell.backend, f"{cell.quality} {code(variant)}".strip()]
        line = [*where, len(seeds), *(over(runs, "return_mean") for runs in three)]
        for one, other in ((three[1], three[0]), (three[2], three[1])):
            by_seed, _ = paired_difference(one, other)
            line += [f"{np.mean(by_seed):+.2f}", ", ".join(f"{x:+.2f}" for x in by_seed)]
        lines.append(line)
    return table(
        ["task", "simulator", "data", "seeds", "MACQL", NAMES["windows"], "LOGO",
         "recorded steps - MACQL", "by seed", "LOGO - recorded steps", "by seed"],
        lines,
    )  # fmt: skip


def world_model(groups: Groups) -> str:
    """One line per group that trained a world model: its one-step errors."""
    lines = []
    for (cell, variant, method), runs in groups.items():
        if method != "windows" and any(row.state_mse is not None for row in runs.values()):
            states = ("state_mse", "direct_state_mse", "persistence_state_mse")
            rewards = ("reward_mse", "direct_reward_mse")
            lines.append([
                *cell, NAMES.get(method, method), code(variant), len(runs),
                *(over(runs, name, 4) for name in states),
                *(over(runs, name, 3) for name in rewards),
                over(runs, "u_error_spearman"),
            ])  # fmt: skip
    return table(
        ["task", "simulator", "data", "method", "flags", "seeds", "s' deduced", "s_hat direct",
         "nothing changes", "r' deduced", "r_hat direct", "rank correlation of u"],
        lines,
    )  # fmt: skip


def origin(groups: Groups) -> str:
    """One line per group: how its numbers were made."""

    def values(runs: Runs, value: Callable[[Result], object]) -> str:
        return ", ".join(map(str, dict.fromkeys(value(row) for row in runs.values())))

    lines = []
    for (cell, variant, method), runs in groups.items():
        minutes = [row.total_s / 60 for row in runs.values()]
        lines.append([
            *cell, NAMES.get(method, method), code(variant), values(runs, lambda row: row.seed),
            values(runs, lambda row: row.updates), f"{np.mean(minutes):.0f}",
            values(runs, lambda row: row.commit), values(runs, lambda row: row.machine),
            code(next(iter(runs.values())).command),
        ])  # fmt: skip
    return table(
        ["task", "simulator", "data", "method", "flags", "seeds", "updates", "minutes per run",
         "commit", "machine", "command of the first seed"],
        lines,
    )  # fmt: skip


def ceiling_tables(groups: Groups) -> dict[str, str]:
    """One line per cell and variant: the return by what D_m is filled with, seed by seed.

    Returns:
        `ceiling`: where the true simulator filled D_m in some run; `departures`: LOGO's with a
        single departure taken back, or added to the paper's letter; `tuning`: the others.
    """
    columns = {"ceiling": ORACLES, "tuning": ("model",)}
    cells: dict[tuple[Cell, str], dict[str, Runs]] = {}
    for (cell, variant, method), runs in groups.items():
        name = "model" if method == "logo" else method
        cells.setdefault((cell, variant), {}).setdefault(name, {}).update(runs)
    lines = {"ceiling": [], "tuning": []}
    alone = changes(groups)  # in a table of their own
    for (cell, variant), by_method in cells.items():
        seeds = sorted({seed for runs in by_method.values() for seed in runs})
        one = {k: r for runs in by_method.values() for k, r in runs.items()}  # a run of each seed

        def each(runs: Runs, value: str = "return_mean", seeds: list[int] = seeds) -> str:
            values = [getattr(runs[k], value) if k in runs else None for k in seeds]
            known = ["-" if x is None else f"{x:.2f}" for x in values]
            return ", ".join(known) if runs else ""

        if by_method.keys() == {"model"} and (cell, variant) in alone:
            continue
        kind = "tuning" if by_method.keys() <= {"macql", "model"} else "ceiling"
        scores = [each(by_method.get(m, {})) for m in ("macql", *columns[kind])]
        numbers = ", ".join(map(str, seeds))
        lines[kind].append([*cell, code(variant), numbers, each(one, "clone_return"), *scores])
    header = ["task", "simulator", "data", "flags", "seeds", "cloning", "nothing (MACQL)"]
    made = {k: table([*header, *(NAMES[m] for m in columns[k])], lines[k]) for k in lines}
    return made | {"departures": departures(groups)}


def errors_table(rows: list[Error]) -> str:
    """One line per world model and training data: one-step errors, on each kind of test data."""
    models = ("logo", *WORLD_MODELS)
    tests: dict[tuple[str, str], list[str]] = {}  # by task and training data
    for row in rows:
        tests.setdefault((row.env_id, row.trained_on), []).append(row.tested_on)
    lines = []
    for (env_id, trained_on), tested in sorted(tests.items()):
        for model in models:
            line = [env_id, trained_on, NAMES[model]]
            for test in [trained_on, *sorted({*tested} - {trained_on})]:
                key = (model, env_id, trained_on, test)
                some = [row for row in rows if key_of(row)[:-1] == key]
                if not some:
                    continue
                line += [test, len(some)]
                line += [over_seeds([row.state_mse for row in some], 4)]
                line += [over_seeds([row.reward_mse for row in some], 4)]
                line += [f"{np.mean([row.persistence_state_mse for row in some]):.4f}"]
            if len(line) > 3:
                lines.append(line)
    kinds = ["tested on", "seeds", "s'", "r'", "nothing changes"]
    width = max(map(len, lines), default=13)
    header = ["task", "trained on", "model", *kinds * ((width - 3) // 5)]
    return table(header, [[*line, *[""] * (width - len(line))] for line in lines])


def results_tables(rows: list[Result]) -> dict[str, str]:
    """All tables of results by the names that the texts' markers use."""
    groups = group(rows)
    makers = (comparison, field, field_differences, scores, aggregate, placebo, uncertainty,
              sizes, world_model, origin)  # fmt: skip
    made = {"differences": gains(groups, plain=True), "variants": gains(groups, plain=False)}
    made |= {make.__name__.replace("_", "-"): make(groups) for make in makers}
    made["field-earlier"] = field(groups, earlier=True)
    made["field-differences-earlier"] = field_differences(groups, earlier=True)
    return made | {"iqm": iqm_table(groups, NAMES)}


def tables(
    results: Path = RUNS,
    ceiling: Path = CEILING,
    errors: Path = ERRORS,
    timings: Path = SPEED,
    visits: Path = VISITS,
    write: bool = False,
) -> None:
    """Print all tables, or write them into README.md, the texts of results/ and docs/speed.md.

    Args:
        results: file of finished runs, as `grid` writes it
        ceiling: the same of runs with the true simulator as the world model
        errors: file of one-step errors, as `errors` writes it
        timings: file of measurements, as `speed` writes it
        visits: file of visited states, as `coverage` writes it
        write: replace the text between `<!-- table: NAME -->` and `<!-- /table -->` instead
    """
    rows, known = read(results, Result), read(errors, Error)
    made = results_tables(rows)
    made |= ceiling_tables(group(read(ceiling, Result)))
    made["errors"] = errors_table(known)
    made["horizons"] = horizons(group(rows), known, NAMES)
    made["speed"] = speed_tables(read(timings, Row))
    made["coverage"] = coverage_table(read(visits, Bin), NAMES)
    if write:
        for path in fill_files(TEXTS, made):
            print(f"wrote {path.relative_to(ROOT)}")
    else:
        print("\n\n".join(f"## {name}\n\n{text}" for name, text in made.items()))
