"""`diapause snapshot`: save, list, inspect and remove snapshots."""

from __future__ import annotations

import sys

import click

from diapause.cli.capture_options import capture_options
from diapause.cli.check import show
from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.figures import capture_line
from diapause.cli.output import data, json_document, pretty, say, table
from diapause.cli.removal import remove_each
from diapause.cli.tree import lineage, tree_lines
from diapause.model import CaptureRequest, Durability
from diapause.units import format_size

_SAVE_EXAMPLES = """\b
Examples:
  diapause snapshot save web --name before-upgrade
  diapause snapshot save web --json | jq -r .snapshot"""

_LS_EXAMPLES = """\b
Examples:
  diapause snapshot ls"""

_VERIFY_EXAMPLES = """\b
Examples:
  diapause snapshot verify before-upgrade"""

_DIFF_EXAMPLES = """\b
Examples:
  diapause snapshot diff before-upgrade after-upgrade"""

_TREE_EXAMPLES = """\b
Examples:
  diapause snapshot tree
  diapause snapshot tree --json | jq '.[].children'"""

_RM_EXAMPLES = """\b
Examples:
  diapause snapshot rm before-upgrade
  diapause snapshot rm $(diapause snapshot ls --json | jq -r '.[].id') && diapause gc"""

_INSPECT_EXAMPLES = """\b
Examples:
  diapause snapshot inspect before-upgrade"""


_EXAMPLES = """\b
Examples:
  diapause snapshot save web --name before-upgrade
  diapause snapshot ls"""


@click.group(epilog=_EXAMPLES)
@json_option
def snapshot() -> None:
    """Sandboxes as they were at one instant."""


@snapshot.command(epilog=_SAVE_EXAMPLES)
@click.argument("sandbox")
@click.option("--name", help="A name beside the id.")
@capture_options
@json_option
@pass_context
def save(
    context: Context, sandbox: str, name: str | None, durability: Durability, quiesce: bool
) -> None:
    """Take a snapshot of a sandbox that goes on. From: running, frozen; it stays as it was."""
    request = CaptureRequest(durability=durability, quiesce=quiesce, name=name)
    answer = context.client().save(sandbox, request)
    for note in answer.notes:
        say(note)
    if context.json:
        json_document(answer)
    else:
        data(capture_line("saved", answer))


@snapshot.command("ls", epilog=_LS_EXAMPLES)
@json_option
@pass_context
def list_snapshots(context: Context) -> None:
    """List the snapshots."""
    answer = context.client().snapshots()
    if context.json:
        json_document(answer)
        return
    rows = [
        [
            one.id, one.name or "-", one.sandbox, one.parent or "-", one.state, one.durability,
            format_size(one.stored_bytes), one.created_at,
        ]
        for one in answer
    ]  # fmt: skip
    columns = ["snapshot", "name", "sandbox", "parent", "state", "durability", "stored", "created"]
    table(columns, rows)


@snapshot.command("inspect", epilog=_INSPECT_EXAMPLES)
@click.argument("snapshot")
@json_option
@pass_context
def inspect_snapshot(context: Context, snapshot: str) -> None:
    """Show all that is known of a snapshot, as JSON."""
    answer = context.client().inspect_snapshot(snapshot)
    (json_document if context.json else pretty)(answer)


@snapshot.command("rm", epilog=_RM_EXAMPLES)
@click.argument("snapshots", nargs=-1, required=True)
@json_option
@pass_context
def remove_snapshots(context: Context, snapshots: tuple[str, ...]) -> int:
    """Remove snapshots; `diapause gc` frees their space. One that fails does not keep the others.

    Refused for a snapshot that a paused sandbox is to be resumed from.
    """
    client = context.client()

    def remove(reference: str) -> tuple[list[str], list[str]]:
        answer = client.remove_snapshot(reference)
        for note in answer.notes:
            say(note)
        return answer.removed, answer.already

    return remove_each(context, snapshots, remove)


@snapshot.command(epilog=_VERIFY_EXAMPLES)
@click.argument("snapshot")
@json_option
@pass_context
def verify(context: Context, snapshot: str) -> int:
    """Read all that a snapshot is made of. Exits with 40 where something is damaged."""
    return show(context, context.client().verify_snapshot(snapshot))


@snapshot.command(epilog=_DIFF_EXAMPLES)
@click.argument("old")
@click.argument("new")
@json_option
@pass_context
def diff(context: Context, old: str, new: str) -> None:
    """Show what differs between two snapshots, device by device; reads headers, not pages."""
    answer = context.client().diff_snapshots(old, new)
    if context.json:
        json_document(answer)
        return
    rows = [
        [
            one.name, str(one.pages), format_size(one.bytes), str(one.zeroed_pages),
            str(one.extent_count),
        ]
        for one in answer.devices
    ]  # fmt: skip
    table(["device", "pages", "size", "zeroed", "extents"], rows)


@snapshot.command(epilog=_TREE_EXAMPLES)
@json_option
@pass_context
def tree(context: Context) -> None:
    """Show the lineage of the snapshots; one whose parent was removed begins a tree."""
    roots = lineage(context.client().snapshots())
    if context.json:
        sys.setrecursionlimit(max(sys.getrecursionlimit(), 100_000))  # as deep as a lineage is long
        json_document(roots)
        return
    for line in tree_lines(roots):
        data(line)
