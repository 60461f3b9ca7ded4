"""Guests that live through random verbs and random kills, and must never lose a byte.

Each slot owns one sandbox and a thread. Between verbs it knows what the guest's files hold, in
memory and on disk, and after every resume, restore and fork it asks the guest itself. A counter in
the guest shows that no time was lost or lived twice. Somebody else kills daemons and VMMs.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from websockets.exceptions import WebSocketException

from diapause.errors import DaemonUnreachable, DiapauseError
from diapause.model import GcRequest, RestoreRequest
from diapause.units import KIB
from tests.framework.fake_home import eventually
from tests.framework.sandbox import WAIT_S, Sandbox

if TYPE_CHECKING:
    from tests.framework.sandbox import Daemon

SETTLED = ("running", "paused", "frozen", "failed", "stopped")
_SNAPSHOTS_KEPT = 4
_PATTERN_KIB = 512


class Wrong(AssertionError):
    """What must never be seen."""


class Tally:
    """What happened, for the closing lines of a run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.slowest: dict[str, float] = {}

    def add(self, what: str, count: int = 1) -> None:
        with self._lock:
            self.counts[what] += count

    def took(self, what: str, seconds: float) -> None:
        with self._lock:
            self.slowest[what] = max(seconds, self.slowest.get(what, 0.0))


