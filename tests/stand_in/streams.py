"""The streams of a stand-in, and what they are given: late, and with a clock.

Streams are as late as they can be: what they are given is done when somebody asks for an event behind it, and not
before. So whoever reads without waiting reads what was there before. And each use of memory is noted on the board,
which sees missing waits that happened to do no harm.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from tests.stand_in.board import PROCESSES, STREAMS, Board, Clock, Misuse, Span

DEFAULT = 0  # the caller's
PATIENCE_S = 20.0
_BASE_EVENT = 1 << 32  # so that an event is not taken for a stream


class Streams:
    """Those of one process, and its events.

    Args:
        board: What the processes know of each other.

    Attributes:
        known: What this process's host has seen to be done.
        waits_for_others: How often they were told to wait for events of other processes.
    """

    def __init__(self, board: Board):
        self.known: Clock = np.zeros((PROCESSES, STREAMS), np.int64)
        self.waits_for_others = 0
        self._board = board
        self._me = board.process
        self._failure: BaseException | None = None
        self._counts = [0] * STREAMS
        self._clocks: list[Clock] = [np.zeros((PROCESSES, STREAMS), np.int64) for _ in range(STREAMS)]
        self._queues: list[deque[Callable[[], bool]]] = [deque() for _ in range(STREAMS)]
        self._made = 1
        self._under_way: dict[tuple[int, int], int] = {}  # records that are not done: event, number -> stream
        self._wanted: set[tuple[int, int]] = set()  # of these, by this process
        self._lock = threading.RLock()
        self._ended = False
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def make(self) -> int:
        assert self._made < STREAMS
        self._made += 1
        return self._made - 1

    # Events

    def event(self, *, shared: bool) -> int:
        events = self._board.own["events"]
        free = np.flatnonzero(events["live"] == 0)
        assert len(free), "the stand-in has no more events"
        events[free[0]] = np.zeros((), events.dtype)
        events[free[0]]["live"] = 2 if shared else 1
        return _BASE_EVENT + self._me * 1000 + int(free[0])

    def destroy_event(self, event: int) -> None:
        process, index = self._find(event)
        if process == self._me:
            self._board.own["events"][index]["live"] = 0

    def is_own_and_shared(self, event: int) -> bool:
        process, index = self._find(event)
        return process == self._me and self._board.own["events"][index]["live"] == 2

    @property
    def num_events(self) -> int:
        """Of this process, that were not destroyed."""
        return int((self._board.own["events"]["live"] != 0).sum())

    def record(self, event: int, stream: int) -> None:
        process, index = self._find(event)
        if process != self._me:
            raise Misuse("an event of another process is recorded")
        with self._lock:
            entry = self._board.own["events"][index]
            # What the host has seen done is done before what it gives the stream now.
            np.maximum(self._clocks[stream], self.known, out=self._clocks[stream])
            entry["clock"] = self._clocks[stream].ravel()
            number = int(entry["recorded"]) + 1

            def reach() -> bool:
                del self._under_way[index, number]
                self._wanted.discard((index, number))
                entry["done"] = max(int(entry["done"]), number)
                return True

            self._under_way[index, number] = stream
            self._queues[stream].append(reach)
            entry["recorded"] = number

    def wait(self, stream: int, event: int) -> None:
        process, index = self._find(event)
        entry = self._board.parts[process]["events"][index]
        if entry["live"] == 1 and process != self._me:
            raise Misuse("an event of another process that is not shared")
        self.waits_for_others += process != self._me
        with self._lock:
            number = int(entry["recorded"])
            if number == 0:
                raise Misuse("a wait for an event that was never recorded is none")
            np.maximum(self._clocks[stream], entry["clock"].reshape(PROCESSES, STREAMS), out=self._clocks[stream])
            self._queues[stream].append(lambda: self._is_done(process, index, number))

    def reached(self, event: int) -> bool:
        self.check()
        process, index = self._find(event)
        entry = self._board.parts[process]["events"][index]
        number = int(entry["recorded"])
        if not self._is_done(process, index, number):
            return False
        np.maximum(self.known, entry["clock"].reshape(PROCESSES, STREAMS), out=self.known)
        return True

    # Work

    def give(
        self, stream: int, work: Callable[[], object], reads: Sequence[Span] = (), writes: Sequence[Span] = ()
    ) -> None:
        """Something to do behind all that the stream was given, with memory of devices."""
        with self._lock:
            self._counts[stream] += 1
            clock = self._clocks[stream]
            np.maximum(clock, self.known, out=clock)
            clock[self._me, stream] = self._counts[stream]
            for spans, is_writing in ((reads, False), (writes, True)):
                for span in spans:
                    self._board.access(
                        span, writes=is_writing, stream=stream, count=self._counts[stream], clock=clock.copy()
                    )

            def run() -> bool:
                work()
                return True

            self._queues[stream].append(run)

    def is_busy(self, stream: int) -> bool:
        """Whether a stream has something left to do."""
        with self._lock:
            return bool(self._queues[stream])

    def finish(self, stream: int) -> None:
        """Waits for a stream, in a test."""
        event = self.event(shared=False)
        self.record(event, stream)
        give_up = time.monotonic() + PATIENCE_S
        while not self.reached(event):
            if time.monotonic() > give_up:
                raise Misuse(f"process {self._me} waits for an event that is never reached")
            time.sleep(0.0001)
        self.check()
        self.destroy_event(event)

    def drain(self) -> None:
        """Does all that all streams were given."""
        give_up = time.monotonic() + PATIENCE_S
        while any(self._queues):
            with self._lock:
                for queue in self._queues:
                    while queue and queue[0]():
                        queue.popleft()
            if time.monotonic() > give_up:
                raise Misuse("the device does not come to an end")
            time.sleep(0.0001)

    def check(self) -> None:
        """Raises what went wrong on the device."""
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        """Does all that was given, and ends."""
        self.drain()
        self._ended = True
        self._thread.join()
        self.check()

    def _find(self, event: int) -> tuple[int, int]:
        process, index = divmod(event - _BASE_EVENT, 1000)
        if event < _BASE_EVENT or not self._board.parts[process]["events"][index]["live"]:
            raise Misuse("an event is used after it was destroyed")
        return process, index

    def _is_done(self, process: int, index: int, number: int) -> bool:
        if process == self._me:  # where an event may have been recorded again meanwhile, on another stream
            if (index, number) in self._under_way:
                self._wanted.add((index, number))
                return False
            return True
        entry = self._board.parts[process]["events"][index]
        entry["wanted"] = max(int(entry["wanted"]), number)
        return int(entry["done"]) >= number

    def _answer(self) -> None:
        """The device: does what stands before the events that somebody wants."""
        try:
            while not self._ended:
                if not self._advance():
                    time.sleep(0.0002)
        except BaseException as error:
            self._failure = error

    def _advance(self) -> bool:
        events = self._board.own["events"]
        moved = False
        with self._lock:
            wanted = self._wanted | {record for record in self._under_way if events["wanted"][record[0]] >= record[1]}
            for record in wanted:
                stream = self._under_way.get(record)
                while stream is not None and record in self._under_way and self._queues[stream][0]():
                    self._queues[stream].popleft()
                    moved = True
        return moved
