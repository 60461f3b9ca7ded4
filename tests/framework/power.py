"""The power goes at any moment of a verb: its calls are recorded once and every cut is opened.

A verb runs on a real guest under the real daemon while the daemon's calls are recorded. For each
prefix of them, and for what a disk may hold of the unsynced then, the home is built anew and opened
by the real engine as after a reboot. A state that was reported durable must be there, and whatever
the catalog still offers must be whole, byte for byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diapause.catalog import SandboxRecord, SnapshotRecord
from diapause.model import CheckRequest, GcRequest
from diapause.sandbox.engine import Engine
from diapause.store import boot
from diapause.store.home import Home
from tests.framework.contents import same_bytes
from tests.framework.disk_model import VARIANTS, Disk, State
from tests.framework.disks import flat_file
from tests.framework.sandbox import Daemon, remove_closed
from tests.framework.strace import Call, recorded

OPEN_S = 120.0
_OTHER_BOOT = "00000000-0000-4000-8000-0000000000cc"


@dataclass
class Recording:
    """One verb as it went: where it began, what was called, and what it answered."""

    begin: Path  # a copy of the home before it
    root: Path
    calls: list[Call]
    answers: list[Any]
    promises: list[int]  # the calls by which the client was told, one for each answer
    begun_from: str = ""  # the snapshot that the sandbox had before
    foreign: dict[str, Path] = field(default_factory=dict)  # path in the home → its last content
    contents: dict[str, dict[str, Path]] = field(default_factory=dict)  # snapshot → device → file

    @property
    def answer(self) -> Any:
        """Of the only verb."""
        [found] = self.answers
        return found

    def states(self) -> Iterator[tuple[int, str, State]]:
        """Every different state that a cut can leave: after which call, what was kept, the state.

        Only the last of equal states is of use: what was promised by then must hold.
        """
        disk = Disk(self.root, self.begin, {})
        for path, last in self.foreign.items():
            disk.mark_foreign(path, last)
        seen: dict[int, tuple[int, str, State]] = {}
        for number, call in enumerate(self.calls):
            if is_stop(call):
                disk.stopped = True
            changed = disk.apply(call)
            if not changed and number not in self.promises:
                continue
            for data, names in VARIANTS:
                state = disk.state(data, names)
                seen[state.key] = (number, f"data {data}, names {names}", state)
        yield from sorted(seen.values(), key=lambda found: found[0])

    def without(self, *names: str) -> Recording:
        """The same recording as if these calls had not been made."""
        kept = [n for n, call in enumerate(self.calls) if call.name not in names]
        promises = [kept.index(number) for number in self.promises]
        return replace(self, calls=[self.calls[n] for n in kept], promises=promises)

    def promised(self, number: int) -> int:
        """How many answers the client had when the power went after this call."""
        return sum(number >= promise for promise in self.promises)


def is_stop(call: Call) -> bool:
    """Whether it tells the VMM to stop its guest."""
    return call.name in ("sendto", "write", "sendmsg") and b'"stop"' in _said(call)


def _said(call: Call) -> bytes:
    argument = call.arguments[1]
    if not argument.startswith(b'"'):
        return b"".join(bytes.fromhex(h.decode()) for h in _hexes(call))
    return call.text(1)


def _hexes(call: Call) -> list[bytes]:
    joined = b", ".join(call.arguments[1:])
    return [text.replace(b"\\x", b"") for text in joined.split(b'"')[1::2]]


Act = tuple[Callable[[], Any], Callable[[Any], bytes]]


@contextlib.contextmanager
def recording(
    daemon: Daemon, *acts: Act, after: Callable[[], None] = lambda: None
) -> Iterator[Recording]:
    """Record acts, one after the other, and what goes on behind them until `after` returns.

    An act is what is done, and from its answer what the daemon's reply to the client holds and
    nothing before it does.
    """
    home = daemon.home
    with tempfile.TemporaryDirectory(prefix="dia-cut-", dir=home.root.parent) as scratch:
        begin, aside = Path(scratch) / "begin", Path(scratch) / "aside"
        aside.mkdir()
        contents = dict[str, dict[str, Path]]()
        link_contents(daemon, aside, contents)
        foreign = _links_of_overlays(home, aside)
        subprocess.run(["cp", "-a", "--sparse=always", home.root, begin], check=True, timeout=300)
        with recorded(daemon.pid) as calls:
            answers = [do() for do, _ in acts]
            after()
            daemon.client.snapshots()  # whoever takes this request has recorded the last reply
        said = [say(answer) for (_, say), answer in zip(acts, answers, strict=True)]
        made = Recording(begin, home.root, calls, answers, _promises(calls, said), foreign=foreign)
        link_contents(daemon, aside, contents)
        made.contents = contents
        yield made
        remove_closed(begin)


def _links_of_overlays(home: Home, aside: Path) -> dict[str, Path]:
    """Links to what VMMs write, so that its last content can be read when the name is gone."""
    found = {}
    for number, path in enumerate(sorted(home.sandboxes.glob("*/disk*.qcow2"))):
        link = aside / str(number)
        link.hardlink_to(path)
        found[str(path)] = link
    return found


def _promises(calls: list[Call], said: list[bytes]) -> list[int]:
    """The calls that told the client, in the order of the acts."""
    found: list[int] = []
    for words in said:
        begin = found[-1] + 1 if found else 0
        for number, call in enumerate(calls[begin:], begin):
            if call.name in ("sendto", "sendmsg") and words in _said(call):
                found.append(number)
                break
        else:
            raise AssertionError(f"nothing in {len(calls)} calls says {words!r}")
    return found


# -- what a home offers ------------------------------------------------------------------------


def link_contents(daemon: Daemon, aside: Path, known: dict[str, dict[str, Path]]) -> None:
    """For each other snapshot that can be had of a home, a file with each device's content."""
    for row in daemon.client.snapshots():
        if row.state != "packed" or row.id in known:
            continue
        known[row.id] = {d.name: aside / f"{row.id}-{d.name}" for d in row.devices}
        for name, file in known[row.id].items():
            flat_file(daemon, row.id, name, file)


