"""Files, folders, signals and flags that a user may meet: nothing is lost, nothing is believed.

The first test runs a sample of faults.py; `python tests/faults.py` runs all of it.
"""

import contextlib
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import h5py
import numpy as np
import pytest
import torch
from test_datasets_formats import smac_steps, write_h5, write_vault
from test_sync import make_data

import datasets
import envs
import train
from behaviour import record, weights
from behaviour.policy import Policy
from datasets import files
from datasets.errors import Interrupted, handling, interrupt
from datasets.files import Target
from datasets.load import task_in_name
from datasets.rows import numbers
from experiment.folder import read_checkpoint, same_kind, take
from experiment.report import read_final
from simulators.mamujoco import partition

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind, count", [("files", 60), ("checkpoints", 6), ("flags", 20)])
def test_a_sample_of_the_faults(kind, count, request):
    if kind == "checkpoints":  # of which run.png draws nothing
        request.getfixturevalue("undrawn")
    assert faults.run_cases(kind, range(count)) == []


@pytest.fixture
def toy(tmp_path) -> Path:
    path = tmp_path / "toy.h5"
    datasets.save_episodes(path, faults.battles(), {"env_id": "toy"})
    return path


@contextlib.contextmanager
def held(path: Path):
    """Another process holds the file's lock."""
    line = [sys.executable, "-c", HOLD, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, **pipes) as process:
        assert process.stdout.readline() == "locked\n"
        yield
        process.communicate()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte, of a real kernel."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # TensorBoard has a file open


# ------------------------------------------------------------------------------- disks and folders


def test_a_full_disk_ends_a_run_in_one_sentence(small_disk, toy):
    (small_disk / "filler").write_bytes(bytes(2**20 - 120_000))
    flags = [
        *faults.TINY,
        "--dataset",
        str(toy),
        "--hidden",
        "64",
        "--out",
        str(small_disk / "run"),
    ]
    code, output = faults.command(*flags)
    assert re.fullmatch("train.py: .*checkpoint.pt cannot be written: No space left.*", code)
    assert "Traceback" not in output and not list(small_disk.rglob("*.part"))


def test_a_full_disk_leaves_no_part_of_a_recording(small_disk):
    rng = np.random.default_rng(0)
    arrays = faults.battles() | {"obs": rng.normal(size=(6, 9, 3, 20_000)).astype(np.float32)}
    with pytest.raises(OSError, match="x.h5 cannot be written: No space left on device"):
        datasets.save_episodes(small_disk / "x.h5", arrays, {})
    assert not list(small_disk.iterdir())


def test_a_read_only_folder_is_noticed_before_an_hour_of_playing(small_disk, monkeypatch, toy):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    monkeypatch.setattr(record, "CACHE", small_disk / "data")
    monkeypatch.setattr(record, "play", None)
    with pytest.raises(OSError, match="Read-only file system"):
        record.load_or_record("Hopper-3x1", "medium", 2)
    code, _ = faults.command("--dataset", str(toy), "--out", str(small_disk / "run"))
    assert "Read-only file system" in code


def test_what_a_failing_write_drops_reads_as_zeros(tmp_path, monkeypatch):
    target = Target(tmp_path / "x")
    target.write(b"kept")

    class Full:
        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, data):
            raise OSError(28, "No space left on device")

    file, target.file = target.file, Full()
    assert target.write(b"dropped") == 7 and target.error.errno == 28 and target.tell() == 11
    target.seek(2)
    into = bytearray(b"......")
    assert target.readinto(into) == 6 and into == b"pt\0\0\0\0"
    target.close()


def test_a_signal_waits_for_the_end_of_a_write(tmp_path):
    written = []
    with pytest.raises(Interrupted), handling(interrupt):
        with datasets.replacing(tmp_path / "x") as target:
            os.kill(os.getpid(), signal.SIGTERM)
            written.append(target.write(b"all of it"))  # as HDF5 calls it, which loses exceptions
    assert written == [9] and not list(tmp_path.iterdir())


def test_two_writers_with_one_process_id_keep_their_parts(tmp_path):
    with datasets.replacing(tmp_path / "x") as one, datasets.replacing(tmp_path / "x") as two:
        one.write(b"first")
        two.write(b"second")
    assert (tmp_path / "x").read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1


