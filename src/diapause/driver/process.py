"""VMM processes that outlive the daemon: naming, finding, watching and ending them.

A pid alone names nothing after a restart: a process is its pid, its start time and the boot it
belongs to. A pidfd pins it, so that a signal can never reach a successor of the same pid.
"""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

from diapause.driver.base import ProcessRef
from diapause.store.boot import boot_id

_START_TIME_FIELD = 19  # of /proc/PID/stat, counted behind the command's closing bracket


def process_ref(pid: int) -> ProcessRef | None:
    """The process that has this pid now; None where there is none, or only its zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    if fields[0] in "ZX":
        return None
    return ProcessRef(pid=pid, start_ticks=int(fields[_START_TIME_FIELD]), boot_id=boot_id())


def is_alive(process: ProcessRef) -> bool:
    """Whether exactly that process still runs."""
    return process_ref(process.pid) == process


class Pidfd:
    """A handle of one process: signals go to it or to nobody."""

    def __init__(self, process: ProcessRef) -> None:
        self._fd = -1
        try:
            fd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return
        if is_alive(process):  # asked after the open: the descriptor can't be a successor's
            self._fd = fd
        else:
            os.close(fd)

    def alive(self) -> bool:
        """Whether it runs; a process that is gone stays gone."""
        return self._fd >= 0 and not self._ended(0.0)  # kept open: somebody may watch it

    def wait(self, bound_s: float) -> bool:
        """Wait until it has ended; False where the bound came first."""
        ended = self._fd < 0 or self._ended(bound_s)
        if ended:
            self.close()
        return ended

    def _ended(self, bound_s: float) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(bound_s * 1000))

    def kill(self) -> None:
        """SIGKILL; nothing happens where it is gone already."""
        if self._fd >= 0:
            try:
                signal.pidfd_send_signal(self._fd, signal.SIGKILL)
            except ProcessLookupError:
                self.close()

    def fileno(self) -> int:
        """The descriptor, readable when the process has ended; -1 where it is gone."""
        return self._fd

    def close(self) -> None:
        """Let go of the handle."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def find_by_argument(start: str) -> list[ProcessRef]:
    """Every process that has an argument which begins so."""
    wanted, found = start.encode(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        named = any(argument.startswith(wanted) for argument in arguments)
        if named and (process := process_ref(int(entry.name))):
            found.append(process)
    return found
