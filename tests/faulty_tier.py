"""A tier that is gone, slow, full or lies, when the test says so."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Literal

from crdtstate.errors import TierError
from crdtstate.tiers import Item
from crdtstate.tiers.memory import MemoryTier

Mood = Literal["well", "gone", "silent", "full", "forgetful", "altering", "surprising"]


class FaultyTier:
    """A tier in memory; see `crdtstate.tiers.Tier`. Its *mood* is how it fails, if it does."""

    def __init__(self, name: str = "one") -> None:
        self.url = f"faulty://{name}"
        self.mood: Mood = "well"
        # Every key that was put, in order, and what else was asked.
        self.puts: list[str] = []
        self.gets: list[str] = []
        self.deletes: list[str] = []
        self.age = 0.0
        # If set, puts wait for it; `is_putting` is set while one does.
        self.gate: asyncio.Event | None = None
        # The same of deletions.
        self.delete_gate: asyncio.Event | None = None
        self.is_deleting = asyncio.Event()
        # Parts that were deleted while a manifest named them.
        self.torn: list[str] = []
        self.is_putting = asyncio.Event()
        self._inner = MemoryTier("memory://")

    @property
    def values(self) -> dict[str, bytes]:
        return {key: data for key, (data, _) in self._inner._values.items()}

    def write(self, key: str, data: bytes) -> None:
        """Put something behind everybody's back."""
        self._inner._values[key] = data, 0.0

    def remove(self, key: str) -> None:
        del self._inner._values[key]

    def flip(self, key: str, bit: int) -> None:
        """Alter one bit of what is kept."""
        data = bytearray(self.values[key])
        data[bit // 8] ^= 1 << bit % 8
        self.write(key, bytes(data))

    async def put(self, key: str, data: bytes) -> None:
        await self._be_moody()
        self.puts.append(key)
        if self.gate is not None:
            self.is_putting.set()
            await self.gate.wait()
        if self.mood == "full":
            raise TierError(self.url, "no room")
        if self.mood == "altering":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if self.mood != "forgetful":
            await self._inner.put(key, data)

    async def get(self, key: str) -> bytes | None:
        await self._be_moody()
        self.gets.append(key)
        return await self._inner.get(key)

    async def delete(self, key: str) -> None:
        await self._be_moody()
        self.deletes.append(key)
        if self.delete_gate is not None:
            self.is_deleting.set()
            await self.delete_gate.wait()
        name = key.rpartition("/")[2]
        if len(name) == 64:
            raw = bytes.fromhex(name)
            self.torn += [key for at, data in self.values.items() if "/mani" in at and raw in data]
        await self._inner.delete(key)

    async def items(self, prefix: str) -> list[Item]:
        await self._be_moody()
        return [replace(i, put_at=i.put_at + self.age) for i in await self._inner.items(prefix)]

    async def close(self) -> None:
        pass

    async def _be_moody(self) -> None:
        if self.mood == "gone":
            raise TierError(self.url, "nobody there")
        if self.mood == "surprising":
            raise ZeroDivisionError("a mistake in somebody's tier")
        if self.mood == "silent":
            await asyncio.Event().wait()
