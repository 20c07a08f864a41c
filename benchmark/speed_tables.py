"""The measurements of speed as tables in Markdown; results/speed.csv holds them all."""

import numpy as np

from benchmark.markdown import table
from benchmark.timing import Row

LIMITS = "matrix product 1024^3", "Adam"  # what the machine itself can do
TRAINING = "world-model update", "policy update", "imagine with the policy into D_m"


def speed_tables(rows: list[Row]) -> str:
    """The tables of every machine, device and number of threads, one after the other."""
    by_machine: dict[tuple, list[Row]] = {}
    for row in rows:
        by_machine.setdefault((row.machine, row.device, row.threads), []).append(row)
    return "\n\n".join(map(of_one_machine, by_machine.values()))


def of_one_machine(rows: list[Row]) -> str:
    one = rows[0]
    threads = f"{one.threads} thread" + "s" * (one.threads > 1)
    about = f"**{one.machine}; {one.device}, {threads}**; {one.versions}; commit {one.commit}."
    limits = " ".join(
        f"{row.what[0].upper()}{row.what[1:]}, {row.implementation}: {1e3 * row.seconds:.2f} ms"
        + (f", {row.gflops:,.0f} GFLOP/s." if row.gflops else f", {millions(row)} parameters.")
        for row in rows if row.what in LIMITS
    )  # fmt: skip
    return "\n\n".join([f"{about} {limits}", imagination(rows), training(rows), growth(rows)])


def imagination(rows: list[Row]) -> str:
    """Imagined steps per second; how many times as fast LOGO is; parameters."""
    rows = [row for row in rows if row.what == "imagine" and not row.grows]
    tasks = list(dict.fromkeys(row.task for row in rows))
    logo = {row.task: row.seconds for row in rows if row.implementation == "LOGO"}
    by_code: dict[str, list[str]] = {}
    for row in rows:
        times = row.seconds / logo[row.task]
        cell = f"{row.rate:,.0f} ({times:.2f}x, {millions(row)})"
        by_code.setdefault(row.implementation, []).append(cell)
    size = f"{rows[0].batch} x {rows[0].horizon} imagined steps, rows/s"
    return table([size, *tasks], [[name, *cells] for name, cells in by_code.items()])


def training(rows: list[Row]) -> str:
    """Updates per second, and their share of what the machine could do."""
    rows = [row for row in rows if row.what in TRAINING and not row.grows]
    by_mode: dict[str, list[Row]] = {}
    for row in rows:
        by_mode.setdefault(row.mode, []).append(row)
    units = {row.what: row.unit for row in rows}
    return table(
        ["mode", *(f"{what}, {unit}" for what, unit in units.items()), "peak memory, MB"],
        [[mode, *map(rate_and_share, some), f"{max(row.peak_memory_mb or 0 for row in some):,.0f}"]
         for mode, some in by_mode.items()],
    )  # fmt: skip


def growth(rows: list[Row]) -> str:
    """Time against size, with the exponent of the power law that fits best."""
    growing: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.grows:
            growing.setdefault((row.what, row.grows), []).append(row)
    return table(
        ["work", "growing", "sizes", "milliseconds", "time ~ size^p, p"],
        [[what, axis, " ".join(f"{getattr(row, axis):,}" for row in some),
          " ".join(f"{1e3 * row.seconds:.3g}" for row in some), f"{exponent(some, axis):.2f}"]
         for (what, axis), some in growing.items()],
    )  # fmt: skip


def rate_and_share(row: Row) -> str:
    share = row.share_of_bound or row.share_of_peak
    return f"{row.rate:,.{0 if row.rate > 100 else 1}f} ({share:.0%})"


def millions(row: Row) -> str:
    return f"{row.parameters / 1e6:.2f} M"


def exponent(rows: list[Row], axis: str) -> float:
    """p of seconds ~ size^p, fitted to the logarithms."""
    size, seconds = ([getattr(r, name) for r in rows] for name in (axis, "seconds"))
    return float(np.polyfit(np.log(size), np.log(seconds), 1)[0])
