"""What is said of the pager and its keeper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diapause.model import PagerAnswer, PagerSandbox, Stalled

if TYPE_CHECKING:
    from diapause.pager.client import Pager


def pager_answer(pager: Pager) -> PagerAnswer:
    """Who is there and whom it serves; raises PagerUnavailable where it does not answer."""
    if pager.instance() is None:
        return PagerAnswer(running=False)
    pair = pager.pair(start=False)
    stalled = pager.totals()["stalled"]
    sandboxes = [
        PagerSandbox(
            sandbox=one["sandbox"], pid=one["pid"], files=one["files"], handed=one["handed"],
            ended=one["ended"], stalled=_stalled(stalled.get(one["sandbox"])),
        )
        for one in pager.sandboxes()
    ]  # fmt: skip
    return PagerAnswer(
        running=True, instance=pair.instance, pid=pair.pid, keeper_pid=pair.keeper_pid,
        replaceable=pair.replaceable, files=len(pager.names()), sandboxes=sandboxes,
        resident_bytes=sum(map(_resident_bytes, (pair.pid, pair.keeper_pid))),
    )  # fmt: skip


def _stalled(found: dict[str, object] | None) -> Stalled | None:
    return Stalled(**found) if found else None  # type: ignore[arg-type]


def _resident_bytes(pid: int) -> int:
    """What a process has in memory that is no file's; 0 for one that has just been replaced."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024
