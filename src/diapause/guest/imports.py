"""`image import`: an image of a kernel and a root file system of somebody's own.

What holds: an image that exists stays as it is; an import that fails or is killed leaves nothing
where images are looked for. What was brought is copied first; only the copies are used.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diapause import limits
from diapause.errors import InitrdRefused, InvalidRequest, KernelRefused, NameInUse
from diapause.guest import images
from diapause.guest.bzimage import check_initrd, kernel_version
from diapause.guest.manifests import write_manifest
from diapause.guest.modules import find_modules
from diapause.guest.python import ROOT_DISK_LINE
from diapause.guest.rootdisk import agent_archive, put_agent_in, ramdisk
from diapause.guest.roots import make_root
from diapause.guest.steps import ImageBuild
from diapause.store.files import storage_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from diapause.errors import DiapauseError
    from diapause.model import ImageImportRequest, ImageInfo
    from diapause.store.home import Home

FLAVOR = "imported"
# An initial file system of somebody's own mounts the disk by these words, whoever made it.
_MOUNTED_BY_OTHERS = "root=/dev/vda rootfstype=ext4 rw init=/.diapause/init"
_FROM_MEMORY = "rdinit=/.diapause/rdinit"
_ARCHIVE_ALIGNMENT = 4


@dataclass(frozen=True)
class _Brought:
    """What a person gave, as paths without links."""

    kernel: Path
    initrd: Path | None
    rootfs: Path | None


def import_image(
    home: Home, request: ImageImportRequest, progress: Callable[[str], None]
) -> ImageInfo:
    """Make an image; raises `NameInUse` where there is one of that name."""
    images.check_name(request.name)
    brought = _Brought(
        _path("kernel", request.kernel),
        _path("initrd", request.initrd) if request.initrd is not None else None,
        _path("rootfs", request.rootfs) if request.rootfs is not None else None,
    )
    if brought.initrd is None and brought.rootfs is None:
        raise InvalidRequest(what="An image of a kernel alone", cause="give a rootfs or an initrd")
    if request.name in images.names(home):
        raise NameInUse(name=request.name, owner="an image")
    what = f"Importing image {request.name}"
    with (
        storage_errors(what, home.tmp),
        tempfile.TemporaryDirectory(dir=home.tmp, prefix="image-") as directory,
    ):
        build = ImageBuild(request.name, Path(directory), progress)
        staged = _stage(build, home, brought)
        if not images.publish(staged, home.image(request.name)):
            raise NameInUse(name=request.name, owner="an image")
    progress(f"image {request.name} is ready")
    return images.find_image(home, request.name).info()


def _path(field: str, text: str) -> Path:
    if not text.startswith("/") or "\0" in text:
        raise InvalidRequest(what=f"{field}={text!r}", cause="it is no absolute path")
    return Path(os.path.realpath(text))


def _stage(build: ImageBuild, home: Home, brought: _Brought) -> Path:
    """Write a whole image into a directory of the build; returns it."""
    staged = build.directory / "image"
    staged.mkdir()
    kernel, initrd = staged / images.KERNEL, staged / images.INITRD
    _bring(brought.kernel, kernel, limits.KERNEL_BYTES_MAX, KernelRefused)
    source = images.KernelSource(
        version=kernel_version(kernel, brought.kernel),
        package="",
        package_version="",
        package_sha256=_sha256(kernel),
    )
    if brought.initrd is not None:
        _bring(brought.initrd, initrd, limits.INITRD_BYTES_MAX, InitrdRefused)
        check_initrd(initrd, brought.initrd)
    line = ROOT_DISK_LINE
    disk = staged / images.ROOT_DISK
    if brought.rootfs is not None:
        for note in make_root(build, brought.rootfs, disk):
            build.progress(note)
    modules = find_modules(build, home, kernel, source)
    if brought.rootfs is None:
        line = f"{line} {_FROM_MEMORY}"
        _append(initrd, agent_archive(build, modules))
    elif brought.initrd is None:
        put_agent_in(build, disk)
        initrd.write_bytes(ramdisk(build, modules))
    else:
        line = f"{line} {_MOUNTED_BY_OTHERS}"
        put_agent_in(build, disk, modules)
    build.progress("measuring the image")
    write_manifest(build, staged, FLAVOR, source, line)
    return staged


def _bring(source: Path, target: Path, bytes_max: int, refused: type[DiapauseError]) -> None:
    """Copy a regular file that is no larger than it may be."""
    try:
        # Not blocking: a pipe of that name would have us wait for whoever writes it.
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise refused(path=source, cause=error.strerror or error) from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise refused(path=source, cause="it is no regular file")
    with os.fdopen(fd, "rb") as file, target.open("xb") as copy:
        if found.st_size > bytes_max:
            raise refused(path=source, cause=f"{found.st_size} bytes are more than {bytes_max}")
        shutil.copyfileobj(file, copy)


def _append(initrd: Path, archive: bytes) -> None:
    """One archive behind another: the kernel unpacks both, the later over the earlier."""
    with initrd.open("ab") as file:
        file.write(b"\0" * (-file.tell() % _ARCHIVE_ALIGNMENT))
        file.write(archive)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
