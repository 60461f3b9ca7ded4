"""`make demo`: it shows what it says on a real guest, and says so when a value is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diapause.store.home import Home
from tests.framework.processes import processes_of
from tests.framework.sources import ROOT
from tools import demo

_BOUND_S = 500.0


@pytest.mark.vm
def test_the_demo_on_a_real_guest(tiny_home: Home) -> None:
    """Its table, its exit code, and what it leaves: the image, and no process."""
    done = subprocess.run(
        [sys.executable, "tools/demo.py"], cwd=ROOT, capture_output=True, text=True,
        timeout=_BOUND_S, env={**os.environ, "DIAPAUSE_DEMO_HOME": str(tiny_home.root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    head, *lines = [line.split("  ") for line in done.stdout.splitlines()]
    assert [word.strip().lower() for word in head if word] == list(demo.COLUMNS)
    rows = {cells[0]: [cell.strip() for cell in cells[1:] if cell] for cells in lines}
    assert list(rows) == [
        "image, already there", "boot", "pause", "resume", "save, running", "fork, 4 ways",
        "pause fork 1", "resume fork 1",
    ]  # fmt: skip
    for pause, resume in (("pause", "resume"), ("pause fork 1", "resume fork 1")):
        assert rows[pause][4] == rows[resume][4]
        assert int(rows[resume][5]) == int(rows[pause][4]) + 1, "the next number, no other"
    for capture in ("pause", "save, running", "pause fork 1"):
        assert float(rows[capture][1]) > 0
        assert int(rows[capture][2]) > 0
        assert rows[capture][3].endswith("iB")
    assert processes_of(tiny_home) == []
    assert list(tiny_home.sandboxes.iterdir()) == []
    assert list(tiny_home.flat.iterdir()) == []
    assert (tiny_home.image("tiny") / "manifest.json").exists()


@pytest.mark.parametrize(
    ("text", "at_least", "fault"),
    [
        ("1\n2\n3\n", 3, None),
        ("1\n2\n3\n", 1, None),
        ("1\n2\n4\n", 3, "lost: 2 is followed by 4"),
        ("1\n2\n2\n3\n", 3, "repeated: 2 is followed by 2"),
        ("1\n2\n3\n1\n2\n", 3, "repeated: 3 is followed by 1"),
        ("2\n3\n", 2, "lost: 0 is followed by 2"),
        ("1\n2\n3", 3, "line 3 behind 2 is no number"),
        ("1\n\n3\n", 3, "line 2 behind 1 is no number"),
        ("1\nx\n", 2, "line 2 behind 1 is no number"),
        ("1\n2\n", 3, "ends at 2 and had reached 3"),
        ("", 1, "ends at 0 and had reached 1"),
    ],
)
def test_a_sequence_is_checked_whole(text: str, at_least: int, fault: str | None) -> None:
    """A gap, a repeat, a torn line, an end too early: each is told from a good count."""
    found = demo.faults(demo.parse_numbers(text), at_least)
    if fault is None:
        assert found == []
    else:
        assert len(found) == 1
        assert fault in found[0]


@pytest.mark.parametrize(("file", "code"), [("1\n2\n3\n", 0), ("1\n3\n", 1), ("1\n2\n", 1)])
def test_a_false_sequence_ends_the_demo_with_1(
    home: Home, monkeypatch: pytest.MonkeyPatch, file: str, code: int
) -> None:
    """The whole program but for the guests: a lost number, and a fork that is behind its save."""

    def tell(story: demo.Demo) -> None:
        story.guests.append(demo.Guest("a guest", "0123456789abcdef", reached=3))
        story.add(demo.Step("nothing", 1.0))

    def read(_home: Home, _sandbox: str, *_command: str) -> str:
        return file

    monkeypatch.setenv("DIAPAUSE_DEMO_HOME", str(home.root))
    monkeypatch.setattr(demo, "tell_story", tell)
    monkeypatch.setattr(demo, "run_in_guest", read)
    assert demo.main() == code


def test_two_demos_do_not_share_a_home(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second would clear what the first is using."""
    monkeypatch.setenv("DIAPAUSE_DEMO_HOME", str(home.root))
    with demo.only_demo(home):
        assert demo.main() == 1
    assert "another demo" in capsys.readouterr().err


def test_the_demos_home_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never the home that the command line uses: it is cleared."""
    monkeypatch.delenv("DIAPAUSE_DEMO_HOME", raising=False)
    monkeypatch.delenv("DIAPAUSE_HOME", raising=False)
    for data in ("", "/somewhere/data"):
        monkeypatch.setenv("XDG_DATA_HOME", data)
        assert demo.demo_home().root.name == "diapause-demo"
        assert demo.demo_home().root != Home.at().root
    assert demo.demo_home().root == Path("/somewhere/data/diapause-demo")
