"""Before training: flags are checked, the data, the device and the simulator are chosen.

The simulator (`--backend auto`): robots are simulated by MuJoCo; policies from data of SMAX are
evaluated in SMAX, those from data of StarCraft II in StarCraft II where it is installed. If it is
not, or if no simulator here plays the task, the run trains all the same, plays no episode, and
ends with what can be measured on held-out data: its backend is then called "offline".
"""

import dataclasses
import importlib.util
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import behaviour
import envs
from buffer import OfflineDataset
from datasets import check_writable
from datasets.files import absolute
from logo_wm import LogoWM
from macql import Actor, Critic
from simulators import starcraft

PASSES, FEWEST_UPDATES, MOST_UPDATES = 12, 1_000, 4_000  # of --updates, where it is not given
EVALUATIONS = 16  # --eval-every is this part of the updates, where it is not given
STARCRAFT_GAMES = 4  # processes of StarCraft II side by side, each with a gigabyte of memory
SHARES = ("gamma", "tau", "critic_first")
MAY_BE_ZERO = ("seed", "threads")
SIZES = ("hidden", "critics", "batch_size", "wm_batch_size", "rollout_batch_size", "horizon",
         "synthetic_fraction", "eval_episodes")  # fmt: skip
TASK = re.compile(r"\w[\w.|-]*")
LARGEST = 1e30  # float32 holds it
MOST = 2**32 - 1  # also what every generator of random numbers takes as a seed
SIMULATED = 256  # numbers that a simulator keeps of an episode, at least
SMALLEST = envs.Spec("", "", 1, 1, 1, 1, True, 1)  # a task, for what must be known before the data
MUJOCO_SIMULATORS = 100  # side by side, at most


def check_args(args) -> None:
    """Refuse flags that cannot work, before any work is done.

    Raises:
        ValueError: one sentence: which flag, what is wrong with it, what would do.
    """
    for name, value in vars(args).items():
        if type(value) is int and type(getattr(type(args), name, None)) is float:
            value = float(value)  # from Python, not from a command line
        flag = f"--{name.replace('_', '-')} is {value}"
        if name in SHARES and not 0 <= value <= 1:
            raise ValueError(f"{flag}: give 0 to 1.")
        if type(value) is float and not 0 <= value <= LARGEST:
            raise ValueError(f"{flag}: give 0 to {LARGEST:g}.")
        at_least = 0 if name in MAY_BE_ZERO else 2 if name == "hidden" else 1
        if type(value) is int and not at_least <= value <= MOST:
            raise ValueError(f"{flag}: give {at_least} to {MOST:,}.")
    if args.out == Path():
        raise ValueError("--out is the current folder: name a folder for the run alone.")
    if not TASK.fullmatch(args.env_id):
        raise ValueError(f"--env-id is {args.env_id!r}: give a task's name, such as 3s_vs_5z.")
    if args.threads > (cores := os.cpu_count()):
        raise ValueError(f"--threads is {args.threads}: this machine has {cores} cores.")
    if args.synthetic_fraction > 0 and imagined_rows(args) == 0:
        raise ValueError(
            f"--synthetic-fraction {args.synthetic_fraction} of --batch-size {args.batch_size} is "
            "less than a row: give 0 for MACQL, or more."
        )
    if real_rows(args) <= 0:
        raise ValueError(
            f"--imagined-rows {args.imagined_rows} with --synthetic-fraction "
            f"{args.synthetic_fraction:g} leaves no real row, and cloning is on these alone: give "
            "a smaller share, or --imagined-rows added."
        )
    if args.uncertainty == "penalty" and args.u_scale == 0:
        raise ValueError("--uncertainty penalty: give --u-scale, 1 / lambda of Eq. (1), e.g. 10.")
    if args.critic == "none" and args.synthetic_fraction > 0:
        raise ValueError("--critic none clones real data: it needs --synthetic-fraction 0.")
    if args.track and importlib.util.find_spec("wandb") is None:
        raise ValueError("--track needs Weights & Biases: pip install wandb.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; give --device cpu or auto.")
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ValueError("--compile: no C++ compiler is installed (g++, or $CXX); leave it out.")
    backend = envs.choose_backend(args.env_id, args.backend)
    if backend in ("smac", "smacv2") and args.dataset is None:
        raise ValueError(
            f"{args.env_id} on {backend} needs --dataset FILE, recorded in StarCraft II "
            "(docs/starcraft.md); what we record is SMAX's and MuJoCo's."
        )
    check_memory(args, SMALLEST, choose_device(args))
    # Can the run's folder be written? Not known to the hour of playing before it is used.
    folder = args.out or Path("runs")
    try:
        check_writable(folder / "checkpoint.pt")
    except OSError as e:
        raise OSError(f"{folder} cannot be written ({e.strerror or e}): give another --out.") from e


