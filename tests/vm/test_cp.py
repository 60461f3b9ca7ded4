"""Files and trees into real guests and out of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diapause.units import MIB
from tests.framework.sandbox import Daemon, Sandbox
from tests.framework.trees import make_tree, same_tree

pytestmark = pytest.mark.vm

BOUND_S = 300.0


def cp(daemon: Daemon, *words: str, code: int = 0) -> subprocess.CompletedProcess[bytes]:
    """The real command line, on this home."""
    command = [sys.executable, "-m", "diapause", "--home", str(daemon.home.root), "cp", *words]
    done = subprocess.run(command, capture_output=True, timeout=BOUND_S)
    assert done.returncode == code, done
    return done


def test_a_tree_goes_in_and_comes_back_as_it_was(
    daemon: Daemon, guest: Sandbox, tmp_path: Path
) -> None:
    tree = make_tree(tmp_path / "tree")
    done = cp(daemon, "--json", str(tree), f"{guest.id}:/tmp")
    assert json.loads(done.stdout)["entries"] > 5
    assert guest.sh("stat -c %a /tmp/tree/private").strip() == "600"
    assert guest.sh("readlink /tmp/tree/link").strip() == "../../outside"
    cp(daemon, f"{guest.id}:/tmp/tree", str(tmp_path / "back"))
    same_tree(tree, tmp_path / "back")


def test_a_tree_outlives_a_pause_in_the_guest(
    daemon: Daemon, guest: Sandbox, tmp_path: Path
) -> None:
    source = tmp_path / "data"
    source.write_bytes(os.urandom(3 * MIB))
    cp(daemon, str(source), f"{guest.id}:/tmp/kept")
    guest.pause()
    done = cp(daemon, f"{guest.id}:/tmp/kept", str(tmp_path / "no"), code=15)
    assert b"resume" in done.stderr
    guest.resume()
    cp(daemon, f"{guest.id}:/tmp/kept", str(tmp_path / "again"))
    assert (tmp_path / "again").read_bytes() == source.read_bytes()


def test_what_is_not_there_is_named(daemon: Daemon, guest: Sandbox, tmp_path: Path) -> None:
    done = cp(daemon, f"{guest.id}:/nowhere", str(tmp_path), code=53)
    assert b"/nowhere" in done.stderr
    done = cp(daemon, str(tmp_path / "nothing"), f"{guest.id}:/", code=53)
    assert b"nothing" in done.stderr
    done = cp(daemon, f"{guest.id}:/dev/null", str(tmp_path), code=53)
    assert b"device" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_older_agent_is_said_to_be_one(daemon: Daemon, guest: Sandbox, tmp_path: Path) -> None:
    # The name alone leads to the agent that runs, so an old one is played by a script.
    guest.sh("printf '#!/bin/sh\\nexit 2\\n' >/tmp/diapause-agent; chmod +x /tmp/diapause-agent")
    assert guest.exec("/tmp/diapause-agent", "pack").returncode == 2
    assert b"pack needs" in guest.exec("diapause-agent", "pack").stderr