def test_our_own_files_may_shrink_as_much_as_deflate_can(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.rows.UNCHECKED", 0)
    with h5py.File(tmp_path / "x.h5", "w") as f:
        x = f.create_dataset("filled", data=np.ones((2000, 1000), np.int64), compression="gzip")
        assert x.nbytes > 200 * x.id.get_storage_size()
        numbers(tmp_path / "x.h5", "filled", x)


def test_a_task_that_is_no_text_is_not_believed(tmp_path):
    datasets.save_episodes(tmp_path / "x.h5", faults.battles(), {"env_id": 2.5})
    assert "env_id" not in datasets.read_episodes(tmp_path / "x.h5")[2]


def test_the_folder_tells_the_task_of_a_file(tmp_path):
    (tmp_path / "8m").mkdir()
    datasets.save_episodes(tmp_path / "8m" / "medium.h5", faults.battles(), {})
    with pytest.raises(ValueError, match="recorded on 8m, not on 3m, as its name says"):
        datasets.read_episodes(tmp_path / "8m" / "medium.h5", "3m")


def test_parts_of_killed_processes_are_removed_and_others_kept(tmp_path):
    dead, alive, other = (tmp_path / f".{n}.part" for n in ("x.h5.1", "x.h5.2", "y.h5.1"))
    dead.touch()
    other.touch()
    with held(alive):
        datasets.write_atomic(tmp_path / "x.h5", b"new")
        assert {p.name for p in tmp_path.iterdir()} == {"x.h5", alive.name, other.name}


def test_a_run_s_folder_has_one_owner(toy, tmp_path, undrawn):
    run, flags = tmp_path / "run", [*faults.TINY, "--dataset", str(toy)]
    run.mkdir()
    (run / "metrics.csv").write_text("of the other\n")
    with held(run / ".lock"):
        code, _ = faults.command(*flags, "--out", str(run))
        assert "belongs to another process that is running" in code
        assert (run / "metrics.csv").read_text() == "of the other\n"
    assert faults.command(*flags, "--out", str(run))[0] == 0


# -------------------------------------------------------------------------------- signals, resuming


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(toy, tmp_path, monkeypatch, undrawn, number):
    run, flags = tmp_path / "with space", [*faults.TINY, "--dataset", str(toy)]
    faults.command(*flags, "--out", str(tmp_path / "whole"))
    done, descend = [], train.descend

    def interrupted(*arguments):
        done.append(1)
        if len(done) == 6:  # in the second phase
            os.kill(os.getpid(), number)
        descend(*arguments)

    monkeypatch.setattr(train, "descend", interrupted)
    code, output = faults.command(*flags, "--out", str(run))
    assert code == 128 + number and len(done) == 6
    told = re.search(r"stopped; (.*) is kept. Go on with: (python train.py .*)", output)
    assert Path(told[1]) == run / "checkpoint.pt" and Path(told[1]).exists()
    monkeypatch.setattr(train, "descend", descend)
    assert faults.command(*shlex.split(told[2])[2:])[0] == 0
    assert faults.content(run) == faults.content(tmp_path / "whole")


def test_ctrl_c_during_the_imports_is_no_traceback():
    line = [sys.executable, str(faults.ROOT / "train.py")]
    with subprocess.Popen(line, stderr=subprocess.PIPE) as process:
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        assert b"Traceback" not in process.communicate()[1]
        assert process.returncode == -signal.SIGINT


def test_a_second_signal_ends_at_once(toy, tmp_path, monkeypatch):
    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("still running")

    monkeypatch.setattr(train, "descend", interrupted)
    flags = [*faults.TINY, "--dataset", str(toy), "--out", str(tmp_path / "run")]
    code, output = faults.command(*flags)
    assert code == 130 and "once more: at once" in output and "checkpoint.pt is kept" in output


def test_resume_may_start_and_knows_a_file_by_its_content(toy, tmp_path, monkeypatch, undrawn):
    run = ["--out", str(tmp_path / "run"), "--resume"]
    code, output = faults.command(*faults.TINY, "--dataset", str(toy), *run)
    assert code == 0 and "no checkpoint yet: the run starts" in output
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "final.json").unlink()
    assert faults.command(*faults.TINY, "--dataset", "./toy.h5", *run)[0] == 0
    assert (tmp_path / "run" / "final.json").exists()


