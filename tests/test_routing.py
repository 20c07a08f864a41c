"""Which term of the losses moves which sub-network, against a table written from the paper.

`LogoWM.loss` returns the sum and detached parts. To take the terms apart without touching the
code, `Terms` listens to torch while the loss is computed: it keeps each tensor that is detached
into `parts`, with its graph, and what `LogoWM.nll` returned for observations, so that Eq. (2) and
(3) fall into encoder and decoder.
"""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from buffer import Batch
from logo_wm import LogoWM, Prediction
from macql import Actor, Critic, action_noise, critic_loss, policy_loss

B, N, O, S, A = 8, 3, 4, 5, 4  # noqa: E741

E_P = {"enc_state", "enc_obs", "enc_p"}
MOVES = {  # term -> the sub-networks that its gradient reaches
    "L_p encoder": E_P,
    "L_p decoder": E_P | {"dec_p"},
    "L_d encoder": {"enc_d"},
    "L_d decoder": {"enc_d", "dec_d"},
    "L_Rd": E_P | {"dec_d"},
    "L_ps": {"enc_ps"},
    "L_end": {"end_head"},
    "L_avail": {"avail_head"},
}
OF_HEADS = {"L_end", "L_avail"}
NETWORKS = (
    *("enc_state", "enc_obs", "enc_p", "dec_p", "enc_d", "dec_d", "enc_ps"),
    *("avail_head", "end_head"),
)


def make_batch(discrete: bool = True) -> Batch:
    g = torch.Generator().manual_seed(1)
    avail = torch.ones(B, N, A)
    avail[:, 0, 1] = 0
    avail[:, 2, 2:] = 0
    choice = torch.multinomial(avail.flatten(0, 1), 1, generator=g).view(B, N)
    torques = torch.rand(B, N, A, generator=g) * 2 - 1
    return Batch(
        obs=torch.randn(B, N, O, generator=g),
        state=torch.randn(B, S, generator=g),
        actions=F.one_hot(choice, A).float() if discrete else torques,
        avail=avail if discrete else None,
        reward=torch.randn(B, generator=g),
        next_obs=torch.randn(B, N, O, generator=g),
        next_state=torch.randn(B, S, generator=g),
        next_avail=avail if discrete else None,
        terminated=(torch.arange(B) % 3 == 0).float(),
        steps=torch.ones(B),
    )


def make_statistics() -> dict[str, torch.Tensor]:
    """Of standardised data whose last two columns are 0 in half of the rows."""
    result = {}
    for name, shape in {"obs": (N, O), "state": (S,), "reward": ()}.items():
        for moment, value in {"mean": 0.0, "std": 1.0, "min": -9.0, "max": 9.0}.items():
            result[f"{name}_{moment}"] = torch.full(shape, value)
        result[f"{name}_zero"] = torch.zeros(shape)
    for name in ("obs", "state"):
        result[f"{name}_zero"][..., -2:] = 0.5
    return result


class Terms(TorchFunctionMode):
    """Keeps every scalar that is detached while it is on, with its graph."""

    def __init__(self):
        super().__init__()
        self.scalars = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.detach and args[0].dim() == 0:
            self.scalars.append(args[0])
        return func(*args, **(kwargs or {}))


def make_model(**options) -> LogoWM:
    torch.manual_seed(0)
    return LogoWM(N, O, S, A, hidden=16, statistics=make_statistics(), **options)


def take_apart(monkeypatch, **options):
    """(model, total, terms with their graphs)."""
    model, batch = make_model(**options), make_batch()
    batch.next_obs[::2, :, -1:] = batch.next_state[::2, -1:] = 0.0
    likelihoods, original = [], model.nll

    def listening(name, *args):
        likelihoods.append((name, original(name, *args)))
        return likelihoods[-1][1]

    monkeypatch.setattr(model, "nll", listening)
    with Terms() as listener:
        total, parts = model.loss(batch)
    terms = dict(zip(parts, listener.scalars, strict=True))
    assert all(terms[k].item() == v.item() for k, v in parts.items())
    encoder_p, encoder_d = (value for name, value in likelihoods if name == "obs")  # (B,N)
    loss_p, loss_d = terms.pop("L_p"), terms.pop("L_d")
    terms["L_p encoder"], terms["L_d encoder"] = (x.sum(1).mean() for x in (encoder_p, encoder_d))
    terms["L_p decoder"] = loss_p - terms["L_p encoder"]
    terms["L_d decoder"] = loss_d - terms["L_d encoder"]
    return model, total, terms


def gradients(term, net) -> list[torch.Tensor]:
    parameters = list(net.parameters())
    return torch.autograd.grad(
        term, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )


SETTINGS = {
    "default": {},
    "predicted": {"observe": "predicted"},
    "gaussian": {"zeros": False},
    "no heads": {"heads": False},
}


