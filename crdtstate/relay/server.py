"""
The relay as a process: opened, announced, and closed in order when it is told to stop.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterable
from typing import Literal

from crdtstate.relay import leash, pages
from crdtstate.replica import Replica
from crdtstate.transports import HttpAnswer

DEFAULT_LISTEN = "ws://127.0.0.1:8765"


async def serve(
    announce: Callable[[str], object],
    *,
    listen: str = DEFAULT_LISTEN,
    store: str | os.PathLike[str] | None = None,
    peers: Iterable[str] = (),
    durability: Literal["process", "power"] = "process",
    name: str = "relay",
    attached: bool = False,
) -> None:
    """Run a relay until SIGTERM or SIGINT, then say goodbye to everybody.

    Args:
        announce: Called with the address it listens on, once it does.
        attached: Also stop when standard input ends, so that it never outlives the program that
            started it with a pipe.

    Raises:
        TransportError: The address cannot be had.
        StoreError: The store cannot be opened.
        UsageError: An argument cannot be.
    """

    def http(path: str) -> HttpAnswer | None:
        return pages.answer(replica, path)

    replica = Replica(
        name,
        store=store,
        listen=listen,
        peers=peers,
        durability=durability,
        role="relay",
        http=http,
    )
    stop = asyncio.Event()
    _stop_on_signals(stop)
    if attached:
        loop = asyncio.get_running_loop()
        leash.follow(lambda: loop.call_soon_threadsafe(stop.set))
    async with replica:
        assert replica.address is not None
        announce(replica.address)
        await stop.wait()


def announce_as_text(address: str) -> None:
    """Print where the relay listens; the last word is the address."""
    print(f"relay listening on {address}", flush=True)


def announce_as_json(address: str) -> None:
    """Print where the relay listens, for scripts."""
    print(json.dumps({"address": address}), flush=True)


def _stop_on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop.set)
        except (NotImplementedError, RuntimeError):
            # Windows; and threads other than the main one, which get no signals.
            pass
