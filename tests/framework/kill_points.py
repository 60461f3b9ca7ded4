"""Kills a daemon or a VMM at a place of a verb, and looks at what the restart made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from diapause.errors import DaemonUnreachable, DiapauseError
from tests.framework import coupled
from tests.framework.fake_home import eventually, gone
from tests.framework.leftovers import nothing_left
from tests.framework.sandbox import WAIT_S, Aside, Sandbox
from tests.framework.verbs import END, FROZEN_CALLS, Scenario, scenarios

if TYPE_CHECKING:
    from tests.framework.verbs import Ground

Whom = Literal["kill", "vmm"]


@dataclass(frozen=True)
class Point:
    """One kill: whom, in which verb, at which place."""

    whom: Whom
    scenario: Scenario
    step: str
    when: str

    @property
    def place(self) -> str:
        return f"{self.scenario.verb.name}/{self.step}/{self.when}"

    def __str__(self) -> str:
        return self.place.replace("/", "-")


def points(whom: Whom, *names: str, every: bool) -> list[Point]:
    """The kill points of these verbs.

    Where nothing lies between two places (a step that was acted, and the next before its journal
    write) one stands for both, unless it is to be `every` one. A VMM is killed once a step.
    """
    found = []
    for verb, scenario in scenarios().items():
        if verb.name not in names:
            continue
        for number, step in enumerate(verb.steps):
            whens = ["before", "journaled", "acted"]
            if not every:
                whens = ["journaled"] if whom == "vmm" else whens[0 if number == 0 else 1 :]
            found += [Point(whom, scenario, step, when) for when in whens]
        calls = FROZEN_CALLS.get(verb.name, ())
        if whom == "vmm" and not every:
            calls = tuple(call for call in calls if call == "copy.1")  # all is taken, and it stands
        if calls:
            found += [Point(whom, scenario, "freeze", call) for call in calls]
    return found


def daemon_killed(ground: Ground, point: Point) -> None:
    """Kill the daemon there; everything is whole under the next one."""
    scenario, daemon = point.scenario, ground.daemon
    subject = scenario.subject(ground)
    value, digests = _known(ground, subject)
    sandboxes, snapshots = ground.ids(), ground.snapshot_ids()
    _kill_daemon(ground, point, subject)
    committed = scenario.committed(point.step, point.when)
    expected = scenario.after if committed else scenario.before
    nothing_left_after_restart(ground)
    made = [Sandbox(daemon, id_) for id_ in ground.ids() - sandboxes]
    if subject is None:
        found = [ground.state(sandbox) for sandbox in made]
        assert found == ([] if expected == "gone" else [expected])
    else:
        assert made == []
        assert ground.state(subject) == expected
    taken = ground.snapshot_ids() - snapshots
    assert len(taken) == int(scenario.captures and committed)
    scenario.check(ground, subject, committed)
    for sandbox in made:
        sandbox.remove()
    if subject is not None and expected != "gone":
        _whole(ground, scenario, subject, value, digests, sorted(taken))


def nothing_left_after_restart(ground: Ground) -> None:
    """The next daemon comes with the next request."""
    ground.daemon.client.sandboxes()
    nothing_left(ground.daemon.home)


def _known(ground: Ground, subject: Sandbox | None) -> tuple[int, str]:
    """What the guest must still know afterwards."""
    if subject is None or ground.state(subject) != "running":
        return 0, ""
    digests = subject.rewrite(64)
    return coupled.check(subject), digests


def _kill_daemon(ground: Ground, point: Point, subject: Sandbox | None) -> None:
    daemon = ground.daemon
    pid = daemon.pid
    daemon.plan(point.whom, point.place)
    call = Aside(lambda: point.scenario.call(ground, subject))
    failure = call.wait()
    assert daemon.done == "kill", f"{point.place} was not passed: {failure}"
    assert isinstance(failure, DaemonUnreachable)
    eventually("the end of the daemon", lambda: gone(pid), WAIT_S)


def _whole(
    ground: Ground,
    scenario: Scenario,
    subject: Sandbox,
    value: int,
    digests: str,
    taken: list[str],
) -> None:
    """The guest goes on; what was taken is of one instant, and the next save is exact."""
    if ground.state(subject) == "paused":
        taken = []  # that was it
    ground.bring_back(subject)
    coupled.goes_on(subject, value)
    if scenario.captures:
        taken = [*taken, subject.save().snapshot]
    for snapshot in taken:
        with subject.forked(snapshot) as fork:
            assert coupled.check(fork) >= value
            assert not digests or fork.digests() == digests


def vmm_killed(ground: Ground, point: Point) -> None:
    """Kill the VMM there; what was lost is said, the rest is whole."""
    scenario, daemon = point.scenario, ground.daemon
    subject = scenario.subject(ground)
    sandboxes = ground.ids()
    daemon.plan("vmm", point.place)
    call = Aside(lambda: scenario.call(ground, subject))
    failure = call.wait()
    expected = bereaved_state(point)
    if isinstance(failure, DiapauseError):
        assert failure.code != DiapauseError.code, failure.message
    assert daemon.done == ("nothing" if expected is None else "vmm"), (point.place, failure)
    if expected is None:
        assert failure is None
    state = expected or scenario.after
    affected = [subject] if subject is not None else []
    affected += [Sandbox(daemon, id_) for id_ in ground.ids() - sandboxes]
    if expected == "gone":
        assert failure is not None or subject is not None
        assert [ground.state(sandbox) for sandbox in affected if sandbox is not subject] == []
    for sandbox in affected:
        ground.reaches(sandbox, state)
    nothing_left(daemon.home)
    for sandbox in affected:
        _bereaved(ground, sandbox, subject)


def bereaved_state(point: Point) -> str | None:
    """What a VMM that dies there leaves; None where there is none to be killed."""
    scenario = point.scenario
    if (place := f"{point.step}/{point.when}") in scenario.bereaved:
        return scenario.bereaved[place]
    steps = list(scenario.verb.steps)
    # What has been acted is as what is about to be taken next.
    at = steps.index(point.step) + int(point.when == "acted")
    return scenario.bereaved.get(steps[at] if at < len(steps) else END)


def _bereaved(ground: Ground, sandbox: Sandbox, subject: Sandbox | None) -> None:
    state = ground.state(sandbox)
    if state == "failed":
        detail = sandbox.inspect()
        assert detail.error is not None
        assert detail.vmm is None
        last = detail.error["fields"]["snapshot"]
        if last is None:
            assert sandbox is not subject, "only a guest that was just booted has none"
            assert "no whole snapshot" in detail.error["message"]
        else:
            assert last in detail.error["message"]
            _forks(ground, sandbox, last)
    elif state == "paused":
        ground.bring_back(sandbox)
        coupled.check(sandbox)
    if sandbox is not subject or state == "failed":
        sandbox.remove()


def _forks(ground: Ground, sandbox: Sandbox, snapshot: str) -> None:
    """What a lost guest names can be forked; in one that was kept as it booted nothing counts."""
    with sandbox.forked(snapshot) as fork:
        if snapshot in ground.snapshot_ids():
            coupled.check(fork)
        else:
            assert fork.sh("echo here") == "here\n"