def test_damaged_metrics_are_told(toy, tmp_path, undrawn):
    flags = [*faults.TINY, "--dataset", str(toy), "--out", str(tmp_path / "run")]
    faults.command(*flags)
    path = tmp_path / "run" / "metrics.csv"
    whole = path.read_text()
    path.write_text(whole + "clone,4,b")  # a killed process ends so
    assert faults.command(*flags, "--resume")[0] == 0 and path.read_text() == whole
    path.write_text(whole + "clone,4,td error (k@1; a%),0.1\n")  # a name of one's own
    assert faults.command(*flags, "--resume")[0] == 0
    for row in ("clone,4,bc\n", "clone,x,bc,0.1\n", "nothing,4,bc,0.1\n", "clone,4,bc,\xff\n"):
        path.write_text(whole + row, encoding="latin-1")
        code, _ = faults.command(*flags, "--resume")
        assert re.search(rf"metrics.csv, line {whole.count(chr(10)) + 1} is damaged", code)
    path.unlink()
    code, output = faults.command(*flags, "--resume")
    assert code == 0 and "the metrics so far are lost" in output


# --------------------------------------------------------------------------------- what files hold


def test_a_row_too_few_is_repaired(tmp_path):
    arrays = faults.battles()
    whole, lengths, _ = datasets.read_episodes(write_h5(tmp_path / "whole.h5", arrays))
    filled = arrays["filled"][..., 0]
    filled[np.arange(6), filled.sum(1) - 1] = 0
    columns, again, metadata = datasets.read_episodes(write_h5(tmp_path / "short.h5", arrays))
    assert "filled marks L instead of L+1 rows" in metadata["repaired"][0]
    assert np.array_equal(lengths, again)
    assert all(np.array_equal(columns[k], whole[k]) for k in ("obs", "reward", "terminated"))


@pytest.mark.parametrize("way, message", [
    ("rewards late", "episode 0: not 0 on its final row"), ("rewards early", "shifted by a row"),
    ("ends late", "not 0 on its final row"), ("float ids", "whole numbers, as ids"),
    ("no agents", "holds no episodes, rows or agents"),
])  # fmt: skip
def test_what_would_be_read_wrong_is_refused(tmp_path, way, message):
    path = write_h5(tmp_path / "x.h5", faults.battles())
    with h5py.File(path, "r+") as f:
        faults.EPISODES[way](f, None)
    with pytest.raises(ValueError, match=f"x.h5: .*{message}"):
        datasets.read_episodes(path)


def test_a_changed_value_of_a_recording_is_refused(toy):
    with h5py.File(toy, "r+") as f:
        f["obs"][0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="toy.h5: its content is not what was written"):
        datasets.read_episodes(toy)


def test_an_episode_ends_where_agents_end_or_are_cut(tmp_path):
    arrays = smac_steps()
    arrays["terminals"][0, 3], arrays["truncations"][0, 3] = [1, 0], [0, 1]
    columns, lengths, _ = datasets.read_episodes(write_vault(tmp_path / "a.vlt" / "x", arrays))
    assert lengths.tolist() == [3, 4, 3]  # two were truncated: their last step is left out
    assert columns["terminated"].sum() == 1


def test_a_dataset_says_its_task(toy, tmp_path, monkeypatch):
    assert train.parse(["--dataset", str(toy)]).env_id == "toy"
    nameless = write_h5(tmp_path / "smac_3m_medium.h5", faults.battles())
    assert train.parse(["--dataset", str(nameless)]).env_id == "3m"
    with pytest.raises(ValueError, match="was recorded on 3m, not on 3s_vs_5z"):
        datasets.read_episodes(nameless, "3s_vs_5z")
    unknown = nameless.rename(tmp_path / "x.h5")
    code, _ = faults.command("--dataset", str(unknown))
    assert code == f"train.py: --dataset {unknown} does not say its task: give --env-id."


def test_motors_that_do_not_exist_are_not_recorded(tmp_path, monkeypatch):
    pytest.importorskip("gymnasium_robotics", reason="needs gymnasium-robotics (README)")
    env_id = "Humanoid-9|8"
    policies = [Policy(envs.make(env_id).spec, 8) for _ in range(6)]
    monkeypatch.setattr(weights, "load_policies", lambda *_: policies)
    record.record(env_id, "medium", 1, 0, tmp_path / "x.h5")
    columns, _, _ = datasets.read_episodes(tmp_path / "x.h5")
    missing = partition(env_id).action_index == partition(env_id).motors
    assert missing.sum() == 1 and not columns["actions"][:, missing].any()
    assert columns["actions"][:, ~missing].any()


