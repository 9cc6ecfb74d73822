"""
One lane: where the slots of one writer lie, the shadow of its items in the Doc.

yrs tells nobody which clock an item has or what a deleted one said, and whoever checks a change, or
writes one, has to know. So this is kept up beside the Doc: of each segment the last item of each
path, and of each path the one live item. `lanes` has the rules.
"""

from __future__ import annotations

from itertools import repeat

CLEANED_BELOW = 4
"""A closed segment is cleaned when at most one slot in so many is live."""


def group_key(writer: int, clock: int) -> str:
    """The root key of the group that *writer* opens at *clock*: never used twice."""
    return f"{writer}/{clock}"


def segment_key(clock: int) -> str:
    """The key, in its group, of the segment that is opened at *clock*."""
    return str(clock)


class Group:
    """A map of a lane that holds segments."""

    __slots__ = ("clock", "key", "opened", "live")

    def __init__(self, clock: int, key: str) -> None:
        self.clock = clock
        self.key = key
        # Segments ever opened in it, and those of them that live.
        self.opened = 0
        self.live = 0


class Segment:
    """One nested map of a lane: the last item of every path written to it, live or not."""

    __slots__ = ("clock", "group", "tails", "used", "live", "last")

    def __init__(self, clock: int, group: Group) -> None:
        self.clock = clock
        self.group = group
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

    __slots__ = ("writer", "clock", "groups", "segments", "items", "places", "ripe", "head", "last")

    def __init__(self, writer: int) -> None:
        self.writer = writer
        # The clock that yrs gives to the writer's next item.
        self.clock = 0
        # Item clock of a living group -> group, and the newest.
        self.groups: dict[int, Group] = {}
        self.last: Group | None = None
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

    def open_group(self, clock: int) -> Group:
        group = self.groups[clock] = self.last = Group(clock, group_key(self.writer, clock))
        return group

    def open(self, clock: int, group: Group) -> Segment:
        segment = self.segments[clock] = self.head = Segment(clock, group)
        group.opened += 1
        group.live += 1
        return segment

    def place(self, segment: Segment, path: str, clock: int) -> None:
        """Record that *path* is now said by the item *clock* of *segment*."""
        if path in self.places:
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

    def place_all(self, segment: Segment, paths: list[str], clocks: list[int]) -> None:
        """`place` for many items, each at a path that is new to *segment*."""
        segment.tails.update(zip(paths, clocks, strict=True))
        segment.used += len(paths)
        segment.live += len(paths)
        segment.last = max(segment.last, clocks[-1])
        self.items.update(zip(clocks, zip(repeat(segment), paths, strict=False), strict=True))
        self.places.update(zip(paths, clocks, strict=True))

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
        segment.group.live -= 1
        self.ripe.pop(segment.clock, None)
        if segment is self.head:
            self.head = None
        for clock in segment.tails.values():
            del self.items[clock]

    def close_group(self, group: Group) -> None:
        """Forget a deleted group; its segments were closed before."""
        del self.groups[group.clock]
        if group is self.last:
            self.last = None

    def live_paths(self, segment: Segment) -> list[str]:
        return [path for path, clock in segment.tails.items() if self.places.get(path) == clock]
