"""
Single-writer lanes: how a document's state lies in a pycrdt Doc.

A document is one ``pycrdt.Doc`` whose root map ``lanes`` holds, for each writer, a *lane*: a few
*segments* that map a *path* to a *slot*. They are nested maps in *groups*, which are maps under the
root keys ``writer/number``: what is left of a deleted segment goes with its group. The state of a
path is the set of its slots over all lanes, its *cell*. Writers never touch each other's lanes, so
concurrent writes to a path never meet inside Yjs, where one would vanish: both stay visible until
somebody who saw both writes again. The per-path vector clocks are the dotted version vectors of
Riak (Preguiça et al., "Dotted Version Vectors", 2010); segments and their cleaning are those of a
log-structured file system (Rosenblum & Ousterhout, 1992).

The invariants, kept in this module and `document`:

L1  Only writer W writes in lane W.
L2  A slot is *live* unless a visible slot of another lane covers it. The live slots of a path
    that hold a value are its *candidates*; several are a conflict.
L3  The owner drops its slot once it is covered, and drops its removal once that covers nothing
    visible. Both are *settled*: they make no difference any more.
L4  A path has one slot per lane. Writes go to the lane's head segment and leave their older
    one in the same transaction. A segment that is three quarters dead is cleaned: its live slots
    move to the head and the nested map is deleted, which Yjs folds into one garbage range. A
    full group whose segments are all deleted is deleted too.
L5  Changes are delivered in causal order; L2 to L4 are only sound under it.
L6  A closed writer's lane is adopted by a successor, once all its changes are delivered: it
    drops there what is settled, as the owner would. What is live stays where it is, under its
    own dot, so adopting twice, or while somebody overwrites it, is harmless.
L7  What is hidden (`hiding`) lies in the Doc as ever. In the index a *stand-in* is in its place,
    with its seq and stamp, but without value and covers; the slot itself is kept beside the index.
    Who reads sees the stand-in. Whatever concerns the lane asks for the slot itself: what its
    owner writes, cleans and drops, what a foreign change is checked against. A slot that only
    hidden ones cover is not settled (L3); a hidden one is, once a visible one covers it. A write
    covers what is hidden like all else.

Reads never touch Rust: this module keeps a Python index of all cells beside the Doc. Local writes
know their slots, and those of a remote change come out of the check it must pass before pycrdt
sees it. pycrdt is imported here and in `native` only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from pycrdt import Doc
from pycrdt import Map as YMap

from crdtstate import guard
from crdtstate.clock import Dot, Version
from crdtstate.errors import InvalidUpdate
from crdtstate.hiding import Hiding
from crdtstate.lane import Lane, Segment, group_key, segment_key
from crdtstate.loading import read_state
from crdtstate.rules import Use
from crdtstate.slots import (
    SEPARATOR,
    Cell,
    Container,
    Slot,
    candidates,
    check_contents,
    decode_slots,
    is_settled,
    live_slots,
    split_path,
)

SEGMENT_SLOTS = 700
"""Writes into one segment before the next one opens, at most. Larger: less overhead; longer
cleanings. A lane with few slots has shorter ones, down to a quarter, for less dead weight."""

GROUP_SEGMENTS = 32
"""Segments in one group."""

CLEANED_BYTES_MAX = 512 * 1024
CLEANED_SLOTS_MAX = 4_000
"""What cleaning may add to a change, or its first slot alone."""

ADOPTED_PER_CHANGE = 50
"""Lanes in which one change may drop slots; the guard's limit is 64."""

GARBAGE_MAX = 8_000
GARBAGE_PER_SLOT = 12
"""Dead items, of 2 bytes each, that yrs may hold apart before the Doc is renewed, and how many more
for each live slot."""

NOTHING_OPEN: Mapping[str, Slot | None] = {}


