"""
Many agents on one relay: two hundred of them, who make three hundred changes a second together.

What a relay does for one change is nearly all deliveries: it comes in once and goes out to all the
others. So what counts is the CPU time of a delivery, at the relay and at the agents, and whether
memory stays where it is. Agents live in four processes, as many to a loop; some of them, the
*witnesses*, note how long ago each change was due, which its value says, when they hear of it.
Where a trial shows that the machine cannot do so many deliveries, fewer changes are made: a queue
that only grows says nothing of the relay. The first line says how many.

`relayed` asks what the relay alone can do, at the full rate: most of the agents are *listeners*
then, connections that take everything and keep nothing.

`stalled` stops the process of one more agent, so that one connection takes nothing any more. That
must cost the relay little memory and the others no time: they have the same load before and after.

The floor is bare websockets in as many processes: as many connections, as many messages, of the
same size, and a server that passes each on to all the others.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from types import TracebackType
from typing import Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, broadcast, serve

from benchmarks.children import Child, told
from benchmarks.measure import Effort, Result, at_least, at_most, ratio_at_most, resident
from crdtstate import Changed, Cut, Replica, Version, wire

LOCAL = "ws://127.0.0.1:0"
AGENTS, SECONDS, RATE = 200, 60.0, 300.0
PROCESSES = 4
REPLICAS = 2
"""Agents of each process in `relayed`; the others only listen."""

WITNESSES = 2
"""Agents of each process that note when they hear of changes."""

KEYS = 5
"""Keys that an agent writes, its own."""

TRIAL_RATE = 10.0
TRIAL_PART = 12
BUSY = 0.5
"""The part of all cores that the load may take, as far as a trial can tell."""

MESSAGE_BYTES = 170
"""What our message for one small write takes."""

DUE = struct.Struct("d")

PEEK_EVERY = 0.25
TIMEOUT = 120.0
FLAT = 1.1
"""What memory may be in the end, to what it was in the middle."""

STALLED_MB_TARGET = 10.0
STALLED_P99_TARGET = 1.2


@dataclass(frozen=True, slots=True)
class _Size:
    """How many agents, and for how long. Both shrink with the square root of the effort, for
    deliveries are their product."""

    agents: int
    seconds: float

    @classmethod
    def of(cls, effort: Effort) -> Self:
        part = math.sqrt(effort.scale)
        return cls(max(PROCESSES, round(AGENTS * part)), SECONDS * part)


def many(effort: Effort) -> list[Result]:
    """What a relay and its agents spend on a delivery, and how long one takes."""
    size = _Size.of(effort)
    with _Crowd(size.agents, _relay, _crew) as crowd:
        rate = crowd.trial(size.seconds / TRIAL_PART)
        middle, end = crowd.run(rate, size.seconds / 2), crowd.run(rate, size.seconds / 2)
    with _Crowd(size.agents, _bare_relay, _bare_crew) as crowd:
        bare = crowd.run(rate, size.seconds / 4)
    ours = _both(middle, end)
    name = f"{size.agents} agents"
    found = [
        Result(f"{name}: changes", "/s", rate, None, at_least(RATE), f"{ours.changes:,} in all")
    ]
    for what, unit, measure in MEASURES:
        result = Result(f"{name}: {what}", unit, measure(ours), measure(bare), None, "bare")
        found.append(result)
    start_mb, middle_mb = middle.memory_before / 2**20, middle.memory_after / 2**20
    flat = ratio_at_most(FLAT)
    memory = f"{name}: relay's memory"
    return [
        *found,
        Result(f"{memory}, middle", "MB", middle_mb, start_mb, None, "at the start"),
        Result(f"{memory}, end", "MB", end.memory_after / 2**20, middle_mb, flat, "in the middle"),
    ]


def relayed(effort: Effort) -> list[Result]:
    """What a relay spends on all deliveries, and how late they are, while most of those around it
    only listen."""
    size = _Size.of(effort)
    with _Crowd(size.agents, _relay, _listeners) as crowd:
        middle, end = crowd.run(RATE, size.seconds / 2), crowd.run(RATE, size.seconds / 2)
    run = _both(middle, end)
    deliveries = run.changes * (size.agents - 1)
    seconds = size.seconds
    p50, p99 = _percentiles(run.delays)
    name = f"{size.agents} connections, {RATE:,.0f} changes/s"
    start_mb, middle_mb = middle.memory_before / 2**20, middle.memory_after / 2**20
    flat = ratio_at_most(FLAT)
    return [
        Result(f"{name}: made", "/s", run.changes / seconds, None, at_least(0.99 * RATE)),
        Result(f"{name}: p50", "ms", p50),
        Result(f"{name}: p99", "ms", p99),
        Result(f"{name}: relay's CPU", "% of one", 100 * run.relay_cpu / seconds),
        Result(f"{name}: of a change", "us", run.relay_cpu / run.changes * 1e6),
        Result(f"{name}: of a delivery", "us", run.relay_cpu / deliveries * 1e6),
        Result(f"{name}: relay's memory, middle", "MB", middle_mb, start_mb, None, "at the start"),
        Result(
            f"{name}: relay's memory, end",
            "MB",
            end.memory_after / 2**20,
            middle_mb,
            flat,
            "in the middle",
        ),
    ]


def stalled(effort: Effort) -> list[Result]:
    """What one agent that has stopped reading costs the relay and the others."""
    size = _Size.of(effort)
    with _Crowd(size.agents, _relay, _crew) as crowd, Child(_sleeper, crowd.address) as sleeper:
        pid = sleeper.receive()
        rate = crowd.trial(size.seconds / TRIAL_PART)
        before = crowd.run(rate, size.seconds / 3)
        os.kill(pid, signal.SIGSTOP)
        try:
            during = crowd.run(rate, size.seconds / 3)
        finally:
            os.kill(pid, signal.SIGCONT)
        after = crowd.run(rate, size.seconds / 3)
        sleeper.send(None)
    grown = max(0, during.memory_peak - before.memory_peak) / 2**20
    p50, p99 = _percentiles(during.delays)
    p50_free, p99_free = _percentiles(before.delays + after.delays)
    name = f"one of {size.agents + 1} stopped"
    note = f"the same {rate:,.0f} changes/s before and after"
    return [
        Result(f"{name}: relay's memory", "MB", grown, None, at_most(STALLED_MB_TARGET), "more"),
        Result(f"{name}: others' p50", "ms", p50, p50_free, None, note),
        Result(
            f"{name}: others' p99", "ms", p99, p99_free, ratio_at_most(STALLED_P99_TARGET), note
        ),
    ]


def _percentiles(delays: Sequence[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds."""
    cuts = statistics.quantiles(delays, n=100, method="inclusive")
    return cuts[49] * 1000, cuts[98] * 1000


