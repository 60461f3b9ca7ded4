"""One open of the catalog fails, once: a typed error, and the next try reads and writes.

SQLite opens a file for reading where opening it for writing failed: a thread that got such a
connection and kept it could never write again.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from diapause.catalog import Catalog

_WRITE = """
import pathlib, sys
from diapause.catalog import Catalog
from diapause.errors import StorageFailed

catalog, refused = None, 0
while refused < 3:
    try:
        catalog = catalog or Catalog(pathlib.Path(sys.argv[1]))
        catalog.remember("quick", "kept")
        with catalog.database.transaction(durable=True) as db:
            db.execute("INSERT OR REPLACE INTO facts VALUES ('durable', 'kept')")
        break
    except StorageFailed:
        refused += 1
print(refused)
"""


def _write(path: Path, log: Path, *inject: str) -> int:
    """Write to a catalog under strace; how often that was refused."""
    traced = ["strace", "-f", "-qq", "-o", str(log), "-P", str(path), "-e", "trace=openat"]
    command = [*traced, *inject, sys.executable, "-c", _WRITE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("error", ["EMFILE", "ENOSPC", "EIO", "EINTR"])
def test_each_open(tmp_path: Path, error: str) -> None:
    path, log = tmp_path / "catalog.sqlite3", tmp_path / "calls"
    Catalog(path).close()
    assert _write(path, log) == 0
    opens = log.read_text().count("openat(")
    assert opens >= 2
    refused = [
        _write(path, log, "-e", f"inject=openat:error={error}:when={number}")
        for number in range(1, opens + 1)
    ]
    assert set(refused) <= {0, 1}
    assert error == "EINTR" or 1 in refused, "the errors reached nobody"
    with contextlib.closing(Catalog(path)) as catalog:
        assert {"quick", "durable"} <= catalog.facts().keys()
