"""
A tier in a Redis server: quick, shared by hosts, and lossy.

    redis://[[user]:password@]host[:port][/database]?prefix=crdtstate:    rediss:// for TLS

A value is a hash with the data and the server's time under ``<prefix><key>``, written by one HSET,
so it is there as a whole or not at all, and is evicted and expires as a whole. There is no index
that could disagree with what is there: `items` scans, and asks only for the sizes of the data. The
scan goes through the whole database, so give crdtstate one of its own if there is much else in it.
With TLS, certificates are trusted that the system trusts, or those in the file that
``SSL_CERT_FILE`` names. What Redis forgets, by eviction or a restart, it forgets.

Nothing is tried again here; whoever writes checkpoints does, later. Needs ``crdtstate[redis]``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from crdtstate.errors import TierError, UsageError
from crdtstate.tiers import (
    KEY,
    Item,
    check_extra,
    check_key,
    check_size,
    check_value,
    split_url,
    without_password,
)
from crdtstate.tiers.calls import closed, within

if TYPE_CHECKING:
    from redis.asyncio import Redis

CONNECT_SECONDS = 1.0

CALL_SECONDS = 2.0
"""The limit of a call, and of each step of a scan."""

BYTES_PER_SECOND = 2**22
"""Large values may take longer: as long as at this speed."""

ITEMS_SECONDS = 20.0
"""The limit of a scan as a whole."""

CONNECTIONS_MAX = 8
"""Further calls wait for one that ends, within their limit."""

SCAN_COUNT = 1000
"""Keys that the server looks at in one step: about a millisecond of its only thread."""

PREFIX = "crdtstate:"
DATA, TIME = "d", "t"


class RedisTier:
    """See `crdtstate.tiers.Tier`."""

    def __init__(self, url: str, client: Redis, prefix: str) -> None:
        self.url = url
        # Replies are bytes; the types of redis cannot say so.
        self._client: Any = client
        self._prefix = prefix
        self._slots = asyncio.Semaphore(CONNECTIONS_MAX)
        self._is_closed = False

    async def put(self, key: str, data: bytes) -> None:
        check_key(key)
        check_value(key, data)
        async with self._calling(CALL_SECONDS + len(data) / BYTES_PER_SECOND):
            # Not in a pipeline: redis puts a command that fails there into the error's text, and
            # takes seconds to shorten a large one.
            seconds, micros = await self._client.time()
            stamped = {DATA: data, TIME: f"{seconds}.{micros:06}"}
            await self._client.hset(self._prefix + key, mapping=stamped)

    async def get(self, key: str) -> bytes | None:
        check_key(key)
        name = self._prefix + key
        async with self._calling(CALL_SECONDS):
            size = cast(int, await self._client.hstrlen(name, DATA))
        check_size(self.url, key, size)
        async with self._calling(CALL_SECONDS + size / BYTES_PER_SECOND):
            return cast("bytes | None", await self._client.hget(name, DATA))

    async def delete(self, key: str) -> None:
        check_key(key)
        async with self._calling(CALL_SECONDS):
            await self._client.unlink(self._prefix + key)

    async def items(self, prefix: str) -> list[Item]:
        found: dict[str, Item] = {}  # A scan may come by something twice.
        cursor: int | None = None
        async with within(ITEMS_SECONDS, self.url):
            while cursor != 0:
                async with self._calling(CALL_SECONDS):
                    cursor, names = await self._client.scan(
                        cursor or 0, match=f"{self._prefix}*", count=SCAN_COUNT, _type="hash"
                    )
                    for item in await self._look(names, prefix):
                        found[item.key] = item
        return sorted(found.values(), key=lambda item: item.key)

    async def close(self) -> None:
        self._is_closed = True
        async with within(CALL_SECONDS, self.url):
            await self._client.aclose()

    async def _look(self, names: list[bytes], prefix: str) -> list[Item]:
        """What is under *names*, as far as it is ours, still there, and begins with *prefix*."""
        own = len(self._prefix)
        keys = [name.decode("ascii", "replace")[own:] for name in names]
        keys = [key for key in keys if key.startswith(prefix) and KEY.fullmatch(key)]
        if not keys:
            return []
        questions = self._client.pipeline(transaction=False)
        for key in keys:
            questions.hstrlen(self._prefix + key, DATA)
            questions.hget(self._prefix + key, TIME)
        answers = await questions.execute()
        rows = zip(keys, answers[::2], answers[1::2], strict=True)
        return [Item(key, size, float(put_at)) for key, size, put_at in rows if _is_time(put_at)]

    @asynccontextmanager
    async def _calling(self, seconds: float) -> AsyncIterator[None]:
        """Make a call, within a limit and one of the connections; translate what goes wrong."""
        from redis.exceptions import RedisError

        if self._is_closed:
            raise closed(self.url)
        try:
            async with within(seconds, self.url), self._slots:
                yield
        except (RedisError, OSError) as exc:
            raise TierError(self.url, _reason(exc)) from exc


def _is_time(column: bytes | None) -> bool:
    return column is not None and re.fullmatch(rb"\d{1,12}\.\d{6}", column) is not None


def _reason(exc: Exception) -> str:
    from redis import exceptions

    match exc:
        case exceptions.OutOfMemoryError():
            return "it is full; keep fewer checkpoints in it, or raise its maxmemory"
        case exceptions.AuthenticationError() | exceptions.NoPermissionError():
            return f"it refuses the user or the password ({exc}); check those in the URL"
        case exceptions.ReadOnlyError():
            return "it is a read-only replica; name its primary"
        case exceptions.ConnectionError() | exceptions.TimeoutError() | OSError():
            return f"it cannot be reached ({exc}); check that it runs"
        case _:
            return f"{type(exc).__name__}: {exc}"[:300]


def _parse(url: str) -> tuple[str, str]:
    """The server's URL and the prefix."""
    parts, options = split_url(url, "prefix")
    prefix = options.get("prefix", PREFIX)
    shown = without_password(url)
    if not parts.hostname or not re.fullmatch(r"(/\d{0,9})?", parts.path):
        raise UsageError(f"{shown}: write redis://:password@host:6379/0")
    if not re.fullmatch(r"[A-Za-z0-9_.~%:{}/-]{0,100}", prefix):
        raise UsageError(f"{shown}: a prefix has letters, digits and _.~%:{{}}/-, 100 at most")
    return parts._replace(query="").geturl(), prefix


def check_url(url: str) -> None:
    """See `crdtstate.tiers.check_url`."""
    _parse(url)
    check_extra("redis", "redis.asyncio")


async def open_tier(url: str) -> RedisTier:
    """See `crdtstate.tiers.open_tier`."""
    check_url(url)
    from redis.asyncio import ConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    server, prefix = _parse(url)
    pool = ConnectionPool.from_url(
        server,
        max_connections=CONNECTIONS_MAX,
        socket_connect_timeout=CONNECT_SECONDS,
        socket_timeout=None,  # `within` limits the whole call.
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )
    return RedisTier(without_password(url), Redis.from_pool(pool), prefix)
