"""How good is the world model, and what is known of a policy that was not played?

Errors are mean squared errors in standardised units (1 = predicting the mean of the data) on
held-out episodes, which no update has seen; only `rollout_sanity` starts from training rows.

Sizes: B rows, N agents, O observation, S state, H horizon.
"""

import numpy as np
import torch

from buffer import OfflineDataset
from logo_wm import LogoWM
from macql import Actor
from run import Run


def rank_correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Spearman's, of two vectors without many ties."""
    ranks = torch.stack([x, y]).argsort(-1).argsort(-1).double()
    return torch.corrcoef(ranks)[0, 1].item()


@torch.no_grad()
def doubt_and_error(model: LogoWM, data: OfflineDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """u (B,) and the length (B,) of the error of s', on every held-out row; standardised."""
    b = data.gather(data.held_out)
    out = model.step(b.obs, b.state, b.actions, clamp=False)
    miss = model.standardise("state", out["next_state"])
    return out["u"], (miss - model.standardise("state", b.next_state)).norm(dim=-1)


@torch.no_grad()
def one_step_errors(model: LogoWM, data: OfflineDataset) -> dict[str, float]:
    """How well the model predicts one step of the held-out episodes, by each of its paths.

    `deducibility_r2` is the share of the state's variance that R_d recovers from the *true* next
    observations (which it was not trained on). `u_error_spearman` is the rank
    correlation of the doubt u with the error of s'.
    """
    b = data.gather(data.held_out)
    out = model.step(b.obs, b.state, b.actions, clamp=False)

    def error(name: str, guess: torch.Tensor, truth: torch.Tensor) -> float:
        difference = model.standardise(name, guess) - model.standardise(name, truth)
        return difference.square().mean().item()

    s_next = model.standardise("state", b.next_state)  # (B,S)
    s = model.standardise("state", b.state)
    ideal = model.deduce(model.standardise("obs", b.next_obs), s, b.actions)[:, :-1]
    unexplained = (ideal - s_next).square().sum() / (s_next - s_next.mean(0)).square().sum()
    return {
        "obs_mse": error("obs", out["next_obs"], b.next_obs),
        "state_mse": error("state", out["next_state"], b.next_state),
        "reward_mse": error("reward", out["reward"], b.reward),
        "direct_state_mse": error("state", out["direct_state"], b.next_state),
        "direct_reward_mse": error("reward", out["direct_reward"], b.reward),
        "persistence_obs_mse": error("obs", b.obs, b.next_obs),
        "persistence_state_mse": error("state", b.state, b.next_state),
        "deducibility_r2": 1 - unexplained.item(),
        "u_error_spearman": rank_correlation(*doubt_and_error(model, data)),
    }


def windows(data: OfflineDataset, rows: torch.Tensor, horizon: int) -> torch.Tensor:
    """Those of `rows` (sorted) that are followed by `horizon` - 1 more of their episode."""
    tail = rows[horizon - 1 :]
    return rows[: len(tail)][tail - rows[: len(tail)] == horizon - 1]


@torch.no_grad()
def rollout_errors(
    model: LogoWM, data: OfflineDataset, horizon: int, clamp: bool = True
) -> dict[str, list[float]]:
    """Errors after 1..H imagined steps along the actions recorded in held-out episodes."""
    start = windows(data, data.held_out, horizon)
    if len(start) == 0:
        return {"state": [], "persistence": [], "reward": []}
    out = model.imagine(
        lambda obs, avail, h: data.actions[start + h],
        data.obs[start], data.state[start], None, torch.zeros(horizon, len(start)),
        heads=False, clamp=clamp,
    )  # fmt: skip
    errors = {"state": [], "persistence": [], "reward": []}
    for h in range(horizon):
        truth = model.standardise("state", data.state[start + h + 1])
        guess = model.standardise("state", out["state"][h + 1])
        still = model.standardise("state", data.state[start])
        reward = (out["reward"][h] - data.reward[start + h]) / model.reward_std
        errors["state"].append((guess - truth).square().mean().item())
        errors["persistence"].append((still - truth).square().mean().item())
        errors["reward"].append(reward.square().mean().item())
    return errors


@torch.no_grad()
def rollout_sanity(
    model: LogoWM, clone: Actor, data: OfflineDataset, horizon: int, heads: bool, clamp: bool,
    count: int = 2000,
) -> dict:  # fmt: skip
    """Does the cloned behaviour policy, acting in the model, live in the world of the data?

    From the same real rows, H steps are imagined and, beside them, read from the recording; each
    rollout counts up to its end.
    """
    rng = torch.Generator(data.train.device).manual_seed(0)
    pick = torch.randint(len(data.train), (count,), generator=rng, device=data.train.device)
    rows = data.train[pick]
    start = data.gather(rows)
    noise = clone.noise((horizon, *start.actions.shape), rng)
    dice = torch.rand(horizon, count, generator=rng, device=rows.device)
    out = model.imagine(
        lambda obs, avail, h: clone.explore(obs, avail, noise[h], epsilon=0.0),
        start.obs, start.state, start.avail, dice, heads, clamp,
    )  # fmt: skip
    on = out["filled"].bool()  # (H,B)
    inside = (out["state"] >= model.state_min) & (out["state"] <= model.state_max)
    is_step = torch.zeros(len(data.obs), dtype=torch.bool, device=rows.device)
    is_step[data.train] = True
    real, running = [], torch.ones_like(rows, dtype=torch.bool)
    for h in range(horizon):
        row = (rows + h).clamp(max=len(is_step) - 1)
        running = running & is_step[row]
        real.append(data.reward[row[running]])
    forbidden = 0.0
    if "avail" in out:
        taken = (out["actions"] * out["avail"][:-1]).sum(-1)  # (H,B,N) 1 = it was allowed
        forbidden = (taken[on] == 0).float().mean().item()
    return {
        "imagined_reward_per_step": out["reward"][on].mean().item(),
        "real_reward_per_step": torch.cat(real).mean().item(),
        "finite": all(v.isfinite().all().item() for v in out.values()),
        "states_in_range": inside.float().mean().item(),
        "forbidden_actions": forbidden,
    }


@torch.no_grad()
def offline_measures(run: Run) -> dict[str, float]:
    """What can be said of the policy without playing: on held-out rows, beside the clone.

    action_agreement, clone_agreement: share of the agents' actions that equal the recorded ones,
        where they had a choice (the dead have none); where actions are continuous action_mse,
        clone_mse: squared distance to them, per agent.
    value_policy, value_data: the critic's mean value of the policy's and of the recorded actions.
    return_to_go: what the recording paid from the same rows to the end, discounted alike.
    """
    b, critic, gamma = run.data.gather(run.data.held_out), run.critic, run.args.gamma
    measures = {}
    for who, actor in (("action", run.averaged), ("clone", run.clone)):
        taken = actor.greedy(b.obs, b.avail)
        if run.spec.discrete:
            had_choice = b.avail.sum(-1) > 1  # (B,N)
            same = (taken * b.actions).sum(-1)[had_choice]
            measures[f"{who}_agreement"] = same.mean().item()
        else:
            measures[f"{who}_mse"] = (taken - b.actions).square().sum(-1).mean().item()
    if run.args.critic == "cql":
        pi = run.averaged(b.obs, b.avail)
        measures["value_policy"] = critic(b.obs, b.state, pi).mean().item()
        measures["value_data"] = critic(b.obs, b.state, b.actions).mean().item()
    return measures | {
        "return_to_go": returns_to_go(run.data, gamma)[run.data.held_out].mean().item()
    }


def returns_to_go(data: OfflineDataset, gamma: float) -> torch.Tensor:
    """(R,) discounted reward from each row to its episode's end."""
    out, carry, reward = np.zeros(len(data.reward)), 0.0, data.reward.cpu().numpy()
    ends = np.cumsum(data.lengths.cpu().numpy() + 1) - 1  # rows of the final observations
    is_end = np.zeros(len(out), bool)
    is_end[ends] = True
    for row in reversed(range(len(out))):
        carry = 0.0 if is_end[row] else reward[row] + gamma * carry
        out[row] = carry
    return torch.as_tensor(out, dtype=torch.float32, device=data.reward.device)
