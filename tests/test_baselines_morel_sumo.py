"""MOReL's unknown steps and SUMO's distances, each against a loop; and both as world models."""

import itertools
import math
from functools import partial

import pytest
import torch
from conftest import TINY
from test_sync import make_data

import baselines
from baselines import morel, sumo
from baselines.ensemble import Ensemble
from baselines.joint import JointRows
from experiment.folder import read_checkpoint


def make_morel(discrete=True, seed=0, heads=True, clamp=True, **options) -> tuple:
    """(MOReL, data) on 60 random transitions of two agents; nothing is trained."""
    torch.manual_seed(seed)
    data, spec = make_data(discrete)
    rows = JointRows(spec, data, 8, heads=heads, clamp=clamp)
    return morel.MOReL(rows, data, hidden=16, members=3, **options), data


def make_sumo(discrete=True, seed=0, **options) -> tuple:
    torch.manual_seed(seed)
    data, spec = make_data(discrete)
    ensemble = Ensemble(JointRows(spec, data, 8), hidden=16, members=3)
    return sumo.SUMO(ensemble, data, **options), data


def policy(obs, avail, generator):
    """Random actions, one-hot where `avail` says that they are discrete."""
    if avail is None:
        return torch.rand(*obs.shape[:2], 3, generator=generator) * 2 - 1
    return torch.eye(3)[torch.randint(3, obs.shape[:2], generator=generator)]


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------- MOReL: unknown


def naive_disc(model: morel.MOReL, obs, state, actions) -> list[float]:
    """Each row's largest distance between two members, from one member and number at a time."""
    rows, result = model.rows, []
    n, o, s, _ = rows.sizes
    low = {"state": -rows.state_mean / rows.state_std, "obs": -rows.obs_mean / rows.obs_std}
    zero = torch.cat([low["state"], low["obs"].flatten()]).tolist()  # 0, standardised
    sometimes = torch.cat([rows.state_sometimes_zero, rows.obs_sometimes_zero.flatten()]).tolist()
    out = model(obs, state, actions).double()
    now = torch.cat([rows.standardise("state", state), rows.standardise("obs", obs).flatten(1)], -1)
    for b in range(len(obs)):
        predictions = []
        for member in out[:, b].tolist():
            changes, logits, seen = member[: s + n * o], member[s + n * o + 1 :], []
            for k, change in enumerate(changes):
                p = 1 / (1 + math.exp(-logits[k])) if sometimes[k] else 1.0
                seen.append(p * (now[b, k].item() + change) + (1 - p) * zero[k])
            predictions.append(seen)
        result.append(max(math.dist(x, y) for x, y in itertools.combinations(predictions, 2)))
    return result


@pytest.mark.parametrize("discrete", [True, False])
def test_disc_and_the_threshold_are_those_of_a_loop(discrete, monkeypatch):
    monkeypatch.setattr(morel, "CHUNK", 7)  # the last chunk is a shorter one
    model, data = make_morel(discrete, coefficient=1.2)
    batch = data.gather(data.train)
    naive = naive_disc(model, batch.obs, batch.state, batch.actions)
    assert model.threshold.isinf()
    model.measure_threshold()
    assert model.threshold.item() == pytest.approx(max(naive) / 1.2, rel=1e-4)
    out = model.step(batch.obs, batch.state, batch.actions)
    assert out["uncertainty"].tolist() == pytest.approx(naive, rel=1e-3, abs=1e-4)
    unknown = torch.tensor(naive) > model.threshold
    assert 0 < unknown.sum() < len(naive)
    assert (out["terminated"][unknown] == 1).all()


def test_the_threshold_is_from_rows_at_even_distances(monkeypatch):
    model, data = make_morel()
    monkeypatch.setattr(morel, "MEASURED", 20)
    rows, seen = data.train, []
    assert len(rows) == 50
    monkeypatch.setattr(data, "gather", lambda x, f=data.gather: (seen.append(x), f(x))[1])
    model.measure_threshold()
    assert torch.cat(seen).tolist() == rows[::3].tolist()


