"""The QEMU command line: every option of a machine, in one place.

A device state only loads into a machine of the same devices at the same addresses, so all of them
are written out, and `LAYOUT` changes when anything here that the guest can see does. Why these
options, and not others: see docs/architecture.md, "The QEMU machine".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from diapause.driver.base import Shape, StartPlan, VmmIdentity

LAYOUT = 1
PROGRAM = "qemu-system-x86_64"
PACKAGE = "qemu-system-x86"
BIOS = "/usr/share/qemu/qboot.rom"
AGENT_PORT = "diapause.agent"
SANDBOX_OPTIONS = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
CPU_MODELS = {"tcg": "qemu64,+rdrand,+ssse3,+sse4.1,+sse4.2,+popcnt", "kvm": "host"}
_ACCELERATORS = {"tcg": "tcg,tb-size=32", "kvm": "kvm"}  # the default buffer is 1 GiB of addresses
# One address for every guest: each has a network of its own. No ROM: nothing boots from it.
_NETWORK_DEVICE = (
    "-device", "virtio-net-pci,id=net0,netdev=net0,mac=52:54:00:12:34:56,addr=0x7,romfile=",
)  # fmt: skip


@dataclass(frozen=True)
class Descriptors:
    """What the process inherits, by descriptor number."""

    memory: int
    commands: int
    events: int
    agent: int
    console: int
    console_port: int
    disks: tuple[tuple[int, int], ...]  # (base, overlay)
    boot: tuple[int, int] | None = None  # (kernel, initial file system)
    kvm: int | None = None


def name_argument(home_key: str, sandbox: str) -> str:
    """The argument by which a machine of this home is known among all processes."""
    return f"{name_start(home_key)}{sandbox},debug-threads=on"


def name_start(home_key: str) -> str:
    """What that argument begins with for every machine of the home."""
    return f"guest=diapause-{home_key}-"


def guest_visible(identity: VmmIdentity, shape: Shape) -> list[str]:
    """The part that a device state depends on: what a snapshot records and a resume compares."""
    return [
        "-M", f"{identity.machine},memory-backend=ram,usb=off,vmport=off,smbus=off,sata=off,"
              "i8042=off,suppress-vmdesc=on",
        "-accel", _ACCELERATORS[identity.accelerator],
        "-cpu", identity.cpu,
        "-smp", str(shape.cpus),
        "-m", f"{shape.memory_bytes >> 20}M",
        "-device", "virtio-rng-pci,rng=rng0,addr=0x5",
        "-device", "pvpanic-pci,addr=0x6",
        "-device", "virtio-serial-pci,id=serial0,max_ports=4,addr=0x4",
        "-device", f"virtserialport,bus=serial0.0,nr=1,chardev=agent,name={AGENT_PORT}",
        *[argument for index in range(len(shape.disks_bytes)) for argument in (
            "-device", f"virtio-blk-pci,id=disk{index},drive=disk{index}-top,addr={0x8 + index:#x}",
        )],
        *(_NETWORK_DEVICE if shape.network else ()),
    ]  # fmt: skip


def command_line(plan: StartPlan, fds: Descriptors, home_key: str) -> list[str]:
    """The arguments, the program first."""
    identity, shape = plan.identity, plan.shape
    return [
        PROGRAM,
        "-name", name_argument(home_key, plan.sandbox),
        "-bios", BIOS,
        "-nodefaults", "-no-user-config", "-nographic",
        "-action", "reboot=shutdown,shutdown=pause,panic=pause",
        "-S",
        "-object", f"memory-backend-file,id=ram,size={shape.memory_bytes},"
                   f"mem-path={memory_path(fds)},share=off",
        *_monitors(fds),
        *_ports(fds),
        "-object", "rng-builtin,id=rng0",
        *_disks(plan, fds),
        *_network(plan),
        *_with_top_nodes(guest_visible(identity, shape), plan),
        "-sandbox", SANDBOX_OPTIONS,
        *_start(plan, fds),
    ]  # fmt: skip


def node_name(index: int, overlay: Path) -> str:
    """The block node of an overlay: it says which file the disk writes to, whoever asks later."""
    return f"disk{index}-{overlay.stem.rsplit('.', 1)[-1]}"


def memory_path(fds: Descriptors) -> str:
    """The memory file as QEMU is told to open it: a descriptor of its own."""
    return f"/proc/self/fd/{fds.memory}"


def _monitors(fds: Descriptors) -> list[str]:
    return [
        "-chardev", f"socket,id=commands,fd={fds.commands},server=on,wait=off",
        "-mon", "chardev=commands,mode=control",
        "-chardev", f"socket,id=events,fd={fds.events},server=on,wait=off",
        "-mon", "chardev=events,mode=control",
    ]  # fmt: skip


def _ports(fds: Descriptors) -> list[str]:
    return [
        "-add-fd", f"fd={fds.console},set=1",
        # Whoever connects reads and types; the log has all of it, also while nobody does.
        "-chardev", f"socket,id=console,fd={fds.console_port},server=on,wait=off,"
                    "logfile=/dev/fdset/1,logappend=on",
        "-serial", "chardev:console",
        "-chardev", f"socket,id=agent,fd={fds.agent},server=on,wait=off",
    ]  # fmt: skip


def _disks(plan: StartPlan, fds: Descriptors) -> list[str]:
    arguments: list[str] = []
    for index, (base, overlay) in enumerate(fds.disks):
        name, first_set = f"disk{index}", 10 + 2 * index
        top = node_name(index, plan.disks[index].overlay)
        arguments += [
            "-add-fd", f"fd={base},set={first_set}",
            "-add-fd", f"fd={overlay},set={first_set + 1}",
            "-blockdev", f"driver=file,node-name={name}-base-file,filename=/dev/fdset/{first_set},"
                         "read-only=on",
            "-blockdev", f"driver=raw,node-name={name}-base,file={name}-base-file,read-only=on",
            "-blockdev", f"driver=file,node-name={top}-file,filename=/dev/fdset/{first_set + 1}",
            "-blockdev", f"driver=qcow2,node-name={top},file={top}-file,backing={name}-base,"
                         "discard=unmap",
        ]  # fmt: skip
    assert len(fds.disks) == len(plan.disks)
    return arguments


def _network(plan: StartPlan) -> list[str]:
    if not plan.shape.network:
        return []
    forwards = [f",hostfwd=tcp:127.0.0.1:{port.host}-:{port.guest}" for port in plan.forwards]
    return ["-netdev", f"user,id=net0,ipv6=off{''.join(forwards)}"]


def _with_top_nodes(arguments: list[str], plan: StartPlan) -> list[str]:
    """Each disk's present overlay in place of its placeholder."""
    filled = arguments
    for index, disk in enumerate(plan.disks):
        top = f"drive={node_name(index, disk.overlay)},"
        filled = [argument.replace(f"drive=disk{index}-top,", top) for argument in filled]
    return filled


def _start(plan: StartPlan, fds: Descriptors) -> list[str]:
    if plan.boot is None or fds.boot is None:
        return ["-incoming", "defer"]
    kernel, initrd = fds.boot
    return [
        "-kernel", f"/proc/self/fd/{kernel}",
        "-initrd", f"/proc/self/fd/{initrd}",
        "-append", plan.boot.command_line,
    ]  # fmt: skip
