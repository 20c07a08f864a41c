"""From flags to a run: check them, find the data, choose the simulator, build the networks.

The choice of the simulator (`--backend auto`): robots are simulated by MuJoCo; battles recorded in
SMAX are fought in SMAX; battles recorded in StarCraft II in StarCraft II where it is installed.
Where it is not, or where nothing here plays the task of the data, the run trains all the same,
fights no battle, and ends with what can be measured on held-out data: backend "offline".
"""

import copy
import dataclasses
import importlib.util
import math
import os
import shutil
import subprocess
import time
from collections import deque
from pathlib import Path

import torch

import collect
import datasets
import envs
import starcraft
from buffer import OfflineDataset, SyntheticBuffer
from logo_wm import LogoWM
from macql import Actor, Critic
from run import Run, Runs

GAMES = 4  # of StarCraft II side by side, each with a gigabyte of memory


def check(args) -> None:
    """Refuse what cannot work before any work is done.

    Raises:
        ValueError: one sentence: which flag, what is wrong with it, what would do.
    """
    shares = ("synthetic_fraction", "gamma", "tau", "average", "epsilon", "holdout")
    may_be_zero = ("seed", "data_seed", "threads", "retain")
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} is {value}"
        if name in shares and not 0 <= value <= 1:
            raise ValueError(f"{flag}: give 0 to 1.")
        if type(value) is float and not 0 <= value < math.inf:
            raise ValueError(f"{flag}: give 0 or more.")
        at_least = 0 if name in may_be_zero else 1
        if type(value) is int and value < at_least:
            raise ValueError(f"{flag}: give {at_least} or more.")
    if args.u_scale == 0:
        raise ValueError("--u-scale is 0: give more, it divides u.")
    if args.synthetic_fraction > 0 and imagined_rows(args) == 0:
        raise ValueError(
            f"--synthetic-fraction {args.synthetic_fraction} of --batch-size {args.batch_size} is "
            "less than a row: give 0 for MACQL, or more."
        )
    if args.track and importlib.util.find_spec("wandb") is None:
        raise ValueError("--track needs Weights & Biases: pip install wandb.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; give --device cpu or auto.")
    if args.cudagraphs and (args.device == "cpu" or not torch.cuda.is_available()):
        raise ValueError("--cudagraphs: graphs are of a GPU, and torch finds none; leave it out.")
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ValueError("--compile: no C++ compiler is installed (g++, or $CXX); leave it out.")
    if args.critic == "none" and args.synthetic_fraction > 0:
        raise ValueError("--critic none clones real data: it needs --synthetic-fraction 0.")
    natural = envs.natural_backend(args.env_id)
    backend = natural if args.backend == "auto" else args.backend
    if backend != natural and (backend, natural) != ("smac", "smax"):
        raise ValueError(f"--backend {backend} cannot play {args.env_id}: {envs.PLAYS[backend]}.")
    if backend in ("smac", "smacv2") and args.dataset is None:
        raise ValueError(
            f"{args.env_id} on {backend} needs --dataset FILE, of StarCraft II (README, Data); "
            "what we record is SMAX's and MuJoCo's."
        )
    if args.checkpoint_every % args.log_every:
        raise ValueError("--checkpoint-every must be a multiple of --log-every.")


def check_memory(args, sizes: tuple[int, int, int, int], discrete: bool) -> None:
    """Refuse more seeds than memory holds: D_m and the networks, beside the data.

    Args:
        sizes: N, O, S, A.
    Raises:
        ValueError: what it would take, what there is, which flags would help.
    """
    n, o, s, a = sizes
    stored = (
        kept_collections(args) * (args.horizon + 1) * args.rollouts if method(args) == "logo" else 0
    )
    with torch.device("meta"):
        world_model = LogoWM(*sizes, args.wm_hidden, discrete)
    weights = sum(p.numel() for p in world_model.parameters())
    numbers = stored * (n * o + s + 2 * n * a + 2) + 4 * weights  # each with gradient, two moments
    need = 4 * numbers * args.num_seeds / 2**30
    if choose_device(args).type == "cuda":
        have = torch.cuda.mem_get_info()[0] / 2**30
    else:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if need > have:
        raise ValueError(
            f"--num-seeds {args.num_seeds}, --retain {args.retain}, --rollouts {args.rollouts} and "
            f"--horizon {args.horizon} need {need:.3g} GiB, {have:.3g} are here: lower them."
        )


