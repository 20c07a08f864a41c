"""Many runs, the tables and pictures of their results, and measurements of speed.

python -m benchmark grid      five maps x four qualities x {LOGO, MACQL} x 5 seeds
python -m benchmark ceiling   the same learner with the true simulator as its world model
python -m benchmark errors    one-step errors of every world model
python -m benchmark coverage  which states the policies of finished runs visit
python -m benchmark tables    the tables of results, from the rows of results/*.csv
python -m benchmark figures   its pictures of many runs, from the same files
python -m benchmark speed     updates and rollouts, timed, against an ensemble
"""

import tyro

from benchmark.errors import errors
from benchmark.figures import figures
from benchmark.grid import ceiling, grid
from benchmark.speed import speed
from benchmark.states import coverage
from benchmark.tables import tables
from datasets import one_sentence


def cli(argv: list[str] | None = None) -> None:
    """The command line: an error is one sentence and a non-zero exit."""
    known = (grid, ceiling, errors, coverage, tables, figures, speed)
    commands = {command.__name__: command for command in known}
    with one_sentence("python -m benchmark"):
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m benchmark", description=__doc__, args=argv
        )


if __name__ == "__main__":
    cli()
