"""Every verb's contract: one JSON document, data on stdout, talk on stderr, the right exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
from typing import Any

import pytest

from diapause.cli.main import cli
from tests.framework.fake_home import PROGRAM, FakeHome

CAPTURE = {
    "sandbox", "snapshot", "durability", "frozen_ms", "dirty_pages", "dirty_source",
    "captured_bytes", "phases_ms",
}  # fmt: skip


def test_every_verb_answers_json_with_the_contracts_fields(place: FakeHome) -> None:
    assert place.json("run").keys() >= {"sandbox"}
    web = place.sandbox("web")
    assert place.json("pause", "web").keys() >= CAPTURE
    assert place.json("resume", "web").keys() >= {
        "sandbox", "warm", "ready_ms", "source", "phases_ms",
    }  # fmt: skip
    assert place.json("freeze", "web").keys() >= {"sandbox", "frozen", "already"}
    assert place.json("thaw", "web")["frozen"] is False
    assert place.json("restore", "web", "5a") == {
        "sandbox": web, "snapshot": "5a", "saved": "5aved", "state": "running", "phases_ms": {},
        "already": False, "notes": [],
    }  # fmt: skip
    saved = place.json("snapshot", "save", "web", "--name", "before")
    assert saved.keys() >= CAPTURE
    forked = place.json("fork", "web", "-n", "3")
    assert len(forked["sandboxes"]) == 3
    assert forked["snapshot"]
    rows = place.json("ps")
    assert len(rows) == 5
    assert rows[0].keys() >= {"sandbox", "name", "state", "image", "memory_bytes"}
    assert place.json("inspect", "web").keys() >= {
        "id", "name", "state", "image", "parent", "vmm", "error",
    }  # fmt: skip
    assert place.json("snapshot", "inspect", saved["snapshot"]).keys() >= {
        "id", "sandbox", "parent", "state", "durability", "pending_bytes", "devices", "error",
    }  # fmt: skip
    assert place.json("snapshot", "ls")[-1]["id"] == saved["snapshot"]
    assert place.json("image", "build", "tiny")["name"] == "tiny"
    brought = place.json("image", "import", "own", "--kernel", "vmlinuz", "--rootfs", "tree")
    assert (brought["name"], brought["flavor"]) == ("own", "imported")
    assert place.json("image", "ls")[0]["name"] == "tiny"
    assert place.json("doctor").keys() >= {"checks", "daemon_pid", "pager_pid"}
    measured = place.json("bench", "--rounds", "2")
    assert measured.keys() == {"rounds", "accelerator", "rows", "notes"}
    assert all(
        row.keys() == {"group", "name", "unit", "values", "median", "peer", "ratio", "notes"}
        for row in measured["rows"]
    )
    assert measured["rows"][1]["peer"] == {
        "name": "boot", "values": [1600.0, 1200.0], "median": 1200.0,
    }  # fmt: skip
    assert place.json("logs", "web") == {"log": ""}
    assert place.json("rm", "-f", "web") == {"removed": [web], "already": []}
    assert place.json("rm", web) == {"removed": [], "already": [web]}


@pytest.mark.parametrize("words", [["--json", "ps"], ["ps", "--json"], ["image", "--json", "ls"]])
def test_json_is_understood_before_and_after_the_verb(place: FakeHome, words: list[str]) -> None:
    done = place.run(*words)
    assert done.returncode == 0
    assert isinstance(json.loads(done.stdout), list)


def test_run_prints_the_id_alone(place: FakeHome) -> None:
    done = place.run("run", "--name", "web", "--memory", "1G", "--disk", "2GiB", "--cpus", "2")
    assert done.stdout == b"ab0001\n"
    assert b"web is ready" in done.stderr
    detail = place.json("inspect", "web")
    assert (detail["memory_bytes"], detail["disk_bytes"], detail["cpus"]) == (1 << 30, 2 << 30, 2)


def test_people_read_one_line_with_the_figures(place: FakeHome) -> None:
    place.sandbox()
    paused = place.run("pause", "web").stdout.decode()
    assert paused.splitlines() == [
        "paused ab0001: frozen 1.5 ms, 1834 dirty pages (tracked), 7.2 MiB captured,"
        " durable to disk; snapshot 5a0000"
    ]
    assert b"was paused already" in place.run("pause", "web").stdout
    resumed = place.run("resume", "web")
    assert resumed.stdout == b"resumed ab0001: warm, ready in 3.2 ms from local\n"
    assert resumed.stderr == b"clock set\n"
    assert place.run("resume", "web").stdout == b"ab0001 ran already\n"
    assert place.run("freeze", "web").stdout == b"froze ab0001 in 1.5 ms\n"
    assert place.run("freeze", "web").stdout == b"ab0001 was frozen already\n"
    assert place.run("thaw", "web").stdout == b"thawed ab0001 in 1.5 ms\n"
    restored = place.run("restore", "web", "5a", "--discard").stdout.decode()
    assert restored.endswith("running; what it was before is not saved\n")
    assert place.run("fork", "web", "-n", "2").stdout == b"ab0002\nab0003\n"


def test_tables_are_plain_columns_where_nobody_looks(place: FakeHome) -> None:
    place.sandbox()
    lines = place.run("ps").stdout.decode().splitlines()
    assert lines[0].split() == [
        "SANDBOX", "NAME", "STATE", "IMAGE", "MEMORY", "SNAPSHOT", "CREATED",
    ]  # fmt: skip
    assert lines[1].split()[:4] == ["ab0001", "web", "running", "tiny"]
    assert place.run("ps", "-aq").stdout == b"ab0001\n"
    assert b"IMAGE" in place.run("image", "ls").stdout
    assert b"SNAPSHOT" in place.run("snapshot", "ls").stdout


def test_inspect_is_readable_json_without_a_raw_escape(place: FakeHome) -> None:
    place.sandbox()
    done = place.run("inspect", "web")
    assert b"\x1b" not in done.stdout
    assert json.loads(done.stdout)["hostname"] == "\x1b[31mred"
    assert len(done.stdout.splitlines()) > 10


def test_doctor_fails_only_for_what_is_required(place: FakeHome) -> None:
    done = place.run("doctor")
    assert done.returncode == 0
    assert b"no /dev/kvm" in done.stdout
    (place.home.root / "broken").touch()
    done = place.run("doctor")
    assert done.returncode == 1
    assert b"apt-get install qemu" in done.stderr
    assert place.json("doctor", code=1)["checks"][0]["ok"] is False


def test_bench_is_a_table_with_peers(place: FakeHome) -> None:
    done = place.run("bench", "--rounds", "2")
    lines = done.stdout.decode().splitlines()
    assert [line.split("  ") for line in map(_closer, lines)] == [
        ["GROUP", "WHAT", "MEDIAN", "LEAST TO MOST", "AGAINST", "RATIO"],
        ["cycle", "boot", "1,200 ms", "1,200 to 1,600"],
        ["cycle", "resume", "60 ms", "boot: 1,200 ms", "1/20"],
        ["pager", "fault", "14 us", "flat: 1.2 us", "12"],
    ]
    assert done.stderr.decode().splitlines() == [
        "\\x1b[31mnot all", "medians of 2 rounds; guests ran under tcg", "warm",
    ]  # fmt: skip
    assert [row["name"] for row in place.json("bench", "pager", "pager")["rows"]] == ["fault"]
    (place.home.root / "no-pager").touch()
    assert place.json("bench", "pager", code=43)["error"]["code"] == "pager_unavailable"
    assert place.run("bench", "all").returncode == 2
    assert place.run("bench", "--rounds", "21").returncode == 2
    assert place.run("bench", "--rounds", "0").returncode == 2


def _closer(line: str) -> str:
    """Columns two spaces apart."""
    return re.sub(" {2,}", "  ", line)


@pytest.mark.parametrize(
    ("words", "code", "name"),
    [
        (["inspect", "nope"], 10, "sandbox_not_found"),
        (["pause", "nope"], 10, "sandbox_not_found"),
        (["resume", "ab"], 13, "ambiguous_reference"),
        (["snapshot", "inspect", "nope"], 11, "snapshot_not_found"),
        (["run", "--name", "web"], 14, "name_in_use"),
        (["rm", "web"], 15, "wrong_state"),
        (["run", "--net", "bridge"], 2, "invalid_request"),
        (["run", "-p", "80:80"], 2, "invalid_request"),
        (["resume", "web", "--memory-mode", "ondemand"], 2, "not_supported"),
        (["logs", "nope"], 10, "sandbox_not_found"),
        (["inspect", "a/b"], 2, "invalid_request"),
        (["bogus"], 2, "invalid_request"),
        (["run", "--memory", "lots"], 2, "invalid_request"),
        (["fork", "web", "-n", "0"], 2, "invalid_request"),
        (["fork", "web", "-n", "9999"], 2, "invalid_request"),
        (["pause", "web", "--durability", "hope"], 2, "invalid_request"),
        (["rm"], 2, "invalid_request"),
    ],
)
def test_errors_have_their_exit_code_text_and_document(
    place: FakeHome, words: list[str], code: int, name: str
) -> None:
    place.sandbox("web")
    place.sandbox("db")
    plain = place.run(*words)
    assert (plain.returncode, plain.stdout) == (code, b"")
    assert plain.stderr.startswith((b"diapause: ", b"Usage: "))
    assert b"Traceback" not in plain.stderr
    document = place.json(*words, code=code)
    assert document["error"]["code"] == name


def test_rm_goes_on_after_a_failure(place: FakeHome) -> None:
    first, second = place.sandbox("a"), place.sandbox("b")
    done = place.run("rm", "-f", "a", "nope", "b")
    assert done.returncode == 10
    assert done.stdout.decode().split() == [first, second]
    assert b"no sandbox 'nope'" in done.stderr


def test_logs_are_raw_where_nobody_looks(place: FakeHome) -> None:
    path = place.home.sandbox(place.sandbox()) / "console.log"
    path.parent.mkdir()
    path.write_bytes(b"\x1b[31mboot\xff\r\n" * 10_000)
    assert place.run("logs", "web").stdout == path.read_bytes()
    assert place.json("logs", "web")["log"].startswith("\x1b[31mboot\ufffd\r\n")


def test_logs_are_escaped_on_a_terminal(place: FakeHome) -> None:
    path = place.home.sandbox(place.sandbox()) / "console.log"
    path.parent.mkdir()
    path.write_bytes(b"\x1b]0;title\x07 \xc2\x9b31m ok\r\nover\rwritten\n")
    master, terminal = os.openpty()
    with os.fdopen(master, "rb", buffering=0) as reading:
        process = place.spawn("logs", "web", stdout=terminal)
        os.close(terminal)
        assert process.wait(30) == 0
        shown = reading.read(4096)
    assert shown == b"\\x1b]0;title\\x07 \\x9b31m ok\r\nover\\x0dwritten\r\n"


def test_tables_on_a_terminal_show_the_same_cells(place: FakeHome) -> None:
    place.sandbox()
    master, terminal = os.openpty()
    with os.fdopen(master, "rb", buffering=0) as reading:
        process = place.spawn("ps", stdout=terminal, env={**os.environ, "COLUMNS": "200"})
        os.close(terminal)
        assert process.wait(30) == 0
        shown = reading.read(65536)
    assert b"ab0001" in shown
    assert b"SANDBOX" in shown


def test_a_reader_that_left_ends_the_program_quietly(place: FakeHome) -> None:
    path = place.home.sandbox(place.sandbox()) / "console.log"
    path.parent.mkdir()
    path.write_bytes(bytes(4 << 20))
    process = place.spawn("logs", "web")
    assert process.stdout is not None
    assert process.stdout.read(10) == bytes(10)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(30) == 141


def test_follow_ends_with_an_interrupt(place: FakeHome) -> None:
    path = place.home.sandbox(place.sandbox()) / "console.log"
    path.parent.mkdir()
    path.write_bytes(b"first\n")
    process = place.spawn("logs", "-f", "web")
    assert process.stdout is not None
    assert process.stdout.readline() == b"first\n"
    process.send_signal(2)
    assert process.wait(30) == 130


def test_the_home_comes_from_the_flag_or_the_environment(place: FakeHome) -> None:
    place.sandbox()
    command = [*PROGRAM, "ps", "-q"]
    environment = {**os.environ, "DIAPAUSE_HOME": str(place.home.root)}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert done.stdout == b"ab0001\n", done


def _verbs(group: Any = cli, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    import click

    context = click.Context(group)
    found: list[tuple[str, ...]] = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        nested = isinstance(command, click.Group)
        found += _verbs(command, (*path, name)) if nested else [(*path, name)]
    return found


VERBS = _verbs()


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_every_verb_has_help_that_ends_with_examples(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main([*words, "--help"], prog_name="diapause", standalone_mode=False)
    text = capsys.readouterr().out
    assert "Examples:" in text
    assert f"diapause {' '.join(words)}" in text.split("Examples:")[1] or words == ("serve",)


def test_the_verbs_are_those_of_the_contract() -> None:
    assert {" ".join(words) for words in VERBS} == {
        "doctor", "bench", "image build", "image ls", "run", "ps", "inspect", "logs", "exec", "rm",
        "image import", "image inspect", "image rm",
        "pause", "resume", "fork", "snapshot save", "snapshot ls", "snapshot inspect", "serve",
        "freeze", "thaw", "restore",
        "completion", "events",
        "cp", "console",
        "support-bundle", "system reset", "pager",
        "snapshot rm", "gc", "check", "df", "snapshot verify", "snapshot diff", "snapshot tree",
    }  # fmt: skip
