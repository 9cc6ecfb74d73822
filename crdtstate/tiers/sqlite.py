"""
A tier in an SQLite file: on the disk before `put` returns, and checked for damage page by page.

    sqlite:///relative.db    sqlite:////absolute.db?bytes_max=1000000000

Several processes may use one file at a time. Readers never wait: SQLite's WAL shows them what was
committed last. Writers take turns; one that is stopped in its turn keeps others from writing, not
from reading. A file, or its directory, that may only be read is good for reading.

Pages carry a checksum (see `crdtstate.stores.file`), so damage is an error and never a wrong value.
Whatever goes wrong while writing, the connection is given up and the file read anew: it may have
reached the disk or not. *bytes_max* bounds the file; the space of what was deleted is used again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote

import apsw

from crdtstate.errors import TierError, UsageError
from crdtstate.stores.file import Host, connect, store_error
from crdtstate.tiers import Item, bytes_option, check_size, split_url
from crdtstate.tiers.calls import Blocking

CALL_SECONDS = 30.0
"""The limit of a call: the largest value on a slow disk, and some that wait before it."""

BUSY_SECONDS = 2.0
"""How long to wait for another process that writes."""

BUSY_PAUSE = 0.005

PAGE_BYTES = 16384
"""Values are large: with pages of this size they are read five times as fast as with 4096."""

WAL_BYTES_MAX = 16 * 2**20
"""The size to which the WAL's file is cut when it starts over."""

APPLICATION_ID = 0x43524443  # "CRDC", a file of checkpoints; a store is "CRDT".

SCHEMA = 1
CREATE = f"""
    PRAGMA application_id = {APPLICATION_ID};
    PRAGMA user_version = {SCHEMA};
    CREATE TABLE value(
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, put_ms INTEGER NOT NULL,
        data BLOB NOT NULL) STRICT;
    """
PUT = """INSERT INTO value(key, put_ms, data) VALUES(?, ?, ?)
    ON CONFLICT(key) DO UPDATE SET put_ms = excluded.put_ms, data = excluded.data"""
GET = "SELECT data FROM value WHERE key = ?"
DELETE = "DELETE FROM value WHERE key = ?"
# length() of a blob does not read it.
SIZE = "SELECT length(data) FROM value WHERE key = ?"
ITEMS = "SELECT key, length(data), put_ms FROM value WHERE key >= ? AND key < ? ORDER BY key"

AFTER_KEYS = "\x7f"
"""Greater than every character of a key."""


