"""What a running daemon asks of the file system, call by call, as `strace` saw it.

strace is an existing recorder that every Debian has, and it sees each write with its bytes: the
daemon that is recorded is the real one, without a line of it changed. Calls appear in the order in
which they ended. Strings and paths are printed in hexadecimal (`-xx`), so nothing has to be guessed
about quoting.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.framework.fake_home import eventually

# What changes a file, a name or a place in a file, what makes it durable, and what is said to the
# VMM (a capture's instant) and to the client (the promise).
CALLS = (
    "open,openat,creat,close,lseek,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,"
    "fallocate,copy_file_range,sendfile,ioctl,fsync,fdatasync,sync_file_range,syncfs,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,"
    "sendto,sendmsg,"
    "clone,clone3,fork,vfork,execve"  # which process it was
)
_FORKS = ("clone", "clone3", "fork", "vfork")
_MAKE = (*_FORKS, "execve")
_LAUNCHER = b"diapause-launch"  # what every VMM begins with
_DATA_BYTES_MAX = 1 << 24
_ATTACH_S = 60.0
_END_S = 10.0
_LINE = re.compile(rb"^(\d+) +(.*)$")
_RESUMED = re.compile(rb"^<\.\.\. (\w+) resumed>(.*)$")
_CALL = re.compile(rb"^(\w+)\((.*)\) += (-?\d+|\?)(.*)$", re.DOTALL)
_TEXT = re.compile(rb'^"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?$')
_PLACE = re.compile(rb"^(-?\d+|AT_FDCWD)<((?:\\x[0-9a-f]{2})*)>(\(deleted\))?$")


@dataclass(frozen=True)
class Call:
    """One call that succeeded: its name, its arguments as printed, its result."""

    name: str
    arguments: tuple[bytes, ...]
    result: int
    result_path: str | None  # of a call that opened something
    process: int = 0  # 0: the one that was recorded; others are its children

    def place(self, index: int) -> tuple[int | None, str]:
        """A descriptor argument: its number (None for the working directory) and its path."""
        number, path = _place(self.arguments[index])
        return number, path

    def text(self, index: int) -> bytes:
        """A string argument, whole."""
        found = _TEXT.match(self.arguments[index].strip())
        assert found is not None, self.arguments[index][:200]
        assert found[2] is None, "the recorder cut a string"
        return _unhex(found[1])

    def number(self, index: int) -> int:
        """A numeric argument."""
        return int(self.arguments[index])


@contextlib.contextmanager
def recorded(pid: int) -> Iterator[list[Call]]:
    """Record a process with all its threads while the block runs; the list is filled at its end."""
    calls: list[Call] = []
    with tempfile.NamedTemporaryFile(prefix="dia-strace-") as out:
        with _attached(pid, Path(out.name), []) as threads:
            yield calls
        calls += parse(Path(out.name).read_bytes(), threads)


@contextlib.contextmanager
def failing(pid: int, call: str, error: str, when: int) -> Iterator[Path]:
    """Let a call fail with an error once, at its `when`th time (from 1) in the block; the log."""
    with tempfile.NamedTemporaryFile(prefix="dia-strace-") as out:
        inject = ["-e", f"inject={call}:error={error}:when={when}"]
        with _attached(pid, Path(out.name), inject, call):
            yield Path(out.name)


@contextlib.contextmanager
def _attached(pid: int, out: Path, more: list[str], calls: str = CALLS) -> Iterator[set[int]]:
    """Hold a process by the recorder while the block runs; the threads that it had then."""
    command = ["strace", "-f", "-y", "-xx", "-s", str(_DATA_BYTES_MAX), "-o", str(out)]
    tracer = subprocess.Popen(
        [*command, "-e", f"trace={calls}", *more, "-p", str(pid)], stderr=subprocess.PIPE
    )
    try:
        eventually("the recorder's hold", lambda: _all_traced(pid, tracer.pid), _ATTACH_S)
        yield {int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()}
    finally:
        tracer.terminate()
        try:
            tracer.communicate(timeout=_END_S)
        except subprocess.TimeoutExpired:
            # It waits for a child that is ending itself; whom it held goes on when it is gone.
            tracer.kill()
            tracer.communicate(timeout=_ATTACH_S)
            if not more:
                raise  # what it recorded is not whole


def _all_traced(pid: int, tracer: int) -> bool:
    """Whether every thread of the process is held by the recorder."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = (task / "status").read_text()
            if f"TracerPid:\t{tracer}\n" not in status:
                return False
    return True


def parse(log: bytes, threads: set[int]) -> list[Call]:
    """The calls of a log that succeeded, in the order of their ends, of a process that had these
    threads and of its children; not of VMMs."""
    found = [
        (thread, call) for thread, text in _whole(log) if (call := _parse_call(text)) is not None
    ]
    owners = _processes(found, threads)
    return [
        replace(call, process=owners[thread])
        for thread, call in found
        if thread in owners and call.name not in _MAKE
    ]


def _whole(log: bytes) -> Iterator[tuple[int, bytes]]:
    """Each call's thread and text, where others came in between put together again."""
    unfinished: dict[bytes, bytes] = {}
    for line in log.split(b"\n"):
        found = _LINE.match(line)
        if found is None:
            continue
        thread, text = found[1], found[2]
        if text.endswith(b"<unfinished ...>"):
            unfinished[thread] = text[: -len(b"<unfinished ...>")].rstrip()
            continue
        if (resumed := _RESUMED.match(text)) is not None:
            text = unfinished.pop(thread, b"") + resumed[2].lstrip()
        yield int(thread), text


def _processes(calls: list[tuple[int, Call]], threads: set[int]) -> dict[int, int]:
    """The process of each thread that is the recorded one's or a child's.

    Below a VMM processes have other names for each other: those are nobody's here.
    """
    owners, vmms = dict.fromkeys(threads, 0), set[int]()
    for thread, call in calls:
        if thread not in owners:
            continue
        if call.name == "execve" and _LAUNCHER in call.text(0):
            vmms.add(owners[thread])
        if call.name in _FORKS:
            same = owners[thread] in vmms or any(b"CLONE_THREAD" in a for a in call.arguments)
            owners[call.result] = owners[thread] if same else call.result
    return {thread: owner for thread, owner in owners.items() if owner not in vmms}


def _parse_call(text: bytes) -> Call | None:
    found = _CALL.match(text)
    if found is None or found[3] == b"?" or int(found[3]) < 0:
        return None
    name, arguments, result, rest = found.groups()
    path = re.match(rb"^<((?:\\x[0-9a-f]{2})*)>", rest)
    return Call(
        name.decode(),
        tuple(arguments.split(b", ")),
        int(result),
        _unhex(path[1]).decode() if path else None,
    )


def _place(argument: bytes) -> tuple[int | None, str]:
    found = _PLACE.match(argument.strip())
    assert found is not None, argument[:200]
    number = None if found[1] == b"AT_FDCWD" else int(found[1])
    path = _unhex(found[2]).decode(errors="surrogateescape")
    return number, f"{path}\0deleted" if found[3] else path  # a name that nothing has


def _unhex(text: bytes) -> bytes:
    return bytes.fromhex(text.replace(b"\\x", b"").decode())
