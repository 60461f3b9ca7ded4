"""The end of a database: nothing of it is open or being closed when `close` returns."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from diapause.database import Database

WAIT_S = 60.0
ROUNDS, THREADS = 60, 6


def test_a_thread_that_ends_meanwhile_has_closed_its_own(tmp_path: Path) -> None:
    """SQLite takes its files away with the last connection, in whichever thread that is closed."""
    for number in range(ROUNDS):
        place = tmp_path / str(number)
        place.mkdir()
        database, ready = Database(place / "db"), threading.Barrier(THREADS + 1)

        def use(database: Database = database, ready: threading.Barrier = ready) -> None:
            database.connection().execute("SELECT 1 FROM sqlite_master").fetchall()
            ready.wait(WAIT_S)

        threads = [threading.Thread(target=use) for _ in range(THREADS)]
        with database.transaction() as db:
            db.execute("CREATE TABLE t (x)")
        for thread in threads:
            thread.start()
        ready.wait(WAIT_S)
        database.close()
        left = sorted(path.name for path in place.iterdir())
        shutil.rmtree(place)
        for thread in threads:
            thread.join(WAIT_S)
        assert left == ["db"]
