"""Owners, modes, devices and attributes of a root disk, put on inodes of an ext4 file.

What holds: no file of the host ever has them, and no right of the host is needed for them. The file
system is one of ours (`mke2fs -d`), so its directories are a tree.
"""

from __future__ import annotations

import re
import stat
from typing import TYPE_CHECKING

from diapause.errors import RootfsArchiveRefused
from diapause.guest.inodes import ROOT, Inode, debugfs, list_directories
from diapause.guest.rootdisk import EPOCH

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from diapause import _core
    from diapause.guest.steps import ImageBuild

_STEP = "setting owners and modes"
# The one name from outside that goes into a command: a device's own.
_DEVICE_NAME = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9._:+-]*")


def give_to_root(build: ImageBuild, disk: Path) -> None:
    """Make root the owner of everything."""
    found = _find(build, disk, None)
    numbers = sorted({inode.number for inode in found.values() if inode.uid or inode.gid})
    lines = [f"sif <{number}> {field} 0" for number in numbers for field in ("uid", "gid")]
    debugfs(build, _STEP, disk, lines, EPOCH)


def apply_entries(
    build: ImageBuild, disk: Path, entries: list[_core.RootfsEntry], archive: Path
) -> None:
    """Make devices, and put on what each entry's file does not say."""
    _make_devices(build, disk, entries, archive)
    found = _find(build, disk, {entry.path for entry in entries})
    values = build.directory / "attributes"
    values.mkdir()
    lines = []
    for entry in entries:
        place = f"<{_inode(entry, found, archive).number}>"
        if not stat.S_ISLNK(entry.mode):
            lines.append(f"sif {place} mode 0{entry.mode:o}")
        lines += [f"sif {place} uid {entry.uid}", f"sif {place} gid {entry.gid}"]
        for name, value in entry.attributes:
            file = values / str(len(lines))
            file.write_bytes(value)
            lines.append(f"ea_set -f attributes/{file.name} {place} {name}")
    debugfs(build, _STEP, disk, lines, EPOCH)


def _make_devices(
    build: ImageBuild, disk: Path, entries: list[_core.RootfsEntry], archive: Path
) -> None:
    devices = [entry for entry in entries if entry.special is not None]
    if not devices:
        return
    parents = _find(build, disk, {_parent(entry.path) for entry in devices})
    made: set[bytes] = set()
    lines = []
    for entry in devices:
        assert entry.special is not None
        name = entry.path.rpartition(b"/")[2]
        if not _DEVICE_NAME.fullmatch(name) or entry.path in made:
            raise _refused(entry, archive, "it is a device whose name is odd, or is there twice")
        made.add(entry.path)
        letter, major, minor = entry.special
        numbers = "" if letter == "p" else f" {major} {minor}"
        lines.append(f"cd <{parents[_parent(entry.path)].number}>")
        lines.append(f"mknod {name.decode('ascii')} {letter}{numbers}")
    debugfs(build, _STEP, disk, lines, EPOCH)


def _inode(entry: _core.RootfsEntry, found: dict[bytes, Inode], archive: Path) -> Inode:
    inode = found.get(entry.path)
    if inode is None or stat.S_IFMT(inode.mode) != stat.S_IFMT(entry.mode):
        raise _refused(entry, archive, "the file system does not have it as the archive does")
    return inode


def _refused(entry: _core.RootfsEntry, archive: Path, cause: str) -> RootfsArchiveRefused:
    shown = entry.path[:200].decode("ascii", "backslashreplace")
    return RootfsArchiveRefused(path=archive, entry=shown, cause=cause)


def _parent(path: bytes) -> bytes:
    return path.rpartition(b"/")[0]


def _find(build: ImageBuild, disk: Path, paths: Iterable[bytes] | None) -> dict[bytes, Inode]:
    """The inodes of these paths, or of all; one run of debugfs for each level."""
    wanted = None if paths is None else _with_parents(paths)
    found = {b"": Inode(ROOT, stat.S_IFDIR | 0o755, 0, 0)}
    level = [b""]
    while level:
        listed = list_directories(build, disk, [found[path].number for path in level])
        following = []
        for parent in level:
            for name, inode in listed[found[parent].number].items():
                path = parent + b"/" + name if parent else name
                if wanted is None or path in wanted:
                    found[path] = inode
                    following += [path] if inode.is_directory else []
        level = following
    return found


def _with_parents(paths: Iterable[bytes]) -> set[bytes]:
    every: set[bytes] = set()
    for path in paths:
        at = path
        while at and at not in every:
            every.add(at)
            at = _parent(at)
    return every
