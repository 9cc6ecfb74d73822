"""
A fleet under faults: what was acknowledged is there, and every checkpoint can be restored.

Agents, each a process with a store and with checkpoints in shared memory, SQLite, Redis and S3,
write and make checkpoints without a pause, while one misfortune after the other comes over them:
processes are killed with signal 9, one, the relay, or all at once; each tier in turn is gone,
hangs, is full, alters what it keeps; stores and checkpoint files are damaged or disappear. Then all
faults end, the fleet is left to settle, and everything is looked at: no agent lacks a line that was
ever confirmed to it, all read the same, and each checkpoint that is listed is whole and is a state
that its agent was in.

The faults and their order come from a seed; the moments from the machine. Redis and S3 are real
servers (see ``tests/servers.py``, which says what to install).
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults_agent import (
    CONFIG,
    Inspected,
    Opened,
    Order,
    Refused,
    Safe,
    Saved,
    Settled,
    live,
)
from benchmarks.measure import Effort, Result, at_least, at_most
from crdtstate import Replica
from crdtstate.tiers import open_tier

LOCAL = "ws://127.0.0.1:0"
PATIENCE = 120.0
"""Seconds after which a fleet without faults is taken for hung."""

SEED = 20261123

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["benchmarks.faults_agent", "crdtstate.transports.websocket"])


class Failure(AssertionError):
    """The fleet lost something; says what."""


class Agent:
    """One agent: its process, as long as it lives, and what it said in all of its lives."""

    def __init__(self, fleet: Fleet, number: int) -> None:
        self.name = f"agent-{number}"
        self.fleet = fleet
        self.lives = 0
        self.safe = 0
        self.answer: Any = None
        self.pipe: Connection | None = None
        self.process: Any = None

    @property
    def store(self) -> Path:
        return self.fleet.directory / f"{self.name}.db"

    @property
    def tier_file(self) -> Path:
        return self.fleet.directory / f"{self.name}.tier.db"

    @property
    def tiers(self) -> list[str]:
        fleet = self.fleet
        return [f"shm://{fleet.shm}", f"sqlite:///{self.tier_file}", fleet.redis.url, fleet.s3.url]

    def start(self) -> None:
        self.lives += 1
        self.pipe, theirs = _context.Pipe()
        seed = self.fleet.rng.getrandbits(32)
        directory, relay = str(self.fleet.directory), self.fleet.relay_url
        self.process = _context.Process(
            target=live, args=(theirs, self.name, directory, relay, self.tiers, seed), daemon=True
        )
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        """Kill -9, and hear what it still said."""
        self.process.kill()
        self.process.join()
        self.end()

    def end(self) -> None:
        assert self.pipe is not None
        with contextlib.suppress(EOFError, OSError):
            while self.pipe.poll():
                self.hear(self.pipe.recv())
        self.pipe.close()
        self.pipe = None

    def ask(self, verb: str, argument: Any = None) -> None:
        assert self.pipe is not None
        self.answer = None
        self.pipe.send(Order(verb, argument))

    def hear(self, said: Any) -> None:
        fleet = self.fleet
        match said:
            case Opened(lines, source):
                fleet.sources[source] += 1
                fleet.checks += 1
                if lines < self.safe and source == "store":
                    fleet.fail(f"{self.name}: {self.safe} lines were safe, it opened with {lines}")
            case Safe(lines):
                self.safe = max(self.safe, lines)
            case Saved(_, _, seconds):
                fleet.saved.append(seconds)
            case Refused(reason):
                fleet.refused.append((fleet.fault, f"{self.name}: {reason}"))
            case _:
                self.answer = said


class Fleet:
    """Agents, a relay, and the servers of their tiers."""

    def __init__(self, agents: int, seed: int, stack: ExitStack) -> None:
        # Here, so that who runs other benchmarks needs neither.
        from tests import servers

        self.rng = random.Random(seed)
        self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.shm = f"faults-{uuid.uuid4().hex[:12]}"
        stack.callback(shutil.rmtree, self.shm_directory, ignore_errors=True)
        self.servers = servers
        self.redis = servers.RedisServer()
        stack.callback(self.redis.stop)
        cluster = servers.S3Server()
        stack.callback(cluster.stop)
        self.s3 = servers.Gateway(cluster, cluster.make_bucket())
        stack.callback(self.s3.stop)
        os.environ.update(
            AWS_ACCESS_KEY_ID=servers.ACCESS_KEY, AWS_SECRET_ACCESS_KEY=servers.SECRET_KEY
        )
        self.relay: Any = None
        self.relay_url = ""
        self.agents = [Agent(self, number) for number in range(agents)]
        stack.callback(self.end)
        self.fault = "none"
        self.faults: Counter[str] = Counter()
        self.kills = 0
        self.sources: Counter[str] = Counter()
        self.saved: list[float] = []
        self.refused: list[tuple[str, str]] = []
        self.checks = 0
        self.failures: list[str] = []

    @property
    def shm_directory(self) -> Path:
        return Path(f"/dev/shm/crdtstate-{os.geteuid()}") / self.shm

    def fail(self, what: str) -> None:
        self.failures.append(f"{what} (fault: {self.fault})")

    # Living

    def start_relay(self) -> None:
        ours, theirs = _context.Pipe()
        port = self.relay_url.rpartition(":")[2].partition("/")[0] or "0"
        store = str(self.directory / "relay.db")
        self.relay = _context.Process(target=_relay, args=(theirs, store, port), daemon=True)
        self.relay.start()
        theirs.close()
        if not ours.poll(PATIENCE):
            raise Failure("the relay does not start")
        self.relay_url = ours.recv()

    def kill_relay(self) -> None:
        self.kills += 1
        self.relay.kill()
        self.relay.join()

    def end(self) -> None:
        for agent in self.agents:
            if agent.process is not None and agent.process.is_alive():
                agent.process.kill()
                agent.process.join()
        if self.relay is not None:
            self.relay.kill()
            self.relay.join()

    def run(self, seconds: float) -> None:
        """Let everybody live for a time."""
        self.hear_until(lambda: False, seconds)

    def hear_until(self, is_enough: Callable[[], bool], seconds: float) -> bool:
        """Hear what agents say until it is enough, or time is up."""
        until = time.monotonic() + seconds
        while not is_enough():
            left = until - time.monotonic()
            if left <= 0:
                return False
            by_pipe = {agent.pipe: agent for agent in self.agents if agent.pipe is not None}
            for pipe in wait(list(by_pipe), min(left, 1.0)):
                agent = by_pipe[pipe]  # type: ignore[index]
                try:
                    assert agent.pipe is not None
                    agent.hear(agent.pipe.recv())
                except (EOFError, OSError):
                    agent.process.join()
                    agent.end()
                    raise Failure(f"{agent.name} ended by itself ({self.fault})") from None
        return True

    def ask_all(self, verb: str, argument: Any = None) -> list[Any]:
        """Ask everybody, and wait for the answers."""
        for agent in self.agents:
            agent.ask(verb, argument)
        if not self.hear_until(lambda: all(a.answer is not None for a in self.agents), PATIENCE):
            silent = [agent.name for agent in self.agents if agent.answer is None]
            raise Failure(f"{', '.join(silent)} did not {verb} ({self.fault})")
        return [agent.answer for agent in self.agents]

    def hear_new(self, agents: Sequence[Agent]) -> None:
        """Wait until each of *agents* has saved something again: the fleet is well."""
        marks = {agent.name: agent.safe for agent in agents}
        if not self.hear_until(lambda: all(a.safe > marks[a.name] for a in agents), PATIENCE):
            raise Failure(f"not all write again ({self.fault})")


def _relay(pipe: Connection, store: str, port: str) -> None:
    async def run() -> None:
        listen = f"ws://127.0.0.1:{port}"
        async with Replica("relay", store=store, listen=listen, role="relay", config=CONFIG) as it:
            pipe.send(str(it.address))
            await asyncio.Event().wait()

    asyncio.run(run())


# Misfortunes: each comes, stays for a while, and goes

Fault = Callable[[Fleet, float], None]


def _agent_killed(fleet: Fleet, seconds: float) -> None:
    victim = fleet.rng.choice(fleet.agents)
    _kill(fleet, victim)
    fleet.run(seconds * fleet.rng.random())
    victim.start()


def _kill(fleet: Fleet, victim: Agent) -> None:
    fleet.kills += 1
    victim.kill()


def _relay_killed(fleet: Fleet, seconds: float) -> None:
    fleet.kill_relay()
    fleet.run(seconds)
    fleet.start_relay()


def _all_killed(fleet: Fleet, seconds: float) -> None:
    fleet.kill_relay()
    for agent in fleet.agents:
        _kill(fleet, agent)
    fleet.start_relay()
    for agent in fleet.agents:
        agent.start()


def _redis_gone(fleet: Fleet, seconds: float) -> None:
    fleet.redis.kill()
    fleet.run(seconds)
    fleet.redis.start()


def _redis_hangs(fleet: Fleet, seconds: float) -> None:
    with fleet.servers.stopped(fleet.redis.process):
        fleet.run(seconds)


def _redis_full(fleet: Fleet, seconds: float) -> None:
    import redis

    with redis.Redis(port=fleet.redis.port) as client:
        client.config_set("maxmemory", "1")
        fleet.run(seconds)
        client.config_set("maxmemory", "0")


def _s3_gone(fleet: Fleet, seconds: float) -> None:
    fleet.s3.kill()
    fleet.run(seconds)
    fleet.s3.start()


def _s3_hangs(fleet: Fleet, seconds: float) -> None:
    with fleet.servers.stopped(fleet.s3.process):
        fleet.run(seconds)


def _shm_lost(fleet: Fleet, seconds: float) -> None:
    shutil.rmtree(fleet.shm_directory, ignore_errors=True)
    fleet.run(seconds)


def _altered(at: int) -> Fault:
    """Values in one tier are altered, one byte each; at random, a third of them."""

    def alter(fleet: Fleet, seconds: float) -> None:
        asyncio.run(_alter(fleet.agents[0].tiers[at], fleet.rng))
        fleet.run(seconds)

    return alter


async def _alter(url: str, rng: random.Random) -> None:
    tier = await open_tier(url)
    try:
        for item in await tier.items(""):
            if rng.random() < 0.3 and (data := await tier.get(item.key)):
                at = rng.randrange(len(data))
                await tier.put(item.key, data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
    finally:
        await tier.close()


def _primary_lost(fleet: Fleet, seconds: float) -> None:
    """The file of checkpoints of one agent disappears while it is down."""
    victim = fleet.rng.choice(fleet.agents)
    _kill(fleet, victim)
    for path in fleet.directory.glob(f"{victim.tier_file.name}*"):
        path.unlink()
    victim.start()
    fleet.run(seconds)


def _store_lost(fleet: Fleet, seconds: float) -> None:
    """The store of one agent disappears: others have what is to be had, so let them have all."""
    _take(fleet, lambda path: path.unlink())
    fleet.run(seconds)


def _store_damaged(fleet: Fleet, seconds: float) -> None:
    """Bytes of one agent's store are altered."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        for _ in range(max(8, len(data) // 4096)):
            data[fleet.rng.randrange(len(data))] ^= 0xFF
        path.write_bytes(data)

    _take(fleet, damage)
    fleet.run(seconds)


