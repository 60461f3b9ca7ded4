"""run, the first time: boot and keep a ready snapshot. run, later: fork that.

wake     the agent answers, and is told nothing of who it is
keep     a save; whatever becomes of it, the run goes on
greet    now it is told
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from diapause.errors import DiapauseError
from diapause.limits import AGENT_BOOT_S
from diapause.model import CaptureRequest
from diapause.sandbox.pause import Save
from diapause.sandbox.resume import Boot, FromSnapshot

if TYPE_CHECKING:
    from diapause.catalog import SandboxRecord
    from diapause.sandbox.host import Host


class FirstRun(Boot):
    """A boot of which a ready snapshot is kept."""

    name = "first-run"
    steps: ClassVar[tuple[str, ...]] = (
        "files", "spawn", "thaw", "wake", "keep", "greet", "publish",
    )  # fmt: skip

    def __init__(self, host: Host, record: SandboxRecord, ready: str) -> None:
        super().__init__(host, record)
        self.ready = ready
        self.kept: str | None = None

    def do_wake(self) -> None:
        """The agent answers: what a boot takes is over."""
        self.guest.greet(None, AGENT_BOOT_S)

    def do_keep(self) -> None:
        """The ready snapshot; a run is not failed for the want of one."""
        request = CaptureRequest(name=self.ready, durability="process")
        save = Save(self.host, self.record, self.guest, request)
        try:
            save.execute()
        except Exception as error:
            if self.guest.machine is None or not self.guest.machine.alive():
                raise
            self.notes.append(f"no ready snapshot was kept: {error}")
            return
        finally:
            self.record = save.record
        self.kept = save.snapshot
        self.overlays_safe = self.host.aside(self._sync_overlays)  # it writes to the next ones now

    def captures(self) -> int:
        """The one that was kept: its process goes on being tracked from there."""
        return self.record.captures


class WarmRun(FromSnapshot):
    """One new sandbox from a ready snapshot, `creating` already; it answers, or is none."""

    name = "warm-run"

    def _without_agent(self, error: DiapauseError, warm: bool) -> None:
        """A run is ready when its agent has answered; whoever asked boots instead."""
        raise error
