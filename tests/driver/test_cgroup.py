"""Cgroups without a guest: real ones of this host, and files in their place for the controllers
that it may not have (`tests/vm/test_cgroup_limits.py` has a kernel that does)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.driver import cgroup
from diapause.driver.base import Shape
from diapause.driver.cgroup import (
    VARIABLE,
    Delegation,
    Leaf,
    LeafLimits,
    Leaves,
    cgroup_of,
    leaf_of,
    lies_on_tmpfs,
    limits_of,
    read_limit,
    turn_on,
)
from diapause.driver.grants import LEVELS, grants
from diapause.driver.process import Pidfd, process_ref
from diapause.errors import ConfinementFailed
from diapause.limits import VMM_THREADS_MAX
from diapause.units import GIB, MIB
from tests.driver.test_launch import launched, name, plan_of, start
from tests.framework.cgroups import cgroup_path, cgroup_place, leaves_in
from tests.framework.fake_home import eventually

__all__ = ["name"]
NO_LIMITS = LeafLimits(None, None, VMM_THREADS_MAX)
KEY, SANDBOX = "0123456789ab", "0" * 16
# Prints what a daemon finds that is born in the cgroup of the first argument.
_DAEMON = """
import json, os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
from diapause.driver.cgroup import cgroup_of, delegation
given = delegation()
print(json.dumps([str(given.place), given.cause, str(cgroup_of())]))
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A real cgroup."""
    with cgroup_place() as made:
        yield made


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files in the place of a cgroup with both controllers on; the daemon's, for this test."""
    for file, text in (
        ("cgroup.controllers", "cpu memory pids"), ("cgroup.subtree_control", ""),
        ("cgroup.procs", ""),
    ):  # fmt: skip
        (tmp_path / file).write_text(text)
    given = Delegation(tmp_path, ("memory", "pids"))
    monkeypatch.setattr(cgroup, "delegation", lambda: given)
    return tmp_path


def daemon_in(place: Path, **environment: str) -> list[str]:
    """Place, cause and own cgroup, as a daemon finds them that is started in this cgroup."""
    done = subprocess.run(
        [sys.executable, "-c", _DAEMON, place], capture_output=True, text=True, timeout=60,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


# -- the place ---------------------------------------------------------------------------------

MOUNTS = """
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw
39 31 0:36 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
40 31 0:38 /../.. /outside rw - cgroup2 cgroup2 rw
41 31 0:38 /a/b /below\\040it rw shared:3 - cgroup2 cgroup2 rw
42 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
""".strip()


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/", "/sys/fs/cgroup/unified"), ("/a", "/sys/fs/cgroup/unified/a"),
        ("/a/b", "/below it"), ("/a/b/c", "/below it/c"), ("/a/bc", "/sys/fs/cgroup/unified/a/bc"),
    ],
)  # fmt: skip
def test_where_a_cgroup_is_mounted(path: str, found: str) -> None:
    """Of a mount that shows a part, what is in that part; none of version 1."""
    assert cgroup._mounted(path, MOUNTS) == Path(found)
    assert cgroup._mounted(path, "\n".join(MOUNTS.splitlines()[:3])) is None


def test_a_cgroup_that_nobody_delegated_is_left_alone(place: Path) -> None:
    """Nothing is made in it, and the daemon stays where it is."""
    found, cause, own = daemon_in(place, **{VARIABLE: ""})
    assert (found, own) == ("None", str(place))
    assert cause == f"{place} was not delegated to the daemon"
    assert leaves_in(place) == []


@pytest.mark.parametrize("where", ["", "daemon"])
def test_what_systemd_delegates_is_found_by_its_mark(place: Path, where: str) -> None:
    """Also by a daemon that systemd put into `daemon` below it (DelegateSubgroup=)."""
    (place / where).mkdir(exist_ok=True)
    os.setxattr(place, "user.delegate", b"1")
    assert daemon_in(place / where, **{VARIABLE: ""})[0] == str(place)
    os.setxattr(place, "user.delegate", b"0")
    assert daemon_in(place / where, **{VARIABLE: ""})[0] == "None"


