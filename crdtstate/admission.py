"""
The door: who is let in, and what the others get.

What comes over a network is a stranger until it has proved that it is of this mesh (`handshake`),
within a few seconds and a few kilobytes. How many strangers there may be is limited, by address;
who fails or breaks rules again and again is banned for a while (`bans`), by address as long as it
is a stranger, by its key afterwards. Own processes on this machine are spared that: a ban of
127.0.0.1 would hit everybody but the culprit.

Without a mesh a replica speaks only to processes of the same user on this machine, who share the
*host secret*; to listen or dial anywhere else is refused. Connections within a process
(``memory://``) prove nothing.

Every refusal is told the other side with a code (`limits.CloseCode`), and counted. Strangers could
fill a log, so of them a few are told and the others only counted.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from urllib.parse import urlsplit

from crdtstate.bans import CULPRITS_MAX, Bans, Bucket, Culprit, Offence, address_of, is_loopback
from crdtstate.certificates import Certificate, is_valid_at
from crdtstate.credentials import Credentials, open_host_credentials
from crdtstate.errors import (
    NotAdmitted,
    ProtocolError,
    StoreError,
    TransportError,
    UsageError,
)
from crdtstate.events import Event, PeerRejected
from crdtstate.handshake import (
    ANYBODY,
    FAILED,
    NONCE_BYTES,
    Dialler,
    Identity,
    Listener,
)
from crdtstate.limits import CloseCode, Limits
from crdtstate.transports import Connection, HttpAnswer, Origin

log = logging.getLogger("crdtstate")

TOLD_BURST = 10
TOLD_PER_SECOND = 0.1
"""How many refusals become events and lines of the log; those of strangers count apart."""

HOUR = 3600.0

RELOAD_EVERY = 1.0
"""How often is looked whether the file of the credentials was altered, at most."""

HINT = (
    "make one with `crdtstate mesh create` and `crdtstate invite NAME`, and give each replica its "
    "token: mesh=Path(FILE), or --mesh FILE; or let all share words: `crdtstate keygen --words`"
)


class Door:
    """Who is let into one replica, or by whom it is.

    Args:
        credentials: What this process can prove.
        limits: How many strangers, and how often.
        has_tls_binding: Whether handshakes are bound to the TLS certificate; not behind a proxy
            that does the TLS.
        has_room: Whether there is room for another connection.
        is_revoked: Whether a certificate counts no more.
        emit: Gets the event of a refusal.
    """

    def __init__(
        self,
        credentials: Credentials,
        limits: Limits,
        *,
        has_tls_binding: bool = True,
        has_room: Callable[[], bool] = lambda: True,
        is_revoked: Callable[[Certificate], bool] = lambda _: False,
        emit: Callable[[Event], None] = lambda _: None,
    ) -> None:
        self._given = credentials
        self._host: Credentials | None = None  # the host's secret, once it was needed
        self._limits = limits
        self._has_tls_binding = has_tls_binding
        self._has_room = has_room
        self._is_revoked = is_revoked
        self._emit = emit
        self._bans = Bans(limits)
        # Strangers that came in: by address, of those that are not spared.
        self._half_open: Counter[str] = Counter()
        # What is told of strangers, and apart from that of those who have a name.
        self._told: dict[bool, Bucket] = {}
        self._reload_at = float("-inf")
        # Key -> writers that came with it, and when each came last.
        self._writers: dict[bytes, dict[int, float]] = {}
        # Why somebody was refused -> how often, for metrics.
        self.refused: Counter[str] = Counter()

    # Credentials

    def credentials(self) -> Credentials:
        """What is proved: of the mesh, or without one the host's secret, made if there is none.

        Raises:
            StoreError: The host's secret cannot be had. Says what to do.
        """
        if self._given.kind != "none":
            self.renew()
            return self._given
        if self._host is None:
            self._host = open_host_credentials()
        return self._host

    def check(self, url: str) -> None:
        """Raise UsageError if a URL is not to be listened on, or dialled, without a mesh."""
        if self._given.kind == "none" and not is_private(url):
            raise UsageError(f"{url}: beyond this machine a mesh is needed; {HINT}")

    def renew(self) -> bool:
        """Look whether the file with the credentials was altered, not more often than now and then;
        whether anything is different now."""
        now = time.monotonic()
        if now < self._reload_at:
            return False
        self._reload_at = now + RELOAD_EVERY
        try:
            is_new = self._given.reload()
        except (UsageError, StoreError) as exc:
            log.error("the credentials were altered and are not taken: %s", exc)
            return False
        if is_new:
            log.info("%s: read again", self._given.path)
        return is_new

    # Before it is known who comes

    def enter(self, host: str | None) -> HttpAnswer | None:
        """See `transports.Gate`."""
        if not self._has_room():
            return self._turn_away("full", HTTPStatus.SERVICE_UNAVAILABLE, 1)
        if host is None or self._is_spared(host):
            return None
        address = address_of(host)
        if left := self._bans.left(address, _now()):
            return self._turn_away("banned", HTTPStatus.TOO_MANY_REQUESTS, left)
        limits = self._limits
        if (
            self._half_open[address] >= limits.half_open_per_address
            or self._half_open.total() >= limits.half_open
        ):
            return self._turn_away("half-open", HTTPStatus.SERVICE_UNAVAILABLE, 1)
        self._half_open[address] += 1
        return None

    def leave(self, host: str | None) -> None:
        """See `transports.Gate`."""
        if host is not None and not self._is_spared(host):
            address = address_of(host)
            self._half_open[address] -= 1
            if not self._half_open[address]:
                del self._half_open[address]

    def _turn_away(self, why: str, status: HTTPStatus, seconds: float) -> HttpAnswer:
        self.refused[why] += 1
        body = f"{status.phrase}.\n".encode()
        return HttpAnswer(body, status=status, headers=(("Retry-After", f"{seconds:.0f}"),))

    def _is_spared(self, host: str) -> bool:
        return self._limits.spare_loopback and is_loopback(host)

    # The handshake

    async def admit(self, connection: Connection) -> Identity:
        """Have somebody who came in prove who it is.

        Raises:
            NotAdmitted: It did not, or is banned, or revoked. It was told so, and hung up on.
            TransportError: It hung up itself.
        """
        return await self._shake(connection, self._listen)

    async def present(self, connection: Connection) -> Identity:
        """Prove who this is to somebody who was dialled, and have it do the same.

        Raises:
            NotAdmitted: It did not, or is banned, or revoked. It was told so, and hung up on.
            TransportError: It hung up, perhaps because it does not believe this side.
        """
        return await self._shake(connection, self._dial)

    async def _shake(
        self, connection: Connection, how: Callable[[Connection, Origin], Awaitable[Identity]]
    ) -> Identity:
        origin = connection.origin
        if origin is None:
            return ANYBODY
        is_arrival = how == self._listen
        try:
            async with asyncio.timeout_at(origin.since + self._limits.handshake_timeout):
                found = await how(connection, origin)
        except TimeoutError:
            self._blame_stranger(origin, Offence.SLOW, is_arrival)
            why = "the handshake took too long"
            await self._turn_out(connection, CloseCode.TIMEOUT, why, is_arrival)
            raise NotAdmitted(f"{connection.remote}: {why}") from None
        except TransportError:
            self._blame_stranger(origin, Offence.SLOW, is_arrival)
            raise
        except ProtocolError as exc:
            if is_arrival and not self._is_own(origin):
                self._bans.blame_handshake(address_of(str(origin.host)), _now())
            await self._turn_out(connection, CloseCode.NOT_ADMITTED, FAILED, is_arrival)
            why = FAILED if is_arrival else "it is not of this mesh; see mesh="
            raise NotAdmitted(f"{connection.remote}: {why}") from exc
        if (refusal := self.judge(found)) is not None:
            await self.refuse(connection, *refusal, agent=found.agent)
            raise NotAdmitted(f"{connection.remote}: {refusal[1]}")
        return found

    async def _listen(self, connection: Connection, origin: Origin) -> Identity:
        credentials, wall_ms = self.credentials(), _wall_ms()
        nonce, decoy = (secrets.token_bytes(NONCE_BYTES) for _ in range(2))
        side = Listener(credentials, nonce, wall_ms, self._channel(origin), decoy)
        await connection.send(side.answer(await connection.receive()))
        last, found = side.admit(await connection.receive())
        # Before the last message: what it gets then it may answer with frames of any size.
        connection.welcome()
        await connection.send(last)
        return found

    async def _dial(self, connection: Connection, origin: Origin) -> Identity:
        credentials, wall_ms = self.credentials(), _wall_ms()
        nonce = secrets.token_bytes(NONCE_BYTES)
        side = Dialler(credentials, nonce, wall_ms, self._channel(origin))
        await connection.send(side.greet())
        third = side.prove(await connection.receive())
        # It knows the secret, and may send frames right behind its last message.
        connection.welcome()
        await connection.send(third)
        return side.finish(await connection.receive())

    async def _turn_out(
        self, connection: Connection, code: CloseCode, reason: str, is_arrival: bool
    ) -> None:
        if is_arrival:
            await self.refuse(connection, code, reason)
        else:
            # Whom a replica cannot reach, and why, it lists.
            await connection.close(reason, code)

    def _channel(self, origin: Origin) -> bytes:
        return origin.channel if self._has_tls_binding else b""

    # Afterwards

    def judge(self, identity: Identity) -> tuple[CloseCode, str] | None:
        """Why somebody who proved who it is may not be connected, if that is so."""
        found = identity.certificate
        if found is None:
            return None
        if self._is_revoked(found):
            return CloseCode.REVOKED, "its certificate was revoked"
        if not is_valid_at(found, _wall_ms()):
            return CloseCode.REVOKED, "its certificate is not valid now"
        if left := self._bans.left(found.key, _now()):
            return CloseCode.BANNED, f"banned for {left:.0f} s"
        return None

    def comes_as(self, identity: Identity, writer: int) -> bool:
        """Somebody who is connected says as which writer; return whether it may."""
        if identity.certificate is None:
            return True
        now, key = _now(), identity.certificate.key
        lately = self._writers.pop(key, {})
        lately = {each: at for each, at in lately.items() if now - at < HOUR}
        if may := writer in lately or len(lately) < self._limits.writers_per_hour:
            lately[writer] = now
        else:
            self._bans.blame(key, Offence.RATE, now)
        self._writers[key] = lately
        while len(self._writers) > CULPRITS_MAX:
            del self._writers[next(iter(self._writers))]
        return may

    async def refuse(
        self, connection: Connection, code: CloseCode, reason: str, agent: str | None = None
    ) -> None:
        """Close a connection with a code, count that, and tell of it, unless there was much of that
        lately."""
        self.refused[code.name.lower().replace("_", "-")] += 1
        now = _now()
        told = self._told.setdefault(agent is None, Bucket(TOLD_PER_SECOND, TOLD_BURST, now))
        if told.has(1, now):
            told.take(1, now)
            who = agent or connection.remote
            log.warning("refused %s: %s", _printable(who), _printable(reason))
            self._emit(PeerRejected(who, reason))
        await connection.close(reason, code)

    def blame(self, identity: Identity, origin: Origin | None, offence: Offence) -> None:
        """Hold something against who is at the other end of a connection."""
        culprit: Culprit | None = None
        if identity.certificate is not None:
            culprit = identity.certificate.key
        elif origin is not None and not self._is_own(origin):
            culprit = address_of(str(origin.host))
        if culprit is not None:
            self._bans.blame(culprit, offence, _now())

    def throttle(self, origin: Origin | None) -> Throttle | None:
        """What makes a connection wait that sends too much; None if nothing does."""
        if origin is None or self._is_own(origin):
            return None
        return Throttle(self._limits, _now())

    def _blame_stranger(self, origin: Origin, offence: Offence, is_arrival: bool) -> None:
        if is_arrival:
            self.blame(ANYBODY, origin, offence)

    def _is_own(self, origin: Origin) -> bool:
        return origin.host is None or self._is_spared(origin.host)


class Throttle:
    """What one connection may send; see `Limits.frames_per_second`."""

    def __init__(self, limits: Limits, now: float) -> None:
        self._frames = Bucket(limits.frames_per_second, limits.frames_burst, now)
        self._bytes = Bucket(limits.bytes_per_second, limits.bytes_burst, now)

    def take(self, frames: int, size: int, now: float) -> float:
        """So much came: how long to wait before reading on."""
        return max(self._frames.take(frames, now), self._bytes.take(size, now))


def is_private(url: str) -> bool:
    """Whether a URL leads to processes on this machine, and only they can dial it."""
    parts = urlsplit(url)
    if parts.scheme in ("memory", "unix"):
        return True
    host = (parts.hostname or "").removesuffix(".")
    return host == "localhost" or is_loopback(host)


def _printable(text: str) -> str:
    """*text* on one line, whoever wrote it."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
