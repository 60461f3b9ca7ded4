"""Capturing a sandbox: what pause and save have in common.

    prepare   buffer, mark, next overlays; nothing is stopped
    freeze    the frozen section, one step: the VMM driver does all of it
    keep      files under captures/ID, as durable as was asked
    commit    the snapshot's row; from here on the capture is whole

A capture that fails before `commit` leaves nothing but what the next one must add: the pages that
were re-armed away (BUFFERS/SANDBOX.unmerged) and the overlays that were switched (the row's
`overlays`).

The mark (sandboxes/ID/capture.mark) stands from before the freeze until a commit, or until a
failure that made nobody forget anything. Whoever finds it takes the unmerged list, or a dead
daemon's sealed buffer as one; where there is none (a tmpfs may lose it), it can't know what was
forgotten, and compares all of RAM.
"""

from __future__ import annotations

import secrets
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

import msgspec

from diapause import _core
from diapause.catalog import DeviceRecord, SnapshotRecord, now
from diapause.driver.base import FreezePlan
from diapause.driver.qemu.command import LAYOUT, guest_visible
from diapause.driver.qemu.frozen import FrozenSectionFailed
from diapause.driver.qemu.state import finish_state
from diapause.errors import CaptureFailed, DiapauseError, NotEnoughSpace, NotSupportedYet
from diapause.limits import (
    CAPTURE_BUFFER_BYTES_MAX,
    CAPTURE_BUFFER_BYTES_MIN,
    DEVICE_STATE_BYTES_MAX,
    GUEST_FREEZE_S,
    PACK_S,
)
from diapause.model import CaptureAnswer
from diapause.operation import shielded, wait_for
from diapause.sandbox.host import vmm_identity
from diapause.sandbox.losses import lost_below
from diapause.sandbox.rescue import thaw_if_it_stands, thaw_when_it_answers
from diapause.sandbox.verb import Verb, new_id
from diapause.snapshot.capture import CaptureFiles
from diapause.snapshot.manifest import manifest_bytes
from diapause.store.boot import boot_id
from diapause.store.files import (
    free_bytes,
    fsync_path,
    is_ours,
    remove_tree,
    storage_errors,
    write_file,
)
from diapause.units import PAGE_SIZE, pages

if TYPE_CHECKING:
    from diapause.catalog import SandboxRecord
    from diapause.driver.base import Frozen
    from diapause.model import CaptureRequest
    from diapause.sandbox.guests import Guest
    from diapause.sandbox.host import Host

# Between the estimate and the freeze the guest goes on writing.
_ESTIMATE_SLACK_PAGES = 1024
_STATE_BYTES_GUESS = 256 * 1024


