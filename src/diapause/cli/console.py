"""`diapause console`: a guest's console, to read and to type on."""

from __future__ import annotations

import codecs
import os
import sys

import click

from diapause.cli.context import Context, pass_context
from diapause.cli.output import printable, say
from diapause.errors import InvalidRequest

_EXAMPLES = """\b
Examples:
  diapause console web
  diapause console --tail 0 --escape web
Ctrl-] leaves; the guest goes on. One client at a time has the console; the log has all of it."""


@click.command(epilog=_EXAMPLES)
@click.argument("sandbox")
@click.option(
    "--tail", type=click.IntRange(0, 10_000), default=10, show_default=True, metavar="LINES",
    help="Lines of the log to begin with.",
)  # fmt: skip
@click.option("--escape", is_flag=True, help="Write the guest's control characters out.")
@pass_context
def console(context: Context, sandbox: str, tail: int, escape: bool) -> int:
    """Read and type on a sandbox's console. The sandbox has to run."""
    if context.json:
        raise InvalidRequest(what="--json", cause="a console is not a document; use `logs --json`")
    from diapause.cli.console_client import ConsoleClient

    client = context.client()
    session = ConsoleClient(client, sandbox, escape)
    if os.isatty(0):
        say(f"console of {sandbox}; Ctrl-] leaves")
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    for chunk in client.logs(sandbox, tail=tail) if tail else ():
        text = printable(decode(chunk).replace("\r\n", "\n"), keep="\n\t") if escape else ""
        sys.stdout.buffer.write(text.encode(errors="replace") if escape else chunk)
    sys.stdout.buffer.flush()
    return session.run()
