"""The processes of one home: found by the home's own path, ended one by one by their ids.

A test's home has a path that nothing else has, and every process that belongs to it carries the
path in its arguments or was started with it in its environment. Nothing is ever ended by a
program's name.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diapause.store.home import Home

_EXIT_S = 20.0


def processes_of(home: Home) -> list[int]:
    """The ids of all processes of a home, but never our own."""
    marks = [os.fsencode(path) for path in {home.root, home.sockets, home.buffers}]
    found = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit() or int(directory.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            told = (directory / "cmdline").read_bytes() + (directory / "environ").read_bytes()
            if any(mark in told for mark in marks):
                found.append(int(directory.name))
    return found


def end_processes(home: Home) -> list[int]:
    """Kill what still runs in a home, wait until it is gone, and say what it was."""
    ended: list[int] = []
    deadline = time.monotonic() + _EXIT_S
    # A daemon may start one more VMM while it is being killed: look until there is nothing.
    while alive := [pid for pid in processes_of(home) if _is_alive(pid)]:
        assert time.monotonic() < deadline, f"processes {alive} do not end"
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ended += [pid for pid in alive if pid not in ended]
        time.sleep(0.01)
    return ended


def _is_alive(pid: int) -> bool:
    """A zombie has ended; that its parent has not asked yet is the parent's affair."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