# The crowd


@dataclass(frozen=True, slots=True)
class _Order:
    """Write *rate* changes a second for so long."""

    rate: float
    seconds: float


@dataclass(frozen=True, slots=True)
class _Wrote:
    """What a process of agents has then, as a token."""

    token: str
    changes: int


@dataclass(frozen=True, slots=True)
class _Target:
    """What all wrote: as a token, and how many changes that were."""

    token: str
    changes: int


@dataclass(frozen=True, slots=True)
class _Heard:
    """What came of it: CPU seconds, changes taken in by all its agents, seconds that each took."""

    cpu: float
    deliveries: int
    delays: list[float]


@dataclass(frozen=True, slots=True)
class _Mark:
    """The relay now: CPU seconds and bytes sent so far, bytes of memory, and their peak of late."""

    cpu: float
    sent: int
    memory: int
    peak: int


@dataclass(frozen=True, slots=True)
class _Run:
    """What the load did. CPU is in seconds, memory the relay's in bytes."""

    changes: int
    deliveries: int
    delays: list[float]
    relay_cpu: float
    agent_cpu: float
    sent: int
    memory_before: int
    memory_after: int
    memory_peak: int


def _both(first: _Run, second: _Run) -> _Run:
    return _Run(
        first.changes + second.changes,
        first.deliveries + second.deliveries,
        first.delays + second.delays,
        first.relay_cpu + second.relay_cpu,
        first.agent_cpu + second.agent_cpu,
        first.sent + second.sent,
        first.memory_before,
        second.memory_after,
        max(first.memory_peak, second.memory_peak),
    )


MEASURES: tuple[tuple[str, str, Callable[[_Run], float]], ...] = (
    ("p50", "ms", lambda run: _percentiles(run.delays)[0]),
    ("p99", "ms", lambda run: _percentiles(run.delays)[1]),
    ("relay's CPU of a change", "us", lambda run: run.relay_cpu / run.changes * 1e6),
    ("relay's CPU of a delivery", "us", lambda run: run.relay_cpu / run.deliveries * 1e6),
    ("agents' CPU of a delivery", "us", lambda run: run.agent_cpu / run.deliveries * 1e6),
    ("sent for a delivery", "bytes", lambda run: run.sent / run.deliveries),
)
"""What is compared with the floor."""


