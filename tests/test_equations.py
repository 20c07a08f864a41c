"""Every equation of the paper that is code, against a naive float64 loop written from the paper.

Eq. (2)-(6) in logo_wm.py, Eq. (7) in buffer.py, Eq. (10)-(12) in macql.py. The loops take single
weight matrices out of the modules and multiply row by row and agent by agent in numpy, so they
check the batched per-agent layers, the standardisation and the shapes as well. What the paper asks
over all joint actions (log-sum-exp, maximum, expectation) is found by enumerating them.

The world model is checked with Gaussians alone (`zeros=False`, the paper) and with a probability of
exactly 0 for the entries that are often 0 in the data (`zeros=True`).
"""

import itertools
import math
import statistics
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import scipy.integrate
import torch
from torch.nn import functional as F

from buffer import Batch, SyntheticBuffer
from logo_wm import LogoWM, gaussian_nll
from macql import Actor, Critic, action_noise, critic_loss, data_and_all_values, policy_loss

B, N, O, S, A, HIDDEN = 5, 3, 4, 6, 3, 7  # noqa: E741
CLOSE = {"rel": 1e-10, "abs": 1e-10}
DEDUCE_FROM = ("obs", "obs+state", "obs+state+actions")
zeros_or_not = pytest.mark.parametrize("zeros", [True, False])
heads_or_not = pytest.mark.parametrize("heads", [True, False])
either_sight = pytest.mark.parametrize("observe", ["deduced", "predicted"])


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def make_statistics() -> dict[str, torch.Tensor]:
    result = {}
    for name, shape in {"obs": (N, O), "state": (S,), "reward": ()}.items():
        mean, std = torch.randn(shape), 0.5 + torch.rand(shape)
        result |= {f"{name}_mean": mean, f"{name}_std": std}
        result |= {f"{name}_min": mean - 0.5 * std, f"{name}_max": mean + 0.5 * std}
    result["obs_std"][1, 2] = 0.0  # columns that never vary are not blown up
    result["state_std"][3] = 0.0
    result["obs_zero"] = torch.tensor(  # 1 in 1000 and less: too rare, or too common, to predict
        [[0.0, 0.5, 2e-3, 0.9], [0.3, 5e-4, 0.0, 0.998], [1.0, 0.9995, 0.6, 0.0]]
    )
    result["state_zero"] = torch.tensor([0.4, 0.0, 2e-3, 1.0, 0.7, 5e-4])
    result["reward_zero"] = torch.tensor(0.5)
    return result


def make_batch(discrete: bool = True) -> Batch:
    avail = (torch.rand(2, B, N, A) < 0.6).double()
    avail[0, 0, 0] = torch.tensor([0.0, 0.0, 1.0])  # somebody with a single action left
    avail[1, 1, 1] = torch.tensor([0.0, 1.0, 0.0])
    avail[avail.sum(-1) == 0] = 1.0
    choice = torch.multinomial(avail[0].flatten(0, 1), 1).view(B, N)
    actions = F.one_hot(choice, A).double() if discrete else torch.rand(B, N, A) * 2 - 1
    return Batch(
        obs=torch.randn(B, N, O),
        state=torch.randn(B, S),
        actions=actions,
        avail=avail[0] if discrete else None,
        reward=torch.randn(B),
        next_obs=torch.randn(B, N, O),
        next_state=torch.randn(B, S),
        next_avail=avail[1] if discrete else None,
        terminated=torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]),
        steps=torch.tensor([1.0, 1.0, 5.0, 2.0, 3.0]),
    )


# ------------------------------------------------------------------ the networks, one row at a time


def array(x) -> np.ndarray:
    return x.detach().numpy().astype(np.float64)


def perceptron(net, x: np.ndarray, member: int | None = None) -> np.ndarray:
    """One input vector through one (member of a stacked) perceptron."""
    layers = [layer for layer in net if hasattr(layer, "weight")]
    for k, layer in enumerate(layers):
        if member is None:
            x = array(layer.weight) @ x + array(layer.bias)
        else:
            x = array(layer.weight[member]).T @ x + array(layer.bias[member, 0])
        if k < len(layers) - 1:
            x = np.maximum(x, 0.0)
    return x


def floored(std: np.ndarray) -> np.ndarray:
    return np.where(std == 0, 1.0, std)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class Guess(NamedTuple):
    """What is predicted of the observation of one agent, or of the state, in one row."""

    name: str
    agent: int | None
    value: np.ndarray  # means in standardised units, of what is not 0
    p: list[float | None]  # probabilities of not being 0; None: a Gaussian, as in the paper