@pytest.mark.parametrize("damage", ["flip", "truncated", "text", "nan", "shape"])
def test_a_damaged_behaviour_policy_is_refused(tmp_path, monkeypatch, damage):
    shipped = dict(np.load(weights.FOLDER / "Hopper-3x1.npz"))
    path = tmp_path / "Hopper-3x1.npz"
    if damage == "nan":
        shipped["log_std"] = shipped["log_std"] * np.nan
    if damage == "shape":
        shipped["log_std"] = shipped["log_std"][:, :1]
    np.savez_compressed(path, **shipped)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 if damage == "flip" else 0
    path.write_bytes({"truncated": data[:-100], "text": b"weights"}.get(damage, data))
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    with pytest.raises(
        ValueError, match="Hopper-3x1.npz.* damaged|Hopper-3x1.npz holds no"
    ) as told:
        weights.load_policies("Hopper-3x1", envs.make("Hopper-3x1").spec)
    assert "\n" not in str(told.value)


# ---------------------------------------------------------------------- found by trying to break it


def test_infinity_in_half_precision_is_refused(tmp_path):
    arrays = faults.battles()
    arrays |= {k: arrays[k].astype(np.float16) for k in ("obs", "state", "reward")}
    datasets.read_episodes(write_h5(tmp_path / "half.h5", arrays))
    arrays["obs"][0, 0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="key obs, episode 0: NaN, infinity"):
        datasets.read_episodes(write_h5(tmp_path / "x.h5", arrays))


def test_paths_are_followed_as_the_system_does(tmp_path, monkeypatch):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name / "c").mkdir(parents=True)
        write_h5(tmp_path / name / "d.h5", faults.battles(seed))
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b" / "c")
    columns, _, _ = datasets.read_episodes(tmp_path / "a" / "link" / ".." / "d.h5")
    assert np.array_equal(columns["state"][0], faults.battles(1)["state"][0, 0])


def test_a_vault_s_path_is_no_address(tmp_path):
    for name, seed in (("x y.vlt", 0), ("x%20y.vlt", 1), ("v#1?.vlt", 2)):
        write_vault(tmp_path / "plain" / "Good", smac_steps(seed), spare=50)
        (tmp_path / "plain").rename(tmp_path / name)
    for name, seed in (("x%20y.vlt", 1), ("v#1?.vlt", 2)):
        columns, _, _ = datasets.read_episodes(tmp_path / name / "Good")
        assert np.array_equal(columns["state"][0], smac_steps(seed)["infos.state"][0, 0])


def test_rows_that_a_vault_never_wrote_are_no_data(tmp_path):
    path, arrays = tmp_path / "a.vlt" / "x", smac_steps()
    del arrays["infos.legals"]
    arrays["actions"] = np.random.default_rng(0).uniform(-1, 1, (1, 12, 2, 3)).astype(np.float32)
    datasets.read_episodes(write_vault(path, arrays))
    faults.overcount(path, np.random.default_rng(0), count=40)
    with pytest.raises(ValueError, match="its index counts 40 rows, of which the last are empty"):
        datasets.read_episodes(path)


@pytest.mark.parametrize("name, env_id, accepted", [
    ("7m_vs_8m.h5", "7m_vs_8m", True), ("odis_7m_vs_8m_medium.h5", "7m_vs_8m", True),
    ("3m_hard.h5", "3m_hard", True), ("8m_vs_9m.h5", "8m", False), ("5m_vs_6m.h5", "6m", False),
    ("recorded.h5", "anything", True), ("Ant-2x4.h5", "Ant-4x2", False),
])  # fmt: skip
def test_a_name_refuses_only_what_it_contradicts(tmp_path, name, env_id, accepted):
    path = write_h5(tmp_path / name, faults.battles())
    if accepted:
        assert datasets.read_episodes(path, env_id)[2]["env_id"] == env_id
    else:
        with pytest.raises(ValueError, match="as its name says: rename it if that is wrong"):
            datasets.read_episodes(path, env_id)


def test_unknown_maps_are_not_taken_for_known_ones():
    assert [task_in_name(x) for x in ("7m_vs_8m", "8m", "x_8m_y", "28m", "3s_vs_5z-medium")] == [
        None, "8m", "8m", None, "3s_vs_5z",
    ]  # fmt: skip


