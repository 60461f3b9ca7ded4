"""What all verbs of one home share: the catalog, the stores, the driver, the running guests."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from diapause.catalog import Catalog, Identity
from diapause.driver.base import Shape, VmmIdentity
from diapause.driver.qemu import QemuDriver
from diapause.errors import DiapauseError
from diapause.limits import CLOSE_S, END_S
from diapause.operation import carried
from diapause.sandbox.guests import Guest
from diapause.sandbox.locks import SandboxLocks
from diapause.sandbox.losses import guest_lost
from diapause.sandbox.metrics import HomeCollector, Metrics
from diapause.sandbox.network import has_network
from diapause.sandbox.ondemand import Ondemand
from diapause.sandbox.pager_watch import PagerWatch
from diapause.sandbox.rescue import REFUSALS, go_on_after_stall, thaw_if_nobody_owns
from diapause.snapshot.flats import FlatStore
from diapause.snapshot.leases import Leases
from diapause.snapshot.packer import Packer
from diapause.snapshot.sums import Digests
from diapause.store.files import no_thread
from diapause.store.gate import Gate
from diapause.store.reserve import Reserve
from diapause.store.templates import Templates

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from diapause.catalog import SandboxRecord, SnapshotRecord
    from diapause.guest.link import Link
    from diapause.model import EventKind
    from diapause.store.home import Home

log = logging.getLogger("diapause.host")
_AGAIN_S, _AGAIN_S_MAX = 1.0, 60.0


def tracker_path() -> Path | None:
    """The preloaded library; None where it was not built."""
    path = Path(__file__).parent.parent / "native" / "libdiapause_tracker.so"
    return path if path.exists() else None


def tracking_wanted() -> bool:
    """Whether writes are to be tracked; `DIAPAUSE_TRACKER=off` says no."""
    return os.environ.get("DIAPAUSE_TRACKER") != "off"


class Host:
    """One home on this host, as long as its daemon lives."""

    def __init__(self, home: Home, loop: asyncio.AbstractEventLoop) -> None:
        self.home, self.loop = home, loop
        self.catalog = Catalog(home.catalog)
        self.gate, self.reserve = Gate(), Reserve(home)
        self.templates, self.leases, self.locks = (
            Templates(home, self.gate),
            Leases(),
            SandboxLocks(),
        )
        self.flats = FlatStore(home, self.catalog, self.templates, self.leases, self.gate)
        self.digests = Digests(home, self.catalog, self.leases, self.gate, self.flats)
        self.packer = Packer(
            home, self.catalog, self.templates, self.leases, self.flats, self.gate
        )  # fmt: skip
        self.ondemand = Ondemand(home, self.catalog, self.templates, self.leases, self.flats)
        self.packer.on_packed = self.ondemand.served.packed
        self.driver = QemuDriver(home, tracker_path(), track=tracking_wanted())
        self.images = threading.Lock()  # an image doesn't go between a look for it and a row
        self.guests: dict[str, Guest] = {}
        self.parked: dict[str, Link] = {}  # links of paused sandboxes: their sessions wait
        self.tracked = tracker_path() is not None and tracking_wanted()
        # One thread: parents are packed before children, and packing never competes with itself.
        self._background = ThreadPoolExecutor(1, "diapause-pack")
        self._beside = ThreadPoolExecutor(8, "diapause-beside")  # short work of a verb
        self._watch = ThreadPoolExecutor(32, "diapause-watch")  # what may wait for a sandbox
        self._watching: set[Future[object]] = set()
        self._jobs: dict[str, Future[None]] = {}
        self._guard = threading.Lock()
        self.closing, self.closed = False, threading.Event()
        self.pager_watch = PagerWatch(self)
        # What is done about a verb that could not be put back; recovery says it, which knows verbs.
        self.settle_later: Callable[[str], object] = lambda sandbox: None
        self.metrics = Metrics(
            HomeCollector(home, self.catalog, self.packing, self.ondemand.totals)
        )

    def event(self, kind: EventKind, sandbox: str | None = None, **detail: Any) -> None:
        """Note what no row tells; whoever does so goes on whatever becomes of the note."""
        try:
            self.catalog.journal.event(kind, sandbox=sandbox, detail=detail)
        except REFUSALS as error:
            log.warning("the event %s of %s: %s", kind, sandbox, error)

    # -- work behind the verbs -------------------------------------------------------------------

    def behind(self, name: str, work: Callable[[], object]) -> Future[None]:
        """Do `work` after what was asked before it; its failure is logged, and kept in a row."""

        def run() -> None:
            if self.closing:
                return
            try:
                work()
            except DiapauseError as error:
                log.warning("%s: %s", name, error)
            except Exception:
                log.exception("%s", name)

        with self._guard:
            future: Future[None] = self._background.submit(run)
            self._jobs[name] = future
            for done in [key for key, job in self._jobs.items() if job.done()]:
                del self._jobs[done]
        return future

    def later(self, pause_s: float, act: Callable[[], object]) -> None:
        """Do something short after a pause, unless the daemon ends before."""

        def unless_closing() -> None:
            if not self.closing:
                act()

        self.loop.call_soon_threadsafe(self.loop.call_later, pause_s, unless_closing)

    def packing(self) -> int:
        """How many pieces of such work wait or are under way."""
        with self._guard:
            return sum(not job.done() for job in self._jobs.values())

    def aside(self, work: Callable[[], None]) -> Future[None]:
        """Do something short beside a verb; whoever asked waits for it before the verb ends."""
        return self._beside.submit(carried(work))

    def watch(self, work: Callable[[], object]) -> Future[object]:
        """Do something that may have to wait for a guest; nobody waits for it."""

        def run() -> object:
            try:
                return work()
            except Exception:
                log.exception("work that nobody waits for")
                raise

        with self._guard:
            try:
                future = self._watch.submit(run)
            except RuntimeError as error:
                if not no_thread(error):
                    raise
                log.warning("no thread for what nobody waits for: the next one does it")  # queued
                return Future()  # the pool's own is lost: this one never says anything
            self._watching = {one for one in self._watching if not one.done()} | {future}
        return future

    def close(self) -> None:
        """Let go of everything; guests go on."""
        self.closing = True
        self.closed.set()
        self._background.shutdown(wait=True, cancel_futures=True)
        self._beside.shutdown(wait=True)
        self.digests.close()
        self._watch.shutdown(wait=False, cancel_futures=True)
        wait(self._watching, CLOSE_S)  # each ends soon; one that a guest holds up is left
        for guest in list(self.guests.values()):
            guest.cut("the daemon is stopping")
            if guest.machine is not None:
                guest.machine.close()
        self.ondemand.close()
        self.catalog.close()

    # -- ends that nobody asked for --------------------------------------------------------------

    def guest_ended(self, guest: Guest, reason: str) -> None:
        """A watcher saw the end of a guest; called in the loop, worked on in a thread."""
        self.watch(lambda: self._settle(guest, reason))

    def _settle(self, guest: Guest, reason: str) -> None:
        """Nobody else will: it is tried until it is done, whatever fails."""
        pause_s = _AGAIN_S
        while not self.closing:
            try:
                with self.locks.hold(guest.sandbox, END_S):
                    settle_end(self, guest, reason)
            except Exception:
                log.exception("the end of %s", guest.sandbox)
                self.closed.wait(pause_s)
                pause_s = min(2 * pause_s, _AGAIN_S_MAX)
            else:
                return

    def guest_stalled(self, guest: Guest, reason: str) -> None:
        """The VMM stopped a guest whose disk has no room; called in the loop, once per stall."""
        if guest.stalled is None:
            guest.stalled = reason
            self.watch(lambda: go_on_after_stall(self, guest, reason))

    def guest_stopped(self, guest: Guest) -> None:
        """Somebody stopped a guest; called in the loop. Where it was a verb, nothing is done."""
        if not guest.looked_at:
            guest.looked_at = True
            self.watch(lambda: thaw_if_nobody_owns(self, guest))

    def end(self, record: SandboxRecord, reason: str) -> None:
        """The row of a guest whose VMM is gone: stopped by its own doing, or failed.

        What failed captures of that process kept for the next one goes: there will be none.
        """
        (self.home.buffers / f"{record.id}.unmerged").unlink(missing_ok=True)
        (self.home.sandbox(record.id) / "capture.mark").unlink(missing_ok=True)
        over_memory = self.ondemand.ended(record)
        if not reason.startswith("guest-"):  # what a guest did itself is not the pager's doing
            reason = over_memory or reason
        if not reason.startswith("guest-") and self.driver.leaves.killed(record.id):
            reason = "the VMM was killed by its memory limit"
        record.process, record.reason = None, reason
        record.root, record.pager, record.cold_base = None, None, None
        record.frozen = False
        record.state = "stopped" if reason.startswith("guest-") else "failed"
        if record.state == "failed":
            record.error = guest_lost(self.catalog, record, reason).to_dict()
        self.catalog.put_sandbox(record)
        self.driver.leaves.remove(record.id)

    # -- the accelerator -------------------------------------------------------------------------

    def accelerators(self) -> tuple[str, ...]:
        """What this host was proved to run, the best first; TCG runs everywhere."""
        proved = self.catalog.fact(self.accelerator_key())
        return ("kvm", "tcg") if proved == "kvm" else ("tcg",)

    def accelerator_key(self) -> str:
        """The name of the proof: it holds for this kernel, this CPU and this QEMU."""
        system = os.uname()
        return f"accelerator/{system.release}/{system.machine}/{self.driver.version()}"

    # -- shapes and identities -------------------------------------------------------------------

    def shape(self, record: SandboxRecord | SnapshotRecord) -> Shape:
        """The size of a machine, from its record."""
        return Shape(
            record.memory_bytes, record.cpus, tuple(record.disks_bytes), has_network(record)
        )

    def memory_file(self, record: SandboxRecord) -> Path:
        """The flat memory file that a running sandbox's RAM is a mapping of."""
        if record.root is not None and record.pager is not None:
            return self.ondemand.pager.path(f"{record.root}.memory")
        if record.root is not None:
            return self.home.flat_of(record.root) / "memory"
        return self.templates.memory(record.memory_bytes).flat


def settle_end(host: Host, guest: Guest, reason: str) -> None:
    """Turn a guest that ended by itself into a `stopped` or `failed` row; holds the lock.

    A verb may have come first: paused it, removed it, even resumed it, which makes another guest.
    """
    record = host.catalog.sandbox(guest.sandbox)
    if host.guests.get(guest.sandbox) is not guest or guest.machine is None:
        return
    if record is None or record.state not in ("running", "frozen"):
        return
    guest.cut(f"the guest ended ({reason})")
    guest.machine.kill()
    host.end(record, reason)
    del host.guests[guest.sandbox]  # last: who finds it not done does it again


def vmm_identity(identity: Identity) -> VmmIdentity:
    """A row's identity as the driver's."""
    return VmmIdentity(**msgspec.structs.asdict(identity))


def row_identity(identity: VmmIdentity) -> Identity:
    """The driver's identity as a row's."""
    return Identity(**dataclasses.asdict(identity))
