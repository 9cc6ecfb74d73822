"""
One agent of the demo, as a process: ``python -m crdtstate.demo.agent``.

It has its share of the files parsed, by a child, and records each in one transaction. What is
recorded is done: after a kill it goes on where its store says that it was, and the transaction
keeps it from counting anything twice.

It talks to the demo in lines. It is told ``go``, ``digest``, ``ping`` and ``delays``; it tells, as
JSON, what it has done and taken in. When its standard input ends, so does it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

from crdtstate.clock import Cut
from crdtstate.config import Config
from crdtstate.demo import survey
from crdtstate.demo.survey import DOCUMENT, FILES, Summary, names, owner, record
from crdtstate.errors import CRDTStateError
from crdtstate.events import Changed
from crdtstate.relay import digests, leash
from crdtstate.replica import Replica

PINGS = "pings"
"""A register for measuring."""

REPORT_EVERY = 0.2
"""Seconds between reports while only others work."""

PATIENCE = 60.0
"""Seconds in which a restarted agent has to catch up."""

CONFIG = Config(reconnect_max=1.0, discover=False)
"""All go through the relay: the network of those who are to be cut off leads there alone."""
"""Who is cut off tries to return every second, not every 30: the demo is a short one."""


class Agent:
    """An agent at work.

    Args:
        replica: Its open replica.
        root: The tree.
        share: The names of its files.
        run: The run that its changes belong to.
    """

    def __init__(self, replica: Replica, root: Path, share: list[str], run: str) -> None:
        self.replica = replica
        self.root = root
        self.share = share
        self.run = run
        self._document = replica.document(DOCUMENT)
        self._files = self._document.map(FILES)
        self._done = sum(name in self._files for name in share)
        self._pings = self._document.register(PINGS)
        # Of changes of others: the agent, when it was written, and how long it took to come here.
        self._at_work: list[tuple[str, int, float]] = []
        self._at_rest: list[float] = []
        # What was last reported.
        self._told: tuple[int, int, str] | None = None
        replica.on(Changed, self._note_delay)

    async def survey(self) -> None:
        """Do what is left of the share."""
        parser = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", survey.__file__, str(self.root), "-"), stdin=PIPE, stdout=PIPE
        )
        assert parser.stdin is not None and parser.stdout is not None
        try:
            for name in self.share:
                if name not in self._files:
                    parser.stdin.write(json.dumps(name).encode() + b"\n")
                    self._record(name, await parser.stdout.readline())
                    # Done is what no kill can undo.
                    await self.replica.durable()
                    self._done += 1
                    self.report()
        finally:
            parser.stdin.close()
            await parser.wait()

    def _record(self, name: str, answer: bytes) -> None:
        if not answer:
            raise CRDTStateError(f"{name}: the process that parses it has ended")
        with self.replica.transaction(message=name, run=self.run):
            record(self._document, name, Summary(**json.loads(answer)))

    def report(self, **more: Any) -> None:
        """Tell the demo how far it is, if that is news or there is *more* to say."""
        peers, version = len(self.replica.peers()), str(self.replica.version())
        if (self._done, peers, version) != self._told or more:
            self._told = (self._done, peers, version)
            tell(done=self._done, of=len(self.share), peers=peers, version=version, **more)

    def report_for_ever(self) -> None:
        """Report now and then, also what others do."""
        self.report()
        asyncio.get_running_loop().call_later(REPORT_EVERY, self.report_for_ever)

    async def ping(self) -> None:
        """Write something whose way to the others they measure, and wait until they have it."""
        self._pings.value = time.time()
        await self.replica.synced(PATIENCE)
        tell(ping=True)

    def tell_delays(self) -> None:
        tell(delays={"work": self._at_work, "rest": self._at_rest})

    def _note_delay(self, event: Changed) -> None:
        now_ms = time.time() * 1000
        if event.local or event.name not in (FILES, PINGS):
            return
        is_ping = event.name == PINGS
        why = self._pings.explain() if is_ping else self._files.explain(event.key)
        # Whose change it was may also have tidied up only.
        if why.winner is None or why.winner.agent != event.agent:
            return
        if is_ping:
            self._at_rest.append(now_ms - event.value * 1000)
        else:
            written_ms = why.winner.stamp.wall_ms
            self._at_work.append((event.agent, written_ms, now_ms - written_ms))


def tell(**what: Any) -> None:
    """Send one line to the demo."""
    print(json.dumps(what), flush=True)


async def live(options: argparse.Namespace) -> None:
    """Be an agent until standard input ends."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    commands: asyncio.Queue[str] = asyncio.Queue()
    assert task is not None
    leash.follow(
        lambda: loop.call_soon_threadsafe(task.cancel),
        lambda line: loop.call_soon_threadsafe(commands.put_nowait, line),
    )
    share = [n for n in names(options.path) if owner(n, options.of) == options.index]
    async with Replica(
        options.name, store=options.store, peers=[options.peer], config=CONFIG
    ) as replica:
        agent = Agent(replica, options.path, share, options.run)
        agent.report(ready=True)
        agent.report_for_ever()
        if options.until:
            await replica.wait_for(Cut.parse(options.until), PATIENCE)
            await replica.synced(PATIENCE)
            agent.report(recovered=True)
        while True:
            match await commands.get():
                case "go":
                    await agent.survey()
                case "digest":
                    tell(digest=digests(replica))
                case "ping":
                    await agent.ping()
                case "delays":
                    agent.tell_delays()


def main() -> int:
    """Run the process; return its exit code."""
    parser = argparse.ArgumentParser("crdtstate.demo.agent")
    parser.add_argument("--name", required=True)
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--of", type=int, required=True)
    parser.add_argument("--path", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--until")
    try:
        asyncio.run(live(parser.parse_args()))
    except (asyncio.CancelledError, BrokenPipeError):
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
