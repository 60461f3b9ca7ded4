"""`diapause bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import json_document, say, table
from diapause.cli.progress import waiting
from diapause.limits import BENCH_ROUNDS_MAX
from diapause.model import BenchGroup, BenchRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diapause.model import BenchRow

_EXAMPLES = """\b
Examples:
  diapause bench
  diapause bench pager --rounds 10
  diapause bench cycle --json | jq '.rows[] | {name, median, unit, ratio}'"""


@click.command(epilog=_EXAMPLES)
@click.argument(
    "groups", metavar="[cycle] [pager]", nargs=-1, type=click.Choice(get_args(BenchGroup))
)
@click.option(
    "--rounds",
    type=click.IntRange(1, BENCH_ROUNDS_MAX),
    default=5,
    show_default=True,
    help="How often each figure is taken; their median stands for them.",
)
@json_option
@pass_context
def bench(context: Context, groups: tuple[BenchGroup, ...], rounds: int) -> None:
    """Measure what this host does with real guests; both groups unless one is named.

    cycle: boot, save, pause, resume, fork. pager: memory on demand, with a trace and without, and
    the files that it is served from.

    Each figure stands next to its peer of the same rounds. Needs the image `tiny`; the guests and
    all of their files are gone afterwards.
    """
    request = BenchRequest(groups=list(dict.fromkeys(groups)), rounds=rounds)
    with waiting("measuring"):
        answer = context.client().bench(request)
    for note in answer.notes:
        say(note)
    if context.json:
        json_document(answer)
        return
    columns = ["group", "what", "median", "least to most", "against", "ratio"]
    table(columns, [_cells(row) for row in answer.rows])
    say(f"medians of {answer.rounds} rounds; guests ran under {answer.accelerator}")
    for note in dict.fromkeys(note for row in answer.rows for note in row.notes):
        say(note)


def _cells(row: BenchRow) -> list[str]:
    against = f"{row.peer.name}: {_figure(row.peer.median)} {row.unit}" if row.peer else ""
    return [
        row.group, row.name, f"{_figure(row.median)} {row.unit}", _spread(row.values), against,
        _ratio(row.ratio),
    ]  # fmt: skip


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    return f"{_figure(min(values))} to {_figure(max(values))}"


def _figure(value: float) -> str:
    """Three digits that say something, and all of a large number's."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _ratio(ratio: float | None) -> str:
    """A small one as how many times less."""
    if ratio is None:
        return ""
    return (
        f"1/{_figure(1 / ratio)}"
        if 0 < ratio < 0.5
        else f"{ratio:.2f}"
        if ratio < 10
        else f"{ratio:.0f}"
    )
