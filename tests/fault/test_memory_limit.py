"""A VMM that its limit of memory ended: the sandbox says so.

The kernel's word for it is a file here; that it says so, and when, is shown by
`tests/vm/test_cgroup_limits.py` with a kernel that ends something.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.catalog import Process, SandboxRecord
from diapause.driver import cgroup
from diapause.driver.cgroup import Delegation
from diapause.sandbox import recovery
from diapause.sandbox.host import Host
from diapause.store.boot import boot_id
from diapause.store.home import Home

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


def leaf(host: Host, place: Path, kills: int) -> None:
    """What the kernel says of the VMM's cgroup."""
    found = place / f"diapause-{host.home.key}-{SANDBOX}.00000000"
    found.mkdir()
    (found / "memory.events").write_text(f"oom {kills}\noom_kill {kills}\n")


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
