"""The exec stream on its WebSocket, spoken by hand: order, bounds, credit, every way to end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, unix_connect

from diapause import limits
from diapause.daemon.exec_wire import STDIN_WINDOW_BYTES
from diapause.model import RunRequest
from tests.framework.fake_engine import PATTERN
from tests.framework.fake_home import FakeHome, eventually, peak_bytes

ANSWER_S = 20


@contextmanager
def stream(
    place: FakeHome, request: object = None, name: str = "web"
) -> Iterator[ClientConnection]:
    if not place.client.sandboxes():
        place.client.run(RunRequest(name="web"))
    path, uri = str(place.home.serve_socket), f"ws://d/v1/sandboxes/{name}/exec"
    with unix_connect(path, uri, compression=None, max_size=1 << 17, close_timeout=1) as made:
        if request is not None:
            made.send(request if isinstance(request, (str, bytes)) else json.dumps(request))
        yield made


def command(*argv: str, **fields: Any) -> dict[str, Any]:
    return {"argv": argv, **fields}


def all_of(made: ClientConnection) -> tuple[bytes, bytes, dict[str, Any]]:
    """Stdout, stderr and the last report; credit is passed over."""
    out = {1: bytearray(), 2: bytearray()}
    while True:
        message = made.recv(ANSWER_S)
        if isinstance(message, bytes):
            assert len(message) <= limits.EXEC_MESSAGE_BYTES_MAX + 1
            out[message[0]] += message[1:]
            continue
        report = json.loads(message)
        if "credit" not in report:
            return bytes(out[1]), bytes(out[2]), report


def test_output_and_exit_code(place: FakeHome) -> None:
    with stream(place, command("exit", "3")) as made:
        assert all_of(made) == (b"out\n", b"err\n", {"exit": 3})
        with pytest.raises(ConnectionClosed) as closed:
            made.recv(ANSWER_S)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1000


def test_a_piece_larger_than_a_message_is_divided(place: FakeHome) -> None:
    with stream(place, command("big")) as made:
        assert all_of(made) == (PATTERN * 5 + b"tail", b"", {"exit": 0})


def test_the_request_reaches_the_engine(place: FakeHome) -> None:
    with stream(place, command("show", "a b", cwd="/data", env={"A": "1", "B": "2"})) as made:
        assert all_of(made)[0] == b"/data A=1,B=2 ['a b']\n"


def test_input_and_its_end(place: FakeHome) -> None:
    with stream(place, command("cat", stdin=True)) as made:
        made.send(b"\x00one ")
        made.send(b"\x00two")
        made.send(b"\x00")
        assert all_of(made) == (b"one two", b"", {"exit": 0})


def test_a_resize_reaches_the_command(place: FakeHome) -> None:
    with stream(place, command("size", tty=True, rows=30, cols=100)) as made:
        made.send('{"resize":[50,132]}')
        assert all_of(made) == (b"30x100\n50x132\n", b"", {"exit": 0})


def test_a_signal_passes_input_that_is_stuck(place: FakeHome) -> None:
    with stream(place, command("wait", stdin=True)) as made:
        piece = b"\x00" + PATTERN
        for _ in range(STDIN_WINDOW_BYTES // len(PATTERN)):
            made.send(piece)
        made.send('{"signal":15}')
        assert all_of(made) == (b"waiting\n", b"", {"exit": 143})


def _send_pieces(made: ClientConnection, count: int) -> None:
    for _ in range(count):
        made.send(b"\x00" + PATTERN)


def test_credit_comes_back_for_all_but_less_than_one_step(place: FakeHome) -> None:
    total = 4 * STDIN_WINDOW_BYTES
    with stream(place, command("sum", stdin=True)) as made:
        room, sent, credited = STDIN_WINDOW_BYTES, 0, 0
        while sent < total:
            if room == 0:
                credit = json.loads(made.recv(ANSWER_S))["credit"]
                room, credited = room + credit, credited + credit
                continue
            made.send(b"\x00" + PATTERN)
            room, sent = room - len(PATTERN), sent + len(PATTERN)
        made.send(b"\x00")
        out, _, _ = all_of(made)
        assert out.startswith(f"{total} ".encode())


def test_a_client_that_ignores_credit_is_held_back_in_bounded_memory(place: FakeHome) -> None:
    with stream(place, command("wait", stdin=True)) as made:
        before = peak_bytes(place.daemon_pid)
        made.socket.settimeout(1)
        with pytest.raises((ConnectionClosed, TimeoutError)):
            _send_pieces(made, 1024)
        assert peak_bytes(place.daemon_pid) - before < 16 << 20


@pytest.mark.parametrize(
    ("argv", "code"),
    [(["cut"], "exec_cut"), (["short"], "exec_cut"), (["broken"], "internal")],
)
def test_a_stream_that_was_cut_says_so_after_what_came(
    place: FakeHome, argv: list[str], code: str
) -> None:
    with stream(place, command(*argv)) as made:
        out, _, report = all_of(made)
        assert report["error"]["code"] == code
        assert out == (b"" if argv == ["broken"] else b"half")


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"\x00", "invalid_request"),
        ("{", "invalid_request"),
        ({"argv": []}, "invalid_request"),
        ({"argv": ["x"], "colour": 1}, "invalid_request"),
        ({"argv": ["a\0b"]}, "invalid_request"),
        ({"argv": ["x"], "rows": 0}, "invalid_request"),
        ({"argv": ["x" * (limits.EXEC_ARGUMENTS_BYTES_MAX + 1)]}, "invalid_request"),
        ({"argv": ["x"] * (limits.EXEC_ARGUMENTS_MAX + 1)}, "invalid_request"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(
    place: FakeHome, request_: object, code: str
) -> None:
    with stream(place, request_) as made:
        assert all_of(made)[2]["error"]["code"] == code


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x01out",
        b"\x00" + bytes(limits.EXEC_MESSAGE_BYTES_MAX + 1),
        "{",
        '{"signal":0}',
        '{"x":1}',
    ],
)
def test_a_message_that_does_not_fit_ends_the_stream(place: FakeHome, message: Any) -> None:
    with stream(place, command("wait")) as made:
        made.send(message)
        assert all_of(made)[2]["error"]["code"] == "invalid_request"


def test_input_after_its_end_ends_the_stream(place: FakeHome) -> None:
    with stream(place, command("wait", stdin=True)) as made:
        made.send(b"\x00")
        made.send(b"\x00more")
        assert all_of(made)[2]["error"]["code"] == "invalid_request"


def test_the_engines_refusal_is_the_last_report(place: FakeHome) -> None:
    with stream(place, command("cat"), name="nope") as made:
        assert all_of(made)[2]["error"]["code"] == "sandbox_not_found"


def test_a_client_that_leaves_abandons_its_session(place: FakeHome) -> None:
    with stream(place, command("wait")) as made:
        assert made.recv(ANSWER_S) == b"\x01waiting\n"
    eventually("the session's end", (place.home.root / "abandoned").exists)


def test_a_client_that_leaves_with_its_input_stuck_abandons_its_session(place: FakeHome) -> None:
    with stream(place, command("wait", stdin=True)) as made:
        for _ in range(8):
            made.send(b"\x00" + PATTERN)
        made.socket.close()
    eventually("the session's end", (place.home.root / "abandoned").exists)
