"""Killing a daemon at an exact place of a verb."""

from __future__ import annotations

from collections.abc import Callable

from diapause.errors import DaemonUnreachable
from tests.framework.catalog_tap import Place, Tap
from tests.framework.sandbox import Aside, Daemon


def kill_at(daemon: Daemon, place: Place, verb: Callable[[], object]) -> None:
    """Kill the daemon when the verb has come to the place."""
    tap = Tap(daemon.home)
    tap.hold(place)
    call = Aside(verb)
    tap.wait_held()
    daemon.kill()
    assert isinstance(call.wait(), DaemonUnreachable)
    tap.clear()
