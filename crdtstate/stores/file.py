"""
The journal's file: its format, its checksums, its owner, and how to tell that it is damaged.

An SQLite file of tables: documents (names for numbers), the journal (changes, in the order of
delivery), snapshots (one per document, with the floor), epochs (one per session), and the audit
with the ends of its chain. Damage
is found, never returned as data: pages carry a checksum (SQLite's checksum VFS), changes a
CRC-32, snapshots a SHA-256. Only the rotten tail of a WAL goes unnoticed; peers notice it.

A file has one owner at a time, by a lock beside it (``<path>.lock``), in which it notes the session
that the file has come to: so an old copy that is put back is known. Others may read the file. The
owner must never open() the file itself: closing any descriptor of it drops SQLite's locks.
"""

from __future__ import annotations

import fcntl
import os
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import apsw
import apsw.sqlite_extra
import msgpack

from crdtstate.audit import NO_HASH, Chain, Query, broken, size_of
from crdtstate.audit import Row as Record
from crdtstate.authors import Authors
from crdtstate.clock import Version
from crdtstate.document import EngineFailure
from crdtstate.documents import DocumentSet
from crdtstate.errors import (
    CorruptStore,
    InvalidUpdate,
    StoreError,
    StoreLocked,
    StoreUnavailable,
)
from crdtstate.stores import Entry, Saved, Session, suspects
from crdtstate.stores.chains import Chains
from crdtstate.stores.index import DocumentIndex

APPLICATION_ID = 0x43524454  # "CRDT"

MIGRATIONS: tuple[str, ...] = (
    """
    PRAGMA application_id = 0x43524454;
    CREATE TABLE document(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
    CREATE TABLE journal(
        id INTEGER PRIMARY KEY, document INTEGER NOT NULL, writer INTEGER NOT NULL,
        seq INTEGER NOT NULL, crc INTEGER NOT NULL, data BLOB NOT NULL) STRICT;
    CREATE TABLE snapshot(
        document INTEGER PRIMARY KEY, version BLOB NOT NULL, floor BLOB NOT NULL,
        sha256 BLOB NOT NULL, data BLOB NOT NULL) STRICT;
    CREATE TABLE epoch(
        id INTEGER PRIMARY KEY, agent TEXT NOT NULL, writer INTEGER NOT NULL,
        opened_ms INTEGER NOT NULL, boot TEXT, place TEXT NOT NULL,
        power_safe INTEGER NOT NULL, clean INTEGER NOT NULL DEFAULT 0) STRICT;
    """,
    """
    CREATE TABLE audit(
        id INTEGER PRIMARY KEY, kind TEXT NOT NULL, agent TEXT NOT NULL, document TEXT NOT NULL,
        place TEXT NOT NULL, stamp INTEGER NOT NULL, at_ms INTEGER NOT NULL, data BLOB NOT NULL,
        sha256 BLOB NOT NULL) STRICT;
    CREATE INDEX audit_place ON audit(document, place);
    CREATE TABLE audit_chain(
        id INTEGER PRIMARY KEY CHECK(id = 1), dropped INTEGER NOT NULL, anchor BLOB NOT NULL,
        newest INTEGER NOT NULL, head BLOB NOT NULL) STRICT;
    INSERT INTO audit_chain VALUES(1, 0, zeroblob(32), 0, zeroblob(32));
    """,
)
"""Each brings a file from one schema to the next; a new file has schema 0. Only append to it."""

Row = tuple[Any, ...]

_fdatasync = getattr(os, "fdatasync", os.fsync)  # macOS lacks fdatasync.


