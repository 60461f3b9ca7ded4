"""`diapause freeze` and `diapause thaw`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import data, json_document, say

if TYPE_CHECKING:
    from diapause.model import FreezeAnswer

_FREEZE_EXAMPLES = """\b
Examples:
  diapause freeze web
  diapause freeze web && diapause snapshot save web && diapause thaw web"""

_THAW_EXAMPLES = """\b
Examples:
  diapause thaw web
  diapause thaw web --json | jq .phases_ms"""


@click.command(epilog=_FREEZE_EXAMPLES)
@click.argument("sandbox")
@json_option
@pass_context
def freeze(context: Context, sandbox: str) -> None:
    """Stop a sandbox's processors; its memory stays. From: running. To: frozen.

    It costs no processor and keeps its memory; `pause` gives that back as well. Commands that run
    in it wait. It stays frozen until `thaw`, also when the daemon is started again.
    """
    _show(context, context.client().freeze(sandbox), "froze", "was frozen already")


@click.command(epilog=_THAW_EXAMPLES)
@click.argument("sandbox")
@json_option
@pass_context
def thaw(context: Context, sandbox: str) -> None:
    """Let a frozen sandbox go on, with its clock set. From: frozen. To: running."""
    _show(context, context.client().thaw(sandbox), "thawed", "ran already")


def _show(context: Context, answer: FreezeAnswer, done: str, already: str) -> None:
    for note in answer.notes:
        say(note)
    if context.json:
        json_document(answer)
    elif answer.already:
        data(f"{answer.sandbox} {already}")
    else:
        data(f"{done} {answer.sandbox} in {answer.phases_ms.get('total', 0.0):.1f} ms")
