"""Pictures of the results, each from the rows of a file or two: see `figures`.

Equal rows give equal bytes.
"""

import io
import textwrap
from collections import Counter
from pathlib import Path
from typing import get_args

from behaviour import Quality
from benchmark.grid import BASELINES, METHODS, ORACLES, WORLD_MODELS
from benchmark.rows import (
    CEILING,
    DEPTH,
    POINTS,
    ROOT,
    RUNS,
    VISITS,
    Bin,
    Depth,
    Point,
    Result,
    read,
)  # fmt: skip
from benchmark.states import draw_points, draw_visits
from benchmark.tables import NAMES, Cell, Groups, Runs, cells_of_baselines, group
from datasets import write_atomic
from experiment.report import mean_and_interval

COLUMNS = 4  # panels side by side


def figures(
    results: Path = RUNS, ceiling: Path = CEILING, depth: Path = DEPTH, points: Path = POINTS,
    visits: Path = VISITS, folder: Path = ROOT / "results",
) -> None:  # fmt: skip
    """Draw returns of all methods, what a perfect model is worth, states predicted and visited.

    Args:
        results: file of finished runs, as `grid` writes it
        ceiling: the same of runs with the true simulator as the world model, by `ceiling`
        depth: values along rollouts, by `ceiling`
        points: predicted next states, by `errors`
        visits: visited states, by `coverage`
        folder: of comparison.png, field.png, ceiling.png, predicted.png and visited.png
    """
    runs = group(read(results, Result))
    pictures = {"comparison.png": draw_comparison(runs)}
    if field := draw_field(runs):
        pictures["field.png"] = field
    if depth.exists():
        rows = read(depth, Depth)
        pictures["ceiling.png"] = draw_ceiling(group(read(ceiling, Result)), rows)
    if points.exists():
        pictures["predicted.png"] = draw_predicted(read(points, Point))
    if visits.exists():
        pictures["visited.png"] = draw_visited(read(visits, Bin))
    for name, picture in pictures.items():
        write_atomic(folder / name, picture)
        print(f"wrote {folder / name}")


def draw_comparison(groups: Groups) -> bytes:
    """A PNG with one panel per task and simulator; equal rows give equal bytes.

    Raises:
        ValueError: no run with its method's defaults was evaluated.
    """
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], dict[tuple[str, str], Runs]] = {}
    for (cell, variant, method), runs in groups.items():
        if variant == "" and cell.backend != "offline":
            panel = panels.setdefault((cell.env_id, cell.backend), {})
            panel[cell.quality, method] = runs
    if not panels:
        raise ValueError("there is nothing to draw: no run with its method's defaults has a score.")
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for ax, (title, runs) in zip(axes, panels.items(), strict=False):
        draw_panel(ax, runs)
        ax.set_title(", ".join(title))
    for ax in list(axes)[len(panels) :]:
        ax.set_axis_off()
    legend(figure)
    figure.supylabel("return, 95 % interval over seeds")
    return png(figure)


def draw_field(groups: Groups) -> bytes | None:
    """A PNG with one panel per cell in which baselines were run: a line per method, a dot per run;
    in the first row with the present defaults, in the other one with earlier ones.

    None: there is no such cell.
    """
    from matplotlib.figure import Figure

    rows = [x for x in (cells_of_baselines(groups, earlier) for earlier in (False, True)) if x]
    if not rows:
        return None
    methods = [*METHODS, *BASELINES]
    names = [*(NAMES[method] for method in methods), "behaviour cloning"]
    width = max(map(len, rows))
    figure = Figure(figsize=(2.6 * width + 1.4, 3.9 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), width, squeeze=False)
    panels = [panel for axes, cells in zip(grid, rows, strict=True)
              for panel in zip(axes, cells.items(), strict=False)]  # fmt: skip
    for ax in {*grid.flat} - {ax for ax, _ in panels}:
        ax.set_axis_off()
    for ax, ((env_id, backend, quality, flags), by_method) in panels:
        for y, method in enumerate(methods):
            returns = [row.return_mean for row in by_method.get(method, {}).values()]
            color = "C0" if method == "logo" else "C1" if method == "macql" else "grey"
            ax.plot(returns, [y] * len(returns), "o", color=color, alpha=0.7, ms=5)
        most = max(by_method.values(), key=len).values()
        clones = [row.clone_return for row in most if row.clone_return is not None]
        ax.plot(clones, [len(methods)] * len(clones), "o", color="black", alpha=0.7, ms=5)
        ax.set_yticks(range(len(names)), names if ax in grid[:, 0] else [])
        ax.grid(axis="y", lw=0.4)
        ax.invert_yaxis()
        told = textwrap.wrap(flags.strip("`"), 30)
        ax.set_title("\n".join([env_id, f"{quality}, {backend}", *told]), fontsize=9)
    figure.supxlabel("return; a dot is a run of one seed", fontsize=9)
    return png(figure)


