"""What a restarted daemon may not leave behind: everything in a home that nobody owns.

Each check is a function that yields a line for each thing that it finds; `leftovers` is all of
them. `tests/fault/test_leftovers.py` plants one of each kind. Builds that nothing names are not
among them: a packing that was killed leaves some, and removing shared data is `gc`'s alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diapause.catalog import Catalog, SandboxRecord, SnapshotRecord
from diapause.driver.process import find_by_argument, process_ref
from diapause.driver.qemu.command import name_start
from diapause.store.home import Home
from tests.framework.fake_home import eventually
from tests.framework.processes import processes_of
from tests.framework.sandbox import WAIT_S

_SETTLED = ("running", "frozen", "paused", "stopped", "failed")


@dataclass(frozen=True)
class _View:
    """A home, its rows, and who runs of it."""

    home: Home
    sandboxes: dict[str, SandboxRecord]
    snapshots: dict[str, SnapshotRecord]
    open_operations: list[str]

    @classmethod
    def of(cls, home: Home) -> _View:
        with contextlib.closing(Catalog(home.catalog)) as catalog:
            return cls(
                home,
                {row.id: row for row in catalog.sandboxes()},
                {row.id: row for row in catalog.snapshots(removed=True)},
                [f"{o.verb} of {o.sandbox}: {o.steps}" for o in catalog.journal.open_operations()],
            )

    def runs(self, sandbox: str) -> bool:
        row = self.sandboxes.get(sandbox)
        return row is not None and row.process is not None

    def captured(self, snapshot: str) -> bool:
        row = self.snapshots.get(snapshot)
        return row is not None and row.state == "captured"

    @property
    def recorded(self) -> set[int]:
        return {row.process.pid for row in self.sandboxes.values() if row.process is not None}

    @property
    def daemon(self) -> int | None:
        lock = self.home.serve_lock
        pid = int(lock.read_text() or 0) if lock.exists() else 0
        return pid if pid and process_ref(pid) else None


def leftovers(home: Home) -> list[str]:
    """Everything that nobody owns, in words; no verb may be under way."""
    view = _View.of(home)
    return [line for check in CHECKS for line in check(view)]


def nothing_left(home: Home) -> None:
    """Wait until what goes on behind the verbs has ended, and nothing is left that nobody owns."""
    found: list[str] = []

    def none() -> bool:
        found[:] = leftovers(home)
        return not found

    try:
        eventually("the end of what nobody owns", none, WAIT_S)
    except AssertionError as error:
        raise AssertionError(f"left over: {found}") from error


def vmms(view: _View) -> Iterator[str]:
    """A VMM of this home that no row names, and a row that names one that is gone."""
    alive = {process.pid for process in find_by_argument(name_start(view.home.key))}
    yield from (f"VMM {pid} that no row names" for pid in alive - view.recorded)
    yield from (f"row of VMM {pid}, which is gone" for pid in view.recorded - alive)


def processes(view: _View) -> Iterator[str]:
    """Any other process of this home but its daemon."""
    vmms_alive = {process.pid for process in find_by_argument(name_start(view.home.key))}
    for pid in set(processes_of(view.home)) - vmms_alive - {view.daemon}:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if process_ref(pid) and not _may_run(view, words):
                yield f"process {pid}: {words}"


def _may_run(view: _View, words: str) -> bool:
    """A client, or a daemon that was spawned beside the one that serves, ends by itself."""
    return (
        "serve --detached" in words
        or f"diapause-pager-{view.home.key}" in words
        or any(row in words for row in view.sandboxes)
    )


def mounts(view: _View) -> Iterator[str]:
    """A file system mounted below the home."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        place = line.split()[1]
        if place.startswith(f"{view.home.root}/") or place.startswith(f"{view.home.buffers}/"):
            yield f"mount {place}"


