"""The frozen section: from `stop` to the last captured page, one instant of a guest.

Order, and why it is this one:

1. Before: the buffer is allocated and touched, descriptors are handed over, and last the overlays
   are synced from outside (or `stop` would flush them while the guest stands).
2. `stop`, confirmed. It drains block I/O, so nothing writes guest RAM or a disk from here on.
3. The disk overlays switch; no disk byte is copied.
4. The device state. Never without `live=false`: the default inactivates the disks of a stopped VM.
5. Dirty pages are listed and copied, and the buffer is sealed. Only now may the written marks go:
6. Tracking is re-armed (a guest that goes on only).
7. `cont`, or nothing for a pause.

`frozen_ms` runs from before `stop` until all is captured. Whatever fails on the way, the guest goes
on; what was switched or re-armed by then is in the error's `frozen`, since it can't be undone. A
guest that somebody froze before (`plan.stands`) is never thawed here.
"""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from diapause.driver.base import FreezePlan, Frozen
from diapause.driver.qemu.command import node_name
from diapause.driver.qemu.qmp import QmpError
from diapause.errors import CaptureFailed, DiapauseError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diapause.driver.qemu.machine import QemuMachine

_STATE_SET = 900  # descriptor sets 1 and 10.. belong to the command line
_OVERLAY_SET = 1000


class FrozenSectionFailed(Exception):
    """A frozen section that did not capture; the guest goes on unless `thawed` is false."""

    def __init__(self, frozen: Frozen, error: CaptureFailed, thawed: bool) -> None:
        super().__init__(str(error))
        self.frozen, self.error, self.thawed = frozen, error, thawed


class _Section:
    """Measures the phases and knows the present step."""

    def __init__(self) -> None:
        self.frozen = Frozen()
        self.step = "prepare"

    def take(self, step: str, act: Callable[[], Any]) -> Any:
        self.step = step
        began = time.perf_counter()
        try:
            return act()
        finally:
            self.frozen.phases_ms[step] = (time.perf_counter() - began) * 1e3


def freeze_and_capture(machine: QemuMachine, plan: FreezePlan) -> Frozen:
    """Run the section; raises FrozenSectionFailed, after which the guest goes on."""
    section = _Section()
    try:
        nodes = _hand_over(machine, plan)
    except (DiapauseError, QmpError, OSError) as error:
        _give_back(machine, plan)
        _take_back(machine)
        raise FrozenSectionFailed(
            section.frozen, _failure(machine, plan, section, error), True
        ) from error
    _sync(plan)
    began = time.perf_counter()
    try:
        _capture(machine, plan, nodes, section)
        section.frozen.frozen_ms = (time.perf_counter() - began) * 1e3
        if plan.goes_on and not plan.stands:
            section.take("thaw", machine.thaw)
    except BaseException as error:  # whatever it is: what was switched or re-armed must be known
        if thawed := plan.stands or _thaw_after_failure(machine):
            _give_back(machine, plan)
        raise FrozenSectionFailed(
            section.frozen, _failure(machine, plan, section, error), thawed
        ) from error
    finally:
        _take_back(machine)
    return section.frozen


def _sync(plan: FreezePlan) -> None:
    """Bring the overlays to the disk, or `stop` would while the guest stands.

    The last thing before `stop`, and twice: the second takes what the guest wrote during the first,
    and is short. A disk that can't be synced fails the `stop`, which says why.
    """
    for path in plan.overlays:
        with contextlib.suppress(OSError), path.open("rb") as overlay:
            os.fdatasync(overlay.fileno())
            os.fdatasync(overlay.fileno())


