"""The world models that predict s' directly and that carry a latent state: direct.py, mamba.py."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import TINY
from test_equations import array, perceptron
from test_sync import Reads, make_data

import envs
from baselines import direct, mamba, run
from baselines.joint import JointRows, small_world
from buffer import OfflineDataset
from macql import descend

FILES = {"direct": direct, "mamba": mamba}
discrete_or_not = pytest.mark.parametrize("discrete", [True, False])
each = pytest.mark.parametrize("name", FILES)


def make_model(name: str, discrete: bool = True, **flags) -> tuple:
    """(world model, dataset) of random recordings."""
    torch.manual_seed(0)
    data, spec = make_data(discrete)
    args = FILES[name].Args(hidden=16, **flags)
    return FILES[name].make_world_model(args, spec, data), data


def small_mamba(discrete: bool = True, **flags) -> tuple:
    sizes = {"wm_hidden": 16, "latents": 3, "classes": 4, "window": 3} | flags
    return make_model("mamba", discrete, **sizes)


def random_policy(obs, avail, generator):
    """The first actions (B,N,3) of some order, one-hot."""
    choice = torch.rand(*obs.shape[:2], 3, generator=generator).argmax(-1, keepdim=True)
    return torch.zeros(*obs.shape[:2], 3).scatter(-1, choice, 1.0)


# --------------------------------------------------------------------------------- DirectWM's loss


def cross_entropy(logit: float, truth: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -math.log(p if truth else 1 - p)


class NaiveDirect:
    """The loss of one row after another, in float64, entry by entry."""

    def __init__(self, model, batch, zeros: bool, heads: bool):
        self.m, self.rows, self.batch = model, model.rows, batch
        self.zeros, self.heads = zeros, heads

    def standard(self, name: str, x):
        mean, std = (array(getattr(self.rows, f"{name}_{k}")) for k in ("mean", "std"))
        return (array(x) - mean) / std

    def entries(self, name, out, now, truth):
        """Loss of all entries of a vector, and what a rollout shows of it; both of one row."""
        mean, std = (array(getattr(self.rows, f"{name}_{k}")) for k in ("mean", "std"))
        sometimes = array(getattr(self.rows, f"{name}_sometimes_zero"))
        size, total, shown = len(now.flat), 0.0, []
        mean, std, sometimes = (x.flatten() for x in (mean, std, sometimes))
        for k in range(size):
            guess = now.flat[k] + out[k]
            error = 0.5 * ((truth.flat[k] - mean[k]) / std[k] - guess) ** 2
            value = guess * std[k] + mean[k]
            if self.zeros and sometimes[k]:
                nonzero = float(truth.flat[k] != 0)
                total += cross_entropy(out[size + k], nonzero) + nonzero * error
                value = value if out[size + k] > 0 else 0.0
            else:
                total += error
            shown.append((value - mean[k]) / std[k])
        return total, np.array(shown)

    def row(self, b: int) -> float:
        m, x = self.m, self.batch
        o, s = self.standard("obs", x.obs[b]), self.standard("state", x.state[b])
        a, r = array(x.actions[b]), float(self.standard("reward", x.reward[b]))
        last = float(x.terminated[b])
        h_s = np.maximum(perceptron(m.enc_state, s), 0.0)
        h_o = [
            np.maximum(perceptron(m.enc_obs, np.concatenate([o[i], a[i]]), i), 0.0)
            for i in range(len(o))
        ]
        of_state = perceptron(m.direct, np.concatenate([h_s, *h_o]))
        total, s_seen = self.entries("state", of_state[:-1], s, array(x.next_state[b]))
        outs = [perceptron(m.enc_p, np.concatenate([h_s, h_o[i]]), i) for i in range(len(o))]
        size = o.shape[1]
        joint = np.concatenate([*(out[:size] for out in outs), *(out[size:] for out in outs)])
        error, o_seen = self.entries("obs", joint, o, array(x.next_obs[b]))
        total += error + 0.5 * (r - of_state[-1]) ** 2 * (1 - last if self.heads else 1)
        is_end, last_r = perceptron(self.rows.end_head, s_seen)
        heads = cross_entropy(is_end, last) + 0.5 * last * (r - last_r) ** 2
        if x.next_avail is not None:
            avail, o_seen = array(x.next_avail[b]), o_seen.reshape(o.shape)
            logits = [perceptron(self.rows.avail_head, o_seen[i], i) for i in range(len(o))]
            pairs = zip(np.array(logits).flat, avail.flat, strict=True)
            heads += sum(cross_entropy(*pair) for pair in pairs) / avail.size
        return total / (len(s) + o.size + 1) + heads


@discrete_or_not
@pytest.mark.parametrize(("zeros", "heads"), [(True, True), (False, False)])
def test_the_direct_loss_is_its_formula(discrete, zeros, heads):
    model, data = make_model("direct", discrete, zeros=zeros, heads=heads)
    model = model.double()
    batch = data.gather(torch.tensor([0, 3, 9, 14, 20]))  # the third is the end of its episode
    batch = type(batch)(*(None if x is None else x.double() for x in batch))
    assert batch.terminated.tolist() == [0, 0, 1, 0, 1]
    naive = NaiveDirect(model, batch, zeros, heads)
    expected = np.mean([naive.row(b) for b in range(5)])
    assert model.loss(batch)[0].item() == pytest.approx(expected, rel=1e-9)


# ------------------------------------------------------------------------------------- MAMBA's loss


def test_the_kl_is_balanced():
    """Its value is the KL, its gradient goes to the prior by 0.8 and to the posterior by 0.2."""
    torch.manual_seed(0)
    prior, posterior = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    logits = [x.detach().clone().requires_grad_() for x in (prior, posterior)]
    loss = mamba.kl_loss(*logits)
    expected = 0.0
    for b, k in itertools.product(range(4), range(3)):
        p, q = (np.exp(array(x[b, k])) / np.exp(array(x[b, k])).sum() for x in (posterior, prior))
        expected += sum(p * np.log(p / q)) / 12
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    q, p = (x.detach().clone().requires_grad_() for x in logits)
    whole = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    whole.backward()
    loss.backward()
    torch.testing.assert_close(logits[0].grad, 0.8 * q.grad)
    torch.testing.assert_close(logits[1].grad, 0.2 * p.grad)


def test_draws_have_their_probabilities():
    model, _ = small_mamba()
    logits = torch.randn(12).requires_grad_()
    z = model.draw(logits.expand(20_000, 12), torch.Generator().manual_seed(0))
    p = logits.detach().view(3, 4).softmax(-1)
    assert torch.equal(z.detach().round(), z.detach().round().clamp(0, 1))
    torch.testing.assert_close(z.view(-1, 3, 4).sum(-1), torch.ones(20_000, 3))
    torch.testing.assert_close(z.detach().mean(0).view(3, 4), p, atol=0.015, rtol=0)
    torch.testing.assert_close(model.draw(logits, None).view(3, 4), p)
    weight = torch.randn(12)
    gradient = [
        torch.autograd.grad((weight * x).sum(), logits)[0] for x in (z[0], model.draw(logits, None))
    ]
    torch.testing.assert_close(*gradient)  # straight through


@pytest.mark.parametrize("term", ["nll_obs", "nll_state", "reward", "kl", "heads"])
def test_which_networks_a_term_trains(term):
    """The heads of joint.py read the latent state and do not shape it."""
    model, data = small_mamba()
    noted, original = {}, sum
    batch = data.sample(12, torch.Generator().manual_seed(0))
    mamba.sum = lambda parts: noted.update(zip(names, parts, strict=True)) or original(parts)
    names = ("nll_obs", "nll_state", "reward", "kl", "heads")
    try:
        model.loss(batch)
    finally:
        del mamba.sum
    mamba_wide = {"embed", "enter", "attention", "cell", "posterior"}
    own = {"nll_obs": {"dec_obs"}, "nll_state": {"dec_state"}, "reward": {"reward"}}
    expected = mamba_wide | own.get(term, {"prior"}) if term != "heads" else {"rows"}
    noted[term].backward()
    trained = {
        name for name, part in model.named_children()
        if any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    }  # fmt: skip
    assert trained == expected


# ------------------------------------------------------------------------------------------ windows


def numbered(lengths: list[int]) -> tuple[OfflineDataset, envs.Spec]:
    """A dataset whose states are (episode, step)."""
    state = torch.tensor([[e, t] for e, n in enumerate(lengths) for t in range(n + 1)]).float()
    rows = len(state)
    obs, actions = torch.randn(rows, 2, 3), torch.rand(rows, 2, 1)
    data = OfflineDataset(obs, state, actions, None, state[:, 1], torch.zeros(rows), lengths)
    return data, envs.Spec("none", "offline", 2, 3, 2, 1, False, max(lengths))


def test_a_window_never_crosses_the_end_of_an_episode():
    lengths = [9, 5, 3, 4, 7, 5, 12, 1, 6, 5]
    data, spec = numbered(lengths)
    model = mamba.MAMBA(JointRows(spec, data, 8), data, 8, 2, 2, window=5)
    rows = model.draw_windows(5 * 4_000, torch.Generator().manual_seed(0))
    assert rows.shape == (5, 4_000)
    episode, step = data.state[rows].unbind(-1)
    assert (episode == episode[0]).all() and (step.diff(dim=0) == 1).all()
    assert (step < torch.tensor(lengths)[episode.long()]).all()  # none is a final observation
    held_out = set(data.state[data.held_out, 0].int().tolist())
    long = {e for e, n in enumerate(lengths) if n >= 5} - held_out
    assert set(episode.flatten().int().tolist()) == long
    with pytest.raises(ValueError, match="--window 13"):
        mamba.window_starts(data, 13)


def test_ends_are_drawn_as_often_as_other_steps():
    lengths = [9, 7, 12, 6]
    data, _ = numbered(lengths)
    rows = mamba.window_starts(data, 4).unsqueeze(1) + torch.arange(4)
    times = torch.bincount(rows.flatten(), minlength=len(data.state))[data.train]
    episode, step = data.state[data.train].long().unbind(-1)
    assert (times[step == torch.tensor(lengths)[episode] - 1] == 4).all()
    assert times[step >= 3].min() == 4 and times.min() == 1


def test_a_resumed_model_draws_the_same():
    model, data = small_mamba(seed=3)
    batch = data.sample(12, torch.Generator().manual_seed(0))
    losses = [model.loss(batch)[0].item() for _ in range(3)]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    resumed, _ = small_mamba(seed=3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    later = [[m.loss(batch)[0].item() for _ in range(2)] for m in (model, resumed)]
    assert later[0] == later[1] and len({*losses, *later[0]}) == 5
    again, _ = small_mamba(seed=3)
    other, _ = small_mamba(seed=4)
    assert again.loss(batch)[0].item() == losses[0] != other.loss(batch)[0].item()


# ----------------------------------------------------------------------------------------- rollouts


@each
@discrete_or_not
def test_one_imagined_step_is_a_step(name, discrete, monkeypatch):
    model, data = make_model(name, discrete)
    if name == "mamba":  # apart from the draws
        draw = model.draw
        monkeypatch.setattr(model, "draw", lambda logits, generator: draw(logits, None))
    starts = data.sample(40, torch.Generator().manual_seed(0))
    out = model.step(starts.obs, starts.state, starts.actions)
    g = torch.Generator().manual_seed(0)
    rollout = model.imagine(lambda *_: starts.actions, starts, 1, g)
    for key in ("obs", "state"):
        clamped = model.rows.clamp_to_data(key, out[f"next_{key}"])
        torch.testing.assert_close(rollout[key][1], clamped)
    done = rollout["terminated"][0]
    reward = torch.where(done > 0, out["last_reward"], out["continuing_reward"])
    torch.testing.assert_close(rollout["reward"][0], model.rows.clamp_to_data("reward", reward))
    assert (rollout["uncertainty"] == 0).all() and (out["uncertainty"] == 0).all()
    if discrete:
        torch.testing.assert_close(rollout["avail"][1], out["next_avail"])


def test_a_rollout_carries_the_latent_state():
    """What is decoded of it, and clamped, is not read again."""
    model, data = small_mamba()
    starts = data.sample(10, torch.Generator().manual_seed(0))
    rollout = model.imagine(random_policy, starts, 3, torch.Generator().manual_seed(1))
    model.rows.obs_min.fill_(0.0)
    model.rows.obs_max.fill_(0.0)  # every decoded observation is 0
    again = model.imagine(random_policy, starts, 3, torch.Generator().manual_seed(1))
    assert not torch.equal(again["obs"], rollout["obs"])
    assert torch.equal(again["state"], rollout["state"])
    other = model.imagine(random_policy, starts, 3, torch.Generator().manual_seed(2))
    assert not torch.equal(other["state"][1], rollout["state"][1])


def test_windows_steps_and_rollouts_begin_alike(monkeypatch):
    """With what the network makes of zeros, where agents differ by their position alone."""
    model, data = small_mamba()
    begun, observe, g = [], model.observe, torch.Generator().manual_seed(0)
    starts = data.sample(12, g)
    uses = (
        lambda: model.loss(starts),
        lambda: model.step(starts.obs, starts.state, starts.actions),
        lambda: model.imagine(random_policy, starts, 2, g),
    )
    for use in uses:
        noted = []
        monkeypatch.setattr(model, "observe", lambda h, *x, n=noted: n.append(h) or observe(h, *x))
        use()
        begun.append(noted[0])
    zeros = torch.zeros(1, 2, 16), torch.zeros(1, 2, 12), torch.zeros(1, 2, 3)
    for h in begun:
        torch.testing.assert_close(h, model.advance(*zeros).expand_as(h))
    assert not torch.equal(h[:, 0], h[:, 1])


@each
def test_no_value_is_read(name):
    model, data = make_model(name)
    rng = torch.Generator().manual_seed(0)
    with Reads() as reads:
        loss, metrics = model.loss(data.sample(24, rng))
        rollout = model.imagine(random_policy, data.sample(8, rng), 3, rng)
    assert reads.seen == []
    assert all(x.isfinite().all() for x in (loss, *metrics.values(), *rollout.values()))


# --------------------------------------------------------------------------------------------- runs


@each
def test_a_small_run_ends_with_finite_numbers(name, dataset, tmp_path):
    at = TINY.index("--u-scale")
    flags = [*TINY[:at], *TINY[at + 2 :], "--dataset", str(dataset), "--out", str(tmp_path / "run")]
    parts = {"world_model": FILES[name].make_world_model, "self_check": None}
    final = run(name, FILES[name].Args, argv=flags, **parts)
    assert final["method"] == name and 0 <= final["eval"]["return_mean"] <= 20
    measured = [final["world_model"][f"{x}_mse"] for x in ("obs", "state", "reward")]
    assert all(math.isfinite(x) and x > 0 for x in measured)
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]
    assert {"wm,4,heads"} <= {row.rsplit(",", 1)[0] for row in rows}
    assert all(math.isfinite(float(row.rsplit(",", 1)[1])) for row in rows)


@each
@pytest.mark.parametrize("flag", ["--u-scale 5", "--uncertainty weight", "--paper"])
def test_flags_without_an_effect_are_refused(name, flag):
    with pytest.raises(SystemExit, match=f"is not for {name}"):
        run(name, FILES[name].Args, None, argv=flag.split())


def test_a_width_that_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="--wm-hidden is 12"):
        small_mamba(wm_hidden=12)


def test_the_self_check_of_direct_passes():
    direct._self_check()


def test_mamba_learns_the_small_world():
    """Its self-check in short, on fewer rows: better than "nothing changes", not ten times yet."""
    torch.manual_seed(0)
    data, spec = small_world()
    model, g = mamba.MAMBA(JointRows(spec, data, 32), data, 64, window=2), torch.Generator()
    optimizer, test = torch.optim.Adam(model.parameters(), lr=3e-3), data.gather(data.held_out)
    for k in range(160):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - k / 160)
        descend(optimizer, model.loss(data.sample(64, g))[0])
    out = model.step(test.obs, test.state, test.actions)
    error = (out["mean_state"] - test.next_state).square().mean()
    assert error < 0.7 * (test.state - test.next_state).square().mean()
