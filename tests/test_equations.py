"""Every equation of the paper that is code, against a naive float64 loop written from the paper.

Eq. (2)-(6) in logo_wm.py, Eq. (7) in buffer.py, Eq. (10)-(12) in macql.py. The loops take single
weight matrices out of the modules and multiply row by row and agent by agent in numpy, so they
check the batched per-agent layers, the standardisation and the shapes as well. What the paper asks
over all joint actions (log-sum-exp, maximum, expectation) is found by enumerating them.
"""

import itertools
import math
from types import SimpleNamespace

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


class NaiveWorldModel:
    """The world model as the paper writes it: one row b, one agent i at a time."""

    def __init__(self, model: LogoWM, statistics: dict[str, torch.Tensor], batch):
        self.m = model
        stats = {k: array(v) for k, v in statistics.items()}

        def standard(name, x):
            return (array(x) - stats[f"{name}_mean"]) / floored(stats[f"{name}_std"])

        self.stats, self.a = stats, array(batch.actions)
        self.o, self.o_next = standard("obs", batch.obs), standard("obs", batch.next_obs)
        self.s, self.s_next = standard("state", batch.state), standard("state", batch.next_state)
        self.r = standard("reward", batch.reward)

    def encode_p(self, b: int, i: int, o=None):
        """E_p: h_s from s, h_oi from (o^i, a^i), and o_hat^i from both."""
        o = self.o if o is None else o
        h_s = np.maximum(perceptron(self.m.enc_state, self.s[b]), 0.0)
        x = np.concatenate([o[b, i], self.a[b, i]])
        h_o = np.maximum(perceptron(self.m.enc_obs, x, member=i), 0.0)
        return o[b, i] + perceptron(self.m.enc_p, np.concatenate([h_s, h_o]), member=i)

    def decode_d(self, b: int, o_hat: list[np.ndarray]) -> np.ndarray:
        """R_d: (s', r') from all o_hat^i, and from what else this reading lets it see."""
        x = list(o_hat)
        if self.m.deduce_from != "obs":
            x.append(self.s[b])
        if self.m.deduce_from == "obs+state+actions":
            x += list(self.a[b])
        out = perceptron(self.m.dec_d, np.concatenate(x))
        if self.m.deduce_from != "obs":
            out[:S] += self.s[b]
        return out

    def encode_ps(self, b: int):
        x = np.concatenate([self.s[b], *self.o[b], *self.a[b]])
        mean = perceptron(self.m.enc_ps, x).copy()
        mean[:S] += self.s[b]
        return mean

    def s_and_r(self, b: int) -> np.ndarray:
        return np.append(self.s_next[b], self.r[b])


def minus_log_normal(x, mean) -> float:
    """-log N(x; mean, 1), less log(2 pi)/2 per dimension, which has no gradient."""
    total = 0.0
    for x_j, mean_j in zip(x, mean, strict=True):
        density = math.exp(-((x_j - mean_j) ** 2) / 2) / math.sqrt(2 * math.pi)
        total += -math.log(density) - 0.5 * math.log(2 * math.pi)
    return total


def squared_distance(x, y) -> float:
    return sum((x_j - y_j) ** 2 for x_j, y_j in zip(x, y, strict=True))


def build(deduce_from="obs+state+actions", discrete=True, **options):
    statistics, batch = make_statistics(), make_batch(discrete)
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


@pytest.mark.parametrize("discrete", [True, False])
def test_eq_2_equals_a_loop_over_rows_and_agents(discrete):
    model, batch, naive = build(discrete=discrete)
    expected = 0.0
    for b in range(B):
        for i in range(N):
            o_hat = naive.encode_p(b, i)
            encoder = minus_log_normal(naive.o_next[b, i], o_hat)
            o_and_a = np.concatenate([naive.o[b, i], naive.a[b, i]])
            decoder = squared_distance(o_and_a, perceptron(model.dec_p, o_hat, member=i))
            expected += (encoder + decoder) / B
    assert model.loss(batch)[1]["L_p"].item() == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("deduce_from", DEDUCE_FROM)
def test_eq_3_equals_a_loop_over_rows(deduce_from):
    model, batch, naive = build(deduce_from)
    expected = 0.0
    for b in range(B):
        mean = perceptron(model.enc_d, naive.s_and_r(b))
        joint = [mean[i * O : (i + 1) * O] for i in range(N)]
        encoder = sum(minus_log_normal(naive.o_next[b, i], joint[i]) for i in range(N))
        decoder = squared_distance(naive.s_and_r(b), naive.decode_d(b, joint))
        expected += (encoder + decoder) / B
    assert model.loss(batch)[1]["L_d"].item() == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("eq4_input", ["obs", "next_obs"])
