"""What the command line prints: data on stdout, talk on stderr.

Text that came from anywhere but this program is printed through `printable`: no escape sequence of
a guest or of a name ever reaches a terminal. A reader that went away ends the program quietly.
"""

from __future__ import annotations

import io
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import click
import msgspec

from diapause.errors import DiapauseError


def printable(text: str, keep: str = "") -> str:
    """The text with every control and formatting character written out, but for `keep`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or _is_plain(c) else _written_out(c) for c in text)


def _is_plain(character: str) -> bool:
    # Cc: controls; Cf: direction overrides and the like; Cs: halves of broken pairs.
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def data(text: str) -> None:
    """One line of data on stdout."""
    click.echo(printable(text))


def say(text: str) -> None:
    """One line of talk on stderr."""
    click.echo(printable(text), err=True)


def json_document(answer: Any) -> None:
    """The one JSON document of a run."""
    click.echo(msgspec.json.encode(answer))


def pretty(answer: Any) -> None:
    """An answer as indented JSON, for people."""
    text = msgspec.json.format(msgspec.json.encode(answer), indent=2).decode()
    click.echo(printable(text, keep="\n"))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: ruled on a terminal, plain aligned columns elsewhere."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _ruled(columns, cells)
    else:
        _plain(columns, cells)


def _plain(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [[column.upper() for column in columns], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def _ruled(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    ruled = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        ruled.add_column(column.upper(), overflow="fold")
    for row in rows:
        ruled.add_row(*(Text(cell) for cell in row))
    Console().print(ruled)


def usage_text(error: click.ClickException) -> None:
    """An error in the command line, on stderr: it repeats words that may be anybody's."""
    shown = io.StringIO()
    error.show(shown)
    click.echo(printable(shown.getvalue(), keep="\n"), err=True, nl=False)


def error_text(error: DiapauseError) -> None:
    """An error for people, on stderr."""
    say(f"diapause: {error.message}")
    if error.advice:
        say(f"  {error.advice}")
