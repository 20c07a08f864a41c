"""Our layout of recorded episodes: round trip, refusals, and a public StarCraft II file.

Small files are written and read back row by row. Broken files must be refused with the file's name
and the key that is wrong.
"""

import hashlib
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from faults import battles

import datasets
from datasets.episodes import KEYS
from datasets.load import infer_wins, repair_time_limits

ROOT = Path(__file__).resolve().parents[1]
STARCRAFT = ROOT.parent / "shared" / "data" / "smac_3m_medium.h5"
N, O, S, A, LIMIT = 2, 3, 4, 5, 6  # noqa: E741


def make_log(lengths: list[int], seed: int) -> dict[str, np.ndarray]:
    """One round as `behaviour.mappo.play` returns it: parallel episodes of these lengths."""
    rng, slots, steps = np.random.default_rng(seed), len(lengths), max(lengths)
    t = np.arange(steps)[:, None]
    avail = rng.random((steps + 1, slots, N, A)) < 0.5
    avail[..., 0] |= ~avail.any(-1)
    choice = (avail * rng.random(avail.shape)).argmax(-1)[:-1]
    last = t == np.array(lengths) - 1
    return {
        "obs": rng.normal(size=(steps + 1, slots, N, O)).astype(np.float32),
        "state": rng.normal(size=(steps + 1, slots, S)).astype(np.float32),
        "avail": avail.astype(np.float32),
        "actions": np.eye(A, dtype=np.float32)[choice],
        "reward": (rng.normal(size=last.shape) * (t < np.array(lengths))).astype(np.float32),
        "terminated": last & (np.arange(slots) % 2 == 0),
        "won": last & (np.arange(slots) % 3 == 0),
        "filled": t < np.array(lengths),
    }


ROUNDS = ([3, 1, 5], [6, 2])  # lengths; the second round reaches the limit


def make_arrays() -> dict[str, np.ndarray]:
    logs = [make_log(lengths, seed) for seed, lengths in enumerate(ROUNDS)]
    return datasets.join_rounds(logs, LIMIT)


def write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    with h5py.File(path, "w") as f:
        for key, values in arrays.items():
            f[key] = values
    return path


def load(path: Path):
    return datasets.load_dataset(path, torch.device("cpu"), holdout=0.2)


# ----------------------------------------------------------------------------- writing and reading


def test_episodes_come_back_row_by_row(tmp_path):
    path = tmp_path / "tiny.h5"
    datasets.save_episodes(path, make_arrays(), {"env_id": "nowhere", "seed": 3})
    columns, lengths, metadata = datasets.read_episodes(path)
    assert lengths.tolist() == [*ROUNDS[0], *ROUNDS[1]]
    row, wins, returns = 0, 0, []
    for seed, round_lengths in enumerate(ROUNDS):
        log = make_log(round_lengths, seed)
        for slot, length in enumerate(round_lengths):
            for t in range(length + 1):
                for key in ("obs", "state", "avail"):
                    assert np.array_equal(columns[key][row], log[key][t, slot])
                if t < length:
                    for key in ("actions", "reward", "terminated"):
                        assert np.array_equal(columns[key][row], log[key][t, slot])
                row += 1
            wins += int(log["won"][:length, slot].any())
            returns.append(log["reward"][:length, slot].sum())
    assert row == len(columns["obs"])
    assert (metadata["env_id"], metadata["seed"]) == ("nowhere", 3)
    assert (metadata["episodes"], metadata["transitions"]) == (5, 17)
    assert metadata["win_rate"] == wins / 5 > 0
    assert metadata["return_mean"] == pytest.approx(np.mean(returns), rel=1e-5)
    assert metadata["return_std"] == pytest.approx(np.std(returns), rel=1e-5)


def test_file_layout_is_the_public_one():
    arrays = make_arrays()
    e, t = 5, LIMIT + 1
    assert {k: v.shape for k, v in arrays.items()} == {
        "state": (e, t, S), "obs": (e, t, N, O), "actions": (e, t, N, 1),
        "avail_actions": (e, t, N, A), "reward": (e, t, 1), "terminated": (e, t, 1),
        "filled": (e, t, 1), "won": (e,),
    }  # fmt: skip
    assert arrays["filled"][..., 0].sum(1).tolist() == [4, 2, 6, 7, 3]
    padding = arrays["filled"][..., 0] == 0
    for key in KEYS:
        assert not arrays[key][padding].any()
    assert np.issubdtype(arrays["actions"].dtype, np.integer)


