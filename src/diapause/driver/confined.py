"""What confines a process that runs, read from /proc: never from what it was started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diapause.driver.cgroup import leaf_of, read_limit

_NAMESPACES = {
    "mnt": "mount", "pid": "pid", "ipc": "ipc", "uts": "uts", "net": "net", "user": "user",
}  # fmt: skip
_SETS = ("CapInh", "CapPrm", "CapEff", "CapAmb")
_SECCOMP = {"0": "off", "1": "strict", "2": "filter"}


@dataclass(frozen=True)
class Confined:
    """One process as the kernel shows it to us."""

    uid: int
    namespaces: list[str]  # those that are not the daemon's
    capabilities: str  # the union of its sets, as hexadecimal digits; "none"
    no_new_privs: bool
    seccomp: str
    cgroup: str  # its own; "none" where it is in one that is not its alone
    memory_bytes_max: int | None  # of that cgroup; None: no limit
    tasks_max: int | None


def read_confined(pid: int) -> Confined | None:
    """What confines this process now; None where it is gone or can't be asked."""
    place = Path(f"/proc/{pid}")
    try:
        lines = (place / "status").read_text().splitlines()
        status = {name: value.split() for name, _, value in (s.partition(":") for s in lines)}
        namespaces = [
            word
            for name, word in _NAMESPACES.items()
            if (place / "ns" / name).readlink() != Path(f"/proc/self/ns/{name}").readlink()
        ]
        leaf = leaf_of(pid)
    except OSError:
        return None
    held = 0
    for name in _SETS:
        held |= int(status[name][0], 16)
    return Confined(
        uid=int(status["Uid"][1]), namespaces=namespaces,
        capabilities=f"{held:x}" if held else "none",
        no_new_privs=status["NoNewPrivs"] == ["1"],
        seccomp=_SECCOMP.get(status["Seccomp"][0], "unknown"),
        cgroup=str(leaf.path) if leaf else "none",
        memory_bytes_max=read_limit(leaf, "memory.max") if leaf else None,
        tasks_max=read_limit(leaf, "pids.max") if leaf else None,
    )  # fmt: skip
