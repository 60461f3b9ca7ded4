"""gc: the only thing that deletes shared data. It plans, deletes, and says what it did.

    plan     what nothing refers to; nobody publishes from here to `move`
    rows     rows of removed snapshots go first: no row says more than the files hold
    move     files go out of everybody's reach, into a directory below tmp/
    delete   that directory; everybody works on meanwhile

A kill at any step leaves files that no row names, which the next gc finds, or a directory in tmp/,
which the next daemon sweeps.
"""

from __future__ import annotations

import errno
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar

from diapause.model import GcAnswer, GcItem
from diapause.sandbox.upkeep import world
from diapause.sandbox.upkeep.garbage import make_plan
from diapause.sandbox.verb import Verb
from diapause.store.files import allocated_bytes, remove_tree, storage_errors

if TYPE_CHECKING:
    from pathlib import Path

    from diapause.sandbox.host import Host
    from diapause.sandbox.upkeep.garbage import Kind, World

_NOT_KNOWN = (
    "what running VMMs have open could not be read: flat files, templates and builds are kept"
)


class Found:
    """A plan with the files that it means, and what they take."""

    def __init__(self, host: Host, seen: World) -> None:
        plan = make_plan(seen)
        self.rows, self.notes = plan.rows, list[str]()
        self.items: list[tuple[GcItem, list[Path]]] = []
        held = world.held_inodes(host.driver.all_processes())
        if held is None:
            self.notes.append(_NOT_KNOWN)
        inodes: set[int] = set()
        for kind, name in plan.files:
            paths = _paths(host, kind, name)
            if kind in ("flat", "template", "build") and (
                held is None or any(world.inodes_in(path) & held for path in paths)
            ):
                continue
            size = sum(allocated_bytes(path, inodes) for path in paths)
            self.items.append((GcItem(kind=kind, name=name, bytes=size), paths))

    def answer(self, *, dry_run: bool) -> GcAnswer:
        """The plan as the answer of a gc."""
        items = [item for item, _ in self.items]
        return GcAnswer(
            dry_run=dry_run, freed_bytes=sum(item.bytes for item in items), snapshots=self.rows,
            items=items, notes=self.notes,
        )  # fmt: skip


def _paths(host: Host, kind: Kind, name: str) -> list[Path]:
    path = world.places(host.home)[kind] / name
    if kind != "capture":
        return [path]
    return [path, *(host.home.buffers / f"{name}.{part}" for part in ("memory", "state"))]


class Gc(Verb):
    """One collection; it belongs to no sandbox."""

    name = "gc"
    steps: ClassVar[tuple[str, ...]] = ("plan", "rows", "move", "delete")

    def __init__(self, host: Host) -> None:
        super().__init__(host, "")
        self.trash = host.home.tmp / f"gc-{self.operation}"
        self.found: Found
        self._alone = ExitStack()

    def do_plan(self) -> None:
        """What nothing refers to, and from here on nothing new can."""
        self._alone.enter_context(self.host.digests.held_back())
        self._alone.enter_context(self.host.gate.collecting())
        self.host.ondemand.stand_back()
        self.found = Found(self.host, world.look(self.host, collecting=True))

    def do_rows(self) -> None:
        """Nobody can find them any more, whatever happens from here on."""
        if self.found.rows:
            self.host.catalog.forget_snapshots(self.found.rows)
            self.host.ondemand.forget(self.found.rows)

    def do_move(self) -> None:
        """Out of everybody's reach, one after the other."""
        with self._alone, storage_errors("garbage", self.host.home.root):
            for number, (item, paths) in enumerate(self.found.items):
                if item.kind == "flat":
                    self.host.flats.going(item.name)
                for path in paths:
                    self._move(path, f"{number}-{path.name}")

    def _move(self, path: Path, name: str) -> None:
        try:
            self.trash.mkdir(mode=0o700, exist_ok=True)
            path.rename(self.trash / name)
        except FileNotFoundError:
            return
        except OSError as error:
            # No room for another name, or another file system: it goes where it is.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EXDEV, errno.EACCES):
                raise
            remove_tree(path)

    def do_delete(self) -> None:
        """The bytes themselves."""
        with storage_errors("garbage", self.host.home.root):
            remove_tree(self.trash)
        freed = self.found.answer(dry_run=False)
        self.host.event("gc", freed_bytes=freed.freed_bytes, items=len(freed.items))

    def undo(self, step: str, error: BaseException) -> None:
        """What was moved is garbage all the same: it goes with tmp/ or with the next gc."""
        self._alone.close()
        remove_tree(self.trash)

    def answer(self) -> GcAnswer:
        """What was freed."""
        answer = self.found.answer(dry_run=False)
        answer.phases_ms = {**self.phases_ms, "total": self.elapsed_ms}
        return answer