def test_dataset_gathers_the_transitions_of_the_file(tmp_path):
    path, arrays = tmp_path / "tiny.h5", make_arrays()
    datasets.save_episodes(path, arrays, {})
    data, metadata = load(path)
    assert metadata["path"] == str(path)
    assert metadata["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (metadata["episodes"], metadata["transitions"]) == (5, 17)
    batch = data.gather(torch.arange(3))  # the first episode
    assert np.array_equal(batch.state, arrays["state"][0, :3])
    assert np.array_equal(batch.next_obs, arrays["obs"][0, 1:4])
    assert np.array_equal(batch.next_avail, arrays["avail_actions"][0, 1:4])
    assert np.array_equal(batch.actions.argmax(-1), arrays["actions"][0, :3, :, 0])
    assert np.array_equal(batch.reward, arrays["reward"][0, :3, 0])
    assert batch.terminated.tolist() == [0.0, 0.0, 1.0]
    assert all(x.dtype == torch.float32 for x in batch)
    whole = [r[:-1].sum() for r in data.reward.split((data.lengths + 1).tolist())]
    assert whole == pytest.approx(arrays["reward"].sum((1, 2)), rel=1e-5)


def test_same_episodes_give_the_same_file(tmp_path):
    for name in ("a.h5", "b.h5"):
        datasets.save_episodes(tmp_path / name, make_arrays(), {"seed": 0})
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("existed", [True, False])
def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch, function, existed):
    path = tmp_path / "folder" / "file.bin"
    if existed:
        datasets.write_atomic(path, b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match="No space left"):
        datasets.write_atomic(path, b"new and longer")
    monkeypatch.undo()
    assert [p.name for p in path.parent.iterdir()] == (["file.bin"] if existed else [])
    assert not existed or path.read_bytes() == b"old"
    datasets.write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and len(list(path.parent.iterdir())) == 1


def test_continuous_actions_are_clipped_and_have_no_mask(tmp_path):
    log = make_log([4, 6], seed=3) | {"avail": None}
    log["actions"] = np.random.default_rng(0).normal(size=log["actions"].shape).astype(np.float32)
    arrays = datasets.join_rounds([log], LIMIT)
    datasets.save_episodes(tmp_path / "c.h5", arrays, {"env_id": "Hopper-3x1"})
    data, metadata = load(tmp_path / "c.h5")
    assert data.avail is None and "win_rate" not in metadata
    assert np.array_equal(data.actions[:4], log["actions"][:4, 0].clip(-1, 1))
    assert np.array_equal(data.actions[5:11], log["actions"][:6, 1].clip(-1, 1))
    assert metadata["repaired"] == [] and metadata["env_id"] == "Hopper-3x1"
    with pytest.raises(ValueError, match="was recorded on Hopper-3x1, not on Ant-2x4"):
        datasets.read_episodes(tmp_path / "c.h5", "Ant-2x4")


def test_wins_are_inferred_from_smacs_bonus():
    lengths = np.array([3, 3, 2, 3])
    reward = np.array([4, 5, 11, 0, 4, 9, 7, 0, 3, 2, 0, 2, 8, 11, 0], np.float32)
    # a victory; a return of 20 without one (damage to healed units); a defeat; 21, but truncated
    terminated = np.array([0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0], np.float32)
    columns = {"reward": reward, "terminated": terminated, "avail": np.ones((15, 1, 1))}
    returns = np.array([20.0, 20.0, 5.0, 21.0])
    assert infer_wins(columns, lengths, returns).tolist() == [True, False, False, False]
    assert infer_wins(columns, lengths, returns / 2) is None
    assert infer_wins(columns | {"reward": reward - 1}, lengths, returns) is None
    assert infer_wins(columns | {"avail": None}, lengths, returns) is None


@pytest.mark.parametrize(
    "env_id,inferred", [("3m", True), ("protoss_5_vs_5", True), ("toy", False)]
)
def test_wins_are_inferred_on_starcrafts_maps_alone(env_id, inferred, tmp_path):
    datasets.save_episodes(tmp_path / "x.h5", battles(), {"env_id": env_id})
    columns, _, metadata = datasets.read_episodes(tmp_path / "x.h5")
    assert ("won" in columns) == inferred == metadata.get("win_rate_inferred", False)


# --------------------------------------------------------------------------------------- refusals


def without(key):
    return lambda arrays: arrays.pop(key)


def put(key, index, value):
    def change(arrays):
        if isinstance(value, float):
            arrays[key] = arrays[key].astype(np.float32)
        arrays[key][index] = value

    return change


def drop_agent(key):
    def change(arrays):
        arrays[key] = arrays[key][:, :, :1]

    return change


