"""Which boot of the host this is: what was not synced means nothing to the next one."""

from pathlib import Path

SOURCE = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """The running kernel's boot id."""
    return SOURCE.read_text().strip()
