"""The image `python`: a minimal Debian with python3 and pip on a root disk.

`pip install` works without asking for a virtual environment, offline too: a sandbox is one.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from diapause.guest import images
from diapause.guest.debian import make_tree
from diapause.guest.kernel import fetch_kernel
from diapause.guest.manifests import write_manifest
from diapause.guest.rootdisk import kernel_modules, make_disk, put_agent_in, ramdisk
from diapause.guest.tiny import COMMAND_LINE
from diapause.units import GIB

if TYPE_CHECKING:
    from pathlib import Path

    from diapause.guest.steps import ImageBuild

FLAVOR = "python"
BUILD_BYTES = 2 * GIB
PACKAGES = ("python3", "python3-pip", "python-is-python3", "ca-certificates")
# Interfaces keep the kernel's names, so that one address can be given to all.
ROOT_DISK_LINE = f"{COMMAND_LINE} net.ifnames=0"
_PIP = "[global]\nbreak-system-packages = true\nroot-user-action = ignore\n"


def stage(build: ImageBuild) -> Path:
    """Write a whole image into a directory of the build; returns it."""
    staged, tree = build.directory / "image", build.directory / "tree"
    staged.mkdir()
    kernel = fetch_kernel(build)
    make_tree(build, tree, PACKAGES)
    (tree / "etc/hostname").write_text("python\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    (tree / "etc/pip.conf").write_text(_PIP)
    build.progress("writing the root disk")
    make_disk(build, tree, staged / images.ROOT_DISK)
    put_agent_in(build, staged / images.ROOT_DISK)
    shutil.copyfile(kernel.boot_file, staged / images.KERNEL)
    (staged / images.INITRD).write_bytes(ramdisk(build, kernel_modules(build, kernel)))
    write_manifest(build, staged, FLAVOR, kernel.source, ROOT_DISK_LINE)
    return staged
