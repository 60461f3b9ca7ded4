"""The terminal of an interactive exec: raw while it runs, as it was on every way out."""

from __future__ import annotations

import contextlib
import os
import sys
import termios
import tty
from collections.abc import Iterator

_SIZE_MAX = 10_000


def size_of_terminal() -> tuple[int, int]:
    """Rows and columns of the terminal that we have, or 24 by 80."""
    for stream in (0, 1, 2):
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(stream)
            if size.lines > 0 and size.columns > 0:
                return min(size.lines, _SIZE_MAX), min(size.columns, _SIZE_MAX)
    return 24, 80


@contextlib.contextmanager
def raw_terminal(wanted: bool) -> Iterator[None]:
    """Put the terminal on stdin into raw mode, if it is one and that is wanted."""
    if not wanted or not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        sys.stdout.flush()
        termios.tcsetattr(0, termios.TCSADRAIN, before)
