"""The initial file system: a cpio archive in the "newc" format, made in memory.

What holds: the same content gives the same bytes (no times, owners or inodes of the host), and
nothing needs root, since every entry says for itself that it belongs to root.
"""

from __future__ import annotations

import gzip
import stat

_ALIGNMENT = 4
_TRAILER = "TRAILER!!!"
_MAGIC = b"070701"
_HEAD_BYTES = 110
_MODE, _SIZE, _NAME_SIZE = 1, 6, 11  # which of the head's numbers


class Initramfs:
    """An archive that is being written; parents of an entry must have been added before it."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._entries: set[str] = set()

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory."""
        self._add(path, stat.S_IFDIR | mode, b"")

    def file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(path, stat.S_IFREG | mode, content)

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def compressed(self) -> bytes:
        """The whole archive. Gzip: every kernel reads it, and it boots as fast as any other."""
        whole = bytes(self._data) + _entry(_TRAILER, 0, 0, b"")
        return gzip.compress(whole, compresslevel=9, mtime=0)

    def _add(self, path: str, mode: int, content: bytes) -> None:
        parent = path.rpartition("/")[0]
        assert not path.startswith("/"), path
        assert path not in self._entries, f"{path} twice"
        assert not parent or parent in self._entries, f"{path} before its directory"
        self._entries.add(path)
        self._data += _entry(path, len(self._entries), mode, content)


def read_archive(data: bytes) -> dict[str, bytes]:
    """The regular files of an archive that this module wrote, by path."""
    files: dict[str, bytes] = {}
    at = 0
    while data[at : at + 6] == _MAGIC:
        mode, size, name_size = (
            int(data[at + 6 + 8 * field :][:8], 16) for field in (_MODE, _SIZE, _NAME_SIZE)
        )
        content_at = at + _padded_size(_HEAD_BYTES + name_size)
        name = data[at + _HEAD_BYTES : at + _HEAD_BYTES + name_size - 1].decode()
        if name == _TRAILER:
            break
        if stat.S_ISREG(mode):
            files[name] = data[content_at : content_at + size]
        at = content_at + _padded_size(size)
    return files


def _padded_size(size: int) -> int:
    return size + -size % _ALIGNMENT


def _entry(path: str, inode: int, mode: int, content: bytes) -> bytes:
    name = path.encode() + b"\0"
    links, owner, group, time, device = 1, 0, 0, 0, 0
    fields = (
        inode, mode, owner, group, links, time, len(content),
        device, device, device, device, len(name), 0,
    )  # fmt: skip
    head = _MAGIC + b"".join(b"%08X" % field for field in fields) + name
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % _ALIGNMENT)
