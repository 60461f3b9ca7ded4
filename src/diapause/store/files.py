"""Writing files so that they are whole or absent, and errors of the file system as typed ones."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diapause import database
from diapause.errors import BlobDamaged, BlobMissing, NotEnoughSpace, StorageFailed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
) -> NotEnoughSpace | StorageFailed | None:
    """The same for what nobody was ready for: any open may fail. None where it is no such error.

    A connection that ended and a wait that took too long are errors of the system too, and no
    word of its files.
    """
    if isinstance(error, sqlite3.Error):
        return database.storage_error(directory / "catalog", error)
    if not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError):
        return None
    return storage_error(what, directory, error) if error.errno is not None else None


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
    """Remove a directory of ours and what is in it; what is gone stays gone."""
    if path.exists():
        shutil.rmtree(path)