def _capture(
    machine: QemuMachine, plan: FreezePlan, nodes: list[tuple[str, str]], section: _Section
) -> None:
    frozen = section.frozen
    section.take("stop", machine.stop)
    # Both said before: an answer that never came may stand for one, and half done is done.
    for node, overlay in nodes:
        frozen.switched = True  # an overlay that was not switched to is an empty layer
        section.take("switch", partial(_switch, machine, node, overlay))
    section.take("state", lambda: _save_state(machine))
    filled = section.take(
        "copy",
        lambda: plan.buffer.fill(machine.ram, plan.rule, plan.unmerged, str(plan.spill)),
    )
    frozen.page_count, frozen.spilled_pages = filled.page_count, filled.spilled_pages
    frozen.phases_ms |= {"scan": filled.scan_ms, "copy": filled.copy_ms, "spill": filled.spill_ms}
    if plan.goes_on and machine.tracked:
        frozen.rearmed = True
        section.take("rearm", machine.ram.rearm)


def _switch(machine: QemuMachine, node: str, overlay: str) -> None:
    machine.command("blockdev-snapshot", node=node, overlay=overlay)


def _save_state(machine: QemuMachine) -> None:
    machine.command("xen-save-devices-state", filename=f"/dev/fdset/{_STATE_SET}", live=False)


def _hand_over(machine: QemuMachine, plan: FreezePlan) -> list[tuple[str, str]]:
    """Give QEMU the state file and the next overlays; returns (top node, its overlay) per disk."""
    state = os.open(plan.state, os.O_WRONLY | os.O_CLOEXEC)
    try:
        machine.command("add-fd", fd=state, fdset_id=_STATE_SET)
    finally:
        os.close(state)
    nodes = []
    for index, overlay in enumerate(plan.next_overlays):
        nodes.append((top_node(machine, index), _add_overlay(machine, index, overlay)))
    return nodes


def top_node(machine: QemuMachine, index: int) -> str:
    """The node that a disk writes to now, as QEMU says.

    Asked of the device: a list of the block devices describes each one's whole chain of overlays,
    which takes a second when there are a hundred.
    """
    disk = f"/machine/peripheral/disk{index}"
    return str(machine.checked("qom-get", path=disk, property="drive"))


def _add_overlay(machine: QemuMachine, index: int, overlay: Path) -> str:
    name = node_name(index, overlay)
    set_id = _overlay_set(name)
    fd = os.open(overlay, os.O_RDWR | os.O_CLOEXEC)
    try:
        machine.command("add-fd", fd=fd, fdset_id=set_id)
    finally:
        os.close(fd)
    machine.command(
        "blockdev-add", driver="file", node_name=f"{name}-file", filename=f"/dev/fdset/{set_id}"
    )
    machine.command(
        "blockdev-add", driver="qcow2", node_name=name, file=f"{name}-file", backing=None,
        discard="unmap",
    )  # fmt: skip
    return name


def _overlay_set(name: str) -> int:
    return _OVERLAY_SET + int(name.rsplit("-", 1)[-1], 16)


def _give_back(machine: QemuMachine, plan: FreezePlan) -> None:
    """Drop the overlays that no disk went over to; QEMU refuses it for one that is in use."""
    for index, overlay in enumerate(plan.next_overlays):
        name = node_name(index, overlay)
        with contextlib.suppress(QmpError, DiapauseError):
            machine.command("blockdev-del", node_name=name)
            machine.command("blockdev-del", node_name=f"{name}-file")
            machine.command("remove-fd", fdset_id=_overlay_set(name))


def _take_back(machine: QemuMachine) -> None:
    try:
        machine.command("remove-fd", fdset_id=_STATE_SET)
    except (QmpError, DiapauseError):
        return  # it was never added, or the VMM is gone: nothing holds the descriptor then


def _thaw_after_failure(machine: QemuMachine) -> bool:
    try:
        machine.thaw()
    except DiapauseError:
        return False
    return True


def _failure(
    machine: QemuMachine, plan: FreezePlan, section: _Section, error: BaseException
) -> CaptureFailed:
    guest = "stays frozen" if plan.stands else "goes on"
    return CaptureFailed(sandbox=machine.sandbox, step=section.step, cause=str(error), guest=guest)