class Note(NamedTuple):
    """Which session a file has come to, as it stands beside the file, in ``<path>.lock``: a copy of
    the file that is put back does not bring back the note.

    Attributes:
        epoch: The number of the session.
        opened_ms: When it began, which tells it from one of the same number in another copy.
        clean: Whether it was closed in order.
    """

    epoch: int
    opened_ms: int
    clean: bool

    @classmethod
    def parse(cls, data: bytes) -> Note | None:
        """Read the contents of a lock file; None if there is no note in it."""
        match = re.search(rb"^epoch (\d{1,18}) of (\d{1,18}) (open|closed)$", data, re.MULTILINE)
        return cls(int(match[1]), int(match[2]), match[3] == b"closed") if match else None

    def __str__(self) -> str:
        return f"epoch {self.epoch} of {self.opened_ms} {'closed' if self.clean else 'open'}\n"


def is_rolled_back(epoch: Note | None, note: Note | None) -> bool:
    """Whether a file whose newest session is *epoch* is older than *note*, which was left beside
    it. The file is written first, so it may be ahead of the note, and never behind it."""
    if note is None:
        return False
    if epoch is None or epoch.epoch < note.epoch:
        return True
    if epoch.epoch > note.epoch:
        return False
    return epoch.opened_ms != note.opened_ms or (note.clean and not epoch.clean)


def _owner_of(lock: Path) -> str:
    return lock.read_text().partition("\n")[0] or "?"


