"""A network of a test's own: one namespace with a loopback, an address beside it, and nothing else.

Ports in it collide with nobody's, and no packet leaves the machine.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

ADDRESS = "10.99.0.1"
_CLONE_NEWNET = 0x40000000
_SIOCSIFADDR, _SIOCSIFFLAGS, _IFF_UP = 0x8916, 0x8914, 1
_BOUND_S = 60.0

Found = TypeVar("Found")


class NetworkNamespace:
    """Work is done in it by threads: a socket is of the namespace of the thread that made it."""

    def __init__(self) -> None:
        self._fd = _in_thread(_new_namespace)

    @property
    def within(self) -> tuple[str, ...]:
        """What to put before a command so that it runs in here."""
        return ("nsenter", f"--net=/proc/{os.getpid()}/fd/{self._fd}", "--")

    def do(self, work: Callable[[], Found]) -> Found:
        """Do something in here and return what it returned."""

        def entered() -> Found:
            _checked(_libc.setns(self._fd, _CLONE_NEWNET), "setns")
            return work()

        return _in_thread(entered)

    def listen(self, address: str, port: int = 0) -> socket.socket:
        """A listening socket in here."""
        return self.do(lambda: socket.create_server((address, port)))

    def connect(self, address: str, port: int) -> socket.socket:
        """A connection that begins in here."""
        return self.do(lambda: socket.create_connection((address, port), timeout=_BOUND_S))

    def close(self) -> None:
        os.close(self._fd)


@contextmanager
def network_namespace() -> Iterator[NetworkNamespace]:
    """A namespace, gone with its last socket."""
    made = NetworkNamespace()
    try:
        yield made
    finally:
        made.close()


class Server:
    """Answers each connection with the same bytes and closes it."""

    def __init__(self, listener: socket.socket, answer: bytes) -> None:
        self._listener, self._answer = listener, answer
        self.port: int = listener.getsockname()[1]
        self.answered = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(_BOUND_S)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.answered += 1  # first: who has read the answer may ask at once
                connection.sendall(self._answer)


_libc = ctypes.CDLL(None, use_errno=True)


def _new_namespace() -> int:
    _checked(_libc.unshare(_CLONE_NEWNET), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for name, address in (("lo", "127.0.0.1"), ("lo:1", ADDRESS)):
            family = struct.pack("<HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))
            fcntl.ioctl(control, _SIOCSIFADDR, struct.pack("16s16s8x", name.encode(), family))
            flags = struct.pack("16sh22x", name.encode(), _IFF_UP)
            fcntl.ioctl(control, _SIOCSIFFLAGS, flags)
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _checked(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), what)


def _in_thread(work: Callable[[], Found]) -> Found:
    found: list[Found] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:  # noqa: BLE001 - raised again where it is asked for
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_BOUND_S)
    assert not thread.is_alive(), "work in a namespace did not end"
    if failed:
        raise failed[0]
    return found[0]
