"""The contract of a connection, kept by every transport, and what only websockets have."""

import asyncio
import functools
import shutil
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import websockets
from servers import make_certificate

from crdtstate.errors import ProtocolError, TransportError, UsageError
from crdtstate.transports import Connection, HttpAnswer, HttpRequest, Listener, dial, listen
from crdtstate.wire import MESSAGE_BYTES_MAX

URLS = ["memory://contract", "ws://127.0.0.1:0", "unix"]


@pytest.fixture(params=URLS)
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "unix":
        yield request.param
        return
    # Short: the names of sockets may have 100 characters.
    with tempfile.TemporaryDirectory(prefix="crdt-") as folder:
        yield f"unix://{folder}/mesh.sock"


def every_transport(test: Callable[..., None]) -> Callable[..., None]:
    """A test that takes a `url`."""
    return test


def in_a_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test; 30 seconds are for a test that hangs."""

    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(30):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    return run


@dataclass
class Ends:
    """A listener and a connection to it: *near* dialled, *far* was accepted."""

    listener: Listener
    near: Connection
    far: Connection
    arrivals: asyncio.Queue[Connection]


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Ends]:
    arrivals: asyncio.Queue[Connection] = asyncio.Queue()
    finished = asyncio.Event()

    async def accept(connection: Connection) -> None:
        arrivals.put_nowait(connection)
        await finished.wait()

    listener = await listen(url, accept)
    try:
        near = await dial(listener.address)
        yield Ends(listener, near, await arrivals.get(), arrivals)
        await near.close()
    finally:
        finished.set()
        await listener.close()


async def hold(connection: Connection) -> None:
    """Serve a connection by reading until it ends."""
    while True:
        await connection.receive()


async def settled(progress: Callable[[], int]) -> int:
    """Give way to the loop until *progress* has stopped changing."""
    last, unchanged = progress(), 0
    while unchanged < 200:
        await asyncio.sleep(0)
        unchanged = unchanged + 1 if progress() == last else 0
        last = progress()
    return last


# The contract


@every_transport
@in_a_loop
async def test_messages_arrive_whole_and_in_order_both_ways(url: str) -> None:
    messages = [bytes([number]) * (number * 37) for number in range(50)]

    async with connected(url) as ends:
        for message in messages:
            await ends.near.send(message)
            await ends.far.send(message[::-1] + b"!")

        assert [await ends.far.receive() for _ in messages] == messages
        assert [await ends.near.receive() for _ in messages] == [m[::-1] + b"!" for m in messages]


@every_transport
@in_a_loop
async def test_the_other_side_reads_what_was_sent_before_closing_and_then_the_end(url: str) -> None:
    async with connected(url) as ends:
        await ends.near.send(b"last words")
        await ends.near.close("going home")

        assert await ends.far.receive() == b"last words"
        with pytest.raises(TransportError, match="going home"):
            await ends.far.receive()
        with pytest.raises(TransportError):
            await ends.far.send(b"too late")


@every_transport
@in_a_loop
async def test_a_closed_connection_can_be_closed_again_but_not_used(url: str) -> None:
    async with connected(url) as ends:
        await ends.near.close("x" * 500)
        await ends.near.close()
        ends.near.abort()

        with pytest.raises(TransportError):
            await ends.near.send(b"")
        with pytest.raises(TransportError):
            await ends.near.receive()


@every_transport
@in_a_loop
async def test_an_abort_ends_both_sides(url: str) -> None:
    async with connected(url) as ends:
        reading = asyncio.create_task(ends.near.receive())
        await settled(lambda: 0)
        ends.near.abort()
        ends.near.abort()

        with pytest.raises(TransportError, match="connection lost"):
            await reading
        with pytest.raises(TransportError, match="connection lost"):
            await ends.far.receive()


@every_transport
@in_a_loop
async def test_the_biggest_message_fits(url: str) -> None:
    message = b"m" * MESSAGE_BYTES_MAX

    async with connected(url) as ends:
        sending = asyncio.create_task(ends.near.send(message))

        assert await ends.far.receive() == message
        await sending


@every_transport
@in_a_loop
async def test_a_bigger_one_ends_the_connection_and_nothing_else(url: str) -> None:
    async with connected(url) as ends:
        with suppress(TransportError):
            await ends.near.send(b"m" * (MESSAGE_BYTES_MAX + 64 * 1024))

        with pytest.raises(TransportError):
            await ends.far.receive()
        with pytest.raises(TransportError):
            await ends.near.receive()
        again = await dial(ends.listener.address)
        await again.send(b"fine")
        assert await (await ends.arrivals.get()).receive() == b"fine"
        await again.close()


@every_transport
@in_a_loop
async def test_dialling_where_nobody_listens_says_so(url: str) -> None:
    listener = await listen(url, hold)
    await listener.close()

    with pytest.raises(TransportError, match="listen") as caught:
        await dial(listener.address)
    assert listener.address in str(caught.value)


@every_transport
@in_a_loop
async def test_an_address_is_one_listeners_until_it_closes(url: str) -> None:
    first = await listen(url, hold)

    with pytest.raises(TransportError, match="already"):
        await listen(first.address, hold)

    await first.close()
    await first.close()
    second = await listen(first.address, hold)
    assert second.address == first.address
    await second.close()


@every_transport
@in_a_loop
async def test_a_cancelled_receive_loses_no_message(url: str) -> None:
    async with connected(url) as ends:
        for number in range(20):
            receiving = asyncio.create_task(ends.far.receive())
            await settled(lambda: 0)
            await ends.near.send(bytes([number]))
            receiving.cancel()
            with suppress(asyncio.CancelledError):
                assert await receiving == bytes([number])
                continue
            assert await ends.far.receive() == bytes([number])


@every_transport
@in_a_loop
async def test_a_sender_waits_for_a_reader_that_does_not_keep_up(url: str) -> None:
    piece, count, sent = b"p" * 65_536, 1024, 0

    async def send_all() -> None:
        nonlocal sent
        for number in range(count):
            await ends.near.send(number.to_bytes(2, "big") + piece)
            sent += 1

    async with connected(url) as ends:
        sending = asyncio.create_task(send_all())

        assert await settled(lambda: sent) < count / 2
        for number in range(count):
            assert await ends.far.receive() == number.to_bytes(2, "big") + piece
        await sending


@every_transport
@in_a_loop
async def test_a_waiting_sender_can_be_cancelled(url: str) -> None:
    sent = 0

    async def send_for_ever() -> None:
        nonlocal sent
        while True:
            await ends.near.send(b"p" * 65_536)
            sent += 1

    async with connected(url) as ends:
        sending = asyncio.create_task(send_for_ever())
        waiting_after = await settled(lambda: sent)
        sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending

        for _ in range(waiting_after):
            assert len(await ends.far.receive()) == 65_536


@every_transport
@in_a_loop
async def test_closing_does_not_wait_for_a_reader_that_has_stopped(url: str) -> None:
    sent = 0

    async def send_for_ever() -> None:
        nonlocal sent
        while True:
            await ends.near.send(b"p" * 65_536)
            sent += 1

    async with connected(url) as ends:
        sending = asyncio.create_task(send_for_ever())
        await settled(lambda: sent)

        async with asyncio.timeout(5):
            await ends.near.close()
        with pytest.raises(TransportError):
            await sending
        ends.far.abort()


@every_transport
@in_a_loop
async def test_closing_a_listener_closes_what_it_accepted_and_waits_for_it(url: str) -> None:
    served = asyncio.Event()

    async def accept(connection: Connection) -> None:
        try:
            await hold(connection)
        finally:
            await asyncio.sleep(0)
            served.set()

    listener = await listen(url, accept)
    near = await dial(listener.address)
    await near.send(b"hello")

    await listener.close()

    assert served.is_set()
    with pytest.raises(TransportError, match="the listener closed"):
        await near.receive()
    await near.close()


@every_transport
@in_a_loop
async def test_a_connection_closes_when_its_server_returns(url: str) -> None:
    async def accept(connection: Connection) -> None:
        await connection.send(b"bye")

    listener = await listen(url, accept)
    near = await dial(listener.address)

    assert await near.receive() == b"bye"
    with pytest.raises(TransportError):
        await near.receive()
    await listener.close()


@every_transport
@in_a_loop
async def test_a_server_that_fails_is_logged_and_harms_only_its_connection(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def accept(connection: Connection) -> None:
        if await connection.receive() == b"fail":
            raise ZeroDivisionError("a bug in accept")
        await connection.send(b"served")

    listener = await listen(url, accept)
    unlucky, lucky = await dial(listener.address), await dial(listener.address)

    await unlucky.send(b"fail")
    with pytest.raises(TransportError):
        await unlucky.receive()
    await lucky.send(b"work")
    assert await lucky.receive() == b"served"
    await listener.close()

    assert [record.exc_text or "" for record in caplog.records if "a bug" in caplog.text]


NO_URLS = [
    "http://host",
    "localhost:8765",
    "ws://",
    "memory://",
    "ws://h:x",
    "unix://",
    "unix:///",
    "unix://relative/mesh.sock",
    "unix:///tmp/" + 100 * "x",
    "unix:///tmp/a?b",
    "unix:///tmp/a%00b",
]


@pytest.mark.parametrize("text", NO_URLS)
@in_a_loop
async def test_what_is_no_url_of_ours_is_refused_before_anything_happens(text: str) -> None:
    with pytest.raises(UsageError):
        await dial(text)
    with pytest.raises(UsageError):
        await listen(text, hold)


# Websockets only


@asynccontextmanager
async def listening(url: str = "ws://127.0.0.1:0") -> AsyncIterator[Listener]:
    def http(request: HttpRequest) -> HttpAnswer | None:
        if request.path == "/healthz":
            return HttpAnswer(b'{"ok":true}', "application/json")
        return None

    listener = await listen(url, hold, http=http)
    try:
        yield listener
    finally:
        await listener.close()


UPGRADE = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==",
    "Sec-WebSocket-Version: 13",
)


async def get(listener: Listener, path: str, *headers: str) -> tuple[int, str]:
    """Ask for *path* as any HTTP client may; return the status and what came with it."""
    port = urlsplit(listener.address).port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write("\r\n".join((f"GET {path} HTTP/1.1", *headers, "", "")).encode())
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split()[1])
    rest = b"" if status == 101 else await reader.read()
    writer.close()
    await writer.wait_closed()
    return status, (head + rest).decode()


@in_a_loop
async def test_a_web_page_cannot_reach_the_mesh() -> None:
    async with listening() as listener:
        for origin in ("https://evil.example", "http://localhost", "null"):
            status, _ = await get(
                listener, "/mesh", "Host: localhost", f"Origin: {origin}", *UPGRADE
            )

            assert status == 403


@in_a_loop
async def test_a_name_that_was_rebound_to_loopback_cannot_reach_the_mesh() -> None:
    rebound = ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1"]

    async with listening() as listener:
        for host in rebound:
            for path in ("/mesh", "/healthz"):
                assert (await get(listener, path, f"Host: {host}", *UPGRADE))[0] == 421
        both = ("Host: localhost", "Host: evil.example")
        assert (await get(listener, "/mesh", *both, *UPGRADE))[0] == 421
        assert (await get(listener, "/mesh", *UPGRADE))[0] == 421


@in_a_loop
async def test_loopback_names_reach_the_mesh() -> None:
    async with listening() as listener:
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8765", "127.1.2.3", "[::1]", "[::1]:1"):
            for path in ("/mesh", "/"):
                assert (await get(listener, path, f"Host: {host}", *UPGRADE))[0] == 101


@in_a_loop
async def test_a_public_listener_answers_to_any_name() -> None:
    async with listening("ws://0.0.0.0:0") as listener:
        assert (await get(listener, "/mesh", "Host: relay.example", *UPGRADE))[0] == 101
        assert listener.address.startswith("ws://0.0.0.0:")


@in_a_loop
async def test_localhost_is_one_address() -> None:
    async with listening("ws://localhost:0") as listener:
        port = urlsplit(listener.address).port
        connection = await dial(f"ws://localhost:{port}")

        assert listener.address == f"ws://127.0.0.1:{port}"
        await connection.close()


@in_a_loop
async def test_plain_http_is_answered_by_the_callback() -> None:
    async with listening() as listener:
        status, text = await get(listener, "/healthz?verbose=1", "Host: localhost")

        assert status == 200
        assert "content-type: application/json" in text.lower()
        assert text.endswith('{"ok":true}')


@pytest.mark.parametrize("headers", [(), UPGRADE])
@pytest.mark.parametrize("path", ["/nothing", "/mesh/more", "//mesh"])
@in_a_loop
async def test_an_unknown_path_is_not_found(path: str, headers: tuple[str, ...]) -> None:
    async with listening() as listener:
        assert (await get(listener, path, "Host: localhost", *headers))[0] == 404


@in_a_loop
async def test_a_callback_that_fails_gives_an_error_and_the_listener_goes_on() -> None:
    def http(request: HttpRequest) -> HttpAnswer | None:
        raise ZeroDivisionError("a bug in http")

    listener = await listen("ws://127.0.0.1:0", hold, http=http)

    status, text = await get(listener, "/healthz", "Host: localhost")

    assert status == 500
    assert "a bug" not in text
    await (await dial(listener.address)).close()
    await listener.close()


@in_a_loop
async def test_a_text_message_closes_the_connection() -> None:
    async with connected("ws://127.0.0.1:0") as ends:
        stranger = await websockets.connect(ends.listener.address, proxy=None)
        far = await ends.arrivals.get()
        await stranger.send("hello?")

        with pytest.raises(ProtocolError, match="text"):
            await far.receive()
        with pytest.raises(TransportError):
            await far.receive()
        with pytest.raises(websockets.ConnectionClosed):
            await stranger.recv()
        assert stranger.close_code == 1003


@in_a_loop
async def test_peers_that_hang_up_or_talk_nonsense_are_not_news(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with listening() as listener:
        for nonsense in (
            b"",
            b"GET /me",
            b"\x16\x03\x01\x02\x00\x01" * 20,
            b"POST / HTTP/1.1\r\n\r\n",
        ):
            port = urlsplit(listener.address).port
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(nonsense)
            writer.write_eof()
            await reader.read()
            writer.close()
        connection = await dial(listener.address)
        connection.abort()

    assert [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")] == []


@asynccontextmanager
async def raw_server(answer: bytes) -> AsyncIterator[str]:
    """A TCP server that is no relay; yields its URL."""

    served: list[tuple[asyncio.Task[None], asyncio.StreamWriter]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append((asyncio.current_task(), writer))
        await reader.read(1)
        writer.write(answer)
        if not answer:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await settled(lambda: len(served))
        for task, writer in served:
            writer.close()
            await asyncio.wait([task])


@pytest.mark.parametrize(
    "answer", [b"220 smtp.example ready\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"\n"]
)
@in_a_loop
async def test_dialling_something_else_says_so(answer: bytes) -> None:
    async with raw_server(answer) as url:
        with pytest.raises(TransportError, match=url):
            await dial(url)
        with pytest.raises(TransportError, match="TLS failed|no answer|closed|lost|reset"):
            await dial(url.replace("ws:", "wss:"), timeout=2)


@in_a_loop
async def test_dialling_somebody_silent_ends_in_time_and_can_be_cancelled() -> None:
    async with raw_server(b"") as url:
        with pytest.raises(TransportError, match="no answer in time"):
            await dial(url, timeout=0.05)
        dialling = asyncio.create_task(dial(url))
        await settled(lambda: 0)
        dialling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialling


@in_a_loop
async def test_redirects_are_not_followed() -> None:
    async with connected("ws://127.0.0.1:0") as ends:
        head = f"HTTP/1.1 302 Found\r\nLocation: {ends.listener.address}\r\n\r\n"
        async with raw_server(head.encode()) as url:
            with pytest.raises(TransportError, match="302"):
                await dial(url)


@in_a_loop
async def test_an_unknown_host_says_so() -> None:
    for host in ("nowhere.invalid", "x" * 70 + ".invalid"):
        with pytest.raises(TransportError, match="no such host"):
            await dial(f"ws://{host}:1")


@in_a_loop
async def test_small_messages_are_sent_at_once() -> None:
    async with connected("ws://127.0.0.1:0") as ends:
        for side in (ends.near, ends.far):
            sock = side._websocket.transport.get_extra_info("socket")  # type: ignore[attr-defined]

            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
@in_a_loop
async def test_wss_works_with_a_certificate_that_is_trusted_and_only_then(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    shown.load_cert_chain(certificate, key)

    listener = await listen("wss://127.0.0.1:0", hold, tls=shown)
    connection = await dial(
        listener.address, tls=ssl.create_default_context(cafile=str(certificate))
    )
    await connection.send(b"secret")
    await connection.close()
    with pytest.raises(TransportError, match="not trusted"):
        await dial(listener.address)
    with pytest.raises(TransportError):
        await dial(listener.address.replace("wss:", "ws:"))
    await settled(lambda: 0)  # asyncio's server doesn't wait for handshakes that failed
    await listener.close()


@in_a_loop
async def test_wss_needs_a_certificate() -> None:
    with pytest.raises(UsageError, match="certificate"):
        await listen("wss://127.0.0.1:0", hold)