def test_a_cgroup_that_was_named_is_taken(place: Path) -> None:
    """Whoever named it answers for it."""
    with cgroup_place() as elsewhere:
        assert daemon_in(elsewhere, **{VARIABLE: str(place)})[0] == str(place)


def test_one_that_can_not_be_written_is_none(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an ordinary user finds it that somebody else's was named to."""
    monkeypatch.setenv(VARIABLE, str(place))
    monkeypatch.setattr(os, "access", lambda *_: False)
    given = cgroup.delegation.__wrapped__()
    assert given.place is None
    assert "can't be written" in given.cause


def test_controllers_that_are_there_are_turned_on(files: Path) -> None:
    """One at a time: a host may allow the one and not the other."""
    turn_on(files)
    assert (files / "cgroup.subtree_control").read_text() in ("+memory", "+pids")
    (files / "cgroup.subtree_control").write_text("memory pids")
    assert turn_on(files) == Delegation(files, ("memory", "pids"))


def test_controllers_that_are_not_there_are_named(place: Path, files: Path) -> None:
    """By the real kernel where it lacks one; by a file where it lacks none."""
    (files / "cgroup.controllers").write_text("cpu io")
    given = turn_on(files)
    assert given == Delegation(files, (), f"{files} has no memory and no pids controller")
    there = (place / "cgroup.controllers").read_text().split()
    given = turn_on(place)
    assert set(given.controllers) == {"memory", "pids"} & set(there)
    assert ("controller" in given.cause) == (not {"memory", "pids"} <= set(there))


# -- leaves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["best", "least"])
def test_a_process_begins_in_its_leaf(place: Path, name: str, which: str) -> None:
    """Whatever its level; the leaf stays while it runs and goes after it."""
    leaf = Leaves(KEY).make(Delegation(place), SANDBOX, NO_LIMITS)
    directory = os.open(leaf.path, os.O_RDONLY | os.O_DIRECTORY)
    level = grants().level if which == "best" else LEVELS[-1]
    try:
        with launched(plan_of(name, level, cgroup=directory)) as child:
            assert cgroup_path(child.pid).endswith(f"/{place.name}/{leaf.path.name}")
            assert leaf_of(child.pid) == Leaf(cgroup_of(child.pid) or Path())
            assert not leaf.remove(0.0)
            assert leaf.path.exists()
            assert not Path(f"/proc/{child.pid}/fd/{directory}").exists()
        assert leaf.remove()
        assert leaf.remove(), "what is gone is gone"
    finally:
        os.close(directory)


def test_a_leaf_that_was_removed_takes_no_process(place: Path, name: str) -> None:
    """Nothing is started outside of it instead."""
    leaf = Leaves(KEY).make(Delegation(place), SANDBOX, NO_LIMITS)
    directory = os.open(leaf.path, os.O_RDONLY | os.O_DIRECTORY)
    leaf.remove()
    try:
        with pytest.raises(ConfinementFailed) as failed:
            start(plan_of(name, cgroup=directory))
        assert failed.value.fields["stage"] == "clone"
    finally:
        os.close(directory)


def test_one_that_is_about_to_end_is_waited_for(place: Path) -> None:
    """The kernel empties a cgroup a moment after it says that the process has ended."""
    leaf = Leaf(place / "diapause-ends")
    leaf.path.mkdir()
    with subprocess.Popen(["sleep", "600"]) as sleeper:
        (leaf.path / "cgroup.procs").write_text(str(sleeper.pid))
        process = process_ref(sleeper.pid)
        assert process is not None
        pidfd = Pidfd(process)
        pidfd.kill()
        assert pidfd.wait(60.0)
        assert leaf.remove(60.0)


def test_only_a_homes_own_empty_leaves_are_swept(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not another home's, not anybody else's, and none in which something runs."""
    given = Delegation(place)
    monkeypatch.setattr(cgroup, "delegation", lambda: given)
    leaves, other = Leaves(KEY), Leaves("f" * 12)
    lives = leaves.make(given, SANDBOX, NO_LIMITS)
    leaves.make(given, "1" * 16, NO_LIMITS)
    kept = other.make(given, SANDBOX, NO_LIMITS)
    (place / "somebody").mkdir()
    with subprocess.Popen(["sleep", "600"]) as sleeper:
        try:
            (lives.path / "cgroup.procs").write_text(str(sleeper.pid))
            leaves.sweep()
            assert leaves_in(place) == sorted([lives.path.name, kept.path.name, "somebody"])
        finally:
            sleeper.kill()

    def swept() -> bool:
        leaves.sweep()
        return not lives.path.exists()

    eventually("the removal of its leaf", swept)


def test_limits_are_set_before_anything_runs(files: Path) -> None:
    """What a kernel holds without them is set by name; swap only where it is accounted."""
    leaf = Leaf(files / "leaf")
    leaf.path.mkdir()
    (leaf.path / "memory.swap.max").touch()
    leaf.limit(("memory", "pids"), LeafLimits(3 * GIB, GIB, 512))
    texts = {path.name: path.read_text() for path in leaf.path.iterdir()}
    assert texts == {
        "memory.max": str(3 * GIB), "memory.swap.max": str(GIB), "memory.oom.group": "1",
        "pids.max": "512",
    }  # fmt: skip
    assert (read_limit(leaf, "memory.max"), read_limit(leaf, "pids.max")) == (3 * GIB, 512)
    (leaf.path / "memory.swap.max").unlink()
    leaf.limit(("memory",), NO_LIMITS)
    assert read_limit(leaf, "memory.max") is None
    assert not (leaf.path / "memory.swap.max").exists()


def test_a_limit_that_is_refused_leaves_no_leaf(place: Path) -> None:
    """The real kernel refuses a file of a controller that can't be turned on."""
    inner = place / "inner"
    inner.mkdir()  # nothing is turned on above it
    with pytest.raises(PermissionError):
        Leaves(KEY).make(Delegation(inner, ("pids", "memory")), SANDBOX, NO_LIMITS)
    assert leaves_in(inner) == []


@pytest.mark.parametrize(
    ("events", "killed"),
    [
        ("low 0\nhigh 3\nmax 9\noom 2\noom_kill 1\noom_group_kill 1\n", True),
        ("low 0\nhigh 0\nmax 9\noom 2\noom_kill 0\noom_group_kill 0\n", False), ("", False),
    ],
)  # fmt: skip
def test_what_a_limit_ended_is_known_from_its_leaf(files: Path, events: str, killed: bool) -> None:
    """And after the leaf is gone, until the next start."""
    leaves = Leaves(KEY)
    leaf = files / f"diapause-{KEY}-{SANDBOX}.00000000"
    leaf.mkdir()
    (leaf / "memory.events").write_text(events)
    assert leaves.killed(SANDBOX) == killed
    assert not leaves.killed("1" * 16)
    leaves.remove(SANDBOX)
    for file in leaf.iterdir():
        file.unlink()
    leaf.rmdir()
    assert leaves.killed(SANDBOX) == killed
    leaves.make(Delegation(files), SANDBOX, NO_LIMITS)
    assert not leaves.killed(SANDBOX)


# -- the numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("ram", [128 * MIB, 2 * GIB, 64 * GIB])
@pytest.mark.parametrize("cpus", [1, 8, 64])
def test_a_limit_leaves_an_honest_guest_its_room(ram: int, cpus: int) -> None:
    """All of its memory, QEMU's translated code, and more for more processors."""
    limits = limits_of(Shape(ram, cpus, (64 * GIB,), False), on_tmpfs=False)
    assert limits.memory_bytes is not None
    assert limits.memory_bytes >= ram + ram // 64 + GIB
    assert limits.memory_bytes % 4096 == 0
    assert limits.swap_bytes == ram
    assert limits.tasks == VMM_THREADS_MAX


def test_a_home_that_is_memory_has_no_limit_of_it(tmp_path: Path) -> None:
    """What is written there is charged to the guest and never reclaimed."""
    limits = limits_of(Shape(GIB, 1, (GIB,), False), on_tmpfs=True)
    assert limits == LeafLimits(None, None, VMM_THREADS_MAX)
    assert lies_on_tmpfs(Path("/dev/shm"))
    assert not lies_on_tmpfs(Path("/proc"))
