"""The daemon's log: JSON lines, bounded, without what clients hand to guests."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from diapause.daemon import log
from diapause.operation import Operation, under
from diapause.store.home import Home
from tests.framework.fake_home import FakeHome, eventually


def lines(home: Home) -> list[dict[str, Any]]:
    """Every line of the log; fails where one is no JSON object."""
    return [json.loads(line) for line in home.serve_log.read_text().splitlines()]


def record(message: str, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("diapause.test", logging.INFO, __file__, 1, message, (), None)
    made.__dict__.update(extra)
    return made


def test_every_line_is_a_document_with_the_same_first_fields(place: FakeHome) -> None:
    place.sandbox("web")
    place.json("pause", "web")
    found = lines(place.home)
    assert len(found) >= 3
    for line in found:
        assert list(line)[:4] == ["at", "level", "logger", "message"]
        assert line["at"].endswith("Z")
    assert any("pauseSandbox" in line["message"] for line in found)


def test_what_a_client_hands_to_a_guest_is_not_in_the_log(place: FakeHome) -> None:
    web = place.sandbox()
    secret = "hunter2-secret"
    place.run("exec", "-i", "-e", f"TOKEN={secret}", web, "--", "show", secret, given=b"hunter2-in")
    place.run("exec", "-e", f"TOKEN={secret}", web, "--", "broken")
    eventually("the log", lambda: "an exec stream failed" in place.home.serve_log.read_text())
    assert "hunter2" not in place.home.serve_log.read_text()


def test_a_daemon_in_the_foreground_tells_people_and_keeps_its_log(place: FakeHome) -> None:
    serving = place.serve("--loud")
    try:
        eventually("the socket", place.home.serve_socket.exists)
        place.client.sandboxes()
    finally:
        serving.terminate()
        _, said = serving.communicate(timeout=60)
    assert b"INFO diapause.daemon: " in said
    messages = [line["message"] for line in lines(place.home)]
    assert any(message.startswith("diapause ") for message in messages)
    assert messages[-1].endswith("is done")


def test_two_files_of_the_limit_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "LOG_BYTES_MAX", 4096)
    path = tmp_path / "serve.log"
    handler = log.LogFile(path)
    for number in range(500):
        handler.handle(record(f"line {number}"))
    handler.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["serve.log", "serve.log.1"]
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 2 * 4096
    assert json.loads(path.read_text().splitlines()[-1])["message"] == "line 499"


def test_a_line_that_cannot_be_written_is_counted_and_fails_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handler = log.LogFile(Path("/dev/full"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    handler.handle(record("for nobody"))
    handler.handle(record("for nobody"))
    assert log.dropped_lines() == 2


def test_a_text_is_bounded_and_printable_whatever_is_in_it() -> None:
    found = log.document(record("x" * 100_000 + "the end"))
    assert len(found["message"]) < 10_000
    assert found["message"].endswith("the end")
    odd = log.document(record("a name \udcff\x1b[31m"))
    assert json.loads(json.dumps(odd))["message"].startswith("a name \\udcff")


def test_a_line_has_the_id_of_what_a_client_asked_for() -> None:
    asked = Operation("pause")
    with under(asked):
        assert log.document(record("x"))["operation"] == asked.id
        assert log.document(record("x", operation="0f"))["operation"] == "0f"
    assert "operation" not in log.document(record("x"))


def test_only_known_fields_are_taken() -> None:
    found = log.document(record("x", operation="0f", sandbox="ab", argv=["secret"]))
    assert (found["operation"], found["sandbox"]) == ("0f", "ab")
    assert "argv" not in found
