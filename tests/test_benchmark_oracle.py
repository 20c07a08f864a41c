"""The true simulator as a world model: it starts in recorded rows, and LOGO can replace it."""

import dataclasses
import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import datasets
import envs
import train
from behaviour import record
from benchmark import oracle
from experiment import report
from experiment.diagnostics import replay

SLOTS = 8  # the simulator is compiled for so many episodes, as in conftest.py


def load(env_id: str, quality: str, episodes: int, folder):
    path = folder / f"{env_id}.h5"
    record.record(env_id, quality, episodes, 0, path)
    return datasets.load_dataset(path, torch.device("cpu"), holdout=0.3)


@pytest.fixture(scope="module")
def smax(tmp_path_factory):
    """Eight episodes of one policy, seven of another."""
    return load("3s_vs_5z", "mixed", 2 * SLOTS - 1, tmp_path_factory.mktemp("smax"))


def make_model(env_id: str, data, **flags):
    spec = envs.make(env_id).spec
    torch.manual_seed(0)
    args = dataclasses.replace(train.defaults(env_id), **flags)
    return train.make_world_model(args, spec, data)


def uniform(obs, avail, generator):
    noise = torch.rand(avail.shape, generator=generator)
    return torch.nn.functional.one_hot((noise * avail).argmax(-1), avail.shape[-1]).float()


def test_smax_goes_on_from_recorded_rows(smax):
    data, metadata = smax
    model = make_model("3s_vs_5z", data)
    perfect = oracle.Oracle(model, oracle.Smax(data, metadata), data, ())
    near, ended, g = [], [], torch.Generator().manual_seed(0)
    for rows in data.train[::7].split(SLOTS)[:-1]:
        starts = data.gather(rows)
        out = perfect.imagine(replay([starts.actions]), starts, 1, g)
        assert np.array_equal(perfect.rows(starts), rows.numpy())
        assert torch.equal(out["obs"][0], starts.obs)
        assert torch.equal(out["uncertainty"], torch.zeros_like(out["reward"]))
        near.append((out["state"][1] - starts.next_state).abs() < 1e-4)
        ended.append(out["terminated"][0] == starts.terminated)
    # SMAX draws who is hit first: most of the state is as it was recorded, all of it is near
    assert torch.cat(near).float().mean() > 0.9 and torch.cat(ended).float().mean() > 0.95


@pytest.mark.parametrize("flags", [{}, {"clamp": False}, {"heads": False}])
def test_all_parts_by_the_model_are_the_model(smax, flags):
    data, metadata = smax
    model = make_model("3s_vs_5z", data, **flags)
    replaced = oracle.Oracle(model, oracle.Smax(data, metadata), data, oracle.PARTS)
    starts = data.sample(SLOTS, torch.Generator().manual_seed(1))
    g, same = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    out = replaced.imagine(uniform, starts, 4, g)
    torch.randint(2**31, (), generator=same)  # the simulator's seed
    for name, x in model.imagine(uniform, starts, 4, same).items():
        assert torch.equal(out[name], x), name


def test_one_critic_has_no_spread(smax):
    data, metadata = smax
    args = dataclasses.replace(train.defaults("3s_vs_5z"), hidden=8, updates=8, critics=1)
    learner = train.make_learner(args, envs.make("3s_vs_5z").spec, data)
    model, simulator = make_model("3s_vs_5z", data), oracle.Smax(data, metadata)
    found = oracle.by_depth(learner, model, simulator, data, 0.9, 2, count=SLOTS, tail=2)
    assert found["spread_true"] == [None, None] and all(map(math.isfinite, found["value_true"]))


@pytest.mark.parametrize("gamma, steps", [(0.2, 3), (0.8, 21), (1.0, 50)])
def test_returns_are_summed_until_they_hardly_count(gamma, steps, monkeypatch):
    played = []

    def imagine(self, policy, starts, horizon, generator):
        played.append(horizon)
        raise InterruptedError

    monkeypatch.setattr(oracle.Oracle, "imagine", imagine)
    zero = torch.zeros(1, 1)
    data = SimpleNamespace(longest=50, obs=zero, state=zero, sample=lambda count, generator: None)
    with pytest.raises(InterruptedError):
        oracle.by_depth(None, torch.nn.Identity(), None, data, gamma, 3)
    assert played == [3 + steps]


