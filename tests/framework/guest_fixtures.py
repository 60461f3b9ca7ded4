"""One home for each module, and one guest in it: a fork is quicker than a boot."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from diapause.guest.images import Image
from tests.framework.sandbox import Daemon, Sandbox, real_home


@pytest.fixture(scope="module")
def daemon(tiny_image: Image) -> Iterator[Daemon]:
    """A home with the image, and its daemon."""
    with real_home(tiny_image) as made:
        yield made


@pytest.fixture(scope="module")
def copying_daemon(tiny_image: Image) -> Iterator[Daemon]:
    """One that makes flat files of what guests are started from, for tests of such files."""
    with real_home(tiny_image, DIAPAUSE_MEMORY_MODE="copy") as made:
        yield made


@pytest.fixture(scope="module")
def booted(daemon: Daemon) -> Sandbox:
    """The module's guest."""
    return daemon.run()


@pytest.fixture
def guest(booted: Sandbox) -> Iterator[Sandbox]:
    """A fork of the module's guest, removed afterwards."""
    with booted.forked() as fork:
        yield fork
