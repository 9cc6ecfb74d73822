"""
The door, over real sockets: attacks A01 to A31 of the reference, as far as they reach a connection,
and who is let in.

Each attack is on a replica that serves an honest peer meanwhile (`attacked`), which must still be
served afterwards, and must not take more memory or hold up the event loop.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import logging
import os
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
import websockets
import zstandard
from harness import asynchronous, join
from servers import make_certificate
from websockets.frames import Frame, Opcode

from crdtstate import (
    Config,
    Limits,
    NotAdmitted,
    PeerConnected,
    PeerDisconnected,
    PeerRejected,
    Replica,
    StoreError,
    TransportError,
    UsageError,
    connections,
    wire,
)
from crdtstate.admission import Door
from crdtstate.certificates import JoinToken, issue, parse_grant
from crdtstate.connections import reach
from crdtstate.credentials import open_credentials, open_host_credentials
from crdtstate.handshake import MESSAGE_BYTES_MAX, Dialler, Listener
from crdtstate.signing import public_of
from crdtstate.transports import Connection, dial, listen, websocket
from crdtstate.transports.websocket import fingerprint, shown_by

LOCAL = "ws://127.0.0.1:0"
WORDS = "words that all of us know"
DAY = 24 * 3600 * 1000

STRICT = Limits(spare_loopback=False)
"""As if those on this machine came from somewhere else."""

LAG_MAX = 0.25
GROWTH_MAX = 2 * 2**20
"""What strangers may make a process take."""

READ_MAX = 2 * GROWTH_MAX
"""The same where they send the smallest frames: asyncio reads 256 KiB at once, and websockets makes
objects of all that is in it before anybody can look. Kept, they would be thirty megabytes."""

UPGRADE = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==",
    "Sec-WebSocket-Version: 13",
)


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def until(is_so: Callable[[], Any]) -> None:
    """Give way to the loop until something is so."""
    for _ in range(1_000_000):
        if is_so():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never comes about")


class Lag:
    """For how long the event loop stood still at most."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def watch(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.01)
            self.worst = max(self.worst, time.perf_counter() - before - 0.01)


class Victim:
    """A replica that is attacked, and an honest one that is connected to it over a unix socket."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.refused = replica.traffic.refused
        self.rejections: list[PeerRejected] = []
        replica.on(PeerRejected, self.rejections.append)
        self.lag = Lag()

    @property
    def address(self) -> str:
        assert self.replica.address is not None
        return self.replica.address

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    async def until(self, is_so: Callable[[], Any]) -> None:
        await until(is_so)


@asynccontextmanager
async def attacked(
    limits: Limits = STRICT, growth_max: int = GROWTH_MAX, **options: Any
) -> AsyncIterator[Victim]:
    config = Config(limits=limits, **options.pop("config", {}))
    async with (
        Replica("ann", listen=LOCAL, config=config, **options) as ann,
        Replica("bob", peers=[str(ann.address)], mesh=options.get("mesh")) as bob,
    ):
        victim = Victim(ann)
        ann.map("plan")["before"] = 1
        await bob.wait_for(ann.version(), timeout=20)
        watching = asyncio.create_task(victim.lag.watch())
        memory = resident()
        try:
            yield victim
            assert resident() - memory < growth_max
            assert victim.lag.worst < LAG_MAX
        finally:
            watching.cancel()
        # The honest one was there all the time, and still is.
        bob.map("plan")["after"] = 2
        await ann.wait_for(bob.version(), timeout=20)
        assert dict(ann.map("plan")) == {"before": 1, "after": 2}
        assert [peer.agent for peer in ann.peers()] == ["bob"]


class Raw:
    """A TCP connection that says what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, victim: Victim, host: str = "127.0.0.1") -> Raw:
        """Connect from one of the addresses of the loopback interface."""
        where = {"host": "127.0.0.1", "port": victim.port, "local_addr": (host, 0)}
        return cls(*await asyncio.open_connection(**where))

    @classmethod
    async def upgraded(cls, victim: Victim, host: str = "127.0.0.1", *headers: str) -> Raw:
        raw = await cls.open(victim, host)
        assert await raw.get("/mesh", "Host: localhost", *headers, *UPGRADE) == 101
        return raw

    async def get(self, path: str, *headers: str) -> int:
        self.writer.write("\r\n".join((f"GET {path} HTTP/1.1", *headers, "", "")).encode())
        self.head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        return int(self.head.split()[1])

    def frame(self, opcode: Opcode, data: bytes, **bits: Any) -> None:
        self.writer.write(Frame(opcode, data, **bits).serialize(mask=True))

    def send(self, data: bytes) -> None:
        self.frame(Opcode.BINARY, data)

    async def receive(self) -> bytes:
        """The payload of the next frame; raises `Closed` if that is a goodbye, or the end."""
        try:
            first, length = await self.reader.readexactly(2)
            if length == 126:
                (length,) = struct.unpack("!H", await self.reader.readexactly(2))
            data = await self.reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise Closed(0, "") from None
        if first & 15 == Opcode.CLOSE:
            raise Closed(struct.unpack("!H", data[:2])[0], data[2:].decode())
        return data

    async def closed(self) -> tuple[int, str]:
        """Read on until the end; return the code and reason."""
        try:
            while True:
                await self.receive()
        except Closed as exc:
            return exc.code, exc.reason
        finally:
            self.writer.close()
            with suppress(ConnectionError):
                await self.writer.wait_closed()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()


