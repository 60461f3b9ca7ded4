"""`diapause resume`."""

from __future__ import annotations

from typing import Literal

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.figures import resume_line
from diapause.cli.output import data, json_document, say
from diapause.model import ResumeRequest

_EXAMPLES = """\b
Examples:
  diapause resume web
  diapause resume web --json | jq .ready_ms
  diapause resume web --cold"""


@click.command(epilog=_EXAMPLES)
@click.argument("sandbox")
@click.option(
    "--memory-mode",
    type=click.Choice(["ondemand", "copy"]),
    default=None,
    help="Fetch memory as the guest touches it, or have it all there first (default: ondemand).",
)
@click.option("--cold", is_flag=True, help="Boot a stopped or failed sandbox on its own disk.")
@json_option
@pass_context
def resume(
    context: Context, sandbox: str, memory_mode: Literal["ondemand", "copy"] | None, cold: bool
) -> None:
    """Bring a paused sandbox back to where it was. From: paused. To: running.

    --cold boots a stopped or failed one on its own disk; where that is lost, on the disk of its
    last snapshot that is whole, and the answer says so.
    """
    answer = context.client().resume(sandbox, ResumeRequest(memory_mode=memory_mode, cold=cold))
    for note in answer.notes:
        say(note)
    if context.json:
        json_document(answer)
    else:
        data(resume_line(answer))
