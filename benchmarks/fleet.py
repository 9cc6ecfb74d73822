"""
A fleet: ten agents on one relay, all of them processes, all of them writing as fast as they can.

What counts is how many changes per second the fleet gets done: all that were made, over the time
from the first write until everybody holds the same. Every change is sealed once, applied by ten
others, and journaled by all eleven, so the CPU time that the whole fleet spends on one change says
what a fleet of another size would cost. The floor has no processes, sockets or journals: ten agents
and a relay in one process, whose sync cores are handed each other's messages.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.children import Child, told
from benchmarks.measure import Effort, Result, cpu
from crdtstate import Cut, Map, Replica, Version, wire
from crdtstate.config import Config
from crdtstate.documents import DocumentSet
from crdtstate.identity import draw_writer
from crdtstate.sync import Persist, Sync, Transmit

LOCAL = "ws://127.0.0.1:0"
OWN_KEYS = 100
"""Keys that an agent writes; they are its own, or in the second run everybody's."""

CONVERGE_TIMEOUT = 120.0


def fleet(effort: Effort) -> list[Result]:
    """Changes per second of a fleet, and what each costs."""
    results: list[Result] = []
    agents = f"{effort.agents} agents"
    with _Processes(effort.agents) as processes:
        for shared, whose in ((False, "own keys"), (True, "the same keys")):
            ours = processes.run(effort.seconds, shared)
            floor = _simulated(effort, shared)
            note = f"{ours.changes:,} changes; all equal {ours.lag:.1f} s after the last write"
            results += [
                Result(f"{agents}, {whose}: changes", "/s", ours.rate, floor.rate, note=note),
                Result(
                    f"{agents}, {whose}: CPU of a change",
                    "us",
                    ours.cpu_each,
                    floor.cpu_each,
                    note="sync cores in one process, no sockets or journals",
                ),
            ]
    return results


@dataclass(frozen=True, slots=True)
class _Run:
    """What a fleet did.

    Attributes:
        changes: Made by all together, those that only tidy up included.
        seconds: From the first write until all were equal.
        lag: The part of it after the last write.
        cpu: CPU seconds of all processes, in that time.
    """

    changes: int
    seconds: float
    lag: float
    cpu: float

    @property
    def rate(self) -> float:
        return self.changes / self.seconds

    @property
    def cpu_each(self) -> float:
        return self.cpu / self.changes * 1e6


def _keys(agent: int, shared: bool) -> list[str]:
    return [f"key-{0 if shared else agent}-{number}" for number in range(OWN_KEYS)]


# In processes


class _Processes:
    """A relay and agents, each a process with a journal."""

    def __init__(self, agents: int) -> None:
        self._agents = agents
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            self.relay = stack.enter_context(Child(_relay, directory))
            address = self.relay.receive()
            self.agents = [
                stack.enter_context(Child(_agent, directory, number, address))
                for number in range(self._agents)
            ]
            for agent in self.agents:
                assert agent.receive() == "ready"
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            for each in (self.relay, *self.agents):
                each.send(None)
        self._stack.__exit__(kind, exc, traceback)

    def run(self, seconds: float, shared: bool) -> _Run:
        """Let all agents write for so many *seconds*, and wait until they are equal."""
        everybody = [self.relay, *self.agents]
        self.relay.send(_Order([], 0))
        for number, agent in enumerate(self.agents):
            agent.send(_Order(_keys(number, shared), seconds))
        started = time.monotonic()
        wrote: list[_Wrote] = [each.receive() for each in everybody]
        target = _merged([each.token for each in wrote])
        for each in everybody:
            each.send(target)
        ends: list[_End] = [each.receive() for each in everybody]
        assert all(end.content == ends[0].content for end in ends), "equal versions, unequal maps"
        before = _merged([each.token_before for each in wrote])
        ended = max(end.at for end in ends)
        return _Run(
            _total(target) - _total(before),
            ended - started,
            ended - max(each.at for each in wrote),
            sum(end.cpu for end in ends),
        )


@dataclass(frozen=True, slots=True)
class _Order:
    """Write these keys for so long."""

    keys: list[str]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Wrote:
    """What was there before and after, as tokens, and when the last write was."""

    token_before: str
    token: str
    at: float


@dataclass(frozen=True, slots=True)
class _End:
    """When everything was there, the CPU seconds it took, and what it is."""

    at: float
    cpu: float
    content: dict[str, int]


def _merged(tokens: Sequence[str]) -> str:
    versions: dict[str, Version] = {}
    for token in tokens:
        for name, version in Cut.parse(token).items():
            versions.setdefault(name, Version()).merge(version)
    return str(Cut(versions))


def _total(token: str) -> int:
    return sum(version.total for version in Cut.parse(token).values())


