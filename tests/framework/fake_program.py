"""The command line and the daemon with the fake engine; `run_fake.py` is the program."""

from __future__ import annotations

import sys
from pathlib import Path

from diapause.cli.main import main
from diapause.daemon.server import serve
from diapause.store.home import Home
from tests.framework.fake_engine import FakeEngine


def fake_daemon(home: Home) -> list[str]:
    """The command of a daemon with the fake engine."""
    return [sys.executable, str(Path(__file__).with_name("run_fake.py")), "serve", str(home.root)]


def run(words: list[str]) -> int:
    """`serve HOME` is the daemon; anything else is the command line as it is."""
    if words[:1] == ["serve"]:
        return serve(Home.at(words[1]), FakeEngine.open, detached="--loud" not in words)
    return main(words, command=fake_daemon)
