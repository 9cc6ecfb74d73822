"""
What was being applied when the process died: so that nothing kills it again and again.

Before a change or snapshot is given to pycrdt it is noted here, and struck out afterwards. The note
is a store into memory that is mapped from a file beside the store (``<path>.applying``): that takes
a microsecond, and outlives the process, though not the machine. Whoever opens the store next counts
a death for what is noted. A change at which the process died twice is *quarantined*: it is given to
pycrdt no more, until it is released. What applies in the end is no suspect any more.

Stored snapshots take long to load, and a process may be killed meanwhile for other reasons; it
takes more deaths until one of them counts as damaged.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgpack

from crdtstate.errors import InvalidUpdate

DEATHS_MAX = 2
SNAPSHOT_DEATHS_MAX = 5
"""How often the process may die at a change, and at a snapshot."""

SUSPECTS_MAX = 1000
PAGE = 2048
"""Bytes of the note; the suspects come after it."""

_HEAD = struct.Struct("<16sQQH")
_MAGIC = b"applying1"


class Suspect(NamedTuple):
    """What the process died of, perhaps.

    Attributes:
        id: The change's id, or the hash of a snapshot's state.
        writer: With *seq* the change's dot; 0 for a snapshot.
        deaths: How often it was noted when the process died.
        at_ms: When that was seen the last time, in milliseconds since 1970.
    """

    id: bytes
    document: str
    writer: int
    seq: int
    deaths: int
    at_ms: int

    @property
    def is_quarantined(self) -> bool:
        return self.deaths >= (DEATHS_MAX if self.writer else SNAPSHOT_DEATHS_MAX)

    def __str__(self) -> str:
        what = f"change {self.writer:x}:{self.seq}" if self.writer else "the snapshot"
        return f"document {self.document!r}: {what} ended the process {self.deaths} times"


def beside(path: str | Path) -> Path:
    """The file for a store."""
    return Path(f"{path}.applying")


def read(path: str | Path) -> list[Suspect]:
    """The suspects of a store, whoever uses it."""
    return _parse(_bytes_of(beside(path)))[1]


class Known:
    """The suspects of a store, for who only looks at it: what is quarantined is refused.

    Args:
        path: The store's file.
    """

    def __init__(self, path: str | Path) -> None:
        self._suspects = {suspect.id: suspect for suspect in read(path)}

    def begin(self, id: bytes, document: str, writer: int, seq: int) -> None:
        """Raises InvalidUpdate if it is quarantined."""
        _check(self._suspects, id)

    def end(self, id: bytes) -> None:
        """Nothing to do."""


class Suspects:
    """The suspects of one store, for its owner.

    Args:
        path: The store's file.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = beside(path)
        noted, found = _parse(_bytes_of(self._path))
        self._suspects = {suspect.id: suspect for suspect in found}
        # The newest death, if it is told now for the first time.
        self.died_at: Suspect | None = None
        if noted is not None:
            now_ms = time.time_ns() // 1_000_000
            before = self._suspects.pop(noted.id, noted)
            self.died_at = before._replace(deaths=before.deaths + 1, at_ms=now_ms)
            self._suspects[noted.id] = self.died_at
            for id in list(self._suspects)[:-SUSPECTS_MAX]:
                del self._suspects[id]
        self._map: mmap.mmap | None = None
        if noted is not None or not self._path.exists():
            self._save()
        else:
            self._open()

    # Looking

    def __iter__(self) -> Iterator[Suspect]:
        """All of them, the newest last."""
        return iter(self._suspects.values())

    @property
    def quarantined(self) -> list[Suspect]:
        """Those that pycrdt is not given any more."""
        return [suspect for suspect in self if suspect.is_quarantined]

    # Noting

    def begin(self, id: bytes, document: str, writer: int, seq: int) -> None:
        """Note what is given to pycrdt now.

        Raises:
            InvalidUpdate: It is quarantined.
        """
        if self._suspects:
            _check(self._suspects, id)
        note = self._map
        if note is not None:
            name = document.encode()
            head = _HEAD.pack(id, writer, seq, len(name))
            note[16 : 16 + len(head) + len(name)] = head + name
            # Last: what is noted is whole.
            note[15] = 1

    def end(self, id: bytes) -> None:
        """It is done."""
        if self._map is not None:
            self._map[15] = 0
        if self._suspects and self._suspects.pop(id, None) is not None:
            self._save()

    def release(self, id: bytes) -> None:
        """Let something be given to pycrdt again."""
        if self._suspects.pop(id, None) is not None:
            self._save()

    def close(self) -> None:
        """Let the file go, and remove it if it says nothing. Idempotent."""
        is_idle = self._map is not None and not self._map[15]
        self._let_go()
        if is_idle and not self._suspects:
            with suppress(OSError):
                self._path.unlink()

    def _let_go(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None

    def _save(self) -> None:
        self._let_go()
        partial = Path(f"{self._path}.partial")
        # Without it the store works as well: then nobody will know what the process died of.
        with suppress(OSError):
            partial.write_bytes(_encode(self._suspects.values()))
            partial.replace(self._path)
            self._open()

    def _open(self) -> None:
        with suppress(OSError, ValueError), open(self._path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), PAGE)


def _check(suspects: Mapping[bytes, Suspect], id: bytes) -> None:
    suspect = suspects.get(id)
    if suspect is not None and suspect.is_quarantined:
        raise InvalidUpdate(f"it is quarantined: {suspect}")


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _encode(suspects: Iterable[Suspect]) -> bytes:
    packed: bytes = msgpack.packb([tuple(suspect) for suspect in suspects])
    return _MAGIC.ljust(PAGE, b"\0") + packed


def _parse(data: bytes) -> tuple[Suspect | None, list[Suspect]]:
    """What is noted, and the suspects; of a file that is none, nothing."""
    if len(data) < PAGE or not data.startswith(_MAGIC):
        return None, []
    try:
        found = [Suspect(*fields) for fields in msgpack.unpackb(data[PAGE:])]
        if not data[15]:
            return None, found
        id, writer, seq, size = _HEAD.unpack_from(data, 16)
        at = 16 + _HEAD.size
        return Suspect(id, data[at : at + size].decode(), writer, seq, 0, 0), found
    except (ValueError, TypeError, struct.error):
        return None, []
