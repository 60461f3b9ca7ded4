"""A ready snapshot that can't be used: the run boots, and says so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diapause.catalog import Catalog, SnapshotRecord
from diapause.guest.images import Image
from diapause.model import GcRequest
from diapause.sandbox.ready import is_ready
from tests.framework.catalog_tap import Tap, before_step
from tests.framework.sandbox import Daemon, real_home

pytestmark = pytest.mark.vm


@pytest.fixture
def home(tiny_image: Image) -> Iterator[Daemon]:
    """A home with a packed ready snapshot in it."""
    with real_home(tiny_image) as made:
        first, _ = made.run_as_asked()
        parent = first.inspect().parent
        assert parent is not None
        made.packed(parent)
        first.remove()
        yield made


def ready(home: Daemon) -> list[SnapshotRecord]:
    with contextlib.closing(Catalog(home.home.catalog)) as catalog:
        return [row for row in catalog.snapshots() if is_ready(row)]


def damaged_state(home: Daemon, snapshot: str) -> None:
    _damage(home.home.snapshot(snapshot) / "device-state")


def missing_state(home: Daemon, snapshot: str) -> None:
    (home.home.snapshot(snapshot) / "device-state").unlink()


def missing_row(home: Daemon, snapshot: str) -> None:
    with contextlib.closing(Catalog(home.home.catalog)) as catalog:
        row = catalog.snapshot(snapshot)
        assert row is not None
        row.state = "failed"
        row.error = {"message": "lost with the host"}
        catalog.put_snapshot(row, durable=True)


def other_layout(home: Daemon, snapshot: str) -> None:
    with contextlib.closing(Catalog(home.home.catalog)) as catalog:
        row = catalog.snapshot(snapshot)
        assert row is not None
        row.layout += 1
        catalog.put_snapshot(row, durable=True)


def _damage(path: Path) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.write(b"damage")


@pytest.mark.parametrize("spoil", [damaged_state, missing_state, missing_row, other_layout])
def test_one_that_cannot_be_used_is_no_failure(
    home: Daemon, spoil: Callable[[Daemon, str], None]
) -> None:
    """The run boots and keeps another one, from which the next starts."""
    [before] = ready(home)
    spoil(home, before.id)
    booted, answer = home.run_as_asked()
    assert not answer.warm
    assert booted.sh("echo up").strip() == "up"
    if spoil is not missing_row:
        assert any("booted" in note for note in answer.notes), answer.notes
    [after] = ready(home)
    assert after.id != before.id
    assert home.run_as_asked()[1].warm


def test_gc_frees_what_no_sandbox_stands_on(home: Daemon) -> None:
    """While one does it stays; afterwards the next run makes it again."""
    later, answer = home.run_as_asked()
    assert answer.warm
    home.client.gc(GcRequest())
    assert len(ready(home)) == 1
    later.remove()
    freed = home.client.gc(GcRequest())
    assert freed.freed_bytes > 0
    assert ready(home) == []
    assert not home.run_as_asked()[1].warm
    assert home.run_as_asked()[1].warm


def test_a_keep_that_fails_fails_no_run(tiny_image: Image) -> None:
    """The guest goes on, the answer says so, and the next run keeps one."""
    with real_home(tiny_image) as home:
        home.client.images()
        tap = Tap(home.home)
        tap.fail(before_step("save", "freeze"))
        first, answer = home.run_as_asked()
        tap.clear()
        assert any("no ready snapshot" in note for note in answer.notes), answer.notes
        assert first.sh("echo up").strip() == "up"
        assert ready(home) == []
        assert not home.run_as_asked()[1].warm
        assert len(ready(home)) == 1
