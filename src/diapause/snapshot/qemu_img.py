"""`qemu-img` on an overlay that a VMM wrote: what it says of it, or that nothing is known of it."""

from __future__ import annotations

import errno
import os
import subprocess
from typing import TYPE_CHECKING

from diapause.errors import BlobDamaged, StorageFailed
from diapause.limits import SUBPROCESS_S
from diapause.units import GIB

if TYPE_CHECKING:
    from pathlib import Path

MEMORY_BYTES = 2 * GIB  # addresses of one that reads what may be made to take much
_NOT_RUN = (126, 127)  # of `prlimit`, which begins it, or of the loader
# It ends with 1 for what it finds and for what is refused to it: only its words tell them apart.
_REFUSED = tuple(map(os.strerror, (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)))


def qemu_img(
    overlay: Path, *arguments: str, sound: tuple[int, ...] = (0,), memory_bytes: int = 0
) -> bytes:
    """Run it on an overlay, in bounded time; `memory_bytes` bound its addresses where given.

    Raises BlobDamaged with what it says of the overlay, or where it takes too long: an overlay may
    be made so that it does. Raises StorageFailed where it said nothing of the overlay: it could not
    be run or go on, since descriptors or memory were wanting, or it was killed.
    """
    limit = ["prlimit", f"--as={memory_bytes}"] if memory_bytes else []
    blob = "/".join(overlay.parts[-3:])
    try:
        done = subprocess.run(
            [*limit, "qemu-img", *arguments],
            capture_output=True, timeout=SUBPROCESS_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise BlobDamaged(blob=blob, cause=str(error)) from error
    except OSError as error:
        raise StorageFailed(what=blob, cause=f"qemu-img could not be run: {error}") from error
    said = done.stderr.decode(errors="replace").strip()[-500:]
    if done.returncode < 0:
        cause = f"qemu-img was ended by signal {-done.returncode}"
        raise StorageFailed(what=blob, cause=cause)
    if done.returncode in _NOT_RUN:
        raise StorageFailed(what=blob, cause=f"qemu-img could not be run: {said}")
    if done.returncode not in sound and any(word in said for word in _REFUSED):
        raise StorageFailed(what=blob, cause=f"qemu-img could not go on: {said}")
    if done.returncode not in sound:
        raise BlobDamaged(blob=blob, cause=said)
    return done.stdout
