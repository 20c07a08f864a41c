"""Measures on recorded data: errors of a world model, and a policy compared with the recording.

Errors are mean squared errors in units of the data's variance; constant columns count as 0, so that
always predicting the mean has about 1 on robots and less on maps. They are taken on held-out
episodes, which no update has seen; only `rollout_sanity` and td_train are on training rows.

A world model is any object with `imagine(policy, starts, horizon, generator) -> rollout`, whose
arguments and result `logo_wm.LogoWM.imagine` describes; `policy` is called once per step. What
only LogoWM has, the direct prediction of E_ps and the decoder R_d, is measured for LogoWM alone.

Sizes: B rows, N agents, O observation, S state, A action, H horizon, R rows of the whole dataset.
"""

from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats
import torch

from buffer import OfflineDataset
from logo_wm import LogoWM
from macql import Actor, Standardise


def generator_for(data: OfflineDataset) -> torch.Generator:
    """Random numbers on the data's device, the same at every call."""
    return torch.Generator(data.obs.device).manual_seed(0)


def replay(actions: Sequence[torch.Tensor]) -> Callable:
    """A policy that ignores what it sees and takes actions[0], actions[1], ... (B,N,A), in turn."""
    steps = iter(actions)
    return lambda obs, avail, generator: next(steps)


def standardiser(data: OfflineDataset) -> Callable:
    """A function (name, x) -> (x - mean) / std, with the statistics of the training rows.

    `name` is obs, state or reward. Constant columns are only centred.
    """
    x = data.statistics()
    units = {k: Standardise(x[f"{k}_mean"], x[f"{k}_std"]) for k in ("obs", "state", "reward")}
    return lambda name, value: units[name](value)


def squared_error(data: OfflineDataset) -> Callable:
    """A function (name, prediction, truth) -> mean squared error in standardised units, a float."""
    standardise = standardiser(data)

    def error(name: str, prediction: torch.Tensor, truth: torch.Tensor) -> float:
        difference = standardise(name, prediction) - standardise(name, truth)
        return difference.square().mean().item()

    return error