def test_recorded_rows_are_known_and_states_far_away_are_not():
    model, data = make_morel(coefficient=1.0)
    model.measure_threshold()
    batch = data.gather(data.train)
    known = model.step(batch.obs, batch.state, batch.actions)
    assert (known["uncertainty"] <= model.threshold * (1 + 1e-5)).all()
    far = model.step(batch.obs + 100, batch.state + 100, batch.actions)
    assert (far["uncertainty"] > model.threshold).all() and (far["terminated"] == 1).all()


@pytest.mark.parametrize("heads,clamp", [(True, True), (False, True), (True, False)])
def test_a_rollout_ends_with_the_first_unknown_step(heads, clamp):
    model, data = make_morel(heads=heads, clamp=clamp, kappa=0.5)
    low, high = data.reward[data.train].min(), data.reward[data.train].max()
    halt = (low - 0.5 * (high - low)).item()
    starts, rollouts = data.sample(200, generator()), []
    for quantile in (None, 0.7):
        u = rollouts[0]["uncertainty"] if rollouts else torch.tensor(1e9)
        model.threshold.copy_(u.quantile(quantile) if quantile else u)
        rollouts.append(model.imagine(policy, starts, 6, generator(1)))
    free, cut = rollouts
    assert not clamp or (free["reward"] > halt).all(), "HALT's is outside of the data's range"
    assert free["uncertainty"].equal(cut["uncertainty"])  # the same steps, but for their ends
    unknown, reasons = cut["uncertainty"] > model.threshold, set()
    for b in range(200):
        running = True
        for h in range(6):
            assert cut["valid"][h, b] == running
            halts = running and unknown[h, b].item()
            if running:
                wanted = halt if halts else free["reward"][h, b].item()
                assert cut["reward"][h, b].item() == pytest.approx(wanted)
                assert cut["terminated"][h, b] == (1.0 if halts else free["terminated"][h, b])
                reasons.add("halt" if halts else "end" if cut["terminated"][h, b] else "goes on")
            assert halts or cut["reward"][h, b].item() != pytest.approx(halt)
            running = running and not cut["terminated"][h, b]
    assert reasons == ({"halt", "end", "goes on"} if heads else {"halt", "goes on"})


def test_one_member_makes_a_whole_rollout():
    model, data = make_morel(discrete=False, clamp=False, coefficient=0.0)
    rollout = model.imagine(policy, data.sample(40, generator()), 4, generator(1))
    makers = torch.ones(3, 40, dtype=torch.bool)
    for h in range(4):
        obs, state, actions = (rollout[k][h] for k in ("obs", "state", "actions"))
        out = model(obs, state, actions)
        for m in range(3):
            s_next = model.rows.outcome(out[m], obs, state)["next_state"]
            makers[m] &= (s_next - rollout["state"][h + 1]).abs().amax(-1) < 1e-4
    assert (makers.sum(0) == 1).all() and (makers.sum(1) > 0).all()
    assert model.threshold.isinf(), "with the coefficient 0 every step is known"


def test_a_model_takes_over_the_threshold():
    model, data = make_morel()
    starts = data.sample(20, generator())
    first = model.imagine(policy, starts, 3, generator(1))
    other, _ = make_morel(seed=1)
    other.load_state_dict(model.state_dict())
    assert other.threshold == model.threshold and model.threshold.isfinite()
    for again in (model, other):
        again.measure_threshold = None  # it is measured once
        rollout = again.imagine(policy, starts, 3, generator(1))
        assert all(rollout[k].equal(first[k]) for k in first)


