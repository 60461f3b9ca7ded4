"""A scenario for each verb: what a kill at any of its steps may leave.

**A new verb** needs a class here, or `tests/fault/test_kill_lists.py` fails by its name. Derive
from `Scenario` (or `Makes`, where the verb makes a sandbox), and say:

    verb      the Verb's class; its steps are the places of its kills
    subject   the sandbox that the verb is asked for: `ground.guest()` is warm, runs and counts;
              bring it to the state that the verb starts from. None for a verb without one:
              its states are "gone", for sandboxes that it makes
    call      start the verb through the client, and wait for it
    commit    the step whose act decides: a daemon killed before that act has ended leaves the
              sandbox `before`, one killed after it `after` (states; "gone" is one of them)
    bereaved  by step: the state that a VMM leaves which dies as the step is about to be taken, and
              by `END` for one that dies when all are taken;
              steps that are left out lose nothing: no VMM is there, or nobody needs it
    check     what else holds afterwards (optional)

That is all: the kill points of `tests/fault/test_kills_*.py` are generated from this. A file of
another helper may hold the class, as long as this module imports it.
"""

from __future__ import annotations

import importlib
import pkgutil
import shutil
from typing import TYPE_CHECKING, ClassVar

import diapause.sandbox
from diapause.model import CheckRequest, GcRequest, RunRequest
from diapause.sandbox.cold import Cold
from diapause.sandbox.freeze import Freeze, Thaw
from diapause.sandbox.pause import Pause, Save
from diapause.sandbox.remove import Remove
from diapause.sandbox.restore import Restore
from diapause.sandbox.resume import Boot, Fork, Resume
from diapause.sandbox.upkeep.collect import Gc
from diapause.sandbox.upkeep.forget import RemoveSnapshot
from diapause.sandbox.upkeep.image_users import RemoveImage
from diapause.sandbox.upkeep.repair import Repair
from diapause.sandbox.verb import Verb
from diapause.sandbox.warm import FirstRun, WarmRun
from diapause.units import MIB
from tests.framework import coupled
from tests.framework.fake_home import eventually
from tests.framework.sandbox import DISK_BYTES, MEMORY_BYTES, WAIT_S, Sandbox

if TYPE_CHECKING:
    from tests.framework.mortal import MortalDaemon

END = "at its end"

# What a save and a pause ask of their VMM inside the frozen section, in order. A test compares it
# with a recording; each is a place of a kill, right after the call.
FROZEN_CALLS: dict[str, tuple[str, ...]] = {
    "save": (
        "add-fd.1", "qom-get.1", "add-fd.2", "blockdev-add.1", "blockdev-add.2", "stop.1",
        "query-status.1", "blockdev-snapshot.1", "xen-save-devices-state.1", "copy.1", "rearm.1",
        "cont.1", "remove-fd.1",
    ),
    "pause": (
        "add-fd.1", "stop.1", "query-status.1", "xen-save-devices-state.1", "copy.1", "remove-fd.1",
    ),
}  # fmt: skip


class Ground:
    """One home with one warm guest, of which every test takes what it needs."""

    def __init__(self, daemon: MortalDaemon) -> None:
        self.daemon = daemon
        booted = daemon.run("warm")
        coupled.start(booted)
        booted.rewrite(64)
        self.base = booted.save("disk", name="base").snapshot
        self._guest: Sandbox | None = booted

    def guest(self) -> Sandbox:
        """A guest that runs and counts: the last test's, or a fork where that one is lost."""
        found = self._guest
        if found is not None:
            self.bring_back(found)
        if found is None or self.state(found) != "running":
            [found] = self.daemon.fork(self.base)
        self._guest = found
        return found

    def bring_back(self, sandbox: Sandbox) -> None:
        """Let a sandbox run again that was paused or frozen."""
        state = self.state(sandbox)
        if state == "paused":
            sandbox.resume()
        elif state == "frozen":
            self.daemon.client.thaw(sandbox.id)

    def fork(self) -> Sandbox:
        """A guest of one's own."""
        [made] = self.daemon.fork(self.base)
        return made

    def state(self, sandbox: Sandbox) -> str:
        """The state of a sandbox; "gone" where it was removed."""
        rows = self.daemon.client.sandboxes(everything=True)
        return next((row.state for row in rows if row.sandbox == sandbox.id), "gone")

    def ids(self) -> set[str]:
        """Every sandbox there is."""
        return {row.sandbox for row in self.daemon.client.sandboxes(everything=True)}

    def snapshot_ids(self) -> set[str]:
        """Every snapshot there is."""
        return {row.id for row in self.daemon.client.snapshots()}

    def reaches(self, sandbox: Sandbox, state: str) -> None:
        """Wait until the sandbox is in this state: an end is seen behind the verbs."""
        what = f"state {state} of {sandbox.id}"
        eventually(what, lambda: self.state(sandbox) == state, WAIT_S)