class _Crowd:
    """A relay in a process, and agents in some others.

    Args:
        relay: What the relay's process does.
        crew: What those of agents do.
    """

    def __init__(self, agents: int, relay: Callable[..., None], crew: Callable[..., None]) -> None:
        self._agents = agents
        self._work = relay, crew
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            relay, crew = self._work
            self._relay = stack.enter_context(Child(relay, directory))
            self.address: str = self._relay.receive()
            self._crews = []
            for number in range(PROCESSES):
                numbers = range(number, self._agents, PROCESSES)
                self._crews.append(stack.enter_context(Child(crew, self.address, numbers)))
            for each in self._crews:
                assert each.receive() == "ready"
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            # Agents first: one that comes back after the relay has left would wait for it.
            for each in (*self._crews, self._relay):
                each.send(None)
        self._stack.__exit__(kind, exc, traceback)

    def trial(self, seconds: float) -> float:
        """The changes per second to make, tried out for so long."""
        tried = self.run(TRIAL_RATE, seconds)
        each = (tried.relay_cpu + tried.agent_cpu) / tried.changes
        return min(RATE, BUSY * (os.cpu_count() or 1) / each)

    def run(self, rate: float, seconds: float) -> _Run:
        """Let the agents write, and wait until all of it is everywhere."""
        before = self._mark()
        for crew in self._crews:
            crew.send(_Order(rate / PROCESSES, seconds))
        wrote: list[_Wrote] = [crew.receive() for crew in self._crews]
        target = _Target(_merged(each.token for each in wrote), sum(each.changes for each in wrote))
        for crew in self._crews:
            crew.send(target)
        heard: list[_Heard] = [crew.receive() for crew in self._crews]
        after = self._mark()
        return _Run(
            target.changes,
            sum(each.deliveries for each in heard),
            [delay for each in heard for delay in each.delays],
            after.cpu - before.cpu,
            sum(each.cpu for each in heard),
            after.sent - before.sent,
            before.memory,
            after.memory,
            after.peak,
        )

    def _mark(self) -> _Mark:
        self._relay.send("mark")
        mark: _Mark = self._relay.receive()
        return mark


# In their processes


def _relay(pipe: Pipe, directory: str) -> None:
    async def run() -> None:
        path = Path(directory) / "relay.db"
        async with Replica("relay", store=path, listen=LOCAL, role="relay") as replica:
            pipe.send(replica.address)
            peak = _Peak()
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(peak.watch())
                while await told(pipe) is not None:
                    memory = resident()
                    sent = replica.traffic.bytes_out
                    pipe.send(_Mark(time.process_time(), sent, memory, peak.take()))
                watching.cancel()

    asyncio.run(run())


