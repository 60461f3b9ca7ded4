"""Boots on a host whose every core is burnt by somebody else: none hangs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.framework.sandbox import Daemon

pytestmark = pytest.mark.vm

BOOTS = 50
AT_ONCE = 4


@contextlib.contextmanager
def burning_cores() -> Iterator[None]:
    """A process that burns each core."""
    burners = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(len(os.sched_getaffinity(0)))
    ]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def boot_beside_burners(daemon: Daemon, boots: int) -> None:
    """Each answers to an exec; one that hangs fails by the bound of the agent."""

    def boot(_: int) -> float:
        began = time.monotonic()
        sandbox = daemon.run()
        took = time.monotonic() - began
        assert sandbox.sh("echo up").strip() == "up"
        sandbox.remove()
        return took

    with burning_cores(), ThreadPoolExecutor(AT_ONCE) as pool:
        took = sorted(pool.map(boot, range(boots)))
    print(f"{boots} boots: {took[0]:.1f} s, median {took[boots // 2]:.1f} s, {took[-1]:.1f} s")
    assert daemon.vmms() == []


def test_fifty_boots_beside_burning_cores(daemon: Daemon) -> None:
    boot_beside_burners(daemon, BOOTS)
