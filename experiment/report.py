"""What a run ends with: the closing table, run.png and final.json; and tables of many runs.

docs/metrics.md explains every field of final.json.
"""

import json
import math
import os
import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import scipy.stats
import torch

import datasets
import envs
from experiment.diagnostics import (
    offline_measures,
    one_step_errors,
    rollout_errors,
    rollout_sanity,
    uncertainty_and_error,
)
from experiment.figures import draw
from experiment.tracking import plain

FINAL_EVALUATIONS = 5  # the last ones are pooled to the final score, because single ones vary
NUMBERS = {  # of final.json, without which no table can be made
    "dataset": ("return_mean",),
    "eval": ("return_mean", "win_rate", "episodes"),
    "clone": ("return_mean",),
    "world_model": (),
}
PACKAGES = ("torch", "numpy", "jaxmarl", "jax", "mujoco")  # that change a run's numbers


def due(args, update: int) -> bool:
    """Is an evaluation due? Half as often before the last ones, which make the final score."""
    last = update > args.updates - FINAL_EVALUATIONS * args.eval_every
    every = args.eval_every if last else 2 * args.eval_every
    return update % every == 0 or update == args.updates


def finish(run, data, env, learner, bc_actor, world_model) -> dict:
    """Measure a trained run, write run.png and final.json, print the closing table.

    Args:
        run: `tracking.Run`.
        data: `OfflineDataset`.
        env: simulator of the task; None: no episode is played, eval and clone are null.
        learner: with `ema_actor`, and a `critic` if it has one.
        bc_actor: the cloned policy; evaluated with as many episodes as the final score has.
        world_model: see diagnostics.py; None: a run without one.
    Returns:
        The content of final.json.
    Raises:
        OSError: the folder cannot be written; no file is left half-written.
    """
    score, clone = pooled(run.evaluations[-FINAL_EVALUATIONS:]), None
    if score:
        seed = 10**6 * (run.args.seed + 1) - 10**5
        with run.timed("eval"):
            clone = envs.evaluate(env, bc_actor.greedy, score["episodes"], seed, run.device)
    model_errors = rollout = scatter = None
    if world_model is not None:
        horizon = run.args.horizon
        model_errors = one_step_errors(world_model, data)
        model_errors["rollout"] = rollout_errors(world_model, data, horizon)
        rollout = rollout_sanity(world_model, bc_actor, data, horizon)
        scatter = uncertainty_and_error(world_model, data)
    measured = about(run) | {
        "world_model": model_errors,
        "rollout": rollout,
        "eval": score,
        "clone": clone,
        "offline": offline_measures(learner, bc_actor, data, run.args.gamma),
        "evaluations": run.evaluations,
        "time": times(run),
        "seed": run.args.seed,
    }
    draw(run.folder, measured, scatter)
    final = finite_or_null(measured)
    content = json.dumps(final, indent=2, allow_nan=False).encode()
    datasets.write_atomic(run.folder / "final.json", content)
    print(table(measured, run.folder))
    return final


def about(run) -> dict:
    """Which run it was: flags, code, packages, machine, simulator, data."""
    device = f"cpu {platform.machine()}, {torch.get_num_threads()} threads"
    if run.device.type == "cuda":
        device = f"cuda {torch.cuda.get_device_name(run.device)}"
    versions = {name: installed(name) for name in PACKAGES}
    return {
        "args": plain(run.asked),
        "updates": run.args.updates,
        "method": run.method,
        "commit": run.commit,
        "versions": versions | {"python": platform.python_version()},
        "device": device,
        "machine": machine(run.device.type),
        "backend": run.spec.backend,
        "env_id": run.args.env_id,
        "dataset": run.metadata,
    }


def machine(device: str) -> str:
    """Model and number of the processors, and the GPU's name where `device` is "cuda"."""
    model, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        model = found.group(1)
    gpu = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    return f"{model}, {os.cpu_count()} cores{gpu}"


