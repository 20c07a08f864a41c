"""CFCQL and the ensemble against their formulas, in loops of float64; what all baselines share."""

import csv
import importlib
import math

import numpy as np
import pytest
import torch
from conftest import TINY
from test_sync import make_data

import baselines
import macql
import train
from baselines import cfcql, ensemble, joint
from benchmark import errors, grid
from benchmark.rows import ROOT, Error, read

HERE = sorted(p.stem for p in (ROOT / "baselines").glob("*.py"))


@pytest.fixture
def parts():
    """(data, spec, batch, args): random transitions with discrete actions, some unavailable."""
    torch.manual_seed(0)
    data, spec = make_data(True)
    data.avail[:, :, 1] = data.actions[:, :, 1]  # available only where it was taken
    return data, spec, data.gather(data.train[:6]), cfcql.Args(hidden=8, updates=8)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


# ------------------------------------------------------------------------------------------- CFCQL


def test_counterfactual_values_and_weights_equal_the_formula(parts):
    data, spec, batch, args = parts
    learner = train.make_learner(args, spec, data)
    q_data, of_all = cfcql.values_of_all(learner.critic, batch, learner.actor, None, "logsumexp")
    q = learner.critic.utilities(batch.obs, batch.state)
    beta = learner.actor(batch.obs, batch.avail)
    weights = cfcql.agent_weights(q.mean(0), beta.detach(), batch.avail, 2.0)
    q, beta = q.detach().double().numpy(), beta.detach().double().numpy()
    for b in range(6):
        taken = batch.actions[b].argmax(-1).tolist()
        kl = []
        for i in range(spec.num_agents):
            allowed = [a for a in range(spec.action_dim) if batch.avail[b, i, a]]
            for k in range(2):
                others = sum(q[k, b, j, taken[j]] for j in range(spec.num_agents) if j != i)
                value = math.log(sum(math.exp(others + q[k, b, i, a]) for a in allowed))
                assert of_all[k, b, i].item() == pytest.approx(value, abs=1e-4)
            pi = softmax(np.array([q[:, b, i, a].mean() for a in allowed]))
            share = [p * math.log(p / beta[b, i, a]) for p, a in zip(pi, allowed, strict=True)]
            kl.append(sum(share))
        assert q_data[0, b].item() == pytest.approx(
            sum(q[0, b, j, taken[j]] for j in range(spec.num_agents)), abs=1e-4
        )
        np.testing.assert_allclose(weights[b], softmax(2.0 * np.array(kl)), atol=1e-4)


def test_alike_weights_are_macql_with_less_alpha(parts):
    """With LOGO's additive critic the full log-sum-exp is the sum of the agents'."""
    data, spec, batch, args = parts
    learner = train.make_learner(args, spec, data)
    ones, given = torch.ones(6), (learner.critic, learner.critic_target, learner.actor, batch)
    full, _ = learner.critic_loss(*given, ones, alpha=0.3)
    bellman = lambda *x: learner.critic_loss(*x, alpha=0.0)  # noqa: E731
    ours, _ = cfcql.critic_loss(
        *given, ones, bellman=bellman, beta=None, alpha=0.3 * spec.num_agents, temperature=1.0,
        conservative="logsumexp",
    )  # fmt: skip
    assert ours.item() == pytest.approx(full.item(), rel=1e-4)


