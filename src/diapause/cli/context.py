"""What every verb shares: the home, whether to speak JSON, and the client of its daemon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from diapause.daemon.start import DaemonCommand, daemon_command
from diapause.store.home import Home

if TYPE_CHECKING:
    from diapause.daemon.client import Client


@dataclass
class Context:
    """One run of the command line."""

    home: Home
    json: bool = False
    command: DaemonCommand = daemon_command

    def client(self) -> Client:
        """The client of this home's daemon."""
        from diapause.cli.attend import attended
        from diapause.daemon.client import Client

        return Client(self.home, self.command, attend=attended)


def _say_json(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.find_object(Context).json = True  # type: ignore[union-attr]


# `--json` is understood before a verb and after it.
json_option = click.option(
    "--json",
    is_flag=True,
    expose_value=False,
    callback=_say_json,
    help="Print exactly one JSON document on stdout.",
)

pass_context = click.make_pass_decorator(Context)
