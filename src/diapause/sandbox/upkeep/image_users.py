"""Who needs an image, what is known of one, and image rm.

An image is needed by the sandboxes and snapshots that were made from it: a cold resume boots it.
Ready snapshots are not among them: nobody looks for those of an image that is gone, and gc frees
them. `run` looks for its image and writes its row under the lock that `image rm` holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from diapause.errors import InUse
from diapause.guest import images
from diapause.model import ImageDetail, ImageFile
from diapause.sandbox.ready import is_ready, list_ready
from diapause.sandbox.refer import labels
from diapause.sandbox.verb import Verb
from diapause.store.files import allocated_bytes, fsync_path, remove_tree, storage_errors

if TYPE_CHECKING:
    from diapause.catalog import Catalog, SandboxRecord, SnapshotRecord
    from diapause.sandbox.host import Host


def users(catalog: Catalog, image: str) -> tuple[list[SandboxRecord], list[SnapshotRecord]]:
    """The sandboxes and snapshots that were made from an image, oldest first."""
    sandboxes = [row for row in catalog.sandboxes() if row.image == image]
    snapshots = [r for r in catalog.snapshots() if r.image == image and not is_ready(r)]
    return sandboxes, snapshots


def detail(host: Host, name: str) -> ImageDetail:
    """`image inspect`."""
    image = images.find_image(host.home, name)
    manifest = image.manifest
    sandboxes, snapshots = users(host.catalog, name)
    return ImageDetail(
        name=name, flavor=manifest.flavor, created_at=manifest.created_at,
        size_bytes=sum(entry.size for entry in manifest.files.values()),
        stored_bytes=allocated_bytes(image.directory),
        files=[
            ImageFile(name=file, size_bytes=entry.size, digest=f"blake2b:{entry.blake2b}")
            for file, entry in sorted(manifest.files.items())
        ],
        kernel_version=manifest.kernel.version, kernel_package=manifest.kernel.package,
        kernel_package_version=manifest.kernel.package_version,
        command_line=manifest.command_line, agent_digest=f"blake2b:{manifest.agent_blake2b}",
        busybox=manifest.busybox, network=manifest.network,
        sandboxes=[row.id for row in sandboxes], snapshots=[row.id for row in snapshots],
        ready=list_ready(host, name),
    )  # fmt: skip


def check_unused(catalog: Catalog, image: str) -> None:
    """Refuse to remove an image that something was made from."""
    sandboxes, snapshots = users(catalog, image)
    words, ways = [], []
    if sandboxes:
        words.append(f"sandbox {labels(sandboxes)}")
        ways.append("`diapause rm`")
    if snapshots:
        words.append(f"snapshot {labels(snapshots)}")
        ways.append("`diapause snapshot rm`")
    if words:
        advice = f"Remove them first: {' and '.join(ways)}."
        raise InUse(what=f"Image {image}", users=" and ".join(words), advice=advice)


class RemoveImage(Verb):
    """Remove one image.

    move     out of everybody's sight, into tmp/, unless somebody needs it
    delete   its files
    """

    name = "image-rm"
    steps: ClassVar[tuple[str, ...]] = ("move", "delete")

    def __init__(self, host: Host, image: str) -> None:
        super().__init__(host, "")
        self.image = image
        self.trash = host.home.tmp / f"image-{self.operation}"

    def do_move(self) -> None:
        """One rename: the image is whole or absent, and on the disk before a file goes."""
        place = self.host.home.image(self.image)
        with self.host.images, storage_errors("removing an image", self.host.home.root):
            check_unused(self.host.catalog, self.image)
            place.chmod(0o755)  # a directory that its owner can't write can't be moved
            place.rename(self.trash)
            fsync_path(place.parent)

    def do_delete(self) -> None:
        """What nobody finds any more; what stays of it goes when a daemon starts."""
        with storage_errors("removing an image", self.host.home.root):
            remove_tree(self.trash)
