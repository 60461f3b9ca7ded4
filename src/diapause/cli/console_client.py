"""The client's end of a console: an exec stream without a command, and with a key to leave it."""

from __future__ import annotations

import codecs
import os
import signal

from diapause import limits
from diapause.cli.exec_client import ExecClient
from diapause.cli.output import printable
from diapause.cli.stream_writer import StreamWriter
from diapause.daemon.client import Client
from diapause.daemon.exec_wire import STDIN, STDOUT, ExecRequest

LEAVE = b"\x1d"  # Ctrl-]


class ConsoleClient(ExecClient):
    """One visit at a console, until the key, a signal, or the guest's end."""

    def __init__(self, client: Client, sandbox: str, escape: bool) -> None:
        # The request only says what this end is like: a terminal, if it is one.
        request = ExecRequest(argv=["console"], tty=True, stdin=True)
        super().__init__(client, sandbox, request, path="console")
        if escape:
            self._writers[STDOUT] = EscapingWriter(1, self._wakeups.wake)

    def _begin(self) -> None:
        """Nothing is asked for."""

    def _read_stdin(self) -> None:
        try:
            data = os.read(0, min(limits.EXEC_MESSAGE_BYTES_MAX, self._credit))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        typed, left, _ = data.partition(LEAVE)
        if not data:
            self._stdin_open = False  # the console goes on being shown
        if typed:
            self._credit -= len(typed)
            self._protocol.send_binary(bytes([STDIN]) + typed)
            self._outgoing += b"".join(self._protocol.data_to_send())
        if left:
            self._send()
            self._exit = 0

    def _pass_signals_on(self) -> None:
        for number in self._wakeups.take_signals():
            if number != signal.SIGWINCH:
                raise SystemExit(128 + number)


class EscapingWriter(StreamWriter):
    """Writes text with every control character but line ends and tabs written out."""

    _decode = None

    def put(self, data: memoryview) -> None:
        """Add data; a character that is cut in two waits for its rest."""
        if self._decode is None:
            self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        text = printable(self._decode(bytes(data)).replace("\r\n", "\n"), keep="\n\t")
        # The terminal is raw: a line end has to say both what it means.
        shown = text.replace("\n", "\r\n") if os.isatty(1) else text
        super().put(memoryview(shown.encode(errors="replace")))
