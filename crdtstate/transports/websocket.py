"""
Connections over websockets: the transport between processes and machines.

A thin shell around the `websockets` library, which does the protocol and enforces its
limits. This module chooses the settings, keeps web pages out and translates exceptions.
Pings and compression are off because heartbeats and `crdtstate.wire` do these better.

A browser lets any web page dial any host, the user's own included. So a request for the mesh with
an Origin is refused, one for a stream is only granted to pages of this very port, and a listener on
the loopback interface answers only to loopback names: otherwise a page could reach it under a name
of its own that resolves to 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import socket
import ssl
from contextlib import aclosing, suppress
from functools import partial
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any
from urllib.parse import SplitResult, urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import Server, ServerConnection, broadcast
from websockets.asyncio.server import serve as listen_on
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import CloseCode
from websockets.http11 import Request, Response
from websockets.protocol import State

from crdtstate.errors import ProtocolError, TransportError, UsageError
from crdtstate.transports import Accept, Connection, Http, HttpAnswer, HttpStream, serve
from crdtstate.wire import MESSAGE_BYTES_MAX

LOG = logging.getLogger(__name__)

MESH_PATH = "/mesh"

OPEN_TIMEOUT = 5.0
"""How long a stranger may take to ask for a websocket."""

CLOSE_TIMEOUT = 1.0
"""How long the other side may take to say goodbye as well."""

ARRIVAL_TURNS = 5
"""Turns of the loop within which a connection that was accepted is made."""

STREAM_TIMEOUT = 10.0
"""How long a page may take to make room for the next text before it is hung up on."""

REASON_BYTES_MAX = 123
"""What a websocket close frame holds."""

FOREIGN = HttpAnswer(b"Not for this page.\n", status=HTTPStatus.FORBIDDEN)

LOOPBACK_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)


class _Demoted(logging.LoggerAdapter[logging.Logger]):
    """Logs at debug: to websockets, each peer that hangs up early is an error with traceback."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        super().log(logging.DEBUG, msg, *args, **kwargs)


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


class _Dialled(ClientConnection):
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.transport = _Gone()


class _Accepted(ServerConnection):
    stream: HttpStream | None = None  # what it gets, if it is no part of the mesh

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.transport = _Gone()


class WebSocketConnection:
    """One side of a websocket; see `crdtstate.transports.Connection`."""

    def __init__(self, websocket: ClientConnection | ServerConnection, remote: str) -> None:
        self.remote = remote
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

    async def close(self, reason: str = "") -> None:
        await self._close(CloseCode.NORMAL_CLOSURE, reason)

    def abort(self) -> None:
        self._websocket.transport.abort()

    async def _close(self, code: CloseCode, reason: str) -> None:
        text = reason.encode()[:REASON_BYTES_MAX].decode(errors="ignore")
        # The library's close_timeout begins only when the goodbye is in the socket, which
        # never happens if the other side has stopped reading.
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._websocket.close(code, text)
        except TimeoutError:
            self.abort()


