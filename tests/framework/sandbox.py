"""Real guests through the real daemon: one home, its daemon, and a handle for each sandbox.

A test asks through the client, as the command line does. What a sandbox is checked by is in the
guest itself: a counter that must not lose or repeat a value, files with their digests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diapause.catalog import Catalog, SandboxRecord, SnapshotRecord
from diapause.daemon.client import Client
from diapause.daemon.start import DaemonCommand, daemon_command
from diapause.model import (
    CaptureAnswer,
    CaptureRequest,
    ForkRequest,
    FreezeAnswer,
    RestoreAnswer,
    RestoreRequest,
    ResumeAnswer,
    ResumeRequest,
    RunAnswer,
    RunRequest,
)
from diapause.store.home import Home
from diapause.units import MIB
from tests.framework.fake_home import eventually, gone
from tests.framework.guest_exec import Stream
from tests.framework.processes import end_processes, processes_of

if TYPE_CHECKING:
    from diapause.guest.images import Image
    from diapause.model import SandboxDetail

MEMORY_BYTES = 128 * MIB
DISK_BYTES = 64 * MIB
WAIT_S = 120.0
COUNTER = "/tmp/counter"
_COUNT = f"i=0; while :; do i=$((i+1)); echo $i >>{COUNTER}; usleep 50000; done"

# What one daemon has proved about this host, the next home need not prove again.
_facts: dict[str, str] = {}


def known_facts() -> dict[str, str]:
    """What was proved about this host so far."""
    return dict(_facts)


def these_are_known(facts: dict[str, str]) -> None:
    """Take over what another process proved about this host."""
    _facts.update(facts)


class Sandbox:
    """One sandbox of a home, by its id."""

    def __init__(self, daemon: Daemon, sandbox: str) -> None:
        self.daemon, self.id = daemon, sandbox
        self._client = daemon.client

    # -- in the guest ----------------------------------------------------------------------------

    def exec(self, *argv: str, given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end."""
        return Stream(self._client, self.id, list(argv), given).finish()

    def sh(self, script: str, given: bytes | None = None) -> str:
        """Run a script that must succeed; what it wrote."""
        done = self.exec("sh", "-ec", script, given=given)
        assert done.returncode == 0, (script, done)
        return done.stdout.decode()

    def stream(self, *argv: str) -> Stream:
        """Start a command and read it later."""
        return Stream(self._client, self.id, list(argv))

    def in_background(self, script: str) -> None:
        """Start what goes on after the exec ends."""
        # All one line, and nothing of ours open in it.
        self.exec("sh", "-c", 'setsid sh -c "$0" </dev/null >/dev/null 2>&1 &', script)

    def start_counter(self) -> None:
        """Begin to count."""
        self.in_background(_COUNT)
        eventually("the first value", lambda: self.exec("test", "-s", COUNTER).returncode == 0)

    def counted(self) -> int:
        """The counter's last value; fails where one is missing, or there twice."""
        # A writer may be in the middle of a line.
        whole = self.sh(f"cat {COUNTER}").rpartition("\n")[0]
        values = [int(line) for line in whole.split()]
        assert values == list(range(1, len(values) + 1)), _first_wrong(values)
        return len(values)

    def counts_beyond(self, value: int) -> None:
        """Wait until the counter has gone on, whole."""
        eventually(f"a value beyond {value}", lambda: self.counted() > value, WAIT_S)

    def rewrite(self, kib: int = 256) -> str:
        """Fill a file in memory and one on the disk anew; returns their digests."""
        data = os.urandom(kib * 1024)
        return self.sh(
            "cat >/tmp/file; cp /tmp/file /data/file; sync; sha256sum /tmp/file /data/file",
            given=data,
        )

    def digests(self) -> str:
        """The digests of both files, the disk's read again from the disk."""
        return self.sh(
            "echo 3 >/proc/sys/vm/drop_caches; sha256sum /tmp/file /data/file",
        )

    # -- verbs -----------------------------------------------------------------------------------

    def pause(self, durability: str = "process", **more: Any) -> CaptureAnswer:
        return self._client.pause(self.id, _capture(durability, more))

    def save(self, durability: str = "process", **more: Any) -> CaptureAnswer:
        return self._client.save(self.id, _capture(durability, more))

    def resume(self, **how: Any) -> ResumeAnswer:
        return self._client.resume(self.id, ResumeRequest(**how))

    def restore(self, snapshot: str, *, discard: bool = False) -> RestoreAnswer:
        return self._client.restore(self.id, RestoreRequest(snapshot=snapshot, discard=discard))

    def freeze(self) -> FreezeAnswer:
        return self._client.freeze(self.id)

    def thaw(self) -> FreezeAnswer:
        return self._client.thaw(self.id)

    def fork(self, count: int = 1) -> list[Sandbox]:
        return self.daemon.fork(self.id, count)

    def remove(self) -> None:
        self._client.remove(self.id, force=True)

    def inspect(self) -> SandboxDetail:
        return self._client.inspect(self.id)

    @property
    def state(self) -> str:
        return self.inspect().state

    @property
    def vmm_pid(self) -> int:
        """The process of a sandbox that runs."""
        vmm = self.inspect().vmm
        assert vmm is not None
        return vmm.pid

    @contextlib.contextmanager
    def forked(self, source: str | None = None) -> Iterator[Sandbox]:
        """A fork of this sandbox or of a snapshot, removed afterwards."""
        [fork] = self.daemon.fork(source or self.id, 1)
        try:
            yield fork
        finally:
            fork.remove()


