"""results/comparison.png: the returns of results/runs.csv, drawn."""

import io
from pathlib import Path
from typing import get_args

from behaviour import Quality
from benchmark.grid import METHODS
from benchmark.rows import ROOT, RUNS, Result, read
from benchmark.tables import NAMES, Groups, Runs, group
from datasets import write_atomic
from experiment.report import mean_and_interval

COMPARISON = ROOT / "results" / "comparison.png"
COLUMNS = 4  # panels side by side


def figures(results: Path = RUNS, out: Path = COMPARISON) -> None:
    """Draw the returns of every method, with its defaults, and of behaviour cloning.

    Args:
        results: file of finished runs, as `grid` writes it
        out: picture to write
    """
    write_atomic(out, draw(group(read(results, Result))))
    print(f"wrote {out}")


def draw(groups: Groups) -> bytes:
    """A PNG with one panel per task and simulator; equal rows give equal bytes.

    Raises:
        ValueError: no run with its method's defaults was evaluated.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
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
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for ax, (title, runs) in zip(axes, panels.items(), strict=False):
        draw_panel(ax, runs)
        ax.set_title(", ".join(title))
    for ax in list(axes)[len(panels) :]:
        ax.set_axis_off()
    entries = {}  # by label, so that the legend names every method once
    for ax in figure.axes:
        entries |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries))
    figure.supylabel("return, 95 % interval over seeds")
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
    columns = [*METHODS, "clone"]
    for k, name in enumerate(columns):
        points = []
        for x, quality in enumerate(qualities):
            method = next(m for q, m in runs if q == quality) if name == "clone" else name
            if some := runs.get((quality, method)):
                value = "clone_return" if name == "clone" else "return_mean"
                scores = [getattr(row, value) for row in some.values()]
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
