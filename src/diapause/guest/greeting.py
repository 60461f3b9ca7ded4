"""The exchange that begins every connection: HELLO until a WELCOME is good enough.

Good enough means: it answers the newest HELLO, speaks our protocol, and proves that the guest's
clock is right. Repeats come ever later, so that a guest slower than the first repeat is still
understood; each HELLO has its own nonce and its own entropy.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

import msgspec

from diapause import limits
from diapause.guest import frames, protocol
from diapause.guest.protocol import Hello, Identity, ProtocolError, Welcome

_ENTROPY_LEN = 64
_NONCE_LEN = 16
_FIRST_REPEAT_S = 1.0
_REPEAT_FACTOR = 1.5
_REPEAT_MAX_S = 10.0
# After so many exchanges, or so long, the likeliest clock error decides, not the largest possible:
# a guest with much to do on a host with much to do takes seconds for each.
_PROOFS_MAX, _PROOFS_S = 8, 6.0
_SLOWER = 2  # how much later than the last answer the next one may come before a repeat
_HURRIED_MAX = 4  # exchanges that follow each other without a pause
_NS_PER_MS = 1_000_000
_NS_PER_S = 1_000_000_000


class Greeting:
    """One series of HELLOs on one connection."""

    def __init__(
        self,
        link_id: str,
        received: int,
        identity: Identity | None,
        operation: str | None = None,
    ) -> None:
        self.nonce = ""
        self._repeat_s = _FIRST_REPEAT_S
        self._link_id = link_id
        self._received = received
        self._identity, self._operation = identity, operation
        self._sent_ns = 0
        self._delay_ns = 0  # how long the last HELLO probably took to reach the agent
        self._exchanges = 0
        self._began = time.monotonic()

    def hello(self) -> list[Callable[[], bytes]]:
        """The messages of a new HELLO; its clock is read when it leaves."""
        self.nonce = secrets.token_hex(_NONCE_LEN)
        return [lambda: protocol.PREAMBLE, self._hello]

    def renew(self, received: int) -> None:
        """What the host has received is another number now: the link began anew."""
        self._received = received

    @property
    def hurries(self) -> bool:
        """Whether to repeat at once after an answer that was not good enough."""
        return self._exchanges <= _HURRIED_MAX

    def later(self) -> float:
        """How long to wait before the next HELLO."""
        wait = self._repeat_s
        self._repeat_s = min(wait * _REPEAT_FACTOR, _REPEAT_MAX_S)
        return wait

    def judge(self, welcome: Welcome) -> bool:
        """Whether the answer ends the series; raises ProtocolError if no answer ever will."""
        if welcome.protocol != protocol.PROTOCOL:
            raise ProtocolError(
                f"protocol {welcome.protocol}; this host speaks {protocol.PROTOCOL}"
            )
        now_ns = time.time_ns()
        self._exchanges += 1
        took_s = (now_ns - self._sent_ns) / _NS_PER_S
        # A repeat makes the answer to what it repeats worthless: it must not come too early.
        self._repeat_s = min(max(_FIRST_REPEAT_S, _SLOWER * took_s), _REPEAT_MAX_S)
        welcome.failed = protocol.clean_list(welcome.failed)
        welcome.version = protocol.clean_text(welcome.version)
        welcome.boot_id = protocol.clean_text(welcome.boot_id)
        # The guest read its clock somewhere between the two instants that the host knows.
        worst = max(abs(now_ns - welcome.realtime_ns), abs(welcome.realtime_ns - self._sent_ns))
        likely = abs((now_ns + self._sent_ns) // 2 - welcome.realtime_ns)
        soon = time.monotonic() < self._began + _PROOFS_S
        proving = soon and self._exchanges < _PROOFS_MAX
        error_ns = worst if proving else likely
        welcome.clock_error_ms = error_ns / _NS_PER_MS
        self._delay_ns = (now_ns - self._sent_ns) // 2
        if any(cause.startswith("clock") for cause in welcome.failed):
            return True  # repeating would not set it either; `failed` says so
        return welcome.clock_error_ms <= limits.CLOCK_ERROR_MS_MAX

    def _hello(self) -> bytes:
        self._sent_ns = time.time_ns()
        hello = Hello(
            nonce=self.nonce,
            link_id=self._link_id,
            received=self._received,
            realtime_ns=self._sent_ns + self._delay_ns,
            entropy=secrets.token_hex(_ENTROPY_LEN),
            identity=self._identity,
            operation=self._operation,
        )
        return frames.unnumbered(protocol.HELLO, msgspec.json.encode(hello))
