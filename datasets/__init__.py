"""Files of recorded episodes: our own layout, readers of every public format, and downloads.

  files.py       atomic writing of any file, opening of HDF5 files
  errors.py      every command ends in one sentence when something is wrong
  rows.py        checks and helpers that all readers share
  episodes.py    our layout, which is pymarl's: writing it and reading it
  omiga.py       OMIGA's HDF5 files of Multi-Agent MuJoCo
  og_marl.py     OG-MARL's Vaults
  minari.py      Minari's datasets
  robots.py      dividing recordings of whole robots among agents
  load.py        recognise a format, read it, and make an OfflineDataset of it
  conversion.py  a summary of a dataset, and conversion of any format to our layout
  download.py    OG-MARL's public Vaults
  __main__.py    python -m datasets info | convert | download

Nothing in a file is executed or unpickled. The formats and their repairs: docs/data.md.
"""

from datasets.conversion import convert, describe
from datasets.episodes import join_rounds, save_episodes
from datasets.errors import one_sentence
from datasets.files import (
    check_writable,
    lock,
    make_folder,
    remove_parts,
    replacing,
    write_atomic,
)
from datasets.load import load_dataset, read_episodes, task_of

__all__ = ["check_writable", "convert", "describe", "join_rounds", "load_dataset", "lock",
           "make_folder", "one_sentence", "read_episodes", "remove_parts", "replacing",
           "save_episodes", "task_of", "write_atomic"]  # fmt: skip
