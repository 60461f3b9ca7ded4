"""`diapause ps`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import data, json_document, table
from diapause.units import format_size

if TYPE_CHECKING:
    from diapause.model import SandboxRow

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
            one.sandbox, one.name or "-", _state(one), one.image, format_size(one.memory_bytes),
            one.snapshot or "-", one.created_at,
        ]
        for one in answer
    ]  # fmt: skip
    table(["sandbox", "name", "state", "image", "memory", "snapshot", "created"], rows)


def _state(row: SandboxRow) -> str:
    """What it is in; one that runs and waits for a blob runs only by name."""
    return "stalled" if row.stalled else row.state
