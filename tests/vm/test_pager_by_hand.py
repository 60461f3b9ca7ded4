"""What somebody with a root shell does to the pager: nothing dead stays behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from diapause.model import ResumeRequest
from diapause.pager.client import Pager
from tests.framework.fake_home import eventually
from tests.framework.pagers import kill_both
from tests.framework.processes import processes_of
from tests.framework.sandbox import WAIT_S, Daemon, Sandbox

pytestmark = pytest.mark.vm

ONDEMAND = ResumeRequest(memory_mode="ondemand")
# In a namespace of its own, since the control directory need not be mounted here.
ABORT = """
dir=/sys/fs/fuse/connections
[ -e $dir/$0 ] || mount -t fusectl none $dir
echo 1 >$dir/$0/abort
"""


def connection_of(daemon: Daemon) -> int:
    """The number of the connection: the minor number of the mount's device."""
    with contextlib.closing(Pager(daemon.home)) as pager:
        return os.minor(os.fstat(pager.pair(start=False).mount).st_dev)


def abort(daemon: Daemon) -> None:
    """Take the connection away, as `/sys/fs/fuse/connections` lets root do."""
    number = str(connection_of(daemon))
    subprocess.run(["unshare", "-m", "sh", "-ec", ABORT, number], check=True, timeout=WAIT_S)


def abort_and_kill(daemon: Daemon) -> None:
    """Both at once: nobody is there who could clear up."""
    number = str(connection_of(daemon))
    kill_both(daemon)
    # Its last descriptors may be gone already, and the connection with them.
    subprocess.run(["unshare", "-m", "sh", "-ec", ABORT, number], check=False, timeout=WAIT_S)


def mounts() -> list[str]:
    """All FUSE mounts that anybody can see."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if line.partition(" - ")[2].startswith("fuse")]


def stuck(daemon: Daemon) -> list[int]:
    """Threads of this home that wait where no signal reaches them."""
    found = []
    for pid in processes_of(daemon.home):
        for task in Path(f"/proc/{pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):
                if task.read_text().rpartition(")")[2].split()[0] == "D":
                    found.append(int(task.parent.name))
    return found


@pytest.mark.parametrize("act", [abort, kill_both, abort_and_kill])
def test_nothing_dead_stays_behind(
    daemon: Daemon, guest: Sandbox, act: Callable[[Daemon], None]
) -> None:
    """The guest ends; its snapshot is resumed on demand at once; no mount, no process in D."""
    before = mounts()
    digests = guest.rewrite()
    snapshot = guest.pause("disk").snapshot
    assert daemon.client.resume(guest.id, ONDEMAND).memory_mode == "ondemand"
    first = guest.vmm_pid
    act(daemon)
    eventually("its end", lambda: guest.state == "failed", WAIT_S)
    assert guest.inspect().reason
    with guest.forked(snapshot) as fork:
        assert fork.digests() == digests
        fork.pause("disk")
        answer = daemon.client.resume(fork.id, ONDEMAND)
        assert answer.memory_mode == "ondemand", answer.notes
        assert fork.digests() == digests
        eventually("the VMM's end", lambda: first not in daemon.vmms(), WAIT_S)
        eventually("no thread in D", lambda: not stuck(daemon), WAIT_S)
        assert mounts() == before
