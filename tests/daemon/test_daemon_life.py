"""One daemon a home: started by whoever comes first, ended by a signal, replaced when killed."""

import asyncio
import os
import signal
import socket
import stat
import threading

import pytest

from diapause.daemon.start import try_connect
from diapause.daemon.state import State
from diapause.errors import DaemonUnreachable, HomeNewer
from diapause.model import CaptureRequest, RunRequest
from tests.framework.fake_engine import FakeEngine
from tests.framework.fake_home import FakeHome, eventually, gone


def test_twenty_clients_that_race_start_one_daemon(place: FakeHome) -> None:
    clients = [place.spawn("ps", "--json") for _ in range(20)]
    answers = [client.communicate(timeout=60) for client in clients]
    assert [client.returncode for client in clients] == [0] * 20, answers
    assert {out for out, _ in answers} == {b"[]\n"}
    assert place.opened() == 1


def test_the_socket_and_what_is_beside_it_are_closed_to_others(place: FakeHome) -> None:
    before = os.umask(0)
    try:
        assert place.client.sandboxes() == []
    finally:
        os.umask(before)
    for path, mode in (
        (place.home.serve_socket, 0o600),
        (place.home.sockets, 0o700),
        (place.home.root, 0o700),
        (place.home.serve_lock, 0o600),
        (place.home.serve_log, 0o600),
    ):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path
    assert stat.S_ISSOCK(place.home.serve_socket.stat().st_mode)


def test_a_killed_daemon_is_followed_by_another(place: FakeHome) -> None:
    place.client.sandboxes()
    first = place.daemon_pid
    os.kill(first, signal.SIGKILL)
    eventually("the end of the first", lambda: gone(first))
    assert place.home.serve_socket.exists(), "a kill leaves the stale socket"
    assert place.client.sandboxes() == []
    assert place.daemon_pid != first
    assert place.opened() == 2


def test_a_client_whose_daemon_dies_under_it_says_so(place: FakeHome) -> None:
    place.client.run(RunRequest(name="web"))
    (place.home.root / "stall").touch()
    client = place.spawn("pause", "web", "--json")
    eventually("the verb's begin", (place.home.root / "stalled").exists)
    os.kill(place.daemon_pid, signal.SIGKILL)
    out, err = client.communicate(timeout=30)
    assert client.returncode == DaemonUnreachable.exit_code
    assert b'"code":"daemon_unreachable"' in out
    assert b"went away" in err


def test_sigterm_waits_for_the_verb_under_way_and_closes_the_engine(place: FakeHome) -> None:
    place.client.run(RunRequest(name="web"))
    (place.home.root / "stall").touch()
    client = place.spawn("pause", "web", "--json")
    eventually("the verb's begin", (place.home.root / "stalled").exists)
    pid = place.daemon_pid
    os.kill(pid, signal.SIGTERM)
    eventually("the end of accepting", lambda: try_connect(place.home) is None)
    assert not gone(pid)
    (place.home.root / "stall").unlink()
    out, _ = client.communicate(timeout=30)
    assert client.returncode == 0
    assert b'"snapshot"' in out
    eventually("the end of the daemon", lambda: gone(pid))
    assert (place.home.root / "closed").exists()
    assert not place.home.serve_socket.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_daemon_in_the_foreground_ends_with_0(place: FakeHome, number: int) -> None:
    daemon = place.serve("--loud")
    eventually("listening", place.home.serve_socket.exists)
    assert place.client.sandboxes() == []
    daemon.send_signal(number)
    _, err = daemon.communicate(timeout=20)
    assert daemon.returncode == 0, err
    assert b"Traceback" not in err


def test_the_loser_of_the_race_leaves_quietly(place: FakeHome) -> None:
    place.client.sandboxes()
    quiet, loud = place.serve(), place.serve("--loud")
    assert quiet.communicate(timeout=20) == (b"", b"")
    out, err = loud.communicate(timeout=20)
    assert (out, quiet.returncode, loud.returncode) == (b"", 0, 0)
    assert b"runs already" in err
    assert place.opened() == 1
    assert place.client.sandboxes() == [], "the loser left the winner's socket alone"


def test_an_engine_that_does_not_close_is_left(place: FakeHome) -> None:
    async def scenario() -> bool:
        place.home.create()
        state = State(place.home, FakeEngine.open)
        await state.open()
        (place.home.root / "stall").touch()
        closed = await state.close(0.2)
        (place.home.root / "stall").unlink()
        await asyncio.to_thread(eventually, "the end", (place.home.root / "closed").exists)
        return closed

    assert asyncio.run(scenario()) is False
    assert (place.home.root / "closed").exists()


def test_a_verb_goes_on_without_its_client(place: FakeHome) -> None:
    place.client.run(RunRequest(name="web"))
    (place.home.root / "stall").touch()
    client = place.spawn("pause", "web")
    eventually("the verb's begin", (place.home.root / "stalled").exists)
    client.kill()
    client.communicate(timeout=60)
    (place.home.root / "stall").unlink()
    eventually("the pause", lambda: place.client.inspect("web").state == "paused")


def test_reads_answer_beside_a_long_verb(place: FakeHome) -> None:
    """More verbs than there are threads, on three sandboxes that are stuck."""
    names = ["web", "db", "job"]
    for name in names:
        place.client.run(RunRequest(name=name))
    (place.home.root / "stall").touch()
    pauses = [
        threading.Thread(target=place.client.pause, args=(name, CaptureRequest()))
        for name in names * 24
    ]
    for pause in pauses:
        pause.start()
    eventually("the verb's begin", (place.home.root / "stalled").exists)
    assert [row.name for row in place.client.sandboxes()] == names
    (place.home.root / "stall").unlink()
    for pause in pauses:
        pause.join(30)
    assert not any(pause.is_alive() for pause in pauses)


def test_a_home_that_does_not_open_is_told_to_the_client(place: FakeHome) -> None:
    place.home.create()
    (place.home.root / "newer").touch()
    done = place.run("ps", "--json")
    assert done.returncode == HomeNewer.exit_code
    assert b'"code":"home_newer"' in done.stdout
    eventually("the daemon's end", lambda: gone(place.daemon_pid))
    (place.home.root / "newer").unlink()
    assert place.json("ps") == []


def test_a_daemon_that_dies_at_its_start_is_an_error_with_its_last_words(place: FakeHome) -> None:
    place.home.create()
    place.home.serve_lock.mkdir()
    with pytest.raises(DaemonUnreachable, match=r"exited with 1.*Is a directory"):
        place.client.sandboxes()
    place.home.serve_lock.rmdir()


def test_a_socket_directory_that_others_can_write_is_refused(place: FakeHome) -> None:
    place.home.create()
    place.home.sockets.chmod(0o777)
    with pytest.raises(DaemonUnreachable, match="does not belong to this user alone"):
        place.client.sandboxes()
    assert place.opened() == 0


def test_a_socket_that_nobody_serves_is_replaced(place: FakeHome) -> None:
    place.home.create()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(place.home.serve_socket))
    assert place.client.sandboxes() == []


def test_a_large_log_is_set_aside(place: FakeHome) -> None:
    place.home.create()
    with place.home.serve_log.open("wb") as log:
        log.truncate(17 << 20)
    place.client.sandboxes()
    assert place.home.serve_log.stat().st_size < 1 << 20
    assert place.home.serve_log.with_suffix(".log.1").stat().st_size == 17 << 20
