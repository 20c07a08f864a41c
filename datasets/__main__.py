"""Files of recorded episodes.

python -m datasets info PATH                           what it holds, in any format
python -m datasets convert PATH OUT.h5 [--env-id ID]   any format -> our own HDF5
python -m datasets download [NAME] [--out DIR]         a public Vault; without NAME: a list
"""

from pathlib import Path

import tyro

from datasets import convert, describe, download, one_sentence

Source = tyro.conf.Positional[Path]


def info_command(path: Source, /, env_id: str | None = None) -> None:
    """Print what recorded episodes hold.

    Args:
        path: a file, or a folder of a Vault or of Minari.
        env_id: the task if the file does not say it; for a robot of OMIGA or Minari also
            another division.
    """
    print(describe(path, env_id))


def convert_command(
    path: Source, out: tyro.conf.Positional[Path], /, env_id: str | None = None
) -> None:
    """Write recorded episodes of any format in our own layout (HDF5).

    Args:
        path: a file, or a folder of a Vault or of Minari.
        out: the file to write.
        env_id: the task if the file does not say it; for a robot of OMIGA or Minari also
            another division.
    """
    convert(path, out, env_id)
    print(describe(out))


def download_command(name: tyro.conf.Positional[str] = "", /, out: Path = Path("vaults")) -> None:
    """Download and unpack a public Vault; the same command continues an interrupted transfer.

    Args:
        name: such as omiga/3hopper; without a name, all names are listed.
        out: the folder to unpack into.
    """
    if name not in download.CATALOGUE:
        print(download.listing())
    if name:
        print(f"unpacked {download.download(name, out)}")


if __name__ == "__main__":
    commands = {"info": info_command, "convert": convert_command, "download": download_command}
    with one_sentence("python -m datasets"):
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m datasets", description=__doc__
        )