class _Peak:
    """The most memory this process has held, free but not given back included: to collect that
    takes long."""

    def __init__(self) -> None:
        self._most = 0

    async def watch(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(PEEK_EVERY)

    def take(self) -> int:
        """The peak since the last time."""
        self._look()
        most, self._most = self._most, 0
        return most

    def _look(self) -> None:
        if sys.platform == "linux":
            with open("/proc/self/statm") as statm:
                now = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            self._most = max(self._most, now)


def _sleeper(pipe: Pipe, relay: str) -> None:
    async def run() -> None:
        async with Replica("sleeper", peers=[relay]) as replica:
            await replica.synced(timeout=TIMEOUT)
            pipe.send(os.getpid())
            await told(pipe)

    asyncio.run(run())


def _crew(pipe: Pipe, relay: str, numbers: range) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            crew = _Crew([Replica(f"agent-{number}", peers=[relay]) for number in numbers])
            for replica in crew.replicas:
                await stack.enter_async_context(replica)
            for replica in crew.replicas:
                await replica.synced(timeout=TIMEOUT)
            pipe.send("ready")
            while (order := await told(pipe)) is not None:
                await crew.obey(order, pipe)

    asyncio.run(run())


def _listeners(pipe: Pipe, relay: str, numbers: range) -> None:
    """A few agents, and listeners for the others."""

    async def run() -> None:
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            listening = [tasks.create_task(_listen(relay, number)) for number in numbers[REPLICAS:]]
            crew = _Crew([Replica(f"agent-{n}", peers=[relay]) for n in numbers[:REPLICAS]])
            for replica in crew.replicas:
                await stack.enter_async_context(replica)
            for replica in crew.replicas:
                await replica.synced(timeout=TIMEOUT)
            pipe.send("ready")
            while (order := await told(pipe)) is not None:
                await crew.obey(order, pipe)
            for task in listening:
                task.cancel()

    asyncio.run(run())


async def _listen(relay: str, number: int) -> None:
    """Say hello, and that the relay is the way to the root of the tree; take what comes."""
    async with connect(relay, compression=None, ping_interval=None, proxy=None) as connection:
        low, high = wire.PROTOCOL_MIN, wire.PROTOCOL_MAX
        hello = wire.Hello(low, high, number + 1, number + 1, f"listener-{number}")
        beat = wire.Heartbeat(0, (), is_parent=True)
        await connection.send(wire.encode_message([wire.encode_frame(hello)]))

        async def show_life() -> None:
            while True:
                await connection.send(wire.encode_message([wire.encode_frame(beat)]))
                await asyncio.sleep(1.0)

        showing = asyncio.create_task(show_life())
        try:
            async for _ in connection:
                pass
        finally:
            showing.cancel()


class _Crew:
    """The agents of one process."""

    def __init__(self, replicas: list[Replica]) -> None:
        self.replicas = replicas
        self._delays: list[float] = []
        self._count = 0
        for witness in replicas[:WITNESSES]:
            witness.on(Changed, self._note)

    def _note(self, event: Changed) -> None:
        if not event.local:
            self._delays.append(time.monotonic() - event.value)

    async def obey(self, order: _Order, pipe: Pipe) -> None:
        self._delays.clear()
        cpu, taken, count = time.process_time(), self._taken(), self._count
        await _write_when_due(order, self._write)
        token = _merged(str(replica.version()) for replica in self.replicas)
        pipe.send(_Wrote(token, self._count - count))
        target: _Target = await told(pipe)
        for replica in self.replicas:
            await replica.wait_for(Cut.parse(target.token), timeout=TIMEOUT)
        spent = time.process_time() - cpu
        pipe.send(_Heard(spent, self._taken() - taken, self._delays.copy()))

    def _taken(self) -> int:
        return sum(replica.traffic.changes_in for replica in self.replicas)

    async def _write(self, due: float) -> None:
        round_, turn = divmod(self._count, len(self.replicas))
        replica = self.replicas[turn]
        replica.map("plan")[f"{replica.agent}/{round_ % KEYS}"] = due
        self._count += 1


async def _write_when_due(order: _Order, write: Callable[[float], Awaitable[None]]) -> None:
    """Write with the time when that was due. What is late was due nevertheless: else a stall of
    all would count as one late change."""
    due = time.monotonic()
    until = due + order.seconds
    while due < until:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        await write(due)
        due += 1 / order.rate


def _merged(tokens: Iterable[str]) -> str:
    version = Version()
    for token in tokens:
        for each in Cut.parse(token).values():
            version.merge(each)
    return str(Cut({"main": version}))


# The floor


def _bare_relay(pipe: Pipe, _: str) -> None:
    sent, around = 0, set()

    async def pass_on(websocket: ServerConnection) -> None:
        nonlocal sent
        around.add(websocket)
        async for message in websocket:
            others = around - {websocket}
            broadcast(others, message)
            sent += len(others) * len(message)
        around.remove(websocket)

    async def run() -> None:
        async with serve(pass_on, "127.0.0.1", 0, compression=None, ping_interval=None) as server:
            pipe.send(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            while await told(pipe) is not None:
                memory = resident()
                pipe.send(_Mark(time.process_time(), sent, memory, memory))

    asyncio.run(run())


def _bare_crew(pipe: Pipe, relay: str, numbers: range) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            connections = [
                await stack.enter_async_context(
                    connect(relay, compression=None, ping_interval=None, proxy=None)
                )
                for _ in numbers
            ]
            crew = _BareCrew(connections)
            reading = [tasks.create_task(crew.read(each)) for each in connections]
            pipe.send("ready")
            while (order := await told(pipe)) is not None:
                await crew.obey(order, pipe)
            for task in reading:
                task.cancel()

    asyncio.run(run())


class _BareCrew:
    """The connections of one process."""

    def __init__(self, connections: list[ClientConnection]) -> None:
        self._connections = connections
        self._witnesses = connections[:WITNESSES]
        self._delays: list[float] = []
        self._taken = 0
        self._count = 0
        self._arrived = asyncio.Event()

    async def read(self, connection: ClientConnection) -> None:
        async for message in connection:
            assert isinstance(message, bytes)
            self._taken += 1
            self._arrived.set()
            if connection in self._witnesses:
                (due,) = DUE.unpack_from(message)
                self._delays.append(time.monotonic() - due)

    async def obey(self, order: _Order, pipe: Pipe) -> None:
        cpu = time.process_time()
        await _write_when_due(order, self._write)
        pipe.send(_Wrote(str(Cut({})), self._count))
        target: _Target = await told(pipe)
        # Everybody gets all but its own.
        deliveries = target.changes * len(self._connections) - self._count
        while self._taken < deliveries:
            self._arrived.clear()
            await self._arrived.wait()
        pipe.send(_Heard(time.process_time() - cpu, self._taken, self._delays))

    async def _write(self, due: float) -> None:
        connection = self._connections[self._count % len(self._connections)]
        self._count += 1
        await connection.send(DUE.pack(due).ljust(MESSAGE_BYTES))
