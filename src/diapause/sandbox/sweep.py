"""What belongs to nobody: processes and files that no row names, removed when a daemon starts.

A row comes after the files it speaks of and goes before them, so a file without a row is of a verb
that was killed. Shared data is not touched here: that is `gc`'s alone.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from diapause.catalog import is_unreadable
from diapause.driver.cgroup import Leaves
from diapause.driver.process import Pidfd
from diapause.driver.qemu import QemuDriver
from diapause.errors import PagerUnavailable, StorageFailed
from diapause.limits import VMM_EXIT_S
from diapause.pager.client import Pager
from diapause.store.files import remove_tree
from diapause.store.home import SCRATCH_START, Home

if TYPE_CHECKING:
    from pathlib import Path

    from diapause.sandbox.host import Host

log = logging.getLogger("diapause.sweep")


def end_strays(host: Host) -> None:
    """End every VMM of this home that is not the recorded process of a sandbox."""
    recorded = {
        (record.process.pid, record.process.start_ticks)
        for record in host.catalog.sandboxes()
        if record.process is not None
    }
    scratch_homes = [Home(path) for path in host.home.tmp.glob(f"{SCRATCH_START}*")]
    strays = [p for home in scratch_homes for p in QemuDriver(home, None).all_processes()]
    strays += [
        process
        for process in host.driver.all_processes()
        if (process.pid, process.start_ticks) not in recorded
    ]
    for process in strays:
        log.warning("VMM process %d belongs to no sandbox: ended", process.pid)
        pidfd = Pidfd(process)
        pidfd.kill()
        pidfd.wait(VMM_EXIT_S)
        pidfd.close()
    for home in scratch_homes:
        _end_pager(home)
        Leaves(home.key).sweep()
        _remove(home.buffers)
        _remove(home.sockets)


def _end_pager(home: Home) -> None:
    """Of a scratch home: its guests are ended, and no daemon comes that would need it."""
    pager = Pager(home)
    try:
        if pager.instance() is not None:
            pager.stop()
    except PagerUnavailable as error:
        log.warning("the pager of %s goes on: %s", home.root.name, error)
    finally:
        pager.close()


def sweep(host: Host) -> None:
    """Remove half-written files, captures without a row, buffers and sockets of what is gone."""
    home = host.home
    host.driver.leaves.sweep()  # after each row has said how its guest ended: a leaf knows
    captured = {
        row.id
        for row in host.catalog.snapshots(removed=True)
        if row.state == "captured" or is_unreadable(row)
    }
    running = {row.id for row in host.catalog.sandboxes() if row.process is not None}
    known = {row.id for row in host.catalog.sandboxes()}
    for path in home.tmp.iterdir():
        _remove(path)
    for path in home.captures.iterdir():
        if path.name not in captured:
            _remove(path)
    for path in home.buffers.iterdir():
        if path.name.split(".")[0] not in captured | running:
            _remove(path)
    for path in home.sandboxes.iterdir():
        if path.name not in known:
            _remove(path)
    lasting = {home.serve_socket.stem, home.pager_socket.stem}  # the pager outlives every daemon
    for path in home.sockets.iterdir():
        if path.name.split(".")[0] not in running | lasting:
            _remove(path)
    for path in home.flat.iterdir():
        if not (path / "flat.json").exists():  # never finished; a cache, made again when needed
            _remove(path)


def _remove(path: Path) -> None:
    """One that can't be removed keeps no home from opening: the next daemon tries again."""
    try:
        if path.is_dir():
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)
    except (OSError, StorageFailed) as error:
        log.warning("%s is left: %s", path, error)
