"""Building an image, whatever its flavour.

What holds: an image that exists stays as it is; a build that fails or is killed leaves nothing
where images are looked for.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from diapause.errors import InvalidRequest, NotEnoughSpace
from diapause.guest import images, python, tiny
from diapause.guest.steps import ImageBuild
from diapause.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from diapause.model import ImageInfo
    from diapause.store.home import Home

BUILD_BYTES = 256 * MIB  # the kernel's package and what it unpacks to, for the time of the build


def build_image(home: Home, name: str, flavor: str, progress: Callable[[str], None]) -> ImageInfo:
    """Build an image, unless there is one of that name."""
    images.check_name(name)
    stage, build_bytes = _flavor(flavor)
    if name in images.names(home):
        return images.find_image(home, name).info(already=True)
    if (free := home.free_bytes()) < build_bytes:
        raise NotEnoughSpace(
            what=f"Building image {name}", needed_bytes=build_bytes, directory=home.tmp,
            available_bytes=free,
        )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=home.tmp, prefix="image-") as directory:
        build = ImageBuild(name, Path(directory), progress)
        try:
            staged = stage(build)
            made = images.publish(staged, home.image(name))
        except OSError as error:
            raise build.failed("writing its files", error) from error
    progress(f"image {name} is ready")
    return images.find_image(home, name).info(already=not made)


def _flavor(flavor: str) -> tuple[Callable[[ImageBuild], Path], int]:
    known = {
        tiny.FLAVOR: (tiny.stage, BUILD_BYTES),
        python.FLAVOR: (python.stage, python.BUILD_BYTES),
    }
    if flavor not in known:
        cause = f"there are: {', '.join(known)}"
        raise InvalidRequest(what=f"The image flavour {flavor!r}", cause=cause)
    return known[flavor]
