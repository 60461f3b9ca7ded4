"""What a person brings for `image import`: small kernels, trees, archives and file systems."""

from __future__ import annotations

import io
import re
import shutil
import struct
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from diapause.guest.initramfs import Initramfs
from diapause.units import MIB

VERSION = "6.1.0-test"


def kernel(version: str = VERSION) -> bytes:
    """A file that says that it is a bzImage, and no more of one than that."""
    head = bytearray(4096)
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x202:0x208] = b"HdrS" + struct.pack("<H", 0x20F)
    head[0x20E:0x210] = struct.pack("<H", 0x400)
    head[0x211] = 1
    text = f"{version} (builder@host) #1 SMP\0".encode()
    head[0x600 : 0x600 + len(text)] = text
    return bytes(head)


def entry(
    name: str, content: bytes | None = None, **fields: object
) -> tuple[tarfile.TarInfo, bytes]:
    """One entry of an archive; a directory where there is no content and no other type."""
    info = tarfile.TarInfo(name)
    info.type, info.mode = (tarfile.DIRTYPE, 0o755) if content is None else (tarfile.REGTYPE, 0o644)
    info.size = len(content or b"")
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content or b""


def archive(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A tar of these entries, whatever they say."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


def ext4(place: Path, tree: Path, *options: str, size_bytes: int = 16 * MIB) -> Path:
    """An ext4 file system of a tree, as `mke2fs` makes it."""
    with place.open("xb") as file:
        file.truncate(size_bytes)
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", *options, "-d", str(tree), str(place)]
    subprocess.run(argv, check=True, capture_output=True)
    return place


@dataclass(frozen=True)
class Found:
    """What an ext4 file says of one of its entries."""

    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    links: int
    text: str


class Disk:
    """An ext4 file, asked without being mounted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def ask(self, request: str) -> str:
        """What debugfs answers."""
        argv = ["debugfs", "-R", request, str(self.path)]
        done = subprocess.run(argv, capture_output=True, check=True)
        return done.stdout.decode(errors="replace")

    def stat(self, path: str) -> Found:
        """What stands at a path."""
        text = self.ask(f'stat "{path}"')
        pattern = (
            r"Type: (.+?)\s+Mode:\s+(\d+).*?User:\s+(\d+)\s+Group:\s+(\d+)(?:.*?Size: (\d+))?"
            r".*?Links: (\d+)"
        )
        found = re.search(pattern, text, re.DOTALL)
        assert found is not None, (path, text)
        kind, mode, uid, gid, size, links = found.groups()
        return Found(kind, int(mode, 8), int(uid), int(gid), int(size or 0), int(links), text)

    def cat(self, path: str) -> str:
        """What a file holds."""
        return self.ask(f'cat "{path}"')

    def whole(self) -> None:
        """It is a file system without a fault."""
        subprocess.run(["e2fsck", "-fn", str(self.path)], check=True, capture_output=True)


_INITTAB = "::sysinit:/etc/rc\n::respawn:/etc/service\n"
_RC = "#!/bin/sh\necho mine >/run/started\n"
_SERVICE = "#!/bin/sh\nwhile :; do echo alive >/run/service; sleep 1; done\n"


def busybox_tree(tree: Path, *, init: bool) -> Path:
    """A root file system of busybox alone, with an init of its own or with none."""
    for name in ("bin", "sbin", "etc", "root", "tmp"):
        (tree / name).mkdir(parents=True)
    program = Path(shutil.which("busybox") or "/bin/busybox")
    shutil.copyfile(program, tree / "bin/busybox")
    (tree / "bin/busybox").chmod(0o755)
    listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True)
    for applet in listed.stdout.split():
        if applet != "busybox":
            (tree / "bin" / applet).symlink_to("busybox")
    (tree / "etc/hostname").write_text("brought\n")
    if init:
        (tree / "sbin/init").symlink_to("/bin/busybox")
        (tree / "etc/inittab").write_text(_INITTAB)
        for name, text in (("rc", _RC), ("service", _SERVICE)):
            (tree / "etc" / name).write_text(text)
            (tree / "etc" / name).chmod(0o755)
    return tree


def tar_of(tree: Path, place: Path) -> Path:
    """A packed archive of a tree, made by GNU tar, whose files belong to a user of number 1000."""
    argv = ["tar", "-C", str(tree), "--owner=1000", "--group=1000", "-czf", str(place), "."]
    subprocess.run(argv, check=True, capture_output=True)
    return place


def initramfs_of(tree: Path) -> bytes:
    """The same tree as an initial file system, whose init mounts what an init mounts."""
    made = Initramfs()
    for path in sorted(tree.rglob("*")):
        name = str(path.relative_to(tree))
        if path.is_symlink():
            made.link(name, str(path.readlink()))
        elif path.is_dir():
            made.directory(name)
        else:
            made.file(name, path.read_bytes(), path.stat().st_mode & 0o777)
    for name in ("dev", "proc", "sys", "run"):
        made.directory(name)
    made.file("init", _INIT.encode(), 0o755)
    return made.compressed()


_INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec /bin/busybox init
"""
