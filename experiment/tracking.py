"""One run while it trains: progress bars, metrics.csv, TensorBoard and checkpoint.pt.

    run = Run(args, asked, spec, metadata, device, method="logo", started=time.time())
    run.start(world_model=world_model, learner=learner, rng=rng)   # or goes on where it stopped
    for k in run.phase("wm", "Phase 1: world model", 3000):
        ...one update...
        run.log(metrics)

The checkpoint is one dict of state_dicts, read with `weights_only=True`. A run that was killed and
resumed ends with the same weights and scores, bit for bit.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import envs
from datasets import replacing, write_atomic
from datasets.errors import Interrupted
from experiment.folder import own, read_checkpoint, read_metrics, require, same_kind, take
from experiment.setup import commit
from experiment.stopping import deferring

LOG_EVERY = 100  # updates between two rows of metrics.csv, and between two looks at the GPU
CHECKPOINT_SHARE = 0.02  # of the time that writing checkpoints may take
FILES = ("metrics.csv", "events.out.tfevents.*", "checkpoint.pt", "run.png", "final.json")
MAY_DIFFER = ("resume", "out", "track", "threads", "device")  # flags, when a run is resumed
COUNTERS = ("progress", "evaluations", "seconds", "imagined_rows")


def plain(args) -> dict:
    """The flags as JSON knows them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}


