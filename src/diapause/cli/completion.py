"""`diapause completion`, and what a shell is told when somebody presses Tab.

The shells ask by running the program with `_DIAPAUSE_COMPLETE` set. Names of sandboxes, snapshots
and images come from the daemon if it runs and answers at once; a Tab never starts one, never
waits, and says nothing but completions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import json_document
from diapause.errors import DiapauseError
from diapause.store.home import Home

if TYPE_CHECKING:
    from diapause.daemon.client import Client

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_DIAPAUSE_COMPLETE"
_BOUND_S = 1.0

_EXAMPLES = """\b
Examples:
  source <(diapause completion bash)
  diapause completion zsh >~/.zfunc/_diapause
  diapause completion fish >~/.config/fish/completions/diapause.fish"""


@click.command(epilog=_EXAMPLES)
@click.argument("shell", type=click.Choice(SHELLS))
@json_option
@pass_context
def completion(context: Context, shell: str) -> None:
    """Print the completion script of a shell, which `make install` puts where the shell looks."""
    root = click.get_current_context().find_root().command
    found = get_completion_class(shell)
    assert found is not None
    script = found(root, {}, "diapause", VARIABLE).source()
    if context.json:
        json_document({"script": script})
    else:
        click.echo(script)


def answer_shell(program: click.Command, context: Context) -> int:
    """Answer a shell that asks; the exit code."""
    return shell_complete(program, {"obj": context}, "diapause", VARIABLE, os.environ[VARIABLE])


class Reference(click.ParamType[str]):
    """An argument that names something a daemon knows; any text is taken."""

    name = "text"

    def __init__(self, list_names: Callable[[Client], Iterator[tuple[str, str]]]) -> None:
        self._list_names = list_names

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The names that begin so, and ids once somebody began to write one."""
        from diapause.daemon.client import Client

        context = ctx.find_object(Context)
        assert context is not None
        given = ctx.find_root().params.get("home")
        home = Home.at(given) if given else context.home
        try:
            found = list(self._list_names(Client(home, None, bound_s=_BOUND_S)))
        except DiapauseError:
            return []
        return [
            CompletionItem(name, help=text) for name, text in found if name.startswith(incomplete)
        ]


def _sandboxes(client: Client) -> Iterator[tuple[str, str]]:
    for row in client.sandboxes(everything=True):
        yield row.name or row.sandbox, row.state


def _snapshots(client: Client) -> Iterator[tuple[str, str]]:
    for row in client.snapshots():
        yield row.name or row.id, row.state


def _either(client: Client) -> Iterator[tuple[str, str]]:
    yield from _sandboxes(client)
    yield from _snapshots(client)


def _images(client: Client) -> Iterator[tuple[str, str]]:
    for row in client.images():
        yield row.name, row.flavor


# By the name of the parameter, whichever verb has it.
REFERENCES = {
    "sandbox": Reference(_sandboxes),
    "sandboxes": Reference(_sandboxes),
    "snapshot": Reference(_snapshots),
    "snapshots": Reference(_snapshots),
    "source": Reference(_either),
    "reference": Reference(_either),
    "image": Reference(_images),
    "images": Reference(_images),
}
