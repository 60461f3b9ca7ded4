"""What it costs to touch and to read a file that the pager serves, next to a plain one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diapause import operation
from diapause.errors import BenchFailed, BlobDamaged
from diapause.limits import BENCH_WORK_S
from diapause.sandbox.bench.rows import percentile
from diapause.units import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diapause.sandbox.bench.rows import Figures

BLOCK_BYTES = 64 * KIB
_SMALL_MAX, _LARGE_MAX = 1000, 250
_APART = 4  # blocks: what the kernel reads around one is not the next one
_COMPLAINT_LENGTH_MAX = 500


@dataclass(frozen=True)
class Files:
    """The same bytes twice: served, and as a flat file whose data lies where the guest's does."""

    name: str
    served: Path
    flat: Path

    def compare(self) -> int:
        """Read both whole; the bytes compared. Raises BlobDamaged where they differ."""
        served, flat = (ask("digest", path) for path in (self.served, self.flat))
        if served != flat:
            raise BlobDamaged(blob=self.name, cause="what is served is not what the flat file has")
        return self.flat.stat().st_size

    def measure(self, figures: Figures, seed: int) -> None:
        """One round: the served file out of the page cache, the flat one in it, in turn."""
        dice, blocks = random.Random(seed), list(_blocks(self.flat))
        pages = range(0, BLOCK_BYTES, 4 * KIB)
        small = [at + dice.choice(pages) for at in _some(dice, blocks, _SMALL_MAX)]
        large = _some(dice, blocks[::_APART], _LARGE_MAX)
        for name, path in (("served", self.served), ("flat", self.flat)):
            warm = name == "flat"
            for size, offsets in ((4 * KIB, small), (BLOCK_BYTES, large)):
                took = ask(
                    "touch", path, offsets=offsets, length=size, random=size < BLOCK_BYTES,
                    warm=warm,
                )  # fmt: skip
                for part in (0.5, 0.99):
                    figures.add(f"{size // KIB} {name} {part}", percentile(took, part))
            took_ms = ask("read", path, warm=warm)
            figures.add(f"read {name}", self.flat.stat().st_size / MIB / (took_ms / 1000))


def ask(what: str, path: Path, **more: Any) -> Any:
    """The answer of a process of its own, which a cancelled operation ends.

    Raises BenchFailed where it has none.
    """
    operation.checkpoint()
    question = json.dumps({"what": what, "path": str(path), **more})
    argv = [sys.executable, "-P", "-m", "diapause.sandbox.bench.probe", question]
    asked = operation.cancellable()
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with process, asked.waking(process.kill) if asked else nullcontext():
            try:
                out, complaint = process.communicate(timeout=BENCH_WORK_S)
            except BaseException:
                process.kill()
                raise
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchFailed(what=path.name, cause=error) from error
    operation.checkpoint()
    if process.returncode != 0:
        said = complaint.decode(errors="replace").strip()[-_COMPLAINT_LENGTH_MAX:]
        cause = said or f"the process that read it ended with {process.returncode}"
        raise BenchFailed(what=path.name, cause=cause)
    return json.loads(out)


def _blocks(flat: Path) -> Iterator[int]:
    """Offsets of the blocks that are all data."""
    with flat.open("rb") as file:
        end, at = os.fstat(file.fileno()).st_size, 0
        while at < end:
            try:
                first = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # no data behind it
                return
            at = os.lseek(file.fileno(), first, os.SEEK_HOLE)
            first = -(-first // BLOCK_BYTES) * BLOCK_BYTES
            yield from range(first, at - BLOCK_BYTES + 1, BLOCK_BYTES)


def _some(dice: random.Random, offsets: list[int], most: int) -> list[int]:
    return dice.sample(offsets, min(most, len(offsets)))
