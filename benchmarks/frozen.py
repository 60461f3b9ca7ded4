"""How long a guest is frozen: against QEMU's own ways, and against the bare minimum."""

from __future__ import annotations

from benchmarks.by_hand import (
    BANDWIDTH_DEFAULT,
    BANDWIDTH_UNLIMITED,
    ByHand,
    scratch_of,
    touched_buffer,
)
from benchmarks.guest import Bench, dirty_command
from benchmarks.rows import NO_BOUND, Figure, Row
from diapause.units import MIB

ROUNDS = 7
PEER_ROUNDS = 5


def measure(bench: Bench) -> list[Row]:
    """512 MiB, 256 MiB of it in use, 1,500-2,000 dirty pages a round."""
    guest = bench.boot()
    bench.fill(guest, 190)  # with the kernel and the initial file system: 256 MiB in use
    bench.dirty(guest)
    base = bench.save(guest).snapshot
    saves, pauses = _ours(bench, guest)
    migrate, unlimited, savevm, bare = _peers(bench, base)
    rows = []
    for name, figures in (("save", saves), ("pause", pauses)):
        title = f"frozen by a {name}"
        ours = Figure(title, "ms", tuple(a.frozen_ms for a in figures))
        notes = {"dirty_pages": [a.dirty_pages for a in figures]}
        phases = [a.phases_ms for a in figures]
        rows += [
            Row(title, ours, migrate, 1 / 40, notes),
            Row(title, ours, savevm, 1 / 40, notes),
            Row(title, ours, bare, 1.5, {**notes, "phases": phases}),
            Row(title, ours, unlimited, NO_BOUND, notes),
        ]
    bench.remove(guest)
    return rows


def _ours(bench: Bench, guest: str) -> tuple[list, list]:  # type: ignore[type-arg]
    saves = []
    for _ in range(ROUNDS):
        bench.dirty(guest)
        saves.append(bench.save(guest))
    pauses = []
    for _ in range(ROUNDS):
        bench.dirty(guest)
        pauses.append(bench.pause(guest))
        from diapause.model import ResumeRequest

        bench.client.resume(guest, ResumeRequest())
    return saves[1:], pauses[1:]


def _peers(bench: Bench, base: str) -> tuple[Figure, Figure, Figure, Figure]:
    """One guest for all of them; what its memory file holds is mapped by the first, so that none
    but the first, which doesn't count, pays for that."""
    peer = ByHand(bench, base, scratch_of(bench))
    buffer = touched_buffer(64 * MIB)
    peer.start()
    bare, pages = [], []
    peer.machine.stop()
    peer.machine.ram.rearm()
    peer.machine.thaw()
    for _ in range(ROUNDS):
        _dirty_by_hand(peer)
        took, count = peer.bare_capture(buffer)
        bare.append(took)
        pages.append(count)
    peer.migrate_to_file(BANDWIDTH_UNLIMITED)
    migrate = [peer.migrate_to_file(BANDWIDTH_DEFAULT) for _ in range(PEER_ROUNDS)]
    unlimited = [peer.migrate_to_file(BANDWIDTH_UNLIMITED) for _ in range(PEER_ROUNDS)]
    savevm = [peer.savevm() for _ in range(PEER_ROUNDS)]
    peer.stop()
    bare_name = f"stop + state + readv of {min(pages)}-{max(pages)} pages"
    return (
        Figure("migrate to a file", "ms", tuple(migrate)),
        Figure("migrate, its bandwidth limit lifted", "ms", tuple(unlimited)),
        Figure("savevm", "ms", tuple(savevm)),
        Figure(bare_name, "ms", tuple(bare[1:])),
    )


def _dirty_by_hand(peer: ByHand) -> None:
    """The same round of writes, asked for over the agent's port."""
    import asyncio

    from diapause.guest.link import Link
    from diapause.guest.session import ExecRequest

    async def work() -> None:
        link = Link("byhand")
        await link.attach(peer.machine.agent_socket(10.0), identity=None, bound_s=60.0)
        session = await link.exec(ExecRequest(argv=["sh", "-c", dirty_command()]))
        async for _ in session:
            pass
        await link.detach()

    asyncio.run(work())
