"""
A tier in this process: gone when it ends, and the quickest to have something back.

Each tier is its own; the same URL twice is two.
"""

from __future__ import annotations

import time

from crdtstate.errors import UsageError
from crdtstate.tiers import Item, check_key, check_value
from crdtstate.tiers.calls import closed


class MemoryTier:
    """See `crdtstate.tiers.Tier`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._values: dict[str, tuple[bytes, float]] = {}
        self._is_closed = False

    async def put(self, key: str, data: bytes) -> None:
        check_key(key)
        check_value(key, data)
        self._check_open()
        self._values[key] = bytes(data), time.time()

    async def get(self, key: str) -> bytes | None:
        check_key(key)
        self._check_open()
        found = self._values.get(key)
        return None if found is None else found[0]

    async def delete(self, key: str) -> None:
        check_key(key)
        self._check_open()
        self._values.pop(key, None)

    async def items(self, prefix: str) -> list[Item]:
        self._check_open()
        found = self._values.items()
        return sorted(
            (Item(key, len(data), at) for key, (data, at) in found if key.startswith(prefix)),
            key=lambda item: item.key,
        )

    async def close(self) -> None:
        self._is_closed = True

    def _check_open(self) -> None:
        if self._is_closed:
            raise closed(self.url)


def check_url(url: str) -> None:
    """See `crdtstate.tiers.check_url`."""
    if url != "memory://":
        raise UsageError(f"{url!r}: memory:// takes nothing more")


async def open_tier(url: str) -> MemoryTier:
    """See `crdtstate.tiers.open_tier`."""
    check_url(url)
    return MemoryTier(url)
