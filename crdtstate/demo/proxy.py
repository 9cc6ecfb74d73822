"""
A network that can be cut: a TCP proxy between one agent and the relay.

Neither side cooperates or is told. While it is cut, connections are gone both ways and new ones are
refused.
"""

from __future__ import annotations

import asyncio
import socket

CHUNK = 64 * 1024


class Proxy:
    """Forwards connections on a port of its own to another port of this machine.

    Args:
        port: The other port.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._socket = _bound(0)
        self.port: int = self._socket.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def mend(self) -> None:
        """Forward from now on."""
        self._server = await asyncio.start_server(self._serve, sock=self._socket)

    def cut(self) -> None:
        """Drop what is connected and refuse what comes."""
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        # The port stays ours meanwhile: bound, but not listening.
        self._socket = _bound(self.port)

    def close(self) -> None:
        """Stop for good. Idempotent."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._socket.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = {writer}
        self._writers |= writers
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            writers.add(back)
            self._writers.add(back)
            await asyncio.gather(_forward(reader, back), _forward(there, writer))
        except OSError:
            pass
        finally:
            for each in writers:
                each.transport.abort()
            self._writers -= writers


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()
    writer.close()


def _bound(port: int) -> socket.socket:
    # With the protocol named, asyncio sets TCP_NODELAY; without, each message waits 40 ms.
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(("127.0.0.1", port))
    return found
