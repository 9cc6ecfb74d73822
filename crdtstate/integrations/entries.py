"""
A log of entries in a map: each is added once, none is lost, and all replicas read them in one
order, in which what was added after something was seen also comes after it.

The order is in the key: a stamp above those of all entries that were there, then the writer, then
which it is of those that were added together. An entry is kept as JSON text. One that is too long
for a value is kept in pieces, in a map of their own, which are written before the entry that says
how many there are: who sees that has them all.

Adding costs what is added, but for a look at the keys: ten microseconds for a thousand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from crdtstate.clock import STAMP_MAX, Stamp
from crdtstate.errors import UnsupportedValue, UsageError
from crdtstate.replica import Replica

STAMP_CHARS = 16
KEY_CHARS = STAMP_CHARS + 14 + 6
"""Stamp, writer, and which it is of those that were added together, in hex."""

BATCH_MAX = 16**6
"""Entries that are added together."""

LOG, PIECES = "log/", "pieces/"
"""How the names of the two maps begin."""

PIECE_CHARS = 512 * 1024
PIECES_MAX = 64
ENTRY_CHARS_MAX = PIECES_MAX * PIECE_CHARS
"""Characters of one entry as JSON: room for the pictures that agents look at."""


class Entries:
    """The entries *name* of a document.

    Raises:
        UnsupportedValue: *document* or *name* cannot be the name of one.
        UsageError: The document holds native types, or is the system's.
    """

    def __init__(self, replica: Replica, document: str, name: str) -> None:
        self._replica = replica
        self._map = replica.document(document).map(LOG + name)
        self._pieces = replica.document(document).map(PIECES + name)

    def __len__(self) -> int:
        return len(self._map)

    def keys(self) -> list[str]:
        """The keys of all entries, in order."""
        return sorted(self._map)

    def add(self, entries: Iterable[Any]) -> list[str]:
        """Add *entries* after all that is here, all of them or on an error none; returns their
        keys.

        Raises:
            UnsupportedValue: One cannot be written as JSON, or is longer than `ENTRY_CHARS_MAX`.
        """
        texts = [_write(entry, f"entry {number}") for number, entry in enumerate(entries)]
        if not texts:
            return []
        if len(texts) > BATCH_MAX:
            raise UsageError(f"at most {BATCH_MAX} entries at a time, not {len(texts)}")
        stamp = int(self._replica.next_stamp())
        if there := self.keys():
            # Of a clock that is far ahead, which the own one does not follow.
            stamp = max(stamp, stamp_of(there[-1]) + 1)
        prefix = f"{stamp:016x}{self._replica.writer:014x}"
        written: dict[str, str | int] = {}
        pieces: dict[str, str] = {}
        keys = [f"{prefix}{number:06x}" for number in range(len(texts))]
        for key, text in zip(keys, texts, strict=True):
            if len(text) <= PIECE_CHARS:
                written[key] = text
                continue
            starts = range(0, len(text), PIECE_CHARS)
            for number, start in enumerate(starts):
                pieces[_piece(key, number)] = text[start : start + PIECE_CHARS]
            written[key] = len(starts)
        self._pieces.update(pieces)
        self._map.update(written)
        return keys

    def read(self, keys: Sequence[str]) -> Iterator[Any]:
        """The entries at *keys*, without those that are gone, or are no entries."""
        for key in keys:
            text = self._text(key)
            try:
                yield json.loads(text)
            except (ValueError, RecursionError):
                # Anybody can write to a map.
                continue

    def remove(self, keys: Iterable[str]) -> None:
        """Remove the entries at *keys*, those that are there."""
        for key in keys:
            value = self._map.get(key)
            if type(value) is int:
                for number in range(min(value, PIECES_MAX)):
                    self._pieces.pop(_piece(key, number), None)
            self._map.pop(key, None)

    def _text(self, key: str) -> str:
        value = self._map.get(key)
        if type(value) is int and 0 < value <= PIECES_MAX:
            pieces = [self._pieces.get(_piece(key, number)) for number in range(value)]
            return "".join(piece for piece in pieces if isinstance(piece, str))
        return value if isinstance(value, str) else ""


def stamp_of(key: str) -> Stamp:
    """When the entry at *key* was added; the beginning of time for what is no entry's key."""
    try:
        return Stamp(min(int(key[:STAMP_CHARS], 16), STAMP_MAX - 1))
    except ValueError:
        return Stamp(0)


def _piece(key: str, number: int) -> str:
    return f"{key}{number:02x}"


def _write(entry: Any, what: str) -> str:
    try:
        text = json.dumps(entry, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as exc:
        raise UnsupportedValue(what, f"cannot be written as JSON: {exc}") from exc
    if len(text) > ENTRY_CHARS_MAX:
        raise UnsupportedValue(
            what, f"{len(text)} characters as JSON; {ENTRY_CHARS_MAX} is the limit"
        )
    return text
