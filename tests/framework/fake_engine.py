"""An engine without guests, for tests of the daemon and the command line.

It keeps its sandboxes in memory, knows ids, prefixes and names as the real one does, and its
sessions are small programs chosen by the command's first word.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import diapause
from diapause import model
from diapause.catalog import Catalog
from diapause.errors import (
    AmbiguousReference,
    ExecCut,
    HomeNewer,
    ImageNotFound,
    InUse,
    InvalidRequest,
    NameInUse,
    NotSupportedYet,
    PagerUnavailable,
    SandboxNotFound,
    SnapshotNotFound,
    WrongState,
)
from diapause.guest.session import ExecRequest
from diapause.model import Event
from diapause.operation import checkpoint, progress
from diapause.sandbox.network import check_network
from diapause.store.home import Home

AGENT = Path(diapause.__file__).with_name("native") / "diapause-agent"
PATTERN = bytes(range(256)) * 256  # 64 KiB
CREATED = "2026-01-01T00:00:00Z"


@dataclass
class Output:
    """Data on one of the command's streams."""

    stream: int
    data: bytes


@dataclass
class Ended:
    """The command's end."""

    code: int


class FakeSession:
    """A command: output in a queue of eight pieces, so that nothing is ahead of its reader."""

    def __init__(self, request: ExecRequest, abandoned: Path, hostile: Path) -> None:
        self.request, self._hostile = request, hostile
        self._abandoned = abandoned
        self._input: asyncio.Queue[bytes] = asyncio.Queue(2)
        self._output: asyncio.Queue[Output | Ended | Exception | None] = asyncio.Queue(8)
        self._signals: asyncio.Queue[int] = asyncio.Queue()
        self._sizes: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        self._program = asyncio.create_task(self._run())

    async def write(self, data: bytes) -> None:
        await self._input.put(data)

    async def end_input(self) -> None:
        await self._input.put(b"")

    async def signal(self, number: int) -> None:
        await self._signals.put(number)

    async def resize(self, rows: int, cols: int) -> None:
        await self._sizes.put((rows, cols))

    def abandon(self) -> None:
        self._abandoned.touch()
        self._program.cancel()

    async def __aiter__(self) -> AsyncIterator[Output | Ended]:
        while (item := await self._output.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    async def _say(self, data: bytes, stream: int = 1) -> None:
        await self._output.put(Output(stream, data))

    async def _end(self, code: int) -> None:
        await self._output.put(Ended(code))

    async def _run(self) -> None:
        word, *rest = self.request.argv
        await getattr(self, f"_do_{word.replace('-', '_')}")(*rest)

    async def _do_cat(self) -> None:
        while data := await self._input.get():
            await self._say(data)
        await self._end(0)

    async def _do_sum(self) -> None:
        digest, size = hashlib.blake2b(), 0
        while data := await self._input.get():
            digest.update(data)
            size += len(data)
        await self._say(f"{size} {digest.hexdigest()}\n".encode())
        await self._end(0)

    async def _do_source(self, size: str) -> None:
        for _ in range(int(size) // len(PATTERN)):
            await self._say(PATTERN)
        await self._end(0)

    async def _do_yes(self) -> None:
        while self._signals.empty():
            await self._say(b"y\n" * 1000)
        await self._end(128 + await self._signals.get())

    async def _do_exit(self, code: str) -> None:
        await self._say(b"out\n")
        await self._say(b"err\n", 2)
        await self._end(int(code))

    async def _do_cut(self) -> None:
        await self._say(b"half")
        await self._output.put(ExecCut(cause="the guest was removed"))

    async def _do_short(self) -> None:
        await self._say(b"half")
        await self._output.put(None)

    async def _do_broken(self) -> None:
        await self._output.put(ValueError("a defect"))

    async def _do_wait(self) -> None:
        """Never reads its input, says so, and ends by a signal."""
        await self._say(b"waiting\n")
        await self._end(128 + await self._signals.get())

    async def _do_size(self) -> None:
        await self._say(f"{self.request.rows}x{self.request.cols}\n".encode())
        rows, cols = await self._sizes.get()
        await self._say(f"{rows}x{cols}\n".encode())
        await self._end(0)

    async def _do_show(self, *_words: str) -> None:
        env = ",".join(f"{k}={v}" for k, v in sorted(self.request.env.items()))
        await self._say(f"{self.request.cwd} {env} {self.request.argv[1:]}\n".encode())
        await self._end(0)

    async def _do_diapause_agent(self, *words: str) -> None:
        """The real agent's end of a copy, or what a test says that a guest sends instead."""
        old = self._hostile.with_name("old")
        if old.exists():
            code, message = old.read_text().split(" ", 1)
            await self._say(message.encode(), 2)
            return await self._end(int(code))
        if self._hostile.exists():
            stream = self._hostile.read_bytes()
            for at in range(0, len(stream), len(PATTERN)):
                await self._say(stream[at : at + len(PATTERN)])
            report = self._hostile.with_name("report")
            await self._say(report.read_bytes() if report.exists() else b"{}", 2)
            return await self._end(0)
        pipe = asyncio.subprocess.PIPE
        agent = await asyncio.create_subprocess_exec(
            str(AGENT), *words, stdin=pipe, stdout=pipe, stderr=pipe
        )
        assert agent.stdout is not None
        assert agent.stderr is not None
        feeding = asyncio.create_task(self._feed(agent))
        try:
            while data := await agent.stdout.read(len(PATTERN)):
                await self._say(data)
            await self._say(await agent.stderr.read(), 2)
            await self._end(await agent.wait())
        finally:
            feeding.cancel()
            if agent.returncode is None:
                # Abandoned: its input ends, as the agent in a guest does it.
                assert agent.stdin is not None
                agent.stdin.close()

    async def _feed(self, agent: asyncio.subprocess.Process) -> None:
        assert agent.stdin is not None
        with contextlib.suppress(ConnectionError):
            while data := await self._input.get():
                agent.stdin.write(data)
                await agent.stdin.drain()
        agent.stdin.close()

    async def _do_big(self) -> None:
        await self._say(PATTERN * 5 + b"tail")
        await self._end(0)


class FakeEngine:
    """Sandboxes in memory."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._lock = threading.Lock()
        self._made = 0
        self._rows: dict[str, model.SandboxRow] = {}
        self._gone: set[str] = set()
        self._snapshots: dict[str, model.SnapshotDetail] = {}
        self.journal = Catalog(home.catalog).journal

    def made_by(self, operation: str, request: object) -> model.Answer | None:
        return None

    @classmethod
    def open(cls, home: Home, loop: asyncio.AbstractEventLoop) -> FakeEngine:
        if (home.root / "newer").exists():
            raise HomeNewer(home=home.root, found=99, known=1)
        # One line for each engine that was ever opened here: tests count them.
        with (home.root / "opened").open("a") as file:
            file.write("opened\n")
        return cls(home)

    def close(self) -> None:
        self._stall()
        (self.home.root / "closed").touch()

    def doctor(self) -> model.DoctorAnswer:
        broken = (self.home.root / "broken").exists()
        checks = [
            model.Check(name="qemu", ok=not broken, detail="7.2", fix="apt-get install qemu"),
            model.Check(name="kvm", ok=False, detail="no /dev/kvm", fix="", required=False),
        ]
        return model.DoctorAnswer(checks=checks, daemon_pid=1, pager_pid=None)

    def bench(self, request: model.BenchRequest) -> model.BenchAnswer:
        if (self.home.root / "no-pager").exists():
            raise PagerUnavailable(cause="/dev/fuse is missing")
        row, row2 = (
            model.BenchRow(
                group="cycle",
                name=name,
                unit="ms",
                values=values,
                median=values[-1],
                notes=["warm"],
            )
            for name, values in (("boot", [1600.0, 1200.0]), ("resume", [60.0]))
        )
        row2.peer = model.BenchPeer(name="boot", values=row.values, median=row.median)
        row2.ratio = 0.05
        row3 = model.BenchRow(group="pager", name="fault", unit="us", values=[14.04], median=14.04)
        row3.peer = model.BenchPeer(name="flat", values=[1.2], median=1.2)
        row3.ratio = 11.7
        rows = [row, row2, row3]
        return model.BenchAnswer(
            rounds=request.rounds, accelerator="tcg", notes=["\x1b[31mnot all"],
            rows=[one for one in rows if one.group in (request.groups or ["cycle", "pager"])],
        )  # fmt: skip

    def build_image(self, request: model.ImageBuildRequest) -> model.ImageInfo:
        return self._image(request.name, request.flavor or request.name)

    def import_image(self, request: model.ImageImportRequest) -> model.ImageInfo:
        if not request.kernel.startswith("/"):
            raise InvalidRequest(what=f"kernel={request.kernel!r}", cause="no absolute path")
        return self._image(request.name, "imported")

    def images(self) -> list[model.ImageInfo]:
        return [self._image("tiny", "tiny")]

    def inspect_image(self, name: str) -> model.ImageDetail:
        if name != "tiny":
            raise ImageNotFound(reference=name, candidates="tiny")
        file = model.ImageFile(name="kernel", size_bytes=4096, digest="blake2b:00")
        return model.ImageDetail(
            name="tiny", flavor="tiny", created_at=CREATED, size_bytes=4096, stored_bytes=4096,
            files=[file], kernel_version="6.1", kernel_package="linux", kernel_package_version="1",
            command_line="", agent_digest="blake2b:00", busybox="1.35", network=False,
            sandboxes=[row.sandbox for row in self._rows.values()], snapshots=[], ready=[],
        )  # fmt: skip

    def remove_image(self, name: str) -> model.RemoveImageAnswer:
        found = self.inspect_image(name)
        if found.sandboxes:
            users = f"sandbox {found.sandboxes[0]}"
            raise InUse(what=f"Image {name}", users=users, advice="Remove it.")
        return model.RemoveImageAnswer(removed=[name])

    def run(self, request: model.RunRequest) -> model.RunAnswer:
        check_network(request)
        with self._lock:
            for owner in self._rows.values():
                if request.name and owner.name == request.name:
                    raise NameInUse(name=request.name, owner=owner.sandbox)
            row = self._row(request)
            self._rows[row.sandbox] = row
        return model.RunAnswer(
            sandbox=row.sandbox, name=row.name, ready_ms=12.5, phases_ms={"boot": 12.5}
        )

    def sandboxes(self, everything: bool) -> list[model.SandboxRow]:
        hidden = () if everything else ("stopped", "failed", "removing")
        return [row for row in self._rows.values() if row.state not in hidden]

    def inspect(self, reference: str) -> model.SandboxDetail:
        row = self._find(reference)
        return model.SandboxDetail(
            id=row.sandbox, name=row.name, state=row.state, image=row.image, parent=row.snapshot,
            vmm=model.VmmInfo(kind="qemu", version="7.2", pid=7), error=None, reason=None,
            memory_bytes=row.memory_bytes, cpus=row.cpus, disk_bytes=row.disk_bytes,
            created_at=row.created_at, accelerator="kvm", tracker=True, hostname="\x1b[31mred",
            doing=None, directory=str(self.home.sandbox(row.sandbox)),
        )  # fmt: skip

    def remove(self, references: list[str], force: bool) -> model.RemoveAnswer:
        removed, already = [], []
        for reference in references:
            if reference in self._gone:
                already.append(reference)
                continue
            row = self._find(reference)
            if row.state == "running" and not force:
                raise WrongState(
                    sandbox=row.sandbox, state="running", verb="rm", needed="not running",
                    advice="Use --force.",
                )  # fmt: skip
            self._gone.add(row.sandbox)
            self._rows.pop(row.sandbox, None)
            removed.append(row.sandbox)
        return model.RemoveAnswer(removed=removed, already=already)

    def pause(self, reference: str, request: model.CaptureRequest) -> model.CaptureAnswer:
        row = self._find(reference)
        self._stall()
        already = row.state == "paused"
        row.state = "paused"
        return self._capture(row, request, already)

    def save(self, reference: str, request: model.CaptureRequest) -> model.CaptureAnswer:
        return self._capture(self._find(reference), request, already=False)

    def resume(self, reference: str, request: model.ResumeRequest) -> model.ResumeAnswer:
        row = self._find(reference)
        if request.memory_mode == "ondemand":
            raise NotSupportedYet(what="--memory-mode ondemand")
        already = row.state == "running"
        row.state = "running"
        return model.ResumeAnswer(
            sandbox=row.sandbox, warm=True, ready_ms=3.25, source="local", phases_ms={},
            snapshot=row.snapshot, already=already, notes=["clock set"],
        )  # fmt: skip

    def freeze(self, reference: str) -> model.FreezeAnswer:
        return self._set_frozen(reference, frozen=True)

    def thaw(self, reference: str) -> model.FreezeAnswer:
        return self._set_frozen(reference, frozen=False)

    def restore(self, reference: str, request: model.RestoreRequest) -> model.RestoreAnswer:
        row = self._find(reference)
        return model.RestoreAnswer(
            sandbox=row.sandbox, snapshot=request.snapshot,
            saved=None if request.discard else "5aved", state=row.state, phases_ms={},
        )  # fmt: skip

    def _set_frozen(self, reference: str, *, frozen: bool) -> model.FreezeAnswer:
        row = self._find(reference)
        already = (row.state == "frozen") == frozen
        row.state = "frozen" if frozen else "running"
        return model.FreezeAnswer(
            sandbox=row.sandbox, frozen=frozen, phases_ms={"total": 1.5}, already=already
        )

    def fork(self, request: model.ForkRequest) -> model.ForkAnswer:
        source = self._find(request.source)
        count = min(max(request.count, 0), 64)
        made = [self.run(model.RunRequest(image=source.image)).sandbox for _ in range(count)]
        return model.ForkAnswer(sandboxes=made, snapshot="5a", phases_ms={})

    def snapshots(self) -> list[model.SnapshotDetail]:
        return list(self._snapshots.values())

    def inspect_snapshot(self, reference: str) -> model.SnapshotDetail:
        try:
            return self._snapshots[reference]
        except KeyError:
            raise SnapshotNotFound(reference=reference, candidates=list(self._snapshots)) from None

    def remove_snapshot(self, reference: str) -> model.RemoveSnapshotAnswer:
        found = self.inspect_snapshot(reference)
        if any(row.snapshot == found.id and row.state == "paused" for row in self._rows.values()):
            raise InUse(what=f"Snapshot {found.id}", users="a paused sandbox", advice="Resume it.")
        del self._snapshots[found.id]
        return model.RemoveSnapshotAnswer(removed=[found.id], already=[], notes=["until gc"])

    def gc(self, request: model.GcRequest) -> model.GcAnswer:
        item = model.GcItem(kind="build", name="b1", bytes=4096)
        return model.GcAnswer(
            dry_run=request.dry_run, freed_bytes=4096, snapshots=["5a"], items=[item],
            phases_ms={"total": 1.0},
        )  # fmt: skip

    def check(self, request: model.CheckRequest) -> model.CheckAnswer:
        damage = model.Damage(blob="builds/b1", cause="bad frame", snapshots=["5a"])
        if request.repair:
            damage.repaired = "made again"
        item = model.GcItem(kind="build", name="b1", bytes=4096)
        kind = model.CheckedKind(kind="build", how="digest", count=2, bytes=8192)
        return model.CheckAnswer(
            damage=[damage], blobs=7, kinds=[kind], unchecked=1, unreferenced=[item]
        )

    def verify_snapshot(self, reference: str) -> model.CheckAnswer:
        self.inspect_snapshot(reference)
        return model.CheckAnswer(damage=[], blobs=3)

    def df(self) -> model.DfAnswer:
        row = model.DfRow(kind="build", count=2, bytes=8192, gc_bytes=4096)
        return model.DfAnswer(
            rows=[row], snapshots=[], total_bytes=8192, gc_bytes=4096, free_bytes=1 << 30
        )

    def pager(self) -> model.PagerAnswer:
        if (self.home.root / "no-pager").exists():
            return model.PagerAnswer(running=False)
        waits = model.Stalled(blob="builds/5a", cause="gone", waited_ms=1500)
        sandboxes = [
            model.PagerSandbox(sandbox="a" * 16, pid=7, files=2, handed=False, ended=False),
            model.PagerSandbox(
                sandbox="b" * 16, pid=8, files=1, handed=True, ended=False, stalled=waits
            ),
        ]
        return model.PagerAnswer(
            running=True, instance="5a", pid=5, keeper_pid=6, replaceable=True,
            resident_bytes=3 << 20, files=3, sandboxes=sandboxes,
        )  # fmt: skip

    def diff_snapshots(self, old: str, new: str) -> model.DiffAnswer:
        first, second = self.inspect_snapshot(old), self.inspect_snapshot(new)
        device = model.DeviceDifference(
            name="memory", pages=2, bytes=8192, zeroed_pages=1, extent_count=1, extents=[(3, 2)]
        )
        return model.DiffAnswer(old=first.id, new=second.id, devices=[device])

    def console_log(self, reference: str) -> Path:
        directory = self.home.sandbox(self._find(reference).sandbox)
        directory.mkdir(exist_ok=True)
        return directory / "console.log"

    def events(self, after: int, limit: int) -> list[Event]:
        if after:
            self._stall()
        path = self.home.root / "events"
        numbers = range(after + 1, int(path.read_text() if path.exists() else "3") + 1)
        return [
            Event(
                sequence=n,
                at=CREATED,
                kind="created",
                sandbox="ab0001",
                detail={"name": "\x1b[31m"},
            )
            for n in numbers[:limit]
        ]

    def metrics(self) -> bytes:
        return b"# TYPE fake gauge\nfake 1\n"

    async def exec(self, reference: str, request: ExecRequest) -> FakeSession:
        row = self._find(reference)
        if row.state != "running":
            raise WrongState(
                sandbox=row.sandbox, state=row.state, verb="exec", needed="running",
                advice=f"`diapause resume {row.sandbox}` first.",
            )  # fmt: skip
        root = self.home.root
        return FakeSession(request, root / "abandoned", root / "hostile")

    async def console(self, reference: str) -> FakeSession:
        """What is typed is shown, as a terminal's echo."""
        return await self.exec(reference, ExecRequest(argv=["cat"]))

    def _stall(self) -> None:
        """Hold a verb while the file `stall` is there; `stalled` says that it is held."""
        bound = time.monotonic() + 30
        if (self.home.root / "stall").exists():
            (self.home.root / "stalled").touch()
        while (self.home.root / "stall").exists() and time.monotonic() < bound:
            progress(3_000_000, 9_000_000, "stalling")
            if not (self.home.root / "deaf").exists():
                checkpoint()
            time.sleep(0.01)

    def _find(self, reference: str) -> model.SandboxRow:
        if reference == "defect":
            raise ValueError("a defect")
        rows = list(self._rows.values())
        for row in rows:
            if reference in (row.sandbox, row.name):
                return row
        found = [row for row in rows if row.sandbox.startswith(reference)]
        if len(found) > 1:
            names = [row.sandbox for row in found]
            raise AmbiguousReference(reference=reference, candidates=names)
        if not found:
            names = [row.sandbox for row in rows]
            raise SandboxNotFound(reference=reference, candidates=names)
        return found[0]

    def _row(self, request: model.RunRequest) -> model.SandboxRow:
        self._made += 1
        return model.SandboxRow(
            sandbox=f"ab{self._made:04x}", name=request.name, state="running",
            image=request.image, memory_bytes=request.memory_bytes, cpus=request.cpus,
            disk_bytes=request.disk_bytes, created_at=CREATED, snapshot=None, error=None,
        )  # fmt: skip

    def _capture(
        self, row: model.SandboxRow, request: model.CaptureRequest, already: bool
    ) -> model.CaptureAnswer:
        snapshot = f"5a{len(self._snapshots):04x}"
        device = model.DeviceInfo(name="memory", size=4096, pages=1, stored_bytes=10, builds=[])
        self._snapshots[snapshot] = model.SnapshotDetail(
            id=snapshot, name=request.name, sandbox=row.sandbox, parent=row.snapshot,
            state="captured", durability=request.durability, pending_bytes=0, devices=[device],
            error=None, created_at=CREATED, image=row.image, memory_bytes=row.memory_bytes,
            stored_bytes=10, vmm={"kind": "qemu"},
        )  # fmt: skip
        row.snapshot = snapshot
        return model.CaptureAnswer(
            sandbox=row.sandbox, snapshot=snapshot, durability=request.durability,
            frozen_ms=1.5, dirty_pages=1834, dirty_source="tracked", captured_bytes=7_511_000,
            phases_ms={"stop": 0.5}, already=already,
        )  # fmt: skip

    def _image(self, name: str, flavor: str) -> model.ImageInfo:
        return model.ImageInfo(
            name=name, flavor=flavor, created_at=CREATED, kernel_version="6.1",
            size_bytes=9_000_000, digests={"kernel": "00"},
        )  # fmt: skip
