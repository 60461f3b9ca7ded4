"""Limits that are reached, under a kernel that has both controllers in cgroup2: a guest's.

Whether this host has them there is its own affair, so the daemon's part, the launcher and what they
start run inside a guest of the image `python`, as they would on a host that delegates.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diapause.guest.images import Image
from diapause.units import GIB, MIB
from tests.framework.sandbox import Sandbox, real_home
from tests.framework.sources import ROOT

pytestmark = pytest.mark.vm

EAGAIN = 11


@pytest.fixture(scope="module")
def host(python_image: Image) -> Iterator[Sandbox]:
    """A guest in the place of a host, with our package in it."""
    with real_home(python_image) as daemon:
        made = daemon.run(image="python", memory_bytes=512 * MIB, disk_bytes=1 * GIB)
        made.sh("mkdir /opt/host && tar -xf - -C /opt/host", given=package())
        yield made


def package() -> bytes:
    """Our modules, the launcher, and the trials."""
    packed = io.BytesIO()
    source = ROOT / "src/diapause"
    files = [*source.rglob("*.py"), source / "native/diapause-launch"]
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in files:
            archive.add(path, Path("diapause", path.relative_to(source)))
        archive.add(ROOT / "tests/framework/cgroup_trial.py", "trial.py")
    return packed.getvalue()


def trial(host: Sandbox, name: str, *delegated: str) -> dict[str, Any]:
    """What one found, where the host delegates these controllers."""
    given = delegated or ("memory", "pids")
    done = host.exec("python3", "/opt/host/trial.py", name, *given)
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_daemon_makes_room_and_turns_both_controllers_on(host: Sandbox) -> None:
    """It is in `daemon` then, and what it tried leaves nothing."""
    assert trial(host, "delegated") == {
        "before": True, "place": True, "controllers": ["memory", "pids"], "cause": "",
        "own": True, "proved": True, "left": ["daemon"],
    }  # fmt: skip


@pytest.mark.parametrize(("there", "missing"), [("memory", "pids"), ("pids", "memory")])
def test_what_the_host_has_is_used_without_the_other(
    host: Sandbox, there: str, missing: str
) -> None:
    """As where one of the two is kept in version 1; something can be started all the same."""
    assert trial(host, "delegated", there) == {
        "before": True, "place": True, "controllers": [there],
        "cause": f"PLACE has no {missing} controller", "own": True, "proved": True,
        "left": ["daemon"],
    }  # fmt: skip


def test_nobody_else_is_moved(host: Sandbox) -> None:
    """Without limits then, with the reason; VMMs have leaves all the same."""
    assert trial(host, "beside_others") == {
        "controllers": [], "cause": "PLACE is not ours alone: 1 other processes run in it",
        "own": True, "other": True, "proved": True,
    }  # fmt: skip


def test_a_vmm_can_not_fork_without_end(host: Sandbox) -> None:
    """At the best level, and at the one that has no other bound."""
    found = trial(host, "forks")
    assert set(found) == {"own True", "same False"}
    for level in found.values():
        assert level == {
            "made": ["7", str(EAGAIN)], "tasks_max": 8, "current": 8, "memory_bytes_max": None,
        }  # fmt: skip


def test_a_vmm_that_takes_too_much_is_killed_and_it_is_known(host: Sandbox) -> None:
    """It alone, and by its own limit; its leaf's word for it outlives the leaf."""
    assert trial(host, "eats") == {
        "killed": True, "other": False, "other_ended": False, "removed": True,
        "killed_afterwards": True, "killed_after_the_next_start": False,
    }  # fmt: skip


def test_limits_are_set_again_when_a_unit_is_started_anew(host: Sandbox) -> None:
    """For a guest that ran through it, and by the next start; they are what was asked for."""
    found = trial(host, "started_anew")
    assert found["before"] == found["wanted"]
    assert found["without"] == [None, None]
    assert found["same"]
    assert found["later"] == found["wanted"]
    assert found["swap"] == str(128 * MIB)
