"""Golden files: what version 1 wrote is read for ever, and what must not change does not.

Homes hold these formats. A change that makes one of these fail is a new format version, not a new
digest here. The bytes of compressed frames belong to zstd: they are read, not compared.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path

from diapause import _core
from diapause.units import PAGE_SIZE
from tests.framework.blobs import Chain, page_of

GOLDEN = Path(__file__).parent / "golden"
BUILD = "8ac4029a5c760a9e8fe0ae73824226ec2e40a52c120a1b437af212ea13346f67"
HEADER_DIGEST = "96bdce9c8f70cde0eb6832828d9836e1a4e7b564e1d67892536524f22bc9abcc"
SHA256 = {
    "header.v1": "f48b91a0967dc7754a38afcdf6f91371871c8136db2e95ef45661cf35b9b60b1",
    "build.v1": "712140ec3650b1125970a5a294b0c907b4e4e158a2232e14a43f05cbec290f7d",
    "capture.v1": "32d992fc755f8ac8fb669ee759e9a0665092489aec527ace6c2ad9246d2aef02",
    # Read and written by the pager's own tests.
    "trace.v1": "4723f2fbc6b4da6a5b79506b86499b7b8bd57c2528a33bf07a0ffcda6bc27649",
}
DEVICE_PAGES = 40
# 17 pages that compress, one that does not; 20 is zero.
CAPTURED = {page: page_of(page) for page in range(1, 18)} | {20: page_of(0), 30: page_of(300)}


def chain_of_golden(directory: Path) -> Chain:
    chain = Chain(directory, DEVICE_PAGES)
    capture = chain.capture(CAPTURED)
    source = _core.PageSource.capture(str(capture))
    chain.pack(source, 0, chain.content_after(0, CAPTURED))
    return chain


def test_golden_files_are_the_ones_that_were_pinned() -> None:
    found = {name: hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() for name in SHA256}
    assert found == SHA256


def test_a_golden_build_and_header_are_read(tmp_path: Path) -> None:
    builds, out = tmp_path / "builds", tmp_path / "out"
    builds.mkdir()
    (builds / BUILD).write_bytes((GOLDEN / "build.v1").read_bytes())
    assert _core.verify_build(str(builds / BUILD), BUILD) == 18
    header = str(GOLDEN / "header.v1")
    _core.materialize(header, HEADER_DIGEST, str(builds), str(out))
    expected = b"".join(CAPTURED.get(page, page_of(0)) for page in range(DEVICE_PAGES))
    assert out.read_bytes() == expected
    assert _core.header_extents(header, HEADER_DIGEST) == [
        (0, 1, None, 0),
        (1, 17, BUILD, 0),
        (18, 12, None, 0),
        (30, 1, BUILD, 17),
        (31, 9, None, 0),
    ]


def test_a_golden_capture_is_read(tmp_path: Path) -> None:
    source = _core.PageSource.capture(str(GOLDEN / "capture.v1"))
    assert (source.device_pages, source.page_count) == (DEVICE_PAGES, len(CAPTURED))
    chain = Chain(tmp_path, DEVICE_PAGES)
    content = chain.content_after(0, CAPTURED)
    result = chain.pack(source, 0, content)
    assert (result.stored_pages, result.zero_pages) == (18, 1)
    assert chain.materialize(1)[0] == content


def test_headers_and_captures_are_written_as_they_always_were(tmp_path: Path) -> None:
    chain = chain_of_golden(tmp_path)
    capture = chain.directory / "captures" / "0"
    assert capture.read_bytes() == (GOLDEN / "capture.v1").read_bytes()
    identity = "11" * 32
    source = _core.PageSource.capture(str(capture))
    header = tmp_path / "provisional"
    info = _core.provisional_header(
        str(chain.steps[0].header), chain.steps[0].digest, source, identity, str(header)
    )
    assert header.read_bytes() == header_by_the_document(identity)
    assert info.digest == _core.blake3_bytes(header.read_bytes()[: -(12 + 56)])


def header_by_the_document(identity: str) -> bytes:
    """The provisional header of the golden capture, put together by docs/formats/header.md."""
    head = struct.pack("<8sIIQI", b"DIAPHDR\0", 1, PAGE_SIZE, DEVICE_PAGES, 0)
    head += struct.pack("<I", zlib.crc32(head))
    builds = bytes.fromhex(identity) + struct.pack("<QB", len(CAPTURED), 2)
    lengths, numbers = [1, 17, 2, 1, 9, 1, 9], [0, 1, 0, 1, 0, 1, 0]
    deltas = [0, 0, 0]  # positions go on from run to run
    columns = [bytes(lengths), bytes(numbers), bytes(deltas)]
    extents = struct.pack("<QIIII", 0, len(lengths), *map(len, columns)) + b"".join(columns)
    body = head + block(1, builds) + block(2, extents)
    totals = struct.pack("<QQQ", len(lengths), len(CAPTURED), 1)
    return body + block(3, totals + bytes.fromhex(_core.blake3_bytes(body)))


def block(kind: int, payload: bytes) -> bytes:
    head = struct.pack("<II", kind, len(payload))
    return head + struct.pack("<I", zlib.crc32(head + payload)) + payload


def test_pages_that_do_not_compress_make_the_same_build_for_ever(tmp_path: Path) -> None:
    chain = Chain(tmp_path, 20)
    pages = {page: page_of(200 + page) for page in range(20)}
    source = _core.PageSource.capture(str(chain.capture(pages)))
    result = chain.pack(source, 0, chain.content_after(0, pages))
    assert result.build_id == ("7e6d15055a6843ae2c1106e293dac50185439800e741ddb556d27038f7da402b")
    assert result.header_digest == (
        "1da9dbc6d6513da1c67d738e1ec3f6eb6a777eda53a7e9d558dbd7e0931af4ec"
    )
