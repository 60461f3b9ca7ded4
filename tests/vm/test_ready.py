"""Runs that do not boot: a ready snapshot is kept once, and nothing of the first guest is in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from diapause.guest.images import Image
from diapause.units import MIB
from tests.framework.clock import clock_error_s
from tests.framework.sandbox import Aside, Daemon, Sandbox, real_home

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def home(tiny_image: Image) -> Iterator[Daemon]:
    """A home in which nothing was run."""
    with real_home(tiny_image) as made:
        yield made


@pytest.fixture(scope="module")
def first(home: Daemon) -> Sandbox:
    """The first run of its shape; what it writes no later one sees."""
    sandbox, answer = home.run_as_asked(name="first")
    assert not answer.warm
    assert answer.notes == []
    sandbox.sh("echo mine >/data/mine; echo mine >/tmp/mine; sync")
    return sandbox


def who(sandbox: Sandbox) -> list[str]:
    return sandbox.sh("hostname; cat /etc/hostname /etc/machine-id").split()


def test_later_runs_start_from_it_and_are_others(home: Daemon, first: Sandbox) -> None:
    """Own names, ids and random numbers, an empty disk, the right clock, no boot."""
    names, draws = [who(first)], [first.sh("head -c 16 /dev/urandom | od -An -tx1")]
    for name in ("web", None):
        later, answer = home.run_as_asked(name=name)
        assert (answer.warm, answer.notes) == (True, [])
        assert "materialize" in answer.phases_ms
        names.append(who(later))
        draws.append(later.sh("head -c 16 /dev/urandom | od -An -tx1"))
        assert names[-1][0] == names[-1][1] == (name or f"sandbox-{later.id[:8]}")
        assert later.exec("ls", "/data/mine", "/tmp/mine").returncode != 0
        assert later.sh("ls -A /data | grep -v lost+found || true") == ""
        assert clock_error_s(later) <= 0.1
        digests = later.rewrite()
        later.pause()
        later.resume()
        assert later.digests() == digests
        later.remove()
    assert names[0][0] == "first"
    assert len({ids[2] for ids in names}) == len(names)
    assert len(set(draws)) == len(draws)


def test_the_first_is_as_if_nothing_had_been_kept(home: Daemon, first: Sandbox) -> None:
    """Its captures are exact: they go on from the one that was kept."""
    digests = first.rewrite()
    saved = first.save()
    assert saved.dirty_source in ("tracked", "compared")
    with first.forked(saved.snapshot) as fork:
        assert fork.digests() == digests
        assert fork.sh("cat /data/mine").strip() == "mine"
    assert who(first)[0] == "first"


def test_it_is_nobodys_snapshot(home: Daemon, first: Sandbox) -> None:
    """Not in the list; what a sandbox began with can be inspected all the same."""
    listed = {row.id for row in home.client.snapshots()}
    later, _ = home.run_as_asked()
    parent = later.inspect().parent
    assert parent is not None
    assert parent not in listed
    assert home.client.inspect_snapshot(parent).sandbox == first.id
    later.remove()


def test_boot_boots(home: Daemon, first: Sandbox) -> None:
    """And another shape does, and keeps one of its own."""
    booted, answer = home.run_as_asked(boot=True)
    assert not answer.warm
    booted.remove()
    for warm in (False, True):
        larger, answer = home.run_as_asked(memory_bytes=144 * MIB)
        assert answer.warm == warm
        larger.remove()


def test_a_warm_one_is_put_back_and_keeps_its_name(home: Daemon, first: Sandbox) -> None:
    """What it began with knows nobody's name."""
    later, answer = home.run_as_asked(name="again")
    assert answer.warm
    later.sh("echo said >/data/said; sync")
    parent = later.inspect().parent
    assert parent is not None
    later.restore(parent, discard=True)
    assert who(later)[0] == "again"
    assert later.exec("ls", "/data/said").returncode != 0
    later.remove()


def test_many_first_runs_keep_one(tiny_image: Image) -> None:
    """Each is ready; one of them made it."""
    with real_home(tiny_image) as home:
        home.client.images()
        runs = [Aside(home.run_as_asked) for _ in range(3)]
        answers = [run.result()[1] for run in runs]
        assert [answer.warm for answer in answers].count(False) >= 1
        kept = {_parent(home, answer.sandbox) for answer in answers} - {None}
        assert len(kept) == 1
        later, answer = home.run_as_asked()
        assert answer.warm
        assert {later.inspect().parent} == kept


def _parent(home: Daemon, sandbox: str) -> str | None:
    return home.client.inspect(sandbox).parent