class Daemon:
    """One home with its daemon, which is started when somebody asks something."""

    def __init__(
        self,
        home: Home,
        environment: dict[str, str] | None = None,
        within: tuple[str, ...] = (),
        command: DaemonCommand = daemon_command,
    ) -> None:
        self.home = home
        words = [f"{name}={value}" for name, value in (environment or {}).items()]
        self.client = Client(home, lambda home: [*within, "env", *words, *command(home)])

    # -- the process -----------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return int(self.home.serve_lock.read_text())

    def kill(self) -> None:
        """End it as nobody expects, and wait until it is gone."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        eventually("the end of the daemon", lambda: gone(pid))

    def stop(self) -> None:
        """End it in order; guests go on."""
        pid = self.pid
        os.kill(pid, signal.SIGTERM)
        eventually("the end of the daemon", lambda: gone(pid), WAIT_S)

    def vmms(self) -> list[int]:
        """Every QEMU process of this home that has not ended."""
        return [pid for pid in processes_of(self.home) if _is_qemu(pid) and not gone(pid)]

    def with_environment(self, environment: dict[str, str]) -> Daemon:
        """The same home under a daemon of another environment; the last one is stopped."""
        if self.home.serve_lock.exists() and not gone(self.pid):
            self.stop()
        return Daemon(self.home, environment)

    # -- sandboxes and snapshots -----------------------------------------------------------------

    def run_as_asked(self, **request: Any) -> tuple[Sandbox, RunAnswer]:
        """A run as the command line asks for it: from a ready snapshot where there is one."""
        request = {"memory_bytes": MEMORY_BYTES, "disk_bytes": DISK_BYTES, **request}
        self._remember()
        answer = self.client.run(RunRequest(**request))
        self._learn()
        return Sandbox(self, answer.sandbox), answer

    def run(
        self, name: str | None = None, memory_bytes: int = MEMORY_BYTES, **more: Any
    ) -> Sandbox:
        self._remember()
        wanted = {"disk_bytes": DISK_BYTES, "boot": True, **more}
        request = RunRequest(name=name, memory_bytes=memory_bytes, **wanted)
        made = Sandbox(self, self.client.run(request).sandbox)
        self._learn()
        return made

    def fork(self, source: str, count: int = 1) -> list[Sandbox]:
        answer = self.client.fork(ForkRequest(source=source, count=count))
        return [Sandbox(self, sandbox) for sandbox in answer.sandboxes]

    def record(self, sandbox: str) -> SandboxRecord:
        """A sandbox's row as the catalog has it."""
        with contextlib.closing(Catalog(self.home.catalog)) as catalog:
            found = catalog.sandbox(sandbox)
        assert found is not None
        return found

    def snapshot(self, snapshot: str) -> SnapshotRecord:
        """A snapshot's row as the catalog has it."""
        with contextlib.closing(Catalog(self.home.catalog)) as catalog:
            found = catalog.snapshot(snapshot)
        assert found is not None
        return found

    def handed(self, sandbox: str, device: str) -> Path:
        """What the descriptor of a device that a VMM was handed is called: the pager's files have
        no place, flat files have one."""
        record = self.record(sandbox)
        assert record.root is not None
        served = Path(f"/{record.root}.{device}")
        return served if record.pager is not None else self.home.flat_of(record.root) / device

    def make_flat_files(self, snapshot: str) -> None:
        """Have a snapshot's flat files made, as a resume that copies makes them."""
        with Sandbox(self, "").forked(snapshot) as fork:
            fork.freeze()
            fork.restore(snapshot, discard=True)
            assert fork.resume(memory_mode="copy").memory_mode == "copy"

    def packed(self, snapshot: str) -> None:
        """Wait until a snapshot is packed."""
        eventually(
            f"the packing of {snapshot}",
            lambda: self.client.inspect_snapshot(snapshot).state == "packed",
            WAIT_S,
        )

    def _remember(self) -> None:
        with contextlib.closing(Catalog(self.home.catalog)) as catalog:
            for name, value in _facts.items():
                catalog.remember(name, value)

    def _learn(self) -> None:
        with contextlib.closing(sqlite3.connect(self.home.catalog)) as database:
            _facts.update(database.execute("SELECT name, value FROM facts"))