class NaiveWorldModel:
    """The world model as the paper writes it: one row b, one agent i at a time."""

    def __init__(self, model: LogoWM, statistics: dict[str, torch.Tensor], batch):
        self.m, self.batch = model, batch
        self.stats, self.a = {k: array(v) for k, v in statistics.items()}, array(batch.actions)
        self.o, self.o_next = (self.standard("obs", array(x)) for x in (batch.obs, batch.next_obs))
        self.s = self.standard("state", array(batch.state))
        self.s_next = self.standard("state", array(batch.next_state))
        self.r = self.standard("reward", array(batch.reward))

    def moments(self, name: str, agent: int | None = None):
        """(mean, std, share of zeros); with `agent`, of this agent's columns."""
        found = [self.stats[f"{name}_{k}"] for k in ("mean", "std", "zero")]
        mean, std, zero = found if agent is None else [x[agent] for x in found]
        return mean, floored(std), zero

    def standard(self, name: str, x, agent: int | None = None):
        mean, std, _ = self.moments(name, agent)
        return (x - mean) / std

    def raw(self, name: str, x, agent: int | None = None):
        mean, std, _ = self.moments(name, agent)
        return x * std + mean

    # ------------------------------------------------- entries that may be exactly 0: Deviation D11

    def guess(self, name: str, agent: int | None, out: np.ndarray, now) -> Guess:
        """From a network's output: changes from `now`, then log-odds if entries may be 0."""
        share = self.moments(name, agent)[2]
        size = len(share)
        assert len(out) == (2 * size if self.m.zeros else size)
        p = [
            sigmoid(out[size + j]) if self.m.zeros and 1e-3 < share[j] < 1 - 1e-3 else None
            for j in range(size)
        ]
        return Guess(name, agent, now + out[:size], p)

    def mean(self, guess: Guess) -> np.ndarray:
        """Expected values, standardised."""
        zero = self.standard(guess.name, np.zeros(len(guess.p)), guess.agent)
        return np.array(
            [
                value if p is None else p * value + (1 - p) * zero[j]
                for j, (value, p) in enumerate(zip(guess.value, guess.p, strict=True))
            ]
        )

    def decide(self, guess: Guess) -> np.ndarray:
        """The likelier of 0 and the mean, raw."""
        value = self.raw(guess.name, guess.value, guess.agent)
        return np.array(
            [0.0 if p is not None and p < 0.5 else value[j] for j, p in enumerate(guess.p)]
        )

    def minus_log_likelihood(self, guess: Guess, b: int) -> float:
        """-log of the density at what was recorded after row b, Gaussians as minus_log_normal."""
        recorded = self.batch.next_obs if guess.name == "obs" else self.batch.next_state
        truth = array(recorded[b] if guess.agent is None else recorded[b, guess.agent])
        standard, total = self.standard(guess.name, truth, guess.agent), 0.0
        for j, p in enumerate(guess.p):
            if p is not None and truth[j] == 0:
                total += -math.log(1 - p)
                continue
            total += 0.0 if p is None else -math.log(p)
            total += minus_log_normal([standard[j]], [guess.value[j]])
        return total

    # ------------------------------------------------------------------------------- the networks

    def encode_p(self, b: int, i: int) -> Guess:
        """E_p: h_s from s, h_oi from (o^i, a^i), and o_hat^i from both."""
        h_s = np.maximum(perceptron(self.m.enc_state, self.s[b]), 0.0)
        x = np.concatenate([self.o[b, i], self.a[b, i]])
        h_o = np.maximum(perceptron(self.m.enc_obs, x, member=i), 0.0)
        out = perceptron(self.m.enc_p, np.concatenate([h_s, h_o]), member=i)
        return self.guess("obs", i, out, now=self.o[b, i])

    def encode_d(self, s: np.ndarray, r: float, i: int) -> Guess:
        """E_d: what agent i sees of a state, after a reward."""
        return self.guess("obs", i, perceptron(self.m.enc_d, np.append(s, r), member=i), now=0.0)

    def decode_d(self, b: int, joint: list[Guess]) -> tuple[Guess, float]:
        """R_d: (s', r') from all o_hat^i, and from what else this reading lets it see."""
        x = [self.mean(guess) for guess in joint]
        if self.m.deduce_from != "obs":
            x.append(self.s[b])
        if self.m.deduce_from == "obs+state+actions":
            x += list(self.a[b])
        *of_state, r = perceptron(self.m.dec_d, np.concatenate(x))
        now = 0.0 if self.m.deduce_from == "obs" else self.s[b]
        return self.guess("state", None, np.array(of_state), now), r

    def distance(self, b: int, deduced: tuple[Guess, float]) -> float:
        """|[s_next + r] - [s' + r']|^2; with D11, twice -log of the density in place of |.|^2."""
        s, r = deduced
        if self.m.zeros:
            of_state = 2 * self.minus_log_likelihood(s, b)
        else:
            of_state = squared_distance(self.s_next[b], s.value)
        has_own_reward = self.m.heads and self.batch.terminated[b] == 1  # of the head's
        return of_state + (0.0 if has_own_reward else (self.r[b] - r) ** 2)

    def encode_ps(self, b: int):
        x = np.concatenate([self.s[b], *self.o[b], *self.a[b]])
        mean = perceptron(self.m.enc_ps, x).copy()
        mean[:S] += self.s[b]
        return mean

    def s_and_r(self, b: int) -> np.ndarray:
        return np.append(self.s_next[b], self.r[b])

    def one_step(self, b: int) -> SimpleNamespace:
        """What a rollout consists of: s' decided, what the agents see of it, and the heads."""
        joint = [self.encode_p(b, i) for i in range(N)]
        state, r = self.decode_d(b, joint)
        next_state = self.decide(state)
        s_seen = self.standard("state", next_state)
        seen = joint
        if self.m.observe == "deduced":
            seen = [self.encode_d(s_seen, r, i) for i in range(N)]
        next_obs = [self.decide(guess) for guess in seen]
        logits = []
        for i in range(N if self.m.discrete else 0):
            o_seen = self.standard("obs", next_obs[i], i)
            logits.append(perceptron(self.m.avail_head, o_seen, member=i))
        end, last = perceptron(self.m.end_head, s_seen)
        return SimpleNamespace(
            state=state, r=r, seen=seen, next_state=next_state, next_obs=next_obs,
            avail_logits=logits, end_logit=end, last_r=last,
        )  # fmt: skip


def minus_log_normal(x, mean) -> float:
    """-log N(x; mean, 1), less log(2 pi)/2 per dimension, which has no gradient."""
    total = 0.0
    for x_j, mean_j in zip(x, mean, strict=True):
        density = math.exp(-((x_j - mean_j) ** 2) / 2) / math.sqrt(2 * math.pi)
        total += -math.log(density) - 0.5 * math.log(2 * math.pi)
    return total


def squared_distance(x, y) -> float:
    return sum((x_j - y_j) ** 2 for x_j, y_j in zip(x, y, strict=True))


def cross_entropy(logit, label) -> float:
    p = sigmoid(logit)
    return -math.log(p if label else 1 - p)


