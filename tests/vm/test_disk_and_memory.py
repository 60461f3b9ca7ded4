"""Memory and disk are of one instant: a writer that puts the same number on both, saved under load.

Each number is first synced to the disk and then written to memory, so in every snapshot the disk
is the memory's equal or exactly one ahead. It is read in a fork before and after the fork's caches
are dropped, and the fork's disk, copied on the host, is clean once its journal is replayed.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.framework.disks import clean_copy, flat_file
from tests.framework.fake_home import eventually
from tests.framework.sandbox import Daemon, Sandbox

pytestmark = pytest.mark.vm

SAVES = 50
WRITER = """
n=0
while :; do
  n=$((n+1))
  echo $n >/data/number.new; sync; mv /data/number.new /data/number; sync; echo $n >/tmp/number.new
  mv /tmp/number.new /tmp/number
done
"""
LOAD = """
while :; do
  head -c 3000000 /dev/urandom >/data/load; cat /data/load >/tmp/load
  echo 3 >/proc/sys/vm/drop_caches
done
"""
STOP = "for p in $(cat /tmp/pids); do kill -9 -$p; done; rm /tmp/pids"


def numbers(guest: Sandbox) -> tuple[int, int]:
    """What memory and disk say."""
    memory, disk = guest.sh("cat /tmp/number /data/number").split()
    return int(memory), int(disk)


def start(guest: Sandbox, script: str) -> None:
    """Start it in a process group that can be ended."""
    guest.in_background(f"echo $$ >>/tmp/pids\n{script}")


def save_and_fork(daemon: Daemon, guest: Sandbox, saves: int, place: Path) -> None:
    """Save under load; then fork each of what was saved."""
    start(guest, WRITER)
    start(guest, LOAD)
    eventually("the first number", lambda: guest.exec("test", "-e", "/tmp/number").returncode == 0)
    snapshots: list[str] = []
    for number in range(saves):
        saved = guest.save("disk" if number % 4 == 0 else "process")
        assert saved.dirty_source == ("private" if number == 0 else "tracked")
        snapshots.append(saved.snapshot)
    guest.sh(STOP)
    last = (0, 0)
    for snapshot in snapshots:
        with guest.forked(snapshot) as fork:
            found = check_fork(fork)
        saved_number = check_disk(flat_file(daemon, snapshot, "disk0", place / "flat"), place)
        # The fork's writer went on until it was stopped.
        assert last[1] <= saved_number <= found[1], f"{snapshot} is of another instant"
        last = (found[0], saved_number)
    assert last > (1, 1), "the writer did not get on"


def check_fork(fork: Sandbox) -> tuple[int, int]:
    """The numbers agree, with and without the caches; the writer is stopped first."""
    fork.sh(STOP)
    memory, disk = numbers(fork)
    assert memory in (disk, disk - 1)
    fork.sh("sync; echo 3 >/proc/sys/vm/drop_caches")
    assert numbers(fork) == (memory, disk)
    return memory, disk


def check_disk(flat: Path, place: Path) -> int:
    """The disk is clean; returns the number that is on it."""
    copy = clean_copy(flat, place)
    flat.unlink()
    shown = subprocess.run(
        ["debugfs", "-R", "cat /number", str(copy)], capture_output=True, check=True
    )
    copy.unlink()
    return int(shown.stdout)


def test_fifty_saves_under_load_are_of_one_instant(
    daemon: Daemon, guest: Sandbox, tmp_path: Path
) -> None:
    save_and_fork(daemon, guest, SAVES, tmp_path)
