"""`diapause console` as a person meets it; the fake engine's console shows what is typed."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import termios

import pytest

from tests.framework.fake_home import FakeHome, eventually

HOSTILE = b"\x1b]52;c;b3duZWQ=\x07\x1b]0;title\x07\x1b[2J\xc2\x9b31m\xe2\x80\xae"


@pytest.fixture
def web(place: FakeHome) -> FakeHome:
    place.sandbox("web")
    return place


def test_what_is_typed_goes_there_and_a_key_leaves(web: FakeHome) -> None:
    done = web.run("console", "--tail", "0", "web", given=b"ls\r" + HOSTILE + b"\x1dlost")
    assert done.returncode == 0
    assert (b"ls\r" + HOSTILE).startswith(done.stdout)  # it may leave before all of it is shown
    assert b"lost" not in done.stdout


def test_a_guests_sequences_are_written_out_when_asked(web: FakeHome) -> None:
    process = web.spawn("console", "--escape", "web", stdin=subprocess.PIPE)
    shown = type_and_read(process, b"a\tb" + HOSTILE + b"\n", b"\\u202e")
    assert b"\\x1b]52;c;b3duZWQ=\\x07" in shown
    assert b"\\x9b31m" in shown
    assert not set(shown) & {0x1B, 0x07, 0x9B}


def test_the_log_comes_first(web: FakeHome) -> None:
    web.run("logs", "web")
    directory = web.home.sandbox(web.json("inspect", "web")["id"])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "console.log").write_bytes(b"one\ntwo\nthree\n")
    process = web.spawn("console", "--tail", "2", "web", stdin=subprocess.PIPE)
    assert type_and_read(process, b"typed\n", b"typed\n") == b"two\nthree\ntyped\n"


@pytest.mark.parametrize("end", [b"\x1d", signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_as_it_was_however_it_ends(
    web: FakeHome, end: bytes | signal.Signals
) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    process = web.spawn("console", "web", stdin=theirs, stdout=theirs, stderr=theirs)
    try:
        eventually("raw mode", lambda: termios.tcgetattr(theirs) != before, 60)
        if isinstance(end, bytes):
            os.write(ours, end)
        else:
            process.send_signal(end)
        code = process.wait(60)
        assert code == (0 if isinstance(end, bytes) else 128 + end)
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)


def test_what_it_does_not_do(web: FakeHome) -> None:
    assert web.json("console", "web", code=2)["error"]["code"] == "invalid_request"
    web.run("pause", "web")
    done = web.run("console", "web")
    assert done.returncode == 15
    assert b"running" in done.stderr


def type_and_read(process: subprocess.Popen[bytes], typed: bytes, until: bytes) -> bytes:
    """Type, read until that is shown, and leave."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(typed)
    process.stdin.flush()
    shown = b""
    while until not in shown:
        data = os.read(process.stdout.fileno(), 4096)
        assert data, shown
        shown += data
    process.stdin.write(b"\x1d")
    process.stdin.close()
    assert process.wait(60) == 0
    return shown
