"""`diapause exec`: a command in a guest, never wrapped.

Its stdin, stdout, stderr and exit code are this process's own. 125 means that the stream was cut or
never began, with the cause on stderr; nothing else of ours is ever printed.
"""

from __future__ import annotations

import os

import click

from diapause.cli.context import Context, pass_context
from diapause.cli.output import error_text
from diapause.errors import DiapauseError, ExecCut

_EXAMPLES = """\b
Examples:
  diapause exec web -- uname -a
  diapause exec -it web -- sh
  tar c src | diapause exec -i web -- tar x -C /tmp
Signals INT, TERM and HUP are passed on to the command; QUIT ends this program alone."""

_SETTINGS = {"allow_interspersed_args": False}


@click.command("exec", context_settings=_SETTINGS, epilog=_EXAMPLES)
@click.argument("sandbox")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("-i", "--interactive", is_flag=True, help="Pass stdin on.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option("-w", "--workdir", help="The command's working directory.")
@click.option(
    "-e", "--env", "settings", multiple=True, metavar="NAME=VALUE", help="Set a variable."
)
@pass_context
def exec_(
    context: Context,
    sandbox: str,
    command: tuple[str, ...],
    interactive: bool,
    tty: bool,
    workdir: str | None,
    settings: tuple[str, ...],
) -> int:
    """Run a command in a sandbox and exit as it does."""
    words = list(command[1:] if command[0] == "--" else command)
    if not words:
        raise click.UsageError("There is no command after the sandbox.")
    environment = _environment(settings, tty)
    # Standard output is the command's own: no document of ours goes there, whatever was asked.
    context.json = False
    from diapause.cli.exec_client import ExecClient
    from diapause.cli.terminal import size_of_terminal
    from diapause.daemon.exec_wire import ExecRequest

    rows, cols = size_of_terminal()
    request = ExecRequest(
        argv=words, cwd=workdir, env=environment, tty=tty, rows=rows, cols=cols, stdin=interactive
    )
    try:
        return ExecClient(context.client(), sandbox, request).run()
    except DiapauseError as error:
        error_text(error)
        return ExecCut.exit_code


def _environment(settings: tuple[str, ...], tty: bool) -> dict[str, str]:
    found = {"TERM": os.environ.get("TERM", "xterm")} if tty else {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise click.UsageError(f"{setting!r} is not NAME=VALUE.")
        found[name] = value
    return found
