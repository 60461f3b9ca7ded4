"""`diapause ps`."""

from __future__ import annotations

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import data, json_document, table
from diapause.units import format_size

_EXAMPLES = """\b
Examples:
  diapause ps
  diapause rm -f $(diapause ps -aq)"""


@click.command(epilog=_EXAMPLES)
@click.option("-a", "--all", "everything", is_flag=True, help="Also stopped and failed ones.")
@click.option("-q", "--quiet", is_flag=True, help="Ids only, one a line.")
@json_option
@pass_context
def ps(context: Context, everything: bool, quiet: bool) -> None:
    """List the sandboxes."""
    answer = context.client().sandboxes(everything)
    if context.json:
        json_document([one.sandbox for one in answer] if quiet else answer)
        return
    if quiet:
        for one in answer:
            data(one.sandbox)
        return
    rows = [
        [
            one.sandbox, one.name or "-", one.state, one.image, format_size(one.memory_bytes),
            one.snapshot or "-", one.created_at,
        ]
        for one in answer
    ]  # fmt: skip
    table(["sandbox", "name", "state", "image", "memory", "snapshot", "created"], rows)