@pytest.mark.parametrize("deduce_from", DEDUCE_FROM)
def test_eq_4_equals_a_loop_over_rows(deduce_from, eq4_input):
    model, batch, naive = build(deduce_from, eq4_input=eq4_input)
    seen = naive.o if eq4_input == "obs" else naive.o_next
    expected = 0.0
    for b in range(B):
        joint = [naive.encode_p(b, i, o=seen) for i in range(N)]
        expected += squared_distance(naive.s_and_r(b), naive.decode_d(b, joint)) / B
    assert model.loss(batch)[1]["L_Rd"].item() == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("deduce_from", DEDUCE_FROM)
def test_eq_5_and_a_step_equal_a_loop(deduce_from):
    model, batch, naive = build(deduce_from)
    out = model.step(batch.obs, batch.state, batch.actions)

    def raw(name, x, index=...):
        mean, std = naive.stats[f"{name}_mean"][index], floored(naive.stats[f"{name}_std"])[index]
        return x * std + mean

    for b in range(B):
        joint = [naive.encode_p(b, i) for i in range(N)]
        deduced, direct = naive.decode_d(b, joint), naive.encode_ps(b)
        u = math.sqrt(sum((direct[j] - deduced[j]) ** 2 for j in range(S)))
        done = perceptron(model.done_head, deduced[:S])[0]
        assert out["uncertainty"][b].item() == pytest.approx(u, **CLOSE)
        assert out["terminated"][b].item() == pytest.approx(1 / (1 + math.exp(-done)), **CLOSE)
        assert array(out["next_state"][b]) == pytest.approx(raw("state", deduced[:S]), **CLOSE)
        assert array(out["direct_state"][b]) == pytest.approx(raw("state", direct[:S]), **CLOSE)
        assert out["reward"][b].item() == pytest.approx(raw("reward", deduced[S]), **CLOSE)
        assert out["direct_reward"][b].item() == pytest.approx(raw("reward", direct[S]), **CLOSE)
        for i in range(N):
            assert array(out["next_obs"][b, i]) == pytest.approx(
                raw("obs", joint[i], index=i), **CLOSE
            )
            logits = perceptron(model.avail_head, joint[i], member=i)
            allowed = [float(x > 0 or x == max(logits)) for x in logits]
            assert out["next_avail"][b, i].tolist() == allowed


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("discrete", [True, False])
def test_a_rollout_equals_a_loop_of_single_steps(discrete, heads, clamp):
    model, batch, naive = build(discrete=discrete, heads=heads, clamp=clamp)
    with torch.no_grad():
        model.done_head[-1].bias -= 2.0  # so that some rollouts end, and some do not
        model.enc_p[-1].bias += 0.4  # far enough to leave the range of the data
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
    obs, state, avail, valid, outside = batch.obs, batch.state, batch.avail, [1.0] * B, 0
    for h in range(4):
        if discrete and not heads:
            avail = torch.ones(B, N, A)
        now = {"obs": obs, "state": state} | ({"avail": avail} if discrete else {})
        assert all(torch.equal(out[name][h], x) for name, x in now.items())
        assert torch.equal(asked[h][0], obs)
        assert torch.equal(asked[h][1], avail) if discrete else asked[h][1] is None
        step = model.step(obs, state, actions[h])
        assert torch.equal(out["actions"][h], actions[h])
        assert torch.equal(out["reward"][h], limited("reward", step["reward"]))
        assert torch.equal(out["uncertainty"][h], step["uncertainty"])
        draws = torch.rand(B, generator=again) if heads else torch.zeros(B)
        ends = [float(heads and draws[b] < step["terminated"][b]) for b in range(B)]
        assert out["terminated"][h].tolist() == ends and out["valid"][h].tolist() == valid
        valid = [0.0 if end else x for x, end in zip(valid, ends, strict=True)]
        outside += int((step["next_obs"] != limited("obs", step["next_obs"])).sum())
        obs, state = limited("obs", step["next_obs"]), limited("state", step["next_state"])
        avail = step["next_avail"]
    assert torch.equal(out["obs"][4], obs) and torch.equal(out["state"][4], state)
    assert (outside > 0) == clamp and (sum(valid) == B or heads)


@pytest.mark.parametrize("probability", [0.0, 0.4, 1.0])
def test_rollouts_end_with_the_predicted_probability(probability):
    model, batch, _ = build()
    with torch.no_grad():
        model.done_head[-1].weight.zero_()
        model.done_head[-1].bias.fill_(torch.logit(torch.tensor(probability)).clamp(-50, 50))
    many = Batch(*(None if x is None else x.repeat(400, *[1] * (x.dim() - 1)) for x in batch))
    out = model.imagine(lambda *_: many.actions, many, 2, torch.Generator().manual_seed(0))
    assert out["terminated"][0].mean().item() == pytest.approx(probability, abs=0.03)
    assert torch.equal(out["valid"][1], 1 - out["terminated"][0])