def _take(fleet: Fleet, damage: Callable[[Path], None]) -> None:
    """Stop an agent once all have what it has, and do something to its store."""
    victim = fleet.rng.choice(fleet.agents)
    victim.ask("settle")
    fleet.hear_until(lambda: victim.answer is not None, PATIENCE)
    _share(fleet, victim)
    _kill(fleet, victim)
    for path in fleet.directory.glob(f"{victim.store.name}*"):
        if path.stat().st_size and not path.name.endswith("-shm"):
            damage(path)
    victim.start()


def _share(fleet: Fleet, victim: Agent) -> None:
    """Wait until another agent has what *victim* has."""
    other = next(agent for agent in fleet.agents if agent is not victim)
    other.ask("wait", victim.answer.version)
    if not fleet.hear_until(lambda: other.answer is not None, PATIENCE):
        raise Failure(f"{other.name} does not get what {victim.name} has ({fleet.fault})")


FAULTS: dict[str, Fault] = {
    "an agent killed": _agent_killed,
    "the relay killed": _relay_killed,
    "everybody killed": _all_killed,
    "Redis gone": _redis_gone,
    "Redis hangs": _redis_hangs,
    "Redis full": _redis_full,
    "Redis alters": _altered(2),
    "S3 gone": _s3_gone,
    "S3 hangs": _s3_hangs,
    "S3 alters": _altered(3),
    "shared memory lost": _shm_lost,
    "shared memory alters": _altered(0),
    "SQLite alters": _altered(1),
    "checkpoint file lost": _primary_lost,
    "store lost": _store_lost,
    "store damaged": _store_damaged,
}


