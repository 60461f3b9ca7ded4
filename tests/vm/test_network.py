"""`--net user`: what a guest reaches, what reaches it, and what pauses and forks do to that.

The daemon and its VMMs live in a network namespace of the test's: the "world" is an address in it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from diapause.driver.qemu.network import preloaded, refused_forward, resolvers
from diapause.errors import InvalidRequest, PortUnavailable, VmmFailed
from diapause.guest.images import Image
from diapause.model import ForkRequest, RunRequest
from diapause.units import MIB
from tests.framework.fake_home import eventually
from tests.framework.netns import ADDRESS, NetworkNamespace, Server, network_namespace
from tests.framework.sandbox import WAIT_S, Daemon, Sandbox, real_home

pytestmark = pytest.mark.vm

FORWARDED = 8080
GUEST_PORT = 80
# What `nc` gets within its bound; nothing where nobody answers.
FETCH = "nc -w 20 {address} {port} </dev/null"
# A service in the guest that answers each connection with its host's name.
SERVE = f"while :; do hostname | nc -l -p {GUEST_PORT} || sleep 0.1; done"


@pytest.fixture(scope="module")
def world() -> Iterator[NetworkNamespace]:
    """All the network that this module's guests know."""
    with network_namespace() as made:
        yield made


@pytest.fixture(scope="module")
def networked(tiny_image: Image, world: NetworkNamespace) -> Iterator[Daemon]:
    """A home whose daemon lives in that network."""
    with real_home(tiny_image) as made:
        yield Daemon(made.home, within=world.within)


@pytest.fixture(scope="module")
def server(networked: Daemon) -> Sandbox:
    """A guest with a service behind a forwarded port."""
    made = networked.run(net="user", ports=[f"{FORWARDED}:{GUEST_PORT}"], name="server")
    made.in_background(SERVE)
    return made


def fetch(guest: Sandbox, address: str, port: int) -> bytes:
    """What a guest gets from an address."""
    return guest.exec("sh", "-c", FETCH.format(address=address, port=port)).stdout


def ask(world: NetworkNamespace, port: int = FORWARDED) -> bytes:
    """What a forwarded port answers; empty where the guest's service was between two turns."""
    with world.connect("127.0.0.1", port) as connection:
        data = b""
        try:
            while more := connection.recv(4096):
                data += more
        except ConnectionResetError:
            return b""
        return data


def answers(world: NetworkNamespace, name: str) -> None:
    """Wait until the forwarded port leads to the guest of that name."""
    expected = f"{name}\n".encode()

    def answered() -> bool:
        found = ask(world)
        assert found in (b"", expected)
        return found == expected

    eventually(f"the answer of {name}", answered, WAIT_S)


def test_a_guest_reaches_the_world_and_not_the_hosts_loopback(
    server: Sandbox, world: NetworkNamespace
) -> None:
    """One listener on every address: through one it answers, through the loopback it is barred."""
    with Server(world.listen("0.0.0.0"), b"hello from outside\n") as outside:
        assert fetch(server, ADDRESS, outside.port) == b"hello from outside\n"
        # The gateway stands for the host's 127.0.0.1, and so does every unused address.
        for near in ("10.0.2.2", "10.0.2.9", "10.0.2.3"):
            assert fetch(server, near, outside.port) == b"", near
        assert outside.answered == 1
    # The listener is there for the host itself, so it is the guest that was refused.
    with Server(world.listen("127.0.0.1"), b"secret\n") as inside:
        assert fetch(server, "10.0.2.2", inside.port) == b""
        with world.connect("127.0.0.1", inside.port) as connection:
            assert connection.recv(100) == b"secret\n"
        assert inside.answered == 1


def test_a_guest_without_a_network_has_no_device(networked: Daemon) -> None:
    """Nothing but its own loopback."""
    with_none = networked.run()
    try:
        assert with_none.sh("ls /sys/class/net").split() == ["lo"]
        assert with_none.inspect().net == "none"
    finally:
        with_none.remove()


def test_forwards_last_over_pauses_and_stay_with_their_sandbox(
    server: Sandbox, networked: Daemon, world: NetworkNamespace
) -> None:
    """Bound while it runs, free while it is paused, bound again after; a fork has none."""
    answers(world, "server")
    paused = server.pause()
    assert [note for note in paused.notes if "connections are cut" in note]
    with pytest.raises(ConnectionRefusedError):
        ask(world)
    server.resume()
    answers(world, "server")
    forked = networked.client.fork(ForkRequest(source=server.id))
    [fork] = [Sandbox(networked, sandbox) for sandbox in forked.sandboxes]
    try:
        assert [note for note in forked.notes if "forwards" in note]
        assert fork.inspect().ports == []
        assert fork.inspect().net == "user"
        answers(world, "server")
        with Server(world.listen(ADDRESS), b"again\n") as outside:
            assert fetch(fork, ADDRESS, outside.port) == b"again\n"
    finally:
        fork.remove()


