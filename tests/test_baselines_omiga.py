"""OMIGA: its losses against loops over rows and agents, what it may choose, a run in miniature."""

import copy
import csv
import math

import numpy as np
import pytest
import torch
from conftest import TINY
from test_sync import Reads, make_data
from torch.nn import functional as F

from baselines import omiga, run
from buffer import Batch
from macql import Actor

B, N, O, S, A, HIDDEN = 5, 3, 4, 6, 3, 7  # noqa: E741
GAMMA, ALPHA, Z_CLIP = 0.9, 0.05, 2.0  # so that some z are clipped, and some are not
either = pytest.mark.parametrize("discrete", [True, False])


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_batch(discrete: bool) -> Batch:
    avail = (torch.rand(2, B, N, A) < 0.6).to(torch.get_default_dtype())
    avail[0, 0, 0] = torch.tensor([0.0, 0.0, 1.0])  # somebody with a single action left
    avail[avail.sum(-1) == 0] = 1.0
    choice = torch.multinomial(avail[0].flatten(0, 1), 1).view(B, N)
    torques = torch.rand(B, N, A) * 2 - 1
    return Batch(
        obs=torch.randn(B, N, O), state=torch.randn(B, S),
        actions=F.one_hot(choice, A).to(torques) if discrete else torques,
        avail=avail[0] if discrete else None, reward=torch.randn(B),
        next_obs=torch.randn(B, N, O), next_state=torch.randn(B, S),
        next_avail=avail[1] if discrete else None,
        terminated=torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]).to(torques),
        steps=torch.tensor([1.0, 1.0, 5.0, 2.0, 3.0]).to(torques),
    )  # fmt: skip


def make_networks(discrete: bool) -> tuple[Actor, omiga.Values, omiga.Values]:
    """The policies, the values, and other values as their target."""
    obs, state = (torch.randn(N, O), 0.5 + torch.rand(N, O)), (torch.randn(S), 0.5 + torch.rand(S))
    actor = Actor(*obs, A, HIDDEN, discrete)
    values, target = (omiga.Values(*obs, *state, A, HIDDEN, discrete, 5) for _ in range(2))
    return actor, values, target


def make_learner(discrete: bool, **flags) -> tuple[omiga.OMIGA, Batch]:
    torch.manual_seed(0)
    data, spec = make_data(discrete)
    learner = omiga.make_learner(omiga.Args(hidden=8, updates=8, **flags), spec, data)
    return learner, data.sample(16, torch.Generator().manual_seed(0))


# -------------------------------------------------------------- the losses, one row at a time


def through(net, x: np.ndarray) -> np.ndarray:
    for k, layer in enumerate(net[::2]):
        x = x @ layer.weight[0].detach().numpy() + layer.bias[0, 0].detach().numpy()
        x = np.maximum(x, 0) if 2 * k < len(net) - 1 else x
    return x


def scaled(module, x: torch.Tensor, i=slice(None)) -> np.ndarray:
    return ((x - module.mean[i]) / module.std[i]).numpy()


def q_of(values, obs, actions, b, i) -> float:
    x = [scaled(values.standardise_obs, obs[b, i], i), np.eye(N)[i]]
    if values.discrete:
        return through(values.q_net, np.concatenate(x))[actions[b, i].argmax()]
    return through(values.q_net, np.concatenate([*x, actions[b, i].numpy()]))[0]


def v_of(values, obs, b, i) -> float:
    x = [scaled(values.standardise_obs, obs[b, i], i), np.eye(N)[i]]
    return through(values.v_net, np.concatenate(x))[0]


def mixer_of(values, state, b) -> tuple[np.ndarray, float]:
    out = through(values.mixer, scaled(values.standardise_state, state[b]))
    return np.abs(out[:N]), out[N]


def z_of(values, target, batch) -> np.ndarray:
    z = np.zeros((B, N))
    for b in range(B):
        w, _ = mixer_of(target, batch.state, b)
        for i in range(N):
            q, v = q_of(target, batch.obs, batch.actions, b, i), v_of(values, batch.obs, b, i)
            z[b, i] = min(max(w[i] * (q - v) / ALPHA, -Z_CLIP), Z_CLIP)
    return z