def check_memory(args, spec: envs.Spec, device: torch.device) -> None:
    """Refuse sizes of networks, batches and D_m that cannot fit into memory.

    Raises:
        ValueError: what they take at least, what there is, which flags would help.
    """
    n, o, s, a = spec[2:6]
    imagines, h = args.synthetic_fraction > 0, args.hidden
    try:
        with torch.device("meta"):
            obs, state = (torch.empty(n, o),) * 2, (torch.empty(s),) * 2
            nets = [Actor(*obs, a, h, spec.discrete, args.shared_actor)]
            nets += [Critic(*obs, *state, a, h, spec.discrete, args.critics)]
            nets += [LogoWM(n, o, s, a, h, spec.discrete)] if imagines else []
        # a parameter with its gradient and Adam's two moments
        numbers = 4 * sum(p.numel() for net in nets for p in net.parameters())
    except RuntimeError:  # torch cannot even count them
        numbers = math.inf
    numbers += (real_rows(args) + imagined_rows(args)) * (n * o + s + 2 * h * args.critics)
    numbers += args.eval_episodes * (n * (o + a) + s + SIMULATED)
    if imagines:
        rows = collections(args) * (args.horizon + 1) * args.rollout_batch_size
        numbers += rows * (n * o + s + 2 * n * a + 2) + args.wm_batch_size * n * (o + s + 2 * h)
    need = 4 * numbers / 2**30
    if device.type == "cuda":
        have = torch.cuda.mem_get_info()[0] / 2**30
    else:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if need > have:
        told = ", ".join(f"--{k.replace('_', '-')} {getattr(args, k)}" for k in SIZES)
        if imagines and args.updates is not None:  # D_m holds all collections
            told += f", --updates {args.updates}, or raise --rollout-interval"
        raise ValueError(
            f"{need:,.1f} GiB of memory are needed at least, and {have:,.1f} are here. Lower one "
            f"of {told}."
        )


def imagined_rows(args) -> int:
    """Imagined rows of a batch; without any there is no world model."""
    return round(args.synthetic_fraction * args.batch_size)


def real_rows(args) -> int:
    """Recorded rows of a batch: all of B (D27), or what imagined ones leave."""
    return args.batch_size - (0 if args.imagined_rows.startswith("added") else imagined_rows(args))


def waiting(args) -> int:
    """Updates in which the critic learns alone, from real rows (D26)."""
    return 0 if args.critic == "none" else round(args.critic_first * args.updates)


def collections(args) -> int:
    """Collections of rollouts in a run, of which D_m has room for all."""
    if args.updates is None:  # before the data are known: one at least
        return 1
    return max(1, math.ceil((args.updates - waiting(args)) / args.rollout_interval))


def choose_device(args) -> torch.device:
    """What --device says; auto takes a GPU if there is one. Sets torch's threads as well."""
    if args.threads:
        torch.set_num_threads(args.threads)
    available = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(available if args.device == "auto" else args.device)


def method(args) -> str:
    """logo, or what is left of it: macql without the model, bc without model and critic."""
    if args.synthetic_fraction > 0:
        return "logo"
    return "bc" if args.critic == "none" else "macql"


