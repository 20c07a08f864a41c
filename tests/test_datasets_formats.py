"""Public formats: the transitions that were written are read back, and bad files are refused.

Short MuJoCo episodes are written in OMIGA's standardised form, as a Vault and as Minari; the states
and actions of the robot must come back.
"""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import datasets
import envs
from datasets.load import content_hash, duplicates
from simulators.mamujoco import partition

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("Hopper-3x1", "HalfCheetah-6x1", "Ant-2x4")
LENGTHS = (5, 9, 7)
WORLD = [27] * 6  # where Ant-v2's state has six zeros that v5's lacks
Episode = dict[str, np.ndarray]


def rollouts(env_id: str, lengths=LENGTHS) -> list[Episode]:
    """Random actions: state (L+1,S), joint action (L,motors) and reward (L,) of each episode."""
    env, rng, episodes = envs.make(env_id), np.random.default_rng(0), []
    for k, length in enumerate(lengths):
        now, joint = env.reset(k), rng.uniform(-1, 1, (length, env.partition.motors))
        states, rewards = [now.state[0]], []
        for action in joint:
            now = env.step(env.partition.split(action[None]))
            states.append(now.state[0])
            rewards.append(now.reward[0])
        joint = joint.astype(np.float32)
        episodes.append({"state": np.array(states), "action": joint, "reward": np.array(rewards)})
    return episodes


def standardised(state: np.ndarray, agents: int) -> np.ndarray:
    """As OMIGA stores it: (L+1,S) -> (L+1,N,S+N), every vector standardised within itself."""
    if state.shape[1] == 105:
        state = np.insert(state, WORLD, 0, axis=1)
    v = np.stack([np.concatenate([state, np.tile(row, (len(state), 1))], 1, dtype=np.float64)
                  for row in np.eye(agents)], 1)  # fmt: skip
    return ((v - v.mean(-1, keepdims=True)) / v.std(-1, keepdims=True)).astype(np.float32)


def omiga_arrays(env_id: str, episodes: list[Episode]) -> dict[str, np.ndarray]:
    """The flat arrays of OMIGA: L+1 rows per episode, d = 1 on the last."""
    n = int(env_id.partition("-")[2].partition("x")[0])
    parts = {k: [] for k in "soard"}
    for e in episodes:
        x = standardised(e["state"], n)
        joint = np.append(e["action"], e["action"][-1:], 0)
        parts["s"].append(x)
        parts["o"].append(x)
        parts["a"].append(joint.reshape(len(x), n, -1))  # in the order of the agents
        parts["r"].append(np.append(e["reward"], 123.0)[:, None])
        parts["d"].append((np.arange(len(x)) == len(x) - 1)[:, None].astype(np.float32))
    return {k: np.concatenate(v) for k, v in parts.items()}


def write_h5(path: Path, arrays: dict) -> Path:
    with h5py.File(path, "w") as f:
        for k, x in arrays.items():
            f[k] = x
    return path


def write_vault(path: Path, arrays: dict[str, np.ndarray], spare: int = 50) -> Path:
    """A Vault of (B,T,...) arrays as flashbax writes it: zarr in OCDBT, with spare time."""
    import tensorstore

    path.mkdir(parents=True)
    base = {"driver": "ocdbt", "base": f"file://{path.resolve()}/"}
    nested = {"shape": {}, "dtype": {}}
    for key, x in [*arrays.items(), ("vault_index", None)]:
        leaf, long = (f"{key}.", (1, 10**13)) if x is not None else (key, None)
        x = np.array([arrays["rewards"].shape[1]], np.int32) if x is None else x
        shape = [len(x), 10**13, *x.shape[2:]] if long else [1]
        spec = {"driver": "zarr", "kvstore": base | {"path": leaf}, "create": True}
        chunks = [len(x), 16, *x.shape[2:]] if long else [1]
        spec["metadata"] = {"shape": shape, "chunks": chunks, "dtype": x.dtype.str,
                            "compressor": {"id": "gzip", "level": 5}}  # fmt: skip
        store = tensorstore.open(spec).result()
        (store[:, : x.shape[1]] if long else store).write(x).result()
        if long:
            group = nested
            *groups, name = key.split(".")
            for tree, value in (
                ("shape", str((len(x), spare, *x.shape[2:]))),
                ("dtype", str(x.dtype)),
            ):
                group = nested[tree]
                for g in groups:
                    group = group.setdefault(g, {})
                group[name] = value
    about = {"version": 1.2, "structure_shape": nested["shape"], "structure_dtype": nested["dtype"]}
    (path / "metadata.json").write_text(json.dumps(about))
    return path


