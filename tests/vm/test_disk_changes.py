"""What a disk's snapshot holds after deletions and trims: its own instant, no more, no less."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.framework.disks import clean_copy, flat_file
from tests.framework.sandbox import Daemon, Sandbox

pytestmark = pytest.mark.vm

DROP = "sync; echo 3 >/proc/sys/vm/drop_caches"


def test_a_trimmed_file_is_whole_before_and_gone_after(
    daemon: Daemon, guest: Sandbox, tmp_path: Path
) -> None:
    """A discard in the overlay hides what lies below it, and only from that instant on."""
    digest = guest.sh(f"head -c 8000000 /dev/urandom >/data/big; {DROP}; sha256sum /data/big")
    before = guest.save("disk").snapshot
    guest.sh(f"rm /data/big; {DROP}; fstrim /data; echo kept >/data/small; {DROP}")
    after = guest.save("disk").snapshot
    with guest.forked(before) as fork:
        assert fork.sh(f"{DROP}; sha256sum /data/big") == digest
    with guest.forked(after) as fork:
        assert fork.sh(f"{DROP}; ls /data/big 2>/dev/null || cat /data/small").strip() == "kept"
    for snapshot in (before, after):
        flat = flat_file(daemon, snapshot, "disk0", tmp_path / snapshot)
        clean_copy(flat, tmp_path).unlink()


def test_a_trim_gives_the_space_back_in_the_next_snapshot(
    daemon: Daemon, guest: Sandbox, tmp_path: Path
) -> None:
    """Zero pages are not stored: the flat file of the later snapshot is smaller."""
    guest.sh(f"head -c 8000000 /dev/urandom >/data/big; {DROP}")
    before = guest.save("disk").snapshot
    guest.sh(f"rm /data/big; {DROP}; fstrim /data")
    after = guest.save("disk").snapshot
    flats = [flat_file(daemon, one, "disk0", tmp_path / one) for one in (before, after)]
    sizes = [flat.stat().st_blocks * 512 for flat in flats]
    assert sizes[1] < sizes[0] - 6_000_000, sizes


def test_a_resumed_disk_is_the_paused_one(daemon: Daemon, guest: Sandbox) -> None:
    """What was written without a sync lies in the guest's memory, and reaches the disk later."""
    digest = guest.sh("head -c 3000000 /dev/urandom >/data/unsynced; sha256sum /data/unsynced")
    guest.pause()
    guest.resume()
    assert guest.sh(f"{DROP}; sha256sum /data/unsynced") == digest
    guest.pause("disk")
    guest.resume()
    assert guest.sh(f"{DROP}; sha256sum /data/unsynced") == digest
