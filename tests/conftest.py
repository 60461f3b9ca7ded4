"""Fixtures that all tests share: a home of one's own, and an image that is built once."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from diapause.guest.build import build_image
from diapause.guest.images import Image, find_image
from diapause.store.home import Home
from tests.framework import host
from tests.framework.processes import end_processes

# Bounded and the same every time, unless somebody goes looking: HYPOTHESIS_PROFILE=deep.
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("local", max_examples=200, deadline=None)
settings.register_profile("deep", max_examples=5000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# The home with the images of one run, which its workers inherit the name of.
_SHARED = "DIAPAUSE_TEST_IMAGES"


def pytest_configure(config: pytest.Config) -> None:
    """Make the home of the images, before there are workers."""
    if not hasattr(config, "workerinput"):
        os.environ[_SHARED] = str(_make_home().root)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove it, after all of them have ended."""
    if not hasattr(config, "workerinput"):
        _remove_home(Home.at(os.environ.pop(_SHARED)))


def pytest_report_header() -> str:
    """Say what this machine can do: a figure means little without it."""
    return f"host: {host.describe()}"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """An empty home that `DIAPAUSE_HOME` names; what ran in it is ended, what it held is gone."""
    made = _make_home()
    monkeypatch.setenv("DIAPAUSE_HOME", str(made.root))
    yield made
    _remove_home(made)


@pytest.fixture(scope="session")
def tiny_image() -> Image:
    """The image `tiny`, built once for the whole run."""
    return _shared_image("tiny")


@pytest.fixture(scope="session")
def python_image() -> Image:
    """The image `python`, built once for the whole run: it takes half a minute and a download."""
    return _shared_image("python")


def _shared_image(name: str) -> Image:
    """An image that all workers of a run share: the first that needs it builds it."""
    home = Home.at(os.environ[_SHARED])
    with (home.root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build_image(home, name, name, lambda line: None)
    return find_image(home, name)


@pytest.fixture
def tiny_home(home: Home, tiny_image: Image) -> Home:
    """A home that has the image `tiny`; its files are links, as nothing may change them."""
    target = home.image("tiny")
    target.mkdir()
    for file in tiny_image.directory.iterdir():
        os.link(file, target / file.name)
    target.chmod(0o555)
    return home


def _make_home() -> Home:
    # Short, so that its sockets lie inside it.
    return Home.at(tempfile.mkdtemp(prefix="dia-")).create()


def _remove_home(home: Home) -> None:
    end_processes(home)
    for directory in (home.root, home.sockets, home.buffers):
        _remove_tree(directory)


def _remove_tree(directory: Path) -> None:
    if not directory.exists():
        return
    # What is read-only once built has to be opened before an ordinary user can remove it.
    for path in directory.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(directory)
