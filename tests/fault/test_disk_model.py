"""The model of a disk whose power goes: what it keeps for certain, on calls of a real process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.framework.contents import same_bytes
from tests.framework.disk_model import Disk, Entry, Kept, State, Write
from tests.framework.strace import Call, recorded

_PROGRAM = """
import os, sys
sys.stdin.readline()
root = os.getcwd() + "/"
top = os.open(root, os.O_RDONLY)
def new(name, data, sync):
    fd = os.open(root + name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, data)
    sync and os.fsync(fd)
    os.close(fd)
new("synced", b"s" * 4096, True)
new("unsynced", b"u" * 4096, False)
os.mkdir(root + "directory")
os.fsync(top)
new("directory/inside", b"i" * 512, True)
os.rename(root + "synced", root + "directory/moved")
os.link(root + "unsynced", root + "second")
os.fsync(os.open(root + "directory", os.O_RDONLY))
fd = os.open(root + "old", os.O_WRONLY)
os.pwrite(fd, b"X" * 1024, 0)
os.unlink(root + "gone")
os.ftruncate(fd, 100)
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Call]]:
    """A tree before the program, the tree itself, and what the program asked of the system."""
    before, root = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("root")
    for directory in (before, root):
        (directory / "old").write_bytes(b"o" * 2048)
        (directory / "gone").write_bytes(b"g")
    command = [sys.executable, "-c", _PROGRAM]
    with (
        subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE) as program,
        recorded(program.pid) as found,
    ):
        program.communicate(b"\n", timeout=60)
    assert program.returncode == 0
    return before, root, found


def _left(
    calls: tuple[Path, Path, list[Call]], tmp_path: Path, data: Kept, names: Kept
) -> dict[str, bytes]:
    before, root, found = calls
    disk = Disk(root, before, {})
    for call in found:
        disk.apply(call)
    disk.state(data, names).build(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    return {str(path.relative_to(tmp_path)): path.read_bytes() for path in files}


def test_all_that_was_done(calls: tuple[Path, Path, list[Call]], tmp_path: Path) -> None:
    """With everything kept it is the tree that the program left."""
    root = calls[1]
    real = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert _left(calls, tmp_path, "all", "all") == real


def test_what_was_synced_and_nothing_else(
    calls: tuple[Path, Path, list[Call]], tmp_path: Path
) -> None:
    """Names without their directory's sync are not there; the moved file is, and once."""
    assert _left(calls, tmp_path, "none", "none") == {
        "directory/inside": b"i" * 512,
        "directory/moved": b"s" * 4096,
        "unsynced": b"",
        "old": b"o" * 2048,
        "gone": b"g",
    }


def test_names_before_their_bytes(calls: tuple[Path, Path, list[Call]], tmp_path: Path) -> None:
    """A name may be there and its file empty, or hold the first sectors of the last write."""
    left = _left(calls, tmp_path, "none", "all")
    assert (left["second"], left["old"]) == (b"", b"o" * 2048)
    assert "gone" not in left


def test_torn_bytes(calls: tuple[Path, Path, list[Call]], tmp_path: Path) -> None:
    left = _left(calls, tmp_path, "torn", "all")
    assert left["unsynced"] == b"u" * 2048
    assert left["old"] == b"X" * 1024 + b"o" * 1024


def test_states_that_differ_in_bytes_below_tmp_alone_are_one() -> None:
    """A name there, and a byte elsewhere, make another state."""

    def key(path: str, data: bytes) -> int:
        return State((Entry(path, (1, None, False, (Write(0, data),))),)).key

    assert key("tmp/new", b"1") == key("tmp/new", b"2")
    different = {key("tmp/new", b"1"), key("tmp/old", b"1"), key("new", b"1"), key("new", b"2")}
    assert len(different) == 4


def test_a_comparison_sees_each_byte_and_no_hole(tmp_path: Path) -> None:
    size = 5 << 20
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(size))
    with other.open("wb") as file:
        file.truncate(size)
    assert same_bytes(one, other)
    for at in (0, (3 << 20) + 7, size - 1):
        with other.open("r+b") as file:
            file.seek(at)
            file.write(b"x")
            file.flush()
            assert not same_bytes(one, other)
            assert not same_bytes(other, one)
            file.seek(at)
            file.write(b"\0")
    assert same_bytes(one, other)
    with other.open("ab") as file:
        file.truncate(size + 1)
    assert not same_bytes(one, other)
