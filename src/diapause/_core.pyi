"""The data plane, in Rust: formats, compare and pack, materialize, process memory.

Paths are ``str``, digests and ids lower-case hex, pages 4 KiB. Every function releases the GIL
while it works. Errors: ``BlobDamaged`` and ``BlobMissing`` name the blob, ``NotEnoughSpace`` on a
full disk, ``StorageFailed`` for any other failed I/O, ``ValueError`` where the caller's arguments
contradict. A file that a function makes is whole and fsynced when it returns (unless it says
otherwise), and gone when it raises.
"""

from collections.abc import Callable
from typing import Literal, final

PAGE_SIZE: int
FRAME_PAGES: int

Progress = Callable[[int, int], object]
"""Called now and then with (pages done, pages in all); what it raises cancels the work."""

@final
class PageSource:
    """The pages that one capture took of one device: a capture file or a disk's frozen overlay."""

    @staticmethod
    def capture(path: str, spill: str | None = None) -> PageSource:
        """Open a sealed capture file, or a sealed capture buffer with what spilled from it.

        `spill` is the unfinished capture file that holds the pages beyond the buffer's capacity.
        """

    @staticmethod
    def overlay(path: str, map_json: bytes, page_count: int) -> PageSource:
        """Read a frozen qcow2 overlay in place, by what ``qemu-img map -U --output=json`` says.

        The overlay has no backing file in its header; `page_count` is the device's. What is not
        present is the parent's. Compressed clusters raise ``BlobDamaged``.
        """

    @property
    def device_pages(self) -> int:
        """Pages of the device."""

    @property
    def page_count(self) -> int:
        """Pages captured, with zero ones that need no storage."""

    @property
    def bytes(self) -> int:
        """Bytes of page data it holds."""

    def runs(self) -> list[tuple[int, int]]:
        """What it captured, as ascending (first page, count)."""

@final
class HeaderInfo:
    """What a verified header says; `builds` are packed ones, `captures` not packed yet."""

    page_count: int
    extent_count: int
    mapped_pages: int
    builds: list[tuple[str, int]]  # (id, pages in it)
    captures: list[tuple[str, int]]
    digest: str
    size_bytes: int

@final
class PackResult:
    """What a pack stored; `build_id` is None where nothing was."""

    build_id: str | None
    header_digest: str
    header_bytes: int
    stored_pages: int
    zero_pages: int
    unchanged_pages: int
    stored_bytes: int  # size of the build file
    builds: list[tuple[str, int]]  # every build that the new header needs: (id, pages in it)
    extent_count: int

@final
class MaterializeResult:
    """What a materialize wrote: its own bytes, bytes copied from the base, frames it verified."""

    written_bytes: int
    copied_bytes: int
    verified_frames: int

@final
class CaptureInfo:
    """What the head of a capture file or buffer says."""

    sealed: bool
    device_pages: int
    captured_pages: int
    capacity: int
    size_bytes: int

def zero_header(path: str, page_count: int) -> str:
    """Write the header of a device that is all zero; returns its digest."""

def provisional_header(
    parent_header: str,
    parent_digest: str,
    source: PageSource,
    capture_id: str,
    out: str,
) -> HeaderInfo:
    """Write the header that maps what `source` captured to it, and the rest as the parent does."""

def header_info(path: str, digest: str) -> HeaderInfo:
    """Read a header to its end and verify all of it."""

def header_extents(path: str, digest: str) -> list[tuple[int, int, str | None, int]]:
    """Every extent as (page, length, build id or None for zero, position in the build).

    For tests and tools: refuses headers of more than a million extents with ValueError.
    """

def lookup(path: str, digest: str, page: int) -> tuple[str, int] | None:
    """Where a page lies: (build id, position in it), or None for a zero page."""

def pack(
    source: PageSource,
    parent_header: str,
    parent_digest: str,
    builds_dir: str,
    tmp_dir: str,
    header_out: str,
    parent_flat: str | None = None,
    progress: Progress | None = None,
) -> PackResult:
    """Store the pages of `source` that are neither zero nor the parent's, and the packed header.

    The parent's bytes come from `parent_flat`, else from the builds through the parent header.
    `tmp_dir` is on the file system of `builds_dir` and of `header_out`.
    """

