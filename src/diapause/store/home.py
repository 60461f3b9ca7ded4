"""Where everything of one home lies: the only module that knows a path inside it.

HOME/                     0700
  catalog.sqlite3         rows and the journal
  reserve                 a few MiB for verbs that free space on a full disk
  serve.lock serve.log    one daemon a home; the lock is its flock
  pager.log               what the pager and its keeper have to say
  images/NAME/            manifest.json kernel initrd, read-only once built
  builds/ID               packed pages, named by their digest
  snapshots/ID/           manifest.json, device-state, one DEVICE.header each
  captures/ID/            pages of a snapshot that is not packed yet; gone afterwards
  flat/ID/                a snapshot's devices as plain sparse files, until a pager exists
  served/                 what the pager reads of snapshots that are not packed yet
  traces/                 what guests touched first after a resume: hints for the next one
  sandboxes/ID/           console.log vmm.log, running overlays, capture marks
  templates/              empty overlays, empty memory files: made once, then only read
  tmp/                    whatever is being written; renamed into place when whole
SOCKETS/                  HOME/run, or a short directory where that path is too long
BUFFERS/                  on tmpfs: capture buffers, which outlive the daemon and not the host
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

# The kernel's limit on a unix socket path is 108 bytes with its NUL; the longest name is ours.
SOCKET_PATH_MAX = 107
SOCKET_NAME_MAX = len("/run/") + 32 + len(".events")
# What the name of a scratch home begins with: one under tmp/, of which nothing stays.
SCRATCH_START = "scratch-"


def default_home() -> Path:
    """``$DIAPAUSE_HOME``, else the system's place as root, else the user's data directory."""
    if value := os.environ.get("DIAPAUSE_HOME"):
        return Path(value)
    if os.geteuid() == 0:
        return Path("/var/lib/diapause")
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local/share")
    return Path(data) / "diapause"


@dataclass(frozen=True)
class Home:
    """One home directory and the two short-lived directories that belong to it."""

    root: Path

    @classmethod
    def at(cls, path: Path | str | None = None) -> Home:
        """The home at `path` (the default home without one); nothing is created."""
        return cls(Path(path if path is not None else default_home()).expanduser().absolute())

    def create(self) -> Home:
        """Make the directories that are missing, closed to everybody else."""
        for directory in (
            self.root, self.images, self.builds, self.snapshots, self.captures, self.flat,
            self.sandboxes, self.templates, self.tmp, self.sockets, self.buffers,
        ):  # fmt: skip
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self

    @property
    def key(self) -> str:
        """A short name for this home, for directories outside it."""
        return hashlib.blake2b(os.fsencode(self.root), digest_size=6).hexdigest()

    @property
    def catalog(self) -> Path:
        return self.root / "catalog.sqlite3"

    @property
    def reserve(self) -> Path:
        return self.root / "reserve"

    @property
    def serve_lock(self) -> Path:
        return self.root / "serve.lock"

    @property
    def serve_log(self) -> Path:
        return self.root / "serve.log"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def builds(self) -> Path:
        return self.root / "builds"

    @property
    def snapshots(self) -> Path:
        return self.root / "snapshots"

    @property
    def captures(self) -> Path:
        return self.root / "captures"

    @property
    def flat(self) -> Path:
        return self.root / "flat"

    @property
    def served(self) -> Path:
        return self.root / "served"

    @property
    def traces(self) -> Path:
        return self.root / "traces"

    @property
    def sandboxes(self) -> Path:
        return self.root / "sandboxes"

    @property
    def templates(self) -> Path:
        return self.root / "templates"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def sockets(self) -> Path:
        """HOME/run where its socket paths fit the kernel's limit, else a short directory."""
        if len(os.fsencode(self.root)) + SOCKET_NAME_MAX <= SOCKET_PATH_MAX:
            return self.root / "run"
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        base = Path(runtime) if runtime and len(runtime) < 32 else Path("/tmp")
        return base / f"diapause-{os.geteuid()}-{self.key}"

    @property
    def serve_socket(self) -> Path:
        return self.sockets / "serve.sock"

    @property
    def pager_socket(self) -> Path:
        return self.sockets / "pager.sock"

    @property
    def pager_connection(self) -> Path:
        """Which FUSE connection the pager has, and in which boot."""
        return self.sockets / "pager.fuse"

    @property
    def pager_log(self) -> Path:
        return self.root / "pager.log"

    @property
    def buffers(self) -> Path:
        """On tmpfs where there is one; elsewhere a buffer is an ordinary file of the home."""
        shm = Path("/dev/shm")
        if os.access(shm, os.W_OK):
            return shm / f"diapause-{os.geteuid()}-{self.key}"
        return self.root / "buffers"

    def image(self, name: str) -> Path:
        return self.images / name

    def sandbox(self, sandbox_id: str) -> Path:
        return self.sandboxes / sandbox_id

    def snapshot(self, snapshot_id: str) -> Path:
        return self.snapshots / snapshot_id

    def capture(self, snapshot_id: str) -> Path:
        return self.captures / snapshot_id

    def flat_of(self, snapshot_id: str) -> Path:
        return self.flat / snapshot_id

    def free_bytes(self) -> int:
        """What the file system of the home has left for us."""
        return shutil.disk_usage(self.root).free
