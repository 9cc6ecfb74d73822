"""
Whether the changes in a store are what their writers made, one after the other.

Each change names the one before it of its writer by its hash, and a snapshot names the last. So
what was altered, left out or put in between does not fit to what follows. Where changes are proven
(`authors`), each also has to be its writer's: that is checked anew, as if it came from a peer, with
what the store itself tells of who the writer is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from crdtstate.authors import Authors
from crdtstate.change import Change, Snapshot, decode_change
from crdtstate.errors import InvalidUpdate, Unproven

TOLD_MAX = 20
"""Changes that are told of one by one, of those that are not proven."""

Place = tuple[str, int]
"""A document and a writer."""


class Chains:
    """Looks at a store's snapshots, then at its changes in the order of delivery.

    Args:
        authors: What the mesh takes for a proof; None: proofs are not looked at.
    """

    def __init__(self, authors: Authors | None) -> None:
        self._authors = authors
        # (document, writer) -> the changes of it that are known, seq -> id: that of the snapshot,
        # and the newest in the journal.
        self._saved: dict[Place, tuple[int, bytes]] = {}
        self._newest: dict[Place, tuple[int, bytes]] = {}
        self._cards: dict[Place, bytes] = {}
        self.proven = 0
        self._unproven = 0

    def snapshots(self, found: Iterable[tuple[str, bytes]]) -> Iterator[str]:
        """Look at the snapshots that are intact, as (document, data); yields what is wrong."""
        for name, data in found:
            where = f"table snapshot, document {name!r}"
            try:
                snapshot = Snapshot.decode(data)
                if self._authors is not None:
                    self._authors.vouch(snapshot)
            except InvalidUpdate as exc:
                yield f"{where}: {exc}"
                continue
            for writer, seq in snapshot.version.items():
                self._saved[name, writer] = seq, snapshot.ids[writer]
            for writer, card in snapshot.cards.items():
                self._cards[name, writer] = card

    def changes(self, found: Iterable[tuple[int, str, bytes]]) -> Iterator[str]:
        """Look at the changes that are intact, as (row, document, data); yields what is wrong."""
        for row, name, data in found:
            where = f"table journal, row {row}, document {name!r}"
            try:
                change = decode_change(data)
            except InvalidUpdate as exc:
                yield f"{where}: {exc}"
                continue
            if not self._follows(change):
                yield f"{where}: {change!r} does not follow the change before it"
            if self._authors is not None:
                yield from (f"{where}: {why}" for why in self._doubts(self._authors, change))
        if self._unproven > TOLD_MAX:
            yield f"table journal: {self._unproven - TOLD_MAX} more changes are not proven"

    def _follows(self, change: Change) -> bool:
        place = change.document, change.writer
        known = (self._newest.get(place), self._saved.get(place))
        self._newest[place] = change.seq, change.id
        for seq, id in filter(None, known):
            if (seq == change.seq and id != change.id) or (
                seq == change.seq - 1 and id != change.prev
            ):
                return False
        return True

    def _doubts(self, authors: Authors, change: Change) -> Iterator[str]:
        place = change.document, change.writer
        try:
            authors.check(change, self._cards.get(place, b""))
        except Unproven as exc:
            self._unproven += 1
            if self._unproven <= TOLD_MAX:
                yield str(exc)
            return
        self.proven += 1
        if change.card:
            self._cards[place] = change.card
