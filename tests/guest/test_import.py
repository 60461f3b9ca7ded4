"""`image import`: what becomes of what somebody brings, and what is refused, by which name."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from diapause import limits
from diapause.errors import (
    Cancelled,
    DiapauseError,
    ImageBuildFailed,
    InitrdRefused,
    InvalidRequest,
    KernelRefused,
    NameInUse,
    NotEnoughSpace,
    RootfsArchiveRefused,
    RootfsDamaged,
    RootfsRefused,
    RootfsTooLarge,
)
from diapause.guest import images
from diapause.guest.images import Image, find_image
from diapause.guest.imports import import_image
from diapause.guest.initramfs import Initramfs, read_archive
from diapause.model import ImageImportRequest
from diapause.operation import Operation, under
from diapause.store.home import Home
from diapause.units import MIB
from tests.framework import roots
from tests.framework.other_user import NOBODY, python_as_nobody, remove_what_nobody_left
from tests.framework.roots import Disk, archive, entry
from tests.framework.sandbox import remove_closed
from tests.framework.sources import ROOT

PATIENCE_S = 120.0


@dataclass(frozen=True)
class Importer:
    """A home, a directory for what is brought, and a kernel in it."""

    home: Home
    place: Path
    kernel: Path
    said: list[str]

    def file(self, name: str, content: bytes) -> Path:
        path = self.place / name
        path.write_bytes(content)
        return path

    def tree(self) -> Path:
        """A small root file system."""
        tree = self.place / "tree"
        (tree / "etc").mkdir(parents=True)
        (tree / "etc/hostname").write_text("small\n")
        (tree / "sbin").mkdir()
        (tree / "sbin/tool").write_bytes(b"#!/bin/sh\n")
        (tree / "sbin/tool").chmod(0o4755)
        (tree / "passwords").symlink_to("/etc/passwd")
        return tree

    def request(self, rootfs: Path | None, initrd: Path | None = None) -> ImageImportRequest:
        def text(path: Path | None) -> str | None:
            return None if path is None else str(path)

        return ImageImportRequest(
            name="mine", kernel=str(self.kernel), initrd=text(initrd), rootfs=text(rootfs)
        )

    def make(self, rootfs: Path | None, initrd: Path | None = None) -> Image:
        info = import_image(self.home, self.request(rootfs, initrd), self.said.append)
        assert (info.name, info.flavor, info.already) == ("mine", "imported", False)
        image = find_image(self.home, "mine")
        image.verify()
        assert list(self.home.tmp.iterdir()) == []
        return image

    def disk(self, rootfs: Path, initrd: Path | None = None) -> Disk:
        image = self.make(rootfs, initrd)
        assert image.root_disk is not None
        disk = Disk(image.root_disk)
        disk.whole()
        for name in ("agent", "busybox", "init", "supervise"):
            found = disk.stat(f"/.diapause/{name}")
            assert (found.kind, found.mode, found.uid, found.gid) == ("regular", 0o755, 0, 0)
        return disk

    def refused(self, rootfs: Path | None, initrd: Path | None = None) -> DiapauseError:
        """The error; nothing is left of the import."""
        with pytest.raises(DiapauseError) as caught:
            import_image(self.home, self.request(rootfs, initrd), self.said.append)
        assert list(self.home.tmp.iterdir()) == []
        assert images.names(self.home) == []
        return caught.value


@pytest.fixture
def importer(home: Home, tmp_path: Path) -> Importer:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(roots.kernel())
    return Importer(home, tmp_path, kernel, [])


# -- what becomes of what is brought ---------------------------------------------------------------


def test_a_directory_becomes_a_root_disk(importer: Importer) -> None:
    """Links stay links, modes stay; the image says what it was made from."""
    tree = importer.tree()
    image_disk = importer.disk(tree)
    assert image_disk.cat("/etc/hostname") == "small\n"
    assert image_disk.stat("/sbin/tool").mode == 0o4755
    link = image_disk.stat("/passwords")
    assert link.kind == "symlink"
    assert 'Fast link dest: "/etc/passwd"' in link.text
    manifest = find_image(importer.home, "mine").manifest
    assert manifest.kernel.version == roots.VERSION
    assert manifest.kernel.package_sha256 == hashlib.sha256(roots.kernel()).hexdigest()
    assert manifest.kernel.package == ""
    assert "init" in read_archive(
        gzip.decompress(find_image(importer.home, "mine").initrd.read_bytes())
    )
    assert sorted(path.name for path in tree.iterdir()) == ["etc", "passwords", "sbin"]


ENTRIES = (
    entry("./", mode=0o755),
    entry("./etc/shadow", b"root:*:\n", mode=0o640, gid=42, mtime=1_600_000_000),
    entry("./bin/su", b"\x7fELF", mode=0o4755),
    entry("./srv/ann/", mode=0o700, uid=1000, gid=1000),
    entry("./srv/ann/notes", b"hello\n", mode=0o000, uid=1000, gid=100_000),
    entry("./srv/ann/again", b"", type=tarfile.LNKTYPE, linkname="./srv/ann/notes", size=0),
    entry("./srv/ann/link", b"", type=tarfile.SYMTYPE, linkname="../../../etc/passwd", uid=1000),
    entry("./dev/null", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
    entry("./dev/vdz", b"", type=tarfile.BLKTYPE, devmajor=254, devminor=300, mode=0o660, gid=6),
    entry("./run/queue", b"", type=tarfile.FIFOTYPE, mode=0o622),
    entry(
        "./bin/ping", b"\x7fELF", mode=0o755,
        pax_headers={"SCHILY.xattr.security.capability": "\x01", "SCHILY.xattr.user.note": "kept",
                     "SCHILY.xattr.security.selinux": "label"},
    ),
    entry('./odd/a "quoted"\nname', b"odd\n", uid=7),
    entry("./odd/rm -rf", b"odd\n", uid=7),
)  # fmt: skip


@pytest.mark.parametrize(
    "packed",
    [bytes, gzip.compress, lzma.compress, bz2.compress],
    ids=["plain", "gzip", "xz", "bzip2"],
)
def test_a_tar_becomes_a_root_disk(importer: Importer, packed: type) -> None:
    """Owners, modes, devices, links, capabilities: all of it, and none of it on the host."""
    disk = importer.disk(importer.file("root.tar", packed(archive(*ENTRIES))))
    shadow = disk.stat("/etc/shadow")
    assert (shadow.mode, shadow.uid, shadow.gid) == (0o640, 0, 42)
    assert "mtime: 0x5f5e1000" in shadow.text
    assert (disk.stat("/bin/su").mode, disk.stat("/etc").mode) == (0o4755, 0o755)
    notes = disk.stat("/srv/ann/notes")
    assert (notes.mode, notes.uid, notes.gid, notes.links) == (0, 1000, 100_000, 2)
    assert disk.cat("/srv/ann/again") == "hello\n"
    assert (disk.stat("/srv/ann").mode, disk.stat("/srv/ann").uid) == (0o700, 1000)
    link = disk.stat("/srv/ann/link")
    assert (link.kind, link.uid) == ("symlink", 1000)
    null, block = disk.stat("/dev/null"), disk.stat("/dev/vdz")
    assert (null.kind, null.mode) == ("character special", 0o666)
    assert "01:03" in null.text
    assert (block.kind, block.gid) == ("block special", 6)
    assert "254:300" in block.text
    assert disk.stat("/run/queue").kind == "FIFO"
    assert disk.stat("/odd/rm -rf").uid == 7
    assert sorted(disk.ask("ls -p /odd").count(text) for text in ("/7/0/rm -rf/", "/7/0/a ")) == [
        1,
        1,
    ]


def test_capabilities_stay_and_what_means_nothing_elsewhere_is_said(importer: Importer) -> None:
    """Labels of the host's own security system are left out, with a sentence."""
    disk = importer.disk(importer.file("root.tar", archive(*ENTRIES)))
    assert "security.capability (1)" in disk.ask("ea_list /bin/ping")
    assert 'user.note (4) = "kept"' in disk.ask("ea_list /bin/ping")
    assert "selinux" not in disk.ask("ea_list /bin/ping")
    assert any("bin/ping: an extended attribute was left out" in line for line in importer.said)


