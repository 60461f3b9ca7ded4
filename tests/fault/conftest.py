"""The guests of these tests."""

from collections.abc import Iterator

import pytest

from diapause.guest.images import Image
from tests.framework.guest_fixtures import booted, daemon, guest
from tests.framework.mortal import MortalDaemon
from tests.framework.sandbox import real_home
from tests.framework.verbs import Ground

__all__ = ["booted", "daemon", "ground", "guest"]


@pytest.fixture(scope="module")
def ground(tiny_image: Image) -> Iterator[Ground]:
    """A home whose daemon dies as planned, with one warm guest."""
    with real_home(tiny_image) as made:
        yield Ground(MortalDaemon(made.home))
