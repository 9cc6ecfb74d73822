"""
Browsers at the door: who may open a websocket to a document, and how much it may cost.

A page says its token as a subprotocol, ``crdtstate.token.<token>``: it cannot set headers, and what
stands in a URL is logged on its way. Beside it, it should offer ``crdtstate``, which is agreed on
then; else the token itself is sent back. Whoever breaks a rule is told which one by a close code
and a reason, and counted (`Traffic.refused`). Codes from 4400 to 4499 are final: y-websocket does
not come again after them.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple
from urllib.parse import unquote

from crdtstate.bans import Bucket
from crdtstate.document import check_name
from crdtstate.errors import CRDTStateError, TransportError
from crdtstate.limits import CloseCode, Limits
from crdtstate.replica import Replica
from crdtstate.transports import HttpAnswer, HttpRequest, HttpSocket, Socket

PROTOCOL = "crdtstate"
TOKEN = "crdtstate.token."  # noqa: S105  # what comes before it

AGAIN = 1013
"""The code of RFC 6455 for: try again later."""

OUTBOX_BYTES_MAX = 16 * 2**20
OUTBOX_MESSAGES_MAX = 4096
"""What may wait to be sent to a browser. Beyond, it is hung up on, and comes again."""

NO_DOCUMENT = HttpAnswer(b"This is no name of a document that can be written here.\n", status=404)
FULL = HttpAnswer(b"Too many browsers are connected.\n", status=503)


class Breach(Exception):
    """A browser broke a rule.

    Args:
        code: The close code that says so.
        reason: What is wrong, for people.
        why: What it counts as; empty: it is no fault of its.
    """

    def __init__(self, code: int, reason: str, why: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.why = why


class Browser:
    """One browser's connection.

    Args:
        socket: The websocket.
        limits: What it may send.
        refused: Counts what is refused, by why.
    """

    def __init__(self, socket: Socket, limits: Limits, refused: Counter[str]) -> None:
        self.limits = limits
        self.refused = refused
        self._socket = socket
        now = asyncio.get_running_loop().time()
        self._frames = Bucket(limits.browser_frames_per_second, limits.browser_frames_burst, now)
        self._outbox: deque[str | bytes] = deque()
        self._waiting = 0
        self._has_more = asyncio.Event()
        self._ending: Breach | None = None

    async def receive(self) -> str | bytes:
        """The next message; read more slowly if there are too many. Raises TransportError."""
        data = await self._socket.receive()
        pause = self._frames.take(1, asyncio.get_running_loop().time())
        if pause:
            await asyncio.sleep(pause)
        return data

    def send(self, data: str | bytes) -> None:
        """Send a message as soon as what was sent before has left."""
        self._outbox.append(data)
        self._waiting += len(data)
        is_much = self._waiting > OUTBOX_BYTES_MAX or len(self._outbox) > OUTBOX_MESSAGES_MAX
        # One alone is a document, which is as large as it is.
        if is_much and len(self._outbox) > 1:
            self.end(Breach(AGAIN, "it does not read what is sent", "slow-browser"))
        self._has_more.set()

    def end(self, breach: Breach) -> None:
        """Hang up soon."""
        self._ending = self._ending or breach
        self._has_more.set()

    async def serve(self, work: Awaitable[None]) -> None:
        """Let *work* talk with it until either ends."""
        working = asyncio.ensure_future(work)
        sending = asyncio.ensure_future(self._send_all())
        try:
            await asyncio.wait([working, sending], return_when=asyncio.FIRST_COMPLETED)
            for task in (working, sending):
                if task.done():
                    await task
        except Breach as breach:
            if breach.why:
                self.refused[breach.why] += 1
            await self._socket.close(breach.code, breach.reason)
        except TransportError:
            pass
        finally:
            for task in (working, sending):
                task.cancel()
            await asyncio.wait([working, sending])
            for task in (working, sending):
                with suppress(asyncio.CancelledError, Breach, CRDTStateError):
                    await task

    async def _send_all(self) -> None:
        while True:
            while self._outbox and self._ending is None:
                data = self._outbox.popleft()
                self._waiting -= len(data)
                await self._socket.send(data)
            if self._ending is not None:
                raise self._ending
            self._has_more.clear()
            await self._has_more.wait()


class Service(NamedTuple):
    """What is served under a path.

    Attributes:
        serve: Talks with a browser about the document of a name, until it has gone.
        size_max: How large a message may be.
    """

    serve: Callable[[str, Browser], Awaitable[None]]
    size_max: int


class Browsers:
    """The browsers of one relay.

    Args:
        replica: The relay's replica.
        may: Whether a token opens the relay.
        origins: Whose pages may come beside the relay's own.
    """

    def __init__(
        self, replica: Replica, may: Callable[[str], bool], origins: tuple[str, ...]
    ) -> None:
        self._replica = replica
        self._may = may
        self._origins = origins
        # By document.
        self.counts: Counter[str] = Counter()
        # The relay is on its way out.
        self.is_closing = False

    def answer(
        self, request: HttpRequest, prefix: str, service: Service
    ) -> HttpAnswer | HttpSocket:
        """What a request for a document gets that begins with *prefix*."""
        name = unquote(request.path.removeprefix(prefix))
        try:
            check_name(name, "a document's name")
        except CRDTStateError:
            return NO_DOCUMENT
        if name.startswith("@"):
            return NO_DOCUMENT
        limits = self._replica.config.limits
        if self.is_closing or (
            self.counts.total() >= limits.browsers
            or self.counts[name] >= limits.browsers_per_document
        ):
            return FULL
        tokens = [each[len(TOKEN) :] for each in request.protocols if each.startswith(TOKEN)]
        is_known = self._may(tokens[0] if tokens else request.token)
        protocol = PROTOCOL if PROTOCOL in request.protocols else ""
        return HttpSocket(
            partial(self._serve, name, service.serve) if is_known else _turn_away,
            service.size_max if is_known else 1,
            protocol or next(iter(request.protocols), ""),
            self._origins,
        )

    async def _serve(
        self, name: str, serve: Callable[[str, Browser], Awaitable[None]], socket: Socket
    ) -> None:
        browser = Browser(socket, self._replica.config.limits, self._replica.traffic.refused)
        self.counts[name] += 1
        try:
            await browser.serve(serve(name, browser))
        finally:
            self.counts[name] -= 1
            if not self.counts[name]:
                del self.counts[name]


async def _turn_away(socket: Socket) -> None:
    """It has no token. It is told so by a close code, as a page is told of no HTTP status."""
    await socket.close(CloseCode.NOT_ADMITTED, f"it needs the token, as protocol {TOKEN}...")