def pack_file(
    path: str,
    page_count: int,
    builds_dir: str,
    tmp_dir: str,
    header_out: str,
    progress: Progress | None = None,
) -> PackResult:
    """Pack a plain file as a device of `page_count` pages without a parent; holes cost nothing."""

def verify_build(path: str, build_id: str) -> int:
    """Read a whole build and verify every byte; returns its pages."""

def materialize(
    header: str,
    digest: str,
    builds_dir: str,
    out: str,
    captures: dict[str, PageSource] | None = None,
    base: tuple[str, str, str] | None = None,
    threads: int = 2,
    sync: bool = False,
) -> MaterializeResult:
    """Write the device as a new sparse file at `out`, every byte verified.

    `captures` gives the page source of each capture that the header maps to. `base` is (flat file,
    its header, that header's digest): the flat is cloned and only what differs is written. `out`
    must not exist; it is fsynced only with `sync`.
    """

def write_out(buffer: str, out: str) -> CaptureInfo:
    """Finish a capture file from its sealed buffer: list, sums, buffered pages, seal, fsync.

    `out` holds what spilled already, at its final place, or does not exist. It stays where this
    fails, to be tried again.
    """

def capture_info(path: str) -> CaptureInfo:
    """Read the head of a capture file or buffer."""

def check_blobs(
    blobs: list[tuple[str, str, str]], threads: int = 2
) -> list[tuple[int, str, Literal["damaged", "missing", "unread"]]]:
    """Read blobs whole: (kind, path, what it has to be), on threads, in bounded memory.

    Kinds: ``build`` and its id, ``header`` or ``whole`` and the digest, ``flat`` and the path of
    its sums, ``capture`` and the file that it spilled to or nothing, ``read`` and nothing: that is
    read to its end and compared with nothing. Returns the number of each that is not right, the
    cause, and what that says of it: `unread` is nothing, since descriptors, memory or permission
    were wanting.
    """

@final
class DeviceSums:
    """The digests that a flat file of a device has to have."""

    def write(self, out: str) -> None:
        """Write them to the new file `out`; it is renamed into place, and not fsynced."""