class Scenario:
    """See the module."""

    verb: ClassVar[type[Verb]]
    before: ClassVar[str] = "running"
    after: ClassVar[str] = "running"
    commit: ClassVar[str]
    bereaved: ClassVar[dict[str, str]] = {}
    captures: ClassVar[bool] = False  # then the next save must be exact whatever was killed

    def subject(self, ground: Ground) -> Sandbox | None:
        """The sandbox that the verb is for."""
        return ground.guest()

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        """Take the verb: each scenario in its own way; this one is a base."""
        raise NotImplementedError

    def check(self, ground: Ground, subject: Sandbox | None, committed: bool) -> None:
        """What else holds after the restart."""

    def committed(self, step: str, when: str) -> bool:
        """Whether a daemon killed there had decided."""
        steps = list(self.verb.steps)
        at, decides = steps.index(step), steps.index(self.commit)
        return at > decides or (at == decides and when == "acted")


class _Save(Scenario):
    verb, commit, captures = Save, "commit", True
    bereaved: ClassVar = dict.fromkeys((*Save.steps, END), "failed")

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        assert subject is not None
        return subject.save("disk")


class _Pause(Scenario):
    verb, commit, captures = Pause, "commit", True
    after = "paused"
    # Once all is copied nobody asks the VMM for anything: the pause is done without it.
    bereaved: ClassVar = {
        "prepare": "failed", "freeze": "failed", "freeze/copy.1": "paused",
        "freeze/remove-fd.1": "paused", "keep": "paused", "commit": "paused", "release": "paused",
    }  # fmt: skip

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        assert subject is not None
        return subject.pause("disk")


class _Resume(Scenario):
    verb, commit = Resume, "publish"
    before = "paused"
    bereaved: ClassVar = {
        "load": "paused", "thaw": "paused", "greet": "paused", "publish": "paused", END: "failed",
    }  # fmt: skip

    def subject(self, ground: Ground) -> Sandbox:
        guest = ground.guest()
        guest.pause("process")
        return guest

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        assert subject is not None
        return subject.resume()


class Makes(Scenario):
    """A verb that makes a sandbox, or leaves none."""

    before = "gone"
    commit = "publish"

    def subject(self, ground: Ground) -> None:
        return None


class _Fork(Makes):
    verb = Fork
    bereaved: ClassVar = {
        "load": "gone", "thaw": "gone", "greet": "gone", "publish": "gone", END: "failed",
    }  # fmt: skip

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        return ground.fork()


class _Run(Makes):
    verb = Boot
    bereaved: ClassVar = {
        "thaw": "gone", "greet": "gone", "publish": "gone", END: "failed",
    }  # fmt: skip

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        request = RunRequest(memory_bytes=MEMORY_BYTES, disk_bytes=DISK_BYTES, boot=True)
        return ground.daemon.client.run(request)


class _Remove(Scenario):
    verb, commit = Remove, "mark"
    after = "gone"
    bereaved: ClassVar = {"mark": "gone", "kill": "gone"}

    def subject(self, ground: Ground) -> Sandbox:
        return ground.fork()

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        assert subject is not None
        subject.remove()
        return None


class _Freeze(Scenario):
    verb, commit = Freeze, "publish"
    after = "frozen"
    bereaved: ClassVar = dict.fromkeys((*Freeze.steps, END), "failed")

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        assert subject is not None
        return ground.daemon.client.freeze(subject.id)


class _Thaw(Scenario):
    verb, commit = Thaw, "publish"
    before = "frozen"
    bereaved: ClassVar = dict.fromkeys((*Thaw.steps, END), "failed")

    def subject(self, ground: Ground) -> Sandbox:
        guest = ground.guest()
        ground.daemon.client.freeze(guest.id)
        return guest

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        assert subject is not None
        return ground.daemon.client.thaw(subject.id)


class _Gc(Makes):
    verb, commit = Gc, "rows"
    after = "gone"

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        return ground.daemon.client.gc(GcRequest())

    def check(self, ground: Ground, subject: Sandbox | None, committed: bool) -> None:
        with ground.guest().forked(ground.base) as fork:
            coupled.check(fork)


class _Repair(Makes):
    verb, commit = Repair, "rows"
    after = "gone"

    def subject(self, ground: Ground) -> None:
        """A build of the base is damaged, whose pages are in the base's flat files."""
        ground.daemon.make_flat_files(ground.base)
        rows = {row.id: row for row in ground.daemon.client.snapshots()}
        base = ground.daemon.client.inspect_snapshot(ground.base)
        above = rows[base.parent].devices if base.parent in rows else []
        older = {build for device in above for build in device.builds}
        memory = next(device for device in base.devices if device.name == "memory")
        build = next(one for one in memory.builds if one not in older)
        with (ground.daemon.home.builds / build).open("r+b") as file:
            file.seek(100)
            file.write(b"not what it was")

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        return ground.daemon.client.check(CheckRequest(repair=True))

    def check(self, ground: Ground, subject: Sandbox | None, committed: bool) -> None:
        mended = ground.daemon.client.check(CheckRequest(repair=True)).damage
        assert [damage.repaired is not None for damage in mended] in ([], [True])
        assert ground.daemon.client.check(CheckRequest()).damage == []
        with ground.guest().forked(ground.base) as fork:
            coupled.check(fork)


