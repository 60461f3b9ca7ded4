"""A cgroup for each VMM, with limits of memory and processes, where the host delegates one to us.

Only version 2, and only a cgroup that is ours to arrange: one that systemd marked as delegated
(`Delegate=`), or that `DIAPAUSE_CGROUP` names. Nothing is made below any other, since somebody else
manages that. Below it lie leaves, side by side: `daemon`, into which we move ourselves where a
controller could not be turned on otherwise (a cgroup with processes of its own has no limited
children), and one for each start of a VMM.

    PLACE/daemon                              us
    PLACE/diapause-HOMEKEY-SANDBOX.INSTANCE   a VMM, from its first instruction on

A leaf goes when its VMM has ended; one whose limit ended it, when a row says so. What a killed
daemon leaves is swept by the next: the kernel removes no cgroup in which something runs, so
whatever can be removed is nobody's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diapause.driver.passing import is_passing
from diapause.limits import (
    LEAF_REMOVAL_S,
    VMM_MEMORY_OVERHEAD_BYTES,
    VMM_THREADS_MAX,
)

if TYPE_CHECKING:
    from diapause.driver.base import Shape

VARIABLE = "DIAPAUSE_CGROUP"
CONTROLLERS = ("memory", "pids")
_DAEMON = "daemon"
_PREFIX = "diapause-"
_MARKS = ("user.delegate", "trusted.delegate")  # set by systemd; the second is older


@dataclass(frozen=True)
class Delegation:
    """Where leaves are made, which of `CONTROLLERS` they have, and why not more."""

    place: Path | None
    controllers: tuple[str, ...] = ()
    cause: str = ""


@dataclass(frozen=True)
class LeafLimits:
    """What one VMM may have; None is no limit. Only what the host delegates is set."""

    memory_bytes: int | None
    swap_bytes: int | None
    tasks: int


def limits_of(shape: Shape, *, on_tmpfs: bool) -> LeafLimits:
    """What no honest guest reaches: docs/confinement.md has the reasons.

    Where the home lies on tmpfs, what the guest writes to its disk is charged as memory and is not
    reclaimed; a disk's overlays have no sum that is known beforehand, so there is no limit.
    """
    ram = shape.memory_bytes
    if on_tmpfs:
        return LeafLimits(None, None, VMM_THREADS_MAX)
    tables = ram // 64 + shape.cpus * (ram // 8)
    return LeafLimits(ram + tables + VMM_MEMORY_OVERHEAD_BYTES, ram, VMM_THREADS_MAX)


# -- the place ---------------------------------------------------------------------------------


def cgroup_of(pid: int | str = "self") -> Path | None:
    """The directory of a process's cgroup; None where no cgroup2 is mounted that shows it."""
    with contextlib.suppress(OSError):
        return _find_cgroup(pid)
    return None


def _find_cgroup(pid: int | str) -> Path | None:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        if line.startswith("0::/"):
            return _mounted(line.removeprefix("0::"), Path("/proc/self/mountinfo").read_text())
    return None


def _own_cgroup() -> Path | None:
    try:
        return _find_cgroup("self")
    except OSError as error:
        if is_passing(error):
            raise
        return None


def _mounted(path: str, mountinfo: str) -> Path | None:
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        root, place = before.split()[3:5]
        if not after.startswith("cgroup2 ") or root.startswith("/.."):
            continue  # what lies above our cgroup namespace has no path that we could know
        below = os.path.relpath(path, root)
        if below != ".." and not below.startswith("../"):
            return Path(place.encode().decode("unicode_escape"), below)
    return None


