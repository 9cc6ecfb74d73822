"""
What it costs that not everybody may join: opening a connection, and holding it.

Both ends of a connection in one process, by its CPU time, as the machine has better things to do
than to wait: a websocket is opened, both sides prove who they are, and it is closed. The floor is
the same without the proof, by the bare library (over TLS with TLS). Memory is that of a process
which many have connected to, for each of them.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

from websockets.asyncio.client import connect
from websockets.asyncio.client import unix_connect as connect_to_file
from websockets.asyncio.server import ServerConnection, serve
from websockets.asyncio.server import unix_serve as serve_file

from benchmarks.children import Child, told
from benchmarks.measure import Effort, Result, at_most, by_turns, cpu, ratio_at_most, resident
from crdtstate.admission import Door
from crdtstate.certificates import JoinToken, issue, parse_grant
from crdtstate.connections import reach
from crdtstate.credentials import Credentials, open_credentials
from crdtstate.handshake import MESSAGE_BYTES_MAX, Dialler, Listener
from crdtstate.limits import Limits
from crdtstate.signing import public_of
from crdtstate.transports import Connection, listen
from crdtstate.transports.websocket import Pin

WORDS = "words that all of us know"
HELD = 300
BARE = {"compression": None, "ping_interval": None}

Opening = Callable[[], Awaitable[None]]


def security(effort: Effort) -> Sequence[Result]:
    """Milliseconds of CPU for a connection that is opened, and bytes for one that is held."""
    kinds = {"words": open_credentials(WORDS), "certificates": open_credentials(_token())}
    count = effort.count(400)
    return [
        *(_alone(name, known, effort) for name, known in kinds.items()),
        *asyncio.run(_opened(kinds, count, effort)),
        _held(effort.count(HELD, least=10)),
    ]


def _token() -> str:
    root, seed, now = os.urandom(32), os.urandom(32), time.time_ns() // 1_000_000
    certificate = issue(
        root,
        agent="agent",
        key=public_of(seed),
        grants=[parse_grant("*:rw")],
        not_before_ms=now,
        not_after_ms=now + 3_600_000,
        serial=os.urandom(16),
    )
    return JoinToken(public_of(root), (os.urandom(32),), (), seed, certificate).encode()


def _alone(name: str, known: Credentials, effort: Effort) -> Result:
    """The four messages of a handshake, both sides, without a connection."""
    count = effort.count(2000)
    now = time.time_ns() // 1_000_000

    def work() -> None:
        for _ in range(count):
            dials = Dialler(known, os.urandom(32), now, b"")
            listens = Listener(known, os.urandom(32), now, b"", os.urandom(32))
            second = listens.answer(dials.greet())
            fourth, _ = listens.admit(dials.prove(second))
            dials.finish(fourth)

    (taken,) = by_turns(effort.rounds, lambda: cpu(work))
    return Result(f"handshake alone, {name}", "us", taken / count * 1e6, note="both sides' CPU")


# Opening


async def _opened(kinds: dict[str, Credentials], count: int, effort: Effort) -> list[Result]:
    results = []
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crdt-")))
        shown = _certificate(folder)
        bare = await stack.enter_async_context(_bare(None))
        in_a_file = await stack.enter_async_context(_bare_file(folder))
        for name, known in kinds.items():
            ours = await stack.enter_async_context(_ours(known, "ws://127.0.0.1:0", None))
            times = await _turns(effort.rounds, count, ours, bare)
            results.append(_line(f"connect, {name}", times, "a bare websocket", 3))
        known = kinds["words"]
        ours = await stack.enter_async_context(_ours(known, f"unix://{folder}/mesh.sock", None))
        times = await _turns(effort.rounds, count, ours, in_a_file)
        results.append(_line("connect, words, unix://", times, "the same over such a socket", 3))
        if shown is not None:
            secure = await stack.enter_async_context(_bare(shown))
            ours = await stack.enter_async_context(_ours(known, "wss://127.0.0.1:0", shown))
            times = await _turns(effort.rounds, max(5, count // 4), ours, secure)
            results.append(_line("connect, words, wss://", times, "a bare one over TLS", 2))
    return results


def _line(name: str, times: tuple[float, float], note: str, most: float) -> Result:
    ours, floor = (taken * 1000 for taken in times)
    return Result(name, "ms", ours, floor, ratio_at_most(most), f"both ends' CPU; {note}")


async def _turns(rounds: int, count: int, ours: Opening, floor: Opening) -> tuple[float, float]:
    """CPU seconds of one opening, ours and the floor's: the medians over rounds, by turns."""
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for opening, times in zip((ours, floor), taken, strict=True):
            before = time.process_time()
            for _ in range(count if number else 5):
                await opening()
            if number:
                times.append((time.process_time() - before) / count)
    one, two = (sorted(times)[len(times) // 2] for times in taken)
    return one, two


@asynccontextmanager
async def _ours(known: Credentials, url: str, tls: ssl.SSLContext | None) -> AsyncIterator[Opening]:
    door = Door(known, Limits())

    async def accept(connection: Connection) -> None:
        await door.admit(connection)
        await connection.receive()

    how = {"gate": door, "greeting_max": MESSAGE_BYTES_MAX}
    listener = await listen(url, accept, tls=tls, **how)  # type: ignore[arg-type]
    trust = None if tls is None else Pin.context()

    async def opening() -> None:
        connection, _ = await reach(listener.address, door, trust)
        await connection.close()

    yield opening
    await listener.close()


@asynccontextmanager
async def _bare(tls: ssl.SSLContext | None) -> AsyncIterator[Opening]:
    async with serve(_wait, "127.0.0.1", 0, ssl=tls, **BARE) as server:  # type: ignore[arg-type]
        port = server.sockets[0].getsockname()[1]
        url = f"ws{'s' if tls else ''}://127.0.0.1:{port}"
        trust = None if tls is None else Pin.context()

        async def opening() -> None:
            async with connect(url, proxy=None, ssl=trust, **BARE):  # type: ignore[arg-type]
                pass

        yield opening


@asynccontextmanager
async def _bare_file(folder: Path) -> AsyncIterator[Opening]:
    path = str(folder / "bare.sock")
    async with serve_file(_wait, path, **BARE):  # type: ignore[arg-type]

        async def opening() -> None:
            async with connect_to_file(path, "ws://localhost/", **BARE):  # type: ignore[arg-type]
                pass

        yield opening


async def _wait(websocket: ServerConnection) -> None:
    async for _ in websocket:
        pass


def _certificate(folder: Path) -> ssl.SSLContext | None:
    """A self-made one, if this machine has what makes it."""
    openssl = shutil.which("openssl")
    if openssl is None:
        return None
    certificate, key = folder / "one.crt", folder / "one.key"
    request = ["req", "-x509", "-newkey", "ed25519", "-nodes", "-days", "2", "-subj", "/CN=one"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, *request, *files], check=True, capture_output=True)  # noqa: S603
    shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    shown.load_cert_chain(certificate, key)
    return shown


# Holding


def _held(count: int) -> Result:
    ours, bare = (_memory(name, count) for name in ("ours", "bare"))
    note = f"of {count}, at the listener; a bare websocket that is read from"
    return Result("memory of a connection", "KiB", ours, bare, at_most(100), note)


def _memory(name: str, count: int) -> float:
    """What each of *count* connections takes of the process that they were made to, in KiB."""
    with Child(_listen_for, name) as child:
        address = child.receive()
        grown: float = asyncio.run(_hold(child, name, address, count))
    return grown / count / 1024


async def _hold(child: Child, name: str, address: str, count: int) -> float:
    door = Door(open_credentials(WORDS), Limits())
    async with AsyncExitStack() as stack:
        sizes = []
        # The first few pay for what all need.
        for number in (10, count):
            for _ in range(number):
                if name == "ours":
                    connection, _ = await reach(address, door, None)
                    stack.push_async_callback(connection.close)
                else:
                    made = connect(address, proxy=None, **BARE)  # type: ignore[arg-type]
                    await stack.enter_async_context(made)
            child.send("how much")
            sizes.append(child.receive())
        child.send("done")
    return float(sizes[1] - sizes[0])


def _listen_for(pipe: Pipe, name: str) -> None:
    asyncio.run(_serve(pipe, name))


async def _serve(pipe: Pipe, name: str) -> None:
    if name == "bare":
        async with serve(_wait, "127.0.0.1", 0, **BARE) as server:  # type: ignore[arg-type]
            pipe.send(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            await _tell(pipe)
        return
    door = Door(open_credentials(WORDS), Limits())

    async def accept(connection: Connection) -> None:
        await door.admit(connection)
        while True:
            await connection.receive()

    listener = await listen("ws://127.0.0.1:0", accept, gate=door, greeting_max=MESSAGE_BYTES_MAX)
    pipe.send(listener.address)
    await _tell(pipe)
    await listener.close()


async def _tell(pipe: Pipe) -> None:
    while await told(pipe) != "done":
        pipe.send(resident())
