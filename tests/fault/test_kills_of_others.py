"""Kill points of every verb that has no file of its own: see `tests/framework/verbs.py`."""

from __future__ import annotations

import pytest

from tests.fault import test_kills_of_captures, test_kills_of_starts
from tests.framework.kill_points import Point, daemon_killed, points, vmm_killed
from tests.framework.verbs import Ground, scenarios

pytestmark = pytest.mark.vm

_ELSEWHERE = {*test_kills_of_captures.VERBS, *test_kills_of_starts.VERBS}
VERBS = tuple(verb.name for verb in scenarios() if verb.name not in _ELSEWHERE)


@pytest.mark.parametrize("point", points("kill", *VERBS, every=False), ids=str)
def test_daemon_killed(ground: Ground, point: Point) -> None:
    """At each place of the journal."""
    daemon_killed(ground, point)


@pytest.mark.parametrize("point", points("vmm", *VERBS, every=False), ids=str)
def test_vmm_killed(ground: Ground, point: Point) -> None:
    """Once a step."""
    vmm_killed(ground, point)
