"""The main job on a real guest: a counter that is paused, resumed, saved and forked.

usage: python tools/demo.py

A loop in the guest appends one number after another to a file in its memory. The demo takes the
guest through every verb and prints one table. It ends with 0 only if each guest, the original and
its forks, counted 1, 2, 3, ... to the end without a gap and without a repeat, and if a paused guest
left no process and none of its memory behind; otherwise with 1.

It has a home of its own (`DIAPAUSE_DEMO_HOME`, else `diapause-demo` in the user's data directory).
There the image stays for the next run; everything else is gone at the end, or, after a failure, at
the beginning of the next run. The table goes to stdout, talk to stderr.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from diapause import model
from diapause.catalog import Catalog
from diapause.cli.output import error_text, say, table
from diapause.daemon.client import Client
from diapause.daemon.start import try_connect
from diapause.driver.process import Pidfd, find_by_argument
from diapause.driver.qemu.command import name_argument
from diapause.errors import DiapauseError
from diapause.store.files import remove_tree
from diapause.store.home import Home
from diapause.units import format_size

T = TypeVar("T")

IMAGE = "tiny"
FORKS = 4
COLUMNS = ("step", "wall ms", "frozen ms", "dirty pages", "stored", "last before", "first after")

_FILE = "/tmp/counter"
# In the background and with streams of its own: it belongs to no exec.
_START = f': >{_FILE}; setsid sh -c "$0" </dev/null >/dev/null 2>&1 &'
_COUNT = f"n=0; while :; do n=$((n + 1)); echo $n; sleep 0.02; done >>{_FILE}"
# One exec that lives as long as the guest: it hands out each number once, also over a pause.
_FOLLOW = f"while :; do while read -r n; do echo $n; done; sleep 0.02; done <{_FILE}"

_COUNTED_BEFORE = 40  # numbers before the first step, so that there is something to lose
_QUIET_S = 0.3  # how long a paused guest is listened to
_NEXT_S = 60.0  # bounds: the next number, a command in the guest, packing, a daemon's end
_EXEC_S = 120.0
_PACK_S = 300.0
_DAEMON_END_S = 90.0
_RELEASE_S = 20.0


class DemoFailed(Exception):
    """What the demo exists to show did not happen."""


# -- the sequence --------------------------------------------------------------------------------


def parse_numbers(text: str) -> list[int]:
    """The numbers of a counter's file; a line that is torn or is none becomes -1."""
    lines = text.split("\n")
    numbers = [int(line) if line.isascii() and line.isdigit() else -1 for line in lines[:-1]]
    return numbers if lines[-1] == "" else [*numbers, -1]


def faults(numbers: Sequence[int], at_least: int = 1) -> list[str]:
    """What is wrong with a count that has to be 1, 2, 3, ... up to `at_least` or more."""
    for index, number in enumerate(numbers):
        if number == index + 1:
            continue
        before = numbers[index - 1] if index else 0
        if number < 0:
            return [f"line {index + 1} behind {before} is no number"]
        kind = "lost" if number > before + 1 else "repeated"
        return [f"a value was {kind}: {before} is followed by {number}"]
    if len(numbers) < at_least:
        return [f"it ends at {len(numbers)} and had reached {at_least}"]
    return []


# -- guests --------------------------------------------------------------------------------------


def exec_command(home: Home, sandbox: str, *command: str) -> list[str]:
    """The command line's own exec: what a person would type."""
    program = [sys.executable, "-m", "diapause", "--home", str(home.root)]
    return [*program, "exec", sandbox, "--", *command]