@either
def test_q_loss_is_the_published_one(discrete, float64):
    torch.manual_seed(0)
    (_, values, target), batch = make_networks(discrete), make_batch(discrete)
    expected = 0.0
    for b in range(B):
        w, bias = mixer_of(values, batch.state, b)
        q = bias + sum(w[i] * q_of(values, batch.obs, batch.actions, b, i) for i in range(N))
        w, bias = mixer_of(target, batch.next_state, b)
        v_next = bias + sum(w[i] * v_of(target, batch.next_obs, b, i) for i in range(N))
        discount = GAMMA ** int(batch.steps[b]) * (1 - batch.terminated[b].item())
        y = batch.reward[b].item() + discount * v_next
        expected += (q - y) ** 2 / B
    loss, parts = omiga.q_loss(values, target, batch, GAMMA)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert parts["q_td"].item() == loss.item() and not parts["q_td"].requires_grad


@either
@pytest.mark.parametrize("shift", [0.0, 9.0])  # 9: every z is clipped below -1
def test_v_loss_is_the_published_one(discrete, shift, float64):
    torch.manual_seed(0)
    (_, values, target), batch = make_networks(discrete), make_batch(discrete)
    with torch.no_grad():
        values.v_net[-1].bias += shift
    expected = z_of(values, target, batch)
    found = omiga.advantages(values, target, batch, ALPHA, Z_CLIP)
    np.testing.assert_allclose(found[0].detach().numpy(), expected, rtol=1e-9)
    clipped = np.abs(expected) == Z_CLIP
    assert clipped.any() and (shift or not clipped.all())
    m, total = max(expected.max(), -1.0), 0.0
    for b in range(B):
        w, _ = mixer_of(target, batch.state, b)
        for i in range(N):
            linear = w[i] * v_of(values, batch.obs, b, i) / ALPHA
            total += (math.exp(expected[b, i]) + linear) / math.exp(m) / (B * N)
    assert omiga.v_loss(*found, ALPHA)[0].item() == pytest.approx(total, rel=1e-10)


@either
def test_policy_loss_is_the_published_one(discrete, float64):
    torch.manual_seed(0)
    (actor, values, target), batch = make_networks(discrete), make_batch(discrete)
    z, total = z_of(values, target, batch), 0.0
    for b in range(B):
        for i in range(N):
            x = [scaled(actor.standardise, batch.obs[b, i], i), np.eye(N)[i]]
            out, a = through(actor.net, np.concatenate(x)), batch.actions[b, i].numpy()
            if discrete:
                shares = [math.exp(out[k]) * batch.avail[b, i, k].item() for k in range(A)]
                distance = -math.log(shares[a.argmax()] / sum(shares))
            else:
                distance = sum((math.tanh(out[k]) - a[k]) ** 2 for k in range(A))
            total += math.exp(z[b, i]) * distance / (B * N)
    loss, parts = omiga.policy_loss(actor, batch, torch.as_tensor(z).exp())
    assert loss.item() == pytest.approx(total, rel=1e-9)
    assert parts["pi_weight"].item() == pytest.approx(np.exp(z).mean())


@either
def test_a_step_on_the_sum_is_a_step_on_each_loss(discrete, float64):
    torch.manual_seed(0)
    (actor, values, target), batch = make_networks(discrete), make_batch(discrete)
    z, w, v = omiga.advantages(values, target, batch, ALPHA, Z_CLIP)
    alone = [
        omiga.q_loss(values, target, batch, GAMMA)[0], omiga.v_loss(z, w, v, ALPHA)[0],
        omiga.policy_loss(actor, batch, z.detach().exp())[0],
    ]  # fmt: skip
    total, metrics = omiga.losses(values, target, actor, batch, GAMMA, ALPHA, Z_CLIP)
    assert all(x.shape == () and not x.requires_grad for x in metrics.values())
    nets = (torch.nn.ModuleList([values.q_net, values.mixer]), values.v_net, actor)
    for loss, net in zip(alone, nets, strict=True):
        moved = list(net.parameters())
        pairs = (torch.autograd.grad(x, moved, retain_graph=True) for x in (loss, total))
        torch.testing.assert_close(*pairs)
    total.backward()
    assert all(p.grad is None for p in target.parameters())


