"""Kernels and initial file systems that somebody brings: what they are, before anything boots."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

from diapause.errors import InitrdRefused, KernelRefused

if TYPE_CHECKING:
    from pathlib import Path

# The boot protocol of x86 (Documentation/arch/x86/boot.rst): where the header has what.
_BOOT_FLAG, _MAGIC, _PROTOCOL, _LOAD_FLAGS, _VERSION_BASE = 0x1FE, 0x202, 0x206, 0x211, 0x200
_HEAD_BYTES = 0x10000
_PROTOCOL_MIN = 0x0200
_LOADED_HIGH = 1
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,63}")
# cpio, plain, then gzip, xz, zstd, bzip2, lz4, lzo, lzma.
_INITRDS = (
    b"070701", b"070702", b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"BZh",
    b"\x02\x21\x4c\x18", b"\x89LZO", b"\x5d\0\0",
)  # fmt: skip


def kernel_version(kernel: Path, shown: Path) -> str:
    """What `uname -r` will say of a kernel file; raises `KernelRefused` with the name `shown`."""
    with kernel.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if len(head) <= _LOAD_FLAGS or head[_BOOT_FLAG:_VERSION_BASE] != b"\x55\xaa":
        raise KernelRefused(path=shown, cause="it is no bzImage")
    protocol, version_at = struct.unpack_from("<H6xH", head, _PROTOCOL)
    if head[_MAGIC:_PROTOCOL] != b"HdrS" or protocol < _PROTOCOL_MIN:
        raise KernelRefused(path=shown, cause="it is no bzImage")
    if not head[_LOAD_FLAGS] & _LOADED_HIGH:
        raise KernelRefused(path=shown, cause="it is a zImage, not a bzImage")
    text = head[_VERSION_BASE + version_at :][:128].split(b"\0")[0].decode("ascii", "replace")
    found = _VERSION.match(text) if version_at else None
    if found is None:
        raise KernelRefused(path=shown, cause="it does not say its version")
    return found[0]


def check_initrd(initrd: Path, shown: Path) -> None:
    """Raise `InitrdRefused` with the name `shown` for what no kernel unpacks."""
    with initrd.open("rb") as file:
        head = file.read(8)
    if not head.startswith(_INITRDS):
        raise InitrdRefused(path=shown, cause="it is no cpio archive, plain or compressed")
