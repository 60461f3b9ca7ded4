"""What a disk may hold after the power went: a pessimistic model of a file system.

A write is on the disk for certain once its file was synced, a name once its directory was. Until
then it may be there, be missing, or be there in part. A file system may promise more; nothing here
leans on that, with one exception, which every journaling file system keeps: a rename is whole, so
syncing the directory that a name came to also takes it out of the one that it left.

What another process writes (a VMM its overlays) is not recorded. Such a file holds its last content
once it was synced after the VMM had stopped, and is torn before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tests.framework.strace import Call

SECTOR_BYTES = 512
# What of the unsynced is there after the cut: (its bytes, its names).
Kept = Literal["all", "none", "torn"]
VARIANTS: tuple[tuple[Kept, Kept], ...] = (
    ("all", "all"), ("none", "all"), ("torn", "all"), ("all", "none"), ("none", "none"),
)  # fmt: skip


@dataclass(frozen=True)
class Write:
    """Bytes at an offset."""

    offset: int
    data: bytes


@dataclass(frozen=True)
class Length:
    """A new length."""

    size: int


Change = Write | Length


@dataclass(eq=False)
class File:
    """A file: what it held when the recording began, and what was done to it since."""

    number: int
    base: Path | None  # its first content, elsewhere; None for a new file
    foreign: bool = False  # written by a process that is not recorded
    changes: list[Change] = field(default_factory=list)
    synced: int = 0  # so many of the changes are on the disk

    def kept(self, kept: Kept) -> tuple[Change, ...]:
        """The changes that a cut leaves."""
        if kept == "all":
            return tuple(self.changes)
        certain, rest = self.changes[: self.synced], self.changes[self.synced :]
        if kept == "torn" and rest:
            certain = certain + rest[:-1] + _torn(rest[-1])
        return tuple(certain)


def _torn(change: Change) -> list[Change]:
    """A write of which only the first half of the sectors arrived."""
    if isinstance(change, Length):
        return []
    half = len(change.data) // 2 // SECTOR_BYTES * SECTOR_BYTES
    return [Write(change.offset, change.data[:half])]


@dataclass(eq=False)
class Directory:
    """A directory: its names, and those of them that are on the disk."""

    names: dict[str, File | Directory] = field(default_factory=dict)
    synced: dict[str, File | Directory] = field(default_factory=dict)

    def kept(self, kept: Kept) -> dict[str, File | Directory]:
        """The names that a cut leaves."""
        return self.names if kept == "all" else self.synced


class Disk:
    """The tree below one directory, changed call by call."""

    def __init__(self, root: Path, copy: Path, foreign: dict[str, Path]) -> None:
        """`copy` holds the first content; `foreign` the last one of files that others write."""
        self._root = str(root)
        self._numbers = 0
        self._foreign = foreign
        self._positions: dict[tuple[int, int | None], int] = {}  # by process and descriptor
        self._moved: list[tuple[Directory, Directory, str, File | Directory]] = []
        self._inodes: dict[int, File] = {}
        self.stopped = False  # the VMM: from here on its files do not change
        self.top = self._read(copy)

    def _read(self, directory: Path) -> Directory:
        made = Directory()
        for path in directory.iterdir():
            if path.is_socket():
                continue
            made.names[path.name] = self._read(path) if path.is_dir() else self._known(path)
        made.synced = dict(made.names)
        return made

    def _known(self, path: Path) -> File:
        inode = path.stat().st_ino
        if inode not in self._inodes:
            self._inodes[inode] = self._file(path)
        return self._inodes[inode]

    def _file(self, base: Path | None) -> File:
        self._numbers += 1
        return File(self._numbers, base)

    # -- paths -----------------------------------------------------------------------------------

    def _parts(self, path: str) -> list[str] | None:
        if path != self._root and not path.startswith(self._root + "/"):
            return None
        return [part for part in path[len(self._root) :].split("/") if part]

    def _find(self, path: str) -> File | Directory | None:
        parts = self._parts(path)
        if parts is None:
            return None
        here: File | Directory | None = self.top
        for part in parts:
            here = here.names.get(part) if isinstance(here, Directory) else None
        return here

    def _parent(self, path: str) -> tuple[Directory, str] | None:
        above, _, name = path.rstrip("/").rpartition("/")
        found = self._find(above)
        return (found, name) if isinstance(found, Directory) else None

    # -- calls -----------------------------------------------------------------------------------

    def apply(self, call: Call) -> bool:
        """Do what a call did; whether it changed what a cut may leave."""
        act = getattr(self, f"_do_{call.name}", None)
        return bool(act(call)) if act is not None else False

    def _target(self, call: Call, index: int = 0) -> File | None:
        found = self._find(call.place(index)[1])
        return found if isinstance(found, File) else None

    def _named(self, call: Call, place: int | None, name: int) -> str:
        path = os.fsdecode(call.text(name))
        if path.startswith("/"):
            return os.path.normpath(path)
        assert place is not None, (call.name, path)
        return os.path.normpath(f"{call.place(place)[1]}/{path}")

    def _do_openat(self, call: Call) -> bool:
        self._positions[call.process, call.result] = 0
        assert call.result_path is not None
        flags = call.arguments[2]
        if b"O_CREAT" not in flags and b"O_TRUNC" not in flags:
            return False
        place = self._parent(call.result_path)
        if place is None:
            return False
        above, name = place
        found = above.names.get(name)
        if isinstance(found, File):
            if b"O_TRUNC" in flags:
                found.changes.append(Length(0))
            return b"O_TRUNC" in flags
        above.names[name] = self._file(None)
        return True

    def _do_lseek(self, call: Call) -> bool:
        number, _ = call.place(0)
        self._positions[call.process, number] = call.result
        return False

    def _do_write(self, call: Call) -> bool:
        number, _ = call.place(0)
        at = self._positions.get((call.process, number), 0)
        self._positions[call.process, number] = at + call.result
        return self._write(self._target(call), at, call.text(1)[: call.result])

    def _do_pwrite64(self, call: Call) -> bool:
        return self._write(self._target(call), call.number(3), call.text(1)[: call.result])

    def _write(self, file: File | None, offset: int, data: bytes) -> bool:
        if file is None or file.foreign:
            return False
        file.changes.append(Write(offset, data))
        return True

    def _do_ftruncate(self, call: Call) -> bool:
        if (file := self._target(call)) is None:
            return False
        file.changes.append(Length(call.number(1)))
        return True

    def _do_copy_file_range(self, call: Call) -> bool:
        return self._unknown(self._target(call, 2))

    def _do_sendfile(self, call: Call) -> bool:
        return self._unknown(self._target(call, 0))

    def _do_writev(self, call: Call) -> bool:
        assert self._target(call) is None, "a gathered write is not modelled"
        return False

    _do_pwritev = _do_pwritev2 = _do_writev

    @staticmethod
    def _unknown(file: File | None) -> bool:
        """Bytes that the recorder did not see: the file is torn for good, and may not be synced."""
        if file is not None:
            file.foreign = True
        return file is not None

    def _do_fsync(self, call: Call) -> bool:
        found = self._find(call.place(0)[1])
        if isinstance(found, File):
            if not found.foreign:
                found.synced = len(found.changes)
            elif self.stopped:
                found.changes, found.synced = [], 0
                found.base, found.foreign = self._foreign_base(found), False
            return True
        if isinstance(found, Directory):
            found.synced = dict(found.names)
            self._settle_moves(found)
            return True
        return False

    _do_fdatasync = _do_fsync

    def _foreign_base(self, file: File) -> Path:
        assert str(file.number) in self._foreign, "a file was synced whose bytes were not recorded"
        return self._foreign[str(file.number)]

    def _settle_moves(self, directory: Directory) -> None:
        for move in [move for move in self._moved if move[1] is directory]:
            source, _, name, what = move
            if source.synced.get(name) is what:
                del source.synced[name]
            self._moved.remove(move)

    # -- names -----------------------------------------------------------------------------------

    def _do_mkdir(self, call: Call) -> bool:
        return self._make(self._named(call, None, 0))

    def _do_mkdirat(self, call: Call) -> bool:
        return self._make(self._named(call, 0, 1))

    def _make(self, path: str) -> bool:
        if (place := self._parent(path)) is None:
            return False
        place[0].names[place[1]] = Directory()
        return True

    def _do_rename(self, call: Call) -> bool:
        return self._rename(self._named(call, None, 0), self._named(call, None, 1))

    def _do_renameat(self, call: Call) -> bool:
        return self._rename(self._named(call, 0, 1), self._named(call, 2, 3))

    _do_renameat2 = _do_renameat

    def _rename(self, old: str, new: str) -> bool:
        source, target = self._parent(old), self._parent(new)
        if source is None or target is None:
            return False
        what = source[0].names.pop(source[1])
        target[0].names[target[1]] = what
        self._moved.append((source[0], target[0], source[1], what))
        return True

    def _do_link(self, call: Call) -> bool:
        return self._link(self._named(call, None, 0), self._named(call, None, 1))

    def _do_linkat(self, call: Call) -> bool:
        return self._link(self._named(call, 0, 1), self._named(call, 2, 3))

    def _link(self, old: str, new: str) -> bool:
        found, target = self._find(old), self._parent(new)
        if found is None or target is None:
            return False
        target[0].names[target[1]] = found
        return True

    def _do_unlink(self, call: Call) -> bool:
        return self._unlink(self._named(call, None, 0))

    _do_rmdir = _do_unlink

    def _do_unlinkat(self, call: Call) -> bool:
        return self._unlink(self._named(call, 0, 1))

    def _unlink(self, path: str) -> bool:
        place = self._parent(path)
        return place is not None and place[0].names.pop(place[1], None) is not None

    # -- foreign files ---------------------------------------------------------------------------

    def mark_foreign(self, path: str, last: Path) -> None:
        """Another process writes this file; `last` is what it holds in the end."""
        found = self._find(path)
        assert isinstance(found, File), path
        found.foreign = True
        self._foreign[str(found.number)] = last

    # -- states ----------------------------------------------------------------------------------

    def state(self, data: Kept, names: Kept) -> State:
        """What a cut at this moment leaves."""
        return State(tuple(_entries(self.top, "", data, names)))


@dataclass(frozen=True)
class Entry:
    """A file or directory that a cut leaves."""

    path: str
    file: tuple[int, Path | None, bool, tuple[Change, ...]] | None  # None: a directory


@dataclass(frozen=True)
class State:
    """A whole tree that a cut leaves; equal where nothing in it differs."""

    entries: tuple[Entry, ...]

    @property
    def key(self) -> int:
        """A number by which equal states are found.

        Bytes below tmp/ don't count: a start deletes what lies there without a look into it.
        """
        seen = [one.path if one.path.startswith("tmp/") else one for one in self.entries]
        return hash(tuple(seen))

    def build(self, root: Path) -> None:
        """Make the tree at an empty directory; unchanged files are links to their first content."""
        for entry in self.entries:
            place = root / entry.path
            if entry.file is None:
                place.mkdir(mode=0o700, exist_ok=True)
                continue
            _, base, foreign, changes = entry.file
            _build_file(place, base, foreign, changes)


def _build_file(place: Path, base: Path | None, foreign: bool, changes: tuple[Change, ...]) -> None:
    if base is not None and not changes and not foreign and not base.stat().st_mode & 0o222:
        place.hardlink_to(base)  # write-once: whoever opens the home does not change it
        return
    if base is not None:
        shutil.copy(base, place)
    else:
        place.touch()
    size = place.stat().st_size
    with place.open("r+b") as file:
        if foreign:  # unsynced: torn
            file.truncate(size // 2 // SECTOR_BYTES * SECTOR_BYTES)
        for change in changes:
            if isinstance(change, Length):
                file.truncate(change.size)
            else:
                file.seek(change.offset)
                file.write(change.data)


def _entries(directory: Directory, above: str, data: Kept, names: Kept) -> Iterator[Entry]:
    for name, found in sorted(directory.kept(names).items()):
        path = f"{above}{name}"
        if isinstance(found, Directory):
            yield Entry(path, None)
            yield from _entries(found, f"{path}/", data, names)
        else:
            yield Entry(path, (found.number, found.base, found.foreign, found.kept(data)))
