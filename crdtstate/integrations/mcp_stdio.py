"""
An MCP server on standard input and output, on the event loop and within bounds.

The SDK's own transport reads and writes in threads, a hop each, and takes lines of any length. This
one uses pipes, so a call is answered sooner, and a client that does not read holds up nothing else.
While it serves, file descriptor 1 leads to stderr: what anything prints is not taken for protocol.

Needs ``crdtstate[mcp]``.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from crdtstate.errors import ProtocolError, UsageError

if TYPE_CHECKING:
    from mcp.server import Server
    from mcp.server.models import InitializationOptions

LINE_BYTES_MAX = 64 * 2**20
"""What one message may measure: far more than any tool takes."""


def check_extra() -> None:
    """Raise UsageError if the MCP SDK is not installed. Imports nothing."""
    if find_spec("mcp") is None or find_spec("mcp_types") is None:
        raise UsageError("an MCP server needs mcp 2 or later: pip install 'crdtstate[cli,mcp]'")


async def run(server: Server[Any], options: InitializationOptions) -> None:
    """Serve whoever is at the other end of standard input and output until it leaves.

    Raises:
        ProtocolError: It sent a message that is larger than any.
    """
    from mcp.server.stdio import stdio_server

    async with _standard_streams() as (lines, out):
        # It only iterates over the one, and writes and flushes the other.
        async with stdio_server(lines, out) as (incoming, outgoing):  # type: ignore[arg-type]
            await server.run(incoming, outgoing, options)


@asynccontextmanager
async def until_terminated() -> AsyncIterator[None]:
    """SIGTERM ends what is inside in order: it is cancelled."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


@asynccontextmanager
async def _standard_streams() -> AsyncIterator[tuple[_Lines, _Out]]:
    source, sink = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    transports: list[asyncio.BaseTransport] = []
    loop = asyncio.get_running_loop()
    try:
        reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
        protocol = asyncio.StreamReaderProtocol(reader)
        if _is_file(source):
            reader.feed_data(_whole(source))
            reader.feed_eof()
        else:
            pipe = os.fdopen(source, "rb", buffering=0, closefd=False)
            transport, _ = await loop.connect_read_pipe(lambda: protocol, pipe)
            transports.append(transport)
        writer = None
        if not _is_file(sink):
            pipe = os.fdopen(sink, "wb", buffering=0, closefd=False)
            sending, flow = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, pipe)
            transports.append(sending)
            writer = asyncio.StreamWriter(sending, flow, None, loop)
        yield _Lines(reader), _Out(sink, writer)
    finally:
        os.dup2(sink, 1)
        for each in transports:
            each.close()
        for number in (source, sink):
            with suppress(OSError):
                os.set_blocking(number, True)
            os.close(number)


def _whole(number: int) -> bytes:
    """What a file says; of one that is larger than any message the beginning."""
    with open(number, "rb", closefd=False) as file:
        return file.read(LINE_BYTES_MAX)


def _is_file(number: int) -> bool:
    """Whether a descriptor is a regular file, or a device that is none to wait for."""
    mode = os.fstat(number).st_mode
    return stat.S_ISREG(mode) or (stat.S_ISCHR(mode) and not os.isatty(number))


class _Lines:
    """What comes, line by line."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    def __aiter__(self) -> _Lines:
        return self

    async def __anext__(self) -> str:
        try:
            line = await self._reader.readline()
        except ValueError:
            raise ProtocolError(f"a message of more than {LINE_BYTES_MAX:,} bytes") from None
        if not line:
            raise StopAsyncIteration
        return line.decode("utf-8", "replace")


class _Out:
    """Where answers go."""

    def __init__(self, number: int, writer: asyncio.StreamWriter | None) -> None:
        self._number = number
        self._writer = writer

    async def write(self, text: str) -> None:
        data = text.encode()
        if self._writer is not None:
            self._writer.write(data)
            return
        while data:
            data = data[os.write(self._number, data) :]

    async def flush(self) -> None:
        if self._writer is not None:
            await self._writer.drain()
