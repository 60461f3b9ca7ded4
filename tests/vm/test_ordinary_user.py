"""The whole cycle as an ordinary user: with user namespaces, and where there are none to be had."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diapause.guest.images import Image
from diapause.store.home import Home
from tests.framework.other_user import (
    NOBODY,
    WITHOUT_USER_NAMESPACES,
    python_as_nobody,
    remove_what_nobody_left,
)
from tests.framework.processes import end_processes
from tests.framework.sandbox import known_facts, remove_closed
from tests.framework.sources import ROOT

pytestmark = pytest.mark.vm

USER = NOBODY if os.geteuid() == 0 else os.geteuid()
NAMESPACES = ["mount", "pid", "ipc", "uts", "net"]
HAS_RUN = ("booted", "resumed", "forked")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody can reach; a home will be in it."""
    made = Path(tempfile.mkdtemp(prefix="dia-"))
    made.chmod(0o755)
    yield made
    end_processes(Home.at(made / "h"))
    remove_what_nobody_left(Home.at(made / "h"))
    remove_closed(made)


def cycle(place: Path, image: Image, within: tuple[str, ...] = ()) -> dict[str, Any]:
    """Take it; what inspect and doctor said."""
    home = Home.at(place / "h").create()
    shutil.copytree(image.directory, home.image("tiny"))  # the user's own, no links to ours
    home.buffers.rmdir()  # the user makes it
    for path in [home.root, *home.root.rglob("*")]:
        os.chown(path, USER, USER if os.geteuid() == 0 else -1)
    (place / "b").mkdir()
    program = ("-m", "tests.framework.ordinary_cycle", str(home.root), json.dumps(known_facts()))
    done = subprocess.run(
        python_as_nobody(place / "b", *program, within=within),
        capture_output=True, text=True, timeout=900, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["uid"] == USER
    for name in HAS_RUN:
        said = found[name]
        assert (said["uid"], said["capabilities"]) == (USER, "none"), name
        assert (said["no_new_privs"], said["seccomp"]) == (True, "filter"), name
    required = [check for check in found["doctor"].values() if check["required"]]
    assert [check for check in required if not check["ok"]] == []
    assert found["doctor"]["vmm rights"]["ok"]
    return found


def test_in_a_user_namespace(
    tiny_image: Image, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each VMM has one of its own, and with it every other; nothing is missing, not even FUSE."""
    monkeypatch.setenv("DIAPAUSE_MEMORY_MODE", "ondemand")
    found = cycle(place, tiny_image)
    assert found["doctor"]["fuse"]["ok"]
    assert found["resumes"] == [{"mode": "ondemand", "notes": []}] * 2
    for name in HAS_RUN:
        assert found[name]["namespaces"] == [*NAMESPACES, "user"], name
    user, namespaces = found["doctor"]["vmm user"], found["doctor"]["vmm namespaces"]
    assert user["ok"]
    assert "in a user namespace of its own" in user["detail"]
    assert namespaces["ok"]


def test_without_user_namespaces(
    tiny_image: Image, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works, and doctor says what is missing, what refused it, and what that costs; memory is
    copied, which the answers say."""
    monkeypatch.setenv("DIAPAUSE_MEMORY_MODE", "ondemand")
    found = cycle(place, tiny_image, WITHOUT_USER_NAMESPACES)
    assert not found["doctor"]["fuse"]["ok"]
    assert [resume["mode"] for resume in found["resumes"]] == ["copy", "copy"]
    for resume in found["resumes"]:
        [note] = resume["notes"]
        assert "user namespace" in note
        assert "It was copied." in note
    for name in HAS_RUN:
        assert found[name]["namespaces"] == [], name
    user, namespaces = found["doctor"]["vmm user"], found["doctor"]["vmm namespaces"]
    assert (user["ok"], user["required"]) == (False, False)
    assert "has this user's rights" in user["detail"]
    assert "user-namespace" in user["fix"]
    assert not namespaces["ok"]
    assert all(name in namespaces["detail"] for name in NAMESPACES)
