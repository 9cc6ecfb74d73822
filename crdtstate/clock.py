"""
Logical time: which write, in which order, seen by whom.

A *dot* names one change of one writer. A *version* is a vector clock: how many changes
of each writer a document has taken in (Mattern 1988, Fidge 1988). A *cut* is the versions
of all documents of a replica. A *stamp* is a hybrid logical clock reading (Kulkarni et al.,
"Logical Physical Clocks", 2014): close to wall time, never running backwards, and larger
than everything it has seen.

Versions decide what happened before what. Stamps only order what versions call concurrent.
Nothing here reads a clock: wall time is handed in, so the same code runs under the
operating system's clock and under a simulated one.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

import msgpack

from crdtstate.errors import UsageError

WRITER_BITS = 53
"""A writer doubles as yrs client id, which holds 53 bits."""

WRITER_MAX = 2**WRITER_BITS - 1

SEQ_MAX = 2**31 - 1
"""Larger sequence numbers are refused: yrs silently masks clocks to 32 bits."""

COUNTER_BITS = 16
COUNTER_MASK = (1 << COUNTER_BITS) - 1
STAMP_MAX = 2**63 - 1


class Dot(NamedTuple):
    """One change: the *seq*-th of *writer*, counted from 1."""

    writer: int
    seq: int


class Version(dict[int, int]):
    """A vector clock: writer -> number of its changes taken in. Absent writers count 0.

    Compares by causality: ``a <= b`` when *b* has everything *a* has; two versions may be
    neither ``<=`` nor ``>=``, then they are concurrent.
    """

    __slots__ = ()

    def covers(self, dot: tuple[int, int]) -> bool:
        """Whether the change named by *dot* is among those taken in."""
        return self.get(dot[0], 0) >= dot[1]

    # Loops, not all(): these run for every frame.

    def __le__(self, other: Mapping[int, int]) -> bool:
        for writer, seq in self.items():
            if seq > other.get(writer, 0):
                return False
        return True

    def __ge__(self, other: Mapping[int, int]) -> bool:
        for writer, seq in other.items():
            if seq > self.get(writer, 0):
                return False
        return True

    def __lt__(self, other: Mapping[int, int]) -> bool:
        return self <= other and not self >= other

    def __gt__(self, other: Mapping[int, int]) -> bool:
        return self >= other and not self <= other

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self <= other and self >= other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # Mutable, like the dict it is.

    def concurrent_with(self, other: Mapping[int, int]) -> bool:
        """Whether each side has a change that the other lacks."""
        return not self <= other and not self >= other

    def merge(self, other: Mapping[int, int]) -> None:
        """Take in everything *other* has: the pointwise maximum, in place."""
        for writer, seq in other.items():
            if seq > self.get(writer, 0):
                self[writer] = seq

    def copy(self) -> Version:
        return Version(self)

    @property
    def total(self) -> int:
        """The number of changes taken in, of all writers."""
        return sum(self.values())

    def flat(self) -> list[int]:
        """The wire form: ``[writer, seq, writer, seq, ...]``, sorted by writer."""
        return [number for pair in sorted(self.items()) for number in pair]

    @classmethod
    def from_flat(cls, numbers: Iterable[int]) -> Version:
        """The inverse of `flat`. Bounds are checked where the numbers came in."""
        pairs = iter(numbers)
        return cls(zip(pairs, pairs, strict=True))

    def __repr__(self) -> str:
        inside = ", ".join(f"{writer:x}:{seq}" for writer, seq in sorted(self.items()))
        return f"Version({inside})"


class Cut(Mapping[str, Version]):
    """The versions of all documents of a replica at one moment: a causal token.

    Hand it to another replica's ``wait_for`` and that replica will have seen everything
    this one had seen. Immutable; ``str(cut)`` is a token for another process and
    ``Cut.parse`` reads it.
    """

    __slots__ = ("_versions",)

    def __init__(self, versions: Mapping[str, Mapping[int, int]] | None = None) -> None:
        self._versions = {name: Version(v) for name, v in (versions or {}).items() if v}

    def __getitem__(self, document: str) -> Version:
        return self._versions[document].copy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._versions)

    def __len__(self) -> int:
        return len(self._versions)

    def __le__(self, other: Mapping[str, Version]) -> bool:
        return all(v <= other.get(name, Version()) for name, v in self._versions.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cut) and self <= other and other <= self

    __hash__ = None  # type: ignore[assignment]

    def concurrent_with(self, other: Cut) -> bool:
        """Whether each side has a change that the other lacks."""
        return not self <= other and not other <= self

    def __str__(self) -> str:
        packed = msgpack.packb({name: v.flat() for name, v in sorted(self._versions.items())})
        return base64.urlsafe_b64encode(packed).decode()

    @classmethod
    def parse(cls, token: str) -> Cut:
        """Read what ``str(cut)`` wrote.

        Raises:
            UsageError: The text is not such a token.
        """
        try:
            packed = msgpack.unpackb(base64.urlsafe_b64decode(token))
            return cls({str(name): Version.from_flat(flat) for name, flat in packed.items()})
        except Exception as exc:
            raise UsageError(f"not a version token: {token[:40]!r} ({exc})") from exc

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}: {v.total} changes" for name, v in self._versions.items())
        return f"<Cut {inside}>" if inside else "<Cut empty>"


class Stamp(int):
    """A hybrid logical clock reading: milliseconds since 1970 and a counter, in one int."""

    __slots__ = ()

    @property
    def wall_ms(self) -> int:
        """Milliseconds since 1970, UTC."""
        return int(self) >> COUNTER_BITS

    @property
    def counter(self) -> int:
        """Tells stamps of the same millisecond apart."""
        return int(self) & COUNTER_MASK

    @property
    def time(self) -> datetime:
        """The wall time, as an aware datetime in UTC."""
        return datetime.fromtimestamp(self.wall_ms / 1000, UTC)

    def __repr__(self) -> str:
        return f"Stamp({self.wall_ms}.{self.counter})"


class HybridClock:
    """Issues stamps that rise, however the wall clock jumps.

    Args:
        skew_max_ms: A remote stamp further ahead of our wall clock than this is taken in but
            does not drag this clock along; otherwise one bad clock would set everybody's.
    """

    def __init__(self, skew_max_ms: int = 60_000) -> None:
        self.skew_max_ms = skew_max_ms
        self.last = Stamp(0)

    def issue(self, wall_ms: int) -> Stamp:
        """Return a stamp above every stamp issued or observed before."""
        self.last = Stamp(max(int(self.last) + 1, wall_ms << COUNTER_BITS))
        return self.last

    def observe(self, stamp: int, wall_ms: int) -> bool:
        """Take in a remote *stamp*. Return False when it is too far ahead to be believed."""
        if stamp <= self.last:
            return True
        if (stamp >> COUNTER_BITS) - wall_ms > self.skew_max_ms:
            return False
        self.last = Stamp(stamp)
        return True


_MASK = 2**64 - 1


def mix(salt: int, writer: int, seq: int) -> int:
    """A well-spread 64-bit number for one entry of a version (splitmix64's finaliser): the xor of
    those of all entries is a fingerprint that is cheap to keep up to date."""
    x = (salt + writer * 0x9E3779B97F4A7C15 + seq * 0xBF58476D1CE4E5B9) & _MASK
    x = (x ^ x >> 30) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31
