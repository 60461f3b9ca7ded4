"""A console that is flooded: the log is bounded, the newest lines are kept, readers find them."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from diapause.sandbox.consoles import rotate
from diapause.units import KIB

LIMIT_BYTES = 64 * KIB


def flood(path: Path, size: int, start: int = 0) -> None:
    """Append numbered lines as a VMM does: on a descriptor that it keeps."""
    with path.open("ab", buffering=0) as log:
        for number in range(start, start + size // 16):
            log.write(b"%015d\n" % number)


def test_a_log_below_the_limit_stays(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    assert not rotate(path, LIMIT_BYTES)
    flood(path, LIMIT_BYTES - 16)
    assert not rotate(path, LIMIT_BYTES)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["console.log"]


def test_a_full_log_begins_anew_and_the_older_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    held = path.open("ab", buffering=0)
    flood(path, LIMIT_BYTES)
    before = path.read_bytes()
    assert rotate(path, LIMIT_BYTES)
    held.write(b"and on\n")  # appended, not written behind a hole
    held.close()
    assert path.read_bytes() == b"and on\n"
    older = tmp_path / "console.log.1"
    assert older.read_bytes() == before
    assert older.stat().st_mode & 0o777 == 0o600
    flood(path, LIMIT_BYTES)
    assert rotate(path, LIMIT_BYTES)
    assert older.read_bytes().startswith(b"and on\n")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["console.log", "console.log.1"]


def test_a_log_that_grew_without_a_daemon_keeps_its_end(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    flood(path, 10 * LIMIT_BYTES)
    end = path.read_bytes()[-LIMIT_BYTES:]
    assert rotate(path, LIMIT_BYTES)
    assert (tmp_path / "console.log.1").read_bytes() == end
    assert path.stat().st_size == 0


def test_a_flood_stays_within_its_bound_while_it_is_rotated(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    writer = threading.Thread(target=flood, args=(path, 40 * LIMIT_BYTES))
    writer.start()
    rotations = 0
    while writer.is_alive():
        rotations += rotate(path, LIMIT_BYTES)
        older = tmp_path / "console.log.1"
        assert not older.exists() or older.stat().st_size <= 2 * LIMIT_BYTES
    writer.join()
    rotations += rotate(path, LIMIT_BYTES)
    assert rotations > 0
    numbers = [
        int(line)
        for name in ("console.log.1", "console.log")
        for line in (tmp_path / name).read_bytes().split()
        if len(line) == 15
    ]
    assert numbers == sorted(numbers)


def test_a_full_disk_keeps_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_words: object, **_more: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "console.log"
    flood(path, 2 * LIMIT_BYTES)
    monkeypatch.setattr(os, "copy_file_range", fail)
    assert rotate(path, LIMIT_BYTES)
    assert path.stat().st_size == 0
    assert [file.name for file in tmp_path.iterdir()] == ["console.log"]
