"""The console as a stream: over both of its files, from its last lines, through a rotation."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from diapause.daemon.logs import READ_BYTES, Console
from tests.framework.fake_home import FakeHome, eventually


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "sandbox").mkdir()
    return tmp_path / "sandbox" / "console.log"


def read_all(reader: Console) -> bytes:
    """What there is now."""
    found = b""
    while data := reader.read(READ_BYTES):
        found += data
    return found


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def rename(path: Path) -> None:
    path.replace(f"{path}.1")
    path.touch()


def copy_and_cut(path: Path) -> None:
    shutil.copyfile(path, f"{path}.new")
    Path(f"{path}.new").replace(f"{path}.1")
    os.truncate(path, 0)


def test_both_files_are_one_console(path: Path) -> None:
    Path(f"{path}.1").write_bytes(b"older\n" * 20_000)
    path.write_bytes(b"newer\n" * 20_000)
    reader = Console(path)
    assert reader.start() == 240_000
    assert read_all(reader) == b"older\n" * 20_000 + b"newer\n" * 20_000


@pytest.mark.parametrize("rotate", [rename, copy_and_cut])
@pytest.mark.parametrize("unread", [b"", b"not read yet\n"])
def test_a_follower_misses_nothing_of_a_rotation(path: Path, rotate: object, unread: bytes) -> None:
    path.write_bytes(b"first\n")
    reader = Console(path)
    reader.start()
    assert read_all(reader) == b"first\n"
    for round_ in range(3):
        append(path, unread)
        rotate(path)  # type: ignore[operator]
        append(path, b"after %d and longer than what was there before\n" % round_)
        got = read_all(reader)
        assert got == unread + b"after %d and longer than what was there before\n" % round_
    assert reader.read(READ_BYTES) == b""
    shutil.rmtree(path.parent)
    assert reader.read(READ_BYTES) is None
    reader.close()


def test_a_file_that_is_missing_between_two_steps_does_not_end_a_follower(path: Path) -> None:
    path.write_bytes(b"first\n")
    reader = Console(path)
    reader.start()
    assert read_all(reader) == b"first\n"
    path.replace(f"{path}.1")
    assert reader.read(READ_BYTES) == b""
    path.write_bytes(b"second\n")
    assert read_all(reader) == b"second\n"
    path.unlink()
    assert reader.read(READ_BYTES) == b""
    reader.close()


def test_a_console_that_is_not_there_yet_is_waited_for(path: Path) -> None:
    reader = Console(path)
    assert (reader.start(), reader.read(READ_BYTES)) == (0, b"")
    path.write_bytes(b"first\n")
    assert read_all(reader) == b"first\n"
    reader.close()


def test_a_console_that_was_cut_begins_again(path: Path) -> None:
    path.write_bytes(b"a long beginning\n")
    reader = Console(path)
    reader.start()
    read_all(reader)
    path.write_bytes(b"new\n")
    assert reader.read(READ_BYTES) == b""
    assert read_all(reader) == b"new\n"


@pytest.mark.parametrize(
    ("tail", "wanted"),
    [(0, b""), (1, b"six"), (2, b"five\nsix"), (3, b"four\nfive\nsix"), (5, None), (99, None)],
)
def test_the_last_lines_over_both_files(path: Path, tail: int, wanted: bytes | None) -> None:
    Path(f"{path}.1").write_bytes(b"two\nthree\nfo")
    path.write_bytes(b"ur\nfive\nsix")
    reader = Console(path, tail)
    everything = b"two\nthree\nfour\nfive\nsix"
    expected = everything if wanted is None else wanted
    assert reader.start() == len(expected)
    assert read_all(reader) == expected


def test_a_line_end_at_the_end_begins_no_line(path: Path) -> None:
    path.write_bytes(b"one\ntwo\n" + b"x" * (READ_BYTES + 10) + b"\nlast\n")
    for tail, size in ((1, 5), (2, READ_BYTES + 16), (3, READ_BYTES + 20)):
        assert Console(path, tail).start() == size


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    path.symlink_to(tmp_path / "secret")
    reader = Console(path)
    with pytest.raises(OSError, match="Too many levels"):
        reader.start()


def test_logs_by_the_command_line(place: FakeHome) -> None:
    directory = place.home.sandbox(place.sandbox())
    directory.mkdir()
    (directory / "console.log.1").write_bytes(b"one\ntwo\n")
    (directory / "console.log").write_bytes(b"three\n")
    assert place.run("logs", "web").stdout == b"one\ntwo\nthree\n"
    assert place.run("logs", "--tail", "2", "web").stdout == b"two\nthree\n"
    assert place.run("logs", "--tail", "x", "web").returncode == 2
    following = place.spawn("logs", "-f", "--tail", "1", "web")
    assert following.stdout is not None
    try:
        assert following.stdout.readline() == b"three\n"
        (directory / "console.log").replace(directory / "console.log.1")
        (directory / "console.log").write_bytes(b"four\n")
        assert following.stdout.readline() == b"four\n"
        shutil.rmtree(directory)
        eventually("the end of the stream", lambda: following.poll() is not None, 60)
    finally:
        following.kill()
        following.communicate()
