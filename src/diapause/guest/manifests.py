"""Writing an image's manifest: the same for every way to make one."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from diapause.guest import images
from diapause.guest.programs import agent_program, busybox_program

if TYPE_CHECKING:
    from pathlib import Path

    from diapause.guest.steps import ImageBuild


def write_manifest(
    build: ImageBuild, staged: Path, flavor: str, kernel: images.KernelSource, command_line: str
) -> None:
    """Measure every file of a staged image and say what it was made from."""
    names = sorted(path.name for path in staged.iterdir())
    said = build.run("asking busybox for its version", busybox_program(build))
    manifest = images.Manifest(
        name=build.image,
        flavor=flavor,
        created_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        kernel=kernel,
        files={name: images.FileEntry.of(staged / name) for name in names},
        command_line=command_line,
        agent_blake2b=images.digest(agent_program(build)),
        busybox=said.split(" multi-call")[0],
        network=True,
    )
    encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (staged / images.MANIFEST).write_bytes(encoded + b"\n")
