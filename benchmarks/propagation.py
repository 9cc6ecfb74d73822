"""
Propagation: how long after a write in one agent another one sees it.

Two processes, A and B, over real websockets on the loopback interface. A writes, B answers from a
handler of `Changed` by writing a key of its own, and half of the time until A is told of the answer
is what counts. So that holds, each way: sealing, journaling, sending, receiving, checking,
applying, journaling again, and telling the observer. The floor is the echo of a bare websocket
between the same two processes. By the wall clock: most of it is waiting.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from benchmarks.children import Child, told
from benchmarks.measure import Effort, Result, Target, ratio_at_most
from crdtstate import Changed, Replica

LOCAL = "ws://127.0.0.1:0"
BLOCK = 50
"""Round trips of one contestant before the next has its turn."""

MESSAGE_BYTES = 170
"""What our message for one small write takes."""

P50_TARGET = 3.0

RoundTrip = Callable[[int], Awaitable[None]]


def propagation(effort: Effort) -> list[Result]:
    """Milliseconds from a write in one process to another process that sees it."""
    blocks = effort.count(60, least=1)
    with tempfile.TemporaryDirectory() as directory:
        with Child(_answer, directory) as answering:
            addresses = answering.receive()
            with Child(_ask, directory, addresses, blocks) as asking:
                bare, saved, unsaved = asking.receive()
            answering.send("done")
    target = ratio_at_most(P50_TARGET)
    return [
        _result("p50, journaled", 50, saved, bare, target),
        _result("p99, journaled", 99, saved, bare),
        _result("p50, in memory", 50, unsaved, bare),
        _result("p99, in memory", 99, unsaved, bare),
    ]


def _result(
    name: str, percent: int, times: list[float], bare: list[float], target: Target | None = None
) -> Result:
    there_and_back, echo = (
        statistics.quantiles(taken, n=100, method="inclusive")[percent - 1] * 1000
        for taken in (times, bare)
    )
    note = "the echo of a bare websocket, there and back, between the same processes"
    return Result(name, "ms", there_and_back / 2, echo, target, note)


# B


def _answer(pipe: Pipe, directory: str) -> None:
    asyncio.run(_serve(pipe, Path(directory)))


async def _serve(pipe: Pipe, directory: Path) -> None:
    async with (
        serve(_echo, "127.0.0.1", 0, compression=None, ping_interval=None) as server,
        Replica("saved-b", store=directory / "b.db", listen=LOCAL) as saved,
        Replica("unsaved-b", listen=LOCAL) as unsaved,
    ):
        for replica in (saved, unsaved):
            _answer_pings(replica)
        port = server.sockets[0].getsockname()[1]
        pipe.send((f"ws://127.0.0.1:{port}", saved.address, unsaved.address))
        await told(pipe)


async def _echo(websocket: ServerConnection) -> None:
    async for message in websocket:
        await websocket.send(message)


def _answer_pings(replica: Replica) -> None:
    answers = replica.map("pong")

    def answer(event: Changed) -> None:
        if event.name == "ping":
            answers["n"] = event.value

    replica.on(Changed, answer)


# A


def _ask(pipe: Pipe, directory: str, addresses: tuple[str, str, str], blocks: int) -> None:
    pipe.send(asyncio.run(_measure(Path(directory), addresses, blocks)))


async def _measure(
    directory: Path, addresses: tuple[str, str, str], blocks: int
) -> list[list[float]]:
    bare, saved, unsaved = addresses
    async with AsyncExitStack() as stack:
        websocket = await stack.enter_async_context(
            connect(bare, compression=None, ping_interval=None, proxy=None)
        )
        message = bytes(MESSAGE_BYTES)

        async def echo(_: int) -> None:
            await websocket.send(message)
            await websocket.recv()

        one = Replica("saved-a", store=directory / "a.db", peers=[saved])
        two = Replica("unsaved-a", peers=[unsaved])
        contestants: list[RoundTrip] = [echo]
        for replica in (one, two):
            await stack.enter_async_context(replica)
            await replica.synced(timeout=30)
            contestants.append(_pinging(replica))
        return await _take_turns(contestants, blocks)


def _pinging(replica: Replica) -> RoundTrip:
    """What writes a number and waits until it is answered."""
    questions = replica.map("ping")
    loop = asyncio.get_running_loop()
    waiting: dict[int, asyncio.Future[None]] = {}

    def hear(event: Changed) -> None:
        if event.name == "pong":
            waiting.pop(event.value).set_result(None)

    async def ping(number: int) -> None:
        waiting[number] = future = loop.create_future()
        questions["n"] = number
        await future

    replica.on(Changed, hear)
    return ping


async def _take_turns(contestants: list[RoundTrip], blocks: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in contestants]
    number = 0
    for block in range(blocks + 1):
        for contestant, taken in zip(contestants, times, strict=True):
            for _ in range(BLOCK):
                number += 1
                before = time.perf_counter()
                await contestant(number)
                taken.append(time.perf_counter() - before)
            if not block:
                # Whoever starts is slow.
                taken.clear()
    return times
