"""Transfer of OG-MARL's public Vaults: resumable, checked, unpacked only inside its folder.

  OUT/NAME.zip.part   what has arrived so far; the same download again asks for the rest
  OUT/NAME.vlt        the Vault, there only once it is whole: unpacked beside, checked, then renamed

A transfer is checked against the size and, where the host tells one, the SHA-256 of the file
(Hugging Face: the linked ETag of its large files); the archive's own checksums are checked always.
"""

import hashlib
import http.client
import re
import shutil
import stat
import urllib.error
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

HOST = "https://huggingface.co/datasets/InstaDeepAI/og-marl/resolve/main"
MB = 10**6
CATALOGUE = {  # name: (path on the host, megabytes as listed there or None, what)
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
BY_HAND = """The original HDF5 files lie where only a browser gets them; fetch them by hand:
  CFCQL  Google Drive, "sc2datasets" (link in github.com/thu-rllab/CFCQL, discrete/README.md)
  OMIGA  cloud.tsinghua.edu.cn/d/dcf588d659214a28a777 (github.com/ZhengYinan-AIR/OMIGA)
`python datasets.py info FILE` reads them as they are."""


def listing() -> str:
    """What can be downloaded, with sizes, and what cannot."""
    lines = [f"Vaults of OG-MARL ({HOST}):"]
    for name, (_, size, what) in CATALOGUE.items():
        shown = "size unknown" if size is None else f"{size:g} MB"
        lines.append(f"  {name:20} {shown:>12}  {what}")
    return "\n".join([*lines, BY_HAND])


class Remote(NamedTuple):
    url: str
    size: int  # bytes
    sha256: str | None  # None: the host does not tell


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections and keeps what their headers say of the file that is linked."""

    def __init__(self):
        self.linked: dict[str, str] = {}

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.linked |= {k.lower(): v for k, v in headers.items() if k.lower().startswith("x-link")}
        onward = super().redirect_request(req, fp, code, msg, headers, newurl)
        if onward is not None:
            onward.method = req.get_method()  # asking for the head alone, still
        return onward


def download(name: str, out: Path) -> Path:
    """Fetch, check and unpack one entry of the catalogue; returns the Vault's folder.

    Raises:
        ValueError: unknown name, wrong size or hash, an archive that is damaged or reaches outside.
        OSError: no network, no room, or the transfer stopped half-way.
    """
    if name not in CATALOGUE:
        known = ", ".join(CATALOGUE)
        raise ValueError(f"no dataset is named {name!r}: choose one of {known}.")
    if (target := Path(out) / f"{name}.vlt").exists():
        raise ValueError(f"{target} is there already: remove it to download it again.")
    remote = look_up(f"{HOST}/{CATALOGUE[name][0]}.zip")
    part = target.with_name(f"{target.stem}.zip.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    receive(remote, part)
    check(remote, part)
    unpack(part, target)
    part.unlink()
    return target


def look_up(url: str) -> Remote:
    """Size and hash of a remote file, without fetching it."""
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)
    with reach(opener, urllib.request.Request(url, method="HEAD")) as answer:
        headers = {k.lower(): v for k, v in answer.headers.items()} | redirects.linked
    size = headers.get("x-linked-size", headers.get("content-length", ""))
    if not size.isdigit():
        raise ValueError(f"{url}: the host does not say how large it is.")
    tags = (headers.get(k, "").removeprefix("W/").strip('"') for k in ("x-linked-etag", "etag"))
    sha256 = next((t for t in tags if re.fullmatch(r"[0-9a-f]{64}", t)), None)
    return Remote(url, int(size), sha256)


def reach(opener, request):
    """An open answer to the request, or one sentence about why there is none."""
    try:
        return opener.open(request, timeout=30)
    except urllib.error.HTTPError as e:
        raise OSError(f"{request.full_url}: the host answers {e.code} {e.reason}.") from e
    except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", e)
        raise OSError(f"{request.host} cannot be reached ({reason}): is there a network?") from e


def receive(remote: Remote, part: Path) -> None:
    """Bring `part` to the full size, going on where an earlier transfer stopped."""
    have = part.stat().st_size if part.exists() else 0
    if have > remote.size:  # of another version of the file
        part.unlink()
        have = 0
    need_room(part.parent, remote.size - have)
    if have == remote.size:
        return
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={have}-"})
    with reach(urllib.request.build_opener(), request) as answer:
        resumed = answer.status == 206
        if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise ValueError(f"{remote.url}: the host sent another part than was asked for.")
        have = have if resumed else 0  # a host that knows no ranges starts again
        with (
            part.open("ab" if resumed else "wb") as f,
            tqdm(total=remote.size, initial=have, desc=part.name, unit="B", unit_scale=True) as bar,
        ):
            try:
                while block := answer.read(2**20):
                    f.write(block)
                    bar.update(len(block))
            except (OSError, http.client.HTTPException) as e:
                raise stopped(remote, part, f.tell(), e) from e
    if (have := part.stat().st_size) < remote.size:
        raise stopped(remote, part, have, "the host closed the connection")


def stopped(remote: Remote, part: Path, have: int, why) -> OSError:
    return OSError(
        f"the transfer stopped at {have / MB:.1f} of {remote.size / MB:.1f} MB ({why}); "
        f"the same download again goes on from {part}."
    )


def need_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"{folder}: {size / MB:,.1f} MB are needed, {free / MB:,.1f} are free.")


def check(remote: Remote, part: Path) -> None:
    """Refuse, and remove, what is not the file that the host announced."""
    with part.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if part.stat().st_size != remote.size or found != (remote.sha256 or found):
        size = part.stat().st_size
        part.unlink()
        raise ValueError(
            f"{remote.url}: what arrived ({size} bytes, sha256 {found}) is not what was announced "
            f"({remote.size} bytes, sha256 {remote.sha256}); it was removed, start again."
        )


def unpack(archive: Path, target: Path) -> None:
    """Unpack the one folder `target.name` of an archive; nothing is written outside it.

    Raises:
        ValueError: a damaged archive, a link, or a name that would lie elsewhere.
    """
    fresh = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(fresh, ignore_errors=True)  # of an earlier attempt that was killed
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
