"""Timing: what a measurement holds, and how functions are timed fairly against each other."""

import dataclasses
import math
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode


@dataclasses.dataclass
class Row:
    """A measurement: a line of results/speed.csv. None: has no meaning for it."""

    what: str  # is timed: "imagine", "world-model update", ...
    implementation: str  # by which code
    task: str = ""  # whose dimensions it has
    grows: str = ""  # name of the column that is varied, see speed.AXES
    mode: str = "eager"  # or "compiled"
    agents: int | None = None  # N
    batch: int | None = None  # B
    horizon: int | None = None  # H
    rows: int | None = None  # of D_m
    seconds: float = 0.0  # one call: median of the repetitions
    spread: float = 0.0  # half of (longest - shortest) over the median
    rate: float = 0.0  # units per second
    unit: str = ""
    gflops: float | None = None  # 10^9 floating-point operations of matrix products, per second
    share_of_peak: float | None = None  # that, over the same of one product of 1024^3
    share_of_bound: float | None = None  # (seconds at the peak rate + of Adam) over seconds
    parameters: int | None = None  # of the networks
    peak_memory_mb: float | None = None  # GPU: of torch's tensors; CPU: of the whole process
    device: str = ""
    machine: str = ""
    threads: int = 0
    commit: str = ""
    versions: str = ""


class Entry(NamedTuple):
    """One of the functions that are timed in turn."""

    row: Row  # to be filled in
    function: Callable[[], object]
    units: float  # of work in a call


@dataclasses.dataclass
class Clock:
    """Times functions on a device.

    Args:
        device: of the functions; the timer waits for a GPU.
        repetitions: of every function.
        at_least: seconds per repetition.
        gflops, adam: what the machine can do at most, found by `speed.machine_limits`: matrix
            products in 10^9 operations per second, and seconds of Adam per parameter.
    """

    device: torch.device
    repetitions: int = 5
    at_least: float = 0.3
    gflops: float | None = None
    adam: float | None = None
    flop: dict[tuple, int] = dataclasses.field(default_factory=dict)  # by `work`, in a call

    def seconds(self, function: Callable, calls: int) -> float:
        """Mean time of a call; torch's timer waits until a GPU is done."""
        return timeit.timeit(function, number=calls, timer=benchmark.timer) / calls

    def race(self, entries: list[Entry]) -> list[Row]:
        """Time functions in turn, A B A B, so that a disturbance meets all; returns their rows."""
        calls = []
        for row, function, _ in entries:
            row.peak_memory_mb = peak_memory_mb(function, self.device)  # warms it up, too
            if row.mode == "eager":  # compiled code cannot be counted, and computes the same
                self.flop[work(row)] = count_flop(function)
            calls.append(max(1, math.ceil(self.at_least / self.seconds(function, 1))))
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
                row.share_of_peak = row.gflops / (self.gflops or row.gflops)
            if "update" in row.what:
                row.share_of_bound = row.share_of_peak + row.parameters * self.adam / row.seconds
        return [entry.row for entry in entries]


def work(row: Row) -> tuple:
    """What is computed, in whichever mode."""
    sizes = row.agents, row.batch, row.horizon, row.rows
    return row.what, row.implementation, row.task, sizes


def count_flop(function: Callable) -> int:
    """Floating-point operations of the matrix products in a call; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_memory_mb(function: Callable, device: torch.device) -> float | None:
    """The most memory in use during a call, in 10^6 bytes; None where the system does not tell."""
    function()  # what is compiled or allocated only once is not counted on a GPU
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
        function()
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def parameters(module: nn.Module) -> int:
    """Number of those in use: OfflineRL-Kit's module keeps a copy of its best weights, too."""
    return sum(p.numel() for name, p in module.named_parameters() if "saved" not in name)
