"""
Reaching a peer: a replica in memory that has what the peer has, or a relay's pages.

A peer of a mesh wants proof of it. In a mesh of members a command is one of them, under the name in
its join token; elsewhere it is called what it says.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import ssl
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import typer

from crdtstate.admission import is_private
from crdtstate.cli.printing import note
from crdtstate.config import Config
from crdtstate.credentials import open_credentials, open_host_credentials
from crdtstate.errors import TransportError, UsageError, WaitTimeout
from crdtstate.events import ValidatorMissing
from crdtstate.relay.settings import is_url
from crdtstate.relay.tokens import read_token, token_of
from crdtstate.replica import Replica
from crdtstate.transports.websocket import Pin, pin_of

T = TypeVar("T")

PAGE_BYTES_MAX = 64 * 2**20


def run(work: Coroutine[Any, Any, T]) -> T:
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except asyncio.CancelledError:
        # By SIGTERM.
        raise typer.Exit(143) from None


def check_url(url: str) -> str:
    if is_url(url):
        return url
    raise typer.BadParameter(f"{url!r} is not a URL like ws://127.0.0.1:8765")


@asynccontextmanager
async def dialled(
    url: str, timeout: float, mesh: Path | None, agent: str = "cli", config: Config | None = None
) -> AsyncIterator[Replica]:
    """A replica in memory that has what the peer has."""
    name = name_in(mesh, agent)
    opened = Replica(name, peers=[check_url(url)], mesh=mesh, config=config)
    opened.on(ValidatorMissing, _tell_missing)
    async with opened as replica:
        await sync(replica, url, timeout)
        yield replica


def _tell_missing(event: ValidatorMissing) -> None:
    note(
        f"{event.document!r} uses the validator {event.validator!r}, which is unknown here: "
        "changes are left out; name what registers it: --module NAME"
    )


def name_in(mesh: Path | None, agent: str) -> str:
    """As whom a command takes part: as a member, who its join token says. Raises StoreError."""
    found = open_credentials(mesh).certificate
    return agent if found is None else found.agent


async def sync(replica: Replica, url: str, timeout: float) -> None:
    try:
        await replica.synced(timeout)
    except WaitTimeout:
        why = replica.unreachable().get(url)
        if why is None:
            found = "not in sync" if replica.peers() else "no answer"
            why = f"{found} after {timeout:g} s; give it a longer --timeout"
        raise TransportError(f"{url}: {why}") from None


def find_token(url: str, mesh: Path | None, token_file: Path | None) -> str | None:
    """The token of a relay's pages; None if it does not follow from what is given.

    Raises:
        StoreError: A file cannot be read.
        UsageError: Beyond this machine a mesh is needed.
    """
    if token_file is not None:
        return read_token(token_file)
    found = open_credentials(mesh)
    if found.kind == "member":
        return None
    if found.kind == "none":
        if not is_private(url):
            raise UsageError(f"{url}: say of which mesh: --mesh FILE, or --token-file FILE")
        found = open_host_credentials()
    return token_of(found)


def fetch(url: str, page: str, timeout: float, token: str | None) -> dict[str, Any] | None:
    """Get a page of a relay; None if the peer has no such pages, or does not show them."""
    hidden = (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.UNAUTHORIZED)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with closing(_connection(check_url(url), timeout)) as connection:
        try:
            connection.request("GET", page, headers=headers)
            answer = connection.getresponse()
            if answer.status in hidden:
                return None
            found = json.loads(answer.read(PAGE_BYTES_MAX))
        except (ConnectionRefusedError, FileNotFoundError):
            why = "connection refused: is a relay listening there?"
        except TimeoutError:
            why = f"no answer after {timeout:g} s"
        except OSError as exc:
            why = exc.strerror or str(exc)
        except (http.client.HTTPException, ValueError):
            why = "it does not answer as a relay"
        else:
            if isinstance(found, dict):
                return found
            why = "it does not answer as a relay"
    raise TransportError(f"{url}: {why}")


def _connection(url: str, timeout: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return _Unix(unquote(parts.path), timeout)
    if parts.scheme == "wss":
        return _Pinned(parts.hostname or "", parts.port, timeout, pin_of(url))
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)


class _Unix(http.client.HTTPConnection):
    """HTTP over a socket in the file system."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _Pinned(http.client.HTTPSConnection):
    """HTTP over TLS, with the certificate that a URL names, if it does."""

    def __init__(self, host: str, port: int | None, timeout: float, pin: Pin | None) -> None:
        trust = ssl.create_default_context() if pin is None else pin.context()
        super().__init__(host, port, timeout=timeout, context=trust)
        self._pin = pin

    def connect(self) -> None:
        super().connect()
        assert isinstance(self.sock, ssl.SSLSocket)
        if self._pin is not None and not self._pin.fits(self.sock.getpeercert(binary_form=True)):
            raise ConnectionError("it shows another certificate than that one")
