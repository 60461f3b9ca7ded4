"""`diapause restore`."""

from __future__ import annotations

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import data, json_document, say
from diapause.model import RestoreRequest

_EXAMPLES = """\b
Examples:
  diapause restore web before-upgrade
  diapause restore web before-upgrade --discard
  diapause restore web $(diapause restore web before-upgrade --json | jq -r .saved)"""


@click.command(epilog=_EXAMPLES)
@click.argument("sandbox")
@click.argument("snapshot")
@click.option("--discard", is_flag=True, help="Do not save its present state first.")
@json_option
@pass_context
def restore(context: Context, sandbox: str, snapshot: str, discard: bool) -> None:
    """Put a sandbox back to a snapshot; its present state is saved first unless --discard.

    From: running, to: running. From: frozen, paused, stopped, failed, to: paused. The answer names
    the snapshot that was saved. Commands that run in the sandbox end as cut. A sandbox that is
    stopped or failed has nothing to save but its disk: it needs --discard.
    """
    request = RestoreRequest(snapshot=snapshot, discard=discard)
    answer = context.client().restore(sandbox, request)
    for note in answer.notes:
        say(note)
    if context.json:
        json_document(answer)
    elif answer.already:
        data(f"{answer.sandbox} was paused at snapshot {answer.snapshot} already")
    else:
        saved = f"saved as snapshot {answer.saved}" if answer.saved else "not saved"
        data(
            f"restored {answer.sandbox} to snapshot {answer.snapshot}: {answer.state};"
            f" what it was before is {saved}"
        )
