"""Tables of the paper's ablations: the use of the uncertainty (Table 6), the horizon (Table 7); one
of the size of the data, and one of every departure from the paper.

python -m benchmark grid --methods logo --env-ids Hopper-3x1 --qualities medium --results mine.csv
    --variants="; --uncertainty none; --uncertainty shuffled; --uncertainty penalty --u-scale 30"
python -m benchmark grid --methods logo direct --env-ids 6h_vs_8z --results mine.csv
    --variants="; --horizon 5; --horizon 10; --horizon 20"
python -m benchmark grid --env-ids 3s_vs_5z --qualities medium-replay --results mine.csv
    --variants="; --episodes 60; --episodes 200"
python -m benchmark grid --methods logo --env-ids 3s_vs_5z --qualities medium-replay --seeds 101
    --results mine.csv --variants="; --deduce-from obs; --no-heads; --no-clamp"
"""

import re

import train
from behaviour import default_episodes
from benchmark.markdown import code, table
from benchmark.rows import Error, key_of
from experiment.report import over_seeds

HORIZONS = 5, 10, 15, 20
# No flags: rows of robots, and of maps, with the defaults until those commits
EARLIER = "--defaults a7022f9"
BEFORE_D30 = "--defaults ba22afa"
USES = {  # of u, by how a variant begins
    "": "weights exp(-u)",
    "--uncertainty shuffled": "weights of another rollout's u",
    "--uncertainty none": "no use of u",
    "--uncertainty penalty": "penalty on the reward",
}
DEPARTURES = {  # what takes one back, as a variant is spelled: its id in docs/deviations.md
    "--deduce-from obs": "D1", "--no-heads": "D3", "--no-clamp": "D4",
    "--conservative expectation": "D5", "--backup max": "D6", "--critics 1": "D7",
    "--imagined-rows printed": "D8", "--no-zeros": "D11", "--no-shared-actor": "D14",
    "--wm-lr 0.001 --wm-weight-decay 0": "D15", "--epsilon 0": "D16", "--bc-lambda 1": "D17",
    "--no-warm-start": "D18", "--tau 1": "D19", "--u-scale 0": "D20",
    "--observe predicted": "D22", "--critic-first 0": "D26", "--imagined-rows instead": "D27",
    "--n-step 1": "D28", "--no-recorded-critic": "D30", "--paper": "all",
}  # fmt: skip
NO_D30 = "--no-recorded-critic"
# What a departure that does not stand alone is compared with: where the defaults are the present
# ones, where they are those before D30, and at the letter. The flags of D7 and D8 take D30 back,
# too, and D8's takes D27 back.
WITHOUT = {"D7": (NO_D30, BEFORE_D30, "--paper"),
           "D8": (f"--imagined-rows instead {NO_D30}", f"{BEFORE_D30} --imagined-rows instead",
                  "--paper"),
           "D27": ("", BEFORE_D30, "--paper --imagined-rows instead"),
           "D30": ("", "", "--paper --critics 2"),
           "all": (BEFORE_D30, "", "")}  # fmt: skip


def returns(runs: dict | None) -> str:
    """Mean ± interval over seeds, and the seeds' number where it is more than one."""
    if not runs:
        return "not run"
    scores = over_seeds([row.return_mean for row in runs.values()])
    return f"{scores} ({len(runs)})" if len(runs) > 1 else scores


def uncertainty(groups: dict) -> str:
    """One line per cell and other flags with which LOGO used u otherwise, all uses side by side.

    Args:
        groups: of `tables.group`.
    """
    lines: dict[tuple, dict[str, str]] = {}
    for (cell, variant, method), runs in groups.items():
        if method != "logo" or cell.backend == "offline":
            continue
        use, unit, rest = "", None, variant
        if found := re.search(r"(--uncertainty \w+)(?: --u-scale (\S+))? ?", variant):
            use, unit = found.groups()
            rest = variant.replace(found[0], "").strip()
        told = returns(runs) + (f" (unit {unit})" if unit else "")
        line = lines.setdefault((*cell, code(rest)), {})
        line[use] = ", ".join(filter(None, [line.get(use), told]))
    lines = {cell: by_use for cell, by_use in lines.items() if len(by_use) > 1}
    return table(
        ["task", "simulator", "data", "flags", *USES.values()],
        [[*cell, *(by_use.get(use, "not run") for use in USES)] for cell, by_use in lines.items()],
    )


def horizons(groups: dict, errors: list[Error], names: dict[str, str]) -> str:
    """One line per cell, other flags and method with several horizons, and its reward error.

    Args:
        groups: of `tables.group`. errors: of the models after one step, in the reward's own units.
        names: of the methods, for the reader.
    """
    lines: dict[tuple, dict[int, dict]] = {}
    for (cell, variant, method), runs in groups.items():
        if cell.backend == "offline" or method in ("macql", "planning"):
            continue
        usual = train.Args() if EARLIER in variant else train.defaults(cell.env_id)
        horizon, rest = usual.horizon, variant
        if found := re.search(r"--horizon (\d+) ?", variant):
            horizon, rest = int(found[1]), variant.replace(found[0], "").strip()
        lines.setdefault((cell, rest, method), {})[horizon] = runs
    text = []
    for (cell, rest, method), by_horizon in lines.items():
        if len(by_horizon) > 1:
            same = (method, cell.env_id, cell.quality, cell.quality)
            wrong = [e.raw_reward_mse for e in errors if key_of(e)[:-1] == same]
            error = over_seeds(wrong, 4) if wrong else "not measured"
            runs = [returns(by_horizon.get(h)) for h in HORIZONS]
            text.append([*cell, code(rest), names.get(method, method), *runs, error])
    columns = [f"H = {h}" for h in HORIZONS]
    return table(["task", "simulator", "data", "flags", "method", *columns, "error of r'"], text)


