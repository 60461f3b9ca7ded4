"""QMP over a unix socket, synchronous: one command, its reply, within a bound.

Synchronous on purpose: the frozen section runs in one thread and pays for every hand-over. A second
monitor of the same VMM is for events (`events.py`); events that arrive here are dropped.

A call that reaches its bound leaves the connection unusable, as it may end in the middle of a line:
the caller closes it and connects again. Commands are numbered, under the id of the operation that
they are for, and replies repeat it: one that comes late is never taken for the next command's.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from diapause import operation
from diapause.errors import VmmFailed, VmmTimeout
from diapause.limits import QMP_CALL_S, QMP_CONNECT_S, QMP_LINE_BYTES_MAX


class QmpError(Exception):
    """The VMM answered a command with an error."""

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"{command}: {description}")
        self.command, self.kind, self.description = command, kind, description


class Qmp:
    """One monitor connection."""

    def __init__(self, sandbox: str, path: Path, bound_s: float = QMP_CONNECT_S) -> None:
        self.sandbox = sandbox
        self._buffer, self._sent = bytearray(), 0
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        except OSError as error:
            raise VmmFailed(sandbox=sandbox, step="connect", cause=str(error)) from error
        try:
            self._socket.settimeout(bound_s)
            self._socket.connect(str(path))
            self._read_line("greeting", time.monotonic() + bound_s)
            self.call("qmp_capabilities", bound_s=bound_s)
        except (OSError, ValueError) as error:
            self.close()
            raise VmmFailed(sandbox=sandbox, step="connect", cause=str(error)) from error
        except (VmmTimeout, VmmFailed, QmpError):
            self.close()
            raise

    def call(
        self, command: str, *, bound_s: float = QMP_CALL_S, fd: int | None = None, **arguments: Any
    ) -> Any:
        """Run one command; underscores in argument names stand for dashes.

        Raises QmpError for the VMM's own refusal, VmmTimeout at the bound, VmmFailed when the
        connection is gone.
        """
        deadline = time.monotonic() + bound_s
        number = self._send(command, arguments, fd, bound_s)
        while True:
            reply = json.loads(self._read_line(command, deadline))
            if reply.get("id", number) != number:
                continue  # of a command that was given up when its bound was reached
            if "error" in reply:
                raise QmpError(command, reply["error"]["class"], reply["error"]["desc"])
            if "return" in reply:
                return reply["return"]

    def _send(self, command: str, arguments: dict[str, Any], fd: int | None, bound_s: float) -> str:
        """Send it, named by the operation it is for; the name, which its reply repeats."""
        self._sent += 1
        asked = operation.current()
        number = f"{asked.id if asked is not None else self.sandbox}-{self._sent}"
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = {"execute": command, "arguments": named, "id": number}
        line = json.dumps(message).encode() + b"\n"
        try:
            self._socket.settimeout(bound_s)
            if fd is None:
                self._socket.sendall(line)
            else:
                sent = socket.send_fds(self._socket, [line], [fd])
                self._socket.sendall(line[sent:])
        except TimeoutError as error:
            raise VmmTimeout(sandbox=self.sandbox, step=command, bound_s=bound_s) from error
        except OSError as error:
            raise VmmFailed(sandbox=self.sandbox, step=command, cause=str(error)) from error
        return number

    def _read_line(self, command: str, deadline: float) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            left = deadline - time.monotonic()
            if left <= 0:
                raise VmmTimeout(sandbox=self.sandbox, step=command, bound_s=0)
            self._receive(command, left)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _receive(self, command: str, left_s: float) -> None:
        try:
            self._socket.settimeout(left_s)
            data = self._socket.recv(65536)
        except TimeoutError as error:
            raise VmmTimeout(sandbox=self.sandbox, step=command, bound_s=left_s) from error
        except OSError as error:
            raise VmmFailed(sandbox=self.sandbox, step=command, cause=str(error)) from error
        if not data:
            raise VmmFailed(sandbox=self.sandbox, step=command, cause="the VMM has ended")
        if len(self._buffer) + len(data) > QMP_LINE_BYTES_MAX:
            raise VmmFailed(sandbox=self.sandbox, step=command, cause="a reply without an end")
        self._buffer += data

    def close(self) -> None:
        """Let go of the connection."""
        self._socket.close()
