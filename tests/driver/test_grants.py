"""What a host grants, tried for real: as this user, as nobody, and where namespaces are used up."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from diapause.driver import cgroup, launch
from diapause.driver import grants as trials
from diapause.driver.cgroup import Delegation
from diapause.driver.grants import LEVELS, asked_for, cgroups, grants
from diapause.driver.launch import Level
from diapause.driver.passing import error_in, is_passing
from diapause.errors import ConfinementFailed
from tests.framework.cgroups import cgroup_place, leaves_in
from tests.framework.other_user import python_as_nobody

_ASK = """
import dataclasses, json
from diapause.driver.grants import grants
given = grants()
print(json.dumps([given.level.user, given.level.namespaces, list(given.refused.values())]))
"""
# With ever more descriptors left, until there are enough: an error each time, or what is there.
_FEW = """
import json, os, resource
from diapause.driver.grants import grants
from diapause.driver.passing import is_passing
whole = grants.__wrapped__()
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
free = os.dup(0)
os.close(free)
found = []
for left in range(40):
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + left, hard))
    try:
        found.append(grants.__wrapped__() == whole)
    except Exception as error:
        assert is_passing(error), repr(error)
        found.append(None)
print(json.dumps(found))
"""
# In a user namespace whose own limit on further ones is none.
_USED_UP = """
echo 0 >/proc/sys/user/max_user_namespaces
exec setpriv --inh-caps=-all --bounding-set=-all "$@"
"""


def asked(command: list[str]) -> tuple[str, bool, list[str]]:
    """What the daemon would find there: user, namespaces, and what refused more."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    user, namespaces, refused = json.loads(done.stdout)
    return user, namespaces, refused


def test_what_is_granted_comes_after_what_was_refused() -> None:
    """From the best down, and each that was refused with its cause."""
    given = grants()
    assert list(given.refused) == list(LEVELS[: LEVELS.index(given.level)])
    assert all(": " in cause for cause in given.refused.values())


def test_an_ordinary_user_gets_no_user_of_its_own() -> None:
    """A user namespace where the host allows one; or nothing, with the cause of that."""
    with tempfile.TemporaryDirectory(prefix="dia-") as directory:
        place = Path(directory)
        place.chmod(0o755)
        user, namespaces, refused = asked(python_as_nobody(place, "-c", _ASK))
    assert (user, namespaces) in (("namespace", True), ("same", False))
    assert "only root can change users" in refused[0]
    assert namespaces or len(refused) == 3


def test_where_user_namespaces_are_used_up_it_goes_on_without() -> None:
    """Less is granted, and it says which call was refused."""
    inside = ["unshare", "--user", "--map-root-user", "sh", "-ec", _USED_UP, "sh"]
    user, namespaces, refused = asked([*inside, sys.executable, "-c", _ASK])
    assert (user, namespaces) == ("same", False)
    assert any("user-namespace" in cause for cause in refused)


def test_used_up_descriptors_are_no_answer() -> None:
    """At no call of the trial, ours or the launcher's: it is as confined as ever, or an error."""
    done = subprocess.run(
        [sys.executable, "-c", _FEW], capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found[0], found[-1]) == (None, True)
    assert False not in found


def _fails_once(
    patch: pytest.MonkeyPatch, error: OSError, answer: bool = False
) -> list[tuple[Level, int | None]]:
    """The trial's first time ends with an error; every time, as it is counted."""
    tried: list[tuple[Level, int | None]] = []
    known = trials._try

    def one(level: Level, cgroup: int | None = None) -> None:
        tried.append((level, cgroup))
        if len(tried) == 1 or answer:
            raise ConfinementFailed(sandbox="0", stage="clone", cause=str(error)) from error
        known(level, cgroup)

    patch.setattr(trials, "_try", one)
    return tried