def test_the_critics_loss_weighs_agents_and_real_rows(parts):
    """The values and weights in it are those of the test above."""
    data, spec, batch, args = parts
    learner = train.make_learner(args, spec, data)
    given = learner.critic, learner.critic_target, learner.actor, batch
    beta, is_real = learner.ema_actor, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    with torch.no_grad():
        beta.net[-1].weight.normal_(std=3.0)
        learner.critic.net[-1].weight.normal_(std=3.0)
    loss, _ = cfcql.critic_loss(
        *given, is_real, bellman=lambda *x: (torch.tensor(7.0), {}), beta=beta, alpha=0.3,
        temperature=2.0, conservative="logsumexp",
    )  # fmt: skip
    q_data, of_all = cfcql.values_of_all(learner.critic, batch, learner.actor, None, "logsumexp")
    q = learner.critic.utilities(batch.obs, batch.state).mean(0)
    weights = cfcql.agent_weights(q, beta(batch.obs, batch.avail), batch.avail, 2.0)
    assert (weights - 1 / spec.num_agents).abs().max() > 0.1
    expected = 7.0
    for k in range(2):
        for b in range(4):
            of_agents = sum(
                weights[b, i].item() * of_all[k, b, i].item() for i in range(spec.num_agents)
            )
            expected += 0.3 * (of_agents - q_data[k, b].item()) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_beta_learns_from_real_rows_alone(parts):
    data, spec, batch, args = parts
    args.updates, learners = 8, []
    for shift in (0, 1):  # other actions in the imagined rows
        torch.manual_seed(0)
        learners.append(cfcql.make_learner(args, spec, data))
        actions = batch.actions.clone()
        actions[3:] = actions[3:].roll(shift, -1)
        mixed = batch._replace(actions=actions, avail=torch.ones_like(batch.avail))
        is_real = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
        learners[-1].update(mixed, is_real, torch.Generator().manual_seed(0))
    first, second = (x.beta.state_dict() for x in learners)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("conservative", ["logsumexp", "expectation"])
def test_continuous_counterfactuals_replace_one_agent_at_a_time(conservative):
    torch.manual_seed(0)
    data, spec = make_data(False)
    batch, args = data.gather(data.train[:4]), cfcql.Args(hidden=8, updates=8)
    learner = train.make_learner(args, spec, data)
    noise = None
    draws, density = learner.actor(batch.obs, None).detach()[None], torch.zeros(1, 4, 2)
    if conservative == "logsumexp":
        noise = torch.rand(3, 2, *batch.actions.shape) * 2 - 1
        draws, density = macql.draws_and_density(batch, learner.actor, noise, (-1,))
    _, of_all = cfcql.values_of_all(learner.critic, batch, learner.actor, noise, conservative)
    for b in range(4):
        for i in range(spec.num_agents):
            values = []
            for m in range(len(draws)):
                actions = batch.actions[b : b + 1].clone()
                actions[0, i] = draws[m, b, i]
                q = learner.critic(batch.obs[b : b + 1], batch.state[b : b + 1], actions)[1, 0]
                values.append(math.exp(q.item() - density[m, b, i].item()))
            assert of_all[1, b, i].item() == pytest.approx(math.log(np.mean(values)), abs=1e-4)


# ------------------------------------------------------------------------------------ the ensemble


def test_the_ensembles_likelihood_and_doubt_equal_the_formula(parts):
    data, spec, batch, _ = parts
    rows = joint.JointRows(spec, data, 8)
    model = ensemble.Ensemble(rows, hidden=8, members=3)
    out, log_var = model.net(rows.inputs(batch.obs, batch.state, batch.actions))
    nll = rows.nll(out, batch, log_var)
    mean, var = out.detach().double().numpy(), log_var.detach().double().exp().numpy()
    before = rows.values(batch.obs, batch.state, batch.reward).double().numpy()
    after = rows.values(batch.next_obs, batch.next_state, batch.reward).double().numpy()
    raw = torch.cat([batch.next_state, batch.next_obs.flatten(1)], -1)
    d, sometimes = rows.num_values, [*rows.state_sometimes_zero.tolist()]
    sometimes += rows.obs_sometimes_zero.flatten().tolist()
    assert any(sometimes) and d == before.shape[1]
    for m in range(3):
        for b in range(6):
            total = 0.0
            for j in range(d):
                last = j == d - 1
                change = after[b, j] - (0.0 if last else before[b, j])
                error = (change - mean[m, b, j]) ** 2 / var[m, b, j] + math.log(var[m, b, j])
                if last:
                    total += 0.5 * error * (1 - batch.terminated[b].item())
                    continue
                p = 1 / (1 + math.exp(-mean[m, b, d + j]))
                is_zero = sometimes[j] and raw[b, j].item() == 0
                total += 0.0 if is_zero else 0.5 * error
                if sometimes[j]:
                    total -= math.log(1 - p if is_zero else p)
            assert nll[m, b].item() == pytest.approx(total / d, rel=1e-4, abs=1e-5)
    u = model.step(batch.obs, batch.state, batch.actions)["uncertainty"]
    for j in range(d - 1):  # sigma counts with the probability that the value is not 0
        var[:, :, j] /= 1 + np.exp(-mean[:, :, d + j]) if sometimes[j] else 1.0
    widest = np.sqrt(var.mean(-1)).max(0) * rows.reward_std.item()
    np.testing.assert_allclose(u, widest, rtol=1e-4)


