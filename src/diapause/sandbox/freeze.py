"""freeze: the vCPUs stop and the memory stays where it is. thaw: they run again.

freeze: stop     the vCPUs stand, block I/O is drained; sessions wait
        publish  the row: frozen, which is what keeps it so under the next daemon
thaw:   publish  the row: running; from here on whoever finds it standing lets it go on
        thaw     the vCPUs run
        greet    the agent: the clock, which stood as well; sessions go on
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, ClassVar

from diapause.errors import AgentRefused, AgentUnreachable, DiapauseError, ExecCut
from diapause.limits import AGENT_READY_S
from diapause.sandbox.rescue import thaw_if_it_stands, thaw_when_it_answers
from diapause.sandbox.verb import Verb

if TYPE_CHECKING:
    from diapause.catalog import SandboxRecord
    from diapause.sandbox.guests import Guest
    from diapause.sandbox.host import Host


class _Standing(Verb):
    def __init__(self, host: Host, record: SandboxRecord, guest: Guest) -> None:
        super().__init__(host, record.id)
        assert guest.machine is not None
        self.record, self.guest, self.machine = record, guest, guest.machine
        self.notes: list[str] = []

    def _put(self, *, frozen: bool) -> None:
        self.record.frozen = frozen
        self.record.state = "frozen" if frozen else "running"
        self.host.catalog.put_sandbox(self.record)


class Freeze(_Standing):
    """The vCPUs of a running guest stand."""

    name = "freeze"
    steps: ClassVar[tuple[str, ...]] = ("stop", "publish")

    def do_stop(self) -> None:
        """Stop, confirmed. The link is let go of: a silent agent is no dead one.

        Before it stands: a port that closes under a guest that stands is news that it gets together
        with the next connection, and under TCG on a busy host its kernel was then seen to sit on
        both for minutes (reads went on, every write of the agent waited).
        """
        self.guest.detach()
        self.machine.stop()

    def do_publish(self) -> None:
        """The row: frozen."""
        self._put(frozen=True)

    def undo(self, step: str, error: BaseException) -> None:
        """It goes on."""
        self.record.frozen = False
        try:
            thaw_if_it_stands(self.machine)
        except DiapauseError:
            self.host.watch(lambda: thaw_when_it_answers(self.host, self.sandbox))
        self.host.watch(self._reconnect)

    def _reconnect(self) -> None:
        with contextlib.suppress(DiapauseError):  # whoever needs the agent next asks again
            self.guest.reconnect(AGENT_READY_S)


class Thaw(_Standing):
    """The vCPUs of a frozen guest run again."""

    name = "thaw"
    steps: ClassVar[tuple[str, ...]] = ("publish", "thaw", "greet")

    def do_publish(self) -> None:
        """The row: running."""
        self._put(frozen=False)

    def do_thaw(self) -> None:
        """The vCPUs run."""
        self.machine.thaw()

    def do_greet(self) -> None:
        """The clock and the random pool; a guest whose agent is silent goes on, and it is said."""
        if not self.record.agent:
            self.notes.append("no agent: the clock is as it was when the guest was frozen")
            return
        try:
            welcome = self.guest.greet(None, AGENT_READY_S)
            self.notes += [f"the guest did not take its {cause}" for cause in welcome.failed]
        except (AgentUnreachable, AgentRefused, ExecCut) as error:
            if not self.machine.alive():
                raise
            text = "The clock is as it was when the guest was frozen."
            self.notes.append(f"{error.message} {text}")

    def undo(self, step: str, error: BaseException) -> None:
        """Frozen as it was, unless it runs already."""
        if step != "greet":
            self._put(frozen=True)
