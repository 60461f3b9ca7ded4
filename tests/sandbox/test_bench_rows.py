"""Rows of `bench`: which there are, what stands for a figure, and what it is next to."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from diapause.errors import BenchFailed, BlobDamaged, Cancelled, InvalidRequest
from diapause.model import BenchPeer, BenchRequest
from diapause.operation import Operation, at_step, checkpoint, current, under
from diapause.sandbox.bench import pager, run
from diapause.sandbox.bench.files import Files, ask
from diapause.sandbox.bench.guest import apart
from diapause.sandbox.bench.rows import Figures, Line, percentile, rows
from diapause.units import KIB, MIB

LINES = [
    Line("resume", "ms", "resume", "boot", "a boot", ("warm",)),
    Line("fork", "ms", "fork", "boot", "a boot"),
    Line("boot", "ms", "boot"),
    Line("used", "pages", "resume", "none", "none there"),
]


def figures(**values: list[float]) -> Figures:
    made = Figures()
    for name, several in values.items():
        for value in several:
            made.add(name, value)
    return made


def test_a_row_has_its_values_their_median_and_its_peer() -> None:
    """What was not measured has no row."""
    made = rows("cycle", LINES, figures(resume=[30, 10, 20], boot=[100, 300, 200], other=[1]))
    assert [row.name for row in made] == ["resume", "boot", "used"]
    resume, boot, used = made
    assert (resume.values, resume.median, resume.ratio) == ([30, 10, 20], 20, 0.1)
    assert resume.peer == BenchPeer(name="a boot", values=[100, 300, 200], median=200)
    assert (resume.group, resume.unit, resume.notes) == ("cycle", "ms", ["warm"])
    assert (boot.peer, boot.ratio, used.peer) == (None, None, None)


def test_a_peer_of_nothing_gives_no_ratio() -> None:
    [row] = rows("pager", [Line("used", "pages", "a", "b", "b")], figures(a=[0], b=[0]))
    assert row.peer is not None
    assert row.ratio is None


@pytest.mark.parametrize(
    ("part", "found"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)], ids=str
)
def test_percentiles(part: float, found: int) -> None:
    assert percentile(list(range(100, 0, -1)), part) == found
    assert percentile([7.0], part) == 7.0


def test_reads_are_told_by_origin_and_those_with_a_trace_next_to_those_without() -> None:
    values: dict[str, list[float]] = {
        "count local without": [100], "p50_us local without": [512],
        "count local traced": [20], "count zero traced": [3],
    }  # fmt: skip
    counted = figures(**values)
    made = rows("pager", pager._read_lines(counted), counted)
    assert [(row.name, row.ratio) for row in made] == [
        ("reads from builds on this host, without a trace", None),
        ("reads from builds on this host, without a trace, p50", None),
        ("reads from builds on this host, with a trace", 0.2),
        ("reads from no data, with a trace", None),
    ]


@pytest.mark.parametrize("rounds", [0, -1, 21])
def test_rounds_are_bounded(rounds: int) -> None:
    with pytest.raises(InvalidRequest, match="1 to 20"):
        run.measure(None, BenchRequest(rounds=rounds))  # type: ignore[arg-type]


def test_verbs_that_are_measured_keep_their_steps_to_themselves_and_can_be_cancelled() -> None:
    outer = Operation("bench")
    with under(outer):
        with apart("round 1"):
            at_step("spawn")
            assert outer.step == "round 1"
            inner = current()
            assert inner is not None
            assert (inner is outer, inner.id) == (False, outer.id)
            outer.cancel()
            with pytest.raises(Cancelled):
                checkpoint()
        with pytest.raises(Cancelled), apart("round 2"):
            checkpoint()


def files(place: Path, served: bytes, flat: bytes) -> Files:
    made = Files("5a.memory", place / "served", place / "flat")
    made.served.write_bytes(served)
    made.flat.write_bytes(flat)
    return made


def test_files_are_compared_touched_and_read(tmp_path: Path) -> None:
    """Only blocks that are all data are touched: zeros cost a pager nothing."""
    data = os.urandom(2 * MIB)
    same = files(tmp_path, data, data)
    assert same.compare() == 2 * MIB
    with same.flat.open("wb") as file:
        file.seek(MIB)
        file.write(data[:MIB])
    measured = Figures()
    same.measure(measured, 1)
    assert measured.values.keys() == {
        f"{size} {name} {part}"
        for size in (4, 64) for name in ("served", "flat") for part in (0.5, 0.99)
    } | {"read served", "read flat"}  # fmt: skip
    assert all(value > 0 for values in measured.values.values() for value in values)


def test_a_byte_that_is_another_is_damage(tmp_path: Path) -> None:
    with pytest.raises(BlobDamaged, match=r"5a\.memory"):
        files(tmp_path, b"a" * KIB, b"b" * KIB).compare()


def test_a_process_that_could_not_measure_says_why(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(4 * KIB))
    with pytest.raises(BenchFailed, match="no pages of the file"):
        ask("touch", path, offsets=[4 * KIB], length=4 * KIB, random=True, warm=True)
    with pytest.raises(BenchFailed, match="No such file"):
        ask("read", tmp_path / "none", warm=True)


def test_a_cancelled_measurement_ends(tmp_path: Path) -> None:
    """While it waits for a file that never says anything."""
    os.mkfifo(tmp_path / "silent")
    asked = Operation("bench")
    timer = threading.Timer(0.3, asked.cancel)
    timer.start()
    with under(asked), pytest.raises(Cancelled):
        ask("read", tmp_path / "silent", warm=True)
    timer.join(5)
