"""Served files that are passed through to flat ones: real ones, a real mount, real mappings."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from diapause import _core
from diapause.catalog import SnapshotRecord
from diapause.errors import PagerUnavailable
from diapause.pager.client import Pager
from diapause.sandbox.host import Host
from diapause.snapshot.passing import Passing
from tests.framework.fake_home import eventually
from tests.framework.pagers import spec
from tests.pager.test_traces import GRANULE, vmm

WAIT_S = 60.0


class Mapped:
    """A served file, open and mapped."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        found = os.fstat(self._fd)
        self.passed = found.st_mtime_ns != 0  # as the file behind it says; a served one has none
        self.inode = found.st_ino
        self._map = mmap.mmap(self._fd, found.st_size, prot=mmap.PROT_READ)

    def bytes(self) -> bytes:
        """By the mapping; the same as by reads."""
        read = os.pread(self._fd, len(self._map), 0)
        assert read == self._map[:]
        return read

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)


class Case:
    """A snapshot's memory: its flat file, and the file of the pager that stands for it."""

    def __init__(self, host: Host, pager: Pager, record: SnapshotRecord) -> None:
        self.host, self.pager, self.record = host, pager, record
        self.name = f"{record.id}.memory"
        self.flat = host.home.flat_of(record.id) / "memory"
        self.model = self.flat.read_bytes()
        self.passing = Passing(host.flats, pager)
        self._scope = contextlib.ExitStack()

    def offer(self) -> None:
        """As a resume does."""
        names = {device.name: f"{self.record.id}.{device.name}" for device in self.record.devices}
        self.passing.offer(self.record, names, self.pager.pair(start=False).instance)

    def open(self) -> Mapped:
        """Open and mapped until the test ends."""
        mapped = Mapped(self.pager.path(self.name))
        self._scope.callback(mapped.close)
        return mapped

    def right(self, mapped: Mapped, *, passed: bool) -> None:
        assert mapped.passed is passed
        assert mapped.bytes() == self.model

    def reads(self) -> int:
        """Reads that were answered, of all files."""
        return sum(of["count"] for of in self.pager.totals()["totals"]["reads"].values())

    def replace_pager(self) -> None:
        dead = self.pager.pair(start=False).pid
        os.kill(dead, signal.SIGKILL)
        eventually("another", lambda: self.pager.pair(start=False).pid != dead, WAIT_S)

    def close(self) -> None:
        self._scope.close()


@pytest.fixture
def case(host: Host, pager: Pager, record: SnapshotRecord) -> Iterator[Case]:
    with contextlib.closing(Case(host, pager, record)) as case:
        yield case


def test_every_byte_is_the_flat_file_s_and_nothing_is_served(case: Case) -> None:
    case.offer()
    case.right(case.open(), passed=True)
    case.right(case.open(), passed=True)  # another, while the first is open
    disk = Mapped(case.pager.path(f"{case.record.id}.disk0"))
    assert disk.passed
    assert disk.bytes() == case.flat.with_name("disk0").read_bytes()
    disk.close()
    assert case.reads() == 0


def test_it_has_the_same_number_either_way(case: Case) -> None:
    """By which a VMM's memory is found among its mappings, whatever it was opened as."""
    served = case.open()
    case.offer()
    passed = case.open()
    assert served.inode == passed.inode
    lines = Path("/proc/self/maps").read_text().splitlines()
    named = [line for line in lines if f"/{case.name}" in line]
    assert len(named) == 2
    assert all(f" {served.inode} " in line for line in named)


def test_who_has_it_open_goes_on_with_what_they_have(case: Case) -> None:
    """Served, then passed through, then served again; all open at once."""
    first = case.open()
    case.offer()
    second = case.open()
    case.passing.take_back(case.record.id, ["memory", "disk0"])
    third = case.open()
    case.offer()
    fourth = case.open()
    for mapped, passed in ((first, False), (second, True), (third, False), (fourth, True)):
        case.right(mapped, passed=passed)


