"""What a VMM can reach, read from /proc of one that runs: not what we meant to set."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from diapause.driver.uids import UID_COUNT, UID_FIRST
from tests.framework.sandbox import Daemon, Sandbox

pytestmark = pytest.mark.vm

# Says each path that it can open, and each process that it can signal.
_TRY = """
for path in "$@"; do
  case $path in
    [0-9]*) kill -0 "$path" && echo "$path" ;;
    *) if head -c 0 "$path" || [ -w "$path" ]; then echo "$path"; fi ;;
  esac
done 2>/dev/null
true
"""
_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def mounts_of(pid: int) -> dict[str, set[str]]:
    """Where something is mounted in the VMM's root, and how."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return {line.split()[4]: set(line.split()[5].split(",")) for line in lines}


def root_of(pid: int) -> Path:
    """The root that the VMM sees."""
    return Path(f"/proc/{pid}/root")


def test_it_has_a_user_of_its_own(guest: Sandbox) -> None:
    """Out of our range, in all four places, with no group besides; no two share one."""
    with guest.forked() as other:
        uids = set()
        for pid in (guest.vmm_pid, other.vmm_pid):
            status = status_of(pid)
            [uid] = set(status["Uid"].split())
            assert set(status["Gid"].split()) == {uid}
            assert status["Groups"] == ""
            assert UID_FIRST <= int(uid) < UID_FIRST + UID_COUNT
            uids.add(uid)
    assert len(uids) == 2


def test_it_has_no_right(guest: Sandbox) -> None:
    """No capability in any set, none to be had, and system calls are filtered, in every thread."""
    tasks = list(Path(f"/proc/{guest.vmm_pid}/task").iterdir())
    assert len(tasks) > 1
    for task in tasks:
        status = status_of(int(task.name))
        assert [int(status[name], 16) for name in _SETS] == [0] * 5
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"


def test_it_has_namespaces_of_its_own(guest: Sandbox) -> None:
    """None of ours, and none of another guest's."""
    with guest.forked() as other:
        pids = [os.getpid(), guest.vmm_pid, other.vmm_pid]
        for name in ("mnt", "pid", "ipc", "uts", "net"):
            found = {Path(f"/proc/{pid}/ns/{name}").readlink() for pid in pids}
            assert len(found) == len(pids), name
    assert status_of(guest.vmm_pid)["NSpid"].split()[-1] == "1"


def test_it_sees_nothing_of_ours_and_can_write_nowhere(daemon: Daemon, guest: Sandbox) -> None:
    """Every mount is read-only and without setuid programs; no directory of ours is there."""
    mounts = mounts_of(guest.vmm_pid)
    assert {"/", "/usr", "/proc"} <= mounts.keys()
    for place, options in mounts.items():
        assert {"ro", "nosuid"} <= options, (place, options)
        assert "nodev" in options or place.startswith("/dev/")
    root = root_of(guest.vmm_pid)
    for ours in (daemon.home.root, daemon.home.sockets, daemon.home.buffers):
        assert not (root / str(ours)[1:]).exists()
    seen = {path.name for path in root.iterdir()}
    assert seen <= {"usr", "lib", "lib64", "etc", "dev", "proc"}
    assert {path.name for path in (root / "dev").iterdir()} <= {"null", "zero", "urandom"}


def test_it_holds_what_it_was_handed_and_nothing_else(daemon: Daemon, guest: Sandbox) -> None:
    """Each open file of the home is one of its own, by name; nothing else of the host is open."""
    home = daemon.home
    directory = home.sandbox(guest.id)
    overlays = {directory / name for [name] in daemon.record(guest.id).overlays}
    known = {directory / "console.log", directory / "vmm.log"}
    known |= {daemon.handed(guest.id, device) for device in ("memory", "disk0")}
    held = set()
    for fd in Path(f"/proc/{guest.vmm_pid}/fd").iterdir():
        target = str(fd.readlink())
        if target.startswith("/"):
            held.add(Path(target))
        else:
            assert target.split(":")[0] in ("socket", "anon_inode"), target
    assert held - {Path("/dev/null")} - _libraries(held) == known | overlays


