"""`diapause doctor`."""

from __future__ import annotations

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import json_document, say, table
from diapause.cli.progress import waiting

_EXAMPLES = """\b
Examples:
  diapause doctor
  diapause doctor --json"""

REQUIRED_MISSING = 1


@click.command(epilog=_EXAMPLES)
@json_option
@pass_context
def doctor(context: Context) -> int:
    """Say what this host can do, proved by trying, with the fix for what it can't.

    Exits with 1 when something is missing that Diapause can't do without.
    """
    with waiting("trying what this host can do"):
        answer = context.client().doctor()
    if context.json:
        json_document(answer)
    else:
        marks = {True: "ok", False: "no"}
        rows = [[marks[check.ok], check.name, check.detail] for check in answer.checks]
        table(["", "check", "found"], rows)
        for check in answer.checks:
            if not check.ok and check.fix:
                say(f"{check.name}: {check.fix}")
    failed = any(check.required and not check.ok for check in answer.checks)
    return REQUIRED_MISSING if failed else 0