def load(path: Path, env_id: str | None = None):
    return datasets.load_dataset(path, torch.device("cpu"), env_id, 0.3)


def assert_same_robot(data, episodes: list[Episode], env_id: str) -> None:
    """The dataset holds the robot's states and actions, divided as MamujocoEnv divides them."""
    parts, row = partition(env_id), 0
    for e in episodes:
        length = len(e["action"])
        batch = data.gather(torch.arange(row, row + length))
        assert np.abs(batch.state.numpy() - e["state"][:-1]).max() < 1e-5
        assert np.abs(batch.next_state.numpy() - e["state"][1:]).max() < 1e-5
        assert np.abs(batch.obs.numpy() - parts.observe(e["state"][:-1])).max() < 1e-5
        assert np.abs(parts.join(batch.actions.numpy()) - e["action"].clip(-1, 1)).max() < 1e-6
        assert np.abs(batch.reward.numpy() - e["reward"]).max() < 1e-5
        row += length + 1
    assert row == len(data.state) and data.avail is None


# ------------------------------------------------------------------------------------------- OMIGA


@pytest.mark.parametrize("env_id", TASKS)
def test_omiga_files_come_back_as_recorded(tmp_path, env_id):
    episodes = rollouts(env_id)
    data, metadata = load(write_h5(tmp_path / "some.hdf5", omiga_arrays(env_id, episodes)))
    assert (metadata["format"], metadata["env_id"]) == ("omiga", env_id)
    assert_same_robot(data, episodes, env_id)
    last = np.cumsum(np.array(LENGTHS) + 1) - 2
    assert np.flatnonzero(data.terminated.numpy()).tolist() == last.tolist()
    assert metadata["return_mean"] == pytest.approx(np.mean([e["reward"].sum() for e in episodes]))


def test_omigas_ant_motors_go_to_gymnasiums_agents(tmp_path):
    """OMIGA's agent 0 drives motors 0-3; in gymnasium-robotics 2-5 are agent 0's."""
    episodes = rollouts("Ant-2x4")
    data, _ = load(write_h5(tmp_path / "ant.hdf5", omiga_arrays("Ant-2x4", episodes)))
    first = episodes[0]["action"][0]
    assert np.allclose(data.actions[0], [first[[2, 3, 4, 5]], first[[6, 7, 0, 1]]])
    assert data.state.shape[1] == 105


def test_omiga_time_limit_truncates_and_actions_are_clipped(tmp_path):
    episodes = rollouts("HalfCheetah-6x1", (1000, 999))
    episodes[0]["action"][3] = [2, -3, 0, 0, 0, 0]
    arrays = omiga_arrays("HalfCheetah-6x1", episodes)
    path = write_h5(tmp_path / "some.hdf5", arrays | {"d": arrays["d"][:, 0], "r": arrays["r"]})
    data, metadata = load(path)
    assert np.flatnonzero(data.terminated.numpy()).tolist() == [1001 + 998]
    assert data.actions[3, :2, 0].tolist() == [1.0, -1.0]
    summary = datasets.describe(path)
    assert "1 episodes of 1000 steps count as truncated, not as terminated" in summary
    assert "clipped to [-1,1]" in summary and len(metadata["repaired"]) == 3


@pytest.mark.parametrize("shape", [(-1,), (-1, 3), (-1, 3, 1)])
def test_omiga_rewards_and_ends_may_be_per_agent(tmp_path, shape):
    episodes = rollouts("Hopper-3x1")
    arrays = omiga_arrays("Hopper-3x1", episodes)
    for k in "rd":
        arrays[k] = (arrays[k] if len(shape) == 1 else np.repeat(arrays[k], 3, 1)).reshape(shape)
    data, _ = load(write_h5(tmp_path / "some.hdf5", arrays))
    assert_same_robot(data, episodes, "Hopper-3x1")


def raw_vectors(arrays):
    arrays["o"] = arrays["s"] = arrays["o"] * 2 + 1


