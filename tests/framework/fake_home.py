"""A home with the fake program over it: real processes, a real socket, no guests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diapause.daemon.client import Client
from diapause.store.home import Home
from tests.framework.fake_program import fake_daemon

PROGRAM = [sys.executable, str(Path(__file__).with_name("run_fake.py"))]
COMMAND_S = 60


def eventually(what: str, holds: Callable[[], object], bound_s: float = 20) -> None:
    """Wait until it holds; fails with its name when the bound is reached."""
    deadline = time.monotonic() + bound_s
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not happen within {bound_s} s"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether a process has ended, though nobody may have waited for it.

    Its first thread may be a zombie while others still end: until the last one has, its sockets
    are open and take connections that nobody will answer.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "Z" and len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
    except (FileNotFoundError, ProcessLookupError):
        return True


def peak_bytes(pid: int) -> int:
    """The most memory that a living process ever had resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


class FakeHome:
    """One home and the ways into it."""

    def __init__(self, root: Path) -> None:
        self.home = Home.at(root)
        self.client = Client(self.home, fake_daemon)

    @property
    def daemon_pid(self) -> int:
        return int(self.home.serve_lock.read_text())

    def command(self, *words: str) -> list[str]:
        """The command line over this home."""
        # A run in the background of a shell may have been told to ignore interrupts.
        heed = ["env", "--default-signal=INT"]
        return [*heed, *PROGRAM, "--home", str(self.home.root), *words]

    def spawn(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start the command line."""
        pipes: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        return subprocess.Popen(self.command(*words), **{**pipes, **options})

    def run(self, *words: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run the command line to its end."""
        process = self.spawn(*words, stdin=subprocess.PIPE)
        try:
            out, err = process.communicate(given, timeout=COMMAND_S)
        finally:
            process.kill()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def json(self, *words: str, code: int = 0) -> Any:
        """Run with --json; the one document on stdout."""
        done = self.run("--json", *words)
        assert done.returncode == code, done
        return json.loads(done.stdout)

    def sandbox(self, name: str = "web") -> str:
        """Make a sandbox; its id."""
        document: dict[str, str] = self.json("run", "--name", name)
        return document["sandbox"]

    def serve(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a daemon of our own, in the foreground."""
        command = [*PROGRAM, "serve", str(self.home.root), *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def opened(self) -> int:
        """How many daemons ever opened this home."""
        try:
            return len((self.home.root / "opened").read_text().splitlines())
        except FileNotFoundError:
            return 0

    def remove(self) -> None:
        """End the daemon and leave nothing behind."""
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            pid = self.daemon_pid
            os.kill(pid, signal.SIGKILL)
            eventually("the end of the daemon", lambda: gone(pid))
        for directory in (self.home.sockets, self.home.buffers, self.home.root):
            shutil.rmtree(directory, ignore_errors=True)


def fake_home() -> Iterator[FakeHome]:
    """A fixture's body: a home with a short path, removed with its daemon."""
    made = FakeHome(Path(tempfile.mkdtemp(prefix="dp-")))
    try:
        yield made
    finally:
        made.remove()
