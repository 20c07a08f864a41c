"""Measurements: what one holds, how its time is taken, and the file they are kept in."""

import csv
import dataclasses
import io
import math
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import datasets


@dataclasses.dataclass
class Row:
    """A measurement: a line of speed.csv. Empty is what has no meaning for it."""

    what: str  # is timed: "imagine", "world-model update", ...
    implementation: str  # by which code
    task: str = ""  # whose dimensions it has
    grows: str = ""  # the column that is varied, see `growth`
    mode: str = "eager"  # or another of `MODES`; graph: CUDA graphs
    seeds: int = 1  # computed at once
    agents: int | None = None  # N
    batch: int | None = None  # B
    horizon: int | None = None  # H
    rows: int | None = None  # of D_m
    seconds: float = 0.0  # one call: median of the repetitions
    spread: float = 0.0  # half of (most - least) over the median
    rate: float = 0.0  # units per second
    unit: str = ""
    gflops: float | None = None  # 10^9 floating-point operations of matrix products, per second
    share_of_peak: float | None = None  # that, over the same of one product of 1024^3
    share_of_bound: float | None = None  # seconds at the peak rate + of Adam, over seconds
    parameters: int | None = None  # of the networks
    peak_memory_mb: float | None = None  # GPU: of torch's tensors; CPU: of the whole process
    device: str = ""
    machine: str = ""
    threads: int = 0
    commit: str = ""
    versions: str = ""


class Entry(NamedTuple):
    """What takes part in a race."""

    row: Row  # to be filled in
    function: Callable  # is timed
    units: float  # of work in a call


@dataclasses.dataclass
class Clock:
    """Times functions on a device; `limits` are those that `machine_limits` found."""

    device: torch.device
    repetitions: int = 5
    least: float = 0.3  # seconds a repetition
    limits: dict[str, float] = dataclasses.field(default_factory=dict)
    flop: dict[tuple, int] = dataclasses.field(default_factory=dict)  # in a call of some work

    def seconds(self, function: Callable, calls: int) -> float:
        """Mean time of a call."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        return (time.perf_counter() - started) / calls

    def race(self, entries: list[Entry]) -> list[Row]:
        """Time some functions in turn; returns their rows."""
        calls = []
        for row, function, _ in entries:
            row.peak_memory_mb = peak_memory_mb(function, self.device)  # warms it up, too
            if row.mode == "eager":  # nothing else can be counted, and does the same
                self.flop[work(row)] = count_flop(function)
            calls.append(max(1, math.ceil(self.least / self.seconds(function, 1))))
        rounds = []
        for _ in range(self.repetitions):
            pairs = zip(entries, calls, strict=True)
            rounds.append([self.seconds(entry.function, n) for entry, n in pairs])
        for (row, _, units), t in zip(entries, np.array(rounds).T, strict=True):
            row.seconds = float(np.median(t))
            row.spread = float(t.max() - t.min()) / 2 / row.seconds
            row.rate = units / row.seconds
            if flop := self.flop[work(row)]:
                row.gflops = flop / row.seconds / 1e9
                row.share_of_peak = row.gflops / self.limits.get("gflops", row.gflops)
            if "update" in row.what:
                adam = row.parameters * self.limits["adam"]
                row.share_of_bound = row.share_of_peak + adam / row.seconds
        return [entry.row for entry in entries]


def work(row: Row) -> tuple:
    """What is computed, in whichever mode."""
    sizes = row.seeds, row.agents, row.batch, row.horizon, row.rows
    return row.what, row.implementation, row.task, sizes


def count_flop(function: Callable) -> int:
    """Floating-point operations of the matrix products in a call; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_memory_mb(function: Callable, device: torch.device) -> float | None:
    """The most memory in use during the first calls; None where the system does not tell."""
    calls = range(5)  # CUDA graphs are recorded at the fourth
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for _ in calls:
            function()
        return torch.cuda.max_memory_allocated() / 1e6
    function()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
        function()
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def parameters(module: nn.Module) -> int:
    """Number of those in use: OfflineRL-Kit's module holds its best weights, too."""
    return sum(p.numel() for name, p in module.named_parameters() if "saved" not in name)


def machine(device: str) -> str:
    """Model and number of the processors, and the GPU's name if it is used."""
    model, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        model = found.group(1)
    gpu = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    return f"{model}, {os.cpu_count()} cores{gpu}"


def write(path: Path, rows: list[Row]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(Row))
    for row in rows:
        cells = dataclasses.astuple(row)
        writer.writerow(f"{x:.5g}" if isinstance(x, float) else x for x in cells)
    datasets.write_atomic(path, text.getvalue().encode())


def read(path: Path) -> list[Row]:
    """What `write` has written; of anything else, a ValueError."""
    kinds = {f.name: (get_args(f.type) or (f.type,))[0] for f in dataclasses.fields(Row)}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(kinds):
            raise ValueError(f"{path} has other columns than `benchmark.py speed` writes.")
        return [
            Row(**{name: kinds[name](cell) for name, cell in line.items() if cell})
            for line in reader
        ]
