"""`diapause fork`."""

from __future__ import annotations

import click

from diapause import limits
from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import data, json_document, say
from diapause.model import ForkRequest

_EXAMPLES = """\b
Examples:
  diapause fork web
  for id in $(diapause fork web -n 4); do diapause exec $id -- hostname; done"""


@click.command(epilog=_EXAMPLES)
@click.argument("source")
@click.option(
    "-n",
    "count",
    type=click.IntRange(1, limits.FORKS_MAX),
    default=1,
    show_default=True,
    help="How many.",
)
@json_option
@pass_context
def fork(context: Context, source: str, count: int) -> None:
    """Make new running sandboxes from a sandbox or a snapshot, and print their ids.

    A sandbox that runs is saved first and goes on.
    """
    answer = context.client().fork(ForkRequest(source=source, count=count))
    for note in answer.notes:
        say(note)
    if context.json:
        json_document(answer)
        return
    say(f"{len(answer.sandboxes)} from snapshot {answer.snapshot}")
    for one in answer.sandboxes:
        data(one)
