"""`diapause cp` against the real agent's end, without a guest: the rules of `cp -a`."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from diapause.units import MIB
from tests.framework.fake_home import FakeHome, eventually, peak_bytes
from tests.framework.trees import describe, make_tree, same_tree

RESIDENT_BYTES_MAX = 64 * MIB


# What an agent says that has no `pack`, what a shell does of a guest that has no agent by that
# name, and of one that may not be run.
OLD_AGENTS = [
    '2 diapause-agent: unknown argument "pack"\nusage: diapause-agent [--port DEVICE]\n',
    "127 diapause: exec: diapause-agent: No such file or directory\n",
    "126 diapause: exec: diapause-agent: Permission denied\n",
]


@pytest.fixture
def web(place: FakeHome) -> FakeHome:
    place.sandbox("web")
    return place


def test_a_tree_comes_back_as_it_was(web: FakeHome, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    assert web.run("cp", str(tree), f"web:{tmp_path}/there").returncode == 0
    same_tree(tree, tmp_path / "there")
    done = web.json("cp", f"web:{tmp_path}/there", str(tmp_path / "back"))
    same_tree(tree, tmp_path / "back")
    assert done["entries"] == len(describe(tree))
    assert done["bytes"] >= 100_000


@pytest.mark.parametrize("inwards", [True, False])
def test_where_a_copy_goes(web: FakeHome, tmp_path: Path, inwards: bool) -> None:
    source, there = tmp_path / "src", tmp_path / "dst"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_text("new")
    (tmp_path / "one").write_text("one")
    there.mkdir()

    def cp(one: str, other: str, code: int = 0) -> bytes:
        words = (f"{tmp_path}/{one}", f"web:{tmp_path}/{other}")
        if not inwards:
            words = (f"web:{words[0]}", words[1].removeprefix("web:"))
        done = web.run("cp", *words)
        assert done.returncode == code, done
        return done.stderr

    cp("src", "dst")
    assert (there / "src" / "sub" / "file").read_text() == "new"
    (there / "src" / "kept").write_text("kept")
    (source / "sub" / "file").write_text("newer")
    cp("src", "dst")  # a second copy is merged into the first
    assert (there / "src" / "sub" / "file").read_text() == "newer"
    assert (there / "src" / "kept").read_text() == "kept"
    cp("src/.", "dst/")
    assert (there / "sub" / "file").read_text() == "newer"
    cp("src", "made")
    assert (tmp_path / "made" / "sub" / "file").read_text() == "newer"
    cp("one", "dst/two")
    cp("one", "dst/")
    assert (there / "two").read_text() == (there / "one").read_text() == "one"
    assert b"no such directory" in cp("one", "nowhere/", 53)
    assert b"such file or directory" in cp("one", "nowhere/else", 53)
    assert b"can't replace" in cp("src", "dst/two", 53)
    (there / "clash" / "one").mkdir(parents=True)
    assert b"stands there" in cp("one", "dst/clash", 53)
    assert b"not a directory" in cp("one/.", "dst", 53).replace(b"Not", b"not")
    assert not list(tmp_path.rglob(".diapause-cp-*"))


def test_a_file_in_place_of_a_file_and_of_a_link(web: FakeHome, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("new")
    (tmp_path / "target").write_text("target")
    (tmp_path / "link").symlink_to("target")
    assert web.run("cp", f"web:{tmp_path}/new", f"{tmp_path}/link").returncode == 0
    assert (tmp_path / "link").read_text() == "new"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "target"


def test_a_merge_that_does_not_fit_changes_nothing(web: FakeHome, tmp_path: Path) -> None:
    source, there = tmp_path / "src", tmp_path / "dst"
    for name in ("a", "b", "c"):
        (source / name).mkdir(parents=True)
        (source / name / "file").write_text("new")
    (there / "b" / "file").mkdir(parents=True)
    done = web.run("cp", f"web:{source}/.", str(there))
    assert done.returncode == 53, done
    assert sorted(path.name for path in there.iterdir()) == ["b"]


def test_operands_that_are_none(web: FakeHome, tmp_path: Path) -> None:
    for words in (("a", "b"), ("web:/a", "web:/b"), ("web:", "b"), ("a",)):
        assert web.run("cp", *words).returncode == 2, words
    assert web.run("cp", "none:/a", "b").returncode == 10
    (tmp_path / "a:b").write_text("colon")
    assert web.run("cp", f"{tmp_path}/a:b", f"web:{tmp_path}/c").returncode == 0
    assert (tmp_path / "c").read_text() == "colon"


def test_special_files_are_left_out_and_said(web: FakeHome, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    os.mkfifo(tmp_path / "src" / "pipe")
    (tmp_path / "src" / "file").write_text("x")
    done = web.run("cp", f"web:{tmp_path}/src", f"{tmp_path}/dst")
    assert done.returncode == 0
    assert b"src/pipe: left out" in done.stderr
    assert [path.name for path in (tmp_path / "dst").iterdir()] == ["file"]


@pytest.mark.parametrize("inwards", [True, False])
def test_a_copy_is_cancelled_and_leaves_nothing(
    web: FakeHome, tmp_path: Path, inwards: bool
) -> None:
    with (tmp_path / "big").open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(MIB))
    (tmp_path / "to").mkdir()
    words = [f"{tmp_path}/big", f"web:{tmp_path}/to"]
    if not inwards:
        words = [f"web:{tmp_path}/big", f"{tmp_path}/to"]
    process = web.spawn("cp", *words)
    made = tmp_path / "to"
    eventually("some of the copy", lambda: sizes(made) > MIB, 60)
    process.send_signal(signal.SIGINT)
    code = process.wait(60)
    if code == 0:  # it was quicker than the signal
        assert (made / "big").stat().st_size == 64 * MIB
        return
    assert code == 130
    assert process.stderr is not None
    assert b"cancelled" in process.stderr.read()
    eventually("that nothing is left", lambda: not list(made.iterdir()), 60)


def sizes(directory: Path) -> int:
    """Bytes of all files below, some of which may go meanwhile."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


