"""Disks on the host: a copy that is checked as a host would check it after a crash."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from diapause import _core

if TYPE_CHECKING:
    from tests.framework.sandbox import Daemon


def flat_file(daemon: Daemon, snapshot: str, device: str, out: Path) -> Path:
    """A device of a snapshot as a plain file, made of its builds once it is packed."""
    daemon.packed(snapshot)
    [found] = [row for row in daemon.snapshot(snapshot).devices if row.name == device]
    header = daemon.home.snapshot(snapshot) / f"{device}.header"
    _core.materialize(str(header), found.header_digest, str(daemon.home.builds), str(out))
    return out


def clean_copy(flat: Path, place: Path) -> Path:
    """A copy of an ext4 disk whose journal was replayed, and in which nothing else is wrong."""
    copy = place / "disk"
    shutil.copyfile(flat, copy)
    replay = subprocess.run(
        ["e2fsck", "-fy", "-E", "journal_only", str(copy)], capture_output=True, text=True
    )
    assert replay.returncode in (0, 1), replay
    check = subprocess.run(["e2fsck", "-fn", str(copy)], capture_output=True, text=True)
    assert check.returncode == 0, (replay.stdout, check.stdout)
    return copy