@functools.cache
def delegation() -> Delegation:
    """What this daemon was given; asked once, and arranged then. The first to ask is recovery.

    Raises OSError where that could not be found out now.
    """
    named = os.environ.get(VARIABLE)
    if named:
        place = Path(named)
        if not (place / "cgroup.controllers").exists():
            return Delegation(None, cause=f"{VARIABLE} names {named}, which is no cgroup2")
    else:
        own = _own_cgroup()
        if own is None:
            return Delegation(None, cause="no cgroup2 is mounted here")
        candidates = [own, *([own.parent] if own.name == _DAEMON else [])]
        found = next((path for path in candidates if _is_marked(path)), None)
        if found is None:
            return Delegation(None, cause=f"{own} was not delegated to the daemon")
        place = found
    if not os.access(place, os.W_OK):
        return Delegation(None, cause=f"{place} can't be written by uid {os.geteuid()}")
    return turn_on(place)


def _is_marked(place: Path) -> bool:
    for name in _MARKS:
        try:
            if os.getxattr(place, name) == b"1":
                return True
        except OSError as error:  # no such mark, or none that we may see
            if is_passing(error):
                raise
    return False


def turn_on(place: Path) -> Delegation:
    """Turn the controllers on for leaves of this cgroup, and move out of it first.

    Raises OSError of the moment alone; what the kernel refuses is in the answer.

    With anybody in it `memory` would be refused. `pids` would not, but nothing could be started in
    a leaf any more: the kernel takes all of it for one threaded domain then.
    """
    try:
        there = (place / "cgroup.controllers").read_text().split()
        wanted = [name for name in CONTROLLERS if name in there]
        missing = [name for name in CONTROLLERS if name not in there]
        causes = [f"{place} has no {' and no '.join(missing)} controller"] if missing else []
        others = _step_aside(place) if wanted else 0
        if others:
            causes.append(f"{place} is not ours alone: {others} other processes run in it")
        else:
            causes += [_turn_on(place, name) for name in wanted]
        on = (place / "cgroup.subtree_control").read_text().split()
    except OSError as error:
        if is_passing(error):
            raise
        return Delegation(None, cause=f"{place}: {error.strerror}")
    cause = "; ".join(filter(None, causes))
    return Delegation(place, tuple(name for name in CONTROLLERS if name in on), cause)


def _turn_on(place: Path, controller: str) -> str:
    """Why it could not be; empty where it is on."""
    control = place / "cgroup.subtree_control"
    try:
        if controller not in control.read_text().split():
            control.write_text(f"+{controller}")
    except OSError as error:
        if is_passing(error):
            raise
        return f"{controller} can't be turned on in {place}: {error.strerror}"
    return ""


def _step_aside(place: Path) -> int:
    """Move ourselves into a leaf; how many others are in the way, which are never moved."""
    if not (place / "cgroup.type").exists():
        return 0  # the root of all may have processes and limited children
    found = {int(line) for line in (place / "cgroup.procs").read_text().split()}
    others = found - {os.getpid()}
    if found and not others:
        (place / _DAEMON).mkdir(exist_ok=True)
        (place / _DAEMON / "cgroup.procs").write_text(str(os.getpid()))
    return len(others)


# -- leaves ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """The cgroup of one VMM."""

    path: Path

    def limit(self, controllers: tuple[str, ...], limits: LeafLimits) -> None:
        """Set what the controllers can hold; raises OSError."""
        if "memory" in controllers:
            (self.path / "memory.max").write_text(_word(limits.memory_bytes))
            (self.path / "memory.oom.group").write_text("1")  # a half-killed VMM helps nobody
            swap = self.path / "memory.swap.max"
            if swap.exists():  # not where the kernel accounts no swap
                swap.write_text(_word(limits.swap_bytes))
        if "pids" in controllers:
            (self.path / "pids.max").write_text(str(limits.tasks))

    def killed(self) -> bool:
        """Whether its limit of memory has ended anything in it."""
        with contextlib.suppress(OSError):
            for line in (self.path / "memory.events").read_text().splitlines():
                word, _, count = line.partition(" ")
                if word == "oom_kill":
                    return int(count) > 0
        return False

    def remove(self, bound_s: float = LEAF_REMOVAL_S) -> bool:
        """Whether it is gone: one in which something runs, or still ends, stays."""
        deadline = time.monotonic() + bound_s
        while True:
            try:
                self.path.rmdir()
            except FileNotFoundError:
                return True
            except OSError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.002)
            else:
                return True