def build(deduce_from="obs+state+actions", discrete=True, **options):
    statistics, batch = make_statistics(), make_batch(discrete)
    for x in (batch.obs, batch.state, batch.next_obs, batch.next_state):
        x[torch.rand_like(x) < 0.4] = 0.0  # in every column, predicted to be 0 there or not
    batch.next_obs[:, 1, 2] = statistics["obs_mean"][1, 2] + 0.3  # the column with std 0
    model = LogoWM(
        N, O, S, A, hidden=HIDDEN, discrete=discrete, statistics=statistics,
        deduce_from=deduce_from, **options,
    )  # fmt: skip
    return model, batch, NaiveWorldModel(model, statistics, batch)


# ------------------------------------------------------------------------- Eq. (2)-(6), world model


def test_gaussian_nll_is_the_normal_density():
    x, mean = torch.randn(2, B, O).unbind(0)
    for b in range(B):
        assert gaussian_nll(x, mean)[b].item() == pytest.approx(
            minus_log_normal(x[b], mean[b]), **CLOSE
        )


def test_entries_that_are_sometimes_0_have_a_probability():
    model, batch, naive = build()
    for name, recorded in (("obs", batch.next_obs), ("state", batch.next_state)):
        share = naive.stats[f"{name}_zero"]
        expected = (share > 1e-3) & (share < 1 - 1e-3)
        found = getattr(model, f"{name}_sometimes_zero")
        assert np.array_equal(found, expected)
        is_zero = array(recorded) == 0  # the batch has all four kinds of entries
        for kind in (expected, ~expected):
            assert is_zero[:, kind].any() and not is_zero[:, kind].all()


@zeros_or_not
@pytest.mark.parametrize("discrete", [True, False])
def test_eq_2_equals_a_loop_over_rows_and_agents(discrete, zeros):
    model, batch, naive = build(discrete=discrete, zeros=zeros)
    expected = 0.0
    for b in range(B):
        for i in range(N):
            o_hat = naive.encode_p(b, i)
            encoder = naive.minus_log_likelihood(o_hat, b)
            o_and_a = np.concatenate([naive.o[b, i], naive.a[b, i]])
            recovered = perceptron(model.dec_p, naive.mean(o_hat), member=i)
            expected += (encoder + squared_distance(o_and_a, recovered)) / B
    assert model.loss(batch)[1]["L_p"].item() == pytest.approx(expected, **CLOSE)


@heads_or_not
@zeros_or_not
@pytest.mark.parametrize("deduce_from", DEDUCE_FROM)
def test_eq_3_equals_a_loop_over_rows(deduce_from, zeros, heads):
    model, batch, naive = build(deduce_from, zeros=zeros, heads=heads)
    expected = 0.0
    for b in range(B):
        joint = [naive.encode_d(naive.s_next[b], naive.r[b], i) for i in range(N)]
        encoder = sum(naive.minus_log_likelihood(guess, b) for guess in joint)
        decoder = naive.distance(b, naive.decode_d(b, joint))
        expected += (encoder + decoder) / B
    assert model.loss(batch)[1]["L_d"].item() == pytest.approx(expected, **CLOSE)


@heads_or_not
@zeros_or_not
@pytest.mark.parametrize("deduce_from", DEDUCE_FROM)
def test_eq_4_equals_a_loop_over_rows(deduce_from, zeros, heads):
    model, batch, naive = build(deduce_from, zeros=zeros, heads=heads)
    expected = 0.0
    for b in range(B):
        joint = [naive.encode_p(b, i) for i in range(N)]
        expected += naive.distance(b, naive.decode_d(b, joint)) / B
    assert model.loss(batch)[1]["L_Rd"].item() == pytest.approx(expected, **CLOSE)


def test_without_zeros_and_heads_eq_3_and_4_are_the_papers():
    """The loops once more, with nothing of D3 and D11 in them."""
    model, batch, naive = build("obs", zeros=False, heads=False)
    loss_d = loss_rd = 0.0
    for b in range(B):
        s_and_r = naive.s_and_r(b)
        joint = [perceptron(model.enc_d, s_and_r, member=i) for i in range(N)]
        loss_d += sum(minus_log_normal(naive.o_next[b, i], joint[i]) for i in range(N)) / B
        deduced = perceptron(model.dec_d, np.concatenate(joint))
        loss_d += squared_distance(s_and_r, deduced) / B
        joint = [naive.encode_p(b, i).value for i in range(N)]
        loss_rd += squared_distance(s_and_r, perceptron(model.dec_d, np.concatenate(joint))) / B
    _, parts = model.loss(batch)
    assert parts["L_d"].item() == pytest.approx(loss_d, **CLOSE)
    assert parts["L_Rd"].item() == pytest.approx(loss_rd, **CLOSE)


@heads_or_not
@either_sight
@zeros_or_not
@pytest.mark.parametrize("deduce_from", DEDUCE_FROM)
def test_eq_5_and_a_step_equal_a_loop(deduce_from, zeros, observe, heads):
    options = {"zeros": zeros, "observe": observe, "heads": heads}
    model, batch, naive = build(deduce_from, **options)
    out = model.step(batch.obs, batch.state, batch.actions)
    for b in range(B):
        now, direct = naive.one_step(b), naive.encode_ps(b)
        mean_state = naive.mean(now.state)
        u = math.sqrt(sum((direct[j] - mean_state[j]) ** 2 for j in range(S)))
        end = sigmoid(now.end_logit) if heads else 0.0
        running = naive.raw("reward", now.r)
        last = naive.raw("reward", now.last_r) if heads else running
        expected = {
            "uncertainty": u, "terminated": end, "continuing_reward": running, "last_reward": last,
            "reward": (1 - end) * running + end * last,
            "direct_reward": naive.raw("reward", direct[S]),
            "direct_state": naive.raw("state", direct[:S]),
            "next_state": now.next_state, "mean_state": naive.raw("state", mean_state),
            "next_obs": np.stack(now.next_obs),
            "mean_obs": naive.raw("obs", np.stack([naive.mean(guess) for guess in now.seen])),
        }  # fmt: skip
        assert set(out) == {*expected, "next_avail"}
        for name, value in expected.items():
            assert array(out[name][b]) == pytest.approx(value, **CLOSE), name
        for i, logits in enumerate(now.avail_logits):
            allowed = [float(x > 0 or x == max(logits) or not heads) for x in logits]
            assert out["next_avail"][b, i].tolist() == allowed


