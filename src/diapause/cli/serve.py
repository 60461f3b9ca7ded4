"""`diapause serve`."""

from __future__ import annotations

import click

from diapause.cli.context import Context, json_option, pass_context

_EXAMPLES = """\b
Examples:
  diapause serve
  diapause --home /srv/diapause serve"""


@click.command(epilog=_EXAMPLES)
# Given by a client that starts a daemon: that another one was first is no news then.
@click.option("--detached", is_flag=True, hidden=True)
@json_option
@pass_context
def serve(context: Context, detached: bool) -> int:
    """Be the daemon, in the foreground, until SIGTERM or Ctrl-C. Guests go on without it.

    There is no need to: the first verb starts a daemon in the background.
    """
    from diapause.daemon.server import serve as serve_home
    from diapause.sandbox.engine import Engine

    return serve_home(context.home, Engine.open, detached)
