"""
Replacing a damaged store: what can still be read of it, and how it is put aside and never lost.

The new store is made whole beside the old one (``<path>.rebuilt``). Then a line of intent
(``<path>.recovering``) is written, and from there on it is decided: the old file and what belongs
to it are renamed to ``<path>.damaged-<n>``, the new one takes its place, and the line goes. Whoever
opens the file next completes what a kill interrupted (`complete`), so at no moment is there a store
that lacks its WAL, or a new one that lacks what was saved. Until the line is written nothing has
happened. All of this is for the owner of the file, who holds its lock.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import apsw

from crdtstate.change import Change, Snapshot, decode_change
from crdtstate.errors import InvalidUpdate, StoreError, StoreUnavailable
from crdtstate.stores import Entry, Saved
from crdtstate.stores.file import Host, connect, sync, translated
from crdtstate.stores.journal import Journal

BESIDE = ("-wal", "-shm")
"""What SQLite keeps beside a file, by suffix."""

ROW_MAX = 2**48
HOLES_MAX = 1000
"""Places at which a table cannot be read; after these it is given up."""

LOSSES_MAX = 20


class Wreck:
    """A damaged store, as far as it can be read.

    Pages are read whatever their checksums say: what is taken from them has one of its own.

    Args:
        db: A connection to it; None if it cannot be opened.
        host: Tells where it lies.
    """

    def __init__(self, db: apsw.Connection | None, host: Host) -> None:
        self._db = db
        self._host = host
        # What could not be read, in words; the first few.
        self.losses: list[str] = []

    def snapshots(self) -> Iterator[tuple[Snapshot, bytes]]:
        """Yield the snapshots that are as they were written, with their bytes."""
        for row, data in self._rows("SELECT document, data FROM snapshot", "document"):
            if not isinstance(data, bytes):
                self._lose(f"table snapshot, row {row}: these are no bytes")
                continue
            try:
                snapshot = Snapshot.decode(data)
            except InvalidUpdate as exc:
                self._lose(f"table snapshot, row {row}: {exc}")
            else:
                yield snapshot, data

    def changes(self) -> Iterator[Change]:
        """Yield the changes that are as they were written, in the order of delivery."""
        for row, data in self._rows("SELECT id, data FROM journal", "id"):
            if not isinstance(data, bytes):
                self._lose(f"table journal, row {row}: these are no bytes")
                continue
            try:
                change = decode_change(data)
            except InvalidUpdate as exc:
                self._lose(f"table journal, row {row}: {exc}")
            else:
                yield change

    def writers(self) -> frozenset[int]:
        """The writers that sessions of this very file used, as far as they can be read."""
        found = set()
        place = self._host.place()
        for _, writer, where in self._rows("SELECT id, writer, place FROM epoch", "id"):
            if where == place and type(writer) is int:
                found.add(writer)
        return frozenset(found)

    def _rows(self, select: str, key: str) -> Iterator[tuple[Any, ...]]:
        """The rows of a table that can be read, by *key*, over whatever cannot."""
        first = 1
        # Without a word of keys at first: some may be wrong, and end it too early.
        query = f"{select} ORDER BY {key}"
        for _ in range(HOLES_MAX):
            if self._db is None:
                return
            try:
                for row in self._db.execute(query):
                    first = row[0] + 1
                    yield row
                return
            except (apsw.Error, UnicodeDecodeError) as exc:
                self._lose(f"{select}, from row {first}: {exc}")
                if isinstance(exc, apsw.NotADBError | apsw.CantOpenError):
                    return
            query = f"{select} WHERE {key} >= {{}} ORDER BY {key}"
            first = self._end_of_hole(f"{query} LIMIT 1", first)
            if first > ROW_MAX:
                return
            query = query.format(first)
        self._lose(f"{select}: the rest is left, after {HOLES_MAX} holes")

    def _end_of_hole(self, query: str, bad: int) -> int:
        """The row, after the *bad* one, from which on it can be read again: in longer and longer
        steps up to one that can be, then back by halves."""
        good, step = bad + 1, 1
        while not self._reads(query.format(good)):
            if good > ROW_MAX:
                return good
            bad, step = good, 2 * step
            good += step
        while good - bad > 1:
            middle = (bad + good) // 2
            if self._reads(query.format(middle)):
                good = middle
            else:
                bad = middle
        return good

    def _reads(self, query: str) -> bool:
        assert self._db is not None
        try:
            self._db.execute(query).fetchall()
        except (apsw.Error, UnicodeDecodeError):
            return False
        return True

    def _lose(self, what: str) -> None:
        if len(self.losses) < LOSSES_MAX:
            self.losses.append(what)


@contextmanager
def salvaging(host: Host) -> Iterator[Wreck]:
    """Open a damaged store to read what can be read. Alters nothing."""
    try:
        db = connect(host.path, flags=apsw.SQLITE_OPEN_READONLY)
    except apsw.Error as exc:
        wreck = Wreck(None, host)
        wreck.losses.append(str(exc))
        yield wreck
        return
    with closing(db):
        try:
            db.pragma("checksum_verification", 0)
        except apsw.Error:
            # Not even its first page is one. Reading it fails as well, and that is told.
            pass
        yield Wreck(db, host)


class _Beside(Host):
    """The new store, whose place is that of the old one, and which is nobody else's meanwhile."""

    def __init__(self, path: Path, destination: Path) -> None:
        super().__init__(path)
        self._destination = destination

    def lock(self) -> None: ...

    def place(self) -> str:
        found = self.path.stat()
        return f"{found.st_dev}:{found.st_ino}:{self._destination}"


