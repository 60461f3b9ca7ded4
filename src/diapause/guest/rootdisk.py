"""Root disks: an ext4 file system made from a directory, with the agent in it, never mounted.

What holds: everything is done by e2fsprogs in user space, so the host's kernel never parses a file
system that came from outside; the disk is checked when it is done; the agent lies in `/.diapause`,
with what it needs to run beside any init. The same tree gives the same bytes as far as e2fsprogs
can (times and identifiers are fixed).
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from diapause import limits
from diapause.errors import RootfsTooLarge
from diapause.guest.initramfs import Initramfs
from diapause.guest.inodes import ROOT, debugfs, list_directories
from diapause.guest.kernel import NETWORK_MODULES, ROOT_DISK_MODULES, Kernel, order_modules
from diapause.guest.programs import add_busybox, agent_program, busybox_program
from diapause.units import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diapause.guest.steps import ImageBuild

# Fixed, so that the same tree gives the same disk. A sandbox that minds has `tune2fs -U random`.
UUID = "d1a9a05e-0000-4000-8000-000000000000"
EPOCH = "1700000000"
SCRIPTS = ("init", "supervise")
_SLACK_BYTES = 64 * MIB
_OUR_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}(\.ko)?")
_BLOCK_BYTES = 4 * KIB
_INODE_RATIO = 16 * KIB


@dataclass(frozen=True)
class Modules:
    """Drivers as (file name, content) in the order in which they load."""

    wanted: list[tuple[str, bytes]]
    network: list[tuple[str, bytes]]  # only where there is a network device

    def files(self) -> dict[str, bytes]:
        """They and the files that say their order, by name."""
        lists = {"order": self.wanted, "network": self.network}
        orders = {
            file: "".join(f"{name}\n" for name, _ in modules).encode()
            for file, modules in lists.items()
        }
        return {**dict(self.wanted), **dict(self.network), **orders}


def make_disk(build: ImageBuild, tree: Path, disk: Path) -> None:
    """An ext4 file system of `tree`, with little room left: a sandbox's is grown to its size."""
    content_bytes, entries = measure(tree)
    size = content_bytes + content_bytes // 10 + _SLACK_BYTES
    with disk.open("xb") as file:
        file.truncate(-(-size // MIB) * MIB)
    build.run(
        "writing the root disk",
        "mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-b", str(_BLOCK_BYTES), "-L", "root",
        "-N", str(entries + size // _INODE_RATIO), "-U", UUID,
        "-E", f"hash_seed={UUID},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,nodiscard",
        "-d", tree, disk,
        bound_s=limits.IMAGE_BUILD_S,
        environment={"SOURCE_DATE_EPOCH": EPOCH, "E2FSPROGS_FAKE_TIME": EPOCH},
    )  # fmt: skip


def measure(tree: Path) -> tuple[int, int]:
    """What the files of a tree take in blocks, and how many entries there are; bounded."""
    size = entries = 0
    for directory, subdirectories, names in os.walk(tree):
        entries += len(subdirectories) + len(names)
        size += _BLOCK_BYTES * (len(subdirectories) + 1)
        for name in names:
            found = (Path(directory) / name).lstat()
            if stat.S_ISREG(found.st_mode):
                size += -(-found.st_size // _BLOCK_BYTES) * _BLOCK_BYTES
        if size > limits.ROOT_DISK_BYTES_MAX or entries > limits.ROOT_DISK_ENTRIES_MAX:
            most = f"{limits.ROOT_DISK_BYTES_MAX} bytes and {limits.ROOT_DISK_ENTRIES_MAX} entries"
            raise RootfsTooLarge(cause=f"{tree} holds more than {most}")
    return size, entries


def put_agent_in(build: ImageBuild, disk: Path, modules: Modules | None = None) -> None:
    """Write the agent and what starts it into an ext4 file, and check the whole.

    What stands in `/.diapause` already is an agent of another version, and goes. Modules go beside
    it where the initial file system is somebody else's, who may not load them.
    """
    step = "putting the agent in"
    place = build.directory / "agent-files"
    place.mkdir()
    files = _agent_files(build) | (modules.files() if modules else {})
    # Nothing but names of ours is in these lines: a name from outside could be a command.
    assert all(_OUR_NAME.fullmatch(name) for name in files), files.keys()
    lines = _room_for(build, step, disk, files.keys())
    for name, content in files.items():
        (place / name).write_bytes(content)
        lines += [f"write agent-files/{name} {name}", f"sif {name} mode 0100755"]
        lines += [f"sif {name} uid 0", f"sif {name} gid 0"]
    debugfs(build, step, disk, lines, EPOCH)
    # What it wrote is looked at, beside what it said.
    for name, content in files.items():
        shown = build.run(step, "debugfs", "-R", f"stat /.diapause/{name}", disk)
        if f"Size: {len(content)}\n" not in shown or "Type: regular" not in shown:
            raise build.failed(step, f"/.diapause/{name} did not get into the file system")
    build.run("checking the root disk", "e2fsck", "-fn", disk, bound_s=limits.IMAGE_BUILD_S)


def _agent_files(build: ImageBuild) -> dict[str, bytes]:
    """What lies in `/.diapause` wherever the agent runs beside another init."""
    programs = {"agent": agent_program(build), "busybox": busybox_program(build)}
    files = {name: path.read_bytes() for name, path in programs.items()}
    return files | {name: script("agent", name) for name in SCRIPTS}


def _room_for(build: ImageBuild, step: str, disk: Path, names: Iterable[str]) -> list[str]:
    """The commands that make `/.diapause`, or take out of it what stands in the way."""
    found = list_directories(build, disk, [ROOT]).get(ROOT, {}).get(b".diapause")
    if found is None:
        return ["mkdir /.diapause", "cd /.diapause"]
    if not found.is_directory:
        raise build.failed(step, "/.diapause is there and is no directory")
    inside = list_directories(build, disk, [found.number]).get(found.number, {})
    return ["cd /.diapause", *(f"rm {name}" for name in names if name.encode() in inside)]


def kernel_modules(
    build: ImageBuild, kernel: Kernel, names: tuple[str, ...] = ROOT_DISK_MODULES
) -> Modules:
    """What a guest with a root disk loads of a kernel's modules."""
    wanted = order_modules(build, kernel, names)
    loaded = {name for name, _ in wanted}
    return Modules(wanted, order_modules(build, kernel, NETWORK_MODULES, loaded))


def ramdisk(build: ImageBuild, modules: Modules) -> bytes:
    """The initial file system that mounts the root disk and goes over to it."""
    archive = Initramfs()
    for path in ("bin", "lib", "lib/modules", "dev", "proc", "sys", "disk"):
        archive.directory(path)
    add_busybox(build, archive, busybox_program(build))
    archive.file("init", script("ramdisk", "init"), 0o755)
    for name, content in modules.files().items():
        archive.file(f"lib/modules/{name}", content)
    return archive.compressed()


def agent_archive(build: ImageBuild, modules: Modules) -> bytes:
    """`/.diapause` as an archive that follows an initial file system of somebody else's."""
    archive = Initramfs()
    archive.directory(".diapause")
    files = _agent_files(build) | {"rdinit": script("agent", "rdinit")} | modules.files()
    for name, content in files.items():
        archive.file(f".diapause/{name}", content, 0o755)
    return archive.compressed()


def script(part: str, name: str) -> bytes:
    """One of the scripts that run in a guest."""
    return resources.files("diapause.guest").joinpath("rootfs", part, name).read_bytes()