@pytest.mark.parametrize(
    "number",
    [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT],
    ids=errno.errorcode.get,
)
def test_an_error_of_the_moment_is_not_remembered(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Whoever asked gets it under its own name, and the next one what is granted."""
    known = grants()
    grants.cache_clear()
    _fails_once(monkeypatch, OSError(number, os.strerror(number)))
    with pytest.raises(ConfinementFailed) as failed, asked_for("a" * 16):
        grants()
    assert failed.value.fields["sandbox"] == "a" * 16
    assert grants() == known


@pytest.mark.parametrize(
    "number", [errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOENT], ids=errno.errorcode.get
)
def test_a_refusal_is_remembered(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """It is an answer: the next level is tried, and none of them again."""
    grants.cache_clear()
    try:
        tried = _fails_once(monkeypatch, OSError(number, os.strerror(number)), answer=True)
        assert [grants().level, grants().level] == [LEVELS[-1], LEVELS[-1]]
        assert len(tried) == len(LEVELS) - 1
    finally:
        grants.cache_clear()


def test_a_launcher_that_does_not_report_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A host that is too busy to start it in time confines nothing less afterwards."""
    stuck = tmp_path / "diapause-launch"
    stuck.write_text(f"#!{sys.executable}\nimport signal\nsignal.pause()\n")
    stuck.chmod(0o755)
    monkeypatch.setattr(launch, "LAUNCHER", stuck)
    monkeypatch.setattr(trials, "LAUNCHER", stuck)
    monkeypatch.setattr(launch, "LAUNCH_S", 0.2)
    with pytest.raises(ConfinementFailed) as failed:
        grants.__wrapped__()
    assert "no report" in failed.value.message
    assert is_passing(failed.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("unshare: EAGAIN: Try again", errno.EAGAIN),
        ("/proc/self: Too many open files (os error 24)", errno.EMFILE),
        ("unshare: ENOSPC: No space left on device", errno.ENOSPC),
        ("the launcher ended without a word", None),
    ],
)
def test_the_launchers_errors_are_known_again(text: str, number: int | None) -> None:
    """As its report spells them."""
    found = error_in(text)
    assert (found.errno if found else None) == number


def test_a_cgroup_that_can_not_be_tried_now_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its leaf is gone, and nothing is remembered."""
    grants()
    with cgroup_place() as place:
        monkeypatch.setattr(trials, "delegation", lambda: Delegation(place))
        cgroups.cache_clear()
        try:
            _fails_once(monkeypatch, OSError(errno.EMFILE, "Too many open files"))
            with pytest.raises(ConfinementFailed):
                cgroups("0" * 12)
            assert leaves_in(place) == []
            assert cgroups("0" * 12).place == place
        finally:
            cgroups.cache_clear()


def test_a_delegation_that_can_not_be_read_now_is_read_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither by its name nor by its mark; what needs no answer does without one meanwhile."""

    def fails(*_: object) -> None:
        raise OSError(errno.ENFILE, "Too many open files in system")

    for file in ("cgroup.controllers", "cgroup.subtree_control", "cgroup.procs"):
        (tmp_path / file).write_text("")
    monkeypatch.setenv(cgroup.VARIABLE, str(tmp_path))
    cgroup.delegation.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", fails)
            with pytest.raises(OSError, match="Too many"):
                cgroup.delegation()
            assert not cgroup.Leaves("0" * 12).killed("a" * 16)
        assert cgroup.delegation().place == tmp_path
        cgroup.delegation.cache_clear()
        monkeypatch.delenv(cgroup.VARIABLE)
        with monkeypatch.context() as patch:
            patch.setattr(cgroup, "_find_cgroup", fails)
            with pytest.raises(OSError, match="Too many"):
                cgroup.delegation()
            patch.setattr(cgroup, "_find_cgroup", lambda pid: tmp_path)
            patch.setattr(os, "getxattr", fails)
            with pytest.raises(OSError, match="Too many"):
                cgroup.delegation()
    finally:
        cgroup.delegation.cache_clear()
