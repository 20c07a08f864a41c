"""What a run ends with: the closing table, run.png and final.json.

python report.py RUN_DIR_OR_JSON ...      a markdown table of many runs, averaged over seeds
"""

import io
import json
import math
import platform
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import scipy.stats
import torch

import datasets
from checkpoint import plain
from measures import (
    doubt_and_error,
    offline_measures,
    one_step_errors,
    rollout_errors,
    rollout_sanity,
)
from run import Run, Runs, evaluate

FILES = ("metrics.csv", "events.out.tfevents.*", "checkpoint.pt", "run.png", "final.json")


def pooled(evaluations: list[dict]) -> dict | None:
    """Several evaluations as one: mean of the means, 95 % interval over all their episodes."""
    if not evaluations:
        return None
    episodes = sum(e["episodes"] for e in evaluations)
    variance = np.mean([e["return_ci95"] ** 2 * e["episodes"] for e in evaluations])
    return {
        "return_mean": float(np.mean([e["return_mean"] for e in evaluations])),
        "return_ci95": float(np.sqrt(variance / episodes)),
        "win_rate": None
        if evaluations[0]["win_rate"] is None
        else float(np.mean([e["win_rate"] for e in evaluations])),
        "episodes": episodes,
    }


def installed(package: str) -> str | None:
    """Its version; None where it is not installed: no run needs all simulators."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def finish(runs: Runs, method: str, commit: str) -> list[dict]:
    """Measure, write every run's final.json and run.png, print the closing tables."""
    clones = [None] * len(runs)
    if score := last_score(runs[0]):
        clones = evaluate(runs, "clone", -(10**5), score["episodes"])
    together = None
    if len(runs) > 1 and score:
        returns = [last_score(run)["return_mean"] for run in runs]
        mean, ci95 = mean_and_interval(returns)
        seeds = [run.args.seed for run in runs]
        together = {"seeds": seeds, "return_mean": mean, "return_ci95": ci95, "returns": returns}
    finals = [
        finish_one(run, clone, together, method, commit)
        for run, clone in zip(runs, clones, strict=True)
    ]
    if len(runs) > 1:
        print("\n" + compare([run.folder for run in runs]))
    return finals


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half its 95 % interval by Student's t, for the seeds are few."""
    if len(values) == 1:
        return values[0], math.inf
    quantile = scipy.stats.t.ppf(0.975, len(values) - 1)
    return float(np.mean(values)), float(quantile * np.std(values, ddof=1) / len(values) ** 0.5)


def last_score(run: Run) -> dict | None:
    """The final score: of the last evaluations together."""
    return pooled(run.evaluations[-run.args.final_evals :])


def finish_one(run: Run, clone: dict | None, together: dict | None, method: str, commit: str):
    """Measure, write final.json and run.png, print the closing table; returns the JSON.

    Args:
        clone: score of the cloned policy. together: scores of the seeds that trained with this one.
    """
    score, data, facts = last_score(run), run.data, run.facts
    world_model = rollout = None
    if run.args.synthetic_fraction > 0:
        world_model = one_step_errors(run.world_model, data)
        args, model = run.args, run.world_model
        world_model["rollout"] = rollout_errors(model, data, args.horizon, args.clamp)
        rollout = rollout_sanity(model, run.clone, data, args.horizon, args.heads, args.clamp)
    done, seconds = run.progress, run.seconds
    device = f"cpu {platform.machine()}, {torch.get_num_threads()} threads"
    if run.device.type == "cuda":
        device = f"cuda {torch.cuda.get_device_name()}"
    final = {
        "args": plain(run.args),
        "method": method,
        "commit": commit,
        "versions": {k: installed(k) for k in ("torch", "numpy", "jaxmarl", "jax", "mujoco")}
        | {"python": platform.python_version()},
        "device": device,
        "backend": run.spec.backend,
        "env_id": run.args.env_id,
        "dataset": facts,
        "world_model": world_model,
        "rollout": rollout,
        "eval": score,
        "clone": clone,
        "over_seeds": together,
        "offline": offline_measures(run),
        "evaluations": run.evaluations,
        "time": {
            "total_s": time.time() - run.started,
            "wm_updates_per_s": done["wm"] / max(seconds["wm"], 1e-9),
            "updates_per_s": done["policy"] / max(seconds["policy"], 1e-9),
            "imagined_rows_per_s": run.imagined_rows / max(seconds["imagine"], 1e-9),
            **{f"{k}_s": v for k, v in seconds.items() if k != "total"},
        },
        "seed": run.args.seed,
    }
    draw(run, final)
    datasets.write_atomic(run.folder / "final.json", json.dumps(final, indent=2).encode())
    print(table(final, run.folder))
    return final


