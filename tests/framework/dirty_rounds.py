"""The dirty set against full compares, on a guest under load: a program that any user can run.

    python -m tests.framework.dirty_rounds HOME ROUNDS FACTS

HOME is a home with the image `tiny`, FACTS what is known of the host, as JSON. A guest reads its
disk, writes it, drops its caches and writes tmpfs, all at once. Each round freezes it, captures by
the rule that holds, and reads all of guest RAM while it stands: every page that differs from the
last instant must have been captured, with exactly the bytes that it has. One JSON line per round
goes to stdout.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diapause import _core
from diapause.driver.base import FreezePlan
from diapause.driver.qemu.machine import QemuMachine
from diapause.guest.session import ExecRequest
from diapause.model import RunRequest
from diapause.sandbox.engine import Engine
from diapause.store.home import Home
from diapause.units import MIB, PAGE_SIZE

MEMORY_BYTES, DISK_BYTES = 128 * MIB, 64 * MIB
_ROUND_S = 0.7
_LOAD = """
head -c 12000000 /dev/urandom >/data/read; sync
while :; do cat /data/read >/dev/null; done &
while :; do head -c 2000000 /dev/zero | tr '\\0' 'w' >/data/written; sync; done &
while :; do echo 3 >/proc/sys/vm/drop_caches; usleep 150000; done &
while :; do i=$((i+1)); echo $i >>/tmp/n; head -c 300000 /dev/urandom >/tmp/r$((i%7)); done &
echo ready; wait
"""


@dataclass
class Round:
    """What one compare found."""

    rule: str
    captured_pages: int
    changed_pages: int  # really, by the compare
    missed_pages: int
    wrong_pages: int  # captured with other bytes than the frozen guest has


def read_ram(machine: QemuMachine, memory: Path) -> bytes:
    """All of guest RAM; its process stands."""
    inode = memory.stat().st_ino
    parts: list[bytes] = []
    with Path(f"/proc/{machine.process.pid}/maps").open() as maps:
        ranges = [line.split()[0] for line in maps if f" {inode} " in line]
    with Path(f"/proc/{machine.process.pid}/mem").open("rb", buffering=0) as file:
        for text in ranges:
            start, end = (int(part, 16) for part in text.split("-"))
            for at in range(start, end, 16 * MIB):
                parts.append(os.pread(file.fileno(), min(16 * MIB, end - at), at))
    found = b"".join(parts)
    assert len(found) == MEMORY_BYTES, f"{len(found)} bytes in {ranges}"
    return found


def differing(one: bytes, other: bytes) -> set[int]:
    """Pages that are not the same."""
    found: set[int] = set()
    for at in range(0, len(one), MIB):
        if one[at : at + MIB] == other[at : at + MIB]:
            continue
        found |= {
            page // PAGE_SIZE
            for page in range(at, at + MIB, PAGE_SIZE)
            if one[page : page + PAGE_SIZE] != other[page : page + PAGE_SIZE]
        }
    return found


class Rounds:
    """One guest, captured again and again."""

    def __init__(self, home: Home, engine: Engine, sandbox: str) -> None:
        self.home, self.sandbox, self.locks = home, sandbox, engine.host.locks
        guest = engine.host.guests[sandbox]
        assert guest.machine is not None
        self.machine = guest.machine
        record = engine.host.catalog.sandbox(sandbox)
        assert record is not None
        self.memory = engine.host.memory_file(record)
        directory = home.sandbox(sandbox)
        self.overlays = tuple(directory / name for [name] in record.overlays)
        self.last = bytes(MEMORY_BYTES)

    def take(self, number: int) -> Round:
        """Freeze, capture, compare, go on."""
        rule: _core.DirtyRule = "tracked" if number else "private"
        buffer = self.home.buffers / f"round-{number}"
        state, spill = buffer.with_suffix(".state"), buffer.with_suffix(".spill")
        state.touch()
        plan = FreezePlan(
            state=state, rule=rule, unmerged=[], spill=spill, goes_on=False,
            overlays=self.overlays, next_overlays=(),
            buffer=_core.CaptureBuffer(
                str(buffer), MEMORY_BYTES // PAGE_SIZE, MEMORY_BYTES // PAGE_SIZE
            ),
        )  # fmt: skip
        with self.locks.hold(self.sandbox):  # as a verb does: what nobody holds is thawed
            self.machine.freeze_and_capture(plan)
            now = read_ram(self.machine, self.memory)
            self.machine.ram.rearm()
            self.machine.thaw()
        found = self._compare(rule, buffer, now)
        self.last = now
        for path in (buffer, state):
            path.unlink()
        return found

    def _compare(self, rule: str, buffer: Path, now: bytes) -> Round:
        runs = _core.PageSource.capture(str(buffer)).runs()
        captured = {page for first, count in runs for page in range(first, first + count)}
        changed = differing(self.last, now)
        replayed = self._replay(buffer, runs)
        wrong = {page for page in differing(replayed, now) if page in captured}
        return Round(rule, len(captured), len(changed), len(changed - captured), len(wrong))

    def _replay(self, buffer: Path, runs: list[tuple[int, int]]) -> bytes:
        """The last instant with the captured pages over it, as a materialize makes it."""
        header, over = buffer.with_suffix(".header"), buffer.with_suffix(".over")
        digest = _core.zero_header(str(header), MEMORY_BYTES // PAGE_SIZE)
        source = _core.PageSource.capture(str(buffer))
        info = _core.provisional_header(str(header), digest, source, "ab" * 32, str(over))
        flat = buffer.with_suffix(".flat")
        _core.materialize(
            str(over), info.digest, str(self.home.builds), str(flat), {"ab" * 32: source}
        )
        made, result = flat.read_bytes(), bytearray(self.last)
        for first, count in runs:
            span = slice(first * PAGE_SIZE, (first + count) * PAGE_SIZE)
            result[span] = made[span]
        for path in (header, over, flat):
            path.unlink()
        return bytes(result)


async def _load(engine: Engine, sandbox: str) -> Any:
    session = await engine.exec(sandbox, ExecRequest(argv=["sh", "-c", _LOAD]))
    async for event in session:
        if b"ready" in getattr(event, "data", b""):
            return session
    raise AssertionError("the load did not begin")


def main(home: Home, rounds: int, facts: dict[str, str]) -> None:
    """Boot, load, and take the rounds."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    engine = Engine.open(home, loop)
    for name, value in facts.items():
        engine.host.catalog.remember(name, value)
    request = RunRequest(memory_bytes=MEMORY_BYTES, disk_bytes=DISK_BYTES, boot=True)
    sandbox = engine.run(request).sandbox
    try:
        taken = Rounds(home, engine, sandbox)
        assert taken.machine.tracked, "guest RAM is not tracked on this host"
        asyncio.run_coroutine_threadsafe(_load(engine, sandbox), loop).result(120)
        for number in range(rounds):
            until = time.monotonic() + _ROUND_S
            while time.monotonic() < until:  # the load needs time of its own
                time.sleep(0.01)
            print(json.dumps({"uid": os.geteuid(), **asdict(taken.take(number))}), flush=True)
    finally:
        engine.remove([sandbox], force=True)
        engine.close()


if __name__ == "__main__":
    main(Home.at(sys.argv[1]).create(), int(sys.argv[2]), json.loads(sys.argv[3]))
