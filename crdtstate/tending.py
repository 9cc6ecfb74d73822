"""
Looking after the tiers: each gets what it lacks and loses what was let go, whatever happened to it.

For every tier there is a task, which compares what the tier has with what it should have, whenever
there may be a difference. So a tier catches up alike with the newest checkpoint, with a week of
them, or with a part that rotted. A manifest is put only after all of its parts, and a part is
deleted only after every manifest that names it: at no moment is there one that lacks a part, also
if this process is killed. What nobody can explain, such as parts that a crash left, stays a while.

The *archive*, if there is one, keeps all checkpoints; the other tiers let old ones go once all of
these was read in the archive.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from crdtstate.catalogue import Catalogue
from crdtstate.errors import CorruptCheckpoint, TierError
from crdtstate.manifest import Manifest, Part, manifest_key, part_key, parts_of, read_keys
from crdtstate.retention import near, orphans
from crdtstate.shelf import Shelf
from crdtstate.tiers import Item

log = logging.getLogger("crdtstate")

ORPHAN_GRACE = 3600.0
"""Seconds for which a part stays that no checkpoint names, by the clock of its tier: it may belong
to one that is being written by somebody else. What was put from here is known to be no use."""


class Tending:
    """What the tiers of one agent need.

    Args:
        catalogue: The agent's checkpoints.
        on_done: Called when a tier has what it should have.
    """

    def __init__(self, catalogue: Catalogue, on_done: Callable[[], None]) -> None:
        self._catalogue = catalogue
        self._on_done = on_done
        self._agent = catalogue.agent

    async def run(self, shelf: Shelf) -> None:
        """Bring a tier up to date whenever there is something to do, for as long as it takes."""
        while True:
            await shelf.woken.wait()
            if shelf.failure is not None:
                shelf.quiet.set()
                await asyncio.sleep(shelf.pause)
            shelf.woken.clear()
            try:
                await self._bring_up_to_date(shelf)
            except Exception as exc:
                if not isinstance(exc, TierError):
                    log.exception("%s: %s cannot be looked after", self._agent, shelf.url)
                shelf.failed(exc)
            else:
                if shelf.failure is not None:
                    # It may have what the others lack.
                    self._catalogue.lost.clear()
                shelf.recovered()
                self._on_done()
                if not shelf.woken.is_set():
                    shelf.quiet.set()

    async def _bring_up_to_date(self, shelf: Shelf) -> None:
        items = await self._catalogue.read(shelf)
        if self._catalogue.verdict().dropped:
            # The newest that can be loaded stays: so it has to be known which that is.
            await self._catalogue.prove_newest()
            self._catalogue.drop(self._catalogue.verdict().dropped)
        wanted = await self._wanted(shelf)
        for id in sorted(shelf.ids - wanted):
            if id in self._catalogue.dropped or id in self._catalogue.manifests:
                async with shelf.lock:
                    await shelf.forget(manifest_key(self._agent, id))
                    shelf.ids.discard(id)
        # First of all, so that there is room in a tier that is full.
        await self._collect(shelf, items, wanted)
        for id in sorted(wanted - self._catalogue.lost.keys(), reverse=True):
            try:
                await self._complete(shelf, id, items)
            except CorruptCheckpoint as exc:
                self._catalogue.lost[id] = str(exc)
        held = {id for each in self._catalogue.shelves for id in each.ids}
        for id in self._catalogue.dropped.keys() - held:
            del self._catalogue.dropped[id]

    async def _wanted(self, shelf: Shelf) -> set[str]:
        """The checkpoints that a tier should have. Old ones are the archive's, once it is sure to
        have them."""
        archive = self._catalogue.shelves[-1]
        ids = set(self._catalogue.believed())
        # What nobody believes stays where it is, and is not spread further.
        others = self._catalogue.manifests.keys() & shelf.ids - ids
        if shelf.is_archive or not archive.is_archive:
            return ids | others
        stay = near(self._catalogue.retention, ids)
        stay.update(sorted(ids & self._catalogue.verified)[-1:])
        for id in (ids - stay) & shelf.ids & archive.ids - archive.proven:
            try:
                await self._catalogue.prove(archive, id)
            except (CorruptCheckpoint, TierError):
                continue
        # What the archive lacks stays where it is, and is not spread further.
        held = {id for id in ids if id in shelf.ids and id not in archive.proven}
        return (ids & stay) | held | others

    async def _complete(self, shelf: Shelf, id: str, items: dict[str, Item]) -> None:
        """Bring to a tier what it lacks of a checkpoint. Raises CorruptCheckpoint if no other tier
        has it, and TierError if this one fails."""
        manifest = self._catalogue.manifests.get(id)
        if manifest is None:
            return
        key = manifest_key(self._agent, id)
        lacking = [
            part
            for part in manifest.parts().values()
            if (name := part_key(self._agent, part.name)) not in items or name in shelf.damaged
        ]
        if not lacking and id in shelf.ids and key not in shelf.damaged:
            return
        async with shelf.lock:
            if id not in shelf.ids:
                lacking += await self._spoilt(shelf, manifest, items)
            for part in lacking:
                plain = await self._catalogue.read_part(part, but_for=shelf)
                await shelf.keep_plain(part, plain)
                items[part_key(self._agent, part.name)] = Item(part.name, part.stored, time.time())
            if id in self._catalogue.manifests:
                await shelf.keep_manifest(id, manifest.encode())

    async def _spoilt(self, shelf: Shelf, manifest: Manifest, items: dict[str, Item]) -> list[Part]:
        """The parts that a tier has, nobody has looked at yet, and are not what was written."""
        found: list[Part] = []
        for part in manifest.parts().values():
            key = part_key(self._agent, part.name)
            if key in items and key not in shelf.damaged and part.name not in shelf.seen:
                try:
                    await shelf.part(part)
                except CorruptCheckpoint as exc:
                    shelf.note_damage(exc)
                    found.append(part)
        return found

    async def _collect(self, shelf: Shelf, items: dict[str, Item], wanted: set[str]) -> None:
        """Delete the parts in a tier that no checkpoint there names."""
        if (
            shelf.foreign
            or not shelf.ids <= self._catalogue.manifests.keys() | self._catalogue.dropped.keys()
        ):
            # What the others name is not known.
            return
        _, names = read_keys(self._agent, items)
        stay = [self._catalogue.manifests[id] for id in wanted if id in self._catalogue.manifests]
        gone = [manifest for id, manifest in self._catalogue.manifests.items() if id not in wanted]
        known = {part.name for part in parts_of([*gone, *self._catalogue.dropped.values()])}
        # The newest thing in it tells what time it is there.
        now = max((item.put_at for item in items.values()), default=0.0)
        for name in sorted(orphans(names, stay)):
            key = part_key(self._agent, name)
            is_ours = name in known or name in shelf.seen
            if not is_ours and now - items[key].put_at < ORPHAN_GRACE:
                continue
            async with shelf.lock:
                if name not in self._catalogue.writing and not self._catalogue.is_named(
                    shelf, name
                ):
                    await shelf.forget(key)
