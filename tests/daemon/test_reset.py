"""`system reset`: all of a home of ours goes, nothing else does, and a second try ends a first."""

from __future__ import annotations

import contextlib
import os
import pty
from pathlib import Path

import pytest

from diapause.catalog import Catalog
from diapause.daemon import reset as module
from diapause.daemon.reset import examine, reset
from diapause.errors import HomeRefused, StorageFailed
from diapause.store.files import remove_tree
from diapause.store.home import Home
from tests.daemon.test_events import sandbox
from tests.framework.fake_home import FakeHome, eventually, gone


def fill(home: Home) -> None:
    """What a home has, read-only where it is complete."""
    home.create()
    with contextlib.closing(Catalog(home.catalog)) as catalog:
        catalog.put_sandbox(sandbox("paused"))
    home.serve_lock.touch()
    for directory in (home.image("tiny"), home.snapshot("5a"), home.flat_of("5a")):
        directory.mkdir(exist_ok=True)
        (directory / "blob").write_bytes(b"x" * 10_000)
        directory.chmod(0o555)
    (home.buffers / "5a.buffer").write_bytes(b"x")
    (home.sockets / "ab.qmp").touch()


def nothing_left(home: Home) -> bool:
    return not any(place.exists() for place in (home.root, home.buffers, home.sockets))


def test_all_of_it_goes_and_the_daemon_first(place: FakeHome) -> None:
    fill(place.home)
    place.sandbox()
    pid = place.daemon_pid
    assert place.json("system", "reset", "--yes") == {
        "home": str(place.home.root), "removed": True,
    }  # fmt: skip
    assert gone(pid)
    assert nothing_left(place.home)


def test_a_verb_under_way_ends_before(place: FakeHome) -> None:
    fill(place.home)
    place.sandbox("web")
    (place.home.root / "stall").touch()
    pausing = place.spawn("pause", "web")
    eventually("the verb", (place.home.root / "stalled").exists)
    resetting = place.spawn("system", "reset", "--yes")
    with pytest.raises(TimeoutError):
        _ended(resetting.wait, 1)
    assert place.home.catalog.exists()
    (place.home.root / "stall").unlink()
    for process in (resetting, pausing):
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert nothing_left(place.home)


def _ended(wait: object, bound_s: float) -> None:
    import subprocess

    try:
        wait(timeout=bound_s)  # type: ignore[operator]
    except subprocess.TimeoutExpired as error:
        raise TimeoutError from error


def test_it_asks_and_without_a_terminal_it_needs_a_word(place: FakeHome) -> None:
    fill(place.home)
    done = place.run("system", "reset", given=b"reset\n")
    assert done.returncode == 2, done
    assert b"--yes" in done.stderr
    assert place.home.catalog.exists()
    assert _on_a_terminal(place, b"yes\n") == 2
    assert place.home.catalog.exists()
    assert _on_a_terminal(place, b"reset\n") == 0
    assert nothing_left(place.home)


def _on_a_terminal(place: FakeHome, answer: bytes) -> int:
    ours, theirs = pty.openpty()
    try:
        process = place.spawn("system", "reset", stdin=theirs, stdout=theirs, stderr=theirs)
        said = b""
        while b"Type reset" not in said:
            said += os.read(ours, 4096)
        assert b"1 sandboxes" in said
        os.write(ours, answer)
        return process.wait(120)
    finally:
        os.close(theirs)
        os.close(ours)


def test_no_home_is_no_failure_and_is_not_made(place: FakeHome) -> None:
    place.home.root.rmdir()
    done = place.run("system", "reset")
    assert done.returncode == 0, done
    assert not place.home.root.exists()


def test_what_is_no_home_of_ours_stays(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(HomeRefused, match="no catalog"):
        reset(Home.at(other))
    (other / "catalog.sqlite3").symlink_to(other / "letter.txt")
    with pytest.raises(HomeRefused, match="no catalog"):
        reset(Home.at(other))
    with pytest.raises(HomeRefused, match="no directory"):
        reset(Home.at(other / "letter.txt"))
    assert (other / "letter.txt").read_text() == "dear"


def test_a_link_to_a_home_is_not_followed(home: Home, tmp_path: Path) -> None:
    fill(home)
    (tmp_path / "link").symlink_to(home.root)
    with pytest.raises(HomeRefused, match="link to"):
        reset(Home.at(tmp_path / "link"))
    assert home.catalog.exists()


def test_links_within_are_removed_and_not_what_they_lead_to(home: Home, tmp_path: Path) -> None:
    fill(home)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (home.root / "link").symlink_to(outside)
    (home.sandboxes / "link").symlink_to(outside)
    (home.tmp / "file").symlink_to(outside / "kept")
    reset(home)
    assert nothing_left(home)
    assert (outside / "kept").exists()


def test_a_link_in_place_of_the_buffers_stays(home: Home, tmp_path: Path) -> None:
    fill(home)
    (tmp_path / "kept").touch()
    (home.buffers / "5a.buffer").unlink()
    home.buffers.rmdir()
    home.buffers.symlink_to(tmp_path)
    try:
        reset(home)
        assert (tmp_path / "kept").exists()
    finally:
        home.buffers.unlink()


def test_what_has_a_mount_below_is_refused_untouched() -> None:
    """A directory in which this machine has a mount; that is found before all else."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    parents = {Path(line.split()[4]).parent for line in lines} - {Path("/")}
    assert parents
    for parent in sorted(parents):
        with pytest.raises(HomeRefused, match="is mounted at"):
            reset(Home.at(parent))


def test_cut_off_anywhere_the_next_one_ends_it(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    real, done = remove_tree, 0
    allowed = 0

    def cut_off(path: Path) -> None:
        nonlocal done
        if done == allowed:
            raise OSError("cut off")
        done += 1
        real(path)

    monkeypatch.setattr(module, "remove_tree", cut_off)
    while True:
        fill(home)
        done = 0
        try:
            reset(home)
            break
        except StorageFailed:
            assert examine(home).there
        done, allowed = -1000, allowed + 1
        reset(home)
        assert nothing_left(home)
    assert allowed > 8
    home.create()  # the fixture's