class Slot:
    """One sandbox and what is known of it."""

    def __init__(self, daemon: Daemon, source: Sandbox, seed: int, tally: Tally) -> None:
        self.daemon, self.tally, self.random = daemon, tally, random.Random(seed)
        self._number = 0
        self.files = ""  # the digests of the guest's files; "" while nobody knows
        self.either: tuple[str, ...] = ()  # what they are one of, after a restore without an answer
        self.snapshots: dict[str, str] = {}  # answered for, oldest first; what their files hold
        self.vmm_killed = threading.Event()
        self.guest = self._first(source)

    def _first(self, source: Sandbox) -> Sandbox:
        [guest] = source.fork()
        guest.start_counter()
        return guest

    # -- one round -------------------------------------------------------------------------------

    def round(self) -> None:
        """Something at random, and a look at what it left."""
        if not self.files:
            unknown = ("recognise", self._recognise) if self.either else ("rewrite", self._rewrite)
            if not self._attempt(*unknown):
                self._settle()
            return
        name, verb = self.random.choices(list(self._verbs), list(self._weights))[0]
        if not self._attempt(name, verb):
            self._settle()

    @property
    def _verbs(self) -> list[tuple[str, Callable[[], None]]]:
        return [
            ("rewrite", self._rewrite), ("save", self._save), ("pause", self._pause),
            ("fork", self._fork), ("freeze", self._freeze), ("restore", self._restore),
            ("snapshot rm", self._forget), ("gc", self._collect), ("look", self._look),
        ]  # fmt: skip

    _weights = (4, 5, 5, 2, 1, 2, 3, 1, 1)

    def _attempt(self, name: str, verb: Callable[[], None]) -> bool:
        """Do it; False where the daemon went meanwhile or refused with a name."""
        began = time.monotonic()
        try:
            verb()
        except DiapauseError as error:
            if error.code == DiapauseError.code:
                raise Wrong(f"{name} of {self.guest.id}: {error.message}") from error
            self.tally.add(f"{name}: {error.code}")
            return False
        except (WebSocketException, EOFError, OSError):
            if not self._excused():
                raise
            self.tally.add(f"{name}: cut")  # an exec whose daemon was killed
            return False
        finally:
            self.tally.took(name, time.monotonic() - began)
        self.tally.add(name)
        return True

    def _excused(self) -> bool:
        """Whether somebody killed something under this exec."""
        return self.vmm_killed.is_set() or self.daemon_killed_since > self._asked_at

    daemon_killed_since = 0.0
    _asked_at = 0.0

    # -- verbs -----------------------------------------------------------------------------------

    def _ask(self) -> None:
        self._asked_at = time.monotonic() - 1.0

    def _rewrite(self) -> None:
        """Fresh files, in memory and on disk; a shell that was cut still writes those before."""
        self._ask()
        self.files, self.either, self._number = "", (), self._number + 1
        memory, disk = f"/tmp/p{self._number}", f"/data/p{self._number}"
        self.files = self.guest.sh(
            f"cat >{memory}; cp {memory} {disk}; sync; sha256sum {memory} {disk}",
            given=os.urandom(_PATTERN_KIB * KIB),
        )
        # Only older ones: a command whose stream was cut goes on, beside the next rewrite too.
        self.guest.sh(
            "for f in /tmp/p[0-9]* /data/p[0-9]*; do"
            f' [ "${{f##*/p}}" -ge {self._number} ] || rm -f "$f"; done'
        )

    def _look(self) -> None:
        self._ask()
        self._same(self.guest, self.files)
        self.guest.counted()

    def _same(self, guest: Sandbox, files: str) -> None:
        found = self._digests(guest, files)
        if found != files:
            raise Wrong(f"{guest.id} holds {found!r}, not {files!r}")
        self.tally.add("patterns compared")

    def _digests(self, guest: Sandbox, files: str) -> str:
        names = " ".join(line.split()[1] for line in files.splitlines())
        script = f"echo 3 >/proc/sys/vm/drop_caches; sha256sum {names} || ls -l /tmp /data"
        return guest.sh(script)

    def _save(self) -> None:
        durability = self.random.choice(["process", "disk"])
        self._keep(self.guest.save(durability).snapshot)

    def _pause(self) -> None:
        self._keep(self.guest.pause(self.random.choice(["process", "disk"])).snapshot)
        self.guest.resume()
        self.tally.add("resumes")
        self._look()

    def _keep(self, snapshot: str) -> None:
        self.snapshots[snapshot] = self.files

    def _fork(self) -> None:
        if not self.snapshots:
            return
        snapshot = self.random.choice(list(self.snapshots))
        self._ask()
        with self.guest.forked(snapshot) as fork:
            self._same(fork, self.snapshots[snapshot])

    def _freeze(self) -> None:
        self.daemon.client.freeze(self.guest.id)
        self.daemon.client.thaw(self.guest.id)
        self._look()

    def _restore(self) -> None:
        if not self.snapshots:
            return
        snapshot = self.random.choice(list(self.snapshots))
        request = RestoreRequest(snapshot=snapshot, discard=True)
        self.either, self.files = (self.files, self.snapshots[snapshot]), ""
        self.daemon.client.restore(self.guest.id, request)
        self.files, self.either = self.snapshots[snapshot], ()
        self._look()

    def _recognise(self) -> None:
        """After a restore without an answer: as before it or as at the snapshot, nothing else."""
        self._ask()
        for files in self.either:
            if self._digests(self.guest, files) == files:
                self.files, self.either = files, ()
                self.tally.add("patterns compared")
                return
        raise Wrong(f"{self.guest.id} holds none of {self.either!r}")

    def _forget(self) -> None:
        """Let the oldest go, as far as nothing needs it."""
        while len(self.snapshots) > _SNAPSHOTS_KEPT:
            oldest = next(iter(self.snapshots))
            del self.snapshots[oldest]
            self.daemon.client.remove_snapshot(oldest)

    def _collect(self) -> None:
        self.tally.add("MiB freed", self.daemon.client.gc(GcRequest()).freed_bytes >> 20)

    def last_look(self) -> None:
        """When nobody kills any more: the guest holds what it should."""
        self._settle()
        if self.either:
            self._recognise()
        if self.files:
            self._look()

    # -- after a failure -------------------------------------------------------------------------

    def _settle(self) -> None:
        """Bring the sandbox back to running, whatever it was in; a dead one begins again.

        Where the daemon is killed under this as well, the next round comes here again.
        """
        with contextlib.suppress(DaemonUnreachable):
            self._bring_back()

    def _bring_back(self) -> None:
        state = self._state()
        if state in ("failed", "stopped"):
            self._begin_again()
        elif state == "paused":
            with contextlib.suppress(DiapauseError):
                self.guest.resume()
                self.tally.add("resumes")
        elif state == "frozen":
            with contextlib.suppress(DiapauseError):
                self.daemon.client.thaw(self.guest.id)

    def _state(self) -> str:
        def settled() -> bool:
            with contextlib.suppress(DaemonUnreachable):
                found = self.guest.inspect()
                return found.state in SETTLED and found.doing is None
            return False

        eventually(f"an end of what {self.guest.id} is doing", settled, 2 * WAIT_S)
        return self.guest.inspect().state

    def _begin_again(self) -> None:
        found = self.guest.inspect()
        if not self.vmm_killed.is_set():
            raise Wrong(f"{self.guest.id} is {found.state} and nobody killed it: {found.error}")
        if found.parent is None:
            raise Wrong(f"{self.guest.id} has no snapshot to go on from")
        [fresh] = self.daemon.fork(found.parent)
        old, self.guest = self.guest, fresh
        self.vmm_killed.clear()
        # Where its last snapshot was answered for, its content is known as well.
        self.files, self.either = self.snapshots.get(found.parent, ""), ()
        self.tally.add("begun again after a killed VMM")
        with contextlib.suppress(DiapauseError):
            old.remove()
        if self.files:
            self._attempt("look", self._look)


class Killer(threading.Thread):
    """Kills daemons, and now and then a VMM, at random moments."""

    def __init__(self, daemon: Daemon, slots: list[Slot], seed: int, tally: Tally) -> None:
        super().__init__(daemon=True)
        self._daemon, self._slots, self._tally = daemon, slots, tally
        self._random, self._ended = random.Random(seed), threading.Event()

    def run(self) -> None:
        while not self._ended.wait(self._random.uniform(5.0, 20.0)):
            if self._random.random() < 0.8:
                self._kill_daemon()
            else:
                self._kill_vmm()

    def end(self) -> None:
        """Kill no more."""
        self._ended.set()
        self.join(WAIT_S)

    def _kill_daemon(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            pid = self._daemon.pid
            for slot in self._slots:
                slot.daemon_killed_since = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            self._tally.add("daemons killed")

    def _kill_vmm(self) -> None:
        slot = self._random.choice(self._slots)
        with contextlib.suppress(DiapauseError, AssertionError, ProcessLookupError):
            pid = slot.guest.vmm_pid
            slot.vmm_killed.set()
            os.kill(pid, signal.SIGKILL)
            self._tally.add("VMMs killed")
