"""
How messages travel: a transport makes connections, a connection carries bytes.

A connection is two streams of whole messages, in order, without loss until it ends. It
knows nothing of frames and members; the replica above does. The URL chooses the transport:

    ws://host:port, wss://host:port    websocket.py, between processes and machines
    unix:///path                       unix.py, between the processes of one user on one machine
    memory://name                      memory.py, inside one event loop

Who is at the other end a transport does not know either; what it knows is the `Origin` of a
connection. Before strangers have proved themselves (see `admission`) they may send little, and a
`Gate` says how many of them there may be.

To add one: write a module with `dial` and `listen` as below, translate its exceptions into
TransportError with the URL in the message, let `send` wait while the other side is slow,
run `serve` for each arrival, add its scheme to `_transport` and its URL to the parameters
of tests/test_transports.py.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol
from urllib.parse import urlsplit

from crdtstate.errors import CRDTStateError, UsageError

LOG = logging.getLogger(__name__)

CLOSE_NORMAL = 1000
"""The code with which a connection is closed in peace."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a connection comes from, as far as its transport can tell.

    Attributes:
        host: The address of the other side; None: a process of the same user on this machine.
        since: When the connection was made, by the clock of the event loop.
        channel: What only the two ends of this connection have in common: over TLS SHA-256 of the
            server's certificate; else empty.
    """

    host: str | None
    since: float
    channel: bytes = b""


class Connection(Protocol):
    """One side of a connection. One task at a time may send, and one receive."""

    @property
    def remote(self) -> str:
        """The other side's URL, for people; an accepted connection's can't be dialled."""

    @property
    def origin(self) -> Origin | None:
        """Where it comes from; None: from this very process, which need not prove anything."""

    @property
    def is_writable(self) -> bool:
        """Whether `send_now` may be called: it is open, and nothing waits to be sent."""
        raise NotImplementedError

    def send_now(self, data: bytes) -> None:
        """Send a message without waiting, if `is_writable` and nobody is in `send`.

        Many get the same, so this costs less than `send`. What of it arrived is unknown.
        """

    async def send(self, data: bytes) -> None:
        """Send a message; wait while the other side doesn't keep up.

        Raises:
            TransportError: The connection is closed; whether *data* arrived is unknown.
        """

    async def receive(self) -> bytes:
        """Wait for the next message. Cancelling loses none.

        Raises:
            TransportError: The connection is closed and everything that arrived was read.
            ProtocolError: This was not a message of ours; the connection is closed.
        """
        raise NotImplementedError

    def welcome(self) -> None:
        """The other side is no stranger any more: what it sends may be as large as any message."""

    async def close(self, reason: str = "", code: int = CLOSE_NORMAL) -> None:
        """Say goodbye and hang up, within a second or so. Idempotent.

        Args:
            reason: Why, for people.
            code: Why, for programs, such as `limits.CloseCode`; where a transport has codes.
        """

    def abort(self) -> None:
        """Hang up at once; what was not sent yet is lost. Idempotent."""


class Listener(Protocol):
    """Where others can dial. Closing it closes the connections it accepted."""

    @property
    def address(self) -> str:
        """The URL that is really listened on, with the port that was chosen for port 0."""

    async def close(self) -> None:
        """Stop listening, close what was accepted, wait for `accept` to return. Idempotent."""


class Gate(Protocol):
    """Who may come in, by address, before anything else is known."""

    def enter(self, host: str | None) -> HttpAnswer | None:
        """Somebody came: count it, or answer with this and hang up."""

    def leave(self, host: str | None) -> None:
        """One of those who were counted is known now, or gone."""


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A plain GET.

    Attributes:
        path: What is asked for, without a query.
        token: What it presented as ``Authorization: Bearer``; empty if nothing.
        protocols: The subprotocols that it offers for a websocket.
    """

    path: str
    token: str = ""
    protocols: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What a plain GET gets, on transports that can hear one."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class HttpStream:
    """What a web page gets that opens a websocket to a path: texts, for as long as it is there.

    Each is asked for when the one before has left, so a slow page makes nothing pile up. Only
    pages that came from the same port may, and programs that are no browsers.

    Attributes:
        messages: Makes the texts.
        may: Whether who presents a token may have them: it is the first message that comes, as a
            page cannot send headers. None: everybody may.
    """

    messages: Callable[[], AsyncGenerator[str, None]]
    may: Callable[[str], bool] | None = None


class Socket(Protocol):
    """A websocket of a web page: texts and bytes, both ways."""

    async def receive(self) -> str | bytes:
        """Wait for the next message. Raises TransportError when it has ended."""
        raise NotImplementedError

    async def send(self, data: str | bytes) -> None:
        """Send a message; wait while the page doesn't keep up. Raises TransportError."""

    async def close(self, code: int, reason: str) -> None:
        """Say goodbye and hang up, within a second or so. Idempotent."""

    def abort(self) -> None:
        """Hang up at once."""