# --------------------------------------------------------------------------------- SUMO: distances


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("neighbours,reference_rows", [(1, 1000), (3, 20)])
def test_u_is_that_of_a_search_by_a_loop(discrete, neighbours, reference_rows, monkeypatch):
    monkeypatch.setattr(sumo, "CHUNK", 7)
    options = {"neighbours": neighbours, "reference_rows": reference_rows}
    model, data = make_sumo(discrete, **options)
    assert len(model.reference) == min(reference_rows, 50)
    statistics, batch = data.statistics(), data.sample(30, generator())
    out = model.step(batch.obs, batch.state, batch.actions, generator(1))

    def point(s, a, s_next) -> list[float]:
        mean, std = (statistics[f"state_{k}"].double() for k in ("mean", "std"))
        return torch.cat([(s - mean) / std, a.flatten().double(), (s_next - mean) / std]).tolist()

    rows = data.train.tolist()
    recorded = [point(data.state[r], data.actions[r], data.state[r + 1]) for r in rows]
    if reference_rows < 50:  # which ones is the model's choice; all are recorded
        found = [min(recorded, key=partial(math.dist, x)) for x in model.reference.tolist()]
        assert len({tuple(x) for x in found}) == reference_rows
        assert torch.allclose(torch.tensor(found), model.reference, atol=1e-4)
        recorded = found
    for b in range(30):
        x = point(batch.state[b], batch.actions[b], out["next_state"][b])
        distance = sorted(math.dist(x, y) for y in recorded)[neighbours - 1]
        u = math.log(1 + distance) * statistics["reward_std"].item()
        assert out["uncertainty"][b].item() == pytest.approx(u, rel=1e-4)


def test_u_grows_with_the_distance():
    model, data = make_sumo()
    steps = []
    for shift in (0.0, 1.0, 5.0, 25.0):
        point = model.reference + shift
        steps.append(model.distance(point).mean().item())
    assert steps[0] == pytest.approx(0, abs=1e-5) and steps == sorted(set(steps))


def test_the_reference_rows_are_the_same_in_every_run():
    model, data = make_sumo(reference_rows=20)
    other = sumo.SUMO(model.ensemble, data, reference_rows=20)  # later in the same random numbers
    assert other.reference.equal(model.reference)
    other, _ = make_sumo(seed=1, reference_rows=20)  # other data
    other.load_state_dict(model.state_dict())
    starts = data.sample(20, generator())
    rollouts = [m.imagine(policy, starts, 3, generator(1)) for m in (model, other)]
    assert all(rollouts[0][k].equal(rollouts[1][k]) for k in rollouts[0])
    with pytest.raises(ValueError, match="--neighbours is 9, but only 5 rows are there."):
        make_sumo(neighbours=9, reference_rows=5)


# ------------------------------------------------------------------------------------ both of them


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("make", [make_morel, make_sumo])
def test_every_part_that_predicts_is_trained(make, discrete):
    model, data = make(discrete)
    loss, metrics = model.loss(data.sample(32, generator()))
    loss.backward()
    assert loss.isfinite() and all(x.isfinite() for x in metrics.values())
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("module", [morel, sumo])
def test_a_run_ends_with_a_score(module, dataset, tmp_path):
    name, folder = module.__name__.split(".")[1], tmp_path / "run"
    flags = [*TINY, "--eval-every", "6", "--wm-hidden", "16", "--members", "3"]
    flags += ["--dataset", str(dataset), "--out", str(folder)]
    parts = {"world_model": module.make_world_model}
    final = baselines.run(name, module.Args, module._self_check, flags, **parts)
    assert final["method"] == name and 0 <= final["eval"]["return_mean"] <= 20
    errors = final["world_model"]
    assert all(math.isfinite(x) for x in (errors["state_mse"], *errors["rollout"]["reward"]))
    values = [row.split(",")[-1] for row in (folder / "metrics.csv").read_text().splitlines()[1:]]
    assert values and all(math.isfinite(float(x)) for x in values)
    kept = read_checkpoint(folder / "checkpoint.pt")["world_model"]
    assert kept["threshold" if module is morel else "reference"].isfinite().all()


@pytest.mark.parametrize("module", [morel, sumo])
def test_the_self_check_passes(module, capsys):
    module._self_check()
    assert "ten units away" in capsys.readouterr().out
