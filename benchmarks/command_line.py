"""The command line's own start, apart: what a shell adds to the API."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.guest import Bench
from benchmarks.rows import Figure, Row

ROUNDS = 10
SHELL_MS = 150.0
API_MS = 5.0


def measure(bench: Bench) -> list[Row]:
    """`diapause ps` from the shell, and the same call at the API."""
    program = [sys.executable, "-m", "diapause", "--home", str(bench.home.root), "--json", "ps"]
    shell, api = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        subprocess.run(program, check=True, capture_output=True, timeout=60)
        shell.append((time.perf_counter() - began) * 1e3)
        began = time.perf_counter()
        bench.client.sandboxes()
        api.append((time.perf_counter() - began) * 1e3)
    bare = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True, timeout=60)
        bare.append((time.perf_counter() - began) * 1e3)
    notes = {"api_ms": api}
    ours = Figure("ps", "ms", tuple(shell))
    return [
        Row("`ps` from the shell", ours, Figure("bare interpreter", "ms", tuple(bare)), 10, notes),
        Row("`ps` from the shell", ours, Figure("at most", "ms", (SHELL_MS,)), 1),
        Row(
            "`ps` at the API", Figure("ps", "ms", tuple(api)), Figure("at most", "ms", (API_MS,)), 1
        ),
    ]
