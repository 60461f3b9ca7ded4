"""Confinement for people: in `inspect`, and in doctor with what each missing part costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from diapause.driver.base import ProcessRef
from diapause.driver.confined import Confined, read_confined
from diapause.driver.grants import LEVELS, Grants, cgroups, grants
from diapause.driver.process import is_alive
from diapause.driver.uids import UID_COUNT, UID_FIRST
from diapause.model import Check, Confinement
from diapause.units import format_size

if TYPE_CHECKING:
    from diapause.catalog import SandboxRecord
    from diapause.driver.cgroup import Delegation

_NAMESPACES = {"mount", "pid", "ipc", "uts", "net"}
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


def confinement_of(record: SandboxRecord) -> Confinement | None:
    """What confines a sandbox's VMM now; None where none runs."""
    if record.process is None:
        return None
    process = ProcessRef(record.process.pid, record.process.start_ticks, record.process.boot_id)
    if not is_alive(process):
        return None
    found = read_confined(process.pid)
    return Confinement(**dataclasses.asdict(found)) if found else None


def confinement_checks(pid: int, key: str) -> list[Check]:
    """Doctor's lines about a VMM that runs, of the home with this key."""
    found = read_confined(pid)
    if found is None:
        return [_check("confinement", False, "the VMM can't be asked", "")]
    given = grants()
    return [
        _user(found, given), _namespaces(found, given), _rights(found),
        _cgroup(found, cgroups(key)),
        _yama(given, _YAMA),
    ]  # fmt: skip


def _check(name: str, ok: bool, detail: str, fix: str) -> Check:
    return Check(name=name, ok=ok, detail=detail, fix="" if ok else fix, required=False)


def _why(given: Grants) -> str:
    """Why it is not a better level, in the words of what refused it."""
    return "; ".join(given.refused.values())


def _user(found: Confined, given: Grants) -> Check:
    own = UID_FIRST <= found.uid < UID_FIRST + UID_COUNT
    if own:
        detail = f"each VMM has a user of its own, this one {found.uid}"
    elif "user" in found.namespaces:
        detail = f"uid {found.uid}, in a user namespace of its own"
    else:
        detail = f"VMMs run as uid {found.uid}: one that is broken into has this user's rights"
    fix = f"Run the daemon as root, or allow user namespaces ({_why(given)})."
    return _check("vmm user", own or "user" in found.namespaces, detail, fix)


def _namespaces(found: Confined, given: Grants) -> Check:
    missing = sorted(_NAMESPACES - set(found.namespaces))
    detail = (
        f"not its own: {', '.join(missing)}; it sees the host's" if missing
        else f"its own: {', '.join(found.namespaces)}"
    )  # fmt: skip
    return _check(
        "vmm namespaces", not missing, detail, f"Allow user namespaces ({_why(given)})."
    )  # fmt: skip


def _rights(found: Confined) -> Check:
    ok = found.capabilities == "none" and found.no_new_privs and found.seccomp == "filter"
    detail = (
        f"capabilities {found.capabilities}, no_new_privs {'on' if found.no_new_privs else 'off'}, "
        f"seccomp {found.seccomp}"
    )
    return _check("vmm rights", ok, detail, "Use a QEMU that was built with seccomp.")


def _cgroup(found: Confined, given: Delegation) -> Check:
    """What of it is missing, which keeps nothing from working, and why."""
    if found.cgroup == "none":
        detail = f"none: {given.cause}; its memory is bounded by the host's alone"
    else:
        memory, tasks = found.memory_bytes_max, found.tasks_max
        held = [
            f"at most {format_size(memory)} of memory" if memory else "no limit of memory",
            f"at most {tasks} processes" if tasks else "no limit of processes",
        ]
        if memory is None and "memory" in given.controllers:
            held[0] += " as the home lies on tmpfs"
        detail = "; ".join([f"one of its own, {', '.join(held)}", *filter(None, [given.cause])])
    ok = None not in (found.memory_bytes_max, found.tasks_max)
    fix = (
        "Run `diapause serve` by its systemd unit (Delegate=memory pids), with its home on a disk."
    )
    return _check("vmm cgroup", ok, detail, fix)


def _yama(given: Grants, file: Path) -> Check:
    """A daemon is no ancestor of what the last one started; without other rights Yama minds."""
    scope = file.read_text().strip() if file.exists() else "absent"
    bound = scope not in ("0", "absent") and given.level == LEVELS[-1]
    detail = f"ptrace_scope {scope}"
    if bound:
        detail += ": after a restart of the daemon, guests that run can't be captured"
    return _check("yama", not bound, detail, "sysctl kernel.yama.ptrace_scope=0, or run as root.")
