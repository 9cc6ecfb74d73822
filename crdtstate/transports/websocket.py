"""
Connections over websockets: the transport between processes and machines.

A thin shell around the `websockets` library, which does the protocol and enforces its
limits. This module chooses the settings, keeps web pages out and translates exceptions.
Pings and compression are off because heartbeats and `crdtstate.wire` do these better.

A browser lets any web page dial any host, the user's own included. So a request for the mesh that
a browser made is refused, one for a stream is only granted to pages of this very port, and a
listener on the loopback interface answers only to loopback names: otherwise a page could reach it
under a name of its own that resolves to 127.0.0.1.

Over TLS the two ends know each other's *channel*, the hash of the server's certificate. What is in
a URL's fragment (``#sha256=...``) is the one certificate to trust, whoever signed it.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import hmac
import logging
import re
import socket
import ssl
from collections.abc import Callable
from contextlib import aclosing, suppress
from functools import partial
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.connection import Connection as AnyConnection
from websockets.asyncio.server import Server, ServerConnection, broadcast
from websockets.asyncio.server import serve as listen_on
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.typing import Subprotocol

from crdtstate.errors import ProtocolError, TransportError, UsageError
from crdtstate.limits import CloseCode as LimitCode
from crdtstate.transports import (
    CLOSE_NORMAL,
    Accept,
    Connection,
    Gate,
    Http,
    HttpAnswer,
    HttpRequest,
    HttpSocket,
    HttpStream,
    Origin,
    serve,
)
from crdtstate.wire import MESSAGE_BYTES_MAX

LOG = logging.getLogger(__name__)

MESH_PATH = "/mesh"

OPEN_TIMEOUT = 5.0
"""How long a stranger may take for TLS, and then to ask for a websocket."""

TURNED_AWAY_MAX = 64
"""Connections that are being told that there are too many. More are told nothing."""

CHANNEL_FOR = 5.0
"""Seconds after which is looked again which certificate is shown: it may have been renewed."""

WRITES_MAX = 8
"""Pieces that are written one by one."""

STRANGER_UNREAD_MAX = 256 * 1024
"""What may wait until a stranger reads it; there is little to tell it."""

TOKEN_CHARS_MAX = 256

PROTOCOLS_MAX = 8
"""Subprotocols of a request that are looked at."""

SECRET_HEADERS = frozenset({"authorization", "cookie", "sec-websocket-protocol"})

CLOSE_TIMEOUT = 1.0
"""How long the other side may take to say goodbye as well."""

ARRIVAL_TURNS = 5
"""Turns of the loop within which a connection that was accepted is made."""

STREAM_TIMEOUT = 10.0
"""How long a page may take to make room for the next text before it is hung up on."""

PING_EVERY = 15.0
PING_TIMEOUT = 15.0
"""How often a page is asked whether it is still there, and for how long it may say nothing."""

REASON_BYTES_MAX = 123
"""What a websocket close frame holds."""

FOREIGN = HttpAnswer(b"Not for this page.\n", status=HTTPStatus.FORBIDDEN)
UNCLEAR = HttpAnswer(b"More than one Origin.\n", status=HTTPStatus.BAD_REQUEST)
MISDIRECTED = HttpAnswer(
    b"This listens on the loopback interface: call it localhost.\n",
    status=HTTPStatus.MISDIRECTED_REQUEST,
)

LOOPBACK_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)


PIN = re.compile(r"sha256=((?:[0-9a-fA-F]{2}:?){31}[0-9a-fA-F]{2})")


class _Demoted(logging.LoggerAdapter[logging.Logger]):
    """Logs at debug: to websockets, each peer that hangs up early is an error with traceback.
    Tokens are left out: they come in a header, or in a text, and nothing else does."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if self.isEnabledFor(logging.DEBUG):
            super().log(logging.DEBUG, msg, *_without_tokens(args), **kwargs)


