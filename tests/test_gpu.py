"""On a GPU: the numbers of a CPU, runs that repeat and resume, and compiled code that agrees."""

import math

import pytest
import torch
from conftest import TINY
from test_contracts import trained
from test_sync import SETTINGS, make_data

import macql
import train
from experiment import tracking

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


def losses_and_gradients(setting: str, discrete: bool, device: str) -> dict[str, torch.Tensor]:
    """Of world model, critic and policies, on one batch, from the same weights on every device."""
    torch.manual_seed(0)
    data, spec = make_data(discrete, device)
    args = train.Args(hidden=32, updates=8, **SETTINGS[setting])
    model, learner = (f(args, spec, data) for f in (train.make_world_model, train.make_learner))
    batch = data.gather(data.train[:32])
    real = (torch.arange(32, device=device) % 2).float()
    critic, actor = learner.critic, learner.actor
    losses = {
        "model": (model.loss(batch)[0], model),
        "policy": (macql.policy_loss(actor, critic, batch, real, 0.5)[0], actor),
    }
    noise = macql.action_noise(batch.actions.shape, torch.Generator().manual_seed(0)).to(device)
    loss = macql.critic_loss(critic, critic, actor, batch, real, 0.99, 0.1, noise)[0]
    found = {}
    for name, (total, net) in (losses | {"critic": (loss, critic)}).items():
        grads = torch.autograd.grad(total, list(net.parameters()), allow_unused=True)
        found[name] = total.detach().cpu()
        found[f"{name}'s gradient"] = torch.cat([g.flatten().cpu() for g in grads if g is not None])
    return found


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_losses_and_gradients_are_those_of_a_cpu(setting, discrete):
    here, there = (losses_and_gradients(setting, discrete, x) for x in ("cpu", "cuda"))
    for name, value in here.items():
        assert (value - there[name]).norm() <= 1e-4 * value.norm() + 1e-6, name


def run(path, folder, *flags) -> dict:
    """A miniature run, on the GPU unless told otherwise."""
    given = ["--dataset", str(path), "--out", str(folder), "--device", "cuda", *flags]
    return train.cli([*TINY, *given])


def checkpoint(folder) -> dict:
    return torch.load(folder / "checkpoint.pt", "cpu", weights_only=True)


def test_a_run_repeats(dataset, tmp_path):
    first, again = run(dataset, tmp_path / "a"), run(dataset, tmp_path / "b")
    assert first["device"].startswith("cuda")
    assert first["eval"] == again["eval"] and first["world_model"] == again["world_model"]
    a, b = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    torch.testing.assert_close(a["learner"]["actor"], b["learner"]["actor"], rtol=0, atol=0)
    torch.testing.assert_close(a["world_model"], b["world_model"], rtol=0, atol=0)


def test_a_killed_run_goes_on_the_same(dataset, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    monkeypatch.setattr(tracking, "CHECKPOINT_SHARE", math.inf)  # after every update
    whole, descend, left = run(dataset, tmp_path / "whole"), macql.descend, [14]

    def dying(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        descend(*arguments)

    for module in (train, macql):
        monkeypatch.setattr(module, "descend", dying)
    with pytest.raises(Killed):
        run(dataset, tmp_path / "killed")
    for module in (train, macql):
        monkeypatch.setattr(module, "descend", descend)
    resumed = run(dataset, tmp_path / "killed", "--resume")
    assert resumed["eval"] == whole["eval"] and resumed["world_model"] == whole["world_model"]


def test_a_compiled_run_ends(dataset, tmp_path):
    final = run(dataset, tmp_path / "run", "--compile")
    assert all(math.isfinite(v) for v in final["world_model"].values() if isinstance(v, float))


@pytest.mark.parametrize("discrete", [True, False])
def test_compiled_and_eager_training_are_equal(discrete):
    """CUDA graphs and all, to rounding."""
    (_, noted), (_, plain) = (trained(discrete, x, 5, "cuda") for x in ("inductor", None))
    torch.testing.assert_close(torch.stack(noted), torch.stack(plain), rtol=1e-2, atol=1e-3)
