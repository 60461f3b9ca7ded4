"""Start a home's daemon when nobody answers on its socket: once, however many ask.

The daemon's own lock decides which one serves, should several be spawned; the others exit at once.
A client spawns when it is its turn, and connects as soon as somebody listens.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from diapause import limits
from diapause.errors import DaemonUnreachable
from diapause.store.files import is_ours
from diapause.store.home import Home

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

_POLL_S = 0.02
_RESPAWN_S = 0.5
_TAIL_BYTES = 2048

# The command line of a daemon for a home.
DaemonCommand = Callable[[Home], list[str]]


def daemon_command(home: Home) -> list[str]:
    """This program's own daemon; `-P` keeps the working directory off the import path."""
    return [
        sys.executable, "-P", "-m", "diapause", "--home", str(home.root), "serve", "--detached",
    ]  # fmt: skip


def connect(home: Home, command: DaemonCommand | None = daemon_command) -> socket.socket:
    """A connection to the home's daemon, which is started if nobody listens and there is a way."""
    connection = try_connect(home)
    if connection is not None:
        return connection
    if command is None:
        raise DaemonUnreachable(home=home.root, cause="none runs")
    return _start(home, command)


def try_connect(home: Home) -> socket.socket | None:
    """A connection, or None where no daemon listens."""
    if not home.sockets.exists():
        return None
    trust_directory(home)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(limits.DAEMON_START_S)
    try:
        connection.connect(str(home.serve_socket))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise DaemonUnreachable(home=home.root, cause=error) from error
    return connection


def trust_directory(home: Home) -> None:
    """Refuse a socket directory that others could write: it may lie in a shared place."""
    _trust(home, home.sockets, 0o022)


def trust_buffers(home: Home) -> None:
    """Refuse buffers that others could read: they hold guest memory, below a shared place."""
    _trust(home, home.buffers, 0o077)


def _trust(home: Home, directory: Path, closed: int) -> None:
    if not is_ours(directory, closed):
        cause = f"{directory} does not belong to this user alone"
        raise DaemonUnreachable(home=home.root, cause=cause)


def _start(home: Home, command: DaemonCommand) -> socket.socket:
    """Wait until somebody listens; of the clients that wait, one at a time spawns."""
    deadline = time.monotonic() + limits.DAEMON_START_S
    child: subprocess.Popen[bytes] | None = None
    spawned = 0.0
    with _turn_to_spawn(home) as is_ours:
        while time.monotonic() < deadline:
            connection = try_connect(home)
            if connection is not None:
                return connection
            code = child.poll() if child is not None else 0
            if code:
                cause = f"it exited with {code} at its start: {_last_words(home)}"
                raise DaemonUnreachable(home=home.root, cause=cause)
            # A daemon that ended at once lost against one that is on its way out.
            if code == 0 and time.monotonic() > spawned + _RESPAWN_S and is_ours():
                child, spawned = _spawn(home, command), time.monotonic()
            time.sleep(_POLL_S)
    cause = f"it did not listen within {limits.DAEMON_START_S:.0f} s"
    raise DaemonUnreachable(home=home.root, cause=cause)


@contextlib.contextmanager
def _turn_to_spawn(home: Home) -> Iterator[Callable[[], bool]]:
    """Whether it is our turn: a lock on the home itself, so that twenty clients spawn once.

    It only saves work. A client that dies frees it, and the daemon's own lock decides who serves.
    """
    try:
        home.create()
        directory = os.open(home.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise DaemonUnreachable(home=home.root, cause=error) from error

    def is_ours() -> bool:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    try:
        yield is_ours
    finally:
        os.close(directory)


def _spawn(home: Home, command: DaemonCommand) -> subprocess.Popen[bytes]:
    import subprocess

    try:
        log = _open_log(home)
    except OSError as error:
        raise DaemonUnreachable(home=home.root, cause=error) from error
    try:
        return subprocess.Popen(
            command(home), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    except OSError as error:
        raise DaemonUnreachable(home=home.root, cause=error) from error
    finally:
        os.close(log)


def _open_log(home: Home) -> int:
    """The log to append to; a large one is set aside as serve.log.1."""
    path = home.serve_log
    if path.exists() and path.stat().st_size > limits.LOG_BYTES_MAX:
        path.replace(path.with_suffix(".log.1"))
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _last_words(home: Home) -> str:
    with home.serve_log.open("rb") as file:
        file.seek(max(0, home.serve_log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return _message(lines[-1]) if lines else "it said nothing"


def _message(line: str) -> str:
    """What a line of the log says; one that is no JSON was written by the interpreter itself."""
    try:
        found = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError:
        return line
    return str(found.get("message", line))
