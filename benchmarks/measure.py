"""
How it is measured: the effort to spend, what comes out, and what was hoped for.

Two rules against noise. CPU time instead of wall time wherever the work is this process's own, and
contestants that take turns, so that a busy minute of the machine hits both; the median stands.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from crdtstate.documents import DocumentSet
from crdtstate.identity import draw_writer


@dataclass(frozen=True, slots=True)
class Effort:
    """How much work to put into a benchmark.

    Attributes:
        scale: The part of the full number of operations to do.
        rounds: How often each contestant has its turn.
        seconds: How long to write where time is given.
        agents: The size of a fleet.
    """

    scale: float
    rounds: int
    seconds: float
    agents: int

    def count(self, full: int, least: int = 20) -> int:
        """The number of operations to do where *full* are planned."""
        return max(least, int(full * self.scale))


FULL = Effort(scale=1.0, rounds=7, seconds=4.0, agents=10)
QUICK = Effort(scale=0.04, rounds=3, seconds=0.4, agents=10)
TINY = Effort(scale=0.001, rounds=1, seconds=0.1, agents=2)


@dataclass(frozen=True, slots=True)
class Target:
    """What was hoped for, in words and as a test."""

    text: str
    is_met: Callable[[Result], bool]


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table.

    Attributes:
        unit: Of *ours* and *floor*; one that ends in ``/s`` is the better the higher.
        floor: What the least does that could do, None where there is no such thing.
        note: What the floor is, and what else is good to know.
    """

    name: str
    unit: str
    ours: float
    floor: float | None = None
    target: Target | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times the floor's cost ours is."""
        if not self.floor or not self.ours:
            return None
        return self.floor / self.ours if self.unit.endswith("/s") else self.ours / self.floor

    @property
    def is_met(self) -> bool | None:
        return self.target.is_met(self) if self.target else None


def at_least(limit: float) -> Target:
    return Target(f">= {limit:,.0f}", lambda result: result.ours >= limit)


def at_most(limit: float) -> Target:
    return Target(f"<= {limit:g}", lambda result: result.ours <= limit)


def ratio_at_most(limit: float) -> Target:
    return Target(f"ratio <= {limit:g}", lambda result: (result.ratio or 0) <= limit)


def cpu(work: Callable[[], object]) -> float:
    """The CPU seconds that *work* takes, of all threads of this process."""
    gc.collect()
    before = time.process_time()
    work()
    return time.process_time() - before


def by_turns(rounds: int, *contestants: Callable[[], float]) -> list[float]:
    """Let each contestant measure itself once a round; return the medians."""
    taken: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for times, contestant in zip(taken, contestants, strict=True):
            times.append(contestant())
    return [statistics.median(times) for times in taken]


def rate(
    name: str, count: int, seconds: list[float], target: Target | None = None, note: str = ""
) -> Result:
    """The result of *count* operations that took ours and the floor so many *seconds*."""
    ours, floor = (count / max(taken, 1e-9) for taken in seconds)
    return Result(name, "/s", ours, floor, target, note)


def resident() -> int:
    """The bytes of memory this process holds, as far as they can be told apart from free ones."""
    gc.collect()
    if sys.platform != "linux":
        # Only the peak is known; in a process of its own that is close enough.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def new_documents(number: int = 0) -> DocumentSet:
    """A set of documents as a replica is one, without anything around it.

    Its writer is as long as a replica's, drawn for *number*: sizes depend on it.
    """
    writer = draw_writer(random.Random(number))
    return DocumentSet(f"agent-{number}", writer, lambda: time.time_ns() // 1_000_000)