def test_an_ext4_file_is_copied_grown_and_left_as_it_is(importer: Importer) -> None:
    """Whatever its features; what it had stays."""
    source = roots.ext4(importer.place / "root.ext4", importer.tree(), "-b", "1024")
    before = hashlib.sha256(source.read_bytes()).hexdigest()
    disk = importer.disk(source)
    assert disk.cat("/etc/hostname") == "small\n"
    assert disk.path.stat().st_size == source.stat().st_size + 64 * MIB
    assert hashlib.sha256(source.read_bytes()).hexdigest() == before


def test_a_journal_that_was_not_written_back_is(importer: Importer) -> None:
    """The copy of a disk that a machine had open is as good as that machine after a crash."""
    source = roots.ext4(importer.place / "root.ext4", importer.tree())
    marking = ["debugfs", "-w", "-R", "feature needs_recovery", str(source)]
    subprocess.run(marking, check=True, capture_output=True)
    assert importer.disk(source).cat("/etc/hostname") == "small\n"


def test_an_initrd_of_ones_own_mounts_the_disk_and_finds_our_init(importer: Importer) -> None:
    """It is taken as it is; the kernel's command line says what to do."""
    initrd = importer.file("initrd", Initramfs().compressed())
    importer.disk(importer.tree(), initrd)
    image = find_image(importer.home, "mine")
    assert image.initrd.read_bytes() == initrd.read_bytes()
    assert {"root=/dev/vda", "init=/.diapause/init"} <= set(image.manifest.command_line.split())