def test_a_pager_that_dies_is_not_missed_and_the_next_passes_it_through(case: Case) -> None:
    case.offer()
    before = case.open()
    for _ in range(5):
        pid = case.pager.pair(start=False).pid
        os.kill(pid, signal.SIGSTOP)
        case.right(before, passed=True)  # nobody is asked
        os.kill(pid, signal.SIGCONT)
        case.replace_pager()
        case.right(case.open(), passed=True)
    case.right(before, passed=True)
    assert case.reads() == 0


def test_a_keeper_that_dies_takes_nothing_along(case: Case) -> None:
    case.offer()
    before, keeper = case.open(), case.pager.pair(start=False).keeper_pid
    os.kill(keeper, signal.SIGKILL)
    eventually("another", lambda: case.pager.pair(start=False).keeper_pid != keeper, WAIT_S)
    case.replace_pager()
    case.right(case.open(), passed=True)
    case.right(before, passed=True)


def test_flat_files_that_go_stay_for_who_has_them_open(case: Case) -> None:
    case.offer()
    before = case.open()
    case.host.flats.on_gone = case.passing.take_back
    case.host.flats.drop(case.record.id)
    case.right(before, passed=True)
    case.right(case.open(), passed=False)
    case.host.flats.ensure(case.record)
    case.offer()
    case.right(case.open(), passed=True)
    case.right(before, passed=True)


def touched(case: Case) -> None:
    os.utime(case.flat)


def missing(case: Case) -> None:
    case.flat.unlink()


def cut(case: Case) -> None:
    os.truncate(case.flat, len(case.model) - 4096)


def another(case: Case) -> None:
    copy = case.flat.with_name("copy")
    shutil.copy2(case.flat, copy)
    copy.rename(case.flat)


def unreadable(case: Case) -> None:
    case.flat.rename(case.flat.with_name("away"))
    case.flat.symlink_to("away")


def unmarked(case: Case) -> None:
    case.flat.with_name("flat.json").unlink()


def torn(case: Case) -> None:
    case.flat.with_name("flat.json").write_text("{")


@pytest.mark.parametrize(
    "spoil",
    [touched, missing, cut, another, unreadable, unmarked, torn],
    ids=lambda of: of.__name__,
)
def test_a_flat_file_that_is_not_as_it_was_made_is_not_used(
    case: Case, spoil: Callable[[Case], None]
) -> None:
    """Also where it was before; who has it open keeps it, cut or not."""
    case.offer()
    case.right(case.open(), passed=True)
    spoil(case)
    case.offer()
    case.right(case.open(), passed=False)


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda case, _: os.open(case.flat.with_name("flat.json"), os.O_RDONLY), "another size"),
        (lambda case, _: os.open(case.flat.parent, os.O_RDONLY), "no file"),
        (lambda _, pipe: os.dup(pipe), "no file"),
        (lambda case, _: os.open(case.pager.path(case.name), os.O_RDONLY), "EINVAL|ELOOP|links"),
    ],
    ids=["of another size", "directory", "pipe", "on a stacked file system"],
)
def test_what_can_t_stand_for_it_is_said_and_it_is_served(
    case: Case, make: Callable[[Case, int], int], cause: str
) -> None:
    reader, writer = os.pipe()
    fd = make(case, reader)
    try:
        said = case.pager.pass_through(case.name, fd)
    finally:
        for one in (fd, reader, writer):
            os.close(one)
    assert said is not None
    assert any(word in said for word in cause.split("|")), said
    case.right(case.open(), passed=False)


def test_what_makes_no_sense_is_refused(case: Case) -> None:
    with case.flat.open("rb") as file, pytest.raises(PagerUnavailable, match="no file nobody"):
        case.pager.pass_through("nobody", file.fileno())
    with case.flat.open("rb") as file, pytest.raises(PagerUnavailable, match="one file at most"):
        case.pager.ask({"pass": {"name": case.name}}, (file.fileno(), file.fileno()))
    case.right(case.open(), passed=False)


