"""A guest's clocks, seen through exec."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.framework.sandbox import Sandbox


def uptime_s(guest: Sandbox) -> float:
    """What the guest's monotonic clock says."""
    return float(guest.sh("cat /proc/uptime").split()[0])


def clock_error_s(guest: Sandbox) -> float:
    """The guest's clock against ours, as near as the way there and back lets us see."""
    best = (1e9, 0.0)
    for _ in range(5):
        before = time.time()
        # The agent's clock was set in nanoseconds; the file of the tmpfs carries them to us.
        stamp = guest.sh("touch /tmp/now; stat -c %y /tmp/now")
        after = time.time()
        seconds = _parse(stamp)
        distance = max(before - seconds, seconds - after, 0.0)
        best = min(best, (distance, seconds - (before + after) / 2))
    return best[0]


def _parse(stamp: str) -> float:
    whole, _, rest = stamp.strip().partition(".")
    return (
        time.mktime(time.strptime(whole + " UTC", "%Y-%m-%d %H:%M:%S %Z"))
        - time.timezone
        + (float("0." + rest.split()[0]))
    )
