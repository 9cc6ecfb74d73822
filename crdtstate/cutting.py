"""
Taking a consistent cut of all documents, while writing goes on.

Everything that belongs to one moment is taken in one turn of the event loop: what is open is
sealed, and of every document the version is noted together with what gets it into the checkpoint:
nothing if it has not changed, else the ranges of its changes in the journal, or its snapshot. Then
the cut waits for the store, for a checkpoint holds only what is committed: what a crash may take
away was never in one. The changes are read afterwards, in portions. If the journal has forgotten
some meanwhile, or the replica goes on under another writer, the cut is taken again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from crdtstate.change import Change, Snapshot, decode_change
from crdtstate.clock import Stamp, Version
from crdtstate.documents import DocumentSet
from crdtstate.errors import CorruptStore, InvalidUpdate, StoreError
from crdtstate.manifest import (
    Entry,
    Extend,
    Manifest,
    Part,
    Range,
    Renew,
    Step,
    encode_changes,
    make_part,
    plan,
)
from crdtstate.stores import Store
from crdtstate.sync import Sync

PORTION_BYTES = 256 * 1024
"""Changes read from the store before others have their turn on the event loop: 1 ms or so."""

CUTS_MAX = 5
"""How often a cut is taken again before all documents get a new base."""


class Taken(NamedTuple):
    """One document in a cut: what its parent had of it, and what comes to that."""

    name: str
    shared: bool
    version: Version
    before: Entry | None
    snapshot: Snapshot | None = None
    changes: tuple[bytes, ...] = ()


class CutTaken(NamedTuple):
    """All documents at one moment."""

    writer: int
    stamp: Stamp
    wall_ms: int
    documents: list[Taken]


class _Forgotten(Exception):
    """The journal no longer has the changes of a document, which is named."""


class Cutter:
    """Takes the cuts of one replica.

    Args:
        documents: The documents.
        store: Has their changes.
        core: Knows what is committed.
        seal: Seals what is open and hands it to the store.
        until: Waits until a condition holds; it is asked after each turn of the pump.
    """

    def __init__(
        self,
        documents: DocumentSet,
        store: Store,
        core: Sync,
        seal: Callable[[], None],
        until: Callable[[Callable[[], bool], str], Awaitable[None]],
    ) -> None:
        self._documents = documents
        self._store = store
        self._core = core
        self._seal = seal
        self._until = until

    @property
    def writer(self) -> int:
        """As whom the replica writes now."""
        return self._core.hello.writer

    def versions(self) -> Iterator[tuple[str, Version]]:
        """The versions of all documents now."""
        return self._documents.versions()

    async def take(self, parent: Manifest | None, renew: Collection[str]) -> CutTaken:
        """Take a cut as a difference to *parent*; the documents in *renew* get a new base.

        Raises:
            StoreError: The store refuses to commit what is to be in it, or is damaged.
        """
        renewed = set(renew)
        before = {entry.name: entry for entry in parent.documents} if parent else {}
        for turn in range(CUTS_MAX + 1):
            if turn == CUTS_MAX:
                before = {}
            cut, steps = await self._cut(before, renewed)
            try:
                documents = [
                    await self._complete(taken, step)
                    for taken, step in zip(cut.documents, steps, strict=True)
                ]
            except _Forgotten as exc:
                renewed.add(str(exc))
                continue
            if self.writer == cut.writer:
                return cut._replace(documents=documents)
        raise StoreError(self._store.path or "memory", "the replica does not come to rest")

    async def _cut(
        self, before: dict[str, Entry], renew: Collection[str]
    ) -> tuple[CutTaken, list[Step]]:
        await self._until(lambda: not self._is_broken(), "documents to be rebuilt")
        self._seal()
        # No await from here to the last line that looks at the documents. A transaction that is
        # open now is in none of them.
        number = self._core.persisted
        stamp, wall_ms = self._documents.next_stamp(), self._documents.wall_ms()
        cut = CutTaken(self.writer, stamp, wall_ms, [])
        steps: list[Step] = []
        for name, version in sorted(self._documents.versions()):
            document = self._documents.find(name)
            assert document is not None and not document.is_broken
            entry = None if name in renew else before.get(name)
            step = plan(
                entry,
                document.shared,
                version,
                self._store.floor(name),
                partial(self._store.measure, name),
            )
            snapshot = document.snapshot() if isinstance(step, Renew) else None
            assert snapshot is None or snapshot.version == version
            taken = Taken(name, document.shared, version.copy(), entry, snapshot)
            cut.documents.append(taken)
            steps.append(step)
        await self._until(lambda: self._is_committed(number), "the store to commit")
        return cut, steps

    def _is_broken(self) -> bool:
        return any(
            document.is_broken
            for name, _ in self._documents.versions()
            if (document := self._documents.find(name)) is not None
        )

    def _is_committed(self, number: int) -> bool:
        if self._store.failure is not None:
            raise self._store.failure
        return self._core.committed_number >= number

    async def _complete(self, taken: Taken, step: Step) -> Taken:
        """Read the changes that *step* takes over from the journal."""
        if not isinstance(step, Extend):
            return taken
        changes: list[bytes] = []
        missing = {writer: (first, last) for writer, first, last in step.ranges}
        while missing:
            found = self._read(taken.name, [(w, *ends) for w, ends in missing.items()])
            for change in found:
                _, last = missing[change.writer]
                missing[change.writer] = (change.seq + 1, last)
                if change.seq == last:
                    del missing[change.writer]
            changes += [change.data for change in found]
            await asyncio.sleep(0)
        assert len(changes) == step.changes, f"{taken.name!r}: {len(changes)} changes"
        return taken._replace(changes=tuple(changes))

    def _read(self, name: str, ranges: list[Range]) -> list[Change]:
        try:
            found, _ = self._store.read(name, ranges, PORTION_BYTES)
            changes = [decode_change(data) for data in found]
        except (CorruptStore, InvalidUpdate):
            # What was delivered is whole: a new base needs no journal.
            raise _Forgotten(name) from None
        if not changes:
            raise _Forgotten(name)
        return changes


def pack(
    cut: CutTaken,
    agent: str,
    label: str,
    parent: str | None,
    prove: Callable[[Manifest], bytes] = lambda manifest: b"",
) -> tuple[Manifest, bytes, dict[str, tuple[Part, bytes]]]:
    """Make a cut to a manifest, its bytes, and its new parts, by name, as they are stored.
    Compresses and hashes, which takes a while: not on the event loop.

    Args:
        prove: Gives the proof of a manifest.

    Raises:
        Damaged: It would be larger than a manifest may be, or cannot be proven.
    """
    entries: list[Entry] = []
    new: dict[str, tuple[Part, bytes]] = {}
    for taken in cut.documents:
        entry = taken.before
        if taken.snapshot is not None:
            part, stored = make_part(taken.snapshot.encode_plain())
            entry = Entry(taken.name, taken.shared, taken.version, part)
            new[part.name] = part, stored
        elif taken.changes:
            part, stored = make_part(encode_changes(taken.changes), len(taken.changes))
            assert entry is not None
            entry = entry._replace(version=taken.version, deltas=(*entry.deltas, part))
            new[part.name] = part, stored
        assert entry is not None and entry.version == taken.version
        entries.append(entry)
    head = (agent, cut.writer, int(cut.stamp), cut.wall_ms, label, parent)
    manifest = Manifest(*head, tuple(entries))
    manifest = replace(manifest, proof=prove(manifest))
    return manifest, manifest.encode(), new
