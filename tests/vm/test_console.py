"""The console of real guests: bounded, and typed on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from diapause.limits import CONSOLE_LOG_BYTES_MAX
from diapause.units import MIB
from tests.framework.fake_home import eventually
from tests.framework.sandbox import Sandbox

pytestmark = pytest.mark.vm

BOUND_S = 120.0


def log_bytes(guest: Sandbox) -> list[int]:
    """Sizes of its console logs."""
    directory = guest.daemon.home.sandbox(guest.id)
    return [path.stat().st_size for path in directory.glob("console.log*")]


def test_a_flooded_console_begins_anew_and_the_guest_goes_on(guest: Sandbox) -> None:
    path = guest.daemon.home.sandbox(guest.id) / "console.log"
    # Most of the flood is written here: a guest's serial port is slow under emulation.
    with path.open("ab") as log:
        for _ in range(CONSOLE_LOG_BYTES_MAX // MIB):
            log.write(os.urandom(MIB // 2).hex().encode())
    guest.sh("i=0; while [ $i -lt 200 ]; do echo flood $i >/dev/ttyS0; i=$((i+1)); done")
    eventually("the rotation", lambda: path.with_name("console.log.1").exists(), BOUND_S)
    guest.sh("echo the last word >/dev/ttyS0")
    eventually("what came after it", lambda: b"the last word" in path.read_bytes(), BOUND_S)
    assert path.stat().st_size < MIB
    assert sum(log_bytes(guest)) < 2 * CONSOLE_LOG_BYTES_MAX
    tail = b"".join(guest.daemon.client.logs(guest.id, tail=5))
    assert tail.rstrip().endswith(b"the last word")


def test_a_console_is_typed_on_and_goes_with_a_pause(guest: Sandbox) -> None:
    program = [sys.executable, "-m", "diapause", "--home", str(guest.daemon.home.root), "console"]
    guest.in_background(
        "exec 3<>/dev/ttyS0; stty -F /dev/ttyS0 -echo; echo reads >&3;"
        " while read line <&3; do echo got $line >&3; done"
    )
    eventually("a reader", lambda: b"reads" in logs(guest), BOUND_S)
    with subprocess.Popen(
        [*program, guest.id], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        shown = b""
        while b"got hello" not in shown:
            data = os.read(process.stdout.fileno(), 4096)
            assert data, shown
            shown += data
        second = subprocess.run([*program, guest.id], capture_output=True, timeout=BOUND_S)
        assert second.returncode == 2
        assert b"another client" in second.stderr
        guest.pause()
        assert process.wait(BOUND_S) == 125
    guest.resume()
    with subprocess.Popen(
        [*program, guest.id], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.communicate(b"again\n\x1d", timeout=BOUND_S)
        assert process.returncode == 0
    eventually("the answer", lambda: b"got again" in logs(guest), BOUND_S)


def logs(guest: Sandbox) -> bytes:
    """All that its console said."""
    return b"".join(guest.daemon.client.logs(guest.id))