def test_eq_6_equals_a_loop_over_rows():
    model, batch, naive = build()
    expected = sum(minus_log_normal(naive.s_and_r(b), naive.encode_ps(b)) for b in range(B)) / B
    assert model.loss(batch)[1]["L_ps"].item() == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("discrete", [True, False])
def test_the_objective_is_the_sum_of_its_parts(discrete):
    model, batch, naive = build(discrete=discrete)
    total, parts = model.loss(batch)

    def cross_entropy(logit, label):
        p = 1 / (1 + math.exp(-logit))
        return -math.log(p if label else 1 - p)

    done = avail = 0.0
    for b in range(B):
        joint = [naive.encode_p(b, i) for i in range(N)]
        logit = perceptron(model.done_head, naive.decode_d(b, joint)[:S])[0]
        done += cross_entropy(logit, batch.terminated[b]) / B
        for i in range(N if discrete else 0):
            logits = perceptron(model.avail_head, joint[i], member=i)
            for j in range(A):
                avail += cross_entropy(logits[j], batch.next_avail[b, i, j]) / (B * N * A)
    assert parts["L_done"].item() == pytest.approx(done, **CLOSE)
    assert parts["L_avail"].item() == pytest.approx(avail, **CLOSE)
    assert set(parts) == {"L_p", "L_d", "L_Rd", "L_ps", "L_done", "L_avail"}
    assert total.item() == pytest.approx(sum(v.item() for v in parts.values()), **CLOSE)


# --------------------------------------------------------------------- Eq. (7), uncertainty weights


def test_eq_7_weights_equal_a_loop_over_the_rows_that_are_kept():
    horizon, rollouts, cap, retain = 3, 4, 1.5, 2
    sizes = (retain, horizon, rollouts, N, O, S, A)
    buffer = SyntheticBuffer(*sizes, "cpu", cap=cap, u_scale=1.0)
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
        slots[c % retain] = (u, valid)  # the third collection takes the place of the first
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
    number = np.eye(N)
    return np.stack(
        [perceptron(critic.net, np.concatenate([s, o[i], number[i]]), member=k) for i in range(N)]
    )


def naive_value(case, critic, state, actions, b, k) -> float:
    """Q_k(s, a) of a continuous joint action (N,A)."""
    x = np.concatenate([standard(case, "state", state[b]), *np.asarray(actions)])
    return perceptron(critic.net, x, member=k)[0]


def joint_actions(avail, b):
    """Every joint action that may be taken, as a tuple of one action number an agent."""
    return itertools.product(*[[j for j in range(A) if avail[b, i, j] == 1] for i in range(N)])


def value_of(q: np.ndarray, joint: tuple) -> float:
    return sum(q[i, a] for i, a in enumerate(joint))


def naive_critic_loss(case, conservative="logsumexp", backup="policy", bellman_on="both"):
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
        y[b] = batch.reward[b] + GAMMA * (1 - batch.terminated[b]) * v
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
    rows = range(B) if bellman_on == "both" else real
    regularisation = bellman = 0.0
    for k in k_all:
        regularisation += np.mean(q_all[k]) - np.mean([data[k, b] for b in real])
        bellman += 0.5 * np.mean([(data[k, b] - y[b]) ** 2 for b in rows])
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


LITERAL = [
    {},
    {"conservative": "expectation"},
    {"backup": "max"},
    {"bellman_on": "real"},
    {
        "conservative": "expectation",
        "backup": "max",
        "bellman_on": "real",
    },
]


@pytest.mark.parametrize("critics", [1, 2])
@pytest.mark.parametrize("options", LITERAL, ids=lambda o: "+".join(o.values()) or "default")
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
    values = [naive_critic_loss(case, **options)[0] for options in LITERAL]
    assert min(abs(x - y) for x, y in itertools.combinations(values, 2)) > 1e-3


def test_eq_11_takes_the_best_available_joint_action():
    case = build_policy(critics=1)
    batch, bellman = case.batch, 0.0
    for b in range(B):
        after = naive_utilities(case, case.target, batch.next_obs, batch.next_state, b, 0)
        best = max(value_of(after, joint) for joint in joint_actions(batch.next_avail, b))
        y = batch.reward[b].item() + GAMMA * (1 - batch.terminated[b].item()) * best
        now = naive_utilities(case, case.critic, batch.obs, batch.state, b, 0)
        taken = tuple(batch.actions[b].argmax(-1).tolist())
        bellman += 0.5 * (value_of(now, taken) - y) ** 2 / B
    _, parts = critic_loss(
        case.critic, case.target, case.actor, batch, case.is_real, GAMMA, ALPHA, backup="max"
    )  # fmt: skip
    assert parts["td"].item() == pytest.approx(bellman, **CLOSE)


