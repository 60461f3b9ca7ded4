"""Choosing a kernel and ordering its modules, against an apt that says what a test wants."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from diapause.errors import ImageBuildFailed
from diapause.guest import kernel
from diapause.guest.images import KernelSource
from diapause.guest.steps import ImageBuild


@pytest.fixture
def build(tmp_path: Path) -> ImageBuild:
    """A build that works in a directory of its own."""
    return ImageBuild("tiny", tmp_path, lambda line: None)


def offer(monkeypatch: pytest.MonkeyPatch, directory: Path, names: list[str], default: str) -> None:
    """Put an apt-cache before the real one."""
    listed = "\\n".join(f"{name} - Linux" for name in names)
    script = directory / "apt-cache"
    script.write_text(
        f'#!/bin/sh\ncase $1 in\nsearch) printf "{listed}\\n" ;;\n'
        f'depends) echo "meta"; echo "  Depends: {default}" ;;\nesac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


def modules(directory: Path, files: dict[str, bytes], built_in: str = "") -> kernel.Kernel:
    """A kernel that was unpacked."""
    for name, content in files.items():
        (directory / name).write_bytes(content)
    (directory / "modules.builtin").write_text(built_in)
    return kernel.Kernel(KernelSource("6", "package", "6", ""), directory, directory)


def test_the_release_names_its_kernel(
    build: ImageBuild, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A newer series in the archive does not win over the one that the release is tested with."""
    names = [f"linux-image-{v}-cloud-amd64-unsigned" for v in ("6.1.0-9", "6.1.0-56", "6.12.1")]
    offer(monkeypatch, tmp_path, names, "linux-image-6.1.0-56-cloud-amd64")
    assert kernel._choose(build) == names[1]


def test_without_a_meta_package_the_newest_wins(
    build: ImageBuild, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By number, not by letter."""
    names = [f"linux-image-{v}-cloud-amd64-unsigned" for v in ("6.1.0-9", "6.1.0-56", "6.1.0-6")]
    offer(monkeypatch, tmp_path, names, "something-else")
    assert kernel._choose(build) == names[1]


def test_an_apt_without_kernels_is_said(
    build: ImageBuild, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the command that helps, since only root can refresh the lists."""
    offer(monkeypatch, tmp_path, [], "nothing")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(ImageBuildFailed, match="apt-get update"):
        kernel.fetch_kernel(build)


def test_modules_come_after_what_they_need(build: ImageBuild, tmp_path: Path) -> None:
    """Packed or not, spelt with '-' or '_'; what the kernel has built in is left out."""
    unpacked = modules(
        tmp_path,
        {
            "top.ko": b"\x7fELF\0license=GPL\0depends=mid-dle,base\0",
            "mid_dle.ko.xz": lzma.compress(b"\0depends=base\0"),
            "base.ko": b"\0depends=\0",
        },
        built_in="kernel/drivers/virtio-rng.ko\n",
    )
    ordered = kernel.order_modules(build, unpacked, ("top", "virtio_rng"))
    assert [name for name, _ in ordered] == ["base.ko", "mid_dle.ko", "top.ko"]
    assert ordered[1][1] == b"\0depends=base\0"


def test_a_missing_module_is_named(build: ImageBuild, tmp_path: Path) -> None:
    """A kernel without virtio can't run here."""
    with pytest.raises(ImageBuildFailed, match="no module virtio_pci"):
        kernel.order_modules(build, modules(tmp_path, {}), kernel.MODULES)


def test_a_program_that_fails_is_quoted(build: ImageBuild) -> None:
    """Its own words, and the step."""
    with pytest.raises(ImageBuildFailed, match="at a step: sh: no luck"):
        build.run("a step", "sh", "-c", "echo no luck >&2; exit 3")
    with pytest.raises(ImageBuildFailed, match="exit code 3"):
        build.run("a step", "sh", "-c", "exit 3")
    with pytest.raises(ImageBuildFailed, match="No such file"):
        build.run("a step", "/absent")
