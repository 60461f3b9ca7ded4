"""Which calls of a verb can fail, and with which errors: for `tests/fault/test_failing_*`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from diapause.errors import DiapauseError
from tests.framework.sandbox import Daemon
from tests.framework.strace import Call, failing

# A call, and the errors that a file system answers it with.
ERRORS = {
    "openat": ("ENOSPC", "EIO", "EMFILE", "EINTR"),
    "write": ("ENOSPC", "EIO", "EINTR"),
    "pwrite64": ("ENOSPC", "EIO", "EINTR"),
    "ftruncate": ("ENOSPC", "EIO"),
    "fallocate": ("ENOSPC",),
    "fsync": ("EIO", "ENOSPC"),
    "fdatasync": ("EIO", "ENOSPC"),
    "rename": ("ENOSPC", "EIO"),
    "link": ("ENOSPC", "EMLINK"),
    "linkat": ("ENOSPC", "EMLINK"),
    "mkdir": ("ENOSPC", "EIO"),
    "unlink": ("EIO",),
    "unlinkat": ("EIO",),
    "rmdir": ("EIO",),
}
Fault = tuple[str, str, int]  # a call, an error, and at which of its times
Pick = Callable[[list[Fault]], list[Fault]]


def faults(calls: list[Call]) -> list[Fault]:
    """Every error at every call of a verb as it goes when nothing fails."""
    made = Counter(call.name for call in calls if call.name in ERRORS)
    return [
        (name, error, when)
        for name, times in sorted(made.items())
        for error in ERRORS[name]
        for when in range(1, times + 1)
    ]


def some(found: list[Fault], size: int = 12) -> list[Fault]:
    """A sample: of each kind of call."""
    assert len(found) > size, "too few calls for a verb that writes"
    return found[:: len(found) // size]


def tried(daemon: Daemon, fault: Fault, act: Callable[[], object]) -> bool:
    """Do it while one call fails; what came of it has a name. Whether it was done."""
    name, error, when = fault
    refused: DiapauseError | None = None
    with failing(daemon.pid, name, error, when):
        try:
            act()
        except DiapauseError as found:
            refused = found
    if refused is None:
        return True
    assert refused.code != DiapauseError.code, (fault, refused.message)
    return False