@either_sight
def test_a_step_decides_between_0_and_the_mean(observe):
    model, batch, naive = build(observe=observe)
    out = model.step(batch.obs, batch.state, batch.actions)
    for name in ("obs", "state"):
        sometimes = getattr(model, f"{name}_sometimes_zero").numpy()
        is_zero = array(out[f"next_{name}"]) == 0
        assert is_zero[:, sometimes].any() and not is_zero[:, sometimes].all()
        assert not is_zero[:, ~sometimes].any()
        assert not (array(out[f"mean_{name}"]) == 0).any()


@zeros_or_not
@either_sight
@pytest.mark.parametrize("clamp", [True, False])
@heads_or_not
@pytest.mark.parametrize("discrete", [True, False])
def test_a_rollout_equals_a_loop_of_single_steps(discrete, heads, clamp, observe, zeros):
    options = {"heads": heads, "clamp": clamp, "observe": observe, "zeros": zeros}
    model, batch, naive = build(discrete=discrete, **options)
    with torch.no_grad():
        model.end_head[-1].bias[0] -= 1.0  # so that some rollouts end, and some do not
        model.enc_p[-1].bias += 0.4  # far enough to leave the range of the data
        model.enc_d[-1].bias += 0.4
        model.dec_d[-1].bias += 0.4
    actions = torch.stack([make_batch(discrete).actions for _ in range(4)])
    asked, g, again = [], *(torch.Generator().manual_seed(3) for _ in range(2))

    def policy(obs, avail, generator):
        assert generator is g
        asked.append((obs, avail))
        return actions[len(asked) - 1]

    def limited(name, x):
        low, high = (torch.as_tensor(naive.stats[f"{name}_{m}"]) for m in ("min", "max"))
        return torch.minimum(torch.maximum(x, low), high) if clamp else x

    out = model.imagine(policy, batch, 4, g)
    assert ("avail" in out) == discrete and len(asked) == 4
    obs, state, avail, valid = batch.obs, batch.state, batch.avail, [1.0] * B
    outside = last_rewards = 0
    for h in range(4):
        if discrete and not heads:
            avail = torch.ones(B, N, A)
        now = {"obs": obs, "state": state} | ({"avail": avail} if discrete else {})
        assert all(torch.equal(out[name][h], x) for name, x in now.items())
        assert torch.equal(asked[h][0], obs)
        assert torch.equal(asked[h][1], avail) if discrete else asked[h][1] is None
        step = model.step(obs, state, actions[h])
        assert torch.equal(out["actions"][h], actions[h])
        assert torch.equal(out["uncertainty"][h], step["uncertainty"])
        draws = torch.rand(B, generator=again) if heads else torch.zeros(B)
        ends = [float(heads and draws[b] < step["terminated"][b]) for b in range(B)]
        assert out["terminated"][h].tolist() == ends and out["valid"][h].tolist() == valid
        kind = ["last_reward" if end else "continuing_reward" for end in ends]
        reward = torch.stack([step[name][b] for b, name in enumerate(kind)])
        assert torch.equal(out["reward"][h], limited("reward", reward))
        last_rewards += int((reward != step["continuing_reward"]).sum())
        valid = [0.0 if end else x for x, end in zip(valid, ends, strict=True)]
        outside += int((step["next_obs"] != limited("obs", step["next_obs"])).sum())
        obs, state = limited("obs", step["next_obs"]), limited("state", step["next_state"])
        avail = step["next_avail"]
    assert torch.equal(out["obs"][4], obs) and torch.equal(out["state"][4], state)
    assert (outside > 0) == clamp and (last_rewards > 0) == heads
    assert (B < out["valid"].sum() < 4 * B) == heads


@pytest.mark.parametrize("probability", [0.0, 0.4, 1.0])
def test_rollouts_end_with_the_predicted_probability(probability):
    model, batch, _ = build()
    with torch.no_grad():
        model.end_head[-1].weight[0].zero_()
        logit = torch.logit(torch.tensor(probability)).clamp(-50, 50)
        model.end_head[-1].bias[0] = logit
    many = Batch(*(None if x is None else x.repeat(400, *[1] * (x.dim() - 1)) for x in batch))
    out = model.imagine(lambda *_: many.actions, many, 2, torch.Generator().manual_seed(0))
    assert out["terminated"][0].mean().item() == pytest.approx(probability, abs=0.03)
    assert torch.equal(out["valid"][1], 1 - out["terminated"][0])


def test_the_expected_reward_is_what_rollouts_receive_on_average():
    model, batch, _ = build(clamp=False)
    step = model.step(batch.obs, batch.state, batch.actions)
    many = Batch(*(x.repeat_interleave(4000, 0) for x in batch))
    out = model.imagine(lambda *_: many.actions, many, 1, torch.Generator().manual_seed(0))
    received = out["reward"][0].view(B, -1).mean(1)
    spread = (step["last_reward"] - step["continuing_reward"]).abs()
    assert (spread > 0.1).any()
    assert ((received - step["reward"]).abs() <= 4 * 0.5 * spread / 4000**0.5).all()


@zeros_or_not
def test_eq_6_equals_a_loop_over_rows(zeros):
    model, batch, naive = build(zeros=zeros)
    expected = sum(minus_log_normal(naive.s_and_r(b), naive.encode_ps(b)) for b in range(B)) / B
    assert model.loss(batch)[1]["L_ps"].item() == pytest.approx(expected, **CLOSE)


