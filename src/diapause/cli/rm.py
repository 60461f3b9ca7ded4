"""`diapause rm`."""

from __future__ import annotations

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.removal import remove_each

_EXAMPLES = """\b
Examples:
  diapause rm web
  diapause rm -f $(diapause ps -aq)"""


@click.command(epilog=_EXAMPLES)
@click.argument("sandboxes", nargs=-1, required=True)
@click.option("-f", "--force", is_flag=True, help="Also one that runs; its state is lost.")
@json_option
@pass_context
def rm(context: Context, sandboxes: tuple[str, ...], force: bool) -> int:
    """Remove sandboxes. Their snapshots stay. One that fails does not keep the others."""
    client = context.client()

    def remove(reference: str) -> tuple[list[str], list[str]]:
        answer = client.remove(reference, force)
        return answer.removed, answer.already

    return remove_each(context, sandboxes, remove)
