"""Eight guests, random verbs, random kills, for as long as it is told: `make soak`.

SOAK_MINUTES (20) and SOAK_SEED (the time) choose the run; the seed is printed, and so is what was
done. A round that was seen to go wrong fails the test with what the guest held.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from diapause.guest.images import Image
from diapause.model import CheckRequest
from tests.framework.sandbox import real_home
from tests.framework.soak import Killer, Slot, Tally

SLOTS = 8
MINUTES = float(os.environ.get("SOAK_MINUTES", "20"))
SEED = int(os.environ.get("SOAK_SEED", str(int(time.time()))))


@pytest.mark.soak
@pytest.mark.timeout(MINUTES * 60 + 1800)
def test_no_byte_is_lost(tiny_image: Image, capsys: pytest.CaptureFixture[str]) -> None:
    """Every guest holds what it wrote after every resume, restore and fork."""
    tally = Tally()
    with real_home(tiny_image) as daemon:
        source = daemon.run()
        slots = [Slot(daemon, source, SEED + number, tally) for number in range(SLOTS)]
        killer = Killer(daemon, slots, SEED, tally)
        killer.start()
        until = time.monotonic() + MINUTES * 60
        try:
            with ThreadPoolExecutor(SLOTS) as pool:
                list(pool.map(lambda slot: _rounds(slot, until), slots))
        finally:
            killer.end()
            with capsys.disabled():
                _report(tally)
        for slot in slots:
            slot.last_look()
        assert daemon.client.check(CheckRequest()).damage == []
    assert tally.counts["daemons killed"] > 0
    assert tally.counts["patterns compared"] > 0


def _rounds(slot: Slot, until: float) -> None:
    while time.monotonic() < until:
        slot.round()


def _report(tally: Tally) -> None:
    slowest = {name: round(seconds, 1) for name, seconds in sorted(tally.slowest.items())}
    counts = dict(sorted(tally.counts.items()))
    print("\n" + json.dumps({"seed": SEED, "counts": counts, "slowest_s": slowest}))
