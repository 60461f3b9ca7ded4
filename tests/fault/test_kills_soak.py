"""The whole product of kill points, for `make soak`: every place, the daemon and the VMM."""

from __future__ import annotations

import pytest

from tests.framework.kill_points import Point, daemon_killed, points, vmm_killed
from tests.framework.verbs import Ground, scenarios

pytestmark = [pytest.mark.vm, pytest.mark.soak]

VERBS = tuple(verb.name for verb in scenarios())


@pytest.mark.parametrize("point", points("kill", *VERBS, every=True), ids=str)
def test_daemon_killed(ground: Ground, point: Point) -> None:
    """Before the journal's write, after it, after the act; after each call to the VMM."""
    daemon_killed(ground, point)


@pytest.mark.parametrize("point", points("vmm", *VERBS, every=True), ids=str)
def test_vmm_killed(ground: Ground, point: Point) -> None:
    """At the same places."""
    vmm_killed(ground, point)
