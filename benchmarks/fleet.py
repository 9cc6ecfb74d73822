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

from benchmarks.children import Child, told
from benchmarks.measure import Effort, Result, cpu
from crdtstate import Cut, Replica, Version, wire
from crdtstate.config import Config
from crdtstate.documents import DocumentSet
from crdtstate.sync import Persist, Send, Sync

LOCAL = "ws://127.0.0.1:0"
OWN_KEYS = 100
"""Keys that an agent writes; they are its own, or in the second run everybody's."""

CONVERGE_TIMEOUT = 120.0


def fleet(effort: Effort) -> list[Result]:
    """Changes per second of a fleet, and what each costs."""
    results: list[Result] = []
    for shared, whose in ((False, "own keys"), (True, "the same keys")):
        ours = _real(effort, shared)
        floor = _simulated(effort, shared)
        note = f"{ours.changes:,} changes; all equal {ours.lag:.1f} s after the last write"
        agents = f"{effort.agents} agents"
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


def _real(effort: Effort, shared: bool) -> _Run:
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        relay = stack.enter_context(Child(_relay, directory))
        address = relay.receive()
        agents = [
            stack.enter_context(
                Child(_agent, directory, number, address, _keys(number, shared), effort.seconds)
            )
            for number in range(effort.agents)
        ]
        everybody = [relay, *agents]
        for agent in agents:
            assert agent.receive() == "ready"
        for each in everybody:
            each.send("go")
        started = time.monotonic()
        written = [agent.receive() for agent in agents]
        all_of_it = _merged([token for token, _ in written])
        for each in everybody:
            each.send(str(all_of_it))
        ends = [each.receive() for each in everybody]
        for each in everybody:
            each.send("done")
    contents = [content for _, _, content in ends]
    assert all(content == contents[0] for content in contents), "they say equal and are not"
    ended = max(at for at, _, _ in ends)
    changes = sum(version.total for version in all_of_it.values())
    lag = ended - max(at for _, at in written)
    return _Run(changes, ended - started, lag, sum(spent for _, spent, _ in ends))


def _merged(tokens: Sequence[str]) -> Cut:
    versions: dict[str, Version] = {}
    for token in tokens:
        for name, version in Cut.parse(token).items():
            versions.setdefault(name, Version()).merge(version)
    return Cut(versions)


def _relay(pipe: Pipe, directory: str) -> None:
    async def run() -> None:
        path = Path(directory) / "relay.db"
        async with Replica("relay", store=path, listen=LOCAL, role="relay") as replica:
            pipe.send(replica.address)
            await told(pipe)
            before = time.process_time()
            await _converge(pipe, replica, before)

    asyncio.run(run())


def _agent(
    pipe: Pipe, directory: str, number: int, relay: str, keys: list[str], seconds: float
) -> None:
    async def run() -> None:
        path = Path(directory) / f"agent-{number}.db"
        async with Replica(f"agent-{number}", store=path, peers=[relay]) as replica:
            await replica.synced(timeout=CONVERGE_TIMEOUT)
            pipe.send("ready")
            await told(pipe)
            before = time.process_time()
            await _write(replica, keys, seconds)
            pipe.send((str(replica.version()), time.monotonic()))
            await _converge(pipe, replica, before)

    asyncio.run(run())


async def _write(replica: Replica, keys: list[str], seconds: float) -> None:
    """Write in every turn of the loop, which also takes in what the others write."""
    plan = replica.map("plan")
    until = time.monotonic() + seconds
    count = 0
    while time.monotonic() < until:
        plan[keys[count % len(keys)]] = count
        count += 1
        await asyncio.sleep(0)


async def _converge(pipe: Pipe, replica: Replica, before: float) -> None:
    """Wait until everything is here; tell when that was, the CPU time, and what it is."""
    everything = Cut.parse(await told(pipe))
    await replica.wait_for(everything, timeout=CONVERGE_TIMEOUT)
    ended, spent = time.monotonic(), time.process_time() - before
    pipe.send((ended, spent, dict(replica.map("plan"))))
    await told(pipe)


# In one process, without sockets


class _Node(DocumentSet):
    """A replica's core without a shell: what it sends is laid out to be fetched."""

    def __init__(self, agent: str, writer: int, role: wire.Role) -> None:
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
                    case Send(peer, frame):
                        self.outboxes.setdefault(peer, []).append(frame)
                    case Persist(number, _):
                        committed = number
                    case _:
                        pass
            if committed:
                self.sync.committed(committed, now)


class _Star:
    """Agents around a relay. Connection n of the relay is agent n's only one, its number 0."""

    def __init__(self, agents: int) -> None:
        self.relay = _Node("relay", 1, "relay")
        self.agents = [_Node(f"agent-{n}", n + 2, "agent") for n in range(agents)]
        now = time.monotonic()
        for number, agent in enumerate(self.agents):
            self.relay.sync.peer_up(number, now, dialled=False)
            agent.sync.peer_up(0, now, dialled=True)
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
