"""`support-bundle`: what a report of a problem needs, with secrets left out.

It is put together by the client from the home's files, since it is wanted most when no daemon
starts; what only a daemon knows is asked of one, and its failure is a part like any other.

Invariants:
- What goes in is named here, file by file and column by column. No memory, disk, console, command
  line, environment, idempotency key or machine id is among it; names that people gave are.
- Every part is bounded, so the whole is; one that can't be had is an entry of `missing.json`.
- The file has mode 0600 and is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import io
import os
import platform
import sqlite3
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from diapause import __version__
from diapause.catalog import now
from diapause.errors import DiapauseError, StorageFailed
from diapause.units import KIB, MIB

if TYPE_CHECKING:
    from diapause.daemon.client import Client
    from diapause.store.home import Home

_LOG_BYTES = 4 * MIB
_VMM_LOG_BYTES = 64 * KIB
_VMM_LOGS = 64
_ROWS = 5000
_FILES = 20_000
_PROGRAM_S = 20.0

# Of a row's record, what is said of it; `error` is cut down to its code and its sentence.
_SANDBOX = (
    "id", "name", "state", "created_at", "image", "memory_bytes", "cpus", "disks_bytes",
    "identity", "process", "snapshot", "root", "captures", "overlays", "tracker", "agent",
    "frozen", "net", "error", "reason",
)  # fmt: skip
_SNAPSHOT = (
    "id", "name", "sandbox", "parent", "state", "durability", "created_at", "boot_id", "image",
    "identity", "layout", "memory_bytes", "cpus", "disks_bytes", "dirty_source", "dirty_pages",
    "frozen_ms", "state_bytes", "devices", "error",
)  # fmt: skip


def write_bundle(home: Home, client: Client, place: Path) -> dict[str, str]:
    """Write the bundle to `place`; what is missing in it, and why. Raises StorageFailed."""
    missing: dict[str, str] = {}
    fresh = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(file, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as archive:
            for name, make in _parts(home, client):
                try:
                    _add(archive, name, make())
                except (DiapauseError, OSError, sqlite3.Error, ValueError) as error:
                    missing[name] = f"{type(error).__name__}: {error}"
            _add(archive, "missing.json", msgspec.json.encode(missing))
        fresh.replace(place)
    except OSError as error:
        raise StorageFailed(what=f"the bundle {place}", cause=error) from error
    finally:
        fresh.unlink(missing_ok=True)
    return missing


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(f"diapause-support/{name}")
    entry.size, entry.mode, entry.mtime = len(content), 0o600, int(time.time())
    archive.addfile(entry, io.BytesIO(content))


def _parts(home: Home, client: Client) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Every file of the bundle and what makes it."""
    yield "about.json", lambda: _about(home)
    yield "doctor.json", lambda: msgspec.json.encode(client.doctor())
    yield "metrics.txt", lambda: client.metrics().encode()
    yield "sandboxes.json", lambda: _records(home, "sandboxes", _SANDBOX)
    yield "snapshots.json", lambda: _records(home, "snapshots", _SNAPSHOT)
    for table, order in (("operations", "rowid"), ("steps", "operation"), ("events", "sequence")):
        yield f"{table}.json", partial(_rows, home, table, order)
    yield "facts.json", lambda: _rows(home, "facts", "name")
    yield "files.txt", lambda: _tree(home)
    for log in (home.serve_log, home.serve_log.with_suffix(".log.1")):
        if log.exists():
            yield log.name, partial(_tail, log, _LOG_BYTES)
    logs = sorted(home.sandboxes.glob("*/vmm.log"), key=_changed, reverse=True)
    for log in logs[:_VMM_LOGS]:
        yield f"vmm/{log.parent.name}.log", partial(_tail, log, _VMM_LOG_BYTES)


def _about(home: Home) -> bytes:
    system = os.uname()
    about: dict[str, Any] = {
        "at": now(), "diapause": __version__, "python": platform.python_version(),
        "kernel": f"{system.sysname} {system.release} {system.version}",
        "machine": system.machine, "cpus": os.cpu_count(), "uid": os.geteuid(),
        "home": str(home.root), "sockets": str(home.sockets), "buffers": str(home.buffers),
        "switches": sorted(name for name in os.environ if name.startswith("DIAPAUSE_")),
        "memory": Path("/proc/meminfo").read_text().splitlines()[:3],
        "qemu": _first_line("qemu-system-x86_64", "--version"),
    }  # fmt: skip
    with contextlib.suppress(OSError):
        about["free_bytes"] = home.free_bytes()
    return msgspec.json.format(msgspec.json.encode(about), indent=2)


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=_PROGRAM_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout.partition("\n")[0]


def _records(home: Home, table: str, fields: tuple[str, ...]) -> bytes:
    with _database(home) as db:
        found = db.execute(
            f"SELECT record FROM {table} ORDER BY created_at DESC LIMIT {_ROWS}"
        ).fetchall()
    rows = [msgspec.json.decode(record, type=dict[str, Any]) for (record,) in found]
    return msgspec.json.encode([_without_secrets(row, fields) for row in rows])


def _without_secrets(row: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    kept = {name: row[name] for name in fields if name in row}
    if isinstance(error := kept.get("error"), dict):
        # An error's fields may hold the last lines of a console.
        kept["error"] = {name: error.get(name) for name in ("code", "message")}
    return kept


def _rows(home: Home, table: str, order: str) -> bytes:
    with _database(home) as db:
        cursor = db.execute(f"SELECT * FROM {table} ORDER BY {order} DESC LIMIT {_ROWS}")
        names = [column[0] for column in cursor.description]
        rows = [dict(zip(names, map(_plain, row), strict=True)) for row in cursor]
    return msgspec.json.encode(rows)


def _plain(value: object) -> object:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


@contextlib.contextmanager
def _database(home: Home) -> Iterator[sqlite3.Connection]:
    """The catalog as it is, whatever its version; nothing is written."""
    found = sqlite3.connect(f"{home.catalog.as_uri()}?mode=ro", uri=True, timeout=5)
    try:
        yield found
    finally:
        found.close()


def _tree(home: Home) -> bytes:
    """What lies in the home: names, modes and sizes."""
    lines: list[str] = []
    for top in (home.root, home.sockets, home.buffers):
        for parent, folders, names in os.walk(top):
            folders.sort()
            for name in sorted([*folders, *names]):
                lines.append(_line(Path(parent) / name))
                if len(lines) >= _FILES:
                    return "\n".join([*lines, "… and more"]).encode(errors="backslashreplace")
    return "\n".join(lines).encode(errors="backslashreplace")


def _line(path: Path) -> str:
    try:
        status = path.lstat()
    except OSError as error:
        return f"? {path} {error}"
    return (
        f"{status.st_mode:o} {status.st_uid} {status.st_size} {status.st_blocks * 512} "
        f"{int(status.st_mtime)} {path}"
    )


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _tail(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - count))
        return file.read(count)
