"""`diapause image`: build, import, list, inspect and remove images."""

from __future__ import annotations

from pathlib import Path

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import data, json_document, pretty, say, table
from diapause.cli.progress import waiting
from diapause.cli.removal import remove_each
from diapause.model import ImageBuildRequest, ImageImportRequest
from diapause.units import format_size

_BUILD_EXAMPLES = """\b
Examples:
  diapause image build tiny
  diapause image build python
  diapause image build mine --flavor tiny"""

_IMPORT_EXAMPLES = """\b
Examples:
  diapause image import mine --kernel /boot/vmlinuz --rootfs ./tree
  diapause image import mine --kernel vmlinuz --rootfs root.tar.gz
  diapause image import mine --kernel vmlinuz --initrd initrd.img --rootfs root.ext4
  diapause image import small --kernel vmlinuz --initrd initramfs.cpio.gz
A tree comes from debootstrap, mmdebstrap or the export of a container. Without an initrd of your
own the kernel has virtio-pci, virtio-blk, virtio-console and ext4 built in, or its modules are
found: in an image here that boots the same kernel, or in the host's /lib/modules."""

_LS_EXAMPLES = """\b
Examples:
  diapause image ls"""

_INSPECT_EXAMPLES = """\b
Examples:
  diapause image inspect tiny
  diapause image inspect tiny --json | jq .sandboxes"""

_RM_EXAMPLES = """\b
Examples:
  diapause image rm mine
  diapause image rm mine other && diapause gc"""

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


@image.command("import", epilog=_IMPORT_EXAMPLES)
@click.argument("name")
@click.option("--kernel", required=True, metavar="FILE", help="A bzImage.")
@click.option(
    "--initrd", metavar="FILE", help="The kernel's initial file system; ours unless said."
)
@click.option(
    "--rootfs", metavar="PATH", help="A directory, a tar, or an ext4 file system in a file."
)
@json_option
@pass_context
def import_image(
    context: Context, name: str, kernel: str, initrd: str | None, rootfs: str | None
) -> None:
    """Make an image of your own kernel and root file system; the agent is put in.

    The daemon reads the files, so it has to be able to. Nothing of them is mounted or run on this
    host, and they are not changed.
    """
    request = ImageImportRequest(
        name=name,
        kernel=str(Path(kernel).resolve()),
        initrd=str(Path(initrd).resolve()) if initrd is not None else None,
        rootfs=str(Path(rootfs).resolve()) if rootfs is not None else None,
    )
    with waiting(f"importing image {name!r}"):
        answer = context.client().import_image(request)
    if context.json:
        json_document(answer)
        return
    size = format_size(answer.size_bytes)
    say(f"image {answer.name} imported: kernel {answer.kernel_version}, {size}")
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


@image.command("inspect", epilog=_INSPECT_EXAMPLES)
@click.argument("image")
@json_option
@pass_context
def inspect_image(context: Context, image: str) -> None:
    """Show all that is known of an image and who needs it, as JSON."""
    answer = context.client().inspect_image(image)
    (json_document if context.json else pretty)(answer)


@image.command("rm", epilog=_RM_EXAMPLES)
@click.argument("images", nargs=-1, required=True)
@json_option
@pass_context
def remove_images(context: Context, images: tuple[str, ...]) -> int:
    """Remove images. One that fails does not keep the others.

    Refused for an image that a sandbox or a snapshot was made from. What was kept to start guests
    from it goes with the next `diapause gc`.
    """
    client = context.client()
    return remove_each(context, images, lambda name: (client.remove_image(name).removed, []))
