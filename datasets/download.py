"""Download of OG-MARL's public Vaults from Hugging Face: continued, checked, unpacked safely.

  OUT/NAME.zip.part   what has arrived; the same download again continues it
  OUT/NAME.vlt        the Vault; it appears only when it is complete

huggingface_hub finds the file and transfers it. Its `hf_hub_download` starts again from nothing
after an interruption and does not compare the hash of the result. So its parts are called here:
`get_hf_file_metadata` for size and SHA-256, `http_get` to continue the transfer.
"""

import hashlib
import re
import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath

from tqdm import tqdm

REPOSITORY = "InstaDeepAI/og-marl"  # a dataset on Hugging Face
MB = 10**6
CATALOGUE = {  # name: (path in the repository, megabytes or None if unknown, what it holds)
    "cfcql/2s3z": ("prior_work/cfcql/smac_v1/2s3z", 142, "SMAC"),
    "cfcql/3s_vs_5z": ("prior_work/cfcql/smac_v1/3s_vs_5z", 516, "SMAC"),
    "cfcql/5m_vs_6m": ("prior_work/cfcql/smac_v1/5m_vs_6m", 50.8, "SMAC"),
    "cfcql/6h_vs_8z": ("prior_work/cfcql/smac_v1/6h_vs_8z", 365, "SMAC"),
    "core/3s5z_vs_3s6z": ("core/smac_v1/3s5z_vs_3s6z", None, "SMAC, Good/Medium/Poor"),
    "omiga/3hopper": ("prior_work/omiga/mamujoco/3hopper", 599, "Hopper-3x1"),
    "omiga/2ant": ("prior_work/omiga/mamujoco/2ant", 1310, "Ant-2x4"),
    "omiga/6halfcheetah": ("prior_work/omiga/mamujoco/6halfcheetah", 882, "HalfCheetah-6x1"),
    "core/3hopper": ("core/gymnasium_mamujoco/3hopper", 2230, "Hopper-3x1, Replay"),
    "core/2ant": ("core/gymnasium_mamujoco/2ant", 4370, "Ant-2x4, Replay"),
    "core/4ant": ("core/gymnasium_mamujoco/4ant", 2560, "Ant-4x2, Replay"),
    "core/2halfcheetah": ("core/gymnasium_mamujoco/2halfcheetah", 1350, "HalfCheetah-2x3, Replay"),
    "core/6halfcheetah": ("core/gymnasium_mamujoco/6halfcheetah", 2100, "HalfCheetah-6x1, Replay"),
}
BY_HAND = """The original HDF5 files of CFCQL and OMIGA are fetched by hand with a browser
(docs/data.md); `python -m datasets info FILE` reads them as they are."""


def listing() -> str:
    """What can be downloaded, with sizes, and what cannot."""
    lines = [f"Vaults of OG-MARL (https://huggingface.co/datasets/{REPOSITORY}):"]
    for name, (_, size, what) in CATALOGUE.items():
        shown = "size unknown" if size is None else f"{size:g} MB"
        lines.append(f"  {name:20} {shown:>12}  {what}")
    return "\n".join([*lines, BY_HAND])


def download(name: str, out: Path) -> Path:
    """Download, check and unpack one entry of the catalogue; returns the Vault's folder.

    Raises:
        ValueError: unknown name, wrong size or hash, or an archive that is damaged or unsafe.
        OSError: no network, not enough room, or the transfer was interrupted.
        ImportError: huggingface_hub is not installed.
    """
    if name not in CATALOGUE:
        known = ", ".join(CATALOGUE)
        raise ValueError(f"no dataset is named {name!r}: choose one of {known}.")
    if (target := Path(out) / f"{name}.vlt").exists():
        raise ValueError(f"{target} is there already: remove it to download it again.")
    part = target.with_name(f"{target.stem}.zip.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    transfer(f"{CATALOGUE[name][0]}.zip", part)
    unpack(part, target)
    part.unlink()
    return target


def transfer(filename: str, part: Path) -> None:
    """Bring `part` to the full content of a file of the repository, continuing what it holds.

    Raises:
        ValueError: what arrived has not the announced size or hash; it was removed.
        OSError: no network, not enough room, or the transfer was interrupted; `part` is kept.
    """
    try:  # imported here, because reading files does not need it
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError, HTTPError
        from huggingface_hub.file_download import http_get
    except ImportError as e:
        raise ImportError(f"downloads need: pip install 'huggingface_hub>=2' ({e})") from e

    url = hf_hub_url(REPOSITORY, filename, repo_type="dataset")
    try:
        remote = get_hf_file_metadata(url, token=False)
    except HfHubHTTPError as e:
        raise OSError(f"{url}: the host refuses it: {first_line(e)}") from e
    except (HTTPError, OSError) as e:
        raise OSError(f"{url} cannot be reached ({first_line(e)}): is there a network?") from e
    if remote.size is None:
        raise ValueError(f"{url}: the host does not say how large it is.")
    have = part.stat().st_size if part.exists() else 0
    if have > remote.size:  # it is of another version of the file
        part.unlink()
        have = 0
    need_room(part.parent, remote.size - have)
    try:
        with part.open("ab") as f:
            http_get(
                url, f, resume_size=have, expected_size=remote.size, displayed_filename=part.name
            )
    except (HTTPError, OSError) as e:
        if (have := part.stat().st_size) <= remote.size:
            raise OSError(
                f"the transfer stopped at {have / MB:.1f} of {remote.size / MB:.1f} MB "
                f"({first_line(e)}); the same download again continues {part}."
            ) from e
    check(url, part, remote.size, remote.etag)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def check(url: str, part: Path, size: int, etag: str) -> None:
    """Remove `part` and raise a ValueError unless it has the announced size and hash.

    Hugging Face announces the SHA-256 of its large files as their ETag.
    """
    with part.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    wanted = etag if re.fullmatch(r"[0-9a-f]{64}", etag or "") else found
    if (have := part.stat().st_size) != size or found != wanted:
        part.unlink()
        raise ValueError(
            f"{url}: what arrived ({have} bytes, sha256 {found}) is not what was announced "
            f"({size} bytes, sha256 {wanted}); it was removed, start again."
        )


def need_room(folder: Path, size: int) -> None:
    """Raise an OSError unless `size` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"{folder}: {size / MB:,.1f} MB are needed, {free / MB:,.1f} are free.")


def unpack(archive: Path, target: Path) -> None:
    """Unpack the folder `target.name` of an archive as `target`, which appears only when complete.

    Raises:
        ValueError: a damaged archive, a link, or a member that would lie outside the folder.
        OSError: not enough room.
    """
    fresh = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(fresh, ignore_errors=True)  # left by an attempt that was killed
    try:
        with zipfile.ZipFile(archive) as z:
            for member in z.infolist():
                name = member.filename.replace("\\", "/")
                path, link = PurePosixPath(name), stat.S_ISLNK(member.external_attr >> 16)
                if path.is_absolute() or ".." in path.parts or ":" in name or link:
                    raise ValueError(f"{archive}: member {member.filename!r} reaches outside.")
            need_room(archive.parent, sum(m.file_size for m in z.infolist()))
            for member in tqdm(z.infolist(), desc=f"unpacking {archive.name}", unit="file"):
                z.extract(member, fresh)
        if not (fresh / target.name).is_dir():
            raise ValueError(f"{archive}: holds no folder {target.name}.")
        (fresh / target.name).replace(target)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError) as e:
        raise ValueError(f"{archive}: a damaged archive ({e}); remove it and start again.") from e
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
