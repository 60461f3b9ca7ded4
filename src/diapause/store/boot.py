"""Which boot of the host this is: what was not synced means nothing to the next one."""

from functools import cache
from pathlib import Path

SOURCE = Path("/proc/sys/kernel/random/boot_id")


@cache
def boot_id() -> str:
    """The running kernel's boot id; no process sees two of them."""
    return SOURCE.read_text().strip()
