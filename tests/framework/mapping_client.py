"""A process that maps and reads a file in every way and compares each byte with what it has to be.

python -m tests.framework.mapping_client FILE MODEL SEED STEPS

FILE is the file that a server serves, MODEL a plain file of the same bytes. Prints how many steps
it took; ends with 1 at the first byte that is another. Every step takes some of: a shared or a
private mapping, all kinds of advice, bytes touched in place, writes to the private mapping, reads
at any offset, pages dropped. Two threads share the mappings' addresses and the page cache.
"""

from __future__ import annotations

import mmap
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

THREADS = 2
MAPPINGS = 8  # of each thread, at once
PAGE = mmap.PAGESIZE
ADVICE = (mmap.MADV_NORMAL, mmap.MADV_RANDOM, mmap.MADV_SEQUENTIAL, mmap.MADV_WILLNEED)


class Mapping:
    """A part of the file in memory, with what it has to hold."""

    def __init__(self, fd: int, model: bytes, dice: random.Random) -> None:
        first = dice.randrange(len(model) // PAGE)
        pages = min(dice.choice((1, 3, 40, 700)), len(model) // PAGE - first)
        self.private = dice.random() < 0.5
        flags, protection = mmap.MAP_SHARED, mmap.PROT_READ
        if self.private:
            flags, protection = mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
        self.memory = mmap.mmap(fd, pages * PAGE, flags, protection, offset=first * PAGE)
        self.memory.madvise(dice.choice(ADVICE))
        self.expected = bytearray(model[first * PAGE : (first + pages) * PAGE])

    def check(self, dice: random.Random) -> None:
        """Some of it, or all of it."""
        at = dice.randrange(len(self.expected))
        end = at + dice.choice((1, 100, PAGE, 40 * PAGE, len(self.expected)))
        assert self.memory[at:end] == self.expected[at:end], f"bytes at {at} of a mapping"

    def write(self, dice: random.Random) -> None:
        """Nobody else may see it, and the bytes beside it stay the file's."""
        if self.private:
            at = dice.randrange(len(self.expected))
            data = dice.randbytes(min(dice.choice((1, 50, PAGE)), len(self.expected) - at))
            self.memory[at : at + len(data)] = data
            self.expected[at : at + len(data)] = data

    def drop(self) -> None:
        """Pages of a shared mapping are asked of the file again."""
        if not self.private:
            self.memory.madvise(mmap.MADV_DONTNEED)


def read(fd: int, model: bytes, dice: random.Random) -> None:
    """Bytes at any place, also behind the end."""
    at = dice.randrange(len(model) + 2 * PAGE)
    length = dice.choice((1, 77, PAGE, 65536, 300_000, 2_000_000))
    found = b""
    while part := os.pread(fd, length - len(found), at + len(found)):
        found += part
    assert found == model[at : at + length], f"{length} bytes read at {at}"


def work(path: str, model: bytes, seed: int, steps: int) -> int:
    """One thread's."""
    dice = random.Random(seed)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    mappings: list[Mapping] = []
    for _ in range(steps):
        os.posix_fadvise(fd, 0, 0, dice.choice((os.POSIX_FADV_DONTNEED, os.POSIX_FADV_NORMAL)))
        if len(mappings) == MAPPINGS:
            mappings.pop(dice.randrange(MAPPINGS)).memory.close()
        mappings.append(Mapping(fd, model, dice))
        for mapping in dice.sample(mappings, k=min(3, len(mappings))):
            dice.choice((mapping.drop, lambda: None))()
            mapping.check(dice)
            mapping.write(dice)
        read(fd, model, dice)
    for mapping in mappings:
        mapping.check(dice)
        mapping.memory.close()
    os.close(fd)
    return steps


def main(path: str, model: str, seed: str, steps: str) -> None:
    """All threads'; the first error is the process's."""
    expected = Path(model).read_bytes()
    with ThreadPoolExecutor(THREADS) as pool:
        seeds = [int(seed) * THREADS + thread for thread in range(THREADS)]
        done = [pool.submit(work, path, expected, seed, int(steps)) for seed in seeds]
        print(sum(future.result(timeout=600) for future in done))


if __name__ == "__main__":
    main(*sys.argv[1:])
