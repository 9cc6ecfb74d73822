"""
History: what the journal tells of a document, change by change.

A change says who made it, why and when. Which places it wrote follows from its update only beside
the lanes as they stood: items that replace others name these by number. So history is *replayed*,
on a `PastDocument` that starts where the journal can start it. Of changes before that, `Names`
tells what can be told without: places whose names were spelled out since the journal begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from crdtstate.change import RESOLUTION, TIDY, Change
from crdtstate.clock import Dot, Stamp, Version
from crdtstate.errors import UsageError
from crdtstate.guard import CLOCK_MAX, parse_change
from crdtstate.past import KINDS, PastDocument, Place, Selection
from crdtstate.slots import Slot

KINDS_OF_CHANGE = {0: "write", RESOLUTION: "resolution", TIDY: "tidying"}


@dataclass(frozen=True, slots=True)
class PastChange:
    """One change of a document's history.

    Attributes:
        document: The document's name.
        dot: Which it is: its writer, and the how-manieth of this writer.
        agent: Who made it,
        run: in which run,
        message: and why, in their words.
        kind: ``"write"``, ``"resolution"`` of a conflict, or ``"tidying"``: it changed nothing
            that can be read.
        stamp: When, by the writer's hybrid logical clock; `Stamp.time` is a datetime.
        paths: The places it wrote, as text such as ``plan['goal']``; the roots, in a shared
            document.
        size: Its bytes in the journal.
        is_partial: Whether it may have written more places, whose names the journal has forgotten.
    """

    document: str
    dot: Dot
    agent: str
    run: str
    message: str
    kind: str
    stamp: Stamp
    paths: tuple[str, ...]
    size: int
    is_partial: bool = False

    def __str__(self) -> str:
        when = self.stamp.time.isoformat(timespec="milliseconds")
        what = ", ".join(self.paths[:5]) + (", ..." if len(self.paths) > 5 else "")
        run = f" [{self.run}]" if self.run else ""
        why = f": {self.message}" if self.message else ""
        return f"{when} {self.agent}{run} {self.kind} {what or '-'}{why}"


class _Trail:
    """What was seen of one writer's lane.

    Attributes:
        first: The clock of the first item that was looked at.
        tails: Clock of the last item of a path in a segment -> the path, None if it is unknown,
            and the segment's clock.
        segments: Clock of a segment -> the clocks of its tails.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.tails: dict[int, tuple[str | None, int]] = {}
        self.segments: dict[int, set[int]] = {}

    def put(self, clock: int, origin: int | None, parent: int, path: str | None) -> str | None:
        """A new item, which follows *origin* or starts a chain; returns its path if it is known."""
        if origin is not None:
            path, parent = self.tails.pop(origin, (None, -1))
            self.segments.get(parent, set()).discard(origin)
        self.tails[clock] = path, parent
        self.segments.setdefault(parent, set()).add(clock)
        return path

    def close(self, segment: int) -> None:
        """A segment is deleted: nothing will follow what is in it."""
        for clock in self.segments.pop(segment, ()):
            del self.tails[clock]


class Names:
    """The places that changes write, told without the lanes they are written to."""

    def __init__(self) -> None:
        self._trails: dict[int, _Trail] = {}

    def take(self, change: Change) -> tuple[list[str], bool]:
        """The paths that the next change wrote, as far as they are known, and whether that is all.

        What was only tidied away is among them: without the lanes it cannot be told apart.

        Raises:
            InvalidUpdate: It is malformed.
        """
        if change.shared:
            return [], False
        parsed = parse_change(change.update)
        trail = self._trails.get(change.writer)
        if trail is None:
            first = parsed.clock if parsed.client is not None else CLOCK_MAX
            trail = self._trails[change.writer] = _Trail(first)
        trail.first = min(trail.first, parsed.clock if parsed.client is not None else CLOCK_MAX)
        deleted = [
            clock
            for owner, start, length in parsed.deletes
            # In others' lanes it is only tidied up.
            if owner == change.writer
            for clock in range(start, start + length)
        ]
        followed = {origin for origin, _, _, data in parsed.items if data is not None}
        gone = self._gone(trail, [clock for clock in deleted if clock not in followed])
        written: dict[str | None, None] = {}
        moved: set[str | None] = set()
        for clock, (origin, parent, key, data) in enumerate(parsed.items, parsed.clock):
            if data is None:
                continue
            path = trail.put(clock, origin, parent if type(parent) is int else -1, key)
            if Slot.decode(data).seq == change.seq:
                written[path] = None
            else:
                moved.add(path)
        if change.kind != TIDY:
            written.update((path, None) for path in gone if path is None or path not in moved)
        for clock in deleted:
            trail.close(clock)
        return [path for path in written if path is not None], None not in written

    def _gone(self, trail: _Trail, clocks: list[int]) -> list[str | None]:
        """What stood at *clocks*; nothing did where a segment began."""
        known = [trail.tails.get(clock) for clock in clocks]
        return [
            None if there is None else there[0]
            for there, clock in zip(known, clocks, strict=True)
            if there is not None or clock < trail.first
        ]


