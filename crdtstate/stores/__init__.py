"""
Where changes and snapshots are kept.

A store keeps, for each document, a *journal* of encoded changes in the order in which they were
delivered (so replaying it from the top is causally sound) and the newest *snapshot*. It treats
both as opaque bytes. `journal.Journal` keeps them in an SQLite file, `memory.MemoryStore` in
memory. Both pass the contract in ``tests/test_stores.py``.

To add one: implement `Store` in a module of its own, name it in `Replica`'s ``store=``,
and add it to the contract's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from crdtstate.audit import Draft, Query, Row
from crdtstate.clock import Version
from crdtstate.identity import Session as Session


@dataclass(frozen=True, slots=True)
class Entry:
    """One change as the journal keeps it."""

    document: str
    writer: int
    seq: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Saved:
    """One document's snapshot as the store keeps it."""

    document: str
    version: Version
    data: bytes


class Store(Protocol):
    """What a replica asks of its store. Called from the replica's thread only.

    Appends are numbered by *tickets*, 1, 2, 3, ... in the order of the calls. `committed` and
    `synced` are the highest tickets up to which everything is committed (would survive a kill
    of this process) and synced (would survive a power cut). ``committed >= synced`` always.
    """

    path: str | None
    """The file, or None in memory."""

    session: Session
    """What was known of the last user at opening."""

    committed: int
    synced: int

    failure: Exception | None
    """Why the newest attempt to write failed, or None while all is well. The batches that
    failed wait, in order, and go first at the next `append` or `retry`."""

    def start(self, agent: str, writer: int, on_progress: Callable[[], None]) -> None:
        """Begin a session as *writer* (again to change the writer within one).

        *on_progress* is called, from any thread, when `committed`, `synced` or `failure` changed
        outside of a call from the replica.
        """

    def load(self) -> Iterator[Saved | Entry]:
        """Yield the snapshots of all documents, then the journal's entries that are newer than
        the snapshot of their document, in the order of delivery.

        Raises:
            CorruptStore: A row fails its checksum; names the row.
        """

    def saved(self, document: str) -> Saved | None:
        """The committed snapshot of *document*, if there is one.

        Raises:
            CorruptStore: It fails its checksum.
        """

    def append(self, entries: Sequence[Entry], records: Sequence[Draft] = ()) -> int:
        """Queue *entries*, and the audit's *records* of them, for one atomic commit and return
        the ticket. Never raises for the disk's sake: see `failure`."""

    def hurry(self) -> None:
        """Sync what is committed soon: somebody waits for it. Returns at once."""

    def retry(self) -> None:
        """Try again to write what waits after a `failure`."""

    def read(
        self, document: str, ranges: Sequence[tuple[int, int, int]], size_max: int
    ) -> tuple[list[bytes], bool]:
        """Return the changes of *ranges*, each (writer, first seq, last seq) with both ends
        included, and whether there are more of them.

        They come in the order of delivery, over all ranges, so that what builds on others comes
        after them; as many as fit in *size_max* bytes (one fits always). A range whose first
        change is forgotten or unknown gives nothing; what is not committed yet neither."""

    def measure(self, document: str, ranges: Sequence[tuple[int, int, int]]) -> int:
        """How many bytes the changes of *ranges* have, as far as they are kept."""

    def forget(self, writer: int, after: Mapping[str, int]) -> None:
        """Remove for ever the changes of *writer* above ``after[document]`` (0 where it is not
        named) from all documents, as if they had never been appended. What is queued is written
        first.

        Raises:
            StoreUnavailable: The disk refuses; nothing was removed.
        """

    def compact(self, saved: Saved, keep_bytes: int, records: Sequence[Draft] = ()) -> None:
        """Keep *saved* as the document's snapshot, in place of the older one, and forget the
        oldest changes it contains, until what it contains takes at most *keep_bytes*. The audit's
        *records* are part of the same commit."""

    def audit(self, query: Query) -> list[Row]:
        """The newest committed records that *query* admits, oldest first.

        Raises:
            StoreError: They cannot be read.
        """

    def trim_audit(self, rows_max: int, bytes_max: int) -> None:
        """Drop the oldest records until at most so many are left."""

    def floor(self, document: str) -> Version:
        """Up to which change of each writer the journal has forgotten; these and older ones can
        only be had by snapshot."""

    def size(self, document: str) -> int:
        """Bytes of changes in the journal that the document's snapshot does not contain."""

    def kept(self, document: str) -> int:
        """Bytes of all changes in the journal, those that the snapshot contains as well."""

    def close(self, *, clean: bool = True) -> None:
        """Write what waits and close; *clean* says that nothing was lost. Idempotent."""