def test_a_task_stored_as_bytes_counts(tmp_path):
    path = write_h5(tmp_path / "x.h5", faults.battles())
    with h5py.File(path, "r+") as f:
        f.attrs["env_id"] = np.bytes_(b"8m")
    with pytest.raises(ValueError, match="was recorded on 8m, not on 3m, as it says itself"):
        datasets.read_episodes(path, "3m")


def test_a_large_reward_before_the_victory_is_no_shift(tmp_path):
    arrays = faults.battles()
    last = arrays["filled"][..., 0].sum(1) - 2
    arrays["reward"][:] = 0
    arrays["reward"][np.arange(6), last - 1] = 9.0  # many die at once, ...
    arrays["reward"][np.arange(6), last] = 5.0  # ... and victory pays less
    datasets.read_episodes(write_h5(tmp_path / "x.h5", arrays))


def test_a_link_within_the_file_is_followed(tmp_path):
    path = write_h5(tmp_path / "x.h5", faults.battles())
    with h5py.File(path, "r+") as f:
        f["legal"] = h5py.SoftLink("/avail_actions")
    datasets.read_episodes(path)


def test_a_broken_neighbour_does_not_matter(tmp_path):
    path = write_vault(tmp_path / "a.vlt" / "Good", smac_steps())
    write_vault(tmp_path / "a.vlt" / "Poor", smac_steps(1))
    (tmp_path / "a.vlt" / "Poor" / "gone").symlink_to("/nowhere")
    datasets.read_episodes(path)


def test_files_of_others_are_not_replaced(toy, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "metrics.csv").write_text("years of work")
    flags = [*faults.TINY, "--dataset", str(toy)]
    assert "is no run's folder: name another" in faults.command(*flags, "--out", str(mine))[0]
    monkeypatch.chdir(mine)
    assert "--out is the current folder" in faults.command(*flags, "--out", "")[0]
    assert {p.name for p in mine.iterdir()} == {"metrics.csv"}
    before = toy.read_bytes()
    for out in (toy, mine / "metrics.csv"):
        with pytest.raises(ValueError, match="is the source or no dataset: name another file"):
            datasets.convert(toy, out)
    assert toy.read_bytes() == before


def test_writers_of_one_file_do_not_hinder_each_other(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\n"
        "from datasets.files import check_writable, write_atomic\n"
        "for _ in range(200):\n    check_writable(Path('x'))\n    write_atomic(Path('x'), b'1' * 9)"
    )
    line = [sys.executable, "-c", code, str(faults.ROOT)]
    both = [subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(2)]
    assert [p.communicate()[1] for p in both] == [b"", b""]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_part_that_is_begun_anew_is_not_taken_for_a_dead_ones(tmp_path, monkeypatch):
    part = tmp_path / ".x.1.part"
    part.write_bytes(b"finished")

    def lock(_):  # in the meantime its writer finishes, and begins the next one
        part.rename(tmp_path / "x")
        part.write_bytes(b"next")
        return True

    monkeypatch.setattr(files, "lock", lock)
    files.remove_parts(tmp_path, "x")
    assert part.read_bytes() == b"next"


@pytest.mark.parametrize("kind", ["SGD", "RMSprop", "Adam", "AdamW"])
def test_a_learner_may_have_any_optimiser(kind):
    """And of Adam's memory nothing may be missing, which torch would notice at the next step."""

    def made():
        layer = torch.nn.Linear(2, 3)
        return layer, getattr(torch.optim, kind)(layer.parameters(), lr=0.1, **options)

    options = {"momentum": 0.9} if kind == "SGD" else {}
    layer, trained = made()
    layer(torch.ones(2)).sum().backward()
    trained.step()
    state, fresh = trained.state_dict(), made()[1]
    take(Path("x"), {"optimizer": state}, {"optimizer": fresh})
    assert same_kind(fresh.state_dict()["state"], state["state"])
    if kind.startswith("Adam"):
        del state["state"][0]["exp_avg"]
        with pytest.raises(ValueError, match="x does not fit this run"):
            take(Path("x"), {"optimizer": state}, {"optimizer": made()[1]})