class Teller:
    """Turns changes into `PastChange`, and leaves out what was not asked for."""

    def __init__(
        self,
        agent: str | None,
        run: str | None,
        path: str | None,
        limit: int | None,
        *,
        tidying: bool,
    ) -> None:
        if limit is not None and (type(limit) is not int or limit < 1):
            raise UsageError(f"limit is a number of changes from 1, or None, not {limit!r}")
        for label, given in (("agent", agent), ("run", run), ("path", path)):
            if given is not None and not isinstance(given, str):
                raise UsageError(f"{label} is a str, not {given!r}")
        self._agent = agent
        self._run = run
        self._path = path
        # How many are wanted at most; whoever iterates keeps to it.
        self.limit = limit
        self._tidying = tidying

    def tell(self, change: Change, paths: list[str], is_whole: bool) -> PastChange | None:
        """*change*, which wrote *paths* of lanes; None if it was not asked for."""
        agent, message, run = change.origin
        if self._agent not in (None, agent) or self._run not in (None, run):
            return None
        if change.kind == TIDY and not self._tidying:
            return None
        shown = []
        places = [Place.of(path) for path in paths if path[0] in KINDS or path[0] == "y"]
        for place in places:
            shown.append(place.name if place.container[0] == "y" else place.path)
        if self._path is not None:
            chosen = Selection([self._path])
            if not any(chosen.covers(p.name, lambda p=p: p.shown_key) for p in places):  # type: ignore[misc]
                return None
        return PastChange(
            change.document,
            change.dot,
            agent,
            run,
            message,
            KINDS_OF_CHANGE[change.kind],
            Stamp(change.stamp),
            tuple(shown),
            len(change.data),
            not is_whole,
        )


Portions = Callable[[Version, Version], Iterator[list[Change]]]
"""Reads the changes between two versions of a document, in causal order, a portion at a time."""


class History:
    """The parts of a document's history, from where it begins to where it ends.

    Args:
        start: What is not to be told.
        end: How far it goes.
        base: The document at some version from which the journal is complete up to *end*; None
            if there is no such version.
    """

    def __init__(
        self, start: Version, end: Version, base: PastDocument | None, read: Portions
    ) -> None:
        self._start = start
        self._end = end
        self._base = base
        self._read = read

    def portions(self, teller: Teller) -> Iterator[list[PastChange]]:
        """All that *teller* tells of it, a portion at a time; some are empty.

        Raises:
            InvalidUpdate: What is stored is damaged.
        """
        start, base = self._start, self._base
        if base is None or not base.version <= start:
            names = Names()
            until = self._end if base is None else base.version.copy()
            for changes in self._read(start, until):
                yield list(_told(teller, ((c, *names.take(c)) for c in changes)))
            start = start.copy()
            start.merge(until)
        if base is None:
            return
        for changes in self._read(base.version.copy(), self._end):
            taken = ((change, base.take(change)) for change in changes)
            yield list(
                _told(teller, ((c, paths, True) for c, paths in taken if not start.covers(c.dot)))
            )


def _told(teller: Teller, found: Iterator[tuple[Change, list[str], bool]]) -> Iterator[PastChange]:
    return (told for each in found if (told := teller.tell(*each)) is not None)
