"""File trees with everything that a copy has to keep, and whether two are the same."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from diapause.units import MIB

# An instant with nanoseconds, and one before 1970.
INSTANT_NS = 1_234_567_890_123_456_789
EARLY_NS = -1_500_000_001
HOLE_BYTES = 64 * MIB


def make_tree(root: Path) -> Path:
    """A directory with modes, times, links, holes, long and odd names."""
    below = root / "a" / ("long" * 40) / ("name" * 30)
    below.mkdir(parents=True)
    (below / "deep").write_bytes(b"deep")
    (root / "empty").mkdir()
    (root / "private").write_bytes(os.urandom(100_000))
    (root / "private").chmod(0o600)
    (root / "run").write_bytes(b"#!/bin/sh\n")
    (root / "run").chmod(0o755)
    (root / "link").symlink_to("../../outside")
    (root / "twin").hardlink_to(root / "private")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\n \x1b[31m")).write_bytes(b"odd")
    with (root / "holes").open("wb") as file:
        file.seek(HOLE_BYTES)
        file.write(b"end")
        file.truncate(2 * HOLE_BYTES)
    os.utime(root / "private", ns=(INSTANT_NS, INSTANT_NS))
    os.utime(root / "run", ns=(EARLY_NS, EARLY_NS))
    os.utime(root / "link", ns=(INSTANT_NS, INSTANT_NS), follow_symlinks=False)
    (root / "empty").chmod(0o555)
    os.utime(root / "empty", ns=(INSTANT_NS, INSTANT_NS))
    os.utime(root, ns=(INSTANT_NS, INSTANT_NS))
    return root


def same_tree(one: Path, other: Path) -> None:
    """Fails at the first difference in names, data, modes, owners, times, links or holes."""
    first, second = describe(one), describe(other)
    assert first.keys() == second.keys()
    for name, told in first.items():
        assert second[name] == told, name
    twins = [(other / name).stat().st_ino for name in ("private", "twin")]
    assert twins[0] == twins[1]
    assert (other / "holes").stat().st_blocks * 512 < HOLE_BYTES


def describe(root: Path) -> dict[bytes, tuple[object, ...]]:
    """What a copy keeps of each file below, by its path."""
    top = os.fsencode(root)
    found = {b"": _describe_one(top)}
    for directory, names, files in os.walk(top):
        for name in (*names, *files):
            path = directory + b"/" + name
            found[path[len(top) :]] = _describe_one(path)
    return found


def _describe_one(path: bytes) -> tuple[object, ...]:
    status = os.lstat(path)
    told = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns)
    if stat.S_ISLNK(status.st_mode):
        return (*told, os.readlink(path))  # noqa: PTH115 - a path of bytes
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:  # noqa: PTH123 - a path of bytes
            return (*told, status.st_size, hash(file.read()))
    return told