@pytest.mark.parametrize("bc_on", ["real", "both"])
@pytest.mark.parametrize("normalise_q", [False, True])
@pytest.mark.parametrize("discrete", [True, False])
def test_eq_12_equals_a_loop_over_rows_and_agents(discrete, normalise_q, bc_on):
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
    rows = [b for b in range(B) if bc_on == "both" or case.is_real[b] == 1]
    cloning = np.mean([distance[b, i] for b in rows for i in range(N)])
    scale = np.mean([abs(v) for v in value]) if normalise_q else 1.0
    gain = np.mean(value) / scale - LAMBDA * cloning
    loss, parts = policy_loss(
        case.actor, case.critic, batch, case.is_real, LAMBDA, normalise_q, bc_on
    )
    assert loss.item() == pytest.approx(-gain, **CLOSE)
    assert parts["bc"].item() == pytest.approx(cloning, **CLOSE)
    alone, _ = policy_loss(case.actor, None, batch, case.is_real, LAMBDA, normalise_q, bc_on)
    assert alone.item() == pytest.approx(LAMBDA * cloning, **CLOSE)


# ---------------------------------------------------------------------------- continuous actions


def draws(samples: int = 10, shape=(B, N, A)) -> torch.Tensor:
    return action_noise(shape, torch.Generator().manual_seed(0), samples)


def continuous_terms(case, backup="policy"):
    """Values of the data's actions (K,B) and Bellman targets (B,) of a continuous batch."""
    batch, critics = case.batch, range(case.critic.critics)
    data, y = np.zeros((len(critics), B)), np.zeros(B)
    for b in range(B):
        following = naive_pi(case, batch.next_obs, None, b)
        v = min(naive_value(case, case.target, batch.next_state, following, b, k) for k in critics)
        y[b] = batch.reward[b] + GAMMA * (1 - batch.terminated[b]) * v
        for k in critics:
            actions = array(batch.actions[b])
            data[k, b] = naive_value(case, case.critic, batch.state, actions, b, k)
    return data, y


@pytest.mark.parametrize("backup", ["policy", "max"])
@pytest.mark.parametrize("critics", [1, 2])
def test_continuous_bellman_error_equals_a_loop(critics, backup):
    case = build_policy(discrete=False, critics=critics)
    data, y = continuous_terms(case)
    loss, parts = critic_loss(
        case.critic, case.target, case.actor, case.batch, case.is_real, GAMMA, ALPHA,
        noise=draws(), backup=backup,
    )  # fmt: skip
    bellman = sum(0.5 * np.mean((data[k] - y) ** 2) for k in range(critics))
    assert parts["td"].item() == pytest.approx(bellman, **CLOSE)
    assert parts["data"].item() == pytest.approx(data.mean(), **CLOSE)
    assert loss.shape == () and torch.isfinite(loss)
    assert loss.item() == pytest.approx(ALPHA * parts["gap"].item() + bellman, **CLOSE)


def test_continuous_expectation_term_equals_a_loop():
    case = build_policy(discrete=False)
    data, _ = continuous_terms(case)
    gap = 0.0
    for k in range(2):
        pi = [naive_pi(case, case.batch.obs, None, b) for b in range(B)]
        q_all = [naive_value(case, case.critic, case.batch.state, pi[b], b, k) for b in range(B)]
        gap += np.mean(q_all) - np.mean([data[k, b] for b in range(B) if case.is_real[b] == 1])
    _, parts = critic_loss(
        case.critic, case.target, case.actor, case.batch, case.is_real, GAMMA, ALPHA,
        conservative="expectation",
    )  # fmt: skip
    assert parts["gap"].item() == pytest.approx(gap, **CLOSE)


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


@pytest.mark.parametrize("eq4_input", ["obs", "next_obs"])
def test_the_ending_head_learns_from_what_step_shows_it(eq4_input):
    model, batch, _ = build("obs+state+actions", eq4_input=eq4_input)
    p = model.step(batch.obs, batch.state, batch.actions)["terminated"]
    expected = torch.nn.functional.binary_cross_entropy(p, batch.terminated)
    assert model.loss(batch)[1]["L_done"].item() == pytest.approx(expected.item(), **CLOSE)


def test_a_task_that_never_ends_does_not_end_in_imagination():
    model, batch, _ = build("obs+state+actions")
    assert (model.step(batch.obs, batch.state, batch.actions)["terminated"] > 0).all()
    model.can_end.zero_()
    assert (model.step(batch.obs, batch.state, batch.actions)["terminated"] == 0).all()
