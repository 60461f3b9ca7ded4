"""A group whose verbs are imported when they are used: start-up pays for one verb, not for all."""

from __future__ import annotations

import importlib
from typing import Any

import click


class LazyGroup(click.Group):
    """Verbs by name, as ``module:function``; listed in the order given."""

    def __init__(self, *args: Any, verbs: dict[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._verbs = verbs or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order given."""
        return list(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb, imported now."""
        if cmd_name not in self._verbs:
            return None
        module, _, function = self._verbs[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), function)
        if ctx.resilient_parsing:  # a shell asks what could come next
            _complete_references(command)
        return command


def _complete_references(command: click.Command) -> None:
    from diapause.cli.completion import REFERENCES

    for parameter in command.params:
        if parameter.name in REFERENCES and parameter.type is click.STRING:
            parameter.type = REFERENCES[parameter.name]
    for below in getattr(command, "commands", {}).values():
        _complete_references(below)
