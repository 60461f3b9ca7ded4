"""Whether two sparse files hold the same bytes, whatever of their zeros is a hole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_CHUNK_BYTES = 1 << 20


def same_bytes(one: Path, other: Path) -> bool:
    """Both are read where either has data: what both have as holes is zero in both."""
    with one.open("rb", buffering=0) as first, other.open("rb", buffering=0) as second:
        a, b = first.fileno(), second.fileno()
        if os.fstat(a).st_size != os.fstat(b).st_size:
            return False
        return all(
            os.pread(a, _CHUNK_BYTES, at) == os.pread(b, _CHUNK_BYTES, at)
            for at in sorted({*_chunks_with_data(a), *_chunks_with_data(b)})
        )


def _chunks_with_data(fd: int) -> Iterator[int]:
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # none from here on
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield from range(start - start % _CHUNK_BYTES, end, _CHUNK_BYTES)
