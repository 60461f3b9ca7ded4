"""Root disks of what somebody brings: a directory, a tar, or an ext4 file system in a file.

What holds: nothing of it is mounted, run or followed on the host. A tar's files are made as
ordinary files of ours; owners, set-id bits, devices and attributes exist in the ext4 file only. An
ext4 file is copied first, and only the copy is read, checked and written.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from diapause import _core, limits
from diapause.errors import (
    ArchiveRefused,
    CopyFailed,
    NotEnoughSpace,
    RootfsArchiveRefused,
    RootfsDamaged,
    RootfsRefused,
    RootfsTooLarge,
)
from diapause.guest.owners import apply_entries, give_to_root
from diapause.guest.rootdisk import make_disk, measure
from diapause.operation import checkpoint, progress
from diapause.store.files import free_bytes
from diapause.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diapause.guest.steps import ImageBuild

_HEAD_BYTES = 2048
_TAR_MAGIC_AT = 257
_SUPERBLOCK_AT = 1024
_NEEDS_RECOVERY, _JOURNAL_ELSEWHERE = 0x4, 0x8
_GROWN_BYTES = 64 * MIB  # room for the agent, and some to boot with
_KEPT_FREE_BYTES = 64 * MIB
_UNPACKERS = {
    b"\x1f\x8b": "gzip", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2",
}  # fmt: skip
_KNOWN_STRANGERS = {
    b"QFI\xfb": "it is a qcow2 image; `qemu-img convert -O raw` makes a plain one",
    b"hsqs": "it is a squashfs; `unsquashfs` makes a directory of it",
    b"070701": "it is a cpio archive; give it as --initrd",
}


def make_root(build: ImageBuild, source: Path, disk: Path) -> list[str]:
    """Write the root disk of what `source` is; sentences about what was left out."""
    try:
        if stat.S_ISDIR(source.stat().st_mode):
            return _of_directory(build, source, disk)
        with _opened(source) as head:
            if head[_TAR_MAGIC_AT:].startswith(b"ustar"):
                return _of_tar(build, source, disk, None)
            for magic, program in _UNPACKERS.items():
                if head.startswith(magic):
                    return _of_tar(build, source, disk, program)
            if head[_SUPERBLOCK_AT + 56 :].startswith(b"\x53\xef"):
                return _of_ext4(build, source, disk)
        raise RootfsRefused(path=source, cause=_stranger(head))
    except PermissionError as error:
        raise RootfsRefused(path=source, cause="the daemon may not read it") from error
    except FileNotFoundError as error:
        raise RootfsRefused(path=source, cause="it is not there") from error


@contextmanager
def _opened(source: Path) -> Iterator[bytes]:
    """The beginning of a regular file."""
    # Not blocking: a pipe of that name would have us wait for whoever writes it.
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RootfsRefused(path=source, cause="it is neither a directory nor a regular file")
        yield file.read(_HEAD_BYTES)


def _stranger(head: bytes) -> str:
    for magic, cause in _KNOWN_STRANGERS.items():
        if head.startswith(magic):
            return cause
    if head[510:512] == b"\x55\xaa":
        return "it is a disk with partitions; give the file system of one of them"
    return "it is neither a tar nor an ext4 file system"


# -- a directory -----------------------------------------------------------------------------------


def _of_directory(build: ImageBuild, source: Path, disk: Path) -> list[str]:
    """Links stay links; a file system that is mounted below it is not walked into."""
    home = build.directory.resolve()
    if home.is_relative_to(source):
        raise RootfsRefused(path=source, cause="the home that the image goes to is inside it")
    _refuse_mounts(source)
    build.progress(f"reading {source}")
    _need_space(build, measure(source)[0])
    build.progress("writing the root disk")
    make_disk(build, source, disk)
    if os.geteuid() != 0:
        give_to_root(build, disk)
    return []


def _refuse_mounts(source: Path) -> None:
    device = source.stat().st_dev
    for directory, subdirectories, _ in os.walk(source):
        for name in subdirectories:
            path = Path(directory) / name
            if path.lstat().st_dev != device:
                cause = f"a file system is mounted at {path}; unmount it, or copy the tree"
                raise RootfsRefused(path=source, cause=cause)


def _need_space(build: ImageBuild, needed_bytes: int) -> None:
    if (free := free_bytes(build.directory)) < needed_bytes + _KEPT_FREE_BYTES:
        raise NotEnoughSpace(
            what=f"Importing image {build.image}", needed_bytes=needed_bytes + _KEPT_FREE_BYTES,
            directory=build.directory, available_bytes=free,
        )  # fmt: skip


# -- a tar -----------------------------------------------------------------------------------------


def _of_tar(build: ImageBuild, source: Path, disk: Path, program: str | None) -> list[str]:
    tree = build.directory / "tree"
    tree.mkdir(mode=0o755)
    build.progress(f"unpacking {source}")
    summary, entries = _unpack(build, source, tree, program)
    build.progress("writing the root disk")
    make_disk(build, tree, disk)
    shutil.rmtree(tree)
    if os.geteuid() != 0:
        give_to_root(build, disk)
    apply_entries(build, disk, entries, source)
    more = [f"and {summary.more_notes} more"] if summary.more_notes else []
    return [*summary.notes, *more]


def _unpack(
    build: ImageBuild, source: Path, tree: Path, program: str | None
) -> tuple[_core.ArchiveSummary, list[_core.RootfsEntry]]:
    def told(done: int, _: int) -> None:
        checkpoint()
        progress(done, None, f"unpacking {source.name}")
        _need_space(build, 0)

    with source.open("rb") as file, _plain(build, file.fileno(), program) as descriptor:
        try:
            return _core.rootfs_unpack(
                descriptor, str(tree), limits.ROOT_DISK_BYTES_MAX, limits.ROOT_DISK_ENTRIES_MAX,
                told,
            )  # fmt: skip
        except ArchiveRefused as error:
            raise RootfsArchiveRefused(path=source, **error.fields) from error
        except CopyFailed as error:
            raise build.failed("unpacking", error.message) from error


@contextmanager
def _plain(build: ImageBuild, descriptor: int, program: str | None) -> Iterator[int]:
    """A descriptor of the plain archive; a program that unpacks it ends with the block."""
    if program is None:
        yield descriptor
        return
    try:
        process = subprocess.Popen(
            [program, "-dc"],
            stdin=descriptor, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError as error:
        raise build.failed("unpacking", f"{error}; install {program}") from error
    with process:
        assert process.stdout is not None
        try:
            yield process.stdout.fileno()
        finally:
            process.kill()


# -- an ext4 file ----------------------------------------------------------------------------------


def _of_ext4(build: ImageBuild, source: Path, disk: Path) -> list[str]:
    found = source.stat()
    if found.st_size > limits.ROOT_DISK_BYTES_MAX - _GROWN_BYTES:
        raise RootfsTooLarge(cause=f"{found.st_size} bytes of at most {limits.ROOT_DISK_BYTES_MAX}")
    _need_space(build, min(found.st_size, found.st_blocks * 512))
    build.progress(f"copying {source}")
    build.run(
        "copying the root disk",
        "cp", "--reflink=auto", "--sparse=always", "--no-preserve=all", "--", source, disk,
        bound_s=limits.IMAGE_BUILD_S,
    )  # fmt: skip
    disk.chmod(0o600)
    _check_superblock(build, source, disk)
    _check(build, source, disk)
    size = disk.stat().st_size + _GROWN_BYTES
    with disk.open("r+b") as file:
        file.truncate(-(-size // MIB) * MIB)
    # Without -f it asks for a check that writes.
    build.run("growing the root disk", "resize2fs", "-f", disk, bound_s=limits.IMAGE_BUILD_S)
    return []


def _check_superblock(build: ImageBuild, source: Path, disk: Path) -> None:
    with disk.open("rb") as file:
        file.seek(_SUPERBLOCK_AT)
        block = file.read(1024).ljust(1024, b"\0")
    low, shift = (struct.unpack_from("<I", block, at)[0] for at in (0x4, 0x18))
    incompatible, high = (struct.unpack_from("<I", block, at)[0] for at in (0x60, 0x150))
    if shift > 6:
        raise RootfsDamaged(path=source, cause="its blocks have no size that can be")
    size = ((high if incompatible & 0x80 else 0) << 32 | low) << (10 + shift)
    if size > disk.stat().st_size:
        cause = f"it ends after {disk.stat().st_size} of {size} bytes"
        raise RootfsDamaged(path=source, cause=cause)
    if incompatible & _JOURNAL_ELSEWHERE:
        raise RootfsRefused(path=source, cause="its journal is on another device")
    if incompatible & _NEEDS_RECOVERY:
        _fsck(build, source, disk, "-y", "-E", "journal_only")


def _check(build: ImageBuild, source: Path, disk: Path) -> None:
    build.progress("checking the root disk")
    _fsck(build, source, disk, "-fn")


def _fsck(build: ImageBuild, source: Path, disk: Path, *options: str) -> None:
    step = "checking the root disk"
    done = build.call(step, "e2fsck", *options, disk, bound_s=limits.IMAGE_BUILD_S)
    if done.returncode not in (0, 1):
        said = (done.stdout or done.stderr).decode(errors="replace").splitlines()
        lines = [line.strip() for line in said if line.strip() and not line.startswith("Pass ")]
        shown = "; ".join(lines[:3])[:300] or f"e2fsck ended with {done.returncode}"
        raise RootfsDamaged(path=source, cause=shown.replace(str(disk), source.name))
