"""`diapause events`: what happened, and with `-f` what happens.

Following goes on over a restart of the daemon: events have numbers, so the next one is asked for
what came after the last.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import data, json_document, say
from diapause.daemon.client import Client
from diapause.errors import DaemonUnreachable
from diapause.model import Event

_RETRY_S = 0.5

_EXAMPLES = """\b
Examples:
  diapause events
  diapause events -f --json | jq 'select(.kind == "failed")'
  diapause events --after 1200"""


@click.command(epilog=_EXAMPLES)
@click.option("-f", "--follow", is_flag=True, help="Go on as more happens.")
@click.option(
    "--after",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Only events with a higher number; 0 for all that are kept.",
)
@json_option
@pass_context
def events(context: Context, follow: bool, after: int) -> None:
    """Print what happened to sandboxes and snapshots, oldest first, one line an event.

    With --json: a list, or with -f one document a line.
    """
    if not follow and context.json:
        json_document(list(context.client().events(after)))
        return
    for event in _followed(context, after) if follow else context.client().events(after):
        if context.json:
            json_document(event)
        else:
            data(_line(event))


def _followed(context: Context, after: int) -> Iterator[Event]:
    """Events for ever; a daemon that went away is waited for, and not started again."""
    answered = told = False
    try:
        for event in context.client().events(after):  # starts a daemon, or says why there is none
            after, answered = event.sequence, True
            yield event
    except DaemonUnreachable:
        if not answered:
            raise
    client = Client(context.home, None)
    while True:
        try:
            for event in client.events(after, follow=True):
                after, told = event.sequence, False
                yield event
        except DaemonUnreachable as error:
            if not told:
                say(f"diapause: {error.message} Waiting for the next one.")
                told = True
        time.sleep(_RETRY_S)


def _line(event: Event) -> str:
    named = [event.detail.get("name") or event.sandbox, event.snapshot]
    words = [str(event.sequence), event.at, event.kind, *(str(name) for name in named if name)]
    rest = [f"{key}={value}" for key, value in event.detail.items() if key != "name" and value]
    return "  ".join([*words, *rest])
