"""How well each world model predicts one step, on data of the same and of another quality.

Phase 1 of train.py alone, for LOGO and for every world model of baselines/, on the same batches
(MAMBA and MAZero draw windows of their own, as many times, and see the observations of a moment
alone; the others see the state, too). Ensembles and MOReL are measured by the mean of their
members, while one of them makes a rollout.
Errors are mean squared errors on held-out episodes in units of the training data's variance;
constant columns count as 0, so that always predicting the mean has .4 in the state of 3s_vs_5z and
about 1 in a robot's. Rows of the other quality are what the paper calls data out of the dataset
(Sec. 5.4); they are standardised with the training data's statistics, too.
"""

import importlib
import math
import shlex
import time
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import behaviour
import train
from behaviour import Quality
from benchmark.grid import WORLD_MODELS, source_of
from benchmark.rows import ERRORS, POINTS, Error, Point, key_of, read, record, versions
from benchmark.states import points
from buffer import OfflineDataset
from datasets import load_dataset
from envs import Spec
from experiment import setup
from experiment.diagnostics import (
    predict_held_out,
    rank_correlation,
    squared_error,
    uncertainty_and_error,
)
from experiment.report import machine
from macql import descend, linear_decay


def errors(
    env_ids: tuple[str, ...] = ("3s_vs_5z", "HalfCheetah-6x1"),
    quality: Quality = "medium",
    other: Quality = "medium-replay",
    dataset: Path | None = None,
    models: tuple[Literal["logo", *WORLD_MODELS], ...] = ("logo", *WORLD_MODELS),
    seeds: tuple[int, ...] = (10,),
    flags: str = "",
    results: Path = ERRORS,
) -> None:
    """Train every world model, and record its one-step errors.

    Rows that the same command has made are kept; those of other flags are replaced.

    Args:
        env_ids: tasks; with --dataset the task is the file's
        quality: of the data that the models are trained on
        other: quality of further data on which they are tested
        dataset: a file of recorded episodes to train and test on instead, e.g. of StarCraft II
        models: logo, or world models of baselines/ by their names
        seeds: of networks and batches
        flags: more flags of train.py for every model, e.g. --flags="--threads 1"
        results: file that receives a row per model and kind of data; some predictions of data of
            the other quality go to points.csv beside it
    """
    if dataset is None and other == quality:
        raise ValueError(f"--other is {other}, as --quality: give another one.")
    before = read(results, Error) if results.exists() else []
    known = {(key_of(row), row.command) for row in before}  # with other flags it is trained anew
    places = results.with_name(POINTS.name)
    drawn = {key_of(p) for p in (read(places, Point) if places.exists() else [])}
    sources = [["--env-id", x, "--quality", quality] for x in dict.fromkeys(env_ids)]
    for source in sources if dataset is None else [["--dataset", str(dataset)]]:
        given = [*source, *shlex.split(flags)]
        args = train.parse(given)
        setup.check_args(args)
        device, path = setup.choose_device(args), setup.find_dataset(args)
        data, _ = load_dataset(path, device, args.env_id)
        tests = {source_of(dataset, quality): data}
        if dataset is None:
            file = behaviour.load_or_record(args.env_id, other, args.episodes)
            tests[other] = load_dataset(file, device, args.env_id)[0]
        trained_on = next(iter(tests))
        for model, seed in [(m, s) for s in seeds for m in models]:
            of = ["--env-ids" if x == "--env-id" else x for x in source]
            command = ["python", "-m", "benchmark", "errors", *of, "--models", model]
            command += ["--other", other] if dataset is None else []
            command += ["--seeds", str(seed), *([f"--flags={flags}"] if flags else [])]
            keys = [(model, args.env_id, trained_on, test, seed) for test in tests]
            has_points = dataset is not None or keys[1] in drawn
            if has_points and known.issuperset((k, shlex.join(command)) for k in keys):
                continue
            place = train if model == "logo" else importlib.import_module(f"baselines.{model}")
            args = train.parse([*given, "--seed", str(seed)], place.Args)
            setup.check_args(args)
            started = time.time()
            world_model = trained(place.make_world_model, model, args, data)
            about = {
                "wm_updates": args.wm_updates, "total_s": time.time() - started,
                "parameters": sum(p.numel() for p in world_model.parameters()),
                "commit": setup.commit(), "machine": machine(device.type), "versions": versions(),
                "command": shlex.join(command),
            }  # fmt: skip
            for key, test in zip(keys, tests.values(), strict=True):
                record(results, Error(*key, **measures(world_model, data, test), **about))
                if test is not data:
                    record(places, *points(world_model, data, test, key))


def trained(make, model: str, args: train.Args, data: OfflineDataset) -> torch.nn.Module:
    """The world model that `make` builds, after Phase 1 of train.py; model: its name."""
    sizes = (*data.obs.shape[1:], data.state.shape[1], data.actions.shape[-1])  # N, O, S, A
    spec = Spec(args.env_id, "offline", *sizes, data.avail is not None, int(data.lengths.max()))
    torch.manual_seed(args.seed)
    rng = torch.Generator(data.obs.device).manual_seed(args.seed)
    world_model = make(args, spec, data)
    optimizer = torch.optim.AdamW(
        world_model.parameters(), args.wm_lr, weight_decay=args.wm_weight_decay, fused=True
    )
    schedule = linear_decay(optimizer, train.decay_updates(args, args.wm_updates))
    for _ in tqdm(range(args.wm_updates), desc=f"{model} on {args.env_id}, seed {args.seed}"):
        descend(optimizer, world_model.loss(data.sample(args.wm_batch_size, rng))[0])
        schedule.step()
    return world_model


@torch.no_grad()
def measures(model, data: OfflineDataset, test: OfflineDataset) -> dict[str, float]:
    """The error columns of `rows.Error` on `test`'s held-out rows, in units of `data`."""
    out, batch = predict_held_out(model, test), test.gather(test.held_out)
    error = squared_error(data)
    rho = rank_correlation(*uncertainty_and_error(model, test, data))
    return {
        "rows": len(batch.reward),
        "obs_mse": error("obs", out["next_obs"], batch.next_obs),
        "state_mse": error("state", out["next_state"], batch.next_state),
        "reward_mse": error("reward", out["reward"], batch.reward),
        "raw_reward_mse": (out["reward"] - batch.reward).square().mean().item(),
        "persistence_state_mse": error("state", batch.state, batch.next_state),
        "u_error_spearman": rho if math.isfinite(rho) else None,  # no value where u is constant
    }
