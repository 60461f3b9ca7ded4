"""Many mappings and readers of one served file, in processes of their own, against what it has to
hold, while the server is killed and replaced and its source is damaged and mended."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from diapause.catalog import SnapshotRecord
from diapause.pager.client import Pager
from diapause.sandbox.host import Host
from tests.framework.blob_peer import BlobPeer, Mode, blob_peer
from tests.framework.fake_home import eventually
from tests.framework.pagers import spec

ROOT = Path(__file__).parents[2]
CLIENTS, STEPS = 3, 60
WAIT_S, BOUND_S = 60.0, 400.0
OUTAGES: tuple[Mode, ...] = ("slow", "failing", "cut", "silent", "wrong", "closed")
OUTAGE_S_MAX = 2.0  # of the pager's 10
SWEEP = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
model = open(sys.argv[2], "rb").read()
while True:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(fd, len(model), 0) == model, "other bytes"
"""


class Clients:
    """Processes that read; they end with the test."""

    def __init__(self, host: Host, pager: Pager, record: SnapshotRecord) -> None:
        self._flat = host.home.flat_of(record.id)
        self._pager, self._record = pager, record
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, device: str, *command: str) -> subprocess.Popen[str]:
        """One that is told the served file and its model behind `command`, then the rest."""
        mount = self._pager.pair(start=False).mount
        head, tail = command[:2], command[2:]
        names = (str(self._pager.path(f"{self._record.id}.{device}")), str(self._flat / device))
        process = subprocess.Popen(
            [sys.executable, *head, *names, *tail], pass_fds=[mount], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def models(self) -> list[subprocess.Popen[str]]:
        """Of both devices."""
        command = ("-m", "tests.framework.mapping_client")
        return [
            self.start(device, *command, str(seed), str(STEPS))
            for seed, device in enumerate(["memory"] * CLIENTS + ["disk0"])
        ]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate(timeout=WAIT_S)


@pytest.fixture
def clients(host: Host, pager: Pager, record: SnapshotRecord) -> Iterator[Clients]:
    host.flats.ensure(record)
    with contextlib.closing(Clients(host, pager, record)) as clients:
        yield clients


def all_right(processes: list[subprocess.Popen[str]]) -> None:
    """Each has done all that it was told, and found every byte."""
    for process in processes:
        said, error = process.communicate(timeout=BOUND_S)
        assert process.returncode == 0, error
        assert int(said) == 2 * STEPS


def replaced(pager: Pager, dead: int) -> bool:
    return pager.pair(start=False).pid != dead


def test_many_mappings_hold_the_file_s_bytes(clients: Clients) -> None:
    all_right(clients.models())


def test_they_hold_them_while_the_pager_is_killed_again_and_again(
    pager: Pager, clients: Clients
) -> None:
    processes = clients.models()
    kills = 0
    while kills < 3 or any(process.poll() is None for process in processes):
        dead = pager.pair(start=False).pid
        os.kill(dead, signal.SIGKILL)
        eventually("another pager", partial(replaced, pager, dead), WAIT_S)
        kills += 1
        if kills == 12:
            break
    all_right(processes)


def test_they_hold_them_while_the_source_is_damaged_and_mended(
    host: Host, pager: Pager, clients: Clients
) -> None:
    """Each time until a reader waits for it: it waits, and nobody is given a wrong byte. The pager
    is killed each time as well, for what it has decoded it need not read."""
    sweeper = clients.start("memory", "-c", SWEEP)
    pidfd = os.pidfd_open(sweeper.pid)
    pager.attach("sweeper", pager.names(), pidfd)
    os.close(pidfd)
    processes = clients.models()
    builds = {path: path.read_bytes() for path in host.home.builds.iterdir()}
    for _ in range(4):
        for path, good in builds.items():
            write(path, bytes(byte ^ 1 for byte in good[32:-96]), 32)
        dead = pager.pair(start=False).pid
        os.kill(dead, signal.SIGKILL)
        eventually("another pager", partial(replaced, pager, dead), WAIT_S)
        eventually("a stall", partial(stalled, pager), WAIT_S)
        for path, good in builds.items():
            write(path, good, 0)
        eventually("its end", lambda: not stalled(pager), WAIT_S)
    all_right(processes)
    assert sweeper.poll() is None, sweeper.communicate(timeout=WAIT_S)


def test_they_hold_them_over_a_source_that_is_slow_fails_lies_and_comes_back(
    host: Host, pager: Pager, record: SnapshotRecord, clients: Clients
) -> None:
    """Each for less than the bound: whoever reads waits, and nobody is given a wrong byte. The
    pager is killed each time as well, for what it has decoded it need not fetch."""
    dice = random.Random(7)
    with blob_peer() as peer:
        peer.directory = host.home.builds
        for device in record.devices:
            there = spec(host, record, device.name)
            there["blobs"] = {"kind": "http", "url": peer.url}
            pager.put(f"{record.id}.{device.name}", there)
        sweeper = clients.start("memory", "-c", SWEEP)
        pidfd = os.pidfd_open(sweeper.pid)
        pager.attach("sweeper", pager.names(), pidfd)
        os.close(pidfd)
        processes = clients.models()
        for mode in (*OUTAGES, *OUTAGES):
            peer.become(mode)
            served = peer.served
            dead = pager.pair(start=False).pid
            os.kill(dead, signal.SIGKILL)
            eventually("another pager", partial(replaced, pager, dead), WAIT_S)
            time.sleep(dice.uniform(0.1, OUTAGE_S_MAX))
            peer.become("there")
            eventually("bytes", partial(more_than, peer, served), WAIT_S)
            eventually("its end", lambda: not stalled(pager), WAIT_S)
        all_right(processes)
        assert sweeper.poll() is None, sweeper.communicate(timeout=WAIT_S)


def more_than(peer: BlobPeer, served: int) -> bool:
    return peer.served > served


def stalled(pager: Pager) -> bool:
    return any(file["stalled"] for file in pager.seen("sweeper")["files"])


def write(path: Path, data: bytes, at: int) -> None:
    """In its place: who has it open reads it too."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    path.chmod(mode)
