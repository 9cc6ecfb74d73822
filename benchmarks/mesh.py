"""
The mesh in simulation: what a change costs a fleet of ten, a hundred, a thousand, and how soon it
is everywhere; what a fleet says when nothing happens; what the sudden death of a tenth of it does.

Time is virtual, with 10 to 50 ms from host to host, so these numbers do not depend on the machine:
one seed, one result. The floors are the figures of the design's own simulator, in which replicas
had no documents.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial

from benchmarks.measure import Effort, Result, at_most, ratio_at_most
from crdtstate.simulation import Simulation
from crdtstate.simulation.campaign import FORMED, FORMED_LARGE

SEED = 1
KEYS = 20
RATE = 20.0
"""Changes per second of the whole fleet."""

IDLE = 5.0
WRITING = 5.0
FAILED = 0.1
"""The part of a fleet that dies, the root of its tree among them."""

LOSING = 5.0
RECOVERING = 5.0
"""Seconds after that in which changes may be late, and in which nothing is measured."""

TOLERANCE = 1.2


@dataclass(frozen=True, slots=True)
class _Reference:
    """What the design promises: milliseconds, and the messages and bytes of an idle second."""

    delivery: float
    last: float
    messages: float
    idle_bytes: float


REFERENCE = {
    10: _Reference(28, 47, 9, 189),
    100: _Reference(122, 171, 6, 124),
    1000: _Reference(208, 265, 6, 124),
}
REDUNDANCY_MAX = 0.01


def mesh(effort: Effort) -> list[Result]:
    """Ten and a hundred."""
    large = effort.count(100)
    return [*_Fleet(10, REFERENCE[10]).measure(), *_Fleet(large, REFERENCE[100]).measure()]


def thousand(effort: Effort) -> list[Result]:
    """A thousand: a quarter of an hour of CPU time."""
    return _Fleet(effort.count(1000), REFERENCE[1000]).measure()


class _Fleet:
    """A simulated fleet, from its first moment."""

    def __init__(self, agents: int, reference: _Reference) -> None:
        self._agents = agents
        self._reference = reference
        self._rng = random.Random(SEED)
        self._sim = Simulation(SEED, agents)
        self._names = self._sim.names
        self._written = 0

    def measure(self) -> list[Result]:
        is_small = self._agents <= self._sim.config.mesh_max
        self._sim.run(FORMED if is_small else FORMED_LARGE)
        found = [*self._idle(), *self._write()]
        return found if is_small else [*found, *self._fail()]

    def _line(self, what: str, unit: str, ours: float, floor: float | None = None) -> Result:
        name = f"{self._agents}: {what}"
        if floor is None:
            return Result(name, unit, ours)
        return Result(name, unit, ours, floor, ratio_at_most(TOLERANCE), "the design's figure")

    def _idle(self) -> list[Result]:
        oracle, reference = self._sim.oracle, self._reference
        messages, sent = oracle.messages, oracle.sent_bytes
        self._sim.run(IDLE)
        each = self._agents * IDLE
        return [
            self._line(
                "idle, messages a second",
                "/node",
                (oracle.messages - messages) / each,
                reference.messages,
            ),
            self._line(
                "idle, bytes a second",
                "/node",
                (oracle.sent_bytes - sent) / each,
                reference.idle_bytes,
            ),
        ]

    def _let_write(self, seconds: float) -> int:
        """Let those that live write for so long, and all get it; return how many changes it was."""
        sim, oracle = self._sim, self._sim.oracle
        oracle.delays.clear()
        oracle.last_delays.clear()
        before = oracle.changes
        for number in range(round(RATE * seconds)):
            at = sim.now + (number + self._rng.random()) / RATE
            sim.at(at, partial(self._write_one, self._rng.choice(self._names)))
        sim.run(seconds)
        sim.settle()
        count = oracle.changes - before
        assert len(oracle.last_delays) == count, "somebody lacks something"
        return count

    def _write_one(self, name: str) -> None:
        self._written += 1
        self._sim[name].map("plan")[f"key {self._written % KEYS}"] = self._written

    def _write(self) -> list[Result]:
        oracle, reference = self._sim.oracle, self._reference
        copies, sent = oracle.copies, oracle.sent_bytes
        count = self._let_write(WRITING)
        needed = count * (self._agents - 1)
        redundancy = (oracle.copies - copies) / needed - 1
        size = (oracle.sent_bytes - sent) / count / self._agents
        return [
            Result(
                f"{self._agents}: redundant copies", "", redundancy, None, at_most(REDUNDANCY_MAX)
            ),
            self._line("delivery p50", "ms", _percentile(oracle.delays, 50), reference.delivery),
            self._line("delivery p99", "ms", _percentile(oracle.delays, 99)),
            self._line("last one p50", "ms", _percentile(oracle.last_delays, 50), reference.last),
            self._line("sent for a change", "B/node", size),
        ]

    def _fail(self) -> list[Result]:
        """Let the root of the tree and others fall silent all at once."""
        sim, oracle = self._sim, self._sim.oracle
        root = sim[self._names[0]].core.mesh.tree.root
        (head,) = (name for name in self._names if sim[name].core.mesh.tree.me == root)
        others = [name for name in self._names if name != head]
        dead = {head, *self._rng.sample(others, round(FAILED * self._agents) - 1)}
        for name in dead:
            # The power is cut: nobody is told.
            sim.crash(name, power=True)
        self._names = [name for name in self._names if name not in dead]
        oracle.hosts = len(self._names)
        self._let_write(LOSING)
        first = oracle.last_delays.copy()
        sim.run(RECOVERING)
        self._let_write(WRITING)
        name = "a tenth dies, last one"
        return [
            self._line(f"{name} p50, the first seconds", "ms", _percentile(first, 50)),
            self._line(f"{name} p99, the first seconds", "ms", _percentile(first, 99)),
            self._line(
                f"{name} p50, later",
                "ms",
                _percentile(oracle.last_delays, 50),
                self._reference.last,
            ),
        ]


def _percentile(seconds: list[float], share: int) -> float:
    """In milliseconds."""
    ordered = sorted(seconds)
    return 1000 * ordered[min(len(ordered) - 1, len(ordered) * share // 100)]
