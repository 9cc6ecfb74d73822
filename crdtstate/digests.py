"""
What a document says, in a few numbers, so that replicas can compare without sending it.

**What is compared.** A lane of which two replicas have taken in equally many changes holds the same
slots on both, however much they differ in other lanes, with one exception:

- A lane's items come from its writer's changes alone (L1 of `lanes`, checked on each change), which
  are taken in in order, each once (L5); the section of a snapshot holds those of the same changes.
- What a change of the writer deletes is part of that change. *When* an owner tidies (L3) or cleans
  (L4) depends on what it has seen, but the others only ever carry out what its changes say; what
  cleaning moves stays as it is. A join takes of each lane the section that is further on.
- The exception: an adopter (L6) drops slots in a lane that is not its own, so whether they are
  there also depends on how much of *its* lane was taken in. It adds and alters nothing, and what
  it dropped never comes back at the same seq.

So at an equal seq two slots at one path are equal. A slot that only one side has is a fault if that
side has taken in all that the other had when it lacked the slot; else it may have been dropped by
an adopter that this side has not heard of. `comparing` sees to that. How slots lie in segments is
not compared: nothing depends on it.

Native documents have no lanes; they are compared when their whole versions are equal.

What is hidden (`hiding`) is compared as it lies there, so it makes no difference who has heard of
that. Lanes that are hidden whole are left out: their writer has gone on in two ways, so two that
have different ones are both right, and nobody sees either.

**What is summed up.** Of each slot both what the index says, which is read, and what the Doc holds,
which snapshots carry: where these disagree, the slot's digest is one that no sound replica has. A
lane's digest is the sum of its slots' (64 bits each: against faults, not against forgers). Those of
segments are kept and used again while nothing in them has changed, for some time: what was damaged
without a change is found when that is over. All of it is done in portions, by generators that yield
how many slots they went through; whoever sends them the time decides when they go on.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf
from typing import Any, NamedTuple

from crdtstate.clock import mix
from crdtstate.document import Document
from crdtstate.errors import InvalidUpdate
from crdtstate.lane import Lane, Segment
from crdtstate.native import content
from crdtstate.slots import SEPARATOR, Slot
from crdtstate.values import unpack_key

MASK = 2**64 - 1

LEAF_MAX = 16
"""Slots that are named one by one; of more there are only sums."""

FANOUT = 256
"""Sums of a node, by the next byte of the hash of their slots' paths."""

PREFIX_BYTES_MAX = 8

TRIES = 3
"""How often the slots of a lane are gone through if it changes meanwhile."""

WHOLE = 0
"""Stands for all of a native document in place of a writer; no writer is 0."""

Portions = Generator[int, float, Any]
"""Work in portions: yields what each took, in slots, and is sent the time."""


class Sums(NamedTuple):
    """The digests of a document. Each lane's is of one moment, and all are if there is a *mark*.

    Attributes:
        mark: 64 bits over its version; None if it was at none for long enough.
        digest: 64 bits over all of it.
        lanes: Writer -> seq and digest of its lane. Empty for native documents.
    """

    mark: int | None
    digest: int
    lanes: dict[int, tuple[int, int]]


class Node(NamedTuple):
    """The slots of a lane whose paths hash to something that begins with a prefix.

    Attributes:
        mark: The seq of the lane; of a native document the mark of its version.
        size: How many they are.
        children: Their sums by the next byte.
        entries: Path -> digest: of all if there are at most LEAF_MAX, else of those that were
            asked for and a few more.
        heads: Those of the document's history at that moment.
    """

    mark: int
    size: int
    children: tuple[int, ...]
    entries: dict[str, int]
    heads: dict[int, int]

    @property
    def is_leaf(self) -> bool:
        return self.size <= LEAF_MAX


class _Kept(NamedTuple):
    """The sum of a segment, and how it was then: what is written to it raises *used*, what only
    leaves it lowers *live*."""

    used: int
    live: int
    digest: int
    at: float


