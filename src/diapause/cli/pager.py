"""`diapause pager`."""

from __future__ import annotations

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import json_document, say, table
from diapause.units import format_size

_EXAMPLES = """\b
Examples:
  diapause pager
  diapause pager --json | jq .sandboxes"""


@click.command(epilog=_EXAMPLES)
@json_option
@pass_context
def pager(context: Context) -> None:
    """Show the processes that serve memory on demand, and the sandboxes that run on them.

    They start with the first guest that needs them, outlive the daemon, and replace each other.
    """
    answer = context.client().pager()
    if context.json:
        json_document(answer)
        return
    if not answer.running:
        say("no pager runs: it is started by the first guest that is served on demand")
        return
    rows = [
        [one.sandbox, str(one.pid), str(one.files), "userfaultfd" if one.handed else "FUSE", state]
        for one in answer.sandboxes
        for state in [_state(one.ended, one.stalled.blob if one.stalled else None)]
    ]
    if rows:
        table(["sandbox", "pid", "files", "by", "state"], rows)
    say(
        f"pager {answer.pid}, keeper {answer.keeper_pid}: "
        f"{format_size(answer.resident_bytes or 0)} resident, {answer.files} files"
    )
    if not answer.replaceable:
        say("this kernel can't replace a pager that dies: its guests would end (Linux 6.9 can)")


def _state(ended: bool, blob: str | None) -> str:
    if ended:
        return "ended"
    return "served" if blob is None else f"waits for {blob}"
