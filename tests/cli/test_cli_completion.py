"""Completion: what a shell is told, and that asking neither starts a daemon nor waits for one."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

import click
import pytest

from diapause.cli.completion import SHELLS, Reference
from diapause.cli.main import cli
from tests.cli.test_cli_help import commands
from tests.framework.fake_home import PROGRAM, FakeHome


def ask(place: FakeHome, *words: str, environment: dict[str, str] | None = None) -> list[str]:
    """What bash would offer for the last of the words."""
    line = ["diapause", *words]
    done = subprocess.run(
        PROGRAM,
        env={
            **os.environ, **(environment or {"DIAPAUSE_HOME": str(place.home.root)}),
            "_DIAPAUSE_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(line), "COMP_CWORD": str(len(line) - 1),
        },
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done
    return [line.partition(",")[2] for line in done.stdout.split()]


def test_verbs_options_and_groups(place: FakeHome) -> None:
    assert sorted(ask(place, "pa")) == ["pager", "pause"]
    assert ask(place, "bench", "") == ["cycle", "pager"]
    assert "--durability" in ask(place, "pause", "--")
    assert ask(place, "snapshot", "sa") == ["save"]
    assert ask(place, "completion", "") == list(SHELLS)
    assert not place.home.serve_lock.exists()


def test_names_come_from_a_daemon_that_runs(place: FakeHome) -> None:
    place.sandbox("web")
    place.sandbox("worker")
    place.json("pause", "web")
    place.json("snapshot", "save", "worker", "--name", "before")
    assert ask(place, "pause", "w") == ["web", "worker"]
    assert ask(place, "pause", "we") == ["web"]
    assert ask(place, "snapshot", "inspect", "b") == ["before"]
    assert ask(place, "run", "--image", "") == ["tiny"]
    assert {"web", "before"} <= set(ask(place, "fork", ""))
    home = str(place.home.root)
    assert ask(place, "--home", home, "rm", "wo", environment={"X": "1"}) == ["worker"]


def test_asking_starts_no_daemon(place: FakeHome) -> None:
    place.home.create()
    assert ask(place, "pause", "") == []
    assert place.opened() == 0


def test_a_daemon_that_hangs_is_not_waited_for(place: FakeHome) -> None:
    place.sandbox("web")
    place.client.sandboxes()
    os.kill(place.daemon_pid, 19)
    try:
        began = time.monotonic()
        assert ask(place, "pause", "") == []
        assert time.monotonic() - began < 30
    finally:
        os.kill(place.daemon_pid, 18)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell(place: FakeHome, shell: str) -> None:
    done = place.run("completion", shell)
    assert done.returncode == 0, done
    assert b"_DIAPAUSE_COMPLETE" in done.stdout
    assert place.json("completion", shell)["script"].strip() == done.stdout.decode().strip()
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=done.stdout, check=True, timeout=60)


def test_an_argument_that_names_something_is_completed() -> None:
    completed = set()
    for words in commands():
        context = click.Context(cli, resilient_parsing=True)
        command: click.Command = cli
        for word in words:
            assert isinstance(command, click.Group)
            found = command.get_command(context, word)
            assert found is not None
            command = found
        names = {p.name for p in command.params if isinstance(p.type, Reference)}
        completed |= {f"{' '.join(words)} {name}" for name in names}
    assert completed >= {
        "inspect sandbox", "exec sandbox", "rm sandboxes", "fork source", "run image",
        "snapshot save sandbox", "snapshot inspect snapshot",
    }  # fmt: skip
