"""A home of many sandboxes and snapshots: copies of real ones under ids of their own.

Rows and files are such that `check` finds nothing wrong with them and any of the snapshots can be
forked. Headers and device states are links, as nothing changes them; manifests are their own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import TYPE_CHECKING

import msgspec

from diapause.catalog import Catalog
from diapause.snapshot.manifest import manifest_bytes
from diapause.store.files import write_file

if TYPE_CHECKING:
    from diapause.catalog import SnapshotRecord
    from diapause.store.home import Home

SANDBOXES = 200
SNAPSHOTS = 2000


def multiply(
    home: Home, snapshot: str, sandboxes: int = SANDBOXES, snapshots: int = SNAPSHOTS
) -> None:
    """Add paused sandboxes, and among them snapshots, each like this packed one; the first of a
    sandbox is what it is paused at."""
    with contextlib.closing(Catalog(home.catalog)) as catalog:
        packed = catalog.snapshot(snapshot)
        assert packed is not None
        assert packed.state == "packed"
        maker = catalog.sandbox(packed.sandbox)
        assert maker is not None
        ids = [secrets.token_hex(8) for _ in range(sandboxes)]
        at = [_copy(home, catalog, packed, ids[n % sandboxes]) for n in range(snapshots)]
        for number, one in enumerate(ids):
            home.sandbox(one).mkdir(mode=0o700)
            row = msgspec.structs.replace(
                maker, id=one, name=f"many-{number}-{one[:4]}", state="paused", process=None,
                root=None, snapshot=at[number].id, overlays=[], captures=0, hostname=one,
            )  # fmt: skip
            catalog.put_sandbox(row)


def _copy(home: Home, catalog: Catalog, packed: SnapshotRecord, sandbox: str) -> SnapshotRecord:
    made = msgspec.structs.replace(packed, id=secrets.token_hex(8), name=None, sandbox=sandbox)
    source, target = home.snapshot(packed.id), home.snapshot(made.id)
    target.mkdir(mode=0o700)
    for file in source.iterdir():
        if file.name != "manifest.json":
            os.link(file, target / file.name)
    write_file(target / "manifest.json", manifest_bytes(made), sync=False)
    target.chmod(source.stat().st_mode & 0o777)
    catalog.put_snapshot(made, durable=False)
    return made
