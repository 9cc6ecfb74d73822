"""
What the operator of a fleet asks: how long each thing takes while ten agents work, p50 and p99.

A relay and agents, all processes, each agent with a store, checkpoints and keys of its own, which
all others have too. One agent after the other thing is timed while the rest write a few changes a
second, as agents do. The floor is the least that could do the same in the same process: a dict, a
bare SQLite file, bare websockets with a broadcasting server between the same processes, a bare
`pycrdt.Doc`. By the wall clock, since most of it is waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import msgpack
from pycrdt import Doc
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, broadcast, serve
from websockets.exceptions import ConnectionClosed

from benchmarks.checkpoints import bare_load, bare_save, record
from benchmarks.children import Child, told
from benchmarks.measure import Effort, Result, Target, at_most
from crdtstate import Changed, Config, Cut, Replica

LOCAL = "ws://127.0.0.1:0"
KEYS = 10_000
MESSAGE_BYTES = 170
"""What our message for one small write takes."""

BACKGROUND = 0.25
"""Seconds between the writes that an agent makes beside what is measured."""

PATIENCE = 120.0


class Times(NamedTuple):
    """Seconds: ours, and the floor's."""

    ours: list[float]
    floor: list[float]


def service(effort: Effort) -> Sequence[Result]:
    """Milliseconds, p50 and p99, of all that the fleet is asked."""
    keys, many = effort.count(KEYS), effort.count(KEYS) * effort.agents
    each, few = effort.count(300, least=3), max(2, effort.rounds)
    with _Fleet(effort.agents) as fleet:
        fleet.fill(keys)
        asker = fleet.agents[0]
        results = [
            *_lines("write, durable", fleet.ask(asker, "writes", each), 10, "a bare SQLite commit"),
            *_lines("read", fleet.ask(asker, "reads", each * 10), 5, "dict and unpackb"),
            *_lines("agent to agent", fleet.synchronise(each), 10, "bare websockets, one server"),
            *_lines("resolve, till all read it", fleet.resolve(each // 3 or 1), 50),
            *_lines(
                f"checkpoint, 1 % of {many:,} keys changed",
                fleet.ask(asker, "checkpoints", few),
                100,
                "get_update of the difference, zstd, sha256, fsync",
            ),
            *_lines(
                f"look at a checkpoint of {many:,} keys",
                fleet.ask(asker, "looks", few),
                500,
                "read, unpack, sha256, apply_update",
            ),
            *_lines(
                f"restore {many:,} keys, 1 % differ",
                fleet.ask(asker, "restores", few),
                500,
                "the same",
            ),
            fleet.exposure(asker, each),
            *_lines(
                f"restart after kill -9, {many:,} keys",
                fleet.restart(few, _keep),
                60_000,
                "the same",
            ),
            *_lines(
                f"store damaged, from a checkpoint, {many:,} keys",
                fleet.restart(few, _damage),
                60_000,
                "the same",
            ),
            *_lines(
                f"all lost, from the peers, {many:,} keys",
                fleet.restart(few, _lose),
                60_000,
                "the same",
            ),
        ]
    return results


def _lines(name: str, times: Times, limit: float, note: str = "") -> list[Result]:
    return [
        _line(f"{name}, p50", 50, times, at_most(limit), note),
        _line(f"{name}, p99", 99, times, None, ""),
    ]


def _line(name: str, percent: int, times: Times, target: Target | None, note: str) -> Result:
    floor = _percentile(times.floor, percent) if times.floor else None
    return Result(name, "ms", _percentile(times.ours, percent), floor, target, note)


def _percentile(seconds: Sequence[float], percent: int) -> float:
    if len(seconds) == 1:
        return seconds[0] * 1000
    return statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1] * 1000


# The fleet


class _Fleet:
    """A relay, a bare server, and agents, each a process."""

    def __init__(self, agents: int) -> None:
        self._count = agents
        self._stack = ExitStack()

    def __enter__(self) -> _Fleet:
        with ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.relay = stack.enter_context(Child(_relay, str(self.directory)))
            self.addresses: tuple[str, str] = self.relay.receive()
            self.agents = []
            self._agents_stack = stack.enter_context(ExitStack())
            for number in range(self._count):
                self.agents.append(self._agents_stack.enter_context(self._start(number)))
            for agent in self.agents:
                agent.receive()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        if exc[0] is None:
            for agent in self.agents:
                agent.send(("end", None))
            self.relay.send("end")
        self._stack.__exit__(*exc)

    def _start(self, number: int) -> Child:
        return Child(_agent, str(self.directory), number, self.addresses)

    def ask(self, agent: Child, verb: str, argument: Any = None) -> Any:
        agent.send((verb, argument))
        return agent.receive()

    def fill(self, keys: int) -> None:
        """Let all write their keys, and wait until all have all."""
        for agent in self.agents:
            agent.send(("fill", keys))
        tokens = [agent.receive() for agent in self.agents]
        for token in tokens:
            for agent in self.agents:
                agent.send(("wait", token))
            for agent in self.agents:
                agent.receive()
        for agent in self.agents:
            agent.send(("begin", None))
        for agent in self.agents:
            agent.receive()

    def synchronise(self, count: int) -> Times:
        """The first agent writes, the second is told."""
        self.ask(self.agents[1], "listen")
        self.ask(self.agents[0], "speak", count)
        return Times(*self.ask(self.agents[1], "heard", count))

    def resolve(self, count: int) -> Times:
        """Two agents disagree, one of them resolves it, and all read what it wrote."""
        first, second = self.agents[0], self.agents[1]
        taken: list[float] = []
        number = 0
        while len(taken) < count:
            number += 1
            # At one moment, or the one who hears of the other first writes over it.
            moment = time.monotonic() + 0.02
            for each in (first, second):
                each.send(("disagree", (number, moment)))
            tokens = [each.receive() for each in (first, second)]
            for each in self.agents:
                for token in tokens:
                    self.ask(each, "wait", token)
            for each in self.agents:
                self.ask(each, "expect", number)
            started = self.ask(first, "resolve", number)
            if started is not None:
                taken.append(max(self.ask(each, "resolved") for each in self.agents) - started)
        return Times(taken, [])

    def exposure(self, agent: Child, count: int) -> Result:
        """For how long at most a durable write would be lost to a power cut."""
        ages: list[float] = self.ask(agent, "ages", count)
        return Result(
            "recovery point after a power cut, longest",
            "ms",
            1000 * max(ages),
            None,
            at_most(5000),
            'the oldest write not synced yet; durability="power": 0',
        )

    def restart(self, count: int, harm: Callable[[Path], None]) -> Times:
        """Kill the last agent, do something to its files, and start it again."""
        taken, floor = [], []
        number = len(self.agents) - 1
        for _ in range(count):
            victim = self.agents[number]
            token = self.ask(victim, "saved")
            self.ask(self.agents[0], "wait", token)
            pid = self.ask(victim, "pid")
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(RuntimeError):
                victim.receive()
            harm(self.directory / f"agent-{number}.db")
            self.agents[number] = victim = self._agents_stack.enter_context(self._start(number))
            opened, source = victim.receive()
            started = time.monotonic()
            self.ask(victim, "wait", token)
            # What a damaged or empty store lacks at first comes from the peers.
            taken.append(opened + time.monotonic() - started)
            floor.append(self.ask(victim, "bare"))
            assert source in _SOURCES[harm], f"recovered from {source}"
        return Times(taken, floor)


def _keep(store: Path) -> None:
    pass


def _damage(store: Path) -> None:
    for path in store.parent.glob(f"{store.name}*"):
        if path.name in (store.name, f"{store.name}-wal"):
            path.write_bytes(random.Random(1).randbytes(path.stat().st_size))


def _lose(store: Path) -> None:
    for path in store.parent.glob(f"{store.stem}.*"):
        path.unlink()


_SOURCES: dict[Callable[[Path], None], set[str]] = {
    _keep: {"store"},
    _damage: {"checkpoint"},
    # A new one, empty: as for an agent that was never here. The peers have all of it.
    _lose: {"store"},
}


# The relays


def _relay(pipe: Pipe, directory: str) -> None:
    async def run() -> None:
        store = Path(directory) / "relay.db"
        connected: set[ServerConnection] = set()

        async def tell_others(websocket: ServerConnection) -> None:
            connected.add(websocket)
            with contextlib.suppress(ConnectionClosed):
                async for message in websocket:
                    broadcast(connected - {websocket}, message)
            connected.discard(websocket)

        async with (
            Replica("relay", store=store, listen=LOCAL, role="relay") as relay,
            serve(tell_others, "127.0.0.1", 0, compression=None, ping_interval=None) as server,
        ):
            port = server.sockets[0].getsockname()[1]
            pipe.send((str(relay.address), f"ws://127.0.0.1:{port}"))
            await told(pipe)

    asyncio.run(run())


# An agent


def _agent(pipe: Pipe, directory: str, number: int, addresses: tuple[str, str]) -> None:
    asyncio.run(_work(pipe, Path(directory), number, addresses))


async def _work(pipe: Pipe, directory: Path, number: int, addresses: tuple[str, str]) -> None:
    name = f"agent-{number}"
    store = directory / f"{name}.db"
    started = time.monotonic()
    async with AsyncExitStack() as stack:
        replica = await stack.enter_async_context(
            Replica(
                name,
                store=store,
                peers=[addresses[0]],
                checkpoints=[f"sqlite:///{directory}/{name}.tier.db"],
                config=Config(checkpoint_interval=3600.0),
            )
        )
        pipe.send(
            (
                time.monotonic() - started,
                replica.recovery.source,
            )
        )
        websocket = await stack.enter_async_context(
            connect(addresses[1], compression=None, ping_interval=None, proxy=None)
        )
        await _Desk(pipe, replica, directory, websocket).obey()


class _Desk:
    """Does what the parent asks; each method is named after what it is asked."""

    def __init__(
        self, pipe: Pipe, replica: Replica, directory: Path, websocket: ClientConnection
    ) -> None:
        self._pipe = pipe
        self._replica = replica
        self._directory = directory
        self._websocket = websocket
        self._own = replica.map(replica.agent)
        self._rng = random.Random(replica.agent)
        self._background: asyncio.Task[None] | None = None
        self._is_news = asyncio.Event()
        self._heard: list[float] = []
        self._heard_bare: list[float] = []
        self._resolved: asyncio.Future[float]

    async def obey(self) -> None:
        while True:
            verb, argument = await told(self._pipe)
            if verb == "end":
                break
            self._pipe.send(await getattr(self, verb)(argument))
        if self._background is not None:
            self._background.cancel()

    # Beside what is measured

    async def fill(self, keys: int) -> str:
        for number in range(keys):
            self._own[f"task-{number}"] = record(self._rng)
            if number % 200 == 0:
                await asyncio.sleep(0)
        await self._replica.durable()
        return str(self._replica.version())

    async def wait(self, token: str) -> None:
        await self._replica.wait_for(Cut.parse(token), timeout=PATIENCE)

    async def begin(self, _: None) -> None:
        async def write() -> None:
            while True:
                await asyncio.sleep(BACKGROUND * (0.5 + self._rng.random()))
                self._change(1)

        self._background = asyncio.create_task(write())

    def _change(self, count: int) -> None:
        for _ in range(count):
            self._own[f"task-{self._rng.randrange(len(self._own))}"] = record(self._rng)

    async def saved(self, _: None) -> str:
        """Make a checkpoint, and say what is in the store."""
        await self._replica.checkpoint()
        await self._replica.durable()
        return str(self._replica.version())

    async def pid(self, _: None) -> int:
        return os.getpid()

    # What is measured

    async def writes(self, count: int) -> Times:
        database = apsw.Connection(str(self._directory / "bare.db"))
        database.pragma("journal_mode", "wal")
        database.pragma("synchronous", "off")
        database.execute("CREATE TABLE t (v)")

        async def ours() -> None:
            self._own["measured"] = record(self._rng)
            await self._replica.durable()

        async def floor() -> None:
            database.execute("INSERT INTO t VALUES (?)", (bytes(MESSAGE_BYTES),))

        times = await _by_turns(count, ours, floor)
        database.close()
        return times

    async def reads(self, count: int) -> Times:
        keys = [f"task-{self._rng.randrange(len(self._own) // 2)}" for _ in range(count)]
        bare = {key: msgpack.packb(self._own[key]) for key in keys}
        ours, floor = [], []
        for key in keys:
            first = time.perf_counter()
            self._own[key]
            second = time.perf_counter()
            msgpack.unpackb(bare[key])
            ours.append(second - first)
            floor.append(time.perf_counter() - second)
        return Times(ours, floor)

    async def listen(self, _: None) -> None:
        def heard(event: Changed) -> None:
            if event.name == "spoken":
                self._heard.append(time.monotonic() - event.value)
                self._is_news.set()

        async def hear_bare() -> None:
            async for message in self._websocket:
                self._heard_bare.append(time.monotonic() - float(message))
                self._is_news.set()

        self._replica.on(Changed, heard)
        self._hearing = asyncio.create_task(hear_bare())

    async def speak(self, count: int) -> None:
        spoken = self._replica.map("spoken")
        for _ in range(count):
            await asyncio.sleep(0.01)
            spoken["now"] = time.monotonic()
            await asyncio.sleep(0.01)
            await self._websocket.send(repr(time.monotonic()).encode().ljust(MESSAGE_BYTES))

    async def heard(self, count: int) -> Times:
        async with asyncio.timeout(PATIENCE):
            while min(len(self._heard), len(self._heard_bare)) < count:
                self._is_news.clear()
                await self._is_news.wait()
        return Times(self._heard, self._heard_bare)

    async def disagree(self, order: tuple[int, float]) -> str:
        number, moment = order
        await asyncio.sleep(moment - time.monotonic())
        self._replica.map("disputed")[f"k{number}"] = self._replica.agent
        return str(self._replica.version())

    async def expect(self, number: int) -> None:
        """Note the moment at which the resolution of a conflict is read here."""
        self._resolved = asyncio.get_running_loop().create_future()
        disputed = self._replica.map("disputed")

        def look(event: object) -> None:
            if disputed.get(f"k{number}") == "resolved" and not self._resolved.done():
                self._resolved.set_result(time.monotonic())

        cancel = self._replica.on(Changed, look)
        self._resolved.add_done_callback(lambda _: cancel())

    async def resolve(self, number: int) -> float | None:
        """Resolve the conflict; returns when, or None if there is none after all."""
        found = [c for c in self._replica.conflicts() if c.key == f"k{number}"]
        if not found:
            return None
        started = time.monotonic()
        self._replica.resolve(found[0], "resolved")
        return started

    async def resolved(self, _: None) -> float:
        return await asyncio.wait_for(self._resolved, PATIENCE)

    async def checkpoints(self, count: int) -> Times:
        doc = self._replica.document("main").lanes._doc
        await self._replica.checkpoint()
        states = [doc.get_state()]

        async def ours() -> None:
            await self._replica.checkpoint()

        async def floor() -> None:
            bare_save(self._replica, self._directory / "bare.save", states[-1])

        return await _by_turns(count, ours, floor, lambda: self._disturb(states))

    def _disturb(self, states: list[bytes]) -> None:
        """Change a hundredth of all keys."""
        states.append(self._replica.document("main").lanes._doc.get_state())
        names = [f"agent-{number}" for number in range(1000)]
        maps = [found for name in names if (found := self._replica.map(name))]
        for each in maps:
            for _ in range(max(1, len(each) // 100)):
                each[f"task-{self._rng.randrange(len(each))}"] = record(self._rng)

    async def looks(self, count: int) -> Times:
        made = await self._replica.checkpoint()
        bare_save(self._replica, self._directory / "bare.save")

        async def ours() -> None:
            with await self._replica.at(made.id) as past:
                assert past.map(self._replica.agent)["task-0"]

        return await _by_turns(count, ours, self._bare)

    async def _bare(self) -> None:
        Doc[Any]().apply_update(bare_load(self._directory / "bare.save"))

    async def restores(self, count: int) -> Times:
        made = await self._replica.checkpoint()

        async def ours() -> None:
            await self._replica.restore(made.id)

        return await _by_turns(count, ours, self._bare, lambda: self._disturb([]))

    async def ages(self, count: int) -> list[float]:
        """How old the oldest write was, whenever the store had synced."""
        journal: Any = self._replica._store
        host, ages, written = journal._host, [], []
        sync = host.sync_wal

        def timed() -> None:
            mine, written[:] = written[:], []
            sync()
            ages.extend(time.monotonic() - at for at in mine[:1])

        host.sync_wal = timed
        for _ in range(count):
            self._change(1)
            at = time.monotonic()
            await self._replica.durable()
            written.append(at)
            await asyncio.sleep(0.005)
        # The last one, too.
        await asyncio.sleep(0.5)
        assert ages and not written
        host.sync_wal = sync
        return ages

    async def bare(self, _: None) -> float:
        """What a bare Doc takes to have it all."""
        path = self._directory / "bare.restart"
        bare_save(self._replica, path)
        started = time.monotonic()
        Doc[Any]().apply_update(bare_load(path))
        return time.monotonic() - started


async def _by_turns(
    count: int,
    ours: Callable[[], Awaitable[None]],
    floor: Callable[[], Awaitable[None]],
    prepare: Callable[[], None] = lambda: None,
) -> Times:
    """Time the two in turns, with a moment for everybody else before each."""
    times = Times([], [])
    for _ in range(count):
        prepare()
        for taken, work in zip(times, (ours, floor), strict=True):
            await asyncio.sleep(0.003)
            started = time.perf_counter()
            await work()
            taken.append(time.perf_counter() - started)
    return times