def sum_device(
    header: str,
    digest: str,
    builds_dir: str,
    base: tuple[str, str, str] | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> DeviceSums:
    """Make them from the builds, every frame verified; no flat file is read.

    `base` is (header, its digest, sums) of a relative: only chunks that the two headers map
    differently are made anew.
    """

@final
class RebuildResult:
    """What a build was made again of."""

    kept_frames: int
    packed_frames: int
    size_bytes: int

def rebuild_build(
    build_id: str,
    sources: list[tuple[str, str, str, str | None]],
    builds_dir: str,
    tmp_dir: str,
) -> RebuildResult:
    """Make a damaged or missing build again, verified whole before it takes its place.

    Its own frames that are right are kept. The pages of others come from `sources`: (header, its
    digest, flat file, its sums or None). ``BlobDamaged`` where that is not enough: what was there
    stays.
    """

def check_overlay(path: str, device_bytes: int, folding: bool = False) -> None:
    """Refuse an overlay whose head names other files, or that is none of a device of that size.

    While a disk is `folding` the head says what is below it. Raises ``BlobDamaged``.
    """

@final
class HeaderDifference:
    """What two headers of one device map differently; extents are (first page, pages)."""

    changed_pages: int
    zeroed_pages: int  # of the changed ones
    extent_count: int
    extents: list[tuple[int, int]]

def header_difference(
    old: str, old_digest: str, new: str, new_digest: str, limit: int = 0
) -> HeaderDifference:
    """Compare two headers, verified to their ends; at most `limit` extents are listed."""

def cached_bytes(pid: int, files: list[tuple[str, str]]) -> list[tuple[int | None, bool] | None]:
    """What the page cache has of files that a process has open, by the ends of their paths, each
    with the path of the file that it may be passed through to.

    Bytes, and whether it is passed through; no bytes where the file behind is another by now. None
    for one that it has not open. Whoever serves the files is asked nothing. OSError where the
    process is gone or the kernel can't tell (before Linux 6.5).
    """

def time_reading(path: str, *, warm: bool) -> float:
    """Milliseconds that it takes to read a file from first to last, in calls of 1 MiB.

    `warm`: it was read once before; else what the page cache has of it is dropped first, as far as
    it is neither mapped nor dirty. OSError for what the kernel says.
    """

def time_touches(
    path: str, offsets: list[int], length: int, *, random: bool, warm: bool
) -> list[float]:
    """Microseconds that it takes to touch the pages of `length` bytes at each offset of a mapping.

    `random` asks the kernel to bring no more than what is touched; `warm` as in `time_reading`. A
    page that can't be read ends the process (SIGBUS): this is called in one of its own. OSError
    where an offset is no page of the file.
    """

def blake3_file(path: str) -> str:
    """BLAKE3-256 of a file, streamed."""

def blake3_bytes(data: bytes) -> str:
    """BLAKE3-256 of bytes."""

DirtyRule = Literal["private", "tracked", "compared"]

@final
class GuestRam:
    """Guest RAM as it lies in a VMM process: a private mapping of the memory file.

    ``private``: pages written since the process began. ``tracked``: since the last `rearm`.
    ``compared``: a superset of what was written, for packing to compare with the parent.
    """

    def __init__(self, pid: int, memory: str, size_bytes: int) -> None:
        """Find the mapping of `memory`; OSError where it isn't exactly `size_bytes`."""

    @property
    def tracked(self) -> bool:
        """Whether the tracker registered it."""

    @property
    def page_count(self) -> int:
        """Pages of guest RAM."""

    def estimate(self, rule: DirtyRule) -> int:
        """Pages that `rule` calls dirty now; nothing is re-armed."""

    def dirty_runs(self, rule: DirtyRule) -> list[tuple[int, int]]:
        """The same as ascending (first page, count)."""

    def rearm(self) -> None:
        """Forget what was written; the process must stand and its dirty pages be safe."""

@final
class Filled:
    """What a filled buffer holds; times in milliseconds."""

    page_count: int
    spilled_pages: int
    scan_ms: float
    copy_ms: float
    spill_ms: float

@final
class CaptureBuffer:
    """A buffer on tmpfs, allocated and touched when made; the file outlives this object."""

    def __init__(self, path: str, capacity: int, device_pages: int) -> None:
        """Make the file with room for `capacity` pages; OSError where it can't be had."""

    @property
    def path(self) -> str:
        """Its file."""

    @property
    def capacity(self) -> int:
        """Pages that it has room for."""

    def fill(
        self, ram: GuestRam, rule: DirtyRule, unmerged: list[tuple[int, int]], spill: str
    ) -> Filled:
        """Copy the dirty pages, and those of `unmerged` runs, and seal; the process must stand.

        What doesn't fit is written to the new file `spill`, where the capture file wants it.
        """

@final
class ArchiveSummary:
    """What a copy moved; `notes` are sentences with escaped names, `more_notes` those not kept."""

    entries: int
    bytes: int
    notes: list[str]
    more_notes: int

def archive_pack(
    path: str, top: bytes, descriptor: int, progress: Progress | None = None
) -> ArchiveSummary:
    """Write what stands at `path` as a stream to an open descriptor, under the name `top`.

    `top` is ``b"."`` for a directory's contents. Progress is in bytes. Raises ``CopyFailed``.
    """

def archive_unpack(
    descriptor: int, path: str, name: bytes | None = None, progress: Progress | None = None
) -> ArchiveSummary:
    """Read a stream that anybody may have written and put its tree at `path`, as ``cp -a`` does.

    Under `name` where `path` is a directory, or as its contents where there is no name. Nothing
    stands there until all of it was read. Raises ``ArchiveRefused`` with the entry's name,
    ``CopyFailed``, ``NotEnoughSpace``.
    """

@final
class RootfsEntry:
    """What a file of ours does not say of an entry of an image.

    `mode` has the kind's bits; `special` is a letter (c, b, p) and the device's two numbers.
    """

    path: bytes
    mode: int
    uid: int
    gid: int
    special: tuple[str, int, int] | None
    attributes: list[tuple[str, bytes]]

def rootfs_unpack(
    descriptor: int,
    path: str,
    bytes_max: int,
    entries_max: int,
    progress: Progress | None = None,
) -> tuple[ArchiveSummary, list[RootfsEntry]]:
    """Read a root file system's tar that anybody may have written into the empty directory `path`.

    Its files belong to us, without set-id bits; what they do not say comes back. Raises
    ``ArchiveRefused`` with the entry's name, ``RootfsTooLarge``, ``CopyFailed``,
    ``NotEnoughSpace``.
    """