class SqliteTier(Blocking):
    """See `crdtstate.tiers.Tier`."""

    def __init__(
        self, url: str, path: Path, bytes_max: int | None, host: Callable[[Path], Host] = Host
    ) -> None:
        super().__init__(url, CALL_SECONDS)
        self._path = path
        self._bytes_max = bytes_max
        self._host = host(path)
        # In the thread: the connection, None after an error; and whether what is in the WAL may
        # not be on the disk although it was synced.
        self._db: apsw.Connection | None = None
        self._is_wal_unsure = False

    # In the thread

    def _put(self, key: str, data: bytes) -> None:
        with self._writing() as db:
            db.execute(PUT, (key, time.time_ns() // 1_000_000, data))

    def _get(self, key: str) -> bytes | None:
        with self._connected() as db:
            db.execute("BEGIN")
            size: int | None = db.execute(SIZE, (key,)).get
            check_size(self.url, key, size or 0)
            data: bytes | None = db.execute(GET, (key,)).get
            db.execute("COMMIT")
            return data

    def _delete(self, key: str) -> None:
        with self._writing() as db:
            db.execute(DELETE, (key,))

    def _items(self, prefix: str) -> list[Item]:
        with self._connected() as db:
            rows = db.execute(ITEMS, (prefix, prefix + AFTER_KEYS))
            return [Item(key, size, put_ms / 1000) for key, size, put_ms in rows]

    @contextmanager
    def _writing(self) -> Iterator[apsw.Connection]:
        """One transaction, on the disk when this ends."""
        with self._connected() as db:
            if db.readonly("main"):
                reason = "the file may only be read; make it and its directory writable"
                raise TierError(self.url, reason)
            db.execute("BEGIN IMMEDIATE")
            if self._is_wal_unsure:
                # The transaction keeps everybody else from writing to the WAL meanwhile.
                self._host.renew_wal()
                self._is_wal_unsure = False
            yield db
            db.execute("COMMIT")

    @contextmanager
    def _connected(self) -> Iterator[apsw.Connection]:
        """The connection. An error ends it and is raised as a `TierError`."""
        try:
            db = self._db = self._db or self._connect()
            yield db
            if db.readonly("main"):
                self._disconnect()  # See `_open_immutable`.
        except BaseException as exc:
            self._is_wal_unsure |= isinstance(exc, apsw.IOError)
            self._disconnect()
            if isinstance(exc, apsw.Error | OSError):
                raise self._error(exc) from exc
            raise

    # Opening and closing

    def _connect(self) -> apsw.Connection:
        if self._path.is_dir():
            raise TierError(self.url, "this is a directory; name a file in it")
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return self._open()
            except apsw.BusyError:
                # Somebody else makes the file, too; SQLite does not wait for that everywhere.
                if time.monotonic() > deadline:
                    raise
            except (apsw.CantOpenError, apsw.ReadOnlyError):
                if not self._is_at_rest():
                    raise
                return self._open_immutable()
            time.sleep(BUSY_PAUSE)

    def _open(self) -> apsw.Connection:
        is_new = not self._path.exists() or not self._path.stat().st_size
        db = connect(self._path, self._host.vfs)
        try:
            if is_new:
                # Somebody else may make the file at this moment. Its first page, read with
                # pages of another size, would have a wrong checksum.
                db.pragma("page_size", PAGE_BYTES)
            if not self._host.has_shared_memory:
                db.pragma("locking_mode", "EXCLUSIVE")
            db.set_busy_timeout(int(BUSY_SECONDS * 1000))
            db.execute("BEGIN")
            schema = self._check(db)
            db.execute("COMMIT")
            if not db.readonly("main"):
                self._migrate(db, schema)
            return db
        except BaseException:
            db.close()
            raise

    def _open_immutable(self) -> apsw.Connection:
        """Open a file that SQLite cannot write its WAL beside. What is written to it meanwhile
        is not seen, so such a connection serves one call."""
        uri = f"file:{quote(str(self._path))}?immutable=1"
        flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
        db = connect(uri, self._host.vfs, flags)
        try:
            self._check(db)  # Nobody is making it: it cannot be written, and is at rest.
            return db
        except BaseException:
            db.close()
            raise

    def _is_at_rest(self) -> bool:
        """Whether there is a file, and all of it is in the file itself: there is no WAL."""
        with suppress(OSError):
            wal = Path(f"{self._path}-wal")
            return self._path.is_file() and (not wal.exists() or not wal.stat().st_size)
        return False

    def _check(self, db: apsw.Connection) -> int:
        """Return the schema, 0 in a new file; raise if this is not a file of ours. In a
        transaction, as somebody may be making the file."""
        application: int = db.pragma("application_id")
        schema: int = db.pragma("user_version")
        is_empty = db.execute("SELECT count(*) FROM sqlite_schema").get == 0
        if application != APPLICATION_ID and (application or not is_empty):
            what = f"another program's SQLite file (application_id {application:#x})"
            raise TierError(self.url, f"this is {what}, not a tier; use another file")
        if schema > SCHEMA:
            reason = f"a newer crdtstate wrote it (schema {schema}, this one knows {SCHEMA})"
            raise TierError(self.url, f"{reason}; upgrade crdtstate")
        return schema

    def _migrate(self, db: apsw.Connection, schema: int) -> None:
        # EXTRA also syncs the directory; see `crdtstate.stores.file.migrate`.
        db.pragma("synchronous", "EXTRA")
        if schema == 0:
            db.reserve_bytes("main", 8)  # For the checksum of each page.
            db.execute("BEGIN IMMEDIATE")
            if self._check(db) == 0:  # Somebody may have made it meanwhile.
                db.execute(CREATE)
            db.execute("COMMIT")
        if db.pragma("journal_mode", "WAL") != "wal":
            raise TierError(self.url, "its file system cannot share memory; use a local disk")
        db.pragma("synchronous", "FULL")
        db.pragma("journal_size_limit", WAL_BYTES_MAX)
        if self._bytes_max is not None:
            page_bytes: int = db.pragma("page_size")
            db.pragma("max_page_count", max(1, self._bytes_max // page_bytes))

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        if db is None:
            return
        # The last to close does a checkpoint. It may fail, but must not spread half a WAL.
        with suppress(apsw.Error):
            if self._is_wal_unsure:
                db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            db.close()

    def _error(self, exc: Exception) -> TierError:
        match exc:
            case apsw.NotADBError():
                reason = "this is not an SQLite file, or its header is damaged; move it away"
            case apsw.CorruptError() | apsw.IOError() if _is_damage(exc):
                reason = f"a page is damaged ({exc}); move the file away, a new one is begun"
            case apsw.FullError() if self._bytes_max is not None:
                reason = f"the disk is full, or its {self._bytes_max} bytes are; free some space"
            case _:
                reason = store_error(self.url, exc).reason
        return TierError(self.url, reason)


def _is_damage(exc: Exception) -> bool:
    is_checksum = getattr(exc, "extendedresult", 0) == apsw.SQLITE_IOERR_DATA
    return isinstance(exc, apsw.CorruptError) or is_checksum


def _parse(url: str) -> tuple[Path, int | None]:
    parts, options = split_url(url, "bytes_max")
    name = unquote(parts.path.removeprefix("/"))
    if parts.netloc or not name or name == ":memory:" or "\0" in name:
        reason = "write sqlite:///relative.db or sqlite:////absolute.db, and memory:// for memory"
        raise UsageError(f"{url}: {reason}")
    return Path(name).absolute(), bytes_option(url, options, None)


def check_url(url: str) -> None:
    """See `crdtstate.tiers.check_url`."""
    _parse(url)


async def open_tier(url: str) -> SqliteTier:
    """See `crdtstate.tiers.open_tier`."""
    return SqliteTier(url, *_parse(url))
