"""How much of what the pager serves lies in memory.

A page of a served file is in the page cache (`resident`) or not (`pending`: the first access to it
asks the pager). The kernel counts, and is asked through the VMM's own open files: neither the pager
nor the mount is touched, so this can't be held up by what it looks at. Forks share files, and so
what is resident of them. A file that is passed through (`passthrough`) has its bytes in the page
cache as the flat file behind it; what is pending of it is read from there, and nobody is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diapause import _core

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diapause.catalog import SandboxRecord
    from diapause.store.home import Home


def measure(home: Home, pid: int, seen: dict[str, Any]) -> None:
    """Put `resident_bytes`, `pending_bytes` and `passthrough` beside what the pager counted of a
    VMM's files.

    Left out where the process is gone or the kernel can't tell (before Linux 6.5).
    """
    files = seen["files"]
    try:
        found = _ask(home, pid, [file["name"] for file in files])
    except OSError:
        return
    for file in files:
        if (one := found.get(file["name"])) is not None:
            resident, file["passthrough"] = one
            if resident is not None:
                file.update(_of(file["size_bytes"], resident))
    counted = [file for file in files if "resident_bytes" in file]
    for what in ("resident_bytes", "pending_bytes"):
        seen[what] = sum(file[what] for file in counted)


def totals(home: Home, records: Iterable[SandboxRecord]) -> dict[str, int]:
    """`resident_bytes` and `pending_bytes` of all files that VMMs run on, each file once."""
    files: dict[str, dict[str, int]] = {}
    for record in records:
        if record.pager is None or record.process is None or record.root is None:
            continue
        sizes = {f"{record.root}.memory": record.memory_bytes}
        sizes |= {f"{record.root}.disk{i}": size for i, size in enumerate(record.disks_bytes)}
        names = [name for name in sizes if name not in files]
        try:
            found = _ask(home, record.process.pid, names) if names else {}
        except OSError:
            continue
        for name, (there, _) in found.items():
            if there is not None:
                files[name] = _of(sizes[name], there)
    return {
        what: sum(file[what] for file in files.values())
        for what in ("resident_bytes", "pending_bytes")
    }


def _ask(home: Home, pid: int, names: list[str]) -> dict[str, tuple[int | None, bool]]:
    """Of the files that a process has open: resident bytes, and whether it is passed through."""
    parts = [name.rpartition(".") for name in names]
    behind = [str(home.flat_of(snapshot) / device) for snapshot, _, device in parts]
    found = _core.cached_bytes(pid, list(zip(names, behind, strict=True)))
    return {name: one for name, one in zip(names, found, strict=True) if one is not None}


def _of(size_bytes: int, resident: int) -> dict[str, int]:
    return {"resident_bytes": resident, "pending_bytes": max(0, size_bytes - resident)}
