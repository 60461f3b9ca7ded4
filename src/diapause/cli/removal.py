"""Removing several things: one that fails does not keep the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diapause.cli.context import Context
from diapause.cli.output import data, error_text, json_document, say
from diapause.errors import DiapauseError


def remove_each(
    context: Context,
    references: Sequence[str],
    remove: Callable[[str], tuple[list[str], list[str]]],
) -> int:
    """Remove each, say which went and which were gone already; the exit code of the first error."""
    removed: list[str] = []
    already: list[str] = []
    failures: list[DiapauseError] = []
    for reference in references:
        try:
            gone, before = remove(reference)
        except DiapauseError as error:
            failures.append(error)
            continue
        removed += gone
        already += before
    document: dict[str, object] = {"removed": removed, "already": already}
    if failures:
        document["error"] = failures[0].to_dict()
    if context.json:
        json_document(document)
    else:
        for one in removed:
            data(one)
        for one in already:
            say(f"{one} was removed already")
    for failure in failures:
        error_text(failure)
    return failures[0].exit_code if failures else 0
