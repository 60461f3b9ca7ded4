"""What a process touched of a file becomes a trace, and a trace is given to the kernel ahead."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.catalog import SnapshotRecord
from diapause.errors import PagerUnavailable
from diapause.pager.client import Pager
from diapause.sandbox.host import Host
from diapause.units import MIB
from tests.framework import captured_home as made
from tests.framework.fake_home import eventually

WAIT_S = 60.0
GRANULE = 65536
GRANULES = made.MEMORY_BYTES // GRANULE
# Maps the file that it was handed, as a VMM does, and touches what it is told to.
VMM = """
import mmap, os, sys
file = int(sys.argv[1])
size = os.fstat(file).st_size
memory = mmap.mmap(file, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
memory.madvise(mmap.MADV_RANDOM)
print("ready", flush=True)
for line in sys.stdin:
    at = int(line) * 65536
    print(memory[at : at + 65536].hex(), flush=True)
"""


class Vmm:
    """A process that runs on a snapshot's memory, attached to the pager."""

    def __init__(self, pager: Pager, name: str, sandbox: str) -> None:
        self._pager, self.name, self.sandbox = pager, name, sandbox
        with pager.path(name).open("rb") as file:
            command = [sys.executable, "-c", VMM, str(file.fileno())]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                pass_fds=[file.fileno()],
            )  # fmt: skip
        assert self._line() == "ready"
        pidfd = os.pidfd_open(self.process.pid)
        pager.attach(sandbox, [name], pidfd)
        os.close(pidfd)

    def touch(self, granule: int) -> bytes:
        """What it reads of a granule."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{granule}\n")
        self.process.stdin.flush()
        return bytes.fromhex(self._line())

    def reads(self) -> int:
        """Reads that the pager answered of its file, of whoever asked."""
        [file] = self._pager.seen(self.sandbox)["files"]
        return sum(reads["count"] for reads in file["seen"]["reads"].values())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._pager.detach(self.sandbox)

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@contextlib.contextmanager
def vmm(pager: Pager, name: str, sandbox: str = "one") -> Iterator[Vmm]:
    made = Vmm(pager, name, sandbox)
    try:
        yield made
    finally:
        made.end()


def granules_of(trace: Path) -> list[int]:
    data = trace.read_bytes()
    (count,) = struct.unpack_from("<I", data, 28)
    return [struct.unpack_from("<I", data, 32 + 8 * at)[0] for at in range(count)]


def uncache(pager: Pager, name: str) -> None:
    """The page cache has nothing of it."""
    with pager.path(name).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def name(record: SnapshotRecord) -> str:
    return f"{record.id}.memory"


@pytest.fixture
def expected(host: Host, record: SnapshotRecord) -> bytes:
    return host.flats.ensure(record).files["memory"].read_bytes()


def test_what_is_touched_is_recorded_in_order_and_merged(
    pager: Pager, name: str, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.memory", tmp_path / "second.memory"
    uncache(pager, name)
    with vmm(pager, name) as one:
        for granule in (9, 2, 70):
            one.touch(granule)
        pager.trace("one", name, None, first)
    assert granules_of(first) == [9, 2, 70]
    uncache(pager, name)
    with vmm(pager, name) as two:
        for granule in (33, 9):
            two.touch(granule)
        pager.trace("one", name, first, second)
    assert granules_of(second) == [9, 2, 70, 33]


def test_a_trace_is_brought_ahead_and_its_pages_are_right(
    pager: Pager, name: str, tmp_path: Path, expected: bytes
) -> None:
    """The next one asks for nothing that is in it."""
    trace, wanted = tmp_path / "a.memory", [9, 2, 70, 10, 127]
    with vmm(pager, name) as one:
        for granule in wanted:
            one.touch(granule)
        pager.trace("one", name, None, trace)
    uncache(pager, name)
    assert pager.prefetch(name, trace, MIB) == len(wanted) * GRANULE
    with vmm(pager, name) as two:
        before = two.reads()
        eventually("what is brought", lambda: _stored(pager, two) == len(wanted) * GRANULE, WAIT_S)
        for granule in wanted[:3]:
            at = granule * GRANULE
            assert two.touch(granule) == expected[at : at + GRANULE]
        assert two.reads() == before
        found = pager.touched("one", name)
        assert found == {
            "pages": 3 * 16, "prefetched_pages": len(wanted) * 16, "used_pages": 3 * 16,
            "late": False,
        }  # fmt: skip
        at = 50 * GRANULE
        assert two.touch(50) == expected[at : at + GRANULE]
        assert two.reads() > before


def test_what_is_used_of_what_was_brought_is_counted_once(
    pager: Pager, name: str, tmp_path: Path
) -> None:
    """Of each VMM by its own mapping; of all together each granule once."""
    trace, wanted = tmp_path / "a.memory", [9, 2, 70]
    with vmm(pager, name) as one:
        for granule in wanted:
            one.touch(granule)
        pager.trace("one", name, None, trace)
    uncache(pager, name)
    pager.prefetch(name, trace, MIB)
    with vmm(pager, name) as two, vmm(pager, name, "two") as three:
        eventually("what is brought", lambda: _stored(pager, two) == len(wanted) * GRANULE, WAIT_S)
        assert pager.used("one", name)["used_pages"] == 0
        for granule in (9, 2, 50):
            two.touch(granule)
        three.touch(9)
        for sandbox, used in (("one", 2), ("one", 2), ("two", 1)):
            assert pager.used(sandbox, name) == {
                "pages": used * 16, "prefetched_pages": 3 * 16, "used_pages": used * 16,
                "late": False,
            }  # fmt: skip
        totals = pager.totals()["totals"]
        assert (totals["stored_bytes"], totals["used_bytes"]) == (3 * GRANULE, 2 * GRANULE)
    with pytest.raises(PagerUnavailable, match="no VMM"):
        pager.used("one", name)


def test_a_pager_that_died_in_between_costs_only_order(
    pager: Pager, name: str, tmp_path: Path
) -> None:
    """What was touched before its death is in the trace, before what was touched after it."""
    first, second = tmp_path / "first.memory", tmp_path / "second.memory"
    uncache(pager, name)
    with vmm(pager, name) as one:
        for granule in (9, 2, 70):
            one.touch(granule)
        before = pager.pair(start=False).pid
        os.kill(before, signal.SIGKILL)
        for granule in (33, 5):
            one.touch(granule)
        found = pager.touched("one", name)
        assert found == {
            "pages": 5 * 16, "prefetched_pages": 0, "used_pages": 0, "late": True,
        }  # fmt: skip
        pager.trace("one", name, None, first)
        assert pager.pair(start=False).pid != before
    assert granules_of(first) == [2, 9, 70, 33, 5]
    uncache(pager, name)
    assert pager.prefetch(name, first, MIB) == 5 * GRANULE
    with vmm(pager, name) as two:
        eventually("what is brought", lambda: _stored(pager, two) == 5 * GRANULE, WAIT_S)
        before = two.reads()
        for granule in (70, 5):
            two.touch(granule)
        assert two.reads() == before
        pager.trace("one", name, first, second)
        assert pager.used("one", name)["late"] is False
    assert granules_of(second) == [2, 9, 70, 33, 5]


def _stored(pager: Pager, one: Vmm) -> int:
    [file] = pager.seen(one.sandbox)["files"]
    stored: int = file["seen"]["stored_bytes"]
    return stored


def test_a_budget_is_kept_and_nothing_is_brought_twice(
    pager: Pager, name: str, tmp_path: Path
) -> None:
    trace = tmp_path / "a.memory"
    with vmm(pager, name) as one:
        for granule in range(0, GRANULES, 2):
            one.touch(granule)
        pager.trace("one", name, None, trace)
    uncache(pager, name)
    assert pager.prefetch(name, trace, 10 * GRANULE) == 10 * GRANULE
    assert pager.prefetch(name, trace, 1 << 40) == (GRANULES // 2 - 10) * GRANULE
    assert pager.prefetch(name, trace, 1 << 40) == 0


def test_a_trace_that_is_none_is_refused_and_none_is_needed(
    pager: Pager, name: str, tmp_path: Path, expected: bytes
) -> None:
    """One that is damaged is as good as none, also for the next one that is written."""
    trace = tmp_path / "a.memory"
    with pytest.raises(PagerUnavailable, match="No such file"):
        pager.prefetch(name, trace, MIB)
    with vmm(pager, name) as one:
        one.touch(5)
        pager.trace("one", name, None, trace)
        whole = trace.read_bytes()
        trace.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(PagerUnavailable, match="digest"):
            pager.prefetch(name, trace, MIB)
        pager.trace("one", name, trace, trace)
        assert trace.read_bytes() == whole
    with pytest.raises(PagerUnavailable, match="no VMM"):
        pager.trace("one", name, None, trace)


def test_bytes_that_are_damaged_are_not_brought(
    host: Host, pager: Pager, record: SnapshotRecord, name: str, tmp_path: Path
) -> None:
    """What is stored is verified: nothing of a frame that can't be."""
    trace = tmp_path / "a.memory"
    with vmm(pager, name) as one:
        one.touch(1)
        pager.trace("one", name, None, trace)
    uncache(pager, name)
    builds = next(device.builds for device in record.devices if device.name == "memory")
    for build in builds:
        path = host.home.builds / build
        data = bytearray(path.read_bytes())
        for at in range(64, len(data) - 200, 512):
            data[at] ^= 1
        fresh = path.with_name("fresh")
        fresh.write_bytes(data)
        fresh.replace(path)
    assert pager.prefetch(name, trace, MIB) == GRANULE
    eventually("its end", lambda: "brought ahead" in host.home.pager_log.read_text(), WAIT_S)
    with vmm(pager, name) as two:
        assert _stored(pager, two) == 0
