"""A VMM whose start fails after its launch: nobody knows of it yet, so nobody else could end it."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from diapause.driver.base import Shape, StartPlan, VmmIdentity
from diapause.driver.launch import Child
from diapause.driver.qemu import driver as module
from diapause.driver.qemu.driver import QemuDriver
from diapause.store.home import Home
from diapause.units import MIB


@pytest.fixture
def plan(home: Home, tmp_path: Path) -> StartPlan:
    home.create()
    (tmp_path / "memory").touch()
    return StartPlan(
        sandbox="5a" * 8,
        identity=VmmIdentity("qemu", "7.2.0", "pc-q35-7.2", "max", "tcg", ""),
        shape=Shape(memory_bytes=MIB, cpus=1, disks_bytes=()),
        memory=tmp_path / "memory",
        disks=(),
        console_log=tmp_path / "console.log",
        vmm_log=tmp_path / "vmm.log",
        boot=None,
        forwards=(),
    )


def test_one_that_can_not_be_looked_at_is_ended(
    home: Home, plan: StartPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc may refuse as any file system may."""
    launched = subprocess.Popen(["sleep", "600"])

    def refuse(pid: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), f"/proc/{pid}/stat")

    monkeypatch.setattr(module, "launch", lambda *_: Child(launched.pid))
    monkeypatch.setattr(module, "process_ref", refuse)
    try:
        with pytest.raises(OSError, match="Input/output error"):
            QemuDriver(home, None).start(plan)
        with pytest.raises(ChildProcessError):  # it has ended, and was waited for
            os.waitpid(launched.pid, os.WNOHANG)
    finally:
        launched.kill()
        launched.wait(timeout=60)
