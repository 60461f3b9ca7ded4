"""Sizes as options: ``512M``, ``1G``."""

from __future__ import annotations

from typing import Any

import click

from diapause.units import parse_size


class Size(click.ParamType[int]):
    """Bytes, written with a unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The text as bytes."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE = Size()
