"""The tour of the README, command by command, as a person types it."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from diapause.store.home import Home
from tests.framework.processes import processes_of
from tests.framework.sources import ROOT

_SECTION = re.compile(r"^## A five-minute tour\n(.*?)^## ", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_BOUND_S = 400.0
_VERBS = (
    "image build", "run", "exec", "exec -i", "pause", "ps", "resume", "snapshot save", "fork",
    "snapshot ls", "snapshot inspect", "inspect", "logs", "cp", "rm",
)  # fmt: skip


def tour() -> list[str]:
    """The blocks of commands, in order."""
    section = _SECTION.search((ROOT / "README.md").read_text())
    assert section is not None, "the README has no tour"
    return _BLOCK.findall(section[1])


def test_the_tour_shows_every_verb() -> None:
    """What it leaves out, nobody finds."""
    commands = "\n".join(tour())
    assert [v for v in _VERBS if not re.search(rf"diapause {v}\b", commands)] == []


@pytest.mark.vm
def test_the_tour(tiny_home: Home) -> None:
    """Each block after the other in one shell that stops at the first failure."""
    blocks = tour()
    marked = "\n".join(f"echo '== {number}'\n{block}" for number, block in enumerate(blocks))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", marked], cwd=ROOT, capture_output=True, text=True,
        timeout=_BOUND_S, env={**os.environ, "DIAPAUSE_HOME": str(tiny_home.root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    shown = re.split(r"^== \d+\n", done.stdout, flags=re.MULTILINE)[1:]
    assert len(shown) == len(blocks) == 6
    start, _, cycle, forks, copied, end = shown
    assert re.search(r"^Linux web \d+\.", start, re.MULTILINE)
    assert re.search(r"^paused [0-9a-f]{16}: frozen ", cycle, re.MULTILINE)
    assert re.search(r"^resumed [0-9a-f]{16}: warm", cycle, re.MULTILINE)
    assert re.search(r"^keep me\n[1-9]\d*$", cycle, re.MULTILINE)
    assert len(set(re.findall(r"^sandbox-[0-9a-f]{8}$", forks, re.MULTILINE))) == 2
    assert len(set(re.findall(r"^[0-9a-f]{32}$", forks, re.MULTILINE))) == 2
    assert '"name": "before"' in forks
    assert len(re.findall(r"^docs/", copied, re.MULTILINE)) == 3
    assert "diapause: ready" in end
    assert len(re.findall(r"^[0-9a-f]{16}$", end, re.MULTILINE)) == 3
    assert end.rstrip().splitlines()[-1].split()[1] == "before"
    assert list(tiny_home.sandboxes.iterdir()) == []
    assert len(processes_of(tiny_home)) == 3, "daemon, pager, keeper, and no guest"
