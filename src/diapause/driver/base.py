"""What the engine asks of a driver, in words that fit every VMM.

A driver starts machines and finds them again; a machine is one VMM process with one guest. Nothing
here knows about the catalog: what must outlive the daemon is in `ProcessRef` and in file names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import socket

    from diapause._core import CaptureBuffer

Status = Literal["running", "paused", "loading", "shutdown", "panicked", "other"]


@dataclass(frozen=True)
class VmmIdentity:
    """What a snapshot's device state depends on; all of it must match at a resume."""

    kind: str
    version: str
    machine: str
    cpu: str
    accelerator: str
    processor: str = ""  # the host's own, where the guest sees it (`-cpu host`)


@dataclass(frozen=True)
class Shape:
    """The size of a machine: fixed for the life of its snapshots."""

    memory_bytes: int
    cpus: int
    disks_bytes: tuple[int, ...]
    network: bool = False


@dataclass(frozen=True)
class Forward:
    """A port of the host's loopback, 127.0.0.1, that leads to a port of the guest; TCP."""

    host: int
    guest: int


@dataclass(frozen=True)
class DiskFiles:
    """A running disk: a read-only raw base and the overlay that takes the writes."""

    base: Path
    overlay: Path


@dataclass(frozen=True)
class BootFiles:
    """What a cold start needs besides its disks."""

    kernel: Path
    initrd: Path
    command_line: str


@dataclass(frozen=True)
class StartPlan:
    """Everything one VMM process is started with."""

    sandbox: str
    identity: VmmIdentity
    shape: Shape
    memory: Path
    disks: tuple[DiskFiles, ...]
    console_log: Path
    vmm_log: Path
    boot: BootFiles | None  # None: the machine waits for a device state
    forwards: tuple[Forward, ...] = ()


@dataclass(frozen=True)
class ProcessRef:
    """A process that is the same one after any restart of ours, or is gone."""

    pid: int
    start_ticks: int
    boot_id: str


@dataclass(frozen=True)
class FreezePlan:
    """One frozen section: what to capture, prepared so that nothing is allocated inside it."""

    state: Path  # an empty file on tmpfs for the device state
    buffer: CaptureBuffer
    rule: Literal["private", "tracked", "compared"]
    unmerged: list[tuple[int, int]]  # runs of an earlier capture that failed after it re-armed
    spill: Path
    overlays: tuple[Path, ...]  # what the disks wrote since the last capture: synced first
    next_overlays: tuple[Path, ...]  # empty for a pause: its disks stay as they are
    goes_on: bool
    stands: bool = False  # it stood before, and stands afterwards whatever happens


@dataclass
class Frozen:
    """What a frozen section brought; times in milliseconds."""

    frozen_ms: float = 0.0
    phases_ms: dict[str, float] = field(default_factory=dict)
    page_count: int = 0
    spilled_pages: int = 0
    switched: bool = False
    rearmed: bool = False


class Machine(Protocol):
    """One VMM process. Every call is bounded; `VmmTimeout` names what was waited for."""

    process: ProcessRef
    tracked: bool

    def load_state(self, state: int) -> None:
        """Load a device state (an open file) into a machine that waits for one; it stands then."""

    def thaw(self) -> None:
        """Let the vCPUs run."""

    def stop(self) -> None:
        """Stop the vCPUs, confirmed."""

    def status(self) -> Status:
        """What the VMM says of itself."""

    def freeze_and_capture(self, plan: FreezePlan) -> Frozen:
        """The frozen section; on any failure the guest goes on and the error says so."""

    def dirty_estimate(self, rule: Literal["private", "tracked", "compared"]) -> int:
        """Pages that would be captured now, asked while the guest runs; nothing is re-armed."""

    def agent_socket(self, bound_s: float) -> socket.socket:
        """A new connection to the agent's port."""

    def kill(self, bound_s: float) -> None:
        """SIGKILL, and wait until the process is gone."""

    def alive(self) -> bool:
        """Whether the process still is."""

    def close(self) -> None:
        """Let go of our ends; the process goes on."""


class Driver(Protocol):
    """One kind of VMM."""

    kind: str

    def identity(self, accelerator: str) -> VmmIdentity:
        """What a new machine on this host is; refuses a VMM that is missing or too old."""

    def check(self, snapshot: str, needed: VmmIdentity, accelerators: tuple[str, ...]) -> None:
        """Refuse, by the name of the part, an identity that this host can't provide."""

    def start(self, plan: StartPlan) -> Machine:
        """Spawn the process and answer once it takes commands."""

    def adopt(
        self, sandbox: str, process: ProcessRef, memory: Path, shape: Shape
    ) -> Machine | None:
        """Take up a machine that an earlier daemon started; None where it is gone."""

    def find(self, sandbox: str) -> ProcessRef | None:
        """The machine of this sandbox that runs on this host, recorded or not."""

    def all_processes(self) -> list[ProcessRef]:
        """Every machine of this home that runs on this host."""
