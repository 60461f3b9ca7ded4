"""Imported images on a real machine: whatever was brought boots, with its own init and our agent.

One home and one boot for each kind of thing that can be brought; the kernel is that of `tiny`,
whose modules are found in that image.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.errors import DiapauseError
from diapause.guest.debian import make_tree
from diapause.guest.images import Image
from diapause.guest.steps import ImageBuild
from diapause.model import ImageImportRequest
from diapause.units import GIB, MIB
from tests.framework import roots
from tests.framework.fake_home import eventually
from tests.framework.sandbox import Daemon, Sandbox, real_home

pytestmark = pytest.mark.vm

DISK_BYTES = 256 * MIB
BOOT_S = 300.0  # of a distribution, under an emulated processor


@pytest.fixture(scope="module")
def daemon(tiny_image: Image) -> Iterator[Daemon]:
    """A home with the image whose kernel is brought, and its daemon."""
    with real_home(tiny_image) as made:
        yield made


def bring(daemon: Daemon, name: str, rootfs: Path | None, initrd: Path | None = None) -> None:
    """Import an image through the daemon."""
    request = ImageImportRequest(
        name=name,
        kernel=str(daemon.home.image("tiny") / "kernel"),
        initrd=None if initrd is None else str(initrd),
        rootfs=None if rootfs is None else str(rootfs),
    )
    assert daemon.client.import_image(request).name == name


def run(daemon: Daemon, image: str) -> Sandbox:
    return daemon.run(image=image, disk_bytes=DISK_BYTES)


def test_a_directory_with_an_init_of_its_own(daemon: Daemon, tmp_path: Path) -> None:
    """Its init is process 1 and does its work; every verb does what it does to any other guest."""
    tree = roots.busybox_tree(tmp_path / "tree", init=True)
    bring(daemon, "directory", tree)
    guest = run(daemon, "directory")
    assert guest.sh("cat /proc/1/comm").strip() == "init"
    assert guest.sh("readlink /proc/1/exe").strip() == "/bin/busybox"
    eventually("its service", lambda: guest.exec("test", "-s", "/run/service").returncode == 0)
    assert guest.sh("cat /run/started") == "mine\n"
    [device, kind, blocks] = guest.sh("df -T / | tail -n 1").split()[:3]
    assert (device, kind) == ("/dev/vda", "ext4")
    assert int(blocks) * 1024 > 0.8 * DISK_BYTES
    guest.sh("echo written >/kept-file; echo kept >/run/memory; sync")
    guest.pause()
    assert guest.resume().warm
    assert guest.sh("cat /kept-file /run/memory") == "written\nkept\n"
    with guest.forked() as fork:
        assert fork.sh("cat /kept-file /run/memory") == "written\nkept\n"
        fork.sh("rm /kept-file")
    assert guest.sh("cat /kept-file") == "written\n"
    guest.remove()


def test_a_tar_without_any_init(daemon: Daemon, tmp_path: Path) -> None:
    """The agent's own script stays process 1; owners are those of the archive."""
    tree = roots.busybox_tree(tmp_path / "tree", init=False)
    bring(daemon, "tar", roots.tar_of(tree, tmp_path / "root.tar.gz"))
    guest = run(daemon, "tar")
    assert guest.sh("stat -c %u:%g:%a /bin/busybox").strip() == "1000:1000:755"
    assert guest.sh("stat -c %u:%a /.diapause/agent").strip() == "0:755"
    assert guest.sh("tr '\\0' ' ' </proc/1/cmdline").split()[-1] == "/.diapause/init"
    guest.remove()


def test_an_ext4_file(daemon: Daemon, tmp_path: Path) -> None:
    """Of another block size than ours; what a guest writes is in its copy only."""
    tree = roots.busybox_tree(tmp_path / "tree", init=True)
    source = roots.ext4(tmp_path / "root.ext4", tree, "-b", "1024")
    bring(daemon, "ext4", source)
    guest = run(daemon, "ext4")
    eventually("its service", lambda: guest.exec("test", "-s", "/run/service").returncode == 0)
    guest.sh("echo written >/kept-file; sync")
    guest.remove()
    roots.Disk(source).whole()
    assert "kept-file" not in roots.Disk(source).ask("ls /")


def test_an_initial_file_system_alone(daemon: Daemon, tmp_path: Path) -> None:
    """It runs from memory, with its own init and the agent beside it."""
    tree = roots.busybox_tree(tmp_path / "tree", init=True)
    initrd = tmp_path / "initrd"
    initrd.write_bytes(roots.initramfs_of(tree))
    bring(daemon, "memory", None, initrd)
    guest = run(daemon, "memory")
    eventually("its service", lambda: guest.exec("test", "-s", "/run/service").returncode == 0)
    assert guest.sh("cat /run/started") == "mine\n"
    assert "/dev/vda" not in guest.sh("cat /proc/mounts")
    guest.remove()


def test_a_kernel_without_drivers_is_one_clear_error(daemon: Daemon, tmp_path: Path) -> None:
    """Where nobody has its modules: the run fails with the guest's own last words."""
    kernel = tmp_path / "vmlinuz"
    # A byte of its padding differs: it boots as before, and is no kernel of another image.
    content = bytearray((daemon.home.image("tiny") / "kernel").read_bytes())
    content[-1] ^= 1
    kernel.write_bytes(content)
    tree = roots.busybox_tree(tmp_path / "tree", init=True)
    request = ImageImportRequest(name="bare", kernel=str(kernel), rootfs=str(tree))
    daemon.client.import_image(request)
    before = len(daemon.client.sandboxes(everything=True))
    with pytest.raises(DiapauseError) as caught:
        run(daemon, "bare")
    assert "no driver for virtio-blk" in str(caught.value.fields.get("console"))
    assert len(daemon.client.sandboxes(everything=True)) == before


@pytest.mark.soak
@pytest.mark.parametrize(
    ("package", "name"), [("systemd-sysv", "systemd"), ("sysvinit-core,initscripts", "init")]
)
def test_a_debian_with_its_own_init(
    daemon: Daemon, tmp_path: Path, package: str, name: str
) -> None:
    """A whole distribution comes up beside the agent, and goes on after a pause."""
    tree = tmp_path / "tree"
    make_tree(ImageBuild(name, tmp_path, print), tree, tuple(package.split(",")))
    bring(daemon, name, tree)
    guest = daemon.run(image=name, memory_bytes=512 * MIB, disk_bytes=1 * GIB)
    assert guest.sh("cat /proc/1/comm").strip() == name
    if name == "systemd":

        def is_up() -> bool:
            said = guest.exec("systemctl", "is-system-running").stdout.decode().strip()
            return said in ("running", "degraded")

        eventually("the end of its start", is_up, BOOT_S)
        assert "multi-user.target" in guest.sh("systemctl list-units --type=target --no-legend")
    else:
        eventually(
            "its run level", lambda: guest.exec("runlevel").stdout.split()[-1:] == [b"2"], BOOT_S
        )
    before = guest.sh("cat /proc/sys/kernel/random/boot_id")
    guest.pause()
    assert guest.resume().warm
    assert guest.sh("cat /proc/sys/kernel/random/boot_id") == before
    guest.remove()
