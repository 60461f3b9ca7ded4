"""`diapause inspect`."""

from __future__ import annotations

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import json_document, pretty

_EXAMPLES = """\b
Examples:
  diapause inspect web
  diapause inspect web --json | jq -r .state"""


@click.command(epilog=_EXAMPLES)
@click.argument("sandbox")
@json_option
@pass_context
def inspect(context: Context, sandbox: str) -> None:
    """Show all that is known of a sandbox, as JSON."""
    answer = context.client().inspect(sandbox)
    (json_document if context.json else pretty)(answer)
