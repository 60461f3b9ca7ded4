"""A peer that has a home's builds and serves them by range over HTTP, until it goes away."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

Mode = Literal["there", "slow", "closed", "cut", "wrong", "silent", "failing"]
SILENT_S = 600.0
SLOW_S = 0.03


class BlobPeer(ThreadingHTTPServer):
    """Answers as its mode says: with bytes, with the same late, with a closed connection, with half
    of the bytes, with other bytes, not at all, with 503."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory: Path | None = None  # nothing is there before it is said where
        self.served = 0  # requests that were answered with right bytes
        self.mode: Mode = "there"
        self.changed = threading.Event()

    @property
    def url(self) -> str:
        """What names are put behind."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def become(self, mode: Mode) -> None:
        """From here on; who was left without an answer loses its connection."""
        self.mode = mode
        self.changed.set()
        self.changed = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """A reader that was killed is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BlobPeer

    def do_GET(self) -> None:
        changed = self.server.changed
        mode = self.server.mode
        match mode:
            case "there" | "cut" | "wrong":
                return self._send(mode)
            case "slow":
                time.sleep(SLOW_S)
                return self._send(mode)
            case "silent":
                changed.wait(SILENT_S)
            case "failing":
                return self._status(503)
        self.close_connection = True
        return None

    def _send(self, mode: Mode) -> None:
        directory = self.server.directory
        path = directory / Path(self.path).name if directory is not None else None
        if path is None or not path.is_file():
            return self._status(404)
        data = path.read_bytes()
        first, last = self._range(len(data))
        part = data[first : last + 1]
        if mode == "wrong":
            part = bytes(byte ^ 1 for byte in part)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if mode == "cut":
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return None
        self.wfile.write(part)
        self.server.served += mode != "wrong"
        return None

    def _range(self, size: int) -> tuple[int, int]:
        """First and last byte that were asked for, by their places or from the end."""
        asked = re.fullmatch(r"bytes=(\d*)-(\d+)", self.headers["Range"])
        assert asked is not None, self.headers["Range"]
        if not asked[1]:
            return max(0, size - int(asked[2])), size - 1
        return int(asked[1]), min(int(asked[2]), size - 1)

    def _status(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        """Nobody reads it."""


@contextlib.contextmanager
def blob_peer() -> Iterator[BlobPeer]:
    """One on a port of its own, as long as somebody needs it."""
    peer = BlobPeer()
    thread = threading.Thread(target=peer.serve_forever, daemon=True)
    thread.start()
    try:
        yield peer
    finally:
        peer.become("there")
        peer.shutdown()
        peer.server_close()
        thread.join()