def test_the_ensembles_loss_is_of_all_members_and_their_bounds(parts):
    data, spec, batch, _ = parts
    rows = joint.JointRows(spec, data, 8)
    model = ensemble.Ensemble(rows, hidden=8, members=3)
    with torch.no_grad():
        model.net.max_log_var.uniform_(0, 1)
        model.net.min_log_var.uniform_(-5, -3)
    out, log_var = model.net(rows.inputs(batch.obs, batch.state, batch.actions))
    expected = rows.heads_loss(out.mean(0), batch).item()
    for m in range(3):
        expected += rows.nll(out, batch, log_var)[m].mean().item()
    for high, low in zip(model.net.max_log_var, model.net.min_log_var, strict=True):
        expected += 0.005 * (high - low).item()  # half of the code's, as the likelihood
    assert model.loss(batch)[0].item() == pytest.approx(expected, rel=1e-5)


def test_a_sampled_step_is_of_any_member_with_its_spread(parts):
    """All weights are 0 and member m predicts changes of 10 m, with a spread of .1 (m + 1)."""
    data, spec, batch, _ = parts
    rows = joint.JointRows(spec, data, 8, zeros=False)
    model, d = ensemble.Ensemble(rows, hidden=8, members=3), rows.num_values
    with torch.no_grad():
        for x in (*model.net.weights, *model.net.biases):
            x.zero_()
        for m in range(3):
            model.net.biases[-1][m, 0, :d] = 10.0 * m
            model.net.biases[-1][m, 0, d:] = 2 * math.log(0.1 * (m + 1))
    given = [x[:1].repeat(3000, *[1] * (x.ndim - 1)) for x in batch[:3]]
    out = model.step(*given, torch.Generator().manual_seed(0))
    change = rows.standardise("state", out["next_state"]) - rows.standardise("state", given[1])
    member = (change / 10).round().mean(-1)
    for m in range(3):
        mine = change[member == m]
        assert len(mine) == pytest.approx(1000, abs=100)
        assert mine.std(0) == pytest.approx(torch.full((spec.state_dim,), 0.1 * (m + 1)), rel=0.1)


def test_an_ensembles_rollout_is_sampled_and_repeats(parts):
    data, spec, batch, _ = parts
    model = ensemble.Ensemble(joint.JointRows(spec, data, 8), hidden=8, members=3)
    actor = train.make_learner(train.Args(hidden=8, updates=8), spec, data).actor
    one, same, other = (
        model.imagine(actor.sample, batch, 3, torch.Generator().manual_seed(k)) for k in (0, 0, 1)
    )
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["state"], other["state"])
    assert one["state"].shape == (4, 6, spec.state_dim) and one["valid"].shape == (3, 6)
    low, high = data.statistics()["state_min"], data.statistics()["state_max"]
    assert ((one["state"] >= low - 1e-5) & (one["state"] <= high + 1e-5)).all()  # D4


# ------------------------------------------------------------------------------------- the command


def test_the_grid_knows_every_file():
    assert sorted([*grid.BASELINES, "__init__", "joint"]) == HERE
    for name in grid.BASELINES:
        kind = importlib.import_module(f"baselines.{name}").Args
        flags = {*vars(kind(seed=1))}
        assert {*kind.NO_EFFECT} <= flags, name
        makes_world_model = hasattr(
            importlib.import_module(f"baselines.{name}"), "make_world_model"
        )
        assert makes_world_model == (name in grid.WORLD_MODELS)


