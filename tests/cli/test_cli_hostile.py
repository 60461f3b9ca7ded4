"""Nothing that a guest or a row of the catalog says controls the terminal of a person."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import unicodedata

import pytest

from tests.framework.hostile_answers import VERBS, every_error

BOUND_S = 300
OUR_BOLD = re.compile(r"\x1b\[[01]m")  # of a table's head; no hostile text has it
Shown = dict[str, list[str]]


@pytest.fixture(scope="module")
def shown() -> Shown:
    """What each run showed on a terminal, by what was run."""
    ours, theirs = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.framework.hostile_answers"],
        stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
        env={**os.environ, "COLUMNS": "4000", "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    pieces = []
    with contextlib.suppress(OSError):  # the terminal's other end is gone
        while piece := os.read(ours, 65536):
            pieces.append(piece)
    os.close(ours)
    assert program.wait(BOUND_S) == 0, b"".join(pieces)[-3000:]
    text = b"".join(pieces).decode().replace("\r\n", "\n")
    found: Shown = {}
    before = 0
    for mark in re.finditer(r"^== (.+) (-?\d+)$\n", text, re.MULTILINE):
        found.setdefault(mark[1], []).append(text[before : mark.start()])
        before = mark.end()
    return found


def test_no_output_of_any_verb_controls_a_terminal(shown: Shown) -> None:
    bad = {
        what: found
        for what, texts in shown.items()
        if (found := {c for c in OUR_BOLD.sub("", "".join(texts)) if controls(c)})
    }
    # A tab only moves the cursor on, and consoles are full of them.
    assert bad == {"logs x": {"\t"}}


def controls(character: str) -> bool:
    return character != "\n" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def test_every_verb_and_every_error_was_shown(shown: Shown) -> None:
    assert {verb: len(shown[verb]) for verb in VERBS} == dict.fromkeys(VERBS, 2)
    assert {error.code for error in every_error()} <= shown.keys()
    assert len(every_error()) >= 40


@pytest.mark.parametrize(
    "verb", ["ps", "inspect x", "snapshot ls", "snapshot tree", "events", "logs x", "usage"]
)
def test_what_was_hostile_is_written_out_where_it_stood(verb: str, shown: Shown) -> None:
    text = "".join(shown[verb])
    for sequence in (r"52;c;b3duZWQ=", r"0;owned", r"[2J", r"u202e"):
        assert sequence in text
    assert r"\x1b]52" in text or r"\u001b]52" in text
