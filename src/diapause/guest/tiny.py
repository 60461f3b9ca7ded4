"""The image `tiny`: Debian's cloud kernel, busybox and our agent, running from memory.

What holds: the guest runs from memory, with nothing in it that is not listed here; the manifest
says what everything was made from.
"""

from __future__ import annotations

import shutil
from importlib import resources
from typing import TYPE_CHECKING

from diapause.guest import images
from diapause.guest.initramfs import Initramfs
from diapause.guest.kernel import MODULES, NETWORK_MODULES, Kernel, fetch_kernel, order_modules
from diapause.guest.manifests import write_manifest
from diapause.guest.programs import add_busybox, agent_program, busybox_program

if TYPE_CHECKING:
    from pathlib import Path

    from diapause.guest.steps import ImageBuild

# The driver appends tsc_early_khz with the host's own frequency: with both, no boot depends on
# measuring a clock against an emulated timer. `cryptomgr.notests` leaves out self-tests and
# `noreplace-smp` the patching of locks: a tenth of a second each under an emulated processor.
COMMAND_LINE = "console=ttyS0 quiet panic=-1 reboot=t tsc=reliable cryptomgr.notests noreplace-smp"
FLAVOR = "tiny"
_EXECUTABLE = ("rc", "agent", "network")
_DIRECTORIES = (
    "bin", "sbin", "etc", "lib", "lib/modules", "usr", "dev", "proc", "sys", "run", "data",
)  # fmt: skip


def stage(build: ImageBuild) -> Path:
    """Write a whole image into a directory of the build; returns it."""
    agent, busybox = agent_program(build), busybox_program(build)
    kernel = fetch_kernel(build)
    build.progress("writing the initial file system")
    staged = build.directory / "image"
    staged.mkdir()
    shutil.copyfile(kernel.boot_file, staged / images.KERNEL)
    (staged / images.INITRD).write_bytes(_initramfs(build, kernel, agent, busybox).compressed())
    write_manifest(build, staged, FLAVOR, kernel.source, COMMAND_LINE)
    return staged


def _initramfs(build: ImageBuild, kernel: Kernel, agent: Path, busybox: Path) -> Initramfs:
    archive = Initramfs()
    for path in _DIRECTORIES:
        archive.directory(path)
    archive.directory("tmp", 0o1777)
    archive.directory("root", 0o700)
    archive.link("init", "bin/busybox")
    archive.link("usr/bin", "/bin")
    archive.link("usr/sbin", "/sbin")
    add_busybox(build, archive, busybox)
    archive.file("sbin/diapause-agent", agent.read_bytes(), 0o755)
    modules = order_modules(build, kernel, MODULES)
    network = order_modules(build, kernel, NETWORK_MODULES, {name for name, _ in modules})
    for name, content in modules + network:
        archive.file(f"lib/modules/{name}", content)
    archive.file("lib/modules/order", "".join(f"{name}\n" for name, _ in modules).encode())
    archive.file("lib/modules/network", "".join(f"{name}\n" for name, _ in network).encode())
    settings = resources.files("diapause.guest").joinpath("rootfs/etc").iterdir()
    for entry in sorted(settings, key=lambda entry: entry.name):
        mode = 0o755 if entry.name in _EXECUTABLE else 0o644
        archive.file(f"etc/{entry.name}", entry.read_bytes(), mode)
    archive.file("etc/machine-id", b"")
    return archive
