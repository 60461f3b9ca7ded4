"""The proof of the accelerator: what it showed is remembered, never what kept it from showing."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest

from diapause import errors
from diapause.guest.images import Image, find_image
from diapause.sandbox import accelerator, admit, doctor
from diapause.sandbox.engine import Engine
from diapause.store.home import Home


@pytest.fixture
def engine(tiny_home: Home) -> Iterator[Engine]:
    """An engine in this process, of a home that never proved anything."""
    loop = asyncio.new_event_loop()
    opened = Engine.open(tiny_home, loop)
    yield opened
    opened.close()
    loop.close()


@pytest.fixture
def image(tiny_home: Home) -> Image:
    return find_image(tiny_home, "tiny")


def passing(error: errors.DiapauseError) -> errors.DiapauseError:
    """The same error, come of descriptors that were used up."""
    error.__cause__ = OSError(errno.EMFILE, "Too many open files")
    return error


def boots(patch: pytest.MonkeyPatch, error: BaseException | None) -> list[None]:
    """/dev/kvm opens, and a boot of the proof comes to this; the boots, as they are counted."""
    tried: list[None] = []

    def boot(*_: Any) -> None:
        tried.append(None)
        if error is not None:
            raise error

    patch.setattr(accelerator, "_boot", boot)
    patch.setattr(os, "access", lambda path, mode: True)
    return tried


def remembered(engine: Engine) -> str | None:
    return engine.host.catalog.fact(engine.host.accelerator_key())


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (None, "kvm"),
        (errors.VmmFailed(sandbox="0", step="spawn", cause="no"), "tcg"),
        (errors.VmmTimeout(sandbox="0", step="cont", bound_s=1.0), "tcg"),
        (errors.AgentUnreachable(sandbox="0", bound_s=15.0), "tcg"),
    ],
    ids=str,
)
def test_what_a_guest_showed_is_remembered(
    engine: Engine, image: Image, monkeypatch: pytest.MonkeyPatch, error: Any, found: str
) -> None:
    """QEMU ran, and the guest did or did not: it is tried once."""
    tried = boots(monkeypatch, error)
    assert [accelerator.choose(engine.host, image) for _ in range(2)] == [found, found]
    assert (remembered(engine), len(tried)) == (found, 1)


@pytest.mark.parametrize(
    "error",
    [
        errors.NotEnoughSpace(what="it", needed_bytes=1, directory="/", available_bytes=0),
        errors.ConfinementFailed(sandbox="0", stage="start", cause="Too many open files"),
        passing(errors.VmmFailed(sandbox="0", step="connect", cause="Too many open files")),
        OSError(errno.EMFILE, "Too many open files"),
    ],
    ids=str,
)
def test_what_kept_it_from_the_guest_is_not(
    engine: Engine, image: Image, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    """That run gets TCG, which always works; the next one finds what this host can do."""
    boots(monkeypatch, error)
    assert accelerator.choose(engine.host, image) == "tcg"
    assert remembered(engine) is None
    boots(monkeypatch, None)
    assert accelerator.choose(engine.host, image) == "kvm"
    assert remembered(engine) == "kvm"


def test_a_run_that_is_cancelled_in_the_proof_is_cancelled(
    engine: Engine, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not run under TCG instead, and nothing was proved."""
    boots(monkeypatch, errors.Cancelled(operation="0", verb="run"))
    with pytest.raises(errors.Cancelled):
        accelerator.choose(engine.host, image)
    assert remembered(engine) is None


def test_a_doctor_that_came_to_no_proof_says_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no memory for its guest it remembers nothing about the accelerator."""
    tried = boots(monkeypatch, None)
    monkeypatch.setattr(admit, "available_memory", lambda: 0)
    checks = {check.name: check for check in doctor.examine(engine).checks}
    assert not checks["boot"].ok
    assert "memory" in checks["boot"].detail
    assert (remembered(engine), tried) == (None, [])
    assert checks["kvm"].detail.startswith("not proved yet")