def _without_tokens(args: tuple[object, ...]) -> tuple[object, ...]:
    if len(args) == 2 and str(args[0]).lower() in SECRET_HEADERS:
        return args[0], "..."
    return tuple(
        f"TEXT [{len(each.data)} bytes]"
        if isinstance(each, Frame) and each.opcode is Opcode.TEXT
        else each
        for each in args
    )


SETTINGS: dict[str, Any] = {
    "compression": None,
    "max_size": MESSAGE_BYTES_MAX + 1024,
    "max_queue": 16,
    "write_limit": 64 * 1024,
    "ping_interval": None,
    "close_timeout": CLOSE_TIMEOUT,
    "logger": _Demoted(logging.getLogger("crdtstate.websockets"), {}),
}
"""For both sides. TCP_NODELAY needs none: asyncio sets it."""


class _Gone(asyncio.Transport):
    """What a lost connection keeps as its transport.

    websockets aborts transports that are closed already, and asyncio then fails if data was
    waiting when they closed: 'NoneType' has no attribute 'call_soon' (agronholm/anyio#1250).
    """

    def abort(self) -> None:
        pass

    def is_closing(self) -> bool:
        return True


class Pin:
    """The one certificate to trust.

    Args:
        fingerprint: SHA-256 of it in DER.
    """

    def __init__(self, fingerprint: bytes) -> None:
        self._fingerprint = fingerprint
        self.was_other = False

    def fits(self, shown: bytes | None) -> bool:
        """Whether a certificate that is shown, in DER, is that one."""
        found = hashlib.sha256(shown or b"").digest()
        self.was_other = not hmac.compare_digest(found, self._fingerprint)
        return not self.was_other

    @staticmethod
    def context() -> ssl.SSLContext:
        """What lets any certificate pass: it is looked at before anything is said."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
        return made


FRAGMENTS_MAX = 1024
"""Fragments of one message: nobody of us sends more than one."""

_DATA = frozenset({Opcode.CONT, Opcode.TEXT, Opcode.BINARY})


class _Frugal(AnyConnection):
    """A connection on which nobody makes much be sent or kept: each ping is answered, also if there
    are thousands in what was read at once, and if nobody reads the answers; a message may come in
    any number of fragments, and empty ones count for nothing but in a list."""

    unread_max = 2 * MESSAGE_BYTES_MAX
    # Of the message that is not whole yet.
    fragments = 0

    def process_event(self, event: Any) -> None:
        # websockets has a limit of its own from 17 on.
        if isinstance(event, Frame) and event.opcode in _DATA:
            self.fragments = 0 if event.fin else self.fragments + 1
            if self.fragments > FRAGMENTS_MAX:
                self.protocol.fail(CloseCode.MESSAGE_TOO_BIG, "too many fragments")
                self.transport.abort()
                return
        super().process_event(event)

    def send_data(self) -> None:
        writes = self.protocol.writes
        if len(writes) > WRITES_MAX:
            # In one piece. An empty one at the end stands for the end.
            self.protocol.writes = [b"".join(writes), *writes[-1:] * (not writes[-1])]
        super().send_data()
        if self.transport.get_write_buffer_size() > self.unread_max:
            self.transport.abort()


class _Dialled(_Frugal, ClientConnection):
    pin: Pin | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # Before anything is said.
        if self.pin is not None and not self.pin.fits(_shown(self.transport)):
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.transport = _Gone()


class _Accepted(_Frugal, ServerConnection):
    """A connection that was accepted; of a `listener`, set when it is made."""

    listener: WebSocketListener
    origin: Origin
    # What it gets, if it is no part of the mesh.
    stream: HttpStream | None = None
    socket: HttpSocket | None = None
    refused: HttpAnswer | None = None  # what it is told, if it may not come in
    is_counted = False  # as half-open, at the gate
    is_made = False  # TLS is done, where there is any
    is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        # What comes with the end of the TLS handshake.
        self._early: list[bytes] = []
        if self.listener.tls is None:
            self.made(transport)
            self.listener.arrived(self)
            return
        # It counts from now on: else those who never finish TLS would be as many as they like.
        self.transport = transport
        self.listener.arrived(self)
        if not transport.is_closing():
            transport.pause_reading()
            self.listener.secure(self, transport)

    def made(self, transport: asyncio.Transport) -> None:
        """Begin."""
        self.is_made = True
        super().connection_made(transport)
        for data in self._early:
            super().data_received(data)
        self._early.clear()

    def data_received(self, data: bytes) -> None:
        if self.is_made:
            super().data_received(data)
        else:
            self._early.append(data)

    def eof_received(self) -> None:
        if self.is_made:
            super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        if self.is_made:
            super().connection_lost(exc)
        self.transport = _Gone()
        self.listener.left(self)


class WebSocketConnection:
    """One side of a websocket; see `crdtstate.transports.Connection`."""

    def __init__(
        self, websocket: ClientConnection | ServerConnection, remote: str, origin: Origin
    ) -> None:
        self.remote = remote
        self.origin = origin
        self._websocket = websocket

    @property
    def is_writable(self) -> bool:
        websocket = self._websocket
        return websocket.state is State.OPEN and websocket.transport.get_write_buffer_size() == 0

    def send_now(self, data: bytes) -> None:
        # To one: it is what sends without a task.
        broadcast((self._websocket,), data)

    async def send(self, data: bytes) -> None:
        try:
            await self._websocket.send(data)
        except ConnectionClosed as exc:
            raise TransportError(f"{self.remote}: {_why_closed(exc)}") from exc

    async def receive(self) -> bytes:
        try:
            message = await self._websocket.recv()
        except ConnectionClosed as exc:
            raise TransportError(f"{self.remote}: {_why_closed(exc)}") from exc
        if isinstance(message, str):
            await self._close(CloseCode.UNSUPPORTED_DATA, "the mesh speaks binary")
            raise ProtocolError(f"{self.remote}: sent text where the mesh speaks binary")
        return message

    def welcome(self) -> None:
        set_size_max(self._websocket, SETTINGS["max_size"])
        if isinstance(self._websocket, _Accepted):
            self._websocket.listener.left(self._websocket)

    async def close(self, reason: str = "", code: int = CLOSE_NORMAL) -> None:
        await self._close(code, reason)

    def abort(self) -> None:
        self._websocket.transport.abort()

    async def _close(self, code: int, reason: str) -> None:
        text = reason.encode()[:REASON_BYTES_MAX].decode(errors="ignore")
        # The library's close_timeout begins only when the goodbye is in the socket, which
        # never happens if the other side has stopped reading.
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._websocket.close(code, text)
        except TimeoutError:
            self.abort()


class WebSocketListener:
    """A port, or another thing that can be listened on; see `crdtstate.transports.Listener`.

    Args:
        accept: Serves connections.
        http: Answers plain HTTP.
        gate: Who may come in.
        greeting_max: How large messages of strangers may be.
        may: Whether an arrival is listened to at all.
    """

    def __init__(
        self,
        accept: Accept,
        http: Http | None,
        gate: Gate | None,
        greeting_max: int | None,
        may: Callable[[asyncio.Transport], bool] | None = None,
    ) -> None:
        self.address = ""
        self._accept = accept
        self._http = http
        self._gate = gate
        self._greeting_max = greeting_max
        self._may = may
        self._server: Server
        self.tls: ssl.SSLContext | None = None
        # Those with whom TLS is being agreed on.
        self._securing: dict[asyncio.Task[None], asyncio.Transport] = {}
        # The hash of the own certificate, and when it was looked at.
        self._channel = b""
        self._channel_at = float("-inf")
        self._is_closing = False
        self._only_loopback = True  # until it is known, the strict case
        self._accepted: set[WebSocketConnection] = set()
        self._turned_away: set[_Accepted] = set()

    async def open(self, url: SplitResult, tls: ssl.SSLContext | None) -> None:
        """Bind and listen; raises OSError."""
        # "localhost" would be two sockets, and with port 0 two ports.
        host = "127.0.0.1" if url.hostname == "localhost" else url.hostname
        self.tls = tls
        self._own_channel()
        await self.listen(host, url.port or 0)
        bound = [listening.getsockname() for listening in self._server.sockets]
        self._only_loopback = all(ip_address(name[0]).is_loopback for name in bound)
        self.address = _url(url.scheme, host, bound[0][1])

    async def listen(self, *where: Any, **how: Any) -> None:
        """Listen where asyncio is told to; raises OSError."""
        settings = {
            "process_request": self._process_request,
            "select_subprotocol": _select_protocol,
            "open_timeout": OPEN_TIMEOUT,
            "server_header": None,
            "create_connection": self._make,
            **SETTINGS,
            **how,
        }
        self._server = await listen_on(self._serve, *where, **settings)

    # Arriving and leaving

    def _make(self, *args: Any, **kwargs: Any) -> _Accepted:
        made = _Accepted(*args, **kwargs)
        made.listener = self
        if self._gate is not None:
            made.unread_max = STRANGER_UNREAD_MAX
        if self._greeting_max is not None:
            set_size_max(made, self._greeting_max)
        return made

    def arrived(self, websocket: _Accepted) -> None:
        """Somebody was accepted by the operating system."""
        name = websocket.transport.get_extra_info("peername")
        # Sockets of files have no name at the other side.
        host = name[0] if isinstance(name, tuple) else None
        now = asyncio.get_running_loop().time()
        websocket.origin = Origin(host, now, self._own_channel())
        if self._may is not None and not self._may(websocket.transport):
            websocket.transport.abort()
        elif self._gate is not None:
            websocket.refused = self._gate.enter(host)
            websocket.is_counted = websocket.refused is None
            if websocket.refused is not None:
                self._turned_away.add(websocket)
                if len(self._turned_away) > TURNED_AWAY_MAX:
                    websocket.transport.abort()

    def secure(self, websocket: _Accepted, transport: asyncio.Transport) -> None:
        """Agree on TLS with somebody who arrived, and go on from there."""
        task = asyncio.get_running_loop().create_task(self._secure(websocket, transport))
        self._securing[task] = transport
        task.add_done_callback(self._securing.pop)

    async def _secure(self, websocket: _Accepted, transport: asyncio.Transport) -> None:
        assert self.tls is not None
        if websocket.is_lost:
            return
        try:
            secured = await asyncio.get_running_loop().start_tls(
                transport,
                websocket,
                self.tls,
                server_side=True,
                ssl_handshake_timeout=OPEN_TIMEOUT,
                ssl_shutdown_timeout=CLOSE_TIMEOUT,
            )
        except OSError as exc:
            # It hung up, took too long, or does not like the certificate.
            LOG.debug("no TLS: %s", exc)
            transport.abort()
            self.left(websocket)
            return
        if secured is None or websocket.is_lost or self._is_closing:
            transport.abort()
            self.left(websocket)
        else:
            websocket.made(secured)

    def left(self, websocket: _Accepted) -> None:
        """Who arrived is gone, or no stranger any more."""
        self._turned_away.discard(websocket)
        websocket.unread_max = _Frugal.unread_max
        if websocket.is_counted:
            assert self._gate is not None
            websocket.is_counted = False
            self._gate.leave(websocket.origin.host)

    def _own_channel(self) -> bytes:
        if self.tls is None:
            return b""
        now = asyncio.get_running_loop().time()
        if now - self._channel_at > CHANNEL_FOR:
            self._channel, self._channel_at = shown_by(self.tls), now
        return self._channel

    async def close(self) -> None:
        self._is_closing = True
        try:
            await self._stop_accepting()
        finally:
            for transport in self._securing.values():
                transport.abort()
            self._server.close(close_connections=False)
        await asyncio.gather(*(each.close("the listener closed") for each in self._accepted))
        await asyncio.gather(*self._securing, return_exceptions=True)
        await self._server.wait_closed()

    async def _stop_accepting(self) -> None:
        """Let those whom the socket has accepted arrive: asyncio loses them, their sockets left
        open, if the server is closed meanwhile (python/cpython#109564)."""
        loop = asyncio.get_running_loop()
        with suppress(NotImplementedError):  # on Windows
            for listening in self._server.sockets:
                loop.remove_reader(listening)
        for _ in range(ARRIVAL_TURNS):
            await asyncio.sleep(0)

    async def _serve(self, websocket: ServerConnection) -> None:
        if self._is_closing:
            return
        assert isinstance(websocket, _Accepted)
        connection = WebSocketConnection(websocket, self._remote(websocket), websocket.origin)
        accept = self._accept
        if websocket.stream is not None:
            accept = partial(_show, websocket.stream, websocket)
        elif websocket.socket is not None:
            accept = partial(_talk, websocket.socket, websocket)
        self._accepted.add(connection)
        try:
            await serve(accept, connection)
        finally:
            self._accepted.discard(connection)

    def _remote(self, websocket: ServerConnection) -> str:
        """What to call the other side."""
        name = websocket.remote_address
        if not isinstance(name, tuple):
            return f"{self.address}#dialler"
        return _url("ws", name[0], name[1])

    def _process_request(self, websocket: ServerConnection, request: Request) -> Response | None:
        """Return the response to plain HTTP or to what is refused, None to go on."""
        assert isinstance(websocket, _Accepted)
        if websocket.refused is not None:
            return _response(websocket.refused)
        hosts = request.headers.get_all("Host")
        if len(hosts) != 1 or (self._only_loopback and not LOOPBACK_HOST.fullmatch(hosts[0])):
            return _response(MISDIRECTED)
        if len(request.headers.get_all("Origin")) > 1:
            return _response(UNCLEAR)
        path = request.path.partition("?")[0]
        is_upgrade = "Upgrade" in request.headers
        is_foreign = _is_cross_site(request.headers)
        if is_foreign and not is_upgrade:
            return _response(FOREIGN)
        if is_upgrade and path in ("/", MESH_PATH):
            # Programs say neither; a web page has no business here.
            is_browser = "Origin" in request.headers or "Sec-Fetch-Site" in request.headers
            return _response(FOREIGN) if is_browser else None
        asked = HttpRequest(path, _bearer(request.headers), _protocols(request.headers))
        match self._http(asked) if self._http else None:
            case HttpSocket() as socket if is_upgrade:
                is_named = request.headers.get("Origin") in socket.origins
                if not is_named and (is_foreign or not _is_same_origin(request.headers)):
                    return _response(FOREIGN)
                websocket.socket = socket
                return None
            case _ if is_foreign:
                return _response(FOREIGN)
            case HttpStream() as stream if is_upgrade:
                if not _is_same_origin(request.headers):
                    return _response(FOREIGN)
                websocket.stream = stream
                return None
            case HttpStream() | HttpSocket():
                return _response(
                    HttpAnswer(b"Open a websocket.\n", status=HTTPStatus.UPGRADE_REQUIRED)
                )
            case HttpAnswer() as answer if not is_upgrade or answer.status >= 400:
                return _response(answer)
            case _:
                return _response(HttpAnswer(b"Nothing here.\n", status=HTTPStatus.NOT_FOUND))


def set_size_max(websocket: ClientConnection | ServerConnection, size: int) -> None:
    """How large messages may be from now on. What does not fit ends the connection (1009)."""
    protocol: Any = websocket.protocol
    # The name of websockets 16, and that of 15.
    name = "max_message_size" if hasattr(protocol, "max_message_size") else "max_size"
    setattr(protocol, name, size)


def _bearer(headers: Headers) -> str:
    """The token that was presented; empty if there is not exactly one."""
    found = headers.get_all("Authorization")
    scheme, _, token = found[0].partition(" ") if len(found) == 1 else ("", "", "")
    return token.strip() if scheme.lower() == "bearer" and len(token) <= TOKEN_CHARS_MAX else ""


def _protocols(headers: Headers) -> tuple[str, ...]:
    """The subprotocols that are offered for a websocket."""
    found = ",".join(headers.get_all("Sec-WebSocket-Protocol")).split(",")
    return tuple(each.strip()[:TOKEN_CHARS_MAX] for each in found if each.strip())[:PROTOCOLS_MAX]


def _select_protocol(websocket: ServerConnection, _: object) -> Subprotocol | None:
    """The subprotocol to agree on."""
    socket = websocket.socket if isinstance(websocket, _Accepted) else None
    return Subprotocol(socket.protocol) if socket is not None and socket.protocol else None


def _is_cross_site(headers: Headers) -> bool:
    """Whether a browser says that another site's page asks. To follow a link is no asking: the page
    that it leads to shows nothing by itself."""
    site, mode = headers.get("Sec-Fetch-Site", "none"), headers.get("Sec-Fetch-Mode", "")
    return site not in ("none", "same-origin") and mode != "navigate"


def _is_same_origin(headers: Headers) -> bool:
    """Whether the page that asks, if it is a page, came from where it asks.

    The scheme is not compared: a proxy may add the TLS.
    """
    origins, hosts = headers.get_all("Origin"), headers.get_all("Host")
    if not origins:
        return True
    scheme, _, host = origins[0].partition("://")
    return (
        (len(origins), len(hosts)) == (1, 1)
        and scheme in ("http", "https")
        and host.lower() == hosts[0].lower()
    )


async def _show(stream: HttpStream, websocket: ServerConnection, _: Connection) -> None:
    """Send what *stream* gives until the page leaves, does not keep up, or says anything. If it
    needs a token, that comes first."""
    if stream.may is not None and not await _presents(stream.may, websocket):
        await websocket.close(LimitCode.NOT_ADMITTED, "it needs the token")
        return
    if isinstance(websocket, _Accepted):
        websocket.listener.left(websocket)
    feeding = asyncio.create_task(_feed(stream, websocket))
    try:
        await websocket.recv()
    except ConnectionClosed:
        pass
    finally:
        feeding.cancel()
        await asyncio.wait([feeding])


class _Socket:
    """A websocket of a web page; see `crdtstate.transports.Socket`."""

    def __init__(self, websocket: ServerConnection, connection: Connection) -> None:
        self._websocket = websocket
        self._connection = connection

    async def receive(self) -> str | bytes:
        try:
            return await self._websocket.recv()
        except ConnectionClosed as exc:
            raise TransportError(f"{self._connection.remote}: {_why_closed(exc)}") from exc

    async def send(self, data: str | bytes) -> None:
        try:
            async with asyncio.timeout(STREAM_TIMEOUT):
                await self._websocket.send(data)
        except ConnectionClosed as exc:
            raise TransportError(f"{self._connection.remote}: {_why_closed(exc)}") from exc
        except TimeoutError as exc:
            self.abort()
            raise TransportError(f"{self._connection.remote}: does not read") from exc

    async def close(self, code: int, reason: str) -> None:
        await self._connection.close(reason, code)

    def abort(self) -> None:
        self._connection.abort()


async def _talk(socket: HttpSocket, websocket: ServerConnection, connection: Connection) -> None:
    """Let *socket* serve a page."""
    set_size_max(websocket, socket.size_max)
    if isinstance(websocket, _Accepted):
        websocket.listener.left(websocket)
    listening = asyncio.create_task(_look_after(websocket))
    try:
        await socket.serve(_Socket(websocket, connection))
    finally:
        listening.cancel()
        await asyncio.wait([listening])


async def _look_after(websocket: ServerConnection) -> None:
    """Hang up on a page that is there no more, which its system did not say."""
    try:
        while True:
            await asyncio.sleep(PING_EVERY)
            answered = await websocket.ping()
            async with asyncio.timeout(PING_TIMEOUT):
                await answered
    except ConnectionClosed:
        pass
    except TimeoutError:
        websocket.transport.abort()


async def _presents(may: Callable[[str], bool], websocket: ServerConnection) -> bool:
    """Whether what comes first is a token that may."""
    set_size_max(websocket, TOKEN_CHARS_MAX)
    try:
        async with asyncio.timeout(OPEN_TIMEOUT):
            token = await websocket.recv()
    except (ConnectionClosed, TimeoutError):
        return False
    return isinstance(token, str) and may(token)


async def _feed(stream: HttpStream, websocket: ServerConnection) -> None:
    try:
        async with aclosing(stream.messages()) as texts:
            async for text in texts:
                async with asyncio.timeout(STREAM_TIMEOUT):
                    await websocket.send(text)
        await websocket.close(CloseCode.TRY_AGAIN_LATER)
    except ConnectionClosed:
        pass
    except TimeoutError:
        websocket.transport.abort()
    except Exception:
        LOG.exception("%s: feeding it failed", websocket.remote_address)
        websocket.transport.abort()


async def dial(
    url: str, *, timeout: float, tls: ssl.SSLContext | None, greeting_max: int | None
) -> WebSocketConnection:
    """See `crdtstate.transports.dial`."""
    parts = _split(url)
    target = parts._replace(path=MESH_PATH if parts.path in ("", "/") else parts.path, fragment="")
    pin = pin_of(url)
    if tls is not None and tls.protocol is ssl.PROTOCOL_TLS_SERVER:
        # It says what to show, not whom to trust.
        tls = None
    if pin is not None and tls is None:
        tls = pin.context()
    how = {"ssl": (tls or True) if parts.scheme == "wss" else None, "proxy": None}
    try:
        websocket = await connect_to(target.geturl(), timeout, greeting_max, pin, **how)
    except (OSError, EOFError, UnicodeError, WebSocketException) as exc:
        if pin is not None and pin.was_other:
            raise TransportError(f"{url}: it shows another certificate than that one") from exc
        raise TransportError(f"{url}: {why_not(exc)}") from exc
    name = websocket.remote_address
    host = name[0] if isinstance(name, tuple) else None
    now = asyncio.get_running_loop().time()
    return WebSocketConnection(websocket, url, Origin(host, now, _channel(websocket.transport)))


async def connect_to(
    url: str, timeout: float, greeting_max: int | None, pin: Pin | None = None, **how: Any
) -> ClientConnection:
    """Open a websocket, as asyncio is told to; raises what that raises, and websockets."""

    def make(*args: Any, **kwargs: Any) -> Any:
        made = _Dialled(*args, **kwargs)
        made.pin = pin
        if greeting_max is not None:
            set_size_max(made, greeting_max)
        return made

    settings: dict[str, Any] = {"open_timeout": timeout, "create_connection": make, **SETTINGS}
    websocket: ClientConnection = await _Connect(url, **settings, **how)
    return websocket


async def listen(
    url: str,
    accept: Accept,
    *,
    http: Http | None,
    tls: ssl.SSLContext | None,
    gate: Gate | None,
    greeting_max: int | None,
) -> WebSocketListener:
    """See `crdtstate.transports.listen`."""
    parts = _split(url)
    if (parts.scheme == "wss") != (tls is not None):
        raise UsageError(f"{url}: wss:// needs a certificate (tls=...), and only wss:// takes one")
    if parts.fragment:
        raise UsageError(f"{url}: a fingerprint is for those who dial; see advertise=")
    listener = WebSocketListener(accept, http, gate, greeting_max)
    try:
        await listener.open(parts, tls)
    except OSError as exc:
        raise TransportError(f"{url}: {why_not(exc)}") from exc
    return listener


def shown_by(tls: ssl.SSLContext) -> bytes:
    """SHA-256 of the certificate that a server shows, in DER.

    A context does not tell it, so it is shown to oneself, in memory.

    Raises:
        UsageError: It shows none.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    trusting = Pin.context()
    try:
        server = tls.wrap_bio(to_server, to_client, server_side=True)
        client = trusting.wrap_bio(to_client, to_server)
        for side in (client, server, client):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
        shown = client.getpeercert(binary_form=True)
    except (ssl.SSLError, ValueError) as exc:
        raise UsageError(f"tls: it shows no certificate: {exc}") from exc
    if shown is None:
        raise UsageError("tls: it shows no certificate; see SSLContext.load_cert_chain")
    return hashlib.sha256(shown).digest()


def fingerprint(certificate: str) -> str:
    """What to put behind a ``wss://`` URL, as in ``wss://10.0.0.5:8765#sha256=...``, so that the
    certificate in a file (PEM) is the one that is trusted there.

    Raises:
        UsageError: There is no certificate in that file.
    """
    try:
        with open(certificate) as file:
            text = file.read()
        begin, end = text.index(ssl.PEM_HEADER), text.index(ssl.PEM_FOOTER)
        found = ssl.PEM_cert_to_DER_cert(text[begin : end + len(ssl.PEM_FOOTER)])
    except (OSError, ValueError) as exc:
        raise UsageError(f"{certificate}: there is no certificate in it: {exc}") from exc
    return f"sha256={hashlib.sha256(found).hexdigest()}"


def _shown(transport: asyncio.BaseTransport) -> bytes | None:
    """The certificate that a server shows on a connection, in DER; None without TLS."""
    tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
    return None if tls is None else tls.getpeercert(binary_form=True)


def _channel(transport: asyncio.BaseTransport) -> bytes:
    """SHA-256 of that; empty without TLS."""
    shown = _shown(transport)
    return b"" if shown is None else hashlib.sha256(shown).digest()


def pin_of(url: str) -> Pin | None:
    """The certificate to trust that is named in a URL. Raises UsageError."""
    parts = urlsplit(url)
    if not parts.fragment:
        return None
    found = PIN.fullmatch(parts.fragment)
    if found is None or parts.scheme != "wss":
        raise UsageError(f"{url!r}: what may follow a # is wss://...#sha256= and 64 hex digits")
    return Pin(bytes.fromhex(found[1].replace(":", "")))


class _Connect(connect):
    """Follows no redirects: an address may come from a peer, and leads there or nowhere."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        if parts.hostname and (parts.port is None or parts.port >= 0):
            return parts
    except ValueError as exc:
        raise UsageError(f"{url!r} is not a URL: {exc}") from exc
    raise UsageError(f"{url!r} names no host; to listen on all interfaces use 0.0.0.0")


def _url(scheme: str, host: str | None, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in str(host) else f"{scheme}://{host}:{port}"


def _response(answer: HttpAnswer) -> Response:
    headers = Headers(
        {
            "Content-Type": answer.content_type,
            "Content-Length": str(len(answer.body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Connection": "close",
            **dict(answer.headers),
        }
    )
    return Response(answer.status, HTTPStatus(answer.status).phrase, headers, answer.body)


def _why_closed(exc: ConnectionClosed) -> str:
    if exc.rcvd is None:
        return "connection lost" if exc.sent is None else f"closed here: {exc.sent.reason}"
    return f"closed by the other side, {exc.rcvd.code} {exc.rcvd.reason}".rstrip()


def why_not(exc: Exception) -> str:
    """Say in plain words why there is no connection."""
    refused = f"[Errno {errno.ECONNREFUSED}]"  # within a text, if several addresses were tried
    match exc:
        case TimeoutError():
            return "no answer in time"
        case ConnectionRefusedError():
            return "connection refused: is a relay listening there?"
        case OSError() if refused in str(exc):
            return "connection refused: is a relay listening there?"
        case socket.gaierror() | UnicodeError():
            return "no such host"
        case ssl.SSLCertVerificationError():
            return f"its certificate is not trusted: {exc.verify_message}"
        case ssl.SSLError():
            return f"TLS failed: {exc.reason or exc}; is it ws:// instead of wss://?"
        case InvalidStatus():
            return f"it answered {exc.response.status_code}, not as a mesh"
        case OSError(errno=errno.EADDRINUSE):
            return "something listens there already"
        case OSError():
            return exc.strerror or str(exc) or "connection lost"
        case _:
            return f"it is no websocket: {exc}"
