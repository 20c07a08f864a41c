"""MACQL+MPC: the chosen action and the loss against loops, and what planning sees."""

from types import SimpleNamespace

import pytest
import torch
from test_sync import Reads, make_data

import baselines
from baselines import planning
from buffer import mix
from logo_wm import LogoWM


@pytest.fixture(params=[True, False], ids=["discrete", "continuous"])
def made(request):
    """(args, learner, batch): `planning.Planning` with its world model, six recorded rows."""
    torch.manual_seed(0)
    data, spec = make_data(request.param)
    args = planning.Args(hidden=8, updates=8, conservative="expectation", critic_first=0.0,
                         planning_horizon=3, candidates=3, batch_size=6,
                         rollout_batch_size=5)  # fmt: skip
    build = planning.builders()
    learner = build["learner"](args, spec, data)
    model = build["world_model"](args, spec, data)
    assert learner.model is model and isinstance(model, LogoWM)
    return args, learner, data.gather(data.train[:6])


def test_the_best_candidate_is_the_one_a_loop_finds(made):
    """The model replaced by one whose rewards and ends are known for every first action."""
    args, planned, batch = made
    learner, calls = planned.learner, []

    def imagine(policy, starts, horizon, generator):
        first = policy(starts.obs, starts.avail, generator)
        then = policy(starts.obs, starts.avail, generator)  # the greedy policy goes on
        torch.testing.assert_close(then, learner.actor.greedy(starts.obs, starts.avail))
        reward = torch.rand(horizon, len(first), generator=torch.Generator().manual_seed(1))
        ends = torch.arange(len(first)) % (horizon + 1)  # in this step; the last number: never
        steps = torch.arange(horizon).unsqueeze(-1)
        rollout = {
            "obs": torch.stack([starts.obs + h for h in range(horizon + 1)]),
            "state": torch.stack([starts.state - h for h in range(horizon + 1)]),
            "reward": reward, "terminated": (steps == ends).float(),
            "valid": (steps <= ends).float(),
        }  # fmt: skip
        if starts.avail is not None:
            rollout["avail"] = torch.stack([starts.avail] * (horizon + 1))
        calls.append((first, rollout))
        return rollout

    planned.model = SimpleNamespace(imagine=imagine)
    best = planned.plan(planned.model, learner, batch, generator=torch.Generator().manual_seed(0))
    (first, rollout), b = calls[0], len(batch.reward)
    greedy = learner.actor.greedy(batch.obs, batch.avail)
    torch.testing.assert_close(first[:b], greedy)  # the first candidate
    assert not torch.equal(first[b : 2 * b], first[2 * b :])
    chosen = []
    for k in range(b):
        returns = []
        for c in range(3):
            total, running = 0.0, True
            for h in range(3):
                if running:
                    total += args.gamma**h * rollout["reward"][h, c * b + k].item()
                    running = rollout["terminated"][h, c * b + k].item() == 0
            if running:
                obs, state = (rollout[n][-1, c * b + k].unsqueeze(0) for n in ("obs", "state"))
                avail = None if batch.avail is None else batch.avail[k : k + 1]
                action = learner.actor.greedy(obs, avail)
                total += args.gamma**3 * learner.critic_target(obs, state, action).min().item()
            returns.append(total)
        chosen.append(returns.index(max(returns)))
        torch.testing.assert_close(best[k], first[chosen[-1] * b + k])
    assert len(set(chosen)) > 1, "the test must have more than one winner"


def test_the_loss_is_macqls_plus_the_squared_distance(made):
    args, planned, batch = made
    learner = planned.learner
    best, ones = torch.rand_like(batch.actions), torch.ones(6)
    given = learner.actor, learner.critic, batch, ones
    base, _ = planned.policy_loss(*given)
    loss, parts = planning.mpc_loss(
        *given,
        policy_loss=planned.policy_loss,
        obs=batch.obs,
        avail=batch.avail,
        best=best,
        weight=args.mpc_weight,
    )
    pi = learner.actor(batch.obs, batch.avail).double()
    total = 0.0
    for b in range(6):
        for i in range(pi.shape[1]):
            total += sum((x - y) ** 2 for x, y in zip(pi[b, i].tolist(), best[b, i].tolist(),
                                                      strict=True)) / 6  # fmt: skip
    if not learner.actor.discrete:
        total /= pi.shape[1]
    assert parts["mpc"].item() == pytest.approx(total, rel=1e-4)
    assert loss.item() == pytest.approx(base.item() + total, rel=1e-4)


def test_imagined_rows_are_left_out_and_planning_waits_for_them(made):
    """Nothing is planned on real rows alone; imagined rows reach neither plan nor losses."""
    args, planned, batch = made
    seen = []

    def plan(model, learner, starts, generator):
        seen.append(len(starts.reward))
        return torch.zeros_like(starts.actions)

    planned.plan, planned.interval = plan, 2
    before = {k: v.clone() for k, v in planned.actor.state_dict().items()}
    metrics = planned.update(batch, torch.ones(6), torch.Generator().manual_seed(0))
    assert seen == [] and metrics["pi_mpc"] == 0
    spoiled = batch._replace(reward=batch.reward + torch.nan, obs=batch.obs + torch.nan)
    both, is_real = mix(batch, spoiled)
    metrics = planned.update(both, is_real, torch.Generator().manual_seed(0))
    for _ in range(2):  # the second update uses the first search, the third its own
        planned.update(both, is_real, torch.Generator().manual_seed(0))
    assert seen == [args.rollout_batch_size] * 2 and all(
        torch.isfinite(x) for x in metrics.values()
    )
    assert any(not torch.equal(before[k], v) for k, v in planned.actor.state_dict().items())


def test_an_update_reads_no_value(made, one_hot_as_on_a_gpu):
    _, planned, batch = made
    with Reads() as reads:
        planned.update(*mix(batch, batch), torch.Generator().manual_seed(0))
    assert reads.seen == []


@pytest.mark.parametrize("flags", ["--imagined-rows printed", "--horizon 5"])
def test_flags_without_effect_are_refused(flags):
    with pytest.raises(SystemExit, match=f"{flags.split()[0]} is not for planning"):
        baselines.run("planning", planning.Args, None, flags.split())


def test_the_self_check_passes():
    planning._self_check()