@pytest.fixture(scope="module", params=SETTINGS)
def apart(request):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield take_apart(monkeypatch, **SETTINGS[request.param])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("term", MOVES)
def test_a_term_moves_the_networks_of_the_table(apart, term, network):
    model, _, terms = apart
    if not model.heads and term in OF_HEADS:
        assert term not in terms
        return
    moved = [bool(g.any()) for g in gradients(terms[term], getattr(model, network))]
    assert moved == [network in MOVES[term]] * len(moved)


def test_the_table_names_every_sub_network_and_every_term(apart):
    model, _, terms = apart
    assert set(NETWORKS) == {name for name, _ in model.named_children()}
    assert set(MOVES) - (set() if model.heads else OF_HEADS) == set(terms)


def test_gradient_of_the_loss_is_the_sum_of_its_terms(apart):
    model, total, terms = apart
    whole = gradients(total, model)
    each = [gradients(term, model) for term in terms.values()]
    summed = [sum(column) for column in zip(*each, strict=True)]
    for a, b in zip(whole, summed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("deduce_from", ["obs", "obs+state"])
def test_the_routes_are_the_same_whatever_the_deduction_sees(monkeypatch, deduce_from):
    model, _, terms = take_apart(monkeypatch, deduce_from=deduce_from)
    for term, networks in MOVES.items():
        for name, net in model.named_children():
            moved = any(g.any() for g in gradients(terms[term], net))
            assert moved == (name in networks), (term, name)


def test_only_entries_that_may_be_0_have_a_probability_to_learn():
    model, batch = make_model(), make_batch()
    batch.next_obs[::2, :, -2:] = batch.next_state[::2, -2:] = 0.0
    total, _ = model.loss(batch)
    total.backward()
    ends = {"enc_p": O, "enc_d": O, "dec_d": S}
    for name, size in ends.items():
        last = getattr(model, name)[-1].bias.grad  # (N,1,2O), or (2S+1,)
        value, logit = last[..., :size], last[..., size : 2 * size]
        assert value.all() and logit[..., -2:].all() and not logit[..., :-2].any(), name
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_an_entry_that_is_0_does_not_move_its_mean():
    model, batch = make_model(), make_batch()
    value, logit = (torch.randn(B, N, O, requires_grad=True) for _ in range(2))
    batch.next_obs[::2] = 0.0
    model.nll("obs", batch.next_obs, Prediction(value, logit)).sum().backward()
    moved = value.grad.ne(0)
    assert moved[1::2].all() and moved[::2, :, :-2].all() and not moved[::2, :, -2:].any()
    pushed = logit.grad[..., -2:]  # down where an entry is 0, up where it is not
    assert (pushed[::2] > 0).all() and (pushed[1::2] < 0).all()


def test_predictions_depend_on_own_observation_and_action():
    model, batch = make_model(), make_batch()
    o, a = batch.obs.clone().requires_grad_(), batch.actions.clone().requires_grad_()
    predicted = model.predict(o, a, batch.state)
    for i, x in itertools.product(range(N), (predicted.value, predicted.logit[..., -2:])):
        for g in torch.autograd.grad(x[:, i].sum(), (o, a), retain_graph=True):
            assert g[:, i].any()
            assert not g[:, [j for j in range(N) if j != i]].any()


def test_each_agent_has_its_own_view_of_the_deduced_state():
    model, batch = make_model(), make_batch()
    before = model.look(batch.state, batch.reward)
    with torch.no_grad():
        for p in model.enc_d.parameters():
            p[1] += torch.randn_like(p[1])
    after = model.look(batch.state, batch.reward)
    assert before.value.shape == before.logit.shape == (B, N, O)
    for a, b in zip(before, after, strict=True):
        changed = a[..., -2:].ne(b[..., -2:])
        assert changed[:, 1].all() and not changed[:, [0, 2]].any()


@pytest.mark.parametrize("observe", ["deduced", "predicted"])
def test_what_agents_see_comes_from_e_d_or_from_e_p(observe):
    model, batch = make_model(observe=observe), make_batch()

    def seen():
        return model.step(batch.obs, batch.state, batch.actions)["mean_obs"]

    before = seen()
    with torch.no_grad():
        model.enc_d[-1].bias += 1.0
    assert torch.equal(seen(), before) == (observe == "predicted")


def test_using_the_model_leaves_no_graph_behind():
    model, batch = make_model(), make_batch()
    out = model.step(batch.obs, batch.state, batch.actions)
    assert not any(v.requires_grad for v in out.values())
    rolled = model.imagine(lambda *_: batch.actions, batch, 2, torch.Generator())
    assert not any(v.requires_grad for v in rolled.values())


# ----------------------------------------------------------------------------------- policy, critic


def build_policy(discrete: bool):
    torch.manual_seed(0)
    zero, one = torch.zeros(N, O), torch.ones(N, O)
    actor = Actor(zero, one, A, hidden=16, discrete=discrete)
    critic, target = (
        Critic(zero, one, torch.zeros(S), torch.ones(S), A, hidden=16, discrete=discrete)
        for _ in range(2)
    )
    return actor, critic, target, make_batch(discrete), (torch.arange(B) % 2).float()


def untouched(net) -> bool:
    return all(p.grad is None for p in net.parameters())


def fully_moved(net) -> bool:
    return all(p.grad is not None and bool(p.grad.any()) for p in net.parameters())


@pytest.mark.parametrize("backup", ["policy", "max"])
@pytest.mark.parametrize("conservative", ["logsumexp", "expectation"])
@pytest.mark.parametrize("discrete", [True, False])
def test_critic_loss_moves_the_critic_alone(discrete, conservative, backup):
    actor, critic, target, batch, is_real = build_policy(discrete)
    loss, parts = critic_loss(
        critic, target, actor, batch, is_real, 0.99, 1.0,
        noise=None if discrete else action_noise(batch.actions.shape, torch.Generator()),
        conservative=conservative, backup=backup,
    )  # fmt: skip
    loss.backward()
    assert fully_moved(critic) and untouched(actor) and untouched(target)
    assert not any(v.requires_grad for v in parts.values())


@pytest.mark.parametrize("term", ["value", "cloning"])
@pytest.mark.parametrize("discrete", [True, False])
def test_policy_loss_moves_the_actor_alone(discrete, term):
    actor, critic, _, batch, is_real = build_policy(discrete)
    used, weight = (critic, 0.0) if term == "value" else (None, 1.0)
    loss, parts = policy_loss(actor, used, batch, is_real, weight)
    loss.backward(inputs=list(actor.parameters()))
    assert fully_moved(actor) and untouched(critic)
    assert not any(v.requires_grad for v in parts.values())


@pytest.mark.parametrize("imagined_in", ["bellman", "value", "printed"])
def test_imagined_rows_are_cloned_as_the_paper_prints_it_alone(imagined_in):
    actor, _, _, batch, is_real = build_policy(True)
    actions = batch.actions.clone().requires_grad_()
    changed = batch._replace(actions=actions)
    loss, _ = policy_loss(actor, None, changed, is_real, 1.0, imagined_in=imagined_in)
    (g,) = torch.autograd.grad(loss, actions)
    assert g[is_real == 1].any()
    assert bool(g[is_real == 0].any()) == (imagined_in == "printed")


@pytest.mark.parametrize("imagined_in", ["bellman", "value", "printed"])
def test_imagined_states_improve_the_policy_if_asked(imagined_in):
    actor, critic, _, batch, is_real = build_policy(True)
    state = batch.state.clone().requires_grad_()
    changed = batch._replace(state=state)
    loss, _ = policy_loss(actor, critic, changed, is_real, 0.0, imagined_in=imagined_in)
    (g,) = torch.autograd.grad(loss, state)
    assert g[is_real == 1].any()
    assert bool(g[is_real == 0].any()) == (imagined_in != "bellman")


@pytest.mark.parametrize("imagined_in", ["bellman", "value", "printed"])
def test_imagined_rows_have_a_bellman_error_unless_as_printed(imagined_in):
    actor, critic, target, batch, is_real = build_policy(True)
    other = torch.where(is_real == 0, 5.0, 0.0)

    def part(batch):
        settings = (batch, is_real, 0.99, 1.0)
        loss = critic_loss(critic, target, actor, *settings, imagined_in=imagined_in)
        return loss[1]["td"].item()

    changed = batch._replace(state=batch.state + other[:, None], reward=batch.reward + other)
    assert (part(changed) == part(batch)) == (imagined_in == "printed")


@pytest.mark.parametrize("discrete", [True, False])
def test_the_recorded_critic_learns_from_recorded_rows_alone(discrete):
    actor, critic, target, batch, is_real = build_policy(discrete)

    def gradient(rows, recorded_critic=True):
        """By critic, (K,...), with other rewards in these rows."""
        changed = batch._replace(reward=batch.reward + rows)
        given = (changed, is_real, 0.99, 0.1, None, "expectation")
        loss, _ = critic_loss(critic, target, actor, *given, recorded_critic=recorded_critic)
        return torch.autograd.grad(loss, critic.net[0].weight)[0]

    imagined, plain = 1 - is_real, gradient(0.0)
    moved = (gradient(imagined) != plain).flatten(1).any(1)
    assert moved.tolist() == [True, False]  # the last critic does not see an imagined reward
    assert (gradient(is_real) != plain).flatten(1).any(1).all()
    both = gradient(imagined, False) != gradient(0.0, False)
    assert both.flatten(1).any(1).all()


@pytest.mark.parametrize("conservative", ["logsumexp", "expectation"])
@pytest.mark.parametrize("imagined_in", ["bellman", "value", "printed"])
def test_imagined_values_are_pushed_down_as_printed_alone(imagined_in, conservative):
    actor, critic, target, batch, is_real = build_policy(True)
    changed = batch._replace(state=batch.state + torch.where(is_real == 0, 5.0, 0.0)[:, None])

    def part(batch):
        settings = (batch, is_real, 0.99, 1.0, None, conservative, "policy", imagined_in)
        return critic_loss(critic, target, actor, *settings)[1]["gap"].item()

    assert (part(changed) == part(batch)) == (imagined_in != "printed")
