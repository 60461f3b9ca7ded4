"""`diapause image`: build and list images."""

from __future__ import annotations

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import data, json_document, say, table
from diapause.cli.progress import waiting
from diapause.model import ImageBuildRequest
from diapause.units import format_size

_BUILD_EXAMPLES = """\b
Examples:
  diapause image build tiny
  diapause image build mine --flavor tiny"""

_LS_EXAMPLES = """\b
Examples:
  diapause image ls"""


_EXAMPLES = """\b
Examples:
  diapause image build tiny
  diapause image ls"""


@click.group(epilog=_EXAMPLES)
@json_option
def image() -> None:
    """What sandboxes boot from."""


@image.command(epilog=_BUILD_EXAMPLES)
@click.argument("name")
@click.option("--flavor", help="What to build; the name, unless said.")
@json_option
@pass_context
def build(context: Context, name: str, flavor: str | None) -> None:
    """Build an image. One that exists stays as it is."""
    with waiting(f"building image {name!r}"):
        answer = context.client().build_image(ImageBuildRequest(name=name, flavor=flavor))
    if context.json:
        json_document(answer)
        return
    size = format_size(answer.size_bytes)
    done = "exists already" if answer.already else "built"
    say(f"image {answer.name} {done}: kernel {answer.kernel_version}, {size}")
    data(answer.name)


@image.command("ls", epilog=_LS_EXAMPLES)
@json_option
@pass_context
def list_images(context: Context) -> None:
    """List the images."""
    answer = context.client().images()
    if context.json:
        json_document(answer)
        return
    rows = [
        [one.name, one.flavor, one.kernel_version, format_size(one.size_bytes), one.created_at]
        for one in answer
    ]
    table(["image", "flavor", "kernel", "size", "created"], rows)