@dataclass(frozen=True, slots=True)
class HttpSocket:
    """What a web page gets that opens a websocket to a path, to listen and to talk. Only pages that
    came from the same port may, those from *origins*, and programs that are no browsers.

    Attributes:
        serve: Serves it; when that returns it is closed.
        size_max: How large a message may be, in bytes. One that is larger ends it (1009).
        protocol: The subprotocol to agree on; empty for none.
        origins: Whose pages may too, as ``https://app.example``.
    """

    serve: Callable[[Socket], Awaitable[None]]
    size_max: int
    protocol: str = ""
    origins: tuple[str, ...] = ()


Accept = Callable[[Connection], Awaitable[None]]
"""Serves one accepted connection, which is closed when it returns."""

Http = Callable[[HttpRequest], HttpAnswer | HttpStream | HttpSocket | None]
"""Answers a GET; None means there is nothing there. Tokens are for it to check."""


async def dial(
    url: str,
    *,
    timeout: float = 10.0,  # running out is a TransportError with the URL
    tls: ssl.SSLContext | None = None,
    greeting_max: int | None = None,
) -> Connection:
    """Connect to *url*.

    Args:
        tls: Whom to trust, for wss://; the operating system's authorities otherwise. A URL that
            ends in ``#sha256=...`` names the one certificate to trust by its fingerprint.
        greeting_max: How large messages may be before `Connection.welcome`; None: as any.

    Raises:
        TransportError: Nobody answered, or not as a mesh would; the message says which.
        UsageError: This is not a URL of a known transport.
    """
    connection: Connection = await _transport(url).dial(
        url, timeout=timeout, tls=tls, greeting_max=greeting_max
    )
    return connection


async def listen(
    url: str,
    accept: Accept,
    *,
    http: Http | None = None,
    tls: ssl.SSLContext | None = None,
    gate: Gate | None = None,
    greeting_max: int | None = None,
) -> Listener:
    """Listen on *url* and run *accept* for each connection, each in a task of its own.

    Args:
        http: Answers plain HTTP requests to the same port, such as ``/healthz``.
        tls: The certificate to show; required for wss://.
        gate: Who may come in; None: everybody.
        greeting_max: How large messages may be before `Connection.welcome`; None: as any.

    Raises:
        TransportError: The address cannot be had.
        UsageError: This is not a URL of a known transport.
    """
    listener: Listener = await _transport(url).listen(
        url, accept, http=http, tls=tls, gate=gate, greeting_max=greeting_max
    )
    return listener


async def serve(accept: Accept, connection: Connection) -> None:
    """Run *accept*, then close *connection*: for transports, in the task of an arrival."""
    try:
        await accept(connection)
    except CRDTStateError as exc:
        LOG.debug("%s: %s", connection.remote, exc)
    except Exception:
        LOG.exception("%s: serving it failed", connection.remote)
    finally:
        await connection.close()


def check_scheme(url: str) -> None:
    """Raise UsageError if this is not a URL of a known transport."""
    _transport(url)


def _transport(url: str) -> ModuleType:
    # Imported here because they import this module's protocols.
    match urlsplit(url).scheme:
        case "ws" | "wss":
            from crdtstate.transports import websocket

            return websocket
        case "unix":
            from crdtstate.transports import unix

            return unix
        case "memory":
            from crdtstate.transports import memory

            return memory
        case _:
            raise UsageError(f"{url!r}: use a URL like ws://, wss://, unix:// or memory://")
