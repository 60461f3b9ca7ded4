"""`diapause exec` as a person or a script meets it: never wrapped, never silently short."""

from __future__ import annotations

import hashlib
import os
import pty
import signal
import subprocess
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diapause.units import MIB
from tests.framework.fake_engine import PATTERN
from tests.framework.fake_home import FakeHome, eventually, gone, peak_bytes

BIG_BYTES = 256 * MIB
# What one end may hold at its peak: the interpreter and its libraries are most of it.
RESIDENT_BYTES_MAX = 96 * MIB


@pytest.fixture
def web(place: FakeHome) -> FakeHome:
    place.sandbox("web")
    return place


def test_streams_and_exit_code_are_the_commands_own(web: FakeHome) -> None:
    done = web.run("exec", "web", "--", "exit", "42")
    assert (done.returncode, done.stdout, done.stderr) == (42, b"out\n", b"err\n")


def test_the_double_dash_is_optional_and_options_after_it_are_the_commands(web: FakeHome) -> None:
    assert b"['--json', '-t']" in web.run("exec", "web", "show", "--json", "-t").stdout
    assert b"['--', '-x']" in web.run("--json", "exec", "web", "--", "show", "--", "-x").stdout


def test_directory_and_environment(web: FakeHome) -> None:
    done = web.run("exec", "-w", "/data", "-e", "A=1", "-e", "B=x=y", "web", "--", "show")
    assert done.stdout == b"/data A=1,B=x=y []\n"
    assert web.run("exec", "-e", "A", "web", "--", "show").returncode == 2


def test_without_i_the_command_gets_no_input(web: FakeHome) -> None:
    assert web.run("exec", "-i", "web", "--", "cat", given=b"hello").stdout == b"hello"
    stdin = web.spawn("exec", "web", "--", "exit", "0", stdin=subprocess.PIPE)
    assert stdin.wait(30) == 0


def test_input_from_a_file_and_from_a_closed_descriptor(web: FakeHome) -> None:
    path = web.home.root / "input"
    path.write_bytes(PATTERN * 3)
    with path.open("rb") as file:
        process = web.spawn("exec", "-i", "web", "--", "cat", stdin=file)
        assert process.communicate(timeout=30)[0] == PATTERN * 3
    shell = 'exec "$@" <&-'
    words = [*web.command("exec", "-i", "web", "--", "cat")]
    done = subprocess.run(["sh", "-c", shell, "sh", *words], capture_output=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, b"")


def test_a_lot_both_ways_is_byte_equal_in_bounded_memory(web: FakeHome) -> None:
    process = web.spawn("exec", "-i", "web", "--", "cat", stdin=subprocess.PIPE)
    feeder = threading.Thread(target=_feed, args=(process, BIG_BYTES))
    feeder.start()
    assert process.stdout is not None
    got, size, peak = hashlib.blake2b(), 0, 0
    while chunk := process.stdout.read(1 * MIB):
        got.update(chunk)
        size += len(chunk)
        if size > BIG_BYTES - 2 * MIB and not peak:
            peak = peak_bytes(process.pid)
    feeder.join(30)
    assert process.wait(30) == 0
    assert size == BIG_BYTES
    assert got.hexdigest() == _digest(BIG_BYTES)
    assert 0 < peak < RESIDENT_BYTES_MAX
    assert peak_bytes(web.daemon_pid) < RESIDENT_BYTES_MAX


def test_output_that_nobody_reads_waits_in_bounded_memory(web: FakeHome) -> None:
    process = web.spawn("exec", "web", "--", "source", str(BIG_BYTES))
    assert process.stdout is not None
    assert process.stdout.read(10) == PATTERN[:10]
    # A signal gets through beside the output that is stuck; the fake source does not mind it.
    process.send_signal(signal.SIGTERM)
    rest = hashlib.blake2b(PATTERN[:10])
    assert peak_bytes(web.daemon_pid) < RESIDENT_BYTES_MAX
    assert peak_bytes(process.pid) < RESIDENT_BYTES_MAX
    while chunk := process.stdout.read(1 * MIB):
        rest.update(chunk)
    assert process.wait(30) == 0
    assert rest.hexdigest() == _digest(BIG_BYTES)


@pytest.mark.parametrize("word", ["cut", "short"])
def test_a_cut_stream_is_125_with_its_cause(web: FakeHome, word: str) -> None:
    done = web.run("exec", "web", "--", word)
    assert (done.returncode, done.stdout) == (125, b"half")
    assert done.stderr.startswith(b"diapause: The command's stream was cut: ")


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["exec", "nope", "--", "cat"], b"no sandbox 'nope'"),
        (["--json", "exec", "nope", "--", "cat"], b"no sandbox 'nope'"),
        (["exec", "a/b", "--", "cat"], b"no slash"),
        (["exec", "web", "--", "x" * 130_000 + "y"], b"exceed"),
        (["exec", "web", "--", "broken"], b"a defect"),
    ],
)
def test_a_stream_that_never_began_is_125(web: FakeHome, words: list[str], cause: bytes) -> None:
    if b"exceed" in cause:
        words = [*words[:-1], *(["z" * 100_000] * 2)]
    done = web.run(*words)
    assert (done.returncode, done.stdout) == (125, b"")
    assert cause in done.stderr


