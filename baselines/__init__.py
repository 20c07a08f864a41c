"""The paper's other methods, one file each, on train.py's loop, data and evaluation.

  learners      cfcql.py  omar.py  omiga.py           in MACQL's place, on real rows
  world models  direct.py ensemble.py morel.py sumo.py mamba.py mazero.py
                                                      in LOGO's place, under MACQL
  planning.py                   policies drawn towards the best of three actions by LOGO's model
  joint.py      what the world models have in common: inputs, outputs, heads

    python -m baselines.omiga --env-id 3s_vs_5z        train, with train.py's flags and its own
    python -m baselines.omiga --self-check             a small problem that it must solve

`train.main` takes a learner or a world model in place of its own; its docstring says what either
must offer.
"""

import sys
from collections.abc import Callable

import envs
import train
from datasets import one_sentence
from experiment.stopping import saying_how_to_go_on


def run(
    name: str, kind: type[train.Args], self_check: Callable, argv: list[str] | None = None, **parts
) -> dict | None:
    """The command line of a baseline: an error is one sentence and a non-zero exit.

    Args:
        name: of the baseline's file; names the method in the run's folder and report.
        kind: its flags. Those named in its NO_EFFECT belong to parts that it does not have, and are
            refused, as are those of MAPS_ONLY on robots and of ROBOTS_ONLY on maps. ON_ROBOTS has
            other defaults for robots.
        self_check: what --self-check runs instead.
        argv: the flags; None: those of the process.
        parts: `learner` or `world_model` for `train.main`.
    Returns:
        The content of final.json; None after a self-check.
    """
    program = f"-m baselines.{name}"
    given = sys.argv[1:] if argv is None else argv
    if "--self-check" in given:
        self_check()
        return None
    with one_sentence(f"python {program}"), saying_how_to_go_on(argv, program):
        args = train.parse(argv, kind, prog=f"python {program}", description=kind.__doc__)
        usual = train.defaults(args.env_id, kind=kind)
        others = getattr(kind, "MAPS_ONLY" if envs.is_robot(args.env_id) else "ROBOTS_ONLY", ())
        for flag in ("paper", *kind.NO_EFFECT, *others):
            if getattr(args, flag) != getattr(usual, flag):
                told, where = flag.replace("_", "-"), f" on {args.env_id}" * (flag in others)
                raise ValueError(f"--{told} is not for {name}{where}: leave it out.")
        if "world_model" in parts and args.synthetic_fraction == 0:
            raise ValueError("--synthetic-fraction 0 leaves MACQL: run train.py for that.")
        return train.main(args, method=name, **parts)
