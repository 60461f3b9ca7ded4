"""Asking the pager. Every request may be made again: a pager that died in between is replaced, and
the next one knows what the last one had promised."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diapause.errors import PagerUnavailable
from diapause.limits import PAGER_S
from diapause.pager import process

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diapause.store.home import Home

_PACKET_BYTES_MAX = 64 << 10
_FDS_MAX = 4
_BETWEEN_S = 0.05


@dataclass(frozen=True)
class Pair:
    """The two processes that run, and the mount that files are opened through."""

    instance: str
    pid: int
    keeper_pid: int
    replaceable: bool  # whether guests live on when the pager is replaced
    mount: int


class Absent(Exception):
    """Nobody listens: there is no pager, or it and its keeper are dead."""


class Refused(Exception):
    """The pager's word: no."""


class Pager:
    """One home's pager; used from many threads, one at a time."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._guard = threading.Lock()
        self._connection: socket.socket | None = None
        self._mount = -1
        self._noted: int | None = None  # the connection behind the mount

    def pair(self, *, start: bool) -> Pair:
        """Who is there; started where nobody is and `start` says so. Raises PagerUnavailable."""
        with self._guard:
            try:
                return self._hello()
            except Absent as error:
                if not start:
                    raise PagerUnavailable(cause="the pager does not run") from error
            if (cause := process.probe()) is not None:  # sooner than a pair that tries in vain
                raise PagerUnavailable(cause=cause)
            process.start(self._home)
            try:
                return self._hello()
            except Absent as error:
                raise PagerUnavailable(cause="the pager ended at once: see pager.log") from error

    def _hello(self) -> Pair:
        said, [mount] = self._ask({"hello": {}}, ())
        if (connection := said.get("connection")) not in (None, self._noted):
            process.note_connection(self._home, connection)
            self._noted = connection
        if self._mount >= 0:
            os.dup2(mount, self._mount, inheritable=False)  # paths through it stay as they are
            os.close(mount)
        else:
            self._mount = mount
        return Pair(
            said["instance"], said["pid"], said["keeper_pid"], said["replaceable"], self._mount
        )

    def instance(self) -> str | None:
        """Which pair is there; None where nobody listens.

        Raises PagerUnavailable where somebody does and does not answer: nothing is known then.
        """
        with self._guard:
            try:
                return self._hello().instance
            except Absent:
                return None

    def path(self, name: str) -> Path:
        """Where a file of the pager is opened, by us or a tool that we run; only after `pair`."""
        return Path(f"/proc/{os.getpid()}/fd/{self._mount}/{name}")

    def put(self, name: str, spec: dict[str, Any]) -> None:
        """A file, new or pointed elsewhere."""
        self.ask({"put": {"name": name, "spec": spec}})

    def remove(self, name: str) -> None:
        """A file goes; refused while a VMM runs on it."""
        self.ask({"remove": {"name": name}})

    def pass_through(self, name: str, fd: int | None) -> str | None:
        """A file is passed through to an open one from now on, or, with None, no more.

        Why it isn't; None where it is.
        """
        said = self.ask({"pass": {"name": name}}, () if fd is None else (fd,))
        cause: str | None = said["cause"]
        return cause

    def names(self) -> list[str]:
        """All files, in order."""
        found: list[str] = []
        while more := self.ask({"names": {"after": found[-1] if found else ""}})["names"]:
            found += more
        return found

    def attach(self, sandbox: str, files: Sequence[str], pidfd: int) -> None:
        """A VMM runs on these files."""
        self.ask({"attach": {"sandbox": sandbox, "files": list(files)}}, (pidfd,))

    def detach(self, sandbox: str) -> dict[str, Any] | None:
        """A VMM has ended; why it was killed, where the pager did that."""
        killed: dict[str, Any] | None = self.ask({"detach": {"sandbox": sandbox}})["killed"]
        return killed

    def seen(self, sandbox: str) -> dict[str, Any]:
        """What the pager knows of a VMM."""
        return self.ask({"seen": {"sandbox": sandbox}})

    def prefetch(self, name: str, trace: Path, budget_bytes: int) -> int:
        """Begin to bring a file as far as a trace of it says; how many bytes will be."""
        what = {"name": name, "trace": str(trace), "budget_bytes": budget_bytes}
        planned: int = self.ask({"prefetch": what})["bytes"]
        return planned

    def touched(self, sandbox: str, name: str) -> dict[str, Any]:
        """What a VMM has touched of a file: `pages`, `prefetched_pages`, `used_pages`, `late`."""
        return self.ask({"touched": {"sandbox": sandbox, "name": name}})

    def used(self, sandbox: str, name: str) -> dict[str, Any]:
        """The same of what was brought ahead of it: `pages` are those of the same granules."""
        return self.ask({"used": {"sandbox": sandbox, "name": name}})

    def trace(self, sandbox: str, name: str, prior: Path | None, to: Path) -> None:
        """What a VMM has touched of a file becomes, with an earlier trace, the trace `to`."""
        before = str(prior) if prior is not None else None
        self.ask({"trace": {"sandbox": sandbox, "name": name, "prior": before, "to": str(to)}})

    def sandboxes(self) -> list[dict[str, Any]]:
        """Whose VMMs run on its files, in order, with a few words of each."""
        found: list[dict[str, Any]] = []
        while more := self._sandboxes_behind(found[-1]["sandbox"] if found else ""):
            found += more
        return found

    def _sandboxes_behind(self, after: str) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = self.ask({"sandboxes": {"after": after}})["sandboxes"]
        return said

    def totals(self) -> dict[str, Any]:
        """What it counted of all files since it began, and which sandboxes wait for a blob."""
        return self.ask({"totals": {}})

    def stop(self) -> None:
        """End both processes, and wait for it; refused while a VMM runs on a file."""
        self.ask({"stop": {}})
        deadline = time.monotonic() + PAGER_S
        while time.monotonic() < deadline:
            with contextlib.suppress(PagerUnavailable):  # it is about to end
                if self.instance() is None:
                    return
            time.sleep(_BETWEEN_S)

    def ask(self, what: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """One request; raises PagerUnavailable where nobody answers or it is refused."""
        with self._guard:
            try:
                answered = self._ask(what, fds)
            except Absent as error:
                raise PagerUnavailable(cause="the pager does not run") from error
        for fd in answered[1]:
            os.close(fd)
        said: dict[str, Any] = answered[0]
        return said

    def close(self) -> None:
        """Let go of it; it goes on."""
        with self._guard:
            self._drop()
            if self._mount >= 0:
                os.close(self._mount)
                self._mount = -1

    def _ask(self, what: dict[str, Any], fds: Sequence[int]) -> tuple[Any, list[int]]:
        deadline = time.monotonic() + PAGER_S
        while True:
            try:
                return self._ask_once(what, fds, deadline)
            except Refused as error:
                raise PagerUnavailable(cause=f"the pager refuses: {error}") from error
            except (ConnectionRefusedError, FileNotFoundError) as error:
                self._drop()
                raise Absent from error
            except OSError as error:
                self._drop()
                if time.monotonic() > deadline:
                    if not process.lives(self._home):
                        # Both were killed, and a thread that gives the kernel a page waits in there
                        # for a read of it that nobody answers, and holds what they had.
                        process.abort(self._home)
                        raise Absent from error
                    cause = f"the pager does not answer: {error}"
                    raise PagerUnavailable(cause=cause) from error
                time.sleep(_BETWEEN_S)

    def _ask_once(
        self, what: dict[str, Any], fds: Sequence[int], deadline: float
    ) -> tuple[Any, list[int]]:
        if self._connection is None:
            self._connection = self._connect()
        self._connection.settimeout(max(0.1, deadline - time.monotonic()))
        socket.send_fds(self._connection, [json.dumps(what).encode()], list(fds))
        text, got, _, _ = socket.recv_fds(self._connection, _PACKET_BYTES_MAX, _FDS_MAX)
        if not text:
            raise ConnectionResetError("it has ended")
        for fd in got:
            os.set_inheritable(fd, False)
        answer = json.loads(text)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["ok"], list(got)

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.settimeout(PAGER_S)
            connection.connect(str(self._home.pager_socket))
        except BaseException:
            connection.close()
            raise
        return connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
