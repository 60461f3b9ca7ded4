"""Commands in real guests: streams that outlive a pause, or say that they were cut."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.errors import ExecCut, WrongState
from diapause.units import MIB
from tests.framework.fake_home import eventually
from tests.framework.guest_exec import Follower
from tests.framework.sandbox import Daemon, Sandbox

pytestmark = pytest.mark.vm

BOUND_S = 300.0
CHUNK_BYTES = 1 * MIB
# What a busy daemon or client may grow by, whatever flows through.
RESIDENT_BYTES_MAX = 96 * MIB


def command(daemon: Daemon, *arguments: str) -> list[str]:
    """The real command line, on this home."""
    return [sys.executable, "-m", "diapause", "--home", str(daemon.home.root), *arguments]


def echo(daemon: Daemon, guest: Sandbox, size_bytes: int) -> None:
    """Send bytes through `cat` in the guest and compare what comes back."""
    program = command(daemon, "exec", "-i", guest.id, "--", "cat")
    sent, received = hashlib.blake2b(), hashlib.blake2b()
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        writer = os.fork()
        if writer == 0:
            _write_pattern(process.stdin.fileno(), size_bytes)
            os._exit(0)
        process.stdin.close()
        count = 0
        while data := os.read(process.stdout.fileno(), CHUNK_BYTES):
            received.update(data)
            count += len(data)
            assert resident_bytes(process.pid) < RESIDENT_BYTES_MAX
        assert process.wait(BOUND_S) == 0
        assert os.waitpid(writer, 0)[1] == 0
    for chunk in pattern(size_bytes):
        sent.update(chunk)
    assert count == size_bytes
    assert received.digest() == sent.digest()
    assert resident_bytes(daemon.pid) < 2 * RESIDENT_BYTES_MAX


def pattern(size_bytes: int) -> Iterator[bytes]:
    """Bytes that differ from chunk to chunk."""
    for number in range(size_bytes // CHUNK_BYTES):
        yield hashlib.blake2b(number.to_bytes(8)).digest() * (CHUNK_BYTES // 64)


def _write_pattern(fd: int, size_bytes: int) -> None:
    for chunk in pattern(size_bytes):
        view = memoryview(chunk)
        while view:
            view = view[os.write(fd, view) :]


def resident_bytes(pid: int) -> int:
    """A process's resident memory now; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def test_many_bytes_come_back_equal_in_bounded_memory(daemon: Daemon, guest: Sandbox) -> None:
    """128 MiB through the command line, the daemon, the port and the agent, and back."""
    echo(daemon, guest, 128 * MIB)


@pytest.mark.soak
def test_a_gibibyte_comes_back_equal_in_bounded_memory(daemon: Daemon, guest: Sandbox) -> None:
    """The same with 1 GiB."""
    echo(daemon, guest, 1024 * MIB)


def test_an_exec_with_input_goes_on_after_pauses(daemon: Daemon, guest: Sandbox) -> None:
    """Numbered lines in, the same lines out, with three pauses between."""
    program = command(daemon, "exec", "-i", guest.id, "--", "cat")
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("begin\n")
        process.stdin.flush()
        assert process.stdout.readline() == "begin\n"  # it has begun: now it may be paused
        for number in range(4000):
            process.stdin.write(f"{number}\n")
            if number % 1000 == 500:
                process.stdin.flush()
                guest.pause()
                guest.resume()
        process.stdin.close()
        found = [int(line) for line in process.stdout]
        assert process.wait(BOUND_S) == 0
    assert found == list(range(4000))


def test_input_that_comes_while_paused_arrives_after_the_resume(
    daemon: Daemon, guest: Sandbox
) -> None:
    """Nothing is lost at the kill, whichever side of the socket it lay on."""
    script = "echo begun; exec sha256sum"
    program = command(daemon, "exec", "-i", guest.id, "--", "sh", "-c", script)
    data = os.urandom(3 * MIB)
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.stdin.write(data[:MIB])
        process.stdin.flush()
        guest.pause()
        writer = os.fork()
        if writer == 0:
            os.write(process.stdin.fileno(), data[MIB : MIB + 65536])
            os._exit(0)
        guest.resume()
        assert os.waitpid(writer, 0)[1] == 0
        process.stdin.write(data[MIB + 65536 :])
        process.stdin.close()
        digest = process.stdout.read().split()[0].decode()
        assert process.wait(BOUND_S) == 0
    assert digest == hashlib.sha256(data).hexdigest()


