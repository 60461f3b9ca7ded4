"""Digests of a flat file are made of what it was made of, and builds again of flat files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from diapause import _core
from diapause.errors import BlobDamaged, Cancelled
from diapause.units import PAGE_SIZE
from tests.framework.blobs import Chain, page_of

CHUNK_PAGES = 1024
PAGES = 9 * CHUNK_PAGES + 5  # more than is put together at once, and a last chunk that is short
LAST = PAGES - 1


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Three captures, each over the one before; the last one makes pages zero again."""
    made = Chain(tmp_path_factory.mktemp("chain"), PAGES)
    chosen = random.Random(4)
    first = {page: page_of(1000 + page) for page in chosen.sample(range(PAGES), 300)}
    second = {page: page_of(page % 90 + 1) for page in range(3 * CHUNK_PAGES, 3 * CHUNK_PAGES + 80)}
    third = {page: page_of(0) for page in list(first)[:40]} | {LAST: page_of(7), 0: page_of(5000)}
    for parent, pages in enumerate((first, second, third)):
        source = _core.PageSource.capture(str(made.capture(pages)))
        made.pack(source, parent, made.content_after(parent, pages))
    return made


def sums_of(chain: Chain, step: int, out: Path, base: tuple[int, Path] | None = None) -> bytes:
    """The digests of a step's device."""
    above, under = chain.steps[step], None
    if base is not None:
        below = chain.steps[base[0]]
        under = (str(below.header), below.digest, str(base[1]))
    made = _core.sum_device(str(above.header), above.digest, str(chain.builds), under, threads=2)
    made.write(str(out))
    return out.read_bytes()


def damage_of(flat: Path, sums: Path) -> list[tuple[int, str, str]]:
    return [*_core.check_blobs([("flat", str(flat), str(sums))])]


@pytest.mark.parametrize("step", range(4))
def test_they_are_those_of_the_file_and_a_turned_bit_is_found(
    chain: Chain, tmp_path: Path, step: int
) -> None:
    sums, flat = tmp_path / "sums", tmp_path / "flat"
    sums_of(chain, step, sums)
    content = bytearray(chain.steps[step].content)
    flat.write_bytes(content)
    assert damage_of(flat, sums) == []
    for page in (0, 3 * CHUNK_PAGES + 7, LAST):
        content[page * PAGE_SIZE + 99] ^= 4
        flat.write_bytes(content)
        [(_, cause, _)] = damage_of(flat, sums)
        assert f"byte {page // CHUNK_PAGES * CHUNK_PAGES * PAGE_SIZE}" in cause
        content[page * PAGE_SIZE + 99] ^= 4


@pytest.mark.parametrize("step", range(1, 4))
@pytest.mark.parametrize("base", range(4))
def test_with_those_of_a_relative_they_are_the_same(
    chain: Chain, tmp_path: Path, step: int, base: int
) -> None:
    under = tmp_path / "base"
    sums_of(chain, base, under)
    whole = sums_of(chain, step, tmp_path / "whole")
    assert sums_of(chain, step, tmp_path / "over", (base, under)) == whole


def test_a_bad_frame_is_no_digest(chain: Chain, tmp_path: Path) -> None:
    """What can't be verified gives none, and leaves no file."""
    [build, *_] = chain.builds.iterdir()
    before = build.read_bytes()
    try:
        build.write_bytes(before[:40] + bytes([before[40] ^ 1]) + before[41:])
        with pytest.raises(BlobDamaged, match=build.name):
            sums_of(chain, 3, tmp_path / "sums")
    finally:
        build.write_bytes(before)
    assert list(tmp_path.iterdir()) == []


def test_it_is_stopped_between_two_windows(chain: Chain, tmp_path: Path) -> None:
    above, told = chain.steps[3], []

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        raise Cancelled(operation="o", verb="check")

    with pytest.raises(Cancelled):
        _core.sum_device(str(above.header), above.digest, str(chain.builds), progress=stop)
    assert len(told) == 1
    assert told[0][1] == PAGES


# -- builds made again -----------------------------------------------------------------------------


def source(chain: Chain, step: int, place: Path, *, summed: bool = True) -> tuple[str, ...]:
    """A flat file of a step at `place`, with its digests."""
    above = chain.steps[step]
    flat, sums = place / f"{step}.flat", place / f"{step}.sums"
    flat.write_bytes(above.content)
    if summed:
        sums_of(chain, step, sums)
    return str(above.header), above.digest, str(flat), str(sums) if summed else ""


