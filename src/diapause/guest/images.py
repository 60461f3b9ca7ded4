"""Images: the kernel and the initial file system that guests boot from.

What holds: an image's directory is whole or absent (it is written elsewhere, synced and renamed
into place), its files are read-only and never change, and its manifest says the size and the digest
of each. A manifest is read under a bound; sizes are checked whenever an image is found, digests
when `Image.verify` is called.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from diapause import limits
from diapause.errors import BlobDamaged, ImageNotFound, InvalidRequest
from diapause.model import ImageInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diapause.store.home import Home

MANIFEST_VERSION = 2
_VERSIONS = (1, MANIFEST_VERSION)  # 1 knew no network and no root disk
MANIFEST = "manifest.json"
KERNEL = "kernel"
INITRD = "initrd"
ROOT_DISK = "rootfs.ext4"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_READ_BYTES = 1 << 20


class FileEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A file as it was when the image was built."""

    size: int
    blake2b: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Measure a file."""
        return cls(size=path.stat().st_size, blake2b=digest(path))


class KernelSource(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where the kernel came from."""

    version: str
    package: str
    package_version: str
    package_sha256: str


class Manifest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What manifest.json holds."""

    format: int = MANIFEST_VERSION
    name: str
    flavor: str
    created_at: str
    kernel: KernelSource
    files: dict[str, FileEntry]
    command_line: str
    agent_blake2b: str
    busybox: str
    network: bool = False  # whether the guest takes up a network device


@dataclass(frozen=True)
class Image:
    """An image that was found, with its manifest."""

    directory: Path
    manifest: Manifest

    @property
    def kernel(self) -> Path:
        """The kernel, as the VMM's `-kernel` takes it."""
        return self.directory / KERNEL

    @property
    def initrd(self) -> Path:
        """The initial file system, as the VMM's `-initrd` takes it."""
        return self.directory / INITRD

    @property
    def root_disk(self) -> Path | None:
        """The read-only ext4 file that a sandbox's disk0 stands on, where the image has one."""
        return self.directory / ROOT_DISK if ROOT_DISK in self.manifest.files else None

    @property
    def root_disk_digest(self) -> str | None:
        """The digest of the root disk."""
        return self.manifest.files[ROOT_DISK].blake2b if self.root_disk else None

    def verify(self) -> None:
        """Read every file and compare its digest; raises `BlobDamaged` with the file's name."""
        for name, entry in self.manifest.files.items():
            if (found := digest(self.directory / name)) != entry.blake2b:
                raise BlobDamaged(
                    blob=self.directory / name, cause=f"digest {found}, not {entry.blake2b}"
                )

    def info(self, *, already: bool = False) -> ImageInfo:
        """The image as `image ls` shows it."""
        files = self.manifest.files
        return ImageInfo(
            name=self.manifest.name,
            flavor=self.manifest.flavor,
            created_at=self.manifest.created_at,
            kernel_version=self.manifest.kernel.version,
            size_bytes=sum(entry.size for entry in files.values()),
            digests={name: f"blake2b:{entry.blake2b}" for name, entry in files.items()},
            already=already,
        )


def check_name(name: str) -> str:
    """Return the name if an image may have it: it becomes a directory's."""
    if len(name) > limits.NAME_LENGTH_MAX or not _NAME.fullmatch(name):
        raise InvalidRequest(
            what=f"The image name {name!r}",
            cause=f"use a-z, 0-9, '.', '_', '-', at most {limits.NAME_LENGTH_MAX}",
        )
    return name


def names(home: Home) -> list[str]:
    """The names of all images, sorted; none in a home that was never used."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(entry.name for entry in home.images.iterdir() if _NAME.fullmatch(entry.name))
    return []


def list_images(home: Home) -> list[ImageInfo]:
    """All images; a damaged one raises, since a list without it would hide it."""
    return [open_image(home.image(name)).info() for name in names(home)]


def find_image(home: Home, name: str) -> Image:
    """The image of that name; raises `ImageNotFound` with the names there are."""
    known = names(home)
    if name not in known:
        raise ImageNotFound(reference=name, candidates=", ".join(known) or "none")
    return open_image(home.image(name))


def open_image(directory: Path) -> Image:
    """Read the manifest and check the files against their sizes."""
    manifest = read_manifest(directory / MANIFEST)
    if missing := {KERNEL, INITRD} - manifest.files.keys():
        raise BlobDamaged(blob=directory / MANIFEST, cause=f"it does not name {sorted(missing)}")
    for name, entry in manifest.files.items():
        _check_size(directory / name, entry)
    return Image(directory, manifest)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest under its bound; raises `BlobDamaged` for anything that is not one."""
    try:
        with path.open("rb") as file:
            data = file.read(limits.MANIFEST_BYTES_MAX + 1)
        if len(data) > limits.MANIFEST_BYTES_MAX:
            raise BlobDamaged(blob=path, cause=f"above {limits.MANIFEST_BYTES_MAX} bytes")
        manifest = msgspec.json.decode(data, type=Manifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise BlobDamaged(blob=path, cause=error) from error
    if manifest.format not in _VERSIONS:
        raise BlobDamaged(blob=path, cause=f"format {manifest.format}, not {MANIFEST_VERSION}")
    # The names are joined to the directory: nothing in a manifest may lead out of it.
    for name in manifest.files:
        if not _NAME.fullmatch(name):
            raise BlobDamaged(blob=path, cause=f"it names the file {name!r}")
    return manifest


def publish(staged: Path, target: Path) -> bool:
    """Rename a whole image into place, durably; False if another one was there first."""
    for path in staged.iterdir():
        path.chmod(0o444)
        _sync(path)
    _sync(staged)
    try:
        staged.rename(target)
    except OSError:
        if target.is_dir():
            return False
        raise
    # Only now: a directory that its owner can't write can't be moved either.
    target.chmod(0o555)
    _sync(target.parent)
    return True


def digest(path: Path) -> str:
    """BLAKE2b-256 of a file, in hex."""
    state = hashlib.blake2b(digest_size=32)
    for block in _blocks(path):
        state.update(block)
    return state.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            yield block


def _check_size(path: Path, entry: FileEntry) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BlobDamaged(blob=path, cause=error) from error
    if size != entry.size:
        raise BlobDamaged(blob=path, cause=f"{size} bytes, not {entry.size}")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
