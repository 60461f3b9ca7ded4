"""A VMM that its limit of memory ended: the sandbox says so.

The kernel's word for it is a file here; that it says so, and when, is shown by
`tests/vm/test_cgroup_limits.py` with a kernel that ends something.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.catalog import Process, SandboxRecord
from diapause.driver import cgroup
from diapause.driver.cgroup import Delegation, Leaf
from diapause.driver.process import process_ref
from diapause.sandbox import recovery
from diapause.sandbox.guests import Guest
from diapause.sandbox.host import Host, settle_end
from diapause.store.boot import boot_id
from diapause.store.home import Home
from tests.framework import captured_home

SANDBOX = "1" * 16


@pytest.fixture
def host(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A home with one sandbox that ran when its daemon died, in a cgroup."""
    given = Delegation(tmp_path, ("memory", "pids"))
    monkeypatch.setattr(cgroup, "delegation", lambda: given)
    loop = asyncio.new_event_loop()
    made = Host(home, loop)
    made.catalog.put_sandbox(
        SandboxRecord(
            id=SANDBOX, name=None, state="running", created_at="2026-01-01T00:00:00.000Z",
            image="tiny", memory_bytes=1 << 27, cpus=1, disks_bytes=[], hostname="a",
            machine_id="c" * 32, process=Process(1 << 22, 1, boot_id()),
        )
    )  # fmt: skip
    yield made
    made.close()
    loop.close()


class DaemonKilled(BaseException):
    """Nothing of the daemon runs after this."""


def leaf(host: Host, place: Path, kills: int) -> Path:
    """What the kernel says of the VMM's cgroup."""
    found = place / f"diapause-{host.home.key}-{SANDBOX}.00000000"
    found.mkdir()
    (found / "memory.events").write_text(f"oom {kills}\noom_kill {kills}\n")
    return found


@pytest.mark.parametrize("kills", [0, 1])
def test_a_sandbox_says_that_its_limit_ended_it(host: Host, tmp_path: Path, kills: int) -> None:
    """Found by recovery; without it, no more is said than is known."""
    leaf(host, tmp_path, kills)
    recovery.recover(host)
    record = host.catalog.sandbox(SANDBOX)
    assert record is not None
    assert record.error is not None
    cause = "the VMM was killed by its memory limit" if kills else "the VMM has ended"
    assert (record.state, record.reason) == ("failed", cause)
    assert record.error["code"] == "guest_lost"
    assert cause in record.error["message"]


def test_what_the_guest_did_itself_is_not_the_limits(host: Host, tmp_path: Path) -> None:
    """A guest that switched itself off is stopped, whatever was killed before that."""
    leaf(host, tmp_path, 1)
    record = host.catalog.sandbox(SANDBOX)
    assert record is not None
    host.end(record, "guest-shutdown")
    assert (record.state, record.reason, record.error) == ("stopped", "guest-shutdown", None)


def remove_whole(leaf: Leaf, bound_s: float = 0.0) -> bool:
    """A kernel's leaf goes with its files."""
    shutil.rmtree(leaf.path)
    return True


@contextlib.contextmanager
def watched(host: Host) -> Iterator[Guest]:
    """The sandbox's guest, with a process in the place of its VMM."""
    with subprocess.Popen(["sleep", "600"]) as vmm:
        process, record = process_ref(vmm.pid), host.catalog.sandbox(SANDBOX)
        assert process is not None
        assert record is not None
        record.process = Process(process.pid, process.start_ticks, process.boot_id)
        host.catalog.put_sandbox(record)
        guest = Guest(SANDBOX, host.loop)
        guest.machine = host.driver.adopt(
            SANDBOX, process, host.memory_file(record), host.shape(record)
        )
        host.guests[SANDBOX] = guest
        try:
            yield guest
        finally:
            vmm.kill()


@pytest.mark.parametrize("kills", [0, 1])
def test_a_daemon_killed_before_its_row_leaves_the_cause_to_the_next(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    """A leaf that alone knows the cause stays until a row says it; any other goes at once."""
    monkeypatch.setattr(Leaf, "remove", remove_whole)
    found = leaf(host, tmp_path, kills)

    def killed(*_: object) -> None:
        raise DaemonKilled

    with watched(host) as guest:
        with monkeypatch.context() as patch:
            patch.setattr(host.catalog, "put_sandbox", killed)
            with pytest.raises(DaemonKilled):
                settle_end(host, guest, "the VMM has ended")
        assert found.exists() == bool(kills)
    with captured_home.host_of(host.home) as after:
        recovery.recover(after)
        record = after.catalog.sandbox(SANDBOX)
    assert record is not None
    cause = "the VMM was killed by its memory limit" if kills else "the VMM has ended"
    assert (record.state, record.reason) == ("failed", cause)
    assert not found.exists()


def test_a_row_that_says_so_takes_the_leaf_with_it(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It need not wait for the next daemon."""
    monkeypatch.setattr(Leaf, "remove", remove_whole)
    found = leaf(host, tmp_path, 1)
    with watched(host) as guest:
        settle_end(host, guest, "the VMM has ended")
    record = host.catalog.sandbox(SANDBOX)
    assert record is not None
    assert record.reason == "the VMM was killed by its memory limit"
    assert not found.exists()
