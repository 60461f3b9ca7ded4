"""The dirty set is exact: full compares of guest RAM, under disk I/O, page-cache drops and tmpfs.

As whoever runs the tests (root, usually) and as a user without any privilege.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diapause.guest.images import Image
from diapause.store.home import Home
from tests.framework.other_user import NOBODY, python_as_nobody, remove_what_nobody_left
from tests.framework.processes import end_processes
from tests.framework.sandbox import known_facts, link_image, remove_closed
from tests.framework.sources import ROOT

pytestmark = pytest.mark.vm

ROUNDS, ROUNDS_SOAK = 6, 60
PROGRAM = ("-m", "tests.framework.dirty_rounds")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody can reach; a home will be in it."""
    made = Path(tempfile.mkdtemp(prefix="dia-"))
    made.chmod(0o755)
    yield made
    end_processes(Home.at(made / "h"))
    remove_what_nobody_left(Home.at(made / "h"))
    remove_closed(made)


def rounds(place: Path, image: Image, uid: int, count: int) -> list[dict[str, Any]]:
    """Take them as this user; what each found."""
    home = Home.at(place / "h").create()
    link_image(home, image)
    home.buffers.rmdir()  # the user makes its own
    program = (*PROGRAM, str(home.root), str(count), json.dumps(known_facts()))
    command = [sys.executable, *program]
    if uid != os.geteuid():
        for path in [home.root, *home.root.rglob("*")]:
            if path.is_dir():
                os.chown(path, uid, uid)
        (place / "b").mkdir()
        command = python_as_nobody(place / "b", *program)
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict[str, Any]], uid: int, count: int) -> None:
    """None missed, none wrong, and there was something to miss."""
    for line in found:
        print(line)
    assert [line["uid"] for line in found] == [uid] * count
    assert found[0]["rule"] == "private"
    assert {line["rule"] for line in found[1:]} == {"tracked"}
    assert [line["missed_pages"] for line in found] == [0] * count
    assert [line["wrong_pages"] for line in found] == [0] * count
    assert min(line["changed_pages"] for line in found) > 100
    # Exact also means: far from all of RAM.
    assert sorted(line["captured_pages"] for line in found)[count // 2] < 20_000


def test_no_page_is_missed(tiny_image: Image, place: Path) -> None:
    check(rounds(place, tiny_image, os.geteuid(), ROUNDS), os.geteuid(), ROUNDS)


def test_no_page_is_missed_without_privileges(tiny_image: Image, place: Path) -> None:
    uid = NOBODY if os.geteuid() == 0 else os.geteuid()
    check(rounds(place, tiny_image, uid, ROUNDS), uid, ROUNDS)


@pytest.mark.soak
@pytest.mark.parametrize("privileged", [True, False])
def test_no_page_is_missed_in_many_rounds(tiny_image: Image, place: Path, privileged: bool) -> None:
    uid = os.geteuid() if privileged or os.geteuid() else NOBODY
    check(rounds(place, tiny_image, uid, ROUNDS_SOAK), uid, ROUNDS_SOAK)
