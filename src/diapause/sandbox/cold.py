"""resume --cold: a sandbox that ended is booted on its own disk.

What its disk is: the overlays that it wrote last, over the disk of its last capture. Where one of
them is damaged or gone, or the snapshot below them is, it is the disk of the last snapshot that is
whole, and the answer says so; damaged overlays are kept beside, as `.damaged`. What can't be looked
at is no damage: the verb fails and nothing is changed.

The row goes on naming its own overlays until the guest is there (`publish`): an attempt that fails
or is killed on a snapshot's disk leaves what the next one has to find, and say, again.

Its memory begins as zeros, so the next capture's memory is not over its parent's (`cold`).
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

from diapause._core import check_overlay
from diapause.errors import BlobDamaged, BlobMissing, SnapshotLost
from diapause.sandbox.capture import new_overlay_name
from diapause.sandbox.recovery import (
    ended_again,
    forget_failures,
    own_overlays_back,
    set_aside,
)
from diapause.sandbox.remove import end_orphan
from diapause.sandbox.resume import empty_disks
from diapause.sandbox.start import Start
from diapause.snapshot.capture import check_structure
from diapause.snapshot.qemu_img import qemu_img
from diapause.store.files import fsync_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diapause.catalog import SandboxRecord, SnapshotRecord
    from diapause.errors import DiapauseError
    from diapause.sandbox.host import Host

_LOST = (BlobDamaged, BlobMissing, SnapshotLost)


class Cold(Start):
    """Boot a stopped or failed sandbox on its disk."""

    name = "cold"
    steps: ClassVar[tuple[str, ...]] = ("disks", "files", "spawn", "thaw", "greet", "publish")

    def __init__(self, host: Host, record: SandboxRecord) -> None:
        super().__init__(host, record)
        self.disk: Literal["own", "snapshot"] = "own"
        self.was = copy.deepcopy(record)
        self.stands_on: str | None = None  # the snapshot, where the disk is not its own
        self.fresh: list[list[str]] = []  # overlays over its disk

    def do_disks(self) -> None:
        """Which disk it is; nothing is changed but what two failed saves left in two overlays."""
        self.record.state, self.record.root = "resuming", None
        self.record.pager, self.record.cold_base = None, None
        self.host.catalog.put_sandbox(self.record)
        end_orphan(self.host, self.sandbox)
        own_overlays_back(self.host, self.record)  # of an attempt that the host did not survive
        damage = self._damage()
        if self.record.snapshot is None:
            if damage is not None:
                raise damage  # nothing was ever captured: there is no other disk
            self.disks = empty_disks(self.host, self.record)
        else:
            self._stand_on_snapshot(damage)
        if self.disk == "own":
            self._fold()

    def _damage(self) -> DiapauseError | None:
        """What is wrong with the overlays, if anything is."""
        if len(self.record.overlays) != len(self.record.disks_bytes):
            return BlobMissing(blob=f"sandboxes/{self.sandbox}/disk0")
        for names, size_bytes in zip(self.record.overlays, self.record.disks_bytes, strict=True):
            for path in map(self.directory.joinpath, names):
                if not path.exists():
                    return BlobMissing(blob=f"sandboxes/{self.sandbox}/{path.name}")
                try:
                    # Its VMM wrote it: nothing opens it before its head was looked at.
                    check_overlay(str(path), size_bytes, folding=True)
                    _stand(path, None)  # of a fold that was killed
                    check_structure(path, size_bytes)
                except BlobDamaged as error:
                    return error
        return None

    def _stand_on_snapshot(self, damage: DiapauseError | None) -> None:
        """The disk of the last capture; where that is lost, of the last one that is whole."""
        for snapshot in self._lineage():
            try:
                if snapshot.state == "failed":
                    cause = (snapshot.error or {}).get("message", "unknown")
                    raise SnapshotLost(snapshot=snapshot.id, cause=cause)
                with self.host.leases.hold(snapshot.id):
                    self.disks = self._disks_of(snapshot)
            except _LOST as error:
                damage = damage or error
                continue
            if damage is not None:
                self._say_fallen_back(snapshot.id, damage)
            return
        assert damage is not None
        raise damage

    def _disks_of(self, snapshot: SnapshotRecord) -> list[Path]:
        """A snapshot's disks, all of them read: damage is found before a guest stands on them."""
        names = [f"disk{i}" for i in range(len(self.record.disks_bytes))]
        if self.ondemand:
            self.host.ondemand.served.verify(snapshot, names)
            self.record.cold_base = snapshot.id  # gc keeps it as long as somebody runs on it
        files = self.files_of(snapshot)
        if not self.ondemand:
            self.record.cold_base = None
        return [files[name] for name in names]

    def _lineage(self) -> Iterator[SnapshotRecord]:
        """The last snapshot and its ancestors."""
        at = self.record.snapshot
        while at is not None and (found := self.host.catalog.snapshot(at)) is not None:
            yield found
            at = found.parent

    def _say_fallen_back(self, snapshot: str, damage: DiapauseError) -> None:
        self.disk, self.stands_on = "snapshot", snapshot
        self.record.root = snapshot  # what a guest is about to use stays
        self.host.catalog.put_sandbox(self.record)
        self.notes.append(
            f"booted on the disk of snapshot {snapshot}: its own is lost. {damage.message}"
        )

    def _fold(self) -> None:
        """One overlay a disk: saves that failed may have left several."""
        for names, base in zip(self.record.overlays, self.disks, strict=True):
            while len(names) > 1:
                chain = [self.directory / name for name in names]
                # Down to the base: a commit copies more than was written, zeros where it has none.
                _stand(chain[0], base, "raw")
                for below, path in pairwise(chain):
                    _stand(path, below)
                qemu_img(chain[-1], "commit", "-q", "-d", "-f", "qcow2", str(chain[-1]))
                names.pop()
                self.host.catalog.put_sandbox(self.record)
                chain[-1].unlink(missing_ok=True)
                for path in chain[:-1]:
                    _stand(path, None)

    def do_files(self) -> None:
        """Empty memory, and its overlays: its own, or fresh ones over a snapshot's disk."""
        forget_failures(self.host, self.record)  # of captures of a process that is gone
        self.memory = self.host.templates.memory(self.record.memory_bytes).flat
        if self.disk == "own":
            return
        self.fresh = [[new_overlay_name(i)] for i in range(len(self.record.disks_bytes))]
        self.make_overlays()

    def overlays(self) -> list[list[str]]:
        """Its own, or the fresh ones that take their place."""
        return self.record.overlays if self.disk == "own" else self.fresh

    def do_publish(self) -> None:
        """The row: running, with a memory of its own; from now on with the disk that it runs on."""
        self.record.cold = True
        if self.disk == "snapshot":
            self._set_own_aside()
            self.record.snapshot, self.record.root = self.stands_on, None
            self.record.overlays = self.fresh
        super().do_publish()

    def _set_own_aside(self) -> None:
        for names in self.record.overlays:
            for path in map(self.directory.joinpath, names):
                if path.exists():
                    path.rename(set_aside(path))
        fsync_path(self.directory)

    def drop_overlays(self) -> None:
        """Its own are the sandbox's disk, whatever became of this attempt."""

    def put_back(self, error: BaseException) -> None:
        """It is stopped or failed as it was, on the overlays that it had."""
        if self.disk == "own":
            self.was.overlays = self.record.overlays  # as far as they were folded
        self.was.root, self.was.pager, self.was.cold_base = self.stands_on, None, None
        ended_again(self.host, self.was)
        self.guest.cut("the sandbox could not be started")


def _stand(overlay: Path, below: Path | None, kind: str = "qcow2") -> None:
    """Say in an overlay's header what is below it: nothing, but while it is folded."""
    on = ["-b", ""] if below is None else ["-F", kind, "-b", str(below)]
    qemu_img(overlay, "rebase", "-u", "-f", "qcow2", *on, str(overlay))