def is_free(path: Path) -> bool:
    """Whether nobody has a file open, the kernel neither: else no lease for writing is given."""
    with path.open("rb+") as file:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except BlockingIOError:
            return False
        return True


@pytest.mark.parametrize("dies", [False, True], ids=["the pager lives", "the pager dies"])
def test_what_was_taken_back_is_let_go_of(case: Case, dies: bool) -> None:
    """A file that nobody passes through any more takes no space once it is removed."""
    case.offer()
    with contextlib.closing(Mapped(case.pager.path(case.name))) as mapped:
        assert mapped.passed
    assert not is_free(case.flat)
    case.passing.take_back(case.record.id, ["memory"])
    if dies:
        case.replace_pager()
    eventually("its end", partial(is_free, case.flat), WAIT_S)


def test_a_file_that_is_removed_is_passed_through_no_more(case: Case) -> None:
    case.offer()
    before = case.open()
    case.pager.remove(case.name)
    with pytest.raises(FileNotFoundError):
        case.open()
    case.right(before, passed=True)


def test_nothing_is_recorded_of_it_or_brought_ahead(case: Case, tmp_path: Path) -> None:
    """The kernel maps more of a plain file than is touched; and nobody would look there."""
    trace = tmp_path / "trace"
    with vmm(case.pager, case.name) as one:
        one.touch(9)
        case.pager.trace("one", case.name, None, trace)
    case.offer()
    with vmm(case.pager, case.name) as one:
        before = one.reads()
        at = 3 * GRANULE
        assert one.touch(3) == case.model[at : at + GRANULE]
        with pytest.raises(PagerUnavailable, match="is passed through"):
            case.pager.trace("one", case.name, trace, trace)
        assert case.pager.touched("one", case.name)["pages"] >= GRANULE // 4096
        assert case.pager.prefetch(case.name, trace, 1 << 30) == 0
        assert one.reads() == before
    case.passing.take_back(case.record.id, ["memory"])
    assert case.pager.path(case.name).stat().st_mtime_ns == 0
    assert case.pager.prefetch(case.name, trace, 1 << 30) == GRANULE


@pytest.mark.parametrize("passed", [False, True], ids=["served", "passed through"])
def test_what_is_in_memory_of_it_is_counted_either_way(case: Case, passed: bool) -> None:
    """Of one that is passed through, as the flat file; of another flat file by now, not at all."""
    if passed:
        case.offer()
    with vmm(case.pager, case.name) as one:
        one.touch(3)
        ask = partial(_core.cached_bytes, one.process.pid)
        [found] = ask([(case.name, str(case.flat))])
        assert found is not None
        assert found[1] is passed
        assert found[0] is not None
        assert found[0] >= GRANULE
        os.utime(case.flat)
        assert ask([(case.name, str(case.flat))]) == [(None, True) if passed else found]


NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
AS_ANOTHER = """
import json, os, sys
from pathlib import Path
from diapause.pager.client import Pager
from diapause.store.home import Home
home, name, spec, flat = sys.argv[1:]
pager = Pager(Home.at(Path(home)))
pager.pair(start=True)
pager.put(name, json.loads(spec))
cause = pager.pass_through(name, os.open(flat, os.O_RDONLY))
right = pager.path(name).read_bytes() == Path(flat).read_bytes()
said = pager.totals()["totals"]["reads"]
pager.stop()
print(json.dumps([cause, right, sum(of["count"] for of in said.values()) > 0]))
"""


def test_a_user_who_may_not_is_served(host: Host, record: SnapshotRecord) -> None:
    """Root of a user namespace may mount, and has no right outside: as any ordinary user."""
    name, flat = f"{record.id}.memory", host.home.flat_of(record.id) / "memory"
    arguments = (str(host.home.root), name, json.dumps(spec(host, record, "memory")), str(flat))
    done = subprocess.run(
        [*NAMESPACE, sys.executable, "-c", AS_ANOTHER, *arguments],
        capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cause, right, served = json.loads(done.stdout)
    assert "EPERM" in cause or "not permitted" in cause
    assert right
    assert served
