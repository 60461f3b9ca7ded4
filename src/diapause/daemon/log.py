"""The daemon's log: one JSON document a line, in serve.log and, once full, serve.log.1.

Fields: `at` (RFC 3339, UTC), `level`, `logger`, `message`; where they are known `operation`,
`verb`, `sandbox`, `snapshot`, `outcome`, `duration_ms`, `phases_ms`; `error` is a traceback of our
own code.

Invariants:
- Nothing that a client hands to a guest is logged: no command line, environment, input or output.
- A line and the files are bounded. A line that can't be written (a full disk) is dropped and
  counted; no verb waits for it or fails by it.
- Whatever writes to stderr by itself lands in the same file where a client started the daemon.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from diapause import operation
from diapause.limits import LOG_BYTES_MAX, LOG_TEXT_LENGTH_MAX

if TYPE_CHECKING:
    from diapause.store.home import Home

# What a caller may add with `extra=`; anything else there is left out.
FIELDS = ("operation", "verb", "sandbox", "snapshot", "outcome", "duration_ms", "phases_ms")
_QUIET = ("uvicorn.access", "uvicorn.error")


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        return msgspec.json.encode(document(record)).decode()


def document(record: logging.LogRecord) -> dict[str, Any]:
    """The fields of one line."""
    at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    found: dict[str, Any] = {
        "at": at.replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": _bounded(record.getMessage()),
    }
    for name in FIELDS:
        if (value := getattr(record, name, None)) is not None:
            found[name] = value
    if "operation" not in found and (asked := operation.current()) is not None:
        found["operation"] = asked.id
    if record.exc_info:
        found["error"] = _bounded(logging.Formatter().formatException(record.exc_info))
    return found


def _bounded(text: str) -> str:
    """The last part of a text that is too long: a traceback ends with what happened."""
    # Names of files may hold bytes that are no text.
    clean = text.encode(errors="backslashreplace").decode()
    return clean if len(clean) <= LOG_TEXT_LENGTH_MAX else f"… {clean[-LOG_TEXT_LENGTH_MAX:]}"


class LogFile(logging.handlers.RotatingFileHandler):
    """serve.log, set aside as serve.log.1 when it is full."""

    def __init__(self, path: Path) -> None:
        self.dropped = 0
        self._owns_stderr = _is_stderr(path)
        super().__init__(path, maxBytes=LOG_BYTES_MAX, backupCount=1, encoding="utf-8")
        self.setFormatter(JsonLines())

    def _open(self) -> Any:
        before = os.umask(0o077)
        try:
            stream = super()._open()
        finally:
            os.umask(before)
        if self._owns_stderr:  # or what the interpreter says would go on into the old file
            os.dup2(stream.fileno(), 2)
        return stream

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """A line that could not be written is counted, and nothing else."""
        self.dropped += 1


def start_log(home: Home) -> None:
    """Log to the home's serve.log, and for people to stderr where that is another place."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(LogFile(home.serve_log))
    if not _is_stderr(home.serve_log):
        people = logging.StreamHandler(sys.stderr)
        people.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(people)
    for noisy in _QUIET:
        logging.getLogger(noisy).setLevel(logging.WARNING)


def dropped_lines() -> int:
    """Lines that could not be written since the start."""
    handlers = logging.getLogger().handlers
    return sum(handler.dropped for handler in handlers if isinstance(handler, LogFile))


def _is_stderr(path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(2))
    except OSError:
        return False