def rank_correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Spearman's rank correlation of two vectors (B,); NaN where one of them is constant."""
    ranks = [scipy.stats.rankdata(v.cpu().numpy(), nan_policy="propagate") for v in (x, y)]
    if min(np.ptp(r) for r in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


# --------------------------------------------------------------------------------------------------
# World models
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict_held_out(model, data: OfflineDataset) -> dict[str, torch.Tensor]:
    """One step from every held-out row with its recorded action; raw units.

    Returns:
        next_obs (B,N,O), next_state (B,S), reward (B,); uncertainty (B,).
        A model with a `step` adds its other entries; its predictions are expected values, not
        clamped.
    """
    batch = data.gather(data.held_out)
    if hasattr(model, "step"):
        out = model.step(batch.obs, batch.state, batch.actions)
        return out | {"next_obs": out["mean_obs"], "next_state": out["mean_state"]}
    rollout = model.imagine(replay([batch.actions]), batch, 1, generator_for(data))
    return {
        "next_obs": rollout["obs"][1],
        "next_state": rollout["state"][1],
        "reward": rollout["reward"][0],
        "uncertainty": rollout["uncertainty"][0],
    }


@torch.no_grad()
def uncertainty_and_error(
    model, data: OfflineDataset, units: OfflineDataset | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's uncertainty (B,) and the true error of s' (B,).

    Both after one step from every held-out row of `data`. The error is the Euclidean length of the
    difference between predicted and recorded next state, standardised with the statistics of
    `units`, or of `data` where that is None.
    """
    out, standardise = predict_held_out(model, data), standardiser(units or data)
    truth = standardise("state", data.gather(data.held_out).next_state)
    error = (standardise("state", out["next_state"]) - truth).norm(dim=-1)
    return out["uncertainty"], error


@torch.no_grad()
def one_step_errors(model, data: OfflineDataset) -> dict[str, float]:
    """Errors of one-step predictions on held-out rows.

    Returns:
        obs_mse, state_mse, reward_mse: of the model's prediction.
        persistence_obs_mse, persistence_state_mse: of predicting that nothing changes.
        vanished_recorded, vanished_imagined: share of the state's entries that are not 0 and become
            0 in a step, e.g. those of a unit that dies.
        u_error_spearman: rank correlation of the uncertainty with the true error of s'.
        direct_state_mse, direct_reward_mse: of the direct prediction by E_ps; LogoWM only.
        deducibility_r2: see `deducibility`; LogoWM only.
    """
    batch, out = data.gather(data.held_out), predict_held_out(model, data)
    error = squared_error(data)
    measures = {
        "obs_mse": error("obs", out["next_obs"], batch.next_obs),
        "state_mse": error("state", out["next_state"], batch.next_state),
        "reward_mse": error("reward", out["reward"], batch.reward),
        "persistence_obs_mse": error("obs", batch.obs, batch.next_obs),
        "persistence_state_mse": error("state", batch.state, batch.next_state),
    }
    imagined = model.imagine(replay([batch.actions]), batch, 1, generator_for(data))["state"][1]
    for name, after in (("recorded", batch.next_state), ("imagined", imagined)):
        measures[f"vanished_{name}"] = (after[batch.state != 0] == 0).float().mean().item()
    if isinstance(model, LogoWM):
        measures |= {
            "direct_state_mse": error("state", out["direct_state"], batch.next_state),
            "direct_reward_mse": error("reward", out["direct_reward"], batch.reward),
            "deducibility_r2": deducibility(model, data),
        }
    measures["u_error_spearman"] = rank_correlation(*uncertainty_and_error(model, data))
    return measures


@torch.no_grad()
def deducibility(model: LogoWM, data: OfflineDataset) -> float:
    """R^2 of the next state that R_d deduces from the *true* next observations, held-out rows.

    It says how much of the state can be recovered from the observations of all agents (and from
    what else `deduce_from` gives to R_d). R_d was not trained on true observations.
    """
    batch = data.gather(data.held_out)
    s, s_next = (model.standardise("state", x) for x in (batch.state, batch.next_state))
    o_next = model.standardise("obs", batch.next_obs)
    deduced = model.mean("state", model.deduce(o_next, s, batch.actions)[0])  # (B,S)
    unexplained = (deduced - s_next).square().sum()
    return 1 - (unexplained / (s_next - s_next.mean(0)).square().sum()).item()


def windows(rows: torch.Tensor, horizon: int) -> torch.Tensor:
    """Those of the sorted row numbers `rows` whose next `horizon` - 1 rows are among them, too, and
    so of the same episode.
    """
    last = rows[horizon - 1 :]
    first = rows[: len(last)]
    return first[last - first == horizon - 1]


@torch.no_grad()
def rollout_errors(model, data: OfflineDataset, horizon: int) -> dict[str, list[float]]:
    """Errors after 1..H imagined steps along the actions recorded in held-out episodes.

    Every held-out row with H recorded steps ahead of it is a start. Ends that the model draws on
    the way do not stop the comparison; only the reward of such a step is that of an end.

    Returns:
        state, reward: errors of the model; persistence: of the start's state. Lists of H floats,
        empty if no held-out episode has H steps.
    """
    errors = {"state": [], "persistence": [], "reward": []}
    start, error = windows(data.held_out, horizon), squared_error(data)
    if len(start) == 0:
        return errors
    recorded = [data.actions[start + h] for h in range(horizon)]
    out = model.imagine(replay(recorded), data.gather(start), horizon, generator_for(data))
    for h in range(horizon):
        truth = data.state[start + h + 1]
        errors["state"].append(error("state", out["state"][h + 1], truth))
        errors["persistence"].append(error("state", data.state[start], truth))
        errors["reward"].append(error("reward", out["reward"][h], data.reward[start + h]))
    return errors


@torch.no_grad()
def rollout_sanity(
    model, bc_actor: Actor, data: OfflineDataset, horizon: int, count: int = 2000
) -> dict:
    """Compare rollouts of the cloned policy in the model with the recording from the same rows.

    `count` training rows are starts of H steps; imagined steps after a rollout's end do not count.

    Returns:
        imagined_reward_per_step, real_reward_per_step: means.
        finite: whether every number of the rollouts is finite, also after their ends.
        states_in_range: share of the imagined values of s within the data's range.
        forbidden_actions: share of the agents' actions that the model said were not available.
    """
    generator, statistics = generator_for(data), data.statistics()
    device = data.train.device
    steps = torch.arange(horizon, device=device).unsqueeze(-1)  # (H,1)
    rows = data.train[torch.randint(len(data.train), (count,), generator=generator, device=device)]
    out = model.imagine(bc_actor.sample, data.gather(rows), horizon, generator)
    recorded = data.reward[(rows + steps)[steps < data.left[rows]]]  # up to an episode's end
    valid = out["valid"].bool()  # (H,B)
    state = out["state"][1:][valid]
    in_range = (state >= statistics["state_min"]) & (state <= statistics["state_max"])
    forbidden = 0.0
    if out.get("avail") is not None:
        taken = (out["actions"] * out["avail"][:-1]).sum(-1)  # (H,B,N) 1 = was available
        forbidden = (taken[valid] == 0).float().mean().item()
    return {
        "imagined_reward_per_step": out["reward"][valid].mean().item(),
        "real_reward_per_step": recorded.mean().item(),
        "finite": all(x.isfinite().all().item() for x in out.values() if x is not None),
        "states_in_range": in_range.float().mean().item(),
        "forbidden_actions": forbidden,
    }


# --------------------------------------------------------------------------------------------------
# Policies
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def offline_measures(
    learner, bc_actor: Actor, data: OfflineDataset, gamma: float
) -> dict[str, float]:
    """What held-out rows tell about a policy without a simulator, beside the cloned policy.

    Args:
        learner: with `ema_actor`. If it has a `critic` that is not None, called as critic(obs,
            state, actions), its values are reported; with a `critic_target`, its Bellman errors.
        gamma: discount per step.
    Returns:
        action_agreement, clone_agreement: share of the agents' greedy actions that equal the
            recorded ones, where more than one action was available; continuous actions:
            action_mse, clone_mse: squared distance to the recorded ones, per agent.
        value_policy, value_data: the critic's mean value of the policy's and of the recorded
            actions.
        td_held_out, td_train: mean squared Bellman error of the critics, on held-out rows and on
            as many that they were trained on. The first far above the second: they have learned
            their rows by heart.
        return_to_go: discounted reward that the recording received from the same rows on.
    """
    batch, measures = data.gather(data.held_out), {}
    for name, actor in (("action", learner.ema_actor), ("clone", bc_actor)):
        taken = actor.greedy(batch.obs, batch.avail)
        if batch.avail is not None:
            had_choice = batch.avail.sum(-1) > 1  # (B,N)
            same = (taken * batch.actions).sum(-1)[had_choice]
            measures[f"{name}_agreement"] = same.mean().item()
        else:
            distance = (taken - batch.actions).square().sum(-1)  # (B,N)
            measures[f"{name}_mse"] = distance.mean().item()
    if (critic := getattr(learner, "critic", None)) is not None:
        pi = learner.ema_actor(batch.obs, batch.avail)
        for name, actions in (("policy", pi), ("data", batch.actions)):
            value = critic(batch.obs, batch.state, actions)
            measures[f"value_{name}"] = value.mean().item()
        if getattr(learner, "critic_target", None) is not None:
            known = data.sample(len(data.held_out), generator_for(data))
            for name, rows in (("held_out", batch), ("train", known)):
                measures[f"td_{name}"] = bellman_error(learner, rows, gamma)
    return measures | {"return_to_go": data.returns_to_go(gamma)[data.held_out].mean().item()}


def bellman_error(learner, batch, gamma: float) -> float:
    """Mean squared error of Q_k(s, a) against r + gamma * min_k Q_k(s', pi), over rows and critics.

    As in training, the next state's value is `critic_target`'s, and the next actions are those of
    the policy itself, not of its moving average; the value is not clamped here.
    """
    pi = learner.actor(batch.next_obs, batch.next_avail)
    v_next = learner.critic_target(batch.next_obs, batch.next_state, pi).amin(0)  # (B,)
    y = batch.reward + gamma**batch.steps * (1 - batch.terminated) * v_next
    q = learner.critic(batch.obs, batch.state, batch.actions)  # (K,B)
    return (q - y).square().mean().item()
