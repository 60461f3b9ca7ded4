"""A scratch home: an engine of its own on real guests, of which nothing stays.

It lies under tmp/ of the home, with the image hard-linked. What ran in it is ended and its files
are removed whatever happens, also where the verb that needed it is cancelled; what a killed daemon
leaves of one goes when the next one starts.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from diapause.errors import DiapauseError
from diapause.operation import shielded
from diapause.sandbox.verb import new_id
from diapause.store.files import remove_tree
from diapause.store.home import SCRATCH_START, Home

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diapause.guest.images import Image
    from diapause.sandbox.engine import Engine

log = logging.getLogger("diapause.scratch")


@contextlib.contextmanager
def scratch_engine(engine: Engine, image: Image) -> Iterator[Engine]:
    """An engine of a home that has this image and nothing else."""
    key = engine.host.accelerator_key()
    scratch = Home.at(engine.host.home.tmp / f"{SCRATCH_START}{new_id()}")
    try:
        scratch.create()
        place = scratch.image(image.directory.name)
        place.mkdir(mode=0o700)
        for file in image.directory.iterdir():
            (place / file.name).hardlink_to(file)
        trial = type(engine).open(scratch, engine.host.loop)
        try:
            _tell(key, engine, trial)
            yield trial
        finally:
            with shielded(), contextlib.closing(trial):
                _end_guests(trial)
                _tell(key, trial, engine)
    finally:
        for directory in (scratch.buffers, scratch.sockets, scratch.root):
            remove_tree(directory)


def _tell(key: str, knows: Engine, asks: Engine) -> None:
    """What one home has proved of the accelerator, where it came to a proof, holds for both."""
    found = knows.host.catalog.fact(key)
    if found is not None:
        asks.host.catalog.remember(key, found)


def _end_guests(trial: Engine) -> None:
    """All of them; one that can't be ended now keeps no other."""
    for row in trial.sandboxes(everything=True):
        try:
            trial.remove([row.sandbox], force=True)
        except DiapauseError as error:
            log.warning("%s of a scratch home: %s", row.sandbox, error)
