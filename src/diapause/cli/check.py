"""`diapause check`."""

from __future__ import annotations

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import json_document, say, table
from diapause.cli.progress import waiting
from diapause.errors import BlobDamaged
from diapause.model import CheckAnswer, CheckRequest
from diapause.units import format_size

_EXAMPLES = """\b
Examples:
  diapause check
  diapause check --repair --json | jq -r '.damage[].blob'"""


@click.command(epilog=_EXAMPLES)
@click.option(
    "--repair", is_flag=True, help="Make again what can be; say in the rows what is lost."
)
@json_option
@pass_context
def check(context: Context, repair: bool) -> int:
    """Read everything, and name what is damaged and which snapshots and sandboxes that costs.

    Exits with 40 where damage is left.
    """
    with waiting("reading everything"):
        answer = context.client().check(CheckRequest(repair=repair))
    return show(context, answer)


def show(context: Context, answer: CheckAnswer) -> int:
    """Print what a check found; the exit code."""
    left = [damage for damage in answer.damage if damage.repaired is None]
    code = BlobDamaged.exit_code if left else 0
    if context.json:
        json_document(answer)
        return code
    if answer.damage:
        rows = [
            [
                one.blob, one.cause, " ".join(one.snapshots) or "-",
                " ".join(one.sandboxes) or "-", one.repaired or "no",
            ]
            for one in answer.damage
        ]  # fmt: skip
        table(["blob", "cause", "snapshots", "sandboxes", "repaired"], rows)
    if answer.kinds:
        rows = [[row.kind, row.how, str(row.count), format_size(row.bytes)] for row in answer.kinds]
        table(["kind", "checked by", "count", "size"], rows)
    say(f"{answer.blobs} blobs read, {len(answer.damage)} damaged, {len(left)} left so")
    if answer.recorded:
        say(f"{answer.recorded} flat files had no digests yet: they were made of the builds")
    if answer.unchecked:
        say(f"{answer.unchecked} flat files have none: their builds are damaged, or not made yet")
    if answer.stale:
        say(f"{answer.stale} flat files are of no use any more; they are made again when needed")
    if answer.unreferenced:
        size = format_size(sum(item.bytes for item in answer.unreferenced))
        say(f"{len(answer.unreferenced)} files of nobody, {size}: `diapause gc` frees them")
    return code
