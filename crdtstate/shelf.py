"""
One tier as the keeper of one agent's checkpoints: every answer is checked, every failure counted.

A tier may be slow, full, gone, or lie. So what is put is read back and compared, what is read is
compared with the hash it goes by, and nothing is waited for longer than a limit. A failing tier is
told of once (`TierFailed`), left alone for a while that doubles with every try, and told of again
when it has caught up (`TierRecovered`). What it holds besides is for `checkpoints` to decide.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from crdtstate.attestation import BELIEVED, Attestation
from crdtstate.errors import CorruptCheckpoint, TierError
from crdtstate.events import CheckpointDamaged, Event, TierFailed, TierRecovered
from crdtstate.manifest import (
    LEVEL,
    Damaged,
    Foreign,
    Manifest,
    Part,
    manifest_key,
    pack_part,
    part_key,
    prefix_of,
    unpack_part,
)
from crdtstate.tiers import Item, Tier, open_tier
from crdtstate.tiers.calls import closed

log = logging.getLogger("crdtstate")

T = TypeVar("T")

OFF_LOOP_BYTES = 32 * 1024
"""Above this size packing and hashing are a thread's; below, handing over costs more."""


class Shelf:
    """What one tier keeps of one agent's checkpoints.

    Args:
        tier: The tier, or its URL; then it is opened when it is first needed.
        agent: Whose checkpoints.
        limit: Seconds that one operation may take.
        retry: Seconds after which a failed tier is tried again, at first,
        retry_max: and at most.
        emit: Gets the events.
        attestation: Says whose a manifest is.
    """

    def __init__(
        self,
        tier: str | Tier,
        agent: str,
        *,
        limit: float,
        retry: float,
        retry_max: float,
        emit: Callable[[Event], None],
        attestation: Attestation = BELIEVED,
    ) -> None:
        self.url = tier if isinstance(tier, str) else tier.url
        self.is_primary = False
        # Whether it keeps old checkpoints for others, and how hard it compresses them.
        self.is_archive = False
        self.level = LEVEL
        # A file that is only made when something is kept, if it is one of these.
        self.made_late: Path | None = None
        # The checkpoints whose manifests it is known to have, and those found whole by reading
        # all of it, in this process.
        self.ids: set[str] = set()
        self.proven: set[str] = set()
        # Parts found whole, and when; keys found damaged, to be written again.
        self.seen: dict[str, float] = {}
        self.damaged: set[str] = set()
        # Manifests that cannot be read, and why; those of them that are as they were written.
        self.unreadable: dict[str, str] = {}
        self.foreign: set[str] = set()
        # Held while something is put that belongs together, and around each deletion.
        self.lock = asyncio.Lock()
        # How it works: why not, how often not in a row, and how often at all.
        self.failure: str | None = None
        self.failures = 0
        self._tries = 0
        # Set while there is something to do for it; while there is not, or it has to wait.
        self.woken = asyncio.Event()
        self.quiet = asyncio.Event()
        self.quiet.set()
        self._agent = agent
        self._url = self.url
        self._limit = limit
        self._retry = retry
        self._retry_max = retry_max
        self._emit = emit
        self._attestation = attestation
        self._tier = None if isinstance(tier, str) else tier
        self._opening = asyncio.Lock()
        # The one through which the tier is reached, if it is not this.
        self._door: Shelf | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Shelf {self.url} {len(self.ids)} checkpoints{' FAILING' * bool(self.failure)}>"

    def of(self, agent: str, emit: Callable[[Event], None]) -> Shelf:
        """The same tier as the keeper of the checkpoints of another *agent*, for reading. It is
        reached through this shelf, and so as long as this one is not closed."""
        limits = {"limit": self._limit, "retry": self._retry, "retry_max": self._retry_max}
        attestation = self._attestation.of_others()
        other = Shelf(self._url, agent, **limits, emit=emit, attestation=attestation)
        other.url, other.made_late, other._door = self.url, self.made_late, self
        return other

    # How it works

    def wake(self) -> None:
        """There is something to do for it."""
        self.woken.set()
        if self.failure is None:
            self.quiet.clear()

    def failed(self, exc: Exception) -> None:
        """It did not do what it should."""
        reason = exc.reason if isinstance(exc, TierError) else f"{type(exc).__name__}: {exc}"
        log.debug("%s: %s: %s", self._agent, self.url, reason)
        self.failures += 1
        self._tries += 1
        if self.failure is None:
            self._emit(TierFailed(self.url, reason, self.is_primary))
        self.failure = reason
        self.woken.set()

    def recovered(self) -> None:
        """It did all that it should."""
        self._tries = 0
        if self.failure is not None:
            self.failure = None
            self._emit(TierRecovered(self.url))

    @property
    def pause(self) -> float:
        """For how long to leave it alone."""
        doublings = min(self._tries - 1, 30)
        return min(self._retry_max, self._retry * 2.0**doublings)

    def note_damage(self, exc: CorruptCheckpoint) -> None:
        """Something in it is not what was written: it is written anew in time."""
        if exc.key not in self.damaged:
            self.damaged.add(exc.key)
            self._emit(CheckpointDamaged(self.url, exc.key, exc.reason))
        self.wake()

    # What it holds

    async def items(self) -> dict[str, Item]:
        """All it holds of this agent, by key.

        Raises:
            TierError: It cannot be asked.
        """
        if self.is_unmade:
            return {}
        found = await self._ask(lambda tier: tier.items(prefix_of(self._agent)))
        return {item.key: item for item in found}

    @property
    def is_unmade(self) -> bool:
        """Whether it is a file that there is no need to make yet."""
        return self._tier is None and self.made_late is not None and not self.made_late.exists()

    async def manifest(self, id: str) -> Manifest:
        """Read a manifest.

        Raises:
            CorruptCheckpoint: It is not there, not as it was written, or not this agent's.
            TierError: It cannot be asked.
        """
        key = manifest_key(self._agent, id)
        data = await self._get(key)
        try:
            found = Manifest.decode(data, id, self._agent)
            self._attestation.check(found)
            return found
        except Damaged as exc:
            if isinstance(exc, Foreign):
                self.foreign.add(id)
            raise CorruptCheckpoint(self.url, key, str(exc)) from exc

    async def part(self, part: Part) -> bytes:
        """Read the plain bytes of a part; raises what `manifest` does."""
        key = part_key(self._agent, part.name)
        stored = await self._get(key)
        try:
            if max(part.size, len(stored)) > OFF_LOOP_BYTES:
                plain = await asyncio.to_thread(unpack_part, part, stored)
            else:
                plain = unpack_part(part, stored)
        except Damaged as exc:
            self.seen.pop(part.name, None)
            raise CorruptCheckpoint(self.url, key, str(exc)) from exc
        self.seen[part.name] = asyncio.get_running_loop().time()
        return plain

    async def keep_plain(self, part: Part, plain: bytes) -> None:
        """Pack and keep a part; raises TierError unless it was found whole afterwards."""
        if part.size > OFF_LOOP_BYTES:
            stored = await asyncio.to_thread(pack_part, plain, self.level)
        else:
            stored = pack_part(plain, self.level)
        await self.keep_part(part, stored)

    async def keep_part(self, part: Part, stored: bytes) -> None:
        """Keep a part that is packed already."""
        await self._keep(part_key(self._agent, part.name), stored)
        self.seen[part.name] = asyncio.get_running_loop().time()

    async def keep_manifest(self, id: str, data: bytes) -> None:
        """Keep a manifest, after all of its parts."""
        await self._keep(manifest_key(self._agent, id), data)
        self.ids.add(id)
        self.unreadable.pop(id, None)

    async def forget(self, key: str) -> None:
        """Delete something."""
        await self._ask(lambda tier: tier.delete(key))
        self.damaged.discard(key)
        self.seen.pop(key.rpartition("/")[2], None)

    async def close(self) -> None:
        """Let go of the tier, whatever it says to that. Afterwards it fails. Idempotent."""
        self._is_closed = True
        tier, self._tier = self._tier, None
        if tier is not None:
            try:
                async with asyncio.timeout(self._limit):
                    await tier.close()
            except Exception as exc:
                log.warning("%s: %s does not close: %s", self._agent, self.url, exc)

    # Asking

    async def _get(self, key: str) -> bytes:
        data = None if self.is_unmade else await self._ask(lambda tier: tier.get(key))
        if data is None:
            raise CorruptCheckpoint(self.url, key, "it is not there")
        return data

    async def _keep(self, key: str, data: bytes) -> None:
        # Until it was read back, nobody knows what is there.
        self.damaged.add(key)
        await self._ask(lambda tier: tier.put(key, data))
        found = await self._ask(lambda tier: tier.get(key))
        if found != data:
            what = "nothing" if found is None else "other bytes"
            raise TierError(self.url, f"it took {key} and gives back {what}")
        self.damaged.discard(key)

    async def _ask(self, call: Callable[[Tier], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(self._limit):
                return await call(await self._open())
        except TierError:
            raise
        except TimeoutError:
            raise TierError(self.url, f"no answer within {self._limit:g} s") from None
        except Exception as exc:
            # Tiers can be anybody's: what they raise must not stop the others.
            raise TierError(self.url, f"{type(exc).__name__}: {exc}") from exc

    async def _open(self) -> Tier:
        if self._door is not None:
            return await self._door._open()
        if self._is_closed:
            raise closed(self.url)
        if self._tier is None:
            async with self._opening:
                if self._tier is None:
                    self._tier = await open_tier(self._url)
                    self.url = self._tier.url
        return self._tier
