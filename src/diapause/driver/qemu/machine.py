"""One QEMU process with one guest: commands to it, and its end.

The process belongs to nobody's lifetime but its own: it is spawned into its own session and found
again by (pid, start time, boot). Its monitor takes one client at a time; this object is that
client, and connects again after a call that failed in the middle.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Literal

from diapause._core import GuestRam
from diapause.driver.base import FreezePlan, Frozen, ProcessRef, Shape, Status
from diapause.driver.process import Pidfd
from diapause.driver.qemu import frozen
from diapause.driver.qemu.qmp import Qmp, QmpError
from diapause.errors import AgentUnreachable, VmmFailed, VmmTimeout
from diapause.limits import STATE_LOAD_S, VMM_EXIT_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diapause.driver.launch import Child

_STATUS: dict[str, Status] = {
    "running": "running",
    "paused": "paused",
    "prelaunch": "paused",
    "postmigrate": "paused",
    "save-vm": "paused",
    "io-error": "paused",  # the host's disk was full: the request is made again at the next `cont`
    "finish-migrate": "paused",
    "inmigrate": "loading",
    "shutdown": "shutdown",
    "guest-panicked": "panicked",
}


class SocketPaths:
    """Where one machine's sockets lie."""

    def __init__(self, sockets: Path, sandbox: str) -> None:
        self.commands = sockets / f"{sandbox}.qmp"
        self.events = sockets / f"{sandbox}.events"
        self.agent = sockets / f"{sandbox}.agent"
        self.console = sockets / f"{sandbox}.console"

    def all(self) -> tuple[Path, Path, Path, Path]:
        """Every path."""
        return (self.commands, self.events, self.agent, self.console)

    def unlink(self) -> None:
        """Remove them; what is gone stays gone."""
        for path in self.all():
            path.unlink(missing_ok=True)


class QemuMachine:
    """See `driver.base.Machine`."""

    def __init__(
        self, sandbox: str, process: ProcessRef, paths: SocketPaths, memory: Path, shape: Shape
    ) -> None:
        self.sandbox, self.process, self.paths, self.shape = sandbox, process, paths, shape
        self.child: Child | None = None  # only while the daemon that spawned it lives
        self.gone: Callable[[], object] = lambda: None  # what to do when it has been ended
        self._pidfd = Pidfd(process)
        self._lock = threading.RLock()
        self._qmp: Qmp | None = None
        self._ram: GuestRam | None = None
        self._memory = memory

    # -- what it is ------------------------------------------------------------------------------

    @property
    def ram(self) -> GuestRam:
        """Guest RAM, found once in the process."""
        if self._ram is None:
            try:
                self._ram = GuestRam(self.process.pid, str(self._memory), self.shape.memory_bytes)
            except OSError as error:
                raise VmmFailed(
                    sandbox=self.sandbox, step="find guest RAM", cause=str(error)
                ) from error
        return self._ram

    @property
    def tracked(self) -> bool:
        """Whether the tracker registered guest RAM."""
        return self.ram.tracked

    def alive(self) -> bool:
        """Whether the process still is."""
        if self.child is not None:
            self.child.poll()  # reaps it: a zombie is not alive
        return self._pidfd.alive()

    def pidfd(self) -> int:
        """Readable when the process has ended."""
        return self._pidfd.fileno()

    # -- commands --------------------------------------------------------------------------------

    def command(self, name: str, *, fd: int | None = None, **arguments: Any) -> Any:
        """One QMP command, on a connection that is made when there is none."""
        with self._lock:
            if self._qmp is None:
                self._qmp = Qmp(self.sandbox, self.paths.commands)
            try:
                return self._qmp.call(name, fd=fd, **arguments)
            except (VmmTimeout, VmmFailed):
                self._disconnect()
                raise

    def checked(self, name: str, *, fd: int | None = None, **arguments: Any) -> Any:
        """As `command`, with the VMM's refusal as a typed error."""
        try:
            return self.command(name, fd=fd, **arguments)
        except QmpError as error:
            raise VmmFailed(sandbox=self.sandbox, step=name, cause=error.description) from error

    def _disconnect(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

    def status(self) -> Status:
        """What the VMM says of itself."""
        found = self.checked("query-status")["status"]
        return _STATUS.get(found, "other")

    def stop(self) -> None:
        """Stop the vCPUs; drains and flushes the disks; confirmed. Refuses a guest that ended."""
        self.checked("stop")
        if (found := self.status()) != "paused":
            raise VmmFailed(sandbox=self.sandbox, step="stop", cause=f"it is {found}")

    def thaw(self) -> None:
        """Let the vCPUs run."""
        self.checked("cont")

    def load_state(self, state: int) -> None:
        """Load a device state (an open file) into a machine that waits for one; it stands then."""
        os.lseek(state, 0, os.SEEK_SET)
        self.checked("getfd", fd=state, fdname="state")
        self.checked("migrate-incoming", uri="fd:state")
        deadline = time.monotonic() + STATE_LOAD_S
        while (found := self.status()) == "loading":
            if time.monotonic() > deadline:
                raise VmmTimeout(sandbox=self.sandbox, step="load", bound_s=STATE_LOAD_S)
            time.sleep(0.0005)  # loading takes a few ms and has no reply of its own
        if found != "paused":
            raise VmmFailed(sandbox=self.sandbox, step="load", cause=f"it is {found} afterwards")

    # -- capture ---------------------------------------------------------------------------------

    def dirty_estimate(self, rule: Literal["private", "tracked", "compared"]) -> int:
        """Pages that would be captured now; nothing is stopped or re-armed."""
        try:
            return self.ram.estimate(rule)
        except OSError as error:  # of its files in /proc: they go with it
            cause = str(error) if self.alive() else "the VMM has ended"
            raise VmmFailed(sandbox=self.sandbox, step="prepare", cause=cause) from error

    def freeze_and_capture(self, plan: FreezePlan) -> Frozen:
        """The frozen section; see `frozen.py`."""
        with self._lock:
            return frozen.freeze_and_capture(self, plan)

    # -- its ends --------------------------------------------------------------------------------

    def agent_socket(self, bound_s: float) -> socket.socket:
        """A new connection to the agent's port; QEMU takes one at a time."""
        connection = None
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            connection.settimeout(bound_s)
            connection.connect(str(self.paths.agent))
        except OSError as error:
            if connection is not None:
                connection.close()
            raise AgentUnreachable(sandbox=self.sandbox, bound_s=bound_s) from error
        connection.setblocking(False)
        return connection

    def kill(self, bound_s: float = VMM_EXIT_S) -> None:
        """SIGKILL, and wait until the process is gone."""
        self._pidfd.kill()
        if not self._pidfd.wait(bound_s):
            raise VmmTimeout(sandbox=self.sandbox, step="exit", bound_s=bound_s)
        if self.child is not None:
            self.child.poll()
        self.close()
        self.paths.unlink()
        self.gone()

    def close(self) -> None:
        """Let go of our ends; the process goes on."""
        with self._lock:
            self._disconnect()
            self._pidfd.close()
