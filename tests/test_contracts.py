"""train.main takes any learner and any world model that keep the contracts, and compiles them."""

import copy
import dataclasses
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import TINY
from faults import battles
from test_sync import make_data

import datasets
import envs
import macql
import train
from buffer import SyntheticBuffer, mix
from experiment.watch import watch


class CloningLearner:
    """The smallest learner: it clones the rows that it gets and has no critic."""

    def __init__(self, args, spec, data):
        x = data.statistics()
        self.actor = macql.Actor(x["obs_mean"], x["obs_std"], spec.action_dim, args.hidden)
        self.ema_actor = copy.deepcopy(self.actor)
        self.optimizer = torch.optim.SGD(self.actor.parameters(), lr=0.1)
        self.updates_on_real_rows = round(args.critic_first * args.updates)

    def update(self, batch, is_real, generator):
        assert isinstance(generator, torch.Generator)
        imagined = 0 if self.updates_on_real_rows > 0 else 8
        self.updates_on_real_rows -= 1
        assert is_real.tolist() == [1.0] * 16 + [0.0] * imagined
        distance = (self.actor(batch.obs, batch.avail) - batch.actions).square().mean()
        self.optimizer.zero_grad()
        distance.backward()
        self.optimizer.step()
        self.ema_actor.load_state_dict(self.actor.state_dict())
        return {"distance": distance.detach()}

    def state_dict(self):
        return {"actor": self.actor.state_dict()}

    def load_state_dict(self, state):
        self.actor.load_state_dict(state["actor"])
        self.ema_actor.load_state_dict(state["actor"])


class NextStateModel(nn.Module):
    """The smallest world model: a linear change of the state; everything else stays as it is."""

    def __init__(self, args, spec, data):
        super().__init__()
        self.change = nn.Linear(spec.state_dim, spec.state_dim)

    def loss(self, batch):
        error = (batch.state + self.change(batch.state) - batch.next_state).square().mean()
        return error, {"error": error.detach()}

    @torch.no_grad()
    def imagine(self, policy, starts, horizon, generator):
        states, actions = [starts.state], []
        for _ in range(horizon):
            actions.append(policy(starts.obs, starts.avail, generator))
            states.append(states[-1] + self.change(states[-1]))
        zeros = torch.zeros(horizon, len(starts.reward))
        return {
            "obs": starts.obs.expand(horizon + 1, -1, -1, -1), "state": torch.stack(states),
            "avail": starts.avail.expand(horizon + 1, -1, -1, -1), "actions": torch.stack(actions),
            "reward": zeros, "terminated": zeros, "uncertainty": zeros, "valid": zeros + 1,
        }  # fmt: skip


@pytest.mark.parametrize("parts", ["learner", "world_model", "both"])
def test_stand_ins_train_end_to_end(parts, dataset, tmp_path, undrawn):
    given = {"learner": CloningLearner, "world_model": NextStateModel}
    given = given if parts == "both" else {parts: given[parts]}
    flags = [*TINY, "--dataset", str(dataset), "--out", str(tmp_path / "run")]
    final = train.cli(flags, **given, method="stand-in")
    assert final["method"] == "stand-in" and 0 <= final["eval"]["return_mean"] <= 20
    assert final["world_model"]["state_mse"] > 0
    metrics = (tmp_path / "run" / "metrics.csv").read_text()
    assert ("policy,6,distance" in metrics) == ("learner" in given)
    assert ("wm,4,error" in metrics) == ("world_model" in given)


class Counting:
    """The smallest simulator: eight steps, and one agent's choice, counted from 1, pays in each."""

    def __init__(self, args, obs_dim=5):
        self.num_envs = args.eval_episodes
        self.spec = envs.Spec("toy", "counting", 3, obs_dim, 7, 6, True, 8, can_win=False)

    def reset(self, seed=None):
        self.left = 8
        return self.seen(np.zeros(self.num_envs))

    def step(self, actions):
        self.left -= 1
        return self.seen(1.0 + actions[:, 0].argmax(-1))

    def seen(self, reward):
        e, (n, o, s, a) = self.num_envs, self.spec[2:6]
        arrays = [np.ones(x, np.float32) for x in ((e, n, o), (e, s), (e, n, a))]
        no, over = np.zeros(e, bool), np.full(e, self.left == 0)
        return envs.Step(*arrays, reward, no, over, no, over)


class Short(Counting):
    """One that shows less than its spec says."""

    def seen(self, reward):
        now = super().seen(reward)
        return now._replace(obs=now.obs[..., :4])


def test_a_simulator_of_ones_own_plays_the_evaluations(tmp_path, undrawn):
    path = tmp_path / "toy.h5"
    datasets.save_episodes(path, battles(), {"env_id": "toy"})
    args = train.parse([*TINY, "--dataset", str(path), "--out", str(tmp_path / "run")])
    final = train.main(args, simulator=Counting)
    assert (final["backend"], final["method"]) == ("counting", "logo")  # and it is not closed
    actor = macql.Actor(torch.zeros(3, 5), torch.ones(3, 5), 6, 16)
    stored = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    actor.load_state_dict(stored["learner"]["ema_actor"])
    paid = 1.0 + actor.greedy(torch.ones(1, 3, 5), torch.ones(1, 3, 6))[0, 0].argmax().item()
    assert final["eval"] == {
        "return_mean": 8 * paid, "return_ci95": 0.0, "win_rate": None, "episodes": 16
    }  # fmt: skip
    with pytest.raises(ValueError, match="but toy on counting has \\(3, 4, 7, 6, True\\)"):
        train.main(args, simulator=partial(Counting, obs_dim=4))
    with pytest.raises(ValueError, match="obs is float32 \\(8, 3, 4\\), not float32 \\(8, 3, 5\\)"):
        train.main(args, simulator=Short)
    with pytest.raises(ValueError, match="without a simulator of this project .*counting"):
        watch(tmp_path / "run")


