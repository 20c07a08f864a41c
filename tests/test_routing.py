"""Which term of the losses moves which sub-network, against a table written from the paper.

`LogoWM.loss` returns the sum and detached parts. To take the terms apart without touching the
code, `Terms` listens to torch while the loss is computed: it keeps each tensor that is detached
into `parts`, with its graph, and what `gaussian_nll` returned, so that Eq. (2) and (3) fall into
encoder and decoder.
"""

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import logo_wm
from buffer import Batch
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
    "L_done": {"done_head"},
    "L_avail": {"avail_head"},
}
NETWORKS = (
    *("enc_state", "enc_obs", "enc_p", "dec_p", "enc_d", "dec_d", "enc_ps"),
    *("avail_head", "done_head"),
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
    )


class Terms(TorchFunctionMode):
    """Keeps every scalar that is detached while it is on, with its graph."""

    def __init__(self):
        super().__init__()
        self.scalars = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.detach and args[0].dim() == 0:
            self.scalars.append(args[0])
        return func(*args, **(kwargs or {}))


def take_apart(monkeypatch, **options):
    """(model, total, terms with their graphs)."""
    torch.manual_seed(0)
    model = logo_wm.LogoWM(N, O, S, A, hidden=16, **options)
    likelihoods, original = [], logo_wm.gaussian_nll

    def listening(*args):
        likelihoods.append(original(*args))
        return likelihoods[-1]

    monkeypatch.setattr(logo_wm, "gaussian_nll", listening)
    with Terms() as listener:
        total, parts = model.loss(make_batch())
    terms = dict(zip(parts, listener.scalars, strict=True))
    assert all(terms[k].item() == v.item() for k, v in parts.items())
    encoder_p, encoder_d, _ = likelihoods
    loss_p, loss_d = terms.pop("L_p"), terms.pop("L_d")
    terms["L_p encoder"], terms["L_d encoder"] = encoder_p.sum(1).mean(), encoder_d.mean()
    terms["L_p decoder"] = loss_p - terms["L_p encoder"]
    terms["L_d decoder"] = loss_d - terms["L_d encoder"]
    return model, total, terms


def gradients(term, net) -> list[torch.Tensor]:
    parameters = list(net.parameters())
    return torch.autograd.grad(
        term, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )


@pytest.fixture(scope="module", params=["obs", "next_obs"])
def apart(request):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield take_apart(monkeypatch, eq4_input=request.param)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("term", MOVES)
def test_a_term_moves_the_networks_of_the_table(apart, term, network):
    model, _, terms = apart
    moved = [bool(g.any()) for g in gradients(terms[term], getattr(model, network))]
    assert moved == [network in MOVES[term]] * len(moved)


def test_the_table_names_every_sub_network_and_every_term(apart):
    model, _, terms = apart
    assert set(NETWORKS) == {name for name, _ in model.named_children()}
    assert set(MOVES) == set(terms)


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


def test_predictions_depend_on_own_observation_and_action():
    torch.manual_seed(0)
    model, batch = logo_wm.LogoWM(N, O, S, A, hidden=16), make_batch()
    o, a = batch.obs.clone().requires_grad_(), batch.actions.clone().requires_grad_()
    o_hat = model.predict(o, a, batch.state)
    for i in range(N):
        for g in torch.autograd.grad(o_hat[:, i].sum(), (o, a), retain_graph=True):
            assert g[:, i].any()
            assert not g[:, [j for j in range(N) if j != i]].any()


def test_using_the_model_leaves_no_graph_behind():
    torch.manual_seed(0)
    model, batch = logo_wm.LogoWM(N, O, S, A, hidden=16), make_batch()
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


@pytest.mark.parametrize("bc_on,reached", [("real", False), ("both", True)])
def test_bc_on_chooses_the_rows_that_are_cloned(bc_on, reached):
    actor, _, _, batch, is_real = build_policy(True)
    actions = batch.actions.clone().requires_grad_()
    loss, _ = policy_loss(actor, None, batch._replace(actions=actions), is_real, 1.0, bc_on=bc_on)
    (g,) = torch.autograd.grad(loss, actions)
    assert g[is_real == 1].any()
    assert bool(g[is_real == 0].any()) == reached


@pytest.mark.parametrize("rows", ["real", "both"])
def test_bellman_on_chooses_the_rows_of_the_bellman_error(rows):
    actor, critic, target, batch, is_real = build_policy(True)
    other = torch.where(is_real == 0, 5.0, 0.0)

    def part(batch):
        settings = (batch, is_real, 0.99, 1.0)
        return critic_loss(critic, target, actor, *settings, bellman_on=rows)[1]["td"].item()

    changed = batch._replace(state=batch.state + other[:, None], reward=batch.reward + other)
    assert (part(changed) == part(batch)) == (rows == "real")