class _RemoveSnapshot(Makes):
    verb, commit = RemoveSnapshot, "mark"
    after = "gone"

    def subject(self, ground: Ground) -> None:
        self.snapshot = ground.guest().save().snapshot

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        return ground.daemon.client.remove_snapshot(self.snapshot)

    def check(self, ground: Ground, subject: Sandbox | None, committed: bool) -> None:
        assert (self.snapshot in ground.snapshot_ids()) is not committed


class _RemoveImage(Makes):
    verb, commit = RemoveImage, "move"
    after = "gone"

    def subject(self, ground: Ground) -> None:
        """The same image once more, under another name."""
        images = ground.daemon.home.images
        if not (images / "spare").exists():
            shutil.copytree(images / "tiny", images / "spare")

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        return ground.daemon.client.remove_image("spare")

    def check(self, ground: Ground, subject: Sandbox | None, committed: bool) -> None:
        names = {path.name for path in ground.daemon.home.images.iterdir()}
        assert names == ({"tiny"} if committed else {"tiny", "spare"})
        assert ground.daemon.client.inspect_image("tiny").files


class _Restore(Scenario):
    verb, commit = Restore, "point"
    before, after = "frozen", "paused"
    # Its present state is given up: nobody asks its VMM for anything.
    bereaved: ClassVar = dict.fromkeys(("ready", "save", "point", "end"), "paused")

    def subject(self, ground: Ground) -> Sandbox:
        guest = ground.guest()
        self.snapshot = guest.save("disk").snapshot
        guest.freeze()
        return guest

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        assert subject is not None
        return subject.restore(self.snapshot, discard=True)


class _Cold(Scenario):
    verb, commit = Cold, "publish"
    before = "stopped"
    bereaved: ClassVar = {
        "thaw": "stopped", "greet": "stopped", "publish": "stopped", END: "failed",
    }  # fmt: skip

    made: Sandbox | None = None

    def subject(self, ground: Ground) -> Sandbox:
        last, guest = self.made, ground.fork()
        if last is not None and ground.state(last) != "gone":
            last.remove()
        type(self).made = guest
        guest.in_background("sync; usleep 200000; poweroff -f")
        ground.reaches(guest, "stopped")
        return guest

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        assert subject is not None
        return subject.resume(cold=True)

    def check(self, ground: Ground, subject: Sandbox | None, committed: bool) -> None:
        assert subject is not None
        if not committed:
            subject.resume(cold=True)
        coupled.start(subject)


class _FirstRun(Makes):
    verb = FirstRun
    number = 0
    bereaved: ClassVar = {
        "thaw": "gone", "wake": "gone", "keep": "gone", "greet": "gone", "publish": "gone",
        END: "failed",
    }  # fmt: skip

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        type(self).number += 1  # another shape each time: the last one's may be ready
        memory_bytes = MEMORY_BYTES + self.number * MIB
        return ground.daemon.run_as_asked(memory_bytes=memory_bytes)


class _WarmRun(Makes):
    verb = WarmRun
    # It is booted instead.
    bereaved: ClassVar = {
        "load": "running", "thaw": "running", "greet": "running", "publish": "running",
        END: "failed",
    }  # fmt: skip

    def subject(self, ground: Ground) -> None:
        sandbox, _ = ground.daemon.run_as_asked()
        sandbox.remove()

    def call(self, ground: Ground, subject: Sandbox | None) -> object:
        return ground.daemon.run_as_asked()


def verbs() -> list[type[Verb]]:
    """Every verb that the code has: those of Verb's subclasses that have a name of their own."""
    for module in pkgutil.walk_packages(diapause.sandbox.__path__, "diapause.sandbox."):
        importlib.import_module(module.name)
    found = [Verb]
    for verb in found:
        found.extend(verb.__subclasses__())
    named = {verb for verb in found if "name" in vars(verb) and verb.__module__ != __name__}
    return sorted(
        (verb for verb in named if verb.__module__.startswith("diapause.")), key=lambda v: v.name
    )


def scenarios() -> dict[type[Verb], Scenario]:
    """The scenario of each verb."""
    found: list[type[Scenario]] = [Scenario]
    for scenario in found:
        found.extend(scenario.__subclasses__())
    return {cls.verb: cls() for cls in found if hasattr(cls, "verb")}
