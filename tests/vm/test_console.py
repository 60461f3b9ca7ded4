"""The console of real guests: bounded, and typed on."""

from __future__ import annotations

import os

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
