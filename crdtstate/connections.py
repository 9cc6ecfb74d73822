"""
The connections of a replica: bytes that come go to the core, and what it wants sent leaves.

The core (`sync`) decides whom to dial, what to send and when to hang up; here that is done. Who is
at the other end is proved at the `Door` before the core hears of it. Each connection has one task
that reads, and one that writes what could not leave at once; until there is room for it, what waits
for a peer stays with the core. Who sends too much is read more slowly.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field

from crdtstate import handshake, sync, wire
from crdtstate.admission import Door
from crdtstate.bans import Offence
from crdtstate.errors import ProtocolError, StoreError, TooLarge, TransportError, UsageError
from crdtstate.events import Event
from crdtstate.handshake import Identity
from crdtstate.limits import CloseCode
from crdtstate.transports import CLOSE_NORMAL, Connection, Http, Listener, dial, listen

log = logging.getLogger("crdtstate")

DIAL_TIMEOUT = 3.0
"""Short: when a network is whole again, the next attempt must not wait for the last one."""

JUDGED_EVERY = 1.0
"""How often is looked whether somebody who is connected would still be let in: the certificate may
have expired, or been revoked, meanwhile."""

FAREWELL = 1.0
"""How long closing waits for what is queued to leave."""

THEIRS = "they said: "
"""How the core begins a reason that is the other side's: then it is this side that was blamed."""

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
    changes_hidden: int = 0
    """Changes of others that the rules of their documents refuse."""
    changes_out: int = 0
    """Own changes."""
    refused: Counter[str] = field(default_factory=Counter)
    """Connections that were refused or ended for a breach, by why."""
    throttled_seconds: float = 0.0
    """For how long peers that sent too much were not read."""


class _Link:
    """A connection's shell: whether its task has to send, and why it ended."""

    def __init__(self, connection: Connection, identity: Identity) -> None:
        self.connection = connection
        self.identity = identity
        self.wake = asyncio.Event()
        self.is_sending = False
        self.ending: tuple[wire.ByeCode, str] | None = None
        # What the other side closed it with, if it said more than goodbye.
        self.told = ""


