"""QEMU as a driver: what this host's QEMU can be, starting machines and finding them again."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from diapause.driver.base import Shape, StartPlan, VmmIdentity
from diapause.driver.cgroup import LeafLimits, Leaves, lies_on_tmpfs, limits_of
from diapause.driver.grants import asked_for, cgroups, grants
from diapause.driver.launch import LaunchPlan, launch
from diapause.driver.process import find_by_argument, is_alive, process_ref
from diapause.driver.qemu import command
from diapause.driver.qemu.machine import QemuMachine, SocketPaths
from diapause.driver.qemu.network import preloaded, refused_forward, resolvers
from diapause.driver.uids import own_uid
from diapause.errors import (
    ConfinementFailed,
    DiapauseError,
    SnapshotIncompatible,
    VmmFailed,
    VmmMissing,
    VmmTooOld,
    VmmUnusable,
)
from diapause.limits import SUBPROCESS_S, VMM_EXIT_S, VMM_FILE_OVERHEAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diapause.driver.base import ProcessRef
    from diapause.driver.cgroup import Delegation
    from diapause.store.home import Home

VERSION_MIN = (7, 2)
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


@functools.lru_cache(maxsize=8)
def _ask(program: str, stamp: int, *arguments: str) -> str:
    """What the program prints; asked once for each state (`stamp`) of its file.

    Raises VmmUnusable where it prints nothing or fails: that is not kept, and it is asked again.
    """
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=SUBPROCESS_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise VmmUnusable(program=program, cause=str(error)) from error
    if done.returncode or not done.stdout.strip():
        said = done.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        raise VmmUnusable(program=program, cause=f"{said[0][:500]} (status {done.returncode})")
    return done.stdout


class QemuDriver:
    """See `driver.base.Driver`."""

    kind = "qemu"

    def __init__(self, home: Home, preload: Path | None, *, track: bool = True) -> None:
        self._home, self._preload, self._track = home, preload, track
        self.leaves = Leaves(home.key)

    def program(self) -> str:
        """The path of QEMU; refuses a missing one."""
        path = shutil.which(command.PROGRAM)
        if path is None:
            raise VmmMissing(program=command.PROGRAM, package=command.PACKAGE)
        return path

    def ask(self, *arguments: str) -> str:
        """The output of QEMU with these arguments, cached until its file changes."""
        path = self.program()
        return _ask(path, Path(path).stat().st_mtime_ns, *arguments)

    def version(self) -> str:
        """QEMU's version; refuses one that is too old."""
        match = re.search(r"version (\d+)\.(\d+)\.(\d+)", self.ask("--version"))
        if match is None:
            raise VmmUnusable(program=self.program(), cause="it does not say its version")
        if (int(match[1]), int(match[2])) < VERSION_MIN:
            needed = ".".join(map(str, VERSION_MIN))
            raise VmmTooOld(program="QEMU", found=match[0], needed=needed, package=command.PACKAGE)
        return ".".join(match.groups())

    def machines(self) -> list[str]:
        """The versioned q35 machine types that this QEMU knows, newest first; never none."""
        found = re.findall(r"^pc-q35-(\d+)\.(\d+)\s", self.ask("-M", "help"), re.MULTILINE)
        if not found:
            raise VmmUnusable(program=self.program(), cause="it names no q35 machine")
        numbers = sorted(((int(a), int(b)) for a, b in found), reverse=True)
        return [f"pc-q35-{major}.{minor}" for major, minor in numbers]

    def identity(self, accelerator: str) -> VmmIdentity:
        """What a new machine on this host is."""
        return VmmIdentity(
            kind=self.kind,
            version=self.version(),
            machine=self.machines()[0],
            cpu=command.CPU_MODELS[accelerator],
            accelerator=accelerator,
            processor=host_processor() if accelerator == "kvm" else "",
        )

    def check(self, snapshot: str, needed: VmmIdentity, accelerators: tuple[str, ...]) -> None:
        """Refuse, by the name of the part, an identity that this host can't provide."""

        def refuse(part: str, wanted: str, found: str) -> None:
            raise SnapshotIncompatible(snapshot=snapshot, part=part, needed=wanted, found=found)

        if needed.kind != self.kind:
            refuse("VMM", needed.kind, self.kind)
        found = self.version()
        if _numbers(found) < _numbers(needed.version):
            refuse("QEMU version", needed.version, found)
        if needed.machine not in self.machines():
            refuse("machine type", needed.machine, ", ".join(self.machines()[:3]))
        if needed.accelerator not in accelerators:
            refuse("accelerator", needed.accelerator, ", ".join(accelerators))
        if needed.cpu != (known := command.CPU_MODELS[needed.accelerator]):
            refuse("CPU model", needed.cpu, known)
        if needed.processor and needed.processor != (ours := host_processor()):
            refuse("processor", needed.processor, ours)

    def start(self, plan: StartPlan) -> QemuMachine:
        """Spawn the process, confined; its sockets take connections from the first moment on."""
        program = str(Path(self.program()).resolve())
        with asked_for(plan.sandbox):
            level, given = grants().level, cgroups(self._home.key)
        paths = SocketPaths(self._home.sockets, plan.sandbox)
        paths.unlink()
        with contextlib.ExitStack() as stack:
            handed = stack.enter_context(_Handed())
            fds = self._descriptors(plan, handed, paths)
            log = os.open(plan.vmm_log, _APPEND | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, log)
            arguments = command.command_line(plan, fds, self._home.key)
            launched = LaunchPlan(
                name=command.name_argument(self._home.key, plan.sandbox), program=program,
                arguments=arguments, environment=self._environment(plan, fds, handed),
                descriptors=handed.numbers, level=level, network=bool(plan.shape.network),
                hidden=(self._home.root, self._home.sockets, self._home.buffers),
                file_bytes=_file_bytes_max(plan.shape),
                cgroup=stack.enter_context(self._leaf(plan, given)),
            )  # fmt: skip
            uid = stack.enter_context(own_uid(plan.sandbox)) if level.user == "own" else None
            child = launch(plan.sandbox, launched, uid, log)
        try:
            process = process_ref(child.pid)
        except BaseException:  # nobody knows of it yet: it would run for ever
            child.end(VMM_EXIT_S)
            raise
        if process is None:
            child.poll()
            raise _failed_spawn(plan, "it ended at once")
        machine = QemuMachine(plan.sandbox, process, paths, plan.memory, plan.shape)
        machine.child, machine.gone = child, functools.partial(self.leaves.ended, plan.sandbox)
        return self._answering(machine, plan)

    @contextlib.contextmanager
    def _leaf(self, plan: StartPlan, given: Delegation) -> Iterator[int | None]:
        """A cgroup for it, open; None where the host delegates none. Gone if the launch fails."""
        if given.place is None:
            yield None
            return
        self.leaves.remove(plan.sandbox)  # what an earlier VMM of it may have left
        try:
            leaf = self.leaves.make(given, plan.sandbox, self._leaf_limits(plan.shape))
            directory = os.open(leaf.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfinementFailed(
                sandbox=plan.sandbox, stage="cgroup", cause=str(error)
            ) from error
        try:
            yield directory
        except BaseException:
            leaf.remove()
            raise
        finally:
            os.close(directory)

    def _leaf_limits(self, shape: Shape) -> LeafLimits:
        return limits_of(shape, on_tmpfs=lies_on_tmpfs(self._home.root))

    def _descriptors(
        self, plan: StartPlan, handed: _Handed, paths: SocketPaths
    ) -> command.Descriptors:
        boot, kvm = plan.boot, plan.identity.accelerator == "kvm"
        return command.Descriptors(
            memory=handed.file(plan.memory, os.O_RDONLY),
            commands=handed.listener(paths.commands),
            events=handed.listener(paths.events),
            agent=handed.listener(paths.agent),
            console_port=handed.listener(paths.console),
            console=handed.file(plan.console_log, _APPEND),
            disks=tuple(
                (handed.file(disk.base, os.O_RDONLY), handed.file(disk.overlay, os.O_RDWR))
                for disk in plan.disks
            ),
            boot=None if boot is None else (
                handed.file(boot.kernel, os.O_RDONLY), handed.file(boot.initrd, os.O_RDONLY),
            ),
            kvm=handed.file(Path("/dev/kvm"), os.O_RDWR) if kvm else None,
        )  # fmt: skip

    def _answering(self, machine: QemuMachine, plan: StartPlan) -> QemuMachine:
        try:
            machine.status()
        except VmmFailed as error:
            machine.kill()
            raise _failed_spawn(plan, str(error.fields.get("cause"))) from error
        except Exception:
            machine.kill()
            raise
        return machine

    def _environment(
        self, plan: StartPlan, fds: command.Descriptors, handed: _Handed
    ) -> dict[str, str]:
        environment = {
            "PATH": "/usr/bin:/bin",
            "LC_ALL": "C",
            "DIAPAUSE_HOME": str(self._home.root),  # for whoever finds the process
        }
        if self._preload is not None:
            library = handed.file(self._preload, os.O_RDONLY)
            environment["LD_PRELOAD"] = f"/proc/self/fd/{library}"
            environment["DIAPAUSE_MEMORY_PATH"] = command.memory_path(fds)
            environment["DIAPAUSE_MEMORY_FD"] = str(fds.memory)
            environment["DIAPAUSE_TRACK"] = "on" if self._track else "off"
            if fds.kvm is not None:
                environment["DIAPAUSE_KVM_FD"] = str(fds.kvm)
        if plan.shape.network:  # barred from the host's loopback, whatever else is switched off
            preloaded(plan.sandbox)
            environment["DIAPAUSE_NET_RESOLVERS"] = ",".join(resolvers())
        return environment

    def adopt(
        self, sandbox: str, process: ProcessRef, memory: Path, shape: Shape
    ) -> QemuMachine | None:
        """Take up a machine that an earlier daemon started; None where it is gone."""
        if not is_alive(process):
            return None
        paths = SocketPaths(self._home.sockets, sandbox)
        machine = QemuMachine(sandbox, process, paths, memory, shape)
        self.leaves.adopt(sandbox, process.pid, self._leaf_limits(shape))
        machine.gone = functools.partial(self.leaves.ended, sandbox)
        return machine

    def find(self, sandbox: str) -> ProcessRef | None:
        """The machine of this sandbox that runs on this host, recorded or not."""
        found = find_by_argument(command.name_argument(self._home.key, sandbox))
        return found[0] if found else None

    def all_processes(self) -> list[ProcessRef]:
        """Every machine of this home that runs on this host."""
        return find_by_argument(command.name_start(self._home.key))


class _Handed:
    """Descriptors that a child inherits; ours are closed when it has them."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __enter__(self) -> _Handed:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.numbers:
            os.close(fd)

    def file(self, path: Path, flags: int) -> int:
        """Open a file for the child."""
        self.numbers.append(_open(path, flags))
        return self.numbers[-1]

    def listener(self, path: Path) -> int:
        """Bind a socket for the child: clients may connect before it is up."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        listener.bind(str(path))
        listener.listen(2)
        path.chmod(0o600)
        self.numbers.append(listener.detach())
        return self.numbers[-1]


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _failed_spawn(plan: StartPlan, otherwise: str) -> DiapauseError:
    """What QEMU said last, or `otherwise`."""
    cause = _last_line(plan.vmm_log) or otherwise
    failed = VmmFailed(sandbox=plan.sandbox, step="spawn", cause=cause)
    return refused_forward(cause) or failed


def _file_bytes_max(shape: Shape) -> int:
    """No file that a VMM writes is larger: an overlay holds its disk, its tables, and no more."""
    largest = max(shape.disks_bytes, default=0)
    return largest + largest // 8 + VMM_FILE_OVERHEAD_BYTES


def host_processor() -> str:
    """The name of this host's processor: what a guest under `-cpu host` sees."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1][:500] if lines else ""
