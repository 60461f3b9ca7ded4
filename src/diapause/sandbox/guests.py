"""The guests that run now: for each its machine, the link to its agent, and who watches its end.

A guest's end is seen in two ways: the VMM says so on its events monitor (a power-off, a panic: the
process stays and holds the reason), or the process is gone. Either is handed to the engine once, in
a worker thread; a verb that ends a VMM itself says so first (`disarm`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from typing import TYPE_CHECKING, Any

from diapause.errors import AgentUnreachable, Cancelled, DiapauseError, InvalidRequest, VmmFailed
from diapause.guest.console import ConsoleSession, open_console
from diapause.guest.link import Identity, Link, Welcome
from diapause.limits import QMP_CONNECT_S, QMP_LINE_BYTES_MAX
from diapause.operation import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from diapause.driver.qemu.machine import QemuMachine

log = logging.getLogger("diapause.guest")
_EVENTS_AGAIN_S = 0.5


class Guest:
    """One running guest. Its methods may be called from any worker thread."""

    def __init__(
        self, sandbox: str, loop: asyncio.AbstractEventLoop, link: Link | None = None
    ) -> None:
        self.sandbox = sandbox
        self.link = link or Link(sandbox)
        self.machine: QemuMachine | None = None
        self._loop = loop
        self._watch: asyncio.Task[None] | None = None
        self._pidfd = -1
        self._console_is_open = False
        self._end, self._reason = asyncio.Event(), ""
        self.looked_at = False  # somebody is about to see why it was stopped
        self._reconnecting = asyncio.Lock()
        self.stalled: str | None = None  # why the VMM stopped it over its disk; it is seen to

    def _await(self, work: Coroutine[Any, Any, Any], bound_s: float) -> Any:
        """Run a coroutine in the daemon's loop and wait for it here."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return wait_for(future, bound_s)
        except TimeoutError as error:
            future.cancel()
            raise AgentUnreachable(sandbox=self.sandbox, bound_s=bound_s) from error
        except Cancelled:
            future.cancel()
            raise

    # -- the agent -------------------------------------------------------------------------------

    def greet(self, identity: Identity | None, bound_s: float) -> Welcome:
        """Connect to the agent: time, entropy, identity and readiness in one exchange."""

        async def greet() -> Welcome:
            async with self._reconnecting:
                return await self._unless_it_ends(self._attach(identity, bound_s), 2 * bound_s)

        welcome: Welcome = self._await(greet(), 2 * bound_s + 5.0)
        return welcome

    async def _unless_it_ends(self, work: Coroutine[Any, Any, Welcome], bound_s: float) -> Welcome:
        """A guest that ends meanwhile will not answer: say so at once, with the reason."""
        working, end = self._loop.create_task(work), self._loop.create_task(self._end.wait())
        try:
            await asyncio.wait({working, end}, timeout=bound_s, return_when=asyncio.FIRST_COMPLETED)
            if end.done() and not working.done():
                cause = f"the guest ended ({self._reason})"
                raise VmmFailed(sandbox=self.sandbox, step="start", cause=cause)
            return await asyncio.wait_for(working, 1.0)  # it has ended, or reached its bound
        finally:
            working.cancel()
            end.cancel()

    def reconnect(self, bound_s: float) -> None:
        """Connect to the agent unless somebody else did."""
        self._await(self.answering_link(bound_s), 2 * bound_s + 5.0)

    async def answering_link(self, bound_s: float) -> Link:
        """The link, connected again where it ended or never began; awaited in the loop."""
        async with self._reconnecting:
            if self.link.cause or not self.link.attached:
                await self._attach(None, bound_s)
        return self.link

    async def _attach(self, identity: Identity | None, bound_s: float) -> Welcome:
        """One at a time: the port takes one connection, and a second attach ends the first."""
        assert self.machine is not None
        if self.link.cause:  # it stays closed; its sessions have ended, the guest has not
            self.link = Link(self.sandbox)
        # In a thread: a VMM that hangs takes no connections, and the daemon goes on.
        connection = await asyncio.to_thread(self.machine.agent_socket, bound_s)
        return await self.link.attach(connection, identity=identity, bound_s=bound_s)

    # -- the console -----------------------------------------------------------------------------

    async def open_console(self) -> ConsoleSession:
        """The console, for one client at a time; awaited in the loop."""
        assert self.machine is not None
        if self._console_is_open:
            cause = "another client has it open"
            raise InvalidRequest(what=f"the console of {self.sandbox}", cause=cause)
        self._console_is_open = True
        try:
            return await open_console(self.machine.paths.console, self._console_closed)
        except OSError as error:  # a bound that was reached as well
            self._console_closed()
            raise VmmFailed(
                sandbox=self.sandbox, step="console",
                cause=f"its console takes no connections: {error}",
            ) from error  # fmt: skip

    def _console_closed(self) -> None:
        self._console_is_open = False

    def detach(self) -> None:
        """The VMM is about to go: the sessions wait for the next one."""
        self._await(self.link.detach(), 10.0)

    def cut(self, cause: str) -> None:
        """Every session ends as cut; the next link starts anew."""
        self._loop.call_soon_threadsafe(self.link.close, cause)
        self.link = Link(self.sandbox)

    def freeze_filesystems(self, bound_s: float) -> list[str]:
        """Sync and freeze the guest's file systems; returns which."""
        found: list[str] = self._await(self.link.freeze_filesystems(bound_s), bound_s)
        return found

    def thaw_filesystems(self, bound_s: float) -> None:
        """Let the guest write its file systems again."""
        self._await(self.link.thaw_filesystems(bound_s), bound_s)

    # -- its end ---------------------------------------------------------------------------------

    def arm(
        self,
        ended: Callable[[Guest, str], None],
        stalled: Callable[[Guest, str], None],
        stopped: Callable[[Guest], None],
    ) -> None:
        """Watch the VMM, in the loop: `ended(self, reason)` once, `stalled(self, reason)` each time
        that the VMM stops its guest for want of space or a failing disk, `stopped(self)` each time
        that somebody, a verb or anybody else, stopped it."""
        self._loop.call_soon_threadsafe(self._arm, ended, stalled, stopped)

    def _arm(
        self,
        ended: Callable[[Guest, str], None],
        stalled: Callable[[Guest, str], None],
        stopped: Callable[[Guest], None],
    ) -> None:
        assert self.machine is not None
        self._pidfd = self.machine.pidfd()
        events = self.machine.paths.events

        def once(reason: str) -> None:
            if self._pidfd >= 0:
                self._disarm()
                self._reason = reason
                self._end.set()
                ended(self, reason)

        if self._pidfd < 0:
            ended(self, "the VMM has ended")
            return

        async def watch() -> None:
            """Again after each connection that broke: nobody else would hear of an end."""
            again = False
            while self._pidfd >= 0:
                await _watch_events(
                    events, once, lambda why: stalled(self, why), lambda: stopped(self), again
                )
                again = True
                await asyncio.sleep(_EVENTS_AGAIN_S)

        self._loop.add_reader(self._pidfd, once, "the VMM has ended")
        self._watch = self._loop.create_task(watch())

    def disarm(self) -> None:
        """Stop watching: what happens to the VMM from here on is a verb's doing."""

        async def disarm() -> None:
            self._disarm()

        self._await(disarm(), 10.0)

    def _disarm(self) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            self._pidfd = -1
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None