class WebSocketListener:
    """A port; see `crdtstate.transports.Listener`."""

    def __init__(self, accept: Accept, http: Http | None) -> None:
        self.address = ""
        self._accept = accept
        self._http = http
        self._server: Server
        self._is_closing = False
        self._only_loopback = True  # until it is known, the strict case
        self._accepted: set[WebSocketConnection] = set()

    async def open(self, url: SplitResult, tls: ssl.SSLContext | None) -> None:
        """Bind and listen; raises OSError."""
        # "localhost" would be two sockets, and with port 0 two ports.
        host = "127.0.0.1" if url.hostname == "localhost" else url.hostname
        self._server = await listen_on(
            self._serve,
            host,
            url.port or 0,
            ssl=tls,
            process_request=self._process_request,
            open_timeout=OPEN_TIMEOUT,
            server_header=None,
            create_connection=_Accepted,
            **SETTINGS,
        )
        bound = [listening.getsockname() for listening in self._server.sockets]
        self._only_loopback = all(ip_address(name[0]).is_loopback for name in bound)
        self.address = _url(url.scheme, host, bound[0][1])

    async def close(self) -> None:
        self._is_closing = True
        try:
            await self._stop_accepting()
        finally:
            self._server.close(close_connections=False)
        await asyncio.gather(*(each.close("the listener closed") for each in self._accepted))
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
        host, port = (websocket.remote_address or ("gone", 0))[:2]
        connection = WebSocketConnection(websocket, _url("ws", host, port))
        stream = websocket.stream if isinstance(websocket, _Accepted) else None
        accept = self._accept if stream is None else partial(_show, stream, websocket)
        self._accepted.add(connection)
        try:
            await serve(accept, connection)
        finally:
            self._accepted.discard(connection)

    def _process_request(self, websocket: ServerConnection, request: Request) -> Response | None:
        """Return the response to plain HTTP or to what is refused, None to go on."""
        hosts = request.headers.get_all("Host")
        if self._only_loopback and not (len(hosts) == 1 and LOOPBACK_HOST.fullmatch(hosts[0])):
            text = b"This listens on the loopback interface: call it localhost.\n"
            return _response(HttpAnswer(text, status=HTTPStatus.MISDIRECTED_REQUEST))
        path = request.path.partition("?")[0]
        is_upgrade = "Upgrade" in request.headers
        if is_upgrade and path in ("/", MESH_PATH):
            # Programs have no Origin; a web page has no business here.
            return _response(FOREIGN) if "Origin" in request.headers else None
        match self._http(path) if self._http else None:
            case HttpStream() as stream if is_upgrade:
                if not _is_same_origin(request.headers):
                    return _response(FOREIGN)
                assert isinstance(websocket, _Accepted)
                websocket.stream = stream
                return None
            case HttpStream():
                return _response(
                    HttpAnswer(b"Open a websocket.\n", status=HTTPStatus.UPGRADE_REQUIRED)
                )
            case HttpAnswer() as answer if not is_upgrade or answer.status >= 400:
                return _response(answer)
            case _:
                return _response(HttpAnswer(b"Nothing here.\n", status=HTTPStatus.NOT_FOUND))


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
    """Send what *stream* gives until the page leaves, does not keep up, or says anything."""
    feeding = asyncio.create_task(_feed(stream, websocket))
    try:
        await websocket.recv()
    except ConnectionClosed:
        pass
    finally:
        feeding.cancel()
        await asyncio.wait([feeding])


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


async def dial(url: str, *, timeout: float, tls: ssl.SSLContext | None) -> WebSocketConnection:
    """See `crdtstate.transports.dial`."""
    parts = _split(url)
    target = parts._replace(path=MESH_PATH if parts.path in ("", "/") else parts.path, fragment="")
    try:
        websocket = await _Connect(
            target.geturl(),
            ssl=(tls or True) if parts.scheme == "wss" else None,
            proxy=None,
            open_timeout=timeout,
            create_connection=_Dialled,
            **SETTINGS,
        )
    except (OSError, EOFError, UnicodeError, WebSocketException) as exc:
        raise TransportError(f"{url}: {_why_not(exc)}") from exc
    return WebSocketConnection(websocket, url)


async def listen(
    url: str, accept: Accept, *, http: Http | None, tls: ssl.SSLContext | None
) -> WebSocketListener:
    """See `crdtstate.transports.listen`."""
    parts = _split(url)
    if (parts.scheme == "wss") != (tls is not None):
        raise UsageError(f"{url}: wss:// needs a certificate (tls=...), and only wss:// takes one")
    listener = WebSocketListener(accept, http)
    try:
        await listener.open(parts, tls)
    except OSError as exc:
        raise TransportError(f"{url}: {_why_not(exc)}") from exc
    return listener


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


def _why_not(exc: Exception) -> str:
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