def sizes(groups: dict) -> str:
    """One line per cell, other flags and number of recorded episodes, where there are several.

    Args:
        groups: of `tables.group`.
    """
    lines: dict[tuple, dict[int, dict[str, dict]]] = {}
    for (cell, variant, method), runs in groups.items():
        if method in ("macql", "logo") and cell.backend != "offline":
            episodes, rest = default_episodes(cell.env_id), variant
            if found := re.search(r"--episodes (\d+) ?", variant):
                episodes, rest = int(found[1]), variant.replace(found[0], "").strip()
            by_size = lines.setdefault((*cell, code(rest)), {})
            by_size.setdefault(episodes, {})[method] = runs
    text = []
    for cell, by_size in lines.items():
        for episodes, by_method in sorted(by_size.items() if len(by_size) > 1 else ()):
            macql, logo = (by_method.get(method, {}) for method in ("macql", "logo"))
            both = [seed for seed in logo if seed in macql]
            gains = [f"{logo[s].return_mean - macql[s].return_mean:+.2f}" for s in both]
            # Both start from the same clone; some runs of either did not evaluate it
            clones = {seed: row.clone_return for runs in (logo, macql) for seed, row in runs.items()
                      if row.clone_return is not None}  # fmt: skip
            cloning = f"{over_seeds([*clones.values()])} ({len(clones)})" if clones else ""
            text.append([*cell, episodes, cloning, returns(macql), returns(logo), ", ".join(gains)])
    columns = ["episodes", "behaviour cloning", "MACQL", "LOGO", "LOGO - MACQL, by seed"]
    return table(["task", "simulator", "data", "flags", *columns], text)


def added_alone(spelled: str) -> str:
    """The flags that add one departure to the paper's letter, from those that take it back."""
    if spelled == "--imagined-rows printed":  # D8 without D27
        return "--paper --imagined-rows instead"
    usual, back = train.Args(), re.findall(r"--(no-)?([\w-]+)", spelled)
    values = [getattr(usual, name.replace("-", "_")) for _, name in back]
    told = ["" if isinstance(x, bool) else " " + str(x).removesuffix(".0") for x in values]
    return " ".join(["--paper", *(f"--{name}{x}" for (_, name), x in zip(back, told, strict=True))])


def bases() -> dict[str, str]:
    """By every variant in which one departure is taken back, or added to the letter: the variant
    that it is compared with."""
    found = {BEFORE_D30: ""}  # the same as NO_D30
    for spelled, name in DEPARTURES.items():
        now, before, letter = WITHOUT.get(name, ("", BEFORE_D30, "--paper"))
        found |= {f"{BEFORE_D30} {spelled}": before, added_alone(spelled): letter, spelled: now}
    return found


def changes(groups: dict) -> dict[tuple, str]:
    """What LOGO's return changes by through one departure, seed by seed: by cell and variant, where
    there are runs to compare it with.

    Args:
        groups: of `tables.group`.
    """
    base_of = bases()
    logo = {(cell, variant): runs for (cell, variant, m), runs in groups.items() if m == "logo"}
    for (cell, variant), runs in [*logo.items()]:
        if variant == BEFORE_D30:
            logo[cell, NO_D30] = runs | logo.get((cell, NO_D30), {})
    found = {}
    for (cell, variant), runs in logo.items():
        usual = logo.get((cell, base_of.get(variant)), {})
        both = sorted(runs.keys() & usual.keys())
        if more := [runs[seed].return_mean - usual[seed].return_mean for seed in both]:
            each = f" ({', '.join(f'{x:+.2f}' for x in more)})" if len(more) > 1 else ""
            found[cell, variant] = f"{sum(more) / len(more):+.2f}{each}"
    return found


def departures(groups: dict) -> str:
    """Lines of every departure from the paper: what LOGO's return changes by, cell by cell, where
    it alone is taken back from the present defaults or from those before D30, and where it alone is
    added to the paper's letter (D27 with D8).

    Args:
        groups: of `tables.group`.
    """
    found = changes(groups)
    cells = [*dict.fromkeys(cell for cell, _ in found)]

    def line(id: str, flags: str, defaults: str, taken_back: list[str], added: list[str]) -> list:
        both = zip(taken_back, added, strict=True)
        return [id, flags, defaults, *(x for pair in both for x in pair)]

    def of(variant: str) -> list[str]:
        return [returns(groups.get((cell, variant, "logo"))) for cell in cells]

    nothing, no_run = [""] * len(cells), ["not run"] * len(cells)
    lines = [line("none", "", "present", of(""), of("--paper"))]
    lines.append(line("none", "", "before D30", of(BEFORE_D30), nothing))
    for spelled, name in DEPARTURES.items():
        ways = {"present": spelled, "before D30": f"{BEFORE_D30} {spelled}"}
        if name == "all":  # compared with the defaults that have most seeds
            ways = {"before D30": spelled}
        letter = [found.get((cell, added_alone(spelled)), "not run") for cell in cells]
        added = nothing if name == "all" else letter
        first = len(lines)
        for defaults, variant in ways.items():
            values = [found.get((cell, variant), "not run") for cell in cells]
            if values != no_run:
                lines.append(line(name, code(spelled), defaults, values, added))
                added = nothing
        if len(lines) == first:
            lines.append(line(name, code(spelled), "", no_run, added))
    kinds = "taken back", "added to the letter"
    columns = [f"{' '.join(cell)}: {kind}" for cell in cells for kind in kinds]
    return table(["id", "taken back by", "defaults", *columns], lines)
