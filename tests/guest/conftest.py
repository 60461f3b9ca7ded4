"""A running agent for each test that asks for one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.framework.agent import Agent


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    """An agent process behind a unix socket."""
    with Agent(tmp_path) as process:
        yield process
