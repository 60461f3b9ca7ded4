"""Images on disk: what is refused, and by which name."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from diapause import limits
from diapause.errors import (
    BlobDamaged,
    ImageBuildFailed,
    ImageNotFound,
    InvalidRequest,
    NotEnoughSpace,
)
from diapause.guest import images
from diapause.guest.build import build_image
from diapause.store.home import Home


def make_image(home: Home, name: str = "small", **changes: object) -> Path:
    """An image of a few bytes, published like a real one."""
    staged = home.tmp / f"staged-{name}"
    staged.mkdir()
    (staged / images.KERNEL).write_bytes(b"kernel")
    (staged / images.INITRD).write_bytes(b"initrd")
    files = {file: images.FileEntry.of(staged / file) for file in (images.KERNEL, images.INITRD)}
    manifest = images.Manifest(
        name=name, flavor="tiny", created_at="2026-01-01T00:00:00Z",
        kernel=images.KernelSource("6.1.0-1", "linux-image", "6.1.1-1", "0" * 64),
        files=files, command_line="quiet", agent_blake2b="0" * 64, busybox="BusyBox v1",
    )  # fmt: skip
    encoded = {**msgspec.to_builtins(manifest), **changes}
    (staged / images.MANIFEST).write_bytes(msgspec.json.encode(encoded))
    assert images.publish(staged, home.image(name))
    return home.image(name)


def rewrite(path: Path, content: bytes) -> None:
    """Damage a file that is read-only."""
    path.parent.chmod(0o700)
    path.chmod(0o600)
    path.write_bytes(content)


def test_an_image_is_found_and_listed(home: Home) -> None:
    """What was published is what is found."""
    make_image(home)
    found = images.find_image(home, "small")
    found.verify()
    assert found.kernel.read_bytes() == b"kernel"
    (info,) = images.list_images(home)
    assert (info.name, info.size_bytes, info.already) == ("small", 12, False)
    assert set(info.digests) == {"kernel", "initrd"}


def test_an_unknown_image_is_refused_with_the_known_ones(home: Home) -> None:
    """The error lists the candidates; without any it says so."""
    with pytest.raises(ImageNotFound, match="none"):
        images.find_image(home, "absent")
    make_image(home)
    with pytest.raises(ImageNotFound, match="small"):
        images.find_image(home, "../small")


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "A", "a" * 64, "a\n", "-x"])
def test_a_bad_name_is_refused(home: Home, name: str) -> None:
    """A name becomes a directory's."""
    with pytest.raises(InvalidRequest):
        build_image(home, name, "tiny", print)


def test_an_unknown_flavour_is_refused(home: Home) -> None:
    """With those that there are."""
    with pytest.raises(InvalidRequest, match=r"flavour.*tiny, python"):
        build_image(home, "x", "huge", print)


def test_a_flipped_bit_is_named(home: Home) -> None:
    """Sizes are checked when an image is found, digests when asked for."""
    directory = make_image(home)
    rewrite(directory / "kernel", b"kernex")
    with pytest.raises(BlobDamaged, match=r"small/kernel.*digest"):
        images.find_image(home, "small").verify()


def test_a_short_or_missing_file_is_named(home: Home) -> None:
    """Before anything is started."""
    directory = make_image(home)
    rewrite(directory / "initrd", b"init")
    with pytest.raises(BlobDamaged, match=r"small/initrd.*4 bytes, not 6"):
        images.find_image(home, "small")
    (directory / "initrd").unlink()
    with pytest.raises(BlobDamaged, match="small/initrd"):
        images.list_images(home)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"\xff", b"{" * 100_000, b'"' + b"x" * limits.MANIFEST_BYTES_MAX],
    ids=["empty", "no-fields", "list", "not-utf8", "deep", "large"],
)
def test_what_is_not_a_manifest_is_refused(home: Home, content: bytes) -> None:
    """Whatever the bytes, one error with the file's name."""
    directory = make_image(home)
    rewrite(directory / images.MANIFEST, content)
    with pytest.raises(BlobDamaged, match=r"manifest\.json"):
        images.find_image(home, "small")


def test_a_manifest_leads_nowhere_else(home: Home) -> None:
    """A name in it is joined to the image's directory and nothing above it."""
    entry = {"size": 0, "blake2b": ""}
    make_image(home, "a", files={"kernel": entry, "initrd": entry, "../../catalog": entry})
    with pytest.raises(BlobDamaged, match="names the file"):
        images.find_image(home, "a")
    make_image(home, "b", files={"kernel": entry})
    with pytest.raises(BlobDamaged, match="initrd"):
        images.find_image(home, "b")


def test_a_newer_manifest_is_refused(home: Home) -> None:
    """Its format says what this version can't know."""
    make_image(home, format=images.MANIFEST_VERSION + 1)
    with pytest.raises(BlobDamaged, match="format 3, not 2"):
        images.find_image(home, "small")


def test_of_two_builds_the_first_one_stays(home: Home) -> None:
    """The second is told so, and what it built is thrown away by its builder."""
    make_image(home)
    late = home.tmp / "late"
    late.mkdir()
    (late / "kernel").write_bytes(b"other")
    assert not images.publish(late, home.image("small"))
    images.find_image(home, "small").verify()


def test_a_full_disk_is_said_before_anything_is_downloaded(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is needed and where."""
    monkeypatch.setattr(Home, "free_bytes", lambda self: 1000)
    with pytest.raises(NotEnoughSpace, match="1000 are free"):
        build_image(home, "tiny", "tiny", print)
    assert list(home.tmp.iterdir()) == []


def test_a_missing_agent_is_one_clear_cause(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It names the file and the command that makes it, and leaves nothing behind."""
    monkeypatch.setattr("diapause.guest.programs.resources.files", lambda package: tmp_path)
    with pytest.raises(ImageBuildFailed, match=r"diapause-agent.*make setup"):
        build_image(home, "tiny", "tiny", print)
    assert list(home.tmp.iterdir()) == []
    assert images.names(home) == []


def test_a_program_that_needs_libraries_is_refused(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The guest has none."""
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "diapause-agent").write_bytes(Path("/bin/true").read_bytes())
    monkeypatch.setattr("diapause.guest.programs.resources.files", lambda package: tmp_path)
    with pytest.raises(ImageBuildFailed, match="not a static program"):
        build_image(home, "tiny", "tiny", print)