class Plan(NamedTuple):
    """A checked change, ready to be applied."""

    writer: int
    groups: list[int]
    """Clocks of new groups."""
    segments: list[tuple[int, int]]
    """Clocks of new segments, each with its group's."""
    puts: list[tuple[int, int, str, Slot]]
    """(item's clock, segment's clock, path, slot)"""
    drops: list[tuple[int, str]]
    """(lane's writer, path)"""
    closes: list[int]
    """Clocks of deleted segments and groups of the writer, segments first."""
    moved: set[str]
    """Paths whose slot only moved to another segment."""
    clock: int
    """The clock of the writer's next item, afterwards."""

    def written(self, seq: int) -> dict[str, Slot]:
        """What change *seq* says anew, by path. It follows from the change alone."""
        return {path: slot for _, _, path, slot in self.puts if slot.seq == seq}

    def builds_on(self, deps: Iterable[Dot]) -> list[Dot]:
        """What the change builds on: *deps*, which it names, and what it covers. Of who tells the
        truth that is no more."""
        covered = (Dot(*pair) for _, _, _, slot in self.puts for pair in slot.covers.items())
        return [*deps, *covered]


class Lanes:
    """The lanes of one document, over one pycrdt Doc, with the index of all cells.

    Args:
        writer: The writer of this replica: the only lane written here.
        hiding: What is hidden.
    """

    def __init__(self, writer: int, hiding: Hiding | None = None) -> None:
        self.writer = writer
        # "kind" + "name" -> its cells.
        self.containers: dict[str, Container] = {}
        self._hiding = hiding or Hiding()
        # (writer, path) -> the slot for which the index has a stand-in (L7).
        self.hidden: dict[tuple[int, str], Slot] = {}
        # Writer -> how much is in its lane, once that was asked for.
        self._uses: dict[int, Use] = {}
        # Nothing is hidden or measured: the index is just what was written. See `watch`.
        self.is_plain = not self._hiding
        # Writer -> where its items lie.
        self.lanes: dict[int, Lane] = {}
        # Writers whose settled slots are dropped here: the own one and the adopted (L6).
        self.tended = [writer]
        # (writer, path) of slots that can perhaps be dropped (L3); judged again when they are.
        # A dict because it keeps the order: one history gives one sequence of bytes.
        self.settled: dict[tuple[int, str], None] = {}
        self._updates: list[bytes] = []
        # Items in deleted segments that yrs has not folded together: those of a path that was
        # written to the segment again and again, but for its last.
        self._garbage = 0
        self._begin()

    def _begin(self) -> None:
        self._start(Doc(client_id=self.writer))

    def _start(self, doc: Doc[Any]) -> None:
        self._doc = doc
        self._root: YMap[Any] = doc.get("lanes", type=YMap)
        self._subscription = doc.observe(lambda event: self._updates.append(event.update))
        # The engine's handles of own segments by clock, as far as they were used, and of the
        # transaction in which they are written.
        self._maps: dict[int, Any] = {}
        self._transaction: Any = None

    def _renew(self) -> None:
        """Take a fresh Doc of the same content if this one holds much unfolded garbage. At
        loading yrs folds all of it; the cost, that of a load, comes once in many thousand writes,
        and more seldom the more there is to load."""
        live = sum(len(lane.places) for lane in self.lanes.values())
        if self._garbage > GARBAGE_MAX + GARBAGE_PER_SLOT * live:
            doc: Doc[Any] = Doc(client_id=self.writer)
            doc.apply_update(self.state())
            self._replace(doc)

    def _replace(self, doc: Doc[Any]) -> None:
        self.close()
        self._updates.clear()
        self._garbage = 0
        self._start(doc)

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
        if self.hidden:
            return self.slot(self.writer, path)
        container, _, key = path.partition(SEPARATOR)
        return self.container(container).cells.get(key, {}).get(self.writer)

    def slot(self, writer: int, path: str) -> Slot | None:
        """What a lane says at *path*, hidden or not."""
        if self.hidden and (found := self.hidden.get((writer, path))) is not None:
            return found
        return self.cell(path).get(writer)

    def cell(self, path: str) -> Cell:
        """The slots at *path*, as they can be seen."""
        container, _, key = path.partition(SEPARATOR)
        found = self.containers.get(container)
        return found.cells.get(key, {}) if found is not None else {}

    def _whole_cell(self, path: str) -> Cell:
        """The slots at *path*, the hidden ones too."""
        cell = self.cell(path)
        if not self.hidden:
            return cell
        return {writer: self.hidden.get((writer, path), slot) for writer, slot in cell.items()}

    def slots(self, writer: int) -> dict[str, Slot]:
        """What a lane says, by path, hidden or not. Goes through the whole index."""
        found = {
            name + SEPARATOR + key: cell[writer]
            for name, container in self.containers.items()
            for key, cell in container.cells.items()
            if writer in cell
        }
        for (whose, path), slot in self.hidden.items():
            if whose == writer:
                found[path] = slot
        return found

    def use(self, writer: int) -> Use:
        """How much is in the lane of *writer*, hidden or not; the own one with open writes."""
        use = self._uses.get(writer)
        if use is None:
            use, lane = Use(), self.lanes.get(writer)
            if writer == self.writer or lane is None:
                # What is open is not in the lane yet.
                slots = self.slots(writer)
            else:
                slots = {path: slot for path in lane.places if (slot := self.slot(writer, path))}
            for path, slot in slots.items():
                use = use.plus(path, slot)
            self._uses[writer] = use
            self.is_plain = False
        return use

    # Hiding

    @property
    def hiding(self) -> Hiding:
        """What is hidden. Who alters it calls `watch`, and `review` for what is here already."""
        return self._hiding

    @hiding.setter
    def hiding(self, hiding: Hiding) -> None:
        self._hiding = hiding
        self.watch()

    def watch(self) -> None:
        """What is to be hidden has changed."""
        self.is_plain = not (self.hidden or self._uses or self.hiding)

    def review(self, writer: int, paths: Collection[str] | None = None) -> list[str]:
        """What is hidden of a writer's lane, or only at *paths*, is told anew by `hiding`. Returns
        the paths that changed."""
        lane = self.lanes.get(writer)
        changed = []
        self.is_plain = False
        if paths is None:
            paths = list(lane.places) if lane is not None else list(self.slots(writer))
        for path in paths:
            slot = self.slot(writer, path)
            if slot is not None:
                before = self._seen(path)
                self._update(path, writer, slot)
                if self._seen(path) != before:
                    changed.append(path)
        self.watch()
        # What it covers can be settled now, or is not any more.
        self.look_at(changed)
        return changed

    def _seen(self, path: str) -> object:
        """What can be seen at *path*, to be compared."""
        cell = self.cell(path)
        return dict(cell) if path[0] == "c" else candidates(cell)

    def _veil(self, writer: int, path: str, slot: Slot | None) -> Slot | None:
        """What the index is to have where a lane says *slot* now."""
        use = self._uses.get(writer)
        if use is not None:
            use = use.plus(path, self.slot(writer, path), -1)
            self._uses[writer] = use.plus(path, slot)
        self.hidden.pop((writer, path), None)
        if slot is None:
            return None
        shown = self.hiding.stand_in(writer, path, slot)
        if shown is not slot:
            self.hidden[writer, path] = slot
        return shown

    def _veil_all(self) -> None:
        """Hide in an index that was just loaded."""
        self.hidden.clear()
        self._uses.clear()
        hiding = self.hiding
        self.watch()
        if not hiding:
            return
        for writer in list(hiding.refused):
            # A snapshot tells which changes are refused, not where they stand.
            lane = self.lanes.get(writer)
            slots = {path: self.slot(writer, path) for path in (lane.places if lane else ())}
            hiding.stand(writer, {path: slot.seq for path, slot in slots.items() if slot})
        for writer in list(self.lanes):
            if writer in hiding.ceilings:
                self.review(writer)
            else:
                self.review(writer, hiding.places(writer))

    # Writing

    def set_own(self, path: str, slot: Slot | None) -> None:
        """Change the index only; `write` brings the Doc after it."""
        self._update(path, self.writer, slot)

    def _update(self, path: str, writer: int, slot: Slot | None) -> None:
        container, _, key = path.partition(SEPARATOR)
        if not self.is_plain:
            slot = self._veil(writer, path, slot)
        self.container(container).update(key, writer, slot)

    def adopt(self, writer: int) -> None:
        """Drop from now on what is settled in the lane of a closed *writer* (L6). Only right
        once all its changes are delivered."""
        if writer not in self.tended:
            self.tended.append(writer)
            self._look_over(writer)

    def _look_over(self, writer: int) -> None:
        for name, container in self.containers.items():
            if container.is_counter:
                continue
            for key, cell in container.cells.items():
                # A value that is alone, as nearly all are, never is.
                if (len(cell) > 1 or key in container.dead) and writer in cell:
                    if is_settled(cell, writer):
                        self.settled[writer, name + SEPARATOR + key] = None

    def look_at(self, paths: Collection[str]) -> None:
        """Cells have changed at *paths*: what is tended there may be settled now."""
        for writer in self.tended:
            lane = self.lanes.get(writer)
            if lane is not None:
                places = lane.places
                self.settled.update(((writer, path), None) for path in paths if path in places)

    def settle(
        self, limit: int, busy: Collection[str], *, adopts: bool = True
    ) -> list[tuple[int, str]]:
        """Take up to *limit* settled slots out of the index, one of a path, and return where
        they were, as (writer, path). Paths in *busy* wait. Unless it *adopts*, only own ones."""
        drops: dict[str, int] = {}
        waiting: list[tuple[int, str]] = []
        writers: set[int] = set()
        while self.settled and len(drops) < limit:
            place, _ = self.settled.popitem()
            writer, path = place
            if not adopts and writer != self.writer:
                continue
            is_one_more = writer not in writers and len(writers) >= ADOPTED_PER_CHANGE
            if path in busy or path in drops or is_one_more:
                waiting.append(place)
            elif self._is_settled(writer, path):
                self._update(path, writer, None)
                drops[path] = writer
                writers.add(writer)
        self.settled.update(dict.fromkeys(waiting))
        if len(self.tended) > 1:
            # What has gone may have been all that a removal in another lane covered.
            self.look_at(drops)
        return [(writer, path) for path, writer in drops.items()]

    def _is_settled(self, writer: int, path: str, slot: Slot | None = None) -> bool:
        """Whether a lane's slot is settled: the one it has, or else *slot*."""
        container, _, key = path.partition(SEPARATOR)
        cells = self.container(container)
        cell = cells.cells.get(key, {})
        if slot is None:
            slot = self.hidden.get((writer, path))
        if slot is not None:
            cell = {**cell, writer: slot}
        return writer in cell and not cells.is_counter and is_settled(cell, writer)

    def _may_drop(self, writer: int, path: str, slot: Slot | None) -> bool:
        """Whether somebody else may drop this slot: it is settled, or a removal, which may cover
        something here that moved in a change its adopter has not seen. What covers it may be
        hidden here, and was not there."""
        cell = self._whole_cell(path)
        if slot is not None:
            cell = {**cell, writer: slot}
        if writer not in cell or path[0] == "c":
            return False
        return cell[writer].value is None or is_settled(cell, writer)

    def write(
        self, slots: Mapping[str, Slot | None], drops: Collection[tuple[int, str]] = ()
    ) -> bytes:
        """Bring the Doc after the index, in one transaction: *slots* is what the index has of
        the own lane at the paths that changed, *drops* what was settled.

        Returns the update, empty if nothing had to change.
        """
        lane = self.lane(self.writer)
        written = size = 0
        first_clock = lane.clock
        with self._doc.transaction() as transaction:
            # Slots go in and out by the engine's own handles: pycrdt's Map opens a nested
            # transaction for every access, three of them for a deletion, half of a write's time.
            self._transaction = transaction._txn
            for path, slot in slots.items():
                if slot is None:
                    self._drop(lane, path)
                else:
                    size += self._put(lane, path, slot)
                    written += 1
            for writer, path in drops:
                self._drop(lane if writer == self.writer else self.lanes[writer], path)
            for _ in range(1 + 4 * written // SEGMENT_SLOTS):
                moved = lane.clock - first_clock - written
                if moved > CLEANED_SLOTS_MAX or size > CLEANED_BYTES_MAX:
                    break
                cleaned = self._clean(lane, first_clock, CLEANED_BYTES_MAX - size)
                if cleaned is None:
                    break
                size += cleaned
        if not self._updates:
            return b""
        update = self._updates.pop()
        assert not self._updates, "one transaction gives one update"
        if self._garbage > GARBAGE_MAX:
            self._renew()
        return update

    def _put(self, lane: Lane, path: str, slot: Slot) -> int:
        """Write a slot into the head; return its bytes."""
        head = lane.head
        if head is None or head.used >= _room(lane):
            head = self._open(lane)
        old = lane.places.get(path)
        if old is not None:
            segment = lane.items[old][0]
            if segment is not head:
                self._take_out(lane, segment, path)
        data = slot.encode()
        self._map(lane, head).insert(self._transaction, path, data)
        lane.place(head, path, lane.clock)
        lane.clock += 1
        return len(data) + len(path)

    def _drop(self, lane: Lane, path: str) -> None:
        clock = lane.places.get(path)
        if clock is not None:
            self._take_out(lane, lane.items[clock][0], path)
            lane.leave(path)

    def _take_out(self, lane: Lane, segment: Segment, path: str) -> None:
        self._map(lane, segment).remove(self._transaction, path)

    def _open(self, lane: Lane) -> Segment:
        group = lane.last
        if group is None or group.opened >= GROUP_SEGMENTS:
            group = lane.open_group(lane.clock)
            self._root[group.key] = YMap({})
            lane.clock += 1
        head = lane.open(lane.clock, group)
        self._root[group.key][segment_key(head.clock)] = YMap({})
        lane.clock += 1
        return head

    def _map(self, lane: Lane, segment: Segment) -> Any:
        found = self._maps.get(segment.clock) if lane.writer == self.writer else None
        if found is None:
            found = self._root[segment.group.key][segment_key(segment.clock)].integrated
            if lane.writer == self.writer:
                # Others may delete theirs at any time.
                self._maps[segment.clock] = found
        return found

    def _clean(self, lane: Lane, before: int, bytes_max: int) -> int | None:
        """Clean one segment that is mostly dead and was there *before* this transaction (L4).

        Returns the bytes moved, None if there was nothing to clean. Beyond *bytes_max* the rest
        of the segment waits for another change."""
        for segment in lane.ripe.values():
            # Yjs would merge items written and deleted in one transaction, which the strict
            # form of a change refuses: what was written just now has its turn next time.
            if segment is lane.head or not segment.is_ripe() or segment.last >= before:
                continue
            slots: list[tuple[str, Slot]] = []
            size = 0
            paths = lane.live_paths(segment)
            for path in paths:
                slot = self.own_slot(path)
                assert slot is not None, f"{path!r} lies in the lane but not in the index"
                size += len(path) + len(slot.value or b"")
                if slots and size > bytes_max:
                    break
                slots.append((path, slot))
            if len(slots) < len(paths):
                return sum(self._put(lane, path, slot) for path, slot in slots)
            moved = 0
            for path, slot in slots:
                # It need not be taken out: it goes with the whole segment.
                lane.leave(path)
                moved += self._put(lane, path, slot)
            group = segment.group
            self._maps.pop(segment.clock, None)
            self._close(lane, segment)
            if group.live or group is lane.last:
                del self._root[group.key][segment_key(segment.clock)]
            else:
                del self._root[group.key]
                lane.close_group(group)
            return moved
        return None

    def _close(self, lane: Lane, segment: Segment) -> None:
        self._garbage += segment.used - len(segment.tails)
        lane.close(segment)

    # Replicating

    def lane(self, writer: int) -> Lane:
        found = self.lanes.get(writer)
        if found is None:
            found = self.lanes[writer] = Lane(writer)
        return found

    def check(
        self,
        update: bytes,
        writer: int,
        seq: int,
        version: Version,
        before: Mapping[str, Slot | None] = NOTHING_OPEN,
    ) -> Plan:
        """Check the *update* of change *seq* of *writer* against the lanes; change nothing.

        *version* is what the document has taken in, *before* what the own lane says where the
        index is ahead of it. Raises InvalidUpdate.
        """
        parsed = guard.parse_change(update)
        if parsed.client is not None and parsed.client != writer:
            raise InvalidUpdate(f"writer {writer:x} writes as {parsed.client:x} (L1)")
        lane = self.lanes.get(writer) or Lane(writer)
        clock = lane.clock
        if parsed.client is not None and parsed.clock != clock:
            raise InvalidUpdate(f"items start at clock {parsed.clock}, expected {clock}")
        groups: list[int] = []
        opened: dict[int, int] = {}
        # Item's clock, segment's clock and path of each slot, and the slots as they came.
        places: list[tuple[int, int, str]] = []
        contents: list[bytes] = []
        seen: set[str] = set()
        dead, closes = self._check_deletes(parsed.deletes, lane)
        for origin, parent, key, content in parsed.items:
            if content is None and parent == guard.ROOT:
                if key != group_key(writer, clock):
                    raise InvalidUpdate("a group outside of its writer's lane (L1)")
                groups.append(clock)
            elif content is None:
                if type(parent) is not int or key != segment_key(clock):
                    raise InvalidUpdate("a segment outside of its writer's groups (L1)")
                if parent not in lane.groups and parent not in groups:
                    raise InvalidUpdate("a segment outside of its writer's groups (L1)")
                opened[clock] = parent
            else:
                where, path = _locate(lane, opened, origin, parent, key)
                if path in seen:
                    raise InvalidUpdate(f"path {path!r} twice in one change (L4)")
                if path in lane.places and (writer, path) not in dead:
                    raise InvalidUpdate(f"path {path!r} keeps an older slot (L4)")
                seen.add(path)
                places.append((clock, where, path))
                contents.append(content)
            clock += 1
        slots = decode_slots(contents)
        moved = self._check_slots(places, slots, writer, seq, version)
        puts = [(*place, slot) for place, slot in zip(places, slots, strict=True)]
        if closes and not {*(where for _, where, _, _ in puts), *opened.values()}.isdisjoint(
            closes
        ):
            # yrs would delete it at once, and the index would have it.
            raise InvalidUpdate("writes into a segment or group that it deletes (L4)")
        drops = [(owner, path) for owner, path in dead if owner != writer or path not in seen]
        for owner, path in drops:
            # A successor may tidy up in another's lane, and nothing else (L6).
            open_slot = before.get(path) if owner == self.writer else None
            if owner != writer and not self._may_drop(owner, path, open_slot):
                raise InvalidUpdate(f"{writer:x} deletes slot {path!r} of {owner:x} (L1)")
        return Plan(writer, groups, list(opened.items()), puts, drops, closes, moved, clock)

    def _check_slots(
        self,
        places: list[tuple[int, int, str]],
        slots: list[Slot],
        writer: int,
        seq: int,
        version: Version,
    ) -> set[str]:
        """Check the slots of a change; return the paths of those that only moved."""
        moved: set[str] = set()
        # Container -> keys there, and what is new at them.
        found: dict[str, tuple[list[str], list[Slot]]] = {}
        for (_, _, path), slot in zip(places, slots, strict=True):
            if slot.seq != seq:
                here = self.slot(writer, path)
                if here == slot:
                    moved.add(path)
                    continue
                # Missing, it may be one that an adopter dropped before this change turned up (L6).
                if here is not None or slot.seq > seq:
                    raise InvalidUpdate(f"slot {path!r} is dated {slot.seq} in change {seq}")
            for other, covered in slot.covers.items():
                # Else one could cover what is not written yet, and it would vanish on arrival.
                if other == writer or covered > version.get(other, 0):
                    raise InvalidUpdate(
                        f"slot {path!r} covers what its writer cannot have seen (L2)"
                    )
            name, separator, key = path.partition(SEPARATOR)
            if name not in found or not separator:
                found.setdefault(split_path(path)[0], ([], []))
            keys, new = found[name]
            keys.append(key)
            new.append(slot)
        for name, (keys, new) in found.items():
            check_contents(name, keys, new)
        return moved

    def _check_deletes(
        self, deletes: list[tuple[int, int, int]], lane: Lane
    ) -> tuple[set[tuple[int, str]], list[int]]:
        """What the delete set removes: (lane's writer, path) of slots, clocks of segments and of
        groups after them."""
        dead: set[tuple[int, str]] = set()
        closes: list[int] = []
        shuts: list[int] = []
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
                elif clock in owner.groups and owner is lane:
                    shuts.append(clock)
                elif (
                    owner is lane
                    or clock in owner.segments
                    or clock in owner.groups
                    or clock >= owner.clock
                ):
                    # Else the owner replaced it, in a change that its adopter has not seen (L6).
                    raise InvalidUpdate(f"deletes item {client:x}:{clock}, which is not there")
        for clock in closes:
            segment = lane.segments[clock]
            if any((lane.writer, path) not in dead for path in lane.live_paths(segment)):
                raise InvalidUpdate(f"deletes segment {clock} with slots in it (L4)")
        for clock in shuts:
            left = sum(1 for at in closes if lane.segments[at].group.clock == clock)
            if lane.groups[clock].live != left:
                raise InvalidUpdate(f"deletes group {clock} with segments in it (L4)")
        return dead, closes + shuts

    def apply(self, update: bytes, plan: Plan) -> list[str]:
        """Apply a checked change to the Doc and the index; return the paths that changed.

        Whatever pycrdt raises comes out as it is, PanicException (a BaseException) included;
        the Doc is then beyond use and must be rebuilt, the index is unchanged.
        """
        self._doc.apply_update(update)
        self._updates.clear()
        touched = self.enter(plan)
        if self._garbage > GARBAGE_MAX:
            self._renew()
        return touched

    def enter(self, plan: Plan) -> list[str]:
        """Bring the index after a checked change; return the paths that changed."""
        lane = self.lane(plan.writer)
        lane.clock = plan.clock
        for clock in plan.groups:
            lane.open_group(clock)
        for clock, group in plan.segments:
            lane.open(clock, lane.groups[group])
        touched: list[str] = []
        hides = not self.is_plain
        for owner, path in plan.drops:
            self.lane(owner).leave(path)
            self._update(path, owner, None)
            touched.append(path)
        for clock, where, path, slot in plan.puts:
            lane.place(lane.segments[where], path, clock)
            if path in plan.moved:
                continue
            if hides:
                before = self._seen(path)
                self._update(path, plan.writer, slot)
                if self._seen(path) == before:
                    continue
            else:
                container, _, key = path.partition(SEPARATOR)
                self.container(container).update(key, plan.writer, slot)
            touched.append(path)
        for clock in plan.closes:
            if clock in lane.segments:
                self._close(lane, lane.segments[clock])
            else:
                lane.close_group(lane.groups[clock])
        self.look_at(touched)
        return touched

    # State

    def state(self) -> bytes:
        """The whole document as one update, proportional to its live content."""
        update: bytes = self._doc.get_update()
        return update

    def held(self, lane: Lane, segment: Segment) -> dict[str, bytes]:
        """What the Doc holds in a segment, path -> encoded slot; nothing if it lacks it."""
        try:
            found = self._root[segment.group.key][segment_key(segment.clock)]
        except KeyError:
            return {}
        with self._doc.transaction() as transaction:
            # By the engine's own handles: see `write`.
            read, txn = found.integrated.get, transaction._txn
            return {path: bytes(read(txn, path)) for path in found.keys()}

    def live_bytes(self) -> int:
        """What the live slots would take, each written down once with its path. Walks them all."""
        return sum(
            len(name.encode()) + len(SEPARATOR) + len(key.encode()) + len(slot.encode())
            for name, container in self.containers.items()
            for key, cell in container.cells.items()
            for _, slot in live_slots(cell)
        )

    def load(self, state: bytes, version: Version) -> None:
        """Take *state*, the document at *version* from anybody, in place of what is here.

        It goes into a fresh Doc, never into the living one. Raises InvalidUpdate, and what
        pycrdt raises; then nothing changed.
        """
        lanes, containers = read_state(state, version, check_contents)
        doc: Doc[Any] = Doc(client_id=self.writer)
        doc.apply_update(state)
        self._replace(doc)
        self.lanes, self.containers = lanes, containers
        self.settled = {}
        self._veil_all()
        for writer in self.tended:
            self._look_over(writer)

    def join(self, state: bytes, newer: Callable[[int], bool]) -> bytes:
        """Return the join of this document and *state*: the lanes for which ``newer(writer)``
        from *state*, the others from here. Of one lane, the higher seq has everything, except
        for deletions by an adopter (L6): those of both sides count. Raises InvalidUpdate."""
        scratch: Doc[Any] = Doc()
        scratch.apply_update(guard.join_states(self.state(), state, newer))
        joined: bytes = scratch.get_update()
        return joined

    def canonical(self) -> dict[str, Cell]:
        """Every path with its slots, hidden or not: equal on replicas of equal version."""
        found = {
            name + SEPARATOR + key: dict(cell)
            for name, container in sorted(self.containers.items())
            for key, cell in sorted(container.cells.items())
        }
        for (writer, path), slot in self.hidden.items():
            found[path][writer] = slot
        return found


def _room(lane: Lane) -> int:
    """How much is written into a segment of *lane* before it is full."""
    return min(SEGMENT_SLOTS, max(SEGMENT_SLOTS // 4, 4 * len(lane.places)))


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
        raise InvalidUpdate(f"path {key!r} starts twice in segment {segment.clock}")
    return parent, key
