"""Starting a machine: what run, resume and fork have in common.

    files    overlays for its disks
    spawn    the VMM process, recorded before anything else happens to it
    load     the device state (not for a boot)
    thaw     the vCPUs run
    greet    the agent: clock, entropy, identity, readiness in one exchange
    publish  the row: running

A start that fails leaves no process and no file; the row goes back to where it was.
"""

from __future__ import annotations

import contextlib
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, ClassVar

from diapause.catalog import Process
from diapause.driver.base import BootFiles, DiskFiles, StartPlan
from diapause.errors import (
    AgentRefused,
    AgentUnreachable,
    BlobDamaged,
    DiapauseError,
    ExecCut,
    PagerUnavailable,
    VmmFailed,
    VmmTimeout,
)
from diapause.guest.images import find_image
from diapause.guest.link import Identity
from diapause.limits import AGENT_BOOT_S, AGENT_READY_S
from diapause.sandbox.capture import new_overlay_name
from diapause.sandbox.guests import Guest
from diapause.sandbox.host import vmm_identity
from diapause.sandbox.network import forwards_of
from diapause.sandbox.remove import end_orphan
from diapause.sandbox.verb import Verb
from diapause.store.files import fsync_path, remove_tree

if TYPE_CHECKING:
    from concurrent.futures import Future

    from diapause.catalog import SandboxRecord, SnapshotRecord
    from diapause.driver.qemu.machine import QemuMachine
    from diapause.sandbox.host import Host

# What a VMM that ends under a verb looks like to whoever waits for its guest.
_UNANSWERED = (VmmTimeout, AgentUnreachable, ExecCut)


