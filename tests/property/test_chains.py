"""A device that is captured, packed and put together again is the same as plain bytes are."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diapause import _core
from diapause.errors import BlobDamaged
from diapause.units import PAGE_SIZE
from tests.framework.blobs import ZERO_PAGE, Chain, page_of

PAGES_MAX = 70  # more than four frames
CAPTURE_ID = "ab" * 32


class Step(NamedTuple):
    """One capture: what it wrote over which earlier step, and how it is done."""

    parent: int
    writes: dict[int, int]  # page: seed; -1 writes the parent's page again
    capacity: int
    through_flat: bool


def steps(page_count: int) -> st.SearchStrategy[list[Step]]:
    seed = st.sampled_from([-1, -1, 0, 0, 1, 2, 3, 100, 101, 102])
    writes = st.dictionaries(st.integers(0, page_count - 1), seed, max_size=page_count)
    step = st.builds(Step, st.integers(0, 5), writes, st.integers(0, page_count), st.booleans())
    return st.lists(step, min_size=1, max_size=5)


histories = st.integers(1, PAGES_MAX).flatmap(
    lambda page_count: st.tuples(st.just(page_count), steps(page_count))
)


def pages_written(chain: Chain, step: Step, parent: int) -> dict[int, bytes]:
    content = chain.steps[parent].content
    return {
        page: content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] if seed < 0 else page_of(seed)
        for page, seed in step.writes.items()
    }


def expected_fates(old: bytes, pages: dict[int, bytes]) -> tuple[int, int, int]:
    """How many of the captured pages are stored, zero and unchanged."""
    zero = sum(data == ZERO_PAGE for data in pages.values())
    same = sum(
        data != ZERO_PAGE and data == old[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        for page, data in pages.items()
    )
    return len(pages) - zero - same, zero, same


def run_step(chain: Chain, step: Step) -> None:
    """Capture, make provisional, pack; what the device then has is the same both times."""
    parent = step.parent % len(chain.steps)
    above = chain.steps[parent]
    pages = pages_written(chain, step, parent)
    content = chain.content_after(parent, pages)
    source = _core.PageSource.capture(str(chain.capture(pages, step.capacity)))
    assert (source.page_count, source.bytes) == (len(pages), len(pages) * PAGE_SIZE)
    provisional = chain.tmp / "provisional"
    info = _core.provisional_header(
        str(above.header), above.digest, source, CAPTURE_ID, str(provisional)
    )
    assert info.captures == ([(CAPTURE_ID, len(pages))] if pages else [])
    out = chain.tmp / "flat"
    _core.materialize(
        str(provisional), info.digest, str(chain.builds), str(out), {CAPTURE_ID: source}
    )
    assert out.read_bytes() == content
    out.unlink()
    provisional.unlink()
    result = chain.pack(source, parent, content, step.through_flat)
    fates = (result.stored_pages, result.zero_pages, result.unchanged_pages)
    assert fates == expected_fates(above.content, pages)
    assert (result.build_id is None) == (result.stored_pages == 0)
    if result.build_id is not None:
        build = chain.builds / result.build_id
        assert build.stat().st_size == result.stored_bytes
        assert _core.verify_build(str(build), result.build_id) == result.stored_pages
    chain.assert_nothing_left()


@given(histories)
def test_every_step_of_a_history_is_put_together_as_it_was(
    history: tuple[int, list[Step]],
) -> None:
    page_count, todo = history
    with tempfile.TemporaryDirectory() as directory:
        chain = Chain(Path(directory), page_count)
        for step in todo:
            run_step(chain, step)
        for number, done_step in enumerate(chain.steps):
            assert chain.materialize(number, threads=1 + number % 3)[0] == done_step.content
            for base in range(len(chain.steps)):
                content, done = chain.materialize(number, base)
                assert content == done_step.content
                if base == number:
                    assert done.written_bytes == 0


@settings(max_examples=20)
@given(histories)
def test_the_same_capture_is_packed_to_the_same_bytes(history: tuple[int, list[Step]]) -> None:
    page_count, todo = history
    with tempfile.TemporaryDirectory() as directory:
        chain = Chain(Path(directory), page_count)
        step = todo[0]
        pages = pages_written(chain, step, 0)
        content = chain.content_after(0, pages)
        source = _core.PageSource.capture(str(chain.capture(pages)))
        first = chain.pack(source, 0, content, through_flat=True)
        second = chain.pack(source, 0, content, through_flat=False)
        assert (first.build_id, first.header_digest) == (second.build_id, second.header_digest)
        plain = chain.directory / "plain"
        plain.write_bytes(content)
        header = str(chain.directory / "root")
        places = (str(chain.builds), str(chain.tmp), header)
        root = _core.pack_file(str(plain), page_count, *places)
        assert (root.build_id, root.header_digest) == (first.build_id, first.header_digest)


@given(histories)
def test_headers_say_what_is_where(history: tuple[int, list[Step]]) -> None:
    page_count, todo = history
    with tempfile.TemporaryDirectory() as directory:
        chain = Chain(Path(directory), page_count)
        for step in todo:
            run_step(chain, step)
        for step_done in chain.steps:
            header, digest = str(step_done.header), step_done.digest
            extents = _core.header_extents(header, digest)
            info = _core.header_info(header, digest)
            assert (info.extent_count, info.page_count) == (len(extents), page_count)
            assert info.size_bytes == step_done.header.stat().st_size
            next_page = 0
            for page, length, build, position in extents:
                assert page == next_page
                next_page += length
                for step_in in range(length):
                    expected = None if build is None else (build, position + step_in)
                    assert _core.lookup(header, digest, page + step_in) == expected
            assert next_page == page_count
            assert info.mapped_pages == sum(e[1] for e in extents if e[2] is not None)
            with pytest.raises(IndexError):
                _core.lookup(header, digest, page_count)


@given(st.integers(1, PAGES_MAX), st.data())
def test_a_flipped_byte_is_never_put_together(page_count: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        chain = Chain(Path(directory), page_count)
        for seed in (1, 100):
            pages = {page: page_of(seed + page % 3) for page in range(0, page_count, seed % 7 + 1)}
            source = _core.PageSource.capture(str(chain.capture(pages)))
            chain.pack(source, len(chain.steps) - 1, chain.content_after(-1, pages))
        blobs = [*chain.builds.iterdir(), chain.steps[-1].header]
        blob = data.draw(st.sampled_from(sorted(blobs)))
        content = bytearray(blob.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        blob.write_bytes(bytes(content))
        name = blob.name if blob.parent == chain.builds else chain.steps[-1].digest
        try:
            assert chain.materialize(2)[0] == chain.steps[2].content
        except BlobDamaged as error:
            assert error.fields["blob"] == name  # noqa: PT017 (it may also not be read at all)
        chain.assert_nothing_left()