@dataclass(slots=True)
class Memory:
    """What is remembered of a document's digests, to be used again."""

    # (writer, clock of a segment) -> its sum.
    segments: dict[tuple[int, int], _Kept] = field(default_factory=dict)
    # Writer -> paths that the index has in its lane and the lane has not; and when that was seen.
    strays: dict[int, set[str]] = field(default_factory=dict)
    strays_at: float = -inf
    # The sums of a native document's roots, of which version, and when that was.
    roots: dict[str, int] = field(default_factory=dict)
    roots_mark: int = -1
    roots_at: float = -inf


def version_mark(document: Document) -> int:
    """64 bits over the version of *document*."""
    found = 0
    for writer, seq in document.version.items():
        found ^= mix(0, writer, seq)
    return found


def mark_of(document: Document, writer: int) -> int:
    """What has to be equal for a lane, or for `WHOLE` of a native document, to be compared."""
    return version_mark(document) if writer == WHOLE else document.version.get(writer, 0)


# Sums


def sum_up(
    document: Document, memory: Memory, since: float, writers: Collection[int] | None = None
) -> Portions:
    """Sum up *document*, or only the lanes of *writers*, using again what was summed up after
    *since*. Returns `Sums`; None if the document is broken."""
    now = yield 0
    if document.native is not None:
        yield _sum_roots(document, memory, since, now)
        mark = version_mark(document)
        if document.is_broken or memory.roots_mark != mark:
            return None
        return Sums(mark, sum(memory.roots.values()) & MASK, {})
    if memory.strays_at < since:
        now = yield from _find_strays(document, memory, now)
    lanes: dict[int, tuple[int, int]] = {}
    for _ in range(TRIES if writers is None else 1):
        before, lanes = version_mark(document), {}
        named = document.version if writers is None else writers
        wanted = sorted(writer for writer in named if not document.hiding.hides_all(writer))
        for writer in wanted:
            now, found = yield from _sum_lane(document, memory, writer, since, now)
            if found is not None:
                lanes[writer] = found
        if document.is_broken:
            return None
        mark = version_mark(document)
        if mark == before and len(lanes) == len(wanted):
            total = sum(mix(digest, writer, seq) for writer, (seq, digest) in lanes.items())
            return Sums(mark, total & MASK, lanes)
        # By now most is known, and what was written meanwhile is soon summed up.
    return Sums(None, 0, lanes)


def _sum_lane(
    document: Document, memory: Memory, writer: int, since: float, now: float
) -> Generator[int, float, tuple[float, tuple[int, int] | None]]:
    """Sum up a lane. Returns the time, and seq and digest; None if it changes all the time."""
    for _ in range(TRIES):
        # Gone through without a pause, it is all of one moment.
        began = now
        digest = _sum_strays(document, memory, writer)
        seen: dict[tuple[int, int], _Kept] = {}
        lane = document.lanes.lanes.get(writer)
        for segment in list(lane.segments.values()) if lane is not None else ():
            assert lane is not None
            key = (writer, segment.clock)
            kept = memory.segments.get(key)
            if kept is None or kept[:2] != (segment.used, segment.live) or kept.at < since:
                if document.is_broken or document.lanes.lanes.get(writer) is not lane:
                    break
                kept = memory.segments[key] = _sum_segment(document, lane, segment, now)
                now = yield len(segment.tails)
            seen[key] = kept
            digest += kept.digest
        if now == began:
            for key in [k for k in memory.segments if k[0] == writer and k not in seen]:
                del memory.segments[key]
            return now, (document.version.get(writer, 0), digest & MASK)
    return now, None


def _sum_segment(document: Document, lane: Lane, segment: Segment, now: float) -> _Kept:
    digest = sum(entry for _, entry in _entries(document, lane, segment)) & MASK
    return _Kept(segment.used, segment.live, digest, now)


