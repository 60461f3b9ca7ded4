"""What verbs take and give: the same types in the engine, at the API and on the command line.

Sizes are bytes, times milliseconds unless the name says otherwise, ids lower-case hex.
"""

from typing import Any, Literal

import msgspec

from diapause.units import GIB, MIB

SandboxState = Literal[
    "creating", "running", "frozen", "pausing", "paused", "resuming", "stopped", "failed",
    "removing",
]  # fmt: skip
SnapshotState = Literal["captured", "packed", "uploaded", "failed"]
Durability = Literal["process", "disk", "store"]
DirtySource = Literal["private", "tracked", "compared"]


EventKind = Literal[
    "created", "forked", "running", "frozen", "thawed", "paused", "resumed", "stopped", "failed",
    "removed", "saved", "packed", "pack_failed", "snapshot_failed", "snapshot_removed", "stalled",
    "verb_failed", "gc", "repaired", "daemon_started",
]  # fmt: skip


class Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A request: an unknown field is an error."""


class Answer(msgspec.Struct, kw_only=True):
    """A reply: fields may be added, never taken away."""


class PortForward(Answer):
    """A TCP port of the host's 127.0.0.1 that leads to one of the guest."""

    host: int
    guest: int


class Event(Answer):
    """Something that happened; `detail` is small and has only plain values."""

    sequence: int
    at: str
    kind: str
    sandbox: str | None = None
    snapshot: str | None = None
    operation: str | None = None
    detail: dict[str, Any] = {}


class RunRequest(Strict):
    """Make a sandbox from an image and start it."""

    image: str = "tiny"
    name: str | None = None
    memory_bytes: int = 512 * MIB
    cpus: int = 1
    disk_bytes: int = 1 * GIB
    vmm: str = "qemu"
    net: str = "none"
    ports: list[str] = []
    boot: bool = False


class CaptureRequest(Strict):
    """Pause or save: what both take."""

    durability: Durability = "disk"
    quiesce: bool = False
    name: str | None = None


class ResumeRequest(Strict):
    """Bring a paused sandbox back; or boot one that ended, `cold`."""

    memory_mode: Literal["ondemand", "copy"] | None = None  # None: what the daemon was told
    cold: bool = False


class RestoreRequest(Strict):
    """Put a sandbox back to a snapshot; with `discard` its present state is not saved first."""

    snapshot: str
    discard: bool = False


class ForkRequest(Strict):
    """Make `count` new running sandboxes from a sandbox or a snapshot."""

    source: str
    count: int = 1


class ImageBuildRequest(Strict):
    """Build an image; `flavor` is its name unless said."""

    name: str
    flavor: str | None = None


class ImageImportRequest(Strict):
    """Make an image of what lies on the daemon's host; absolute paths, read by the daemon.

    `rootfs` is a directory, a tar or an ext4 file; without it the guest runs from `initrd`.
    """

    name: str
    kernel: str
    initrd: str | None = None
    rootfs: str | None = None


class RunAnswer(Answer):
    """A new sandbox, ready."""

    sandbox: str
    name: str | None
    ready_ms: float
    phases_ms: dict[str, float]
    warm: bool = False  # from a ready snapshot, not booted
    notes: list[str] = []


class CaptureAnswer(Answer):
    """What a pause or a save did; `already` says that nothing had to be done."""

    sandbox: str
    snapshot: str
    durability: Durability
    frozen_ms: float
    dirty_pages: int
    dirty_source: DirtySource
    captured_bytes: int
    phases_ms: dict[str, float]
    already: bool = False
    notes: list[str] = []


class FreezeAnswer(Answer):
    """What a freeze or a thaw did; `frozen` is how the guest stands now."""

    sandbox: str
    frozen: bool
    phases_ms: dict[str, float]
    already: bool = False
    notes: list[str] = []


class ResumeAnswer(Answer):
    """What a resume did."""

    sandbox: str
    warm: bool
    ready_ms: float
    source: Literal["capture", "local", "store", "peer"]
    phases_ms: dict[str, float]
    snapshot: str | None = None
    disk: Literal["own", "snapshot"] | None = None  # of a cold one: which disk it was booted on
    memory_mode: Literal["ondemand", "copy"] | None = None  # how its memory comes; None: a boot
    # On demand: reads that the pager answered until the guest was ready, by where from; pages that
    # were brought ahead of the guest, and those of them that it had touched by then (None where
    # nobody knows: a pager died meanwhile).
    faults: dict[str, int] | None = None
    prefetched_pages: int | None = None
    used_pages: int | None = None
    already: bool = False
    notes: list[str] = []


class RestoreAnswer(Answer):
    """What a restore did; `saved` is the snapshot of the state before, where there is one."""

    sandbox: str
    snapshot: str
    saved: str | None
    state: SandboxState
    phases_ms: dict[str, float]
    already: bool = False
    notes: list[str] = []


