"""
What the core wants kept, on its way into the store and out of it.

The core numbers what it persists, the store numbers batches by *tickets*. Of each batch this keeps
both, in order, until the store says how far it got, and tells the core. A store that fails is tried
again until it works; what is handed over meanwhile waits there, and counts as unsaved.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from crdtstate import sync
from crdtstate.audit import Draft
from crdtstate.change import Change
from crdtstate.errors import CorruptStore
from crdtstate.events import Event, StoreFailed, StoreRecovered
from crdtstate.stores import Entry, Saved, Store

STORE_RETRY = 1.0


class Saving:
    """What one replica has handed to its store.

    Args:
        store: Where it is kept.
        core: Gets to know what is committed, and what was read for a peer.
        emit: Gets the events of the store.
        wake: Called when the store may have got further; `note_progress` is to be called soon.
    """

    def __init__(
        self,
        store: Store,
        core: sync.Sync,
        emit: Callable[[Event], None],
        wake: Callable[[], None],
    ) -> None:
        self._store = store
        self._core = core
        self._emit = emit
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        # What is handed over next: (the core's number, entry).
        self._batch: list[tuple[int, Entry]] = []
        # What the audit records with it.
        self._records: list[Draft] = []
        # What was handed over: (ticket, the core's number).
        self._tickets: deque[tuple[int, int]] = deque()
        # The same, of what is committed and not synced.
        self._unsynced: deque[tuple[int, int]] = deque()
        # How much was handed over that a store which fails has not saved.
        self.unsaved_bytes = 0
        self._failed: str | None = None
        self._is_retrying = False
        self._is_closed = False

    def start(self, agent: str, writer: int) -> None:
        """Begin to save as *writer*, also in place of another; what was handed over before is
        forgotten here.

        Raises:
            StoreError: The store refuses; nothing changed.
        """
        self._store.start(agent, writer, self._on_progress)
        self._tickets.clear()
        self._unsynced.clear()

    def close(self) -> None:
        """Write what waits, if the store can, and close it."""
        self._is_closed = True
        self.flush()
        self._store.close(clean=True)

    @property
    def is_busy(self) -> bool:
        """Whether plain writes should go on collecting, because a commit is under way."""
        return bool(self._tickets) and self._store.failure is None

    # Into the store

    def add(self, number: int, change: Change, records: Sequence[Draft] = ()) -> None:
        """Put a change, and the *records* of it, into the batch that is handed over next."""
        entry = Entry(change.document, change.writer, change.seq, change.data)
        self._batch.append((number, entry))
        self._records += records

    def note(self, record: Draft) -> None:
        """Put a record into the batch that is handed over next, soon."""
        self._records.append(record)
        self._wake()

    def flush(self) -> None:
        """Hand over the batch."""
        if self._batch or self._records:
            records, self._records = self._records, []
            ticket = self._store.append([entry for _, entry in self._batch], records)
            if self._batch:
                self._tickets.append((ticket, self._batch[-1][0]))
            if self._store.failure is not None:
                self.unsaved_bytes += sum(len(entry.data) for _, entry in self._batch)
                self.unsaved_bytes += sum(len(record.data) for record in records)
            self._batch.clear()
            if records:
                self._trim()

    def _trim(self) -> None:
        config = self._core.config
        self._store.trim_audit(int(config.audit_max), int(config.audit_bytes))

    def save(self, number: int, saved: Saved, records: Sequence[Draft] = ()) -> None:
        """Hand over a snapshot and the *records* of it, after all that was added before."""
        self.flush()
        self._store.compact(saved, int(self._core.config.log_bytes), records)
        if records:
            self._trim()
        if self._store.failure is not None:
            self.unsaved_bytes += len(saved.data)
        # An empty batch, whose ticket tells when the snapshot before it is committed.
        self._tickets.append((self._store.append(()), number))
        self._core.compacted(saved.document, self._store.floor(saved.document))

    # How far it got

    def note_progress(self) -> None:
        """Tell the core what is committed and synced by now, and the user if the store fails."""
        store = self._store
        ticket = number = 0
        while self._tickets and self._tickets[0][0] <= store.committed:
            ticket, number = self._tickets.popleft()
        if number:
            self._unsynced.append((ticket, number))
            self._core.committed(number, self._loop.time())
        if self._unsynced and self._unsynced[0][0] <= store.synced:
            self._note_syncs()
        if not self._tickets:
            self.unsaved_bytes = 0
        failure = str(store.failure) if store.failure else None
        if failure != self._failed:
            self._failed = failure
            self._emit(StoreFailed(failure) if failure else StoreRecovered())
            if failure and not self._is_retrying:
                self._is_retrying = True
                self._loop.call_later(STORE_RETRY, self._retry)

    def _note_syncs(self) -> None:
        number = 0
        while self._unsynced and self._unsynced[0][0] <= self._store.synced:
            number = self._unsynced.popleft()[1]
        self._core.synced(number, self._loop.time())

    def _on_progress(self) -> None:
        """Called by the store's threads."""
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            # The loop is closed, and with it the replica.
            pass

    def _retry(self) -> None:
        self._is_retrying = not self._is_closed and self._store.failure is not None
        if self._is_retrying:
            self._store.retry()
            self._wake()
            self._loop.call_later(STORE_RETRY, self._retry)

    # Out of the store

    def fetch(self, peer: int, name: str, ranges: tuple[tuple[int, int, int], ...]) -> None:
        """Read changes for a peer, as many as one answer holds."""
        limit = int(self._core.config.answer_bytes)
        size, now = self._store.measure(name, ranges), self._loop.time()
        if self._core.snapshot_instead(peer, name, size, now):
            return
        try:
            found, more = self._store.read(name, ranges, limit)
        except CorruptStore as exc:
            self._emit(StoreFailed(str(exc)))
            return
        self._core.fetched(peer, found, more)