@heads_or_not
@either_sight
@zeros_or_not
@pytest.mark.parametrize("discrete", [True, False])
def test_the_objective_is_the_sum_of_its_parts(discrete, zeros, observe, heads):
    options = {"zeros": zeros, "observe": observe, "heads": heads}
    model, batch, naive = build(discrete=discrete, **options)
    total, parts = model.loss(batch)
    end = avail = 0.0
    for b in range(B):
        now = naive.one_step(b)
        end += cross_entropy(now.end_logit, batch.terminated[b]) / B
        if batch.terminated[b] == 1:
            end += minus_log_normal([naive.r[b]], [now.last_r]) / B
        for i, logits in enumerate(now.avail_logits):
            for j in range(A):
                avail += cross_entropy(logits[j], batch.next_avail[b, i, j]) / (B * N * A)
    of_heads = {"L_end": end, "L_avail": avail} if heads else {}
    assert {k: parts[k].item() for k in of_heads} == pytest.approx(of_heads, **CLOSE)
    assert (avail > 0) == discrete
    assert set(parts) == {"L_p", "L_d", "L_Rd", "L_ps", *of_heads}
    assert total.item() == pytest.approx(sum(v.item() for v in parts.values()), **CLOSE)


# --------------------------------------------------------------------- Eq. (7), uncertainty weights


@pytest.mark.parametrize("cap,u_scale", [(1.5, 0.0), (1.5, 0.5), (6.0, 0.25)])
def test_eq_7_weights_equal_a_loop_over_the_rows_that_are_kept(cap, u_scale):
    horizon, rollouts, retain = 3, 4, 2
    sizes = (retain, horizon, rollouts, N, O, S, A)
    buffer = SyntheticBuffer(*sizes, "cpu", cap=cap, u_scale=u_scale)
    slots = [None] * retain
    for c in range(3):
        u = torch.randint(0, 24, (horizon, rollouts)) / 8  # 0 to 3: both ends of the clip
        valid = (torch.rand(horizon, rollouts) < 0.7).double()
        valid[0, 0], u[0, 0] = 1.0, 2.875
        buffer.add(
            {
                "obs": torch.zeros(horizon + 1, rollouts, N, O),
                "state": torch.zeros(horizon + 1, rollouts, S),
                "avail": torch.ones(horizon + 1, rollouts, N, A),
                "actions": torch.zeros(horizon, rollouts, N, A),
                "reward": torch.zeros(horizon, rollouts),
                "terminated": torch.zeros(horizon, rollouts),
                "uncertainty": u,
                "valid": valid,
            }
        )
        unit = u_scale * statistics.median_low(u[0].tolist()) if u_scale else 1.0
        slots[c % retain] = (u / unit, valid)  # the third collection takes the first one's place
        numerators = []
        for slot in slots:
            for h, m in itertools.product(range(horizon), range(rollouts)):
                if slot is None or slot[1][h, m] == 0:
                    numerators.append(0.0)
                else:
                    numerators.append(math.exp(min(max(cap - slot[0][h, m].item(), 0.0), cap)))
        expected = [x / sum(numerators) for x in numerators]
        w = np.diff(array(buffer.cdf), prepend=0.0)
        assert w == pytest.approx(expected, abs=1e-12)
        rows = [x for x in expected if x > 0]
        share = 1 / (sum(x * x for x in rows) * len(rows))
        assert buffer.effective_share.item() == pytest.approx(share, rel=1e-9)
        assert max(rows) / min(rows) <= math.exp(cap) * (1 + 1e-9)


# ------------------------------------------------------------------------- Eq. (10)-(12), policies

GAMMA, ALPHA, LAMBDA = 0.9, 0.7, 1.3


def build_policy(discrete=True, critics=2, shared=True):
    stats, batch = make_statistics(), make_batch(discrete)
    actor = Actor(stats["obs_mean"], stats["obs_std"], A, HIDDEN, discrete, shared)
    of_data = [stats[k] for k in ("obs_mean", "obs_std", "state_mean", "state_std")]
    critic, target = (Critic(*of_data, A, HIDDEN, discrete, critics) for _ in range(2))
    with torch.no_grad():  # fresh networks are nearly constant: make the actions matter
        for net in (actor, critic, target):
            for p in net.parameters():
                p.mul_(2.0)
    is_real = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    return SimpleNamespace(
        stats={k: array(v) for k, v in stats.items()},
        batch=batch, actor=actor, critic=critic, target=target, is_real=is_real,
    )  # fmt: skip


def standard(case, name, x):
    return (array(x) - case.stats[f"{name}_mean"]) / floored(case.stats[f"{name}_std"])


def naive_pi(case, obs, avail, b) -> np.ndarray:
    """(N,A): masked softmax, or tanh, of each agent's own network."""
    rows = []
    for i in range(N):
        x = standard(case, "obs", obs[b])[i]
        if case.actor.shared and case.actor.discrete:  # one scale for all agents
            mean, std = case.stats["obs_mean"].mean(0), case.stats["obs_std"].mean(0)
            x = (array(obs[b, i]) - mean) / floored(std)
        if case.actor.shared:
            x = np.concatenate([x, [float(i == j) for j in range(N)]])
        z = perceptron(case.actor.net, x, member=0 if case.actor.shared else i)
        if case.actor.discrete:
            z = [math.exp(z[j]) if avail[b, i, j] == 1 else 0.0 for j in range(A)]
            rows.append(np.array(z) / sum(z))
        else:
            rows.append(np.array([math.tanh(z_j) for z_j in z]))
    return np.stack(rows)


def naive_utilities(case, critic, obs, state, b, k) -> np.ndarray:
    """(N,A): q_i(s, o^i, .) of critic k."""
    s, o = standard(case, "state", state[b]), standard(case, "obs", obs[b])
    number, rows = np.eye(N), []
    for i in range(N):  # the first layer is in two parts, one on s and one on (o^i, i)
        first = perceptron([critic.from_state], s, member=k)
        first = first + perceptron([critic.from_obs], np.append(o[i], number[i]), member=k)
        rows.append(perceptron(critic.net, np.maximum(first, 0.0), member=k))
    return np.stack(rows)


def naive_value(case, critic, state, actions, b, k) -> float:
    """Q_k(s, a) of a continuous joint action (N,A)."""
    x = np.concatenate([standard(case, "state", state[b]), *np.asarray(actions)])
    return perceptron(critic.net, x, member=k)[0]


