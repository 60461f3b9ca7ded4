"""Watches the pair of processes that serves memory, while guests run on it.

Each of the two starts the other again. Only when both are dead does anybody have to act: their
guests are ended, since what they would get for a page that is not there nobody can say.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING

from diapause.driver.process import Pidfd
from diapause.sandbox.rescue import REFUSALS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diapause.catalog import SandboxRecord
    from diapause.driver.base import ProcessRef
    from diapause.model import Stalled
    from diapause.sandbox.host import Host

log = logging.getLogger("diapause.ondemand")
_LOOK_S = 0.5


class PagerWatch:
    """One thread, from the first guest on that is served until the daemon ends."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._guard = threading.Lock()
        self._running = False
        self._stalled: set[str] = set()  # those that were seen to wait at the last look

    def begin(self) -> None:
        """Watch from now on; where it is watched already nothing changes."""
        with self._guard:
            if not self._running:
                self._running = True
                threading.Thread(target=self._watch, name="diapause-pager", daemon=True).start()

    def _watch(self) -> None:
        while not self._host.closed.wait(_LOOK_S):
            try:
                self._look()
            except REFUSALS as error:
                log.warning("the pager could not be looked at: %s", error)
            except Exception:
                log.exception("looking at the pager")

    def _look(self) -> None:
        """A VMM that is killed here is settled by whoever watches its end."""
        host = self._host
        served = list(self._served())
        lost = {record.id for record in host.ondemand.lost([record for record, _ in served])}
        for record, process in served:
            if record.id in lost:
                log.warning("%s: its pager and the keeper have ended: so does its VMM", record.id)
                with contextlib.closing(Pidfd(process)) as vmm:
                    vmm.kill()  # and nothing else: whoever watches it sees its end as any other
            else:
                host.ondemand.traces.settle(record.id, if_due=True)
        self._tell(host.ondemand.stalled() if served else {})

    def _served(self) -> Iterator[tuple[SandboxRecord, ProcessRef]]:
        """The guests that run on the pager's files, with the processes that their rows name."""
        for sandbox, guest in list(self._host.guests.items()):
            record = self._host.catalog.sandbox(sandbox)
            if record is None or record.pager is None or guest.machine is None:
                continue
            process = guest.machine.process
            if record.process is not None and record.process.pid == process.pid:
                yield record, process

    def _tell(self, stalled: dict[str, Stalled]) -> None:
        """An event for each guest that waits for a blob since this look."""
        for sandbox in stalled.keys() - self._stalled:
            why = stalled[sandbox]
            log.warning("%s waits: %s can't be served: %s", sandbox, why.blob, why.cause)
            self._host.event("stalled", sandbox, reason=f"{why.blob}: {why.cause}")
        self._stalled = set(stalled)