def locks(view: _View) -> Iterator[str]:
    """A lock on a file of the home, held by anybody but its daemon and its VMMs."""
    owners = {view.daemon, *view.recorded}
    inodes = {}
    for directory, _, names in os.walk(view.home.root):
        for path in [Path(directory), *(Path(directory) / name for name in names)]:
            with contextlib.suppress(OSError):
                status = path.stat()
                device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
                inodes[f"{device}:{status.st_ino}"] = path
    for line in Path("/proc/locks").read_text().splitlines():
        _, kind, _, _, pid, inode, *_ = line.replace("-> ", "").split()
        if inode in inodes and int(pid) > 0 and int(pid) not in owners:
            yield f"{kind} on {inodes[inode]} by process {pid}"


def half_written(view: _View) -> Iterator[str]:
    """What was being written when somebody died."""
    yield from (f"tmp/{path.name}" for path in view.home.tmp.iterdir())


def captures(view: _View) -> Iterator[str]:
    """A capture without a row that says captured."""
    for path in view.home.captures.iterdir():
        if not view.captured(path.name):
            yield f"captures/{path.name}"


def snapshots(view: _View) -> Iterator[str]:
    """A snapshot's directory without a row, and flat files that were never finished."""
    for path in view.home.snapshots.iterdir():
        if path.name not in view.snapshots:
            yield f"snapshots/{path.name}"
    for path in view.home.flat.iterdir():
        if not (path / "flat.json").exists():
            yield f"flat/{path.name}"


def buffers(view: _View) -> Iterator[str]:
    """On tmpfs: what is of no capture that is read from there, and of no guest that runs."""
    for path in view.home.buffers.iterdir():
        owner, _, kind = path.name.partition(".")
        row = view.snapshots.get(owner)
        read = row is not None and row.state == "captured" and row.durability == "process"
        if kind == "unmerged":
            mark = view.home.sandbox(owner) / "capture.mark"
            known = view.runs(owner) and mark.exists()
        else:
            known = kind == "memory" and read
        if not known:
            yield f"buffer {path.name}"


def sockets(view: _View) -> Iterator[str]:
    """A socket of a VMM that does not run."""
    for path in view.home.sockets.iterdir():
        owner = path.name.partition(".")[0]
        if owner not in ("serve", "pager") and not view.runs(owner):
            yield f"socket {path.name}"


def leaves(view: _View) -> Iterator[str]:
    """A cgroup of a VMM that does not run, wherever the host delegated one."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if not after.startswith("cgroup2 "):
            continue
        start = f"diapause-{view.home.key}-"
        for _, names, _ in os.walk(before.split()[4]):
            for name in [name for name in names if name.startswith(start)]:
                if not view.runs(name.removeprefix(start).partition(".")[0]):
                    yield f"cgroup {name}"


def sandbox_files(view: _View) -> Iterator[str]:
    """A sandbox's directory without a row; overlays and marks that its row knows nothing of."""
    for directory in view.home.sandboxes.iterdir():
        row = view.sandboxes.get(directory.name)
        if row is None:
            yield f"sandboxes/{directory.name}"
            continue
        named = {name for names in row.overlays for name in names}
        for path in directory.glob("*.qcow2"):
            # What a guest left that failed or stopped is all that there is of its last hours.
            if path.name not in named:
                yield f"overlay {directory.name}/{path.name}"
        if (directory / "capture.mark").exists() and row.state in ("paused",):
            yield f"mark {directory.name}/capture.mark"


def rows(view: _View) -> Iterator[str]:
    """A verb that nobody takes any further."""
    yield from (f"operation {line}" for line in view.open_operations)
    for row in view.sandboxes.values():
        if row.state not in _SETTLED:
            yield f"sandbox {row.id} is {row.state}"


CHECKS: tuple[Callable[[_View], Iterator[str]], ...] = (
    vmms, processes, mounts, locks, half_written, captures, snapshots, buffers, sockets,
    leaves, sandbox_files, rows,
)  # fmt: skip