@contextlib.contextmanager
def real_home(image: Image, **environment: str) -> Iterator[Daemon]:
    """A home of its own with the image in it; what ran in it is ended, what it held is gone."""
    # Short, so that its sockets lie inside it.
    home = Home.at(tempfile.mkdtemp(prefix="dia-")).create()
    link_image(home, image)
    try:
        yield Daemon(home, environment)
    finally:
        end_processes(home)
        for directory in (home.root, home.sockets, home.buffers):
            remove_closed(directory)


def link_image(home: Home, image: Image) -> None:
    """Give a home the image; its files are links where that can be, as nothing changes them."""
    target = home.image(image.directory.name)
    target.mkdir()
    for file in image.directory.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copy2(file, target / file.name)
    target.chmod(0o555)


def remove_closed(directory: Path) -> None:
    """Remove a tree whose directories may be read-only."""
    if not directory.exists():
        return
    for path in directory.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(directory)


class Aside:
    """A call in a thread of its own; `result` waits for it and raises what it raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._answer: Any = None
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer = self._call()
        except Exception as error:  # noqa: BLE001 - raised again where it is asked for
            self.failure = error

    def wait(self) -> Exception | None:
        """Wait for its end; what it raised."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "a call did not end"
        return self.failure

    def ends_within(self, bound_s: float) -> bool:
        """Whether it has ended by then."""
        self._thread.join(bound_s)
        return not self._thread.is_alive()

    def result(self) -> Any:
        if (failure := self.wait()) is not None:
            raise failure
        return self._answer


def _capture(durability: str, more: dict[str, Any]) -> CaptureRequest:
    return CaptureRequest(durability=durability, **more)  # type: ignore[arg-type]


def _is_qemu(pid: int) -> bool:
    try:
        return b"qemu-system" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return False


def _first_wrong(values: list[int]) -> str:
    at = next(i for i, value in enumerate(values) if value != i + 1)
    return f"value {at + 1} of {len(values)}: {values[max(0, at - 2) : at + 3]}"