def test_an_open_connection_is_reset_after_a_pause(
    server: Sandbox, world: NetworkNamespace
) -> None:
    """What the guest still sends into it is refused; a new one works."""
    listener = world.listen(ADDRESS)
    port = listener.getsockname()[1]
    server.in_background(
        f"(while :; do echo tick; sleep 0.2; done) | nc {ADDRESS} {port} >/tmp/cut; : >/tmp/end"
    )
    connection, _ = listener.accept()
    with listener, connection:
        assert connection.recv(4) == b"tick"
        server.pause()
        while connection.recv(4096):  # its other end went with the VMM
            pass
        server.resume()
        server.sh("while [ ! -e /tmp/end ]; do sleep 0.1; done")
    with Server(world.listen(ADDRESS), b"new\n") as outside:
        assert fetch(server, ADDRESS, outside.port) == b"new\n"


def test_a_port_that_is_taken_is_named_and_loses_nothing(
    server: Sandbox, networked: Daemon, world: NetworkNamespace
) -> None:
    """By a run and by a resume, which leaves the sandbox paused as it was."""
    before = len(networked.client.sandboxes(everything=True))
    with pytest.raises(PortUnavailable, match=rf"Port {FORWARDED} .*in use"):
        networked.run(net="user", ports=[f"{FORWARDED}:1"])
    assert len(networked.client.sandboxes(everything=True)) == before
    server.pause()
    with (
        world.listen("127.0.0.1", FORWARDED),
        pytest.raises(PortUnavailable, match=str(FORWARDED)),
    ):
        server.resume()
    assert server.state == "paused"
    server.resume()
    answers(world, "server")


def test_a_daemon_that_was_killed_takes_the_guest_up_with_its_forwards(
    server: Sandbox, networked: Daemon, world: NetworkNamespace
) -> None:
    """They are the VMM's."""
    networked.kill()
    answers(world, "server")
    assert server.inspect().ports[0].host == FORWARDED
    server.save()
    answers(world, "server")


@pytest.mark.parametrize(
    ("net", "ports", "cause"),
    [
        ("bridge", [], "there are: none, user"),
        ("none", ["1:1"], "--net user"),
        ("user", ["80"], "HOST:GUEST"),
        ("user", ["0:80"], "HOST:GUEST"),
        ("user", ["80:65536"], "HOST:GUEST"),
        ("user", ["80:80,restrict=on"], "HOST:GUEST"),
        ("user", ["80:1", "80:2"], "twice"),
        ("user", [f"{port}:1" for port in range(1, 40)], "at most 32"),
    ],
    ids=["kind", "no-network", "one", "zero", "large", "options", "twice", "many"],
)
def test_what_is_no_network_is_refused(
    networked: Daemon, net: str, ports: list[str], cause: str
) -> None:
    """Before anything is made; nothing of it reaches QEMU's command line."""
    request = RunRequest(memory_bytes=128 * MIB, net=net, ports=ports)
    with pytest.raises(InvalidRequest, match=cause):
        networked.client.run(request)


def test_there_is_no_network_without_its_guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A library that is not there can't keep a guest from the loopback."""
    missing = tmp_path_factory.mktemp("native") / "lib.so"
    with pytest.raises(VmmFailed, match="reach the host's loopback"):
        preloaded("a-sandbox", missing)


def test_the_hosts_resolvers_are_read_as_addresses(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """And nothing else of the file; a host without one has none."""
    file = tmp_path_factory.mktemp("etc") / "resolv.conf"
    assert resolvers(file) == []
    file.write_text("# x\nnameserver 127.0.0.53\nnameserver nonsense\nsearch a\nnameserver ::1\n")
    assert resolvers(file) == ["127.0.0.53", "::1"]


def test_a_port_taken_in_between_is_named_all_the_same() -> None:
    """QEMU says which; other complaints are not ours to turn."""
    said = "qemu: Could not set up host forwarding rule 'tcp:127.0.0.1:1-:80'"
    assert refused_forward("no such device") is None
    found = refused_forward(said)
    assert found is not None
    assert found.fields["port"] == 1
