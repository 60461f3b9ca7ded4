"""QEMU by hand, without the driver: for tests of what the driver stands on."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diapause.guest.images import Image
from diapause.guest.initramfs import Initramfs
from diapause.units import GIB, MIB

MEMORY_BYTES = 512 * MIB
WAIT_S = 120.0


@dataclass
class BareQemu:
    """A running QEMU: its process, its console file, its monitor."""

    process: subprocess.Popen[bytes]
    console: Path
    monitor: socket.socket
    started_at: float

    def wait_console(self, text: str) -> float:
        """Wait until the console shows the text; returns the seconds since the start."""
        deadline = time.monotonic() + WAIT_S
        while text not in (shown := self.read_console()):
            assert self.process.poll() is None, f"QEMU ended; the console:\n{shown}"
            assert time.monotonic() < deadline, f"no {text!r} on the console:\n{shown}"
            time.sleep(0.01)
        return time.monotonic() - self.started_at

    def read_console(self) -> str:
        """All that the console has shown so far."""
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def wait_event(self, name: str) -> dict[str, Any]:
        """Wait for an event of the monitor and return its data."""
        self.monitor.settimeout(WAIT_S)
        with self.monitor.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if message.get("event") == name:
                    data: dict[str, Any] = message.get("data", {})
                    return data
        raise AssertionError(f"the monitor closed before {name}")


@contextlib.contextmanager
def boot(
    image: Image,
    directory: Path,
    *,
    disk: bool = True,
    port: bool = True,
    instead_of_agent: str | None = None,
) -> Iterator[BareQemu]:
    """Boot an image with the machine of the driver, and end it whatever happens.

    A script `instead_of_agent` runs in the place of the agent, on the console.
    """
    initrd = directory / "initrd"
    initrd.write_bytes(image.initrd.read_bytes() + _overlay(instead_of_agent))
    command = _machine(directory) + _boot(image, initrd, directory)
    if disk:
        command += _disk(directory / "disk.raw")
    if port:
        command += [
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,path={directory}/agent,server=on,wait=off",
            "-device", "virtserialport,id=agent,chardev=agent,name=diapause.agent",
        ]  # fmt: skip
    monitor, theirs = socket.socketpair()
    command += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-qmp", "chardev:qmp"]
    started_at = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    theirs.close()
    try:
        monitor.sendall(b'{"execute":"qmp_capabilities"}\n')
        yield BareQemu(process, directory / "console", monitor, started_at)
    finally:
        process.kill()
        process.wait(timeout=20)
        monitor.close()


def _machine(directory: Path) -> list[str]:
    memory = directory / "memory"
    with memory.open("wb") as file:
        file.truncate(MEMORY_BYTES)
    options = "usb=off,vmport=off,smbus=off,sata=off,i8042=off,suppress-vmdesc=on"
    return [
        "qemu-system-x86_64", "-M", f"q35,memory-backend=ram,{options}",
        "-bios", "qboot.rom", "-accel", "tcg,tb-size=32", "-m", str(MEMORY_BYTES // MIB),
        "-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
        "-object",
        f"memory-backend-file,id=ram,size={MEMORY_BYTES},mem-path={memory},share=off",
        "-device", "virtio-rng-pci", "-device", "pvpanic-pci",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]  # fmt: skip


def _overlay(script: str | None) -> bytes:
    """Archives may follow one another, and a later file replaces an earlier one."""
    if script is None:
        return b""
    archive = Initramfs()
    archive.directory("etc")
    archive.file("etc/agent", f"#!/bin/sh\n{script}\nsleep 1000\n".encode(), 0o755)
    return archive.compressed()


def _boot(image: Image, initrd: Path, directory: Path) -> list[str]:
    return [
        "-kernel", str(image.kernel), "-initrd", str(initrd),
        "-append", f"{image.manifest.command_line} tsc_early_khz={_tsc_khz()}",
        "-chardev", f"file,id=console,path={directory}/console", "-serial", "chardev:console",
    ]  # fmt: skip


def _disk(path: Path) -> list[str]:
    with path.open("wb") as file:
        file.truncate(1 * GIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True, timeout=60)
    return [
        "-blockdev", f"driver=file,node-name=file,filename={path}",
        "-blockdev", "driver=raw,node-name=disk,file=file",
        "-device", "virtio-blk-pci,drive=disk",
    ]  # fmt: skip


def _tsc_khz() -> int:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return int(float(line.split(":")[1]) * 1000)
    return 2_500_000