# -- a home after the cut ----------------------------------------------------------------------


class Opened:
    """A home that the real engine opened after a reboot, and what it says then."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.host = engine, engine.host

    @property
    def sandboxes(self) -> dict[str, SandboxRecord]:
        return {row.id: row for row in self.host.catalog.sandboxes()}

    @property
    def snapshots(self) -> dict[str, SnapshotRecord]:
        return {row.id: row for row in self.host.catalog.snapshots()}

    def settle(self) -> None:
        """Wait for what the engine began behind its opening."""
        self.host.behind("nothing", lambda: None).result(OPEN_S)

    def damage(self) -> list[str]:
        """What a check that reads everything finds."""
        found = self.engine.check(CheckRequest()).damage
        return [f"{one.blob}: {one.cause}" for one in found]

    def collect(self) -> list[str]:
        """Collect what nothing refers to; what is left of it."""
        self.engine.gc(GcRequest(dry_run=False))
        left = self.engine.gc(GcRequest(dry_run=True)).items
        return [f"{item.kind} {item.name}" for item in left]

    def differing(self, snapshot: str, contents: dict[str, Path] | None) -> list[str]:
        """Every device of a snapshot is read and verified; those that hold something else."""
        record = self.snapshots[snapshot]
        flat = self.host.flats.ensure(record)
        self.host.flats.device_state(record)
        if contents is None:
            return []
        assert flat.files.keys() == contents.keys()
        return [n for n, path in flat.files.items() if not same_bytes(path, contents[n])]


@contextlib.contextmanager
def opened(home: Home) -> Iterator[Opened]:
    """Open a home in this process, under another boot of the host."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        with another_boot():
            engine = Engine.open(home, loop)
            try:
                yield Opened(engine)
            finally:
                engine.close()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(OPEN_S)
        loop.close()


@contextlib.contextmanager
def another_boot() -> Iterator[None]:
    """Let every module that asks see another boot id."""
    real = boot.boot_id
    places = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("diapause.") and getattr(module, "boot_id", None) is real
    ]
    for module in places:
        module.boot_id = lambda: _OTHER_BOOT  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in places:
            module.boot_id = real  # type: ignore[attr-defined]


@contextlib.contextmanager
def built(state: State, near: Path) -> Iterator[Home]:
    """The home that a cut leaves, beside `near` (its unchanged files are links)."""
    root = Path(tempfile.mkdtemp(prefix="dia-", dir=near))
    home = Home.at(root)
    try:
        state.build(root)
        yield home.create()
    finally:
        for directory in (home.root, home.sockets, home.buffers):
            remove_closed(directory)
            shutil.rmtree(directory, ignore_errors=True)
