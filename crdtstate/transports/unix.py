"""
Connections over a socket in the file system: between the processes of one user on one machine.

No port, so no web page and no other user can reach it. The folder belongs to who listens, and lets
nobody else in; the kernel says which user is at the other end (``SO_PEERCRED``), and both sides
look. The rest is as on a port: websockets, `websocket`.

The file stays behind when its process is killed. Who listens next replaces it, unless somebody
answers there; a lock on the folder keeps two who start at once from replacing each other's.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import stat
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from websockets.exceptions import WebSocketException

from crdtstate.errors import TransportError, UsageError
from crdtstate.transports import Accept, Gate, Http, Origin
from crdtstate.transports.websocket import (
    MESH_PATH,
    WebSocketConnection,
    WebSocketListener,
    connect_to,
    why_not,
)

PATH_BYTES_MAX = 100
"""A little less than what the address of such a socket holds anywhere."""

BACKLOG = 100

LOCK_TRIES = 100
LOCK_EVERY = 0.01
"""Seconds between two tries to lock the folder, which is held for a moment only."""

AUTHORITY = "localhost"
"""What the other side is called in HTTP."""


class UnixListener(WebSocketListener):
    """A socket in the file system; see `crdtstate.transports.Listener`."""

    def __init__(
        self, path: Path, accept: Accept, http: Http | None, gate: Gate | None, size: int | None
    ) -> None:
        super().__init__(accept, http, gate, size, _is_own)
        self._path = path
        self._node: tuple[int, int] | None = None  # what it has bound: device and inode

    async def bind(self) -> None:
        """Bind and listen; raises OSError, UsageError."""
        _check_folder(self._path.parent)
        async with _locked(self._path.parent):
            _clear(self._path)
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                listening.setblocking(False)
                listening.bind(str(self._path))
                os.chmod(self._path, 0o600)
                listening.listen(BACKLOG)
                found = os.lstat(self._path)
            except BaseException:
                listening.close()
                raise
        self._node = found.st_dev, found.st_ino
        self.address = f"unix://{self._path}"
        await self.listen(unix=True, sock=listening)

    async def close(self) -> None:
        """See `crdtstate.transports.Listener`."""
        await super().close()
        with suppress(OSError):
            found = os.lstat(self._path)
            if (found.st_dev, found.st_ino) == self._node:
                self._path.unlink()


async def dial(
    url: str, *, timeout: float, tls: ssl.SSLContext | None, greeting_max: int | None
) -> WebSocketConnection:
    """See `crdtstate.transports.dial`."""
    path = _path(url)
    try:
        websocket = await connect_to(
            f"ws://{AUTHORITY}{MESH_PATH}", timeout, greeting_max, unix=True, path=str(path)
        )
    except (FileNotFoundError, ConnectionRefusedError) as exc:
        raise TransportError(f"{url}: nobody listens there") from exc
    except (OSError, EOFError, WebSocketException) as exc:
        raise TransportError(f"{url}: {why_not(exc)}") from exc
    if not _is_own(websocket.transport):
        websocket.transport.abort()
        raise TransportError(f"{url}: another user listens there")
    return WebSocketConnection(websocket, url, Origin(None, asyncio.get_running_loop().time()))


async def listen(
    url: str,
    accept: Accept,
    *,
    http: Http | None,
    tls: ssl.SSLContext | None,
    gate: Gate | None,
    greeting_max: int | None,
) -> UnixListener:
    """See `crdtstate.transports.listen`."""
    listener = UnixListener(_path(url), accept, http, gate, greeting_max)
    try:
        await listener.bind()
    except OSError as exc:
        raise TransportError(f"{url}: {why_not(exc)}") from exc
    return listener


def check_url(url: str) -> None:
    """Raise UsageError if this names no socket."""
    _path(url)


def _path(url: str) -> Path:
    parts = urlsplit(url)
    path = Path(unquote(parts.path))
    if parts.netloc or parts.query or parts.fragment or not path.is_absolute() or path.name == "":
        raise UsageError(f"{url!r}: name a file, with three slashes: unix:///run/me/mesh.sock")
    if "\0" in str(path) or len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise UsageError(f"{url!r}: the path of a socket has at most {PATH_BYTES_MAX} bytes")
    if not hasattr(socket, "AF_UNIX"):
        raise UsageError(f"{url!r}: this system has no such sockets; use ws://127.0.0.1:PORT")
    return path


def _check_folder(folder: Path) -> None:
    """Make the folder if it is not there. Raises UsageError if others can get in, OSError."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = os.stat(folder)
    if found.st_uid != os.geteuid():
        raise UsageError(f"{folder}: it is another user's; a socket lies in a folder of one's own")
    if stat.S_IMODE(found.st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"{folder}: others can get in; do: chmod 700 {folder}")


@asynccontextmanager
async def _locked(folder: Path) -> AsyncIterator[None]:
    """Keep others from listening in a folder meanwhile. Raises OSError."""
    import fcntl

    held = os.open(folder, os.O_RDONLY)
    try:
        for tries in range(LOCK_TRIES):
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if tries == LOCK_TRIES - 1:
                    raise
                await asyncio.sleep(LOCK_EVERY)
        yield
    finally:
        os.close(held)


def _clear(path: Path) -> None:
    """Remove what a killed process left. Raises OSError if somebody answers there, UsageError if
    it is something else."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise UsageError(f"{path}: there is a file that is no socket; choose another name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            # Its backlog is full, so somebody listens.
            pass
    raise TransportError(f"unix://{path}: something listens there already")


def _is_own(transport: asyncio.BaseTransport) -> bool:
    """Whether the process at the other end is of the same user, as far as the system tells."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return False
    if not sys.platform.startswith("linux"):
        # The folder's mode has to do.
        return True
    try:
        told = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return False
    _, user, _ = struct.unpack("3i", told)
    return bool(user == os.geteuid())