def legend(figure, ncols: int | None = None) -> None:
    """One legend of all panels below them, which names everything once."""
    entries = {}  # by label
    for ax in figure.axes:
        entries |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    columns = ncols or len(entries)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def png(figure) -> bytes:
    """The figure as a file, without the date or the program's version in it."""
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=90, metadata={"Software": None})
    return memory.getvalue()


def draw_panel(ax, runs: dict[tuple[str, str], Runs]) -> None:
    """One task: qualities of the data along x, methods and cloning beside each other.

    Args:
        runs: by quality and method.
    """
    known = get_args(Quality)
    qualities = list(dict.fromkeys(quality for quality, _ in runs))
    qualities.sort(key=lambda q: known.index(q) if q in known else len(known))
    columns = [*METHODS, "windows", "clone"]
    for k, name in enumerate(columns):
        points = []
        for x, quality in enumerate(qualities):
            method = next(m for q, m in runs if q == quality) if name == "clone" else name
            if some := runs.get((quality, method)):
                value = "clone_return" if name == "clone" else "return_mean"
                scores = [getattr(row, value) for row in some.values()]
                if not (scores := [x for x in scores if x is not None]):
                    continue
                mean, half = mean_and_interval(scores)
                shift = 0.6 * (k / (len(columns) - 1) - 0.5)
                points.append((x + shift, mean, half if len(scores) > 1 else 0.0))
        if points:
            label = "behaviour cloning" if name == "clone" else NAMES.get(name, name)
            style = {"fmt": "o", "color": "grey" if name == "clone" else f"C{k}", "capsize": 3}
            ax.errorbar(*zip(*points, strict=True), **style, label=label)
    for x, quality in enumerate(qualities):
        data = next(some for (q, _), some in runs.items() if q == quality)
        y = next(iter(data.values())).data_return
        ax.hlines(y, x - 0.4, x + 0.4, colors="black", lw=0.8, label="data")
    ax.set_xticks(range(len(qualities)), qualities)
    ax.set_xlim(-0.5, len(qualities) - 0.5)


def draw_ceiling(groups: Groups, depths: list[Depth]) -> bytes:
    """A PNG with one column per cell: returns by what D_m holds, and values by depth below.

    Of a cell's variants that can still be run, the one in which D_m was filled in the most ways is
    drawn in colour, the others with the true simulator in grey; values by depth are of that
    variant, or of the next one that has them.

    Raises:
        ValueError: no run had the true simulator in the world model's place.
    """
    from matplotlib.figure import Figure

    tried: dict[Cell, Counter] = {}
    for cell, variant, method in groups:
        if method in ORACLES and "removed since" not in variant:
            tried.setdefault(cell, Counter())[variant] += 1
    if not tried:
        raise ValueError("there is nothing to draw: no run of `ceiling` can still be repeated.")
    cells = {cell: variants.most_common(1)[0][0] for cell, variants in tried.items()}
    figure = Figure(figsize=(4.2 * len(cells), 7), layout="constrained")
    axes = figure.subplots(2, len(cells), squeeze=False)
    methods = ["macql", *ORACLES]
    for column, (cell, coloured) in enumerate(cells.items()):
        ax = axes[0, column]
        for (other, variant, method), runs in groups.items():
            scores = [row.return_mean for row in runs.values()]
            if other == cell and variant in tried[cell]:
                place = methods.index("model" if method == "logo" else method)
                here = variant == coloured
                color = "C0" if here else "lightgrey"
                ax.plot(scores, [place] * len(scores), "o", color=color, zorder=1 + here)
        ax.set_yticks(range(len(methods)), [NAMES[m] for m in methods] if column == 0 else [])
        ax.invert_yaxis()
        ax.set_title("\n".join([f"{cell.env_id}, {cell.quality}", *textwrap.wrap(coloured, 40)]))
        ax.set_xlabel("return (grey: other flags)")
        below, known = axes[1, column], {}
        for d in depths:
            if (d.env_id, d.quality) == cell[::2] and d.method in ("simulator", "model"):
                known.setdefault(d.variant, []).append(d)
        shown = next((v for v, _ in tried[cell].most_common() if v in known), None)
        if shown is None:
            below.set_axis_off()
            continue
        draw_depth(below, known[shown])
        if shown != coloured:
            below.set_title("\n".join(textwrap.wrap(shown, 40)))
    legend(figure, ncols=2)
    return png(figure)


