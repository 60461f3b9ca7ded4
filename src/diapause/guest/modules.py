"""Drivers for a kernel that somebody brought: where they may be found.

In this order: an image of the same home that boots the same kernel, byte for byte; the root disk's
own `/lib/modules`; the host's. Where there are none, the drivers have to be built in.
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import TYPE_CHECKING

from diapause import limits
from diapause.errors import BlobDamaged, ImageBuildFailed
from diapause.guest import images
from diapause.guest.initramfs import read_archive
from diapause.guest.kernel import ROOT_DISK_MODULES, Kernel
from diapause.guest.rootdisk import Modules, kernel_modules

if TYPE_CHECKING:
    from diapause.guest.steps import ImageBuild
    from diapause.store.home import Home

HOST_MODULES = Path("/lib/modules")
# Without these there is no guest; the others of ROOT_DISK_MODULES make it a better one.
_NEEDED_MODULES = ("virtio_pci", "virtio_blk", "ext4", "virtio_console")
_PLACE = "lib/modules/"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\.ko")


def find_modules(
    build: ImageBuild, home: Home, kernel: Path, source: images.KernelSource
) -> Modules:
    """What a guest loads of a kernel's modules; nothing where none are found."""
    wanted = images.digest(kernel)
    for name in images.names(home):
        try:
            image = images.open_image(home.image(name))
        except BlobDamaged:
            continue  # whoever uses that image is told
        if image.manifest.files[images.KERNEL].blake2b == wanted:
            found = _of_image(image)
            if found.wanted:
                return found
    if (HOST_MODULES / source.version / "modules.builtin").is_file():
        return _of_directory(build, Kernel(source, kernel, HOST_MODULES / source.version))
    return Modules([], [])


def _of_directory(build: ImageBuild, kernel: Kernel) -> Modules:
    for wanted in (ROOT_DISK_MODULES, _NEEDED_MODULES):
        try:
            return kernel_modules(build, kernel, wanted)
        except ImageBuildFailed as error:
            build.progress(f"modules of {kernel.modules} not taken: {error.fields['cause']}")
    return Modules([], [])


def _of_image(image: images.Image) -> Modules:
    """The modules in an initial file system of ours."""
    with gzip.open(image.initrd) as packed:
        data = packed.read(limits.INITRD_BYTES_MAX)
    files = read_archive(data)

    def listed(name: str) -> list[tuple[str, bytes]]:
        names = files.get(_PLACE + name, b"").decode("ascii", "replace").split()
        known = [name for name in names if _NAME.fullmatch(name) and _PLACE + name in files]
        return [(name, files[_PLACE + name]) for name in known]

    return Modules(listed("order"), listed("network"))
