"""What debugfs does to an ext4 file: entries are named by inode, never by a name from outside.

What holds: a name that somebody else chose is not written into a command, so none can be one; what
debugfs prints is read so that no name can look like another entry; whatever it complains of fails
the build, since its exit code says nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diapause import limits

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from diapause.guest.steps import ImageBuild

ROOT = 2  # the inode of every ext file system's root
_ECHO = re.compile(rb"debugfs: ls -p <(\d+)>\n")
# No name holds a slash, so no name can end its own record.
_RECORD = re.compile(rb"/(\d+)/(\d+)/(\d+)/(\d+)/([^/]*)/(\d*)/\n")
_BLANK = re.compile(rb"\n")
_BANNER = re.compile(r"debugfs \d[^\n]*\n?")


@dataclass(frozen=True)
class Inode:
    """An entry of a directory: its inode and what `ls` says of it."""

    number: int
    mode: int
    uid: int
    gid: int

    @property
    def is_directory(self) -> bool:
        """Whether it has entries of its own."""
        return self.mode & 0o170000 == 0o040000


def debugfs(build: ImageBuild, step: str, disk: Path, lines: Iterable[str], epoch: str) -> bytes:
    """Run commands that change a file system; what was printed. Any complaint is a failure."""
    commands = build.directory / "debugfs-commands"
    commands.write_text("".join(f"{line}\n" for line in lines))
    fixed = {"E2FSPROGS_FAKE_TIME": epoch}
    done = build.call(
        step, "debugfs", "-w", "-f", commands, disk,
        bound_s=limits.IMAGE_BUILD_S, environment=fixed,
    )  # fmt: skip
    said = _BANNER.sub("", done.stderr.decode(errors="replace"), count=1).strip()
    if said:
        raise build.failed(step, f"debugfs: {said[-500:]}")
    return done.stdout


def list_directories(
    build: ImageBuild, disk: Path, directories: Iterable[int]
) -> dict[int, dict[bytes, Inode]]:
    """The entries of these directories by name, without `.` and `..`."""
    commands = build.directory / "debugfs-commands"
    commands.write_text("".join(f"ls -p <{number}>\n" for number in directories))
    step = "reading the root disk"
    done = build.call(step, "debugfs", "-f", commands, disk, bound_s=limits.IMAGE_BUILD_S)
    return _parsed(build, step, done.stdout)


def _parsed(build: ImageBuild, step: str, text: bytes) -> dict[int, dict[bytes, Inode]]:
    found: dict[int, dict[bytes, Inode]] = {}
    entries: dict[bytes, Inode] = {}
    at = 0
    while at < len(text):
        if match := _ECHO.match(text, at):
            entries = found.setdefault(int(match[1]), {})
        elif match := _RECORD.match(text, at):
            if match[5] not in (b".", b"..") and int(match[1]):
                numbers = int(match[1]), int(match[2], 8), int(match[3]), int(match[4])
                entries[match[5]] = Inode(*numbers)
        elif not (match := _BLANK.match(text, at)):
            raise build.failed(step, f"debugfs printed {text[at : at + 80]!r}")
        at = match.end()
    return found
