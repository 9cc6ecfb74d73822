"""
Which row of a journal holds which change: kept in memory, by both stores.

Rows are numbered in the order of delivery. For each document and writer the index has the rows
of the changes it still keeps, so a range of changes is found without a search and without a
secondary index in the file, which would cost four times the appends. What to forget at a
compaction is decided here too.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from heapq import merge

from crdtstate.clock import Version


class WriterIndex:
    """The rows of one writer's changes in one document: consecutive seqs, 16 bytes each."""

    __slots__ = ("first", "rows", "ends", "end", "forgotten")

    def __init__(self, first: int = 1) -> None:
        self.first = first  # The seq of rows[0]; older ones are forgotten.
        self.rows = array("Q")
        self.ends = array("Q")  # The bytes of all this writer's changes up to each row's end.
        self.end = 0  # The last of them,
        self.forgotten = 0  # and the one before the first.

    @property
    def newest(self) -> int:
        """The seq of the newest change, be it kept or forgotten."""
        return self.first + len(self.rows) - 1

    def count_through(self, seq: int) -> int:
        """How many of the rows hold changes up to *seq*."""
        return min(max(seq - self.first + 1, 0), len(self.rows))

    def bytes_of(self, start: int, stop: int) -> int:
        """The size of the changes in rows[start:stop]."""
        return self._end_before(stop) - self._end_before(start)

    def forget(self, count: int) -> array[int]:
        """Drop the oldest *count* rows and return them."""
        rows = self.rows[:count]
        self.forgotten = self._end_before(count)
        del self.rows[:count], self.ends[:count]
        self.first += count
        return rows

    def cut(self, count: int) -> None:
        """Drop all but the oldest *count* rows."""
        self.end = self._end_before(count)
        del self.rows[count:], self.ends[count:]

    def _end_before(self, place: int) -> int:
        return self.ends[place - 1] if place else self.forgotten


class DocumentIndex:
    """
    The rows of a document's changes.

    Invariant I7: for every writer the floor is at most the snapshot's version, and every change
    from the floor to the newest has a row.
    """

    def __init__(self, number: int = 0) -> None:
        self.number = number  # What rows of the file have for the document's name.
        self.saved = Version()  # What the snapshot contains.
        self.size = 0  # Bytes of the changes that it does not contain.
        self.writers: dict[int, WriterIndex] = {}

    def add(self, writer: int, seq: int, row: int, size: int) -> None:
        """Note that *row*, higher than all before, holds change *seq* of *writer*."""
        index = self.writers.get(writer) or self.writers.setdefault(writer, WriterIndex())
        rows = index.rows
        assert seq == index.first + len(rows), f"{writer:x}:{seq} after {index.newest} (I7)"
        index.end += size
        index.ends.append(index.end)
        rows.append(row)
        self.size += size

    @property
    def kept(self) -> int:
        """Bytes of all changes that have a row."""
        return sum(index.bytes_of(0, len(index.rows)) for index in self.writers.values())

    def first_unsaved(self) -> int | None:
        """The lowest row of a change that the snapshot does not contain."""
        found: list[int] = []
        for writer, index in self.writers.items():
            place = index.count_through(self.saved.get(writer, 0))
            found += index.rows[place : place + 1]
        return min(found, default=None)

    def newest(self, writer: int) -> int:
        """The seq of *writer*'s newest change, or 0."""
        return self.writers[writer].newest if writer in self.writers else 0

    def find(
        self, ranges: Sequence[tuple[int, int, int]], size_max: int
    ) -> tuple[list[tuple[int, int, int]], bool]:
        """
        The changes (writer, first seq, last seq) of *ranges* as (row, writer, seq), in the order
        of delivery, as far as they fit in *size_max* bytes, but one at least; and whether that
        left some out. A range of which the first change is not here gives nothing.
        """
        found: list[tuple[int, int, int]] = []
        total = 0
        streams = [self._stream(*each) for each in ranges]
        for row, writer, seq, size in merge(*streams):
            total += size
            if found and total > size_max:
                return found, True
            found.append((row, writer, seq))
        return found, False

    def measure(self, ranges: Sequence[tuple[int, int, int]]) -> int:
        """The bytes of the changes of *ranges* that have rows."""
        total = 0
        for writer, first, last in ranges:
            index = self.writers.get(writer)
            if index is not None:
                total += index.bytes_of(index.count_through(first - 1), index.count_through(last))
        return total

    def _stream(self, writer: int, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
        index = self.writers.get(writer)
        if index is not None and index.first <= first:
            for place in range(first - index.first, index.count_through(last)):
                size = index.bytes_of(place, place + 1)
                yield index.rows[place], writer, index.first + place, size

    def floor(self) -> Version:
        """Up to which change of each writer the rows are forgotten."""
        return Version({writer: i.first - 1 for writer, i in self.writers.items() if i.first > 1})

    def start_at(self, floor: Version) -> None:
        """Take over the *floor* of a stored document, before its rows are added."""
        self.writers = {writer: WriterIndex(seq + 1) for writer, seq in floor.items()}

    def save(self, version: Version) -> None:
        """Note that the snapshot contains *version*."""
        self.saved = version.copy()
        self.size = sum(
            index.bytes_of(index.count_through(version.get(writer, 0)), len(index.rows))
            for writer, index in self.writers.items()
        )

    def rows_after(self, writer: int, seq: int) -> Sequence[int]:
        """The rows of *writer*'s changes above *seq*."""
        index = self.writers.get(writer)
        return index.rows[index.count_through(seq) :] if index else ()

    def cut(self, writer: int, seq: int) -> None:
        """Drop the rows of *writer*'s changes above *seq*, as if they had never been added."""
        assert self.saved.get(writer, 0) <= seq, "a snapshot cannot be taken apart"
        if index := self.writers.get(writer):
            index.cut(index.count_through(seq))
            self.save(self.saved)

    def compact(self, version: Version, keep_bytes: int) -> array[int]:
        """
        Forget rows that a snapshot at *version* contains, and return them.

        The oldest go first, until the contained ones that stay take at most *keep_bytes*.
        """
        assert self.floor() <= version, f"{version} is below the floor {self.floor()} (I7)"
        forgotten = array("Q")
        for writer, seq in version.items():
            index = self.writers.setdefault(writer, WriterIndex())
            if index.newest < seq:
                # The snapshot came from a peer and is ahead of this journal. The writer's next
                # change will follow *seq*, so rows that stayed would leave a gap.
                forgotten += index.forget(len(index.rows))
                index.first = seq + 1
        contained = [
            (index, count)
            for writer, index in self.writers.items()
            if (count := index.count_through(version.get(writer, 0)))
        ]
        if contained:
            cut = _cut(contained, keep_bytes)
            for index, count in contained:
                forgotten += index.forget(bisect_right(index.rows, cut, hi=count))
        self.save(version)
        assert self.floor() <= version, f"the floor {self.floor()} rose above {version} (I7)"
        return forgotten


def _cut(contained: Sequence[tuple[WriterIndex, int]], keep_bytes: int) -> int:
    """The lowest row above which the contained rows take at most *keep_bytes*."""

    def bytes_above(row: int) -> int:
        return sum(
            index.bytes_of(bisect_right(index.rows, row, hi=count), count)
            for index, count in contained
        )

    lowest = min(index.rows[0] for index, _ in contained)
    highest = max(index.rows[count - 1] for index, count in contained)
    rows = range(lowest - 1, highest + 1)
    return rows[bisect_left(rows, -keep_bytes, key=lambda row: -bytes_above(row))]


NO_CHANGES = DocumentIndex()
"""The index of a document nobody has heard of. Never added to."""
