"""A daemon that dies at an exact place: the real `diapause serve`, with an end that a test chooses.

    python -m tests.framework.mortal --home HOME serve --detached

runs the real command line. Before that it wraps, in its own process alone, what a verb goes
through on its way, and at each of these places reads the plan, a file in the home: `ACTION PLACE`.
Where the place is the one that was asked for, the plan is taken away and carried out:

    kill    SIGKILL to the daemon itself
    vmm     SIGKILL to the VMM of the verb's sandbox; the daemon goes on
    stop    `stop` to that VMM through its own monitor, as somebody from outside would
    raise   an error that nobody expects

A place is `VERB/STEP/before` (its journal write), `VERB/STEP/journaled` (after that write, before
the act), `VERB/STEP/acted`; and inside a frozen section `VERB/freeze/CALL.N`, after the N-th call
of that name to the VMM. The product knows nothing of any of this.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diapause.store import boot
from tests.framework.fake_home import eventually, gone
from tests.framework.sandbox import WAIT_S, Aside, Daemon

if TYPE_CHECKING:
    from diapause.sandbox.verb import Verb
    from diapause.store.home import Home

REPOSITORY = Path(__file__).parents[2]
_PLAN, _DONE, _CALLS, _BOOT = "mortal.plan", "mortal.done", "mortal.calls", "mortal.boot"
_RECORD = "record"


def mortal_command(home: Home) -> list[str]:
    """The command of a daemon that dies as planned."""
    return [
        "env", f"PYTHONPATH={REPOSITORY}", sys.executable, "-P", "-m", "tests.framework.mortal",
        "--home", str(home.root), "serve", "--detached",
    ]  # fmt: skip


class MortalDaemon(Daemon):
    """A home whose daemon follows plans; without one it is as any other."""

    def __init__(self, home: Home) -> None:
        super().__init__(home, command=mortal_command)

    def plan(self, action: str, place: str) -> None:
        """What is to happen at the place, once."""
        (self.home.root / _DONE).unlink(missing_ok=True)
        (self.home.root / _PLAN).write_text(f"{action} {place}")

    def dies_at(self, place: str, call: Callable[[], Any]) -> None:
        """Make the call whose verb kills the daemon at the place, and wait for the daemon's end:
        what is asked meanwhile may still come to the one that dies."""
        pid = self.pid
        self.plan("kill", place)
        assert Aside(call).wait() is not None
        assert self.done == "kill"
        eventually("the end of the daemon", lambda: gone(pid), WAIT_S)

    def record_calls(self) -> None:
        """From now on, keep the places of frozen sections that are passed."""
        (self.home.root / _CALLS).write_text("")

    def calls(self) -> list[str]:
        """The places that were passed, in their order."""
        return (self.home.root / _CALLS).read_text().split()

    def forget(self) -> None:
        """No plan any more."""
        (self.home.root / _PLAN).unlink(missing_ok=True)

    @property
    def done(self) -> str | None:
        """What came of the plan: `kill`, `vmm`, `stop`, `raise`; `nothing` where there was no VMM;
        None where its place was not passed."""
        path = self.home.root / _DONE
        return path.read_text() if path.exists() else None

    def boot_again(self, boot_id: str) -> None:
        """From its next start on, the daemon is told that the host has this boot id."""
        (self.home.root / _BOOT).write_text(boot_id)


class _Reaper:
    """In the daemon's process: looks at the plan at each place."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._here = threading.local()

    def passing(self, verb: Verb, place: str) -> None:
        """The verb comes to this place."""
        try:
            action, wanted = (self._root / _PLAN).read_text().split()
        except (FileNotFoundError, ValueError):
            return
        if wanted == f"{verb.name}/{place}":
            (self._root / _PLAN).unlink()
            self._act(verb, action)

    def _act(self, verb: Verb, action: str) -> None:
        if action == "kill":
            self._say(action)
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "raise":
            self._say(action)
            raise LookupError("nobody expected this")
        else:
            self._to_the_vmm(verb, action)

    def _to_the_vmm(self, verb: Verb, action: str) -> None:
        from diapause.driver.process import Pidfd

        process = verb.host.driver.find(verb.sandbox) if verb.sandbox else None
        if process is None:
            self._say("nothing")
            return
        if action == "stop":
            verb.guest.machine.checked("stop")  # type: ignore[attr-defined]
        else:
            pidfd = Pidfd(process)
            pidfd.kill()
            assert pidfd.wait(60.0)
        self._say(action)

    def _say(self, done: str) -> None:
        (self._root / _DONE).write_text(done)

    # -- what is wrapped -------------------------------------------------------------------------

    def around_verb(self, execute: Callable[[Verb], None]) -> Callable[[Verb], None]:
        """Know which verb this thread is taking."""

        def wrapped(verb: Verb) -> None:
            before = getattr(self._here, "verb", None)
            self._here.verb = verb
            try:
                execute(verb)
            finally:
                self._here.verb = before

        return wrapped

    def around_journal(self, step: Callable[..., None]) -> Callable[..., None]:
        """Before and after the journal's write of a step."""

        def wrapped(journal: Any, operation: str, number: int, name: str) -> None:
            self.passing(self._here.verb, f"{name}/before")
            step(journal, operation, number, name)
            self.passing(self._here.verb, f"{name}/journaled")

        return wrapped

    def around_act(self, take: Callable[[Verb, str], None]) -> Callable[[Verb, str], None]:
        """After the act of a step."""

        def wrapped(verb: Verb, step: str) -> None:
            take(verb, step)
            self.passing(verb, f"{step}/acted")

        return wrapped

    def around_section(self, capture: Callable[..., Any]) -> Callable[..., Any]:
        """Know that this thread is in a frozen section."""

        def wrapped(*arguments: Any) -> Any:
            self._here.calls = Counter()
            try:
                return capture(*arguments)
            finally:
                self._here.calls = None

        return wrapped

    def after_call(self, name: str) -> None:
        """The VMM was called; of interest inside a frozen section alone."""
        calls = getattr(self._here, "calls", None)
        if calls is None:
            return
        calls[name] += 1
        place = f"freeze/{name}.{calls[name]}"
        if (recording := self._root / _CALLS).exists():
            with recording.open("a") as file:
                file.write(f"{self._here.verb.name}/{place}\n")
        self.passing(self._here.verb, place)

    def around_command(self, command: Callable[..., Any]) -> Callable[..., Any]:
        """After each command of a monitor."""

        def wrapped(machine: Any, name: str, **arguments: Any) -> Any:
            found = command(machine, name, **arguments)
            self.after_call(name)
            return found

        return wrapped

    def around_phase(self, take: Callable[..., Any]) -> Callable[..., Any]:
        """After what is done to the VMM from outside: its memory is read, its tracking armed."""

        def wrapped(section: Any, step: str, act: Callable[[], Any]) -> Any:
            found = take(section, step, act)
            if step in ("copy", "rearm"):
                self.after_call(step)
            return found

        return wrapped


def install(root: Path) -> None:
    """Wrap what verbs go through, in this process."""
    from diapause.driver.qemu import frozen
    from diapause.driver.qemu.machine import QemuMachine
    from diapause.journal import Journal
    from diapause.sandbox.verb import Verb

    reaper = _Reaper(root)
    patched: list[tuple[Any, str, Callable[..., Any]]] = [
        (Verb, "execute", reaper.around_verb(Verb.execute)),
        (Verb, "_take", reaper.around_act(Verb._take)),
        (Journal, "step", reaper.around_journal(Journal.step)),
        (frozen, "freeze_and_capture", reaper.around_section(frozen.freeze_and_capture)),
        (frozen._Section, "take", reaper.around_phase(frozen._Section.take)),
        (QemuMachine, "command", reaper.around_command(QemuMachine.command)),
    ]
    for owner, name, wrapped in patched:
        setattr(owner, name, wrapped)


def main(words: list[str]) -> int:
    """The real program, mortal."""
    from diapause.cli.main import main as real

    root = Path(words[words.index("--home") + 1])
    install(root)
    if (told := root / _BOOT).exists():
        boot.SOURCE = told
    return real(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