def kept_collections(args) -> int:
    """Collections that D_m keeps; Deviation D10: old ones are of old policies, and fill memory."""
    return args.retain or math.ceil(args.updates / args.collect_every)


def choose_device(args) -> torch.device:
    """What --device says; auto takes a GPU if there is one."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(there if args.device == "auto" else args.device)


def imagined_rows(args) -> int:
    """Imagined rows in a mixed batch."""
    return round(args.synthetic_fraction * args.batch_size)


def method(args) -> str:
    """logo, or what is left of it: macql without the model, bc without model and critic."""
    if args.synthetic_fraction > 0:
        return "logo"
    return "macql" if args.critic == "cql" else "bc"


def commit() -> str:
    """This checkout's commit, "-dirty" where files differ from it, "unknown" outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


# --------------------------------------------------------------------------------------------------
# Data and simulator
# --------------------------------------------------------------------------------------------------


def sizes_of(data: OfflineDataset) -> tuple[int, int, int, int]:
    """N, O, S, A."""
    return (*data.obs.shape[1:], data.state.shape[1], data.actions.shape[-1])


def choose_simulator(args, data: OfflineDataset, facts: dict):
    """(environment or None, its Spec, why) for this data; see the module's docstring.

    Raises:
        ValueError: the data do not fit the backend that was asked for.
        ImportError, OSError: the backend that was asked for is not installed.
    """
    sizes = sizes_of(data)
    limit = int(data.lengths.max())
    offline = envs.Spec(args.env_id, "offline", *sizes, data.avail is not None, limit)
    chosen = args.backend != "auto"
    try:
        backend, why = (args.backend, "as asked for") if chosen else best_backend(args, facts)
        if backend == "offline":
            return None, offline, why
        slots = args.eval_episodes
        if backend in ("smac", "smacv2"):
            slots = min(slots, GAMES)
        elif backend == "smax":  # the policies of all seeds play at once
            slots *= args.num_seeds
        env = envs.make(args.env_id, slots, backend)
    except (ImportError, OSError) as e:
        if chosen:
            raise
        return None, offline, str(e)
    shown = env.spec[2:6]
    if sizes == shown:
        return env, env.spec, why
    if chosen or facts.get("backend") == backend:
        raise ValueError(
            f"{facts['path']}: agents, observation, state and actions are {sizes}, but "
            f"{args.env_id} on {backend} has {shown}; give the --env-id and --backend of the "
            "recording."
        )
    return None, offline, f"{why}, and {backend} shows (N, O, S, A) = {shown}, the data {sizes}"


def best_backend(args, facts: dict) -> tuple[str, str]:
    """The simulator that plays what was recorded, or "offline", and why it was chosen."""
    recorded, natural = facts.get("backend"), envs.natural_backend(args.env_id)
    if recorded in ("smac", "smacv2") and not starcraft.starcraft_present():
        return "offline", "StarCraft II, in which the data were recorded, is not installed"
    if recorded in envs.PLAYS:
        return recorded, f"the data were recorded in {recorded}"
    if natural == "mamujoco":
        return natural, "it plays this robot"
    if starcraft.starcraft_present():
        return "smac" if natural == "smax" else natural, "StarCraft II is installed"
    if natural == "smacv2" or args.env_id not in envs.known_ids():
        return "offline", f"StarCraft II is not installed, and nothing else plays {args.env_id}"
    return natural, "StarCraft II is not installed"


