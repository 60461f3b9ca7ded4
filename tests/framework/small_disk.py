"""A home on a file system that can be filled to the last byte and emptied again."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from diapause.guest.images import Image
from diapause.store.home import Home
from diapause.units import MIB
from tests.framework.processes import end_processes
from tests.framework.sandbox import Daemon, link_image, remove_closed

_BLOCK_BYTES = 4096


class SmallDisk:
    """The file system below a home, as large as said."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._ballast = home.root / "ballast"

    def free_bytes(self) -> int:
        """What an ordinary writer could still write."""
        found = os.statvfs(self.home.root)
        return found.f_bavail * found.f_frsize

    def fill(self, leave_bytes: int = 0) -> None:
        """Take everything but so much, at once."""
        fd = os.open(self._ballast, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        piece = self.free_bytes()
        try:
            # By halves: what describes the blocks takes some as well.
            while piece >= _BLOCK_BYTES and (free := self.free_bytes() - leave_bytes) > 0:
                piece = min(piece, free)
                try:
                    os.posix_fallocate(fd, os.fstat(fd).st_size, piece)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    piece //= 2
        finally:
            os.close(fd)

    def empty(self) -> None:
        """Give it back."""
        self._ballast.unlink(missing_ok=True)


@contextlib.contextmanager
def mounted(place: Path, image: Path, size_bytes: int) -> Iterator[None]:
    """A fresh ext4 of this size in the file `image`, at a directory; needs root, for the mount."""
    with image.open("xb") as file:
        file.truncate(size_bytes)
    place.mkdir(mode=0o700, exist_ok=True)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
        image.unlink()


@contextlib.contextmanager
def home_on_small_disk(image: Image, size_bytes: int = 1536 * MIB) -> Iterator[SmallDisk]:
    """A home of its own there, with the image in it; everything is gone afterwards."""
    place = Path(tempfile.mkdtemp(prefix="dia-"))
    # Not tmpfs: it would take space for each hole of a memory file that a guest only reads.
    with mounted(place / "m", place / "image", size_bytes):
        home = Home.at(place / "m" / "h").create()
        link_image(home, image)
        try:
            yield SmallDisk(home)
        finally:
            end_processes(home)
            for directory in (home.root, home.sockets, home.buffers):
                remove_closed(directory)
    remove_closed(place)


def daemon_of(disk: SmallDisk) -> Daemon:
    """The daemon of the home there."""
    return Daemon(disk.home)
