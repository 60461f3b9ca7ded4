"""The pair of processes that serves snapshots: real ones, a real mount, no guest."""

from __future__ import annotations

import os
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from diapause.catalog import SnapshotRecord
from diapause.driver.process import find_by_argument
from diapause.errors import PagerUnavailable
from diapause.pager import process
from diapause.pager.client import Pager
from diapause.sandbox.host import Host
from tests.framework.fake_home import eventually
from tests.framework.pagers import spec

WAIT_S = 60.0


def uncached(path: Path) -> bytes:
    """A file's bytes, asked of the pager again."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def check(host: Host, pager: Pager, record: SnapshotRecord) -> None:
    """Every byte is the flat file's."""
    flat = host.flats.ensure(record)
    for device in record.devices:
        found = uncached(pager.path(f"{record.id}.{device.name}"))
        assert found == flat.files[device.name].read_bytes(), device.name


def test_every_byte_is_the_snapshot_s(host: Host, pager: Pager, record: SnapshotRecord) -> None:
    assert pager.names() == sorted(f"{record.id}.{d.name}" for d in record.devices)
    check(host, pager, record)


def test_it_is_mounted_nowhere(pager: Pager, record: SnapshotRecord) -> None:
    """Nobody can come upon it, unmount it, or be held up by it."""
    found = pager.path(f"{record.id}.memory").stat()
    assert found.st_size > 0
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    devices = {line.split()[2] for line in mounts}
    assert f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}" not in devices


@pytest.mark.parametrize("who", ["pager", "keeper"])
def test_the_other_starts_it_again(
    host: Host, pager: Pager, record: SnapshotRecord, who: str
) -> None:
    """With all that it had, the same instance."""
    first = pager.pair(start=False)
    for _ in range(5):
        pair = pager.pair(start=False)
        dead = pair.pid if who == "pager" else pair.keeper_pid
        os.kill(dead, signal.SIGKILL)
        check(host, pager, record)
        eventually("another", partial(is_replaced, pager, dead), WAIT_S)
    assert pager.pair(start=False).instance == first.instance


def is_replaced(pager: Pager, dead: int) -> bool:
    pair = pager.pair(start=False)
    return dead not in (pair.pid, pair.keeper_pid)


def test_when_both_die_there_is_none_and_another_can_be_started(
    host: Host, pager: Pager, record: SnapshotRecord
) -> None:
    pair = pager.pair(start=False)
    for signal_ in (signal.SIGSTOP, signal.SIGKILL):  # neither starts the other meanwhile
        for pid in (pair.pid, pair.keeper_pid):
            os.kill(pid, signal_)
    eventually("their end", lambda: not find_by_argument(process.name_of(host.home)), WAIT_S)
    with pytest.raises(PagerUnavailable, match="does not run"):
        pager.pair(start=False)
    with pytest.raises(OSError, match="not connected"):  # never zeros: it is an error
        uncached(pager.path(f"{record.id}.memory"))
    again = pager.pair(start=True)
    assert again.instance != pair.instance
    assert pager.names() == []


def test_who_runs_on_a_file_keeps_it_and_the_two(pager: Pager, record: SnapshotRecord) -> None:
    file = f"{record.id}.memory"
    with subprocess.Popen(["sleep", "600"]) as vmm:
        pidfd = os.pidfd_open(vmm.pid)
        pager.attach("one", [file], pidfd)
        os.close(pidfd)
        os.kill(pager.pair(start=False).pid, signal.SIGKILL)  # the next one knows it as well
        assert pager.seen("one")["pid"] == vmm.pid
        with pytest.raises(PagerUnavailable, match="one runs on"):
            pager.remove(file)
        with pytest.raises(PagerUnavailable, match="one runs"):
            pager.stop()
        vmm.kill()
        vmm.wait()
        assert pager.detach("one") is None
    pager.remove(file)
    assert file not in pager.names()


def test_what_was_counted_stays_when_a_file_goes(pager: Pager, record: SnapshotRecord) -> None:
    """Also over all files together; nobody waits."""
    file = f"{record.id}.memory"
    data = uncached(pager.path(file))

    def bytes_read() -> int:
        return sum(of["bytes"] for of in pager.totals()["totals"]["reads"].values())

    eventually("the count: a read is answered first", lambda: bytes_read() >= len(data), 10.0)
    said = pager.totals()
    reads = said["totals"]["reads"]
    assert all(sum(of["below_us"]) == of["count"] for of in reads.values())
    pager.remove(file)
    assert pager.totals() == said
    assert (said["totals"]["stalls"], said["stalled"]) == (0, {})


@pytest.mark.parametrize(
    ("ask", "cause"),
    [
        ({"put": {"name": "../x", "spec": {}}}, "missing field"),
        ({"nothing": {}}, "unknown variant"),
        ({"attach": {"sandbox": "a", "files": []}}, "handle of a process"),
        ({"seen": {"sandbox": "nobody"}}, "no VMM"),
    ],
)
def test_what_makes_no_sense_is_refused_and_costs_nobody_anything(
    host: Host, pager: Pager, record: SnapshotRecord, ask: dict[str, Any], cause: str
) -> None:
    pid = pager.pair(start=False).pid
    with pytest.raises(PagerUnavailable, match=cause):
        pager.ask(ask)
    assert pager.pair(start=False).pid == pid
    check(host, pager, record)


def test_a_name_that_leads_elsewhere_is_refused(
    host: Host, pager: Pager, record: SnapshotRecord
) -> None:
    for name in ("", "..", "a/b", ".hidden", "x" * 200):
        with pytest.raises(PagerUnavailable, match="is no name"):
            pager.put(name, spec(host, record, "memory"))


def test_it_ends_when_nobody_needs_it(host: Host, pager: Pager) -> None:
    pager.stop()
    eventually("their end", lambda: not find_by_argument(process.name_of(host.home)), WAIT_S)
