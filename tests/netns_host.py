"""
One replica as a process: a host of `test_netns`, commanded by lines of JSON on standard input.

    python netns_host.py NAME ROLE LISTEN STORE [PEER ...]

Each command is ``{"id": n, "do": name, ...}`` and gets one answer ``{"re": n, ...}``; several may
be under way at once. What happens to members and links is told unasked, as ``{"event": ...}``.
Every line carries ``at``, when it was, on the clock that all processes of a machine share. The end
of standard input ends the process, so that none is left behind.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import time
from collections import Counter
from typing import Any

from crdtstate import (
    Cut,
    MemberDown,
    MemberRetired,
    MemberSuspected,
    MemberUp,
    PeerConnected,
    PeerDisconnected,
    Replica,
    WaitTimeout,
)
from crdtstate.relay import leash

TOLD = (MemberUp, MemberSuspected, MemberDown, MemberRetired, PeerConnected, PeerDisconnected)
HOT_KEYS = 7
WORDS = "words that all hosts of this test know"


def say(**line: Any) -> None:
    os.write(1, json.dumps({"at": time.monotonic(), **line}).encode() + b"\n")


class Host:
    """What the commands act on. Each method named in a command is one."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.log, self.count = replica.map("log"), replica.counter("count")
        # Own writes are numbered on from where the store ends.
        self.wrote = self.tally()["writes"].get(replica.agent, 0)
        self.writing: asyncio.Task[None] | None = None

    def tally(self) -> dict[str, Any]:
        """How many numbered writes of each host are here, and whether they leave no gap."""
        dots = [key.rpartition("-") for key in self.log]
        writes = Counter(agent for agent, _, _ in dots)
        last = Counter({agent: 0 for agent in writes})
        for agent, _, number in dots:
            last[agent] = max(last[agent], int(number) + 1)
        return {"writes": dict(writes), "is_whole": last == writes}

    def write_one(self) -> None:
        with self.replica.transaction():
            self.log[f"{self.replica.agent}-{self.wrote}"] = self.wrote
            self.count.increment()
            self.replica.map("hot")[f"k{self.wrote % HOT_KEYS}"] = self.replica.agent
        self.wrote += 1

    async def write(self, count: int) -> dict[str, Any]:
        """Write so many times; answer once it is safe."""
        for _ in range(count):
            self.write_one()
            await asyncio.sleep(0)
        return await self.written()

    async def start(self, every: float) -> dict[str, Any]:
        """Write every so many seconds from now on."""

        async def go_on() -> None:
            while True:
                self.write_one()
                await asyncio.sleep(every)

        self.writing = asyncio.create_task(go_on())
        return {}

    async def stop(self) -> dict[str, Any]:
        """Write no more."""
        if self.writing is not None:
            self.writing.cancel()
            self.writing = None
        return await self.written()

    async def written(self) -> dict[str, Any]:
        """What is safe so far."""
        await self.replica.durable(timeout=10)
        return {"wrote": self.wrote, "version": str(self.replica.version())}

    async def reach(self, version: str, timeout: float) -> dict[str, Any]:
        """Wait for a version; the answer's ``at`` says when it was there."""
        try:
            await self.replica.wait_for(Cut.parse(version), timeout)
        except WaitTimeout as exc:
            return {"error": str(exc)}
        return {}

    async def content(self) -> dict[str, Any]:
        """All that is here, in short."""
        hot = sorted(self.replica.map("hot").items())
        all_of_it = json.dumps([sorted(self.log.items()), hot, self.count.value])
        digest = hashlib.sha256(all_of_it.encode()).hexdigest()
        return {"digest": digest, "count": self.count.value, **self.tally()}

    async def settle(self, members: int) -> dict[str, Any]:
        """Wait until so many members are up and all of them connected to this one."""
        changed = asyncio.Event()
        cancels = [self.replica.on(kind, lambda _: changed.set()) for kind in TOLD]
        while not self.has_settled(members):
            changed.clear()
            await changed.wait()
        for cancel in cancels:
            cancel()
        return {}

    def has_settled(self, members: int) -> bool:
        up = [member for member in self.replica.members() if member.state == "up"]
        return len(up) == members and len(self.replica.peers()) == members - 1

    async def answer(self, line: str) -> None:
        command = json.loads(line)
        number, do = command.pop("id"), command.pop("do")
        try:
            found = await getattr(self, do)(**command)
        except Exception as exc:
            found = {"error": repr(exc)}
        say(re=number, **found)


async def run(name: str, role: str, listen: str, store: str, peers: list[str]) -> None:
    assert role in ("agent", "relay")
    commands: asyncio.Queue[str | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def put(line: str | None) -> None:
        loop.call_soon_threadsafe(commands.put_nowait, line)

    leash.follow(lambda: put(None), put)
    async with Replica(
        name, role=role, listen=listen, store=store, peers=peers, mesh=WORDS
    ) as replica:
        for kind in TOLD:
            replica.on(kind, lambda event: say(event=type(event).__name__, agent=event.agent))
        host = Host(replica)
        say(re=0, wrote=host.wrote)
        answers = set()
        while (line := await commands.get()) is not None:
            answers.add(task := asyncio.create_task(host.answer(line)))
            task.add_done_callback(answers.discard)


if __name__ == "__main__":
    asyncio.run(run(*sys.argv[1:5], sys.argv[5:]))