def draw_depth(ax, depths: list[Depth]) -> None:
    """Along rollouts: what the critics say at true and imagined states, and what really comes."""
    for k, method in enumerate(("simulator", "model")):
        rows = sorted((d for d in depths if d.method == method), key=lambda d: (d.step, d.seed))
        if not rows:
            continue
        steps = sorted({d.step for d in rows})
        for name, style, label in (
            ("monte_carlo", ":", "what the policy gets"),
            ("value_true", "-", "critics, true states"),
            ("value_imagined", "--", "critics, LOGO's states"),
        ):
            values = [[getattr(d, name) for d in rows if d.step == step] for step in steps]
            means = [float("nan") if None in x else sum(x) / len(x) for x in values]
            ax.plot(steps, means, style, color=f"C{k}", label=f"{label} ({NAMES[method]})")
    ax.set_xlabel("step of the rollout")
    ax.set_ylabel("discounted value")


def draw_predicted(rows: list[Point]) -> bytes:
    """A PNG with a line per task and kind of data, a column per world model, its first seed each.

    Args:
        rows: of points.csv.
    """
    from matplotlib.figure import Figure

    panels: dict[tuple, dict[str, list[Point]]] = {}
    for p in rows:
        by_method = panels.setdefault((p.env_id, p.trained_on, p.tested_on), {})
        mine = by_method.setdefault(p.method, [])
        if not mine or mine[0].seed == p.seed:
            mine.append(p)
    methods = [m for m in ("logo", *WORLD_MODELS) if any(m in x for x in panels.values())]
    figure = Figure(figsize=(2.9 * len(methods), 3.1 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), len(methods), squeeze=False)
    for line, (cell, by_method) in zip(axes, panels.items(), strict=True):
        near = [p for mine in by_method.values() for p in mine]
        xs, ys = [p.true_1 for p in near], [p.true_2 for p in near]
        for ax, method in zip(line, methods, strict=True):
            ax.set_xticks([]), ax.set_yticks([])
            ax.set_xlim(min(xs) - 1, max(xs) + 1)
            ax.set_ylim(min(ys) - 1, max(ys) + 1)
            ax.set_title(NAMES[method] if method in by_method else f"{NAMES[method]}: not run")
            draw_points(ax, by_method.get(method, []))
        line[0].set_ylabel(f"{cell[0]}\ntrained on {cell[1]}, tested on {cell[2]}", fontsize=8)
    legend(figure, ncols=2)
    return png(figure)


def draw_visited(rows: list[Bin]) -> bytes:
    """A PNG with a line per task and quality; for the data and each method visits and rewards.

    Args:
        rows: of visits.csv.
    """
    from matplotlib.figure import Figure

    panels: dict[tuple, dict[str, list[Bin]]] = {}
    for row in rows:
        by_method = panels.setdefault((row.env_id, row.quality, row.seed), {})
        by_method.setdefault(row.method, []).append(row)
    methods = list(dict.fromkeys(row.method for row in rows))
    figure = Figure(figsize=(5.4 * len(methods), 2.7 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 2 * len(methods), squeeze=False)
    for line, (cell, by_method) in zip(axes, panels.items(), strict=True):
        paid = [row.reward_mean for some in by_method.values() for row in some if row.visits > 9]
        for k, method in enumerate(methods):
            left, right = line[2 * k : 2 * k + 2]
            if some := by_method.get(method):
                draw_visits(left, right, some, high=max(paid), low=min(paid))
            name = NAMES.get(method, "the data" if method == "data" else method)
            left.set_title(f"{name}: visits, {len(some or [])} regions", fontsize=9)
            right.set_title("mean reward of a step", fontsize=9)
        for ax in line:
            ax.set_xticks([]), ax.set_yticks([])
        line[0].set_ylabel(f"{cell[0]}\n{cell[1]}, seed {cell[2]}", fontsize=8)
    return png(figure)
