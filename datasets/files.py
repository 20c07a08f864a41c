"""Files: writing them whole or not at all, and opening HDF5 files of unknown origin.

Writing is atomic: a reader sees the old file or the whole new one, never a part. A full disk is an
OSError like any other, also below libraries that crash or stay silent on it (HDF5, torch.save).
"""

import contextlib
import fcntl
import io
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import h5py

from datasets.errors import holding

# What h5py raises when it cannot decode a file, depending on what of it is damaged
H5PY_ERRORS = (OSError, RuntimeError, KeyError, TypeError, AttributeError, UnicodeError,
               OverflowError, MemoryError, IndexError)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


class Target(io.RawIOBase):
    """A file that is being written. After a failing write it takes what comes and drops it.

    So the library that writes can end in order; the first error is kept in `error`.
    """

    def __init__(self, path: Path):
        self.file, self.error = open(path, "w+b", buffering=0), None

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.file.fileno()

    def write(self, data) -> int:
        view, done = memoryview(data).cast("B"), 0
        with self._kept():
            while self.error is None and done < len(view):
                done += self.file.write(view[done:])
        self.file.seek(len(view) - done, os.SEEK_CUR)
        return len(view)

    def readinto(self, into) -> int:
        count = self.file.readinto(into)
        if self.error is None:
            return count
        into[count:] = bytes(len(into) - count)  # what was dropped reads as zeros
        return len(into)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def truncate(self, size: int | None = None) -> int:
        with self._kept():
            self.file.truncate(size)
        return self.tell() if size is None else size

    def close(self) -> None:
        self.file.close()
        super().close()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            self.error = self.error or e


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file to write to; it replaces `path` when the block succeeds.

    Parts that killed processes have left of the same file are removed.

    Raises:
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    path = Path(path)
    make_folder(path.parent)
    remove_parts(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    target = Target(temporary)
    while not lock(target.fileno()) or not is_at(target.fileno(), temporary):
        target.close()  # another process took it for a dead one's, before it was locked
        target = Target(temporary)
    try:
        try:
            with holding():  # HDF5 and torch.save call `target`, and write on after an exception
                yield target
        finally:
            if target.error:  # whatever the library made of it
                raise OSError(f"{path} cannot be written: {target.error.strerror}.")
        os.fsync(target.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        target.close()


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` in place of the file `path`.

    Raises:
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    with replacing(path) as target:
        target.write(data)


def make_folder(folder: Path) -> None:
    """Create a folder and those above it.

    Raises:
        OSError: one of them is a file, or may not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as e:
        above = next(p for p in (folder, *folder.parents) if p.exists())
        raise NotADirectoryError(f"{folder} cannot be a folder: {above} is not a folder.") from e


def check_writable(path: Path) -> None:
    """Raise the OSError now that writing the file `path` would meet later.

    Parts that killed processes have left of it are removed.
    """
    remove_parts(path.parent, path.name)
    probe = path.with_name(f".{path.name}.{secrets.token_hex(8)}.probe")
    write_atomic(probe, b"")
    probe.unlink()


def is_at(file: int, path: Path) -> bool:
    """Whether the open file is still the one at this path."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def lock(file: int) -> bool:
    """Take the file's lock, which this process keeps until it ends; False: another one has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_parts(folder: Path, name: str) -> None:
    """Remove what killed processes have left unfinished of the file `name` (or a pattern) here."""
    for part in folder.glob(f".{name}.*.part"):
        with contextlib.suppress(FileNotFoundError), part.open("rb") as f:
            # Nobody is writing it, and it was not finished and begun anew since it was opened
            if lock(f.fileno()) and is_at(f.fileno(), part):
                part.unlink()


# --------------------------------------------------------------------------------------------------
# Opening
# --------------------------------------------------------------------------------------------------


def absolute(path: Path) -> Path:
    """The path from the root, as the system follows it: `..` goes up from where a link leads."""
    path = Path(path)
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file of unknown origin for reading; all it holds lies in the file itself.

    Raises:
        ValueError: not a regular file, not HDF5, damaged, or with links to elsewhere. Damage that
            shows only while the block reads is reported in the same way.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file of recorded episodes.")
    if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
        raise ValueError(f"{path}: not a regular file.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: an empty file.")
    try:
        if not h5py.is_hdf5(path):
            raise ValueError(f"{path}: not an HDF5 file of recorded episodes.")
        with h5py.File(path, "r") as f:
            inside = refuse_links(path, f, seen=set())
            if dangling := [name for group, name in inside if group.get(name) is None]:
                raise ValueError(f"{path}: {dangling[0]} is a link that leads nowhere.")
            yield f
    except H5PY_ERRORS as e:
        raise ValueError(f"{path}: truncated or damaged: {type(e).__name__}: {e}") from e


def refuse_links(path: Path, group: h5py.Group, seen: set) -> list[tuple[h5py.Group, str]]:
    """Raise a ValueError if an entry of the group, or of a group within it, lies elsewhere.

    Returns:
        (group, name) of the links within the file, which are safe to follow once none leads out.
    """
    inside = []
    for name in group:
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.SoftLink):
            inside.append((group, name))
            continue
        if not isinstance(link, h5py.HardLink):
            raise ValueError(
                f"{path}: {group.name.rstrip('/')}/{name} is a link to another file, which is not "
                "read."
            )
        if group.get(name, getclass=True) is h5py.Group:
            address = h5py.h5o.get_info(group[name].id).addr
            if address not in seen:  # a group may hold itself
                seen.add(address)
                inside += refuse_links(path, group[name], seen)
    return inside