class Start(Verb):
    """A verb that ends with a running guest."""

    steps: ClassVar[tuple[str, ...]] = ("files", "spawn", "load", "thaw", "greet", "publish")
    sure_from: ClassVar[str] = "publish"

    def __init__(
        self, host: Host, record: SandboxRecord, source: SnapshotRecord | None = None
    ) -> None:
        super().__init__(host, record.id, source.id if source else None)
        self.record, self.source = record, source
        self.before = record.state
        self.directory = host.home.sandbox(record.id)
        self.guest = Guest(record.id, host.loop, host.parked.get(record.id))
        self.memory: Path
        self.disks: list[Path]  # the read-only files below the overlays
        self.state: BinaryIO | None = None  # open: packing may remove its file meanwhile
        self.notes: list[str] = []
        self.ondemand = host.ondemand.wanted(None)
        self.overlays_safe: Future[None] | None = None

    def files_of(self, source: SnapshotRecord) -> dict[str, Path]:
        """A snapshot's devices as files: the pager's, or flat ones where it can't be had.

        Whoever asks holds a lease of the snapshot.
        """
        if self.ondemand:
            try:
                self.host.flats.verify_small(source)
                return self.host.ondemand.serve(self.record, source)
            except PagerUnavailable as error:
                self.ondemand = False
                self.notes.append(f"{error.message} It was copied.")
        return self.host.flats.ensure(source).files

    # -- the steps -------------------------------------------------------------------------------

    def do_files(self) -> None:
        """A fresh overlay for each disk, recorded before it is there."""
        record = self.record
        record.overlays = [[new_overlay_name(i)] for i in range(len(record.disks_bytes))]
        self.host.catalog.put_sandbox(record)
        self.make_overlays()

    def overlays(self) -> list[list[str]]:
        """The file names that its disks write to, one for each."""
        return self.record.overlays

    def make_overlays(self) -> None:
        """Make them, empty."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        for [name], size in zip(self.overlays(), self.record.disks_bytes, strict=True):
            self.host.templates.overlay(size, self.directory / name)
        # A guest's fsync reaches its overlay; the overlay's name must be on the disk as well.
        self.overlays_safe = self.host.aside(self._sync_overlays)

    def _sync_overlays(self) -> None:
        for name in chain(*self.overlays()):
            fsync_path(self.directory / name)
        fsync_path(self.directory)
        fsync_path(self.directory.parent)  # of a new sandbox the directory is new as well

    def do_spawn(self) -> None:
        """The process; the row names it before it is given anything, and the pager knows whose
        accesses it answers before the guest runs."""
        machine = self.host.driver.start(self._plan())
        self.guest.machine = machine
        process = machine.process
        self.record.process = Process(process.pid, process.start_ticks, process.boot_id)
        self.host.catalog.put_sandbox(self.record)
        if self.record.pager is not None:
            self.host.ondemand.attach(self.record, self.source, process)
            self.host.pager_watch.begin()

    def _plan(self) -> StartPlan:
        record = self.record
        assert record.identity is not None
        overlays = [self.directory / name for [name] in self.overlays()]
        return StartPlan(
            sandbox=record.id,
            identity=vmm_identity(record.identity),
            shape=self.host.shape(record),
            memory=self.memory,
            disks=tuple(map(DiskFiles, self.disks, overlays)),
            console_log=self.directory / "console.log",
            vmm_log=self.directory / "vmm.log",
            boot=self._boot() if self.state is None else None,
            forwards=forwards_of(record),
        )

    def _boot(self) -> BootFiles:
        image = find_image(self.host.home, self.record.image)
        line = f"{image.manifest.command_line} tsc_early_khz={host_tsc_khz()}"
        return BootFiles(image.kernel, image.initrd, line)

    def do_load(self) -> None:
        """The device state, into the machine that waits for it."""
        assert self.state is not None and self.guest.machine is not None
        with self.state:
            self.guest.machine.load_state(self.state.fileno())

    def do_thaw(self) -> None:
        """The vCPUs run; from here on the guest's end is watched."""
        assert self.guest.machine is not None
        self.guest.machine.thaw()
        self.guest.arm(self.host.guest_ended, self.host.guest_stalled, self.host.guest_stopped)

    def do_greet(self) -> None:
        """Ready means: the agent answered, with the clock set, fresh entropy and its own name."""
        record, warm = self.record, self.state is not None
        if not record.agent:
            self.notes.append("no agent: clock, entropy and identity are as they were captured")
            return
        try:
            welcome = self.guest.greet(self.identity(), AGENT_READY_S if warm else AGENT_BOOT_S)
            self.notes += [f"the guest did not take its {cause}" for cause in welcome.failed]
        except (AgentUnreachable, AgentRefused, ExecCut) as error:
            self._without_agent(error, warm)

    def identity(self) -> Identity | None:
        """What the guest is called from now on; None where it knows."""
        return Identity(hostname=self.record.hostname, machine_id=self.record.machine_id)

    def _without_agent(self, error: DiapauseError, warm: bool) -> None:
        """A boot fails without its agent; a guest that was resumed goes on, and it is said."""
        assert self.guest.machine is not None
        if not warm or not self.guest.machine.alive():
            raise error
        self.notes.append(f"{error.message} Clock, entropy and identity are as they were captured.")

    def do_publish(self) -> None:
        """The row: running, as long as there is something that runs."""
        assert self.guest.machine is not None
        if not self.guest.machine.alive():
            cause = "the VMM has ended"
            raise VmmFailed(sandbox=self.sandbox, step="publish", cause=cause)
        if self.overlays_safe is not None:
            self.overlays_safe.result(60.0)
        record = self.record
        record.state, record.captures = "running", self.captures()
        record.error, record.reason = None, None
        record.tracker = self.guest.machine.tracked
        self.host.guests[record.id] = self.guest
        # Synced: after a crash of the host it is this row that keeps what the guest synced.
        self.host.catalog.put_sandbox(record, durable=True)
        self.host.parked.pop(record.id, None)  # only now: until then its sessions may still wait

    def captures(self) -> int:
        """Completed captures of the process."""
        return 0

    # -- failure ---------------------------------------------------------------------------------

    def _typed(self, step: str, error: BaseException) -> BaseException:
        """A VMM that was killed over what could not be served failed for that, whoever saw it."""
        if self.record.pager is not None and isinstance(error, (VmmFailed, *_UNANSWERED)):
            killed = self.host.ondemand.killed(self.record)
            if killed is not None:
                return BlobDamaged(blob=killed["blob"], cause=killed["cause"])
        return super()._typed(step, error)

    def undo(self, step: str, error: BaseException) -> None:
        """No process and no file of this attempt stays."""
        self.host.guests.pop(self.record.id, None)
        if self.guest.machine is not None:
            self._let_go(self.guest.machine)
        else:
            end_orphan(self.host, self.sandbox)  # one that was begun and not handed over
        if self.state is not None:
            self.state.close()
        self.drop_overlays()
        self.host.ondemand.ended(self.record)
        self.record.process, self.record.root = None, None
        self.record.pager, self.record.cold_base = None, None
        self.put_back(error)

    def drop_overlays(self) -> None:
        """What the disks wrote in this attempt is nobody's."""
        for names in self.record.overlays:
            for name in names:
                (self.directory / name).unlink(missing_ok=True)
        self.record.overlays = []

    def _let_go(self, machine: QemuMachine) -> None:
        with contextlib.suppress(DiapauseError):  # the process must go, whatever its link says
            self.guest.disarm()
            self.guest.detach()
        machine.kill()

    def put_back(self, error: BaseException) -> None:
        """A new sandbox whose start failed is gone again; its console stays in the error."""
        self.record.state = "removed"
        self.record.name = None
        self.host.catalog.put_sandbox(self.record)
        tail = console_tail(self.directory / "console.log")
        if isinstance(error, (VmmFailed, AgentUnreachable)) and tail:
            error.fields["console"] = tail
        remove_tree(self.directory)
        self.guest.cut("the sandbox could not be started")


def console_tail(path: Path, lines: int = 5) -> str:
    """The last lines of a console, printable."""
    if not path.exists():
        return ""
    text = path.read_bytes()[-4096:].decode(errors="replace")
    clean = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    return "\n".join(clean.strip().splitlines()[-lines:])


def host_tsc_khz() -> int:
    """The host's clock rate: any plausible value steadies a guest's early boot."""
    with Path("/proc/cpuinfo").open() as info:
        for line in info:
            if line.startswith("cpu MHz"):
                return int(float(line.split(":")[1]) * 1000)
    return 2_500_000
