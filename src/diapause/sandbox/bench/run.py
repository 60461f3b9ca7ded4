"""Measure what was asked for, in a scratch home of which nothing stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from diapause.errors import InvalidRequest, PagerUnavailable
from diapause.guest.images import find_image
from diapause.limits import BENCH_ROUNDS_MAX
from diapause.model import BenchAnswer, BenchGroup
from diapause.pager import process
from diapause.sandbox.bench import cycle, pager
from diapause.sandbox.bench.guest import IMAGE
from diapause.sandbox.scratch import scratch_engine

if TYPE_CHECKING:
    from diapause.model import BenchRequest, BenchRow
    from diapause.sandbox.engine import Engine


def measure(engine: Engine, request: BenchRequest) -> BenchAnswer:
    """The rows of the groups.

    Raises InvalidRequest; ImageNotFound where `tiny` was not built; PagerUnavailable where only
    `pager` is asked for and FUSE is not there; and what a verb fails with.
    """
    if not 1 <= request.rounds <= BENCH_ROUNDS_MAX:
        cause = f"it must be 1 to {BENCH_ROUNDS_MAX}"
        raise InvalidRequest(what=f"rounds={request.rounds}", cause=cause)
    groups = set(request.groups or get_args(BenchGroup))
    image = find_image(engine.host.home, IMAGE)
    missing = process.probe()
    if missing is not None and groups == {"pager"}:
        raise PagerUnavailable(cause=missing)
    rows: list[BenchRow] = []
    notes = [] if missing is None else [f"nothing is measured on demand: {missing}"]
    with scratch_engine(engine, image) as trial:
        if "cycle" in groups:
            rows += cycle.measure(trial, request.rounds, ondemand=missing is None)
        if "pager" in groups and missing is None:
            found, said = pager.measure(trial, request.rounds)
            rows, notes = rows + found, notes + said
        accelerator = trial.host.accelerators()[0]
    return BenchAnswer(rounds=request.rounds, accelerator=accelerator, rows=rows, notes=notes)
