"""
Virtual time: what happens next, and nothing else.

One heap holds all that will happen. Time is the moment of what happens now; between two moments
it does not pass, so a simulated hour costs what happens in it. Ties go by the order of calls:
the same calls give the same history.

What belongs to a *process* (a running replica) is dropped once that is dead, and waits while it
is busy, as callbacks wait for a stalled event loop.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, Protocol

AT_ONCE_MAX = 50_000
"""Things that happen at one moment; more means that something does so for ever."""


class Process(Protocol):
    """Something that runs, stalls and dies."""

    is_alive: bool
    busy_until: float


class Schedule:
    """A heap of calls, and the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.happened = 0
        self._heap: list[
            tuple[float, int, Process | None, Callable[..., object], tuple[Any, ...]]
        ] = []
        self._calls = 0

    def call_at(
        self, at: float, process: Process | None, function: Callable[..., object], *args: Any
    ) -> None:
        """Call *function* at the time *at*, if *process* lives and is not busy then."""
        self._calls += 1
        heapq.heappush(self._heap, (at, self._calls, process, function, args))

    def call_later(
        self, delay: float, process: Process | None, function: Callable[..., object], *args: Any
    ) -> None:
        """Call *function* after *delay* seconds; see `call_at`."""
        self.call_at(self.now + delay, process, function, *args)

    def run_until(self, until: float) -> None:
        """Let everything happen that is due up to *until*."""
        heap = self._heap
        since, at_once = self.now, 0
        while heap and heap[0][0] <= until:
            at, _, process, function, args = heapq.heappop(heap)
            if process is not None:
                if not process.is_alive:
                    continue
                if process.busy_until > at:
                    self.call_at(process.busy_until, process, function, *args)
                    continue
            if at > since:
                since, at_once = at, 0
            at_once += 1
            assert at_once < AT_ONCE_MAX, f"time stands still at {at:.3f} s: something goes round"
            self.now = at
            self.happened += 1
            function(*args)
        self.now = until