def other_state(arrays):
    arrays["s"] = arrays["s"][:, [1, 0, 2]]


def nan_action(arrays):
    arrays["a"][4, 1, 0] = np.nan


def short_reward(arrays):
    arrays["r"] = arrays["r"][:-1]


def agents_differ(arrays):
    arrays["r"] = arrays["r"] + np.arange(3)


def no_end(arrays):
    arrays["d"][:] = 0


def odd_task(arrays):
    arrays["o"] = arrays["s"] = arrays["o"][:, :2]
    arrays["a"] = arrays["a"][:, :2]


BROKEN_OMIGA = {
    "raw": (raw_vectors, "key o, row 0: not one state standardised"),
    "other_state": (other_state, "keys s and o differ"),
    "nan": (nan_action, "key a, row 4: NaN, infinity"),
    "short": (short_reward, "number of rows differs between keys"),
    "agents": (agents_differ, "key r, row 0: the agents' values differ"),
    "no_end": (no_end, "none of the 24 rows ends an episode"),
    "task": (odd_task, "as no task of OMIGA"),
}


@pytest.mark.parametrize("name", BROKEN_OMIGA)
def test_broken_omiga_file_is_refused_by_name_and_key(tmp_path, name):
    breaks, message = BROKEN_OMIGA[name]
    arrays = omiga_arrays("Hopper-3x1", rollouts("Hopper-3x1"))
    breaks(arrays)
    with pytest.raises(ValueError, match=f"{name}.hdf5: .*{message}"):
        load(write_h5(tmp_path / f"{name}.hdf5", arrays))


# ------------------------------------------------------------------------------------------- Vault


def smac_steps(seed: int = 0) -> dict[str, np.ndarray]:
    """Steps of three discrete episodes of 4, 5 and 3 steps, the second truncated."""
    rng, t, n = np.random.default_rng(seed), 12, 2
    avail = (rng.random((1, t, n, 5)) < 0.5).astype(np.float32)
    avail[..., 0] = 1
    ends = np.zeros((1, t, n), np.float32)
    ends[:, [3, 11]] = 1
    truncations = np.zeros_like(ends)
    truncations[:, 8] = 1
    reward = rng.normal(size=(1, t, 1)).astype(np.float32)
    return {
        "observations": rng.normal(size=(1, t, n, 6)).astype(np.float32),
        "actions": (avail * rng.random(avail.shape)).argmax(-1).astype(np.int32),
        "rewards": np.repeat(reward, n, 2),
        "terminals": ends,
        "truncations": truncations,
        "infos.state": rng.normal(size=(1, t, 7)).astype(np.float32),
        "infos.legals": avail,
    }


