"""
What keeps two promises of every tier: a call ends within its limit, and none blocks the loop.

A thread cannot be interrupted. Whoever waits for one that is late gets a `TierError`; what the
thread is doing it finishes, what still waited for its turn is not begun.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import ParamSpec, TypeVar

from crdtstate.errors import TierError
from crdtstate.tiers import Item, check_key, check_value

P = ParamSpec("P")
T = TypeVar("T")


@asynccontextmanager
async def within(seconds: float, url: str) -> AsyncIterator[None]:
    """Raise `TierError` if what is done in here takes longer."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        reason = f"no answer within {seconds:.3g} s; it may have done what was asked"
        raise TierError(url, reason) from None


def closed(url: str) -> TierError:
    """The error for a call after `close`."""
    return TierError(url, "it was closed here; open it again")


class Worker:
    """One thread, which does the blocking work of one tier: a call after the other."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=url)
        self._is_closed = False

    async def call(
        self, seconds: float, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Do *work* and return what it returns, or raise `TierError` after *seconds*."""
        if self._is_closed:
            raise closed(self._url)
        loop = asyncio.get_running_loop()
        async with within(seconds, self._url):
            return await loop.run_in_executor(self._pool, partial(work, *args, **kwargs))

    async def close(self, seconds: float, last: Callable[[], None]) -> None:
        """End the thread after what was asked of it and then *last*. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        ending = asyncio.wrap_future(self._pool.submit(last))
        self._pool.shutdown(wait=False)
        async with within(seconds, self._url):
            await asyncio.shield(ending)


class Blocking:
    """The methods of a tier whose calls block: a thread does them, under the same names.

    Args:
        url: For people.
        seconds: The limit of a call.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.url = url
        self._seconds = seconds
        self._worker = Worker(url)

    async def put(self, key: str, data: bytes) -> None:
        check_key(key)
        check_value(key, data)
        await self._worker.call(self._seconds, self._put, key, data)

    async def get(self, key: str) -> bytes | None:
        check_key(key)
        return await self._worker.call(self._seconds, self._get, key)

    async def delete(self, key: str) -> None:
        check_key(key)
        await self._worker.call(self._seconds, self._delete, key)

    async def items(self, prefix: str) -> list[Item]:
        return await self._worker.call(self._seconds, self._items, prefix)

    async def close(self) -> None:
        await self._worker.close(self._seconds, self._disconnect)

    # In the thread

    def _put(self, key: str, data: bytes) -> None:
        raise NotImplementedError

    def _get(self, key: str) -> bytes | None:
        raise NotImplementedError

    def _delete(self, key: str) -> None:
        raise NotImplementedError

    def _items(self, prefix: str) -> list[Item]:
        raise NotImplementedError

    def _disconnect(self) -> None:
        """Let go of what it takes to reach the tier; the last that the thread does."""
