"""Writing files so that they are whole or absent, and errors of the file system as typed ones."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from diapause.errors import (
    BlobDamaged,
    BlobMissing,
    HostExhausted,
    NotEnoughSpace,
    StorageFailed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def storage_errors(what: str, directory: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn an OSError of the block into NotEnoughSpace or StorageFailed."""
    try:
        yield
    except OSError as error:
        raise storage_error(what, directory, error, needed_bytes) from error


def storage_error(
    what: str, directory: Path, error: OSError, needed_bytes: int = 0
) -> NotEnoughSpace | StorageFailed:
    """What an error of the file system is called."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NotEnoughSpace(
            what=what,
            needed_bytes=needed_bytes or "more",
            directory=str(directory),
            available_bytes=free_bytes(directory),
        )
    return StorageFailed(what=what, cause=str(error))


def unexpected_storage_error(
    what: str, directory: Path, error: BaseException
) -> NotEnoughSpace | StorageFailed | HostExhausted | None:
    """The same for what nobody was ready for: any open may fail, and any start of a thread. None
    where it is no such error.

    A connection that ended and a wait that took too long are errors of the system too, and no
    word of its files.
    """
    import sqlite3  # here: every run of the command line imports this module

    from diapause import database

    if isinstance(error, sqlite3.Error):
        return database.storage_error(directory / "catalog", error)
    if no_thread(error):
        return HostExhausted(what=what)
    if not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError):
        return None
    return storage_error(what, directory, error) if error.errno is not None else None


def no_thread(error: BaseException) -> bool:
    """Whether a thread could not be started; Python has no class of its own for that."""
    return isinstance(error, RuntimeError) and str(error) == "can't start new thread"


def is_ours(directory: Path, closed: int = 0o077) -> bool:
    """Whether it is a directory, no link to one, of this user, with none of these mode bits."""
    status = directory.lstat()
    mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return mine and not status.st_mode & closed


def free_bytes(directory: Path) -> int:
    """What the file system of `directory` has left; 0 where it can't be asked."""
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return 0


def fsync_path(path: Path) -> None:
    """Bring a file or a directory to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes, *, sync: bool, mode: int = 0o400) -> None:
    """Make a new file with these bytes; it must not exist."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes, tmp: Path, *, sync: bool) -> None:
    """Write a file whole beside its place, then rename it there."""
    fresh = tmp / f"{path.parent.name}-{path.name}-{os.getpid()}-{os.urandom(4).hex()}"
    write_file(fresh, data, sync=sync, mode=0o600)
    fresh.rename(path)
    if sync:
        fsync_path(path.parent)


def read_file(path: Path, blob: str, bytes_max: int) -> bytes:
    """Read a file of ours whole; BlobMissing, or BlobDamaged where it is larger than can be."""
    try:
        size = path.stat().st_size
        if size > bytes_max:
            raise BlobDamaged(blob=blob, cause=f"{size} bytes are more than {bytes_max}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BlobMissing(blob=blob) from error


def remove_tree(path: Path) -> None:
    """Remove a directory of ours and what is in it, or a file; what is gone stays gone.

    It follows no link and enters no mount, also where a directory is exchanged meanwhile: raises
    StorageFailed where one is in the way, with the names beside it removed or not.
    """
    try:
        is_directory = stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_directory:
        path.unlink(missing_ok=True)
        return
    mounts = _mounts()
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            _remove_directory(parent, path.name, path.parent.resolve() / path.name, mounts)
    finally:
        os.close(parent)


def _remove_directory(parent: int, name: str, path: Path, mounts: frozenset[str]) -> None:
    if str(path) in mounts:
        raise StorageFailed(what=str(path), cause="a file system is mounted there; unmount it")
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=parent)
    try:
        if not os.fstat(fd).st_mode & stat.S_IWUSR:
            os.fchmod(fd, 0o700)  # what is read-only once built
        with os.scandir(fd) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for inner, is_directory in found:
            with contextlib.suppress(FileNotFoundError):
                if is_directory:
                    _remove_directory(fd, inner, path / inner, mounts)
                else:
                    os.unlink(inner, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)


def _mounts() -> frozenset[str]:
    """Where something is mounted, as this process sees it; a mount of the same file system too."""
    with Path("/proc/self/mountinfo").open() as info:
        fields = [line.split(" ", 5)[4] for line in info]
    return frozenset(
        re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field) for field in fields
    )


def allocated_bytes(path: Path, seen: set[int] | None = None) -> int:
    """What a file or a directory takes on the disk; inodes of `seen` count once. Links are not
    followed, and what goes meanwhile counts nothing."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return 0
    if stat.S_ISDIR(found.st_mode):
        inner = sum(allocated_bytes(path / name, seen) for name in _names_in(path))
        return inner + found.st_blocks * 512
    if seen is not None and found.st_nlink > 1:
        if found.st_ino in seen:
            return 0
        seen.add(found.st_ino)
    return found.st_blocks * 512


def _names_in(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.iterdir()]
    except FileNotFoundError:
        return []
