"""Root disks: an ext4 file system made from a directory, with the agent in it, never mounted.

What holds: everything is done by e2fsprogs in user space, so the host's kernel never parses a file
system that came from outside; the disk is checked when it is done; the agent lies in `/.diapause`,
with what it needs to run beside any init. The same tree gives the same bytes as far as e2fsprogs
can (times and identifiers are fixed).
"""

from __future__ import annotations

import os
import shutil
import stat
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from diapause import limits
from diapause.guest.initramfs import Initramfs
from diapause.guest.kernel import NETWORK_MODULES, ROOT_DISK_MODULES, Kernel, order_modules
from diapause.guest.programs import add_busybox, agent_program, busybox_program
from diapause.units import KIB, MIB

if TYPE_CHECKING:
    from diapause.guest.steps import ImageBuild

# Fixed, so that the same tree gives the same disk. A sandbox that minds has `tune2fs -U random`.
UUID = "d1a9a05e-0000-4000-8000-000000000000"
EPOCH = "1700000000"
SCRIPTS = ("init", "supervise")
_SLACK_BYTES = 64 * MIB
_BLOCK_BYTES = 4 * KIB
_INODE_RATIO = 16 * KIB


def make_disk(build: ImageBuild, tree: Path, disk: Path) -> None:
    """An ext4 file system of `tree`, with little room left: a sandbox's is grown to its size."""
    content_bytes, entries = measure(build, tree)
    size = content_bytes + content_bytes // 10 + _SLACK_BYTES
    with disk.open("xb") as file:
        file.truncate(-(-size // MIB) * MIB)
    build.run(
        "writing the root disk",
        "mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-b", str(_BLOCK_BYTES), "-L", "root",
        "-N", str(entries + size // _INODE_RATIO), "-U", UUID,
        "-E", f"hash_seed={UUID},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,nodiscard",
        "-d", tree, disk,
        environment={"SOURCE_DATE_EPOCH": EPOCH, "E2FSPROGS_FAKE_TIME": EPOCH},
    )  # fmt: skip


def measure(build: ImageBuild, tree: Path) -> tuple[int, int]:
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
            raise build.failed("measuring the root file system", "it is larger than can be")
    return size, entries


def put_agent_in(build: ImageBuild, disk: Path) -> None:
    """Write the agent and what starts it into an ext4 file, and check the whole."""
    place = build.directory / "agent-files"
    place.mkdir()
    shutil.copyfile(agent_program(build), place / "agent")
    shutil.copyfile(busybox_program(build), place / "busybox")
    for name in SCRIPTS:
        (place / name).write_bytes(script("agent", name))
    # Nothing but names of ours is in these lines: a name from outside could be a command.
    names = ("agent", "busybox", *SCRIPTS)
    lines = ["mkdir /.diapause", "cd /.diapause"]
    for name in names:
        lines += [f"write agent-files/{name} {name}", f"sif {name} mode 0100755"]
        lines += [f"sif {name} uid 0", f"sif {name} gid 0"]
    (build.directory / "agent-commands").write_text("".join(f"{line}\n" for line in lines))
    step = "putting the agent in"
    fake_time = {"E2FSPROGS_FAKE_TIME": EPOCH}
    build.run(step, "debugfs", "-w", "-f", "agent-commands", disk, environment=fake_time)
    # debugfs says nothing by its exit code: what it wrote is looked at.
    for name in names:
        shown = build.run(step, "debugfs", "-R", f"stat /.diapause/{name}", disk)
        if f"Size: {(place / name).stat().st_size}\n" not in shown:
            raise build.failed(step, f"/.diapause/{name} did not get into the file system")
    build.run("checking the root disk", "e2fsck", "-fn", disk)


def ramdisk(build: ImageBuild, kernel: Kernel) -> bytes:
    """The initial file system that mounts the root disk and goes over to it."""
    archive = Initramfs()
    for path in ("bin", "lib", "lib/modules", "dev", "proc", "sys", "disk"):
        archive.directory(path)
    add_busybox(build, archive, busybox_program(build))
    archive.file("init", script("ramdisk", "init"), 0o755)
    wanted = order_modules(build, kernel, ROOT_DISK_MODULES)
    loaded = {name for name, _ in wanted}
    network = order_modules(build, kernel, NETWORK_MODULES, loaded)
    for name, content in wanted + network:
        archive.file(f"lib/modules/{name}", content)
    archive.file("lib/modules/order", "".join(f"{name}\n" for name, _ in wanted).encode())
    archive.file("lib/modules/network", "".join(f"{name}\n" for name, _ in network).encode())
    return archive.compressed()


def script(part: str, name: str) -> bytes:
    """One of the scripts that run in a guest."""
    return resources.files("diapause.guest").joinpath("rootfs", part, name).read_bytes()
