"""The list of kill points is the code's: a verb, a step or a call to the VMM without one fails."""

from __future__ import annotations

import pytest

from tests.framework.mortal import MortalDaemon
from tests.framework.verbs import END, FROZEN_CALLS, Ground, scenarios, verbs


def test_every_verb_has_a_scenario() -> None:
    """See the head of `tests/framework/verbs.py` for what to add."""
    without = [verb.__name__ for verb in verbs() if verb not in scenarios()]
    assert without == []


def test_every_scenario_speaks_of_steps_that_there_are() -> None:
    """A step that was renamed takes its scenario along."""
    assert len(scenarios()) >= 6
    for verb, scenario in scenarios().items():
        assert scenario.commit in verb.steps, verb.__name__
        places = {f"freeze/{call}" for call in FROZEN_CALLS.get(verb.name, ())}
        assert set(scenario.bereaved) <= {*verb.steps, END, *places}, verb.__name__


@pytest.mark.vm
@pytest.mark.parametrize("verb", sorted(FROZEN_CALLS))
def test_every_call_of_a_frozen_section_is_a_place(ground: Ground, verb: str) -> None:
    """A recording of a real capture against the list; a call that is new fails by its name."""
    daemon: MortalDaemon = ground.daemon
    guest = ground.guest()
    daemon.record_calls()
    guest.save() if verb == "save" else guest.pause()
    found = [place for place in daemon.calls() if place.startswith(f"{verb}/")]
    assert found == [f"{verb}/freeze/{call}" for call in FROZEN_CALLS[verb]]