def _entries(document: Document, lane: Lane, segment: Segment) -> Iterator[tuple[str, int]]:
    """The digests of all that lies in a segment, or should."""
    held = _held(document, lane, segment)
    places = lane.places
    for path, clock in segment.tails.items():
        if places.get(path) == clock:
            slot = _slot(document, lane.writer, path)
            yield path, _digest(path, slot, held.pop(path, None))
    for path, data in held.items():
        # The Doc has it, and the lane does not know of it.
        yield path, _digest(path, None, data)


def _held(document: Document, lane: Lane, segment: Segment) -> dict[str, bytes]:
    try:
        return document.lanes.held(lane, segment)
    except BaseException as exc:
        # It holds something else than slots there, or is beyond use (see `Document.apply`).
        if isinstance(exc, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        return {}


def _slot(document: Document, writer: int, path: str) -> Slot | None:
    """What the index says, hidden or not, but for the open change."""
    if writer == document.writer and path in document.unsealed:
        return document.unsealed[path]
    return document.lanes.slot(writer, path)


def _digest(path: str, slot: Slot | None, held: bytes | None) -> int:
    """The digest of a slot. What only the index, or only the Doc has, or each differently, has
    one of its own."""
    said = b"" if slot is None else _plain(slot).encode()
    if slot is None or held is None or (held != said and not _is_said(held, slot)):
        return hash_of(b"damaged", path.encode(), said, held or b"")
    return hash_of(b"slot", path.encode(), said)


def _plain(slot: Slot) -> Slot:
    """The same for all who say the same, in whatever order."""
    return slot._replace(covers=dict(sorted(slot.covers.items()))) if slot.covers else slot


def _is_said(held: bytes, slot: Slot) -> bool:
    try:
        return Slot.decode(held) == slot
    except InvalidUpdate:
        return False


def hash_of(*parts: bytes) -> int:
    """64 bits over byte strings, told apart."""
    sizes = b"".join([len(part).to_bytes(4, "big") for part in parts])
    return int.from_bytes(blake2b(sizes + b"".join(parts), digest_size=8).digest(), "big")


def _find_strays(document: Document, memory: Memory, now: float) -> Portions:
    """Find what the index has in lanes that do not have it. Returns the time."""
    strays: dict[int, set[str]] = {}
    lanes = document.lanes
    for name in list(lanes.containers):
        cells = lanes.container(name).cells
        keys = list(cells)
        for at in range(0, len(keys), FANOUT):
            for key in keys[at : at + FANOUT]:
                path = name + SEPARATOR + key
                for writer in cells.get(key, ()):
                    if _is_stray(document, writer, path):
                        strays.setdefault(writer, set()).add(path)
            now = yield FANOUT // 8
    memory.strays, memory.strays_at = strays, now
    return now


def _is_stray(document: Document, writer: int, path: str) -> bool:
    lane = document.lanes.lanes.get(writer)
    is_placed = lane is not None and path in lane.places
    return not is_placed and _slot(document, writer, path) is not None


def _sum_strays(document: Document, memory: Memory, writer: int) -> int:
    return sum(
        _digest(path, _slot(document, writer, path), None)
        for path in memory.strays.get(writer, ())
        if _is_stray(document, writer, path)
    )


def _sum_roots(document: Document, memory: Memory, since: float, now: float) -> int:
    """Sum up the roots of a native document; return what it took."""
    assert document.native is not None
    mark = version_mark(document)
    if (memory.roots_mark == mark and memory.roots_at >= since) or document.is_broken:
        return 0
    contents = document.native.contents()
    memory.roots = {
        f"y{name}{SEPARATOR}": hash_of(name.encode(), _stable(content(root)).encode())
        for name, root in contents.items()
    }
    memory.roots_mark, memory.roots_at = mark, now
    return 1 + document.native.length


def _stable(value: Any) -> str:
    """What `content` gave as text: the same for equal ones."""
    match value:
        case type():
            return value.__name__
        case dict():
            pairs = (f"{key!r}:{_stable(inner)}" for key, inner in sorted(value.items()))
            return "{" + ",".join(pairs) + "}"
        case list() | tuple():
            return "[" + ",".join(map(_stable, value)) + "]"
    return repr(value)


# Down to the path


def list_slots(
    document: Document,
    memory: Memory,
    writer: int,
    prefix: bytes,
    wanted: Collection[str] = (),
) -> Portions:
    """Go through the slots of a lane (or the roots of a native document, for `WHOLE`) of whose
    paths the hash begins with *prefix*. Returns a `Node`, which has those of the paths *wanted*
    among its entries; None if the document is broken, or the lane changes all the time."""
    now = yield 0
    if (document.native is not None) != (writer == WHOLE):
        return None
    for _ in range(TRIES):
        if document.is_broken:
            return None
        if writer == WHOLE:
            yield _sum_roots(document, memory, 0.0, now)
            return _node(document, memory.roots_mark, prefix, memory.roots, wanted)
        lanes, mark = document.lanes, mark_of(document, writer)
        lane = lanes.lanes.get(writer) or Lane(writer)
        live = len(lane.places)
        node = _Tally(prefix, wanted)
        for segment in list(lane.segments.values()):
            for path, digest in _entries(document, lane, segment):
                node.add(path, digest)
            now = yield len(segment.tails)
        now = yield from _find_strays(document, memory, now)
        for path in sorted(memory.strays.get(writer, ())):
            node.add(path, _digest(path, _slot(document, writer, path), None))
        is_here = document.lanes is lanes and not document.is_broken
        if is_here and mark_of(document, writer) == mark and len(lane.places) == live:
            return node.close(mark, document)
    return None


def _node(
    document: Document, mark: int, prefix: bytes, entries: dict[str, int], wanted: Collection[str]
) -> Node | None:
    if document.is_broken or mark != version_mark(document):
        return None
    node = _Tally(prefix, wanted)
    for path, digest in entries.items():
        node.add(path, digest)
    return node.close(mark, document)


class _Tally:
    """A node while it is counted."""

    def __init__(self, prefix: bytes, wanted: Collection[str]) -> None:
        self._prefix = prefix
        self._wanted = frozenset(wanted)
        self._count = 0
        self._children = [0] * FANOUT
        self._entries: dict[str, int] = {}
        self._others = 0

    def add(self, path: str, digest: int) -> None:
        hashed = blake2b(path.encode(), digest_size=PREFIX_BYTES_MAX + 1).digest()
        if not hashed.startswith(self._prefix):
            return
        self._count += 1
        self._children[hashed[len(self._prefix)]] += digest
        if path in self._wanted or path in self._entries or self._others < LEAF_MAX:
            # A path that lies in two places is the fault that is looked for.
            self._others += path not in self._wanted and path not in self._entries
            self._entries[path] = self._entries.get(path, 0) + digest & MASK

    def close(self, mark: int, document: Document) -> Node:
        children = tuple(child & MASK for child in self._children)
        return Node(mark, self._count, children, self._entries, dict(document.heads))


def slot_digest(document: Document, memory: Memory, writer: int, path: str) -> int | None:
    """The digest of one slot, or of a root of a native document; None if there is none."""
    if writer == WHOLE:
        return memory.roots.get(path) if memory.roots_mark == version_mark(document) else None
    lane = document.lanes.lanes.get(writer)
    clock = lane.places.get(path) if lane is not None else None
    if lane is None or clock is None:
        is_stray = _is_stray(document, writer, path)
        return _digest(path, _slot(document, writer, path), None) if is_stray else None
    found = [entry for at, entry in _entries(document, lane, lane.items[clock][0]) if at == path]
    return sum(found) & MASK


def describe(path: str) -> str:
    """A path, which may come from anybody, as people write it, such as ``plan['goal']``."""
    container, separator, key = path.partition(SEPARATOR)
    shown: Any = key
    if container.startswith("s"):
        try:
            shown = unpack_key(key)
        except Exception:
            shown = key
    return f"{container[1:]}[{shown!r}]" if key else container[1:]
