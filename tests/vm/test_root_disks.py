"""Images with a root disk: the guest's `/` is disk0, on the image's own file system.

One image `python` for the whole run, and one guest of it for this module.
"""

from __future__ import annotations

import io
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.errors import InvalidRequest
from diapause.guest.images import Image
from diapause.units import GIB, MIB
from tests.framework.disks import clean_copy, flat_file
from tests.framework.sandbox import Daemon, Sandbox, real_home

pytestmark = pytest.mark.vm

MEMORY_BYTES = 256 * MIB


@pytest.fixture(scope="module")
def python_daemon(python_image: Image) -> Iterator[Daemon]:
    """A home with the image, and its daemon."""
    with real_home(python_image) as made:
        yield made


@pytest.fixture(scope="module")
def python_guest(python_daemon: Daemon) -> Sandbox:
    """The module's guest."""
    return python_daemon.run(image="python", memory_bytes=MEMORY_BYTES, disk_bytes=1 * GIB)


def wheel() -> bytes:
    """A package `answer` as a wheel, the least that pip takes."""
    info = "answer-1.0.dist-info"
    files = {
        "answer.py": "VALUE = 42\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: answer\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": f"answer.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n",
    }
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def test_the_root_is_the_disk_grown_to_its_size(python_guest: Sandbox) -> None:
    """A Debian with python, all of --disk to use, and our agent beside it."""
    assert "ID=debian" in python_guest.sh("cat /etc/os-release")
    assert python_guest.sh("python -c 'print(6 * 7)'") == "42\n"
    [device, kind, blocks] = python_guest.sh(
        "df --output=source,fstype,size -B1 / | tail -n 1"
    ).split()
    assert (device, kind) == ("/dev/vda", "ext4")
    assert 0.9 * GIB < int(blocks) <= 1 * GIB
    assert python_guest.sh("cat /proc/1/comm; id -u").split() == ["init", "0"]


def test_pip_installs_without_a_network_and_what_it_installed_is_in_every_copy(
    python_guest: Sandbox, python_daemon: Daemon, tmp_path: Path
) -> None:
    """Through a pause and a resume, into a fork, and in the snapshot's disk as a host reads it."""
    with python_guest.forked() as guest:
        guest.sh("cat >/srv/answer-1.0-py3-none-any.whl", given=wheel())
        guest.sh("cd /srv && pip install --no-index ./answer-1.0-py3-none-any.whl")
        show = "python -c 'import answer; print(answer.VALUE)'"
        assert guest.sh(show) == "42\n"
        guest.sh("head -c 3000000 /dev/urandom >/srv/data; sha256sum /srv/data >/srv/sum; sync")
        snapshot = guest.pause(durability="disk").snapshot
        guest.resume()
        assert guest.sh("echo 3 >/proc/sys/vm/drop_caches; sha256sum -c /srv/sum") == (
            "/srv/data: OK\n"
        )
        assert guest.sh(show) == "42\n"
        python_daemon.packed(snapshot)
        with guest.forked(snapshot) as fork:
            assert fork.sh(show) == "42\n"
            fork.sh("rm /srv/data")
            assert guest.sh("sha256sum -c /srv/sum") == "/srv/data: OK\n"
    disk = clean_copy(flat_file(python_daemon, snapshot, "disk0", tmp_path / "flat"), tmp_path)
    shown = subprocess.run(
        ["debugfs", "-R", "cat /srv/sum", str(disk)], capture_output=True, text=True, check=True
    )
    assert "/srv/data" in shown.stdout


def test_a_quiesced_save_freezes_the_root_and_lets_it_go(python_guest: Sandbox) -> None:
    """The agent runs from the file system that it freezes."""
    with python_guest.forked() as guest:
        assert guest.save(quiesce=True).notes == []
        guest.sh("echo written >/srv/after; sync")


def test_a_disk_that_the_root_does_not_fit_on_is_refused(python_daemon: Daemon) -> None:
    """With the size that it takes."""
    before = len(python_daemon.client.sandboxes(everything=True))
    with pytest.raises(InvalidRequest, match="root disk of image 'python' takes"):
        python_daemon.run(image="python", disk_bytes=16 * MIB)
    assert len(python_daemon.client.sandboxes(everything=True)) == before


def test_the_image_is_what_its_manifest_says(python_image: Image) -> None:
    """Every digest is true, the file system is whole, and no build left anything on the host."""
    python_image.verify()
    assert python_image.root_disk is not None
    check = subprocess.run(
        ["e2fsck", "-fn", str(python_image.root_disk)], capture_output=True, text=True
    )
    assert check.returncode == 0, check
    home = str(python_image.directory.parent.parent)
    assert home not in Path("/proc/mounts").read_text()
    assert list((python_image.directory.parent.parent / "tmp").iterdir()) == []
