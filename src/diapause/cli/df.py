"""`diapause df`."""

from __future__ import annotations

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import json_document, say, table
from diapause.units import format_size

_EXAMPLES = """\b
Examples:
  diapause df
  diapause df --json | jq .gc_bytes"""


@click.command(epilog=_EXAMPLES)
@json_option
@pass_context
def df(context: Context) -> None:
    """Show what takes the space of the home, as allocated on the disk, and what gc would free."""
    answer = context.client().df()
    if context.json:
        json_document(answer)
        return
    rows = [
        [row.kind, str(row.count), format_size(row.bytes), format_size(row.gc_bytes)]
        for row in answer.rows
    ]
    table(["kind", "count", "size", "gc frees"], rows)
    if answer.snapshots:
        say("")
        table(
            ["snapshot", "name", "alone", "shared", "flat files"],
            [
                [
                    one.id, one.name or "-", format_size(one.unique_bytes),
                    format_size(one.shared_bytes), format_size(one.flat_bytes),
                ]
                for one in answer.snapshots
            ],
        )  # fmt: skip
    total, frees = format_size(answer.total_bytes), format_size(answer.gc_bytes)
    say(f"{total} in all; `diapause gc` frees {frees}; {format_size(answer.free_bytes)} are free")
