"""doctor: what this host can do, proved by trying on a real guest.

One small guest is booted, saved, saved again (were its writes tracked?), paused and resumed, in a
scratch home under tmp/: nothing of it stays. What can't be tried says why and what would help.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from typing import TYPE_CHECKING, Literal

from diapause import operation
from diapause.errors import DiapauseError
from diapause.guest.images import find_image
from diapause.model import CaptureRequest, Check, DoctorAnswer, ResumeRequest, RunRequest
from diapause.pager import process
from diapause.sandbox.admit import available_memory
from diapause.sandbox.confinement import confinement_checks
from diapause.sandbox.scratch import scratch_engine
from diapause.units import GIB, MIB, format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from diapause.sandbox.engine import Engine

_IMAGE = "tiny"
_MEMORY_BYTES, _DISK_BYTES = 128 * MIB, 64 * MIB
_FREE_BYTES_MIN = 2 * GIB


def examine(engine: Engine) -> DoctorAnswer:
    """Run every check."""
    proved = _guest(engine)  # first: it also proves the accelerator
    checks = [
        _kernel(), _kvm(engine), _qemu(engine), _tools(), _buffers(engine), _space(engine),
        _memory(), _tracker(engine), _fuse(), *proved,
    ]  # fmt: skip
    pager_pid = engine.host.ondemand.pid()
    return DoctorAnswer(checks=checks, daemon_pid=os.getpid(), pager_pid=pager_pid)


def _kernel() -> Check:
    release = platform.release()
    match = re.match(r"(\d+)\.(\d+)", release)
    new = match is not None and (int(match[1]), int(match[2])) >= (6, 7)
    return Check(
        name="kernel", ok=new, detail=f"Linux {release}", required=False,
        fix="" if new else "Linux 6.7 tracks writes exactly; older kernels compare pages instead.",
    )  # fmt: skip


def _kvm(engine: Engine) -> Check:
    host = engine.host
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Check(
            name="kvm", ok=False, detail="/dev/kvm can't be opened: guests run under TCG",
            fix="Add the user to the kvm group, or use a machine with KVM.", required=False,
        )  # fmt: skip
    try:
        known = host.catalog.fact(host.accelerator_key())
    except DiapauseError as error:
        return _failed("kvm", error, required=False)
    detail = {
        "kvm": "a guest booted under KVM",
        "tcg": "/dev/kvm opens and does not run a guest: guests run under TCG",
    }.get(known or "", "not proved yet: the next `run` tries it")
    return Check(name="kvm", ok=known == "kvm", detail=detail, required=False)


def _fuse() -> Check:
    """A mount of the pager's kind, made and let go of."""
    cause = process.probe()
    return Check(
        name="fuse", ok=cause is None, required=False,
        detail=cause or "memory can be served on demand",
        fix="" if cause is None else "It takes /dev/fuse (`modprobe fuse`) and the right to mount; "
        "without it `resume` copies memory first.",
    )  # fmt: skip


def _qemu(engine: Engine) -> Check:
    driver = engine.host.driver
    try:
        detail = f"QEMU {driver.version()}, machine {driver.machines()[0]}"
    except DiapauseError as error:
        return _failed("qemu", error)
    return Check(name="qemu", ok=True, detail=detail)


def _tools() -> Check:
    missing = [tool for tool in ("qemu-img", "mke2fs") if shutil.which(tool) is None]
    return Check(
        name="tools", ok=not missing, detail=f"missing: {missing}" if missing else "all there",
        fix="apt-get install qemu-utils e2fsprogs" if missing else "",
    )  # fmt: skip


def _buffers(engine: Engine) -> Check:
    place = engine.host.home.buffers
    free = shutil.disk_usage(place).free
    return Check(
        name="buffers", ok=free >= 64 * MIB, detail=f"{format_size(free)} free in {place}",
        fix="" if free >= 64 * MIB else "Make /dev/shm larger: captures spill to the disk frozen.",
        required=False,
    )  # fmt: skip


def _space(engine: Engine) -> Check:
    free = engine.host.home.free_bytes()
    enough = free >= _FREE_BYTES_MIN
    detail = f"{format_size(free)} free in {engine.host.home.root}"
    return Check(name="space", ok=enough, detail=detail, fix="" if enough else "Free some space.")


def _memory() -> Check:
    free = available_memory()
    return Check(name="memory", ok=free >= 512 * MIB, detail=f"{format_size(free)} available")


def _tracker(engine: Engine) -> Check:
    there = engine.host.tracked
    return Check(
        name="tracker library", ok=there, required=False,
        detail="installed" if there else "not installed, or switched off",
        fix="" if there else "`make setup` builds it.",
    )  # fmt: skip


def _failed(name: str, error: DiapauseError, *, required: bool = True) -> Check:
    return Check(name=name, ok=False, detail=error.message, fix=error.advice, required=required)


def _guest(engine: Engine) -> list[Check]:
    """Boot, capture, track, resume, in a home of its own, of which nothing stays."""
    try:
        image = find_image(engine.host.home, _IMAGE)
    except DiapauseError as error:
        return [_failed("boot", error)]
    with scratch_engine(engine, image) as trial:
        checks = _attempts(trial)
        operation.checkpoint()  # that one was cancelled says nothing about the host
        return checks


def _attempts(trial: Engine) -> list[Check]:
    """Stops at the first that fails."""
    request = RunRequest(
        image=_IMAGE, memory_bytes=_MEMORY_BYTES, disk_bytes=_DISK_BYTES, boot=True
    )
    try:
        ran = trial.run(request)
    except DiapauseError as error:
        return [_failed("boot", error)]
    checks = [Check(name="boot", ok=True, detail=f"agent after {ran.ready_ms:.0f} ms")]
    machine = trial.host.guests[ran.sandbox].machine
    assert machine is not None
    checks += confinement_checks(machine.process.pid, trial.host.home.key)
    for name, attempt in _ATTEMPTS.items():
        try:
            checks.append(attempt(trial, ran.sandbox))
        except DiapauseError as error:
            checks.append(_failed(name, error))
            break
    return checks


def _try_capture(engine: Engine, sandbox: str) -> Check:
    saved = engine.save(sandbox, CaptureRequest(durability="process"))
    return Check(name="capture", ok=True, detail=f"frozen for {saved.frozen_ms:.1f} ms")


def _try_tracking(engine: Engine, sandbox: str) -> Check:
    saved = engine.save(sandbox, CaptureRequest(durability="process"))
    tracked = saved.dirty_source == "tracked"
    return Check(
        name="tracking", ok=tracked, required=False,
        detail=f"{saved.dirty_pages} dirty pages, {saved.dirty_source}",
        fix="" if tracked else "Exact tracking needs Linux 6.7 and userfaultfd; see limitations.",
    )  # fmt: skip


def _try_resume(engine: Engine, sandbox: str) -> Check:
    engine.pause(sandbox, CaptureRequest(durability="process"))
    mode: Literal["ondemand", "copy"] = "ondemand" if engine.host.ondemand.usual() else "copy"
    resumed = engine.resume(sandbox, ResumeRequest(memory_mode=mode))
    return Check(
        name="resume", ok=resumed.warm and not resumed.notes,
        detail="; ".join([f"agent after {resumed.ready_ms:.0f} ms, {mode}", *resumed.notes]),
    )  # fmt: skip


_ATTEMPTS: dict[str, Callable[[Engine, str], Check]] = {
    "capture": _try_capture,
    "tracking": _try_tracking,
    "resume": _try_resume,
}
