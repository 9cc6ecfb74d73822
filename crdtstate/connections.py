"""
The connections of a replica: bytes that come go to the core, and what it wants sent leaves.

The core (`sync`) decides whom to dial, what to send and when to hang up; here that is done. Each
connection has one task that reads, and one that writes what could not leave at once; until there is
room for it, what waits for a peer stays with the core.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Container
from dataclasses import dataclass

from crdtstate import sync, wire
from crdtstate.errors import ProtocolError, TransportError, UsageError
from crdtstate.events import Event, PeerRejected
from crdtstate.transports import Connection, dial

log = logging.getLogger("crdtstate")

DIAL_TIMEOUT = 3.0
"""Short: when a network is whole again, the next attempt must not wait for the last one."""

FAREWELL = 1.0
"""How long closing waits for what is queued to leave."""

STRANGERS_MAX = 100
"""Connections above `Config.links_max` whose other side has not said yet who it is."""


@dataclass(slots=True)
class Traffic:
    """What this replica has received and sent since it was opened."""

    messages_in: int = 0
    messages_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    changes_in: int = 0
    """Changes of others that were taken in; those that came with a snapshot are not counted."""
    changes_out: int = 0
    """Own changes."""


class _Link:
    """A connection's shell: whether its task has to send, and why it ended."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.wake = asyncio.Event()
        self.is_sending = False
        self.ending: tuple[wire.ByeCode, str] | None = None


class Connections:
    """The connections of one replica, and why there is none to some addresses.

    Args:
        agent: The agent's name.
        given: The addresses that the user gave; there may come more.
        tls: Whom to trust, for wss://.
        emit: Gets the events of connections.
        pump: Carries out what the core wants done, at once.
        wake: The same, soon.
        rearm: Looks again when the core wants to be called.
    """

    def __init__(
        self,
        agent: str,
        given: Container[str],
        tls: ssl.SSLContext | None,
        *,
        emit: Callable[[Event], None],
        pump: Callable[[], None],
        wake: Callable[[], None],
        rearm: Callable[[], None],
    ) -> None:
        self._agent = agent
        self._given = given
        self._tls = tls
        self._emit = emit
        self._pump = pump
        self._wake = wake
        self._rearm = rearm
        self._core: sync.Sync
        self._loop: asyncio.AbstractEventLoop
        self._is_open = False
        self._links: dict[int, _Link] = {}
        self._next_peer = 1
        self._link_ended = asyncio.Event()
        # What went into one message last, and that: most peers get the same.
        self._message: tuple[list[bytes], bytes] = ([], b"")
        # What came and went, for metrics.
        self.traffic = Traffic()
        # Address -> why it could not be reached the last time.
        self.unreachable: dict[str, str] = {}

    # Beginning and ending

    def open(self, core: sync.Sync) -> None:
        """Feed *core* from now on; it says what is sent."""
        self._core = core
        self._loop = asyncio.get_running_loop()
        self._is_open = True

    def close(self) -> None:
        """Accept nobody from now on, and tell the core no more of connections that end."""
        self._is_open = False

    async def accept(self, connection: Connection) -> None:
        """Serve a connection that somebody else made, if there is room for it."""
        if not self._is_open or self._core.mesh.has_left:
            return
        if len(self._links) < self._core.config.links_max + STRANGERS_MAX:
            await self._serve(connection, None)

    async def dial(self, url: str) -> None:
        """Try once to connect to an address, and serve the connection."""
        try:
            connection = await dial(url, timeout=DIAL_TIMEOUT, tls=self._tls)
        except (TransportError, UsageError) as exc:
            log.debug("%s: %s", self._agent, exc)
            self._note_trouble(url, str(exc).removeprefix(f"{url}: "))
            self._core.dial_failed(url, self._loop.time())
            self._wake()
            return
        self.unreachable.pop(url, None)
        link = await self._serve(connection, url)
        code = link.ending[0] if link.ending else None
        if code is not wire.ByeCode.DUPLICATE:
            self._note_trouble(url, link.ending[1] if link.ending else "the connection broke")

    def hang_up(self, peer: int, code: wire.ByeCode, reason: str) -> None:
        """End a connection once what is queued has left, but soon."""
        link = self._links.get(peer)
        if link is not None and link.ending is None:
            link.ending = (code, reason)
            link.wake.set()
            self._loop.call_later(FAREWELL, link.connection.abort)

    async def say_goodbye(self) -> None:
        """Wait until all have ended and what is queued has left, but not for long."""
        try:
            async with asyncio.timeout(FAREWELL):
                while self._links:
                    self._link_ended.clear()
                    await self._link_ended.wait()
        except TimeoutError:
            log.debug("%s: not everything queued could be sent", self._agent)

    def _note_trouble(self, url: str, why: str) -> None:
        """Remember why there is no connection to an address that the user gave."""
        if url in self._given:
            self.unreachable[url] = why

    # Serving

    async def _serve(self, connection: Connection, url: str | None) -> _Link:
        """Serve one connection, made by dialling *url* if that is given, until it ends."""
        peer, self._next_peer = self._next_peer, self._next_peer + 1
        link = self._links[peer] = _Link(connection)
        self._core.peer_up(peer, self._loop.time(), url=url)
        sender = self._loop.create_task(self._send_waiting(peer, link))
        self._pump()
        reason = "closed"
        try:
            while True:
                self._receive(peer, await connection.receive())
        except TransportError as exc:
            reason = str(exc)
        except ProtocolError as exc:
            reason = str(exc)
            self._emit(PeerRejected(connection.remote, reason))
        except Exception as exc:
            # A bug of ours. It costs this connection, not the replica.
            log.exception("%s: serving %s failed", self._agent, connection.remote)
            reason = f"internal error: {exc}"
        finally:
            sender.cancel()
            connection.abort()
            self._links.pop(peer, None)
            self._link_ended.set()
            if self._is_open:
                reason = link.ending[1] if link.ending else reason
                self._core.peer_down(peer, self._loop.time(), reason)
                self._wake()
        return link

    def _receive(self, peer: int, data: bytes) -> None:
        now = self._loop.time()
        self.traffic.messages_in += 1
        self.traffic.bytes_in += len(data)
        for frame in wire.decode_message(data):
            self._core.receive(peer, frame, now)
        # Not at once: others may have sent something too.
        self._wake()

    # Sending

    def transmit(self, peer: int) -> None:
        """Send what waits for a peer: at once if that is possible, else its task does."""
        link = self._links.get(peer)
        if link is None:
            return
        if link.connection.is_writable and not link.is_sending and self._core.has_unsent(peer):
            link.connection.send_now(self._next_message(peer))
        if self._core.has_unsent(peer) or link.ending is not None:
            link.wake.set()

    async def _send_waiting(self, peer: int, link: _Link) -> None:
        """Send what could not be sent at once, as much at a time as has collected."""
        try:
            while True:
                while self._core.has_unsent(peer):
                    link.is_sending = True
                    await link.connection.send(self._next_message(peer))
                    link.is_sending = False
                    self._rearm()
                if link.ending is not None:
                    await link.connection.close(link.ending[1])
                    return
                link.wake.clear()
                await link.wake.wait()
        except TransportError:
            # The reader notices too, and ends the link.
            pass

    def _next_message(self, peer: int) -> bytes:
        frames = self._core.take(peer)
        if frames != self._message[0]:
            self._message = frames, wire.encode_message(frames)
        message = self._message[1]
        self.traffic.messages_out += 1
        self.traffic.bytes_out += len(message)
        return message
