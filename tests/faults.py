"""Faults on purpose: damaged files, damaged checkpoints, nonsense flags, killed processes.

  python tests/faults.py                    300 files, 60 checkpoints, 200 lines of flags
  python tests/faults.py kills --count 50   real processes, killed at random moments and resumed

The same --seed makes the same faults. A file passes if it is refused in one sentence, read with the
values of the whole file, or read with others and a sentence that says what was repaired; a
checkpoint and a line of flags if they are refused in one sentence or work. Nothing may end in
another exception, take more than LIMIT seconds, or a gigabyte of memory.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import io
import json
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from test_datasets_formats import (  # noqa: E402
    minari_episode,
    omiga_arrays,
    rollouts,
    smac_steps,
    write_h5,
    write_minari,
    write_vault,
)

import datasets  # noqa: E402
import train  # noqa: E402

LIMIT = 30  # seconds for a case
ROOM = 2**19  # kilobytes that a case may add to the half gigabyte that the program takes
TINY = (
    "--updates 4 --wm-updates 3 --batch-size 8 --wm-batch-size 8 --hidden 8 --horizon 2 "
    "--rollout-batch-size 4 --rollout-interval 2 --threads 1 --device cpu --critic-first 0"
).split()


# --------------------------------------------------------------------------------------------------
# Whole files, of which the damaged ones are copies
# --------------------------------------------------------------------------------------------------


def battles(seed: int = 0) -> dict[str, np.ndarray]:
    """Six episodes as pymarl stores them, with SMAC's rewards: 12 of damage and 8 of victory."""
    rng, e, t, n, o, s, a = np.random.default_rng(seed), 6, 9, 3, 5, 7, 6
    lengths, won = np.array([8, 3, 5, 4, 8, 6]), np.array([0, 1, 1, 0, 1, 1], bool)
    step, last = np.arange(t), lengths[:, None] - 1
    filled = step <= lengths[:, None]
    reward = np.where(step <= last, 12 / lengths[:, None], 0.0) + 8 * (
        won[:, None] & (step == last)
    )
    avail = rng.random((e, t, n, a)) < 0.6
    avail[..., 1] = True
    arrays = {
        "state": rng.normal(size=(e, t, s)).astype(np.float32),
        "obs": rng.normal(size=(e, t, n, o)).astype(np.float32),
        "actions": (avail * rng.random(avail.shape)).argmax(-1)[..., None],
        "avail_actions": avail.astype(np.int32),
        "reward": reward[..., None].astype(np.float32),
        "terminated": ((step == last) & (lengths < 8)[:, None])[..., None].astype(np.uint8),
        "filled": filled[..., None].astype(np.int64),
    }
    arrays = {k: x * filled.reshape(e, t, *[1] * (x.ndim - 2)) for k, x in arrays.items()}
    return {k: x.astype(np.uint8) if k == "terminated" else x for k, x in arrays.items()}


def write_bases(folder: Path) -> None:
    """One whole dataset of every format."""
    arrays = battles()
    won = np.array([0, 1, 1, 0, 1, 1], np.uint8)
    about = {"env_id": "toy", "backend": "smax", "quality": "medium"}
    datasets.save_episodes(folder / "ours.h5", arrays | {"won": won}, about)
    write_h5(folder / "public.h5", arrays)
    hopper, cheetah = rollouts("Hopper-3x1"), rollouts("HalfCheetah-6x1")
    write_h5(folder / "omiga.h5", omiga_arrays("Hopper-3x1", hopper))
    write_minari(folder / "minari", [minari_episode(x, 0, 1) for x in cheetah], "HalfCheetah-v5")
    write_vault(folder / "vault.vlt" / "Good", smac_steps())


BASES = {  # name -> main file of the dataset, and the task it is read as
    "ours": ("ours.h5", "toy"),
    "public": ("public.h5", None),
    "omiga": ("omiga.h5", "Hopper-3x1"),
    "minari": ("minari/data/main_data.hdf5", "HalfCheetah-6x1"),
    "vault": ("vault.vlt/Good", None),
}