def test_an_initrd_alone_gets_the_agent_behind_it(importer: Importer) -> None:
    """As one more archive, at a place where the kernel looks for one."""
    initrd = importer.file("initrd", Initramfs().compressed() + b"\0")
    image = importer.make(None, initrd)
    assert image.root_disk is None
    whole = image.initrd.read_bytes()
    start = -(-initrd.stat().st_size // 4) * 4
    assert whole[: initrd.stat().st_size] == initrd.read_bytes()
    files = read_archive(gzip.decompress(whole[start:]))
    assert {".diapause/agent", ".diapause/rdinit", ".diapause/supervise"} <= files.keys()
    assert "rdinit=/.diapause/rdinit" in image.manifest.command_line.split()


def test_modules_come_from_an_image_that_boots_the_same_kernel(
    importer: Importer, tiny_home: Home
) -> None:
    """Byte for byte the same: a module of another build would not load."""
    tiny = find_image(tiny_home, "tiny")
    own = Importer(tiny_home, importer.place, tiny.kernel, [])
    import_image(tiny_home, own.request(own.tree()), own.said.append)
    files = read_archive(gzip.decompress(find_image(tiny_home, "mine").initrd.read_bytes()))
    assert {"lib/modules/virtio_blk.ko", "lib/modules/virtio_console.ko"} <= files.keys()
    assert b"virtio_blk.ko" in files["lib/modules/order"]


def test_an_agent_that_was_there_goes(importer: Importer) -> None:
    """The disk of another image is a root file system like any other."""
    tree = importer.tree()
    (tree / ".diapause").mkdir()
    (tree / ".diapause/agent").write_text("old\n")
    (tree / ".diapause/init").symlink_to("/etc/hostname")
    disk = importer.disk(tree)
    assert disk.stat("/.diapause/agent").size > 1000
    assert disk.cat("/etc/hostname") == "small\n"


def test_links_in_the_tree_lead_nowhere_on_the_host(importer: Importer) -> None:
    """Where the agent's own place is one, the import is refused; others are of no account."""
    outside = importer.place / "outside"
    outside.mkdir()
    tree = importer.tree()
    (tree / ".diapause").symlink_to(outside)
    (tree / "lib").symlink_to(outside)
    error = importer.refused(tree)
    assert isinstance(error, ImageBuildFailed)
    assert "/.diapause is there and is no directory" in error.message
    (tree / ".diapause").unlink()
    importer.disk(tree)
    assert list(outside.iterdir()) == []


_AS_NOBODY = """
import sys
from diapause.guest.imports import import_image
from diapause.model import ImageImportRequest
from diapause.store.home import Home
place = sys.argv[1]
for name, rootfs in (("tar", "/root.tar"), ("tree", "/tree")):
    request = ImageImportRequest(name=name, kernel=place + "/vmlinuz", rootfs=place + rootfs)
    import_image(Home.at(place + "/h"), request, print)
"""


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that everybody can reach."""
    made = Path(tempfile.mkdtemp(prefix="dia-"))
    made.chmod(0o755)
    yield made
    remove_what_nobody_left(Home.at(made / "h"))
    remove_closed(made)


def test_an_ordinary_user_imports_what_is_roots(open_place: Path) -> None:
    """Without a right: an archive's owners and devices, and a tree that becomes root's."""
    user = NOBODY if os.geteuid() == 0 else os.geteuid()
    home = Home.at(open_place / "h").create()
    home.buffers.rmdir()
    (open_place / "vmlinuz").write_bytes(roots.kernel())
    (open_place / "root.tar").write_bytes(archive(*ENTRIES))
    (open_place / "tree/etc").mkdir(parents=True)
    (open_place / "tree/etc/hostname").write_text("small\n")
    if os.geteuid() == 0:
        for path in [*home.root.rglob("*"), home.root, *(open_place / "tree").rglob("*")]:
            os.chown(path, user, user)
    (open_place / "b").mkdir()
    done = subprocess.run(
        python_as_nobody(open_place / "b", "-c", _AS_NOBODY, str(open_place)),
        capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    disk = Disk(home.image("tar") / images.ROOT_DISK)
    disk.whole()
    assert (disk.stat("/bin/su").mode, disk.stat("/bin/su").uid) == (0o4755, 0)
    assert (disk.stat("/etc/shadow").uid, disk.stat("/etc/shadow").gid) == (0, 42)
    assert (disk.stat("/srv/ann/notes").uid, disk.stat("/srv/ann/notes").gid) == (1000, 100_000)
    assert (disk.stat("/dev/null").kind, disk.stat("/dev/null").uid) == ("character special", 0)
    disk = Disk(home.image("tree") / images.ROOT_DISK)
    disk.whole()
    assert (disk.stat("/etc").uid, disk.stat("/etc/hostname").gid) == (0, 0)
    assert disk.stat("/").uid == 0


# -- what is refused -------------------------------------------------------------------------------


def changed(data: bytes, at: int, to: bytes) -> bytes:
    return data[:at] + to + data[at + len(to) :]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "no bzImage"),
        (b"\x7fELF" + bytes(4096), "no bzImage"),
        (b"x" * 1_000_000, "no bzImage"),
        (changed(roots.kernel(), 0x202, b"XXXX"), "no bzImage"),
        (changed(roots.kernel(), 0x211, b"\0"), "a zImage"),
        (changed(roots.kernel(), 0x20E, b"\0\0"), "does not say its version"),
        (changed(roots.kernel(), 0x20E, b"\xff\xff"), "does not say its version"),
        (roots.kernel("../../etc"), "does not say its version"),
    ],
)
def test_what_is_no_kernel_is_refused(importer: Importer, content: bytes, cause: str) -> None:
    importer.kernel.write_bytes(content)
    error = importer.refused(importer.tree())
    assert isinstance(error, KernelRefused)
    assert cause in error.message
    assert str(importer.kernel) in error.message


def test_a_kernel_that_is_no_file_or_too_large_is_refused(
    importer: Importer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe is not waited for."""
    tree = importer.tree()
    importer.kernel.unlink()
    assert isinstance(importer.refused(tree), KernelRefused)
    os.mkfifo(importer.kernel)
    assert "no regular file" in importer.refused(tree).message
    importer.kernel.unlink()
    importer.kernel.mkdir()
    assert isinstance(importer.refused(tree), KernelRefused)
    importer.kernel.rmdir()
    importer.kernel.write_bytes(roots.kernel())
    monkeypatch.setattr(limits, "KERNEL_BYTES_MAX", 100)
    assert "more than 100" in importer.refused(tree).message


def test_what_is_no_initrd_is_refused(importer: Importer, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (b"", b"070703", b"\x7fELF", b"plain text"):
        error = importer.refused(None, importer.file("initrd", content))
        assert isinstance(error, InitrdRefused), content
        assert "no cpio archive" in error.message
    assert isinstance(importer.refused(None, importer.place / "absent"), InitrdRefused)
    monkeypatch.setattr(limits, "INITRD_BYTES_MAX", 5)
    assert "more than 5" in importer.refused(None, importer.file("initrd", b"070701")).message


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "neither a tar nor an ext4"),
        (b"x" * 4096, "neither a tar nor an ext4"),
        (changed(bytes(4096), 510, b"\x55\xaa"), "a disk with partitions"),
        (b"QFI\xfb" + bytes(4096), "a qcow2 image"),
        (b"hsqs" + bytes(4096), "a squashfs"),
        (b"070701" + bytes(4096), "a cpio archive"),
    ],
)
def test_what_is_no_root_file_system_is_refused(
    importer: Importer, content: bytes, cause: str
) -> None:
    error = importer.refused(importer.file("root", content))
    assert isinstance(error, RootfsRefused)
    assert cause in error.message


