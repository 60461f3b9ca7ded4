"""The plan of gc over made-up histories: what can still be reached stays whole, the rest goes.

A history is a list of verbs over a small home that is only rows and names of files. What a plan may
never do is said from the other end: by walking from each sandbox and each snapshot that is not
removed to every file that restoring it would read.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from diapause.catalog import (
    DeviceRecord,
    Identity,
    Process,
    SandboxRecord,
    SnapshotRecord,
)
from diapause.sandbox.upkeep.garbage import Kind, Plan, World, is_removed, make_plan

MEMORY, DISK = 1 << 27, 1 << 26
IDENTITY = Identity("qemu", "8.0", "pc-q35-8.0", "max", "tcg")
VERBS = (
    "run", "fork", "save", "pack", "pause", "resume", "rm", "forget", "gc", "end", "cold",
)  # fmt: skip


def snapshot(name: str, sandbox: SandboxRecord) -> SnapshotRecord:
    return SnapshotRecord(
        id=name, name=None, sandbox=sandbox.id, parent=sandbox.snapshot, state="captured",
        durability="disk", created_at="now", boot_id="b", image="tiny", identity=IDENTITY,
        layout=1, command_line=[], memory_bytes=MEMORY, cpus=1, disks_bytes=[DISK], hostname="h",
        machine_id="m", agent=True, dirty_source="private", dirty_pages=1, frozen_ms=1.0,
        state_bytes=1, state_digest="d",
        devices=[
            DeviceRecord(
                name=device, size_bytes=MEMORY, header_digest="", header_bytes=0, captured_pages=1
            )
            for device in ("memory", "disk0")
        ],
    )  # fmt: skip


@dataclass
class MadeUpHome:
    """Rows and names of files, and what each verb does to them."""

    sandboxes: list[SandboxRecord] = field(default_factory=list)
    snapshots: dict[str, SnapshotRecord] = field(default_factory=dict)
    files: dict[Kind, set[str]] = field(
        default_factory=lambda: {
            "snapshot": set(), "build": set(), "flat": set(), "capture": set(), "template": set(),
        }
    )  # fmt: skip
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def pick(self, rows: list[SandboxRecord], number: int) -> SandboxRecord | None:
        return rows[number % len(rows)] if rows else None

    def in_state(self, *states: str) -> list[SandboxRecord]:
        return [row for row in self.sandboxes if row.state in states]

    def take(self, verb: str, number: int) -> None:
        getattr(self, f"_{verb}")(number)

    def _new(self, source: str | None) -> None:
        self.sandboxes.append(
            SandboxRecord(
                id=f"s{next(self.numbers)}", name=None, state="running", created_at="now",
                image="tiny", memory_bytes=MEMORY, cpus=1, disks_bytes=[DISK], hostname="h",
                machine_id="m", process=Process(1, 1, "b"), snapshot=source, root=source,
            )
        )  # fmt: skip

    def _run(self, number: int) -> None:
        self.files["template"] |= {f"memory-{MEMORY}", f"ext4-{DISK}", f"overlay-{DISK}"}
        self.files["build"].add("of-ext4")
        self._new(None)

    def _fork(self, number: int) -> None:
        visible = [one for one in self.snapshots.values() if not is_removed(one)]
        if visible:
            source = visible[number % len(visible)].id
            self.files["flat"].add(source)
            self._new(source)

    def _save(self, number: int) -> None:
        if row := self.pick(self.in_state("running"), number):
            made = snapshot(f"n{next(self.numbers)}", row)
            self.snapshots[made.id] = made
            self.files["capture"].add(made.id)
            row.snapshot = made.id

    def _pause(self, number: int) -> None:
        if row := self.pick(self.in_state("running"), number):
            self._save(self.in_state("running").index(row))
            row.state, row.root, row.cold_base, row.process = "paused", None, None, None

    def _resume(self, number: int) -> None:
        if row := self.pick(self.in_state("paused"), number):
            row.state, row.root, row.process = "running", row.snapshot, Process(1, 1, "b")
            self.files["flat"].add(row.snapshot or "")

    def _end(self, number: int) -> None:
        if row := self.pick(self.in_state("running"), number):
            row.state, row.root, row.cold_base, row.process = "stopped", None, None, None

    def _cold(self, number: int) -> None:
        """It boots on its disk: empty memory, and what its last snapshot's disk is read from."""
        if row := self.pick(self.in_state("stopped"), number):
            self.files["template"] |= {f"memory-{MEMORY}", f"ext4-{DISK}", f"overlay-{DISK}"}
            self.files["build"].add("of-ext4")
            row.state, row.cold_base, row.process = "running", row.snapshot, Process(1, 1, "b")

    def _rm(self, number: int) -> None:
        if row := self.pick(self.sandboxes, number):
            self.sandboxes.remove(row)

    def _forget(self, number: int) -> None:
        rows = list(self.snapshots.values())
        paused = {row.snapshot for row in self.in_state("paused")}
        if rows and (one := rows[number % len(rows)]).id not in paused:
            self.snapshots[one.id] = msgspec.structs.replace(one, removed_at="now")

    def _pack(self, number: int) -> None:
        """The oldest capture: its parent is packed then."""
        one = next((row for row in self.snapshots.values() if row.state == "captured"), None)
        if one is None:
            return
        above = self.builds_below(one.parent)
        build = f"b{next(self.numbers)}"
        devices = [
            msgspec.structs.replace(device, builds=[*sorted(above), build])
            for device in one.devices
        ]
        self.snapshots[one.id] = msgspec.structs.replace(one, state="packed", devices=devices)
        self.files["build"].add(build)
        self.files["snapshot"].add(one.id)
        self.files["capture"].discard(one.id)

    def builds_below(self, parent: str | None) -> set[str]:
        """What the header below a capture maps to; fails where it is not there."""
        if parent is None:
            assert f"ext4-{DISK}" in self.files["template"], "what it began with is gone"
            return {"of-ext4"}
        return {build for device in self.snapshots[parent].devices for build in device.builds}

    def world(self) -> World:
        return World(
            sandboxes=self.sandboxes,
            snapshots=list(self.snapshots.values()),
            files=self.files,
            template_builds={f"ext4-{DISK}": {"of-ext4"}},
        )

    def plan(self) -> Plan:
        return make_plan(self.world())

    def _gc(self, number: int) -> None:
        plan = self.plan()
        for one in plan.rows:
            del self.snapshots[one]
        for kind, name in plan.files:
            self.files[kind].remove(name)

    # -- what has to be there --------------------------------------------------------------------

    def check_restorable(self, one: str) -> None:
        """Everything that restoring a snapshot reads is there."""
        row = self.snapshots[one]
        if row.state == "captured":
            assert one in self.files["capture"]
            if row.parent is None:
                assert self.builds_below(None) <= self.files["build"]
            else:
                self.check_restorable(row.parent)
            return
        assert one in self.files["snapshot"]
        assert self.builds_below(one) <= self.files["build"]

    def check(self) -> None:
        for one in self.snapshots.values():
            if not is_removed(one):
                self.check_restorable(one.id)
        for row in self.sandboxes:
            if row.root is not None:
                assert row.root in self.files["flat"]
            if row.cold_base is not None:
                self.check_restorable(row.cold_base)
            if row.snapshot is None:
                assert {f"ext4-{DISK}", f"memory-{MEMORY}"} <= self.files["template"]
            else:  # also what its next capture is to stand on
                self.check_restorable(row.snapshot)


