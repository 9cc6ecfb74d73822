"""
Which checkpoints an agent has, in which tiers, and how to have one back.

What is known comes from the tiers' own listings and manifests, and is never believed further than
it was read: a part has the hash by which it was asked for, or the next tier is asked, nearest
first. A checkpoint that no tier has whole is *lost*, and no longer listed; what is wrong is told by
events. This only reads: `checkpoints` makes them, and `tending` looks after the tiers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from crdtstate.attestation import BELIEVED, Attestation
from crdtstate.clock import Cut, Stamp
from crdtstate.errors import (
    CorruptCheckpoint,
    StoreError,
    TierError,
    UnknownCheckpoint,
    UsageError,
)
from crdtstate.glance import TierHealth
from crdtstate.manifest import (
    Damaged,
    Entry,
    LoadedDocument,
    Manifest,
    Part,
    decode_changes,
    is_id,
    part_key,
    read_keys,
)
from crdtstate.retention import Held, Retention, Verdict, judge
from crdtstate.shelf import Shelf
from crdtstate.tiers import Item

log = logging.getLogger("crdtstate")

T = TypeVar("T")

AT_ONCE = 8
"""Parts that are read or written at the same time."""

DROPPED_MAX = 10_000
"""Checkpoints that are remembered as let go while a tier may still have them. One beyond that is
found again, and let go again."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All documents of a replica at one moment.

    Attributes:
        id: Its name. Ids sort by time.
        label: What it was called, if anything.
        stamp: When.
        version: What is in it: the version of every document.
        size: The bytes it takes in a tier, those shared with other checkpoints included.
        tiers: Which tiers have it.
        is_proven: Whether it is proven to be whose it says it is, where the mesh asks for that, and
            that one may still make it. If not, nothing of it is used by itself.
    """

    id: str
    label: str
    stamp: Stamp
    version: Cut
    size: int
    tiers: tuple[str, ...]
    is_proven: bool = True


@dataclass(frozen=True, slots=True)
class Verification:
    """What reading a whole checkpoint found.

    Attributes:
        intact: The tiers that have all of it as it was written.
        failed: The others that were asked, each with what is wrong.
    """

    id: str
    intact: tuple[str, ...]
    failed: dict[str, str]


class Catalogue:
    """The checkpoints of one agent.

    Args:
        agent: Whose.
        shelves: Its tiers, nearest first.
        retention: Which checkpoints are kept.
        attestation: Says which are believed.
    """

    def __init__(
        self,
        agent: str,
        shelves: Sequence[Shelf],
        retention: Retention,
        attestation: Attestation = BELIEVED,
    ) -> None:
        assert shelves, "checkpoints are kept somewhere"
        self.attestation = attestation
        self.agent = agent
        self.shelves = shelves
        self.retention = retention
        # All that are kept, by id; those that can be loaded for sure; those that nobody has whole.
        self.manifests: dict[str, Manifest] = {}
        self.verified: set[str] = set()
        self.lost: dict[str, str] = {}
        # Those that were let go, until they are gone everywhere.
        self.dropped: dict[str, Manifest] = {}
        # Parts that belong to a checkpoint that is being made.
        self.writing: set[str] = set()

    # Looking

    def saved(self) -> list[Checkpoint]:
        """All that can be loaded as far as is known, oldest first."""
        return [self.describe(id) for id in sorted(self.manifests) if self.holders(id)]

    def believed(self) -> list[str]:
        """The ids of those that may be used without being asked for, oldest first."""
        believes = self.attestation.believes
        return sorted(id for id, manifest in self.manifests.items() if believes(manifest))

    def known(self) -> list[str]:
        """The ids of those that are proven to be this agent's, oldest first, whatever may be used
        of them."""
        is_known = self.attestation.is_known
        return sorted(id for id, manifest in self.manifests.items() if is_known(manifest))

    def find(self, id: str) -> Manifest:
        """The manifest of a checkpoint. Raises UnknownCheckpoint."""
        found = self.manifests.get(id)
        if found is None:
            raise UnknownCheckpoint(id)
        return found

    def glance(self) -> tuple[int, float | None, dict[str, TierHealth]]:
        """How many there are, when the newest was made, and how the tiers do; see `Glance`."""
        ids = [id for id in self.believed() if self.holders(id)]
        newest_at = self.manifests[max(ids)].created_ms / 1000 if ids else None
        tiers = {
            shelf.url: TierHealth(shelf.failure, shelf.failures, len(shelf.ids))
            for shelf in self.shelves
        }
        return len(ids), newest_at, tiers

    def failures(self) -> dict[str, str]:
        """The tiers that cannot be asked, by URL, each with the reason."""
        return {shelf.url: shelf.failure for shelf in self.shelves if shelf.failure is not None}

    def why_kept(self, id: str) -> str:
        """Why retention keeps a checkpoint, or what it says against it."""
        self.find(id)
        verdict = self.verdict()
        return verdict.kept.get(id) or f"not any longer: {verdict.dropped[id]}"

    def describe(self, id: str) -> Checkpoint:
        """A checkpoint for users. What is left out of it is not in its version."""
        manifest = self.manifests[id]
        tiers = tuple(shelf.url for shelf in self.holders(id))
        stamp, version = Stamp(manifest.stamp), manifest.version
        is_proven = self.attestation.believes(manifest)
        if is_proven and (left_out := self.attestation.left_out(manifest)):
            version = Cut({name: v for name, v in version.items() if name not in left_out})
        return Checkpoint(id, manifest.label, stamp, version, manifest.stored, tiers, is_proven)

    def holders(self, id: str) -> list[Shelf]:
        return [] if id in self.lost else [shelf for shelf in self.shelves if id in shelf.ids]

    # Reading

    async def load(
        self, id: str, dead: dict[Shelf, TierError] | None = None, *, pieces: bool = False
    ) -> list[LoadedDocument]:
        """Read a checkpoint, each part from the nearest tier that has it as it was written. Tiers
        in *dead* are not asked, and those that fail are entered there. Documents are left out that
        are not to be believed, or with *pieces* their snapshots are, which are empty then; if
        nothing proves whose it is, that is said in the log.

        Raises:
            UnknownCheckpoint: There is none with this id.
            CorruptCheckpoint: No tier has all of it whole; names what is missing. Or nothing of it
                is to be believed.
            TierError: The tiers that may have it cannot be asked.
        """
        manifest = await self._seek(id)
        entries = self._entries_in_pieces(manifest) if pieces else self._entries(id, manifest)
        plain: dict[str, bytes] = {}
        silent = {} if dead is None else dead

        async def fetch(part: Part) -> None:
            plain[part.name] = await self.read_part(part, dead=silent)

        try:
            parts = {
                part.name: part
                for entry, is_whole in entries
                for part in (entry.parts if is_whole else entry.deltas)
            }
            await each(parts.values(), fetch)
        except CorruptCheckpoint as exc:
            self.lost[id] = str(exc)
            raise
        return [
            LoadedDocument(
                entry.name,
                entry.shared,
                entry.version.copy(),
                plain[entry.base.name] if is_whole else b"",
                [
                    change
                    for delta in entry.deltas
                    for change in decode_changes(delta, plain[delta.name])
                ],
            )
            for entry, is_whole in entries
        ]

    def _entries_in_pieces(self, manifest: Manifest) -> list[tuple[Entry, bool]]:
        """All of a checkpoint that is known, each with whether it may be read whole."""
        pieces = self.attestation.in_pieces(manifest)
        return [(entry, entry.name not in pieces) for entry in manifest.documents]

    def _entries(self, id: str, manifest: Manifest) -> list[tuple[Entry, bool]]:
        """What may be read of a checkpoint. Raises CorruptCheckpoint if that is nothing."""
        if not self.attestation.is_proven(manifest):
            log.warning("%s: nothing proves whose checkpoint %s is", self.agent, id)
            return [(entry, True) for entry in manifest.documents]
        try:
            left_out = self.attestation.left_out(manifest)
        except Damaged as exc:
            raise CorruptCheckpoint("every tier", id, str(exc)) from exc
        for name in left_out:
            log.warning("%s: checkpoint %s: %r is left out", self.agent, id, name)
        return [(entry, True) for entry in manifest.documents if entry.name not in left_out]

    async def newest(self) -> AsyncIterator[tuple[Checkpoint, list[LoadedDocument]]]:
        """Iterate over the checkpoints that are `known` and can be loaded, newest first, with what
        may be used of them: see *pieces* of `load`. Those that cannot are passed over; what is
        wrong with them is told by events, and stands in `lost`. A tier that fails is not asked for
        older ones either: `failures`."""
        dead: dict[Shelf, TierError] = {}
        for id in reversed(self.known()):
            try:
                documents = await self.load(id, dead, pieces=True)
            except (StoreError, UnknownCheckpoint) as exc:
                log.warning("%s: checkpoint %s cannot be used: %s", self.agent, id, exc)
                continue
            yield self.describe(id), documents

    async def check_believed(self, id: str) -> None:
        """Check that a checkpoint may be used without its user's asking for it by its id.

        Raises:
            UnknownCheckpoint, TierError: As `load`.
            CorruptCheckpoint: It may not.
        """
        manifest = await self._seek(id)
        try:
            self.attestation.left_out(manifest)
        except Damaged as exc:
            raise CorruptCheckpoint("every tier", id, str(exc)) from exc

    async def verify(self, id: str, tier: str | None = None) -> Verification:
        """Read all of a checkpoint, in all tiers that have it, or in *tier*, named by its URL.

        Raises:
            UnknownCheckpoint: There is none with this id.
            UsageError: There is no such tier.
            CorruptCheckpoint: No tier that was asked has it whole.
        """
        if tier is not None and tier not in [shelf.url for shelf in self.shelves]:
            known = ", ".join(shelf.url for shelf in self.shelves)
            raise UsageError(f"{tier!r} is not a tier of this replica, which has {known}")
        await self._seek(id)
        shelves = [shelf for shelf in self.shelves if tier in (shelf.url, None)]
        if tier is None:
            shelves = [shelf for shelf in shelves if id in shelf.ids]
        failed: dict[str, str] = {}
        worst: StoreError = CorruptCheckpoint("every tier", id, "none has it")
        for shelf in shelves:
            try:
                await self.prove(shelf, id)
            except (CorruptCheckpoint, TierError) as exc:
                failed[shelf.url], worst = exc.reason, exc
        intact = tuple(shelf.url for shelf in shelves if shelf.url not in failed)
        if not intact:
            raise worst
        return Verification(id, intact, failed)

    async def prove(self, shelf: Shelf, id: str) -> None:
        """Read all of a checkpoint in one tier. Raises CorruptCheckpoint or TierError."""
        # All of it is looked at, so that it is mended in one go.
        damages: list[CorruptCheckpoint] = []

        async def look_at(part: Part) -> None:
            try:
                await shelf.part(part)
            except CorruptCheckpoint as exc:
                damages.append(exc)

        try:
            try:
                manifest = await shelf.manifest(id)
            except CorruptCheckpoint as exc:
                damages.append(exc)
                if id not in self.manifests:
                    raise
                manifest = self.manifests[id]
            await each(manifest.parts().values(), look_at)
            if damages:
                raise damages[0]
        except CorruptCheckpoint:
            shelf.proven.discard(id)
            for damage in damages:
                shelf.note_damage(damage)
            raise
        except TierError as exc:
            shelf.failed(exc)
            raise
        shelf.proven.add(id)
        self.verified.add(id)
        self.lost.pop(id, None)

    async def _seek(self, id: str) -> Manifest:
        """The manifest of a checkpoint, also of one that a tier has and this process has not heard
        of."""
        if isinstance(id, str) and id not in self.manifests and id not in self.dropped:
            await self.read_all()
            if id not in self.manifests and is_id(id):
                for url, reason in self.failures().items():
                    raise TierError(url, reason)
        return self.find(id)

    async def read_part(
        self,
        part: Part,
        *,
        but_for: Shelf | None = None,
        dead: dict[Shelf, TierError] | None = None,
    ) -> bytes:
        """A part from the nearest tier that has it whole. A tier that fails is entered in *dead*,
        and not asked again."""
        silent = {} if dead is None else dead
        damage: CorruptCheckpoint | None = None
        for shelf in self.shelves:
            if shelf is but_for or shelf in silent:
                continue
            try:
                return await shelf.part(part)
            except CorruptCheckpoint as exc:
                if self.is_named(shelf, part.name):
                    shelf.note_damage(exc)
                    damage = damage or exc
            except TierError as exc:
                if shelf not in silent:
                    silent[shelf] = exc
                    shelf.failed(exc)
        for failure in silent.values():
            # It may have the part: so nobody knows whether that is lost.
            raise failure
        key = part_key(self.agent, part.name)
        raise damage or CorruptCheckpoint("every tier", key, "none has it")

    # Learning and forgetting

    async def read_all(self) -> None:
        """Take note of the checkpoints that any tier has that can be asked."""

        async def read(shelf: Shelf) -> None:
            try:
                await self.read(shelf)
            except TierError as exc:
                shelf.failed(exc)

        # At once: those that hang are waited for together.
        await each(self.shelves, read)

    async def read(self, shelf: Shelf) -> dict[str, Item]:
        """Take note of the checkpoints that a tier has; return all it holds.

        Raises:
            TierError: It cannot be asked.
        """
        async with shelf.lock:
            items = await shelf.items()
            ids, _ = read_keys(self.agent, items)
            shelf.ids = set(ids) - shelf.unreadable.keys()
            shelf.proven &= shelf.ids
        unknown = shelf.ids - self.manifests.keys() - self.dropped.keys()

        async def learn(id: str) -> None:
            try:
                self.manifests.setdefault(id, await shelf.manifest(id))
                for other in self.shelves:
                    if id not in other.ids:
                        other.wake()
            except CorruptCheckpoint as exc:
                shelf.ids.discard(id)
                shelf.unreadable[id] = exc.reason
                shelf.note_damage(exc)

        await each(unknown, learn)
        return items

    async def prove_newest(self) -> None:
        """Find the newest that can be loaded, which is never let go."""
        for id in reversed(self.believed()):
            if id in self.verified:
                return
            for shelf in self.holders(id):
                try:
                    return await self.prove(shelf, id)
                except (CorruptCheckpoint, TierError):
                    continue

    def verdict(self) -> Verdict:
        """What retention says. What is not believed is judged by itself: else whoever can write to
        one tier could have those let go that are."""
        believed = set(self.believed())
        others = self.manifests.keys() - believed
        one, other = self._judge(believed), self._judge(others)
        return Verdict(one.kept | other.kept, one.dropped | other.dropped)

    def _judge(self, ids: Iterable[str]) -> Verdict:
        held = [
            Held(id, self.manifests[id], id in self.verified and id not in self.lost) for id in ids
        ]
        return judge(self.retention, held, time.time_ns() // 1_000_000)

    def drop(self, ids: Iterable[str]) -> None:
        gone = [*ids]
        for id in gone:
            self.dropped[id] = self.manifests.pop(id)
            self.lost.pop(id, None)
            self.verified.discard(id)
        for shelf in self.shelves if gone else ():
            shelf.wake()
        while len(self.dropped) > DROPPED_MAX:
            del self.dropped[next(iter(self.dropped))]

    def is_named(self, shelf: Shelf, name: str) -> bool:
        """Whether a checkpoint in a tier has a part, by what is known now. One that was let go
        counts until its manifest is deleted: a crash in between must not leave it without parts."""
        known = [self.manifests.get(id) or self.dropped.get(id) for id in shelf.ids]
        return any(manifest is not None and name in manifest.names for manifest in known)


async def each(items: Iterable[T], work: Callable[[T], Awaitable[object]]) -> None:
    """Do *work* for all items, some at a time; the first failure ends it."""
    waiting = iter([*items])

    async def take_on() -> None:
        for item in waiting:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(take_on())
    except BaseExceptionGroup as group_failure:
        raise group_failure.exceptions[0] from None
