"""run.png: return during training, error of the world model, uncertainty against true error."""

import io
from pathlib import Path

import numpy as np
import torch

import datasets


def draw(folder: Path, final: dict, scatter: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    """Write run.png.

    Args:
        folder: of the run.
        final: content of final.json; numbers may be NaN.
        scatter: what `diagnostics.uncertainty_and_error` returns; None: a run without a world
            model, the figure has one panel.
    """
    from matplotlib.figure import Figure  # slow to import

    panels = 1 if scatter is None else 3
    figure = Figure(figsize=(1 + 4 * panels, 3.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    draw_returns(axes[0], final)
    if scatter is not None:
        draw_rollout_errors(axes[1], final["world_model"]["rollout"])
        draw_uncertainty(axes[2], *scatter, final["world_model"]["u_error_spearman"])
    memory = io.BytesIO()
    figure.savefig(memory, dpi=110)
    datasets.write_atomic(folder / "run.png", memory.getvalue())


def draw_returns(ax, final: dict) -> None:
    """Return of the policy while it trains, beside the cloned policy and the data."""
    if evaluations := final["evaluations"]:
        x, y, ci95 = zip(
            *((e["update"], e["return_mean"], e["return_ci95"]) for e in evaluations), strict=True
        )
        ax.errorbar(x, y, ci95, marker="o", label="this run")
    if clone := final["clone"]:
        ax.axhline(clone["return_mean"], color="grey", ls="--", label="behaviour cloning")
    ax.axhline(final["dataset"]["return_mean"], color="grey", label="data")
    ax.set(xlabel="updates", ylabel="return", title=f"{final['env_id']}, {final['backend']}")
    ax.legend()


def draw_rollout_errors(ax, errors: dict[str, list[float]]) -> None:
    """Error of the state after each imagined step, beside predicting that nothing changes."""
    steps = range(1, len(errors["state"]) + 1)
    ax.plot(steps, errors["state"], marker="o", label="world model")
    ax.plot(steps, errors["persistence"], color="grey", label="nothing changes")
    ax.set(
        xlabel="imagined steps", ylabel="state error (standardised MSE)",
        title="along recorded actions, held out", yscale=scale(errors["state"]),
    )  # fmt: skip
    ax.legend()


def draw_uncertainty(ax, uncertainty: torch.Tensor, error: torch.Tensor, spearman: float) -> None:
    """Uncertainty against true error, a point for each held-out row."""
    uncertainty, error = uncertainty.cpu().numpy(), error.cpu().numpy()
    finite = np.isfinite(uncertainty) & np.isfinite(error)
    x, y = uncertainty[finite], error[finite]
    ax.scatter(x, y, s=3, alpha=0.3, edgecolors="none")
    ax.set(
        xlabel="uncertainty u", ylabel="true error of s'", xscale=scale(x), yscale=scale(y),
        title=f"rank correlation {spearman:.2f}",
    )  # fmt: skip


def scale(values) -> str:
    """Logarithmic where it can be: a log axis without any positive finite value is an error."""
    values = np.asarray(values, float)
    return "log" if (np.isfinite(values) & (values > 0)).any() else "linear"
