"""The image `tiny`: Debian's cloud kernel, busybox and our agent, running from memory.

What holds: the guest runs from memory, with nothing in it that is not listed here; the manifest
says what everything was made from.
"""

from __future__ import annotations

import shutil
import struct
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from diapause.guest import images
from diapause.guest.initramfs import Initramfs
from diapause.guest.kernel import NETWORK_MODULES, Kernel, fetch_kernel, order_modules

if TYPE_CHECKING:
    from diapause.guest.steps import ImageBuild

# The driver appends tsc_early_khz with the host's own frequency: with both, no boot depends on
# measuring a clock against an emulated timer. `cryptomgr.notests` leaves out self-tests and
# `noreplace-smp` the patching of locks: a tenth of a second each under an emulated processor.
COMMAND_LINE = "console=ttyS0 quiet panic=-1 reboot=t tsc=reliable cryptomgr.notests noreplace-smp"
FLAVOR = "tiny"
_AGENT = "diapause-agent"
_EXECUTABLE = ("rc", "agent", "network")
_DIRECTORIES = (
    "bin", "sbin", "etc", "lib", "lib/modules", "usr", "dev", "proc", "sys", "run", "data",
)  # fmt: skip
_ELF_PROGRAM_INTERPRETER = 3


def stage(build: ImageBuild) -> Path:
    """Write a whole image into a directory of the build; returns it."""
    agent = _static_program(build, Path(str(resources.files("diapause") / "native" / _AGENT)))
    busybox = _static_program(build, Path(shutil.which("busybox") or "/bin/busybox"))
    kernel = fetch_kernel(build)
    build.progress("writing the initial file system")
    staged = build.directory / "image"
    staged.mkdir()
    shutil.copyfile(kernel.boot_file, staged / images.KERNEL)
    (staged / images.INITRD).write_bytes(_initramfs(build, kernel, agent, busybox).compressed())
    manifest = images.Manifest(
        name=build.image,
        flavor=FLAVOR,
        created_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        kernel=kernel.source,
        files={file: images.FileEntry.of(staged / file) for file in (images.KERNEL, images.INITRD)},
        command_line=COMMAND_LINE,
        agent_blake2b=images.digest(agent),
        network=True,
        busybox=build.run("asking busybox for its version", busybox).split(" multi-call")[0],
    )
    encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (staged / images.MANIFEST).write_bytes(encoded + b"\n")
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
    _add_busybox(build, archive, busybox)
    archive.file("sbin/diapause-agent", agent.read_bytes(), 0o755)
    modules = order_modules(build, kernel)
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


def _add_busybox(build: ImageBuild, archive: Initramfs, busybox: Path) -> None:
    """Links are made now: `busybox --install` at boot takes a tenth of a second."""
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    for applet in build.run("asking busybox for its applets", busybox, "--list").split():
        if applet != "busybox":
            archive.link(f"bin/{applet}", "busybox")


def _static_program(build: ImageBuild, path: Path) -> Path:
    """Check that a program exists and needs no libraries, of which the guest has none."""
    step = f"looking for {path.name}"
    try:
        data = path.read_bytes()
    except OSError as error:
        fix = "make setup" if path.name == _AGENT else "apt-get install busybox-static"
        raise build.failed(step, f"{error}; run `{fix}`") from error
    if not _is_static(data):
        raise build.failed(step, f"{path} is not a static program")
    return path


def _is_static(program: bytes) -> bool:
    """Whether an ELF file of 64 bits names no interpreter."""
    if program[:5] != b"\x7fELF\x02" or len(program) < 64:
        return False
    (table,) = struct.unpack_from("<Q", program, 32)
    entry_size, count = struct.unpack_from("<HH", program, 54)
    if table + entry_size * count > len(program):
        return False
    types = [
        struct.unpack_from("<I", program, table + index * entry_size)[0] for index in range(count)
    ]
    return _ELF_PROGRAM_INTERPRETER not in types
