"""Both processes killed while a thread of the pager gives the kernel a page that is being read.

That thread can't end before the read is answered, and holds what its process had: the socket, on
which nobody answers any more, and the connection to the kernel.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from diapause import _core
from diapause.catalog import SnapshotRecord
from diapause.pager import client
from diapause.pager.client import Pager
from diapause.sandbox.host import Host
from tests.framework.blobs import damage
from tests.framework.fake_home import eventually
from tests.framework.pagers import spec
from tests.pager.test_traces import vmm

WAIT_S = 60.0


def test_they_are_taken_for_dead_and_replaced(
    host: Host, pager: Pager, record: SnapshotRecord, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nothing is left of them, and whoever waited for an answer goes on with an error."""
    pair, trace = pager.pair(start=False), tmp_path / "trace"
    name, again = f"{record.id}.memory", "again.memory"
    with vmm(pager, name) as first:
        first.touch(0)
        pager.trace("one", name, None, trace)
    pager.put(again, spec(host, record, "memory"))
    header = host.home.snapshot(record.id) / "memory.header"
    [(build, _)] = _core.header_info(str(header), record.devices[0].header_digest).builds
    damage(host.home.builds / build, first_frame=1)

    command = ["dd", f"if={pager.path(again)}", "bs=128K", "count=1", "status=none"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as reader:
        eventually("the read is held", lambda: pager.totals()["totals"]["stalls"] > 0, WAIT_S)
        assert pager.prefetch(again, trace, 1 << 20) > 0
        eventually("the store waits", lambda: "D" in storing(pair.pid), WAIT_S)
        for signal_ in (signal.SIGSTOP, signal.SIGKILL):
            for pid in (pair.pid, pair.keeper_pid):
                os.kill(pid, signal_)
        eventually(
            "the keeper's end", lambda: not Path(f"/proc/{pair.keeper_pid}").exists(), WAIT_S
        )
        assert "D" in storing(pair.pid)
        monkeypatch.setattr(client, "PAGER_S", 1.0)
        with contextlib.closing(Pager(host.home)) as another:  # a daemon that was started since
            assert another.instance() is None
        got, _ = reader.communicate(timeout=WAIT_S)
    assert len(got) < 128 << 10  # what was stored ahead, or nothing
    assert (host.home.flat_of(record.id) / "memory").read_bytes().startswith(got)
    eventually("the pager's end", lambda: not Path(f"/proc/{pair.pid}").exists(), WAIT_S)

    monkeypatch.undo()
    assert pager.pair(start=True).instance != pair.instance


def storing(pid: int) -> str:
    """The states of the threads that store."""
    states = ""
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        name, _, rest = task.read_text().partition(" (")[2].rpartition(") ")
        states += rest[0] if name == "store" else ""
    return states