class Capture(Verb):
    """A pause or a save; the subclasses say what comes before and after."""

    steps: ClassVar[tuple[str, ...]] = ("prepare", "freeze", "keep", "commit")
    sure_from: ClassVar[str] = "commit"
    goes_on: ClassVar[bool]

    def __init__(
        self, host: Host, record: SandboxRecord, guest: Guest, request: CaptureRequest
    ) -> None:
        super().__init__(host, record.id, new_id())
        if request.durability == "store":
            raise NotSupportedYet(what="Durability `store`")
        assert guest.machine is not None and self.snapshot is not None
        self.record, self.guest, self.request = record, guest, request
        self.machine = guest.machine
        self.files = CaptureFiles(host.home, self.snapshot)
        self.directory = host.home.sandbox(record.id)
        self.mark = self.directory / "capture.mark"
        self.unmerged = host.home.buffers / f"{record.id}.unmerged"
        self.notes: list[str] = []
        self.next_overlays: list[str] = []
        self.frozen: Frozen
        self.rule = self._rule()
        self.buffer: _core.CaptureBuffer | None = None
        self.quiesced = self.committed = False

    # -- the dirty set ---------------------------------------------------------------------------

    def _rule(self) -> _core.DirtyRule:
        """How the dirty set is known, for this process as it is."""
        if self.mark.exists() and not self.unmerged.exists():
            return "compared"
        if self.record.captures == 0 and not self.unmerged.exists():
            return "private"
        return "tracked" if self.machine.tracked else "compared"

    def _unmerged_runs(self) -> list[tuple[int, int]]:
        if not self.unmerged.exists():
            return []
        return _core.PageSource.capture(str(self.unmerged)).runs()

    # -- the steps -------------------------------------------------------------------------------

    def do_prepare(self) -> None:
        """Everything that can be done while the guest runs."""
        if self.request.durability == "disk":
            self._keep_parent()  # now: packing may take longer than a guest should stand
        if cause := lost_below(self.host, self.record.snapshot):
            raise CaptureFailed(
                sandbox=self.sandbox, step="prepare", guest="goes on",
                cause=f"it would stand on what is lost: {cause}",
            )  # fmt: skip
        estimate = self.machine.dirty_estimate(self.rule)
        self._need_space(estimate)
        self._prepare_overlays()
        with storage_errors("the capture", self.host.home.root):
            self.files.directory.mkdir(mode=0o700)
            # A system may clear its tmpfs when a user logs out, and what is below with it.
            self.host.home.buffers.mkdir(mode=0o700, exist_ok=True)
            if not is_ours(self.host.home.buffers):
                raise PermissionError(f"{self.host.home.buffers} is not this user's alone")
            write_file(self.files.raw_state, b"", sync=False, mode=0o600)
            self.buffer = self._make_buffer(estimate)
            if not self.mark.exists():
                write_file(self.mark, (self.snapshot or "").encode(), sync=False, mode=0o600)
        if self.request.quiesce:
            with shielded():  # bounded, and what it froze it must thaw
                self._quiesce()

    def _need_space(self, estimate: int) -> None:
        """Refuse before anything stops what can't be kept afterwards."""
        root = self.host.home.root
        needed = (estimate + _ESTIMATE_SLACK_PAGES) * PAGE_SIZE + _STATE_BYTES_GUESS
        if (available := free_bytes(root)) < needed:
            raise NotEnoughSpace(
                what=f"The {self.name} of {self.record.id}", needed_bytes=needed,
                directory=str(root), available_bytes=available,
            )  # fmt: skip

    def _prepare_overlays(self) -> None:
        """Overlays for a guest that goes on; recorded first, so that recovery knows them."""
        if not self.goes_on:
            return
        for index, size in enumerate(self.record.disks_bytes):
            name = new_overlay_name(index)
            self.next_overlays.append(name)
            self.host.templates.overlay(size, self.directory / name)

    def _make_buffer(self, estimate: int) -> _core.CaptureBuffer:
        """Room for what is expected, as far as the limit and the tmpfs go; the rest spills."""
        device_pages = pages(self.record.memory_bytes)
        wanted = (estimate + estimate // 4 + _ESTIMATE_SLACK_PAGES) * PAGE_SIZE
        room = free_bytes(self.host.home.buffers) // 2
        size = max(min(wanted, CAPTURE_BUFFER_BYTES_MAX, room), CAPTURE_BUFFER_BYTES_MIN)
        with storage_errors("the capture buffer", self.host.home.buffers, size):
            return _core.CaptureBuffer(str(self.files.buffer), size // PAGE_SIZE, device_pages)

    def _quiesce(self) -> None:
        if self.record.frozen:
            self.notes.append("not quiesced: the guest is frozen")
            return
        try:
            self.guest.freeze_filesystems(GUEST_FREEZE_S)
            self.quiesced = True
        except DiapauseError as error:
            self.notes.append(f"not quiesced: {error.message}")
            self._thaw_filesystems()  # some may have been frozen before one refused

    def _thaw_filesystems(self) -> None:
        """The agent thaws them by itself after some seconds; a capture never fails for it."""
        try:
            self.guest.thaw_filesystems(GUEST_FREEZE_S)
        except DiapauseError as error:
            self.notes.append(f"file systems are thawed late: {error.message}")

    def do_freeze(self) -> None:
        """The frozen section; one that began runs to its end, and a cancel is seen after it."""
        with shielded():
            self._freeze()

    def _freeze(self) -> None:
        assert self.buffer is not None
        plan = FreezePlan(
            state=self.files.raw_state,
            buffer=self.buffer,
            rule=self.rule,
            unmerged=self._unmerged_runs(),
            spill=self.files.memory,
            overlays=tuple(self.directory / name for name in chain(*self.record.overlays)),
            next_overlays=tuple(self.directory / name for name in self.next_overlays),
            goes_on=self.goes_on,
            stands=self.record.frozen,
        )
        try:
            self.frozen = self.machine.freeze_and_capture(plan)
        except FrozenSectionFailed as failed:
            self.frozen = failed.frozen
            self._switched(failed.frozen.switched)
            if not failed.thawed:
                failed.error.fields["guest"] = "could not be thawed"
            raise failed.error from failed
        finally:
            self.buffer = None
            if self.quiesced and self.goes_on:
                self._thaw_filesystems()
        self._switched(self.frozen.switched)
        self.phases_ms |= {name: round(ms, 3) for name, ms in self.frozen.phases_ms.items()}

    def _switched(self, switched: bool) -> None:
        """Record which overlays the disks write to now."""
        if switched:
            for names, fresh in zip(self.record.overlays, self.next_overlays, strict=True):
                names.append(fresh)
            self.host.catalog.put_sandbox(self.record)

    def do_keep(self) -> None:
        """Make the capture as durable as was asked."""
        sync = self.request.durability == "disk"
        with storage_errors("the capture", self.host.home.root, self._captured_bytes()):
            self._keep_state(sync)
            self._keep_disks(sync)
            if sync:
                _core.write_out(str(self.files.buffer), str(self.files.memory))
            self.snapshot_record = self._snapshot_record()
            write_file(self.files.manifest, manifest_bytes(self.snapshot_record), sync=sync)
            if sync:
                fsync_path(self.files.directory)
                fsync_path(self.files.directory.parent)
                self._sync_overlays()

    def _sync_overlays(self) -> None:
        """What the guest syncs from now on reaches the next overlays: their names must be there."""
        for name in self.next_overlays:
            fsync_path(self.directory / name)
        fsync_path(self.directory)

    def _keep_parent(self) -> None:
        """What this capture is over has to be on the disk as well: a fork's save may not be yet."""
        parent = self._unsynced_parent()
        if parent is None:
            return
        packing = self.host.behind(f"pack {parent}", lambda: self.host.packer.pack(parent))
        wait_for(packing, PACK_S)
        if self._unsynced_parent() is not None:
            raise CaptureFailed(
                sandbox=self.sandbox, step="prepare", guest=self._guest_does,
                cause=f"its parent, snapshot {parent}, could not be brought to the disk",
            )  # fmt: skip

    @property
    def _guest_does(self) -> str:
        return "stays frozen" if self.record.frozen else "goes on"

    def _unsynced_parent(self) -> str | None:
        parent = self.host.catalog.snapshot(self.record.snapshot) if self.record.snapshot else None
        if parent is None or parent.state != "captured" or parent.durability != "process":
            return None
        return parent.id

    def _captured_bytes(self) -> int:
        return self.frozen.page_count * PAGE_SIZE

    def _keep_state(self, sync: bool) -> None:
        raw = self.files.raw_state
        if raw.stat().st_size > DEVICE_STATE_BYTES_MAX:
            raise CaptureFailed(
                sandbox=self.sandbox,
                step="state",
                cause="the device state is too large",
                guest=self._guest_does,
            )
        assert self.record.identity is not None
        state = finish_state(self.sandbox, raw.read_bytes(), self.record.identity.machine)
        write_file(self.files.state, state, sync=sync)
        self.state_bytes, self.state_digest = len(state), _core.blake3_bytes(state)

    def _keep_disks(self, sync: bool) -> None:
        """Link the frozen overlays; a pause's are frozen because its VMM stands."""
        for index, names in enumerate(self.record.overlays):
            frozen = names[:-1] if self.goes_on else names
            for layer, name in enumerate(frozen):
                place = self.files.overlay(f"disk{index}", layer)
                place.hardlink_to(self.directory / name)
                if sync:
                    fsync_path(place)

    def _snapshot_record(self) -> SnapshotRecord:
        record, snapshot = self.record, self.snapshot
        assert record.identity is not None and snapshot is not None
        return SnapshotRecord(
            id=snapshot, name=self.request.name, sandbox=record.id, parent=record.snapshot,
            state="captured", durability=self.request.durability, created_at=now(),
            boot_id=boot_id(), image=record.image, identity=record.identity, layout=LAYOUT,
            command_line=guest_visible(vmm_identity(record.identity), self.host.shape(record)),
            memory_bytes=record.memory_bytes, cpus=record.cpus, disks_bytes=record.disks_bytes,
            hostname=record.hostname, machine_id=record.machine_id, agent=record.agent,
            dirty_source=self.rule, dirty_pages=self.frozen.page_count,
            frozen_ms=round(self.frozen.frozen_ms, 3), state_bytes=self.state_bytes,
            state_digest=self.state_digest, devices=self._devices(), net=record.net,
            cold=record.cold,
            root_disk=record.root_disk,
        )  # fmt: skip

    def _devices(self) -> list[DeviceRecord]:
        memory = DeviceRecord(
            name="memory", size_bytes=self.record.memory_bytes, header_digest="", header_bytes=0,
            captured_pages=self.frozen.page_count,
        )  # fmt: skip
        disks = [
            DeviceRecord(
                name=f"disk{index}", size_bytes=size, header_digest="", header_bytes=0,
                captured_pages=0,
            )
            for index, size in enumerate(self.record.disks_bytes)
        ]  # fmt: skip
        return [memory, *disks]

    def do_commit(self) -> None:
        """The row: from here on the capture is whole."""
        before = self.record
        after = msgspec.structs.replace(
            before, snapshot=self.snapshot, captures=before.captures + 1, cold=False,
            overlays=[names[-1:] if self.goes_on else names for names in before.overlays],
        )  # fmt: skip
        durable = self.request.durability != "process"
        self.host.catalog.put_snapshot(self.snapshot_record, durable=durable, sandbox=after)
        self.record, self.committed = after, True
        self.host.metrics.captured(self.name, self.frozen.frozen_ms, self._captured_bytes())
        # Only now: until the row is there, these files are all that is left of what was switched.
        if self.goes_on:
            for names in before.overlays:
                self._drop_overlays(names[:-1])
        self.mark.unlink(missing_ok=True)
        self.unmerged.unlink(missing_ok=True)
        self.files.raw_state.unlink(missing_ok=True)
        if durable:
            self.files.buffer.unlink(missing_ok=True)

    def _drop_overlays(self, names: list[str]) -> None:
        """The VMM holds them open and the capture has a link of its own."""
        for name in names:
            (self.directory / name).unlink(missing_ok=True)

    # -- failure ---------------------------------------------------------------------------------

    def undo(self, step: str, error: BaseException) -> None:
        """Nothing stays of a failed capture but what the next one must add; the guest goes on."""
        if self.committed:
            return
        self.buffer = None
        self._let_go_on()
        frozen = getattr(self, "frozen", None)
        forgotten = frozen is not None and frozen.rearmed
        in_buffer = frozen is not None and not frozen.spilled_pages
        if forgotten and in_buffer:
            self.files.buffer.rename(self.unmerged)
        elif forgotten:  # an older list alone would say too little: by the mark, all is compared
            self.unmerged.unlink(missing_ok=True)
        self.files.buffer.unlink(missing_ok=True)
        self.files.raw_state.unlink(missing_ok=True)
        remove_tree(self.files.directory)
        for index, name in enumerate(self.next_overlays):
            if name not in self.record.overlays[index]:
                (self.directory / name).unlink(missing_ok=True)
        if not forgotten and not self._marked_by_another():
            self.mark.unlink(missing_ok=True)
        if frozen is not None and frozen.switched:  # again: it may have failed for want of space
            self.host.catalog.put_sandbox(self.record)

    def _let_go_on(self) -> None:
        try:
            if not self.record.frozen:
                thaw_if_it_stands(self.machine)
        except DiapauseError:
            self.host.watch(lambda: thaw_when_it_answers(self.host, self.sandbox))
        if self.quiesced and not self.goes_on:
            self._thaw_filesystems()

    def _marked_by_another(self) -> bool:
        return self.mark.exists() and self.mark.read_text() != self.snapshot

    # -- the answer ------------------------------------------------------------------------------

    def answer(self) -> CaptureAnswer:
        """What the verb says it did."""
        assert self.snapshot is not None
        disks = list(self.files.directory.glob("disk*.qcow2"))
        return CaptureAnswer(
            sandbox=self.sandbox, snapshot=self.snapshot, durability=self.request.durability,
            frozen_ms=round(self.frozen.frozen_ms, 3), dirty_pages=self.frozen.page_count,
            dirty_source=self.rule,
            captured_bytes=self._captured_bytes() + sum(p.stat().st_blocks * 512 for p in disks),
            phases_ms={**self.phases_ms, "total": self.elapsed_ms}, notes=self.notes,
        )  # fmt: skip


def new_overlay_name(index: int) -> str:
    """A file name for an overlay; its middle part names the VMM's block node and descriptor set."""
    return f"disk{index}.{secrets.randbits(28):07x}.qcow2"
