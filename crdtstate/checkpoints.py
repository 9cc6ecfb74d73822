"""
Checkpoints: all documents at one moment, kept in tiers.

A checkpoint is a cut of all documents (`cutting`), written as parts and a manifest (`manifest`) to
the *primary* tier: the first ``sqlite://`` one, else the first. The parts go first and the manifest
last, so what a crash leaves behind is parts that nobody names, never a checkpoint that lacks one.
When all of it was read back, it counts, and is in the `catalogue`. The other tiers get it from
`tending` afterwards: a tier that is slow, full, gone, or lies holds up nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from crdtstate.attestation import BELIEVED, Attestation
from crdtstate.catalogue import Catalogue, Checkpoint, Verification, each
from crdtstate.clock import Version
from crdtstate.config import Config
from crdtstate.cutting import Cutter, pack
from crdtstate.errors import (
    CheckpointFailed,
    CorruptCheckpoint,
    CRDTStateError,
    ReplicaClosed,
    StoreError,
    TierError,
    UsageError,
)
from crdtstate.events import CheckpointDamaged, CheckpointSaved, Event
from crdtstate.manifest import (
    ARCHIVE_LEVEL,
    LABEL_CHARS_MAX,
    SYSTEM,
    Damaged,
    Entry,
    Manifest,
    Part,
    make_id,
    part_key,
)
from crdtstate.retention import Retention, total_bytes
from crdtstate.shelf import Shelf
from crdtstate.tending import Tending
from crdtstate.tiers import Item, Tier

__all__ = ["Checkpoint", "Checkpoints", "Pruning", "Verification", "default_tier"]

log = logging.getLogger("crdtstate")

SEEN_FOR = 600.0
"""Seconds for which a part that was found whole is used again without another look."""

KEEPING_SCHEMES = {"sqlite", "s3"}
"""Tiers that last, and so can be the archive."""


@dataclass(frozen=True, slots=True)
class Pruning:
    """What retention says, or did: ids with the reasons, newest first.

    Attributes:
        freed_bytes: What the dropped ones took in a tier, without what others share.
    """

    kept: dict[str, str]
    dropped: dict[str, str]
    freed_bytes: int


class Checkpoints(Catalogue):
    """The checkpoints of one agent, and how they are made.

    Args:
        agent: Whose.
        tiers: The tiers, or their URLs, nearest first.
        config: Settings.
        emit: Gets the events.
        retention: Which checkpoints are kept.
        attestation: Proves those that are made, and says which of the others are believed.
        made_late: A file among the tiers that is only made when something is kept.
    """

    def __init__(
        self,
        agent: str,
        tiers: Iterable[str | Tier],
        config: Config,
        emit: Callable[[Event], None],
        *,
        retention: Retention | None = None,
        attestation: Attestation = BELIEVED,
        made_late: Path | None = None,
    ) -> None:
        shelves = [
            Shelf(
                tier,
                agent,
                limit=config.tier_timeout,
                retry=config.tier_retry,
                retry_max=config.tier_retry_max,
                emit=emit,
                attestation=attestation,
            )
            for tier in tiers
        ]
        super().__init__(agent, shelves, retention or Retention(), attestation)
        self.primary = _appoint(shelves)
        self.primary.made_late = made_late
        self._config = config
        self._emit = emit
        self._tending = Tending(self, self._announce_newest)
        # Of making: one at a time.
        self._lock = asyncio.Lock()
        self._cutter: Cutter | None = None
        self._spawn: Callable[[Coroutine[Any, Any, Any], str], asyncio.Task[Any]]
        self._announce: Callable[[Checkpoint], None]
        self._creating: set[asyncio.Task[Checkpoint]] = set()
        self._is_closing = False

    # Opening and closing

    async def open(
        self,
        cutter: Cutter,
        spawn: Callable[[Coroutine[Any, Any, Any], str], asyncio.Task[Any]],
        announce: Callable[[Checkpoint], None],
        interval: float,
    ) -> None:
        """Begin to make checkpoints and to look after the tiers, in tasks that *spawn* makes.

        Args:
            announce: Called with each new checkpoint, and when another tier has the newest.
            interval: Seconds between those made without being asked; 0: none.
        """
        self._cutter, self._spawn, self._announce = cutter, spawn, announce
        try:
            await self.read(self.primary)
        except TierError as exc:
            self.primary.failed(exc)
        for shelf in self.shelves:
            self._spawn(self._tending.run(shelf), f"checkpoints in {shelf.url}")
            if not shelf.is_unmade:
                shelf.wake()
        if interval:
            self._spawn(self._make_by_itself(interval), "checkpoints")

    async def close(self) -> None:
        """Wait for the checkpoint that is being made, and make no more. Tasks end with whoever
        owns them; `release` lets go of the tiers after that."""
        self._is_closing = True
        if self._creating:
            # Each step of it has a limit of its own. This is for what nobody thought of.
            await asyncio.wait(self._creating, timeout=2 * self._config.tier_timeout)

    async def release(self) -> None:
        """Let go of the tiers. Idempotent."""
        self._is_closing = True
        for shelf in self.shelves:
            await shelf.close()

    async def settled(self) -> None:
        """Wait until every tier has what it should have, or fails."""
        # What one is found to have may be what another lacks.
        while not all(shelf.quiet.is_set() for shelf in self.shelves):
            for shelf in self.shelves:
                await shelf.quiet.wait()

    # Others' checkpoints

    async def of(self, agent: str) -> Catalogue:
        """What these tiers have of another *agent*, to be read: nothing there is altered. Take the
        newest that can be loaded from `Catalogue.newest`; without one, `Catalogue.failures` says
        which tiers could not be asked. Damage is told by an event, and left to its owner to mend.
        It can be used until this is released, and needs no closing.
        """

        def emit(event: Event) -> None:
            # Whether a tier works is told of once, for the own checkpoints.
            if isinstance(event, CheckpointDamaged):
                self._emit(event)

        shelves = [shelf.of(agent, emit) for shelf in self.shelves]
        found = Catalogue(agent, shelves, Retention(), self.attestation.of_others())
        await found.read_all()
        return found

    # Making

    async def create(self, label: str = "") -> Checkpoint:
        """Make a checkpoint of all that is written here by now, in the primary tier; the others
        get it afterwards. If the caller does not wait, it is made all the same.

        Raises:
            CheckpointFailed: The primary tier, or the store, does not work.
            UsageError: *label* cannot be one.
        """
        if type(label) is not str or len(label) > LABEL_CHARS_MAX or not _is_text(label):
            raise UsageError(f"a label is text of up to {LABEL_CHARS_MAX} characters: {label!r}")
        if self._is_closing:
            raise ReplicaClosed(f"{self.agent}: closed")
        task = self._spawn(self._create(label), "checkpoint")
        self._creating.add(task)
        task.add_done_callback(self._creating.discard)
        # Who is cancelled meanwhile leaves nothing half done.
        return await asyncio.shield(task)

    async def _create(self, label: str) -> Checkpoint:
        async with self._lock:
            try:
                id = await self._make(label)
            except (StoreError, Damaged) as exc:
                if isinstance(exc, TierError):
                    self.primary.failed(exc)
                raise CheckpointFailed(self.primary.url, str(exc)) from exc
            finally:
                self.writing.clear()
        found = self.describe(id)
        token = str(found.version)
        self._emit(CheckpointSaved(self.agent, id, label, token, found.tiers, True))
        self._announce(found)
        self.drop(self.verdict().dropped)
        for shelf in self.shelves:
            shelf.wake()
        return found

    async def _make(self, label: str) -> str:
        assert self._cutter is not None, "this one only reads"
        primary = self.primary
        items = await primary.items()
        # Its parts are named again, in the own name.
        is_own = self.attestation.is_own
        parent = max(
            (id for id in self.manifests if primary in self.holders(id) and is_own(self.find(id))),
            default=None,
        )
        before = None if parent is None else self.manifests[parent]
        renew: set[str] = set()
        if before is not None:
            self.writing.update(before.parts())
            renew = await self._unusable(before, items)
        cut = await self._cutter.take(before, renew)
        prove = self.attestation.prove
        manifest, data, new = await asyncio.to_thread(pack, cut, self.agent, label, parent, prove)
        id = make_id(manifest.stamp, data)
        self.writing.update(new)
        async with primary.lock:
            await each(new.values(), lambda item: primary.keep_part(*item))
            await primary.keep_manifest(id, data)
        if self._cutter.writer != cut.writer:
            # What the replica has just disowned may be in it.
            self.dropped[id] = manifest
            primary.wake()
            raise StoreError(primary.url, "the replica goes on under another writer; try again")
        self.manifests[id] = manifest
        self.verified.add(id)
        primary.proven.add(id)
        return id

    async def _unusable(self, parent: Manifest, items: dict[str, Item]) -> set[str]:
        """The documents with parts that are not whole in the primary tier, nor can be made so."""
        primary, now = self.primary, asyncio.get_running_loop().time()
        renew: set[str] = set()

        async def look_at(entry: Entry) -> None:
            for part in entry.parts:
                key = part_key(self.agent, part.name)
                is_there = key in items and key not in primary.damaged
                if is_there and now - primary.seen.get(part.name, -SEEN_FOR) < SEEN_FOR:
                    continue
                try:
                    if not is_there:
                        raise CorruptCheckpoint(primary.url, key, "it is not there")
                    await primary.part(part)
                except CorruptCheckpoint as exc:
                    primary.note_damage(exc)
                    if not await self._mend(primary, part):
                        renew.add(entry.name)
                        return

        await each(parent.documents, look_at)
        return renew

    async def _mend(self, shelf: Shelf, part: Part) -> bool:
        """Write a part anew from another tier, if one has it."""
        try:
            plain = await self.read_part(part, but_for=shelf)
        except StoreError:
            return False
        await shelf.keep_plain(part, plain)
        return True

    def _announce_newest(self) -> None:
        """Say which tiers have it by now."""
        newest = max((id for id in self.believed() if self.holders(id)), default=None)
        if newest is not None and not self._is_closing:
            self._announce(self.describe(newest))

    async def _make_by_itself(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            if not self._has_changed() or self._is_closing:
                continue
            try:
                await self.create()
            except CRDTStateError as exc:
                # It is told of by TierFailed, or StoreFailed, and comes again.
                log.warning("%s: no checkpoint was made: %s", self.agent, exc)

    def _has_changed(self) -> bool:
        """Whether a document of the user's is not as the newest checkpoint has it."""
        assert self._cutter is not None
        newest = max((id for id in self.believed() if self.holders(id)), default=None)
        entries = self.manifests[newest].documents if newest else ()
        saved = {entry.name: entry.version for entry in entries}
        return any(
            saved.get(name, Version()) != version
            for name, version in self._cutter.versions()
            if not name.startswith(SYSTEM)
        )

    def disown(self, writer: int, kept: dict[str, int]) -> None:
        """Let go of the checkpoints with changes of *writer* above ``kept[document]``: others use
        their dots for something else."""
        self.drop(
            id
            for id, manifest in self.manifests.items()
            if any(e.version.get(writer, 0) > kept.get(e.name, 0) for e in manifest.documents)
        )

    # Retention

    async def prune(self, *, dry_run: bool = False) -> Pruning:
        """Let go of the checkpoints that retention does not keep, in all tiers; those that fail
        follow. With *dry_run*, only say what that would be."""
        await self.prove_newest()
        verdict = self.verdict()
        gone = [self.manifests[id] for id in verdict.dropped]
        stay = [self.manifests[id] for id in verdict.kept]
        freed = total_bytes([*gone, *stay]) - total_bytes(stay)
        if not dry_run:
            self.drop(verdict.dropped)
            await self.settled()
        return Pruning(verdict.kept, verdict.dropped, freed)


def default_tier(store: Path | None) -> tuple[list[str | Tier], Path | None]:
    """Where a replica keeps checkpoints if nobody says: beside its store, in a file that is made
    with the first."""
    if store is None:
        return ["memory://"], None
    path = Path(f"{store}.checkpoints").absolute()
    return [f"sqlite:///{quote(str(path))}"], path


def _appoint(shelves: list[Shelf]) -> Shelf:
    """Say which tier is the primary and which the archive; returns the primary."""
    schemes = [urlsplit(shelf.url).scheme for shelf in shelves]
    primary = shelves[schemes.index("sqlite") if "sqlite" in schemes else 0]
    primary.is_primary = True
    last = shelves[-1]
    if last is not primary and schemes[-1] in KEEPING_SCHEMES:
        last.is_archive, last.level = True, ARCHIVE_LEVEL
    return primary


def _is_text(label: str) -> bool:
    try:
        return label.isprintable() and bool(label.encode() or True)
    except UnicodeEncodeError:
        return False
