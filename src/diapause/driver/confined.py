"""What confines a process that runs, read from /proc: never from what it was started with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

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
    cgroup: str  # its own; "none" where it is in the daemon's


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
        cgroup = _cgroup(place)
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
        cgroup="none" if cgroup == _cgroup(Path(f"/proc/{os.getpid()}")) else cgroup,
    )  # fmt: skip


def _cgroup(place: Path) -> str:
    """The path in the unified hierarchy."""
    for line in (place / "cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return line.removeprefix("0::")
    return "none"
