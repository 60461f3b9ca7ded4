"""A user for each VMM: never shared by two that run, whoever asks at the same moment."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import pytest

from diapause.driver import uids
from diapause.driver.uids import UID_COUNT, UID_FIRST, is_free, own_uid
from diapause.errors import ConfinementFailed


@pytest.fixture
def lock_file(tmp_path: Path) -> Path:
    """A host's lock file."""
    return tmp_path / "uids.lock"


def test_it_follows_from_the_sandboxs_id(lock_file: Path) -> None:
    """The same where nothing is in the way: easy to find in a process list."""
    with own_uid("0001002a" + "0" * 24, lock_file) as uid:
        assert uid == UID_FIRST + 0x2A
    with own_uid("0001002a" + "0" * 24, lock_file) as uid:
        assert uid == UID_FIRST + 0x2A
    assert lock_file.stat().st_mode & 0o777 == 0o600


def test_two_starts_at_once_have_two(lock_file: Path) -> None:
    """Sixteen threads ask for the same number and hold what they got."""
    got: list[int] = []
    everybody, done = threading.Barrier(16), threading.Event()

    def start() -> None:
        with own_uid("000000ff", lock_file) as uid:
            got.append(uid)
            everybody.wait(60)
            done.wait(60)

    threads = [threading.Thread(target=start) for _ in range(15)]
    for thread in threads:
        thread.start()
    everybody.wait(60)
    assert len(set(got)) == 15
    done.set()
    for thread in threads:
        thread.join(60)


def test_a_number_that_a_process_has_is_taken(
    lock_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever gave it."""
    assert not is_free(os.getuid())
    assert is_free(UID_FIRST + UID_COUNT - 1)
    monkeypatch.setattr(uids, "UID_FIRST", os.getuid())
    with own_uid("00000000", lock_file) as uid:
        assert uid > os.getuid()
        assert is_free(uid)


def test_when_all_are_taken_it_says_so(lock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, not shared."""
    monkeypatch.setattr(uids, "UID_COUNT", 3)
    with contextlib.ExitStack() as stack:
        taken = {stack.enter_context(own_uid("00000000", lock_file)) for _ in range(3)}
        assert len(taken) == 3
        with pytest.raises(ConfinementFailed, match="every number is taken"):
            stack.enter_context(own_uid("00000000", lock_file))


def test_a_lock_file_that_can_not_be_made(tmp_path: Path) -> None:
    """A link in its place is never followed."""
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for place in (tmp_path / "none" / "lock", tmp_path / "link"):
        with pytest.raises(ConfinementFailed, match="uid"):
            own_uid("00000000", place).__enter__()
    assert not (tmp_path / "elsewhere").exists()
