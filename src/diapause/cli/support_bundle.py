"""`diapause support-bundle`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import data, json_document, say
from diapause.cli.progress import waiting

_EXAMPLES = """\b
Examples:
  diapause support-bundle
  diapause support-bundle -o /tmp/for-the-report.tar.gz"""


@click.command("support-bundle", epilog=_EXAMPLES)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write.  [default: diapause-support-TIME.tar.gz here]",
)
@json_option
@pass_context
def support_bundle(context: Context, output: Path | None) -> None:
    """Pack what a report of a problem needs into one file, and print its name.

    In it: versions, doctor, rows of the catalog, events, the journal, logs of the daemon and of
    VMMs, metrics, names and sizes of files. Not in it: memory, disks, consoles, command lines and
    environments. Names of sandboxes, snapshots and images stay: look through it first.
    """
    from diapause.daemon.support import write_bundle

    place = output or Path(time.strftime("diapause-support-%Y%m%d-%H%M%S.tar.gz"))
    with waiting("looking at the host"):
        missing = write_bundle(context.home, context.client(), place)
    for name, cause in missing.items():
        say(f"diapause: {name} is not in it: {cause}")
    if context.json:
        json_document(
            {"bundle": str(place), "size_bytes": place.stat().st_size, "missing": missing}
        )
    else:
        data(str(place))