def _relay(pipe: Pipe, directory: str) -> None:
    async def run() -> None:
        path = Path(directory) / "relay.db"
        async with Replica("relay", store=path, listen=LOCAL, role="relay") as replica:
            pipe.send(replica.address)
            await _obey(pipe, replica)

    asyncio.run(run())


def _agent(pipe: Pipe, directory: str, number: int, relay: str) -> None:
    async def run() -> None:
        path = Path(directory) / f"agent-{number}.db"
        async with Replica(f"agent-{number}", store=path, peers=[relay]) as replica:
            await replica.synced(timeout=CONVERGE_TIMEOUT)
            pipe.send("ready")
            await _obey(pipe, replica)

    asyncio.run(run())


async def _obey(pipe: Pipe, replica: Replica) -> None:
    """Follow orders until there are no more."""
    plan = replica.map("plan")
    while (order := await told(pipe)) is not None:
        token, cpu_before = str(replica.version()), time.process_time()
        await _write(plan, order)
        pipe.send(_Wrote(token, str(replica.version()), time.monotonic()))
        await replica.wait_for(Cut.parse(await told(pipe)), timeout=CONVERGE_TIMEOUT)
        at, spent = time.monotonic(), time.process_time() - cpu_before
        pipe.send(_End(at, spent, dict(plan)))


async def _write(plan: Map, order: _Order) -> None:
    """Write in every turn of the loop, which also takes in what the others write."""
    until = time.monotonic() + order.seconds
    count = 0
    while time.monotonic() < until:
        plan[order.keys[count % len(order.keys)]] = count
        count += 1
        await asyncio.sleep(0)


# In one process, without sockets


class _Node(DocumentSet):
    """A replica's core without a shell: what it sends is laid out to be fetched."""

    def __init__(self, agent: str, role: wire.Role) -> None:
        writer = draw_writer(random.Random(agent))
        super().__init__(agent, writer, lambda: time.time_ns() // 1_000_000)
        hello = wire.Hello(wire.PROTOCOL_MIN, wire.PROTOCOL_MAX, writer, writer, agent, role)
        self.sync = Sync(self, hello, Config(), random.Random(writer), time.monotonic())
        # Connection -> frames to send through it.
        self.outboxes: dict[int, list[bytes]] = {}

    def pump(self) -> None:
        """What a replica's pump does, with a store that has committed before it is asked."""
        now = time.monotonic()
        if now >= self.sync.next_deadline():
            self.sync.tick(now)
        self.sync.local_changes([change for change, _ in self.take_sealed()], now)
        while effects := self.sync.effects():
            committed = 0
            for effect in effects:
                match effect:
                    case Transmit(peer):
                        while frames := self.sync.take(peer):
                            self.outboxes.setdefault(peer, []).extend(frames)
                    case Persist(number, _):
                        committed = number
                    case _:
                        pass
            if committed:
                self.sync.committed(committed, now)


class _Star:
    """Agents around a relay. Connection n of the relay is agent n's only one, its number 0."""

    def __init__(self, agents: int) -> None:
        self.relay = _Node("relay", "relay")
        self.agents = [_Node(f"agent-{n}", "agent") for n in range(agents)]
        now = time.monotonic()
        for number, agent in enumerate(self.agents):
            self.relay.sync.peer_up(number, now, url=None)
            agent.sync.peer_up(0, now, url="memory://dialled")
        self.settle()

    def settle(self) -> None:
        """Carry messages until there are none."""
        moved = True
        while moved:
            self.relay.pump()
            moved = False
            for number, agent in enumerate(self.agents):
                agent.pump()
                moved |= _carry(self.relay, number, agent, 0)
                moved |= _carry(agent, 0, self.relay, number)

    def is_converged(self) -> bool:
        version = self.relay.version()
        return all(agent.version() == version for agent in self.agents)


def _carry(source: _Node, outgoing: int, target: _Node, incoming: int) -> bool:
    """Bring what *source* sends through its connection *outgoing* to *target*."""
    frames = source.outboxes.pop(outgoing, [])
    for start in range(0, len(frames), wire.BUNDLE_FRAMES_MAX):
        message = wire.encode_message(frames[start : start + wire.BUNDLE_FRAMES_MAX])
        for frame in wire.decode_message(message):
            target.sync.receive(incoming, frame, time.monotonic())
    return bool(frames)


def _simulated(effort: Effort, shared: bool) -> _Run:
    star = _Star(effort.agents)
    before = star.relay.version()
    plans = [(a.map("plan"), _keys(n, shared)) for n, a in enumerate(star.agents)]
    rounds = effort.count(300)

    def write() -> None:
        for number in range(rounds):
            for plan, keys in plans:
                plan[keys[number % len(keys)]] = number
            star.settle()

    spent = cpu(write)
    assert star.is_converged() and not before
    changes = sum(version.total for version in star.relay.version().values())
    return _Run(changes, spent, 0.0, spent)