@pytest.mark.parametrize("imagined_rows", ["added", "added+policy", "instead", "printed"])
def test_a_flag_says_where_imagined_rows_count(imagined_rows):
    data, spec = make_data(True)
    learner = train.make_learner(
        train.Args(hidden=8, updates=8, imagined_rows=imagined_rows), spec, data
    )
    others = {"printed": "printed", "added+policy": "value"}
    expected = others.get(imagined_rows, "bellman")
    for loss in (learner.critic_loss, learner.policy_loss):
        assert loss.keywords["imagined_in"] == expected


def bounds(data, spec, **flags):
    args = train.Args(hidden=8, updates=8, **flags)
    return train.make_learner(args, spec, data).critic_loss.keywords["bounds"]


def test_targets_lie_within_the_returns_of_the_data():
    data, spec = make_data(True)
    row, later, trained = 0, [], set(data.train.tolist())
    for length in data.lengths.tolist():  # a row more than steps, for the last observation
        rewards = data.reward[row : row + length].tolist()
        later += [math.fsum(rewards[t:]) for t in range(length) if row in trained]
        row += length + 1
    assert bounds(data, spec) == pytest.approx((min(later), max(later)), abs=1e-4)
    assert bounds(data, spec, clamp=False) == (-math.inf, math.inf)
    data.reward.fill_(1.0)
    data.reward[data.left == 1] = -100.0  # the last step: no return is positive,
    low, high = bounds(data, spec, gamma=0.5)  # but what is to come, discounted, is
    most = int(data.left[data.train].max())
    expected = sum(0.5**t for t in range(most - 1)) - 100 * 0.5 ** (most - 1)
    assert low == -100 and high == pytest.approx(max(0.0, expected), abs=1e-4)


# --------------------------------------------------------------------------------- torch.compile


def trained(
    discrete: bool, backend: str | None, updates: int = 8, device: str = "cpu"
) -> tuple[dict, list]:
    """State and metrics after training as in train.main, compiled or not."""
    torch.manual_seed(0)
    torch.compiler.reset()
    data, spec = make_data(discrete, device)
    args = train.Args(hidden=8, updates=updates, wm_updates=updates, critic_first=0.0)
    model, learner = (f(args, spec, data) for f in (train.make_world_model, train.make_learner))
    for part in (model, learner) if backend else ():
        for name in part.compilable:
            mode = "reduce-overhead" if device == "cuda" and name != "step" else None
            compiled = torch.compile(getattr(part, name), backend=backend, mode=mode)
            setattr(part, name, compiled)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model_data = SyntheticBuffer(2, 3, 8, *spec[2:6], device, discrete)
    rng, noted = torch.Generator(device).manual_seed(0), []
    for k in range(updates):
        torch.compiler.cudagraph_mark_step_begin()
        loss, metrics = model.loss(data.sample(16, rng))
        macql.descend(optimizer, loss)
        if k % 5 == 0:
            model_data.add(model.imagine(learner.actor.sample, data.sample(8, rng), 3, rng))
        batch, is_real = mix(data.sample(8, rng), model_data.sample(8, rng))
        metrics |= learner.update(batch, is_real, rng)
        noted.append(torch.stack(list(metrics.values())))
    state = {"model": model.state_dict(), "actor": learner.actor.state_dict()}
    return state | {"critic": learner.critic.state_dict()}, noted


@pytest.mark.parametrize("discrete", [True, False])
def test_traced_and_eager_training_are_equal(discrete):
    """What torch.compile traces; the C++ that it would write takes a minute."""
    (traced, noted), (eager, plain) = (trained(discrete, x) for x in ("eager", None))
    torch.testing.assert_close(torch.stack(noted), torch.stack(plain), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("discrete", [True, False])
def test_the_program_of_copying_md_is_train_py(discrete, tmp_path):
    """The same weights after as many updates, with everything but sizes at its default."""
    arrays, path = battles(), tmp_path / "toy.h5"
    if not discrete:
        arrays["actions"] = 2.0 * arrays.pop("avail_actions").astype(np.float32) - 1.0
        arrays["actions"] *= arrays["filled"][..., None]
    datasets.save_episodes(path, arrays, {"env_id": "toy"})
    args = train.defaults("toy" if discrete else "HalfCheetah-6x1")
    args = dataclasses.replace(
        args, env_id="toy", dataset=path, seed=3, updates=8, wm_updates=3, horizon=2,
        rollout_batch_size=10, rollout_interval=3, device="cpu", out=tmp_path / "run",
    )  # fmt: skip
    train.main(args)
    ours = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    columns, lengths, _ = datasets.read_episodes(path)
    kept = {k: None if x is None else torch.from_numpy(x) for k, x in columns.items() if k != "won"}
    text = (Path(__file__).parent.parent / "docs" / "copying.md").read_text()
    names = {}
    exec(re.search("```python\n(.*?)```", text, re.S)[1], names)
    actor, model = names["train"](kept, lengths, discrete, 8, 3, 2, 10, 3, seed=3)
    torch.testing.assert_close(dict(actor.state_dict()), dict(ours["learner"]["ema_actor"]))
    torch.testing.assert_close(dict(model.state_dict()), dict(ours["world_model"]))