# --------------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------------


def some_array(f: h5py.File, rng) -> str:
    """The name of one of the file's arrays."""
    names = []
    f.visititems(lambda name, x: names.append(name) if isinstance(x, h5py.Dataset) else None)
    return str(rng.choice(names))


def replace(f, key: str, x, **how) -> None:
    del f[key]
    f.create_dataset(key, data=x, **how)


def somewhere(x: np.ndarray, rng) -> tuple:
    return tuple(int(rng.integers(n)) for n in x.shape)


def put(f, key: str, rng, value) -> None:
    """Write a value into a random entry of an array, which becomes float64."""
    x = f[key][()].astype(np.float64)
    x[somewhere(x, rng)] = value
    replace(f, key, x)


def along(change: Callable) -> Callable:
    """Damage that changes the size of one axis; not the last one, whose size is free."""

    def damage(f, key, rng):
        x = f[key][()]
        axis = int(rng.integers(max(1, x.ndim - 1)))
        replace(f, key, change(x, axis))

    return damage


def huge(f, key, rng):
    shape = f[key].shape
    axis = int(rng.integers(len(shape)))
    declared = [n * 10**9 if k == axis else n for k, n in enumerate(shape)]
    dtype = f[key].dtype
    del f[key]
    f.create_dataset(key, declared, dtype, chunks=tuple(max(1, min(n, 8)) for n in shape))


