"""A guest whose memory and disk say of each other whether they are of one instant.

A loop counts: each number is written to the disk at one place and synced, then appended to a file
in memory. At any instant the disk holds the last number of the memory or the one after it. A
snapshot whose disk is older or newer than its memory, or that lost a page of either, can't.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.framework.fake_home import eventually
from tests.framework.sandbox import COUNTER, WAIT_S

if TYPE_CHECKING:
    from tests.framework.sandbox import Sandbox

_DISK, _PID = "/data/coupled", "/tmp/coupled.pid"
_LOOP = (
    f"echo $$ >{_PID}; i=0; while :; do i=$((i+1)); "
    f"printf '%-511d\\n' $i | dd of={_DISK} bs=512 conv=notrunc,fsync 2>/dev/null; "
    f"echo $i >>{COUNTER}; usleep 50000; done"
)
_READ = (
    f"kill -STOP $(cat {_PID}); echo 3 >/proc/sys/vm/drop_caches; "
    f"cat {COUNTER}; echo; head -c 512 {_DISK}; kill -CONT $(cat {_PID})"
)


def start(guest: Sandbox) -> None:
    """Begin to count."""
    guest.in_background(_LOOP)
    eventually("the first number", lambda: guest.exec("test", "-s", COUNTER).returncode == 0)


def check(guest: Sandbox) -> int:
    """The last number in memory; fails where memory or disk lost one, or they are of two times."""
    memory, _, disk = guest.sh(_READ).rpartition("\n\n")
    values = [int(line) for line in memory.split()]
    assert values == list(range(1, len(values) + 1)), f"the memory lost a number: {values[-5:]}"
    [found] = disk.split()
    assert int(found) in (len(values), len(values) + 1), f"memory {len(values)}, disk {found}"
    return len(values)


def goes_on(guest: Sandbox, value: int) -> None:
    """Wait until it has counted beyond this value, whole."""
    eventually(f"a number beyond {value}", lambda: check(guest) > value, WAIT_S)
