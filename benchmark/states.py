"""States in two dimensions: what world models predict, and where policies go [Fig. 1, 3, 4].

The plane is that of the first two principal components, as in the paper. `errors` records next
states of data of another quality beside their predictions (points.csv), `coverage` the states that
finished runs' policies visit in the simulator, and their rewards (visits.csv).
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import envs
from benchmark.grid import source_of
from benchmark.markdown import table
from benchmark.rows import VISITS, Bin, Point, record
from buffer import OfflineDataset
from experiment import setup
from experiment.diagnostics import predict_held_out, standardiser
from experiment.folder import read_checkpoint
from experiment.imagined import load_data
from experiment.report import read_final
from experiment.watch import make_actor, read_policy

POINTS_DRAWN = 200  # next states of each world model
SQUARES = 25  # regions along each of the two axes


def axes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (S,) and the first two principal components (2,S) of rows x (B,S).

    The sign of a component is arbitrary; its largest entry is made positive.
    """
    mean = x.mean(0)
    components = np.linalg.svd(x - mean, full_matrices=False)[2][:2]
    largest = components[np.arange(2), np.abs(components).argmax(1)]
    return mean, components * np.sign(largest)[:, None]


# --------------------------------------------------------------------------------------------------
# Predictions
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def points(model, data: OfflineDataset, test: OfflineDataset, key: tuple) -> list[Point]:
    """Some next states of `test`'s held-out rows and what `model` predicts of them.

    Args:
        model: a world model trained on `data`, whose statistics standardise the states. key: that
            of the model's `rows.Error` on `test`.
    """
    standardise, batch = standardiser(data), test.gather(test.held_out)
    true = standardise("state", batch.next_state).cpu().numpy()
    predicted = standardise("state", predict_held_out(model, test)["next_state"]).cpu().numpy()
    mean, components = axes(true)
    some = np.linspace(0, len(true) - 1, min(POINTS_DRAWN, len(true))).round().astype(int)
    places = [(x[some] - mean) @ components.T for x in (true, predicted)]  # (P,2)
    commit, rows = setup.commit(), test.held_out.cpu().numpy()[some].tolist()
    return [
        Point(*key, row, *map(float, a), *map(float, b), commit)
        for row, a, b in zip(rows, *places, strict=True)
    ]


def draw_points(ax, rows: list[Point]) -> None:
    """True next states in grey, predictions in colour, a line from each to its own."""
    if not rows:
        return
    true = np.array([(p.true_1, p.true_2) for p in rows])
    predicted = np.array([(p.predicted_1, p.predicted_2) for p in rows])
    ax.plot(*np.stack([true, predicted], -1).transpose(1, 2, 0), color="C1", lw=0.5, alpha=0.6)
    ax.plot(*true.T, "o", ms=2.5, color="grey", label="true next state")
    ax.plot(*predicted.T, "o", ms=2, color="C1", label="predicted")
    away = np.linalg.norm(true - predicted, axis=1).mean()
    ax.set_xlabel(f"mean distance in this plane {away:.2f}", fontsize=8)


# --------------------------------------------------------------------------------------------------
# Visits
# --------------------------------------------------------------------------------------------------


def coverage(runs: tuple[Path, ...], episodes: int = 64, results: Path = VISITS) -> None:
    """Record which states the policies of finished runs visit, and the rewards there.

    Args:
        runs: folders of finished runs of one task on the same data, e.g. of LOGO and of MACQL
        episodes: that each of them plays, at least: in rounds of up to 64
        results: file that receives a row per visited region, in place of all that it has of this
            task, quality and seeds
    """
    if episodes < 1:
        raise ValueError(f"--episodes is {episodes}: give 1 or more.")
    if not runs:
        raise ValueError("--runs: give folders of finished runs.")
    known = [(run, read_policy(run), read_checkpoint(run / "checkpoint.pt")) for run in runs]
    first = known[0][2]
    for run, _, stored in known:
        if stored["data"] != first["data"] or stored["backend"] not in envs.BACKENDS:
            raise ValueError(f"{run}: give runs that play one task and learned from the same data.")
    args, backend = first["args"], first["backend"]
    data, metadata = load_data(args)
    if metadata["sha256"] != first["data"]:
        raise ValueError(f"{runs[0]} was trained on other data than {metadata['path']}.")
    standardise = standardiser(data)
    recorded = standardise("state", data.state[data.train]).numpy()
    mean, components = axes(recorded)
    of_data = (recorded - mean) @ components.T, data.reward[data.train].numpy()
    seen = {("data", stored["args"]["seed"]): of_data for _, _, stored in known}
    env = envs.make(args["env_id"], min(episodes, 64), backend)
    try:
        for run, policy, stored in tqdm(known, desc="playing", unit="run"):
            actor = make_actor(run, policy, env.spec)
            states, rewards = play(env, actor, episodes)
            method, seed = read_final(run)[1]["method"], stored["args"]["seed"]
            if (method, seed) in seen:
                raise ValueError(f"{run}: there are two runs of {method}, seed {seed}: give one.")
            plane = (standardise("state", torch.tensor(states)).numpy() - mean) @ components.T
            seen[method, seed] = plane, rewards
    finally:
        env.close()
    everything = np.concatenate([plane for plane, _ in seen.values()])
    low, high = everything.min(0), everything.max(0)
    quality = source_of(args["dataset"] and Path(metadata["path"]), args["quality"])
    cells = {(args["env_id"], quality, seed) for _, seed in seen}
    rows = []
    for (method, seed), (plane, rewards) in seen.items():
        rows += bins(plane, rewards, low, high, (method, args["env_id"], quality, seed))
    # All older ones of these cells go: they are squares of another plane
    record(results, *rows, replaced=lambda row: (row.env_id, row.quality, row.seed) in cells)