def test_a_paused_sandbox_names_the_verb_to_use(web: FakeHome) -> None:
    web.json("pause", "web")
    done = web.run("exec", "web", "--", "cat")
    assert done.returncode == 125
    assert b"diapause resume ab0001" in done.stderr


def test_a_daemon_that_dies_under_a_stream_is_125(web: FakeHome) -> None:
    process = web.spawn("exec", "web", "--", "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    os.kill(web.daemon_pid, signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 125
    assert b"the daemon went away" in err


def test_a_daemon_that_is_stopped_ends_its_streams_with_125(web: FakeHome) -> None:
    process = web.spawn("exec", "web", "--", "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    pid = web.daemon_pid
    os.kill(pid, signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 125
    assert b"was cut" in err
    eventually("the daemon's end", lambda: gone(pid))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on(web: FakeHome, number: int) -> None:
    process = web.spawn("exec", "web", "--", "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    process.send_signal(number)
    assert process.wait(30) == 128 + number


def test_a_signal_passes_input_that_is_stuck(web: FakeHome) -> None:
    process = web.spawn("exec", "-i", "web", "--", "wait", stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    feeder = threading.Thread(target=_feed, args=(process, 64 * MIB))
    feeder.start()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    feeder.join(30)
    assert not feeder.is_alive()


def test_a_reader_that_left_is_sigpipe_for_the_command(web: FakeHome) -> None:
    process = web.spawn("exec", "web", "--", "yes")
    assert process.stdout is not None
    assert process.stdout.read(4) == b"y\ny\n"
    process.stdout.close()
    assert process.wait(30) == 128 + signal.SIGPIPE
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_output_that_can_not_be_written_is_125(web: FakeHome) -> None:
    with Path("/dev/full").open("wb") as full:
        process = web.spawn("exec", "web", "--", "exit", "0", stdout=full)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 125
    assert b"No space left" in err


@contextmanager
def on_terminal(place: FakeHome, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    master, terminal = pty.openpty()
    termios.tcsetwinsize(master, (30, 100))
    process = place.spawn(
        "exec", "-it", "web", "--", *words, stdin=terminal, stdout=terminal, start_new_session=True
    )
    try:
        yield process, master, terminal
    finally:
        process.kill()
        process.wait(30)
        os.close(master)
        os.close(terminal)


def _is_raw(terminal: int) -> bool:
    return not termios.tcgetattr(terminal)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)


def test_a_terminal_is_raw_while_the_command_runs_and_follows_its_size(web: FakeHome) -> None:
    with on_terminal(web, "size") as (process, master, terminal):
        before = termios.tcgetattr(terminal)
        eventually("raw mode", lambda: _is_raw(terminal))
        assert os.read(master, 100) == b"30x100\n"
        termios.tcsetwinsize(master, (50, 132))
        process.send_signal(signal.SIGWINCH)
        assert process.wait(30) == 0
        assert os.read(master, 100) == b"50x132\n"
        assert termios.tcgetattr(terminal) == before


def test_keys_go_to_the_command_and_not_to_us(web: FakeHome) -> None:
    with on_terminal(web, "cat") as (process, master, terminal):
        eventually("raw mode", lambda: _is_raw(terminal))
        os.write(master, b"a\x03\x1a\x1c")
        assert os.read(master, 100) == b"a\x03\x1a\x1c"
        assert process.poll() is None


@pytest.mark.parametrize("word", ["cut", "wait"])
def test_the_terminal_is_restored_on_every_way_out(web: FakeHome, word: str) -> None:
    with on_terminal(web, word) as (process, master, terminal):
        if word == "wait":
            eventually("raw mode", lambda: _is_raw(terminal))
            assert os.read(master, 100) == b"waiting\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 143
        else:
            assert process.wait(30) == 125
        assert not _is_raw(terminal)


def _feed(process: subprocess.Popen[bytes], size: int) -> None:
    assert process.stdin is not None
    try:
        for _ in range(size // len(PATTERN)):
            process.stdin.write(PATTERN)
        process.stdin.close()
    except BrokenPipeError:
        return


def _digest(size: int) -> str:
    made = hashlib.blake2b()
    for _ in range(size // len(PATTERN)):
        made.update(PATTERN)
    return made.hexdigest()
