"""What a daemon is told of the memory mode by its environment."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from diapause.catalog import Catalog
from diapause.sandbox.ondemand import VARIABLE, Ondemand
from diapause.snapshot.flats import FlatStore
from diapause.snapshot.leases import Leases
from diapause.store.gate import Gate
from diapause.store.home import Home
from diapause.store.templates import Templates


@pytest.mark.parametrize(
    ("told", "ondemand", "warned"),
    [(None, True, False), ("ondemand", True, False), ("copy", False, False), ("cpoy", True, True)],
)
def test_whoever_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    told: str | None, ondemand: bool, warned: bool,
) -> None:  # fmt: skip
    """On demand, unless the daemon was told to copy; a word that is neither is said to be none."""
    monkeypatch.delenv(VARIABLE, raising=False)
    if told is not None:
        monkeypatch.setenv(VARIABLE, told)
    home = Home.at(tmp_path / "home")
    home.create()
    with contextlib.closing(Catalog(home.catalog)) as catalog:
        templates, leases = Templates(home), Leases()
        flats = FlatStore(home, catalog, templates, leases, Gate())
        mode = Ondemand(home, catalog, templates, leases, flats)
        assert mode.wanted(None) is ondemand
        assert (mode.wanted("copy"), mode.wanted("ondemand")) == (False, True)
        mode.close()
    assert (VARIABLE in caplog.text) is warned
