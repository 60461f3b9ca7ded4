"""A user for each VMM: a number out of a range that names nobody else on the host.

Two VMMs that run never share one, whichever homes they belong to. A number is taken while two
things hold: its byte in a lock file of the host is ours, and no process has it. The lock is let go
when the VMM has the number, or has failed: from then on the process itself says that it is taken.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from diapause.errors import ConfinementFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

UID_FIRST, UID_COUNT = 1_900_000_000, 65_536
LOCK_FILE = Path("/run/diapause-uids.lock")


@contextlib.contextmanager
def own_uid(sandbox: str, lock_file: Path = LOCK_FILE) -> Iterator[int]:
    """A number for this sandbox's VMM that nothing has until it does; raises ConfinementFailed."""
    try:
        fd = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfinementFailed(sandbox=sandbox, stage="uid", cause=str(error)) from error
    try:
        yield _take(fd, sandbox)
    finally:
        os.close(fd)  # the lock belongs to this open file alone, and goes with it


def _take(fd: int, sandbox: str) -> int:
    first = int(sandbox[:8], 16) if _is_hex(sandbox[:8]) else 0
    for number in range(UID_COUNT):
        offset = (first + number) % UID_COUNT
        if _lock(fd, offset) and is_free(UID_FIRST + offset):
            return UID_FIRST + offset
    raise ConfinementFailed(sandbox=sandbox, stage="uid", cause="every number is taken")


def is_free(uid: int) -> bool:
    """Whether no process on this host has the number as its user."""
    try:
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return True
    return False


def _lock(fd: int, offset: int) -> bool:
    whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, whole)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_hex(text: str) -> bool:
    return len(text) == 8 and all(letter in "0123456789abcdef" for letter in text)
