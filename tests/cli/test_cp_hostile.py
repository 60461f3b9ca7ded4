"""What a hostile guest sends to a copy: refused whole, by name, with nothing of it kept."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from diapause._core import archive_unpack
from diapause.errors import ArchiveRefused
from tests.framework.fake_home import FakeHome
from tests.framework.hostile_streams import Hostile, Maker, hostile_streams

ALL = hostile_streams()


def snapshot(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and link below, with what changes when somebody touches it."""
    return {
        str(path.relative_to(directory)): (status.st_mode, status.st_size, status.st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        for status in [path.lstat()]
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture
def around(tmp_path: Path) -> Path:
    """A directory with a victim in it, in which the copy has a place of its own."""
    (tmp_path / "victim").write_text("safe")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "kept").write_text("kept")
    return tmp_path


@pytest.mark.parametrize("hostile", ALL, ids=lambda hostile: hostile.name)
def test_a_hostile_stream_is_refused_and_leaves_nothing(hostile: Hostile, around: Path) -> None:
    before = snapshot(around)
    with tempfile.TemporaryFile() as stream:
        stream.write(hostile.stream)
        stream.seek(0)
        with pytest.raises(ArchiveRefused) as refused:
            archive_unpack(stream.fileno(), str(around / "in"), b"top")
    assert snapshot(around) == before
    said = refused.value.message
    assert hostile.says in said
    assert said.isascii()
    assert said.isprintable()


def test_the_command_line_refuses_it_as_well(place: FakeHome, around: Path) -> None:
    place.sandbox("web")
    before = snapshot(around)
    for hostile in [one for one in ALL if one.name in ("through a link", "cut in data")]:
        (place.home.root / "hostile").write_bytes(hostile.stream)
        error = place.json("cp", "web:/top", str(around / "in"), code=52)["error"]
        assert error["code"] == "archive_refused"
        assert hostile.says in error["message"]
        assert snapshot(around) == before


def test_there_are_as_many_as_there_were() -> None:
    assert len(ALL) >= 45


def test_links_that_point_outside_are_data(place: FakeHome, around: Path) -> None:
    place.sandbox("web")
    stream = Maker().add("top/way", b"2", linkname="../../victim").end()
    (place.home.root / "hostile").write_bytes(stream)
    assert place.run("cp", "web:/top", str(around / "in")).returncode == 0
    assert str((around / "in" / "top" / "way").readlink()) == "../../victim"
    assert (around / "victim").read_text() == "safe"


def test_set_id_bits_of_a_guest_are_dropped_and_said(place: FakeHome, around: Path) -> None:
    place.sandbox("web")
    stream = Maker().add("top/su", mode=0o6755).end()
    (place.home.root / "hostile").write_bytes(stream)
    done = place.run("cp", "web:/top", str(around / "in"))
    assert done.returncode == 0
    assert b"top/su" in done.stderr
    assert (around / "in" / "top" / "su").stat().st_mode & 0o7777 == 0o755


def test_what_a_guest_reports_is_bounded_and_escaped(place: FakeHome, around: Path) -> None:
    place.sandbox("web")
    (place.home.root / "hostile").write_bytes(Maker().end())
    (place.home.root / "report").write_bytes(b'{"notes":["\\u001b]0;owned\\u0007\\u202e"]}')
    done = place.run("cp", "web:/top", str(around / "in"))
    assert done.returncode == 0
    assert b"\\x1b]0;owned\\x07\\u202e" in done.stderr
    assert b"\x1b" not in done.stderr
    (place.home.root / "report").write_bytes(b"x" * 500_000)
    assert place.json("cp", "web:/top", str(around / "other"), code=53)["error"]
