"""The pair of processes that serves memory: started once for a home, and on its own from then on.

The daemon starts the keeper and hands it what is kept: the settings and the socket for clients. The
keeper starts the pager; each starts the other again. Neither is a child of the daemon's, and both
live on when it ends. Where both are dead, nobody listens on the socket any more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diapause.errors import PagerUnavailable
from diapause.limits import LOG_BYTES_MAX, PAGER_S, PAGER_SILENT_S, PAGER_STALL_S
from diapause.store.boot import boot_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diapause.store.home import Home

log = logging.getLogger("diapause.pager")
PROGRAM = Path(__file__).parent.parent / "native" / "diapause-pager"


def name_of(home: Home) -> str:
    """The argument by which both processes are found."""
    return f"diapause-pager-{home.key}"


def lives(home: Home) -> bool:
    """Whether one of the two does. One that was killed and can't end yet has no arguments left."""
    name = os.fsencode(name_of(home))
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if name in (entry / "cmdline").read_bytes().split(b"\0"):
                    return True
    return False


def note_connection(home: Home, connection: int) -> None:
    """Which FUSE connection the pair has, for whoever finds it dead."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(home.pager_connection, flags, 0o600), "w") as file:
            file.write(f"{boot_id()} {connection}")
    except OSError as error:  # a full disk: then it may be left
        log.warning("the pager's connection is not noted: %s", error)


def abort(home: Home) -> None:
    """End the FUSE connection of a pair that is dead and is held by a thread of it: what waits for
    an answer gets an error. While it is held its number is nobody else's."""
    try:
        boot, connection = home.pager_connection.read_text().split()
        if boot != boot_id():
            return
        subprocess.run(
            [str(PROGRAM), "abort", connection], capture_output=True, text=True, check=True,
            timeout=PAGER_S,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:  # perhaps it has ended
        log.warning("the connection of a dead pager is left: %s", error.stderr.strip())
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log.warning("the connection of a dead pager is left: %s", error)


def probe() -> str | None:
    """Why nothing can be served here; None where it can. Tried, and let go of."""
    try:
        done = subprocess.run(
            [str(PROGRAM), "probe"], capture_output=True, text=True, check=False, timeout=PAGER_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip().removeprefix("probe: ")[:500]


def start(home: Home) -> None:
    """Start a pair; only where there is none. Raises PagerUnavailable, whatever the reason."""
    if not PROGRAM.exists():
        raise PagerUnavailable(cause="diapause-pager is not there; build it again")
    try:
        _start(home)
    except (OSError, subprocess.SubprocessError) as error:
        raise PagerUnavailable(cause=f"it can't be started: {error}") from error


def _start(home: Home) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, _listener(home.pager_socket) as listener, _log(home) as log:
        ours.settimeout(PAGER_S)
        environment = {"PATH": "/usr/bin:/bin", "DIAPAUSE_HOME": str(home.root)}
        subprocess.run(
            [str(PROGRAM), "start", name_of(home)],
            stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=log, check=True,
            start_new_session=True, cwd="/", env=environment, timeout=PAGER_S,
        )  # fmt: skip
        settings = {
            "instance": os.urandom(8).hex(), "stall_ms": int(PAGER_STALL_S * 1000),
            "silent_ms": int(PAGER_SILENT_S * 1000), "log_bytes_max": LOG_BYTES_MAX,
        }  # fmt: skip
        _put(ours, "settings", settings, ())
        _put(ours, "listener", None, (listener.fileno(),))
        ours.send(json.dumps("ready").encode())


def _put(to: socket.socket, key: str, value: Any, fds: Sequence[int]) -> None:
    word = {"put": {"key": key, "value": value, "same_fds": False}}
    socket.send_fds(to, [json.dumps(word).encode()], list(fds))


def _listener(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # of a pair that is dead: nobody listens there
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(64)
    except BaseException:
        listener.close()
        raise
    return listener


def _log(home: Home) -> contextlib.closing[Any]:
    """The log to append to; the pager itself sets a large one aside, as pager.log.1."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    return contextlib.closing(os.fdopen(os.open(home.pager_log, flags, 0o600), "ab", 0))
