"""The verbs that keep a home in order, as a person and a program read them."""

from __future__ import annotations

from tests.framework.fake_home import FakeHome


def test_snapshots_are_removed_and_what_fails_keeps_no_other(place: FakeHome) -> None:
    place.sandbox()
    first = place.json("snapshot", "save", "web")["snapshot"]
    second = place.json("pause", "web")["snapshot"]
    done = place.run("snapshot", "rm", second, first)
    assert done.returncode == 18
    assert done.stdout.decode().split() == [first]
    assert b"needed by a paused sandbox" in done.stderr
    document = place.json("snapshot", "rm", second, code=18)
    assert document["error"]["code"] == "in_use"
    assert document["removed"] == []


def test_gc_says_what_went_or_would_go(place: FakeHome) -> None:
    assert place.json("gc", "--dry-run")["dry_run"]
    assert place.json("gc")["items"] == [{"kind": "build", "name": "b1", "bytes": 4096}]
    done = place.run("gc", "--dry-run")
    assert done.stdout.split() == [b"KIND", b"NAME", b"SIZE", b"build", b"b1", b"4.0", b"KiB"]
    assert b"would free 4.0 KiB" in done.stderr
