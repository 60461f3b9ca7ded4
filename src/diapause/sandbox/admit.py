"""What is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diapause.errors import InvalidRequest, NameInUse, NotEnoughMemory, NotSupportedYet
from diapause.guest.images import ROOT_DISK
from diapause.limits import (
    CPUS_MAX,
    DISK_BYTES_MAX,
    DISK_BYTES_MIN,
    FORKS_MAX,
    MEMORY_BYTES_MAX,
    MEMORY_BYTES_MIN,
)
from diapause.sandbox.network import check_network
from diapause.sandbox.refer import check_name
from diapause.units import MIB, format_size

if TYPE_CHECKING:
    from diapause.catalog import Catalog
    from diapause.guest.images import Image
    from diapause.model import ForkRequest, RunRequest

_VMM_OVERHEAD_BYTES = 64 * MIB


def available_memory() -> int:
    """What the host can give without swapping, in bytes."""
    with Path("/proc/meminfo").open() as info:
        for line in info:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def check_memory(what: str, memory_bytes: int) -> None:
    """Refuse more memory than the host has."""
    needed, available = memory_bytes + _VMM_OVERHEAD_BYTES, available_memory()
    if needed > available:
        raise NotEnoughMemory(what=what, needed_bytes=needed, available_bytes=available)


def check_run(catalog: Catalog, request: RunRequest) -> None:
    """Refuse a run that can't be; NotSupportedYet for what a later version does."""
    check_name(request.name)
    check_sandbox_name(catalog, request.name)
    _check_size("Memory", request.memory_bytes, MEMORY_BYTES_MIN, MEMORY_BYTES_MAX, MIB)
    _check_size("The disk", request.disk_bytes, DISK_BYTES_MIN, DISK_BYTES_MAX, MIB)
    if not 1 <= request.cpus <= CPUS_MAX:
        raise InvalidRequest(what="The number of CPUs", cause=f"it must be 1 to {CPUS_MAX}")
    if request.vmm != "qemu":
        raise NotSupportedYet(what=f"The VMM {request.vmm!r}")
    check_network(request)
    check_memory("The sandbox", request.memory_bytes)


def check_root_disk(request: RunRequest, image: Image) -> None:
    """Refuse a disk that the image's root file system has no room on."""
    least = image.manifest.files[ROOT_DISK].size if image.root_disk else 0
    if request.disk_bytes < least:
        cause = f"the root disk of image {request.image!r} takes {format_size(least)}"
        raise InvalidRequest(what=f"The disk of {request.disk_bytes} bytes", cause=cause)


def _check_size(what: str, size: int, least: int, most: int, unit: int) -> None:
    if not least <= size <= most:
        cause = f"it must be {format_size(least)} to {format_size(most)}"
        raise InvalidRequest(what=f"{what} of {size} bytes", cause=cause)
    if size % unit:
        raise InvalidRequest(what=f"{what} of {size} bytes", cause="it must be whole MiB")


def check_sandbox_name(catalog: Catalog, name: str | None) -> None:
    """Refuse a name that a sandbox or a snapshot has."""
    for row in catalog.sandboxes() if name else ():
        if name in (row.name, row.id):
            raise NameInUse(name=name, owner=f"sandbox {row.id}")


def check_snapshot_name(catalog: Catalog, name: str | None) -> None:
    """Refuse a name that a snapshot has."""
    check_name(name)
    for row in catalog.snapshots() if name else ():
        if name in (row.name, row.id):
            raise NameInUse(name=name, owner=f"snapshot {row.id}")


def check_fork(request: ForkRequest) -> None:
    """Refuse a number of forks that can't be."""
    if not 1 <= request.count <= FORKS_MAX:
        raise InvalidRequest(what="The number of forks", cause=f"it must be 1 to {FORKS_MAX}")
