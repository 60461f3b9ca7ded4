"""What is shown beside a long verb, and what the question for it must not do."""

from __future__ import annotations

import time

from diapause.cli.progress import shown
from diapause.daemon.client import Client
from diapause.store.home import Home
from tests.framework.fake_home import FakeHome, eventually
from tests.framework.fake_program import fake_daemon

# Longer than a verb is left in peace before it is asked about, and some for the question.
LONG_S = 1.5


def test_the_question_starts_no_daemon(place: FakeHome) -> None:
    """One that is told to stop listens no more, and its home may be about to be removed."""
    started: list[Home] = []

    def command(home: Home) -> list[str]:
        started.append(home)
        return fake_daemon(home)

    with shown(Client(place.home, command), "5a"):
        time.sleep(LONG_S)
    assert not started
    assert not place.home.serve_lock.exists()


def test_a_running_one_is_asked(place: FakeHome) -> None:
    (place.home.root / "stall").touch()
    pausing = place.spawn("pause", place.sandbox("web"))
    eventually("the verb", (place.home.root / "stalled").exists)
    time.sleep(LONG_S)
    (place.home.root / "stall").unlink()
    _, said = pausing.communicate(timeout=60)
    assert b"stalling 2.9 MiB of 8.6 MiB" in said, said
