"""The options that a pause and a save share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

F = TypeVar("F", bound=Callable[..., object])


def capture_options(function: F) -> F:
    """Add --durability and --quiesce."""
    function = click.option(
        "--durability",
        type=click.Choice(["process", "disk", "store"]),
        default="disk",
        show_default=True,
        help="Return once it survives any process, once it is on disk, or once it is uploaded.",
    )(function)
    return click.option(
        "--quiesce",
        is_flag=True,
        help="Sync and freeze the guest's file systems first, for 5 s at most.",
    )(function)