def pooled(evaluations: list[dict]) -> dict | None:
    """Several evaluations as one: mean of the means, 95 % interval over all their episodes.

    Returns:
        return_mean, return_ci95, win_rate (None where the task has no wins), episodes; None if
        there are no evaluations.
    """
    if not evaluations:
        return None
    episodes = sum(e["episodes"] for e in evaluations)
    variance = np.mean([e["return_ci95"] ** 2 * e["episodes"] for e in evaluations])
    wins = [e["win_rate"] for e in evaluations]
    return {
        "return_mean": float(np.mean([e["return_mean"] for e in evaluations])),
        "return_ci95": float(np.sqrt(variance / episodes)),
        "win_rate": None if wins[0] is None else float(np.mean(wins)),
        "episodes": episodes,
    }


def installed(package: str) -> str | None:
    """The package's version; None where it is not installed: no run needs all simulators."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def times(run) -> dict[str, float]:
    """Seconds of the run and of its parts, and the speed of each part."""
    done, seconds = run.progress, run.seconds
    return {
        "total_s": time.time() - run.started,
        "wm_updates_per_s": done["wm"] / max(seconds["wm"], 1e-9),
        "updates_per_s": done["policy"] / max(seconds["policy"], 1e-9),
        "imagined_rows_per_s": run.imagined_rows / max(seconds["imagine"], 1e-9),
        **{f"{name}_s": value for name, value in seconds.items() if name != "total"},
    }


def finite_or_null(value):
    """The same nested dicts and lists, with None for NaN and infinity, which JSON cannot hold."""
    if isinstance(value, dict):
        return {k: finite_or_null(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(final: dict, folder: Path) -> str:
    """The closing table, for the terminal."""
    data, clone, score = final["dataset"], final["clone"], final["eval"]
    name = {"bc": "cloning, twice as long"}.get(final["method"], final["method"].upper())

    def row(label: str, mean: float, ci95: float, won: float | None) -> str:
        return f"{label:24}{mean:8.2f}{ci95:9.2f}" + ("" if won is None else f"{won:7.0%}")

    ci95 = 1.96 * data["return_std"] / data["episodes"] ** 0.5
    known = [data.get("win_rate"), score and score["win_rate"]]
    won = "" if known == [None, None] else "    won"
    quality = data.get("quality", "given file")
    lines = [
        f"\n{'':24}{'return':>8}{'95 % +-':>9}{won}",
        row(f"data ({quality})", data["return_mean"], ci95, data.get("win_rate")),
    ]
    for label, s in (("behaviour cloning", clone), (name, score)):
        if s:
            lines.append(row(label, s["return_mean"], s["return_ci95"], s["win_rate"]))
    if not score:
        lines.append("no simulator plays this task here: no episode was played, no score is known")
        lines += [f"{k:24}{v:8.3f}" for k, v in final["offline"].items()]
    if final["world_model"]:
        lines += model_lines(final["world_model"])
    seconds = final["time"]["total_s"]
    lines.append(f"\n{seconds:.0f} s; everything is in {folder}/final.json, run.png")
    return "\n".join(lines)


def model_lines(errors: dict) -> list[str]:
    """The closing table's lines on the world model; other models than LogoWM have fewer."""
    direct = "direct_state_mse" in errors
    label = "deduced (LOGO)" if direct else "world model"
    lines = [
        f"\n{'held-out error':24}{'state':>8}{'reward':>9}",
        f"{label:24}{errors['state_mse']:8.4f}{errors['reward_mse']:9.3f}",
    ]
    if direct:
        state, reward = errors["direct_state_mse"], errors["direct_reward_mse"]
        lines.append(f"{'direct (E_ps)':24}{state:8.4f}{reward:9.3f}")
    lines.append(f"{'nothing changes':24}{errors['persistence_state_mse']:8.4f}")
    lines.append(f"rank correlation of u with the error {errors['u_error_spearman']:.2f}")
    return lines


# --------------------------------------------------------------------------------------------------
# Many runs
# --------------------------------------------------------------------------------------------------


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half its 95 % interval by Student's t; infinite for a single seed."""
    if len(values) == 1:
        return values[0], math.inf
    quantile = scipy.stats.t.ppf(0.975, len(values) - 1)
    return float(np.mean(values)), float(quantile * np.std(values, ddof=1) / len(values) ** 0.5)


