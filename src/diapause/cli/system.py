"""`diapause system`: what concerns the home as a whole."""

from __future__ import annotations

import sys

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import json_document, say
from diapause.cli.progress import waiting
from diapause.errors import InvalidRequest

_ANSWER = "reset"

_EXAMPLES = """\b
Examples:
  diapause system reset
  diapause --home /srv/diapause system reset --yes"""


@click.group(epilog=_EXAMPLES)
@json_option
def system() -> None:
    """The home as a whole."""


@system.command(epilog=_EXAMPLES)
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@pass_context
def reset(context: Context, yes: bool) -> None:
    """Remove everything that Diapause made on this host for the home: guests, snapshots, images.

    It asks first, and without a terminal it needs --yes. The daemon and all guests are ended.
    """
    from diapause.daemon.reset import examine, reset

    home = context.home
    found = examine(home)
    if not found.there and not found.machines:
        say(f"there is no home at {home.root}")
    elif not yes:
        _ask(
            f"{home.root} with {found.sandboxes} sandboxes ({found.machines} of them run), "
            f"{found.snapshots} snapshots and all images will be gone for ever."
        )
    with waiting(f"removing {home.root}"):
        reset(home)
    if context.json:
        json_document({"home": str(home.root), "removed": found.there})
    elif found.there:
        say(f"{home.root} is gone")


def _ask(what: str) -> None:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        cause = f"{what} It asks first; without a terminal it needs --yes"
        raise InvalidRequest(what="system reset", cause=cause)
    say(what)
    if (
        click.prompt(f"Type {_ANSWER} to go on", default="", show_default=False, err=True)
        != _ANSWER
    ):
        raise InvalidRequest(what="the answer", cause=f"it is not {_ANSWER!r}; nothing was removed")