# The campaign


class Outcome(NamedTuple):
    """What came of a campaign."""

    fleet: Fleet
    inspected: list[Inspected]
    seconds: float
    settling: float


def campaign(agents: int, rounds: int, seconds: float, seed: int) -> Outcome:
    """Let every fault come *rounds* times over a fleet, for *seconds* each, and look at the end."""
    started = time.monotonic()
    with ExitStack() as stack:
        fleet = Fleet(agents, seed, stack)
        fleet.start_relay()
        for agent in fleet.agents:
            agent.start()
        fleet.hear_new(fleet.agents)
        for _ in range(rounds):
            for name in fleet.rng.sample(list(FAULTS), len(FAULTS)):
                fleet.fault = name
                fleet.faults[name] += 1
                if sys.stderr.isatty():
                    print(
                        f"\r{time.monotonic() - started:5.0f} s  {name:<30}",
                        end="",
                        file=sys.stderr,
                    )
                FAULTS[name](fleet, seconds)
                fleet.hear_new(fleet.agents)
        fleet.fault = "none"
        calm = time.monotonic()
        settled: list[Settled] = fleet.ask_all("settle")
        for each in settled:
            for answer in fleet.ask_all("wait", each.version):
                assert answer is True
        settling = time.monotonic() - calm
        # So that there is something to find.
        asyncio.run(_alter(fleet.rng.choice(fleet.agents[0].tiers), fleet.rng))
        names = [agent.name for agent in fleet.agents]
        inspected: list[Inspected] = fleet.ask_all("inspect", names)
        _judge(fleet, inspected)
        for agent in fleet.agents:
            agent.ask("close")
            agent.process.join(PATIENCE)
        return Outcome(fleet, inspected, time.monotonic() - started, settling)