def prepare(args) -> tuple[OfflineDataset, dict, object, envs.Spec]:
    """Data and their facts, simulator (or None) and Spec; records the data at first use."""
    device = choose_device(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    path = args.dataset or collect.load_or_record(
        args.env_id, args.quality, args.episodes, args.data_seed
    )
    path = Path(os.path.relpath(path))  # results are shared: no folders above this one
    data, facts = datasets.load_dataset(path, args.holdout, args.data_seed, device, args.env_id)
    check_memory(args, sizes_of(data), data.avail is not None)
    env, spec, why = choose_simulator(args, data, facts)
    print(
        f"{method(args).upper()} on {args.env_id}, device {device}, "
        + (f"seeds {args.seed} to {args.seed + args.num_seeds - 1} at once\n"
           if args.num_seeds > 1 else f"seed {args.seed}\n")
        + (f"simulator {spec.backend}: {why}\n" if env else f"no simulator: {why}; no episode "
           "will be played, the run ends with measures on held-out data\n")
        + f"data {path}: {facts['episodes']} episodes, {facts['transitions']:,} "
        f"transitions, return {facts['return_mean']:.2f} +- {facts['return_std']:.2f}"
        + (f", {facts['win_rate']:.0%} won" if "win_rate" in facts else "")
        + f"\n     sha256 {facts['sha256']}"
        + "".join(f"\n     {repair}" for repair in facts.get("repaired", []))
    )  # fmt: skip
    return data, facts, env, spec


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------


def begin(args) -> Runs:
    """Everything a training starts with: data, simulator, and networks and a folder a seed."""
    started = time.time()
    if args.dataset is None:  # before anything is recorded
        spec = envs.make(args.env_id).spec
        check_memory(args, spec[2:6], spec.discrete)
    probe = (args.out or Path("runs")) / f".{os.getpid()}.probe"  # can this folder be written?
    datasets.write_atomic(probe, b"")
    probe.unlink()
    data, facts, env, spec = prepare(args)
    source = args.quality
    if args.dataset:  # many public files have the same name
        source = f"{args.dataset.resolve().stem}-{facts['sha256'][:6]}"
    name, runs = f"{args.env_id}-{source}-{spec.backend}-{method(args)}", []
    for seed in range(args.seed, args.seed + args.num_seeds):
        folder = Path("runs") / f"{name}-seed{seed}"
        if args.out:
            folder = args.out / f"seed{seed}" if args.num_seeds > 1 else args.out
        print(f"run {folder}")
        of_seed = dataclasses.replace(args, seed=seed)
        runs.append(build(of_seed, folder, data, facts, env, spec))
        runs[-1].started = started
    return Runs(runs)


def build(args, folder: Path, data: OfflineDataset, facts: dict, env, spec: envs.Spec) -> Run:
    """Make the networks for this data; the seed is set here and nowhere else."""
    device, statistics = data.obs.device, data.statistics()
    torch.manual_seed(args.seed)
    rng = torch.Generator(device).manual_seed(args.seed)
    sizes = (spec.num_agents, spec.obs_dim, spec.state_dim, spec.action_dim)
    world_model = LogoWM(
        *sizes, args.wm_hidden, spec.discrete, statistics, args.deduce_from, args.learn_variance
    )
    obs = statistics["obs_mean"], statistics["obs_std"]
    if args.shared_actor and spec.discrete:  # the agents' observations mean the same, on one scale
        obs = tuple(x.mean(0, keepdim=True).expand_as(x) for x in obs)
    state = statistics["state_mean"], statistics["state_std"]
    shape = (spec.action_dim, args.hidden, spec.discrete)
    actor, critic = (
        Actor(*obs, *shape, args.shared_actor),
        Critic(*obs, *state, *shape, args.critics),
    )
    world_model, actor, critic = (net.to(device) for net in (world_model, actor, critic))
    retain = kept_collections(args)
    model_data = None
    if args.synthetic_fraction > 0:
        model_data = SyntheticBuffer(
            retain, args.horizon, args.rollouts, *sizes, device, spec.discrete
        )
    averaged, clone, target = (copy.deepcopy(net) for net in (actor, actor, critic))
    return Run(
        args, folder, device, env, spec, data, facts, rng, world_model, actor, averaged, clone,
        critic, target, model_data, deque(maxlen=retain),
    )  # fmt: skip
