"""
Connections inside one event loop: the transport for tests and notebooks.

It keeps the promises of a real one, with a bounded queue each way, so that a slow reader
holds its sender back, and it ends the way sockets end: after `close` the other side still
reads what was sent before, after `abort` that is lost. Names such as ``memory://relay``
belong to one event loop and are free again once their listener is closed.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from weakref import WeakKeyDictionary

from crdtstate.errors import TransportError, UsageError
from crdtstate.transports import CLOSE_NORMAL, Accept, Gate, Http, serve
from crdtstate.wire import MESSAGE_BYTES_MAX

INBOX_LIMIT = 64
"""Messages that wait for a reader before their sender has to."""

_names: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, MemoryListener]] = (
    WeakKeyDictionary()
)


class MemoryConnection:
    """One side of a connection; `pair` makes both."""

    origin = None

    def __init__(self, remote: str) -> None:
        self.remote = remote
        self._other = self
        self._inbox: deque[bytes] = deque()
        self._ended: str | None = None  # why, once it has
        self._moved = asyncio.Event()  # an inbox or the end; whoever waits looks again

    @classmethod
    def pair(cls, remote: str) -> tuple[MemoryConnection, MemoryConnection]:
        """Return the dialler's side of a connection to *remote*, and the listener's."""
        one, other = cls(remote), cls(f"{remote}#dialler")
        one._other, other._other = other, one
        return one, other

    @property
    def is_writable(self) -> bool:
        return self._ended is None and len(self._other._inbox) < INBOX_LIMIT

    def send_now(self, data: bytes) -> None:
        if len(data) > MESSAGE_BYTES_MAX:
            self._end(f"a message of {len(data)} bytes is too big")
        else:
            self._other._inbox.append(bytes(data))
            self._other._moved.set()

    async def send(self, data: bytes) -> None:
        if len(data) > MESSAGE_BYTES_MAX:
            self._end(f"a message of {len(data)} bytes is too big")
        while self._ended is None and len(self._other._inbox) >= INBOX_LIMIT:
            await self._wait()
        if self._ended is not None:
            raise TransportError(f"{self.remote}: {self._ended}")
        self._other._inbox.append(bytes(data))
        self._other._moved.set()

    async def receive(self) -> bytes:
        while self._ended is None and not self._inbox:
            await self._wait()
        if not self._inbox:
            raise TransportError(f"{self.remote}: {self._ended}")
        self._other._moved.set()
        return self._inbox.popleft()

    def welcome(self) -> None:
        pass

    async def close(self, reason: str = "", code: int = CLOSE_NORMAL) -> None:
        self._end(f"closed: {reason}" if reason else "closed")

    def abort(self) -> None:
        if self._ended is None:
            # What was sent before it was closed in order still arrives.
            self._inbox.clear()
            self._other._inbox.clear()
            self._end("connection lost")

    async def _wait(self) -> None:
        self._moved.clear()
        await self._moved.wait()

    def _end(self, why: str) -> None:
        for side in (self, self._other):
            side._ended = side._ended or why
            side._moved.set()


class MemoryListener:
    """A name that can be dialled."""

    def __init__(self, address: str, accept: Accept) -> None:
        self.address = address
        self._accept = accept
        self._accepted: dict[asyncio.Task[None], MemoryConnection] = {}

    def connect(self) -> MemoryConnection:
        """Return the dialler's side of a new connection."""
        dialled, accepted = MemoryConnection.pair(self.address)
        task = asyncio.create_task(serve(self._accept, accepted))
        self._accepted[task] = accepted
        task.add_done_callback(self._accepted.pop)
        return dialled

    async def close(self) -> None:
        names = _names_here()
        if names.get(self.address) is self:
            del names[self.address]
        for connection in self._accepted.values():
            await connection.close("the listener closed")
        if self._accepted:
            await asyncio.wait(list(self._accepted))


async def dial(
    url: str, *, timeout: float, tls: ssl.SSLContext | None, greeting_max: int | None
) -> MemoryConnection:
    """See `crdtstate.transports.dial`."""
    listener = _names_here().get(_check(url))
    if listener is None:
        raise TransportError(f"{url}: nobody listens there")
    return listener.connect()


async def listen(
    url: str,
    accept: Accept,
    *,
    http: Http | None,
    tls: ssl.SSLContext | None,
    gate: Gate | None,
    greeting_max: int | None,
) -> MemoryListener:
    """See `crdtstate.transports.listen`."""
    if _check(url) in _names_here():
        raise TransportError(f"{url}: somebody listens there already")
    listener = _names_here()[url] = MemoryListener(url, accept)
    return listener


def _check(url: str) -> str:
    if not url.removeprefix("memory://"):
        raise UsageError(f"{url!r}: give it a name, as in memory://relay")
    return url


def _names_here() -> dict[str, MemoryListener]:
    return _names.setdefault(asyncio.get_running_loop(), {})
