"""What tests of the pager share: what a file of it stands for, and the end of both processes."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

from diapause.pager.client import Pager

if TYPE_CHECKING:
    from diapause.catalog import SnapshotRecord
    from diapause.sandbox.host import Host
    from tests.framework.sandbox import Daemon


def spec(host: Host, record: SnapshotRecord, name: str) -> dict[str, Any]:
    """A device of a packed snapshot, as the pager is told of it."""
    device = next(d for d in record.devices if d.name == name)
    return {
        "size_bytes": device.size_bytes, "header_digest": device.header_digest,
        "header": str(host.home.snapshot(record.id) / f"{name}.header"),
        "blobs": {"kind": "directory", "path": str(host.home.builds)},
    }  # fmt: skip


def kill_both(daemon: Daemon) -> None:
    """Stopped first: neither starts the other again meanwhile."""
    with contextlib.closing(Pager(daemon.home)) as pager:
        pair = pager.pair(start=False)
    for signal_ in (signal.SIGSTOP, signal.SIGKILL):
        for pid in (pair.pid, pair.keeper_pid):
            os.kill(pid, signal_)
