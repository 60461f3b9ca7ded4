"""A frozen section that fails in the middle says what can't be undone, whatever made it fail."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from diapause.driver.base import FreezePlan
from diapause.driver.process import Pidfd, process_ref
from diapause.driver.qemu.frozen import FrozenSectionFailed, freeze_and_capture
from diapause.driver.qemu.machine import QemuMachine
from diapause.errors import VmmFailed, VmmTimeout


class Vmm:
    """A machine that does everything at once, but for what it is told to fail at."""

    sandbox, tracked = "a" * 16, True

    def __init__(self, failures: dict[str, BaseException]) -> None:
        self._failures = failures
        self.done: list[str] = []
        self.ram = SimpleNamespace(rearm=lambda: self._do("rearm"))

    def _do(self, what: str) -> None:
        self.done.append(what)
        if (failure := self._failures.get(what)) is not None:
            raise failure

    def command(self, name: str, **_: object) -> None:
        self._do(name)

    def checked(self, name: str, **_: object) -> str:
        self._do(name)
        return "disk0-0000001"

    def stop(self) -> None:
        self._do("stop")

    def thaw(self) -> None:
        self._do("cont")

    def fill(self, *_: object) -> SimpleNamespace:
        self._do("fill")
        return SimpleNamespace(page_count=1, spilled_pages=0, scan_ms=0, copy_ms=0, spill_ms=0)


def failed(directory: Path, vmm: Vmm) -> FrozenSectionFailed:
    state, overlay = directory / "state", directory / "disk0.0000002.qcow2"
    state.touch()
    overlay.touch()
    plan = FreezePlan(
        state=state, buffer=cast("Any", vmm), rule="tracked", unmerged=[],
        spill=directory / "spill", overlays=(), next_overlays=(overlay,), goes_on=True,
    )  # fmt: skip
    with pytest.raises(FrozenSectionFailed) as caught:
        freeze_and_capture(cast("Any", vmm), plan)
    return caught.value


TIMEOUT = VmmTimeout(sandbox="a" * 16, step="blockdev-snapshot", bound_s=20)


@pytest.mark.parametrize(
    ("step", "failure", "switched", "rearmed"),
    [
        ("stop", TIMEOUT, False, False),
        ("blockdev-snapshot", TIMEOUT, True, False),  # it may be answered yet
        ("fill", ValueError("not expected"), True, False),
        ("fill", BaseException("a panic of native code"), True, False),
        ("rearm", OSError("not expected"), True, True),
    ],
)
def test_what_may_have_happened_is_known(
    tmp_path: Path, step: str, failure: BaseException, switched: bool, rearmed: bool
) -> None:
    """An overlay that the disk may write to is never taken for an unused one."""
    vmm = Vmm({step: failure})
    error = failed(tmp_path, vmm)
    assert (error.frozen.switched, error.frozen.rearmed) == (switched, rearmed)
    assert error.thawed
    assert vmm.done[vmm.done.index(step) + 1] == "cont"
    assert vmm.done[-1] == "remove-fd"


@pytest.mark.parametrize("status", ["shutdown", "panicked", "other"])
def test_a_guest_that_has_ended_is_not_captured(
    monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    """It is `stopped`, not `paused`: its watcher waits for the verb to say so."""
    monkeypatch.setattr(QemuMachine, "checked", lambda *_, **__: None)
    monkeypatch.setattr(QemuMachine, "status", lambda _: status)
    machine = QemuMachine.__new__(QemuMachine)
    machine.sandbox = "a" * 16
    with pytest.raises(VmmFailed, match=status):
        machine.stop()


def test_asking_whether_it_lives_leaves_its_end_to_whoever_watches() -> None:
    """The event loop watches the same descriptor: closed under it, it would never hear."""
    child = subprocess.Popen(["sleep", "60"])
    process = process_ref(child.pid)
    assert process is not None
    pidfd = Pidfd(process)
    number = pidfd.fileno()
    assert pidfd.alive()
    child.kill()
    child.wait(10)
    assert not pidfd.alive()
    assert pidfd.fileno() == number
    assert pidfd.wait(10)
    assert pidfd.fileno() == -1
