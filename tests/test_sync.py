"""No update and no rollout looks at a value: on a GPU a look waits for everything before it."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import envs
import prepare
import train
from buffer import OfflineDataset
from macql import random_actions
from run import Runs

N, OBS, S, A, EPISODES, STEPS = 2, 5, 4, 3, 6, 10
LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default")
SETTINGS = {
    "default": {},
    "coin": {"mixing": "coin"},
    "penalty": {"uncertainty": "penalty", "learn_variance": True},
    "expectation": {"conservative": "expectation", "backup": "max", "normalise_q": True},
    "real": {"bellman_on": "real", "conservative_on": "real", "bc_on": "both"},
    "letter": {"deduce_from": "obs", "heads": False, "clamp": False, "shared_actor": False},
}


class Looks(TorchDispatchMode):
    """Notes every operation whose result the processor must wait for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += [str(function) for name in LOOKS if name in str(function)]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def one_hot_as_on_a_gpu(monkeypatch):
    """On a CPU, and only there, one_hot looks whether its input is in range."""

    def one_hot(x, classes):
        empty = torch.zeros(*x.shape, classes, dtype=torch.long)
        return empty.scatter(-1, x.unsqueeze(-1), 1)

    monkeypatch.setattr(F, "one_hot", one_hot)


def build(discrete: bool, seeds: int, **settings) -> Runs:
    rows = EPISODES * (STEPS + 1)
    actions = torch.rand(rows, N, A) * 2 - 1
    if discrete:
        actions = torch.eye(A)[torch.randint(A, (rows, N))]
    avail = torch.ones(rows, N, A) if discrete else None
    columns = torch.randn(rows, N, OBS), torch.randn(rows, S), actions, avail, torch.randn(rows)
    data = OfflineDataset(*columns, torch.zeros(rows), [STEPS] * EPISODES)
    args = train.Args(
        batch_size=8, wm_batch_size=8, hidden=8, wm_hidden=8, horizon=3, rollouts=8, retain=2,
        num_seeds=seeds, **settings,
    )  # fmt: skip
    spec = envs.Spec("none", "offline", N, OBS, S, A, discrete, STEPS)
    return Runs([
        prepare.build(dataclasses.replace(args, seed=k), Path(), data, {}, None, spec)
        for k in range(seeds)
    ])  # fmt: skip


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_no_update_and_no_rollout_looks_at_a_value(setting, discrete, seeds, one_hot_as_on_a_gpu):
    runs = build(discrete, seeds, **SETTINGS[setting])
    args, updates = runs.args, train.make_updates(runs)
    train.imagine(runs, updates)
    noise = runs.draw(lambda run: run.actor.noise((3, 8, N, A), run.rng))
    dice = runs.draw(lambda run: torch.rand(3, 8, generator=run.rng))
    coin = runs.draw(lambda run: torch.ones(())) if args.mixing == "coin" else None
    draws = None if discrete else runs.draw(lambda run: random_actions((8, N, A), run.rng))
    half = 8 if coin is not None else 4
    points = runs.draw(lambda run: run.model_data.draw(half, run.rng))
    rows = runs.rows(8)
    with Looks() as looks:
        metrics = updates.clone(rows) | updates.world_model(rows)
        rollouts = updates.imagine(rows, noise, dice)
        metrics |= updates.policy(rows[..., :half], points, coin, draws)
    assert looks.seen == []
    assert all(x.isfinite().all() for x in (*metrics.values(), *rollouts.values()))


def test_the_check_itself_sees_a_look():
    with Looks() as looks:
        torch.ones(2).sum().item()
    assert looks.seen == ["aten._local_scalar_dense.default"]
