"""The verbs that keep a home in order, as a person and a program read them."""

from __future__ import annotations

import msgspec

from diapause.cli.tree import lineage, tree_lines
from diapause.model import SnapshotDetail
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


def test_images_are_inspected_and_removed(place: FakeHome) -> None:
    place.json("run", "--name", "web")
    found = place.json("image", "inspect", "tiny")
    assert (found["files"][0]["digest"], len(found["sandboxes"])) == ("blake2b:00", 1)
    assert b'"kernel_version": "6.1"' in place.run("image", "inspect", "tiny").stdout
    document = place.json("image", "rm", "tiny", "none", code=18)
    assert (document["error"]["code"], document["removed"]) == ("in_use", [])
    place.json("rm", "-f", "web")
    done = place.run("image", "rm", "none", "tiny")
    assert done.returncode == 12
    assert done.stdout == b"tiny\n"


def test_gc_says_what_went_or_would_go(place: FakeHome) -> None:
    assert place.json("gc", "--dry-run")["dry_run"]
    assert place.json("gc")["items"] == [{"kind": "build", "name": "b1", "bytes": 4096}]
    done = place.run("gc", "--dry-run")
    assert done.stdout.split() == [b"KIND", b"NAME", b"SIZE", b"build", b"b1", b"4.0", b"KiB"]
    assert b"would free 4.0 KiB" in done.stderr


def test_check_exits_with_the_code_of_damage_unless_it_is_mended(place: FakeHome) -> None:
    found = place.json("check", code=40)
    assert found["damage"][0]["blob"] == "builds/b1"
    done = place.run("check", "--repair")
    assert done.returncode == 0
    assert b"made again" in done.stdout
    assert [b"build", b"digest", b"2", b"8.0", b"KiB"] in [
        line.split() for line in done.stdout.splitlines()
    ]
    assert b"1 flat files have none" in done.stderr
    assert b"0 left" in done.stderr
    assert b"1 files of nobody, 4.0 KiB" in done.stderr


def test_df_says_what_gc_frees(place: FakeHome) -> None:
    assert place.json("df")["gc_bytes"] == 4096
    done = place.run("df")
    assert b"8.0 KiB" in done.stdout
    assert b"`diapause gc` frees 4.0 KiB" in done.stderr


def test_the_pager_and_whom_it_serves(place: FakeHome) -> None:
    assert place.json("pager")["sandboxes"][1]["stalled"]["blob"] == "builds/5a"
    done = place.run("pager")
    assert [line.split() for line in done.stdout.splitlines()[-2:]] == [
        [b"a" * 16, b"7", b"2", b"FUSE", b"served"],
        [b"b" * 16, b"8", b"1", b"userfaultfd", b"waits", b"for", b"builds/5a"],
    ]
    assert b"pager 5, keeper 6: 3.0 MiB resident, 3 files" in done.stderr
    (place.home.root / "no-pager").touch()
    assert place.json("pager")["running"] is False
    assert b"no pager runs" in place.run("pager").stderr


def test_snapshots_are_compared_verified_and_shown_as_a_tree(place: FakeHome) -> None:
    place.sandbox()
    first, second, third = (place.json("snapshot", "save", "web")["snapshot"] for _ in range(3))
    assert place.json("snapshot", "verify", first) == {
        "damage": [], "blobs": 3, "kinds": [], "recorded": 0, "unchecked": 0, "stale": 0,
        "unreferenced": [],
    }  # fmt: skip
    assert place.json("snapshot", "diff", first, second)["devices"][0]["extents"] == [[3, 2]]
    assert b"8.0 KiB" in place.run("snapshot", "diff", first, second).stdout
    [root] = place.json("snapshot", "tree")
    assert (root["id"], root["children"][0]["id"]) == (first, second)
    place.json("snapshot", "rm", second)
    lines = place.run("snapshot", "tree").stdout.decode().splitlines()
    assert lines[0].startswith(first)
    assert lines[1].startswith(third)
    assert "its parent was removed" in lines[1]


def test_a_lineage_of_thousands_is_one_tree() -> None:
    """Deeper than any recursion of ours."""
    one = SnapshotDetail(
        id="0", name=None, sandbox="s", parent=None, state="packed", durability="disk",
        pending_bytes=0, devices=[], error=None, created_at="", image="tiny", memory_bytes=0,
        stored_bytes=0, vmm={},
    )  # fmt: skip
    chain = [
        msgspec.structs.replace(one, id=str(n), parent=str(n - 1) if n else None)
        for n in range(3000)
    ]
    roots = lineage(chain)
    assert len(roots) == 1
    assert len(list(tree_lines(roots))) == 3000
