"""resume: the inverse of a pause. fork: a new sandbox from a snapshot. run: one from an image."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diapause.driver.qemu.command import LAYOUT, guest_visible
from diapause.errors import SnapshotIncompatible, SnapshotLost
from diapause.guest.images import find_image
from diapause.sandbox.host import vmm_identity
from diapause.sandbox.ready import is_ready
from diapause.sandbox.start import Start

if TYPE_CHECKING:
    from pathlib import Path

    from diapause.catalog import SandboxRecord, SnapshotRecord
    from diapause.guest.link import Identity
    from diapause.sandbox.host import Host


def check_snapshot(host: Host, snapshot: SnapshotRecord) -> None:
    """Refuse, by name and before anything is spawned, what this host can't resume."""
    if snapshot.state == "failed":
        cause = (snapshot.error or {}).get("message", "unknown")
        raise SnapshotLost(snapshot=snapshot.id, cause=cause)
    if snapshot.layout != LAYOUT:
        raise SnapshotIncompatible(
            snapshot=snapshot.id, part="machine layout", needed=snapshot.layout, found=LAYOUT
        )
    needed = vmm_identity(snapshot.identity)
    host.driver.check(snapshot.id, needed, host.accelerators())
    ours = guest_visible(needed, host.shape(snapshot))
    if ours != snapshot.command_line:
        [theirs, mine] = [" ".join(set(a) - set(b)) for a, b in (
            (snapshot.command_line, ours), (ours, snapshot.command_line),
        )]  # fmt: skip
        raise SnapshotIncompatible(
            snapshot=snapshot.id, part="command line", needed=theirs, found=mine
        )


class FromSnapshot(Start):
    """A start from a snapshot's memory, disks and device state."""

    steps: ClassVar[tuple[str, ...]] = (
        "materialize", "files", "spawn", "load", "thaw", "greet", "publish",
    )  # fmt: skip
    origin: Literal["capture", "local"] = "local"

    def __init__(self, host: Host, record: SandboxRecord, source: SnapshotRecord) -> None:
        super().__init__(host, record, source)
        self.origin = "capture" if source.state == "captured" else "local"
        self.faults_before: dict[str, int] = {}

    def do_materialize(self) -> None:
        """The files that the process maps and its disks stand on: the pager's, or flat ones."""
        assert self.source is not None
        self._enter()
        with self.host.leases.hold(self.source.id):
            self.source = self.host.catalog.snapshot(self.source.id) or self.source
            files = self.files_of(self.source)
            self.memory = files["memory"]
            self.disks = [files[f"disk{i}"] for i in range(len(self.record.disks_bytes))]
            self.state = self.host.flats.device_state(self.source).open("rb")

    def do_spawn(self) -> None:
        """The process; what the pager served of its files before is not its doing."""
        super().do_spawn()
        self.faults_before = self.host.ondemand.faults(self.record)

    def fetched(self) -> dict[str, Any]:
        """What the pager did for this guest until now, as an answer says it."""
        if not self.ondemand or self.source is None:
            return {}
        before = Counter(self.faults_before)
        found: dict[str, Any] = {
            "faults": dict(Counter(self.host.ondemand.faults(self.record)) - before)
        }
        used = self.host.ondemand.traces.used(self.sandbox, self.source.id)
        if used is not None and not used["late"]:  # else nobody knows
            found["prefetched_pages"] = used["prefetched_pages"]
            found["used_pages"] = used["used_pages"]
        return found

    def _enter(self) -> None:
        assert self.source is not None
        self.record.root, self.record.cold = self.source.id, False
        self.record.snapshot = self.source.id
        self.record.identity = self.source.identity
        self.record.pager, self.record.cold_base = None, None
        self.host.catalog.put_sandbox(self.record)


class Resume(FromSnapshot):
    """Bring a paused sandbox back."""

    name = "resume"

    def _enter(self) -> None:
        self.record.state = "resuming"
        super()._enter()

    def identity(self) -> Identity | None:
        """It kept its name; but one that was restored may be another's past."""
        assert self.source is not None
        own = self.source.machine_id == self.record.machine_id and not is_ready(self.source)
        return None if own else super().identity()

    def put_back(self, error: BaseException) -> None:
        """It is paused as it was; its sessions go on waiting."""
        self.record.state = self.before
        self.host.parked[self.record.id] = self.guest.link
        self.host.catalog.put_sandbox(self.record)


class Fork(FromSnapshot):
    """One new sandbox from a snapshot; the row is there already, `creating`."""

    name = "fork"


class Boot(Start):
    """One new sandbox from an image."""

    name = "run"
    steps: ClassVar[tuple[str, ...]] = ("files", "spawn", "thaw", "greet", "publish")

    def do_files(self) -> None:
        """Empty memory, an empty disk."""
        self.memory = self.host.templates.memory(self.record.memory_bytes).flat
        self.disks = empty_disks(self.host, self.record)
        super().do_files()


def empty_disks(host: Host, record: SandboxRecord) -> list[Path]:
    """What is below the overlays of a sandbox that was never captured."""
    digest = record.root_disk
    if digest is None:
        return [host.templates.disk(size).flat for size in record.disks_bytes]
    image = find_image(host.home, record.image)
    # An image of that name may have been built anew: its disk is another one.
    source = image.root_disk if image.root_disk_digest == digest else None
    return [host.templates.root_disk(digest, size, source).flat for size in record.disks_bytes]