def drop_last(key, axis):
    def change(arrays):
        arrays[key] = np.delete(arrays[key], -1, axis)

    return change


def half_an_action(arrays):
    arrays["actions"] = arrays["actions"] + 0.5 * (arrays["actions"] == 0)


def as_text(key):
    def change(arrays):
        arrays[key] = arrays[key].astype("S8")

    return change


def no_episodes(arrays):
    for key in arrays:
        arrays[key] = arrays[key][:0]


def make_unavailable(arrays):
    choice = arrays["actions"][2, 1, 1, 0]
    arrays["avail_actions"][2, 1, 1] = 1
    arrays["avail_actions"][2, 1, 1, choice] = 0


BROKEN = {
    "no_obs": (without("obs"), "no key obs; found actions"),
    "no_filled": (without("filled"), "no key filled"),
    "nan_in_state": (put("state", (1, 0, 2), np.nan), "key state, episode 1: NaN, infinity"),
    "huge_state": (put("state", (1, 0, 2), 1e30), "key state, episode 1: NaN, infinity or a num"),
    "infinite_obs": (put("obs", (3, 6, 1, 0), np.inf), "key obs, episode 3: NaN, infinity"),
    "nan_reward": (put("reward", (4, 2, 0), np.nan), "key reward, episode 4: NaN, infinity"),
    "agents_of_avail": (drop_agent("avail_actions"), "number of agents differs.*avail_actions"),
    "agents_of_actions": (drop_agent("actions"), "number of agents differs.*actions"),
    "agents_of_obs": (drop_agent("obs"), "number of agents differs.*obs"),
    "fewer_episodes": (drop_last("reward", 0), "episodes and rows differ.*reward"),
    "fewer_rows": (drop_last("state", 1), "episodes and rows differ.*state"),
    "hole": (put("filled", (2, 1), 0), "key filled, episode 2: not a run of ones"),
    "late_start": (put("filled", (3, 0), 0), "key filled, episode 3: not a run of ones"),
    "empty_episode": (put("filled", (1, 1), 0), "key filled, episode 1: not a run of ones"),
    "forbidden_action": (
        make_unavailable,
        "key actions, episode 2: not available by avail_actions",
    ),
    "action_too_high": (
        put("actions", (0, 0, 0, 0), A),
        f"key actions: {A}, but avail_actions has",
    ),
    "action_half": (half_an_action, "key actions: 0.5 is no action id"),
    "early_end": (put("terminated", (2, 1), 1), "key terminated, episode 2: before its end"),
    "odd_end": (put("terminated", (2, 4), 7), "key terminated, episode 2: neither 0 nor 1"),
    "odd_mask": (put("avail_actions", (1, 0, 0, 0), 5), "avail_actions, episode 1: neither 0 nor"),
    "no_choice": (
        put("avail_actions", (3, 2, 1), 0),
        "episode 3: an agent has no available action",
    ),
    "won_of_others": (drop_last("won", 0), "key won has shape"),
    "objects": (as_text("state"), "key state holds no plain numbers"),
    "no_avail": (without("avail_actions"), "no key avail_actions"),
    "no_episodes": (no_episodes, "holds no episodes, rows or agents"),
    "action_negative": (put("actions", (0, 0, 0, 0), -1), "key actions"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused_by_name_and_key(tmp_path, name):
    breaks, message = BROKEN[name]
    arrays = make_arrays()
    load(write(tmp_path / "whole.h5", arrays))  # before the change it is read without error
    breaks(arrays)
    path = write(tmp_path / f"{name}.h5", arrays)
    with pytest.raises(ValueError, match=f"(?s){name}.h5: .*{message}"):
        load(path)


def test_message_about_a_negative_action_shows_its_id(tmp_path):
    arrays = make_arrays()
    arrays["actions"][0, 0, 0, 0] = -7
    with pytest.raises(ValueError, match="-7"):
        load(write(tmp_path / "negative.h5", arrays))


def test_data_in_another_file_are_not_read(tmp_path):
    arrays = make_arrays()
    state = arrays.pop("state")
    path = write(tmp_path / "links.h5", arrays)
    (tmp_path / "secret").write_bytes(state.tobytes())
    with h5py.File(path, "a") as f:
        where = [(str(tmp_path / "secret"), 0, state.nbytes)]
        f.create_dataset("state", state.shape, state.dtype, external=where)
    with pytest.raises(ValueError, match="links.h5: key state refers to other files"):
        load(path)


def test_final_action_and_padding_may_have_any_value(tmp_path):
    arrays = make_arrays()
    arrays["avail_actions"][0, 3] = [
        0,
        1,
        1,
        1,
        1,
    ]  # 0, the padding of the final row's action, is not available
    arrays["state"][1, 4:] = np.nan  # beyond the end of episode 1
    data, _ = load(write(tmp_path / "fine.h5", arrays))
    assert torch.isfinite(data.state).all()


def test_path_that_holds_no_episodes_is_refused(tmp_path):
    text = tmp_path / "text.h5"
    text.write_text("not HDF5")
    with pytest.raises(ValueError, match="text.h5: not an HDF5 file"):
        load(text)
    with pytest.raises(ValueError, match="missing.h5: no such file"):
        load(tmp_path / "missing.h5")
    with pytest.raises(ValueError, match="a folder, but neither a Vault nor a Minari"):
        load(tmp_path)
    (tmp_path / "empty.h5").touch()
    with pytest.raises(ValueError, match="empty.h5: an empty file"):
        load(tmp_path / "empty.h5")
    (tmp_path / "half.h5.part").touch()
    for name in ("half.h5", "half.h5.part"):
        with pytest.raises(ValueError, match=f"{name}: a half-finished download"):
            load(tmp_path / name)


# ------------------------------------------------------------------- a public StarCraft II file


@pytest.mark.skipif(not STARCRAFT.is_file(), reason=f"the StarCraft II file {STARCRAFT} is absent")
def test_public_starcraft_file_reads_as_published():
    data, metadata = load(STARCRAFT)
    assert data.obs.shape[1:] == (3, 30) and data.state.shape[1:] == (48,)
    assert data.actions.shape[1:] == data.avail.shape[1:] == (3, 9)
    assert (metadata["episodes"], metadata["transitions"]) == (2000, 50_450)
    assert round(metadata["return_mean"], 1) == 14.0
    assert len(data.train) + len(data.held_out) == 50_450
    with h5py.File(STARCRAFT) as f:
        by_hand = (f["reward"][..., 0] * f["filled"][..., 0])[:, :-1].sum(1).mean()
        assert metadata["return_mean"] == pytest.approx(by_hand, abs=0.05)
    batch = data.sample(1000, torch.Generator().manual_seed(0))
    assert (batch.actions * (1 - batch.avail)).sum() == 0
    assert metadata["format"] == "episodes" and metadata["final_observation"] == "stored"
    assert metadata["win_rate_inferred"] and metadata["win_rate"] == pytest.approx(0.5415)
    shown = datasets.describe(STARCRAFT)
    assert "3 agents, 9 actions, observations 30, state 48" in shown
    assert "54 % of episodes won" in shown


@pytest.mark.skipif(not STARCRAFT.is_file(), reason=f"the StarCraft II file {STARCRAFT} is absent")
def test_inferred_wins_are_those_with_all_enemies_dead():
    columns, lengths, _ = datasets.read_episodes(STARCRAFT)
    last = columns["state"][np.cumsum(lengths + 1) - 1]
    health = last[:, 12:21].reshape(-1, 3, 3)[..., 0]  # on 3m, after 3 allies of 4 numbers each
    assert np.array_equal(columns["won"], (health == 0).all(1))


def test_time_limits_stored_as_terminations_are_repaired():
    # Episodes of 3, 3, 3 and 2 steps, all stored as terminated: won, out of time, lost at the last
    # moment, lost. Action 0 is allowed to the dead alone.
    lengths, alive = np.array([3, 3, 3, 2]), [1, 1, 0, 0]
    final = np.cumsum(lengths + 1) - 1
    avail, terminated = np.ones((final[-1] + 1, 2, 3)), np.zeros(final[-1] + 1)
    terminated[final - 1] = 1
    avail[final, 0, 0] = 1 - np.array(alive)
    columns = {"avail": avail, "terminated": terminated}
    said = repair_time_limits(columns, lengths, np.array([True, False, False, False]))
    assert columns["terminated"][final - 1].tolist() == [1, 0, 1, 1]
    assert said[0].startswith("1 episodes that stop at 3 steps with both sides alive")
    assert repair_time_limits(columns, lengths, np.array([True, False, False, False])) == []


def test_the_real_recording_has_47_time_limits():
    path = Path(__file__).parents[2] / "shared" / "data" / "smac_3m_medium.h5"
    if not path.exists():
        pytest.skip(f"the public recording is not at {path}")
    columns, lengths, metadata = datasets.read_episodes(path)
    assert columns["terminated"].sum() == len(lengths) - 47
    assert "47 episodes that stop at 60 steps" in metadata["repaired"][0]
