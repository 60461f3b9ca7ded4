"""Help: every verb and group has examples, and every example is a command line that parses."""

from __future__ import annotations

import re
import shlex
from typing import Any

import click
import pytest

from diapause.cli.context import Context
from diapause.cli.main import cli
from diapause.store.home import Home

# What ends a command in a line of shell.
_ENDS = re.compile(r"\s(?:\||&&|>>?|<|;)|;|\)(?=\s|$)|[\"']?>\S")
_INNER = re.compile(r"[$<]\(([^()]*)\)")
_START = re.compile(r"(?<![\w./-])diapause(?=\s|$)")


def commands(group: Any = cli, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The program, its groups and its verbs, as words."""
    context = click.Context(group)
    found = [path]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
        else:
            found.append((*path, name))
    return found


def examples(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines below `Examples:` in a help text."""
    cli.main([*words, "--help"], prog_name="diapause", standalone_mode=False)
    _, _, below = capsys.readouterr().out.partition("Examples:\n")
    return [line.strip() for line in below.splitlines() if line.strip()]


def invocations(line: str) -> list[list[str]]:
    """Every run of diapause in a line of shell, as words behind the program's name."""
    found: list[list[str]] = []
    while inner := _INNER.search(line):
        found += invocations(inner[1])
        line = f"{line[: inner.start()]}VALUE{line[inner.end() :]}"
    for start in _START.finditer(line):
        rest = line[start.end() :]
        end = _ENDS.search(rest)
        found.append(shlex.split(rest[: end.start()] if end else rest))
    return found


def parse(words: list[str]) -> None:
    """As the program does, down to the verb, which is not run; raises UsageError."""
    made = cli.make_context("diapause", list(words), obj=Context(Home.at("/nowhere")))
    context, command = made, made.command
    while isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None, words
        context = found.make_context(name, rest, parent=context)
        command = found


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words) or "diapause")
def test_every_command_has_examples_that_parse(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = examples(words, capsys)
    assert lines != [], f"{words} has no examples"
    runs = [run for line in lines for run in invocations(line)]
    assert any(run[: len(words)] == list(words) or _skips_options(run, words) for run in runs)
    for run in runs:
        try:
            parse(run)
        except click.UsageError as error:
            pytest.fail(f"diapause {shlex.join(run)}: {error.format_message()}")


def _skips_options(run: list[str], words: tuple[str, ...]) -> bool:
    """Whether it is that verb behind options of the program itself."""
    return any(run[at : at + len(words)] == list(words) for at in range(len(run)))


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words) or "diapause")
def test_every_option_says_what_it_is(words: tuple[str, ...]) -> None:
    command: click.Command = cli
    for word in words:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), word)
        assert found is not None
        command = found
    silent = [
        parameter.name
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.help and not parameter.hidden
    ]
    assert silent == []
    assert command.help