class ForkAnswer(Answer):
    """The new sandboxes and the snapshot they came from."""

    sandboxes: list[str]
    snapshot: str
    phases_ms: dict[str, float]
    notes: list[str] = []


class RemoveAnswer(Answer):
    """What was removed; `already` lists what was gone before."""

    removed: list[str]
    already: list[str]


class RemoveSnapshotAnswer(Answer):
    """Snapshots that were removed; their files stay until gc."""

    removed: list[str]
    already: list[str]
    notes: list[str] = []


class GcRequest(Strict):
    """Delete what nothing refers to, or with `dry_run` only plan it."""

    dry_run: bool = False


class GcItem(Answer):
    """One thing that goes; `bytes` as allocated on the disk."""

    kind: Literal["snapshot", "build", "flat", "capture", "template"]
    name: str
    bytes: int


class GcAnswer(Answer):
    """What a gc deleted, or would delete; `snapshots` are removed ones that are forgotten now."""

    dry_run: bool
    freed_bytes: int
    snapshots: list[str]
    items: list[GcItem]
    notes: list[str] = []
    phases_ms: dict[str, float] = {}


class CheckRequest(Strict):
    """Read everything; with `repair` make again what can be, and say what can't."""

    repair: bool = False


class Damage(Answer):
    """A blob that is not what it has to be, whom that costs, and how it was mended. Of one that is
    `unread` nothing is known: descriptors, memory or permission were wanting."""

    blob: str
    cause: str
    missing: bool = False
    unread: bool = False
    snapshots: list[str] = []
    sandboxes: list[str] = []
    repaired: str | None = None


class CheckedKind(Answer):
    """How a kind of file was checked, and how much of it. `digest`: every byte, against one kept
    elsewhere; `compared`: with the catalog; `structure`: read, and what it says of itself parsed;
    `read`: to its end, as nothing is known that it has to be."""

    kind: str
    how: Literal["digest", "compared", "structure", "read"]
    count: int
    bytes: int  # as allocated


class CheckAnswer(Answer):
    """What a check read and found. `recorded` flat files had no digests and were given some, of the
    builds, by this check; `unchecked` ones still have none, as their builds are damaged or not made
    yet; `stale` ones are never used and are made again when they are needed; what is `unreferenced`
    is no damage: gc frees it."""

    damage: list[Damage]
    blobs: int
    kinds: list[CheckedKind] = []
    recorded: int = 0
    unchecked: int = 0
    stale: int = 0
    unreferenced: list[GcItem] = []


class DfRow(Answer):
    """What one kind of file takes, as allocated on the disk, and what of it gc would free."""

    kind: str
    count: int
    bytes: int
    gc_bytes: int


class DfSnapshot(Answer):
    """What a snapshot takes: alone, together with others, and as flat files that can be remade."""

    id: str
    name: str | None
    unique_bytes: int
    shared_bytes: int
    flat_bytes: int


class DfAnswer(Answer):
    """What takes the space of a home."""

    rows: list[DfRow]
    snapshots: list[DfSnapshot]
    total_bytes: int
    gc_bytes: int
    free_bytes: int


class DeviceDifference(Answer):
    """What differs between two snapshots of one device; extents are (first page, pages)."""

    name: str
    pages: int
    bytes: int
    zeroed_pages: int
    extent_count: int
    extents: list[tuple[int, int]]


class DiffRequest(Strict):
    """The snapshot to compare with."""

    other: str


class DiffAnswer(Answer):
    """`snapshot diff`: by the headers, without reading a page."""

    old: str
    new: str
    devices: list[DeviceDifference]


class ProgressInfo(Answer):
    """How far a part of an operation is; `total_bytes` is null where nobody knows."""

    what: str
    done_bytes: int
    total_bytes: int | None
    elapsed_ms: float


OperationState = Literal["running", "cancelling", "done", "failed", "cancelled", "recovered"]


class OperationAnswer(Answer):
    """What a client asked for; `recovered`: a daemon died in it and the next one settled it."""

    operation: str
    verb: str
    state: OperationState
    sandbox: str | None  # as it was named, or the one it made
    step: str | None
    began_at: str
    elapsed_ms: float
    progress: ProgressInfo | None = None
    error: dict[str, Any] | None = None


class Stalled(Answer):
    """A guest that waits for a page: the blob that can't be served, and for how long."""

    blob: str
    cause: str
    waited_ms: int


class PagerSandbox(Answer):
    """A sandbox that the pager serves; `stalled` where an access of it waits for a blob."""

    sandbox: str
    pid: int
    files: int
    handed: bool  # it handed in a userfaultfd; else it has files open
    ended: bool
    stalled: Stalled | None = None