async def _watch_events(
    path: Any,
    once: Callable[[str], None],
    stalled: Callable[[str], None],
    stopped: Callable[[], None],
    again: bool,
) -> None:
    """Read the events monitor until it says that the guest ended; pass on each stall and stop.

    What happened before the connection is asked for: with `again` also whether the guest stands.
    """
    connection = None
    loop = asyncio.get_running_loop()
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        connection.setblocking(False)
        await asyncio.wait_for(loop.sock_connect(connection, str(path)), QMP_CONNECT_S)
        reader, writer = await asyncio.open_unix_connection(
            sock=connection, limit=QMP_LINE_BYTES_MAX
        )
        await reader.readline()
        writer.write(b'{"execute":"qmp_capabilities"}\n{"execute":"query-status"}\n')
        while line := await reader.readline():
            message = json.loads(line)
            if reason := _ending(message):
                once(reason)
                return
            if reason := _stall(message):
                stalled(reason)
            if message.get("event") == "STOP" or (again and _stands(message)):
                stopped()
    except (OSError, ValueError, DiapauseError) as error:
        log.warning("events of %s: %s", path, error)
    finally:
        if connection is not None:
            connection.close()


def _stands(message: dict[str, Any]) -> bool:
    answer = message.get("return")
    return isinstance(answer, dict) and answer.get("status") == "paused"


def _stall(message: dict[str, Any]) -> str | None:
    """Why the VMM stopped its guest over a request that the host could not do."""
    data = message.get("data", {})
    if message.get("event") == "BLOCK_IO_ERROR" and data.get("action") == "stop":
        return str(data.get("reason", "an I/O error"))
    answer = message.get("return")
    stands = isinstance(answer, dict) and answer.get("status") == "io-error"
    return "an I/O error" if stands else None


def _ending(message: dict[str, Any]) -> str | None:
    """The reason, when the message says that the guest ended."""
    if message.get("event") == "GUEST_PANICKED":
        return "guest-panic"
    if message.get("event") == "SHUTDOWN":
        return str(message.get("data", {}).get("reason", "shutdown"))
    answer = message.get("return")
    if isinstance(answer, dict):  # it had ended before anybody listened
        status = answer.get("status")
        return {"shutdown": "guest-shutdown", "guest-panicked": "guest-panic"}.get(str(status))
    return None
