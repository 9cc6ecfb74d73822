"""Document sets that exchange changes by hand, for tests below the network."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

from crdtstate.admission import Door
from crdtstate.change import Change, Snapshot, decode_change
from crdtstate.connections import reach
from crdtstate.credentials import open_credentials
from crdtstate.documents import DocumentSet
from crdtstate.limits import Limits
from crdtstate.transports import Connection

_ticks = itertools.count(1_000_000)


class Agent(DocumentSet):
    """A document set whose wall clock ticks one millisecond at each look."""

    def __init__(self, writer: int, name: str = "") -> None:
        super().__init__(name or f"agent-{writer}", writer, lambda: next(_ticks))
        self.outbox: list[Change] = []

    def sealed(self) -> list[Change]:
        """Seal what is open; return the new changes and keep them in the outbox."""
        changes = [change for change, _ in self.take_sealed()]
        self.outbox += changes
        return changes

    def receive(self, change: Change) -> list[str]:
        """Take in a change, as it comes from the wire; nothing if it is known."""
        document = self.find_or_make(change.document, change.shared)
        if document.version.covers(change.dot):
            return []
        return document.apply(decode_change(change.data))

    def load(self, other: Agent) -> None:
        """Take a snapshot of all of *other*'s documents, as it comes from the wire."""
        other.sealed()
        for name in other.documents():
            snapshot = Snapshot.decode(other.document(name).snapshot().encode())
            self.find_or_make(name, snapshot.shared).join(snapshot)


def exchange(*agents: Agent) -> None:
    """Bring everybody up to date, whoever wrote what, in causal order."""
    for agent in agents:
        agent.sealed()
    while True:
        moved = False
        for source in agents:
            for change in source.outbox:
                for agent in agents:
                    document = agent.find_or_make(change.document, change.shared)
                    if not document.version.covers(change.dot) and document.is_ready(change):
                        agent.receive(change)
                        moved = True
        if not moved:
            return


def contents(agent: Agent) -> dict[str, Any]:
    """Everything that lies in the lanes of an agent's documents."""
    return {name: agent.document(name).lanes.canonical() for name in agent.documents()}


def asynchronous(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on a fresh loop; one that hangs fails after three minutes."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(180):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    return run


async def join(url: str) -> Connection:
    """A connection to a replica on this machine, after the handshake: who has it speaks frames."""
    connection, _ = await reach(url, Door(open_credentials(None), Limits()), None)
    return connection