class Host:
    """What a journal asks of the operating system besides SQLite. Tests bring their own."""

    vfs = "cksmvfs"
    has_shared_memory = True
    """Without it, the WAL's index is private to a connection, so there can be only one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # What the last owner noted beside the file, if there was one.
        self.note: Note | None = None
        self._lock: int | None = None
        self._holds = 0
        self._wal: int | None = None

    def lock(self) -> None:
        """Become the file's owner, or raise. Who is the owner already is so once more, and gives
        it up as often."""
        if self._lock is not None:
            self._holds += 1
            return
        if self.path.is_dir():
            raise StoreUnavailable(self.path, "this is a directory; name a file in it")
        lock = Path(f"{self.path}.lock")
        try:
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.note = Note.parse(os.pread(self._lock, 1000, 0))
            self._write_lock()
            self._holds = 1
        except BlockingIOError:
            self.release()
            reason = f"process {_owner_of(lock)} has it open and holds {lock.name}"
            raise StoreLocked(self.path, f"{reason}; close it there, or use another file") from None
        except (FileNotFoundError, NotADirectoryError):
            reason = f"there is no directory {lock.parent}; create it first"
            raise StoreUnavailable(self.path, reason) from None
        except OSError as exc:
            self.release()
            reason = f"cannot write {lock} ({exc.strerror}); make its directory writable"
            raise StoreUnavailable(self.path, reason) from exc

    def release(self) -> None:
        """Give up ownership. Idempotent."""
        if self._wal is not None:
            os.close(self._wal)
            self._wal = None
        self._holds = max(0, self._holds - 1)
        if self._lock is not None and not self._holds:
            os.close(self._lock)
            self._lock = None

    def leave_note(self, note: Note) -> None:
        """Note beside the file what it has come to, for `is_rolled_back`. It is there to tell of a
        copy that was put back, so losing it loses nothing else."""
        self.note = note
        if self._lock is not None:
            with suppress(OSError):
                self._write_lock()

    def _write_lock(self) -> None:
        assert self._lock is not None
        text = f"{os.getpid()}\n{self.note or ''}".encode()
        # Never empty: a kill in between must not lose the note.
        os.pwrite(self._lock, text, 0)
        os.ftruncate(self._lock, len(text))

    def boot(self) -> str | None:
        """What changes when the machine reboots; None where nobody can tell."""
        try:
            return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None

    def place(self) -> str:
        """What changes when the file is copied, moved or restored."""
        found = self.path.stat()
        return f"{found.st_dev}:{found.st_ino}:{self.path}"

    def sync_wal(self) -> None:
        """Bring what is committed to the disk, while more is being committed."""
        if self._wal is None:
            self._wal = os.open(f"{self.path}-wal", os.O_RDONLY)
        _fdatasync(self._wal)

    def renew_wal(self) -> None:
        """
        Write the WAL once more, as it is, and sync that. Nobody may write to it meanwhile.

        After an fsync that failed, the kernel may take pages for clean that never reached the
        disk, and the next fsync succeeds for nothing. The pages are still in its cache.
        """
        with open(f"{self.path}-wal", "r+b", buffering=0) as wal:
            offset = 0
            while part := os.pread(wal.fileno(), 2**20, offset):
                offset += os.pwrite(wal.fileno(), part, offset)
            _fdatasync(wal.fileno())

    def sync_directory(self) -> None:
        """Bring the names of new files to the disk."""
        sync(self.path.parent)


def connect(
    path: str | Path,
    vfs: str = Host.vfs,
    flags: int = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE,
) -> apsw.Connection:
    """Open the file. Nothing is read yet, so nothing is checked yet."""
    if vfs not in apsw.vfs_names():
        default = apsw.vfs_names()[0]
        with closing(apsw.Connection(":memory:")) as db:
            apsw.sqlite_extra.load(db, "cksumvfs")
        apsw.set_default_vfs(default)  # Loading made it the default of the whole process.
    return apsw.Connection(str(path), flags=flags, vfs=vfs)


def migrate(db: apsw.Connection, path: Path, steps: Sequence[str] = MIGRATIONS) -> None:
    """
    Bring a file to the newest schema, from none or from that of an older crdtstate.

    An older file is first copied to ``<name>.pre-v<schema>.db``.

    Raises:
        StoreError: The schema is newer than *steps* lead to.
        CorruptStore: The file is not a store.
        StoreUnavailable: The file cannot be written.
    """
    _check_is_ours(db, path)
    if db.readonly("main"):
        raise StoreUnavailable(path, "the file is read-only; make it writable")
    schema = db.pragma("user_version")
    if schema > len(steps):
        reason = f"a newer crdtstate wrote it (schema {schema}, this one knows {len(steps)})"
        raise StoreError(path, f"{reason}; upgrade crdtstate")
    # EXTRA also syncs the directory. Without it a power cut can bring back the rollback journal
    # of this transaction, or of the switch to WAL, and SQLite would undo what came after it.
    db.pragma("synchronous", "EXTRA")
    if schema == 0:
        db.reserve_bytes("main", 8)  # For the checksum of each page.
    elif schema < len(steps):
        _back_up(db, path.with_name(f"{path.stem}.pre-v{len(steps)}{path.suffix}"))
    if schema < len(steps):
        db.execute("BEGIN IMMEDIATE")
        for step in steps[schema:]:
            db.execute(step)
        db.pragma("user_version", len(steps))
        db.execute("COMMIT")
    if db.pragma("journal_mode", "WAL") != "wal":
        raise StoreUnavailable(path, "its file system cannot share memory; use a local disk")


def claims_to_be_ours(path: Path) -> bool:
    """Whether the file's header says that it is a store, however damaged the rest may be."""
    try:
        with open(path, "rb") as file:
            header = file.read(72)
    except OSError:
        return False
    # Where SQLite keeps the application's id.
    return header[68:] == APPLICATION_ID.to_bytes(4, "big")


def _check_is_ours(db: apsw.Connection, path: str | Path) -> None:
    application = db.pragma("application_id")
    if application == APPLICATION_ID:
        return
    if application or db.execute("SELECT 1 FROM sqlite_schema").fetchone():
        what = f"another program's SQLite file (application_id {application:#x})"
        raise CorruptStore(path, f"this is {what}, not a crdtstate store; use another file")


