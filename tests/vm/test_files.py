"""Nothing of a used home is open to anybody else, whatever umask its daemon was started with."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.guest.images import Image
from diapause.store.home import Home
from tests.framework.processes import end_processes
from tests.framework.sandbox import Daemon, link_image, real_home, remove_closed

pytestmark = pytest.mark.vm

_OPEN_TO_ALL = ("sh", "-c", 'umask 0; exec "$@"', "sh")
_OTHERS = 0o077


@pytest.fixture
def daemon(tiny_image: Image) -> Iterator[Daemon]:
    """A home whose daemon closes nothing that it doesn't close itself."""
    with real_home(tiny_image) as made:
        # The catalog, too, is to be the daemon's own work.
        yield Daemon(made.home, within=_OPEN_TO_ALL)


def modes(home: Home) -> dict[Path, tuple[int, int]]:
    """Every file and directory of a home with its mode and its directory's; what goes meanwhile
    is not in it."""
    found: dict[Path, tuple[int, int]] = {}
    for top in {home.root, home.sockets, home.buffers}:
        for path in [top, *top.rglob("*")]:
            try:
                status, above = path.lstat(), path.parent.lstat()
            except FileNotFoundError:
                continue
            if not stat.S_ISLNK(status.st_mode):
                found[path] = (status.st_mode, stat.S_IMODE(above.st_mode))
    return found


def wider(home: Home) -> dict[str, str]:
    """What others could open if they came to its directory, and what of it they come to."""
    return {
        str(path): oct(mode)
        for path, (mode, above) in modes(home).items()
        if mode & _OTHERS and not _is_let_be(home, path, mode, above)
    }


def _is_let_be(home: Home, path: Path, mode: int, above: int) -> bool:
    # What an image is made of is public, and nobody comes to it: `images` is closed.
    of_image = path.is_relative_to(home.images) and not mode & 0o022
    return of_image or (stat.S_ISDIR(mode) and above == 0o700)


def test_all_that_a_used_home_holds_is_closed(daemon: Daemon) -> None:
    """Booted, saved, paused, packed, resumed, forked: memory, disks, logs, sockets, the catalog."""
    home, seen = daemon.home, set[str]()

    def look() -> None:
        assert wider(home) == {}
        seen.update(path.name for path in modes(home))

    guest, _ = daemon.run_as_asked()
    look()
    guest.rewrite()
    guest.save()
    look()
    paused = guest.pause("disk")
    look()
    daemon.packed(paused.snapshot)
    look()
    guest.resume()
    fork, _ = daemon.run_as_asked()
    look()
    for directory in (home.root, home.sockets, home.buffers, home.images):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    fork.remove()
    daemon.stop()
    look()
    assert seen >= {
        "catalog.sqlite3", "catalog.sqlite3-wal", "serve.lock", "serve.log", "serve.sock",
        "reserve", "console.log", "vmm.log", "memory", "disk0", "memory.header", "device-state",
        "manifest.json", "template.json",
    }  # fmt: skip


def test_a_home_in_a_directory_that_others_may_read(tiny_image: Image, tmp_path: Path) -> None:
    """It stays as its owner made it, and what is in it is closed by itself."""
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o755)
    home = Home.at(directory).create()
    link_image(home, tiny_image)
    daemon = Daemon(home, within=_OPEN_TO_ALL)
    try:
        assert daemon.client.sandboxes() == []
        assert stat.S_IMODE(directory.stat().st_mode) == 0o755
        found = {path.name: path.stat().st_mode & _OTHERS for path in directory.iterdir()}
        assert {"catalog.sqlite3-wal", "serve.log"} <= found.keys()
        assert {name for name, others in found.items() if others} == set()
    finally:
        end_processes(home)
        for place in {home.sockets, home.buffers}:
            remove_closed(place)
