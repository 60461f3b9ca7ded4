"""What the machine that runs the tests can do, tried where trying is cheap."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

_SYS_USERFAULTFD = 323
_UFFD_USER_MODE_ONLY = 1


def describe() -> str:
    """One line for the head of a test run."""
    return ", ".join(
        [
            f"linux {platform.release()}",
            f"{os.cpu_count()} processors",
            f"uid {os.geteuid()}",
            f"kvm device {_usable('/dev/kvm')}",
            f"fuse {_usable('/dev/fuse')}",
            f"userfaultfd {'yes' if has_userfaultfd() else 'no'}",
            f"tmpfs {_usable('/dev/shm')}",
        ]
    )


def has_userfaultfd() -> bool:
    """Whether this process may create a userfaultfd for its own user-mode faults."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | _UFFD_USER_MODE_ONLY))
    if fd < 0:
        return False
    os.close(fd)
    return True


def _usable(path: str) -> str:
    if not Path(path).exists():
        return "absent"
    return "yes" if os.access(path, os.R_OK | os.W_OK) else "closed"
