"""The launcher: what it refuses, what it hands over, and that no attempt leaves a process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diapause.driver import launch as module
from diapause.driver.grants import LEVELS, grants
from diapause.driver.launch import LAUNCHER, Child, LaunchPlan, Level, launch
from diapause.driver.process import Pidfd, find_by_argument, process_ref
from diapause.driver.uids import own_uid
from diapause.errors import ConfinementFailed
from diapause.limits import LAUNCH_REPORT_BYTES_MAX
from tests.framework.fake_home import eventually

GOOD: dict[str, Any] = {
    "program": "/usr/bin/true", "arguments": ["true"], "environment": [], "descriptors": [],
    "user": "same", "namespaces": False, "network": False, "visible": ["/usr"], "hidden": [],
    "cgroup": None, "limits": {"file_bytes": None, "descriptors": None, "threads": None},
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "an unknown field": {"more": 1},
    "no arguments": {"arguments": []},
    "a NUL": {"arguments": ["a\0b"]},
    "a NUL in the environment": {"environment": ["A=\0"]},
    "a relative program": {"program": "true"},
    "a program that climbs": {"program": "/usr/../bin/true"},
    "the whole root": {"visible": ["/"]},
    "a path that climbs": {"visible": ["/usr/.."]},
    "a relative hidden path": {"hidden": ["usr"]},
    "root as a user": {"user": {"own": 0}},
    "somebody's user": {"user": {"own": 1_900_065_536}},
    "an unknown user": {"user": "root"},
    "a user namespace alone": {"user": "namespace"},
    "a closed descriptor": {"descriptors": [999]},
    "a negative descriptor": {"descriptors": [-1]},
    "a closed cgroup": {"cgroup": 999},
    "too many words": {"arguments": ["a"] * 4097},
    "a negative limit": {"limits": {**GOOD["limits"], "descriptors": -1}},
}
BAD: dict[str, bytes] = {
    "no json": b"{", "nothing": b"", "not utf-8": b"\xff", "a list": b"[]",
    "too long": b" " * (512 * 1024 + 1) + json.dumps(GOOD).encode(),
    **{name: json.dumps({**GOOD, **changed}).encode() for name, changed in CHANGES.items()},
}  # fmt: skip
# Where the kernel is called on the way, one at least of each stage.
CALLS = ("setsid", "prlimit64", "prctl", "capset", "close_range")
NAMESPACE_CALLS = (
    "clone3", "mount", "open_tree", "mount_setattr", "move_mount", "pivot_root", "umount2",
)  # fmt: skip


def level_of(which: str) -> Level:
    """The best that this host grants, or the one that needs nothing."""
    return grants().level if which == "best" else LEVELS[-1]


@pytest.fixture
def name() -> Iterator[str]:
    """What the attempt is found by; whatever happened, nothing is left of it."""
    made = f"guest=launch-test-{uuid.uuid4().hex}"
    yield made
    for process in find_by_argument(made):
        Pidfd(process).kill()


def plan_of(name: str, level: Level | None = None, **more: Any) -> LaunchPlan:
    """A plan for something that waits for its input to end, and carries the name."""
    fields: dict[str, Any] = {
        "program": "/usr/bin/sh", "arguments": ["sh", "-c", "read line; :", name],
        "environment": {}, "descriptors": [], "level": level or grants().level, **more,
    }  # fmt: skip
    return LaunchPlan(name=name, **fields)


@contextlib.contextmanager
def launched(plan: LaunchPlan) -> Iterator[Child]:
    """The plan, started; ended afterwards."""
    waits, go = os.pipe2(os.O_CLOEXEC)
    child = start(plan, waits)
    try:
        yield child
    finally:
        os.close(go)
        os.close(waits)
        eventually("its end", child.poll)


def start(plan: LaunchPlan, stdin: int = subprocess.DEVNULL) -> Child:
    """Start a plan with the user that its level asks for."""
    with contextlib.ExitStack() as stack:
        null = stack.enter_context(Path("/dev/null").open("wb"))
        own = plan.level.user == "own"
        uid = stack.enter_context(own_uid("0000000a")) if own else None
        return launch("0000000a", plan, uid, null.fileno(), stdin)


def raw(text: bytes) -> str:
    """What the launcher reports of this plan."""
    plan, (reports, report) = os.memfd_create("plan"), os.pipe2(os.O_CLOEXEC)
    try:
        os.write(plan, text)
        done = subprocess.run(
            [LAUNCHER, "test", str(plan), str(report)], pass_fds=[plan, report], timeout=60,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(report)
        said = os.read(reports, 65536).decode()
        assert (done.returncode == 0) == (not said.startswith("failed"))
        return said
    finally:
        os.close(plan)
        os.close(reports)


def own_children() -> set[str]:
    """The processes that are this one's to wait for, ended or not."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread may end
            found |= set((task / "children").read_text().split())
    return found