def play(env, actor, episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """States (T,S) and rewards (T,) of all steps of whole greedy episodes."""
    states, rewards = [], []
    for k in range(-(-episodes // env.num_envs)):
        now = env.reset(k)
        while not now.done.all():
            running, avail = ~now.done, None if now.avail is None else torch.tensor(now.avail)
            states.append(now.state[running])
            now = env.step(actor.greedy(torch.tensor(now.obs), avail).numpy())
            rewards.append(now.reward[running])
    return np.concatenate(states), np.concatenate(rewards)


def bins(plane, rewards, low, high, about: tuple) -> list[Bin]:
    """The squares of the plane in which a method was, from points (T,2) and rewards (T,).

    Args:
        low, high (2,): the corners of all squares together. about: method to seed of `rows.Bin`.
    """
    size = (high - low) / SQUARES
    place = ((plane - low) / size).astype(int).clip(0, SQUARES - 1)  # (T,2)
    keys, where, visits = np.unique(place, axis=0, return_inverse=True, return_counts=True)
    paid = np.bincount(where.ravel(), rewards) / visits
    commit = setup.commit()
    return [
        Bin(*about, x, y, *map(float, low + (x, y) * size), *map(float, size), int(n), float(r),
            commit)
        for (x, y), n, r in zip(keys.tolist(), visits, paid, strict=True)
    ]  # fmt: skip


def coverage_table(rows: list[Bin], names: dict[str, str]) -> str:
    """One line per cell and method: how many regions it visits, and how often those without data.

    Args:
        names: of the methods, for the reader.
    """
    cells: dict[tuple, dict[str, list[Bin]]] = {}
    for row in rows:
        by_method = cells.setdefault((row.env_id, row.quality, row.seed), {})
        by_method.setdefault(row.method, []).append(row)
    lines = []
    for cell, by_method in cells.items():
        recorded = {(row.x, row.y) for row in by_method["data"]}
        for method, some in by_method.items():
            total = sum(row.visits for row in some)
            beyond = sum(row.visits for row in some if (row.x, row.y) not in recorded) / total
            reward = sum(row.visits * row.reward_mean for row in some) / total
            name = "the data" if method == "data" else names.get(method, method)
            lines.append([*cell, name, total, len(some), f"{beyond:.1%}", f"{reward:.3f}"])
    return table(
        ["task", "data", "seed", "who", "steps", "regions", "steps in regions without data",
         "mean reward of a step"],
        lines,
    )  # fmt: skip


def draw_visits(left, right, rows: list[Bin], high: float, low: float) -> None:
    """How often a method was in each square, and the mean reward there.

    Args:
        left, right: axes. high, low: of the rewards' colours.
    """
    from matplotlib.colors import LogNorm

    width, height = rows[0].width, rows[0].height
    x0 = rows[0].left - rows[0].x * width
    y0 = rows[0].bottom - rows[0].y * height
    share, reward = np.full((2, SQUARES, SQUARES), np.nan)
    total = sum(r.visits for r in rows)
    for r in rows:
        share[r.y, r.x], reward[r.y, r.x] = r.visits / total, r.reward_mean
    extent = (x0, x0 + SQUARES * width, y0, y0 + SQUARES * height)
    same = {"origin": "lower", "extent": extent, "aspect": "auto", "interpolation": "nearest"}
    left.imshow(share, norm=LogNorm(1e-5, 1e-1), cmap="viridis", **same)
    right.imshow(reward, vmin=low, vmax=high, cmap="plasma", **same)
