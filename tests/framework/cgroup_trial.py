"""Run inside a guest, as a daemon in a delegated cgroup of a kernel that has both controllers.

Takes the name of one trial and what the host delegates, and prints what was found as JSON. It needs
no more than our package's files and the launcher: no library, and no test framework, is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diapause.driver import cgroup
from diapause.driver.base import Shape
from diapause.driver.cgroup import Leaf, LeafLimits, Leaves, cgroup_of, delegation, limits_of
from diapause.driver.confined import read_confined
from diapause.driver.grants import LEVELS, cgroups, grants
from diapause.driver.launch import Child, LaunchPlan, launch
from diapause.driver.uids import own_uid
from diapause.units import MIB

TOP = Path("/sys/fs/cgroup")
KEY, SANDBOX = "0123456789ab", "0" * 16
BOUND_S = 300.0
# Each becomes the first process of its VMM's namespaces: what it starts ends with it.
FORKS = """
import os, time
made = 0
try:
    while made < 100:
        if os.fork() == 0:
            time.sleep(600)
        made += 1
except OSError as error:
    print(made, error.errno, flush=True)
time.sleep(600)
"""
EATS = """
held = []
while len(held) < 1024:
    held.append(bytearray(1 << 20))
"""


@contextlib.contextmanager
def host_delegates(controllers: tuple[str, ...]) -> Iterator[Path]:
    """What a host's systemd does for a unit with `Delegate=memory pids`, and we in it."""
    if not (TOP / "cgroup.controllers").exists():
        subprocess.run(["mount", "-t", "cgroup2", "none", str(TOP)], check=True, timeout=60)
    (TOP / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))
    unit = Path(tempfile.mkdtemp(prefix="unit-", dir=TOP))
    os.setxattr(unit, "user.delegate", b"1")
    (unit / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield unit
    finally:
        (TOP / "cgroup.procs").write_text(str(os.getpid()))
        for path in [*(path for path in unit.iterdir() if path.is_dir()), unit]:
            wait(lambda path=path: Leaf(path).remove())
        (TOP / "cgroup.subtree_control").write_text(" ".join(f"-{name}" for name in controllers))


@contextlib.contextmanager
def vmm(leaf: Leaf, script: str, level: Any = None) -> Iterator[tuple[Child, Path]]:
    """A program in the place of a VMM, in its leaf; what it prints is in the file."""
    level = level or grants().level
    directory = os.open(leaf.path, os.O_RDONLY | os.O_DIRECTORY)
    with tempfile.NamedTemporaryFile() as log, contextlib.ExitStack() as stack:
        stack.callback(os.close, directory)
        uid = stack.enter_context(own_uid(SANDBOX)) if level.user == "own" else None
        plan = LaunchPlan(
            name="guest=trial", program="/usr/bin/python3",
            arguments=["python3", "-c", script, "guest=trial"], environment={}, descriptors=[],
            level=level, cgroup=directory,
        )  # fmt: skip
        child = launch(SANDBOX, plan, uid, log.fileno())
        try:
            yield child, Path(log.name)
        finally:
            (leaf.path / "cgroup.kill").write_text("1")
            wait(child.poll)


def wait(holds: Any) -> None:
    """Until it holds."""
    deadline = time.monotonic() + BOUND_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def delegated(unit: Path) -> dict[str, Any]:
    """The daemon alone in its unit: it makes room, and both controllers are on."""
    before, given = str(cgroup_of()), delegation()
    proved = cgroups(KEY)
    return {
        "before": before == str(unit), "place": given.place == unit,
        "controllers": given.controllers, "cause": given.cause.replace(str(unit), "PLACE"),
        "own": cgroup_of() == unit / "daemon", "proved": proved == given,
        "left": sorted(path.name for path in unit.iterdir() if path.is_dir()),
    }  # fmt: skip


def beside_others(unit: Path) -> dict[str, Any]:
    """Somebody else in it: nobody is moved, nothing turned on, and leaves work without limits."""
    with subprocess.Popen(["sleep", "600"]) as other:
        given = delegation()
        found = {
            "controllers": given.controllers, "cause": given.cause.replace(str(unit), "PLACE"),
            "own": cgroup_of() == unit, "other": cgroup_of(other.pid) == unit,
            "proved": cgroups(KEY) == given,
        }  # fmt: skip
        other.kill()
    return found


def forks(unit: Path) -> dict[str, Any]:
    """A VMM that forks without end, at each level that the host grants."""
    found: dict[str, Any] = {}
    for level in {grants().level, LEVELS[-1]}:
        leaf = Leaves(KEY).make(delegation(), SANDBOX, LeafLimits(None, None, 8))
        with vmm(leaf, FORKS, level) as (child, log):
            wait(log.read_text)
            confined = read_confined(child.pid)
            assert confined is not None
            found[f"{level.user} {level.namespaces}"] = {
                "made": log.read_text().split(), "tasks_max": confined.tasks_max,
                "current": int((leaf.path / "pids.current").read_text()),
                "memory_bytes_max": confined.memory_bytes_max,
            }  # fmt: skip
        assert leaf.remove()
    return found


def eats(unit: Path) -> dict[str, Any]:
    """A VMM that takes memory without end, beside one that does not."""
    leaves = Leaves(KEY)
    eater = leaves.make(delegation(), SANDBOX, LeafLimits(48 * MIB, 0, 64))
    modest = leaves.make(delegation(), "1" * 16, LeafLimits(48 * MIB, 0, 64))
    with vmm(modest, "print(1, flush=True); import time; time.sleep(600)") as (other, log):
        wait(log.read_text)
        with vmm(eater, EATS) as (child, _):
            wait(child.poll)
        found: dict[str, Any] = {"killed": leaves.killed(SANDBOX), "other": leaves.killed("1" * 16)}
        found["other_ended"] = other.poll()
        leaves.remove(SANDBOX)
        found["removed"] = not eater.path.exists()
        found["killed_afterwards"] = leaves.killed(SANDBOX)
    leaves.make(delegation(), SANDBOX, LeafLimits(None, None, 64))
    found["killed_after_the_next_start"] = leaves.killed(SANDBOX)
    return found


def started_anew(unit: Path) -> dict[str, Any]:
    """As systemd may do to a unit that starts anew: controllers off, and all limits with them."""
    shape = Shape(128 * MIB, 2, (64 * MIB,), False)
    limits = limits_of(shape, on_tmpfs=False)
    leaf = Leaves(KEY).make(delegation(), SANDBOX, limits)
    with vmm(leaf, "print(1, flush=True); import time; time.sleep(600)") as (child, log):
        wait(log.read_text)
        before = read_confined(child.pid)
        (unit / "cgroup.subtree_control").write_text("-memory -pids")
        without = read_confined(child.pid)
        cgroup.delegation.cache_clear()  # as the next daemon
        Leaves(KEY).adopt(SANDBOX, child.pid, limits)
        after = read_confined(child.pid)
        (unit / "cgroup.subtree_control").write_text("-memory -pids")
        later = Leaves(KEY).make(delegation(), "1" * 16, limits)
    assert before is not None
    assert without is not None
    return {
        "before": [before.memory_bytes_max, before.tasks_max],
        "without": [without.memory_bytes_max, without.tasks_max],
        "same": before == after, "wanted": [limits.memory_bytes, limits.tasks],
        "later": [int((later.path / name).read_text()) for name in ("memory.max", "pids.max")],
        "swap": (later.path / "memory.swap.max").read_text().strip(),
    }  # fmt: skip


TRIALS = {
    trial.__name__: trial for trial in (delegated, beside_others, forks, eats, started_anew)
}  # fmt: skip


if __name__ == "__main__":
    with host_delegates(tuple(sys.argv[2:])) as given_to_us:
        print(json.dumps(TRIALS[sys.argv[1]](given_to_us)))