def joint_actions(avail, b):
    """Every joint action that may be taken, as a tuple of one action number an agent."""
    return itertools.product(*[[j for j in range(A) if avail[b, i, j] == 1] for i in range(N)])


def value_of(q: np.ndarray, joint: tuple) -> float:
    return sum(q[i, a] for i, a in enumerate(joint))


def naive_critic_loss(
    case, conservative="logsumexp", backup="policy", imagined_in="bellman",
    bounds=(-math.inf, math.inf), recorded_critic=False,
):  # fmt: skip
    """Eq. (10), (11) over discrete joint actions: (loss, regularisation, Bellman error)."""
    batch, k_all = case.batch, range(case.critic.critics)
    real = [b for b in range(B) if case.is_real[b] == 1]
    y, q_all, data = np.zeros(B), np.zeros((len(k_all), B)), np.zeros((len(k_all), B))
    for b in range(B):
        nexts = [
            naive_utilities(case, case.target, batch.next_obs, batch.next_state, b, k)
            for k in k_all
        ]
        if backup == "max":
            best = max(
                joint_actions(batch.next_avail, b),
                key=lambda joint, nexts=nexts: sum(value_of(q, joint) for q in nexts),
            )
            v = min(value_of(q, best) for q in nexts)
        else:
            pi = naive_pi(case, batch.next_obs, batch.next_avail, b)
            v = min(
                sum(
                    math.prod(pi[i, a] for i, a in enumerate(joint)) * value_of(q, joint)
                    for joint in joint_actions(batch.next_avail, b)
                )
                for q in nexts
            )
        v = min(max(v, bounds[0]), bounds[1])
        y[b] = batch.reward[b] + GAMMA ** batch.steps[b] * (1 - batch.terminated[b]) * v
        pi = naive_pi(case, batch.obs, batch.avail, b)
        taken = tuple(batch.actions[b].argmax(-1).tolist())
        for k in k_all:
            q = naive_utilities(case, case.critic, batch.obs, batch.state, b, k)
            every = list(joint_actions(batch.avail, b))
            data[k, b] = value_of(q, taken)
            if conservative == "logsumexp":
                q_all[k, b] = math.log(sum(math.exp(value_of(q, joint)) for joint in every))
            else:
                q_all[k, b] = sum(
                    math.prod(pi[i, a] for i, a in enumerate(joint)) * value_of(q, joint)
                    for joint in every
                )
    rows, lowered = (range(B), real) if imagined_in == "bellman" else (real, range(B))
    regularisation = bellman = 0.0
    for k in k_all:
        seen = real if recorded_critic and k == 1 else rows  # of two critics at most
        regularisation += np.mean([q_all[k, b] for b in lowered])
        regularisation -= np.mean([data[k, b] for b in real])
        bellman += 0.5 * np.mean([(data[k, b] - y[b]) ** 2 for b in seen])
    return ALPHA * regularisation + bellman, regularisation, bellman


def test_policies_are_masked_softmaxes_of_own_observations():
    for shared in (True, False):
        case = build_policy(shared=shared)
        pi = array(case.actor(case.batch.obs, case.batch.avail))
        for b in range(B):
            assert pi[b] == pytest.approx(
                naive_pi(case, case.batch.obs, case.batch.avail, b), **CLOSE
            )


@pytest.mark.parametrize("critics", [1, 2, 3])
def test_the_log_sum_exp_over_all_joint_actions_is_exact(critics):
    case = build_policy(critics=critics)
    batch = case.batch
    data, every = data_and_all_values(case.critic, batch, case.actor)
    assert data.shape == every.shape == (critics, B)
    for b, k in itertools.product(range(B), range(critics)):
        q = naive_utilities(case, case.critic, batch.obs, batch.state, b, k)
        joint = list(joint_actions(batch.avail, b))
        expected = math.log(sum(math.exp(value_of(q, a)) for a in joint))
        taken = tuple(batch.actions[b].argmax(-1).tolist())
        assert taken in joint
        assert every[k, b].item() == pytest.approx(expected, **CLOSE)
        assert data[k, b].item() == pytest.approx(value_of(q, taken), **CLOSE)


OPTIONS = [
    {},
    {"conservative": "expectation"},
    {"backup": "max"},
    {"imagined_in": "printed"},
    {"bounds": (-1.0, math.inf)},
    {"bounds": (-math.inf, -0.95)},
    {"backup": "max", "bounds": (-1.4, 0.4)},
    {"conservative": "expectation", "backup": "max", "imagined_in": "printed"},  # the paper's
    {"recorded_critic": True},
]


@pytest.mark.parametrize("critics", [1, 2])
@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "+".join(f"{k}={v}" for k, v in o.items()) or "default"
)
def test_eq_10_and_11_equal_a_loop_over_joint_actions(options, critics):
    case = build_policy(critics=critics)
    loss, parts = critic_loss(
        case.critic, case.target, case.actor, case.batch, case.is_real, GAMMA, ALPHA, **options
    )  # fmt: skip
    expected, regularisation, bellman = naive_critic_loss(case, **options)
    assert parts["gap"].item() == pytest.approx(regularisation, **CLOSE)
    assert parts["td"].item() == pytest.approx(bellman, **CLOSE)
    assert loss.item() == pytest.approx(expected, **CLOSE)


def test_the_options_of_eq_10_and_11_differ():
    case = build_policy()
    values = [naive_critic_loss(case, **options)[0] for options in OPTIONS]
    assert min(abs(x - y) for x, y in itertools.combinations(values, 2)) > 1e-3


