"""Removing a tree: nothing outside it is touched, whatever lies in it. The gate, the reserve."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from diapause.errors import HomeBusy
from diapause.store.files import allocated_bytes, remove_tree
from diapause.store.gate import Gate
from diapause.store.home import Home
from diapause.store.reserve import RESERVE_BYTES, Reserve

# In a mount namespace of its own: nothing of it reaches anybody else.
_BIND = """
import subprocess, sys
from pathlib import Path
from diapause.errors import StorageFailed
from diapause.store.files import remove_tree
precious, tree = Path(sys.argv[1]), Path(sys.argv[2])
subprocess.run(["mount", "--bind", str(precious), str(tree / "in" / "a mount")], check=True)
try:
    remove_tree(tree)
except StorageFailed as error:
    assert "a mount" in error.message, error.message
else:
    sys.exit("it went into the mount")
assert (precious / "kept").read_text() == "kept"
subprocess.run(["umount", str(tree / "in" / "a mount")], check=True)
remove_tree(tree)
assert not tree.exists()
"""


def test_it_follows_no_link(tmp_path: Path) -> None:
    """Links in it go, what they lead to stays; so does a link in the place of the tree itself."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "kept").write_text("kept")
    tree = tmp_path / "tree"
    (tree / "in").mkdir(parents=True)
    (tree / "in" / "directory").symlink_to(precious)
    (tree / "in" / "file").symlink_to(precious / "kept")
    (tree / "pipe").touch()
    remove_tree(tree)
    assert not tree.exists()
    tree.symlink_to(precious)
    remove_tree(tree)
    assert not tree.is_symlink()
    assert (precious / "kept").read_text() == "kept"


def test_what_is_read_only_goes_and_what_is_gone_is_no_error(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "file").write_text("x")
    (tree / "deep").chmod(0o555)
    tree.chmod(0o555)
    remove_tree(tree)
    assert not tree.exists()
    remove_tree(tree)


def test_it_enters_no_mount(tmp_path: Path) -> None:
    """A bind mount of the same file system, which looks like any directory to `stat`."""
    precious, tree = tmp_path / "precious", tmp_path / "tree"
    precious.mkdir()
    (precious / "kept").write_text("kept")
    (tree / "in" / "a mount").mkdir(parents=True)
    (tree / "in" / "file").write_text("x")
    words = ["unshare", "--mount", "--propagation", "private"]
    if os.geteuid():
        words = ["unshare", "--user", "--map-root-user", "--mount", "--propagation", "private"]
    script = [sys.executable, "-c", _BIND, str(precious), str(tree)]
    done = subprocess.run(
        [*words, *script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (precious / "kept").read_text() == "kept"


def test_allocated_bytes_count_holes_as_nothing_and_links_once(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(1 << 30)
        file.write(b"x" * 8192)
    (tmp_path / "link").hardlink_to(sparse)
    assert 8192 <= allocated_bytes(sparse) < 1 << 20
    both = allocated_bytes(tmp_path, set())
    assert both - allocated_bytes(sparse) < 1 << 20
    assert allocated_bytes(tmp_path / "none") == 0


def test_the_gate_keeps_gc_and_publishers_apart() -> None:
    """A collector waits for publishers and they for it; a publisher inside a publisher does not."""
    gate, order = Gate(), list[str]()
    inside, go_on = threading.Event(), threading.Event()

    def publish() -> None:
        with gate.publishing(), gate.publishing():
            inside.set()
            assert go_on.wait(60)
            order.append("published")

    def collect() -> None:
        with gate.collecting():
            order.append("collected")

    publisher = threading.Thread(target=publish)
    publisher.start()
    assert inside.wait(60)
    with pytest.raises(HomeBusy, match="packing"), gate.collecting(0.01):
        pass
    collector = threading.Thread(target=collect)
    collector.start()
    with gate.publishing(60):  # one that waits keeps nobody out
        order.append("beside")
    go_on.set()
    for thread in (publisher, collector):
        thread.join(60)
    assert order == ["beside", "published", "collected"]
    with gate.collecting(), pytest.raises(HomeBusy, match="gc"):
        _in_a_thread(lambda: gate.publishing(0.01).__enter__())


def _in_a_thread(call: object) -> None:
    failed: list[Exception] = []

    def run() -> None:
        try:
            call()  # type: ignore[operator]
        except HomeBusy as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if failed:
        raise failed[0]


def test_the_reserve_is_set_aside_and_given_back(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = Reserve(home)
    reserve.make()
    assert allocated_bytes(home.reserve) >= RESERVE_BYTES
    with reserve.room():
        assert home.reserve.exists()  # there is room: it is not needed
    monkeypatch.setattr("diapause.store.reserve.free_bytes", lambda _: RESERVE_BYTES - 1)
    with reserve.room(), reserve.room():
        assert not home.reserve.exists()
    assert not home.reserve.exists()
    monkeypatch.undo()
    with reserve.room():
        pass
    assert allocated_bytes(home.reserve) >= RESERVE_BYTES
