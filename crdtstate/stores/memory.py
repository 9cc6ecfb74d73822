"""
A store that lasts as long as its process: for relays without a file, and for tests.

It keeps the contract of `Store` to the letter, except that nothing ever waits or fails: what
is appended is committed and synced at once. It takes as much memory as what it keeps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

from crdtstate.audit import Chain, Draft, Query, Row
from crdtstate.clock import Version
from crdtstate.stores import Entry, Saved, Session
from crdtstate.stores.index import NO_CHANGES, DocumentIndex


class MemoryStore:
    """A store in memory. It has no last user, so its session is empty."""

    def __init__(self) -> None:
        self.path: str | None = None
        self.session = Session(None, None, False, False, False, False)
        self.committed = 0
        self.synced = 0
        self.failure: Exception | None = None
        self._rows: dict[int, Entry] = {}  # In the order of delivery.
        self._last_row = 0
        self._indexes: dict[str, DocumentIndex] = {}
        self._saved: dict[str, Saved] = {}
        self._chain = Chain()
        self._records: deque[Row] = deque()

    def start(self, agent: str, writer: int, on_progress: Callable[[], None]) -> None:
        """Nothing to do: there will be no next session, and nothing happens outside of calls."""

    def close(self, *, clean: bool = True) -> None:
        """Nothing to do."""

    # Reading

    def load(self) -> Iterator[Saved | Entry]:
        """Yield all snapshots, then the newer entries, in the order of delivery."""
        saved, entries = self._saved.copy(), list(self._rows.values())
        yield from saved.values()
        for entry in entries:
            snapshot = saved.get(entry.document)
            if snapshot is None or not snapshot.version.covers((entry.writer, entry.seq)):
                yield entry

    def saved(self, document: str) -> Saved | None:
        """The snapshot of *document*, if there is one."""
        return self._saved.get(document)

    def read(
        self, document: str, ranges: Sequence[tuple[int, int, int]], size_max: int
    ) -> tuple[list[bytes], bool]:
        """Return the changes of *ranges*, in the order of delivery, as far as they fit."""
        found, more = self._indexes.get(document, NO_CHANGES).find(ranges, size_max)
        return [self._rows[row].data for row, _, _ in found], more

    def measure(self, document: str, ranges: Sequence[tuple[int, int, int]]) -> int:
        """How many bytes the changes of *ranges* have, as far as they are kept."""
        return self._indexes.get(document, NO_CHANGES).measure(ranges)

    def floor(self, document: str) -> Version:
        """Up to which change of each writer the journal has forgotten."""
        return self._indexes.get(document, NO_CHANGES).floor()

    def size(self, document: str) -> int:
        """Bytes of changes that the document's snapshot does not contain."""
        return self._indexes.get(document, NO_CHANGES).size

    def kept(self, document: str) -> int:
        """Bytes of all changes that are here."""
        return self._indexes.get(document, NO_CHANGES).kept

    # Writing

    def append(self, entries: Sequence[Entry], records: Sequence[Draft] = ()) -> int:
        """Keep *entries* and *records*, and return the ticket."""
        self._records.extend(map(self._chain.add, records))
        for entry in entries:
            self._last_row += 1
            index = self._indexes.setdefault(entry.document, DocumentIndex())
            index.add(entry.writer, entry.seq, self._last_row, len(entry.data))
            self._rows[self._last_row] = entry
        self.committed += 1
        self.synced += 1
        return self.committed

    def hurry(self) -> None:
        """Nothing to do."""

    def retry(self) -> None:
        """Nothing to do: nothing fails."""

    def forget(self, writer: int, after: Mapping[str, int]) -> None:
        """Remove the changes of *writer* above ``after[document]`` from all documents."""
        for document, index in self._indexes.items():
            for row in index.rows_after(writer, after.get(document, 0)):
                del self._rows[row]
            index.cut(writer, after.get(document, 0))

    def audit(self, query: Query) -> list[Row]:
        """The newest records that *query* admits, oldest first."""
        found = (row for row in reversed(self._records) if query.admits(row))
        return list(islice(found, query.limit))[::-1]

    def trim_audit(self, rows_max: int, bytes_max: int) -> None:
        """Drop the oldest records until at most so many are left."""
        dropped = self._chain.trim(rows_max, bytes_max)
        while self._records and self._records[0].number <= dropped:
            self._records.popleft()

    def compact(self, saved: Saved, keep_bytes: int, records: Sequence[Draft] = ()) -> None:
        """Keep *saved* as the document's snapshot and forget old changes that it contains."""
        self._records.extend(map(self._chain.add, records))
        index = self._indexes.setdefault(saved.document, DocumentIndex())
        for row in index.compact(saved.version, keep_bytes):
            del self._rows[row]
        self._saved[saved.document] = saved
