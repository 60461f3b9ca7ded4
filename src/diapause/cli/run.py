"""`diapause run`."""

from __future__ import annotations

import click

from diapause.cli.context import Context, json_option, pass_context
from diapause.cli.output import data, json_document, say
from diapause.cli.size import SIZE
from diapause.model import RunRequest
from diapause.units import GIB, MIB

_EXAMPLES = """\b
Examples:
  id=$(diapause run)
  diapause run --name web --memory 1G --cpus 2 --disk 4G
  diapause run --boot
  diapause run --net user -p 8080:80"""


@click.command(epilog=_EXAMPLES)
@click.option("--image", default="tiny", show_default=True, help="What to boot.")
@click.option("--name", help="A name beside the id.")
@click.option("--memory", type=SIZE, default=512 * MIB, help="Guest memory.  [default: 512M]")
@click.option("--cpus", type=int, default=1, show_default=True, help="Virtual CPUs.")
@click.option("--disk", type=SIZE, default=1 * GIB, help="The disk at /data.  [default: 1G]")
@click.option("--vmm", default="qemu", show_default=True, help="The VMM that runs it.")
@click.option("--net", default="none", show_default=True, help="user: outbound, through the VMM.")
@click.option(
    "-p",
    "ports",
    multiple=True,
    metavar="HOST:GUEST",
    help="Forward a TCP port of 127.0.0.1; needs --net user.",
)
@click.option("--boot", is_flag=True, help="Boot, though a ready snapshot would do.")
@json_option
@pass_context
def run(
    context: Context,
    image: str,
    name: str | None,
    memory: int,
    cpus: int,
    disk: int,
    vmm: str,
    net: str,
    ports: tuple[str, ...],
    boot: bool,
) -> None:
    """Make a sandbox from an image, start it, and print its id.

    The first run of an image in a shape boots it and keeps a ready snapshot; later ones start from
    that, each with its own name, machine id and random numbers. --boot boots all the same.
    """
    request = RunRequest(
        image=image, name=name, memory_bytes=memory, cpus=cpus, disk_bytes=disk, vmm=vmm,
        net=net, ports=list(ports), boot=boot,
    )  # fmt: skip
    answer = context.client().run(request)
    for note in answer.notes:
        say(note)
    if context.json:
        json_document(answer)
        return
    say(f"{answer.name or answer.sandbox} is ready after {answer.ready_ms:.0f} ms")
    data(answer.sandbox)
