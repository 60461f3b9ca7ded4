"""Devices as plain bytes, and captures of them written by the documents instead of the code."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from diapause import _core
from diapause.units import PAGE_SIZE

ZERO_PAGE = bytes(PAGE_SIZE)
HEAD_BYTES = 4096


def page_of(seed: int) -> bytes:
    """A page: zero for 0, one repeated byte below 100, incompressible above."""
    if seed == 0:
        return ZERO_PAGE
    if seed < 100:
        return bytes([seed]) * PAGE_SIZE
    digest = bytes.fromhex(_core.blake3_bytes(seed.to_bytes(8, "little")))
    return b"".join(
        bytes.fromhex(_core.blake3_bytes(digest + at.to_bytes(2, "little"))) for at in range(128)
    )


def align(offset: int) -> int:
    return -(-offset // PAGE_SIZE) * PAGE_SIZE


def capture_offsets(capacity: int) -> tuple[int, int, int]:
    """Where list, sums and pages of a capture of so many pages begin (docs/formats/capture.md)."""
    sums = align(HEAD_BYTES + 8 * capacity)
    return HEAD_BYTES, sums, align(sums + 16 * capacity)


def capture_head(
    device_pages: int, captured: int, capacity: int, list_digest: bytes, flags: int = 1
) -> bytes:
    """The head of a buffer, which has no sums."""
    offsets = capture_offsets(capacity)
    head = struct.pack(
        "<8sIIQQQQQQ32s32x", b"DIAPCAP\0", 1, flags, device_pages, captured, offsets[0], capacity,
        *offsets[1:], list_digest,
    )  # fmt: skip
    body = head.ljust(HEAD_BYTES - 4, b"\0")
    return body + struct.pack("<I", zlib.crc32(body))


def write_buffer(
    path: Path, device_pages: int, pages: dict[int, bytes], capacity: int | None = None,
    spill: Path | None = None, flags: int = 1,
) -> None:  # fmt: skip
    """A sealed buffer of `pages`; what is beyond `capacity` goes to `spill`, at its final place."""
    order = sorted(pages)
    capacity = len(order) if capacity is None else capacity
    entries = [struct.pack("<Q", page) for page in order]
    list_digest = bytes.fromhex(_core.blake3_bytes(b"".join(entries)))
    list_at, _, pages_at = capture_offsets(capacity)
    with path.open("wb") as file:
        file.truncate(pages_at + capacity * PAGE_SIZE)
        file.write(capture_head(device_pages, len(order), capacity, list_digest, flags))
        file.seek(list_at)
        file.write(b"".join(entries[:capacity]))
        file.seek(pages_at)
        file.write(b"".join(pages[page] for page in order[:capacity]))
    if spill is not None and len(order) > capacity:
        list_at, _, pages_at = capture_offsets(len(order))
        with spill.open("wb") as file:
            file.seek(list_at + 8 * capacity)
            file.write(b"".join(entries[capacity:]))
            file.seek(pages_at + PAGE_SIZE * capacity)
            file.write(b"".join(pages[page] for page in order[capacity:]))


@dataclass
class Packed:
    """A header of the chain, the flat bytes that it stands for, and where both lie."""

    header: Path
    digest: str
    content: bytes
    flat: Path


@dataclass
class Chain:
    """A device that is captured again and again; each step is checked against plain bytes."""

    directory: Path
    page_count: int
    steps: list[Packed] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("builds", "tmp", "headers", "flat", "captures"):
            (self.directory / name).mkdir()
        header = self.directory / "headers" / "0"
        digest = _core.zero_header(str(header), self.page_count)
        flat = self.directory / "flat" / "0"
        with flat.open("wb") as file:
            file.truncate(self.page_count * PAGE_SIZE)
        self.steps.append(Packed(header, digest, bytes(self.page_count * PAGE_SIZE), flat))

    @property
    def builds(self) -> Path:
        return self.directory / "builds"

    @property
    def tmp(self) -> Path:
        return self.directory / "tmp"

    def capture(self, pages: dict[int, bytes], capacity: int | None = None) -> Path:
        """A finished capture file of `pages`."""
        name = f"{len(list((self.directory / 'captures').iterdir()))}"
        buffer, out = self.tmp / "buffer", self.directory / "captures" / name
        write_buffer(buffer, self.page_count, pages, capacity, out)
        info = _core.write_out(str(buffer), str(out))
        assert info.sealed
        assert info.captured_pages == info.capacity == len(pages)
        assert out.stat().st_size == info.size_bytes
        buffer.unlink()
        return out

    def content_after(self, parent: int, pages: dict[int, bytes]) -> bytes:
        content = bytearray(self.steps[parent].content)
        for page, data in pages.items():
            content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = data
        return bytes(content)

    def pack(
        self, source: _core.PageSource, parent: int, content: bytes, through_flat: bool = True
    ) -> _core.PackResult:
        """Pack over step `parent`, and add the step; `content` is what the device then has."""
        above = self.steps[parent]
        header = self.directory / "headers" / str(len(self.steps))
        result = _core.pack(
            source, str(above.header), above.digest, str(self.builds), str(self.tmp), str(header),
            str(above.flat) if through_flat else None,
        )  # fmt: skip
        flat = self.directory / "flat" / str(len(self.steps))
        flat.write_bytes(content)
        self.steps.append(Packed(header, result.header_digest, content, flat))
        return result

    def materialize(
        self, step: int, base: int | None = None, threads: int = 2
    ) -> tuple[bytes, _core.MaterializeResult]:
        """The bytes of a step's device, put together anew."""
        above = self.steps[step]
        under = None
        if base is not None:
            step_below = self.steps[base]
            under = (str(step_below.flat), str(step_below.header), step_below.digest)
        out = self.tmp / "flat"
        done = _core.materialize(
            str(above.header), above.digest, str(self.builds), str(out),
            base=under, threads=threads,
        )  # fmt: skip
        content = out.read_bytes()
        out.unlink()
        return content, done

    def assert_nothing_left(self) -> None:
        assert list(self.tmp.iterdir()) == []


def damage(build: Path, first_frame: int = 0) -> None:
    """Turn over a bit of every byte of its frames where they lie, from one on; its table stays."""
    build.chmod(0o600)
    data = build.read_bytes()
    table = int.from_bytes(data[-48:-40], "little")
    entry = table + 32 * first_frame
    first = int.from_bytes(data[entry : entry + 8], "little")
    with build.open("r+b") as file:
        file.seek(first)
        file.write(bytes(byte ^ 1 for byte in data[first:table]))
