"""
A journal in an SQLite file, written before anything is sent.

Every `append` and `compact` is entered in the index, queued, and written in the order of the
queue. With ``durability="process"`` the caller writes at once, which survives a kill, and the
upkeep syncs within 100 ms. With ``durability="power"`` a thread writes all that is queued in one
synced transaction. What cannot be written stays queued. A row has its number before it is
written, so writing it again, after a commit that failed but may have reached the disk, replaces
it by itself.

A journal is used by the thread that opened it, and not in a forked child: the child would share
the parent's connections and keep its lock. What is in the file, and how damage shows, is told in
`crdtstate.stores.file`.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import apsw

from crdtstate.audit import Chain, Draft, Query
from crdtstate.audit import Row as Record
from crdtstate.clock import Version
from crdtstate.errors import StoreError
from crdtstate.stores import Entry, Saved, Session
from crdtstate.stores.file import (
    Host,
    Note,
    Row,
    Verification,
    changes,
    checksum,
    connect,
    damage,
    digest,
    migrate,
    packed,
    read_audit,
    read_chain,
    read_indexes,
    read_session,
    snapshots,
    store_error,
    translated,
    verify,
)
from crdtstate.stores.index import NO_CHANGES, DocumentIndex

__all__ = ["Journal", "Verification", "verify"]

GROUP_MAX = 512
"""Queued batches written in one transaction; more would only delay the first of them."""

PRUNE_ROWS = 1000
"""Rows deleted in one transaction: about a millisecond that an append may have to wait."""

PRUNE_PAUSE = 0.001
"""Seconds between two such transactions, for the appends that wait."""

WAL_PAGES = 1024
"""Pages in the WAL that call for a checkpoint: 4 MiB, which take 2 ms to recover."""

WAL_PAGES_LATE = 2 * WAL_PAGES
"""Pages by which the checkpoint may be late before the writer does it, and so slows down."""

WAL_BYTES_MAX = 12 * 2**20
"""The size to which the WAL's file is cut when it starts over."""

# REPLACE, because a commit that failed may have left the row behind.
ADD_DOCUMENT = "INSERT OR REPLACE INTO document VALUES(?, ?)"
ADD_CHANGE = "INSERT OR REPLACE INTO journal VALUES(?, ?, ?, ?, ?, ?)"
ADD_SNAPSHOT = "INSERT OR REPLACE INTO snapshot VALUES(?, ?, ?, ?, ?)"
DELETE_CHANGE = "DELETE FROM journal WHERE id = ?"
GET_CHANGE = "SELECT crc, data FROM journal WHERE id = ?"
ADD_RECORD = "INSERT OR REPLACE INTO audit VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?)"
END_CHAIN = "UPDATE audit_chain SET newest = ?, head = ?"
# Its hash is gone if this was written before, by a commit that seemed to fail.
BEGIN_CHAIN = """UPDATE audit_chain SET dropped = ?1,
    anchor = coalesce((SELECT sha256 FROM audit WHERE id = ?1), anchor)"""
DROP_RECORDS = "DELETE FROM audit WHERE id <= ?"
ADD_EPOCH = """INSERT INTO epoch(agent, writer, opened_ms, boot, place, power_safe)
    VALUES(?, ?, ?, ?, ?, ?)"""
END_EPOCH = "UPDATE epoch SET clean = ? WHERE id = (SELECT max(id) FROM epoch)"


@dataclass(slots=True)
class _Work:
    """What goes into one transaction: a batch of changes, or a compaction."""

    ticket: int  # The batch's; a compaction has that of the batch before it.
    statements: list[tuple[str, Sequence[Row]]]
    forgotten: Sequence[int]  # Rows that may be deleted once this is written.


