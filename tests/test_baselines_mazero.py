"""MAZero's world model: its loss against a loop over windows, steps, agents and heads."""

import io
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import TINY
from test_equations import array
from test_sync import Reads, make_data

from baselines import mazero, run
from macql import descend

discrete_or_not = pytest.mark.parametrize("discrete", [True, False])


def small(discrete: bool = True, **flags) -> tuple:
    """(world model, dataset) of random recordings of two agents, with an untrained reward."""
    torch.manual_seed(0)
    data, spec = make_data(discrete)
    args = mazero.Args(**{"hidden": 16, "wm_hidden": 16, "attention": 2, "window": 3} | flags)
    model = mazero.make_world_model(args, spec, data)
    nn.init.normal_(model.reward[-1].weight)  # it starts at 0, with which no h has a gradient
    return model, data


def in_double(model, data):
    """Both in float64, in place: the model keeps the dataset."""
    for name in ("obs", "state", "actions", "avail", "reward", "terminated"):
        x = getattr(data, name)
        setattr(data, name, x if x is None else x.double())
    return model.double()


def random_policy(obs, avail, generator):
    choice = torch.rand(*obs.shape[:2], 3, generator=generator).argmax(-1, keepdim=True)
    return torch.zeros(*obs.shape[:2], 3, dtype=obs.dtype).scatter(-1, choice, 1.0)


# --------------------------------------------------------------------------------- a loop, float64