def test_a_grid_starts_a_baseline_with_its_own_flags(tmp_path):
    run, other = grid.plan(["2s3z"], ["medium"], ["ensemble", "cfcql"], [1], "--lr 0.1", tmp_path)
    assert run.program == ["-m", "baselines.ensemble"] and run.variant == "--lr 0.1"
    assert run.args.uncertainty == "penalty" and other.args.temperature == 0.5


@pytest.mark.parametrize("name", ["cfcql", "planning"])
def test_a_run_ends_and_goes_on_after_a_kill(name, dataset, tmp_path, killed, undrawn):
    module = importlib.import_module(f"baselines.{name}")

    def go(folder: str, *more: str) -> dict:
        part = {"learner": cfcql.make_learner} if name == "cfcql" else module.builders()
        given = [*TINY, "--u-scale", "0.25" if name == "planning" else "5", "--horizon", "15"]
        given += ["--dataset", str(dataset), "--out", str(tmp_path / folder), *more]
        return baselines.run(name, module.Args, None, given, **part)

    final = go("whole")
    assert final["method"] == name and final["eval"]["episodes"] == 16
    rows = list(csv.DictReader((tmp_path / "whole" / "metrics.csv").open()))
    assert rows and all(math.isfinite(float(row["value"])) for row in rows)
    # 6 updates of the clone, with a model 4 of it, and after 4 of 6 of the policy it dies
    killed(lambda: go("killed"), 10 if name == "cfcql" else 14)
    assert go("killed", "--resume")["eval"] == final["eval"]
    whole, again = (
        torch.load(tmp_path / x / "checkpoint.pt", weights_only=True) for x in ("whole", "killed")
    )
    for part in ("learner", "bc_actor", *(["world_model"] if name != "cfcql" else [])):
        torch.testing.assert_close(whole[part], again[part], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cfcql", "ensemble"])
def test_self_checks_pass(name):
    module = importlib.import_module(f"baselines.{name}")
    assert baselines.run(name, module.Args, module._self_check, ["--self-check"]) is None


@pytest.mark.parametrize("flags", [["--paper"], ["--critic", "none"]])
def test_a_flag_without_effect_is_refused(flags, capsys):
    with pytest.raises(SystemExit, match="is not for cfcql"):
        baselines.run("cfcql", cfcql.Args, cfcql._self_check, flags, learner=cfcql.make_learner)


@pytest.mark.parametrize(
    "name,flags",
    [
        ("cfcql", "--env-id Ant-2x4 --temperature 2"),
        ("omar", "--env-id 2s3z --cql-samples 2"),
    ],
)
def test_flags_are_refused_where_they_have_no_effect(name, flags):
    kind = importlib.import_module(f"baselines.{name}").Args
    with pytest.raises(SystemExit, match=f"is not for {name} on {flags.split()[1]}: leave it out"):
        baselines.run(name, kind, None, flags.split())


def test_a_world_model_without_imagined_rows_is_refused():
    with pytest.raises(SystemExit, match="--synthetic-fraction 0 leaves MACQL"):
        baselines.run("ensemble", ensemble.Args, None, ["--synthetic-fraction", "0"],
                      world_model=ensemble.make_world_model)  # fmt: skip


def test_errors_are_recorded_once(dataset, tmp_path):
    file = tmp_path / "errors.csv"
    given = {"dataset": dataset, "models": ("logo", "ensemble")}
    flags = "--wm-updates 3 --hidden 8 --wm-batch-size 8 --threads 1"
    errors.errors(**given, flags=flags, results=file)
    rows = read(file, Error)
    assert [r.method for r in rows] == ["logo", "ensemble"] and min(r.rows for r in rows) > 0
    before = file.read_bytes()
    errors.errors(**given, flags=flags, results=file)  # nothing is trained twice
    assert file.read_bytes() == before
    errors.errors(**given, flags=flags.replace("updates 3", "updates 2"), results=file)
    assert {r.wm_updates for r in read(file, Error)} == {2}
    with pytest.raises(ValueError, match="--other is expert, as --quality"):
        errors.errors(quality="expert", other="expert", results=file)