def test_eq_11_takes_the_best_available_joint_action():
    case = build_policy(critics=1)
    batch, bellman = case.batch, 0.0
    for b in range(B):
        after = naive_utilities(case, case.target, batch.next_obs, batch.next_state, b, 0)
        best = max(value_of(after, joint) for joint in joint_actions(batch.next_avail, b))
        y = batch.reward[b] + GAMMA ** batch.steps[b] * (1 - batch.terminated[b]) * best
        now = naive_utilities(case, case.critic, batch.obs, batch.state, b, 0)
        taken = tuple(batch.actions[b].argmax(-1).tolist())
        bellman += 0.5 * (value_of(now, taken) - y.item()) ** 2 / B
    _, parts = critic_loss(
        case.critic, case.target, case.actor, batch, case.is_real, GAMMA, ALPHA, backup="max"
    )  # fmt: skip
    assert parts["td"].item() == pytest.approx(bellman, **CLOSE)


@pytest.mark.parametrize("imagined_in", ["bellman", "value", "printed"])
@pytest.mark.parametrize("discrete", [True, False])
def test_eq_12_equals_a_loop_over_rows_and_agents(discrete, imagined_in):
    case = build_policy(discrete)
    batch, value, distance = case.batch, np.zeros(B), np.zeros((B, N))
    for b in range(B):
        pi = naive_pi(case, batch.obs, batch.avail, b)
        for k in range(2):
            if discrete:
                q = naive_utilities(case, case.critic, batch.obs, batch.state, b, k)
                for joint in joint_actions(batch.avail, b):
                    chance = math.prod(pi[i, a] for i, a in enumerate(joint))
                    value[b] += chance * value_of(q, joint) / 2
            else:
                value[b] += naive_value(case, case.critic, batch.state, pi, b, k) / 2
        for i in range(N):
            distance[b, i] = squared_distance(pi[i], array(batch.actions[b, i]))
    real = [b for b in range(B) if case.is_real[b] == 1]
    rows = real if imagined_in == "bellman" else list(range(B))
    over_agents = np.sum if discrete else np.mean
    cloned = range(B) if imagined_in == "printed" else real
    cloning = np.mean([over_agents(distance[b]) for b in cloned])
    gain = np.mean(value[rows]) - LAMBDA * cloning
    loss, parts = policy_loss(case.actor, case.critic, batch, case.is_real, LAMBDA, imagined_in)
    assert loss.item() == pytest.approx(-gain, **CLOSE)
    assert parts["bc"].item() == pytest.approx(cloning, **CLOSE)
    assert parts["q"].item() == pytest.approx(np.mean(value[rows]), **CLOSE)
    alone, _ = policy_loss(case.actor, None, batch, case.is_real, LAMBDA, imagined_in)
    assert alone.item() == pytest.approx(LAMBDA * cloning, **CLOSE)


# ---------------------------------------------------------------------------- continuous actions


def draws(samples: int = 10, shape=(B, N, A)) -> torch.Tensor:
    return action_noise(shape, torch.Generator().manual_seed(0), samples)


def continuous_terms(case, bounds=(-math.inf, math.inf)):
    """Values of the data's actions (K,B) and Bellman targets (B,) of a continuous batch."""
    batch, critics = case.batch, range(case.critic.critics)
    data, y = np.zeros((len(critics), B)), np.zeros(B)
    for b in range(B):
        following = naive_pi(case, batch.next_obs, None, b)
        v = min(naive_value(case, case.target, batch.next_state, following, b, k) for k in critics)
        v = min(max(v, bounds[0]), bounds[1])
        y[b] = batch.reward[b] + GAMMA ** batch.steps[b] * (1 - batch.terminated[b]) * v
        for k in critics:
            actions = array(batch.actions[b])
            data[k, b] = naive_value(case, case.critic, batch.state, actions, b, k)
    return data, y


UNBOUNDED = (-math.inf, math.inf)


@pytest.mark.parametrize("imagined_in", ["bellman", "printed"])
@pytest.mark.parametrize("bounds", [UNBOUNDED, (-0.3, math.inf), (-math.inf, -1.4)])
@pytest.mark.parametrize("backup", ["policy", "max"])
@pytest.mark.parametrize("critics", [1, 2])
def test_continuous_bellman_error_equals_a_loop(critics, backup, bounds, imagined_in):
    case = build_policy(discrete=False, critics=critics)
    data, y = continuous_terms(case, bounds)
    assert (y != continuous_terms(case)[1]).any() == (bounds != UNBOUNDED)
    loss, parts = critic_loss(
        case.critic, case.target, case.actor, case.batch, case.is_real, GAMMA, ALPHA,
        noise=draws(), backup=backup, bounds=bounds, imagined_in=imagined_in,
    )  # fmt: skip
    rows = [b for b in range(B) if imagined_in == "bellman" or case.is_real[b] == 1]
    bellman = sum(0.5 * np.mean((data[k] - y)[rows] ** 2) for k in range(critics))
    assert parts["td"].item() == pytest.approx(bellman, **CLOSE)
    assert parts["data"].item() == pytest.approx(data.mean(), **CLOSE)
    assert loss.shape == () and torch.isfinite(loss)
    assert loss.item() == pytest.approx(ALPHA * parts["gap"].item() + bellman, **CLOSE)


@pytest.mark.parametrize("conservative", ["logsumexp", "expectation"])
@pytest.mark.parametrize("imagined_in", ["bellman", "printed"])
def test_continuous_conservative_term_equals_a_loop(imagined_in, conservative):
    case = build_policy(discrete=False)
    data, _ = continuous_terms(case)
    real = [b for b in range(B) if case.is_real[b] == 1]
    q_all = array(data_and_all_values(case.critic, case.batch, case.actor, draws())[1])
    if conservative == "expectation":
        for b, k in itertools.product(range(B), range(2)):
            pi = naive_pi(case, case.batch.obs, None, b)
            q_all[k, b] = naive_value(case, case.critic, case.batch.state, pi, b, k)
    lowered = real if imagined_in == "bellman" else range(B)
    gap = sum(np.mean([q_all[k, b] for b in lowered]) - np.mean(data[k, real]) for k in range(2))
    _, parts = critic_loss(
        case.critic, case.target, case.actor, case.batch, case.is_real, GAMMA, ALPHA,
        noise=draws(), conservative=conservative, imagined_in=imagined_in,
    )  # fmt: skip
    assert parts["gap"].item() == pytest.approx(gap, **CLOSE)
    assert parts["all"].item() == pytest.approx(q_all.mean(), **CLOSE)