def write_with_flashbax(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    pytest.importorskip("flashbax", reason="flashbax, which writes Vaults, is not installed")
    import flashbax
    import jax
    from flashbax.vault import Vault

    nested = {k: v for k, v in arrays.items() if "." not in k}
    nested["infos"] = {k[6:]: v for k, v in arrays.items() if "." in k}
    one = jax.tree.map(lambda x: jax.numpy.asarray(x[0, 0]), nested)
    buffer = flashbax.make_flat_buffer(
        max_length=64, min_length=1, sample_batch_size=1, add_batch_size=1, add_sequences=True
    )
    state = buffer.add(buffer.init(one), jax.tree.map(jax.numpy.asarray, nested))
    vault = Vault(vault_name=path.parent.name, experience_structure=state.experience,
                  vault_uid=path.name, rel_dir=str(path.parent.parent))  # fmt: skip
    vault.write(state)
    return path


@pytest.mark.parametrize("writer", [write_vault, write_with_flashbax])
def test_vault_comes_back_step_by_step(tmp_path, writer):
    arrays = smac_steps()
    path = writer(tmp_path / "3s_vs_5z.vlt" / "Medium", arrays)
    data, metadata = load(path)
    assert (metadata["format"], metadata["env_id"]) == ("vault", "3s_vs_5z")
    assert data.lengths.tolist() == [4, 4, 3]  # the truncated one lost its last transition
    row = 0
    for start, length, ended in ((0, 4, True), (4, 4, False), (9, 3, True)):
        batch, steps = data.gather(torch.arange(row, row + length)), slice(start, start + length)
        after = np.minimum(np.arange(start, start + length) + 1, start + length - ended)
        for name, key in (("obs", "observations"), ("state", "infos.state")):
            assert np.array_equal(getattr(batch, name), arrays[key][0, steps])
            assert np.array_equal(getattr(batch, f"next_{name}"), arrays[key][0, after])
        assert np.array_equal(batch.avail, arrays["infos.legals"][0, steps])
        assert np.array_equal(batch.actions.argmax(-1), arrays["actions"][0, steps])
        assert np.array_equal(batch.reward, arrays["rewards"][0, steps, 0])
        assert batch.terminated.tolist() == [0.0] * (length - 1) + [float(ended)]
        row += length + 1
    assert row == len(data.obs) and metadata["final_observation"] == "repeated"
    summary = datasets.describe(path)
    assert "the last observation of 2 terminated episodes was repeated" in summary
    assert "the last transition of 1 truncated episodes was dropped" in summary


def test_vault_of_omigas_vectors_is_inverted_like_them(tmp_path):
    episodes = rollouts("HalfCheetah-6x1")
    arrays = {k: v[None] for k, v in omiga_arrays("HalfCheetah-6x1", episodes).items()}
    vault = {
        "observations": arrays["o"],
        "actions": arrays["a"],
        "rewards": np.repeat(arrays["r"], 6, 2).astype(np.float32),
        "terminals": np.repeat(arrays["d"], 6, 2),
        "truncations": np.zeros((*arrays["r"].shape[:2], 6), np.float32),
        "infos.state": arrays["s"][:, :, 0],
    }
    data, metadata = load(write_vault(tmp_path / "6halfcheetah.vlt" / "Expert", vault))
    assert (metadata["env_id"], metadata["final_observation"]) == ("HalfCheetah-6x1", "stored")
    assert_same_robot(data, episodes, "HalfCheetah-6x1")


def test_bad_vaults_are_refused(tmp_path):
    arrays = smac_steps()
    arrays["actions"][0, 5, 1] = 4
    arrays["infos.legals"][0, 5, 1, 4] = 0
    with pytest.raises(ValueError, match="key actions, row 5: not available by infos.legals"):
        load(write_vault(tmp_path / "a.vlt" / "x", arrays))
    arrays = smac_steps()
    arrays["observations"][0, 7, 0, 0] = np.nan
    with pytest.raises(ValueError, match="key observations, row 7: NaN, infinity"):
        load(write_vault(tmp_path / "b.vlt" / "x", arrays))
    arrays = smac_steps()
    del arrays["infos.state"]
    with pytest.raises(ValueError, match="no key infos.state"):
        load(write_vault(tmp_path / "c.vlt" / "x", arrays))
    arrays = smac_steps()
    arrays["infos.state"] = arrays["infos.state"][..., 0]
    with pytest.raises(ValueError, match="key infos.state, .*: rows of numbers are read"):
        load(write_vault(tmp_path / "e.vlt" / "x", arrays))
    with pytest.raises(ValueError, match="c.vlt: a Vault of x: give the folder of one"):
        load(tmp_path / "c.vlt")
    whole = write_vault(tmp_path / "d.vlt" / "x", smac_steps())
    for p in (whole / "d").iterdir():
        p.write_bytes(p.read_bytes()[: p.stat().st_size // 2])
    with pytest.raises(ValueError, match="d.vlt/x: .*cannot be read"):
        load(whole)
    for p in (whole / "d").iterdir():
        p.unlink()
    with pytest.raises(ValueError, match="d.vlt/x: .*cannot be read"):
        load(whole)


def test_time_limits_of_a_vault_stay_ends(tmp_path):
    """SMAC's are stored as ends, and there is no final observation to go on from."""
    arrays = smac_steps()
    arrays["terminals"][:, 8], arrays["truncations"][:] = 1, 0
    arrays["rewards"][:] = 1.0
    arrays["rewards"][:, 3] = 17.0  # the first episode is won: 20; the others are not
    arrays["infos.legals"][..., 0] = 0
    arrays["infos.legals"][..., 1] = 1
    arrays["actions"][:] = 1
    path = write_vault(tmp_path / "3s_vs_5z.vlt" / "Medium", arrays)
    columns, lengths, metadata = datasets.read_episodes(path)
    assert columns["won"].tolist() == [True, False, False]
    assert columns["terminated"].sum() == 3 and metadata["final_observation"] == "repeated"


def test_parallel_recordings_of_a_vault_are_all_read(tmp_path):
    one, two = smac_steps(0), smac_steps(1)
    both = {k: np.concatenate([one[k], two[k]]) for k in one}
    data, _ = load(write_vault(tmp_path / "x.vlt" / "y", both))
    parts = [load(write_vault(tmp_path / f"{k}.vlt" / "y", x))[0] for k, x in enumerate((one, two))]
    for name in ("obs", "state", "actions", "avail", "reward", "terminated"):
        assert torch.equal(getattr(data, name), torch.cat([getattr(p, name) for p in parts]))


def test_missing_tensorstore_says_what_to_install(tmp_path, monkeypatch):
    path = write_vault(tmp_path / "a.vlt" / "x", smac_steps())
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ImportError, match="pip install tensorstore"):
        load(path)


def test_same_data_under_two_names_are_pointed_out(tmp_path, capsys):
    for quality, seed in (("Medium", 0), ("Mixed", 0), ("Expert", 1)):
        write_vault(tmp_path / "3s_vs_5z.vlt" / quality, smac_steps(seed))
        path = write_h5(tmp_path / f"3m_{quality.lower()}.h5", {"x": np.full(9, seed)})
        assert duplicates(path, content_hash(path)) == (
            ["3m_medium.h5"] if quality == "Mixed" else []
        )
    for p in (tmp_path / "3s_vs_5z.vlt").rglob("*"):  # byte-equal, as a wrong upload is
        if "Mixed" in p.parts and p.is_file():
            p.unlink()
    medium, mixed = (tmp_path / "3s_vs_5z.vlt" / q for q in ("Medium", "Mixed"))
    for p in medium.rglob("*"):
        if p.is_file():
            (mixed / p.relative_to(medium)).write_bytes(p.read_bytes())
    load(medium)
    assert "Medium and Mixed hold the same data under two names" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ Minari


def write_minari(folder: Path, episodes: list[dict], env: str | None) -> Path:
    """Minari's own layout: groups episode_k, metadata.json beside."""
    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as f:
        for k, e in enumerate(episodes):
            group = f.create_group(f"episode_{k}")
            for key, x in e.items():
                if isinstance(x, dict):
                    for name, part in x.items():
                        group[f"{key}/{name}"] = part
                else:
                    group[key] = x
            group.create_group("infos")
    about = {"data_format": "hdf5", **({"env_spec": json.dumps({"id": env})} if env else {})}
    (folder / "data" / "metadata.json").write_text(json.dumps(about))
    return folder


def minari_episode(e: Episode, ended: bool, cut: bool) -> dict:
    last = np.arange(len(e["action"])) == len(e["action"]) - 1
    return {
        "observations": e["state"].astype(np.float64), "actions": e["action"],
        "rewards": e["reward"].astype(np.float64),
        "terminations": last & ended, "truncations": last & cut,
    }  # fmt: skip


@pytest.mark.parametrize("env_id", TASKS)
def test_minari_robots_are_divided_among_agents(tmp_path, env_id):
    episodes, robot = rollouts(env_id), env_id.partition("-")[0]
    ends = ((True, False), (False, True), (False, False))
    stored = [minari_episode(e, *end) for e, end in zip(episodes, ends, strict=True)]
    path = write_minari(tmp_path / "x-v0", stored, f"{robot}-v5")
    data, metadata = load(path)
    assert (metadata["format"], metadata["env_id"]) == ("minari", env_id)
    assert_same_robot(data, episodes, env_id)
    assert np.flatnonzero(data.terminated.numpy()).tolist() == [LENGTHS[0] - 1]
    again, _ = load(path / "data" / "main_data.hdf5")
    assert torch.equal(again.obs, data.obs)
    (path / "data" / "metadata.json").unlink()
    with pytest.raises(ValueError, match="does not say how its robot is divided: give --env-id"):
        load(path)
    assert torch.equal(load(path, env_id)[0].actions, data.actions)


def test_another_division_of_a_robot_can_be_chosen(tmp_path):
    episodes = rollouts("HalfCheetah-6x1")
    stored = [minari_episode(e, False, True) for e in episodes]
    path = write_minari(tmp_path / "x-v0", stored, "HalfCheetah-v5")
    data, metadata = load(path, "HalfCheetah-2x3")
    assert metadata["env_id"] == "HalfCheetah-2x3" and data.actions.shape[1:] == (2, 3)
    assert_same_robot(data, episodes, "HalfCheetah-2x3")
    with pytest.raises(ValueError, match="is of HalfCheetah.*, not of Hopper-3x1"):
        load(path, "Hopper-3x1")


def test_dataset_written_by_minari_is_read(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari", reason="minari is not installed")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    episodes = rollouts("Hopper-3x1")
    buffers = [
        EpisodeBuffer(id=k, infos={}, **minari_episode(e, True, False))
        for k, e in enumerate(episodes)
    ]
    minari.create_dataset_from_buffers(
        "mujoco/hopper/test-v0", buffer=buffers, env="Hopper-v5", algorithm_name="random",
        author="nobody", author_email="nobody@example.org", code_permalink="none",
    )  # fmt: skip
    data, metadata = load(tmp_path / "mujoco" / "hopper" / "test-v0")
    assert metadata["env_id"] == "Hopper-3x1"
    assert_same_robot(data, episodes, "Hopper-3x1")


def agents_episode(length: int, seed: int) -> dict:
    """Two agents; agent_1 has a longer observation than agent_0."""
    rng = np.random.default_rng(seed)
    obs = {f"agent_{i}": rng.normal(size=(length + 1, 3 + i)).astype("f4") for i in (0, 1)}
    actions = {f"agent_{i}": rng.uniform(-1, 1, size=(length, 2)).astype("f4") for i in (0, 1)}
    last = np.arange(length) == length - 1
    return {
        "observations": obs | {"state": rng.normal(size=(length + 1, 6)).astype("f4")},
        "actions": actions, "rewards": rng.normal(size=length),
        "terminations": last, "truncations": last & False,
    }  # fmt: skip


def test_minari_agents_are_stacked_and_padded(tmp_path):
    episodes = [agents_episode(length, length) for length in LENGTHS]
    data, metadata = load(write_minari(tmp_path / "x-v0", episodes, None))
    row = 0
    for e, length in zip(episodes, LENGTHS, strict=True):
        rows, steps = slice(row, row + length + 1), slice(row, row + length)
        for i in (0, 1):
            assert np.array_equal(data.obs[rows, i, : 3 + i], e["observations"][f"agent_{i}"])
            assert np.array_equal(data.actions[steps, i], e["actions"][f"agent_{i}"])
        assert not data.obs[rows, 0, 3].any()  # padding of the shorter observation
        assert np.array_equal(data.state[rows], e["observations"]["state"])
        assert np.allclose(data.reward[steps], e["rewards"])
        row += length + 1
    assert "env_id" not in metadata and metadata["transitions"] == sum(LENGTHS)


def test_bad_minari_datasets_are_refused(tmp_path):
    good = [minari_episode(e, True, False) for e in rollouts("Hopper-3x1")]
    for name, key, change, message in (
        ("nan", "rewards", lambda x: x * np.nan, "episode_1/rewards, row 0: NaN, infinity"),
        ("short", "actions", lambda x: x[:-1], r"actions has shape \(8, 3\), not \(9, 3\)"),
        ("narrow", "observations", lambda x: x[:, 1:], r"observations has shape \(10, 10\)"),
        ("early", "truncations", lambda x: x | True, "episode_1 ends before its last step"),
        ("objects", "rewards", lambda x: x.astype("S4"), "rewards holds no plain numbers"),
    ):
        bad = [dict(e) for e in good]
        bad[1][key] = change(bad[1][key])
        with pytest.raises(ValueError, match=message):
            load(write_minari(tmp_path / name, bad, "Hopper-v5"))
    agents = [agents_episode(length, length) for length in LENGTHS]
    for e in agents:
        e["observations"]["state"] = e["observations"]["state"][:, 0]
    with pytest.raises(ValueError, match="observations/state is .*: rows of real numbers are read"):
        load(write_minari(tmp_path / "flat", agents, None))


# ------------------------------------------------------------------------------ one layout for all


def test_a_file_without_a_task_is_not_converted(tmp_path):
    arrays = smac_steps()
    path = write_vault(tmp_path / "nameless.vlt" / "x", arrays)
    with pytest.raises(ValueError, match="does not say its task: give --env-id"):
        datasets.convert(path, tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


def test_every_format_converts_to_our_layout(tmp_path):
    cheetah = [minari_episode(e, False, True) for e in rollouts("HalfCheetah-6x1")]
    sources = {
        "vault": write_vault(tmp_path / "3s_vs_5z.vlt" / "Medium", smac_steps()),
        "omiga": write_h5(tmp_path / "o.h5", omiga_arrays("Ant-2x4", rollouts("Ant-2x4"))),
        "minari": write_minari(tmp_path / "x-v0", cheetah, "HalfCheetah-v5"),
    }
    for kind, path in sources.items():
        out = tmp_path / f"{kind}-out.h5"
        datasets.convert(path, out)
        (before, source), (after, metadata) = load(path), load(out)
        for name in ("obs", "state", "actions", "avail", "reward", "terminated"):
            x, y = getattr(before, name), getattr(after, name)
            assert (x is None and y is None) or torch.equal(x, y), (kind, name)
        same = ("env_id", "episodes", "transitions", "final_observation", "repaired")
        assert {k: metadata[k] for k in same} == {k: source[k] for k in same}
        assert (metadata["format"], metadata["converted_from"]) == ("episodes", kind)
        assert metadata["converted_sha256"] == source["sha256"] != metadata["sha256"]
    assert not list(tmp_path.glob(".*"))


def test_convert_fails_with_one_sentence_and_no_file(tmp_path, program):
    arrays = omiga_arrays("Hopper-3x1", rollouts("Hopper-3x1"))
    nan_action(arrays)
    bad, out = write_h5(tmp_path / "bad.h5", arrays), tmp_path / "out.h5"
    done = program("datasets", "convert", bad, out)
    assert done.returncode != 0 and not done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("python -m datasets: ") and last.endswith(
        "row 4: NaN, infinity or a number beyond 1e+18 in it."
    )
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["bad.h5"]


def test_truncated_file_is_refused(tmp_path):
    path = write_h5(tmp_path / "x.h5", omiga_arrays("Hopper-3x1", rollouts("Hopper-3x1")))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="x.h5: truncated or damaged"):
        load(path)


MEASURE = """
import sys, torch, datasets
def peak():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
before = peak()
data, _ = datasets.load_dataset(sys.argv[1], torch.device("cpu"))
tensors = (data.obs, data.state, data.actions, data.avail, data.reward, data.terminated)
print(peak() - before, sum(x.nbytes for x in tensors))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux reports peak memory")
def test_reading_needs_less_than_twice_the_arrays(tmp_path):
    e, t, n, o, a = 500, 121, 5, 80, 11
    filled = np.arange(t) <= 100
    with h5py.File(tmp_path / "big.h5", "w") as f:
        f["obs"] = np.ones((e, t, n, o), np.float32)
        f["state"] = np.ones((e, t, 120), np.float32)
        f["avail_actions"] = np.ones((e, t, n, a), np.int32)
        f["actions"] = np.zeros((e, t, n, 1), np.int64)
        f["reward"] = np.zeros((e, t, 1), np.float32)
        f["terminated"] = np.tile(np.arange(t) == 99, (e, 1))[..., None].astype(np.uint8)
        f["filled"] = np.tile(filled, (e, 1))[..., None].astype(np.int64)
    command = [sys.executable, "-c", MEASURE, tmp_path / "big.h5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    used, needed = map(int, done.stdout.split())
    assert needed > 100e6
    assert used < 2 * needed, f"{used / 1e6:.0f} MB for {needed / 1e6:.0f} MB of data"


def test_commands_print_what_was_asked_for(tmp_path, program):
    out = tmp_path / "out.h5"
    cheetah = [minari_episode(e, False, True) for e in rollouts("HalfCheetah-6x1")]
    path = write_minari(tmp_path / "x-v0", cheetah, "HalfCheetah-v5")
    done = program("datasets", "convert", path, out, "--env-id", "HalfCheetah-2x3")
    assert done.returncode == 0, done.stderr
    assert "2 agents, 3 motors each, observations 12, state 17" in done.stdout
    done = program("datasets", "download", "cfcql/9z")
    assert done.returncode != 0 and "omiga/3hopper" in done.stdout
    assert done.stderr.startswith("python -m datasets: no dataset is named 'cfcql/9z'")
