"""QEMU's device state as a stream that `migrate-incoming` takes.

`xen-save-devices-state` leaves out the configuration section, without which an incoming migration
refuses the stream. It belongs right behind the 8-byte head (`QEVM`, version 3):

    0x07 | length of the machine's name, big-endian u32 | the name
"""

import struct

from diapause.errors import VmmFailed
from diapause.limits import DEVICE_STATE_BYTES_MAX

HEAD = b"QEVM\x00\x00\x00\x03"
CONFIGURATION_SECTION = b"\x07"


def finish_state(sandbox: str, raw: bytes, machine: str) -> bytes:
    """The loadable stream for this machine type; refuses what is no device state."""
    if not raw.startswith(HEAD) or not len(HEAD) < len(raw) <= DEVICE_STATE_BYTES_MAX:
        raise VmmFailed(
            sandbox=sandbox, step="state", cause=f"{len(raw)} bytes are no device state"
        )
    name = machine.encode()
    return HEAD + CONFIGURATION_SECTION + struct.pack(">I", len(name)) + name + raw[len(HEAD) :]
