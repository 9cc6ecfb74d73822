"""
Reaching a peer: a replica in memory that has what the peer has, or a relay's pages.
"""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, closing
from typing import Any, TypeVar
from urllib.parse import urlsplit

import typer

from crdtstate.errors import TransportError, WaitTimeout
from crdtstate.relay.settings import is_url
from crdtstate.replica import Replica

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
async def dialled(url: str, timeout: float, agent: str = "cli") -> AsyncIterator[Replica]:
    """A replica in memory that has what the peer has."""
    async with Replica(agent, peers=[check_url(url)]) as replica:
        await sync(replica, url, timeout)
        yield replica


async def sync(replica: Replica, url: str, timeout: float) -> None:
    try:
        await replica.synced(timeout)
    except WaitTimeout:
        why = replica.unreachable().get(url)
        if why is None:
            found = "not in sync" if replica.peers() else "no answer"
            why = f"{found} after {timeout:g} s; give it a longer --timeout"
        raise TransportError(f"{url}: {why}") from None


def fetch(url: str, page: str, timeout: float) -> dict[str, Any] | None:
    """Get a page of a relay; None if the peer has no such pages."""
    parts = urlsplit(check_url(url))
    secure = parts.scheme == "wss"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    with closing(kind(parts.hostname or "", parts.port, timeout=timeout)) as connection:
        try:
            connection.request("GET", page)
            answer = connection.getresponse()
            if answer.status == http.HTTPStatus.NOT_FOUND:
                return None
            found = json.loads(answer.read(PAGE_BYTES_MAX))
        except ConnectionRefusedError:
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
