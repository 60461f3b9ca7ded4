"""`diapause rm`."""

from __future__ import annotations

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import data, error_text, json_document, say
from diapause.errors import DiapauseError

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
    removed: list[str] = []
    already: list[str] = []
    failures: list[DiapauseError] = []
    for reference in sandboxes:
        try:
            answer = client.remove(reference, force)
        except DiapauseError as error:
            failures.append(error)
            continue
        removed += answer.removed
        already += answer.already
    document: dict[str, object] = {"removed": removed, "already": already}
    if failures:
        document["error"] = failures[0].to_dict()
    if context.json:
        json_document(document)
    else:
        for one in removed:
            data(one)
        for one in already:
            say(f"{one} was removed already")
    for failure in failures:
        error_text(failure)
    return failures[0].exit_code if failures else 0