def _judge(fleet: Fleet, inspected: list[Inspected]) -> None:
    for agent, found in zip(fleet.agents, inspected, strict=True):
        fleet.checks += 1 + len(fleet.agents) + found.checkpoints * (1 + len(agent.tiers))
        if found.content != inspected[0].content:
            fleet.fail(f"{agent.name} reads otherwise than {fleet.agents[0].name}")
        for other in fleet.agents:
            if found.content[other.name] < other.safe:
                had, has = other.safe, found.content[other.name]
                fleet.fail(f"{agent.name} has {has} lines of {other.name}; {had} were safe")
        for what in (*found.unusable, *found.damaged):
            fleet.fail(what)


def faults(effort: Effort) -> Sequence[Result]:
    """Counts of what was done and lost."""
    agents = max(3, effort.agents // 2)
    rounds = max(1, round(effort.scale * 4))
    outcome = campaign(agents, rounds, min(effort.seconds, 1.5), SEED)
    return results_of(outcome)


def results_of(outcome: Outcome) -> list[Result]:
    """The lines of the table."""
    fleet = outcome.fleet
    tried = len(fleet.saved) + len(fleet.refused)
    listed = sum(found.checkpoints for found in outcome.inspected)
    altered = sum(found.altered for found in outcome.inspected)
    lines = sum(agent.safe for agent in fleet.agents)
    consistent = 100 * (1 - len(fleet.failures) / fleet.checks)
    lives = sum(agent.lives for agent in fleet.agents)
    sources = ", ".join(f"{count} from {source}" for source, count in sorted(fleet.sources.items()))
    refused = Counter(fault for fault, _ in fleet.refused)
    named = "; ".join(f"{count} during {fault}" for fault, count in refused.items()) or "none"
    said = "; ".join(fleet.failures[:5]) or f"{lines:,} confirmed transactions, all there"
    return [
        Result(
            "faults survived",
            "",
            sum(fleet.faults.values()),
            note=f"{fleet.kills} kills; {lives} lives opened: {sources}",
        ),
        Result("checks that failed", "", len(fleet.failures), None, at_most(0), said),
        Result(
            "checkpoints made, of those tried",
            "%",
            100 * len(fleet.saved) / max(tried, 1),
            None,
            at_least(99.9),
            f"{len(fleet.saved)} of {tried}; refused: {named}",
        ),
        Result("consistent", "%", consistent, None, at_least(99.99), f"{fleet.checks:,} checks"),
        Result(
            "listed checkpoints that can be restored",
            "%",
            100.0 * (1 - sum(len(f.unusable) for f in outcome.inspected) / max(listed, 1)),
            None,
            at_least(100),
            f"{listed} listed; {altered} altered in one of four tiers, and mended",
        ),
        Result(
            "checkpoint under faults, p50",
            "ms",
            1000 * statistics.median(fleet.saved or [0.0]),
            note=f"slowest {1000 * max(fleet.saved, default=0.0):,.0f} ms",
        ),
        Result("equal after the last fault", "s", outcome.settling),
    ]
