"""What a check is to read, with whom each blob costs; and what it found."""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diapause import _core, operation
from diapause.errors import BlobDamaged, BlobMissing
from diapause.model import CheckedKind, Damage
from diapause.store.files import allocated_bytes
from diapause.units import MIB

if TYPE_CHECKING:
    from diapause.errors import DiapauseError
    from diapause.sandbox.host import Host

How = Literal["digest", "compared", "structure", "read"]
THREADS_MAX = 8
_BATCH_BYTES = 256 * MIB  # between two looks whether it was cancelled


@dataclass(frozen=True)
class Job:
    """One file to read: as `_core.check_blobs` wants it, and as the report names it."""

    core: tuple[str, str, str]
    blob: str
    costs: list[str]
    sandboxes: list[str]


@dataclass
class Blobs:
    """What is to be read, and what was found of it."""

    host: Host
    jobs: list[Job] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)
    seen: Counter[tuple[str, How]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, How]] = field(default_factory=Counter)
    recorded: int = 0
    unchecked: int = 0
    stale: int = 0

    def add(
        self, kind: str, path: Path, known: str, costs: list[str], *, called: str = "",
        how: How = "digest", blob: str = "", sandboxes: list[str] | None = None,
    ) -> None:  # fmt: skip
        """Read one, of a kind of `_core.check_blobs`, and compare it with what is known.

        The report counts it under what it is `called`, and names it `blob`.
        """
        blob = blob or self.name(path)
        self.jobs.append(Job((kind, str(path), known), blob, costs, sandboxes or []))
        self.count(called or kind, how, path)

    def count(self, kind: str, how: How, path: Path) -> None:
        """Say in the report that this was read."""
        self.seen[kind, how] += 1
        self.bytes[kind, how] += allocated_bytes(path)

    def name(self, path: Path) -> str:
        """What the report calls a file of the home."""
        return os.path.relpath(path, self.host.home.root)

    def found(
        self, path: Path, cause: str, costs: list[str], *, missing: bool = False,
        unread: bool = False, sandboxes: list[str] | None = None,
    ) -> None:  # fmt: skip
        """Note damage that was seen at once."""
        self.damage.append(
            Damage(
                blob=self.name(path), cause=cause, missing=missing, unread=unread,
                snapshots=costs, sandboxes=sandboxes or [],
            )
        )  # fmt: skip

    def failed(
        self, path: Path, error: DiapauseError | OSError, costs: list[str],
        sandboxes: list[str] | None = None,
    ) -> None:  # fmt: skip
        """Note what came of looking at a file: a disk that refuses a read is damage, as in
        `_core.check_blobs`, and any other refusal says nothing of the file."""
        if isinstance(error, OSError):
            unread, cause = error.errno != errno.EIO, str(error)
        else:
            unread = error.code not in (BlobMissing.code, BlobDamaged.code)
            cause = str(error.fields.get("cause", error))
        missing = isinstance(error, BlobMissing)
        cause = (
            "it is missing" if missing else f"it could not be read: {cause}" if unread else cause
        )
        self.found(path, cause, costs, missing=missing, unread=unread, sandboxes=sandboxes)

    def read(self) -> None:
        """Read all of them and note what is not what it has to be; can be cancelled in between."""
        sizes = [allocated_bytes(Path(job.core[1])) for job in self.jobs]
        total, first, done = sum(sizes), 0, 0
        while first < len(self.jobs):
            operation.checkpoint()
            operation.progress(done, total, "reading")
            end, size = first, 0
            while end < len(self.jobs) and size < _BATCH_BYTES:
                size += sizes[end]
                end += 1
            self._read(self.jobs[first:end])
            first, done = end, done + size
        operation.progress(total, total, "reading")

    def _read(self, jobs: list[Job]) -> None:
        for at, cause, kind in _core.check_blobs([job.core for job in jobs], threads()):
            job = jobs[at]
            self.damage.append(
                Damage(
                    blob=job.blob, cause=cause, missing=kind == "missing", unread=kind == "unread",
                    snapshots=job.costs, sandboxes=job.sandboxes,
                )
            )  # fmt: skip

    def merge(self, other: Blobs) -> None:
        """Add what another has read and found."""
        self.jobs += other.jobs
        self.damage += other.damage
        self.seen += other.seen
        self.bytes += other.bytes

    def kinds(self) -> list[CheckedKind]:
        """How each kind was checked."""
        return [
            CheckedKind(kind=kind, how=how, count=count, bytes=self.bytes[kind, how])
            for (kind, how), count in sorted(self.seen.items())
        ]


def threads() -> int:
    """How many a check reads with."""
    return min(len(os.sched_getaffinity(0)), THREADS_MAX)
