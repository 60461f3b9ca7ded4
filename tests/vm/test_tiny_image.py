"""The image `tiny` on a real machine: it boots, mounts its disk and starts its agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from diapause.guest.build import build_image
from diapause.guest.images import Image, find_image
from diapause.store.home import Home
from tests.framework import bare_qemu

pytestmark = pytest.mark.vm

READY = "diapause: ready"


def test_it_boots_with_a_disk_and_opens_the_agents_port(tiny_image: Image, tmp_path: Path) -> None:
    """From the spawn to a mounted disk and an open port, and the console shows nothing else."""
    with bare_qemu.boot(tiny_image, tmp_path) as machine:
        assert machine.wait_event("VSERPORT_CHANGE") == {"open": True, "id": "agent"}
        took_s = machine.wait_console(READY)
        assert machine.read_console().split() == READY.split()
    print(f"spawn to ready: {took_s:.2f} s")


def test_it_boots_without_a_disk_and_without_a_port(tiny_image: Image, tmp_path: Path) -> None:
    """A guest whose agent has no port runs; init does not spin over it."""
    with bare_qemu.boot(tiny_image, tmp_path, disk=False, port=False) as machine:
        machine.wait_console(READY)


def test_the_guest_has_what_commands_expect(tiny_image: Image, tmp_path: Path) -> None:
    """File systems, terminals, names, tools; printed by the guest itself."""
    script = """
    PATH=/bin:/sbin
    for tool in sh dd sha256sum od sync stty mount tar poweroff; do
      command -v "$tool" >/dev/null || echo "no $tool"
    done
    [ -c /dev/ptmx ] && [ -L /dev/fd ] || echo "no terminals"
    [ "$(hostname)" = tiny ] || echo "no name"
    : >/etc/machine-id && : >/tmp/file && : >/data/file || echo "no writing"
    ip address show lo | grep -q 127.0.0.1 || echo "no loopback"
    cat /sys/class/misc/hw_random/rng_current
    while read -r device place kind options; do echo "$place $kind $options"; done </proc/mounts
    echo the end
    """
    with bare_qemu.boot(tiny_image, tmp_path, instead_of_agent=script) as machine:
        machine.wait_console("the end")
        shown = machine.read_console()
    assert "no " not in shown.replace("no suid", ""), shown
    assert "virtio_rng" in shown
    mounts = {line.split()[0]: line for line in shown.splitlines() if line.startswith("/")}
    assert {"/proc", "/sys", "/dev/pts", "/run", "/dev/shm"} <= mounts.keys()
    assert mounts["/data"].split()[1] == "ext4"
    # Nine tenths of what the kernel leaves of the 512 MiB.
    size_kib = int(mounts["/tmp"].split("size=")[1].split("k")[0])
    assert 0.75 < size_kib * 1024 / bare_qemu.MEMORY_BYTES < 0.9


def test_a_guest_that_powers_off_says_so(tiny_image: Image, tmp_path: Path) -> None:
    """The VMM ends with the guest's own wish as the reason."""
    with bare_qemu.boot(tiny_image, tmp_path, instead_of_agent="poweroff") as machine:
        assert machine.wait_event("SHUTDOWN") == {"guest": True, "reason": "guest-shutdown"}


def test_a_guest_that_panics_says_so(tiny_image: Image, tmp_path: Path) -> None:
    """The panic device's driver is in the image."""
    script = "echo c >/proc/sysrq-trigger"
    with bare_qemu.boot(tiny_image, tmp_path, instead_of_agent=script) as machine:
        machine.wait_event("GUEST_PANICKED")


def test_an_image_that_exists_stays_as_it_is(tiny_home: Home) -> None:
    """A second build says so and changes nothing."""
    before = find_image(tiny_home, "tiny")
    said: list[str] = []
    info = build_image(tiny_home, "tiny", "tiny", said.append)
    assert info.already
    assert said == []
    assert find_image(tiny_home, "tiny").manifest == before.manifest


def test_the_manifest_says_what_it_was_made_from(tiny_image: Image) -> None:
    """Every digest is true, and the kernel is named."""
    tiny_image.verify()
    manifest = tiny_image.manifest
    assert manifest.kernel.package.endswith("-cloud-amd64-unsigned")
    assert manifest.kernel.version in manifest.kernel.package
    assert len(manifest.kernel.package_sha256) == 64
    assert manifest.busybox.startswith("BusyBox v")
    assert oct(tiny_image.directory.stat().st_mode)[-3:] == "555"
    assert {oct(path.stat().st_mode)[-3:] for path in tiny_image.directory.iterdir()} == {"444"}
