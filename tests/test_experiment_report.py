"""The end of a run: final.json, run.png and the closing table."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import envs
from buffer import OfflineDataset
from experiment import report
from logo_wm import LogoWM
from macql import Actor, Critic

N, OBS, STATE, ACTIONS = 2, 3, 4, 3
SCORE = {"return_mean": 5.0, "return_ci95": 0.5, "win_rate": 0.25, "episodes": 8}


@dataclasses.dataclass
class Args:
    """The flags that a report reads."""

    env_id: str = "3m"
    seed: int = 2
    horizon: int = 3
    gamma: float = 0.9
    updates: int = 20
    out: Path | None = None


class Constant:
    """A world model that only has what every world model has: nothing changes, reward 1."""

    def __init__(self, uncertainty: float = 1.0):
        self.uncertainty = uncertainty

    def loss(self, batch):
        return torch.zeros(()), {}

    def imagine(self, policy, starts, horizon, generator):
        def per_step(x):
            return torch.stack([x] * horizon)

        ones = torch.ones(len(starts.state))
        actions = [policy(starts.obs, starts.avail, generator) for _ in range(horizon)]
        return {
            "obs": torch.stack([starts.obs] * (horizon + 1)),
            "state": torch.stack([starts.state] * (horizon + 1)),
            "avail": torch.stack([starts.avail] * (horizon + 1)),
            "actions": torch.stack(actions),
            "reward": per_step(ones),
            "terminated": per_step(0 * ones),
            "valid": per_step(ones),
            "uncertainty": per_step(self.uncertainty * ones),
        }


@pytest.fixture(scope="module")
def data() -> OfflineDataset:
    """Eight random episodes of six steps; all actions are available."""
    g, rows = torch.Generator().manual_seed(0), 8 * 7
    choice = torch.randint(0, ACTIONS, (rows, N), generator=g)
    return OfflineDataset(
        torch.randn(rows, N, OBS, generator=g), torch.randn(rows, STATE, generator=g),
        torch.nn.functional.one_hot(choice, ACTIONS).float(), torch.ones(rows, N, ACTIONS),
        torch.randn(rows, generator=g), torch.zeros(rows), [6] * 8, holdout=0.4,
    )  # fmt: skip


@pytest.fixture
def end(data, tmp_path, monkeypatch):
    """end(world_model, ...) -> (what `finish` returns, content of final.json, printed text)."""
    torch.manual_seed(0)
    mean, std = torch.zeros(N, OBS), torch.ones(N, OBS)
    ema_actor, bc_actor = (Actor(mean, std, ACTIONS, 8) for _ in range(2))
    critic = Critic(mean, std, torch.zeros(STATE), torch.ones(STATE), ACTIONS, 8)

    def evaluate(env, act, episodes, seed, device="cpu"):
        assert act == bc_actor.greedy and env == "simulator" and device == torch.device("cpu")
        return SCORE | {"episodes": episodes, "return_mean": float(seed)}

    monkeypatch.setattr(envs, "evaluate", evaluate)

    def end(
        world_model, env="simulator", evaluations=7, method="logo", metadata=None, critic=critic,
        horizon=3,
    ):  # fmt: skip
        args = Args(out=tmp_path, horizon=horizon)
        data_set = {
            "path": "data.h5", "sha256": "0" * 64, "episodes": 8, "transitions": 48,
            "return_mean": 1.0, "return_std": 2.0,
        }  # fmt: skip
        run = SimpleNamespace(
            args=args, asked=args, method=method, folder=tmp_path, device=torch.device("cpu"),
            commit="abc", imagined_rows=60, started=0.0,
            timed=lambda clock: contextlib.nullcontext(),
            spec=SimpleNamespace(backend="smax" if env else "offline", discrete=True),
            metadata=data_set | (metadata or {}), progress={"clone": 4, "wm": 10, "policy": 20},
            evaluations=[
                {"update": k + 1, **SCORE, "return_mean": float(k)} for k in range(evaluations)
            ],
            seconds={"clone": 1.0, "wm": 2.0, "policy": 5.0, "imagine": 3.0, "eval": 0.0,
                     "total": 9.0},
        )  # fmt: skip
        learner = SimpleNamespace(ema_actor=ema_actor, critic=critic)
        return report.finish(run, data, env, learner, bc_actor, world_model)

    return end


def written(folder: Path) -> dict:
    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    return json.loads((folder / "final.json").read_text(), parse_constant=refuse)


def logo_model(data) -> LogoWM:
    return LogoWM(N, OBS, STATE, ACTIONS, 8, statistics=data.statistics())


def test_final_json_has_every_promised_field(end, data, tmp_path, capsys):
    final = end(logo_model(data))
    assert written(tmp_path) == final
    assert set(final) == {
        "args", "method", "commit", "versions", "device", "machine", "backend", "env_id",
        "dataset",
        "world_model", "rollout", "eval", "clone", "offline", "evaluations", "time", "seed",
        "updates",
    }  # fmt: skip
    parts = {
        "versions": {"torch", "numpy", "jaxmarl", "jax", "mujoco", "python"},
        "dataset": {"path", "sha256", "episodes", "transitions", "return_mean", "return_std"},
        "world_model": {
            "obs_mse", "state_mse", "reward_mse", "direct_state_mse", "direct_reward_mse",
            "persistence_obs_mse", "persistence_state_mse", "vanished_recorded",
            "vanished_imagined", "deducibility_r2", "u_error_spearman",
            "rollout",
        },
        "rollout": {
            "imagined_reward_per_step", "real_reward_per_step", "finite", "states_in_range",
            "forbidden_actions",
        },
        "eval": set(SCORE),
        "clone": set(SCORE),
        "offline": {
            "action_agreement", "clone_agreement", "value_policy", "value_data", "return_to_go",
        },
        "time": {
            "total_s", "wm_updates_per_s", "updates_per_s", "imagined_rows_per_s", "clone_s",
            "wm_s", "policy_s", "imagine_s", "eval_s",
        },
    }  # fmt: skip
    for part, keys in parts.items():
        assert set(final[part]) == keys, part
    assert (final["seed"], final["backend"], final["env_id"]) == (2, "smax", "3m")
    assert final["method"] == "logo" and final["args"]["out"] == str(tmp_path)
    assert final["time"]["wm_updates_per_s"] == 5.0 and final["time"]["updates_per_s"] == 4.0
    assert final["time"]["imagined_rows_per_s"] == 20.0
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    for line in ("behaviour cloning", "LOGO", "deduced (LOGO)", "direct (E_ps)", "nothing changes"):
        assert line in printed


def test_the_last_five_evaluations_are_the_score(end):
    final = end(None)
    assert final["eval"]["return_mean"] == np.mean([2, 3, 4, 5, 6])
    assert final["eval"]["episodes"] == 5 * 8 and len(final["evaluations"]) == 7


def test_the_cloned_policy_plays_as_many_episodes(end):
    clone = end(None)["clone"]
    assert clone["episodes"] == 5 * 8
    assert clone["return_mean"] == 10**6 * 3 - 10**5  # the seed that it was evaluated with


def test_pooled_evaluations_equal_one_long_one():
    g = np.random.default_rng(0)
    rounds = [g.normal(k, 2, 500) for k in (5.0, 5.0, 5.0)]
    rounds = [r - r.mean() + 5 for r in rounds]

    def score(x) -> dict:
        half = 1.96 * x.std(ddof=1) / len(x) ** 0.5
        return {"return_mean": x.mean(), "return_ci95": half, "win_rate": (x > 6).mean(),
                "episodes": len(x)}  # fmt: skip

    found, whole = report.pooled([score(r) for r in rounds]), score(np.concatenate(rounds))
    assert found == pytest.approx(whole, rel=2e-3)
    assert report.pooled([]) is None
    assert report.pooled([SCORE | {"win_rate": None}])["win_rate"] is None


def test_any_world_model_is_reported(end, tmp_path, capsys):
    final = end(Constant())
    errors = written(tmp_path)["world_model"]
    assert errors == final["world_model"] and not {"direct_state_mse", "deducibility_r2"} & set(
        errors
    )
    assert errors["state_mse"] == errors["persistence_state_mse"] > 0
    assert len(errors["rollout"]["state"]) == 3
    assert final["rollout"]["imagined_reward_per_step"] == 1.0
    printed = capsys.readouterr().out
    assert "world model" in printed and "direct (E_ps)" not in printed


def test_numbers_that_are_not_finite_become_null(end, tmp_path):
    final = end(Constant(uncertainty=math.inf), metadata={"win_rate": math.nan})
    assert final["world_model"]["u_error_spearman"] is None
    assert final["dataset"]["win_rate"] is None and final["rollout"]["finite"] is False
    assert written(tmp_path) == final


@pytest.mark.parametrize("uncertainty", [0.0, math.nan])
def test_a_model_with_useless_uncertainty_is_reported(end, tmp_path, uncertainty):
    errors = end(Constant(uncertainty))["world_model"]
    assert errors["u_error_spearman"] is None
    assert (tmp_path / "run.png").exists()


def test_a_horizon_beyond_every_episode_is_reported(end, tmp_path):
    errors = end(Constant(), horizon=7)["world_model"]
    assert errors["rollout"] == {"state": [], "persistence": [], "reward": []}
    assert written(tmp_path)["world_model"] == errors and (tmp_path / "run.png").exists()


def test_nested_values_are_kept_where_they_are_finite():
    value = {"a": [1, 2.5, math.nan, (math.inf, None)], "b": {"c": True, "d": "x"}}
    expected = {"a": [1, 2.5, None, [None, None]], "b": {"c": True, "d": "x"}}
    assert report.finite_or_null(value) == expected


def test_without_a_simulator_nothing_is_evaluated(end, capsys):
    final = end(None, env=None, evaluations=0)
    assert final["eval"] is None and final["clone"] is None and final["backend"] == "offline"
    printed = capsys.readouterr().out
    assert "no episode was played" in printed and "action_agreement" in printed


def test_without_a_model_or_critic_their_measures_are_absent(end, tmp_path, capsys):
    final = end(None, method="bc", critic=None)
    assert final["world_model"] is None and final["rollout"] is None and final["method"] == "bc"
    assert "value_policy" not in final["offline"]
    assert "cloning, twice as long" in capsys.readouterr().out
    assert (tmp_path / "run.png").exists()


def test_a_full_disk_leaves_no_half_written_report(end, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        end(None)
    assert list(tmp_path.iterdir()) == []
