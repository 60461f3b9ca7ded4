"""Guests to measure: a home of their own, the daemon's client, and what runs inside them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from diapause._core import materialize
from diapause.daemon.client import Client
from diapause.daemon.start import DaemonCommand, daemon_command
from diapause.driver.process import process_ref
from diapause.errors import PagerUnavailable
from diapause.model import (
    CaptureAnswer,
    CaptureRequest,
    Durability,
    ForkRequest,
    ImageBuildRequest,
    RunRequest,
)
from diapause.pager.client import Pager
from diapause.store.home import Home
from diapause.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_S = 300.0
EXEC_S = 600.0
# About 1,520 pages of tmpfs a round, with what the kernel and the agent write besides.
DIRTY_BLOCKS = 95


class Bench:
    """One home for a run of benchmarks; everything in it is gone afterwards."""

    def __init__(self, command: DaemonCommand = daemon_command) -> None:
        # On a disk, as a real home is: /tmp may be a tmpfs.
        base = os.environ.get("DIAPAUSE_BENCH_DIR") or tempfile.gettempdir()
        self.root = Path(tempfile.mkdtemp(prefix="diapause-bench-", dir=base))
        self.home = Home.at(self.root / "h")
        self.client = Client(self.home, command)
        self.client.build_image(ImageBuildRequest(name="tiny"))

    def close(self) -> None:
        """End the guests and the daemon, and remove the home."""
        for row in self.client.sandboxes(everything=True):
            self.client.remove(row.sandbox, force=True)
        with contextlib.suppress(PagerUnavailable):
            Pager(self.home).stop()
        pid = int(self.home.serve_lock.read_text().split()[0])
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: process_ref(pid) is None, "the daemon's end", 30.0)
        for path in self.root.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(self.root)
        shutil.rmtree(self.home.buffers, ignore_errors=True)

    # -- verbs -----------------------------------------------------------------------------------

    def boot(self, memory_bytes: int = 512 * MIB, disk_bytes: int = 1 * GIB) -> str:
        """A fresh guest."""
        request = RunRequest(memory_bytes=memory_bytes, disk_bytes=disk_bytes, boot=True)
        return self.client.run(request).sandbox

    def save(self, sandbox: str, durability: Durability = "process") -> CaptureAnswer:
        """A snapshot; returns once it is packed, so that packing disturbs nothing that follows."""
        answer = self.client.save(sandbox, CaptureRequest(durability=durability))
        self.settle(answer.snapshot)
        return answer

    def pause(self, sandbox: str, durability: Durability = "process") -> CaptureAnswer:
        """A pause; returns once it is packed."""
        answer = self.client.pause(sandbox, CaptureRequest(durability=durability))
        self.settle(answer.snapshot)
        return answer

    def settle(self, snapshot: str) -> None:
        """Wait until a snapshot is packed."""

        def packed() -> bool:
            return self.client.inspect_snapshot(snapshot).state == "packed"

        wait_for(packed, f"packing {snapshot}")

    def fork(self, source: str, count: int = 1) -> list[str]:
        """New guests."""
        return self.client.fork(ForkRequest(source=source, count=count)).sandboxes

    def remove(self, *sandboxes: str) -> None:
        """End guests."""
        for sandbox in sandboxes:
            self.client.remove(sandbox, force=True)

    def run(self, sandbox: str, command: str) -> str:
        """Run a shell command in a guest; returns what it printed."""
        program = [sys.executable, "-m", "diapause", "--home", str(self.home.root)]
        done = subprocess.run(
            [*program, "exec", sandbox, "--", "sh", "-c", command],
            capture_output=True, text=True, timeout=EXEC_S, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    # -- what a guest stands on ------------------------------------------------------------------

    def flat(self, snapshot: str, device: str) -> Path:
        """A device of a packed snapshot as a plain file, made by its header for the peers."""
        path = self.root / "flat" / snapshot / device
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            place = self.home.snapshot(snapshot)
            devices = json.loads((place / "manifest.json").read_bytes())["devices"]
            [digest] = [one["header_digest"] for one in devices if one["name"] == device]
            header = str(place / f"{device}.header")
            materialize(header, digest, str(self.home.builds), str(path))
        return path

    def ram(self, sandbox: str) -> dict[str, int]:
        """Figures of the mapping of its guest RAM, bytes, by their names in smaps."""
        detail = self.client.inspect(sandbox)
        assert detail.vmm is not None
        assert detail.parent is not None
        found: dict[str, int] = {}
        inside = False
        for line in Path(f"/proc/{detail.vmm.pid}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                inside = line.endswith(f"{detail.parent}.memory")
            elif inside and line.endswith(" kB"):
                name, _, value = line.partition(":")
                found[name] = found.get(name, 0) + int(value.split()[0]) * 1024
        assert found.get("Pss", 0) > 0, sandbox
        return found

    # -- work inside a guest ---------------------------------------------------------------------

    def put_program(self, sandbox: str, name: str) -> None:
        """Build a program of `peers` for a guest, and put it there, at /tmp/NAME."""
        with tempfile.TemporaryDirectory() as place:
            program = Path(place) / name
            source = Path(__file__).parent / "peers" / f"{name}.c"
            compiler = ["cc", "-O2", "-static", "-o", str(program), str(source)]
            diapause = [sys.executable, "-m", "diapause", "--home", str(self.home.root)]
            for command in (compiler, [*diapause, "cp", str(program), f"{sandbox}:/tmp/{name}"]):
                subprocess.run(command, check=True, capture_output=True, timeout=EXEC_S)

    def fill(self, sandbox: str, size_mib: int) -> None:
        """Put so much memory to use, with bytes that don't compress."""
        self.run(sandbox, f"dd if=/dev/urandom of=/tmp/fill bs=1M count={size_mib} 2>/dev/null")

    def dirty(self, sandbox: str) -> None:
        """Write the pages of one round."""
        self.run(sandbox, dirty_command())


def dirty_command() -> str:
    """What a guest runs to write a round's pages: the same file, in place."""
    copy = f"dd if=/dev/urandom of=/tmp/round bs=64k count={DIRTY_BLOCKS} conv=notrunc"
    return f"{copy} 2>/dev/null"


def wait_for(condition: Callable[[], bool], what: str, bound_s: float = WAIT_S) -> None:
    """Wait until it holds; an error at the bound."""
    deadline = time.monotonic() + bound_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} took more than {bound_s:.0f} s")
        time.sleep(0.005)