def test_a_robot_goes_on_from_recorded_rows(tmp_path):
    data, metadata = load("Hopper-3x1", "medium", 3, tmp_path)
    model = make_model("Hopper-3x1", data)
    perfect = oracle.Oracle(model, oracle.Robot(data, metadata), data, ())
    starts = data.sample(40, torch.Generator().manual_seed(1))
    out = perfect.imagine(replay([starts.actions]), starts, 1, torch.Generator().manual_seed(0))
    # Velocities beyond 10 are clipped in the recording, and contacts remember their last forces.
    near = torch.isclose(out["state"][1], starts.next_state, atol=2e-3, rtol=1e-3)
    assert near.float().mean() > 0.85
    assert (out["reward"][0] - starts.reward).abs().median() < 1e-3
    assert torch.equal(out["terminated"][0], starts.terminated)


def test_windows_are_recorded_steps_up_to_the_end_of_the_episode(smax):
    data, _ = smax
    placebo = oracle.Windows(data)
    starts = data.sample(50, torch.Generator().manual_seed(1))
    out = placebo.imagine(None, starts, 15, None)
    assert torch.equal(out["obs"][0], starts.obs) and torch.equal(out["obs"][1], starts.next_obs)
    assert torch.equal(out["actions"][0], starts.actions)
    assert torch.equal(out["reward"][0], starts.reward)
    assert (out["valid"][0] == 1).all() and (out["valid"].diff(dim=0) <= 0).all()
    ended = (out["valid"][:-1] == 1) & (out["valid"][1:] == 0)
    assert (out["terminated"].sum(0) <= 1).all() and ended.any()


def test_a_recording_of_another_program_is_refused(smax):
    data, metadata = smax
    with pytest.raises(ValueError, match="is not a recording of SMAX by this program"):
        oracle.replay_smax(data, metadata | {"backend": "smac"})
    moved = metadata | {"seed": 1}
    with pytest.raises(ValueError, match="computes differently"):
        oracle.replay_smax(data, moved)


def test_a_policy_without_a_last_round_is_skipped(monkeypatch, tmp_path):
    """Of 17 episodes of two policies, 8 side by side, the second has none in the third round."""
    monkeypatch.setattr(record, "slots", lambda policies, episodes: SLOTS)
    data, metadata = load("3s_vs_5z", "mixed", 2 * SLOTS + 1, tmp_path)
    import jax

    found = jax.tree.leaves(oracle.replay_smax(data, metadata))
    assert {len(x) for x in found} == {len(data.obs)}


@pytest.fixture
def measured_in_slots(monkeypatch):
    """What a run measures at its end, on SLOTS rows at a time: of any other number the simulator
    would be compiled once more."""
    few = partial(oracle.by_depth, count=SLOTS, tail=8)  # of 500 and 100
    monkeypatch.setattr(oracle, "by_depth", few)
    few = partial(report.rollout_sanity, count=SLOTS)  # of 2000
    monkeypatch.setattr(report, "rollout_sanity", few)
    load_dataset = train.load_dataset

    def load_few(*arguments):
        data, metadata = load_dataset(*arguments)
        data.held_out = data.held_out[::2][:SLOTS]  # without two steps in a row to imagine along
        assert len(data.held_out) == SLOTS
        return data, metadata

    monkeypatch.setattr(train, "load_dataset", load_few)


def test_a_run_ends_with_values_by_depth(tmp_path, smax, measured_in_slots):
    path = smax[1]["path"]
    flags = (
        f"--model reward end --env-id 3s_vs_5z --dataset {path} --updates 4 --wm-updates 2 "
        f"--hidden 8 --eval-every 4 --eval-episodes {SLOTS} --rollout-interval 2 "
        f"--rollout-batch-size {SLOTS} --horizon 3 --out {tmp_path / 'run'}"
    )
    final = oracle.cli(flags.split())
    depth = json.loads((tmp_path / "run" / "depth.json").read_text())
    assert final["method"] == "simulator-reward-end"
    names = {"monte_carlo", "value_true", "spread_true", "value_imagined", "spread_imagined"}
    assert set(depth) == names and {len(x) for x in depth.values()} == {3}
    assert depth["monte_carlo"][0] >= 0 and depth["spread_true"][0] > 0
    with pytest.raises(SystemExit, match="leaves no place for a model"):
        oracle.cli(["--synthetic-fraction", "0"])
