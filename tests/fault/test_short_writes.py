"""The kernel takes only a part of what it is given, or is interrupted: nothing is lost by it."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from diapause.guest.images import Image
from tests.framework.sandbox import real_home

_LIBRARY = Path(__file__).parents[1] / "framework" / "short_writes.c"


def test_a_cycle_on_short_and_interrupted_writes(tiny_image: Image, tmp_path: Path) -> None:
    """Save, fork, pause, resume, with every third write interrupted and every third one halved."""
    library, counts = tmp_path / "short.so", tmp_path / "counts"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(_LIBRARY)]
    subprocess.run(["gcc", *flags, "-ldl"], check=True, timeout=120)
    counts.write_bytes(bytes(4096))
    with real_home(tiny_image, LD_PRELOAD=str(library), SHORT_WRITES=str(counts)) as daemon:
        guest = daemon.run()
        written = guest.rewrite()
        guest.start_counter()
        saved = guest.save("disk").snapshot
        daemon.packed(saved)
        with guest.forked(saved) as fork:
            assert fork.digests() == written
        written = guest.rewrite()
        daemon.packed(guest.pause("disk").snapshot)
        before = struct.unpack("<QQ", counts.read_bytes()[:16])
        guest.resume()
        assert guest.digests() == written
        guest.counts_beyond(guest.counted())
    interrupted, halved = before
    assert interrupted > 20
    assert halved > 20