class Journal:
    """
    A store in an SQLite file.

    Args:
        path: The file. It is created when absent; its directory is not.
        durability: What a commit survives. ``"process"``: at once a kill of the process, after
            100 ms a power cut. ``"power"``: both at once, for one fsync per group of batches.
        host: Makes the `Host`; for tests.
        upkeep_every: Seconds between rounds of `upkeep` while there is something to do. None
            leaves the rounds to the caller; for tests.

    Raises:
        StoreLocked: Another process, or another journal of this one, has the file open.
        StoreUnavailable: The file cannot be written where it is.
        CorruptStore: The file is damaged or not a store of ours; it was not altered.
        StoreError: A newer crdtstate wrote the file; it was not altered.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        durability: Literal["process", "power"] = "process",
        host: Callable[[Path], Host] = Host,
        upkeep_every: float | None = 0.1,
    ) -> None:
        self.path: str | None = str(path)
        self.durability = durability
        self.session = Session(None, None, False, False, False, False)
        self.committed = 0
        self.synced = 0
        self.failure: Exception | None = None
        self._path = str(path)
        self._host = host(Path(path).absolute())
        self._upkeep_every = upkeep_every
        self._on_progress: Callable[[], None] = lambda: None
        self._is_started = False
        self._is_closed = False

        # The caller's thread enters what it is given here; the file follows.
        self._ticket = 0
        self._row = 0
        self._indexes: dict[str, DocumentIndex] = {}
        self._new_documents: list[Row] = []
        self._queue: deque[_Work] = deque()
        self._chain = Chain()

        # Under the lock: the connection that writes (None after an error), what it is writing,
        # and the forgotten rows that are still in the file.
        self._lock = threading.Lock()
        self._db: apsw.Connection | None = None
        self._group: list[_Work] = []
        self._garbage = array("Q")
        self._write_failure: Exception | None = None

        # Of the upkeep. The pages are those in the WAL as of the newest commit.
        self._wal_pages = 0
        self._wal_pages_max = WAL_PAGES
        self._checkpointing = threading.Lock()
        self._is_wal_unsure = False  # Whether what was synced may not be on the disk.
        self._upkeep_failure: Exception | None = None

        # The threads, and what wakes them.
        self._threads: list[threading.Thread] = []
        self._arrived = threading.Event()
        self._dirty = threading.Event()
        self._urgent = threading.Event()

        self._host.lock()
        try:
            with translated(self._path):
                self._open()
        except BaseException:
            self._disconnect()
            self._host.release()
            raise

    # Sessions

    def start(self, agent: str, writer: int, on_progress: Callable[[], None]) -> None:
        """
        Begin a session as *writer*, or change the writer within one.

        Raises:
            StoreUnavailable: The disk refuses to note it; the session has not begun.
        """
        now_ms = time.time_ns() // 1_000_000
        with translated(self._path):
            boot, place = self._host.boot(), self._host.place()
            power_safe = self.durability == "power"
            self._write_synced(ADD_EPOCH, (agent, writer, now_ms, boot, place, power_safe))
            self._host.sync_directory()
            ((number,),) = self._reader.execute("SELECT max(id) FROM epoch")
        self._host.leave_note(Note(number, now_ms, False))
        self._on_progress = on_progress
        if not self._is_started:
            self._is_started = True
            self._start_threads()

    def close(self, *, clean: bool = True) -> None:
        """
        Write what waits and close; *clean* says that nothing was lost. Idempotent.

        If something cannot be written, `failure` says so, and the session is not clean.
        """
        if self._is_closed:
            return
        self._is_closed = True
        for event in (self._arrived, self._dirty, self._urgent):
            event.set()
        for thread in self._threads:
            thread.join()
        if self._is_started:
            self._finish(clean)
        self._close(self._reader)
        self._close(self._checkpointer)
        self._disconnect()
        self._host.release()

    # Reading

    def load(self) -> Iterator[Saved | Entry]:
        """
        Yield all snapshots, then the newer entries, in the order of delivery.

        What is queued is written first, if the disk lets us.

        Raises:
            CorruptStore: A row fails its checksum; names the row.
        """
        self._write()
        versions: dict[str, Version] = {}
        # Before the first pause: the log holds far more than what the snapshots lack.
        unsaved = [index.first_unsaved() for index in self._indexes.values()]
        first = min((row for row in unsaved if row is not None), default=None)
        # In one transaction, or a compaction in between would hide entries from both parts.
        with translated(self._path), self._reader:
            for saved, is_intact in snapshots(self._reader):
                if not is_intact:
                    raise damage(self._path, f"table snapshot, document {saved.document!r}")
                versions[saved.document] = saved.version
                yield saved
            for row, entry, is_intact in changes(self._reader, first) if first is not None else ():
                version = versions.get(entry.document)
                if version and version.covers((entry.writer, entry.seq)):
                    continue
                if not is_intact:
                    raise self._damaged_row(row, entry.document)
                yield entry

    def saved(self, document: str) -> Saved | None:
        """
        The committed snapshot of *document*, if there is one.

        Raises:
            CorruptStore: It fails its checksum.
        """
        number = self._indexes.get(document, NO_CHANGES).number
        with translated(self._path):
            for saved, is_intact in snapshots(self._reader, number):
                if not is_intact:
                    raise damage(self._path, f"table snapshot, document {document!r}")
                return saved
        return None

    def read(
        self, document: str, ranges: Sequence[tuple[int, int, int]], size_max: int
    ) -> tuple[list[bytes], bool]:
        """
        Return the committed changes of *ranges*, in the order of delivery, as far as they fit.

        Raises:
            CorruptStore: A row fails its checksum; names the row.
        """
        found: list[bytes] = []
        rows, more = self._indexes.get(document, NO_CHANGES).find(ranges, size_max)
        with translated(self._path):
            for row, writer, seq in rows:
                stored = self._reader.execute(GET_CHANGE, (row,)).fetchone()
                if stored is None:
                    return found, True  # Still queued.
                crc, data = stored
                if crc != checksum(document, writer, seq, data):
                    raise self._damaged_row(row, document)
                found.append(data)
        return found, more

    def audit(self, query: Query) -> list[Record]:
        """
        The newest committed records that *query* admits, oldest first.

        Raises:
            StoreError: They cannot be read.
        """
        self._write()
        with translated(self._path):
            return read_audit(self._reader, query)

    def measure(self, document: str, ranges: Sequence[tuple[int, int, int]]) -> int:
        """How many bytes the changes of *ranges* have, as far as they are kept."""
        return self._indexes.get(document, NO_CHANGES).measure(ranges)

    def floor(self, document: str) -> Version:
        """Up to which change of each writer the journal has forgotten."""
        return self._indexes.get(document, NO_CHANGES).floor()

    def size(self, document: str) -> int:
        """Bytes of changes, queued ones too, that the document's snapshot does not contain."""
        return self._indexes.get(document, NO_CHANGES).size

    def kept(self, document: str) -> int:
        """Bytes of all changes in the journal, queued ones too."""
        return self._indexes.get(document, NO_CHANGES).kept

    # Writing

    def append(self, entries: Sequence[Entry], records: Sequence[Draft] = ()) -> int:
        """Queue *entries*, and the audit's *records* of them, for one atomic commit and return
        the ticket; see `failure`."""
        rows: list[Row] = []
        row = self._row
        for entry in entries:
            row += 1
            document, writer, seq, data = entry.document, entry.writer, entry.seq, entry.data
            index = self._indexes.get(document) or self._add_index(document)
            index.add(writer, seq, row, len(data))
            crc = checksum(document, writer, seq, data)
            rows.append((row, index.number, writer, seq, crc, data))
        self._row = row
        self._ticket += 1
        self._submit(ADD_CHANGE, rows, (), records)
        return self._ticket

    def compact(self, saved: Saved, keep_bytes: int, records: Sequence[Draft] = ()) -> None:
        """
        Keep *saved* as the document's snapshot and forget old changes that it contains.

        The floor rises at once. The snapshot and the floor are queued like a batch; when they
        are written, the upkeep deletes the forgotten rows.
        """
        index = self._indexes.get(saved.document) or self._add_index(saved.document)
        forgotten = index.compact(saved.version, keep_bytes)
        version, floor = packed(saved.version), packed(index.floor())
        sha256 = digest(saved.document, version, floor, saved.data)
        row = (index.number, version, floor, sha256, saved.data)
        self._submit(ADD_SNAPSHOT, [row], forgotten, records)

    def trim_audit(self, rows_max: int, bytes_max: int) -> None:
        """Drop the oldest records of the audit until at most so many are left."""
        before = self._chain.dropped
        if (dropped := self._chain.trim(rows_max, bytes_max)) > before:
            self._submit(BEGIN_CHAIN, [(dropped,)], (), (), [(DROP_RECORDS, [(dropped,)])])

    def forget(self, writer: int, after: Mapping[str, int]) -> None:
        """
        Remove for ever the changes of *writer* above ``after[document]`` from all documents.

        Raises:
            StoreUnavailable: The disk refuses; nothing was removed.
            StoreError: A snapshot contains some of them; nothing was removed.
        """
        self._write()
        if self._write_failure:
            raise self._write_failure
        rows: list[Row] = []
        for document, index in self._indexes.items():
            if index.saved.get(writer, 0) > after.get(document, 0):
                reason = f"the snapshot of {document!r} contains changes that must be removed"
                advice = "move the file away: a new one fills from the peers"
                raise StoreError(self._path, f"{reason}; {advice}")
            rows += ((row,) for row in index.rows_after(writer, after.get(document, 0)))
        with translated(self._path), self._lock:
            self._transact([(DELETE_CHANGE, rows)])
        for document, index in self._indexes.items():
            index.cut(writer, after.get(document, 0))

    def hurry(self) -> None:
        """Let the upkeep sync what is committed now, and not in its own time."""
        self._urgent.set()

    def retry(self) -> None:
        """Try again to write what waits after a `failure`."""
        if self.durability == "power":
            self._arrived.set()
        else:
            self._write()

    def upkeep(self) -> None:
        """
        Sync what is committed, checkpoint the WAL if it is long, delete some forgotten rows.

        A thread of its own does this every 100 ms, or sooner when the WAL grows fast: done
        inline, it would be what an append waits for longest.
        """
        before = self.synced, str(self.failure)
        self._dirty.clear()
        try:
            if self.durability == "process":
                self._sync()
            if self._wal_pages > self._wal_pages_max:
                self._checkpoint()
            if self._garbage:
                self._prune()
            self._upkeep_failure = None
        except Exception as exc:
            self._upkeep_failure = store_error(self._path, exc)
            self._is_wal_unsure |= isinstance(exc, apsw.IOError | OSError)
            self._dirty.set()
        self._note_failure()
        if (self.synced, str(self.failure)) != before:
            self._on_progress()

    # Opening and closing

    def _open(self) -> None:
        db = self._connect_writer()
        self._host.sync_directory()
        self._indexes, self._garbage, self._row = read_indexes(db, self._path)
        self._chain = read_chain(db)
        self.session = read_session(db, self._host)
        if self._host.has_shared_memory:
            self._reader = connect(self._path, self._host.vfs)
            self._checkpointer = connect(self._path, self._host.vfs)
            # A connection that has read nothing has no WAL, and checkpoints nothing.
            self._checkpointer.pragma("user_version")

    def _connect_writer(self) -> apsw.Connection:
        db = connect(self._path, self._host.vfs)
        try:
            if not self._host.has_shared_memory:
                db.pragma("locking_mode", "EXCLUSIVE")
                self._reader = self._checkpointer = db
            migrate(db, Path(self._path))
            # NORMAL, not OFF: a power cut may then take the newest commits, but never the file.
            db.pragma("synchronous", "FULL" if self.durability == "power" else "NORMAL")
            db.pragma("journal_size_limit", WAL_BYTES_MAX)
            db.set_wal_hook(self._note_wal)
        except BaseException:
            self._close(db)
            raise
        self._db = db
        return db

    def _disconnect(self) -> None:
        if self._db is not None:
            self._close(self._db)
            self._db = None

    def _close(self, db: apsw.Connection) -> None:
        # The last to close does a checkpoint. It may fail, but must not spread half a WAL.
        with suppress(apsw.Error):
            if self._is_wal_unsure:
                db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            db.close()

    def _start_threads(self) -> None:
        loops = [self._write_on_arrival] if self.durability == "power" else []
        if self._upkeep_every is not None:
            loops.append(self._keep_up)
        for loop in loops:
            name = f"{loop.__name__} {Path(self._path).name}"
            thread = threading.Thread(target=loop, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _finish(self, clean: bool) -> None:
        self._write()
        if self._write_failure:
            return
        try:
            if self.durability == "process":
                self._sync()
            self._write_synced(END_EPOCH, (clean,))
            if clean and self._host.note is not None:
                self._host.leave_note(self._host.note._replace(clean=True))
        except Exception as exc:
            self._write_failure = store_error(self._path, exc)
            self._note_failure()

    # Writing, by the caller or by the writing thread

    def _add_index(self, document: str) -> DocumentIndex:
        number = len(self._indexes) + 1
        self._indexes[document] = DocumentIndex(number)
        self._new_documents.append((number, document))
        return self._indexes[document]

    def _submit(
        self,
        sql: str,
        rows: Sequence[Row],
        forgotten: Sequence[int],
        records: Sequence[Draft],
        more: Sequence[tuple[str, Sequence[Row]]] = (),
    ) -> None:
        assert self._is_started and not self._is_closed, "write between start() and close()"
        work = _Work(self._ticket, [(sql, rows), *more], forgotten)
        if records:
            linked = list(map(self._chain.add, records))
            work.statements.append((ADD_RECORD, linked))
            work.statements.append((END_CHAIN, [(linked[-1].number, linked[-1].hash)]))
        if self._new_documents:
            work.statements.append((ADD_DOCUMENT, self._new_documents))
            self._new_documents = []
        self._queue.append(work)
        self.retry()

    def _write_on_arrival(self) -> None:
        while not self._is_closed:
            self._arrived.wait()
            self._arrived.clear()
            self._write()

    def _write(self) -> None:
        """Write what is queued, in order, as far as the disk lets us."""
        while self._queue or self._group:
            with self._lock:
                while self._queue and len(self._group) < GROUP_MAX:
                    self._group.append(self._queue.popleft())
                if self._group:
                    self._write_group(self._group)
            if self.durability == "power":
                self._on_progress()
            if self._write_failure:
                return

    def _write_group(self, group: list[_Work]) -> None:
        try:
            self._transact([statement for work in group for statement in work.statements])
        except Exception as exc:
            self._write_failure = store_error(self._path, exc)
            self._note_failure()
            return
        if self._write_failure:
            self._write_failure = None
            self._note_failure()
        self.committed = group[-1].ticket
        if self.durability == "power":
            self.synced = self.committed
        for work in group:
            self._garbage.extend(work.forgotten)
        group.clear()
        if not self._dirty.is_set():
            self._dirty.set()

    def _transact(self, statements: Sequence[tuple[str, Sequence[Row]]]) -> None:
        """Run *statements* in one transaction. The caller holds the lock."""
        if self._is_wal_unsure:
            self._renew_wal()
        if self._wal_pages > self._wal_pages_max + WAL_PAGES_LATE:
            self._restart_wal()
        db = self._db or self._connect_writer()
        try:
            if len(statements) == 1 and len(statements[0][1]) == 1:
                # A statement alone is a transaction, and the usual one after a lone write.
                ((sql, (row,)),) = statements
                db.execute(sql, row)
                return
            db.execute("BEGIN IMMEDIATE")
            for sql, rows in statements:
                db.executemany(sql, rows)
            db.execute("COMMIT")
        except BaseException as exc:
            # The commit may be on the disk or not, and this connection's view of the file may
            # be wrong. The next attempt reads the file anew.
            self._is_wal_unsure |= isinstance(exc, apsw.IOError)
            self._disconnect()
            raise

    def _renew_wal(self) -> None:
        self._host.renew_wal()
        self._is_wal_unsure = False

    def _write_synced(self, sql: str, row: Row) -> None:
        """Write *row* and bring it, with all that is committed, to the disk."""
        with self._lock:
            db = self._db or self._connect_writer()
            mode = db.pragma("synchronous")
            db.pragma("synchronous", "FULL")
            self._transact([(sql, [row])])
            db.pragma("synchronous", mode)

    def _note_wal(self, _db: apsw.Connection, _name: str, pages: int) -> int:
        self._wal_pages = pages
        if pages > self._wal_pages_max:
            self._dirty.set()
            self._urgent.set()
        return apsw.SQLITE_OK

    def _note_failure(self) -> None:
        self.failure = self._write_failure or self._upkeep_failure

    def _damaged_row(self, row: int, document: str) -> Exception:
        return damage(self._path, f"table journal, row {row}, document {document!r}")

    # Upkeep, by its thread

    def _keep_up(self) -> None:
        while not self._is_closed:
            self._dirty.wait()
            self.upkeep()
            is_pruning = self._garbage and not self._upkeep_failure
            self._urgent.wait(PRUNE_PAUSE if is_pruning else self._upkeep_every)
            self._urgent.clear()

    def _sync(self) -> None:
        ticket = self.committed
        if self._is_wal_unsure:
            with self._lock:
                self._renew_wal()
        else:
            self._host.sync_wal()
        self.synced = ticket

    def _checkpoint(self) -> None:
        if self._host.has_shared_memory:
            with self._checkpointing:
                self._checkpointer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        # The WAL starts over only when all of it is moved, and a busy writer is always some
        # commits ahead: hold it while the last few are moved.
        with self._lock:
            self._restart_wal()

    def _restart_wal(self) -> None:
        """Move what is left in the WAL, so that it starts over. The caller holds the lock."""
        try:
            with self._checkpointing:
                self._checkpointer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
            self._wal_pages, self._wal_pages_max = 0, WAL_PAGES
        except apsw.BusyError:
            # Another program is reading an old state. Try again some pages later.
            self._wal_pages_max = self._wal_pages + WAL_PAGES

    def _prune(self) -> None:
        with self._lock:
            rows = [(row,) for row in self._garbage[:PRUNE_ROWS]]
            self._transact([(DELETE_CHANGE, rows)])
            del self._garbage[:PRUNE_ROWS]
