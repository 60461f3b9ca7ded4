"""rm: end the guest, if there is one, and remove the sandbox's own files.

Snapshots are not the sandbox's: they stay, and can be forked. Their data is removed by `gc` alone.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, ClassVar

from diapause.driver.process import Pidfd
from diapause.driver.qemu.machine import SocketPaths
from diapause.errors import DiapauseError
from diapause.limits import RESCUE_S, VMM_EXIT_S
from diapause.operation import shielded
from diapause.sandbox.verb import Verb
from diapause.store.files import remove_tree

if TYPE_CHECKING:
    from diapause.catalog import SandboxRecord
    from diapause.sandbox.host import Host

log = logging.getLogger("diapause.remove")
_BETWEEN_S = 0.5


class Remove(Verb):
    """Remove one sandbox."""

    name = "rm"
    steps: ClassVar[tuple[str, ...]] = ("mark", "kill", "files", "publish")
    sure_from: ClassVar[str] = "mark"  # what it removed can't be put back

    def __init__(self, host: Host, record: SandboxRecord) -> None:
        super().__init__(host, record.id)
        self.record = record

    def do_mark(self) -> None:
        """The row: from here on there is no way back."""
        self.record.state = "removing"
        self.host.catalog.put_sandbox(self.record)

    def do_kill(self) -> None:
        """End the VMM, known or not."""
        guest = self.host.guests.pop(self.sandbox, None)
        if guest is not None:
            with contextlib.suppress(DiapauseError):
                guest.disarm()
            guest.cut("the sandbox was removed")
            if guest.machine is not None:
                guest.machine.kill()
        if (link := self.host.parked.pop(self.sandbox, None)) is not None:
            self.host.loop.call_soon_threadsafe(link.close, "the sandbox was removed")
        end_orphan(self.host, self.sandbox)
        self.host.ondemand.ended(self.record)

    def do_files(self) -> None:
        """The sandbox's own directory and what it has on tmpfs."""
        remove_tree(self.host.home.sandbox(self.sandbox))
        (self.host.home.buffers / f"{self.sandbox}.unmerged").unlink(missing_ok=True)

    def do_publish(self) -> None:
        """The row: gone. Its name is free."""
        self.record.state, self.record.name = "removed", None
        self.record.process, self.record.root, self.record.cold_base = None, None, None
        self.host.catalog.put_sandbox(self.record)

    def undo(self, step: str, error: BaseException) -> None:
        """There is no way back: what is left is done by whoever settles it."""
        self.left_to_recovery = step != "mark"


def remove_unasked(host: Host, sandbox: str) -> None:
    """Remove a sandbox that nobody was told of; one that is gone, or never was, is as well."""
    with shielded(), host.locks.hold(sandbox), host.reserve.room():
        record = host.catalog.sandbox(sandbox)
        if record is not None and record.state != "removed":
            Remove(host, record).execute()


def remove_later(host: Host, sandbox: str) -> None:
    """Try that again until it is gone, within a bound."""
    deadline = time.monotonic() + RESCUE_S
    while not host.closing and time.monotonic() < deadline:
        try:
            remove_unasked(host, sandbox)
        except Exception as error:
            known = isinstance(error, DiapauseError)
            log.warning("%s is not removed yet: %s", sandbox, error, exc_info=not known)
            time.sleep(_BETWEEN_S)
        else:
            return


def end_orphan(host: Host, sandbox: str) -> None:
    """End a VMM of this sandbox that no row knows, and remove its sockets."""
    process = host.driver.find(sandbox)
    if process is not None:
        pidfd = Pidfd(process)
        pidfd.kill()
        pidfd.wait(VMM_EXIT_S)
        pidfd.close()
    SocketPaths(host.home.sockets, sandbox).unlink()
    host.driver.leaves.remove(sandbox)