class Stub:
    """A continuous critic of one network, given as a function of the joint action (rows,N,A)."""

    discrete, critics = False, 1

    def __init__(self, value):
        self.value = value

    def __call__(self, obs, state, actions):
        assert len(obs) == len(state) == len(actions)
        return self.value(actions).unsqueeze(0)


def still_actor(obs, avail):
    return torch.zeros(len(obs), N, A)


def log_normal(x: torch.Tensor, sigma: float) -> torch.Tensor:
    density = torch.exp(-((x / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
    return density.log().sum((-2, -1))


def one_row(size: int, motors: int) -> SimpleNamespace:
    return SimpleNamespace(
        obs=torch.zeros(size, 1, O), state=torch.zeros(size, S), next_obs=torch.zeros(size, 1, O),
        actions=torch.zeros(size, 1, motors),
    )  # fmt: skip


def test_estimated_log_sum_exp_finds_a_known_integral():
    # exp Q is a normal density well inside the box: it integrates to 1. One agent's two torques.
    critic = Stub(lambda actions: 3.0 + log_normal(actions, 0.2))
    _, every = data_and_all_values(
        critic, one_row(4, 2), lambda obs, avail: torch.zeros(len(obs), 1, 2),
        draws(20_000, (4, 1, 2)),
    )  # fmt: skip
    assert every.flatten().tolist() == pytest.approx([3.0] * 4, abs=0.02)


@pytest.mark.parametrize("centre", [0.0, 0.9, 1.0, -1.0])
def test_log_sum_exp_at_the_edge_of_the_box_is_the_integral(centre):
    # Q = 2a - a^2 in one dimension: half of the draws around an edge lie outside of the box.
    expected, _ = scipy.integrate.quad(lambda a: math.exp(2 * a - a * a), -1, 1)
    _, every = data_and_all_values(
        Stub(lambda a: (2 * a - a.square()).sum((-2, -1))), one_row(4, 1),
        lambda obs, avail: torch.full((len(obs), 1, 1), centre), draws(30_000, (4, 1, 1)),
    )  # fmt: skip
    assert every.flatten().tolist() == pytest.approx([math.log(expected)] * 4, abs=0.01)


def test_a_constant_critic_gives_its_value_plus_the_volume():
    case = build_policy(discrete=False)
    with torch.no_grad():
        case.critic.net[0].weight[:, S:] = 0.0
    data, every = data_and_all_values(case.critic, case.batch, case.actor, draws(50))
    volume = every - data  # the critic's constant cancels; (K,B), the same for both critics
    assert volume[0].tolist() == pytest.approx(volume[1].tolist(), **CLOSE)
    log_box = N * A * math.log(2.0)
    assert (volume < log_box + math.log(3.0) + 1e-9).all()  # no density is below a third of 2^-NA
    assert (volume > log_box - 1.0).all()
    with torch.no_grad():
        case.critic.net[-1].bias += 2.5
    _, higher = data_and_all_values(case.critic, case.batch, case.actor, draws(50))
    assert (higher - every).flatten().tolist() == pytest.approx([2.5] * 2 * B, **CLOSE)


def test_estimated_log_sum_exp_equals_a_loop():
    case, samples, sigma = build_policy(discrete=False), 4, 0.2
    batch = case.batch
    uniform, *noises = drawn = draws(samples)
    _, every = data_and_all_values(case.critic, batch, case.actor, drawn)
    for b, k in itertools.product(range(B), range(2)):
        terms = []
        centres = [naive_pi(case, obs, None, b) for obs in (batch.obs, batch.next_obs)]

        def mixture(a, centres=centres):  # the density with which a joint action is drawn
            normal = [np.exp(-(((a - c) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
                      for c in centres]  # fmt: skip
            return (0.5 ** (N * A) + sum(map(np.prod, normal))) / 3

        for m in range(samples):
            q = naive_value(case, case.critic, batch.state, array(uniform[m, b]), b, k)
            terms.append(math.exp(q) / mixture(array(uniform[m, b])))
            for noise, centre in zip(noises, centres, strict=True):
                a = centre + sigma * array(noise[m, b])
                inside = np.abs(a).max() <= 1
                q = naive_value(case, case.critic, batch.state, a, b, k)
                terms.append(math.exp(q) / mixture(a) if inside else 0.0)
        assert every[k, b].item() == pytest.approx(math.log(np.mean(terms)), **CLOSE)


# ------------------------------------------------------------------------------------- endings


@either_sight
def test_the_heads_learn_from_what_step_shows_them(observe):
    model, batch, _ = build(observe=observe)
    out = model.step(batch.obs, batch.state, batch.actions)
    _, parts = model.loss(batch)
    r, last_r = (model.standardise("reward", x) for x in (batch.reward, out["last_reward"]))
    expected = F.binary_cross_entropy(out["terminated"], batch.terminated)
    expected = expected + 0.5 * (batch.terminated * (r - last_r).square()).mean()
    assert parts["L_end"].item() == pytest.approx(expected.item(), **CLOSE)
    logits = model.avail_head(model.standardise("obs", out["next_obs"]))
    expected = F.binary_cross_entropy_with_logits(logits, batch.next_avail)
    assert parts["L_avail"].item() == pytest.approx(expected.item(), **CLOSE)


def test_a_task_that_never_ends_does_not_end_in_imagination():
    model, batch, _ = build("obs+state+actions")
    out = model.step(batch.obs, batch.state, batch.actions)
    assert (out["terminated"] > 0).all() and (out["reward"] != out["continuing_reward"]).all()
    model.can_end.zero_()
    out = model.step(batch.obs, batch.state, batch.actions)
    assert (out["terminated"] == 0).all() and torch.equal(out["reward"], out["continuing_reward"])
