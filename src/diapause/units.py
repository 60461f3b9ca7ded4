"""Sizes and times in the units that names end in."""

import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE_SIZE = 4 * KIB  # the design's page, of memory and disk alike

_SIZE = re.compile(r"^\s*(\d+)\s*([KMGT]?)(?:i?B)?\s*$", re.IGNORECASE)
_FACTOR = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Read ``512M``, ``1G``, ``4096``, ``2GiB`` as bytes (powers of 1024); raises ValueError."""
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 512M or 1G")
    return int(match[1]) * _FACTOR[match[2].upper()]


def format_size(size_bytes: int) -> str:
    """Write bytes for people: ``4.0 KiB``, ``1.5 GiB``."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def pages(size_bytes: int) -> int:
    """How many whole pages; the size must be a multiple of the page."""
    assert size_bytes % PAGE_SIZE == 0, size_bytes
    return size_bytes // PAGE_SIZE