def over_seeds(values: list[float | None], digits: int = 2) -> str:
    """A cell of a table: mean ± 95 % interval over seeds; empty where a seed has no value."""
    if None in values:
        return ""
    mean, half = mean_and_interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def read_final(path: Path) -> tuple[str, dict]:
    """(name of the run, content of its final.json) of a run's folder or of such a file.

    Raises:
        ValueError: it is not a finished run.
    """
    file = path / "final.json" if path.is_dir() else path
    if not file.is_file():
        why = "has no final.json (not finished yet?)" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {why}: give folders of finished runs, or their final.json.")
    try:
        run = json.loads(file.read_text())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file} is not JSON: {e}.") from e
    if missing := [k for k in ("backend", *NUMBERS) if not isinstance(run, dict) or k not in run]:
        raise ValueError(f"{file} is not the final.json of a run: no {', '.join(missing)} in it.")
    if wrong := [part for part, keys in NUMBERS.items() if not has_numbers(run[part], keys)]:
        raise ValueError(f"{file} is damaged: {wrong[0]} lacks a number, or holds something else.")
    data = run["dataset"] or {}
    texts = (run["backend"], run.get("method"), run.get("env_id"), data.get("quality"))
    named = run["backend"] is not None and all(isinstance(x, str | None) for x in texts)
    if (
        not named
        or data.get("return_mean") is None
        or (run["clone"] is None) != (run["eval"] is None)
    ):
        raise ValueError(f"{file} is damaged: backend, method, dataset, eval or clone is missing.")
    folder = file.absolute().parent
    name = folder.name if file.name == "final.json" else file.stem
    if re.fullmatch(r"seed\d+", name):  # --out FOLDER/seed1: the folder says what it is
        name = f"{folder.parent.name}-{name}"
    return name, run


def has_numbers(part, keys: tuple[str, ...]) -> bool:
    """Whether a part of final.json has numbers of these names; null stands for a missing one."""
    if not isinstance(part, dict):
        return part is None
    found = [part.get(k, "") for k in keys or part if k != "rollout"]
    return all(x is None or isinstance(x, int | float) and abs(x) < 1e300 for x in found)


def compare(paths: list[Path]) -> str:
    """Two markdown tables of finished runs, one row per setting: scores, world models.

    Runs of one task, quality, backend and method whose names differ only in -seedN are one setting.
    Cells are means with a 95 % interval over seeds.

    Args:
        paths: folders of runs, or final.json files under any name.
    Raises:
        ValueError: one of them is not a finished run.
    """
    groups: dict[tuple, list[dict]] = {}
    for path in dict.fromkeys(map(Path, paths)):
        name, run = read_final(path)
        task = run.get("env_id"), run["dataset"].get("quality"), run["backend"], run.get("method")
        setting = re.sub(r"-seed\d+$", "", name), *task
        groups.setdefault(setting, []).append(run)
    named = [(name, runs) for (name, *_), runs in groups.items()]
    lines = [
        "| setting | seeds | return | won | clone's return | data's return | episodes per seed |",
        "|---|---|---|---|---|---|---|",
        *(score_row(name, runs) for name, runs in named),
        "",
        "| setting | s' | s_hat direct | nothing changes | r' | r_hat direct | rank corr. of u |",
        "|---|---|---|---|---|---|---|",
        *(model_row(name, runs) for name, runs in named if all(r["world_model"] for r in runs)),
    ]
    return "\n".join(lines)


def score_row(name: str, runs: list[dict]) -> str:
    """A setting's returns and wins."""
    data = np.mean([r["dataset"]["return_mean"] for r in runs])
    if not all(r["eval"] for r in runs):
        return f"| {name} | {len(runs)} | not played | | | {data:.2f} | 0 |"
    score, clone = (over_seeds([r[k]["return_mean"] for r in runs]) for k in ("eval", "clone"))
    wins = [r["eval"]["win_rate"] for r in runs]
    won = "" if None in wins else f"{np.mean(wins):.0%}"
    episodes = runs[0]["eval"]["episodes"]
    return f"| {name} | {len(runs)} | {score} | {won} | {clone} | {data:.2f} | {episodes} |"


def model_row(name: str, runs: list[dict]) -> str:
    """A setting's errors of the world model; empty cells for what a model does not have."""
    digits = {"state_mse": 4, "direct_state_mse": 4, "persistence_state_mse": 4, "reward_mse": 3,
              "direct_reward_mse": 3, "u_error_spearman": 2}  # fmt: skip
    cells = [over_seeds([r["world_model"].get(k) for r in runs], d) for k, d in digits.items()]
    return f"| {name} | " + " | ".join(cells) + " |"