def rebuild(
    host: Host,
    agent: str,
    writer: int,
    former: Iterable[int],
    contents: Iterable[tuple[Saved | None, list[Entry]]],
) -> Path:
    """Make a new store beside the one of *host*, whole and synced, and return its file.

    Args:
        agent: Whose it is.
        writer: As whom its owner will write.
        former: As whom its owner wrote before.
        contents: Of each document the snapshot, if there is one, and the changes after it.

    Raises:
        StoreUnavailable: The disk refuses; nothing has happened to the old store.
    """
    path = Path(f"{host.path}.rebuilt")
    with translated(path):
        for suffix in ("", *BESIDE):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        journal = Journal(path, host=lambda _: _Beside(path, host.path), upkeep_every=None)
        try:
            for each in (*sorted({*former} - {writer}), writer):
                journal.start(agent, each, lambda: None)
            for saved, entries in contents:
                if saved is not None:
                    journal.compact(saved, 0)
                if entries:
                    journal.append(entries)
        finally:
            journal.close()
        if journal.failure is not None:
            raise journal.failure
        if any(Path(f"{path}{suffix}").exists() for suffix in BESIDE):
            raise StoreUnavailable(path, "the disk does not take all of it; free some space")
        sync(path)
    return path


def replace(host: Host) -> Path:
    """Put the store of *host* aside, and what `rebuild` made in its place. Returns where the old
    one is now."""
    path = host.path
    with translated(path):
        number = 1
        while any(path.parent.glob(f"{_literal(path.name)}.damaged-{number}*")):
            number += 1
        note = _note(path)
        note.write_text(f"{path.name}.damaged-{number}\n")
        sync(note)
        sync(path.parent)
    aside = complete(host)
    assert aside is not None, "it was just decided"
    host.note = None
    return aside


def complete(host: Host) -> Path | None:
    """Complete a replacement that was decided and interrupted; returns where the old store is
    now, or None if there was nothing to complete.

    Raises:
        StoreUnavailable: The directory refuses. It can be tried again.
    """
    path, note = host.path, _note(host.path)
    try:
        with translated(path):
            name = note.read_text().removesuffix("\n")
    except StoreError:
        if note.exists():
            raise
        return None
    with translated(path):
        if not re.fullmatch(rf"{re.escape(path.name)}\.damaged-[0-9]{{1,9}}", name):
            # It was not written whole, so nothing followed it.
            note.unlink()
            return None
        aside = path.with_name(name)
        if not aside.exists():
            # The file itself last: while it is there, what belongs to it may not be yet.
            for suffix in (*BESIDE, ""):
                source = Path(f"{path}{suffix}")
                if source.exists():
                    source.rename(f"{aside}{suffix}")
            sync(path.parent)
        rebuilt = Path(f"{path}.rebuilt")
        if rebuilt.exists() and not path.exists():
            rebuilt.rename(path)
        sync(path.parent)
        note.unlink()
        sync(path.parent)
    return aside


def _note(path: Path) -> Path:
    return Path(f"{path}.recovering")


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)