class PagerAnswer(Answer):
    """The two processes that serve memory on demand; nothing but `running` where there are none."""

    running: bool
    instance: str | None = None
    pid: int | None = None
    keeper_pid: int | None = None
    replaceable: bool | None = None  # whether guests only wait while a dead pager is replaced
    resident_bytes: int | None = None  # of both, beside the page cache
    files: int | None = None
    sandboxes: list[PagerSandbox] = []


class SandboxRow(Answer):
    """A line of `ps`."""

    sandbox: str
    name: str | None
    state: SandboxState
    image: str
    memory_bytes: int
    cpus: int
    disk_bytes: int
    created_at: str
    snapshot: str | None
    error: dict[str, Any] | None
    stalled: Stalled | None = None  # it runs, and an access waits for a blob


class VmmInfo(Answer):
    """The VMM process of a sandbox."""

    kind: str
    version: str
    pid: int


class Confinement(Answer):
    """What confines the VMM process of a sandbox, as /proc shows it now."""

    uid: int
    namespaces: list[str]  # those that are not the daemon's
    capabilities: str  # hexadecimal digits, or "none"
    no_new_privs: bool
    seccomp: str
    cgroup: str  # the directory; "none": it has no limits of its own
    memory_bytes_max: int | None  # of that cgroup; null: no limit
    tasks_max: int | None  # processes and threads


class SandboxDetail(Answer):
    """`inspect` of a sandbox."""

    id: str
    name: str | None
    state: SandboxState
    image: str
    parent: str | None  # the snapshot it was last started from or captured to
    vmm: VmmInfo | None
    error: dict[str, Any] | None
    reason: str | None  # why it is stopped, when it is
    memory_bytes: int
    cpus: int
    disk_bytes: int
    created_at: str
    accelerator: str | None
    tracker: bool
    hostname: str
    doing: str | None  # the journal's open verb and step
    directory: str
    confinement: Confinement | None = None  # of a VMM that runs
    served: dict[str, Any] | None = None  # what the pager counted; None: memory in plain files
    stalled: Stalled | None = None  # an access of its VMM waits for a blob
    net: str = "none"
    ports: list[PortForward] = []


class DeviceInfo(Answer):
    """One device of a snapshot; `builds` names packed builds only."""

    name: str
    size: int
    pages: int
    stored_bytes: int
    builds: list[str]


class SnapshotDetail(Answer):
    """`inspect` of a snapshot and a line of `snapshot ls`."""

    id: str
    name: str | None
    sandbox: str
    parent: str | None
    state: SnapshotState
    durability: Durability
    pending_bytes: int
    devices: list[DeviceInfo]
    error: dict[str, Any] | None
    created_at: str
    image: str
    memory_bytes: int
    stored_bytes: int
    vmm: dict[str, Any]


class ImageInfo(Answer):
    """An image as `image ls` shows it."""

    name: str
    flavor: str
    created_at: str
    kernel_version: str
    size_bytes: int
    digests: dict[str, str]
    already: bool = False


class ImageFile(Answer):
    """One file of an image."""

    name: str
    size_bytes: int
    digest: str


class ReadySnapshot(Answer):
    """What is kept to start an image from, in one shape."""

    id: str
    memory_bytes: int
    cpus: int
    disks_bytes: list[int]
    stored_bytes: int
    created_at: str


class ImageDetail(Answer):
    """`image inspect`; `sandboxes` and `snapshots` are those that were made from it."""

    name: str
    flavor: str
    created_at: str
    size_bytes: int
    stored_bytes: int
    files: list[ImageFile]
    kernel_version: str
    kernel_package: str
    kernel_package_version: str
    command_line: str
    agent_digest: str
    busybox: str
    network: bool
    sandboxes: list[str]
    snapshots: list[str]
    ready: list[ReadySnapshot]


class RemoveImageAnswer(Answer):
    """`image rm` of one."""

    removed: list[str]


class Check(Answer):
    """One line of `doctor`."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
    required: bool = True


class DoctorAnswer(Answer):
    """What this host can do, proved by trying."""

    checks: list[Check]
    daemon_pid: int
    pager_pid: int | None


BenchGroup = Literal["cycle", "pager"]


class BenchRequest(Strict):
    """What to measure; no group: all of them."""

    groups: list[BenchGroup] = []
    rounds: int = 5


class BenchPeer(Answer):
    """What a figure is compared with: the same unit, taken in the same rounds."""

    name: str
    values: list[float]
    median: float


class BenchRow(Answer):
    """A figure, one value a round; `ratio` is its median over its peer's, where it has one."""

    group: BenchGroup
    name: str
    unit: str  # ms, us, pages, reads, MiB/s
    values: list[float]
    median: float
    peer: BenchPeer | None = None
    ratio: float | None = None  # null also where the peer's median is 0
    notes: list[str] = []


class BenchAnswer(Answer):
    """What this host does, measured on real guests; `notes` say what was not measured, and why."""

    rounds: int
    accelerator: str
    rows: list[BenchRow]
    notes: list[str] = []
