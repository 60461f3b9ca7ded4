"""The peers: stock QEMU driven by hand, without anything of ours around it.

The machine is the same (same options, same memory file, same overlay and device state); what is
measured is QEMU's own migrate-to-file, `savevm`, and the bare minimum of a capture: `stop`, the
device state, one single-threaded `process_vm_readv` of the same pages into touched memory.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diapause._core import GuestRam
from diapause.driver.base import DiskFiles, Shape, StartPlan, VmmIdentity
from diapause.driver.qemu.driver import QemuDriver
from diapause.sandbox.host import tracker_path
from diapause.store.templates import Templates

if TYPE_CHECKING:
    from benchmarks.guest import Bench
    from diapause.driver.qemu.machine import QemuMachine

IOV_MAX = 1024
# QEMU's default for a migration, and as good as none.
BANDWIDTH_DEFAULT, BANDWIDTH_UNLIMITED = 128 << 20, 1 << 40
PAGE = 4096


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class ByHand:
    """One QEMU, loaded from a snapshot's flat files by hand."""

    def __init__(self, bench: Bench, snapshot: str, scratch: Path) -> None:
        detail = bench.client.inspect_snapshot(snapshot)
        sizes = {device.name: device.size for device in detail.devices}
        overlay = scratch / "disk0.0000001.qcow2"
        overlay.unlink(missing_ok=True)
        Templates(bench.home).overlay(sizes["disk0"], overlay)
        vmm = {key: detail.vmm[key] for key in ("kind", "version", "machine", "cpu", "accelerator")}
        self.plan = StartPlan(
            sandbox="byhand", identity=VmmIdentity(**vmm),
            shape=Shape(sizes["memory"], 1, (sizes["disk0"],)),
            memory=bench.flat(snapshot, "memory"),
            disks=(DiskFiles(bench.flat(snapshot, "disk0"), overlay),),
            console_log=scratch / "console.log", vmm_log=scratch / "vmm.log", boot=None,
        )  # fmt: skip
        self._driver = QemuDriver(bench.home, tracker_path())
        self._state = bench.home.snapshot(snapshot) / "device-state"
        self._scratch = scratch
        self.machine: QemuMachine
        self.overlay = overlay

    def start(self) -> float:
        """Spawn, load the state, run, first answer of the agent's port; milliseconds."""
        began = time.perf_counter()
        self.machine = self._driver.start(self.plan)
        with self._state.open("rb") as state:
            self.machine.load_state(state.fileno())
        self.machine.thaw()
        connection = self.machine.agent_socket(10.0)
        _greet(connection)
        took = (time.perf_counter() - began) * 1e3
        connection.close()
        return took

    def stop(self) -> None:
        """End it."""
        self.machine.kill()

    def ram(self) -> GuestRam:
        """Its guest RAM."""
        return self.machine.ram

    def migrate_to_file(self, max_bandwidth: int) -> float:
        """Stop, migrate to a file, until it has completed: how long the guest is frozen, ms."""
        target = self._scratch / "migrated"
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            self.machine.checked("migrate-set-parameters", max_bandwidth=max_bandwidth)
            self.machine.checked("getfd", fd=fd, fdname="out")
            began = time.perf_counter()
            self.machine.checked("stop")
            self.machine.checked("migrate", uri="fd:out")
            while (found := self.machine.checked("query-migrate")["status"]) != "completed":
                assert found not in ("failed", "cancelled"), found
                time.sleep(0.001)
            took = (time.perf_counter() - began) * 1e3
            # "completed" is said a moment before the machine may go on.
            while self.machine.checked("query-status")["status"] == "finish-migrate":
                time.sleep(0.001)
        finally:
            os.close(fd)
        target.unlink()
        self.machine.thaw()
        return took

    def savevm(self) -> float:
        """QEMU's internal snapshot; the guest is frozen for all of it. Milliseconds."""
        began = time.perf_counter()
        said = self.machine.checked("human-monitor-command", command_line="savevm peer")
        took = (time.perf_counter() - began) * 1e3
        assert "rror" not in said, said
        self.machine.checked("human-monitor-command", command_line="delvm peer")
        return took

    def bare_capture(self, buffer: Any) -> tuple[float, int]:
        """stop + device state + one process_vm_readv of the dirty pages; milliseconds, pages."""
        state = _on_tmpfs("bare-state")
        fd = os.open(state, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self.machine.checked("add-fd", fd=fd, fdset_id=77)
        began = time.perf_counter()
        self.machine.checked("stop")
        self.machine.checked("query-status")
        self.machine.checked("xen-save-devices-state", filename="/dev/fdset/77", live=False)
        stopped = (time.perf_counter() - began) * 1e3
        runs = self.machine.ram.dirty_runs("tracked")
        start = _ram_start(self.machine.process.pid, self.plan.memory)
        read, pages = _read_runs(self.machine.process.pid, start, runs, buffer)
        self.machine.ram.rearm()
        self.machine.thaw()
        self.machine.checked("remove-fd", fdset_id=77)
        os.close(fd)
        state.unlink()
        return stopped + read, pages


def touched_buffer(size_bytes: int) -> Any:
    """Memory that is there already."""
    buffer = ctypes.create_string_buffer(size_bytes)
    ctypes.memset(buffer, 1, size_bytes)
    return buffer


def _on_tmpfs(name: str) -> Path:
    return Path("/dev/shm") / f"diapause-bench-{os.getpid()}-{name}"


def _ram_start(pid: int, memory: Path) -> int:
    inode = str(memory.stat().st_ino)
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split()
        if len(fields) > 5 and fields[4] == inode:
            return int(fields[0].split("-")[0], 16)
    raise LookupError(memory)


def _read_runs(pid: int, start: int, runs: list[tuple[int, int]], buffer: Any) -> tuple[float, int]:
    """One thread, the calls alone; milliseconds, pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = sum(count for _, count in runs)
    assert pages * PAGE <= len(buffer), pages
    calls = []
    offset = ctypes.addressof(buffer)
    for at in range(0, len(runs), IOV_MAX):
        batch = runs[at : at + IOV_MAX]
        remote = (_IoVec * len(batch))(*[_IoVec(start + f * PAGE, c * PAGE) for f, c in batch])
        size = sum(c for _, c in batch) * PAGE
        calls.append((_IoVec(offset, size), remote, len(batch), size))
        offset += size
    began = time.perf_counter()
    for local, remote, count, size in calls:
        got = libc.process_vm_readv(pid, ctypes.byref(local), 1, remote, count, 0)
        assert got == size, (got, size)
    return (time.perf_counter() - began) * 1e3, pages


def _greet(connection: socket.socket) -> None:
    """The exchange that any host has with the agent, done by hand."""
    import asyncio

    from diapause.guest.link import Link

    async def greet() -> None:
        link = Link("byhand")
        await link.attach(connection, identity=None, bound_s=60.0)
        await link.detach()

    asyncio.run(greet())


def scratch_of(bench: Bench) -> Path:
    """A place for a peer's files."""
    place = bench.root / "peer"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return place