@pytest.mark.parametrize("name", ["train", "cfcql", "omar", "omiga", "planning"])
def test_what_a_learners_adam_remembers_must_fit(name):
    """Otherwise fused Adam writes beyond it, and the process dies without a word."""
    data, spec = make_data(False)
    module = train if name == "train" else importlib.import_module(f"baselines.{name}")
    args = (train.Args if name == "train" else module.Args)(hidden=8, updates=8)
    args.conservative, args.critic_first = "expectation", 0.0
    build = module.builders()["learner"] if name == "planning" else module.make_learner
    learner, g = build(args, spec, data), torch.Generator().manual_seed(0)
    inner = learner.learner if name == "planning" else learner  # a search would need a model
    inner.update(data.sample(4, g), torch.ones(4), g)
    state = learner.state_dict()
    take(Path("x"), {"learner": state}, {"learner": build(args, spec, data)})
    optimizer = next(k for k, x in state.items() if set(x) == {"state", "param_groups"})
    state[optimizer]["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match="x does not fit this run"):
        take(Path("x"), {"learner": state}, {"learner": build(args, spec, data)})


def test_a_learner_may_begin_with_nothing():
    class Learner:
        scale = None

        def state_dict(self):
            return {"scale": self.scale}

        def load_state_dict(self, state):
            self.scale = state["scale"]

    fresh = Learner()
    take(Path("x"), {"learner": {"scale": torch.ones(2)}}, {"learner": fresh})
    assert fresh.scale.tolist() == [1, 1]


def test_pipes_are_no_checkpoints(tmp_path):
    for name in ("checkpoint.pt", "final.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="is no checkpoint of this program"):
        read_checkpoint(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="has no final.json"):
        read_final(tmp_path)


# ------------------------------------------------------------------------------------------- flags


def test_sizes_that_no_memory_holds_are_refused_before_work(monkeypatch):
    monkeypatch.setattr(train.setup, "find_dataset", None)  # must not be reached
    for flag in ("hidden", "critics", "batch-size", "wm-batch-size", "eval-episodes", "horizon"):
        code, _ = faults.command("--env-id", "3s_vs_5z", f"--{flag}", str(10**9))
        assert re.fullmatch(rf"train.py: .*GiB of memory are needed.*--{flag} 1000000000.*", code)
    code, _ = faults.command("--env-id", "3s_vs_5z", "--updates", str(10**9))
    assert "--updates 1000000000, or raise --rollout-interval" in code
    assert "this machine has" in faults.command("--threads", "100000")[0]
    assert "--seed is 18446744073709551616" in faults.command("--seed", str(2**64))[0]
    assert "--env-id is '../../x'" in faults.command("--env-id", "../../x")[0]


def test_full_memory_is_one_sentence(toy, monkeypatch):
    def full(*_):
        torch.empty(2**60)

    monkeypatch.setattr(train, "load_dataset", full)
    assert "the memory is full" in faults.command("--dataset", str(toy))[0]


def test_results_that_are_damaged_are_one_sentence(tmp_path):
    from benchmark.rows import RUNS, Result, read
    from experiment.report import compare

    text = RUNS.read_text()
    for damaged in (text[:-40], text.replace(",smax,", ',"smax,', 1), text + "\xff"):
        (tmp_path / "runs.csv").write_text(damaged, encoding="latin-1")
        with pytest.raises(ValueError, match="runs.csv, line"):
            read(tmp_path / "runs.csv", Result)
    final = {"backend": "smax", "dataset": {"return_mean": 1.0}, "eval": None, "clone": None,
             "world_model": None}  # fmt: skip
    for change in (
        {"eval": {}},
        {"dataset": []},
        {"world_model": 3},
        {"clone": {"return_mean": "x"}},
    ):
        (tmp_path / "final.json").write_text(json.dumps(final | change))
        with pytest.raises(ValueError, match=f"final.json is damaged: {next(iter(change))}"):
            compare([tmp_path])


def test_smax_alone_is_imported_of_jaxmarl(monkeypatch, capfd):
    """What the rest of JaxMARL prints does not reach the user, and a user can still import it."""
    for name in [x for x in sys.modules if x.partition(".")[0] == "jaxmarl"]:
        monkeypatch.delitem(sys.modules, name)
    smax = envs._import_smax.__wrapped__()  # imports it once more
    assert "jaxmarl.environments.smax" in sys.modules and "3s_vs_5z" in smax.map_names
    assert not {"jaxmarl", "jaxmarl.environments"} & sys.modules.keys()
    assert "jaxmarl.environments.overcooked" not in sys.modules
    print("mine")
    assert capfd.readouterr().out == "mine\n"
    import jaxmarl

    assert jaxmarl.make("HeuristicEnemySMAX").num_allies > 0
