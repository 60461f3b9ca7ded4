"""Full disks, limits and kills while blobs are written: a typed error and nothing half."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diapause import _core
from diapause.errors import NotEnoughSpace, StorageFailed
from diapause.units import KIB, MIB, PAGE_SIZE
from tests.framework.blobs import Chain, page_of, write_buffer

PAGES = 600
CAPTURED = {page: page_of(1000 + page) for page in range(PAGES)}


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Writes beyond it fail with EFBIG; Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def in_small_tmpfs(directory: Path, size_bytes: int, work: Callable[[], None]) -> None:
    """Run `work` in a child that has a tmpfs of its own at `directory`, in a mount namespace.

    An unprivileged user gets the namespace with a user namespace.
    """
    child = multiprocessing.get_context("fork").Process(
        target=_with_tmpfs, args=(directory, size_bytes, work)
    )
    child.start()
    child.join(60)
    assert child.exitcode == 0


def _with_tmpfs(directory: Path, size_bytes: int, work: Callable[[], None]) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    new_mount, new_user = 0x00020000, 0x10000000
    user, group = os.geteuid(), os.getegid()
    assert libc.unshare(new_mount if user == 0 else new_mount | new_user) == 0
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    options = f"size={size_bytes},mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True)
    work()


def pack_fails(chain: Chain, source: _core.PageSource, error: type[Exception]) -> Exception:
    with pytest.raises(error) as raised:
        chain.pack(source, 0, b"")
    chain.assert_nothing_left()
    assert list(chain.builds.iterdir()) == []
    assert len(list((chain.directory / "headers").iterdir())) == 1
    return raised.value


def test_a_full_disk_fails_a_pack_and_leaves_nothing(tmp_path: Path) -> None:
    buffer, small = tmp_path / "buffer", tmp_path / "small"
    write_buffer(buffer, PAGES, CAPTURED)
    small.mkdir()

    def work() -> None:
        chain = Chain(small, PAGES)
        source = _core.PageSource.capture(str(buffer))
        error = pack_fails(chain, source, NotEnoughSpace)
        assert isinstance(error, NotEnoughSpace)
        assert error.fields["directory"] == str(chain.tmp)
        assert error.fields["needed_bytes"] == PAGES * PAGE_SIZE > error.fields["available_bytes"]

    in_small_tmpfs(small, 1 * MIB, work)


def test_a_full_disk_fails_a_materialize_and_leaves_nothing(tmp_path: Path) -> None:
    chain = Chain(tmp_path, PAGES)
    source = _core.PageSource.capture(str(chain.capture(CAPTURED)))
    chain.pack(source, 0, chain.content_after(0, CAPTURED))

    def work() -> None:
        with pytest.raises(NotEnoughSpace):
            chain.materialize(1)
        chain.assert_nothing_left()

    in_small_tmpfs(chain.tmp, 1 * MIB, work)
    assert chain.materialize(1)[0] == chain.steps[1].content


def test_a_full_disk_keeps_the_buffer_and_the_capture_can_be_written_later(tmp_path: Path) -> None:
    buffer, small = tmp_path / "buffer", tmp_path / "small"
    write_buffer(buffer, PAGES, CAPTURED)
    small.mkdir()
    before = buffer.read_bytes()

    def work() -> None:
        with pytest.raises(NotEnoughSpace):
            _core.write_out(str(buffer), str(small / "capture"))

    in_small_tmpfs(small, 1 * MIB, work)
    assert buffer.read_bytes() == before
    _core.write_out(str(buffer), str(small / "capture"))
    assert _core.PageSource.capture(str(small / "capture")).page_count == PAGES


def test_a_limit_on_files_fails_every_writer_and_leaves_nothing(tmp_path: Path) -> None:
    chain = Chain(tmp_path, PAGES)
    capture = str(chain.capture(CAPTURED))
    source = _core.PageSource.capture(capture)
    with file_size_limit(256 * KIB):
        pack_fails(chain, source, StorageFailed)
    result = chain.pack(source, 0, chain.content_after(0, CAPTURED))
    assert result.stored_pages == PAGES
    with file_size_limit(256 * KIB):
        with pytest.raises(StorageFailed):
            chain.materialize(1)
        chain.assert_nothing_left()
    header = chain.steps[1]
    with file_size_limit(16), pytest.raises(StorageFailed):
        _core.provisional_header(
            str(header.header), header.digest, source, "aa" * 32, str(chain.tmp / "p")
        )
    chain.assert_nothing_left()


def test_what_progress_raises_stops_a_pack_and_leaves_nothing(tmp_path: Path) -> None:
    chain = Chain(tmp_path, 3000)
    pages = {page: page_of(1 + page % 90) for page in range(3000)}
    source = _core.PageSource.capture(str(chain.capture(pages)))
    told: list[tuple[int, int]] = []

    def stop_at_second(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 2:
            raise KeyboardInterrupt

    above = chain.steps[0]
    places = (str(chain.builds), str(chain.tmp), str(chain.directory / "h"))
    with pytest.raises(KeyboardInterrupt):
        _core.pack(source, str(above.header), above.digest, *places, progress=stop_at_second)
    assert told == [(0, 3000), (1024, 3000)]
    chain.assert_nothing_left()
    told.clear()
    _core.pack(
        source, str(above.header), above.digest, *places,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told[-1] == (3000, 3000)


def test_an_existing_file_is_never_overwritten_by_a_materialize(tmp_path: Path) -> None:
    chain = Chain(tmp_path, 8)
    (chain.tmp / "flat").write_bytes(b"mine")
    with pytest.raises(StorageFailed, match="exists"):
        chain.materialize(0)
    assert (chain.tmp / "flat").read_bytes() == b"mine"


def _pack_for_ever(chain: Chain, capture: str, parent: int) -> None:
    source = _core.PageSource.capture(capture)
    above = chain.steps[parent]
    places = (str(chain.builds), str(chain.tmp), str(chain.directory / "headers" / "killed"))
    while True:
        _core.pack(source, str(above.header), above.digest, *places)


def test_a_kill_at_any_moment_leaves_whole_blobs_or_none(tmp_path: Path) -> None:
    chain, rng = Chain(tmp_path, PAGES), random.Random(1)
    capture = str(chain.capture(CAPTURED))
    content = chain.content_after(0, CAPTURED)
    published = 0
    for _ in range(25):
        child = multiprocessing.get_context("fork").Process(
            target=_pack_for_ever, args=(chain, capture, 0)
        )
        child.start()
        time.sleep(rng.uniform(0.001, 0.06))
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        for build in chain.builds.iterdir():
            assert _core.verify_build(str(build), build.name) == PAGES
        header = chain.directory / "headers" / "killed"
        if header.exists():
            published += 1
            digest = _core.blake3_bytes(header.read_bytes()[: -(12 + 56)])
            out = chain.directory / "out"
            _core.materialize(str(header), digest, str(chain.builds), str(out))
            assert out.read_bytes() == content
            out.unlink()
            header.unlink()
            for build in chain.builds.iterdir():
                build.unlink()
    assert published > 0
    # What was killed left at most its temporary files.
    assert all(path.name.startswith(("build.", "header.")) for path in chain.tmp.iterdir())
