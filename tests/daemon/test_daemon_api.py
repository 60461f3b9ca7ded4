"""The API over its real socket: every failure is typed JSON, nothing unbounded is taken in."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from diapause import limits
from diapause.daemon.start import try_connect
from diapause.errors import (
    AmbiguousReference,
    InvalidRequest,
    NameInUse,
    NotSupportedYet,
    SandboxNotFound,
    SnapshotNotFound,
    WrongState,
)
from diapause.model import CaptureRequest, ForkRequest, ImageBuildRequest, ResumeRequest, RunRequest
from tests.framework.fake_home import FakeHome, eventually


def connection(place: FakeHome) -> http.client.HTTPConnection:
    place.client.sandboxes()
    connected = try_connect(place.home)
    assert connected is not None
    made = http.client.HTTPConnection("diapause")
    made.sock = connected
    return made


def ask(
    place: FakeHome, method: str, path: str, body: bytes | None = None
) -> tuple[int, dict[str, str], Any]:
    made = connection(place)
    made.request(method, path, body, {"Connection": "close"})
    response = made.getresponse()
    raw = response.read()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return response.status, headers, json.loads(raw) if raw else None


def test_verbs_come_back_as_their_types(place: FakeHome) -> None:
    client = place.client
    made = client.run(RunRequest(name="web", cpus=2))
    assert client.inspect("web").cpus == 2
    paused = client.pause(made.sandbox[:6], CaptureRequest(durability="process"))
    assert (paused.durability, paused.already) == ("process", False)
    assert client.pause("web", CaptureRequest()).already
    assert client.resume("web", ResumeRequest()).warm
    saved = client.save("web", CaptureRequest(name="before"))
    assert client.inspect_snapshot(saved.snapshot).name == "before"
    assert len(client.snapshots()) == 3
    assert len(client.fork(ForkRequest(source="web", count=3)).sandboxes) == 3
    assert len(client.sandboxes(everything=True)) == 4
    assert client.build_image(ImageBuildRequest(name="mine", flavor="tiny")).flavor == "tiny"
    assert client.images()[0].name == "tiny"
    assert client.doctor().checks[0].ok
    assert client.remove("web", force=True).removed == [made.sandbox]
    assert client.remove(made.sandbox).already == [made.sandbox]


def test_the_engines_errors_come_back_as_their_classes(place: FakeHome) -> None:
    client = place.client
    client.run(RunRequest(name="web"))
    client.run(RunRequest())
    with pytest.raises(SandboxNotFound) as unknown:
        client.inspect("nope")
    assert unknown.value.fields["candidates"] == ["ab0001", "ab0002"]
    with pytest.raises(AmbiguousReference, match=r"ab0001.*ab0002"):
        client.pause("ab", CaptureRequest())
    with pytest.raises(SnapshotNotFound):
        client.inspect_snapshot("nope")
    with pytest.raises(NameInUse):
        client.run(RunRequest(name="web"))
    with pytest.raises(NotSupportedYet):
        client.resume("web", ResumeRequest(memory_mode="ondemand"))
    with pytest.raises(WrongState):
        client.remove("web")


@pytest.mark.parametrize("reference", ["", "a/b", "x" * (limits.REFERENCE_LENGTH_MAX + 1)])
def test_a_reference_that_can_not_be_one_is_refused(place: FakeHome, reference: str) -> None:
    with pytest.raises(InvalidRequest, match="id or name"):
        place.client.inspect(reference)


@pytest.mark.parametrize("reference", ["..", "é\x1b[31m", "a b?c#d%2e", "-f"])
def test_any_other_reference_reaches_the_engine_whole(place: FakeHome, reference: str) -> None:
    with pytest.raises(SandboxNotFound) as unknown:
        place.client.inspect(reference)
    assert unknown.value.fields["reference"] == reference


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b'{"source":1}', b'{"source":"a","n":1}', b"\xff", b'{"count":2}'],
)
def test_a_body_that_does_not_fit_is_refused(place: FakeHome, body: bytes) -> None:
    status, headers, answer = ask(place, "POST", "/v1/forks", body)
    assert (status, answer["error"]["code"]) == (400, "invalid_request")
    assert headers["content-type"] == "application/json"


def test_a_body_that_is_too_large_is_refused_before_it_is_read_whole(place: FakeHome) -> None:
    made = connection(place)
    made.putrequest("POST", "/v1/forks")
    made.putheader("Content-Length", str(1 << 40))
    made.endheaders(b"x" * (limits.REQUEST_BODY_BYTES_MAX + 1))
    response = made.getresponse()
    answer = json.loads(response.read())
    assert (response.status, answer["error"]["code"]) == (400, "invalid_request")


def test_a_body_where_none_belongs_is_refused(place: FakeHome) -> None:
    assert ask(place, "GET", "/v1/sandboxes", b"{}")[0] == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/sandboxes", 404),
        ("GET", "/", 404),
        ("GET", "/v1/sandboxes/", 404),
        ("PUT", "/v1/sandboxes", 405),
        ("DELETE", "/v1/forks", 405),
        ("GET", "/v1/sandboxes?all=perhaps", 400),
        ("GET", "/v1/sandboxes?al=true", 400),
        ("GET", "/v1/images?all=true", 400),
        ("GET", "/v1/sandboxes/" + "x" * 129, 400),
        ("GET", "/v1/sandboxes/x/exec", 426),
    ],
)
def test_what_the_api_has_not_is_a_typed_error(
    place: FakeHome, method: str, path: str, status: int
) -> None:
    got, headers, answer = ask(place, method, path)
    assert (got, answer["error"]["code"]) == (status, "invalid_request")
    if status == 405:
        assert "POST" in headers["allow"]


def test_a_defect_is_typed_too_and_logged_whole(place: FakeHome) -> None:
    status, _, answer = ask(place, "GET", "/v1/sandboxes/defect")
    assert (status, answer["error"]["code"]) == (500, "internal")
    assert "ValueError: a defect" in answer["error"]["message"]
    eventually("the log", lambda: "Traceback" in place.home.serve_log.read_text())
    assert place.client.sandboxes() == []


def test_bytes_that_are_no_http_do_not_disturb_others(place: FakeHome) -> None:
    place.client.sandboxes()
    connected = try_connect(place.home)
    assert connected is not None
    with connected:
        connected.sendall(b"\x00\xff" * 100_000 + b"\r\n\r\n")
        assert b"400" in connected.recv(4096)
    assert place.client.sandboxes() == []


def test_the_system_route_tells_the_daemon_apart(place: FakeHome) -> None:
    status, _, answer = ask(place, "GET", "/v1/system")
    assert status == 200
    assert answer == {
        "version": "0.1.0",
        "pid": place.daemon_pid,
        "home": str(place.home.root),
        "ready": True,
    }


def test_the_log_is_streamed_raw_and_whole(place: FakeHome) -> None:
    sandbox = place.client.run(RunRequest()).sandbox
    path = place.home.sandbox(sandbox) / "console.log"
    assert list(place.client.logs(sandbox)) == []
    written = bytes(range(256)) * 4096
    path.write_bytes(written)
    assert b"".join(place.client.logs(sandbox)) == written
    with pytest.raises(SandboxNotFound):
        list(place.client.logs("nope"))


def test_following_a_log_survives_growth_and_truncation_and_ends_with_its_sandbox(
    place: FakeHome,
) -> None:
    sandbox = place.client.run(RunRequest()).sandbox
    path = place.home.sandbox(sandbox) / "console.log"
    path.parent.mkdir()
    path.write_bytes(b"first\n")
    got = bytearray()

    def follow() -> None:
        for chunk in place.client.logs(sandbox, follow=True):
            got.extend(chunk)

    reader = threading.Thread(target=follow)
    reader.start()
    eventually("the first line", lambda: got == b"first\n")
    with path.open("ab") as file:
        file.write(b"second\n")
    eventually("the second line", lambda: got == b"first\nsecond\n")
    path.write_bytes(b"anew\n")
    eventually("the line after the truncation", lambda: got.endswith(b"second\nanew\n"))
    shutil.rmtree(path.parent)
    reader.join(20)
    assert not reader.is_alive()


def test_following_a_log_ends_when_its_reader_leaves(place: FakeHome) -> None:
    sandbox = place.client.run(RunRequest()).sandbox
    path = place.home.sandbox(sandbox) / "console.log"
    path.parent.mkdir()
    path.write_bytes(b"line\n")
    connected = try_connect(place.home)
    assert connected is not None
    with connected:
        connected.sendall(
            f"GET /v1/sandboxes/{sandbox}/logs?follow=true HTTP/1.1\r\nHost: d\r\n\r\n".encode()
        )
        eventually("the line", lambda: b"line" in connected.recv(4096, socket.MSG_PEEK))
    before = place.daemon_pid
    # A follower that stayed would keep the daemon from ending at once.
    eventually("no connection left", lambda: _connections(place) == 0)
    assert place.daemon_pid == before


def _connections(place: FakeHome) -> int:
    """How many accepted connections the daemon has, by the kernel's own list."""
    with Path("/proc/net/unix").open() as file:
        path = str(place.home.serve_socket)
        named = [
            line.split() for line in file if line.rstrip().endswith((path, path[:-5] + ".new"))
        ]
    return sum(1 for line in named if line[5] == "03")
