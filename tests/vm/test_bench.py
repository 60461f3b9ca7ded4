"""`bench` on real guests: figures of all that was asked for, and nothing left of it, however it
ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from diapause.daemon.client import Client
from diapause.errors import Cancelled, DaemonUnreachable, OperationNotFound, PagerUnavailable
from diapause.guest.images import Image
from diapause.model import BenchGroup, BenchRequest
from diapause.pager import process
from diapause.sandbox.bench import cycle
from diapause.sandbox.engine import Engine
from diapause.store.home import Home
from tests.framework.fake_home import eventually
from tests.framework.leftovers import nothing_left
from tests.framework.processes import processes_of
from tests.framework.sandbox import WAIT_S, Aside, Daemon, real_home
from tests.vm.test_contract import ask

pytestmark = pytest.mark.vm


@pytest.fixture
def daemon(tiny_image: Image) -> Iterator[Daemon]:
    """A home of its own: what is left of it is counted."""
    with real_home(tiny_image) as made:
        yield made


def check_nothing_is_left(daemon: Daemon) -> None:
    """The daemon, and no other process; the image, and no file of a guest."""
    nothing_left(daemon.home)
    assert list(daemon.home.tmp.iterdir()) == []
    assert daemon.client.sandboxes(everything=True) == []
    eventually("the end of all others", lambda: processes_of(daemon.home) == [daemon.pid], WAIT_S)


@contextlib.contextmanager
def measuring(daemon: Daemon, group: BenchGroup, step: str) -> Iterator[tuple[Aside, str]]:
    """The verb has come to a step; how it ends, and its operation."""
    operations: list[str] = []

    def attend(_: Client, operation: str) -> contextlib.AbstractContextManager[None]:
        operations.append(operation)
        return nullcontext()

    daemon.client.sandboxes()  # it runs
    client = Client(daemon.home, None, attend=attend)
    aside = Aside(lambda: client.bench(BenchRequest(groups=[group], rounds=20)))

    def come() -> bool:
        try:
            said = daemon.client.operation(operations[0]).step if operations else None
        except OperationNotFound:  # on its way
            return False
        return said is not None and said.startswith(step)

    eventually(f"its coming to {step}", lambda: aside.ends_within(0) or come(), WAIT_S)
    assert not aside.ends_within(0), aside.failure
    yield aside, operations[0]


def test_a_guest_with_memory_in_use_is_measured_on_demand(daemon: Daemon) -> None:
    answer = ask(daemon, "bench", "pager", "--rounds", "2")
    rows = {(row["name"], row["peer"] and row["peer"]["name"]): row for row in answer["rows"]}
    medians = {name: row["median"] for (name, _), row in rows.items()}
    assert len(rows) == len(answer["rows"])
    assert {row["group"] for row in rows.values()} == {"pager"}
    assert all(1 <= len(row["values"]) <= 2 and row["median"] > 0 for row in rows.values())
    resumed = rows["resume on demand, with a trace", "copied from a flat file that is there"]
    assert resumed["ratio"] == resumed["median"] / resumed["peer"]["median"]
    # What the guest read, 32 MiB, was asked for without a trace and brought ahead with one.
    assert medians["and touched by it"] <= medians["brought ahead of the guest"]
    assert medians["and touched by it"] > 32 * 256 / 2
    # A read is of 1 MiB at most; a round sees nothing of what the one before read in 4 KiB.
    reads = rows["reads from builds on this host, without a trace", None]
    assert all(32 <= count < 1000 for count in reads["values"]), reads
    assert medians["a 64 KiB fault at random on the served file, p50"] > 0
    assert answer["notes"] == ["pager: 384.0 MiB of a served file are what the flat file has"]
    check_nothing_is_left(daemon)


def test_a_cycle_is_measured(daemon: Daemon) -> None:
    answer = ask(daemon, "bench", "cycle", "--rounds", "1")
    names = [row["name"] for row in answer["rows"]]
    assert names == [
        "boot to an answering agent", "frozen by a save", "pages that a save captures",
        "frozen by a pause", "pages that a pause captures",
        "resume, copied from a flat file that is there", "resume on demand", "resume on demand",
        "fork of a snapshot",
    ]  # fmt: skip
    medians = {row["name"]: row["median"] for row in answer["rows"]}
    assert 1500 < medians["pages that a save captures"] < 256 * 256
    assert answer["rounds"] == 1
    check_nothing_is_left(daemon)


@pytest.mark.parametrize(
    ("group", "step"), [("cycle", "cycle: round 1"), ("pager", "pager: round 1")]
)
def test_a_cancelled_measurement_leaves_nothing(
    daemon: Daemon, group: BenchGroup, step: str
) -> None:
    with measuring(daemon, group, step) as (aside, operation):
        daemon.client.cancel(operation)
        assert isinstance(aside.wait(), Cancelled)
    check_nothing_is_left(daemon)


def test_a_daemon_that_is_killed_in_it_leaves_nothing_to_the_next(daemon: Daemon) -> None:
    """Neither the guest nor the scratch home's pager, which would outlive a daemon."""
    with measuring(daemon, "pager", "pager: round 1") as (aside, _):
        daemon.kill()
        assert isinstance(aside.wait(), DaemonUnreachable)
    assert daemon.client.sandboxes(everything=True) == []  # by the next one
    check_nothing_is_left(daemon)


def test_a_host_without_fuse_is_told_so(tiny_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for alone is an error, before any guest is booted; else it is left out."""
    monkeypatch.setattr(process, "probe", lambda: "/dev/fuse is missing")
    cycles: list[bool] = []

    def measure(*_: object, ondemand: bool) -> list[object]:
        cycles.append(ondemand)
        return []

    monkeypatch.setattr(cycle, "measure", measure)
    loop = asyncio.new_event_loop()
    engine = Engine.open(tiny_home, loop)
    with contextlib.closing(loop), contextlib.closing(engine):
        with pytest.raises(PagerUnavailable, match="/dev/fuse is missing"):
            engine.bench(BenchRequest(groups=["pager"]))
        assert cycles == []
        answer = engine.bench(BenchRequest())
        assert answer.notes == ["nothing is measured on demand: /dev/fuse is missing"]
        assert cycles == [False]
        assert list(tiny_home.tmp.iterdir()) == []