def norm(layer, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean()
    scale = math.sqrt((centred**2).mean() + layer.eps)
    return array(layer.weight) * centred / scale + array(layer.bias)


def through(net, x: np.ndarray) -> np.ndarray:
    """One vector through a sequence of layers."""
    for layer in net:
        if isinstance(layer, nn.Linear):
            x = array(layer.weight) @ x + array(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            x = norm(layer, x)
        else:
            assert isinstance(layer, nn.ReLU)
            x = np.maximum(x, 0.0)
    return x


def attended(layer, xs: list[np.ndarray]) -> list[np.ndarray]:
    """A layer of attention: each agent looks at all agents with each of eight heads."""
    weight, bias = array(layer.self_attn.in_proj_weight), array(layer.self_attn.in_proj_bias)
    q, k, v = (
        [w @ x + b for x in xs] for w, b in zip(np.split(weight, 3), np.split(bias, 3), strict=True)
    )
    result, size = [], len(xs[0]) // 8
    for i, x in enumerate(xs):
        seen = np.zeros_like(x)
        for head in range(8):
            part = slice(head * size, (head + 1) * size)
            scores = np.array([q[i][part] @ other[part] / math.sqrt(size) for other in k])
            share = np.exp(scores) / np.exp(scores).sum()
            for j, other in enumerate(v):
                seen[part] += share[j] * other[part]
        out = layer.self_attn.out_proj
        x = norm(layer.norm1, x + array(out.weight) @ seen + array(out.bias))
        wide = np.maximum(array(layer.linear1.weight) @ x + array(layer.linear1.bias), 0.0)
        wide = array(layer.linear2.weight) @ wide + array(layer.linear2.bias)
        result.append(norm(layer.norm2, x + wide))
    return result


def advanced(model, h: list, actions: list) -> list[np.ndarray]:
    """The next latent state of each agent."""
    width = len(h[0])
    angles = [[i / 10_000 ** (2 * (d // 2) / width) for d in range(width)] for i in range(len(h))]
    place = [[(math.cos if d % 2 else math.sin)(x) for d, x in enumerate(row)] for row in angles]
    both = [np.concatenate(pair) for pair in zip(h, actions, strict=True)]
    xs = [np.maximum(through(model.enter, x), 0.0) + place[i] for i, x in enumerate(both)]
    for layer in model.attention:
        xs = attended(layer, xs)
    moves = [through(model.dynamics, np.concatenate(x)) for x in zip(both, xs, strict=True)]
    return [x + move for x, move in zip(h, moves, strict=True)]


def naive_loss(model, data, windows: torch.Tensor, weight: float) -> float:
    """Reward, consistency and the decoders' Gaussians (no zeros, no heads)."""
    rows, total = model.rows, 0.0

    def standard(name, x):
        mean, std = (array(getattr(rows, f"{name}_{k}")) for k in ("mean", "std"))
        return (array(x) - mean) / std

    def represented(row):
        return [through(model.encoder, o) for o in standard("obs", data.obs[row])]

    def projected(h):
        return through(model.projector, np.concatenate(h))

    for window in windows.T.tolist():
        o, s = (standard(name, getattr(data, name)[window[0]]) for name in ("obs", "state"))
        first = h = represented(window[0])
        for row in window:
            actions = list(array(data.actions[row]))
            h = advanced(model, h, actions)
            joint = np.concatenate([x for pair in zip(h, actions, strict=True) for x in pair])
            r = standard("reward", data.reward[row]) - through(model.reward, joint)[0]
            total += 0.5 * r**2
            one, other = through(model.predictor, projected(h)), projected(represented(row + 1))
            total -= weight * one @ other / math.sqrt((one @ one) * (other @ other))
            both = [np.concatenate(pair) for pair in zip(first, h, strict=True)]
            for i, x in enumerate(both):
                truth = standard("obs", data.obs[row + 1])[i]
                error = truth - o[i] - through(model.dec_obs, x)
                total += 0.5 * error @ error / len(both)
            error = standard("state", data.state[row + 1]) - s
            error = error - through(model.dec_state, np.concatenate(both))
            total += 0.5 * error @ error
    return total / windows.numel()


@discrete_or_not
def test_the_loss_is_its_formula(discrete, monkeypatch):
    model, data = small(discrete, zeros=False, heads=False, consistency=1.7)
    model, noted = in_double(model, data), []
    draw = model.draw_windows
    monkeypatch.setattr(model, "draw_windows", lambda *x: noted.append(draw(*x)) or noted[-1])
    loss, metrics = model.loss(data.sample(9, torch.Generator().manual_seed(0)))
    assert noted[0].shape == (3, 3)
    expected = naive_loss(model, data, noted[0], 1.7)
    own = (loss - metrics["heads"]).item()
    assert own == pytest.approx(expected, rel=1e-7)  # the positions were rounded to float32


def test_the_last_reward_is_the_end_heads():
    model, data = small(heads=True)
    batch = data.sample(9, torch.Generator().manual_seed(0))
    data.terminated.fill_(1.0)  # every step is an episode's last one
    assert model.loss(batch)[1]["reward"] == 0


# ---------------------------------------------------------------------------------------- gradients


def test_half_of_the_gradient_goes_on(monkeypatch):
    """k steps back it is 2^-k of what it would be; the values are the same."""
    model, data = small()
    actions = data.actions[:4].unsqueeze(1)  # (K,1,N,A)
    first = model.represent(data.obs[:1]).detach().requires_grad_()
    found = []
    for how in (mazero.halved, lambda x: x):
        monkeypatch.setattr(mazero, "halved", how)
        h = model.unrolled(first, actions)
        weight = torch.linspace(-1, 1, h[0].numel()).view_as(h[0])
        grads = [torch.autograd.grad((weight * x).sum(), first, retain_graph=True) for x in h]
        found.append((h, torch.stack([g for (g,) in grads])))
    (h, half), (same, whole) = found
    torch.testing.assert_close(h, same)
    share = torch.tensor([1.0, 0.5, 0.25, 0.125]).view(4, 1, 1, 1)
    torch.testing.assert_close(half, share * whole, rtol=1e-4, atol=1e-6)


def test_what_is_represented_is_a_fixed_target():
    """The consistency trains what leads to h, the projector and the predictor."""
    model, data = small()
    h = torch.randn(5, 2, 16, requires_grad=True)
    model.consistency_loss(h, data.obs[:5]).sum().backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"projector", "predictor"} and h.grad.abs().sum() > 0


LATENT = {"encoder", "enter", "attention", "dynamics"}
TRAINED = {
    "nll_obs": LATENT | {"dec_obs"}, "nll_state": LATENT | {"dec_state"},
    "reward": LATENT | {"reward"}, "heads": {"rows"},
}  # fmt: skip


@pytest.mark.parametrize("term", TRAINED)
def test_which_networks_a_term_trains(term, monkeypatch):
    """The heads of joint.py read what was decoded and do not shape it."""
    model, data = small()
    noted, original = {}, sum

    def note(parts):
        noted.update(zip(TRAINED, parts, strict=True))
        return original(noted.values())

    monkeypatch.setattr(mazero, "sum", note, raising=False)
    model.loss(data.sample(12, torch.Generator().manual_seed(0)))
    noted[term].backward()
    trained = {
        name for name, part in model.named_children()
        if any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    }  # fmt: skip
    assert trained == TRAINED[term]


# ----------------------------------------------------------------------------- agents and windows


def test_only_their_position_tells_agents_apart():
    """Without it, agents in another order have the same latent states in that order."""
    model, data = small()
    obs = data.obs[:6].flip(1)
    h, actions = torch.randn(6, 2, 16), data.actions[:6]
    apart = model.advance(h.flip(1), actions.flip(1))
    assert not torch.allclose(apart, model.advance(h, actions).flip(1), atol=1e-4)
    model.attention.positions.zero_()
    for moment in ("mean", "std"):  # of observations: each agent has its own
        getattr(model.rows, f"obs_{moment}").fill_(1.0)
    apart = model.advance(h.flip(1), actions.flip(1))
    torch.testing.assert_close(apart, model.advance(h, actions).flip(1))
    torch.testing.assert_close(model.represent(obs), model.represent(data.obs[:6]).flip(1))


def test_a_window_is_within_an_episode():
    model, data = small()
    rows = model.draw_windows(3 * 500, torch.Generator().manual_seed(0))
    assert rows.shape == (3, 500) and (rows.diff(dim=0) == 1).all()
    assert (rows % 11 < 10).all()  # ten steps, then the final observation
    assert set(rows.flatten().tolist()) == set(data.train.tolist())
    with pytest.raises(ValueError, match="--window 11"):
        small(window=11)


def test_a_resumed_model_draws_the_same():
    model, data = small(seed=3)
    batch = data.sample(12, torch.Generator().manual_seed(0))
    losses = [model.loss(batch)[0].item() for _ in range(3)]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    resumed, _ = small(seed=3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    later = [[m.loss(batch)[0].item() for _ in range(2)] for m in (model, resumed)]
    assert later[0] == later[1] and len({*losses, *later[0]}) == 5
    assert small(seed=4)[0].loss(batch)[0].item() != losses[0]


# ----------------------------------------------------------------------------------------- rollouts


@discrete_or_not
def test_a_rollout_is_one_latent_step_after_another(discrete):
    """What was decoded, and clamped, is read again after the three steps of a window alone."""
    model, data = small(discrete)
    starts, horizon = data.sample(20, torch.Generator().manual_seed(0)), 5
    actions = torch.stack([data.actions[k : k + 20] for k in range(horizon)])
    played = iter(actions)
    g = torch.Generator().manual_seed(1)
    rollout = model.imagine(lambda *_: next(played), starts, horizon, g)
    for t in range(horizon):
        if t in (0, 3):
            start = rollout["obs"][t], rollout["state"][t]
            first = h = model.represent(start[0])
        h, out = model.follow(first, h, *start, actions[t])
        for key in ("obs", "state"):
            clamped = model.rows.clamp_to_data(key, out[f"next_{key}"])
            torch.testing.assert_close(rollout[key][t + 1], clamped)
        reward = torch.where(
            rollout["terminated"][t] > 0, out["last_reward"], out["continuing_reward"]
        )
        torch.testing.assert_close(rollout["reward"][t], model.rows.clamp_to_data("reward", reward))
        if discrete:
            torch.testing.assert_close(rollout["avail"][t + 1], out["next_avail"])
        if t == 0:
            step = model.step(starts.obs, starts.state, actions[0])
            torch.testing.assert_close(step, out)
        if t == 2:  # as in training
            torch.testing.assert_close(h, model.unrolled(first, actions[:3])[-1])
    assert (rollout["uncertainty"] == 0).all()


def test_no_value_is_read():
    model, data = small()
    rng = torch.Generator().manual_seed(0)
    with Reads() as reads:
        loss, metrics = model.loss(data.sample(24, rng))
        rollout = model.imagine(random_policy, data.sample(8, rng), 3, rng)
    assert reads.seen == []
    assert all(x.isfinite().all() for x in (loss, *metrics.values(), *rollout.values()))


# --------------------------------------------------------------------------------------------- runs


def test_a_small_run_ends_with_finite_numbers(dataset, tmp_path, undrawn):
    at = TINY.index("--u-scale")
    flags = [*TINY[:at], *TINY[at + 2 :], "--dataset", str(dataset), "--out", str(tmp_path / "run")]
    parts = {"world_model": mazero.make_world_model, "self_check": None}
    final = run("mazero", mazero.Args, argv=flags, **parts)
    assert final["method"] == "mazero" and 0 <= final["eval"]["return_mean"] <= 20
    measured = [final["world_model"][f"{x}_mse"] for x in ("obs", "state", "reward")]
    assert all(math.isfinite(x) and x > 0 for x in measured)
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]
    assert {"wm,4,consistency"} <= {row.rsplit(",", 1)[0] for row in rows}
    assert all(math.isfinite(float(row.rsplit(",", 1)[1])) for row in rows)


@pytest.mark.parametrize("flag", ["--u-scale 5", "--uncertainty weight", "--paper"])
def test_flags_without_an_effect_are_refused(flag):
    with pytest.raises(SystemExit, match="is not for mazero"):
        run("mazero", mazero.Args, None, argv=flag.split())


def test_a_width_that_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="--wm-hidden is 12"):
        small(wm_hidden=12)


def test_updates_lower_every_term():
    """On random recordings, which can only be learnt by heart."""
    model, data = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch, noted = data.sample(48, torch.Generator().manual_seed(0)), []
    for _ in range(24):
        loss, metrics = model.loss(batch)
        descend(optimizer, loss)
        noted.append(torch.stack(list(metrics.values())))
    noted = torch.stack(noted)
    assert (noted[-4:].mean(0) < noted[:4].mean(0)).all(), noted[[0, -1]]