class Run:
    """A run's folder, counters, clocks, metrics and checkpoint.

    Args:
        args: train.Args, settled. asked: the same as given, by which a run is known again.
        spec, metadata: of the environment and of the data. device: of training.
        method: name for the folder and the report. started: of the run, in time.time()'s seconds.
    """

    def __init__(
        self, args, asked, spec: envs.Spec, metadata: dict, device: torch.device, method: str,
        started: float,
    ):  # fmt: skip
        self.args, self.asked, self.spec, self.metadata = args, asked, spec, metadata
        self.device, self.method, self.started = device, method, started
        self.commit = commit()  # now, not at the end, when the files may be others
        source = args.quality
        if args.dataset:  # many public files have the same name
            source = f"{args.dataset.resolve().stem}-{metadata['sha256'][:6]}"
        name = f"{args.env_id}-{source}-{spec.backend}-{method}-seed{args.seed}"
        self.folder = args.out or Path("runs") / name
        self.progress = {"clone": 0, "wm": 0, "policy": 0}  # updates done
        self.evaluations: list[dict] = []
        clocks = ("clone", "wm", "policy", "imagine", "eval", "checkpoint", "total")
        self.seconds = dict.fromkeys(clocks, 0.0)
        self.imagined_rows = 0
        self._history, self._since, self._aside = [], time.time(), 0.0
        self._saved, self._save_seconds = time.time(), 0.0

    # ------------------------------------------------------------------------------- the loops

    def start(self, **parts) -> None:
        """Start afresh, or with --resume go on from the checkpoint.

        Args:
            parts: what a checkpoint holds: objects with state_dict and load_state_dict, and
                generators.
        """
        self.parts = parts
        print(f"run {self.folder}")
        own(self.folder, FILES)
        resume = self.args.resume and (self.folder / "checkpoint.pt").exists()
        if resume:
            self.load()
        else:
            if self.args.resume:
                print(f"--resume: {self.folder} has no checkpoint yet: the run starts afresh")
            self._spare_another_run()
        self._wandb = self._start_tracking() if self.args.track else None  # it may fail
        for pattern in FILES if not resume else ():
            for old in self.folder.glob(pattern):
                print(f"replacing {old}")
                old.unlink()
        self._open_logs()
        if not resume:
            self.save()  # so that --resume works from the first moment

    def _spare_another_run(self) -> None:
        """Raise a ValueError if a finished run with other flags or parts would be replaced."""
        file = self.folder / "final.json"
        try:
            final = json.loads(file.read_text())
            theirs, method, data = final["args"], final["method"], final["dataset"]["sha256"]
            backend = final["backend"]
            differ = [f"--{k.replace('_', '-')} {theirs.get(k)}" for k in self._differing(theirs)]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return  # no finished run
        if data != self.metadata["sha256"]:
            differ = ["other data"]
        if backend != self.spec.backend:
            differ = [f"backend {backend}"]
        if method != self.method:
            differ = [f"method {method}"]
        if differ:
            raise ValueError(
                f"{self.folder} holds a finished run with {', '.join(differ)}: give another --out, "
                f"or delete {file} to replace it."
            )

    def _differing(self, theirs: dict) -> list[str]:
        """The flags that matter to the result and are not the same in another run."""
        mine = plain(self.asked)  # data are compared by their hash
        checked = [k for k in mine if k not in (*MAY_DIFFER, "dataset")]
        return [k for k in checked if mine[k] != theirs.get(k)]

    def phase(self, name: str, title: str, total: int) -> Iterator[int]:
        """The numbers k of the updates still to do, up to `total`, with a progress bar.

        After each update: metrics are written every LOG_EVERY updates, the checkpoint so often
        that it takes about CHECKPOINT_SHARE of the time, and at the end.

        Args:
            name: of the counter in `progress`, of the clock in `seconds` and of the metrics.
        Raises:
            FloatingPointError: a metric was not finite; names the update and the metric.
            Interrupted: a signal came; everything up to here is in the checkpoint.
        """
        first = self.progress[name]
        if first == total:
            return
        self._since, self._aside = time.time(), 0.0
        self._bar = tqdm(
            range(first, total), initial=first, total=total, desc=title, unit="update",
            mininterval=0.2 if sys.stderr.isatty() else 20,
        )  # fmt: skip
        with deferring() as signals, self._bar:
            for k in self._bar:
                if self.args.compile and self.device.type == "cuda":
                    torch.compiler.cudagraph_mark_step_begin()
                yield k
                self.progress[name] = k + 1
                if (k + 1) % LOG_EVERY == 0 or k + 1 == total:
                    self._write(name, k + 1, self._look(title, k + 1))
                    self._history.clear()
                due = (time.time() - self._saved) * CHECKPOINT_SHARE >= self._save_seconds
                stop = bool(signals)
                if due or stop or k + 1 == total:
                    self._look(title, k + 1)  # no checkpoint of numbers that are not finite
                    now = time.time()
                    self.seconds[name] += now - self._since - self._aside
                    self._since, self._aside = now, 0.0
                    self.save()
                if stop:
                    raise Interrupted(*signals)
            if signals:  # it came after the last look
                raise Interrupted(*signals)

    def log(self, metrics: dict[str, torch.Tensor]) -> None:
        """Remember this update's metrics, 0-d tensors; nothing is read from the GPU yet."""
        values = torch.stack(list(metrics.values()))  # a copy, for CUDA graphs
        self._history.append((list(metrics), values))

    def evaluation(self, update: int, score: dict) -> None:
        """Keep the score of `envs.evaluate` after this many policy updates."""
        self.evaluations.append({"update": update, **score})
        self._write("eval", update, {k: v for k, v in score.items() if v is not None})
        self._bar.set_postfix({"return": f"{score['return_mean']:.2f}"})

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the time of a block for the clock `name` instead of for its phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.time()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        took = time.time() - started
        self.seconds[name] += took
        self._aside += took

    def check_rollout(self, rollout: dict[str, torch.Tensor], update: int) -> None:
        """Refuse steps of rollouts whose uncertainty is not finite; reads from the GPU once.

        Raises:
            FloatingPointError: the world model's rollouts diverge.
        """
        if not rollout["uncertainty"][rollout["valid"] > 0].isfinite().all():
            raise FloatingPointError(
                f"Phase 2, policy update {update}: the uncertainty of imagined steps is not "
                "finite: rollouts diverge (--clamp keeps them in the range of the data)."
            )

    # ------------------------------------------------------------------------------- metrics

    def _look(self, title: str, done: int) -> dict[str, float]:
        """The latest metrics as numbers, after a check of all since the last row of metrics.csv."""
        if not self._history:
            return {}
        which = [(i, name) for i, (names, _) in enumerate(self._history) for name in names]
        values = torch.cat([values for _, values in self._history]).cpu()
        wrong = values.isfinite().logical_not().nonzero()
        if len(wrong):
            row, name = which[wrong[0]]
            raise FloatingPointError(
                f"{title}, update {done - len(self._history) + 1 + row}: {name} is not finite. "
                f"Lower --lr or look at the data; {self.folder} keeps the last checkpoint before "
                "it."
            )
        latest, _ = self._history[-1]
        return dict(zip(latest, values[-len(latest) :].tolist(), strict=True))

    def _start_tracking(self):
        import wandb

        try:
            return wandb.init(project="logo", name=self.folder.name, config=plain(self.asked))
        except wandb.Error as e:
            raise ValueError(f"--track: Weights & Biases did not start: {e}") from e

    def _open_logs(self) -> None:
        """metrics.csv without the rows that are newer than the checkpoint, and TensorBoard."""
        from torch.utils.tensorboard import SummaryWriter

        self._csv = self.folder / "metrics.csv"
        if any(self.progress.values()) and not self._csv.exists():
            print(f"{self._csv} is missing: the metrics so far are lost, the run goes on")
        done = self.progress | {"eval": self.progress["policy"]}
        write_atomic(self._csv, read_metrics(self._csv, done).encode())
        self._tensorboard = SummaryWriter(self.folder)
        report = threading.excepthook  # of TensorBoard's thread: its OSErrors come again in ours
        threading.excepthook = lambda x: None if x.exc_type is OSError else report(x)

    def _write(self, phase: str, update: int, metrics: dict[str, float]) -> None:
        with self._csv.open("a") as f:
            named = ((k.replace(",", ";"), v) for k, v in metrics.items())
            f.writelines(f"{phase},{update},{k},{v:.6g}\n" for k, v in named)
        for k, v in metrics.items():
            self._tensorboard.add_scalar(f"{phase}/{k}", v, update)
        if self._wandb:
            named = {f"{phase}/{k}": v for k, v in metrics.items()}
            self._wandb.log(named | {f"{phase}/update": update})

    def close(self) -> None:
        """End the logs of TensorBoard and Weights & Biases."""
        self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    # ------------------------------------------------------------------------------- checkpoint

    def save(self) -> None:
        """Write checkpoint.pt: every part's state, the counters, and what identifies the run."""
        started = time.time()
        with self.timed("checkpoint"):
            self.seconds["total"] = started - self.started
            state = {name: getattr(self, name) for name in COUNTERS}
            state |= {"args": plain(self.asked), "backend": self.spec.backend}
            state |= {"data": self.metadata["sha256"], "device": self.device.type}
            state |= {"method": self.method, "commit": self.commit}
            for name, part in self.parts.items():
                is_generator = isinstance(part, torch.Generator)
                state[name] = part.get_state() if is_generator else part.state_dict()
            with replacing(self.folder / "checkpoint.pt") as target:
                torch.save(state, target)
        self._saved = time.time()
        self._save_seconds = self._saved - started

    def load(self) -> None:
        """Take up the folder's checkpoint.

        Raises:
            ValueError: it is damaged, or of a run with other flags, data or device.
        """
        path = self.folder / "checkpoint.pt"
        try:
            state = read_checkpoint(path, self.device)
            wanted = {"args", "backend", "commit", "data", "device", "method"}
            wanted |= {*COUNTERS, *self.parts}
            if missing := wanted - state.keys():
                raise ValueError(f"{path} holds no {', '.join(sorted(missing))}: delete it.")
            self._check_identity(path, state)
            self._go_on_from(path, state["commit"])
            take(path, state, self.parts)
            require(isinstance(state["evaluations"], list), f"{path}: evaluations")
            for name in COUNTERS:
                mine = state[name] if name == "evaluations" else getattr(self, name)
                require(same_kind(state[name], mine), f"{path}: {name}")
                setattr(self, name, state[name])
            totals = (self.args.updates, self.args.wm_updates, self.args.updates)
            one = {"update": 0, "return_mean": 0.0, "return_ci95": 0.0, "episodes": 0}
            for x in self.evaluations:
                numbers = isinstance(x, dict) and {k: v for k, v in x.items() if k != "win_rate"}
                require(same_kind(numbers, one), f"{path}: evaluations")
            for done, total in zip(self.progress.values(), totals, strict=True):
                require(0 <= done <= total, f"{path}: progress")
        except ValueError as e:
            raise ValueError(f"--resume: {e}") from e
        self.started -= self.seconds["total"]  # the time of the run, not of this process

    def _go_on_from(self, path: Path, theirs: str) -> None:
        """Name every commit that had a part in the run; say so if this one is another."""
        require(isinstance(theirs, str), f"{path}: commit")
        if theirs.split(", then ")[-1] != self.commit:
            print(f"{path} is of commit {theirs}, this is {self.commit}: the result may differ")
            theirs += f", then {self.commit}"
        self.commit = theirs

    def _check_identity(self, path: Path, state: dict) -> None:
        """Raise a ValueError unless the checkpoint is of a run with these flags and data."""
        if state["device"] != self.device.type:  # its random numbers differ: it is another run
            raise ValueError(
                f"{path} was trained with --device {state['device']}: give that, or another --out."
            )
        if state["backend"] != self.spec.backend:  # its evaluations are of another simulator
            raise ValueError(
                f"{path} was evaluated in {state['backend']}, not in {self.spec.backend}: go on "
                "with that simulator, or give another --out."
            )
        if state["method"] != self.method:
            raise ValueError(
                f"{path} is of the method {state['method']}, not {self.method}: go on with the "
                "program that wrote it, or give another --out."
            )
        if state["data"] != self.metadata["sha256"]:
            raise ValueError(
                f"{path} is of a run on other data than {self.metadata['path']}: give its data, or "
                "another --out."
            )
        theirs = state["args"]
        require(isinstance(theirs, dict), f"{path}: args")
        if differ := self._differing(theirs):
            told = ", ".join(f"--{k.replace('_', '-')} {theirs.get(k)}" for k in differ)
            raise ValueError(f"{path} is of a run with {told}; give that, or another --out.")
