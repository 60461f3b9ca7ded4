"""Real cgroups for tests: a directory of a test's own in the host's cgroup2, gone afterwards."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.framework.fake_home import eventually


@contextmanager
def cgroup_place() -> Iterator[Path]:
    """An empty cgroup; where no cgroup2 that we could write is mounted, one is, for as long."""
    with contextlib.ExitStack() as stack:
        top = _mounted() or stack.enter_context(_mount())
        place = top / f"diapause-test-{uuid.uuid4().hex[:12]}"
        place.mkdir()
        stack.callback(remove_cgroup, place)
        yield place


def remove_cgroup(place: Path) -> None:
    """It and all below it; whatever ran there has ended or is about to."""

    def gone() -> bool:
        try:
            for leaf in leaves_in(place):
                (place / leaf).rmdir()
            place.rmdir()
        except OSError:
            return False
        return True

    eventually(f"the removal of {place}", gone)


def leaves_in(place: Path) -> list[str]:
    """The cgroups below it."""
    with os.scandir(place) as found:
        return sorted(entry.name for entry in found if entry.is_dir())


def cgroup_path(pid: int) -> str:
    """What the kernel says that a process is in."""
    [line] = [
        line
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        if line.startswith("0::")
    ]
    return line.removeprefix("0::")


def _mounted() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        place = Path(before.split()[4])
        if after.startswith("cgroup2 ") and "rw" in before.split()[5].split(","):
            return place
    return None


@contextmanager
def _mount() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dia-cgroup-") as directory:
        subprocess.run(["mount", "-t", "cgroup2", "none", directory], check=True, timeout=60)
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", directory], check=True, timeout=60)