class Closed(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason


def seed_of(agent: str) -> bytes:
    return agent.encode().ljust(32, b"\1")


def token(agent: str, root: bytes = bytes([1]) * 32, **changes: Any) -> str:
    """The join token of a member."""
    now = time.time_ns() // 1_000_000
    fields: dict[str, Any] = {
        "agent": agent,
        "key": public_of(seed_of(agent)),
        "grants": [parse_grant("*:rws")],
        "not_before_ms": now - DAY,
        "not_after_ms": now + DAY,
        "serial": agent.encode().ljust(16),
    }
    certificate = issue(root, **(fields | changes))
    secrets = (bytes([3]) * 32,)
    return JoinToken(public_of(root), secrets, (), seed_of(agent), certificate).encode()


def door(mesh: Any = None, **options: Any) -> Door:
    return Door(open_credentials(mesh), Limits(), **options)


async def first_of(known: Any = None) -> tuple[Dialler, bytes]:
    side = Dialler(known or open_host_credentials(), os.urandom(32), 0, b"")
    return side, side.greet()


# Strangers


@asynchronous
async def test_a01_half_a_request_holds_its_place_for_a_moment_only(monkeypatch):
    monkeypatch.setattr(websocket, "OPEN_TIMEOUT", 0.2)
    async with attacked(Limits(spare_loopback=False, half_open_per_address=2)) as victim:
        with await Raw.open(victim) as raw, await Raw.open(victim) as other:
            for each in (raw, other):
                each.writer.write(b"GET / HT")
            await victim.until(lambda: victim.replica._door._half_open["127.0.0.1"] == 2)
            with await Raw.open(victim) as late:
                assert await late.get("/mesh", "Host: localhost", *UPGRADE) == 503
            assert await raw.closed() == (0, "")
            assert await other.closed() == (0, "")
        await victim.until(lambda: not victim.replica._door._half_open)
        with await Raw.upgraded(victim):
            pass


@asynchronous
async def test_a02_to_a05_what_browsers_send_is_refused_before_anything_happens():
    evil = "Origin: https://evil.example"
    async with attacked() as victim:
        for path in ("/mesh", "/", "/status"):
            for headers, status in (
                (("Host: localhost", evil), 403),
                (("Host: localhost", "Origin: null"), 403),
                (("Host: localhost", evil, evil), 400),
                (("Host: localhost", "Sec-Fetch-Site: cross-site"), 403),
                (("Host: localhost", "Sec-Fetch-Site: same-site"), 403),
                ((f"Host: evil.example:{victim.port}",), 421),
                (("Host: localhost", "Host: evil.example"), 421),
                (("Host: localhost", "Host: localhost"), 421),
            ):
                with await Raw.open(victim) as raw:
                    found = await raw.get(path, *headers, *UPGRADE)
                    if path == "/status" and status == 403 and "Sec" not in headers[1]:
                        status = 404
                    assert found == status, (path, headers)
                    assert b"plan" not in await raw.reader.read()


@asynchronous
async def test_a06_silence_is_told_that_it_took_too_long():
    async with attacked(Limits(spare_loopback=False, handshake_timeout=0.2)) as victim:
        silent = await Raw.upgraded(victim)
        assert await silent.closed() == (4408, "the handshake took too long")
        half = await Raw.upgraded(victim)
        half.send((await first_of())[1])
        assert await half.closed() == (4408, "the handshake took too long")

        assert victim.refused["timeout"] == 2
        score = victim.replica._door._bans.score("127.0.0.1", 0)
        assert score == pytest.approx(10, abs=0.5)


@asynchronous
async def test_a07_and_a08_strangers_hear_the_same_and_soon_nothing():
    host = open_host_credentials()
    stranger = open_credentials(WORDS)
    async with attacked() as victim:
        took = []
        for number in range(5):
            known = stranger if number % 2 else host
            raw = await Raw.upgraded(victim)
            # A07 has another secret, A08 the id of the right one.
            raw.send((await first_of(known))[1])
            second = await raw.receive()
            assert len(second) == 80
            raw.send(msgpack.packb([bytes(32), b"", b""]))
            before = time.perf_counter()
            assert await raw.closed() == (4401, "not admitted")
            took.append(time.perf_counter() - before)

        with await Raw.open(victim) as sixth:
            assert await sixth.get("/mesh", "Host: localhost", *UPGRADE) == 429
            assert "Retry-After: 60\r\n" in sixth.head
        with await Raw.upgraded(victim, "127.0.0.2"):
            pass
        assert victim.refused == {"not-admitted": 5, "banned": 1}
        assert [each.reason for each in victim.rejections] == ["not admitted"] * 5
        assert min(took) < 0.05


@asynchronous
async def test_a09_text_is_unsupported():
    async with attacked() as victim:
        for data in (b"hello?", b"", "\u2028".encode()):
            raw = await Raw.upgraded(victim)
            raw.frame(Opcode.TEXT, data)
            assert await raw.closed() == (1003, "the mesh speaks binary")


@asynchronous
async def test_a10_a_stranger_may_say_little_and_a_peer_no_more_than_any():
    async with attacked(growth_max=16 * 2**20) as victim:
        raw = await Raw.upgraded(victim)
        raw.send(bytes(MESSAGE_BYTES_MAX + 1))
        assert (await raw.closed())[0] == 1009
        # What it only announces is not waited for.
        raw = await Raw.upgraded(victim)
        raw.writer.write(bytes([0x82, 0xFF]) + (2**62).to_bytes(8, "big") + bytes(4))
        assert (await raw.closed())[0] in (1002, 1009)

        connection = await join(victim.address)
        with pytest.raises(TransportError, match="1009|lost"):
            await connection.send(bytes(websocket.SETTINGS["max_size"] + 1))
            while True:
                await connection.receive()
        connection.abort()


@asynchronous
async def test_a11_compression_is_not_spoken():
    offer = "Sec-WebSocket-Extensions: permessage-deflate"
    async with attacked() as victim:
        raw = await Raw.upgraded(victim, "127.0.0.1", offer)
        assert "permessage-deflate" not in raw.head
        raw.writer.write(bytes([0xC2, 0x81]) + bytes(4) + b"x")
        assert (await raw.closed())[0] == 1002


@asynchronous
async def test_a12_a_million_empty_fragments_are_not_collected():
    strict = Limits(spare_loopback=False, handshake_timeout=1)
    async with attacked(strict, growth_max=READ_MAX) as victim:
        raw = await Raw.upgraded(victim)
        raw.frame(Opcode.BINARY, b"", fin=False)
        fragments = Frame(Opcode.CONT, b"", fin=False).serialize(mask=True) * 10_000
        with suppress(ConnectionError):
            for _ in range(100):
                raw.writer.write(fragments)
                await raw.writer.drain()
        # An older websockets waits for more, and reads no more than it has room for.
        assert (await raw.closed())[0] in (1008, 1009, 0, 4408)


@asynchronous
async def test_a13_a_hundred_thousand_pings_hold_nobody_up():
    strict = Limits(spare_loopback=False, handshake_timeout=10)
    async with attacked(strict, growth_max=READ_MAX) as victim:
        raw = await Raw.upgraded(victim)
        pings = Frame(Opcode.PING, b"").serialize(mask=True) * 1000

        async def drain() -> None:
            with suppress(ConnectionError):
                while await raw.reader.read(65536):
                    pass

        draining = asyncio.create_task(drain())
        with suppress(ConnectionError):
            for _ in range(100):
                raw.writer.write(pings)
                await raw.writer.drain()
        raw.writer.close()
        await draining


@asynchronous
async def test_a13_answers_to_pings_that_nobody_reads_are_not_collected(caplog):
    async with attacked(Limits(spare_loopback=False, handshake_timeout=10)) as victim:
        raw = await Raw.upgraded(victim)
        pings = Frame(Opcode.PING, b"x" * 125).serialize(mask=True) * 1000
        with suppress(ConnectionError):
            for _ in range(200):
                raw.writer.write(pings)
                await raw.writer.drain()
            raise AssertionError("25 MB of answers were kept for somebody who reads none")
        raw.writer.close()
    # Whose end is one line at most, not one for each answer.
    assert caplog.text.count("socket.send() raised") <= 1


@asynchronous
async def test_a14_only_so_many_strangers_of_one_address_and_of_all():
    limits = Limits(spare_loopback=False, half_open=10)
    async with attacked(limits) as victim:
        async with AsyncExitStack() as held:
            for _ in range(8):
                held.enter_context(await Raw.upgraded(victim))
            with await Raw.open(victim) as ninth:
                assert await ninth.get("/mesh", "Host: localhost", *UPGRADE) == 503
            for _ in range(2):
                held.enter_context(await Raw.upgraded(victim, "127.0.0.2"))
            with await Raw.open(victim, "127.0.0.3") as eleventh:
                assert await eleventh.get("/mesh", "Host: localhost", *UPGRADE) == 503
            assert victim.refused == {"half-open": 2}
        await victim.until(lambda: not victim.replica._door._half_open)
        await (await join(victim.address)).close()


@asynchronous
async def test_those_who_are_turned_away_are_limited_as_well(monkeypatch):
    monkeypatch.setattr(websocket, "TURNED_AWAY_MAX", 3)
    async with attacked(Limits(spare_loopback=False, half_open_per_address=1)) as victim:
        async with AsyncExitStack() as held:
            raws = [held.enter_context(await Raw.open(victim)) for _ in range(6)]
            await victim.until(lambda: victim.refused["half-open"] == 5)
            assert await raws[4].closed() == await raws[5].closed() == (0, "")
            assert await raws[1].get("/mesh", "Host: localhost", *UPGRADE) == 503


@asynchronous
async def test_a15_a_full_replica_turns_away_and_drops_nobody(monkeypatch):
    """A15 in small: 20 sessions where there is room for 12."""
    monkeypatch.setattr(connections, "STRANGERS_MAX", 0)
    async with attacked(Limits(), config={"links_max": 12}) as victim:
        inside: list[Connection] = []
        for _ in range(11):
            inside.append(await join(victim.address))
        for _ in range(8):
            with pytest.raises(TransportError, match="503"):
                await join(victim.address)

        assert len(victim.replica._connections._links) == 12
        assert victim.refused == {"full": 8}
        for each in inside:
            assert each.is_writable
            await each.close()
        await victim.until(lambda: len(victim.replica._connections._links) == 1)


# The handshake; its laws are in test_handshake.py


@contextmanager
def recorded(connection_type: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """All that diallers send, as somebody on the wire has it."""
    sent: list[bytes] = []
    send = connection_type.send

    async def note(self: Any, data: bytes) -> None:
        sent.append(data)
        await send(self, data)

    with monkeypatch.context() as patched:
        patched.setattr(connection_type, "send", note)
        yield sent


@asynchronous
async def test_a16_a_recording_of_a_good_handshake_opens_nothing(monkeypatch):
    async with attacked() as victim:
        with recorded(websocket.WebSocketConnection, monkeypatch) as sent:
            await (await join(victim.address)).close()
        # The victim's are among them: 1 and 3 are the dialler's.
        first, second, third, _ = sent[:4]
        raw = await Raw.upgraded(victim)
        raw.send(first)
        assert await raw.receive() != second
        raw.send(third)
        assert await raw.closed() == (4401, "not admitted")


@asynchronous
async def test_a17_what_the_listener_said_is_no_answer():
    async with attacked() as victim:
        raw = await Raw.upgraded(victim)
        raw.send((await first_of())[1])
        raw.send(await raw.receive())
        assert await raw.closed() == (4401, "not admitted")


@asynchronous
async def test_a18_a_bit_that_was_flipped_on_the_wire():
    """All positions are in test_handshake.py; here a few arrive over a socket. In the first message
    they are noticed with the third, as to all strangers."""
    async with attacked(Limits()) as victim:
        for number in (1, 3):
            for bit in (0, 5, 37, 300):
                side, first = await first_of()

                def flip(data: bytes, bit: int = bit) -> bytes:
                    found = bytearray(data)
                    found[bit // 8] ^= 1 << bit % 8
                    return bytes(found)

                raw = await Raw.upgraded(victim)
                raw.send(flip(first) if number == 1 else first)
                try:
                    second = await raw.receive()
                    third = side.prove(second) if number == 3 else bytes([0x93]) + second
                    raw.send(flip(third) if number == 3 else third)
                    code, reason = await raw.closed()
                except Closed as exc:
                    code, reason = exc.code, exc.reason
                    raw.writer.close()
                assert (code, reason) == (4401, "not admitted")


@asynchronous
async def test_a19_and_a20_only_valid_certificates_of_this_root_are_admitted():
    now = time.time_ns() // 1_000_000
    async with Replica("ann", listen=LOCAL, mesh=token("ann")) as ann:
        for other in (
            token("eve", not_after_ms=now - 3_600_000),
            token("eve", not_before_ms=now + 3_600_000),
            token("eve", bytes([2]) * 32),
        ):
            for mesh, name in ((other, "eve"), (WORDS, "eve"), (None, "eve")):
                config = Config(reconnect_max=0.1)
                peers = [str(ann.address)]
                async with Replica(name, peers=peers, mesh=mesh, config=config) as eve:
                    await until(eve.unreachable)
                    assert (
                        "not admitted" in eve.unreachable()[peers[0]]
                        or "not of this mesh" in (eve.unreachable()[peers[0]])
                    )
                    assert eve.peers() == ann.peers() == []
        async with Replica("eve", peers=[str(ann.address)], mesh=token("eve")) as eve:
            eve.map("plan")["goal"] = "ship it"
            await ann.wait_for(eve.version(), timeout=20)


@asynchronous
async def test_a22_who_is_revoked_is_parted_from_at_once_and_let_in_no_more():
    boss = token("boss", grants=[parse_grant("*:crws")])
    async with (
        Replica("boss", listen=LOCAL, mesh=boss) as admin,
        Replica("ann", listen=LOCAL, peers=[str(admin.address)], mesh=token("ann")) as ann,
        Replica("eve", peers=[str(ann.address)], mesh=token("eve")) as eve,
    ):
        # Only a key that signed something is known by its name.
        eve.map("plan")["goal"] = "ship it"
        await admin.wait_for(eve.version(), timeout=20)
        await until(lambda: [peer.agent for peer in ann.peers()] == ["boss", "eve"])
        events = ann.events(PeerDisconnected)
        began = time.monotonic()

        admin.revoke("eve", reason="a test")

        while (await anext(events)).agent != "eve":
            pass
        assert time.monotonic() - began < 2
        await until(lambda: "revoked" in str(eve.unreachable()))
        assert "4430" in str(eve.unreachable())
        assert ann.traffic.refused["revoked"] >= 1
        assert [peer.agent for peer in ann.peers()] == ["boss"]
        await events.aclose()


@asynchronous
async def test_a25_what_was_altered_on_its_way_ends_the_session():
    """There is no encryption of records: TLS does that, and breaks on a flipped bit by itself. On
    plain ws:// somebody in between can alter what is sent. Frames that are none end the session;
    changes carry a proof of their own, which the core checks (see the tests of authors)."""
    async with attacked() as victim:
        frame = wire.encode_message([wire.encode_frame(wire.Hello(1, 9, 7, 1, "mallory"))])
        for altered in (
            bytes([frame[0] ^ 1]) + frame[1:],
            frame[:1] + bytes([frame[1] ^ 0x20]) + frame[2:],
            frame + frame,
            frame[:-3],
        ):
            connection = await join(victim.address)
            await connection.send(altered)
            assert await ended(connection) == "4400"
        assert victim.refused["bad-frame"] == 4
        assert victim.replica._door._bans.score("127.0.0.1", 0) == pytest.approx(80, abs=2)


async def ended(connection: Connection) -> str:
    """The code with which the other side closes."""
    with pytest.raises(TransportError) as caught:
        while True:
            await connection.receive()
    return str(caught.value).partition("closed by the other side, ")[2].partition(" ")[0]


# Frames


def framed(body: bytes) -> bytes:
    return bytes([wire.HEADER]) + body


BOMBS = {
    "A26 nested": framed(b"\x91" * 10_000),
    "A26 nested in a frame": framed(b"\x91\x9a\x10" + b"\x91" * 10_000),
    "A27 an array of 2^32": framed(b"\xdd\xff\xff\xff\xff"),
    "A27 in a frame": framed(b"\x91\x94\x10\xdd\xff\xff\xff\xff"),
    "A28 a megabyte of maps": framed(b"\x91\x94\x10\xdd\x00\x0f\x00\x00" + b"\x80" * 2**20),
    "A29 bytes left over": framed(b"\x91\x93\x02\x00\xa0\x00"),
    "A30 too few fields": framed(b"\x91\x92\x02\x00"),
    "A30 bytes for a number": framed(b"\x91\x93\x02\xc4\x01\x00\xa0"),
    "A30 a field twice": framed(b"\x91\x82\x02\x00\x02\x00"),
    "A31 an unknown type": framed(b"\x91\x92\x7d\x00"),
    "A31 another": framed(b"\x91\x91\x01"),
    "no header": b"\x91\x93\x02\x00\xa0",
    "nothing": b"",
}


@pytest.mark.parametrize("name", BOMBS)
@asynchronous
async def test_a26_to_a31_a_message_that_is_none_ends_its_session(name):
    async with attacked(growth_max=4 * 2**20) as victim:
        connection = await join(victim.address)
        before = time.perf_counter()
        await connection.send(BOMBS[name])

        assert await ended(connection) == "4400"
        assert time.perf_counter() - before < 1
        assert victim.refused == {"bad-frame": 1}
        assert len(victim.rejections) == 1


def compressed(size: int, packed: bytes) -> bytes:
    return framed(b"\x91" + bytes(msgpack.packb([127, size, packed])))


ZEROS = zstandard.ZstdCompressor().compress(bytes(64 * 2**20))
WITHOUT_SIZE = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**20))
WINDOW = zstandard.ZstdCompressor(
    compression_params=zstandard.ZstdCompressionParameters(window_log=27)
)

ZSTD_BOMBS = {
    "A32 64 MiB in 4 KiB": compressed(64 * 2**20, ZEROS),
    "A32 that says it were less": compressed(1000, ZEROS),
    "A33 without its size": compressed(2**20, WITHOUT_SIZE),
    "A34 a window of 128 MiB": compressed(3 * 2**20, WINDOW.compress(os.urandom(3 * 2**20))),
    "A35 a forged size": compressed(
        2**60, ZEROS[:4] + bytes([0xE0]) + (2**60).to_bytes(8, "little") + ZEROS[9:]
    ),
}


@pytest.mark.parametrize("name", ZSTD_BOMBS)
@asynchronous
async def test_a32_to_a35_what_would_grow_too_large_is_not_unpacked(name):
    async with attacked(growth_max=16 * 2**20) as victim:
        connection = await join(victim.address)
        await connection.send(ZSTD_BOMBS[name])

        assert await ended(connection) == "4413"
        assert victim.refused == {"too-large": 1}


@asynchronous
async def test_a31_types_from_128_on_are_for_later_versions():
    async with attacked(Limits()) as victim:
        connection = await join(victim.address)
        hello = wire.encode_frame(wire.Hello(1, 9, 7, 1, "later"))
        later = msgpack.packb([200, "whatever", 1])
        await connection.send(framed(b"\x93" + hello + later + later))
        events = victim.replica.events(PeerDisconnected)
        assert wire.decode_message(await connection.receive())
        await connection.close()
        assert (await anext(events)).agent == "later"
        assert victim.refused == {}
        await events.aclose()


# Bans and rates


@asynchronous
async def test_who_breaks_rules_again_and_again_is_banned_by_its_key():
    async with (
        Replica("ann", listen=LOCAL, mesh=token("ann"), config=Config(limits=STRICT)) as ann,
        Replica("bob", peers=[str(ann.address)], mesh=token("bob")) as bob,
    ):
        eve = door(token("eve"))
        # A score of 20 each, of which a little is forgotten meanwhile.
        for _ in range(6):
            connection, _ = await reach(str(ann.address), eve, None)
            await connection.send(b"nonsense")
            assert await ended(connection) == "4400"

        connection, _ = await reach(str(ann.address), eve, None)
        with pytest.raises(TransportError, match="4431 banned for (60|59) s"):
            await connection.receive()
        # Its key, not its address: bob has the same.
        bob.map("plan")["goal"] = "ship it"
        await ann.wait_for(bob.version(), timeout=20)
        await reach(str(ann.address), door(token("dan")), None)
        assert ann.traffic.refused == {"bad-frame": 6, "banned": 1}


@asynchronous
async def test_a_key_has_so_many_connections_and_the_newest_win():
    config = Config(limits=Limits(connections_per_key=3))
    async with Replica("ann", listen=LOCAL, mesh=token("ann"), config=config) as ann:
        eve = door(token("eve"))
        made = [(await reach(str(ann.address), eve, None))[0] for _ in range(5)]

        assert [await ended(each) for each in made[:2]] == ["4409", "4409"]
        assert ann.traffic.refused == {"duplicate": 2}
        for each in made[2:]:
            assert each.is_writable
            await each.close()


@asynchronous
async def test_a_key_comes_as_so_many_writers_within_an_hour():
    config = Config(limits=Limits(writers_per_hour=3, ban_score=10_000))
    async with Replica("ann", listen=LOCAL, mesh=token("ann"), config=config) as ann:
        eve = door(token("eve"))

        async def come_as(writer: int) -> str:
            """Say so, and return how it ends: the core finds fault with each, as it is forged."""
            connection, _ = await reach(str(ann.address), eve, None)
            hello = wire.encode_frame(wire.Hello(1, 9, writer, 1, "mallory"))
            await connection.send(wire.encode_message([hello]))
            return await ended(connection)

        assert "4429" not in [await come_as(writer) for writer in (1, 2, 3, 1, 2)]
        assert await come_as(4) == "4429"
        assert ann.traffic.refused["rate"] == 1


@asynchronous
async def test_who_sends_too_much_is_read_more_slowly_and_loses_nothing():
    limits = Limits(spare_loopback=False, bytes_per_second=200_000, bytes_burst=50_000)
    async with (
        Replica("ann", listen=LOCAL, config=Config(limits=limits)) as ann,
        Replica("bob", peers=[str(ann.address)]) as bob,
    ):
        began = time.monotonic()
        for number in range(8):
            bob.map("plan")[str(number)] = os.urandom(30_000)
            await ann.wait_for(bob.version(), timeout=30)

        assert time.monotonic() - began > 0.5
        assert ann.traffic.throttled_seconds > 0.5
        assert ann.traffic.refused == {}
        assert ann.map("plan") == bob.map("plan")


@asynchronous
async def test_own_processes_on_this_machine_have_no_limits_by_address():
    async with attacked(Limits(half_open_per_address=1)) as victim:
        async with AsyncExitStack() as held:
            for _ in range(20):
                held.enter_context(await Raw.upgraded(victim))
        for _ in range(10):
            raw = await Raw.upgraded(victim)
            raw.send(b"nonsense")
            assert await raw.closed() == (4401, "not admitted")
        await (await join(victim.address)).close()


@asynchronous
async def test_strangers_fill_no_log(caplog):
    caplog.set_level(logging.DEBUG)
    async with attacked(Limits()) as victim:
        for _ in range(50):
            raw = await Raw.upgraded(victim)
            raw.send((await first_of())[1])
            await raw.receive()
            raw.send(b"secret")
            assert await raw.closed() == (4401, "not admitted")

        assert victim.refused == {"not-admitted": 50}
        assert len(victim.rejections) == 10
        told = [each for each in caplog.records if each.levelno > logging.INFO]
        assert len(told) == 10 and {each.name for each in told} == {"crdtstate"}
        secret = open_host_credentials().secrets[0]
        assert secret.hex() not in caplog.text and repr(secret) not in caplog.text


# Who is let in where


@asynchronous
async def test_beyond_this_machine_a_mesh_is_needed_and_it_says_how_to_make_one():
    for url in ("ws://0.0.0.0:0", "ws://10.0.0.5:1", "ws://[::]:0", "wss://relay.example"):
        for where in ({"listen": url}, {"peers": [url]}):
            with pytest.raises(UsageError) as caught:
                Replica("ann", **where)
            assert "`crdtstate mesh create`" in str(caught.value)
            assert "`crdtstate invite NAME`" in str(caught.value)
            Replica("ann", mesh=WORDS, **where)
    async with Replica("ann") as ann:
        with pytest.raises(UsageError, match="mesh"):
            ann.connect("ws://10.0.0.5:1")
    for url in ("ws://localhost:0", "ws://127.0.0.1:0", "ws://[::1]:0", "memory://x"):
        Replica("ann", listen=url)


@asynchronous
async def test_an_address_that_peers_tell_is_no_way_out_of_it():
    async with Replica("ann", listen=LOCAL) as ann:
        await ann._connections.dial("ws://10.0.0.5:1")

        with pytest.raises(UsageError, match="beyond this machine"):
            await reach("ws://10.0.0.5:1", ann._door, None)


@asynchronous
async def test_a_replica_within_a_process_needs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    async with (
        Replica("ann", listen="memory://ann") as ann,
        Replica("bob", peers=["memory://ann"]) as bob,
    ):
        ann.map("plan")["goal"] = "ship it"
        await bob.wait_for(ann.version(), timeout=20)

    assert list(tmp_path.iterdir()) == []


@asynchronous
async def test_without_a_mesh_the_host_s_secret_is_made_and_has_to_be_private(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    async with Replica("ann", listen=LOCAL) as ann:
        secret = tmp_path / "crdtstate" / "host.secret"
        assert secret.stat().st_mode & 0o777 == 0o600
        async with Replica("bob", peers=[str(ann.address)]) as bob:
            bob.map("plan")["goal"] = "ship it"
            await ann.wait_for(bob.version(), timeout=20)

    secret.chmod(0o644)
    with pytest.raises(StoreError, match=f"chmod 600 {secret}"):
        async with Replica("ann", listen=LOCAL):
            pass
    secret.chmod(0o600)
    async with Replica("ann", listen=LOCAL) as ann:
        # Another user of this machine has another one.
        secret.write_bytes(bytes(32))
        with pytest.raises(NotAdmitted, match="not of this mesh"):
            await reach(str(ann.address), door(), None)


@asynchronous
async def test_a_token_is_for_the_agent_it_names():
    with pytest.raises(UsageError, match="'eve'"):
        Replica("ann", mesh=token("eve"))


@asynchronous
async def test_a_mesh_of_words_meets_over_any_address():
    async with (
        Replica("ann", listen="ws://0.0.0.0:0", mesh=WORDS) as ann,
        Replica("bob", peers=[f"ws://127.0.0.1:{str(ann.address)[-5:]}"], mesh=WORDS) as bob,
    ):
        bob.map("plan")["goal"] = "ship it"
        await ann.wait_for(bob.version(), timeout=20)
        with pytest.raises((NotAdmitted, TransportError)):
            await reach(f"ws://127.0.0.1:{str(ann.address)[-5:]}", door(), None)


@asynchronous
async def test_a_secret_is_replaced_while_the_mesh_runs(tmp_path):
    new, old = "the new words of this mesh", WORDS
    files = [tmp_path / name for name in ("ann", "bob")]
    for file in files:
        file.touch(0o600)
        file.write_text(f"{old}\n")
    async with Replica("ann", listen=LOCAL, mesh=files[0]) as ann:
        for lines in ((new, old), (new,)):
            files[0].write_text("".join(f"{line}\n" for line in lines))
            ann._door._reload_at = 0.0
            for words in lines:
                connection, _ = await reach(str(ann.address), door(words), None)
                await connection.close()
        with pytest.raises(NotAdmitted):
            await reach(str(ann.address), door(old), None)


# Over a socket in the file system


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="crdt-") as found:
        yield Path(found)


@asynchronous
async def test_replicas_of_one_user_meet_over_a_socket_in_a_file():
    with tempfile.TemporaryDirectory(prefix="crdt-") as found:
        path = Path(found, "new", "mesh.sock")
        async with (
            Replica("ann", listen=f"unix://{path}") as ann,
            Replica("bob", peers=[f"unix://{path}"]) as bob,
        ):
            assert ann.address == f"unix://{path}"
            assert os.stat(path.parent).st_mode & 0o777 == 0o700
            assert os.stat(path).st_mode & 0o777 == 0o600
            events = ann.events(PeerConnected)
            bob.map("plan")["goal"] = "ship it"
            await ann.wait_for(bob.version(), timeout=20)
            await events.aclose()
        assert os.listdir(path.parent) == []


@asynchronous
async def test_a_socket_in_a_folder_that_others_may_enter_is_refused(folder):
    folder.chmod(0o755)
    with pytest.raises(UsageError, match=f"chmod 700 {folder}"):
        await listen(f"unix://{folder}/mesh.sock", hold)
    folder.chmod(0o700)
    (folder / "file").write_text("precious")
    with pytest.raises(UsageError, match="no socket"):
        await listen(f"unix://{folder}/file", hold)
    assert (folder / "file").read_text() == "precious"


async def hold(connection: Connection) -> None:
    while True:
        await connection.receive()


@asynchronous
async def test_what_a_killed_process_left_is_replaced_and_what_listens_is_not(folder):
    url = f"unix://{folder}/mesh.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(folder / "mesh.sock"))
    left.close()
    assert (folder / "mesh.sock").exists()

    listener = await listen(url, hold)
    with pytest.raises(TransportError, match="already"):
        await listen(url, hold)
    await (await dial(url)).close()
    # A later one's socket is not taken away by an earlier one's end.
    (folder / "mesh.sock").unlink()
    second = await listen(url, hold)
    await listener.close()
    await (await dial(url)).close()
    await second.close()


@asynchronous
async def test_of_those_who_start_at_once_one_listens(folder):
    url = f"unix://{folder}/mesh.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(folder / "mesh.sock"))
    left.close()

    found = await asyncio.gather(*(listen(url, hold) for _ in range(8)), return_exceptions=True)

    listeners = [each for each in found if not isinstance(each, BaseException)]
    assert len(listeners) == 1
    assert all("already" in str(each) for each in found if isinstance(each, BaseException))
    await (await dial(url)).close()
    await listeners[0].close()


@asynchronous
async def test_while_another_process_replaces_a_socket_one_waits(folder):
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    listening = asyncio.create_task(listen(f"unix://{folder}/mesh.sock", hold))
    for _ in range(100):
        await asyncio.sleep(0)
    assert not listening.done() and os.listdir(folder) == []

    os.close(held)
    await (await listening).close()


AS_NOBODY = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_UNIX) as one:
    one.connect(sys.argv[1])
    try:
        one.sendall(b"GET /mesh HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
        print(one.recv(100))
    except OSError:
        print(b"")
"""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="takes root to be two users")
@asynchronous
async def test_another_user_gets_nothing_even_if_the_modes_are_wrong(folder):
    path = folder / "mesh.sock"
    listener = await listen(f"unix://{path}", hold)
    folder.chmod(0o755)
    path.chmod(0o666)

    command = [sys.executable, "-c", AS_NOBODY, str(path)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = await asyncio.create_subprocess_exec(*command, **pipes)
    out, _ = await process.communicate()

    assert out == b"b''\n"
    await listener.close()


@asynchronous
async def test_the_host_and_origin_are_checked_on_a_socket_in_a_file_as_well(folder):
    url = f"unix://{folder}/mesh.sock"
    listener = await listen(url, hold)
    for headers, status in (
        (("Host: localhost",), 101),
        (("Host: evil.example",), 421),
        (("Host: localhost", "Host: localhost"), 421),
        (("Host: localhost", "Origin: null"), 403),
        (("Host: localhost", "Origin: a", "Origin: b"), 400),
        (("Host: localhost", "Sec-Fetch-Site: same-origin"), 403),
    ):
        with Raw(*await asyncio.open_unix_connection(str(folder / "mesh.sock"))) as raw:
            assert await raw.get("/mesh", *headers, *UPGRADE) == status
    await listener.close()


# Over TLS


@asynchronous
async def test_those_who_never_finish_tls_are_strangers_like_all(certificates, monkeypatch):
    (mine, shown), _ = certificates
    limits = Limits(spare_loopback=False, half_open=3, half_open_per_address=2)
    config = Config(limits=limits)
    monkeypatch.setattr(websocket, "TURNED_AWAY_MAX", 1)
    async with Replica(
        "ann", listen="wss://127.0.0.1:0", tls=shown, mesh=WORDS, config=config
    ) as ann:
        port = int(str(ann.address).rpartition(":")[2])
        half_open, listener = ann._door._half_open, ann._listener
        assert isinstance(listener, websocket.WebSocketListener)

        async def silent(host: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await asyncio.open_connection("127.0.0.1", port, local_addr=(host, 0))

        held = [await silent("127.0.0.1") for _ in range(2)]
        await until(lambda: half_open["127.0.0.1"] == 2)
        # The third waits to be told so; the fourth is told nothing.
        held += [await silent("127.0.0.1") for _ in range(2)]
        await until(lambda: ann.traffic.refused["half-open"] == 2)
        assert await asyncio.wait_for(held[-1][0].read(1), 20) == b""
        assert half_open["127.0.0.1"] == 2 and len(listener._securing) == 3
        held.append(await silent("127.0.0.2"))
        await until(lambda: half_open.total() == 3)

        url = f"{ann.address}#{fingerprint(str(mine))}"
        with pytest.raises(TransportError):
            await reach(url, door(WORDS), None)
        for _, writer in held:
            writer.close()
        await until(lambda: not half_open and not listener._securing)
        connection, _ = await reach(url, door(WORDS), None)
        await connection.close()


@asynchronous
async def test_who_takes_too_long_over_tls_is_hung_up_on(certificates, monkeypatch):
    _, shown = certificates[0]
    monkeypatch.setattr(websocket, "OPEN_TIMEOUT", 0.05)
    async with Replica("ann", listen="wss://127.0.0.1:0", tls=shown, mesh=WORDS) as ann:
        port = int(str(ann.address).rpartition(":")[2])
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(said)
            with suppress(ConnectionError):
                while await asyncio.wait_for(reader.read(100), 20):
                    # What is wrong, by TLS.
                    pass
            writer.close()
        assert isinstance(ann._listener, websocket.WebSocketListener)
        await until(lambda: not ann._listener._securing)


@asynchronous
async def test_a_listener_that_closes_waits_for_nobody_s_tls(certificates):
    _, shown = certificates[0]
    async with Replica("ann", listen="wss://127.0.0.1:0", tls=shown, mesh=WORDS) as ann:
        port = int(str(ann.address).rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert isinstance(ann._listener, websocket.WebSocketListener)
        await until(lambda: ann._listener._securing)
    with suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(1), 20) == b""
    writer.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, ssl.SSLContext]]:
    """Two self-made certificates, and what shows them."""
    found = []
    for name in ("one", "two"):
        certificate, key = make_certificate(tmp_path_factory.mktemp(name))
        shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        shown.load_cert_chain(certificate, key)
        found.append((certificate, shown))
    return found


@asynchronous
async def test_a_certificate_is_trusted_by_its_fingerprint_alone(certificates):
    (mine, shown), (other, _) = certificates
    async with Replica("ann", listen="wss://127.0.0.1:0", tls=shown, mesh=WORDS) as ann:
        pinned = f"{ann.address}#{fingerprint(str(mine))}"
        async with Replica("bob", peers=[pinned], mesh=WORDS) as bob:
            bob.map("plan")["goal"] = "ship it"
            await ann.wait_for(bob.version(), timeout=20)
            assert bob.unreachable() == {}

        for url, why in (
            (f"{ann.address}#{fingerprint(str(other))}", "another certificate"),
            (str(ann.address), "not trusted"),
        ):
            with pytest.raises(TransportError, match=why):
                await dial(url)


@pytest.mark.parametrize(
    "url",
    [
        "wss://a#sha256=12",
        "wss://a#md5=" + "0" * 64,
        "ws://127.0.0.1:1#sha256=" + "0" * 64,
        "wss://a#sha256=" + "0" * 63 + "g",
    ],
)
@asynchronous
async def test_a_fingerprint_that_is_none_is_refused(url):
    with pytest.raises(UsageError, match="sha256"):
        await dial(url)


def test_a_fingerprint_is_what_openssl_prints(certificates):
    (path, shown), _ = certificates
    command = ["openssl", "x509", "-in", str(path), "-noout", "-fingerprint", "-sha256"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    digits = told.strip().partition("=")[2]

    assert fingerprint(str(path)) == f"sha256={digits.replace(':', '').lower()}"
    assert shown_by(shown).hex() == digits.replace(":", "").lower()
    assert websocket.pin_of(f"wss://a#sha256={digits}") is not None


@asynccontextmanager
async def in_between(target: str, tls: ssl.SSLContext) -> AsyncIterator[int]:
    """Somebody who ends the TLS of others and passes on what is in it; yields the port."""
    host, port = target.removeprefix("wss://").split(":")
    trust = websocket.Pin.context()
    tasks = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        far = await asyncio.open_connection(host, int(port), ssl=trust)
        await asyncio.gather(pump(reader, far[1]), pump(far[0], writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        if tasks:
            await asyncio.wait(tasks, timeout=5)


@asynchronous
async def test_somebody_who_ends_the_tls_in_between_is_noticed_unless_that_is_wanted(certificates):
    (mine, shown), (theirs, other) = certificates
    for has_binding in (True, False):
        config = Config(tls_binding=has_binding)
        tls = {"listen": "wss://127.0.0.1:0", "tls": shown}
        async with (
            Replica("ann", mesh=WORDS, config=config, **tls) as ann,
            in_between(str(ann.address), other) as port,
        ):
            url = f"wss://127.0.0.1:{port}#{fingerprint(str(theirs))}"
            dialling = reach(url, door(WORDS, has_tls_binding=has_binding), None)
            if has_binding:
                with pytest.raises(NotAdmitted):
                    await dialling
            else:
                connection, _ = await dialling
                await connection.close()


@asynchronous
async def test_who_dials_tells_strangers_nothing_but_that_it_dials():
    """A listener that has not the secret: it hears a nonce and an id, and no name."""
    heard: list[bytes] = []

    async def stranger(connection: Connection) -> None:
        first = await connection.receive()
        heard.append(first)
        side = Listener(open_credentials(WORDS), bytes(32), 0, b"", bytes(32))
        await connection.send(side.answer(first))
        with suppress(TransportError):
            heard.append(await connection.receive())

    listener = await listen(LOCAL, stranger)
    with pytest.raises(NotAdmitted, match="not of this mesh"):
        await reach(listener.address, door(token("eve")), None)
    await listener.close()

    assert len(heard) == 1 and b"eve" not in heard[0]


@asynchronous
async def test_a_listener_that_says_nothing_is_given_up():
    async def silent(connection: Connection) -> None:
        await hold(connection)

    listener = await listen(LOCAL, silent)
    quick = Door(open_credentials(None), Limits(handshake_timeout=0.1))
    with pytest.raises(NotAdmitted, match="too long"):
        await reach(listener.address, quick, None)
    await listener.close()


@asynchronous
async def test_a_listener_cannot_fill_the_memory_of_who_dials():
    async def flood(connection: Connection) -> None:
        with suppress(TransportError):
            while True:
                await connection.send(bytes(2**20))

    listener = await listen(LOCAL, flood)
    before = resident()
    for _ in range(5):
        with pytest.raises((NotAdmitted, TransportError)):
            await reach(listener.address, door(), None)
    assert resident() - before < 16 * 2**20
    await listener.close()


@asynchronous
async def test_what_follows_the_handshake_at_once_is_not_too_large():
    """The listener's first frames may come right behind its last message."""
    async with Replica("ann", listen=LOCAL) as ann:
        for number in range(50):
            ann.map("plan")[str(number)] = os.urandom(20_000)
        await ann.durable()
        for _ in range(10):
            async with Replica("bob", peers=[str(ann.address)]) as bob:
                await bob.wait_for(ann.version(), timeout=20)


@asynchronous
async def test_a_websocket_client_that_speaks_frames_is_a_stranger():
    async with attacked(Limits()) as victim:
        async with websockets.connect(f"{victim.address}/mesh", proxy=None) as client:
            frame = wire.encode_frame(wire.Hello(1, 9, 7, 1, "mallory"))
            await client.send(wire.encode_message([frame]))
            with pytest.raises(websockets.ConnectionClosed):
                await client.recv()
            assert (client.close_code, client.close_reason) == (4401, "not admitted")
