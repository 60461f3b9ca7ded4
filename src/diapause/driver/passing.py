"""Errors that say nothing about this host: what the next moment may answer otherwise.

What a host can do is asked once by each daemon and remembered. An error that only says that
something was used up just now, or was interrupted, is no answer: whoever asked gets it as the
error of the verb, and the next one asks again.
"""

from __future__ import annotations

import errno
import re

PASSING = frozenset({
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR,
    errno.ETIMEDOUT,
})  # fmt: skip
_NAMED = re.compile(r"\b(E[A-Z0-9]+): ")  # as the launcher's errors name themselves
_NUMBERED = re.compile(r"\(os error (\d+)\)")


def is_passing(error: BaseException | None) -> bool:
    """Whether the error, or one that it came from, is of this moment alone."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in PASSING:
            return True
        error = error.__cause__
    return False


def error_in(text: str) -> OSError | None:
    """The system's error that a line of the launcher's report speaks of."""
    if (named := _NAMED.search(text)) is not None:
        number = getattr(errno, named[1], None)
    else:
        numbered = _NUMBERED.search(text)
        number = int(numbered[1]) if numbered is not None else None
    return OSError(number, text) if isinstance(number, int) else None