def run_in_guest(home: Home, sandbox: str, *command: str) -> str:
    """Run a command in a guest; its output, whole."""
    done = subprocess.run(
        exec_command(home, sandbox, *command),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_EXEC_S, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise DemoFailed(f"{command[0]} in {sandbox} ended with {done.returncode}: {done.stderr}")
    return done.stdout


class Follower:
    """One exec in a guest that prints each number of the counter as it comes."""

    def __init__(self, home: Home, sandbox: str) -> None:
        self.numbers: list[int] = []
        self._more = threading.Condition()
        self._process = subprocess.Popen(
            exec_command(home, sandbox, "sh", "-c", _FOLLOW),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._more:
                self.numbers += parse_numbers(line)
                self._more.notify_all()

    def await_count(self, count: int) -> int:
        """Wait for the `count`th number; it."""
        with self._more:
            if not self._more.wait_for(lambda: len(self.numbers) >= count, _NEXT_S):
                raise DemoFailed(f"no number after {self.last} within {_NEXT_S:.0f} s")
            return self.numbers[count - 1]

    @property
    def last(self) -> int:
        """The newest number; 0 before the first."""
        return self.numbers[-1] if self.numbers else 0

    def stop(self) -> None:
        """End the exec's client; the guest's counter goes on."""
        self._process.kill()
        self._process.wait(_RELEASE_S)
        self._thread.join(_RELEASE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()


@dataclass
class Guest:
    """A sandbox of the demo, and the number that its count must have reached at least."""

    label: str
    sandbox: str
    reached: int
    follower: Follower | None = None


# -- the steps -----------------------------------------------------------------------------------


@dataclass
class Step:
    """A line of the table."""

    name: str
    wall_ms: float
    capture: model.CaptureAnswer | None = None
    before: int | None = None
    after: int | None = None
    stored_bytes: int | None = None

    def cells(self) -> list[str]:
        """As the table shows it; what a step does not have is a dash."""
        capture = self.capture
        return [
            self.name,
            f"{self.wall_ms:.0f}",
            "-" if capture is None else f"{capture.frozen_ms:.1f}",
            "-" if capture is None else str(capture.dirty_pages),
            "-" if self.stored_bytes is None else format_size(self.stored_bytes),
            "-" if self.before is None else str(self.before),
            "-" if self.after is None else str(self.after),
        ]


@dataclass
class Demo:
    """The demo's state: its home's client, what it started, what it measured."""

    home: Home
    client: Client
    guests: list[Guest] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def add(self, step: Step) -> None:
        """One more line; said at once, since the table comes at the end."""
        self.steps.append(step)
        say(f"  {step.name}: {step.wall_ms:.0f} ms")


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call gives, and its wall time in milliseconds."""
    began = time.perf_counter()
    answer = call()
    return answer, (time.perf_counter() - began) * 1e3


def tell_story(demo: Demo) -> None:
    """Every step, in order."""
    build(demo)
    original = boot(demo)
    pause_and_resume(demo, original)
    saved = save(demo, original)
    forks = fork(demo, saved)
    follow(demo, forks[0])
    pause_and_resume(demo, forks[0])
    for guest in demo.guests:
        let_it_count(demo, guest)
    fill_in_stored(demo)


def build(demo: Demo) -> None:
    """The image, unless it is there."""
    request = model.ImageBuildRequest(name=IMAGE)
    image, wall_ms = timed(lambda: demo.client.build_image(request))
    demo.add(Step("image, already there" if image.already else f"build image {IMAGE}", wall_ms))


def boot(demo: Demo) -> Guest:
    """A guest that counts."""
    request = model.RunRequest(image=IMAGE, boot=True)
    ran, wall_ms = timed(lambda: demo.client.run(request))
    guest = Guest("the original", ran.sandbox, 1)
    demo.guests.append(guest)
    run_in_guest(demo.home, guest.sandbox, "sh", "-c", _START, _COUNT)
    guest.follower = Follower(demo.home, guest.sandbox)
    demo.add(Step("boot", wall_ms, after=guest.follower.await_count(1)))
    guest.follower.await_count(_COUNTED_BEFORE)
    return guest


def follow(demo: Demo, guest: Guest) -> None:
    """Listen to a guest from its first number on, until what it says is new."""
    guest.follower = Follower(demo.home, guest.sandbox)
    guest.follower.await_count(guest.reached)


def pause_and_resume(demo: Demo, guest: Guest) -> None:
    """Two steps: gone from the host, and back where it was."""
    assert guest.follower is not None
    suffix = "" if guest is demo.guests[0] else f" {guest.label}"
    vmm = demo.client.inspect(guest.sandbox).vmm
    request = model.CaptureRequest()
    paused, wall_ms = timed(lambda: demo.client.pause(guest.sandbox, request))
    check_freed(demo.home, guest.sandbox, paused.snapshot, vmm.pid if vmm else 0)
    time.sleep(_QUIET_S)
    count = len(guest.follower.numbers)
    demo.add(Step(f"pause{suffix}", wall_ms, paused, before=guest.follower.last))
    time.sleep(_QUIET_S)
    if len(guest.follower.numbers) != count:
        raise DemoFailed(f"{guest.label} went on counting while it was paused")
    resumed, wall_ms = timed(lambda: demo.client.resume(guest.sandbox, model.ResumeRequest()))
    if not resumed.warm:
        raise DemoFailed(f"{guest.label} came back cold")
    before, after = guest.follower.last, guest.follower.await_count(count + 1)
    step = Step(f"resume{suffix}", wall_ms, before=guest.follower.numbers[count - 1], after=after)
    guest.reached = max(before, after)
    demo.add(step)


def save(demo: Demo, guest: Guest) -> Step:
    """A snapshot of a guest that goes on."""
    assert guest.follower is not None
    before = guest.follower.last
    request = model.CaptureRequest()
    saved, wall_ms = timed(lambda: demo.client.save(guest.sandbox, request))
    after = guest.follower.await_count(len(guest.follower.numbers) + 1)
    guest.reached = after
    step = Step("save, running", wall_ms, saved, before=before, after=after)
    demo.add(step)
    return step


def fork(demo: Demo, saved: Step) -> list[Guest]:
    """Guests that go on from the save; each has at least the numbers that came before it."""
    assert saved.capture is not None
    assert saved.before is not None
    request = model.ForkRequest(source=saved.capture.snapshot, count=FORKS)
    answer, wall_ms = timed(lambda: demo.client.fork(request))
    forks = [
        Guest(f"fork {number}", sandbox, saved.before)
        for number, sandbox in enumerate(answer.sandboxes, 1)
    ]
    demo.guests += forks
    step = Step(f"fork, {FORKS} ways", wall_ms, before=saved.before)
    for guest in forks:
        guest.reached = read_counter(demo, guest)[-1]
    step.after = min(guest.reached for guest in forks)
    demo.add(step)
    return forks


def let_it_count(demo: Demo, guest: Guest) -> None:
    """Wait until a guest has counted on, so that one that stands still is found."""
    deadline = time.monotonic() + _NEXT_S
    while (count := read_counter(demo, guest)[-1]) <= guest.reached:
        if time.monotonic() > deadline:
            raise DemoFailed(f"{guest.label} stands still at {count}")
        time.sleep(0.05)
    guest.reached = count


def read_counter(demo: Demo, guest: Guest) -> list[int]:
    """The whole count of a guest as its file has it now; -1 stands for an empty one."""
    return parse_numbers(run_in_guest(demo.home, guest.sandbox, "cat", _FILE)) or [-1]


def fill_in_stored(demo: Demo) -> None:
    """What each snapshot took in the store; known once it is packed, behind the verbs."""
    deadline = time.monotonic() + _PACK_S
    for step in demo.steps:
        if step.capture is None:
            continue
        snapshot = demo.client.inspect_snapshot(step.capture.snapshot)
        while snapshot.state == "captured" and snapshot.error is None:
            if time.monotonic() > deadline:
                raise DemoFailed(f"snapshot {snapshot.id} is not packed after {_PACK_S:.0f} s")
            time.sleep(0.05)
            snapshot = demo.client.inspect_snapshot(snapshot.id)
        if snapshot.state != "packed":
            raise DemoFailed(f"snapshot {snapshot.id} was not packed: {snapshot.error}")
        step.stored_bytes = snapshot.stored_bytes


# -- what a pause leaves -------------------------------------------------------------------------


def check_freed(home: Home, sandbox: str, snapshot: str, pid: int) -> None:
    """A paused guest has no process, no buffer, and nobody maps a guest's memory."""
    if Path(f"/proc/{pid}").exists() or find_by_argument(name_argument(home.key, sandbox)):
        raise DemoFailed(f"the VMM of {sandbox} is still there")
    left = [path.name for path in home.buffers.iterdir() if sandbox in path.name]
    left += [path.name for path in home.buffers.iterdir() if snapshot in path.name]
    if left:
        raise DemoFailed(f"the pause of {sandbox} left {left} in memory")


# -- the verdict ---------------------------------------------------------------------------------


def judge(demo: Demo) -> list[str]:
    """Every guest's whole count, from its file and from its exec; what is wrong with it."""
    wrong = []
    for guest in demo.guests:
        numbers = read_counter(demo, guest)
        wrong += [f"{guest.label}: {fault}" for fault in faults(numbers, guest.reached)]
        if guest.follower is not None:
            heard = list(guest.follower.numbers)
            wrong += [f"the exec in {guest.label}: {fault}" for fault in faults(heard)]
        say(f"  {guest.label} counted to {numbers[-1]}")
    return wrong


def report(demo: Demo, wrong: Sequence[str]) -> int:
    """The table, the verdict, the exit code."""
    table(COLUMNS, [step.cells() for step in demo.steps])
    for fault in wrong:
        say(f"demo: {fault}")
    if not wrong:
        say("demo: no value was lost and none repeated")
    return 1 if wrong else 0


# -- the home ------------------------------------------------------------------------------------


def demo_home() -> Home:
    """The demo's own home: its content is the demo's to remove."""
    if value := os.environ.get("DIAPAUSE_DEMO_HOME"):
        return Home.at(value)
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local/share")
    return Home.at(Path(data) / "diapause-demo")


@contextmanager
def only_demo(home: Home) -> Iterator[None]:
    """Refuse to run beside another demo of this home, which would clear it."""
    home.create()
    with (home.root / "demo.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoFailed(f"another demo runs in {home.root}") from None
        yield


def release(home: Home) -> None:
    """End every guest of the home, then its daemon."""
    connection = try_connect(home)
    if connection is None and not home.catalog.exists():
        return
    if connection is not None:
        connection.close()
    client = Client(home)
    for row in client.sandboxes(everything=True):
        client.remove(row.sandbox, force=True)
    end_daemon(home)


def end_daemon(home: Home) -> None:
    """Tell the home's daemon to stop, and wait for it."""
    recorded = home.serve_lock.read_text().strip() if home.serve_lock.exists() else ""
    for process in find_by_argument(str(home.root)):
        if str(process.pid) != recorded:
            continue
        handle = Pidfd(process)
        os.kill(process.pid, signal.SIGTERM)
        if not handle.wait(_DAEMON_END_S):
            raise DemoFailed(f"the daemon of {home.root} did not stop")


def clear(home: Home) -> None:
    """Remove what a run left, but for the image and what is known of this host."""
    facts: dict[str, str] = {}
    if home.catalog.exists():
        catalog = Catalog(home.catalog)
        facts = catalog.facts()
        catalog.close()
    for path in home.root.iterdir():
        if path.name in (home.images.name, "demo.lock"):
            continue
        if path.is_dir():
            remove_tree(path)
        else:
            path.unlink()
    remove_tree(home.sockets)
    remove_tree(home.buffers)
    home.create()
    catalog = Catalog(home.catalog)
    for name, value in facts.items():
        catalog.remember(name, value)
    catalog.close()


# -- all of it -----------------------------------------------------------------------------------


def run(home: Home) -> int:
    """One demo in this home."""
    release(home)
    clear(home)
    demo = Demo(home, Client(home))
    began = time.monotonic()
    say(f"diapause demo in {home.root}")
    try:
        tell_story(demo)
        code = report(demo, judge(demo))
    finally:
        for guest in demo.guests:
            if guest.follower is not None:
                guest.follower.stop()
        release(home)
    if code == 0:
        clear(home)
    say(f"demo: {time.monotonic() - began:.1f} s in all")
    return code


def main() -> int:
    """Run the demo; the exit code."""
    home = demo_home()
    try:
        with only_demo(home):
            return run(home)
    except DemoFailed as error:
        say(f"demo: {error}")
    except DiapauseError as error:
        error_text(error)
    except subprocess.TimeoutExpired as error:
        say(f"demo: a command in the guest did not end within {error.timeout:.0f} s")
    except KeyboardInterrupt:
        return 130
    with suppress(OSError):
        say(f"demo: {home.serve_log} may say more")
    return 1


if __name__ == "__main__":
    sys.exit(main())