class Connections:
    """The connections of one replica, and why there is none to some addresses.

    Args:
        agent: The agent's name.
        given: The addresses that the user gave; there may come more.
        tls: Whom to trust, for wss://.
        door: Who is let in, and what this replica proves to others.
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
        door: Door,
        *,
        emit: Callable[[Event], None],
        pump: Callable[[], None],
        wake: Callable[[], None],
        rearm: Callable[[], None],
    ) -> None:
        self._agent = agent
        self._given = given
        self._tls = tls
        self._door = door
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
        self.traffic = Traffic(refused=door.refused)
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

    async def listen(self, url: str, *, http: Http | None, tls: ssl.SSLContext | None) -> Listener:
        """Let others come in at *url*. Raises what `transports.listen` does."""
        return await listen(
            url,
            self.accept,
            http=http,
            tls=tls,
            gate=self._door,
            greeting_max=handshake.MESSAGE_BYTES_MAX,
        )

    def has_room(self) -> bool:
        """Whether there is room for another connection."""
        return self._is_open and len(self._links) < self._core.config.links_max + STRANGERS_MAX

    async def accept(self, connection: Connection) -> None:
        """Serve a connection that somebody else made, if there is room for it."""
        if not self._may_serve():
            return
        identity = await self._door.admit(connection)
        if self._may_serve():
            await self._make_room(identity)
            await self._serve(connection, None, identity)

    async def _make_room(self, identity: Identity) -> None:
        """Close the oldest connection of a key that would have too many."""
        if identity.certificate is None:
            return
        key = identity.certificate.key
        held = [
            link
            for link in self._links.values()
            if link.identity.certificate is not None and link.identity.certificate.key == key
        ]
        if len(held) >= self._core.config.limits.connections_per_key:
            reason = "there are newer connections with this key"
            await self._door.refuse(held[0].connection, CloseCode.DUPLICATE, reason, identity.agent)

    def _may_serve(self) -> bool:
        return self.has_room() and not self._core.mesh.has_left

    async def dial(self, url: str) -> None:
        """Try once to connect to an address, and serve the connection."""
        try:
            connection, identity = await reach(url, self._door, self._tls)
        except (TransportError, ProtocolError, UsageError, StoreError) as exc:
            log.debug("%s: %s", self._agent, exc)
            self._note_trouble(url, str(exc).removeprefix(f"{url}: "))
            self._core.dial_failed(url, self._loop.time())
            self._wake()
            return
        self.unreachable.pop(url, None)
        link = await self._serve(connection, url, identity)
        code = link.ending[0] if link.ending else None
        if code is not wire.ByeCode.DUPLICATE:
            reason = link.ending[1] if link.ending else link.told or "the connection broke"
            self._note_trouble(url, reason)

    def hang_up(self, peer: int, code: wire.ByeCode, reason: str) -> None:
        """End a connection once what is queued has left, but soon."""
        link = self._links.get(peer)
        if link is not None and link.ending is None:
            link.ending = (code, reason)
            link.wake.set()
            if code is wire.ByeCode.PROTOCOL and not reason.startswith(THEIRS):
                self._door.refused["broken-rules"] += 1
                self._door.blame(link.identity, link.connection.origin, Offence.BROKEN_RULES)
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

    async def recheck(self) -> None:
        """Look now at all who are connected, and part from those who would not be let in: their
        certificate was revoked or has expired, or their key is banned."""
        for link in list(self._links.values()):
            if (refusal := self._door.judge(link.identity)) is not None:
                await self._door.refuse(link.connection, *refusal, agent=link.identity.agent)

    async def _serve(self, connection: Connection, url: str | None, identity: Identity) -> _Link:
        """Serve one connection, made by dialling *url* if that is given, until it ends."""
        peer, self._next_peer = self._next_peer, self._next_peer + 1
        link = self._links[peer] = _Link(connection, identity)
        throttle = self._door.throttle(connection.origin)
        judge_at = self._loop.time() + JUDGED_EVERY
        certificate = identity.certificate
        self._core.peer_up(peer, self._loop.time(), url=url, certificate=certificate)
        sender = self._loop.create_task(self._send_waiting(peer, link))
        self._pump()
        reason = "closed"
        try:
            while True:
                data = await connection.receive()
                if self._loop.time() >= judge_at:
                    judge_at = self._loop.time() + JUDGED_EVERY
                    if (refusal := self._door.judge(identity)) is not None:
                        reason = refusal[1]
                        await self._door.refuse(connection, *refusal, agent=identity.agent)
                        break
                frames = wire.decode_message(data)
                if certificate is not None and not self._may_come(identity, frames):
                    reason = "too many writers of this key"
                    await self._door.refuse(connection, CloseCode.RATE, reason, identity.agent)
                    break
                self._receive(peer, frames, len(data))
                if throttle is not None:
                    pause = throttle.take(len(frames), len(data), self._loop.time())
                    if pause:
                        self.traffic.throttled_seconds += pause
                        await asyncio.sleep(pause)
        except TransportError as exc:
            reason = str(exc)
            link.told = reason.removeprefix(f"{connection.remote}: ") if ", 44" in reason else ""
        except ProtocolError as exc:
            reason = str(exc)
            self._door.blame(identity, connection.origin, Offence.BAD_FRAME)
            code = CloseCode.TOO_LARGE if isinstance(exc, TooLarge) else CloseCode.BAD_FRAME
            await self._door.refuse(connection, code, reason, agent=identity.agent)
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

    def _may_come(self, identity: Identity, frames: list[wire.Frame]) -> bool:
        return all(
            self._door.comes_as(identity, frame.writer)
            for frame in frames
            if isinstance(frame, wire.Hello)
        )

    def _receive(self, peer: int, frames: list[wire.Frame], size: int) -> None:
        """Give the core the frames of a message."""
        now = self._loop.time()
        self.traffic.messages_in += 1
        self.traffic.bytes_in += size
        for frame in frames:
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
                    code, reason = link.ending
                    is_breach = code is wire.ByeCode.PROTOCOL
                    number = CloseCode.BAD_FRAME if is_breach else CLOSE_NORMAL
                    await link.connection.close(reason, number)
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


async def reach(url: str, door: Door, tls: ssl.SSLContext | None) -> tuple[Connection, Identity]:
    """Connect to *url*, and have both sides prove who they are.

    Raises:
        TransportError: Nobody answered, or hung up.
        NotAdmitted: It is not of this mesh.
        UsageError: It leads elsewhere than a replica without a mesh may go.
        StoreError: The host's secret cannot be had.
    """
    door.check(url)
    greeting_max = handshake.MESSAGE_BYTES_MAX
    connection = await dial(url, timeout=DIAL_TIMEOUT, tls=tls, greeting_max=greeting_max)
    try:
        return connection, await door.present(connection)
    except BaseException:
        connection.abort()
        raise
