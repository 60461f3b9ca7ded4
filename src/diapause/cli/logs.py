"""`diapause logs`: the guest's console.

To a terminal every control character but the line ends is written out; to a file or a pipe the
bytes go as they are.
"""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import json_document, printable

_EXAMPLES = """\b
Examples:
  diapause logs web
  diapause logs --tail 20 web
  diapause logs -f web | grep -i error"""


@click.command(epilog=_EXAMPLES)
@click.argument("sandbox")
@click.option("-f", "--follow", is_flag=True, help="Go on as the console grows.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@json_option
@pass_context
def logs(context: Context, sandbox: str, follow: bool, tail: int | None) -> None:
    """Print a sandbox's console. With --json: {"log": text}, or with -f one such line a piece."""
    chunks = context.client().logs(sandbox, follow, tail)
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    if context.json and not follow:
        json_document({"log": "".join(decode(chunk) for chunk in chunks)})
        return
    for chunk in chunks:
        if context.json:
            json_document({"log": decode(chunk)})
        else:
            _write(chunk, decode)


def _write(chunk: bytes, decode: Callable[[bytes], str]) -> None:
    out = sys.stdout.fileno()
    if os.isatty(out):
        # A console ends its lines with CR LF; the CR alone would let a guest overwrite a line.
        text = decode(chunk).replace("\r\n", "\n")
        chunk = printable(text, keep="\n\t").encode(errors="replace")
    while chunk:
        chunk = chunk[os.write(out, chunk) :]
