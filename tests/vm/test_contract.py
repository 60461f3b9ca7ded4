"""The command line's contract on a real guest: documents, exit codes, and what goes where."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.framework.sandbox import Daemon, Sandbox
from tests.vm.test_exec import command

pytestmark = pytest.mark.vm

BOUND_S = 300.0
CAPTURE = {
    "sandbox", "snapshot", "durability", "frozen_ms", "dirty_pages", "dirty_source",
    "captured_bytes", "phases_ms",
}  # fmt: skip


def ask(daemon: Daemon, *arguments: str) -> Any:
    """Run with --json; its stdout is exactly one document."""
    done = subprocess.run(
        command(daemon, "--json", *arguments), capture_output=True, timeout=BOUND_S, check=False
    )
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def test_the_documents_of_a_life(daemon: Daemon, booted: Sandbox) -> None:
    """Every verb of a sandbox's life, its document and its keys."""
    saved = ask(daemon, "snapshot", "save", booted.id, "--name", "golden")
    assert saved.keys() >= CAPTURE
    forked = ask(daemon, "fork", "golden", "-n", "1")
    assert forked.keys() >= {"sandboxes", "snapshot"}
    [fork] = forked["sandboxes"]
    paused = ask(daemon, "pause", fork, "--durability", "process")
    assert paused.keys() >= CAPTURE
    assert paused["durability"] == "process"
    assert ask(daemon, "pause", fork)["already"] is True
    listed = ask(daemon, "ps")
    assert {"sandbox", "name", "state", "image", "memory_bytes"} <= listed[0].keys()
    assert {row["sandbox"]: row["state"] for row in listed}[fork] == "paused"
    resumed = ask(daemon, "resume", fork)
    assert resumed.keys() >= {"sandbox", "warm", "ready_ms", "source", "phases_ms"}
    assert resumed["warm"] is True
    assert ask(daemon, "resume", fork)["already"] is True
    detail = ask(daemon, "inspect", fork)
    assert detail.keys() >= {"id", "name", "state", "image", "parent", "vmm", "error"}
    assert detail["vmm"].keys() == {"kind", "version", "pid"}
    assert ask(daemon, "rm", "-f", fork)["removed"] == [fork]
    assert ask(daemon, "rm", "-f", fork)["already"] == [fork]


def test_the_documents_of_a_snapshot(daemon: Daemon, booted: Sandbox) -> None:
    """`snapshot inspect` and `ls`; builds are named once they are packed."""
    saved = booted.save("disk")
    daemon.packed(saved.snapshot)
    detail = ask(daemon, "snapshot", "inspect", saved.snapshot)
    wanted = {"id", "sandbox", "parent", "state", "durability", "pending_bytes", "devices", "error"}
    assert detail.keys() >= wanted
    assert (detail["state"], detail["pending_bytes"]) == ("packed", 0)
    for device in detail["devices"]:
        assert device.keys() >= {"name", "size", "pages", "stored_bytes", "builds"}
        assert device["pages"] * 4096 == device["size"]
        for build in device["builds"]:
            assert (daemon.home.builds / build).exists()
    assert saved.snapshot in [row["id"] for row in ask(daemon, "snapshot", "ls")]
    assert [row["name"] for row in ask(daemon, "image", "ls")] == ["tiny"]


def test_doctor_proves_what_the_host_can_do(daemon: Daemon) -> None:
    """It boots a guest, captures, resumes, tracks writes, and leaves nothing."""
    before = {row["sandbox"] for row in ask(daemon, "ps", "-a")}
    answer = ask(daemon, "doctor")
    assert answer["daemon_pid"] == daemon.pid
    checks = {check["name"]: check for check in answer["checks"]}
    for name in ("qemu", "boot", "capture", "resume"):
        assert checks[name]["ok"], checks[name]
    assert checks["tracking"]["ok"], checks["tracking"]
    assert {row["sandbox"] for row in ask(daemon, "ps", "-a")} == before


def test_a_quiesced_capture_says_what_it_did(daemon: Daemon, guest: Sandbox) -> None:
    """The guest's file systems are frozen for it, and usable afterwards."""
    saved = ask(daemon, "snapshot", "save", guest.id, "--quiesce")
    assert saved["notes"] == []
    assert guest.sh("echo after >/data/after; sync; cat /data/after").strip() == "after"
    paused = ask(daemon, "pause", guest.id, "--quiesce")
    assert paused["notes"] == []
    guest.resume()
    assert guest.sh("echo again >/data/after; sync; cat /data/after").strip() == "again"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("inspect", "nosuch"), 10),
        (("snapshot", "inspect", "nosuch"), 11),
        (("run", "--image", "nosuch"), 12),
        (("run", "--memory", "900G"), 20),
        (("run", "--net", "bridge"), 2),
        (("run", "--memory", "lots"), 2),
        (("nosuchverb",), 2),
    ],
)
def test_errors_have_their_exit_codes(
    daemon: Daemon, arguments: tuple[str, ...], code: int
) -> None:
    """And say what happened, on stderr."""
    done = subprocess.run(
        command(daemon, *arguments), capture_output=True, timeout=BOUND_S, check=False
    )
    assert done.returncode == code, done
    assert done.stderr
    assert not done.stdout