def rebuild(chain: Chain, build: Path, *sources: tuple[str, ...]) -> _core.RebuildResult:
    rows = [(header, digest, flat, sums or None) for header, digest, flat, sums in sources]
    return _core.rebuild_build(build.name, rows, str(chain.builds), str(chain.tmp))


@pytest.fixture
def build(chain: Chain) -> Path:
    """The first capture's build, as it has to be; put back afterwards."""
    above = chain.steps[1]
    [(name, _)] = _core.header_info(str(above.header), above.digest).builds
    return chain.builds / name


def broken(kind: str, whole: bytes) -> bytes | None:
    """A build's bytes, damaged in one of several ways; None for a file that is gone."""
    at = {"frame": 50, "head": 17, "table": len(whole) - 100, "footer": len(whole) - 3}.get(kind)
    if at is not None:
        return whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :]
    return {"missing": None, "empty": b"", "cut": whole[: len(whole) // 2]}[kind]


@pytest.mark.parametrize("kind", ["frame", "head", "table", "footer", "missing", "empty", "cut"])
def test_a_build_is_made_again_as_it_was(
    chain: Chain, build: Path, tmp_path: Path, kind: str
) -> None:
    whole = build.read_bytes()
    try:
        build.unlink()
        if (bad := broken(kind, whole)) is not None:
            build.write_bytes(bad)
        sums = source(chain, 1, tmp_path, summed=False)  # a build that is gone gives no digests
        made = rebuild(chain, build, sums)
        assert build.read_bytes() == whole
        assert made.packed_frames == (1 if kind == "frame" else 19)
        assert made.kept_frames == (18 if kind == "frame" else 0)
        chain.assert_nothing_left()
    finally:
        build.unlink(missing_ok=True)
        build.write_bytes(whole)


def test_several_files_together_have_what_none_has_alone(
    chain: Chain, build: Path, tmp_path: Path
) -> None:
    """One's bad chunks are another's good ones; without digests a bad one is not believed."""
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    one, other = source(chain, 1, first), source(chain, 1, second)
    whole = build.read_bytes()
    for flat, chunks in ((Path(one[2]), range(5)), (Path(other[2]), range(5, 10))):
        content = bytearray(flat.read_bytes())
        for chunk in chunks:
            content[chunk * CHUNK_PAGES * PAGE_SIZE + 5] ^= 1
        flat.write_bytes(content)
    try:
        bad = broken("table", whole)
        assert bad is not None
        build.write_bytes(bad)
        for sources, cause in (
            ([one], "pages lie in no other file"),
            ([(*one[:3], "")], "another build"),
            ([], "no header"),
        ):
            if sources and "another" in cause:  # every page of it is turned over, used or not
                Path(one[2]).write_bytes(bytes(b ^ 1 for b in chain.steps[1].content))
            with pytest.raises(BlobDamaged, match=cause):
                rebuild(chain, build, *sources)
            assert build.read_bytes() == bad
            chain.assert_nothing_left()
            if sources and "another" not in cause:
                rebuild(chain, build, one, other)
                assert build.read_bytes() == whole
                build.write_bytes(bad)
    finally:
        build.write_bytes(whole)


# -- files without digests -------------------------------------------------------------------------


def test_every_page_of_a_capture_is_compared_with_its_sum(chain: Chain, tmp_path: Path) -> None:
    pages = {page: page_of(2000 + page) for page in range(600)}
    capture = chain.capture(pages)
    assert _core.check_blobs([("capture", str(capture), "")]) == []
    whole = capture.read_bytes()
    for at in (5000, len(whole) - 1):  # the list, the last page
        bad = tmp_path / "bad"
        bad.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        [(_, cause, kind)] = _core.check_blobs([("capture", str(bad), "")])
        assert kind == "damaged"
    assert "captured page" in cause


def test_what_has_no_digest_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as out:
        out.truncate(40 << 20)
        out.seek(39 << 20)
        out.write(b"x" * 5000)
    assert _core.check_blobs([("read", str(file), "")], threads=3) == []
    [(_, _, kind)] = _core.check_blobs([("read", str(tmp_path / "none"), "")])
    assert kind == "missing"