def test_in_a_fork_the_originals_sessions_are_detached(daemon: Daemon, guest: Sandbox) -> None:
    """Their processes go on, their input is at its end, their output goes nowhere."""
    script = "cat; i=0; while :; do i=$((i+1)); echo $i; echo $i >/tmp/after; usleep 20000; done"
    stream = guest.stream("sh", "-c", script)  # its stdin is closed at once: cat ends
    followed = Follower(stream)
    eventually("output", lambda: len(followed.lines) > 3)
    with guest.forked() as fork:
        first = int(fork.sh("cat /tmp/after"))
        eventually("the fork's process", lambda: int(fork.sh("cat /tmp/after || echo 0")) > first)
        assert fork.sh("echo new session").strip() == "new session"
    before = len(followed.lines)
    eventually("the original's output", lambda: len(followed.lines) > before + 3)
    followed.close()
    values = [int(line) for line in followed.lines]
    assert values == list(range(1, len(values) + 1))


def test_input_of_a_detached_session_is_at_its_end(daemon: Daemon, guest: Sandbox) -> None:
    """A `cat` that waits for the original's input ends in the fork, and only there."""
    script = "cat >/dev/null; echo over >/tmp/over; sleep 1000"
    program = command(daemon, "exec", "-i", guest.id, "--", "sh", "-c", script)
    with subprocess.Popen(program, stdin=subprocess.PIPE) as process:
        eventually("the cat", lambda: "cat" in guest.sh("ps -o comm"))
        with guest.forked() as fork:
            eventually("its end", lambda: fork.exec("test", "-e", "/tmp/over").returncode == 0)
        assert guest.exec("test", "-e", "/tmp/over").returncode == 1
        process.kill()


def test_a_cut_stream_is_125_with_its_cause(daemon: Daemon, guest: Sandbox) -> None:
    """A removed sandbox, a killed daemon: never silently short."""
    program = command(daemon, "exec", guest.id, "--", "sh", "-c", "echo begun; sleep 1000")
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"begun\n"
        guest.remove()
        assert process.wait(BOUND_S) == 125
        assert b"cut" in process.stderr.read()


def test_the_daemons_death_cuts_streams_and_leaves_processes(
    daemon: Daemon, guest: Sandbox
) -> None:
    """The command goes on in the guest; the next daemon reaches it."""
    followed = Follower(guest.stream("sh", "-c", "echo $$ >/tmp/pid; echo begun; sleep 1000"))
    eventually("output", lambda: followed.lines == ["begun"])
    daemon.kill()
    eventually("the cut", lambda: isinstance(followed.failure, (ExecCut, ConnectionError)))
    assert guest.sh('kill -0 "$(cat /tmp/pid)" && echo there').strip() == "there"


def test_a_terminal_has_its_size_and_passes_signals(daemon: Daemon, guest: Sandbox) -> None:
    """`exec -t` through `script`, which gives it a terminal on this side too."""
    inner = " ".join(command(daemon, "exec", "-it", guest.id, "--", "stty", "size"))
    done = subprocess.run(
        ["script", "-qec", f"stty rows 37 cols 91; {inner}", "/dev/null"],
        capture_output=True, text=True, timeout=BOUND_S, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done
    assert "37 91" in done.stdout


def test_codes_directories_and_background_processes(daemon: Daemon, guest: Sandbox) -> None:
    """What scripts rely on."""
    assert guest.exec("sh", "-c", "exit 7").returncode == 7
    assert guest.exec("sh", "-c", "kill -9 $$").returncode == 137
    assert guest.exec("/no/such/program").returncode == 127
    assert guest.exec("pwd").stdout == b"/\n"
    guest.exec("sh", "-c", "(sleep 1000 & echo $! >/tmp/background)")
    assert guest.exec("sh", "-c", 'kill -0 "$(cat /tmp/background)"').returncode == 0


def test_exec_names_the_verb_to_use(daemon: Daemon, guest: Sandbox) -> None:
    """On a sandbox that does not run."""
    guest.pause()
    with pytest.raises(WrongState, match="paused") as refused:
        guest.exec("true")
    assert "resume" in refused.value.advice
    program = command(daemon, "exec", guest.id, "--", "true")
    done = subprocess.run(program, capture_output=True, timeout=BOUND_S, check=False)
    assert done.returncode == 125
    assert b"diapause resume" in done.stderr
