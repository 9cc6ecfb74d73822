"""
An agent of the fault campaign (`faults`): it writes, makes checkpoints, says what is safe, and is
killed. Each transaction adds a line to the agent's own log and counts it, in two documents; so a
state in which the two differ is one that the agent never was in.
"""

from __future__ import annotations

import asyncio
import random
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, NamedTuple

from crdtstate import Config, CRDTStateError, Cut, Replica, Retention
from crdtstate.documents import DocumentSet

CONFIG = Config(
    # Small enough that snapshots, compactions and forgetting happen all the time.
    snapshot_after_bytes=100_000,
    log_bytes=200_000,
    heartbeat=0.3,
    tier_timeout=5.0,
    tier_retry=0.1,
    tier_retry_max=0.5,
)
KEEP = Retention(count=5)
SHARED_KEYS = 50


class Opened(NamedTuple):
    """The agent is open and found so many of its own lines; *source* is where they came from."""

    lines: int
    source: str


class Safe(NamedTuple):
    """So many of its lines are durable."""

    lines: int


class Saved(NamedTuple):
    """A checkpoint was made with so many of its lines."""

    id: str
    lines: int
    seconds: float


class Refused(NamedTuple):
    """A checkpoint could not be made."""

    reason: str


class Order(NamedTuple):
    """What the parent asks: "settle", "wait", "inspect" or "close"."""

    verb: str
    argument: Any = None


class Settled(NamedTuple):
    """It writes no more; its version, as a token."""

    version: str


class Inspected(NamedTuple):
    """What it reads, and what its checkpoints are good for.

    Attributes:
        content: Everything it reads: how many lines each agent has, all lines, the shared keys.
        checkpoints: How many are listed.
        altered: Places where a tier had something else than was written.
        unusable: Checkpoints that cannot be read, or are no state that the agent was in.
        damaged: What tiers still do not have as it was written, after they were mended.
    """

    content: dict[str, Any]
    checkpoints: int
    altered: int
    unusable: list[str]
    damaged: list[str]


def own(documents: DocumentSet, name: str) -> int:
    """How many lines the agent *name* has written, as its log and its counter say alike.

    Raises:
        AssertionError: They differ.
    """
    lines = len(documents.document("logs").map(name))
    count = documents.document("counts").counter(name).value
    assert lines == count, f"{name}: {lines} lines, counted {count}"
    return lines


def live(pipe: Pipe, name: str, directory: str, relay: str, tiers: list[str], seed: int) -> None:
    """What the process does."""
    asyncio.run(_live(pipe, name, Path(directory), relay, tiers, seed))


async def _live(
    pipe: Pipe, name: str, directory: Path, relay: str, tiers: list[str], seed: int
) -> None:
    orders: asyncio.Queue[Order] = asyncio.Queue()
    listening = asyncio.create_task(_listen(pipe, orders))
    store = directory / f"{name}.db"
    async with Replica(
        name, store=store, peers=[relay], checkpoints=tiers, retention=KEEP, config=CONFIG
    ) as replica:
        lines = len(replica.document("logs").map(name))
        pipe.send(Opened(lines, replica.recovery.source))
        if replica.recovery.source != "store":
            # What comes back document by document is no moment of this agent's before all is here.
            await replica.synced()
        work = _begin(pipe, replica, seed)
        while True:
            order = await orders.get()
            match order.verb:
                case "settle":
                    for task in work:
                        task.cancel()
                    await asyncio.gather(*work, return_exceptions=True)
                    pipe.send(Settled(str(replica.version())))
                case "wait":
                    await replica.wait_for(Cut.parse(order.argument))
                    pipe.send(True)
                case "inspect":
                    pipe.send(await _inspect(replica, order.argument))
                case _:
                    break
    listening.cancel()


def _begin(pipe: Pipe, replica: Replica, seed: int) -> list[asyncio.Task[None]]:
    return [
        asyncio.create_task(_write(pipe, replica, random.Random(seed))),
        asyncio.create_task(_save(pipe, replica, random.Random(seed))),
    ]


async def _listen(pipe: Pipe, orders: asyncio.Queue[Order]) -> None:
    loop = asyncio.get_running_loop()
    loop.add_reader(pipe.fileno(), lambda: orders.put_nowait(pipe.recv()))
    try:
        await asyncio.Event().wait()
    finally:
        loop.remove_reader(pipe.fileno())


async def _write(pipe: Pipe, replica: Replica, rng: random.Random) -> None:
    log = replica.document("logs").map(replica.agent)
    count = replica.document("counts").counter(replica.agent)
    shared = replica.map("plan")
    while True:
        for _ in range(rng.choice((1, 1, 3, 8))):
            with replica.transaction():
                # Never the same key twice, also if some lines are still to come from others.
                log[f"{replica.writer:x}-{rng.getrandbits(48):x}"] = rng.randrange(10**6)
                count.increment()
                shared[f"k{rng.randrange(SHARED_KEYS)}"] = rng.random()
        lines = len(log)
        await replica.durable()
        pipe.send(Safe(lines))
        await asyncio.sleep(rng.uniform(0.01, 0.06))


async def _save(pipe: Pipe, replica: Replica, rng: random.Random) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(rng.uniform(0.1, 0.6))
        lines, started = own(replica, replica.agent), loop.time()
        try:
            made = await replica.checkpoint()
        except CRDTStateError as exc:
            pipe.send(Refused(str(exc)))
        else:
            pipe.send(Saved(made.id, lines, loop.time() - started))


async def _inspect(replica: Replica, agents: list[str]) -> Inspected:
    content: dict[str, Any] = {agent: own(replica, agent) for agent in agents}
    content["logs"] = {a: sorted(replica.document("logs").map(a).items()) for a in agents}
    content["plan"] = sorted(replica.map("plan").items())
    # What tiers missed comes by itself; what was altered is found by who reads it, and mended.
    for attempt in ("find", "look"):
        await replica._checkpoints.settled()
        listed = replica.checkpoints()
        unusable: list[str] = []
        damaged: list[str] = []
        for checkpoint in listed:
            try:
                found = await replica.verify(checkpoint.id)
                with await replica.at(checkpoint.id) as past:
                    own(past, replica.agent)
            except (CRDTStateError, AssertionError) as exc:
                unusable.append(f"{replica.agent}: {checkpoint.id}: {exc}")
            else:
                damaged += [f"{checkpoint.id}: {tier}: {why}" for tier, why in found.failed.items()]
        if attempt == "find":
            altered = len(damaged)
    return Inspected(content, len(listed), altered, unusable, damaged)
