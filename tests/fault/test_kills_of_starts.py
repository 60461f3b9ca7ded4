"""Kill points of the verbs run, fork, resume: see `tests/framework/verbs.py`."""

from __future__ import annotations

import pytest

from tests.framework.kill_points import Point, daemon_killed, points, vmm_killed
from tests.framework.verbs import Ground

pytestmark = pytest.mark.vm

VERBS = ("run", "fork", "resume")


@pytest.mark.parametrize("point", points("kill", *VERBS, every=False), ids=str)
def test_daemon_killed(ground: Ground, point: Point) -> None:
    """At each place of the journal, and after each call of a frozen section."""
    daemon_killed(ground, point)


@pytest.mark.parametrize("point", points("vmm", *VERBS, every=False), ids=str)
def test_vmm_killed(ground: Ground, point: Point) -> None:
    """Once a step."""
    vmm_killed(ground, point)
