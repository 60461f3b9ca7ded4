"""Commands through the real agent: exit codes, streams, terminals, background processes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from diapause import errors
from diapause.guest.session import ExecRequest, Exit, Output, Session
from diapause.units import MIB
from tests.framework.agent import Agent, attached, finish, run

BOUND_S = 60.0


def play(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, BOUND_S))


async def until_output(session: Session, wanted: bytes) -> bytes:
    seen = b""
    async for item in session:
        assert isinstance(item, Output), item
        seen += item.data
        if wanted in seen:
            return seen
    raise AssertionError("the session ended")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


@pytest.mark.parametrize(
    ("argv", "end"),
    [
        (["true"], Exit(0)),
        (["false"], Exit(1)),
        (["sh", "-c", "exit 7"], Exit(7)),
        (["sh", "-c", "kill -9 $$"], Exit(137, 9)),
        (["sh", "-c", "kill -34 $$"], Exit(162, 34)),
        (["/nowhere/program"], Exit(127)),
        (["no-such-program"], Exit(127)),
        (["/etc/passwd"], Exit(126)),
        (["/etc"], Exit(126)),
    ],
)
def test_the_exit_code_is_the_commands_own(agent: Agent, argv: list[str], end: Exit) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            assert (await run(link, *argv))[2] == end

    play(scene())


def test_output_and_errors_are_apart_and_whole(agent: Agent) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            out, err, end = await run(link, "sh", "-c", "seq 100000; seq 5 >&2; exit 3")
            assert out == "".join(f"{n}\n" for n in range(1, 100001)).encode()
            assert (err, end) == (b"1\n2\n3\n4\n5\n", Exit(3))

    play(scene())


def test_directory_and_environment(agent: Agent, tmp_path: Path) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            request = ExecRequest(
                argv=["sh", "-c", "pwd; echo $A $HOME; echo ${PATH:+path} $TERM; umask >/dev/null"],
                cwd=str(tmp_path),
                env={"A": "ä b", "not=a name": "x", "": "y"},
            )
            out, _, end = await finish(await link.exec(request))
            assert out.decode() == f"{tmp_path}\nä b /root\npath\n"
            assert end == Exit(0)
            bare, _, _ = await run(link, "sh", "-c", "pwd; ls /proc/self/fd | wc -l")
            assert bare.decode().split() == ["/", "4"]  # 0, 1, 2 and the one that ls opened
            lost = await link.exec(ExecRequest(argv=["true"], cwd="/nowhere"))
            _, err, end = await finish(lost)
            assert b"working directory" in err
            assert end == Exit(126 + 1)

    play(scene())


def test_long_arguments_cross_frames(agent: Agent) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            words = ["x" * 1000] * 120
            out, _, _ = await run(link, "sh", "-c", 'echo "$*" | wc -c', "sh", *words)
            assert int(out) == 120 * 1001

    play(scene())


def test_a_command_that_is_none_is_refused(agent: Agent) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            for argv in ([], ["\udcff"], ["x" * 2 * MIB]):
                with pytest.raises(errors.InvalidRequest):
                    await link.exec(ExecRequest(argv=argv))
            _, _, end = await run(link, "a\0b")
            assert end == Exit(126)
            assert (await run(link, "true"))[2] == Exit(0)

    play(scene())


def test_a_large_input_arrives_byte_equal_in_bounded_memory(agent: Agent) -> None:
    async def scene() -> None:
        block = os.urandom(1 * MIB)
        count = 96
        sent, received = hashlib.sha256(), hashlib.sha256()
        async with attached(agent) as link:
            session = await link.exec(ExecRequest(argv=["cat"]))

            async def feed() -> None:
                for _ in range(count):
                    sent.update(block)
                    await session.write(block)
                await session.end_input()

            async def take() -> int:
                total = 0
                async for item in session:
                    if isinstance(item, Exit):
                        assert item == Exit(0)
                        return total
                    received.update(item.data)
                    total += len(item.data)
                raise AssertionError("no exit")

            _, total = await asyncio.gather(feed(), take())
        assert total == count * MIB
        assert received.digest() == sent.digest()
        assert agent.rss_bytes() < 16 * MIB

    play(scene())


def test_the_end_of_input_reaches_the_command(agent: Agent) -> None:
    async def scene() -> None:
        data = os.urandom(3 * MIB + 1)
        async with attached(agent) as link:
            out, _, _ = await run(link, "sha256sum", stdin=data)
            assert out.split()[0].decode() == hashlib.sha256(data).hexdigest()
            assert (await run(link, "cat", stdin=b""))[0] == b""
            assert (await run(link, "cat"))[0] == b""  # without stdin it is /dev/null

    play(scene())


def test_input_that_nobody_reads_is_dropped(agent: Agent) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            _, _, end = await run(link, "sh", "-c", "exec <&-; exit 4", stdin=bytes(4 * MIB))
            assert end == Exit(4)
            shut = await link.exec(ExecRequest(argv=["sh", "-c", "exec <&-; echo shut; sleep 60"]))
            await until_output(shut, b"shut")
            await shut.write(bytes(8 * MIB))
            await shut.signal(signal.SIGKILL)
            assert (await finish(shut))[2] == Exit(137, 9)

    play(scene())


def test_signals_reach_the_whole_group(agent: Agent) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            script = "trap 'echo caught; exit 5' TERM; sleep 1000 & echo $!; wait"
            session = await link.exec(ExecRequest(argv=["sh", "-c", script]))
            child = int(await until_output(session, b"\n"))
            # Until then it is a shell that has the trap, and would swallow the signal.
            async with asyncio.timeout(60):
                while Path(f"/proc/{child}/comm").read_text() != "sleep\n":
                    await asyncio.sleep(0.01)
            await session.signal(signal.SIGTERM)
            out, _, end = await finish(session)
            assert (out, end) == (b"caught\n", Exit(5))
            async with asyncio.timeout(10):
                while is_alive(child):
                    await asyncio.sleep(0.01)

    play(scene())


def test_a_background_process_lives_on_and_does_not_hang_the_exec(agent: Agent) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            script = "(while :; do echo noise; sleep 0.01; done) & echo $!"
            session = await link.exec(ExecRequest(argv=["sh", "-c", script], stdin=False))
            begun = asyncio.get_running_loop().time()
            out, _, end = await finish(session)
            assert end == Exit(0)
            assert asyncio.get_running_loop().time() - begun < 5
            pid = int(out.split()[0])
            cpu = Path(f"/proc/{pid}/stat")
            before = cpu.read_text().rpartition(")")[2].split()[11:15]
            async with asyncio.timeout(20):
                while cpu.read_text().rpartition(")")[2].split()[11:15] == before:
                    await asyncio.sleep(0.02)
            assert is_alive(pid)
            os.kill(pid, signal.SIGKILL)

    play(scene())


def test_a_terminal_has_a_size_and_takes_control_characters(agent: Agent) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            script = "stty size; tty; read line; stty size; exec sleep 1000"
            request = ExecRequest(argv=["sh", "-c", script], tty=True, rows=33, cols=101)
            session = await link.exec(request)
            first = await until_output(session, b"/dev/pts/")
            assert b"33 101" in first
            await session.resize(44, 120)
            await session.write(b"go\n")
            assert b"44 120" in await until_output(session, b"44 120")
            await session.write(b"\x03")
            assert (await finish(session))[2] == Exit(130, signal.SIGINT)

    play(scene())


def test_the_end_of_input_ends_a_shell_on_a_terminal(agent: Agent) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            session = await link.exec(ExecRequest(argv=["sh"], tty=True))
            await session.write(b"echo $((6*7)) $TERM\n")
            await session.end_input()
            out, _, end = await finish(session)
            assert b"42 xterm" in out
            assert end == Exit(0)

    play(scene())


def test_a_client_that_does_not_read_stalls_nobody_else(agent: Agent) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            stalled = [await link.exec(ExecRequest(argv=["yes"], stdin=False)) for _ in range(8)]
            deaf = await link.exec(ExecRequest(argv=["sleep", "1000"]))
            stuffing = asyncio.create_task(deaf.write(bytes(2 * MIB)))
            for _ in range(3):
                out, _, _ = await run(link, "head", "-c", str(4 * MIB), "/dev/zero")
                assert len(out) == 4 * MIB
            assert not stuffing.done()
            for session in [*stalled, deaf]:
                await session.signal(signal.SIGKILL)
            for session in stalled:
                out, _, end = await finish(session)
                assert end == Exit(137, 9)
                assert out.startswith(b"y\ny\n")
            await stuffing
            assert (await finish(deaf))[2] == Exit(137, 9)

    play(scene())


def test_a_client_that_goes_away_leaves_its_command_running(agent: Agent, tmp_path: Path) -> None:
    async def scene() -> None:
        done = tmp_path / "done"
        async with attached(agent) as link:
            script = f"echo $$; cat; head -c 3000000 /dev/zero; echo over > {done}; sleep 1000"
            session = await link.exec(ExecRequest(argv=["sh", "-c", script]))
            pid = int(await until_output(session, b"\n"))
            session.abandon()
            async with asyncio.timeout(20):
                while not done.exists():
                    await asyncio.sleep(0.01)
            assert is_alive(pid)
            with pytest.raises(errors.ExecCut):
                await session.write(b"x")
            assert [item async for item in session] == []
            assert (await run(link, "true"))[2] == Exit(0)

    play(scene())


def test_too_many_commands_are_refused_and_the_rest_goes_on(agent: Agent) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            many = [await link.exec(ExecRequest(argv=["cat"])) for _ in range(256)]
            with pytest.raises(errors.AgentRefused):
                await link.exec(ExecRequest(argv=["true"]))
            for session in many:
                await session.end_input()
            for session in many:
                assert (await finish(session))[2] == Exit(0)
            assert (await run(link, "true"))[2] == Exit(0)

    play(scene())


def test_file_systems_and_signs_of_life_are_answered(agent: Agent) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            assert await link.ping(5) < 5
            assert isinstance(await link.freeze_filesystems(5), list)
            await link.thaw_filesystems(5)

    play(scene())