@pytest.mark.parametrize("inwards", [True, False])
def test_a_large_file_goes_through_in_bounded_memory(
    web: FakeHome, tmp_path: Path, inwards: bool
) -> None:
    size = 256 * MIB
    with (tmp_path / "big").open("wb") as file:
        for number in range(size // MIB):
            file.write(number.to_bytes(4, "little") * (MIB // 4))
    words = [f"{tmp_path}/big", f"web:{tmp_path}/to"]
    if not inwards:
        words = [f"web:{tmp_path}/big", f"{tmp_path}/to"]
    process = web.spawn("cp", *words)
    peak = 0
    while process.poll() is None:
        peak = max(peak, peak_of(process))
    assert process.returncode == 0
    assert 0 < peak < RESIDENT_BYTES_MAX
    assert subprocess.run(["cmp", tmp_path / "big", tmp_path / "to"]).returncode == 0


def peak_of(process: subprocess.Popen[bytes]) -> int:
    """Its peak so far, 0 where it has ended."""
    try:
        return peak_bytes(process.pid)
    except (AssertionError, FileNotFoundError, ProcessLookupError):
        return 0


@pytest.mark.parametrize("says", OLD_AGENTS, ids=lambda says: says.split()[0])
def test_an_agent_that_is_too_old_is_named(web: FakeHome, tmp_path: Path, says: str) -> None:
    (web.home.root / "old").write_text(says)
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3 * MIB))  # more than the pipes on the way hold
    for words in [(str(source), "web:/tmp/there"), ("web:/etc/os-release", str(tmp_path / "new"))]:
        error = web.json("cp", *words, code=54)["error"]
        assert error["code"] == "agent_too_old"
        assert "`cp`" in error["message"]
        assert "tar" in error["hint"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("code", [1, 3, 128 + 9])
def test_an_end_that_only_fails_is_no_old_agent(web: FakeHome, tmp_path: Path, code: int) -> None:
    (web.home.root / "old").write_text(f"{code} terminated\n")
    error = web.json("cp", "web:/etc/os-release", str(tmp_path / "new"), code=53)["error"]
    assert error["code"] == "copy_failed"
    assert str(code) in error["message"]
    assert not list(tmp_path.iterdir())
