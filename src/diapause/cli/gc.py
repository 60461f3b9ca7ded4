"""`diapause gc`."""

from __future__ import annotations

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import json_document, say, table
from diapause.cli.progress import waiting
from diapause.model import GcRequest
from diapause.units import format_size

_EXAMPLES = """\b
Examples:
  diapause gc --dry-run
  diapause snapshot rm before-upgrade && diapause gc"""


@click.command(epilog=_EXAMPLES)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
@pass_context
def gc(context: Context, dry_run: bool) -> None:
    """Delete what nothing refers to any more: the only verb that frees shared data."""
    with waiting("looking for garbage"):
        answer = context.client().gc(GcRequest(dry_run=dry_run))
    if context.json:
        json_document(answer)
        return
    for note in answer.notes:
        say(note)
    if answer.items:
        rows = [[item.kind, item.name, format_size(item.bytes)] for item in answer.items]
        table(["kind", "name", "size"], rows)
    did = "would free" if dry_run else "freed"
    say(f"gc {did} {format_size(answer.freed_bytes)} in {len(answer.items)} files and directories")
