"""The `home` fixture keeps its promise: what it started ends, what it did not start stays."""

from __future__ import annotations

import subprocess

from diapause.store.home import Home
from tests.framework.fake_home import eventually
from tests.framework.processes import end_processes, processes_of


def test_only_the_homes_own_processes_end(home: Home) -> None:
    """By argument or by environment; a stranger is left alone."""
    home.serve_log.touch()
    by_environment = subprocess.Popen(["sleep", "600"])
    by_argument = subprocess.Popen(["tail", "-f", "/dev/null", home.serve_log], env={})
    stranger = subprocess.Popen(["sleep", "600"], env={})
    try:
        expected = {by_environment.pid, by_argument.pid}
        # The kernel closes what is closed on exec, which is what Popen waits for, before the words
        # of the new program can be read.
        eventually("both can be told", lambda: set(processes_of(home)) == expected)
        assert set(end_processes(home)) == expected
        assert stranger.poll() is None
    finally:
        for process in (by_environment, by_argument, stranger):
            process.kill()
            process.wait(timeout=20)


def test_a_home_is_empty_and_short(home: Home) -> None:
    """Its sockets fit inside it."""
    assert home.sockets.is_relative_to(home.root)
    assert list(home.images.iterdir()) == []
