"""A durable commit whose sync failed must not come back with the next process.

SQLite writes a transaction to its log and then syncs the log. Where the sync fails the commit
fails, but what was written is whole, and whoever opens the database next takes it for committed.
"""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

from diapause.catalog import Catalog

COMMIT = """
import os, pathlib, signal, sys
from diapause.catalog import Catalog
from diapause.database import Database
from diapause.errors import StorageFailed

{before}
catalog = Catalog(pathlib.Path(sys.argv[1]))
catalog.remember("before", "kept")
try:
    with catalog.database.transaction(durable=True) as db:
        for number in range(200):
            db.execute("INSERT INTO facts VALUES (?, ?)", (f"lost{number}", "x" * 500))
except StorageFailed:
    print("failed", flush=True)
    {after}
os.kill(os.getpid(), signal.SIGKILL)
"""


def commit_under_failing_syncs(path: Path, before: str = "", after: str = "") -> None:
    """One durable commit whose sync fails, as does every later one; then its process is killed."""
    # The catalog is made first, by this process: the other one syncs only what it writes. Its first
    # sync is of the log's head, by the first row; the second is of the commit.
    Catalog(path).close()
    script = COMMIT.replace("{before}", before).replace("{after}", after)
    command = [
        "strace", "-f", "-qq", "-o", "/dev/null", "-P", f"{path}-wal",
        "-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO:when=2+",
        sys.executable, "-c", script, str(path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("failed\n", -signal.SIGKILL), done


def lost(path: Path) -> int:
    """How many rows of the failed commit a new process finds."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return int(db.execute("SELECT count(*) FROM facts WHERE name LIKE 'lost%'").fetchone()[0])


def test_it_does_not_come_back(tmp_path: Path) -> None:
    """The process is killed at once; what was committed before is there."""
    path = tmp_path / "catalog.sqlite3"
    commit_under_failing_syncs(path)
    assert lost(path) == 0
    with contextlib.closing(Catalog(path)) as catalog:
        assert catalog.fact("before") == "kept"


def test_writing_goes_on_after_it(tmp_path: Path) -> None:
    """What needs no sync is written, and is there afterwards."""
    path = tmp_path / "catalog.sqlite3"
    commit_under_failing_syncs(path, after='catalog.remember("after", "kept")')
    assert lost(path) == 0
    with contextlib.closing(Catalog(path)) as catalog:
        assert catalog.fact("after") == "kept"


def test_without_the_writing_over_it_would(tmp_path: Path) -> None:
    """The danger is real: this is what SQLite does when nobody sees to it."""
    path = tmp_path / "catalog.sqlite3"
    commit_under_failing_syncs(path, before="Database._write_over = lambda self: None")
    assert lost(path) == 200
