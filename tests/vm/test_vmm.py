"""The VMM as it is: what it may do, what it was given, and that a guest's fsync is one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from diapause.driver.qemu.machine import SocketPaths
from diapause.driver.qemu.qmp import Qmp
from tests.framework.sandbox import Daemon, Sandbox

pytestmark = pytest.mark.vm


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def arguments_of(pid: int) -> list[str]:
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]


def test_the_vmm_is_under_seccomp_and_has_no_network(guest: Sandbox) -> None:
    """Filters are on, and no network device is there."""
    status = status_of(guest.vmm_pid)
    assert status["Seccomp"] == "2"
    arguments = arguments_of(guest.vmm_pid)
    assert "spawn=deny" in arguments[arguments.index("-sandbox") + 1]
    assert not [word for word in arguments if "netdev" in word or "virtio-net" in word]
    assert guest.sh("ls /sys/class/net").split() in (["lo"], [])


def test_the_vmm_gets_its_files_by_descriptor(daemon: Daemon, guest: Sandbox) -> None:
    """A resumed VMM has no path of the home on its command line, and its memory is read-only."""
    arguments = arguments_of(guest.vmm_pid)
    assert not [word for word in arguments if str(daemon.home.root) in word]
    memory = daemon.handed(guest.id, "memory")
    descriptors = Path(f"/proc/{guest.vmm_pid}/fd")
    held = [fd for fd in descriptors.iterdir() if fd.readlink() == memory]
    assert held, "the memory file is not open"
    for fd in held:
        flags = (descriptors.parent / "fdinfo" / fd.name).read_text()
        mode = int(next(line.split()[1] for line in flags.splitlines() if "flags" in line), 8)
        assert mode & 3 == 0, "the memory file is open for writing"


def test_the_machine_is_versioned(guest: Sandbox) -> None:
    """A device state may outlive an upgrade of QEMU."""
    arguments = arguments_of(guest.vmm_pid)
    machine = arguments[arguments.index("-M") + 1].split(",")[0]
    assert machine.startswith("pc-q35-")


def test_sockets_are_closed_to_others(daemon: Daemon, guest: Sandbox) -> None:
    """0600, in a directory of 0700."""
    paths = SocketPaths(daemon.home.sockets, guest.id).all()
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o600] * 4
    assert daemon.home.sockets.stat().st_mode & 0o777 == 0o700


def test_a_guests_fsync_reaches_the_hosts_disk(guest: Sandbox) -> None:
    """QEMU calls fdatasync on the overlay for it: seen from outside."""
    traced = subprocess.Popen(
        ["strace", "-f", "-y", "-e", "trace=fdatasync,fsync", "-p", str(guest.vmm_pid)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert traced.stderr is not None
        assert "attached" in traced.stderr.readline()
        guest.sh("echo durable >/data/file; sync /data/file; sync")
    finally:
        traced.terminate()
        said = traced.communicate(timeout=60)[1]
    synced = [line for line in said.splitlines() if "fdatasync(" in line and "disk0." in line]
    assert synced, said


def test_flushes_are_not_ignored(guest: Sandbox) -> None:
    """The disk is write-back with flushes, never `no-flush`: asked of the VMM's second monitor."""
    guest.daemon.stop()  # the monitors take one client
    qmp = Qmp(guest.id, SocketPaths(guest.daemon.home.sockets, guest.id).commands)
    try:
        [disk] = [d for d in qmp.call("query-block") if d.get("inserted")]
    finally:
        qmp.close()
    assert disk["inserted"]["cache"] == {"no-flush": False, "direct": False, "writeback": True}
    assert guest.sh("echo adopted").strip() == "adopted"
