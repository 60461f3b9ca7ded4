"""Opens what power cuts leave, and looks at what must hold of each: for `tests/fault/test_power_*`.

Each state is opened twice, as a host may go down again at once. The second daemon collects
afterwards: of what the cut left behind nothing may be left that nobody needs.
"""

from __future__ import annotations

from collections.abc import Callable

from diapause.catalog import SandboxRecord
from diapause.store.home import Home
from tests.framework.disk_model import State
from tests.framework.power import Opened, Recording, built, opened

# What holds of an opened home when the client had so many answers.
Holds = Callable[[Recording, Opened, int], None]
Numbered = tuple[int, str, State]


def sample(made: Recording, spread: int = 8, last: int = 3) -> list[Numbered]:
    """Some of the states: over all of the recording, after each promise, and at the end."""
    states = list(made.states())
    assert len(states) > 2 * (spread + last), "too few for a verb that writes"
    after = [
        next(state for state in states if state[0] >= promise and state[1] == WORST)
        for promise in made.promises
    ]
    chosen = [*states[: -last : len(states) // spread], *after, *states[-last:]]
    return list({state[2].key: state for state in chosen}.values())


# Nothing that was not synced is there: what a promise may not stand on.
WORST = "data none, names none"


def check_cuts(made: Recording, states: list[Numbered], holds: Holds) -> None:
    """Open each of these states, twice."""
    for number, kept, state in states:
        place = f"after call {number} of {len(made.calls)} ({made.calls[number].name}), {kept}"
        try:
            with built(state, made.begin.parent) as home:
                rows = [_open(made, home, number, holds, collects=turn == 1) for turn in range(2)]
            assert rows[0] == rows[1]
        except BaseException as error:
            error.add_note(f"the power went {place}")
            raise


def _open(
    made: Recording, home: Home, number: int, holds: Holds, *, collects: bool
) -> list[tuple[str, str, object]]:
    with opened(home) as found:
        found.settle()
        holds(made, found, made.promised(number))
        for snapshot, row in found.snapshots.items():
            if row.state != "failed":
                assert found.differing(snapshot, made.contents.get(snapshot)) == [], snapshot
        _undamaged(found)
        assert list(home.tmp.iterdir()) == []
        rows: list[tuple[str, str, object]] = [
            *((row.id, row.state, row.error) for row in found.sandboxes.values()),
            *((row.id, row.state, row.error) for row in found.snapshots.values()),
        ]
        if collects:
            _collected(made, found)
    return rows


def _undamaged(found: Opened) -> None:
    """Nothing, but for what a VMM was writing: its calls are not in the recording, and the check
    says of a lost guest's disk what it finds."""
    lost = tuple(f"sandboxes/{row.id}/" for row in found.sandboxes.values() if row.error)
    damage = [one for one in found.damage() if not one.startswith(lost)]
    assert damage == [], damage


def _collected(made: Recording, found: Opened) -> None:
    """gc takes nothing that is needed, and leaves nothing that is not."""
    assert found.collect() == []
    _undamaged(found)
    rows = found.host.catalog.snapshots(removed=True)
    assert {path.name for path in found.host.home.snapshots.iterdir()} <= {row.id for row in rows}
    for row in found.snapshots.values():
        if row.state == "packed" and row.id in made.contents:
            assert found.differing(row.id, made.contents[row.id]) == [], row.id


def lost_but_named(found: Opened, row: SandboxRecord) -> str:
    """A guest that was lost with the host says so, and names what it can be forked from."""
    assert row.state == "failed"
    assert row.error is not None
    assert row.error["code"] == "guest_lost"
    whole: str = row.error["fields"]["snapshot"]
    assert found.snapshots[whole].state == "packed"
    assert whole in row.error["message"]
    return whole


def overlays_are_there(found: Opened, row: SandboxRecord) -> None:
    """What the guest's disks wrote to is on the disk by name: its own syncs reached it."""
    names = [name for names in row.overlays for name in names]
    assert len(names) >= len(row.disks_bytes)
    directory = found.host.home.sandbox(row.id)
    assert [name for name in names if not (directory / name).exists()] == []
