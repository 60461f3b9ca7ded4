"""The daemon's process: one a home, by a lock held for life; one socket, closed to everybody else.

Only the holder of the lock touches the socket file. SIGTERM and SIGINT end the daemon: it stops
accepting, waits a bounded time for the verbs under way, and goes; guests go on. A daemon that is
killed instead leaves a free lock and a stale socket, and the next one takes both.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from diapause import __version__, limits
from diapause.daemon.app import application
from diapause.daemon.engine_api import OpenEngine
from diapause.daemon.log import start_log
from diapause.daemon.start import trust_buffers, trust_directory
from diapause.daemon.state import State
from diapause.store.home import Home

log = logging.getLogger("diapause.daemon")

# For the verbs under way, and then for what the engine does behind them.
STOP_S = 60.0
CLOSE_S = 30.0
STREAMS_CLOSE_S = 2
# How long a daemon whose home could not be opened stays to tell its clients why.
FAILURE_LINGER_S = 1.0
PING_EVERY_S = 10.0
BACKLOG = 256


def serve(home: Home, open_engine: OpenEngine, detached: bool = False) -> int:
    """Be the daemon of `home` until told to stop; the exit code. Another's home: 0, at once."""
    home.create()
    trust_directory(home)
    trust_buffers(home)
    with _lock(home) as mine:
        if not mine:
            if not detached:
                print(f"diapause: the daemon of {home.root} runs already", file=sys.stderr)
            return 0
        start_log(home)  # the holder alone writes and rotates it
        # The frozen section of a pause runs in a worker thread. At the default interval of 5 ms
        # the event loop could keep it waiting for the interpreter longer than it takes in all.
        sys.setswitchinterval(0.0005)
        os.chdir("/")
        listener = _listen(home)
        try:
            return asyncio.run(_serve(State(home, open_engine), listener))
        finally:
            home.serve_socket.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(home: Home) -> Iterator[bool]:
    """Hold the home's lock with our pid in it; False where another daemon holds it."""
    file = os.open(home.serve_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield True
    finally:
        os.close(file)


def _listen(home: Home) -> socket.socket:
    """Listen under a name of our own first, so that the real name always answers once it exists."""
    path = home.serve_socket
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o077)
    try:
        listener.bind(str(new))
    finally:
        os.umask(before)
    new.chmod(0o600)
    listener.listen(BACKLOG)
    new.replace(path)
    return listener


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handling."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _config(state: State) -> uvicorn.Config:
    return uvicorn.Config(
        application(state),
        http="h11",
        ws="websockets-sansio",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        backlog=BACKLOG,
        ws_per_message_deflate=False,
        ws_max_size=limits.REQUEST_BODY_BYTES_MAX,
        # Pings show a client that died while nothing was read from it, since writing fails. Their
        # answer is not waited for: a client that is held back by its own stdout is not dead.
        ws_ping_interval=PING_EVERY_S,
        ws_ping_timeout=None,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=STREAMS_CLOSE_S,
        h11_max_incomplete_event_size=64 * 1024,
    )


async def _serve(state: State, listener: socket.socket) -> int:
    server = _Server(_config(state))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    log.info("diapause %s serves %s as pid %d", __version__, state.home.root, os.getpid())
    opening = asyncio.create_task(state.open())
    watching = asyncio.create_task(_stop_on(stop, opening, state, server))
    await server.serve(sockets=[listener])
    await watching
    if not await state.close(CLOSE_S):
        # Every step is journaled: the next daemon finishes or undoes what this one leaves.
        state.home.serve_socket.unlink(missing_ok=True)
        _leave(1)
    log.info("the daemon of %s is done", state.home.root)
    return state.failure.exit_code if state.failure else 0


async def _stop_on(
    stop: asyncio.Event, opening: asyncio.Task[None], state: State, server: _Server
) -> None:
    """End the server on a signal, or when its home could not be opened."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if state.ready:
        tell_supervisor("READY=1")
    if state.failure is not None:
        log.error("%s %s", state.failure.message, state.failure.advice)
        await asyncio.sleep(FAILURE_LINGER_S)
        server.should_exit = True
        return
    await stopping
    log.info("told to stop")
    tell_supervisor("STOPPING=1")
    for accepting in getattr(server, "servers", []):
        accepting.close()
    state.home.serve_socket.unlink(missing_ok=True)
    await asyncio.wait({opening}, timeout=STOP_S)
    await state.workers.drain(STOP_S)
    server.should_exit = True


def tell_supervisor(word: str) -> None:
    """Tell systemd, where it started us and asks to be told (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.sendto(word.encode(), address)
    except OSError as error:  # a supervisor that is gone keeps nobody from serving
        log.warning("telling the supervisor: %s", error)


def _leave(code: int) -> None:
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)
