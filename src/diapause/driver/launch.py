"""Starting a VMM through the launcher, and the process that comes of it.

The launcher (`rust/launch`) takes a plan on one descriptor and reports on another: the VMM's pid,
what it has come to, what failed. Its end behind `exec` means that the VMM's program runs. Whatever
fails, no process of the attempt stays: the launcher carries the VMM's name from its first moment.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diapause.driver.passing import error_in
from diapause.driver.process import Pidfd, find_by_argument
from diapause.errors import ConfinementFailed
from diapause.limits import (
    LAUNCH_REPORT_BYTES_MAX,
    LAUNCH_S,
    VMM_DESCRIPTORS_MAX,
    VMM_EXIT_S,
    VMM_THREADS_MAX,
)

LAUNCHER = Path(__file__).parent.parent / "native" / "diapause-launch"
_NEEDED = (
    "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives",
    "/dev/null", "/dev/zero", "/dev/urandom",
)  # fmt: skip


@dataclass(frozen=True)
class Level:
    """How far a VMM is confined; see `driver.grants` for which of them a host allows."""

    user: Literal["own", "namespace", "same"]
    namespaces: bool


@dataclass(frozen=True)
class LaunchPlan:
    """What to start, and what it gets; everything else it does not get."""

    name: str  # the argument by which the process is found, from the launcher on
    program: str
    arguments: list[str]  # the zeroth first
    environment: dict[str, str]
    descriptors: list[int]
    level: Level
    network: bool = False
    hidden: tuple[Path, ...] = ()
    cgroup: int | None = None  # an open directory
    file_bytes: int | None = None


class Child:
    """A process that is ours to wait for; it goes on when we end."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._guard = threading.Lock()
        self._reaped = False

    def poll(self) -> bool:
        """Whether it has ended; its zombie goes."""
        with self._guard:
            if not self._reaped:
                try:
                    self._reaped = os.waitpid(self.pid, os.WNOHANG)[0] == self.pid
                except ChildProcessError:
                    self._reaped = True
            return self._reaped

    def end(self, bound_s: float) -> None:
        """Kill it. Until somebody has waited for it, its pid can be nobody else's."""
        with self._guard:
            if not self._reaped:
                os.kill(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + bound_s
        while not self.poll() and time.monotonic() < deadline:
            time.sleep(0.002)


def launch(
    sandbox: str, plan: LaunchPlan, uid: int | None, log: int, stdin: int = subprocess.DEVNULL
) -> Child:
    """Start it, and answer when its program runs; raises ConfinementFailed with the stage."""
    if not LAUNCHER.exists():
        raise ConfinementFailed(
            sandbox=sandbox, stage="start", cause="diapause-launch is not there; build it again"
        )
    handed = _plan_file(plan, uid)
    try:
        reports, report = os.pipe2(os.O_CLOEXEC)
    except OSError:
        os.close(handed)
        raise
    extra = [handed, report] + ([plan.cgroup] if plan.cgroup is not None else [])
    try:
        launcher = subprocess.Popen(
            [str(LAUNCHER), plan.name, str(handed), str(report)],
            stdin=stdin, stdout=log, stderr=log, pass_fds=[*plan.descriptors, *extra],
            env=plan.environment, start_new_session=True, cwd="/",
        )  # fmt: skip
    except OSError as error:
        os.close(report)
        os.close(reports)
        os.close(handed)
        raise ConfinementFailed(sandbox=sandbox, stage="start", cause=str(error)) from error
    try:
        os.close(report)
        report = -1
        return _started(sandbox, plan, launcher, reports)
    finally:
        for fd in (handed, reports, report):
            if fd >= 0:
                os.close(fd)


def _started(
    sandbox: str, plan: LaunchPlan, launcher: subprocess.Popen[bytes], reports: int
) -> Child:
    pid: int | None = None
    try:
        pid, failure = _read_report(sandbox, reports)
        if failure is not None:
            raise failure
    except BaseException:
        _end_attempt(plan.name, launcher, pid)
        raise
    assert pid is not None
    if pid == launcher.pid:
        launcher.returncode = 0  # it has become the VMM, which is not `subprocess`'s to wait for
    else:
        launcher.wait(VMM_EXIT_S)
    return Child(pid)


def _end_attempt(name: str, launcher: subprocess.Popen[bytes], pid: int | None) -> None:
    """Kill whatever carries the name, and wait until it is gone."""
    for process in find_by_argument(name):
        pidfd = Pidfd(process)
        pidfd.kill()
        pidfd.wait(VMM_EXIT_S)
        if process.pid != launcher.pid:
            Child(process.pid).poll()
    launcher.wait(VMM_EXIT_S)
    if pid is not None and pid != launcher.pid:
        Child(pid).poll()


def _plan_file(plan: LaunchPlan, uid: int | None) -> int:
    level = plan.level
    user = {"own": uid} if level.user == "own" else level.user
    text = {
        "program": plan.program, "arguments": plan.arguments,
        "environment": [f"{name}={value}" for name, value in plan.environment.items()],
        "descriptors": plan.descriptors, "user": user, "namespaces": level.namespaces,
        "network": plan.network, "visible": _visible(plan), "hidden": _covered(plan),
        "cgroup": plan.cgroup,
        "limits": {
            "file_bytes": plan.file_bytes, "descriptors": VMM_DESCRIPTORS_MAX,
            # The number of a user's own processes counts everything else of that user too.
            "threads": VMM_THREADS_MAX if level.user == "own" else None,
        },
    }  # fmt: skip
    fd = os.memfd_create("diapause-plan")
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(json.dumps(text).encode())
    except OSError:
        os.close(fd)
        raise
    return fd


def _visible(plan: LaunchPlan) -> list[str]:
    """What of the host's root it sees: its program, libraries, and three devices."""
    wanted = [*_NEEDED, *(["/etc/resolv.conf"] if plan.network else [])]
    found = [path for path in wanted if Path(path).exists()]
    program = Path(plan.program)
    if not program.is_relative_to("/usr") and not program.is_relative_to("/proc"):
        found.append(str(program.parent if len(program.parts) < 4 else program.parent.parent))
    return found


def _covered(plan: LaunchPlan) -> list[str]:
    """Directories of ours that lie below something it sees."""
    visible = [Path(path) for path in _visible(plan)]
    return [
        str(path)
        for path in (hidden.resolve() for hidden in plan.hidden)
        if any(path.is_relative_to(seen) for seen in visible)
    ]


def _read_report(sandbox: str, reports: int) -> tuple[int | None, ConfinementFailed | None]:
    """The pid, and what failed: each may come first, and one without the other."""
    pid, stage, cause = None, "start", "the launcher ended without a word"
    lines = _read_all(sandbox, reports).splitlines()
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "pid" and rest.isdigit():
            pid = int(rest)
        elif word == "failed":
            stage, _, cause = rest.partition(": ")
    if pid is not None and "exec" in lines and not any(s.startswith("failed") for s in lines):
        return pid, None
    failed = ConfinementFailed(sandbox=sandbox, stage=stage, cause=cause)
    failed.__cause__ = error_in(cause)
    return pid, failed


def _read_all(sandbox: str, reports: int) -> str:
    deadline, data = time.monotonic() + LAUNCH_S, b""
    poll = select.poll()
    poll.register(reports, select.POLLIN)
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        try:
            more = os.read(reports, 4096)
        except OSError as error:
            cause = f"its report can't be read: {error.strerror}"
            raise ConfinementFailed(sandbox=sandbox, stage="start", cause=cause) from error
        if not more:
            return data.decode(errors="replace")
        data += more
        if len(data) > LAUNCH_REPORT_BYTES_MAX:
            raise ConfinementFailed(sandbox=sandbox, stage="start", cause="a report without an end")
    cause = f"no report within {LAUNCH_S:.0f} s"
    late = TimeoutError(errno.ETIMEDOUT, cause)
    raise ConfinementFailed(sandbox=sandbox, stage="start", cause=cause) from late
