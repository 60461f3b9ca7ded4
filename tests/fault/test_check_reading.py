"""How a check reads: in pieces, so that it can say how far it is and be cancelled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from diapause import _core, operation
from diapause.errors import Cancelled
from diapause.operation import Operation
from diapause.sandbox.upkeep import blobs as reading
from diapause.sandbox.upkeep.blobs import Blobs


@pytest.fixture
def blobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Blobs:
    """Five files, of which the fourth is damaged; each is a piece of its own."""
    monkeypatch.setattr(reading, "_BATCH_BYTES", 1)
    made = Blobs(cast("Any", SimpleNamespace(home=SimpleNamespace(root=tmp_path))))
    for number in range(5):
        path = tmp_path / f"blob-{number}"
        path.write_bytes(bytes([number + 1]) * 5000)
        made.add("whole", path, _core.blake3_file(str(path)), [f"snapshot-{number}"])
    (tmp_path / "blob-3").write_bytes(b"x" * 5000)
    return made


def test_damage_in_any_piece_is_named_with_what_it_costs(blobs: Blobs) -> None:
    """And the operation ends at its total."""
    asked = Operation("check")
    with operation.under(asked):
        blobs.read()
    [damage] = blobs.damage
    assert (damage.blob, damage.snapshots) == ("blob-3", ["snapshot-3"])
    assert asked.progress is not None
    assert asked.progress.total_bytes == asked.progress.done_bytes
    assert asked.progress.done_bytes >= 5 * 5000


def test_it_is_cancelled_between_two_pieces(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Operation("check")
    read = _core.check_blobs
    pieces = []

    def cancelling(jobs: list[tuple[str, str, str]], threads: int) -> Any:
        pieces.append(jobs)
        if len(pieces) == 2:
            asked.cancel()
        return read(jobs, threads)

    monkeypatch.setattr(_core, "check_blobs", cancelling)
    with operation.under(asked), pytest.raises(Cancelled):
        blobs.read()
    assert [len(jobs) for jobs in pieces] == [1, 1]
    assert asked.progress is not None
    assert asked.progress.done_bytes < (asked.progress.total_bytes or 0)