def own_descriptors() -> set[str]:
    """What is open in this process."""
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_a_good_plan_is_taken() -> None:
    """Or the refusals below would prove nothing."""
    assert raw(json.dumps(GOOD).encode()).startswith("pid ")


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_a_bad_plan_is_refused_whole(text: bytes) -> None:
    """One line that names the stage; nothing was started."""
    said = raw(text)
    assert said.startswith("failed plan: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["a"], ["a", "b", "c"], ["a", "1", "2"], ["a", "99", "98"]])
def test_a_bad_command_line_is_refused(words: list[str]) -> None:
    """Its descriptors are never those of a terminal."""
    done = subprocess.run([LAUNCHER, *words], capture_output=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr


@pytest.mark.parametrize("which", ["best", "least"])
def test_a_program_that_is_not_there(name: str, which: str) -> None:
    """The exec's own error, typed; its process is gone and reaped."""
    before = own_descriptors()
    with pytest.raises(ConfinementFailed) as failed:
        start(plan_of(name, level_of(which), program="/usr/bin/no-such-program"))
    assert failed.value.fields["stage"] == "exec"
    assert "no-such-program" in str(failed.value.fields["cause"])
    assert find_by_argument(name) == []
    assert own_descriptors() == before


def test_a_launcher_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is started unconfined in its place."""
    monkeypatch.setattr(module, "LAUNCHER", Path("/nowhere/diapause-launch"))
    with pytest.raises(ConfinementFailed, match="diapause-launch"):
        start(plan_of(name))


def test_a_launcher_that_can_not_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's own error, typed; no descriptor of ours stays open."""
    program = tmp_path / "launcher"
    program.write_bytes(b"\x7fELF is not enough")
    program.chmod(0o755)
    monkeypatch.setattr(module, "LAUNCHER", program)
    before = own_descriptors()
    with pytest.raises(ConfinementFailed) as failed:
        start(plan_of(name))
    assert failed.value.fields["stage"] == "start"
    assert own_descriptors() == before


@pytest.mark.parametrize("which", ["best", "least"])
def test_only_what_is_handed_over_arrives(name: str, which: str) -> None:
    """Not even what this process left inheritable; and nothing stays open here."""
    leaky = os.open("/dev/zero", os.O_RDONLY)
    handed = os.open("/dev/urandom", os.O_RDONLY)
    os.set_inheritable(leaky, True)
    before = own_descriptors()
    try:
        with launched(plan_of(name, level_of(which), descriptors=[handed])) as child:
            # Its loader has a library open for a moment.
            eventually("what was handed over", lambda: _held(child) == {0, 1, 2, handed})
            assert process_ref(child.pid) in find_by_argument(name)
        assert own_descriptors() == before
    finally:
        os.close(leaky)
        os.close(handed)


def _held(child: Child) -> set[int]:
    return {int(fd.name) for fd in Path(f"/proc/{child.pid}/fd").iterdir()}


def test_it_outlives_whoever_started_it_and_has_no_terminal(name: str) -> None:
    """A session of its own; the kernel is not told to end it with anybody."""
    with launched(plan_of(name)) as child:
        session = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[3])
        assert session != os.getsid(0)
        # The kernel takes the launcher's own handlers away just after it has closed what says that
        # the program runs.
        eventually("signals at their defaults", lambda: not _odd_signals(child.pid))


def _odd_signals(pid: int) -> list[str]:
    """What is ignored, blocked or caught, but for the two signals that a shell looks after."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = [line for line in status if line.startswith(("SigIgn", "SigBlk", "SigCgt"))]
    assert len(found) == 3
    return [line for line in found if int(line.split()[1], 16) & ~(1 << 1 | 1 << 16)]


@pytest.mark.parametrize("call", CALLS + NAMESPACE_CALLS)
def test_a_launcher_killed_at_any_stage_leaves_nothing(
    name: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed by the tracer as it makes the call, in whichever of its processes."""
    if not grants().level.namespaces and call in NAMESPACE_CALLS:
        call = "capset"  # the others are not made there
    _killed(name, f"-f -e inject={call}:signal=KILL:when=1", tmp_path, monkeypatch)


def test_a_launcher_killed_before_it_could_name_the_process_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process goes on to its program and is found by its name, once the bound is over: the
    tracer holds the report open."""
    monkeypatch.setattr(module, "LAUNCH_S", 2.0)
    _killed(name, "-e inject=write:signal=KILL:when=1", tmp_path, monkeypatch)


def _killed(name: str, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = tmp_path / "traced"
    traced.write_text(f'#!/bin/sh\nexec strace -qq -o {tmp_path}/trace {options} {LAUNCHER} "$@"\n')
    traced.chmod(0o755)
    monkeypatch.setattr(module, "LAUNCHER", traced)
    before = own_descriptors()
    waits, go = os.pipe2(os.O_CLOEXEC)
    try:
        with pytest.raises(ConfinementFailed):
            start(plan_of(name), waits)
        eventually("the end of every process", lambda: find_by_argument(name) == [])
    finally:
        os.close(waits)
        os.close(go)
    assert "KILL" in (tmp_path / "trace").read_text()
    assert own_descriptors() == before


# What came of a report before it was cut: the launcher's pid is the program's here.
CUT = {
    "nothing": "", "in the pid": "pid $$", "behind the pid": "pid $$\\n",
    "in the last word": "pid $$\\nexe", "before the pid": "exec\\n", "no pid": "pid \\nexec\\n",
    "in a failure": "pid $$\\nfailed exe", "no text": "\\xff\\x00\\n",
}  # fmt: skip


@pytest.mark.parametrize("said", CUT.values(), ids=CUT.keys())
def test_a_report_that_is_cut_is_no_start(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever made it runs on, and is ended."""
    failed = _reported(name, f'printf "{said}" >&$3', tmp_path, monkeypatch)
    assert failed.fields["stage"] in ("start", "exe")


def test_a_report_without_an_end_is_not_read_to_its_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would take as much memory as it likes; its end would have said that all is well."""
    size = LAUNCH_REPORT_BYTES_MAX
    said = f'printf "pid $$\\n%{size}s\\nexec\\n" x >&$3'
    failed = _reported(name, said, tmp_path, monkeypatch)
    assert failed.fields["cause"] == "a report without an end"


def test_a_report_of_the_size_that_is_allowed_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the test above would prove nothing."""
    said = 'printf "pid $$\\n%60000s\\nexec\\n" x >&$3'
    _report_as(said, tmp_path, monkeypatch)
    with launched(plan_of(name)) as child:
        assert process_ref(child.pid) in find_by_argument(name)


def test_a_report_that_can_not_be_read_is_no_start(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel gives EIO for the end of a terminal, when the program runs already."""
    with _refused(name) as waits:
        monkeypatch.setattr(os, "pipe2", lambda flags: os.openpty())
        with pytest.raises(ConfinementFailed) as failed:
            start(plan_of(name), waits)
    assert failed.value.fields["stage"] == "start"
    assert os.strerror(errno.EIO) in str(failed.value.fields["cause"])


def _reported(
    name: str, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ConfinementFailed:
    """What a start says whose launcher reports so."""
    _report_as(script, tmp_path, monkeypatch)
    with _refused(name) as waits, pytest.raises(ConfinementFailed) as failed:
        start(plan_of(name), waits)
    return failed.value


def _report_as(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that reports so, says no more, and stays."""
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/bash\n{script}\neval "exec $3>&-"\nread line\n')
    launcher.chmod(0o755)
    monkeypatch.setattr(module, "LAUNCHER", launcher)


@contextlib.contextmanager
def _refused(name: str) -> Iterator[int]:
    """An input that does not end; whatever waits for it is gone and reaped behind the block."""
    before, children = own_descriptors(), own_children()
    waits, go = os.pipe2(os.O_CLOEXEC)
    try:
        yield waits
        assert find_by_argument(name) == []
        assert own_children() <= children
    finally:
        os.close(waits)
        os.close(go)
    assert own_descriptors() == before
