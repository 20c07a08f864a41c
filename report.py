"""What a run ends with: measures of the world model, the closing table, run.png and final.json.

  python report.py RUN_DIR_OR_JSON ...      a markdown table of many runs, averaged over seeds

Errors are mean squared errors in standardised units (1 = predicting the mean of the data) on
held-out episodes, which no update has seen; only `rollout_sanity` starts from training rows.

Sizes: B rows, N agents, O observation, S state, H horizon.
"""

import io
import json
import platform
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import datasets
from buffer import OfflineDataset
from logo_wm import LogoWM
from macql import Actor
from run import Run, evaluate, plain

FILES = ("metrics.csv", "events.out.tfevents.*", "checkpoint.pt", "run.png", "final.json")


def rank_correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Spearman's, of two vectors without many ties."""
    ranks = torch.stack([x, y]).argsort(-1).argsort(-1).double()
    return torch.corrcoef(ranks)[0, 1].item()


@torch.no_grad()
def doubt_and_error(model: LogoWM, data: OfflineDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """u (B,) and the length (B,) of the error of s', on every held-out row; standardised."""
    b = data.gather(data.held_out)
    out = model.step(b.obs, b.state, b.actions, clamp=False)
    miss = model.standardise("state", out["next_state"])
    return out["u"], (miss - model.standardise("state", b.next_state)).norm(dim=-1)


@torch.no_grad()
def one_step_errors(model: LogoWM, data: OfflineDataset) -> dict[str, float]:
    """How well the model predicts one step of the held-out episodes, by each of its paths.

    `deducibility_r2` is the share of the state's variance that R_d recovers from the *true* next
    observations (which it was not trained on). `u_error_spearman` is the rank
    correlation of the doubt u with the error of s'.
    """
    b = data.gather(data.held_out)
    out = model.step(b.obs, b.state, b.actions, clamp=False)

    def error(name: str, guess: torch.Tensor, truth: torch.Tensor) -> float:
        difference = model.standardise(name, guess) - model.standardise(name, truth)
        return difference.square().mean().item()

    s_next = model.standardise("state", b.next_state)  # (B,S)
    s = model.standardise("state", b.state)
    ideal = model.deduce(model.standardise("obs", b.next_obs), s, b.actions)[:, :-1]
    unexplained = (ideal - s_next).square().sum() / (s_next - s_next.mean(0)).square().sum()
    return {
        "obs_mse": error("obs", out["next_obs"], b.next_obs),
        "state_mse": error("state", out["next_state"], b.next_state),
        "reward_mse": error("reward", out["reward"], b.reward),
        "direct_state_mse": error("state", out["direct_state"], b.next_state),
        "direct_reward_mse": error("reward", out["direct_reward"], b.reward),
        "persistence_obs_mse": error("obs", b.obs, b.next_obs),
        "persistence_state_mse": error("state", b.state, b.next_state),
        "deducibility_r2": 1 - unexplained.item(),
        "u_error_spearman": rank_correlation(*doubt_and_error(model, data)),
    }


def windows(data: OfflineDataset, rows: torch.Tensor, horizon: int) -> torch.Tensor:
    """Those of `rows` (sorted) that are followed by `horizon` - 1 more of their episode."""
    tail = rows[horizon - 1 :]
    return rows[: len(tail)][tail - rows[: len(tail)] == horizon - 1]


@torch.no_grad()
def rollout_errors(
    model: LogoWM, data: OfflineDataset, horizon: int, clamp: bool = True
) -> dict[str, list[float]]:
    """Errors after 1..H imagined steps along the actions recorded in held-out episodes."""
    start = windows(data, data.held_out, horizon)
    if len(start) == 0:
        return {"state": [], "persistence": [], "reward": []}
    steps = iter(range(horizon))
    out = model.imagine(
        lambda obs, avail: data.actions[start + next(steps)],
        data.obs[start], data.state[start], None, horizon,
        torch.Generator(start.device).manual_seed(0), heads=False, clamp=clamp,
    )  # fmt: skip
    errors = {"state": [], "persistence": [], "reward": []}
    for h in range(horizon):
        truth = model.standardise("state", data.state[start + h + 1])
        guess = model.standardise("state", out["state"][h + 1])
        still = model.standardise("state", data.state[start])
        reward = (out["reward"][h] - data.reward[start + h]) / model.reward_std
        errors["state"].append((guess - truth).square().mean().item())
        errors["persistence"].append((still - truth).square().mean().item())
        errors["reward"].append(reward.square().mean().item())
    return errors


@torch.no_grad()
def rollout_sanity(
    model: LogoWM, clone: Actor, data: OfflineDataset, horizon: int, heads: bool, clamp: bool,
    count: int = 2000,
) -> dict:  # fmt: skip
    """Does the cloned behaviour policy, acting in the model, live in the world of the data?

    From the same real rows, H steps are imagined and, beside them, read from the recording; each
    rollout counts up to its end.
    """
    rng = torch.Generator(data.train.device).manual_seed(0)
    pick = torch.randint(len(data.train), (count,), generator=rng, device=data.train.device)
    rows = data.train[pick]
    start = data.gather(rows)
    out = model.imagine(
        lambda obs, avail: clone.explore(obs, avail, rng, epsilon=0.0),
        start.obs, start.state, start.avail, horizon, rng, heads, clamp,
    )  # fmt: skip
    on = out["filled"].bool()  # (H,B)
    inside = (out["state"] >= model.state_min) & (out["state"] <= model.state_max)
    is_step = torch.zeros(len(data.obs), dtype=torch.bool, device=rows.device)
    is_step[data.train] = True
    real, running = [], torch.ones_like(rows, dtype=torch.bool)
    for h in range(horizon):
        row = (rows + h).clamp(max=len(is_step) - 1)
        running = running & is_step[row]
        real.append(data.reward[row[running]])
    forbidden = 0.0
    if out["avail"] is not None:
        taken = (out["actions"] * out["avail"][:-1]).sum(-1)  # (H,B,N) 1 = it was allowed
        forbidden = (taken[on] == 0).float().mean().item()
    return {
        "imagined_reward_per_step": out["reward"][on].mean().item(),
        "real_reward_per_step": torch.cat(real).mean().item(),
        "finite": all(v.isfinite().all().item() for v in out.values() if v is not None),
        "states_in_range": inside.float().mean().item(),
        "forbidden_actions": forbidden,
    }


def pooled(evaluations: list[dict]) -> dict:
    """Several evaluations as one: mean of the means, 95 % interval over all their episodes."""
    episodes = sum(e["episodes"] for e in evaluations)
    variance = np.mean([e["return_ci95"] ** 2 * e["episodes"] for e in evaluations])
    return {
        "return_mean": float(np.mean([e["return_mean"] for e in evaluations])),
        "return_ci95": float(np.sqrt(variance / episodes)),
        "win_rate": float(np.mean([e["win_rate"] for e in evaluations])),
        "episodes": episodes,
    }


def finish(run: Run, method: str, commit: str) -> dict:
    """Measure, write final.json and run.png, print the closing table; returns the JSON."""
    last = run.evaluations[-run.args.final_evals :]
    score, data, facts = pooled(last), run.data, run.facts
    clone = evaluate(run, run.clone, 10**6 * (run.args.seed + 1) - 10**5, score["episodes"])
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
        "versions": {k: version(k) for k in ("torch", "numpy", "jaxmarl", "jax")}
        | {"python": platform.python_version()},
        "device": device,
        "backend": run.env.spec.backend,
        "env_id": run.args.env_id,
        "dataset": facts,
        "world_model": world_model,
        "rollout": rollout,
        "eval": score,
        "clone": clone,
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
    lines = [
        f"\n{'':24}{'return':>8}{'95 % +-':>9}{'won':>7}",
        f"{'data (' + str(data.get('quality', 'given file')) + ')':24}{data['return_mean']:8.2f}"
        f"{1.96 * data['return_std'] / data['episodes'] ** 0.5:9.2f}"
        + (f"{data['win_rate']:7.0%}" if "win_rate" in data else ""),
    ]
    for who, s in (("behaviour cloning", clone), (name, score)):
        lines.append(f"{who:24}{s['return_mean']:8.2f}{s['return_ci95']:9.2f}{s['win_rate']:7.0%}")
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
    x, y = ([e[k] for e in history] for k in ("update", "return_mean"))
    ax.errorbar(x, y, [e["return_ci95"] for e in history], marker="o", label="this run")
    ax.axhline(final["dataset"]["return_mean"], color="grey", label="data")
    ax.axhline(final["clone"]["return_mean"], color="grey", ls="--", label="behaviour cloning")
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

    Runs whose names differ only in -seedN are of one setting.
    """
    groups: dict[str, list[dict]] = {}
    for path in paths:
        file = path / "final.json" if path.is_dir() else path
        name = path.name if path.is_dir() else path.stem
        groups.setdefault(re.sub(r"-seed\d+$", "", name), []).append(json.loads(file.read_text()))

    def over_seeds(values: list[float], digits: int = 2) -> str:
        mean = f"{np.mean(values):.{digits}f}"
        if len(values) == 1:
            return mean
        # Student's t, for the seeds are few
        quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.57)
        spread = quantile * np.std(values, ddof=1) / len(values) ** 0.5
        return f"{mean} ± {spread:.{digits}f}"

    lines = [
        "| setting | seeds | return | won | clone's return | data's return | battles a seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in groups.items():
        ours, clone, data = (
            [r[part]["return_mean"] for r in runs] for part in ("eval", "clone", "dataset")
        )
        won = np.mean([r["eval"]["win_rate"] for r in runs])
        lines.append(
            f"| {name} | {len(runs)} | {over_seeds(ours)} | {won:.0%} | {over_seeds(clone)} "
            f"| {np.mean(data):.2f} | {runs[0]['eval']['episodes']} |"
        )
    lines += [
        "",
        "| setting | s' | s_hat direct | nothing changes | r' | r_hat direct | rank corr. of u |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = "state_mse direct_state_mse persistence_state_mse reward_mse direct_reward_mse"
    for name, runs in groups.items():
        if runs[0]["world_model"]:
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
