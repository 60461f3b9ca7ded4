"""The initial file system: a cpio archive in the "newc" format, made in memory.

What holds: the same content gives the same bytes (no times, owners or inodes of the host), and
nothing needs root, since every entry says for itself that it belongs to root.
"""

from __future__ import annotations

import gzip
import stat

_ALIGNMENT = 4
_TRAILER = "TRAILER!!!"


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


def _entry(path: str, inode: int, mode: int, content: bytes) -> bytes:
    name = path.encode() + b"\0"
    links, owner, group, time, device = 1, 0, 0, 0, 0
    fields = (
        inode, mode, owner, group, links, time, len(content),
        device, device, device, device, len(name), 0,
    )  # fmt: skip
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % _ALIGNMENT)