def test_what_is_no_file_is_refused(importer: Importer) -> None:
    """Nothing is waited for, and nothing but plain files and directories is read."""
    assert "it is not there" in importer.refused(importer.place / "absent").message
    os.mkfifo(importer.place / "pipe")
    assert isinstance(importer.refused(importer.place / "pipe"), RootfsRefused)
    assert isinstance(importer.refused(Path("/dev/zero")), RootfsRefused)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(importer.place / "socket"))
        assert importer.refused(importer.place / "socket").code in (
            "rootfs_refused", "storage_failed",
        )  # fmt: skip


HOSTILE: dict[str, tuple[tuple[tarfile.TarInfo, bytes], ...]] = {
    "absolute": (entry("/etc/passwd", b"x"),),
    "up": (entry("../escaped", b"x"),),
    "up inside": (entry("a/../../escaped", b"x"),),
    "through a link": (
        entry("a", b"", type=tarfile.SYMTYPE, linkname="/tmp", size=0),
        entry("a/escaped", b"x"),
    ),
    "through a file": (entry("a", b"x"), entry("a/b", b"x")),
    "a hard link out": (entry("a", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd", size=0),),
    "a hard link up": (entry("a", b"", type=tarfile.LNKTYPE, linkname="../kernel", size=0),),
    "a hard link to a link": (
        entry("b", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0),
        entry("a", b"", type=tarfile.LNKTYPE, linkname="b", size=0),
    ),
    "twice": (entry("a", b"x"), entry("a", b"y")),
    "a link over a directory": (
        entry("a/b", b"x"),
        entry("a", b"", type=tarfile.SYMTYPE, linkname="/", size=0),
    ),
    "an odd device": (
        entry("dev/a\nrm x", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3, size=0),
    ),
    "a device over a file": (
        entry("a", b"x"),
        entry("a", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3, size=0),
    ),
    "a device twice": 2 * (entry("a", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3, size=0),),
    "an unknown kind": (entry("a", b"", type=b"Q", size=0),),
    "deep": (entry("a/" * 300 + "b", b"x"),),
    "a long name": (entry("n" * 300, b"x"),),
    "no end": (),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_whole(importer: Importer, name: str) -> None:
    """By one error with the entry's name; nothing of it is on the host."""
    data = archive(*HOSTILE[name])
    data = data if HOSTILE[name] else archive(entry("a", b"x" * 5000))[:2000]
    error = importer.refused(importer.file("root.tar", data))
    refusals = (RootfsArchiveRefused, ImageBuildFailed)
    assert isinstance(error, refusals), error
    assert not (importer.home.root / "escaped").exists()
    assert not Path("/tmp/escaped").exists()


@pytest.mark.parametrize("packed", [gzip.compress, lzma.compress])
def test_an_archive_that_is_cut_or_none_is_refused(importer: Importer, packed: type) -> None:
    """Whether the packing is cut or what is in it."""
    whole = packed(archive(entry("a", os.urandom(100_000))))
    assert isinstance(
        importer.refused(importer.file("a.tar", whole[: len(whole) // 2])), RootfsArchiveRefused
    )
    assert isinstance(
        importer.refused(importer.file("b.tar", packed(b"no tar" * 1000))), RootfsArchiveRefused
    )


def test_sizes_are_believed_before_anything_is_kept(
    importer: Importer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header that says terabytes, and a tree above the limit."""
    info = tarfile.TarInfo("huge")
    info.size = 1 << 43
    source = importer.file("root.tar", info.tobuf(tarfile.GNU_FORMAT))
    error = importer.refused(source)
    assert isinstance(error, RootfsTooLarge)
    assert "bytes of files" in error.message
    monkeypatch.setattr(limits, "ROOT_DISK_ENTRIES_MAX", 3)
    source = importer.file("root.tar", archive(*(entry(f"f{n}", b"") for n in range(5))))
    assert "more than 3 entries" in importer.refused(source).message
    assert isinstance(importer.refused(importer.tree()), RootfsTooLarge)
    monkeypatch.setattr(limits, "ROOT_DISK_BYTES_MAX", 70 * MIB)
    source = roots.ext4(importer.place / "root.ext4", importer.place / "tree")
    assert isinstance(importer.refused(source), RootfsTooLarge)


def test_a_damaged_file_system_is_refused(importer: Importer) -> None:
    """Before anything is written into it, and with what is wrong."""
    source = roots.ext4(importer.place / "root.ext4", importer.tree())
    data = source.read_bytes()
    source.write_bytes(data[: len(data) // 2])
    error = importer.refused(source)
    assert isinstance(error, RootfsDamaged)
    assert "ends after" in error.message
    # The blocks and inodes that the root directory says it has.
    source.write_bytes(data)
    breaking = ["debugfs", "-w", "-R", "clri <2>", str(source)]
    subprocess.run(breaking, check=True, capture_output=True)
    error = importer.refused(source)
    assert isinstance(error, RootfsDamaged)
    assert str(importer.home.root) not in error.message
    source.write_bytes(changed(data, 1024 + 0x18, b"\xff\xff"))
    assert isinstance(importer.refused(source), RootfsDamaged)
    source.write_bytes(changed(bytes(8192), 1024 + 56, b"\x53\xef"))
    assert isinstance(importer.refused(source), RootfsDamaged)


def test_a_journal_elsewhere_is_refused(importer: Importer) -> None:
    source = roots.ext4(importer.place / "root.ext4", importer.tree(), "-O", "^has_journal")
    data = source.read_bytes()
    flags = data[1024 + 0x60] | 0x8
    source.write_bytes(changed(data, 1024 + 0x60, bytes([flags])))
    error = importer.refused(source)
    assert isinstance(error, (RootfsRefused, RootfsDamaged))


def test_a_tree_with_the_home_in_it_or_a_mount_is_refused(importer: Importer) -> None:
    """An image of everything would hold itself."""
    error = importer.refused(importer.home.root.parent)
    assert isinstance(error, RootfsRefused)
    assert "home" in error.message
    error = importer.refused(Path("/dev"))
    assert isinstance(error, RootfsRefused)
    assert "is mounted at /dev/" in error.message


def test_requests_that_can_not_be_are_refused(importer: Importer) -> None:
    """With what to change."""
    assert isinstance(importer.refused(None), InvalidRequest)
    relative = ImageImportRequest(name="mine", kernel="vmlinuz", rootfs="/")
    with pytest.raises(InvalidRequest, match="no absolute path"):
        import_image(importer.home, relative, print)
    named = ImageImportRequest(name="../x", kernel=str(importer.kernel), rootfs="/")
    with pytest.raises(InvalidRequest, match="image name"):
        import_image(importer.home, named, print)


def test_a_name_that_is_taken_is_refused(importer: Importer) -> None:
    """What stands there stays; the same when it came while this one was made."""
    tree = importer.tree()
    made = importer.make(tree)
    before = made.manifest
    with pytest.raises(NameInUse, match="mine"):
        import_image(importer.home, importer.request(tree), print)
    assert find_image(importer.home, "mine").manifest == before
    assert list(importer.home.tmp.iterdir()) == []


def test_a_full_disk_is_said(importer: Importer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is full: guests write to the same one."""
    monkeypatch.setattr("diapause.guest.roots.free_bytes", lambda directory: 1000)
    tree = importer.tree()
    for source in (
        tree,
        roots.ext4(importer.place / "root.ext4", tree),
        importer.file("root.tar", archive(entry("a", b"x" * (3 << 20)))),
    ):
        assert isinstance(importer.refused(source), NotEnoughSpace), source


def test_an_import_can_be_cancelled(importer: Importer) -> None:
    """At its next step; nothing is left."""
    operation = Operation("importImage")

    def cancelling(step: str) -> None:
        if "writing" in step:
            operation.cancel()

    with under(operation), pytest.raises(Cancelled):
        import_image(importer.home, importer.request(importer.tree()), cancelling)
    assert list(importer.home.tmp.iterdir()) == []
    assert images.names(importer.home) == []


_CHILD = """
import sys
from diapause.guest.imports import import_image
from diapause.model import ImageImportRequest
from diapause.store.home import Home
def told(step):
    print(step, flush=True)
    sys.stdin.readline()
home, kernel, rootfs = sys.argv[1:]
import_image(Home.at(home), ImageImportRequest(name="mine", kernel=kernel, rootfs=rootfs), told)
"""


@pytest.mark.parametrize("at", ["unpacking", "writing", "measuring"])
def test_a_kill_leaves_only_what_a_daemon_sweeps(importer: Importer, at: str) -> None:
    """In `tmp/`; no image is there, and the next import of that name works."""
    source = importer.file("root.tar", archive(*ENTRIES))
    argv = [
        sys.executable,
        "-c",
        _CHILD,
        str(importer.home.root),
        str(importer.kernel),
        str(source),
    ]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        for line in process.stdout:
            if line.startswith(at):
                process.send_signal(signal.SIGKILL)
                break
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
    assert images.names(importer.home) == []
    left = [path.name for path in importer.home.tmp.iterdir()]
    assert len(left) == 1
    assert left[0].startswith("image-")
    import_image(importer.home, importer.request(source), importer.said.append)
    find_image(importer.home, "mine").verify()
