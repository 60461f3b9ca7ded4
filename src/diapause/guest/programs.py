"""The programs that go into a guest: our agent and busybox, both without libraries."""

from __future__ import annotations

import shutil
import struct
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diapause.guest.initramfs import Initramfs
    from diapause.guest.steps import ImageBuild

_AGENT = "diapause-agent"
_ELF_PROGRAM_INTERPRETER = 3


def agent_program(build: ImageBuild) -> Path:
    """Our agent, as the package holds it."""
    return static_program(build, Path(str(resources.files("diapause") / "native" / _AGENT)))


def busybox_program(build: ImageBuild) -> Path:
    """The host's busybox."""
    return static_program(build, Path(shutil.which("busybox") or "/bin/busybox"))


def add_busybox(build: ImageBuild, archive: Initramfs, busybox: Path) -> None:
    """Links are made now: `busybox --install` at boot takes a tenth of a second."""
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    for applet in build.run("asking busybox for its applets", busybox, "--list").split():
        if applet != "busybox":
            archive.link(f"bin/{applet}", "busybox")


def static_program(build: ImageBuild, path: Path) -> Path:
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
