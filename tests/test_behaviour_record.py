"""Recording with behaviour policies: parts, seeds, cache, shipped weights, the command line."""

import hashlib
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

import behaviour
import datasets
import envs
from behaviour import mappo, record, weights
from behaviour.__main__ import cli

SHIPPED = sorted(weights.FOLDER.glob("*.npz"))


def load(path):
    return datasets.load_dataset(path, torch.device("cpu"), holdout=0.2)


# ---------------------------------------------------------------------------------- who takes part


def test_policies_of_a_quality_follow_its_definition():
    policies = ["a", "b", "c", "d", "medium", "expert"]
    assert record.policies_of("medium", policies) == ["medium"]
    assert record.policies_of("expert", policies) == ["expert"]
    assert record.policies_of("mixed", policies) == ["medium", "expert"]
    assert record.policies_of("medium-replay", policies) == ["a", "b", "c", "d", "medium"]


@pytest.fixture
def stub(monkeypatch):
    """Replace the simulator: policies are numbers, and their episodes' rewards are that number."""
    seeds = []

    def play(env, policy, generator, seed):
        seeds.append(seed)
        steps, slots = 2, env.num_envs
        ended = np.array([[False], [True]]).repeat(slots, 1)
        return {
            "obs": np.zeros((steps + 1, slots, 1, 1), np.float32),
            "state": np.zeros((steps + 1, slots, 1), np.float32),
            "avail": np.ones((steps + 1, slots, 1, 2), np.float32),
            "actions": np.eye(2, dtype=np.float32)[np.zeros((steps, slots, 1), int)],
            "reward": np.full((steps, slots), float(policy), np.float32),
            "terminated": ended, "won": ended, "filled": np.ones((steps, slots), bool),
        }  # fmt: skip

    def make(env_id, num_envs=1, hide=True):
        spec = SimpleNamespace(episode_limit=6, backend="stub", discrete=True)
        return SimpleNamespace(num_envs=num_envs, spec=spec, columns=[0])

    monkeypatch.setattr(record, "play", play)
    monkeypatch.setattr(record.envs, "make", make)
    monkeypatch.setattr(weights, "load_policies", lambda env_id, spec: [1, 2, 3, 4, 5, 6])
    return seeds


@pytest.mark.parametrize(
    "quality,episodes,parts",
    [
        ("medium", 7, [(5, 7)]),
        ("expert", 450, [(6, 450)]),  # more than run in parallel: three rounds
        ("mixed", 8, [(5, 4), (6, 4)]),
        ("mixed", 5, [(5, 3), (6, 2)]),
        ("mixed", 500, [(5, 250), (6, 250)]),
        ("medium-replay", 5, [(k, 1) for k in (1, 2, 3, 4, 5)]),
        ("medium-replay", 7, [(1, 2), (2, 2), (3, 1), (4, 1), (5, 1)]),
        ("medium-replay", 10, [(k, 2) for k in (1, 2, 3, 4, 5)]),
        ("medium-replay", 13, [(1, 3), (2, 3), (3, 3), (4, 2), (5, 2)]),
    ],
)
def test_recording_holds_its_policies_in_equal_parts(tmp_path, stub, quality, episodes, parts):
    path = tmp_path / "stub.h5"
    record.record("nowhere", quality, episodes, 0, path)
    with h5py.File(path) as f:
        policy = f["reward"][:, 0, 0]
        assert f.attrs["quality"] == quality and f.attrs["episodes"] == episodes
    assert policy.tolist() == [k for k, share in parts for _ in range(share)]
    assert len(set(stub)) == len(stub)  # no two rounds start from the same seed


def test_recordings_with_different_seeds_share_no_episode(tmp_path, stub):
    record.record("nowhere", "medium-replay", 3000, 0, tmp_path / "a.h5")
    first = set(stub)
    stub.clear()
    record.record("nowhere", "medium-replay", 3000, 1, tmp_path / "b.h5")
    assert not first & set(stub)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_beyond_the_generators_are_refused(tmp_path, stub, seed):
    with pytest.raises(ValueError, match="--seed is .*: give 0 to 4,294,967,295"):
        record.record("nowhere", "medium", 4, seed, tmp_path / "a.h5")


def test_fewer_episodes_than_policies_are_refused(tmp_path, stub):
    with pytest.raises(ValueError, match="--episodes is 4, but medium-replay .* give 5 or more"):
        record.record("nowhere", "medium-replay", 4, 0, tmp_path / "a.h5")
    assert not list(tmp_path.iterdir())