HISTORIES = st.lists(st.tuples(st.sampled_from(VERBS), st.integers(0, 40)), max_size=60)


@given(HISTORIES)
def test_nothing_goes_that_can_be_reached(history: list[tuple[str, int]]) -> None:
    home = MadeUpHome()
    for verb, number in history:
        home.take(verb, number)
        home.check()


@given(HISTORIES)
def test_nothing_stays_that_can_not(history: list[tuple[str, int]]) -> None:
    """With the sandboxes gone and the snapshots removed, nothing is left; a second gc adds none."""
    home = MadeUpHome()
    for verb, number in history:
        home.take(verb, number)
    home.take("gc", 0)
    assert home.plan() == Plan([], [])
    home.sandboxes.clear()
    for number in range(len(home.snapshots)):
        home.take("forget", number)
    home.take("gc", 0)
    assert not home.snapshots
    assert not any(home.files.values())


@given(HISTORIES, st.data())
def test_what_is_read_or_under_way_stays(
    history: list[tuple[str, int]], data: st.DataObject
) -> None:
    home = MadeUpHome()
    for verb, number in history:
        home.take(verb, number)
    if not home.snapshots:
        return
    one = data.draw(st.sampled_from(sorted(home.snapshots)))
    home.sandboxes.clear()
    for number in range(len(home.snapshots)):
        home.take("forget", number)
    world = home.world()
    reading = World(
        world.sandboxes, world.snapshots, {one}, {"coming"},
        {**home.files, "capture": home.files["capture"] | {"coming"}}, world.template_builds,
    )  # fmt: skip
    plan = make_plan(reading)
    assert one not in plan.rows
    assert ("capture", "coming") not in plan.files
    for kind, name in plan.files:
        home.files[kind].remove(name)
    home.check_restorable(one)


@given(HISTORIES)
def test_where_memory_is_served_flat_files_wait_for_nobody(history: list[tuple[str, int]]) -> None:
    """Those that a running guest maps stay; nothing else is planned because of it."""
    home = MadeUpHome()
    for verb, number in history:
        home.take(verb, number)
    copied = home.plan()
    served = make_plan(replace(home.world(), copies=False))
    assert served.rows == copied.rows
    mapped = {row.root for row in home.sandboxes if row.root is not None}
    kept = home.files["flat"] - {name for kind, name in served.files if kind == "flat"}
    assert kept == mapped & home.files["flat"]
    others = [[one for one in plan.files if one[0] != "flat"] for plan in (served, copied)]
    assert others[0] == others[1]
