"""Disk overlays as real qcow2 files: what their map says is what a pack stores."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from diapause import _core
from diapause.errors import BlobDamaged
from diapause.units import KIB, MIB, PAGE_SIZE
from tests.framework.blobs import Chain

OPTIONS = ["cluster_size=64k", "cluster_size=128k,extended_l2=on", "cluster_size=4k"]
DISK_BYTES = 8 * MIB
IDENTITY = "0d" * 32


def qemu(program: str, *arguments: str) -> bytes:
    done = subprocess.run([program, *arguments], check=True, capture_output=True, timeout=60)
    return done.stdout


def make_overlay(path: Path, options: str, commands: list[str], size: int = DISK_BYTES) -> bytes:
    """An overlay that a guest wrote to by `commands` of qemu-io; returns its map."""
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(path), str(size))
    arguments = [word for command in commands for word in ("-c", command)]
    if arguments:
        qemu("qemu-io", "-f", "qcow2", "-d", "unmap", *arguments, str(path))
    return qemu("qemu-img", "map", "-U", "--output=json", str(path))


def base_disk(chain: Chain) -> int:
    """A template that is full of data, packed from its file; returns its step."""
    content = random.Random(7).randbytes(DISK_BYTES)
    plain = chain.directory / "template"
    plain.write_bytes(content)
    header = chain.directory / "headers" / "template"
    places = (str(chain.builds), str(chain.tmp), str(header))
    packed = _core.pack_file(str(plain), DISK_BYTES // PAGE_SIZE, *places)
    chain.steps.append(type(chain.steps[0])(header, packed.header_digest, content, plain))
    return len(chain.steps) - 1


def written_by(path: Path, base: Path, expected: Path) -> bytes:
    """What the guest sees, by QEMU: the overlay over its base."""
    copy = expected.with_suffix(".qcow2")
    copy.write_bytes(path.read_bytes())
    qemu("qemu-img", "rebase", "-u", "-F", "raw", "-b", str(base), "-f", "qcow2", str(copy))
    qemu("qemu-img", "convert", "-O", "raw", str(copy), str(expected))
    return expected.read_bytes()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_packed_overlay_is_what_the_guest_sees(tmp_path: Path, options: str, seed: int) -> None:
    chain = Chain(tmp_path, DISK_BYTES // PAGE_SIZE)
    base, rng = base_disk(chain), random.Random(seed)
    commands = []
    for _ in range(40):
        # Below a cluster QEMU fills the rest from the backing file, which is not there: whole ones.
        unit = 4 * KIB if "extended" in options or "4k" in options else 64 * KIB
        units = DISK_BYTES // unit
        at, length = rng.randrange(units), rng.randint(1, 12)
        length = min(length, units - at)
        what = rng.choice(["write -P 0x5a", "write -P 0x17", "write -z", "discard"])
        commands.append(f"{what} {at * unit} {length * unit}")
    overlay = tmp_path / "overlay.qcow2"
    map_json = make_overlay(overlay, options, commands)
    content = written_by(overlay, chain.steps[base].flat, tmp_path / "expected")
    source = _core.PageSource.overlay(str(overlay), map_json, DISK_BYTES // PAGE_SIZE)
    above, provisional = chain.steps[base], tmp_path / "provisional"
    info = _core.provisional_header(
        str(above.header), above.digest, source, IDENTITY, str(provisional)
    )
    out, captures = tmp_path / "out", {IDENTITY: source}
    _core.materialize(str(provisional), info.digest, str(chain.builds), str(out), captures)
    assert out.read_bytes() == content
    for through_flat in (True, False):
        result = chain.pack(source, base, content, through_flat)
        assert chain.materialize(len(chain.steps) - 1)[0] == content
        assert chain.materialize(len(chain.steps) - 1, base)[0] == content
        pages = result.stored_pages + result.zero_pages + result.unchanged_pages
        assert pages == source.page_count


def test_an_untouched_overlay_stores_nothing(tmp_path: Path) -> None:
    chain = Chain(tmp_path, DISK_BYTES // PAGE_SIZE)
    base = base_disk(chain)
    overlay = tmp_path / "overlay.qcow2"
    map_json = make_overlay(overlay, OPTIONS[1], [])
    source = _core.PageSource.overlay(str(overlay), map_json, DISK_BYTES // PAGE_SIZE)
    assert (source.page_count, source.bytes) == (0, 0)
    result = chain.pack(source, base, chain.steps[base].content)
    assert result.build_id is None
    assert result.header_digest == chain.steps[base].digest


def test_a_disk_of_zeros_over_data_maps_to_zero(tmp_path: Path) -> None:
    chain = Chain(tmp_path, DISK_BYTES // PAGE_SIZE)
    base = base_disk(chain)
    overlay = tmp_path / "overlay.qcow2"
    map_json = make_overlay(overlay, OPTIONS[1], [f"write -z 0 {DISK_BYTES}"])
    source = _core.PageSource.overlay(str(overlay), map_json, DISK_BYTES // PAGE_SIZE)
    assert (source.page_count, source.bytes) == (DISK_BYTES // PAGE_SIZE, 0)
    result = chain.pack(source, base, bytes(DISK_BYTES))
    assert (result.zero_pages, result.build_id) == (DISK_BYTES // PAGE_SIZE, None)
    assert chain.materialize(len(chain.steps) - 1, base)[0] == bytes(DISK_BYTES)


def test_compressed_clusters_are_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"x" * MIB)
    overlay = tmp_path / "compressed.qcow2"
    qemu("qemu-img", "convert", "-c", "-O", "qcow2", str(plain), str(overlay))
    map_json = qemu("qemu-img", "map", "-U", "--output=json", str(overlay))
    with pytest.raises(BlobDamaged, match="compressed"):
        _core.PageSource.overlay(str(overlay), map_json, MIB // PAGE_SIZE)


def test_a_map_of_another_disk_is_refused(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    map_json = make_overlay(overlay, OPTIONS[0], [f"write 0 {MIB}"])
    with pytest.raises(BlobDamaged, match="out of place"):
        _core.PageSource.overlay(str(overlay), map_json, MIB // PAGE_SIZE)
    entries = json.loads(map_json)
    entries[0]["offset"] = 1 << 40
    far = _core.PageSource.overlay(
        str(overlay), json.dumps(entries).encode(), DISK_BYTES // PAGE_SIZE
    )
    chain = Chain(tmp_path, DISK_BYTES // PAGE_SIZE)
    with pytest.raises(BlobDamaged, match="shorter"):
        chain.pack(far, 0, b"")
    chain.assert_nothing_left()
