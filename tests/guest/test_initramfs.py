"""The cpio archive: another program reads back what was put in."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diapause.guest.initramfs import Initramfs

NAMES = st.text("abcdefghij-_.0", min_size=1, max_size=20).filter(lambda name: name.strip("."))


def unpack(archive: Initramfs, directory: Path) -> None:
    """Busybox unpacks it, as it would any archive."""
    subprocess.run(
        ["busybox", "cpio", "-i", "-d"],
        input=gzip.decompress(archive.compressed()),
        cwd=directory, check=True, timeout=60, capture_output=True,
    )  # fmt: skip


@given(files=st.dictionaries(NAMES, st.binary(max_size=300), min_size=1, max_size=8))
def test_files_come_back(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    """Every content of every length under every name."""
    directory = tmp_path_factory.mktemp("unpacked")
    archive = Initramfs()
    archive.directory("d")
    for name, content in files.items():
        archive.file(f"d/{name}", content)
    unpack(archive, directory)
    assert {path.name: path.read_bytes() for path in (directory / "d").iterdir()} == files


def test_modes_and_links_come_back(tmp_path: Path) -> None:
    """A sticky directory, a program, a link."""
    archive = Initramfs()
    archive.directory("tmp", 0o1777)
    archive.directory("bin")
    archive.file("bin/busybox", b"program", 0o755)
    archive.link("bin/sh", "busybox")
    unpack(archive, tmp_path)
    assert oct((tmp_path / "tmp").stat().st_mode)[-4:] == "1777"
    assert (tmp_path / "bin/sh").readlink() == Path("busybox")
    assert (tmp_path / "bin/sh").read_bytes() == b"program"


def test_the_same_content_gives_the_same_bytes() -> None:
    """No time and no owner of the host is in it."""

    def make() -> bytes:
        archive = Initramfs()
        archive.file("init", b"x")
        return archive.compressed()

    assert make() == make()


@pytest.mark.parametrize("path", ["/init", "absent/file", "twice"])
def test_an_entry_has_one_place(path: str) -> None:
    """Relative, below a directory that is there, once."""
    archive = Initramfs()
    archive.file("twice", b"")
    with pytest.raises(AssertionError):
        archive.file(path, b"")
