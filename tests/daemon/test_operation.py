"""Operations by themselves: the present one, cancelling, shields; and the line for a sandbox."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from diapause import operation
from diapause.errors import Busy, Cancelled
from diapause.limits import LOCK_WAITERS_MAX
from diapause.operation import Operation, carried, checkpoint, shielded, under, wait_for
from diapause.sandbox.locks import SandboxLocks
from tests.framework.fake_home import eventually

BOUND_S = 60.0


def test_a_cancel_is_seen_at_the_next_checkpoint() -> None:
    asked = Operation("pause")
    checkpoint()
    with under(asked):
        checkpoint()
        asked.cancel()
        with pytest.raises(Cancelled) as caught:
            checkpoint()
        assert caught.value.fields == {"operation": asked.id, "verb": "pause"}
        with shielded(), shielded():
            checkpoint()
        with pytest.raises(Cancelled):
            checkpoint()
    checkpoint()


@pytest.mark.parametrize("before", [True, False], ids=["before", "meanwhile"])
def test_a_cancel_ends_a_wait(before: bool) -> None:
    asked, never = Operation("pause"), Future[int]()
    if before:
        asked.cancel()
    else:
        threading.Timer(0.05, asked.cancel).start()
    with under(asked), pytest.raises(Cancelled):
        wait_for(never, BOUND_S)


def test_a_wait_ends_with_its_future_or_its_bound() -> None:
    ready, never = Future[int](), Future[int]()
    ready.set_result(3)
    for asked in (None, Operation("pause")):
        with under(asked):
            assert wait_for(ready, BOUND_S) == 3
            with pytest.raises(TimeoutError):
                wait_for(never, 0.01)


def test_work_in_a_pool_is_for_the_same_operation() -> None:
    asked = Operation("fork")
    with ThreadPoolExecutor(1) as pool:
        with under(asked):
            plain = pool.submit(operation.current)
            taken = pool.submit(carried(operation.current))
            with shielded():
                unseen = pool.submit(carried(checkpoint))
                asked.cancel()
        assert plain.result(BOUND_S) is None
        assert taken.result(BOUND_S) is asked
        unseen.result(BOUND_S)
        assert pool.submit(operation.current).result(BOUND_S) is None


def test_progress_is_of_the_present_part() -> None:
    operation.progress(1, 2, "nobody asks")
    asked = Operation("resume")
    with under(asked):
        operation.progress(1, 10, "flat files")
        assert asked.progress is not None
        began = asked.progress.began
        operation.progress(5, 10, "flat files")
        assert (asked.progress.done_bytes, asked.progress.began) == (5, began)
        operation.at_step("spawn")
    state: tuple[object, object] = (asked.step, asked.progress)
    assert state == ("spawn", None)


# -- the line -------------------------------------------------------------------------------------


class Line:
    """Threads that take a sandbox one after the other."""

    def __init__(self) -> None:
        self.locks = SandboxLocks()
        self.order: list[int] = []
        self.failed: dict[int, Exception] = {}
        self.threads: list[threading.Thread] = []

    def join(self, number: int, asked: Operation | None = None) -> None:
        """Another one gets in line, and is there when this returns."""
        before = self.locks.waiting("s")
        thread = threading.Thread(target=self._take, args=(number, asked))
        self.threads.append(thread)
        thread.start()
        eventually("its place in the line", lambda: self.locks.waiting("s") > before, BOUND_S)

    def _take(self, number: int, asked: Operation | None) -> None:
        try:
            with under(asked), self.locks.hold("s", BOUND_S):
                self.order.append(number)
        except (Busy, Cancelled) as error:
            self.failed[number] = error

    def finish(self) -> None:
        for thread in self.threads:
            thread.join(BOUND_S)
        assert not any(thread.is_alive() for thread in self.threads)


def test_the_line_is_served_in_its_order() -> None:
    line = Line()
    with line.locks.hold("s"), line.locks.hold("s"):  # the holder may take it again
        for number in range(LOCK_WAITERS_MAX):
            line.join(number)
        with line.locks.hold("another"):
            pass
        refused = threading.Thread(target=line._take, args=(99, None))
        refused.start()
        refused.join(BOUND_S)
        assert isinstance(line.failed[99], Busy)
    line.finish()
    assert line.order == list(range(LOCK_WAITERS_MAX))
    assert line.locks.waiting("s") == 0


def test_whoever_is_cancelled_leaves_the_line() -> None:
    line, asked = Line(), Operation("pause")
    with line.locks.hold("s"):
        line.join(0)
        line.join(1, asked)
        line.join(2)
        asked.cancel()
        eventually("its leaving", lambda: 1 in line.failed, BOUND_S)
    line.finish()
    assert isinstance(line.failed[1], Cancelled)
    assert line.order == [0, 2]


def test_a_wait_in_the_line_is_bounded() -> None:
    line = Line()
    began = time.monotonic()
    with line.locks.hold("s"):
        thread = threading.Thread(target=_held_for, args=(line, 0.05))
        thread.start()
        thread.join(BOUND_S)
    assert isinstance(line.failed[0], Busy)
    assert time.monotonic() - began < BOUND_S
    with line.locks.hold("s"):
        pass


def _held_for(line: Line, bound_s: float) -> None:
    try:
        with line.locks.hold("s", bound_s):
            line.order.append(0)
    except Busy as error:
        line.failed[0] = error


def test_many_threads_and_cancels_leave_nothing_held() -> None:
    """Nobody is two at once, and the line is empty at the end."""
    locks, inside, worst = SandboxLocks(), [0], [0]

    def work(number: int) -> None:
        asked = Operation("pause")
        if number % 3 == 0:
            threading.Timer(0.002 * (number % 7), asked.cancel).start()
        try:
            with under(asked), locks.hold("s", BOUND_S):
                inside[0] += 1
                worst[0] = max(worst[0], inside[0])
                inside[0] -= 1
        except Cancelled:
            assert number % 3 == 0

    with ThreadPoolExecutor(12) as pool:
        for outcome in [pool.submit(work, number) for number in range(300)]:
            outcome.result(BOUND_S)
    assert (worst[0], locks.waiting("s")) == (1, 0)
    assert locks._lines == {}
