"""`diapause cp`: files and trees, into a sandbox and out of it."""

from __future__ import annotations

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import data, json_document, say
from diapause.errors import InvalidRequest
from diapause.units import format_size

_EXAMPLES = """\b
Examples:
  diapause cp src web:/srv
  diapause cp src/. web:/srv
  diapause cp web:/var/log/app.log .
The first makes or fills /srv/src, the second puts what is in src into /srv.
Modes, times, links and holes are kept, owners by number where root writes. Devices, pipes and
sockets are left out. Nothing stands at the destination before all of it has arrived."""

CANCELLED = 130


@click.command(epilog=_EXAMPLES)
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@json_option
@pass_context
def cp(context: Context, source: str, destination: str) -> int:
    """Copy a file or a tree; one of SRC and DST is SANDBOX:PATH. The sandbox has to run."""
    from diapause.cli.copying import Remote, copy_in, copy_out, operand
    from diapause.cli.progress import moving

    here, there = operand(source), operand(destination)
    client = context.client()
    try:
        with moving(f"copying {source}") as progress:
            if isinstance(here, Remote) and isinstance(there, str):
                done = copy_out(client, here, there, progress)
            elif isinstance(here, str) and isinstance(there, Remote):
                done = copy_in(client, here, there, progress)
            else:
                cause = "one of them is SANDBOX:PATH, and one a path here"
                raise InvalidRequest(what="SRC and DST", cause=cause)
    except KeyboardInterrupt:
        say("diapause: cancelled; nothing of it was kept")
        return CANCELLED
    for note in done.notes:
        say(note)
    if context.json:
        json_document(done)
    else:
        data(f"copied {done.entries} entries, {format_size(done.bytes)}")
    return 0
