"""The real agent binary, built once and run on this host behind a unix socket, without a VM."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Self

from diapause.guest.link import Link
from diapause.guest.session import ExecRequest, Exit, Output, Session

ROOT = Path(__file__).resolve().parents[2]
BOUND_S = 30.0


@functools.cache
def agent_binary() -> Path:
    """The agent as cargo builds it; cargo itself knows whether it is older than its sources."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    command = ["cargo", "build", "--quiet", "--release", "-p", "diapause-agent"]
    subprocess.run([*command, "--target-dir", str(target)], cwd=ROOT, check=True, timeout=600)
    return target / "release" / "diapause-agent"


class Agent:
    """One agent process; `connect` gives a new connection, as a restarted VMM would."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "agent.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Starts the process; as init does after it died."""
        arguments = [str(agent_binary()), "--socket", str(self.path), "--no-system"]
        self._process = subprocess.Popen(arguments, start_new_session=True)

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        assert self._process is not None
        return self._process.poll() is None

    def kill(self) -> None:
        """Kills it and waits."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(BOUND_S)

    def rss_bytes(self) -> int:
        """The most memory it has ever had resident."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmHWM")

    async def connect(self) -> socket.socket:
        """A connected socket; waits until the agent listens."""
        async with asyncio.timeout(BOUND_S):
            while True:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    sock.connect(str(self.path))
                    return sock
                except (FileNotFoundError, ConnectionRefusedError):
                    sock.close()
                    await asyncio.sleep(0.01)

    def children(self) -> list[int]:
        """The process ids of its direct children."""
        text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(word) for word in text.split()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        children = self.children() if self.alive else []
        self.kill()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)


@contextlib.asynccontextmanager
async def attached(agent: Agent) -> AsyncIterator[Link]:
    """A link that is attached to the agent."""
    link = Link("test")
    await link.attach(await agent.connect(), identity=None, bound_s=BOUND_S)
    try:
        yield link
    finally:
        link.close("the test is over")


async def finish(session: Session) -> tuple[bytes, bytes, Exit]:
    """Reads a session to its end: output, errors, exit."""
    streams = {1: bytearray(), 2: bytearray()}
    async for item in session:
        if isinstance(item, Output):
            streams[item.stream] += item.data
        else:
            return bytes(streams[1]), bytes(streams[2]), item
    raise AssertionError("the session ended without an exit")


async def run(link: Link, *argv: str, stdin: bytes | None = None) -> tuple[bytes, bytes, Exit]:
    """Runs a command to its end."""
    session = await link.exec(ExecRequest(argv=list(argv), stdin=stdin is not None))
    if stdin is None:
        return await finish(session)

    async def feed() -> None:
        await session.write(stdin)
        await session.end_input()

    (out, err, end), _ = await asyncio.gather(finish(session), feed())
    return out, err, end


@contextlib.contextmanager
def running_agent(directory: Path) -> Iterator[Agent]:
    """An agent process for the length of a test."""
    with Agent(directory) as agent:
        yield agent
