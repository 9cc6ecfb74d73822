"""
Loading: a whole state, from bytes to lanes and index.

All slots pass here when a store is opened, a snapshot comes in or the past is looked at. So they
are taken a run at a time, as lists rather than one by one: `guard` parses, and this puts each slot
into its lane and its cell, unless it breaks a rule.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from crdtstate import guard
from crdtstate.clock import Version
from crdtstate.errors import InvalidUpdate
from crdtstate.lane import Lane, Segment, group_key, segment_key
from crdtstate.slots import SEPARATOR, Container, Slot, decode_slots, split_path

LARGE = 1 << 20
"""Bytes of a state from which it takes long enough that Python's collector matters."""


@contextmanager
def _collector_at_rest(size: int) -> Iterator[None]:
    """Let Python look for cycles later: what a load of *size* bytes allocates has none, and going
    through all of it again and again takes half of the time."""
    if size < LARGE or not gc.isenabled():
        # Small loads may come often, and what is moved to the oldest generation is collected late.
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            # To the oldest generation with it, or each of the younger ones goes through it first.
            gc.freeze()
            gc.unfreeze()
        gc.enable()


_Check = Callable[[str, list[str], list[Slot]], None]
"""Given a container, keys in it, and their slots, raises InvalidUpdate if they are not right."""


def read_state(
    state: bytes, version: Version, check: _Check
) -> tuple[dict[int, Lane], dict[str, Container]]:
    """Parse a whole document at *version* into lanes and index, and *check* what slots hold.
    Raises InvalidUpdate."""
    with _collector_at_rest(len(state)):
        return _read_state(state, version, check)


def _read_state(
    state: bytes, version: Version, check: _Check
) -> tuple[dict[int, Lane], dict[str, Container]]:
    lanes: dict[int, Lane] = {}
    containers: dict[str, Container] = {}
    for writer, parsed in guard.parse_state(state).items():
        lane = lanes[writer] = Lane(writer)
        cells = _Cells(writer, version, containers, check)
        for part in parsed.parts:
            if isinstance(part, guard.Run):
                _read_run(lane, part)
                cells.enter(part.keys, part.contents)
                # Its memory is used again at once.
                part.contents.clear()
            elif part[2] != guard.GC:
                _read_struct(lane, part, cells)
        cells.finish()
        if len(lane.places) != cells.count:
            raise InvalidUpdate(f"a path has two slots in the lane {writer:x} (L4)")
        lane.clock = parsed.clock
        lane.ripe = {at: segment for at, segment in lane.segments.items() if segment.is_ripe()}
    return lanes, containers


def _read_run(lane: Lane, run: guard.Run) -> None:
    group = lane.groups.get(run.parent)
    if group is not None:
        if run.keys:
            raise InvalidUpdate(_NO_SEGMENT)
        # What is left of segments.
        group.opened += sum(length for _, length, _ in run.dead)
        return
    segment = lane.segments.get(run.parent)
    if segment is None:
        raise InvalidUpdate(_OUTSIDE)
    if run.keys:
        lane.place_all(segment, run.keys, run.clocks)
    for clock, length, path in run.dead:
        _bury(lane, segment, path, clock, length)


def _read_struct(lane: Lane, struct: guard.Struct, cells: _Cells) -> None:
    clock, length, kind, _, parent, path, content = struct
    assert path is not None
    if parent == guard.ROOT:
        if kind != guard.SEGMENT:
            return
        if path != group_key(lane.writer, clock):
            raise InvalidUpdate("a group outside of its writer's lane (L1)")
        lane.open_group(clock)
    elif type(parent) is int and parent in lane.groups:
        group = lane.groups[parent]
        if kind == guard.DELETED:
            group.opened += length
        elif kind == guard.SEGMENT and path == segment_key(clock):
            lane.open(clock, group)
        else:
            raise InvalidUpdate(_NO_SEGMENT)
    else:
        segment = lane.segments.get(parent) if type(parent) is int else None
        if segment is None:
            raise InvalidUpdate(_OUTSIDE)
        if kind == guard.DELETED:
            _bury(lane, segment, path, clock, length)
        else:
            assert content is not None
            lane.place(segment, path, clock)
            cells.add(path, content)


_OUTSIDE = "a slot outside of its writer's segments (L1)"
_NO_SEGMENT = "a group holds something that is no segment (L1)"


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


class _Cells:
    """Puts the slots of one lane into the index."""

    def __init__(
        self, writer: int, version: Version, containers: dict[str, Container], check: _Check
    ) -> None:
        # How many there were.
        self.count = 0
        self._writer = writer
        self._version = version
        self._containers = containers
        self._check = check
        # What came alone, and goes in together.
        self._paths: list[str] = []
        self._contents: list[bytes] = []

    def add(self, path: str, content: bytes) -> None:
        """Put one in by `finish`."""
        self._paths.append(path)
        self._contents.append(content)

    def finish(self) -> None:
        self.enter(self._paths, self._contents)

    def enter(self, paths: list[str], contents: list[bytes]) -> None:
        """Put in slots that are encoded."""
        self.count += len(paths)
        writer, version = self._writer, self._version
        newest = version.get(writer, 0)
        # Container -> keys there, and slots.
        found: dict[str, tuple[list[str], list[Slot]]] = {}
        for path, slot in zip(paths, decode_slots(contents), strict=True):
            if slot.seq > newest:
                raise InvalidUpdate(f"slot {path!r} is newer than its document")
            if slot.covers:
                _check_covers(path, slot, writer, version)
            name, separator, key = path.partition(SEPARATOR)
            if name not in found or not separator:
                found.setdefault(split_path(path)[0], ([], []))
            keys, slots = found[name]
            keys.append(key)
            slots.append(slot)
        for name, (keys, slots) in found.items():
            self._check(name, keys, slots)
            if name not in self._containers:
                self._containers[name] = Container(name)
            self._containers[name].enter(writer, keys, slots)


def _check_covers(path: str, slot: Slot, writer: int, version: Version) -> None:
    if writer in slot.covers:
        raise InvalidUpdate(f"slot {path!r} covers itself (L2)")
    if any(seq > version.get(other, 0) for other, seq in slot.covers.items()):
        raise InvalidUpdate(f"slot {path!r} covers what is newer than its document (L2)")