def commit() -> str:
    """This checkout's commit, "-dirty" where files differ from it, "unknown" outside of git.

    Files of results/ may differ: a grid adds its rows there.
    """
    describe = ["git", "describe", "--always", "--abbrev=12", "--exclude=*"]
    changes = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"]
    root = Path(__file__).parent.parent
    try:
        name, changed = (
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
            for command in (describe, changes)
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.strip() + ("-dirty" if changed else "")


def settle(args, data: OfflineDataset):
    """The flags with a number for each whose default depends on the data.

    A pass over D is as many updates as it has batches of training transitions.
    """
    by_passes = PASSES * len(data.train) // args.batch_size
    updates = args.updates or min(MOST_UPDATES, max(FEWEST_UPDATES, by_passes))
    every = args.eval_every or math.ceil(updates / EVALUATIONS)
    return dataclasses.replace(args, updates=updates, eval_every=every)


def find_dataset(args) -> Path:
    """The file of --dataset, or our recording of this task and quality, made at first use."""
    path = args.dataset or behaviour.load_or_record(args.env_id, args.quality, args.episodes)
    return Path(os.path.relpath(absolute(path)))  # results are shared: no folders above this one


def choose_simulator(args, data: OfflineDataset, metadata: dict, own: Callable | None = None):
    """(environment or None, its Spec) for this data; prints which and why.

    Args:
        own: builds the environment from `args`; None: it is one of ours.
    Raises:
        ValueError: the data do not fit the backend that was asked for.
        ImportError, OSError: the backend that was asked for is not installed.
    """
    sizes = (*data.obs.shape[1:], data.state.shape[1], data.actions.shape[-1])  # N, O, S, A
    sizes = (*sizes, data.avail is not None)
    offline = envs.Spec(args.env_id, "offline", *sizes, int(data.lengths.max()))
    strict = own is not None or args.backend != "auto"  # it must be this simulator
    try:
        if own is not None:
            env, why = own(args), "it was given"
        else:
            env, why = our_simulator(args, metadata)
    except (ImportError, OSError, ValueError) as e:
        known = isinstance(e, ValueError) and metadata.get("backend") in envs.BACKENDS
        if strict or known:  # else the task is none of ours, perhaps by its name alone
            raise
        env, why = None, str(e)
    if env is not None and sizes != (shown := env.spec[2:7]):
        backend, what = env.spec.backend, "agents, observation, state, actions, discrete"
        if strict or metadata.get("backend") == backend:
            raise ValueError(
                f"{metadata['path']}: ({what}) is {sizes}, but {args.env_id} on {backend} has "
                f"{shown}; these must agree (--env-id, --backend, or the spec of your simulator)."
            )
        env, why = None, f"{why}, and {backend} has ({what}) = {shown}, the data {sizes}"
    if own is not None:
        check_first_step(env)
    if env is not None:
        print(f"simulator {env.spec.backend}: {why}")
        return env, env.spec
    print(f"no simulator: {why}; no episode will be played, the run ends with measures on "
          "held-out data")  # fmt: skip
    return None, offline


def check_first_step(env) -> None:
    """Refuse, before hours of training, a simulator that does not show what its spec says.

    Raises:
        ValueError: which array, what it is, what it should be.
    """
    now, e, (n, o, _, a) = env.reset(0), env.num_envs, env.spec[2:6]
    avail = f"float32 {(e, n, a)}" if env.spec.discrete else "None"
    for name, needed in (("obs", f"float32 {(e, n, o)}"), ("avail", avail)):
        x = getattr(now, name)
        shown = "None" if x is None else f"{np.asarray(x).dtype} {np.shape(x)}"
        if shown != needed:
            raise ValueError(f"{env.spec.backend}: .reset().{name} is {shown}, not {needed}.")


def our_simulator(args, metadata: dict):
    """(environment of `best_backend`, or None if that is "offline", and why it was chosen)."""
    backend, why = best_backend(args, metadata)
    if backend == "offline":
        return None, why
    most = {"smac": STARCRAFT_GAMES, "smacv2": STARCRAFT_GAMES, "mamujoco": MUJOCO_SIMULATORS}
    slots = min(args.eval_episodes, most.get(backend, math.inf))
    return envs.make(args.env_id, slots, backend), why


def best_backend(args, metadata: dict) -> tuple[str, str]:
    """The simulator that plays what was recorded, or "offline", and why it was chosen."""
    if args.backend != "auto":
        return args.backend, "as asked for"
    recorded, natural = metadata.get("backend"), envs.natural_backend(args.env_id)
    if recorded in ("smac", "smacv2") and not starcraft.starcraft_present():
        return "offline", "StarCraft II, in which the data were recorded, is not installed"
    if recorded in envs.BACKENDS:
        return recorded, f"the data were recorded in {recorded}"
    if natural == "mamujoco":
        return natural, "it plays this robot"
    if starcraft.starcraft_present():
        return "smac" if natural == "smax" else natural, "StarCraft II is installed"
    if natural == "smacv2" or args.env_id not in envs.known_ids():
        return "offline", f"StarCraft II is not installed, and nothing else plays {args.env_id}"
    return natural, "StarCraft II is not installed"


def announce(args, device: torch.device, metadata: dict, name: str, usual: dict) -> None:
    """Say what is trained, on which device and data, and which flags data of its kind usually have:
    `usual`, where a task's name does not tell the kind.
    """
    won = f", {metadata['win_rate']:.0%} won" if "win_rate" in metadata else ""
    print(
        f"{name.upper()} on {args.env_id}, device {device}, seed {args.seed}, "
        f"{args.updates:,} updates\n"
        f"data {metadata['path']}: {metadata['episodes']} episodes, "
        f"{metadata['transitions']:,} transitions, return {metadata['return_mean']:.2f} +- "
        f"{metadata['return_std']:.2f}{won}\n     sha256 {metadata['sha256']}"
    )
    if usual and not envs.is_robot(args.env_id):
        told = {k.replace("_", "-"): value for k, value in usual.items()}
        flags = " ".join(f"--no-{k}" if x is False else f"--{k} {x}" for k, x in told.items())
        print("     warning: this is none of the robots, so the defaults are those of discrete "
              f"actions; robots have {flags}")  # fmt: skip
    if metadata.get("win_rate") == 0:
        print("     warning: no recorded episode was won, so there is no victory to learn from")
    for repair in metadata.get("repaired", []):
        print(f"     {repair}")
