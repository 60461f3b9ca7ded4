"""What a VMM says of itself: asked once, and again where it could not say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from diapause.driver.qemu import QemuDriver, command
from diapause.errors import VmmUnusable
from diapause.store.home import Home

_PROGRAM = """#!/bin/sh
echo asked >>{place}/asked
cat {place}/errors >&2 2>/dev/null
case "$1" in
--version) cat {place}/version ;;
*) cat {place}/machines ;;
esac
exit $(cat {place}/status)
"""
_VERSION = "QEMU emulator version 7.2.22 (Debian)\n"
_MACHINES = "pc-q35-7.1  old\npc-q35-7.2  new\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that says what these files have, and ends with this status."""
    program = tmp_path / "qemu"
    program.write_text(_PROGRAM.format(place=tmp_path))
    program.chmod(0o755)
    says(tmp_path)
    monkeypatch.setattr(command, "PROGRAM", str(program))
    return tmp_path


def says(
    place: Path,
    version: str = _VERSION,
    machines: str = _MACHINES,
    status: int = 0,
    errors: str = "",
) -> None:
    """What it says from now on; the program itself stays as it is."""
    for name, text in (
        ("version", version), ("machines", machines), ("status", str(status)), ("errors", errors),
    ):  # fmt: skip
        (place / name).write_text(text)


def times(place: Path) -> int:
    """How often it was asked."""
    asked = place / "asked"
    return len(asked.read_text().splitlines()) if asked.exists() else 0


@pytest.fixture
def driver(home: Home) -> QemuDriver:
    return QemuDriver(home, None)


def test_it_is_asked_once(place: Path, driver: QemuDriver) -> None:
    """Each question."""
    for _ in range(3):
        assert (driver.version(), driver.machines()[0]) == ("7.2.22", "pc-q35-7.2")
    assert times(place) == 2


def test_a_failure_is_not_remembered(place: Path, driver: QemuDriver) -> None:
    """It failed once, as for a library that could not be opened; then it says what it can."""
    says(place, "", "", 127, "libglib: cannot open shared object file: Error 24\n")
    for ask in (driver.version, driver.machines, lambda: driver.identity("tcg")):
        with pytest.raises(VmmUnusable) as failed:
            ask()
        assert "Error 24 (status 127)" in failed.value.message
    says(place)
    assert driver.identity("tcg").machine == "pc-q35-7.2"


@pytest.mark.parametrize("half", [_VERSION, "\n", ""])
def test_half_an_answer_is_none(place: Path, driver: QemuDriver, half: str) -> None:
    """One that ends well and says nothing, and one that fails after it began to speak."""
    says(place, half, "", 1 if half == _VERSION else 0)
    with pytest.raises(VmmUnusable):
        driver.version()
    says(place)
    assert driver.version() == "7.2.22"


def test_what_is_no_qemu_has_no_version_and_no_machine(place: Path, driver: QemuDriver) -> None:
    """Something else of that name: a typed error, and it is not said to be missing."""
    says(place, "hello\n", "none\n")
    with pytest.raises(VmmUnusable, match="version"):
        driver.version()
    with pytest.raises(VmmUnusable, match="q35"):
        driver.machines()


def test_one_that_can_not_be_started_now(
    place: Path, driver: QemuDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host has no process or no descriptor left: asked again later."""

    def fails(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", fails)
        with pytest.raises(VmmUnusable, match="temporarily"):
            driver.version()
    assert driver.version() == "7.2.22"
    assert times(place) == 1