def table(final: dict, folder) -> str:
    """The closing table, for people."""
    data, clone, score = final["dataset"], final["clone"], final["eval"]
    name = {"bc": "cloning, twice as long"}.get(final["method"], final["method"].upper())

    def row(who: str, mean: float, ci95: float, won: float | None) -> str:
        return f"{who:24}{mean:8.2f}{ci95:9.2f}" + ("" if won is None else f"{won:7.0%}")

    spread = 1.96 * data["return_std"] / data["episodes"] ** 0.5
    known = [data.get("win_rate"), score and score["win_rate"]]
    won = "" if known == [None, None] else "    won"
    lines = [
        f"\n{'':24}{'return':>8}{'95 % +-':>9}{won}",
        row(f"data ({data.get('quality', 'given file')})", data["return_mean"], spread,
            data.get("win_rate")),
    ]  # fmt: skip
    if score:
        for who, s in (("behaviour cloning", clone), (name, score)):
            lines.append(row(who, s["return_mean"], s["return_ci95"], s["win_rate"]))
    else:
        lines.append("no simulator plays this task here: no episode was played, no score is known")
        lines += [f"{k:24}{v:8.3f}" for k, v in final["offline"].items()]
    if wm := final["world_model"]:
        lines += [
            f"\n{'held-out error':24}{'state':>8}{'reward':>9}",
            f"{'deduced (LOGO)':24}{wm['state_mse']:8.4f}{wm['reward_mse']:9.3f}",
            f"{'direct (E_ps)':24}{wm['direct_state_mse']:8.4f}{wm['direct_reward_mse']:9.3f}",
            f"{'nothing changes':24}{wm['persistence_state_mse']:8.4f}",
            f"rank correlation of u with the error {wm['u_error_spearman']:.2f}",
        ]
    lines.append(
        f"\n{final['time']['total_s']:.0f} s; everything is in {folder}/final.json, run.png"
    )
    return "\n".join(lines)


def draw(run, final: dict) -> None:
    """run.png: return while training, the model's error along imagined steps, u against error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wm = final["world_model"]
    figure = Figure(figsize=(13 if wm else 5, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = np.atleast_1d(figure.subplots(1, 3 if wm else 1))
    ax, history = panels[0], final["evaluations"]
    if history:
        x, y = ([e[k] for e in history] for k in ("update", "return_mean"))
        ax.errorbar(x, y, [e["return_ci95"] for e in history], marker="o", label="this run")
        ax.axhline(final["clone"]["return_mean"], color="grey", ls="--", label="behaviour cloning")
    ax.axhline(final["dataset"]["return_mean"], color="grey", label="data")
    ax.set(xlabel="policy updates", ylabel="return", title=f"{run.args.env_id}, {final['backend']}")
    ax.legend()
    if wm:
        ax, errors = panels[1], wm["rollout"]
        steps = range(1, len(errors["state"]) + 1)
        ax.plot(steps, errors["state"], marker="o", label="s', deduced")
        ax.plot(steps, errors["persistence"], color="grey", label="nothing changes")
        ax.set(xlabel="imagined steps", ylabel="state error (standardised MSE)",
               title="along recorded actions, held out", yscale="log")  # fmt: skip
        ax.legend()
        u, miss = doubt_and_error(run.world_model, run.data)
        ax = panels[2]
        ax.scatter(u.cpu(), miss.cpu(), s=3, alpha=0.3, edgecolors="none")
        ax.set(xlabel="doubt u", ylabel="true error of s'", xscale="log", yscale="log",
               title=f"rank correlation {wm['u_error_spearman']:.2f}")  # fmt: skip
    memory = io.BytesIO()
    figure.savefig(memory, dpi=110)
    datasets.write_atomic(run.folder / "run.png", memory.getvalue())


def compare(paths: list[Path]) -> str:
    """A markdown table of finished runs: one row a setting, mean and 95 % interval over its seeds.

    Runs of one backend and method whose names differ only in -seedN are of one setting.
    """
    groups: dict[tuple, list[dict]] = {}
    for path in paths:
        file = path / "final.json" if path.is_dir() else path
        name = path.name if path.is_dir() else path.stem
        if re.fullmatch(r"seed\d+", name):  # --out FOLDER --num-seeds K
            name = f"{path.absolute().parent.name}-{name}"
        run = json.loads(file.read_text())
        setting = (re.sub(r"-seed\d+$", "", name), run["backend"], run.get("method"))
        groups.setdefault(setting, []).append(run)

    def over_seeds(values: list[float], digits: int = 2) -> str:
        mean, spread = mean_and_interval(values)
        return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")

    lines = [
        "| setting | seeds | return | won | clone's return | data's return | battles a seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, *_), runs in groups.items():
        data = np.mean([r["dataset"]["return_mean"] for r in runs])
        if not all(r["eval"] for r in runs):
            lines.append(f"| {name} | {len(runs)} | not played | | | {data:.2f} | 0 |")
            continue
        ours, clone = ([r[part]["return_mean"] for r in runs] for part in ("eval", "clone"))
        wins = [r["eval"]["win_rate"] for r in runs]
        won = "" if wins[0] is None else f"{np.mean(wins):.0%}"
        lines.append(
            f"| {name} | {len(runs)} | {over_seeds(ours)} | {won} | {over_seeds(clone)} "
            f"| {data:.2f} | {runs[0]['eval']['episodes']} |"
        )
    lines += [
        "",
        "| setting | s' | s_hat direct | nothing changes | r' | r_hat direct | rank corr. of u |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = "state_mse direct_state_mse persistence_state_mse reward_mse direct_reward_mse"
    for (name, *_), runs in groups.items():
        if all(r["world_model"] for r in runs):
            cells = [
                over_seeds([r["world_model"][k] for r in runs], 4 if "state" in k else 3)
                for k in keys.split()
            ]
            cells.append(over_seeds([r["world_model"]["u_error_spearman"] for r in runs]))
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python report.py RUN_DIR_OR_JSON ...")
    try:
        print(compare([Path(p) for p in sys.argv[1:]]))
    except (OSError, ValueError, KeyError) as e:
        sys.exit(f"report.py: not a finished run: {e!r}")
