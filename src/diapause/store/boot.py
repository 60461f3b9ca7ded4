"""Which boot of the host this is: what was not synced means nothing to the next one."""

from pathlib import Path


def boot_id() -> str:
    """The running kernel's boot id."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