# ------------------------------------------------------------------------------- the learner


def test_masked_actions_are_never_chosen():
    learner, batch = make_learner(True, lr=0.05)
    allowed = torch.ones_like(batch.avail)
    allowed[..., 1] = 0
    taken = batch.actions[..., [0, 2, 1]] * allowed  # nobody has taken action 1
    taken[..., 0] += 1 - taken.sum(-1)
    batch = batch._replace(avail=allowed, actions=taken)
    with torch.no_grad():  # the policies would rather take it
        learner.actor.net[-1].bias[..., 1] += 50
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        metrics = learner.update(batch, torch.ones(16), g)
    assert all(value.isfinite() for value in metrics.values())
    for actor in (learner.actor, learner.ema_actor):
        for chosen in (actor(batch.obs, allowed), actor.greedy(batch.obs, allowed)):
            assert chosen[..., 1].abs().max() == 0
        assert actor.sample(batch.obs, allowed, g)[..., 1].max() == 0


@either
def test_an_update_waits_for_no_number_and_resumes(discrete):
    learner, batch = make_learner(discrete, tau=0.5)
    again, before = make_learner(discrete, tau=0.5)[0], copy.deepcopy(learner.target.state_dict())
    for _ in range(2):
        learner.update(batch, None, None)
    again.load_state_dict(copy.deepcopy(learner.state_dict()))
    with Reads() as reads:
        learner.update(batch, None, None)
    assert not reads.seen
    again.update(batch, None, None)
    torch.testing.assert_close(again.state_dict(), learner.state_dict(), rtol=0, atol=0)
    changed = [k for k, x in learner.target.state_dict().items() if not x.equal(before[k])]
    assert {name.split(".")[0] for name in changed} == {"q_net", "v_net", "mixer"}


def test_gradients_are_cut_network_by_network():
    norms = []
    for clip in (1e30, 1e-5):
        learner, batch = make_learner(True, grad_clip=clip)
        learner.update(batch._replace(reward=batch.reward + 100), None, None)
        norms.append([])
        for group in learner.optimizer.param_groups:
            grads = torch.cat([p.grad.flatten() for p in group["params"]])
            norms[-1].append(grads.norm().item())
    assert len(norms[0]) == 3 and min(norms[0]) > 2e-5
    assert norms[1] == pytest.approx([1e-5] * 3, rel=0.1)


def test_the_self_check_passes(capsys):
    run("omiga", omiga.Args, omiga._self_check, ["--self-check"])
    assert "known 0.711" in capsys.readouterr().out


# --------------------------------------------------------------------------------- whole runs


def go(*flags: str):
    given = [*TINY, *flags]
    return run("omiga", omiga.Args, omiga._self_check, given, learner=omiga.make_learner)


def test_a_run_ends_with_finite_metrics(dataset, tmp_path):
    final = go("--dataset", str(dataset), "--out", str(tmp_path / "run"))
    assert final["method"] == "omiga" and 0 <= final["eval"]["return_mean"] <= 20
    assert math.isfinite(final["offline"]["value_policy"])
    with open(tmp_path / "run" / "metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert all(math.isfinite(float(row["value"])) for row in rows)
    found = {row["metric"] for row in rows if row["phase"] == "policy"}
    assert found == {
        "q_td", "q_data", "v_loss", "v_mean", "pi_loss", "pi_weight", "pi_share",
    }  # fmt: skip


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--cql-alpha 1", "--cql-alpha is not for omiga"),
        ("--critics 3", "--critics is not for omiga"),
        ("--bc-lambda 9", "--bc-lambda is not for omiga"),
        ("--paper", "--paper is not for omiga"),
    ],
)
def test_flags_of_other_methods_are_refused(flags, told):
    with pytest.raises(SystemExit, match=told):
        go(*flags.split())


def test_alpha_zero_is_refused():
    with pytest.raises(ValueError, match="--alpha is 0"):
        make_learner(True, alpha=0.0)
