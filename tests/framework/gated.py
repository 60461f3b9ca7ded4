"""A real daemon that stops at the beginning of a chosen step until the test lets it go on.

Run as a program it is the daemon: the product's own, but for a gate in front of each step's work.
The step is journaled by then. The gate is a file in the home that names a verb and a step.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from diapause.cli.main import main
from diapause.daemon.client import Client
from diapause.sandbox.verb import Verb
from diapause.store.home import Home
from tests.framework.fake_home import eventually
from tests.framework.sandbox import WAIT_S, Aside, Daemon

_HELD_S = 300.0  # longer than any test; a test that failed leaves no daemon that stands for ever


def _gate(home: Home) -> Path:
    return home.root / "gate"


class Gated:
    """A home whose daemon has gates; asks under operations whose ids it knows."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon, self.home = daemon, daemon.home
        self.operations: list[str] = []
        daemon.client = Client(
            daemon.home,
            lambda home: [
                sys.executable,
                __file__,
                "--home",
                str(home.root),
                "serve",
                "--detached",
            ],
            attend=self._attend,
        )

    def _attend(self, _: Client, operation: str) -> contextlib.AbstractContextManager[None]:
        self.operations.append(operation)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def held(self, verb: str, step: str, call: Callable[[], Any]) -> Iterator[Aside]:
        """The call has come to the step and stands before its work; it goes on after the block."""
        gate, held = _gate(self.home), _gate(self.home).with_suffix(".held")
        held.unlink(missing_ok=True)
        gate.write_text(f"{verb} {step}")
        aside = Aside(call)
        try:
            eventually(
                f"{verb}'s coming to {step}", lambda: held.exists() or aside.ends_within(0), WAIT_S
            )
            assert held.exists(), aside.failure
            yield aside
        finally:
            gate.unlink()

    def cancelled_in(self, verb: str, step: str, call: Callable[[], Any]) -> Exception | None:
        """Cancel the call while it stands before the work of a step; what it then raised."""
        with self.held(verb, step, call) as aside:
            self.daemon.client.cancel(self.operations[-1])
        return aside.wait()


def _open_gates(home: Home) -> None:
    take = Verb._take

    def gated(self: Verb, step: str) -> None:
        work = getattr(self, f"do_{step}")

        def do() -> None:
            gate = _gate(home)
            bound = time.monotonic() + _HELD_S
            if _reads(gate) == f"{self.name} {step}":
                gate.with_suffix(".held").touch()
            while _reads(gate) == f"{self.name} {step}" and time.monotonic() < bound:
                time.sleep(0.005)
            work()

        setattr(self, f"do_{step}", do)
        take(self, step)

    Verb._take = gated  # type: ignore[method-assign]


def _reads(gate: Path) -> str:
    try:
        return gate.read_text()
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    _open_gates(Home.at(sys.argv[2]))
    sys.exit(main())
