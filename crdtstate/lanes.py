"""
Single-writer lanes: how a document's state lies in a pycrdt Doc.

A document is one ``pycrdt.Doc`` whose root map ``lanes`` holds, for each writer, a *lane*: a few
*segments* (nested maps under the root keys ``writer/number``) that map a *path* to a *slot*. The
state of a path is the set of its slots over all lanes, its *cell*. Writers never touch each
other's lanes, so concurrent writes to a path never meet inside Yjs, where one would vanish: both
stay visible until somebody who saw both writes again. The per-path vector clocks are the dotted
version vectors of Riak (Preguiça et al., "Dotted Version Vectors", 2010); segments and their
cleaning are those of a log-structured file system (Rosenblum & Ousterhout, 1992).

The invariants, kept in this module and `document`:

L1  Only writer W changes lane W (but see L6).
L2  A slot is *live* unless a visible slot of another lane covers it. The live slots of a path
    that hold a value are its *candidates*; several are a conflict.
L3  The owner drops its slot once it is covered, and drops its removal once that covers nothing
    visible.
L4  A path has one slot per lane. Writes go to the lane's head segment and leave their older
    one in the same transaction. A segment that is two thirds dead is cleaned: its live slots
    move to the head and the nested map is deleted, which Yjs folds into one garbage range.
L5  Changes are delivered in causal order; L2 to L4 are only sound under it.
L6  A closed writer's lane is adopted by a successor, only once all its changes are delivered.
    An adopted slot keeps its *origin* dot, so a write that covered the original covers the
    copy; counter totals stay filed under the origin writer and count once. Hence adopting
    twice, or while somebody overwrites the original, is harmless.

Reads never touch Rust: this module keeps a Python index of all cells beside the Doc. Local writes
know their slots, and those of a remote change come out of the check it must pass before pycrdt
sees it. pycrdt is imported here and in `native` only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from pycrdt import Doc
from pycrdt import Map as YMap

from crdtstate import guard
from crdtstate.clock import Dot, Version
from crdtstate.errors import InvalidUpdate
from crdtstate.slots import (
    SEPARATOR,
    Cell,
    Container,
    Slot,
    check_content,
    contains_totals,
    live_slots,
    totals,
)

SEGMENT_SLOTS = 1000
"""Writes into one segment before the next one opens. Larger: less overhead; longer cleanings."""

CLEANED_BELOW = 3
"""A closed segment is cleaned when at most one slot in so many is live."""


def segment_key(writer: int, clock: int) -> str:
    """The root key of the segment that *writer* opens at *clock*: never used twice."""
    return f"{writer}/{clock}"


class Segment:
    """One nested map of a lane: the last item of every path written to it, live or not."""

    __slots__ = ("clock", "key", "tails", "used", "live", "last")

    def __init__(self, clock: int, key: str) -> None:
        self.clock = clock
        self.key = key
        self.tails: dict[str, int] = {}
        # Items ever written into it, those of them that are live, and the newest one's clock.
        self.used = 0
        self.live = 0
        self.last = clock

    def is_ripe(self) -> bool:
        """Whether so much of it is dead that cleaning it pays."""
        return self.live * CLEANED_BELOW <= self.used


class Lane:
    """Where the slots of one writer lie: the shadow of its items in the Doc."""

    __slots__ = ("writer", "clock", "segments", "items", "places", "ripe", "head")

    def __init__(self, writer: int) -> None:
        self.writer = writer
        # The clock that yrs gives to the writer's next item.
        self.clock = 0
        # Item clock of a living segment -> segment.
        self.segments: dict[int, Segment] = {}
        # Item clock of the last item of a path in a living segment -> where.
        self.items: dict[int, tuple[Segment, str]] = {}
        # Path -> clock of its one live item (L4).
        self.places: dict[str, int] = {}
        # Segments to clean, by clock; a dict because it keeps the order.
        self.ripe: dict[int, Segment] = {}
        # The newest segment, which is written to.
        self.head: Segment | None = None

    def open(self, clock: int) -> Segment:
        segment = self.segments[clock] = Segment(clock, segment_key(self.writer, clock))
        self.head = segment
        return segment

    def place(self, segment: Segment, path: str, clock: int) -> None:
        """Record that *path* is now said by the item *clock* of *segment*."""
        self.leave(path)
        before = segment.tails.get(path)
        if before is not None:
            del self.items[before]
        segment.tails[path] = clock
        segment.used += 1
        segment.live += 1
        segment.last = clock
        self.items[clock] = (segment, path)
        self.places[path] = clock

    def leave(self, path: str) -> None:
        """Record that no item says *path* any more."""
        clock = self.places.pop(path, None)
        if clock is not None:
            segment = self.items[clock][0]
            segment.live -= 1
            if segment.is_ripe():
                self.ripe[segment.clock] = segment

    def close(self, segment: Segment) -> None:
        """Forget a deleted segment; its live paths have left before."""
        del self.segments[segment.clock]
        self.ripe.pop(segment.clock, None)
        if segment is self.head:
            self.head = None
        for clock in segment.tails.values():
            del self.items[clock]

    def live_paths(self, segment: Segment) -> list[str]:
        return [path for path, clock in segment.tails.items() if self.places.get(path) == clock]


class Plan(NamedTuple):
    """A checked change, ready to be applied."""

    writer: int
    segments: list[int]
    """Clocks of new segments."""
    puts: list[tuple[int, int, str, Slot]]
    """(item's clock, segment's clock, path, slot)"""
    drops: list[tuple[int, str]]
    """(lane's writer, path)"""
    closes: list[int]
    """Clocks of deleted segments of the writer."""
    moved: set[str]
    """Paths whose slot only moved to another segment."""
    clock: int
    """The clock of the writer's next item, afterwards."""


class Lanes:
    """The lanes of one document, over one pycrdt Doc, with the index of all cells.

    Args:
        writer: The writer of this replica: the only lane written here.
    """

    def __init__(self, writer: int) -> None:
        self.writer = writer
        # "kind" + "name" -> its cells.
        self.containers: dict[str, Container] = {}
        # Writer -> where its items lie.
        self.lanes: dict[int, Lane] = {}
        # Own paths whose slot can perhaps be dropped (L3); judged again when they are.
        # A dict because it keeps the order: one history gives one sequence of bytes.
        self.settled: dict[str, None] = {}
        self._updates: list[bytes] = []
        self._start(Doc(client_id=writer))

    def _start(self, doc: Doc[Any]) -> None:
        self._doc = doc
        self._root: YMap[Any] = doc.get("lanes", type=YMap)
        self._subscription = doc.observe(lambda event: self._updates.append(event.update))
        # The engine's handles of own segments by clock, as far as they were used, and of the
        # transaction in which they are written.
        self._maps: dict[int, Any] = {}
        self._transaction: Any = None

    def close(self) -> None:
        """Let the Doc go; one that is still observed is never freed."""
        self._doc.unobserve(self._subscription)

    # Reading

    def container(self, name: str) -> Container:
        """The cells of the view *name*, empty if there are none."""
        found = self.containers.get(name)
        if found is None:
            found = self.containers[name] = Container(name)
        return found

    def own_slot(self, path: str) -> Slot | None:
        container, _, key = path.partition(SEPARATOR)
        return self.container(container).cells.get(key, {}).get(self.writer)

    # Writing

    def set_own(self, path: str, slot: Slot | None) -> None:
        """Change the index only; `write` brings the Doc after it."""
        container, _, key = path.partition(SEPARATOR)
        self.container(container).update(key, self.writer, slot)

    def settle(self, limit: int, busy: Collection[str]) -> list[str]:
        """Take up to *limit* own slots that are covered, or removals that cover nothing visible
        (L3), out of the index and return their paths. Paths in *busy* wait."""
        drops: list[str] = []
        waiting: list[str] = []
        while self.settled and len(drops) < limit:
            path, _ = self.settled.popitem()
            if path in busy:
                waiting.append(path)
            elif self._is_settled(path):
                self.set_own(path, None)
                drops.append(path)
        self.settled.update(dict.fromkeys(waiting))
        return drops

    def _is_settled(self, path: str) -> bool:
        container, _, key = path.partition(SEPARATOR)
        cell = self.container(container).cells.get(key)
        own = cell.get(self.writer) if cell else None
        if cell is None or own is None or container.startswith("c"):
            return False
        if all(writer != self.writer for writer, _ in live_slots(cell)):
            return True
        return own.value is None and not any(
            own.covers.get(writer, 0) >= slot.seq
            or (
                slot.origin is not None and own.covers.get(slot.origin.writer, 0) >= slot.origin.seq
            )
            for writer, slot in cell.items()
            if writer != self.writer
        )

    def write(
        self, slots: Mapping[str, Slot | None], adopt: tuple[Lane, list[str]] | None = None
    ) -> bytes:
        """Bring the own lane in the Doc after the index, in one transaction: *slots* is what the
        index has of it at the paths that changed.

        Returns the update, empty if nothing had to change. *adopt* names a closed writer's lane
        and the paths that leave it in the same transaction (L6).
        """
        lane = self.lane(self.writer)
        written = 0
        first_clock = lane.clock
        with self._doc.transaction() as transaction:
            # Slots go in and out by the engine's own handles: pycrdt's Map opens a nested
            # transaction for every access, three of them for a deletion, half of a write's time.
            self._transaction = transaction._txn
            for path, slot in slots.items():
                if slot is None:
                    self._drop(lane, path)
                else:
                    self._put(lane, path, slot)
                    written += 1
            for _ in range(1 + written // SEGMENT_SLOTS):
                if not self._clean(lane, first_clock):
                    break
            if adopt is not None:
                self._empty(*adopt)
        if not self._updates:
            return b""
        update = self._updates.pop()
        assert not self._updates, "one transaction gives one update"
        return update

    def _put(self, lane: Lane, path: str, slot: Slot) -> None:
        head = lane.head
        if head is None or head.used >= SEGMENT_SLOTS:
            head = self._open(lane)
        old = lane.places.get(path)
        if old is not None:
            segment = lane.items[old][0]
            if segment is not head:
                self._take_out(segment, path)
        self._map(head).insert(self._transaction, path, slot.encode())
        lane.place(head, path, lane.clock)
        lane.clock += 1

    def _drop(self, lane: Lane, path: str) -> None:
        clock = lane.places.get(path)
        if clock is not None:
            self._take_out(lane.items[clock][0], path)
            lane.leave(path)

    def _take_out(self, segment: Segment, path: str) -> None:
        self._map(segment).remove(self._transaction, path)

    def _open(self, lane: Lane) -> Segment:
        head = lane.open(lane.clock)
        self._root[head.key] = YMap({})
        lane.clock += 1
        return head

    def _map(self, segment: Segment) -> Any:
        found = self._maps.get(segment.clock)
        if found is None:
            found = self._maps[segment.clock] = self._root[segment.key].integrated
        return found

    def _clean(self, lane: Lane, before: int) -> bool:
        """Clean one segment that is mostly dead and was there *before* this transaction (L4)."""
        for segment in lane.ripe.values():
            # Yjs would merge items written and deleted in one transaction, which the strict
            # form of a change refuses: what was written just now has its turn next time.
            if segment is lane.head or not segment.is_ripe() or segment.last >= before:
                continue
            for path in lane.live_paths(segment):
                slot = self.own_slot(path)
                assert slot is not None, f"{path!r} lies in the lane but not in the index"
                # It need not be taken out: it goes with the whole segment.
                lane.leave(path)
                self._put(lane, path, slot)
            del self._root[segment.key]
            self._maps.pop(segment.clock, None)
            lane.close(segment)
            return True
        return False

    def _empty(self, lane: Lane, paths: list[str]) -> None:
        # The segments themselves stay, so that a change of the closed writer that turns up
        # late still finds the map it writes to.
        for path in paths:
            del self._root[lane.items[lane.places[path]][0].key][path]
            container, _, key = path.partition(SEPARATOR)
            lane.leave(path)
            self.container(container).update(key, lane.writer, None)

    # Replicating

    def lane(self, writer: int) -> Lane:
        found = self.lanes.get(writer)
        if found is None:
            found = self.lanes[writer] = Lane(writer)
        return found

    def check(self, update: bytes, writer: int, seq: int, version: Version) -> Plan:
        """Check the *update* of change *seq* of *writer* against the lanes; change nothing.

        *version* is what the document has taken in. Raises InvalidUpdate.
        """
        parsed = guard.parse_change(update)
        if parsed.client is not None and parsed.client != writer:
            raise InvalidUpdate(f"writer {writer:x} writes as {parsed.client:x} (L1)")
        lane = self.lanes.get(writer) or Lane(writer)
        clock = lane.clock
        if parsed.client is not None and parsed.clock != clock:
            raise InvalidUpdate(f"items start at clock {parsed.clock}, expected {clock}")
        opened: list[int] = []
        puts: list[tuple[int, int, str, Slot]] = []
        moved: set[str] = set()
        seen: set[str] = set()
        dead, closes = self._check_deletes(parsed.deletes, lane)
        for origin, parent, key, content in parsed.items:
            if content is None:
                if parent != "lanes" or key != segment_key(writer, clock):
                    raise InvalidUpdate("a segment outside of its writer's lane (L1)")
                opened.append(clock)
            else:
                where, path = _locate(lane, opened, origin, parent, key)
                if path in seen:
                    raise InvalidUpdate(f"path {path!r} twice in one change (L4)")
                if path in lane.places and (writer, path) not in dead:
                    raise InvalidUpdate(f"path {path!r} keeps an older slot (L4)")
                seen.add(path)
                slot = Slot.decode(content)
                if self._check_slot(path, slot, writer, seq, version):
                    moved.add(path)
                puts.append((clock, where, path, slot))
            clock += 1
        drops = [(owner, path) for owner, path in dead if owner != writer or path not in seen]
        if drops:
            self._check_adoption(drops, puts, writer)
        return Plan(writer, opened, puts, drops, closes, moved, clock)

    def _check_slot(self, path: str, slot: Slot, writer: int, seq: int, version: Version) -> bool:
        """Check one slot; return whether it only moved."""
        if slot.seq != seq:
            container, _, key = path.partition(SEPARATOR)
            cells = self.containers.get(container)
            here = cells.cells.get(key, {}).get(writer) if cells else None
            if here == slot:
                return True
            # Missing, it may be one that an adopter took before this change turned up (L6).
            if here is not None or slot.seq > seq:
                raise InvalidUpdate(f"slot {path!r} is dated {slot.seq} in change {seq}")
        for other, covered in slot.covers.items():
            # Else one could cover what is not written yet, and it would vanish on arrival.
            if other == writer or covered > version.get(other, 0):
                raise InvalidUpdate(f"slot {path!r} covers what its writer cannot have seen (L2)")
        if slot.origin is not None:
            if slot.origin.writer == writer or not version.covers(slot.origin):
                raise InvalidUpdate(f"slot {path!r} adopts what its writer cannot have seen (L6)")
            if slot.origin.writer in slot.covers:
                raise InvalidUpdate(f"slot {path!r} covers its own origin (L6)")
        check_content(path, slot)
        return False

    def _check_deletes(
        self, deletes: list[tuple[int, int, int]], lane: Lane
    ) -> tuple[set[tuple[int, str]], list[int]]:
        """What the delete set removes: (lane's writer, path) of slots, clocks of segments."""
        dead: set[tuple[int, str]] = set()
        closes: list[int] = []
        for client, start, length in deletes:
            owner = lane if client == lane.writer else self.lanes.get(client)
            if owner is None:
                raise InvalidUpdate(f"deletes in the unknown lane {client:x}")
            for clock in range(start, start + length):
                item = owner.items.get(clock)
                if item is not None:
                    # A dead item again is what a late change of an adopted lane may say (L6).
                    if owner.places.get(item[1]) == clock:
                        dead.add((client, item[1]))
                elif clock in owner.segments and owner is lane:
                    closes.append(clock)
                elif owner is lane or clock in owner.segments or clock >= owner.clock:
                    # Else the owner replaced it, in a change that its adopter has not seen (L6).
                    raise InvalidUpdate(f"deletes item {client:x}:{clock}, which is not there")
        for clock in closes:
            segment = lane.segments[clock]
            if any((lane.writer, path) not in dead for path in lane.live_paths(segment)):
                raise InvalidUpdate(f"deletes segment {segment.key} with slots in it (L4)")
        return dead, closes

    def _check_adoption(
        self, drops: list[tuple[int, str]], puts: list[tuple[int, int, str, Slot]], writer: int
    ) -> None:
        """Another lane's slot may only go when its content lives on in this change (L6)."""
        foreign = [(owner, path) for owner, path in drops if owner != writer]
        if not foreign:
            return
        new = {path: slot for _, _, path, slot in puts}
        for owner, path in foreign:
            container, _, key = path.partition(SEPARATOR)
            cell = self.container(container).cells[key]
            old, put = cell[owner], new.get(path)
            if container[0] == "c":
                if put is None or not contains_totals(totals(put), totals(old), owner):
                    raise InvalidUpdate(f"counter {path!r} of {owner:x} would lose counts (L6)")
            elif put is not None and put.origin == (old.origin or Dot(owner, old.seq)):
                continue
            elif any(lane == owner for lane, _ in live_slots(cell)) and (
                put is None or put.covers.get(owner, 0) < old.seq
            ):
                raise InvalidUpdate(f"{writer:x} deletes slot {path!r} of {owner:x} (L1)")

    def apply(self, update: bytes, plan: Plan) -> list[str]:
        """Apply a checked change to the Doc and the index; return the paths that changed.

        Whatever pycrdt raises comes out as it is, PanicException (a BaseException) included;
        the Doc is then beyond use and must be rebuilt, the index is unchanged.
        """
        self._doc.apply_update(update)
        self._updates.clear()
        lane = self.lane(plan.writer)
        lane.clock = plan.clock
        for clock in plan.segments:
            lane.open(clock)
        touched: list[str] = []
        for owner, path in plan.drops:
            self.lane(owner).leave(path)
            container, _, key = path.partition(SEPARATOR)
            self.container(container).update(key, owner, None)
            touched.append(path)
        for clock, where, path, slot in plan.puts:
            lane.place(lane.segments[where], path, clock)
            if path not in plan.moved:
                container, _, key = path.partition(SEPARATOR)
                self.container(container).update(key, plan.writer, slot)
                touched.append(path)
        for clock in plan.closes:
            lane.close(lane.segments[clock])
        own = self.lanes.get(self.writer)
        if own is not None:
            self.settled.update((path, None) for path in touched if path in own.places)
        return touched

    # State

    def state(self) -> bytes:
        """The whole document as one update, proportional to its live content."""
        update: bytes = self._doc.get_update()
        return update

    def load(self, state: bytes, version: Version) -> None:
        """Take *state*, the document at *version* from anybody, in place of what is here.

        It goes into a fresh Doc, never into the living one. Raises InvalidUpdate, and what
        pycrdt raises; then nothing changed.
        """
        lanes, containers = _read_state(state, version)
        doc: Doc[Any] = Doc(client_id=self.writer)
        doc.apply_update(state)
        self.close()
        self._updates.clear()
        self._start(doc)
        self.lanes, self.containers = lanes, containers
        own = self.lane(self.writer)
        self.settled = {path: None for path in own.places if self._is_settled(path)}

    def join(self, state: bytes, newer: Callable[[int], bool]) -> bytes:
        """Return the join of this document and *state*: the lanes for which ``newer(writer)``
        from *state*, the others from here. Of one lane, the higher seq has everything, except
        for deletions by an adopter (L6): those of both sides count. Raises InvalidUpdate."""
        scratch: Doc[Any] = Doc()
        scratch.apply_update(guard.join_states(self.state(), state, newer))
        joined: bytes = scratch.get_update()
        return joined

    def canonical(self) -> dict[str, Cell]:
        """Every path with its slots: equal on replicas of equal version."""
        return {
            name + SEPARATOR + key: dict(cell)
            for name, container in sorted(self.containers.items())
            for key, cell in sorted(container.cells.items())
        }


def _locate(
    lane: Lane,
    opened: Collection[int],
    origin: int | None,
    parent: int | str | None,
    key: str | None,
) -> tuple[int, str]:
    """The segment's clock and the path of an item."""
    if origin is not None:
        item = lane.items.get(origin)
        if item is None:
            raise InvalidUpdate(f"follows item {origin}, which is not there")
        return item[0].clock, item[1]
    segment = lane.segments.get(parent) if type(parent) is int else None
    if type(parent) is not int or key is None or (segment is None and parent not in opened):
        raise InvalidUpdate("a slot outside of its writer's segments (L1)")
    if segment is not None and key in segment.tails:
        raise InvalidUpdate(f"path {key!r} starts twice in segment {segment.key}")
    return parent, key


def _read_state(state: bytes, version: Version) -> tuple[dict[int, Lane], dict[str, Container]]:
    """Parse a whole document at *version* into lanes and index. Raises InvalidUpdate."""
    lanes: dict[int, Lane] = {}
    containers: dict[str, Container] = {}
    for writer, parsed in guard.parse_state(state).items():
        lane = lanes[writer] = Lane(writer)
        lane.clock = parsed.clock
        for clock, length, kind, _, parent, path, content in parsed.structs:
            if kind == guard.GC:
                continue
            assert path is not None
            if kind == guard.SEGMENT:
                if path != segment_key(writer, clock):
                    raise InvalidUpdate("a segment outside of its writer's lane (L1)")
                lane.open(clock)
            elif type(parent) is int:
                segment = lane.segments.get(parent)
                if segment is None:
                    raise InvalidUpdate("a slot outside of its writer's segments (L1)")
                if kind == guard.DELETED:
                    _bury(lane, segment, path, clock, length)
                    continue
                assert content is not None
                if path in lane.places:
                    raise InvalidUpdate(f"path {path!r} has two slots in a lane (L4)")
                slot = Slot.decode(content)
                _check_stored(path, slot, writer, version)
                lane.place(segment, path, clock)
                container, _, key = path.partition(SEPARATOR)
                if container not in containers:
                    containers[container] = Container(container)
                containers[container].update(key, writer, slot)
    return lanes, containers


def _bury(lane: Lane, segment: Segment, path: str, clock: int, length: int) -> None:
    """Record a dead run of a chain: what its next item will follow."""
    tail = clock + length - 1
    before = segment.tails.get(path)
    if before is not None:
        del lane.items[before]
    segment.tails[path] = tail
    segment.used += length
    segment.last = max(segment.last, tail)
    lane.items[tail] = (segment, path)


def _check_stored(path: str, slot: Slot, writer: int, version: Version) -> None:
    if slot.seq > version.get(writer, 0):
        raise InvalidUpdate(f"slot {path!r} is newer than its document")
    if writer in slot.covers or (slot.origin is not None and slot.origin.writer in slot.covers):
        raise InvalidUpdate(f"slot {path!r} covers itself (L2)")
    if any(seq > version.get(other, 0) for other, seq in slot.covers.items()):
        raise InvalidUpdate(f"slot {path!r} covers what is newer than its document (L2)")
    check_content(path, slot)
