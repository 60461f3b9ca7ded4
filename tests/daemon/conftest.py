"""Fixtures: a home with the fake engine behind a real daemon."""

from collections.abc import Iterator

import pytest

from tests.framework.fake_home import FakeHome, fake_home


@pytest.fixture
def place() -> Iterator[FakeHome]:
    yield from fake_home()
