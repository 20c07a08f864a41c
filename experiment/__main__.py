"""Look at finished runs: a GIF of a policy, a table of many runs."""

from pathlib import Path

import tyro

from datasets import one_sentence
from experiment import report as reports
from experiment.imagined import watch_imagined
from experiment.watch import watch as write_gif


def watch(
    run: tyro.conf.Positional[Path],
    /,
    episodes: int = 1,
    imagined: bool = False,
    steps: int = 15,
    out: Path | None = None,
    seed: int = 0,
) -> None:
    """Write a GIF of a run's policy, acting greedily in its simulator, or of its world model.

    Args:
        run: folder of a run, as train.py prints it
        episodes: number of episodes, shown one after the other
        imagined: a recorded episode and, beside it, what LOGO imagines under the same actions
        steps: with --imagined, of the rollout
        out: file to write, RUN/watch.gif (RUN/imagined.gif) by default
        seed: of the first episode, or of the choice of the recorded one
    """
    if imagined:
        path = watch_imagined(run, steps, out, seed)
    else:
        path = write_gif(run, episodes, out, seed)
    print(f"wrote {path} ({path.stat().st_size / 1024:.0f} KiB)")


def report(runs: tyro.conf.Positional[tuple[Path, ...]], /) -> None:
    """Print markdown tables of finished runs, with means over the seeds of each setting.

    Args:
        runs: folders of runs, or their final.json files
    """
    if not runs:
        raise ValueError("report: no run was given; give folders of finished runs.")
    print(reports.compare(list(runs)))


def cli(argv: list[str] | None = None) -> None:
    """The command line: an error is one sentence and a non-zero exit."""
    commands = {"watch": watch, "report": report}
    with one_sentence("python -m experiment"):
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m experiment", description=__doc__, args=argv
        )


if __name__ == "__main__":
    cli()