def _back_up(db: apsw.Connection, copy: Path) -> None:
    partial = copy.with_name(f"{copy.name}.partial")
    partial.unlink(missing_ok=True)
    db.execute("VACUUM INTO ?", (str(partial),))
    sync(partial)
    partial.replace(copy)
    sync(copy.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading


def read_session(db: apsw.Connection, host: Host) -> Session:
    """Return what the newest epoch tells of the store's last user."""
    last = db.execute(
        """SELECT agent, writer, clean, boot, place, power_safe, id, opened_ms
        FROM epoch ORDER BY id DESC LIMIT 1"""
    ).fetchone()
    if last is None:
        return Session(None, None, False, False, False, False)
    agent, writer, clean, boot, place, power_safe, number, opened_ms = last
    same_boot = boot is not None and boot == host.boot()
    same_file = place == host.place()
    if is_rolled_back(Note(number, opened_ms, bool(clean)), host.note):
        same_file = False
    found = db.execute("SELECT DISTINCT writer FROM epoch WHERE place IS ?", (host.place(),))
    writers = frozenset(writer for (writer,) in found)
    return Session(agent, writer, bool(clean), same_boot, same_file, bool(power_safe), writers)


def read_agent(path: str | Path) -> str:
    """The name of the agent that used a store last; raises what `reading` does."""
    with reading(path) as db:
        found = db.execute("SELECT agent FROM epoch ORDER BY id DESC LIMIT 1").fetchone()
    if found is None:
        raise CorruptStore(path, "nobody has used it yet")
    agent: str = found[0]
    return agent


def read_indexes(
    db: apsw.Connection, path: str
) -> tuple[dict[str, DocumentIndex], array[int], int]:
    """Return the index of each document, the rows under the floors, and the newest row."""
    indexes: dict[str, DocumentIndex] = {}
    by_number: dict[int, DocumentIndex] = {}
    versions: dict[int, Version] = {}
    garbage, newest = array("Q"), 0
    for number, name, version, floor in db.execute(
        """SELECT document.id, name, version, floor
        FROM document LEFT JOIN snapshot ON snapshot.document = document.id"""
    ):
        index = indexes[name] = by_number[number] = DocumentIndex(number)
        if floor is not None:
            versions[number] = unpacked(version)
            index.start_at(unpacked(floor))
    for newest, number, writer, seq, size in db.execute(
        "SELECT id, document, writer, seq, length(data) FROM journal ORDER BY id"
    ):
        if number not in by_number:
            raise damage(path, f"table journal, row {newest}, document number {number}")
        index = by_number[number]
        if seq == index.newest(writer) + 1:
            index.add(writer, seq, newest, size)
        elif writer in index.writers and seq < index.writers[writer].first:
            garbage.append(newest)
        else:
            gap = f"change {seq} after {index.newest(writer)}"
            raise damage(path, f"table journal, row {newest}, {gap}")
    for number, version in versions.items():
        by_number[number].save(version)
    return indexes, garbage, newest


def snapshots(db: apsw.Connection, number: int | None = None) -> Iterator[tuple[Saved, bool]]:
    """Yield all snapshots, or that of document *number*, and whether they are intact."""
    for name, version, floor, stored, data in db.execute(
        """SELECT name, version, floor, sha256, data
        FROM snapshot LEFT JOIN document ON snapshot.document = document.id
        WHERE ?1 IS NULL OR snapshot.document = ?1""",
        (number,),
    ):
        is_intact = stored == digest(name, version, floor, data)
        yield Saved(name, unpacked(version) if is_intact else Version(), data), is_intact


def changes(db: apsw.Connection, first: int = 0) -> Iterator[tuple[int, Entry, bool]]:
    """Yield row, entry and whether it is intact, in the order of delivery, from row *first* on."""
    names: dict[int, str] = dict(db.execute("SELECT id, name FROM document"))
    for row, number, writer, seq, crc, data in db.execute(
        "SELECT id, document, writer, seq, crc, data FROM journal WHERE id >= ?1 ORDER BY id",
        (first,),
    ):
        entry = Entry(names.get(number, ""), writer, seq, data)
        yield row, entry, crc == checksum(entry.document, writer, seq, data)


READ_AUDIT = "SELECT id, kind, agent, document, place, stamp, at_ms, data, sha256 FROM audit"


def read_audit(db: apsw.Connection, query: Query) -> list[Record]:
    """The newest records of the audit that *query* admits, oldest first."""
    found = db.execute(
        f"""{READ_AUDIT} WHERE id > ?1 AND at_ms >= ?2
        AND (?3 IS NULL OR document = ?3) AND (?4 IS NULL OR place = ?4)
        AND (?5 IS NULL OR agent = ?5) AND (?6 IS NULL OR kind = ?6)
        ORDER BY id DESC LIMIT ?7""",
        query,
    )
    return [Record(*row) for row in found][::-1]


def read_chain(db: apsw.Connection) -> Chain:
    """The end of the audit's chain, to go on from."""
    found: Any = db.execute("SELECT dropped, newest, head FROM audit_chain").fetchone()
    dropped, newest, head = found or (0, 0, NO_HASH)
    lengths = db.execute("SELECT length(data) FROM audit ORDER BY id")
    return Chain(dropped, newest, head, (size_of(length) for (length,) in lengths))


def checksum(document: str, writer: int, seq: int, data: bytes) -> int:
    """The CRC of a change; covers whose and which it is."""
    return zlib.crc32(data, _checksum_of_origin(document, writer) ^ seq)


@lru_cache(4096)
def _checksum_of_origin(document: str, writer: int) -> int:
    return zlib.crc32(f"{writer} {document}".encode())


def digest(document: str | None, version: bytes, floor: bytes, data: bytes) -> bytes:
    """The SHA-256 of a snapshot; covers whose and which it is."""
    return sha256(msgpack.packb([document, version, floor]) + data).digest()


def packed(version: Version) -> bytes:
    """A version as a column has it."""
    return bytes(msgpack.packb(version.flat()))


def unpacked(column: bytes) -> Version:
    """The inverse of `packed`."""
    return Version.from_flat(msgpack.unpackb(column))


# Looking, without becoming the owner


@contextmanager
def reading(path: str | Path) -> Iterator[apsw.Connection]:
    """
    Open a store to look at it as it is now, whatever its owner writes meanwhile.

    Alters nothing and leaves nothing beside the file, except that SQLite needs a ``-shm`` to
    read the WAL of an owner that was killed.

    Raises:
        StoreUnavailable: There is no such file, or it cannot be read.
        CorruptStore: It is not a store, or what was read is damaged.
    """
    if Path(path).is_dir():
        raise StoreUnavailable(path, "this is a directory; name a file in it")
    if not Path(path).is_file():
        raise StoreUnavailable(path, "there is no such file")
    uri = f"file:{quote(str(Path(path).absolute()))}"
    if _is_at_rest(path):
        # Else SQLite makes a WAL and its index, and fails where the directory is read-only.
        uri += "?immutable=1"
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    with translated(path), closing(connect(uri, flags=flags)) as db:
        db.execute("BEGIN")
        _check_is_ours(db, path)
        if not db.pragma("application_id"):
            raise CorruptStore(path, "this is empty, not a crdtstate store")
        yield db


def _is_at_rest(path: str | Path) -> bool:
    """Whether all there is, is in the file itself: no owner is writing, none was killed."""
    wal = Path(f"{path}-wal")
    return not wal.exists() or not wal.stat().st_size


def read_documents(
    db: apsw.Connection, path: str | Path, only: Collection[str] | None = None
) -> DocumentSet:
    """
    Load all documents, or *only* those of these names, as a replica that opens the store does.

    Raises:
        CorruptStore: Names the first snapshot or change that is damaged or does not fit.
    """
    documents = DocumentSet("reader", 1, lambda: 0)
    documents.witness = suspects.Known(path)
    # The validators are the agents'; without them it shows what these would hide.
    documents.admits_unjudged = True
    for saved, is_intact in snapshots(db):
        if only is not None and saved.document not in only:
            continue
        if not is_intact:
            raise damage(path, f"table snapshot, document {saved.document!r}")
        with _fitting(path, saved.document, "snapshot"):
            documents.load_snapshot(saved.document, saved.data)
    for row, entry, is_intact in changes(db):
        if only is not None and entry.document not in only:
            continue
        found = documents.find(entry.document)
        if found and found.version.covers((entry.writer, entry.seq)):
            continue
        if not is_intact:
            raise damage(path, f"table journal, row {row}, document {entry.document!r}")
        with _fitting(path, entry.document, f"change {entry.writer:x}:{entry.seq}"):
            documents.load_change(entry.document, entry.data)
    return documents


@contextmanager
def _fitting(path: str | Path, document: str, what: str) -> Iterator[None]:
    try:
        yield
    except (InvalidUpdate, EngineFailure) as exc:
        reason = f"document {document!r}: {what}: {exc}"
        raise CorruptStore(path, reason + _advice(path)) from exc


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found. The store is sound if there are no problems."""

    documents: int
    snapshots: int
    changes: int
    bytes: int
    """Of the contents of snapshots and changes."""
    records: int
    """Of the audit."""
    problems: list[str]
    quarantined: list[str] = field(default_factory=list)
    """What its owner gives to pycrdt no more, because the process died of it; see `suspects`."""
    proven: int = 0
    """Changes that are their writers', if that was asked for."""


def verify(path: str | Path, authors: Authors | None = None) -> Verification:
    """
    Read a whole store and report what is damaged, or else the first change that does not fit
    what came before it. Its owner may go on using it meanwhile. Alters nothing; see `reading`.

    Args:
        authors: Checks the proofs of changes, too.

    Raises:
        StoreUnavailable: There is no such file, or it cannot be read.
        CorruptStore: It is not a store, or its first page is damaged.
    """
    count: Counter[str] = Counter()
    try:
        with reading(path) as db:
            was_at_rest, written = _is_at_rest(path), os.stat(path).st_mtime_ns
            checks: tuple[Check, ...] = (_page_problems, _snapshot_problems, _change_problems)
            chains = Chains(authors)
            checks += (_gap_problems, _audit_problems, partial(_chain_problems, chains))
            problems = _problems(checks, db, path, count)
            if not problems:
                problems = _problems((_misfits,), db, path, count)
    except CorruptStore as exc:
        raise CorruptStore(path, _reason(path, exc)) from exc
    if problems and was_at_rest and os.stat(path).st_mtime_ns != written:
        raise StoreUnavailable(path, "it was written to while it was read; try again")
    return Verification(
        count["documents"],
        count["snapshots"],
        count["changes"],
        count["bytes"],
        count["records"],
        problems,
        [str(suspect) for suspect in suspects.read(path) if suspect.is_quarantined],
        chains.proven,
    )


Check = Callable[[apsw.Connection, str | Path, Counter[str]], Iterator[str]]
"""Yields what is wrong, and counts what it sees."""


def _problems(
    checks: Sequence[Check], db: apsw.Connection, path: str | Path, count: Counter[str]
) -> list[str]:
    # Several checks meet the same damaged page; a dict says it once.
    problems: dict[str, None] = {}
    for check in checks:
        try:
            for problem in check(db, path, count):
                problems[problem] = None
        except (apsw.Error, StoreError) as exc:
            problems[_reason(path, exc)] = None
    return list(problems)


def _reason(path: str | Path, exc: Exception) -> str:
    """What is wrong, for somebody who is verifying already."""
    return store_error(path, exc).reason.removesuffix(_advice(path))


def _page_problems(db: apsw.Connection, path: str | Path, count: Counter[str]) -> Iterator[str]:
    for (text,) in db.execute("PRAGMA quick_check"):
        yield from (line for line in text.splitlines() if line != "ok" and "***" not in line)


def _snapshot_problems(db: apsw.Connection, path: str | Path, count: Counter[str]) -> Iterator[str]:
    for saved, is_intact in snapshots(db):
        count["snapshots"] += 1
        count["bytes"] += len(saved.data)
        if not is_intact:
            yield f"table snapshot, document {saved.document!r}: wrong SHA-256"


def _change_problems(db: apsw.Connection, path: str | Path, count: Counter[str]) -> Iterator[str]:
    for row, entry, is_intact in changes(db):
        count["changes"] += 1
        count["bytes"] += len(entry.data)
        if not is_intact:
            yield f"table journal, row {row}, document {entry.document!r}: wrong CRC"


def _chain_problems(
    chains: Chains, db: apsw.Connection, path: str | Path, count: Counter[str]
) -> Iterator[str]:
    yield from chains.snapshots((s.document, s.data) for s, is_intact in snapshots(db) if is_intact)
    intact = ((row, entry.document, entry.data) for row, entry, is_it in changes(db) if is_it)
    yield from chains.changes(intact)


def _gap_problems(db: apsw.Connection, path: str | Path, count: Counter[str]) -> Iterator[str]:
    indexes, _, _ = read_indexes(db, str(path))
    count["documents"] = len(indexes)
    yield from ()


def _audit_problems(db: apsw.Connection, path: str | Path, count: Counter[str]) -> Iterator[str]:
    if not db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'audit'").fetchone():
        # Of an older schema.
        return
    ends: Any = db.execute("SELECT dropped, anchor, newest, head FROM audit_chain").fetchall()
    if len(ends) != 1:
        yield "table audit_chain: its row is missing"
        return

    def rows() -> Iterator[Record]:
        for row in db.execute(f"{READ_AUDIT} ORDER BY id"):
            count["records"] += 1
            yield Record(*row)

    try:
        yield from broken(rows(), *ends[0])
    except UnicodeDecodeError:
        yield f"table audit, row {ends[0][0] + count['records'] + 1}: a text is not UTF-8"


def _misfits(db: apsw.Connection, path: str | Path, count: Counter[str]) -> Iterator[str]:
    read_documents(db, path)
    yield from ()


# Errors


@contextmanager
def translated(path: str | Path) -> Iterator[None]:
    """Raise SQLite's and the system's errors as `StoreError`."""
    try:
        yield
    except (apsw.Error, OSError) as exc:
        raise store_error(path, exc) from exc


def damage(path: str | Path, where: str) -> CorruptStore:
    """The error for damaged data at *where*."""
    return CorruptStore(path, f"{where} is damaged{_advice(path)}")


def _advice(path: str | Path) -> str:
    away = "then move the file away: a new one fills from the peers"
    return f"; check it with: crdtstate verify {path}, {away}"


def store_error(path: str | Path, exc: Exception) -> StoreError:
    """What *exc* means for the store, and what to do."""
    match exc:
        case StoreError():
            return exc
        case apsw.NotADBError():
            reason = (
                "this is not an SQLite file, so not a crdtstate store, or its header is damaged"
            )
            return CorruptStore(path, reason)
        case apsw.CorruptError():
            return damage(path, f"an SQLite page ({exc})")
        case apsw.IOError() if getattr(exc, "extendedresult", 0) == apsw.SQLITE_IOERR_DATA:
            return damage(path, "a page (wrong checksum)")
        case apsw.FullError():
            return StoreUnavailable(path, "the disk is full; free some space")
        case apsw.BusyError() | apsw.LockedError():
            return StoreUnavailable(path, "another program is writing to it; end that program")
        case apsw.CantOpenError():
            return StoreUnavailable(
                path, "it cannot be opened; make it and what is beside it (-wal, -shm) accessible"
            )
        case apsw.ReadOnlyError():
            return StoreUnavailable(path, "read-only; make the file and its directory writable")
        case _:
            return StoreUnavailable(path, f"{type(exc).__name__}: {exc}; check the disk")
