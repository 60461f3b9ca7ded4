"""`diapause pause`."""

from __future__ import annotations

import click

from diapause.cli.capture_options import capture_options
from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.figures import capture_line
from diapause.cli.output import data, json_document, say
from diapause.model import CaptureRequest, Durability

_EXAMPLES = """\b
Examples:
  diapause pause web
  diapause pause web --durability process --json"""


@click.command(epilog=_EXAMPLES)
@click.argument("sandbox")
@capture_options
@json_option
@pass_context
def pause(context: Context, sandbox: str, durability: Durability, quiesce: bool) -> None:
    """Save everything of a sandbox and free its memory. From: running, frozen. To: paused."""
    request = CaptureRequest(durability=durability, quiesce=quiesce)
    answer = context.client().pause(sandbox, request)
    for note in answer.notes:
        say(note)
    if context.json:
        json_document(answer)
    else:
        data(capture_line("paused", answer))
