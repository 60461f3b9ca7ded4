"""Prints docs/errors.md, made from the classes in diapause.errors; a test compares the two."""

from __future__ import annotations

from diapause.errors import DiapauseError, all_errors

HEAD = """\
# Errors

Every error has a code, which programs match on and which never changes. The exit code is the
command line's, the status the API's. With `--json` and at the API an error is
`{"code", "message", "hint", "exit_code", "fields"}`; words in braces below are its fields.
0 is success; `exec` exits with the command's own code, or 125.

This page is made by `.venv/bin/python tools/errors_table.py`.

| code | exit | status | message | what to do |
|---|---|---|---|---|
"""


def table() -> str:
    """The whole page."""
    errors = sorted(all_errors(), key=lambda error: (error.exit_code, error.code))
    return HEAD + "".join(f"{_row(error)}\n" for error in errors)


def _row(error: type[DiapauseError]) -> str:
    template = " ".join((error.__doc__ or "").split("\n\n")[0].split())
    cells = (f"`{error.code}`", str(error.exit_code), str(error.status), template, error.hint)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(table(), end="")
