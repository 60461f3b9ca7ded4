"""What a home holds at one instant, for the plan of `gc`: files first, then the rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from diapause import _core
from diapause.errors import DiapauseError
from diapause.limits import MANIFEST_BYTES_MAX
from diapause.sandbox.upkeep.garbage import World
from diapause.store.files import read_file

if TYPE_CHECKING:
    from diapause.driver.base import ProcessRef
    from diapause.sandbox.host import Host
    from diapause.sandbox.upkeep.garbage import Kind
    from diapause.store.home import Home


class _Template(msgspec.Struct):
    digest: str


def places(home: Home) -> dict[Kind, Path]:
    """Where each kind of shared file lies."""
    return {
        "snapshot": home.snapshots, "build": home.builds, "flat": home.flat,
        "capture": home.captures, "template": home.templates,
    }  # fmt: skip


def look(host: Host, *, collecting: bool = False) -> World:
    """The home as it is; what appears after the files were listed is not in it.

    What is read by somebody who stands back for a collection is kept by the collection alone, which
    has waited for that: whoever only reports says what it would find then.
    """
    files = {
        kind: frozenset(path.name for path in place.iterdir())
        for kind, place in places(host.home).items()
    }
    operations = host.catalog.journal.open_operations()
    sandboxes, snapshots = host.catalog.everything()
    return World(
        sandboxes=sandboxes,
        snapshots=snapshots,
        reading=host.leases.held() if collecting else host.leases.held_firmly(),
        capturing=frozenset(one.snapshot for one in operations if one.snapshot is not None),
        files=files,
        copies=not host.ondemand.usual(),
        template_builds={
            name: _builds_of(host.home, name, files["build"]) for name in files["template"]
        },
    )


def _builds_of(home: Home, template: str, builds: frozenset[str]) -> frozenset[str]:
    """The builds that a template's header maps to; all of them where it can't be read."""
    kind = template.partition("-")[0]
    if kind == "overlay":
        return frozenset()
    place = home.templates / template
    header = place / ("memory.header" if kind == "memory" else "disk0.header")
    try:
        data = read_file(place / "template.json", f"templates/{template}", MANIFEST_BYTES_MAX)
        digest = msgspec.json.decode(data, type=_Template).digest
        return frozenset(build for build, _ in _core.header_info(str(header), digest).builds)
    except (DiapauseError, msgspec.DecodeError):
        return builds


def held_inodes(processes: list[ProcessRef]) -> frozenset[int] | None:
    """What the VMMs map or have open, asked of the kernel; None where it doesn't say."""
    found: set[int] = set()
    for process in processes:
        proc = Path(f"/proc/{process.pid}")
        try:
            with (proc / "maps").open() as maps:
                found |= {int(line.split(None, 5)[4]) for line in maps}
            found |= {fd.stat().st_ino for fd in (proc / "fd").iterdir()}
        except (FileNotFoundError, ProcessLookupError):
            if proc.exists():
                return None  # it changed while we looked: nothing is known of it
        except OSError:
            return None
    return frozenset(found)


def inodes_in(path: Path) -> set[int]:
    """The inodes of a file, or of the files of a directory."""
    try:
        return {one.lstat().st_ino for one in (path.iterdir() if path.is_dir() else (path,))}
    except FileNotFoundError:
        return set()
