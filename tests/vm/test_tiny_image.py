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
