"""Every version of the catalog is brought forward, one step each, whatever dies on the way."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from diapause import migrations
from diapause.catalog import Catalog
from diapause.errors import HomeNewer
from tests.framework import sources

GOLDEN = sources.ROOT / "tests" / "formats" / "golden"
VERSIONS = range(1, migrations.VERSION)
OPEN = (
    "import sys, pathlib; from diapause.catalog import Catalog; Catalog(pathlib.Path(sys.argv[1]))"
)
# Where a migration is killed: before the first change of each kind it makes, and at its last.
POINTS = ["copy", "sync", "rename", "statement", "version", "commit", "after"]


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> int:
    """Every version there was before this one."""
    number: int = request.param
    return number


@pytest.fixture
def old(tmp_path: Path, version: int) -> Path:
    """A catalog as that version wrote it."""
    path = tmp_path / "catalog.sqlite3"
    shutil.copy2(GOLDEN / f"catalog.v{version}.sqlite3", path)
    path.chmod(0o600)
    return path


def rows(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Everything in a catalog, by table, without the columns that later versions added."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return {
            table: db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
            for (table,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
            if not table.startswith("sqlite_")
        }


def schema(path: Path) -> list[tuple[str, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        columns = "SELECT m.name, t.* FROM sqlite_schema m, pragma_table_info(m.name) t"
        indexes = "SELECT name, tbl_name FROM sqlite_schema WHERE type = 'index'"
        found = db.execute(columns).fetchall() + db.execute(indexes).fetchall()
        return sorted(tuple(map(str, row)) for row in found)


def version_of(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def check_migrated(path: Path, before: dict[str, list[tuple[object, ...]]]) -> None:
    """Every row is there, readable, and the tables are those of a new home."""
    with contextlib.closing(Catalog(path)) as catalog:
        assert [row.name for row in catalog.sandboxes()] == ["web", None]
        [snapshot] = catalog.snapshots()
        assert (snapshot.name, snapshot.devices[0].changed_pages) == ("first", 1800)
        [operation] = catalog.journal.open_operations()
        assert (operation.verb, operation.steps) == ("save", ["prepare", "freeze"])
        assert catalog.fact("accelerator/6.1/x86_64/7.2.9") == "tcg"
        assert catalog.journal.event("tried").sequence == 1
    after = rows(path)
    for table, found in before.items():
        assert [row[: len(found[0])] for row in after[table]] == found, table
    fresh = path.with_name("fresh.sqlite3")
    Catalog(fresh).close()
    assert schema(path) == schema(fresh)
    assert version_of(path) == migrations.VERSION


def test_an_old_catalog_is_brought_forward(old: Path, version: int) -> None:
    """Its rows stay; a copy is kept until the new one has worked."""
    before = rows(old)
    copy = old.with_name(f"catalog.v{version}.sqlite3")
    with contextlib.closing(Catalog(old)) as catalog:
        assert rows(copy) == before
        assert version_of(copy) == version
        assert copy.stat().st_mode & 0o777 == 0o600
        catalog.worked()
        assert migrations.copies(catalog.database) == []
    check_migrated(old, before)


def test_the_copy_can_be_put_back(old: Path, version: int) -> None:
    """Whoever goes back to the earlier Diapause finds what it left."""
    before = rows(old)
    Catalog(old).close()
    old.with_name(f"catalog.v{version}.sqlite3").replace(old)
    assert version_of(old) == version
    assert rows(old) == before
    check_migrated(old, before)


KILLED = """
import os, pathlib, signal, sqlite3, sys
from diapause import migrations
from diapause.catalog import Catalog

path, point = pathlib.Path(sys.argv[1]), sys.argv[2]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dying(function):
    return lambda *given: die()

class Dying(sqlite3.Connection):
    def execute(self, statement, *given):
        at = {"statement": "CREATE INDEX operation_requests", "version": "PRAGMA user_version =",
              "commit": "COMMIT"}
        if statement.startswith(at.get(point, "never")):
            die()
        return super().execute(statement, *given)
    def backup(self, *given, **more):
        if point == "copy":
            die()
        return super().backup(*given, **more)

connect = sqlite3.connect
sqlite3.connect = lambda *given, **more: connect(*given, factory=Dying, **more)
if point == "sync":
    os.fsync = dying(os.fsync)
if point == "rename":
    pathlib.Path.rename = dying(None)
Catalog(path)
die()
"""


@pytest.mark.parametrize("point", POINTS)
def test_a_migration_that_is_killed_goes_on(old: Path, version: int, point: str) -> None:
    """At every point: the next open converges, and the copy is whole where there is one."""
    before = rows(old)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(old), point], timeout=60, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert version_of(old) == (migrations.VERSION if point == "after" else version)
    copy = old.with_name(f"catalog.v{version}.sqlite3")
    assert copy.exists() == (point not in ("copy", "sync", "rename"))
    if copy.exists():
        assert rows(copy) == before
    check_migrated(old, before)
    with contextlib.closing(Catalog(old)) as catalog:
        catalog.worked()
    assert [path.name for path in old.parent.glob("catalog.v*")] == []


def test_a_failed_step_leaves_the_version_before(
    old: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a step or none of it."""
    before = rows(old)
    broken = (*migrations.STEPS[-1], "INSERT INTO nowhere VALUES (1)")
    monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS[:-1], broken))
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        Catalog(old)
    assert rows(old) == before
    assert version_of(old) == version
    monkeypatch.undo()
    check_migrated(old, before)


def test_a_first_open_that_was_killed_between_tables_and_version(tmp_path: Path) -> None:
    """Version 1 made its tables before it counted."""
    path = tmp_path / "catalog.sqlite3"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in migrations.STEPS[0][:3]:
            db.execute(statement)
    with contextlib.closing(Catalog(path)) as catalog:
        assert catalog.sandboxes() == []
        assert migrations.copies(catalog.database) == []


def test_many_open_a_new_home_at_once(tmp_path: Path) -> None:
    """One of them makes the tables."""
    path = tmp_path / "catalog.sqlite3"
    openers = [subprocess.Popen([sys.executable, "-c", OPEN, str(path)]) for _ in range(4)]
    assert [opener.wait(timeout=60) for opener in openers] == [0] * 4
    assert version_of(path) == migrations.VERSION


def test_a_newer_home_is_refused_and_left_alone(tmp_path: Path) -> None:
    """By name, with both versions."""
    path = tmp_path / "catalog.sqlite3"
    Catalog(path).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {migrations.VERSION + 7}")
    before = path.read_bytes()
    with pytest.raises(HomeNewer) as caught:
        Catalog(path)
    assert caught.value.fields["found"] == migrations.VERSION + 7
    assert caught.value.fields["known"] == migrations.VERSION
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.glob("catalog.v*")] == []


def test_every_earlier_version_has_a_golden_catalog() -> None:
    """What homes on people's hosts look like."""
    for number in VERSIONS:
        assert version_of(GOLDEN / f"catalog.v{number}.sqlite3") == number
