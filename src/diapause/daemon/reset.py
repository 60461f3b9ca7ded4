"""`system reset`: everything that Diapause made on this host for one home, gone.

The daemon is ended first, and its lock held until the last file is gone, so that none starts in
between. Then the VMMs, the capture buffers, the sockets, the home.

Invariants:
- Only a home of ours: a real directory of this user that has what only a daemon makes. Whatever
  stands in the way is found before anything is touched.
- No link is followed, and no mount below the home walked into: a reset with one there is refused.
- It may be killed anywhere and be asked for again: what the home is recognised by goes last.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import sqlite3
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diapause.driver.cgroup import leaf_of
from diapause.driver.process import Pidfd, find_by_argument
from diapause.driver.qemu import QemuDriver
from diapause.errors import DaemonUnreachable, HomeRefused, StorageFailed
from diapause.limits import VMM_EXIT_S
from diapause.pager.process import name_of
from diapause.store.files import remove_tree
from diapause.store.home import SCRATCH_START, Home

# Longer than a daemon that is told to stop takes for the verbs under way and what is behind them.
_DAEMON_S = 120.0
_MARK = "reset.mark"


@dataclass(frozen=True)
class Findings:
    """What a reset would remove."""

    there: bool
    sandboxes: int = 0
    snapshots: int = 0
    machines: int = 0


def examine(home: Home) -> Findings:
    """Look whether it may be reset, and at what there is; raises HomeRefused. Nothing changes."""
    _refuse_mounts(home)
    machines = len(_machines(home))
    if not _is_ours(home):
        return Findings(there=False, machines=machines)
    return Findings(True, _rows(home, "sandboxes"), _rows(home, "snapshots"), machines)


def reset(home: Home) -> None:
    """Remove it all; what is gone already is no failure.

    Raises HomeRefused before anything is touched, DaemonUnreachable where the daemon does not end,
    StorageFailed where something can't be removed.
    """
    there = examine(home).there
    with _without_daemon(home) if there else contextlib.nullcontext():
        try:
            if there:
                (home.root / _MARK).touch(mode=0o600)
            _end_machines(home)
            _end_pager(home)
            for directory in _outside(home):
                _remove_directory(directory)
            if there:
                _remove_home(home)
        except OSError as error:
            raise StorageFailed(what=f"the removal of {home.root}", cause=error) from error


# -- what may be reset -----------------------------------------------------------------------------


def _is_ours(home: Home) -> bool:
    """Whether there is a home; raises HomeRefused for what is there and is none of ours."""
    try:
        status = home.root.lstat()
    except FileNotFoundError:
        return False
    if stat.S_ISLNK(status.st_mode):
        target = home.root.readlink()
        raise HomeRefused(home=home.root, cause=f"it is a link to {target}, which is not followed")
    if not stat.S_ISDIR(status.st_mode):
        raise HomeRefused(home=home.root, cause="it is no directory")
    if status.st_uid != os.geteuid():
        raise HomeRefused(home=home.root, cause=f"it belongs to the user {status.st_uid}")
    names = set(os.listdir(home.root))  # noqa: PTH208 - the names alone
    marked = _MARK in names or _is_catalog(home.catalog)
    if names - {home.serve_lock.name} and not marked:
        raise HomeRefused(home=home.root, cause="it has no catalog of Diapause")
    return True


def _is_catalog(path: Path) -> bool:
    if not path.is_file() or path.is_symlink():
        return False
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
            tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master")}
    except sqlite3.Error:  # damaged, and still ours
        return True
    return {"sandboxes", "snapshots", "operations"} <= tables


def _rows(home: Home, table: str) -> int:
    try:
        with contextlib.closing(
            sqlite3.connect(f"{home.catalog.as_uri()}?mode=ro", uri=True)
        ) as db:
            query = f"SELECT count(*) FROM {table} WHERE state != 'removed'"
            return int(db.execute(query).fetchone()[0])
    except sqlite3.Error:
        return 0


def _refuse_mounts(home: Home) -> None:
    tops = [str(top) for top in (home.root, *_outside(home))]
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape")
        if any(point.startswith(f"{top}/") for top in tops):
            raise HomeRefused(home=home.root, cause=f"something is mounted at {point}")


def _outside(home: Home) -> list[Path]:
    """The directories of a home that may lie elsewhere."""
    short = Path("/tmp") / f"diapause-{os.geteuid()}-{home.key}"
    return [home.buffers, home.sockets, *([short] if short != home.sockets else [])]


# -- the daemon and the VMMs -----------------------------------------------------------------------


@contextlib.contextmanager
def _without_daemon(home: Home) -> Iterator[None]:
    """End the daemon and hold its lock; until we let go, no other one gets it."""
    file = os.open(home.serve_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + _DAEMON_S
        while not _locked(file):
            if time.monotonic() > deadline:
                cause = f"it was told to stop and did not within {_DAEMON_S:.0f} s"
                raise DaemonUnreachable(home=home.root, cause=cause)
            _end_daemon(file, deadline - time.monotonic())
        yield
    finally:
        os.close(file)


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _end_daemon(file: int, bound_s: float) -> None:
    """Tell the holder of the lock to stop and wait for its end: the lock names it."""
    try:
        pid = int(os.pread(file, 32, 0))
        process = os.pidfd_open(pid)
    except (ValueError, ProcessLookupError):
        time.sleep(0.02)  # it has the lock and is about to write its pid, or to end
        return
    try:
        # Only if it is the holder still, and not a process that was given its number.
        if int(os.pread(file, 32, 0)) == pid and not _locked(file):
            signal.pidfd_send_signal(process, signal.SIGTERM)
            select.select([process], [], [], bound_s)
    except ProcessLookupError:
        return
    finally:
        os.close(process)


def _machines(home: Home) -> list[Home]:
    """The home, and the scratch homes in it, once for each machine that runs there."""
    homes = [home, *(Home(path) for path in home.tmp.glob(f"{SCRATCH_START}*"))]
    return [each for each in homes for _ in QemuDriver(each, None).all_processes()]


def _end_pager(home: Home) -> None:
    """Pager and keeper, each of which starts the other again: both, until there is neither."""
    deadline = time.monotonic() + _DAEMON_S
    while (found := find_by_argument(name_of(home))) and time.monotonic() < deadline:
        for pidfd in map(Pidfd, found):
            pidfd.kill()
            pidfd.wait(VMM_EXIT_S)
            pidfd.close()


def _end_machines(home: Home) -> None:
    for each in {one.root: one for one in _machines(home)}.values():
        for process in QemuDriver(each, None).all_processes():
            pidfd, leaf = Pidfd(process), leaf_of(process.pid)
            pidfd.kill()
            pidfd.wait(VMM_EXIT_S)
            pidfd.close()
            if leaf is not None:
                leaf.remove()
        if each != home:
            for directory in _outside(each):
                _remove_directory(directory)


# -- the files -------------------------------------------------------------------------------------


def _remove_directory(path: Path) -> None:
    """A directory of ours and all in it; a link in its place, or another's directory, stays."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
        _remove_tree(path)


def _remove_tree(path: Path) -> None:
    """By descriptors, so that nobody can put a link in the way of it."""
    for _, _, _, directory in os.fwalk(path):
        os.fchmod(directory, 0o700)  # what is complete was made read-only
    remove_tree(path)


def _remove_home(home: Home) -> None:
    last = [home.root / _MARK, home.serve_lock]
    # The catalog before what it speaks of: whoever opens what is left finds an empty home.
    for path in sorted(home.root.iterdir(), key=lambda path: not _of_catalog(path)):
        if path in last:
            continue
        if path.is_dir() and not path.is_symlink():
            _remove_tree(path)
        else:
            path.unlink(missing_ok=True)
    for path in last:
        path.unlink(missing_ok=True)
    try:
        home.root.rmdir()
    except OSError:
        # A file system of its own is mounted there, or the directory above belongs to another.
        if any(home.root.iterdir()):
            raise


def _of_catalog(path: Path) -> bool:
    return path.name.startswith("catalog.")
