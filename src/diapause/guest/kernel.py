"""The kernel of an image: Debian's cloud kernel in the version that the host's apt offers now.

What holds: the package is taken through apt, which checks it against the signed lists; what is
recorded is what was taken (version, digest); modules come in an order in which each finds the ones
it needs. Nothing of it is installed on the host.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diapause.errors import ImageBuildFailed
from diapause.guest.images import KernelSource

if TYPE_CHECKING:
    from diapause.guest.steps import ImageBuild

# Unsigned: the same kernel without the signature for a firmware that a guest does not have.
_PACKAGES = r"^linux-image-[0-9].*-cloud-amd64-unsigned$"
_META_PACKAGE = "linux-image-cloud-amd64"
# What a guest on virtio needs, in the order in which it should show up. The console comes before
# the disk: its ports are announced while the disk is still being probed.
MODULES = ("virtio_pci", "virtio_console", "virtio_blk", "virtio_rng", "pvpanic_pci")
# The disk first, as it is waited for.
ROOT_DISK_MODULES = (
    "virtio_pci", "virtio_blk", "ext4", "virtio_console", "virtio_rng", "pvpanic_pci",
)  # fmt: skip
# Loaded only where there is a network device: each module costs a boot some milliseconds.
NETWORK_MODULES = ("virtio_net",)


@dataclass(frozen=True)
class Kernel:
    """A kernel package, unpacked."""

    source: KernelSource
    boot_file: Path
    modules: Path


def fetch_kernel(build: ImageBuild) -> Kernel:
    """Download and unpack the cloud kernel that apt offers."""
    step = "downloading the kernel"
    try:
        name = _choose(build)
        build.progress(f"downloading {name}")
        _download(build, name)
    except ImageBuildFailed:
        # The lists may name a version that the archive has replaced: fetch them and choose again.
        if not _update_lists(build):
            raise
        name = _choose(build)
        build.progress(f"downloading {name}")
        _download(build, name)
    packages = list(build.directory.glob("linux-image-*.deb"))
    if len(packages) != 1:
        raise build.failed(step, f"apt-get left {len(packages)} packages")
    return _unpack(build, name, packages[0])


def order_modules(
    build: ImageBuild,
    kernel: Kernel,
    wanted: tuple[str, ...],
    loaded: frozenset[str] | set[str] = frozenset(),
) -> list[tuple[str, bytes]]:
    """The wanted modules and what they depend on as (file name, content), dependencies first.

    What is in `loaded`, as file names, is left out.
    """
    step = "collecting the kernel's modules"
    files = {_module_name(path): path for path in kernel.modules.rglob("*.ko*")}
    built_in = {
        _module_name(Path(line))
        for line in (kernel.modules / "modules.builtin").read_text().splitlines()
    }
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name in built_in:
            return
        if name not in files:
            raise build.failed(step, f"{kernel.source.package} has no module {name}")
        if files[name].suffix == ".zst":
            raise build.failed(step, f"{files[name].name} is compressed with zstd")
        content = _read_module(files[name])
        for dependency in _depends(content):
            add(dependency)
        ordered[name] = content

    for name in wanted:
        add(name)
    files_of = [(f"{name}.ko", content) for name, content in ordered.items()]
    return [(name, content) for name, content in files_of if name not in loaded]


def _choose(build: ImageBuild) -> str:
    names = _offered(build)
    if not names and _update_lists(build):
        names = _offered(build)
    if not names:
        raise build.failed(
            "choosing a kernel",
            "apt offers no linux-image-*-cloud-amd64-unsigned; run `apt-get update` as root",
        )
    # An archive offers more than one series. The meta-package names the one that this release is
    # tested with; without it, the newest.
    named = f"{_default_package(build)}-unsigned"
    return named if named in names else max(names, key=_version_key)


def _default_package(build: ImageBuild) -> str:
    try:
        found = build.run("choosing a kernel", "apt-cache", "depends", _META_PACKAGE)
    except ImageBuildFailed:
        return ""
    match = re.search(r"Depends: (linux-image-[0-9]\S*-cloud-amd64)$", found, re.MULTILINE)
    return match[1] if match else ""


def _offered(build: ImageBuild) -> list[str]:
    found = build.run("choosing a kernel", "apt-cache", "search", "--names-only", _PACKAGES)
    return [line.split()[0] for line in found.splitlines() if line.strip()]


def _version_key(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _update_lists(build: ImageBuild) -> bool:
    if os.geteuid() != 0:
        return False
    build.progress("refreshing apt's package lists")
    build.run("refreshing apt's package lists", "apt-get", "update", "-qq")
    return True


def _download(build: ImageBuild, name: str) -> None:
    # As root, apt would drop to a user of its own that can't write here, and complain about it.
    build.run(
        "downloading the kernel",
        "apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", name,
    )  # fmt: skip


def _unpack(build: ImageBuild, name: str, package: Path) -> Kernel:
    step = "unpacking the kernel"
    build.progress(f"unpacking {name}")
    root = build.directory / "kernel-package"
    build.run(step, "dpkg-deb", "-x", package, root)
    boot_files = list(root.glob("boot/vmlinuz-*"))
    if len(boot_files) != 1:
        raise build.failed(step, f"{name} holds {len(boot_files)} kernels")
    version = boot_files[0].name.removeprefix("vmlinuz-")
    source = KernelSource(
        version=version,
        package=name,
        package_version=build.run(step, "dpkg-deb", "-f", package, "Version").strip(),
        package_sha256=hashlib.sha256(package.read_bytes()).hexdigest(),
    )
    modules = next((path for path in root.glob(f"**/lib/modules/{version}")), None)
    if modules is None:
        raise build.failed(step, f"{name} holds no modules")
    return Kernel(source, boot_files[0], modules)


def _module_name(path: Path) -> str:
    """The kernel takes '-' and '_' in a module's name for the same."""
    return path.name.split(".")[0].replace("-", "_")


def _read_module(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _depends(module: bytes) -> list[str]:
    """The modules that a module's own .modinfo section says it needs."""
    for entry in module.split(b"\0"):
        if entry.startswith(b"depends="):
            names = entry.removeprefix(b"depends=").decode("ascii").split(",")
            return [name.replace("-", "_") for name in names if name]
    return []
