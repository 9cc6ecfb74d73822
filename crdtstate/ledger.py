"""
What of each document is committed here, and what is still on its way to the store. Sans-I/O;
driven by `sync`.

All that goes to the store gets a *number*, in order, and counts as committed once the store says so
of its number: only then is it named in a HAVE, or sent if it is our own (S1, S2 of `sync`). The
ledger has a *page* for each document: how far it is committed, from where on its log is complete
(the *floor*), and how long that log has become. A *fingerprint* of all that is committed, 64 bits,
is kept up to date with each change, so that peers can compare without naming anything.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from crdtstate.change import Change
from crdtstate.clock import Dot, Version, mix
from crdtstate.documents import DOCUMENTS_MAX
from crdtstate.errors import ProtocolError
from crdtstate.link import Link

HISTORY_MAX = 600
"""Heartbeats for which it is remembered how much was committed."""

_EMPTY = Version()


@dataclass(slots=True)
class Page:
    """What the core knows of one document beside the document itself."""

    # Tells the document's share of the fingerprint from others', and that share.
    salt: int
    fingerprint: int = 0
    committed: Version = field(default_factory=Version)
    floor: Version = field(default_factory=Version)
    # Bytes persisted since the snapshot, and the size of that.
    log_bytes: int = 0
    snapshot_bytes: int = 0
    # Of `upkeep`: when to tidy it.
    tidy_at: float | None = None
    # Of `serving`: the size of the document's state, and when it was measured.
    measured: int = 0
    measured_at: float | None = None


class _Entry(NamedTuple):
    """Something persisted: *what* is the dot of a change, or the whole version of a snapshot."""

    number: int
    document: str
    what: Dot | Version
    own: Change | None


class Ledger:
    """What one replica has committed."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        # What was persisted and is not committed.
        self._entries: deque[_Entry] = deque()
        # The newest number given, and up to which a power cut takes nothing.
        self.persisted = 0
        self.synced = 0
        # Over all documents.
        self.fingerprint = 0
        # How many changes were committed, and how many had been at each heartbeat.
        self._commits = 0
        self._history: deque[tuple[float, int]] = deque(maxlen=HISTORY_MAX)

    # Looking

    def open(self, document: str) -> Page:
        """The page of a document, begun if there is none."""
        page = self.pages.get(document)
        if page is None:
            page = self.pages[document] = Page(_salt(document))
        return page

    def page(self, document: str) -> Page:
        """The same for a name that a peer gave. Raises ProtocolError when there are too many."""
        if document not in self.pages and len(self.pages) >= DOCUMENTS_MAX:
            raise ProtocolError(f"more than {DOCUMENTS_MAX} documents")
        return self.open(document)

    def committed(self, document: str) -> Version:
        """What of a document is committed."""
        page = self.pages.get(document)
        return page.committed.copy() if page else Version()

    def committed_of(self, writer: int) -> dict[str, int]:
        """How much of *writer* is committed: document -> seq."""
        return {
            name: page.committed[writer]
            for name, page in self.pages.items()
            if writer in page.committed
        }

    def floor(self, document: str) -> Version:
        """Up to where the log of a document is forgotten."""
        page = self.pages.get(document)
        return page.floor.copy() if page else Version()

    @property
    def is_settled(self) -> bool:
        """Whether all that was persisted is committed."""
        return not self._entries

    @property
    def committed_number(self) -> int:
        """Up to which number everything is committed."""
        return self._entries[0].number - 1 if self._entries else self.persisted

    def unsettled(self) -> set[str]:
        """The documents of which something is not committed yet."""
        return {entry.document for entry in self._entries}

    def has_own_unsettled(self, document: str) -> bool:
        """Whether an own change of a document is not committed yet."""
        return any(e.own is not None and e.document == document for e in self._entries)

    def fingerprint_of(self, documents: Iterable[str]) -> int:
        """The fingerprint over some documents only."""
        found = 0
        for name in documents:
            found ^= self.pages[name].fingerprint
        return found

    # Committing

    def enter(self, document: str, what: Dot | Version, own: Change | None) -> int:
        """Something goes to the store: a change, *own* if it is one, or a snapshot of a version.
        Returns its number."""
        self.persisted += 1
        self._entries.append(_Entry(self.persisted, document, what, own))
        return self.persisted

    def settle(self, number: int) -> Iterator[tuple[str, Mapping[int, int], Change | None]]:
        """Everything up to *number* is in the store: `commit` each of these documents and
        versions. With own changes comes the change, which may leave then."""
        while self._entries and self._entries[0].number <= number:
            _, document, what, own = self._entries.popleft()
            yield document, what if isinstance(what, Version) else {what.writer: what.seq}, own

    def commit(self, document: str, version: Mapping[int, int]) -> list[int]:
        """Count *version* as committed; returns the writers of whom it is more than before."""
        page = self.open(document)
        moved = []
        for writer, seq in version.items():
            before = page.committed.get(writer, 0)
            if seq <= before:
                continue
            share = mix(page.salt, writer, seq)
            if before:
                share ^= mix(page.salt, writer, before)
            self._commits += seq - before
            self.fingerprint ^= share
            page.fingerprint ^= share
            page.committed[writer] = seq
            moved.append(writer)
        return moved

    def has_outgrown(self, document: str, at_least: int) -> bool:
        """Whether the log is longer than the snapshot, and than *at_least* bytes."""
        page = self.pages[document]
        return page.log_bytes > max(at_least, page.snapshot_bytes)

    def reset(self) -> None:
        """Nothing is committed any more: documents are loaded anew, under another writer."""
        self._entries.clear()
        self.fingerprint = 0
        for page in self.pages.values():
            page.committed, page.fingerprint = Version(), 0
        # The store synced what it kept, and what was told may not be among it.
        self.synced = self.persisted

    # Lag

    def note_time(self, now: float) -> None:
        """Remember how much was committed at *now*."""
        self._history.append((now, self._commits))

    def lag(self, link: Link) -> int:
        """How many committed changes a peer has not acknowledged."""
        return sum(
            max(0, seq - link.acked.get(name, _EMPTY).get(writer, 0))
            for name, page in self.pages.items()
            if link.takes(name)
            for writer, seq in page.committed.items()
        )

    def lag_seconds(self, link: Link, now: float) -> float:
        """For how long, about, committed changes have not been acknowledged by a peer."""
        lag = self.lag(link)
        if not lag:
            return 0.0
        reached = self._commits - lag
        since = next((at for at, commits in reversed(self._history) if commits <= reached), None)
        if since is None:
            since = self._history[0][0] if self._history else now
        return max(0.0, now - since)


def _salt(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