def test_cached_recording_is_reused_until_weights_change(tmp_path, monkeypatch, stub):
    monkeypatch.setattr(record, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    shipped = tmp_path / "nowhere.npz"
    shipped.write_bytes(b"weights of today")
    path = behaviour.load_or_record("nowhere", "mixed", 4)
    assert path.exists() and len(stub) == 2
    assert behaviour.load_or_record("nowhere", "mixed", 4, 0) == path and len(stub) == 2
    others = [("nowhere", "mixed", 4, 1), ("nowhere", "mixed", 6, 0), ("nowhere", "expert", 4, 0)]
    assert len({path, *(record.cached(*other) for other in others)}) == 4
    shipped.write_bytes(b"weights of tomorrow")
    assert behaviour.load_or_record("nowhere", "mixed", 4) != path and len(stub) == 4


def test_cache_names_hold_arguments_and_digest_of_weights():
    source = (weights.FOLDER / "2s3z.npz").read_bytes() + " ".join(envs.HIDDEN).encode()
    digest = hashlib.sha256(source).hexdigest()[:8]
    path = record.cached("2s3z", "mixed", 600, 0)
    assert path.name == f"2s3z-mixed-600ep-seed0-{digest}.h5"
    assert path.parent == weights.FOLDER.parent / "data"


def test_default_number_of_episodes():
    assert {behaviour.default_episodes(k) for k in (*envs.PAPER_SMAC, "3m")} == {600}
    assert {behaviour.default_episodes(k) for k in (*envs.PAPER_MUJOCO, "Ant-4x2")} == {200}


# ---------------------------------------------------------------------------------- shipped weights


def test_every_task_of_the_paper_has_its_policies():
    assert {p.stem for p in SHIPPED} >= {*envs.PAPER_SMAC, *envs.PAPER_MUJOCO}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_policies_load_finite_and_different(path):
    spec = envs.make(path.stem, hide=False).spec
    policies = weights.load_policies(path.stem, spec)
    assert len(policies) == 6  # five snapshots up to medium, and the final policy
    obs = torch.randn(20, spec.num_agents, spec.obs_dim, generator=torch.Generator().manual_seed(0))
    avail = torch.ones(20, spec.num_agents, spec.action_dim) if spec.discrete else None
    with np.load(path, allow_pickle=False) as stored:
        for name, x in policies[-1].state_dict().items():
            assert np.isfinite(stored[name]).all()
            assert np.array_equal(x.numpy(), stored[name][-1].astype(np.float32))
        steps = stored["snapshot_steps"]
        assert (np.diff(steps[:-1]) >= 0).all() and steps[-1] > steps[-2]
    outputs = []
    for policy in policies:
        out = policy.distribution(obs, avail)
        outputs.append(out.exp() if spec.discrete else out[0])  # probabilities, or means
        assert torch.isfinite(outputs[-1]).all()
        if spec.discrete:
            torch.testing.assert_close(outputs[-1].sum(-1), torch.ones(20, spec.num_agents))
        else:
            assert (out[1].exp() > 0).all() and out[1].shape == outputs[-1].shape
    assert (outputs[-1] - outputs[-2]).abs().max() > 0.01


def test_a_task_without_policies_says_how_to_get_them():
    message = "No behaviour policy for 9z.*python -m behaviour train --env-id 9z"
    with pytest.raises(FileNotFoundError, match=message):
        weights.load_policies("9z", SimpleNamespace(obs_dim=3, action_dim=5))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_written(tmp_path, value):
    path = tmp_path / "3m.npz"
    with pytest.raises(ValueError, match="3m.npz was not written: NaN or infinity in w"):
        weights.save_weights(path, {"v": np.zeros(3), "w": np.array([0, value], np.float16)})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- real recordings


def test_recording_is_reproducible_from_its_seed(tmp_path):
    digests = []
    for k, seed in enumerate((0, 0, 1)):
        path = tmp_path / f"{k}.h5"
        record.record("3s_vs_5z", "medium", 8, seed, path)
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    data, metadata = load(tmp_path / "0.h5")
    assert [metadata[k] for k in ("env_id", "quality", "episodes")] == ["3s_vs_5z", "medium", 8]
    assert data.obs.shape[1:] == (3, 73) and data.state.shape[1:] == (96,)
    assert 0 < metadata["return_mean"] <= 20.01
    rewards = data.reward.split((data.lengths + 1).tolist())
    assert metadata["return_mean"] == pytest.approx(np.mean([r[:-1].sum() for r in rewards]))
    other, _ = load(tmp_path / "2.h5")
    assert not torch.equal(data.state[0], other.state[0])


# --------------------------------------------------------------------------------- the command line


def test_record_command_prints_what_it_recorded(tmp_path, capsys):
    path = tmp_path / "hopper.h5"
    flags = "record --env-id Hopper-3x1 --quality mixed --episodes 3 --seed 2 --out"
    cli([*flags.split(), str(path)])
    printed = capsys.readouterr().out
    assert datasets.describe(path) in printed and f"wrote {path}" in printed
    _, metadata = load(path)
    found = [metadata[k] for k in ("env_id", "quality", "episodes", "seed")]
    assert found == ["Hopper-3x1", "mixed", 3, 2]


def test_list_command_prints_all_datasets(monkeypatch, tmp_path, capsys, dataset):
    asked = []

    def load_or_record(env_id, quality, episodes, seed):
        asked.append((env_id, quality, episodes))
        return dataset

    monkeypatch.setattr(record, "load_or_record", load_or_record)
    cli(["list", "--figure", str(tmp_path / "curves.png")])
    rows = capsys.readouterr().out.strip().splitlines()[2:]
    assert len(rows) == len(set(asked)) == 32
    assert {n for _, _, n in asked} == {200, 600}
    assert rows[-1].startswith("| HalfCheetah-6x1 | mixed | 8 |")
    assert (tmp_path / "curves.png").stat().st_size > 1000


TRAIN = "train --env-id Hopper-3x1 --total-steps 40 --num-envs 2 --rows 20 --hidden 8 --epochs 1"


def test_train_command_writes_policies_that_load(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    cli(TRAIN.split())
    policies = weights.load_policies("Hopper-3x1", envs.make("Hopper-3x1").spec)
    assert len(policies) == 6 and [p.name for p in tmp_path.iterdir()] == ["Hopper-3x1.npz"]


def test_train_command_replaces_a_file_only_if_told(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    path = tmp_path / "Hopper-3x1.npz"
    path.write_bytes(b"shipped")
    for flags in ([], ["--out", str(path)]):
        with pytest.raises(SystemExit, match="^python -m behaviour: .*Hopper-3x1.npz exists: give"):
            cli([*TRAIN.split(), *flags])
        assert path.read_bytes() == b"shipped"
    cli([*TRAIN.split(), "--replace"])
    assert path.read_bytes() != b"shipped"


def test_train_command_defaults_depend_on_the_task(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(mappo, "train", lambda args: seen.append(args) or 1 / 0)
    for env_id in ("5m_vs_6m", "Hopper-3x1", "3m"):
        with pytest.raises(ZeroDivisionError):
            cli(["train", "--env-id", env_id, "--out", str(tmp_path / "x.npz")])
    assert seen == [mappo.defaults(k) for k in ("5m_vs_6m", "Hopper-3x1", "3m")]


@pytest.mark.parametrize(
    "flags,message",
    [
        ("train --env-id 3m --out x.npz --lr nan", "--lr is nan"),
        ("train --env-id 9z --out x.npz", "Unknown env_id '9z'"),
        ("train --env-id 3m --out .", ". is a folder: name a file"),
        ("train --env-id 3m --out README.md/x.npz", "README.md is not a folder"),
        ("record --env-id 3m --quality medium --out x.h5", "No behaviour policy for 3m"),
        ("record --env-id 2s3z --quality mixed --episodes 1 --out x.h5", "--episodes is 1"),
        ("record --env-id 2s3z --quality mixed --seed -1 --out x.h5", "--seed is -1"),
        ("record --env-id terran_5_vs_5 --quality medium --out x.h5", "SMAX and MuJoCo only"),
        ("list --figure x.foo", "Format 'foo' is not supported"),
    ],
)
def test_command_line_errors_are_one_sentence(monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").touch()
    with pytest.raises(SystemExit) as error:
        cli(flags.split())
    said = str(error.value)
    assert said.startswith("python -m behaviour: ") and message in said and "\n" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_commands_take_only_the_flags_that_they_use(capsys):
    for flags in ("record --env-id 3m --quality medium --lr 0.1", "list --episodes 3"):
        with pytest.raises(SystemExit) as error:
            cli(flags.split())
        assert error.value.code == 2
    assert "--lr" in capsys.readouterr().err