def leaf_of(pid: int) -> Leaf | None:
    """The leaf of ours that a process is in."""
    path = cgroup_of(pid)
    return Leaf(path) if path is not None and path.name.startswith(_PREFIX) else None


def read_limit(leaf: Leaf, name: str) -> int | None:
    """A limit as the kernel holds it; None where there is none."""
    with contextlib.suppress(OSError):
        word = (leaf.path / name).read_text().strip()
        return int(word) if word.isdigit() else None
    return None


class Leaves:
    """The leaves of one home. Starts and ends of one sandbox do not overlap; others may."""

    def __init__(self, key: str) -> None:
        self._start = f"{_PREFIX}{key}-"
        self._elsewhere: dict[str, Leaf] = {}  # of guests that a daemon in another place started
        self._killed: set[str] = set()  # by their limit, and their leaf is gone

    def make(self, given: Delegation, sandbox: str, limits: LeafLimits) -> Leaf:
        """A new leaf with its limits; raises OSError and leaves nothing."""
        assert given.place is not None
        self._killed.discard(sandbox)
        leaf = Leaf(given.place / f"{self._start}{sandbox}.{secrets.token_hex(4)}")
        leaf.path.mkdir(mode=0o755)
        try:
            try:
                leaf.limit(given.controllers, limits)
            except OSError:  # somebody may have turned the controllers off since
                turn_on(given.place)
                leaf.limit(given.controllers, limits)
        except OSError:
            leaf.remove()
            raise
        return leaf

    def adopt(self, sandbox: str, pid: int, limits: LeafLimits) -> None:
        """Take up a guest of an earlier daemon. Limits are set again: where systemd starts a unit
        anew it may turn the controllers off for a moment, and all limits with them."""
        leaf, given = leaf_of(pid), delegation()
        if leaf is None:
            return
        if leaf.path.parent != given.place:
            self._elsewhere[sandbox] = leaf
            return
        with contextlib.suppress(OSError):
            leaf.limit(given.controllers, limits)

    def killed(self, sandbox: str) -> bool:
        """Whether the last VMM of a sandbox was ended by its limit of memory."""
        return sandbox in self._killed or any(leaf.killed() for leaf in self._of(sandbox))

    def ended(self, sandbox: str) -> None:
        """Its VMM has ended. A leaf whose limit did that stays until a row says so: only it knows,
        and a daemon that is killed in between is followed by one that asks it."""
        if not self.killed(sandbox):
            self.remove(sandbox)

    def remove(self, sandbox: str) -> None:
        """Remove what is left of a sandbox whose VMM has ended."""
        for leaf in self._of(sandbox):
            if leaf.killed():
                self._killed.add(sandbox)
            leaf.remove()
        self._elsewhere.pop(sandbox, None)

    def sweep(self) -> None:
        """Remove every leaf of the home in which nothing runs; nothing may be starting."""
        for leaf in self._named(self._start):
            leaf.remove(0.0)

    def _of(self, sandbox: str) -> list[Leaf]:
        elsewhere = self._elsewhere.get(sandbox)
        return self._named(f"{self._start}{sandbox}.") + ([elsewhere] if elsewhere else [])

    def _named(self, start: str) -> list[Leaf]:
        with contextlib.suppress(OSError):
            if (place := delegation().place) is not None:
                names = os.listdir(place)  # noqa: PTH208 - the names alone
                return [Leaf(place / name) for name in names if name.startswith(start)]
        return []


def lies_on_tmpfs(path: Path) -> bool:
    """Whether what is written below this directory is memory."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0] in ("tmpfs", "ramfs")
    return False


def _word(limit: int | None) -> str:
    return "max" if limit is None else str(limit)
