"""How far this host lets a VMM be confined: proved once by each daemon, by confining something.

From the best down: a user of its own; a user namespace (an ordinary user's way); no namespaces but
the user of its own; only what needs no right at all. Capabilities are always gone,
`no_new_privs` is always set, and descriptors are always the only way to a file of ours.

Only what the kernel refused is an answer; what was used up in that moment, or took too long, is the
error of whoever asked, and asked again (`driver/passing.py`): no VMM is confined less for it.

A level is granted when the launcher can do it *and* the daemon can read the memory of what it
started: a VMM that can't be captured is of no use. What was refused keeps its cause, for doctor.
"""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diapause.driver.cgroup import Delegation, LeafLimits, Leaves, delegation
from diapause.driver.launch import LAUNCHER, LaunchPlan, Level, launch
from diapause.driver.passing import is_passing
from diapause.driver.process import process_ref
from diapause.driver.uids import own_uid
from diapause.errors import ConfinementFailed
from diapause.limits import VMM_EXIT_S, VMM_THREADS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator

LEVELS = (
    Level("own", namespaces=True),
    Level("namespace", namespaces=True),
    Level("own", namespaces=False),
    Level("same", namespaces=False),
)
_TRIAL = "00000000"


@dataclass(frozen=True)
class Grants:
    """The level that VMMs of this daemon get, and why not a better one."""

    level: Level
    refused: dict[Level, str] = field(default_factory=dict)


@functools.cache
def grants() -> Grants:
    """What this host grants this daemon; the last level needs nothing.

    Raises ConfinementFailed or OSError where that could not be found out now.
    """
    refused: dict[Level, str] = {}
    for level in LEVELS[:-1]:
        try:
            _try(level)
        except ConfinementFailed as error:
            if is_passing(error):
                raise
            refused[level] = f"{error.fields['stage']}: {error.fields['cause']}"
        else:
            return Grants(level, refused)
    return Grants(LEVELS[-1], refused)


@functools.cache
def cgroups(key: str) -> Delegation:
    """Where VMMs of a home get cgroups of their own: proved by starting something in one.

    Raises ConfinementFailed or OSError where that could not be found out now.
    """
    given = delegation()
    if given.place is None:
        return given
    try:
        leaf = Leaves(key).make(given, _TRIAL, LeafLimits(None, None, VMM_THREADS_MAX))
    except OSError as error:
        if is_passing(error):
            raise
        return Delegation(None, cause=f"no cgroup can be made in {given.place}: {error.strerror}")
    try:
        directory = os.open(leaf.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _try(grants().level, directory)
        finally:
            os.close(directory)
    except ConfinementFailed as error:
        if is_passing(error):
            raise
        cause = f"nothing can be started in {given.place}: {error.fields['cause']}"
        return Delegation(None, cause=cause)
    finally:
        leaf.remove()
    return given


@contextlib.contextmanager
def asked_for(sandbox: str) -> Iterator[None]:
    """What could not be found out is this sandbox's error."""
    try:
        yield
    except ConfinementFailed as error:
        raise ConfinementFailed(**{**error.fields, "sandbox": sandbox}) from error
    except OSError as error:
        raise ConfinementFailed(sandbox=sandbox, stage="start", cause=str(error)) from error


def _try(level: Level, cgroup: int | None = None) -> None:
    if level.user == "own" and os.geteuid() != 0:
        raise ConfinementFailed(sandbox=_TRIAL, stage="uid", cause="only root can change users")
    with contextlib.ExitStack() as stack:
        program = _held(stack, os.open(LAUNCHER, os.O_RDONLY | os.O_CLOEXEC))
        waits, _ = (_held(stack, fd) for fd in os.pipe2(os.O_CLOEXEC))
        null = _held(stack, os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC))
        plan = LaunchPlan(
            name=f"diapause-trial-{os.getpid()}", program=f"/proc/self/fd/{program}",
            arguments=["diapause-launch", "wait"], environment={}, descriptors=[program],
            level=level, cgroup=cgroup,
        )  # fmt: skip
        if level.user == "own":
            with own_uid(_TRIAL) as uid:
                child = launch(_TRIAL, plan, uid, null, waits)
        else:
            child = launch(_TRIAL, plan, None, null, waits)
        try:
            if process_ref(child.pid) is None:
                raise ConfinementFailed(sandbox=_TRIAL, stage="exec", cause="it ended at once")
            _read_memory(child.pid)
        finally:
            child.end(VMM_EXIT_S)


def _held(stack: contextlib.ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def _read_memory(pid: int) -> None:
    """What a capture needs: to attach to memory, and to its page map."""
    for name in ("mem", "pagemap"):
        try:
            os.close(os.open(Path(f"/proc/{pid}/{name}"), os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise ConfinementFailed(
                sandbox=_TRIAL, stage="capture", cause=f"its memory can't be read: {error.strerror}"
            ) from error
