"""What a guest makes a file of ours grow by is bounded: its console, and what its VMM says of it.

The VMM holds each log open for appending, so a full one is copied beside itself and cut. The VMM
is not asked and the guest never waits. What is written between the last read and the cut is lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import TYPE_CHECKING

from diapause.limits import CONSOLE_LOG_BYTES_MAX, CONSOLE_LOOK_S

if TYPE_CHECKING:
    from pathlib import Path

    from diapause.sandbox.host import Host

log = logging.getLogger("diapause.console")
LOGS = ("console.log", "vmm.log")
_COPY_BYTES = 1 << 20


class Rotation:
    """Looks at the logs of all guests as long as the daemon lives; in a thread of its own."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="diapause-console", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._ending.set()
        self._thread.join(CONSOLE_LOOK_S)

    def _run(self) -> None:
        while not self._ending.wait(CONSOLE_LOOK_S):
            for sandbox in list(self._host.guests):
                for name in LOGS:
                    self._look(self._host.home.sandbox(sandbox) / name)

    def _look(self, path: Path) -> None:
        try:
            rotate(path)
        except OSError as error:  # the next look tries again
            log.warning("%s can't be rotated: %s", path, error)


def rotate(path: Path, limit_bytes: int = CONSOLE_LOG_BYTES_MAX) -> bool:
    """Begin a log anew once it has reached the limit, keeping one older one; whether it was done.

    The older one has at most twice the limit. Raises OSError; a disk that is full keeps what was
    kept before, since the bound comes first.
    """
    try:
        if path.stat().st_size < limit_bytes:
            return False
    except FileNotFoundError:
        return False
    fresh = path.with_name(f"{path.name}.new")
    with path.open("rb+", buffering=0) as full:
        try:
            _copy_tail(full.fileno(), fresh, limit_bytes)
            fresh.replace(path.with_name(f"{path.name}.1"))
        except OSError as error:
            log.warning("%s is cut and not kept: %s", path, error)
            with contextlib.suppress(FileNotFoundError):
                fresh.unlink()
        full.truncate(0)
    return True


def _copy_tail(full: int, fresh: Path, limit_bytes: int) -> None:
    # All of it as a rule, so that a reader finds its place; a tail where nobody looked for long.
    size = os.fstat(full).st_size
    offset = 0 if size <= 2 * limit_bytes else size - limit_bytes
    end = offset + 2 * limit_bytes  # a guest that writes faster than this copies
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    copy = os.open(fresh, flags, 0o600)
    try:
        while offset < end:
            want = min(_COPY_BYTES, end - offset)
            count = os.copy_file_range(full, copy, want, offset_src=offset)
            if count == 0:
                return
            offset += count
    finally:
        os.close(copy)
