"""Every single flipped byte and every truncation of a blob is a typed error, never other bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diapause import _core
from diapause.errors import BlobDamaged, BlobMissing
from diapause.units import PAGE_SIZE
from tests.framework.blobs import Chain, page_of, write_buffer

SMALL = {0: page_of(1), 3: page_of(2), 4: page_of(3)}


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """One small capture, packed."""
    made = Chain(tmp_path, 8)
    source = _core.PageSource.capture(str(made.capture(SMALL)))
    made.pack(source, 0, made.content_after(0, SMALL))
    return made


def damaged(path: Path, step: int = 1) -> Iterator[str]:
    """Every flip and every truncation of a file, one after the other; whole again at the end."""
    whole = path.read_bytes()
    for at in range(0, len(whole), step):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        yield f"flip at {at}"
        path.write_bytes(whole[:at])
        yield f"cut at {at}"
    path.write_bytes(whole + b"\0")
    yield "one byte more"
    path.write_bytes(whole)


def assert_all_found(path: Path, blob: str, read: Callable[[], object], step: int = 1) -> None:
    read()
    for what in damaged(path, step):
        with pytest.raises(BlobDamaged) as raised:
            read()
        assert raised.value.fields["blob"] == blob, what
        assert raised.value.fields["cause"], what
    read()


def test_a_header(chain: Chain) -> None:
    header = chain.steps[1]

    def read() -> None:
        _core.header_info(str(header.header), header.digest)

    assert_all_found(header.header, header.digest, read)
    assert_all_found(header.header, header.digest, lambda: chain.materialize(1), step=7)
    chain.assert_nothing_left()


def test_a_build(chain: Chain) -> None:
    (build,) = chain.builds.iterdir()
    assert_all_found(build, build.name, lambda: _core.verify_build(str(build), build.name))
    assert_all_found(build, build.name, lambda: chain.materialize(1), step=5)
    chain.assert_nothing_left()


def test_a_build_that_a_later_pack_compares_with(chain: Chain) -> None:
    (build,) = chain.builds.iterdir()
    capture = str(chain.capture({3: page_of(9)}))
    above = chain.steps[1]

    def pack() -> None:
        source = _core.PageSource.capture(capture)
        out = chain.directory / "packed"
        places = (str(chain.builds), str(chain.tmp), str(out))
        _core.pack(source, str(above.header), above.digest, *places)

    whole = build.read_bytes()
    for what in damaged(build, step=9):
        with pytest.raises(BlobDamaged, match=build.name):
            pack()
        assert not (chain.directory / "packed").exists(), what
        chain.assert_nothing_left()
    build.write_bytes(whole)
    pack()


def test_a_capture(chain: Chain) -> None:
    path = chain.directory / "captures" / "0"
    header, parent = chain.tmp / "provisional", chain.steps[0]
    source = _core.PageSource.capture(str(path))
    identity = "cd" * 32
    info = _core.provisional_header(
        str(parent.header), parent.digest, source, identity, str(header)
    )
    out = chain.tmp / "flat"

    def read() -> bytes:
        opened = _core.PageSource.capture(str(path))
        captures = {identity: opened}
        _core.materialize(str(header), info.digest, str(chain.builds), str(out), captures)
        content = out.read_bytes()
        out.unlink()
        return content

    whole = path.read_bytes()
    # List and sums are each followed by bytes up to the page that mean nothing: no error, no harm.
    for what in damaged(path, step=61):
        try:
            assert read() == chain.steps[1].content, what
            assert what == "one byte more" or unused_byte(what, len(SMALL)), what
        except BlobDamaged as error:
            assert error.fields["blob"] == str(path), what  # noqa: PT017
    path.write_bytes(whole)


def unused_byte(what: str, count: int) -> bool:
    at = int(what.split()[-1])
    used = 8 * count if at < 2 * PAGE_SIZE else 16 * count
    return what.startswith("flip") and PAGE_SIZE <= at < 3 * PAGE_SIZE and at % PAGE_SIZE >= used


def test_a_capture_that_was_never_sealed(chain: Chain) -> None:
    path = chain.tmp / "open"
    write_buffer(path, 8, SMALL, flags=0)
    assert not _core.capture_info(str(path)).sealed
    with pytest.raises(BlobDamaged, match="not completed"):
        _core.PageSource.capture(str(path))
    with pytest.raises(BlobDamaged, match="not completed"):
        _core.write_out(str(path), str(chain.tmp / "out"))


def test_a_list_that_is_no_list_of_this_device(chain: Chain) -> None:
    path = chain.tmp / "wrong"
    write_buffer(path, 4, SMALL)
    with pytest.raises(BlobDamaged, match="page in the list is 4"):
        _core.PageSource.capture(str(path))


def test_what_is_missing_is_named(chain: Chain) -> None:
    (build,) = chain.builds.iterdir()
    header = chain.steps[1]
    build.rename(chain.tmp / "away")
    with pytest.raises(BlobMissing, match=build.name):
        chain.materialize(1)
    with pytest.raises(BlobMissing, match=build.name):
        _core.verify_build(str(build), build.name)
    header.header.unlink()
    with pytest.raises(BlobMissing, match=header.digest):
        chain.materialize(1)
    with pytest.raises(BlobMissing, match="nowhere"):
        _core.PageSource.capture(str(chain.tmp / "nowhere"))


def test_a_whole_blob_under_another_name(chain: Chain) -> None:
    first = chain.steps[1]
    source = _core.PageSource.capture(str(chain.capture({1: page_of(100)})))
    chain.pack(source, 1, chain.content_after(1, {1: page_of(100)}))
    one, other = sorted(chain.builds.iterdir())
    with pytest.raises(BlobDamaged, match="digest of the frame table"):
        _core.verify_build(str(one), other.name)
    with pytest.raises(BlobDamaged, match="another"):
        _core.header_info(str(chain.steps[2].header), first.digest)


def test_arguments_that_contradict_each_other(chain: Chain) -> None:
    header, digest = str(chain.steps[1].header), chain.steps[1].digest
    for wrong in ("", "xyz", digest.upper(), digest[:-1]):
        with pytest.raises(ValueError, match="64 lower-case hex digits"):
            _core.header_info(header, wrong)
    path = chain.tmp / "smaller"
    write_buffer(path, 5, SMALL)
    source = _core.PageSource.capture(str(path))
    with pytest.raises(ValueError, match="5 pages over a header of 8"):
        chain.pack(source, 1, b"")
    with pytest.raises(ValueError, match="no device of 1 pages"):
        _core.pack_file(
            str(chain.steps[1].flat), 1, str(chain.builds), str(chain.tmp), str(chain.tmp / "h")
        )
    with pytest.raises(ValueError, match="0 threads"):
        chain.materialize(1, threads=0)


def test_a_header_that_still_maps_to_a_capture_has_no_packed_child(chain: Chain) -> None:
    source = _core.PageSource.capture(str(chain.capture({1: page_of(5)})))
    above, out = chain.steps[1], chain.directory / "provisional"
    info = _core.provisional_header(str(above.header), above.digest, source, "ef" * 32, str(out))
    later = _core.PageSource.capture(str(chain.capture({2: page_of(6)})))
    with pytest.raises(ValueError, match="pack that first"):
        _core.pack(
            later, str(out), info.digest, str(chain.builds), str(chain.tmp),
            str(chain.directory / "h"), str(above.flat),
        )  # fmt: skip
    chain.assert_nothing_left()