def half_written(f, key, rng):
    x = f[key][()]
    del f[key]
    stored = f.create_dataset(key, x.shape, x.dtype, chunks=(1, *x.shape[1:]))
    stored[: len(x) // 2] = x[: len(x) // 2]


def external(f, key, rng):
    x, beside = f[key][()], Path(f.filename).with_suffix(".raw")
    beside.write_bytes(x.tobytes())
    del f[key]
    f.create_dataset(key, x.shape, x.dtype, external=[(str(beside), 0, x.nbytes)])


def virtual(f, key, rng):
    x = f[key]
    layout = h5py.VirtualLayout(x.shape, x.dtype)
    layout[...] = h5py.VirtualSource(f.filename, "gone", x.shape)
    del f[key]
    f.create_virtual_dataset(key, layout)


def link(kind: str) -> Callable:
    def damage(f, key, rng):
        pipe = Path(f.filename).with_suffix(".pipe")
        target = {
            "dangling": h5py.SoftLink("/nowhere"),
            "loop": h5py.SoftLink(f"/{key}"),
            "elsewhere": h5py.ExternalLink("gone.h5", "/x"),
            "pipe": h5py.ExternalLink(str(pipe), "/x"),
        }[kind]
        if kind == "pipe" and not pipe.exists():
            os.mkfifo(pipe)
        del f[key]
        f[key] = target

    return damage


def as_type(dtype) -> Callable:
    return lambda f, key, rng: replace(f, key, f[key][()].astype(dtype))


def to_group(f, key, rng):
    del f[key]
    f.create_group(key)


def to_nothing(f, key, rng):
    dtype = f[key].dtype
    del f[key]
    f.create_dataset(key, dtype=dtype, shape=None)


def of_attributes(f, key, rng):
    name = str(rng.choice([*f.attrs, "env_id", "content_sha256", "repaired"]))
    f.attrs[name] = [np.array([1, 2]), "x" * 300, -1, "", np.nan][rng.integers(5)]


ARRAYS: dict[str, Callable] = {
    "without a key": lambda f, key, rng: f.__delitem__(key),
    "text": lambda f, key, rng: replace(f, key, np.array(["x"] * 3, dtype="S1")),
    "objects": lambda f, key, rng: replace(f, key, ["a", "b"], dtype=h5py.string_dtype()),
    "a group": to_group,
    "null": to_nothing,
    "a number": lambda f, key, rng: replace(f, key, 3.0),
    "an axis less": lambda f, key, rng: replace(f, key, f[key][()][0]),
    "an axis more": lambda f, key, rng: replace(f, key, f[key][()][None]),
    "empty": along(lambda x, axis: np.take(x, [], axis)),
    "shorter": along(lambda x, axis: np.delete(x, -1, axis)),
    "longer": along(lambda x, axis: np.concatenate([x, np.take(x, [-1], axis)], axis)),
    "nan": lambda f, key, rng: put(f, key, rng, np.nan),
    "infinity": lambda f, key, rng: put(f, key, rng, -np.inf),
    "1e300": lambda f, key, rng: put(f, key, rng, 1e300),
    "complex": as_type(complex),
    "float64": as_type(np.float64),
    "big-endian": as_type(">f8"),
    "compound": lambda f, key, rng: replace(f, key, np.zeros(f[key].shape, [("a", "f4")])),
    "huge": huge,
    "half written": half_written,
    "external": external,
    "virtual": virtual,
    "attributes": of_attributes,
    **{f"{kind} link": link(kind) for kind in ("dangling", "loop", "elsewhere", "pipe")},
}  # fmt: skip


def filled_short(f, rng):
    x = f["filled"][:, :, 0]
    x[np.arange(len(x)), x.sum(1) - 1] = 0
    replace(f, "filled", x[..., None])


def shifted(key: str, by: int) -> Callable:
    def damage(f, rng):
        x = np.roll(f[key][()], by, 1)
        x[:, 0 if by > 0 else -1] = 0
        replace(f, key, x)

    return damage


def float_ids(f, rng):
    del f["avail_actions"]
    replace(f, "actions", f["actions"][()].astype(np.float32))


def no_agents(f, rng):
    for key in ("obs", "actions", "avail_actions"):
        replace(f, key, f[key][()][:, :, :0])


def changed_value(f, rng):
    key = str(rng.choice([k for k in f if k != "filled"]))
    x = f[key][()]
    x[somewhere(x, rng)] += 1
    replace(f, key, x)


EPISODES: dict[str, Callable] = {
    "filled marks L": filled_short,
    "rewards late": shifted("reward", 1),
    "rewards early": shifted("reward", -1),
    "ends late": shifted("terminated", 1),
    "ends early": shifted("terminated", -1),
    "float ids": float_ids,
    "no agents": no_agents,
}


def flip(path: Path, rng) -> None:
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def blank(path: Path, rng) -> None:
    data = bytearray(path.read_bytes())
    at = int(rng.integers(len(data)))
    data[at : at + 64] = bytes(len(data[at : at + 64]))
    path.write_bytes(data)


def truncate(path: Path, rng) -> None:
    path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


def append(path: Path, rng) -> None:
    path.write_bytes(path.read_bytes() + rng.bytes(100))


def become(kind: str) -> Callable:
    def damage(path: Path, rng) -> None:
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")

    return damage


BYTES = {"flip": flip, "blank": blank, "truncated": truncate, "appended": append}
PATHS = {f"a {kind}": become(kind) for kind in ("pipe", "loop", "folder", "device", "missing file")}


def damage_json(path: Path, rng) -> None:
    """Damage the file of a Vault's structure."""
    about = json.loads(path.read_text())
    ways = ("[" * 5000, "{}", "null", '{"structure_shape": 3}', "\xff", "")
    key = str(rng.choice(list(about["structure_shape"])))
    about["structure_shape"].pop(key)
    text = [*ways, json.dumps(about)][rng.integers(len(ways) + 1)]
    path.write_bytes(text.encode("latin-1"))


def overcount(main: Path, rng, count: int | None = None) -> None:
    """Let a Vault claim more rows than were written to it."""
    import tensorstore

    base = {"driver": "ocdbt", "base": f"file://{main}/", "path": "vault_index"}
    index = tensorstore.open({"driver": "zarr", "kvstore": base}).result()
    index.write(np.array([count or 10 ** int(rng.integers(3, 10))], np.int32)).result()


def damage_file(base: str, folder: Path, rng) -> str:
    """Damage the copy of a dataset that lies in `folder`; returns what was done."""
    main = folder / BASES[base][0]
    if base == "vault":
        files = sorted(p for p in main.rglob("*") if p.is_file())
        victim = files[rng.integers(len(files))]
        ways = BYTES | PATHS | {"metadata": lambda _, rng: damage_json(main / "metadata.json", rng)}
        ways["overcount"] = lambda _, rng: overcount(main, rng)
        way = str(rng.choice(list(ways)))
        ways[way](victim, rng)
        return f"{victim.name[:12]}: {way}"
    ways = [f"array: {k}" for k in ARRAYS] * 2 + [f"path: {k}" for k in PATHS]
    if base == "ours":  # the others carry no checksum: a changed number is another number
        ways += ["changed value", *(f"bytes: {k}" for k in BYTES)] * 6
    else:
        ways += ["bytes: truncated", "bytes: appended"]
    if base in ("ours", "public"):
        ways += [f"episodes: {k}" for k in EPISODES] * 2
    way = str(rng.choice(ways))
    kind, _, name = way.partition(": ")
    if kind in ("bytes", "path"):
        (BYTES | PATHS)[name](main, rng)
        return way
    with h5py.File(main, "r+") as f:
        if kind == "array":
            key = some_array(f, rng)
            ARRAYS[name](f, key, rng)
            return f"{way} of {key}"
        (EPISODES | {"": changed_value})[name](f, rng)
    return way


# --------------------------------------------------------------------------------------------------
# What must come of it
# --------------------------------------------------------------------------------------------------


class TooLong(BaseException):
    """A case took more than LIMIT seconds."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(number, frame):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def one_sentence(text: str) -> bool:
    return "\n" not in text and 10 < len(text) < 1500 and "Traceback" not in text


def read(path: Path, env_id: str | None) -> tuple[dict, np.ndarray, dict]:
    with contextlib.redirect_stderr(io.StringIO()):
        return datasets.read_episodes(path, env_id)


def judge_file(base: str, whole: Path, damaged: Path) -> str:
    """ "" if the damaged dataset is refused, or read as it should be; else what is wrong."""
    name, env_id = BASES[base]
    name = name.removesuffix("/data/main_data.hdf5")
    columns, lengths, metadata = read(whole / name, env_id)
    try:
        with limited():
            found, found_lengths, about = read(damaged / name, env_id)
    except ValueError as e:
        return "" if one_sentence(str(e)) else f"not one sentence: {e}"
    except TooLong:
        return f"more than {LIMIT} s"
    except Exception as e:  # what this program looks for
        return f"{type(e).__name__}: {e}"
    same = found.keys() == columns.keys() and np.array_equal(lengths, found_lengths)
    for k in columns if same else ():
        same &= (found[k] is None) == (columns[k] is None)
        same = same and (found[k] is None or np.array_equal(found[k], columns[k]))
    return "" if same or about["repaired"] != metadata["repaired"] else "read with other values"


def command(*flags: str) -> tuple[int | str | None, str]:
    """(exit status or message, output) of train.py in this process."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            train.cli(list(flags))
        except SystemExit as e:
            return e.code, output.getvalue()
    return 0, output.getvalue()


# --------------------------------------------------------------------------------------------------
# The three kinds of cases; each returns (what was done, what is wrong or "")
# --------------------------------------------------------------------------------------------------


def file_case(seed: int, work: Path) -> tuple[str, str]:
    rng, whole, damaged = np.random.default_rng((1, seed)), work / "whole", work / "damaged"
    if not whole.exists():
        whole.mkdir()
        write_bases(whole)
    base = str(rng.choice(list(BASES), p=[0.35, 0.25, 0.15, 0.15, 0.1]))
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(whole, damaged)
    what = f"{base}, {damage_file(base, damaged, rng)}"
    return what, judge_file(base, whole, damaged)


def damage_state(state: dict, rng) -> tuple[object, str]:
    """Another content of a checkpoint: an entry gone, of another shape or type, or no dict."""

    def leaves(tree, path=()):
        for k, v in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield (*path, k)
            if isinstance(v, dict | list):
                yield from leaves(v, (*path, k))

    path = list(leaves(state))[rng.integers(sum(1 for _ in leaves(state)))]
    inside = state
    for k in path[:-1]:
        inside = inside[k]
    old, how = inside[path[-1]], int(rng.integers(4))
    if how == 0:
        return [list(state), "text", 3][rng.integers(3)], "no dict"
    if how == 1:
        del inside[path[-1]]
        return state, f"without {path}"
    if how == 2 and isinstance(old, torch.Tensor):
        inside[path[-1]] = torch.zeros(*old.shape, 2)
        return state, f"other shape of {path}"
    inside[path[-1]] = "text"
    return state, f"text for {path}"


def stop_in_the_middle(flags: list[str], run: Path) -> None:
    """Leave the checkpoint of a run that was interrupted while it trained its world model."""
    done, descend = [], train.descend

    def interrupted(*arguments):
        done.append(1)
        if len(done) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        descend(*arguments)

    train.descend = interrupted
    try:
        assert command(*flags, "--out", str(run))[0] == 128 + signal.SIGTERM
    finally:
        train.descend = descend


def checkpoint_case(seed: int, work: Path) -> tuple[str, str]:
    rng, data, run = np.random.default_rng((2, seed)), work / "toy.h5", work / "run"
    flags = [*TINY, "--dataset", str(data)]
    if not data.exists():
        datasets.save_episodes(data, battles(), {"env_id": "toy"})
        stop_in_the_middle(flags, run)
        shutil.copytree(run, work / "whole")
        assert command(*flags, "--out", str(work / "whole"), "--resume")[0] == 0
    whole = json.loads((work / "whole" / "final.json").read_text())
    damaged = work / f"damaged{seed}"
    shutil.copytree(run, damaged, ignore=shutil.ignore_patterns(".lock", "final.json"))
    checkpoint = damaged / "checkpoint.pt"
    if rng.random() < 0.6:
        way = str(rng.choice(["flip"] * 6 + ["blank", "truncated", "appended"]))
        BYTES[way](checkpoint, rng)
    else:
        state, way = damage_state(torch.load(checkpoint, weights_only=True), rng)
        torch.save(state, checkpoint)
    try:
        with limited():
            code, output = command(*flags, "--out", str(damaged), "--resume")
    except TooLong:
        return way, f"more than {LIMIT} s"
    except Exception as e:  # what this program looks for
        return way, f"{type(e).__name__}: {e}"
    finally:
        final = damaged / "final.json"
        again = json.loads(final.read_text()) if final.exists() else None
        shutil.rmtree(damaged)
    if code != 0:
        return way, "" if one_sentence(str(code)) else f"not one sentence: {code} {output}"
    kept = ("world_model", "rollout", "offline", "eval")
    return way, "" if all(again[k] == whole[k] for k in kept) else "accepted, and ended otherwise"


NONSENSE = {
    int: ("-1", "0", "1.5", "nan", "ten", "", str(2**64), str(-(2**63)), "1e3", str(10**12)),
    float: ("nan", "inf", "-inf", "-0.1", "1e400", "text", "", "1,5", "0x1", "1e308"),
    str: ("../../x", "", "/etc/passwd", "3s_vs_5z\n", "nonsense", "a" * 300),
}


def flag_case(seed: int, work: Path) -> tuple[str, str]:
    """One or two nonsensical flags of train.py, or a line of another command."""
    from behaviour import __main__ as behaviour
    from benchmark import __main__ as benchmark
    from experiment import __main__ as experiment

    rng, data, out = np.random.default_rng((3, seed)), work / "toy.h5", work / "out"
    if not data.exists():
        datasets.save_episodes(data, battles(), {"env_id": "toy"})
    before = snapshot()
    if rng.random() < 0.7:
        hints = typing.get_type_hints(train.Args)
        kinds = {k: t for k, t in hints.items() if t in NONSENSE}
        given = []
        for name in rng.choice(list(kinds), size=rng.integers(1, 3), replace=False):
            given += [f"--{name.replace('_', '-')}", str(rng.choice(NONSENSE[kinds[name]]))]
        usual = [*TINY, "--dataset", str(data), "--out", str(out)]
        usual += [] if "--updates" in given else ["--updates", "2"]
        line, call = [*usual, *given], train.cli
        what = "train.py " + " ".join(given)
    else:
        lines = {
            behaviour.cli: (
                *(f"train --env-id Hopper-3x1 --{f} {x}" for f in ("entropy", "gamma", "lr", "clip")
                  for x in ("nan", "inf", "-1", "text", "1e400")),
                "train --env-id 3m --num-envs 0", "train --env-id nowhere --total-steps 1",
                "train", "record", "record --env-id 3s_vs_5z --quality best",
                "record --env-id 3s_vs_5z --quality medium --episodes 0",
                "record --env-id 3s_vs_5z --quality medium --seed -1",
                "record --env-id 3s_vs_5z --quality medium --out /proc/x/y.h5",
                "record --env-id ../x --quality medium --episodes 5",
                "record --env-id Reacher-2x1 --quality medium", "train --env-id 3s_vs_5z",
            ),
            benchmark.cli: (
                "grid --jobs 0", "grid --env-ids nowhere/x", "grid --seeds -1", "grid --seeds x",
                "grid --flags=--seed", "grid --flags='--lr nan'", "grid --methods nothing",
                "grid --flags='--out x'", "tables --nothing", "ceiling --methods none", "nothing",
            ),
            experiment.cli: (
                "watch", "watch nowhere", "watch . --episodes 0", "report", "report nowhere",
                "report README.md", "watch README.md", "report results/runs.csv", "nothing",
            ),
        }  # fmt: skip
        call = list(lines)[rng.integers(3)]
        what = str(rng.choice(lines[call]))
        line = shlex.split(what)
    output = io.StringIO()
    try:
        with limited(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                call(line)
                code = 0
            except SystemExit as e:
                code = e.code
    except TooLong:
        return what, f"more than {LIMIT} s"
    except Exception as e:  # what this program looks for
        return what, f"{type(e).__name__}: {e}"
    finally:
        shutil.rmtree(out, ignore_errors=True)
    if snapshot() != before:
        return what, "a file of the project was changed or made"
    if isinstance(code, str) and not one_sentence(code):
        return what, f"not one sentence: {code}"
    return what, "Traceback" if "Traceback" in output.getvalue() else ""


def snapshot() -> str:
    """Which files the project has, but for caches, with their sizes."""
    digest = hashlib.sha256()
    for p in sorted(ROOT.rglob("*")):
        parts = p.relative_to(ROOT).parts
        hidden = parts[0].startswith(".") or {"__pycache__", "data", "runs"} & set(parts)
        if p.is_file() and not hidden:
            digest.update(f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


CASES = {"files": (file_case, 300), "checkpoints": (checkpoint_case, 60), "flags": (flag_case, 200)}


def run_cases(kind: str, seeds: range) -> list[tuple[int, str, str]]:
    """(seed, what was done, what is wrong) of the cases that failed, in a process of their own."""
    case, failures = CASES[kind][0], []
    with tempfile.TemporaryDirectory() as work:
        for seed in seeds:
            faulthandler.dump_traceback_later(2 * LIMIT, exit=True)  # it hangs below Python
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            what, wrong = case(seed, Path(work))
            faulthandler.cancel_dump_traceback_later()
            more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            if more > ROOM:
                wrong = wrong or f"{more / 2**20:.1f} GiB of memory"
            if wrong:
                failures.append((seed, what, wrong))
    return failures


# --------------------------------------------------------------------------------------------------
# Killed processes
# --------------------------------------------------------------------------------------------------


def program(folder: Path) -> list[str]:
    flags = [*TINY, "--updates", "400", "--wm-updates", "200", "--rollout-interval", "50"]
    return [sys.executable, str(ROOT / "train.py"), *flags, "--dataset", str(folder / "toy.h5")]


def content(run: Path) -> tuple:
    """What a resumed run must share with one that was never stopped."""
    final = json.loads((run / "final.json").read_text())
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    weights = []

    def walk(tree) -> None:
        for k in sorted(tree, key=str):
            if isinstance(tree[k], dict):
                walk(tree[k])
            elif isinstance(tree[k], torch.Tensor):
                weights.append(tree[k].numpy().tobytes())

    walk(state)
    kept = {k: final[k] for k in ("world_model", "rollout", "offline", "eval")}
    digest = hashlib.sha256(b"".join(weights)).hexdigest()
    return json.dumps(kept), digest, (run / "metrics.csv").read_text()


def kill_case(seed: int, folder: Path, whole: tuple, seconds: float) -> str:
    """Kill a run up to three times at random moments, resume it; "" if it ends like the whole."""
    rng, run = np.random.default_rng((4, seed)), folder / f"killed{seed}"
    line = [*program(folder), "--out", str(run), "--resume"]
    for _ in range(rng.integers(1, 4)):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds * (0.35 + 0.65 * rng.random()))  # imports take the rest
        process.kill()
        process.wait()
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        return f"killed run {seed}: {done.stderr[-300:]}"
    same = content(run) == whole
    parts = [p.name for p in run.glob(".*.part")]
    shutil.rmtree(run)
    return "" if same and not parts else f"killed run {seed} ended otherwise {parts}"


def record_case(seed: int, folder: Path, whole: str, seconds: float) -> str:
    """Kill a recording at a random moment; the next one must leave the same content, alone."""
    rng, out = np.random.default_rng((5, seed)), folder / f"recorded{seed}.h5"
    line = recording(out)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds * (0.5 + 0.5 * rng.random()))
    process.kill()
    process.wait()
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        return f"recording {seed}: {done.stderr[-300:]}"
    left = [p.name for p in folder.glob(f".{out.name}*")]
    return "" if hash_of(out) == whole and not left else f"recording {seed} ended otherwise {left}"


def recording(out: Path) -> list[str]:
    flags = ["--env-id", "Hopper-3x1", "--quality", "medium", "--episodes", "3", "--out", str(out)]
    return [sys.executable, "-m", "behaviour", "record", *flags]


def hash_of(path: Path) -> str:
    with h5py.File(path) as f:
        return f.attrs["content_sha256"]


def kills(count: int, seed: int, jobs: int) -> list[str]:
    """What went wrong with `count` killed processes: four of five are runs, the fifth records."""
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as work, ProcessPoolExecutor(jobs) as pool:
        folder = Path(work)
        datasets.save_episodes(folder / "toy.h5", battles(), {"env_id": "toy"})
        started = time.time()
        line = [*program(folder), "--out", str(folder / "whole")]
        subprocess.run(line, check=True, capture_output=True)
        run_s, started = time.time() - started, time.time()
        subprocess.run(recording(folder / "whole.h5"), check=True, capture_output=True)
        record_s, whole = time.time() - started, content(folder / "whole")
        tasks = []
        for k in range(seed, seed + count):
            if k % 5:
                tasks.append(pool.submit(kill_case, k, folder, whole, run_s))
            else:
                task = (record_case, k, folder, hash_of(folder / "whole.h5"), record_s)
                tasks.append(pool.submit(*task))
        return [wrong for task in tasks if (wrong := task.result())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="files, checkpoints, flags, kills")
    parser.add_argument("--count", type=int, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    given, failed = parser.parse_args(), 0
    for kind in given.kinds or CASES:
        started = time.time()
        if kind == "kills":
            count = given.count or 50
            told = kills(count, given.seed, given.jobs)
        else:
            count = given.count or CASES[kind][1]
            parts = [range(given.seed + k, given.seed + count, given.jobs)
                     for k in range(given.jobs)]  # fmt: skip
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(given.jobs, mp_context=spawn) as pool:
                failures = pool.map(run_cases, [kind] * given.jobs, parts)
                told = [f"{kind} {s} ({what}): {wrong}" for x in failures for s, what, wrong in x]
        print(f"{kind}: {count - len(told)} of {count} as they should be, "
              f"{time.time() - started:.0f} s", *told, sep="\n  ", flush=True)  # fmt: skip
        failed += len(told)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