def opened_by(uid: int, tried: list[str], within: tuple[str, ...] = ()) -> list[str]:
    """What of this a program of that user can open or signal; `within` enters its place."""
    poor = ("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--clear-groups")
    command = [*within, "setpriv", "--reuid", str(uid), "--regid", str(uid), *poor]
    done = subprocess.run(
        [*command, "sh", "-c", _TRY, "sh", *tried], capture_output=True, text=True, timeout=60,
        cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def everything_of(daemon: Daemon) -> list[str]:
    """Every file and directory of a home."""
    home = daemon.home
    tops = {home.root, home.sockets, home.buffers}
    return [str(path) for top in tops for path in [top, *top.rglob("*")] if not path.is_symlink()]


def test_its_user_opens_nothing_of_ours(daemon: Daemon, guest: Sandbox) -> None:
    """Neither in its namespaces nor in the host's: no file of the home, no other process."""
    with guest.forked() as other:
        uid = int(status_of(guest.vmm_pid)["Uid"].split()[0])
        ours, other_pid = everything_of(daemon), str(other.vmm_pid)
        others = [path for path in ours if other.id in path]
        assert any(path.endswith(".qcow2") for path in others)
        assert any(path.endswith(".agent") for path in others)
        tried = [*ours, other_pid, str(daemon.pid), "/usr/bin/env"]
        assert opened_by(uid, tried) == ["/usr/bin/env"]
        inside = ("nsenter", "--target", str(guest.vmm_pid), "--mount", "--pid", "--ipc", "--net")
        assert opened_by(uid, tried, inside) == ["/usr/bin/env"]
        # The same program finds them all where nothing keeps it from them.
        files = [path for path in ours if Path(path).is_file()]
        assert opened_by(0, files) == files
        other_uid = int(status_of(other.vmm_pid)["Uid"].split()[0])
        assert opened_by(other_uid, [other_pid]) == [other_pid]


def test_its_network_is_empty(guest: Sandbox) -> None:
    """The loopback alone, and that is down."""
    lines = Path(f"/proc/{guest.vmm_pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in lines] == ["lo"]
    assert Path(f"/proc/{guest.vmm_pid}/net/route").read_text().splitlines()[1:] == []


def test_its_limits(guest: Sandbox) -> None:
    """No core dump of a guest's memory, bounded files, descriptors and threads; first to go."""
    limits = Path(f"/proc/{guest.vmm_pid}/limits").read_text()
    of = {line[:26].strip(): line[26:].split() for line in limits.splitlines()[1:]}
    assert of["Max core file size"][:2] == ["0", "0"]
    assert of["Max file size"][0] == of["Max file size"][1] != "unlimited"
    assert int(of["Max open files"][1]) <= 1024
    assert of["Max processes"][:2] == ["512", "512"]
    assert Path(f"/proc/{guest.vmm_pid}/oom_score_adj").read_text().strip() == "300"
    assert status_of(guest.vmm_pid)["Umask"] == "0077"


def test_a_boot_is_confined_as_well(booted: Sandbox) -> None:
    """Kernel and initial file system come by descriptor: no path of the home is on its line."""
    arguments = Path(f"/proc/{booted.vmm_pid}/cmdline").read_text().split("\0")
    assert arguments[arguments.index("-kernel") + 1].startswith("/proc/self/fd/")
    assert not [word for word in arguments if str(booted.daemon.home.root) in word]
    assert int(status_of(booted.vmm_pid)["Uid"].split()[0]) >= UID_FIRST


def test_inspect_says_what_the_kernel_says(guest: Sandbox) -> None:
    """Read from the process, so it goes with it."""
    found = guest.inspect().confinement
    assert found is not None
    assert found.uid == int(status_of(guest.vmm_pid)["Uid"].split()[0])
    assert set(found.namespaces) >= {"mount", "pid", "ipc", "uts", "net"}
    assert (found.capabilities, found.no_new_privs, found.seccomp) == ("none", True, "filter")
    assert found.cgroup == "none"
    guest.pause()
    assert guest.inspect().confinement is None


def test_doctor_says_it_of_a_guest_that_it_started(daemon: Daemon) -> None:
    """One line for each part; what is missing says what that costs."""
    checks = {check.name: check for check in daemon.client.doctor().checks}
    for name in ("vmm user", "vmm namespaces", "vmm rights", "yama"):
        assert checks[name].ok, checks[name]
    assert "uid" in checks["vmm user"].detail or "user" in checks["vmm user"].detail
    assert not checks["vmm cgroup"].ok
    assert checks["vmm cgroup"].fix
    assert not any(check.required for name, check in checks.items() if name.startswith("vmm "))


def _libraries(held: set[Path]) -> set[Path]:
    """The preloaded library: a file that nobody but its owner can write."""
    found = {path for path in held if path.name == "libdiapause_tracker.so"}
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o022 == 0 for path in found)
    return found
